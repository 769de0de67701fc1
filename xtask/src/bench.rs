//! `bench`: what packets cost.

use anyhow::Result;

use crate::{
    ebpf,
    run::{as_root, exec, target},
    toolchain,
};

/// Builds what is missing and measures as root.
pub fn run() -> Result<()> {
    toolchain::test_tools()?;
    let object = ebpf::build()?;
    ebpf::build_tests(&object)?;
    exec(&mut as_root(target().join("release/lb-bench")))
}
