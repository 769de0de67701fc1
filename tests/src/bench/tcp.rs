//! TCP through a node, whole: clients, servers and the kernels between them, and what that costs the machine, beside what a
//! user would pick instead.
//!
//! Who balances is set up once in namespaces of its own, with web servers and `iperf3` as tasks, and measured in turn with
//! all others, round after round. Processor time is that of the whole machine, by what it was not idle.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::Stdio,
    time::Duration,
};

use super::{
    figure::{Figure, Report, Samples, Target},
    line::{self, Line, NODE, Published},
    load::{Step, connections, paced, watch},
    rivals::{self, Service, at},
};
use crate::{
    agent::{Agent, active_tasks},
    cluster::{Cluster, Reach},
    netns::{Netns, Running, eventually, run},
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds.
    pub rounds: usize,
    /// How long each measurement of a round takes.
    pub time: Duration,
    /// Whether latency is measured, and by how many connections cost grows.
    pub all: bool,
}

impl Effort {
    /// Some four minutes.
    pub const FULL: Self = Self { rounds: 3, time: Duration::from_millis(800), all: true };
    /// One.
    pub const QUICK: Self = Self { rounds: 1, time: Duration::from_millis(700), all: false };
}

/// Web servers behind each port.
const TASKS: u8 = 2;
/// Connections that stay, where their number is not what is measured.
const CONNECTIONS: u32 = 32;
/// The ports that tasks listen on.
const WEB: u16 = 8080;
const BULK: u16 = 5201;
/// What is done a second where latency is measured: about a fifth of what the machine can.
const CONNECTION_RATE: u32 = 2_000;
const REQUEST_RATE: u32 = 6_000;

/// Where the tasks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// Behind the node that clients use.
    Here,
    /// Behind another node.
    There,
}

/// Who balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Routing,
    Native,
    Tc,
    Nft,
    Haproxy,
    Nginx,
}

impl Who {
    const ALL: [Self; 6] = [Self::Routing, Self::Native, Self::Tc, Self::Nft, Self::Haproxy, Self::Nginx];

    const fn name(self) -> &'static str {
        match self {
            Self::Routing => "plain routing",
            Self::Native => "lb, native XDP",
            Self::Tc => "lb, TC alone",
            Self::Nft => "nftables DNAT",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx stream",
        }
    }
}

/// The machines, wired one way or the other.
enum Wiring {
    /// Without a switch.
    Line(Box<Line>),
    /// Two nodes on one.
    Cluster(Box<Cluster>),
}

impl Wiring {
    fn new(tasks: Where, label: &str) -> Self {
        match tasks {
            Where::Here => Self::Line(Box::new(Line::new(label))),
            Where::There => {
                let mut cluster = Cluster::new(2);
                cluster.reach = Reach { peers: true, ..Reach::default() };
                cluster.receive_xdp();
                for number in 0..TASKS {
                    cluster.add_task(&format!("web.{number}"), 1);
                }
                let node = &cluster.nodes[0];
                // There and back by the first node, also where it would tell of a shorter way.
                cluster.client.ip(&format!("route add 172.18.0.0/16 via {}", node.v4()));
                run(node
                    .netns
                    .command("sysctl")
                    .arg("-qw")
                    .args(["net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth1.send_redirects=0"]));
                Self::Cluster(Box::new(cluster))
            }
        }
    }

    fn client(&self) -> &Netns {
        match self {
            Self::Line(line) => &line.client,
            Self::Cluster(cluster) => &cluster.client,
        }
    }

    /// Nodes, the one that clients use first.
    fn nodes(&self) -> Vec<&Netns> {
        match self {
            Self::Line(line) => vec![&line.node],
            Self::Cluster(cluster) => cluster.nodes.iter().map(|node| &node.netns).collect(),
        }
    }

    fn folder(&self) -> &Path {
        match self {
            Self::Line(line) => line.folder(),
            Self::Cluster(cluster) => cluster.folder(),
        }
    }

    /// The tasks' addresses.
    fn tasks(&self) -> Vec<Ipv4Addr> {
        match self {
            Self::Line(_) => (0..TASKS).map(line::task).collect(),
            Self::Cluster(cluster) => cluster.tasks.iter().map(|task| task.v4).collect(),
        }
    }

    /// The namespace that a task is in.
    fn inside(&self, number: usize) -> &Netns {
        match self {
            Self::Line(line) => &line.task,
            Self::Cluster(cluster) => &cluster.tasks[number].netns,
        }
    }

    /// The address that clients use.
    fn node(&self) -> Ipv4Addr {
        match self {
            Self::Line(_) => NODE,
            Self::Cluster(cluster) => cluster.nodes[0].v4(),
        }
    }

