//! The tables as plain data, and the operations that change them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::{
    access::LAST_SERVICE,
    backend::{Backend, Kind, State, TRANSLATED},
    endpoint::{Listener, RESTRICTED},
    net::{Address as _, V4, V6},
    slot::Slot,
    tunnel::{Peer, SELF, TaskKey},
};
use serde::{Deserialize, Serialize};

use crate::{
    cluster::{Family, Idle, Prefer, Protocol, TaskState},
    tunnel_key::Cookies,
};

/// An address, protocol and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct At {
    /// Address.
    pub address: IpAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

/// Clients of a service: its number, and a range of their addresses.
pub type ClientRange = (u32, IpNet);

/// What the number of a service stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceLabel {
    /// Name.
    pub name: String,
    /// Tasks it has, whatever they are doing.
    pub tasks: u32,
    /// Published ports that are left to Swarm, as users read them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<String>,
    /// What is wrong with how it is described.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// [`lb_common::conntrack::Timers`].
    pub timers: [u32; 8],
    /// What becomes of established TCP connections that have ended by silence. Left out by agents before it was there.
    #[serde(default, skip_serializing_if = "Idle::is_default")]
    pub idle: Idle,
    /// Whose tasks come first.
    #[serde(default, skip_serializing_if = "Prefer::is_any")]
    pub prefer: Prefer,
    /// How clients are served whose family a task does not have.
    #[serde(default, skip_serializing_if = "Family::is_auto")]
    pub family: Family,
    /// How its tasks are asked whether they take connections, in words, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<String>,
    /// Seconds in which a task that comes gets its whole share of new connections; zero is at once.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slow_start: u32,
    /// Connections that one of its tasks may have; zero is any number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub task_max_connections: u32,
    /// After how many connections in a row that it does not take a task gets no new ones; zero is never.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub eject: u32,
}

/// Whether a number is none.
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What a cursor stands for: a published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortLabel {
    /// Number of the service.
    pub service: u32,
    /// Protocol.
    pub protocol: Protocol,
    /// The port clients use.
    pub published: u16,
    /// The port tasks listen on.
    pub target: u16,
}

/// What the number of a backend stands for: one port of one task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendLabel {
    /// Name of the task.
    pub task: String,
    /// Name of its node.
    pub node: String,
    /// What the source says the task is doing.
    pub state: TaskState,
    /// Protocol.
    pub protocol: Protocol,
    /// The port it listens on.
    pub target: u16,
    /// Its address, as the tables have it.
    pub address: IpAddr,
    /// Its own address, if that is one that it has within its node alone: packets are translated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<IpAddr>,
    /// Its address in the cluster, if that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<IpAddr>,
    /// Why it is not offered, if it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl BackendLabel {
    /// The address that the task has itself.
    pub fn own(&self) -> IpAddr {
        self.own.unwrap_or(self.address)
    }
}

/// A machine of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeLabel {
    /// Name in the cluster.
    pub name: String,
    /// What it calls itself, if that is another name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Where it is reached; the first few.
    pub addresses: Vec<IpAddr>,
    /// Whether it is the machine of this datapath.
    pub this: bool,
    /// Whether an agent serves it.
    #[serde(default)]
    pub agent: bool,
    /// Why its agent is not reached, if it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// What is wrong with its labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_problem: Option<String>,
    /// What it shares with the nodes near to it; empty if nobody has said.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub zone: String,
}

impl NodeLabel {
    /// What users know it by.
    pub fn shown(&self) -> &str {
        if self.host.is_empty() { &self.name } else { &self.host }
    }
}

/// A backend and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendEntry {
    /// As the datapath sees it.
    pub backend: Backend,
    /// As users see it.
    pub label: BackendLabel,
}

/// What is known of one port of one task, by its own endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskListener {
    /// Number of the backend.
    pub backend: u32,
    /// The listener that leads there, if a single one does.
    pub listener: Option<(IpAddr, u16)>,
}

/// What an interface beside the uplink is there for; one may have several roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Tasks answer by it.
    Tasks,
    /// Other nodes are reached by it.
    Peers,
    /// What clients have for tasks that have the other family alone becomes theirs there.
    Translated,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tasks, Self::Peers, Self::Translated];
}

