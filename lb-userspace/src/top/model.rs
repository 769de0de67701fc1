//! What `top` knows: what it saw last, the rates between that and the time before, and what the user looks at.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use crate::inventory::{Node, Service, Task};

/// Rates of so many looks make a sparkline.
pub const HISTORY: usize = 30;

/// What was seen at one moment.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When.
    pub at: Instant,
    /// The interface.
    pub interface: String,
    /// In one line: how it is served, and by whom.
    pub title: String,
    /// What is wrong.
    pub problems: Vec<String>,
    /// Services.
    pub services: Vec<Service>,
    /// Tasks of all services.
    pub tasks: Vec<Task>,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Outcomes by name: packets, and whether they were dropped.
    pub outcomes: Vec<(String, u64, bool)>,
}

/// What is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pane {
    /// Services, with nodes and drops below.
    Services,
    /// Tasks, of one service or all.
    Tasks,
    /// Nodes.
    Nodes,
    /// What became of packets.
    Outcomes,
}

impl Pane {
    /// The one that follows.
    pub const fn next(self) -> Self {
        match self {
            Self::Services => Self::Tasks,
            Self::Tasks => Self::Nodes,
            Self::Nodes => Self::Outcomes,
            Self::Outcomes => Self::Services,
        }
    }
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// New connections a second.
    New,
    /// Failovers a second.
    Failovers,
    /// Bytes a second.
    Traffic,
    /// The name.
    Name,
}

impl Sort {
    /// The one that follows.
    pub const fn next(self) -> Self {
        match self {
            Self::New => Self::Failovers,
            Self::Failovers => Self::Traffic,
            Self::Traffic => Self::Name,
            Self::Name => Self::New,
        }
    }

    /// The word users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::New => "new/s",
            Self::Failovers => "failovers/s",
            Self::Traffic => "traffic",
            Self::Name => "name",
        }
    }
}

/// What happened to a service or task within a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// New connections.
    pub new: f64,
    /// Failovers.
    pub failovers: f64,
    /// Bytes from clients.
    pub request: f64,
    /// Bytes to clients.
    pub reply: f64,
}

/// Counters of a service or task.
#[derive(Clone, Copy, Debug, Default)]
struct Counts([u64; 4]);

impl Counts {
    fn since(self, before: Self, seconds: f64) -> Rates {
        // One that is lower belongs to something new of the same name.
        let rate = |at: usize| self.0[at].saturating_sub(before.0[at]) as f64 / seconds;
        Rates { new: rate(0), failovers: rate(1), request: rate(2), reply: rate(3) }
    }
}

/// Everything that `top` knows.
#[derive(Debug)]
pub struct Model {
    /// What was seen last.
    pub seen: Seen,
    /// Why nothing newer was seen.
    pub problem: Option<String>,
    /// What is shown.
    pub pane: Pane,
    /// The service whose tasks are shown; all without one.
    pub service: Option<String>,
    /// What rows are sorted by.
    pub sort: Sort,
    /// The other way round.
    pub reversed: bool,
    /// Only rows with this in their name.
    pub filter: String,
    /// What is typed as the next filter.
    pub typing: Option<String>,
    /// Whether the keys are explained.
    pub help: bool,
    /// The row that the user is at.
    pub selected: usize,
    counts: BTreeMap<(bool, String), Counts>,
    rates: BTreeMap<(bool, String), Rates>,
    packets: BTreeMap<String, f64>,
    history: BTreeMap<String, VecDeque<u64>>,
}

impl Model {
    /// One that has seen this, and knows no rates yet.
    pub fn new(seen: Seen) -> Self {
        let counts = counts(&seen);
        Self {
            seen,
            problem: None,
            pane: Pane::Services,
            service: None,
            sort: Sort::New,
            reversed: false,
            filter: String::new(),
            typing: None,
            help: false,
            selected: 0,
            counts,
            rates: BTreeMap::new(),
            packets: BTreeMap::new(),
            history: BTreeMap::new(),
        }
    }

    /// Sees what is now.
    pub fn take(&mut self, seen: Seen) {
        let seconds = seen.at.saturating_duration_since(self.seen.at).as_secs_f64().max(0.001);
        let now = counts(&seen);
        self.rates = now
            .iter()
            .map(|(key, counts)| {
                let before = self.counts.get(key).copied().unwrap_or(*counts);
                (key.clone(), counts.since(before, seconds))
            })
            .collect();
        let before: BTreeMap<&str, u64> =
            self.seen.outcomes.iter().map(|(name, packets, _)| (name.as_str(), *packets)).collect();
        self.packets = seen
            .outcomes
            .iter()
            .map(|(name, packets, _)| {
                let before = before.get(name.as_str()).copied().unwrap_or_default();
                (name.clone(), packets.saturating_sub(before) as f64 / seconds)
            })
            .collect();
        self.history.retain(|name, _| now.contains_key(&(true, name.clone())));
        for service in &seen.services {
            let history = self.history.entry(service.name.clone()).or_default();
            let rate = self.rates.get(&(true, service.name.clone())).map_or(0.0, |rates| rates.new);
            history.push_back(rate.round() as u64);
            if history.len() > HISTORY {
                history.pop_front();
            }
        }
        (self.counts, self.seen, self.problem) = (now, seen, None);
        self.go(0);
    }

