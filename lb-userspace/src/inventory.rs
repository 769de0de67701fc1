//! What an operator is shown of one interface's datapath: typed, read from the pinned tables, with or without a
//! controller. The verbs, the metrics and the page print it; none of them reads tables on its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net};
use lb_common::{
    backend::{Kind, State},
    endpoint::{AFFINE, CONSISTENT, IGNORED_SHIFT, LEAST, RANDOM},
    stats::{BackendStats, ServiceStats},
    tunnel::{Peer, PeerKey},
};
use serde::Serialize;

use crate::{
    cluster::{Idle, Port, Prefer, Scheduler, TIMERS, TaskState},
    datapath::{Counters, DatapathError, TableSet},
    plan::{BackendEntry, NodeLabel, PortLabel, Tables},
    report::{Drain, Drained, SourceReport, Trouble, moment},
};

/// Everything that is read at one moment.
pub struct Inventory {
    /// The interface.
    pub interface: String,
    /// The tables.
    pub tables: Arc<Tables>,
    /// What they counted.
    pub counters: Counters,
    /// What is wrong with backends by what was counted.
    pub troubles: BTreeMap<u32, Trouble>,
    /// How packets get to peers and by what theirs are known, by their numbers.
    pub peers: BTreeMap<u32, (Peer, PeerKey)>,
    /// What somebody drains.
    pub drains: Vec<Drain>,
    /// What the controller says of its source.
    pub report: SourceReport,
}

/// A service, as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Tasks that can take new connections.
    pub active_tasks: usize,
    /// Tasks it has, whatever they are doing.
    pub tasks: u32,
    /// Published ports, those that are left to Swarm last.
    pub ports: Vec<String>,
    /// Published ports that are left to Swarm.
    pub left_to_swarm: Option<String>,
    /// New connections given to a task.
    pub connections: u64,
    /// New connections that no task could be given: passed to the host, or refused where there are tasks that are to get none.
    pub refused_connections: u64,
    /// Packets of clients that may not connect, dropped.
    pub denied_packets: u64,
    /// New connections that a task did not take, given to another.
    pub failovers: u64,
    /// What is wrong.
    pub problem: Option<String>,
}

/// A task, all its ports together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Name.
    pub name: String,
    /// Its service.
    pub service: String,
    /// Its node.
    pub node: String,
    /// What the source says it is doing; `drained` where somebody drains it here.
    pub state: String,
    /// How it is reached.
    pub via: &'static str,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// Whether it can take new connections on all its ports.
    pub active: bool,
    /// The part of this node's new connections that it gets, in percent, rounded; of several ports that of the one with most.
    pub share: u32,
    /// New connections.
    pub connections: u64,
    /// Connections that are open; counted only where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_connections: Option<u64>,
    /// New connections that it did not take.
    pub failovers: u64,
    /// Packets sent to it.
    pub request_packets: u64,
    /// Bytes of them.
    pub request_bytes: u64,
    /// Packets from it.
    pub reply_packets: u64,
    /// Bytes of them.
    pub reply_bytes: u64,
    /// What is wrong.
    pub problem: Option<String>,
}

/// A machine of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// What users know it by; unique.
    pub name: String,
    /// Its name in the cluster: the identifier that Swarm gave it.
    pub id: String,
    /// Where it is reached.
    pub addresses: Vec<IpAddr>,
    /// Whether it is this one.
    pub this: bool,
    /// The interface by which its agent is reached; none of this node, and where no way is known.
    pub reached_by: Option<String>,
    /// Whether its datapath answers.
    pub agent: Agent,
    /// Whether its packets in the tunnel have a key; nothing of this node, and where there is no agent.
    pub key: Option<Key>,
    /// Packets in the tunnel under its address that had not its key: dropped.
    pub forged_packets: u64,
    /// Tasks it has.
    pub tasks: usize,
    /// What it shares with the nodes near to it; empty if nobody has said.
    pub zone: String,
    /// What is wrong.
    pub problem: Option<String>,
}

