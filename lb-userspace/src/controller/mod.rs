//! The controller of one interface: joins what the source says with what the kernel says, and keeps the tables
//! true. It owns the order of things; each thing is done elsewhere.

mod attach;
mod connections;
mod drains;
mod notice;
mod offers;
mod peers;
mod refusals;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use lb_common::{
    abi::{Config, Mode, inner, size},
    backend::TRANSLATED,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};

use crate::{
    check::runner::Checks,
    cluster::ClusterState,
    datapath::{self, ConnectionLog, Datapath, DatapathError, Sizes, TcHook},
    events::{Event, Kind, Recorder},
    limits::Watch,
    logging,
    net::{Changes, Link, Net, NextHopResolver, Prober, Resetter, Snapshot},
    plan::{MapOp, NextHop, NextHops, Planner, Reach, Role, View},
    report::{self, Drain, SourceReport},
    serve::Changed,
    source::{Origin, Update},
    supervisor::Pulse,
    translation::{Pool, prefixes},
    tunnel_key::{Keyring, Secret},
};
use notice::Notice;
use offers::Offers;
use peers::outgoing;
use refusals::Refusals;

/// What a controller is asked to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The uplink.
    pub interface: String,
    /// The other uplinks of this agent, which have datapaths of their own.
    pub others: BTreeSet<String>,
    /// Name of this node; `None` finds it by the machine's addresses.
    pub node: Option<String>,
    /// How to serve the uplink; `None` takes the best that works.
    pub mode: Option<Mode>,
    /// Sizes of the tables.
    pub sizes: Sizes,
    /// Addresses to serve on beside those of the uplink.
    pub addresses: Vec<IpAddr>,
    /// Source ports for snat, inclusive.
    pub snat_ports: [u16; 2],
    /// By what addresses tasks that have IPv4 alone know IPv6 clients.
    pub v6_pool: Pool,
    /// [`lb_common::abi::Config::pref64`].
    pub pref64: u32,
    /// Whether each new connection is logged.
    pub connection_log: ConnectionLog,
    /// This node's key for the tunnel.
    pub secret: Secret,
    /// How long another node's datapath may be silent before new connections go elsewhere.
    pub peer_timeout: Duration,
    /// New connections a second above which they are placed by hash, if not as the table's size asks; zero is never.
    pub flood_rate: Option<u32>,
    /// How long the datapath serves without a controller; `None` is for ever.
    pub stale_after: Option<Duration>,
    /// Whether what is pinned and does not fit is removed.
    pub replace_state: bool,
    /// Asks this node's tasks, where services have checks of our own.
    pub checks: Checks,
    /// Takes what happens.
    pub events: Arc<Recorder>,
    /// Changes when everything is to be looked at again.
    pub reload: watch::Receiver<u64>,
    /// Told when the tables have changed.
    pub changed: Changed,
    /// Where the controller shows that it is alive.
    pub pulse: Arc<Pulse>,
}

/// The controller of one interface.
pub struct Controller {
    settings: Settings,
    datapath: Datapath,
    net: Net,
    changes: Changes,
    updates: mpsc::Receiver<Update>,
    next_hops: NextHopResolver,
    /// The network as it was looked at last, unless something has changed in it since.
    network: Option<Arc<Snapshot>>,
    planner: Planner,
    /// The cluster as the source has it.
    told: Option<ClusterState>,
    /// The same, less what somebody drains.
    cluster: Option<ClusterState>,
    /// What somebody drains, by its version.
    drains: (u64, Vec<Drain>),
    /// What this node makes of the cluster for itself.
    offers: Offers,
    /// What it made of it last, if that is not the same and the cluster has not changed.
    offered: Option<ClusterState>,
    /// By what other nodes' packets are known.
    keyring: Keyring,
    /// Ask other nodes' datapaths whether they are there, by the index of the interface that leads to them; none before the tunnel's
    /// port is known.
    probers: BTreeMap<u32, Prober>,
    /// Where they say that a node fell silent or was heard again.
    peers_changed: (mpsc::Sender<()>, mpsc::Receiver<()>),
    /// ICMP errors about tunnel packets that were seen.
    tunnel_errors: u64,
    /// Tells the ends of connections that were given up; none before a service asks for it, or where the kernel refuses.
    resetter: Option<Resetter>,
    /// What is said of the source, for the verbs.
    report: SourceReport,
    /// Interface index the uplink's programs were attached to in this life.
    served: Option<u32>,
    /// When XDP came, while frames may be on their way that it has not seen.
    xdp_since: Option<Instant>,
    /// Interfaces beside the uplink on which a former controller's programs run yet.
    behind: BTreeSet<(Role, u32)>,
    /// What was last complained about, so that it is said once.
    complaints: BTreeSet<String>,
    /// Limits that the datapath has run into.
    watch: Watch,
    /// Tasks that do not take connections.
    refusals: Refusals,
    /// Tasks of this node that have as many connections as they may have, and since when.
    full: BTreeMap<String, Instant>,
    /// Running tasks of this node to which no way leads, since when, and why.
    unreached: BTreeMap<String, (Instant, String)>,
    /// What somebody asked to be logged.
    log_level: Option<String>,
    /// The clients that tasks know by an address of the pool, as was logged.
    aliases: BTreeMap<Ipv4Addr, IpAddr>,
    /// How full the tables of connections are, by name: entries and room.
    fills: BTreeMap<&'static str, [u64; 2]>,
}

