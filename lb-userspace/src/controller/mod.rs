//! The controller of one interface: joins what the source says with what the kernel says, and keeps the tables
//! true. It owns the order of things; each thing is done elsewhere.

mod attach;
mod connections;

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
pub use attach::name;
use lb_common::{
    abi::{Config, Mode},
    net::Be16,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use crate::{
    cluster::ClusterState,
    datapath::{self, Datapath, DatapathError, FlowLog, Sizes, TcHook},
    limits::Watch,
    net::{Changes, Found, Link, Net, Prober, Resetter, Snapshot, Ways},
    plan::{MapOp, Planner, Reach, View},
    report::SourceReport,
    source::{Origin, Update},
    text,
};

/// What a controller is asked to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The uplink.
    pub interface: String,
    /// Name of this node; `None` finds it by the machine's addresses.
    pub node: Option<String>,
    /// How to serve the uplink; `None` takes the best that works.
    pub mode: Option<Mode>,
    /// Sizes of the tables.
    pub sizes: Sizes,
    /// Source ports for snat, inclusive.
    pub snat_ports: [u16; 2],
    /// Whether each new flow is logged.
    pub flow_log: FlowLog,
    /// How long another node's datapath may be silent before new connections go elsewhere.
    pub peer_timeout: Duration,
    /// New connections a second above which they are placed by hash, if not as the table's size asks; zero is never.
    pub flood_rate: Option<u32>,
    /// How long the datapath serves without a controller; `None` is for ever.
    pub stale_after: Option<Duration>,
    /// Whether what is pinned and does not fit is removed.
    pub replace_state: bool,
}

/// The controller of one interface.
pub struct Controller {
    settings: Settings,
    datapath: Datapath,
    net: Net,
    changes: Changes,
    updates: mpsc::Receiver<Update>,
    ways: Ways,
    /// The network as it was looked at last, unless something has changed in it since.
    network: Option<Arc<Snapshot>>,
    planner: Planner,
    cluster: Option<ClusterState>,
    /// Asks other nodes' datapaths whether they are there; none before the tunnel's port is known.
    prober: Option<Prober>,
    /// Tells the ends of idle connections; none before a service asks for it, or where the kernel refuses.
    resetter: Option<Resetter>,
    /// What is said of the source, for the verbs.
    report: SourceReport,
    /// Interface index the uplink's programs were attached to in this life.
    served: Option<u32>,
    /// When XDP came, while frames may be on their way that it has not seen.
    xdp_since: Option<Instant>,
    /// Interfaces of tasks on which a former controller's program runs yet.
    behind: BTreeSet<u32>,
    /// What was last complained about, so that it is said once.
    complaints: BTreeSet<String>,
    /// Whether the flood guard was on when it was last looked at.
    flooded: bool,
    /// Limits that the datapath has run into.
    watch: Watch,
}

