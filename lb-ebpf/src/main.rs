//! The packet path of the balancer: what runs on the uplink (XDP, then TC) and where tasks' replies arrive (TC).
//!
//! This file holds the entry points, and only here is a verdict chosen: every stage below returns either where
//! a packet goes or the [`Outcome`] that says why it is passed on as it came.
//!
//! ```text
//! parse ─► filter ─► classify ─► (select ─► flow made) ─► rewrite ─► forward
//! ```
// On the host, where this is only checked and never run, std stands in.
#![cfg_attr(target_arch = "bpf", no_std)]
#![no_main]
#![expect(
    missing_docs,
    reason = "the macros of the entry points wrap them in functions without documentation"
)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", expect(internal_features, reason = "atomic add without compare-and-swap"))]

mod classify;
mod count;
mod express;
mod family;
mod flow;
mod forward;
mod fragment;
mod frame;
mod guard;
mod heal;
mod icmp;
mod maps;
mod mtu;
mod neighbour;
mod packet;
mod parse;
mod reply;
mod reset;
mod rewrite;
mod segment;
mod select;
mod snat;
mod track;
mod tunnel;

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::{Config, HANDOVER_DECIDE, HANDOVER_EMIT, TC_ALONE, XDP_GENERIC, XDP_IS_NEW},
    outcome::Outcome,
    tunnel::{PROBE, SELF, TO_TASK},
};

use crate::{
    classify::Scope,
    family::Family,
    frame::{Frame, Skb, XdpFrame},
    packet::{Arrival, Packet, Scratch},
    parse::{IS_IPV4, IS_IPV6, IS_OUTCOME},
    track::Entries,
};

/// XDP on the uplink: decides for every packet, and sends on what leaves by an uplink again.
#[xdp(frags)]
pub fn uplink_xdp(context: XdpContext) -> u32 {
    let frame = XdpFrame::new(context);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(0)) else {
        return XDP_PASS;
    };
    if config.flags & TC_ALONE != 0 {
        return XDP_PASS;
    }
    if maps::is_stale(config) {
        count::outcome(Outcome::Stale as u32, 1);
        return XDP_PASS;
    }
    let done = match express::read(&frame, config, scratch) {
        express::NOT_OURS => -1 - Outcome::NotOurs as i32,
        express::PLAIN4 => plain_in_xdp(&frame, &mut scratch.v4),
        express::PLAIN6 => plain_in_xdp(&frame, &mut scratch.v6),
        _ => staged_in_xdp(&frame, scratch),
    };
    match decode(done) {
        Ok(action) => action as u32,
        Err(outcome) => {
            count::outcome(outcome, 1);
            if is_dropped(outcome) { XDP_DROP } else { XDP_PASS }
        }
    }
}

/// What [`express::read`] has read.
#[inline(always)]
fn plain_in_xdp<A: Family>(frame: &XdpFrame, packet: &mut Packet<A>) -> i32 {
    match express::forward(frame, packet) {
        express::UNUSUAL => in_xdp(frame, packet, true),
        express::UNKNOWN => in_xdp(frame, packet, false),
        action => action,
    }
}

/// What it has not.
#[inline(always)]
fn staged_in_xdp(frame: &XdpFrame, scratch: &mut Scratch) -> i32 {
    let parsed = parse::frame(frame, scratch);
    match tunnelled(frame, parsed, scratch) {
        PLAIN => match parsed {
            IS_IPV4 => in_xdp(frame, &mut scratch.v4, true),
            IS_IPV6 => in_xdp(frame, &mut scratch.v6, true),
            other => -1 - (other - IS_OUTCOME) as i32,
        },
        ARRIVED if !takes_out_of_tunnel() => forward::leave_to_tc(frame),
        ARRIVED if scratch.arrival.kind == PROBE => forward::answer_probe_in_xdp(frame, &scratch.arrival),
        ARRIVED => match out_of_tunnel(frame, scratch) {
            IS_IPV4 => arrived_in_xdp(frame, &mut scratch.v4, &mut scratch.arrival),
            IS_IPV6 => arrived_in_xdp(frame, &mut scratch.v6, &mut scratch.arrival),
            _ => drop_in_xdp(Outcome::TunnelMalformed) as i32,
        },
        refused => -1 - (refused - REFUSED) as i32,
    }
}

