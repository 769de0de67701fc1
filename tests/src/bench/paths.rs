//! The ways that connections go in the bench of packets: what opens each, what is measured of it, and how each packet ends.

use std::net::IpAddr;

use lb_common::{
    outcome::Outcome,
    tunnel::{DEFAULT_PORT, OPTION_CLASS, RETURN_DIRECT, TO_CLIENT, TO_TASK, VERSION_KEYED},
};
use lb_userspace::{
    cluster::{Service, Via},
    tunnel_key::Cookies,
};

use super::feeder::{Clients, Kind};
use crate::{
    lab::{HOP_MAC, ip, service, task},
    packet::{ACK, NODE_MAC, Packet, SYN, SYN_ACK, Transport, Tunnelled},
};

/// Addresses of a family: of the listener, the peer's listener, and a task of each kind.
pub(super) struct Addresses {
    pub name: &'static str,
    pub client: &'static str,
    /// Those of the peer: a task serves a client's port through one listener only.
    pub peers_client: &'static str,
    pub listener: &'static str,
    pub peer: &'static str,
    pub near: &'static str,
    pub routed: &'static str,
    pub snat: &'static str,
}

/// The last two bytes of a client's address are its number's.
pub(super) const FAMILIES: [Addresses; 2] = [
    Addresses {
        name: "IPv4",
        client: "198.51.0.0",
        peers_client: "198.18.0.0",
        listener: "192.0.2.1",
        peer: "192.0.2.2",
        near: "172.18.0.11",
        routed: "10.9.0.1",
        snat: "10.9.0.2",
    },
    Addresses {
        name: "IPv6",
        client: "2001:db8:77::",
        peers_client: "2001:db8:78::",
        listener: "2001:db8::1",
        peer: "2001:db8::2",
        near: "fd18::11",
        routed: "fd09::1",
        snat: "fd09::2",
    },
];

/// By what packets between this node and its peer are known.
pub(super) const COOKIES: Cookies =
    Cookies { outgoing: 0x0123_4567_89ab_cdef, incoming: 0xfedc_ba98_7654_3210 };

/// Published ports.
pub(super) const ROUTED: u16 = 81;
pub(super) const SNAT: u16 = 82;
pub(super) const FAR: u16 = 83;
pub(super) const NEAR: u16 = 84;
/// A task's port is the published one and this.
pub(super) const TARGET: u16 = 8_000;
/// The first sequence number of a client and of a task.
pub(super) const FIRST: u32 = 1_000;
pub(super) const TASK_FIRST: u32 = 7_000;
/// Bytes of an Ethernet header.
const LINK: usize = 14;
/// Bytes of the tunnel's headers over IPv4.
const TUNNEL: usize = 60;
/// What a packet carries: a TCP frame over IPv4 has 72 bytes then.
const PAYLOAD: usize = 18;

pub(super) fn services() -> Vec<Service> {
    let [v4, v6] = &FAMILIES;
    vec![
        service(
            "far",
            &["83:8083", "83:8083/udp"],
            vec![task("far.1", false, Via::Peer, &["172.18.9.11", "fd18::9:11"])],
        ),
        service(
            "near",
            &["84:8084", "84:8084/udp"],
            vec![task("near.1", true, Via::Peer, &[v4.near, v6.near])],
        ),
        service(
            "routed",
            &["81:8081", "81:8081/udp"],
            vec![task("routed.1", false, Via::Routed, &[v4.routed, v6.routed])],
        ),
        service("snat", &["82:8082"], vec![task("snat.1", false, Via::Snat, &[v4.snat, v6.snat])]),
    ]
}

/// What of the feeding a program makes necessary, beyond writing the frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Undo {
    Nothing,
    Note,
    Growth,
    GrowthAndNote,
}

/// Frames that are alike but for their client.
pub(super) struct Frames {
    pub bytes: Vec<u8>,
    pub clients: Clients,
    pub kind: Kind,
    /// How each of them ends.
    pub outcome: Outcome,
    pub undo: Undo,
}

/// Where the client stands in a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Client {
    Source,
    Destination,
    /// It does not: its address is another.
    Absent,
}

