//! What the tables should mean, without numbers: nodes and services of the cluster, seen from one node.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::{
    backend::{Backend, Kind, RETURN_DIRECT, State},
    net::{Be16, wide},
    tunnel::{Peer, mapped},
};

use super::{
    judge::judge,
    tables::{BackendLabel, NodeLabel, ServiceLabel},
};
use crate::{
    cluster::{
        Affinity, ClientPrefix, ClusterState, Node, Port, Prefer, Return, Scheduler, Service, Task,
        TaskState, Via,
    },
    translation::{is_made_up, own},
    tunnel_key::Cookies,
};

/// The next hop to each destination, or why there is none.
pub type NextHops = BTreeMap<(IpAddr, Reach), Result<NextHop, String>>;

/// The next hop from this node to a task, as the kernel's tables have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
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
    /// Why new connections should go elsewhere, though the next hop is known: who is there does not answer.
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
    /// Addresses to serve on beside those, whose they may be.
    pub named: &'a [IpAddr],
    /// The cookies of nodes, by name; of those that have none there is none.
    pub cookies: &'a BTreeMap<String, Cookies>,
    /// The next hop to each of [`super::Planner::destinations`], or why there is none.
    pub next_hops: &'a NextHops,
}

impl View<'_> {
    /// The addresses on which services are served that name none.
    pub(super) fn served(&self) -> Vec<IpAddr> {
        let named = self.named.iter().filter(|named| !self.addresses.contains(named));
        self.addresses.iter().chain(named).copied().collect()
    }
}

/// How a destination is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reach {
    /// It is a task of this node.
    Local,
    /// It is one, for clients of the family that it does not have.
    Translated,
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
            Self::Local | Self::Translated => Kind::Local,
            Self::Snat => Kind::Snat,
            Self::Routed => Kind::Routed,
            Self::Peer => Kind::Peer,
        }
    }
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredNode {
    /// As users see it.
    pub label: NodeLabel,
    /// Its addresses, as far as they tell where tunnel packets come from or go to.
    pub addresses: Vec<IpAddr>,
    /// The next hop to its agent, or why there is none; `None` if it has no agent, or is this machine.
    pub next_hop: Option<Result<(IpAddr, NextHop), String>>,
    /// The cookies of packets between it and this machine, where both have keys.
    pub cookies: Option<Cookies>,
    /// Whether it lies in this machine's zone, where that has one.
    pub near: bool,
}

impl DesiredNode {
    /// As the datapath reaches its agent; `None` if it has none, or is this machine.
    pub fn peer(&self) -> Option<Peer> {
        let next_hop = self.next_hop.as_ref()?;
        let peer = next_hop
            .as_ref()
            .map_or_else(|_| Peer::default(), |(address, next_hop)| peer(*address, next_hop));
        Some(Peer { cookie: self.cookies.map_or(0, |cookies| cookies.outgoing), ..peer })
    }
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
    /// How new connections find their tasks.
    pub scheduler: Scheduler,
    /// Whether a client's address alone decides, whatever the scheduler.
    pub affinity: Affinity,
    /// Which clients are one then.
    pub client_prefix: ClientPrefix,
    /// Whether tasks that are not preferred get new connections where none that is takes any.
    pub falls_over: bool,
    /// Whether clients may connect, by ranges; empty if all may.
    pub access: BTreeMap<IpNet, bool>,
}

/// One port of one task; service number, generation and the sharing flag are not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// As users see it.
    pub label: BackendLabel,
    /// As the datapath sees it.
    pub backend: Backend,
    /// Share of new connections; zero is none.
    pub weight: u16,
    /// Whether it comes first.
    pub preferred: bool,
    /// Whether no next hop leads to it that should.
    pub unreached: bool,
}

/// One published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredPort {
    /// The port.
    pub port: Port,
    /// Where it listens.
    pub addresses: Vec<IpAddr>,
}

/// How tasks are reached, by their nodes.
pub(super) struct Reaching<'a> {
    /// This node.
    node: &'a str,
    /// The nodes that have an agent.
    agents: HashSet<&'a str>,
}

impl<'a> Reaching<'a> {
    /// As the nodes of the cluster have agents.
    pub fn new(nodes: &'a [Node], node: &'a str) -> Self {
        let agents = nodes.iter().filter(|node| node.agent).map(|node| node.name.as_str()).collect();
        Self { node, agents }
    }

