//! What the tunnel, ICMP errors and fragments look like, packet by packet: BPF_PROG_TEST_RUN against packets that
//! etherparse builds.

use std::{collections::BTreeMap, net::IpAddr};

use lb_common::{
    abi::{META_TC_DECIDES, META_TC_SENDS_REPLY, TC_ALONE, XDP_IS_NEW},
    outcome::Outcome,
    tunnel::{
        DEFAULT_PORT, NAMES_TASK, OPTION_CLASS, PROBE, PROBE_ANSWER, RETURN_DIRECT, TO_CLIENT, TO_TASK,
        VERSION,
    },
};
use lb_tests::{
    lab::{DROP, HOP_MAC, Lab, PASS, REDIRECT, TASK_MAC, TX, UPLINK_MTU, ip, service, task, with_lab},
    packet::{
        ACK, CLIENT_MAC, IcmpError, NODE_MAC, Packet, SYN, SYN_ACK, Transport, Tunnelled, assert_checksums,
    },
};
use lb_userspace::cluster::{Return, Service, Via};

/// What one family's tests use.
#[derive(Clone, Copy, Debug)]
struct Family {
    client: &'static str,
    router: &'static str,
    listener: &'static str,
    node: &'static str,
    peer: &'static str,
    local: &'static str,
    routed: &'static str,
    /// What TCP over this family needs beside a segment.
    headers: u16,
}

const V4: Family = Family {
    client: "198.51.100.7",
    router: "203.0.113.9",
    listener: "192.0.2.1",
    node: "192.0.2.1",
    peer: "192.0.2.2",
    local: "172.18.0.11",
    routed: "10.9.0.1",
    headers: 40,
};
const V6: Family = Family {
    client: "2001:db8:77::7",
    router: "2001:db8:99::9",
    listener: "2001:db8::1",
    node: "2001:db8::1",
    peer: "2001:db8::2",
    local: "fd18::11",
    routed: "fd09::1",
    headers: 60,
};

const FAMILIES: [Family; 2] = [V4, V6];
/// The far task's address in the cluster, for both families: the first of its own.
const FAR: &str = "172.18.9.11";
/// The near task's address in the cluster.
const NEAR: &str = "10.0.0.7";

fn services() -> Vec<Service> {
    let mut near = task("near.1", true, Via::Peer, &[V4.local, V6.local]);
    near.overlay = Some(ip(NEAR));
    vec![
        service(
            "far",
            &["83:8083", "83:8083/udp"],
            vec![task("far.1", false, Via::Peer, &[FAR, "fd18::9:11"])],
        ),
        service("near", &["84:8084", "84:8084/udp"], vec![near]),
        service(
            "routed",
            &["81:8081", "81:8081/udp"],
            vec![task("routed.1", false, Via::Routed, &[V4.routed, V6.routed])],
        ),
    ]
}

/// Runs a test with each family outside the tunnel.
fn with_both(test: impl Fn(&mut Lab, Family) + Send + Sync) {
    for outer in FAMILIES {
        with_lab(services(), |lab| {
            if outer.headers == V6.headers {
                lab.update(|cluster| cluster.nodes.iter_mut().for_each(|node| node.addresses.reverse()));
            }
            test(lab, outer);
        });
    }
}

fn inner(packet: &Packet) -> Vec<u8> {
    packet.bytes()[14..].to_vec()
}

/// As this node sends it.
fn sent(outer: Family, kind: u8, named: (&str, u16), inner: Vec<u8>) -> Tunnelled {
    Tunnelled {
        macs: (NODE_MAC, HOP_MAC),
        nodes: (ip(outer.node), ip(outer.peer)),
        ports: (0, DEFAULT_PORT),
        network: 0,
        class: OPTION_CLASS.get(),
        kind,
        version_and_flags: [VERSION, 0],
        task: (ip(named.0), named.1),
        cookie: None,
        inner,
    }
}

/// As the peer sends it to this node.
fn received(outer: Family, kind: u8, named: (&str, u16), inner: Vec<u8>) -> Tunnelled {
    let mut tunnelled = sent(outer, kind, named, inner);
    tunnelled.macs = (HOP_MAC, NODE_MAC);
    tunnelled.nodes = (tunnelled.nodes.1, tunnelled.nodes.0);
    tunnelled.ports.0 = 51_000;
    tunnelled
}

/// An answer of this node's task, as this node sends it.
fn answered(outer: Family, inner: Vec<u8>) -> Tunnelled {
    let mut tunnelled = sent(outer, TO_CLIENT, (NEAR, 8084), inner);
    tunnelled.version_and_flags[1] = NAMES_TASK;
    tunnelled
}

/// Asserts what a frame is but for what the flow's hash decides: the UDP source port and the flow label.
fn assert_sent(what: &str, frame: &[u8], mut expected: Tunnelled) {
    let at = if expected.nodes.0.is_ipv4() { 34 } else { 54 };
    let port = u16::from_be_bytes([frame[at], frame[at + 1]]);
    assert!(port >= 0xc000, "{what}: source port {port} is not a dynamic one");
    expected.ports.0 = port;
    let mut bytes = expected.bytes();
    if expected.nodes.0.is_ipv6() {
        assert_eq!(frame[15] >> 4, 0, "{what}: the traffic class");
        bytes[15..18].copy_from_slice(&frame[15..18]);
    }
    assert_eq!(frame, bytes, "{what}");
}

fn packet(family: Family, transport: Transport, port: u16, to: u16) -> Packet {
    Packet::new(transport, (ip(family.client), port), (ip(family.listener), to))
}

