//! `test`: the tests that need root.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    ebpf,
    kernel::{self, Tests, Wanted},
    run::{as_root, cargo, exec, output},
    toolchain,
};

/// Builds everything, then runs each test program as root.
pub fn run(filter: Option<&str>) -> Result<()> {
    toolchain::test_tools()?;
    let object = ebpf::build()?;
    let agent = ebpf::build_agent()?;
    let mut failed = Vec::new();
    for program in programs(&object)? {
        let mut command: Command = as_root("env");
        command.arg(format!("LB_AGENT={}", agent.display())).arg(format!("LB_OBJECT={}", object.display()));
        // Two cores run a namespace's stacks and its clients; more tests at once only wait for each other.
        command.arg(&program).arg("--test-threads=2").args(filter);
        // The others are run all the same.
        if let Err(error) = exec(&mut command) {
            failed.push(error.to_string());
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

/// Builds everything, then runs tests on other kernels.
pub fn run_on(wanted: &Wanted, filter: Option<&str>, short: bool) -> Result<()> {
    toolchain::demo_tools()?;
    let object = ebpf::build()?;
    let agent = ebpf::build_agent()?;
    let programs = programs(&object)?;
    kernel::run(wanted, &Tests { agent: &agent, object: &object, programs: &programs, filter, short })
}

/// The test programs, built as an ordinary user.
fn programs(object: &std::path::Path) -> Result<Vec<PathBuf>> {
    let built = output(cargo().env("LB_EBPF_OBJECT", object).args([
        "test",
        "--release",
        "--package",
        "lb-tests",
        "--no-run",
        "--message-format=json",
    ]))
    .context("build the tests")?;
    let mut programs: Vec<PathBuf> = built
        .lines()
        .filter(|line| line.contains("\"test\":true"))
        .filter_map(|line| line.split_once("\"executable\":\"")?.1.split_once('"'))
        .map(|(path, _)| PathBuf::from(path))
        .collect();
    programs.sort();
    if programs.is_empty() {
        bail!("cargo built no test program");
    }
    Ok(programs)
}
