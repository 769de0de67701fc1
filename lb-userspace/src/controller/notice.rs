//! What a plan's changes mean to an operator: tasks that come, drain, go; nodes that fall silent; services without a task.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::{backend::State, endpoint::CLOSED};

use crate::{
    cluster::TaskState,
    events::{Event, Kind},
    plan::{BackendLabel, MapOp, Tables},
};

/// More changes of a kind than this, in one plan, are told as one.
const MANY: usize = 32;

/// What is looked at before a plan is applied, to tell afterwards what it changed.
pub struct Notice {
    interface: String,
    said: Vec<Event>,
    /// The services that a change touches, and whether each had a task that takes new connections.
    services: BTreeMap<u32, bool>,
    /// The tasks of those services before the plan, by service and name.
    before: BTreeMap<(u32, String), Shown>,
}

/// What an operator sees of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Starting,
    Offered,
    Draining,
    Unreachable,
}

fn shown(label: &BackendLabel, state: u8) -> Shown {
    match (label.state, state == State::Active as u8) {
        (TaskState::Starting, _) => Shown::Starting,
        (_, true) => Shown::Offered,
        (TaskState::Draining, _) => Shown::Draining,
        (TaskState::Running, _) if label.problem.is_some() => Shown::Unreachable,
        (TaskState::Running, _) => Shown::Draining,
    }
}

impl Notice {
    /// Looks at what a first plan is about to make: there is too much to tell, but for what is wrong with services.
    pub fn first(interface: &str, tables: &Tables, ops: &[MapOp]) -> Self {
        let mut notice = Self::look(interface, tables, ops);
        notice.said.retain(|event| matches!(event.kind, Kind::ServiceProblem | Kind::PortLeftToSwarm));
        (notice.services, notice.before) = (BTreeMap::new(), BTreeMap::new());
        notice
    }

    /// Looks at what `ops` are about to change.
    pub fn look(interface: &str, tables: &Tables, ops: &[MapOp]) -> Self {
        let mut notice = Self {
            interface: interface.to_owned(),
            said: Vec::new(),
            services: BTreeMap::new(),
            before: BTreeMap::new(),
        };
        for op in ops {
            match op {
                MapOp::SetNode(index, label) => notice.node(tables, *index, label),
                MapOp::RemoveNode(index) => {
                    if let Some(label) = tables.nodes.get(index) {
                        let text = format!("node {} left the cluster", label.shown());
                        notice.say(Kind::NodeGone, text, |event| event.of_node(label.shown()));
                    }
                }
                MapOp::SetService(index, label) => notice.service(tables, *index, label),
                MapOp::RemoveService(index) => {
                    if let Some(label) = tables.services.get(index) {
                        let text = format!("service {} is no longer published", label.name);
                        notice.say(Kind::ServiceGone, text, |event| event.of_service(&label.name));
                    }
                }
                MapOp::SetListener(_, listener) => drop(notice.services.insert(listener.service, false)),
                MapOp::SetBackend(_, entry) => drop(notice.services.insert(entry.backend.service, false)),
                MapOp::FreeBackend(index) => {
                    let freed = tables.backends.get(index).map(|entry| entry.backend.service);
                    notice.services.extend(freed.map(|service| (service, false)));
                }
                _ => {}
            }
        }
        let takers = tables.takers();
        for (service, takes) in &mut notice.services {
            *takes = takers.get(service) == Some(&true);
        }
        let tasks = tasks(tables, &notice.services);
        notice.before =
            tasks.into_iter().map(|((service, task), (is, _))| ((service, task.to_owned()), is)).collect();
        notice
    }

    fn say(&mut self, kind: Kind, text: String, of: impl FnOnce(Event) -> Event) {
        self.said.push(of(Event::now(&self.interface, kind, text)));
    }

    fn node(&mut self, tables: &Tables, index: u32, label: &crate::plan::NodeLabel) {
        let before = tables.nodes.get(&index);
        let (name, problem) = (label.shown(), label.problem.as_deref());
        let (kind, text) = match (before.map(|before| before.problem.is_some()), problem) {
            (None, None) => (Kind::NodeAdded, format!("node {name} is part of the cluster")),
            (None, Some(reason)) => {
                (Kind::NodeAdded, format!("node {name} is part of the cluster: {reason}"))
            }
            (Some(false), Some(reason)) => {
                (Kind::NodeSilent, format!("node {name} is silent, new connections avoid it: {reason}"))
            }
            (Some(true), None) => (Kind::NodeHeard, format!("node {name} is heard again")),
            _ => return,
        };
        self.say(kind, text, |event| event.of_node(name));
    }

    fn service(&mut self, tables: &Tables, index: u32, label: &crate::plan::ServiceLabel) {
        let before = tables.services.get(&index);
        let name = &label.name;
        if before.is_none() {
            self.say(Kind::ServiceAdded, format!("service {name} is published"), |event| {
                event.of_service(name)
            });
        }
        if let Some(left) = label.left.as_ref().filter(|_| before.is_none_or(|b| b.left != label.left)) {
            let text = format!("service {name}: not served here: {left}");
            self.say(Kind::PortLeftToSwarm, text, |event| event.of_service(name));
        }
        if let Some(problem) =
            label.problem.as_ref().filter(|_| before.is_none_or(|b| b.problem != label.problem))
        {
            let text = format!("service {name}: {problem}");
            self.say(Kind::ServiceProblem, text, |event| event.of_service(name));
        }
    }

