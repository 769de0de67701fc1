//! Going over the tables of flows: taking out what has ended, counting what is open.
//!
//! The datapath checks a flow's timer only when a packet of it comes. Those of which none comes any more go here, a slice
//! at a time, so that a table of millions keeps nobody waiting.

use std::collections::{BTreeMap, BTreeSet};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use lb_common::{
    abi::table,
    backend::{Backend, State},
    flow::{Flow, FlowKey, Phase, REPLY, REQUEST, Timers, elapsed},
    net::{Address, TCP, V4, V6},
};

use super::{DatapathError, PinDir, TableSet, batch::Batches};
use crate::plan::Tables;

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
}

/// One table and how far the walk has come.
struct Walk<A> {
    flows: HashMap<MapData, FlowKey<A>, Flow<A>>,
    batches: Batches<FlowKey<A>, Flow<A>>,
}

fn map(pins: &PinDir, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(pins.table(name)).map_err(|error| DatapathError::map("open", error))
}

impl<A: Address> Walk<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    fn new(pins: &PinDir, name: &str) -> Result<Self, DatapathError> {
        let flows = Map::from_map_data(map(pins, name)?).and_then(HashMap::try_from);
        let flows = flows.map_err(|error| DatapathError::map("open", error))?;
        Ok(Self { flows, batches: Batches::new(map(pins, name)?) })
    }

    /// Looks at the next entries, takes out those that have ended; how many were looked at, none when the walk has ended.
    fn go_on(&mut self, clock: Clock<'_>, done: &mut Sweep) -> Result<Option<usize>, DatapathError> {
        let Some(entries) = self.batches.next()? else {
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
            }
        }
        for key in ended {
            // It may have come to life since it was read.
            let Ok(flow) = self.flows.get(&key, 0) else { continue };
            if clock.has_ended(&key, &flow) && self.flows.remove(&key).is_ok() {
                done.removed += 1;
            }
        }
        done.seen += seen as u64;
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
    /// The backends that those left name.
    pub named: BTreeSet<u32>,
}

/// A walk that is under way.
pub(super) struct Sweeper {
    v4: Vec<Walk<V4>>,
    v6: Vec<Walk<V6>>,
    done: Sweep,
    /// The backends that were free, and might be named, when it began.
    pub(super) resting: BTreeSet<u32>,
}

impl Sweeper {
    pub(super) fn new(pins: &PinDir, resting: BTreeSet<u32>) -> Result<Self, DatapathError> {
        let v4 = [table::HALF_OPEN4, table::FLOWS4].map(|name| Walk::new(pins, name));
        let v6 = [table::HALF_OPEN6, table::FLOWS6].map(|name| Walk::new(pins, name));
        Ok(Self {
            v4: v4.into_iter().collect::<Result<_, _>>()?,
            v6: v6.into_iter().collect::<Result<_, _>>()?,
            done: Sweep::default(),
            resting,
        })
    }

    /// Goes on for a slice; true when all tables are done.
    pub(super) fn go_on(&mut self, clock: Clock<'_>) -> Result<bool, DatapathError> {
        let mut left = SLICE;
        while left > 0 {
            let seen = if let Some(walk) = self.v4.last_mut() {
                let seen = walk.go_on(clock, &mut self.done)?;
                if seen.is_none() {
                    self.v4.pop();
                }
                seen
            } else if let Some(walk) = self.v6.last_mut() {
                let seen = walk.go_on(clock, &mut self.done)?;
                if seen.is_none() {
                    self.v6.pop();
                }
                seen
            } else {
                return Ok(true);
            };
            left = left.saturating_sub(seen.unwrap_or_default());
        }
        Ok(false)
    }

    pub(super) fn done(self) -> Sweep {
        self.done
    }
}

impl TableSet {
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
