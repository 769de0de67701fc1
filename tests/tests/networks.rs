//! Networks as operators have them: links that let less pass than the client's, and than the tasks'.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use lb_common::{
    abi::{TC_ALONE, program, table},
    host_flow::{HOST_FLOW_SECONDS, HostFlow},
    outcome::Outcome,
};
use lb_tests::{
    agent::{Agent, active_tasks, outcome, program as agent_program, text, verb},
    cluster::{CLIENT4, CLIENT6, Cluster},
    lab::{Lab, REDIRECT, UNSPEC, ip, service, task, with_lab},
    netns::{Netns, Running, eventually, run, within},
    packet::{ACK, IcmpError, Packet, SYN, SYN_ACK, Transport, assert_checksums},
    traffic::{Direction, echo, exchange, in_turns, listen, requests, stop_echo, tally, transfer},
};
use lb_userspace::{
    cluster::{Access, Via},
    datapath::PinDir,
};
use socket2::{Domain, Socket, Type};

/// Bytes that a transfer carries: more than any window.
const MEGABYTES: usize = 5;

/// Client, listener and local task of one family, and the bytes of its headers with TCP's.
const FAMILIES: [(&str, &str, &str, u16); 2] =
    [("198.51.100.7", "192.0.2.1", "172.18.0.11", 40), ("2001:db8:77::7", "2001:db8::1", "fd18::11", 60)];

fn set_uplink_mtu(mtu: u16) {
    run(std::process::Command::new("ip").args(["link", "set", "eth1", "mtu", &mtu.to_string()]));
}

fn with_local_task(test: impl FnOnce(&mut Lab) + Send) {
    let tasks = vec![task("web.1", true, Via::Peer, &["172.18.0.11", "fd18::11"])];
    with_lab(vec![service("web", &["80:8080", "80:8080/udp"], tasks)], test);
}

/// A TCP option that offers a maximum segment size.
fn segment_size(size: u16) -> Vec<u8> {
    let [high, low] = size.to_be_bytes();
    vec![2, 4, high, low]
}

/// The size that a frame's last option offers: SYNs of these tests have no other, and no payload.
fn offered(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[frame.len() - 2], frame[frame.len() - 1]])
}

#[test]
fn segments_of_local_tasks_fit_the_uplink() {
    with_local_task(|lab| {
        lab.configure(|config| config.flags = TC_ALONE);
        for (port, mtu) in [(40_000, 1280), (40_001, 1450), (40_002, 1500), (40_003, 9000)] {
            set_uplink_mtu(mtu);
            for (client, listener, task, headers) in FAMILIES {
                let what = format!("{client} through {mtu}");
                let kept = 1460.min(mtu - headers);
                let syn = Packet::new(SYN, (ip(client), port), (ip(listener), 80)).at(1_000, 0);
                let syn = syn.with(|packet| packet.tcp_options = segment_size(1460));
                let delivered = lab.uplink_tc(&syn.bytes());
                assert_eq!((delivered.action, offered(&delivered.frame)), (REDIRECT, kept), "{what}");
                assert_checksums(&delivered.frame);
                let back = Packet::new(SYN_ACK, (ip(task), 8080), (ip(client), port)).at(7_000, 1_001);
                let back = back.with(|packet| packet.tcp_options = segment_size(1460));
                let answered = lab.task_tc(&back.bytes());
                assert_eq!((answered.action, offered(&answered.frame)), (REDIRECT, kept), "{what}");
                assert_checksums(&answered.frame);
            }
        }
    });
}

#[test]
fn a_local_task_s_reply_that_is_too_long_for_the_uplink_is_answered_with_the_length() {
    with_local_task(|lab| {
        set_uplink_mtu(1400);
        for (client, listener, task, headers) in FAMILIES {
            for transport in [ACK, Transport::Udp] {
                let opening = if transport == Transport::Udp { Transport::Udp } else { SYN };
                let _ = lab.xdp(&Packet::new(opening, (ip(client), 40_000), (ip(listener), 80)).bytes());
                let header = headers - 20 + if transport == Transport::Udp { 8 } else { 20 };
                let reply = |bytes: u16| {
                    Packet::new(transport, (ip(task), 8080), (ip(client), 40_000))
                        .with(|packet| packet.payload = vec![7; usize::from(bytes - header)])
                };
                let (fits, counted) = lab.counting(|lab| lab.task_tc(&reply(1400).bytes()));
                assert_eq!(fits.action, REDIRECT);
                assert_eq!(counted, [(Outcome::Reply, 1)].into());
                let long = reply(1401);
                let (refused, counted) = lab.counting(|lab| lab.task_tc(&long.bytes()));
                let error = IcmpError {
                    macs: (long.macs.1, long.macs.0),
                    from: ip(client),
                    to: ip(task),
                    kind: if headers == 40 { (3, 4) } else { (2, 0) },
                    rest: 1400,
                    hops: 64,
                    quote: long.bytes()[14..14 + 504].to_vec(),
                };
                assert_eq!(
                    (refused.action, refused.frame),
                    (REDIRECT, error.bytes()),
                    "{client} {transport:?}"
                );
                assert_eq!(counted, [(Outcome::TooBig, 1)].into());
            }
        }
    });
}

