//! What this node is told of the swarm, and what it makes of it: nothing here waits for anybody but the receivers.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, watch};

use super::{
    Settings,
    agents::Agents,
    engine::{Engine, EngineError},
    listing::{Listing, ManagerView},
    membership::{Member, Membership},
    model::Gossip,
};
use crate::{
    cluster::{ClusterState, Node, Task, TaskState},
    descriptors,
    source::{
        Origin, Update,
        facts::{Completion, NodeFacts, NodeReport, task_name},
        peer::{self, ClusterSnapshot, Published},
    },
    text,
    tunnel_key::NodeKey,
};

/// Connections to managers come about in this time, or it is worth a word.
const GRACE: Duration = Duration::from_secs(3);
/// Other nodes' agents find a new manager's in this time: they look for managers every few seconds.
const FACTS: Duration = Duration::from_secs(6);
/// What comes and goes is said again after so long.
const SAID_AGAIN: Duration = Duration::from_secs(600);
/// So many things are remembered as said.
const NOTES: usize = 4096;

/// What this node is told, and what it makes of it.
pub(super) struct Swarm {
    pub(super) engine: Engine,
    pub(super) settings: Settings,
    pub(super) outputs: Vec<mpsc::Sender<Update>>,
    pub(super) published: watch::Sender<Published>,
    /// What this node knows by itself, once it was looked.
    pub(super) own: watch::Receiver<Option<NodeFacts>>,
    /// The last part that is known for sure, and since when.
    membership: Option<(Membership, Instant)>,
    /// Why that is not known now.
    unknown: Option<String>,
    /// What a manager's lists say, and why they are not newer.
    view: Option<ManagerView>,
    lists_problem: Option<String>,
    /// What other nodes' agents said.
    pub(super) agents: Agents,
    /// Whether connections are served by what was known before this node managed, which the agents' word must complete.
    takes_over: bool,
    /// The nodes whose agents are waited for, once that was said.
    waiting: BTreeSet<String>,
    /// What managers' agents said, by identifier.
    managers: BTreeMap<String, Manager>,
    /// The one whose word counts.
    chosen: Option<String>,
    /// What was last known from elsewhere, for when nobody speaks.
    base: Option<ClusterState>,
    /// What agents' words made of the services.
    completion: Completion,
    /// What the nodes tell each other, while there is no other word.
    pub(super) gossip: Option<Gossip>,
    changed: Option<SystemTime>,
    youngest: Option<SystemTime>,
    /// What was said, and when it was so last.
    notes: BTreeMap<String, Instant>,
    sent: Sent,
}

/// What a manager's agent said.
#[derive(Default)]
struct Manager {
    state: Option<ClusterState>,
    problem: Option<String>,
}

impl Manager {
    fn is_heard(&self) -> bool {
        self.state.is_some() && self.problem.is_none()
    }
}

/// What was said last, so that nothing is said twice.
#[derive(Default)]
struct Sent {
    origin: Option<Origin>,
    state: Option<ClusterState>,
    problem: Option<String>,
}

impl Swarm {
    pub(super) fn new(
        engine: Engine,
        settings: Settings,
        outputs: Vec<mpsc::Sender<Update>>,
        own: watch::Receiver<Option<NodeFacts>>,
    ) -> Self {
        Self {
            engine,
            settings,
            outputs,
            published: watch::channel(None).0,
            own,
            membership: None,
            unknown: None,
            view: None,
            lists_problem: None,
            agents: Agents::default(),
            takes_over: false,
            waiting: BTreeSet::new(),
            managers: BTreeMap::new(),
            chosen: None,
            base: None,
            completion: Completion::default(),
            gossip: None,
            changed: None,
            youngest: None,
            notes: BTreeMap::new(),
            sent: Sent::default(),
        }
    }

