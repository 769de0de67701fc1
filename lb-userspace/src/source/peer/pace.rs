//! How often somebody may do something: so many times at once, then one each so often.

use std::time::{Duration, Instant};

/// What one side may ask for over time (the generic cell rate algorithm: one point of time is all that is kept).
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    burst: u32,
    each: Duration,
    /// When all that was asked for so far has been paid for.
    paid: Option<Instant>,
}

impl Pace {
    /// `burst` at once, then one each `each`.
    pub const fn new(burst: u32, each: Duration) -> Self {
        Self { burst, each, paid: None }
    }

    /// Takes one more if that is due; whether it was.
    pub fn take(&mut self, now: Instant) -> bool {
        let due = self.due(now) <= now;
        if due {
            self.charge(now, 1);
        }
        due
    }

    /// Takes so many, due or not; what comes after waits the longer.
    pub fn charge(&mut self, now: Instant, count: u32) {
        let from = self.paid.map_or(now, |paid| paid.max(now));
        self.paid = Some(from + self.each * count);
    }

    /// When the next one is due.
    pub fn due(&self, now: Instant) -> Instant {
        let slack = self.each * self.burst.saturating_sub(1);
        let due = self.paid.and_then(|paid| paid.checked_sub(slack));
        due.map_or(now, |due| due.max(now))
    }

    /// Whether it is as if nothing had been asked for.
    pub fn is_rested(&self, now: Instant) -> bool {
        self.paid.is_none_or(|paid| paid <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_at_a_time() {
        let start = Instant::now();
        let mut pace = Pace::new(3, Duration::from_secs(1));
        let at = |tenths: u64| start + Duration::from_millis(100 * tenths);
        assert_eq!([0, 0, 0, 0, 9].map(|tenths| pace.take(at(tenths))), [true, true, true, false, false]);
        assert_eq!(pace.due(at(9)), at(10));
        assert_eq!([10, 11, 20].map(|tenths| pace.take(at(tenths))), [true, false, true]);
        assert!(!pace.is_rested(at(40)) && pace.is_rested(at(60)));
        // What was more than there is is paid for later.
        pace.charge(at(60), 5);
        assert_eq!(pace.due(at(60)), at(90));
    }
}
