//! By what nodes know each other's packets in the tunnel: packet by packet, and against somebody who forges a node's address.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, SocketAddr},
    process::Command,
};

use lb_common::{
    abi::TC_ALONE,
    outcome::Outcome,
    tunnel::{
        DEFAULT_PORT, NAMES_TASK, OPTION_CLASS, PROBE, PROBE_ANSWER, TO_CLIENT, TO_TASK, VERSION,
        VERSION_KEYED,
    },
};
use lb_tests::{
    agent::{Agent, json, outcome, program, text},
    cluster::{CLIENT4, Cluster, KEY_FILE},
    lab::{DROP, HOP_MAC, Lab, PASS, TX, UPLINK_MTU, ip, service, task, with_lab},
    netns::{Netns, within},
    packet::{ACK, NODE_MAC, Packet, SYN, SYN_ACK, Transport, Tunnelled},
    swarm::{Node as Machine, PATIENCE, Swarm},
    traffic::{Load, requests},
};
use lb_userspace::{
    cluster::{Service, Via},
    tunnel_key::Cookies,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

/// Address of this node and of the peer, by the family outside the tunnel.
const NODES: [(&str, &str); 2] = [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")];
/// What packets to the peer are known by.
const OUTGOING: u64 = 0x0123_4567_89ab_cdef;
/// And those from it.
const INCOMING: u64 = 0xfedc_ba98_7654_3210;
/// A client, a listener's address, the peer's task and this node's by their addresses in the cluster: by family inside.
const INNER: [(&str, &str, &str, &str); 2] = [
    ("198.51.100.7", "192.0.2.1", "10.0.0.9", "10.0.0.7"),
    ("2001:db8:77::7", "2001:db8::1", "fd00:9:9:9::9", "fd00:7:7:7::7"),
];

fn services() -> Vec<Service> {
    let of = |name: &str, here, address: &str, overlay: &str| {
        let mut task = task(name, here, Via::Peer, &[address]);
        task.overlay = Some(ip(overlay));
        task
    };
    vec![
        service("far4", &["83:8083"], vec![of("far4.1", false, "172.18.9.11", INNER[0].2)]),
        service("far6", &["93:8083"], vec![of("far6.1", false, "fd18::9:11", INNER[1].2)]),
        service("near4", &["84:8084"], vec![of("near4.1", true, "172.18.0.11", INNER[0].3)]),
        service("near6", &["94:8084"], vec![of("near6.1", true, "fd18::11", INNER[1].3)]),
    ]
}

/// Runs a test with each family outside the tunnel, in XDP and in TC.
fn with_each(test: impl Fn(&mut Lab, usize, bool) + Send + Sync) {
    for outer in 0..NODES.len() {
        for tc in [false, true] {
            with_lab(services(), |lab| {
                if outer == 1 {
                    lab.update(|cluster| cluster.nodes.iter_mut().for_each(|node| node.addresses.reverse()));
                }
                if tc {
                    lab.configure(|config| config.flags = TC_ALONE);
                }
                test(lab, outer, tc);
            });
        }
    }
}

/// The cookies of the peer from now on.
fn agree(lab: &mut Lab, cookies: Option<(u64, u64)>) {
    lab.agree("node2", cookies.map(|(outgoing, incoming)| Cookies { outgoing, incoming }));
}

/// What the peer sends to this node, with a cookie or without one.
fn received(outer: usize, kind: u8, cookie: Option<u64>, task: (&str, u16), inner: Vec<u8>) -> Tunnelled {
    let (node, peer) = NODES[outer];
    let version = if cookie.is_some() { VERSION_KEYED } else { VERSION };
    Tunnelled {
        macs: (HOP_MAC, NODE_MAC),
        nodes: (ip(peer), ip(node)),
        ports: (51_000, DEFAULT_PORT),
        network: 0,
        class: OPTION_CLASS.get(),
        kind,
        version_and_flags: [version, if kind == TO_CLIENT { NAMES_TASK } else { 0 }],
        task: (ip(task.0), task.1),
        cookie,
        inner,
    }
}

/// A client's packet to a listener.
fn request(inner: usize, transport: Transport, port: u16, to: u16) -> Packet {
    let (client, listener, ..) = INNER[inner];
    Packet::new(transport, (ip(client), port), (ip(listener), to))
}

/// Runs the uplink's program; what it did, the frame, and what it counted.
fn run(lab: &Lab, tc: bool, frame: &[u8]) -> (u32, Vec<u8>, BTreeMap<Outcome, u64>) {
    let (verdict, counted) = lab.counting(|lab| if tc { lab.uplink_tc(frame) } else { lab.xdp(frame) });
    (verdict.action, verdict.frame, counted)
}

/// Asserts what a client's packet in the tunnel with this cookie comes to, for a task of each family; each time another client.
fn arrives(lab: &Lab, (outer, tc): (usize, bool), cookie: Option<u64>, expected: Outcome) {
    use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
    static CLIENT: AtomicU16 = AtomicU16::new(20_000);
    for (inner, port) in [(0, 84), (1, 94)] {
        let packet = request(inner, SYN, CLIENT.fetch_add(1, Relaxed), port);
        let frame = received(outer, TO_TASK, cookie, (INNER[inner].3, 8084), packet.bytes()[14..].to_vec());
        let (action, _, counted) = run(lab, tc, &frame.bytes());
        let what = format!("outer {outer} inner {inner} tc {tc} {cookie:x?}");
        assert_eq!(counted, BTreeMap::from([(expected, 1)]), "{what}");
        // TC drops by another number than XDP.
        assert_eq!(
            action == if tc { 2 } else { DROP },
            expected == Outcome::TunnelForged,
            "{what}: {action}"
        );
    }
}

/// What was taken before is taken until the peer was seen using what is agreed on now.
#[test]
fn a_peer_s_packets_are_taken_with_its_cookie_alone_once_it_has_used_it() {
    with_each(|lab, outer, tc| {
        let at = (outer, tc);
        let (old, new, wrong) = (Some(INCOMING), Some(INCOMING + 1), Some(7));
        for cookie in [None, old, wrong] {
            arrives(lab, at, cookie, Outcome::Local);
        }
        // It does not know of it yet, or speaks an older version.
        agree(lab, Some((OUTGOING, INCOMING)));
        for cookie in [None, wrong, old] {
            arrives(lab, at, cookie, Outcome::Local);
        }
        for cookie in [None, wrong, new, Some(OUTGOING), Some(INCOMING.swap_bytes())] {
            arrives(lab, at, cookie, Outcome::TunnelForged);
        }
        arrives(lab, at, old, Outcome::Local);
        // Its key has changed, and it uses the old one yet.
        agree(lab, Some((OUTGOING, INCOMING + 1)));
        arrives(lab, at, old, Outcome::Local);
        arrives(lab, at, None, Outcome::TunnelForged);
        arrives(lab, at, wrong, Outcome::TunnelForged);
        arrives(lab, at, new, Outcome::Local);
        arrives(lab, at, old, Outcome::TunnelForged);
        // An agent without keys has taken its place, and its word came over TLS.
        agree(lab, None);
        arrives(lab, at, None, Outcome::Local);
        // Other nodes' packets are none of this.
        let mut stranger =
            received(outer, TO_TASK, new, (INNER[0].3, 8084), request(0, SYN, 1, 84).bytes()[14..].to_vec());
        stranger.nodes.0 = ip(if outer == 0 { "192.0.2.77" } else { "2001:db8:5::5" });
        assert_eq!(run(lab, tc, &stranger.bytes()).2, BTreeMap::from([(Outcome::TunnelNotPeer, 1)]));
    });
}

#[test]
fn what_goes_to_a_peer_has_its_cookie_and_the_name_of_its_task() {
    with_each(|lab, outer, tc| {
        agree(lab, Some((OUTGOING, INCOMING)));
        for (inner, port) in [(0, 83), (1, 93)] {
            let packet = request(inner, SYN, 40_000, port);
            let (_, frame, counted) = run(lab, tc, &packet.bytes());
            assert_eq!(counted, BTreeMap::from([(Outcome::Peer, 1)]));
            let mut expected = received(
                outer,
                TO_TASK,
                Some(OUTGOING),
                (INNER[inner].2, 8083),
                packet.bytes()[14..].to_vec(),
            );
            expected.macs = (NODE_MAC, HOP_MAC);
            expected.nodes = (expected.nodes.1, expected.nodes.0);
            // The flow's hash decides the source port and the flow label.
            let udp = if outer == 0 { 34 } else { 54 };
            expected.ports.0 = u16::from_be_bytes([frame[udp], frame[udp + 1]]);
            let mut expected = expected.bytes();
            if outer == 1 {
                expected[15..18].copy_from_slice(&frame[15..18]);
            }
            assert_eq!(frame, expected, "outer {outer} inner {inner} tc {tc}");
            // The reply is known by the cookie of the other direction, and by the name of the task that it is from.
            let (client, listener, far, near) = INNER[inner];
            let reply = Packet::new(SYN_ACK, (ip(listener), port), (ip(client), 40_000));
            let reply = reply.bytes()[14..].to_vec();
            for (cookie, task, comes_to) in [
                (INCOMING, near, Outcome::LateReply),
                (INCOMING, far, Outcome::Reply),
                (OUTGOING, far, Outcome::TunnelForged),
            ] {
                let frame = received(outer, TO_CLIENT, Some(cookie), (task, 8083), reply.clone());
                let counted = run(lab, tc, &frame.bytes()).2;
                assert_eq!(counted, BTreeMap::from([(comes_to, 1)]), "outer {outer} inner {inner} tc {tc}");
            }
        }
    });
}

/// Who probes learns that its packets are taken, not only that somebody is there.
#[test]
fn a_probe_without_the_cookie_gets_no_answer() {
    with_each(|lab, outer, tc| {
        agree(lab, Some((OUTGOING, INCOMING)));
        let probe = |cookie| received(outer, PROBE, cookie, ("fd77::77", 0), vec![]);
        for (cookie, comes_to) in [
            (None, Outcome::TunnelProbe),
            // Whose it is cannot be told yet: the answer gives nothing away.
            (Some(INCOMING ^ 1), Outcome::TunnelProbe),
            (Some(INCOMING), Outcome::TunnelProbe),
            (None, Outcome::TunnelForged),
            (Some(INCOMING ^ 1), Outcome::TunnelForged),
        ] {
            let (action, frame, counted) = run(lab, tc, &probe(cookie).bytes());
            assert_eq!(counted, BTreeMap::from([(comes_to, 1)]), "{cookie:x?}");
            if comes_to == Outcome::TunnelProbe {
                // Known by the cookie of the other direction, which is told to the peer alone.
                let mut answer = probe(cookie);
                let known = cookie == Some(INCOMING);
                answer.cookie = cookie.map(|_| if known { OUTGOING } else { 0 });
                answer.version_and_flags[0] = if known { VERSION_KEYED } else { VERSION };
                answer.kind = PROBE_ANSWER;
                answer.macs = (NODE_MAC, HOP_MAC);
                answer.nodes = (answer.nodes.1, answer.nodes.0);
                answer.ports = (answer.ports.1, answer.ports.0);
                answer.network = UPLINK_MTU;
                assert_eq!(frame, answer.bytes());
                assert!(tc || action == TX, "{action}");
            }
        }
        // What a peer answers is for the controller, if it is the peer's.
        for (cookie, comes_to) in [(None, Outcome::TunnelForged), (Some(INCOMING), Outcome::TunnelProbe)] {
            let answer = received(outer, PROBE_ANSWER, cookie, ("fd77::77", 0), vec![]);
            let (action, _, counted) = run(lab, tc, &answer.bytes());
            assert_eq!(counted, BTreeMap::from([(comes_to, 1)]));
            assert!(tc || action == if cookie.is_some() { PASS } else { DROP }, "{action}");
        }
    });
}

/// A machine in the nodes' network that sends as one of them to another: a packet for a task that is not there, so that what
/// arrives is counted as such, and nothing else is.
struct Forger<'a> {
    netns: &'a Netns,
    as_node: IpAddr,
    to: IpAddr,
}

impl Forger<'_> {
    fn send(&self, cookie: Option<u64>) {
        let inner = Packet::new(ACK, (CLIENT4.into(), 4_444), (self.to, 80));
        let forged = Tunnelled {
            macs: inner.macs,
            nodes: (self.as_node, self.to),
            ports: (50_000, DEFAULT_PORT),
            network: 0,
            class: OPTION_CLASS.get(),
            kind: TO_TASK,
            version_and_flags: [if cookie.is_some() { VERSION_KEYED } else { VERSION }, 0],
            task: (ip("10.99.99.99"), 9),
            cookie,
            inner: inner.bytes()[14..].to_vec(),
        };
        self.netns.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))
                .expect("a socket");
            socket.send_to(&forged.bytes()[14..], &SocketAddr::new(self.to, 0).into()).expect("send");
        });
    }
}

