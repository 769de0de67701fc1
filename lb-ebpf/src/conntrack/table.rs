//! The connection table in the kernel's memory. Only this file touches a line; the protocol is
//! [`lb_common::conntrack::table`]'s.

use lb_common::{
    backend::{Backend, Kind, State},
    conntrack::{
        Control, FiveTuple, Line, Set,
        hash::{self, Place},
        line::{self, ALIAS, ALIAS_KEY, CONNECTION, RESET, WAYS},
        table::{self, AT_HOME, At, Claim, OVER, SPILLED, SharedSet},
    },
    net::Be16,
    verifier::zero_of,
};

use super::tracked::Tracked;
use crate::io::{
    atomic, clock, counters,
    family::Family,
    maps::{self, BACKENDS, SERVICES},
    packet::{Connection, Draft, Located, NOBODY, Packet, Search},
    verifier::opaque,
};

/// A set in the kernel's memory.
struct KernelSet<A: 'static>(*mut Set<A>);

impl<A> Clone for KernelSet<A> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for KernelSet<A> {}

impl<A> KernelSet<A> {
    /// The line of a way. The mask tells the verifier what the ways of a set are.
    #[inline(always)]
    fn line(self, way: u32) -> *mut Line<A> {
        let way = opaque(way as u64) as usize & (WAYS as usize - 1);
        // SAFETY: a set has so many lines.
        unsafe { self.0.cast::<Line<A>>().byte_add(way * size_of::<Line<A>>()) }
    }
}

// SAFETY of all that follows: a table's value is valid while the program runs, its words are aligned, and they are read and
// written by volatile or atomic accesses alone.
impl<A> SharedSet for KernelSet<A> {
    const WAYS: u32 = WAYS;

    #[inline(always)]
    fn control(self, way: u32) -> Control {
        // SAFETY: see above.
        Control(unsafe { (&raw const (*self.line(way)).control).read_volatile() })
    }

    #[inline(always)]
    fn control_after(self, way: u32, read: u64) -> Control {
        // SAFETY: see above.
        Control(unsafe { (&raw const (*self.line(way)).control).byte_add(zero_of(read)).read_volatile() })
    }

    #[inline(always)]
    fn swap_control(self, way: u32, from: Control, to: Control) -> bool {
        swap_control(self.line(way), from, to)
    }

    #[inline(always)]
    fn publish(self, way: u32, to: Control) {
        publish(self.line(way), to);
    }

    #[inline(always)]
    fn home(self, way: u32) -> u32 {
        // SAFETY: see above.
        unsafe { (&raw const (*self.line(way)).home).read_volatile() }
    }

    #[inline(always)]
    fn swap_home(self, way: u32, from: u32, to: u32) -> bool {
        // SAFETY: see above.
        unsafe { atomic::swap_if32(&raw mut (*self.line(way)).home, from, to) }
    }

    #[inline(always)]
    fn clear_hints(self, way: u32, bits: u32) {
        // SAFETY: see above.
        unsafe { atomic::fetch_and(&raw mut (*self.line(way)).home, !bits) };
    }

    #[inline(always)]
    fn set_hints(self, way: u32, bits: u32) {
        // SAFETY: see above.
        unsafe { atomic::fetch_or(&raw mut (*self.line(way)).home, bits) };
    }

    #[inline(always)]
    fn seen(self, way: u32) -> u32 {
        // SAFETY: see above.
        unsafe { (&raw const (*self.line(way)).seen).read_volatile() }
    }
}

#[inline(always)]
fn swap_control<A>(line: *mut Line<A>, from: Control, to: Control) -> bool {
    // SAFETY: see above.
    unsafe { atomic::swap_if64(&raw mut (*line).control, from.0, to.0) }
}

/// An exchange, which orders what was written before on every processor.
#[inline(always)]
fn publish<A>(line: *mut Line<A>, to: Control) {
    // SAFETY: see above.
    unsafe { atomic::swap(&raw mut (*line).control, to.0) };
}

