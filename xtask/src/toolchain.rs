//! Finding the two halves of the toolchain and the programs that tests call, and installing what is missing where that is
//! possible.
//!
//! The eBPF object can be built by either of two compilers: a rustup nightly with `rust-src`, or Debian's
//! `rustc-web`, which brings a ready-made `core` for the BPF target.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    packages::{self, Missing},
    run::{cargo, exec, find, root},
    steps,
};

/// What builds the eBPF object.
pub enum Compiler {
    /// A rustup nightly with `rust-src`: `core` is built along.
    Nightly(String),
    /// Debian's compiler, with a prebuilt `core`.
    Debian,
}

/// The linker of eBPF objects, and its version.
pub const LINKER: (&str, &str) = ("bpf-linker", "0.13.0");
const DENY: (&str, &str) = ("cargo-deny", "0.20.2");
const DEBIAN_BUILD: [&str; 4] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", LLVM];
const LLVM: &str = "llvm-22-dev";

/// Programs that are called, each with Debian's package of it; or another file of the package.
pub type Tools = [(&'static str, &'static str)];
/// What the tests of packets call.
pub const PACKET_TOOLS: &Tools = &[("ip", "iproute2"), ("sysctl", "procps"), ("nsenter", "util-linux")];
/// What the demo calls beside those.
pub const DEMO_TOOLS: &Tools = &[("nginx", "nginx-light"), ("curl", "curl"), ("ethtool", "ethtool")];
/// What tests of whole clusters in network namespaces call beside those.
pub const NETWORK_TOOLS: &Tools =
    &[("busybox", "busybox-static"), ("iperf3", "iperf3"), ("tcpdump", "tcpdump")];
/// What tests of real swarms, and of what operators look at, call beside those: Docker itself and what it calls,
/// Prometheus, a browser.
pub const SWARM_TOOLS: &Tools = &[
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
/// What builds libFuzzer, which every lint of the workspace builds along.
const FUZZ_TOOLS: &Tools = &[("c++", "g++")];
/// What tries packages in roots of their own.
const PACKAGE_TOOLS: &Tools =
    &[("busybox", "busybox-static"), ("rpm", "rpm"), ("dpkg", "dpkg"), ("tar", "tar"), ("gzip", "gzip")];
/// What links programs for arm64, and a file of the C library that goes with it.
const ARM64_TOOLS: &Tools = &[
    ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ("/usr/aarch64-linux-gnu/lib/libc.so.6", "libc6-dev-arm64-cross"),
];

/// Installs what is missing, or says what to install. Does nothing where all is there.
pub fn setup() -> Result<()> {
    let missing = missing(&[PACKET_TOOLS, DEMO_TOOLS, NETWORK_TOOLS, SWARM_TOOLS, FUZZ_TOOLS], true);
    install(&missing)?;
    compiler()?;
    linker()?;
    components()?;
    deny()?;
    eprintln!("setup: everything is there");
    Ok(())
}

/// The packages that are missing for these programs, and for the eBPF object.
pub fn missing(tools: &[&Tools], object: bool) -> Missing {
    let programs = tools.iter().flat_map(|tools| tools.iter());
    let programs = programs.filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package);
    let compiler = if object && present().is_none() { &DEBIAN_BUILD[..] } else { &[] };
    let llvm = (object && !has_linker() && !llvm().exists()).then_some(LLVM);
    Missing::of(programs.chain(compiler.iter().copied()).chain(llvm))
}

/// Installs packages, and says so and how much it is before.
pub fn install(missing: &Missing) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing by apt: {}", missing.names());
    if let Some(size) = missing.size() {
        eprintln!("  {} packages, {} to fetch, {} on disk", size.packages, size.fetched, size.disk);
    }
    missing.install()
}

/// Installs the programs that are missing.
pub fn tools(tools: &[&Tools]) -> Result<()> {
    install(&missing(tools, false))
}

/// The compiler for the eBPF object, installed if need be.
pub fn compiler() -> Result<Compiler> {
    if let Some(found) = present() {
        return Ok(found);
    }
    if packages::is_debian() && packages::has_candidate(DEBIAN_BUILD[0]) {
        install(&Missing::of(DEBIAN_BUILD))?;
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

fn installed_linker() -> Option<PathBuf> {
    let (name, version) = LINKER;
    let found = find(name)?;
    let said = Command::new(&found).arg("--version").output().ok()?;
    String::from_utf8_lossy(&said.stdout).contains(version).then_some(found)
}

/// Whether the linker for the eBPF object is there.
pub fn has_linker() -> bool {
    installed_linker().is_some()
}

fn llvm() -> &'static Path {
    Path::new("/usr/lib/llvm-22/lib")
}

/// The linker for the eBPF object, installed if need be.
pub fn linker() -> Result<PathBuf> {
    if let Some(found) = installed_linker() {
        return Ok(found);
    }
    let (name, version) = LINKER;
    if !llvm().exists() && packages::is_debian() && packages::has_candidate(LLVM) {
        install(&Missing::of([LLVM]))?;
    }
    let llvm = llvm().parent().filter(|llvm| llvm.exists()).with_context(|| {
        format!(
            "no {name} was found. Install it: cargo binstall {name}, or cargo install {name} with LLVM 22 at hand"
        )
    })?;
    let mut command = cargo();
    command.env("LLVM_PREFIX", llvm).args(["install", "--locked", "--force", name, "--version", version]);
    steps::build(command.args(["--no-default-features", "--features", "llvm-22"]))?;
    find(name).with_context(|| format!("{name} was installed, but is not on the search path"))
}

/// cargo-deny, installed if need be.
pub fn deny() -> Result<PathBuf> {
    cargo_tool(DENY, &[])
}

/// One of cargo's tools by its name and version, installed with these arguments if need be.
pub fn cargo_tool((name, version): (&str, &str), arguments: &[&str]) -> Result<PathBuf> {
    if find(name).is_none() {
        let mut command = cargo();
        steps::build(command.args(["install", name, "--version", version, "--locked"]).args(arguments))?;
    }
    find(name).with_context(|| format!("{name} was installed, but is not on the search path"))
}

/// What builds libFuzzer.
pub fn fuzz_tools() -> Result<()> {
    tools(&[FUZZ_TOOLS])
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

/// The programs that the benches call.
pub fn bench_tools() -> Result<()> {
    tools(&[PACKET_TOOLS, DEMO_TOOLS, NETWORK_TOOLS, SWARM_TOOLS, BENCH_TOOLS])
}

/// The programs that pack, and that try what was packed.
pub fn package_tools() -> Result<()> {
    tools(&[PACKAGE_TOOLS])
}

/// The programs that boot guests with other kernels.
pub fn guest_tools() -> Result<()> {
    tools(&[GUEST_TOOLS])
}

/// What links programs for arm64.
pub fn arm64_tools() -> Result<()> {
    tools(&[ARM64_TOOLS])
}

/// The programs that tests without Docker call.
pub fn network_programs() -> impl Iterator<Item = &'static str> {
    [PACKET_TOOLS, DEMO_TOOLS, NETWORK_TOOLS].into_iter().flatten().map(|(program, _)| *program)
}
