//! The packet path of the balancer: what runs on the uplink (XDP, then TC) and where tasks' replies arrive (TC).
//!
//! This file holds the entry points, and only here is a verdict said to the kernel: every stage below returns a typed
//! [`Action`], or the [`Outcome`] that says why a packet is passed on as it came.
//!
//! ```text
//! wire ◄─ io ◄─ parse ◄─ conntrack ◄─ forward ◄─ main          imports
//! parse ─► filter ─► connection, or listener ─► task ─► new connection ─► NAT or tunnel ─► next hop
//! ```
// On the host, where this is only checked and never run, std stands in.
#![cfg_attr(target_arch = "bpf", no_std)]
#![no_main]
#![expect(
    missing_docs,
    reason = "the macros of the entry points wrap them in functions without documentation, and wire formats have the names \
              of their RFCs"
)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "atomics that the standard library has not")
)]

mod conntrack;
mod forward;
mod io;
mod parse;
mod translate;
mod wire;

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    },
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use lb_common::{
    abi::{Config, META_TC_DECIDES, META_TC_SENDS_REPLY, Removal, TC_ALONE, XDP_GENERIC, XDP_IS_NEW, remove},
    filter::Side,
    net::{Be16, UDP, V4, V6},
    outcome::Outcome,
    tunnel::{PROBE, SELF, TO_TASK},
};

use crate::{
    conntrack::{Scope, Step, table, tracked::Tracked},
    forward::{Action, early, egress, encap, fast_path, headers::Back, pack, unpack},
    io::{
        clock as time, counters,
        family::Family,
        frame::{Frame, Skb, XdpFrame},
        maps,
        packet::{LATER, Packet, Scratch, TunnelMeta},
        verifier,
    },
    parse::{IS_IPV4, IS_IPV6, IS_OUTCOME},
    translate::{MAY_BE_CUT, NOT_OURS, stand_in, to_v4, to_v6},
};

/// XDP on the uplink: decides for every packet, and sends on what leaves by an uplink again.
#[xdp(frags)]
pub fn uplink_xdp(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(0)) else {
        return XDP_PASS;
    };
    if config.flags & TC_ALONE != 0 {
        return XDP_PASS;
    }
    if maps::is_stale(config) {
        counters::outcome(Outcome::Stale as u32, 1);
        return XDP_PASS;
    }
    let done = match fast_path::read(&frame, config, scratch) {
        fast_path::NOT_OURS => pack(Err(Outcome::NotOurs)),
        fast_path::SIMPLE4 => simple_in_xdp(&mut frame, &mut scratch.v4),
        fast_path::SIMPLE6 => simple_in_xdp(&mut frame, &mut scratch.v6),
        _ => staged_in_xdp(&mut frame, scratch),
    };
    match unpack(done) {
        Ok(Action::DROP) => XDP_DROP,
        Ok(Action::BACK) => XDP_TX,
        Ok(action) => action.answer().unwrap_or(XDP_PASS),
        Err(outcome) => {
            counters::outcome(outcome, 1);
            if is_dropped(outcome) { XDP_DROP } else { XDP_PASS }
        }
    }
}

const FRAGMENT: u32 = Outcome::Fragment as u32;

/// What [`fast_path::read`] has read.
#[inline(always)]
fn simple_in_xdp<A: Back>(frame: &mut XdpFrame, packet: &mut Packet<A>) -> u64 {
    match fast_path::forward(frame, packet) {
        fast_path::SLOW_PATH => in_xdp(frame, packet),
        done => done,
    }
}

/// What it has not.
#[inline(always)]
fn staged_in_xdp(frame: &mut XdpFrame, scratch: &mut Scratch) -> u64 {
    let parsed = parse::frame(frame, scratch);
    match tunnelled(frame, parsed, scratch) {
        NOT_TUNNELLED => match parsed {
            IS_IPV4 => in_xdp(frame, &mut scratch.v4),
            IS_IPV6 => in_xdp(frame, &mut scratch.v6),
            other => refused(other - IS_OUTCOME),
        },
        ARRIVED if !decapsulates() => pack(Ok(forward::xdp::leave_to_tc(frame))),
        ARRIVED if scratch.tunnel.kind == PROBE => forward::xdp::answer_probe(frame, &scratch.tunnel),
        ARRIVED => ended(match out_of_tunnel(frame, scratch) {
            IS_IPV4 => arrived_in_xdp(frame, &mut scratch.v4, &mut scratch.tunnel),
            IS_IPV6 => arrived_in_xdp(frame, &mut scratch.v6, &mut scratch.tunnel),
            _ => pack(Err(Outcome::TunnelMalformed)),
        }),
        other => refused(other - REFUSED),
    }
}

