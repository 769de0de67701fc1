//! The steps of a verb that takes minutes: each has its number, and says how long it took.

use std::{
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Where no terminal shows a line that changes, one is written this often.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Counts steps, and times them.
pub struct Steps {
    total: u32,
    started: u32,
    since: Instant,
}

impl Steps {
    /// So many steps, from now on.
    pub fn new(total: u32) -> Self {
        Self { total, started: 0, since: Instant::now() }
    }

    /// Does the next step. What `work` returns beside its value is said with the step's time: a size, or why there was
    /// nothing to do.
    ///
    /// # Errors
    /// Those of the step.
    pub fn step<T>(&mut self, what: &str, work: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        self.begin(what);
        let start = Instant::now();
        let (value, said) = work()?;
        let said = if said.is_empty() { String::new() } else { format!(": {said}") };
        eprintln!("      {}{said}", seconds(start.elapsed()));
        Ok(value)
    }

    /// Begins the next step, for one that shows by itself what it does.
    pub fn begin(&mut self, what: &str) {
        self.started += 1;
        eprintln!("[{}/{}] {what}", self.started, self.total);
    }

    /// The time since the first step began.
    pub fn elapsed(&self) -> String {
        seconds(self.since.elapsed())
    }
}

/// A time as people say it.
pub fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f32()),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}

/// Runs cargo with one line that changes in place of one for each crate. Everything else that it says is shown.
///
/// # Errors
/// Cargo cannot be started, or fails.
pub fn build(command: &mut Command) -> Result<()> {
    let terminal = std::io::stderr().is_terminal();
    command.stdin(Stdio::null()).stderr(Stdio::piped()).env("CARGO_TERM_PROGRESS_WHEN", "never");
    if terminal {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
    let said = child.stderr.take().context("cargo's output")?;
    let (start, mut last, mut crates) = (Instant::now(), Instant::now(), 0);
    for line in BufReader::new(said).split(b'\n') {
        let line = String::from_utf8_lossy(&line.context("read what cargo says")?).into_owned();
        let Some(current) = progress(&line) else {
            clear(terminal);
            eprintln!("{line}");
            continue;
        };
        let Some(current) = current else { continue };
        crates += 1;
        let shown = format!("      {}: {crates} crates, {current}", seconds(start.elapsed()));
        if terminal {
            eprint!("\r\x1b[2K{}", shown.chars().take(78).collect::<String>());
            let _ = std::io::stderr().flush();
        } else if last.elapsed() >= HEARTBEAT {
            eprintln!("{shown}");
            last = Instant::now();
        }
    }
    clear(terminal);
    let status = child.wait().context("wait for cargo")?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

fn clear(terminal: bool) {
    if terminal {
        eprint!("\r\x1b[2K");
    }
}

/// What a line of cargo's says of its progress: the crate that is compiled now, or nothing worth a line. `None` for a
/// line that is no progress.
fn progress(line: &str) -> Option<Option<&str>> {
    let plain = line.trim_start();
    // The words are coloured on a terminal: the escape stands before, and its end behind.
    let plain =
        plain.strip_prefix("\x1b[1m\x1b[92m").or(plain.strip_prefix("\x1b[1m\x1b[32m")).unwrap_or(plain);
    let (verb, rest) = plain.trim_start().split_once(' ')?;
    let rest = rest.trim();
    match verb.trim_end_matches("\x1b[0m") {
        "Compiling" => Some(Some(rest.split(" (").next().unwrap_or(rest))),
        "Downloading" | "Downloaded" | "Updating" | "Locking" | "Finished" | "Installing" | "Installed"
        | "Replacing" | "Replaced" | "Adding" | "Blocking" | "Fresh" => Some(None),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_from_what_people_must_read() {
        assert_eq!(progress("   Compiling aya v0.14.0"), Some(Some("aya v0.14.0")));
        assert_eq!(
            progress("   Compiling lb-common v0.1.0 (/src/lb-common)"),
            Some(Some("lb-common v0.1.0"))
        );
        assert_eq!(progress("\x1b[1m\x1b[92m   Compiling\x1b[0m aya v0.14.0"), Some(Some("aya v0.14.0")));
        assert_eq!(progress("    Finished `release` profile [optimized] target(s) in 1m 02s"), Some(None));
        assert_eq!(progress("error[E0308]: mismatched types"), None);
        assert_eq!(progress("warning: unused variable: `x`"), None);
        assert_eq!(progress(""), None);
    }

    #[test]
    fn a_time_is_said_as_people_say_it() {
        assert_eq!(seconds(Duration::from_millis(1_540)), "1.5 s");
        assert_eq!(seconds(Duration::from_secs(125)), "2 min 5 s");
    }
}