impl Frames {
    /// Of a packet that lies `before` bytes behind its frame's link header; `frame` makes a frame of the packet. What
    /// opens a connection has no payload. Frames are padded to what the feeder asks for.
    pub fn new(
        packet: &Packet,
        before: usize,
        client: Client,
        kind: Kind,
        frame: impl Fn(&Packet) -> Vec<u8>,
    ) -> Self {
        let opens = matches!(packet.transport, SYN | SYN_ACK);
        let payload = vec![0; if opens { 0 } else { PAYLOAD }];
        let mut bytes = frame(&packet.clone().with(|p| p.payload = payload));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let network = LINK + before;
        let [source, destination, transport] = match packet.source {
            IpAddr::V4(_) => [12, 16, 20],
            IpAddr::V6(_) => [8, 24, 40],
        };
        let width = (transport - destination) as u32;
        let (address, port) = match client {
            Client::Source => (source, 0),
            Client::Destination => (destination, 2),
            // The payload's end.
            Client::Absent => (bytes.len() - network - width as usize, 2),
        };
        let clients = Clients {
            count: 1,
            first: 0,
            scattered: true,
            address_at: (network + address) as u32 + width - 2,
            port_at: (network + transport + port) as u32,
        };
        Self { bytes, clients, kind, outcome: Outcome::NotOurs, undo: Undo::Nothing }
    }

    /// With so many clients, and what is expected of them.
    pub fn expect(mut self, count: u32, outcome: Outcome, undo: Undo) -> Self {
        (self.clients.count, self.outcome, self.undo) = (count, outcome, undo);
        self
    }
}

