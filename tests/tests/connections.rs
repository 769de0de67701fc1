//! What connections go through, packet by packet: states, failover, timers, eviction, a task that is gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicU16, Ordering},
};

use lb_common::{
    abi::{TC_ALONE, remove},
    conntrack::line::{ALIAS, ANSWERED, CLIENT_FIN, ESTABLISHED, RESET, TASK_FIN},
    guard::FULL,
    outcome::Outcome,
};
use lb_tests::{
    lab::{DROP, Lab, REDIRECT, TX, UNSPEC, ip, service, task, with_lab, with_lab_of},
    netns::eventually,
    packet::{ACK, FIN, Flags, Packet, RST, RST_ACK, SYN, SYN_ACK, Transport, assert_checksums},
    talk::{
        FIRST, LISTENER, TASK_FIRST, answer, establish, far_answer, request, segment, services, slot, states,
    },
};
use lb_userspace::{
    cluster::{Return, TaskState, Via},
    datapath::Sizes,
};

#[test]
fn a_connection_is_half_open_until_its_client_goes_on() {
    with_lab(services(), |lab| {
        let port = 40_001;
        let to = slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)));
        assert_eq!(states(lab, port), [0]);
        // What claims to go on before there was an answer does not.
        lab.delivered_to(&segment(ACK, port, 80, 0));
        assert_eq!(states(lab, port), [0]);
        lab.task_tc(&answer(SYN_ACK, to, 8080, port).at(TASK_FIRST, FIRST + 1).bytes());
        assert_eq!(states(lab, port), [ANSWERED]);
        // A forged acknowledgment guesses the number wrong.
        lab.delivered_to(&segment(ACK, port, 80, 0).at(FIRST + 1, 12_345));
        assert_eq!(states(lab, port), [ANSWERED]);
        lab.delivered_to(&segment(ACK, port, 80, 0));
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED]);
        // An exchange of datagrams is established by the client's second, if the first was answered.
        let (port, ask) = (40_101, request(Transport::Udp, 40_101, 53));
        let to = slot(&lab.delivered_to(&ask));
        lab.delivered_to(&ask);
        assert_eq!(states(lab, port), [0]);
        let (verdict, counted) =
            lab.counting(|lab| lab.task_tc(&answer(Transport::Udp, to, 5353, port).bytes()));
        assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
        assert_eq!(states(lab, port), [ANSWERED]);
        lab.delivered_to(&ask);
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED]);
    });
}

#[test]
fn a_connection_by_snat_has_one_line_and_an_alias_that_goes_with_it() {
    with_lab(services(), |lab| {
        let port = 2_345;
        lab.xdp(&request(SYN, port, 82).at(FIRST, 0).bytes());
        let aliases = |lab: &Lab| lab.lines().iter().filter(|(_, control, _)| control.has(ALIAS)).count();
        assert_eq!((states(lab, port), aliases(lab)), (vec![0], 1));
        let taken = far_answer(SYN_ACK, "10.9.0.2", 8082, (LISTENER, port)).at(TASK_FIRST, FIRST + 1);
        assert_eq!(lab.xdp(&taken.bytes()).action, TX);
        assert_eq!(states(lab, port), [ANSWERED]);
        assert_eq!(lab.xdp(&segment(ACK, port, 82, 0).bytes()).action, TX);
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED]);
        assert_eq!(lab.xdp(&segment(RST, port, 82, 0).bytes()).action, TX);
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED | RESET]);
        assert_eq!(lab.evict(|control, _| !control.has(ALIAS)), 1);
        assert_eq!((lab.collect().0.removed, aliases(lab)), (1, 0));
    });
}

#[test]
fn forged_resets_and_stray_ends_close_nothing() {
    with_lab(services(), |lab| {
        let port = 40_002;
        let to = establish(lab, port);
        let open = [ANSWERED | ESTABLISHED];
        for guess in [0, 1, 99, 1 << 20, u32::MAX - FIRST - 1] {
            for transport in [RST, RST_ACK, FIN] {
                // They go on to the task, whose own stack knows best.
                lab.delivered_to(&segment(transport, port, 80, guess.wrapping_add(1)));
                assert_eq!(states(lab, port), open, "{transport:?} {guess} ahead");
            }
            let forged = answer(RST, to, 8080, port).at(TASK_FIRST.wrapping_add(2).wrapping_add(guess), 0);
            lab.task_tc(&forged.bytes());
            assert_eq!(states(lab, port), open, "from the task, {guess} ahead");
            // By the wire nobody speaks for a task of this node.
            lab.passes("a task's address from the wire", &forged.bytes(), Outcome::NotOurs);
        }
        // On an open connection a SYN is the task's business (RFC 5961, 4.2).
        assert_eq!(lab.delivered_to(&request(SYN, port, 80).at(77, 0)), format!("web.{to}"));
        assert_eq!(states(lab, port), open);
        // The right number is believed.
        lab.delivered_to(&segment(RST, port, 80, 0));
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED | RESET]);
        let again = slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)));
        assert_ne!(again, to, "a SYN on a closed connection starts anew");
    });
}