    /// Has uplinks finish checksums before a frame leaves, as what comes off a wire has them, or leave that and cutting
    /// segments to the other end, as a veth does.
    fn finish_sums(&self, finish: bool) {
        let state = if finish { "off" } else { "on" };
        for netns in self.nodes().into_iter().chain([self.client()]) {
            run(netns.command("ethtool").args(["-K", "eth1", "tx", state]));
        }
    }

    /// The cluster as our agents read it: all web servers, and `iperf3` of the first task.
    fn write(&self) -> std::path::PathBuf {
        let bulk = self.tasks()[..1].to_vec();
        match self {
            Self::Line(line) => line.write(&[
                Published { port: 80, target: WEB, node: "node1", via: "peer", addresses: self.tasks() },
                Published { port: BULK, target: BULK, node: "node1", via: "peer", addresses: bulk },
            ]),
            Self::Cluster(cluster) => {
                let all: Vec<_> = cluster.tasks.iter().map(|task| (task, "running")).collect();
                let text = cluster.file("\"80:8080\"", &all);
                let task = &cluster.tasks[0];
                let bulk = format!(
                    "[[service]]\nname = \"s{BULK}\"\nports = [\"{BULK}:{BULK}\"]\n\n[[service.task]]\n\
                     name = \"s{BULK}.0\"\nnode = \"{}\"\naddresses = [\"{}\"]\nstate = \"running\"\n",
                    cluster.nodes[task.node].name, task.v4
                );
                cluster.write(&(text + "\n" + &bulk))
            }
        }
    }
}

/// One of them in namespaces of its own, measured.
struct Rig<'a> {
    who: Who,
    wiring: &'a Wiring,
    _agents: Vec<Agent<'a>>,
    _servers: Vec<Running>,
    _proxy: Option<Running>,
}

impl<'a> Rig<'a> {
    fn new(who: Who, wiring: &'a Wiring) -> Self {
        let servers = servers(wiring);
        let (node, folder) = (wiring.nodes()[0], wiring.folder());
        let (mut agents, mut proxy) = (vec![], None);
        match who {
            Who::Routing => {}
            Who::Native => agents = attach(wiring, "native"),
            Who::Tc => agents = attach(wiring, "tc"),
            Who::Nft => rivals::nft(node, &services(wiring)),
            Who::Haproxy => proxy = Some(rivals::haproxy(node, folder, &services(wiring))),
            Who::Nginx => proxy = Some(rivals::nginx_stream(node, folder, &services(wiring))),
        }
        // More than enough ports for what is in TIME_WAIT at the far end.
        let ports = "net.ipv4.ip_local_port_range=1024 65535";
        for netns in [wiring.client(), node] {
            run(netns.command("sysctl").args(["-qw", ports]));
        }
        Self { who, wiring, _agents: agents, _servers: servers, _proxy: proxy }
    }

    /// Where clients connect to.
    fn web(&self) -> Vec<SocketAddrV4> {
        match self.who {
            Who::Routing => at(WEB, self.wiring.tasks()),
            _ => at(80, [self.wiring.node()]),
        }
    }

    fn bulk(&self) -> SocketAddrV4 {
        match self.who {
            Who::Routing => at(BULK, self.wiring.tasks())[0],
            _ => SocketAddrV4::new(self.wiring.node(), BULK),
        }
    }

    /// Connections a second, and microseconds of the machine for each.
    fn open(&self, time: Duration) -> [f64; 2] {
        let targets = self.web();
        per_step(|| connections(self.wiring.client(), &targets, time))
    }

    /// Requests a second on connections that stay, and microseconds of the machine for each.
    fn request(&self, kept: u32, time: Duration) -> [f64; 2] {
        let targets = self.web();
        let url = format!("http://{}/", targets[0]);
        let seconds = format!("{}s", time.as_secs().max(1));
        let arguments = ["-t", "1", "-c", &kept.to_string(), "-d", &seconds, &url];
        per_step(|| answered(&self.wiring.client().output("wrk", &arguments)))
    }

    /// Microseconds until half and until 99 of 100 were done, at a fixed rate.
    fn latency(&self, step: Step, time: Duration) -> [f64; 2] {
        let rate = if step == Step::Connection { CONNECTION_RATE } else { REQUEST_RATE };
        let took = paced(self.wiring.client(), &self.web(), step, rate, time);
        [took[took.len() / 2], took[took.len() * 99 / 100]]
    }