/// One node with one task, behind an uplink of this MTU; the client's own is 1500.
fn narrow(mtu: u32) -> Cluster {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_task("web.1", 0);
    cluster.set_uplink_mtu(0, mtu);
    cluster
}

fn attach<'a>(cluster: &'a Cluster, mode: &str) -> Agent<'a> {
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let agent = Agent::attach(node, cluster.folder(), &path, &["--mode", mode]);
    eventually("the task is offered", || active_tasks(node, "web") == 1);
    agent
}

#[test]
fn a_download_from_a_local_task_fits_an_uplink_narrower_than_the_client_s() {
    for mtu in [1280, 1450] {
        let cluster = narrow(mtu);
        for mode in ["native", "generic", "tc"] {
            let _agent = attach(&cluster, mode);
            for address in cluster.addresses(0) {
                for direction in [Direction::Up, Direction::Down] {
                    let to = SocketAddr::new(address, 80);
                    transfer(&cluster.client, &cluster.tasks[0].netns, to, direction, MEGABYTES);
                }
            }
            assert_eq!(outcome(&cluster.nodes[0].netns, "too_big"), 0, "{mode}: segments fit from the start");
        }
    }
}

#[test]
fn a_connection_goes_on_when_its_uplink_becomes_narrower() {
    for mode in ["native", "tc"] {
        let cluster = narrow(1500);
        let _agent = attach(&cluster, mode);
        for address in cluster.addresses(0) {
            cluster.set_uplink_mtu(0, 1500);
            let listener = cluster.tasks[0].netns.enter(|| listen("[::]:8080"));
            let mut stream = cluster.client.enter(|| {
                TcpStream::connect_timeout(&SocketAddr::new(address, 80), Duration::from_secs(10))
                    .expect("connect")
            });
            let (mut served, _) = listener.accept().expect("a client");
            cluster.set_uplink_mtu(0, 1400);
            let sender = cluster.tasks[0].netns.spawn(move || {
                served.write_all(&vec![7; MEGABYTES * 1_000_000]).expect("send");
            });
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a time limit");
            let mut received = Vec::new();
            stream.read_to_end(&mut received).expect("receive");
            sender.join().expect("the server");
            assert_eq!(received.len(), MEGABYTES * 1_000_000, "{mode} {address}");
            // Its segments are learnt anew by the next connection.
            run(cluster.tasks[0].netns.command("ip").args(["route", "flush", "cache"]));
            run(cluster.tasks[0].netns.command("ip").args(["-6", "route", "flush", "cache"]));
        }
        assert!(outcome(&cluster.nodes[0].netns, "too_big") > 0, "{mode}: the task is told");
    }
}

