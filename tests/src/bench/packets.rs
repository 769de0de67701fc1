//! What a packet costs in the programs, in nanoseconds above a program that does nothing.
//!
//! Rounds of some thousand runs of the floor and of the program follow each other, so that what disturbs the machine
//! disturbs both; a figure is the difference in a round. Each is checked by the counters: all its packets ended as
//! they should.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::programs::{ProgramFd, ProgramInfo};
use lb_bench_ebpf::program as floor;
use lb_common::{
    abi::{XDP_TRANSMITS, program},
    outcome::Outcome,
};
use lb_userspace::{
    cluster::{Access, Scheduler, Service, Via, address_range},
    datapath::Sizes,
};

use super::{
    feeder::{Clients, Feeder, Kind},
    figure::{Figure, Report, Samples, Target},
    paths::{COOKIES, Client, FAMILIES, FlowPath, Frames, ROUTED, Undo, paths, services},
};
use crate::{
    lab::{Lab, ip, service, task, with_lab_of},
    packet::{ACK, Packet, SYN, Transport},
};

/// What to measure.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Fewer rounds and sizes.
    pub quick: bool,
    /// Pinned XDP programs to set beside ours.
    pub compare: Vec<PathBuf>,
    /// Where their frames go to.
    pub compare_to: Option<(IpAddr, u16)>,
}

/// Measures all of it.
pub fn run(report: &mut Report, options: &Options) {
    let rounds = if options.quick { 15 } else { 31 };
    let most = if options.quick { 4_096 } else { 65_536 };
    let counts: Vec<u32> = [1, 4_096, 65_536].into_iter().filter(|&count| count <= most).collect();
    with_lab_of(sizes(MADE_FOR), services(), |lab| {
        lab.agree("node2", Some(COOKIES));
        let mut bench = Bench::new(lab, rounds);
        report.section(
            "ns a run of the floors",
            &["The feeder that puts the frame back is part of each."],
            || bench.floors(),
        );
        report.section(
            "ns a packet of an established connection, above XDP_PASS or a TC program that does nothing",
            &["Clients come in a scattered order. TCP frames of 72 bytes over IPv4, before the tunnel's headers."],
            || bench.established(&counts),
        );
        report.section("ns a packet that is not ours, above XDP_PASS", &[], || bench.not_ours(""));
        report.section(
            "ns a packet that opens a connection, above XDP_PASS",
            &["SYN: into a table for 262,144 connections, which has room for twice as many. ACK: changes the state of its line."],
            || bench.opening(),
        );
        if !options.compare.is_empty() {
            let to = options.compare_to.unwrap_or((ip(FAMILIES[0].listener), 83));
            report.section(
                "ns a packet in other programs, above XDP_PASS",
                &["The same frames and clients as ours; the number is what the last run returned."],
                || options.compare.iter().flat_map(|path| bench.compare(path, to, &counts)).collect(),
            );
        }
    });
    if !options.quick {
        large(report, rounds);
    }
}

/// With a million connections, and with as many listeners as a large cluster has.
fn large(report: &mut Report, rounds: usize) {
    let mut services = services();
    // A service for each, as clusters have them, whose tasks listen where tasks usually do.
    services.extend((10_000_u16..20_000).map(|port| {
        let [high, low] = port.to_be_bytes();
        let addresses = [format!("10.10.{high}.{low}"), format!("fd0a::{port:x}")];
        let task =
            task(&format!("many{port}.1"), false, Via::Routed, &addresses.each_ref().map(String::as_str));
        service(&format!("many{port}"), &[&format!("{port}:8080")], vec![task])
    }));
    // A backend and a slot for each listener of both families.
    let sizes =
        Sizes { services: Some(16_384), backends: Some(32_768), slots: Some(32_768), ..sizes(1_310_720) };
    with_lab_of(sizes, services, |lab| {
        let mut bench = Bench::new(lab, rounds);
        report.section("ns a packet of an established connection, 1,048,576 connections", &[], || {
            bench.established(&[1_048_576])
        });
        report.section(
            "ns a packet that is not ours, 10,000 listeners and a million connections",
            &[],
            || bench.not_ours(", 10,000 listeners"),
        );
    });
}

