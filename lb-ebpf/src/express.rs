//! The common case in one go: a packet that changes nothing but when its flow was seen and how far it has come, and one
//! that is none of ours.
//!
//! The stages are functions of their own, for the verifier's sake, and each call costs some eight nanoseconds where the kernel
//! guards returns against speculation: as much as reading all headers. Nearly every packet asks for none of what they can
//! do. So [`read`] looks for it first, and [`forward`] sends it on, made of the stages' own pieces and without a call but those
//! of the helpers. What is unusual in any way is left to the stages as it came: nothing here may end otherwise than there,
//! which a test holds by running both ([`STAGES_ONLY`]).

use lb_common::{
    abi::{Config, PARTIAL_CHECKSUMS, STAGES_ONLY, XDP_GENERIC, XDP_TRANSMITS},
    backend::{Backend, Kind, VIA_TC},
    filter::Side,
    flow::{ACK, ANSWERED, Flow, REPLY, REQUEST, Segment, Tags, VlanTag},
    net::UDP,
    outcome::Outcome,
    tunnel::TO_TASK,
};

use crate::{
    classify::may_be_ours,
    count,
    family::Family,
    forward as send,
    frame::{Frame, XdpFrame},
    maps::{self, BACKENDS},
    neighbour::{self, is_due, jiffies},
    packet::{Link, Packet, Scratch, WHOLE},
    parse::{Ethernet, GROUP, IPV4, IPV6, LINK, transport},
    rewrite::{self, Place, Target},
    tunnel::{self, Cargo},
};

/// What [`read`] answers for a plain packet, which it has read as the parser would.
pub const PLAIN4: u32 = 0;
/// The same of IPv6.
pub const PLAIN6: u32 = 1;
/// What it answers for one that nobody here waits for.
pub const NOT_OURS: u32 = 2;
/// And for what is unusual: it has read nothing.
pub const OTHER: u32 = 3;

/// What [`forward`] answers where it has done nothing.
pub const UNUSUAL: i32 = -1;
/// The same, and there is no established flow.
pub const UNKNOWN: i32 = -2;

/// Reads a frame without tags that holds a TCP or UDP packet without options, extension headers or fragments, and asks the
/// filter whether it may be ours.
#[inline(always)]
pub fn read(frame: &XdpFrame, config: &Config, scratch: &mut Scratch) -> u32 {
    if config.flags & (STAGES_ONLY | XDP_GENERIC) != 0 {
        return OTHER;
    }
    let Some(ethernet) = frame.at::<Ethernet>(0) else {
        return OTHER;
    };
    // SAFETY: `at` checked the bounds.
    let (destination, kind) = unsafe { ((*ethernet).destination[0], (*ethernet).kind) };
    if destination & GROUP != 0 {
        return OTHER;
    }
    match kind {
        IPV4 => read_packet(frame, config, &mut scratch.v4, PLAIN4),
        IPV6 => read_packet(frame, config, &mut scratch.v6, PLAIN6),
        _ => OTHER,
    }
}

#[inline(always)]
fn read_packet<A: Family>(frame: &XdpFrame, config: &Config, packet: &mut Packet<A>, plain: u32) -> u32 {
    let at = LINK + A::HEADER as usize;
    if !A::plain(frame, packet)
        || LINK + packet.bytes as usize > frame.data_end() - frame.data()
        || !transport::plain(frame, at, packet)
    {
        return OTHER;
    }
    let key = &packet.key;
    if key.protocol == UDP && key.destination_port == config.tunnel_port {
        return OTHER;
    }
    if !may_be_ours(Side::Destination, key.protocol, key.destination_port)
        && !may_be_ours(Side::Source, key.protocol, key.source_port)
    {
        return NOT_OURS;
    }
    packet.form = WHOLE;
    let link = Link { network: LINK, tags: Tags { outer: VlanTag::NONE, inner: VlanTag::NONE } };
    transport::place(&link, at, packet);
    plain
}

/// Sends on a plain packet of an established flow that changes no state: the action, [`UNUSUAL`] or [`UNKNOWN`].
#[inline(never)]
pub fn forward<A: Family>(frame: &XdpFrame, packet: &mut Packet<A>) -> i32 {
    let Some(config) = maps::config() else {
        return UNUSUAL;
    };
    let Some(known) = A::flow(&packet.key) else {
        return UNKNOWN;
    };
    if packet.is_tcp() && !packet.acknowledges() || packet.hops <= 1 {
        return UNUSUAL;
    }
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let flow = unsafe { &mut *known };
    let Some(backend) = BACKENDS.get(flow.backend) else {
        return UNUSUAL;
    };
    if !goes_on(flow, backend) {
        return UNUSUAL;
    }
    if flow.role == REQUEST && backend.kind == Kind::Local as u8 {
        see(flow, packet);
        return send::hand_over(frame, config, flow.backend, packet.bytes as u64) as i32;
    }
    if !can_send(frame, config, packet, backend) {
        return UNUSUAL;
    }
    if flow.role == REQUEST && backend.kind == Kind::Peer as u8 {
        to_peer(frame, config, packet, flow, backend)
    } else {
        rewritten(frame, config, packet, flow, backend)
    }
}

