//! The agent as it is given away: linked statically, stripped, for both architectures, and packed in every way that people
//! install it: `package`.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    arm64, ebpf,
    run::{cargo, exec, output, root, target},
    steps, toolchain,
};

/// What makes Debian's packages, and its version.
const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");

/// A machine that is packed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    /// 64-bit PCs
    Amd64,
    /// 64-bit ARM
    Arm64,
}

impl Architecture {
    /// As rustc names it.
    pub fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// As Red Hat names it.
    fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// As Docker and Debian name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// How it is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Debian's package
    Deb,
    /// Red Hat's package
    Rpm,
    /// An archive to be unpacked at /
    Tar,
}

/// Builds the agent and packs it.
///
/// # Errors
/// Something cannot be built.
pub fn run(formats: &[Format], architecture: Architecture) -> Result<()> {
    let agent = build(architecture)?;
    let tree = tree(&agent, architecture)?;
    let folder = stage();
    let formats = if formats.is_empty() { &[Format::Deb, Format::Rpm, Format::Tar] } else { formats };
    for format in formats {
        let packed = match format {
            Format::Deb => deb(&folder, architecture)?,
            Format::Rpm => rpm(&folder, &tree, architecture)?,
            Format::Tar => tar(&folder, &tree, architecture)?,
        };
        let bytes = fs::metadata(&packed).with_context(|| format!("read {}", packed.display()))?.len();
        println!("{}: {} KiB", packed.strip_prefix(root()).unwrap_or(&packed).display(), bytes >> 10);
    }
    Ok(())
}

/// Where packages are made. Their recipes in lb-userspace/Cargo.toml name it.
fn stage() -> PathBuf {
    root().join("target/package")
}

/// Builds the agent, with the C library in it: there is no standard library for musl where only Debian's and rustup's
/// default targets are, and glibc's own parts suffice for all that the agent asks of it.
///
/// # Errors
/// It cannot be built, or is not static.
pub fn build(architecture: Architecture) -> Result<PathBuf> {
    ebpf::build()?;
    let folder = target().join("dist");
    let mut command = match architecture {
        Architecture::Amd64 => cargo(),
        Architecture::Arm64 => arm64::cargo()?,
    };
    let target = architecture.target();
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    let before = command.get_envs().find(|(name, _)| *name == flags.as_str()).and_then(|(_, value)| value);
    let before = before.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default();
    command.env(flags, format!("{before} -Ctarget-feature=+crt-static").trim_start());
    command.args(["build", "--profile", "dist", "--package", "lb-userspace", "--target", target]);
    steps::build(command.arg("--target-dir").arg(&folder))?;
    let agent = folder.join(target).join("dist/lb-userspace");
    refuse_dynamic(&agent)?;
    let bytes = fs::metadata(&agent).with_context(|| format!("read {}", agent.display()))?.len();
    println!("{}: {} KiB, static", agent.strip_prefix(root()).unwrap_or(&agent).display(), bytes >> 10);
    Ok(agent)
}

/// A program that asks for an interpreter is not static: its path stands in the file.
fn refuse_dynamic(agent: &Path) -> Result<()> {
    let bytes = fs::read(agent).with_context(|| format!("read {}", agent.display()))?;
    if bytes.windows(10).take(4096).any(|window| window == b"/ld-linux-" || window == b"/lib64/ld-") {
        bail!("{} is linked dynamically", agent.display());
    }
    Ok(())
}

/// Everything that a package brings, as it lies on the machine.
fn tree(agent: &Path, architecture: Architecture) -> Result<PathBuf> {
    let tree = stage().join("tree");
    let _ = fs::remove_dir_all(&tree);
    let put = |from: &Path, to: &str, mode: u32| -> Result<()> {
        let to = tree.join(to);
        fs::create_dir_all(to.parent().context("a folder")?)?;
        fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).context("set a file's mode")
    };
    put(agent, "usr/sbin/lb-userspace", 0o755)?;
    symlink("lb-userspace", tree.join("usr/sbin/lb")).context("make the link lb")?;
    let packaging = root().join("packaging");
    put(&packaging.join("lb-userspace.service"), "usr/lib/systemd/system/lb-userspace.service", 0o644)?;
    put(&packaging.join("agent.toml"), "etc/lb-userspace/agent.toml", 0o644)?;
    for document in ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"] {
        put(&root().join(document), &format!("usr/share/doc/lb-userspace/{document}"), 0o644)?;
    }
    let made = generate(agent, architecture)?;
    for page in fs::read_dir(made.join("man"))?.flatten() {
        let name = page.file_name().to_string_lossy().into_owned();
        exec(Command::new("gzip").args(["-9nf"]).arg(page.path()))?;
        put(&made.join("man").join(format!("{name}.gz")), &format!("usr/share/man/man8/{name}.gz"), 0o644)?;
    }
    for (from, to) in [
        ("bash/lb-userspace", "usr/share/bash-completion/completions/lb-userspace"),
        ("zsh/_lb-userspace", "usr/share/zsh/vendor-completions/_lb-userspace"),
        ("fish/lb-userspace.fish", "usr/share/fish/vendor_completions.d/lb-userspace.fish"),
    ] {
        put(&made.join("completions").join(from), to, 0o644)?;
    }
    symlink("lb-userspace.8.gz", tree.join("usr/share/man/man8/lb.8.gz")).context("make the link lb.8.gz")?;
    Ok(tree)
}

