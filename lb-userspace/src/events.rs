//! What happened: each change of state once, in the log, and kept so that `events` can show the last ones from any shell,
//! with or without an agent.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    io::{self, BufRead as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::datapath;

/// So many events are kept.
pub const KEPT: usize = 1_000;

/// What kind of change it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it, and `name` is what users see")]
pub enum Kind {
    ControllerStarted,
    ControllerStopped,
    Reloaded,
    NodeSilent,
    NodeHeard,
    NodeAdded,
    NodeGone,
    SourceLost,
    SourceBack,
    SourceChanged,
    ServiceAdded,
    ServiceGone,
    ServiceWithoutTask,
    ServiceHasTask,
    ServiceProblem,
    TaskAdded,
    TaskDraining,
    TaskUnreachable,
    TaskOffered,
    TaskGone,
    TaskRefusing,
    TaskTakes,
    PortLeftToSwarm,
    ModeChanged,
    TableFilling,
    LimitHit,
    GuardOn,
    GuardOff,
    Drained,
    Undrained,
    Problem,
}

impl Kind {
    /// The name users see.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// Whether somebody should look at it.
    pub const fn is_warning(self) -> bool {
        matches!(
            self,
            Self::NodeSilent
                | Self::SourceLost
                | Self::ServiceWithoutTask
                | Self::ServiceProblem
                | Self::TaskUnreachable
                | Self::TaskRefusing
                | Self::PortLeftToSwarm
                | Self::TableFilling
                | Self::LimitHit
                | Self::GuardOn
                | Self::Problem
        )
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When: milliseconds since 1970.
    pub time: u64,
    /// Where.
    pub interface: String,
    /// What kind of change it was.
    pub kind: Kind,
    /// Of which service.
    #[serde(default)]
    pub service: Option<String>,
    /// Of which task.
    #[serde(default)]
    pub task: Option<String>,
    /// Of which node.
    #[serde(default)]
    pub node: Option<String>,
    /// In a sentence.
    pub text: String,
}

impl Event {
    /// One that happens now.
    pub fn now(interface: &str, kind: Kind, text: impl Into<String>) -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
        Self {
            time: u64::try_from(time).unwrap_or(u64::MAX),
            interface: interface.to_owned(),
            kind,
            service: None,
            task: None,
            node: None,
            text: text.into(),
        }
    }

    /// The same, of a service.
    #[must_use]
    pub fn of_service(self, name: &str) -> Self {
        Self { service: Some(name.to_owned()), ..self }
    }

    /// The same, of a task.
    #[must_use]
    pub fn of_task(self, name: &str) -> Self {
        Self { task: Some(name.to_owned()), ..self }
    }

    /// The same, of a node.
    #[must_use]
    pub fn of_node(self, name: &str) -> Self {
        Self { node: Some(name.to_owned()), ..self }
    }

    /// The moment, as people read it.
    pub fn moment(&self) -> String {
        humantime::format_rfc3339_millis(UNIX_EPOCH + std::time::Duration::from_millis(self.time)).to_string()
    }

    fn log(&self) {
        let (kind, interface) = (self.kind.name(), self.interface.as_str());
        let text = crate::text::clean(&self.text);
        let (service, task, node) = (self.service.as_deref(), self.task.as_deref(), self.node.as_deref());
        if self.kind.is_warning() {
            tracing::warn!(kind, interface, service, task, node, "{interface}: {text}");
        } else {
            tracing::info!(kind, interface, service, task, node, "{interface}: {text}");
        }
    }
}

/// Takes events: logs them, and keeps the last ones in memory and in a file.
#[derive(Debug, Default)]
pub struct Recorder {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    last: VecDeque<Event>,
    /// How many there were of each kind since the agent started.
    counts: BTreeMap<Kind, u64>,
    file: Option<Store>,
}

