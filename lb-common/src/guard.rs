//! The flood guard: above a rate of new flows they are placed by hash, and no entry is made before the client has shown
//! that it exists.

use crate::{flow::elapsed, pod};

/// New flows a second and CPU above which the guard takes over, when nothing else is asked for: what a core can put
/// into a full table in a tenth of its time.
pub const DEFAULT_RATE: u32 = 125_000;
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
}

/// New flows seen by one CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rate {
    /// Placed by hash, without an entry.
    pub placed: u64,
    /// When the second began that is counted: jiffies, low 32 bits.
    pub since: u32,
    /// New flows in it.
    pub count: u32,
}

impl Guard {
    /// Whether the rate was too high not longer than so many seconds ago.
    #[inline(always)]
    pub const fn within(&self, seconds: u32, now: u32, jiffies_per_second: u32) -> bool {
        self.switches != 0 && elapsed(self.over_at, now) <= seconds.wrapping_mul(jiffies_per_second)
    }
}

const _: () = assert!(size_of::<Guard>() == 8 && size_of::<Rate>() == 16);

pod!(Guard, Rate);
