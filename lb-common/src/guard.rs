//! The flood guard: above a rate of new connections they are placed by hash, and no line is made before the client has shown
//! that it exists.

use crate::{conntrack::elapsed, pod};

/// Seconds that a handshake may take: that long a half-open connection is to be safe from those that come after it.
const HANDSHAKE_SECONDS: u32 = 2;
/// New connections that a CPU counts before it tells the others.
pub const STEP: u32 = 64;

/// New connections a second above which the guard takes over, when nothing else is asked for: a table of so many lines, half
/// full, would give up a half-open one before its handshake is done.
pub const fn default_rate(lines: u32) -> u32 {
    let rate = lines / 2 / HANDSHAKE_SECONDS;
    if rate < 4 * STEP { 4 * STEP } else { rate }
}

/// Seconds for which the guard stays after the rate was last too high.
pub const HOLD_SECONDS: u32 = 2;
/// Seconds after that in which a client may still go on with what was placed by hash.
pub const GRACE_SECONDS: u32 = 2;

/// What the guard is doing; shared by all CPUs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Guard {
    /// When the rate was last too high: jiffies, low 32 bits. Written about once a tick while it is.
    pub over_at: u32,
    /// How often the guard has taken over.
    pub switches: u32,
    /// When the second began that is counted: jiffies, low 32 bits.
    pub since: u32,
    /// New connections in it, in steps of [`STEP`].
    pub count: u32,
    /// When a connection last found no place in the table: jiffies, low 32 bits.
    pub full_at: u32,
    /// How many have found none.
    pub full: u32,
}

/// New connections seen by one CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rate {
    /// Placed by hash, without a line.
    pub placed: u64,
    /// Those that the others have not been told of.
    pub count: u32,
    /// Zero.
    pub _pad: u32,
}

impl Guard {
    /// Whether the rate was too high not longer than so many seconds ago.
    #[inline(always)]
    pub const fn within(&self, seconds: u32, now: u32, jiffies_per_second: u32) -> bool {
        self.switches != 0 && elapsed(self.over_at, now) <= seconds.wrapping_mul(jiffies_per_second)
    }

    /// Whether a connection has found no place in the table not longer than so many seconds ago.
    #[inline(always)]
    pub const fn was_full(&self, seconds: u32, now: u32, jiffies_per_second: u32) -> bool {
        self.full != 0 && elapsed(self.full_at, now) <= seconds.wrapping_mul(jiffies_per_second)
    }
}

const _: () = assert!(size_of::<Guard>() == 24 && size_of::<Rate>() == 16);

pod!(Guard, Rate);