#[test]
fn a_request_travels_as_the_client_sent_it_and_names_its_task() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            for (open, go_on) in [(SYN, ACK), (Transport::Udp, Transport::Udp)] {
                for transport in [open, go_on] {
                    let packet = packet(family, transport, 40_000, 83).with(|p| p.hops = 2);
                    let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
                    assert_eq!((verdict.action, verdict.note), (TX, None));
                    assert_sent(
                        "a request",
                        &verdict.frame,
                        sent(outer, TO_TASK, (FAR, 8083), inner(&packet)),
                    );
                    assert_eq!(counted, BTreeMap::from([(Outcome::Peer, 1)]));
                }
            }
            // Padding of a short frame stays outside.
            let short = packet(family, ACK, 40_000, 83).with(|p| p.payload = vec![]);
            let mut padded = short.bytes();
            padded.extend([0; 9]);
            let verdict = lab.xdp(&padded);
            let length = verdict.frame.len() - 9;
            assert_sent("padded", &verdict.frame[..length], sent(outer, TO_TASK, (FAR, 8083), inner(&short)));
        }
        // Another connection takes another source port, a connection always the same.
        let port = |from| {
            let frame = lab.xdp(&packet(V4, SYN, from, 83).bytes()).frame;
            let at = if outer.headers == V4.headers { 34 } else { 54 };
            u16::from_be_bytes([frame[at], frame[at + 1]])
        };
        let ports: std::collections::BTreeSet<_> = (41_000..41_064).map(port).collect();
        assert!(ports.len() > 56, "{ports:?}");
        assert_eq!(port(41_000), port(41_000));
        lab.update(|cluster| cluster.tunnel.returns = Return::Direct);
        let request = packet(V6, ACK, 40_000, 83);
        let mut expected = sent(outer, TO_TASK, (FAR, 8083), inner(&request));
        expected.version_and_flags = [VERSION, RETURN_DIRECT];
        assert_sent("returned directly", &lab.xdp(&request.bytes()).frame, expected);
        lab.update(|cluster| cluster.service_mut(0).returns = Some(Return::Tunnel));
        let expected = sent(outer, TO_TASK, (FAR, 8083), inner(&request));
        assert_sent("but not this service", &lab.xdp(&request.bytes()).frame, expected);
    });
}

#[test]
fn tc_builds_the_same_tunnel_packets() {
    with_both(|lab, outer| {
        lab.configure(|config| config.flags = TC_ALONE);
        for family in FAMILIES {
            for transport in [SYN, ACK, Transport::Udp] {
                let request = packet(family, transport, 40_000, 83);
                let verdict = lab.uplink_tc(&request.bytes());
                assert_eq!(verdict.action, REDIRECT);
                assert_sent("a request", &verdict.frame, sent(outer, TO_TASK, (FAR, 8083), inner(&request)));
                // And takes them apart: the task gets what the client sent.
                let request = packet(family, transport, 40_001, 84);
                let arrived = received(outer, TO_TASK, (NEAR, 8084), inner(&request));
                let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&arrived.bytes()));
                let to = (ip(family.local), 8084);
                let expected = request.forwarded((ip(family.client), 40_001), to, (lab_bridge(), TASK_MAC));
                assert_eq!(verdict.frame, expected.bytes());
                assert_eq!(verdict.action, REDIRECT);
                assert_eq!(counted, BTreeMap::from([(Outcome::Local, 1)]));
            }
        }
    });
}

const fn lab_bridge() -> [u8; 6] {
    lb_tests::lab::BRIDGE_MAC
}

#[test]
fn a_task_is_found_by_its_name_and_its_answers_go_back_through_the_peer() {
    with_both(|lab, outer| {
        // The client used an address of the peer, on a port that this node does not even publish.
        let listeners = [(V4, "192.0.2.2"), (V6, "2001:db8::2")];
        for ((family, listener), port) in listeners.into_iter().zip([45_000, 45_001]) {
            for (open, answer) in [(SYN, SYN_ACK), (ACK, ACK), (Transport::Udp, Transport::Udp)] {
                let client = (ip(family.client), port);
                let request = Packet::new(open, client, (ip(listener), 9_999));
                let arrived = received(outer, TO_TASK, (NEAR, 8084), inner(&request));
                let (verdict, counted) = lab.counting(|lab| lab.xdp(&arrived.bytes()));
                assert_eq!(verdict.action, PASS);
                let mut plain = request.clone();
                plain.macs = (HOP_MAC, NODE_MAC);
                assert_eq!(verdict.frame, plain.bytes(), "out of the tunnel");
                assert_eq!(lab.task_of(verdict.note.expect("a note")), "near.1");
                assert_eq!(counted, BTreeMap::from([(Outcome::Local, 1)]));
                let back = Packet::new(answer, (ip(family.local), 8084), client);
                let (verdict, counted) = lab.counting(|lab| lab.task_tc(&back.bytes()));
                let expected = back.forwarded((ip(listener), 9_999), client, back.macs);
                assert_eq!(verdict.action, REDIRECT);
                assert_sent("an answer", &verdict.frame, answered(outer, inner(&expected)));
                assert_eq!(counted, BTreeMap::from([(Outcome::Reply, 1)]));
                assert_checksums(&expected.bytes());
            }
        }
    });
}

#[test]
fn answers_are_emitted_by_the_connection_s_hop_or_left_to_tc() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let client = (ip(family.client), 46_000);
            assert_eq!(lab.xdp(&packet(family, SYN, 46_000, 83).bytes()).action, TX);
            let answer = Packet::new(SYN_ACK, (ip(family.listener), 83), client);
            let arrived = received(outer, TO_CLIENT, ("0.0.0.0", 0), inner(&answer));
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&arrived.bytes()));
            assert_eq!((verdict.action, verdict.note), (TX, None));
            let expected = answer.clone().with(|p| p.macs = (NODE_MAC, CLIENT_MAC));
            assert_eq!(verdict.frame, expected.bytes());
            assert_eq!(counted, BTreeMap::from([(Outcome::Reply, 1)]));
            // A connection that this node has no more: TC asks the routing table.
            let stray = Packet::new(ACK, (ip(family.listener), 83), (ip(family.client), 46_001));
            let arrived = received(outer, TO_CLIENT, ("0.0.0.0", 0), inner(&stray));
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&arrived.bytes()));
            assert_eq!((verdict.action, verdict.note), (PASS, Some(META_TC_SENDS_REPLY)));
            assert_eq!(counted, BTreeMap::new());
            // It is emitted only from an address of this node.
            let foreign = Packet::new(ACK, (ip(family.router), 83), (ip(family.client), 46_001));
            let arrived = received(outer, TO_CLIENT, ("0.0.0.0", 0), inner(&foreign));
            refused(lab, "from another's address", &arrived.bytes(), Outcome::TunnelNotPeer);
        }
    });
}

