//! Health checks of our own, for images without one: the agent of a task's node asks the task itself, whether it takes connections.
//!
//! [`runner`] asks; what it finds comes to other nodes as facts, and [`judge`] says what follows for new connections.

pub mod runner;

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use hyper::http::uri::PathAndQuery;
use serde::{Deserialize, Serialize};

use crate::{
    cli::Time,
    cluster::{Port, Protocol, Task, TaskState},
    text,
};

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
    /// The check of a service with these ports; none where Docker's word is enough.
    ///
    /// # Errors
    /// It is described wrongly.
    pub fn check(&self, ports: &[Port]) -> Result<Option<Check>, CheckError> {
        let kind = KINDS.iter().find(|(name, _)| *name == self.kind).map(|(_, kind)| *kind);
        let Some(kind) = kind.ok_or_else(|| CheckError::Kind(self.kind.clone()))? else {
            let nothing = Self { kind: self.kind.clone(), ..Self::default() };
            return if *self == nothing { Ok(None) } else { Err(CheckError::NothingAsked) };
        };
        let first = || ports.iter().find(|port| port.protocol == Protocol::Tcp).map(|port| port.target);
        let port = self.port.or_else(first).ok_or(CheckError::NoPort)?;
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
}

impl Finding {
    /// What was wrong, of a task at this address.
    fn why(at: SocketAddr, what: &str) -> String {
        text::name(&format!("{at}: {what}"), LONGEST_REASON)
    }

    /// As it comes from another node, whose word it is.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.why = text::name(&self.why, LONGEST_REASON);
        self
    }
}

/// What becomes of a task by what was found of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// What it is to do.
    pub state: TaskState,
    /// Why it should take new connections and does not, or does so all the same.
    pub problem: Option<String>,
}

