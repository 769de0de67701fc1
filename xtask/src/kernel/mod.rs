//! Tests on other kernels: fetched from Debian, booted in an emulator, the tests run there.
//!
//! [`archive`] finds and unpacks a kernel, [`image`] packs what the guest needs into an initial file system, [`guest`]
//! boots it and brings the results back. KVM is never asked for: the emulator runs everywhere, in containers and
//! virtual machines too.

mod archive;
mod guest;
mod image;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
pub use archive::Wanted;

use crate::{run::target, toolchain};

/// What runs in a guest.
pub struct Tests<'a> {
    /// The agent.
    pub agent: &'a Path,
    /// The eBPF object.
    pub object: &'a Path,
    /// The test programs.
    pub programs: &'a [PathBuf],
    /// Only tests whose name holds this.
    pub filter: Option<&'a str>,
}

/// Runs the tests on each kernel; all of them are tried.
///
/// # Errors
/// A kernel cannot be had, its guest ends in another way than by itself, or a test fails.
pub fn run(wanted: &Wanted, tests: &Tests<'_>) -> Result<()> {
    toolchain::guest_tools()?;
    let kernels = archive::fetch(wanted)?;
    let mut failed = Vec::new();
    for kernel in &kernels {
        println!("kernel {} ({}):", kernel.release, kernel.suite);
        let place = target().join("kernels").join(&kernel.release);
        let outcome =
            image::build(kernel, tests, &place).and_then(|image| guest::run(kernel, &image, &place));
        if let Err(error) = outcome {
            println!("kernel {}: {error:#}", kernel.release);
            failed.push(kernel.release.clone());
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("tests failed on {}", failed.join(", ")) }
}
