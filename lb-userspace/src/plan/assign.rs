//! Giving numbers to what is desired: those in use are kept, freed ones rest as long as possible.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use lb_common::{
    backend::{Kind, SHARED, SINGLE, State},
    endpoint::Listener,
    filter::{Side, position},
    net::Be16,
    tunnel::{SELF, TaskKey, mapped},
};

use super::{
    Plan,
    desired::{Desired, DesiredBackend, DesiredNode, DesiredPort, DesiredService},
    tables::{At, BackendEntry, PortLabel, ReplySet, ServiceLabel, Tables},
    transition::transition,
};
use crate::{cluster::Protocol, slots};

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
}

/// The operations that turn `actual` into what is desired.
///
/// A service that does not fit is left out whole and named in [`Plan::refused`]; what fits is planned.
pub fn plan(desired: &Desired, actual: &Tables, limits: &Limits) -> Plan {
    let mut draft = Draft::new(actual, limits);
    let mut refused = desired.refused.clone();
    for node in &desired.nodes {
        if let Err(reason) = draft.add_node(node) {
            refused.push(format!("node {} is left out: {reason}", node.label.name));
        }
    }
    for service in &desired.services {
        if let Err(reason) = draft.add(service) {
            refused.push(format!("service {} is left out: {reason}", service.label.name));
        }
    }
    let next = draft.finish();
    Plan { ops: transition(actual, &next), refused }
}

/// What makes a backend the same from one plan to the next. The address and the way belong to it: flows carry
/// both.
type Identity = (u32, String, Protocol, u16, (IpAddr, bool), u8);

struct Draft<'a> {
    actual: &'a Tables,
    limits: &'a Limits,
    next: Tables,
    nodes: Numbers<String>,
    services: Numbers<String>,
    cursors: Numbers<(u32, Protocol, u16)>,
    backends: Numbers<Identity>,
    ranges: Ranges,
}

impl<'a> Draft<'a> {
    fn new(actual: &'a Tables, limits: &'a Limits) -> Self {
        let next = Tables {
            slots: actual.slots.clone(),
            generations: actual.generations.clone(),
            ..Tables::default()
        };
        let services = actual.services.iter().map(|(index, label)| (label.name.clone(), *index));
        let cursors = actual
            .ports
            .iter()
            .map(|(index, label)| ((label.service, label.protocol, label.published), *index));
        let backends = actual.backends.iter().map(|(index, entry)| (identity_of(entry), *index));
        let used = actual.listeners.values().map(|listener| (listener.slot_base, listener.slot_count));
        // Numbers of nodes start at one; a number that entries for replies may still name rests.
        let nodes = actual.nodes.iter().map(|(number, label)| (label.name.clone(), number - 1));
        // A number that was used last is given again last.
        let rested = actual.generations.keys().next_back().map_or(0, |last| last + 1);
        Self {
            actual,
            limits,
            next,
            nodes: Numbers::new(nodes, limits.nodes, actual.last_node, None),
            services: Numbers::new(services, limits.services, 0, None),
            cursors: Numbers::new(cursors, limits.listeners, 0, None),
            backends: Numbers::new(backends, limits.backends, rested, Some(&actual.resting)),
            ranges: Ranges::new(used, limits.slots),
        }
    }

    /// Adds a node, and as a peer if it has an agent.
    fn add_node(&mut self, node: &DesiredNode) -> Result<(), String> {
        let number = self.nodes.of(node.label.name.clone());
        let number = 1 + number.ok_or_else(|| format!("there is room for {} nodes", self.limits.nodes))?;
        self.next.nodes.insert(number, node.label.clone());
        let known_as = match node.peer {
            Some(peer) => {
                self.next.peers.insert(number, peer);
                number
            }
            None if node.label.this => SELF,
            None => return Ok(()),
        };
        self.next.peer_numbers.extend(node.addresses.iter().map(|address| (*address, known_as)));
        Ok(())
    }

    /// The number of a node by its name.
    fn node(&self, name: &str) -> Result<u16, String> {
        let number = self.next.nodes.iter().find(|(_, label)| label.name == name).map(|(number, _)| *number);
        number.and_then(|number| number.try_into().ok()).ok_or_else(|| format!("node {name} is left out"))
    }

