//! Clients of tasks that have the other family alone: IPv4, as Docker's own bridge leaves them, or IPv6. They are served by any node, and
//! known to each task by an address of its own.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use etherparse::{PacketHeaders, TcpOptionElement, TransportHeader};
use lb_common::net::{TCP, UDP};
use lb_tests::{
    agent::{Agent, active_tasks, json, outcome, text, verb},
    cluster::{CLIENT4, CLIENT6, Cluster, Families, Reach},
    frames::assert_frame,
    netns::{eventually, run},
    packet::{Checksum, IcmpError, Packet, SYN, Transport, assert_checksums},
    private::{INTERFACE, Private, addresses},
    traffic::{
        Direction, ask, client, echo, exchange, in_turns, let_be_cut, refusal, request_over, requests,
        stop_echo, transfer,
    },
    wire::Wire,
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

const TRANSLATED: Reach = Reach { families: Families::V4, ..Reach::PEERS };
/// What an agent takes for a pool by itself.
const POOL: &str = "198.19.";
/// Behind this a task that has IPv6 alone knows IPv4 clients.
const PREFIX: &str = "64:ff9b:1:6c62::";

/// What a task sees of clients of the family that it does not have, which is the second address of a node's two, or the first.
fn stranger(families: Families) -> (usize, &'static str) {
    if families == Families::V4 { (1, POOL) } else { (0, PREFIX) }
}

/// Two nodes.
fn cluster(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.receive_xdp();
    cluster.reach = reach;
    cluster
}

fn attach<'a>(cluster: &'a Cluster, ports: &str, options: &[&str]) -> Vec<Agent<'a>> {
    let tasks: Vec<_> = cluster.tasks.iter().map(|task| (task, "running")).collect();
    let path = cluster.write(&cluster.file(ports, &tasks));
    let agents: Vec<_> = cluster
        .nodes
        .iter()
        .map(|node| Agent::attach(&node.netns, cluster.folder(), &path, options))
        .collect();
    for node in &cluster.nodes {
        eventually("all tasks are offered", || {
            active_tasks(&node.netns, "web") == cluster.tasks.len() as u64
        });
    }
    agents
}

/// Whom a task saw, of `web.1 saw 198.19.3.7`.
fn seen(answer: &str) -> &str {
    answer.split(" saw ").nth(1).unwrap_or_else(|| panic!("an answer: {answer}")).trim()
}

/// Every node answers clients of both families from all tasks in turns; a task sees those of the one that it does not have by an
/// address of its node's pool, the same one each time, or by their own behind the prefix, and the others as they are.
#[test]
fn tasks_of_one_family_answer_clients_of_both_at_every_node() {
    for (families, mode, direct) in [
        (Families::V4, "native", false),
        (Families::V4, "tc", true),
        (Families::V4, "generic", false),
        (Families::V6, "native", false),
        (Families::V6, "tc", true),
        (Families::V6, "generic", false),
    ] {
        let mut cluster = cluster(Reach { direct, families, ..Reach::PEERS });
        for (name, node) in [("web.1", 0), ("web.2", 0), ("web.3", 1)] {
            cluster.add_nginx(name, node);
        }
        let _agents = attach(&cluster, "\"80:8080\"", &["--mode", mode]);
        let (strange, known_as) = stranger(families);
        let own = [CLIENT4.to_string(), CLIENT6.to_string()];
        let mut known = BTreeSet::new();
        for node in 0..2 {
            let at = cluster.addresses(node);
            let answers = in_turns(3, || requests(&cluster.client, at[strange], 6));
            for answer in &answers {
                assert!(seen(answer).starts_with(known_as), "{families:?} {mode}: {answer}");
                let at = if answer.starts_with("web.3") { 1 } else { 0 };
                known.insert((at, seen(answer).to_owned()));
            }
            let answers = in_turns(3, || requests(&cluster.client, at[1 - strange], 6));
            let as_is = answers.iter().all(|answer| seen(answer) == own[1 - strange]);
            assert!(as_is, "{families:?} {mode}: {answers:?}");
        }
        assert_eq!(known.len(), 2, "{families:?} {mode}: one address at each node that has tasks: {known:?}");
        for node in &cluster.nodes {
            assert_eq!(outcome(&node.netns, "untranslatable"), 0, "{families:?} {mode}");
        }
        let shown = text(&cluster.nodes[0].netns, &["service", "ps", "web"]);
        let address = cluster.tasks[0].address();
        assert!(shown.contains(&SocketAddr::new(address, 8080).to_string()), "{shown}");
    }
}

