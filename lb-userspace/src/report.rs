//! What a controller says of its source, kept beside the tables: verbs read it there, with or without a controller.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Version of the fields in JSON; it changes when one goes or changes its meaning, not when one is added.
pub const SCHEMA: u32 = 2;

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
    /// Why the tables do not follow the last state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing: Option<String>,
    /// When the last state came, or since when there is no newer one: seconds since 1970.
    pub since: u64,
    /// From a change in the cluster to the tables knowing.
    pub delay: Delay,
    /// Whether the flood guard places new connections.
    #[serde(default)]
    pub flooded: bool,
    /// When the controller came: seconds since 1970.
    #[serde(default)]
    pub started: u64,
}

impl SourceReport {
    /// When the last state came, or since when there is no newer one.
    pub fn since(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.since)
    }

    /// Notes that it is so since now.
    pub fn touch(&mut self) {
        self.since = now();
    }
}

/// A backend to which the datapath gave connections that it did not take: they went to another task, at the client's next
/// SYN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Connections that it did not take since then.
    pub failovers: u64,
    /// When it took the first one not: seconds since 1970.
    pub since: u64,
    /// When it took the last one not.
    pub last: u64,
}

/// A task or a node that gets no new connections because somebody said so.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Drain {
    /// What is drained.
    pub what: Drained,
    /// Its name.
    pub name: String,
    /// Since when: seconds since 1970.
    pub since: u64,
}

/// What can be drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Drained {
    /// One task.
    Task,
    /// All tasks of a node.
    Node,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A moment as people read it: `2026-11-28T07:22:43Z`.
pub fn moment(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
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
    /// How many took longer than the one before of [`DELAYS`], and no longer than this one.
    #[serde(default)]
    pub buckets: [u64; DELAYS.len()],
}

/// The borders of the histogram of delays, in milliseconds.
pub const DELAYS: [u64; 8] = [25, 50, 100, 250, 500, 1_000, 2_500, 10_000];

impl Delay {
    /// Adds one.
    pub fn add(&mut self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.count += 1;
        self.last_ms = ms;
        self.max_ms = self.max_ms.max(ms);
        self.sum_ms = self.sum_ms.saturating_add(ms);
        if let Some(bucket) = DELAYS.iter().position(|most| ms <= *most) {
            self.buckets[bucket] += 1;
        }
    }
}

/// How long ago a moment is, as people say it: `8 min`.
pub fn ago(seconds: u64) -> String {
    match now().saturating_sub(seconds) {
        age @ 0..=119 => format!("{age} s"),
        age @ 120..=7_199 => format!("{} min", age / 60),
        age @ 7_200..=172_799 => format!("{} h", age / 3_600),
        age => format!("{} days", age / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_add_up() {
        let mut delay = Delay::default();
        for ms in [30, 11_000, 50, 10] {
            delay.add(Duration::from_millis(ms));
        }
        let buckets = [1, 2, 0, 0, 0, 0, 0, 0];
        assert_eq!(delay, Delay { count: 4, last_ms: 10, max_ms: 11_000, sum_ms: 11_090, buckets });
    }
}
