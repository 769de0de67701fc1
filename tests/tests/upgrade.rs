//! A swarm while its agents are replaced by those of this commit, node by node, and back.

use std::{collections::BTreeSet, path::Path};

use lb_tests::{
    agent::{self, Agent, json},
    before::program as program_before,
    netns::within,
    swarm::{Node, PATIENCE, Swarm},
};
use nix::sys::signal::Signal;

/// Replaces a node's agent. Its tables may be of another version, and be made anew.
fn replace<'a>(swarm: &Swarm, agent: Agent<'_>, node: &'a Node, program: &Path) -> Agent<'a> {
    agent.stop(Signal::SIGTERM);
    swarm.attach_program(program, node, &["--replace-state"])
}

/// Every node gives each of the tasks to clients, and fails none.
fn serves(swarm: &Swarm, tasks: usize) {
    for node in &swarm.nodes {
        within(PATIENCE, &format!("{} reaches all {tasks} tasks", node.name), || {
            let answers: BTreeSet<_> = (0..2 * tasks).filter_map(|_| swarm.ask(node, 80).ok()).collect();
            answers.len() == tasks
        });
    }
    for node in &swarm.nodes {
        // Fails at the first request that does.
        let answers = swarm.ask_often(node, 80, 10 * tasks);
        assert_eq!(answers.into_iter().collect::<BTreeSet<_>>().len(), tasks, "{}", node.name);
    }
}

/// What a node with an agent of this commit says of the others' keys, by their names.
fn keys(node: &Node) -> Vec<(String, String)> {
    let nodes = json(&node.netns, &["node", "ls"])["nodes"].as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    nodes.iter().filter_map(|node| Some((text(&node["name"])?, text(&node["key"])?))).collect()
}

fn say(node: &Node, wanted: &[(&str, &str)]) {
    within(PATIENCE, &format!("{} says of the others' keys: {wanted:?}", node.name), || {
        let keys = keys(node);
        keys.iter().map(|(name, key)| (name.as_str(), key.as_str())).collect::<Vec<_>>() == wanted
    });
}

/// Agents that know each other's keys use them; those that do not are spoken to as before.
#[test]
fn old_and_new_agents_serve_one_swarm_together() {
    let swarm = Swarm::new(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let (old, new) = (program_before(), agent::program());
    let attach = |node| swarm.attach_program(&old, node, &[]);
    let (one, two, three) = (attach(first), attach(second), attach(third));
    let create = ["service", "create", "-d", "--name", "web", "--mode", "global", "-p", "80:8080", "web"];
    first.docker(&create);
    serves(&swarm, 3);
    // Its manager's agent tells nobody's key.
    let three = replace(&swarm, three, third, &new);
    serves(&swarm, 3);
    let two = replace(&swarm, two, second, &new);
    serves(&swarm, 3);
    let one = replace(&swarm, one, first, &new);
    serves(&swarm, 3);
    say(first, &[("node2", "used"), ("node3", "used")]);
    say(second, &[("node1", "used"), ("node3", "used")]);
    // One goes back.
    let two = replace(&swarm, two, second, &old);
    serves(&swarm, 3);
    say(first, &[("node2", "none"), ("node3", "used")]);
    let two = replace(&swarm, two, second, &new);
    serves(&swarm, 3);
    say(first, &[("node2", "used"), ("node3", "used")]);
    // So does the one that tells the others of keys, and a worker after it.
    let one = replace(&swarm, one, first, &old);
    serves(&swarm, 3);
    let two = replace(&swarm, two, second, &old);
    serves(&swarm, 3);
    drop((one, two, three));
}
