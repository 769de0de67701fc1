//! What an attacker tries, against the real agent: `SECURITY.md` says of each attack what stops it.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use lb_common::tunnel::{OPTION_CLASS, TO_CLIENT, TO_TASK, VERSION};
use lb_tests::{
    agent::{Agent, json, outcome, program, text, verb},
    cluster::{CLIENT4, Cluster},
    netns::{Netns, Running, run, within},
    packet::{IcmpError, Packet, SYN, Transport, Tunnelled},
    swarm::{Node, PATIENCE, Swarm, packaging},
    traffic::{ask, echo, listen, stop_echo},
};
use lb_userspace::source::peer::tls::{Keeper, manager_name};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

/// Has a socket send so many bytes a second at most (`SO_MAX_PACING_RATE`).
fn pace(socket: &TcpStream, bytes: u32) {
    let (level, name) = (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE);
    let size = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the option's value is a number that lives through the call.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const bytes).cast(), size) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// The agents' TCP port, which is the tunnel's.
const PORT: u16 = 6081;

/// A node of the swarm whose certificate is in the wrong hands: says what it wants to a manager's agent.
struct Impostor(rustls::StreamOwned<rustls::ClientConnection, TcpStream>);

impl Impostor {
    fn connect(node: &Node, manager: &Node) -> std::io::Result<Self> {
        let identity = Keeper::new(&node.root()).identity().expect("the node's certificate");
        let tls = rustls::ClientConnection::new(identity.client.clone(), manager_name()).expect("TLS");
        let to = SocketAddr::new(manager.address(), PORT);
        let stream = node.netns.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut impostor = Self(rustls::StreamOwned::new(tls, stream));
        impostor.say(r#"{"hello":{"version":1,"parts":true}}"#)?;
        Ok(impostor)
    }

    fn say(&mut self, line: &str) -> std::io::Result<()> {
        self.0.write_all(line.as_bytes())?;
        self.0.write_all(b"\n")?;
        self.0.flush()
    }

    fn claim(&mut self, addresses: &[IpAddr]) -> std::io::Result<()> {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let facts = serde_json::json!({"addresses": addresses, "tasks": {}, "complete": false});
        self.say(&format!("{{\"facts\":{facts}}}"))
    }

    /// Whether it is told the cluster.
    fn is_told(&mut self) -> bool {
        let lines = BufReader::new(&mut self.0).lines();
        lines.map_while(Result::ok).any(|line| line.contains("\"cluster\""))
    }

    /// Reads what it is told, and says that it is there, for so long.
    fn stay(&mut self, time: Duration) {
        let end = Instant::now() + time;
        let mut lines = BufReader::new(&mut self.0);
        let mut line = String::new();
        while Instant::now() < end && lines.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            let _ = lines.get_mut().write_all(b"\"ping\"\n");
            line.clear();
        }
    }
}

/// The nodes as an agent has them: their addresses by what users know them by.
fn node(at: &Netns, name: &str) -> Value {
    let nodes = json(at, &["node", "ls"])["nodes"].as_array().cloned().unwrap_or_default();
    nodes.into_iter().find(|node| node["name"] == name).unwrap_or_default()
}

fn has(at: &Netns, name: &str, address: IpAddr) -> bool {
    let addresses = node(at, name)["addresses"].as_array().cloned().unwrap_or_default();
    addresses.iter().any(|known| *known == address.to_string())
}

/// Whether a client is served by a node when it binds a source first.
fn is_served(cluster: &Cluster, source: Ipv4Addr, node: usize) -> bool {
    let to = SocketAddr::new(cluster.addresses(node)[0], 80);
    cluster.client.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((source, 0)).into()).expect("bind it");
        socket.connect_timeout(&to.into(), Duration::from_millis(500)).is_ok()
    })
}

