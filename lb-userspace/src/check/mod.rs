//! Health checks of our own, for images without one: the agent of a task's node asks the task itself, whether it takes connections.
//!
//! [`runner`] asks; what it finds comes to other nodes as facts, and the planner judges what follows for new connections.

pub mod runner;

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use hyper::http::uri::PathAndQuery;
use serde::{Deserialize, Serialize};

use crate::{text, units::Time};

/// How the tasks of a service are asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What is asked.
    pub kind: CheckKind,
    /// The port of the task.
    pub port: u16,
    /// Of HTTP: the path.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Milliseconds from one answer to the next question.
    pub interval: u32,
    /// A task that failed gets new connections after so many answers that are right.
    pub rise: u16,
    /// One that did not gets none after so many that are not.
    pub fall: u16,
}

impl Check {
    /// Of a task that did not take what it was given: whether it accepts a connection, the first answer counts either way.
    pub fn of_suspect(port: u16, interval: u32) -> Self {
        Self { kind: CheckKind::Tcp, port, path: String::new(), interval, rise: 1, fall: 1 }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// Whether it accepts a connection.
    Tcp,
    /// Whether it answers a GET with a status from 200 to 399.
    Http,
}

/// The choices of [`CheckSpec::kind`] that there are.
const KINDS: [(&str, Option<CheckKind>); 3] =
    [("docker", None), ("tcp", Some(CheckKind::Tcp)), ("http", Some(CheckKind::Http))];
/// The longest path, in bytes.
const LONGEST_PATH: usize = 128;
/// The longest word of why a task does not pass, in bytes: labels have little room.
const LONGEST_REASON: usize = 100;

/// A check as somebody describes it: what is not said is by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckSpec {
    /// `docker` (no check of our own), `tcp` or `http`.
    pub kind: String,
    /// The port of the task; its first target port of TCP otherwise.
    pub port: Option<u16>,
    /// Of HTTP: the path; `/` otherwise.
    pub path: Option<String>,
    /// From one answer to the next question, as in `500ms` or `2s`; two seconds otherwise.
    pub interval: Option<String>,
    /// [`Check::rise`]; 2 otherwise.
    pub rise: Option<u16>,
    /// [`Check::fall`]; 3 otherwise.
    pub fall: Option<u16>,
}

/// Why a description is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CheckError {
    /// There is no such kind.
    #[error("health {0:?} is none of docker, tcp, http")]
    Kind(String),
    /// No port is named and the service has none of TCP.
    #[error("a health check needs the port of the task: the service publishes none of TCP")]
    NoPort,
    /// There is no port 0.
    #[error("the port of a health check is a number from 1 to 65535")]
    Port,
    /// It is no path.
    #[error(
        "the path {0:?} of a health check begins with / and has no spaces, of {LONGEST_PATH} bytes at most"
    )]
    Path(String),
    /// Docker alone is believed, and more is said.
    #[error("what else is said of health has no effect with docker: write tcp or http")]
    NothingAsked,
    /// It is not asked by a path.
    #[error("a path is of use to http alone")]
    PathOfTcp,
    /// It is no time, or out of range.
    #[error("the interval of a health check is a time from 100ms to 1h, not {0:?}")]
    Interval(String),
    /// Out of range.
    #[error("rise and fall of a health check are numbers from 1 to 100")]
    Count,
}

impl CheckSpec {
    /// The check of a service whose tasks have this first port of TCP, if any; none where Docker's word is enough.
    ///
    /// # Errors
    /// It is described wrongly.
    pub fn check(&self, first: Option<u16>) -> Result<Option<Check>, CheckError> {
        let kind = KINDS.iter().find(|(name, _)| *name == self.kind).map(|(_, kind)| *kind);
        let Some(kind) = kind.ok_or_else(|| CheckError::Kind(self.kind.clone()))? else {
            let nothing = Self { kind: self.kind.clone(), ..Self::default() };
            return if *self == nothing { Ok(None) } else { Err(CheckError::NothingAsked) };
        };
        let port = self.port.or(first).ok_or(CheckError::NoPort)?;
        if port == 0 {
            return Err(CheckError::Port);
        }
        let path = match (kind, &self.path) {
            (CheckKind::Tcp, None) => String::new(),
            (CheckKind::Tcp, Some(_)) => return Err(CheckError::PathOfTcp),
            (CheckKind::Http, None) => "/".to_owned(),
            (CheckKind::Http, Some(path)) => {
                let fits = path.starts_with('/') && path.len() <= LONGEST_PATH && !path.contains('#');
                if !fits || path.parse::<PathAndQuery>().is_err() {
                    return Err(CheckError::Path(path.clone()));
                }
                path.clone()
            }
        };
        let interval = match &self.interval {
            None => 2_000,
            Some(text) => {
                let error = || CheckError::Interval(text.clone());
                let time: Duration = Time::from_str(text).map_err(|_| error())?.into();
                let millis = u32::try_from(time.as_millis()).map_err(|_| error())?;
                if (100..=3_600_000).contains(&millis) { millis } else { return Err(error()) }
            }
        };
        let (rise, fall) = (self.rise.unwrap_or(2), self.fall.unwrap_or(3));
        if ![rise, fall].iter().all(|count| (1..=100).contains(count)) {
            return Err(CheckError::Count);
        }
        Ok(Some(Check { kind, port, path, interval, rise, fall }))
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, port, path, interval, rise, fall } = self;
        let kind = if *kind == CheckKind::Tcp { "tcp" } else { "http" };
        write!(f, "{kind} :{port}{path} every {interval} ms, rise {rise}, fall {fall}")
    }
}