/// What the tasks of a service are to do, one for each: of those that run, one that fails drains, and one that has never passed has
/// not started. Where nobody would be left of those that are `usable`, all of them run as if there were no check: a client is
/// refused by nobody who could serve him.
pub fn judge(tasks: &[Task], usable: impl Fn(&Task) -> bool) -> Vec<Judged> {
    let by_itself = |task: &Task| {
        let finding = task.finding.as_ref().filter(|_| task.state == TaskState::Running);
        let why = |finding: &Finding| {
            if finding.why.is_empty() { String::new() } else { format!(": {}", finding.why) }
        };
        let (state, problem) = match finding {
            Some(finding) if finding.passes == Some(false) => {
                (TaskState::Draining, format!("fails its health check{}", why(finding)))
            }
            Some(finding) if finding.passes.is_none() => {
                (TaskState::Starting, format!("has not passed its health check yet{}", why(finding)))
            }
            _ => return Judged { state: task.state, problem: None },
        };
        Judged { state, problem: Some(problem) }
    };
    let mut judged: Vec<Judged> = tasks.iter().map(by_itself).collect();
    let all = || tasks.iter().zip(&judged);
    let is_left = |(task, judged): (&Task, &Judged)| judged.state == TaskState::Running && usable(task);
    if all().any(|(_, judged)| judged.problem.is_some()) && !all().any(is_left) {
        for judged in &mut judged {
            if let Some(problem) = &mut judged.problem {
                judged.state = TaskState::Running;
                *problem += "; offered all the same, for no task passes";
            }
        }
    }
    judged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Via;

    fn port(text: &str) -> Port {
        text.parse().unwrap()
    }

    fn spec(kind: &str) -> CheckSpec {
        CheckSpec { kind: kind.into(), ..CheckSpec::default() }
    }

    #[test]
    fn what_is_not_said_is_by_default() {
        let ports = [port("53:5353/udp"), port("80:8080")];
        assert_eq!(spec("docker").check(&ports), Ok(None));
        let tcp = spec("tcp").check(&ports).unwrap().unwrap();
        assert_eq!(tcp.to_string(), "tcp :8080 every 2000 ms, rise 2, fall 3");
        let all = CheckSpec {
            port: Some(9000),
            path: Some("/healthz?full=1".into()),
            interval: Some("500ms".into()),
            rise: Some(1),
            fall: Some(5),
            ..spec("http")
        };
        let all = all.check(&[]).unwrap().unwrap();
        assert_eq!(all.to_string(), "http :9000/healthz?full=1 every 500 ms, rise 1, fall 5");
        assert_eq!(spec("http").check(&ports).unwrap().unwrap().path, "/");
    }

    #[test]
    fn nonsense_is_refused() {
        let ports = [port("80:8080")];
        let wrong = |spec: CheckSpec| spec.check(&ports).unwrap_err();
        assert_eq!(wrong(spec("icmp")), CheckError::Kind("icmp".into()));
        assert_eq!(wrong(spec("")), CheckError::Kind(String::new()));
        assert_eq!(spec("tcp").check(&[port("53:53/udp")]), Err(CheckError::NoPort));
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

    fn tasks(states: &[TaskState], findings: &[Option<Option<bool>>]) -> Vec<Task> {
        let task = |(index, (state, passes)): (usize, (&TaskState, &Option<Option<bool>>))| Task {
            name: format!("web.{index}"),
            node: "node1".into(),
            addresses: vec![],
            overlay: None,
            state: *state,
            weight: 1,
            via: Via::Peer,
            finding: passes.map(|passes| Finding { passes, why: String::new() }),
        };
        states.iter().zip(findings).enumerate().map(task).collect()
    }

    #[test]
    fn who_does_not_pass_gets_no_new_connections_unless_nobody_does() {
        use TaskState::{Draining, Running, Starting};
        let (passes, fails, new, unknown) = (Some(Some(true)), Some(Some(false)), Some(None), None);
        for (states, findings, wanted) in [
            (vec![Running; 3], vec![passes, fails, new], vec![Running, Draining, Starting]),
            // Another node's agent tells nothing of its tasks: it may be older.
            (vec![Running; 2], vec![unknown, fails], vec![Running, Draining]),
            (vec![Running; 2], vec![new, fails], vec![Running, Running]),
            (vec![Running], vec![new], vec![Running]),
            // Those that Docker is ending, or starting, are not called back.
            (vec![Draining, Running], vec![passes, new], vec![Draining, Running]),
            (vec![Starting, Running], vec![passes, fails], vec![Starting, Running]),
            (vec![Draining, Starting], vec![fails, new], vec![Draining, Starting]),
            (vec![], vec![], vec![]),
        ] {
            let judged = judge(&tasks(&states, &findings), |_| true);
            let found: Vec<TaskState> = judged.into_iter().map(|judged| judged.state).collect();
            assert_eq!(found, wanted, "{states:?} {findings:?}");
        }
        // One that passes and cannot be reached serves nobody.
        let tasks = tasks(&[Running; 3], &[passes, fails, new]);
        let judged = judge(&tasks, |task| task.name != "web.0");
        assert!(judged.iter().all(|judged| judged.state == Running), "{judged:?}");
    }

    #[test]
    fn why_is_said() {
        let mut tasks = tasks(&[TaskState::Running; 2], &[Some(Some(true)), None]);
        let why = Finding::why("172.18.0.3:8080".parse().unwrap(), "Connection refused");
        tasks[1].finding = Some(Finding { passes: None, why });
        let said = "has not passed its health check yet: 172.18.0.3:8080: Connection refused";
        let problems = |usable| -> Vec<Option<String>> {
            judge(&tasks, |_| usable).into_iter().map(|judged| judged.problem).collect()
        };
        assert_eq!(problems(true), [None, Some(said.to_owned())]);
        let all_the_same = format!("{said}; offered all the same, for no task passes");
        assert_eq!(problems(false), [None, Some(all_the_same)]);
        let long = Finding { passes: Some(false), why: "é\u{202e}".repeat(200) }.checked();
        assert!(long.why.len() <= LONGEST_REASON && !long.why.contains('\u{202e}'), "{long:?}");
    }
}
