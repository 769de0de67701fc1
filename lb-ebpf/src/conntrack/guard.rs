//! The flood guard: how many new connections there are, and what is done without a line while there are too many, or while
//! the table has no place for one.

use lb_common::{
    abi::{Config, XDP_GENERIC},
    backend::{Backend, Kind, SINGLE},
    guard::{GRACE_SECONDS, Guard, HOLD_SECONDS, STEP},
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

/// Seconds in which a client may still go on with what was placed by hash.
const LINGERS: u32 = HOLD_SECONDS + GRACE_SECONDS;

/// Whether a client may go on with what was placed by hash. A function of its own, as the next: few packets come to it.
#[inline(never)]
pub fn lingers() -> bool {
    let (Some(config), Some(guard)) = (maps::config(), GUARD.get(0)) else {
        return false;
    };
    let flooded = config.flood_rate != 0 && guard.within(LINGERS, clock::now(), config.jiffies_per_second);
    flooded || is_full(config, guard)
}

/// Whether many connections have lately found no place in the table.
#[inline(never)]
pub fn was_full() -> bool {
    let (Some(config), Some(guard)) = (maps::config(), GUARD.get(0)) else {
        return false;
    };
    is_full(config, guard)
}

#[inline(always)]
fn is_full(config: &Config, guard: &Guard) -> bool {
    guard.was_full(LINGERS, clock::now(), config.jiffies_per_second)
}

/// Whether the packets of a backend's connections find their way without a line, to it and back. To a task of this node they do
/// only where XDP can tell TC which.
#[inline(always)]
pub fn needs_no_line(backend: &Backend) -> bool {
    if backend.kind == Kind::Local as u8
        && maps::config().is_none_or(|config| config.flags & XDP_GENERIC != 0 || config.metadata_refused != 0)
    {
        return false;
    }
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
    if let (Some(config), Some(guard)) = (maps::config(), GUARD.get_ptr_mut(0)) {
        // SAFETY: an array's entry is valid while the program runs; what two CPUs count at once may be lost.
        unsafe { (*guard).count_full(clock::now(), config.jiffies_per_second) };
    }
}
