//! What each agent knows of its own node by itself, and how that completes what the managers know of the cluster.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    check::Finding,
    cluster::{ClusterState, Service, TaskState},
    tunnel_key::PublicKey,
};

/// As many addresses of a node are taken from its agent.
pub const MOST_ADDRESSES: usize = 16;
/// As many tasks of a node are.
const MOST_TASKS: usize = 10_000;
/// The longest name of a task: Docker's is a service's of 63 characters, a slot or node, and an identifier.
const LONGEST_NAME: usize = 256;

/// What an agent knows of its node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Addresses of its uplinks, the most usual first.
    pub addresses: Vec<IpAddr>,
    /// The node's running tasks, by name.
    pub tasks: BTreeMap<String, TaskFacts>,
    /// Whether those are all: false while the node's Docker does not answer, and the last ones stand.
    pub complete: bool,
    /// What its packets in the tunnel are known by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PublicKey>,
    /// Whether it asks tasks by checks of its own, so that those of which nothing is found have not passed. Older agents do not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checks: bool,
}

/// Why what an agent says is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FactsError {
    /// More than any node has.
    #[error("it tells of {0} tasks, more than the {MOST_TASKS} that are taken of a node")]
    Tasks(usize),
    /// A name that is none.
    #[error("it tells of a task whose name has {0} bytes, more than {LONGEST_NAME}")]
    Name(usize),
}

impl NodeFacts {
    /// Whether they are of a size that facts of a node can have.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self) -> Result<(), FactsError> {
        if self.tasks.len() > MOST_TASKS {
            return Err(FactsError::Tasks(self.tasks.len()));
        }
        match self.tasks.keys().map(String::len).max() {
            Some(longest) if longest > LONGEST_NAME => Err(FactsError::Name(longest)),
            _ => Ok(()),
        }
    }
}

/// What an agent knows of a task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskFacts {
    /// Where it is reached on its node.
    pub addresses: Vec<IpAddr>,
    /// Whether it should get no new connections: its health check fails, or it is paused. The protocol has another name for it.
    #[serde(rename = "ailing")]
    pub unhealthy: bool,
    /// What was found by a check of our own.
    #[serde(flatten)]
    pub finding: Finding,
}

/// What an agent said, and whether it still says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// What it said last.
    pub facts: Arc<NodeFacts>,
    /// Whether it can be heard now.
    pub now: bool,
}

/// Completes the cluster by what agents know of their nodes, and remembers what it made of each service, so that a report of
/// one node costs what that node has to do with.
#[derive(Default)]
pub struct Completion {
    /// What agents said when it was last asked, by name of the node.
    facts: BTreeMap<String, NodeReport>,
    /// By name: a service as the managers have it, and what became of it.
    services: HashMap<String, [Arc<Service>; 2]>,
}

impl Completion {
    /// Completes the tasks by what agents know, by the nodes' names in the cluster.
    ///
    /// A task that its own node no longer runs is gone, whatever the managers think; one that fails its health check
    /// there gets no new connections. Without word from its node a task stands as the managers have it.
    pub fn complete(&mut self, cluster: &mut ClusterState, facts: BTreeMap<String, NodeReport>) {
        let changed: HashSet<&str> = {
            let known = self.facts.keys().chain(facts.keys().filter(|name| !self.facts.contains_key(*name)));
            known.filter(|name| self.facts.get(*name) != facts.get(*name)).map(String::as_str).collect()
        };
        let concerned = |service: &Service| {
            !changed.is_empty() && service.tasks.iter().any(|task| changed.contains(task.node.as_str()))
        };
        let mut services = HashMap::with_capacity(cluster.services.len());
        for service in &mut cluster.services {
            let (name, known) = match self.services.remove_entry(&service.name) {
                Some((name, known)) => (name, Some(known)),
                None => (service.name.clone(), None),
            };
            let completed = match known {
                Some([before, completed]) if Arc::ptr_eq(&before, service) && !concerned(service) => {
                    completed
                }
                known => {
                    let new = complete(service, &facts);
                    // What comes to the same is the same.
                    known.map(|[_, completed]| completed).filter(|known| *known == new).unwrap_or(new)
                }
            };
            let before = std::mem::replace(service, completed.clone());
            services.insert(name, [before, completed]);
        }
        (self.services, self.facts) = (services, facts);
    }
}

