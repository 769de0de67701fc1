//! From what the cluster should look like to the operations that make the tables say so.
//!
//! Pure: no I/O, no clock, neither aya nor tokio. [`desired`] turns the cluster's state into what the tables should mean;
//! [`table_builder`] gives that numbers, keeping those in use; [`transition`] orders the changes so that no packet ever sees half
//! of one. The [`Planner`] remembers what was planned, so that a change costs what changes.

mod allocation_index;
mod desired;
mod judge;
mod numbers;
mod planner;
mod table_builder;
mod table_diff;
mod tables;
mod transition;

pub use desired::{NextHop, NextHops, Reach, View};
pub use planner::Planner;
pub use table_builder::Limits;
pub use tables::{
    At, BackendEntry, BackendLabel, ClientRange, MapOp, NodeLabel, PortLabel, Role, ServiceLabel, Tables,
    TaskListener,
};

/// What a planning came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In the order in which they are to be applied.
    pub ops: Vec<MapOp>,
    /// What could not be planned, in words for the operator, each with the next step.
    pub refused: Vec<String>,
    /// Whether services were left out for which there may be room in what this plan frees: only the next one can give that.
    pub again: bool,
}

#[cfg(test)]
mod tests;