#[test]
fn only_the_task_that_has_the_connection_answers_for_its_node() {
    with_both(|lab, outer| {
        let second = ["172.18.9.12", "fd18::9:12"];
        lab.update(|cluster| {
            cluster.service_mut(0).tasks.push(task("far.2", false, Via::Peer, &second));
        });
        for family in FAMILIES {
            // A quarter of no second is over at once: the SYN that is sent again goes to the other task.
            lab.configure(|config| config.jiffies_per_second = 0);
            let syn = packet(family, SYN, 46_010, 83).bytes();
            // The name stands right before the packet inside; of an IPv4 address the last four bytes.
            let taken = || {
                let frame = lab.xdp(&syn).frame;
                let at = frame.len() - (syn.len() - 14);
                let named =
                    |name: &&str| ip(name) == IpAddr::from(<[u8; 4]>::try_from(&frame[at - 4..at]).unwrap());
                [FAR, second[0]].into_iter().find(named).expect("it names one of the two")
            };
            let (first, then) = (taken(), taken());
            assert_ne!(first, then);
            let of = |named: (&str, u16), flags, transport| {
                let answer = Packet::new(transport, (ip(family.listener), 83), (ip(family.client), 46_010));
                let mut arrived = received(outer, TO_CLIENT, named, inner(&answer));
                arrived.version_and_flags[1] = flags;
                arrived.bytes()
            };
            let late = Outcome::LateReply;
            refused(lab, "the first task", &of((first, 8083), NAMES_TASK, SYN_ACK), late);
            refused(lab, "another port", &of((then, 8084), NAMES_TASK, SYN_ACK), late);
            let emitted = |what: &str, frame: &[u8]| {
                let (verdict, counted) = lab.counting(|lab| lab.xdp(frame));
                assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::Reply, 1)])), "{what}");
            };
            emitted("the second", &of((then, 8083), NAMES_TASK, SYN_ACK));
            // Nor once it is established.
            lab.xdp(&packet(family, ACK, 46_010, 83).bytes());
            emitted("the second again", &of((then, 8083), NAMES_TASK, ACK));
            emitted("of a node that names no tasks", &of(("0.0.0.0", 0), 0, ACK));
            refused(lab, "the first, established", &of((first, 8083), NAMES_TASK, ACK), late);
        }
    });
}

/// Asserts that XDP and TC drop a frame for a reason, TC also if XDP has just come and has not seen it.
fn refused(lab: &mut Lab, what: &str, frame: &[u8], outcome: Outcome) {
    let (verdict, counted) = lab.counting(|lab| lab.xdp(frame));
    assert_eq!((verdict.action, counted), (DROP, BTreeMap::from([(outcome, 1)])), "{what}");
    let before = lab.datapath().config().flags;
    for flags in [TC_ALONE, before | XDP_IS_NEW] {
        lab.configure(|config| config.flags = flags);
        let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(frame));
        // TC_ACT_SHOT
        assert_eq!((verdict.action, counted), (2, BTreeMap::from([(outcome, 1)])), "{what} in TC");
    }
    lab.configure(|config| config.flags = before);
}

#[test]
fn what_no_peer_sent_to_a_task_of_ours_is_dropped_and_named() {
    with_both(|lab, outer| {
        let request = packet(V4, SYN, 47_000, 84);
        let good = received(outer, TO_TASK, (NEAR, 8084), inner(&request));
        let other = |text: &str| ip(if outer.headers == V4.headers { text } else { "2001:db8:5::5" });
        let with = |change: &dyn Fn(&mut Tunnelled)| {
            let mut tunnelled = good.clone();
            change(&mut tunnelled);
            tunnelled.bytes()
        };
        let not_peer = Outcome::TunnelNotPeer;
        refused(lab, "from a stranger", &with(&|t| t.nodes.0 = other("192.0.2.77")), not_peer);
        refused(lab, "from ourselves", &with(&|t| t.nodes.0 = ip(outer.node)), not_peer);
        let between_others = with(&|t| t.nodes.1 = other("192.0.2.77"));
        lab.passes("on its way between others", &between_others, Outcome::NotOurs);
        // Tagged: an interface on top of the uplink may have an agent of its own.
        let mut tagged = good.bytes();
        tagged.splice(12..12, [0x81, 0, 0, 7]);
        lab.passes("tagged", &tagged, Outcome::NotOurs);
        let no_task = Outcome::TunnelNoTask;
        refused(lab, "another task", &with(&|t| t.task.0 = ip("10.0.0.8")), no_task);
        refused(lab, "another port", &with(&|t| t.task.1 = 8085), no_task);
        refused(lab, "by its own address", &with(&|t| t.task.0 = ip(V4.local)), no_task);
        refused(lab, "a task of another node", &with(&|t| t.task = (ip(FAR), 8083)), no_task);
        let malformed = Outcome::TunnelMalformed;
        refused(lab, "another version", &with(&|t| t.version_and_flags[0] = 3), malformed);
        refused(lab, "no packet inside", &with(&|t| t.inner.truncate(12)), malformed);
        refused(lab, "another protocol inside", &with(&|t| t.inner[9] = 47), malformed);
        // Another program's Geneve, and other things on its port, pass.
        for frame in [with(&|t| t.class = 0x0102), with(&|t| t.kind = 0x80)] {
            lab.passes("another program's option", &frame, Outcome::NotOurs);
        }
        let short = Packet::new(Transport::Udp, (ip(outer.peer), 5), (ip(outer.node), DEFAULT_PORT));
        lab.passes("too short for Geneve", &short.bytes(), Outcome::NotOurs);
    });
}