#[test]
fn both_sides_close_and_the_last_packets_still_arrive() {
    with_lab(services(), |lab| {
        let port = 40_003;
        let to = establish(lab, port);
        lab.delivered_to(&segment(FIN, port, 80, 0));
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED | CLIENT_FIN]);
        lab.task_tc(&answer(FIN, to, 8080, port).at(TASK_FIRST + 1, FIRST + 2).bytes());
        assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED | CLIENT_FIN | TASK_FIN]);
        let last = segment(ACK, port, 80, 1).at(FIRST + 2, TASK_FIRST + 2);
        assert_eq!(lab.delivered_to(&last), format!("web.{to}"));
    });
}

#[test]
fn a_syn_on_a_half_closed_connection_cuts_nothing() {
    with_lab(services(), |lab| {
        for (port, client_first) in [(40_004, true), (40_005, false)] {
            let to = establish(lab, port);
            let client_closes = |lab: &mut Lab, heard| {
                lab.delivered_to(&segment(FIN, port, 80, 0).at(FIRST + 1, TASK_FIRST + heard));
            };
            let task_closes = |lab: &mut Lab, heard| {
                lab.task_tc(&answer(FIN, to, 8080, port).at(TASK_FIRST + 1, FIRST + heard).bytes());
            };
            if client_first {
                client_closes(lab, 1)
            } else {
                task_closes(lab, 1)
            }
            let half = states(lab, port);
            let first = if client_first { CLIENT_FIN } else { TASK_FIN };
            assert_eq!(half, [ANSWERED | ESTABLISHED | first]);
            // Anybody can send it: the task asks whoever is the client's address.
            assert_eq!(lab.delivered_to(&request(SYN, port, 80).at(77, 0)), format!("web.{to}"));
            assert_eq!(states(lab, port), half);
            let rest = answer(ACK, to, 8080, port).at(TASK_FIRST + 1, FIRST + 1);
            let (verdict, counted) = lab.counting(|lab| lab.task_tc(&rest.bytes()));
            assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
            // What both have closed begins anew.
            if client_first {
                task_closes(lab, 2)
            } else {
                client_closes(lab, 2)
            }
            assert_eq!(states(lab, port), [ANSWERED | ESTABLISHED | CLIENT_FIN | TASK_FIN]);
            lab.delivered_to(&request(SYN, port, 80).at(77, 0));
            assert_eq!(states(lab, port), [0]);
        }
    });
}

/// How often connections were taken away from each task.
fn failovers(lab: &Lab) -> BTreeMap<String, u64> {
    let counters = lab.counters();
    let taken =
        |(index, stats): (&u32, &lb_common::stats::BackendStats)| (lab.task_of(*index), stats.failovers);
    counters.backends.iter().map(taken).filter(|(_, count)| *count > 0).collect()
}

#[test]
fn a_syn_sent_again_goes_to_the_next_task_until_one_answers() {
    with_lab(services(), |lab| {
        let port = 40_004;
        let syn = request(SYN, port, 80).at(FIRST, 0);
        let first = lab.delivered_to(&syn);
        // Doubled by the network, not sent again.
        assert_eq!(lab.delivered_to(&syn), first);
        assert_eq!(failovers(lab), BTreeMap::new());
        // A quarter of no second is over at once.
        lab.configure(|config| config.jiffies_per_second = 0);
        let second = lab.delivered_to(&syn);
        assert_ne!(second, first);
        assert_eq!(failovers(lab), BTreeMap::from([(first.clone(), 1)]));
        // The first one comes too late.
        let late = answer(SYN_ACK, slot(&first), 8080, port).at(TASK_FIRST, FIRST + 1);
        let (verdict, counted) = lab.counting(|lab| lab.task_tc(&late.bytes()));
        assert_eq!((verdict.action, counted), (2, BTreeMap::from([(Outcome::LateReply, 1)])));
        assert_eq!(lab.delivered_to(&syn), first, "and to the next at each SYN after it");
        lab.task_tc(&late.bytes());
        assert_eq!(lab.delivered_to(&syn), first, "never once there was an answer");
        assert_eq!(failovers(lab), BTreeMap::from([(first, 1), (second, 1)]));
        // A single task is tried again.
        let lone = request(SYN, port, 83).at(FIRST, 0);
        assert_eq!((lab.delivered_to(&lone), lab.delivered_to(&lone)), ("lone.1".into(), "lone.1".into()));
        assert_eq!(failovers(lab).get("lone.1"), None);
    });
}

