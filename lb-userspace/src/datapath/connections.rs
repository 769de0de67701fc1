//! The connection tables as user space sees them: mapped, read only. What has ended is found here and removed by a program, in
//! batches: only programs write the tables.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
};

use aya::{maps::MapData, programs::Xdp};
use lb_common::{
    abi::{Config, Removal, remove, size, table},
    backend::{Backend, State, TRANSLATED},
    conntrack::{
        Control, Line, Phase, Set, TIME_WAIT, Timers, elapsed,
        hash::{HashKeys, home},
        line::{ALIAS, DIRECT, ESTABLISHED, RESET, UDP, WAYS, set_of, slot, way_of},
        table::SPILLED,
    },
    fragment::{FRAGMENT_SECONDS, FragmentKey, Ports},
    net::{Address, V4, V6},
};

use super::{DatapathError, PinDir, TableSet, Tools, access::AccessLists, batch::Batches, idle, tools};
use crate::{
    cluster::{Idle, Protocol},
    limits::Fill,
    net::Reset,
    plan::Tables,
};

/// A connection as its line said when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Which of its service's timers runs.
    pub phase: Phase,
    /// The client.
    pub client: SocketAddr,
    /// Where the client sends to.
    pub listener: SocketAddr,
    /// Number of the task's backend; none if that task is gone.
    pub backend: Option<u32>,
    /// Number of the node by which the client's packets come; [`SELF`](lb_common::tunnel::SELF) for this one.
    pub peer: u32,
    /// Whether the task's replies go straight to the client, though its packets come by another node.
    pub direct: bool,
    /// The client's port as the task sees it.
    pub port: u16,
    /// Seconds since its last packet.
    pub idle: u32,
    /// The sequence number that the task expects of the client next; of TCP.
    pub client_next: u32,
    /// And the client of the task.
    pub task_next: u32,
    /// What takes the line away as it is.
    removal: Removal,
}

/// What a line says, of a connection.
pub(super) fn seen<A: Address>(at: u32, control: Control, line: &Line<A>, clock: &Clock<'_>) -> Option<Seen> {
    if control.has(ALIAS) {
        return None;
    }
    let tuple = &line.tuple;
    Some(Seen {
        protocol: if control.has(UDP) { Protocol::Udp } else { Protocol::Tcp },
        phase: Phase::try_from(Phase::number_of(control)).ok()?,
        client: SocketAddr::new(tuple.source.to_ip(), tuple.source_port.get()),
        listener: SocketAddr::new(tuple.destination.to_ip(), tuple.destination_port.get()),
        backend: clock.backend(line).map(|_| line.backend),
        peer: line.peer.into(),
        direct: line.link & DIRECT != 0,
        port: line.port.get(),
        idle: elapsed(line.seen, clock.now) / clock.jiffies_per_second.max(1),
        client_next: line.client_next,
        task_next: line.task_next,
        removal: Removal { control: control.0, slot: at, seen: line.seen, what: 0, done: 0 },
    })
}

/// Lines that are looked at by one reading of the clock.
const SAME_TIME: u32 = 8_192;

/// Goes once over a table's connections.
fn each<A: Address, E>(
    mapping: &Mapping<A>,
    mut clock: Clock<'_>,
    tools: &Tools,
    visit: &mut impl FnMut(&Seen, &dyn Fn() -> Vec<Reset>) -> Result<(), E>,
) -> Result<(), E>
where
    E: From<DatapathError>,
{
    for at in 0..mapping.lines() {
        // Who reads what is said may take his time.
        if at % SAME_TIME == 0 {
            clock.now = tools.now()?;
        }
        let Some((control, line)) = mapping.live(at) else { continue };
        if let Some(seen) = seen(at, control, &line, &clock) {
            visit(&seen, &|| clock.farewell(control, &line))?;
        }
    }
    Ok(())
}

/// A connection table, mapped into this process.
pub(super) struct Mapping<A> {
    sets: NonNull<Set<A>>,
    count: u32,
}

// SAFETY: the mapping is read only, and goes with the value alone.
unsafe impl<A> Send for Mapping<A> {}
// SAFETY: as above.
unsafe impl<A> Sync for Mapping<A> {}

