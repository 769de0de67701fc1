//! The connection table under torture: two CPUs open, answer, close and forge connections in a table that is far too small,
//! while user space removes lines. What is found is never another's, and at rest the table is whole.
//!
//! `LB_TORTURE_SECONDS` says for how long, ten seconds by default.
//!
//! Runs alone: its two threads want a processor each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use lb_common::{
    abi::remove,
    conntrack::{
        Control,
        line::{ALIAS, ALIASED, WAYS, slot},
        table::SPILLED,
    },
    net::Address as _,
    outcome::Outcome,
    stats::{Open, TableStats},
};
use lb_tests::{
    lab::{DROP, Lab, ip, service, task, with_lab_of},
    packet::{ACK, FIN, RST, SYN, SYN_ACK, Transport},
    talk::{FIRST, TASK_FIRST, answer, request, segment},
};
use lb_userspace::{cluster::Via, datapath::Sizes};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns},
    unistd::Pid,
};

/// Connections that the table is made for: twelve sets, for 512 five-tuples and their aliases.
const CONNECTIONS: u32 = 48;
const CLIENTS: u16 = 128;
const FIRST_PORT: u16 = 30_000;
/// Two lead to one task, so that connections have aliases; one is reached by snat, one by datagrams.
const LISTENERS: [u16; 4] = [80, 82, 83, 84];

/// The address of a client's port: no line may say another.
fn address(port: u16) -> String {
    format!("198.51.100.{}", (port - FIRST_PORT) % 5 + 1)
}

/// A small generator (xorshift): the same tries again with the same start.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u16) -> u16 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u16 % end
    }
}

/// One packet of one client, of any kind.
fn one_packet(lab: &Lab, random: &mut Random) {
    let port = FIRST_PORT + random.below(CLIENTS);
    let listener = LISTENERS[usize::from(random.below(4))];
    let client = ip(&address(port));
    let from_client = |packet: lb_tests::packet::Packet| packet.with(|p| p.source = client);
    let to_client = |packet: lb_tests::packet::Packet| packet.with(|p| p.destination = client);
    let (slot, target) = if listener == 80 { (1 + random.below(2) as u8, 8080) } else { (3, 8083) };
    let datagram = random.below(8) == 0;
    match random.below(8) {
        _ if datagram && random.below(2) == 0 => {
            lab.xdp(&from_client(request(Transport::Udp, port, 53)).bytes());
        }
        _ if datagram => {
            lab.task_tc(&to_client(answer(Transport::Udp, slot, 5353, port)).bytes());
        }
        0 | 1 => {
            lab.xdp(&from_client(request(SYN, port, listener).at(FIRST, 0)).bytes());
        }
        2 | 3 => {
            lab.task_tc(&to_client(answer(SYN_ACK, slot, target, port)).at(TASK_FIRST, FIRST + 1).bytes());
        }
        4 | 5 => {
            lab.xdp(&from_client(segment(ACK, port, listener, 0)).bytes());
        }
        6 => {
            lab.xdp(&from_client(segment(FIN, port, listener, 0)).bytes());
        }
        _ => {
            lab.xdp(&from_client(segment(RST, port, listener, 0)).bytes());
        }
    }
}

/// Whether a line that was read while all are at work says what one of ours can say.
fn assert_whole(lab: &Lab) -> Vec<(u32, u64, u32)> {
    let lines = lab.lines();
    for (at, control, line) in &lines {
        let tuple = &line.tuple;
        let port = tuple.source_port.get();
        if !control.has(ALIAS) {
            assert!((FIRST_PORT..FIRST_PORT + CLIENTS).contains(&port), "{at}: {line:?}");
            assert_eq!(tuple.source.to_ip().to_string(), address(port), "{at}: {line:?}");
            assert!([53, 80, 82, 83, 84].contains(&tuple.destination_port.get()), "{at}: {line:?}");
        }
    }
    lines.iter().map(|(at, control, line)| (*at, control.0, line.seen)).collect()
}

