//! What the kernel can do, found by asking it: distributions move features between versions, and take some away.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

use super::{DatapathError, pin, sys};
use crate::testing;

/// What is used where it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// XDP takes frames in several pieces (Linux 5.18).
    pub frags: bool,
    /// TC programs attach by links (Linux 6.6).
    pub tcx: bool,
}

impl Features {
    /// Asks the kernel.
    ///
    /// # Errors
    /// It lacks what the datapath cannot do without; all of that is named.
    pub fn find() -> Result<Self, DatapathError> {
        let missing: Vec<&str> = REQUIRED
            .iter()
            .filter(|need| lacks(need.name) || !(need.there)())
            .map(|need| need.words)
            .collect();
        if !missing.is_empty() {
            return Err(DatapathError::Kernel { release: release(), missing });
        }
        Ok(Self {
            frags: !lacks("frags")
                && helper(ProgramType::Xdp, BpfHelper::BPF_FUNC_xdp_get_buff_len)
                && is_known(&load(Kind::Xdp, XDP_HAS_FRAGS, &[RETURN_ZERO, EXIT])),
            tcx: !lacks("tcx") && has_tcx(),
        })
    }
}

/// The running kernel, as `uname -r` has it.
pub fn release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or_else(|_| "of unknown release".to_owned(), |release| release.trim().to_owned())
}

/// What the datapath cannot do without.
struct Need {
    name: &'static str,
    /// With the version that brought it.
    words: &'static str,
    there: fn() -> bool,
}

const REQUIRED: [Need; 5] = [
    Need {
        name: "fetching_add",
        words: "atomic additions in eBPF that return the old value (Linux 5.12)",
        there: || is_known(&load(Kind::Xdp, 0, &FETCHING_ADD)),
    },
    Need {
        name: "netns_cookie",
        words: "the cookie of a network namespace, SO_NETNS_COOKIE (Linux 5.14)",
        there: || pin::netns_cookie().is_ok(),
    },
    Need {
        name: "redirect_peer",
        words: "bpf_redirect_peer (Linux 5.10)",
        there: || helper(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_redirect_peer),
    },
    Need {
        name: "redirect_neigh",
        words: "bpf_redirect_neigh (Linux 5.10)",
        there: || helper(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_redirect_neigh),
    },
    Need {
        name: "jiffies",
        words: "bpf_jiffies64 (Linux 5.6)",
        there: || helper(ProgramType::Xdp, BpfHelper::BPF_FUNC_jiffies64),
    },
];

fn lacks(feature: &str) -> bool {
    // Names of those that a test has the kernel be without.
    let names = testing::asked(testing::KERNEL_LACKS);
    names.is_some_and(|names| names.to_string_lossy().split(',').any(|name| name == feature))
}

/// Whether the kernel knows what it was asked to load. One that does not let us ask says why when the programs are
/// loaded.
fn is_known<T>(loaded: &io::Result<T>) -> bool {
    !matches!(loaded, Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

fn helper(kind: ProgramType, helper: BpfHelper) -> bool {
    // As above.
    is_helper_supported(kind, helper).unwrap_or(true)
}

/// Kinds of programs, by the kernel's numbers.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Kind {
    Classifier = 3,
    Xdp = 6,
}

const XDP_HAS_FRAGS: u32 = 1 << 5;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const TCX_INGRESS: u32 = 46;

/// `w0 = 0`
const RETURN_ZERO: u64 = instruction(0xb4, 0, 0, 0, 0);
/// `exit`
const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);
/// A word on the stack, and an addition to it that fetches.
const FETCHING_ADD: [u64; 5] = [
    instruction(0xb7, 1, 0, 0, 1),
    instruction(0x7b, 10, 1, -8, 0),
    instruction(0xdb, 10, 1, -8, 0x01),
    RETURN_ZERO,
    EXIT,
];

/// `struct bpf_insn`
const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let (offset, immediate) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
    let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
    u64::from_ne_bytes([
        code,
        registers,
        offset[0],
        offset[1],
        immediate[0],
        immediate[1],
        immediate[2],
        immediate[3],
    ])
}

/// What BPF_PROG_LOAD reads of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// What BPF_LINK_CREATE reads of it.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
}

/// Loads a program.
fn load(kind: Kind, flags: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut attributes = ProgLoad {
        kind: kind as u32,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        flags,
        ..ProgLoad::default()
    };
    // SAFETY: the instructions and the licence outlive the call; the kernel has just given us the descriptor.
    unsafe { Ok(OwnedFd::from_raw_fd(sys::bpf(PROG_LOAD, &mut attributes)?)) }
}

/// Whether the kernel knows TCX: it then looks for the interface, which is not there.
fn has_tcx() -> bool {
    let Ok(program) = load(Kind::Classifier, 0, &[RETURN_ZERO, EXIT]) else {
        return true;
    };
    let mut attributes =
        LinkCreate { program: program.as_raw_fd() as u32, target: 0, kind: TCX_INGRESS, flags: 0 };
    // SAFETY: the attributes hold no pointers.
    is_known(&unsafe { sys::bpf(LINK_CREATE, &mut attributes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_lie_as_the_kernel_reads_them() {
        // lock *(u64 *)(r10 - 8) += r1, fetching
        assert_eq!(FETCHING_ADD[2].to_ne_bytes(), [0xdb, 0x1a, 0xf8, 0xff, 1, 0, 0, 0]);
    }
}