/// What `node ls` says of a node.
fn node(at: &Netns, name: &str) -> Value {
    let nodes = json(at, &["node", "ls"])["nodes"].as_array().expect("nodes").clone();
    nodes.into_iter().find(|node| node["name"] == name).expect("the node")
}

/// Whoever can send from a node's address, past the filters of a network that checks none.
#[test]
fn who_forges_a_node_s_address_reaches_nothing() {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    cluster.add_nginx("web.1", 0);
    cluster.add_nginx("web.2", 1);
    let keyed = cluster.write_all_running();
    let [near, far] = [0, 1].map(|node| &cluster.nodes[node].netns);
    let forger = Forger {
        netns: &cluster.client,
        as_node: cluster.nodes[0].v4().into(),
        to: cluster.nodes[1].v4().into(),
    };
    let line = format!("key-file = \"{KEY_FILE}\"\n");
    let open = fs::read_to_string(&keyed).expect("the cluster file").replace(&line, "");
    let path = cluster.write(&open);
    let agents: Vec<_> =
        [near, far].map(|node| Agent::attach(node, cluster.folder(), &path, &[])).into_iter().collect();
    within(PATIENCE, "the operator is told", || {
        agents[0].log().contains("the tunnel between the nodes has no key")
    });
    let arrived = || outcome(far, "tunnel_no_task");
    within(PATIENCE, "without a key what is forged arrives", || {
        forger.send(None);
        arrived() > 0
    });
    assert_eq!(node(far, "node1")["key"], "none");
    let answered_by = |at: usize| -> BTreeSet<String> {
        let answers = requests(&cluster.client, cluster.addresses(at)[0], 10);
        answers.iter().filter_map(|answer| answer.split(' ').next()).map(str::to_owned).collect()
    };
    let both = |at: usize| answered_by(at).len() == 2;
    // A key while clients come, which one node reads long before the other: nothing is lost, and nothing refused.
    let loads = [0, 1].map(|at| Load::start(&cluster.client, cluster.addresses(at)[0], 2, u64::MAX));
    let go_on = || {
        for load in &loads {
            let done = load.done();
            within(PATIENCE, "clients are served", || load.done() > done + 200);
        }
    };
    go_on();
    let second_folder = tempfile::tempdir().expect("a folder");
    let second_path = second_folder.path().join("cluster.toml");
    fs::write(&second_path, &open).expect("write the cluster file");
    let [first, second] = agents.try_into().ok().expect("two agents");
    second.stop(Signal::SIGTERM);
    let second = Agent::attach(far, second_folder.path(), &second_path, &[]);
    cluster.write_all_running();
    go_on();
    fs::copy(cluster.folder().join(KEY_FILE), second_folder.path().join(KEY_FILE)).expect("copy the key");
    fs::copy(&path, &second_path).expect("copy the cluster file");
    for (at, other) in [(near, "node2"), (far, "node1")] {
        within(PATIENCE, "the other node uses the key", || node(at, other)["key"] == "used");
    }
    go_on();
    for at in [near, far] {
        // One that was under way while the first keyed one overtook it on another CPU.
        assert!(outcome(at, "tunnel_forged") < 3, "{}", text(at, &["stats"]));
    }
    let (before, refused) = (arrived(), outcome(far, "tunnel_forged"));
    for cookie in [None, Some(1), Some(u64::MAX)] {
        (0..10).for_each(|_| forger.send(cookie));
    }
    within(PATIENCE, "they are counted", || outcome(far, "tunnel_forged") == refused + 30);
    assert_eq!(arrived(), before, "nothing of it arrived");
    assert_eq!(node(far, "node1")["forged_packets"], refused + 30);
    let shown = text(far, &["node", "ls"]);
    assert!(shown.contains("KEY") && shown.contains("FORGED") && shown.contains("used"), "{shown}");
    within(PATIENCE, "the operator is told", || second.log().contains("somebody forges them"));
    // An agent that is replaced goes on; so does one that begins anew.
    second.stop(Signal::SIGKILL);
    forger.send(None);
    within(PATIENCE, "the datapath goes on refusing", || outcome(far, "tunnel_forged") == refused + 31);
    let second = Agent::attach(far, cluster.folder(), &path, &[]);
    assert_eq!(node(far, "node1")["key"], "used");
    let failed: Vec<String> = loads.into_iter().flat_map(Load::stop).collect();
    assert_eq!(failed, Vec::<String>::new(), "nothing was lost");
    drop(second);
    let _second = Agent::attach(far, cluster.folder(), &path, &[]);
    within(PATIENCE, "it is served again", || both(0) && both(1));
    assert_eq!(node(far, "node1")["key"], "used");
    // Another key, which the other node has not: neither offers the other's tasks, and no client waits for an answer.
    drop(first);
    let folder = tempfile::tempdir().expect("a folder");
    fs::copy(&path, folder.path().join("cluster.toml")).expect("copy the cluster file");
    let status = Command::new(program()).arg("keygen").arg(folder.path().join(KEY_FILE)).status();
    assert!(status.expect("run it").success());
    let first = Agent::attach(near, folder.path(), &folder.path().join("cluster.toml"), &[]);
    for (at, other) in [(near, "node2"), (far, "node1")] {
        within(PATIENCE, "the other node is silent", || node(at, other)["agent"] == "silent");
    }
    for (at, own) in [(0, "web.1"), (1, "web.2")] {
        assert_eq!(answered_by(at), BTreeSet::from([own.to_owned()]));
    }
    fs::copy(cluster.folder().join(KEY_FILE), folder.path().join(KEY_FILE)).expect("copy the key");
    within(PATIENCE, "with the same key they speak again", || both(0) && both(1));
    drop(first);
}

