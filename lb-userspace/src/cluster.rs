//! The cluster as a source describes it: plain data, no I/O, no numbers of the datapath.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::conntrack::{Phase, Timers};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use crate::{
    check::{Check, Finding},
    translation::is_made_up,
    tunnel_key::{NodeKey, SharedKey},
    units::Time,
};

/// Everything a source knows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// The machines.
    pub nodes: Vec<Node>,
    /// The services that publish ports. One that has not changed is the same one from a state to the next, so that it need
    /// be neither copied nor compared.
    pub services: Vec<Arc<Service>>,
    /// Clients whom no service takes.
    #[serde(default)]
    pub denied: Vec<IpNet>,
    /// How nodes send packets to each other.
    pub tunnel: Tunnel,
    /// Name of the node that this was found out on, where the source knows.
    pub this: Option<String>,
    /// When the cluster changed to this, where the source knows.
    pub changed: Option<SystemTime>,
    /// Whether who tells this knows of checks of our own, and heeds what nodes find by them.
    #[serde(default)]
    pub checks: bool,
    /// The tunnel's key that all nodes know, where the source has one. It is told to nobody.
    #[serde(skip)]
    pub shared_key: Option<SharedKey>,
}

impl ClusterState {
    /// A service to be changed; other states that have it keep what it was.
    ///
    /// # Panics
    /// There are not so many services.
    pub fn service_mut(&mut self, index: usize) -> &mut Service {
        Arc::make_mut(&mut self.services[index])
    }

    /// Clients whom no service takes, as they are known.
    pub fn denied_ranges(&self) -> BTreeSet<IpNet> {
        self.denied.iter().map(|range| as_known(*range)).collect()
    }

    /// Takes services that are as they were before for the same ones.
    pub fn share(&mut self, before: &Self) {
        let known: HashMap<&str, &Arc<Service>> =
            before.services.iter().map(|service| (service.name.as_str(), service)).collect();
        for service in &mut self.services {
            if let Some(known) = known.get(service.name.as_str()).filter(|known| *known == &service) {
                *service = Arc::clone(known);
            }
        }
    }
}

/// How nodes send packets to each other's tasks; the same on all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// UDP port of the agents.
    pub port: u16,
    /// How replies travel, where a service does not say otherwise.
    pub returns: Return,
}

impl Default for Tunnel {
    fn default() -> Self {
        Self { port: lb_common::tunnel::DEFAULT_PORT, returns: Return::default() }
    }
}

/// How the replies of a task travel whose node is not the one that the client used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Return {
    /// Back through the node that the client used: works on every network.
    #[default]
    Tunnel,
    /// Straight to the client, with the address that the client used: for networks that let a node send from another
    /// node's address.
    Direct,
}

/// How the task of a new connection is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// Each task in turn, as often as its weight says.
    #[default]
    RoundRobin,
    /// The one that has the fewest open connections of this node's clients for its weight.
    LeastConnections,
    /// Any by chance, as often on average.
    Random,
    /// By a hash of addresses and ports that changes little when tasks come and go: a connection whose entry in the table
    /// of connections is lost goes on with its task.
    #[serde(alias = "consistent")]
    Maglev,
    /// By such a hash of the client's address alone.
    Source,
}

impl Scheduler {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::RoundRobin, Self::LeastConnections, Self::Random, Self::Maglev, Self::Source];

    /// As users write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::Random => "random",
            Self::Maglev => "maglev",
            Self::Source => "source",
        }
    }
}

/// Which clients are one where a client's address decides: those of one network, by the length of its prefix of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientPrefix {
    /// Of IPv4, 1 to 32.
    #[serde(default = "ClientPrefix::whole4")]
    pub v4: u8,
    /// Of IPv6, 1 to 64, or 128.
    #[serde(default = "ClientPrefix::whole6")]
    pub v6: u8,
}

impl ClientPrefix {
    /// Each address is a client of its own.
    pub const WHOLE: Self = Self { v4: 32, v6: 128 };

    const fn whole4() -> u8 {
        Self::WHOLE.v4
    }

    const fn whole6() -> u8 {
        Self::WHOLE.v6
    }

