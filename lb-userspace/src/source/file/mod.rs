//! The *file* source: a TOML description of the cluster, read again whenever it changes.
//!
//! ```toml
//! [[node]]
//! name = "node1"
//! addresses = ["192.0.2.1"]
//!
//! [[service]]
//! name = "web"
//! ports = ["80:8080"]
//!
//! [[service.task]]
//! name = "web.1"
//! node = "node1"
//! addresses = ["172.18.0.3"]
//! ```

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod parse;
mod pieces;
mod safe;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use notify::{EventKind, RecursiveMode, Watcher, event::ModifyKind};
use parse::Wrong;
use pieces::Pieces;
pub use safe::ReadError;
use tokio::sync::{Notify, mpsc, watch};

use super::Update;
use crate::{cluster::ClusterState, tunnel_key::KeyError};

/// Why a cluster file was refused.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be read.
    #[error("read cluster file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// It does not describe a cluster.
    #[error("{path}:{line}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// Its folder is not there.
    #[error("cluster file {path}: there is no folder {folder}")]
    Folder {
        /// The file.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// Its folder cannot be watched.
    #[error("watch cluster file {path}: {source}")]
    Watch {
        /// The file.
        path: PathBuf,
        /// The watcher's words.
        source: notify::Error,
    },
}

/// Reads a cluster file.
///
/// # Errors
/// The file cannot be read, is not TOML, or contradicts itself; the line is named.
pub fn read(path: &Path) -> Result<ClusterState, FileError> {
    Reader::new(path).read()
}

/// Reads a file again and again; what has not changed in it is neither parsed nor checked again.
struct Reader {
    path: PathBuf,
    /// Where the tunnel's key was last time, if there was to be one.
    key_file: Option<PathBuf>,
    pieces: Pieces,
}

impl Reader {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), key_file: None, pieces: Pieces::default() }
    }

    fn read(&mut self) -> Result<ClusterState, FileError> {
        let path = self.path.clone();
        let text = safe::read(&self.path).map_err(|source| FileError::Read { path: path.clone(), source })?;
        let line = |at: usize| {
            1 + text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
        };
        let wrong = |line, reason| FileError::Invalid { path: path.clone(), line, reason };
        let invalid = |Wrong { at, reason }: Wrong| wrong(line(at), reason);
        let in_pieces = self.pieces.read(&text);
        let (state, key_file) = match &in_pieces {
            Some(_) => (None, self.pieces.key_file()),
            None => {
                let raw = parse::raw(&text).map_err(invalid)?;
                let key_file = parse::key_file(&raw).map(|(at, path)| (at, path.to_owned()));
                (Some(parse::cluster(&raw).map_err(invalid)?), key_file)
            }
        };
        let key_file = key_file.map(|(at, path)| (line(at), path));
        if in_pieces.is_some() {
            self.pieces.keep(text);
        }
        let mut state = in_pieces.or(state).unwrap_or_default();
        // Beside the cluster file, unless it says otherwise.
        let folder = path.parent().unwrap_or(Path::new(""));
        self.key_file = key_file.as_ref().map(|(_, path)| folder.join(path));
        if let (Some((line, _)), Some(file)) = (key_file, &self.key_file) {
            let wrong = |reason| wrong(line, format!("the key file {}: {reason}", file.display()));
            let text = safe::read_secret(file).map_err(|error| wrong(error.to_string()))?;
            state.shared_key = Some(text.parse().map_err(|error: KeyError| wrong(error.to_string()))?);
        }
        Ok(state)
    }

    /// What tells the files from what they were.
    fn stamp(&self) -> Option<(Stamp, Option<Stamp>)> {
        Some((Stamp::of(&self.path)?, self.key_file.as_deref().and_then(Stamp::of)))
    }
}

/// Time for a burst of changes (an editor's, a deployment's) to end before the file is read.
const SETTLE: Duration = Duration::from_millis(50);

/// The file is looked at after this time in any case.
const LOOK: Duration = Duration::from_secs(2);

