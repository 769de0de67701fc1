//! Datagrams of every length, on networks that let less pass than their senders think: every one arrives.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    thread::JoinHandle,
    time::Duration,
};

use lb_common::abi::size;
use lb_tests::{
    agent::{Agent, active_tasks, outcome},
    cluster::{CLIENT4, CLIENT6, Cluster, Reach, Task},
    netns::{Netns, eventually, run},
    packet::{Packet, Transport},
    private::Private,
    traffic::{Direction, let_be_cut, stop_echo, transfer},
};
use nix::{
    sched::{CpuSet, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};
use socket2::{Domain, Protocol, Socket, Type};

const PORT: u16 = 5353;
/// With the headers more than one frame of every link here, but for the first.
const LENGTHS: [usize; 6] = [1_200, 1_392, 1_460, 1_472, 2_900, 4_000];
/// What a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same where the first datagrams are lost by rights.
const IMPATIENCE: Duration = Duration::from_millis(500);
/// Datagrams that client and task together may lose while they are told what fits, with some to spare for a busy machine.
const TRIES: usize = 6;

/// What a sender does about the length of a path (`ip(7)`, `ipv6(7)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sender {
    /// It lets its datagrams be cut, and believes no error (`IP_PMTUDISC_OMIT`).
    Deaf,
    /// It forbids to cut them, and makes them shorter when told to (`IP_PMTUDISC_WANT`, the default).
    Listens,
}

impl Sender {
    /// A socket on a port of all addresses.
    fn bind(self, any: &str, port: u16) -> UdpSocket {
        let socket = UdpSocket::bind((any, port)).expect("bind");
        if self == Self::Deaf {
            let_be_cut(&socket);
        }
        socket
    }

    /// Whether a datagram comes back as it was, from where it was sent to.
    fn echoes(self, to: SocketAddr, length: usize, patience: Duration) -> bool {
        let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
        let socket = self.bind(any, 0);
        socket.set_read_timeout(Some(patience)).expect("set a time limit");
        let sent: Vec<u8> = (0..length).map(|index| (index % 251) as u8 & 0xfe).collect();
        socket.send_to(&sent, to).expect("send");
        let mut buffer = [0; 9_000];
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                assert_eq!(from, to, "the answer comes from the listener");
                assert!(sent.ends_with(&buffer[..length]), "the answer is what was sent, or the end of it");
                assert!(length == sent.len() || length == SHORT, "{length} bytes came back");
                true
            }
            Err(_) => false,
        }
    }
}

/// Sends back what comes, or the last bytes of it, until it is told to stop.
fn serve(sender: Sender, most: usize) {
    let socket = sender.bind("::", PORT);
    let mut buffer = [0; 9_000];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).expect("receive");
        if length == 0 {
            return;
        }
        socket.send_to(&buffer[length.saturating_sub(most)..length], from).expect("send");
    }
}

/// A cluster of which one task sends back what comes to port 53 of each node.
struct Echo {
    cluster: Cluster,
    server: Option<JoinHandle<()>>,
}

impl Echo {
    fn new(nodes: u8, reach: Reach, sender: Sender) -> Self {
        Self::with_answers(nodes, reach, sender, usize::MAX)
    }

    /// Of which each has so many bytes at most.
    fn with_answers(nodes: u8, reach: Reach, sender: Sender, most: usize) -> Self {
        let mut cluster = Cluster::new(nodes);
        cluster.receive_xdp();
        cluster.reach = reach;
        let at = cluster.add_task("dns.1", usize::from(nodes) - 1);
        let server = cluster.tasks[at].netns.spawn(move || serve(sender, most));
        let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
        cluster.write(&cluster.file(&format!("\"53:{PORT}/udp\", \"80:8080\""), &tasks));
        Self { cluster, server: Some(server) }
    }

    fn attach(&self, mode: &str) -> Vec<Agent<'_>> {
        let path = self.cluster.folder().join("cluster.toml");
        let folder = self.cluster.folder();
        let attach = |number: usize| {
            Agent::attach(&self.cluster.nodes[number].netns, folder, &path, &["--mode", mode])
        };
        let agents = (0..self.cluster.nodes.len()).map(attach).collect();
        for node in &self.cluster.nodes {
            eventually("the task is offered", || active_tasks(&node.netns, "web") == 1);
        }
        agents
    }

    /// How many packets all nodes have counted as this.
    fn counted(&self, name: &str) -> u64 {
        self.cluster.nodes.iter().map(|node| outcome(&node.netns, name)).sum()
    }

    fn echoes(&self, sender: Sender, address: IpAddr, length: usize) -> bool {
        self.echoes_to(&self.cluster.client, sender, address, length)
    }

    /// Whether a datagram comes back once both ends have been told what fits.
    fn echoes_when_told(&self, client: &Netns, address: IpAddr, length: usize) -> bool {
        let to = SocketAddr::new(address, 53);
        client.enter(|| (0..TRIES).any(|_| Sender::Listens.echoes(to, length, IMPATIENCE)))
    }

    fn echoes_to(&self, client: &Netns, sender: Sender, address: IpAddr, length: usize) -> bool {
        client.enter(|| sender.echoes(SocketAddr::new(address, 53), length, PATIENCE))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        stop_echo(&self.cluster.tasks[0].netns, PORT);
        if let Some(server) = self.server.take() {
            server.join().expect("the server");
        }
    }
}

