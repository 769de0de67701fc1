//! Where XDP sends a packet of ours: on by itself, or to TC with metadata.

use aya_ebpf::helpers::generated::bpf_redirect;
use lb_common::{
    abi::{
        Config, META_TC_DECIDES, META_TC_SENDS_REPLY, PARTIAL_CHECKSUMS, XDP_GENERIC, XDP_REDIRECTS,
        XDP_TRANSMITS, XdpMetadata,
    },
    backend::{Kind, VIA_TC},
    checksum::pseudo_header,
    net::Be16,
    outcome::Outcome,
    tunnel::{RETURN_DIRECT, TO_TASK},
};

use super::{
    Action,
    encap::{self, EncapParams},
    fragmentation,
    headers::Back,
    mss,
    nat::{self, Target, backend_hop},
    next_hop, outcome, rst, tally, too_big_for_client,
};
use crate::{
    conntrack::{self, Classified, Direction, tracked::Tracked},
    io::{
        counters,
        family::Family,
        frame::{Frame, XdpFrame},
        maps::{self, BACKENDS},
        packet::{Offsets, Packet, TunnelMeta, WHOLE},
    },
};

/// Local tasks are left to TC with metadata, everything else is rewritten and sent at once.
#[inline(always)]
pub fn send<A: Back>(
    frame: &mut XdpFrame,
    packet: &Packet<A>,
    found: &Classified,
) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    let backend = found.backend;
    let to_task = found.direction == Direction::Task;
    let connection = &packet.connection;
    if to_task && backend.kind == Kind::Local as u8 {
        return Ok(deliver(frame, config, connection.backend, connection.port, packet.bytes as u64));
    }
    let config_allows = config.flags & XDP_TRANSMITS != 0;
    let way_allows = if to_task {
        backend.flags & VIA_TC == 0 && !packet.tagged()
    } else {
        let tagged = packet.tagged() || connection.tags.outer.is_some();
        // A hop that is due is left to TC, which asks the routing table and has the kernel resolve and confirm
        // the neighbour.
        !tagged && next_hop::is_fresh(connection)
    };
    // TC knows tags and unfinished checksums; XDP sees only bytes.
    if !config_allows || !way_allows || config.flags & PARTIAL_CHECKSUMS != 0 && leaves_sum(frame, packet) {
        set_metadata(frame, config, META_TC_DECIDES, Be16::from_raw(0));
        return Ok(Action::PASS);
    }
    if to_task && backend.kind == Kind::Peer as u8 {
        return to_peer(frame, packet, found, config);
    }
    let outcome = outcome(found)?;
    let target = Target::of(packet, backend, found.direction);
    let (hop, interface) = if to_task {
        (backend_hop(backend), backend.ifindex)
    } else {
        (next_hop::hop(config, connection), config.uplink)
    };
    nat::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    tally(packet, found, 1, packet.bytes as u64);
    counters::outcome(outcome as u32, 1);
    Ok(transmit(frame, config, interface))
}

/// Leaves a packet for a task of this node to TC. Without metadata TC looks the connection up, and counts.
#[inline(always)]
pub fn deliver(frame: &mut XdpFrame, config: &Config, backend: u32, port: Be16, bytes: u64) -> Action {
    if set_metadata(frame, config, backend, port) {
        counters::request(backend, 1, bytes);
        counters::outcome(Outcome::Local as u32, 1);
    }
    Action::PASS
}

