//! How new connections are given to tasks, packet by packet: in turn, by chance, by a hash, by what is open. Between real sockets: `placement`.

use std::collections::BTreeMap;

use lb_common::outcome::Outcome;
use lb_tests::{
    lab::{DROP, Lab, ip, task, with_lab},
    packet::{ACK, FIN, Packet, RST, SYN, SYN_ACK, Transport},
    talk::{CLIENT, FIRST, LISTENER, TASK_FIRST, answer, establish, request, segment, services, slot},
};
use lb_userspace::cluster::{Affinity, Scheduler, Service, Via};

/// The services, those of the web with a scheduler; its second task counts three times as much as the first.
fn scheduled(scheduler: Scheduler) -> Vec<Service> {
    let mut services = services();
    services[0].scheduler = scheduler;
    services[0].tasks[1].weight = 3;
    services
}

/// The tasks that so many connections get.
fn given(lab: &Lab, count: u16) -> Vec<u8> {
    let ports = 20_000..20_000 + count;
    ports.map(|port| slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)))).collect()
}

fn from(client: &str, port: u16) -> Packet {
    Packet::new(SYN, (ip(client), port), (ip(LISTENER), 80)).at(FIRST, 0)
}

#[test]
fn in_turn_each_gets_exactly_its_share() {
    with_lab(scheduled(Scheduler::RoundRobin), |lab| {
        let given = given(lab, 40);
        for turn in given.chunks(4) {
            assert_eq!(turn.iter().filter(|task| **task == 2).count(), 3, "{given:?}");
        }
    });
}

/// The connections that each task has.
fn open(lab: &Lab) -> [u64; 2] {
    let backends = lab.datapath().tables().backends.iter();
    let mut open = [0; 2];
    for (index, entry) in backends.filter(|(_, entry)| entry.label.task.starts_with("web.")) {
        open[usize::from(slot(&entry.label.task)) - 1] += lab.open(*index).own();
    }
    open
}

#[test]
fn the_task_with_the_fewest_open_connections_for_its_weight_gets_the_next() {
    with_lab(scheduled(Scheduler::LeastConnections), |lab| {
        let tasks: Vec<u8> = (20_000..20_040).map(|port| establish(lab, port)).collect();
        assert_eq!(open(lab), [10, 30]);
        // Those of the first task end: closed by both sides, or reset.
        let ports: Vec<u16> =
            (20_000..).zip(&tasks).filter(|(_, task)| **task == 1).map(|(port, _)| port).collect();
        for port in &ports[..4] {
            lab.xdp(&segment(FIN, *port, 80, 0).bytes());
            lab.task_tc(&answer(FIN, 1, 8080, *port).at(TASK_FIRST + 1, FIRST + 2).bytes());
        }
        ports[4..6].iter().for_each(|port| drop(lab.xdp(&segment(RST, *port, 80, 0).bytes())));
        assert_eq!(open(lab), [4, 30]);
        let next: Vec<u8> = (30_000..30_006).map(|port| establish(lab, port)).collect();
        assert_eq!((next, open(lab)), (vec![1; 6], [10, 30]));
        // What is taken out of the table ends too; also what was closed, which does not count twice.
        lab.evict(|_, line| line.tuple.source_port.get() < 30_000);
        assert_eq!(open(lab), [6, 0]);
        // A task whose weight changes is given its new share, and nothing is moved.
        lab.update(|cluster| cluster.service_mut(0).tasks[1].weight = 1);
        let next: Vec<u8> = (31_000..31_006).map(|port| establish(lab, port)).collect();
        assert_eq!((next, open(lab)), (vec![2; 6], [6, 6]));
    });
}

