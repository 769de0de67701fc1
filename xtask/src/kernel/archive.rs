//! Kernels from Debian's archive, of suites that need not be the machine's.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result, bail};

use crate::{apt::Apt, run::target};

/// Debian's suites, the older first: where two have the same series of a kernel, the later one's is taken.
const SUITES: [&str; 5] = ["bullseye", "bookworm-backports", "bookworm", "trixie", "sid"];
/// The package that names the newest kernel of a suite, in the flavour for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";
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
    println!("kernels: reading what Debian has");
    let apt = Apt::of_suites(cache.join("apt"), "amd64", &SUITES)?;
    apt.update();
    let offered = offers(&apt)?;
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
            unpack(&apt, offer, &cache)
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

/// The newest kernel of each series.
fn offers(apt: &Apt) -> Result<BTreeMap<String, Offer>> {
    // linux-image-cloud-amd64 | 6.1.176-1 | ADDRESS bookworm/main amd64 Packages
    let versions = apt.versions(NEWEST)?;
    let mut offers = BTreeMap::new();
    for suite in SUITES {
        let of_suite = |line: &&str| line.contains(&format!(" {suite}/main "));
        let Some(version) = versions.lines().find(of_suite).and_then(|line| line.split('|').nth(1)) else {
            continue;
        };
        let depends = apt.dependencies(&format!("{NEWEST}={}", version.trim()))?;
        let release = depends.iter().find_map(|name| name.strip_prefix("linux-image-").map(str::to_owned));
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
fn unpack(apt: &Apt, offer: &Offer, cache: &Path) -> Result<Kernel> {
    let place = cache.join(&offer.release);
    let kernel =
        Kernel { release: offer.release.clone(), suite: offer.suite.clone(), root: place.join("root") };
    if !place.join(WHOLE).exists() {
        println!("kernels: fetching {} from {}", offer.release, offer.suite);
        apt.unpack(&format!("linux-image-{}", offer.release), &kernel.root, |also| {
            also.ends_with(&offer.release)
        })?;
        fs::write(place.join(WHOLE), &offer.suite).context("note that the kernel is whole")?;
    }
    Ok(kernel)
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
}