/// What is known of a task by its checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whether it passes; nothing before it did so first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passes: Option<bool>,
    /// What was wrong at last; empty if nothing was.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Whether it has as many connections as it may have, those of all nodes' clients.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// Why its own node has no way to it; empty if it has one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unreached: String,
}

impl Finding {
    /// Whether it speaks against new connections by itself, without a check that has to pass first.
    pub fn speaks_against(&self) -> bool {
        self.full || self.passes == Some(false) || !self.unreached.is_empty()
    }

    /// Whether nothing speaks against new connections but that it is full; of a task that is asked, or not.
    pub fn is_only_full(&self, asks: bool) -> bool {
        self.full
            && self.unreached.is_empty()
            && (self.passes == Some(true) || !asks && self.passes.is_none())
    }

    /// What was wrong, of a task at this address.
    fn why(at: SocketAddr, what: &str) -> String {
        text::name(&format!("{at}: {what}"), LONGEST_REASON)
    }

    /// As it comes from another node, whose word it is.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.why = text::name(&self.why, LONGEST_REASON);
        self.unreached = text::name(&self.unreached, LONGEST_REASON);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: &str) -> CheckSpec {
        CheckSpec { kind: kind.into(), ..CheckSpec::default() }
    }

    #[test]
    fn what_is_not_said_is_by_default() {
        let first = Some(8080);
        assert_eq!(spec("docker").check(first), Ok(None));
        let tcp = spec("tcp").check(first).unwrap().unwrap();
        assert_eq!(tcp.to_string(), "tcp :8080 every 2000 ms, rise 2, fall 3");
        let all = CheckSpec {
            port: Some(9000),
            path: Some("/healthz?full=1".into()),
            interval: Some("500ms".into()),
            rise: Some(1),
            fall: Some(5),
            ..spec("http")
        };
        let all = all.check(None).unwrap().unwrap();
        assert_eq!(all.to_string(), "http :9000/healthz?full=1 every 500 ms, rise 1, fall 5");
        assert_eq!(spec("http").check(first).unwrap().unwrap().path, "/");
    }

    #[test]
    fn nonsense_is_refused() {
        let wrong = |spec: CheckSpec| spec.check(Some(8080)).unwrap_err();
        assert_eq!(wrong(spec("icmp")), CheckError::Kind("icmp".into()));
        assert_eq!(wrong(spec("")), CheckError::Kind(String::new()));
        assert_eq!(spec("tcp").check(None), Err(CheckError::NoPort));
        assert_eq!(wrong(CheckSpec { port: Some(0), ..spec("tcp") }), CheckError::Port);
        assert_eq!(wrong(CheckSpec { path: Some("/".into()), ..spec("tcp") }), CheckError::PathOfTcp);
        let docker = CheckSpec { rise: Some(1), ..spec("docker") };
        assert_eq!(wrong(docker), CheckError::NothingAsked);
        let long = format!("/{}", "x".repeat(LONGEST_PATH));
        for path in ["", "health", "/a b", "/a\r\nHost: b", "/a#b", &long] {
            let spec = CheckSpec { path: Some(path.into()), ..spec("http") };
            assert_eq!(wrong(spec), CheckError::Path(path.into()));
        }
        for interval in ["", "soon", "99ms", "2h", "-1s"] {
            let spec = CheckSpec { interval: Some(interval.into()), ..spec("tcp") };
            assert_eq!(wrong(spec), CheckError::Interval(interval.into()));
        }
        for count in [0, 101] {
            assert_eq!(wrong(CheckSpec { rise: Some(count), ..spec("tcp") }), CheckError::Count);
            assert_eq!(wrong(CheckSpec { fall: Some(count), ..spec("tcp") }), CheckError::Count);
        }
    }

    #[test]
    fn a_reason_is_short_and_only_shows() {
        let long =
            Finding { passes: Some(false), why: "é\u{202e}".repeat(200), ..Finding::default() }.checked();
        assert!(long.why.len() <= LONGEST_REASON && !long.why.contains('\u{202e}'), "{long:?}");
    }
}
