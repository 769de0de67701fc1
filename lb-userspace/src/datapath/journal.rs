//! What was done to links and filters since the datapath was last whole; [`super::links::undo`] undoes it.
//!
//! The programs that ran before stay pinned until those that take their place run everywhere: an attach that fails in
//! the middle puts them back. (The kernel gives a program out by its number only to CAP_SYS_ADMIN; a pin will do.)

use aya::programs::TcAttachType;
use lb_common::abi::{Mode, program};

/// Where a TC program goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Name of the interface.
    pub(super) interface: String,
    /// Name of the link's pin.
    pub(super) link: String,
    /// Interface index of the uplink.
    pub(super) uplink: u32,
    /// Name of the program.
    pub(super) program: &'static str,
}

impl Place {
    /// On which side of the interface the program sees frames.
    pub(super) fn side(&self) -> TcAttachType {
        match self.program {
            program::UPLINK_EGRESS | program::TASK_EGRESS => TcAttachType::Egress,
            _ => TcAttachType::Ingress,
        }
    }
}

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

    /// The steps since a mark, the last first; they are forgotten.
    pub(super) fn take(&mut self, mark: usize) -> Vec<Step> {
        let mut steps = self.steps.split_off(mark);
        steps.reverse();
        steps
    }
}