#[inline(always)]
fn set<A: Family>(index: u32) -> Option<KernelSet<A>> {
    A::CONNECTIONS.get_ptr_mut(index).map(KernelSet)
}

/// A line that is somebody's, as other CPUs may be writing it: fields are read and written one by one. What cannot change is
/// the line's own as long as its control word has the version that it was found by; a number or a time that is written a moment
/// after the line was given away is wrong in its next owner's, until that one's next packet.
pub struct Entry<A> {
    line: *mut Line<A>,
}

macro_rules! fields {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty,)+) => {$(
        $(#[doc = $doc])+
        #[inline(always)]
        pub fn $name(&self) -> $type {
            // SAFETY: see above.
            unsafe { (&raw const (*self.line).$name).read_volatile() }
        }
    )+};
}

macro_rules! notes {
    ($($(#[doc = $doc:literal])+ $set:ident: $name:ident: $type:ty,)+) => {$(
        $(#[doc = $doc])+
        #[inline(always)]
        pub fn $set(&self, value: $type) {
            // Only where it changes something, so that CPUs do not take a busy line from each other.
            if self.$name() != value {
                // SAFETY: see above.
                unsafe { (&raw mut (*self.line).$name).write_volatile(value) };
            }
        }
    )+};
}

impl<A: Family> Entry<A> {
    fields! {
        /// [`Line::seen`].
        seen: u32,
        /// [`Line::backend`].
        backend: u32,
        /// [`Line::client_next`].
        client_next: u32,
        /// [`Line::task_next`].
        task_next: u32,
        /// [`Line::hop_seen`].
        hop_seen: u16,
        /// [`Line::peer`].
        peer: u16,
        /// [`Line::mac`].
        mac: [u16; 3],
        /// [`Line::port`].
        port: Be16,
        /// [`Line::mtu`].
        mtu: u16,
        /// [`Line::tci`].
        tci: [Be16; 2],
        /// [`Line::link`].
        link: u16,
    }

    notes! {
        /// Notes when the last packet was seen.
        set_seen: seen: u32,
        /// Notes how far the client has come.
        set_client_next: client_next: u32,
        /// Notes how far the task has come.
        set_task_next: task_next: u32,
        /// Notes when the next hop was asked for.
        set_hop_seen: hop_seen: u16,
        /// Notes through which node the client's packets come.
        set_peer: peer: u16,
        /// Notes the next hop's hardware address.
        set_mac: mac: [u16; 3],
        /// Notes what the way to the client lets pass.
        set_mtu: mtu: u16,
        /// Notes what is known of the client's link.
        set_link: link: u16,
    }

    /// The control word.
    #[inline(always)]
    pub fn control(&self) -> Control {
        // SAFETY: see above.
        Control(unsafe { (&raw const (*self.line).control).read_volatile() })
    }

    /// Changes the state from what it was; false if it was changed meanwhile.
    #[inline(always)]
    pub fn set_state(&self, from: Control, state: u32) -> bool {
        let backend = self.backend();
        let set = swap_control(self.line, from, from.with_state(state));
        if set {
            counters::heard(backend, from.state(), state);
        }
        set
    }

    /// Whether it was made for the task that the backend is now.
    #[inline(always)]
    pub fn is_of(&self, backend: &Backend) -> bool {
        // SAFETY: see above.
        let generation = unsafe { (&raw const (*self.line).tuple.generation).read_volatile() };
        generation == backend.generation as u16
    }

    /// Whether its connection has been silent for longer than its service's timer for it.
    #[inline(always)]
    pub fn is_silent(&self, control: Control, backend: &Backend) -> bool {
        let (now, seen) = (clock::now(), self.seen());
        clock::is_due(seen, now) && expired(control, seen, now, backend.service)
    }

    /// Copies its five-tuple, by words: a copy of the whole would be a call of a loop.
    #[inline(always)]
    pub fn copy_tuple(&self, to: &mut FiveTuple<A>) {
        // SAFETY: see above; both have so many words.
        unsafe {
            let (from, to) = ((&raw const (*self.line).tuple).cast::<u64>(), (&raw mut *to).cast::<u64>());
            let mut word = 0;
            while word < FiveTuple::<A>::WORDS {
                to.add(word).write_volatile(from.add(word).read_volatile());
                word += 1;
            }
        }
    }
}

/// A function of its own: few packets come to it.
#[inline(never)]
fn expired(control: Control, seen: u32, now: u32, service: u32) -> bool {
    let (Some(config), Some(settings)) = (maps::config(), SERVICES.get(service)) else {
        return false;
    };
    settings.timers.expired(control, seen, now, config.jiffies_per_second)
}

/// The line of a number.
#[inline(always)]
pub fn entry<A: Family>(slot: u32) -> Option<Entry<A>> {
    set::<A>(line::set_of(slot)).map(|set| Entry { line: set.line(line::way_of(slot)) })
}

/// What a search has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// [`Packet::line`] is the line.
    Line,
    /// There is none.
    Nothing,
    /// There may be one in a moment: another CPU is making or giving up a line of this endpoint.
    Busy,
    /// An alias whose connection is gone.
    DeadAlias,
}

impl Found {
    #[inline(always)]
    fn of(code: u32) -> Self {
        match code {
            0 => Self::Line,
            1 => Self::Nothing,
            2 => Self::Busy,
            _ => Self::DeadAlias,
        }
    }
}

/// Looks again so often while the answer is [`Found::Busy`]: another CPU holds a line for some hundred nanoseconds.
const LOOKS: u32 = 4;

/// Finds the line of a request, or an alias, by its five-tuple.
#[inline(always)]
pub fn find<A: Tracked>(tuple: &FiveTuple<A>, line: &mut Located, search: &mut Search) -> Found {
    for _ in 0..LOOKS {
        let found = Found::of(A::by_tuple(line, search, tuple));
        if found != Found::Busy {
            return found;
        }
    }
    Found::Busy
}

/// The home of an endpoint, kept in the search.
#[inline(always)]
fn begin<A: Family>(
    address: &A,
    port: Be16,
    protocol: u8,
    search: &mut Search,
) -> Option<(KernelSet<A>, Place)> {
    let config = maps::config()?;
    let endpoint = config.hash_keys.endpoint(address, port, protocol);
    let home = hash::home(endpoint, maps::sets());
    let set = set::<A>(home.set)?;
    search.set = home.set;
    search.way = home.way;
    search.hints = set.home(home.way);
    search.hash = [endpoint as u32, (endpoint >> 32) as u32];
    search.alias = NOBODY;
    search.busy = 0;
    Some((set, home))
}

/// The two other sets of a five-tuple whose endpoint the search began with.
#[inline(always)]
fn others<A: Family>(tuple: &FiveTuple<A>, search: &Search) -> [Place; 2] {
    let none = Place::default();
    let Some(config) = maps::config() else {
        return [none, none];
    };
    let endpoint = (search.hash[1] as u64) << 32 | search.hash[0] as u64;
    hash::others(search.set, config.hash_keys.tuple(endpoint, tuple), maps::sets())
}

/// Looks for a five-tuple among the lines whose home is a way of a set.
#[inline(always)]
fn among<A: Family>(
    set: KernelSet<A>,
    home: u32,
    hints: u32,
    tuple: &FiveTuple<A>,
    busy: &mut u32,
) -> Option<At> {
    table::find(set, home, hints, busy, |way, control| {
        // SAFETY: see `KernelSet`.
        let line = unsafe { &raw const (*set.line(way)).tuple };
        // SAFETY: as above; read after the control word.
        unsafe {
            let line = line.byte_add(zero_of(control.0));
            tuple.is_of(line).then(|| (&raw const (*line).generation).read_volatile() as u64)
        }
    })
}

/// Looks once for a five-tuple.
#[inline(always)]
pub fn by_tuple<A: Family>(line: &mut Located, search: &mut Search, tuple: &FiveTuple<A>) -> u32 {
    let Some((set, home)) = begin(&tuple.source, tuple.source_port, tuple.protocol, search) else {
        return Found::Nothing as u32;
    };
    if let Some(at) = among(set, home.way, search.hints, tuple, &mut search.busy) {
        locate(line, home.set, at);
        return Found::Line as u32;
    }
    if search.hints & SPILLED != 0 && spilled(tuple, line, search) {
        return Found::Line as u32;
    }
    if search.busy != 0 { Found::Busy as u32 } else { Found::Nothing as u32 }
}

/// Looks for a five-tuple in the two other sets.
#[inline(always)]
fn spilled<A: Family>(tuple: &FiveTuple<A>, line: &mut Located, search: &mut Search) -> bool {
    let places = others(tuple, search);
    let mut next = 0;
    while next < 2 {
        let place = places[next];
        if let Some(set) = set::<A>(place.set)
            && let Some(at) = among(set, place.way, set.home(place.way), tuple, &mut search.busy)
        {
            locate(line, place.set, at);
            return true;
        }
        next += 1;
    }
    false
}

#[inline(always)]
fn locate(line: &mut Located, set: u32, at: At) {
    line.control = at.control.0;
    line.slot = line::slot(set, at.way & (WAYS - 1));
}

/// Finds the line of the connection that a task's packet belongs to, by the client that it goes to: among the lines of the
/// client's endpoint the one whose backend the packet comes from, or an alias' connection. `interface` is where the packet came
/// in: a task of this node answers by its own veth alone; 0, of no packet, asks for nothing, and finds what a task may remember too.
#[inline(always)]
pub fn find_reply<A: Tracked>(
    key: &FiveTuple<A>,
    alias: &mut FiveTuple<A>,
    line: &mut Located,
    search: &mut Search,
    interface: u32,
) -> Found {
    alias.source = key.destination;
    alias.destination = key.source;
    alias.source_port = key.destination_port;
    alias.destination_port = key.source_port;
    alias.protocol = key.protocol;
    alias.kind = ALIAS_KEY;
    alias.generation = 0;
    for _ in 0..LOOKS {
        let found = Found::of(A::by_task(line, search, alias, interface));
        if found != Found::Busy {
            return found;
        }
    }
    Found::Busy
}

/// Looks once for a task's connection.
#[inline(always)]
pub fn by_task<A: Family>(
    line: &mut Located,
    search: &mut Search,
    alias: &FiveTuple<A>,
    interface: u32,
) -> u32 {
    let Some((set, home)) = begin(&alias.source, alias.source_port, alias.protocol, search) else {
        return Found::Nothing as u32;
    };
    let found = table::find(set, home.way, search.hints, &mut search.busy, |way, control| {
        let line = set.line(way);
        // SAFETY: see `KernelSet`; read after the control word.
        let (tuple, backend) = unsafe {
            let line = line.byte_add(zero_of(control.0));
            (&raw const (*line).tuple, (&raw const (*line).backend).read_volatile())
        };
        // SAFETY: as above.
        let is = !(interface != 0 && remembers(control))
            && unsafe {
                alias.is_of(tuple)
                    || !control.has(line::ALIASED)
                        && has_client(tuple, alias)
                        && is_task(backend, tuple, alias, interface)
            };
        is.then_some(backend as u64)
    });
    if let Some(at) = found {
        locate(line, home.set, at);
    } else if search.hints & SPILLED == 0 || !spilled(alias, line, search) {
        return if search.busy != 0 { Found::Busy as u32 } else { Found::Nothing as u32 };
    }
    if Control(line.control).has(ALIAS) { follow::<A>(line, search) } else { Found::Line as u32 }
}

/// Whether a line is only there for what a task may remember of a closed connection under the client's own port. It leads no packet
/// anywhere: a connection that was placed by its hash meanwhile may have the same pair.
#[inline(always)]
fn remembers(control: Control) -> bool {
    control.state() & (ALIAS | RESET | line::ALIASED) == ALIAS | RESET
}

/// Whether a line is a connection of the client that an alias would begin with.
///
/// # Safety
/// `tuple` is a table's.
#[inline(always)]
unsafe fn has_client<A: Family>(tuple: *const FiveTuple<A>, alias: &FiveTuple<A>) -> bool {
    // SAFETY: the caller's.
    unsafe {
        (&raw const (*tuple).source).read_volatile() == alias.source
            && (&raw const (*tuple).source_port).read_volatile() == alias.source_port
            && (&raw const (*tuple).protocol).read_volatile() == alias.protocol
            && (&raw const (*tuple).kind).read_volatile() == CONNECTION
    }
}

/// Whether a line's backend is the task that an alias would end with.
///
/// # Safety
/// `tuple` is a table's.
#[inline(always)]
unsafe fn is_task<A: Family>(
    backend: u32,
    tuple: *const FiveTuple<A>,
    alias: &FiveTuple<A>,
    interface: u32,
) -> bool {
    let Some(backend) = BACKENDS.get(backend) else {
        return false;
    };
    let (local, routed) = (backend.kind == Kind::Local as u8, backend.kind == Kind::Routed as u8);
    // SAFETY: the caller's.
    let generation = unsafe { (&raw const (*tuple).generation).read_volatile() };
    *A::in_wide(&backend.address) == alias.destination
        && backend.port == alias.destination_port
        && backend.state != State::Free as u8
        && generation == backend.generation as u16
        && (routed || local && (interface == 0 || interface == backend.ifindex))
}

/// From an alias to its connection.
#[inline(always)]
fn follow<A: Family>(line: &mut Located, search: &mut Search) -> u32 {
    search.alias = line.slot;
    search.alias_control = [line.control as u32, (line.control >> 32) as u32];
    let Some(alias) = entry::<A>(line.slot) else {
        return Found::DeadAlias as u32;
    };
    let (slot, control) = connection_of(&alias);
    if !control.is_live() {
        return Found::DeadAlias as u32;
    }
    alias.set_seen(clock::now());
    line.control = control.0;
    line.slot = slot;
    Found::Line as u32
}

/// The number of the line of an alias' connection, and its control word; a free one if that is gone.
#[inline(always)]
fn connection_of<A: Family>(alias: &Entry<A>) -> (u32, Control) {
    // The version is written first.
    let (slot, version) = (alias.client_next(), alias.task_next());
    let control = entry::<A>(slot).map_or(Control(0), |connection| connection.control());
    (slot, if control.version() == version { control } else { Control(0) })
}

/// Whether an alias' connection is there.
#[inline(always)]
pub fn leads_on<A: Family>(alias: &Entry<A>) -> bool {
    connection_of(alias).1.is_live()
}

/// What an insertion has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// [`Packet::line`] is the new line; it lies where a reply finds it by its client.
    AtHome,
    /// The same, but it lies in another set.
    Elsewhere,
    /// Something was inserted for this endpoint, or a line taken, meanwhile: look again.
    Again,
    /// There is no place.
    Full,
}

