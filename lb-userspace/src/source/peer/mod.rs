//! What agents tell each other: each tells the managers' agents what it knows of its own node, and those tell everybody
//! the cluster.
//!
//! ```text
//! agent ── facts of its node ──► every manager's agent ── the cluster: whole, then what changed ──► agent
//! ```
//!
//! Over TLS with the certificates that every node of a swarm has ([`tls`]); a line of JSON a message. What is long comes in
//! parts, to those who say that they take them, so that nobody holds the whole as text and both sides are heard meanwhile.
//!
//! Who speaks is told by the certificate, and where he is by where he speaks from: an agent proves each address of its node
//! that it wants believed by connecting from it.

pub mod client;
mod door;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod lines;
mod pace;
mod prove;
pub mod server;
pub mod tls;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io::ErrorKind,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use lines::LineError;
pub use pace::Pace;
use serde::{Deserialize, Serialize};

use super::facts::NodeFacts;
use crate::cluster::{ClusterState, Node, Service, Tunnel};

/// Version of the messages; it changes when an older agent would misunderstand.
pub const VERSION: u32 = 1;
/// Longest message of a manager, who is trusted with the cluster: the largest service, or all nodes.
const LONGEST: usize = 64 << 20;
/// Somebody who has nothing to say says so this often.
const PING: Duration = Duration::from_secs(1);
/// Who is not heard for this long is gone.
const SILENCE: Duration = Duration::from_secs(5);
/// For a connection to come about.
const CONNECT: Duration = Duration::from_secs(3);

/// What a manager's agent has to tell.
#[derive(Debug, Default)]
pub struct ClusterSnapshot {
    /// The cluster.
    cluster: Arc<ClusterState>,
    /// The nodes of the swarm, by identifier: nobody else is told anything.
    members: BTreeSet<String>,
    /// Why this may be out of date.
    problem: Option<String>,
    /// What leads here, by where it begins: most are told the same.
    deltas: Mutex<Vec<(Arc<ClusterState>, Arc<Delta>)>>,
    /// The whole, as long as somebody is being told it: that is long.
    whole: Mutex<Weak<Delta>>,
}

/// What leads from one state to another, as it is told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Delta {
    /// JSON of [`Changes`] without what differs between those who are told. Only all parts together lead to a state.
    parts: Vec<String>,
    /// Whether the two differ.
    news: bool,
}

impl Delta {
    fn new(before: Option<&Arc<ClusterState>>, after: &ClusterState) -> Self {
        let before = before.map(Arc::as_ref);
        let parts = Changes::between(before, after).in_parts().into_iter();
        let parts = parts.map(|part| serde_json::to_string(&part).unwrap_or_default());
        Self { parts: parts.collect(), news: before != Some(after) }
    }

    /// The messages for the node of this name.
    fn lines(&self, this: Option<&str>) -> impl Iterator<Item = String> {
        let this = serde_json::to_string(&this).unwrap_or_default();
        let fields = self.parts.iter().filter_map(|part| part.strip_prefix('{'));
        fields.map(move |fields| format!("{{\"cluster\":{{\"this\":{this},{fields}}}"))
    }
}

impl ClusterSnapshot {
    /// What there is to tell: the cluster, the nodes of the swarm, why it may be out of date.
    pub fn new(cluster: ClusterState, members: BTreeSet<String>, problem: Option<String>) -> Self {
        Self { cluster: Arc::new(cluster), members, problem, ..Self::default() }
    }

    /// Where the swarm's nodes are.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster.nodes.iter().flat_map(|node| &node.addresses).copied()
    }

    /// What leads here from what was told before.
    fn since(&self, before: Option<&Arc<ClusterState>>) -> Arc<Delta> {
        let Some(before) = before else {
            let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
            return whole.upgrade().unwrap_or_else(|| {
                let delta = Arc::new(Delta::new(None, &self.cluster));
                *whole = Arc::downgrade(&delta);
                delta
            });
        };
        let mut deltas = self.deltas.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, delta)) = deltas.iter().find(|(from, _)| Arc::ptr_eq(from, before)) {
            return delta.clone();
        }
        let delta = Arc::new(Delta::new(Some(before), &self.cluster));
        deltas.push((before.clone(), delta.clone()));
        delta
    }

    /// The same at once, for an agent that takes no parts.
    fn at_once(&self, before: Option<&Arc<ClusterState>>) -> Delta {
        let before = before.map(Arc::as_ref);
        let changes = Changes::between(before, &self.cluster);
        let parts = vec![serde_json::to_string(&changes).unwrap_or_default()];
        Delta { parts, news: before != Some(self.cluster.as_ref()) }
    }
}

