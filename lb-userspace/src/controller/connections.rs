//! What is due once a second: the heartbeat, removing connections that have ended and what comes of it, the guard.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use lb_common::backend;
use tokio::time::Instant;

use super::{Controller, refusals::Change};
use crate::{
    check::runner::SeenTasks,
    cluster::{Idle, Protocol, TaskState},
    datapath::{Alias, ConnectionLog, DatapathError},
    events::{Event, Kind},
    net::{Reset, Resetter},
    plan::{BackendEntry, ServiceLabel},
    report,
};

/// A task that is full is told to be so for this time at least.
const FULL_FOR: Duration = Duration::from_secs(5);
/// No way leads to a task for a moment where it has just come, or its interface is made anew.
const UNREACHED_FOR: Duration = Duration::from_secs(2);

impl Controller {
    /// What is due once a second: tells the programs that somebody is there, leaves a new XDP to itself, removes connections
    /// that have ended, and says when the flood guard takes over and lets go.
    pub(super) fn look_after_connections(&mut self) -> Result<(), DatapathError> {
        self.datapath.beat()?;
        self.settle_in()?;
        let mut resets = Vec::new();
        let collected = self.datapath.collect(&mut resets);
        // Their lines are gone, whatever became of the rest.
        self.reset(&resets);
        let interface = &self.settings.interface;
        let collection = collected?;
        if collection.removed > 0 {
            log::debug!(
                "{interface}: {} of {} connections had ended, {} resets for those",
                collection.removed,
                collection.seen,
                collection.resets
            );
        }
        let fills: BTreeMap<&str, [u64; 2]> =
            collection.fills.iter().map(|fill| (fill.table, [fill.entries, fill.room])).collect();
        let full: Vec<String> =
            collection.fills.into_iter().filter_map(|fill| self.watch.fill(fill)).collect();
        for full in full {
            self.record(Kind::TableFilling, full);
        }
        if fills != self.fills {
            self.datapath.set_fills(&fills)?;
            self.fills = fills;
        }
        for full in self.watch.counters(|outcome| self.datapath.outcome(outcome).ok()) {
            self.record(Kind::LimitHit, full);
        }
        let guard = self.datapath.guard()?;
        if guard.on != self.report.flooded {
            self.report.flooded = guard.on;
            self.keep_report();
            let (kind, text) = if guard.on {
                let rate = self.datapath.config().flood_rate;
                let text = format!(
                    "more than {rate} new connections a second: until there are fewer they are placed by hash, and leave no \
                     line before the client goes on"
                );
                (Kind::GuardOn, text)
            } else {
                let placed = guard.placed;
                (
                    Kind::GuardOff,
                    format!("the flood is over; {placed} connections were placed by hash so far"),
                )
            };
            self.record(kind, text);
        }
        self.log_aliases()?;
        self.look_at_tasks()?;
        self.look_for_refusals()
    }

    /// Says by which address of the pool tasks know which client, where connections are logged: a task's own log has nothing else.
    fn log_aliases(&mut self) -> Result<(), DatapathError> {
        if self.settings.connection_log == ConnectionLog::Off {
            return Ok(());
        }
        // Who was seen to go on once is one until the address is somebody else's, or nobody's.
        let is_known =
            |alias: &Alias| alias.confirmed || self.aliases.get(&alias.address) == Some(&alias.client);
        let held = self.datapath.aliases()?.into_iter().filter(is_known);
        let now: BTreeMap<Ipv4Addr, IpAddr> = held.map(|alias| (alias.address, alias.client)).collect();
        let interface = &self.settings.interface;
        for (address, client) in
            self.aliases.iter().filter(|(address, client)| now.get(address) != Some(client))
        {
            log::info!("{interface}: {address} stands for {client} no longer");
        }
        for (address, client) in
            now.iter().filter(|(address, client)| self.aliases.get(address) != Some(client))
        {
            log::info!("{interface}: tasks know {client} as {address}");
        }
        self.aliases = now;
        Ok(())
    }

    /// Tells what is seen here of this node's tasks, and other nodes cannot know.
    fn look_at_tasks(&mut self) -> Result<(), DatapathError> {
        self.full = self.full()?;
        self.unreached = self.unreached();
        let lasts = |since: &Instant| since.elapsed() >= UNREACHED_FOR;
        let unreached = self.unreached.iter().filter(|(_, (since, _))| lasts(since));
        let seen = SeenTasks {
            full: self.full.keys().cloned().collect(),
            unreached: unreached.map(|(task, (_, why))| (task.clone(), why.clone())).collect(),
        };
        self.settings.checks.set_seen(&self.settings.interface, seen);
        Ok(())
    }

    /// The tasks of this node that have as many connections as they may have: the nodes that clients use each know their own alone.
    fn full(&self) -> Result<BTreeMap<String, Instant>, DatapathError> {
        let tables = self.datapath.tables();
        let limits = tables.services.iter().map(|(number, label)| (*number, label.task_max_connections));
        let limits: BTreeMap<u32, u32> = limits.filter(|(_, most)| *most != 0).collect();
        if limits.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut open: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        let is_here = |entry: &&BackendEntry| entry.backend.kind == backend::Kind::Local as u8;
        for (index, entry) in tables.backends.iter().filter(|(_, entry)| is_here(entry)) {
            let Some(most) = limits.get(&entry.backend.service) else { continue };
            // Of each port and family; that which has most.
            let known = open.entry(&entry.label.task).or_default();
            *known = (known.0.max(self.datapath.counted_open(*index)?.established()), u64::from(*most));
        }
        // Who was full is so until there is room for some, and for a while: each change is told to all nodes.
        let now = Instant::now();
        let since = |task: &str, open: u64, most: u64| {
            let known = self.full.get(task).copied();
            let stays = |since: &Instant| {
                now.saturating_duration_since(*since) < FULL_FOR || open > most - (most / 4).max(1)
            };
            if open >= most { Some(known.unwrap_or(now)) } else { known.filter(stays) }
        };
        let full = open
            .iter()
            .filter_map(|(task, (open, most))| Some(((*task).to_owned(), since(task, *open, *most)?)));
        Ok(full.collect())
    }