/// Who may connect is said by lists in the cluster file: who is not among them is not served by any node, and a list that shrinks ends
/// what it no longer allows, at both ends.
#[test]
fn only_who_is_on_the_list_connects_and_a_list_that_shrinks_ends_connections() {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    let task = cluster.add_task("web.1", 0);
    let write = |cluster: &Cluster, lists: &str| {
        let text = cluster.file("\"80:8080\"", &[(&cluster.tasks[task], "running")]);
        cluster.write(&text.replacen("ports =", &format!("{lists}\nports ="), 1))
    };
    let path = write(&cluster, "");
    let nodes = cluster.nodes.iter();
    let _agents: Vec<_> =
        nodes.map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    let other = Ipv4Addr::new(10, 77, 0, 9);
    cluster.client.ip(&format!("addr add {other}/32 dev eth1"));
    for node in &cluster.nodes {
        node.netns.ip(&format!("route add {other}/32 dev eth1"));
    }
    let listener = cluster.tasks[task].netns.enter(|| listen("[::]:8080"));
    let connect = |source: Ipv4Addr, node: usize| {
        let to = SocketAddr::new(cluster.addresses(node)[0], 80);
        let socket = cluster.client.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.bind(&SocketAddr::from((source, 0)).into()).expect("bind it");
            socket.connect_timeout(&to.into(), PATIENCE).map(|()| socket)
        });
        let mut client = TcpStream::from(socket.expect("connect"));
        let (mut server, from) = listener.accept().expect("a client");
        assert_eq!(from.ip().to_canonical(), IpAddr::V4(source));
        client.write_all(b"x").expect("send");
        server.read_exact(&mut [0]).expect("what was sent");
        for end in [&client, &server] {
            end.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
        }
        [client, server]
    };
    for node in 0..2 {
        within(PATIENCE, "everybody is served", || is_served(&cluster, other, node));
        while listener.set_nonblocking(true).is_ok() && listener.accept().is_ok() {}
        listener.set_nonblocking(false).expect("wait for clients");
    }
    let ended = [connect(other, 0), connect(other, 1)];
    let mut stays = [connect(CLIENT4, 0), connect(CLIENT4, 1)];
    // Who does not stop sending is ended all the same; at a pace that leaves the machine's cores to the agents.
    let busy = [connect(other, 0), connect(other, 1)].map(|ends| {
        ends.map(|mut end| {
            end.set_write_timeout(Some(PATIENCE)).expect("set a time limit");
            pace(&end, 100_000);
            let mut heard = end.try_clone().expect("another hand");
            thread::spawn(move || while heard.read(&mut [0; 4_096]).is_ok_and(|bytes| bytes > 0) {});
            thread::spawn(move || while end.write_all(&[0; 512]).is_ok() {})
        })
    });
    write(&cluster, "allow = [\"192.0.2.0/24\", \"10.77.0.0/16\"]\ndeny = [\"10.77.0.9\"]");
    for (node, ends) in ended.iter().enumerate() {
        let heard = ends.each_ref().map(|mut end| end.read(&mut [0]).map_err(|error| error.kind()));
        assert_eq!(heard, [Err(ErrorKind::ConnectionReset); 2], "client and task, through node {node}");
    }
    for node in 0..2 {
        let at = &cluster.nodes[node].netns;
        let denied = || json(at, &["service", "ls"])["services"][0]["denied_packets"].as_u64();
        let before = denied().expect("not everybody may connect");
        assert!(!is_served(&cluster, other, node));
        assert!(denied() > Some(before));
        assert!(is_served(&cluster, CLIENT4, node));
        let access = &json(at, &["service", "inspect", "web"])["settings"]["access"];
        let expected = serde_json::json!({
            "allow": ["10.77.0.0/16", "192.0.2.0/24"], "deny": ["0.0.0.0/0", "10.77.0.9/32", "::/0"]
        });
        assert_eq!(*access, expected);
    }
    let open = |node: usize| {
        let tasks = json(&cluster.nodes[node].netns, &["service", "ps", "web"])["tasks"].clone();
        tasks[0]["open_connections"].as_u64().expect("a number")
    };
    for (node, left) in [2, 1].into_iter().enumerate() {
        within(PATIENCE, "those who may connect have the only connections", || open(node) == left);
    }
    busy.into_iter().flatten().for_each(|sender| sender.join().expect("the sender"));
    // Whoever may, goes on.
    for [client, server] in &mut stays {
        client.write_all(b"x").expect("send");
        server.read_exact(&mut [0]).expect("what was sent");
    }
    write(&cluster, "");
    for node in 0..2 {
        within(PATIENCE, "everybody is served again", || is_served(&cluster, other, node));
    }
}