/// All tables that user space writes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Tables {
    /// Nodes by number, from one.
    pub nodes: BTreeMap<u32, NodeLabel>,
    /// The number given to a node last; the next one is given the number after it, so that one that a connection may still name
    /// rests. Not in the kernel's tables.
    pub last_node: u32,
    /// The other nodes that have an agent, by number of the node.
    pub peers: BTreeMap<u32, Peer>,
    /// The cookies of packets from them, by number of the node; of some none is known.
    pub peer_keys: BTreeMap<u32, u64>,
    /// Numbers of the nodes by address, this node's own with [`lb_common::tunnel::SELF`].
    pub peer_numbers: BTreeMap<IpAddr, u32>,
    /// This node's tasks as peers name them, and their backends.
    pub tasks: BTreeMap<TaskKey, u32>,
    /// Services by number.
    pub services: BTreeMap<u32, ServiceLabel>,
    /// Published ports by cursor.
    pub ports: BTreeMap<u32, PortLabel>,
    /// Backends by number; free ones are not here.
    pub backends: BTreeMap<u32, BackendEntry>,
    /// The last generation of every number that was ever used.
    pub generations: BTreeMap<u32, u32>,
    /// Free numbers that connections may still name: they are not given again before a walk through the connections has found none
    /// that does. Not in the kernel's tables.
    pub resting: BTreeSet<u32>,
    /// Listeners.
    pub listeners: BTreeMap<At, Listener>,
    /// The addresses of tasks that have IPv6 alone, by what stands in for them.
    pub stand_ins: BTreeMap<Ipv4Addr, Ipv6Addr>,
    /// Reply sources by the task's endpoint.
    pub endpoints: BTreeMap<At, TaskListener>,
    /// The whole slot table; what no listener names has no meaning.
    pub slots: Vec<Slot>,
    /// Whether clients may connect to services that not everybody may connect to; the narrowest range counts.
    pub access: BTreeMap<ClientRange, bool>,
    /// Words of the port filter that are not zero.
    pub filter: BTreeMap<u32, u64>,
}

impl Tables {
    /// What users know a node by that is named in the cluster so.
    pub fn node_shown<'a>(&'a self, name: &'a str) -> &'a str {
        self.nodes.values().find(|node| node.name == name).map_or(name, NodeLabel::shown)
    }

    /// Empty tables with room for `slots` slots.
    pub fn empty(slots: u32) -> Self {
        Self { slots: vec![Slot::default(); slots as usize], ..Self::default() }
    }

    /// The slots that a listener names; `None` if it names some that do not exist.
    pub fn slots_of(&self, listener: &Listener) -> Option<&[Slot]> {
        let base = listener.slot_base as usize;
        self.slots.get(base..base.checked_add(listener.slot_count as usize)?)
    }

    /// The addresses that this node's tasks have themselves, by those that they have within it alone.
    pub fn own_addresses(&self) -> HashMap<IpAddr, IpAddr> {
        let local = self.backends.values().filter(|entry| entry.backend.kind == Kind::Local as u8);
        local.filter_map(|entry| Some((entry.label.address, entry.label.own?))).collect()
    }