    /// Whether each address is a client of its own.
    pub fn is_whole(&self) -> bool {
        *self == Self::WHOLE
    }

    /// How many of the last bits of an address do not count.
    pub fn ignored(self, v4: bool) -> u32 {
        if v4 { 32 - u32::from(self.v4) } else { 128 - u32::from(self.v6) }
    }

    /// Whether there are such prefixes.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(self) -> Result<Self, String> {
        if !(1..=32).contains(&self.v4) {
            return Err(format!("a prefix of IPv4 has a length from 1 to 32, not {}", self.v4));
        }
        if !(1..=64).contains(&self.v6) && self.v6 != 128 {
            return Err(format!("a prefix of IPv6 has a length from 1 to 64, or 128, not {}", self.v6));
        }
        Ok(self)
    }
}

impl Default for ClientPrefix {
    fn default() -> Self {
        Self::WHOLE
    }
}

/// Whether a client's connections go to one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Affinity {
    /// Each is placed by itself.
    #[default]
    None,
    /// A client's address decides, by a hash that changes little when tasks come and go: by any node, on any port, after any restart.
    Client,
}

impl Affinity {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// Whose tasks come first. Others get new connections where none of those takes any, but for [`Self::LocalOnly`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Prefer {
    /// All are equal.
    #[default]
    Any,
    /// Those of the node that the client asked.
    Local,
    /// Those of the nodes that have the same [`Node::zone`] as it.
    Zone,
    /// Those of the node that the client asked, and no others.
    LocalOnly,
}

impl Prefer {
    /// Whether all are equal.
    pub fn is_any(&self) -> bool {
        *self == Self::Any
    }

    /// As users write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Local => "local",
            Self::Zone => "zone",
            Self::LocalOnly => "local-only",
        }
    }
}

/// How clients are served whose family a task does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Clients of a task that has the other family alone are translated where it runs.
    #[default]
    Auto,
    /// They go to other tasks, or are not served.
    Same,
    /// All IPv6 clients are translated, those of tasks that have IPv6 too.
    Translate,
}

impl Family {
    /// Whether it is what stands where nothing is set.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }

    /// As users write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Same => "same",
            Self::Translate => "translate",
        }
    }

    /// Where a task is reached, by at most one address of each family, of those that its node says.
    pub fn choose(self, told: &[IpAddr]) -> Vec<IpAddr> {
        let of = |v4, made_up| {
            let mut wanted = told.iter().filter(|one| one.is_ipv4() == v4 && is_made_up(**one) == made_up);
            wanted.next().copied()
        };
        let (v4, v6) = (of(true, false), of(false, false));
        let (v4, v6) = match self {
            Self::Auto => (v4.or(of(true, true)), v6.or(of(false, true))),
            Self::Same => (v4, v6),
            Self::Translate => (v4.or(of(true, true)), of(false, true).or(v6)),
        };
        v4.into_iter().chain(v6).collect()
    }
}

/// Who may connect to a service. Of the ranges that have a client's address the narrowest decides; a range that is both allowed and
/// denied is denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Access {
    /// Who may; `None` is everybody who is not denied.
    #[serde(default)]
    pub allow: Option<Vec<IpNet>>,
    /// Who may not.
    #[serde(default)]
    pub deny: Vec<IpNet>,
}

/// Why a range of addresses was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is neither an address nor a range of them, as in 192.0.2.0/24 or 2001:db8::/32")]
pub struct RangeError(String);

/// A range of addresses from text: an address, or one and the length of a prefix, whose further bits do not matter.
///
/// # Errors
/// It is neither.
pub fn address_range(text: &str) -> Result<IpNet, RangeError> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    let range = text.parse().or_else(|_| address()).map_err(|_| RangeError(text.to_owned()))?;
    Ok(as_known(range))
}

/// Why an address is none to serve on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// It is none at all.
    #[error("{0:?} is no address")]
    Text(String),
    /// It stands for all, for many, or for the machine itself.
    #[error("nobody can connect to {0} by the interface")]
    Unusable(IpAddr),
}

