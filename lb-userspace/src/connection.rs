//! A connection as operators see it: names in the place of numbers, and which of them somebody asks for.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use ipnet::IpNet;
use lb_common::{
    abi::Config,
    backend::{Kind, TRANSLATED},
    conntrack::Phase,
    tunnel::SELF,
};
use serde::Serialize;

use crate::{
    cluster::{Protocol, TIMERS},
    datapath::{Alias, Seen, Translations},
    inventory::{Inventory, via},
    translation::client_in_six,
    units::Time,
};

/// A connection with names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Connection<'a> {
    /// The interface whose datapath has it.
    pub interface: &'a str,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Which of its service's timers runs: `half_open`, `established`, `closing`, `one_way` or `answered`.
    pub state: &'static str,
    /// Since its last packet.
    pub idle_seconds: u32,
    /// Until it is forgotten, if nothing more is heard; none if its task is gone.
    pub expires_seconds: Option<u32>,
    /// The client.
    pub client: SocketAddr,
    /// Where the client sends to.
    pub listener: SocketAddr,
    /// The service; none if the task is gone.
    pub service: Option<&'a str>,
    /// The task; none if it is gone.
    pub task: Option<&'a str>,
    /// Where the task listens.
    pub task_address: Option<SocketAddr>,
    /// The task's node.
    pub node: Option<&'a str>,
    /// How the task is reached.
    pub via: Option<&'static str>,
    /// The node by which the client's packets come, if it is another one.
    pub from: Option<&'a str>,
    /// The client's port as the task sees it.
    pub client_port_at_task: u16,
    /// The client's address as the task sees it, where the task has another family alone and is on this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_at_task: Option<IpAddr>,
    /// Whether the task's replies go straight to the client, though its packets come by another node.
    pub direct: bool,
}

/// What the numbers of an interface's datapath stand for.
pub struct Names<'a> {
    inventory: &'a Inventory,
    nodes: BTreeMap<&'a str, String>,
    config: Config,
    /// Clients as this node's tasks know them.
    known: Translations,
}

impl<'a> Names<'a> {
    /// Of what was read.
    pub fn of(inventory: &'a Inventory, config: Config, aliases: &[Alias]) -> Self {
        let known = Translations::new(config, aliases, &inventory.tables);
        Self { inventory, nodes: inventory.node_names(), config, known }
    }

    /// The address by which tasks that have IPv6 alone know an IPv4 client.
    pub fn client_in_six(&self, client: Ipv4Addr) -> IpAddr {
        client_in_six(client, &self.config)
    }

    /// What users know a node by that is named in the cluster so.
    pub fn node<'b>(&'b self, id: &'b str) -> &'b str {
        self.nodes.get(id).map_or(id, String::as_str)
    }

    /// The same of the number of a peer.
    pub fn peer(&self, number: u32) -> Option<&str> {
        self.inventory.tables.nodes.get(&number).map(|label| self.node(&label.name))
    }

    /// A connection with names.
    pub fn connection(&self, seen: &Seen) -> Connection<'_> {
        let tables = &self.inventory.tables;
        let entry = seen.backend.and_then(|backend| tables.backends.get(&backend));
        let service = entry.and_then(|entry| tables.services.get(&entry.backend.service));
        Connection {
            interface: &self.inventory.interface,
            protocol: seen.protocol,
            state: state(seen.phase),
            idle_seconds: seen.idle,
            expires_seconds: service
                .map(|service| service.timers[seen.phase as usize].saturating_sub(seen.idle)),
            client: seen.client,
            listener: seen.listener,
            service: service.map(|service| service.name.as_str()),
            task: entry.map(|entry| entry.label.task.as_str()),
            task_address: entry.map(|entry| SocketAddr::new(entry.label.own(), entry.label.target)),
            node: entry.map(|entry| self.node(&entry.label.node)),
            via: entry.and_then(|entry| Kind::try_from(entry.backend.kind).ok()).map(via),
            from: if seen.peer == SELF { None } else { Some(self.peer(seen.peer).unwrap_or("?")) },
            client_port_at_task: seen.port,
            client_at_task: entry
                .filter(|entry| entry.backend.flags & TRANSLATED != 0)
                .and_then(|_| self.known.client(seen.client.ip())),
            direct: seen.direct,
        }
    }
}

/// The name of a connection's state: that of the timer that runs.
pub fn state(phase: Phase) -> &'static str {
    TIMERS.iter().find(|(_, timer)| *timer == phase).map_or("", |(name, _)| name)
}

/// Which connections are asked for: `FIELD=VALUE`, or `FIELD!=VALUE` for all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    not: bool,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Service(String),
    Task(String),
    Node(String),
    From(String),
    Client(Place),
    Listener(Place),
    State(&'static str),
    Protocol(Protocol),
    Idle(u32),
}

/// An address, a range, or a port, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    range: Option<IpNet>,
    port: Option<u16>,
}