/// Packs a discriminant of an outcome.
#[inline(always)]
fn refused(outcome: u32) -> u64 {
    pack(Err(verifier::outcome(outcome)))
}

/// What has left the tunnel ends here whatever is wrong with it: the host would make nothing of it.
#[inline(always)]
fn ended(done: u64) -> u64 {
    match unpack(done) {
        Ok(_) => done,
        Err(outcome) => {
            counters::outcome(outcome, 1);
            pack(Ok(Action::DROP))
        }
    }
}

/// Not the tunnel's business.
const NOT_TUNNELLED: u32 = 0;
/// A peer's packet, still in the tunnel.
const ARRIVED: u32 = 1;
/// This and the discriminant of the outcome for which it stays there.
const REFUSED: u32 = 2;

/// Whether a parsed frame came through the tunnel, or is an error about it.
#[inline(always)]
fn tunnelled<F: Frame>(frame: &F, parsed: u32, scratch: &mut Scratch) -> u32 {
    match parsed {
        IS_IPV4 if encap::is_for(&scratch.v4) => open_tunnel(frame, &scratch.v4, &mut scratch.tunnel),
        IS_IPV6 if encap::is_for(&scratch.v6) => open_tunnel(frame, &scratch.v6, &mut scratch.tunnel),
        IS_IPV4 if encap::is_error(&scratch.v4) => REFUSED + encap::error(&scratch.v4) as u32,
        IS_IPV6 if encap::is_error(&scratch.v6) => REFUSED + encap::error(&scratch.v6) as u32,
        _ => NOT_TUNNELLED,
    }
}

#[inline(never)]
fn open_tunnel<F: Frame, A: Family>(frame: &F, packet: &Packet<A>, tunnel: &mut TunnelMeta) -> u32 {
    match encap::open(frame, packet, tunnel) {
        Ok(()) => ARRIVED,
        // Another program's.
        Err(Outcome::NotOurs) => NOT_TUNNELLED,
        Err(outcome) => REFUSED + outcome as u32,
    }
}

/// Whether XDP takes packets out of the tunnel itself: only where it can tell TC about them.
#[inline(always)]
fn decapsulates() -> bool {
    maps::config().is_some_and(|config| config.flags & XDP_GENERIC == 0 && config.metadata_refused == 0)
}

/// Takes the packet out of the tunnel and parses it.
#[inline(always)]
fn out_of_tunnel<F: Frame>(frame: &mut F, scratch: &mut Scratch) -> u32 {
    match encap::decapsulate(frame, &scratch.tunnel) {
        Some(()) => parse::frame(frame, scratch),
        None => IS_OUTCOME,
    }
}

/// What a peer sent for a task of this node or for a client.
#[inline(always)]
fn arrived_in_xdp<A: Tracked>(frame: &mut XdpFrame, packet: &mut Packet<A>, tunnel: &mut TunnelMeta) -> u64 {
    if tunnel.kind != TO_TASK {
        return emit_in_xdp(frame, packet, tunnel);
    }
    match verifier::unpack_raw(from_peer(packet, tunnel)) {
        Ok(_) => to_task_in_xdp(frame, packet, tunnel),
        Err(outcome) => refused(outcome),
    }
}

/// Finds or makes the connection of what a peer sent to a task of this node.
#[inline(always)]
fn from_peer<A: Tracked>(packet: &mut Packet<A>, tunnel: &mut TunnelMeta) -> u64 {
    match for_task(packet, tunnel) {
        step if step == Step::Place as u64 => verifier::pack(conntrack::place(packet)),
        step => step,
    }
}

#[inline(never)]
fn for_task<A: Tracked>(packet: &mut Packet<A>, tunnel: &mut TunnelMeta) -> u64 {
    verifier::pack(conntrack::for_task(packet, tunnel))
}