/// An address to serve on from text; an IPv4-mapped one as IPv4.
///
/// # Errors
/// It is none, or one that no client can reach by an interface.
pub fn served_address(text: &str) -> Result<IpAddr, AddressError> {
    let address: IpAddr = text.parse().map_err(|_| AddressError::Text(text.to_owned()))?;
    let address = address.to_canonical();
    let unusable = address.is_unspecified() || address.is_multicast() || address.is_loopback();
    if unusable { Err(AddressError::Unusable(address)) } else { Ok(address) }
}

/// A range as clients are known: by IPv4 where they have that, without the bits that do not matter.
fn as_known(range: IpNet) -> IpNet {
    let mapped = match range {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => v6.addr().to_ipv4_mapped(),
        _ => None,
    };
    let v4 = mapped.and_then(|address| IpNet::new(address.into(), range.prefix_len() - 96).ok());
    v4.unwrap_or(range).trunc()
}

impl Access {
    /// Nobody may connect.
    pub fn closed() -> Self {
        Self { allow: Some(Vec::new()), deny: Vec::new() }
    }

    /// Whether everybody may.
    pub fn is_open(&self) -> bool {
        self.allow.is_none() && self.deny.is_empty()
    }

    /// Whether clients may connect, by ranges, those of everybody among them; empty if all may.
    pub fn ranges(&self) -> BTreeMap<IpNet, bool> {
        if self.is_open() {
            return BTreeMap::new();
        }
        let others = self.allow.is_none();
        let all = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
        let allowed = self.allow.iter().flatten().map(|range| (*range, true));
        let denied = self.deny.iter().map(|range| (*range, false));
        // Another agent may have told of ranges in a form of its own.
        let listed = allowed.chain(denied).map(|(range, allowed)| (as_known(range), allowed));
        all.map(|range| (range, others)).into_iter().chain(listed).collect()
    }
}

/// What becomes of an established TCP connection whose timer has run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Idle {
    /// It is forgotten: neither end hears of it before it sends something.
    #[default]
    Forget,
    /// Both ends are told by a RST, so that neither keeps a connection that leads nowhere.
    Reset,
}

impl Idle {
    /// Whether it is what stands where nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A machine of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Unique in the cluster, and not its own to choose: the identifier that Swarm gave it, or the file's name for it.
    pub name: String,
    /// What it calls itself, for users' eyes, if that is another name. Nothing follows from it: several may say the same.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Where clients and other nodes reach it; the first one that a way leads to carries the tunnel.
    pub addresses: Vec<IpAddr>,
    /// Whether an agent serves it, so that its tasks are reached through the tunnel.
    pub agent: bool,
    /// Whether Swarm's managers do not hear it, or it has left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub down: bool,
    /// By what its packets in the tunnel are known.
    #[serde(default, skip_serializing_if = "NodeKey::is_unknown")]
    pub key: NodeKey,
    /// What it shares with the nodes that are near to it: a rack, a room, a provider's zone. Empty if nobody has said.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub zone: String,
    /// What is wrong with its labels, as users read it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label_problem: String,
}

impl Node {
    /// The longest name of a zone, in bytes: what is shown of a node has room for no more.
    pub const LONGEST_ZONE: usize = 32;