impl Place {
    fn has(&self, at: SocketAddr) -> bool {
        self.range.is_none_or(|range| range.contains(&at.ip()))
            && self.port.is_none_or(|port| port == at.port())
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |ip: IpAddr| Some(IpNet::from(ip));
        if let Ok(at) = text.parse::<SocketAddr>() {
            return Ok(Self { range: one(at.ip()), port: Some(at.port()) });
        }
        if let Some(port) = text.strip_prefix(':').and_then(|port| port.parse().ok()) {
            return Ok(Self { range: None, port: Some(port) });
        }
        let range = text.parse().ok().or_else(|| one(text.parse().ok()?));
        let error = || {
            format!(
                "{text:?} is no address, range or port; write it like 192.0.2.7, 192.0.2.0/24, 192.0.2.7:443, \
                 [2001:db8::7]:443 or :443"
            )
        };
        range.map(|range| Self { range: Some(range), port: None }).ok_or_else(error)
    }
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fields = "service, task, node, from, client, listener, state, protocol and idle";
        let (field, value) = text.split_once('=').ok_or_else(|| {
            format!("{text:?} is no filter; write it FIELD=VALUE, with one of the fields {fields}")
        })?;
        let (field, not) = field.strip_suffix('!').map_or((field, false), |field| (field, true));
        let what = match field.to_lowercase().as_str() {
            "service" => What::Service(value.to_owned()),
            "task" => What::Task(value.to_owned()),
            "node" => What::Node(value.to_owned()),
            "from" => What::From(value.to_owned()),
            "client" => What::Client(value.parse()?),
            "listener" => What::Listener(value.parse()?),
            "state" => {
                let names = TIMERS.map(|(name, _)| name);
                let found = names.into_iter().find(|name| *name == value.replace('-', "_"));
                let error = || format!("there is no state {value:?}; those there are: {}", names.join(", "));
                What::State(found.ok_or_else(error)?)
            }
            "protocol" => match value {
                "tcp" => What::Protocol(Protocol::Tcp),
                "udp" => What::Protocol(Protocol::Udp),
                other => return Err(format!("there is no protocol {other:?}; it may be tcp or udp")),
            },
            "idle" => {
                let time: std::time::Duration = value.parse::<Time>()?.into();
                What::Idle(u32::try_from(time.as_secs()).unwrap_or(u32::MAX))
            }
            other => return Err(format!("there is no field {other:?}; those there are: {fields}")),
        };
        Ok(Self { not, what })
    }
}

impl Filter {
    /// Whether it chooses those that were silent for a time.
    pub fn is_idle(&self) -> bool {
        !self.not && matches!(self.what, What::Idle(_))
    }

    /// Whether it chooses a connection.
    pub fn chooses(&self, connection: &Connection<'_>) -> bool {
        let its = match &self.what {
            What::Service(name) => connection.service == Some(name),
            What::Task(name) => connection.task == Some(name),
            What::Node(name) => connection.node == Some(name),
            What::From(name) => connection.from == Some(name),
            What::Client(place) => {
                let port = connection.client_port_at_task;
                let as_seen = connection.client_at_task.map(|address| SocketAddr::new(address, port));
                place.has(connection.client) || as_seen.is_some_and(|seen| place.has(seen))
            }
            What::Listener(place) => place.has(connection.listener),
            What::State(state) => connection.state == *state,
            What::Protocol(protocol) => connection.protocol == *protocol,
            What::Idle(seconds) => connection.idle_seconds >= *seconds,
        };
        its != self.not
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Connection<'static> {
        Connection {
            interface: "eth1",
            protocol: Protocol::Tcp,
            state: "established",
            idle_seconds: 90,
            expires_seconds: Some(7_350),
            client: "198.51.100.7:40000".parse().unwrap(),
            listener: "192.0.2.1:80".parse().unwrap(),
            service: Some("web"),
            task: Some("web.1"),
            task_address: "172.18.0.3:8080".parse().ok(),
            node: Some("node1"),
            via: Some("local"),
            from: None,
            client_port_at_task: 40_000,
            client_at_task: None,
            direct: false,
        }
    }

    #[test]
    fn filters_choose_connections() {
        let chooses = |filter: &str| filter.parse::<Filter>().unwrap().chooses(&connection());
        for filter in [
            "service=web",
            "task=web.1",
            "node=node1",
            "from!=node2",
            "client=198.51.100.7",
            "client=198.51.100.0/24",
            "client=198.51.100.7:40000",
            "client=:40000",
            "listener=192.0.2.1:80",
            "listener=:80",
            "state=established",
            "state!=half-open",
            "protocol=tcp",
            "Protocol!=udp",
            "idle=1m",
            "idle!=2m",
        ] {
            assert!(chooses(filter), "{filter}");
        }
        for filter in [
            "service=we",
            "service!=web",
            "task=web.2",
            "from=node2",
            "client=2001:db8::/32",
            "client=198.51.100.7:40001",
            "listener=:443",
            "state=half_open",
            "idle=91",
        ] {
            assert!(!chooses(filter), "{filter}");
        }
        let translated = Connection {
            client: "[2001:db8::7]:40000".parse().unwrap(),
            client_at_task: "198.19.3.4".parse().ok(),
            ..connection()
        };
        for filter in ["client=2001:db8::7", "client=198.19.3.4", "client=198.19.3.4:40000"] {
            assert!(filter.parse::<Filter>().unwrap().chooses(&translated), "{filter}");
        }
        let gone = Connection { service: None, task: None, node: None, ..connection() };
        assert!(!"service=web".parse::<Filter>().unwrap().chooses(&gone));
        assert!("service!=web".parse::<Filter>().unwrap().chooses(&gone));
    }

    #[test]
    fn nonsense_is_refused_with_what_there_is() {
        for (bad, said) in [
            ("web", "FIELD=VALUE"),
            ("servce=web", "those there are: service, task"),
            ("client=web", "write it like 192.0.2.7"),
            ("client=:99999", "write it like"),
            ("state=open", "half_open, established"),
            ("protocol=sctp", "tcp or udp"),
            ("idle=soon", "90s"),
        ] {
            let error = bad.parse::<Filter>().unwrap_err();
            assert!(error.contains(said), "{bad}: {error}");
        }
    }
}
