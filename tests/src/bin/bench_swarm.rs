//! How long a change of a real swarm takes to reach every node's datapath. `cargo xtask bench --swarm` builds and runs it.
//!
//! Times are counted from the call of `docker service scale`, and from the moment that Docker itself gives: when a new task
//! ran, when a task was told to go.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use clap::Parser;
use lb_tests::{
    agent::offered,
    swarm::{Node, PATIENCE, Swarm},
};

/// From a change in a three-node swarm to all nodes sending new connections by it.
#[derive(Parser)]
struct Arguments {
    /// Times that a task is added and taken away
    #[arg(long, default_value_t = 20)]
    rounds: usize,
}

fn main() {
    let rounds = Arguments::parse().rounds.max(1);
    let swarm = Swarm::new(3);
    let _agents = swarm.attach();
    let manager = &swarm.nodes[0];
    let create = ["service", "create", "-d", "--name", "web", "--replicas", "3", "-p", "80:8080"];
    manager.docker(&[&create[..], &["--stop-grace-period", "1s", "web"]].concat());
    reaches(&swarm, 3);
    let (mut up, mut known, mut down) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let before = manager.running("web").expect("a manager");
        let start = Instant::now();
        manager.docker(&["service", "scale", "-d", "web=4"]);
        reaches(&swarm, 4);
        up.push(start.elapsed());
        let now = SystemTime::now();
        let after = manager.running("web").expect("a manager");
        let new = after.difference(&before).next().expect("a new task").clone();
        known.push(now.duration_since(said(manager, &new, "{{.Status.Timestamp}}")).unwrap_or_default());

        let start = SystemTime::now();
        manager.docker(&["service", "scale", "-d", "web=3"]);
        let told = said(manager, "web", "{{.UpdatedAt}}").max(start);
        reaches(&swarm, 3);
        down.push(SystemTime::now().duration_since(told).unwrap_or_default());
    }
    println!("{rounds} rounds on three nodes{:>35} {:>10}", "median", "worst");
    show("`docker service scale` up, to the new task on every node", &mut up);
    show("of that, since Docker called the new task running", &mut known);
    show("`docker service scale` down, to no new connection from any node", &mut down);
}

/// Waits until every node sends new connections to so many tasks.
fn reaches(swarm: &Swarm, tasks: usize) {
    let deadline = Instant::now() + PATIENCE;
    let served = |node: &Node| offered(&node.netns, "web");
    loop {
        let all: Vec<BTreeSet<String>> = swarm.nodes.iter().map(served).collect();
        if all.iter().all(|names| names.len() == tasks && *names == all[0]) {
            return;
        }
        assert!(Instant::now() < deadline, "not every node serves {tasks} tasks: {all:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A moment that Docker gives for a service, or for a task by the agent's name for it.
fn said(manager: &Node, what: &str, format: &str) -> SystemTime {
    let id = what.rsplit('.').next().unwrap_or(what);
    let text = manager.docker(&[
        "inspect",
        "--type",
        if id == what { "service" } else { "task" },
        "--format",
        format,
        id,
    ]);
    // Go's way: 2026-11-25 13:22:06.414497577 +0000 UTC
    let mut words = text.split_whitespace();
    let (day, time) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    humantime::parse_rfc3339(&format!("{day}T{time}Z")).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

fn show(what: &str, times: &mut [Duration]) {
    times.sort();
    let (middle, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{what:<58} {:>6} ms {:>6} ms", middle.as_millis(), worst.as_millis());
}