/// A destination without a way is looked for again after this time, though nothing was heard of it.
const RETRY: Duration = Duration::from_secs(1);
/// Flows are looked after once in this time.
const TICK: Duration = Duration::from_secs(1);
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
            return Err(DatapathError::NoInterface(settings.interface.clone()).into());
        }
        let open = || Datapath::open(&settings.interface, &settings.sizes, settings.flow_log);
        let datapath = match open() {
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
        let mut report = datapath.report().unwrap_or_default();
        let cluster = match (first(&mut updates, &mut report).await, datapath.adopted()) {
            (Ok(cluster), _) => cluster,
            (Err(error), true) => {
                log::warn!("{}: {error:#}; the adopted tables stand", settings.interface);
                None
            }
            (Err(error), false) => return Err(error),
        };
        let adopted = datapath.adopted();
        let mut controller = Self {
            settings,
            datapath,
            net,
            changes,
            updates,
            ways: Ways::default(),
            network: None,
            planner: Planner::default(),
            cluster,
            prober: None,
            resetter: None,
            report,
            served: None,
            xdp_since: None,
            behind: BTreeSet::new(),
            complaints: BTreeSet::new(),
            flooded: false,
            watch: Watch::default(),
        };
        controller.keep_report();
        let interface = controller.settings.interface.clone();
        if adopted {
            log::info!("{interface}: adopted the running datapath, with its connections");
        }
        let logged = match controller.settings.flow_log {
            FlowLog::On => controller.datapath.log_flows().map_err(Into::into),
            FlowLog::Off => Ok(()),
        };
        let started = match logged {
            Ok(()) => controller.sync().await.and_then(|()| Ok(controller.datapath.commit()?)),
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            controller.give_up().await;
            return Err(error.context(format!("attach to {interface}")));
        }
        Ok(controller)
    }

    /// Follows source and network until `stop` resolves.
    pub async fn run(&mut self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let (mut source_ended, mut synced) = (false, Instant::now());
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
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
                () = silence(self.prober.as_mut()) => {}
                _ = ticks.tick() => {
                    if let Err(error) = self.look_after_connections() {
                        log::debug!("{}: {error}", self.settings.interface);
                    }
                    continue;
                }
                () = tokio::time::sleep_until(synced + pause) => self.network = None,
            }
            if let Err(error) = self.sync().await {
                self.network = None;
                self.complain([format!("{error:#}; trying again")].into());
            }
            synced = Instant::now();
        }
    }

    /// Takes note of what the source says; whether the tables may have to change.
    fn hear(&mut self, update: Option<Update>) -> bool {
        match update {
            Some(Update::State(cluster)) => {
                self.cluster = Some(cluster);
                self.report.problem = None;
                self.report.touch();
                return true;
            }
            Some(Update::Stale(cluster, reason)) => {
                self.cluster = Some(cluster);
                self.fail(&reason, format!("the source failed, what stands may be out of date: {reason}"));
                return true;
            }
            Some(Update::Origin(origin)) => {
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
        if self.report.problem.is_none() {
            self.report.touch();
        }
        self.report.problem = Some(reason.to_owned());
        self.complain([complaint].into());
    }

    fn keep_report(&mut self) {
        if let Err(error) = self.datapath.set_report(&self.report) {
            log::debug!("keep what is known of the source: {error}");
        }
    }

    /// Leaves things as they were found.
    async fn give_up(&mut self) {
        if !self.datapath.adopted() {
            self.ways.release(&self.net, true).await;
        }
        let qdiscs = self.datapath.roll_back();
        let links = self.net.snapshot().await.map(|snapshot| snapshot.links).unwrap_or_default();
        for (index, _) in links.iter().filter(|(_, link)| qdiscs.contains(&link.name)) {
            self.net.drop_empty_clsact(*index).await;
        }
    }

    /// Takes the datapath away, and lets go of what was asked of the kernel.
    pub async fn remove(mut self) {
        self.ways.release(&self.net, true).await;
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

    /// Makes tables and links what source and network say they should be.
    async fn sync(&mut self) -> Result<()> {
        let snapshot = self.look().await?;
        let Some(uplink) = snapshot.link(&self.settings.interface).cloned() else {
            self.served = None;
            bail!("interface {} is gone; its programs went with it", self.settings.interface);
        };
        let serve = self.served != Some(uplink.index);
        // What runs there is given its programs before anything else is touched: if they are refused, nothing was.
        let adopt = serve && self.datapath.attached().is_some_and(|(index, _)| index == uplink.index);
        if adopt {
            self.attach(&snapshot, &uplink)?;
        }
        let mut complaints = BTreeSet::new();
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

    /// The network: as it was looked at last, if that tells the way to all that the cluster asks for, else as it is. What
    /// has just come may not have been there.
    async fn look(&mut self) -> Result<Arc<Snapshot>> {
        if let (Some(network), Some(cluster)) = (self.network.clone(), &self.cluster) {
            let node = self.node(cluster, &network, &mut BTreeSet::new());
            let wanted = self.planner.destinations(cluster, &node);
            if self.ways.found(&wanted).is_some() {
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
        self.open_tunnel(cluster.tunnel.port, uplink.index)?;
        let addresses = snapshot.addresses_of(uplink.index);
        let wanted = self.planner.destinations(cluster, &node);
        let mut ways = self.find_ways(snapshot, uplink.index, &wanted).await;
        self.ask_peers(&mut ways).await;
        let carriers = carriers(&ways, uplink.index);
        complaints.extend(self.attach_carriers(snapshot, uplink.index, &carriers, &mut ways));
        let view = View { cluster, node: &node, addresses: &addresses, ways: &ways };
        let limits = self.datapath.limits()?;
        let mut plan = self.planner.plan(&view, self.datapath.tables(), &limits);
        let mut changes = plan.ops.len();
        self.apply(plan.ops)?;
        if plan.again {
            plan = self.planner.plan(&view, self.datapath.tables(), &limits);
            changes += plan.ops.len();
            self.apply(plan.ops)?;
        }
        complaints.extend(plan.refused);
        for index in self.datapath.task_links() {
            if !carriers.contains(&index) && !self.in_use(index) {
                let name = snapshot.links.get(&index).map(|link| link.name.as_str());
                self.datapath.detach_task(name, index, uplink.index);
            }
        }
        if changes > 0 {
            log::debug!("{}: applied {changes} changes", self.settings.interface);
        }
        Ok(changes > 0)
    }

    /// The way to each destination; those that are known stand as long as nothing changes in the network.
    async fn find_ways(
        &mut self,
        snapshot: &Arc<Snapshot>,
        uplink: u32,
        wanted: &BTreeSet<(IpAddr, Reach)>,
    ) -> Found {
        if self.network.is_some()
            && let Some(found) = self.ways.found(wanted)
        {
            return found;
        }
        let mut network = snapshot.clone();
        let mut found = self.ways.find(&self.net, &network, uplink, wanted).await;
        // Neighbours that were asked for just now: tables that are filled without them are filled twice.
        let deadline = Instant::now() + ANSWER;
        while self.served.is_none()
            && found.values().any(Result::is_err)
            && timeout_at(deadline, self.changes.recv()).await.is_ok_and(|change| change.is_some())
            && let Ok(latest) = self.net.snapshot().await
        {
            network = Arc::new(latest);
            found = self.ways.find(&self.net, &network, uplink, wanted).await;
        }
        self.network = Some(network);
        found
    }

    /// Asks the datapaths of the other nodes whether they are there, and marks the ways to those that are not.
    async fn ask_peers(&mut self, ways: &mut Found) {
        let Some(prober) = &self.prober else {
            return;
        };
        let peers = ways.iter().filter(|((_, reach), way)| *reach == Reach::Peer && way.is_ok());
        let peers: BTreeSet<IpAddr> = peers.map(|((address, _), _)| *address).collect();
        prober.follow(&peers);
        if self.served.is_none() {
            prober.settle(ANSWER).await;
        }
        for (address, reason) in prober.silent() {
            if let Some(Ok(way)) = ways.get_mut(&(address, Reach::Peer)) {
                way.silent = Some(reason);
            }
        }
    }

    /// Tells the programs which port the tunnel has, and asks other nodes by it.
    fn open_tunnel(&mut self, port: u16, uplink: u32) -> Result<()> {
        let interface = self.settings.interface.clone();
        if !self.prober.as_ref().is_some_and(|prober| prober.asks(port, uplink)) {
            self.prober = None;
            let prober = Prober::start((&interface, uplink), port, self.settings.peer_timeout);
            let prober = prober.context("open a socket for probes to other nodes")?;
            if !prober.has_port() {
                log::warn!(
                    "{interface}: another program has UDP port {port}, which is the tunnel's; of what comes to it only other \
                     nodes' tunnel packets are taken"
                );
            }
            self.prober = Some(prober);
        }
        let config = self.datapath.config();
        if config.tunnel_port != Be16::new(port) {
            self.datapath.set_config(Config { tunnel_port: Be16::new(port), ..config })?;
        }
        Ok(())
    }

    /// Applies operations in their order. What a failure leaves is planned anew from what the tables say.
    fn apply(&mut self, ops: Vec<MapOp>) -> Result<()> {
        let applied = ops.into_iter().try_for_each(|op| self.datapath.apply(op));
        if applied.is_err() {
            self.planner.forget();
        }
        applied.with_context(|| format!("apply a change to the tables of {}", self.settings.interface))
    }

    /// Whether a backend is reached by this interface.
    fn in_use(&self, index: u32) -> bool {
        self.datapath.tables().backends.values().any(|entry| entry.backend.ifindex == index)
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
            log::warn!("{}: {}", self.settings.interface, text::clean(complaint));
        }
        self.complaints = complaints;
    }

    /// The datapath in its hands.
    pub fn datapath(&self) -> &Datapath {
        &self.datapath
    }
}

fn tell(origin: &Origin) {
    log::info!("the cluster's state comes from {}: {}", origin.kind, origin.why);
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

/// Resolves when another node falls silent or is heard again.
async fn silence(prober: Option<&mut Prober>) {
    match prober {
        Some(prober) => prober.changed().await,
        None => std::future::pending().await,
    }
}

/// The interfaces by which tasks answer, other than the uplink.
fn carriers(ways: &Found, uplink: u32) -> BTreeSet<u32> {
    ways.values().flatten().map(|way| way.ifindex).filter(|index| *index != uplink).collect()
}
