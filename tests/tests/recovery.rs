//! Consistent placement, packet by packet: connections whose lines are lost go on by their hash. Between real sockets:
//! `placement`.

use std::{collections::BTreeMap, process::Command};

use lb_common::{
    abi::{META_TC_DECIDES, TC_ALONE, XDP_GENERIC},
    conntrack::line::{ANSWERED, CLIENT_FIN, ESTABLISHED, RESET},
    outcome::Outcome,
};
use lb_tests::{
    lab::{Lab, PASS, REDIRECT, TX, UNSPEC, task, with_lab},
    netns::run,
    packet::{ACK, FIN, Packet, RST, SYN, SYN_ACK, Transport, assert_checksums},
    talk::{
        CLIENT, FIRST, LISTENER, TASK_FIRST, answer, establish, far_answer, request, segment, services,
        states,
    },
};
use lb_userspace::cluster::{Scheduler, Service, Via};

const BOTH: u32 = ANSWERED | ESTABLISHED;
const NONE: Vec<u32> = vec![];

/// The services, each with consistent placement.
fn by_hash() -> Vec<Service> {
    let mut services = services();
    services.iter_mut().for_each(|service| service.scheduler = Scheduler::Maglev);
    services
}

/// Lets the routing table say where the client is: a line that is made anew has to ask.
fn add_route_to_client() {
    let ip = |text: &str| run(Command::new("ip").args(text.split(' ')));
    ip("link set eth1 address 02:00:00:00:00:01");
    ip("address add 192.0.2.1/24 dev eth1");
    ip("route add 198.51.100.7/32 dev eth1");
    ip("neighbour add 198.51.100.7 lladdr 02:00:00:00:00:0a dev eth1 nud permanent");
    run(Command::new("sysctl").args(["-qw", "net.ipv4.ip_forward=1"]));
}

/// Asserts that XDP leaves an answer to TC, which looks for the client's hop anew and emits this frame.
fn emitted(lab: &mut Lab, answer: &Packet, frame: &[u8]) {
    let (verdict, counted) = lab.counting(|lab| lab.xdp(&answer.bytes()));
    assert_eq!((verdict.action, verdict.note, counted), (PASS, Some(META_TC_DECIDES), BTreeMap::new()));
    let flags = lab.datapath().config().flags;
    // A test run takes no note along.
    lab.configure(|config| config.flags = flags | TC_ALONE);
    let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&answer.bytes()));
    lab.configure(|config| config.flags = flags);
    assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
    assert_eq!(verdict.frame, frame);
}

#[test]
fn a_client_goes_on_by_its_hash_alone() {
    with_lab(by_hash(), |lab| {
        let mut tasks = BTreeMap::<u8, u32>::new();
        for port in 41_000..41_040 {
            let task = establish(lab, port);
            *tasks.entry(task).or_default() += 1;
            let name = format!("web.{task}");
            lab.forget_connections();
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), name, "the line is made again");
            // It moves as a new one does.
            let data = answer(ACK, task, 8080, port).at(TASK_FIRST + 1, FIRST + 1);
            assert_eq!(lab.task_tc(&data.bytes()).action, REDIRECT);
            lab.delivered_to(&segment(ACK, port, 80, 0));
            assert_eq!(states(lab, port), [BOTH]);
            for (end, state) in [(FIN, CLIENT_FIN), (RST, RESET)] {
                lab.forget_connections();
                assert_eq!(lab.delivered_to(&segment(end, port, 80, 0)), name);
                assert_eq!(states(lab, port), [state]);
            }
            lab.forget_connections();
        }
        assert!(tasks.len() == 2 && tasks.values().all(|count| *count >= 8), "hashes spread: {tasks:?}");
    });
}