    /// Takes note of this node's part. While Docker does not say, it is what it was.
    pub(super) fn becomes(&mut self, membership: &Membership) {
        if let Membership::Unknown(reason) = membership {
            self.unknown = Some(reason.clone());
            return;
        }
        self.unknown = None;
        let manager = membership.member().is_some_and(|member| member.manager);
        let managed = self.member().is_some_and(|member| member.manager);
        if !manager {
            (self.view, self.lists_problem) = (None, None);
            self.published.send_replace(None);
            // Nobody is listened to, or told anything, any more.
            self.agents = Agents::default();
        }
        match membership.member() {
            Some(member) => {
                let others = member.other_managers(0);
                self.managers.retain(|id, _| others.iter().any(|(other, _)| other == id));
            }
            None => {
                self.managers.clear();
            }
        }
        let since = match &self.membership {
            Some((_, since)) if manager == managed => *since,
            _ => {
                self.takes_over = self.settings.adopts || self.sent.state.is_some();
                Instant::now()
            }
        };
        self.membership = Some((membership.clone(), since));
    }

    fn member(&self) -> Option<&Member> {
        self.membership.as_ref().and_then(|(membership, _)| membership.member())
    }

    pub(super) fn listed(&mut self, listed: Result<Listing, EngineError>) {
        // A word from before this node was demoted.
        if !self.member().is_some_and(|member| member.manager) {
            return;
        }
        match listed {
            Ok(listing) => {
                let mut view = listing.view(self.settings.tunnel);
                if let Some(before) = &self.view {
                    view.cluster.share(&before.cluster);
                }
                view.notes.extend(descriptors::problem(view.members.len()));
                let youngest = listing.youngest();
                if youngest > self.youngest && self.view.is_some() {
                    self.changed = youngest;
                }
                self.youngest = youngest;
                (self.view, self.lists_problem) = (Some(view), None);
            }
            Err(error) => self.lists_problem = Some(error.to_string()),
        }
    }

    /// Takes note of what an agent says; whether the managers may know something new too.
    pub(super) fn agent_said(&mut self, event: peer::server::PeerEvent) -> bool {
        self.agents.take(event, Instant::now())
    }

    /// Forgets what nobody has said for too long.
    pub(super) fn expire(&mut self) {
        let members = self.view.as_ref().map(|view| &view.members);
        self.agents.expire(members, Instant::now());
    }

    /// Says what the operator should hear, once for as long as it is so: what comes and goes is said again after a while.
    fn note(&mut self, notes: BTreeSet<String>) {
        let now = Instant::now();
        self.notes.retain(|note, since| {
            if notes.contains(note) {
                *since = now;
            }
            now.duration_since(*since) < SAID_AGAIN
        });
        for note in notes {
            // A node in the wrong hands can claim anything.
            if self.notes.len() < NOTES && self.notes.insert(note.clone(), now).is_none() {
                log::warn!("{}", text::clean(&note));
            }
        }
    }

    pub(super) fn manager_said(&mut self, event: peer::client::ManagerEvent) {
        let (id, state, problem) = match event {
            peer::client::ManagerEvent::Cluster(id, state) => (id, Some(*state), None),
            peer::client::ManagerEvent::Problem(id, reason)
            | peer::client::ManagerEvent::Gone(id, reason) => (id, None, Some(reason)),
        };
        // A word from before it was demoted.
        let others = self.member().map(|member| member.other_managers(0)).unwrap_or_default();
        if !others.iter().any(|(other, _)| *other == id) {
            return;
        }
        let manager = self.managers.entry(id).or_default();
        manager.problem = problem;
        manager.state = state.or(manager.state.take());
    }

    /// Why what is known may be out of date.
    pub(super) fn problem(&self) -> Option<String> {
        let Some((membership, since)) = &self.membership else {
            return self.unknown.clone();
        };
        let member = membership.member()?;
        if member.manager {
            return self.lists_problem.clone();
        }
        if self.managers.values().any(Manager::is_heard) || since.elapsed() < GRACE {
            return None;
        }
        let reasons: Vec<&str> =
            self.managers.values().filter_map(|manager| manager.problem.as_deref()).collect();
        Some(match reasons.as_slice() {
            [] => "no manager of the swarm has told the cluster's state yet".to_owned(),
            reasons => format!("no manager tells the cluster's state: {}", reasons.join("; ")),
        })
    }

