//! What was done to links and filters since the datapath was last whole, and how each is undone.
//!
//! The programs that ran before stay pinned until those that take their place run everywhere: an attach that fails in
//! the middle puts them back. (The kernel gives a program out by its number only to CAP_SYS_ADMIN; a pin will do.)

use aya::programs::{SchedClassifier, Xdp};
use aya_obj::programs::XdpAttachType;
use lb_common::abi::{Mode, program};

use super::{
    links::{self, AttachProblem, Place},
    pin::{self, PinDir},
};

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A link that was not there was pinned by this name.
    Linked(String),
    /// The XDP link runs another program.
    XdpSwapped,
    /// The XDP link of this interface index and mode is gone.
    XdpUnlinked(u32, Mode),
    /// The TC link or filter at this place runs another program.
    TcSwapped(Place),
    /// A filter that was not there.
    Filtered(Place),
    /// A clsact qdisc that was not there, by interface.
    Qdisc(String),
}

/// The steps, in the order in which they were done.
#[derive(Debug, Default)]
pub(super) struct Journal {
    steps: Vec<Step>,
}

impl Journal {
    pub(super) fn note(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// How far it has come, to go back to.
    pub(super) fn mark(&self) -> usize {
        self.steps.len()
    }

    /// There is no way back from here.
    pub(super) fn clear(&mut self) {
        self.steps.clear();
    }

    /// Undoes what was done since a mark, the last first. The interfaces that were given a clsact qdisc, which may carry
    /// others' filters by now.
    pub(super) fn undo(&mut self, pins: &PinDir, mark: usize) -> Vec<String> {
        let mut qdiscs = Vec::new();
        for step in self.steps.drain(mark..).rev() {
            match &step {
                Step::Qdisc(interface) => qdiscs.push(interface.clone()),
                step => {
                    if let Err(problem) = revert(pins, step) {
                        log::warn!("undo {step:?}: {problem}");
                    }
                }
            }
        }
        qdiscs
    }
}

fn revert(pins: &PinDir, step: &Step) -> Result<(), AttachProblem> {
    match step {
        Step::Linked(name) => pins.remove_link(&pins.link(name)),
        Step::XdpSwapped => links::swap_xdp(&pins.link(pin::XDP), &mut former_xdp(pins)?)?,
        Step::XdpUnlinked(ifindex, mode) => links::link_xdp(pins, &mut former_xdp(pins)?, *ifindex, *mode)?,
        Step::TcSwapped(place) => {
            let mut program = SchedClassifier::from_pin(pins.program(place.program))?;
            let link = pins.link(&place.link);
            if link.exists() {
                links::swap_tc(&link, &mut program)?;
            } else {
                links::swap_filter(&mut program, place)?;
            }
        }
        Step::Filtered(place) => links::detach_clsact(&place.interface, place.uplink),
        Step::Qdisc(_) => {}
    }
    Ok(())
}

fn former_xdp(pins: &PinDir) -> Result<Xdp, AttachProblem> {
    Ok(Xdp::from_pin(pins.program(program::UPLINK_XDP), XdpAttachType::Interface)?)
}
