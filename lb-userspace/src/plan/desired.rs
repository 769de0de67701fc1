//! What the tables should mean, without numbers: the cluster's state seen from one node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{
    backend::{Backend, Kind, RETURN_DIRECT, State},
    endpoint::MAX_REPLY_LISTENERS,
    net::{Be16, wide},
    tunnel::{Peer, mapped},
};

use super::tables::{BackendLabel, NodeLabel, ServiceLabel};
use crate::cluster::{ClusterState, Node, Port, Return, Service, Task, TaskState, Via};

/// The way from this node to a task, as the kernel's tables have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Host-side veth of a local task, or the interface of the next hop.
    pub ifindex: u32,
    /// Hardware address of the task or the next hop; zero if a local task's is not known.
    pub mac: [u8; 6],
    /// Hardware address of the interface.
    pub source_mac: [u8; 6],
    /// Own address that reaches it.
    pub source: Option<IpAddr>,
    /// Largest packet that the route lets pass, in bytes.
    pub mtu: u32,
    /// [`lb_common::backend::VIA_TC`].
    pub flags: u8,
    /// Why new flows should go elsewhere, though the way is known: who is there does not answer.
    pub silent: Option<String>,
}

/// Everything that decides what the tables should mean.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The cluster.
    pub cluster: &'a ClusterState,
    /// Name of this node.
    pub node: &'a str,
    /// Addresses of the uplink, the most usual first.
    pub addresses: &'a [IpAddr],
    /// The way to each of [`destinations`], or why there is none.
    pub ways: &'a BTreeMap<(IpAddr, Reach), Result<Way, String>>,
}

/// How a destination is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reach {
    /// It is a task of this node.
    Local,
    /// It is a task of another node, and sees this node's address.
    Snat,
    /// It is a task of another node, and sees the client's address.
    Routed,
    /// It is another node, or a task that is reached through its agent.
    Peer,
}

impl Reach {
    /// The backend kind that does so.
    pub const fn kind(self) -> Kind {
        match self {
            Self::Local => Kind::Local,
            Self::Snat => Kind::Snat,
            Self::Routed => Kind::Routed,
            Self::Peer => Kind::Peer,
        }
    }
}

/// What the tables should mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The machines.
    pub nodes: Vec<DesiredNode>,
    /// The services, in order of name.
    pub services: Vec<DesiredService>,
    /// What was left out, in words for the operator.
    pub refused: Vec<String>,
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredNode {
    /// As users see it.
    pub label: NodeLabel,
    /// Its addresses, as far as they tell where tunnel packets come from or go to.
    pub addresses: Vec<IpAddr>,
    /// As the datapath reaches its agent; `None` if it has none, or is this machine.
    pub peer: Option<Peer>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredService {
    /// As users see it.
    pub label: ServiceLabel,
    /// Ports of its tasks.
    pub backends: Vec<DesiredBackend>,
    /// Published ports and where they listen.
    pub ports: Vec<DesiredPort>,
}

/// One port of one task; service number, generation and the sharing flag are not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// As users see it.
    pub label: BackendLabel,
    /// As the datapath sees it.
    pub backend: Backend,
    /// Share of new flows.
    pub weight: u16,
}

/// One published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredPort {
    /// The port.
    pub port: Port,
    /// Where it listens.
    pub addresses: Vec<IpAddr>,
}

fn reach(cluster: &ClusterState, task: &Task, node: &str) -> Reach {
    match task.via {
        _ if task.node == node => Reach::Local,
        Via::Peer if cluster.nodes.iter().any(|node| node.name == task.node && node.agent) => Reach::Peer,
        Via::Peer | Via::Snat => Reach::Snat,
        Via::Routed => Reach::Routed,
    }
}

/// The addresses to which a way must be known, and how each is to be reached.
pub fn destinations(cluster: &ClusterState, node: &str) -> BTreeSet<(IpAddr, Reach)> {
    let peers = cluster.nodes.iter().filter(|other| other.agent && other.name != node);
    let mut wanted: BTreeSet<_> =
        peers.flat_map(|peer| &peer.addresses).map(|address| (*address, Reach::Peer)).collect();
    let tasks = cluster.services.iter().filter(|service| !service.ports.is_empty()).flat_map(|s| &s.tasks);
    for task in tasks {
        match reach(cluster, task, node) {
            // By its node.
            Reach::Peer => {}
            reach => wanted.extend(task.addresses.iter().map(|address| (*address, reach))),
        }
    }
    wanted
}