#[test]
fn a_local_tasks_answer_finds_its_way_without_its_line() {
    with_lab(by_hash(), |lab| {
        let task = establish(lab, 41_100);
        let data = answer(ACK, task, 8080, 41_100).at(TASK_FIRST + 1, FIRST + 1);
        lab.forget_connections();
        for _ in 0..2 {
            let (verdict, counted) = lab.counting(|lab| lab.task_tc(&data.bytes()));
            assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
            assert_checksums(&verdict.frame);
            // Source address and port, behind Ethernet.
            assert_eq!((&verdict.frame[26..30], &verdict.frame[34..36]), (&[192, 0, 2, 1][..], &[0, 80][..]));
        }
        assert_eq!(states(lab, 41_100), NONE, "its line is that of the requests");
        // Late ends pass too.
        for end in [FIN, RST] {
            let end = answer(end, task, 8080, 41_100).at(TASK_FIRST + 1, FIRST + 1);
            assert_eq!(lab.task_tc(&end.bytes()).action, REDIRECT);
        }
        // A SYN's answer belongs to no connection that was established, and another task never had it.
        let first = answer(SYN_ACK, task, 8080, 41_100).at(TASK_FIRST, FIRST + 1);
        let other = answer(ACK, 3 - task, 8080, 41_100).at(TASK_FIRST + 1, FIRST + 1);
        for packet in [first, other] {
            assert_eq!(lab.task_tc(&packet.bytes()).action, UNSPEC);
        }
        // A task that is gone answers nobody.
        lab.update(|cluster| cluster.service_mut(0).tasks.clear());
        assert_eq!(lab.task_tc(&data.bytes()).action, UNSPEC);
    });
}

#[test]
fn a_routed_tasks_answer_finds_its_way_without_its_line() {
    with_lab(by_hash(), |lab| {
        add_route_to_client();
        let port = 41_400;
        let data = through_routed(lab, port);
        let with_line = lab.xdp(&data.bytes());
        assert_eq!(with_line.action, TX);
        lab.forget_connections();
        emitted(lab, &data, &with_line.frame);
        assert_eq!(states(lab, port), NONE, "its line is that of the requests");
        assert_eq!(lab.xdp(&segment(ACK, port, 81, 0).bytes()).action, TX);
        assert_eq!(lab.xdp(&data.bytes()), with_line);
    });
}

/// A connection to the routed task; the task's answer.
fn through_routed(lab: &Lab, port: u16) -> Packet {
    let answer = |flags| far_answer(flags, "10.9.0.1", 8081, (CLIENT, port));
    assert_eq!(lab.xdp(&request(SYN, port, 81).at(FIRST, 0).bytes()).action, TX);
    assert_eq!(lab.xdp(&answer(SYN_ACK).at(TASK_FIRST, FIRST + 1).bytes()).action, TX);
    assert_eq!(lab.xdp(&segment(ACK, port, 81, 0).bytes()).action, TX);
    answer(ACK).at(TASK_FIRST + 1, FIRST + 1)
}

#[test]
fn what_leaves_by_snat_has_nothing_but_its_line() {
    with_lab(by_hash(), |lab| {
        let port = 2_345;
        let leaves = lab.xdp(&request(SYN, port, 82).at(FIRST, 0).bytes());
        let own = u16::from_be_bytes([leaves.frame[34], leaves.frame[35]]);
        let answer = |flags| far_answer(flags, "10.9.0.2", 8082, (LISTENER, own));
        assert_eq!(lab.xdp(&answer(SYN_ACK).at(TASK_FIRST, FIRST + 1).bytes()).action, TX);
        let next = segment(ACK, port, 82, 0);
        assert_eq!(lab.xdp(&next.bytes()).action, TX);
        lab.forget_connections();
        lab.passes("its port was known to its line alone", &next.bytes(), Outcome::NoConnection);
    });
}

#[test]
fn where_xdp_cannot_tell_tc_does_the_same() {
    with_lab(by_hash(), |lab| {
        add_route_to_client();
        let port = 41_450;
        let answer = through_routed(lab, port);
        let client = segment(ACK, port, 81, 0);
        lab.configure(|config| config.flags = XDP_GENERIC);
        for packet in [&answer, &client, &client.clone().with(|p| p.transport = RST)] {
            lab.forget_connections();
            let (verdicts, counted) =
                lab.counting(|lab| (lab.xdp(&packet.bytes()).action, lab.uplink_tc(&packet.bytes()).action));
            assert_eq!(verdicts, (PASS, REDIRECT), "{packet:?}");
            assert_eq!(counted.values().sum::<u64>(), 1, "{packet:?}: {counted:?}");
        }
    });
}

#[test]
fn datagrams_are_placed_by_their_hash() {
    let mut services = by_hash();
    services[0].tasks.push(task("web.3", true, Via::Snat, &["172.18.0.13"]));
    services.truncate(1);
    with_lab(services, |lab| {
        for port in 41_600..41_620 {
            let ask = request(Transport::Udp, port, 53);
            let task = lab.delivered_to(&ask);
            lab.forget_connections();
            assert_eq!(lab.delivered_to(&ask), task);
        }
    });
}