/// Sends a frame out of an interface of this namespace, of which so many bytes lie together and the rest in pieces.
fn send_in_pieces(interface: &str, frame: &[u8], together: u16) {
    const PACKET_VNET_HDR: libc::c_int = 15;
    let index = nix::net::if_::if_nametoindex(interface).expect("an interface");
    let socket = Socket::new(Domain::PACKET, Type::RAW, None).expect("a packet socket");
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int that lives across the call.
    let done = unsafe {
        let value = (&raw const on).cast();
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_VNET_HDR,
            value,
            size_of_val(&on) as u32,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    // `struct virtio_net_hdr`: no checksum, no segments, and the length of the headers. The kernel allocates a buffer for
    // these, and pages for the rest of what is longer than a page.
    let [low, high] = together.to_le_bytes();
    let bytes = [&[0, 0, low, high, 0, 0, 0, 0, 0, 0], frame].concat();
    // SAFETY: all zeroes is an address; the fields that matter are set.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = index as i32;
    // SAFETY: both buffers live across the call, and their lengths are theirs.
    let sent = unsafe {
        let (address, length) = ((&raw const to).cast(), size_of_val(&to) as u32);
        libc::sendto(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0, address, length)
    };
    assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
}

#[test]
fn headers_that_lie_in_pieces_are_read() {
    let mut cluster = Cluster::new(1);
    cluster.add_nginx("web.1", 0);
    cluster.set_mtu(9000);
    let node = &cluster.nodes[0].netns;
    let path = cluster.write_all_running();
    let _agent = Agent::attach(node, cluster.folder(), &path, &["--mode", "tc"]);
    eventually("the task is offered", || active_tasks(node, "web") == 1);
    let mac = |netns: &Netns| {
        let said: serde_json::Value =
            serde_json::from_str(&netns.output("ip", &["-j", "link", "show", "eth1"])).expect("JSON");
        let mac = said[0]["address"].as_str().expect("an address").to_owned();
        let bytes: Vec<u8> =
            mac.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
        <[u8; 6]>::try_from(bytes).expect("six bytes")
    };
    let macs = (mac(&cluster.client), mac(node));
    let mut port = 40_000;
    for (client, listener) in [IpAddr::from(CLIENT4), CLIENT6.into()].into_iter().zip(cluster.addresses(0)) {
        for together in [14, 20, 34, 54, 60, 64, 70, 80, 100] {
            port += 1;
            let packet = Packet::new(SYN, (client, port), (listener, 80)).with(|packet| {
                packet.macs = macs;
                packet.tcp_options = segment_size(1460);
                packet.payload = vec![0; 5_000];
            });
            let before = outcome(node, "forwarded_reply");
            cluster.client.enter(|| send_in_pieces("eth1", &packet.bytes(), together));
            eventually(&format!("{listener}, {together} bytes together: the task answers"), || {
                outcome(node, "forwarded_reply") > before
            });
        }
    }
}

/// The port that the host itself sends from, and a service has published.
const SHARED: u16 = 51_820;
/// Where the host asks.
const ASKED: u16 = 5_000;

/// When the host last sent from a published port, by between whom.
fn host_flows() -> HashMap<MapData, HostFlow, u32> {
    let pins = PinDir::of("eth1").expect("the pins");
    let map = MapData::from_pin(pins.table(table::HOST_FLOWS)).expect("the table");
    HashMap::try_from(Map::LruHashMap(map)).expect("its kind")
}

#[test]
fn what_answers_the_host_s_own_datagrams_is_not_taken_for_a_request() {
    with_local_task(|lab| {
        for (flags, tuple) in [(0, 0), (TC_ALONE, 1)] {
            lab.configure(|config| config.flags = flags);
            for (client, listener, ..) in FAMILIES {
                let what = format!("{client}, flags {flags}");
                let datagram = |from: u16, to: u16| {
                    Packet::new(Transport::Udp, (ip(client), from), (ip(listener), to)).bytes()
                };
                let arrives = |lab: &Lab, frame: &[u8]| {
                    let run = |lab: &Lab| if flags == 0 { lab.xdp(frame) } else { lab.uplink_tc(frame) };
                    lab.counting(run).1
                };
                let leaves = |lab: &Lab, from: u16, to: u16| {
                    let packet = Packet::new(Transport::Udp, (ip(listener), from), (ip(client), to));
                    let frame = packet.bytes();
                    let uplink = lab.uplink;
                    let (verdict, counted) =
                        lab.counting(|lab| lab.tc(program::UPLINK_EGRESS, &frame, uplink));
                    assert_eq!((verdict.action, &verdict.frame), (UNSPEC, &frame), "{what}");
                    assert_eq!(counted, [].into(), "{what}");
                };
                let port = 40_000 + 10 * tuple;
                let (local, host) = ([(Outcome::Local, 1)].into(), [(Outcome::HostFlow, 1)].into());
                // A client that is served already stays so.
                assert_eq!(arrives(lab, &datagram(port + 2, 80)), local, "{what}");
                for asked in [port, port + 2] {
                    leaves(lab, 80, asked);
                    leaves(lab, 80, asked);
                }
                assert_eq!(arrives(lab, &datagram(port + 2, 80)), local, "{what}");
                assert_eq!(arrives(lab, &datagram(port, 80)), host, "{what}: the answer");
                assert_eq!(arrives(lab, &datagram(port + 1, 80)), local, "{what}: another client's port");
                let syn = Packet::new(SYN, (ip(client), port), (ip(listener), 80));
                assert_eq!(arrives(lab, &syn.bytes()), local, "{what}: TCP");
                // Nobody publishes this one.
                let before = host_flows().keys().count();
                leaves(lab, 81, port);
                assert_eq!(host_flows().keys().count(), before, "{what}");
                assert_eq!(arrives(lab, &datagram(port, 81)), [(Outcome::NotOurs, 1)].into(), "{what}");
                // Who may not connect may not answer either: Swarm's mesh would serve him.
                let open = |lab: &mut Lab, open: bool| {
                    let access = if open { Access::default() } else { Access::closed() };
                    lab.update(|cluster| Arc::make_mut(&mut cluster.services[0]).access = access);
                };
                open(lab, false);
                assert_eq!(arrives(lab, &datagram(port, 80)), [(Outcome::Denied, 1)].into(), "{what}");
                open(lab, true);
                // The host has been silent for a while, and for longer.
                let (mut flows, now) = (host_flows(), lab.jiffies());
                for (seconds, expected) in [(HOST_FLOW_SECONDS - 1, &host), (HOST_FLOW_SECONDS + 1, &local)] {
                    let seen = now.wrapping_sub(seconds * lab.datapath().config().jiffies_per_second);
                    let keys: Vec<HostFlow> = flows.keys().map(|key| key.expect("a key")).collect();
                    for key in keys {
                        flows.insert(key, seen, 0).expect("age it");
                    }
                    assert_eq!(&arrives(lab, &datagram(port, 80)), expected, "{what}, {seconds} s later");
                }
            }
        }
    });
}

#[test]
fn the_host_may_send_from_a_port_that_a_service_publishes() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    let task = cluster.add_task("web.1", 0);
    let path =
        cluster.write(&cluster.file(&format!("\"{SHARED}:8080/udp\""), &[(&cluster.tasks[task], "running")]));
    let (node, client) = (&cluster.nodes[0].netns, &cluster.client);
    let served = cluster.tasks[task].netns.spawn(|| echo(8080, "web.1"));
    let outside = client.spawn(|| echo(ASKED, "outside"));
    for (mode, from) in [("native", 1), ("generic", 2), ("tc", 3)] {
        let _agent = Agent::attach(node, cluster.folder(), &path, &["--mode", mode]);
        eventually("the task is offered", || active_tasks(node, "web") == 1);
        for (own, other) in cluster.addresses(0).into_iter().zip([IpAddr::from(CLIENT4), CLIENT6.into()]) {
            let answered = node.enter(|| {
                // As dockerd holds each published port.
                let socket = Socket::new(Domain::for_address(SocketAddr::new(own, 0)), Type::DGRAM, None)
                    .expect("a socket");
                socket.set_reuse_address(true).expect("share the port");
                socket.bind(&SocketAddr::new(own, SHARED).into()).expect("bind");
                let socket = UdpSocket::from(socket);
                socket.connect((other, ASKED)).expect("connect");
                socket.set_read_timeout(Some(Duration::from_secs(10))).expect("set a time limit");
                let mut buffer = [0; 100];
                let length = (0..from).map(|_| {
                    socket.send(b"question").expect("send");
                    socket.recv(&mut buffer).expect("the answer to the host")
                });
                let length = length.last().expect("at least one");
                String::from_utf8_lossy(&buffer[..length]).into_owned()
            });
            assert_eq!(answered, format!("outside question {own}"), "{mode}");
            let asked = client.enter(|| exchange(SocketAddr::new(own, SHARED), "request"));
            assert_eq!(asked, format!("web.1 request {other}"), "{mode}");
        }
        // What tasks reply leaves by the same port, and is known as ours.
        let noted = node.enter(|| host_flows().keys().map(|key| key.expect("a key")).collect::<Vec<_>>());
        let of_host = |flow: &HostFlow| (flow.local_port.get(), flow.remote_port.get()) == (SHARED, ASKED);
        assert_eq!(outcome(node, "host_flow"), 2 * from, "{mode}");
        assert!(noted.len() == 2 && noted.iter().all(of_host), "{mode}: {noted:?}");
    }
    stop_echo(&cluster.tasks[task].netns, 8080);
    stop_echo(client, ASKED);
    served.join().expect("the task");
    outside.join().expect("the server outside");
}

