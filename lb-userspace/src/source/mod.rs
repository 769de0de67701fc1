//! Where the cluster's state comes from: a stream of whole snapshots.
//!
//! A source that fails keeps quiet towards the controller, which leaves the last state standing, and says what
//! failed through [`Update::Failed`].

pub mod docker;
pub mod facts;
pub mod file;
pub mod peer;

use crate::cluster::ClusterState;

/// What a source has to say.
#[derive(Clone, Debug)]
pub enum Update {
    /// What the source is.
    Origin(Origin),
    /// The cluster, whole.
    State(ClusterState),
    /// The cluster as far as it is known, and why that may be out of date.
    Stale(ClusterState, String),
    /// The source could not be read; the last state stands.
    Failed(String),
    /// The source is not there yet, and is waited for.
    Waiting(String),
}

/// What the state comes from, in words for the operator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// `file`, `docker manager`, `docker worker`, …
    pub kind: String,
    /// Why this one.
    pub why: String,
}