/// Not the tunnel's business.
const PLAIN: u32 = 0;
/// A peer's packet, still in the tunnel.
const ARRIVED: u32 = 1;
/// This and the discriminant of the outcome for which it stays there.
const REFUSED: u32 = 2;

/// Whether a parsed frame came through the tunnel, or is an error about it.
#[inline(always)]
fn tunnelled<F: Frame>(frame: &F, parsed: u32, scratch: &mut Scratch) -> u32 {
    match parsed {
        IS_IPV4 if tunnel::is_for(&scratch.v4) => open_tunnel(frame, &scratch.v4, &mut scratch.arrival),
        IS_IPV6 if tunnel::is_for(&scratch.v6) => open_tunnel(frame, &scratch.v6, &mut scratch.arrival),
        IS_IPV4 if tunnel::is_error(&scratch.v4) => REFUSED + tunnel::note_error(frame, &scratch.v4) as u32,
        IS_IPV6 if tunnel::is_error(&scratch.v6) => REFUSED + tunnel::note_error(frame, &scratch.v6) as u32,
        _ => PLAIN,
    }
}

#[inline(never)]
fn open_tunnel<F: Frame, A: Family>(frame: &F, packet: &Packet<A>, arrival: &mut Arrival) -> u32 {
    match tunnel::open(frame, packet, arrival) {
        Ok(()) => ARRIVED,
        // Another program's.
        Err(Outcome::NotOurs) => PLAIN,
        Err(outcome) => REFUSED + outcome as u32,
    }
}

/// Whether XDP takes packets out of the tunnel itself: only where it can tell TC about them.
#[inline(always)]
fn takes_out_of_tunnel() -> bool {
    maps::config().is_some_and(|config| config.flags & XDP_GENERIC == 0 && config.metadata_refused == 0)
}

/// Takes the packet out of the tunnel and parses it.
#[inline(always)]
fn out_of_tunnel<F: Frame>(frame: &F, scratch: &mut Scratch) -> u32 {
    match tunnel::unwrap(frame, &scratch.arrival) {
        Some(()) => parse::frame(frame, scratch),
        None => IS_OUTCOME,
    }
}

/// What a peer sent for a task of this node or for a client. What is wrong with it ends here: the host would make nothing
/// of a packet that has left the tunnel.
#[inline(never)]
fn arrived_in_xdp<A: Family>(frame: &XdpFrame, packet: &mut Packet<A>, arrival: &mut Arrival) -> i32 {
    let done = if arrival.kind == TO_TASK {
        forward::arrived_in_xdp(frame, packet, arrival)
    } else {
        forward::emit_in_xdp(frame, packet, arrival)
    };
    match done {
        Ok(action) => action as i32,
        Err(outcome) => drop_in_xdp(outcome) as i32,
    }
}

#[inline(always)]
fn drop_in_xdp(outcome: Outcome) -> u32 {
    count::outcome(outcome as u32, 1);
    XDP_DROP
}