    /// Gigabits a second, and milliseconds of the machine for each gigabyte.
    fn transfer(&self, down: bool, time: Duration) -> [f64; 2] {
        let to = self.bulk();
        let (address, seconds) = (to.ip().to_string(), time.as_secs().max(1).to_string());
        let port = to.port().to_string();
        let mut arguments = vec!["-c", &address, "-p", &port, "-t", &seconds, "-J"];
        if down {
            arguments.push("-R");
        }
        let (said, busy) = watch(|| self.wiring.client().output("iperf3", &arguments));
        let said: serde_json::Value = serde_json::from_str(&said).expect("what iperf3 says is JSON");
        let received = &said["end"]["sum_received"];
        let [bytes, rate] = ["bytes", "bits_per_second"].map(|field| received[field].as_f64().expect(field));
        [rate / 1e9, busy.as_secs_f64() * 1e3 / (bytes / 1e9)]
    }
}

/// How often something was done a second, and microseconds of the machine for each time.
fn per_step(body: impl FnOnce() -> u64) -> [f64; 2] {
    let begin = std::time::Instant::now();
    let (count, busy) = watch(body);
    let seconds = begin.elapsed().as_secs_f64();
    [count as f64 / seconds, busy.as_secs_f64() * 1e6 / count as f64]
}

/// Requests that wrk saw answered, all of which must be.
fn answered(said: &str) -> u64 {
    assert!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "{said}");
    let line = said.lines().find(|line| line.contains("requests in")).unwrap_or_else(|| panic!("{said}"));
    line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number of requests")
}

/// The tasks' servers: nginx, and `iperf3` in the first.
fn servers(wiring: &Wiring) -> Vec<Running> {
    let tasks = at(WEB, wiring.tasks());
    let mut servers = match wiring {
        Wiring::Line(line) => vec![rivals::web_server(&line.task, line.folder(), &tasks)],
        Wiring::Cluster(cluster) => {
            let start = |(number, task): (usize, &SocketAddrV4)| {
                let folder = cluster.folder().join(number.to_string());
                std::fs::create_dir(&folder).expect("make a folder");
                rivals::web_server(wiring.inside(number), &folder, std::slice::from_ref(task))
            };
            tasks.iter().enumerate().map(start).collect()
        }
    };
    let mut iperf3 = wiring.inside(0).command("iperf3");
    servers.push(Running::start(
        iperf3.args(["-s", "-p", &BULK.to_string()]).stdout(Stdio::null()).stderr(Stdio::null()),
    ));
    eventually("iperf3 listens", || rivals::listens(wiring.inside(0), BULK));
    servers
}

/// An agent on each node, all of which offer every task.
fn attach<'a>(wiring: &'a Wiring, mode: &str) -> Vec<Agent<'a>> {
    let cluster = wiring.write();
    // What is slow to begin with is not to be avoided for it.
    let arguments = ["--mode", mode, "--flood-rate", "0"];
    let nodes = wiring.nodes();
    let agents: Vec<_> =
        nodes.iter().map(|node| Agent::attach(node, wiring.folder(), &cluster, &arguments)).collect();
    let web = if matches!(wiring, Wiring::Line(_)) { "s80" } else { "web" };
    for node in nodes {
        eventually("all tasks are offered", || {
            active_tasks(node, web) == u64::from(TASKS) && active_tasks(node, &format!("s{BULK}")) == 1
        });
    }
    agents
}

/// The same for the others. What is behind another node would not answer by this one.
fn services(wiring: &Wiring) -> Vec<Service> {
    let masquerade = matches!(wiring, Wiring::Cluster(_));
    let listener = |port| SocketAddrV4::new(wiring.node(), port);
    vec![
        Service { listener: listener(80), backends: at(WEB, wiring.tasks()), masquerade },
        Service {
            listener: listener(BULK),
            backends: at(BULK, wiring.tasks()).into_iter().take(1).collect(),
            masquerade,
        },
    ]
}

/// What each round measures of each, and how it is shown: a rate and its cost, or two latencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Open,
    Request(u32),
    Latency(Step),
    Transfer { down: bool },
}