#[inline(never)]
fn to_task_in_xdp<A: Tracked>(frame: &mut XdpFrame, packet: &Packet<A>, tunnel: &TunnelMeta) -> u64 {
    pack(forward::xdp::arrived(frame, packet, tunnel, packet.draft.backend))
}

#[inline(never)]
fn emit_in_xdp<A: Tracked>(frame: &mut XdpFrame, packet: &mut Packet<A>, tunnel: &TunnelMeta) -> u64 {
    pack(forward::xdp::emit(frame, packet, tunnel))
}

/// [`Outcome::is_dropped`] of a discriminant.
#[inline(always)]
fn is_dropped(outcome: u32) -> bool {
    DROPPED >> (outcome & 63) & 1 != 0
}

/// The outcomes that drop, a bit each.
const DROPPED: u64 = {
    let (mut bits, mut index) = (0, 0);
    while index < Outcome::ALL.len() {
        if Outcome::ALL[index].is_dropped() {
            bits |= 1 << Outcome::ALL[index] as u64;
        }
        index += 1;
    }
    bits
};

/// What the stages make of a packet. Finding its connection and sending it are functions of their own beside each other, and
/// each family has its own: one within the other would take more of the stack than there is.
#[inline(always)]
fn in_xdp<A: Back>(frame: &mut XdpFrame, packet: &mut Packet<A>) -> u64 {
    match verifier::unpack_raw(track(frame, packet, true)) {
        Ok(_) if early::waits(packet) => pack(Ok(forward::xdp::leave_to_tc(frame))),
        Ok(direction) => send_in_xdp(frame, packet, direction),
        // Its first one may come: TC holds it, and counts.
        Err(FRAGMENT) if packet.key.protocol == UDP && forward::xdp::tell_tc_to_decide(frame) => {
            pack(Ok(Action::PASS))
        }
        Err(RESET) => reset_in_xdp(frame, packet),
        Err(outcome) => refused(outcome),
    }
}

const RESET: u32 = Outcome::Reset as u32;

/// Finds the packet's connection, or makes it, step by step: the packed last step.
#[inline(always)]
fn track<F: Frame, A: Tracked>(frame: &F, packet: &mut Packet<A>, all: bool) -> u64 {
    let mut step = find(frame, packet, all);
    if step == Step::Open as u64 {
        step = open(packet);
    }
    if step == Step::Choose as u64 {
        let chosen = A::choose(packet);
        step = take(packet, chosen);
    }
    if step == Step::Place as u64 {
        step = verifier::pack(conntrack::place(packet));
        if step == Step::ToTask as u64 {
            log_new(frame, packet.draft.backend);
        }
    }
    step
}

#[inline(never)]
fn find<F: Frame, A: Tracked>(frame: &F, packet: &mut Packet<A>, all: bool) -> u64 {
    let scope = if all { Scope::All } else { Scope::Connections };
    verifier::pack(conntrack::uplink(frame, packet, scope).map(|step| step as u32))
}

#[inline(never)]
fn open<A: Tracked>(packet: &mut Packet<A>) -> u64 {
    verifier::pack(conntrack::admission::open(packet).map(|step| step as u32))
}

#[inline(never)]
fn take<A: Tracked>(packet: &mut Packet<A>, chosen: u64) -> u64 {
    let step = conntrack::admission::take(packet, chosen);
    verifier::pack(step.map(|step| step as u32))
}

/// Tells of a new connection, where that is asked for.
#[inline(never)]
fn log_new<F: Frame>(frame: &F, backend: u32) -> u32 {
    let service = maps::BACKENDS.get(backend).map_or(0, |backend| backend.service);
    debug!(frame.ebpf(), "service {}: new connection to backend {}", service, backend);
    0
}

#[inline(never)]
fn send_in_xdp<A: Back>(frame: &mut XdpFrame, packet: &Packet<A>, direction: u32) -> u64 {
    pack(conntrack::classified(packet, direction).and_then(|found| forward::xdp::send(frame, packet, &found)))
}

#[inline(never)]
fn reset_in_xdp<A: Back>(frame: &mut XdpFrame, packet: &Packet<A>) -> u64 {
    pack(forward::xdp::reset(frame, packet))
}