    /// What users know it by.
    pub fn shown(&self) -> &str {
        if self.host.is_empty() { &self.name } else { &self.host }
    }
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Unique in the cluster.
    pub name: String,
    /// Where it answers; empty is every address of the uplink.
    pub addresses: Vec<IpAddr>,
    /// What it publishes.
    pub ports: Vec<Port>,
    /// What serves it.
    pub tasks: Vec<Task>,
    /// How replies travel; `None` is the cluster's way.
    pub returns: Option<Return>,
    /// How new connections find their tasks.
    // Agents of before call it so, and know no other name.
    #[serde(default, alias = "placement", deserialize_with = "known")]
    pub scheduler: Scheduler,
    /// Whether a client's connections go to one task, whatever [`Self::scheduler`] says. Agents that know none place each by itself.
    #[serde(default, skip_serializing_if = "Affinity::is_none", deserialize_with = "known")]
    pub affinity: Affinity,
    /// Which clients are one then. Agents of before take each address for one.
    #[serde(default, skip_serializing_if = "ClientPrefix::is_whole")]
    pub client_prefix: ClientPrefix,
    /// Whose tasks come first. Agents that know nothing of it take all for equal.
    #[serde(default, skip_serializing_if = "Prefer::is_any", deserialize_with = "known")]
    pub prefer: Prefer,
    /// How clients are served whose family a task does not have.
    #[serde(default, skip_serializing_if = "Family::is_auto", deserialize_with = "known")]
    pub family: Family,
    /// Who may connect. Agents that know none let everybody.
    #[serde(default, skip_serializing_if = "Access::is_open")]
    pub access: Access,
    /// Published ports that are shown but left to Swarm, as users read them.
    pub left: String,
    /// What is wrong with how the service is described, as users read it: a label that nobody knows, a value that is none.
    #[serde(default)]
    pub problem: String,
    /// After which silence its connections have ended.
    #[serde(default, with = "seconds")]
    pub timers: Timers,
    /// What becomes of its established TCP connections that have ended so.
    #[serde(default, deserialize_with = "known")]
    pub idle: Idle,
    /// How its tasks are asked whether they take connections, beside what Docker says. Agents that know none do not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Check>,
    /// Time in which a task that comes gets its whole share of new connections by and by; zero is at once. Agents that know none
    /// give it at once.
    #[serde(default, skip_serializing_if = "Duration::is_zero")]
    pub slow_start: Duration,
    /// Connections that one of its tasks may have, those of all nodes' clients; zero is any number. Agents that know none give it more.
    #[serde(default, skip_serializing_if = "is_default")]
    pub task_max_connections: u32,
    /// After how many connections in a row that it refuses, or does not answer, a task is asked by its node's agent whether it takes any,
    /// and gets none while it does not; zero is never. Agents that know none give it its turn.
    #[serde(default, skip_serializing_if = "is_default")]
    pub eject: u16,
}

impl Service {
    /// Whether what a task's node finds of it decides over new connections.
    pub fn minds_findings(&self) -> bool {
        self.health.is_some() || self.eject != 0 || self.task_max_connections != 0
    }
}

/// Whether nothing else was said.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A choice as another node tells it: one that this agent does not know yet is as if nothing had been said, for the rest of the cluster
/// counts.
fn known<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    let told = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(told).unwrap_or_default())
}

/// Timers as they travel between nodes.
mod seconds {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    use super::Timers;

    pub fn serialize<S: Serializer>(timers: &Timers, serializer: S) -> Result<S::Ok, S::Error> {
        timers.seconds.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timers, D::Error> {
        <[u32; 8]>::deserialize(deserializer).map(|seconds| Timers { seconds })
    }
}

/// The timers of a service by the names that users give them, in the file and in labels.
pub const TIMERS: [(&str, Phase); 5] = [
    ("half_open", Phase::HalfOpen),
    ("established", Phase::Established),
    ("closing", Phase::Closing),
    ("one_way", Phase::OneWay),
    ("answered", Phase::Answered),
];

/// Why a timer was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TimerError {
    /// There is none of that name.
    #[error("there is no timer {0:?}; those there are: half_open, established, closing, one_way, answered")]
    Unknown(String),
    /// It is out of range.
    #[error("timer {0} is in seconds, from {least} to {most}", least = Timers::LEAST, most = Timers::MOST)]
    Range(String),
}

/// The time of a gentle start from text.
///
/// # Errors
/// It is none, or out of range.
pub fn slow_start(text: &str) -> Result<Duration, String> {
    let time: Option<Duration> = text.parse::<Time>().ok().map(Into::into);
    let time = time.filter(|time| (Duration::from_secs(1)..=Duration::from_secs(3_600)).contains(time));
    time.ok_or_else(|| format!("{text:?} is no time from 1s to 1h"))
}

/// How many connections a task may have.
///
/// # Errors
/// It is no number, or out of range.
pub fn task_max_connections(number: Option<u32>) -> Result<u32, String> {
    let number = number.filter(|number| (1..=1_000_000).contains(number));
    number.ok_or_else(|| "a task may have 1 to 1000000 connections".to_owned())
}

