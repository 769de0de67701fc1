//! The flood guard: how many new flows there are, and what is done without an entry while there are too many.

use lb_common::{
    abi::Config,
    backend::{Backend, Kind, SINGLE},
    guard::{GRACE_SECONDS, HOLD_SECONDS},
};

use crate::{
    maps::{self, GUARD, RATES},
    neighbour::jiffies,
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

/// Whether a client may go on with what the guard placed by hash.
#[inline(always)]
pub fn lingers() -> bool {
    maps::config().is_some_and(is_lingering)
}

#[inline(always)]
fn is_lingering(config: &Config) -> bool {
    let (now, hz) = (jiffies() as u32, config.jiffies_per_second);
    config.flood_rate != 0
        && GUARD.get(0).is_some_and(|guard| guard.within(HOLD_SECONDS + GRACE_SECONDS, now, hz))
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