/// A destination without a next hop is looked for again after this time, though nothing was heard of it.
const RETRY: Duration = Duration::from_secs(1);
/// Connections are looked after once in this time.
const TICK: Duration = Duration::from_secs(1);
/// Whether routers say that packets in the tunnel are too long is looked at once in this time.
const LOOK: Duration = Duration::from_millis(250);
/// Everything is compared again after this time, in case an event was missed.
const RESYNC: Duration = Duration::from_secs(30);
/// Neighbours, and other nodes' datapaths, have this time to answer before the tables are filled for the first time.
const ANSWER: Duration = Duration::from_millis(300);

impl Controller {
    /// Takes hold of the interface, waits for the source's first word, fills the tables and attaches.
    ///
    /// # Errors
    /// The interface is not there, its datapath cannot be had, or the source has no first state. Nothing of a
    /// new datapath stays; an adopted one goes on as it was.
    pub async fn start(settings: Settings, mut updates: mpsc::Receiver<Update>) -> Result<Self> {
        let (net, changes) = Net::connect().context("start watching the network")?;
        let snapshot = net.snapshot().await?;
        if snapshot.link(&settings.interface).is_none() {
            let there = snapshot.links.values().map(|link| link.name.as_str());
            return Err(DatapathError::no_interface(&settings.interface, there).into());
        }
        if let Some(reason) = snapshot.link(&settings.interface).and_then(|link| snapshot.unfit(link)) {
            bail!("{reason}");
        }
        let open = || Datapath::open(&settings.interface, &settings.sizes, settings.connection_log);
        let mut datapath = match open() {
            Err(error) if settings.replace_state && error.is_misfit() => {
                log::warn!(
                    "{}: {error}; removed, with its connections, as --replace-state asks",
                    settings.interface
                );
                let names: Vec<String> = snapshot.links.values().map(|link| link.name.clone()).collect();
                datapath::replace(&settings.interface, &settings.sizes, &names)?;
                open()?
            }
            opened => opened?,
        };
        datapath.set_secret(&settings.secret)?;
        let keyring = Keyring::new(settings.secret);
        let offers = Offers::new(&settings.interface, settings.checks.clone());
        let mut report = datapath.report().unwrap_or_default();
        let cluster = match (first(&mut updates, &mut report).await, datapath.adopted()) {
            (Ok(cluster), _) => cluster,
            (Err(error), true) => {
                log::warn!("{}: {error:#}; the adopted tables stand", settings.interface);
                None
            }
            (Err(error), false) => return Err(error),
        };
        if let (Some(name), Some(cluster)) = (&settings.node, &cluster) {
            known_node(name, cluster)?;
        }
        let adopted = datapath.adopted();
        report.started = report::now();
        let watch = Watch::new(|outcome| datapath.outcome(outcome).ok());
        let next_hops = NextHopResolver::new(settings.v6_pool.0.is_some());
        let mut controller = Self {
            settings,
            datapath,
            net,
            changes,
            updates,
            next_hops,
            network: None,
            planner: Planner::default(),
            told: cluster,
            cluster: None,
            drains: (0, Vec::new()),
            offers,
            offered: None,
            keyring,
            probers: BTreeMap::new(),
            peers_changed: mpsc::channel(1),
            tunnel_errors: 0,
            resetter: None,
            report,
            served: None,
            xdp_since: None,
            behind: BTreeSet::new(),
            complaints: BTreeSet::new(),
            watch,
            refusals: Refusals::default(),
            full: BTreeMap::new(),
            unreached: BTreeMap::new(),
            aliases: BTreeMap::new(),
            fills: BTreeMap::new(),
            log_level: None,
        };
        controller.datapath.forget_log_level()?;
        controller.drains = drains::kept(&controller.datapath);
        controller.cluster = controller.drained();
        controller.refusals.adopt(controller.datapath.troubles()?);
        controller.report.failing = None;
        controller.keep_report();
        let interface = controller.settings.interface.clone();
        if adopted {
            log::info!("{interface}: adopted the running datapath, with its connections");
        }
        if snapshot.link(&interface).is_some_and(|link| link.kind.is_empty() && link.mac == [0; 6]) {
            log::warn!(
                "{interface} is no interface that clients or other nodes come by: nothing will be served on it; `ip -br \
                 addr` shows which one has this node's address"
            );
        }
        let logged = match controller.settings.connection_log {
            ConnectionLog::On => controller.datapath.log_connections().map_err(Into::into),
            ConnectionLog::Off => Ok(()),
        };
        let started = match logged {
            Ok(()) => controller.sync().await.and_then(|()| Ok(controller.datapath.commit()?)),
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            controller.give_up().await;
            return Err(error.context(format!("attach to {interface}")));
        }
        let tables = controller.datapath.tables();
        let text = format!(
            "{} {} of {} node{}",
            if adopted { "took over" } else { "began to serve" },
            counted(tables.services.len(), "service"),
            tables.nodes.len(),
            if tables.nodes.len() == 1 { "" } else { "s" },
        );
        controller.record(Kind::ControllerStarted, text);
        Ok(controller)
    }