    fn of(&self, task: &Task) -> Reach {
        match task.via {
            _ if task.node == self.node => Reach::Local,
            Via::Peer if self.agents.contains(task.node.as_str()) => Reach::Peer,
            Via::Peer | Via::Snat => Reach::Snat,
            Via::Routed => Reach::Routed,
        }
    }

    /// The addresses of a service's tasks to which a next hop must be known, and how each is to be reached.
    pub fn destinations(&self, service: &Service) -> Vec<(IpAddr, Reach)> {
        let tasks = if service.ports.is_empty() { &[] } else { service.tasks.as_slice() };
        let wanted = tasks.iter().map(|task| (task, self.of(task)));
        // Those of peers are reached by their nodes.
        let wanted = wanted.filter(|(_, reach)| *reach != Reach::Peer);
        wanted
            .flat_map(|(task, reach)| reached(task, reach).map(move |address| to(task, address, reach)))
            .collect()
    }
}

/// What a next hop is asked for to reach a task at one of its addresses.
fn to(task: &Task, address: IpAddr, reach: Reach) -> (IpAddr, Reach) {
    own(address, &task.addresses).map_or((address, reach), |own| (own, Reach::Translated))
}

/// The addresses at which a task is reached so: one that it has within its node alone only that node's agent knows.
fn reached(task: &Task, reach: Reach) -> impl Iterator<Item = IpAddr> + '_ {
    let by_agent = matches!(reach, Reach::Local | Reach::Peer);
    task.addresses.iter().copied().filter(move |address| by_agent || !is_made_up(*address))
}

/// Whether there is anything to serve or to show of a service.
pub(super) fn is_shown(service: &Service) -> bool {
    !service.ports.is_empty() || !service.left.is_empty() || !service.problem.is_empty()
}

/// What all services depend on.
pub(super) struct Scene<'a> {
    view: &'a View<'a>,
    reaching: Reaching<'a>,
    nodes: HashMap<&'a str, &'a DesiredNode>,
    /// Whether this machine has a zone.
    zoned: bool,
}

impl<'a> Scene<'a> {
    /// The view, with the nodes as it shows them.
    pub fn new(view: &'a View<'a>, nodes: &'a [DesiredNode]) -> Self {
        let reaching = Reaching::new(&view.cluster.nodes, view.node);
        let zoned = !zone(view).is_empty();
        let nodes = nodes.iter().map(|node| (node.label.name.as_str(), node)).collect();
        Self { view, reaching, nodes, zoned }
    }

    /// What the tables should mean of a service.
    pub fn service(&self, service: &Service) -> DesiredService {
        let mut problems = Vec::from_iter(Some(service.problem.as_str()).filter(|text| !text.is_empty()));
        if service.prefer == Prefer::Zone && !self.zoned {
            problems.push("this node is in no zone, and prefers no tasks");
        }
        DesiredService {
            label: ServiceLabel {
                name: service.name.clone(),
                tasks: service.tasks.len() as u32,
                left: Some(service.left.clone()).filter(|left| !left.is_empty()),
                problem: Some(problems.join("; ")).filter(|text| !text.is_empty()),
                timers: service.timers.seconds,
                idle: service.idle,
                prefer: service.prefer,
                family: service.family,
                health: service.health.as_ref().map(ToString::to_string),
                slow_start: u32::try_from(service.slow_start.as_secs()).unwrap_or(u32::MAX),
                task_max_connections: service.task_max_connections,
                eject: service.eject.into(),
            },
            backends: self.backends(service),
            ports: ports(self.view, service),
            scheduler: service.scheduler,
            affinity: service.affinity,
            client_prefix: service.client_prefix,
            falls_over: service.prefer != Prefer::LocalOnly,
            access: service.access.ranges(),
        }
    }

