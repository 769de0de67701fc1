//! The protocol of the connection table, model-checked: loom runs every interleaving of the threads. Tables are as small as
//! they can be and still overflow: sets of two lines.
//!
//! Each access of a word is a read-modify-write. Of all accesses of a word loom remembers the last alone, and looks for races
//! with no other: a thread that loads a word before it swaps it, which is what the protocol does everywhere, would hide that
//! another has loaded it before. So memory is sequentially consistent here; what may be read late is the programs' to see to.
//!
//! Three threads are checked up to a bound of preemptions (`LOOM_MAX_PREEMPTIONS`, two unless it says otherwise), two
//! threads without.

use std::sync::Arc;

use loom::{
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire},
    },
    thread,
};

use super::{
    line::{ALIAS, ALIASED, ANSWERED, CLIENT_FIN, Control, ESTABLISHED, ONE_WAY, RESET, TASK_FIN, UDP},
    table::{
        At, Longest, SPILLED, SharedSet, claim, claim_anew, find, gather, remove, settle_anew,
        settle_at_home, settle_elsewhere, victim,
    },
};

/// What a line is about: its five-tuple, and a word that its maker wrote beside it.
#[derive(Default)]
struct Way {
    control: AtomicU64,
    home: AtomicU32,
    key: AtomicU32,
    body: AtomicU32,
}

/// Two lines.
type Words = [Way; 2];

#[derive(Clone, Copy)]
struct ModelSet<'a>(&'a Words);

impl ModelSet<'_> {
    fn way(&self, way: u32) -> &Way {
        &self.0[way as usize & 1]
    }
}

impl SharedSet for ModelSet<'_> {
    const WAYS: u32 = 2;

    fn control(self, way: u32) -> Control {
        Control(self.way(way).control.fetch_or(0, AcqRel))
    }

    fn control_after(self, way: u32, _read: u64) -> Control {
        self.control(way)
    }

    fn swap_control(self, way: u32, from: Control, to: Control) -> bool {
        self.way(way).control.compare_exchange(from.0, to.0, AcqRel, Acquire).is_ok()
    }

    fn publish(self, way: u32, to: Control) {
        self.way(way).control.swap(to.0, AcqRel);
    }

    fn home(self, way: u32) -> u32 {
        self.way(way).home.fetch_or(0, AcqRel)
    }

    fn swap_home(self, way: u32, from: u32, to: u32) -> bool {
        self.way(way).home.compare_exchange(from, to, AcqRel, Acquire).is_ok()
    }

    fn clear_hints(self, way: u32, bits: u32) {
        self.way(way).home.fetch_and(!bits, AcqRel);
    }

    fn set_hints(self, way: u32, bits: u32) {
        self.way(way).home.fetch_or(bits, AcqRel);
    }

    fn seen(self, _way: u32) -> u32 {
        0
    }
}

/// Two sets: all endpoints' home is the first way of the first, and what does not fit there goes to the second.
#[derive(Default)]
struct Table([Words; 2]);

/// An established connection gives way to nobody; a half-open one does.
const KEPT: u32 = ANSWERED | ESTABLISHED;
const HALF_OPEN: u32 = 0;
const HOME: u32 = 0;
const NOW: u32 = 0;
const LONGEST: Longest = Longest { jiffies: [1_000; 8] };

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Inserted {
    /// In this set, so.
    New(usize, At),
    /// It was there.
    Found,
    /// No line gives way.
    Full,
    /// Others were at work each time that it was tried.
    GaveUp,
}

/// Tries of an insertion. The programs make four; what goes wrong goes wrong in two, and each more is a multiple of the
/// interleavings.
const TRIES: usize = 2;

