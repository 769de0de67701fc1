//! What a packet costs the core that forwards it: live frames through veths, beside what a user would pick instead.
//!
//! One core does it all: it makes frames (see [`Live`]), works them off on the node, and ends them where they arrive. What
//! making one costs is taken off. Who forwards is set up once in
//! namespaces of its own, and measured in turn with all others, round after round.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use lb_bench_ebpf::program;
use lb_common::{
    conntrack::{Control, FiveTuple, line},
    net::V4,
    tunnel::{DEFAULT_PORT, OPTION_CLASS, PROBE, PROBE_ANSWER, TO_CLIENT, VERSION},
};
use lb_userspace::datapath::TableSet;

use super::{
    figure::{Figure, Report, Samples, Target},
    line::{BACKENDS, BRIDGE_MAC, CLIENT_MAC, Line, NODE, NODE_MAC, PEER, Published, TASK_MAC, routed, task},
    live::{Live, PORT, Shape},
    rivals::{self, Service, at},
};
use crate::{
    agent::{Agent, active_tasks, outcome},
    flood,
    netns::eventually,
    packet::{ACK, Packet, SYN, SYN_ACK, Transport, Tunnelled},
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds.
    pub rounds: usize,
    /// How long each measurement of a round takes.
    pub time: Duration,
    /// Numbers of connections beside 256.
    pub growth: &'static [u32],
}

impl Effort {
    /// Two minutes.
    pub const FULL: Self = Self { rounds: 21, time: Duration::from_millis(40), growth: &[1, 65_536] };
    /// Half a minute.
    pub const QUICK: Self = Self { rounds: 7, time: Duration::from_millis(40), growth: &[] };
}

/// Connections in the figures that are set beside each other.
const CONNECTIONS: u32 = 256;
/// Frames of a short measurement, and of a long one.
const FEW: u32 = 1 << 14;
const MANY: u32 = 1 << 18;
/// Connections that are established before anything is measured.
const ESTABLISHED: u32 = 1 << 16;
/// Connections that are on their way to that at a time.
const OPENING: u32 = 1 << 12;
/// The first sequence numbers of clients and of tasks.
const FIRST: u32 = 1_000;
const TASK_FIRST: u32 = 7_000;
/// The network of clients, whose first address has no low half.
const FIRST_CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 0));

/// Where packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Routed,
    Peer,
    Local,
}

impl Way {
    const ALL: [Self; 3] = [Self::Routed, Self::Peer, Self::Local];

    /// Published port and target port.
    const fn ports(self) -> (u16, u16) {
        match self {
            Self::Routed => (81, 8081),
            Self::Peer => (83, 8083),
            Self::Local => (84, 8084),
        }
    }

    fn backends(self) -> Vec<Ipv4Addr> {
        let address = match self {
            Self::Routed => routed,
            Self::Peer => |number| Ipv4Addr::new(172, 18, 2, 11 + number),
            Self::Local => task,
        };
        (0..BACKENDS).map(address).collect()
    }

    /// Where a packet that was forwarded is on its way to: how the address begins, and the port.
    const fn wanted(self) -> ([u8; 2], u16) {
        match self {
            Self::Routed => ([10, 9], 8081),
            Self::Peer => ([192, 0], DEFAULT_PORT),
            Self::Local => ([172, 18], 8084),
        }
    }

    /// The counter of packets that we forwarded so.
    const fn outcome(self) -> &'static str {
        match self {
            Self::Routed => "forwarded_routed",
            Self::Peer => "forwarded_peer",
            Self::Local => "forwarded_local",
        }
    }
}

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// Nobody: frames are received and dropped.
    Drop,
    Transmit,
    Redirect,
    RedirectToTask,
    Native,
    Tc,
    Routing,
    Nft,
    Iptables,
}