/// After how many connections in a row a task is ejected where nobody says: of those with the fewest one that refuses is the first.
pub fn ejects(scheduler: Scheduler) -> u16 {
    if scheduler == Scheduler::LeastConnections { 3 } else { 0 }
}

/// After how many connections in a row a task is ejected, from `off` or a number; zero is never.
///
/// # Errors
/// It is neither, or out of range.
pub fn eject(text: &str) -> Result<u16, String> {
    let after =
        if text == "off" { Some(0) } else { text.parse().ok().filter(|after| (1..=100).contains(after)) };
    after.ok_or_else(|| format!("{text:?} is neither off nor a number from 1 to 100"))
}

/// Sets one of a service's timers by its name.
///
/// # Errors
/// There is no timer of that name, or it may not be so long or so short.
pub fn set_timer(timers: &mut Timers, name: &str, seconds: u32) -> Result<(), TimerError> {
    let timer = TIMERS.iter().find(|(known, _)| *known == name);
    let (_, phase) = timer.ok_or_else(|| TimerError::Unknown(name.to_owned()))?;
    if !(Timers::LEAST..=Timers::MOST).contains(&seconds) {
        return Err(TimerError::Range(name.to_owned()));
    }
    timers.seconds[*phase as usize] = seconds;
    Ok(())
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its number in an IP header.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => lb_common::net::TCP,
            Self::Udp => lb_common::net::UDP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Port {
    /// Protocol.
    pub protocol: Protocol,
    /// The port clients use, on every node.
    pub published: u16,
    /// The port tasks listen on.
    pub target: u16,
}

/// Why text is not a port, or a range of ports.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PortError {
    /// It is written in another way.
    #[error(
        "{0:?} is not a port: write PUBLISHED:TARGET or PUBLISHED:TARGET/PROTOCOL, as in \"80:8080\", \"53:5353/udp\" or, of \
         ranges, \"10000-10100:20000-20100/udp\""
    )]
    Form(String),
    /// Two ranges that do not fit.
    #[error("{0:?}: the ranges of published ports and of targets have different lengths, {1} and {2}")]
    Lengths(String, u32, u32),
    /// One that ends before it begins.
    #[error("{0:?}: a range ends before it begins")]
    Reversed(String),
}

impl Port {
    /// A port or a range of ports in Docker's short syntax: `80:8080`, `53:5353/udp`, `10000-10100:20000-20100/udp`.
    ///
    /// # Errors
    /// It is neither.
    pub fn range(text: &str) -> Result<impl ExactSizeIterator<Item = Self> + use<>, PortError> {
        let error = || PortError::Form(text.to_owned());
        let (ports, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(error()),
        };
        let number = |text: &str| text.parse().ok().filter(|port: &u16| *port != 0).ok_or_else(error);
        let ends = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let (first, last) = (number(first)?, number(last)?);
            if first > last { Err(PortError::Reversed(text.to_owned())) } else { Ok((first, last)) }
        };
        let (published, target) = ports.split_once(':').ok_or_else(error)?;
        let (published, target) = (ends(published)?, ends(target)?);
        let length = |(first, last): (u16, u16)| u32::from(last - first) + 1;
        if length(published) != length(target) {
            return Err(PortError::Lengths(text.to_owned(), length(published), length(target)));
        }
        Ok((0..=published.1 - published.0).map(move |ahead| Self {
            protocol,
            published: published.0 + ahead,
            target: target.0 + ahead,
        }))
    }

    /// The first port of TCP that tasks listen on, if there is one.
    pub fn first_tcp(ports: &[Self]) -> Option<u16> {
        ports.iter().find(|port| port.protocol == Protocol::Tcp).map(|port| port.target)
    }

    /// Ports as users read them: those that follow each other are one range, as `docker service ls` has it.
    pub fn fold(ports: impl IntoIterator<Item = Self>) -> Vec<String> {
        let mut ports: Vec<Self> = ports.into_iter().collect();
        ports.sort();
        let follows = |one: &Self, next: &Self| {
            one.protocol == next.protocol
                && one.published.checked_add(1) == Some(next.published)
                && one.target.checked_add(1) == Some(next.target)
        };
        let text = |run: &[Self]| match run {
            [only] => only.to_string(),
            [first, .., last] => format!(
                "{}-{}->{}-{}/{}",
                first.published, last.published, first.target, last.target, first.protocol
            ),
            [] => String::new(),
        };
        ports.chunk_by(follows).map(text).collect()
    }
}