impl<A: Address> Mapping<A> {
    /// Maps a pinned table.
    pub(super) fn open(pins: &PinDir, name: &str) -> Result<Self, DatapathError> {
        let map = map(pins, name)?;
        let count = map.info().map_err(|error| DatapathError::map("inspect", error))?.max_entries();
        let bytes = count as usize * size_of::<Set<A>>();
        let fd = map.fd().as_fd().as_raw_fd();
        // SAFETY: a new mapping of the table's whole length; the kernel keeps the table as long as it is there.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(DatapathError::pin("map into memory", pins.table(name), error));
        }
        let sets = NonNull::new(address.cast()).ok_or(DatapathError::NoProgram("mmap"))?;
        Ok(Self { sets, count })
    }

    /// How many lines there are.
    pub(super) fn lines(&self) -> u32 {
        self.count * WAYS
    }

    fn line(&self, at: u32) -> *const Line<A> {
        // SAFETY: `at` is below `lines`.
        unsafe {
            (&raw const (*self.sets.as_ptr().add(set_of(at) as usize)).lines[way_of(at) as usize]).cast()
        }
    }

    /// The home word of a way.
    fn home(&self, at: u32) -> u32 {
        // SAFETY: as above; aligned, and written whole.
        unsafe { (&raw const (*self.line(at)).home).read_volatile() }
    }

    /// Whether nobody has a line, nor is making one there.
    fn is_free(&self, at: u32) -> bool {
        // SAFETY: as above.
        Control(unsafe { (&raw const (*self.line(at)).control).read_volatile() }).is_free()
    }

    /// A line that is somebody's, as it is now; `None` of any other, and of one that is given away while it is read.
    pub(super) fn live(&self, at: u32) -> Option<(Control, Line<A>)> {
        let line = self.line(at);
        // SAFETY: as above. The body may be torn: the control word's version tells.
        unsafe {
            let control = Control((&raw const (*line).control).read_volatile());
            if !control.is_live() {
                return None;
            }
            let copy = line.read_volatile();
            std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
            let again = Control((&raw const (*line).control).read_volatile());
            (again.is_live() && again.version() == control.version()).then_some((again, copy))
        }
    }
}

impl<A: Address> Mapping<A> {
    /// The clients of all connections, each as often as he has some.
    pub(super) fn clients(&self) -> impl Iterator<Item = A> + '_ {
        let live = (0..self.lines()).filter_map(|at| self.live(at));
        live.filter(|(control, _)| !control.has(ALIAS)).map(|(_, line)| line.tuple.source)
    }
}

impl<A> Drop for Mapping<A> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, of this length.
        unsafe { libc::munmap(self.sets.as_ptr().cast(), self.count as usize * size_of::<Set<A>>()) };
    }
}

fn map(pins: &PinDir, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(pins.table(name)).map_err(|error| DatapathError::map("open", error))
}

/// What decides whether a connection has ended.
#[derive(Clone, Copy)]
pub(super) struct Clock<'a> {
    pub(super) tables: &'a Tables,
    /// Who may connect, if that has changed.
    pub(super) access: Option<&'a AccessLists>,
    /// Jiffies, low 32 bits.
    pub(super) now: u32,
    pub(super) jiffies_per_second: u32,
    pub(super) hash_keys: &'a HashKeys,
}

impl Clock<'_> {
    /// The connection's backend, if that is still the one which it was given to.
    fn backend<A>(&self, line: &Line<A>) -> Option<&Backend> {
        let entry = self.tables.backends.get(&line.backend)?;
        let backend = &entry.backend;
        (backend.generation as u16 == line.tuple.generation && backend.state != State::Free as u8)
            .then_some(backend)
    }

    /// Whether the connection has ended. What is left of one whose task is gone stays for a while, so that its client is told.
    fn has_ended<A>(&self, control: Control, line: &Line<A>) -> bool {
        match self.backend(line) {
            None if control.has(UDP) || line.peer != 0 => true,
            None => {
                let told = Timers::DEFAULT.of(Phase::Closing) * self.jiffies_per_second;
                elapsed(line.seen, self.now) > told
            }
            Some(backend) => {
                let label = self.tables.services.get(&backend.service);
                let timers = label.map_or(Timers::DEFAULT, |label| Timers { seconds: label.timers });
                timers.expired(control, line.seen, self.now, self.jiffies_per_second)
            }
        }
    }

    /// Whether its client may no longer connect.
    fn is_denied<A: Address>(&self, line: &Line<A>) -> bool {
        self.access.is_some_and(|access| {
            let backend = self.backend(line);
            backend.is_some_and(|backend| !access.allow(backend.service, line.tuple.source.to_ip()))
        })
    }

    /// Whether a task may remember the connection of an alias that lingers since then. A walk reads the clock once, and may take
    /// long: what came since is new, however much.
    fn remembers(&self, seen: u32) -> bool {
        elapsed(seen, self.now) <= TIME_WAIT * self.jiffies_per_second
    }

    /// The resets for a connection whose client may no longer connect.
    fn farewell<A: Address>(&self, control: Control, line: &Line<A>) -> Vec<Reset> {
        let lives = control.has(ESTABLISHED) && !control.has(UDP) && !control.is_over();
        let backend = self.backend(line).filter(|_| lives);
        backend.map(|backend| idle::resets(line, backend)).unwrap_or_default()
    }

    /// The resets for a connection that has ended, if its service asks for them. Who closes, or has lost its task, is told by
    /// others.
    fn resets<A: Address>(&self, control: Control, line: &Line<A>) -> Vec<Reset> {
        if Phase::number_of(control) != Phase::Established as u32 {
            return Vec::new();
        }
        let Some(backend) = self.backend(line) else {
            return Vec::new();
        };
        let label = self.tables.services.get(&backend.service);
        if label.is_some_and(|label| label.idle == Idle::Reset) {
            idle::resets(line, backend)
        } else {
            Vec::new()
        }
    }
}

