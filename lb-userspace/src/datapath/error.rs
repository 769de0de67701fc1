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
    #[error("there is no interface {0} in this network namespace; `ip link` lists those there are")]
    NoInterface(String),
    /// Another controller.
    #[error("interface {interface} is held by another controller{}; stop it first", .pid.map(|pid| format!(", process {pid}")).unwrap_or_default())]
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
    /// Tables of another version.
    #[error(
        "the pinned tables have version {found}, this agent writes version {expected}; \
         `lb-userspace attach --replace-state` starts anew, without the flows they hold"
    )]
    Version {
        /// Pinned.
        found: u32,
        /// Ours.
        expected: u32,
    },
    /// A table of another shape.
    #[error(
        "the pinned table {table} differs in {what}: it has {found}, {expected} is asked for; attach with the \
         size it has, or with --replace-state, which loses its flows"
    )]
    Shape {
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
        matches!(self, Self::Version { .. } | Self::Shape { .. })
    }

    pub(super) fn map(what: &'static str, cause: MapError) -> Self {
        Self::Map { what, cause: Box::new(cause) }
    }

    pub(super) fn pin(what: &'static str, path: impl Into<PathBuf>, cause: io::Error) -> Self {
        Self::Pin { what, path: path.into(), cause }
    }
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

const CAPABILITIES: &str =
    "the agent needs the capabilities CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: run it with sudo";

fn explain_load(error: &EbpfError) -> String {
    let text = chain(error);
    match errno(error) {
        Some(libc::EPERM | libc::EACCES) => format!("{text}; {CAPABILITIES}"),
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
        let hint = match io_error.raw_os_error() {
            Some(libc::EPERM) => format!("; {CAPABILITIES}"),
            // Without CAP_PERFMON the verifier refuses what it otherwise allows.
            Some(libc::EACCES) => format!("; {CAPABILITIES}; with them, report this kernel"),
            _ => String::new(),
        };
        return format!("{io_error}: {}{hint}", tail.join(" | "));
    }
    match error.source() {
        Some(_) => chain(error),
        None => error.to_string(),
    }
}