/// Whoever is asked again goes on to the other ones, though the one with the fewest, or the next with room, is the one that is silent.
#[test]
fn a_syn_that_is_sent_again_goes_to_another_task_also_where_connections_are_compared() {
    let extra = |slot: u8| task(&format!("web.{slot}"), true, Via::Snat, &[&format!("172.18.0.1{slot}")]);
    for scheduler in [Scheduler::LeastConnections, Scheduler::RoundRobin] {
        for tasks in [2, 4, 8] {
            let mut services = services();
            services.truncate(1);
            services[0].tasks = (1..=tasks).map(extra).collect();
            services[0].scheduler = scheduler;
            services[0].task_max_connections = 100;
            with_lab(services, |lab| {
                // A quarter of no second is over at once.
                lab.configure(|config| config.jiffies_per_second = 0);
                for port in 20_000..20_024 {
                    let syn = request(SYN, port, 80).at(FIRST, 0);
                    let first = lab.delivered_to(&syn);
                    assert_ne!(lab.delivered_to(&syn), first, "{tasks} tasks, {}", scheduler.name());
                }
            });
        }
    }
}

/// Whoever forges clients establishes nothing.
#[test]
fn connections_that_are_not_established_take_nobody_s_room() {
    let mut services = scheduled(Scheduler::RoundRobin);
    services[0].task_max_connections = 2;
    with_lab(services, |lab| {
        for port in 20_000..20_100 {
            let to = slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)));
            lab.task_tc(&answer(SYN_ACK, to, 8080, port).at(TASK_FIRST, FIRST + 1).bytes());
        }
        (30_000..30_004).for_each(|port| assert!(establish(lab, port) > 0));
        let last = lab.xdp(&request(SYN, 30_004, 80).at(FIRST, 0).bytes());
        assert_eq!(last.action, DROP);
    });
}

/// It would have the fewest for ever.
#[test]
fn a_task_that_refuses_is_not_given_everything() {
    with_lab(scheduled(Scheduler::LeastConnections), |lab| {
        lab.update(|cluster| cluster.service_mut(0).tasks[1].weight = 1);
        let mut refused = 0;
        for port in 20_000..20_100 {
            let to = slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)));
            let answer = answer(if to == 1 { RST } else { SYN_ACK }, to, 8080, port);
            lab.task_tc(&answer.at(TASK_FIRST, FIRST + 1).bytes());
            refused += u16::from(to == 1);
        }
        assert_eq!(refused, 50);
    });
}

#[test]
fn a_task_gets_no_more_connections_than_it_may_have() {
    for scheduler in Scheduler::ALL {
        let mut services = scheduled(scheduler);
        services[0].task_max_connections = 5;
        with_lab(services, |lab| {
            // A frame is a SYN, or a datagram for the same two tasks by another port, which has room of its own.
            let syn = |port| request(SYN, port, 80).at(FIRST, 0);
            let tasks: Vec<u8> = (20_000..20_010).map(|port| establish(lab, port)).collect();
            assert_eq!(open(lab), [5, 5], "{}: {tasks:?}", scheduler.name());
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&syn(20_010).bytes()));
            assert_eq!((verdict.action, counted), (DROP, BTreeMap::from([(Outcome::TasksFull, 1)])));
            // Datagrams too, once a client has gone on after an answer; by another port of the tasks, which has room of its own.
            let datagram = |port| lab.xdp(&request(Transport::Udp, port, 53).bytes());
            for port in 20_000..20_010 {
                let (verdict, counted) = lab.counting(|_| datagram(port));
                let note = verdict.note.unwrap_or_else(|| panic!("{}: {port} {counted:?}", scheduler.name()));
                let to = slot(&lab.task_of(note));
                lab.task_tc(&answer(Transport::Udp, to, 5353, port).bytes());
                assert_ne!(datagram(port).action, DROP);
            }
            assert_eq!(datagram(20_010).action, DROP);
            // Those that are open go on, and one that ends makes room; the client whom none took gets it.
            for (port, task) in (20_000..).zip(&tasks) {
                assert_eq!(slot(&lab.delivered_to(&segment(ACK, port, 80, 0))), *task);
            }
            lab.xdp(&segment(RST, 20_003, 80, 0).bytes());
            assert_eq!(slot(&lab.delivered_to(&syn(20_010))), tasks[3]);
            // Nobody is sent away when there may be fewer, and nobody is waited for when there may be any number.
            lab.update(|cluster| cluster.service_mut(0).task_max_connections = 2);
            assert_eq!(slot(&lab.delivered_to(&segment(ACK, 20_000, 80, 0))), tasks[0]);
            assert_eq!(lab.xdp(&syn(20_011).bytes()).action, DROP);
            lab.update(|cluster| cluster.service_mut(0).task_max_connections = 0);
            lab.delivered_to(&syn(20_011));
        });
    }
}