/// What the tables of this node should mean.
pub fn desired(view: &View<'_>) -> Desired {
    let mut refused = Vec::new();
    let mut services: Vec<DesiredService> = view
        .cluster
        .services
        .iter()
        .filter(|service| !service.ports.is_empty() || !service.left.is_empty())
        .map(|service| DesiredService {
            label: ServiceLabel {
                name: service.name.clone(),
                tasks: service.tasks.len() as u32,
                left: Some(service.left.clone()).filter(|left| !left.is_empty()),
                timers: service.timers.seconds,
            },
            backends: backends(view, service),
            ports: ports(view, service, &mut refused),
        })
        .collect();
    services.sort_by(|a, b| a.label.name.cmp(&b.label.name));
    let nodes = nodes(view, &mut refused);
    Desired { nodes, services, refused }
}

/// Addresses shown of a node; a label has room for so many.
const NODE_ADDRESSES: usize = 4;

fn nodes(view: &View<'_>, refused: &mut Vec<String>) -> Vec<DesiredNode> {
    // Of this node's own addresses nobody else can know better.
    let mut owners: BTreeMap<IpAddr, &str> = view
        .addresses
        .iter()
        .filter(|_| !view.node.is_empty())
        .map(|address| (*address, view.node))
        .collect();
    let mut nodes = Vec::new();
    for node in &view.cluster.nodes {
        let this = node.name == view.node;
        let mut addresses = node.addresses.clone();
        if this {
            addresses.extend(view.addresses.iter().filter(|address| !node.addresses.contains(address)));
        }
        addresses.retain(|address| {
            let owner = *owners.entry(*address).or_insert(&node.name);
            if owner != node.name {
                refused.push(format!("{address} is said to be an address of both {owner} and {}", node.name));
            }
            owner == node.name
        });
        let way = (!this && node.agent).then(|| peer_way(view, node));
        let silent = way.as_ref().and_then(|way| way.as_ref().ok()?.1.silent.clone());
        let peer = way.as_ref().map(|way| match way {
            Ok((address, way)) => peer(*address, way),
            Err(_) => Peer::default(),
        });
        let label = NodeLabel {
            name: node.name.clone(),
            addresses: node.addresses.iter().take(NODE_ADDRESSES).copied().collect(),
            this,
            agent: node.agent,
            problem: way.and_then(Result::err).or(silent),
        };
        nodes.push(DesiredNode { label, addresses, peer });
    }
    nodes
}

/// The first address of a node that answers, and the way; else the first that a way leads to, or why there is none.
fn peer_way<'a>(view: &View<'a>, node: &Node) -> Result<(IpAddr, &'a Way), String> {
    let (mut silent, mut problem) = (None, None);
    for address in &node.addresses {
        match view.ways.get(&(*address, Reach::Peer)) {
            Some(Ok(way)) if way.source.is_some_and(|own| own.is_ipv4() == address.is_ipv4()) => {
                if way.silent.is_none() {
                    return Ok((*address, way));
                }
                silent = silent.or(Some((*address, way)));
            }
            Some(Err(reason)) => problem = problem.or_else(|| Some(reason.clone())),
            _ => {}
        }
    }
    silent.ok_or_else(|| {
        problem.unwrap_or_else(|| format!("no way to an address of {} is known yet", node.name))
    })
}

fn peer(address: IpAddr, way: &Way) -> Peer {
    Peer {
        address: wide(address),
        source: way.source.map(wide).unwrap_or_default(),
        mac: way.mac,
        mtu: way.mtu.min(u16::MAX.into()) as u16,
        source_mac: way.source_mac,
        ifindex: way.ifindex,
        family: if address.is_ipv4() { 4 } else { 6 },
        reachable: 1,
        ..Peer::default()
    }
}

