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

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lb_common::flow::Timers;
use notify::{RecursiveMode, Watcher};
use serde::Deserialize;
use tokio::sync::mpsc;
use toml::Spanned;

use super::Update;
use crate::cluster::{ClusterState, Node, Port, Return, Service, Task, TaskState, Tunnel, Via, set_timer};

/// Why a cluster file was refused.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be read.
    #[error("read cluster file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's words.
        source: std::io::Error,
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
    /// Its folder cannot be watched.
    #[error("watch cluster file {path}: {source}")]
    Watch {
        /// The file.
        path: PathBuf,
        /// The watcher's words.
        source: notify::Error,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    #[serde(default)]
    node: Vec<Spanned<RawNode>>,
    #[serde(default)]
    service: Vec<Spanned<RawService>>,
    #[serde(default)]
    tunnel: RawTunnel,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTunnel {
    port: Option<Spanned<u16>>,
    #[serde(default, rename = "return")]
    returns: Return,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: Spanned<String>,
    addresses: Vec<IpAddr>,
    #[serde(default = "yes")]
    agent: bool,
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    name: Spanned<String>,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    ports: Vec<Spanned<String>>,
    #[serde(rename = "return")]
    returns: Option<Return>,
    #[serde(default)]
    timers: BTreeMap<Spanned<String>, u32>,
    #[serde(default)]
    task: Vec<Spanned<RawTask>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTask {
    name: Spanned<String>,
    node: Spanned<String>,
    addresses: Spanned<Vec<IpAddr>>,
    overlay: Option<IpAddr>,
    #[serde(default)]
    state: TaskState,
    weight: Option<Spanned<u16>>,
    #[serde(default)]
    via: Via,
}

/// Reads a cluster file.
///
/// # Errors
/// The file cannot be read, is not TOML, or contradicts itself; the line is named.
pub fn read(path: &Path) -> Result<ClusterState, FileError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    parse(&text).map_err(|Wrong { at, reason }| FileError::Invalid {
        path: path.to_owned(),
        line: 1 + text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count(),
        reason,
    })
}

/// A mistake and where it stands, in bytes from the start.
struct Wrong {
    at: usize,
    reason: String,
}

impl Wrong {
    fn at<T>(spanned: &Spanned<T>, reason: impl Into<String>) -> Self {
        Self { at: spanned.span().start, reason: reason.into() }
    }
}

fn parse(text: &str) -> Result<ClusterState, Wrong> {
    let raw: RawCluster = toml::from_str(text).map_err(|error| Wrong {
        at: error.span().map_or(0, |span| span.start),
        reason: error.message().to_owned(),
    })?;
    let mut names = HashMap::new();
    for node in &raw.node {
        unique(&mut names, ("node", &node.get_ref().name))?;
    }
    let nodes: Vec<Node> = raw
        .node
        .iter()
        .map(|node| Node {
            name: node.get_ref().name.get_ref().clone(),
            addresses: node.get_ref().addresses.clone(),
            agent: node.get_ref().agent,
        })
        .collect();
    let mut published = HashMap::new();
    let mut services = Vec::new();
    for service in &raw.service {
        let service = service.get_ref();
        unique(&mut names, ("service", &service.name))?;
        let ports = ports(service, &mut published)?;
        let tasks = service
            .task
            .iter()
            .map(|raw| {
                unique(&mut names, ("task", &raw.get_ref().name))?;
                task(raw.get_ref(), &nodes)
            })
            .collect::<Result<_, _>>()?;
        let name = service.name.get_ref().clone();
        let (addresses, returns) = (service.addresses.clone(), service.returns);
        let mut timers = Timers::DEFAULT;
        for (name, seconds) in &service.timers {
            set_timer(&mut timers, name.get_ref(), *seconds).map_err(|e| Wrong::at(name, e.to_string()))?;
        }
        services.push(Arc::new(Service { name, addresses, ports, tasks, returns, timers, left: String::new() }));
    }
    let tunnel = tunnel(&raw.tunnel, &published)?;
    Ok(ClusterState { nodes, services, tunnel, ..ClusterState::default() })
}

fn tunnel(raw: &RawTunnel, published: &HashMap<(u8, u16, Option<IpAddr>), &str>) -> Result<Tunnel, Wrong> {
    let default = Tunnel::default().port;
    let port = raw.port.as_ref().map_or(default, |port| *port.get_ref());
    let at = raw.port.as_ref().map_or(0, |port| port.span().start);
    if port == 0 {
        return Err(Wrong { at, reason: "the tunnel needs a port from 1 to 65535".into() });
    }
    let udp = lb_common::net::UDP;
    if let Some((_, owner)) = published.iter().find(|((protocol, p, _), _)| (*protocol, *p) == (udp, port)) {
        let reason = format!(
            "{owner:?} publishes port {port}/udp, which is the tunnel's; choose another by port = … in [tunnel]"
        );
        return Err(Wrong { at, reason });
    }
    Ok(Tunnel { port, returns: raw.returns })
}

fn unique<'a>(
    names: &mut HashMap<(&'static str, &'a str), usize>,
    (kind, name): (&'static str, &'a Spanned<String>),
) -> Result<(), Wrong> {
    if name.get_ref().is_empty() {
        return Err(Wrong::at(name, format!("a {kind} needs a name")));
    }
    if name.get_ref().len() > 128 {
        return Err(Wrong::at(name, format!("the name of a {kind} may have 128 bytes at most")));
    }
    match names.insert((kind, name.get_ref()), name.span().start) {
        None => Ok(()),
        Some(_) => Err(Wrong::at(name, format!("there is already a {kind} named {:?}", name.get_ref()))),
    }
}

