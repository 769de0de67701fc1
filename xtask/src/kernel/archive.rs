//! Kernels from Debian's archive, by an apt state of this project's own: the machine's sources stay as they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    str::FromStr,
};

use anyhow::{Context as _, Result, bail};

use crate::run::{exec, output, target};

/// Debian's suites, the older first: where two have the same series of a kernel, the later one's is taken.
const SUITES: [&str; 5] = ["bullseye", "bookworm-backports", "bookworm", "trixie", "sid"];
/// The package that names the newest kernel of a suite, in the flavour for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";
/// The keys of Debian's archive; without them apt takes those that the machine trusts in any case.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Written last, so that what was cut short is not taken for whole.
const WHOLE: &str = "whole";

/// Which kernels are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The newest of each series that Debian has.
    All,
    /// These series: `6.1`.
    Series(Vec<String>),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let is_series = |part: &str| {
            part.split_once('.').is_some_and(|(major, minor)| [major, minor].iter().all(|n| is_number(n)))
        };
        let series: Vec<String> = text.split(',').map(str::to_owned).collect();
        match series.iter().find(|part| !is_series(part)) {
            None => Ok(Self::Series(series)),
            Some(part) => Err(format!("{part:?} is no series of kernels, such as 6.1")),
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A kernel, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What `uname -r` says there.
    pub release: String,
    /// Debian's suite that it comes from.
    pub suite: String,
    /// Where its packages are unpacked.
    pub root: PathBuf,
}

impl Kernel {
    /// Major and minor version.
    pub fn series(&self) -> (u32, u32) {
        let mut numbers = self.release.split(['.', '-', '+']).map_while(|part| part.parse().ok());
        (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
    }

    /// The image to boot.
    pub fn image(&self) -> PathBuf {
        self.first(["boot", "usr/lib/modules", "lib/modules"].map(|folder| match folder {
            "boot" => self.root.join(folder).join(format!("vmlinuz-{}", self.release)),
            modules => self.root.join(modules).join(&self.release).join("vmlinuz"),
        }))
    }

    /// The folder of its modules.
    pub fn modules(&self) -> PathBuf {
        self.first(
            ["usr/lib/modules", "lib/modules"].map(|folder| self.root.join(folder).join(&self.release)),
        )
    }

    fn first<const N: usize>(&self, places: [PathBuf; N]) -> PathBuf {
        let found = places.iter().find(|place| place.exists()).cloned();
        found.unwrap_or_else(|| self.root.clone())
    }
}

/// Finds the kernels asked for, from the cache if they are there.
///
/// # Errors
/// Debian does not have one, or its archive cannot be reached.
pub fn fetch(wanted: &Wanted) -> Result<Vec<Kernel>> {
    let cache = target().join("kernels");
    let cached = cached(&cache)?;
    if let Wanted::Series(series) = wanted
        && series.iter().all(|series| cached.contains_key(series))
    {
        return Ok(series.iter().map(|series| cached[series].clone()).collect());
    }
    let apt = Apt::new(&cache)?;
    apt.update()?;
    let offered = apt.kernels()?;
    let series = match wanted {
        Wanted::All => offered.keys().cloned().collect(),
        Wanted::Series(series) => series.clone(),
    };
    series
        .iter()
        .map(|series| {
            let Some(offer) = offered.get(series) else {
                let known: Vec<&str> = offered.keys().map(String::as_str).collect();
                bail!("Debian has no kernel {series} today; it has {}", known.join(", "));
            };
            apt.unpack(offer, &cache)
        })
        .collect()
}

/// The kernels that are unpacked already, the newest of each series.
fn cached(cache: &Path) -> Result<BTreeMap<String, Kernel>> {
    let mut kernels = BTreeMap::new();
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let Ok(suite) = fs::read_to_string(entry.path().join(WHOLE)) else {
            continue;
        };
        let release = entry.file_name().to_string_lossy().into_owned();
        let kernel = Kernel { suite, root: entry.path().join("root"), release };
        if let Some(series) = series_of(&kernel.release) {
            let newest: &mut Kernel = kernels.entry(series).or_insert_with(|| kernel.clone());
            if fs::metadata(&newest.root)?.modified()? < fs::metadata(&kernel.root)?.modified()? {
                *newest = kernel;
            }
        }
    }
    Ok(kernels)
}

/// `6.1` of `6.1.0-50-cloud-amd64`.
fn series_of(release: &str) -> Option<String> {
    let mut parts = release.split(['.', '-', '+']);
    let (major, minor) = (parts.next()?, parts.next()?);
    (is_number(major) && is_number(minor)).then(|| format!("{major}.{minor}"))
}

/// A kernel that a suite has.
struct Offer {
    release: String,
    suite: String,
}

