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
use archive::Kernel;
pub use archive::Wanted;
pub use image::test_name;

use crate::{run::target, toolchain};

/// What runs in a guest.
pub struct Tests<'a> {
    /// The agent.
    pub agent: &'a Path,
    /// The eBPF object.
    pub object: &'a Path,
    /// The test programs.
    pub programs: &'a [PathBuf],
    /// Only tests whose name holds this, of all programs; else those of [`SHORT`] and [`LONG`].
    pub filter: Option<&'a str>,
    /// Without those of [`LONG`].
    pub short: bool,
}

/// What runs on each kernel: how it loads, attaches and serves in each mode, and the tables.
const SHORT: [(&str, &str); 4] =
    [("kernel", ""), ("budgets", "programs_stay"), ("datapath", ""), ("tunnel", "")];
/// What runs beside that: the tables' memory, and three nodes with the tunnel between them in each mode and both return
/// ways. An emulated machine takes an hour for all that there is.
const LONG: [(&str, &str); 2] = [("budgets", "tables_stay"), ("peers", "every_task_sees_the_client")];
/// What runs on a kernel that is too old to serve: that it says so.
const REFUSED: [(&str, &str); 1] = [("kernel", "a_kernel_that_lacks_what_is_needed")];
/// The oldest series that serves.
const OLDEST: (u32, u32) = (5, 15);

impl Tests<'_> {
    /// The names of the programs to run on a kernel, each with the part of a name that its tests must hold.
    fn on(&self, kernel: &Kernel) -> Result<Vec<(String, String)>> {
        let owned = |(program, filter): &(&str, &str)| ((*program).to_owned(), (*filter).to_owned());
        match self.filter {
            Some(filter) => {
                let names = self.programs.iter().map(|program| test_name(program));
                names.map(|name| Ok((name?, filter.to_owned()))).collect()
            }
            None if kernel.series() < OLDEST => Ok(REFUSED.iter().map(owned).collect()),
            None if self.short => Ok(SHORT.iter().map(owned).collect()),
            None => Ok(SHORT.iter().chain(&LONG).map(owned).collect()),
        }
    }
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