    /// Something happened here.
    pub fn record(&self, kind: Kind, text: impl Into<String>) {
        self.settings.events.record(Event::now(&self.settings.interface, kind, text));
    }

    /// Logs what somebody asked for meanwhile.
    fn look_at_log_level(&mut self) {
        let asked = self.datapath.log_level();
        if asked == self.log_level {
            return;
        }
        if let Some(level) = asked.as_ref().and_then(|text| text.parse().ok()) {
            // A warning, so that it is said at most levels, and after the change, which it confirms.
            match logging::set(&level) {
                Ok(()) => log::warn!("{level} is logged from now on"),
                Err(error) => log::warn!("change what is logged: {error}"),
            }
        }
        self.log_level = asked;
    }

    /// Follows source and network until `stop` resolves.
    pub async fn run(&mut self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let (mut source_ended, mut synced) = (false, Instant::now());
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut findings = self.settings.checks.news();
        loop {
            let pause = if self.pending() { RETRY } else { RESYNC };
            tokio::select! {
                () = &mut stop => return,
                update = self.updates.recv(), if !source_ended => {
                    source_ended = update.is_none();
                    if !self.hear(update) {
                        continue;
                    }
                },
                Some(()) = self.changes.recv() => self.network = None,
                Some(()) = self.peers_changed.1.recv() => {}
                Ok(()) = findings.changed() => {}
                _ = looks.tick(), if !self.probers.is_empty() => {
                    self.look_at_tunnel_errors();
                    continue;
                }
                _ = ticks.tick() => {
                    self.settings.pulse.beat(self.serves());
                    if let Err(error) = self.look_after_connections() {
                        log::debug!("{}: {error}", self.settings.interface);
                    }
                    self.look_at_log_level();
                    if !self.look_at_drains() && !self.offers.is_due() {
                        continue;
                    }
                }
                Ok(()) = self.settings.reload.changed() => {
                    self.record(Kind::Reloaded, "everything is looked at again, as SIGHUP asks");
                    self.network = None;
                }
                () = tokio::time::sleep_until(synced + pause) => self.network = None,
            }
            let failing = self.sync().await.err().map(|error| format!("{error:#}"));
            if let Some(error) = &failing {
                self.network = None;
                self.complain([format!("{error}; trying again")].into());
            }
            if failing != self.report.failing {
                self.report.failing = failing;
                self.keep_report();
            }
            synced = Instant::now();
        }
    }