#[test]
fn a_probe_is_sent_back_to_the_peer_that_sent_it() {
    with_both(|lab, outer| {
        let probe = received(outer, PROBE, ("10.1.2.3", 77), vec![]);
        let mut answer = probe.clone();
        answer.kind = PROBE_ANSWER;
        answer.macs = (NODE_MAC, HOP_MAC);
        answer.nodes = (ip(outer.node), ip(outer.peer));
        answer.ports = (DEFAULT_PORT, 51_000);
        answer.network = UPLINK_MTU;
        let one = BTreeMap::from([(Outcome::TunnelProbe, 1)]);
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&probe.bytes()));
        assert_eq!((verdict.action, verdict.note), (TX, None));
        assert_eq!(verdict.frame, answer.bytes());
        assert_eq!(counted, one);
        // An answer is for the controller that waits for it, and is answered by nobody.
        let heard = received(outer, PROBE_ANSWER, ("10.1.2.3", 77), vec![]);
        lab.passes("an answer", &heard.bytes(), Outcome::TunnelProbe);
        let mut strange = probe.clone();
        strange.nodes.0 = ip(if outer.headers == V4.headers { "192.0.2.77" } else { "2001:db8:5::5" });
        refused(lab, "a stranger's", &strange.bytes(), Outcome::TunnelNotPeer);
        lab.configure(|config| config.flags = TC_ALONE);
        let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&probe.bytes()));
        assert_eq!((verdict.action, counted), (REDIRECT, one));
        assert_eq!(verdict.frame, answer.bytes());
    });
}

/// The port in front of which XDP's metadata for a frame has the task see its client.
fn port_at_task(lab: &Lab, frame: &[u8]) -> u16 {
    let (verdict, counted) = lab.counting(|lab| lab.xdp(frame));
    assert_eq!((verdict.action, counted), (PASS, BTreeMap::from([(Outcome::Local, 1)])));
    assert!(verdict.note.is_some());
    verdict.port.expect("a port")
}

#[test]
fn one_client_port_by_several_nodes_is_several_ports_at_the_task() {
    with_both(|lab, outer| {
        let to = |listener: &str, transport, port| {
            let client = (ip(V4.client), port);
            let request = Packet::new(transport, client, (ip(listener), 84)).at(1_000, 0);
            received(outer, TO_TASK, (NEAR, 8084), inner(&request)).bytes()
        };
        // The first keeps its port; who comes by another node, or to this one itself, gets another of the client's.
        assert_eq!(port_at_task(lab, &to("192.0.2.2", SYN, 47_500)), 47_500);
        let second = port_at_task(lab, &to("192.0.2.3", SYN, 47_500));
        let own = packet(V4, SYN, 47_500, 84).at(1_000, 0);
        let third = port_at_task(lab, &own.bytes());
        assert!(second != 47_500 && third != 47_500 && second != third, "{second} {third}");
        // And keeps it.
        assert_eq!(port_at_task(lab, &to("192.0.2.3", SYN, 47_500)), second);
        // Replies find the connection by that port, and leave for the client's own.
        let client = (ip(V4.client), 47_500);
        let back = |port| Packet::new(SYN_ACK, (ip(V4.local), 8084), (ip(V4.client), port)).at(7_000, 1_001);
        let verdict = lab.task_tc(&back(third).bytes());
        let expected = back(third).forwarded((ip(V4.listener), 84), client, (NODE_MAC, CLIENT_MAC));
        assert_eq!((verdict.action, verdict.frame), (REDIRECT, expected.bytes()));
        for (listener, port) in [("192.0.2.2", 47_500), ("192.0.2.3", second)] {
            let verdict = lab.task_tc(&back(port).bytes());
            let expected = inner(&back(port).forwarded((ip(listener), 84), client, back(port).macs));
            assert_eq!(verdict.action, REDIRECT);
            assert_eq!(verdict.frame[verdict.frame.len() - expected.len()..], expected, "{listener}");
        }
        // A client whose own port that is takes another too.
        let taken = port_at_task(lab, &packet(V4, SYN, third, 84).at(1_000, 0).bytes());
        assert_ne!(taken, third);
        // What the task says of the translated port reaches the client as of its own.
        let refused = Packet::new(ACK, (ip(V4.client), third), (ip(V4.local), 8084)).at(1_001, 7_001);
        let error = |quoted: Packet, from: &str, to: (&str, [u8; 6], [u8; 6])| IcmpError {
            macs: (to.1, to.2),
            from: ip(from),
            to: ip(to.0),
            kind: (3, 3),
            rest: 0,
            hops: 64,
            quote: inner(&quoted),
        };
        let said = error(refused, V4.local, (V4.client, TASK_MAC, NODE_MAC));
        let verdict = lab.task_tc(&said.bytes());
        assert_eq!(verdict.action, REDIRECT);
        let quoted = Packet::new(ACK, client, (ip(V4.listener), 84)).at(1_001, 7_001);
        let mut told = error(quoted, V4.listener, (V4.client, NODE_MAC, CLIENT_MAC));
        told.hops = 63;
        assert_eq!(verdict.frame[..34], told.bytes()[..34]);
        assert_eq!(verdict.frame[42 + 20..42 + 24], told.bytes()[42 + 20..42 + 24], "the quoted ports");
        // In TC it is the same packet as in two steps.
        lab.configure(|config| config.flags = TC_ALONE);
        let verdict = lab.uplink_tc(&own.bytes());
        let expected = own.forwarded((ip(V4.client), third), (ip(V4.local), 8084), (lab_bridge(), TASK_MAC));
        assert_eq!((verdict.action, verdict.frame), (REDIRECT, expected.bytes()));
    });
}

