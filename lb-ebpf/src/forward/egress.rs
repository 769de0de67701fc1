//! What the host itself sends by the uplink: nearly always nobody's business here.

use lb_common::{
    filter::Side,
    net::UDP,
    outcome::Outcome,
    tunnel::{Header, OPTION_CLASS, TO_CLIENT, TO_TASK},
};

use crate::{
    conntrack::{self, host_flow},
    io::{
        family::Family,
        frame::{Frame, Skb},
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

/// Whether a peer would take the datagram for this node's. A probe it may be: whoever sends one hears that somebody is there.
/// Containers and local users need no capability to send it, and the host gives them its address.
#[inline(always)]
fn speaks_as_a_node<A: Family>(frame: &Skb, packet: &Packet<A>) -> bool {
    let port = maps::config().map(|config| config.tunnel_port);
    if packet.kind != WHOLE || port != Some(packet.key.destination_port) {
        return false;
    }
    let Some(header) = frame.read::<Header>(packet.transport()) else {
        return false;
    };
    header.class == OPTION_CLASS
        && (header.kind == TO_TASK || header.kind == TO_CLIENT)
        && maps::is_own(&packet.key.source)
}

/// Whether the datagram has the source that replies of a service have.
#[inline(always)]
fn leaves_a_listener<A: Family>(packet: &Packet<A>) -> bool {
    conntrack::may_be_ours(Side::Destination, UDP, packet.key.source_port)
        && A::listener(&lb_common::endpoint::Endpoint::new(packet.key.source, packet.key.source_port, UDP))
            .is_some()
}