impl Inserted {
    #[inline(always)]
    fn of(code: u32) -> Self {
        match code {
            0 => Self::AtHome,
            1 => Self::Elsewhere,
            2 => Self::Again,
            _ => Self::Full,
        }
    }
}

/// Inserts the packet's draft, for the endpoint that its search began with; or gives the line that was found anew to it.
#[inline(always)]
pub fn insert<A: Tracked>(packet: &mut Packet<A>) -> Inserted {
    let Packet { draft, line, search, .. } = packet;
    if line.anew != 0 {
        let inserted = Inserted::of(A::insert_anew(line, draft, search));
        let away = inserted == Inserted::AtHome && line::set_of(line.slot) != search.set;
        return if away { Inserted::Elsewhere } else { inserted };
    }
    insert_draft(draft, line, search)
}

/// The same of any draft.
#[inline(always)]
pub fn insert_draft<A: Tracked>(draft: &Draft<A>, line: &mut Located, search: &Search) -> Inserted {
    Inserted::of(A::insert_new(line, draft, search))
}

/// Gives a line anew to a draft.
#[inline(always)]
pub fn insert_anew<A: Family>(line: &mut Located, draft: &Draft<A>, search: &Search) -> u32 {
    let (index, way) = (line::set_of(line.slot), line::way_of(line.slot));
    let (Some(set), Some(home)) = (set::<A>(index), set::<A>(search.set)) else {
        return Inserted::Full as u32;
    };
    let Some(claim) = table::claim_anew(set, At { way, control: Control(line.control) }) else {
        return Inserted::Again as u32;
    };
    give(set.line(way), claim, draft);
    let settled = table::settle_anew((home, search.way), search.hints, set, claim, draft.state);
    line.anew = 0;
    let Some(live) = settled else {
        counters::line::<A>(|lines| lines.removed += 1);
        counters::open(draft.backend, draft.state, NOT_COUNTED);
        return Inserted::Again as u32;
    };
    line.control = live.0;
    Inserted::AtHome as u32
}

