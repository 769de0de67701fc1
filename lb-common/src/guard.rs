//! The flood guard: above a rate of new connections they are placed by hash, and no line is made before the client has shown
//! that it exists.

use crate::{conntrack::is_within, pod};

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

/// So many connections about at once that find no place say that the table is full. Half full, one in 100,000 finds none, and
/// says nothing.
pub const FULL: u32 = 16;
/// More are not counted: ten seconds after the last of them the table is no longer full.
const MOST: u32 = FULL << 9;

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
    /// When the second began in which [`Self::full`] was last counted: jiffies, low 32 bits.
    pub full_at: u32,
    /// Connections that have lately found no place in the table: halved each second.
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
        self.switches != 0 && is_within(self.over_at, now, seconds.wrapping_mul(jiffies_per_second))
    }

    /// Whether the table was full not longer than so many seconds ago: [`FULL`] connections found no place in it about then.
    #[inline(always)]
    pub const fn was_full(&self, seconds: u32, now: u32, jiffies_per_second: u32) -> bool {
        self.full >= FULL && is_within(self.full_at, now, seconds.wrapping_mul(jiffies_per_second))
    }

    /// Counts a connection that found no place.
    #[inline(always)]
    pub const fn count_full(&mut self, now: u32, jiffies_per_second: u32) {
        let since = now.wrapping_sub(self.full_at);
        if since >= jiffies_per_second {
            // Four seconds of silence are its end.
            let halved = if since / 4 >= jiffies_per_second { 0 } else { self.full / 2 };
            (self.full, self.full_at) = (halved, now);
        }
        self.full = if self.full < MOST { self.full + 1 } else { MOST };
    }
}

const _: () = assert!(size_of::<Guard>() == 24 && size_of::<Rate>() == 16);

pod!(Guard, Rate);

#[cfg(test)]
mod tests {
    use super::*;

    const HZ: u32 = 250;

    #[test]
    fn a_table_is_full_when_many_find_no_place_and_no_more_soon_after() {
        let mut guard = Guard::default();
        let start = u32::MAX - 100;
        // One a second is bad luck.
        for second in 0..100 {
            guard.count_full(start.wrapping_add(second * HZ), HZ);
            assert!(!guard.was_full(4, start.wrapping_add(second * HZ), HZ), "{second}");
        }
        let now = start.wrapping_add(100 * HZ);
        for _ in 0..100_000 {
            guard.count_full(now, HZ);
        }
        assert!(guard.was_full(4, now, HZ) && guard.was_full(4, now.wrapping_add(4 * HZ), HZ));
        assert!(!guard.was_full(4, now.wrapping_add(4 * HZ + 1), HZ));
        // Of what was, one a second keeps nothing up.
        let mut now = now;
        for _ in 0..12 {
            now = now.wrapping_add(HZ);
            guard.count_full(now, HZ);
        }
        assert!(!guard.was_full(4, now, HZ), "{guard:?}");
    }

    #[test]
    fn what_was_long_ago_is_not_new_again_when_the_clock_turns() {
        let guard = Guard { over_at: 1_000, switches: 1, full_at: 1_000, full: FULL, ..Guard::default() };
        for days in 1..49 {
            let now = 1_000_u32.wrapping_add(days * 24 * 60 * 60 * 1_000);
            assert!(!guard.within(2, now, 1_000) && !guard.was_full(4, now, 1_000), "{days}");
        }
        // Another CPU's clock may be a little ahead.
        assert!(guard.within(2, 990, 1_000));
    }
}
