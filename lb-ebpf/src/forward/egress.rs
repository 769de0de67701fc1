//! What the host itself sends by the uplink: nearly always nobody's business here.

use core::mem::offset_of;

use lb_common::{
    endpoint::Endpoint,
    filter::Side,
    net::{Be16, UDP},
    outcome::Outcome,
    tunnel::{Header, OPTION_CLASS, TO_CLIENT, TO_TASK},
};

use crate::{
    conntrack::{self, host_flow},
    io::{
        family::Family,
        frame::Skb,
        maps,
        packet::{FIRST, Packet, WHOLE},
    },
};

/// Looks at a datagram that the host sends. One that speaks as this node to a peer's datapath has an outcome; what leaves from
/// a published port is noted.
#[inline(always)]
pub fn look<A: Family>(frame: &Skb, packet: &Packet<A>) -> Result<(), Outcome> {
    if packet.key.protocol != UDP || packet.kind > FIRST {
        return Ok(());
    }
    if speaks_as_a_node(frame, packet) {
        return Err(Outcome::TunnelImpostor);
    }
    if leaves_a_listener(packet) {
        host_flow::note(&packet.key);
    }
    Ok(())
}

/// Whether a peer would take the datagram, or one of those that the kernel will cut it into, for this node's. A probe it may be:
/// whoever sends one hears that somebody is there. Containers and local users need no capability to send it, and the host gives
/// them its address. Peers take none with a VLAN tag.
#[inline(always)]
fn speaks_as_a_node<A: Family>(frame: &Skb, packet: &Packet<A>) -> bool {
    let port = maps::config().map(|config| config.tunnel_port);
    if packet.kind != WHOLE || packet.tagged() || port != Some(packet.key.destination_port) {
        return false;
    }
    let payload = packet.transport() as u32 + UDP_BYTES;
    let (mut segment, length) = (0, frame.segment_bytes());
    while segment < SEGMENTS {
        match frame.load::<Geneve>(payload + segment * length) {
            Some(geneve) if geneve.is_a_node_s() => return maps::is_own(&packet.key.source),
            Some(_) if length > 0 => segment += 1,
            // That was the last one.
            _ => return false,
        }
    }
    false
}

/// Bytes of a UDP header (RFC 768).
const UDP_BYTES: u32 = 8;
/// The most datagrams that a socket has the kernel cut one into (`UDP_MAX_SEGMENTS`).
const SEGMENTS: u32 = 128;

/// Of [`Header`] what follows UDP's, to the kind of the option.
#[repr(C)]
#[derive(Clone, Copy)]
struct Geneve {
    version_and_length: u8,
    flags: u8,
    protocol: u16,
    network: u32,
    class: Be16,
    kind: u8,
    words: u8,
}

const _: () = assert!(
    offset_of!(Geneve, kind) + UDP_BYTES as usize == offset_of!(Header, kind)
        && offset_of!(Geneve, class) + UDP_BYTES as usize == offset_of!(Header, class)
);

impl Geneve {
    #[inline(always)]
    fn is_a_node_s(self) -> bool {
        self.class == OPTION_CLASS && (self.kind == TO_TASK || self.kind == TO_CLIENT)
    }
}

/// Whether the datagram has the source that replies of a service have.
#[inline(always)]
fn leaves_a_listener<A: Family>(packet: &Packet<A>) -> bool {
    conntrack::may_be_ours(Side::Destination, UDP, packet.key.source_port)
        && A::listener(&Endpoint::new(packet.key.source, packet.key.source_port, UDP)).is_some()
}
