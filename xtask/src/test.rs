//! `test`: the tests that need root.

use std::{
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    docker, ebpf,
    kernel::{self, Tests, Wanted},
    run::{as_root, cargo, exec, exec_whole, output},
    steps::seconds,
    suites::{self, Choice, Suite, Tier},
    toolchain,
};

/// What to run.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only tests whose name holds this
    filter: Option<String>,
    /// Only this suite, a file of tests/tests; may be given more than once
    #[arg(long, value_name = "NAME")]
    suite: Vec<String>,
    /// Only suites that need no more of the machine than this
    #[arg(long, value_enum, value_name = "TIER")]
    tier: Option<Tier>,
    /// Only tests of single packets: no Docker, no servers, 2 minutes; the same as --tier packets
    #[arg(long, conflicts_with = "tier")]
    fast: bool,
    /// Show the suites, or with a filter the tests, and run nothing
    #[arg(long)]
    list: bool,
    /// The suites of real swarms, on this Docker from Debian in place of the machine's own
    #[arg(long, value_name = "VERSION", conflicts_with_all = ["kernel", "tier", "fast"])]
    docker: Option<docker::Version>,
    /// The suites of upgrades: the agent of that commit beside this one
    #[arg(long, value_name = "COMMIT", conflicts_with_all = ["kernel", "tier", "fast", "docker"])]
    before: Option<String>,
    /// On these kernels instead of this machine's, in an emulator: `6.1`, `6.1,6.12`, or `all` that Debian has
    #[arg(long, value_name = "SERIES", conflicts_with_all = ["suite", "tier", "fast"])]
    kernel: Option<Wanted>,
    /// There only how the programs load, attach and serve, and the tables
    #[arg(long, requires = "kernel", conflicts_with = "filter")]
    short: bool,
}

/// Runs what is asked for.
///
/// # Errors
/// Something cannot be built, or a test fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    let filter = arguments.filter.as_deref();
    if let Some(wanted) = &arguments.kernel {
        return run_on(wanted, filter, arguments.short);
    }
    let tier = if arguments.fast { Some(Tier::Packets) } else { arguments.tier };
    let mut suites = suites::chosen(&Choice { suites: &arguments.suite, tier })?;
    if arguments.docker.is_some() {
        suites.retain(|suite| suite.docker);
    }
    // They need what is built for them alone.
    if !arguments.list {
        suites.retain(|suite| suite.before == arguments.before.is_some());
        if suites.is_empty() {
            bail!("nothing of it runs so: the suites of upgrades run with --before COMMIT alone");
        }
    }
    let suites = holding(suites, filter)?;
    if arguments.list {
        suites::list(&suites, filter);
        return Ok(());
    }
    toolchain::tools(&suites::tools(&suites))?;
    let engine = arguments.docker.map(docker::fetch).transpose()?;
    let before = arguments.before.as_deref().map(ebpf::build_agent_of).transpose()?;
    run_suites(&suites, filter, &Beside { engine, before })
}

/// What tests are given beside the agent.
#[derive(Default)]
struct Beside {
    /// Where another Docker's programs are.
    engine: Option<PathBuf>,
    /// The agent of an earlier commit.
    before: Option<PathBuf>,
}

/// The suites with a test whose name holds the filter.
fn holding(mut suites: Vec<Suite>, filter: Option<&str>) -> Result<Vec<Suite>> {
    if let Some(filter) = filter {
        suites.retain(|suite| suite.tests.iter().any(|name| name.contains(filter)));
        if suites.is_empty() {
            bail!("no test's name holds {filter:?}; `cargo xtask test --list` shows the suites");
        }
    }
    Ok(suites)
}