/// What must hold when nobody is at work: no claim is left; each line is hinted at by its home, each hint leads to such a line;
/// no five-tuple has two.
fn assert_at_rest(lab: &Lab) -> BTreeMap<u32, Control> {
    let sets = lab.sets();
    let mut tuples = BTreeMap::new();
    let mut live = BTreeMap::new();
    for (number, set) in (0_u32..).zip(&sets) {
        for way in 0..WAYS {
            let line = &set.lines[way as usize];
            let control = Control(line.control);
            let at = slot(number, way);
            assert!(!control.is_claimed(), "{at} is claimed for good");
            for home in 0..WAYS {
                let hinted = set.lines[home as usize].home & 1 << (home ^ way) != 0;
                let its = control.is_live() && control.home() == home;
                assert_eq!(hinted, its, "{at}: {control:?}, hinted at by {home}");
            }
            if control.is_live() {
                let tuple = &line.tuple;
                let of = (
                    tuple.source,
                    tuple.destination,
                    tuple.source_port,
                    tuple.destination_port,
                    tuple.protocol,
                    tuple.kind,
                );
                let first = tuples.insert(of, (at, control, line.client_next, line.task_next));
                assert!(first.is_none(), "{at}: {control:?} {line:?}, a second line beside {first:?}");
                live.insert(at, control);
            }
        }
    }
    live
}

/// The programs' account of the table is exact: of its lines, and of what is open at each backend.
fn assert_accounted(lab: &Lab, live: usize) -> TableStats {
    let counted = lab.counters().connections[0];
    assert_eq!(counted.live(), live as u64, "{counted:?}");
    let mut open = BTreeMap::<u32, u64>::new();
    for (_, control, line) in lab.lines() {
        *open.entry(line.backend).or_default() += Open::unit(control.state());
    }
    for backend in lab.datapath().tables().backends.keys() {
        let expected = Open(open.get(backend).copied().unwrap_or_default());
        assert_eq!(lab.open(*backend), expected, "open at backend {backend}");
    }
    counted
}