/// Puts a request into the tunnel to its task's node, or turns it into the answer that it is too big.
#[inline(always)]
fn to_peer<A: Back>(
    frame: &mut XdpFrame,
    packet: &Packet<A>,
    found: &Classified,
    config: &Config,
) -> Result<Action, Outcome> {
    let backend = found.backend;
    let number = backend.peer as u32;
    let peer = encap::peer(number)?;
    let inner_mtu = encap::inner_mtu(peer);
    if packet.bytes as u32 > inner_mtu {
        // TC alone can make several packets of one.
        if fragmentation::can_be_cut(frame, packet, inner_mtu) {
            return Ok(leave_to_tc(frame));
        }
        too_big_for_client(frame, packet, inner_mtu)?;
        let interface = frame.ifindex();
        return Ok(transmit(frame, config, interface));
    }
    if packet.negotiates() {
        mss::clamp(frame, packet, inner_mtu, true).ok_or(Outcome::Malformed)?;
    }
    let params = EncapParams::new(
        &packet.key,
        packet.tos,
        packet.headers(),
        backend,
        TO_TASK,
        packet.bytes,
        inner_mtu,
    );
    if !encap::encapsulate(frame, &params, peer) {
        return Err(Outcome::BackendUnreachable);
    }
    tally(packet, found, 1, packet.bytes as u64);
    counters::outcome(Outcome::Peer as u32, 1);
    Ok(transmit(frame, config, peer.ifindex))
}

/// Answers a packet whose task is gone by a reset in its place; a tagged one is left to TC.
#[inline(always)]
pub fn reset<A: Back>(frame: &mut XdpFrame, packet: &Packet<A>) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::BackendGone)?;
    if config.flags & XDP_TRANSMITS == 0 || packet.tagged() {
        set_metadata(frame, config, META_TC_DECIDES, Be16::from_raw(0));
        return Ok(Action::PASS);
    }
    rst::answer(frame, packet).ok_or(Outcome::BackendGone)?;
    counters::outcome(Outcome::Reset as u32, 1);
    let interface = frame.ifindex();
    Ok(transmit(frame, config, interface))
}

/// Sends a frame out of an interface.
#[inline(always)]
pub fn transmit(frame: &XdpFrame, config: &Config, interface: u32) -> Action {
    if interface == frame.ifindex() && config.flags & XDP_REDIRECTS == 0 {
        return Action::BACK;
    }
    // SAFETY: the helper has no preconditions.
    Action::sent(unsafe { bpf_redirect(interface, 0) } as u32)
}

/// What a peer sent to a task of this node: left to TC with metadata.
#[inline(always)]
pub fn arrived<A: Tracked>(
    frame: &mut XdpFrame,
    packet: &Packet<A>,
    tunnel: &TunnelMeta,
    index: u32,
) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::DeliveryLost)?;
    let finished = !(config.flags & PARTIAL_CHECKSUMS != 0 && leaves_sum(frame, packet));
    clamp_arrived(frame, packet, tunnel, finished)?;
    if !set_metadata(frame, config, index, packet.connection.port) {
        return Err(Outcome::DeliveryLost);
    }
    counters::request(index, 1, packet.bytes as u64);
    counters::outcome(Outcome::Local as u32, 1);
    Ok(Action::PASS)
}

/// A probe: sent back.
#[inline(never)]
pub fn answer_probe(frame: &mut XdpFrame, tunnel: &TunnelMeta) -> u64 {
    super::pack(Ok(match maps::config() {
        Some(config) if config.flags & XDP_TRANSMITS != 0 => {
            if encap::answer_probe(frame, tunnel, config.uplink).is_none() {
                Action::PASS
            } else {
                counters::outcome(Outcome::TunnelProbe as u32, 1);
                let interface = frame.ifindex();
                transmit(frame, config, interface)
            }
        }
        _ => leave_to_tc(frame),
    }))
}

/// Lowers what a SYN says of the segments the task may send, if those come back through the tunnel.
#[inline(always)]
pub fn clamp_arrived<F: Frame, A: Family>(
    frame: &mut F,
    packet: &Packet<A>,
    tunnel: &TunnelMeta,
    finished: bool,
) -> Result<(), Outcome> {
    if !packet.negotiates() || tunnel.flags & RETURN_DIRECT != 0 {
        return Ok(());
    }
    // A peer that cannot be reached for a moment: the reply will tell.
    let Ok(peer) = encap::peer(tunnel.peer) else {
        return Ok(());
    };
    let inner_mtu = encap::inner_mtu(peer);
    mss::clamp(frame, packet, inner_mtu, finished).ok_or(Outcome::TunnelMalformed)
}

