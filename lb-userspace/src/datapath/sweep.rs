//! Going over the tables of flows: taking out what has ended, counting what is open.
//!
//! The datapath checks a flow's timer only when a packet of it comes. Those of which none comes any more go here, a slice
//! at a time, so that a table of millions keeps nobody waiting. Who is to be told of a connection's end is said to the
//! caller: nothing is sent here.

use std::collections::{BTreeMap, BTreeSet};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use lb_common::{
    abi::table,
    backend::{Backend, CONSISTENT, State},
    flow::{Flow, FlowKey, Phase, REPLY, REQUEST, Spare, Timers, elapsed},
    fragment::{FRAGMENT_SECONDS, FragmentKey, Ports},
    net::{Address, TCP, V4, V6},
};

use super::{DatapathError, PinDir, TableSet, batch::Batches, idle};
use crate::{cluster::Idle, limits::Fill, net::Reset, plan::Tables};

/// `BPF_NOEXIST` of the kernel's user API.
const NOEXIST: u64 = 1;

/// Entries looked at in one slice.
const SLICE: usize = 32_768;

/// What decides whether a flow is open.
#[derive(Clone, Copy)]
pub(super) struct Clock<'a> {
    pub(super) tables: &'a Tables,
    /// Jiffies, low 32 bits.
    pub(super) now: u32,
    pub(super) jiffies_per_second: u32,
}

impl Clock<'_> {
    /// The flow's backend, if that is still the one which the flow was given to.
    fn backend<A>(&self, flow: &Flow<A>) -> Option<&Backend> {
        let entry = self.tables.backends.get(&flow.backend)?;
        (entry.backend.generation == flow.generation && entry.backend.state != State::Free as u8)
            .then_some(&entry.backend)
    }

    /// Whether the flow has ended. What is left of a connection whose task is gone stays for a while, so that its client
    /// is told.
    fn has_ended<A>(&self, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        let tcp = key.protocol == TCP;
        match self.backend(flow) {
            None if !tcp || flow.role != REQUEST => true,
            None => {
                let told = Timers::DEFAULT.of(Phase::Closing) * self.jiffies_per_second;
                elapsed(flow.seen, self.now) > told
            }
            Some(backend) => {
                let label = self.tables.services.get(&backend.service);
                let timers = label.map_or(Timers::DEFAULT, |label| Timers { seconds: label.timers });
                flow.expired(tcp, self.now, &timers, self.jiffies_per_second)
            }
        }
    }

    /// Whether there may be spares of the flow's entries.
    fn has_spares<A>(&self, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        let consistent = |backend: &Backend| backend.flags & CONSISTENT != 0;
        let once_established = flow.established() || flow.is_over();
        key.protocol == TCP && once_established && self.backend(flow).is_some_and(consistent)
    }

    /// The resets for a flow that has ended, if its service asks for them. Who closes, or has lost its task, is told by
    /// others.
    fn resets<A: Address>(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Vec<Reset> {
        if key.protocol != TCP || flow.phase(true) != Phase::Established {
            return Vec::new();
        }
        let Some(backend) = self.backend(flow) else {
            return Vec::new();
        };
        let label = self.tables.services.get(&backend.service);
        if label.is_some_and(|label| label.idle == Idle::Reset) {
            idle::resets(key, flow, backend)
        } else {
            Vec::new()
        }
    }
}

/// One table's part of a walk.
trait Part: Send + Sync {
    /// Looks at the next entries; how many, none when the table's end is reached.
    fn go_on(
        &mut self,
        clock: Clock<'_>,
        done: &mut Sweep,
        resets: &mut Vec<Reset>,
    ) -> Result<Option<usize>, DatapathError>;
}

/// A table of flows and how far the walk has come: those that have ended go.
struct Walk<A> {
    name: &'static str,
    /// Entries there is room for, and those that were alive.
    room: u64,
    left: u64,
    flows: HashMap<MapData, FlowKey<A>, Flow<A>>,
    spares: HashMap<MapData, FlowKey<A>, Spare<A>>,
    batches: Batches<FlowKey<A>, Flow<A>>,
}

