//! What the control plane costs: loading a cluster, one change of it, memory, the walk through a million flows; at three
//! sizes, so that the slope shows.
//!
//! The agent that is measured is the real one, in a namespace, and the tables are watched from outside, as the programs
//! see them.

use std::{
    fs,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
    time::{Duration, Instant},
};

use aya::{
    Pod,
    maps::{Array, HashMap, MapData},
};
use lb_common::{
    abi::table,
    backend::Backend,
    flow::{ANSWERED, ESTABLISHED, Flow, FlowKey},
    net::{Be16, TCP, UDP, V4},
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

/// Flows in the table while the walk through it is measured.
pub const FLOWS: u32 = 1_000_000;

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
        report.section(&title, &notes, || measure(*size, rounds, (last && !options.quick).then_some(FLOWS)));
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

/// Loading, changes and memory of a cluster of a size; with so many flows also the walk through them.
fn measure(size: Size, rounds: usize, flows: Option<u32>) -> Vec<Figure> {
    let large = Large::new(size);
    let _others = large.answer();
    large.write(&large.size.text(None));
    let path = large.put();
    let room = flows.map_or(262_144, |flows| flows + flows / 4);
    let start = Instant::now();
    let agent = large.attach(&path, &[&format!("--max-flows={room}")]);
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
    let agent = large.attach(&path, &[&format!("--max-flows={room}")]);
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
    if let Some(flows) = flows {
        figures.extend(walk(&agent, &pins, flows));
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

/// Flows that have ended, spread over the table, by which the end of a walk shows.
const MARKS: u32 = 64;

/// The walk through a table of so many flows: what it takes of the controller's time, and how long a whole one is.
fn walk(agent: &Agent<'_>, pins: &PinDir, flows: u32) -> Vec<Figure> {
    let backends: Array<MapData, Backend> = open(pins, table::BACKENDS);
    let generation = backends.get(&0, 0).expect("a backend").generation;
    let heartbeat: Array<MapData, u32> = open(pins, table::HEARTBEAT);
    let now = heartbeat.get(&0, 0).expect("the heartbeat");
    let mut entries = Entries::default();
    for number in 0..flows {
        let flow = Flow { generation, seen: now, state: ANSWERED | ESTABLISHED, ..Flow::default() };
        entries.push(key(number, TCP), flow);
    }
    entries.write(pins);
    let with = busy(agent, Duration::from_secs(10));
    // Datagrams to nobody, which have ended.
    let mut marks = Entries::default();
    for number in 0..MARKS {
        marks.push(
            key(number, UDP),
            Flow { generation: generation.wrapping_add(1), seen: now, ..Flow::default() },
        );
    }
    marks.write(pins);
    let table: HashMap<MapData, FlowKey<V4>, Flow<V4>> = open(pins, table::FLOWS4);
    let start = Instant::now();
    while (0..MARKS).any(|number| table.get(&key(number, UDP), 0).is_ok()) {
        assert!(start.elapsed() < Duration::from_secs(600), "the walk does not come by");
        std::thread::sleep(Duration::from_millis(50));
    }
    vec![
        figure("controller: CPU while a million flows are walked through", "ms/s", [with]),
        figure(
            "an ended flow among a million is taken out after, at most",
            "s",
            [start.elapsed().as_secs_f64()],
        ),
    ]
}

fn key(number: u32, protocol: u8) -> FlowKey<V4> {
    let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + number);
    FlowKey::new(V4::from(source), V4::from(NODE), Be16::new(40_000), Be16::new(FIRST_PORT), protocol)
}

/// Entries to be written at once.
#[derive(Default)]
struct Entries {
    keys: Vec<FlowKey<V4>>,
    values: Vec<Flow<V4>>,
}

impl Entries {
    fn push(&mut self, key: FlowKey<V4>, value: Flow<V4>) {
        self.keys.push(key);
        self.values.push(value);
    }

    fn write(&self, pins: &PinDir) {
        let map = MapData::from_pin(pins.table(table::FLOWS4)).expect("the table of flows");
        update_batch(&map, &self.keys, &self.values);
    }
}

/// `BPF_MAP_UPDATE_BATCH` of the kernel's user API.
const UPDATE_BATCH: libc::c_long = 26;

/// Writes many entries by one call.
fn update_batch<K: Pod, V: Pod>(map: &MapData, keys: &[K], values: &[V]) {
    /// `struct { … } batch` of `union bpf_attr`.
    #[repr(C)]
    struct Attributes {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    let mut attributes = Attributes {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the attributes are those of the call; the kernel reads `count` keys and values of the table's sizes.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, UPDATE_BATCH, &raw mut attributes, size_of::<Attributes>()) };
    assert!(result == 0, "write flows: {}", std::io::Error::last_os_error());
}
