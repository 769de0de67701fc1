//! The ways to the other nodes: who is off, who has no agent, where the tunnel's port does not pass, and what size does.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::net::TcpStream;

use super::{
    Attached, Findings,
    ping::{Echo, ping},
};
use crate::{
    cluster::Protocol,
    datapath::attached_interfaces,
    inventory::{Agent, Key, Node, via},
    net::{Asked, Net, Route, Snapshot, ask_once},
};

/// An answer comes within this time, or not at all.
const PATIENCE: Duration = Duration::from_millis(800);
/// A service is asked so often by a node.
const TRIES: usize = 8;
/// What the tunnel adds to a packet: outer IPv4, UDP, Geneve and its option.
const TUNNEL: u32 = 60;

/// Checks the way to each of the other nodes, all at once.
pub async fn all(findings: &mut Findings, one: &Attached, net: &Net, snapshot: &Snapshot) {
    let nodes = one.inventory.nodes();
    let others: Vec<Node> =
        nodes.into_iter().filter(|node| !node.this && node.agent != Agent::None).collect();
    let checks = others.iter().map(|node| check(one, node, net, snapshot));
    for found in futures::future::join_all(checks).await {
        findings.0.extend(found.0);
    }
}

/// An echo on a thread of its own.
async fn echo(to: Ipv4Addr, size: u32) -> Echo {
    let ping = move || ping(to, size as usize, PATIENCE);
    tokio::task::spawn_blocking(ping).await.unwrap_or(Echo::Refused)
}

async fn check(one: &Attached, node: &Node, net: &Net, snapshot: &Snapshot) -> Findings {
    let mut findings = Findings::default();
    let (interface, name) = (&one.inventory.interface, &node.name);
    let port = one.around.config.tunnel_port.get();
    let Some(mut address) = node.addresses.first().copied() else {
        findings.error("node", format!("node {name} has no address"), "lb-userspace node ls");
        return findings;
    };
    let mut route = net.route(address).await;
    // The tunnel may go to another one: each of several uplinks reaches nodes by itself.
    for other in node.addresses.iter().skip(1) {
        let by = |route: &Route| snapshot.links.get(&route.interface).map(|link| link.name.clone());
        if node.reached_by.is_none() || route.as_ref().ok().and_then(by) == node.reached_by {
            break;
        }
        (address, route) = (*other, net.route(*other).await);
    }
    let leads = route.as_ref().ok().and_then(|route| snapshot.links.get(&route.interface));
    if let Err(reason) = &route {
        findings.error(
            "way",
            format!("node {name}: no route to {address}: {reason}"),
            format!("ip route get {address}"),
        );
        return findings;
    }
    let beside = leads.filter(|link| link.name != *interface);
    let others = attached_interfaces().unwrap_or_default();
    let other = others.iter().find(|other| *other != interface);
    if let (Some(beside), Some(other)) = (beside, other) {
        findings.error(
            "way",
            format!(
                "node {name}: the way to {address} leads by {}, and {other} has a datapath of its own: its tasks are not offered by \
                 {interface}",
                beside.name
            ),
            format!("sudo lb-userspace detach --iface {other}"),
        );
        return findings;
    }
    let by = beside.map_or(interface, |beside| &beside.name);
    let cookie = one.inventory.cookie_to(&node.id);
    let asked = ask_once(by, (address, port), cookie, PATIENCE).await;
    if asked == Asked::Answered {
        findings.ok(
            "tunnel",
            format!(
                "node {name}: its datapath answers at {address} by {by}, UDP port {port} passes both ways"
            ),
        );
        keyed(&mut findings, node, port);
        if let (IpAddr::V4(to), Some(link)) = (address, leads) {
            let mtu = route.as_ref().ok().and_then(|route| route.mtu).unwrap_or(link.mtu);
            size(&mut findings, name, to, mtu).await;
        }
        return findings;
    }
    silent(&mut findings, node, (address, port), asked).await;
    findings
}

/// Whether others can speak as the node.
fn keyed(findings: &mut Findings, node: &Node, port: u16) {
    const CHECK: &str = "key";
    let name = &node.name;
    if node.key == Some(Key::None) {
        findings.warn(
            CHECK,
            format!("node {name}: packets in the tunnel from it need no key: who can forge its address reaches this node's tasks"),
            "bring the agents of it and of the managers to this version; of a cluster file: `lb-userspace keygen --help`",
        );
    }
    if node.forged_packets > 0 {
        findings.warn(
            CHECK,
            format!(
                "node {name}: {} packets in the tunnel from its address had not its key, and were dropped: it has begun anew, or somebody forges them",
                node.forged_packets
            ),
            format!(
                "find out who sends them: tcpdump -eni any udp port {port} shows the hardware address that they come from"
            ),
        );
    }
}

