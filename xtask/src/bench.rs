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

/// Measures what an agent takes in large swarms. The arguments are the bench's own.
pub fn run_scale(arguments: &[OsString]) -> Result<()> {
    measure("lb-bench-scale", arguments)
}

fn measure(program: &str, arguments: &[OsString]) -> Result<()> {
    toolchain::bench_tools()?;
    let bench_object = ebpf::build_bench()?;
    let agent = ebpf::build_agent()?;
    ebpf::build_tests()?;
    let mut command = as_root("env", "measure in network namespaces");
    command.arg(format!("LB_AGENT={}", agent.display()));
    command.arg(format!("LB_BENCH_OBJECT={}", bench_object.display()));
    exec(command.arg(target().join("release").join(program)).args(arguments))
}
