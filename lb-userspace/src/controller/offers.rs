//! What becomes of the cluster before it is planned: what checks found of this node's tasks, and how much of new connections
//! those tasks get that have just come.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use lb_common::backend::State;

use crate::{
    check::{
        Check,
        runner::{Asked, Checks},
    },
    cluster::{ClusterState, Protocol, Service, Task, TaskState},
    plan::Tables,
    translation::own,
};

/// A task that has just come gets a tenth of its share, then two, up to the whole.
const STEPS: u16 = 10;
/// Services start gently while they take this part of the slots together: each share is ten meanwhile, and for a moment twice. Others
/// start at once.
const ROOM: u64 = 8;

/// What this node makes of the cluster for itself.
pub struct Offers {
    interface: String,
    checks: Checks,
    /// The tasks of services that start gently, by name, that take new connections here; and how far those are that have just
    /// come.
    takers: HashMap<String, Option<Rise>>,
    /// Tasks of this node that did not take what they were given, by name: asked whether they do.
    suspects: HashMap<String, Suspect>,
    /// Whether anybody has looked: who takes them before that has not just come.
    begun: bool,
    /// The services that were offered otherwise than they are told, by name: one that is so again is the same one to the planner.
    last: HashMap<String, Arc<Service>>,
}

/// A task that did not take what it was given may be asked by whoever could make it look so: what counts is what it answers its own
/// node, a second from one answer to the next question, and more while it answers none.
const ASKED_EACH: u32 = 1_000;
/// A suspect is asked at so many ports at most, each of which may take two seconds.
const MOST_ASKED: usize = 8;
/// A suspect that takes connections when it is asked is none after this time.
const CLEARED: Duration = Duration::from_secs(5);

/// A task that is asked whether it takes connections.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    since: Instant,
    /// Whether it is asked already.
    asked: bool,
}

/// A task on its way to its whole share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rise {
    since: Instant,
    over: Duration,
    /// At which step it was offered last.
    step: u16,
}

impl Rise {
    fn step(&self, now: Instant) -> u16 {
        let passed = now.saturating_duration_since(self.since).as_millis() * u128::from(STEPS);
        let step = passed / self.over.as_millis().max(1) + 1;
        u16::try_from(step).unwrap_or(STEPS).min(STEPS)
    }
}

impl Offers {
    /// Of an interface whose tasks these checks ask.
    pub fn new(interface: &str, checks: Checks) -> Self {
        Self {
            interface: interface.to_owned(),
            checks,
            takers: HashMap::new(),
            suspects: HashMap::new(),
            begun: false,
            last: HashMap::new(),
        }
    }

    /// The cluster as this node offers it; none where that is as it is told. What the tables say of tasks that were there before
    /// stands until they have been asked.
    pub fn of(&mut self, cluster: &ClusterState, node: &str, tables: &Tables) -> Option<ClusterState> {
        self.follow_checks(cluster, node, tables);
        let found = self.found(cluster, node);
        let slots = tables.slots.len() as u64;
        let eased = self.eased(found.as_ref().unwrap_or(cluster), slots, Instant::now());
        let mut offered = eased.or(found)?;
        let mut last = HashMap::new();
        for (service, told) in offered.services.iter_mut().zip(&cluster.services) {
            if Arc::ptr_eq(service, told) {
                continue;
            }
            if let Some(known) = self.last.remove(&service.name).filter(|known| known == service) {
                *service = known;
            }
            last.insert(service.name.clone(), Arc::clone(service));
        }
        self.last = last;
        Some(offered)
    }

    /// Whether it would be offered otherwise by now.
    pub fn is_due(&self) -> bool {
        let now = Instant::now();
        self.takers.values().flatten().any(|rise| rise.step(now) != rise.step)
            || self
                .suspects
                .iter()
                .any(|(task, suspect)| !suspect.asked || self.is_cleared(task, suspect, now))
    }

    /// Has a task of this node asked whether it takes connections, and get none while it does not.
    pub fn suspect(&mut self, task: &str) {
        let suspect = Suspect { since: Instant::now(), asked: false };
        self.suspects.entry(task.to_owned()).or_insert(suspect);
    }

    /// Whether a suspect was asked for a while, and takes connections.
    fn is_cleared(&self, task: &str, suspect: &Suspect, now: Instant) -> bool {
        let passes = || self.checks.finding(task).is_some_and(|finding| finding.passes == Some(true));
        suspect.asked && now.saturating_duration_since(suspect.since) >= CLEARED && passes()
    }

    /// How a task of a service is asked, and by which ports, if it is. A suspect takes connections if it does so at any of its own: by a
    /// port that only some tasks serve nobody is ejected.
    fn check_of(&self, service: &Service, task: &Task) -> Option<(Check, Vec<u16>)> {
        if let Some(check) = &service.health {
            return Some((check.clone(), vec![check.port]));
        }
        self.suspects.get(&task.name).filter(|_| service.eject != 0)?;
        let tcp = service.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
        let ports: BTreeSet<u16> = tcp.map(|port| port.target).collect();
        Some((Check::of_suspect(*ports.first()?, ASKED_EACH), ports.into_iter().collect()))
    }

