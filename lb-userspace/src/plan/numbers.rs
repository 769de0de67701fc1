//! Free numbers of a table.

use std::collections::{BTreeMap, BTreeSet};

/// Free numbers of a table.
pub(super) struct Numbers<'a, V> {
    taken: &'a BTreeMap<u32, V>,
    /// Given only when there are no others: what still names them knows by the generation that they are another's.
    resting: Option<&'a BTreeSet<u32>>,
    given: BTreeSet<u32>,
    /// The lowest.
    pub first: u32,
    limit: u32,
    cursor: u32,
}

impl<'a, V> Numbers<'a, V> {
    /// Those below `limit` that are not taken, looked for from `cursor` on.
    pub fn new(
        taken: &'a BTreeMap<u32, V>,
        limit: u32,
        cursor: u32,
        resting: Option<&'a BTreeSet<u32>>,
    ) -> Self {
        Self { taken, resting, given: BTreeSet::new(), first: 0, limit, cursor }
    }

    pub fn next(&mut self) -> Option<u32> {
        let used = (self.first as usize) + self.taken.len() + self.given.len();
        let room = (self.limit as usize).saturating_sub(used);
        if room <= self.resting.map_or(0, BTreeSet::len) {
            if room == 0 {
                return None;
            }
            self.resting = None;
        }
        let free = |number: &u32| {
            !self.taken.contains_key(number)
                && !self.given.contains(number)
                && !self.resting.is_some_and(|resting| resting.contains(number))
        };
        let start = self.cursor.clamp(self.first, self.limit);
        let number = (start..self.limit).chain(self.first..start).find(free)?;
        self.given.insert(number);
        self.cursor = number + 1;
        Some(number)
    }
}