/// Nobody is asked for a key: agents tell each other by the swarm's own certificates.
#[test]
fn a_node_finds_the_others_keys_and_keeps_its_own() {
    let swarm = Swarm::new(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let (one, two, _three) =
        (swarm.attach_one(first, &[]), swarm.attach_one(second, &[]), swarm.attach_one(third, &[]));
    first.docker(&["service", "create", "-d", "--name", "web", "--mode", "global", "-p", "80:8080", "web"]);
    let key = |at: &Machine, name: &str| node(&at.netns, name)["key"].as_str().unwrap_or_default().to_owned();
    let all_use_theirs = || {
        for (at, others) in
            [(first, ["node2", "node3"]), (second, ["node1", "node3"]), (third, ["node1", "node2"])]
        {
            for name in others {
                within(PATIENCE, &format!("{} has seen {name} use its key", at.name), || {
                    key(at, name) == "used"
                });
            }
        }
    };
    let all_serve = || {
        for node in &swarm.nodes {
            within(PATIENCE, &format!("{} reaches all tasks", node.name), || {
                let answers = (0..6).filter_map(|_| swarm.ask(node, 80).ok());
                answers.collect::<BTreeSet<_>>().len() == 3
            });
        }
    };
    all_use_theirs();
    all_serve();
    let forger = Forger { netns: &swarm.client, as_node: second.address(), to: first.address() };
    let taken = || outcome(&first.netns, "tunnel_no_task");
    let forged = || node(&first.netns, "node2")["forged_packets"].as_u64().unwrap_or_default();
    let (before, already) = (taken(), forged());
    assert_eq!(already, 0, "what the node itself sent was taken");
    for cookie in [None, Some(1)] {
        (0..5).for_each(|_| forger.send(cookie));
    }
    within(PATIENCE, "what is forged is counted", || forged() == already + 10);
    assert_eq!(taken(), before, "none of it arrived");
    // The next agent has the same key: nothing that it sends is refused. The manager's may hear of keys later than it serves.
    two.stop(Signal::SIGKILL);
    let two = swarm.attach_one(second, &[]);
    one.stop(Signal::SIGKILL);
    let _one = swarm.attach_one(first, &[]);
    for (at, name) in [(first, "node2"), (first, "node3"), (second, "node1"), (second, "node3")] {
        assert_eq!(key(at, name), "used", "{name} at {}", at.name);
    }
    all_serve();
    assert_eq!(forged(), already + 10, "node2 is taken for itself");
    // One that begins anew has the one that was stored for it.
    let stored = tempfile::tempdir().expect("a folder");
    let with_store = || {
        let variables =
            [("DOCKER_HOST", second.docker_host()), ("STATE_DIRECTORY", stored.path().display().to_string())];
        let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
        Agent::start(&second.netns, swarm.folder(), &[], &variables)
    };
    two.stop(Signal::SIGTERM);
    drop(with_store());
    let two = with_store();
    all_serve();
    all_use_theirs();
    assert_eq!(forged(), already + 10, "node2 is taken for itself");
    // Or another.
    drop(two);
    let _two = swarm.attach_one(second, &[]);
    all_serve();
    all_use_theirs();
    for cookie in [None, Some(1)] {
        let before = forged();
        forger.send(cookie);
        within(PATIENCE, "what is forged is counted", || forged() > before);
    }
    assert_eq!(taken(), before, "none of it arrived");
}
