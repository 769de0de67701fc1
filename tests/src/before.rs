//! The agent of an earlier commit, to stand beside the one that is tested.

use std::path::PathBuf;

/// Its program.
pub fn program() -> PathBuf {
    std::env::var_os("LB_AGENT_BEFORE").map(PathBuf::from).expect(
        "LB_AGENT_BEFORE names the agent of an earlier commit; run `cargo xtask test --before COMMIT`",
    )
}