#[test]
fn a_syn_sent_again_goes_to_another_node_if_it_can() {
    let far = |slot: u8| task(&format!("web.{slot}"), false, Via::Peer, &[&format!("172.18.9.1{slot}")]);
    let near = task("web.3", true, Via::Peer, &["172.18.0.13"]);
    for (tasks, second) in
        [(vec![far(1), far(2), near], Outcome::Local), (vec![far(1), far(2)], Outcome::Peer)]
    {
        with_lab(vec![service("web", &["80:8080"], tasks)], |lab| {
            // A quarter of no second is over at once.
            lab.configure(|config| config.jiffies_per_second = 0);
            let syn = request(SYN, 40_020, 80).at(FIRST, 0).bytes();
            let taken = |outcome| {
                assert_eq!(lab.counting(|lab| lab.xdp(&syn)).1, BTreeMap::from([(outcome, 1)]));
                lab.lines()[0].2.backend
            };
            let first = taken(Outcome::Peer);
            assert_ne!(taken(second), first);
        });
    }
}

#[test]
fn a_refusal_is_kept_from_the_client_while_there_are_others() {
    with_lab(services(), |lab| {
        let port = 40_005;
        let syn = request(SYN, port, 80).at(FIRST, 0);
        let refuse = |lab: &Lab, to: &str| {
            let refusal = answer(RST_ACK, slot(to), 8080, port).at(0, FIRST + 1);
            let (verdict, counted) = lab.counting(|lab| lab.task_tc(&refusal.bytes()));
            (verdict.action, counted)
        };
        let mut to = lab.delivered_to(&syn);
        for _ in 0..3 {
            assert_eq!(refuse(lab, &to), (2, BTreeMap::from([(Outcome::TaskRefused, 1)])));
            // At once: a refused SYN is not waited for.
            let next = lab.delivered_to(&syn);
            assert_ne!(next, to);
            to = next;
        }
        assert_eq!(failovers(lab).values().sum::<u64>(), 3);
        // Refused by all it is the client's to know.
        assert_eq!(refuse(lab, &to), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
        // A forged refusal moves nothing.
        let port = 40_006;
        let to = lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0));
        lab.task_tc(&answer(RST_ACK, slot(&to), 8080, port).at(0, 999_999_999).bytes());
        assert_eq!(lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)), to);
        // Where there is no other task the client is told at once.
        lab.delivered_to(&request(SYN, port, 83).at(FIRST, 0));
        let refusal = answer(RST_ACK, 3, 8083, port).at(0, FIRST + 1);
        let (verdict, counted) = lab.counting(|lab| lab.task_tc(&refusal.bytes()));
        assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])));
    });
}

#[test]
fn where_answers_pass_elsewhere_nothing_fails_over() {
    let far = |slot: u8| task(&format!("far.{slot}"), false, Via::Peer, &[&format!("172.18.9.1{slot}")]);
    let mut direct = service("direct", &["84:8084"], vec![far(1), far(2)]);
    direct.returns = Some(Return::Direct);
    with_lab(vec![direct], |lab| {
        lab.configure(|config| config.jiffies_per_second = 0);
        let syn = request(SYN, 40_007, 84).at(FIRST, 0);
        let sent = lab.xdp(&syn.bytes()).frame;
        assert_eq!(lab.xdp(&syn.bytes()).frame, sent);
        assert_eq!(failovers(lab), BTreeMap::new());
    });
}