/// TC ingress on the uplink: delivers to local tasks what XDP decided, and does all of XDP's work where XDP
/// does not run or cannot forward a frame.
#[classifier]
#[inline(always)]
pub fn uplink_tc(context: TcContext) -> i32 {
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(1)) else {
        return TC_ACT_UNSPEC;
    };
    let mut frame = Skb::new(context, config.flags & XDP_GENERIC != 0);
    if maps::is_stale(config) {
        // XDP has counted it, where there is one.
        if config.flags & TC_ALONE != 0 {
            counters::outcome(Outcome::Stale as u32, frame.packets());
        }
        return TC_ACT_UNSPEC;
    }
    let Some(metadata) = metadata(&frame, config) else {
        return TC_ACT_UNSPEC;
    };
    let metadata = verifier::forget(&mut scratch.metadata, metadata);
    frame.pull_headers();
    let parsed = parse::frame(&frame, scratch);
    let task = Task::of(metadata);
    if let Task::Decide(_) = task {
        match tunnelled(&frame, parsed, scratch) {
            NOT_TUNNELLED => {}
            ARRIVED if scratch.tunnel.kind == PROBE => {
                return in_tc_terms(forward::tc::answer_probe(&mut frame, &scratch.tunnel));
            }
            ARRIVED => return out_of_tunnel_in_tc(&mut frame, scratch),
            other => return decided_in_tc(&frame, config, other - REFUSED),
        }
    }
    if let Task::SendReply = task {
        // XDP has looked at who sent it.
        scratch.tunnel.peer = SELF;
    }
    let done = match (parsed, task) {
        (IS_IPV4, Task::Deliver(backend, port)) => deliver(&mut frame, &mut scratch.v4, backend, port.raw()),
        (IS_IPV6, Task::Deliver(backend, port)) => deliver(&mut frame, &mut scratch.v6, backend, port.raw()),
        (IS_IPV4, Task::Decide(scope)) => in_tc(&mut frame, &mut scratch.v4, scope == Scope::All),
        (IS_IPV6, Task::Decide(scope)) => in_tc(&mut frame, &mut scratch.v6, scope == Scope::All),
        (IS_IPV4, Task::SendReply) => emit_in_tc(&mut frame, &mut scratch.v4, &scratch.tunnel),
        (IS_IPV6, Task::SendReply) => emit_in_tc(&mut frame, &mut scratch.v6, &scratch.tunnel),
        (other, _) => refused(other - IS_OUTCOME),
    };
    match (unpack(done), task) {
        (Ok(Action::RELEASE), _) => release_in_tc(&mut frame, scratch, parsed),
        (Ok(action), _) => cut_in_tc(&mut frame, scratch, parsed, action, false),
        // It was held, and passed on then, or cut from a datagram: the first one has not got through.
        (Err(FRAGMENT), Task::Decide(_)) if is_seen(&frame) => {
            drop_in_tc(&frame, Outcome::DeliveryLost as u32)
        }
        (Err(FRAGMENT), Task::Decide(scope)) => {
            hold_in_tc(&frame, scratch, parsed);
            if scope == Scope::All { decided_in_tc(&frame, config, FRAGMENT) } else { TC_ACT_UNSPEC }
        }
        (Err(outcome), Task::Decide(Scope::All)) => decided_in_tc(&frame, config, outcome),
        // XDP has sent it to a task of this node, and could not say so.
        (Err(outcome), Task::Decide(Scope::Connections)) if is_dropped(outcome) => end_in_tc(&frame, outcome),
        // What XDP passed to the host it has counted already.
        (Err(_), Task::Decide(Scope::Connections)) => TC_ACT_UNSPEC,
        (Err(_), Task::Deliver(..)) => end_in_tc(&frame, Outcome::DeliveryLost as u32),
        (Err(outcome), Task::SendReply) => drop_in_tc(&frame, outcome),
    }
}

/// What is left for TC to do with a frame.
#[derive(Clone, Copy)]
enum Task {
    /// XDP decided and counted: deliver to this local backend, from this port.
    Deliver(u32, Be16),
    /// Decide here.
    Decide(Scope),
    /// XDP took a reply out of the tunnel: send it to the client.
    SendReply,
}

impl Task {
    /// What is left where the [`metadata`] says so.
    #[inline(always)]
    fn of(metadata: u64) -> Self {
        match metadata as u32 {
            META_TC_DECIDES => Self::Decide(Scope::All),
            META_TC_SENDS_REPLY => Self::SendReply,
            LOOK_UP => Self::Decide(Scope::Connections),
            backend => Self::Deliver(backend, Be16::from_raw((metadata >> 32) as u16)),
        }
    }
}

