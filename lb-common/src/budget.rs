//! How many errors of ours an address gets that may be forged: who is flooded with packets in its name is not flooded with our
//! errors (RFC 4443, 2.4(f)). A table of few budgets is shared by hash: strangers may spend each other's, no more than that.

use crate::pod;

/// Errors that one address gets in a second. A client learns a path's MTU from one.
pub const ERRORS: u32 = 10;

/// What was spent of it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Budget {
    /// When its second began: jiffies, low 32 bits.
    pub since: u32,
    /// Errors sent in it.
    pub spent: u32,
}

impl Budget {
    /// Whether one more may be sent, which is then spent. What two CPUs spend at once may count as one.
    #[inline(always)]
    pub const fn spend(&mut self, now: u32, jiffies_per_second: u32) -> bool {
        if now.wrapping_sub(self.since) >= jiffies_per_second {
            *self = Self { since: now, spent: 0 };
        }
        self.spent += (self.spent <= ERRORS) as u32;
        self.spent <= ERRORS
    }
}

const _: () = assert!(size_of::<Budget>() == 8);

pod!(Budget);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_has_its_errors() {
        let mut budget = Budget::default();
        for now in [0, 250, u32::MAX - 100, 150, 1 << 31] {
            for sent in 0..3 * ERRORS {
                assert_eq!(budget.spend(now, 250), sent < ERRORS, "{now}");
            }
            assert!(!budget.spend(now.wrapping_add(249), 250));
        }
    }
}
