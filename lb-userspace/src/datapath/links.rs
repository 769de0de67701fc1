//! Attaching programs: XDP by links, TC by TCX links or, on kernels before 6.6, by clsact filters.

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
    links::{FdLink, LinkError, PinnedLink},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use lb_common::abi::Mode;

use super::{
    error::{chain, errno},
    pin::{self, PinDir},
};

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcHook {
    /// By a link (Linux 6.6), which is pinned.
    Tcx,
    /// By a filter of the clsact qdisc, which stays by itself.
    Clsact,
}

impl std::fmt::Display for TcHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// Why a program was not attached, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AttachProblem(pub String);

impl From<ProgramError> for AttachProblem {
    fn from(error: ProgramError) -> Self {
        Self(chain(&error))
    }
}

impl From<LinkError> for AttachProblem {
    fn from(error: LinkError) -> Self {
        Self(chain(&error))
    }
}

/// Our place among the filters of a clsact qdisc: early, and the same at every attach to an uplink, so that a
/// filter of a former controller is found and replaced, and one of another uplink's left alone.
const PRIORITY: u16 = 1;

fn handle(uplink: u32) -> TcHandle {
    TcHandle::new(0x6c62, uplink as u16)
}

/// Attaches XDP, or swaps the program where our link is attached already in this mode.
pub(super) fn attach_xdp(
    pins: &PinDir,
    program: &mut Xdp,
    ifindex: u32,
    mode: Mode,
    same_mode: bool,
) -> Result<(), AttachProblem> {
    let path = pins.link(pin::XDP);
    if let (true, Ok(old)) = (same_mode, PinnedLink::from_pin(&path)) {
        let swapped = FdLink::from(old).try_into().map_err(AttachProblem::from).and_then(|link| {
            let id = program.attach_to_link(link)?;
            // Only the descriptor is dropped: the pin keeps the link.
            let _: FdLink = program.take_link(id)?.try_into()?;
            Ok(())
        });
        match swapped {
            Ok(()) => return Ok(()),
            Err(problem) => log::debug!("the pinned XDP link is of no use: {problem}"),
        }
    }
    pins.remove(&path);
    let flags = if mode == Mode::Native { XdpMode::Driver } else { XdpMode::Skb };
    let id = program.attach_to_if_index(ifindex, flags).map_err(|error| explain_xdp(&error))?;
    // A link that is not a descriptor (netlink) cannot outlive this process: dropping it detaches.
    let link: FdLink = program.take_link(id)?.try_into().map_err(|_| {
        AttachProblem(
            "the kernel attaches XDP by netlink only, which cannot be pinned (Linux 5.9 can)".into(),
        )
    })?;
    link.pin(&path).map_err(|error| AttachProblem(chain(&error)))?;
    Ok(())
}

fn explain_xdp(error: &ProgramError) -> AttachProblem {
    let text = chain(error);
    let hint = match errno(error) {
        Some(libc::EBUSY | libc::EEXIST) => {
            "; another XDP program holds the interface: `bpftool net` and `ip link` name it"
        }
        Some(libc::EOPNOTSUPP) => "; the driver has no native XDP",
        Some(libc::EINVAL | libc::E2BIG | libc::ERANGE) => {
            "; the driver refuses the program as the interface is set up now (MTU, queues, offloads): `dmesg` or \
             `ip link set dev IF xdp obj …` may say more"
        }
        Some(libc::EPERM) => "; CAP_NET_ADMIN and CAP_BPF are needed",
        _ => "",
    };
    AttachProblem(format!("{text}{hint}"))
}

/// Removes the XDP link; the kernel detaches the program with its last reference.
pub(super) fn detach_xdp(pins: &PinDir) {
    pins.remove(&pins.link(pin::XDP));
}

/// Attaches a program to TC ingress, or swaps it where our link or filter is already.
pub(super) fn attach_tc(
    pins: &PinDir,
    program: &mut SchedClassifier,
    interface: &str,
    name: &str,
    uplink: u32,
    tcx: bool,
) -> Result<TcHook, AttachProblem> {
    let path = pins.link(name);
    if let Ok(old) = PinnedLink::from_pin(&path) {
        let swapped = FdLink::from(old).try_into().map_err(AttachProblem::from).and_then(|link| {
            let id = program.attach_to_link(link)?;
            let _: FdLink = program.take_link(id)?.try_into()?;
            Ok(())
        });
        match swapped {
            Ok(()) => return Ok(TcHook::Tcx),
            Err(problem) => log::debug!("the pinned TC link {name} is of no use: {problem}"),
        }
        pins.remove(&path);
    }
    if tcx {
        // First among its like: what others do with a packet of ours would be undone or missed.
        let tcx = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(interface, TcAttachType::Ingress, tcx)?;
        let link: FdLink = program.take_link(id)?.try_into()?;
        link.pin(&path).map_err(|error| AttachProblem(chain(&error)))?;
        return Ok(TcHook::Tcx);
    }
    attach_clsact(program, interface, uplink)?;
    Ok(TcHook::Clsact)
}

fn attach_clsact(program: &mut SchedClassifier, interface: &str, uplink: u32) -> Result<(), AttachProblem> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) | Err(tc::TcError::AlreadyAttached) => {}
        Err(error) if errno(&error) == Some(libc::EEXIST) => {}
        Err(error) => return Err(AttachProblem(format!("add the clsact qdisc: {}", chain(&error)))),
    }
    let there =
        SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, handle(uplink), None)
            .map_err(|error| AttachProblem(error.to_string()))?;
    // Replace the filter of a former controller, else make one.
    let id = match program.attach_to_link(there) {
        Ok(id) => id,
        Err(_) => program.attach_with_options(
            interface,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: handle(uplink), classid: None }),
        )?,
    };
    // The filter stays by itself; dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes a TC link or filter.
pub(super) fn detach_tc(pins: &PinDir, interface: &str, name: &str, uplink: u32) {
    let path = pins.link(name);
    if path.exists() {
        pins.remove(&path);
    } else if !interface.is_empty() {
        detach_clsact(interface, uplink);
    }
}

fn detach_clsact(interface: &str, uplink: u32) {
    // An interface without the filter, or without the qdisc, has nothing to remove; a link detaches when dropped.
    let _ = SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, handle(uplink), None);
}

/// Removes every link, and every filter of this uplink on the interfaces named.
pub(super) fn detach_all(pins: &PinDir, interfaces: &[String], uplink: u32) {
    detach_xdp(pins);
    for interface in interfaces {
        detach_clsact(interface, uplink);
    }
}
