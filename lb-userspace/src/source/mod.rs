//! Where the cluster's state comes from: a stream of whole snapshots.
//!
//! A source that fails keeps quiet towards the controller, which leaves the last state standing, and says what
//! failed through [`Update::Failed`].

pub mod file;

use crate::cluster::ClusterState;

/// What a source has to say.
#[derive(Debug)]
pub enum Update {
    /// The cluster, whole.
    State(ClusterState),
    /// The source could not be read; the last state stands.
    Failed(String),
}