/// What comes from outside with an address behind a bridge of the node's own would pass for a container.
#[test]
fn nobody_outside_passes_for_a_container() {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    let task = cluster.add_nginx("web.1", 0);
    let path = cluster.write_all_running();
    let nodes = cluster.nodes.iter();
    let _agents: Vec<_> =
        nodes.map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    let container = Ipv4Addr::new(172, 18, 1, 99);
    let late = Ipv4Addr::new(10, 77, 0, 9);
    for source in [container, late] {
        cluster.client.ip(&format!("addr add {source}/32 dev eth1"));
        for node in &cluster.nodes {
            node.netns.ip(&format!("route add {source}/32 dev eth1"));
        }
    }
    for node in 0..2 {
        within(PATIENCE, "the task is served", || is_served(&cluster, CLIENT4, node));
        within(PATIENCE, "so is who will be refused", || is_served(&cluster, late, node));
    }
    let refused = || outcome(&cluster.nodes[0].netns, "martian");
    assert_eq!(refused(), 0);
    // By itself and by another node, whose bridge has another range.
    for node in 0..2 {
        let before = refused();
        assert!(!is_served(&cluster, container, node), "through {}", cluster.nodes[node].name);
        assert!(refused() > before);
        within(PATIENCE, "others are served", || is_served(&cluster, CLIENT4, node));
    }
    assert_eq!(cluster.tasks[task].v4.octets()[..3], container.octets()[..3], "the range is the task's");
    // A bridge that comes, and goes.
    let node = &cluster.nodes[0].netns;
    node.ip("link add br-late type bridge");
    node.ip("link add late0 type veth peer name late1");
    node.ip("link set late0 master br-late up");
    node.ip("link set late1 up");
    node.ip("addr add 10.77.0.1/24 dev br-late");
    node.ip("route del 10.77.0.9/32 dev eth1");
    node.ip("link set br-late up");
    within(PATIENCE, "the bridge's range is refused", || !is_served(&cluster, late, 0));
    node.ip("link del br-late");
    node.ip("route add 10.77.0.9/32 dev eth1");
    within(PATIENCE, "the range is nobody's", || is_served(&cluster, late, 0));
}