    /// What happened, now that the plan is applied.
    pub fn tell(mut self, tables: &Tables) -> Vec<Event> {
        let after = tasks(tables, &self.services);
        let services: BTreeSet<u32> = self.services.keys().copied().collect();
        let mut said = Vec::new();
        for ((service, task), (is, label)) in &after {
            let before = self.before.get(&(*service, (*task).to_owned()));
            let name = tables.services.get(service).map_or("", |label| &label.name);
            let Some((kind, what)) = change(before.copied(), *is, label) else { continue };
            let node = tables.node_shown(&label.node);
            let text = format!("task {task} on {node} {what}");
            let event = Event::now(&self.interface, kind, text);
            said.push(event.of_task(task).of_service(name).of_node(node));
        }
        for ((service, task), _) in
            self.before.iter().filter(|((s, t), _)| !after.contains_key(&(*s, t.as_str())))
        {
            let event =
                Event::now(&self.interface, Kind::TaskGone, format!("task {task} is gone")).of_task(task);
            let name = tables.services.get(service).map(|label| label.name.clone());
            said.push(Event { service: name, ..event });
        }
        let (takers, closed) = (tables.takers(), closed(tables));
        for service in services {
            let Some(label) = tables.services.get(&service) else { continue };
            let name = &label.name;
            let (kind, text) = match (self.services[&service], takers.get(&service) == Some(&true)) {
                (true, false) => (
                    Kind::ServiceWithoutTask,
                    format!(
                        "service {name} has no task that takes new connections: they are {}",
                        if closed.contains(&service) { "refused" } else { "passed to the host" }
                    ),
                ),
                (false, true) => {
                    (Kind::ServiceHasTask, format!("service {name} has a task that takes new connections"))
                }
                _ => continue,
            };
            said.push(Event::now(&self.interface, kind, text).of_service(name));
        }
        self.said.extend(said);
        gathered(&self.interface, self.said)
    }
}

/// The tasks of some services, by service and name. All ports of a task must be offered for it to be.
fn tasks<'a>(
    tables: &'a Tables,
    services: &BTreeMap<u32, bool>,
) -> BTreeMap<(u32, &'a str), (Shown, &'a BackendLabel)> {
    let mut tasks = BTreeMap::new();
    for entry in tables.backends.values().filter(|entry| services.contains_key(&entry.backend.service)) {
        let is = shown(&entry.label, entry.backend.state);
        let known =
            tasks.entry((entry.backend.service, entry.label.task.as_str())).or_insert((is, &entry.label));
        if is != Shown::Offered {
            *known = (is, &entry.label);
        }
    }
    tasks
}

/// What a task's change is called.
fn change(before: Option<Shown>, is: Shown, label: &BackendLabel) -> Option<(Kind, String)> {
    if before == Some(is) {
        return None;
    }
    let problem = label.problem.as_deref().unwrap_or_default();
    Some(match (before, is) {
        (None | Some(Shown::Starting), Shown::Offered) => {
            (Kind::TaskAdded, "takes new connections".to_owned())
        }
        (_, Shown::Offered) => (Kind::TaskOffered, "takes new connections again".to_owned()),
        (None, Shown::Starting) => (Kind::TaskAdded, "is starting".to_owned()),
        (_, Shown::Starting) => return None,
        (_, Shown::Draining) if !problem.is_empty() => {
            (Kind::TaskUnreachable, format!("gets no new connections: {problem}"))
        }
        (_, Shown::Draining) => {
            (Kind::TaskDraining, "drains: no new connections, open ones go on".to_owned())
        }
        (_, Shown::Unreachable) => (Kind::TaskUnreachable, format!("gets no new connections: {problem}")),
    })
}

/// The services whose new connections are refused where they find no task.
fn closed(tables: &Tables) -> BTreeSet<u32> {
    let closed = tables.listeners.values().filter(|listener| listener.flags & CLOSED != 0);
    closed.map(|listener| listener.service).collect()
}

/// What happened to many at once in one event a kind.
fn gathered(interface: &str, said: Vec<Event>) -> Vec<Event> {
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    for event in &said {
        *counts.entry(event.kind).or_default() += 1;
    }
    let many = |kind: Kind| counts.get(&kind).is_some_and(|count| *count > MANY);
    let mut events: Vec<Event> = said.iter().filter(|event| !many(event.kind)).cloned().collect();
    for (kind, count) in counts.iter().filter(|(_, count)| **count > MANY) {
        let first = said.iter().find(|event| event.kind == *kind).map_or("", |event| &event.text);
        events.push(Event::now(interface, *kind, format!("{first}, and {} more alike", count - 1)));
    }
    events
}