impl What {
    /// What both numbers are, and in what.
    fn names(self) -> [(String, &'static str); 2] {
        let both = |rate: &str, cost: &str, units: [&'static str; 2]| {
            [(rate.to_owned(), units[0]), (cost.to_owned(), units[1])]
        };
        match self {
            Self::Open => both("connections", "CPU of a connection", ["/s", "µs"]),
            Self::Request(CONNECTIONS) => both("requests", "CPU of a request", ["/s", "µs"]),
            Self::Request(kept) => [
                (format!("requests, {kept} connections"), "/s"),
                (format!("CPU of a request, {kept} connections"), "µs"),
            ],
            Self::Latency(Step::Connection) => {
                both("connection, 2,000/s, p50", "connection, 2,000/s, p99", ["µs", "µs"])
            }
            Self::Latency(Step::Request) => {
                both("request, 6,000/s, p50", "request, 6,000/s, p99", ["µs", "µs"])
            }
            Self::Transfer { down: false } => both("up", "CPU of a gigabyte up", ["Gbit/s", "ms"]),
            Self::Transfer { down: true } => both("down", "CPU of a gigabyte down", ["Gbit/s", "ms"]),
        }
    }

    fn measure(self, rig: &Rig<'_>, time: Duration) -> [f64; 2] {
        match self {
            Self::Open => rig.open(time),
            Self::Request(kept) => rig.request(kept, time),
            Self::Latency(step) => rig.latency(step, time),
            Self::Transfer { down } => rig.transfer(down, time),
        }
    }
}

/// Measures all of it.
pub fn measure(report: &mut Report, effort: Effort) {
    for tasks in [Where::Here, Where::There] {
        let wirings: Vec<Wiring> =
            Who::ALL.iter().map(|who| Wiring::new(tasks, &format!("{who:?}").to_lowercase())).collect();
        let rigs: Vec<Rig<'_>> =
            Who::ALL.iter().zip(&wirings).map(|(who, wiring)| Rig::new(*who, wiring)).collect();
        let place = if tasks == Where::Here { "to the node's own tasks" } else { "to another node's tasks" };
        let mut web = vec![What::Open, What::Request(CONNECTIONS)];
        if effort.all && tasks == Where::Here {
            web.extend([4, 256].map(What::Request));
            web.extend([Step::Connection, Step::Request].map(What::Latency));
        }
        finish_sums(&rigs, true);
        report.section(&format!("TCP {place}"), WEB_NOTES, || figures(&rigs, &web, tasks, effort));
        finish_sums(&rigs, false);
        let bulk = [false, true].map(|down| What::Transfer { down });
        report.section(&format!("Bulk TCP {place}"), BULK_NOTES, || figures(&rigs, &bulk, tasks, effort));
    }
}

const WEB_NOTES: &[&str] = &[
    "a connection is one with one small request; CPU is that of the whole machine, client and server (nginx) included.",
    "The uplinks' frames have finished checksums, as off a wire.",
];
const BULK_NOTES: &[&str] = &[
    "one connection of iperf3. A veth with XDP on its other end gives up TSO, and copies each frame: native XDP and whoever",
    "sends to it pay for that here, and not on a network card. What TC alone reaches is what local delivery costs.",
];

fn finish_sums(rigs: &[Rig<'_>], finish: bool) {
    for rig in rigs {
        rig.wiring.finish_sums(finish);
    }
}

/// Rounds of everything, and the figures made of them.
fn figures(rigs: &[Rig<'_>], whats: &[What], tasks: Where, effort: Effort) -> Vec<Figure> {
    let mut samples = vec![vec![[vec![], vec![]]; rigs.len()]; whats.len()];
    for _ in 0..effort.rounds {
        for (what, samples) in whats.iter().zip(&mut samples) {
            for (rig, samples) in rigs.iter().zip(samples) {
                let measured = what.measure(rig, effort.time);
                for (sample, samples) in measured.into_iter().zip(samples) {
                    samples.push(sample);
                }
            }
        }
    }
    let mut figures = vec![];
    for (what, samples) in whats.iter().zip(&samples) {
        for (number, (name, unit)) in what.names().into_iter().enumerate() {
            let all: Vec<Figure> = rigs
                .iter()
                .zip(samples)
                .map(|(rig, samples)| {
                    let samples = Samples::new(samples[number].iter().copied());
                    Figure::new(format!("{name}: {}", rig.who.name()), unit, &samples)
                })
                .collect();
            let target = (number == 1 && tasks == Where::Here).then(|| most(*what, &all)).flatten();
            figures.extend(beside_the_first(all, target));
        }
    }
    figures
}

/// What the cost of ours ought to be at most, where it is said: a connection's at most that of plain routing, a request's
/// at most halfway from there to nftables.
fn most(what: What, costs: &[Figure]) -> Option<Target> {
    let of = |who: Who| Who::ALL.iter().position(|other| *other == who).map(|at| costs[at].median);
    let (routing, nft) = (of(Who::Routing)?, of(Who::Nft)?);
    match what {
        What::Open => Some(Target::AtMost(routing)),
        What::Request(CONNECTIONS) => Some(Target::AtMost((routing + nft) / 2.0)),
        _ => None,
    }
}

/// Sets each beside plain routing, and says of ours what they ought to be.
fn beside_the_first(all: Vec<Figure>, target: Option<Target>) -> Vec<Figure> {
    let first = all[0].clone();
    let whose = Who::ALL.iter().zip(all);
    let judged = |(who, figure): (&Who, Figure)| match (who, target) {
        (Who::Routing, _) => figure,
        (Who::Native | Who::Tc, Some(target)) => figure.beside(&first).target(target),
        _ => figure.beside(&first),
    };
    whose.map(judged).collect()
}