/// In the place of a backend: XDP decides, and could not say so.
const LOOK_UP: u32 = META_TC_SENDS_REPLY - 1;

/// XDP's metadata of a frame in one word: a backend, or what stands in its place, and above it the client's port.
#[inline(always)]
fn metadata(frame: &Skb, config: &Config) -> Option<u64> {
    match frame.metadata(config.nonce) {
        Some(metadata) => Some(metadata.backend as u64 | (metadata.port.raw() as u64) << 32),
        None if config.flags & (TC_ALONE | XDP_IS_NEW) != 0 => Some(META_TC_DECIDES as u64),
        None if config.flags & XDP_GENERIC == 0 && frame.is_seen(config.nonce) => {
            Some(META_TC_DECIDES as u64)
        }
        None if config.metadata_refused != 0 || config.flags & XDP_GENERIC != 0 => Some(LOOK_UP as u64),
        None => None,
    }
}

/// An action in TC's terms; an outcome passes.
#[inline(always)]
fn in_tc_terms(done: u64) -> i32 {
    match unpack(done) {
        Ok(Action::DROP) => TC_ACT_SHOT,
        Ok(action) => action.answer().map_or(TC_ACT_UNSPEC, |answer| answer as i32),
        Err(_) => TC_ACT_UNSPEC,
    }
}

/// Whether this datapath has the frame come in once more.
#[inline(always)]
fn is_seen(frame: &Skb) -> bool {
    maps::config().is_some_and(|config| frame.is_seen(config.nonce))
}

/// Holds a fragment whose first one is not known.
#[inline(always)]
fn hold_in_tc(frame: &Skb, scratch: &Scratch, parsed: u32) {
    match parsed {
        IS_IPV4 => early::hold(frame, &scratch.v4),
        IS_IPV6 => early::hold(frame, &scratch.v6),
        _ => 0,
    };
}

/// Has a first fragment come in once more, with those that came before it.
#[inline(always)]
fn release_in_tc(frame: &mut Skb, scratch: &mut Scratch, parsed: u32) -> i32 {
    let released = if parsed == IS_IPV4 {
        forward::tc::release(frame, &mut scratch.v4)
    } else {
        forward::tc::release(frame, &mut scratch.v6)
    };
    // What the kernel has no room for is lost, as it would be there.
    if released == 0 { drop_in_tc(frame, Outcome::DeliveryLost as u32) } else { TC_ACT_SHOT }
}

/// An action in TC's terms. What is to be cut is cut here, where one state of the program is left to be verified.
#[inline(always)]
fn cut_in_tc(frame: &mut Skb, scratch: &mut Scratch, parsed: u32, action: Action, goes_out: bool) -> i32 {
    let Some(limit) = action.limit() else {
        return in_tc_terms(pack(Ok(action)));
    };
    let begun = if parsed == IS_IPV4 {
        forward::tc::begin_cut(frame, &mut scratch.v4, limit, goes_out)
    } else {
        forward::tc::begin_cut(frame, &mut scratch.v6, limit, goes_out)
    };
    let ended = unpack(begun).and_then(|_| unpack(forward::tc::cut(frame)));
    ended.map_or_else(|outcome| drop_in_tc(frame, outcome), |_| TC_ACT_SHOT)
}

/// Ends the way of a frame that TC has decided for itself. Where XDP may have passed it to the host, it has counted it then;
/// what it would have dropped it has not seen.
#[inline(always)]
fn decided_in_tc(frame: &Skb, config: &Config, outcome: u32) -> i32 {
    let passed =
        config.flags & XDP_IS_NEW != 0 && !is_dropped(outcome) && frame.metadata(config.nonce).is_none();
    if passed { TC_ACT_UNSPEC } else { end_in_tc(frame, outcome) }
}

