//! Consistent placement, packet by packet: connections whose entries are lost go on, by the spares of these or by their
//! hash. Between real sockets: `placement`.

use std::{collections::BTreeMap, process::Command};

use lb_common::{
    abi::{HANDOVER_DECIDE, TC_ALONE, XDP_GENERIC, table},
    flow::{ANSWERED, CLIENT_FIN, ESTABLISHED, REPLY, REQUEST, RESET},
    outcome::Outcome,
};
use lb_tests::{
    lab::{Lab, PASS, REDIRECT, TX, UNSPEC, ip, task, with_lab},
    netns::{eventually, run},
    packet::{ACK, CLIENT_MAC, FIN, Packet, RST, SYN, SYN_ACK, Transport, assert_checksums},
    talk::{
        CLIENT, FIRST, LISTENER, TASK_FIRST, all_states, answer, establish, far_answer, request, segment,
        services, slot,
    },
};
use lb_userspace::cluster::{Placement, Service, TaskState, Via, set_timer};

const BOTH: u8 = ANSWERED | ESTABLISHED;
const NONE: Vec<u8> = vec![];

/// The services, each with consistent placement.
fn by_hash() -> Vec<Service> {
    let mut services = services();
    services.iter_mut().for_each(|service| service.placement = Placement::Consistent);
    services
}

/// How many flows of a service were healed.
fn healed(lab: &Lab, name: &str) -> u64 {
    let services = &lab.datapath().tables().services;
    let number = services.iter().find(|(_, label)| label.name == name).map(|(number, _)| *number);
    lab.counters().services.get(&number.expect("the service")).map_or(0, |stats| stats.healed)
}

/// Lets the routing table say where the client is: an entry that is made anew has to ask.
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
    assert_eq!((verdict.action, verdict.note, counted), (PASS, Some(HANDOVER_DECIDE), BTreeMap::new()));
    let flags = lab.datapath().config().flags;
    // A test run takes no note along.
    lab.configure(|config| config.flags = flags | TC_ALONE);
    let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&answer.bytes()));
    lab.configure(|config| config.flags = flags);
    assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
    assert_eq!(verdict.frame, frame);
}

#[test]
fn a_client_goes_on_by_the_spare_of_its_entry() {
    with_lab(by_hash(), |lab| {
        let port = 41_000;
        let name = format!("web.{}", establish(lab, port));
        for round in 1..=3 {
            assert_eq!(lab.evict(table::FLOWS4, |flow| flow.role == REQUEST), 1);
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), name);
            assert_eq!(all_states(lab, port), [NONE, vec![BOTH]], "the entry is what it was");
            assert_eq!(healed(lab, "web"), round);
            lab.delivered_to(&segment(ACK, port, 80, 0));
            assert_eq!(healed(lab, "web"), round, "it was lost once");
        }
        // Late ends reach the task too, and bring nothing back to life.
        lab.forget_flows();
        assert_eq!(lab.delivered_to(&segment(RST, port, 80, 0)), name);
        assert_eq!(all_states(lab, port), [NONE, NONE]);
        assert_eq!(lab.delivered_to(&segment(FIN, port, 80, 0)), name);
        assert_eq!(all_states(lab, port), [NONE, vec![BOTH | CLIENT_FIN]]);
        lab.forget_flows();
        let last_hop = segment(ACK, port, 80, 0).with(|p| p.hops = 1);
        lab.passes("its time is over", &last_hop.bytes(), Outcome::TtlExpired);
        // The same five-tuple again is another connection.
        lab.forget_flows();
        lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0));
        assert_eq!(lab.forget_spares(), 0);
    });
}