/// Lines of the search's endpoint in its home set, as far as it matters.
#[inline(always)]
fn is_crowded<A: Family>(set: KernelSet<A>, draft: &Draft<A>, search: &Search) -> bool {
    let mut count = 0;
    let crowded = table::each_hinted::<KernelSet<A>, ()>(search.way, search.hints, |way| {
        // SAFETY: see `KernelSet`.
        let same = unsafe {
            let tuple = &raw const (*set.line(way)).tuple;
            (&raw const (*tuple).source).read_volatile() == draft.tuple.source
                && (&raw const (*tuple).source_port).read_volatile() == draft.tuple.source_port
                && (&raw const (*tuple).protocol).read_volatile() == draft.tuple.protocol
        };
        count += same as u32;
        (count >= AT_HOME).then_some(())
    });
    crowded.is_some()
}

/// Tries once to insert a draft.
#[inline(always)]
pub fn insert_new<A: Family>(line: &mut Located, draft: &Draft<A>, search: &Search) -> u32 {
    let (Some(config), Some(home)) = (maps::config(), set::<A>(search.set)) else {
        return Inserted::Full as u32;
    };
    // What is being made may be the same: the search is not the word that it has to be.
    if search.busy != 0 {
        return Inserted::Again as u32;
    }
    let (now, longest) = (clock::now(), &config.longest);
    let two = search.hints & search.hints.wrapping_sub(1) & 0xff != 0;
    let crowded = two && is_crowded(home, draft, search);
    let own = if crowded { None } else { table::own_way_if_free(home, search.way) };
    let at_home = own.unwrap_or_else(|| table::victim(home, search.way, now, longest));
    let at = Place { set: search.set, way: search.way };
    let (mut place, mut victim) = (at, at_home);
    // Nobody is driven out at home while there is room elsewhere.
    if crowded || at_home.class() < OVER {
        let [one, other] = others(&draft.tuple, search).map(|place| place.or(at, search.stays));
        let (Some(first), Some(second)) = (set::<A>(one.set), set::<A>(other.set)) else {
            return Inserted::Full as u32;
        };
        let first = table::victim(first, one.way, now, longest);
        let second = table::victim(second, other.way, now, longest);
        let (away, elsewhere) = if first.is_better_than(&second) { (one, first) } else { (other, second) };
        if elsewhere.is_there() && (crowded || elsewhere.class() > at_home.class()) {
            (place, victim) = (away, elsewhere);
        }
        // What only remembers takes no place of anybody who is missed.
        let modest = remembers(Control(0).with_state(draft.state));
        if !victim.is_there() || modest && victim.class() < OVER {
            return Inserted::Full as u32;
        }
    }
    let Some(chosen) = set::<A>(place.set) else {
        return Inserted::Full as u32;
    };
    let Some(claim) = table::claim(chosen, place.way, victim, now, longest) else {
        return Inserted::Again as u32;
    };
    if claim.before.is_live() {
        let missed = victim.class() < OVER;
        counters::line::<A>(|lines| *(if missed { &mut lines.displaced } else { &mut lines.reused }) += 1);
    }
    give(chosen.line(claim.way), claim, draft);
    let here = place.set == search.set;
    let settled = if here {
        table::settle_at_home(chosen, place.way, search.hints, claim, draft.state)
    } else {
        table::settle_elsewhere((home, search.way), search.hints, (chosen, place.way), claim, draft.state)
    };
    let Some(live) = settled else {
        counters::open(draft.backend, draft.state, NOT_COUNTED);
        return Inserted::Again as u32;
    };
    counters::line::<A>(|lines| lines.inserted += 1);
    line.control = live.0;
    line.slot = line::slot(place.set, claim.way & (WAYS - 1));
    if here { Inserted::AtHome as u32 } else { Inserted::Elsewhere as u32 }
}

