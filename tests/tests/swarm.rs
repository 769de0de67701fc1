//! The agent against a real Docker Swarm. This kernel may have no IPVS, so that what answers on a published port is ours.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use lb_tests::{
    agent::{active_tasks, json, text},
    netns::within,
    swarm::{CLIENT, Node, PATIENCE, Swarm},
};

/// How often each task answered, having seen the client itself.
fn by_task(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        let (task, client) = answer.split_once(" saw ").unwrap_or_else(|| panic!("an answer: {answer:?}"));
        let client = client.trim_matches(['[', ']']).parse::<IpAddr>().expect("an address").to_canonical();
        assert_eq!(client, IpAddr::from(CLIENT), "{answer:?}");
        *counts.entry(task).or_default() += 1;
    }
    counts
}

/// Waits until every node sends new flows to so many tasks, all of which Docker says are running.
fn serves(swarm: &Swarm, service: &str, tasks: u64) {
    for node in &swarm.nodes {
        within(PATIENCE, &format!("{} serves {tasks} tasks of {service}", node.name), || {
            active_tasks(&node.netns, service) == tasks
        });
    }
}

/// Asks through a node in whole turns: each task exactly once a turn.
fn rotates(swarm: &Swarm, node: &Node, port: u16, tasks: usize) {
    let answers = swarm.ask_often(node, port, 2 * tasks);
    let counts = by_task(&answers);
    assert_eq!(counts.len(), tasks, "through {}: {counts:?}", node.name);
    assert!(counts.values().all(|count| *count == 2), "through {}: {counts:?}", node.name);
}

#[test]
fn the_walk_through() {
    let swarm = Swarm::machines(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    // Attached before there is a swarm, with nothing but the interface to go by.
    let _agents = swarm.attach();
    within(PATIENCE, "an agent says that there is no swarm yet", || {
        json(&first.netns, &["status"])["source"] == "docker, outside a swarm"
    });
    first.init();
    second.join(first, "worker");
    third.join(first, "worker");
    let source =
        |node: &Node| json(&node.netns, &["status"])["source"].as_str().unwrap_or_default().to_owned();
    for (node, role) in [(first, "docker manager"), (second, "docker worker"), (third, "docker worker")] {
        within(PATIENCE, "each agent knows its part", || source(node) == role);
    }
    first.docker(&["node", "promote", "node2"]);
    within(PATIENCE, "the promoted node's agent follows", || source(second) == "docker manager");
    assert_eq!(first.docker(&["node", "ls", "-q"]).lines().count(), 3);

    let create = ["service", "create", "-d", "--name", "web", "--replicas", "5", "-p", "80:8080", "web"];
    first.docker(&create);
    serves(&swarm, "web", 5);
    for node in &swarm.nodes {
        rotates(&swarm, node, 80, 5);
    }
    // Ours beside Docker's.
    let listed = text(&third.netns, &["service", "ls"]);
    assert!(
        listed
            .lines()
            .any(|line| line.starts_with("web ") && line.contains("5/5") && line.contains("*:80->8080/tcp")),
        "{listed}"
    );
    let theirs = first.docker(&["service", "ls", "--format", "{{.Name}} {{.Replicas}} {{.Ports}}"]);
    assert_eq!(theirs, "web 5/5 *:80->8080/tcp");
    let mut ours: Vec<String> = json(&second.netns, &["service", "ps", "web"])["tasks"]
        .as_array()
        .expect("tasks")
        .iter()
        .map(|task| task["node"].as_str().expect("a node").to_owned())
        .collect();
    let mut running = first.running("web");
    ours.sort();
    running.sort();
    assert_eq!(ours, running);
    assert_eq!(json(&third.netns, &["node", "ls"])["nodes"].as_array().expect("nodes").len(), 3);

    for tasks in [2, 7] {
        first.docker(&["service", "scale", "-d", &format!("web={tasks}")]);
        serves(&swarm, "web", tasks);
        for node in &swarm.nodes {
            rotates(&swarm, node, 80, tasks as usize);
        }
    }
    first.docker(&["service", "update", "-d", "--publish-rm", "80", "--publish-add", "81:8080", "web"]);
    within(PATIENCE, "the new port is served", || {
        swarm.nodes.iter().all(|node| swarm.ask(node, 81).is_ok()) && first.running("web").len() == 7
    });
    serves(&swarm, "web", 7);
    rotates(&swarm, third, 81, 7);
    assert!(swarm.ask(second, 80).is_err());
    first.docker(&["service", "rm", "web"]);
    within(PATIENCE, "the service is gone everywhere", || {
        swarm.nodes.iter().all(|node| {
            json(&node.netns, &["service", "ls"])["services"].as_array().is_some_and(Vec::is_empty)
        })
    });
    within(Duration::from_secs(20), "its port is closed", || swarm.ask(first, 81).is_err());
}
