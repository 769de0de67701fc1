//! `top`: what is going on, redrawn every second.

use std::time::Instant;

use anyhow::{Context as _, Result};
use lb_common::abi::Mode;

use super::inventories;
use crate::{
    cli::{Output, Read},
    health::{AgentState, assess},
    top::{self, Seen},
};

/// Shows an interface, the first one that is attached unless another is named.
///
/// # Errors
/// Nothing is attached, the kernel refuses a read, or there is no terminal.
pub fn run(interface: Option<&str>) -> Result<()> {
    let read = Read { iface: interface.map(str::to_owned), output: Output::Table };
    top::run(|| {
        let (inventory, set) = inventories(&read)?.into_iter().next().context("nothing is attached")?;
        let open = set.open_connections(&inventory.tables)?;
        let around = AgentState::read(&inventory.interface, &set)?;
        let health = assess(&inventory, &around);
        let mode = Mode::try_from(around.config.mode).map_or("not attached yet", Mode::name);
        let controller = around.controller.map_or("no controller".to_owned(), |pid| format!("process {pid}"));
        let outcomes = inventory
            .counters
            .outcomes
            .iter()
            .map(|count| (count.outcome.name().to_owned(), count.packets, count.outcome.is_dropped()));
        Ok(Seen {
            at: Instant::now(),
            interface: inventory.interface.clone(),
            title: format!("{}  {mode}  {controller}", health.verdict.name()),
            problems: health.problems,
            services: inventory.services(),
            tasks: inventory.tasks(|_| true, Some(&open)),
            nodes: inventory.nodes(),
            outcomes: outcomes.collect(),
        })
    })
}