/// [`Outcome::is_dropped`] of a discriminant.
#[inline(always)]
fn is_dropped(outcome: u32) -> bool {
    DROPPED >> outcome & 1 != 0
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

/// What a stage came to, as the plain number that a function of its own may return: an action, which is not
/// negative, or one less than the negated outcome. Each family has functions of its own because the stack of
/// both together would be too much.
#[inline(always)]
fn encode(done: Result<i32, Outcome>) -> i32 {
    match done {
        Ok(action) => action,
        Err(outcome) => -1 - outcome as i32,
    }
}

#[inline(always)]
fn decode(done: i32) -> Result<i32, u32> {
    if done < 0 { Err((-1 - done) as u32) } else { Ok(done) }
}

#[inline(never)]
fn in_xdp<A: Family>(frame: &XdpFrame, packet: &mut Packet<A>, known: bool) -> i32 {
    let entries = if known { Entries::All } else { Entries::HalfOpen };
    let found = classify::uplink(frame, packet, Scope::All, entries);
    if let Err(Outcome::Reset) = found {
        return reset_in_xdp(frame, packet);
    }
    encode(found.and_then(|found| forward::from_xdp(frame, packet, &found)).map(|action| action as i32))
}

#[inline(never)]
fn reset_in_xdp<A: Family>(frame: &XdpFrame, packet: &Packet<A>) -> i32 {
    encode(forward::reset_in_xdp(frame, packet).map(|action| action as i32))
}

/// TC ingress on the uplink: delivers to local tasks what XDP decided, and does all of XDP's work where XDP
/// does not run or cannot forward a frame.
#[classifier]
#[inline(always)]
pub fn uplink_tc(context: TcContext) -> i32 {
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(1)) else {
        return TC_ACT_UNSPEC;
    };
    let frame = Skb::new(context, config.flags & XDP_GENERIC != 0);
    if maps::is_stale(config) {
        // XDP has counted it, where there is one.
        if config.flags & TC_ALONE != 0 {
            count::outcome(Outcome::Stale as u32, frame.packets());
        }
        return TC_ACT_UNSPEC;
    }
    let task = match frame.handover() {
        Some(HANDOVER_DECIDE) => Task::Decide(Scope::All),
        Some(HANDOVER_EMIT) => {
            // XDP has looked at who sent it.
            scratch.arrival.peer = SELF;
            Task::Emit
        }
        Some(backend) => Task::Deliver(backend),
        None if config.flags & (TC_ALONE | XDP_IS_NEW) != 0 => Task::Decide(Scope::All),
        None if config.metadata_refused != 0 || config.flags & XDP_GENERIC != 0 => Task::Decide(Scope::Flows),
        None => return TC_ACT_UNSPEC,
    };
    frame.pull_headers();
    let parsed = parse::frame(&frame, scratch);
    if let Task::Decide(_) = task {
        match tunnelled(&frame, parsed, scratch) {
            PLAIN => {}
            ARRIVED if scratch.arrival.kind == PROBE => {
                return forward::answer_probe_in_tc(&frame, &scratch.arrival);
            }
            ARRIVED => return out_of_tunnel_in_tc(&frame, scratch),
            refused => return decided_in_tc(&frame, config, refused - REFUSED),
        }
    }
    let done = match (parsed, task) {
        (IS_IPV4, Task::Deliver(backend)) => deliver(&frame, &mut scratch.v4, backend),
        (IS_IPV6, Task::Deliver(backend)) => deliver(&frame, &mut scratch.v6, backend),
        (IS_IPV4, Task::Decide(scope)) => in_tc(&frame, &mut scratch.v4, scope == Scope::All),
        (IS_IPV6, Task::Decide(scope)) => in_tc(&frame, &mut scratch.v6, scope == Scope::All),
        (IS_IPV4, Task::Emit) => emit_in_tc(&frame, &mut scratch.v4, &scratch.arrival),
        (IS_IPV6, Task::Emit) => emit_in_tc(&frame, &mut scratch.v6, &scratch.arrival),
        (other, _) => -1 - (other - IS_OUTCOME) as i32,
    };
    match (decode(done), task) {
        (Ok(action), _) => action,
        (Err(outcome), Task::Decide(Scope::All)) => decided_in_tc(&frame, config, outcome),
        // What XDP passed to the host it has counted already.
        (Err(_), Task::Decide(Scope::Flows)) => TC_ACT_UNSPEC,
        (Err(_), Task::Deliver(_)) => end_in_tc(&frame, Outcome::HandoverLost as u32),
        (Err(outcome), Task::Emit) => {
            count::outcome(outcome, frame.packets());
            TC_ACT_SHOT
        }
    }
}

/// Ends the way of a frame that TC has decided for itself. Where XDP may have passed it to the host, it has counted it then;
/// what it would have dropped it has not seen.
#[inline(always)]
fn decided_in_tc(frame: &Skb, config: &Config, outcome: u32) -> i32 {
    let passed = config.flags & XDP_IS_NEW != 0 && !is_dropped(outcome) && frame.handover().is_none();
    if passed { TC_ACT_UNSPEC } else { end_in_tc(frame, outcome) }
}