/// Entries of a table that are in use when the least recently used begin to go: each CPU keeps some free, at most 128
/// (`LOCAL_FREE_TARGET` of the kernel's `bpf_lru_list.c`).
fn room(map: &MapData) -> Result<u64, DatapathError> {
    let info = map.info().map_err(|error| DatapathError::map("inspect", error))?;
    let entries = u64::from(info.max_entries());
    let cpus = aya::util::nr_cpus().map_err(|(what, source)| DatapathError::pin("read", what, source))?;
    Ok(entries - (128 * cpus as u64).min(entries / 2))
}

fn map(pins: &PinDir, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(pins.table(name)).map_err(|error| DatapathError::map("open", error))
}

impl<A: Address> Walk<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    Spare<A>: Pod,
{
    /// Of a table of flows; its family's spares go with them.
    fn new(pins: &PinDir, name: &'static str, spares: &str) -> Result<Self, DatapathError> {
        let open = |error| DatapathError::map("open", error);
        let flows = Map::from_map_data(map(pins, name)?).and_then(HashMap::try_from).map_err(open)?;
        let spares = Map::from_map_data(map(pins, spares)?).and_then(HashMap::try_from).map_err(open)?;
        let map = map(pins, name)?;
        let room = room(&map)?;
        Ok(Self { name, room, left: 0, flows, spares, batches: Batches::new(map) })
    }

    /// Takes the spares of a flow that has ended away. Either may be gone, or another's by now.
    fn end_spares(&mut self, key: &FlowKey<A>, flow: &Flow<A>) {
        let _ = self.spares.remove(key);
        let twin = flow.rewrite.answer(key.protocol);
        if self.spares.get(&twin, 0).is_ok_and(|spare| spare.answers(key)) {
            let _ = self.spares.remove(&twin);
        }
    }
}

impl<A: Address + Send + Sync> Part for Walk<A>
where
    FlowKey<A>: Pod + Send + Sync,
    Flow<A>: Pod + Send + Sync,
    Spare<A>: Pod + Send + Sync,
{
    fn go_on(
        &mut self,
        clock: Clock<'_>,
        done: &mut Sweep,
        resets: &mut Vec<Reset>,
    ) -> Result<Option<usize>, DatapathError> {
        let Some(entries) = self.batches.next()? else {
            done.fills.push(Fill { table: self.name, entries: self.left, room: self.room });
            return Ok(None);
        };
        let mut seen = 0;
        let mut ended = Vec::new();
        for (key, flow) in entries {
            seen += 1;
            if clock.has_ended(&key, &flow) {
                ended.push(key);
            } else {
                done.named.insert(flow.backend);
                self.left += 1;
            }
        }
        for key in ended {
            // It may have come to life since it was read, and may until it is taken out: its client's port is used again.
            let ended = |flow: &Flow<A>| clock.has_ended(&key, flow);
            if !self.flows.get(&key, 0).is_ok_and(|flow| ended(&flow)) {
                continue;
            }
            let Some(flow) = self.batches.take(&key)? else { continue };
            if !ended(&flow) {
                // Unless there is a newer one already.
                let _ = self.flows.insert(key, flow, NOEXIST);
                continue;
            }
            done.removed += 1;
            if clock.has_spares(&key, &flow) {
                self.end_spares(&key, &flow);
            }
            let told = clock.resets(&key, &flow);
            done.resets += told.len() as u64;
            resets.extend(told);
        }
        done.seen += seen as u64;
        Ok(Some(seen))
    }
}

/// A table of spares, which are counted: they go with their flows.
struct Count<A> {
    name: &'static str,
    room: u64,
    left: u64,
    batches: Batches<FlowKey<A>, Spare<A>>,
}

impl<A> Count<A>
where
    FlowKey<A>: Pod + Default,
    Spare<A>: Pod + Default,
{
    fn new(pins: &PinDir, name: &'static str) -> Result<Self, DatapathError> {
        let map = map(pins, name)?;
        Ok(Self { name, room: room(&map)?, left: 0, batches: Batches::new(map) })
    }
}

