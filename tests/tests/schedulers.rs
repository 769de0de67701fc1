//! How new connections are given to tasks, packet by packet: in turn, by chance, by a hash. Between real sockets: `placement`.

use std::collections::BTreeMap;

use lb_tests::{
    lab::{Lab, ip, with_lab},
    packet::{ACK, Packet, SYN},
    talk::{CLIENT, FIRST, LISTENER, establish, request, segment, services, slot},
};
use lb_userspace::cluster::{Affinity, Scheduler, Service};

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
        for (port, scheduler) in (41_000..).step_by(10).zip(Scheduler::ALL.into_iter().cycle().take(8)) {
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
        assert_eq!(open.len(), 80);
    });
}