    /// Where it shows that it is alive.
    pub fn pulse(&self) -> Arc<Pulse> {
        self.settings.pulse.clone()
    }

    /// What it serves, in a line.
    fn serves(&self) -> String {
        let tables = self.datapath.tables();
        let interface = &self.settings.interface;
        let problem = self.report.problem.as_ref().map(|problem| format!(" ({problem})")).unwrap_or_default();
        format!(
            "{interface}: {} services on {} listeners{problem}",
            tables.services.len(),
            tables.listeners.len()
        )
    }

    /// Takes note of what the source says; whether the tables may have to change.
    fn hear(&mut self, update: Option<Update>) -> bool {
        match update {
            Some(Update::State(cluster)) => {
                self.told = Some(cluster);
                self.renew();
                if self.report.problem.take().is_some() {
                    self.record(Kind::SourceBack, format!("the source is back: {}", self.report.kind));
                }
                self.report.touch();
                return true;
            }
            Some(Update::Stale(cluster, reason)) => {
                self.told = Some(cluster);
                self.renew();
                self.fail(&reason, format!("the source failed, what stands may be out of date: {reason}"));
                return true;
            }
            Some(Update::Origin(origin)) => {
                if !self.report.kind.is_empty() && self.report.kind != origin.kind {
                    let text = format!(
                        "the cluster's state comes from {} now, not {}",
                        origin.kind, self.report.kind
                    );
                    self.record(Kind::SourceChanged, text);
                }
                tell(&origin);
                (self.report.kind, self.report.why) = (origin.kind, origin.why);
            }
            Some(Update::Failed(reason) | Update::Waiting(reason)) => {
                self.fail(&reason, format!("the source failed, the last state stands: {reason}"));
            }
            None => self.fail("it ended", "the source ended, the last state stands".into()),
        }
        self.keep_report();
        false
    }

    /// Takes note of what is wrong with the source.
    fn fail(&mut self, reason: &str, complaint: String) {
        if self.report.problem.as_deref() == Some(reason) {
            return;
        }
        let first = self.report.problem.replace(reason.to_owned()).is_none();
        if first {
            self.report.touch();
            self.record(Kind::SourceLost, complaint);
        } else {
            self.complain([complaint].into());
        }
    }

    fn keep_report(&mut self) {
        if let Err(error) = self.datapath.set_report(&self.report) {
            log::debug!("keep what is known of the source: {error}");
        }
    }

    /// Leaves things as they were found.
    async fn give_up(&mut self) {
        if !self.datapath.adopted() {
            self.next_hops.release(&self.net, true).await;
        }
        let qdiscs = self.datapath.roll_back();
        let links = self.net.snapshot().await.map(|snapshot| snapshot.links).unwrap_or_default();
        for (index, _) in links.iter().filter(|(_, link)| qdiscs.contains(&link.name)) {
            self.net.drop_empty_clsact(*index).await;
        }
    }

    /// Takes the datapath away, and lets go of what was asked of the kernel.
    pub async fn remove(mut self) {
        self.next_hops.release(&self.net, true).await;
        let links = self.net.snapshot().await.map(|snapshot| snapshot.links).unwrap_or_default();
        let names: Vec<String> = links.values().map(|link| link.name.clone()).collect();
        let clsact = self.datapath.tc_hook() == TcHook::Clsact;
        self.datapath.remove(&names);
        if clsact {
            for index in links.keys() {
                self.net.drop_empty_clsact(*index).await;
            }
        }
    }

    /// Whether a task that should be offered cannot be reached yet.
    fn pending(&self) -> bool {
        self.served.is_none() || !self.behind.is_empty() || self.planner.unreached() > 0
    }

