//! `check`: what needs no root.

use anyhow::Result;

use crate::{
    run::{cargo, exec},
    toolchain,
};

/// Formatting, lints, host tests, documentation, licences.
pub fn run() -> Result<()> {
    toolchain::components()?;
    toolchain::fuzz_tools()?;
    exec(cargo().args(["fmt", "--all", "--", "--check"]))?;
    exec(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    exec(cargo().args([
        "test",
        "--package",
        "lb-common",
        "--package",
        "lb-userspace",
        "--package",
        "xtask",
    ]))?;
    exec(cargo().env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links").args([
        "doc",
        "--no-deps",
        "--document-private-items",
        "--package",
        "lb-common",
        "--package",
        "lb-ebpf",
        "--package",
        "lb-userspace",
    ]))?;
    // Advisories need a database from outside the package registry: a release asks for those.
    toolchain::deny()?;
    exec(cargo().args(["deny", "check", "bans", "licenses", "sources"]))
}