/// Why a node does not answer.
async fn silent(findings: &mut Findings, node: &Node, (address, port): (IpAddr, u16), asked: Asked) {
    const CHECK: &str = "tunnel";
    let name = &node.name;
    let alive = match address {
        IpAddr::V4(to) => echo(to, 84).await == Echo::Answered,
        IpAddr::V6(_) => false,
    };
    match asked {
        Asked::Forbidden => findings.error(
            CHECK,
            format!("node {name}: this node's own packet filter does not let UDP port {port} out to {address}"),
            format!("sudo iptables -I OUTPUT -p udp --dport {port} -j ACCEPT (iptables -S OUTPUT shows the rule)"),
        ),
        Asked::NobodyThere => findings.error(
            CHECK,
            format!("node {name}: the machine at {address} is there, no datapath is attached to its interface"),
            format!("on {name}: sudo lb-userspace attach --iface IF, or systemctl start lb-userspace"),
        ),
        _ if alive => findings.error(
            CHECK,
            format!(
                "node {name}: the machine at {address} is there (it answers a ping), UDP port {port} gets no answer: a firewall \
                 between the nodes drops it, or no datapath is attached there and the machine does not say so"
            ),
            format!(
                "let UDP and TCP port {port} pass between the nodes, on {name}: sudo iptables -I INPUT -p udp --dport {port} -j \
                 ACCEPT; and there: sudo lb-userspace doctor"
            ),
        ),
        _ => findings.error(
            CHECK,
            format!("node {name}: nothing answers at {address}, not even a ping: it is off, or cut off"),
            format!("ping {address}; if it is gone for good: docker node rm --force {name}"),
        ),
    }
}

/// Whether packets as long as this side thinks they may be get there and back.
async fn size(findings: &mut Findings, name: &str, to: Ipv4Addr, mtu: u32) {
    const CHECK: &str = "mtu";
    // Who answers no ping tells nothing.
    if echo(to, 84).await != Echo::Answered {
        findings.note(CHECK, format!("node {name}: {to} answers no ping, the way's MTU is not known"));
        return;
    }
    if echo(to, mtu).await == Echo::Answered {
        findings.ok(
            CHECK,
            format!(
                "node {name}: packets of {mtu} bytes pass; through the tunnel {} remain for a client's",
                mtu - TUNNEL
            ),
        );
        return;
    }
    let (mut passes, mut fails) = (84, mtu);
    while fails - passes > 4 {
        let middle = passes.midpoint(fails);
        if echo(to, middle).await == Echo::Answered {
            passes = middle;
        } else {
            fails = middle;
        }
    }
    findings.error(
        CHECK,
        format!(
            "node {name}: packets of {mtu} bytes, which this node's interface allows, do not get to {to} and back; about \
             {passes} do. Large answers of its tasks are lost"
        ),
        format!("the same MTU on all nodes and what is between them, or: sudo ip route change … mtu {passes} (ip route get {to})"),
    );
}

/// Asks tasks of this node, and other nodes, for a connection.
pub async fn probe(findings: &mut Findings, one: &Attached) {
    const CHECK: &str = "probe";
    let tables = &one.inventory.tables;
    for entry in tables.backends.values() {
        let local =
            lb_common::backend::Kind::try_from(entry.backend.kind).is_ok_and(|kind| via(kind) == "local");
        // What is translated is asked at its own address.
        if !local || entry.label.protocol != Protocol::Tcp || entry.label.own.is_some() {
            continue;
        }
        let at = SocketAddr::new(entry.label.address, entry.label.target);
        let service = tables.services.get(&entry.backend.service).map_or("", |label| &label.name);
        match connect(at).await {
            Ok(()) => findings.ok(CHECK, format!("task {} takes a connection at {at}", entry.label.task)),
            Err(error) => findings.error(
                CHECK,
                format!("task {} of service {service} takes no connection at {at}: {error}", entry.label.task),
                format!(
                    "does it listen on port {} on all addresses (not on 127.0.0.1 alone)? docker service logs {service}",
                    entry.label.target
                ),
            ),
        }
    }
    // A node is no client of its own tasks: what comes back from them through another node finds nobody. So it is asked as
    // often as there are tasks, and one answer will do; without a task elsewhere none can come.
    let nodes = one.inventory.nodes();
    let this = nodes.iter().find(|node| node.this).map(|node| node.id.clone()).unwrap_or_default();
    for port in tables.ports.values().filter(|port| port.protocol == Protocol::Tcp) {
        let service = tables.services.get(&port.service).map_or("", |label| &label.name);
        let its = tables.backends.values().filter(|entry| entry.backend.service == port.service);
        let tasks: BTreeSet<(&str, bool)> =
            its.map(|entry| (entry.label.task.as_str(), entry.label.node == this)).collect();
        if tasks.iter().all(|(_, here)| *here) {
            continue;
        }
        for node in nodes.iter().filter(|node| !node.this && node.agent == Agent::Yes) {
            // Clients may not be served where the nodes reach each other.
            let places: Vec<_> =
                node.addresses.iter().map(|address| SocketAddr::new(*address, port.published)).collect();
            match ask_service(&places, tasks.len().min(TRIES)).await {
                None => {}
                Some(Ok(at)) => {
                    findings.ok(CHECK, format!("service {service} answers by node {} at {at}", node.name))
                }
                Some(Err((at, error))) => findings.error(
                    CHECK,
                    format!("service {service} does not answer by node {} at {at}: {error}", node.name),
                    format!("on {}: lb-userspace service ps {service}", node.name),
                ),
            }
        }
    }
}

/// The first of these places that answers in so many tries; else why the first one does not.
async fn ask_service(
    places: &[SocketAddr],
    tries: usize,
) -> Option<Result<SocketAddr, (SocketAddr, String)>> {
    let mut refusal = None;
    for at in places {
        for _ in 0..tries {
            match connect(*at).await {
                Ok(()) => return Some(Ok(*at)),
                Err(error) => refusal = refusal.or(Some((*at, error))),
            }
        }
    }
    refusal.map(Err)
}

async fn connect(at: SocketAddr) -> Result<(), String> {
    match tokio::time::timeout(PATIENCE, TcpStream::connect(at)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}