/// Ends the way of a frame in TC.
#[inline(always)]
fn end_in_tc(frame: &Skb, outcome: u32) -> i32 {
    counters::outcome(outcome, frame.packets());
    if is_dropped(outcome) { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
}

#[inline(always)]
fn drop_in_tc(frame: &Skb, outcome: u32) -> i32 {
    counters::outcome(outcome, frame.packets());
    TC_ACT_SHOT
}

/// Takes the packet out of the tunnel where XDP has not, and sends it on.
#[inline(always)]
fn out_of_tunnel_in_tc(frame: &mut Skb, scratch: &mut Scratch) -> i32 {
    let headed = scratch.tunnel.headless == 0 || forward::tc::put_link_header(frame).is_some();
    let parsed = match encap::decapsulate(frame, &scratch.tunnel) {
        Some(()) if headed => {
            frame.pull_inner_headers();
            parse::frame(frame, scratch)
        }
        _ => IS_OUTCOME,
    };
    let done = match (parsed, scratch.tunnel.kind) {
        (IS_IPV4, TO_TASK) => arrived_in_tc(frame, &mut scratch.v4, &mut scratch.tunnel),
        (IS_IPV6, TO_TASK) => arrived_in_tc(frame, &mut scratch.v6, &mut scratch.tunnel),
        (IS_IPV4, _) => emit_in_tc(frame, &mut scratch.v4, &scratch.tunnel),
        (IS_IPV6, _) => emit_in_tc(frame, &mut scratch.v6, &scratch.tunnel),
        _ => pack(Err(Outcome::TunnelMalformed)),
    };
    match unpack(done) {
        Ok(_) => in_tc_terms(done),
        Err(outcome) => drop_in_tc(frame, outcome),
    }
}

#[inline(always)]
fn arrived_in_tc<A: Tracked>(frame: &mut Skb, packet: &mut Packet<A>, tunnel: &mut TunnelMeta) -> u64 {
    match verifier::unpack_raw(from_peer(packet, tunnel)) {
        Ok(_) => to_task_in_tc(frame, packet, tunnel),
        Err(outcome) => refused(outcome),
    }
}

#[inline(never)]
fn to_task_in_tc<A: Tracked>(frame: &mut Skb, packet: &mut Packet<A>, tunnel: &TunnelMeta) -> u64 {
    let index = packet.draft.backend;
    pack(forward::tc::arrived(frame, packet, tunnel, index))
}

#[inline(never)]
fn emit_in_tc<A: Tracked>(frame: &mut Skb, packet: &mut Packet<A>, tunnel: &TunnelMeta) -> u64 {
    pack(forward::tc::emit(frame, packet, tunnel))
}

#[inline(never)]
fn deliver<A: Family>(frame: &mut Skb, packet: &mut Packet<A>, backend: u32, port: u16) -> u64 {
    pack(forward::tc::deliver(frame, packet, backend, Be16::from_raw(port)))
}

#[inline(always)]
fn in_tc<A: Back>(frame: &mut Skb, packet: &mut Packet<A>, all: bool) -> u64 {
    match verifier::unpack_raw(track(frame, packet, all)) {
        Ok(_) if early::waits(packet) && !is_seen(frame) => pack(Ok(Action::RELEASE)),
        Ok(direction) => send_in_tc(frame, packet, direction),
        Err(RESET) => reset_in_tc(frame, packet),
        Err(outcome) => refused(outcome),
    }
}

#[inline(never)]
fn send_in_tc<A: Back>(frame: &mut Skb, packet: &mut Packet<A>, direction: u32) -> u64 {
    let found = conntrack::classified(packet, direction);
    pack(found.and_then(|found| forward::tc::from_uplink(frame, packet, &found)))
}

#[inline(never)]
fn reset_in_tc<A: Back>(frame: &mut Skb, packet: &mut Packet<A>) -> u64 {
    pack(forward::tc::reset(frame, packet))
}

/// TC ingress on an interface beside the uplink by which other nodes' packets come: takes those out of the tunnel, and leaves
/// everything else alone. It need not have link headers.
#[classifier]
#[inline(always)]
pub fn peer_tc(context: TcContext) -> i32 {
    let mut frame = Skb::new(context, true);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(1)) else {
        return TC_ACT_UNSPEC;
    };
    if maps::is_stale(config) {
        return TC_ACT_UNSPEC;
    }
    frame.pull_headers();
    let parsed = parse::frame(&frame, scratch);
    match tunnelled(&frame, parsed, scratch) {
        NOT_TUNNELLED => TC_ACT_UNSPEC,
        ARRIVED if scratch.tunnel.kind == PROBE => {
            in_tc_terms(forward::tc::answer_probe(&mut frame, &scratch.tunnel))
        }
        ARRIVED => out_of_tunnel_in_tc(&mut frame, scratch),
        other => end_in_tc(&frame, other - REFUSED),
    }
}