impl FromStr for Port {
    type Err = PortError;

    /// One port, as [`Port::range`] reads it.
    fn from_str(text: &str) -> Result<Self, PortError> {
        let mut range = Self::range(text)?;
        let only = range.next().filter(|_| range.len() == 0);
        only.ok_or_else(|| PortError::Form(text.to_owned()))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}->{}/{}", self.published, self.target, self.protocol)
    }
}

/// What a task is doing, as far as new connections are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Not ready: no connections.
    Starting,
    /// Ready: new connections.
    #[default]
    Running,
    /// Going away: keeps its connections, takes no new ones.
    Draining,
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Draining => "draining",
        })
    }
}

/// How a task on another node is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// Through the tunnel to its node's agent, with the client's address; where its node has none, as with `Snat`.
    #[default]
    Peer,
    /// From an address of this node, so that replies come back: the task sees this node.
    Snat,
    /// With the client's address; the task's replies must come back through this node by themselves.
    Routed,
}

/// A task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Unique in the cluster; by Docker's habit SERVICE.SLOT.
    pub name: String,
    /// Name of its node.
    pub node: String,
    /// Where it listens, at most one address of each family.
    pub addresses: Vec<IpAddr>,
    /// Its address on the network that spans the cluster, unique there, by which nodes name it to each other; `None`
    /// takes the first of `addresses`.
    pub overlay: Option<IpAddr>,
    /// What it is doing.
    pub state: TaskState,
    /// Share of new connections, relative to the service's other tasks; zero is none.
    pub weight: u16,
    /// How it is reached from another node.
    pub via: Via,
    /// What its node's agent found by a check of our own, where the service has one. Agents that know none do not heed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finding: Option<Finding>,
}

