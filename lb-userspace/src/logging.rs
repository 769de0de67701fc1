//! The agent's log: as text, as JSON, or to the journal with fields and priorities; its level can be changed while it runs.

use std::{
    fmt,
    io::{self, IsTerminal as _},
    os::fd::AsFd as _,
    str::FromStr,
    sync::OnceLock,
};

use clap::ValueEnum;
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, Targets},
    fmt::format::debug_fn,
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// The journal where systemd started the agent, else text
    Auto,
    /// A line for people
    Text,
    /// A JSON object a line
    Json,
    /// systemd's journal, with priorities and fields
    Journald,
}

/// What is logged: a level for all, and others for parts, as in `info,lb_userspace::net=debug`.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    text: String,
    // Half a kilobyte, which each command line would carry.
    targets: Box<Targets>,
}

/// Why text is no level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a level: write error, warn, info, debug, trace or off, or LEVEL,MODULE=LEVEL as in info,lb_userspace::net=debug"
)]
pub struct LevelError(String);

impl FromStr for Level {
    type Err = LevelError;

    fn from_str(text: &str) -> Result<Self, LevelError> {
        let error = || LevelError(text.to_owned());
        let level = |text: &str| text.trim().parse::<LevelFilter>().map_err(|_| error());
        // What the libraries have to say at these levels helps nobody who runs the agent; the programs log only when
        // they were asked to.
        let mut targets = Targets::new()
            .with_target("aya", LevelFilter::WARN)
            .with_target("aya_obj", LevelFilter::WARN)
            // It says so each time a connection to the kernel is no longer needed.
            .with_target("netlink_proto", LevelFilter::ERROR)
            .with_target("hyper", LevelFilter::WARN)
            .with_target("lb_ebpf", LevelFilter::DEBUG);
        let mut all = LevelFilter::INFO;
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            match part.split_once('=') {
                Some((target, of)) => targets = targets.with_target(target.trim(), level(of)?),
                None => all = level(part)?,
            }
        }
        Ok(Self { text: text.to_owned(), targets: Box::new(targets.with_default(all)) })
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

type Handle = reload::Handle<Targets, Registry>;
static HANDLE: OnceLock<Handle> = OnceLock::new();

/// Starts the log. The level is what the command line says, else the environment's `RUST_LOG`, else `info`; a variable that
/// says nothing useful is said to, and left aside.
pub fn start(format: LogFormat, level: Option<Level>) {
    let mut wrong = None;
    let level = level.or_else(|| {
        let text = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty())?;
        text.parse().map_err(|error| wrong = Some(error)).ok()
    });
    let targets =
        level.map_or_else(|| "info".parse::<Level>().map(|level| level.targets), |level| Ok(level.targets));
    let (filter, handle) = reload::Layer::new(*targets.unwrap_or_default());
    let journal = match format {
        LogFormat::Journald => true,
        LogFormat::Auto => is_journal(),
        LogFormat::Text | LogFormat::Json => false,
    };
    let journal =
        if journal { tracing_journald::layer().map_err(|error| wrong_journal(&error)).ok() } else { None };
    let layer: Box<dyn Layer<_> + Send + Sync> = match (journal, format) {
        (Some(journal), _) => Box::new(
            journal.with_syslog_identifier("lb-userspace".into()).with_field_prefix(Some("LB".into())),
        ),
        (None, LogFormat::Json) => {
            Box::new(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(io::stderr))
        }
        (None, _) => {
            let colours =
                io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            // The fields say again what the sentence says.
            let message = debug_fn(|writer, field, value| match field.name() {
                "message" => write!(writer, "{value:?}"),
                _ => Ok(()),
            });
            let text = tracing_subscriber::fmt::layer().with_target(false).with_ansi(colours);
            Box::new(text.fmt_fields(message).with_writer(io::stderr))
        }
    };
    if tracing_subscriber::registry().with(filter).with(layer).try_init().is_ok() {
        let _ = HANDLE.set(handle);
        // The filter decides, also when it is changed later.
        log::set_max_level(log::LevelFilter::Trace);
    }
    if let Some(error) = wrong {
        tracing::warn!("RUST_LOG={error}; info is logged");
    }
}

/// Changes what is logged from now on.
///
/// # Errors
/// The log was not started.
pub fn set(level: &Level) -> Result<(), reload::Error> {
    match HANDLE.get() {
        Some(handle) => handle.reload(Targets::clone(&level.targets)),
        None => Ok(()),
    }
}

fn wrong_journal(error: &io::Error) {
    eprintln!("lb-userspace: the journal cannot be written to, standard error is: {error}");
}

/// Whether standard error is the journal's: systemd says which file it gave (`systemd.exec(5)`, JOURNAL_STREAM).
fn is_journal() -> bool {
    let said = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stat = nix::sys::stat::fstat(io::stderr().as_fd());
    stat.is_ok_and(|stat| said == format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_and_nonsense_is_refused() {
        for good in ["info", "debug", "warn,lb_userspace::net=trace", "off", "INFO"] {
            assert!(good.parse::<Level>().is_ok(), "{good}");
        }
        for bad in ["warning", "info,lb_userspace", "lb_userspace=loud", "verbose"] {
            assert!(bad.parse::<Level>().is_err(), "{bad}");
        }
    }
}
