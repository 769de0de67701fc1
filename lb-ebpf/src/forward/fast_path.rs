//! The fast path: a packet that changes nothing but when its connection was seen and how far it has come, and one that is none
//! of ours.
//!
//! The stages are functions of their own, for the verifier's sake, and each call costs some eight nanoseconds where the kernel
//! guards returns against speculation: as much as reading all headers. Nearly every packet asks for none of what they can
//! do. So [`read`] looks for it first, and [`forward`] sends it on, made of the stages' own pieces and without a call but those
//! of the helpers. Whether a connection is fast its line says ([`lb_common::conntrack::line::FAST`]). What is unusual in any way
//! is left to the stages as it came: nothing here may end otherwise than there, which a test holds by running both
//! ([`STAGES_ONLY`]).

use lb_common::{
    abi::{Config, PARTIAL_CHECKSUMS, STAGES_ONLY, XDP_GENERIC, XDP_TRANSMITS},
    backend::{Backend, Kind, VIA_TC},
    conntrack::{Control, Numbers, Segment, line::FAST, tcp::ACK},
    filter::Side,
    net::UDP,
    outcome::Outcome,
    tags::Tags,
    tunnel::TO_TASK,
};

use super::{
    Action,
    encap::{self, EncapParams},
    nat::{self, Target, backend_hop},
    xdp,
};
use crate::{
    conntrack::{
        may_be_ours,
        table::{self, Entry},
    },
    io::{
        clock, counters,
        family::Family,
        frame::{Frame, XdpFrame},
        maps::{self, BACKENDS},
        packet::{Link, Offsets, Packet, Scratch, WHOLE},
    },
    parse::{Simple, transport},
    wire::ethernet::{Ethernet, GROUP, IPV4, IPV6, LINK, Mac},
};

/// What [`read`] answers for a simple packet, which it has read as the parser would.
pub const SIMPLE4: u32 = 0;
/// The same of IPv6.
pub const SIMPLE6: u32 = 1;
/// What it answers for one that nobody here waits for.
pub const NOT_OURS: u32 = 2;
/// And for what is not simple: it has read nothing.
pub const NOT_SIMPLE: u32 = 3;

/// What [`forward`] answers where it has done nothing: the stages do it all.
pub const SLOW_PATH: u64 = u64::MAX;

/// Reads a frame without tags that holds a TCP or UDP packet without options, extension headers or fragments, and asks the
/// filter whether it may be ours.
#[inline(always)]
pub fn read(frame: &XdpFrame, config: &Config, scratch: &mut Scratch) -> u32 {
    if config.flags & (STAGES_ONLY | XDP_GENERIC) != 0 {
        return NOT_SIMPLE;
    }
    let Some(ethernet) = frame.read::<Ethernet>(0) else {
        return NOT_SIMPLE;
    };
    let (destination, source, kind) = (ethernet.destination[0], ethernet.source, ethernet.kind);
    if destination & GROUP != 0 {
        return NOT_SIMPLE;
    }
    match kind {
        IPV4 => read_packet(frame, config, &mut scratch.v4, source, SIMPLE4),
        IPV6 => read_packet(frame, config, &mut scratch.v6, source, SIMPLE6),
        _ => NOT_SIMPLE,
    }
}

#[inline(always)]
fn read_packet<A: Simple + Family>(
    frame: &XdpFrame,
    config: &Config,
    packet: &mut Packet<A>,
    source: Mac,
    simple: u32,
) -> u32 {
    let at = LINK + A::HEADER;
    if !A::simple(frame, packet)
        || LINK + packet.bytes as usize > frame.data_end() - frame.data()
        || !transport::simple(frame, at, packet)
    {
        return NOT_SIMPLE;
    }
    let key = &packet.key;
    if key.protocol == UDP && key.destination_port == config.tunnel_port {
        return NOT_SIMPLE;
    }
    if !may_be_ours(Side::Destination, key.protocol, key.destination_port)
        && !may_be_ours(Side::Source, key.protocol, key.source_port)
    {
        return NOT_OURS;
    }
    packet.kind = WHOLE;
    transport::place(&Link { network: LINK, tags: Tags::NONE, source }, at, packet);
    simple
}

/// Sends on a simple packet to the task of an established connection that it leaves as it is: the packed action, or
/// [`SLOW_PATH`].
#[inline(never)]
pub fn forward<A: Family>(frame: &mut XdpFrame, packet: &mut Packet<A>) -> u64 {
    match to_task(frame, packet) {
        Some(action) => super::pack(Ok(action)),
        None => SLOW_PATH,
    }
}