const PEERS: Reach = Reach::PEERS;
const DIRECT: Reach = Reach { direct: true, ..Reach::PEERS };
const OVER_V6: Reach = Reach { outer_v6: true, ..Reach::PEERS };
const MODES: [&str; 3] = ["native", "generic", "tc"];

#[test]
fn datagrams_that_may_be_cut_are_cut_and_none_is_lost() {
    let reaches = [
        (PEERS, &[1500, 1280][..], &MODES[..]),
        (DIRECT, &[1450], &MODES[..1]),
        (OVER_V6, &[1400], &MODES[2..]),
    ];
    for (reach, mtus, modes) in reaches {
        let echo = Echo::new(2, reach, Sender::Deaf);
        for (mtu, mode) in mtus.iter().flat_map(|mtu| modes.iter().map(|mode| (*mtu, *mode))) {
            echo.cluster.set_mtu(mtu);
            let _agents = echo.attach(mode);
            for node in [0, 1] {
                let before = echo.counted("fragmented");
                for length in LENGTHS {
                    let address = echo.cluster.addresses(node)[0];
                    let arrives = echo.echoes(Sender::Deaf, address, length);
                    assert!(arrives, "{reach:?}, {mode}, {mtu}, {length} bytes to node {}", node + 1);
                }
                let cut = echo.counted("fragmented") - before;
                assert_eq!(cut > 0, node == 0, "{mode}, {mtu}, node {}: {cut} were cut", node + 1);
            }
            assert_eq!(
                (echo.counted("too_big"), echo.counted("fragment")),
                (0, 0),
                "{reach:?}, {mode}, {mtu}"
            );
        }
    }
}

/// Nothing is cut into more than it has to be.
#[test]
fn a_jumbo_datagram_is_cut_in_two() {
    let echo = Echo::with_answers(2, PEERS, Sender::Deaf, SHORT);
    for (mtu, mode) in [(9000, "native"), (8500, "generic"), (8500, "tc")] {
        echo.cluster.set_mtu(mtu);
        let _agents = echo.attach(mode);
        let sent = || outcome(&echo.cluster.nodes[0].netns, "forwarded_peer");
        let address = echo.cluster.addresses(0)[0];
        // Once the way between the nodes has been measured.
        eventually("two fragments", || {
            let before = sent();
            // What fills a frame of the client's.
            assert!(echo.echoes(Sender::Deaf, address, mtu as usize - 28), "{mode}, {mtu}");
            sent() - before == 2
        });
        assert_eq!(echo.counted("too_big"), 0, "{mode}, {mtu}");
    }
}

/// Who says that nothing may be cut is told what fits, and has it arrive from then on.
#[test]
fn datagrams_of_who_listens_arrive_when_he_has_been_told() {
    let echo = Echo::new(2, PEERS, Sender::Listens);
    for (mtu, mode) in [(1500, "native"), (1450, "generic"), (1280, "tc")] {
        echo.cluster.set_mtu(mtu);
        let _agents = echo.attach(mode);
        for address in [0, 1].map(|node| echo.cluster.addresses(node)).concat() {
            for length in LENGTHS {
                let arrives = echo.echoes_when_told(&echo.cluster.client, address, length);
                assert!(arrives, "{mode}, {mtu}, {length} bytes to {address}");
            }
        }
    }
}

/// No sender of IPv6 makes its packets shorter than 1,280 bytes: what the tunnel has no room for then, nodes cut.
#[test]
fn ipv6_has_its_1280_bytes_whatever_the_tunnel_takes_of_them() {
    for reach in [PEERS, OVER_V6] {
        let echo = Echo::new(2, reach, Sender::Listens);
        echo.cluster.set_mtu(1280);
        for mode in MODES {
            let _agents = echo.attach(mode);
            let before = echo.counted("fragmented");
            for node in [0, 1] {
                for length in [1_160, 1_200, 1_232, 2_900, 4_000] {
                    let arrives = echo.echoes(Sender::Listens, echo.cluster.addresses(node)[1], length);
                    assert!(arrives, "{reach:?}, {mode}, {length} bytes to node {}", node + 1);
                }
            }
            assert!(echo.counted("fragmented") > before, "{reach:?}, {mode}: cut");
            assert_eq!(echo.counted("too_big"), 0, "{reach:?}, {mode}");
        }
    }
}