/// A list of so many ranges: one that has all clients, and addresses in it.
fn list(client: &str, count: u16) -> Access {
    let range = |text: String| address_range(&text).expect("a range");
    let one = |number: u16| match ip(client) {
        IpAddr::V4(client) => {
            let ([first, second, ..], [third, last]) = (client.octets(), number.to_be_bytes());
            range(format!("{first}.{second}.{third}.{last}"))
        }
        IpAddr::V6(client) => {
            let mut segments = client.segments();
            segments[7] = number;
            range(std::net::Ipv6Addr::from(segments).to_string())
        }
    };
    let wide = range(format!("{client}/{}", if ip(client).is_ipv4() { 16 } else { 112 }));
    let allow = (1..count).map(|number| one(number * 64)).chain([wide]);
    Access { allow: Some(allow.collect()), deny: Vec::new() }
}

fn sizes(connections: u32) -> Sizes {
    Sizes {
        connections: Some(connections),
        services: Some(64),
        listeners: Some(16_384),
        backends: Some(256),
        slots: Some(8_192),
        ..Sizes::default()
    }
}

/// Connections that are opened between two answers of theirs: fewer than the table is made for.
const CHUNK: u32 = 16_384;
/// Connections that the table is made for.
const MADE_FOR: u32 = 262_144;
/// Runs in a round.
const RUNS: u32 = 16_384;

struct Bench<'a> {
    lab: &'a mut Lab,
    feeder: Feeder,
    rounds: usize,
    xdp: ProgramFd,
    tc: ProgramFd,
}

impl<'a> Bench<'a> {
    fn new(lab: &'a mut Lab, rounds: usize) -> Self {
        pin_to_one_cpu();
        // As on a network card: sums are finished. Floods are asked for where they are measured.
        lab.configure(|config| (config.flags, config.flood_rate) = (XDP_TRANSMITS, 0));
        let feeder = Feeder::load(lab.uplink, lab.veth);
        let (xdp, tc) = (lab.program(program::UPLINK_XDP), lab.program(program::TASK_TC));
        Self { lab, feeder, rounds, xdp, tc }
    }

    /// Nanoseconds of one of the floors.
    fn floor(&mut self, kind: Kind, name: &str, runs: u32) -> f64 {
        let program = self.feeder.own(name);
        self.feeder.feed_to(kind, &program).expect("go on with a floor");
        self.feeder.run(kind, runs).0
    }

    fn floors(&mut self) -> Vec<Figure> {
        let packet = Packet::new(ACK, (ip(FAMILIES[0].client), 1), (ip(FAMILIES[0].listener), ROUTED));
        let frames = Frames::new(&packet, 0, Client::Source, Kind::Xdp, Packet::bytes);
        self.feeder.set(&frames.bytes, &frames.clients);
        let all = [
            ("XDP_PASS", Kind::Xdp, floor::PASS),
            ("XDP_TX", Kind::Xdp, floor::TRANSMIT),
            ("room for the tunnel made, and taken away", Kind::Xdp, floor::GROW),
            ("a note for TC left, and taken away", Kind::Xdp, floor::NOTE),
            ("TC_ACT_UNSPEC", Kind::Tc, floor::NOTHING),
        ];
        let figure = |(what, kind, name)| {
            let samples = Samples::new((0..self.rounds).map(|_| self.floor(kind, name, RUNS)));
            Figure::new(what, "ns", &samples)
        };
        all.map(figure).into()
    }

    /// What the program takes above its floor. What the feeder takes to undo the program's work is half of what a
    /// program takes that does that work and nothing else: doing and undoing are one helper's calls.
    fn measure(&mut self, frames: &Frames, mut before: impl FnMut(&mut Self)) -> Samples {
        let (kind, runs) = (frames.kind, RUNS);
        let none = if kind == Kind::Tc { floor::NOTHING } else { floor::PASS };
        let program = if kind == Kind::Tc { &self.tc } else { &self.xdp };
        let program = program.try_clone().expect("a file descriptor");
        let (mut samples, mut disturbed) = (vec![], 0);
        self.feeder.set(&frames.bytes, &frames.clients);
        while samples.len() < self.rounds {
            before(self);
            let pass = self.floor(kind, none, runs);
            let mut undoing = 0.0;
            if matches!(frames.undo, Undo::Growth | Undo::GrowthAndNote) {
                undoing += (self.floor(kind, floor::GROW, runs) - pass) / 2.0;
            }
            if matches!(frames.undo, Undo::Note | Undo::GrowthAndNote) {
                undoing += (self.floor(kind, floor::NOTE, runs) - pass) / 2.0;
            }
            self.feeder.feed_to(kind, &program).expect("go on with the program");
            let ((cost, _), counted) = self.lab.counting(|_| self.feeder.run(kind, runs));
            if counted == BTreeMap::from([(frames.outcome, u64::from(runs))]) {
                samples.push(cost - pass - undoing);
                continue;
            }
            // A round that is held up for a second meets next hops that are due; more than a few are no accident.
            disturbed += 1;
            assert!(disturbed <= 5, "packets that should end as {}: {counted:?}", frames.outcome.name());
        }
        Samples::new(samples)
    }