/// Ends the way of a frame in TC.
#[inline(always)]
fn end_in_tc(frame: &Skb, outcome: u32) -> i32 {
    count::outcome(outcome, frame.packets());
    if is_dropped(outcome) { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
}

/// Takes the packet out of the tunnel where XDP has not, and sends it on.
#[inline(always)]
fn out_of_tunnel_in_tc(frame: &Skb, scratch: &mut Scratch) -> i32 {
    let headed = scratch.arrival.headless == 0 || forward::put_link_header(frame).is_some();
    let parsed = match tunnel::unwrap(frame, &scratch.arrival) {
        Some(()) if headed => {
            frame.pull_headers();
            parse::frame(frame, scratch)
        }
        _ => IS_OUTCOME,
    };
    let done = match (parsed, scratch.arrival.kind) {
        (IS_IPV4, TO_TASK) => arrived_in_tc(frame, &mut scratch.v4, &mut scratch.arrival),
        (IS_IPV6, TO_TASK) => arrived_in_tc(frame, &mut scratch.v6, &mut scratch.arrival),
        (IS_IPV4, _) => emit_in_tc(frame, &mut scratch.v4, &scratch.arrival),
        (IS_IPV6, _) => emit_in_tc(frame, &mut scratch.v6, &scratch.arrival),
        _ => encode(Err(Outcome::TunnelMalformed)),
    };
    match decode(done) {
        Ok(action) => action,
        Err(outcome) => {
            count::outcome(outcome, frame.packets());
            TC_ACT_SHOT
        }
    }
}

#[inline(never)]
fn arrived_in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, arrival: &mut Arrival) -> i32 {
    encode(forward::arrived_in_tc(frame, packet, arrival))
}

#[inline(never)]
fn emit_in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, arrival: &Arrival) -> i32 {
    encode(forward::emit_in_tc(frame, packet, arrival))
}

/// What is left for TC to do with a frame.
#[derive(Clone, Copy)]
enum Task {
    /// XDP decided and counted: deliver to this local backend.
    Deliver(u32),
    /// Decide here.
    Decide(Scope),
    /// XDP took an answer out of the tunnel: emit it to the client.
    Emit,
}

#[inline(never)]
fn deliver<A: Family>(frame: &Skb, packet: &mut Packet<A>, backend: u32) -> i32 {
    encode(forward::handed_over(frame, packet, backend))
}

#[inline(never)]
fn in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, all: bool) -> i32 {
    let scope = if all { Scope::All } else { Scope::Flows };
    let found = classify::uplink(frame, packet, scope, Entries::All);
    if let Err(Outcome::Reset) = found {
        return reset_in_tc(frame, packet);
    }
    encode(found.and_then(|found| forward::from_uplink_tc(frame, packet, &found)))
}

#[inline(never)]
fn reset_in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> i32 {
    encode(forward::reset_in_tc(frame, packet))
}

/// TC ingress where tasks answer: turns replies around to the client. A task's own traffic is nobody's business
/// here: it is neither touched nor counted.
#[classifier]
#[inline(always)]
pub fn task_tc(context: TcContext) -> i32 {
    let frame = Skb::new(context, false);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(2)) else {
        return TC_ACT_UNSPEC;
    };
    if maps::is_stale(config) {
        return TC_ACT_UNSPEC;
    }
    frame.pull_headers();
    let done = match parse::frame(&frame, scratch) {
        IS_IPV4 => from_task(&frame, &mut scratch.v4),
        IS_IPV6 => from_task(&frame, &mut scratch.v6),
        _ => TC_ACT_UNSPEC,
    };
    match decode(done) {
        Ok(action) => action,
        // An answer of ours that cannot go its way now: by the host's it would show the task's address.
        Err(outcome) if is_dropped(outcome) => end_in_tc(&frame, outcome),
        Err(_) => TC_ACT_UNSPEC,
    }
}

#[inline(never)]
fn from_task<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> i32 {
    encode(classify::task(frame, packet).and_then(|found| forward::from_task_tc(frame, packet, &found)))
}

/// Tells user space what time it is for flows; never attached.
#[xdp]
pub fn clock(_: XdpContext) -> u32 {
    neighbour::jiffies() as u32
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