#[test]
fn what_is_over_leaves_nothing() {
    with_lab(by_hash(), |lab| {
        add_route_to_client();
        establish(lab, 41_050);
        assert_eq!(lab.forget_spares(), 2);
        // Both ends close, either first.
        for (port, client_first) in [(41_051, true), (41_052, false)] {
            let task = establish(lab, port);
            let client = || lab.delivered_to(&segment(FIN, port, 80, 0));
            let answer = || lab.task_tc(&answer(FIN, task, 8080, port).at(TASK_FIRST + 1, FIRST + 1).bytes());
            if client_first {
                client();
                answer();
            } else {
                answer();
                client();
            }
            assert_eq!(lab.forget_spares(), 0, "client first: {client_first}");
        }
        // Either resets.
        establish(lab, 41_053);
        lab.delivered_to(&segment(RST, 41_053, 80, 0));
        let task = establish(lab, 41_054);
        lab.task_tc(&answer(RST, task, 8080, 41_054).at(TASK_FIRST + 1, 0).bytes());
        assert_eq!(lab.forget_spares(), 0);
        // By snat too.
        let (_, _, answer) = through_snat(lab, 41_055, true);
        lab.xdp(&segment(FIN, 41_055, 82, 0).bytes());
        lab.xdp(&answer.with(|p| p.transport = FIN).bytes());
        eventually("the request looks after its entry for replies again", || {
            let flows = lab.flows(table::FLOWS4);
            let request =
                flows.iter().find(|(key, _)| key.source_port.get() == 41_055).expect("the request's");
            lab.jiffies().wrapping_sub(request.1.hop_seen) > 256
        });
        let last = segment(ACK, 41_055, 82, 1).at(FIRST + 2, TASK_FIRST + 2);
        assert_eq!(lab.xdp(&last.bytes()).action, TX);
        assert_eq!(lab.forget_spares(), 0, "a last acknowledgment brings nothing back");
        through_snat(lab, 41_056, true);
        lab.xdp(&segment(RST, 41_056, 82, 0).bytes());
        assert_eq!(lab.forget_spares(), 0);
    });
}

#[test]
fn the_walk_takes_spares_along_with_what_has_ended() {
    let mut services = by_hash();
    set_timer(&mut services[0].timers, "established", 3).expect("a timer");
    with_lab(services, |lab| {
        establish(lab, 41_060);
        // Seconds of a hundredth.
        lab.configure(|config| config.jiffies_per_second /= 100);
        eventually("it has ended", || lab.sweep().0.removed == 1);
        assert_eq!(lab.forget_spares(), 0);
    });
}

#[test]
fn a_client_goes_on_by_its_hash_alone() {
    with_lab(by_hash(), |lab| {
        let mut tasks = BTreeMap::<u8, u32>::new();
        let forget = |lab: &Lab| {
            lab.forget_flows();
            lab.forget_spares();
        };
        for port in 41_000..41_040 {
            let task = establish(lab, port);
            *tasks.entry(task).or_default() += 1;
            let name = format!("web.{task}");
            forget(lab);
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), name, "the entry is made again");
            // It moves as a new one does.
            let data = answer(ACK, task, 8080, port).at(TASK_FIRST + 1, FIRST + 1);
            assert_eq!(lab.task_tc(&data.bytes()).action, REDIRECT);
            lab.delivered_to(&segment(ACK, port, 80, 0));
            assert_eq!(all_states(lab, port), [NONE, vec![BOTH]]);
            for (end, state) in [(FIN, CLIENT_FIN), (RST, RESET)] {
                forget(lab);
                assert_eq!(lab.delivered_to(&segment(end, port, 80, 0)), name);
                assert_eq!(all_states(lab, port), [vec![state], NONE]);
            }
            forget(lab);
        }
        assert!(tasks.len() == 2 && tasks.values().all(|count| *count >= 8), "hashes spread: {tasks:?}");
    });
}

#[test]
fn what_a_second_task_took_stays_with_it() {
    with_lab(by_hash(), |lab| {
        // A quarter of no second is over at once.
        lab.configure(|config| config.jiffies_per_second = 0);
        for port in 41_200..41_220 {
            let syn = request(SYN, port, 80).at(FIRST, 0);
            let first = lab.delivered_to(&syn);
            let last = (0..3).map(|_| lab.delivered_to(&syn)).find(|task| *task != first);
            let last = last.unwrap_or_else(|| panic!("port {port}: only {first}"));
            let taken = answer(SYN_ACK, slot(&last), 8080, port).at(TASK_FIRST, FIRST + 1);
            assert_eq!(lab.task_tc(&taken.bytes()).action, REDIRECT);
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), last);
            // Though the hash would say the first.
            lab.forget_flows();
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), last);
            lab.forget_flows();
        }
    });
}

#[test]
fn what_draining_tasks_have_goes_on() {
    with_lab(by_hash(), |lab| {
        let names: Vec<u8> = (41_300..41_310).map(|port| establish(lab, port)).collect();
        lab.update(|cluster| {
            for task in &mut cluster.service_mut(0).tasks {
                task.state = TaskState::Draining;
            }
        });
        lab.forget_flows();
        for (port, slot) in (41_300..).zip(names) {
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), format!("web.{slot}"));
        }
    });
}

