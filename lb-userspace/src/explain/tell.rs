//! The steps of a packet in words: what the tables say where it is looked at, and what the datapath has made of it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::{
    abi::{Config, Mode, TC_ALONE},
    backend::{Kind, RETURN_DIRECT, State, TRANSLATED},
    endpoint::{AFFINE, CLOSED, CONSISTENT, Listener, RANDOM, RESTRICTED},
    outcome::Outcome,
    tunnel::{Peer, overhead},
};

use super::{
    Question, Told,
    frame::{Made, asked_mss},
};
use crate::{
    cluster::Protocol,
    connection::{Names, state},
    datapath::{DatapathError, PinDir, Ran, TableSet, Verdict},
    inventory::{Inventory, Service, interface_to},
    plan::{At, BackendEntry, ServiceLabel, Tables},
    translation::shown,
};

/// Other addresses of a published port are told up to so many.
const ADDRESSES: usize = 4;
/// How a task is chosen while the flood guard is on, or the connection table is full.
const WITHOUT_LINE: &str =
    "by a hash of both ends' addresses and ports, and nothing is kept: there are too many new connections";

/// Tells the steps.
pub(super) struct Teller<'a> {
    inventory: &'a Inventory,
    names: &'a Names<'a>,
    question: &'a Question,
    ran: &'a Ran,
    /// What the datapath has made of the packet, if it sends it on.
    made: Option<Made>,
    listener: Option<Listener>,
    /// What was told.
    pub(super) steps: Vec<Told>,
}

impl<'a> Teller<'a> {
    pub(super) fn new(
        inventory: &'a Inventory,
        names: &'a Names<'a>,
        question: &'a Question,
        (ran, config): (&'a Ran, &Config),
    ) -> Self {
        let made = Made::of(&ran.frame, config).filter(|_| ran.verdict == Verdict::Forwarded);
        let Question { protocol, listener, .. } = question;
        let at = At { address: listener.ip(), protocol: *protocol, port: listener.port() };
        let listener = inventory.tables.listeners.get(&at).copied();
        Self { inventory, names, question, ran, made, listener, steps: Vec::new() }
    }

    fn tables(&self) -> &'a Tables {
        &self.inventory.tables
    }

    fn say(&mut self, step: &'static str, text: impl Into<String>) {
        self.steps.push(Told { step, text: text.into() });
    }