/// Builds everything, then runs each suite as root.
fn run_suites(suites: &[Suite], filter: Option<&str>, beside: &Beside) -> Result<()> {
    let agent = ebpf::build_agent()?;
    let object = ebpf::object();
    let programs = programs(suites)?;
    let command = |program: &Path| {
        let mut command = as_root("env", "run the tests");
        command.arg(format!("LB_AGENT={}", agent.display())).arg(format!("LB_OBJECT={}", object.display()));
        if let Some(before) = &beside.before {
            command.arg(format!("LB_AGENT_BEFORE={}", before.display()));
        }
        if let Some(engine) = &beside.engine {
            let path = std::env::var("PATH").unwrap_or_default();
            command.arg(format!("PATH={}:{path}:/usr/sbin:/sbin", engine.display()));
        }
        command.arg(program).arg("--test-threads=2").args(filter);
        command
    };
    let start = Instant::now();
    let ended = match programs.as_slice() {
        [only] => vec![ended(only, |program| exec(&mut command(program)))?],
        several => {
            let alone = |program: &&PathBuf| is_alone(program, suites);
            let (alone, beside): (Vec<_>, Vec<_>) = several.iter().partition(alone);
            let mut done = Vec::new();
            for program in alone {
                done.push(ended(program, |program| exec(&mut command(program)))?);
            }
            done.extend(in_lanes(&beside, |program| exec_whole(&mut command(program)))?);
            done
        }
    };
    println!("\ntime by suite:");
    for Ended { name, time, .. } in &ended {
        println!("  {name:<14} {:>12}", seconds(*time));
    }
    println!("  {:<14} {:>12}", "all", seconds(start.elapsed()));
    let failed: Vec<String> = ended
        .into_iter()
        .filter_map(|Ended { failure, .. }| failure)
        .map(|error| error.to_string())
        .collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

/// Suites that run at once: most of a test is waiting, for a timer, a server or the kernel.
const LANES: usize = 2;

/// What became of a suite.
struct Ended {
    name: String,
    time: Duration,
    failure: Option<anyhow::Error>,
}

fn ended(program: &Path, run: impl Fn(&Path) -> Result<()>) -> Result<Ended> {
    let (name, start) = (kernel::test_name(program)?, Instant::now());
    let failure = run(program).err();
    Ok(Ended { name, time: start.elapsed(), failure })
}

/// Whether a suite's program has the machine to itself.
fn is_alone(program: &Path, suites: &[Suite]) -> bool {
    let name = kernel::test_name(program).unwrap_or_default();
    suites.iter().any(|suite| suite.alone && suite.name == name)
}

/// Runs each suite in the first lane that is free. After one that fails the others are run all the same.
fn in_lanes(programs: &[&PathBuf], run: impl Fn(&Path) -> Result<()> + Sync) -> Result<Vec<Ended>> {
    let next = AtomicUsize::new(0);
    let lane = || {
        let mut done = Vec::new();
        while let Some(program) = programs.get(next.fetch_add(1, Ordering::Relaxed)) {
            // What it says comes when it has ended.
            eprintln!("{} runs", kernel::test_name(program)?);
            done.push(ended(program, &run)?);
        }
        Ok(done)
    };
    let lanes = thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        let joined = lanes.into_iter().map(|lane| lane.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.collect::<Result<Vec<_>>>()
    })?;
    let mut done: Vec<Ended> = lanes.into_iter().flatten().collect();
    done.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(done)
}

/// Builds everything, then runs tests on other kernels.
fn run_on(wanted: &Wanted, filter: Option<&str>, short: bool) -> Result<()> {
    toolchain::tools(&suites::tools(&suites::chosen(&Choice { tier: Some(Tier::Network), suites: &[] })?))?;
    let agent = ebpf::build_agent()?;
    let object = ebpf::object();
    let mut suites = holding(suites::chosen(&Choice::default())?, filter)?;
    suites.retain(|suite| !suite.before);
    let programs = programs(&suites)?;
    kernel::run(wanted, &Tests { agent: &agent, object: &object, programs: &programs, filter, short })
}

/// The suites' programs, built as an ordinary user.
fn programs(suites: &[Suite]) -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    command.args(["test", "--release", "--package", "lb-tests", "--no-run", "--message-format=json"]);
    command.args(suites.iter().flat_map(|suite| ["--test", &suite.name]));
    let built = output(&mut command).context("build the tests")?;
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
