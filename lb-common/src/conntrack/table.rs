//! The protocol of the connection table: how CPUs find, make, change and give up lines without a lock and without waiting.
//! One text for the programs, on the kernel's memory, and for the model (`table_tests`), on loom's.
//!
//! Who has what:
//!
//! - A line belongs to the endpoint that its five-tuple begins with. The endpoint's hash names its *home*: a set and a way of
//!   it. The [`home word`](super::Line::home) there has a hint for each way of the set that holds a line whose home that is.
//! - Two lines of an endpoint lie in its home set. The next go to the emptier of two other sets, which the hash of the whole
//!   five-tuple names; the home word then says [`SPILLED`]. Neither is the home set, nor are they one.
//! - A line is found only if it is hinted at, live, and of the five-tuple that is sought. A claimed line is its claimer's alone.
//!
//! Every insertion for an endpoint, wherever its line comes to lie, ends in one compare-and-swap of the endpoint's home word,
//! from the value that was read *before* the search for what is to be inserted. So whatever was inserted for this endpoint
//! since then is noticed, and one of two that insert at once looks again. A hinted line that is claimed during the search means
//! the same: it may be becoming what is sought.
//!
//! | step | of an insertion | what others see |
//! |---|---|---|
//! | 1 | read the home word, search | |
//! | 2 | choose the line that is given up | |
//! | 3 | its control word: live → claimed, next version | its old owner finds it no more |
//! | 4 | take away the hint to it in its old home | |
//! | 5 | write it | claimed: nobody reads |
//! | 6 | in another set: set the hint there | who seeks it: busy, look again |
//! | 7 | home word: value of step 1 → one insertion more, and the hint or [`SPILLED`] | the endpoint's other insertions fail at their step 7 |
//! | 8 | its control word: claimed → live | found |
//!
//! If step 7 fails, what was set in step 6 is taken back and the line is freed. A change of state is one compare-and-swap of the
//! control word. A line is removed by steps 3 and 4 and freed; a line is given anew to the same five-tuple by steps 3, 5, 7 and 8.
//!
//! What must not be twice for an endpoint is looked for after step 1, and again whenever an insertion has to look again: the
//! five-tuple itself, and the pair of the client's endpoint and the task's by which a reply finds its connection.

use super::{
    line::{ALIAS, ANSWERED, CLIENT_FIN, Control, ESTABLISHED, RESET, TASK_FIN, UDP},
    timers::elapsed,
};
use crate::{pod, verifier::opaque};

/// In a home word: lines of this home may lie in other sets.
pub const SPILLED: u32 = 1 << 8;
/// One insertion more, in the upper half of a home word.
const INSERTION: u32 = 1 << 16;
/// The hints in a home word.
const HINTS: u32 = 0xff;
/// Lines of one endpoint that its home set takes before the others are asked.
pub const AT_HOME: u32 = 2;

/// The words of a set that several CPUs use. Ways count from the start of the set.
pub trait SharedSet: Copy {
    /// Lines of a set, a power of two.
    const WAYS: u32;

    /// The control word. What is read of the line afterwards is at least as new.
    fn control(self, way: u32) -> Control;
    /// The control word, read after what `read` was made of.
    fn control_after(self, way: u32, read: u64) -> Control;
    /// Compare-and-swap of the control word.
    fn swap_control(self, way: u32, from: Control, to: Control) -> bool;
    /// Writes the control word of a claimed line, after all that was written before.
    fn publish(self, way: u32, to: Control);
    /// The home word.
    fn home(self, way: u32) -> u32;
    /// Compare-and-swap of the home word, after all that was written before.
    fn swap_home(self, way: u32, from: u32, to: u32) -> bool;
    /// Clears bits of the home word.
    fn clear_hints(self, way: u32, bits: u32);
    /// Sets bits of the home word.
    fn set_hints(self, way: u32, bits: u32);
    /// When the line was last seen.
    fn seen(self, way: u32) -> u32;
}

/// A line and what its control word was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct At {
    /// Way of the set.
    pub way: u32,
    /// The control word by which it was found.
    pub control: Control,
}

/// Goes through the lines whose home is this way, the way's own first: what `each` says of one ends it.
#[inline(always)]
pub fn each_hinted<S: SharedSet, T>(
    home: u32,
    hints: u32,
    mut each: impl FnMut(u32) -> Option<T>,
) -> Option<T> {
    let mut left = hints & HINTS;
    let mut offset = 0;
    // 75 to 99 of a hundred end with the first.
    while offset < S::WAYS && left != 0 {
        if left & 1 != 0
            && let Some(done) = each(home ^ offset)
        {
            return Some(done);
        }
        left >>= 1;
        offset += 1;
    }
    None
}