/// Follows a cluster file: sends it once, and again whenever its content changes, by writing or by renaming
/// another over it. What is renamed is whole, and read at once.
///
/// # Errors
/// The folder cannot be watched. A file that is missing or invalid is an [`Update::Failed`], not an error.
pub fn watch(
    path: &Path,
    updates: mpsc::Sender<Update>,
    mut reload: watch::Receiver<u64>,
) -> Result<(), FileError> {
    let error = |source| FileError::Watch { path: path.to_owned(), source };
    let (wake, mut woken) = mpsc::channel::<()>(1);
    let renamed = Arc::new(Notify::new());
    let tell = renamed.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        match event.map(|event| event.kind) {
            // Reading the file is an event too, and no change.
            Ok(EventKind::Access(_)) => {}
            Ok(EventKind::Modify(ModifyKind::Name(_))) => tell.notify_one(),
            // A full channel means that a reading is due already.
            _ => drop(wake.try_send(())),
        }
    })
    .map_err(error)?;
    // The folder, not the file: a rename puts another file under the name.
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(FileError::Folder { path: path.to_owned(), folder: folder.to_owned() });
    }
    watcher.watch(folder, RecursiveMode::NonRecursive).map_err(error)?;
    let mut reader = Reader::new(path);
    tokio::spawn(async move {
        let _watcher = watcher;
        let mut last: Option<Result<ClusterState, String>> = None;
        let mut seen: Option<(Stamp, Option<Stamp>)> = None;
        let mut warned = false;
        loop {
            let stamp = reader.stamp();
            if stamp.is_none() || stamp != seen {
                // One that was written just now may be written again without looking different.
                let settled = |(file, key): &(Stamp, Option<Stamp>)| {
                    file.is_settled() && key.as_ref().is_none_or(Stamp::is_settled)
                };
                seen = stamp.filter(settled);
                let now = reader.read().map_err(|error| error.to_string());
                // The key file may be another one now, which was not looked at.
                seen = seen.filter(|seen| reader.stamp() == Some(*seen));
                if !warned && now.as_ref().is_ok_and(is_open) {
                    warned = true;
                    log::warn!(
                        "{}: the tunnel between the nodes has no key: who can send packets from a node's address reaches tasks \
                         past every filter; `lb-userspace keygen FILE` makes one for key-file = \"FILE\" in [tunnel]",
                        reader.path.display()
                    );
                }
                if last.as_ref() != Some(&now) {
                    let update = match &now {
                        Ok(state) => Update::State(state.clone()),
                        Err(reason) => Update::Failed(reason.clone()),
                    };
                    last = Some(now);
                    if updates.send(update).await.is_err() {
                        return;
                    }
                }
            }
            // What the folder does not tell (a link's target elsewhere, a file system without events) is seen by
            // looking.
            tokio::select! {
                biased;
                () = renamed.notified() => continue,
                // Whatever it looks like.
                Ok(()) = reload.changed() => {
                    seen = None;
                    continue;
                }
                () = tokio::time::sleep(LOOK) => {}
                woken = woken.recv() => if woken.is_none() {
                    return;
                },
            }
            tokio::select! {
                () = renamed.notified() => {}
                () = tokio::time::sleep(SETTLE) => {}
            }
        }
    });
    Ok(())
}

/// Whether nodes send each other packets that anybody could have sent.
fn is_open(state: &ClusterState) -> bool {
    state.shared_key.is_none() && state.nodes.iter().filter(|node| node.agent).count() > 1
}

