//! Finding the two halves of the toolchain, and installing what is missing where that is possible.
//!
//! The eBPF object can be built by either of two compilers: a rustup nightly with `rust-src`, or Debian's
//! `rustc-web`, which brings a ready-made `core` for the BPF target.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::run::{as_root, cargo, exec, find, root};

/// What builds the eBPF object.
pub enum Compiler {
    /// A rustup nightly with `rust-src`: `core` is built along.
    Nightly(String),
    /// Debian's compiler, with a prebuilt `core`.
    Debian,
}

const LINKER: (&str, &str) = ("bpf-linker", "0.13.0");
const DENY: (&str, &str) = ("cargo-deny", "0.20.2");
const DEBIAN_BUILD: [&str; 4] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "llvm-22-dev"];
/// Debian's packages by the program of each that is called, or another file of it.
type Tools = [(&'static str, &'static str)];
/// What the demo calls.
const DEMO_TOOLS: &Tools = &[
    ("ip", "iproute2"),
    ("busybox", "busybox-static"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("iperf3", "iperf3"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("sysctl", "procps"),
    ("nsenter", "util-linux"),
];
/// What the tests call beside those: Docker itself, and what it calls.
const TEST_TOOLS: &Tools = &[
    ("dockerd", "docker.io"),
    ("iptables", "iptables"),
    ("tar", "tar"),
    ("systemd-analyze", "systemd"),
    ("prometheus", "prometheus"),
    ("chromium", "chromium"),
    ("setpriv", "util-linux"),
    ("tc", "iproute2"),
];
/// What the benches call beside those: what a user would pick instead of us, and what makes load.
const BENCH_TOOLS: &Tools = &[
    ("nft", "nftables"),
    ("haproxy", "haproxy"),
    ("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream"),
    ("wrk", "wrk"),
    ("taskset", "util-linux"),
];
/// What tests on other kernels need.
const GUEST_TOOLS: &Tools =
    &[("qemu-system-x86_64", "qemu-system-x86"), ("depmod", "kmod"), ("xz", "xz-utils"), ("zstd", "zstd")];
/// What links programs for arm64.
const ARM64_TOOLS: &Tools = &[("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")];
/// The C library that goes with them, and a file of it.
const ARM64_LIBC: (&str, &str) = ("/usr/aarch64-linux-gnu/lib/libc.so.6", "libc6-dev-arm64-cross");

/// Installs what is missing, or says what to install. Does nothing where all is there.
pub fn setup() -> Result<()> {
    compiler()?;
    linker()?;
    test_tools()?;
    components()?;
    deny()?;
    eprintln!("setup: everything is there");
    Ok(())
}

/// The compiler for the eBPF object, installed if need be.
pub fn compiler() -> Result<Compiler> {
    if let Some(found) = present() {
        return Ok(found);
    }
    if is_debian() && has_candidate(DEBIAN_BUILD[0]) {
        apt(&DEBIAN_BUILD)?;
        if let Some(found) = present() {
            return Ok(found);
        }
    }
    bail!(
        "no compiler for the eBPF target was found. Install one of:\n  \
         rustup toolchain install nightly --component rust-src\n  \
         apt-get install {} (Debian 12 and later)",
        DEBIAN_BUILD.join(" ")
    )
}

/// Debian's cargo with Debian's compiler.
pub fn debian_cargo() -> Command {
    let mut command = clean(Command::new("/usr/bin/cargo"));
    command.env("RUSTC", "/usr/bin/rustc").current_dir(root());
    command
}

/// What the outer cargo and rustup set for themselves is not meant for another compiler.
pub fn clean(mut command: Command) -> Command {
    for name in ["CARGO", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "CARGO_TARGET_DIR"]
    {
        command.env_remove(name);
    }
    command
}

fn present() -> Option<Compiler> {
    let prebuilt = Path::new("/usr/lib/rustlib/bpfel-unknown-none");
    if prebuilt.exists() && Path::new("/usr/bin/rustc").exists() && Path::new("/usr/bin/cargo").exists() {
        return Some(Compiler::Debian);
    }
    let rustup = find("rustup")?;
    let list = Command::new(rustup).args(["toolchain", "list"]).output().ok()?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    list.lines().filter_map(|line| line.split_whitespace().next()).find_map(|name| {
        let sysroot =
            Command::new("rustc").args([&format!("+{name}"), "--print", "sysroot"]).output().ok()?;
        let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
        let sources = sysroot.join("lib/rustlib/src/rust/library/core");
        (name.starts_with("nightly") && sources.exists()).then(|| Compiler::Nightly(name.to_owned()))
    })
}

/// The linker for the eBPF object, installed if need be.
pub fn linker() -> Result<PathBuf> {
    let (name, version) = LINKER;
    if let Some(found) = find(name)
        && let Ok(said) = Command::new(&found).arg("--version").output()
        && String::from_utf8_lossy(&said.stdout).contains(version)
    {
        return Ok(found);
    }
    let llvm = Path::new("/usr/lib/llvm-22");
    if !llvm.join("lib").exists() && is_debian() && has_candidate("llvm-22-dev") {
        apt(&["llvm-22-dev"])?;
    }
    if !llvm.join("lib").exists() {
        bail!(
            "no {name} was found. Install it: cargo binstall {name}, or cargo install {name} with LLVM 22 at hand"
        );
    }
    exec(cargo().env("LLVM_PREFIX", llvm).args([
        "install",
        "--force",
        name,
        "--version",
        version,
        "--no-default-features",
        "--features",
        "llvm-22",
    ]))?;
    find(name).ok_or_else(|| anyhow::anyhow!("{name} was installed, but is not on the search path"))
}

/// cargo-deny, installed if need be.
pub fn deny() -> Result<PathBuf> {
    let (name, version) = DENY;
    if find(name).is_none() {
        exec(cargo().args(["install", name, "--version", version, "--locked"]))?;
    }
    find(name).ok_or_else(|| anyhow::anyhow!("{name} was installed, but is not on the search path"))
}

/// What a minimal profile of rustup leaves out.
pub fn components() -> Result<()> {
    for (program, component) in [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")] {
        if find(program).is_none() {
            exec(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// The programs that tests call.
pub fn test_tools() -> Result<()> {
    let all: Vec<_> = DEMO_TOOLS.iter().chain(TEST_TOOLS).copied().collect();
    install(&all)
}

/// The programs that the benches call.
pub fn bench_tools() -> Result<()> {
    test_tools()?;
    install(BENCH_TOOLS)
}

/// The programs that the demo calls.
pub fn demo_tools() -> Result<()> {
    install(DEMO_TOOLS)
}

/// The programs that boot guests with other kernels.
pub fn guest_tools() -> Result<()> {
    install(GUEST_TOOLS)
}

/// What links programs for arm64.
pub fn arm64_tools() -> Result<()> {
    install(ARM64_TOOLS)?;
    let (file, package) = ARM64_LIBC;
    if !Path::new(file).exists() && is_debian() {
        apt(&[package])?;
    }
    Ok(())
}

/// The names of the programs that the demo, and tests without Docker, call.
pub fn demo_programs() -> impl Iterator<Item = &'static str> {
    DEMO_TOOLS.iter().map(|(program, _)| *program)
}

fn install(tools: &Tools) -> Result<()> {
    let (programs, packages): (Vec<&str>, Vec<&str>) =
        tools.iter().filter(|(program, _)| find(program).is_none()).copied().unzip();
    if programs.is_empty() {
        return Ok(());
    }
    if is_debian() {
        return apt(&packages);
    }
    bail!("these programs are needed, install them first: {}", programs.join(" "))
}

fn is_debian() -> bool {
    find("apt-get").is_some() && find("dpkg").is_some()
}

/// Whether apt knows the package, if need be after an update of its lists.
fn has_candidate(package: &str) -> bool {
    let known = || {
        Command::new("apt-cache")
            .args(["show", package])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .ok()
    };
    if known().is_some_and(|status| status.success()) {
        return true;
    }
    // A machine that was just made has no lists.
    let updated = exec(as_root("apt-get").args(["-q", "update"]));
    updated.is_ok() && known().is_some_and(|status| status.success())
}

/// Installs packages without starting their services: tests and benches start these themselves. What starts services asks
/// this file first (invoke-rc.d(8), deb-systemd-invoke); a machine's own is left alone.
const INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy || exit 1
fi
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
"#;

fn apt(packages: &[&str]) -> Result<()> {
    eprintln!("setup: installing {}", packages.join(" "));
    if !has_candidate(packages[0]) {
        bail!("apt has no package {}; check /etc/apt/sources.list", packages[0]);
    }
    let install = || exec(as_root("sh").args(["-c", INSTALL, "sh"]).args(packages).stdin(Stdio::null()));
    // Lists that are older than the archive name packages that are no more.
    if install().is_err() {
        exec(as_root("apt-get").args(["-q", "update"]))?;
        install()?;
    }
    // Nor are they to be started with the machine.
    for (package, services) in [
        ("nginx-light", &["nginx"][..]),
        ("docker.io", &["docker.socket", "docker"]),
        ("prometheus", &["prometheus"]),
        ("haproxy", &["haproxy"]),
    ] {
        if packages.contains(&package) && Path::new("/run/systemd/system").exists() {
            exec(as_root("systemctl").args(["disable", "--now"]).args(services))?;
        }
    }
    Ok(())
}
