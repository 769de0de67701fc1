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
mod family;
mod flow;
mod forward;
mod frame;
mod maps;
mod neighbour;
mod packet;
mod parse;
mod rewrite;
mod select;
mod snat;

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::{HANDOVER_DECIDE, TC_ALONE, XDP_GENERIC},
    outcome::Outcome,
};

use crate::{
    classify::Scope,
    family::Family,
    frame::{Frame, Skb, XdpFrame},
    packet::Packet,
    parse::{IS_IPV4, IS_IPV6, IS_OUTCOME},
};

/// XDP on the uplink: decides for every packet, and sends on what leaves by an uplink again.
#[xdp(frags)]
pub fn uplink_xdp(context: XdpContext) -> u32 {
    let frame = XdpFrame::new(context);
    let Some(scratch) = maps::scratch(0) else {
        return XDP_PASS;
    };
    let done = match parse::frame(&frame, scratch) {
        IS_IPV4 => in_xdp(&frame, &mut scratch.v4),
        IS_IPV6 => in_xdp(&frame, &mut scratch.v6),
        other => -1 - (other - IS_OUTCOME) as i32,
    };
    match decode(done) {
        Ok(action) => action as u32,
        Err(outcome) => {
            count::outcome(outcome, 1);
            if outcome == Outcome::BackendUnreachable as u32 { XDP_DROP } else { XDP_PASS }
        }
    }
}

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
fn in_xdp<A: Family>(frame: &XdpFrame, packet: &mut Packet<A>) -> i32 {
    encode(
        classify::uplink(frame, packet, Scope::All)
            .and_then(|found| forward::from_xdp(frame, packet, &found))
            .map(|action| action as i32),
    )
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
    let task = match frame.handover() {
        Some(HANDOVER_DECIDE) => Task::Decide(Scope::All),
        Some(backend) => Task::Deliver(backend),
        None if config.flags & TC_ALONE != 0 => Task::Decide(Scope::All),
        None if config.metadata_refused != 0 || config.flags & XDP_GENERIC != 0 => Task::Decide(Scope::Flows),
        None => return TC_ACT_UNSPEC,
    };
    frame.pull_headers();
    let done = match (parse::frame(&frame, scratch), task) {
        (IS_IPV4, Task::Deliver(backend)) => deliver(&frame, &mut scratch.v4, backend),
        (IS_IPV6, Task::Deliver(backend)) => deliver(&frame, &mut scratch.v6, backend),
        (IS_IPV4, Task::Decide(scope)) => in_tc(&frame, &mut scratch.v4, scope == Scope::All),
        (IS_IPV6, Task::Decide(scope)) => in_tc(&frame, &mut scratch.v6, scope == Scope::All),
        (other, _) => -1 - (other - IS_OUTCOME) as i32,
    };
    match (decode(done), task) {
        (Ok(action), _) => return action,
        (Err(outcome), Task::Decide(Scope::All)) => {
            count::outcome(outcome, frame.packets());
            if outcome == Outcome::BackendUnreachable as u32 {
                return TC_ACT_SHOT;
            }
        }
        // What XDP passed to the host it has counted already.
        (Err(_), Task::Decide(Scope::Flows)) => {}
        (Err(_), Task::Deliver(_)) => count::outcome(Outcome::HandoverLost as u32, frame.packets()),
    }
    TC_ACT_UNSPEC
}

/// What is left for TC to do with a frame.
#[derive(Clone, Copy)]
enum Task {
    /// XDP decided and counted: deliver to this local backend.
    Deliver(u32),
    /// Decide here.
    Decide(Scope),
}

#[inline(never)]
fn deliver<A: Family>(frame: &Skb, packet: &mut Packet<A>, backend: u32) -> i32 {
    encode(forward::handed_over(frame, packet, backend))
}

#[inline(never)]
fn in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, all: bool) -> i32 {
    let scope = if all { Scope::All } else { Scope::Flows };
    encode(
        classify::uplink(frame, packet, scope)
            .and_then(|found| forward::from_uplink_tc(frame, packet, &found)),
    )
}

/// TC ingress where tasks answer: turns replies around to the client. A task's own traffic is nobody's business
/// here: it is neither touched nor counted.
#[classifier]
#[inline(always)]
pub fn task_tc(context: TcContext) -> i32 {
    let frame = Skb::new(context, false);
    let Some(scratch) = maps::scratch(2) else {
        return TC_ACT_UNSPEC;
    };
    frame.pull_headers();
    let done = match parse::frame(&frame, scratch) {
        IS_IPV4 => from_task(&frame, &mut scratch.v4),
        IS_IPV6 => from_task(&frame, &mut scratch.v6),
        _ => TC_ACT_UNSPEC,
    };
    decode(done).unwrap_or(TC_ACT_UNSPEC)
}

#[inline(never)]
fn from_task<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> i32 {
    encode(classify::task(frame, packet).and_then(|found| forward::from_task_tc(frame, packet, &found)))
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