/// What a garbage collection has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collection {
    /// Lines that are somebody's.
    pub seen: u64,
    /// Lines removed, because what they stood for had ended.
    pub removed: u64,
    /// Lines whose client may no longer connect, those that are left among them.
    pub denied: u64,
    /// Resets for ends of those that were idle, or denied.
    pub resets: u64,
    /// The backends that those left name.
    pub named: BTreeSet<u32>,
    /// How full the tables are.
    pub fills: Vec<Fill>,
    /// IPv6 clients of tasks that are translated here who have an established connection of TCP: they exist.
    pub translated: HashSet<IpAddr>,
}

/// What is to be removed, and what is told of it if it is.
struct Ended {
    removal: Removal,
    resets: Vec<Reset>,
}

/// A connection table, and what is removed of it.
struct Kinds {
    name: &'static str,
    lines: u32,
    denied: u32,
    spilled: u32,
}

/// Goes once over a table, and removes what has ended, and whose client may no longer connect.
fn collect<A: Address>(
    mapping: &Mapping<A>,
    Kinds { name, lines, denied, spilled }: Kinds,
    clock: Clock<'_>,
    program: &Xdp,
    done: &mut Collection,
    resets: &mut Vec<Reset>,
) -> Result<(), DatapathError> {
    let sets = mapping.count;
    let mut left = 0;
    let mut ended = Vec::new();
    // Homes that have lines in other sets; and, of those that say so, what their word was before any line was looked at.
    let mut away = HashSet::new();
    let marked: Vec<(u32, u32)> = (0..mapping.lines())
        .map(|at| (at, mapping.home(at)))
        .filter(|(_, home)| home & SPILLED != 0)
        .collect();
    // One that is claimed is told at home already, and its five-tuple is nobody's to read: the marks stay until the next time.
    let mut settled = true;
    for at in 0..mapping.lines() {
        let Some((control, line)) = mapping.live(at) else {
            settled &= mapping.is_free(at);
            continue;
        };
        done.seen += 1;
        // Also what is over: it may come to life before it is removed, and the mark goes with the next collection.
        if !marked.is_empty() {
            let tuple = &line.tuple;
            let endpoint = clock.hash_keys.endpoint(&tuple.source, tuple.source_port, tuple.protocol);
            let home = home(endpoint, sets);
            if home.set != set_of(at) {
                away.insert(slot(home.set, home.way));
            }
        }
        let removal = |what| Removal { control: control.0, slot: at, seen: line.seen, what, done: 0 };
        let over = if control.has(ALIAS) {
            // It may have been read while it was bound to its connection, which the control word does not show: twice it is not.
            let again =
                || mapping.live(at).is_some_and(|(control, line)| is_orphan(mapping, control, &line, clock));
            is_orphan(mapping, control, &line, clock) && again()
        } else if clock.is_denied(&line) {
            done.denied += 1;
            // At once: its ends are told the numbers that they are at now.
            let denied = Ended { removal: removal(denied), resets: clock.farewell(control, &line) };
            if tools::remove(program, &[denied.removal])? == [true] {
                done.removed += 1;
                done.resets += denied.resets.len() as u64;
                resets.extend(denied.resets);
                continue;
            }
            false
        } else {
            clock.has_ended(control, &line)
        };
        if over {
            let resets = if control.has(ALIAS) { Vec::new() } else { clock.resets(control, &line) };
            ended.push(Ended { removal: removal(lines), resets });
            continue;
        }
        // What lingers gives way to anybody.
        left += u64::from(!(control.has(ALIAS) && control.has(RESET)));
        if !control.has(ALIAS) {
            done.named.insert(line.backend);
            let is_translated = |backend: &Backend| backend.flags & TRANSLATED != 0;
            if !A::IS_V4
                && control.has(ESTABLISHED)
                && !control.has(UDP)
                && clock.backend(&line).is_some_and(is_translated)
            {
                done.translated.insert(line.tuple.source.to_ip());
            }
        }
    }
    let empty = marked.into_iter().filter(|(at, _)| settled && !away.contains(at));
    let marks = empty.map(|(at, home)| Ended {
        removal: Removal { control: 0, slot: at, seen: home, what: spilled, done: 0 },
        resets: Vec::new(),
    });
    let ended: Vec<Ended> = ended.into_iter().chain(marks).collect();
    for batch in ended.chunks(Removal::BATCH) {
        let removals: Vec<Removal> = batch.iter().map(|ended| ended.removal).collect();
        for (ended, removed) in batch.iter().zip(tools::remove(program, &removals)?) {
            if removed && ended.removal.what == lines {
                done.removed += 1;
                done.resets += ended.resets.len() as u64;
                resets.extend_from_slice(&ended.resets);
            } else if ended.removal.what == lines {
                left += 1;
            }
        }
    }
    done.fills.push(Fill { table: name, entries: left, room: u64::from(size::connections(mapping.count)) });
    Ok(())
}

