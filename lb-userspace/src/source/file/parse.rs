//! From TOML to a cluster, checked: what contradicts itself is named with its place.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use lb_common::conntrack::Timers;
use serde::Deserialize;
use toml::Spanned;

use crate::{
    check::CheckSpec,
    cluster::{
        Access, Affinity, ClientPrefix, ClusterState, Family, Idle, Node, Port, Prefer, Return, Scheduler,
        Service, Task, TaskState, Tunnel, Via, address_range, eject, ejects, set_timer, slow_start,
        task_max_connections,
    },
    text,
    translation::{embed, stand_in},
    tunnel_key::NodeKey,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCluster {
    #[serde(default)]
    pub(super) deny: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) node: Vec<Spanned<RawNode>>,
    pub(super) service: Option<Vec<Spanned<RawService>>>,
    pub(super) tunnel: Option<RawTunnel>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTunnel {
    port: Option<Spanned<u16>>,
    #[serde(default, rename = "return")]
    returns: Return,
    #[serde(rename = "key-file")]
    key_file: Option<Spanned<PathBuf>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNode {
    name: Spanned<String>,
    addresses: Vec<IpAddr>,
    #[serde(default = "yes")]
    agent: bool,
    zone: Option<Spanned<String>>,
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawService {
    name: Spanned<String>,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    ports: Vec<Spanned<String>>,
    #[serde(rename = "return")]
    returns: Option<Return>,
    #[serde(default, alias = "placement")]
    scheduler: Scheduler,
    #[serde(default)]
    affinity: Affinity,
    #[serde(rename = "client-prefix")]
    client_prefix: Option<Spanned<ClientPrefix>>,
    #[serde(default)]
    prefer: Prefer,
    family: Option<Family>,
    allow: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    deny: Vec<Spanned<String>>,
    #[serde(default)]
    idle: Idle,
    health: Option<Spanned<CheckSpec>>,
    #[serde(rename = "slow-start")]
    slow_start: Option<Spanned<String>>,
    #[serde(rename = "task-max-connections")]
    task_max_connections: Option<Spanned<u32>>,
    eject: Option<Spanned<Eject>>,
    #[serde(default)]
    timers: BTreeMap<Spanned<String>, u32>,
    #[serde(default)]
    task: Vec<Spanned<RawTask>>,
}

/// `"off"` or a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Eject {
    Word(String),
    After(u16),
}

impl fmt::Display for Eject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(word) => f.write_str(word),
            Self::After(after) => after.fmt(f),
        }
    }
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

/// A mistake and where it stands, in bytes from the start.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) at: usize,
    pub(super) reason: String,
}

impl Wrong {
    fn at<T>(spanned: &Spanned<T>, reason: impl Into<String>) -> Self {
        Self { at: spanned.span().start, reason: reason.into() }
    }
}

/// What of a cluster's description must be unique, and whose it is.
pub(super) type Published<'a> = HashMap<(u8, u16, Option<IpAddr>), &'a str>;

/// The description of a cluster, or of a part of one.
pub(super) fn raw(text: &str) -> Result<RawCluster, Wrong> {
    toml::from_str(text).map_err(|error| {
        let span = error.span().unwrap_or_default();
        let said = text
            .get(span.clone())
            .filter(|said| !said.is_empty() && said.len() <= 60 && !said.contains('\n'));
        let reason = match (error.message(), said) {
            ("invalid IP address syntax", Some(said)) => format!("{said} is no IP address"),
            (message, Some(said)) if message.contains("expected a sequence") => {
                format!("{said} is no list: write it in brackets, as in [{said}]")
            }
            (message, _) => message.to_owned(),
        };
        Wrong { at: span.start, reason }
    })
}

/// A whole cluster.
pub(super) fn cluster(raw: &RawCluster) -> Result<ClusterState, Wrong> {
    let mut names = HashMap::new();
    let nodes = nodes(raw, &mut names)?;
    let mut published = HashMap::new();
    let mut services = Vec::new();
    let known = nodes.iter().map(|node| node.name.clone()).collect();
    for raw in raw.service.iter().flatten() {
        services.push(Arc::new(service(raw.get_ref(), &known, &mut names, &mut published)?));
    }
    let tunnel = tunnel(raw.tunnel.as_ref(), &published)?;
    let denied = ranges(&raw.deny)?;
    Ok(ClusterState { nodes, services, tunnel, denied, ..ClusterState::default() })
}

/// Names that were given, by kind, and where.
pub(super) type Names<'a> = HashMap<(&'static str, &'a str), usize>;

/// The machines.
pub(super) fn nodes<'a>(raw: &'a RawCluster, names: &mut Names<'a>) -> Result<Vec<Node>, Wrong> {
    for node in &raw.node {
        unique(names, ("node", &node.get_ref().name))?;
        let zone = node.get_ref().zone.as_ref();
        if let Some(zone) = zone.filter(|zone| zone.get_ref().len() > Node::LONGEST_ZONE) {
            let most = Node::LONGEST_ZONE;
            return Err(Wrong::at(zone, format!("the name of a zone may have {most} bytes at most")));
        }
    }
    let nodes = raw.node.iter().map(|node| Node {
        name: node.get_ref().name.get_ref().clone(),
        host: String::new(),
        addresses: node.get_ref().addresses.clone(),
        agent: node.get_ref().agent,
        key: NodeKey::None,
        zone: node
            .get_ref()
            .zone
            .as_ref()
            .map(|zone| text::name(zone.get_ref(), Node::LONGEST_ZONE))
            .unwrap_or_default(),
        ..Node::default()
    });
    Ok(nodes.collect())
}

