//! The flood guard: how many new connections there are, and what is done without a line while there are too many, or while
//! the table has no place for one.

use lb_common::{
    abi::Config,
    backend::{Backend, Kind, SINGLE},
    guard::{GRACE_SECONDS, HOLD_SECONDS, STEP},
};

use crate::io::{
    clock,
    maps::{self, GUARD, RATES},
};

/// Counts a new connection, and whether it is one too many. A function of its own, for the verifier's sake.
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
    let (now, hz) = (clock::now(), config.jiffies_per_second);
    // SAFETY: the rate is this CPU's own; the guard's words are written whole. What two CPUs count at once may be lost, a step
    // of it: the rate is a measure, not a sum.
    unsafe {
        (*rate).count += 1;
        let on = (*guard).within(HOLD_SECONDS, now, hz);
        if (*rate).count < STEP {
            return on;
        }
        (*rate).count = 0;
        if now.wrapping_sub((*guard).since) >= hz {
            (*guard).since = now;
            (*guard).count = 0;
        }
        (*guard).count += STEP;
        if (*guard).count > config.flood_rate && (!on || (*guard).over_at != now) {
            (*guard).switches += !on as u32;
            (*guard).over_at = now;
            return true;
        }
        on
    }
}

/// Whether a client may go on with what was placed by hash.
#[inline(always)]
pub fn lingers() -> bool {
    maps::config().is_some_and(is_lingering)
}

#[inline(always)]
fn is_lingering(config: &Config) -> bool {
    let (now, hz) = (clock::now(), config.jiffies_per_second);
    let seconds = HOLD_SECONDS + GRACE_SECONDS;
    GUARD.get(0).is_some_and(|guard| {
        config.flood_rate != 0 && guard.within(seconds, now, hz) || guard.was_full(seconds, now, hz)
    })
}

/// Whether connections have lately found no place in the table.
#[inline(always)]
pub fn was_full() -> bool {
    let (Some(config), Some(guard)) = (maps::config(), GUARD.get(0)) else {
        return false;
    };
    guard.was_full(HOLD_SECONDS + GRACE_SECONDS, clock::now(), config.jiffies_per_second)
}

/// Whether the replies of a backend find their way without a line.
#[inline(always)]
pub fn needs_no_line(backend: &Backend) -> bool {
    backend.kind == Kind::Peer as u8 || backend.kind != Kind::Snat as u8 && backend.flags & SINGLE != 0
}

/// Counts a connection that was placed without a line.
#[inline(always)]
pub fn placed() {
    if let Some(rate) = RATES.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own.
        unsafe { (*rate).placed += 1 };
    }
}

/// Notes that a connection has found no place in the table.
#[inline(always)]
pub fn full() {
    if let Some(guard) = GUARD.get_ptr_mut(0) {
        // SAFETY: an array's entry is valid while the program runs; each word is written whole.
        unsafe {
            (*guard).full_at = clock::now();
            (*guard).full = (*guard).full.wrapping_add(1).max(1);
        }
    }
}
