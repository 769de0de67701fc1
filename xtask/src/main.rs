//! `cargo xtask`: everything that is done to this project, in one place.

mod apt;
mod arm64;
mod bench;
mod check;
mod demo;
mod ebpf;
mod fuzz;
mod image;
mod kernel;
mod run;
mod sbom;
mod test;
mod toolchain;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, checks, tests and shows the balancer. What is missing is set up first.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find or install what building and testing need
    Setup,
    /// Build the eBPF object, and that of the benches
    BuildEbpf,
    /// Build the agent, with the eBPF object in it: target/release/lb-userspace
    Build {
        /// For arm64 instead of this machine
        #[arg(long)]
        arm64: bool,
    },
    /// Build the agent's container image: lb-userspace:latest
    Image,
    /// Formatting, lints, tests that need no root, licences
    Check,
    /// Everything `check` does not: tests in network namespaces, as root
    Test {
        /// Only tests whose name holds this
        filter: Option<String>,
        /// On these kernels instead of this machine's, in an emulator: `6.1`, `6.1,6.12`, or `all` that Debian has
        #[arg(long, value_name = "SERIES")]
        kernel: Option<kernel::Wanted>,
        /// There only how the programs load, attach and serve, and the tables
        #[arg(long, requires = "kernel", conflicts_with = "filter")]
        short: bool,
    },
    /// Feed files, labels, Docker's answers and agents' messages that nobody would write, found by where they lead
    Fuzz {
        /// Only these targets: `cluster_file`, `labels`, `engine_api`, `agents`
        targets: Vec<String>,
        /// For so many seconds each
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// What the agent is made of, as CycloneDX: target/lb-userspace.cdx.json
    Sbom,
    /// What things cost, beside what a user would pick instead, as root; `bench -- --help` has its own arguments
    Bench {
        /// How long changes of a real swarm take to reach every node's datapath, instead
        #[arg(long)]
        swarm: bool,
        /// What the bench is given: parts to measure, `--quick`, `-o json`, `--compare PINNED_PROGRAM…`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, conflicts_with = "swarm")]
        arguments: Vec<OsString>,
    },
    /// A three-node cluster in network namespaces, and the Swarm walk-through on it, as root
    Demo {
        /// Leave the cluster up, and say how to enter it
        #[arg(long)]
        keep: bool,
    },
}

fn main() -> ExitCode {
    if fuzz::compiles() {
        return ExitCode::SUCCESS;
    }
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Setup => toolchain::setup(),
        Verb::BuildEbpf => ebpf::build().and_then(|_| ebpf::build_bench()).map(drop),
        Verb::Build { arm64: false } => ebpf::build_agent().map(drop),
        Verb::Build { arm64: true } => arm64::build().map(drop),
        Verb::Image => image::run(),
        Verb::Check => check::run(),
        Verb::Test { filter, kernel: None, .. } => test::run(filter.as_deref()),
        Verb::Test { filter, kernel: Some(wanted), short } => test::run_on(&wanted, filter.as_deref(), short),
        Verb::Fuzz { targets, seconds } => fuzz::run(&targets, seconds),
        Verb::Sbom => sbom::run(),
        Verb::Bench { swarm: true, .. } => bench::run_swarm(),
        Verb::Bench { swarm: false, arguments } => bench::run(&arguments),
        Verb::Demo { keep } => demo::run(keep),
    }
}