impl Who {
    const ALL: [Self; 9] = [
        Self::Drop,
        Self::Transmit,
        Self::Redirect,
        Self::RedirectToTask,
        Self::Native,
        Self::Tc,
        Self::Routing,
        Self::Nft,
        Self::Iptables,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Drop => "bare XDP_DROP",
            Self::Transmit => "bare XDP_TX",
            Self::Redirect => "bare XDP redirect",
            Self::RedirectToTask => "bare XDP redirect into the task's veth",
            Self::Native => "lb, native XDP",
            Self::Tc => "lb, TC alone",
            Self::Routing => "plain routing",
            Self::Nft => "nftables DNAT",
            Self::Iptables => "iptables DNAT",
        }
    }

    /// Where it can send packets.
    const fn ways(self) -> &'static [Way] {
        match self {
            Self::Drop | Self::Transmit | Self::Redirect => &[Way::Routed],
            Self::RedirectToTask => &[Way::Local],
            Self::Native | Self::Tc => &Way::ALL,
            Self::Routing | Self::Nft | Self::Iptables => &[Way::Routed, Way::Local],
        }
    }

    /// Whether it sends packets on as they came.
    const fn is_bare(self) -> bool {
        matches!(self, Self::Drop | Self::Transmit | Self::Redirect | Self::RedirectToTask)
    }

    /// Whether frames leave the node without ever being in a socket buffer.
    const fn sends_in_xdp(self) -> bool {
        matches!(self, Self::Transmit | Self::Redirect | Self::Native)
    }
}

/// One of them in namespaces of its own, measured.
struct Rig<'a> {
    who: Who,
    line: &'a Line,
    live: Live,
    agent: Option<Agent<'a>>,
}

/// What is measured in each round.
struct Row {
    rig: usize,
    way: Way,
    clients: u32,
    /// Frames a measurement.
    frames: u32,
    samples: Vec<f64>,
}

/// Measures all of it.
pub fn measure(report: &mut Report, effort: Effort) {
    let lines: Vec<Line> = Who::ALL.iter().map(|who| Line::new(&format!("{who:?}").to_lowercase())).collect();
    let mut rigs: Vec<Rig<'_>> =
        Who::ALL.iter().zip(&lines).map(|(who, line)| Rig::new(*who, line)).collect();
    let mut rows = vec![];
    for (rig, Rig { who, .. }) in rigs.iter().enumerate() {
        for way in who.ways() {
            let growth: &[u32] = if who.is_bare() { &[] } else { effort.growth };
            for clients in [CONNECTIONS].iter().chain(growth) {
                rows.push(Row { rig, way: *way, clients: *clients, frames: FEW, samples: vec![] });
            }
        }
    }
    report.section("Packets forwarded, 256 connections", NOTES, || {
        rounds(&mut rigs, &mut rows, effort);
        side_by_side(&rows)
    });
    if !effort.growth.is_empty() {
        report.section("Packets forwarded, by the number of connections", &[], || growth(&rows));
    }
}

const NOTES: &[&str] = &[
    "nanoseconds of the core a packet of 72 bytes, veth to veth, without what making it costs; where it arrives it is",
    "counted and dropped, by XDP where no socket buffer was made, else by TC. Four backends; established connections.",
];

