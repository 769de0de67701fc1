//! Attaching programs: XDP by links, TC by TCX links or, on kernels before 6.6, by clsact filters.

use std::{io, path::Path};

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
    links::{FdLink, LinkError, PinnedLink},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use aya_obj::programs::XdpAttachType;
use lb_common::abi::{Mode, program};

use super::{
    DatapathError,
    error::{chain, errno},
    fault,
    journal::{Journal, Place, Step},
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

impl From<DatapathError> for AttachProblem {
    fn from(error: DatapathError) -> Self {
        Self(chain(&error))
    }
}

impl From<LinkError> for AttachProblem {
    fn from(error: LinkError) -> Self {
        Self(chain(&error))
    }
}

impl From<io::Error> for AttachProblem {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Our place among the filters of a clsact qdisc: early, and the same at every attach to an uplink, so that a
/// filter of a former controller is found and replaced, and one of another uplink's left alone.
const PRIORITY: u16 = 1;
/// That of the program for other nodes' packets: tasks may answer by the same interface.
const PEER_PRIORITY: u16 = 2;

fn priority(place: &Place) -> u16 {
    if place.program == program::PEER_TC { PEER_PRIORITY } else { PRIORITY }
}

fn handle(uplink: u32) -> TcHandle {
    TcHandle::new(0x6c62, uplink as u16)
}

/// Attaches XDP, or swaps the program where our link is attached already in this mode. `there` says what is known of it.
pub(super) fn attach_xdp(
    (pins, journal): (&PinDir, &mut Journal),
    program: &mut Xdp,
    ifindex: u32,
    mode: Mode,
    there: Option<(u32, Mode)>,
) -> Result<(), AttachProblem> {
    let path = pins.link(pin::XDP);
    if there == Some((ifindex, mode)) && path.exists() {
        fault::point("swap the XDP program")?;
        match swap_xdp(&path, program) {
            Ok(()) => {
                journal.note(Step::XdpSwapped);
                return Ok(());
            }
            // What runs stays, unless its interface is gone.
            Err(error) if errno(&error) != Some(libc::ENOLINK) => return Err(explain_xdp(&error)),
            Err(error) => log::debug!("the pinned XDP link leads nowhere: {}", chain(&error)),
        }
    }
    detach_xdp((pins, journal), there);
    fault::point("attach XDP")?;
    link_xdp(pins, program, ifindex, mode)?;
    journal.note(Step::Linked(pin::XDP.into()));
    Ok(())
}

/// Swaps the program of the XDP link that is pinned there.
pub(super) fn swap_xdp(path: &Path, program: &mut Xdp) -> Result<(), ProgramError> {
    let link = FdLink::from(PinnedLink::from_pin(path).map_err(unusable)?);
    let id = program.attach_to_link(link.try_into().map_err(unusable)?)?;
    // Only the descriptor is dropped: the pin keeps the link.
    let _: FdLink = program.take_link(id)?.try_into().map_err(unusable)?;
    Ok(())
}

/// Makes the XDP link of an interface.
pub(super) fn link_xdp(
    pins: &PinDir,
    program: &mut Xdp,
    ifindex: u32,
    mode: Mode,
) -> Result<(), AttachProblem> {
    let flags = if mode == Mode::Native { XdpMode::Driver } else { XdpMode::Skb };
    let id = program.attach_to_if_index(ifindex, flags).map_err(|error| explain_xdp(&error))?;
    // A link that is not a descriptor (netlink) cannot outlive this process: dropping it detaches.
    let link: FdLink = program.take_link(id)?.try_into().map_err(|_| {
        AttachProblem(
            "the kernel attaches XDP by netlink only, which cannot be pinned (Linux 5.9 can)".into(),
        )
    })?;
    keep(pins, link, pin::XDP)
}

/// Pins a new link; one that is not pinned detaches.
fn keep(pins: &PinDir, link: FdLink, name: &str) -> Result<(), AttachProblem> {
    fault::point("pin a link")?;
    link.pin(pins.link(name)).map_err(|error| AttachProblem(chain(&error)))?;
    Ok(())
}

fn unusable(error: LinkError) -> ProgramError {
    match error {
        LinkError::SyscallError(error) => error.into(),
        error => ProgramError::IOError(io::Error::other(chain(&error))),
    }
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
pub(super) fn detach_xdp((pins, journal): (&PinDir, &mut Journal), there: Option<(u32, Mode)>) {
    let path = pins.link(pin::XDP);
    if path.exists() {
        pins.remove_link(&path);
        // One that was idle leaves nothing undone.
        if let Some((ifindex, mode)) = there.filter(|(_, mode)| *mode != Mode::Tc) {
            journal.note(Step::XdpUnlinked(ifindex, mode));
        }
    }
}

/// Attaches a TC program at its place, or swaps it where our link or filter is already.
pub(super) fn attach_tc(
    (pins, journal): (&PinDir, &mut Journal),
    program: &mut SchedClassifier,
    place: Place,
    tcx: bool,
) -> Result<TcHook, AttachProblem> {
    let path = pins.link(&place.link);
    if path.exists() {
        fault::point("swap a TC program")?;
        match swap_tc(&path, program) {
            Ok(()) => {
                journal.note(Step::TcSwapped(place));
                return Ok(TcHook::Tcx);
            }
            // What runs stays, unless its interface is gone.
            Err(error) if errno(&error) != Some(libc::ENOLINK) => return Err(error.into()),
            Err(error) => log::debug!("the pinned TC link {} leads nowhere: {}", place.link, chain(&error)),
        }
        pins.remove_link(&path);
    }
    fault::point("attach TC")?;
    if tcx {
        // First among its like: what others do with a packet of ours would be undone or missed.
        let tcx = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(&place.interface, place.side(), tcx)?;
        let link: FdLink = program.take_link(id)?.try_into()?;
        keep(pins, link, &place.link)?;
        journal.note(Step::Linked(place.link));
        return Ok(TcHook::Tcx);
    }
    attach_clsact(journal, program, place)?;
    Ok(TcHook::Clsact)
}

/// Swaps the program of the TC link that is pinned there.
pub(super) fn swap_tc(path: &Path, program: &mut SchedClassifier) -> Result<(), ProgramError> {
    let link = FdLink::from(PinnedLink::from_pin(path).map_err(unusable)?);
    let id = program.attach_to_link(link.try_into().map_err(unusable)?)?;
    let _: FdLink = program.take_link(id)?.try_into().map_err(unusable)?;
    Ok(())
}

fn attach_clsact(
    journal: &mut Journal,
    program: &mut SchedClassifier,
    place: Place,
) -> Result<(), AttachProblem> {
    match tc::qdisc_add_clsact(&place.interface) {
        Ok(()) => journal.note(Step::Qdisc(place.interface.clone())),
        Err(tc::TcError::AlreadyAttached) => {}
        Err(error) if errno(&error) == Some(libc::EEXIST) => {}
        Err(error) => return Err(AttachProblem(format!("add the clsact qdisc: {}", chain(&error)))),
    }
    // Replace the filter of a former controller, else make one.
    if swap_filter(program, &place).is_ok() {
        journal.note(Step::TcSwapped(place));
        return Ok(());
    }
    fault::point("attach a filter")?;
    let options = NlOptions { priority: priority(&place), handle: handle(place.uplink), classid: None };
    let options = TcAttachOptions::Netlink(options);
    let id = program.attach_with_options(&place.interface, place.side(), options)?;
    // The filter stays by itself; dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    journal.note(Step::Filtered(place));
    Ok(())
}

/// Swaps the program of our filter at this place, if there is one.
pub(super) fn swap_filter(program: &mut SchedClassifier, place: &Place) -> Result<(), AttachProblem> {
    let uplink = handle(place.uplink);
    let there = SchedClassifierLink::attached(&place.interface, place.side(), priority(place), uplink, None)
        .map_err(|error| AttachProblem(error.to_string()))?;
    let id = program.attach_to_link(there)?;
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes a TC link or filter.
pub(super) fn detach_tc(pins: &PinDir, place: &Place) {
    let path = pins.link(&place.link);
    if path.exists() {
        pins.remove_link(&path);
    } else if !place.interface.is_empty() {
        detach_clsact(&place.interface, place.side(), priority(place), place.uplink);
    }
}

fn detach_clsact(interface: &str, side: TcAttachType, priority: u16, uplink: u32) {
    // An interface without the filter, or without the qdisc, has nothing to remove; a link detaches when dropped.
    let _ = SchedClassifierLink::attached(interface, side, priority, handle(uplink), None);
}

/// Removes every link, and every filter of this uplink on the interfaces named.
pub(super) fn detach_all(pins: &PinDir, interfaces: &[String], uplink: u32) {
    pins.remove_link(&pins.link(pin::XDP));
    for interface in interfaces {
        for (side, priority) in [
            (TcAttachType::Ingress, PRIORITY),
            (TcAttachType::Ingress, PEER_PRIORITY),
            (TcAttachType::Egress, PRIORITY),
        ] {
            detach_clsact(interface, side, priority, uplink);
        }
    }
}

/// Undoes what was done since a mark, the last first. The interfaces that were given a clsact qdisc, which may carry others'
/// filters by now.
pub(super) fn undo((pins, journal): (&PinDir, &mut Journal), mark: usize) -> Vec<String> {
    let mut qdiscs = Vec::new();
    for step in journal.take(mark) {
        match step {
            Step::Qdisc(interface) => qdiscs.push(interface),
            step => {
                if let Err(problem) = revert(pins, &step) {
                    log::warn!("undo {step:?}: {problem}");
                }
            }
        }
    }
    qdiscs
}

fn revert(pins: &PinDir, step: &Step) -> Result<(), AttachProblem> {
    match step {
        Step::Linked(name) => pins.remove_link(&pins.link(name)),
        Step::XdpSwapped => swap_xdp(&pins.link(pin::XDP), &mut former_xdp(pins)?)?,
        Step::XdpUnlinked(ifindex, mode) => link_xdp(pins, &mut former_xdp(pins)?, *ifindex, *mode)?,
        Step::TcSwapped(place) => {
            let mut program = SchedClassifier::from_pin(pins.program(place.program))?;
            let link = pins.link(&place.link);
            if link.exists() {
                swap_tc(&link, &mut program)?;
            } else {
                swap_filter(&mut program, place)?;
            }
        }
        Step::Filtered(place) => detach_clsact(&place.interface, place.side(), priority(place), place.uplink),
        Step::Qdisc(_) => {}
    }
    Ok(())
}

fn former_xdp(pins: &PinDir) -> Result<Xdp, AttachProblem> {
    Ok(Xdp::from_pin(pins.program(program::UPLINK_XDP), XdpAttachType::Interface)?)
}