#[test]
fn a_local_tasks_answer_finds_its_way_without_its_entry() {
    with_lab(by_hash(), |lab| {
        let task = establish(lab, 41_100);
        let data = answer(ACK, task, 8080, 41_100).at(TASK_FIRST + 1, FIRST + 1);
        lab.forget_flows();
        for _ in 0..2 {
            let (verdict, counted) = lab.counting(|lab| lab.task_tc(&data.bytes()));
            assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
            assert_checksums(&verdict.frame);
            // Source address and port, behind Ethernet.
            assert_eq!((&verdict.frame[26..30], &verdict.frame[34..36]), (&[192, 0, 2, 1][..], &[0, 80][..]));
        }
        assert_eq!(all_states(lab, 41_100), [NONE, NONE], "its entry is that of the requests");
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
        // A task that is gone answers nobody, whoever has its number now.
        let tasks = lab.cluster().services[0].tasks.clone();
        lab.update(|cluster| cluster.service_mut(0).tasks.clear());
        lab.update(|cluster| cluster.service_mut(0).tasks = tasks);
        assert_eq!(lab.task_tc(&data.bytes()).action, UNSPEC);
    });
}

#[test]
fn a_routed_tasks_answer_finds_its_way_without_its_entry() {
    with_lab(by_hash(), |lab| {
        add_route_to_client();
        let port = 41_400;
        let data = through_routed(lab, port);
        let with_entry = lab.xdp(&data.bytes());
        assert_eq!(with_entry.action, TX);
        lab.forget_flows();
        emitted(lab, &data, &with_entry.frame);
        assert_eq!(all_states(lab, port), [NONE, NONE], "its entry is that of the requests");
        assert_eq!(lab.xdp(&segment(ACK, port, 81, 0).bytes()).action, TX);
        assert_eq!(lab.xdp(&data.bytes()), with_entry);
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

/// A connection to the task that is reached by snat, as far as its client's acknowledgment; what the client sends next, how
/// that leaves, and the task's answer.
fn through_snat(lab: &Lab, port: u16, established: bool) -> (Packet, Vec<u8>, Packet) {
    let leaves = lab.xdp(&request(SYN, port, 82).at(FIRST, 0).bytes());
    assert_eq!(leaves.action, TX);
    let own = u16::from_be_bytes([leaves.frame[34], leaves.frame[35]]);
    let answer = |flags| far_answer(flags, "10.9.0.2", 8082, (LISTENER, own));
    assert_eq!(lab.xdp(&answer(SYN_ACK).at(TASK_FIRST, FIRST + 1).bytes()).action, TX);
    let next = segment(ACK, port, 82, 0);
    let mut leaves = Vec::new();
    if established {
        leaves = lab.xdp(&next.bytes()).frame;
    }
    (next, leaves, answer(ACK).at(TASK_FIRST + 1, FIRST + 1))
}

#[test]
fn what_leaves_by_snat_keeps_its_port() {
    with_lab(by_hash(), |lab| {
        add_route_to_client();
        // One that keeps its client's port and one that has another, which only a spare knows.
        for port in [2_345, 40_000] {
            let (next, leaves, answer) = through_snat(lab, port, true);
            let arrives = lab.xdp(&answer.bytes());
            assert_eq!(arrives.action, TX);
            assert_checksums(&arrives.frame);
            for role in [REQUEST, REPLY, REQUEST] {
                assert_eq!(lab.evict(table::FLOWS4, |flow| flow.role == role), 1);
                if role == REPLY {
                    emitted(lab, &answer, &arrives.frame);
                }
                assert_eq!(lab.xdp(&next.bytes()).frame, leaves);
                assert_eq!(lab.xdp(&answer.bytes()), arrives, "{role}");
                assert_eq!(all_states(lab, port)[0], NONE);
            }
            lab.forget_flows();
            assert_eq!(lab.xdp(&next.bytes()).frame, leaves, "both at once");
            emitted(lab, &answer, &arrives.frame);
            // The client's next packet looks after both.
            assert_eq!(lab.xdp(&next.bytes()).frame, leaves);
            assert_eq!(lab.xdp(&answer.bytes()), arrives);
            lab.forget_flows();
            // Without either there is no port.
            lab.forget_spares();
            lab.passes("nothing is known of it", &next.bytes(), Outcome::NoFlow);
        }
    });
}

#[test]
fn a_port_that_is_anothers_by_now_is_not_taken_back() {
    with_lab(by_hash(), |lab| {
        let port = 2_345;
        let (next, _, _) = through_snat(lab, port, true);
        lab.forget_flows();
        let other = |transport| request(transport, port, 82).with(|p| p.source = ip("198.51.100.8"));
        let taken = lab.xdp(&other(SYN).at(FIRST, 0).bytes());
        assert_eq!((taken.action, &taken.frame[34..36]), (TX, &port.to_be_bytes()[..]));
        for _ in 0..2 {
            lab.passes("its port is gone", &next.bytes(), Outcome::NoFlow);
        }
        // The other one's entries and spares are not touched.
        let answer = |transport| far_answer(transport, "10.9.0.2", 8082, (LISTENER, port));
        assert_eq!(lab.xdp(&answer(SYN_ACK).at(TASK_FIRST, FIRST + 1).bytes()).action, TX);
        let mine = || lab.xdp(&other(ACK).at(FIRST + 1, TASK_FIRST + 1).bytes());
        assert_eq!(mine().frame[34..36], port.to_be_bytes());
        lab.passes("its port is gone", &next.bytes(), Outcome::NoFlow);
        lab.forget_flows();
        assert_eq!(mine().frame[34..36], port.to_be_bytes());
        assert_eq!(lab.forget_spares(), 2);
    });
}

#[test]
fn who_has_not_shown_that_it_exists_has_no_spare() {
    with_lab(by_hash(), |lab| {
        for port in [2_346, 40_001] {
            let (next, _, _) = through_snat(lab, port, false);
            lab.forget_flows();
            lab.passes("a forger may have sent both", &next.bytes(), Outcome::NoFlow);
        }
        lab.delivered_to(&request(SYN, 41_500, 80).at(FIRST, 0));
        assert_eq!(lab.forget_spares(), 0);
    });
}

#[test]
fn an_answer_that_was_made_again_waits_for_the_way_to_its_client() {
    with_lab(by_hash(), |lab| {
        let (next, leaves, answer) = through_snat(lab, 2_347, true);
        let arrives = lab.xdp(&answer.bytes());
        assert_eq!(arrives.action, TX);
        assert_eq!(lab.evict(table::FLOWS4, |flow| flow.role == REPLY), 1);
        // Nothing routes here: where the client's packets come from is not known before one comes.
        for _ in 0..2 {
            let verdict = lab.xdp(&answer.bytes());
            assert_eq!((verdict.action, verdict.note), (PASS, Some(HANDOVER_DECIDE)));
        }
        assert_eq!(lab.evict(table::FLOWS4, |flow| flow.role == REQUEST), 1);
        // The first brings its own entry back, the next one looks after the other.
        for _ in 0..2 {
            assert_eq!(lab.xdp(&next.bytes()).frame, leaves);
        }
        let [(_, reply)] = lab
            .flows(table::FLOWS4)
            .into_iter()
            .filter(|(_, flow)| flow.role == REPLY)
            .collect::<Vec<_>>()[..]
        else {
            panic!("one entry for replies")
        };
        assert_eq!(reply.client_mac, CLIENT_MAC);
    });
}

#[test]
fn where_xdp_cannot_tell_tc_heals_too() {
    with_lab(by_hash(), |lab| {
        add_route_to_client();
        let port = 41_450;
        let answer = through_routed(lab, port);
        let client = segment(ACK, port, 81, 0);
        lab.configure(|config| config.flags = XDP_GENERIC);
        for packet in [&answer, &client, &client.clone().with(|p| p.transport = RST)] {
            lab.forget_flows();
            let (verdicts, counted) =
                lab.counting(|lab| (lab.xdp(&packet.bytes()).action, lab.uplink_tc(&packet.bytes()).action));
            assert_eq!(verdicts, (PASS, REDIRECT), "{packet:?}");
            assert_eq!(counted.values().sum::<u64>(), 1, "{packet:?}: {counted:?}");
        }
    });
}

#[test]
fn round_robin_keeps_no_spares() {
    with_lab(services(), |lab| {
        establish(lab, 41_500);
        through_snat(lab, 41_501, true);
        assert_eq!(lab.forget_spares(), 0);
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
            lab.forget_flows();
            assert_eq!(lab.delivered_to(&ask), task);
        }
        assert_eq!(lab.forget_spares(), 0, "a datagram needs none");
    });
}