    /// The task that gets the packet, or is asked for. What was placed without a line is where the packet goes, if that is a task's
    /// own address.
    pub(super) fn entry(&self) -> Option<&'a BackendEntry> {
        let backends = &self.tables().backends;
        if let Some(line) = self.ran.after.or(self.ran.before) {
            return backends.get(&line.backend?);
        }
        let made = self.made.filter(|made| made.tunnel.is_none())?;
        let protocol = self.question.protocol;
        let to = |entry: &&BackendEntry| {
            let label = &entry.label;
            SocketAddr::new(label.address, label.target) == made.ends[1] && label.protocol == protocol
        };
        backends.values().find(to)
    }

    /// Whether the packet goes where its connection went before.
    fn is_kept(&self) -> bool {
        let [before, after] =
            [self.ran.before, self.ran.after].map(|line| line.and_then(|line| line.backend));
        before.is_some() && before == after
    }

    /// The service that it is for.
    pub(super) fn service(&self) -> Option<&'a ServiceLabel> {
        let of_task = self.entry().map(|entry| entry.backend.service);
        let service = of_task.or_else(|| self.listener.map(|listener| listener.service))?;
        self.tables().services.get(&service)
    }

    fn service_name(&self) -> &'a str {
        self.service().map_or("a service", |label| &label.name)
    }

    /// Tells all steps up to where the packet ends.
    pub(super) fn tell(&mut self, set: &TableSet, config: &Config) -> Result<(), DatapathError> {
        self.packet();
        self.interface(config)?;
        if self.ran.outcome == Some(Outcome::Stale) {
            return self.end(config);
        }
        if self.question.through.is_none() && !self.is_kept() {
            self.filter(set)?;
        }
        let tunnel = self.ran.outcome.is_some_and(|outcome| outcome.name().starts_with("tunnel_"));
        if !tunnel {
            self.connection();
            if self.question.through.is_none() && !self.is_kept() {
                self.listener();
            }
        }
        if let Some(made) = self.made.filter(|made| !made.reset) {
            match self.entry() {
                Some(entry) => {
                    self.choice(entry);
                    self.way(entry);
                    self.mtu(entry, &made);
                }
                None => self.say("choice", format!("a task {WITHOUT_LINE}")),
            }
            self.rewrite(&made);
        }
        self.end(config)
    }

    fn packet(&mut self) {
        let Question { protocol, client, listener, through, .. } = self.question;
        let what = match protocol {
            Protocol::Udp => "a datagram",
            Protocol::Tcp if self.question.is_syn(self.ran.before.as_ref()) => "a SYN",
            Protocol::Tcp => "a segment of an open connection",
        };
        let text = format!("{what} from {client} to {listener}/{protocol}");
        self.say(
            "packet",
            match through {
                None => text,
                Some([node, task]) => format!("{text}, in the tunnel from {node}, which has chosen {task}"),
            },
        );
    }

    fn interface(&mut self, config: &Config) -> Result<(), DatapathError> {
        let name = &self.inventory.interface;
        let mode = match Mode::try_from(config.mode) {
            Ok(mode) if config.flags & TC_ALONE == 0 => mode,
            _ => Mode::Tc,
        };
        let controller = match PinDir::of(name)?.controller() {
            Some(pid) => format!("process {pid} controls it"),
            None => "no controller runs: the tables stay as they are".to_owned(),
        };
        self.say("interface", format!("{name}, served by {}; {controller}", mode.name()));
        Ok(())
    }

    fn filter(&mut self, set: &TableSet) -> Result<(), DatapathError> {
        let Question { protocol, listener, .. } = self.question;
        let port = format!("{}/{protocol}", listener.port());
        let text = if set.looks_at(*protocol, listener.port())? {
            format!("packets to port {port} are looked at")
        } else {
            format!("nobody publishes port {port}: passed on at once")
        };
        self.say("filter", text);
        Ok(())
    }

    fn connection(&mut self) {
        let text = match &self.ran.before {
            None => "none yet".to_owned(),
            Some(seen) => {
                let known = self.names.connection(seen);
                let task = known.task.unwrap_or("a task that is gone");
                let by = known.from.map(|node| format!(", by {node}")).unwrap_or_default();
                let rest = known.expires_seconds.map_or_else(String::new, |rest| format!(", {rest} s left"));
                format!("{}, with {task}{by}; silent for {} s{rest}", state(seen.phase), seen.idle)
            }
        };
        self.say("connection", text);
    }

    fn listener(&mut self) {
        let Some(listener) = self.listener else {
            let at = self.question.at();
            return self.say("listener", format!("{at} is none: {}", self.elsewhere()));
        };
        let tasks = self.takers(&listener);
        let service = self.service_name();
        let mut text = format!("{} of {service}: ", self.question.at());
        text += &match (tasks, listener.flags & CLOSED != 0) {
            (0, true) => "no task is to get new connections here, they are refused".to_owned(),
            (0, false) => "no task takes new connections".to_owned(),
            (1, _) => "1 task takes new connections".to_owned(),
            (count, _) => format!("{count} tasks take new connections"),
        };
        self.say("listener", text);
        self.access(&listener);
    }

    /// How many tasks take new connections of a listener.
    fn takers(&self, listener: &Listener) -> usize {
        let slots = self.tables().slots_of(listener).unwrap_or_default();
        slots.iter().map(|slot| slot.backend()).collect::<BTreeSet<_>>().len()
    }

    /// Where the port is served instead.
    fn elsewhere(&self) -> String {
        let Question { protocol, listener, .. } = self.question;
        let there = |at: &&At| at.protocol == *protocol && at.port == listener.port();
        let there: Vec<IpAddr> = self.tables().listeners.keys().filter(there).map(|at| at.address).collect();
        if there.is_empty() {
            return "no service publishes that port here".to_owned();
        }
        let mut shown: Vec<String> = there.iter().take(ADDRESSES).map(ToString::to_string).collect();
        if there.len() > ADDRESSES {
            shown.push(format!("{} more", there.len() - ADDRESSES));
        }
        format!("the port is served on {}", shown.join(", "))
    }

    /// The range by which no service takes the client.
    fn denied(&self) -> Option<IpNet> {
        let client = self.question.client.ip();
        self.inventory.tables.denied().filter(|range| range.contains(&client)).max_by_key(IpNet::prefix_len)
    }

    fn access(&mut self, listener: &Listener) {
        if let Some(range) = self.denied() {
            let client = self.question.client.ip();
            return self.say("access", format!("{client} may not connect: no service takes {range}"));
        }
        if listener.flags & RESTRICTED == 0 {
            return self.say("access", "everybody may connect");
        }
        let client = self.question.client.ip();
        let ranges = self.inventory.ranges(listener.service).filter(|(range, _)| range.contains(&client));
        let text = match ranges.max_by_key(|(range, _)| range.prefix_len()) {
            Some((range, true)) => format!("{client} may connect: {range} is allowed"),
            Some((range, false)) => format!("{client} may not connect: {range} is denied"),
            None => format!("{client} may not connect: it is on no list"),
        };
        self.say("access", text);
    }

    fn choice(&mut self, entry: &BackendEntry) {
        let flags = self.listener.map_or(0, |listener| listener.flags);
        let by = match &self.question.through {
            _ if self.is_kept() => "its connection's",
            Some([node, _]) => return self.say("choice", format!("{}, as {node} says", entry.label.task)),
            None if self.ran.after.is_none() => WITHOUT_LINE,
            None if self.listener.is_some_and(|listener| self.takers(&listener) == 1) => "the only one",
            None if flags & AFFINE != 0 => "by a hash of the client's address",
            None if flags & CONSISTENT != 0 => "by a hash of both ends' addresses and ports",
            None if flags & RANDOM != 0 => "by chance; the next connection may get any task",
            None => "whose turn it is; the next connection gets the next task",
        };
        let node = self.names.node(&entry.label.node);
        let state = match State::try_from(entry.backend.state) {
            Ok(State::Draining) => " (it takes no new connections)",
            _ => "",
        };
        self.say("choice", format!("{} on {node}, {by}{state}", entry.label.task));
    }

    fn peer(&self, entry: &BackendEntry) -> Option<Peer> {
        self.inventory.peers.get(&entry.backend.peer.into()).map(|(peer, _)| *peer)
    }

    fn way(&mut self, entry: &BackendEntry) {
        let backend = &entry.backend;
        let by = name_of(backend.ifindex);
        let text = match Kind::try_from(backend.kind) {
            Ok(Kind::Local) if backend.flags & TRANSLATED != 0 => {
                let (from, to) =
                    if entry.label.address.is_ipv6() { ("IPv6", "IPv4") } else { ("IPv4", "IPv6") };
                format!("to the task's veth, {by}, where {from} becomes {to}")
            }
            Ok(Kind::Local) => format!("into the task's network namespace, by {by}"),
            Ok(Kind::Routed) => format!("by a next hop on {by}; replies come back through this node"),
            Ok(Kind::Snat) => format!("by a next hop on {by}, from an address of this node"),
            Ok(Kind::Peer) => {
                let peer = self.peer(entry).and_then(|peer| interface_to(&peer));
                let back = if backend.flags & RETURN_DIRECT == 0 {
                    "replies come back the same way"
                } else {
                    "replies go straight to the client"
                };
                let node = self.names.node(&entry.label.node);
                format!(
                    "through the tunnel to {node}, by {}; {back}",
                    peer.as_deref().unwrap_or("no interface")
                )
            }
            Err(_) => return,
        };
        self.say("way", text);
    }

    fn mtu(&mut self, entry: &BackendEntry, made: &Made) {
        let mut said = Vec::new();
        if entry.backend.kind == Kind::Peer as u8
            && let Some(peer) = self.peer(entry)
        {
            let inner = peer.mtu.saturating_sub(overhead(peer.family == 4));
            said.push(format!("packets of up to {inner} bytes go through the tunnel"));
        }
        if self.question.is_syn(self.ran.before.as_ref())
            && let Some(mss) = made.mss
        {
            let asked = asked_mss(self.question);
            said.push(if mss == asked {
                format!("the MSS of {asked} stays")
            } else {
                format!("the MSS of {asked} becomes {mss}")
            });
        }
        if !said.is_empty() {
            self.say("mtu", said.join("; "));
        }
    }

    fn rewrite(&mut self, made: &Made) {
        let Made { tunnel, ends: [from, to], .. } = *made;
        let Question { client, listener, .. } = self.question;
        let mut said = Vec::new();
        let own =
            self.entry().filter(|entry| entry.label.address == to.ip()).and_then(|entry| entry.label.own);
        if to != *listener {
            said.push(format!("destination {listener} becomes {}", shown(to, own)));
        }
        if let (Some(IpAddr::V6(_)), IpAddr::V4(client)) = (own, client.ip()) {
            said.push(format!("source {client} becomes {}", self.names.client_in_six(client)));
        } else if own.is_some() {
            said.push(format!(
                "source {client} becomes an address of the pool: `lb-userspace clients` says which, once it has one"
            ));
        }
        if from != *client {
            // A free one is tried at random.
            let snat = self.ran.outcome == Some(Outcome::Snat) && self.ran.before.is_none();
            let port = if snat { "a free port".to_owned() } else { format!("port {}", from.port()) };
            said.push(format!("source {client} becomes {}, {port}", from.ip()));
        }
        if let Some([from, to]) = tunnel {
            said.push(format!("none: the packet goes as it came, in Geneve from {from} to {to}"));
        }
        self.say("rewrite", said.join("; "));
    }

    fn end(&mut self, config: &Config) -> Result<(), DatapathError> {
        let uplink = name_of(config.uplink);
        let text = match (self.ran.verdict, self.ran.outcome) {
            (Verdict::Forwarded, Some(Outcome::Local)) => "delivered to the task".to_owned(),
            (Verdict::Forwarded, Some(Outcome::Reset)) => {
                format!("a reset goes back to the client, by {uplink}")
            }
            (Verdict::Forwarded, _) => {
                let by = self.entry().map(|entry| match Kind::try_from(entry.backend.kind) {
                    Ok(Kind::Peer) => {
                        self.peer(entry).map_or_else(|| uplink.clone(), |peer| name_of(peer.ifindex))
                    }
                    _ => name_of(entry.backend.ifindex),
                });
                format!("leaves by {}", by.unwrap_or(uplink))
            }
            (Verdict::Passed, _) => {
                "passed to the host as it came: Swarm's mesh, a program that listens there, or nobody answers"
                    .to_owned()
            }
            (Verdict::Dropped, _) => "dropped".to_owned(),
        };
        self.say("end", text);
        Ok(())
    }

    /// What to do, or whom to ask, next.
    pub(super) fn next(&self) -> Option<String> {
        let Question { protocol, client, listener, .. } = self.question;
        let service = self.service_name();
        let port = listener.port();
        Some(match self.ran.outcome? {
            Outcome::Peer => {
                let entry = self.entry()?;
                let this = self.inventory.nodes().into_iter().find(|node| node.this)?.name;
                let syn = *protocol == Protocol::Udp || self.question.is_syn(self.ran.before.as_ref());
                format!(
                    "on {}: lb-userspace explain {protocol} {client} {listener} --through {this} --task {}{}",
                    self.names.node(&entry.label.node),
                    entry.label.task,
                    if syn { "" } else { " --established" }
                )
            }
            Outcome::NotOurs => {
                let is_it = |service: &Service| {
                    let left = service.left_to_swarm.as_deref().unwrap_or_default();
                    left.split(", ").any(|one| leaves(one, *protocol, port))
                };
                let left = self.inventory.services().into_iter().find(is_it);
                if let Some(service) = left {
                    format!("{} publishes the port, and Swarm serves it: `lb-userspace service inspect {}`", service.name, service.name)
                } else if self.elsewhere().starts_with("the port") {
                    format!("to serve it there too: `lb-userspace attach … --address {}`, or the label lb.addresses", listener.ip())
                } else {
                    "`lb-userspace service ls` lists what is published".to_owned()
                }
            }
            Outcome::NoConnection => {
                "a connection begins with a SYN: this one is the host's, or was forgotten here after its timer \
                 (lb.timers.established)"
                    .to_owned()
            }
            Outcome::NoBackend | Outcome::Reset | Outcome::BackendGone | Outcome::BackendUnreachable => {
                format!("`lb-userspace service ps {service}` says why each task takes no connections")
            }
            Outcome::TasksFull => format!(
                "more tasks, `docker service scale {service}=…`, or more connections for each, label lb.task-max-connections; \
                 `lb-userspace service ps {service}` says which are full"
            ),
            Outcome::Denied if self.denied().is_some() => {
                "take that range out of the label lb.cluster.deny, or of `deny` in the cluster file".to_owned()
            }
            Outcome::Denied => format!("change lb.allow or lb.deny of {service}; `lb-userspace service inspect {service}`"),
            Outcome::Martian => {
                "nobody out there has that address: it is this node's own, a container's of it, or nobody's".to_owned()
            }
            Outcome::Stale => "start the agent: `systemctl start lb-userspace`, or attach".to_owned(),
            Outcome::TableFull => "give it more room: `lb-userspace attach … --max-connections`".to_owned(),
            Outcome::TunnelNotPeer | Outcome::TunnelForged => "`lb-userspace node ls` on both nodes: each has to know the other's address and key".to_owned(),
            Outcome::TunnelNoTask => "the task has left this node, or is not ready: `lb-userspace task ls`".to_owned(),
            _ => return None,
        })
    }
}

/// Whether what is said of a port that is not served, as in `*:6081->53/udp (left to Swarm)` or `8080->80/tcp (host)`, is said of this.
fn leaves(said: &str, protocol: Protocol, port: u16) -> bool {
    let Some((published, rest)) = said.trim_start_matches("*:").split_once("->") else { return false };
    let its = rest.split_once('/').map(|(_, rest)| rest.split(' ').next().unwrap_or_default());
    published.parse() == Ok(port) && its == Some(protocol.to_string().as_str())
}

fn name_of(ifindex: u32) -> String {
    let name = nix::net::if_::if_indextoname(ifindex).ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| format!("interface {ifindex}, which is gone"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_not_served_are_known_by_what_is_said_of_them() {
        let said = "*:6081->53/udp (left to Swarm: it is the tunnel's port)";
        assert!(leaves(said, Protocol::Udp, 6081));
        assert!(!leaves(said, Protocol::Tcp, 6081) && !leaves(said, Protocol::Udp, 53));
        assert!(leaves("8080->80/tcp (host)", Protocol::Tcp, 8080));
        assert!(!leaves("8080->80/tcp (host)", Protocol::Tcp, 80) && !leaves("", Protocol::Tcp, 80));
    }
}