/// Finds the line that `is` recognizes among those whose home is this way: what it has read of it, in one word. `busy` is set
/// to one if one of them is claimed.
#[inline(always)]
pub fn find<S: SharedSet>(
    set: S,
    home: u32,
    hints: u32,
    busy: &mut u32,
    mut is: impl FnMut(u32, Control) -> Option<u64>,
) -> Option<At> {
    each_hinted::<S, At>(home, hints, |way| {
        let control = set.control(way);
        if !control.is_live() {
            if control.is_claimed() {
                *busy = 1;
            }
            return None;
        }
        let read = is(way, control)?;
        let again = set.control_after(way, read);
        if again.is_live() && again.version() == control.version() {
            return Some(At { way, control });
        }
        // Taken meanwhile, maybe for the very one that is sought.
        *busy = 1;
        None
    })
}

/// The longest silences by class, in jiffies: what is silent for longer has ended, whatever its service's own timer is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Longest {
    /// By [`KEPT`] and those after it.
    pub jiffies: [u32; 8],
}

/// Established TCP, and aliases that do not linger: they give way to nothing but their timer.
pub const KEPT: u64 = 1;
/// Datagrams that were answered.
pub const EXCHANGE: u64 = 2;
/// TCP that goes on though its replies pass elsewhere: it may be forged, and lives as long as an established one if there is room.
pub const ONE_SIDED: u64 = 3;
/// Not established, or datagrams of one side alone.
pub const HALF_OPEN: u64 = 4;
/// Closed by both sides, or reset: nobody misses it.
pub const OVER: u64 = 5;
/// Silent for longer than the class's limit.
const EXPIRED: u64 = 6;
const FREE: u64 = 7;
const CLASS: u32 = 32;

/// How willingly a line is given up: zero not at all, above all others a free one; of one class the one that was silent for
/// longest. Without a branch, so that the verifier walks it once.
#[inline(always)]
fn worth(control: Control, seen: u32, now: u32, longest: &Longest) -> u64 {
    let state = control.state();
    let bit = |mask: u32| opaque((state & mask).wrapping_neg() as u64 >> 31 & 1);
    let both = |one: u64, other: u64| opaque(one & other);
    let heard = both(bit(ANSWERED), bit(ESTABLISHED));
    let one_sided = both(both(bit(ESTABLISHED), 1 - bit(ANSWERED)), 1 - bit(UDP));
    let over = bit(RESET) | both(bit(CLIENT_FIN), bit(TASK_FIN));
    let (udp, alias) = (bit(UDP), bit(ALIAS));
    let class = HALF_OPEN - heard * (HALF_OPEN - KEPT - udp) - one_sided * (HALF_OPEN - ONE_SIDED);
    let class = opaque(class + alias * KEPT - alias * class);
    let class = opaque(class + over * OVER - over * class);
    let age = elapsed(seen, now) as u64;
    let limit = longest.jiffies[(class & 7) as usize] as u64;
    let expired = opaque(limit.wrapping_sub(age) >> 63);
    // One that is kept and has not expired is worth nothing.
    let wanted = expired | opaque((KEPT.wrapping_sub(class)) >> 63);
    let class = class + expired * EXPIRED - expired * class;
    let live = control.is_live() as u64;
    let free = opaque((control.0 & 3).wrapping_sub(1) >> 63);
    (class << CLASS | age) * opaque(wanted & live) + (FREE << CLASS) * free
}

/// The greater of two, without a branch.
#[inline(always)]
fn greater(one: u64, other: u64) -> u64 {
    let difference = one.wrapping_sub(other);
    let mask = opaque(((difference as i64) >> 63) as u64);
    one.wrapping_sub(difference & mask)
}

/// The line of a set that is given up first.
#[derive(Clone, Copy, Debug)]
pub struct Victim {
    /// Its way XOR the home's.
    pub offset: u32,
    /// [`worth`]; zero if none is given up.
    worth: u64,
    /// How many lines nobody has.
    room: u32,
}

impl Victim {
    const NONE: Self = Self { offset: 0, worth: 0, room: 0 };

    /// Whether there is one.
    #[inline(always)]
    pub const fn is_there(&self) -> bool {
        self.worth != 0
    }

    /// How willingly it is given up: below [`OVER`] somebody would miss it.
    #[inline(always)]
    pub const fn class(&self) -> u64 {
        self.worth >> CLASS
    }

    /// Whether its set has more room than another's.
    #[inline(always)]
    pub const fn is_better_than(&self, other: &Self) -> bool {
        self.worth != 0 && (self.room > other.room || self.room == other.room && self.worth >= other.worth)
    }
}

/// Chooses what is given up for a line whose home is this way.
#[inline(always)]
pub fn victim<S: SharedSet>(set: S, home: u32, now: u32, longest: &Longest) -> Victim {
    let (mut best, mut room) = (0, 0);
    let mut offset = 0;
    while offset < S::WAYS {
        let way = home ^ offset;
        let worth = worth(set.control(way), set.seen(way), now, longest);
        room += opaque((EXPIRED << CLASS).wrapping_sub(worth + 1) >> 63) as u32;
        best = greater(best, worth << 3 | (7 - offset) as u64);
        offset += 1;
    }
    // The way itself comes first among equals: what lies there is found at the first look.
    Victim { offset: 7 - (best & 7) as u32, worth: best >> 3, room }
}