#[test]
fn a_task_that_is_gone_is_told_to_clients_by_resets() {
    with_lab(services(), |lab| {
        let port = 40_008;
        let to = establish(lab, port);
        let udp = request(Transport::Udp, port, 53);
        let served = lab.delivered_to(&udp);
        lab.update(|cluster| drop(cluster.service_mut(0).tasks.remove(usize::from(to) - 1)));
        let reset = |packet: &Packet, transport, sequence, acknowledgment| {
            packet
                .clone()
                .with(|p| {
                    p.macs = (p.macs.1, p.macs.0);
                    (p.source, p.destination) = (p.destination, p.source);
                    (p.source_port, p.destination_port) = (p.destination_port, p.source_port);
                    p.transport = transport;
                    p.window = 0;
                    (p.hops, p.options, p.tcp_options) = (64, vec![], vec![]);
                    (p.identification, p.dont_fragment) = (0, false);
                })
                .at(sequence, acknowledgment)
        };
        let data = segment(ACK, port, 80, 0).with(|p| p.payload = vec![7; 500]);
        let longer = data.clone().with(|p| {
            p.options = vec![1; 8];
            p.tcp_options = vec![1; 12];
        });
        let unacknowledged = segment(Transport::Tcp(Flags { fin: true, ..NO_FLAGS }), port, 80, 0);
        let cases = [
            (data.clone(), reset(&data, RST, TASK_FIRST + 1, 0)),
            (longer.clone(), reset(&longer, RST, TASK_FIRST + 1, 0)),
            (unacknowledged.clone(), reset(&unacknowledged, RST_ACK, 0, FIRST + 2)),
        ];
        for (packet, expected) in cases {
            // By XDP, and by TC where there is no XDP: each packet again.
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            assert_eq!((verdict.action, &verdict.frame), (TX, &expected.bytes()), "{packet:?}");
            assert_checksums(&verdict.frame);
            assert_eq!(counted, BTreeMap::from([(Outcome::Reset, 1)]));
            let flags = lab.datapath().config().flags;
            lab.configure(|config| config.flags = TC_ALONE);
            let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&packet.bytes()));
            assert_eq!((verdict.action, &verdict.frame), (REDIRECT, &expected.bytes()), "{packet:?}");
            assert_eq!(counted, BTreeMap::from([(Outcome::Reset, 1)]));
            lab.configure(|config| config.flags = flags);
        }
        // No reset is answered by one, and a SYN starts anew with who is left.
        lab.passes("a reset", &segment(RST, port, 80, 0).bytes(), Outcome::BackendGone);
        let left = 3 - to;
        assert_eq!(lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)), format!("web.{left}"));
        if slot(&served) == to {
            assert_eq!(lab.delivered_to(&udp), format!("web.{left}"));
        } else {
            assert_eq!(lab.delivered_to(&udp), served);
        }
    });
}

const NO_FLAGS: Flags = Flags { syn: false, ack: false, fin: false, rst: false };

#[test]
fn a_connection_silent_for_longer_than_its_timer_has_ended() {
    let mut services = services();
    let timers = &mut services[0].timers;
    lb_userspace::cluster::set_timer(timers, "established", 3).expect("a timer");
    lb_userspace::cluster::set_timer(timers, "one_way", 3).expect("a timer");
    with_lab(services, |lab| {
        establish(lab, 40_009);
        let udp = request(Transport::Udp, 40_009, 53);
        lab.delivered_to(&udp);
        // Seconds of a hundredth.
        lab.configure(|config| config.jiffies_per_second /= 100);
        let later = segment(ACK, 40_009, 80, 0);
        eventually("the connection has ended", || {
            // Not asked about: that would be a sign of life.
            let lines = lab.lines();
            let (_, _, line) = lines.iter().find(|(_, control, _)| control.has(ESTABLISHED)).expect("a line");
            lab.jiffies().wrapping_sub(line.seen) > 300
        });
        lab.passes("a late packet", &later.bytes(), Outcome::NoConnection);
        assert_eq!(lab.collect().0.removed, 2);
        assert_eq!(lab.lines().len(), 0);
        let before = lab.counters().outcomes.iter().map(|count| count.packets).sum::<u64>();
        lab.delivered_to(&udp);
        assert_eq!(lab.counters().outcomes.iter().map(|count| count.packets).sum::<u64>(), before + 1);
    });
}

