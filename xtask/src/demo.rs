//! `demo`: a cluster in network namespaces, and the walk-through, from nothing.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigHandler, Signal};

use crate::{
    ebpf, packages,
    packages::Missing,
    run::{as_root, cargo, exec, root, target},
    steps::{self, Steps},
    toolchain::{self, DEMO_TOOLS, LINKER, PACKET_TOOLS},
};

/// Builds what is missing and plays the demo as root.
pub fn run(keep: bool) -> Result<()> {
    let missing = toolchain::missing(&[PACKET_TOOLS, DEMO_TOOLS], true);
    let linker = !toolchain::has_linker();
    announce(&missing, linker);
    let mut steps = Steps::new(5);
    steps.step("Install packages", || install(&missing))?;
    steps.step("Build the eBPF linker", || build_linker(linker))?;
    steps.step("Build the eBPF programs", || {
        let object = ebpf::build_quietly()?;
        let said = size(&object)?;
        Ok(((), said))
    })?;
    steps.step("Build the agent and the demo", build)?;
    steps.begin("The walk-through");
    let mut command = as_root("env", "make network namespaces and attach to their interfaces");
    command.arg(format!("LB_AGENT={}", ebpf::agent().display())).arg(target().join("release/lb-demo"));
    if keep {
        command.arg("--keep");
    }
    // Ctrl-C is the demo's to answer: it takes its namespaces down, and this waits for it.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { nix::sys::signal::signal(Signal::SIGINT, SigHandler::SigIgn)? };
    exec(&mut command)?;
    farewell(&steps);
    Ok(())
}

/// Says what this machine will have afterwards that it has not now.
fn announce(missing: &Missing, linker: bool) {
    eprintln!(
        "This builds the balancer and plays the life of a Swarm service on three nodes in network namespaces."
    );
    if !missing.is_empty() {
        eprintln!("It installs by apt, without starting any service: {}", missing.names());
    }
    if linker {
        let (name, version) = LINKER;
        eprintln!("It installs by cargo: {name} {version}");
    }
    eprintln!("It builds in {}, and says at the end how to take everything away.\n", shown(&target()));
}

fn install(missing: &Missing) -> Result<((), String)> {
    if missing.is_empty() {
        return Ok(((), "all there".into()));
    }
    let size = missing.size();
    if let Some(size) = &size {
        eprintln!("      {} packages, {} to fetch", size.packages, size.fetched);
    }
    missing.install()?;
    Ok(((), size.map_or(String::new(), |size| format!("{} on disk", size.disk))))
}

fn build_linker(missing: bool) -> Result<((), String)> {
    let path = toolchain::linker()?;
    Ok(((), if missing { size(&path)? } else { "all there".into() }))
}

/// One call of cargo, so that what both need is built once.
fn build() -> Result<((), String)> {
    let packages = ["--package", "lb-userspace", "--package", "lb-tests"];
    let programs = ["--bin", "lb-userspace", "--bin", "lb-demo"];
    steps::build(cargo().args(["build", "--release"]).args(packages).args(programs))?;
    Ok(((), size(&ebpf::agent())?))
}

fn size(path: &Path) -> Result<String> {
    let bytes = fs::metadata(path).with_context(|| format!("read {}", path.display()))?.len();
    let size = if bytes < 10 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) };
    Ok(format!("{}, {size}", shown(path)))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

fn farewell(steps: &Steps) {
    eprintln!("\nAll of it took {}. What to try next:", steps.elapsed());
    eprintln!("  cargo xtask demo --keep                        the same cluster, left up to play with");
    eprintln!("  sudo {} attach --help      serve a swarm of yours", shown(&ebpf::agent()));
    eprintln!("  cargo xtask test --list                        what is tested, and how to run a part of it");
    eprintln!("To take it away:");
    let installed = packages::installed();
    if !installed.is_empty() {
        eprintln!("  sudo apt-get purge --auto-remove {}", installed.join(" "));
    }
    if toolchain::has_linker() {
        eprintln!("  cargo uninstall {}", LINKER.0);
    }
    eprintln!("  rm -r {}", shown(&target()));
}