/// The same, if it is only asked whether the way itself is free: most are.
#[inline(always)]
pub fn own_way_if_free<S: SharedSet>(set: S, home: u32) -> Option<Victim> {
    set.control(home).is_free().then_some(Victim { worth: FREE << CLASS, room: 1, ..Victim::NONE })
}

/// A line that is being made.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Its way.
    pub way: u32,
    /// Its control word, claimed.
    pub control: Control,
    /// Whose it was: live, if it was given up for this.
    pub before: Control,
}

/// Claims the line that was chosen (steps 3 and 4); `None` if it was taken or used meanwhile.
#[inline(always)]
pub fn claim<S: SharedSet>(set: S, home: u32, victim: Victim, now: u32, longest: &Longest) -> Option<Claim> {
    let way = home ^ victim.offset;
    let before = set.control(way);
    if worth(before, set.seen(way), now, longest) < victim.worth
        || !set.swap_control(way, before, before.claimed())
    {
        return None;
    }
    if before.is_live() {
        set.clear_hints(before.home(), 1 << (before.home() ^ way));
    }
    Some(Claim { way, control: before.claimed(), before })
}

/// Ends the insertion of a line that was claimed in its home's set and written (steps 7 and 8): its control word, or `None` if
/// something was inserted for the endpoint since `hints` was read, and the line is free again.
#[inline(always)]
pub fn settle_at_home<S: SharedSet>(
    set: S,
    home: u32,
    hints: u32,
    claim: Claim,
    state: u32,
) -> Option<Control> {
    let bit = 1 << (home ^ claim.way);
    // If what was given up was of this home, its hint is gone already.
    let expected = hints & !bit;
    if !set.swap_home(home, expected, expected.wrapping_add(INSERTION) | bit) {
        set.publish(claim.way, claim.control.free());
        return None;
    }
    let live = claim.control.live(home, state);
    set.publish(claim.way, live);
    Some(live)
}

/// The same of a line in another set (steps 6 to 8).
#[inline(always)]
pub fn settle_elsewhere<S: SharedSet>(
    (home_set, home): (S, u32),
    hints: u32,
    (set, other): (S, u32),
    claim: Claim,
    state: u32,
) -> Option<Control> {
    let bit = 1 << (other ^ claim.way);
    set.set_hints(other, bit);
    if !home_set.swap_home(home, hints, hints.wrapping_add(INSERTION) | SPILLED) {
        set.clear_hints(other, bit);
        set.publish(claim.way, claim.control.free());
        return None;
    }
    let live = claim.control.live(other, state);
    set.publish(claim.way, live);
    Some(live)
}

/// Claims a line that is to be given anew to its own five-tuple (step 3); `None` if it was changed meanwhile.
#[inline(always)]
pub fn claim_anew<S: SharedSet>(set: S, at: At) -> Option<Claim> {
    let control = at.control.claimed();
    set.swap_control(at.way, at.control, control).then_some(Claim {
        way: at.way,
        control,
        before: at.control,
    })
}

/// Ends the giving anew of a line that was claimed and written (steps 7 and 8): its control word, or `None` if something was
/// inserted for the endpoint since `hints` was read, and the line is free.
#[inline(always)]
pub fn settle_anew<S: SharedSet>(
    (home_set, home): (S, u32),
    hints: u32,
    set: S,
    claim: Claim,
    state: u32,
) -> Option<Control> {
    // The home of the line's own set, which is another than the endpoint's if it lies elsewhere.
    let own = claim.before.home();
    if !home_set.swap_home(home, hints, hints.wrapping_add(INSERTION)) {
        set.clear_hints(own, 1 << (own ^ claim.way));
        set.publish(claim.way, claim.control.free());
        return None;
    }
    let live = claim.control.live(own, state);
    set.publish(claim.way, live);
    Some(live)
}

/// Removes a line; false if it was changed meanwhile. `still` is asked once the line is claimed, and may have it put back.
#[inline(always)]
pub fn remove<S: SharedSet>(set: S, at: At, still: impl FnOnce() -> bool) -> bool {
    let claimed = at.control.claimed();
    if !set.swap_control(at.way, at.control, claimed) {
        return false;
    }
    if !still() {
        set.publish(at.way, at.control);
        return false;
    }
    set.clear_hints(at.control.home(), 1 << (at.control.home() ^ at.way));
    set.publish(at.way, claimed.free());
    true
}

/// Says that no line of a home lies in other sets any more, as was found after `hints` was read: that the other sets' lines are
/// free, or of other homes. One that is claimed may be of this home and told of already (between steps 7 and 8). False if
/// something was inserted for its endpoints meanwhile.
#[inline(always)]
pub fn gather<S: SharedSet>(set: S, home: u32, hints: u32) -> bool {
    set.swap_home(home, hints, hints & !SPILLED)
}

const _: () = assert!(size_of::<Longest>() == 32);

pod!(Longest);