#[test]
fn where_ends_are_to_be_told_the_controller_alone_ends_an_idle_connection() {
    let mut services = services();
    lb_userspace::cluster::set_timer(&mut services[0].timers, "established", 150).expect("a timer");
    services[0].idle = lb_userspace::cluster::Idle::Reset;
    with_lab(services, |lab| {
        let to = establish(lab, 40_015);
        // Two jiffies a second: three hundred in all.
        lab.configure(|config| config.jiffies_per_second = 2);
        let run_out = |lab: &Lab| {
            eventually("its timer has run out", || {
                // Not asked about: that would be a sign of life.
                let [(_, _, line)] = lab.lines()[..] else { panic!("one connection") };
                lab.jiffies().wrapping_sub(line.seen) > 300
            });
        };
        run_out(lab);
        // A packet that comes before the controller brings it back to life.
        assert_eq!(lab.delivered_to(&segment(ACK, 40_015, 80, 0)), format!("web.{to}"));
        let (collection, resets) = lab.collect();
        assert_eq!((collection.removed, collection.resets, resets), (0, 0, vec![]));
        run_out(lab);
        let (collection, resets) = lab.collect();
        assert_eq!((collection.removed, collection.resets, lab.lines().len()), (1, 2, 0));
        let numbers: Vec<_> = resets.iter().map(|reset| (reset.sequence, reset.acknowledgment)).collect();
        assert_eq!(numbers, [(TASK_FIRST + 1, FIRST + 1), (FIRST + 1, TASK_FIRST + 1)]);
        assert_eq!((resets[0].from.port(), resets[0].to.port()), (80, 40_015));
        assert_eq!((resets[1].from, resets[1].to.port()), (resets[0].to, 8080));
        assert_eq!(resets[1].to.ip(), ip(&format!("172.18.0.1{to}")));
    });
}

#[test]
fn a_line_that_is_gone_is_one_named_reason() {
    with_lab(services(), |lab| {
        establish(lab, 40_010);
        assert_eq!(lab.evict(|_, _| true), 1);
        lab.passes("its line is gone", &segment(ACK, 40_010, 80, 0).bytes(), Outcome::NoConnection);
        // One that is not established is opened by the SYN that its client sends again.
        lab.delivered_to(&request(SYN, 40_011, 80).at(FIRST, 0));
        assert_eq!(lab.evict(|_, _| true), 1);
        lab.delivered_to(&request(SYN, 40_011, 80).at(FIRST, 0));
    });
}

#[test]
fn what_two_cpus_take_at_once_finds_its_connection() {
    const PORTS: std::ops::Range<u16> = 10_000..30_000;
    // All stay established, and are to have a line.
    let sizes = Sizes { connections: Some(65_536), ..twelve() };
    with_lab_of(sizes, services(), |lab| {
        let (taken, done) = (AtomicU16::new(0), AtomicU16::new(0));
        let wait_for = |counter: &AtomicU16, port| {
            while counter.load(Ordering::Acquire) != port {
                std::thread::yield_now();
            }
        };
        let ((), counted) = lab.counting(|lab| {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for port in PORTS {
                        let data = segment(ACK, port, 83, 0).with(|p| p.payload = b"GET".to_vec()).bytes();
                        wait_for(&taken, port);
                        lab.xdp(&data);
                        done.store(port, Ordering::Release);
                    }
                });
                for port in PORTS {
                    lab.xdp(&request(SYN, port, 83).at(FIRST, 0).bytes());
                    lab.task_tc(&answer(SYN_ACK, 3, 8083, port).at(TASK_FIRST, FIRST + 1).bytes());
                    let ack = segment(ACK, port, 83, 0).bytes();
                    taken.store(port, Ordering::Release);
                    // Now earlier, now later than the other.
                    (0..port % 128).for_each(|_| std::hint::spin_loop());
                    lab.xdp(&ack);
                    wait_for(&done, port);
                }
            });
        });
        let connections = PORTS.len() as u64;
        assert_eq!(
            counted,
            BTreeMap::from([(Outcome::Local, 3 * connections), (Outcome::Reply, connections)])
        );
    });
}