/// A reply that a peer sent for the client: emitted by its connection's hop, or left to TC, which asks the routing table.
#[inline(always)]
pub fn emit<A: Tracked>(
    frame: &mut XdpFrame,
    packet: &mut Packet<A>,
    tunnel: &TunnelMeta,
) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::DeliveryLost)?;
    let known = conntrack::for_client(packet, tunnel)?;
    let fits = config.flags & XDP_TRANSMITS != 0
        && !(config.flags & PARTIAL_CHECKSUMS != 0 && leaves_sum(frame, packet));
    let connection = &packet.connection;
    if !known || !fits || connection.tags.outer.is_some() || !next_hop::is_fresh(connection) {
        return if set_metadata(frame, config, META_TC_SENDS_REPLY, Be16::from_raw(0)) {
            Ok(Action::PASS)
        } else {
            Err(Outcome::DeliveryLost)
        };
    }
    clamp_emitted(frame, packet, tunnel.peer)?;
    nat::link(frame, next_hop::hop(config, &packet.connection)).ok_or(Outcome::TunnelMalformed)?;
    counters::reply(packet.connection.backend, 1, packet.bytes as u64);
    counters::outcome(Outcome::Reply as u32, 1);
    Ok(transmit(frame, config, config.uplink))
}

/// Lowers what a SYN-ACK says of the segments that the client may send through the tunnel to a peer.
#[inline(always)]
pub fn clamp_emitted<F: Frame, A: Family>(
    frame: &mut F,
    packet: &Packet<A>,
    number: u32,
) -> Result<(), Outcome> {
    if !packet.negotiates() {
        return Ok(());
    }
    let Ok(peer) = encap::peer(number) else {
        return Ok(());
    };
    mss::clamp(frame, packet, encap::inner_mtu(peer), true).ok_or(Outcome::TunnelMalformed)
}

/// The number of the peer behind which a connection's task is; zero of none.
#[inline(always)]
pub fn peer_of(backend: u32) -> u32 {
    BACKENDS.get(backend).map_or(0, |backend| backend.peer as u32)
}

/// Whether a local stack left the transport checksum to the device. A fragmented packet's sum covers more than this frame,
/// and an error has a sum of another kind; both are finished by whoever makes them.
#[inline(always)]
fn leaves_sum<A: Family>(frame: &XdpFrame, packet: &Packet<A>) -> bool {
    packet.kind == WHOLE && is_unfinished(frame, &Offsets::of(packet), packet)
}

/// Whether the field for the transport checksum holds the pseudo header's sum. One finished sum in 65,536 looks the same;
/// TC is right about those too.
#[inline(always)]
pub fn is_unfinished<A: Family>(frame: &XdpFrame, offsets: &Offsets, packet: &Packet<A>) -> bool {
    let Some(field) = frame.read::<u16>(offsets.checksum()) else {
        return false;
    };
    let key = &packet.key;
    *field == pseudo_header(key.source, key.destination, key.protocol, packet.transport_bytes)
}

/// Leaves a frame, as it came, to TC.
#[inline(always)]
pub fn leave_to_tc(frame: &mut XdpFrame) -> Action {
    tell_tc_to_decide(frame);
    Action::PASS
}

/// Tells TC that a frame is left to it; false if it cannot be told.
#[inline(always)]
pub fn tell_tc_to_decide(frame: &mut XdpFrame) -> bool {
    maps::config().is_some_and(|config| set_metadata(frame, config, META_TC_DECIDES, Be16::from_raw(0)))
}

/// Leaves metadata for TC on the frame. False where there can be none: generic XDP's do not reach TC, and some
/// drivers have no room, which TC is told once.
#[inline(always)]
fn set_metadata(frame: &mut XdpFrame, config: &Config, backend: u32, port: Be16) -> bool {
    if config.flags & XDP_GENERIC != 0 {
        return false;
    }
    let set = frame.set_metadata(XdpMetadata { nonce: config.nonce, backend, port, _pad: 0 });
    if !set {
        let refused = &raw const config.metadata_refused;
        // SAFETY: the table's entry is valid while the program runs; every writer writes the same.
        unsafe { refused.cast_mut().write_volatile(1) };
    }
    set
}
