//! Debian's packages: what is missing is said with its size, installed quietly, and remembered, so that it can be taken
//! away again.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::run::{as_root, capture, find, output, target};

/// The packages that this project has installed on the machine, a name a line.
fn journal() -> PathBuf {
    target().join("installed-packages")
}

/// Packages that are not installed yet.
pub struct Missing {
    names: Vec<&'static str>,
}

/// How much apt would fetch and unpack, in its own words.
#[derive(Debug, PartialEq, Eq)]
pub struct Size {
    /// Packages, with those that they depend on.
    pub packages: usize,
    /// To be fetched: `216 MB`.
    pub fetched: String,
    /// On disk: `1,163 MB`.
    pub disk: String,
}

impl Missing {
    /// The packages of these names, each once.
    pub fn of(names: impl IntoIterator<Item = &'static str>) -> Self {
        let mut seen = BTreeSet::new();
        Self { names: names.into_iter().filter(|name| seen.insert(*name)).collect() }
    }

    /// Whether there is nothing to install.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Their names, as they are given to apt.
    pub fn names(&self) -> String {
        self.names.join(" ")
    }

    /// Asks apt how much it would install; `None` where it does not know one of the packages.
    pub fn size(&self) -> Option<Size> {
        let mut command = Command::new("apt-get");
        // Without the lock anybody may ask.
        command.args(["install", "--assume-no", "--no-install-recommends", "-o", "Debug::NoLocking=1"]);
        command.args(&self.names).env("LC_ALL", "C").stdin(Stdio::null()).stderr(Stdio::null());
        read_size(&String::from_utf8_lossy(&command.output().ok()?.stdout))
    }

    /// Installs them, after an update of apt's lists where those do not know them, and remembers them.
    ///
    /// # Errors
    /// The machine has no apt, or apt refuses; what it said is in the error.
    pub fn install(&self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        if !is_debian() {
            bail!("install these first (their names in Debian): {}", self.names());
        }
        // A machine that was just made has no lists; lists that are older than the archive name files that are gone.
        if self.size().is_none() {
            update()?;
        }
        if self.run().is_err() {
            update()?;
            self.run()?;
        }
        self.remember()?;
        self.keep_stopped()
    }

    fn run(&self) -> Result<()> {
        let mut command = as_root("sh", "install packages");
        command.args(["-c", INSTALL, "sh"]).args(&self.names);
        capture(&mut command, "apt-get install")
    }

    fn remember(&self) -> Result<()> {
        let mut all: BTreeSet<String> = installed().into_iter().collect();
        all.extend(self.names.iter().map(|name| (*name).to_owned()));
        fs::create_dir_all(target()).context("make the target folder")?;
        let text: String = all.iter().map(|name| format!("{name}\n")).collect();
        fs::write(journal(), text).context("remember what was installed")
    }

    /// Services are not to be started with the machine either. systemctl changes that without a running systemd too.
    fn keep_stopped(&self) -> Result<()> {
        for (package, services) in SERVICES {
            if self.names.contains(package) && find("systemctl").is_some() {
                let mut command = as_root("systemctl", "keep services from starting");
                command.arg("disable").args(*services);
                if Path::new("/run/systemd/system").exists() {
                    command.arg("--now");
                }
                capture(&mut command, "systemctl disable")?;
            }
        }
        Ok(())
    }
}

/// What packages start by themselves.
const SERVICES: &[(&str, &[&str])] = &[
    ("nginx-light", &["nginx"]),
    ("docker.io", &["docker.socket", "docker"]),
    ("prometheus", &["prometheus"]),
    ("haproxy", &["haproxy"]),
];

/// Installs packages without starting their services: tests and benches start these themselves. What starts services asks
/// this file first (invoke-rc.d(8), deb-systemd-invoke); a machine's own is left alone.
const INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy || exit 1
fi
DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@"
"#;

/// The packages that this project has installed here, if any.
pub fn installed() -> Vec<String> {
    fs::read_to_string(journal()).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Whether packages come by apt here.
pub fn is_debian() -> bool {
    find("apt-get").is_some() && find("dpkg").is_some()
}

/// Whether apt knows the package, if need be after an update of its lists.
pub fn has_candidate(package: &'static str) -> bool {
    let known = || Missing::of([package]).size().is_some() || is_installed(package);
    known() || (update().is_ok() && known())
}

fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Status}", package]).stderr(Stdio::null());
    output(&mut query).is_ok_and(|status| status.ends_with("ok installed"))
}

fn update() -> Result<()> {
    capture(as_root("apt-get", "read the lists of packages").args(["-qq", "update"]), "apt-get update")
}

/// Reads what apt says before it installs.
fn read_size(text: &str) -> Option<Size> {
    let between = |start: &str, end: &str| {
        let (_, rest) = text.split_once(start)?;
        Some(rest.split_once(end)?.0.to_owned())
    };
    let count = text.lines().find(|line| line.contains(" newly installed, "))?;
    let count = count.split_once(" upgraded, ")?.1.split_once(" newly")?.0.parse().ok()?;
    // Of what apt has fetched before, only the rest is to be fetched: "1 kB/2 MB".
    let fetched = between("Need to get ", " of archives")?;
    let disk = between("After this operation, ", " of additional disk space")?;
    Some(Size { packages: count, fetched: fetched.split('/').next().unwrap_or_default().to_owned(), disk })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_read_from_what_apt_says() {
        let said = "0 upgraded, 28 newly installed, 0 to remove and 134 not upgraded.\n\
            Need to get 216 MB of archives.\nAfter this operation, 1,163 MB of additional disk space will be used.\n";
        let size =
            |fetched: &str| Some(Size { packages: 28, fetched: fetched.into(), disk: "1,163 MB".into() });
        assert_eq!(read_size(said), size("216 MB"));
        assert_eq!(read_size(&said.replace("216 MB", "0 B/216 MB")), size("0 B"));
        assert_eq!(read_size("E: Unable to locate package nosuch"), None);
    }

    #[test]
    fn a_package_is_asked_for_once() {
        assert_eq!(Missing::of(["curl", "iproute2", "curl"]).names(), "curl iproute2");
    }
}