/// apt with a state of its own.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(cache: &Path) -> Result<Self> {
        let folder = cache.join("apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("create {}", part.display()))?;
        }
        let machine = machine_source()?;
        let lines: Vec<String> = SUITES.iter().map(|suite| format!("deb {machine} {suite} main\n")).collect();
        fs::write(folder.join("sources.list"), lines.concat()).context("write apt's sources")?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let place = |part: &str| self.folder.join(part).display().to_string();
        let options = [
            format!("Dir::Etc::sourcelist={}", place("sources.list")),
            "Dir::Etc::sourceparts=-".to_owned(),
            // The machine's own preferences are about its own packages.
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", place("lists")),
            format!("Dir::Cache={}", place("cache")),
            "Dir::State::status=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            // apt's own user cannot write here.
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ];
        command.args(options.iter().flat_map(|option| ["-o", option])).stdin(Stdio::null());
        command
    }

    /// Reads the suites' lists.
    fn update(&self) -> Result<()> {
        println!("kernels: reading what Debian has");
        // A suite that has gone to the archive's archive is said by apt, and missed only by who asks for its kernel.
        if let Err(error) = exec(self.command("apt-get").args(["-q", "-q", "update"])) {
            println!("kernels: {error}; going on with what was read");
        }
        Ok(())
    }

    /// The newest kernel of each series.
    fn kernels(&self) -> Result<BTreeMap<String, Offer>> {
        // linux-image-cloud-amd64 | 6.1.176-1 | ADDRESS bookworm/main amd64 Packages
        let versions = output(self.command("apt-cache").args(["madison", NEWEST]))?;
        let mut offers = BTreeMap::new();
        for suite in SUITES {
            let of_suite = |line: &&str| line.contains(&format!(" {suite}/main "));
            let Some(version) = versions.lines().find(of_suite).and_then(|line| line.split('|').nth(1))
            else {
                continue;
            };
            let shown =
                output(self.command("apt-cache").args(["show", &format!("{NEWEST}={}", version.trim())]))?;
            let depends = shown.lines().filter_map(|line| line.strip_prefix("Depends:"));
            let release = depends
                .flat_map(dependencies)
                .find_map(|name| name.strip_prefix("linux-image-").map(str::to_owned));
            if let Some(release) = release
                && let Some(series) = series_of(&release)
            {
                offers.insert(series, Offer { release, suite: suite.to_owned() });
            }
        }
        if offers.is_empty() {
            bail!("apt found no kernel in {}", SUITES.join(", "));
        }
        Ok(offers)
    }

    /// Downloads and unpacks a kernel: its image and its modules, in however many packages they come.
    fn unpack(&self, offer: &Offer, cache: &Path) -> Result<Kernel> {
        let place = cache.join(&offer.release);
        let kernel =
            Kernel { release: offer.release.clone(), suite: offer.suite.clone(), root: place.join("root") };
        if place.join(WHOLE).exists() {
            return Ok(kernel);
        }
        println!("kernels: fetching {} from {}", offer.release, offer.suite);
        let packages = place.join("packages");
        fs::create_dir_all(&packages).with_context(|| format!("create {}", packages.display()))?;
        let mut wanted = vec![format!("linux-image-{}", offer.release)];
        let mut seen = BTreeSet::new();
        while let Some(package) = wanted.pop() {
            if !seen.insert(package.clone()) {
                continue;
            }
            let shown = output(self.command("apt-cache").args(["show", "--no-all-versions", &package]))?;
            let depends = shown.lines().filter_map(|line| line.strip_prefix("Depends:"));
            wanted.extend(depends.flat_map(dependencies).filter(|name| name.ends_with(&offer.release)));
            exec(self.command("apt-get").current_dir(&packages).args(["-q", "-q", "download", &package]))?;
        }
        for package in fs::read_dir(&packages)?.flatten() {
            exec(Command::new("dpkg").arg("-x").arg(package.path()).arg(&kernel.root))?;
        }
        fs::remove_dir_all(&packages)?;
        fs::write(place.join(WHOLE), &offer.suite)?;
        Ok(kernel)
    }
}

/// The names in a list of dependencies.
fn dependencies(list: &str) -> Vec<String> {
    list.split([',', '|']).filter_map(|one| one.split_whitespace().next()).map(str::to_owned).collect()
}

/// Where the machine gets Debian from: options and address, as they stand in a line of a sources.list.
fn machine_source() -> Result<String> {
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
        .context("this machine's apt sources name no archive of Debian, where the kernels come from")?;
    let options = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    Ok(format!("{options}{address}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_what_two_numbers_say() {
        assert_eq!(series_of("6.1.0-50-cloud-amd64").as_deref(), Some("6.1"));
        assert_eq!(series_of("6.12.117+deb13-cloud-amd64").as_deref(), Some("6.12"));
        assert_eq!(series_of("cloud-amd64"), None);
        assert_eq!("6.1,6.12".parse(), Ok(Wanted::Series(vec!["6.1".into(), "6.12".into()])));
        assert_eq!("all".parse(), Ok(Wanted::All));
        assert!("6".parse::<Wanted>().is_err() && "6.x".parse::<Wanted>().is_err());
    }

    #[test]
    fn dependencies_are_names_without_versions() {
        let list = " kmod, initramfs-tools (>= 0.120) | linux-initramfs-tool, linux-modules-7.2 (= 7.2.13-1)";
        assert_eq!(
            dependencies(list),
            ["kmod", "initramfs-tools", "linux-initramfs-tool", "linux-modules-7.2"]
        );
    }
}
