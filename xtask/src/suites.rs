//! The suites of tests that need root: a file of `tests/tests` each. What a suite needs is read from what it uses of the
//! harness, so that a new one has to be entered nowhere.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    run::root,
    toolchain::{DEMO_TOOLS, NETWORK_TOOLS, PACKET_TOOLS, SWARM_TOOLS, Tools},
};

/// What a suite needs of the machine beside the toolchain, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Tier {
    /// Single packets through loaded programs
    Packets,
    /// Agents, servers and clients in network namespaces
    Network,
    /// Real swarms of Docker engines, Prometheus, a browser
    Swarm,
}

impl Tier {
    /// The programs that its tests call.
    fn tools(self) -> &'static [&'static Tools] {
        match self {
            Self::Packets => &[PACKET_TOOLS],
            Self::Network => &[PACKET_TOOLS, DEMO_TOOLS, NETWORK_TOOLS],
            Self::Swarm => &[PACKET_TOOLS, DEMO_TOOLS, NETWORK_TOOLS, SWARM_TOOLS],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets",
            Self::Network => "network",
            Self::Swarm => "swarm",
        }
    }
}

/// A suite.
pub struct Suite {
    /// The name of its file.
    pub name: String,
    /// What it needs.
    pub tier: Tier,
    /// Whether it runs Docker engines.
    pub docker: bool,
    /// Whether it needs the agent of an earlier commit.
    pub before: bool,
    /// Whether it counts what a busy machine loses, and has the machine to itself.
    pub alone: bool,
    /// The first sentence of its header.
    pub about: String,
    /// Its tests.
    pub tests: Vec<String>,
}

/// The suites that are asked for.
#[derive(Default)]
pub struct Choice<'a> {
    /// Only these, all by default.
    pub suites: &'a [String],
    /// Only those that need no more than this.
    pub tier: Option<Tier>,
}

/// What the header of a suite says that has the machine to itself.
const ALONE: &str = "Runs alone:";

/// Reads the suites of the project.
///
/// # Errors
/// A file cannot be read, or one that is asked for is not there.
pub fn chosen(choice: &Choice<'_>) -> Result<Vec<Suite>> {
    let all = all(&root().join("tests/tests"))?;
    if let Some(unknown) = choice.suites.iter().find(|name| all.iter().all(|suite| suite.name != **name)) {
        let names: Vec<_> = all.iter().map(|suite| suite.name.as_str()).collect();
        bail!("there is no suite {unknown}; there are {}", names.join(", "));
    }
    let wanted = |suite: &Suite| {
        (choice.suites.is_empty() || choice.suites.contains(&suite.name))
            && choice.tier.is_none_or(|tier| suite.tier <= tier)
    };
    Ok(all.into_iter().filter(wanted).collect())
}

/// The programs that some suites call.
pub fn tools(suites: &[Suite]) -> Vec<&'static Tools> {
    suites.iter().map(|suite| suite.tier).max().map_or(Vec::new(), |tier| tier.tools().to_vec())
}

/// Prints the suites, and where tests are asked for by name, these.
pub fn list(suites: &[Suite], filter: Option<&str>) {
    for suite in suites {
        let tests: Vec<_> =
            suite.tests.iter().filter(|name| filter.is_none_or(|part| name.contains(part))).collect();
        if filter.is_some() {
            tests.iter().for_each(|name| println!("{}: {name}", suite.name));
            continue;
        }
        println!("{:<12} {:>3} tests  {:<8} {}", suite.name, tests.len(), suite.tier.name(), suite.about);
    }
}

fn all(folder: &Path) -> Result<Vec<Suite>> {
    let mut suites = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let main = if path.is_dir() { path.join("main.rs") } else { path.clone() };
        let name = path.file_stem().context("a file's name")?.to_string_lossy().into_owned();
        if main.extension().is_some_and(|extension| extension == "rs") && main.is_file() {
            suites.push(suite(name, &source(&path)?));
        }
    }
    suites.sort_by(|one, other| (one.tier, &one.name).cmp(&(other.tier, &other.name)));
    Ok(suites)
}

/// The text of a suite: of its file, or of all files of its folder, the main one first.
fn source(path: &Path) -> Result<String> {
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    if !path.is_dir() {
        return read(path);
    }
    let mut text = read(&path.join("main.rs"))?;
    let files: BTreeSet<_> = fs::read_dir(path)?.flatten().map(|entry| entry.path()).collect();
    for file in files.iter().filter(|file| !file.ends_with("main.rs") && file.is_file()) {
        text += &read(file)?;
    }
    Ok(text)
}

fn suite(name: String, text: &str) -> Suite {
    let header: Vec<&str> = text.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim).collect();
    let header = header.join(" ");
    let about = header.split_inclusive(". ").next().unwrap_or_default().trim().to_owned();
    // What it imports of the harness; the agent's own modules have some of the same names.
    let imports = text.split("use lb_tests::").skip(1).filter_map(|rest| rest.split(';').next());
    let imports = imports.collect::<String>();
    let uses = |module: &str| imports.contains(&format!("{module}::"));
    let tier = match () {
        () if uses("swarm") || uses("browser") => Tier::Swarm,
        () if uses("cluster") || uses("large") => Tier::Network,
        () => Tier::Packets,
    };
    let mut tests = Vec::new();
    let mut marked = false;
    for line in text.lines().map(str::trim) {
        let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        match function.and_then(|rest| rest.split_once('(')) {
            Some((name, _)) if marked => {
                tests.push(name.to_owned());
                marked = false;
            }
            _ => marked |= line == "#[test]",
        }
    }
    let alone = header.contains(ALONE);
    Suite { name, tier, docker: uses("swarm"), before: uses("before"), alone, about, tests }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_is_read_from_its_file() {
        let text = "//! Single packets. And more.\n//!\n//! Much more.\nuse lb_tests::{\n    lab::Lab,\n};\n\
            #[test]\nfn one_thing() {}\n\nfn no_test() {}\n#[test]\n#[should_panic]\nfn another() {}\n";
        let read = suite("datapath".into(), text);
        assert_eq!((read.about.as_str(), read.tier), ("Single packets.", Tier::Packets));
        assert_eq!(read.tests, ["one_thing", "another"]);
        assert_eq!(suite("x".into(), "use lb_tests::cluster::Cluster;").tier, Tier::Network);
        let before = |text: &str| suite("x".into(), text).before;
        assert!(before("use lb_tests::{\n    before::program,\n};") && !before(text));
        assert_eq!(
            suite("x".into(), "use lb_tests::{\n    cluster::Cluster,\n    swarm::{Node},\n};").tier,
            Tier::Swarm
        );
    }

    #[test]
    fn who_counts_what_is_lost_has_the_machine_to_himself() {
        let alone = |header: &str| suite("x".into(), header).alone;
        assert!(alone("//! Proxies. Runs\n//! alone: it counts.\n") && !alone("//! Proxies.\n"));
    }

    #[test]
    fn every_suite_of_the_project_says_what_it_is_and_has_tests() {
        let suites = chosen(&Choice::default()).unwrap();
        for suite in &suites {
            assert!(!suite.about.is_empty() && !suite.tests.is_empty(), "{}", suite.name);
        }
        let fast = chosen(&Choice { tier: Some(Tier::Packets), ..Choice::default() }).unwrap();
        assert!(fast.iter().any(|suite| suite.name == "datapath") && fast.len() < suites.len());
    }
}
