//! The agent for arm64. The eBPF object is the same; the agent is compiled across.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::Apt,
    ebpf,
    run::{self, exec, find, output, target},
    toolchain,
};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
/// Debian's standard library for its compiler.
const LIBRARY: &str = "libstd-rust-web-dev";

/// A cargo that compiles for arm64: rustup's compiler if it has the target, else Debian's.
///
/// # Errors
/// Neither compiler has a standard library for arm64.
pub fn cargo() -> Result<Command> {
    toolchain::arm64_tools()?;
    let mut command = if has_target() {
        run::cargo()
    } else {
        let sysroot = debian_sysroot(&target().join("arm64"))?;
        let mut command = toolchain::debian_cargo();
        // Only what runs there is compiled with it: build scripts and macros have the machine's own.
        command.env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            format!("--sysroot {}", sysroot.display()),
        );
        command
    };
    command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
    Ok(command)
}

/// Builds the agent.
///
/// # Errors
/// Neither compiler has a standard library for arm64, or the build fails.
pub fn build() -> Result<PathBuf> {
    ebpf::build()?;
    let folder = target().join("arm64");
    let mut command = cargo()?;
    command.args(["build", "--release", "--package", "lb-userspace", "--target", TARGET, "--target-dir"]);
    exec(command.arg(&folder))?;
    let agent = folder.join(TARGET).join("release/lb-userspace");
    println!("{}", agent.display());
    Ok(agent)
}

/// Whether the compiler that builds everything else has the target.
fn has_target() -> bool {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let folder = output(Command::new(compiler).args(["--print", "target-libdir", "--target", TARGET]));
    folder.is_ok_and(|folder| Path::new(folder.trim()).exists())
}

/// A root for Debian's compiler that holds its standard library for arm64: the package of that architecture, of the
/// very version that is installed, unpacked and not installed.
fn debian_sysroot(folder: &Path) -> Result<PathBuf> {
    let installed = Command::new("dpkg-query").args(["-W", "-f", "${Version}", LIBRARY]).output();
    let version = installed.ok().filter(|said| said.status.success()).map(|said| said.stdout);
    let Some(version) = version.and_then(|version| String::from_utf8(version).ok()) else {
        bail!(
            "no standard library for arm64 was found; install one of:\n  rustup target add {TARGET}\n  apt-get install \
             rustc-web cargo-web {LIBRARY} (Debian 12 and later)"
        );
    };
    let sysroot = folder.join(format!("sysroot-{}", version.replace(['+', '~', ':'], "-")));
    let lib = sysroot.join("lib");
    if !lib.join("rustlib").join(TARGET).join("lib").exists() {
        println!("arm64: fetching {LIBRARY} {version}");
        let apt = Apt::of_machine(folder.join("apt"), "arm64")?;
        apt.update();
        let unpacked = folder.join("unpacked");
        let _ = fs::remove_dir_all(&unpacked);
        apt.unpack(&format!("{LIBRARY}={version}"), &unpacked, |_| false)?;
        fs::create_dir_all(&lib).with_context(|| format!("create {}", lib.display()))?;
        fs::rename(unpacked.join("usr/lib/rustlib"), lib.join("rustlib"))
            .with_context(|| format!("{LIBRARY} holds no standard library"))?;
        fs::remove_dir_all(&unpacked).context("remove what was unpacked")?;
    }
    if find(LINKER).is_none() {
        bail!("{LINKER} was not found");
    }
    Ok(sysroot)
}
