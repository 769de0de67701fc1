//! Docker engines of other Debian releases, beside the machine's own: fetched and unpacked, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::Apt,
    packages,
    run::{output, target},
};

/// Debian's suites by the major version of the engine that each has.
const SUITES: [(u32, &str); 2] = [(26, "trixie"), (28, "sid")];
/// The engine, its client, and what runs containers. runc stays the machine's: it must fit the machine's libraries.
const PACKAGES: [&str; 4] = ["docker.io", "docker-cli", "containerd", "tini"];

/// A major version that Debian has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(u32);

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = SUITES.iter().find(|(version, _)| version.to_string() == text);
        known.map(|(version, _)| Self(*version)).ok_or_else(|| {
            let all: Vec<_> = SUITES.iter().map(|(version, suite)| format!("{version} ({suite})")).collect();
            format!("Debian has Docker {}; without --docker the machine's own is tested", all.join(", "))
        })
    }
}

/// Fetches an engine, once; the folder with its programs, to stand first in the search path.
///
/// # Errors
/// It cannot be had from where the machine gets its packages, or is another version than asked for.
pub fn fetch(version: Version) -> Result<PathBuf> {
    if !packages::is_debian() {
        bail!("other engines come from Debian's archive, and this machine has no apt");
    }
    let Version(number) = version;
    let suite =
        SUITES.iter().find(|(known, _)| *known == number).map(|(_, suite)| *suite).context("a suite")?;
    let folder = target().join("docker").join(suite);
    let programs = folder.join("root/usr/bin");
    if !programs.join("dockerd").exists() {
        eprintln!("fetching Docker {number} from Debian {suite}");
        let root = folder.join("root");
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let apt = Apt::of_suites(folder.join("apt"), architecture, &[suite])?;
        apt.update();
        for package in PACKAGES {
            apt.unpack(package, &root, |_| false)?;
        }
        // Debian has the engine among the administrator's programs.
        link_all(&root.join("usr/sbin"), &programs)?;
        link_all(&root.join("usr/libexec/docker"), &programs)?;
    }
    let said = output(Command::new(programs.join("dockerd")).arg("--version"))
        .with_context(|| format!("Docker {number} of Debian {suite} does not run on this machine"))?;
    eprintln!("{}", said.trim());
    if !said.contains(&format!("version {number}.")) {
        bail!(
            "Debian {suite} has another Docker by now than {number}; remove {} to fetch it",
            folder.display()
        );
    }
    Ok(programs)
}

fn link_all(from: &Path, to: &Path) -> Result<()> {
    for program in fs::read_dir(from).into_iter().flatten().flatten() {
        let link = to.join(program.file_name());
        if !link.exists() {
            std::os::unix::fs::symlink(program.path(), &link)
                .with_context(|| format!("make {}", link.display()))?;
        }
    }
    Ok(())
}