/// Stands for the state of what counts for no backend.
const NOT_COUNTED: u32 = ALIAS;

/// What a line was to its backend before it was claimed. Without a branch: the verifier would walk each for all that follows.
#[inline(always)]
fn counted_as(before: Control) -> u32 {
    before.state() | (opaque(!before.is_live() as u64) as u32 * NOT_COUNTED)
}

/// Gives a claimed line to its new owner: of what each backend has open it is counted before anybody can find it.
#[inline(always)]
fn give<A: Family>(line: *mut Line<A>, claim: Claim, draft: &Draft<A>) {
    // SAFETY: see `KernelSet`; the line is the claimer's alone.
    let backend = unsafe { (&raw const (*line).backend).read_volatile() };
    counters::open(backend, counted_as(claim.before), NOT_COUNTED);
    counters::open(draft.backend, NOT_COUNTED, draft.state);
    write(line, draft);
}

/// Writes a claimed line.
#[inline(always)]
fn write<A: Family>(line: *mut Line<A>, draft: &Draft<A>) {
    // SAFETY: see `KernelSet`; the line is the claimer's alone.
    unsafe {
        let (from, to) = ((&raw const draft.tuple).cast::<u64>(), (&raw mut (*line).tuple).cast::<u64>());
        let mut word = 0;
        while word < FiveTuple::<A>::WORDS {
            to.add(word).write_volatile(from.add(word).read());
            word += 1;
        }
        (&raw mut (*line).seen).write_volatile(clock::now());
        (&raw mut (*line).backend).write_volatile(draft.backend);
        (&raw mut (*line).client_next).write_volatile(draft.client_next);
        (&raw mut (*line).task_next).write_volatile(draft.task_next);
        (&raw mut (*line).hop_seen).write_volatile(draft.hop_seen);
        (&raw mut (*line).peer).write_volatile(draft.peer);
        (&raw mut (*line).mac).write_volatile(draft.mac);
        (&raw mut (*line).port).write_volatile(draft.port);
        (&raw mut (*line).mtu).write_volatile(0);
        (&raw mut (*line).tci).write_volatile(draft.tci);
        (&raw mut (*line).link).write_volatile(draft.link);
    }
}