    /// Adds a service, or nothing of it.
    fn add(&mut self, service: &DesiredService) -> Result<(), String> {
        self.room_for_listeners(service)?;
        let number = self.services.of(service.label.name.clone()).ok_or_else(|| full("services"))?;
        let mut backends = Vec::new();
        for wanted in &service.backends {
            let mut entry = entry(wanted, number);
            if entry.backend.kind == Kind::Peer as u8 {
                entry.backend.peer = self.node(&entry.label.node)?;
            }
            let index = self.backends.of(identity_of(&entry)).ok_or_else(|| full("backends"))?;
            backends.push((index, entry));
        }
        let mut ports = Vec::new();
        for port in &service.ports {
            ports.push(self.port(number, port, service, &backends)?);
        }
        self.conflicts(&backends, &ports)?;
        self.commit(number, &service.label, backends, ports);
        Ok(())
    }

    /// What another service has already: a listener, or a task's endpoint, whose answers only one can own.
    fn conflicts(&self, backends: &[(u32, BackendEntry)], ports: &[PlannedPort]) -> Result<(), String> {
        for (at, _) in ports.iter().flat_map(|port| &port.listeners) {
            if self.next.listeners.contains_key(at) {
                return Err(format!(
                    "another service already listens on {}:{}/{}",
                    at.address, at.port, at.protocol
                ));
            }
        }
        for (_, entry) in backends {
            let at = endpoint(entry);
            // Bridges have the same range on every node: the address of a peer's task means nothing here.
            if answers_here(entry)
                && let Some(owner) =
                    self.next.replies.get(&at).and_then(|set| self.next.backends.get(&set.backend))
            {
                return Err(format!(
                    "{}:{}/{} of task {} is already the address of task {}",
                    at.address, at.port, at.protocol, entry.label.task, owner.label.task
                ));
            }
            // Peers could not say which of the two they mean.
            let named = self.next.tasks.get(&task_key(entry)).and_then(|index| self.next.backends.get(index));
            if entry.backend.kind == Kind::Local as u8
                && let Some(owner) = named
            {
                return Err(format!(
                    "task {} has the address in the cluster of task {}",
                    entry.label.task, owner.label.task
                ));
            }
        }
        Ok(())
    }

    fn room_for_listeners(&self, service: &DesiredService) -> Result<(), String> {
        for v4 in [true, false] {
            let of_family = |address: &&IpAddr| address.is_ipv4() == v4;
            // New listeners are set before old ones go: the table holds both for a moment.
            let going = self.actual.listeners.keys().filter(|at| !self.next.listeners.contains_key(at));
            let going = going.filter(|at| of_family(&&at.address) && !service_listens(service, at)).count();
            let have = self.next.listeners.keys().filter(|at| of_family(&&at.address)).count() + going;
            let more: usize =
                service.ports.iter().map(|port| port.addresses.iter().filter(of_family).count()).sum();
            if have + more > self.limits.listeners as usize {
                return Err(full("listeners"));
            }
        }
        Ok(())
    }

    /// The cursor, listeners and slots of one published port.
    fn port(
        &mut self,
        number: u32,
        wanted: &DesiredPort,
        service: &DesiredService,
        backends: &[(u32, BackendEntry)],
    ) -> Result<PlannedPort, String> {
        let port = wanted.port;
        let cursor =
            self.cursors.of((number, port.protocol, port.published)).ok_or_else(|| full("listeners"))?;
        let label = PortLabel {
            service: number,
            protocol: port.protocol,
            published: port.published,
            target: port.target,
        };
        let mut listeners = Vec::new();
        for v4 in [true, false] {
            let addresses: Vec<IpAddr> =
                wanted.addresses.iter().copied().filter(|address| address.is_ipv4() == v4).collect();
            if addresses.is_empty() {
                continue;
            }
            let eligible: Vec<(u32, u16)> = backends
                .iter()
                .zip(&service.backends)
                .filter(|((_, entry), _)| {
                    entry.backend.state == State::Active as u8
                        && (entry.label.protocol, entry.label.target) == (port.protocol, port.target)
                        && entry.label.address.is_ipv4() == v4
                })
                .map(|((index, _), wanted)| (*index, wanted.weight))
                .collect();
            let weights: Vec<u16> = eligible.iter().map(|(_, weight)| *weight).collect();
            let slots: Vec<u32> = slots::order(&weights).into_iter().map(|i| eligible[i].0).collect();
            let at =
                |address: &IpAddr| At { address: *address, protocol: port.protocol, port: port.published };
            let base = self.range(&slots, addresses.iter().map(at))?;
            let listener =
                Listener { service: number, slot_base: base, slot_count: slots.len() as u32, cursor };
            listeners.extend(addresses.iter().map(|address| (at(address), listener)));
        }
        Ok(PlannedPort { cursor, label, listeners })
    }