/// Clients of two uplinks, each of which has tables of its own: what a task answers goes to the right one's.
#[test]
fn each_of_several_uplinks_translates_for_its_own_clients() {
    for families in [Families::V4, Families::V6] {
        let mut cluster = Cluster::new(1);
        cluster.receive_xdp();
        cluster.reach = Reach { families, ..Reach::PEERS };
        cluster.add_nginx("web.1", 0);
        let private = Private::wire(&cluster, 1_500);
        let other = private.netns();
        other.ip("addr add 10.99.0.250/24 dev lanbr");
        other.ip("addr add fd99::250/64 dev lanbr nodad");
        let (node, path) = (&cluster.nodes[0], cluster.write_all_running());
        let _agent = Agent::attach(&node.netns, cluster.folder(), &path, &["--iface", INTERFACE]);
        eventually("the task is offered", || active_tasks(&node.netns, "web") == 1);
        let (strange, _) = stranger(families);
        let mut known = BTreeSet::new();
        for _ in 0..3 {
            for (client, at) in [(&cluster.client, cluster.addresses(0)), (other, addresses(node))] {
                known.extend(requests(client, at[strange], 2).iter().map(|answer| seen(answer).to_owned()));
            }
        }
        assert_eq!(known.len(), 2, "{families:?}: an address for each: {known:?}");
    }
}

/// Whole files in both directions, of a local task and one of another node.
#[test]
fn what_is_sent_arrives_as_it_was() {
    for families in [Families::V4, Families::V6] {
        for mode in ["native", "tc", "generic"] {
            for task in 0..2 {
                let mut cluster = cluster(Reach { families, ..Reach::PEERS });
                cluster.add_task("web.1", task);
                let _agents = attach(&cluster, "\"80:8080\"", &["--mode", mode]);
                let to = SocketAddr::new(cluster.addresses(0)[stranger(families).0], 80);
                for direction in [Direction::Up, Direction::Down] {
                    transfer(&cluster.client, &cluster.tasks[0].netns, to, direction, 20);
                }
            }
        }
    }
}

/// What `family` says of a service with two tasks, one with both families and one with IPv4 alone; and that IPv4 clients are served by
/// both, whatever it says.
#[test]
fn who_is_translated_is_a_service_s_choice() {
    let mut cluster = cluster(Reach::PEERS);
    let both = cluster.add_nginx("both.1", 0);
    let four = cluster.add_nginx("four.2", 0);
    let disable = ["-qw", "net.ipv6.conf.all.disable_ipv6=1"];
    run(cluster.tasks[four].netns.command("sysctl").args(disable));
    let tasks = [both, four].map(|task| (&cluster.tasks[task], "running"));
    let text = cluster.file("\"80:8080\"", &tasks);
    let text = text.replace(&format!(", \"{}\"", cluster.tasks[four].v6), "");
    let (node, [at_v4, at_v6]) = (&cluster.nodes[0].netns, cluster.addresses(0));
    let as_is = format!("both.1 saw {CLIENT6}");
    for (family, pool, active, expected) in [
        ("same", None, 2, [as_is.as_str(), ""]),
        ("auto", None, 2, [&as_is, "four.2 saw 198.19."]),
        ("translate", None, 2, ["both.1 saw 198.19.", "four.2 saw 198.19."]),
        // Who has no pool translates nobody, and says of the task that IPv6 does not reach it.
        ("auto", Some("off"), 1, [&as_is, ""]),
    ] {
        let ports = "ports = [\"80:8080\"]";
        let path = cluster.write(&text.replace(ports, &format!("{ports}\nfamily = \"{family}\"")));
        let options: Vec<&str> = pool.map_or(vec![], |pool| vec!["--v6-pool", pool]);
        let agent = Agent::attach(node, cluster.folder(), &path, &options);
        eventually("they are offered", || active_tasks(node, "web") == active);
        let wanted: Vec<&str> = expected.into_iter().filter(|answer| !answer.is_empty()).collect();
        let answers = in_turns(wanted.len(), || requests(&cluster.client, at_v6, 8));
        let told = |answer: &&str| answers.iter().any(|one| one.starts_with(answer));
        assert!(wanted.iter().all(told), "{family}, {pool:?}: {answers:?}");
        let known = |answer: &String| wanted.iter().any(|one| answer.starts_with(one));
        assert!(answers.iter().all(known), "{family}, {pool:?}: {answers:?}");
        let answers = in_turns(2, || requests(&cluster.client, at_v4, 8));
        assert!(answers.iter().all(|answer| seen(answer) == "192.0.2.10"), "{family}: {answers:?}");
        drop(agent);
    }
}