/// What whoever has a shell in a container, or on a node, can send without any capability.
#[test]
fn no_program_of_a_node_speaks_to_a_peer_as_its_datapath() {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    let task = cluster.add_nginx("web.1", 1);
    let path = cluster.write_all_running();
    let [near, far] = [0, 1].map(|node| &cluster.nodes[node].netns);
    // As nobody else names one: whatever arrives is counted, and nothing else is.
    let forged = |kind| {
        let syn = Packet::new(SYN, (CLIENT4.into(), 4_444), (CLIENT4.into(), 80));
        let tunnelled = Tunnelled {
            macs: syn.macs,
            nodes: (cluster.addresses(0)[0], cluster.addresses(1)[0]),
            ports: (0, PORT),
            network: 0,
            class: OPTION_CLASS.get(),
            kind,
            version_and_flags: [VERSION, 0],
            task: (cluster.tasks[task].v4.into(), 9),
            cookie: None,
            inner: syn.bytes()[14..].to_vec(),
        };
        tunnelled.bytes()[14 + 20 + 8..].to_vec()
    };
    let to = SocketAddr::new(cluster.addresses(1)[0], PORT);
    let send = |kind, hidden: bool| {
        near.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            let mut bytes = forged(kind);
            if hidden {
                // The kernel cuts it into two, of which the first is nothing.
                let segment = bytes.len() as libc::c_int;
                set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
                bytes = [vec![0; bytes.len()], bytes].concat();
            }
            socket.send_to(&bytes, to).expect("send");
        });
    };
    let arrived = || ["tunnel_no_task", "tunnel_not_peer"].map(|name| outcome(far, name));
    let _far = Agent::attach(far, cluster.folder(), &path, &[]);
    // Without an agent nobody holds it back: that is what there is to gain.
    for hidden in [false, true] {
        let before = arrived();
        within(PATIENCE, "what is forged for a task arrives", || {
            send(TO_TASK, hidden);
            arrived()[0] > before[0]
        });
        within(PATIENCE, "what is forged for a client arrives", || {
            send(TO_CLIENT, hidden);
            arrived()[1] > before[1]
        });
    }
    for mode in ["native", "tc"] {
        let agent = Agent::attach(near, cluster.folder(), &path, &["--mode", mode]);
        within(PATIENCE, "the task is served", || is_served(&cluster, CLIENT4, 0));
        let (before, ended) = (arrived(), outcome(near, "tunnel_impostor"));
        for kind in [TO_TASK, TO_CLIENT] {
            (0..10).for_each(|_| [false, true].into_iter().for_each(|hidden| send(kind, hidden)));
        }
        // One that is to be cut counts as so many as it will be.
        assert_eq!(outcome(near, "tunnel_impostor") - ended, 20 + 2 * 20, "{mode}");
        assert!(is_served(&cluster, CLIENT4, 0), "{mode}: the datapath's own goes its way");
        assert_eq!(arrived(), before, "{mode}: nothing of it arrived");
        within(PATIENCE, "the operator is told", || agent.log().contains("only its datapath may send"));
    }
}

/// Sets an option whose value is an int.
fn set_option(socket: &UdpSocket, level: libc::c_int, name: libc::c_int, value: libc::c_int) {
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option's value lives through the call.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// One packet from anywhere, with its sender's own address, would shorten the way between two nodes for everybody.
#[test]
fn no_word_of_a_stranger_shortens_the_way_between_nodes() {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    let task = cluster.add_task("web.1", 1);
    let server = cluster.tasks[task].netns.spawn(|| echo(8080, "web.1"));
    let path = cluster.write(&cluster.file("\"53:8080/udp\"", &[(&cluster.tasks[task], "running")]));
    let nodes = cluster.nodes.iter();
    let agents: Vec<_> = nodes.map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    let [near, far] = [0, 1].map(|node| cluster.addresses(node)[0]);
    let node = &cluster.nodes[0].netns;
    let ask = |length| {
        let asked = || ask(SocketAddr::new(near, 53), &"x".repeat(length));
        cluster.client.enter(asked)
    };
    // What fills a packet in the tunnel.
    let longest = 1_500 - 60 - 28;
    within(PATIENCE, "a datagram that fills a packet arrives", || ask(longest).is_some());
    let refused = outcome(node, "too_big");
    let forge = |port| {
        let quoted = Packet::new(Transport::Udp, (near, port), (far, PORT));
        let forged = IcmpError {
            macs: quoted.macs,
            from: CLIENT4.into(),
            to: near,
            kind: (3, 4),
            rest: 576,
            hops: 64,
            quote: quoted.bytes()[14..].to_vec(),
        };
        cluster.client.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).expect("a socket");
            socket.send_to(&forged.bytes()[14 + 20..], &SocketAddr::new(near, 0).into()).expect("send");
        });
    };
    for round in 1..=20 {
        forge(50_000);
        within(PATIENCE, "it is heard", || outcome(node, "tunnel_error") >= round);
        assert!(ask(longest).is_some(), "round {round}");
    }
    // About what the agent itself has sent: the kernel believes that one.
    let route = || node.output("ip", &["route", "get", &far.to_string()]);
    within(PATIENCE, "the kernel has a route of its own for it", || {
        forge(PORT);
        route().contains("mtu")
    });
    kill(Pid::from_raw(agents[0].pid()), Signal::SIGHUP).expect("ask it to look again");
    within(PATIENCE, "it has looked again", || agents[0].log().contains("is looked at again"));
    (0..20).for_each(|round| assert!(ask(longest).is_some(), "round {round}"));
    assert!(route().contains("mtu"), "{}: it was there all the while", route());
    assert_eq!(outcome(node, "too_big"), refused);
    stop_echo(&cluster.tasks[task].netns, 8080);
    server.join().expect("the task");
}