    /// Has this node's tasks asked whose services want it, and those that are suspected.
    fn follow_checks(&mut self, cluster: &ClusterState, node: &str, tables: &Tables) {
        self.checks.set_heeded(cluster.checks);
        let now = Instant::now();
        let cleared =
            |(task, suspect): (&String, &Suspect)| self.is_cleared(task, suspect, now).then(|| task.clone());
        for task in self.suspects.iter().filter_map(cleared).collect::<Vec<_>>() {
            self.suspects.remove(&task);
        }
        let mut wanted = BTreeMap::new();
        for service in &cluster.services {
            let asks = service.health.is_some() || service.eject != 0 && !self.suspects.is_empty();
            for task in service.tasks.iter().filter(|task| asks && task.node == node) {
                let Some((check, ports)) = self.check_of(service, task) else { continue };
                // In a swarm a task is known by its address in the overlay before it is found here.
                let is_here = |address: &&IpAddr| cluster.this.is_none() || Some(**address) != task.overlay;
                let addresses = task.addresses.iter().filter(is_here);
                let addresses = addresses.filter(|_| task.state != TaskState::Starting);
                let own = |address: &IpAddr| own(*address, &task.addresses).unwrap_or(*address);
                let suspect = service.health.is_none();
                let at = addresses.flat_map(|address| ports.iter().map(move |port| (own(address), *port)));
                let at = at.map(SocketAddr::from).take(if suspect { MOST_ASKED } else { 1 }).collect();
                wanted.insert(task.name.clone(), Asked { at, check, backs_off: suspect });
            }
        }
        self.suspects.retain(|task, _| wanted.contains_key(task));
        self.suspects.values_mut().for_each(|suspect| suspect.asked = true);
        self.checks.follow(&self.interface, wanted, |task| {
            let its = || tables.backends.values().filter(|entry| entry.label.task == task);
            match its().any(|entry| entry.backend.state == State::Active as u8) {
                true => Some(true),
                false => its().any(|entry| entry.label.state == TaskState::Draining).then_some(false),
            }
        });
    }

    /// The cluster with what this node's own checks found; none where they have nothing to say that it does not know. A swarm's source
    /// has heard of them, or will.
    fn found(&self, cluster: &ClusterState, node: &str) -> Option<ClusterState> {
        // What there is to say of a task that is not known of it.
        let new = |service: &Service, task: &Task| {
            if task.node != node || task.finding.is_some() || !service.minds_findings() {
                return None;
            }
            let asks = service.health.is_some();
            let finding = self.checks.finding(&task.name);
            finding.filter(|finding| asks || finding.speaks_against())
        };
        let mut found: Option<ClusterState> = None;
        for (index, service) in cluster.services.iter().enumerate() {
            for (number, task) in service.tasks.iter().enumerate() {
                if let Some(finding) = new(service, task) {
                    let found = found.get_or_insert_with(|| cluster.clone());
                    found.service_mut(index).tasks[number].finding = Some(finding);
                }
            }
        }
        found
    }