impl Table {
    fn set(&self, number: usize) -> ModelSet<'_> {
        ModelSet(&self.0[number])
    }

    /// The line of a key, and the body that was read of it; the home word from before the search, and whether a line was
    /// claimed.
    fn look(&self, key: u32) -> (Option<(usize, At, u32)>, u32, bool) {
        let (mut busy, mut body) = (0, 0);
        let hints = self.set(0).home(HOME);
        let search = |number: usize, hints: u32, busy: &mut u32, body: &mut u32| {
            let set = self.set(number);
            find(set, HOME, hints, busy, |way, _| {
                let words = set.way(way);
                let is = words.key.fetch_or(0, AcqRel) == key;
                *body = words.body.fetch_or(0, AcqRel);
                is.then_some(u64::from(*body))
            })
        };
        if let Some(at) = search(0, hints, &mut busy, &mut body) {
            return (Some((0, at, body)), hints, busy != 0);
        }
        if hints & SPILLED != 0 {
            let other = self.set(1).home(HOME);
            if let Some(at) = search(1, other, &mut busy, &mut body) {
                return (Some((1, at, body)), hints, busy != 0);
            }
        }
        (None, hints, busy != 0)
    }

    /// Inserts as the programs do.
    fn insert(&self, key: u32, body: u32, state: u32) -> Inserted {
        (0..TRIES).find_map(|_| self.try_insert(key, body, state)).unwrap_or(Inserted::GaveUp)
    }

    /// `None` is "look again".
    fn try_insert(&self, key: u32, body: u32, state: u32) -> Option<Inserted> {
        let (found, hints, busy) = self.look(key);
        if found.is_some() {
            return Some(Inserted::Found);
        }
        if busy {
            return None;
        }
        self.settle_new(hints, key, body, state)
    }

    /// Inserts a connection to a task, which its body names, as the programs do: unless the task has the client already.
    fn insert_to_task(&self, key: u32, task: u32) -> Inserted {
        let once = |_| {
            let (found, hints, busy) = self.look(key);
            if found.is_some() || self.has_task(task)? {
                return Some(Inserted::Found);
            }
            if busy { None } else { self.settle_new(hints, key, task, KEPT) }
        };
        (0..TRIES).find_map(once).unwrap_or(Inserted::GaveUp)
    }

    /// Gives a line anew to its key, with a connection to a task.
    fn give_anew(&self, at: At, key: u32, task: u32) -> Inserted {
        let (found, hints, _) = self.look(key);
        assert!(found.is_some(), "nobody else touches this key");
        let set = self.set(0);
        let once = || {
            if self.has_task(task)? {
                return Some(Inserted::Found);
            }
            let claim = claim_anew(set, at)?;
            set.way(at.way).body.swap(task, AcqRel);
            let control = settle_anew((set, HOME), hints, set, claim, KEPT)?;
            Some(Inserted::New(0, At { way: at.way, control }))
        };
        once().unwrap_or_else(|| self.insert_to_task(key, task))
    }

    /// Whether a line is of a task; `None` is "look again".
    fn has_task(&self, task: u32) -> Option<bool> {
        let (mut busy, set) = (0, self.set(0));
        let is = |way, _| {
            let body = set.way(way).body.fetch_or(0, AcqRel);
            (body == task).then_some(u64::from(body))
        };
        let found = find(set, HOME, set.home(HOME), &mut busy, is);
        if found.is_none() && busy != 0 { None } else { Some(found.is_some()) }
    }

    /// Inserts what was not found; the home word is from before the search.
    fn settle_new(&self, hints: u32, key: u32, body: u32, state: u32) -> Option<Inserted> {
        let (home, other) = (self.set(0), self.set(1));
        let at_home = victim(home, HOME, NOW, &LONGEST);
        let (number, chosen) =
            if at_home.is_there() { (0, at_home) } else { (1, victim(other, HOME, NOW, &LONGEST)) };
        if !chosen.is_there() {
            return Some(Inserted::Full);
        }
        let set = self.set(number);
        let claim = claim(set, HOME, chosen, NOW, &LONGEST)?;
        set.way(claim.way).key.swap(key, AcqRel);
        set.way(claim.way).body.swap(body, AcqRel);
        let settled = if number == 0 {
            settle_at_home(set, HOME, hints, claim, state)
        } else {
            settle_elsewhere((home, HOME), hints, (set, HOME), claim, state)
        };
        settled.map(|control| Inserted::New(number, At { way: claim.way & 1, control }))
    }

    /// All lines that are somebody's: key and body. Nobody may be at work: every line is hinted at, every hint leads to one,
    /// none is claimed, and what lies in the second set is told at home.
    fn at_rest(&self) -> Vec<(u32, u32)> {
        let mut lines = Vec::new();
        for number in 0..2 {
            let set = self.set(number);
            for way in 0..2 {
                let control = set.control(way);
                assert!(!control.is_claimed(), "a claim is left");
                let hint = set.home(control.home()) & 1 << (control.home() ^ way);
                assert!(!control.is_live() || hint != 0, "a line nobody finds");
                for home in 0..2 {
                    let hinted = set.home(home) & 1 << (home ^ way) != 0;
                    assert!(
                        !hinted || control.is_live() && control.home() == home,
                        "a hint to nobody's line"
                    );
                }
                if control.is_live() {
                    let words = set.way(way);
                    lines.push((words.key.fetch_or(0, AcqRel), words.body.fetch_or(0, AcqRel)));
                    assert!(number == 0 || self.set(0).home(HOME) & SPILLED != 0, "nobody looks there");
                }
            }
        }
        lines.sort_unstable();
        lines
    }
}