/// Datagrams, and the error where nobody listens.
#[test]
fn datagrams_and_errors_are_translated() {
    for families in [Families::V4, Families::V6] {
        let mut cluster = cluster(Reach { families, ..Reach::PEERS });
        cluster.add_task("dns.1", 1);
        let _agents = attach(&cluster, "\"53:5353/udp\"", &[]);
        let (strange, known_as) = stranger(families);
        for node in 0..2 {
            let to = SocketAddr::new(cluster.addresses(node)[strange], 53);
            let nobody = cluster.client.enter(|| refusal(to));
            assert_eq!(nobody, Some(io::ErrorKind::ConnectionRefused), "{to}");
            let server = cluster.tasks[0].netns.spawn(|| echo(5353, "dns.1"));
            eventually("the task listens", || cluster.client.enter(|| ask(to, "there?")).is_some());
            let answer = cluster.client.enter(|| exchange(to, "hello"));
            assert!(answer.starts_with(&format!("dns.1 hello {known_as}")), "{answer}");
            stop_echo(&cluster.tasks[0].netns, 5353);
            server.join().expect("the server");
        }
    }
}

/// A client, a node and a task that has one family alone, frame by frame; what comes is compared with what etherparse makes of the same
/// fields in the other family.
struct Frames<'a> {
    /// Where packets are IPv6: the client, or the task that has it alone.
    six: Side,
    /// Where they are IPv4.
    four: Side,
    /// Whether the task has IPv6.
    task_has_six: bool,
    /// What takes packets and says nothing, so that no kernel answers them.
    _silent: [UdpSocket; 2],
    _agents: Vec<Agent<'a>>,
}

/// One end of the connection, and whom it speaks to.
struct Side {
    wire: Wire,
    gateway: [u8; 6],
    from: (IpAddr, u16),
    to: (IpAddr, u16),
}

impl Side {
    /// A datagram from here.
    fn packet(&self) -> Packet {
        Packet::new(Transport::Udp, self.from, self.to)
            .with(|packet| packet.macs = (self.wire.mac, self.gateway))
    }

    /// An error from here.
    fn error(&self, from: IpAddr, (kind, code, rest): (u8, u8, u32), quote: Vec<u8>) -> IcmpError {
        let macs = (self.wire.mac, self.gateway);
        IcmpError { macs, from, to: self.to.0, kind: (kind, code), rest, hops: HOPS, quote }
    }

    /// Gives a packet the addresses and ports by which who is here knows its ends.
    fn known(&self, packet: &mut Packet) {
        ((packet.source, packet.source_port), (packet.destination, packet.destination_port)) =
            (self.to, self.from);
    }
}

/// Hops that a packet has when it is sent.
const HOPS: u8 = 64;