    /// Does to this copy what applying the operation does to the kernel's.
    pub fn apply(&mut self, op: MapOp) {
        match op {
            MapOp::SetNode(index, label) => {
                if self.nodes.insert(index, label).is_none() {
                    self.last_node = index;
                }
            }
            MapOp::RemoveNode(index) => drop(self.nodes.remove(&index)),
            MapOp::SetPeer(number, peer) => drop(self.peers.insert(number, peer)),
            MapOp::RemovePeer(number) => drop(self.peers.remove(&number)),
            MapOp::SetPeerKey(number, cookie) => drop(self.peer_keys.insert(number, cookie)),
            MapOp::RemovePeerKey(number) => drop(self.peer_keys.remove(&number)),
            MapOp::SetPeerNumber(address, number) => drop(self.peer_numbers.insert(address, number)),
            MapOp::RemovePeerNumber(address) => drop(self.peer_numbers.remove(&address)),
            MapOp::SetTask(key, index) => drop(self.tasks.insert(key, index)),
            MapOp::RemoveTask(key) => drop(self.tasks.remove(&key)),
            MapOp::SetService(index, label) => drop(self.services.insert(index, label)),
            MapOp::RemoveService(index) => drop(self.services.remove(&index)),
            MapOp::SetPort(index, label) => drop(self.ports.insert(index, label)),
            MapOp::RemovePort(index) => drop(self.ports.remove(&index)),
            MapOp::SetBackend(index, entry) => {
                self.generations.insert(index, entry.backend.generation);
                self.resting.remove(&index);
                self.backends.insert(index, entry);
            }
            MapOp::FreeBackend(index) => {
                self.backends.remove(&index);
                self.resting.insert(index);
            }
            MapOp::SetStandIn(address, own) => drop(self.stand_ins.insert(address, own)),
            MapOp::RemoveStandIn(address) => drop(self.stand_ins.remove(&address)),
            MapOp::SetTaskEndpoint(at, task) => drop(self.endpoints.insert(at, task)),
            MapOp::RemoveTaskEndpoint(at) => drop(self.endpoints.remove(&at)),
            MapOp::SetSlots(base, slots) => {
                self.slots[base as usize..][..slots.len()].copy_from_slice(&slots);
            }
            MapOp::SetListener(at, listener) => drop(self.listeners.insert(at, listener)),
            MapOp::RemoveListener(at) => drop(self.listeners.remove(&at)),
            MapOp::SetAccess(of, allowed) => drop(self.access.insert(of, allowed)),
            MapOp::RemoveAccess(of) => drop(self.access.remove(&of)),
            MapOp::SetFilter(word, 0) => drop(self.filter.remove(&word)),
            MapOp::SetFilter(word, bits) => drop(self.filter.insert(word, bits)),
        }
    }

    /// Whether a backend names a peer that is there, if it names one.
    fn leads_on(&self, backend: &Backend) -> bool {
        backend.kind != Kind::Peer as u8 || self.peers.contains_key(&backend.peer.into())
    }

    /// Whether an interface has a role by what the tables say.
    pub fn leads(&self, role: Role, ifindex: u32) -> bool {
        match role {
            Role::Tasks => {
                let mut backends = self.backends.values().map(|entry| &entry.backend);
                backends.any(|backend| backend.kind != Kind::Peer as u8 && backend.ifindex == ifindex)
            }
            Role::Peers => self.peers.values().any(|peer| peer.ifindex == ifindex),
            Role::Translated => {
                let mut backends = self.backends.values().map(|entry| &entry.backend);
                backends.any(|backend| backend.flags & TRANSLATED != 0 && backend.ifindex == ifindex)
            }
        }
    }

    /// The cookies of packets between this node and those that have any, by name.
    pub fn cookies(&self) -> HashMap<&str, Cookies> {
        let of = |(number, incoming): (&u32, &u64)| {
            // One alone was left by a change that was cut short.
            let outgoing = Some(self.peers.get(number)?.cookie).filter(|cookie| *cookie != 0)?;
            Some((self.nodes.get(number)?.name.as_str(), Cookies { outgoing, incoming: *incoming }))
        };
        self.peer_keys.iter().filter_map(of).collect()
    }

    /// The nodes to which a next hop is known, and the longest packets that it lets pass, in bytes.
    pub fn peer_mtus(&self) -> impl Iterator<Item = (IpAddr, u32)> {
        self.peers.values().filter(|peer| peer.reachable != 0).map(|peer| {
            let v4 = peer.family == 4;
            let address =
                if v4 { V4::from_wide(peer.address).to_ip() } else { V6::from_wide(peer.address).to_ip() };
            (address, peer.mtu.into())
        })
    }

    /// The ranges of clients whom no service takes.
    pub fn denied(&self) -> impl Iterator<Item = IpNet> {
        let first = (LAST_SERVICE + 1, IpNet::V4(Ipv4Net::default()));
        self.access.range(first..).map(|((_, range), _)| *range)
    }

    /// The services that listen, by their numbers, and whether new connections to each find a task.
    pub fn takers(&self) -> BTreeMap<u32, bool> {
        let mut takers: BTreeMap<u32, bool> = BTreeMap::new();
        for listener in self.listeners.values() {
            *takers.entry(listener.service).or_default() |= listener.slot_count > 0;
        }
        takers
    }

