//! `cargo xtask`: everything that is done to this project, in one place.

mod apt;
mod arm64;
mod bench;
mod check;
mod demo;
mod ebpf;
mod image;
mod kernel;
mod run;
mod test;
mod toolchain;

use std::process::ExitCode;

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
    /// Build the eBPF object
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
    /// What a packet costs in the programs, in nanoseconds, as root
    Bench {
        /// How long changes of a real swarm take to reach every node's datapath, instead
        #[arg(long)]
        swarm: bool,
    },
    /// A three-node cluster in network namespaces, and the Swarm walk-through on it, as root
    Demo {
        /// Leave the cluster up, and say how to enter it
        #[arg(long)]
        keep: bool,
    },
}

fn main() -> ExitCode {
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
        Verb::BuildEbpf => ebpf::build().map(drop),
        Verb::Build { arm64: false } => ebpf::build_agent().map(drop),
        Verb::Build { arm64: true } => arm64::build().map(drop),
        Verb::Image => image::run(),
        Verb::Check => check::run(),
        Verb::Test { filter, kernel: None, .. } => test::run(filter.as_deref()),
        Verb::Test { filter, kernel: Some(wanted), short } => test::run_on(&wanted, filter.as_deref(), short),
        Verb::Bench { swarm } => bench::run(swarm),
        Verb::Demo { keep } => demo::run(keep),
    }
}