    /// The running tasks of this node to which no way leads by any address, since when, and why.
    fn unreached(&self) -> BTreeMap<String, (Instant, String)> {
        let tables = self.datapath.tables();
        let is_cut_off = |entry: &&BackendEntry| {
            entry.backend.state == backend::State::Unavailable as u8
                && entry.label.state == TaskState::Running
        };
        let mut cut_off: BTreeMap<&str, &str> = BTreeMap::new();
        for entry in tables.backends.values().filter(is_cut_off) {
            let is_here = || tables.nodes.values().any(|node| node.this && node.name == entry.label.node);
            if let Some(why) = entry.label.problem.as_deref().filter(|_| is_here()) {
                cut_off.insert(&entry.label.task, why);
            }
        }
        if !cut_off.is_empty() {
            for entry in tables.backends.values().filter(|entry| !is_cut_off(entry)) {
                cut_off.remove(entry.label.task.as_str());
            }
        }
        let since = |task: &str| self.unreached.get(task).map_or_else(Instant::now, |(since, _)| *since);
        cut_off.into_iter().map(|(task, why)| (task.to_owned(), (since(task), why.to_owned()))).collect()
    }

    /// Says which tasks do not take the connections they are given, and which do again.
    fn look_for_refusals(&mut self) -> Result<(), DatapathError> {
        let now = report::now();
        for index in self.refusals.forget(|index| self.datapath.tables().backends.contains_key(&index)) {
            self.datapath.set_trouble(index, None)?;
        }
        for index in self.refusals.due(self.datapath.tables().backends.keys().copied()) {
            let stats = self.datapath.backend_stats(index)?;
            let Some(entry) = self.datapath.tables().backends.get(&index) else { continue };
            let change = self.refusals.look(index, entry.backend.generation, stats, now);
            // Where its service has a check, that alone counts.
            let service = self.datapath.tables().services.get(&entry.backend.service);
            let eject = service.filter(|service| service.health.is_none()).map_or(0, |service| service.eject);
            let is_here =
                entry.backend.kind == backend::Kind::Local as u8 && entry.label.protocol == Protocol::Tcp;
            if is_here && self.refusals.took_none_of(index, eject.into()) {
                self.offers.suspect(&entry.label.task);
            }
            let Some(change) = change else {
                continue;
            };
            let (label, service) =
                (&entry.label, self.datapath.tables().services.get(&entry.backend.service));
            let (task, node, target) =
                (label.task.clone(), self.datapath.tables().node_shown(&label.node).to_owned(), label.target);
            let service = service.map(|service| service.name.clone()).unwrap_or_default();
            let said = match change {
                Change::Refuses(_) => Some((
                    Kind::TaskRefusing,
                    format!(
                        "task {task} on {node} refuses connections to port {target}, or does not answer; its clients are \
                         given to other tasks a second later"
                    ),
                )),
                Change::StillRefuses(_) => None,
                Change::Takes => Some((
                    Kind::TaskTakes,
                    format!("task {task} on {node} takes connections to port {target} again"),
                )),
            };
            let trouble = match &change {
                Change::Refuses(trouble) | Change::StillRefuses(trouble) => Some(trouble),
                Change::Takes => None,
            };
            self.datapath.set_trouble(index, trouble)?;
            if let Some((kind, text)) = said {
                let event = Event::now(&self.settings.interface, kind, text);
                self.settings.events.record(event.of_task(&task).of_node(&node).of_service(&service));
            }
        }
        Ok(())
    }

    /// Tells ends of connections, idle ones or of clients that may no longer connect, that those are gone. Who cannot be told finds
    /// out by itself, as where nobody is told.
    fn reset(&self, resets: &[Reset]) {
        let Some(resetter) = self.resetter.as_ref().filter(|_| !resets.is_empty()) else {
            return;
        };
        let interface = &self.settings.interface;
        let done = resetter.send(resets);
        log::debug!("{interface}: sent {} resets to ends of connections", done.sent);
        if let Some(error) = done.error {
            log::warn!(
                "{interface}: {} ends of connections could not be told by a reset: {error}; they find out when they \
                 send something. Is there a route to them, and does the packet filter let the node's own packets out?",
                done.failed
            );
        }
    }

    /// Sees to it that resets can be sent if a service asks for them; what is to be said where they cannot.
    pub(super) fn open_resetter(&mut self) -> Option<String> {
        if self.resetter.is_some() {
            return None;
        }
        let tables = self.datapath.tables();
        let restricted: BTreeSet<u32> = tables.access.keys().map(|(service, _)| *service).collect();
        let asks = |(number, label): &(&u32, &ServiceLabel)| {
            label.idle == Idle::Reset || restricted.contains(*number)
        };
        let mut asking = tables.services.iter().filter(asks).map(|(_, label)| &label.name);
        let first = asking.next()?;
        let error = match Resetter::open() {
            Ok(resetter) => {
                self.resetter = Some(resetter);
                return None;
            }
            Err(error) => error,
        };
        let others = match asking.count() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        let needs = match error.kind() {
            ErrorKind::PermissionDenied => "; the agent needs the capability CAP_NET_RAW for it",
            _ => "",
        };
        Some(format!(
            "service {first}{others}: connections that are idle, or whose client is denied, are forgotten, not reset: open a \
             raw socket: {error}{needs}"
        ))
    }
}
