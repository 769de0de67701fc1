//! What a controller says of its source, kept beside the tables: verbs read it there, with or without a controller.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Where the tables' content comes from, and how that goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// `file`, `docker manager`, `docker worker`, …
    pub kind: String,
    /// Why this one, and where it is.
    pub why: String,
    /// Why the last state may be out of date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// When the last state came, or since when there is no newer one: seconds since 1970.
    pub since: u64,
    /// From a change in the cluster to the tables knowing.
    pub delay: Delay,
}

impl SourceReport {
    /// When the last state came, or since when there is no newer one.
    pub fn since(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.since)
    }

    /// Notes that it is so since now.
    pub fn touch(&mut self) {
        self.since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    }
}

/// Times from a change in the cluster, by the clock of who made it, to the tables knowing; in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delay {
    /// How many were measured.
    pub count: u64,
    /// The last one.
    pub last_ms: u64,
    /// The longest.
    pub max_ms: u64,
    /// All of them.
    pub sum_ms: u64,
}

impl Delay {
    /// Adds one.
    pub fn add(&mut self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.count += 1;
        self.last_ms = ms;
        self.max_ms = self.max_ms.max(ms);
        self.sum_ms = self.sum_ms.saturating_add(ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_add_up() {
        let mut delay = Delay::default();
        for ms in [30, 50, 10] {
            delay.add(Duration::from_millis(ms));
        }
        assert_eq!(delay, Delay { count: 3, last_ms: 10, max_ms: 50, sum_ms: 90 });
    }
}
