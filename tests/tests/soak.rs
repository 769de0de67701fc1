//! Everything at once, for a while: tasks come and go, controllers are killed and change their mode, connections are given to tasks by
//! one scheduler and another, while clients ask through every node. No request may fail.
//!
//! `LB_SOAK_SECONDS` says how long (two minutes; less of it shortens other long tests too), `LB_SOAK_SEED` plays a run again.

use std::{
    collections::BTreeMap,
    env, process,
    time::{Duration, Instant},
};

use lb_tests::{
    agent::{Agent, json, offered},
    cluster::{Cluster, Node, Reach, Task},
    netns::{Netns, within},
    traffic::Load,
};
use lb_userspace::cluster::Scheduler;
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(60);
const TASKS: usize = 7;
/// So many tasks always run.
const LEAST: usize = 2;

/// A few numbers that look like chance and can be had again (xorshift, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is not a number")))
}

struct Soak<'a> {
    cluster: &'a Cluster,
    /// What the cluster file says of each task; nothing where it is not there.
    states: [Option<&'static str>; TASKS],
    scheduler: Scheduler,
    agents: Vec<Option<Agent<'a>>>,
    loads: Vec<Load>,
}

impl<'a> Soak<'a> {
    fn write(&self) {
        let there = self.cluster.tasks.iter().zip(&self.states);
        let tasks: Vec<(&Task, &str)> = there.filter_map(|(task, state)| Some((task, (*state)?))).collect();
        let setting = format!("scheduler = \"{}\"\nports =", self.scheduler.name());
        self.cluster.write(&self.cluster.file("\"80:8080\"", &tasks).replace("ports =", &setting));
    }

    /// Waits until every node sends new connections to exactly the tasks that run.
    fn settle(&self) {
        let running =
            self.cluster.tasks.iter().zip(&self.states).filter(|(_, state)| **state == Some("running"));
        let running = running.map(|(task, _)| task.name.clone()).collect();
        for node in &self.cluster.nodes {
            let what = format!("{} serves {running:?}", node.name);
            within(PATIENCE, &what, || offered(&node.netns, "web") == running);
        }
    }

    /// Waits until each client has made some more requests.
    fn go_on(&self) {
        for load in &self.loads {
            let more = load.done() + 20;
            within(PATIENCE, "requests are answered", || load.done() >= more);
        }
    }

    /// A task goes, in order, or comes.
    fn scale(&mut self, task: usize) {
        if self.states[task].is_none() {
            self.states[task] = Some("running");
        } else if self.states.iter().flatten().count() > LEAST {
            self.states[task] = Some("draining");
            self.write();
            self.settle();
            self.go_on();
            self.states[task] = None;
        }
        self.write();
        self.settle();
    }

    fn attach(&mut self, node: usize, mode: &str) {
        let path = self.cluster.folder().join("cluster.toml");
        let netns = &self.cluster.nodes[node].netns;
        self.agents[node] = Some(Agent::attach(netns, self.cluster.folder(), &path, &["--mode", mode]));
    }

    fn replace(&mut self, node: usize, signal: Signal, mode: &str) {
        if let Some(agent) = self.agents[node].take() {
            agent.stop(signal);
        }
        self.attach(node, mode);
        self.settle();
    }
}

#[test]
fn no_request_fails_whatever_happens() {
    let seed = number("LB_SOAK_SEED").unwrap_or(u64::from(process::id()) << 20 | 1);
    let length = Duration::from_secs(number("LB_SOAK_SECONDS").unwrap_or(120));
    println!("LB_SOAK_SEED={seed} LB_SOAK_SECONDS={}", length.as_secs());
    let mut cluster = Cluster::new(3);
    cluster.reach = Reach { peers: true, ..Reach::default() };
    cluster.receive_xdp();
    cluster.keep_connections_on_one_cpu();
    for slot in 0..TASKS {
        cluster.add_nginx(&format!("web.{}", slot + 1), slot % 3);
    }
    let mut soak = Soak {
        cluster: &cluster,
        states: [Some("running"); TASKS],
        scheduler: Scheduler::default(),
        agents: (0..3).map(|_| None).collect(),
        loads: Vec::new(),
    };
    soak.write();
    (0..3).for_each(|node| soak.attach(node, "native"));
    soak.settle();
    // A machine for each node: a task remembers a client's port for a minute, whichever node it used.
    let crowd: Vec<Netns> = (21..24)
        .map(|number| {
            let (v4, v6) = ([192, 0, 2, number], [0x2001, 0xdb8, 1, 0, 0, 0, 0, number.into()]);
            cluster.plug("crowd", v4.into(), v6.into())
        })
        .collect();
    let start = |(client, node): (&Netns, &Node)| Load::start(client, node.v4().into(), 1, u64::MAX);
    soak.loads = crowd.iter().zip(&cluster.nodes).map(start).collect();
    let (mut dice, begin, mut steps) = (Dice(seed), Instant::now(), [0_u32; 4]);
    let mut by_scheduler: BTreeMap<&str, u64> = BTreeMap::new();
    while begin.elapsed() < length {
        let done = |soak: &Soak<'_>| soak.loads.iter().map(Load::done).sum::<u64>();
        let (scheduler, before) = (soak.scheduler.name(), done(&soak));
        let (what, node) = (dice.below(4), dice.below(3));
        steps[what] += 1;
        match what {
            0 => soak.scale(dice.below(TASKS)),
            1 => soak.replace(node, Signal::SIGKILL, "native"),
            2 => soak.replace(node, Signal::SIGTERM, ["native", "tc"][dice.below(2)]),
            _ => {
                soak.scheduler = Scheduler::ALL[dice.below(Scheduler::ALL.len())];
                soak.write();
                soak.go_on();
            }
        }
        *by_scheduler.entry(scheduler).or_default() += done(&soak) - before;
        let failed: u64 = soak.loads.iter().map(Load::failed).sum();
        assert_eq!(failed, 0, "after {:?}, step {what} on node {node}, {steps:?}", begin.elapsed());
    }
    let done: Vec<u64> = soak.loads.iter().map(Load::done).collect();
    println!("{steps:?} times scaled, killed, replaced, rescheduled; {done:?} requests, {by_scheduler:?}");
    assert!(steps.iter().all(|count| *count > 0) || length < Duration::from_secs(60), "{steps:?}");
    let failed: Vec<String> = soak.loads.drain(..).flat_map(Load::stop).collect();
    assert_eq!(failed, Vec::<String>::new());
    for node in &cluster.nodes {
        let outcomes = json(&node.netns, &["stats"])["outcomes"].clone();
        for name in ["malformed", "tunnel_malformed", "table_full", "snat_ports_exhausted"] {
            assert_eq!(
                outcomes[name].as_u64().unwrap_or_default(),
                0,
                "{} counts {name}: {outcomes}",
                node.name
            );
        }
    }
}