/// Whether an alias' connection is gone. One that was reserved for a connection which is being made has a moment, one that
/// lingers as long as the task may remember it.
fn is_orphan<A: Address>(mapping: &Mapping<A>, control: Control, alias: &Line<A>, clock: Clock<'_>) -> bool {
    let (at, version) = (alias.client_next, alias.task_next);
    if control.has(RESET) && clock.remembers(alias.seen) {
        return false;
    }
    if at >= mapping.lines() {
        return elapsed(alias.seen, clock.now) > clock.jiffies_per_second;
    }
    mapping.live(at).is_none_or(|(control, _)| control.version() != version)
}

impl TableSet {
    /// Removes all lines that have ended.
    pub(super) fn collect(
        &self,
        clock: Clock<'_>,
        program: &Xdp,
        resets: &mut Vec<Reset>,
    ) -> Result<Collection, DatapathError> {
        let mut done = Collection::default();
        let (name, lines, denied, spilled) =
            (table::CONNECTIONS4, remove::CONNECTION4, remove::DENIED4, remove::SPILLED4);
        let v4 = Kinds { name, lines, denied, spilled };
        let (name, lines, denied, spilled) =
            (table::CONNECTIONS6, remove::CONNECTION6, remove::DENIED6, remove::SPILLED6);
        let v6 = Kinds { name, lines, denied, spilled };
        collect(&Mapping::<V4>::open(self.pins(), v4.name)?, v4, clock, program, &mut done, resets)?;
        collect(&Mapping::<V6>::open(self.pins(), v6.name)?, v6, clock, program, &mut done, resets)?;
        done.fills.extend(self.fragments(clock.now, clock.jiffies_per_second)?);
        Ok(done)
    }

    /// How full the tables of fragments are: of those that came lately, and are followed yet.
    fn fragments(&self, now: u32, jiffies_per_second: u32) -> Result<[Fill; 2], DatapathError> {
        let lived = FRAGMENT_SECONDS * jiffies_per_second;
        let fresh = |ports: &Ports| elapsed(ports.seen, now) < lived;
        let mut v4 = Batches::<FragmentKey<V4>, Ports>::new(map(self.pins(), table::FRAGMENTS4)?);
        let mut v6 = Batches::<FragmentKey<V6>, Ports>::new(map(self.pins(), table::FRAGMENTS6)?);
        let mut counts = [0, 0];
        while let Some(entries) = v4.next()? {
            counts[0] += entries.filter(|(_, ports)| fresh(ports)).count() as u64;
        }
        while let Some(entries) = v6.next()? {
            counts[1] += entries.filter(|(_, ports)| fresh(ports)).count() as u64;
        }
        let fill = |name, entries| Ok(Fill { table: name, entries, room: room(&map(self.pins(), name)?)? });
        Ok([fill(table::FRAGMENTS4, counts[0])?, fill(table::FRAGMENTS6, counts[1])?])
    }