impl<'a> Frames<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let agents = attach(cluster, "\"53:5353/udp\", \"80:8080\"", &[]);
        let (node, task) = (&cluster.nodes[0], &cluster.tasks[0]);
        let mac = |interface: &str| Wire::open(&node.netns, interface).mac;
        let task_has_six = task.address().is_ipv6();
        let (client, listener): ([IpAddr; 2], [IpAddr; 2]) =
            ([CLIENT6.into(), CLIENT4.into()], [node.v6().into(), node.v4().into()]);
        let family = usize::from(task_has_six);
        let at_client = Side {
            wire: Wire::open(&cluster.client, "eth1"),
            gateway: mac("eth1"),
            from: (client[family], 40_000),
            to: (listener[family], 53),
        };
        let mut at_task = Side {
            wire: Wire::open(&task.netns, "eth0"),
            gateway: mac("gwbridge"),
            from: (task.address(), 5353),
            to: (task.address(), 40_000),
        };
        let silent = [
            cluster.client.enter(|| UdpSocket::bind(at_client.from).expect("bind")),
            task.netns.enter(|| UdpSocket::bind(at_task.from).expect("bind")),
        ];
        // The first datagram makes the connection, and says who the client is there.
        at_client.wire.send(&at_client.packet().bytes());
        let ours: fn(&[u8]) -> bool = match task_has_six {
            true => |frame| frame.get(12..14) == Some(&[0x86, 0xdd]) && frame[20] == UDP,
            false => |frame| frame.get(12..14) == Some(&[8, 0]) && frame[23] == UDP,
        };
        let came = at_task.wire.receive(ours).expect("the first datagram");
        at_task.to.0 = match task_has_six {
            true => <[u8; 16]>::try_from(&came[22..38]).expect("an address").into(),
            false => <[u8; 4]>::try_from(&came[26..30]).expect("an address").into(),
        };
        let known_as = if task_has_six { PREFIX } else { POOL };
        assert!(at_task.to.0.to_string().starts_with(known_as), "{:?}", at_task.to);
        let (six, four) = if task_has_six { (at_task, at_client) } else { (at_client, at_task) };
        Self { six, four, task_has_six, _silent: silent, _agents: agents }
    }

    /// What becomes of a packet of IPv6, short enough to be cut on its way.
    fn in_four(&self, packet: &Packet) -> Packet {
        packet.clone().with(|packet| {
            self.four.known(packet);
            (packet.hops, packet.dont_fragment) = (HOPS - 1, false);
            packet.extensions.clear();
        })
    }

    /// What becomes of a packet of IPv4.
    fn in_six(&self, packet: &Packet) -> Packet {
        packet.clone().with(|packet| {
            self.six.known(packet);
            packet.hops = HOPS - 1;
            packet.options.clear();
        })
    }

    /// What comes of these frames where packets are IPv4, from the network header on; identifications that the node chose are put into
    /// what is expected.
    fn to_four(&self, what: &str, sent: &[u8], expected: &[u8], chosen: bool) {
        self.six.wire.send(sent);
        let is_it = |frame: &[u8]| {
            frame.get(12..14) == Some(&[8, 0])
                && frame[23] == expected[23]
                && frame[30..34] == expected[30..34]
        };
        let came = self.four.wire.receive(is_it);
        let came = came.unwrap_or_else(|| panic!("{what}: nothing came"));
        let mut expected = expected.to_vec();
        if chosen {
            expected[18..20].copy_from_slice(&came[18..20]);
            expected[24..26].fill(0);
            let sum = ipv4_sum(&expected[14..34]);
            expected[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        compare(what, &came, &expected);
    }

    /// The same where they are IPv6.
    fn to_six(&self, what: &str, sent: &[u8], expected: &[u8]) {
        self.four.wire.send(sent);
        let is_it = |frame: &[u8]| {
            frame.get(12..14) == Some(&[0x86, 0xdd])
                && frame[20] == expected[20]
                && frame[38..54] == expected[38..54]
        };
        let came = self.six.wire.receive(is_it);
        compare(what, &came.unwrap_or_else(|| panic!("{what}: nothing came")), expected);
    }
}

/// Does it with a task of either family.
fn with_frames(check: impl Fn(&Frames<'_>, &Cluster)) {
    for families in [Families::V4, Families::V6] {
        let mut cluster = Cluster::new(1);
        cluster.receive_xdp();
        cluster.reach = Reach { families, ..Reach::PEERS };
        cluster.add_task("web.1", 0);
        check(&Frames::new(&cluster), &cluster);
    }
}

/// The checksum of an IPv4 header whose own is zero.
fn ipv4_sum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Compares what came from the network header on; who sends it on the last wire is not the translator's business.
fn compare(what: &str, came: &[u8], expected: &[u8]) {
    assert_frame(what, &[&expected[..14], &came[14..]].concat(), expected);
}

/// A byte of the traffic class and of the type of service.
fn with_tos(mut frame: Vec<u8>, tos: u8) -> Vec<u8> {
    if frame[12..14] == [8, 0] {
        frame[15] = tos;
        frame[24..26].fill(0);
        let sum = ipv4_sum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        (frame[14], frame[15]) = (0x60 | tos >> 4, tos << 4);
    }
    frame
}

/// RFC 7915, 4.1 and 5.1: headers, with and without what may stand between them.
#[test]
fn headers_are_those_of_the_other_family() {
    with_frames(|frames, cluster| {
        let (six, four) = (frames.six.packet(), frames.four.packet());
        for length in [0, 1, 2, 7, 1_232 - 20] {
            let with =
                |packet: &Packet, byte| packet.clone().with(|packet| packet.payload = vec![byte; length]);
            let (one, other) = (with(&six, 0x5a), with(&four, 0xa5));
            let expected = frames.in_four(&one).bytes();
            frames.to_four(&format!("{length} bytes of IPv6"), &one.bytes(), &expected, true);
            let expected = frames.in_six(&other).bytes();
            frames.to_six(&format!("{length} bytes of IPv4"), &other.bytes(), &expected);
        }
        // Nobody outside is whom a task may take for another client.
        let node = &cluster.nodes[0].netns;
        let (client, before) =
            (if frames.task_has_six { &frames.four } else { &frames.six }, outcome(node, "martian"));
        let disguised: IpAddr = "64:ff9b:1:6c62::c000:207".parse().expect("an address");
        let forged = Packet::new(Transport::Udp, (disguised, 40_001), (node_v6(cluster), 53))
            .with(|packet| packet.macs = (client.wire.mac, client.gateway));
        client.wire.send(&forged.bytes());
        eventually("it is refused", || outcome(node, "martian") == before + 1);
        // IPv6 has no datagram without a checksum (RFC 8200, 8.1): it is given one.
        for length in [0, 1, 510, 1_400] {
            let none = four.clone().with(|packet| {
                packet.payload = (0..length as u32).map(|byte| (byte * 7) as u8).collect();
                packet.checksum = Checksum::None;
            });
            let expected = frames.in_six(&none).with(|packet| packet.checksum = Checksum::Full);
            frames.to_six(&format!("{length} bytes without a checksum"), &none.bytes(), &expected.bytes());
        }
        // What is longer may not be cut, and has no identification.
        let long = six.clone().with(|packet| packet.payload = vec![1; 1_400]);
        let expected =
            frames.in_four(&long).with(|packet| (packet.dont_fragment, packet.identification) = (true, 0));
        frames.to_four("a long datagram", &long.bytes(), &expected.bytes(), false);
        // Traffic class and type of service, the notification of congestion with them.
        let expected = with_tos(frames.in_four(&six).bytes(), 0xbb);
        frames.to_four("a traffic class", &with_tos(six.bytes(), 0xbb), &expected, true);
        let expected = with_tos(frames.in_six(&four).bytes(), 0xbb);
        frames.to_six("a type of service", &with_tos(four.bytes(), 0xbb), &expected);
        // What IPv4 has nothing for is left out, and so are options.
        for (what, extension) in [
            ("a hop-by-hop header", (0, vec![0, 1, 4, 0, 0, 0, 0])),
            ("destination options", (60, vec![1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        ] {
            let long = six.clone().with(|packet| packet.extensions = vec![extension]);
            frames.to_four(what, &long.bytes(), &frames.in_four(&long).bytes(), true);
        }
        let long = four.clone().with(|packet| packet.options = vec![1, 1, 1, 0]);
        frames.to_six("options", &long.bytes(), &frames.in_six(&long).bytes());
        segments_are_those_that_fit(frames, cluster);
    });
}

fn node_v6(cluster: &Cluster) -> IpAddr {
    cluster.addresses(0)[1]
}

/// A SYN of the client says no more of segments than the way back lets pass, and the task no more than it takes.
fn segments_are_those_that_fit(frames: &Frames<'_>, cluster: &Cluster) {
    let task = &cluster.tasks[0];
    let _listener = task.netns.enter(|| TcpListener::bind((task.address(), 8080)).expect("listen"));
    // With whole checksums.
    run(task.netns.command("ethtool").args(["-K", "eth0", "tx", "off"]));
    let (client, at_task) =
        if frames.task_has_six { (&frames.four, &frames.six) } else { (&frames.six, &frames.four) };
    let syn = Packet::new(SYN, (client.from.0, 40_001), (client.to.0, 80)).with(|packet| {
        packet.macs = (client.wire.mac, client.gateway);
        packet.tcp_options = vec![2, 4, 0x05, 0xa0, 1, 3, 3, 7];
        packet.payload.clear();
    });
    let expected = syn.clone().with(|packet| {
        (packet.source, packet.destination) = (at_task.to.0, at_task.from.0);
        (packet.destination_port, packet.hops) = (8080, HOPS - 1);
        packet.dont_fragment = false;
    });
    let is_answer: fn(&[u8]) -> bool = match frames.task_has_six {
        true => |frame| frame.get(12..14) == Some(&[8, 0]) && frame[23] == TCP && frame[47] == 0x12,
        false => |frame| frame.get(12..14) == Some(&[0x86, 0xdd]) && frame[20] == TCP && frame[67] == 0x12,
    };
    if frames.task_has_six {
        frames.to_six("a SYN", &syn.bytes(), &expected.bytes());
    } else {
        frames.to_four("a SYN", &syn.bytes(), &expected.bytes(), true);
    }
    let answer = client.wire.receive(is_answer).expect("the task's kernel answers");
    assert_checksums(&answer);
    let parsed = PacketHeaders::from_ethernet_slice(&answer).expect("a frame");
    let Some(TransportHeader::Tcp(header)) = parsed.transport else { panic!("TCP") };
    let says = header.options_iterator().flatten().find_map(|option| match option {
        TcpOptionElement::MaximumSegmentSize(size) => Some(size),
        _ => None,
    });
    assert_eq!(says, Some(1_440));
}

/// RFC 7915, 4.1, 5.1.1: fragments, first ones and others.
#[test]
fn fragments_stay_fragments() {
    with_frames(|frames, _| {
        let at = [400, 800];
        let payload: Vec<u8> = (0..1_000_u32).map(|byte| byte as u8).collect();
        let six = frames.six.packet().with(|packet| packet.payload.clone_from(&payload));
        let (sent, expected) = (six.cut(&at), frames.in_four(&six).cut(&at));
        for (index, (sent, expected)) in sent.iter().zip(&expected).enumerate() {
            frames.to_four(&format!("fragment {index} of IPv6"), sent, expected, false);
        }
        let four = frames.four.packet().with(|packet| {
            packet.payload.clone_from(&payload);
            packet.dont_fragment = false;
        });
        let (sent, mut expected) = (four.cut(&at), frames.in_six(&four).cut(&at));
        for (index, (sent, expected)) in sent.iter().zip(&mut expected).enumerate() {
            // IPv4's number has sixteen bits.
            expected[58..60].fill(0);
            frames.to_six(&format!("fragment {index} of IPv4"), sent, expected);
        }
        // One that is the first and the last is whole.
        let six = frames.six.packet();
        let mut whole = six.bytes();
        let next = std::mem::replace(&mut whole[20], 44);
        let length = u16::from_be_bytes([whole[18], whole[19]]) + 8;
        whole[18..20].copy_from_slice(&length.to_be_bytes());
        whole.splice(54..54, [next, 0, 0, 0, 1, 2, 3, 4]);
        frames.to_four("an atomic fragment", &whole, &frames.in_four(&six).bytes(), true);
    });
}

/// RFC 7915, 4.2 to 4.5 and 5.2 to 5.4: each error that has a counterpart, about what either side sent.
#[test]
fn errors_quote_what_the_other_side_knows() {
    with_frames(|frames, _| {
        let Frames { six, four, task_has_six, .. } = frames;
        // Sent by each side, and as the other one has got it.
        let sent_six = six.packet();
        let got_four = frames.in_four(&sent_six).bytes()[14..].to_vec();
        let sent_four = four.packet().with(|packet| packet.dont_fragment = false);
        let got_six = frames.in_six(&sent_four).bytes()[14..].to_vec();
        // A router by which a client's packets come is known by an address of the pool, or by its own.
        let (router6, in_four): (IpAddr, IpAddr) =
            ("2001:db8:ffff::1".parse().expect("an address"), "198.19.0.1".parse().expect("an address"));
        let (router4, in_six): (IpAddr, IpAddr) = (
            "203.0.113.77".parse().expect("an address"),
            "64:ff9b:1:6c62::cb00:714d".parse().expect("an address"),
        );
        let senders = [(six.from.0, four.to.0), (router6, in_four)];
        for (from, known_as) in senders.into_iter().take(if *task_has_six { 1 } else { 2 }) {
            for (says, becomes) in [
                ((1, 0, 0), (3, 1, 0)),
                ((1, 1, 0), (3, 10, 0)),
                ((1, 4, 0), (3, 3, 0)),
                ((2, 0, 1_300), (3, 4, 1_280)),
                ((3, 0, 0), (11, 0, 0)),
                ((4, 0, 7), (12, 0, 8 << 24)),
                ((4, 1, 6), (3, 2, 0)),
            ] {
                let sent = six.error(from, says, got_six.clone());
                // Who gets it sees his own packet, as it left the translator.
                let quote = sent_four.clone().with(|packet| {
                    (packet.hops, packet.identification) = (HOPS - 1, 0);
                });
                let expected = four.error(known_as, becomes, quote.bytes()[14..].to_vec());
                let expected = IcmpError { to: four.from.0, hops: HOPS - 1, ..expected };
                frames.to_four(&format!("{says:?} of {from}"), &sent.bytes(), &expected.bytes(), false);
            }
        }
        let senders = [(four.from.0, six.to.0), (router4, in_six)];
        for (from, known_as) in senders.into_iter().take(if *task_has_six { 2 } else { 1 }) {
            for (says, becomes) in [
                ((3, 1, 0), (1, 0, 0)),
                ((3, 2, 0), (4, 1, 6)),
                ((3, 3, 0), (1, 4, 0)),
                ((3, 4, 1_400), (2, 0, 1_420)),
                ((3, 13, 0), (1, 1, 0)),
                ((11, 0, 0), (3, 0, 0)),
                ((12, 0, 8 << 24), (4, 0, 7)),
            ] {
                let sent = four.error(from, says, got_four.clone());
                let quote = sent_six.clone().with(|packet| packet.hops = HOPS - 1);
                let expected = six.error(known_as, becomes, quote.bytes()[14..].to_vec());
                let expected = IcmpError { to: six.from.0, hops: HOPS - 1, ..expected };
                frames.to_six(&format!("{says:?} of {from}"), &sent.bytes(), &expected.bytes());
            }
        }
    });
}

/// Answers datagrams with their lengths, until told to stop by an empty one.
fn count(port: u16) {
    let socket = UdpSocket::bind(("::", port)).expect("bind");
    let mut buffer = [0; 9_000];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).expect("receive");
        if length == 0 {
            return;
        }
        socket.send_to(length.to_string().as_bytes(), from).expect("send");
    }
}

/// What grows too long for the task's interface is cut there if it may be, and else its sender is told what fits.
#[test]
fn what_grows_too_long_for_the_task_is_cut_or_answered() {
    let mut cluster = cluster(Reach { families: Families::V6, ..Reach::PEERS });
    cluster.add_task("dns.1", 0);
    let _agents = attach(&cluster, "\"53:5353/udp\"", &[]);
    let server = cluster.tasks[0].netns.spawn(|| count(5353));
    let node = &cluster.nodes[0].netns;
    let to = SocketAddr::new(cluster.addresses(0)[0], 53);
    eventually("the task listens", || cluster.client.enter(|| ask(to, "there?")).is_some());
    // 1,452 bytes of payload are 1,500 of IPv6.
    for (length, pieces) in [(1_400, 0), (1_452, 0), (1_453, 1), (1_460, 1), (1_472, 1)] {
        let before = outcome(node, "fragmented");
        let answer = cluster.client.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
            let_be_cut(&socket);
            socket.send_to(&vec![b'x'; length], to).expect("send");
            let mut buffer = [0; 100];
            let (bytes, _) = socket.recv_from(&mut buffer).expect("an answer");
            String::from_utf8_lossy(&buffer[..bytes]).into_owned()
        });
        assert_eq!(answer, length.to_string());
        assert_eq!(outcome(node, "fragmented") - before, pieces, "{length} bytes");
    }
    // Who forbids it is told by the task's listener, and what he sends then arrives.
    let told = outcome(node, "too_big");
    let came = || ask(to, &"x".repeat(1_472)) == Some("1472".into());
    assert!(!cluster.client.enter(came), "the first one is too long");
    assert_eq!(outcome(node, "too_big") - told, 1);
    let routes = cluster.client.output("ip", &["route", "get", &to.ip().to_string()]);
    assert!(routes.contains("mtu 1480"), "{routes}");
    assert!(cluster.client.enter(came), "the second one is cut by its sender");
    stop_echo(&cluster.tasks[0].netns, 5353);
    server.join().expect("the server");
}

/// A path of 1,280 bytes behind the client: whole files both ways, and datagrams of every length, whoever listens to errors.
#[test]
fn a_narrow_path_to_the_client_loses_nothing() {
    for families in [Families::V4, Families::V6] {
        let mut cluster = cluster(Reach { families, ..Reach::PEERS });
        cluster.add_task("web.1", 1);
        let distant = cluster.distant(1_280);
        let _agents = attach(&cluster, "\"80:8080\", \"53:5353/udp\"", &[]);
        let (strange, known_as) = stranger(families);
        for node in 0..2 {
            let at = cluster.addresses(node)[strange];
            for direction in [Direction::Up, Direction::Down] {
                transfer(&distant.client, &cluster.tasks[0].netns, SocketAddr::new(at, 80), direction, 5);
            }
            let server = cluster.tasks[0].netns.spawn(|| echo(5353, "dns.1"));
            let to = SocketAddr::new(at, 53);
            eventually("the task listens", || distant.client.enter(|| ask(to, "there?")).is_some());
            for length in [1_000, 1_232, 1_300, 1_452, 2_000, 4_000] {
                let text = "x".repeat(length);
                let came = || {
                    let answer = ask(to, &text);
                    answer.is_some_and(|answer| answer.starts_with(&format!("dns.1 {text} {known_as}")))
                };
                // Of what may not be cut the first is lost while its sender is told what fits, on the way there and back.
                let tries = (0..5).filter(|_| distant.client.enter(came)).count();
                assert!(tries >= 1, "{length} bytes to {to}");
            }
            stop_echo(&cluster.tasks[0].netns, 5353);
            server.join().expect("the server");
        }
    }
}

/// Who it is that a task saw, in every way that it is told; what is known stays when the agent starts again.
#[test]
fn a_client_is_found_by_the_address_that_a_task_saw() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.reach = TRANSLATED;
    cluster.add_nginx("web.1", 0);
    let mut agents = attach(&cluster, "\"80:8080\"", &["--log-connections"]);
    let (node, at) = (&cluster.nodes[0].netns, cluster.addresses(0)[1]);
    let alias = seen(&requests(&cluster.client, at, 1)[0]).to_owned();
    for _ in 0..2 {
        assert_eq!(text(node, &["clients", &alias]).trim(), CLIENT6.to_string());
        let known = json(node, &["clients"]);
        let known = known["clients"].as_array().expect("a list");
        assert_eq!(known.len(), 1, "{known:?}");
        assert_eq!(
            (known[0]["address"].as_str(), known[0]["confirmed"].as_bool()),
            (Some(alias.as_str()), Some(true))
        );
        let asked = |address: &str| {
            let path = format!("http://127.0.0.1:9464/api/v1/client?address={address}");
            node.enter(|| {
                let got = client().get(&path).call();
                got.map(|mut got| got.body_mut().read_to_string().expect("a text"))
                    .map_err(|error| error.to_string())
            })
        };
        assert!(asked(&alias).expect("an answer").contains(&format!("\"client\":\"{CLIENT6}\"")));
        assert!(asked("198.19.255.254").unwrap_err().contains("404"));
        assert!(asked("[::1]").unwrap_err().contains("400"));
        eventually("the log says it", || {
            agents[0].log().contains(&format!("eth1: tasks know {CLIENT6} as {alias}"))
        });
        // A connection says both.
        let stream = cluster.client.enter(|| TcpStream::connect((at, 80)).expect("connect"));
        let shown = text(node, &["connections", "--filter", "state=established"]);
        let both = format!("]:{} as {alias}", stream.local_addr().expect("an address").port());
        eventually("the connection is established", || {
            text(node, &["connections"]).lines().any(|line| line.contains(&both)) || shown.contains(&both)
        });
        drop(stream);
        // The next agent finds what this one knew.
        agents.pop().expect("an agent").stop(Signal::SIGTERM);
        let path = cluster.folder().join("cluster.toml");
        agents = vec![Agent::attach(node, cluster.folder(), &path, &["--log-connections"])];
        eventually("the task is offered", || active_tasks(node, "web") == 1);
        assert_eq!(seen(&requests(&cluster.client, at, 1)[0]), alias);
    }
}