#[test]
fn draining_goes_on_and_zero_and_back_is_served_again() {
    with_lab(services(), |lab| {
        let to = establish(lab, 40_013);
        let tasks = lab.cluster().services[0].tasks.clone();
        lab.update(|cluster| {
            for task in &mut cluster.service_mut(0).tasks {
                task.state = TaskState::Draining;
            }
        });
        assert_eq!(lab.delivered_to(&segment(ACK, 40_013, 80, 0)), format!("web.{to}"));
        lab.passes("nobody takes new connections", &request(SYN, 40_014, 80).bytes(), Outcome::NoBackend);
        lab.update(|cluster| cluster.service_mut(0).tasks.clear());
        assert_eq!(
            lab.counting(|lab| lab.xdp(&segment(ACK, 40_013, 80, 0).bytes())).1,
            BTreeMap::from([(Outcome::Reset, 1)])
        );
        lab.update(|cluster| cluster.service_mut(0).tasks = tasks);
        // The task is another one, though it has the name and address of one that is gone.
        assert_eq!(
            lab.counting(|lab| lab.xdp(&segment(ACK, 40_013, 80, 0).bytes())).1,
            BTreeMap::from([(Outcome::Reset, 1)])
        );
        lab.delivered_to(&request(SYN, 40_014, 80).at(FIRST, 0));
    });
}

#[test]
fn nothing_is_removed_that_was_seen_since_it_was_found_to_have_ended() {
    with_lab(services(), |lab| {
        let port = 40_030;
        establish(lab, port);
        let (slot, control, line) = lab.lines()[0];
        let found = |seen| (slot, control.0, seen, remove::CONNECTION4);
        eventually("the clock goes on", || lab.jiffies() != line.seen);
        // Its client's port is used again between the look and the removal.
        lab.delivered_to(&segment(ACK, port, 80, 0));
        assert_eq!(lab.try_remove(&[found(line.seen)]), [false]);
        let (_, _, line) = lab.lines()[0];
        // Nor is what was given to another meanwhile: its control word is another.
        assert_eq!(lab.try_remove(&[(slot, control.0 ^ 1 << 40, line.seen, remove::CONNECTION4)]), [false]);
        lab.delivered_to(&segment(ACK, port, 80, 0));
        let (_, control, line) = lab.lines()[0];
        assert_eq!(lab.try_remove(&[(slot, control.0, line.seen, remove::CONNECTION4)]), [true]);
        assert_eq!(lab.lines().len(), 0);
        // But for those whose client may no longer connect, however busy.
        establish(lab, port);
        let (slot, control, line) = lab.lines()[0];
        let denied = |control| (slot, control, line.seen.wrapping_sub(1), remove::DENIED4);
        assert_eq!(lab.try_remove(&[denied(control.0 ^ 1 << 40), denied(control.0)]), [false, true]);
        assert_eq!(lab.lines().len(), 0);
    });
}

/// Sizes of a table with three sets, twenty-four lines.
fn twelve() -> Sizes {
    Sizes {
        connections: Some(12),
        services: Some(64),
        listeners: Some(256),
        backends: Some(256),
        slots: Some(8_192),
        ..Sizes::default()
    }
}

/// Sends a SYN, and if it was given to a task ends the handshake: whose task it is, or what became of it.
fn try_to_establish(lab: &Lab, port: u16) -> Result<u8, BTreeMap<Outcome, u64>> {
    let (verdict, counted) = lab.counting(|lab| lab.xdp(&request(SYN, port, 80).at(FIRST, 0).bytes()));
    if counted != BTreeMap::from([(Outcome::Local, 1)]) {
        // The host would refuse it.
        assert_eq!(verdict.action, DROP, "{port}: {counted:?}");
        return Err(counted);
    }
    let to = slot(&lab.task_of(verdict.note.expect("a note")));
    let taken = answer(SYN_ACK, to, 8080, port).at(TASK_FIRST, FIRST + 1).bytes();
    let (verdict, counted) = lab.counting(|lab| lab.task_tc(&taken));
    assert_eq!((verdict.action, counted), (REDIRECT, BTreeMap::from([(Outcome::Reply, 1)])), "{port}");
    assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), format!("web.{to}"), "{port}");
    Ok(to)
}

