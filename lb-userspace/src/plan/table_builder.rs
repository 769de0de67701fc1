//! Giving numbers to what is desired: those in use are kept, freed ones rest as long as possible.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use lb_common::{
    abi::size::{self, NODE_ADDRESSES},
    access::every_service,
    backend::{self, Kind, SINGLE, State},
    endpoint::{self, Listener},
    net::{Be16, Wide},
    slot::Slot,
    tunnel::{SELF, TaskKey, mapped, name},
};

use super::{
    allocation_index::{AllocationIndex, family, listener_mark, source_mark},
    desired::{DesiredNode, DesiredPort, DesiredService},
    numbers::Numbers,
    tables::{At, BackendEntry, BackendLabel, ClientRange, PortLabel, ServiceLabel, Tables, TaskListener},
    transition::Next,
};
use crate::{
    cluster::{Affinity, Port, Protocol, Scheduler},
    slots,
};

/// Sizes of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Services.
    pub services: u32,
    /// Listeners of each family, and published ports.
    pub listeners: u32,
    /// Backends.
    pub backends: u32,
    /// Slots.
    pub slots: u32,
    /// Nodes.
    pub nodes: u32,
    /// Ranges in the lists of who may connect.
    pub ranges: u32,
}

/// What belongs to a service in the tables.
#[derive(Debug, Default)]
pub(super) struct ServiceEntries {
    pub number: Option<u32>,
    pub ports: Vec<u32>,
    pub backends: Vec<u32>,
    pub listeners: Vec<At>,
    pub endpoints: Vec<At>,
    pub tasks: Vec<TaskKey>,
    pub access: Vec<ClientRange>,
}

/// Why a service is left out.
#[derive(Debug)]
pub(super) enum Refusal {
    /// There is no room.
    Full(String),
    /// Another service, of this name, has what it needs.
    Taken(String, String),
    /// Its node is left out.
    Node(String),
}

impl Refusal {
    /// In words for the operator.
    pub fn reason(&self) -> &str {
        let (Self::Full(reason) | Self::Taken(_, reason) | Self::Node(reason)) = self;
        reason
    }
}

/// What makes a backend of a service the same from one plan to the next. The address and the next hop belong to it: connections
/// carry both.
type Identity<'a> = (&'a str, Protocol, u16, (IpAddr, bool), u8);

/// What a listener leads to: a port of the tasks, by one family.
type Target = (Protocol, u16, bool);

/// What leads to a backend.
fn target(label: &BackendLabel) -> Target {
    (label.protocol, label.target, label.address.is_ipv4())
}

/// The tables as they are to be, while services are taken out and put in.
pub(super) struct TableBuilder<'a> {
    actual: &'a Tables,
    limits: &'a Limits,
    pub next: Next<'a>,
    allocations: AllocationIndex,
    services: Numbers<'a, ServiceLabel>,
    cursors: Numbers<'a, PortLabel>,
    backends: Numbers<'a, BackendEntry>,
    /// Numbers of the nodes by name.
    nodes: HashMap<String, u32>,
    /// Whether there are other nodes with agents.
    peers: bool,
    /// What stands in for whom, before and after.
    stand_ins: BTreeMap<Ipv4Addr, Ipv6Addr>,
}

impl<'a> TableBuilder<'a> {
    /// The tables as they are, and the allocations of them.
    pub fn new(actual: &'a Tables, limits: &'a Limits, mut allocations: AllocationIndex) -> Self {
        // A number that was used last is given again last.
        let rested = actual.generations.keys().next_back().map_or(0, |last| last + 1);
        allocations.ranges.rewind();
        Self {
            actual,
            limits,
            next: Next::new(actual),
            allocations,
            services: Numbers::new(&actual.services, limits.services, 0, None),
            cursors: Numbers::new(&actual.ports, limits.listeners, 0, None),
            backends: Numbers::new(&actual.backends, limits.backends, rested, Some(&actual.resting)),
            nodes: actual.nodes.iter().map(|(number, label)| (label.name.clone(), *number)).collect(),
            peers: !actual.peers.is_empty(),
            stand_ins: actual.stand_ins.clone(),
        }
    }