impl Task {
    /// The address by which nodes name it to each other.
    pub fn cluster_address(&self) -> Option<IpAddr> {
        let own = || self.addresses.iter().find(|address| !is_made_up(**address)).or(self.addresses.first());
        self.overlay.or_else(|| own().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_addresses_read_as_users_write_them() {
        let read = |text: &str| address_range(text).map(|range| range.to_string());
        for (text, range) in [
            ("10.1.2.3", "10.1.2.3/32"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("2001:db8::7", "2001:db8::7/128"),
            ("2001:db8::7/32", "2001:db8::/32"),
            ("::/0", "::/0"),
            ("::ffff:10.1.2.3", "10.1.2.3/32"),
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(range), "{text}");
        }
        for text in ["", "office", "10.0.0.0/33", "10.0.0/8", "10.0.0.1:80", "2001:db8::/129", "*"] {
            assert_eq!(read(text), Err(RangeError(text.into())));
        }
    }

    #[test]
    fn what_a_newer_agent_says_of_a_service_is_read_as_far_as_it_is_known() {
        let service = Service {
            name: "web".into(),
            scheduler: Scheduler::LeastConnections,
            prefer: Prefer::Zone,
            affinity: Affinity::Client,
            ..Service::default()
        };
        let text = serde_json::to_string(&service).unwrap();
        assert_eq!(serde_json::from_str::<Service>(&text).unwrap(), service);
        let newer = text
            .replace("least-connections", "fastest")
            .replace("zone", "planet")
            .replace("client", "cookie");
        let (scheduler, prefer, affinity) = <_>::default();
        let read = serde_json::from_str::<Service>(&newer).unwrap();
        assert_eq!(read, Service { scheduler, prefer, affinity, ..service });
        let former = text.replace("\"scheduler\":\"least-connections\"", "\"placement\":\"consistent\"");
        assert_eq!(serde_json::from_str::<Service>(&former).unwrap().scheduler, Scheduler::Maglev);
    }

    #[test]
    fn of_two_lists_that_name_the_same_range_the_one_that_denies_counts() {
        let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        assert!(Access::default().ranges().is_empty());
        let lists =
            Access { allow: Some(ranges(&["10.0.0.0/8", "192.0.2.0/24"])), deny: ranges(&["10.0.0.0/8"]) };
        let expected = [("0.0.0.0/0", false), ("10.0.0.0/8", false), ("192.0.2.0/24", true), ("::/0", false)];
        let expected = expected.map(|(range, allowed)| (range.parse().unwrap(), allowed));
        assert_eq!(lists.ranges(), BTreeMap::from(expected));
        assert!(
            Access { deny: ranges(&["10.0.0.0/8"]), ..Access::default() }.ranges()[&"::/0".parse().unwrap()]
        );
        assert_eq!(Access::closed().ranges().len(), 2);
    }

    #[test]
    fn ports_read_as_docker_writes_them() {
        let read = |text: &str| Port::range(text).map(Iterator::collect::<Vec<_>>);
        let port = |protocol, published, target| Ok(vec![Port { protocol, published, target }]);
        assert_eq!(read("80:8080"), port(Protocol::Tcp, 80, 8080));
        assert_eq!(read("80:8080/tcp"), port(Protocol::Tcp, 80, 8080));
        assert_eq!(read("53:5353/udp"), port(Protocol::Udp, 53, 5353));
        for bad in
            ["", "80", "80:", ":80", "80:0", "0:80", "80:8080/sctp", "80:8080/tcp/x", "65536:1", "-1:80"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
        let ports = read("10000-10002:20000-20002/udp").unwrap();
        let pairs: Vec<_> = ports.iter().map(|port| (port.published, port.target)).collect();
        assert_eq!(pairs, [(10_000, 20_000), (10_001, 20_001), (10_002, 20_002)]);
        assert_eq!(read("1-65535:1-65535").unwrap().len(), 65_535);
        for (bad, said) in [
            ("1-2:1-3", "the ranges of published ports and of targets have different lengths, 2 and 3"),
            ("2-1:1-2", "a range ends before it begins"),
            ("0-1:1-2", "is not a port"),
            ("1-2-3:1-3", "is not a port"),
            ("1-65536:1-65536", "is not a port"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(said), "{bad}: {error}");
        }
    }

    #[test]
    fn ports_that_follow_each_other_are_shown_as_ranges() {
        let all = ["443:8443", "80:8080", "81:8081", "10000-20000:10000-20000/udp", "82:9000", "65535:65535"];
        let ports = all.iter().flat_map(|text| Port::range(text).unwrap());
        assert_eq!(
            Port::fold(ports),
            [
                "80-81->8080-8081/tcp",
                "82->9000/tcp",
                "443->8443/tcp",
                "65535->65535/tcp",
                "10000-20000->10000-20000/udp"
            ]
        );
        assert_eq!(Port::fold([]), [""; 0]);
    }

    #[test]
    fn a_family_chooses_among_what_a_task_has_and_what_it_is_reached_by() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let (v4, v6, embedded, instead) =
            (ip("172.18.0.3"), ip("fd18::3"), ip("64:ff9b:1:6c62::ac12:3"), ip("240.0.0.3"));
        let (auto, same, translate) = (Family::Auto, Family::Same, Family::Translate);
        let has_v4 = [v4, embedded];
        assert_eq!(
            [auto, same, translate].map(|family| family.choose(&has_v4)),
            [vec![v4, embedded], vec![v4], vec![v4, embedded]]
        );
        let has_v6 = [v6, instead];
        assert_eq!(
            [auto, same, translate].map(|family| family.choose(&has_v6)),
            [vec![instead, v6], vec![v6], vec![instead, v6]]
        );
        let has_both = [v4, v6, embedded];
        assert_eq!(
            [auto, same, translate].map(|family| family.choose(&has_both)),
            [vec![v4, v6], vec![v4, v6], vec![v4, embedded]]
        );
        // Nodes name it to each other by what it has itself.
        let (name, node, addresses) = ("web.1".to_owned(), "node1".to_owned(), vec![instead, v6]);
        let (state, via) = (TaskState::Running, Via::Peer);
        let task = Task { name, node, addresses, overlay: None, state, weight: 1, via, finding: None };
        assert_eq!(task.cluster_address(), Some(v6));
    }
}