#[test]
fn a_connection_that_is_over_does_not_claim_the_answers_of_the_next() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let client = (ip(family.client), 47_600);
            let far = if family.headers == V4.headers { "192.0.2.2" } else { "2001:db8:1::2" };
            for (transport, sequence) in [(SYN, 1_000), (lb_tests::packet::FIN, 1_001)] {
                let request = Packet::new(transport, client, (ip(far), 84)).at(sequence, 0);
                let arrived = received(outer, TO_TASK, (NEAR, 8084), inner(&request));
                assert!(lab.xdp(&arrived.bytes()).note.is_some());
            }
            // The client's next connection from that port comes to this node.
            assert!(lab.xdp(&packet(family, SYN, 47_600, 84).bytes()).note.is_some());
            let back = Packet::new(SYN_ACK, (ip(family.local), 8084), client);
            let verdict = lab.task_tc(&back.bytes());
            let expected = back.forwarded((ip(family.listener), 84), client, (NODE_MAC, CLIENT_MAC));
            assert_eq!((verdict.action, verdict.frame), (REDIRECT, expected.bytes()));
        }
    });
}

#[test]
fn segments_are_made_to_fit_the_tunnel() {
    with_both(|lab, outer| {
        let overhead: u16 = if outer.headers == V4.headers { 60 } else { 80 };
        for family in FAMILIES {
            let room = 1500 - overhead - family.headers;
            for (before, said, kept) in
                [(vec![], 1460, room), (vec![1], 1460, room), (vec![3, 3, 7], 9000, room), (vec![], 900, 900)]
            {
                let options = |size: u16| {
                    let mut options = before.clone();
                    options.extend([2, 4]);
                    options.extend(size.to_be_bytes());
                    options.resize(options.len().next_multiple_of(4), 0);
                    options
                };
                let what = format!("{family:?} {before:?} {said}");
                let syn = packet(family, SYN, 48_000, 83).with(|p| p.tcp_options = options(said));
                let expected = syn.clone().with(|p| p.tcp_options = options(kept));
                let verdict = lab.xdp(&syn.bytes());
                assert_sent(&what, &verdict.frame, sent(outer, TO_TASK, (FAR, 8083), inner(&expected)));
                // At the other end, for what the task may send.
                let syn = packet(family, SYN, 48_001, 84).with(|p| p.tcp_options = options(said));
                let arrived = received(outer, TO_TASK, (NEAR, 8084), inner(&syn));
                let expected = syn.clone().with(|p| {
                    p.tcp_options = options(kept);
                    p.macs = (HOP_MAC, NODE_MAC);
                });
                assert_eq!(lab.xdp(&arrived.bytes()).frame, expected.bytes(), "{what}");
                // And in the answer, for what the client may.
                let client = (ip(family.client), 48_001);
                let back = Packet::new(SYN_ACK, (ip(family.local), 8084), client)
                    .with(|p| p.tcp_options = options(said));
                let verdict = lab.task_tc(&back.bytes());
                let expected = back
                    .forwarded((ip(family.listener), 84), client, back.macs)
                    .with(|p| p.tcp_options = options(kept));
                let expected = inner(&expected);
                assert_eq!(verdict.frame[verdict.frame.len() - expected.len()..], expected, "{what}");
                let back = Packet::new(SYN_ACK, (ip(family.listener), 83), (ip(family.client), 48_000))
                    .with(|p| p.tcp_options = options(said));
                let arrived = received(outer, TO_CLIENT, ("0.0.0.0", 0), inner(&back));
                let expected = back.clone().with(|p| {
                    p.tcp_options = options(kept);
                    p.macs = (NODE_MAC, CLIENT_MAC);
                });
                assert_eq!(lab.xdp(&arrived.bytes()).frame, expected.bytes(), "{what}");
            }
            // Options that contradict themselves are left as they are.
            let odd =
                packet(family, SYN, 48_002, 83).with(|p| p.tcp_options = vec![8, 0, 2, 4, 5, 180, 0, 0]);
            let verdict = lab.xdp(&odd.bytes());
            assert_sent("odd", &verdict.frame, sent(outer, TO_TASK, (FAR, 8083), inner(&odd)));
        }
    });
}