    /// Has the datapath refuse clients that say to be where this node itself or its containers are.
    fn sync_inner_ranges(&mut self, snapshot: &Snapshot) -> Result<BTreeSet<String>> {
        let mut wanted = snapshot.inner_ranges();
        // By these tasks know clients of the other family, and are known to them.
        let pool = self.settings.v6_pool.0.map(|range| (range.network().into(), range.prefix_len()));
        wanted.extend(pool.into_iter().chain([prefixes()]).map(|range| (range, inner::BRIDGE)));
        let many = wanted.len();
        let mut complaints = BTreeSet::new();
        while wanted.len() > size::INNER_RANGES {
            wanted.pop_last();
        }
        if wanted.len() < many {
            complaints.insert(format!(
                "this node's interfaces have {many} ranges and addresses, and {} fit: forged packets from the others are served",
                size::INNER_RANGES
            ));
        }
        self.datapath.set_inner_ranges(wanted)?;
        Ok(complaints)
    }

    /// Makes tables and links what source and network say they should be.
    async fn sync(&mut self) -> Result<()> {
        let snapshot = self.look().await?;
        // One that somebody has given another name is the same interface, with its programs.
        let renamed = || self.served.and_then(|index| snapshot.links.get(&index));
        let Some(uplink) = snapshot.link(&self.settings.interface).or_else(renamed).cloned() else {
            self.served = None;
            bail!("interface {} is gone; its programs went with it", self.settings.interface);
        };
        let serve = self.served != Some(uplink.index);
        // What runs there is given its programs before anything else is touched: if they are refused, nothing was.
        self.leave_former(&snapshot, &uplink);
        let adopt = serve && self.datapath.attached().is_some_and(|(index, _)| index == uplink.index);
        if adopt {
            self.attach(&snapshot, &uplink)?;
        }
        let config = self.datapath.config();
        // A bond's changes with its ports: a switch or a cloud may take no frames from another.
        if !serve && config.uplink_mac != uplink.mac {
            self.datapath.set_config(Config { uplink_mac: uplink.mac, ..config })?;
        }
        self.datapath.set_vlans(snapshot.vlans_on(uplink.index).filter_map(|link| link.vlan).collect())?;
        let mut complaints = self.sync_inner_ranges(&snapshot)?;
        complaints.extend(snapshot.unfit(&uplink));
        if uplink.name != self.settings.interface {
            complaints.insert(format!(
                "{} is called {} now, and is served as before; name it so at the next start",
                self.settings.interface, uplink.name
            ));
        }
        if let Some(mut cluster) = self.cluster.take() {
            let changed = cluster.changed.take();
            let synced = self.sync_tables(&cluster, &snapshot, &uplink, &mut complaints).await;
            self.cluster = Some(cluster);
            if synced? && let Some(delay) = changed.and_then(|changed| changed.elapsed().ok()) {
                self.report.delay.add(delay);
            }
            self.keep_report();
        }
        if serve && !adopt {
            self.attach(&snapshot, &uplink)?;
        }
        self.served = Some(uplink.index);
        complaints.extend(self.open_resetter());
        self.complain(complaints);
        Ok(())
    }

    /// The network: as it was looked at last, if that tells the next hop to all that the cluster asks for, else as it is. What
    /// has just come may not have been there.
    async fn look(&mut self) -> Result<Arc<Snapshot>> {
        if let (Some(network), Some(cluster)) =
            (self.network.clone(), self.offered.as_ref().or(self.cluster.as_ref()))
        {
            let node = self.node(cluster, &network, &mut BTreeSet::new());
            let wanted = self.planner.destinations(cluster, &node);
            if self.next_hops.found(&wanted).is_some() {
                return Ok(network);
            }
        }
        self.network = None;
        Ok(Arc::new(self.net.snapshot().await?))
    }