/// Puts a thread into the lab's namespace and on a processor of its own.
fn settle(netns: &File, number: usize) {
    setns(netns, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(number % cpus).expect("a processor");
    sched_setaffinity(Pid::from_raw(0), &set).expect("stay on one processor");
}

#[test]
fn two_cpus_and_user_space_leave_the_table_whole() {
    let seconds = std::env::var("LB_TORTURE_SECONDS").map_or(10, |text| text.parse().expect("seconds"));
    let sizes = Sizes {
        connections: Some(CONNECTIONS),
        services: Some(64),
        listeners: Some(256),
        backends: Some(256),
        slots: Some(8_192),
        ..Sizes::default()
    };
    let local = |slot: u8| task(&format!("web.{slot}"), true, Via::Snat, &[&format!("172.18.0.1{slot}")]);
    let services = vec![
        service("web", &["80:8080", "53:5353/udp"], vec![local(1), local(2)]),
        service("snat", &["82:8082"], vec![task("snat.1", false, Via::Snat, &["10.9.0.2"])]),
        service("lone", &["83:8083", "84:8083"], vec![local(3)]),
    ];
    with_lab_of(sizes, services, |lab| {
        // Nothing is placed without a line before the table is full.
        lab.configure(|config| config.flood_rate = 0);
        let (over, packets, removed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let netns = File::open("/proc/thread-self/ns/net").expect("the namespace");
        let lab = &*lab;
        std::thread::scope(|scope| {
            for number in 0..2_usize {
                let (over, packets, netns) = (&over, &packets, &netns);
                scope.spawn(move || {
                    settle(netns, number);
                    let mut random = Random(0x9e37_79b9_7f4a_7c15 + number as u64);
                    while !over.load(Ordering::Relaxed) {
                        one_packet(lab, &mut random);
                        packets.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut random = Random(7);
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(seconds) {
                let lines = assert_whole(lab);
                let some: Vec<_> = lines
                    .into_iter()
                    .filter(|_| random.below(8) == 0)
                    .map(|(at, control, seen)| (at, control, seen, remove::CONNECTION4))
                    .collect();
                let gone = lab.try_remove(&some).into_iter().filter(|gone| *gone).count();
                removed.fetch_add(gone as u64, Ordering::Relaxed);
            }
            over.store(true, Ordering::Relaxed);
        });
        let live = assert_at_rest(lab);
        let counted = assert_accounted(lab, live.len());
        // What spilled is told at home, or nobody would look for it.
        let sets = lab.sets();
        let lines = sets.iter().flat_map(|set| set.lines);
        let spilled = lines.filter(|line| line.home & SPILLED != 0).count();
        println!(
            "{} packets, {} lines removed, {} left, {} homes have lines elsewhere",
            packets.load(Ordering::Relaxed),
            removed.load(Ordering::Relaxed),
            live.len(),
            spilled
        );
        assert!(packets.load(Ordering::Relaxed) > 10_000 && removed.load(Ordering::Relaxed) > 100);
        assert!(live.len() > CONNECTIONS as usize / 2, "the table was under pressure: {}", live.len());
        // Each line can be removed by its own word alone, and the table is empty then.
        let all: Vec<_> = lab
            .lines()
            .iter()
            .map(|(at, control, line)| (*at, control.0, line.seen, remove::CONNECTION4))
            .collect();
        assert!(lab.try_remove(&all).iter().all(|gone| *gone));
        assert!(assert_at_rest(lab).is_empty());
        assert_accounted(lab, 0);
        assert!(counted.displaced > 0 && counted.reused > 0 && counted.removed > 0, "{counted:?}");
    });
}

/// In a table where every line is somebody's, and now and then one becomes free, most of what is new lies outside its home and needs an
/// alias: that it takes no line of its own connection.
#[test]
fn in_a_full_table_each_new_exchange_finds_a_place() {
    let services =
        vec![service("web", &["53:5353/udp"], vec![task("web.1", true, Via::Snat, &["172.18.0.11"])])];
    let sizes = Sizes { connections: Some(CONNECTIONS), ..Sizes::default() };
    with_lab_of(sizes, services, |lab| {
        lab.configure(|config| config.flood_rate = 0);
        for number in 0..2_000 {
            let port = FIRST_PORT + number;
            let (verdicts, counted) = lab.counting(|lab| {
                let request = request(Transport::Udp, port, 53).bytes();
                let reply = answer(Transport::Udp, 1, 5353, port).bytes();
                [lab.xdp(&request), lab.task_tc(&reply), lab.xdp(&request)].map(|verdict| verdict.action)
            });
            let expected = BTreeMap::from([(Outcome::Local, 2), (Outcome::Reply, 1)]);
            assert_eq!(counted, expected, "exchange {number}: {verdicts:?}");
            if number % 3 == 0 {
                lab.evict(|_, line| line.tuple.source_port.get() + 20 == port);
                lab.collect();
            }
        }
        let counted = assert_accounted(lab, lab.lines().len());
        assert!(counted.displaced > 1_000, "the table was full: {counted:?}");
        let lines = lab.lines();
        assert!(lines.iter().any(|(_, control, _)| control.has(ALIAS)), "some lie outside their home");
    });
}

/// Client ports that are used through both listeners at the same moment.
const RACES: u16 = 4_000;

/// A task that two listeners lead to would take the two connections of one client port for one.
#[test]
fn two_cpus_that_are_asked_for_a_client_at_once_show_it_to_its_task_by_two_ports() {
    let local = task("lone.1", true, Via::Snat, &["172.18.0.13"]);
    let services = vec![service("lone", &["83:8083", "84:8083"], vec![local])];
    with_lab_of(Sizes::default(), services, |lab| {
        lab.configure(|config| config.flood_rate = 0);
        let netns = File::open("/proc/thread-self/ns/net").expect("the namespace");
        let (lab, ready, late) = (&*lab, AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for (number, listener) in [(0, 83), (1, 84)] {
                let (netns, ready, late) = (&netns, &ready, &late);
                scope.spawn(move || {
                    settle(netns, number);
                    for race in 0..RACES {
                        let syn = request(SYN, FIRST_PORT + race, listener).at(FIRST, 0).bytes();
                        ready.fetch_add(1, Ordering::AcqRel);
                        while ready.load(Ordering::Acquire) < 2 * (u64::from(race) + 1) {
                            std::hint::spin_loop();
                        }
                        // While the other thread is kept from its processor with a line in its hands, this one is told to come
                        // again, as a client does whose SYN is lost. In the kernel's own hands programs are not interrupted.
                        let refused = (0..100_000).take_while(|_| lab.xdp(&syn).action == DROP).count();
                        assert!(refused < 100_000, "{race} by {listener}");
                        late.fetch_add(u64::from(refused > 0), Ordering::Relaxed);
                    }
                });
            }
        });
        let late = late.into_inner();
        assert!(late <= u64::from(RACES) / 100, "{late} of {RACES} races had somebody come again");
        let mut seen = BTreeSet::new();
        let live = assert_at_rest(lab);
        assert_accounted(lab, live.len());
        let lines = lab.lines();
        for (at, control, line) in lines.iter().filter(|(_, control, _)| !control.has(ALIAS)) {
            let port = if control.has(ALIASED) { line.port } else { line.tuple.source_port };
            assert!(seen.insert(port.get()), "{at}: a task has port {} twice", port.get());
        }
        let aliased = live.values().filter(|control| control.has(ALIASED) && !control.has(ALIAS)).count();
        // More, where a port that was chosen for one is asked for later.
        assert_eq!(seen.len(), 2 * usize::from(RACES));
        assert!(aliased >= usize::from(RACES), "{aliased} are shown another port");
    });
}