    /// The cluster as far as it is known.
    fn state(&mut self) -> Option<ClusterState> {
        let (manager, node) = match &self.membership.as_ref()?.0 {
            Membership::Member(member) => (member.manager, member.node.clone()),
            _ => {
                let tunnel = self.settings.tunnel;
                return Some(ClusterState { tunnel, ..ClusterState::default() });
            }
        };
        let own = NodeReport { facts: Arc::new(self.own.borrow().clone()?), now: true };
        let mut state = if manager {
            let awaited = self.awaited();
            if !awaited.is_empty() {
                if awaited != self.waiting {
                    let names: Vec<&str> = awaited.iter().map(String::as_str).collect();
                    log::info!(
                        "changes wait until the agents of {} have told of their tasks, {} s at most: the running \
                         datapath serves as before",
                        names.join(", "),
                        FACTS.as_secs()
                    );
                    self.waiting = awaited;
                }
                return None;
            }
            let view = self.view.as_ref()?;
            let mut state = view.cluster.clone();
            state.this = Some(node.clone()).filter(|node| view.members.contains(node));
            let claimed = self.agents.place(&mut state.nodes, (&node, &own.facts.addresses));
            if let Some(this) = state.nodes.iter_mut().find(|other| other.name == node) {
                this.key = NodeKey::Public(self.settings.key);
            }
            let notes = view.notes.iter().cloned().chain(claimed).collect();
            self.base = Some(state.clone());
            let mut facts = self.agents.facts();
            facts.insert(node, own);
            self.completion.complete(&mut state, facts);
            self.note(notes);
            state
        } else {
            let mut state = self.manager_state()?;
            // By which name it is told: an older manager's agent takes the host's for it.
            if let Some(this) = state.this.clone() {
                if let Some(node) = state.nodes.iter_mut().find(|node| node.name == this) {
                    let told = std::mem::replace(&mut node.addresses, own.facts.addresses.clone());
                    node.addresses
                        .extend(told.into_iter().filter(|told| !own.facts.addresses.contains(told)));
                }
                self.completion.complete(&mut state, BTreeMap::from([(this, own)]));
            }
            // The agents of this node must agree with themselves, whatever a manager's agent was told.
            state.tunnel = self.settings.tunnel;
            state
        };
        if let Some(gossip) = self.gossip.as_ref().filter(|_| self.problem().is_some()) {
            forget(&mut state, gossip);
        }
        Some(state)
    }

    /// The nodes whose agents may yet come with what they know, while connections would be cut without it: those that a
    /// datapath serves which ran before this agent, or that were served before this node managed. They find a manager's
    /// agent within seconds.
    fn awaited(&self) -> BTreeSet<String> {
        let fresh = self.membership.as_ref().is_some_and(|(_, since)| since.elapsed() < FACTS);
        let Some(view) = self.view.as_ref().filter(|_| self.takes_over && fresh) else {
            return BTreeSet::new();
        };
        let own = self.member().map(|member| member.node.as_str());
        let unheard = view.cluster.nodes.iter().filter(|node| {
            let id = node.name.as_str();
            Some(id) != own && !node.down && !self.agents.is_settled(id)
        });
        unheard.map(|node| node.shown().to_owned()).collect()
    }

    /// What the chosen manager's agent says; another is chosen only when that one is not heard. Nobody heard, what was last
    /// known from elsewhere.
    fn manager_state(&mut self) -> Option<ClusterState> {
        let chosen = self.chosen.as_ref().and_then(|id| self.managers.get(id));
        if !chosen.is_some_and(Manager::is_heard)
            && let Some((id, _)) = self.managers.iter().find(|(_, manager)| manager.is_heard())
        {
            self.chosen = Some(id.clone());
        }
        let manager = self.chosen.as_ref().and_then(|id| self.managers.get(id));
        if let Some(mut state) = manager.and_then(|manager| manager.state.clone()) {
            let told = self.managers.iter();
            let told = told.filter_map(|(id, manager)| Some((id.as_str(), manager.state.as_ref()?)));
            complete_keys(&mut state.nodes, &told.collect());
            self.base = Some(state);
        }
        self.base.clone()
    }