    /// Puts exactly these nodes in, those with an agent as peers; what there is no room for is said.
    pub fn set_nodes(&mut self, nodes: &[DesiredNode], refused: &mut Vec<String>) {
        let known = std::mem::take(&mut self.nodes);
        // Numbers of nodes start at one; a number that entries for endpoints may still name rests.
        let mut numbers =
            Numbers::new(&self.actual.nodes, self.limits.nodes + 1, self.actual.last_node + 1, None);
        numbers.first = 1;
        let (mut labels, mut peers) = (BTreeMap::new(), BTreeMap::new());
        let (mut peer_keys, mut peer_numbers) = (BTreeMap::new(), BTreeMap::new());
        for node in nodes {
            let name = &node.label.name;
            let Some(number) = known.get(name).copied().or_else(|| numbers.next()) else {
                let room = self.limits.nodes;
                refused.push(format!(
                    "node {name} is left out: there is room for {room} nodes; attach again with a higher --max-nodes"
                ));
                continue;
            };
            self.nodes.insert(name.clone(), number);
            labels.insert(number, node.label.clone());
            let known_as = match node.peer() {
                Some(peer) => {
                    peers.insert(number, peer);
                    peer_keys.extend(node.cookies.map(|cookies| (number, cookies.incoming)));
                    number
                }
                None if node.label.this => SELF,
                None => continue,
            };
            let room = (self.limits.nodes as usize + 1) * NODE_ADDRESSES;
            let fits = node.addresses.len().min(room - peer_numbers.len());
            if fits < node.addresses.len() {
                refused.push(format!(
                    "node {name} is known by {fits} of its {} addresses: there is room for {room} of all nodes; attach again \
                     with a higher --max-nodes",
                    node.addresses.len()
                ));
            }
            peer_numbers.extend(node.addresses[..fits].iter().map(|address| (*address, known_as)));
        }
        self.peers = !peers.is_empty();
        self.next.nodes.replace(labels);
        self.next.peers.replace(peers);
        self.next.peer_keys.replace(peer_keys);
        self.next.peer_numbers.replace(peer_numbers);
    }

    /// The number of a node by its name, if it has one.
    pub fn node(&self, name: &str) -> Option<u32> {
        self.nodes.get(name).copied()
    }

    /// Whether there are to be other nodes with agents.
    pub fn has_peers(&self) -> bool {
        self.peers
    }

    /// Takes out everything of a service.
    pub fn withdraw(&mut self, in_tables: &ServiceEntries) {
        for index in &in_tables.backends {
            if let Some(mark) = self.actual.backends.get(index).and_then(source_mark) {
                self.allocations.marks.remove(mark);
            }
            self.next.backends.remove(*index);
        }
        for at in &in_tables.listeners {
            if let Some(listener) = self.actual.listeners.get(at) {
                self.allocations.ranges.leave(listener);
            }
            self.allocations.marks.remove(listener_mark(at));
            self.next.listeners.remove(*at);
        }
        in_tables.ports.iter().for_each(|cursor| self.next.ports.remove(*cursor));
        in_tables.endpoints.iter().for_each(|at| self.next.endpoints.remove(*at));
        in_tables.tasks.iter().for_each(|key| self.next.tasks.remove(*key));
        in_tables.access.iter().for_each(|of| self.next.access.remove(*of));
        if let Some(number) = in_tables.number {
            self.next.services.remove(number);
        }
    }

    /// Puts a service in, or nothing of it. What it had before keeps its numbers.
    pub fn add(
        &mut self,
        service: &DesiredService,
        before: &ServiceEntries,
    ) -> Result<ServiceEntries, Refusal> {
        self.room_for_listeners(service)?;
        let number = before.number.or_else(|| self.services.next()).ok_or_else(|| full("services"))?;
        let backends = self.number_backends(service, number, before)?;
        let known = self.cursors_of(before);
        let mut by_target: HashMap<Target, Vec<usize>> = HashMap::new();
        for (position, (_, entry)) in backends.iter().enumerate() {
            if entry.backend.state == State::Active as u8 {
                by_target.entry(target(&entry.label)).or_default().push(position);
            }
        }
        for positions in by_target.values_mut() {
            positions.retain(|position| service.backends[*position].weight > 0);
            let preferred = |position: &usize| service.backends[*position].preferred;
            if !service.falls_over || positions.iter().any(preferred) {
                positions.retain(preferred);
            }
        }
        let mut ports = Vec::with_capacity(service.ports.len());
        for port in &service.ports {
            let cursor = known.get(&(port.port.protocol, port.port.published)).copied();
            let cursor = cursor.or_else(|| self.cursors.next()).ok_or_else(|| full("listeners"))?;
            let eligible = |v4| {
                // What has tasks here, of which none is to get any, has an empty list; who has none, none.
                let positions = by_target.get(&(port.port.protocol, port.port.target, v4))?;
                let of = |position: &usize| {
                    let (index, entry) = &backends[*position];
                    (*index, service.backends[*position].weight, entry.label.task.as_str())
                };
                Some(positions.iter().map(of).collect())
            };
            ports.push(self.port((number, cursor), port, service, eligible)?);
        }
        self.conflicts(&backends, &ports)?;
        Ok(self.commit(number, service, backends, ports))
    }