/// What there is to tell; nothing yet, or no more.
pub type Published = Option<Arc<ClusterSnapshot>>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FromAgent {
    Hello {
        version: u32,
        /// Whether it takes changes in parts; older agents do not.
        #[serde(default)]
        parts: bool,
        /// Whether it has come for nothing but to show that it can speak from its address.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        proves: bool,
    },
    Facts(NodeFacts),
    Ping,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FromManager {
    Hello {
        version: u32,
    },
    Cluster(Box<Changes>),
    /// The manager knows nothing now, or what it told may be out of date.
    Problem(String),
    /// It has seen the agent speak from this address.
    Proven(IpAddr),
    Ping,
}

/// The next line, or none: also where the other side went without a word, as a process that ends does.
fn ended(line: Option<Result<String, LineError>>) -> Result<Option<String>, LineError> {
    match line {
        Some(Err(LineError::Io(error))) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        line => line.transpose(),
    }
}

/// What changed in the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Changes {
    /// Written by itself, for it differs between those who are told.
    #[serde(default, skip_serializing)]
    this: Option<String>,
    /// Everything before is void.
    whole: bool,
    /// There is more to it: only all parts together lead to a state.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    more: bool,
    changed: Option<SystemTime>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    checks: bool,
    tunnel: Tunnel,
    /// Whom no service takes; all of them, if any changed. Older agents know of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    denied: Option<Vec<IpNet>>,
    /// All of them, if any changed.
    nodes: Option<Vec<Node>>,
    services: Vec<Arc<Service>>,
    gone: Vec<String>,
}

/// As many tasks are told of in one part, about: a part is a fraction of a megabyte.
const TASKS_OF_A_PART: usize = 1_000;

impl Changes {
    /// What leads from one state to the next.
    fn between(before: Option<&ClusterState>, after: &ClusterState) -> Self {
        let known = before.map_or(&[][..], |before| before.services.as_slice());
        // Those that stand where they stood are hardly worth a look.
        let stays = |index: usize| match (known.get(index), after.services.get(index)) {
            (Some(before), Some(after)) => Arc::ptr_eq(before, after),
            _ => false,
        };
        let moved = |services: &[Arc<Service>]| -> Vec<usize> {
            (0..services.len()).filter(|index| !stays(*index)).collect()
        };
        let (old, new) = (moved(known), moved(&after.services));
        let old: HashMap<&str, &Arc<Service>> =
            old.into_iter().map(|index| (known[index].name.as_str(), &known[index])).collect();
        let new: Vec<&Arc<Service>> = new.into_iter().map(|index| &after.services[index]).collect();
        let names: HashSet<&str> = new.iter().map(|service| service.name.as_str()).collect();
        let mut gone: Vec<String> =
            old.keys().filter(|name| !names.contains(**name)).map(|name| (*name).to_owned()).collect();
        gone.sort();
        Self {
            this: after.this.clone(),
            whole: before.is_none(),
            more: false,
            changed: after.changed,
            checks: after.checks,
            tunnel: after.tunnel,
            denied: before.is_none_or(|before| before.denied != after.denied).then(|| after.denied.clone()),
            nodes: before.is_none_or(|before| before.nodes != after.nodes).then(|| after.nodes.clone()),
            services: new
                .into_iter()
                .filter(|service| old.get(service.name.as_str()) != Some(service))
                .cloned()
                .collect(),
            gone,
        }
    }

    /// The same in parts that are not too long.
    fn in_parts(mut self) -> Vec<Self> {
        let mut parts = Vec::new();
        let mut services = std::mem::take(&mut self.services).into_iter().peekable();
        while let Some(first) = services.next() {
            let mut tasks = first.tasks.len();
            let mut part = vec![first];
            while let Some(next) = services.next_if(|next| tasks + next.tasks.len() <= TASKS_OF_A_PART) {
                tasks += next.tasks.len();
                part.push(next);
            }
            // The first part says all that there is but once.
            let rest = Self { whole: false, denied: None, nodes: None, gone: Vec::new(), ..self.clone() };
            parts.push(Self { more: true, services: part, ..std::mem::replace(&mut self, rest) });
        }
        match parts.last_mut() {
            Some(last) => last.more = false,
            None => parts.push(self),
        }
        parts
    }

    /// Takes a state to the next, or, where there is more to it, nearer to that.
    fn apply(self, state: &mut ClusterState) {
        if self.whole {
            *state = ClusterState::default();
        }
        (state.this, state.changed, state.tunnel) = (self.this, self.changed, self.tunnel);
        state.checks = self.checks;
        if let Some(denied) = self.denied {
            state.denied = denied;
        }
        if let Some(nodes) = self.nodes {
            state.nodes = nodes;
        }
        // In order of name.
        let place = |state: &ClusterState, name: &str| {
            state.services.binary_search_by(|service| service.name.as_str().cmp(name))
        };
        for name in &self.gone {
            if let Ok(index) = place(state, name) {
                state.services.remove(index);
            }
        }
        for service in self.services {
            match place(state, &service.name) {
                Ok(index) => state.services[index] = service,
                Err(index) => state.services.insert(index, service),
            }
        }
    }
}