/// A service, its tasks as their nodes know them.
fn complete(service: &Arc<Service>, facts: &BTreeMap<String, NodeReport>) -> Arc<Service> {
    let mut service = Arc::clone(service);
    if service.tasks.iter().all(|task| !facts.contains_key(&task.node)) {
        return service;
    }
    let family = service.family;
    Arc::make_mut(&mut service).tasks.retain_mut(|task| {
        let Some(report) = facts.get(&task.node) else {
            return true;
        };
        match report.facts.tasks.get(&task.name) {
            Some(known) => {
                // One of each family: each is a share of the connections.
                let told = family.choose(&known.addresses);
                if !told.is_empty() {
                    task.addresses = told;
                }
                if known.unhealthy && report.now && task.state == TaskState::Running {
                    task.state = TaskState::Draining;
                }
                true
            }
            None => !(report.now && report.facts.complete) || task.state == TaskState::Starting,
        }
    });
    let asks = service.health.is_some();
    for task in &mut Arc::make_mut(&mut service).tasks {
        let report = facts.get(&task.node).filter(|report| report.facts.checks);
        let known = report.and_then(|report| Some((report.now, report.facts.tasks.get(&task.name)?)));
        // Of one whose agent is not heard it stands that it failed.
        let found = known.filter(|(now, known)| *now || known.finding.passes == Some(false));
        // What was told before is by another agent's word.
        let found = found.map(|(_, known)| known.finding.clone().checked()).or(task.finding.take());
        // Where nobody asks, nothing that is found is no reason to wait.
        task.finding = found.filter(|finding| asks || finding.speaks_against());
    }
    service
}

