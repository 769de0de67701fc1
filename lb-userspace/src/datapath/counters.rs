//! Reading counters: sums over the CPUs.

use std::collections::BTreeMap;

use aya::{
    Pod,
    maps::{MapData, PerCpuArray},
};
use lb_common::{
    outcome::Outcome,
    stats::{BackendStats, ServiceStats, TableStats},
};

use super::{DatapathError, TableSet};
use crate::plan::Tables;

/// How many packets came to an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutcomeCount {
    /// The outcome.
    pub outcome: Outcome,
    /// Packets.
    pub packets: u64,
}

/// Everything that is counted, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Every outcome, in the order of [`Outcome::ALL`].
    pub outcomes: Vec<OutcomeCount>,
    /// By number of the service.
    pub services: BTreeMap<u32, ServiceStats>,
    /// By number of the backend.
    pub backends: BTreeMap<u32, BackendStats>,
    /// Of the connection tables: IPv4, IPv6.
    pub connections: [TableStats; 2],
}

impl Counters {
    /// Packets that came to an outcome.
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.outcomes.iter().find(|count| count.outcome == outcome).map_or(0, |count| count.packets)
    }
}

fn sum<T: Pod>(
    map: &PerCpuArray<MapData, T>,
    index: u32,
    zero: T,
    plus: fn(T, T) -> T,
) -> Result<T, DatapathError> {
    let values = map.get(&index, 0).map_err(|e| DatapathError::map("read", e))?;
    Ok(values.iter().fold(zero, |total, value| plus(total, *value)))
}

impl TableSet {
    /// Packets that came to an outcome.
    pub(super) fn outcome(&self, outcome: Outcome) -> Result<u64, DatapathError> {
        sum(&self.outcomes, outcome as u32, 0, |a, b| a + b)
    }

    /// The counters of a backend.
    pub(super) fn backend(&self, index: u32) -> Result<BackendStats, DatapathError> {
        sum(&self.backend_stats, index, BackendStats::default(), BackendStats::plus)
    }

    /// The counters of what `tables` names.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn counters(&self, tables: &Tables) -> Result<Counters, DatapathError> {
        let mut counters = Counters::default();
        for (family, stats) in (0..).zip(&mut counters.connections) {
            *stats = sum(&self.table_stats, family, TableStats::default(), TableStats::plus)?;
        }
        for outcome in Outcome::ALL {
            let packets = self.outcome(*outcome)?;
            counters.outcomes.push(OutcomeCount { outcome: *outcome, packets });
        }
        for index in tables.services.keys() {
            let stats = sum(&self.service_stats, *index, ServiceStats::default(), ServiceStats::plus)?;
            counters.services.insert(*index, stats);
        }
        for index in tables.backends.keys() {
            counters.backends.insert(*index, self.backend(*index)?);
        }
        Ok(counters)
    }
}