/// Whether the flow's task is there, and the flow in the midst of its life.
#[inline(always)]
fn goes_on<A>(flow: &Flow<A>, backend: &Backend) -> bool {
    let now = jiffies() as u32;
    // A snat request looks after its entry for replies, an answer after the way to its client.
    let looks_after = flow.role == REPLY || backend.kind == Kind::Snat as u8;
    flow.role <= REPLY
        && flow.established()
        && !flow.closing()
        && (flow.role == REQUEST || flow.state & ANSWERED != 0 && !flow.tags.outer.is_some())
        && flow.generation == backend.generation
        && backend.forwards()
        && !is_due(flow.seen, now)
        && !(looks_after && is_due(flow.hop_seen, now))
}

/// Whether XDP may send the packet on by itself.
#[inline(always)]
fn can_send<A: Family>(frame: &XdpFrame, config: &Config, packet: &Packet<A>, backend: &Backend) -> bool {
    if config.flags & XDP_TRANSMITS == 0 || backend.flags & VIA_TC != 0 {
        return false;
    }
    config.flags & PARTIAL_CHECKSUMS == 0 || !send::unfinished(frame, &place(packet), packet)
}

#[inline(always)]
fn place<A: Family>(packet: &Packet<A>) -> Place {
    Place { network: LINK, transport: LINK + A::HEADER as usize, protocol: packet.key.protocol }
}

/// Notes the packet in its flow, whose state it does not change.
#[inline(always)]
fn see<A>(flow: &mut Flow<A>, packet: &Packet<A>) {
    let now = jiffies() as u32;
    if flow.seen != now {
        flow.seen = now;
    }
    if packet.is_tcp() {
        // What else it may have makes no difference.
        let segment = Segment { flags: ACK, ..packet.segment() };
        if flow.role == REQUEST {
            flow.client_sent(&segment, false);
        } else {
            flow.task_sent(&segment);
        }
    }
}

/// Sends the packet through the tunnel to its task's node.
#[inline(always)]
fn to_peer<A: Family>(
    frame: &XdpFrame,
    config: &Config,
    packet: &Packet<A>,
    flow: &mut Flow<A>,
    backend: &Backend,
) -> i32 {
    let number = backend.peer as u32;
    let Ok(peer) = tunnel::peer(number) else {
        return UNUSUAL;
    };
    let room = tunnel::room(number, peer);
    if packet.bytes as u32 > room {
        return UNUSUAL;
    }
    see(flow, packet);
    let headers = A::HEADER as u32 + packet.header_bytes as u32;
    let cargo = Cargo::new(&packet.key, packet.service, headers, backend, TO_TASK, packet.bytes, room);
    if !tunnel::put_into(frame, &cargo, peer) {
        return UNUSUAL;
    }
    count::request(flow.backend, 1, packet.bytes as u64);
    count::outcome(Outcome::Peer as u32, 1);
    send::transmit(frame, config, peer.ifindex) as i32
}

/// Sends the packet on as its flow says: to a task behind a next hop, or an answer to the client.
#[inline(always)]
fn rewritten<A: Family>(
    frame: &XdpFrame,
    config: &Config,
    packet: &Packet<A>,
    flow: &mut Flow<A>,
    backend: &Backend,
) -> i32 {
    see(flow, packet);
    let (index, bytes) = (flow.backend, packet.bytes as u64);
    let (hop, interface, outcome) = if flow.role == REPLY {
        count::reply(index, 1, bytes);
        (neighbour::hop(flow), config.uplink, Outcome::Reply)
    } else {
        count::request(index, 1, bytes);
        let outcome = if backend.kind == Kind::Snat as u8 { Outcome::Snat } else { Outcome::Routed };
        (send::backend_hop(backend), backend.ifindex, outcome)
    };
    if rewrite::plain(frame, &place(packet), &Target::of(&flow.rewrite), hop).is_none() {
        return UNUSUAL;
    }
    count::outcome(outcome as u32, 1);
    send::transmit(frame, config, interface) as i32
}
