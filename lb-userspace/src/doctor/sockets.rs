//! Ports that other programs of this machine hold.

use std::{collections::BTreeMap, fs, net::IpAddr};

use super::{Attached, Findings};
use crate::{
    cluster::Protocol,
    net::sockets::{Socket, sockets, who},
};

/// Published ports on which a program of this node listens: what comes by the interface never gets there. The tunnel's port
/// in other hands is worse: probes come back by another.
pub fn taken(findings: &mut Findings, one: &Attached) {
    const CHECK: &str = "ports";
    let tables = &one.inventory.tables;
    let own = one.around.controller;
    let mut by_port: BTreeMap<(Protocol, u16), Vec<Socket>> = BTreeMap::new();
    for socket in sockets() {
        by_port.entry((socket.protocol, socket.port)).or_default().push(socket);
    }
    let addresses: Vec<IpAddr> = tables.listeners.keys().map(|at| at.address).collect();
    let mut clean = true;
    for port in tables.ports.values() {
        let held = by_port.get(&(port.protocol, port.published)).into_iter().flatten();
        let held =
            held.filter(|socket| socket.address.is_unspecified() || addresses.contains(&socket.address));
        for socket in held.take(1) {
            let owner = who(socket.inode);
            let name = owner.as_ref().map_or("a program", |owner| owner.name.as_str());
            // Docker holds published ports of its own mesh.
            if name == "dockerd" {
                continue;
            }
            clean = false;
            let service = tables.services.get(&port.service).map_or("", |label| &label.name);
            findings.warn(
                CHECK,
                format!(
                    "port {}/{} is published by service {service}, and {} listens on it here: what comes by {} goes to the \
                     service, what comes from this node itself goes to that program",
                    port.published,
                    port.protocol,
                    owner.as_ref().map_or_else(|| "a program".to_owned(), ToString::to_string),
                    one.inventory.interface
                ),
                format!("stop {name}, or publish another port: docker service update --publish-rm {} …", port.published),
            );
        }
    }
    let tunnel = one.around.config.tunnel_port.get();
    for socket in by_port.get(&(Protocol::Udp, tunnel)).into_iter().flatten() {
        let owner = who(socket.inode);
        if owner
            .as_ref()
            .is_some_and(|owner| Some(owner.pid) == own || owner.name.starts_with("lb-userspace"))
        {
            continue;
        }
        clean = false;
        findings.error(
            CHECK,
            format!(
                "UDP port {tunnel} is the tunnel's, and {} holds it: it loses what comes to it from other nodes",
                owner.as_ref().map_or_else(|| "another program".to_owned(), ToString::to_string)
            ),
            format!("stop that program, or attach on every node with another --tunnel-port than {tunnel}"),
        );
    }
    if clean {
        findings.ok(
            CHECK,
            format!("no program of this node holds a port that {} serves", one.inventory.interface),
        );
    }
    let filters = ["all", one.inventory.interface.as_str()].map(|name| {
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).unwrap_or_default().trim()
            == "1"
    });
    if filters.contains(&true) {
        findings.note(
            "rp_filter",
            format!(
                "reverse-path filters are strict: what clients send by another way than this node would answer by is dropped \
                 before the host sees it, what is served on {} is not concerned",
                one.inventory.interface
            ),
        );
    }
}