#[test]
fn what_is_too_long_is_answered_with_the_length_that_fits() {
    with_both(|lab, outer| {
        let room: usize = if outer.headers == V4.headers { 1440 } else { 1420 };
        for family in FAMILIES {
            let network = usize::from(family.headers) - 20;
            let of = |length: usize| {
                packet(family, Transport::Udp, 49_000, 83).with(|p| p.payload = vec![7; length - network - 8])
            };
            let fits = of(room);
            let verdict = lab.xdp(&fits.bytes());
            assert_sent("just fits", &verdict.frame, sent(outer, TO_TASK, (FAR, 8083), inner(&fits)));
            let long = of(room + 1);
            let error = |mtu: u32| IcmpError {
                macs: (NODE_MAC, CLIENT_MAC),
                from: ip(family.listener),
                to: ip(family.client),
                kind: if network == 20 { (3, 4) } else { (2, 0) },
                rest: mtu,
                hops: 64,
                quote: inner(&long)[..504].to_vec(),
            };
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&long.bytes()));
            assert_eq!(verdict.frame, error(room as u32).bytes());
            assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::TooBig, 1)])));
            lab.configure(|config| config.flags = TC_ALONE);
            let verdict = lab.uplink_tc(&long.bytes());
            assert_eq!((verdict.action, verdict.frame), (REDIRECT, error(room as u32).bytes()));
            lab.configure(|config| config.flags = lb_common::abi::XDP_TRANSMITS);
        }
        // Somebody says that the way between the nodes lets less pass.
        let request = packet(V4, Transport::Udp, 49_000, 83);
        let quote = sent(outer, TO_TASK, (FAR, 8083), inner(&request)).bytes()[14..].to_vec();
        let said = |mtu| IcmpError {
            macs: (HOP_MAC, NODE_MAC),
            from: ip(outer.router),
            to: ip(outer.node),
            kind: if outer.headers == V4.headers { (3, 4) } else { (2, 0) },
            rest: mtu,
            hops: 64,
            quote: quote.clone(),
        };
        let long = request.clone().with(|p| p.payload = vec![7; 1_300]);
        for mtu in [500, 1_300] {
            lab.passes("what anybody can say", &said(mtu).bytes(), Outcome::TunnelError);
            assert_sent(
                "as ever",
                &lab.xdp(&long.bytes()).frame,
                sent(outer, TO_TASK, (FAR, 8083), inner(&long)),
            );
        }
        // Probes have found that it is true.
        lab.mtu = 1_300;
        lab.update(|_| {});
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&long.bytes()));
        assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::TooBig, 1)])));
        let left = 1_300 - (1_500 - room) as u16;
        assert_eq!(verdict.frame[40..42], left.to_be_bytes(), "the MTU in the error");
        // A receiver of IPv6 does not believe that 1,280 bytes are too many (RFC 8201, 4).
        let long = packet(V6, Transport::Udp, 49_000, 83).with(|p| p.payload = vec![7; 1_300]);
        assert_eq!(lab.xdp(&long.bytes()).frame[58..62], 1_280_u32.to_be_bytes(), "the least of IPv6");
        // Said by nobody who has to do with it.
        let foreign = IcmpError { to: ip(outer.listener), ..said(1_280) };
        let quote =
            Packet::new(Transport::Udp, (ip(outer.listener), 50_000), (ip(outer.router), DEFAULT_PORT));
        let foreign = IcmpError { quote: inner(&quote), ..foreign };
        lab.passes("about no peer", &foreign.bytes(), Outcome::NotOurs);
    });
}

#[test]
fn nobody_is_flooded_with_errors_that_he_did_not_ask_for() {
    with_both(|lab, outer| {
        let v4 = outer.headers == V4.headers;
        let family = if v4 { V4 } else { V6 };
        // Of IPv6 a network shares its errors.
        let victims = if v4 { ["203.0.113.7"; 2] } else { ["2001:db8:7::1", "2001:db8:7::2"] };
        let others = if v4 {
            ["203.0.113.8", "203.0.113.9", "198.51.101.7"]
        } else {
            ["2001:db8:8::1", "2001:db8:7:1::1", "2001:db9:7::1"]
        };
        let answered = |lab: &mut Lab, source: &str, port| {
            let forged = packet(family, Transport::Udp, port, 83)
                .with(|p| (p.source, p.payload) = (ip(source), vec![7; 1_460]));
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&forged.bytes()));
            assert_eq!(counted.get(&Outcome::TooBig), Some(&1), "{counted:?}");
            assert!([TX, DROP].contains(&verdict.action), "{verdict:?}");
            verdict.action == TX
        };
        let hz = lab.datapath().config().jiffies_per_second;
        let begin = lab.jiffies();
        let sent = (50_000..50_100).zip(victims.into_iter().cycle());
        let errors = sent.filter(|(port, victim)| answered(lab, victim, *port)).count();
        let seconds = lab.jiffies().wrapping_sub(begin) / hz;
        let room = 10 * (1 + seconds as usize);
        assert!((10..=room).contains(&errors), "{errors} errors in {seconds} s");
        // Budgets are shared by hash: one of three others has its own.
        assert!(others.into_iter().any(|other| answered(lab, other, 50_100)));
    });
}

#[test]
fn an_answer_that_cannot_go_through_the_tunnel_does_not_go_by_the_host() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let client = (ip(family.client), 49_500);
            let asked = packet(family, Transport::Udp, 49_500, 84);
            lab.xdp(&received(outer, TO_TASK, (NEAR, 8084), inner(&asked)).bytes());
            let back = Packet::new(Transport::Udp, (ip(family.local), 8084), client)
                .with(|p| p.payload = vec![6; 2_000]);
            let [first, later] = fragments(&back, 504);
            assert_eq!(lab.task_tc(&first).action, REDIRECT);
            // Too long, and no fragment to answer with an error. Nobody but its sender cuts IPv6 that is as long. TC_ACT_SHOT.
            let outcome = if family.headers == V4.headers { Outcome::Fragmented } else { Outcome::TooBig };
            let (verdict, counted) = lab.counting(|lab| lab.task_tc(&later));
            assert_eq!((verdict.action, counted), (2, BTreeMap::from([(outcome, 1)])));
        }
    });
}

/// The quote of a packet, as long as ICMP asks for and longer, and with extensions after it (RFC 4884).
fn quotes(family: Family, packet: &Packet) -> Vec<Vec<u8>> {
    let whole = inner(packet);
    let least = usize::from(family.headers) - 20 + 8;
    let mut extended = whole.clone();
    extended.resize(128, 0);
    extended.extend([0x20, 0, 0xdf, 0xff, 0, 8, 1, 1, 0xde, 0xad, 0xbe, 0xef]);
    vec![whole[..least].to_vec(), whole, extended]
}

