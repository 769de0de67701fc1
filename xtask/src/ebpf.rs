//! Building the eBPF object, and the agent that carries it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use aya::{EbpfLoader, programs::Program};
use lb_common::abi::{program, table};

use crate::{
    run::{cargo, exec, find, output, root, target},
    steps,
    toolchain::{self, Compiler},
};

const TARGET: &str = "bpfel-unknown-none";
/// Debug info set in a profile alone would break BTF's function records (aya#1649). v3 has the fetching add. Left to place
/// blocks, LLVM enters a loop in its middle and closes it by falling through, which Linux 6.1 refuses ("back-edge").
const FLAGS: &str =
    "-Cdebuginfo=2 -Clink-arg=--btf -Ctarget-cpu=v3 -Clink-arg=--llvm-args=-disable-block-placement";

/// Builds the balancer's object and lets the kernel's verifier look at it.
pub fn build() -> Result<PathBuf> {
    let object = build_package("lb-ebpf", exec)?;
    if nix::unistd::geteuid().is_root() {
        verify(&object)?;
    }
    say_size(&object)?;
    Ok(object)
}

/// Builds the balancer's object for the demo: whose agents have the kernel verify it anyway.
pub fn build_quietly() -> Result<PathBuf> {
    build_package("lb-ebpf", steps::build)
}

/// Builds the object of the benches.
pub fn build_bench() -> Result<PathBuf> {
    let object = build_package("lb-bench-ebpf", exec)?;
    say_size(&object)?;
    Ok(object)
}

fn say_size(object: &Path) -> Result<()> {
    let bytes = fs::metadata(object).with_context(|| format!("read {}", object.display()))?.len();
    eprintln!("{}: {} KiB with BTF", object.strip_prefix(root()).unwrap_or(object).display(), bytes / 1024);
    Ok(())
}

/// Builds a package's object, and refuses one that can panic.
fn build_package(package: &str, run: impl FnOnce(&mut Command) -> Result<()>) -> Result<PathBuf> {
    let compiler = toolchain::compiler()?;
    let linker = toolchain::linker()?;
    let folder = target().join("ebpf");
    let mut command = match &compiler {
        Compiler::Debian => {
            let mut command = toolchain::debian_cargo();
            // The target is unstable, the compiler is a release: it must be told to allow it.
            command.env("RUSTC_BOOTSTRAP", "1");
            command
        }
        Compiler::Nightly(name) => {
            let mut command = toolchain::clean(Command::new("cargo"));
            command.arg(format!("+{name}")).env_remove("RUSTC");
            command
        }
    };
    if let Some(bin) = linker.parent() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(bin.to_owned()).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(paths)?);
    }
    command.current_dir(root()).env("RUSTFLAGS", FLAGS).args(["build", "--release", "--package", package]);
    command.args(["--target", TARGET, "--target-dir"]).arg(&folder);
    if let Compiler::Nightly(_) = compiler {
        command.args(["-Z", "build-std=core"]);
    }
    run(&mut command)?;
    let object = folder.join(TARGET).join("release").join(package);
    refuse_panics(&object)?;
    Ok(object)
}

