//! `log-level`: changes what a running agent logs.

use anyhow::{Result, bail};

use super::{attached, out};
use crate::{
    cli::{Output, Read},
    datapath::PinDir,
    logging::Level,
};

/// Asks the agents of this network namespace to log this from now on, until they end.
///
/// # Errors
/// Nothing is attached, or no agent runs.
pub fn run(level: &Level) -> Result<()> {
    let read = Read { iface: None, output: Output::Table };
    let mut told = Vec::new();
    for (interface, mut set) in attached(&read)? {
        if let Some(pid) = PinDir::of(&interface)?.controller() {
            set.set_log_level(Some(&level.to_string()))?;
            told.push(format!("process {pid} ({interface})"));
        }
    }
    if told.is_empty() {
        bail!("no agent runs in this network namespace; `lb-userspace attach` starts one");
    }
    out::line(format!("{level} is logged within a second by {}", told.join(", ")))
}