/// Two nodes with a task of nginx each.
fn two_nodes() -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    cluster.receive_xdp();
    for node in 0..2 {
        cluster.add_nginx(&format!("web.{}", node + 1), node);
    }
    cluster
}

/// A virtual address is served by whoever gets its packets, from the first one on: the node has it later, on another interface,
/// or never.
#[test]
fn an_address_that_is_named_is_served_before_the_node_has_it() {
    const VIRTUAL: [&str; 2] = ["203.0.113.200", "2001:db8:9::200"];
    let cluster = two_nodes();
    let path = cluster.write_all_running();
    let named = VIRTUAL.join(",");
    for mode in ["native", "tc"] {
        let arguments = ["--mode", mode, "--address", &named];
        let _agents: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &arguments))
            .collect();
        for (number, node) in cluster.nodes.iter().enumerate() {
            eventually("both tasks are offered", || active_tasks(&node.netns, "web") == 2);
            for (address, router) in VIRTUAL.into_iter().zip(cluster.addresses(number)) {
                cluster.client.ip(&format!("route replace {address} via {router}"));
                let seen: IpAddr = if router.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() };
                let rotates = |when: &str| {
                    let what = format!("{mode}, {address} at {}, {when}", node.name);
                    let answers = in_turns(2, || requests(&cluster.client, ip(address), 4));
                    assert!(answers.iter().all(|answer| answer.ends_with(&format!("saw {seen}"))), "{what}");
                };
                rotates("before it has it");
                node.netns.ip(&format!("addr add {address} dev lo"));
                rotates("when it has it elsewhere");
                node.netns.ip(&format!("addr del {address} dev lo"));
            }
        }
    }
}