/// A task's link is Docker's bridge, of 1,500 bytes whatever the node's own has.
#[test]
fn a_local_task_s_datagrams_are_cut_to_fit_its_node_s_uplink() {
    let echo = Echo::new(1, Reach::default(), Sender::Deaf);
    for (mtu, mode) in [(1450, "native"), (1400, "generic"), (1280, "tc")] {
        echo.cluster.set_uplink_mtu(0, mtu);
        echo.cluster.client.ip(&format!("link set eth1 mtu {mtu}"));
        let _agents = echo.attach(mode);
        let before = echo.counted("fragmented");
        for length in LENGTHS {
            let [v4, v6] = echo.cluster.addresses(0);
            assert!(echo.echoes(Sender::Deaf, v4, length), "{mode}, {mtu}, {length} bytes");
            // Of IPv6 the task is told.
            let arrives = echo.echoes_when_told(&echo.cluster.client, v6, length);
            assert!(arrives, "{mode}, {mtu}, {length} bytes to {v6}");
        }
        assert!(echo.counted("fragmented") > before, "{mode}, {mtu}: cut");
    }
}

/// Uplinks of the node that the client uses and of the task's, in bytes, and how both are attached. The client, behind two
/// routers, and the task have 1,500.
const UNEQUAL: [(u32, u32, &str); 5] = [
    (1280, 1500, "native"),
    (1500, 1280, "tc"),
    (1400, 9000, "generic"),
    (9000, 1450, "native"),
    (1450, 1400, "tc"),
];

/// On one network the way between the nodes is as narrow as the narrower uplink. Where they have a network of their own, what comes out
/// of the tunnel fits an uplink because its node has told the others what that lets pass.
#[test]
fn everything_arrives_whatever_each_node_s_uplink_lets_pass() {
    for (private, pairs) in [(false, &UNEQUAL[..2]), (true, &UNEQUAL[..])] {
        let echo = Echo::new(2, Reach { private, ..PEERS }, Sender::Deaf);
        let _private = private.then(|| Private::wire(&echo.cluster, 9000));
        let distant = echo.cluster.distant(1500);
        let echoes = |sender, address, length| echo.echoes_to(&distant.client, sender, address, length);
        for (index, (client_s, task_s, mode)) in pairs.iter().copied().enumerate() {
            let what = format!("a network between the nodes {private}, {client_s} and {task_s}, {mode}");
            println!("{what}");
            echo.cluster.set_uplink_mtu_behind(&distant.near, 0, client_s);
            echo.cluster.set_uplink_mtu_behind(&distant.near, 1, task_s);
            let offloads = if index % 2 == 0 { "on" } else { "off" };
            let mut ethtool = distant.client.command("ethtool");
            run(ethtool.args(["-K", "eth1", "tso", offloads, "gso", offloads, "gro", offloads]));
            // Nobody remembers what he was told before.
            echo.cluster.tasks[0].add_routes();
            distant.client.ip("route replace default via 198.51.100.1");
            distant.client.ip("route replace default via 2001:db8:3::1");
            let _agents = echo.attach(mode);
            let first = [0, 1].map(|node| echo.cluster.addresses(node)[0]);
            for address in first {
                // Once the way between the nodes has been measured.
                eventually(&what, || echoes(Sender::Deaf, address, 1_472));
            }
            let before = echo.counted("too_big");
            for (address, length) in first.iter().flat_map(|at| LENGTHS.map(|length| (*at, length))) {
                assert!(echoes(Sender::Deaf, address, length), "{what}: {length} bytes to {address}");
            }
            for address in [0, 1].map(|node| echo.cluster.addresses(node)).concat() {
                for direction in [Direction::Up, Direction::Down] {
                    let to = SocketAddr::new(address, 80);
                    transfer(&distant.client, &echo.cluster.tasks[0].netns, to, direction, 5);
                }
            }
            assert_eq!(echo.counted("too_big"), before, "{what}: datagrams are cut, and segments fit");
            for address in [0, 1].map(|node| echo.cluster.addresses(node)[1]) {
                for length in LENGTHS {
                    let arrives = echo.echoes_when_told(&distant.client, address, length);
                    assert!(arrives, "{what}: {length} bytes to {address}");
                }
            }
            if private {
                // What an uplink lets pass changes while all are at work.
                echo.cluster.set_uplink_mtu_behind(&distant.near, 0, client_s.min(1_360));
                eventually(&format!("{what}, then less"), || echoes(Sender::Deaf, first[0], 1_472));
            }
        }
    }
}

/// A server of short answers, outside of tasks.
struct Server<'a> {
    at: &'a Netns,
    thread: Option<JoinHandle<()>>,
}