/// Whether a node's packets in the tunnel have a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Key {
    /// They have, and are taken with it alone.
    Used,
    /// One is known, and the node was not seen using it yet: packets without it are taken.
    Waiting,
    /// None is known: its agent is older, or a cluster file names no key.
    None,
}

impl Key {
    const fn of(key: &PeerKey) -> Self {
        match key.current {
            0 => Self::None,
            _ if key.is_proven() => Self::Used,
            _ => Self::Waiting,
        }
    }

    /// The word users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Used => "used",
            Self::Waiting => "waiting",
            Self::None => "none",
        }
    }
}

/// Whether a node's datapath answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Agent {
    /// It does, or it is this node's.
    Yes,
    /// It should, and does not.
    Silent,
    /// There is none, by the cluster file.
    None,
}

impl Agent {
    /// The word users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::Silent => "silent",
            Self::None => "none",
        }
    }
}

/// The word for the way to a backend.
pub const fn via(kind: Kind) -> &'static str {
    match kind {
        Kind::Local => "local",
        Kind::Routed => "routed",
        Kind::Snat => "snat",
        Kind::Peer => "peer",
    }
}

/// The word for what the operator did to a task.
pub const DRAINED: &str = "drained";

impl Inventory {
    /// Reads everything of an interface.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn read(interface: &str, set: &TableSet) -> Result<Self, DatapathError> {
        Self::read_with(interface, set, Arc::new(set.read_labelled()?))
    }

    /// The same, of tables that are known.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn read_with(interface: &str, set: &TableSet, tables: Arc<Tables>) -> Result<Self, DatapathError> {
        let counters = set.counters(&tables)?;
        let peers = tables.nodes.iter().filter(|(_, node)| node.agent && !node.this);
        let peers = peers.map(|(number, _)| Ok((*number, (set.peer(*number)?, set.peer_key(*number)?))));
        Ok(Self {
            peers: peers.collect::<Result<_, DatapathError>>()?,
            interface: interface.to_owned(),
            troubles: set.troubles(&counters.backends),
            counters,
            drains: set.drains().all(),
            report: set.report().unwrap_or_default(),
            tables,
        })
    }

    /// What users know the nodes by, by their names in the cluster. Several may call themselves the same: those are told
    /// apart by as much of the identifier as Docker shows.
    pub fn node_names(&self) -> BTreeMap<&str, String> {
        const SHOWN: usize = 12;
        let mut count: BTreeMap<&str, usize> = BTreeMap::new();
        for label in self.tables.nodes.values() {
            *count.entry(label.shown()).or_default() += 1;
        }
        let name = |label: &NodeLabel| match count.get(label.shown()) {
            Some(1) => label.shown().to_owned(),
            _ => format!("{}-{}", label.shown(), label.name.get(..SHOWN).unwrap_or(&label.name)),
        };
        self.tables.nodes.values().map(|label| (label.name.as_str(), name(label))).collect()
    }

    /// Whether somebody drains this task, by its name or with its node.
    pub fn is_drained(&self, task: &str, node: &str) -> bool {
        self.drains.iter().any(|drain| match drain.what {
            Drained::Task => drain.name == task,
            Drained::Node => drain.name == node,
        })
    }

    /// What users know something by that is drained.
    pub fn drained_name(&self, drain: &Drain) -> String {
        match drain.what {
            Drained::Task => drain.name.clone(),
            Drained::Node => {
                self.node_names().remove(drain.name.as_str()).unwrap_or_else(|| drain.name.clone())
            }
        }
    }

    /// The part of new connections that each backend gets, which gets any, in percent: of all the slots of a listener those that
    /// name it, where it has most.
    fn shares(&self) -> BTreeMap<u32, u32> {
        let mut shares: BTreeMap<u32, u32> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for listener in self.tables.listeners.values() {
            if !seen.insert((listener.slot_base, listener.slot_count)) {
                continue;
            }
            let mut slots: BTreeMap<u32, u64> = BTreeMap::new();
            for slot in self.tables.slots_of(listener).into_iter().flatten() {
                *slots.entry(slot.backend()).or_default() += u64::from(slot.weight());
            }
            let all: u64 = slots.values().sum();
            for (backend, count) in slots {
                // Nobody who gets some is said to get none.
                let percent = ((count * 100 + all / 2) / all).max(1) as u32;
                let share = shares.entry(backend).or_default();
                *share = percent.max(*share);
            }
        }
        shares
    }

    /// The services, by name.
    pub fn services(&self) -> Vec<Service> {
        let mut ports: BTreeMap<u32, Vec<Port>> = BTreeMap::new();
        for PortLabel { service, protocol, published, target } in self.tables.ports.values().cloned() {
            ports.entry(service).or_default().push(Port { protocol, published, target });
        }
        let mut tasks: BTreeMap<u32, BTreeMap<&str, Vec<u32>>> = BTreeMap::new();
        for (number, entry) in &self.tables.backends {
            let of = tasks.entry(entry.backend.service).or_default();
            of.entry(&entry.label.task).or_default().push(*number);
        }
        let takers = self.tables.takers();
        let mut services: Vec<Service> = self
            .tables
            .services
            .iter()
            .map(|(index, label)| {
                let tasks = tasks.remove(index).unwrap_or_default();
                let is_active =
                    |number: &u32| self.tables.backends[number].backend.state == State::Active as u8;
                let active = tasks.values().filter(|numbers| numbers.iter().all(is_active)).count();
                let refusing = |numbers: &&Vec<u32>| numbers.iter().any(|n| self.troubles.contains_key(n));
                let refusing = tasks.values().filter(refusing).count();
                let ports = Port::fold(ports.remove(index).unwrap_or_default());
                let mut ports: Vec<String> = ports.iter().map(|port| format!("*:{port}")).collect();
                let served = !ports.is_empty();
                let mut problems: Vec<String> = label.problem.iter().cloned().collect();
                if served && active == 0 {
                    problems.push(match label.tasks {
                        0 => "it has no task".to_owned(),
                        _ => "no task takes new connections".to_owned(),
                    });
                } else if label.prefer != Prefer::LocalOnly && takers.get(index) == Some(&false) {
                    // Where others are not to get any it is nothing wrong that there is none.
                    problems.push("none of its tasks gets new connections here".to_owned());
                }
                if refusing > 0 {
                    problems.push(format!("{refusing} of {} tasks refuse or do not answer", label.tasks));
                }
                ports.extend(label.left.clone());
                let stats = self.counters.services.get(index).copied().unwrap_or_default();
                let counted = |number: &u32| self.counters.backends.get(number);
                Service {
                    name: label.name.clone(),
                    active_tasks: active,
                    tasks: label.tasks,
                    ports,
                    left_to_swarm: label.left.clone(),
                    connections: stats.connections,
                    refused_connections: stats.refused,
                    denied_packets: stats.denied,
                    failovers: tasks
                        .values()
                        .flatten()
                        .filter_map(counted)
                        .map(|stats| stats.failovers)
                        .sum(),
                    problem: Some(problems.join("; ")).filter(|text| !text.is_empty()),
                }
            })
            .collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        services
    }

    /// The number of a service, by its name.
    pub fn service(&self, name: &str) -> Option<u32> {
        self.tables.services.iter().find(|(_, label)| label.name == name).map(|(index, _)| *index)
    }

    /// The tasks of the services that are chosen by their numbers; `web.2` before `web.10`.
    pub fn tasks(&self, chosen: impl Fn(u32) -> bool, open: Option<&BTreeMap<u32, u64>>) -> Vec<Task> {
        // By service, then so that web.2 comes before web.10.
        let mut tasks: BTreeMap<(&str, usize, &str), Numbered<'_>> = BTreeMap::new();
        for (number, entry) in &self.tables.backends {
            if chosen(entry.backend.service) {
                let service =
                    self.tables.services.get(&entry.backend.service).map_or("", |label| &label.name);
                let task = entry.label.task.as_str();
                tasks.entry((service, task.len(), task)).or_default().push((*number, entry));
            }
        }
        let (nodes, shares) = (self.node_names(), self.shares());
        tasks
            .into_iter()
            .map(|((service, ..), backends)| Task {
                share: backends
                    .iter()
                    .filter_map(|(number, _)| shares.get(number))
                    .max()
                    .copied()
                    .unwrap_or(0),
                ..self.task((service, &nodes), &backends, open)
            })
            .collect()
    }

    fn task(
        &self,
        (service, nodes): (&str, &BTreeMap<&str, String>),
        backends: &[(u32, &BackendEntry)],
        open: Option<&BTreeMap<u32, u64>>,
    ) -> Task {
        let label = &backends[0].1.label;
        let counted = backends.iter().filter_map(|(number, _)| self.counters.backends.get(number));
        let stats = counted.fold(BackendStats::default(), |total, stats| total.plus(*stats));
        let addresses: BTreeSet<String> = backends
            .iter()
            .map(|(_, entry)| std::net::SocketAddr::new(entry.label.own(), entry.label.target).to_string())
            .collect();
        let trouble =
            backends.iter().filter_map(|(number, _)| self.troubles.get(number)).max_by_key(|t| t.last);
        let problem = backends.iter().find_map(|(_, entry)| entry.label.problem.clone());
        let drained = self.is_drained(&label.task, &label.node);
        let state = if drained && label.state != TaskState::Starting {
            DRAINED.to_owned()
        } else {
            label.state.to_string()
        };
        Task {
            name: label.task.clone(),
            service: service.to_owned(),
            node: nodes.get(label.node.as_str()).unwrap_or(&label.node).clone(),
            state,
            via: backends
                .iter()
                .find_map(|(_, entry)| Kind::try_from(entry.backend.kind).ok())
                .map_or("-", via),
            addresses: addresses.into_iter().collect(),
            active: backends.iter().all(|(_, entry)| entry.backend.state == State::Active as u8),
            share: 0,
            connections: stats.connections,
            open_connections: open
                .map(|open| backends.iter().filter_map(|(number, _)| open.get(number)).sum::<u64>()),
            failovers: stats.failovers,
            request_packets: stats.request_packets,
            request_bytes: stats.request_bytes,
            reply_packets: stats.reply_packets,
            reply_bytes: stats.reply_bytes,
            problem: problem.or_else(|| trouble.map(refusal)),
        }
    }

    /// The machines.
    pub fn nodes(&self) -> Vec<Node> {
        let mut tasks: BTreeMap<&str, BTreeSet<(u32, &str)>> = BTreeMap::new();
        for entry in self.tables.backends.values() {
            let of = tasks.entry(&entry.label.node).or_default();
            of.insert((entry.backend.service, &entry.label.task));
        }
        let names = self.node_names();
        let node = |(number, label): (&u32, &NodeLabel)| {
            let key = self.peers.get(number).map(|(_, key)| key);
            let drained = self.drains.iter().any(|d| d.what == Drained::Node && d.name == label.name);
            let drained =
                drained.then(|| "drained by hand: no new connections go to its tasks from here".to_owned());
            let problems = label.problem.clone().or(drained).into_iter().chain(label.label_problem.clone());
            let problems: Vec<String> = problems.collect();
            Node {
                name: names.get(label.name.as_str()).cloned().unwrap_or_default(),
                id: label.name.clone(),
                addresses: label.addresses.clone(),
                this: label.this,
                reached_by: self.peers.get(number).and_then(|(peer, _)| interface_to(peer)),
                agent: match (&label.problem, label.agent, label.this) {
                    (.., true) => Agent::Yes,
                    (_, false, _) => Agent::None,
                    (Some(_), true, _) => Agent::Silent,
                    (None, true, _) => Agent::Yes,
                },
                key: key.map(Key::of),
                forged_packets: key.map_or(0, |key| key.refused),
                tasks: tasks.get(label.name.as_str()).map_or(0, BTreeSet::len),
                zone: label.zone.clone(),
                problem: Some(problems.join("; ")).filter(|text| !text.is_empty()),
            }
        };
        self.tables.nodes.iter().map(node).collect()
    }

    /// The cookie of packets to a node by its name in the cluster; zero if they have none.
    pub fn cookie_to(&self, id: &str) -> u64 {
        let number = self.tables.nodes.iter().find(|(_, label)| label.name == id).map(|(number, _)| number);
        number.and_then(|number| self.peers.get(number)).map_or(0, |(peer, _)| peer.cookie)
    }

    /// A service's counters.
    pub fn service_stats(&self, index: u32) -> ServiceStats {
        self.counters.services.get(&index).copied().unwrap_or_default()
    }

    /// Whether clients may connect to a service, by ranges of their addresses; none if everybody may.
    pub(crate) fn ranges(&self, index: u32) -> impl Iterator<Item = (IpNet, bool)> {
        let first = (index, IpNet::V4(Ipv4Net::default()));
        let of = self.tables.access.range(first..).take_while(move |((service, _), _)| *service == index);
        of.map(|((_, range), allowed)| (*range, *allowed))
    }

    /// A service's settings, by their names.
    pub fn settings(&self, index: u32) -> serde_json::Value {
        let Some(label) = self.tables.services.get(&index) else {
            return serde_json::Value::Null;
        };
        let timers: serde_json::Map<_, _> = TIMERS
            .iter()
            .map(|(name, phase)| ((*name).to_owned(), label.timers[*phase as usize].into()))
            .collect();
        let idle = match label.idle {
            Idle::Forget => "forget",
            Idle::Reset => "reset",
        };
        let of = |wanted: bool| -> Vec<String> {
            let ranges = self.ranges(index).filter(|(_, allowed)| *allowed == wanted);
            ranges.map(|(range, _)| range.to_string()).collect()
        };
        let access =
            self.ranges(index).next().map(|_| serde_json::json!({ "allow": of(true), "deny": of(false) }));
        let flags = self.tables.listeners.values().filter(|listener| listener.service == index);
        let flags = flags.fold(0, |all, listener| all | listener.flags);
        let scheduler = match flags {
            _ if flags & AFFINE != 0 => Scheduler::Source,
            _ if flags & CONSISTENT != 0 => Scheduler::Maglev,
            _ if flags & LEAST != 0 => Scheduler::LeastConnections,
            _ if flags & RANDOM != 0 => Scheduler::Random,
            _ => Scheduler::RoundRobin,
        };
        let affinity = if flags & AFFINE != 0 { "client" } else { "none" };
        let prefix = |v4: bool, bits: u32| {
            let its = self
                .tables
                .listeners
                .iter()
                .find(|(at, one)| one.service == index && at.address.is_ipv4() == v4);
            its.map(|(_, one)| bits - (one.flags >> IGNORED_SHIFT)).filter(|_| flags & AFFINE != 0)
        };
        let client_prefix = serde_json::json!({ "v4": prefix(true, 32), "v6": prefix(false, 128) });
        serde_json::json!({
            "scheduler": scheduler.name(), "affinity": affinity, "client_prefix": client_prefix, "prefer": label.prefer.name(), "family": label.family.name(), "health": label.health, "slow_start": label.slow_start, "task_max_connections": label.task_max_connections, "eject": label.eject, "timers": timers, "idle": idle,
            "access": access
        })
    }
}

/// Backends with their numbers.
type Numbered<'a> = Vec<(u32, &'a BackendEntry)>;

/// The interface by which a peer is reached.
pub(crate) fn interface_to(peer: &Peer) -> Option<String> {
    let there = (peer.reachable != 0).then_some(peer.ifindex)?;
    nix::net::if_::if_indextoname(there).ok()?.into_string().ok()
}

/// What is said of a task that does not take connections.
fn refusal(trouble: &Trouble) -> String {
    let connections = if trouble.failovers == 1 { "connection was" } else { "connections were" };
    format!(
        "refuses or does not answer: {} {connections} given to another task since {}, the last at {}; does it listen?",
        trouble.failovers,
        moment(trouble.since),
        moment(trouble.last)
    )
}
