//! The packet path of the balancer: what runs on the uplink (XDP, then TC) and where tasks' replies arrive (TC).
//!
//! This file holds the entry points, and only here is a verdict chosen: every stage below returns either where
//! a packet goes or the [`Outcome`] that says why it is passed on as it came.
//!
//! ```text
//! parse ─► filter ─► classify ─► (select ─► flow made) ─► rewrite ─► forward
//! ```
#![no_std]
#![no_main]
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
    bindings::{TC_ACT_UNSPEC, xdp_action::XDP_PASS},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::{HANDOVER_DECIDE, TC_ALONE},
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
        other => Err(other - IS_OUTCOME),
    };
    match done {
        Ok(action) => action,
        Err(outcome) => {
            count::outcome(outcome, 1);
            XDP_PASS
        }
    }
}

#[inline(always)]
fn in_xdp<A: Family>(frame: &XdpFrame, packet: &mut Packet<A>) -> Result<u32, u32> {
    let sent = classify::uplink(frame, packet, Scope::All)
        .and_then(|found| forward::from_xdp(frame, packet, &found));
    sent.map_err(|outcome| outcome as u32)
}

/// TC ingress on the uplink: delivers to local tasks what XDP decided, and does all of XDP's work where XDP
/// does not run or cannot forward a frame.
#[classifier]
#[inline(always)]
pub fn uplink_tc(context: TcContext) -> i32 {
    let frame = Skb::new(context);
    let (Some(config), Some(scratch)) = (maps::config(), maps::scratch(1)) else {
        return TC_ACT_UNSPEC;
    };
    let task = match frame.handover() {
        Some(HANDOVER_DECIDE) => Task::Decide(Scope::All),
        Some(backend) => Task::Deliver(backend),
        None if config.flags & TC_ALONE != 0 => Task::Decide(Scope::All),
        None if config.metadata_refused != 0 => Task::Decide(Scope::Flows),
        None => return TC_ACT_UNSPEC,
    };
    frame.pull_headers();
    let done = match parse::frame(&frame, scratch) {
        IS_IPV4 => in_tc(&frame, &mut scratch.v4, task),
        IS_IPV6 => in_tc(&frame, &mut scratch.v6, task),
        other => Err(other - IS_OUTCOME),
    };
    match (done, task) {
        (Ok(action), _) => return action,
        (Err(outcome), Task::Decide(Scope::All)) => count::outcome(outcome, frame.packets()),
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

#[inline(always)]
fn in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, task: Task) -> Result<i32, u32> {
    let sent = match task {
        Task::Deliver(backend) => forward::handed_over(frame, packet, backend),
        Task::Decide(scope) => classify::uplink(frame, packet, scope)
            .and_then(|found| forward::from_uplink_tc(frame, packet, &found)),
    };
    sent.map_err(|outcome| outcome as u32)
}

/// TC ingress where tasks answer: turns replies around to the client. A task's own traffic is nobody's business
/// here: it is neither touched nor counted.
#[classifier]
#[inline(always)]
pub fn task_tc(context: TcContext) -> i32 {
    let frame = Skb::new(context);
    let Some(scratch) = maps::scratch(2) else {
        return TC_ACT_UNSPEC;
    };
    frame.pull_headers();
    let done = match parse::frame(&frame, scratch) {
        IS_IPV4 => from_task(&frame, &mut scratch.v4),
        IS_IPV6 => from_task(&frame, &mut scratch.v6),
        _ => None,
    };
    done.unwrap_or(TC_ACT_UNSPEC)
}

#[inline(always)]
fn from_task<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> Option<i32> {
    let found = classify::task(frame, packet).ok()?;
    forward::from_task_tc(frame, packet, &found).ok()
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No path leads here: the build refuses an object that holds a panic.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