#[inline(always)]
fn to_task<A: Family>(frame: &mut XdpFrame, packet: &mut Packet<A>) -> Option<Action> {
    let config = maps::config()?;
    if packet.is_tcp() && !packet.acknowledges() || packet.ttl <= 1 {
        return None;
    }
    let Packet { key, line, .. } = packet;
    if !table::find_at_home(key, line) || !Control(line.control).has(FAST) {
        return None;
    }
    let entry = table::entry::<A>(packet.line.slot)?;
    let index = entry.backend();
    let backend = BACKENDS.get(index)?;
    let goes_on = entry.is_of(backend)
        && backend.forwards()
        && entry.peer() == 0
        && !clock::is_due(entry.seen(), clock::now());
    if !goes_on {
        return None;
    }
    if backend.kind == Kind::Local as u8 {
        see(&entry, packet);
        return Some(xdp::deliver(frame, config, index, entry.port(), packet.bytes as u64));
    }
    if !can_send(frame, config, packet, backend) {
        return None;
    }
    if backend.kind == Kind::Peer as u8 {
        to_peer(frame, config, packet, &entry, backend)
    } else {
        rewritten(frame, config, packet, &entry, backend)
    }
}

/// Whether XDP may send the packet on by itself.
#[inline(always)]
fn can_send<A: Family>(frame: &XdpFrame, config: &Config, packet: &Packet<A>, backend: &Backend) -> bool {
    if config.flags & XDP_TRANSMITS == 0 || backend.flags & VIA_TC != 0 {
        return false;
    }
    config.flags & PARTIAL_CHECKSUMS == 0 || !xdp::is_unfinished(frame, &offsets(packet), packet)
}

#[inline(always)]
fn offsets<A: Family>(packet: &Packet<A>) -> Offsets {
    Offsets { network: LINK, transport: LINK + A::HEADER, protocol: packet.key.protocol }
}

/// Notes the packet in its connection's line, whose state it does not change.
#[inline(always)]
fn see<A: Family>(entry: &Entry<A>, packet: &Packet<A>) {
    entry.set_seen(clock::now());
    if packet.is_tcp() {
        let before = entry.client_next();
        let mut numbers = Numbers { client_next: before, task_next: 0 };
        // What else it may have makes no difference.
        let _ = numbers.client_sent(0, &Segment { flags: ACK, ..packet.segment() }, false);
        // The task's acknowledgment may move it, on another CPU.
        if numbers.client_next != before {
            entry.set_client_next(numbers.client_next);
        }
    }
}

/// Sends the packet through the tunnel to its task's node.
#[inline(always)]
fn to_peer<A: Family>(
    frame: &mut XdpFrame,
    config: &Config,
    packet: &Packet<A>,
    entry: &Entry<A>,
    backend: &Backend,
) -> Option<Action> {
    let number = backend.peer as u32;
    let peer = encap::peer(number).ok()?;
    let inner_mtu = encap::inner_mtu(peer);
    if packet.bytes as u32 > inner_mtu {
        return None;
    }
    see(entry, packet);
    let headers = A::HEADER as u32 + packet.header_bytes as u32;
    let params =
        EncapParams::new(&packet.key, packet.tos, headers, backend, TO_TASK, packet.bytes, inner_mtu);
    if !encap::encapsulate_inline(frame, &params, peer) {
        return None;
    }
    counters::request(entry.backend(), 1, packet.bytes as u64);
    counters::outcome(Outcome::Peer as u32, 1);
    Some(xdp::transmit(frame, config, peer.ifindex))
}

/// Sends the packet on as its task is to see it, to a next hop.
#[inline(always)]
fn rewritten<A: Family>(
    frame: &mut XdpFrame,
    config: &Config,
    packet: &Packet<A>,
    entry: &Entry<A>,
    backend: &Backend,
) -> Option<Action> {
    see(entry, packet);
    let outcome = if backend.kind == Kind::Snat as u8 { Outcome::Snat } else { Outcome::Routed };
    let target = Target::task(packet, backend, entry.port());
    nat::simple(frame, &offsets(packet), &target, backend_hop(backend))?;
    counters::request(entry.backend(), 1, packet.bytes as u64);
    counters::outcome(outcome as u32, 1);
    Some(xdp::transmit(frame, config, backend.ifindex))
}
