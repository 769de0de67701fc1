//! `bench`: what packets cost.

use anyhow::Result;

use crate::{
    ebpf,
    run::{as_root, exec, target},
    toolchain,
};

/// Builds what is missing and measures as root: packets, or how long a real swarm's changes take.
pub fn run(swarm: bool) -> Result<()> {
    toolchain::test_tools()?;
    let object = ebpf::build()?;
    let agent = ebpf::build_agent()?;
    ebpf::build_tests(&object)?;
    let program = if swarm { "lb-bench-swarm" } else { "lb-bench" };
    let mut command = as_root("env");
    command.arg(format!("LB_AGENT={}", agent.display())).arg(target().join("release").join(program));
    exec(&mut command)
}