    /// The cluster with less weight for tasks that have just come; none where all have their whole share.
    fn eased(&mut self, cluster: &ClusterState, slots: u64, now: Instant) -> Option<ClusterState> {
        let mut room = slots / ROOM;
        let gentle = |service: &&Arc<Service>| !service.slow_start.is_zero();
        let mut there = HashSet::new();
        let mut eased: Option<ClusterState> = None;
        for (index, service) in cluster.services.iter().enumerate().filter(|(_, service)| gentle(service)) {
            let passes =
                |task: &&Task| task.finding.as_ref().is_none_or(|it| it.full || it.passes == Some(true));
            let running = |task: &&Task| task.state == TaskState::Running;
            let takers = service.tasks.iter().filter(running).filter(passes);
            for task in takers.clone() {
                there.insert(task.name.as_str());
                let begun = self.begun;
                let new = || begun.then_some(Rise { since: now, over: service.slow_start, step: 0 });
                let rise = self.takers.entry(task.name.clone()).or_insert_with(new);
                if let Some(rising) = rise {
                    (rising.over, rising.step) = (service.slow_start, rising.step(now));
                }
                rise.take_if(|rise| rise.step == STEPS);
            }
            let step = |name: &str| self.takers.get(name).copied().flatten().map_or(STEPS, |rise| rise.step);
            let mut steps = takers.clone().map(|task| step(&task.name));
            let first = steps.next();
            // Those that all come at once share as they will when they are there.
            if steps.all(|step| Some(step) == first) {
                continue;
            }
            // A range of slots for each port, and each family.
            let shares = takers.map(|task| u64::from(task.weight)).sum::<u64>() * u64::from(STEPS);
            let wanted = shares * 2 * service.ports.len().max(1) as u64;
            let Some(left) = room.checked_sub(wanted) else { continue };
            room = left;
            let service = eased.get_or_insert_with(|| cluster.clone()).service_mut(index);
            for task in &mut service.tasks {
                task.weight *= step(&task.name);
            }
        }
        self.takers.retain(|name, _| there.contains(name.as_str()));
        self.begun = true;
        eased
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Via;

    fn cluster(tasks: &[(&str, TaskState, u16)], slow_start: u64) -> ClusterState {
        let task = |(name, state, weight): &(&str, TaskState, u16)| Task {
            name: (*name).to_owned(),
            node: "node1".into(),
            addresses: vec![],
            overlay: None,
            state: *state,
            weight: *weight,
            via: Via::Peer,
            finding: None,
        };
        let service = Service {
            name: "web".into(),
            tasks: tasks.iter().map(task).collect(),
            slow_start: Duration::from_secs(slow_start),
            ..Service::default()
        };
        ClusterState { services: vec![service.into()], ..ClusterState::default() }
    }

    /// The weights of the tasks that are running, so many seconds after the start.
    fn weights(offers: &mut Offers, start: Instant, seconds: u64, cluster: &ClusterState) -> Vec<u16> {
        let eased = offers.eased(cluster, 160_000, start + Duration::from_secs(seconds));
        let state = eased.as_ref().unwrap_or(cluster);
        let takers = state.services[0].tasks.iter().filter(|task| task.state == TaskState::Running);
        takers.map(|task| task.weight).collect()
    }

    #[test]
    fn a_task_that_comes_gets_its_share_by_and_by() {
        use TaskState::{Draining, Running, Starting};
        let (mut offers, start) = (Offers::new("eth1", Checks::default()), Instant::now());
        let two = cluster(&[("a", Running, 1), ("b", Running, 1)], 20);
        // Nobody has looked before: they may have been there for long.
        assert_eq!(weights(&mut offers, start, 0, &two), [1, 1]);
        let three = cluster(&[("a", Running, 1), ("b", Running, 1), ("c", Running, 1)], 20);
        let mut at = |seconds, cluster: &ClusterState| weights(&mut offers, start, seconds, cluster);
        assert_eq!(at(100, &three), [10, 10, 1]);
        assert_eq!(at(101, &three), [10, 10, 1]);
        assert_eq!(at(102, &three), [10, 10, 2]);
        assert_eq!(at(117, &three), [10, 10, 9]);
        assert_eq!(at(118, &three), [1, 1, 1]);
        assert_eq!(at(1_000, &three), [1, 1, 1]);
        // One that was away for a while has to begin anew, and one that only starts takes nothing.
        let away = cluster(&[("a", Running, 1), ("b", Draining, 1), ("c", Running, 1)], 20);
        assert_eq!(at(1_001, &away), [1, 1]);
        assert_eq!(at(1_002, &three), [10, 1, 10]);
        assert_eq!(at(1_022, &three), [1, 1, 1]);
        let four =
            cluster(&[("a", Running, 1), ("b", Running, 1), ("c", Running, 1), ("d", Starting, 1)], 20);
        assert_eq!(at(2_000, &four), [1, 1, 1]);
        let four = cluster(&[("a", Running, 1), ("b", Running, 1), ("c", Running, 1), ("d", Running, 3)], 20);
        assert_eq!(at(2_100, &four), [10, 10, 10, 3]);
    }

    #[test]
    fn those_that_come_at_once_share_evenly_and_nobody_starts_gently_unasked() {
        let (mut offers, start) = (Offers::new("eth1", Checks::default()), Instant::now());
        let running = |names: &[&'static str], slow| {
            let tasks: Vec<_> = names.iter().map(|name| (*name, TaskState::Running, 1)).collect();
            cluster(&tasks, slow)
        };
        assert_eq!(weights(&mut offers, start, 0, &running(&[], 20)), [0; 0]);
        assert_eq!(weights(&mut offers, start, 1, &running(&["a", "b"], 20)), [1, 1]);
        assert_eq!(weights(&mut offers, start, 11, &running(&["a", "b", "c"], 20)), [6, 6, 1]);
        assert_eq!(weights(&mut offers, start, 11, &running(&["a", "b", "c"], 0)), [1, 1, 1]);
        // A share is ten slots meanwhile: where there are many it is not worth them.
        let mut heavy = vec![("a", TaskState::Running, 1_000)];
        assert_eq!(weights(&mut offers, start, 12, &cluster(&heavy, 20)), [1_000]);
        heavy.push(("d", TaskState::Running, 1));
        assert_eq!(weights(&mut offers, start, 40, &cluster(&heavy, 20)), [1_000, 1]);
    }

    #[test]
    fn it_is_due_when_a_step_is() {
        let mut offers = Offers::new("eth1", Checks::default());
        assert!(!offers.is_due());
        let rise = |since| Some(Rise { since, over: Duration::from_secs(3_600), step: 1 });
        offers.takers.insert("a".into(), rise(Instant::now()));
        assert!(!offers.is_due());
        let earlier = Instant::now().checked_sub(Duration::from_secs(400)).unwrap();
        offers.takers.insert("a".into(), rise(earlier));
        assert!(offers.is_due());
    }
}
