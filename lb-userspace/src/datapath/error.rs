//! What can go wrong with the datapath: what happened, the kernel's own words, the next step.

use std::{error::Error as _, io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

/// Why the datapath could not be opened, read or changed. The text holds the kernel's words; nothing is left to
/// a chain of sources.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// This build has no eBPF object in it.
    #[error("this build carries no eBPF object; build the agent with `cargo xtask build`")]
    NoObject,
    /// The object lacks a program.
    #[error("the eBPF object holds no program {0}; build the agent anew with `cargo xtask build`")]
    NoProgram(&'static str),
    /// The kernel is too old.
    #[error(
        "Linux {release} lacks what the datapath cannot do without: {}; Linux 5.15 and later have all of it",
        .missing.join(", ")
    )]
    Kernel {
        /// The running kernel.
        release: String,
        /// What it lacks, each in words.
        missing: Vec<&'static str>,
    },
    /// No bpffs.
    #[error(
        "{path} is not a BPF file system; mount one: mount -t bpf bpf {path} \
         (inside `ip netns exec` it is hidden: enter the namespace with `nsenter --net=` instead)"
    )]
    NoBpffs {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// No interface of that name.
    #[error("there is no interface {0} in this network namespace{1}; `ip link` lists those there are")]
    NoInterface(String, Hint),
    /// Another controller.
    #[error(
        "interface {interface} is held by another controller{}; stop it first (systemctl stop lb-userspace, or end that \
         process): the datapath goes on meanwhile, and the next attach adopts it",
        .pid.map(|pid| format!(", process {pid}")).unwrap_or_default()
    )]
    Held {
        /// The interface.
        interface: String,
        /// The other process, where the kernel tells.
        pid: Option<u32>,
    },
    /// Nothing attached.
    #[error(
        "no datapath is attached to {} in this network namespace; `lb-userspace attach` makes one",
        .0.as_deref().unwrap_or("any interface")
    )]
    NotAttached(Option<String>),
    /// A controller is at it.
    #[error("attach is starting on {interface} (process {pid}); try again in a moment")]
    Starting {
        /// The interface.
        interface: String,
        /// The process.
        pid: u32,
    },
    /// Who asks may not.
    #[error(
        "{what} {path}: {cause}; this needs root, or {CAPABILITY_NAMES} and a /sys/fs/bpf that may be written to: run it with sudo"
    )]
    Denied {
        /// What was tried.
        what: &'static str,
        /// The pin.
        path: PathBuf,
        /// The kernel's words.
        cause: io::Error,
    },
    /// Tables of another version.
    #[error(
        "the pinned tables have version {found}, this agent writes version {expected}; \
         `lb-userspace attach --replace-state` starts anew, without the connections they hold"
    )]
    Version {
        /// Pinned.
        found: u32,
        /// Ours.
        expected: u32,
    },
    /// A table of another kind or size.
    #[error(
        "{} {expected}: the datapath that runs has {found} ({what} of {table}). Leave the option out to keep it and its \
         connections, or add --replace-state to start anew, which breaks them",
        crate::limits::setting_of(table)
    )]
    MapSpec {
        /// The table.
        table: &'static str,
        /// The attribute.
        what: &'static str,
        /// Pinned.
        found: u32,
        /// Asked for.
        expected: u32,
    },
    /// The object was not loaded.
    #[error("load the eBPF object: {}", explain_load(.0))]
    Load(EbpfError),
    /// The verifier said no.
    #[error("load program {program}: {}", explain_program(.cause))]
    Verify {
        /// The program.
        program: &'static str,
        /// The kernel's words.
        cause: Box<ProgramError>,
    },
    /// A table could not be used.
    #[error("{what} table: {}", chain(.cause))]
    Map {
        /// What was tried.
        what: &'static str,
        /// The kernel's words.
        cause: Box<MapError>,
    },
    /// A program could not be inspected.
    #[error("inspect program: {}", chain(.0))]
    Program(ProgramError),
    /// A pin.
    #[error("{what} {path}: {cause}")]
    Pin {
        /// What was tried.
        what: &'static str,
        /// The pin.
        path: PathBuf,
        /// The kernel's words.
        cause: io::Error,
    },
    /// Somebody else could change what is pinned.
    #[error(
        "{path} {reason}: whoever can change it could take the datapath over; detach what is there, remove it as root \
         (`rmdir {path}`, or unmount what is over it), and attach again"
    )]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A test wants it so.
    #[error("{0}, by a fail point")]
    Fault(io::Error),
    /// The programs' log.
    #[error("read the programs' log: {0}")]
    Log(String),
    /// A table is full.
    #[error("table {table} is full; attach again with a higher {setting}")]
    Full {
        /// The table.
        table: &'static str,
        /// The setting to raise.
        setting: &'static str,
    },
}

impl DatapathError {
    /// Whether what is pinned does not fit this agent or what is asked for.
    pub fn is_misfit(&self) -> bool {
        matches!(self, Self::Version { .. } | Self::MapSpec { .. })
    }

    pub(super) fn map(what: &'static str, cause: MapError) -> Self {
        Self::Map { what, cause: Box::new(cause) }
    }