/// A pool that is too small for all has room for those who exist: who never answers a task gives way.
#[test]
fn who_does_not_exist_takes_no_address_from_who_does() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.reach = TRANSLATED;
    cluster.add_nginx("web.1", 0);
    let _agents = attach(&cluster, "\"80:8080\"", &["--v6-pool", "100.127.0.0/28"]);
    let (node, at) = (&cluster.nodes[0].netns, cluster.addresses(0)[1]);
    let wire = Wire::open(&cluster.client, "eth1");
    let to = Wire::open(node, "eth1").mac;
    let mut open = Vec::new();
    for number in 0..10_u16 {
        // Forged ones between them, more than there are addresses.
        for forged in 0..32_u16 {
            let from: IpAddr =
                format!("2001:db8:{:x}::{:x}", 0x100 + forged, number + 1).parse().expect("an address");
            let syn = Packet::new(SYN, (from, 1_024 + forged), (at, 80))
                .with(|packet| packet.macs = (wire.mac, to));
            wire.send(&syn.bytes());
        }
        let own: std::net::Ipv6Addr = format!("2001:db8:1::a{number:x}").parse().expect("an address");
        cluster.client.ip(&format!("address add {own}/64 dev eth1 nodad"));
        let mut stream = cluster.client.enter(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("a socket");
            socket.bind(&SocketAddr::new(own.into(), 0).into()).expect("bind");
            let connected = socket.connect_timeout(&SocketAddr::new(at, 80).into(), Duration::from_secs(10));
            if let Err(error) = connected {
                panic!("client {number}: {error}:\n{}", text(node, &["clients"]));
            }
            TcpStream::from(socket)
        });
        let answer = request_over(&mut stream).expect("an answer");
        open.push((seen(&answer).to_owned(), stream));
    }
    let known: BTreeSet<&str> = open.iter().map(|(alias, _)| alias.as_str()).collect();
    assert_eq!(known.len(), open.len(), "each is another client's: {known:?}");
    // All of them go on as whom they were.
    for (alias, stream) in &mut open {
        assert_eq!(seen(&request_over(stream).expect("an answer")), alias);
    }
}

/// A range that something of the node has already is no pool.
#[test]
fn a_pool_of_addresses_that_the_node_has_is_refused() {
    let mut cluster = Cluster::new(1);
    cluster.reach = TRANSLATED;
    cluster.add_nginx("web.1", 0);
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let attach = |pool: &str| {
        let path = path.to_string_lossy();
        let done = verb(node, &["attach", "--iface", "eth1", "--cluster", &path, "--v6-pool", pool]);
        assert!(!done.status.success());
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    assert!(
        attach("172.18.0.0/16")
            .contains("gwbridge has 172.18.1.0/24, of which tasks would know IPv6 clients")
    );
    assert!(attach("192.0.2.0/28").contains("take a range that nothing on this node uses"));
    // Also what the node only has a route to, and what a container has on a network of its own.
    node.ip("route add 100.126.0.0/15 via 192.0.2.10");
    assert!(attach("100.127.0.0/16").contains("there is a route to 100.126.0.0/15"));
    cluster.tasks[0].netns.ip("address add 100.125.7.1/24 dev lo");
    assert!(attach("100.125.0.0/16").contains("a container behind hv"));
    assert!(attach("10.0.0.0/8").contains("a pool has a prefix from /16 to /28"));
}
