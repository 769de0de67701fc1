//! What the control plane costs: loading a cluster, one change of it, memory, garbage collection over a million connections; at three
//! sizes, so that the slope shows.
//!
//! The agent that is measured is the real one, in a namespace, and the tables are watched from outside, as the programs
//! see them.

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use aya::maps::{Array, MapData};
use lb_common::{
    abi::table,
    backend::Backend,
    conntrack::{
        Control, FiveTuple, Line, Set,
        line::{ANSWERED, ESTABLISHED, UDP, WAYS, set_of},
    },
    net::{Be16, TCP, V4},
};
use lb_userspace::{
    datapath::{PinDir, TableSet},
    source::file,
};

use nix::sys::signal::Signal;

use super::{
    agents,
    figure::{Figure, Report, Samples, Target},
};
use crate::{
    agent::Agent,
    large::{FIRST_PORT, Large, Listeners, NODE, Size, open},
};

/// The sizes that issue 6 names, and two below.
pub const SIZES: [Size; 3] = [
    Size { services: 100, tasks: 1_000 },
    Size { services: 1_000, tasks: 10_000 },
    Size { services: 10_000, tasks: 100_000 },
];

/// How long loading may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Connections in the table while collecting its garbage is measured.
pub const CONNECTIONS: u32 = 1_000_000;

/// What to measure.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Fewer changes, and not the largest size.
    pub quick: bool,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn figure(name: &str, unit: &'static str, samples: impl IntoIterator<Item = f64>) -> Figure {
    Figure::new(name, unit, &Samples::new(samples))
}

/// Measures at all sizes; the targets are those of the largest.
pub fn run(report: &mut Report, options: &Options) {
    let sizes = if options.quick { &SIZES[..2] } else { &SIZES };
    let rounds = if options.quick { 3 } else { 11 };
    for size in sizes {
        let title = format!(
            "control plane: {} services with {} tasks on {} nodes",
            size.services,
            size.tasks,
            size.nodes()
        );
        let notes = ["one change: the file is replaced by renaming, until the table leads to the new task"];
        let last = Some(size) == sizes.last();
        report.section(&title, &notes, || {
            measure(*size, rounds, (last && !options.quick).then_some(CONNECTIONS))
        });
        let title = format!("agents: {} services with {} tasks", size.services, size.tasks);
        report.section(&title, &["a manager's agent and those that follow it, one thread each side"], || {
            let folder = tempfile::tempdir().expect("make a folder");
            let path = folder.path().join("cluster.toml");
            fs::write(&path, size.text(None)).expect("write the cluster file");
            let mut cluster = file::read(&path).unwrap_or_else(|error| panic!("{error}"));
            // As Docker's lists come to agents.
            cluster.services.sort_by(|a, b| a.name.cmp(&b.name));
            agents::measure(&cluster, rounds)
        });
    }
}

/// Loading, changes and memory of a cluster of a size; with so many connections also the collection over them.
fn measure(size: Size, rounds: usize, connections: Option<u32>) -> Vec<Figure> {
    let large = Large::new(size);
    let _others = large.answer();
    large.write(&large.size.text(None));
    let path = large.put();
    let room = connections.map_or(262_144, |connections| connections + connections / 4);
    let start = Instant::now();
    let agent = large.attach(&path, &[&format!("--max-connections={room}")]);
    let serving = start.elapsed();
    let pins = large.node.enter(|| PinDir::of("eth1").expect("the pins"));
    let listeners = Listeners::open(&pins);
    listeners.complete(size, PATIENCE);
    let loaded = start.elapsed();
    // What a start leaves behind settles: neighbours, probes.
    settle(&agent);
    let before = Memory::of(agent.pid());
    let idle = busy(&agent, Duration::from_secs(5));
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Spread over the file, its beginning and end among them.
        let service = (round as u64 * u64::from(size.services - 1) / (rounds.max(2) - 1) as u64) as u32;
        added.push(ms(large.change(&listeners, Some(service), service)));
        removed.push(ms(large.change(&listeners, None, service)));
    }
    let after = Memory::of(agent.pid());
    let kernel = tables(&large);
    agent.stop(Signal::SIGKILL);
    let start = Instant::now();
    let agent = large.attach(&path, &[&format!("--max-connections={room}")]);
    let adopted = start.elapsed();
    let mut figures = vec![
        figure("start to attached", "ms", [ms(serving)]),
        figure("start to every task in the tables", "ms", [ms(loaded)]).target(Target::AtMost(5_000.0)),
        figure("start to attached, adopting the tables after a kill", "ms", [ms(adopted)]),
        figure("one task more: file replaced to the table", "ms", added).target(Target::AtMost(50.0)),
        figure("one task fewer: file replaced to the table", "ms", removed).target(Target::AtMost(50.0)),
        figure("controller: resident after loading", "MB", [before.now]).target(Target::AtMost(200.0)),
        figure("controller: resident at most", "MB", [after.most]).target(Target::AtMost(200.0)),
        figure("controller: CPU while nothing changes", "ms/s", [idle]),
        figure("tables: kernel memory", "MB", [kernel]),
    ];
    if let Some(connections) = connections {
        figures.extend(collection(&agent, &pins, connections));
    }
    figures
}