    fn origin(&self) -> Option<Origin> {
        let mut place = self.engine.place();
        let kind = match &self.membership.as_ref()?.0 {
            Membership::Member(member) if member.manager => "docker manager",
            Membership::Member(_) => {
                if let Some(id) = &self.chosen {
                    place = format!("{place}, told by manager {id}");
                }
                "docker worker"
            }
            _ => super::OUTSIDE,
        };
        Some(Origin { kind: kind.into(), why: format!("{}; {place}", self.settings.why) })
    }

    /// Says what is new.
    pub(super) async fn tell(&mut self) {
        let state = self.state();
        let origin = self.origin();
        if origin.is_some() && origin != self.sent.origin {
            self.sent.origin.clone_from(&origin);
            if let Some(origin) = origin {
                self.send(Update::Origin(origin)).await;
            }
        }
        let problem = self.problem();
        let doubts = problem != self.sent.problem;
        if problem.is_none() && self.sent.problem.is_some() && state.is_some() {
            log::info!("the cluster's state is known again, and followed");
        }
        self.sent.problem.clone_from(&problem);
        let Some(mut state) = state else {
            if let Some(reason) = problem.filter(|_| doubts) {
                let update = match self.sent.state {
                    Some(_) => Update::Failed(reason),
                    None => Update::Waiting(reason),
                };
                self.send(update).await;
            }
            return;
        };
        let told = state.changed.take();
        let news = self.sent.state.as_ref() != Some(&state);
        if !news && !doubts {
            // A node that was a worker for a while has nothing new, and has told nobody since.
            if self.published.borrow().is_none() {
                self.tell_agents(&state, problem);
            }
            return;
        }
        let first = self.sent.state.replace(state.clone()).is_none();
        self.tell_agents(&state, problem.clone());
        if news && !first {
            state.changed = told.or_else(|| self.changed.take()).or_else(|| Some(SystemTime::now()));
        }
        self.send(match problem {
            None => Update::State(state),
            Some(reason) => Update::Stale(state, reason),
        })
        .await;
    }

    /// Lets other nodes' agents know, if this node is a manager.
    fn tell_agents(&self, state: &ClusterState, problem: Option<String>) {
        if let (Some(view), Some(Member { manager: true, .. })) = (&self.view, self.member()) {
            let snapshot = ClusterSnapshot::new(state.clone(), view.members.clone(), problem);
            self.published.send_replace(Some(Arc::new(snapshot)));
        }
    }

    async fn send(&self, update: Update) {
        for output in &self.outputs {
            // One that is gone wants nothing.
            let _ = output.send(update.clone()).await;
        }
    }
}

/// Completes what one manager's agent says of the nodes' keys by what all said last, by their names: each knows those of the
/// agents that speak to it. One that does not tell its own is of a version without keys, and where there are only such ones no node
/// can hear of another's.
fn complete_keys(nodes: &mut [Node], told: &BTreeMap<&str, &ClusterState>) {
    let said: Vec<HashMap<&str, NodeKey>> = told
        .values()
        .map(|state| state.nodes.iter().map(|node| (node.name.as_str(), node.key)).collect())
        .collect();
    let of =
        |said: &HashMap<&str, NodeKey>, name: &str| said.get(name).copied().filter(|key| !key.is_unknown());
    let tells = |(name, said): (&&str, &HashMap<&str, NodeKey>)| of(said, name).is_some();
    let any = told.keys().zip(&said).any(tells);
    for node in nodes.iter_mut().filter(|node| node.key.is_unknown()) {
        let name = node.name.as_str();
        let own = told.keys().zip(&said).find(|(id, _)| **id == name);
        node.key = match said.iter().find_map(|said| of(said, name)) {
            Some(key) => key,
            None if !any || own.is_some() => NodeKey::None,
            None => NodeKey::Unknown,
        };
    }
}