#[test]
fn a_full_table_keeps_who_is_established_and_places_by_hash_who_comes() {
    with_lab_of(twelve(), services(), |lab| {
        let mut established = BTreeMap::new();
        let mut refused = 0;
        let mut port = 10_000;
        // Bad luck says nothing yet; so many say that the table is full.
        while refused < FULL {
            port += 1;
            match try_to_establish(lab, port) {
                Ok(to) => drop(established.insert(port, to)),
                Err(counted) => {
                    assert_eq!(counted, BTreeMap::from([(Outcome::TableFull, 1)]));
                    refused += 1;
                }
            }
        }
        assert!(established.len() >= 12, "{}", established.len());
        let before = states(lab, *established.keys().next().expect("one"));
        // From now on they are served without a line: both ways, with the same task from first to last.
        let mut tasks = BTreeSet::new();
        for port in 20_000..20_020 {
            let to = try_to_establish(lab, port).unwrap_or_else(|counted| panic!("{port}: {counted:?}"));
            tasks.insert(to);
            let data = answer(ACK, to, 8080, port).at(TASK_FIRST + 1, FIRST + 1);
            assert_eq!(lab.task_tc(&data.bytes()).action, REDIRECT, "{port}");
            assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 100)), format!("web.{to}"), "{port}");
            assert_eq!(states(lab, port), Vec::<u32>::new(), "{port} has no line");
        }
        assert_eq!(tasks.len(), 2, "hashes spread");
        // What a task sends to others than clients is not ours, table or no table.
        let not_ours = answer(ACK, other_than_hash(lab, 20_100), 8080, 20_100).bytes();
        assert_eq!(lab.task_tc(&not_ours).action, UNSPEC);
        for (port, to) in &established {
            assert_eq!(lab.delivered_to(&segment(ACK, *port, 80, 0)), format!("web.{to}"), "{port}");
        }
        assert_eq!(states(lab, *established.keys().next().expect("one")), before);
    });
}

/// The task to which a client's port is *not* placed by its hash.
fn other_than_hash(lab: &Lab, port: u16) -> u8 {
    3 - slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)))
}

#[test]
fn a_port_that_comes_again_under_the_guard_is_not_led_to_its_last_task() {
    with_lab(services(), |lab| {
        // Closed by both sides: the line stays for what is late.
        let ports = 30_000..30_040;
        let mut last = BTreeMap::new();
        for port in ports.clone() {
            let to = establish(lab, port);
            lab.delivered_to(&segment(FIN, port, 80, 0));
            lab.task_tc(&answer(FIN, to, 8080, port).at(TASK_FIRST + 1, FIRST + 2).bytes());
            last.insert(port, to);
        }
        lab.configure(|config| config.flood_rate = 1);
        (0..200).for_each(|port| drop(lab.xdp(&request(SYN, 40_000 + port, 80).at(FIRST, 0).bytes())));
        let mut moved = 0;
        for port in ports {
            let again = FIRST + 1_000_000;
            let to = slot(&lab.delivered_to(&request(SYN, port, 80).at(again, 0)));
            let taken = answer(SYN_ACK, to, 8080, port).at(TASK_FIRST, again + 1).bytes();
            assert_eq!(lab.task_tc(&taken).action, REDIRECT, "{port}: the client hears its task");
            let goes_on = request(ACK, port, 80).at(again + 1, TASK_FIRST + 1);
            assert_eq!(lab.delivered_to(&goes_on), format!("web.{to}"), "{port}");
            moved += usize::from(last[&port] != to);
        }
        assert!(moved > 5, "{moved} ports came to another task than before");
    });
}

/// Two published ports that lead to the same tasks, so many.
fn behind_two_ports(tasks: u8) -> Vec<lb_userspace::cluster::Service> {
    let local = |slot: u8| task(&format!("web.{slot}"), true, Via::Snat, &[&format!("172.18.0.1{slot}")]);
    vec![service("web", &["84:8080", "85:8080"], (1..=tasks).map(local).collect())]
}

/// Opens a connection, has both sides close it, the task first, and says which task it was and which port that saw.
fn open_and_close(lab: &Lab, port: u16, to: u16, first: u32) -> (u8, u16) {
    let verdict = lab.xdp(&request(SYN, port, to).at(first, 0).bytes());
    let task = slot(&lab.task_of(verdict.note.unwrap_or_else(|| panic!("{port} to {to}: {verdict:?}"))));
    let seen = verdict.port.unwrap_or(port);
    let reply = |transport, ahead, acknowledged| {
        let reply = answer(transport, task, 8080, seen).at(TASK_FIRST + ahead, first + acknowledged);
        assert_eq!(lab.task_tc(&reply.bytes()).action, REDIRECT, "{port} to {to}, seen as {seen}");
    };
    let ask = |transport, ahead, acknowledged| {
        let segment = request(transport, port, to).at(first + ahead, TASK_FIRST + acknowledged);
        assert_eq!(lab.delivered_to(&segment), format!("web.{task}"), "{port} to {to}");
    };
    reply(SYN_ACK, 0, 1);
    ask(ACK, 1, 1);
    reply(FIN, 1, 1);
    ask(FIN, 1, 2);
    reply(ACK, 2, 2);
    (task, seen)
}