#[test]
fn errors_about_answers_reach_the_task_as_if_it_had_talked_to_the_client() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let kinds =
                if family.headers == 40 { [(3, 4), (3, 1), (11, 0)] } else { [(2, 0), (1, 0), (3, 0)] };
            for (transport, answer) in [(SYN, ACK), (Transport::Udp, Transport::Udp)] {
                let client = (ip(family.client), 50_000);
                for port in [81, 83, 84] {
                    lab.xdp(&packet(family, transport, 50_000, port).bytes());
                }
                for (kind, (from, length)) in kinds
                    .into_iter()
                    .flat_map(|kind| [family.router, family.client].map(|from| (kind, (from, 3))))
                {
                    for index in 0..length {
                        let error = |port: u16| {
                            let answered = Packet::new(answer, (ip(family.listener), port), client);
                            IcmpError {
                                macs: (CLIENT_MAC, NODE_MAC),
                                from: ip(from),
                                to: ip(family.listener),
                                kind,
                                rest: 1_280,
                                hops: 60,
                                quote: quotes(family, &answered)[index].clone(),
                            }
                        };
                        // What the task sent, quoted: as before the answer was turned around.
                        let as_sent = |task: &str, port| {
                            let answered = Packet::new(answer, (ip(task), port), client);
                            quotes(family, &answered)[index].clone()
                        };
                        let expected = IcmpError {
                            macs: (NODE_MAC, HOP_MAC),
                            to: ip(family.routed),
                            hops: 59,
                            quote: as_sent(family.routed, 8081),
                            ..error(81)
                        };
                        let (verdict, counted) = lab.counting(|lab| lab.xdp(&error(81).bytes()));
                        assert_eq!(verdict.frame, expected.bytes(), "{family:?} {kind:?} {from} {index}");
                        assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::Routed, 1)])));
                        // To a peer as it came.
                        let verdict = lab.xdp(&error(83).bytes());
                        let inner = error(83).bytes()[14..].to_vec();
                        assert_sent("an error", &verdict.frame, sent(outer, TO_TASK, (FAR, 8083), inner));
                        // To a task of this node, from here or from a peer.
                        let arrived =
                            received(outer, TO_TASK, (NEAR, 8084), error(84).bytes()[14..].to_vec());
                        for frame in [error(84).bytes(), arrived.bytes()] {
                            lab.configure(|config| config.flags = TC_ALONE);
                            let verdict = lab.uplink_tc(&frame);
                            let expected = IcmpError {
                                macs: (lab_bridge(), TASK_MAC),
                                to: ip(family.local),
                                hops: 59,
                                quote: as_sent(family.local, 8084),
                                ..error(84)
                            };
                            assert_eq!((verdict.action, verdict.frame), (REDIRECT, expected.bytes()));
                            lab.configure(|config| config.flags = lb_common::abi::XDP_TRANSMITS);
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn a_task_s_errors_reach_the_client_from_the_listener() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let kind = if family.headers == 40 { (3, 3) } else { (1, 4) };
            for transport in [SYN, Transport::Udp] {
                let client = (ip(family.client), 51_000);
                lab.xdp(&packet(family, transport, 51_000, 81).bytes());
                // By the task itself, or by a router before it: nobody learns of either.
                for from in [family.routed, family.router] {
                    for index in 0..3 {
                        let asked = packet(family, transport, 51_000, 81);
                        let seen = asked.clone().with(|p| {
                            (p.destination, p.destination_port) = (ip(family.routed), 8081);
                        });
                        let error = IcmpError {
                            macs: (HOP_MAC, NODE_MAC),
                            from: ip(from),
                            to: client.0,
                            kind,
                            rest: 0,
                            hops: 64,
                            quote: quotes(family, &seen)[index].clone(),
                        };
                        let expected = IcmpError {
                            macs: (NODE_MAC, CLIENT_MAC),
                            from: ip(family.listener),
                            hops: 63,
                            quote: quotes(family, &asked)[index].clone(),
                            ..error.clone()
                        };
                        let (verdict, counted) = lab.counting(|lab| lab.xdp(&error.bytes()));
                        assert_eq!(verdict.frame, expected.bytes(), "{family:?} {from} {index}");
                        assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::Reply, 1)])));
                        // A connection that does not exist is the host's.
                        let stray =
                            IcmpError { quote: inner(&seen.with(|p| p.source_port = 51_001)), ..error };
                        lab.passes("about no connection", &stray.bytes(), Outcome::NotOurs);
                    }
                }
                // Through a peer: the error leaves in the tunnel, as the listener's.
                let listener = if family.headers == 40 { "192.0.2.2" } else { "2001:db8::2" };
                let asked = Packet::new(transport, client, (ip(listener), 84));
                lab.xdp(&received(outer, TO_TASK, (NEAR, 8084), inner(&asked)).bytes());
                let seen =
                    asked.clone().with(|p| (p.destination, p.destination_port) = (ip(family.local), 8084));
                let error = IcmpError {
                    macs: (TASK_MAC, lab_bridge()),
                    from: ip(family.local),
                    to: client.0,
                    kind,
                    rest: 0,
                    hops: 64,
                    quote: inner(&seen),
                };
                let expected =
                    IcmpError { from: ip(listener), hops: 63, quote: inner(&asked), ..error.clone() };
                let verdict = lab.task_tc(&error.bytes());
                assert_eq!(verdict.action, REDIRECT);
                let expected = answered(outer, expected.bytes()[14..].to_vec());
                assert_sent("an error", &verdict.frame, expected);
            }
        }
        // Echo and other messages are the host's.
        for kind in [(8, 0), (0, 0), (4, 0), (5, 0)] {
            let message = IcmpError {
                macs: (CLIENT_MAC, NODE_MAC),
                from: ip(V4.client),
                to: ip(V4.listener),
                kind,
                rest: 1,
                hops: 64,
                quote: inner(&packet(V4, ACK, 51_000, 81)),
            };
            lab.passes("a message", &message.bytes(), Outcome::OtherProtocol);
        }
    });
}

/// The fragments of a packet, the first of which has so many bytes of its payload and transport header.
fn fragments(packet: &Packet, first: usize) -> [Vec<u8>; 2] {
    packet.cut(&[first]).try_into().expect("two fragments")
}

