//! What a manager's agent takes in large swarms, against a stand-in for the Engine API. `cargo xtask bench --scale` builds
//! and runs it.

use std::{
    fs,
    time::{Duration, Instant},
};

use clap::Parser;
use lb_tests::{
    agent::Agent,
    engine::{Engine, Size},
    netns::{Netns, within},
};

/// Memory, processor time and delays of a manager's agent in swarms of several sizes.
#[derive(Parser)]
struct Arguments {
    /// Tasks of each swarm; services and nodes are a tenth and a hundredth of them
    #[arg(default_values_t = [1_000, 10_000, 100_000])]
    tasks: Vec<usize>,
    /// Seconds during which nothing changes and processor time is counted
    #[arg(long, default_value_t = 20)]
    idle: u64,
}

/// A list of 100,000 tasks takes its time on a small machine.
const PATIENCE: Duration = Duration::from_secs(180);

fn main() {
    let arguments = Arguments::parse();
    println!(
        "{:>8} {:>9} {:>6} {:>11} {:>10} {:>9} {:>11} {:>10} {:>12}",
        "tasks",
        "services",
        "nodes",
        "lists MB/s",
        "first (s)",
        "RSS (MB)",
        "most (MB)",
        "idle (%)",
        "change (s)"
    );
    for tasks in arguments.tasks {
        let size = Size { nodes: (tasks / 100).max(1), services: (tasks / 10).max(1), tasks };
        measure(size, Duration::from_secs(arguments.idle));
    }
}

fn measure(size: Size, idle: Duration) {
    let folder = tempfile::tempdir().expect("make a folder");
    let (netns, beyond) = (Netns::new("manager"), Netns::new("beyond"));
    netns.ip(&format!("link add eth1 type veth peer name eth0 netns {}", beyond.name()));
    netns.ip("addr add 192.0.2.101/24 dev eth1");
    netns.ip("link set eth1 up");
    beyond.ip("link set eth0 up");
    // The other nodes are behind a router that takes everything.
    netns.ip("neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev eth1 nud permanent");
    netns.ip("route add default via 192.0.2.1");
    let engine = Engine::serve(&folder.path().join("docker.sock"), size);
    let start = Instant::now();
    let host = engine.docker_host();
    let room = ["--max-backends", "262144", "--max-slots", "524288", "--max-listeners", "65536"];
    let agent = Agent::start(&netns, folder.path(), &room, &[("DOCKER_HOST", &host)]);
    // The lists are read before the interface is served, unless Docker is slow: then the tables change once more.
    let first = start.elapsed();
    settle(&agent);
    let (_, before) = engine.traffic();
    let busy = cpu(&agent);
    std::thread::sleep(idle);
    let busy = cpu(&agent) - busy;
    let (_, after) = engine.traffic();
    let changes = || agent.log().matches(": applied ").count();
    let known = changes();
    let start = Instant::now();
    engine.set_first_runs(false);
    within(PATIENCE, "the change is in the tables", || changes() > known);
    let change = start.elapsed();
    println!(
        "{:>8} {:>9} {:>6} {:>11.2} {:>10.1} {:>9} {:>11} {:>10.1} {:>12.2}",
        size.tasks,
        size.services,
        size.nodes,
        (after - before) as f64 / 1e6 / idle.as_secs_f64(),
        first.as_secs_f64(),
        memory(&agent, "VmRSS") / 1_000,
        memory(&agent, "VmHWM") / 1_000,
        busy.as_secs_f64() / idle.as_secs_f64() * 100.0,
        change.as_secs_f64(),
    );
}

/// Waits until the tables do not change any more.
fn settle(agent: &Agent<'_>) {
    let changes = || agent.log().matches(": applied ").count();
    let (mut known, mut since) = (changes(), Instant::now());
    within(PATIENCE, "the tables settle", || {
        let now = changes();
        if now != known {
            (known, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(10)
    });
}

/// A line of the process's status, in kB.
fn memory(agent: &Agent<'_>, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("the agent's status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{name} of {status}"))
}

/// Processor time so far.
fn cpu(agent: &Agent<'_>) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid())).expect("the agent's times");
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |index: usize| fields[index].parse::<u64>().expect("ticks");
    // USER_HZ is 100 on every machine that runs this.
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}
