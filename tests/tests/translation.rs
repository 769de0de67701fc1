//! IPv6 clients of tasks that have IPv4 alone, as Docker's own bridge leaves them: served by any node, and known to each task by an
//! address of its own.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use etherparse::{PacketHeaders, TcpOptionElement, TransportHeader};
use lb_common::net::TCP;
use lb_tests::{
    agent::{Agent, active_tasks, json, outcome, text, verb},
    cluster::{CLIENT6, Cluster, Reach},
    frames::assert_frame,
    netns::{eventually, run},
    packet::{IcmpError, Packet, SYN, Transport, assert_checksums},
    traffic::{
        Direction, ask, client, echo, exchange, in_turns, refusal, request_over, requests, stop_echo,
        transfer,
    },
    wire::Wire,
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

const TRANSLATED: Reach = Reach { translated: true, ..Reach::PEERS };
/// What an agent takes for a pool by itself.
const POOL: &str = "198.19.";

/// Two nodes, each with a task that has IPv4 alone.
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

/// Every node's IPv6 address answers from all tasks in turns; a task sees an address of its node's pool, the same one each time, and
/// IPv4 clients as they are.
#[test]
fn tasks_without_ipv6_answer_ipv6_clients_at_every_node() {
    for (mode, direct) in [("native", false), ("tc", true), ("generic", false)] {
        let mut cluster = cluster(Reach { direct, ..TRANSLATED });
        for (name, node) in [("web.1", 0), ("web.2", 0), ("web.3", 1)] {
            cluster.add_nginx(name, node);
        }
        let _agents = attach(&cluster, "\"80:8080\"", &["--mode", mode]);
        let mut known = BTreeSet::new();
        for node in 0..2 {
            let [v4, v6] = cluster.addresses(node);
            let answers = in_turns(3, || requests(&cluster.client, v6, 6));
            for answer in &answers {
                assert!(seen(answer).starts_with(POOL), "{mode}: {answer}");
                let at = if answer.starts_with("web.3") { 1 } else { 0 };
                known.insert((at, seen(answer).to_owned()));
            }
            let answers = in_turns(3, || requests(&cluster.client, v4, 6));
            assert!(answers.iter().all(|answer| seen(answer) == "192.0.2.10"), "{mode}: {answers:?}");
        }
        assert_eq!(known.len(), 2, "{mode}: one address at each node that has tasks: {known:?}");
        for node in &cluster.nodes {
            assert_eq!(outcome(&node.netns, "untranslatable"), 0, "{mode}");
        }
    }
}

/// Whole files in both directions, of a local task and one of another node.
#[test]
fn what_is_sent_arrives_as_it_was() {
    for mode in ["native", "tc", "generic"] {
        for task in 0..2 {
            let mut cluster = cluster(TRANSLATED);
            cluster.add_task("web.1", task);
            let _agents = attach(&cluster, "\"80:8080\"", &["--mode", mode]);
            let to = SocketAddr::new(cluster.addresses(0)[1], 80);
            for direction in [Direction::Up, Direction::Down] {
                transfer(&cluster.client, &cluster.tasks[0].netns, to, direction, 20);
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
    for (family, pool, expected) in [
        ("same", None, ["both.1 saw 2001:db8:1::10", ""]),
        ("auto", None, ["both.1 saw 2001:db8:1::10", "four.2 saw 198.19."]),
        ("translate", None, ["both.1 saw 198.19.", "four.2 saw 198.19."]),
        // Who has no pool translates nobody.
        ("auto", Some("off"), ["both.1 saw 2001:db8:1::10", ""]),
    ] {
        let ports = "ports = [\"80:8080\"]";
        let path = cluster.write(&text.replace(ports, &format!("{ports}\nfamily = \"{family}\"")));
        let options: Vec<&str> = pool.map_or(vec![], |pool| vec!["--v6-pool", pool]);
        let agent = Agent::attach(node, cluster.folder(), &path, &options);
        eventually("both are offered", || active_tasks(node, "web") == 2);
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
    let mut cluster = cluster(TRANSLATED);
    cluster.add_task("dns.1", 1);
    let _agents = attach(&cluster, "\"53:5353/udp\"", &[]);
    for node in 0..2 {
        let to = SocketAddr::new(cluster.addresses(node)[1], 53);
        let nobody = cluster.client.enter(|| refusal(to));
        assert_eq!(nobody, Some(io::ErrorKind::ConnectionRefused), "{to}");
        let server = cluster.tasks[0].netns.spawn(|| echo(5353, "dns.1"));
        eventually("the task listens", || cluster.client.enter(|| ask(to, "there?")).is_some());
        let answer = cluster.client.enter(|| exchange(to, "hello"));
        assert!(answer.starts_with("dns.1 hello 198.19."), "{answer}");
        stop_echo(&cluster.tasks[0].netns, 5353);
        server.join().expect("the server");
    }
}

/// A client, a node and a task that has IPv4 alone, frame by frame; what comes is compared with what etherparse makes of the same
/// fields in the other family.
struct Frames<'a> {
    client: Wire,
    task: Wire,
    gateway: [u8; 6],
    node: [u8; 6],
    ends: Ends,
    /// What takes packets and says nothing, so that no kernel answers them.
    _silent: [UdpSocket; 2],
    _agents: Vec<Agent<'a>>,
}

/// Everybody's addresses.
#[derive(Clone, Copy)]
struct Ends {
    client: (IpAddr, u16),
    listener: (IpAddr, u16),
    task: (IpAddr, u16),
    /// The client as the task knows him.
    alias: (IpAddr, u16),
}

/// Hops that a packet has when it is sent.
const HOPS: u8 = 64;

impl<'a> Frames<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let agents = attach(cluster, "\"53:5353/udp\", \"80:8080\"", &[]);
        let (node, task) = (&cluster.nodes[0], &cluster.tasks[0]);
        let [at_node, at_task] =
            [Wire::open(&node.netns, "eth1").mac, Wire::open(&node.netns, "gwbridge").mac];
        let mut frames = Self {
            client: Wire::open(&cluster.client, "eth1"),
            task: Wire::open(&task.netns, "eth0"),
            gateway: at_task,
            node: at_node,
            ends: Ends {
                client: (CLIENT6.into(), 40_000),
                listener: (node.v6().into(), 53),
                task: (task.v4.into(), 5353),
                alias: (task.v4.into(), 40_000),
            },
            _silent: [
                cluster.client.enter(|| UdpSocket::bind((CLIENT6, 40_000)).expect("bind")),
                task.netns.enter(|| UdpSocket::bind((task.v4, 5353)).expect("bind")),
            ],
            _agents: agents,
        };
        // The first datagram makes the connection, and says who the client is there.
        frames.client.send(&frames.request().bytes());
        let came =
            frames.task.receive(|frame| frame.get(12..14) == Some(&[8, 0])).expect("the first datagram");
        frames.ends.alias.0 = <[u8; 4]>::try_from(&came[26..30]).expect("an address").into();
        assert!(frames.ends.alias.0.to_string().starts_with(POOL), "{:?}", frames.ends.alias);
        frames
    }

    /// A datagram of the client.
    fn request(&self) -> Packet {
        Packet::new(Transport::Udp, self.ends.client, self.ends.listener)
            .with(|packet| packet.macs = (self.client.mac, self.node))
    }

    /// What the task gets of it, short enough to be cut on its way.
    fn requested(&self, request: &Packet) -> Packet {
        let Ends { alias, task, .. } = self.ends;
        request.clone().with(|packet| {
            (packet.source, packet.destination) = (alias.0, task.0);
            packet.destination_port = if request.destination_port == 53 { 5353 } else { 8080 };
            (packet.hops, packet.dont_fragment) = (HOPS - 1, false);
            packet.extensions.clear();
        })
    }

    /// A datagram of the task.
    fn reply(&self) -> Packet {
        Packet::new(Transport::Udp, self.ends.task, self.ends.alias)
            .with(|packet| packet.macs = (self.task.mac, self.gateway))
    }

    /// What the client gets of it.
    fn replied(&self, reply: &Packet) -> Packet {
        let Ends { client, listener, .. } = self.ends;
        reply.clone().with(|packet| {
            (packet.source, packet.destination) = (listener.0, client.0);
            packet.source_port = if reply.source_port == 5353 { 53 } else { 80 };
            packet.hops = HOPS - 1;
            packet.options.clear();
        })
    }

    /// What comes to the task of these frames, from the network header on; identifications that the node chose are put into what is
    /// expected.
    fn to_task(&self, what: &str, sent: &[u8], expected: &[u8], chosen: bool) {
        self.client.send(sent);
        let came = self
            .task
            .receive(|frame| frame.get(12..14) == Some(&[8, 0]) && frame[30..34] == expected[30..34]);
        let came = came.unwrap_or_else(|| panic!("{what}: nothing came to the task"));
        let mut expected = expected.to_vec();
        if chosen {
            expected[18..20].copy_from_slice(&came[18..20]);
            expected[24..26].fill(0);
            let sum = ipv4_sum(&expected[14..34]);
            expected[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        compare(what, &came, &expected);
    }

    fn to_client(&self, what: &str, sent: &[u8], expected: &[u8]) {
        self.task.send(sent);
        let came = self
            .client
            .receive(|frame| frame.get(12..14) == Some(&[0x86, 0xdd]) && frame[38..54] == expected[38..54]);
        compare(what, &came.unwrap_or_else(|| panic!("{what}: nothing came to the client")), expected);
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

/// RFC 7915, 4.1 and 5.1: headers, with and without what may stand between them, and fragments.
#[test]
fn headers_are_those_of_the_other_family() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.reach = TRANSLATED;
    cluster.add_task("web.1", 0);
    let frames = Frames::new(&cluster);
    for length in [0, 1, 2, 7, 1_232 - 20] {
        let request = frames.request().with(|packet| packet.payload = vec![0x5a; length]);
        let expected = frames.requested(&request);
        frames.to_task(&format!("{length} bytes"), &request.bytes(), &expected.bytes(), true);
        let reply = frames.reply().with(|packet| packet.payload = vec![0xa5; length]);
        frames.to_client(&format!("{length} bytes back"), &reply.bytes(), &frames.replied(&reply).bytes());
    }
    // What is longer may not be cut, and has no identification.
    let request = frames.request().with(|packet| packet.payload = vec![1; 1_400]);
    let expected =
        frames.requested(&request).with(|packet| (packet.dont_fragment, packet.identification) = (true, 0));
    frames.to_task("a long datagram", &request.bytes(), &expected.bytes(), false);
    // Traffic class and type of service, the notification of congestion with them.
    let request = frames.request();
    let expected = with_tos(frames.requested(&request).bytes(), 0xbb);
    frames.to_task("a traffic class", &with_tos(request.bytes(), 0xbb), &expected, true);
    let reply = frames.reply();
    let expected = with_tos(frames.replied(&reply).bytes(), 0xbb);
    frames.to_client("a type of service", &with_tos(reply.bytes(), 0xbb), &expected);
    // What IPv4 has nothing for is left out, and so are options.
    for (what, extension) in [
        ("a hop-by-hop header", (0, vec![0, 1, 4, 0, 0, 0, 0])),
        ("destination options", (60, vec![1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
    ] {
        let request = frames.request().with(|packet| packet.extensions = vec![extension]);
        frames.to_task(what, &request.bytes(), &frames.requested(&request).bytes(), true);
    }
    let reply = frames.reply().with(|packet| packet.options = vec![1, 1, 1, 0]);
    frames.to_client("options", &reply.bytes(), &frames.replied(&reply).bytes());
    let _listener =
        cluster.tasks[0].netns.enter(|| TcpListener::bind((cluster.tasks[0].v4, 8080)).expect("listen"));
    // With whole checksums.
    run(cluster.tasks[0].netns.command("ethtool").args(["-K", "eth0", "tx", "off"]));
    // TCP: a SYN says no more of segments than the way back lets pass, of IPv6.
    let syn = Packet::new(SYN, (CLIENT6.into(), 40_001), (frames.ends.listener.0, 80)).with(|packet| {
        packet.macs = (frames.client.mac, frames.node);
        packet.tcp_options = vec![2, 4, 0x05, 0xa0, 1, 3, 3, 7];
        packet.payload.clear();
    });
    frames.to_task("a SYN", &syn.bytes(), &frames.requested(&syn).bytes(), true);
    let is_answer =
        |frame: &[u8]| frame.get(12..14) == Some(&[0x86, 0xdd]) && frame[20] == TCP && frame[67] == 0x12;
    let answer = frames.client.receive(is_answer).expect("the task's kernel answers");
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
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.reach = TRANSLATED;
    cluster.add_task("web.1", 0);
    let frames = Frames::new(&cluster);
    let at = [400, 800];
    let request =
        frames.request().with(|packet| packet.payload = (0..1_000_u32).map(|byte| byte as u8).collect());
    let (sent, expected) = (request.cut(&at), frames.requested(&request).cut(&at));
    for (index, (sent, expected)) in sent.iter().zip(&expected).enumerate() {
        frames.to_task(&format!("fragment {index}"), sent, expected, false);
    }
    let reply = frames.reply().with(|packet| {
        packet.payload = (0..1_000_u32).map(|byte| byte as u8).collect();
        packet.dont_fragment = false;
    });
    let (sent, mut expected) = (reply.cut(&at), frames.replied(&reply).cut(&at));
    for (index, (sent, expected)) in sent.iter().zip(&mut expected).enumerate() {
        // IPv4's number has sixteen bits.
        expected[58..60].fill(0);
        frames.to_client(&format!("fragment {index} of the reply"), sent, expected);
    }
    // One that is the first and the last is whole.
    let mut whole = request.bytes();
    let next = std::mem::replace(&mut whole[20], 44);
    let length = u16::from_be_bytes([whole[18], whole[19]]) + 8;
    whole[18..20].copy_from_slice(&length.to_be_bytes());
    whole.splice(54..54, [next, 0, 0, 0, 1, 2, 3, 4]);
    frames.to_task("an atomic fragment", &whole, &frames.requested(&request).bytes(), true);
}

/// RFC 7915, 4.2 to 4.5 and 5.2 to 5.4: each error that has a counterpart, about what the task sent and about what it was sent.
#[test]
fn errors_quote_what_the_other_side_knows() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.reach = TRANSLATED;
    cluster.add_task("web.1", 0);
    let frames = Frames::new(&cluster);
    let reply = frames.reply().with(|packet| packet.dont_fragment = false);
    let quoted_by_client = frames.replied(&reply).bytes()[14..].to_vec();
    let quoted_by_task = frames.requested(&frames.request()).with(|packet| packet.dont_fragment = false);
    let quoted_by_task = quoted_by_task.bytes()[14..].to_vec();
    let router: IpAddr = "2001:db8:ffff::1".parse().expect("an address");
    let from_router: IpAddr = "198.19.0.1".parse().expect("an address");
    for (from, known_as) in [(frames.ends.client.0, frames.ends.alias.0), (router, from_router)] {
        for (six, four) in [
            ((1, 0, 0), (3, 1, 0)),
            ((1, 1, 0), (3, 10, 0)),
            ((1, 4, 0), (3, 3, 0)),
            ((2, 0, 1_300), (3, 4, 1_280)),
            ((3, 0, 0), (11, 0, 0)),
            ((4, 0, 7), (12, 0, 8 << 24)),
            ((4, 1, 6), (3, 2, 0)),
        ] {
            let sent = IcmpError {
                macs: (frames.client.mac, frames.node),
                from,
                to: frames.ends.listener.0,
                kind: (six.0, six.1),
                rest: six.2,
                hops: HOPS,
                quote: quoted_by_client.clone(),
            };
            // The task sees its own packet, as it left the translator.
            let quote = reply.clone().with(|packet| {
                (packet.hops, packet.identification) = (HOPS - 1, 0);
            });
            let expected = IcmpError {
                from: known_as,
                to: frames.ends.task.0,
                kind: (four.0, four.1),
                rest: four.2,
                hops: HOPS - 1,
                quote: quote.bytes()[14..].to_vec(),
                ..sent.clone()
            };
            frames.to_task(&format!("{six:?} of {from}"), &sent.bytes(), &expected.bytes(), false);
        }
    }
    for (four, six) in [
        ((3, 1, 0), (1, 0, 0)),
        ((3, 2, 0), (4, 1, 6)),
        ((3, 3, 0), (1, 4, 0)),
        ((3, 4, 1_400), (2, 0, 1_420)),
        ((3, 13, 0), (1, 1, 0)),
        ((11, 0, 0), (3, 0, 0)),
        ((12, 0, 8 << 24), (4, 0, 7)),
    ] {
        let sent = IcmpError {
            macs: (frames.task.mac, frames.gateway),
            from: frames.ends.task.0,
            to: frames.ends.alias.0,
            kind: (four.0, four.1),
            rest: four.2,
            hops: HOPS,
            quote: quoted_by_task.clone(),
        };
        let quote = frames.request().with(|packet| packet.hops = HOPS - 1);
        let expected = IcmpError {
            from: frames.ends.listener.0,
            to: frames.ends.client.0,
            kind: (six.0, six.1),
            rest: six.2,
            hops: HOPS - 1,
            quote: quote.bytes()[14..].to_vec(),
            ..sent.clone()
        };
        frames.to_client(&format!("{four:?} of the task"), &sent.bytes(), &expected.bytes());
    }
}

/// A path of 1,280 bytes behind the client: whole files both ways, and datagrams of every length, whoever listens to errors.
#[test]
fn a_narrow_path_to_the_client_loses_nothing() {
    let mut cluster = cluster(TRANSLATED);
    cluster.add_task("web.1", 1);
    let distant = cluster.distant(1_280);
    let _agents = attach(&cluster, "\"80:8080\", \"53:5353/udp\"", &[]);
    for node in 0..2 {
        let at = cluster.addresses(node)[1];
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
                answer.is_some_and(|answer| answer.starts_with(&format!("dns.1 {text} 198.19.")))
            };
            // Of what may not be cut the first is lost while its sender is told what fits, on the way there and back.
            let tries = (0..5).filter(|_| distant.client.enter(came)).count();
            assert!(tries >= 1, "{length} bytes to {to}");
        }
        stop_echo(&cluster.tasks[0].netns, 5353);
        server.join().expect("the server");
    }
}

/// Who it is that a task saw, in every way that it is told; what is known stays when the agent starts again.
#[test]
fn a_client_is_found_by_the_address_that_a_task_saw() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.reach = TRANSLATED;
    cluster.add_nginx("web.1", 0);
    let mut agents = attach(&cluster, "\"80:8080\"", &[]);
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
        agents = vec![Agent::attach(node, cluster.folder(), &path, &[])];
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
    assert!(attach("10.0.0.0/8").contains("a pool has a prefix from /16 to /28"));
}