/// Manual pages and completions, by the agent itself: one that runs here.
fn generate(agent: &Path, architecture: Architecture) -> Result<PathBuf> {
    let made = stage().join("generated");
    let _ = fs::remove_dir_all(&made);
    let runs_here = architecture.name() == if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let agent = if runs_here { agent.to_owned() } else { ebpf::build_agent()? };
    for artifact in ["man", "completions"] {
        exec(Command::new(&agent).args(["generate", artifact]).arg(made.join(artifact)))?;
    }
    Ok(made)
}

fn deb(folder: &Path, architecture: Architecture) -> Result<PathBuf> {
    toolchain::cargo_tool(CARGO_DEB, &[])?;
    let packed = folder.join(format!("lb-userspace_{}.deb", architecture.name()));
    let mut command = cargo();
    command.args([
        "deb",
        "--package",
        "lb-userspace",
        "--no-build",
        "--no-strip",
        "--target",
        architecture.target(),
    ]);
    exec(command.arg("--output").arg(&packed))?;
    Ok(packed)
}

/// By Debian's rpmbuild: Red Hat's packages need no tool of cargo's.
fn rpm(folder: &Path, tree: &Path, architecture: Architecture) -> Result<PathBuf> {
    toolchain::package_tools()?;
    let place = folder.join("rpm");
    let mut command = Command::new("rpmbuild");
    command.args(["-bb", "--quiet", "--target", architecture.machine()]);
    for (name, value) in [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("root", tree.display().to_string()),
        ("_topdir", place.display().to_string()),
    ] {
        command.args(["--define", &format!("{name} {value}")]);
    }
    // Debian registers its packages elsewhere: nothing that this one needs would be found.
    exec(command.arg("--nodeps").arg(root().join("packaging/rpm/lb-userspace.spec")))?;
    let machine = architecture.machine();
    let name = format!("lb-userspace-{}-1.{machine}.rpm", env!("CARGO_PKG_VERSION"));
    let packed = folder.join(format!("lb-userspace_{}.rpm", architecture.name()));
    fs::copy(place.join("RPMS").join(machine).join(name), &packed).context("copy the package")?;
    Ok(packed)
}

fn tar(folder: &Path, tree: &Path, architecture: Architecture) -> Result<PathBuf> {
    let packed = folder.join(format!("lb-userspace_{}.tar.gz", architecture.name()));
    let owner = ["--owner=0", "--group=0", "--sort=name"];
    exec(Command::new("tar").args(owner).arg("-C").arg(tree).arg("-czf").arg(&packed).arg("."))?;
    Ok(packed)
}

/// Builds the images, and gives the one of this machine to the Docker that is at hand.
///
/// # Errors
/// Something cannot be built, or Docker does not answer.
pub fn image() -> Result<()> {
    let agent = build(if cfg!(target_arch = "aarch64") { Architecture::Arm64 } else { Architecture::Amd64 })?;
    // A folder of its own: everything in it is sent to Docker.
    let folder = target().join("image");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    fs::copy(agent, folder.join("lb-userspace")).context("copy the agent")?;
    let version = output(Command::new(folder.join("lb-userspace")).arg("--version"))?;
    let version = version.split_whitespace().nth(1).unwrap_or("dev");
    let mut command = Command::new("docker");
    command.args(["build", "-t", "lb-userspace:latest", "--build-arg", &format!("VERSION={version}"), "-f"]);
    exec(command.arg(root().join("packaging/Dockerfile")).arg(folder))
}

/// Installs each package in a root of its own and tries what it brings, then takes it away again.
///
/// # Errors
/// A package does not do what it should.
pub fn test() -> Result<()> {
    toolchain::package_tools()?;
    run(&[], Architecture::Amd64)?;
    crate::install::run(&stage())
}
