//! What the tables hold beside the services' own: ranges of slots, the bits of the filter, how many listeners there are.

use std::collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry};

use lb_common::{
    backend::Kind,
    endpoint::Listener,
    filter::{Side, position},
    net::Be16,
};

use super::{
    table_diff::TableDiff,
    tables::{At, BackendEntry, Tables},
};

/// What the tables hold beside the services' own.
#[derive(Debug, Default)]
pub(super) struct AllocationIndex {
    pub ranges: Ranges,
    pub marks: Marks,
    /// Listeners of each family: those that are there, and those that come. New ones are set before old ones go: the
    /// tables hold both for a moment.
    pub listeners: [usize; 2],
    /// Ranges of clients, likewise.
    pub access: usize,
}

impl AllocationIndex {
    /// Those of the tables as they are.
    pub fn of(actual: &Tables) -> Self {
        let mut allocations = Self { access: actual.access.len(), ..Self::default() };
        for (at, listener) in &actual.listeners {
            allocations.listeners[family(at)] += 1;
            allocations.ranges.join(listener);
            allocations.marks.add(listener_mark(at));
        }
        actual.backends.values().filter_map(source_mark).for_each(|mark| allocations.marks.add(mark));
        // Bits that nobody asks for may be left of a plan that was cut short.
        allocations.marks.touched.extend(actual.filter.keys());
        allocations
    }
}

/// Index of an address family's count.
pub(super) fn family(at: &At) -> usize {
    usize::from(at.address.is_ipv6())
}

/// The bit of the filter by which a listener's packets pass.
pub(super) fn listener_mark(at: &At) -> (u32, u64) {
    position(Side::Destination, at.protocol.number(), Be16::new(at.port))
}

/// Replies come from the tasks' ports, to wherever they go; those of peers' tasks come through the tunnel.
pub(super) fn source_mark(entry: &BackendEntry) -> Option<(u32, u64)> {
    let label = &entry.label;
    (entry.backend.kind != Kind::Peer as u8)
        .then(|| position(Side::Source, label.protocol.number(), Be16::new(label.target)))
}

/// Ranges of the slot table, by their start: what a listener reads today is not written.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    used: BTreeMap<u32, Range>,
    /// Those that may have no listener any more once the plan is applied.
    left: Vec<u32>,
    cursor: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Range {
    count: u32,
    /// Listeners that lead there.
    listeners: u32,
}

impl Ranges {
    /// A listener leads there.
    pub fn join(&mut self, listener: &Listener) {
        if listener.slot_count > 0 {
            let range = self.used.entry(listener.slot_base).or_default();
            range.listeners += 1;
            range.count = range.count.max(listener.slot_count);
        }
    }

    /// A listener leads there no longer; until the plan is applied it still reads. One without slots leads nowhere.
    pub fn leave(&mut self, listener: &Listener) {
        if listener.slot_count == 0 {
            return;
        }
        if let Some(range) = self.used.get_mut(&listener.slot_base) {
            range.listeners = range.listeners.saturating_sub(1);
            self.left.push(listener.slot_base);
        }
    }

    /// Forgets the ranges that nobody reads once the plan is applied.
    pub fn settle(&mut self) {
        for base in self.left.drain(..) {
            if self.used.get(&base).is_some_and(|range| range.listeners == 0) {
                self.used.remove(&base);
            }
        }
    }

    /// The next ranges are looked for behind the last one.
    pub fn rewind(&mut self) {
        self.cursor =
            self.used.iter().next_back().map_or(0, |(base, range)| base.saturating_add(range.count));
    }

    /// A free range, looked for behind the last one taken and then from the start.
    pub fn take(&mut self, count: u32, limit: u32) -> Option<u32> {
        let base = self.fit(self.cursor, count, limit).or_else(|| self.fit(0, count, limit))?;
        self.used.insert(base, Range { count, listeners: 0 });
        // Its service may yet be left out.
        self.left.push(base);
        self.cursor = base + count;
        Some(base)
    }

    fn fit(&self, from: u32, count: u32, limit: u32) -> Option<u32> {
        let mut base = from;
        if let Some((before, taken)) = self.used.range(..from).next_back() {
            base = base.max(before + taken.count);
        }
        for (next, taken) in self.used.range(from..) {
            if base.checked_add(count)? <= *next {
                break;
            }
            base = base.max(next + taken.count);
        }
        (base.checked_add(count)? <= limit).then_some(base)
    }
}

/// The bits of the port filter, and how many listeners and backends ask for each.
#[derive(Debug, Default)]
pub(super) struct Marks {
    wanted: HashMap<(u32, u64), u32>,
    /// Words that may have changed.
    touched: BTreeSet<u32>,
}

impl Marks {
    /// Somebody asks for a bit.
    pub fn add(&mut self, mark: (u32, u64)) {
        *self.wanted.entry(mark).or_default() += 1;
        self.touched.insert(mark.0);
    }

    /// Somebody no longer does.
    pub fn remove(&mut self, mark: (u32, u64)) {
        if let Entry::Occupied(mut wanted) = self.wanted.entry(mark) {
            *wanted.get_mut() -= 1;
            if *wanted.get() == 0 {
                wanted.remove();
            }
            self.touched.insert(mark.0);
        }
    }

    pub fn write(&mut self, filter: &mut TableDiff<'_, u32, u64>) {
        for word in std::mem::take(&mut self.touched) {
            let wanted =
                (0..u64::BITS).map(|bit| 1 << bit).filter(|bit| self.wanted.contains_key(&(word, *bit)));
            match wanted.fold(0, |bits, bit| bits | bit) {
                0 => filter.remove(word),
                bits => filter.set(word, bits),
            }
        }
    }
}