/// A worker whose certificate is in the wrong hands claims what other nodes have.
#[test]
fn a_node_takes_neither_address_nor_name_of_another() {
    let swarm = Swarm::new(3);
    let [manager, victim, attacker] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let agents = [manager, victim].map(|node| swarm.attach_one(node, &[]));
    // Swarm knows none of the nodes' addresses of IPv6: they are the agents' own word, and proven.
    for at in [manager, victim] {
        within(PATIENCE, "the addresses are proven", || {
            has(&at.netns, "node1", manager.address6()) && has(&at.netns, "node2", victim.address6())
        });
    }
    // It bears the victim's name, and there will be two of it.
    attacker.docker(&["info"]);
    let mut impostor = Impostor::connect(attacker, manager).expect("it is a node of the swarm");
    let nobody: IpAddr = "198.51.100.7".parse().expect("an address");
    impostor
        .claim(&[victim.address6(), victim.address(), manager.address6(), manager.address(), nobody])
        .expect("say what it wants");
    // Said, so that somebody looks after it.
    within(PATIENCE, "both are said", || {
        let said = |address: IpAddr| format!("{address} is said to be an address of both node2 and node3");
        agents[0].log().contains(&said(victim.address6()))
            && agents[0].log().contains(&said(victim.address()))
    });
    impostor.stay(Duration::from_secs(2));
    for at in [manager, victim] {
        for address in [victim.address6(), victim.address()] {
            assert!(has(&at.netns, "node2", address), "{}", text(&at.netns, &["node", "ls"]));
        }
        assert_eq!(
            node(&at.netns, "node3")["addresses"],
            serde_json::json!([attacker.address().to_string()])
        );
    }
    // A second connection of it takes the place of the first, which ends.
    let mut other = Impostor::connect(attacker, manager).expect("it is a node of the swarm");
    let start = Instant::now();
    impostor.stay(PATIENCE);
    assert!(start.elapsed() < PATIENCE / 2, "the first connection ends");
    // It flaps, and the victim's agent stays.
    for flip in 0..300 {
        let facts = format!(
            "{{\"facts\":{{\"addresses\":[],\"tasks\":{{\"x\":{{\"addresses\":[],\"ailing\":{}}}}},\"complete\":false}}}}",
            flip % 2 == 0
        );
        if other.say(&facts).is_err() {
            break;
        }
    }
    assert!(has(&manager.netns, "node2", victim.address6()));
    // Removed from the swarm, it is not heard any more, though its certificate is good.
    other.say("\"ping\"").expect("it is heard yet");
    manager.docker(&["node", "rm", "--force", "node3"]);
    within(PATIENCE, "it is hung up on", || other.say("\"ping\"").is_err());
    let told = Impostor::connect(attacker, manager).is_ok_and(|mut again| again.is_told());
    assert!(!told, "a node that was removed is told the cluster");
    for agent in agents {
        agent.stop(Signal::SIGTERM);
    }
}

/// Makes this thread an ordinary user's; it ends as that.
fn become_nobody() {
    const NOBODY: libc::c_long = 65534;
    for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
        // SAFETY: by the system call, unlike by the C library, only this thread changes; it takes three numbers.
        assert_eq!(unsafe { libc::syscall(call, NOBODY, NOBODY, NOBODY) }, 0, "change the user");
    }
}