    /// A service's rates.
    pub fn of_service(&self, name: &str) -> Rates {
        self.rates.get(&(true, name.to_owned())).copied().unwrap_or_default()
    }

    /// A task's rates.
    pub fn of_task(&self, name: &str) -> Rates {
        self.rates.get(&(false, name.to_owned())).copied().unwrap_or_default()
    }

    /// Packets a second that came to an outcome.
    pub fn of_outcome(&self, name: &str) -> f64 {
        self.packets.get(name).copied().unwrap_or_default()
    }

    /// New connections a second of a service, the oldest first.
    pub fn history(&self, service: &str) -> Vec<u64> {
        self.history.get(service).into_iter().flatten().copied().collect()
    }

    /// The services as they are shown.
    pub fn services(&self) -> Vec<&Service> {
        let mut rows: Vec<&Service> =
            self.seen.services.iter().filter(|service| self.wants(&service.name)).collect();
        rows.sort_by(|a, b| {
            self.order((self.of_service(&a.name), &a.name), (self.of_service(&b.name), &b.name))
        });
        rows
    }

    /// The tasks as they are shown.
    pub fn tasks(&self) -> Vec<&Task> {
        let of = |task: &&Task| self.service.as_ref().is_none_or(|service| *service == task.service);
        let mut rows: Vec<&Task> =
            self.seen.tasks.iter().filter(of).filter(|task| self.wants(&task.name)).collect();
        rows.sort_by(|a, b| self.order((self.of_task(&a.name), &a.name), (self.of_task(&b.name), &b.name)));
        rows
    }

    /// The nodes as they are shown.
    pub fn nodes(&self) -> Vec<&Node> {
        self.seen.nodes.iter().filter(|node| self.wants(&node.name)).collect()
    }

    /// The outcomes as they are shown: the most frequent first.
    pub fn outcomes(&self) -> Vec<&(String, u64, bool)> {
        let mut rows: Vec<_> =
            self.seen.outcomes.iter().filter(|(name, packets, _)| *packets > 0 && self.wants(name)).collect();
        rows.sort_by(|a, b| self.of_outcome(&b.0).total_cmp(&self.of_outcome(&a.0)).then(b.1.cmp(&a.1)));
        rows
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(self.filter.as_str())
    }

    fn order(&self, (a, one): (Rates, &str), (b, other): (Rates, &str)) -> std::cmp::Ordering {
        let names = (one.len(), one).cmp(&(other.len(), other));
        let order = match self.sort {
            Sort::New => b.new.total_cmp(&a.new),
            Sort::Failovers => b.failovers.total_cmp(&a.failovers),
            Sort::Traffic => (b.request + b.reply).total_cmp(&(a.request + a.reply)),
            Sort::Name => names,
        };
        let order = order.then(names);
        if self.reversed { order.reverse() } else { order }
    }

    fn rows(&self) -> usize {
        match self.pane {
            Pane::Services => self.services().len(),
            Pane::Tasks => self.tasks().len(),
            Pane::Nodes => self.nodes().len(),
            Pane::Outcomes => self.outcomes().len(),
        }
    }

    /// Goes up or down by so many rows.
    pub fn go(&mut self, by: isize) {
        self.selected = self.selected.saturating_add_signed(by).min(self.rows().saturating_sub(1));
    }

    /// Shows something else.
    pub fn show(&mut self, pane: Pane) {
        (self.pane, self.selected, self.service) = (pane, 0, None);
    }

    /// From a service to its tasks; from a node to all tasks.
    pub fn enter(&mut self) {
        if self.pane == Pane::Services
            && let Some(name) = self.services().get(self.selected).map(|service| service.name.clone())
        {
            self.filter.clear();
            (self.pane, self.service, self.selected) = (Pane::Tasks, Some(name), 0);
        }
    }

    /// Back to the services.
    pub fn leave(&mut self) {
        self.show(Pane::Services);
    }
}

fn counts(seen: &Seen) -> BTreeMap<(bool, String), Counts> {
    let mut counts = BTreeMap::new();
    let mut sums: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    for task in &seen.tasks {
        let its = [task.connections, task.failovers, task.request_bytes, task.reply_bytes];
        counts.insert((false, task.name.clone()), Counts(its));
        let sum = sums.entry(&task.service).or_default();
        (sum[0], sum[1]) = (sum[0] + task.request_bytes, sum[1] + task.reply_bytes);
    }
    for service in &seen.services {
        let [request, reply] = sums.get(service.name.as_str()).copied().unwrap_or_default();
        counts.insert(
            (true, service.name.clone()),
            Counts([service.connections, service.failovers, request, reply]),
        );
    }
    counts
}