    /// The backends of a service with their numbers.
    fn number_backends(
        &mut self,
        service: &DesiredService,
        number: u32,
        before: &ServiceEntries,
    ) -> Result<Vec<(u32, BackendEntry)>, Refusal> {
        let actual = self.actual;
        let entries = before.backends.iter().filter_map(|index| Some((actual.backends.get(index)?, *index)));
        let mut known: HashMap<Identity<'_>, u32> =
            entries.map(|(entry, index)| (identity(&entry.label, entry.backend.kind), index)).collect();
        let mut backends = Vec::with_capacity(service.backends.len());
        for wanted in &service.backends {
            let mut backend = wanted.backend;
            backend.service = number;
            if backend.kind == Kind::Peer as u8 {
                backend.peer = self.peer(&wanted.label.node)?;
            }
            let index = match known.entry(identity(&wanted.label, backend.kind)) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => *new.insert(self.backends.next().ok_or_else(|| full("backends"))?),
            };
            backends.push((index, BackendEntry { backend, label: wanted.label.clone() }));
        }
        Ok(backends)
    }

    /// The number of a node as backends have it.
    fn peer(&self, name: &str) -> Result<u16, Refusal> {
        let number = self.node(name).and_then(|number| number.try_into().ok());
        number.ok_or_else(|| Refusal::Node(format!("node {name} is left out")))
    }

    /// What another service has already: a listener, or a task's endpoint, whose answers only one can own.
    fn conflicts(&self, backends: &[(u32, BackendEntry)], ports: &[PlannedPort]) -> Result<(), Refusal> {
        for (at, _) in ports.iter().flat_map(|port| &port.listeners) {
            if let Some(listener) = self.next.listeners.get(at) {
                return Err(self.taken(
                    listener.service,
                    format!("another service already listens on {}:{}/{}", at.address, at.port, at.protocol),
                ));
            }
        }
        self.stand_in_conflicts(backends)?;
        for (_, entry) in backends {
            let at = endpoint(entry);
            // Bridges have the same range on every node: the address of a peer's task means nothing here.
            if answers_here(entry)
                && let Some(owner) =
                    self.next.endpoints.get(&at).and_then(|set| self.next.backends.get(&set.backend))
            {
                let reason = format!(
                    "{}:{}/{} of task {} is already the address of task {}",
                    at.address, at.port, at.protocol, entry.label.task, owner.label.task
                );
                return Err(self.taken(owner.backend.service, reason));
            }
            // Peers could not say which of the two they mean.
            let named = self.next.tasks.get(&task_key(entry)).and_then(|index| self.next.backends.get(index));
            if entry.backend.kind == Kind::Local as u8
                && let Some(owner) = named
            {
                let reason = format!(
                    "task {} has the address in the cluster of task {}",
                    entry.label.task, owner.label.task
                );
                return Err(self.taken(owner.backend.service, reason));
            }
        }
        Ok(())
    }

    /// What stands in for another task already, and what there is no room for.
    fn stand_in_conflicts(&self, backends: &[(u32, BackendEntry)]) -> Result<(), Refusal> {
        let room = size::stand_ins(self.limits.backends as usize) / 2;
        let mut new: BTreeMap<Ipv4Addr, Ipv6Addr> = BTreeMap::new();
        for (_, entry) in backends {
            let Some((address, own)) = stand_in(entry) else { continue };
            let other = self.stand_ins.get(&address).or(new.get(&address)).filter(|other| **other != own);
            if let Some(other) = other {
                let reason = format!(
                    "{address} stands in for both {own} of task {} and {other}; give the task another address",
                    entry.label.task
                );
                return Err(Refusal::Taken(String::new(), reason));
            }
            if !self.stand_ins.contains_key(&address) {
                new.insert(address, own);
            }
        }
        let fits = new.is_empty() || self.stand_ins.len() + new.len() <= room;
        if fits { Ok(()) } else { Err(full("backends")) }
    }

    fn taken(&self, owner: u32, reason: String) -> Refusal {
        Refusal::Taken(
            self.next.services.get(&owner).map(|label| label.name.clone()).unwrap_or_default(),
            reason,
        )
    }

    fn room_for_listeners(&self, service: &DesiredService) -> Result<(), Refusal> {
        let wanted = service
            .ports
            .iter()
            .flat_map(|port| port.addresses.iter().map(|address| at(port.port, *address)));
        let mut come = [0; 2];
        wanted.filter(|at| self.is_new(at)).for_each(|at| come[family(&at)] += 1);
        let room = self.limits.listeners as usize;
        let fits = (0..2)
            .all(|family| come[family] == 0 || self.allocations.listeners[family] + come[family] <= room);
        if fits { Ok(()) } else { Err(full("listeners")) }
    }

    /// Whether there is room for a service's list of who may connect, under the number that it has.
    pub fn has_room_for_list(&self, service: &DesiredService, before: &ServiceEntries) -> bool {
        let is_new =
            |range: &&IpNet| before.number.is_none_or(|number| self.is_new_range(&(number, **range)));
        let new = service.access.keys().filter(is_new).count();
        new == 0 || self.allocations.access + new <= self.limits.ranges as usize
    }

    /// Has no service take these clients, in place of those known before; how many ranges find no room.
    pub fn deny(&mut self, known: &BTreeSet<IpNet>, wanted: &BTreeSet<IpNet>) -> usize {
        let of = |range: &IpNet| (every_service(range.addr().is_ipv4()), *range);
        known.iter().for_each(|range| self.next.access.remove(of(range)));
        let mut denied = 0;
        for range in wanted {
            let of = of(range);
            let is_new = self.is_new_range(&of);
            let full = self.allocations.access >= self.limits.ranges as usize;
            if denied < self.room_for_denied() && !(is_new && full) {
                self.allocations.access += usize::from(is_new);
                self.next.access.set(of, false);
                denied += 1;
            }
        }
        wanted.len() - denied
    }

    /// How many ranges of clients whom no service takes there is room for: the lists of services find as much.
    pub fn room_for_denied(&self) -> usize {
        self.limits.ranges as usize / 2
    }

    /// How many ranges in lists there is room for.
    pub fn room_for_ranges(&self) -> u32 {
        self.limits.ranges
    }

    /// Whether there is no such range of clients, nor one to come.
    fn is_new_range(&self, of: &ClientRange) -> bool {
        !self.actual.access.contains_key(of) && !self.next.access.contains(of)
    }

    /// Whether there is no such listener, nor one to come.
    fn is_new(&self, at: &At) -> bool {
        !self.actual.listeners.contains_key(at) && !self.next.listeners.contains(at)
    }

    /// The cursors that a service has, by what it publishes.
    fn cursors_of(&self, in_tables: &ServiceEntries) -> HashMap<(Protocol, u16), u32> {
        let of = |cursor: &u32| {
            let label = self.actual.ports.get(cursor)?;
            Some(((label.protocol, label.published), *cursor))
        };
        in_tables.ports.iter().filter_map(of).collect()
    }

    /// The listeners and slots of one published port of a service; `eligible` are the backends of a family that are to get new
    /// connections of it, with weights and names; `None` if none could take any.
    fn port<'b>(
        &mut self,
        (number, cursor): (u32, u32),
        wanted: &DesiredPort,
        service: &DesiredService,
        eligible: impl Fn(bool) -> Option<Vec<(u32, u16, &'b str)>>,
    ) -> Result<PlannedPort, Refusal> {
        let port = wanted.port;
        let label = PortLabel {
            service: number,
            protocol: port.protocol,
            published: port.published,
            target: port.target,
        };
        let (mut listeners, mut ranges) = (Vec::new(), Vec::new());
        for v4 in [true, false] {
            let addresses: Vec<IpAddr> =
                wanted.addresses.iter().copied().filter(|address| address.is_ipv4() == v4).collect();
            if addresses.is_empty() {
                continue;
            }
            let able = eligible(v4);
            let closed = !service.falls_over || able.as_ref().is_some_and(Vec::is_empty);
            let mut eligible = able.unwrap_or_default();
            let affine = service.affinity == Affinity::Client || service.scheduler == Scheduler::Source;
            let by_hash = affine || service.scheduler == Scheduler::Maglev;
            let known_as = |name: &'b str| if affine { place(&service.label.name, name) } else { name };
            if by_hash {
                eligible.sort_unstable_by_key(|(_, _, name)| (known_as(name), *name));
            }
            let weights: Vec<u16> = eligible.iter().map(|(_, weight, _)| *weight).collect();
            let names: Vec<&str> = eligible.iter().map(|(_, _, name)| known_as(name)).collect();
            let (order, flags) = match service.scheduler {
                _ if by_hash => (slots::maglev_table(&names, &weights), endpoint::CONSISTENT),
                Scheduler::LeastConnections => ((0..eligible.len()).collect(), endpoint::LEAST),
                Scheduler::Random => (slots::smooth_wrr(&weights), endpoint::RANDOM),
                _ => (slots::smooth_wrr(&weights), 0),
            };
            let compared = match flags & endpoint::LEAST {
                0 => vec![0; eligible.len()],
                _ => slots::compared(&weights),
            };
            let ignored = service.client_prefix.ignored(v4) << endpoint::IGNORED_SHIFT;
            let flags = flags | if affine { endpoint::AFFINE | ignored } else { 0 };
            let flags = flags | if service.access.is_empty() { 0 } else { endpoint::RESTRICTED };
            let flags = flags | if closed && eligible.is_empty() { endpoint::CLOSED } else { 0 };
            let limited = service.label.task_max_connections != 0;
            let flags = flags | if limited { endpoint::LIMITED } else { 0 };
            let slots: Vec<Slot> = order.into_iter().map(|i| Slot::new(eligible[i].0, compared[i])).collect();
            let at = |address: &IpAddr| at(port, *address);
            let slot_count = slots.len() as u32;
            let slot_base = match self.stands(&slots, addresses.iter().map(at)) {
                Some(base) => base,
                None => {
                    let base = self
                        .allocations
                        .ranges
                        .take(slot_count, self.limits.slots)
                        .ok_or_else(|| full("slots"))?;
                    ranges.push((base, slots));
                    base
                }
            };
            let listener = Listener { service: number, slot_base, slot_count, cursor, flags };
            listeners.extend(addresses.iter().map(|address| (at(address), listener)));
        }
        Ok(PlannedPort { cursor, label, listeners, ranges })
    }

    /// Where these slots stand already; those of nobody stand anywhere.
    fn stands(&self, slots: &[Slot], listeners: impl Iterator<Item = At>) -> Option<u32> {
        if slots.is_empty() {
            return Some(0);
        }
        let mut listeners = listeners.filter_map(|at| self.actual.listeners.get(&at));
        let same = listeners.find(|listener| self.actual.slots_of(listener) == Some(slots))?;
        Some(same.slot_base)
    }

    fn commit(
        &mut self,
        number: u32,
        service: &DesiredService,
        backends: Vec<(u32, BackendEntry)>,
        ports: Vec<PlannedPort>,
    ) -> ServiceEntries {
        let mut in_tables = ServiceEntries { number: Some(number), ..ServiceEntries::default() };
        self.next.services.set(number, service.label.clone());
        for (range, allowed) in &service.access {
            let of = (number, *range);
            self.allocations.access += usize::from(self.is_new_range(&of));
            in_tables.access.push(of);
            self.next.access.set(of, *allowed);
        }
        // Every listener of a family that leads to a port of the tasks.
        let mut sources: HashMap<Target, Vec<(IpAddr, u16)>> = HashMap::new();
        for port in &ports {
            for (at, _) in &port.listeners {
                let target = (port.label.protocol, port.label.target, at.address.is_ipv4());
                sources.entry(target).or_default().push((at.address, at.port));
            }
        }
        for (index, mut entry) in backends {
            let sources = sources.get(&target(&entry.label)).map_or(&[][..], Vec::as_slice);
            let local = entry.backend.kind == Kind::Local as u8;
            if local {
                entry.backend.source = cluster_address(&entry.label);
                entry.backend.flags |= backend::NAMED;
                self.stand_ins.extend(stand_in(&entry));
            }
            if answers_here(&entry) && !sources.is_empty() {
                if sources.len() == 1 {
                    entry.backend.flags |= SINGLE;
                }
                let at = endpoint(&entry);
                // A task that goes may have handed its address to one that comes.
                let taken = self.next.endpoints.contains(&at);
                if !taken || entry.backend.state == State::Active as u8 {
                    let listener = sources.first().copied().filter(|_| sources.len() == 1);
                    self.next.endpoints.set(at, TaskListener { backend: index, listener });
                    in_tables.endpoints.push(at);
                }
            }
            if local {
                let key = task_key(&entry);
                let taken = self.next.tasks.contains(&key);
                if !taken || entry.backend.state == State::Active as u8 {
                    self.next.tasks.set(key, index);
                    in_tables.tasks.push(key);
                }
            }
            entry.backend.generation = match self.actual.backends.get(&index) {
                Some(known) => known.backend.generation,
                None => self.actual.generations.get(&index).map_or(1, |last| last.wrapping_add(1)),
            };
            if let Some(mark) = source_mark(&entry) {
                self.allocations.marks.add(mark);
            }
            in_tables.backends.push(index);
            self.next.backends.set(index, entry);
        }
        for port in ports {
            in_tables.ports.push(port.cursor);
            self.next.ports.set(port.cursor, port.label);
            self.next.slots.extend(port.ranges);
            for (at, listener) in port.listeners {
                self.allocations.listeners[family(&at)] += usize::from(self.is_new(&at));
                self.allocations.ranges.join(&listener);
                self.allocations.marks.add(listener_mark(&at));
                in_tables.listeners.push(at);
                self.next.listeners.set(at, listener);
            }
        }
        in_tables
    }

    /// The tables as they are to be, and the allocations of them.
    pub fn finish(mut self) -> (Next<'a>, AllocationIndex) {
        self.allocations.marks.write(&mut self.next.filter);
        self.allocations.ranges.settle();
        for at in self.next.listeners.gone() {
            self.allocations.listeners[family(at)] -= 1;
        }
        self.allocations.access -= self.next.access.gone().count();
        if !self.stand_ins.is_empty() {
            let tasks = self.next.backends.iter().filter_map(|(_, entry)| stand_in(entry)).collect();
            self.next.stand_ins.replace(tasks);
        }
        (self.next, self.allocations)
    }
}