#[test]
fn what_is_cut_short_is_never_forwarded_and_counted_once() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let request = packet(family, ACK, 53_000, 84);
            let answered = Packet::new(ACK, (ip(family.listener), 81), (ip(family.client), 53_000));
            lab.xdp(&packet(family, SYN, 53_000, 81).bytes());
            let error = IcmpError {
                macs: (CLIENT_MAC, NODE_MAC),
                from: ip(family.router),
                to: ip(family.listener),
                kind: if family.headers == 40 { (3, 4) } else { (2, 0) },
                rest: 1_280,
                hops: 60,
                quote: inner(&answered),
            };
            let fragmented = packet(family, Transport::Udp, 53_000, 81).with(|p| p.payload = vec![5; 100]);
            let [first, later] = fragments(&fragmented, 56);
            let tunnelled = [(TO_TASK, request.clone()), (TO_CLIENT, answered.clone())]
                .map(|(kind, packet)| received(outer, kind, (NEAR, 8084), inner(&packet)).bytes());
            for frame in [first, later, error.bytes()].into_iter().chain(tunnelled) {
                for length in 14..frame.len() {
                    let (verdict, counted) = lab.counting(|lab| lab.xdp(&frame[..length]));
                    assert!(verdict.action == PASS || verdict.action == DROP, "{length}: {}", verdict.action);
                    assert_eq!(verdict.note, None, "{family:?} {length}");
                    assert_eq!(counted.values().sum::<u64>(), 1, "{family:?} {length}: {counted:?}");
                    assert!(counted.keys().all(|outcome| !outcome.is_forwarded()), "{length}: {counted:?}");
                }
            }
        }
    });
}

/// An offset behind the end of the longest datagram would begin anew at its start: as a datagram that nobody sent.
#[test]
fn no_fragment_becomes_a_datagram_of_its_own() {
    with_both(|lab, _| {
        lab.configure(|config| config.flags = TC_ALONE);
        let request = packet(V4, Transport::Udp, 52_100, 83).with(|p| p.payload = vec![5; 1_488]);
        let [first, _] = fragments(&request, 504);
        assert_eq!(lab.uplink_tc(&first).action, REDIRECT);
        let mut behind = request.with(|p| p.dont_fragment = false).bytes();
        behind[20..22].copy_from_slice(&((65_536_u32 - 1_416) / 8).to_be_bytes()[2..]);
        let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&behind));
        assert_eq!((verdict.action, counted), (2, BTreeMap::from([(Outcome::TooBig, 1)])));
    });
}

#[test]
fn later_fragments_go_where_their_first_one_went() {
    with_both(|lab, outer| {
        for family in FAMILIES {
            let client = (ip(family.client), 52_000);
            let request = packet(family, Transport::Udp, 52_000, 81).with(|p| p.payload = vec![5; 1_000]);
            let expected = request.forwarded(client, (ip(family.routed), 8081), (NODE_MAC, HOP_MAC));
            let [first, later] = fragments(&request, 504);
            // TC holds it.
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&later));
            assert_eq!(
                (verdict.action, verdict.note, counted),
                (PASS, Some(META_TC_DECIDES), BTreeMap::new())
            );
            for (fragment, expected) in [first.clone(), later.clone()].iter().zip(fragments(&expected, 504)) {
                let (verdict, counted) = lab.counting(|lab| lab.xdp(fragment));
                assert_eq!(verdict.frame, expected, "{family:?}");
                assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::Routed, 1)])));
            }
            // The answer's, too.
            let back = Packet::new(Transport::Udp, (ip(family.routed), 8081), client).with(|p| {
                p.payload = vec![6; 1_000];
                p.macs = (HOP_MAC, NODE_MAC);
            });
            let expected = back.forwarded((ip(family.listener), 81), client, (NODE_MAC, CLIENT_MAC));
            for (fragment, expected) in fragments(&back, 504).iter().zip(fragments(&expected, 504)) {
                let (verdict, counted) = lab.counting(|lab| lab.xdp(fragment));
                assert_eq!(verdict.frame, expected, "{family:?}");
                assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::Reply, 1)])));
            }
            // And through the tunnel, where a later one needs no first one: the option names the task.
            let request = packet(family, Transport::Udp, 52_000, 83).with(|p| p.payload = vec![5; 1_000]);
            for fragment in fragments(&request, 504) {
                let verdict = lab.xdp(&fragment);
                assert_sent(
                    "a fragment",
                    &verdict.frame,
                    sent(outer, TO_TASK, (FAR, 8083), fragment[14..].to_vec()),
                );
            }
            // Another client's: one connection has one line at a node.
            let request = packet(family, Transport::Udp, 52_002, 83).with(|p| p.payload = vec![5; 1_000]);
            for fragment in fragments(&request, 504) {
                let arrived = received(outer, TO_TASK, (NEAR, 8084), fragment[14..].to_vec());
                let verdict = lab.xdp(&arrived.bytes());
                assert_eq!(lab.task_of(verdict.note.expect("a note")), "near.1");
            }
            // What is not ours stays so, fragment by fragment.
            let other = packet(family, Transport::Udp, 52_000, 99).with(|p| {
                p.payload = vec![5; 1_000];
                p.source = ip(family.router);
            });
            let [first, later] = fragments(&other, 504);
            lab.passes("another's first", &first, Outcome::NotOurs);
            lab.passes("another's later", &later, Outcome::NotOurs);
        }
        // They are forgotten after a while; no second lasts a jiffy.
        let request = packet(V4, Transport::Udp, 52_001, 81).with(|p| p.payload = vec![5; 1_000]);
        let [first, later] = fragments(&request, 504);
        lab.configure(|config| config.jiffies_per_second = 0);
        assert_eq!(lab.xdp(&first).action, TX);
        lb_tests::netns::eventually("the first fragment is forgotten", || {
            lab.xdp(&later).note == Some(META_TC_DECIDES)
        });
    });
}