/// A service; `nodes` are the names of those that there are.
pub(super) fn service<'a>(
    raw: &'a RawService,
    nodes: &HashSet<String>,
    names: &mut Names<'a>,
    published: &mut Published<'a>,
) -> Result<Service, Wrong> {
    unique(names, ("service", &raw.name))?;
    let ports = ports(raw, published)?;
    let mut tasks = Vec::with_capacity(raw.task.len());
    for raw in &raw.task {
        unique(names, ("task", &raw.get_ref().name))?;
        tasks.push(task(raw.get_ref(), nodes)?);
    }
    let name = raw.name.get_ref().clone();
    let (addresses, returns) = (raw.addresses.clone(), raw.returns);
    let (scheduler, affinity, prefer, idle) = (raw.scheduler, raw.affinity, raw.prefer, raw.idle);
    // Who reads the file cannot know whether each node's agent translates.
    let family = raw.family.unwrap_or(Family::Same);
    tasks.iter_mut().filter(|task| task.via == Via::Peer).for_each(|task| translated(task, family));
    let mut timers = Timers::DEFAULT;
    for (name, seconds) in &raw.timers {
        set_timer(&mut timers, name.get_ref(), *seconds).map_err(|e| Wrong::at(name, e.to_string()))?;
    }
    let access = Access { allow: raw.allow.as_deref().map(ranges).transpose()?, deny: ranges(&raw.deny)? };
    let health = match &raw.health {
        None => None,
        Some(spec) => spec
            .get_ref()
            .check(Port::first_tcp(&ports))
            .map_err(|error| Wrong::at(spec, error.to_string()))?,
    };
    let client_prefix = match &raw.client_prefix {
        None => ClientPrefix::WHOLE,
        Some(prefix) => prefix.get_ref().check().map_err(|error| Wrong::at(prefix, error))?,
    };
    let slow_start = match &raw.slow_start {
        None => Duration::ZERO,
        Some(text) => slow_start(text.get_ref()).map_err(|error| Wrong::at(text, error))?,
    };
    let task_max_connections = match &raw.task_max_connections {
        None => 0,
        Some(number) => {
            task_max_connections(Some(*number.get_ref())).map_err(|error| Wrong::at(number, error))?
        }
    };
    let eject = match &raw.eject {
        None => ejects(scheduler),
        Some(after) => eject(&after.get_ref().to_string()).map_err(|error| Wrong::at(after, error))?,
    };
    let (left, problem) = (String::new(), String::new());
    Ok(Service {
        name,
        addresses,
        ports,
        tasks,
        returns,
        scheduler,
        affinity,
        client_prefix,
        prefer,
        family,
        access,
        timers,
        idle,
        health,
        slow_start,
        task_max_connections,
        eject,
        left,
        problem,
    })
}

/// Has a task be reached by both families, as its service wants it.
fn translated(task: &mut Task, family: Family) {
    if family == Family::Same {
        return;
    }
    let v4 = task.addresses.iter().find_map(|one| if let IpAddr::V4(v4) = one { Some(*v4) } else { None });
    let v6 = task.addresses.iter().find_map(|one| if let IpAddr::V6(v6) = one { Some(*v6) } else { None });
    if let (None, Some(v6)) = (v4, v6) {
        // The same one at every node that reads the file; two tasks that had one would be refused.
        task.addresses.push(stand_in(v6, |_| false).into());
    }
    task.addresses.extend(v4.map(embed));
    task.addresses = family.choose(&task.addresses);
}

/// Ranges of clients' addresses.
pub(super) fn ranges(texts: &[Spanned<String>]) -> Result<Vec<IpNet>, Wrong> {
    let range = |text: &Spanned<String>| {
        address_range(text.get_ref()).map_err(|error| Wrong::at(text, error.to_string()))
    };
    texts.iter().map(range).collect()
}

/// The tunnel, whose port nobody may publish.
pub(super) fn tunnel(raw: Option<&RawTunnel>, published: &Published<'_>) -> Result<Tunnel, Wrong> {
    let default = Tunnel::default();
    let wanted = raw.and_then(|raw| raw.port.as_ref());
    let port = wanted.map_or(default.port, |port| *port.get_ref());
    let at = wanted.map_or(0, |port| port.span().start);
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
    Ok(Tunnel { port, returns: raw.map_or(default.returns, |raw| raw.returns) })
}

/// Where the tunnel's key is, if it has one, and where that stands.
pub(super) fn key_file(raw: &RawCluster) -> Option<(usize, &Path)> {
    let file = raw.tunnel.as_ref()?.key_file.as_ref()?;
    Some((file.span().start, file.get_ref()))
}

fn unique<'a>(names: &mut Names<'a>, (kind, name): (&'static str, &'a Spanned<String>)) -> Result<(), Wrong> {
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

fn ports<'a>(service: &'a RawService, published: &mut Published<'a>) -> Result<Vec<Port>, Wrong> {
    let mut ports = Vec::new();
    let places: Vec<Option<IpAddr>> = match service.addresses.as_slice() {
        [] => vec![None],
        addresses => addresses.iter().copied().map(Some).collect(),
    };
    let read = |text: &'a Spanned<String>| {
        let range = Port::range(text.get_ref()).map_err(|error| Wrong::at(text, error.to_string()))?;
        Ok(range.map(move |port| (text, port)))
    };
    let ranges = service.ports.iter().map(read).collect::<Result<Vec<_>, Wrong>>()?;
    for (text, port) in ranges.into_iter().flatten() {
        for place in &places {
            let key = (port.protocol.number(), port.published, *place);
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

fn task(raw: &RawTask, nodes: &HashSet<String>) -> Result<Task, Wrong> {
    if !nodes.contains(raw.node.get_ref()) {
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
        finding: None,
    })
}
