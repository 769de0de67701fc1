//! What agents tell each other: each tells the managers' agents what it knows of its own node, and those tell everybody
//! the cluster.
//!
//! ```text
//! agent ── facts of its node ──► every manager's agent ── the cluster: whole, then what changed ──► agent
//! ```
//!
//! Over TLS with the certificates that every node of a swarm has ([`tls`]); a line of JSON a message.

pub mod client;
pub mod server;
pub mod tls;

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio_util::codec::LinesCodecError;

use super::facts::NodeFacts;
use crate::cluster::{ClusterState, Node, Service, Tunnel};

/// Version of the messages; it changes when an older agent would misunderstand.
pub const VERSION: u32 = 1;
/// Longest message: the whole of a very large cluster.
const LONGEST: usize = 256 << 20;
/// Somebody who has nothing to say says so this often.
const PING: Duration = Duration::from_secs(1);
/// Who is not heard for this long is gone.
const SILENCE: Duration = Duration::from_secs(5);
/// For a connection to come about.
const CONNECT: Duration = Duration::from_secs(3);

/// What a manager's agent has to tell.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The cluster.
    pub cluster: ClusterState,
    /// Names of the nodes by identifier, so that each can be told who it is.
    pub names: BTreeMap<String, String>,
    /// Why this may be out of date.
    pub problem: Option<String>,
}

/// What there is to tell; nothing yet, or no more.
pub type Telling = Option<Arc<Told>>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FromAgent {
    Hello { version: u32 },
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
    Ping,
}

/// The next line, or none: also where the other side went without a word, as a process that ends does.
fn ended(line: Option<Result<String, LinesCodecError>>) -> Result<Option<String>, LinesCodecError> {
    match line {
        Some(Err(LinesCodecError::Io(error))) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        line => line.transpose(),
    }
}

/// What changed in the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Changes {
    /// Everything before is void.
    whole: bool,
    this: Option<String>,
    changed: Option<SystemTime>,
    tunnel: Tunnel,
    /// All of them, if any changed.
    nodes: Option<Vec<Node>>,
    services: Vec<Arc<Service>>,
    gone: Vec<String>,
}

impl Changes {
    /// What leads from one state to the next.
    fn between(before: Option<&ClusterState>, after: &ClusterState) -> Self {
        let known: BTreeMap<&str, &Arc<Service>> =
            before.into_iter().flat_map(|state| &state.services).map(|s| (s.name.as_str(), s)).collect();
        let names: std::collections::HashSet<&str> = after.services.iter().map(|s| s.name.as_str()).collect();
        let same = |service: &&Arc<Service>| known.get(service.name.as_str()) != Some(service);
        Self {
            whole: before.is_none(),
            this: after.this.clone(),
            changed: after.changed,
            tunnel: after.tunnel,
            nodes: before.is_none_or(|before| before.nodes != after.nodes).then(|| after.nodes.clone()),
            services: after.services.iter().filter(same).cloned().collect(),
            gone: known
                .keys()
                .filter(|name| !names.contains(**name))
                .map(|name| (*name).to_owned())
                .collect(),
        }
    }

    /// Takes a state to the next.
    fn apply(self, state: &mut ClusterState) {
        if self.whole {
            *state = ClusterState::default();
        }
        (state.this, state.changed, state.tunnel) = (self.this, self.changed, self.tunnel);
        if let Some(nodes) = self.nodes {
            state.nodes = nodes;
        }
        if self.services.is_empty() && self.gone.is_empty() {
            return;
        }
        let mut services: BTreeMap<String, Arc<Service>> =
            std::mem::take(&mut state.services).into_iter().map(|s| (s.name.clone(), s)).collect();
        for name in &self.gone {
            services.remove(name);
        }
        services.extend(self.services.into_iter().map(|service| (service.name.clone(), service)));
        state.services = services.into_values().collect();
    }
}

#[cfg(test)]
mod talk_tests;

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(services: &[(&str, &str)], nodes: &[&str]) -> ClusterState {
        let service = |(name, port): &(&str, &str)| Service {
            name: (*name).into(),
            addresses: vec![],
            ports: vec![port.parse().unwrap()],
            tasks: vec![],
            returns: None,
            left: String::new(),
            timers: lb_common::flow::Timers::DEFAULT,
        };
        let node = |name: &&str| Node { name: (*name).into(), addresses: vec![], agent: true };
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
}
