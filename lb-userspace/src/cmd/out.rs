//! Writing to standard output: a reader that has gone ends the verb, a full disk is said, nothing panics.

use std::io::{self, IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::report::SCHEMA;

/// Writes text and a line's end.
///
/// # Errors
/// It cannot be written.
pub fn line(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    // Names are chosen by others: on a terminal they only show.
    let text = crate::text::clean_lines(text.as_ref());
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n"));
    written.and_then(|()| out.flush()).context("write to standard output")
}

/// Many lines, written in blocks.
pub struct Lines(io::BufWriter<io::StdoutLock<'static>>);

impl Lines {
    /// None yet.
    pub fn new() -> Self {
        Self(io::BufWriter::with_capacity(1 << 16, io::stdout().lock()))
    }

    /// Writes a line.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn line(&mut self, text: &str) -> Result<()> {
        let text = crate::text::clean_lines(text);
        let written = self.0.write_all(text.as_bytes()).and_then(|()| self.0.write_all(b"\n"));
        written.context("write to standard output")
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn end(mut self) -> Result<()> {
        self.0.flush().context("write to standard output")
    }
}

/// Writes a document with its schema version: for people to read, or in one line where others follow.
///
/// # Errors
/// It cannot be written.
pub fn json(mut document: Value, more: bool) -> Result<()> {
    if let Some(fields) = document.as_object_mut() {
        fields.insert("schema".into(), SCHEMA.into());
    }
    let text = if more { document.to_string() } else { format!("{document:#}") };
    line(crate::text::clean_json(&text))
}

/// Whether a person reads it.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Begins a screen anew where a person reads it; elsewhere an empty line parts what follows.
///
/// # Errors
/// It cannot be written.
pub fn redraw(first: bool) -> Result<()> {
    let mut out = io::stdout().lock();
    let text = match (is_terminal(), first) {
        (true, _) => "\x1b[H\x1b[2J",
        (false, true) => "",
        (false, false) => "\n",
    };
    out.write_all(text.as_bytes()).context("write to standard output")
}