#[cfg(test)]
mod attack_tests;
#[cfg(test)]
mod talk_tests;

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(services: &[(&str, &str)], nodes: &[&str]) -> ClusterState {
        let service = |(name, port): &(&str, &str)| Service {
            name: (*name).into(),
            ports: vec![port.parse().unwrap()],
            ..Service::default()
        };
        let node = |name: &&str| Node {
            name: (*name).into(),
            host: String::new(),
            addresses: vec![],
            agent: true,
            down: false,
            key: crate::tunnel_key::NodeKey::Unknown,
            ..Node::default()
        };
        ClusterState {
            services: services.iter().map(service).map(Arc::new).collect(),
            nodes: nodes.iter().map(node).collect(),
            ..ClusterState::default()
        }
    }

    #[test]
    fn changes_lead_from_any_state_to_the_next() {
        let states = [
            cluster(&[], &[]),
            cluster(&[("a", "80:80"), ("b", "81:81")], &["node1"]),
            cluster(&[("a", "80:80"), ("b", "82:81"), ("c", "83:83")], &["node1"]),
            cluster(&[("c", "83:83")], &["node1", "node2"]),
            ClusterState {
                denied: vec!["192.0.2.66/32".parse().unwrap()],
                ..cluster(&[("c", "83:83")], &["node1", "node2"])
            },
        ];
        for before in &states {
            for after in &states {
                let changes = Changes::between(Some(before), after);
                let told = serde_json::to_string(&changes).unwrap();
                let mut state = before.clone();
                serde_json::from_str::<Changes>(&told).unwrap().apply(&mut state);
                assert_eq!(&state, after);
                let mut state = before.clone();
                Changes::between(None, after).apply(&mut state);
                assert_eq!(&state, after);
            }
        }
        let changes = Changes::between(Some(&states[1]), &states[2]);
        assert_eq!((changes.services.len(), changes.gone.len(), changes.nodes), (2, 0, None));
    }

    #[test]
    fn a_long_delta_is_sent_in_parts_and_each_is_told_its_own_name() {
        let task = |name: String| crate::cluster::Task {
            name,
            node: "node1".into(),
            addresses: vec![],
            overlay: None,
            state: crate::cluster::TaskState::Running,
            weight: 1,
            via: crate::cluster::Via::Peer,
            finding: None,
        };
        let mut state = cluster(&[("a", "80:80"), ("b", "81:81"), ("c", "82:82")], &["node1"]);
        for index in 0..3 {
            let tasks = (0..TASKS_OF_A_PART * 2 / 3).map(|number| task(format!("{index}.{number}")));
            state.service_mut(index).tasks = tasks.collect();
        }
        let told = ClusterSnapshot::new(state.clone(), BTreeSet::new(), None);
        let delta = told.since(None);
        assert_eq!(delta.parts.len(), 3);
        let mut heard = cluster(&[("z", "90:90")], &[]);
        for (number, line) in (1..).zip(delta.lines(Some("node \"7\""))) {
            let FromManager::Cluster(changes) = serde_json::from_str(&line).unwrap() else {
                panic!("{line}")
            };
            assert_eq!(changes.more, number < 3);
            changes.apply(&mut heard);
        }
        assert_eq!(heard, ClusterState { this: Some("node \"7\"".into()), ..state });
        // Who takes no parts hears the same by one line.
        let lines: Vec<String> = told.at_once(None).lines(Some("node2")).collect();
        let [line] = lines.as_slice() else { panic!("{} lines", lines.len()) };
        let FromManager::Cluster(changes) = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        let mut at_once = ClusterState::default();
        changes.apply(&mut at_once);
        assert_eq!(at_once.services, heard.services);
        let hello: FromAgent = serde_json::from_str(r#"{"hello":{"version":1}}"#).unwrap();
        assert!(matches!(hello, FromAgent::Hello { parts: false, .. }));
        // Told once, whoever asks; and forgotten when nobody is being told.
        assert!(Arc::ptr_eq(&delta, &told.since(None)));
        let before = Arc::new(cluster(&[("a", "80:80")], &["node1"]));
        assert!(Arc::ptr_eq(&told.since(Some(&before)), &told.since(Some(&before))));
        drop(delta);
        assert!(told.whole.lock().unwrap().upgrade().is_none());
        let same = told.since(Some(&told.cluster));
        assert!(!same.news && same.parts.len() == 1);
    }
}