    /// Open connections by backend: those that have neither ended nor lost their task.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn open_connections(&self, tables: &Tables) -> Result<BTreeMap<u32, u64>, DatapathError> {
        let mut open = BTreeMap::new();
        count(&Mapping::<V4>::open(self.pins(), table::CONNECTIONS4)?, tables, &mut open);
        count(&Mapping::<V6>::open(self.pins(), table::CONNECTIONS6)?, tables, &mut open);
        Ok(open)
    }

    /// Goes once over all connections, in no order; with what makes the resets for the ends of each that are next to this node.
    /// Nothing is held but the one that is looked at.
    ///
    /// # Errors
    /// A table cannot be mapped, or those of the visit.
    pub fn each_connection<E: From<DatapathError>>(
        &self,
        tables: &Tables,
        tools: &Tools,
        mut visit: impl FnMut(&Seen, &dyn Fn() -> Vec<Reset>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Config { jiffies_per_second, hash_keys, .. } = self.config()?;
        let clock = Clock { tables, access: None, now: 0, jiffies_per_second, hash_keys: &hash_keys };
        each(&Mapping::<V4>::open(self.pins(), table::CONNECTIONS4)?, clock, tools, &mut visit)?;
        each(&Mapping::<V6>::open(self.pins(), table::CONNECTIONS6)?, clock, tools, &mut visit)
    }

    /// Takes connections out of the table; which were, in order. One that has got into another state since it was read stays, and
    /// with `idle` one of which a packet was seen since.
    ///
    /// # Errors
    /// The kernel does not run the program that does it.
    pub fn end_connections<'a>(
        &self,
        tools: &Tools,
        doomed: impl IntoIterator<Item = &'a Seen>,
        idle: bool,
    ) -> Result<Vec<bool>, DatapathError> {
        let what = |seen: &Seen| match (seen.client.is_ipv4(), idle) {
            (true, true) => remove::CONNECTION4,
            (true, false) => remove::DENIED4,
            (false, true) => remove::CONNECTION6,
            (false, false) => remove::DENIED6,
        };
        let removal = |seen: &Seen| Removal { what: what(seen), ..seen.removal };
        tools.remove(&doomed.into_iter().map(removal).collect::<Vec<_>>())
    }

    /// All lines of a family as they are now, by their numbers.
    ///
    /// # Errors
    /// The table cannot be mapped.
    pub fn lines<A: Address>(&self) -> Result<Vec<(u32, Control, Line<A>)>, DatapathError> {
        let name = if A::IS_V4 { table::CONNECTIONS4 } else { table::CONNECTIONS6 };
        let mapping = Mapping::<A>::open(self.pins(), name)?;
        let line = |at| mapping.live(at).map(|(control, line)| (at, control, line));
        Ok((0..mapping.lines()).filter_map(line).collect())
    }
}

/// Entries of a hash table that are in use when the least recently used begin to go: each CPU keeps some free, at most 128
/// (`LOCAL_FREE_TARGET` of the kernel's `bpf_lru_list.c`).
fn room(map: &MapData) -> Result<u64, DatapathError> {
    let info = map.info().map_err(|error| DatapathError::map("inspect", error))?;
    let entries = u64::from(info.max_entries());
    let cpus = aya::util::nr_cpus().map_err(|(what, source)| DatapathError::pin("read", what, source))?;
    Ok(entries - (128 * cpus as u64).min(entries / 2))
}

fn count<A: Address>(mapping: &Mapping<A>, tables: &Tables, open: &mut BTreeMap<u32, u64>) {
    for (control, line) in (0..mapping.lines()).filter_map(|at| mapping.live(at)) {
        let entry = tables.backends.get(&line.backend);
        let its = entry.is_some_and(|entry| entry.backend.generation as u16 == line.tuple.generation);
        if its && !control.has(ALIAS) && !control.is_closing() {
            *open.entry(line.backend).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_takes_away_nothing_that_came_while_it_went_on() {
        let (tables, hash_keys) = (Tables::empty(0), HashKeys::default());
        let now = 1_000_000;
        let clock =
            Clock { tables: &tables, access: None, now, jiffies_per_second: 250, hash_keys: &hash_keys };
        let minute = TIME_WAIT * 250;
        for (seen, remembered) in [
            (now - minute - 1, false),
            (now - minute, true),
            (now, true),
            (now + 100, true),
            (now + minute, true),
        ] {
            assert_eq!(clock.remembers(seen), remembered, "{seen}");
        }
    }
}