/// The name of a task: SERVICE.SLOT or SERVICE.NODE as Docker has it, and as much of its identifier as Docker shows, because
/// an update has two tasks in a slot.
pub fn task_name(docker: &str) -> String {
    const SHOWN: usize = 12;
    match docker.rsplit_once('.') {
        Some((name, id)) => format!("{name}.{}", id.get(..SHOWN).unwrap_or(id)),
        None => docker.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::CheckSpec;
    use crate::cluster::{Node, Service, Task, Via};

    fn task(name: &str, state: TaskState) -> Task {
        Task {
            name: name.into(),
            node: "node1".into(),
            addresses: vec!["10.0.0.7".parse().unwrap()],
            overlay: Some("10.0.0.7".parse().unwrap()),
            state,
            weight: 1,
            via: Via::Peer,
            finding: None,
        }
    }

    fn cluster(tasks: Vec<Task>) -> ClusterState {
        let addresses = vec!["192.0.2.9".parse().unwrap()];
        let node = Node {
            name: "node1".into(),
            host: String::new(),
            addresses,
            agent: true,
            down: false,
            key: crate::tunnel_key::NodeKey::Unknown,
            ..Node::default()
        };
        let service = Service { name: "web".into(), tasks, ..Service::default() };
        ClusterState { nodes: vec![node], services: vec![service.into()], ..ClusterState::default() }
    }

    fn reports(tasks: &[(&str, bool)], complete: bool, now: bool) -> BTreeMap<String, NodeReport> {
        let known = |unhealthy| TaskFacts {
            addresses: vec!["172.18.0.3".parse().unwrap()],
            unhealthy,
            finding: Finding::default(),
        };
        let tasks = tasks.iter().map(|(name, unhealthy)| ((*name).to_owned(), known(*unhealthy))).collect();
        let facts = Arc::new(NodeFacts { tasks, complete, ..NodeFacts::default() });
        BTreeMap::from([("node1".to_owned(), NodeReport { facts, now })])
    }

    fn states(mut cluster: ClusterState, facts: &BTreeMap<String, NodeReport>) -> Vec<(String, TaskState)> {
        Completion::default().complete(&mut cluster, facts.clone());
        cluster.services[0].tasks.iter().map(|task| (task.name.clone(), task.state)).collect()
    }

    #[test]
    fn what_a_node_says_of_itself_comes_first() {
        let mut state = cluster(vec![task("web.1.a", TaskState::Running)]);
        Completion::default().complete(&mut state, reports(&[("web.1.a", false)], true, true));
        let task = &state.services[0].tasks[0];
        assert_eq!(task.addresses, ["172.18.0.3".parse::<IpAddr>().unwrap()]);
        assert_eq!(task.cluster_address(), "10.0.0.7".parse().ok());
    }

    #[test]
    fn a_task_that_its_node_does_not_run_is_gone_and_an_unhealthy_one_drains() {
        use TaskState::{Draining, Running, Starting};
        let tasks = || vec![task("a", Running), task("b", Running), task("c", Starting), task("d", Draining)];
        let all: Vec<_> = [("a", Running), ("b", Running), ("c", Starting), ("d", Draining)]
            .map(|(name, state)| (name.to_owned(), state))
            .into();
        assert_eq!(states(cluster(tasks()), &BTreeMap::new()), all);
        // Docker does not answer there, or the agent is not heard: the managers' word stands.
        assert_eq!(states(cluster(tasks()), &reports(&[], false, true)), all);
        assert_eq!(states(cluster(tasks()), &reports(&[("a", true)], true, false)), all);
        let left = vec![("a".to_owned(), Draining), ("c".to_owned(), Starting)];
        assert_eq!(states(cluster(tasks()), &reports(&[("a", true)], true, true)), left);
    }

    #[test]
    fn what_a_node_finds_of_its_tasks_is_told_where_its_agent_asks_them() {
        let found = |asks: bool, now: bool, findings: &[(&str, Option<bool>)]| {
            let mut state = cluster(vec![task("a", TaskState::Running), task("b", TaskState::Running)]);
            state.service_mut(0).health =
                CheckSpec { kind: "tcp".into(), port: Some(80), ..CheckSpec::default() }.check(None).unwrap();
            let mut reports = reports(&[("a", false), ("b", false)], true, now);
            let report = reports.get_mut("node1").unwrap();
            let facts = Arc::make_mut(&mut report.facts);
            facts.checks = asks;
            for (name, passes) in findings {
                facts.tasks.get_mut(*name).unwrap().finding.passes = *passes;
            }
            // As it is told.
            let told = serde_json::to_string(report.facts.as_ref()).unwrap();
            report.facts = Arc::new(serde_json::from_str(&told).unwrap());
            Completion::default().complete(&mut state, reports);
            let tasks = state.services[0].tasks.iter();
            tasks.map(|task| task.finding.as_ref().map(|finding| finding.passes)).collect::<Vec<_>>()
        };
        let all = [("a", Some(true)), ("b", Some(false))];
        assert_eq!(found(true, true, &all), [Some(Some(true)), Some(Some(false))]);
        assert_eq!(found(true, true, &[("a", Some(true))]), [Some(Some(true)), Some(None)]);
        // An older agent asks nobody, and of one that is not heard only that a task failed stands.
        assert_eq!(found(false, true, &[]), [None, None]);
        assert_eq!(found(true, false, &all), [None, Some(Some(false))]);
    }

    /// What is remembered changes nothing, and what nobody spoke of is not made anew.
    #[test]
    fn a_report_of_one_node_leaves_the_other_services_what_they_were() {
        let mut managers = cluster(vec![task("a", TaskState::Running)]);
        let other = Task { node: "node2".into(), ..task("b", TaskState::Running) };
        managers.services.push(Arc::new(Service {
            name: "other".into(),
            tasks: vec![other],
            ..Service::clone(&managers.services[0])
        }));
        let mut completion = Completion::default();
        let mut before: Option<ClusterState> = None;
        let all = [
            reports(&[("a", false)], true, true),
            reports(&[("a", true)], true, true),
            reports(&[], true, true),
        ];
        for facts in all {
            let (mut state, mut fresh) = (managers.clone(), managers.clone());
            completion.complete(&mut state, facts.clone());
            Completion::default().complete(&mut fresh, facts.clone());
            assert_eq!(state, fresh);
            if let Some(before) = before {
                assert!(Arc::ptr_eq(&state.services[1], &before.services[1]));
                assert_ne!(state.services[0], before.services[0]);
            }
            let mut again = managers.clone();
            completion.complete(&mut again, facts);
            assert!(Arc::ptr_eq(&state.services[0], &again.services[0]));
            before = Some(state);
        }
    }

    #[test]
    fn facts_are_of_a_size_that_a_node_s_can_have() {
        let facts = |tasks: usize, name: usize| NodeFacts {
            tasks: (0..tasks).map(|task| (format!("{task:0name$}"), TaskFacts::default())).collect(),
            ..NodeFacts::default()
        };
        assert_eq!(facts(MOST_TASKS, LONGEST_NAME).check(), Ok(()));
        assert_eq!(facts(MOST_TASKS + 1, 5).check(), Err(FactsError::Tasks(MOST_TASKS + 1)));
        assert_eq!(facts(1, LONGEST_NAME + 1).check(), Err(FactsError::Name(LONGEST_NAME + 1)));
    }

    #[test]
    fn names_of_tasks_are_short_and_the_same_from_both_sides() {
        assert_eq!(task_name("web.1.vnlsocyrrcv63iripyh022o9f"), "web.1.vnlsocyrrcv6");
        assert_eq!(task_name("web.1.x"), "web.1.x");
        assert_eq!(task_name("web"), "web");
    }
}