#[test]
fn an_interface_by_which_nobody_comes_is_refused_with_what_to_take_instead() {
    let cluster = Cluster::new(1);
    let path = cluster.write(&cluster.file("\"80:8080\"", &[]));
    let node = &cluster.nodes[0].netns;
    node.ip("tuntap add dev tun0 mode tun");
    node.ip("link add br0 type bridge");
    node.ip("link add port0 type veth peer name port1");
    node.ip("link set port0 master br0");
    let path = path.to_str().expect("text");
    for (interface, said) in [
        ("tun0", "tun0 has no Ethernet header (WireGuard, tun, PPP, GRE)"),
        ("port0", "port0 is a port of the bridge br0, which has the addresses: take --iface br0"),
    ] {
        let refused = verb(node, &["attach", "--iface", interface, "--cluster", path, "--listen", "none"]);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{error}");
        assert!(error.contains(said), "{error}");
        let left = node.enter(|| PinDir::of(interface).is_ok_and(|pins| pins.exists().expect("bpffs")));
        assert!(!left, "nothing of {interface} is pinned");
    }
}

#[test]
fn an_uplink_that_is_given_another_name_serves_on() {
    let cluster = two_nodes();
    let path = cluster.write_all_running();
    let nodes = cluster.nodes.iter();
    let agents: Vec<_> = nodes.map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    let node = &cluster.nodes[0].netns;
    let to = cluster.addresses(0)[0];
    let counts = || tally(&requests(&cluster.client, to, 4)).into_values().collect::<Vec<_>>();
    let rotates =
        || eventually("both tasks serve in turn", || active_tasks(node, "web") == 2 && counts() == [2, 2]);
    rotates();
    node.ip("link set eth1 down");
    node.ip("link set eth1 name wan0");
    node.ip("link set wan0 up");
    eventually("it is said", || agents[0].log().contains("eth1 is called wan0 now, and is served as before"));
    rotates();
    // What changes afterwards is heard of too.
    let tasks = [(&cluster.tasks[1], "running")];
    cluster.write(&cluster.file("\"80:8080\"", &tasks));
    eventually("one task is left", || active_tasks(node, "web") == 1);
    assert_eq!(counts(), [4]);
    assert!(!agents[0].log().contains("eth1 is gone"), "{}", agents[0].log());
}