fn ports<'a>(
    service: &'a RawService,
    published: &mut HashMap<(u8, u16, Option<IpAddr>), &'a str>,
) -> Result<Vec<Port>, Wrong> {
    let mut ports = Vec::new();
    for text in &service.ports {
        let port: Port = text.get_ref().parse().map_err(|error| Wrong::at(text, format!("{error}")))?;
        let places: Vec<Option<IpAddr>> = match service.addresses.as_slice() {
            [] => vec![None],
            addresses => addresses.iter().copied().map(Some).collect(),
        };
        for place in places {
            let key = (port.protocol.number(), port.published, place);
            if let Some(owner) = published.insert(key, service.name.get_ref()) {
                let what =
                    format!("port {}/{} is already published by {owner:?}", port.published, port.protocol);
                return Err(Wrong::at(text, what));
            }
        }
        ports.push(port);
    }
    Ok(ports)
}

fn task(raw: &RawTask, nodes: &[Node]) -> Result<Task, Wrong> {
    if !nodes.iter().any(|node| node.name == *raw.node.get_ref()) {
        return Err(Wrong::at(&raw.node, format!("there is no [[node]] named {:?}", raw.node.get_ref())));
    }
    let addresses = raw.addresses.get_ref();
    if addresses.is_empty() {
        return Err(Wrong::at(&raw.addresses, "a task needs an address"));
    }
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        if addresses.iter().filter(|address| family(address)).count() > 1 {
            return Err(Wrong::at(&raw.addresses, "a task has at most one address of each family"));
        }
    }
    let weight = match &raw.weight {
        None => 1,
        Some(weight) if (1..=100).contains(weight.get_ref()) => *weight.get_ref(),
        Some(weight) => return Err(Wrong::at(weight, "a weight is a number from 1 to 100")),
    };
    Ok(Task {
        name: raw.name.get_ref().clone(),
        node: raw.node.get_ref().clone(),
        addresses: addresses.clone(),
        overlay: raw.overlay,
        state: raw.state,
        weight,
        via: raw.via,
    })
}

/// Time for a burst of changes (an editor's, a deployment's) to end before the file is read.
const SETTLE: Duration = Duration::from_millis(50);

/// The file is looked at after this time in any case.
const LOOK: Duration = Duration::from_secs(2);

