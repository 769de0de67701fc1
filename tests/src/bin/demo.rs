//! The Swarm walk-through on a cluster of network namespaces: three nodes, an agent on each, tasks that are
//! namespaces with an HTTP server. `cargo xtask demo` builds and runs it.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use clap::Parser;
use lb_tests::{
    agent::{Agent, active_tasks, json, program, text},
    cluster::{CLIENT4, CLIENT6, Cluster, Reach, Task},
    netns::eventually,
    traffic::{Load, requests, tally},
};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A three-node cluster in network namespaces, and the Swarm walk-through on it.
#[derive(Parser)]
struct Arguments {
    /// Leave the cluster up until Ctrl-C, and say how to enter it
    #[arg(long)]
    keep: bool,
}

static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: std::ffi::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

/// Ctrl-C ends the demo at its next step, so that everything is taken down by the same drops as ever.
fn watch_for_interrupts() {
    let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }.expect("watch for signals");
    }
}

fn main() {
    let arguments = Arguments::parse();
    watch_for_interrupts();
    say("Three machines on a lan, and a client; each machine has a bridge with tasks behind it.");
    let mut cluster = Cluster::new(3);
    cluster.reach = Reach { peers: true, ..Reach::default() };
    cluster.receive_xdp();
    for slot in 1..=7 {
        cluster.add_nginx(&format!("web.{slot}"), (slot - 1) % 3);
    }
    for node in &cluster.nodes {
        println!("  {:<7} {}  {}", node.name, node.v4(), node.v6());
    }
    println!("  client  {CLIENT4}");
    let file = scale(&cluster, &[(5, "running")]);
    say("An agent on each machine: `sudo lb-userspace attach --iface eth1 --cluster cluster.toml`");
    let agents: Vec<Agent<'_>> =
        cluster.nodes.iter().map(|node| Agent::attach(&node.netns, cluster.folder(), &file, &[])).collect();
    wait(&cluster, 5);
    for line in agents[0].log().lines().filter(|line| line.contains("served by")) {
        println!("  {line}");
    }
    let steps: [fn(&Cluster); 4] = [look, rotate, scale_under_load, remove];
    for step in steps {
        if STOPPED.load(Ordering::Relaxed) {
            break;
        }
        step(&cluster);
    }
    if arguments.keep && !STOPPED.load(Ordering::Relaxed) {
        keep(&cluster);
    }
    say("Taking everything down.");
    drop(agents);
}

fn say(text: &str) {
    println!("\n# {text}");
}

/// Shows and runs a verb of the agent on the first node.
fn show(cluster: &Cluster, arguments: &[&str]) {
    println!("node1$ lb-userspace {}", arguments.join(" "));
    print!("{}", text(&cluster.nodes[0].netns, arguments));
}

/// Describes the cluster with the first so many tasks in one state, the next so many in another.
fn scale(cluster: &Cluster, groups: &[(usize, &str)]) -> std::path::PathBuf {
    let mut states = groups.iter().flat_map(|(count, state)| std::iter::repeat_n(*state, *count));
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().zip(states.by_ref()).collect();
    cluster.write(&cluster.file("\"80:8080\"", &tasks))
}

/// Waits until every node offers so many tasks.
fn wait(cluster: &Cluster, tasks: u64) {
    for node in &cluster.nodes {
        eventually("every node offers the tasks", || active_tasks(&node.netns, "web") == tasks);
    }
}

fn look(cluster: &Cluster) {
    say("Five tasks behind port 80, wherever they run.");
    show(cluster, &["node", "ls"]);
    show(cluster, &["service", "ls"]);
    show(cluster, &["service", "ps", "web"]);
}

fn rotate(cluster: &Cluster) {
    say(
        "Any node's address answers; ten requests rotate over five tasks, two each, and every task sees the client.",
    );
    for (node, address) in
        [(0, cluster.addresses(0)[0]), (2, cluster.addresses(2)[0]), (1, cluster.addresses(1)[1])]
    {
        let shown = if address.is_ipv4() { address.to_string() } else { format!("[{address}]") };
        println!("client$ for i in $(seq 10); do curl http://{shown}/; done    # node{}", node + 1);
        let answers = requests(&cluster.client, address, 10);
        for answer in &answers {
            println!("  {answer}");
        }
        let client = if address.is_ipv4() { CLIENT4.to_string() } else { CLIENT6.to_string() };
        assert!(answers.iter().all(|answer| answer.ends_with(&format!("saw {client}"))), "{answers:?}");
        assert!(tally(&answers).len() == 5 && tally(&answers).values().all(|count| *count == 2));
    }
}

fn scale_under_load(cluster: &Cluster) {
    say("Scale to 2 and to 7 while four clients send requests; what leaves is drained first.");
    let load = Load::start(&cluster.client, cluster.nodes[0].v4().into(), 4, u64::MAX);
    let more = |requests: u64| {
        let goal = load.done() + requests;
        eventually("requests go on", || load.done() >= goal);
    };
    more(500);
    for (before, after) in [(5, 2), (2, 7)] {
        println!("  scale {before} -> {after}");
        if after < before {
            scale(cluster, &[(after, "running"), (before - after, "draining")]);
            wait(cluster, after as u64);
            more(100);
        }
        scale(cluster, &[(after, "running")]);
        wait(cluster, after as u64);
        more(500);
        show(cluster, &["service", "ls"]);
    }
    let done = load.done();
    let failed = load.stop();
    println!("  {done} requests, {} failed", failed.len());
    for error in failed.iter().take(5) {
        println!("    {error}");
    }
    for node in &cluster.nodes {
        println!("{}$ lb-userspace stats", node.name);
        let outcomes = json(&node.netns, &["stats"])["outcomes"].as_object().cloned().unwrap_or_default();
        for (name, packets) in outcomes.iter().filter(|(_, packets)| packets.as_u64() > Some(0)) {
            println!("  {name:<20} {packets}");
        }
    }
}

fn remove(cluster: &Cluster) {
    say("Remove the service: the port is the host's again.");
    let text = cluster.file("", &[]);
    let nodes = text.split("[[service]]").next().unwrap_or_default();
    cluster.write(nodes);
    for node in &cluster.nodes {
        eventually("the service is gone", || {
            json(&node.netns, &["service", "ls"])["services"] == serde_json::json!([])
        });
    }
    show(cluster, &["service", "ls"]);
    let address = cluster.addresses(0)[0].to_string();
    println!("client$ curl http://{address}/");
    let output =
        cluster.client.command("curl").args(["-sS", "-m", "3", &address]).output().expect("start curl");
    print!("  {}", String::from_utf8_lossy(&output.stderr));
}

fn keep(cluster: &Cluster) {
    let file = scale(cluster, &[(5, "running")]);
    wait(cluster, 5);
    say("The cluster stays up until Ctrl-C. To play with it, in another terminal:");
    let enter = |netns: &lb_tests::netns::Netns, what: &str| {
        format!("sudo nsenter --net=/run/netns/{} {what}", netns.name())
    };
    println!("  {}", enter(&cluster.client, &format!("curl http://{}/", cluster.addresses(0)[0])));
    println!("  {}", enter(&cluster.nodes[0].netns, &shown(&program(), "service ps web")));
    println!("  {}", enter(&cluster.nodes[0].netns, &shown(&program(), "stats --watch")));
    println!("  edit {} and watch it being followed", file.display());
    while !STOPPED.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(200));
    }
}

fn shown(program: &Path, arguments: &str) -> String {
    lb_tests::agent::shown(Command::new(program).args(arguments.split(' ')))
}
