//! Fail points: a place before each change that is made to the kernel, at which a test may have it fail, or kill the
//! process.
//!
//! They are in every build, so that what is tested is what runs, and inert unless the environment says that this is a test
//! and sets [`FAULT`]. It then names a file that says how many points are to be passed yet, and what happens at the next:
//!
//! ```text
//! 17 kill
//! ```
//!
//! `kill` is SIGKILL, `fail` the error that the kernel has no memory. The file is removed when it has happened.

use std::{fs, io, path::PathBuf, sync::LazyLock};

use nix::sys::signal::{Signal, raise};

use crate::testing::{FAULT, asked};

static ARMED: LazyLock<Option<PathBuf>> = LazyLock::new(|| asked(FAULT).map(PathBuf::from));

/// A change is about to be made; `what` says which.
pub(super) fn point(what: &str) -> io::Result<()> {
    match &*ARMED {
        None => Ok(()),
        Some(path) => pass(path, what),
    }
}

#[cold]
fn pass(path: &PathBuf, what: &str) -> io::Result<()> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(());
    };
    let (left, action) = text.trim().split_once(' ').unwrap_or_default();
    match left.parse::<u32>() {
        Ok(0) => {
            fs::remove_file(path)?;
            log::warn!("{FAULT}: {action}, instead of: {what}");
            if action == "kill" {
                let _ = raise(Signal::SIGKILL);
            }
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        }
        Ok(left) => fs::write(path, format!("{} {action}\n", left - 1)),
        Err(_) => Ok(()),
    }
}