fn backends(view: &View<'_>, service: &Service) -> Vec<DesiredBackend> {
    let targets: BTreeSet<_> = service.ports.iter().map(|port| (port.protocol, port.target)).collect();
    let mut backends = Vec::new();
    let direct = service.returns.unwrap_or(view.cluster.tunnel.returns) == Return::Direct;
    for task in &service.tasks {
        let reach = reach(view.cluster, task, view.node);
        for address in &task.addresses {
            let way = way(view, task, (*address, reach));
            for (protocol, target) in &targets {
                let (mut backend, problem) = backend(task, (*address, reach), *target, &way);
                if reach == Reach::Peer && direct {
                    backend.flags |= RETURN_DIRECT;
                }
                let label = BackendLabel {
                    task: task.name.clone(),
                    node: task.node.clone(),
                    state: task.state,
                    protocol: *protocol,
                    target: *target,
                    address: *address,
                    overlay: task.cluster_address().filter(|overlay| overlay != address),
                    problem,
                };
                backends.push(DesiredBackend { label, backend, weight: task.weight });
            }
        }
    }
    backends
}

/// The way to a task's address: by its node, where that has an agent.
fn way(view: &View<'_>, task: &Task, (address, reach): (IpAddr, Reach)) -> Result<Way, String> {
    if reach == Reach::Peer {
        let node = view.cluster.nodes.iter().find(|node| node.name == task.node);
        let node = node.ok_or_else(|| format!("there is no node {}", task.node))?;
        return peer_way(view, node).map(|(_, way)| way.clone());
    }
    let way = view.ways.get(&(address, reach)).cloned();
    let way = way.unwrap_or_else(|| Err("the way to it is not known yet".to_owned()));
    if reach == Reach::Snat && task.via == Via::Peer {
        return way.map_err(|reason| format!("{} has no agent, and by snat {reason}", task.node));
    }
    way
}

fn backend(
    task: &Task,
    (address, reach): (IpAddr, Reach),
    target: u16,
    known: &Result<Way, String>,
) -> (Backend, Option<String>) {
    let state = match (known, task.state) {
        (Err(_), _) | (_, TaskState::Starting) => State::Unavailable,
        // Its flows go on: if it is the probes alone that get lost, nothing else is.
        (Ok(Way { silent: Some(_), .. }), _) | (Ok(_), TaskState::Draining) => State::Draining,
        (Ok(_), TaskState::Running) => State::Active,
    };
    let mut backend = Backend {
        address: match reach {
            Reach::Peer => mapped(task.cluster_address().unwrap_or(address)),
            _ => wide(address),
        },
        port: Be16::new(target),
        state: state as u8,
        // Known without a way: a task that cannot be reached for a moment stays the backend it is, and keeps
        // its flows.
        kind: reach.kind() as u8,
        family: if address.is_ipv4() { 4 } else { 6 },
        ..Backend::default()
    };
    match known {
        Ok(way) => {
            backend.ifindex = way.ifindex;
            backend.mac = way.mac;
            backend.source_mac = way.source_mac;
            backend.source = way.source.map(wide).unwrap_or_default();
            backend.flags = way.flags;
            (backend, way.silent.clone())
        }
        Err(problem) => (backend, Some(problem.clone())),
    }
}

fn ports(view: &View<'_>, service: &Service, refused: &mut Vec<String>) -> Vec<DesiredPort> {
    let addresses = if service.addresses.is_empty() { view.addresses } else { &service.addresses };
    // A reply is matched against all listeners that lead to its task's port, so there is a bound to them.
    let sharing = |port: &Port| {
        service
            .ports
            .iter()
            .filter(|other| (other.protocol, other.target) == (port.protocol, port.target))
            .count()
    };
    let mut ports = Vec::new();
    for port in &service.ports {
        let room = MAX_REPLY_LISTENERS / sharing(port);
        let chosen: Vec<IpAddr> = [true, false]
            .into_iter()
            .flat_map(|v4| addresses.iter().filter(move |address| address.is_ipv4() == v4).take(room))
            .copied()
            .collect();
        if chosen.len() < addresses.len() {
            refused.push(format!(
                "service {}: port {port} listens on {} of {} addresses: at most {MAX_REPLY_LISTENERS} listeners \
                 of a family can lead to one port of a task; name the addresses to use in the service",
                service.name,
                chosen.len(),
                addresses.len(),
            ));
        }
        ports.push(DesiredPort { port: *port, addresses: chosen });
    }
    ports
}