/// One way a connection may go.
pub(super) struct FlowPath {
    pub name: &'static str,
    /// What establishes it.
    pub opening: Vec<Frames>,
    /// What is measured of it then, and how much it may cost over IPv4.
    pub measured: Vec<(&'static str, Frames, Option<f64>)>,
}

/// A packet that a task sent.
fn taken(transport: Transport, from: (IpAddr, u16), to: (IpAddr, u16)) -> Packet {
    let packet = Packet::new(transport, from, to).with(|p| p.macs = (HOP_MAC, NODE_MAC));
    match transport {
        SYN_ACK => packet.at(TASK_FIRST, FIRST + 1),
        _ => packet.at(TASK_FIRST + 1, FIRST + 1),
    }
}

/// The frame of a packet that comes from the peer.
fn arrived(kind: u8, flags: u8) -> impl Fn(&Packet) -> Vec<u8> {
    // Nodes name a task by one address, whatever the packet's family.
    let near = ip(FAMILIES[0].near);
    move |packet| {
        let tunnelled = Tunnelled {
            macs: (HOP_MAC, NODE_MAC),
            nodes: (ip("192.0.2.2"), ip("192.0.2.1")),
            ports: (51_000, DEFAULT_PORT),
            network: 0,
            class: OPTION_CLASS.get(),
            kind,
            version_and_flags: [VERSION_KEYED, flags],
            task: (near, NEAR + TARGET),
            cookie: Some(COOKIES.incoming),
            inner: packet.bytes()[LINK..].to_vec(),
        };
        tunnelled.bytes()
    }
}

/// The ways of a family's connections.
pub(super) fn paths(family: &Addresses, count: u32) -> Vec<FlowPath> {
    let client = (ip(family.client), 1);
    let listener = ip(family.listener);
    let plain = |packet: &Packet, client, kind| Frames::new(packet, 0, client, kind, Packet::bytes);
    let request = |transport, to: u16| {
        let packet = Packet::new(transport, client, (listener, to));
        let packet = match transport {
            SYN => packet.at(FIRST, 0),
            _ => packet.at(FIRST + 1, TASK_FIRST + 1),
        };
        plain(&packet, Client::Source, Kind::Xdp)
    };
    let by_peer = |transport| {
        let packet = Packet::new(transport, (ip(family.peers_client), 1), (ip(family.peer), NEAR));
        let packet = match transport {
            SYN => packet.at(FIRST, 0),
            _ => packet.at(FIRST + 1, TASK_FIRST + 1),
        };
        Frames::new(&packet, TUNNEL, Client::Source, Kind::Xdp, arrived(TO_TASK, RETURN_DIRECT))
    };
    // Straight to the client: one buffer cannot be put into the tunnel twice.
    let by_peers_client = |transport| {
        let packet = taken(transport, (ip(family.near), NEAR + TARGET), (ip(family.peers_client), 1));
        plain(&packet, Client::Destination, Kind::Tc)
    };
    let for_client = |transport| {
        let packet = taken(transport, (listener, FAR), client);
        Frames::new(&packet, TUNNEL, Client::Destination, Kind::Xdp, arrived(TO_CLIENT, 0))
    };
    let answer = |transport, from: (&str, u16), kind| {
        plain(&taken(transport, (ip(from.0), from.1 + TARGET), client), Client::Destination, kind)
    };
    let udp = Transport::Udp;
    // By the room in the established table a figure asks for.
    let bound = |few: f64, many: f64| match count {
        1 | 4_096 => Some(few),
        65_536 => Some(many),
        _ => None,
    };
    let (local, peer) = (Undo::Note, Undo::Growth);
    let none = Undo::Nothing;
    let mut paths = vec![
        FlowPath {
            name: "routed",
            opening: vec![
                request(SYN, ROUTED).expect(count, Outcome::Routed, none),
                answer(SYN_ACK, (family.routed, ROUTED), Kind::Xdp).expect(count, Outcome::Reply, none),
                request(ACK, ROUTED).expect(count, Outcome::Routed, none),
            ],
            measured: vec![
                (
                    "to a routed task",
                    request(ACK, ROUTED).expect(count, Outcome::Routed, none),
                    bound(60.0, 200.0),
                ),
                (
                    "a routed task's answer",
                    answer(ACK, (family.routed, ROUTED), Kind::Xdp).expect(count, Outcome::Reply, none),
                    None,
                ),
            ],
        },
        FlowPath {
            name: "routed UDP",
            opening: vec![
                request(udp, ROUTED).expect(count, Outcome::Routed, none),
                answer(udp, (family.routed, ROUTED), Kind::Xdp).expect(count, Outcome::Reply, none),
                request(udp, ROUTED).expect(count, Outcome::Routed, none),
            ],
            measured: vec![(
                "to a routed task, UDP",
                request(udp, ROUTED).expect(count, Outcome::Routed, none),
                bound(60.0, 200.0),
            )],
        },
        FlowPath {
            name: "peer",
            opening: vec![
                request(SYN, FAR).expect(count, Outcome::Peer, peer),
                for_client(SYN_ACK).expect(count, Outcome::Reply, peer),
                request(ACK, FAR).expect(count, Outcome::Peer, peer),
            ],
            measured: vec![
                (
                    "to a peer, encapsulated",
                    request(ACK, FAR).expect(count, Outcome::Peer, peer),
                    bound(85.0, 225.0),
                ),
                ("from a peer to the client", for_client(ACK).expect(count, Outcome::Reply, peer), None),
            ],
        },
        FlowPath {
            name: "local",
            opening: vec![
                request(SYN, NEAR).expect(count, Outcome::Local, local),
                answer(SYN_ACK, (family.near, NEAR), Kind::Tc).expect(count, Outcome::Reply, none),
                request(ACK, NEAR).expect(count, Outcome::Local, local),
            ],
            measured: vec![
                (
                    "to a task of this node, noted for TC",
                    request(ACK, NEAR).expect(count, Outcome::Local, local),
                    bound(60.0, 200.0),
                ),
                (
                    "its answer, in TC",
                    answer(ACK, (family.near, NEAR), Kind::Tc).expect(count, Outcome::Reply, none),
                    Some(90.0),
                ),
            ],
        },
        FlowPath {
            name: "by peer",
            opening: vec![
                by_peer(SYN).expect(count, Outcome::Local, Undo::GrowthAndNote),
                by_peers_client(SYN_ACK).expect(count, Outcome::Reply, none),
                by_peer(ACK).expect(count, Outcome::Local, Undo::GrowthAndNote),
            ],
            measured: vec![(
                "from a peer to a task, noted for TC",
                by_peer(ACK).expect(count, Outcome::Local, Undo::GrowthAndNote),
                None,
            )],
        },
    ];
    // One port of this node's for each connection to one task.
    if count <= 4_096 {
        let reply = |transport| {
            let packet = taken(transport, (ip(family.snat), SNAT + TARGET), (listener, 1));
            let frames = plain(&packet, Client::Destination, Kind::Xdp);
            // The ports of this node are the clients', which are all of one address.
            let absent = plain(&packet, Client::Absent, Kind::Xdp);
            Frames { clients: Clients { port_at: frames.clients.port_at, ..absent.clients }, ..frames }
        };
        paths.push(FlowPath {
            name: "snat",
            opening: vec![
                request(SYN, SNAT).expect(count, Outcome::Snat, none),
                reply(SYN_ACK).expect(count, Outcome::Reply, none),
                request(ACK, SNAT).expect(count, Outcome::Snat, none),
            ],
            measured: vec![
                (
                    "to a task by snat",
                    request(ACK, SNAT).expect(count, Outcome::Snat, none),
                    bound(60.0, 200.0),
                ),
                ("a task's answer to snat", reply(ACK).expect(count, Outcome::Reply, none), None),
            ],
        });
    }
    paths
}