/// Resident memory of a process in MB.
struct Memory {
    now: f64,
    most: f64,
}

impl Memory {
    fn of(pid: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.trim_end_matches("kB").trim().parse::<f64>().expect("a number") / 1024.0
        };
        Self { now: field("VmRSS:"), most: field("VmHWM:") }
    }
}

/// Kernel memory of all tables in MB.
fn tables(large: &Large) -> f64 {
    let memory = large.node.enter(|| TableSet::of("eth1").and_then(|set| set.memory()).expect("the tables"));
    memory.iter().map(|(_, bytes)| *bytes as f64).sum::<f64>() / f64::from(1 << 20)
}

/// CPU time that a process has used so far, all its threads.
fn used(pid: i32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process");
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

/// Milliseconds of CPU a second over some time.
fn busy(agent: &Agent<'_>, time: Duration) -> f64 {
    let (before, start) = (used(agent.pid()), Instant::now());
    std::thread::sleep(time);
    ms(used(agent.pid()) - before) / start.elapsed().as_secs_f64()
}

/// Waits until the agent has nothing to do but its ticks.
fn settle(agent: &Agent<'_>) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while busy(agent, Duration::from_secs(2)) > 100.0 && Instant::now() < deadline {}
}

/// Connections that have ended, spread over the table, by which the end of a collection shows.
const MARKS: u32 = 64;

/// Garbage collection over so many connections: what it takes of the controller's time, and how long a whole one is.
fn collection(agent: &Agent<'_>, pins: &PinDir, connections: u32) -> Vec<Figure> {
    let backends: Array<MapData, Backend> = open(pins, table::BACKENDS);
    let generation = backends.get(&0, 0).expect("a backend").generation;
    let heartbeat: Array<MapData, u32> = open(pins, table::HEARTBEAT);
    let now = heartbeat.get(&0, 0).expect("the heartbeat");
    let live = Line { seen: now, ..line(generation) };
    fill(pins, 0, connections, &live);
    let with = busy(agent, Duration::from_secs(10));
    // Connections to nobody, which have ended, behind the others.
    let ended = Line { seen: now, ..line(generation.wrapping_add(1)) };
    let ended = Line { control: Control(ended.control).with_state(UDP).0, ..ended };
    fill(pins, connections, MARKS, &ended);
    let table: Array<MapData, Set<V4>> = open(pins, table::CONNECTIONS4);
    let start = Instant::now();
    let there = |set: u32| {
        let lines = table.get(&set, 0).expect("a set").lines;
        lines.iter().any(|line| Control(line.control).is_live())
    };
    while (connections..connections + MARKS).step_by(WAYS as usize).any(|number| there(set_of(number))) {
        assert!(start.elapsed() < Duration::from_secs(600), "nothing is removed");
        std::thread::sleep(Duration::from_millis(50));
    }
    vec![
        figure("controller: CPU while it looks after a million connections", "ms/s", [with]),
        figure(
            "an ended connection among a million is removed after, at most",
            "s",
            [start.elapsed().as_secs_f64()],
        ),
    ]
}

/// An established connection of TCP to the first backend.
fn line(generation: u32) -> Line<V4> {
    let client = V4::from(Ipv4Addr::new(100, 64, 0, 0));
    let tuple = FiveTuple::new(client, V4::from(NODE), Be16::new(40_000), Be16::new(FIRST_PORT), TCP);
    Line {
        control: Control::default().claimed().live(0, ANSWERED | ESTABLISHED).0,
        tuple: FiveTuple { generation: generation as u16, ..tuple },
        ..Line::default()
    }
}

/// Writes so many lines one behind the other: nobody looks for them by their five-tuples.
fn fill(pins: &PinDir, first: u32, count: u32, line: &Line<V4>) {
    let mut table: Array<MapData, Set<V4>> = open(pins, table::CONNECTIONS4);
    let mut set = Set::default();
    for way in 0..WAYS {
        let control = Control(line.control).claimed().live(way, Control(line.control).state()).0;
        set.lines[way as usize] = Line { control, home: 1, ..*line };
    }
    for number in (first..first + count).step_by(WAYS as usize) {
        table.set(set_of(number), set, 0).expect("write a set");
    }
}
