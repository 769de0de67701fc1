//! apt with a state of this project's own, for packages of other suites and architectures: the machine's sources stay
//! as they are, and nothing is installed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::run::{exec, output};

/// The keys of Debian's archive; without them apt takes those that the machine trusts in any case.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with a state of its own.
pub struct Apt {
    folder: PathBuf,
    architecture: &'static str,
    own_sources: bool,
}

impl Apt {
    /// Keeps its state in a folder, and reads the sources of the machine for another architecture.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn of_machine(folder: PathBuf, architecture: &'static str) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("create {}", part.display()))?;
        }
        Ok(Self { folder, architecture, own_sources: false })
    }

    /// Likewise, and reads these suites from where the machine gets Debian.
    ///
    /// # Errors
    /// The folder cannot be made, or the machine's sources name no archive of Debian.
    pub fn of_suites(folder: PathBuf, architecture: &'static str, suites: &[&str]) -> Result<Self> {
        let apt = Self { own_sources: true, ..Self::of_machine(folder, architecture)? };
        let archive = machine_archive()?;
        let lines = suites.iter().map(|suite| format!("deb {archive} {suite} main\n"));
        fs::write(apt.sources(), lines.collect::<String>()).context("write apt's sources")?;
        Ok(apt)
    }

    fn sources(&self) -> PathBuf {
        self.folder.join("sources.list")
    }

    fn command(&self, program: &str) -> Command {
        let mut options = vec![
            // The machine's own preferences and packages are its own business.
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::State::lists={}", self.folder.join("lists").display()),
            format!("Dir::Cache={}", self.folder.join("cache").display()),
            format!("APT::Architecture={}", self.architecture),
            format!("APT::Architectures={}", self.architecture),
            // apt's own user cannot write here.
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ];
        if self.own_sources {
            options.push(format!("Dir::Etc::sourcelist={}", self.sources().display()));
            options.push("Dir::Etc::sourceparts=-".to_owned());
        }
        let mut command = Command::new(program);
        command.args(options.iter().flat_map(|option| ["-o", option])).stdin(Stdio::null());
        command
    }

    /// Reads the lists. What cannot be read is said by apt, and missed only by who asks for it.
    pub fn update(&self) {
        if let Err(error) = exec(self.command("apt-get").args(["-q", "-q", "update"])) {
            println!("apt: {error}; going on with what was read");
        }
    }

    /// The versions of a package, by the suite that has each: `version | … suite/main …` a line.
    ///
    /// # Errors
    /// apt does not answer.
    pub fn versions(&self, package: &str) -> Result<String> {
        output(self.command("apt-cache").args(["madison", package]))
    }

    /// The packages that one depends on, with all their alternatives; `package=version` names one version.
    ///
    /// # Errors
    /// There is no such package.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let shown = output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        Ok(shown.lines().filter_map(|line| line.strip_prefix("Depends:")).flat_map(names).collect())
    }

    /// Downloads a package, and those it depends on that `also` takes, and unpacks them.
    ///
    /// # Errors
    /// One cannot be had.
    pub fn unpack(&self, package: &str, to: &Path, also: impl Fn(&str) -> bool) -> Result<()> {
        let packages = self.folder.join("packages");
        let _ = fs::remove_dir_all(&packages);
        fs::create_dir_all(&packages).with_context(|| format!("create {}", packages.display()))?;
        let mut wanted = vec![package.to_owned()];
        let mut seen = BTreeSet::new();
        while let Some(package) = wanted.pop() {
            if !seen.insert(package.clone()) {
                continue;
            }
            wanted.extend(self.dependencies(&package)?.into_iter().filter(|name| also(name)));
            exec(self.command("apt-get").current_dir(&packages).args(["-q", "-q", "download", &package]))?;
        }
        // dpkg makes the last folder of a path only.
        fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
        for package in fs::read_dir(&packages)?.flatten() {
            exec(Command::new("dpkg").arg("-x").arg(package.path()).arg(to))?;
        }
        fs::remove_dir_all(&packages).context("remove the packages")
    }
}

/// The names in a list of dependencies.
fn names(list: &str) -> Vec<String> {
    list.split([',', '|']).filter_map(|one| one.split_whitespace().next()).map(str::to_owned).collect()
}

/// Where the machine gets Debian from: options and address, as they stand in a line of a sources.list.
fn machine_archive() -> Result<String> {
    let targets = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN)|$(CREATED_BY)|$(COMPONENT)|$(RELEASE)|$(REPO_URI)",
    ]))?;
    let address = targets
        .lines()
        .map(|line| line.split('|').collect::<Vec<_>>())
        // The archive of security updates is one of its own, without the other suites.
        .find(|fields| fields[..3] == ["Debian", "Packages", "main"] && !fields[3].ends_with("-security"))
        .and_then(|fields| fields.get(4).copied())
        .context("this machine's apt sources name no archive of Debian")?;
    let options = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    Ok(format!("{options}{address}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_names_without_versions() {
        let list = " kmod, initramfs-tools (>= 0.120) | linux-initramfs-tool, linux-modules-7.2 (= 7.2.13-1)";
        assert_eq!(names(list), ["kmod", "initramfs-tools", "linux-initramfs-tool", "linux-modules-7.2"]);
    }
}