/// Loads the programs, on the smallest of tables, and says what the verifier made of them.
fn verify(object: &Path) -> Result<()> {
    let mut loader = EbpfLoader::new();
    for name in
        [table::CONNECTIONS4, table::CONNECTIONS6, table::BACKENDS, table::BACKEND_STATS, table::SLOTS]
    {
        loader.map_max_entries(name, 64);
    }
    loader.override_global("SETS", &64_u32, true);
    // As it is loaded by default: without the log of connections.
    loader.override_global(aya_log::LEVEL, &0_u8, true);
    let mut ebpf = loader.load_file(object).context("load the eBPF object")?;
    for name in program::ALL {
        let program =
            ebpf.program_mut(name).with_context(|| format!("the object holds no program {name}"))?;
        match &mut *program {
            Program::Xdp(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            _ => bail!("program {name} is neither XDP nor TC"),
        }
        .with_context(|| format!("load program {name}"))?;
        let info = program.info()?;
        eprintln!(
            "  {name:<11} {:>7} instructions verified, {:>6} bytes, {:>6} as machine code",
            info.verified_instruction_count().unwrap_or_default(),
            info.size_translated().unwrap_or_default(),
            info.size_jitted(),
        );
    }
    Ok(())
}

/// A bounds check that can fail compiles and links; the kernel then says only that the last instruction is no
/// exit. The symbol tells.
fn refuse_panics(object: &Path) -> Result<()> {
    let nm = ["llvm-nm-22", "llvm-nm"].iter().find_map(|name| find(name));
    let nm = nm.or_else(|| Some(PathBuf::from("/usr/lib/llvm-22/bin/llvm-nm")).filter(|path| path.exists()));
    let symbols = match nm {
        Some(nm) => output(Command::new(nm).arg(object))?,
        // The symbol's name lies in the object's string table in any case.
        None => String::from_utf8_lossy(&fs::read(object)?).into_owned(),
    };
    if let Some(line) =
        symbols.lines().find(|line| line.contains("panicking") || line.contains("panic_bounds_check"))
    {
        let line = line.trim();
        let line = line.char_indices().nth(200).map_or(line, |(end, _)| &line[..end]);
        bail!("the eBPF object can panic, look for an index or an arithmetic check without a guard: {line}");
    }
    Ok(())
}

/// Builds the agent with the object in it, which its build script finds.
pub fn build_agent() -> Result<PathBuf> {
    build()?;
    exec(cargo().args(["build", "--release", "--package", "lb-userspace"]))?;
    let agent = agent();
    eprintln!("{}", agent.strip_prefix(root()).unwrap_or(&agent).display());
    Ok(agent)
}

/// Builds the agent of another commit, in a tree and a target folder of its own.
pub fn build_agent_of(commit: &str) -> Result<PathBuf> {
    let git = |folder: &Path| {
        let mut command = Command::new("git");
        command.arg("-C").arg(folder);
        command
    };
    let wanted = format!("{commit}^{{commit}}");
    let hash = output(git(root()).args(["rev-parse", "--verify", "--quiet", &wanted]))
        .with_context(|| format!("there is no commit {commit}"))?;
    let folder = target().join("before");
    let (tree, target) = (folder.join("tree"), folder.join("target"));
    if !tree.exists() {
        // Its objects are this repository's.
        exec(Command::new("git").args(["clone", "-q", "--shared", "--no-checkout"]).arg(root()).arg(&tree))?;
    }
    exec(git(&tree).args(["checkout", "-q", "--force", "--detach", hash.trim()]))?;
    exec(cargo().current_dir(&tree).env("CARGO_TARGET_DIR", &target).args(["xtask", "build"]))?;
    Ok(target.join("release/lb-userspace"))
}

/// Where the balancer's object is built to.
pub fn object() -> PathBuf {
    target().join("ebpf").join(TARGET).join("release/lb-ebpf")
}

/// Where the agent is built to.
pub fn agent() -> PathBuf {
    target().join("release/lb-userspace")
}

/// Builds the programs of the `tests` package.
pub fn build_tests() -> Result<()> {
    exec(cargo().args(["build", "--release", "--package", "lb-tests", "--bins"]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What a package is built of, with the features of each.
    fn parts(package: &str) -> BTreeSet<String> {
        let mut tree = cargo();
        tree.args([
            "tree",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p} [{f}]",
            "--package",
            package,
        ]);
        let listed = output(&mut tree).expect("cargo tree");
        listed.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
    }

    /// Features that only one of them asks for have the agent compiled twice by `cargo xtask test`: two minutes.
    #[test]
    fn the_tests_and_the_agent_share_one_build() {
        let (agent, tests) = (parts("lb-userspace"), parts("lb-tests"));
        assert!(agent.len() > 100, "{agent:?}");
        let apart: Vec<_> = agent.difference(&tests).collect();
        assert!(apart.is_empty(), "ask for the same features in lb-userspace/Cargo.toml: {apart:?}");
    }
}