/// What tells a file from what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    place: (u64, u64),
    size: u64,
    modified: SystemTime,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let file = fs::metadata(path).ok()?;
        Some(Self {
            place: (file.dev(), file.ino()),
            size: file.size(),
            modified: file.modified().ok()?,
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }

    /// Whether a later change would show: the clock of files is coarse.
    fn is_settled(&self) -> bool {
        self.modified.elapsed().is_ok_and(|age| age > Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::cluster::{
        Access, Affinity, Idle, Port, Prefer, Protocol, Return, Scheduler, TaskState, Tunnel, Via,
    };

    const GOOD: &str = r#"
[[node]]
name = "node1"
addresses = ["192.0.2.1", "2001:db8::1"]

[[service]]
name = "web"
ports = ["80:8080", "53:5353/udp"]

[[service.task]]
name = "web.1"
node = "node1"
addresses = ["172.18.0.3"]
state = "draining"
weight = 3
"#;

    fn parse(text: &str) -> Result<ClusterState, Wrong> {
        parse::raw(text).and_then(|raw| parse::cluster(&raw))
    }

    /// The folder of a cluster file with a key file, which has this content and mode.
    fn keyed(key: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (file, key_file) = (folder.path().join("cluster.toml"), folder.path().join("tunnel.key"));
        fs::write(&file, format!("[tunnel]\nport = 6081\nkey-file = \"tunnel.key\"\n{GOOD}")).unwrap();
        fs::write(&key_file, key).unwrap();
        fs::set_permissions(&key_file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        (folder, file)
    }

    #[test]
    fn a_key_file_is_read_where_it_stands_and_is_nobody_elses() {
        let key = crate::tunnel_key::SharedKey::generate().unwrap();
        let (folder, file) = keyed(&format!("{key}\n"), 0o600);
        let state = read(&file).unwrap();
        assert_eq!(state.shared_key, key.parse().ok());
        assert!(parse(GOOD).is_ok_and(|state| state.shared_key.is_none() && !is_open(&state)));
        // Whether its parts can be told from each other or not.
        let whole = fs::read_to_string(&file).unwrap().replace("\"web.1\"", "\"\"\"web.1\"\"\"");
        fs::write(&file, whole).unwrap();
        assert_eq!(read(&file).unwrap().shared_key, key.parse().ok());
        fs::remove_file(folder.path().join("tunnel.key")).unwrap();
        for (key, mode, part) in [
            ("", 0o600, "it is no key: one is 64 hexadecimal digits"),
            (key.as_str(), 0o640, "others than its owner may read or write it"),
        ] {
            let (_folder, file) = keyed(key, mode);
            let error = read(&file).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(".toml:3: the key file /"), "{error}");
        }
        let error = read(&file).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[tokio::test]
    async fn a_key_that_changes_is_noticed() {
        let keys = [(); 2].map(|()| crate::tunnel_key::SharedKey::generate().unwrap());
        let (folder, file) = keyed(&keys[0], 0o600);
        let (sender, mut updates) = mpsc::channel(4);
        let (_reload, reloads) = watch::channel(0);
        watch(&file, sender, reloads).unwrap();
        for key in &keys {
            fs::write(folder.path().join("tunnel.key"), key).unwrap();
            loop {
                let update = tokio::time::timeout(Duration::from_secs(20), updates.recv()).await;
                match update.expect("a word within twenty seconds").unwrap() {
                    Update::State(state) if state.shared_key == key.parse().ok() => break,
                    Update::State(_) | Update::Failed(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn fails(text: &str, line: usize, part: &str) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(error.contains(&format!(":{line}: ")), "{error}: not line {line}");
    }

    #[test]
    fn a_cluster_reads_as_written() {
        let state = parse(GOOD).ok().unwrap();
        assert_eq!(state.nodes[0].addresses.len(), 2);
        let service = &state.services[0];
        assert_eq!(service.ports[1], Port { protocol: Protocol::Udp, published: 53, target: 5353 });
        assert_eq!((service.tasks[0].state, service.tasks[0].weight), (TaskState::Draining, 3));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        fails("[[node]\n", 1, "");
        fails(&GOOD.replace("node = \"node1\"", "node = \"node2\""), 12, "no [[node]] named \"node2\"");
        fails(&GOOD.replace("53:5353/udp", "53"), 8, "is not a port");
        fails(&GOOD.replace("53:5353/udp", "80:81"), 8, "already published by \"web\"");
        fails(&GOOD.replace("172.18.0.3", "172.18.0.300"), 13, "");
        fails(&GOOD.replace("weight = 3", "weight = 0"), 15, "1 to 100");
        fails(&GOOD.replace("draining", "sleeping"), 14, "sleeping");
        fails(&GOOD.replace("weight", "wait"), 15, "wait");
        fails(&format!("{GOOD}\n[[service]]\nname = \"web\"\nports = []\n"), 18, "already a service");
        fails(&GOOD.replace("[\"172.18.0.3\"]", "[]"), 13, "needs an address");
        fails(
            &GOOD.replace("\"172.18.0.3\"", "\"10.0.0.1\", \"10.0.0.2\""),
            13,
            "one address of each family",
        );
    }

    #[test]
    fn the_tunnel_reads_as_written() {
        let text = GOOD
            .replace(
                "[[service]]",
                "agent = false\n\n[tunnel]\nport = 6082\nreturn = \"direct\"\n\n[[service]]",
            )
            .replace("state =", "via = \"routed\"\noverlay = \"10.0.0.3\"\nstate =")
            .replace("ports =", "return = \"tunnel\"\nscheduler = \"maglev\"\nports =");
        let state = parse(&text).ok().unwrap();
        assert_eq!(state.tunnel, Tunnel { port: 6082, returns: Return::Direct });
        assert_eq!(state.services[0].returns, Some(Return::Tunnel));
        assert_eq!(state.services[0].scheduler, Scheduler::Maglev);
        assert!(!state.nodes[0].agent);
        let task = &state.services[0].tasks[0];
        assert_eq!((task.via, task.cluster_address()), (Via::Routed, "10.0.0.3".parse().ok()));
        // Without a word: an agent everywhere, answers through the tunnel, a task's own address for its name.
        let state = parse(GOOD).ok().unwrap();
        assert_eq!((state.tunnel, state.services[0].returns), (Tunnel::default(), None));
        assert_eq!(state.services[0].scheduler, Scheduler::RoundRobin);
        assert_eq!(state.services[0].affinity, Affinity::None);
        let sticky = parse(&GOOD.replace("ports =", "affinity = \"client\"\nports =")).ok().unwrap();
        assert_eq!(sticky.services[0].affinity, Affinity::Client);
        let near = GOOD.replace("ports =", "prefer = \"zone\"\nports =");
        let near = parse(&near.replacen("addresses =", "zone = \"fsn1\"\naddresses =", 1)).ok().unwrap();
        assert_eq!((near.services[0].prefer, near.nodes[0].zone.as_str()), (Prefer::Zone, "fsn1"));
        assert_eq!((state.services[0].prefer, state.nodes[0].zone.as_str()), (Prefer::Any, ""));
        let long = format!("zone = \"{}\"\naddresses =", "x".repeat(33));
        fails(&GOOD.replacen("addresses =", &long, 1), 4, "the name of a zone may have 32 bytes at most");
        fails(&GOOD.replace("ports =", "prefer = \"near\"\nports ="), 8, "unknown variant `near`");
        fails(&GOOD.replace("ports =", "affinity = \"cookie\"\nports ="), 8, "unknown variant `cookie`");
        fails(&GOOD.replace("ports =", "scheduler = \"sticky\"\nports ="), 8, "unknown variant `sticky`");
        assert!(state.nodes[0].agent);
        let task = &state.services[0].tasks[0];
        assert_eq!((task.via, task.cluster_address()), (Via::Peer, "172.18.0.3".parse().ok()));
        fails(&format!("{GOOD}\n[tunnel]\nport = 0\n"), 18, "from 1 to 65535");
        fails(&format!("{GOOD}\n[tunnel]\nport = 53\n"), 18, "publishes port 53/udp, which is the tunnel's");
        fails(&GOOD.replace("53:5353/udp", "6081:5353/udp"), 1, "publishes port 6081/udp");
        fails(&format!("{GOOD}\n[tunnel]\nreturn = \"back\"\n"), 18, "back");
    }

    #[test]
    fn who_may_connect_reads_as_written() {
        let with = |lists: &str| GOOD.replace("ports =", &format!("{lists}\nports ="));
        let access = |lists: &str| parse(&with(lists)).ok().unwrap().services[0].access.clone();
        let range = |text: &str| text.parse().unwrap();
        let lists = access("allow = [\"10.1.2.3/8\", \"2001:db8::/32\"]\ndeny = [\"10.0.0.5\"]");
        let allow = vec![range("10.0.0.0/8"), range("2001:db8::/32")];
        assert_eq!(lists, Access { allow: Some(allow), deny: vec![range("10.0.0.5/32")] });
        assert_eq!(access("allow = []"), Access::closed());
        assert!(parse(GOOD).ok().unwrap().services[0].access.is_open());
        fails(
            &with("deny = [\"10.0.0.0/8\", \"office\"]"),
            8,
            "\"office\" is neither an address nor a range",
        );
    }

    #[test]
    fn whom_no_service_takes_stands_before_all() {
        let range = |text: &str| text.parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.toml");
        let mut reader = Reader::new(&path);
        for (list, denied) in [
            (
                "deny = [\"192.0.2.66\", \"2001:db8::1/32\"]\n",
                vec![range("192.0.2.66/32"), range("2001:db8::/32")],
            ),
            ("", vec![]),
        ] {
            let text = format!("{list}{GOOD}");
            assert_eq!(parse(&text).ok().unwrap().denied, denied);
            // In pieces, too.
            fs::write(&path, &text).unwrap();
            assert_eq!(reader.read().unwrap().denied, denied);
            assert_eq!(reader.read().unwrap().denied, denied);
        }
        fails(&format!("deny = [\"office\"]\n{GOOD}"), 1, "\"office\" is neither an address nor a range");
    }

    #[test]
    fn timers_are_seconds_by_name() {
        let with = |timers: &str| {
            GOOD.replace("[[service.task]]", &format!("[service.timers]\n{timers}\n[[service.task]]"))
        };
        let state = parse(&with("established = 900\none_way = 5")).ok().unwrap();
        assert_eq!(state.services[0].timers.seconds, [30, 900, 120, 0, 5, 300, 0, 0]);
        let wrong = |timers: &str| parse(&with(timers)).err().map(|wrong| wrong.reason).unwrap_or_default();
        assert!(wrong("idle = 9").contains("there is no timer"), "{}", wrong("idle = 9"));
        for seconds in ["2", "1000001"] {
            assert!(wrong(&format!("closing = {seconds}")).contains("from 3 to 1000000"));
        }
    }

    #[test]
    fn how_tasks_are_asked_is_said_by_a_service() {
        let with = |health: &str| GOOD.replace("ports =", &format!("health = {health}\nports ="));
        let health = |text: &str| parse(text).ok().map(|state| state.services[0].health.clone());
        assert_eq!(health(GOOD), Some(None));
        assert_eq!(health(&with("{ kind = \"docker\" }")), Some(None));
        let all = "{ kind = \"http\", port = 9000, path = \"/up\", interval = \"1s\", rise = 1, fall = 2 }";
        let said = health(&with(all)).flatten().map(|check| check.to_string());
        assert_eq!(said.as_deref(), Some("http :9000/up every 1000 ms, rise 1, fall 2"));
        let gentle = |time: &str| GOOD.replace("ports =", &format!("slow-start = \"{time}\"\nports ="));
        let time = |text: &str| parse(text).ok().map(|state| state.services[0].slow_start.as_secs());
        assert_eq!((time(GOOD), time(&gentle("2m"))), (Some(0), Some(120)));
        fails(&gentle("2h"), 8, "\"2h\" is no time from 1s to 1h");
        let limited = |line: &str| GOOD.replace("ports =", &format!("{line}\nports ="));
        let limits = |text: &str| {
            parse(text).ok().map(|state| (state.services[0].task_max_connections, state.services[0].eject))
        };
        assert_eq!(limits(GOOD), Some((0, 0)));
        assert_eq!(limits(&limited("task-max-connections = 9\neject = 4")), Some((9, 4)));
        assert_eq!(limits(&limited("scheduler = \"least-connections\"")), Some((0, 3)));
        assert_eq!(limits(&limited("scheduler = \"least-connections\"\neject = \"off\"")), Some((0, 0)));
        fails(&limited("task-max-connections = 0"), 8, "a task may have 1 to 1000000 connections");
        fails(&limited("eject = \"soon\""), 8, "\"soon\" is neither off nor a number from 1 to 100");
        fails(&limited("eject = 101"), 8, "\"101\" is neither off nor a number from 1 to 100");
        fails(&with("{ kind = \"icmp\" }"), 8, "health \"icmp\" is none of docker, tcp, http");
        fails(&with("{ kind = \"tcp\", path = \"/\" }"), 8, "a path is of use to http alone");
        fails(&with("{ kind = \"tcp\", timeout = 9 }"), 8, "unknown field `timeout`");
    }

    #[test]
    fn idle_connections_are_forgotten_unless_they_are_to_be_reset() {
        let with = |idle: &str| GOOD.replace("ports =", &format!("idle = \"{idle}\"\nports ="));
        let idle = |text: &str| parse(text).ok().map(|state| state.services[0].idle);
        assert_eq!(idle(GOOD), Some(Idle::Forget));
        assert_eq!(idle(&with("forget")), Some(Idle::Forget));
        assert_eq!(idle(&with("reset")), Some(Idle::Reset));
        fails(&with("drop"), 8, "drop");
    }

    #[test]
    fn an_empty_file_is_an_empty_cluster() {
        assert_eq!(parse("").ok().unwrap(), ClusterState::default());
    }

    #[tokio::test]
    async fn changes_are_followed_by_writing_and_by_renaming() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.toml");
        fs::write(&path, GOOD).unwrap();
        let (sender, mut updates) = mpsc::channel(8);
        watch(&path, sender, watch::channel(0).1).unwrap();
        let next = async |updates: &mut mpsc::Receiver<Update>| {
            tokio::time::timeout(Duration::from_secs(10), updates.recv()).await.unwrap().unwrap()
        };
        assert!(matches!(next(&mut updates).await, Update::State(state) if state.services.len() == 1));
        fs::write(&path, "[[service]]\nname = 1\n").unwrap();
        assert!(matches!(next(&mut updates).await, Update::Failed(reason) if reason.contains(":2: ")));
        let other = folder.path().join("new");
        fs::write(&other, "").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(matches!(next(&mut updates).await, Update::State(state) if state.services.is_empty()));
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().join("real.toml");
        fs::write(&target, "").unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        fs::write(&target, GOOD).unwrap();
        while !matches!(next(&mut updates).await, Update::State(state) if state.services.len() == 1) {}
        fs::remove_file(&path).unwrap();
        assert!(
            matches!(next(&mut updates).await, Update::Failed(reason) if reason.contains("read cluster file"))
        );
    }
}