impl<'a> Server<'a> {
    fn start(at: &'a Netns) -> Self {
        Self { at, thread: Some(at.spawn(|| serve(Sender::Deaf, SHORT))) }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        stop_echo(self.at, PORT);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server");
        }
    }
}

/// Bytes of an answer that is never too long.
const SHORT: usize = 1_000;

/// Sends a datagram in fragments of 1,200 bytes, in this order, from a socket's port; whether it comes back.
fn in_fragments(socket: &UdpSocket, to: SocketAddr, number: u16, order: &[usize]) -> bool {
    let own = socket.local_addr().expect("an address");
    let sent: Vec<u8> = (0..4_000_u32).map(|index| (index % 251) as u8 ^ number as u8).collect();
    let packet = Packet::new(Transport::Udp, (own.ip(), own.port()), (to.ip(), to.port()))
        .with(|packet| (packet.identification, packet.dont_fragment) = (number, false))
        .with(|packet| packet.payload.clone_from(&sent));
    let fragments = packet.cut(&[1_200, 2_400, 3_600]);
    let domain = Domain::for_address(to);
    // Of a thread that goes from one CPU to another what it sent later may come first.
    let here = sched_getcpu().expect("a CPU");
    let mut one = CpuSet::new();
    one.set(here).expect("a CPU");
    sched_setaffinity(Pid::from_raw(0), &one).expect("stay on it");
    // With the network header (`raw(7)`).
    let raw = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).expect("a socket");
    let destination = SocketAddr::new(to.ip(), 0).into();
    for index in order {
        raw.send_to(&fragments[*index][14..], &destination).expect("send");
    }
    let mut buffer = [0; 9_000];
    match socket.recv_from(&mut buffer) {
        Ok((length, from)) => {
            assert_eq!(from, to, "the answer comes from the listener");
            assert!(buffer[..length] == sent[sent.len() - SHORT..], "the answer is the end of what was sent");
            true
        }
        Err(_) => false,
    }
}

fn bound(address: IpAddr) -> UdpSocket {
    let own = if address.is_ipv4() { IpAddr::from(CLIENT4) } else { CLIENT6.into() };
    let socket = UdpSocket::bind((own, 0)).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
    socket
}

/// Fragments come last first, or mixed: what comes before the first one is held for it. It may be the host's, and is passed on as
/// well. Who floods a node with such fragments keeps nobody else's from it for longer than he does.
#[test]
fn fragments_arrive_in_any_order_and_the_host_has_its_own() {
    let echo = Echo::with_answers(2, PEERS, Sender::Deaf, SHORT);
    let host = Server::start(&echo.cluster.nodes[0].netns);
    let orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 2, 3, 0]];
    for mode in MODES {
        let _agents = echo.attach(mode);
        for (index, order) in orders.iter().enumerate() {
            for address in [0, 1].map(|node| echo.cluster.addresses(node)).concat() {
                let number = 100 + index as u16;
                let ask = || in_fragments(&bound(address), SocketAddr::new(address, 53), number, order);
                assert!(echo.cluster.client.enter(ask), "{mode}, {order:?} to {address}");
            }
            for address in echo.cluster.addresses(0) {
                let before = echo.counted("fragment");
                let number = 200 + index as u16;
                let ask = || in_fragments(&bound(address), SocketAddr::new(address, PORT), number, order);
                assert!(echo.cluster.client.enter(ask), "{mode}, {order:?} to the host at {address}");
                // What came before the first one was held, and passed on.
                let early = order.iter().take_while(|fragment| **fragment != 0).count() as u64;
                assert_eq!(echo.counted("fragment") - before, early, "{mode}, {order:?} to {address}");
            }
        }
        let address = echo.cluster.addresses(0)[0];
        echo.cluster.client.enter(|| {
            let socket = bound(address);
            let to = SocketAddr::new(address, 53);
            let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
            let raw = raw.expect("a socket");
            let flood = Packet::new(Transport::Udp, (CLIENT4.into(), 9), (address, 53))
                .with(|packet| packet.payload = vec![1; 1_400])
                .with(|packet| packet.dont_fragment = false);
            // More than there is room for here, and less than the host's own reassembly gives up at.
            for number in 1_000..1_000 + size::EARLY_FRAGMENTS as u16 + 100 {
                let early = flood.clone().with(|packet| packet.identification = number).cut(&[504]);
                raw.send_to(&early[1][14..], &SocketAddr::new(address, 0).into()).expect("send");
            }
            assert!(in_fragments(&socket, to, 300, &orders[0]), "{mode}: in order, after a flood");
            assert!(in_fragments(&socket, to, 301, &orders[1]), "{mode}: reversed, after a flood");
        });
    }
    drop(host);
}