    /// Makes the tables what they should be; whether they were not.
    async fn sync_tables(
        &mut self,
        cluster: &ClusterState,
        snapshot: &Arc<Snapshot>,
        uplink: &Link,
        complaints: &mut BTreeSet<String>,
    ) -> Result<bool> {
        let node = self.node(cluster, snapshot, complaints);
        let offered = self.offers.of(cluster, &node, self.datapath.tables());
        self.offered = offered.clone();
        let cluster = offered.as_ref().unwrap_or(cluster);
        let addresses = snapshot.addresses_of(uplink.index);
        let wanted = self.planner.destinations(cluster, &node);
        let mut next_hops = self.find_next_hops(snapshot, uplink.index, &wanted).await;
        self.keep_one_interface(cluster, snapshot, &mut next_hops);
        complaints.extend(self.attach_beside(snapshot, uplink.index, &mut next_hops));
        let beside = beside(&next_hops, uplink.index);
        let peers = beside.iter().filter(|(role, _)| *role == Role::Peers).map(|(_, index)| *index);
        let named = |index| Some((index, snapshot.links.get(&index)?.name.clone()));
        let interfaces = peers.chain([uplink.index]).filter_map(named).collect();
        self.open_tunnel(cluster.tunnel.port, &interfaces)?;
        let cookies = self.cookies(cluster, &node);
        self.ask_peers(&mut next_hops, &outgoing(cluster, &cookies)).await;
        let named = self.settings.addresses.clone();
        let (addresses, named) = (addresses.as_slice(), named.as_slice());
        let view = View { cluster, node: &node, addresses, named, cookies: &cookies, next_hops: &next_hops };
        let limits = self.datapath.limits()?;
        let mut plan = self.planner.plan(&view, self.datapath.tables(), &limits);
        let mut changes = plan.ops.len();
        let look = if self.served.is_some() { Notice::look } else { Notice::first };
        let notice = look(&self.settings.interface, self.datapath.tables(), &plan.ops);
        self.apply(plan.ops)?;
        if plan.again {
            plan = self.planner.plan(&view, self.datapath.tables(), &limits);
            changes += plan.ops.len();
            self.apply(plan.ops)?;
        }
        complaints.extend(plan.refused);
        for event in notice.tell(self.datapath.tables()) {
            self.settings.events.record(event);
        }
        for role in Role::ALL {
            for index in self.datapath.links_beside(role) {
                if !beside.contains(&(role, index)) && !self.datapath.tables().leads(role, index) {
                    let name = snapshot.links.get(&index).map(|link| link.name.as_str());
                    self.datapath.detach_beside(role, (name, index), uplink.index);
                }
            }
        }
        if changes > 0 {
            log::debug!("{}: applied {changes} changes", self.settings.interface);
        }
        Ok(changes > 0)
    }

    /// The next hop to each destination; those that are known stand as long as nothing changes in the network.
    async fn find_next_hops(
        &mut self,
        snapshot: &Arc<Snapshot>,
        uplink: u32,
        wanted: &BTreeSet<(IpAddr, Reach)>,
    ) -> NextHops {
        if self.network.is_some()
            && let Some(found) = self.next_hops.found(wanted)
        {
            return found;
        }
        let mut network = snapshot.clone();
        let others = self.other_uplinks(&network);
        let mut found = self.next_hops.find(&self.net, &network, (uplink, &others), wanted).await;
        // Neighbours that were asked for just now: tables that are filled without them are filled twice.
        let deadline = Instant::now() + ANSWER;
        while self.served.is_none()
            && found.values().any(Result::is_err)
            && timeout_at(deadline, self.changes.recv()).await.is_ok_and(|change| change.is_some())
            && let Ok(latest) = self.net.snapshot().await
        {
            network = Arc::new(latest);
            found = self.next_hops.find(&self.net, &network, (uplink, &others), wanted).await;
        }
        self.network = Some(network);
        found
    }

    /// Applies operations in their order. What a failure leaves is planned anew from what the tables say.
    fn apply(&mut self, ops: Vec<MapOp>) -> Result<()> {
        if ops.is_empty() {
            return Ok(());
        }
        let applied = ops.into_iter().try_for_each(|op| self.datapath.apply(op));
        if applied.is_err() {
            self.planner.forget();
        }
        self.settings.changed.mark();
        applied.with_context(|| format!("apply a change to the tables of {}", self.settings.interface))
    }

    /// The uplinks of other datapaths of this machine: of this agent's, and of others'.
    fn other_uplinks(&self, snapshot: &Snapshot) -> BTreeSet<String> {
        let attached = datapath::attached_interfaces().unwrap_or_default();
        let names = attached.into_iter().chain(self.settings.others.iter().cloned());
        names.filter(|name| *name != self.settings.interface && snapshot.link(name).is_some()).collect()
    }