    fn backends(&self, service: &Service) -> Vec<DesiredBackend> {
        let targets: BTreeSet<_> = service.ports.iter().map(|port| (port.protocol, port.target)).collect();
        let mut backends = Vec::new();
        let direct = service.returns.unwrap_or(self.view.cluster.tunnel.returns) == Return::Direct;
        let usable = |task: &Task| {
            let reach = self.reaching.of(task);
            let next_hops = reached(task, reach).map(|address| self.next_hop(task, (address, reach)));
            task.weight > 0 && next_hops.flatten().any(|next_hop| next_hop.silent.is_none())
        };
        for (task, judged) in service.tasks.iter().zip(judge(service, usable)) {
            let reach = self.reaching.of(task);
            // Another node may think otherwise of one that has not passed yet, and this one did before: what it has goes on.
            let held = task.state == TaskState::Running && judged.state == TaskState::Starting;
            let state = if held { TaskState::Draining } else { judged.state };
            let preferred = match service.prefer {
                Prefer::Any => true,
                Prefer::Local | Prefer::LocalOnly => reach == Reach::Local,
                Prefer::Zone => self.nodes.get(task.node.as_str()).is_some_and(|node| node.near),
            };
            for address in &Vec::from_iter(reached(task, reach)) {
                let next_hop = self.next_hop(task, (*address, reach));
                for (protocol, target) in &targets {
                    let (mut backend, problem) =
                        backend((task, state), (*address, reach), *target, &next_hop);
                    if reach == Reach::Peer && direct {
                        backend.flags |= RETURN_DIRECT;
                    }
                    let unreached = problem.is_some();
                    let problem = problem.or_else(|| judged.problem.clone());
                    let label = BackendLabel {
                        task: task.name.clone(),
                        node: task.node.clone(),
                        state: judged.state,
                        protocol: *protocol,
                        target: *target,
                        address: *address,
                        own: own(*address, &task.addresses),
                        overlay: task.cluster_address().filter(|overlay| overlay != address),
                        problem,
                    };
                    backends.push(DesiredBackend {
                        label,
                        backend,
                        weight: task.weight,
                        preferred,
                        unreached,
                    });
                }
            }
        }
        backends
    }

    /// The next hop to a task's address: by its node, where that has an agent.
    fn next_hop(&self, task: &Task, (address, reach): (IpAddr, Reach)) -> Result<&NextHop, String> {
        if reach == Reach::Peer {
            let next_hop = self.nodes.get(task.node.as_str()).and_then(|node| node.next_hop.as_ref());
            let next_hop = next_hop.ok_or_else(|| format!("there is no node {}", task.node))?;
            return next_hop.as_ref().map(|(_, next_hop)| next_hop).map_err(Clone::clone);
        }
        let next_hop = match self.view.next_hops.get(&to(task, address, reach)) {
            Some(next_hop) => next_hop.as_ref().map_err(Clone::clone),
            None => Err("the way to it is not known yet".to_owned()),
        };
        if reach == Reach::Snat && task.via == Via::Peer {
            let node =
                self.nodes.get(task.node.as_str()).map_or(task.node.as_str(), |node| node.label.shown());
            return next_hop.map_err(|reason| format!("{node} has no agent, and by snat {reason}"));
        }
        next_hop
    }
}

/// What is wrong with a node that Swarm lists so.
const DOWN: &str =
    "Swarm lists it as down: no manager hears it; if it has left, `docker node rm` takes it off the list";

/// Addresses shown of a node; a label has room for so many.
const NODE_ADDRESSES: usize = 4;

/// The zone of this machine; empty if it has none.
pub(super) fn zone<'a>(view: &View<'a>) -> &'a str {
    let this = view.cluster.nodes.iter().find(|node| node.name == view.node);
    this.map_or("", |node| node.zone.as_str())
}