/// Follows a cluster file: sends it once, and again whenever its content changes, by writing or by renaming
/// another over it.
///
/// # Errors
/// The folder cannot be watched. A file that is missing or invalid is an [`Update::Failed`], not an error.
pub fn watch(path: &Path, updates: mpsc::Sender<Update>) -> Result<(), FileError> {
    let error = |source| FileError::Watch { path: path.to_owned(), source };
    let (wake, mut woken) = mpsc::channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the file is an event too, and no change.
        if event.is_ok_and(|event| event.kind.is_access()) {
            return;
        }
        // A full channel means that a reading is due already.
        let _ = wake.try_send(());
    })
    .map_err(error)?;
    // The folder, not the file: a rename puts another file under the name.
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    watcher.watch(folder, RecursiveMode::NonRecursive).map_err(error)?;
    let path = path.to_owned();
    tokio::spawn(async move {
        let _watcher = watcher;
        let mut last: Option<Result<ClusterState, String>> = None;
        loop {
            let now = read(&path).map_err(|error| error.to_string());
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
            // What the folder does not tell (a link's target elsewhere, a file system without events) is seen by
            // looking.
            if let Ok(None) = tokio::time::timeout(LOOK, woken.recv()).await {
                return;
            }
            tokio::time::sleep(SETTLE).await;
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::cluster::Protocol;

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
            .replace("ports =", "return = \"tunnel\"\nports =");
        let state = parse(&text).ok().unwrap();
        assert_eq!(state.tunnel, Tunnel { port: 6082, returns: Return::Direct });
        assert_eq!(state.services[0].returns, Some(Return::Tunnel));
        assert!(!state.nodes[0].agent);
        let task = &state.services[0].tasks[0];
        assert_eq!((task.via, task.cluster_address()), (Via::Routed, "10.0.0.3".parse().ok()));
        // Without a word: an agent everywhere, answers through the tunnel, a task's own address for its name.
        let state = parse(GOOD).ok().unwrap();
        assert_eq!((state.tunnel, state.services[0].returns), (Tunnel::default(), None));
        assert!(state.nodes[0].agent);
        let task = &state.services[0].tasks[0];
        assert_eq!((task.via, task.cluster_address()), (Via::Peer, "172.18.0.3".parse().ok()));
        fails(&format!("{GOOD}\n[tunnel]\nport = 0\n"), 18, "from 1 to 65535");
        fails(&format!("{GOOD}\n[tunnel]\nport = 53\n"), 18, "publishes port 53/udp, which is the tunnel's");
        fails(&GOOD.replace("53:5353/udp", "6081:5353/udp"), 1, "publishes port 6081/udp");
        fails(&format!("{GOOD}\n[tunnel]\nreturn = \"back\"\n"), 18, "back");
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
    fn an_empty_file_is_an_empty_cluster() {
        assert_eq!(parse("").ok().unwrap(), ClusterState::default());
    }

    #[tokio::test]
    async fn changes_are_followed_by_writing_and_by_renaming() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.toml");
        std::fs::write(&path, GOOD).unwrap();
        let (sender, mut updates) = mpsc::channel(8);
        watch(&path, sender).unwrap();
        let next = async |updates: &mut mpsc::Receiver<Update>| {
            tokio::time::timeout(Duration::from_secs(10), updates.recv()).await.unwrap().unwrap()
        };
        assert!(matches!(next(&mut updates).await, Update::State(state) if state.services.len() == 1));
        std::fs::write(&path, "[[service]]\nname = 1\n").unwrap();
        assert!(matches!(next(&mut updates).await, Update::Failed(reason) if reason.contains(":2: ")));
        let other = folder.path().join("new");
        std::fs::write(&other, "").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(matches!(next(&mut updates).await, Update::State(state) if state.services.is_empty()));
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().join("real.toml");
        std::fs::write(&target, "").unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        std::fs::write(&target, GOOD).unwrap();
        while !matches!(next(&mut updates).await, Update::State(state) if state.services.len() == 1) {}
        std::fs::remove_file(&path).unwrap();
        assert!(
            matches!(next(&mut updates).await, Update::Failed(reason) if reason.contains("read cluster file"))
        );
    }
}
