//! `keygen`: a key for the tunnel between the nodes of a cluster file.

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail};

use super::out::line;
use crate::tunnel_key::SharedKey;

/// Writes a new key to a file of its own, which only its owner may read, or prints it.
///
/// # Errors
/// The file is there already or cannot be written, or the kernel gives no random numbers.
pub fn run(file: Option<&Path>) -> Result<()> {
    let key = SharedKey::generate().context("make a key")?;
    let Some(path) = file else {
        return line(&key);
    };
    let mut options = OpenOptions::new();
    let file = match options.write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(
            "{} is there already; nodes that use it would not understand those with another one: name another file, or \
             remove it",
            path.display()
        ),
        opened => opened,
    };
    let written = file.and_then(|mut file| writeln!(file, "{key}"));
    written.with_context(|| format!("write {}", path.display()))
}