/// The machines; what two of them claim is said.
pub(super) fn nodes(view: &View<'_>, refused: &mut Vec<String>) -> Vec<DesiredNode> {
    // Of this node's own addresses nobody else can know better.
    let mut owners: BTreeMap<IpAddr, &str> = view
        .addresses
        .iter()
        .filter(|_| !view.node.is_empty())
        .map(|address| (*address, view.node))
        .collect();
    let shown: HashMap<&str, &str> =
        view.cluster.nodes.iter().map(|node| (node.name.as_str(), node.shown())).collect();
    let mut nodes = Vec::new();
    let zone = zone(view);
    for node in &view.cluster.nodes {
        let this = node.name == view.node;
        let mut addresses = node.addresses.clone();
        if this {
            addresses.extend(view.addresses.iter().filter(|address| !node.addresses.contains(address)));
        }
        addresses.retain(|address| {
            let owner = *owners.entry(*address).or_insert(&node.name);
            if owner != node.name {
                let owner = shown.get(owner).unwrap_or(&owner);
                refused
                    .push(format!("{address} is said to be an address of both {owner} and {}", node.shown()));
            }
            owner == node.name
        });
        let next_hop = (!this && node.agent).then(|| peer_next_hop(view, node));
        let silent = next_hop.as_ref().and_then(|next_hop| next_hop.as_ref().ok()?.1.silent.clone());
        let problem = next_hop.as_ref().and_then(|next_hop| next_hop.as_ref().err().cloned()).or(silent);
        // One that has left and joined again has the other's address; nothing more is wrong with it.
        let problem = if node.down { Some(DOWN.to_owned()) } else { problem };
        let label_problem = Some(node.label_problem.clone()).filter(|text| !text.is_empty());
        let label = NodeLabel {
            name: node.name.clone(),
            host: node.host.clone(),
            addresses: node.addresses.iter().take(NODE_ADDRESSES).copied().collect(),
            this,
            agent: node.agent,
            problem,
            label_problem,
            zone: node.zone.clone(),
        };
        let near = !zone.is_empty() && node.zone == zone;
        let next_hop =
            next_hop.map(|next_hop| next_hop.map(|(address, next_hop)| (address, next_hop.clone())));
        let cookies = view.cookies.get(&node.name).copied();
        nodes.push(DesiredNode { label, addresses, next_hop, cookies, near });
    }
    nodes
}

/// The first address of a node that answers, and the next hop; else the first that a next hop leads to, or why there is none.
fn peer_next_hop<'a>(view: &View<'a>, node: &Node) -> Result<(IpAddr, &'a NextHop), String> {
    let (mut silent, mut problem) = (None, None);
    for address in &node.addresses {
        match view.next_hops.get(&(*address, Reach::Peer)) {
            Some(Ok(next_hop)) if next_hop.source.is_some_and(|own| own.is_ipv4() == address.is_ipv4()) => {
                if next_hop.silent.is_none() {
                    return Ok((*address, next_hop));
                }
                silent = silent.or(Some((*address, next_hop)));
            }
            Some(Err(reason)) => problem = problem.or_else(|| Some(reason.clone())),
            _ => {}
        }
    }
    silent.ok_or_else(|| {
        problem.unwrap_or_else(|| format!("no way to an address of {} is known yet", node.shown()))
    })
}

fn peer(address: IpAddr, next_hop: &NextHop) -> Peer {
    Peer {
        address: wide(address),
        source: next_hop.source.map(wide).unwrap_or_default(),
        mac: next_hop.mac,
        mtu: next_hop.mtu.min(u16::MAX.into()) as u16,
        source_mac: next_hop.source_mac,
        ifindex: next_hop.ifindex,
        family: if address.is_ipv4() { 4 } else { 6 },
        reachable: 1,
        ..Peer::default()
    }
}

fn backend(
    (task, state): (&Task, TaskState),
    (address, reach): (IpAddr, Reach),
    target: u16,
    known: &Result<&NextHop, String>,
) -> (Backend, Option<String>) {
    let state = match (known, state) {
        (Err(_), _) | (_, TaskState::Starting) => State::Unavailable,
        // Its connections go on: if it is the probes alone that get lost, nothing else is.
        (Ok(NextHop { silent: Some(_), .. }), _) | (Ok(_), TaskState::Draining) => State::Draining,
        (Ok(_), TaskState::Running) => State::Active,
    };
    let mut backend = Backend {
        address: match reach {
            Reach::Peer => mapped(task.cluster_address().unwrap_or(address)),
            _ => wide(address),
        },
        port: Be16::new(target),
        state: state as u8,
        // Known without a next hop: a task that cannot be reached for a moment stays the backend it is, and keeps
        // its connections.
        kind: reach.kind() as u8,
        family: if address.is_ipv4() { 4 } else { 6 },
        ..Backend::default()
    };
    match known {
        Ok(next_hop) => {
            backend.ifindex = next_hop.ifindex;
            backend.mac = next_hop.mac;
            backend.source_mac = next_hop.source_mac;
            backend.source = next_hop.source.map(wide).unwrap_or_default();
            backend.flags = next_hop.flags;
            (backend, next_hop.silent.clone())
        }
        Err(problem) => (backend, Some(problem.clone())),
    }
}

fn ports(view: &View<'_>, service: &Service) -> Vec<DesiredPort> {
    let addresses = if service.addresses.is_empty() { view.served() } else { service.addresses.clone() };
    service.ports.iter().map(|port| DesiredPort { port: *port, addresses: addresses.clone() }).collect()
}
