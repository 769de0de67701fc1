//! What a client and the tasks of the bench say to each other, packet by packet.

use lb_common::conntrack::line::{ALIAS, ANSWERED, CLIENT_FIN, ESTABLISHED, RESET, TASK_FIN};
use lb_userspace::cluster::{Service, Via};

use crate::{
    lab::{HOP_MAC, Lab, REDIRECT, TASK_MAC, ip, service, task},
    packet::{ACK, NODE_MAC, Packet, SYN, SYN_ACK, Transport},
};

/// The client's address.
pub const CLIENT: &str = "198.51.100.7";
/// The address that the node's listeners have.
pub const LISTENER: &str = "192.0.2.1";
/// A client's first sequence number.
pub const FIRST: u32 = 1_000;
/// A task's.
pub const TASK_FIRST: u32 = 7_000;

/// A client's packet from `port` to the published port `to`.
pub fn request(transport: Transport, port: u16, to: u16) -> Packet {
    Packet::new(transport, (ip(CLIENT), port), (ip(LISTENER), to))
}

/// A client's segment without payload, so many bytes after its first.
pub fn segment(transport: Transport, port: u16, to: u16, ahead: u32) -> Packet {
    request(transport, port, to).at((FIRST + 1).wrapping_add(ahead), TASK_FIRST + 1)
}

/// An answer of a task by its veth.
pub fn answer(transport: Transport, slot: u8, target: u16, port: u16) -> Packet {
    let from = ip(&format!("172.18.0.1{slot}"));
    Packet::new(transport, (from, target), (ip(CLIENT), port)).with(|p| p.macs = (TASK_MAC, NODE_MAC))
}

/// An answer of a routed or snat task, by the uplink.
pub fn far_answer(transport: Transport, from: &str, target: u16, to: (&str, u16)) -> Packet {
    Packet::new(transport, (ip(from), target), (ip(to.0), to.1)).with(|p| p.macs = (HOP_MAC, NODE_MAC))
}

/// Services of two local tasks, of a routed one, of one by snat, and of a single local one.
pub fn services() -> Vec<Service> {
    let local = |slot: u8| task(&format!("web.{slot}"), true, Via::Snat, &[&format!("172.18.0.1{slot}")]);
    vec![
        service("web", &["80:8080", "53:5353/udp"], vec![local(1), local(2)]),
        service("routed", &["81:8081"], vec![task("routed.1", false, Via::Routed, &["10.9.0.1"])]),
        service("snat", &["82:8082"], vec![task("snat.1", false, Via::Snat, &["10.9.0.2"])]),
        service("lone", &["83:8083"], vec![task("lone.1", true, Via::Snat, &["172.18.0.13"])]),
    ]
}

/// The number of a task of web by its name.
pub fn slot(name: &str) -> u8 {
    name.strip_prefix("web.").and_then(|slot| slot.parse().ok()).expect("a task of web")
}

/// A handshake with one of the web's tasks; which one.
pub fn establish(lab: &Lab, port: u16) -> u8 {
    let to = slot(&lab.delivered_to(&request(SYN, port, 80).at(FIRST, 0)));
    let taken = answer(SYN_ACK, to, 8080, port).at(TASK_FIRST, FIRST + 1);
    assert_eq!(lab.task_tc(&taken.bytes()).action, REDIRECT);
    assert_eq!(lab.delivered_to(&segment(ACK, port, 80, 0)), format!("web.{to}"));
    to
}

/// The states of the IPv4 connections of a client's port, without what is not of interest.
pub fn states(lab: &Lab, port: u16) -> Vec<u32> {
    const KEPT: u32 = CLIENT_FIN | TASK_FIN | RESET | ANSWERED | ESTABLISHED;
    let lines = lab.lines().into_iter();
    let of_port =
        lines.filter(|(_, control, line)| !control.has(ALIAS) && line.tuple.source_port.get() == port);
    of_port.map(|(_, control, _)| control.state() & KEPT).collect()
}