    /// Where these slots stand: where they stand already, or in a range that nobody reads.
    fn range(&mut self, slots: &[u32], listeners: impl Iterator<Item = At>) -> Result<u32, String> {
        if slots.is_empty() {
            return Ok(0);
        }
        for at in listeners {
            if let Some(listener) = self.actual.listeners.get(&at)
                && self.actual.slots_of(listener) == Some(slots)
            {
                return Ok(listener.slot_base);
            }
        }
        let base = self.ranges.take(slots.len() as u32).ok_or_else(|| full("slots"))?;
        self.next.slots[base as usize..][..slots.len()].copy_from_slice(slots);
        Ok(base)
    }

    fn commit(
        &mut self,
        number: u32,
        label: &ServiceLabel,
        backends: Vec<(u32, BackendEntry)>,
        ports: Vec<PlannedPort>,
    ) {
        self.next.services.insert(number, label.clone());
        for (index, entry) in &backends {
            // Every listener of the task's family that leads to its port.
            let sources: Vec<(IpAddr, u16)> = ports
                .iter()
                .filter(|port| {
                    (port.label.protocol, port.label.target) == (entry.label.protocol, entry.label.target)
                })
                .flat_map(|port| port.listeners.iter().map(|(at, _)| (at.address, at.port)))
                .filter(|(address, _)| address.is_ipv4() == entry.label.address.is_ipv4())
                .collect();
            let mut entry = entry.clone();
            let local = entry.backend.kind == Kind::Local as u8;
            if answers_here(&entry) && !sources.is_empty() {
                let by_peers = local && !self.next.peers.is_empty();
                if sources.len() > 1 || by_peers {
                    entry.backend.flags |= SHARED;
                }
                if sources.len() == 1 {
                    entry.backend.flags |= SINGLE;
                }
                let at = endpoint(&entry);
                // A task that goes may have handed its address to one that comes.
                let taken = self.next.replies.contains_key(&at);
                if !taken || entry.backend.state == State::Active as u8 {
                    self.next.replies.insert(at, ReplySet { backend: *index, sources });
                }
            }
            if local {
                let key = task_key(&entry);
                let taken = self.next.tasks.contains_key(&key);
                if !taken || entry.backend.state == State::Active as u8 {
                    self.next.tasks.insert(key, *index);
                }
            }
            entry.backend.generation = match self.actual.backends.get(index) {
                Some(known) => known.backend.generation,
                None => self.actual.generations.get(index).map_or(1, |last| last.wrapping_add(1)),
            };
            self.next.generations.insert(*index, entry.backend.generation);
            self.next.backends.insert(*index, entry);
        }
        for port in ports {
            self.next.ports.insert(port.cursor, port.label);
            self.next.listeners.extend(port.listeners);
        }
    }

    fn finish(mut self) -> Tables {
        let mut mark = |side, protocol: Protocol, port| {
            let (word, bit) = position(side, protocol.number(), Be16::new(port));
            *self.next.filter.entry(word).or_default() |= bit;
        };
        for at in self.next.listeners.keys() {
            mark(Side::Destination, at.protocol, at.port);
        }
        // Replies come from the tasks' ports, to wherever they go; those of peers' tasks come through the tunnel.
        for entry in self.next.backends.values().filter(|entry| entry.backend.kind != Kind::Peer as u8) {
            mark(Side::Source, entry.label.protocol, entry.label.target);
        }
        self.next
    }
}

fn service_listens(service: &DesiredService, at: &At) -> bool {
    service.ports.iter().any(|port| {
        (port.port.protocol, port.port.published) == (at.protocol, at.port)
            && port.addresses.contains(&at.address)
    })
}

struct PlannedPort {
    cursor: u32,
    label: PortLabel,
    listeners: Vec<(At, Listener)>,
}