impl Recorder {
    /// One that goes on with the file of this network namespace; what cannot be kept there is said once, and kept in memory.
    pub fn open() -> Self {
        let mut kept = Kept::default();
        match Store::open() {
            Ok(store) => {
                kept.last = read(&store.path).unwrap_or_default().into();
                kept.file = Some(store);
            }
            Err(error) => {
                tracing::warn!("events are kept in memory alone, `lb-userspace events` shows none: {error}")
            }
        }
        Self { kept: Mutex::new(kept) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one.
    pub fn record(&self, event: Event) {
        event.log();
        let mut kept = self.kept();
        *kept.counts.entry(event.kind).or_default() += 1;
        if kept.last.len() == KEPT {
            kept.last.pop_front();
        }
        kept.last.push_back(event.clone());
        let Kept { last, file, .. } = &mut *kept;
        if let Some(error) = file.as_mut().and_then(|store| store.append(&event, last).err()) {
            tracing::debug!("keep an event: {error}");
        }
    }

    /// The last ones, the oldest first.
    pub fn last(&self, count: usize) -> Vec<Event> {
        let kept = self.kept();
        kept.last.iter().skip(kept.last.len().saturating_sub(count)).cloned().collect()
    }

    /// How many this agent has recorded, by the names of their kinds.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.kept().counts.iter().map(|(kind, count)| (kind.name(), *count)).collect()
    }
}

/// The file that events are kept in.
#[derive(Debug)]
struct Store {
    path: PathBuf,
    file: fs::File,
    lines: usize,
}

impl Store {
    fn open() -> io::Result<Self> {
        let path = path()?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        make_folder(folder).map_err(io::Error::other)?;
        let lines = fs::read_to_string(&path).map_or(0, |text| text.lines().count());
        Ok(Self { file: append_to(&path)?, path, lines })
    }

    /// Appends one; a file that has grown to twice what is kept is written anew.
    fn append(&mut self, event: &Event, last: &VecDeque<Event>) -> io::Result<()> {
        if self.lines >= 2 * KEPT {
            let new = self.path.with_extension("new");
            let mut text = Vec::new();
            for event in last {
                serde_json::to_writer(&mut text, event)?;
                text.push(b'\n');
            }
            let mut file =
                fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            fs::rename(&new, &self.path)?;
            (self.file, self.lines) = (append_to(&self.path)?, last.len());
            return Ok(());
        }
        // In one piece, so that a reader sees whole lines.
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.lines += 1;
        self.file.write_all(&line)
    }
}

fn append_to(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Where the agents of this network namespace keep what they must share with the verbs; gone with the next start of the
/// machine.
///
/// # Errors
/// The kernel does not tell the namespace.
pub fn runtime_folder() -> io::Result<PathBuf> {
    Ok(Path::new("/run/lb-userspace").join(datapath::netns_cookie()?.to_string()))
}

/// Makes that folder, root's own, if it is not there.
///
/// # Errors
/// It cannot be made.
pub fn make_folder(folder: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| {
        let step = if error.kind() == io::ErrorKind::PermissionDenied {
            "; this needs root: run it with sudo"
        } else {
            ""
        };
        anyhow::anyhow!("make {}: {error}{step}", folder.display())
    })
}

/// Where events are kept.
///
/// # Errors
/// The kernel does not tell the namespace.
pub fn path() -> io::Result<PathBuf> {
    Ok(runtime_folder()?.join("events.jsonl"))
}

/// The last events of a file, the oldest first.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> io::Result<Vec<Event>> {
    let mut last = VecDeque::new();
    for line in io::BufReader::new(fs::File::open(path)?).lines() {
        // Another version's words are left out.
        let Ok(event) = serde_json::from_str(&line?) else { continue };
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(event);
    }
    Ok(last.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize) -> Event {
        Event::now("eth1", Kind::TaskAdded, format!("number {number}")).of_task("web.1").of_service("web")
    }

    #[test]
    fn the_file_keeps_the_last_ones_and_does_not_grow_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let store = Store { file: append_to(&path).unwrap(), path: path.clone(), lines: 0 };
        let recorder = Recorder { kept: Mutex::new(Kept { file: Some(store), ..Kept::default() }) };
        for number in 0..5 * KEPT {
            recorder.record(event(number));
        }
        assert!(fs::read_to_string(&path).unwrap().lines().count() <= 2 * KEPT);
        let kept = read(&path).unwrap();
        assert_eq!((kept.len(), kept.last().map(|event| event.text.as_str())), (KEPT, Some("number 4999")));
        assert_eq!(kept, recorder.last(KEPT));
        assert_eq!(recorder.last(2).len(), 2);
        assert_eq!(recorder.counts(), BTreeMap::from([("task_added".to_owned(), 5 * KEPT as u64)]));
        // What another version wrote is no obstacle.
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"kind\": \"new\"}\n").unwrap();
        assert_eq!(read(&path).unwrap().len(), KEPT);
    }

    #[test]
    fn names_are_as_users_write_them() {
        assert_eq!(Kind::ServiceWithoutTask.name(), "service_without_task");
    }
}