fn new<const N: usize>(inserted: [Inserted; N]) -> usize {
    inserted.iter().filter(|inserted| matches!(inserted, Inserted::New(..))).count()
}

/// Runs every interleaving; `bound` preemptions at most, or all.
fn model(bound: Option<usize>, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(bound);
    builder.check(test);
}

#[test]
fn of_two_that_insert_a_key_one_looks_again_and_finds_it() {
    model(None, || {
        let table = Arc::new(Table::default());
        let other = table.clone();
        let one = thread::spawn(move || other.insert(1, 10, KEPT));
        let two = table.insert(1, 20, KEPT);
        let one = one.join().unwrap();
        assert_eq!(new([one, two]), 1, "{one:?} {two:?}");
        assert_eq!(table.at_rest().len(), 1);
    });
}

#[test]
fn three_that_insert_two_keys_leave_a_line_of_each() {
    model(Some(2), || {
        let table = Arc::new(Table::default());
        let threads = [1, 2].map(|key| {
            let table = table.clone();
            thread::spawn(move || table.insert(key, key * 10, KEPT))
        });
        let third = table.insert(1, 30, KEPT);
        let others = threads.map(|thread| thread.join().unwrap());
        assert!(new([others[0], third]) <= 1, "{others:?} {third:?}");
        assert_eq!(new([others[0], others[1], third]), table.at_rest().len(), "{others:?} {third:?}");
        assert!(table.look(1).0.is_some() || new([others[0], third]) == 0);
    });
}

#[test]
fn what_has_no_place_at_home_lies_elsewhere_once_and_is_found() {
    model(Some(2), || {
        let table = Arc::new(Table::default());
        // One way of the home set is left.
        assert!(matches!(table.insert(9, 90, KEPT), Inserted::New(0, _)));
        let threads = [1, 2].map(|key| {
            let table = table.clone();
            thread::spawn(move || table.insert(key, key * 10, KEPT))
        });
        let third = table.insert(2, 30, KEPT);
        let others = threads.map(|thread| thread.join().unwrap());
        assert!(new([others[1], third]) <= 1, "{others:?} {third:?}");
        let lines = table.at_rest();
        assert_eq!(new([others[0], others[1], third]) + 1, lines.len(), "{others:?} {third:?}");
        assert!(lines.iter().all(|(key, _)| table.look(*key).0.is_some()));
    });
}

#[test]
fn a_line_that_is_given_away_is_never_read_as_anothers() {
    model(Some(2), || {
        let table = Arc::new(Table::default());
        // Both ways of home are taken by connections that give way, the other set by some that do not.
        for (key, state) in [(1, HALF_OPEN), (2, HALF_OPEN)] {
            assert!(matches!(table.insert(key, key * 10, state), Inserted::New(0, _)));
        }
        let thief = table.clone();
        let thief = thread::spawn(move || thief.insert(3, 30, KEPT));
        let reader = table.clone();
        let reader = thread::spawn(move || reader.look(1).0.map(|(.., body)| body));
        let read = table.look(2).0.map(|(.., body)| body);
        assert!(read.is_none_or(|body| body == 20), "{read:?}");
        let read = reader.join().unwrap();
        assert!(read.is_none_or(|body| body == 10), "{read:?}");
        assert!(matches!(thief.join().unwrap(), Inserted::New(0, _)));
        assert_eq!(table.at_rest().iter().filter(|(key, _)| *key == 3).count(), 1);
    });
}

#[test]
fn of_removing_and_changing_a_line_one_is_done() {
    model(None, || {
        let table = Arc::new(Table::default());
        let Inserted::New(_, at) = table.insert(1, 10, HALF_OPEN) else { panic!("the table is empty") };
        let other = table.clone();
        let removed = thread::spawn(move || remove(other.set(0), at, || true));
        let established = table.set(0).swap_control(at.way, at.control, at.control.with_state(KEPT));
        assert_ne!(removed.join().unwrap(), established);
        assert_eq!(table.at_rest().len(), usize::from(established));
    });
}

#[test]
fn a_key_that_is_removed_inserted_and_given_anew_at_once_has_one_line_at_most() {
    model(Some(2), || {
        let table = Arc::new(Table::default());
        let Inserted::New(_, at) = table.insert(1, 10, HALF_OPEN) else { panic!("the table is empty") };
        let other = table.clone();
        let removed = thread::spawn(move || remove(other.set(0), at, || true));
        let other = table.clone();
        let anew = thread::spawn(move || {
            let set = other.set(0);
            let hints = set.home(HOME);
            let claim = claim_anew(set, at)?;
            set.way(at.way).body.swap(11, AcqRel);
            Some(settle_anew((set, HOME), hints, set, claim, HALF_OPEN).is_some())
        });
        let inserted = table.insert(1, 12, HALF_OPEN);
        let (removed, anew) = (removed.join().unwrap(), anew.join().unwrap());
        assert!(!(removed && anew.is_some()), "both had the line");
        let lines = table.at_rest();
        assert!(lines.len() <= 1, "{lines:?}, {inserted:?}");
        // One that another insertion came before has given the line up.
        let kept = usize::from(!removed && anew != Some(false));
        assert_eq!(lines.len(), kept + new([inserted]), "{lines:?}");
    });
}