/// Stands for a connection that is being made, in an alias that was reserved for it.
pub const RESERVED: u32 = u32::MAX;

/// Says whose an alias is, which was [`RESERVED`] before there was a line to name.
#[inline(always)]
pub fn bind<A: Family>(alias: &Located, connection: &Located) {
    if let Some(entry) = entry::<A>(alias.slot)
        && entry.control().0 == alias.control
    {
        entry.set_task_next(Control(connection.control).version());
        entry.set_client_next(connection.slot);
    }
}

/// Whether a connection of the client that an alias would begin with goes to another task of the same service: its lines in
/// the home set alone are asked.
#[inline(never)]
pub fn has_other_task<A: Family>(alias: &FiveTuple<A>, search: &Search, service: u32) -> bool {
    let Some(set) = set::<A>(search.set) else {
        return false;
    };
    let other = table::each_hinted::<KernelSet<A>, ()>(search.way, search.hints, |way| {
        let line = set.line(way);
        // SAFETY: see `KernelSet`.
        let (same, backend) = unsafe {
            let same = has_client(&raw const (*line).tuple, alias);
            (same, (&raw const (*line).backend).read_volatile())
        };
        (same && BACKENDS.get(backend).is_some_and(|backend| backend.service == service)).then_some(())
    });
    other.is_some()
}