fn full(what: &str) -> String {
    format!("the table of {what} is full; attach again with a higher --max-{what}")
}

fn entry(wanted: &DesiredBackend, service: u32) -> BackendEntry {
    let mut backend = wanted.backend;
    backend.service = service;
    BackendEntry { backend, label: wanted.label.clone() }
}

/// Whether a backend's answers come to this node by themselves, from its own address.
fn answers_here(entry: &BackendEntry) -> bool {
    entry.backend.kind == Kind::Local as u8 || entry.backend.kind == Kind::Routed as u8
}

/// Where a backend's answers come from.
fn endpoint(entry: &BackendEntry) -> At {
    At { address: entry.label.address, protocol: entry.label.protocol, port: entry.label.target }
}

/// How peers name a task of this node.
fn task_key(entry: &BackendEntry) -> TaskKey {
    let label = &entry.label;
    TaskKey {
        address: mapped(label.overlay.unwrap_or(label.address)),
        port: Be16::new(label.target),
        protocol: label.protocol.number(),
        family: if label.address.is_ipv4() { 4 } else { 6 },
    }
}

fn identity_of(entry: &BackendEntry) -> Identity {
    let label = &entry.label;
    let (service, kind) = (entry.backend.service, entry.backend.kind);
    // A peer's task is reached by its name in the cluster; what it is called on its own node may be learnt later.
    let peer = kind == Kind::Peer as u8;
    let address = label.overlay.filter(|_| peer).unwrap_or(label.address);
    (service, label.task.clone(), label.protocol, label.target, (address, label.address.is_ipv4()), kind)
}

/// Numbers for things: those that have one keep it.
struct Numbers<K> {
    known: HashMap<K, u32>,
    used: HashSet<u32>,
    resting: Vec<u32>,
    limit: u32,
    cursor: u32,
}

impl<K: std::hash::Hash + Eq> Numbers<K> {
    /// `resting` numbers are given only when there are no others: what still names them knows by the generation that they
    /// are another's.
    fn new<'r>(
        known: impl Iterator<Item = (K, u32)>,
        limit: u32,
        cursor: u32,
        resting: impl IntoIterator<Item = &'r BTreeSet<u32>>,
    ) -> Self {
        let known: HashMap<K, u32> = known.collect();
        let mut used: HashSet<u32> = known.values().copied().collect();
        let resting: Vec<u32> =
            resting.into_iter().flatten().copied().filter(|number| used.insert(*number)).collect();
        Self { known, used, resting, limit, cursor }
    }

    fn of(&mut self, key: K) -> Option<u32> {
        if let Some(number) = self.known.get(&key) {
            return Some(*number);
        }
        if self.used.len() >= self.limit as usize {
            if self.resting.is_empty() {
                return None;
            }
            for number in self.resting.drain(..) {
                self.used.remove(&number);
            }
        }
        let mut number = self.cursor % self.limit;
        while !self.used.insert(number) {
            number = (number + 1) % self.limit;
        }
        self.cursor = number + 1;
        self.known.insert(key, number);
        Some(number)
    }
}

/// Free ranges of the slot table: what a listener reads today is not written.
struct Ranges {
    used: BTreeMap<u32, u32>,
    limit: u32,
    cursor: u32,
}

impl Ranges {
    fn new(used: impl Iterator<Item = (u32, u32)>, limit: u32) -> Self {
        let used: BTreeMap<u32, u32> = used.filter(|(_, count)| *count > 0).collect();
        let cursor = used.iter().next_back().map_or(0, |(base, count)| base.saturating_add(*count));
        Self { used, limit, cursor }
    }

    /// A free range, looked for behind the last one taken and then from the start.
    fn take(&mut self, count: u32) -> Option<u32> {
        let base = self.fit(self.cursor, count).or_else(|| self.fit(0, count))?;
        self.used.insert(base, count);
        self.cursor = base + count;
        Some(base)
    }

    fn fit(&self, from: u32, count: u32) -> Option<u32> {
        let mut base = from;
        if let Some((before, taken)) = self.used.range(..from).next_back() {
            base = base.max(before + taken);
        }
        for (next, taken) in self.used.range(from..) {
            if base.checked_add(count)? <= *next {
                break;
            }
            base = base.max(next + taken);
        }
        (base.checked_add(count)? <= self.limit).then_some(base)
    }
}