/// One client port by two listeners or nodes, at once.
#[test]
fn a_task_never_has_a_client_twice() {
    model(None, || {
        let table = Arc::new(Table::default());
        let other = table.clone();
        let one = thread::spawn(move || other.insert_to_task(1, 10));
        let two = table.insert_to_task(2, 10);
        let one = one.join().unwrap();
        assert!(new([one, two]) <= 1, "{one:?} {two:?}");
        assert_eq!(table.at_rest().len(), new([one, two]));
    });
}

#[test]
fn nor_when_a_line_is_given_anew_meanwhile() {
    model(Some(3), || {
        let table = Arc::new(Table::default());
        // A connection that is over, to another task.
        let Inserted::New(0, at) = table.insert(1, 11, HALF_OPEN) else { panic!("the table is empty") };
        let other = table.clone();
        let anew = thread::spawn(move || other.give_anew(at, 1, 10));
        let inserted = table.insert_to_task(2, 10);
        let anew = anew.join().unwrap();
        let lines = table.at_rest();
        let to_task = lines.iter().filter(|(_, task)| *task == 10).count();
        assert_eq!(to_task, new([anew, inserted]), "{anew:?} {inserted:?} {lines:?}");
        assert!(to_task <= 1, "{lines:?}");
    });
}

#[test]
fn a_home_that_is_gathered_loses_no_line_that_spills_meanwhile() {
    model(None, || {
        let table = Arc::new(Table::default());
        for key in [1, 2] {
            assert!(matches!(table.insert(key, key * 10, KEPT), Inserted::New(0, _)));
        }
        // What spilled is gone, and the mark is left.
        let Inserted::New(1, at) = table.insert(3, 30, KEPT) else { panic!("home is full") };
        assert!(remove(table.set(1), at, || true));
        let other = table.clone();
        let spilling = thread::spawn(move || other.insert(4, 40, KEPT));
        let hints = table.set(0).home(HOME);
        let empty = (0..2).all(|way| table.set(1).control(way).is_free());
        if empty {
            gather(table.set(0), HOME, hints);
        }
        assert!(matches!(spilling.join().unwrap(), Inserted::New(1, _)));
        assert_eq!(table.at_rest().len(), 3);
        assert!(table.look(4).0.is_some());
    });
}

#[test]
fn who_is_missed_least_gives_way_first() {
    let orders = [
        // Closed, before a handshake.
        (CLIENT_FIN | TASK_FIN, HALF_OPEN),
        (RESET, HALF_OPEN),
        // What lingers of a closed connection, and no other alias.
        (ALIAS | RESET, HALF_OPEN),
        (ALIAS | ALIASED | RESET, UDP | ANSWERED | ESTABLISHED),
        // Datagrams of one side, before those that were answered.
        (UDP, UDP | ANSWERED | ESTABLISHED),
        // A handshake, before what goes on though its replies pass elsewhere, and that before answered datagrams.
        (HALF_OPEN, ONE_WAY | ESTABLISHED),
        (ONE_WAY | ESTABLISHED, UDP | ANSWERED | ESTABLISHED),
    ];
    for (first, second) in orders {
        for ways in [[first, second], [second, first]] {
            model(None, move || {
                let table = Table::default();
                let set = table.set(0);
                for (way, state) in (0..).zip(ways) {
                    set.publish(way, Control::default().claimed().live(HOME, state));
                }
                let victim = victim(set, HOME, NOW, &LONGEST);
                assert!(victim.is_there());
                assert_eq!(ways[victim.offset as usize], first, "{ways:?}");
            });
        }
    }
    // An established one never does, nor does an alias.
    for kept in [KEPT, ALIAS] {
        model(None, move || {
            let table = Table::default();
            (0..2).for_each(|way| table.set(0).publish(way, Control::default().claimed().live(HOME, kept)));
            assert!(!victim(table.set(0), HOME, NOW, &LONGEST).is_there());
            assert!(victim(table.set(0), HOME, 1_001, &LONGEST).is_there(), "but when its timer has run out");
        });
    }
}