    /// This node's name: as it was told, or that of the node which has an address of this machine.
    fn node(&self, cluster: &ClusterState, snapshot: &Snapshot, complaints: &mut BTreeSet<String>) -> String {
        // What the source found out by the node's certificate nobody says otherwise.
        if let Some(this) = &cluster.this {
            return this.clone();
        }
        if let Some(name) = &self.settings.node {
            if !cluster.nodes.iter().any(|node| node.name == *name) {
                complaints.insert(format!("the cluster has no node named {name:?}"));
            }
            return name.clone();
        }
        // Nobody is part of an empty cluster.
        if cluster.nodes.is_empty() && cluster.services.is_empty() {
            return String::new();
        }
        let own: BTreeSet<IpAddr> = snapshot.addresses.iter().map(|(_, address)| *address).collect();
        let this =
            cluster.nodes.iter().find(|node| node.addresses.iter().any(|address| own.contains(address)));
        match this {
            Some(node) => node.name.clone(),
            None => {
                complaints.insert(
                    "no node of the cluster has an address of this machine; name it with --node".into(),
                );
                String::new()
            }
        }
    }

    /// Says what is wrong, once for as long as it is.
    fn complain(&mut self, complaints: BTreeSet<String>) {
        for complaint in complaints.difference(&self.complaints) {
            self.record(Kind::Problem, complaint);
        }
        self.complaints = complaints;
    }

    /// What it was asked to do.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The datapath in its hands.
    pub fn datapath(&self) -> &Datapath {
        &self.datapath
    }
}

fn tell(origin: &Origin) {
    log::info!("the cluster's state comes from {}: {}", origin.kind, origin.why);
    if origin.kind == crate::source::docker::OUTSIDE {
        log::warn!(
            "this Docker is in no swarm, so there is nothing to serve: `docker swarm init` makes one, `docker swarm join` \
             joins one; no restart is needed"
        );
    }
}

/// Refuses a name of this node that the cluster does not have. An empty cluster has nobody's.
fn known_node(name: &str, cluster: &ClusterState) -> Result<()> {
    if cluster.nodes.is_empty() || cluster.nodes.iter().any(|node| node.name == name) {
        return Ok(());
    }
    let names: Vec<&str> = cluster.nodes.iter().map(|node| node.name.as_str()).collect();
    bail!(
        "--node {name}: the cluster has no such node{}; it has {}",
        datapath::Hint::nearest(name, names.iter().copied()),
        names.join(", ")
    )
}

/// A number and what it counts.
pub fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The source's first word: a state, or none yet from one that is waited for.
async fn first(
    updates: &mut mpsc::Receiver<Update>,
    report: &mut SourceReport,
) -> Result<Option<ClusterState>> {
    loop {
        match updates.recv().await {
            Some(Update::State(cluster)) => {
                report.problem = None;
                report.touch();
                return Ok(Some(cluster));
            }
            Some(Update::Stale(cluster, reason)) => {
                report.problem = Some(reason);
                report.touch();
                return Ok(Some(cluster));
            }
            Some(Update::Origin(origin)) => {
                tell(&origin);
                (report.kind, report.why) = (origin.kind, origin.why);
            }
            Some(Update::Waiting(reason)) => {
                log::warn!("waiting for the cluster's state: {reason}");
                report.problem = Some(reason);
                report.touch();
                return Ok(None);
            }
            Some(Update::Failed(reason)) => return Err(anyhow!(reason)),
            None => return Err(anyhow!("the source ended before it said anything")),
        }
    }
}

/// The interfaces beside the uplink, and what for.
fn beside(next_hops: &NextHops, uplink: u32) -> BTreeSet<(Role, u32)> {
    let known = next_hops.iter().filter_map(|((_, reach), next_hop)| Some((*reach, next_hop.as_ref().ok()?)));
    let there =
        known.flat_map(|(reach, next_hop)| roles(reach, next_hop).map(|role| (role, next_hop.ifindex)));
    there.filter(|(_, index)| *index != uplink).collect()
}

/// What the interface of a next hop is there for.
fn roles(reach: Reach, next_hop: &NextHop) -> impl Iterator<Item = Role> + use<> {
    let translated = next_hop.flags & TRANSLATED != 0;
    [role(reach)].into_iter().chain(translated.then_some(Role::Translated))
}

/// What an interface is there for by which this is reached.
const fn role(reach: Reach) -> Role {
    match reach {
        Reach::Peer => Role::Peers,
        Reach::Local | Reach::Translated | Reach::Snat | Reach::Routed => Role::Tasks,
    }
}
