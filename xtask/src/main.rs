//! `cargo xtask`: everything that is done to this project, in one place.

mod apt;
mod arm64;
mod bench;
mod check;
mod demo;
mod docker;
mod docs;
mod ebpf;
mod fuzz;
mod install;
mod kernel;
mod packages;
mod release;
mod run;
mod sbom;
mod steps;
mod suites;
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
    /// Build the agent as it is given away, static and stripped, and pack it: target/package
    Package {
        /// How; all by default
        #[arg(value_enum)]
        formats: Vec<release::Format>,
        /// For which machines
        #[arg(long, value_enum, default_value = "amd64")]
        arch: release::Architecture,
        /// Install each package in a root of its own, try it, and take it away again
        #[arg(long, conflicts_with_all = ["formats", "arch"])]
        test: bool,
    },
    /// Formatting, lints, tests that need no root, licences
    Check,
    /// Build the book: target/book/html
    Docs,
    /// Everything `check` does not: tests in network namespaces, as root
    Test(test::Arguments),
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
        /// What a manager's agent takes in swarms of 1,000 to 100,000 tasks, instead
        #[arg(long, conflicts_with = "swarm")]
        scale: bool,
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
        Verb::Image => release::image(),
        Verb::Package { test: true, .. } => release::test(),
        Verb::Package { formats, arch, .. } => release::run(&formats, arch),
        Verb::Check => check::run(),
        Verb::Docs => docs::run(),
        Verb::Test(arguments) => test::run(&arguments),
        Verb::Fuzz { targets, seconds } => fuzz::run(&targets, seconds),
        Verb::Sbom => sbom::run(),
        Verb::Bench { swarm: true, .. } => bench::run_swarm(),
        Verb::Bench { scale: true, arguments, .. } => bench::run_scale(&arguments),
        Verb::Bench { arguments, .. } => bench::run(&arguments),
        Verb::Demo { keep } => demo::run(keep),
    }
}
