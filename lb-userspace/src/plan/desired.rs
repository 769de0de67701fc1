//! What the tables should mean, without numbers: the cluster's state seen from one node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{
    backend::{Backend, Kind, State},
    endpoint::MAX_REPLY_LISTENERS,
    net::{Be16, wide},
};

use super::tables::{BackendLabel, NodeLabel, ServiceLabel};
use crate::cluster::{ClusterState, Node, Port, Service, Task, TaskState, Via};

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
    /// [`lb_common::backend::VIA_TC`].
    pub flags: u16,
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
}

impl Reach {
    /// The backend kind that does so.
    pub const fn kind(self) -> Kind {
        match self {
            Self::Local => Kind::Local,
            Self::Snat => Kind::Snat,
            Self::Routed => Kind::Routed,
        }
    }
}

/// What the tables should mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The machines.
    pub nodes: Vec<NodeLabel>,
    /// The services, in order of name.
    pub services: Vec<DesiredService>,
    /// What was left out, in words for the operator.
    pub refused: Vec<String>,
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

fn reach(task: &Task, node: &str) -> Reach {
    match task.via {
        _ if task.node == node => Reach::Local,
        Via::Snat => Reach::Snat,
        Via::Routed => Reach::Routed,
    }
}

/// The addresses to which a way must be known, and how each is to be reached.
pub fn destinations(cluster: &ClusterState, node: &str) -> BTreeSet<(IpAddr, Reach)> {
    let tasks = cluster.services.iter().filter(|service| !service.ports.is_empty()).flat_map(|s| &s.tasks);
    tasks.flat_map(|task| task.addresses.iter().map(|address| (*address, reach(task, node)))).collect()
}

/// What the tables of this node should mean.
pub fn desired(view: &View<'_>) -> Desired {
    let mut refused = Vec::new();
    let mut services: Vec<DesiredService> = view
        .cluster
        .services
        .iter()
        .filter(|service| !service.ports.is_empty())
        .map(|service| DesiredService {
            label: ServiceLabel { name: service.name.clone(), tasks: service.tasks.len() as u32 },
            backends: backends(view, service),
            ports: ports(view, service, &mut refused),
        })
        .collect();
    services.sort_by(|a, b| a.label.name.cmp(&b.label.name));
    let nodes = view.cluster.nodes.iter().map(|node| node_label(node, view.node)).collect();
    Desired { nodes, services, refused }
}

/// Addresses shown of a node; a label has room for so many.
const NODE_ADDRESSES: usize = 4;

fn node_label(node: &Node, this: &str) -> NodeLabel {
    NodeLabel {
        name: node.name.clone(),
        addresses: node.addresses.iter().take(NODE_ADDRESSES).copied().collect(),
        this: node.name == this,
    }
}

fn backends(view: &View<'_>, service: &Service) -> Vec<DesiredBackend> {
    let targets: BTreeSet<_> = service.ports.iter().map(|port| (port.protocol, port.target)).collect();
    let mut backends = Vec::new();
    for task in &service.tasks {
        for address in &task.addresses {
            let reach = reach(task, view.node);
            let way = view.ways.get(&(*address, reach));
            for (protocol, target) in &targets {
                let (backend, problem) = backend(task, (*address, reach), *target, way);
                let label = BackendLabel {
                    task: task.name.clone(),
                    node: task.node.clone(),
                    state: task.state,
                    protocol: *protocol,
                    target: *target,
                    address: *address,
                    problem,
                };
                backends.push(DesiredBackend { label, backend, weight: task.weight });
            }
        }
    }
    backends
}

fn backend(
    task: &Task,
    (address, reach): (IpAddr, Reach),
    target: u16,
    way: Option<&Result<Way, String>>,
) -> (Backend, Option<String>) {
    let known = way.map_or(Err("the way to it is not known yet".to_owned()), Clone::clone);
    let state = match (&known, task.state) {
        (Err(_), _) | (_, TaskState::Starting) => State::Unavailable,
        (Ok(_), TaskState::Running) => State::Active,
        (Ok(_), TaskState::Draining) => State::Draining,
    };
    let mut backend = Backend {
        address: wide(address),
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
            (backend, None)
        }
        Err(problem) => (backend, Some(problem)),
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
