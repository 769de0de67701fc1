//! The metrics, in the text format of OpenMetrics. Names follow Prometheus' conventions: a prefix, base units, `_total`.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use lb_common::{
    abi::{Mode, table},
    stats::{BackendStats, TableStats},
};
use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelValue, LabelValueEncoder, MetricEncoder, NoLabelSet, text::encode,
    },
    metrics::MetricType,
    registry::{Registry, Unit},
};

use crate::{
    cluster::TaskState,
    datapath,
    health::{AgentState, Health, Verdict},
    inventory::{Agent, DRAINED, Inventory, Task},
    report::{self, DELAYS},
};

/// Everything of one interface that is measured.
pub struct Exposed {
    /// What is read of its tables.
    pub inventory: Inventory,
    /// What is known beside that.
    pub around: AgentState,
    /// What stands against it.
    pub health: Health,
    /// Open connections by backend, if they were counted.
    pub open: Option<BTreeMap<u32, u64>>,
    /// Memory of the tables by name, in bytes.
    pub memory: Vec<(String, u64)>,
}

/// Series that a cluster may make are bounded: so many tasks have series of their own, those in trouble first.
pub const TASKS: usize = 1_000;

/// The media type of what [`text`] makes.
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of all interfaces, and how many events of each kind the agent recorded.
///
/// # Errors
/// None that the encoder has today.
pub fn text(exposed: Vec<Exposed>, events: BTreeMap<String, u64>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("lb");
    let failed = Arc::new(Mutex::new(None));
    registry.register_collector(Box::new(Metrics { exposed, events, failed: failed.clone() }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(text), Err)
}

struct Metrics {
    exposed: Vec<Exposed>,
    events: BTreeMap<String, u64>,
    failed: Arc<Mutex<Option<fmt::Error>>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "metrics of {} interfaces", self.exposed.len())
    }
}

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut families = Families { encoder };
        let done = self.all(&mut families);
        if let Err(error) = done {
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        done
    }
}

/// A label's value; the crate writes it as it is, the format asks for three escapes.
#[derive(Clone, Debug)]
struct Value(String);

impl EncodeLabelValue for Value {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), fmt::Error> {
        use fmt::Write as _;
        self.0.chars().try_for_each(|letter| match letter {
            '\\' => encoder.write_str("\\\\"),
            '"' => encoder.write_str("\\\""),
            '\n' => encoder.write_str("\\n"),
            other => encoder.write_char(other),
        })
    }
}

