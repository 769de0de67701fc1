//! `demo`: a cluster in network namespaces, and the walk-through.

use anyhow::Result;
use nix::sys::signal::{SigHandler, Signal};

use crate::{
    ebpf,
    run::{as_root, exec, target},
    toolchain,
};

/// Builds what is missing and plays the demo as root.
pub fn run(keep: bool) -> Result<()> {
    toolchain::demo_tools()?;
    let object = ebpf::build()?;
    let agent = ebpf::build_agent()?;
    ebpf::build_tests(&object)?;
    let mut command = as_root("env");
    command.arg(format!("LB_AGENT={}", agent.display())).arg(target().join("release/lb-demo"));
    if keep {
        command.arg("--keep");
    }
    // Ctrl-C is the demo's to answer: it takes its namespaces down, and this waits for it.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { nix::sys::signal::signal(Signal::SIGINT, SigHandler::SigIgn)? };
    exec(&mut command)
}