/// Measures everything in turn, round after round; a row's samples are without what making a frame takes.
fn rounds(rigs: &mut [Rig<'_>], rows: &mut [Row], effort: Effort) {
    let mut made = vec![];
    for round in 0..=effort.rounds {
        for row in rows.iter_mut() {
            let cost = rigs[row.rig].sample(row.way, row.clients, row.frames);
            // The first round warms up, and says how many frames there is time for.
            if round > 0 {
                row.samples.push(cost);
            } else {
                row.frames = ((effort.time.as_nanos() as f64 / cost) as u32).max(FEW);
            }
        }
        made.extend((0..3).map(|_| rigs[0].make()));
    }
    let made = Samples::new(made).median();
    rows.iter_mut().flat_map(|row| &mut row.samples).for_each(|sample| *sample -= made);
}

/// Each way's figures beside each other.
fn side_by_side(rows: &[Row]) -> Vec<Figure> {
    let find = |who: Who, way: Way| {
        let row =
            rows.iter().find(|row| Who::ALL[row.rig] == who && row.way == way && row.clients == CONNECTIONS);
        Samples::new(row.expect("a row").samples.iter().copied())
    };
    let figure = |who: Who, way: Way, to: &str| {
        let name = if to.is_empty() { who.name().to_owned() } else { format!("{to}: {}", who.name()) };
        Figure::new(name, "ns", &find(who, way))
    };
    let floor = figure(Who::Redirect, Way::Routed, "");
    let bare = |who| figure(who, Way::Routed, "").beside(&floor);
    let mut figures = vec![bare(Who::Drop), bare(Who::Transmit), floor.clone()];
    for (way, to) in [(Way::Routed, "routed"), (Way::Peer, "peer")] {
        let most = Target::AtMost(1.25 * floor.median);
        figures.push(figure(Who::Native, way, to).beside(&floor).target(most));
        figures.push(figure(Who::Tc, way, to).beside(&floor));
        if way == Way::Routed {
            for who in [Who::Routing, Who::Nft, Who::Iptables] {
                figures.push(figure(who, way, to).beside(&floor));
            }
        }
    }
    let local = |who| figure(who, Way::Local, "local");
    let nft = local(Who::Nft);
    let most = Target::AtMost(nft.median / 2.4);
    figures.push(local(Who::RedirectToTask).beside(&nft));
    figures.push(local(Who::Native).beside(&nft).target(most));
    figures.push(local(Who::Tc).beside(&nft));
    figures.push(local(Who::Routing).beside(&nft));
    figures.push(nft.clone());
    figures.push(local(Who::Iptables).beside(&nft));
    figures
}

/// Each figure for all numbers of connections, beside that of one connection.
fn growth(rows: &[Row]) -> Vec<Figure> {
    let mut figures = vec![];
    for of in rows.iter().filter(|row| row.clients == 1) {
        let alike = rows.iter().filter(|row| (row.rig, row.way) == (of.rig, of.way));
        let mut alike: Vec<&Row> = alike.collect();
        alike.sort_by_key(|row| row.clients);
        let figure = |row: &Row| {
            let who = Who::ALL[row.rig];
            let to = format!("{:?}", row.way).to_lowercase();
            let name = format!("{to}: {}, {}", who.name(), counted(row.clients));
            Figure::new(name, "ns", &Samples::new(row.samples.iter().copied()))
        };
        let first = figure(alike[0]);
        figures.push(first.clone());
        figures.extend(alike[1..].iter().map(|row| figure(row).beside(&first)));
    }
    figures
}

fn counted(connections: u32) -> String {
    if connections == 1 { "1 connection".to_owned() } else { format!("{connections} connections") }
}

impl<'a> Rig<'a> {
    fn new(who: Who, line: &'a Line) -> Self {
        let to = match who {
            Who::RedirectToTask => {
                line.node.enter(|| nix::net::if_::if_nametoindex("hv").expect("the task's veth"))
            }
            _ => 0,
        };
        let mut rig = Self { who, line, live: Live::load(to), agent: None };
        let (client, node) = (&line.client, &line.node);
        // Each frame ends as early as it can.
        if who.sends_in_xdp() {
            rig.live.attach_xdp(program::SINK_XDP, client, "eth1");
        } else {
            rig.live.attach_tc_sink(client, "eth1");
        }
        rig.live.attach_tc_sink(&line.task, "eth0");
        // Frames reach an end that polls, be it for a program.
        Line::poll(&line.task, "eth0");
        Line::poll(node, "hv");
        Line::poll(node, "eth1");
        match who {
            Who::Drop => rig.live.attach_xdp(program::DISCARD, node, "eth1"),
            Who::Transmit => rig.live.attach_xdp(program::TRANSMIT, node, "eth1"),
            Who::Redirect | Who::RedirectToTask => rig.live.attach_xdp(program::REDIRECT, node, "eth1"),
            Who::Native | Who::Tc => rig.agent = Some(attach(who, line)),
            Who::Routing => {}
            Who::Nft => rivals::nft(node, &services()),
            Who::Iptables => rivals::iptables(node, &services()),
        }
        if !who.is_bare() {
            for way in who.ways() {
                rig.establish(*way);
            }
        }
        rig
    }

    /// What making a frame costs.
    fn make(&mut self) -> f64 {
        let shape = self.request(Way::Routed, ACK);
        self.live.set_clients(CONNECTIONS);
        self.live.send_nowhere(&self.line.client, None, &shape, MANY)
    }

    /// What a packet costs, with making it.
    fn sample(&mut self, way: Way, clients: u32, frames: u32) -> f64 {
        let shape = self.request(way, ACK);
        self.live.set_clients(clients);
        self.want(way);
        let counted = || self.agent.as_ref().map(|_| outcome(&self.line.node, way.outcome()));
        let before = counted();
        let cost = match self.who {
            Who::Drop => self.live.send_nowhere(&self.line.client, Some("eth1"), &shape, frames),
            _ => self.live.send(&self.line.client, "eth1", &shape, frames),
        };
        if let (Some(before), Some(after)) = (before, counted()) {
            let ours = after - before;
            let least = u64::from(frames - frames / 1_000);
            assert!(ours >= least, "{:?} {way:?}: {ours} of {frames} were forwarded", self.who);
        }
        cost
    }

    fn want(&mut self, way: Way) {
        match way.wanted() {
            // As it came.
            _ if self.who.is_bare() => self.live.want([192, 0], way.ports().0),
            (network, port) => self.live.want(network, port),
        }
    }

    /// Where clients send their packets.
    fn listener(&self, way: Way) -> (IpAddr, u16) {
        match self.who {
            Who::Routing => (way.backends()[0].into(), way.ports().1),
            _ => (NODE.into(), way.ports().0),
        }
    }

    /// A client's packet: data, or none if it opens.
    fn request(&self, way: Way, transport: Transport) -> Shape {
        let packet = Packet::new(transport, (FIRST_CLIENT, PORT), self.listener(way))
            .with(|p| p.macs = (CLIENT_MAC, NODE_MAC));
        let frame = if transport == SYN {
            packet.at(FIRST, 0).bytes()
        } else {
            let data = packet.at(FIRST + 1, TASK_FIRST + 1).with(|p| p.payload = vec![b'x'; 18]);
            push(data.bytes())
        };
        Shape { frame, network: 14, answer: false, from_backend: false }
    }

    /// The answer to a client that opens.
    fn answer(&self, way: Way) -> Shape {
        let client = (FIRST_CLIENT, PORT);
        let from = |address: Ipv4Addr, macs| {
            let [high, low, ..] = address.octets();
            let network = Ipv4Addr::new(high, low, 0, 0);
            let packet = Packet::new(SYN_ACK, (network.into(), way.ports().1), client);
            let frame = packet.at(TASK_FIRST, FIRST + 1).with(|p| p.macs = macs).bytes();
            Shape { frame, network: 14, answer: true, from_backend: true }
        };
        match way {
            Way::Routed => from(routed(0), (CLIENT_MAC, NODE_MAC)),
            Way::Local => from(task(0), (TASK_MAC, BRIDGE_MAC)),
            Way::Peer => {
                let inner = Packet::new(SYN_ACK, self.listener(way), client).at(TASK_FIRST, FIRST + 1);
                let tunnelled = Tunnelled {
                    macs: (CLIENT_MAC, NODE_MAC),
                    nodes: (PEER.into(), NODE.into()),
                    ports: (51_000, DEFAULT_PORT),
                    network: 0,
                    class: OPTION_CLASS.get(),
                    kind: TO_CLIENT,
                    version_and_flags: [VERSION, 0],
                    task: (NODE.into(), 0),
                    cookie: None,
                    inner: inner.bytes()[14..].to_vec(),
                };
                Shape { frame: tunnelled.bytes(), network: 14 + 60, answer: true, from_backend: false }
            }
        }
    }

    /// Opens every client's connection.
    fn establish(&mut self, way: Way) {
        self.want(way);
        let (syn, answer, data) = (self.request(way, SYN), self.answer(way), self.request(way, ACK));
        let line = self.line;
        let answering = if way == Way::Local { (&line.task, "eth0") } else { (&line.client, "eth1") };
        for first in (0..ESTABLISHED).step_by(OPENING as usize) {
            let before = self.live.arrived();
            let arrive = |live: &Live, packets: u32| {
                let wanted = u64::from(packets);
                eventually("what opens connections arrives", || live.arrived() - before >= wanted);
            };
            self.live.send_each(&line.client, "eth1", &syn, first, OPENING);
            arrive(&self.live, OPENING);
            self.live.send_each(answering.0, answering.1, &answer, first, OPENING);
            self.live.send_each(&line.client, "eth1", &data, first, OPENING);
            arrive(&self.live, 2 * OPENING);
        }
        if self.agent.is_some() {
            let established = established(line, way.ports().0);
            let most = ESTABLISHED as usize;
            assert!(
                established >= most - most / 100,
                "{:?} {way:?}: {established} are established",
                self.who
            );
        }
    }
}

/// Established connections to a published port.
fn established(line: &Line, port: u16) -> usize {
    let lines =
        line.node.enter(|| TableSet::of("eth1").and_then(|set| set.lines::<V4>()).expect("the lines"));
    let to_port = |control: &Control, tuple: &FiveTuple<V4>| {
        control.has(line::ESTABLISHED) && tuple.destination_port.get() == port
    };
    lines.iter().filter(|(_, control, line)| to_port(control, &line.tuple)).count()
}

/// Attaches an agent that serves all ways, and waits until it offers every task.
fn attach(who: Who, line: &Line) -> Agent<'_> {
    let services = Way::ALL.map(|way| {
        let (port, target) = way.ports();
        let (node, via) = match way {
            Way::Routed => ("node2", "routed"),
            Way::Peer => ("node2", "peer"),
            Way::Local => ("node1", "peer"),
        };
        Published { port, target, node, via, addresses: way.backends() }
    });
    let cluster = line.write(&services);
    let cluster = cluster.to_str().expect("a path that is text");
    let mode = if who == Who::Tc { "tc" } else { "native" };
    // Everything opens at once, and the other node answers a probe now but none of those that packets pass later.
    // Each client's port has a connection to three services, and each of them is to have its line.
    let arguments = [
        ["--cluster", cluster],
        ["--mode", mode],
        ["--flood-rate", "0"],
        ["--peer-timeout", "1h"],
        ["--max-connections", "1000000"],
    ]
    .concat();
    let offered = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| line.client.enter(|| answer_probes(&offered)));
        let agent = Agent::start_under(&line.node, line.folder(), &["taskset", "-c", "0"], &arguments, &[]);
        for service in &services {
            eventually("all tasks are offered", || {
                active_tasks(&line.node, &format!("s{}", service.port)) == u64::from(BACKENDS)
            });
        }
        offered.store(true, Ordering::Relaxed);
        agent
    })
}

