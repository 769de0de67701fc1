//! Which tasks do not take the connections they are given, by what the datapath counts: a task that refuses, or does not
//! answer, costs each client that meets it a second, for as long as nobody is told.

use std::collections::BTreeMap;

use lb_common::stats::BackendStats;

use crate::report::Trouble;

/// Backends looked at in one go, which comes about once a second: each costs a system call.
pub const SLICE: usize = 4_096;
/// A task that was given connections, and has refused none for so many seconds after the first, takes them again.
const QUIET: u64 = 10;

/// What is known of the backends.
#[derive(Debug, Default)]
pub struct Refusals {
    /// Counters as they were seen last, by number and generation.
    seen: BTreeMap<u32, Seen>,
    /// Who is in trouble.
    troubled: BTreeMap<u32, Trouble>,
    /// Where the next look begins.
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    generation: u32,
    stats: BackendStats,
    /// New connections when it last failed.
    connections: u64,
    /// Connections in a row that the task did not take, of all nodes' clients.
    in_a_row: u64,
    /// When it was first given a connection after that: whether it has taken it shows a second later, as the client asks again.
    given: Option<u64>,
}

/// What became of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It does not take connections, since now.
    Refuses(Trouble),
    /// It still does not.
    StillRefuses(Trouble),
    /// It takes them again.
    Takes,
}

impl Refusals {
    /// Goes on with what another controller has said.
    pub fn adopt(&mut self, troubled: BTreeMap<u32, Trouble>) {
        self.troubled = troubled;
    }

    /// The backends to look at now.
    pub fn due(&mut self, there: impl Iterator<Item = u32> + Clone) -> Vec<u32> {
        let next = self.next;
        let mut due: Vec<u32> = there.clone().filter(|index| *index >= next).take(SLICE).collect();
        if due.len() < SLICE {
            due.extend(there.take_while(|index| *index < next).take(SLICE - due.len()));
        }
        self.next = due.last().map_or(0, |last| last + 1);
        due
    }

    /// Forgets backends that are gone; those that were in trouble.
    pub fn forget(&mut self, is_there: impl Fn(u32) -> bool) -> Vec<u32> {
        self.seen.retain(|index, _| is_there(*index));
        let gone: Vec<u32> = self.troubled.keys().filter(|index| !is_there(**index)).copied().collect();
        self.troubled.retain(|index, _| is_there(*index));
        gone
    }

    /// Whether a task of this node has refused, or not answered, so many connections in a row as of the last look; they are counted
    /// anew then.
    pub fn took_none_of(&mut self, index: u32, many: u64) -> bool {
        self.seen.get_mut(&index).is_some_and(|seen| {
            let enough = many != 0 && seen.in_a_row >= many;
            seen.in_a_row *= u64::from(!enough);
            enough
        })
    }