    /// Runs each client's packet once, in order.
    fn once(&mut self, frames: &Frames, first: u32, count: u32, total: u32) {
        let clients = Clients { count: total, first, scattered: false, ..frames.clients };
        self.feeder.set(&frames.bytes, &clients);
        let program = if frames.kind == Kind::Tc { &self.tc } else { &self.xdp };
        let program = program.try_clone().expect("a file descriptor");
        self.feeder.feed_to(frames.kind, &program).expect("go on with the program");
        let (_, counted) = self.lab.counting(|_| self.feeder.run(frames.kind, count));
        assert_eq!(counted, BTreeMap::from([(frames.outcome, u64::from(count))]), "{:?}", frames.clients);
    }

    fn established(&mut self, counts: &[u32]) -> Vec<Figure> {
        let mut figures = vec![];
        for &count in counts {
            let mut v4: BTreeMap<&str, Figure> = BTreeMap::new();
            for family in &FAMILIES {
                for path in paths(family, count) {
                    self.establish(&path, count);
                    for (what, frames, target) in path.measured {
                        // Before each round all hops are made fresh, one by one: more take longer than they stay so.
                        if frames.outcome == Outcome::Reply && count > 4_096 {
                            continue;
                        }
                        let samples = self.measure(&frames, |bench| {
                            // A reply's next hop is renewed each second by TC: not what is measured here.
                            if frames.outcome == Outcome::Reply {
                                bench.lab.touch_hops();
                            }
                        });
                        let connections = if count == 1 {
                            "1 connection".to_owned()
                        } else {
                            format!("{count} connections")
                        };
                        let name = format!("{what}, {}, {connections}", family.name);
                        let mut figure = Figure::new(name, "ns", &samples);
                        if let Some(target) = target.filter(|_| family.name == "IPv4") {
                            figure = figure.target(Target::AtMost(target));
                        }
                        match v4.get(what) {
                            Some(other) => figure = figure.beside(other),
                            None => drop(v4.insert(what, figure.clone())),
                        }
                        figures.push(figure);
                    }
                    // The table has room for one path's connections.
                    self.lab.forget_connections();
                }
            }
        }
        figures
    }

    /// Takes each client of the path as far as it is established.
    fn establish(&mut self, path: &FlowPath, count: u32) {
        let mut first = 0;
        while first < count {
            let some = CHUNK.min(count - first);
            for frames in &path.opening {
                self.once(frames, first, some, count);
            }
            first += some;
        }
    }

