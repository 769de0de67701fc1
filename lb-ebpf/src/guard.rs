//! The flood guard: how many new flows there are, and what is done without an entry while there are too many.

use lb_common::{
    abi::Config,
    backend::{Backend, Kind, SINGLE},
    endpoint::Replies,
    flow::REQUEST,
    guard::{GRACE_SECONDS, HOLD_SECONDS},
};

use crate::{
    family::Family,
    maps::{self, GUARD, RATES},
    neighbour::{self, jiffies},
    packet::{Packet, WHOLE},
};

/// Counts a new flow, and whether it is one too many. A function of its own, for the verifier's sake.
#[inline(never)]
pub fn takes_over() -> bool {
    let (Some(config), Some(guard), Some(rate)) =
        (maps::config(), GUARD.get_ptr_mut(0), RATES.get_ptr_mut(0))
    else {
        return false;
    };
    if config.flood_rate == 0 {
        return false;
    }
    let (now, hz) = (jiffies() as u32, config.jiffies_per_second);
    // SAFETY: the rate is this CPU's own; the guard's words are written whole, by whichever CPU comes last.
    unsafe {
        if now.wrapping_sub((*rate).since) >= hz {
            (*rate).since = now;
            (*rate).count = 0;
        }
        (*rate).count += 1;
        let on = (*guard).within(HOLD_SECONDS, now, hz);
        if (*rate).count > config.flood_rate && (!on || (*guard).over_at != now) {
            (*guard).switches += !on as u32;
            (*guard).over_at = now;
            return true;
        }
        on
    }
}

/// Whether a client may go on with what was placed by hash.
#[inline(always)]
fn lingers(config: &Config) -> bool {
    let (now, hz) = (jiffies() as u32, config.jiffies_per_second);
    config.flood_rate != 0
        && GUARD.get(0).is_some_and(|guard| guard.within(HOLD_SECONDS + GRACE_SECONDS, now, hz))
}

/// Whether the packet goes on with a connection that the guard placed: it acknowledges an answer, and there is no entry.
#[inline(always)]
pub fn goes_on<A>(packet: &Packet<A>) -> bool {
    packet.is_tcp() && packet.form == WHOLE && packet.acknowledges() && maps::config().is_some_and(lingers)
}

/// Whether the answers of a backend find their way without an entry.
#[inline(always)]
pub fn needs_no_entry(backend: &Backend) -> bool {
    backend.kind == Kind::Peer as u8 || backend.kind != Kind::Snat as u8 && backend.flags & SINGLE != 0
}

/// Counts a flow that was placed without an entry.
#[inline(always)]
pub fn placed() {
    if let Some(rate) = RATES.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own.
        unsafe { (*rate).placed += 1 };
    }
}

/// Turns an answer around whose flow has no entry: the first of a connection, or any datagram. A single listener leads
/// to the task, which says where it comes from; the routing table says where it goes.
#[inline(never)]
pub fn answers<A: Family>(packet: &mut Packet<A>, replies: &Replies<A>) -> bool {
    let first = !packet.is_tcp() || packet.answers_syn();
    if replies.count != 1 || packet.form != WHOLE || !first || packet.hops <= 1 {
        return false;
    }
    if !maps::config().is_some_and(lingers) {
        return false;
    }
    let listener = &replies.sources[0];
    let Packet { key, flow, .. } = packet;
    let client = (&key.destination, key.destination_port);
    flow.rewrite.set(key, (&listener.address, listener.port), client);
    flow.backend = replies.backend;
    flow.role = REQUEST;
    flow.hop_seen = (jiffies() as u32).wrapping_sub(neighbour::LIFETIME);
    flow.forget_hop();
    true
}