#[test]
fn by_chance_each_gets_its_share_on_average() {
    with_lab(scheduled(Scheduler::Random), |lab| {
        let given = given(lab, 4_000);
        let heavy = given.iter().filter(|task| **task == 2).count();
        // Three of four: 3,000, and 27 of standard deviation.
        assert!((2_850..3_150).contains(&heavy), "{heavy} of 4,000");
        let exact =
            given.chunks(4).filter(|turn| turn.iter().filter(|task| **task == 2).count() == 3).count();
        assert!(exact < 900, "{exact} of 1,000 turns are exact: by chance it is some 422");
        // A client whose SYN is not answered gets the other one.
        lab.update(|cluster| cluster.service_mut(0).tasks[1].weight = 1);
        // A quarter of no second is over at once.
        lab.configure(|config| config.jiffies_per_second = 0);
        let mut retried = BTreeMap::new();
        for port in 30_000..30_020 {
            let syn = request(SYN, port, 80).at(FIRST, 0);
            let first = lab.delivered_to(&syn);
            *retried.entry(lab.delivered_to(&syn) != first).or_insert(0) += 1;
        }
        assert_eq!(retried, BTreeMap::from([(true, 20)]));
    });
}

#[test]
fn by_the_client_s_address_each_client_has_a_task() {
    let mut affine = scheduled(Scheduler::RoundRobin);
    affine[0].affinity = Affinity::Client;
    for services in [scheduled(Scheduler::Source), affine] {
        with_lab(services, |lab| {
            let mut counts = BTreeMap::<String, u32>::new();
            for number in 0..200 {
                let client = format!("198.51.{}.{}", 101 + number / 100, 1 + number % 100);
                let first = lab.delivered_to(&from(&client, 40_000));
                for port in 40_001..40_004 {
                    assert_eq!(lab.delivered_to(&from(&client, port)), first, "{client}");
                }
                *counts.entry(first).or_default() += 1;
            }
            // Three of four: 150 clients, and 6 of standard deviation.
            assert!((125..=175).contains(&counts["web.2"]), "{counts:?}");
        });
    }
}

#[test]
fn clients_of_one_network_have_one_task_if_they_are_one() {
    let mut services = scheduled(Scheduler::RoundRobin);
    services[0].affinity = Affinity::Client;
    services[0].client_prefix.v4 = 24;
    with_lab(services, |lab| {
        let mut tasks = BTreeMap::<String, u32>::new();
        for network in 0..60 {
            let of = |host: u8| lab.delivered_to(&from(&format!("198.51.{network}.{host}"), 40_000));
            let first = of(1);
            assert!([2, 77, 254].into_iter().all(|host| of(host) == first), "198.51.{network}.0/24");
            *tasks.entry(first).or_default() += 1;
        }
        assert_eq!(tasks.len(), 2, "networks are apart: {tasks:?}");
    });
}

#[test]
fn no_change_of_the_scheduler_or_of_a_weight_moves_a_connection() {
    with_lab(scheduled(Scheduler::RoundRobin), |lab| {
        let mut open = Vec::new();
        for (port, scheduler) in (41_000..).step_by(10).zip(Scheduler::ALL.into_iter().cycle().take(10)) {
            lab.update(|cluster| {
                let service = cluster.service_mut(0);
                service.scheduler = scheduler;
                service.tasks[0].weight = 1 + port % 3;
            });
            open.extend((port..port + 10).map(|port| (port, establish(lab, port))));
            for (port, task) in &open {
                let name = lab.delivered_to(&segment(ACK, *port, 80, 0));
                assert_eq!(slot(&name), *task, "port {port} of {CLIENT} after {}", scheduler.name());
            }
        }
        assert_eq!(open.len(), 100);
    });
}