    pub(super) fn pin(what: &'static str, path: impl Into<PathBuf>, cause: io::Error) -> Self {
        let path = path.into();
        match cause.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Denied { what, path, cause }
            }
            _ => Self::Pin { what, path, cause },
        }
    }

    /// There is no interface of this name; one of those there are may have been meant.
    pub fn no_interface<'a>(name: &str, there: impl Iterator<Item = &'a str>) -> Self {
        Self::NoInterface(name.to_owned(), Hint::nearest(name, there))
    }
}

/// A name that may have been meant, as the end of a clause; empty where none is like it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint(Option<String>);

impl Hint {
    /// The name among those there are that differs least, if it does not differ much.
    pub fn nearest<'a>(name: &str, there: impl Iterator<Item = &'a str>) -> Self {
        let near = there.map(|other| (distance(name, other), other)).min();
        Self(near.filter(|(distance, _)| *distance <= 2).map(|(_, other)| other.to_owned()))
    }
}

impl std::fmt::Display for Hint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|name| write!(f, "; did you mean {name}?"))
    }
}

/// How many letters must be changed, added or left out to make one word the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[other.len()]
}

/// An error and what caused it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// The error number at the bottom of a chain of errors.
pub(super) fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut current: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = current {
        if let Some(number) = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(number);
        }
        current = cause.source();
    }
    None
}

const CAPABILITY_NAMES: &str = "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON";

/// What the agent lacks of what it needs, and how it is given that.
fn capabilities() -> String {
    let capabilities = crate::host::Capabilities::own();
    let missing = capabilities.missing();
    if missing.is_empty() {
        return format!("the kernel refuses though {CAPABILITY_NAMES} are there: is it locked down?");
    }
    format!(
        "{} missing: run it with sudo; with systemd AmbientCapabilities= and CapabilityBoundingSet= must name {CAPABILITY_NAMES}, \
         with Docker cap_add: [{}]",
        match missing.as_slice() {
            [one] => format!("{one} is"),
            several => format!("{} are", several.join(", ")),
        },
        missing.iter().map(|name| name.trim_start_matches("CAP_")).collect::<Vec<_>>().join(", ")
    )
}

fn explain_load(error: &EbpfError) -> String {
    let text = chain(error);
    match errno(error) {
        Some(libc::EPERM | libc::EACCES) => format!("{}; {text}", capabilities()),
        Some(libc::ENOMEM) => {
            format!("{text}; the tables ask for more memory than there is: attach with smaller ones")
        }
        _ if text.contains("BTF") || text.contains("btf") => {
            format!(
                "{text}; the kernel needs BTF: /sys/kernel/btf/vmlinux must exist (CONFIG_DEBUG_INFO_BTF)"
            )
        }
        _ => text,
    }
}

/// The verifier's log is long; its last lines say why, before those that count its work.
fn explain_program(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        let log = verifier_log.to_string();
        log::debug!("the verifier's log: {log}");
        let counts = ["verification time", "stack depth", "processed "];
        let says = |line: &&str| !line.is_empty() && !counts.iter().any(|count| line.starts_with(count));
        let tail: Vec<&str> = log.lines().rev().filter(says).take(3).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        return match io_error.raw_os_error() {
            Some(libc::EPERM) => format!("{}; {io_error}", capabilities()),
            // Without CAP_PERFMON the verifier refuses what it otherwise allows, and its log leads astray.
            Some(libc::EACCES) if !crate::host::Capabilities::own().missing().is_empty() => {
                format!("{}; {io_error}; --log-level debug shows the verifier's log", capabilities())
            }
            _ => format!("{io_error}: {}; report this with the kernel's version", tail.join(" | ")),
        };
    }
    match error.source() {
        Some(_) => chain(error),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_may_have_been_meant_is_found() {
        let hint =
            |name| Hint::nearest(name, ["lo", "eth0", "eth1", "docker_gwbridge"].into_iter()).to_string();
        assert_eq!(hint("eht1"), "; did you mean eth1?");
        assert_eq!(hint("eth9"), "; did you mean eth0?");
        assert_eq!(hint("wlan0"), "");
    }

    /// Snapshots, so that words change on purpose.
    #[test]
    fn what_is_said_of_each_error() {
        let denied = || io::Error::from_raw_os_error(libc::EACCES);
        let pin = "/sys/fs/bpf/lb/12/eth1";
        let errors = [
            DatapathError::NoObject,
            DatapathError::NoProgram("uplink_xdp"),
            DatapathError::Kernel { release: "5.4.0".into(), missing: vec!["ring buffers", "batches"] },
            DatapathError::NoBpffs { path: "/sys/fs/bpf".into() },
            DatapathError::no_interface("eht1", ["eth0", "eth1"].into_iter()),
            DatapathError::Held { interface: "eth1".into(), pid: Some(22_301) },
            DatapathError::NotAttached(None),
            DatapathError::NotAttached(Some("eth1".into())),
            DatapathError::Starting { interface: "eth1".into(), pid: 22_301 },
            DatapathError::pin("look at", pin, denied()),
            DatapathError::pin("create", pin, io::Error::from_raw_os_error(libc::EROFS)),
            DatapathError::pin("open", pin, io::Error::from_raw_os_error(libc::ENOENT)),
            DatapathError::Version { found: 4, expected: 5 },
            DatapathError::MapSpec {
                table: "CONNECTIONS4",
                what: "entries",
                found: 262_144,
                expected: 1_000,
            },
            DatapathError::Full { table: "LISTENERS", setting: "--max-listeners" },
        ];
        let said: Vec<String> = errors.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!("datapath-errors", said.join("\n\n"));
    }
}