/// Takes new connections from tasks of other nodes that those do not tell of any more. Of its own a node knows better; and a
/// node that is not heard at all may only have lost its Docker: whether it is there its datapath says.
fn forget(state: &mut ClusterState, gossip: &Gossip) {
    let tasks = gossip.services.values().flat_map(|service| &service.tasks);
    let told: BTreeSet<String> = tasks.map(|task| task_name(&task.name)).collect();
    let heard: BTreeSet<IpAddr> = gossip.peers.iter().filter_map(|peer| peer.ip.parse().ok()).collect();
    let this = state.this.clone();
    let others = state.nodes.iter().filter(|node| Some(&node.name) != this.as_ref());
    let speaking: BTreeSet<&str> = others
        .filter(|node| node.addresses.iter().any(|address| heard.contains(address)))
        .map(|node| node.name.as_str())
        .collect();
    let gone = |task: &Task| {
        let untold = speaking.contains(task.node.as_str()) && !told.contains(&task.name);
        untold && task.state == TaskState::Running
    };
    for service in state.services.iter_mut().filter(|service| service.tasks.iter().any(gone)) {
        for task in Arc::make_mut(service).tasks.iter_mut().filter(|task| gone(task)) {
            task.state = TaskState::Draining;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Service, Via};

    #[test]
    fn keys_are_what_all_managers_know_and_nobody_s_where_none_knows_any() {
        use NodeKey::{None, Public, Unknown};
        let [m1, m2, a] = [(); 3].map(|()| Public(crate::tunnel_key::Secret::generate().unwrap().public()));
        let state = |keys: [NodeKey; 4]| {
            let node = |(name, key): (&str, NodeKey)| Node {
                name: name.into(),
                host: String::new(),
                addresses: vec![],
                agent: true,
                down: false,
                key,
                ..Node::default()
            };
            let nodes = ["m1", "m2", "a", "b"].into_iter().zip(keys).map(node).collect();
            ClusterState { nodes, ..ClusterState::default() }
        };
        let known = |chosen: [NodeKey; 4], heard: &[(&str, [NodeKey; 4])]| {
            let heard: Vec<_> = heard.iter().map(|(name, keys)| (*name, state(*keys))).collect();
            let mut state = state(chosen);
            complete_keys(&mut state.nodes, &heard.iter().map(|(name, state)| (*name, state)).collect());
            state.nodes.into_iter().map(|node| node.key).collect::<Vec<_>>()
        };
        // Each hears other agents.
        let (first, second) = ([m1, Unknown, a, Unknown], [Unknown, m2, Unknown, None]);
        for chosen in [first, second] {
            assert_eq!(known(chosen, &[("m1", first), ("m2", second)]), [m1, m2, a, None]);
        }
        assert_eq!(known(first, &[("m1", first)]), first);
        // One is of a version without keys; then all are that are heard.
        let old = [Unknown; 4];
        assert_eq!(known(old, &[("m1", old), ("m2", second)]), [None, m2, Unknown, None]);
        assert_eq!(known(old, &[("m1", old)]), [None; 4]);
    }

    #[test]
    fn without_managers_the_nodes_own_word_counts() {
        use TaskState::{Draining, Running};
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let node = |number: u8| Node {
            name: format!("node{number}"),
            host: String::new(),
            addresses: vec![ip(&format!("192.0.2.{number}"))],
            agent: true,
            down: false,
            key: NodeKey::Unknown,
            ..Node::default()
        };
        let task = |name: &str, node: u8| Task {
            name: format!("web.{name}"),
            node: format!("node{node}"),
            addresses: vec![],
            overlay: None,
            state: Running,
            weight: 1,
            via: Via::Peer,
            finding: None,
        };
        let service = Service {
            name: "web".into(),
            tasks: vec![task("1.a", 1), task("2.b", 2), task("3.c", 2), task("4.d", 3)],
            ..Service::default()
        };
        let mut state = ClusterState {
            nodes: vec![node(1), node(2), node(3)],
            services: vec![service.into()],
            this: Some("node1".into()),
            ..ClusterState::default()
        };
        let gossip = r#"{"Peers": [{"IP": "192.0.2.1"}, {"IP": "192.0.2.2"}],
            "Services": {"web": {"Tasks": [{"Name": "web.2.b", "Info": null}]}}}"#;
        forget(&mut state, &serde_json::from_str(gossip).unwrap());
        let states: Vec<_> = state.services[0].tasks.iter().map(|task| task.state).collect();
        // Its own; told of; not told of any more; of a node that is not heard.
        assert_eq!(states, [Running, Running, Draining, Running]);
    }
}
