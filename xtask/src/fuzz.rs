//! `fuzz`: libFuzzer on what others may send, with the toolchain that builds everything else.
//!
//! Coverage is recorded by a pass of LLVM that the stable compiler has too; it is switched on for this project's own crates
//! alone, so that what they depend on is not built again. A sanitizer would need another toolchain, and finds errors of
//! memory, which these crates cannot have.

use std::{env, ffi::OsString, fs, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    run::{cargo, exec, root, target},
    toolchain,
};

/// Says that this program was started in the place of rustc.
const AS_COMPILER: &str = "LB_XTASK_COMPILES";
/// As `fuzz/Cargo.toml` and the folders of `fuzz/corpus` have them.
const TARGETS: [&str; 4] = ["cluster_file", "labels", "engine_api", "agents"];
/// A single input takes no longer than this, in seconds, on a busy machine.
const TIMEOUT: u32 = 20;
/// The longest input, in bytes.
const LONGEST: usize = 16 << 10;
/// As much memory as a target may take, in MiB.
const MEMORY: u32 = 1024;

/// What libFuzzer needs to see where an input leads.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// In the place of rustc, if cargo started this so: compiles this project's crates with coverage.
pub fn compiles() -> bool {
    if env::var_os(AS_COMPILER).is_none() {
        return false;
    }
    let mut arguments = env::args_os().skip(1);
    let compiler = arguments.next().unwrap_or_else(|| "rustc".into());
    let arguments: Vec<OsString> = arguments.collect();
    let mut command = Command::new(compiler);
    command.args(&arguments);
    let name = arguments.iter().position(|argument| argument == "--crate-name");
    let name = name.and_then(|at| arguments.get(at + 1));
    // Neither questions about the compiler nor build scripts.
    if name.is_some_and(|name| name != "build_script_build" && name != "___") {
        command.args(COVERAGE);
    }
    eprintln!("run rustc: {}", command.exec());
    std::process::exit(1);
}

/// Runs these targets, or all, for so many seconds each.
pub fn run(targets: &[String], seconds: u32) -> Result<()> {
    if let Some(unknown) = targets.iter().find(|target| !TARGETS.contains(&target.as_str())) {
        bail!("there is no fuzz target {unknown}; those there are: {}", TARGETS.join(", "));
    }
    toolchain::fuzz_tools()?;
    let own = env::current_exe().context("find this program")?;
    let mut build = cargo();
    build.env("RUSTC_WORKSPACE_WRAPPER", own).env(AS_COMPILER, "1");
    exec(build.args(["build", "--package", "lb-fuzz", "--bins"]))?;
    let wanted =
        TARGETS.iter().filter(|name| targets.is_empty() || targets.iter().any(|wanted| wanted == *name));
    let mut failed = Vec::new();
    for name in wanted {
        // What is found goes with the build; what is kept is put into the tree by hand.
        let (found, broken) = (folder(&format!("fuzz/{name}"))?, folder(&format!("fuzz/{name}-failed"))?);
        let mut command =
            Command::new(target().join("debug").join(format!("fuzz-{}", name.replace('_', "-"))));
        command.arg(&found).arg(root().join("fuzz/corpus").join(name)).args([
            format!("-max_total_time={seconds}"),
            format!("-timeout={TIMEOUT}"),
            format!("-max_len={LONGEST}"),
            format!("-rss_limit_mb={MEMORY}"),
            format!("-artifact_prefix={}/", broken.display()),
            "-print_final_stats=1".into(),
            "-print_funcs=0".into(),
            "-verbosity=0".into(),
        ]);
        println!("{name}, {seconds} s");
        if let Err(error) = exec(&mut command) {
            failed.push(format!(
                "{error}\nthe input is in {}: put it to fuzz/corpus/{name}, where `cargo test` plays it, and mend what it finds",
                broken.display()
            ));
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

fn folder(name: &str) -> Result<PathBuf> {
    let path = target().join(name);
    fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    Ok(path)
}
