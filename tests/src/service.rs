//! Services of a real Swarm: made, waited for, and asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    agent::{self, json},
    netns::within,
    swarm::{CLIENT, CLIENT6, Node, PATIENCE, Swarm},
};

/// How often each task answered, having seen the client itself.
pub fn by_task(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        let (task, client) = answer.split_once(" saw ").unwrap_or_else(|| panic!("an answer: {answer:?}"));
        let client = client.trim_matches(['[', ']']).parse::<IpAddr>().expect("an address").to_canonical();
        assert!([IpAddr::from(CLIENT), CLIENT6.into()].contains(&client), "{answer:?}");
        *counts.entry(task).or_default() += 1;
    }
    counts
}

/// Waits until every node sends new connections to so many tasks, the very ones that Docker says are running.
pub fn serves(swarm: &Swarm, service: &str, tasks: usize) {
    for node in &swarm.nodes {
        let what = format!("{} serves the {tasks} tasks of {service} that Docker runs", node.name);
        within(PATIENCE, &what, || {
            let ours = offered(node, service);
            ours.len() == tasks && swarm.nodes.iter().find_map(|node| node.running(service)) == Some(ours)
        });
    }
}

/// How often a SYN that was sent again went to the next task: a task may still remember a connection that the client's
/// port had with it through another node, and not take the next one at once.
pub fn failovers(node: &Node, service: &str) -> u64 {
    let document = json(&node.netns, &["service", "ps", service]);
    let tasks = document["tasks"].as_array().cloned().unwrap_or_default();
    tasks.iter().map(|task| task["failovers"].as_u64().expect("a number")).sum()
}

/// Asks through a node in whole turns: each task exactly once a turn. Asks again if Swarm changed the tasks meanwhile, or
/// a SYN was lost; three times at most where a task was passed over, because it knows the client's port through another node.
pub fn rotates(swarm: &Swarm, node: &Node, port: u16, tasks: usize) {
    let service = |node: &Node| {
        let services =
            json(&node.netns, &["service", "ls"])["services"].as_array().cloned().unwrap_or_default();
        let wanted = format!("*:{port}->");
        let has = |service: &serde_json::Value| {
            let ports = service["ports"].as_array().cloned().unwrap_or_default();
            ports.iter().any(|port| port.as_str().is_some_and(|port| port.starts_with(&wanted)))
        };
        let service = services.into_iter().find(has).expect("a service on this port");
        service["name"].as_str().expect("a name").to_owned()
    };
    let service = service(node);
    let mut passed_over = 0;
    within(PATIENCE, &format!("{} keeps its tasks for two turns", node.name), || {
        let before = (offered(node, &service), failovers(node, &service));
        let answers = swarm.ask_often(node, port, 2 * tasks);
        if before.0.len() != tasks || (offered(node, &service), failovers(node, &service)) != before {
            return false;
        }
        let counts = by_task(&answers);
        assert_eq!(counts.len(), tasks, "through {}: {counts:?}", node.name);
        let even = counts.values().all(|count| *count == 2);
        passed_over += u8::from(!even);
        assert!(passed_over <= 3, "through {}: {counts:?}", node.name);
        even
    });
}

/// `docker service create` of replicas that do not take long to stop, as `docker` would be called for it.
pub fn create(manager: &Node, name: &str, replicas: u8, port: &str, options: &[&str], command: &[&str]) {
    let replicas = replicas.to_string();
    let start = ["service", "create", "-d", "--name", name, "--replicas", &replicas, "-p", port];
    let stop = ["--stop-grace-period", "2s", "--restart-delay", "100ms"];
    manager.docker(&[&start[..], &stop, options, &["web"], command].concat());
}

/// Which of a service's tasks an agent sends new connections to.
pub fn offered(node: &Node, service: &str) -> BTreeSet<String> {
    agent::offered(&node.netns, service)
}