impl<A> Part for Count<A>
where
    FlowKey<A>: Pod + Default + Send + Sync,
    Spare<A>: Pod + Default + Send + Sync,
{
    fn go_on(
        &mut self,
        _: Clock<'_>,
        done: &mut Sweep,
        _: &mut Vec<Reset>,
    ) -> Result<Option<usize>, DatapathError> {
        let Some(entries) = self.batches.next()? else {
            done.fills.push(Fill { table: self.name, entries: self.left, room: self.room });
            return Ok(None);
        };
        let seen = entries.count();
        self.left += seen as u64;
        Ok(Some(seen))
    }
}

/// What a walk through all tables of flows has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Entries looked at.
    pub seen: u64,
    /// Entries taken out, because they had ended.
    pub removed: u64,
    /// Resets for ends of those that were idle connections.
    pub resets: u64,
    /// The backends that those left name.
    pub named: BTreeSet<u32>,
    /// How full the tables are.
    pub fills: Vec<Fill>,
}

/// A walk that is under way.
pub(super) struct Sweeper {
    /// What is still to be looked at, the next one last.
    parts: Vec<Box<dyn Part>>,
    done: Sweep,
    /// The backends that were free, and might be named, when it began.
    pub(super) resting: BTreeSet<u32>,
}

impl Sweeper {
    pub(super) fn new(pins: &PinDir, resting: BTreeSet<u32>) -> Result<Self, DatapathError> {
        let flows4 = |name| Walk::<V4>::new(pins, name, table::SPARES4);
        let flows6 = |name| Walk::<V6>::new(pins, name, table::SPARES6);
        Ok(Self {
            // A flow that moves from the half-open ones to the others meanwhile is not missed.
            parts: vec![
                Box::new(Count::<V6>::new(pins, table::SPARES6)?),
                Box::new(flows6(table::FLOWS6)?),
                Box::new(flows6(table::HALF_OPEN6)?),
                Box::new(Count::<V4>::new(pins, table::SPARES4)?),
                Box::new(flows4(table::FLOWS4)?),
                Box::new(flows4(table::HALF_OPEN4)?),
            ],
            done: Sweep::default(),
            resting,
        })
    }

    /// Goes on for a slice; true when all tables are done. To `resets` goes what is to be sent for flows that were taken out,
    /// also before an error.
    pub(super) fn go_on(&mut self, clock: Clock<'_>, resets: &mut Vec<Reset>) -> Result<bool, DatapathError> {
        let mut left = SLICE;
        while left > 0 {
            let Some(part) = self.parts.last_mut() else {
                return Ok(true);
            };
            match part.go_on(clock, &mut self.done, resets)? {
                Some(seen) => left = left.saturating_sub(seen),
                None => drop(self.parts.pop()),
            }
        }
        Ok(false)
    }

    pub(super) fn done(self) -> Sweep {
        self.done
    }
}

impl TableSet {
    /// How full the tables of fragments are: of those that came lately, and are followed yet.
    pub(super) fn fragments(&self, now: u32, jiffies_per_second: u32) -> Result<[Fill; 2], DatapathError> {
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

    /// Open flows by backend: connections and exchanges that have neither ended nor lost their task.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn open_flows(&self, tables: &Tables) -> Result<BTreeMap<u32, u64>, DatapathError> {
        let mut open = BTreeMap::new();
        for name in [table::HALF_OPEN4, table::FLOWS4] {
            count(Batches::<FlowKey<V4>, Flow<V4>>::new(map(self.pins(), name)?), tables, &mut open)?;
        }
        for name in [table::HALF_OPEN6, table::FLOWS6] {
            count(Batches::<FlowKey<V6>, Flow<V6>>::new(map(self.pins(), name)?), tables, &mut open)?;
        }
        Ok(open)
    }
}

fn count<A: Address>(
    mut batches: Batches<FlowKey<A>, Flow<A>>,
    tables: &Tables,
    open: &mut BTreeMap<u32, u64>,
) -> Result<(), DatapathError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    while let Some(entries) = batches.next()? {
        for (_, flow) in entries {
            let entry = tables.backends.get(&flow.backend);
            let its = entry.is_some_and(|entry| entry.backend.generation == flow.generation);
            // Snat's entry for replies is the second one of its flow.
            if its && !flow.closing() && flow.role != REPLY {
                *open.entry(flow.backend).or_default() += 1;
            }
        }
    }
    Ok(())
}
