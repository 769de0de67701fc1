//! A table as it is, and what is to become of some of its entries: what does not change is neither copied nor compared.

use std::collections::BTreeMap;

/// A table and its changes.
pub(super) struct TableDiff<'a, K, V> {
    /// As it is.
    pub base: &'a BTreeMap<K, V>,
    /// What differs: the new value, or none where the entry goes.
    changes: BTreeMap<K, Option<V>>,
}

impl<'a, K: Ord + Clone, V: PartialEq> TableDiff<'a, K, V> {
    /// Without changes.
    pub fn new(base: &'a BTreeMap<K, V>) -> Self {
        Self { base, changes: BTreeMap::new() }
    }

    /// What the entry is to be.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.changes.get(key).map_or_else(|| self.base.get(key), Option::as_ref)
    }

    /// Whether there is to be such an entry.
    pub fn contains(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    /// Says what the entry is to be.
    pub fn set(&mut self, key: K, value: V) {
        if self.base.get(&key) == Some(&value) {
            self.changes.remove(&key);
        } else {
            self.changes.insert(key, Some(value));
        }
    }

    /// Says that there is to be no such entry.
    pub fn remove(&mut self, key: K) {
        if self.base.contains_key(&key) {
            self.changes.insert(key, None);
        } else {
            self.changes.remove(&key);
        }
    }

    /// Says what all entries are to be.
    pub fn replace(&mut self, entries: BTreeMap<K, V>) {
        for key in self.base.keys().filter(|key| !entries.contains_key(key)) {
            self.remove(key.clone());
        }
        for (key, value) in entries {
            self.set(key, value);
        }
    }

    /// All entries as they are to be; those that do not change first.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let stay = self.base.iter().filter(|(key, _)| !self.changes.contains_key(key));
        stay.chain(self.changes.iter().filter_map(|(key, change)| Some((key, change.as_ref()?))))
    }

    /// Keys of the entries that go.
    pub fn gone(&self) -> impl Iterator<Item = &K> {
        self.changes.iter().filter(|(_, change)| change.is_none()).map(|(key, _)| key)
    }

    /// What is to be written, and what is to be removed.
    pub fn split(self) -> (Vec<(K, V)>, Vec<K>) {
        let (mut set, mut gone) = (Vec::new(), Vec::new());
        for (key, change) in self.changes {
            match change {
                Some(value) => set.push((key, value)),
                None => gone.push(key),
            }
        }
        (set, gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_a_change() {
        let base = BTreeMap::from([(1, 'a'), (2, 'b'), (3, 'c')]);
        let mut table = TableDiff::new(&base);
        for key in [1, 2, 4] {
            table.remove(key);
        }
        table.set(1, 'a');
        table.set(5, 'e');
        assert_eq!([1, 2, 3, 5].map(|key| table.get(&key).copied()), [Some('a'), None, Some('c'), Some('e')]);
        assert_eq!(table.gone().copied().collect::<Vec<_>>(), [2]);
        assert_eq!(table.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [1, 3, 5]);
        table.replace(BTreeMap::from([(1, 'a'), (5, 'f')]));
        assert_eq!(table.split(), (vec![(5, 'f')], vec![2, 3]));
    }
}