fn at(port: Port, address: IpAddr) -> At {
    At { address, protocol: port.protocol, port: port.published }
}

struct PlannedPort {
    cursor: u32,
    label: PortLabel,
    listeners: Vec<(At, Listener)>,
    /// New ranges of slots.
    ranges: Vec<(u32, Vec<Slot>)>,
}

fn full(what: &str) -> Refusal {
    Refusal::Full(format!("the table of {what} is full; attach again with a higher --max-{what}"))
}

/// Whether a backend's answers come to this node by themselves, from its own address.
fn answers_here(entry: &BackendEntry) -> bool {
    entry.backend.kind == Kind::Local as u8 || entry.backend.kind == Kind::Routed as u8
}

/// What stands in for a task of this node that has IPv6 alone, and its own address.
fn stand_in(entry: &BackendEntry) -> Option<(Ipv4Addr, Ipv6Addr)> {
    match (entry.label.address, entry.label.own) {
        (IpAddr::V4(address), Some(IpAddr::V6(own))) if entry.backend.kind == Kind::Local as u8 => {
            Some((address, own))
        }
        _ => None,
    }
}

/// Where a backend's answers come from.
fn endpoint(entry: &BackendEntry) -> At {
    At { address: entry.label.address, protocol: entry.label.protocol, port: entry.label.target }
}