/// An ordinary user of the machine takes the answers to probes.
#[test]
fn an_ordinary_user_does_not_take_the_answers_to_probes() {
    let cluster = Cluster::new(2);
    cluster.receive_xdp();
    let path = cluster.write_all_running();
    let _agents: Vec<Agent<'_>> =
        cluster.nodes.iter().map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    let hears = || node(&cluster.nodes[0].netns, "node2")["problem"].is_null();
    within(PATIENCE, "the other node is heard", hears);
    let own = cluster.addresses(0)[0];
    let taken = cluster.nodes[0].netns.enter(|| {
        become_nobody();
        [IpAddr::from(Ipv4Addr::UNSPECIFIED), own].map(|address| {
            // Every way to share a port that an ordinary user has.
            let thief = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
            thief.set_reuse_address(true).expect("share it");
            thief.set_reuse_port(true).expect("share it");
            thief.bind_device(Some(b"eth1")).expect("bind it to the interface");
            thief.bind(&SocketAddr::new(address, PORT).into()).map_err(|error| error.kind())
        })
    });
    assert_eq!(taken, [Err(ErrorKind::AddrInUse); 2]);
    thread::sleep(Duration::from_secs(4));
    assert!(hears(), "{}", text(&cluster.nodes[0].netns, &["node", "ls"]));
}

