//! What it costs that a task has one family alone: datagrams to and fro and a stream, of IPv4 and of IPv6 clients, beside the same of
//! a task that has both.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aya::{
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};

use super::figure::{Figure, Report, Samples};
use crate::{
    agent::{Agent, active_tasks},
    cluster::{Cluster, Families, Reach},
    netns::eventually,
    traffic::listen,
};

const ROUNDS: usize = 15;
/// Datagrams to and fro in a round.
const EXCHANGES: u32 = 4_000;
/// Bytes of a stream in a round.
const STREAM: usize = 200_000_000;

/// A client, a node with an agent, and a task that sends back every datagram, and takes streams.
struct Rig {
    cluster: Cluster,
    stop: Arc<AtomicBool>,
    servers: Vec<JoinHandle<()>>,
}

impl Rig {
    fn new(families: Families) -> Self {
        let mut cluster = Cluster::new(1);
        cluster.receive_xdp();
        cluster.reach = Reach { families, ..Reach::PEERS };
        cluster.add_task("web.1", 0);
        cluster.keep_connections_on_one_cpu();
        let stop = Arc::new(AtomicBool::new(false));
        let (echo, taken) = cluster.tasks[0].netns.enter(|| {
            let echo = UdpSocket::bind(("::", 5353)).expect("bind");
            echo.set_read_timeout(Some(Duration::from_millis(200))).expect("set a time limit");
            (echo, listen("[::]:8080"))
        });
        taken.set_nonblocking(true).expect("do not wait");
        let (first, second) = (stop.clone(), stop.clone());
        let servers = vec![
            thread::spawn(move || {
                let mut buffer = [0; 2_048];
                while !first.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = echo.recv_from(&mut buffer) {
                        let _ = echo.send_to(&buffer[..length], from);
                    }
                }
            }),
            thread::spawn(move || {
                let mut buffer = vec![0; 1 << 18];
                while !second.load(Ordering::Relaxed) {
                    let Ok((mut stream, _)) = taken.accept() else {
                        thread::sleep(Duration::from_millis(2));
                        continue;
                    };
                    stream.set_nonblocking(false).expect("wait");
                    while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
                    // The client's clock stops when it has all arrived.
                    let _ = stream.write_all(&[1]);
                }
            }),
        ];
        let tasks: Vec<_> = cluster.tasks.iter().map(|task| (task, "running")).collect();
        cluster.write(&cluster.file("\"53:5353/udp\", \"80:8080\"", &tasks));
        Self { cluster, stop, servers }
    }

    fn attach(&self) -> Agent<'_> {
        let node = &self.cluster.nodes[0].netns;
        let path = self.cluster.folder().join("cluster.toml");
        let agent = Agent::attach(node, self.cluster.folder(), &path, &["--mode", "tc"]);
        eventually("the task is offered", || active_tasks(node, "web") == 1);
        agent
    }

    /// Nanoseconds of a datagram to the task and back.
    fn exchanges(&self, to: IpAddr) -> f64 {
        self.cluster.client.enter(|| {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).expect("bind");
            socket.connect(SocketAddr::new(to, 53)).expect("connect");
            socket.set_read_timeout(Some(Duration::from_secs(2))).expect("set a time limit");
            let exchange = || {
                socket.send(&[7; 64]).expect("send");
                socket.recv(&mut [0; 128]).expect("an answer");
            };
            exchange();
            let begin = Instant::now();
            (0..EXCHANGES).for_each(|_| exchange());
            begin.elapsed().as_nanos() as f64 / f64::from(EXCHANGES)
        })
    }

    /// Nanoseconds that our programs run for a datagram to the task and back, by the kernel's own account.
    fn in_programs(&self, to: IpAddr) -> f64 {
        let before = run_time();
        self.exchanges(to);
        // One more begins the connection.
        (run_time() - before) as f64 / f64::from(EXCHANGES + 1)
    }

    /// Megabits a second of a stream to the task.
    fn stream(&self, to: IpAddr) -> f64 {
        self.cluster.client.enter(|| {
            let mut stream = TcpStream::connect((to, 80)).expect("connect");
            let block = vec![3; 1 << 18];
            let begin = Instant::now();
            let mut sent = 0;
            while sent < STREAM {
                sent += stream.write(&block).expect("write");
            }
            stream.shutdown(std::net::Shutdown::Write).expect("stop sending");
            stream.read_exact(&mut [0; 1]).expect("the task has it");
            sent as f64 * 8.0 / begin.elapsed().as_secs_f64() / 1e6
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.servers.drain(..).for_each(|server| drop(server.join()));
    }
}

/// Nanoseconds that all loaded programs of ours have run since the kernel counts.
fn run_time() -> u64 {
    let ours = ["uplink_xdp", "uplink_tc", "uplink_egress", "task_tc", "task_egress"];
    let of = |info: &ProgramInfo| {
        let fd = info.fd().expect("the program's descriptor");
        let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
        let text = fs::read_to_string(path).expect("what the kernel says of it");
        let line =
            text.lines().find_map(|line| line.strip_prefix("run_time_ns:")).expect("the time it has run");
        line.trim().parse::<u64>().expect("a number")
    };
    // One that goes meanwhile is somebody else's.
    let programs = loaded_programs().flatten();
    programs
        .filter(|info| info.name_as_str().is_some_and(|name| ours.contains(&name)))
        .map(|info| of(&info))
        .sum()
}

const NAMES: [&str; 6] = [
    "IPv4, task with both families",
    "IPv6, task with both families",
    "IPv4, task with IPv4 alone",
    "IPv6, task with IPv4 alone: translated",
    "IPv4, task with IPv6 alone: translated",
    "IPv6, task with IPv6 alone",
];

/// Measures all in turn, round after round.
pub fn measure(report: &mut Report, quick: bool) {
    let rigs = [Families::Both, Families::V4, Families::V6].map(Rig::new);
    let _agents: Vec<_> = rigs.iter().map(Rig::attach).collect();
    let paths: Vec<(&Rig, IpAddr)> =
        rigs.iter().flat_map(|rig| rig.cluster.addresses(0).map(|address| (rig, address))).collect();
    let rounds = if quick { 5 } else { ROUNDS };
    let taken = |one: fn(&Rig, IpAddr) -> f64| -> Vec<Samples> {
        let mut samples = vec![Vec::new(); paths.len()];
        for round in 0..=rounds {
            for ((rig, address), samples) in paths.iter().zip(&mut samples) {
                let sample = one(rig, *address);
                // The first one warms up.
                if round > 0 {
                    samples.push(sample);
                }
            }
        }
        samples.into_iter().map(Samples::new).collect()
    };
    let figures = |unit: &'static str, samples: Vec<Samples>| -> Vec<Figure> {
        let all: Vec<Figure> =
            NAMES.iter().zip(&samples).map(|(name, samples)| Figure::new(*name, unit, samples)).collect();
        let beside = |index: usize| if index == 3 || index == 5 { 1 } else { 0 };
        let set = |(index, figure): (usize, &Figure)| match index {
            0 => figure.clone(),
            _ => figure.clone().beside(&all[beside(index)]),
        };
        all.iter().enumerate().map(set).collect()
    };
    const NOTES: [&str; 2] = [
        "One node, its task behind a veth, TC alone. To and fro, with both ends' sockets: what a family, or translating, costs more",
        "is the difference, of two packets. A stream is cut into segments of 64 KB, and made the other family's as a whole.",
    ];
    report.section("A datagram of 64 bytes to and fro", &NOTES, || figures("ns", taken(Rig::exchanges)));
    let counting = enable_stats(Stats::RunTime).expect("have the kernel count the time that programs run");
    const COUNTED: [&str; 1] =
        ["All programs that the two packets pass, without what the kernel does between them."];
    report.section("The same, in our programs", &COUNTED, || figures("ns", taken(Rig::in_programs)));
    drop(counting);
    report.section("A stream to the task", &[], || figures("Mbit/s", taken(Rig::stream)));
}