/// Removes a line; false if it was changed since it was found.
#[inline(never)]
pub fn remove<A: Family>(slot: u32, control: u64) -> bool {
    let at = At { way: line::way_of(slot), control: Control(control) };
    let Some(set) = set::<A>(line::set_of(slot)) else {
        return false;
    };
    let removed = take_out(set, at, || true);
    if removed {
        counters::line::<A>(|lines| lines.removed += 1);
    }
    removed
}

/// Takes a line out of the table, and what is open at its backend with it.
#[inline(always)]
fn take_out<A: Family>(set: KernelSet<A>, at: At, still: impl FnOnce() -> bool) -> bool {
    // SAFETY: see `KernelSet`. What it was when the control word was read, if that has not changed when the line is claimed.
    let backend = unsafe {
        let line = set.line(at.way).cast_const();
        (&raw const (*line).backend).read_volatile()
    };
    let removed = table::remove(set, at, still);
    if removed {
        counters::open(backend, at.control.state(), NOT_COUNTED);
    }
    removed
}

/// The same, of a line that was last seen then and has not been since, or has if that does not matter: what user space asks for.
#[inline(never)]
pub fn expire<A: Family>(slot: u32, control: u64, seen: u32, also_if_seen: u32) -> bool {
    let at = At { way: line::way_of(slot), control: Control(control) };
    let Some(set) = set::<A>(line::set_of(slot)) else {
        return false;
    };
    let removed = take_out(set, at, || also_if_seen != 0 || set.seen(at.way) == seen);
    if removed {
        // Before Linux 6.2 a packet may come between the two halves of an addition by who is not called for one.
        counters::line::<A>(|lines| {
            // SAFETY: it is a counter, aligned.
            let _ = unsafe { atomic::fetch_add(&raw mut lines.removed, 1) };
        });
    }
    removed
}

