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

/// Plays all inputs that are kept for a fuzz target, and each with some bytes changed.
#[cfg(test)]
fn play(target: &str, run: fn(&[u8])) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs: Vec<Vec<u8>> = std::fs::read_dir(folder)
        .expect("the folder of the target's inputs")
        .map(|entry| std::fs::read(entry.expect("an entry").path()).expect("an input"))
        .collect();
    assert!(!inputs.is_empty(), "{target} has inputs");
    inputs.sort();
    for input in inputs {
        run(&input);
        // The same each time.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..50 {
            let mut changed = input.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (at, byte) = ((state >> 33) as usize % input.len().max(1), (state >> 24) as u8);
                if let Some(place) = changed.get_mut(at) {
                    *place = byte;
                }
            }
            run(&changed);
        }
    }
}