    fn not_ours(&mut self, suffix: &str) -> Vec<Figure> {
        let mut figures = vec![];
        let mut add = |bench: &mut Self, what: &str, frames: Frames| {
            let samples = bench.measure(&frames, |_| ());
            let figure = Figure::new(format!("{what}{suffix}"), "ns", &samples);
            // What the filter answers for by itself.
            let filtered = matches!(frames.outcome, Outcome::NotOurs | Outcome::NotIp);
            figures.push(if filtered { figure.target(Target::AtMost(15.0)) } else { figure });
        };
        for family in &FAMILIES {
            let (client, listener) = ((ip(family.client), 1), ip(family.listener));
            for (what, transport) in [("TCP", ACK), ("UDP", Transport::Udp)] {
                let packet = Packet::new(transport, client, (listener, 22));
                let frames = Frames::new(&packet, 0, Client::Source, Kind::Xdp, Packet::bytes);
                let frames = frames.expect(4_096, Outcome::NotOurs, Undo::Nothing);
                add(self, &format!("{what}, {}", family.name), frames);
            }
        }
        let packet = Packet::new(ACK, (ip(FAMILIES[0].client), 1), (ip(FAMILIES[0].listener), 22));
        let arp = |packet: &Packet| {
            let mut bytes = packet.bytes();
            bytes[12..14].copy_from_slice(&[8, 6]);
            bytes
        };
        let frames = Frames::new(&packet, 0, Client::Source, Kind::Xdp, arp);
        add(self, "ARP", frames.expect(1, Outcome::NotIp, Undo::Nothing));
        // A later fragment whose first one nobody saw; an echo request.
        let fragment = |packet: &Packet| {
            let mut bytes = packet.bytes();
            bytes[20..22].copy_from_slice(&[0, 0xb9]);
            bytes
        };
        let frames = Frames::new(&packet, 0, Client::Source, Kind::Xdp, fragment);
        add(self, "later fragment, IPv4", frames.expect(4_096, Outcome::Fragment, Undo::Nothing));
        let echo = |packet: &Packet| {
            let mut bytes = packet.bytes();
            bytes[23] = 1;
            bytes[34] = 8;
            bytes
        };
        let frames = Frames::new(&packet, 0, Client::Absent, Kind::Xdp, echo);
        add(self, "ICMP echo, IPv4", frames.expect(1, Outcome::OtherProtocol, Undo::Nothing));
        figures
    }

    /// Connections that begin, at several fills of the table; and what the guard makes of them.
    fn opening(&mut self) -> Vec<Figure> {
        const CLIENTS: u32 = 1 << 20;
        let mut figures = vec![];
        for family in &FAMILIES {
            let path = paths(family, CLIENTS).into_iter().find(|path| path.name == "routed").expect("a path");
            let [syn, answer, ack] = [0, 1, 2].map(|step| &path.opening[step]);
            for (fill, entries, target) in
                [("empty", 0, 450.0), ("half full", MADE_FOR, f64::INFINITY), ("full", 2 * MADE_FOR, 870.0)]
            {
                let (mut opened, mut moved) = (vec![], vec![]);
                for _ in 0..self.rounds.min(21) {
                    self.lab.forget_connections();
                    if entries > 0 {
                        // Some more than fit, so that it is really full.
                        self.once(syn, 0, entries + entries / 4, CLIENTS);
                    }
                    // None of those that fill the table.
                    let first = 1_000_000;
                    let runs = 8_192;
                    opened.push(self.timed(syn, first, runs));
                    self.once(answer, first, runs, CLIENTS);
                    moved.push(self.timed(ack, first, runs));
                }
                let bounded = family.name == "IPv4" && target.is_finite();
                let target = Some(Target::AtMost(target)).filter(|_| bounded);
                let name = format!("SYN, {}, {fill} table", family.name);
                let mut figure = Figure::new(name, "ns", &Samples::new(opened));
                figure.target = target;
                figures.push(figure);
                let name = format!("first ACK, {}, {fill} table", family.name);
                figures.push(Figure::new(name, "ns", &Samples::new(moved)));
            }
            self.lab.forget_connections();
            let others = if family.name == "IPv4" { "203.0.113.1" } else { "2001:db8:ffff::1" };
            let others = list(others, 1_000).allow.expect("ranges");
            let listed = [
                ("a list of 1,000 ranges", list(family.client, 1_000), vec![]),
                ("denied", Access::closed(), vec![]),
                ("1,000 ranges of others whom no service takes", Access::default(), others),
            ];
            for (what, access, denied) in listed {
                self.change("routed", |service| service.access = access);
                self.lab.update(|cluster| cluster.denied = denied);
                figures.push(self.opens(syn, &format!("SYN, {}, {what}", family.name)));
            }
            self.lab.update(|cluster| cluster.denied.clear());
            self.change("routed", |service| service.access = Access::default());
            for scheduler in Scheduler::ALL {
                self.change("routed", |service| service.scheduler = scheduler);
                figures.push(self.opens(syn, &format!("SYN, {}, {}", family.name, scheduler.name())));
            }
            self.change("routed", |service| service.scheduler = Scheduler::default());
            self.lab.configure(|config| config.flood_rate = 1);
            // The first of them is what makes the guard take over.
            self.feeder.set(&syn.bytes, &Clients { count: CLIENTS, ..syn.clients });
            let program = self.xdp.try_clone().expect("a file descriptor");
            self.feeder.feed_to(Kind::Xdp, &program).expect("go on with the program");
            self.feeder.run(Kind::Xdp, 16);
            let syn = Frames {
                clients: Clients { count: CLIENTS, ..syn.clients },
                bytes: syn.bytes.clone(),
                ..*syn
            };
            let samples = self.measure(&syn, |_| ());
            let mut figure =
                Figure::new(format!("SYN, {}, under the flood guard", family.name), "ns", &samples);
            figure.target = Some(Target::AtMost(220.0)).filter(|_| family.name == "IPv4");
            figures.push(figure);
            self.lab.configure(|config| config.flood_rate = 0);
            self.lab.forget_connections();
        }
        figures
    }