/// Says that no line of a home lies elsewhere any more, see [`table::gather`].
#[inline(never)]
pub fn gather<A: Family>(slot: u32, hints: u32) -> bool {
    set::<A>(line::set_of(slot)).is_some_and(|set| table::gather(set, line::way_of(slot), hints))
}

/// Copies what the later stages need of the packet's line.
#[inline(always)]
pub fn copy<A: Family>(entry: &Entry<A>, state: u32, connection: &mut Connection<A>) {
    entry.copy_tuple(&mut connection.tuple);
    connection.backend = entry.backend();
    connection.state = state;
    connection.mac = entry.mac();
    connection.hop_seen = entry.hop_seen();
    connection.peer = entry.peer();
    connection.port = entry.port();
    connection.mtu = entry.mtu();
    connection.link = entry.link();
    connection.tags = lb_common::tags::Tags::of_line(connection.link, entry.tci());
}

/// Finds a line by its five-tuple in its home set alone: without a call, for the fast path.
#[inline(always)]
pub fn find_at_home<A: Family>(tuple: &FiveTuple<A>, line: &mut Located) -> bool {
    let Some(config) = maps::config() else {
        return false;
    };
    let endpoint = config.hash_keys.endpoint(&tuple.source, tuple.source_port, tuple.protocol);
    let home = hash::home(endpoint, maps::sets());
    let Some(set) = set::<A>(home.set) else {
        return false;
    };
    let mut busy = 0;
    let Some(at) = among(set, home.way, set.home(home.way), tuple, &mut busy) else {
        return false;
    };
    locate(line, home.set, at);
    true
}
