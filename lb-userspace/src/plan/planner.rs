//! What is remembered from one plan to the next, so that a plan costs what has changed, not what there is.
//!
//! A service is planned anew when it, or something that it depends on, differs from what the last plan was made of. That
//! needs to know what belongs to it in the tables: the [`AllocationIndex`]. It is true as long as every plan was applied whole;
//! after one that was not, [`Planner::forget`] has them read from the tables again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    Plan,
    allocation_index::AllocationIndex,
    desired::{self, DesiredNode, NextHops, Reach, Reaching, Scene, View, is_shown},
    table_builder::{Limits, Refusal, ServiceEntries, TableBuilder},
    tables::{MapOp, Tables},
    transition::transition,
};
use crate::cluster::{Access, ClusterState, Node, Return, Service};

/// Plans, and remembers what it has planned.
#[derive(Default)]
pub struct Planner {
    /// By name: services of the cluster, and those that the tables still have.
    entries: HashMap<String, Entry>,
    /// The cluster's services as they were seen last.
    services: Vec<Arc<Service>>,
    nodes: Vec<Node>,
    node: String,
    /// How many tasks ask for the next hop to an address.
    destinations: BTreeMap<(IpAddr, Reach), u32>,
    /// Services to plan anew.
    due: BTreeSet<String>,
    /// Services of which something was left out.
    noted: BTreeSet<String>,
    /// Counts the looks at the cluster.
    look: u64,
    /// What the last plan was made of.
    around: Around,
    allocations: Option<AllocationIndex>,
    /// Backends that should be reached, and are not.
    unreached: usize,
}

/// A service, and what became of it.
#[derive(Default)]
struct Entry {
    /// As the cluster has it; none if it has gone.
    service: Option<Arc<Service>>,
    /// The look that saw it last, unless it stood where it was.
    look: u64,
    destinations: Vec<(IpAddr, Reach)>,
    in_tables: ServiceEntries,
    /// What was left out, in words for the operator.
    said: Vec<String>,
    refused: bool,
    /// For want of room.
    crowded: bool,
    unreached: usize,
}

/// What many services depend on.
#[derive(Default)]
struct Around {
    addresses: Vec<IpAddr>,
    returns: Return,
    /// Whether this node lies in a zone.
    zoned: bool,
    next_hops: NextHops,
    nodes: Vec<DesiredNode>,
    /// What was left out of them.
    refused: Vec<String>,
    /// Whom no service takes.
    denied: BTreeSet<IpNet>,
    /// That some of them are taken after all, for want of room.
    undenied: Option<String>,
}

/// A service was left out for something that another service has which would come after it: only a plan of all of them
/// can tell who is first.
struct Unordered;

impl Planner {
    /// The addresses to which a next hop must be known, and how each is to be reached.
    pub fn destinations(&mut self, cluster: &ClusterState, node: &str) -> BTreeSet<(IpAddr, Reach)> {
        self.follow(cluster, node);
        let peers = cluster.nodes.iter().filter(|other| other.agent && other.name != node);
        let peers = peers.flat_map(|peer| &peer.addresses).map(|address| (*address, Reach::Peer));
        peers.chain(self.destinations.keys().copied()).collect()
    }

    /// The operations that make the tables mean what the view asks for.
    ///
    /// A service that does not fit is left out whole and named in [`Plan::refused`]; what fits is planned. All operations
    /// must be applied before the next plan is asked for, or everything be forgotten.
    pub fn plan(&mut self, view: &View<'_>, actual: &Tables, limits: &Limits) -> Plan {
        self.follow(view.cluster, view.node);
        loop {
            // With all services on the table the order is known, so that this ends with the second turn at most.
            if let Ok(plan) = self.attempt(view, actual, limits) {
                return plan;
            }
            self.forget();
        }
    }

    /// Forgets what was planned: the next plan is made of what the tables say.
    pub fn forget(&mut self) {
        self.allocations = None;
    }