#[test]
fn the_interface_of_the_default_route_is_served_and_followed() {
    let mut cluster = Cluster::new(1);
    cluster.add_nginx("web.1", 0);
    let path = cluster.write_all_running();
    let path = path.to_str().expect("text");
    let node = &cluster.nodes[0].netns;
    // By another provider.
    let other = Netns::new("other");
    other.ip(&format!("link add eth1 type veth peer name eth2 netns {}", node.name()));
    other.ip("addr add 203.0.113.1/24 dev eth1");
    node.ip("addr add 203.0.113.2/24 dev eth2");
    other.ip("link set eth1 up");
    node.ip("link set eth2 up");
    let refusal = |arguments: &[&str]| {
        let refused = verb(node, &[&["attach", "--cluster", path, "--listen", "none"], arguments].concat());
        assert_eq!(refused.status.code(), Some(1));
        String::from_utf8_lossy(&refused.stderr).into_owned()
    };
    let none =
        "--iface auto: there is no default route; name the interface by which clients come: --iface IF";
    assert!(refusal(&[]).contains(none), "{}", refusal(&[]));
    assert!(refusal(&["--iface", "eth1,auto"]).contains("--iface auto stands alone"));

    node.ip(&format!("route add default via {CLIENT4} dev eth1 metric 100"));
    let printed = text(node, &["attach", "--print", "--cluster", path]);
    let rows: Vec<&str> = printed.lines().collect();
    assert!(rows.len() == 2 && rows[1].starts_with("eth1 ") && rows[1].contains(" new "), "{printed}");
    assert!(rows[1].contains("the default route leads by it") && rows[1].contains("192.0.2.1"), "{printed}");
    let attached = |interface: &str| {
        node.enter(|| PinDir::of(interface).is_ok_and(|pins| pins.exists().expect("bpffs")))
    };
    assert!(!attached("eth1"), "nothing was touched");

    let agent =
        Agent::start_at("auto", &agent_program(), node, cluster.folder(), &[], &["--cluster", path], &[]);
    assert!(agent.log().contains("eth1: taken by --iface auto: the default route leads by it"));
    eventually("the task is offered", || active_tasks(node, "web") == 1);
    assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 2).len(), 2);

    // Something changes all the time, as where neighbours are resolved.
    let mut busy = node.command("sh");
    let resolve = "ip neigh replace 203.0.113.9 lladdr 02:00:00:00:00:09 dev $at nud reachable";
    let forget = "ip neigh del 203.0.113.9 dev $at";
    // It has another name later.
    let both = format!("for at in eth2 wan0; do {resolve} && {forget}; done");
    busy.args(["-c", &format!("while sleep 0.1; do {both}; done 2>/dev/null")]);
    let _busy = Running::start(&mut busy);
    let route = "route add default via 203.0.113.1 dev eth2 metric 50";
    node.ip(route);
    let said = |text: &str| agent.log().matches(text).count();
    let moves = || said(" taken by --iface auto from now on");
    let moved = |goal: usize, to: &str, (from, link): (&str, &str)| {
        within(Duration::from_secs(60), to, || {
            moves() == goal && said("serving 1 service") == goal + 1 && attached(to) && !attached(from)
        });
        assert!(!node.output("ip", &["-d", "link", "show", link]).contains("xdp"), "{from} is left");
        eventually("the task is offered there", || active_tasks(node, "web") == 1);
    };
    moved(1, "eth2", ("eth1", "eth1"));
    assert_eq!(requests(&other, ip("203.0.113.2"), 2).len(), 2);
    let eth1_is_noticed = || said("--iface auto: eth1 is the choice now");
    let eth2_is_noticed = || said("--iface auto: eth2 is the choice now");
    // Back, and there again before the agent moves.
    node.ip("route del default dev eth2");
    eventually("it is noticed", || eth1_is_noticed() == 1);
    let before = eth2_is_noticed();
    node.ip(route);
    eventually("it is noticed again", || eth2_is_noticed() == before + 1);
    // An interface that is renamed is the same one, and no route at all is no move.
    node.ip("link set eth2 down");
    node.ip("link set eth2 name wan0");
    node.ip("link set wan0 up");
    node.ip("route del default dev eth1");
    eventually("the new name is heard of", || agent.log().contains("eth2 is called wan0 now"));
    assert_eq!(requests(&other, ip("203.0.113.2"), 2).len(), 2);
    assert_eq!(moves(), 1, "{}", agent.log());
    node.ip(&format!("route add default via {CLIENT4} dev eth1 metric 100"));
    moved(2, "eth1", ("eth2", "wan0"));
    assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 2).len(), 2);
}
