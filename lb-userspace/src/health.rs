//! Whether an interface is served as it should be: one verdict, and what stands against it. `status`, `/-/ready`, the page
//! and `doctor` say the same.

use std::collections::BTreeMap;

use lb_common::abi::{Config, Mode, table};
use serde::Serialize;

use crate::{
    datapath::{DatapathError, PinDir, TableSet},
    inventory::{Agent, Inventory},
    limits::{setting_of, wider},
    report::moment,
};

/// How an interface is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Serving,
    /// It is served, and something is wrong.
    Degraded,
    /// Its tables are made, its programs are not attached yet.
    Starting,
}

impl Verdict {
    /// The word users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "SERVING",
            Self::Degraded => "DEGRADED",
            Self::Starting => "STARTING",
        }
    }
}

/// A verdict and its reasons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// The verdict.
    pub verdict: Verdict,
    /// What is wrong, the worst first.
    pub problems: Vec<String>,
}

/// Names of so many services with problems are told.
const NAMED: usize = 3;
/// A table that is as full as this, in percent, is worth a word.
pub const NEARLY_FULL: u64 = 90;

/// What is known beside the inventory.
#[derive(Clone, Debug)]
pub struct AgentState {
    /// The programs' configuration.
    pub config: Config,
    /// The process that controls the datapath.
    pub controller: Option<u32>,
    /// Entries and room of the tables of connections, as they were counted last.
    pub fills: BTreeMap<String, [u64; 2]>,
}

impl AgentState {
    /// Reads them.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn read(interface: &str, set: &TableSet) -> Result<Self, DatapathError> {
        Ok(Self {
            config: set.config()?,
            controller: PinDir::of(interface)?.controller(),
            fills: set.fills(),
        })
    }
}

/// What stands against an interface.
pub fn assess(inventory: &Inventory, around: &AgentState) -> Health {
    let mut problems = Vec::new();
    if around.controller.is_none() {
        problems.push(
            "no controller runs: the datapath goes on by itself, and changes of the cluster are not followed; \
             `lb-userspace attach` adopts it"
                .to_owned(),
        );
    }
    if let Some(problem) = &inventory.report.problem {
        problems.push(format!(
            "the cluster's state may be out of date since {}: {problem}",
            moment(inventory.report.since)
        ));
    }
    let failing = inventory.report.failing.iter();
    problems.extend(failing.map(|error| format!("what is served may not be what it should be: {error}")));
    for node in inventory.nodes().into_iter().filter(|node| node.agent == Agent::Silent) {
        problems.push(format!("node {}: {}", node.name, node.problem.unwrap_or_default()));
    }
    let services = inventory.services().into_iter().filter_map(|s| Some((s.name, s.problem?)));
    let services: Vec<(String, String)> = services.collect();
    problems.extend(services.iter().take(NAMED).map(|(name, problem)| format!("service {name}: {problem}")));
    if services.len() > NAMED {
        problems.push(format!(
            "{} more services have a problem; `service ls --filter problem` lists them",
            services.len() - NAMED
        ));
    }
    for (table, [entries, room]) in &around.fills {
        if entries * 100 >= room * NEARLY_FULL {
            let percent = entries * 100 / (*room).max(1);
            problems.push(if table == table::POOL {
                format!("{percent} % of the addresses for IPv6 clients are in use: {}", wider(*room))
            } else {
                let setting = setting_of(table);
                format!("the table {table} is {percent} % full: attach with --replace-state and a higher {setting}")
            });
        }
    }
    if inventory.report.flooded {
        problems.push(format!(
            "a flood of new connections, more than {} a second on a CPU: they are placed by hash",
            around.config.flood_rate
        ));
    }
    let attached = Mode::try_from(around.config.mode).is_ok() && around.config.uplink != 0;
    let verdict = match (attached, problems.is_empty()) {
        (false, _) => Verdict::Starting,
        (true, true) => Verdict::Serving,
        (true, false) => Verdict::Degraded,
    };
    Health { verdict, problems }
}