/// Answers probes as the other node's datapath would, for as long as it takes.
fn answer_probes(done: &AtomicBool) {
    const KIND: usize = 10;
    let socket = UdpSocket::bind((PEER, DEFAULT_PORT)).expect("the tunnel's port");
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set a time limit");
    let mut probe = [0; 256];
    let given_up = Instant::now() + Duration::from_secs(120);
    while !done.load(Ordering::Relaxed) && Instant::now() < given_up {
        if let Ok((length, from)) = socket.recv_from(&mut probe)
            && probe[KIND] == PROBE
        {
            probe[KIND] = PROBE_ANSWER;
            socket.send_to(&probe[..length], from).expect("answer a probe");
        }
    }
}

/// The same for the others.
fn services() -> Vec<Service> {
    let service = |way: Way| {
        let (port, target) = way.ports();
        Service {
            listener: SocketAddrV4::new(NODE, port),
            backends: at(target, way.backends()),
            masquerade: false,
        }
    };
    vec![service(Way::Routed), service(Way::Local)]
}

/// Has a TCP packet ask to be delivered at once, as requests do, so that nothing waits for more to merge with.
fn push(mut frame: Vec<u8>) -> Vec<u8> {
    const FLAGS: usize = 14 + 20 + 12;
    const PSH: u8 = 8;
    let old = [frame[FLAGS], frame[FLAGS + 1]];
    frame[FLAGS + 1] |= PSH;
    let new = [frame[FLAGS], frame[FLAGS + 1]];
    flood::update(&mut frame, 14 + 20 + 16, &old, &new);
    frame
}