type Labels = Vec<(&'static str, Value)>;

/// One sample.
struct Sample(Labels, f64);

fn labels<const N: usize>(interface: &str, more: [(&'static str, &str); N]) -> Labels {
    let first = ("interface", Value(interface.to_owned()));
    std::iter::once(first).chain(more.map(|(name, value)| (name, Value(value.to_owned())))).collect()
}

struct Families<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Families<'_> {
    fn family(
        &mut self,
        (name, help, unit): (&str, &str, Option<Unit>),
        kind: MetricType,
        samples: Vec<Sample>,
    ) -> fmt::Result {
        if samples.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for Sample(labels, value) in samples {
            let mut one: MetricEncoder<'_> = metric.encode_family(&labels)?;
            match kind {
                // Whole numbers are written as such.
                MetricType::Counter if value.fract() == 0.0 => {
                    one.encode_counter::<NoLabelSet, u64, f64>(&(value as u64), None)?;
                }
                MetricType::Counter => one.encode_counter::<NoLabelSet, f64, f64>(&value, None)?,
                _ if value.fract() == 0.0 && value.abs() < 1e15 => one.encode_gauge(&(value as i64))?,
                _ => one.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    fn counter(&mut self, what: (&str, &str, Option<Unit>), samples: Vec<Sample>) -> fmt::Result {
        self.family(what, MetricType::Counter, samples)
    }

    fn gauge(&mut self, what: (&str, &str, Option<Unit>), samples: Vec<Sample>) -> fmt::Result {
        self.family(what, MetricType::Gauge, samples)
    }
}

impl Metrics {
    fn each<'a>(&'a self, samples: impl Fn(&'a Exposed, &'a str) -> Vec<Sample>) -> Vec<Sample> {
        self.exposed.iter().flat_map(|exposed| samples(exposed, &exposed.inventory.interface)).collect()
    }

    fn one<'a>(&'a self, value: impl Fn(&'a Exposed) -> Option<f64>) -> Vec<Sample> {
        self.each(|exposed, interface| {
            value(exposed).map(|value| Sample(labels(interface, []), value)).into_iter().collect()
        })
    }

    fn all(&self, to: &mut Families<'_>) -> fmt::Result {
        self.agent(to)?;
        self.packets(to)?;
        self.services(to)?;
        self.tasks(to)?;
        self.nodes(to)?;
        self.tables(to)
    }

    fn agent(&self, to: &mut Families<'_>) -> fmt::Result {
        let kernel = datapath::release();
        let info = self.each(|exposed, interface| {
            let mode = Mode::try_from(exposed.around.config.mode).map_or("not attached", Mode::name);
            let abi = exposed.around.config.abi_version.to_string();
            let more =
                [("version", env!("CARGO_PKG_VERSION")), ("abi", &abi), ("mode", mode), ("kernel", &kernel)];
            vec![Sample(labels(interface, more), 1.0)]
        });
        to.gauge(("build_info", "What serves the interface; always 1", None), info)?;
        let is =
            |verdict: Verdict| self.one(move |exposed| Some(f64::from(exposed.health.verdict == verdict)));
        to.gauge(
            ("serving", "1 if the interface is served and nothing is wrong", None),
            is(Verdict::Serving),
        )?;
        let up = self.one(|exposed| Some(f64::from(exposed.around.controller.is_some())));
        to.gauge(
            (
                "controller_up",
                "1 if a controller follows the cluster; without one the datapath goes on by itself",
                None,
            ),
            up,
        )?;
        let up = self.one(|exposed| Some(f64::from(exposed.inventory.report.problem.is_none())));
        to.gauge(("source_up", "1 if the cluster's state is known to be fresh", None), up)?;
        let now = report::now();
        let age = self.one(|exposed| Some(now.saturating_sub(exposed.inventory.report.since) as f64));
        let help = "Time since the cluster's state last changed, or since it is not known to be fresh";
        to.gauge(("state_age", help, Some(Unit::Seconds)), age)?;
        let help = "From a change of the cluster to the tables knowing";
        let mut delays = to.encoder.encode_descriptor(
            "change_delay",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for exposed in &self.exposed {
            let delay = &exposed.inventory.report.delay;
            let within: u64 = delay.buckets.iter().sum();
            let mut buckets: Vec<(f64, u64)> =
                DELAYS.iter().zip(delay.buckets).map(|(most, count)| (*most as f64 / 1e3, count)).collect();
            buckets.push((f64::MAX, delay.count.saturating_sub(within)));
            let labels = labels(&exposed.inventory.interface, []);
            let mut one = delays.encode_family(&labels)?;
            one.encode_histogram::<NoLabelSet>(delay.sum_ms as f64 / 1e3, delay.count, &buckets, None)?;
        }
        let flooded = self.one(|exposed| Some(f64::from(exposed.inventory.report.flooded)));
        to.gauge(
            (
                "flood_guard_active",
                "1 while new connections are placed by hash, because there are too many",
                None,
            ),
            flooded,
        )?;
        let events = self.events.iter();
        let events = events.map(|(kind, count)| Sample(vec![("kind", Value(kind.clone()))], *count as f64));
        to.counter(("events", "Changes of state since the agent started, by kind", None), events.collect())
    }

    fn packets(&self, to: &mut Families<'_>) -> fmt::Result {
        let packets = self.each(|exposed, interface| {
            let outcomes = exposed.inventory.counters.outcomes.iter();
            let sample = |count: &datapath::OutcomeCount| {
                let outcome = count.outcome;
                let verdict = match (outcome.is_forwarded(), outcome.is_dropped()) {
                    (true, _) => "forwarded",
                    (_, true) => "dropped",
                    _ => "passed",
                };
                let more = [("outcome", outcome.name()), ("verdict", verdict)];
                Sample(labels(interface, more), count.packets as f64)
            };
            outcomes.map(sample).collect()
        });
        to.counter(
            ("packets", "Packets by what became of them; `stats` says what each outcome means", None),
            packets,
        )
    }

    fn services(&self, to: &mut Families<'_>) -> fmt::Result {
        let services: Vec<_> =
            self.exposed.iter().map(|exposed| (exposed, exposed.inventory.services())).collect();
        let of = |value: fn(&crate::inventory::Service) -> u64| -> Vec<Sample> {
            let samples = services.iter().flat_map(|(exposed, services)| {
                let interface = &exposed.inventory.interface;
                let sample =
                    |s: &crate::inventory::Service| (labels(interface, [("service", &s.name)]), value(s));
                services.iter().map(sample).collect::<Vec<_>>()
            });
            samples.map(|(labels, value)| Sample(labels, value as f64)).collect()
        };
        to.counter(
            ("connections", "New connections given to a task", None),
            of(|service| service.connections),
        )?;
        let help = "New connections that no task could be given: passed to the host, or refused";
        to.counter(("connections_refused", help, None), of(|service| service.refused_connections))?;
        let help = "Packets of clients that may not connect to a service, dropped";
        to.counter(("service_denied_packets", help, None), of(|service| service.denied_packets))?;
        let help = "New connections that a task refused or did not answer, given to another";
        to.counter(("failovers", help, None), of(|service| service.failovers))?;
        let help = "1 if something is wrong with a service: `service ls` says what";
        to.gauge(("service_problem", help, None), of(|service| u64::from(service.problem.is_some())))?;
        let mut open = Vec::new();
        let mut bytes = Vec::new();
        let mut packets = Vec::new();
        for exposed in &self.exposed {
            let inventory = &exposed.inventory;
            let mut sums: BTreeMap<u32, (BackendStats, u64)> = BTreeMap::new();
            for (number, entry) in &inventory.tables.backends {
                let stats = inventory.counters.backends.get(number).copied().unwrap_or_default();
                let sum = sums.entry(entry.backend.service).or_default();
                sum.0 = sum.0.plus(stats);
                sum.1 += exposed.open.as_ref().and_then(|open| open.get(number)).copied().unwrap_or_default();
            }
            for (index, label) in &inventory.tables.services {
                let (stats, connections) = sums.get(index).copied().unwrap_or_default();
                let labels = |more: &[(&'static str, &str)]| {
                    let mut all = labels(&inventory.interface, [("service", label.name.as_str())]);
                    all.extend(more.iter().map(|(name, value)| (*name, Value((*value).to_owned()))));
                    all
                };
                if exposed.open.is_some() {
                    open.push(Sample(labels(&[]), connections as f64));
                }
                let (request, reply) = ([("direction", "request")], [("direction", "reply")]);
                bytes.push(Sample(labels(&request), stats.request_bytes as f64));
                bytes.push(Sample(labels(&reply), stats.reply_bytes as f64));
                packets.push(Sample(labels(&request), stats.request_packets as f64));
                packets.push(Sample(labels(&reply), stats.reply_packets as f64));
            }
        }
        to.gauge(("connections_open", "Connections that are open", None), open)?;
        let help = "Bytes between clients and tasks, from the network header on";
        to.counter(("service_traffic", help, Some(Unit::Bytes)), bytes)?;
        to.counter(("service_packets", "Packets between clients and tasks", None), packets)
    }

    fn tasks(&self, to: &mut Families<'_>) -> fmt::Result {
        let mut states = Vec::new();
        let (mut connections, mut failovers, mut refusing) = (Vec::new(), Vec::new(), Vec::new());
        let mut left_out = Vec::new();
        for exposed in &self.exposed {
            let inventory = &exposed.inventory;
            let mut tasks = inventory.tasks(|_| true, None);
            let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
            for label in inventory.tables.services.values() {
                counts.extend(STATES.iter().map(|state| ((label.name.as_str(), *state), 0)));
            }
            for task in &tasks {
                *counts.entry((&task.service, state(task))).or_default() += 1;
            }
            for ((service, state), count) in counts {
                let more = [("service", service), ("state", state)];
                states.push(Sample(labels(&inventory.interface, more), count as f64));
            }
            let left = tasks.len().saturating_sub(TASKS);
            left_out.push(Sample(labels(&inventory.interface, []), left as f64));
            tasks.sort_by_key(|task| (task.problem.is_none(), task.failovers == 0));
            for task in tasks.iter().take(TASKS) {
                let more = [("service", task.service.as_str()), ("task", &task.name), ("node", &task.node)];
                let labels = || labels(&inventory.interface, more);
                connections.push(Sample(labels(), task.connections as f64));
                failovers.push(Sample(labels(), task.failovers as f64));
                refusing.push(Sample(labels(), f64::from(is_refusing(inventory, task))));
            }
        }
        to.gauge(("tasks", "Tasks by what they are doing", None), states)?;
        to.counter(("task_connections", "New connections given to a task", None), connections)?;
        let help = "New connections that a task refused or did not answer, given to another";
        to.counter(("task_failovers", help, None), failovers)?;
        let help = "1 while a task refuses connections or does not answer";
        to.gauge(("task_refusing", help, None), refusing)?;
        let help = "Tasks that have no series of their own, because there are too many";
        to.gauge(("task_series_left_out", help, None), left_out)
    }

    fn nodes(&self, to: &mut Families<'_>) -> fmt::Result {
        let nodes = |value: fn(&crate::inventory::Node) -> Option<f64>| {
            self.each(move |exposed, interface| {
                let nodes = exposed.inventory.nodes();
                let sample = |node: &crate::inventory::Node| {
                    Some(Sample(labels(interface, [("node", &node.name)]), value(node)?))
                };
                nodes.iter().filter_map(sample).collect()
            })
        };
        let reachable = nodes(|node| match node.agent {
            Agent::Yes => Some(1.0),
            Agent::Silent => Some(0.0),
            Agent::None => None,
        });
        to.gauge(("node_reachable", "1 if the datapath of a node answers", None), reachable)?;
        to.gauge(("node_tasks", "Tasks on a node", None), nodes(|node| Some(node.tasks as f64)))?;
        let drained = self.each(|exposed, interface| {
            let drain = |drain: &report::Drain| {
                let what = match drain.what {
                    report::Drained::Task => "task",
                    report::Drained::Node => "node",
                };
                let name = exposed.inventory.drained_name(drain);
                Sample(labels(interface, [("kind", what), ("name", &name)]), 1.0)
            };
            exposed.inventory.drains.iter().map(drain).collect()
        });
        to.gauge(("drained", "Tasks and nodes that are drained by hand; always 1", None), drained)
    }

    fn tables(&self, to: &mut Families<'_>) -> fmt::Result {
        let fills = |at: usize| {
            self.each(move |exposed, interface| {
                let fills = exposed.around.fills.iter();
                fills
                    .map(|(table, fill)| Sample(labels(interface, [("table", table)]), fill[at] as f64))
                    .collect()
            })
        };
        to.gauge(
            ("table_entries", "Entries of a table of connections, as they were counted last", None),
            fills(0),
        )?;
        let lines = self.each(|exposed, interface| {
            let tables = [table::CONNECTIONS4, table::CONNECTIONS6];
            let tables = tables.into_iter().zip(&exposed.inventory.counters.connections);
            let changes = |(table, stats): (&'static str, &TableStats)| {
                let TableStats { inserted, reused, displaced, removed } = *stats;
                [("inserted", inserted), ("reused", reused), ("displaced", displaced), ("removed", removed)]
                    .map(|change| (table, change))
            };
            let sample = |(table, (change, count)): (&str, (&str, u64))| {
                Sample(labels(interface, [("table", table), ("change", change)]), count as f64)
            };
            tables.flat_map(changes).map(sample).collect()
        });
        let help = "Lines of a table of connections by what became of them; displaced ones had not ended";
        to.counter(("table_lines", help, None), lines)?;
        to.gauge(("table_capacity", "Entries that a table of connections is made for", None), fills(1))?;
        let memory = self.each(|exposed, interface| {
            let memory = exposed.memory.iter();
            memory
                .map(|(table, bytes)| Sample(labels(interface, [("table", table)]), *bytes as f64))
                .collect()
        });
        to.gauge(("table", "Memory of a table, by the kernel's account", Some(Unit::Bytes)), memory)
    }
}

/// What tasks are doing, as the label says it.
const STATES: [&str; 5] = ["active", "draining", "drained", "starting", "unreachable"];

fn state(task: &Task) -> &'static str {
    if task.active {
        "active"
    } else if task.state == DRAINED {
        "drained"
    } else if task.state == TaskState::Starting.to_string() {
        "starting"
    } else if task.state == TaskState::Draining.to_string() {
        "draining"
    } else {
        "unreachable"
    }
}

fn is_refusing(inventory: &Inventory, task: &Task) -> bool {
    inventory.troubles.keys().any(|number| {
        inventory.tables.backends.get(number).is_some_and(|entry| entry.label.task == task.name)
    })
}