    /// Looks at a backend's counters at a moment, in seconds since 1970.
    pub fn look(&mut self, index: u32, generation: u32, stats: BackendStats, now: u64) -> Option<Change> {
        let new = Seen { generation, stats, connections: stats.connections, in_a_row: 0, given: None };
        let seen = self.seen.entry(index).or_insert(new);
        // What was counted before this controller came is not news; another task has counters of its own.
        if seen.generation != generation || stats.failovers < seen.stats.failovers {
            *seen = new;
            return self.troubled.remove(&index).map(|_| Change::Takes);
        }
        let failed = stats.failovers - seen.stats.failovers;
        seen.in_a_row = match stats.answered.wrapping_sub(seen.stats.answered) {
            0 => seen.in_a_row + u64::from(stats.unanswered.wrapping_sub(seen.stats.unanswered)),
            _ => 0,
        };
        seen.stats = stats;
        if failed > 0 {
            (seen.connections, seen.given) = (stats.connections, None);
            let known = self.troubled.contains_key(&index);
            let trouble =
                self.troubled.entry(index).or_insert(Trouble { failovers: 0, since: now, last: now });
            trouble.failovers += failed;
            trouble.last = now;
            return Some(if known { Change::StillRefuses(*trouble) } else { Change::Refuses(*trouble) });
        }
        if !self.troubled.contains_key(&index) || stats.connections <= seen.connections {
            return None;
        }
        if now.saturating_sub(*seen.given.get_or_insert(now)) >= QUIET {
            self.troubled.remove(&index);
            return Some(Change::Takes);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(connections: u64, failovers: u64) -> BackendStats {
        BackendStats { connections, failovers, ..BackendStats::default() }
    }

    #[test]
    fn a_task_that_refuses_is_said_once_and_takes_again_when_it_has_taken() {
        let mut refusals = Refusals::default();
        let mut look = |connections, failovers, now| refusals.look(7, 1, stats(connections, failovers), now);
        // Counted before.
        assert_eq!(look(10, 3, 100), None);
        assert_eq!(look(11, 3, 101), None);
        let trouble = Trouble { failovers: 2, since: 102, last: 102 };
        assert_eq!(look(13, 5, 102), Some(Change::Refuses(trouble)));
        let trouble = Trouble { failovers: 3, since: 102, last: 103 };
        assert_eq!(look(14, 6, 103), Some(Change::StillRefuses(trouble)));
        // Nobody has asked it since: nothing is known.
        assert_eq!(look(14, 6, 200), None);
        // The client that it is given now may be refused a second later.
        assert_eq!(look(15, 6, 201), None);
        let trouble = Trouble { failovers: 4, since: 102, last: 202 };
        assert_eq!(look(15, 7, 202), Some(Change::StillRefuses(trouble)));
        assert_eq!(look(16, 7, 301), None);
        assert_eq!(look(16, 7, 310), None);
        assert_eq!(look(16, 7, 311), Some(Change::Takes));
        assert_eq!(look(17, 7, 312), None);
    }

    #[test]
    fn the_next_controller_goes_on_with_what_the_last_one_said() {
        let mut refusals = Refusals::default();
        refusals.adopt(BTreeMap::from([(7, Trouble { failovers: 2, since: 90, last: 95 })]));
        let mut look = |connections, now| refusals.look(7, 1, stats(connections, 2), now);
        assert_eq!(look(10, 100), None);
        assert_eq!(look(11, 101), None);
        assert_eq!(look(11, 111), Some(Change::Takes));
    }

    #[test]
    fn another_task_of_the_same_number_begins_anew() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.look(7, 1, stats(1, 0), 1), None);
        assert!(matches!(refusals.look(7, 1, stats(2, 1), 2), Some(Change::Refuses(_))));
        assert_eq!(refusals.look(7, 2, stats(0, 0), 3), Some(Change::Takes));
        assert_eq!(refusals.look(7, 2, stats(9, 0), 30), None);
    }

    #[test]
    fn those_in_a_row_end_with_one_that_is_answered() {
        let mut refusals = Refusals::default();
        let mut row = |generation, answered, unanswered| {
            let stats = BackendStats { answered, unanswered, ..BackendStats::default() };
            refusals.look(7, generation, stats, 1);
            refusals.seen[&7].in_a_row
        };
        // What was counted before is no news.
        assert_eq!(
            [(1, 5, 9), (1, 5, 9), (1, 5, 11), (1, 5, 12)].map(|(g, a, u)| row(g, a, u)),
            [0, 0, 2, 3]
        );
        assert_eq!(
            [(1, 6, 14), (1, 6, 15), (2, 0, 0), (2, 0, 1)].map(|(g, a, u)| row(g, a, u)),
            [0, 1, 0, 1]
        );
    }

    #[test]
    fn all_are_looked_at_in_turn() {
        let mut refusals = Refusals::default();
        let there: Vec<u32> = (0..SLICE as u32 + 10).collect();
        let mut due = || refusals.due(there.iter().copied());
        assert_eq!(due(), there[..SLICE]);
        let second = due();
        assert_eq!((second.len(), second[0], second[9], second[10]), (SLICE, 4_096, 4_105, 0));
        assert_eq!(due()[0], SLICE as u32 - 10);
    }
}