    /// What a connection costs that begins in an empty table.
    fn opens(&mut self, syn: &Frames, name: &str) -> Figure {
        let mut samples = vec![];
        for _ in 0..self.rounds.min(21) {
            self.lab.forget_connections();
            samples.push(self.timed(syn, 1_000_000, 8_192));
        }
        Figure::new(name, "ns", &Samples::new(samples))
    }

    /// Changes what is said of a service.
    fn change(&mut self, service: &str, change: impl FnOnce(&mut Service)) {
        self.lab.update(|cluster| {
            let index = cluster.services.iter().position(|known| known.name == service).expect("the service");
            change(cluster.service_mut(index));
        });
    }

    /// [`Self::once`], and what each run took above the floor.
    fn timed(&mut self, frames: &Frames, first: u32, count: u32) -> f64 {
        let clients = Clients { count: 1 << 20, first, scattered: false, ..frames.clients };
        self.feeder.set(&frames.bytes, &clients);
        let pass = self.floor(frames.kind, floor::PASS, count);
        self.feeder.set(&frames.bytes, &clients);
        let program = self.xdp.try_clone().expect("a file descriptor");
        self.feeder.feed_to(frames.kind, &program).expect("go on with the program");
        self.feeder.run(frames.kind, count).0 - pass
    }

    /// Another XDP program on the frames of our clients: each opens, then goes on.
    fn compare(&mut self, path: &Path, to: (IpAddr, u16), counts: &[u32]) -> Vec<Figure> {
        let program = ProgramInfo::from_pin(path)
            .and_then(|info| info.fd())
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (kind, none) = match self.feeder.feed_to(Kind::Xdp, &program) {
            Ok(()) => (Kind::Xdp, floor::PASS),
            Err(_) => (Kind::XdpLinear, floor::PASS_LINEAR),
        };
        let client =
            FAMILIES.iter().map(|family| ip(family.client)).find(|ip| ip.is_ipv4() == to.0.is_ipv4());
        let client = (client.expect("an address of its family"), 1);
        let frames = |transport| {
            Frames::new(&Packet::new(transport, client, to), 0, Client::Source, kind, Packet::bytes)
        };
        let (syn, ack) = (frames(SYN), frames(ACK));
        let mut figures = vec![];
        for &count in counts {
            let go_on = |bench: &mut Self| {
                let done = bench.feeder.feed_to(kind, &program);
                done.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            };
            self.feeder.set(&syn.bytes, &Clients { count, scattered: false, ..syn.clients });
            go_on(self);
            self.feeder.run(kind, count);
            self.feeder.set(&ack.bytes, &Clients { count, ..ack.clients });
            let (mut samples, mut action) = (vec![], 0);
            for _ in 0..self.rounds {
                let pass = self.floor(kind, none, RUNS);
                go_on(self);
                let (cost, returned) = self.feeder.run(kind, RUNS);
                samples.push(cost - pass);
                action = returned;
            }
            let name = format!("{}, {count} connections, returns {action}", path.display());
            figures.push(Figure::new(name, "ns", &Samples::new(samples)));
        }
        figures
    }
}

/// Keeps this thread where it is.
fn pin_to_one_cpu() {
    let mut set = nix::sched::CpuSet::new();
    let cpu = nix::sched::sched_getcpu().expect("which CPU this is");
    set.set(cpu).expect("one of the first CPUs");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).expect("stay on this CPU");
}