    /// How many backends should be offered, and cannot be reached.
    pub fn unreached(&self) -> usize {
        self.unreached
    }

    /// Takes note of what the cluster's services and nodes are now.
    fn follow(&mut self, cluster: &ClusterState, node: &str) {
        let moved = self.node != node || self.nodes != cluster.nodes;
        let known = if moved { Vec::new() } else { std::mem::take(&mut self.services) };
        if moved {
            node.clone_into(&mut self.node);
            self.nodes.clone_from(&cluster.nodes);
        }
        let stays = |index: usize| match (known.get(index), cluster.services.get(index)) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            _ => false,
        };
        let reaching = Reaching::new(&cluster.nodes, node);
        self.look += 1;
        for (_, service) in cluster.services.iter().enumerate().filter(|(index, _)| !stays(*index)) {
            if is_shown(service) {
                self.meet(service, &reaching, moved);
            }
        }
        let gone: Vec<String> = if moved {
            let unseen = self.entries.iter().filter(|(_, entry)| entry.look != self.look);
            unseen.map(|(name, _)| name.clone()).collect()
        } else {
            let before = known.iter().enumerate().filter(|(index, _)| !stays(*index));
            let names = before.map(|(_, service)| &service.name);
            names
                .filter(|name| self.entries.get(*name).is_some_and(|e| e.look != self.look))
                .cloned()
                .collect()
        };
        gone.into_iter().for_each(|name| self.part(name));
        self.services.clone_from(&cluster.services);
    }

    /// A service that is new, has changed, or stands elsewhere than before.
    fn meet(&mut self, service: &Arc<Service>, reaching: &Reaching<'_>, moved: bool) {
        if !self.entries.contains_key(&service.name) {
            self.entries.insert(service.name.clone(), Entry::default());
        }
        let Some(entry) = self.entries.get_mut(&service.name) else {
            return;
        };
        entry.look = self.look;
        let same = entry.service.as_ref().is_some_and(|known| Arc::ptr_eq(known, service));
        if same && !moved {
            return;
        }
        let destinations = reaching.destinations(service);
        let led_elsewhere = destinations != entry.destinations;
        let before = std::mem::replace(&mut entry.destinations, destinations);
        for to in &entry.destinations {
            *self.destinations.entry(*to).or_default() += 1;
        }
        entry.service = Some(service.clone());
        self.let_go(&before);
        if !same || led_elsewhere {
            self.due.insert(service.name.clone());
        }
    }

    /// A service that has gone.
    fn part(&mut self, name: String) {
        if let Some(entry) = self.entries.get_mut(&name)
            && entry.service.take().is_some()
        {
            let before = std::mem::take(&mut entry.destinations);
            self.let_go(&before);
            self.due.insert(name);
        }
    }

    fn let_go(&mut self, destinations: &[(IpAddr, Reach)]) {
        for to in destinations {
            if let Some(count) = self.destinations.get_mut(to) {
                *count -= 1;
                if *count == 0 {
                    self.destinations.remove(to);
                }
            }
        }
    }

    fn attempt(&mut self, view: &View<'_>, actual: &Tables, limits: &Limits) -> Result<Plan, Unordered> {
        let complete = self.allocations.is_none();
        let (allocations, orphans) = match self.allocations.take() {
            Some(allocations) => (allocations, Vec::new()),
            None => self.read(actual),
        };
        let mut builder = TableBuilder::new(actual, limits, allocations);
        self.look_around(view, complete, &mut builder);
        let due = std::mem::take(&mut self.due);
        orphans.iter().for_each(|in_tables| builder.withdraw(in_tables));
        self.deny(view, complete, &mut builder);
        let mut before: HashMap<&str, ServiceEntries> = HashMap::new();
        for name in &due {
            if let Some(entry) = self.entries.get_mut(name) {
                let in_tables = std::mem::take(&mut entry.in_tables);
                builder.withdraw(&in_tables);
                before.insert(name, in_tables);
            }
        }
        let nodes = std::mem::take(&mut self.around.nodes);
        let scene = Scene::new(view, &nodes);
        for name in &due {
            let in_tables = before.remove(name.as_str()).unwrap_or_default();
            self.settle(name, &in_tables, complete, &scene, &mut builder)?;
        }
        self.around.nodes = nodes;
        let (next, allocations) = builder.finish();
        self.allocations = Some(allocations);
        let ops = transition(next);
        let crowded = !self.around.refused.is_empty()
            || self.around.undenied.is_some()
            || self.noted.iter().filter_map(|name| self.entries.get(name)).any(|entry| entry.crowded);
        Ok(Plan { again: crowded && ops.iter().any(MapOp::frees), ops, refused: self.refused() })
    }

    /// Puts a service in as it is now; what it had before was taken out.
    fn settle(
        &mut self,
        name: &str,
        before: &ServiceEntries,
        complete: bool,
        scene: &Scene<'_>,
        builder: &mut TableBuilder<'_>,
    ) -> Result<(), Unordered> {
        let Some(entry) = self.entries.get_mut(name) else {
            return Ok(());
        };
        self.unreached -= std::mem::take(&mut entry.unreached);
        entry.said.clear();
        self.noted.remove(name);
        let Some(service) = entry.service.clone() else {
            self.entries.remove(name);
            return Ok(());
        };
        let mut wanted = scene.service(&service);
        let closed = !builder.has_room_for_list(&wanted, before);
        if closed && !complete {
            return Err(Unordered);
        }
        if closed {
            // Left out it would be served by Swarm's mesh, which knows no list.
            wanted.access = Access::closed().ranges();
            let room = builder.room_for_ranges();
            entry.said.push(format!(
                "service {name}: nobody may connect: there is room for {room} ranges in the lists of all services; allow or deny \
                 fewer, wider ones"
            ));
        }
        match builder.add(&wanted, before) {
            Ok(in_tables) => {
                (entry.in_tables, entry.refused, entry.crowded) = (in_tables, closed, closed);
                entry.unreached = wanted.backends.iter().filter(|backend| backend.unreached).count();
            }
            Err(Refusal::Taken(owner, _)) if !complete && owner.as_str() > name => return Err(Unordered),
            Err(Refusal::Full(_)) if !complete => return Err(Unordered),
            Err(refusal) => {
                (entry.refused, entry.crowded) = (true, matches!(refusal, Refusal::Full(_)));
                entry.said.push(format!("service {name} is left out: {}", refusal.reason()));
            }
        }
        self.unreached += entry.unreached;
        if !entry.said.is_empty() {
            self.noted.insert(name.to_owned());
        }
        Ok(())
    }

    /// Whom no service takes, after those of before were withdrawn.
    fn deny(&mut self, view: &View<'_>, complete: bool, builder: &mut TableBuilder<'_>) {
        let (around, wanted) = (&mut self.around, view.cluster.denied_ranges());
        if !complete && around.denied == wanted && around.undenied.is_none() {
            return;
        }
        let known = if complete { BTreeSet::new() } else { std::mem::take(&mut around.denied) };
        let left_out = builder.deny(&known, &wanted);
        around.undenied = (left_out > 0).then(|| {
            format!(
                "{left_out} of {} ranges of clients whom no service is to take are not denied: there is room for {} \
                 beside the lists of services; deny fewer, wider ones",
                wanted.len(),
                builder.room_for_denied()
            )
        });
        around.denied = wanted;
    }

    /// Looks at what services depend on, and marks those that must be planned anew.
    fn look_around(&mut self, view: &View<'_>, complete: bool, builder: &mut TableBuilder<'_>) {
        let returns = view.cluster.tunnel.returns;
        let next_hops = changed_next_hops(&self.around.next_hops, view.next_hops);
        let served = view.served();
        let zoned = !desired::zone(view).is_empty();
        let same =
            self.around.addresses == served && self.around.returns == returns && self.around.zoned == zoned;
        let mut all = complete || !same;
        let mut nodes = HashSet::new();
        let peers = builder.has_peers();
        let before = std::mem::take(&mut self.around.nodes);
        let numbers: HashMap<String, Option<u32>> =
            before.iter().map(|node| (node.label.name.clone(), builder.node(&node.label.name))).collect();
        let mut refused = Vec::new();
        let now = desired::nodes(view, &mut refused);
        if all || now != before || !self.around.refused.is_empty() {
            builder.set_nodes(&now, &mut refused);
            all |= builder.has_peers() != peers;
            let known: HashMap<&str, &DesiredNode> =
                before.iter().map(|node| (node.label.name.as_str(), node)).collect();
            for node in &now {
                let name = node.label.name.as_str();
                let number = numbers.get(name).copied().flatten();
                if known.get(name) != Some(&node) || number != builder.node(name) {
                    nodes.insert(name.to_owned());
                }
            }
            self.around.refused = refused;
        }
        self.around.nodes = now;
        if !same {
            (self.around.addresses, self.around.returns, self.around.zoned) = (served, returns, zoned);
        }
        for name in self.entries.iter().filter(|(_, entry)| {
            let leads = |service: &Arc<Service>| service.tasks.iter().any(|task| nodes.contains(&task.node));
            all || entry.refused
                || !next_hops.is_empty() && entry.destinations.iter().any(|to| next_hops.contains(to))
                || !nodes.is_empty() && entry.service.as_ref().is_some_and(leads)
        }) {
            self.due.insert(name.0.clone());
        }
        if !next_hops.is_empty() {
            self.around.next_hops.clone_from(view.next_hops);
        }
    }

    /// What was left out, nodes first.
    fn refused(&self) -> Vec<String> {
        let said = self.noted.iter().filter_map(|name| self.entries.get(name)).flat_map(|entry| &entry.said);
        self.around.undenied.iter().chain(&self.around.refused).chain(said).cloned().collect()
    }

    /// Finds out what belongs to whom in the tables, and what to no service that has a name.
    fn read(&mut self, actual: &Tables) -> (AllocationIndex, Vec<ServiceEntries>) {
        let mut in_tables: HashMap<u32, ServiceEntries> = HashMap::new();
        for (cursor, label) in &actual.ports {
            in_tables.entry(label.service).or_default().ports.push(*cursor);
        }
        for (index, entry) in &actual.backends {
            in_tables.entry(entry.backend.service).or_default().backends.push(*index);
        }
        for (at, listener) in &actual.listeners {
            in_tables.entry(listener.service).or_default().listeners.push(*at);
        }
        let service =
            |index: &u32| actual.backends.get(index).map_or(u32::MAX, |entry| entry.backend.service);
        for (at, task) in &actual.endpoints {
            in_tables.entry(service(&task.backend)).or_default().endpoints.push(*at);
        }
        for (key, index) in &actual.tasks {
            in_tables.entry(service(index)).or_default().tasks.push(*key);
        }
        for of in actual.access.keys() {
            in_tables.entry(of.0).or_default().access.push(*of);
        }
        for entry in self.entries.values_mut() {
            entry.in_tables = ServiceEntries::default();
        }
        for (number, label) in &actual.services {
            let in_tables =
                ServiceEntries { number: Some(*number), ..in_tables.remove(number).unwrap_or_default() };
            self.entries.entry(label.name.clone()).or_default().in_tables = in_tables;
        }
        (AllocationIndex::of(actual), in_tables.into_values().collect())
    }
}

/// The destinations to which the next hop is another than before.
fn changed_next_hops(before: &NextHops, now: &NextHops) -> HashSet<(IpAddr, Reach)> {
    let gone = before.keys().filter(|to| !now.contains_key(to));
    let other = now.iter().filter(|(to, next_hop)| before.get(to) != Some(next_hop)).map(|(to, _)| to);
    gone.chain(other).copied().collect()
}