#[test]
fn what_a_task_may_remember_of_a_closed_connection_is_not_given_to_another() {
    with_lab(behind_two_ports(1), |lab| {
        let port = 30_000;
        assert_eq!(open_and_close(lab, port, 84, FIRST), (1, port));
        // By another listener the same port may look older to the task: it sees others, each once.
        let mut seen = BTreeSet::from([port]);
        for round in 1..10 {
            let (_, other) = open_and_close(lab, port, 85, FIRST + round * 100_000);
            assert!(seen.insert(other), "{other} was seen before");
        }
        // And none of those is another client's port by the first listener while it is remembered.
        for port in seen {
            if port != 30_000 {
                let (_, other) = open_and_close(lab, port, 84, FIRST);
                assert_ne!(other, port);
            }
        }
        // By its own listener its numbers are newer.
        assert_eq!(open_and_close(lab, port, 84, FIRST + 2_000_000), (1, port));
    });
}

#[test]
fn a_task_that_was_left_for_another_is_remembered_too() {
    with_lab(behind_two_ports(2), |lab| {
        let port = 30_000;
        let (first, _) = open_and_close(lab, port, 84, FIRST);
        let (second, _) = open_and_close(lab, port, 84, FIRST + 100_000);
        assert_ne!(first, second, "tasks take turns");
        // Either may remember the port from the first listener.
        for round in 2..6 {
            let (_, seen) = open_and_close(lab, port, 85, FIRST + round * 100_000);
            assert_ne!(seen, port);
        }
        // It is forgotten after a while, by user space too.
        let aliases = |lab: &Lab| lab.lines().iter().filter(|(_, control, _)| control.has(ALIAS)).count();
        let lingering = aliases(lab);
        assert!(lingering >= 4, "{lingering}");
        assert_eq!((lab.collect().0.removed, aliases(lab)), (0, lingering));
        lab.configure(|config| config.jiffies_per_second = 0);
        // The last connection's own goes after it.
        eventually("all are forgotten", || {
            lab.collect();
            aliases(lab) == 0
        });
    });
}

#[test]
fn a_task_that_is_remembered_answers_who_is_placed_by_hash() {
    // Without a line, and where two listeners lead to the task with one.
    for (services, to) in [(services(), 80), (behind_two_ports(2), 84)] {
        with_lab(services, |lab| {
            let ports = 30_000..30_040;
            let mut left = BTreeMap::new();
            for port in ports.clone() {
                let (first, _) = open_and_close(lab, port, to, FIRST);
                let (second, _) = open_and_close(lab, port, to, FIRST + 100_000);
                assert_ne!(first, second, "tasks take turns");
                left.insert(port, first);
            }
            lab.configure(|config| config.flood_rate = 1);
            (0..200).for_each(|port| drop(lab.xdp(&request(SYN, 40_000 + port, to).at(FIRST, 0).bytes())));
            let mut back = 0;
            for port in ports {
                let again = FIRST + 1_000_000;
                let verdict = lab.xdp(&request(SYN, port, to).at(again, 0).bytes());
                let task = slot(&lab.task_of(verdict.note.expect("a task")));
                assert_eq!(verdict.port, Some(port), "to {to}");
                let taken = answer(SYN_ACK, task, 8080, port).at(TASK_FIRST, again + 1).bytes();
                let (verdict, counted) = lab.counting(|lab| lab.task_tc(&taken));
                assert_eq!(verdict.action, REDIRECT, "{port} to {to}: {counted:?}");
                let goes_on = request(ACK, port, to).at(again + 1, TASK_FIRST + 1);
                assert_eq!(lab.delivered_to(&goes_on), format!("web.{task}"), "{port} to {to}");
                back += usize::from(left[&port] == task);
            }
            assert!(back > 5, "{back} ports came back to the task that they had left, to {to}");
        });
    }
}

#[test]
fn a_client_comes_back_to_a_task_under_its_own_port() {
    with_lab(behind_two_ports(2), |lab| {
        let port = 30_000;
        // By its own listener what is newer is taken: turns stay exact, and no port is translated.
        let turns: Vec<(u8, u16)> =
            (0..8).map(|round| open_and_close(lab, port, 84, FIRST + round * 100_000)).collect();
        assert!(turns.iter().all(|(_, seen)| *seen == port), "{turns:?}");
        assert!(turns.windows(2).all(|pair| pair[0].0 != pair[1].0), "{turns:?}");
    });
}