/// An ordinary user makes the directory for the pins first, on a file system to which all may write.
#[test]
fn pins_are_not_put_where_an_ordinary_user_can_change_them() {
    let cluster = Cluster::new(1);
    let path = cluster.write_all_running();
    let netns = &cluster.nodes[0].netns;
    // A BPF file system of its own, as `mount -t bpf` makes it.
    let within_mount = |script: &str| -> Output {
        let mut command = netns.command("unshare");
        let mounted = format!("mount -t bpf bpf /sys/fs/bpf && {script}");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &mounted]);
        command.env("AGENT", program()).env("CLUSTER", &path).stdin(Stdio::null());
        command.output().expect("start unshare")
    };
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    let attach = "\"$AGENT\" attach --iface eth1 --mode tc --cluster \"$CLUSTER\"";
    for (prepare, said) in [
        (format!("{nobody} mkdir -m 777 /sys/fs/bpf/lb"), "belongs to user 65534, not to 0"),
        ("mkdir -m 777 /sys/fs/bpf/lb".to_owned(), "may be written to by others (mode 0777)"),
        (format!("{nobody} ln -s /sys/fs/bpf /sys/fs/bpf/lb"), "is no directory"),
        ("chmod 777 /sys/fs/bpf".to_owned(), "may be written to by others (mode 0777)"),
    ] {
        let output = within_mount(&format!("{prepare} && exec timeout 60 {attach}"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{prepare}: {errors}");
        assert!(errors.contains(said) && errors.contains("rmdir "), "{prepare}: {errors}");
    }
    // As it is made, it does: what an ordinary user makes beside it is no harm.
    let elsewhere = attach.replace("$CLUSTER", "$CLUSTER.none");
    let output = within_mount(&format!("{nobody} mkdir /sys/fs/bpf/other && {elsewhere}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("No such file or directory") && !errors.contains("rmdir"), "{errors}");
}

/// A cluster file that is none does not hold the agent up, and does not say what is in a file of somebody else.
#[test]
fn a_cluster_file_that_is_none_is_an_error_at_once() {
    let mut cluster = Cluster::new(1);
    cluster.add_task("web.1", 0);
    let good = cluster.write_all_running();
    let netns = &cluster.nodes[0].netns;
    let bad = cluster.folder().join("bad");
    let attach = |path: &std::path::Path| -> Output {
        let mut command = netns.command("timeout");
        command.args(["60"]).arg(program()).args(["attach", "--iface", "eth1", "--cluster"]).arg(path);
        command.output().expect("start the agent")
    };
    let long = cluster.folder().join("long");
    std::fs::File::create(&long).expect("a file").set_len(200 << 20).expect("make it long");
    run(Command::new("mkfifo").arg(cluster.folder().join("fifo")));
    let secret = cluster.folder().join("secret");
    std::fs::write(&secret, "root:$y$j9T$secret:19000:0:99999:7:::\n").expect("a secret");
    std::os::unix::fs::symlink(&secret, &bad).expect("a link");
    std::os::unix::fs::lchown(&bad, Some(65534), None).expect("give the link away");
    for (path, said) in [
        (cluster.folder().join("fifo"), "is a FIFO"),
        (cluster.folder().to_owned(), "is a directory"),
        (long, "more than the"),
        (bad.clone(), "of user 65534 leads to a file of user 0"),
    ] {
        let output = attach(&path);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(said) && !errors.contains("$y$"), "{errors}");
    }
    // One that takes the place of a good one while the agent runs: the last state stands, and it ends when it is told to.
    let agent = Agent::attach(netns, cluster.folder(), &good, &[]);
    let fifo = cluster.folder().join("other-fifo");
    run(Command::new("mkfifo").arg(&fifo));
    std::fs::rename(&fifo, &good).expect("put it in the place of the good one");
    within(PATIENCE, "it is said", || agent.log().contains("is a FIFO"));
    assert!(text(netns, &["service", "ls"]).contains("web"));
    agent.stop(Signal::SIGTERM);
    assert!(verb(netns, &["detach", "--iface", "eth1"]).status.success());
}

/// Names with what moves a terminal's cursor, or reads backwards, in the file.
#[test]
fn no_text_of_others_reaches_the_terminal_but_what_shows() {
    let cluster = Cluster::new(1);
    let path = cluster.folder().join("cluster.toml");
    let address = cluster.addresses(0)[0];
    let file = format!(
        "[[node]]\nname = \"node1\"\naddresses = [\"{address}\"]\n[[node]]\nname = \"node9\\u001b[2J\\u001b]0;pwned\\u0007\"\n\
         addresses = [\"192.0.2.99\"]\n[[service]]\nname = \"web\\u202e\\u009b2J\\nweb2  1\"\nports = [\"80:80\"]\n"
    );
    std::fs::write(&path, file).expect("write the file");
    let netns = &cluster.nodes[0].netns;
    let agent = Agent::attach(netns, cluster.folder(), &path, &[]);
    for arguments in [&["node", "ls"][..], &["service", "ls"], &["status"], &["service", "ls", "-o", "json"]]
    {
        let shown = text(netns, arguments);
        let acts = |c: &char| c.is_control() && *c != '\n' || matches!(c, '\u{202a}'..='\u{202e}');
        assert_eq!(shown.chars().filter(acts).count(), 0, "{arguments:?}: {shown:?}");
    }
    assert!(text(netns, &["node", "ls"]).contains("node9\u{fffd}[2J"));
    let raw = agent.log();
    assert!(!raw.contains("\u{1b}[2J") && !raw.contains('\u{202e}'), "{raw:?}");
    let output = verb(netns, &["service", "ps", "x\u{1b}[2J"]);
    assert!(!output.stderr.contains(&0x1b), "{:?}", String::from_utf8_lossy(&output.stderr));
}

/// What only tests ask for does nothing in a service's environment, and is said.
#[test]
fn what_tests_ask_for_needs_a_test() {
    let cluster = Cluster::new(1);
    let path = cluster.write_all_running();
    let netns = &cluster.nodes[0].netns;
    let fault = cluster.folder().join("fault");
    std::fs::write(&fault, "0 fail").expect("arm a fault");
    let variable = ("LB_FAULT", fault.to_str().expect("text"));
    let agent = Agent::attach_with(netns, cluster.folder(), &path, &[], &[variable]);
    assert!(agent.log().contains("LB_FAULT is set and changes nothing"), "{}", agent.log());
    assert!(fault.exists(), "it has not happened");
    drop(agent);
    let mut command = netns.command(program());
    command.args(["attach", "--iface", "eth1", "--cluster"]).arg(&path);
    command.envs([variable, ("LB_TEST", "1")]);
    let output = command.output().expect("start the agent");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("LB_TEST=1 is set") && errors.contains("by a fail point"), "{errors}");
}

/// The unit under a real systemd, in namespaces of its own: what it forbids the agent can do without.
#[test]
fn the_unit_confines_the_agent_and_it_serves() {
    let unit = std::fs::read_to_string(packaging("lb-userspace.service")).expect("the unit");
    let exposure = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=20", "--no-pager"])
        .arg(packaging("lb-userspace.service"))
        .output()
        .expect("start systemd-analyze");
    assert!(exposure.status.success(), "{}", String::from_utf8_lossy(&exposure.stdout));
    let cluster = Cluster::new(1);
    let path = cluster.write_all_running();
    let (netns, folder) = (&cluster.nodes[0].netns, cluster.folder());
    // As it is, but for where things are; what it starts is under /run, which it does not hide.
    let keeps = |line: &&str| !line.starts_with("ExecStart=") && !line.starts_with("EnvironmentFile=");
    let unit: Vec<&str> = unit.lines().filter(keeps).collect();
    let here = format!(
        "[Unit]\nDefaultDependencies=no\n[Service]\n\
         ExecStart=/run/lb/lb-userspace attach --iface eth1 --cluster /run/lb/cluster.toml --on-exit keep\n\
         StandardOutput=append:{0}/agent.log\nStandardError=append:{0}/agent.log\n",
        folder.display()
    );
    // What may not be done under it.
    let forbidden =
        "for path in /sys/fs/bpf/other /etc/other /proc/sys/net/core/somaxconn; do echo 1 >$path; done; true";
    let confined =
        unit.join("\n").replace("Restart=always", "Restart=no").replace("Type=notify", "Type=oneshot");
    let units = folder.join("units");
    std::fs::create_dir(&units).expect("make a folder");
    let write = |name: &str, text: String| std::fs::write(units.join(name), text).expect("write a unit");
    write("lb-userspace.service", format!("{}\n{here}", unit.join("\n")));
    write(
        "forbidden.service",
        format!(
            "{confined}\n[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sh -c '{forbidden}'\n\
             StandardError=append:{}/forbidden.log\n",
            folder.display()
        ),
    );
    write(
        "test.target",
        "[Unit]\nDefaultDependencies=no\nWants=lb-userspace.service forbidden.service\n".into(),
    );
    let boot = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && mkdir /run/lb && cp \"$AGENT\" /run/lb/lb-userspace \
                && cp \"$CLUSTER\" /run/lb/cluster.toml && mount -t bpf bpf /sys/fs/bpf \
                && exec /lib/systemd/systemd --system --unit=test.target --show-status=no";
    let mut command = netns.command("unshare");
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--cgroup",
        "--uts",
        "--ipc",
        "--kill-child",
    ]);
    command.args(["sh", "-c", boot]).env("AGENT", program()).env("CLUSTER", path).env("container", "test");
    command.env("SYSTEMD_UNIT_PATH", &units).env("SYSTEMD_LOG_TARGET", "console");
    let log = std::fs::File::create(folder.join("systemd.log")).expect("create the log");
    command.stdout(log.try_clone().expect("share the log")).stderr(log);
    let _systemd = Running::start(&mut command);
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let end = Instant::now() + PATIENCE * 2;
    while !(read("agent.log").contains("serving ") && read("forbidden.log").lines().count() >= 3) {
        assert!(
            Instant::now() < end,
            "{}{}{}",
            read("systemd.log"),
            read("agent.log"),
            read("forbidden.log")
        );
        thread::sleep(Duration::from_millis(100));
    }
    assert!(!read("agent.log").contains("WARN"), "{}", read("agent.log"));
    let refused = read("forbidden.log").lines().filter(|line| line.contains("Read-only file system")).count();
    assert_eq!(refused, 3, "{}", read("forbidden.log"));
}
