//! `bench`: what things cost, measured.

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    ebpf,
    run::{as_root, exec, target},
    toolchain,
};

/// Builds what is missing and measures as root. The arguments are the bench's own.
pub fn run(arguments: &[OsString]) -> Result<()> {
    measure("lb-bench", arguments)
}

/// Measures how long a real swarm's changes take.
pub fn run_swarm() -> Result<()> {
    measure("lb-bench-swarm", &[])
}

fn measure(program: &str, arguments: &[OsString]) -> Result<()> {
    toolchain::bench_tools()?;
    let object = ebpf::build()?;
    let bench_object = ebpf::build_bench()?;
    let agent = ebpf::build_agent()?;
    ebpf::build_tests(&object)?;
    let mut command = as_root("env");
    command.arg(format!("LB_AGENT={}", agent.display()));
    command.arg(format!("LB_BENCH_OBJECT={}", bench_object.display()));
    exec(command.arg(target().join("release").join(program)).args(arguments))
}