/// TC egress on the uplink and on each interface beside it by which other nodes are reached, for what this datapath does not send
/// itself: nobody of this host speaks to a peer as if it did, and what answers the host's own datagrams is found again ([`egress`]).
#[classifier]
#[inline(always)]
pub fn uplink_egress(context: TcContext) -> i32 {
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(3)) else {
        return TC_ACT_UNSPEC;
    };
    let mut frame = Skb::beside(context, config.uplink);
    if frame.is_signed(config.nonce) || frame.is_plain_tcp() || maps::is_stale(config) {
        return TC_ACT_UNSPEC;
    }
    frame.pull_headers();
    let looked = match parse::frame(&frame, scratch) {
        IS_IPV4 => egress::look(&frame, &scratch.v4),
        IS_IPV6 => egress::look(&frame, &scratch.v6),
        _ => Ok(()),
    };
    looked.map_or_else(|outcome| end_in_tc(&frame, outcome as u32), |()| TC_ACT_UNSPEC)
}

/// TC ingress where tasks answer: turns replies around to the client. A task's own traffic is nobody's business
/// here: it is neither touched nor counted.
#[classifier]
#[inline(always)]
pub fn task_tc(context: TcContext) -> i32 {
    let mut frame = Skb::new(context, false);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(2)) else {
        return TC_ACT_UNSPEC;
    };
    if maps::is_stale(config) {
        return TC_ACT_UNSPEC;
    }
    frame.pull_headers();
    let mut parsed = parse::frame(&frame, scratch);
    // What a task begins itself it sends from another port than those that services lead to, and it goes where it always went.
    let made = match parsed {
        IS_IPV4 if may_be_reply(&scratch.v4) => to_v6::from_task(&mut frame, &scratch.v4),
        IS_IPV6 if may_be_reply(&scratch.v6) => to_v4::from_task(&mut frame, &scratch.v6, config),
        _ => NOT_OURS,
    };
    if made != NOT_OURS {
        parsed = translated(&mut frame, scratch, made);
    }
    scratch.v6.may_be_cut = (made == MAY_BE_CUT) as u8;
    // What was translated and what came so go the same way from here on.
    let known = verifier::forget(&mut scratch.metadata, (made as u64) << 32 | parsed as u64);
    let (made, parsed) = ((known >> 32) as u32, known as u32);
    let done = match parsed {
        IS_IPV4 => from_task(&mut frame, &mut scratch.v4),
        IS_IPV6 => from_task(&mut frame, &mut scratch.v6),
        other if made != NOT_OURS => refused(other - IS_OUTCOME),
        _ => return TC_ACT_UNSPEC,
    };
    match unpack(done) {
        // A reply of ours that cannot go its way now: by the host's it would show the task's address.
        Err(outcome) if is_dropped(outcome) => end_in_tc(&frame, outcome),
        // The host knows nobody of the pool, and nobody out there a task by that address.
        Err(_) if made != NOT_OURS || is_made_up(parsed, scratch) => {
            drop_in_tc(&frame, Outcome::Untranslatable as u32)
        }
        Err(_) => TC_ACT_UNSPEC,
        Ok(action) => {
            if made != NOT_OURS && parsed == IS_IPV6 {
                to_v6::note(&scratch.v4);
            }
            cut_in_tc(&mut frame, scratch, parsed, action, false)
        }
    }
}

/// Whether a task's packet may be of a connection to it.
#[inline(always)]
fn may_be_reply<A: Family>(packet: &Packet<A>) -> bool {
    let key = &packet.key;
    packet.kind == LATER || conntrack::may_be_ours(Side::Source, key.protocol, key.source_port)
}

/// Whether a packet says to come from an address that a task has within its node alone.
#[inline(always)]
fn is_made_up(parsed: u32, scratch: &Scratch) -> bool {
    match parsed {
        IS_IPV4 => stand_in::is_one(scratch.v4.key.source),
        IS_IPV6 => lb_common::translation::embedded(&scratch.v6.key.source).is_some(),
        _ => false,
    }
}