    /// What contradicts itself, in words: a listener that leads to a slot or backend that is not valid.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (at, listener) in &self.listeners {
            let all = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
            let said = |range| self.access.contains_key(&(listener.service, range));
            if listener.flags & RESTRICTED != 0 && !all.into_iter().all(said) {
                found.push(format!("{at:?} does not say who may connect"));
            }
            let Some(slots) = self.slots_of(listener) else {
                found.push(format!("{at:?} names slots that do not exist"));
                continue;
            };
            for slot in slots {
                let index = slot.backend();
                match self.backends.get(&index) {
                    None => found.push(format!("{at:?} leads to backend {index}, which is free")),
                    Some(entry) if entry.backend.state != State::Active as u8 => {
                        found.push(format!("{at:?} leads to backend {index}, which is not active"));
                    }
                    Some(entry) if entry.backend.service != listener.service => {
                        found.push(format!("{at:?} leads to backend {index} of another service"));
                    }
                    Some(entry) if !self.leads_on(&entry.backend) => {
                        found.push(format!("{at:?} leads to backend {index} of a peer that is not there"));
                    }
                    Some(_) => {}
                }
            }
        }
        for (index, entry) in &self.backends {
            let (label, local) = (&entry.label, entry.backend.kind == Kind::Local as u8);
            if let (IpAddr::V4(address), Some(IpAddr::V6(own)), true) = (label.address, label.own, local)
                && self.stand_ins.get(&address) != Some(&own)
            {
                found.push(format!("{address} of backend {index} does not stand in for {own}"));
            }
        }
        for (key, index) in &self.tasks {
            if self.backends.get(index).is_none_or(|entry| entry.backend.kind != Kind::Local as u8) {
                found.push(format!("{key:?} names backend {index}, which is no task of this node"));
            }
        }
        let lost = |(_, number): &(&IpAddr, &u32)| **number != SELF && !self.peers.contains_key(number);
        found.extend(
            self.peer_numbers.iter().filter(lost).map(|(ip, number)| format!("{ip} is no peer {number}")),
        );
        found
    }
}

/// One change of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Name a node.
    SetNode(u32, NodeLabel),
    /// Forget a node.
    RemoveNode(u32),
    /// Write a peer.
    SetPeer(u32, Peer),
    /// Forget a peer.
    RemovePeer(u32),
    /// Say which cookie a peer's packets have.
    SetPeerKey(u32, u64),
    /// Have a peer's packets need none.
    RemovePeerKey(u32),
    /// Say whose an address is.
    SetPeerNumber(IpAddr, u32),
    /// Forget an address of a node.
    RemovePeerNumber(IpAddr),
    /// Say which backend peers mean.
    SetTask(TaskKey, u32),
    /// Forget a task that peers may have named.
    RemoveTask(TaskKey),
    /// Name a service.
    SetService(u32, ServiceLabel),
    /// Forget a service.
    RemoveService(u32),
    /// Name a cursor.
    SetPort(u32, PortLabel),
    /// Forget a cursor.
    RemovePort(u32),
    /// Write a backend.
    SetBackend(u32, BackendEntry),
    /// Free a backend: its connections have lost their task.
    FreeBackend(u32),
    /// Say which task an address stands in for.
    SetStandIn(Ipv4Addr, Ipv6Addr),
    /// Have an address stand in for nobody.
    RemoveStandIn(Ipv4Addr),
    /// Write what is known of a task's endpoint.
    SetTaskEndpoint(At, TaskListener),
    /// Forget a task's endpoint.
    RemoveTaskEndpoint(At),
    /// Write slots that no listener names yet.
    SetSlots(u32, Vec<Slot>),
    /// Point a listener at a range of slots.
    SetListener(At, Listener),
    /// Forget a listener.
    RemoveListener(At),
    /// Say whether clients may connect.
    SetAccess(ClientRange, bool),
    /// Forget a range of clients.
    RemoveAccess(ClientRange),
    /// Write a word of the port filter.
    SetFilter(u32, u64),
}

impl MapOp {
    /// Whether what it takes away, or points elsewhere, leaves room for something else.
    pub(super) fn frees(&self) -> bool {
        matches!(
            self,
            Self::RemoveNode(_)
                | Self::RemoveService(_)
                | Self::RemovePort(_)
                | Self::FreeBackend(_)
                | Self::RemoveListener(_)
                | Self::SetListener(..)
                | Self::RemoveAccess(_)
        )
    }
}