/// The address of a task in the cluster.
fn cluster_address(label: &BackendLabel) -> Wide {
    mapped(label.overlay.unwrap_or(label.address))
}

/// How peers name a task of this node.
fn task_key(entry: &BackendEntry) -> TaskKey {
    let label = &entry.label;
    TaskKey {
        name: name(&cluster_address(label)),
        port: Be16::new(label.target),
        protocol: label.protocol.number(),
        family: if label.address.is_ipv4() { 4 } else { 6 },
    }
}

fn identity(label: &BackendLabel, kind: u8) -> Identity<'_> {
    // A peer's task is reached by its name in the cluster; what it is called on its own node may be learnt later.
    let peer = kind == Kind::Peer as u8;
    let address = label.overlay.filter(|_| peer).unwrap_or(label.address);
    (&label.task, label.protocol, label.target, (address, label.address.is_ipv4()), kind)
}

/// What stays of a task's name when another one takes its place: its slot or its node, `1` of `web.1.k3x0q1z9m2ab`. Of tasks of a
/// file, whose names stay, all of it.
fn place<'a>(service: &str, task: &'a str) -> &'a str {
    let rest = task.strip_prefix(service).and_then(|rest| rest.strip_prefix('.'));
    rest.and_then(|rest| rest.split_once('.')).map_or(task, |(place, _)| place)
}