/// Parses what has been made a packet of the other family.
#[inline(always)]
fn translated(frame: &mut Skb, scratch: &mut Scratch, made: u32) -> u32 {
    if made == translate::REFUSED {
        return IS_OUTCOME + Outcome::Untranslatable as u32;
    }
    frame.pull_inner_headers();
    parse::frame(frame, scratch)
}

/// TC egress on the host-side veth of a task that has one family alone: what this datapath sends there for the address that the task
/// has in the other one becomes a packet of its own. Everything else is left alone.
#[classifier]
#[inline(always)]
pub fn task_egress(context: TcContext) -> i32 {
    let mut frame = Skb::new(context, false);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(4)) else {
        return TC_ACT_UNSPEC;
    };
    let is_for_task = |frame| config.pool_bits != 0 && to_v4::may_be_for(frame) || to_v6::may_be_for(frame);
    if !frame.is_signed(config.nonce) || !is_for_task(&frame) {
        return TC_ACT_UNSPEC;
    }
    frame.pull_headers();
    let parsed = parse::frame(&frame, scratch);
    let fits = match parsed {
        IS_IPV4 => forward::tc::to_other_family(&mut frame, &scratch.v4),
        IS_IPV6 => forward::tc::to_other_family(&mut frame, &scratch.v6),
        _ => pack(Err(Outcome::Untranslatable)),
    };
    match unpack(fits) {
        Ok(Action::PASS) => {}
        Ok(action) => return cut_in_tc(&mut frame, scratch, parsed, action, true),
        Err(outcome) => return drop_in_tc(&frame, outcome),
    }
    let done = if parsed == IS_IPV4 {
        to_v6::to_task(&mut frame, &scratch.v4, config)
    } else {
        to_v4::to_task(&mut frame, &scratch.v6, config)
    };
    done.map_or_else(|outcome| drop_in_tc(&frame, outcome as u32), |()| TC_ACT_UNSPEC)
}

#[inline(always)]
fn from_task<A: Back>(frame: &mut Skb, packet: &mut Packet<A>) -> u64 {
    match verifier::unpack_raw(find_reply(frame, packet)) {
        Ok(direction) => reply_in_tc(frame, packet, direction),
        Err(outcome) => refused(outcome),
    }
}

#[inline(never)]
fn find_reply<A: Tracked>(frame: &Skb, packet: &mut Packet<A>) -> u64 {
    verifier::pack(conntrack::task(frame, packet).map(|direction| direction as u32))
}

#[inline(never)]
fn reply_in_tc<A: Back>(frame: &mut Skb, packet: &mut Packet<A>, direction: u32) -> u64 {
    let found = conntrack::classified(packet, direction);
    pack(found.and_then(|found| forward::tc::from_task(frame, packet, &found)))
}

/// Tells user space what time it is for connections; never attached. With `frags` as all of XDP: where the kernel has no such
/// programs the section is renamed, and there must be one of its name.
#[xdp(frags)]
pub fn clock(_: XdpContext) -> u32 {
    time::now()
}

/// Takes lines out of the connection table that user space has found to have ended, so that only programs write it; never
/// attached. The frame is a batch of [`Removal`]s; what was done is written into them.
#[xdp(frags)]
pub fn gc(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context);
    let mut next = 0;
    while next < Removal::BATCH {
        let Some(removal) = frame.at::<Removal>(next * size_of::<Removal>()) else {
            break;
        };
        let Removal { control, slot, seen, what, .. } = *removal;
        let done = match what {
            remove::CONNECTION4 => table::expire::<V4>(slot, control, seen, 0),
            remove::CONNECTION6 => table::expire::<V6>(slot, control, seen, 0),
            remove::DENIED4 => table::expire::<V4>(slot, control, 0, 1),
            remove::DENIED6 => table::expire::<V6>(slot, control, 0, 1),
            remove::SPILLED4 => table::gather::<V4>(slot, seen),
            remove::SPILLED6 => table::gather::<V6>(slot, seen),
            _ => false,
        };
        if let Some(removal) = frame.at::<Removal>(next * size_of::<Removal>()) {
            removal.done = done as u32;
        }
        next += 1;
    }
    XDP_PASS
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No path leads here: the build refuses an object that holds a panic.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
