//! What the labels of services and nodes say; what is wrong with one is said with it.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use lb_common::conntrack::Timers;

use super::model;
use crate::{
    check::{Check, CheckSpec},
    cluster::{
        self, Access, Affinity, ClientPrefix, Family, Idle, Node, Port, Prefer, Return, Scheduler, Service,
        TIMERS, TimerError, address_range, served_address, set_timer,
    },
    datapath::Hint,
    text,
};

/// Service label: how the replies of its tasks travel, `tunnel` or `direct`.
pub const RETURN_LABEL: &str = "lb.return";
/// Service label: how new connections find their tasks, `round-robin`, `random`, `maglev` or `source`.
pub const SCHEDULER_LABEL: &str = "lb.scheduler";
/// What it was called before, with fewer choices.
const FORMER_SCHEDULER_LABEL: &str = "lb.placement";
/// Service label: whose tasks come first, `any`, `local`, `zone` or `local-only`.
pub const PREFER_LABEL: &str = "lb.prefer";
/// Node label: the share of new connections that each of its tasks gets, beside one of other nodes.
pub const WEIGHT_LABEL: &str = "lb.weight";
/// Node label: what it shares with those near to it, as in Swarm's own `--placement-pref spread=node.labels.zone`.
pub const ZONE_LABEL: &str = "zone";
/// Service label: whether a client's connections go to one task, `none` or `client`.
pub const AFFINITY_LABEL: &str = "lb.affinity";
/// Service label: which clients are one where the address decides, by the length of a network's prefix; of IPv4.
pub const V4_PREFIX_LABEL: &str = "lb.affinity.v4-prefix";
/// The same of IPv6.
pub const V6_PREFIX_LABEL: &str = "lb.affinity.v6-prefix";
/// Service label, with a timer's name after it: the silence in seconds after which its connections have ended.
pub const TIMER_LABEL: &str = "lb.timers.";
/// Service label: what becomes of its established TCP connections that have ended by silence, `forget` or `reset`.
pub const IDLE_LABEL: &str = "lb.idle";
/// Service label: the addresses on which it is served, between commas; every one of the node otherwise.
pub const ADDRESSES_LABEL: &str = "lb.addresses";
/// Service label: how clients are served whose family a task does not have, `auto`, `same` or `translate`.
pub const FAMILY_LABEL: &str = "lb.family";
/// Service label: who may connect, addresses and ranges of them between commas; nobody else may.
pub const ALLOW_LABEL: &str = "lb.allow";
/// Service label: who may not connect, likewise.
pub const DENY_LABEL: &str = "lb.deny";

/// Label of any service: clients whom no service of the cluster takes, likewise.
pub const CLUSTER_DENY_LABEL: &str = "lb.cluster.deny";

/// Service label: how its tasks are asked whether they take connections, `docker`, `tcp` or `http`; with what is said of that after
/// it, as in `lb.health.path`.
pub const HEALTH_LABEL: &str = "lb.health";

/// Service label: the time in which a task that comes gets its whole share of new connections.
pub const SLOW_START_LABEL: &str = "lb.slow-start";

/// Service label: connections that one of its tasks may have.
pub const TASK_CONNECTIONS_LABEL: &str = "lb.task-max-connections";

/// Service label: after how many connections in a row that it does not take a task gets no new ones, `off` or a number.
pub const EJECT_LABEL: &str = "lb.eject";

/// What is said of a node's labels is cut to so many bytes.
const LONGEST_PROBLEM: usize = 160;
/// The largest weight of a node: each service has as many slots as its tasks weigh.
const HEAVIEST: u16 = 10;

/// A service as its labels describe it, which publishes these ports; what they do not say is not there.
pub fn service(service: &model::Service, ports: &[Port]) -> Service {
    let mut problems = unknown_labels(service);
    let scheduler = scheduler(service, &mut problems);
    let described = Service {
        returns: returns(service, &mut problems),
        scheduler,
        affinity: affinity(service, &mut problems),
        client_prefix: client_prefix(service, &mut problems),
        prefer: prefer(service, &mut problems),
        family: family(service, &mut problems),
        timers: timers(service, &mut problems),
        idle: idle(service, &mut problems),
        addresses: addresses(service, &mut problems),
        access: access(service, &mut problems),
        health: health(service, ports, &mut problems),
        slow_start: slow_start(service, &mut problems),
        task_max_connections: task_max_connections(service, &mut problems),
        eject: eject(service, scheduler, &mut problems),
        ..Service::default()
    };
    let by_address = described.affinity == Affinity::Client || described.scheduler == Scheduler::Source;
    for label in [V4_PREFIX_LABEL, V6_PREFIX_LABEL] {
        if !by_address && service.spec.labels.contains_key(label) {
            problems.push(format!(
                "label {label} has no effect: clients' addresses decide with {AFFINITY_LABEL}=client or {SCHEDULER_LABEL}=source"
            ));
        }
    }
    let wrong = entries(service, CLUSTER_DENY_LABEL).filter_map(|entry| address_range(entry).err());
    problems.extend(wrong.map(|error| format!("label {CLUSTER_DENY_LABEL}: {error}; the others are denied")));
    Service { problem: problems.join("; "), ..described }
}

/// Clients whom no service of the cluster is to take, as this one's label says; without what is wrong with it.
pub fn denied(service: &model::Service) -> Vec<IpNet> {
    entries(service, CLUSTER_DENY_LABEL).filter_map(|entry| address_range(entry).ok()).collect()
}

/// What a label lists between commas.
fn entries<'a>(service: &'a model::Service, label: &str) -> impl Iterator<Item = &'a str> {
    service.spec.labels.get(label).into_iter().flat_map(|list| list.split(',').map(str::trim))
}

/// What a node's label says of its tasks' share.
pub fn weight(node: &model::Node) -> Result<Option<u16>, String> {
    let Some(label) = node.spec.labels.get(WEIGHT_LABEL) else {
        return Ok(None);
    };
    let weight = label.parse().ok().filter(|weight| *weight <= HEAVIEST);
    weight.map(Some).ok_or_else(|| format!("label {WEIGHT_LABEL}={label} is no number from 0 to {HEAVIEST}"))
}

/// What is wrong with a node's labels that are meant for us; empty if nothing is.
pub fn node_problem(node: &model::Node) -> String {
    let strange = strange(node.spec.labels.keys(), &[WEIGHT_LABEL]);
    let problems: Vec<String> = weight(node).err().into_iter().chain(strange).collect();
    text::name(&problems.join("; "), LONGEST_PROBLEM)
}

/// What a node shares with those near to it; empty if nobody has said.
pub fn zone(node: &model::Node) -> String {
    let label = node.spec.labels.get(ZONE_LABEL);
    label.map(|zone| text::name(zone, Node::LONGEST_ZONE)).unwrap_or_default()
}

/// What our labels begin with.
const PREFIX: &str = "lb.";

/// Labels of a service that are meant for us and that we do not know.
fn unknown_labels(service: &model::Service) -> Vec<String> {
    const KNOWN: [&str; 16] = [
        CLUSTER_DENY_LABEL,
        FAMILY_LABEL,
        SLOW_START_LABEL,
        TASK_CONNECTIONS_LABEL,
        EJECT_LABEL,
        RETURN_LABEL,
        SCHEDULER_LABEL,
        FORMER_SCHEDULER_LABEL,
        AFFINITY_LABEL,
        V4_PREFIX_LABEL,
        V6_PREFIX_LABEL,
        PREFER_LABEL,
        IDLE_LABEL,
        ADDRESSES_LABEL,
        ALLOW_LABEL,
        DENY_LABEL,
    ];
    let timers: Vec<String> = TIMERS.iter().map(|(name, _)| format!("{TIMER_LABEL}{name}")).collect();
    let health: Vec<String> = HEALTH_PARTS.iter().map(|part| format!("{HEALTH_LABEL}{part}")).collect();
    let named = timers.iter().chain(&health).map(String::as_str);
    let known: Vec<&str> = KNOWN.into_iter().chain(named).collect();
    // A timer that there is not says so itself.
    strange(service.spec.labels.keys().filter(|label| !label.starts_with(TIMER_LABEL)), &known)
}

/// Those of some labels that are meant for us and that we do not know.
fn strange<'a>(labels: impl Iterator<Item = &'a String>, known: &[&str]) -> Vec<String> {
    let ours = |label: &&String| label.starts_with(PREFIX) && !known.contains(&label.as_str());
    let labels = labels.filter(ours);
    labels
        .map(|label| format!("label {label} is unknown{}", Hint::nearest(label, known.iter().copied())))
        .collect()
}

fn slow_start(service: &model::Service, problems: &mut Vec<String>) -> Duration {
    let Some(label) = service.spec.labels.get(SLOW_START_LABEL) else {
        return Duration::ZERO;
    };
    cluster::slow_start(label).unwrap_or_else(|error| {
        problems.push(format!("label {SLOW_START_LABEL}: {error}"));
        Duration::ZERO
    })
}

fn task_max_connections(service: &model::Service, problems: &mut Vec<String>) -> u32 {
    let Some(label) = service.spec.labels.get(TASK_CONNECTIONS_LABEL) else {
        return 0;
    };
    cluster::task_max_connections(label.parse().ok()).unwrap_or_else(|error| {
        problems.push(format!("label {TASK_CONNECTIONS_LABEL}={label}: {error}"));
        0
    })
}

fn eject(service: &model::Service, scheduler: Scheduler, problems: &mut Vec<String>) -> u16 {
    let Some(label) = service.spec.labels.get(EJECT_LABEL) else {
        return cluster::ejects(scheduler);
    };
    cluster::eject(label).unwrap_or_else(|error| {
        problems.push(format!("label {EJECT_LABEL}: {error}"));
        0
    })
}

/// What may stand after the label of health.
const HEALTH_PARTS: [&str; 6] = ["", ".port", ".path", ".interval", ".rise", ".fall"];

/// How its tasks are asked. Where that is described wrongly they are not: Docker's word stands.
fn health(service: &model::Service, ports: &[Port], problems: &mut Vec<String>) -> Option<Check> {
    let labels = &service.spec.labels;
    let of = |part: &str| labels.get(&format!("{HEALTH_LABEL}{part}"));
    let Some(kind) = of("") else {
        if let Some(part) = HEALTH_PARTS[1..].iter().find(|part| of(part).is_some()) {
            problems
                .push(format!("label {HEALTH_LABEL}{part} has no effect without {HEALTH_LABEL}=tcp or http"));
        }
        return None;
    };
    let number = |part: &str| match of(part) {
        None => Ok(None),
        Some(text) => text.parse::<u16>().map(Some).map_err(|_| {
            format!(
                "label {HEALTH_LABEL}{part}={text} is no number from 0 to {}; its tasks are not asked",
                u16::MAX
            )
        }),
    };
    let numbers = number(".port").and_then(|port| Ok([port, number(".rise")?, number(".fall")?]));
    let check = numbers.and_then(|[port, rise, fall]| {
        let (path, interval) = (of(".path").cloned(), of(".interval").cloned());
        let spec = CheckSpec { kind: kind.clone(), port, path, interval, rise, fall };
        spec.check(Port::first_tcp(ports))
            .map_err(|error| format!("label {HEALTH_LABEL}: {error}; its tasks are not asked"))
    });
    check.unwrap_or_else(|problem| {
        problems.push(problem);
        None
    })
}

/// What a label that chooses says; `None` where there is none, or it is none of the choices, which is noted.
fn choice<T: Copy>(
    service: &model::Service,
    label: &str,
    choices: &[(&str, T)],
    problems: &mut Vec<String>,
) -> Option<T> {
    let value = service.spec.labels.get(label)?;
    let chosen = choices.iter().find(|(name, _)| name == value).map(|(_, choice)| *choice);
    if chosen.is_none() {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let among = match names.as_slice() {
            [one, other] => format!("neither {one} nor {other}"),
            names => format!("none of {}", names.join(", ")),
        };
        problems.push(format!("label {label}={value} is {among}"));
    }
    chosen
}

fn returns(service: &model::Service, problems: &mut Vec<String>) -> Option<Return> {
    choice(service, RETURN_LABEL, &[("tunnel", Return::Tunnel), ("direct", Return::Direct)], problems)
}

fn scheduler(service: &model::Service, problems: &mut Vec<String>) -> Scheduler {
    let choices = Scheduler::ALL.map(|scheduler| (scheduler.name(), scheduler));
    let before = service.spec.labels.get(FORMER_SCHEDULER_LABEL);
    let chosen = choice(service, SCHEDULER_LABEL, &choices, problems);
    if before.is_some() {
        problems.push(format!(
            "label {FORMER_SCHEDULER_LABEL} is called {SCHEDULER_LABEL} now, and consistent maglev"
        ));
    }
    let before = before.filter(|value| *value == "consistent").map(|_| Scheduler::Maglev);
    chosen.or(before).unwrap_or_default()
}

fn affinity(service: &model::Service, problems: &mut Vec<String>) -> Affinity {
    choice(service, AFFINITY_LABEL, &[("none", Affinity::None), ("client", Affinity::Client)], problems)
        .unwrap_or_default()
}

/// Which clients are one; each address by itself where a length is wrong, and where no address decides.
fn client_prefix(service: &model::Service, problems: &mut Vec<String>) -> ClientPrefix {
    let mut prefix = ClientPrefix::WHOLE;
    for (label, of_v4) in [(V4_PREFIX_LABEL, true), (V6_PREFIX_LABEL, false)] {
        let Some(text) = service.spec.labels.get(label) else { continue };
        let length = text.parse::<u8>().map_err(|_| "the length of a prefix is a number".to_owned());
        let with = |length| {
            if of_v4 { ClientPrefix { v4: length, ..prefix } } else { ClientPrefix { v6: length, ..prefix } }
        };
        match length.and_then(|length| with(length).check()) {
            Ok(checked) => prefix = checked,
            Err(error) => problems.push(format!("label {label}={text}: {error}")),
        }
    }
    prefix
}

fn prefer(service: &model::Service, problems: &mut Vec<String>) -> Prefer {
    let choices = [Prefer::Any, Prefer::Local, Prefer::Zone, Prefer::LocalOnly];
    choice(service, PREFER_LABEL, &choices.map(|prefer| (prefer.name(), prefer)), problems)
        .unwrap_or_default()
}

fn family(service: &model::Service, problems: &mut Vec<String>) -> Family {
    let choices = [Family::Auto, Family::Same, Family::Translate];
    choice(service, FAMILY_LABEL, &choices.map(|family| (family.name(), family)), problems)
        .unwrap_or_default()
}

fn idle(service: &model::Service, problems: &mut Vec<String>) -> Idle {
    choice(service, IDLE_LABEL, &[("forget", Idle::Forget), ("reset", Idle::Reset)], problems)
        .unwrap_or_default()
}

/// The addresses that are named. Those that are wrong are said; where none is right it is served on every address, as Swarm serves it.
fn addresses(service: &model::Service, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let Some(label) = service.spec.labels.get(ADDRESSES_LABEL) else {
        return Vec::new();
    };
    let mut addresses = Vec::new();
    for entry in label.split(',').map(str::trim) {
        match served_address(entry) {
            Ok(address) if !addresses.contains(&address) => addresses.push(address),
            Ok(_) => {}
            Err(error) => problems.push(format!("label {ADDRESSES_LABEL}: {error}")),
        }
    }
    addresses
}

/// Who may connect. With an entry that is wrong nobody may: whom it meant to keep out is not known.
fn access(service: &model::Service, problems: &mut Vec<String>) -> Access {
    let mut wrong = false;
    let mut ranges = |label: &str| {
        let entries = service.spec.labels.get(label)?.split(',').map(str::trim);
        let ranges = entries.filter_map(|entry| {
            let range = address_range(entry);
            if let Err(error) = &range {
                wrong = true;
                problems.push(format!("label {label}: {error}; nobody may connect until it is right"));
            }
            range.ok()
        });
        Some(ranges.collect::<Vec<_>>())
    };
    let access = Access { allow: ranges(ALLOW_LABEL), deny: ranges(DENY_LABEL).unwrap_or_default() };
    if wrong { Access::closed() } else { access }
}

fn timers(service: &model::Service, problems: &mut Vec<String>) -> Timers {
    let mut timers = Timers::DEFAULT;
    for (label, seconds) in &service.spec.labels {
        let Some(name) = label.strip_prefix(TIMER_LABEL) else {
            continue;
        };
        let set = seconds.parse().map_err(|_| TimerError::Range(name.to_owned()));
        if let Err(error) = set.and_then(|seconds| set_timer(&mut timers, name, seconds)) {
            problems.push(format!("label {label}={seconds}: {error}"));
        }
    }
    timers
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use lb_common::conntrack::Phase;

    use super::*;
    use crate::{cluster::Tunnel, source::docker::listing::tests::listing};

    #[test]
    fn how_tasks_are_asked_is_said_by_labels() {
        let health = |labels: &[(&str, &str)]| {
            let mut listing = listing();
            let service = &mut listing.services[0];
            service.spec.labels =
                labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            let web = listing.view(Tunnel::default()).cluster.services[1].clone();
            (web.health.as_ref().map(ToString::to_string), web.problem.clone())
        };
        let is = |text: &str| (Some(text.to_owned()), String::new());
        let wrong = |text: &str| (None, text.to_owned());
        assert_eq!(health(&[]), (None, String::new()));
        assert_eq!(health(&[("lb.health", "docker")]), (None, String::new()));
        assert_eq!(health(&[("lb.health", "tcp")]), is("tcp :8080 every 2000 ms, rise 2, fall 3"));
        let all = [
            ("lb.health", "http"),
            ("lb.health.port", "9000"),
            ("lb.health.path", "/up"),
            ("lb.health.interval", "500ms"),
            ("lb.health.rise", "1"),
            ("lb.health.fall", "9"),
        ];
        assert_eq!(health(&all), is("http :9000/up every 500 ms, rise 1, fall 9"));
        for (labels, said) in [
            (
                &[("lb.health", "icmp")][..],
                "label lb.health: health \"icmp\" is none of docker, tcp, http; its tasks are not asked",
            ),
            (
                &[("lb.health", "tcp"), ("lb.health.port", "x")],
                "label lb.health.port=x is no number from 0 to 65535; its tasks are not asked",
            ),
            (
                &[("lb.health.path", "/up")],
                "label lb.health.path has no effect without lb.health=tcp or http",
            ),
            (&[("lb.slow-start", "soon")], "label lb.slow-start: \"soon\" is no time from 1s to 1h"),
            (
                &[("lb.task-max-connections", "x")],
                "label lb.task-max-connections=x: a task may have 1 to 1000000 connections",
            ),
            (&[("lb.eject", "0")], "label lb.eject: \"0\" is neither off nor a number from 1 to 100"),
            (&[("lb.healthy", "tcp")], "label lb.healthy is unknown; did you mean lb.health?"),
        ] {
            assert_eq!(health(labels), wrong(said), "{labels:?}");
        }
    }

    #[test]
    fn who_takes_no_more_is_set_by_labels() {
        let limits = |labels: &[(&str, &str)]| {
            let mut listing = listing();
            let pairs = labels.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned()));
            listing.services[0].spec.labels.extend(pairs);
            let service = &listing.view(Tunnel::default()).cluster.services[1];
            (service.task_max_connections, service.eject)
        };
        assert_eq!(limits(&[]), (0, 0));
        assert_eq!(limits(&[("lb.task-max-connections", "200"), ("lb.eject", "5")]), (200, 5));
        // Where the fewest connections decide, a task that refuses all has them.
        let least = ("lb.scheduler", "least-connections");
        assert_eq!(limits(&[least]), (0, 3));
        assert_eq!(limits(&[least, ("lb.eject", "off")]), (0, 0));
    }

    #[test]
    fn what_comes_first_is_set_by_a_label() {
        let prefer = |value: &str| {
            let mut listing = listing();
            listing.services[0].spec.labels.insert(PREFER_LABEL.into(), value.into());
            let service = &listing.view(Tunnel::default()).cluster.services[1];
            (service.prefer, service.problem.clone())
        };
        assert_eq!(prefer("any").0, Prefer::Any);
        assert_eq!(prefer("local").0, Prefer::Local);
        assert_eq!(prefer("zone").0, Prefer::Zone);
        assert_eq!(prefer("local-only").0, Prefer::LocalOnly);
        let (chosen, problem) = prefer("near");
        assert_eq!(chosen, Prefer::Any);
        assert!(
            problem.contains("label lb.prefer=near is none of any, local, zone, local-only"),
            "{problem}"
        );
    }

    #[test]
    fn a_node_s_labels_say_where_it_is_and_what_its_tasks_weigh() {
        let with = |labels: &[(&str, &str)]| {
            let mut listing = listing();
            let node = listing.nodes.iter_mut().find(|node| node.id == "n1").unwrap();
            node.spec.labels =
                labels.iter().map(|(label, value)| ((*label).into(), (*value).into())).collect();
            let cluster = listing.view(Tunnel::default()).cluster;
            let node = cluster.nodes.iter().find(|node| node.name == "n1").unwrap().clone();
            let mut weights: Vec<(bool, u16)> =
                cluster.services[1].tasks.iter().map(|task| (task.node == "n1", task.weight)).collect();
            weights.sort_unstable();
            weights.dedup();
            (node.zone, node.label_problem, weights)
        };
        let none = String::new();
        assert_eq!(with(&[]), (none.clone(), none.clone(), vec![(false, 1), (true, 1)]));
        let said = with(&[("zone", "fsn1\u{1b}"), ("lb.weight", "3"), ("com.example.zone", "x")]);
        assert_eq!(said, ("fsn1\u{fffd}".to_owned(), none.clone(), vec![(false, 1), (true, 3)]));
        assert_eq!(with(&[("lb.weight", "0")]).2, [(false, 1), (true, 0)]);
        for wrong in ["11", "-1", "heavy", ""] {
            let (_, problem, weights) = with(&[("lb.weight", wrong)]);
            assert_eq!(problem, format!("label lb.weight={wrong} is no number from 0 to 10"));
            assert_eq!(weights, [(false, 1), (true, 1)]);
        }
        let unknown = with(&[("lb.wieght", "3"), ("lb.timers.established", "9")]).1;
        let timer = "label lb.timers.established is unknown";
        assert_eq!(unknown, format!("{timer}; label lb.wieght is unknown; did you mean lb.weight?"));
        let long = "x".repeat(1_000);
        assert_eq!(with(&[("lb.weight", &long)]).1.len(), LONGEST_PROBLEM);
    }

    #[test]
    fn affinity_is_set_by_a_label() {
        let affinity = |value: &str| {
            let mut listing = listing();
            listing.services[0].spec.labels.insert(AFFINITY_LABEL.into(), value.into());
            let service = listing.view(Tunnel::default()).cluster.services[1].clone();
            (service.affinity, service.problem.clone())
        };
        assert_eq!(affinity("client").0, Affinity::Client);
        assert_eq!(affinity("none").0, Affinity::None);
        let (chosen, problem) = affinity("cookie");
        assert_eq!(chosen, Affinity::None);
        assert!(problem.contains("label lb.affinity=cookie is neither none nor client"), "{problem}");
    }

    #[test]
    fn clients_of_a_network_are_one_if_labels_say_so() {
        let prefix = |labels: serde_json::Value| {
            let service: model::Service = serde_json::from_value(
                serde_json::json!({ "ID": "s1", "Spec": { "Name": "web", "Labels": labels } }),
            )
            .unwrap();
            let mut notes = Vec::new();
            (client_prefix(&service, &mut notes), notes.join("; "))
        };
        let (v4, v6) = (V4_PREFIX_LABEL, V6_PREFIX_LABEL);
        assert_eq!(prefix(serde_json::json!({})), (ClientPrefix::WHOLE, String::new()));
        let both = prefix(serde_json::json!({ v4: "24", v6: "56" }));
        assert_eq!(both, (ClientPrefix { v4: 24, v6: 56 }, String::new()));
        let (one, said) = prefix(serde_json::json!({ v4: "33", v6: "64" }));
        assert_eq!(one, ClientPrefix { v4: 32, v6: 64 });
        assert_eq!(
            said,
            "label lb.affinity.v4-prefix=33: a prefix of IPv4 has a length from 1 to 32, not 33"
        );
        let (_, said) = prefix(serde_json::json!({ v6: "96" }));
        assert_eq!(
            said,
            "label lb.affinity.v6-prefix=96: a prefix of IPv6 has a length from 1 to 64, or 128, not 96"
        );
        assert!(prefix(serde_json::json!({ v4: "wide" })).1.contains("is a number"));
        for (labels, has_effect) in [
            (serde_json::json!({ v6: "64" }), false),
            (serde_json::json!({ v6: "64", AFFINITY_LABEL: "client" }), true),
            (serde_json::json!({ v6: "64", SCHEDULER_LABEL: "source" }), true),
        ] {
            let labelled: model::Service = serde_json::from_value(
                serde_json::json!({ "ID": "s1", "Spec": { "Name": "web", "Labels": labels } }),
            )
            .unwrap();
            let problem = service(&labelled, &[]).problem;
            assert_eq!(problem.is_empty(), has_effect, "{problem}");
            assert!(has_effect || problem.contains("label lb.affinity.v6-prefix has no effect"), "{problem}");
        }
    }

    #[test]
    fn the_scheduler_is_set_by_a_label() {
        let set = |value: &str| {
            let service: model::Service = serde_json::from_value(serde_json::json!({
                "ID": "s1", "Spec": {"Name": "web", "Labels": {SCHEDULER_LABEL: value}}
            }))
            .unwrap();
            let mut notes = Vec::new();
            (scheduler(&service, &mut notes), notes.pop())
        };
        for known in Scheduler::ALL {
            assert_eq!(set(known.name()), (known, None));
        }
        let before: model::Service = serde_json::from_value(serde_json::json!({
            "ID": "s1", "Spec": {"Name": "web", "Labels": {"lb.placement": "consistent"}}
        }))
        .unwrap();
        let mut notes = unknown_labels(&before);
        assert_eq!(scheduler(&before, &mut notes), Scheduler::Maglev);
        assert_eq!(notes, ["label lb.placement is called lb.scheduler now, and consistent maglev"]);
        let said =
            "label lb.scheduler=sticky is none of round-robin, least-connections, random, maglev, source";
        assert_eq!(set("sticky"), (Scheduler::RoundRobin, Some(said.to_owned())));
    }

    #[test]
    fn whom_no_service_takes_is_a_label_of_any_and_what_is_wrong_in_it_is_said() {
        let of: model::Service = serde_json::from_value(serde_json::json!({ "ID": "s1", "Spec": {
            "Name": "quiet", "Labels": {"lb.cluster.deny": "192.0.2.66, office,2001:db8::1/32"}
        }}))
        .unwrap();
        assert_eq!(denied(&of), ["192.0.2.66/32", "2001:db8::/32"].map(|text| text.parse().unwrap()));
        let described = service(&of, &[]);
        let wrong = "label lb.cluster.deny: \"office\" is neither an address nor a range of them, as in 192.0.2.0/24 or \
                     2001:db8::/32; the others are denied";
        assert_eq!((described.problem.as_str(), described.access.is_open()), (wrong, true));
    }

    #[test]
    fn who_may_connect_is_set_by_labels_and_a_wrong_one_lets_nobody_in() {
        let access = |labels: &[(&str, &str)]| {
            let labels: HashMap<&str, &str> = labels.iter().copied().collect();
            let service: model::Service = serde_json::from_value(
                serde_json::json!({ "ID": "s1", "Spec": {"Name": "web", "Labels": labels} }),
            )
            .unwrap();
            let mut problems = Vec::new();
            (access(&service, &mut problems), problems)
        };
        let range = |text: &str| text.parse().unwrap();
        assert_eq!(access(&[]), (Access::default(), vec![]));
        let lists = [(ALLOW_LABEL, "10.0.0.0/8, 2001:db8::7"), (DENY_LABEL, "10.0.0.5")];
        let allow = Some(vec![range("10.0.0.0/8"), range("2001:db8::7/128")]);
        assert_eq!(access(&lists), (Access { allow, deny: vec![range("10.0.0.5/32")] }, vec![]));
        for (label, value, wrong) in [
            (ALLOW_LABEL, "10.0.0.0/8,office", "office"),
            (DENY_LABEL, "10.0.0.0/33", "10.0.0.0/33"),
            (ALLOW_LABEL, "", ""),
        ] {
            let said = format!(
                "label {label}: {wrong:?} is neither an address nor a range of them, as in 192.0.2.0/24 or 2001:db8::/32; nobody \
                 may connect until it is right"
            );
            assert_eq!(access(&[(label, value)]), (Access::closed(), vec![said]));
        }
    }

    #[test]
    fn unknown_labels_and_wrong_values_go_with_their_service() {
        let mut listing = listing();
        for (label, value) in [("lb.schedular", "maglev"), ("lb.idle", "kill"), ("com.example.lb.x", "1")] {
            listing.services[0].spec.labels.insert(label.into(), value.into());
        }
        let problem = &listing.view(Tunnel::default()).cluster.services[1].problem;
        let timer =
            "there is no timer \"idle\"; those there are: half_open, established, closing, one_way, answered";
        assert_eq!(
            *problem,
            format!(
                "label lb.schedular is unknown; did you mean lb.scheduler?; label lb.timers.idle=9: {timer}; \
                 label lb.idle=kill is neither forget nor reset"
            )
        );
    }

    #[test]
    fn addresses_are_named_by_a_label_and_wrong_ones_are_said() {
        let mut listing = listing();
        let mut say = |value: &str| {
            listing.services[0].spec.labels = [(ADDRESSES_LABEL.to_owned(), value.to_owned())].into();
            let service = listing.view(Tunnel::default()).cluster.services[1].clone();
            (service.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), service.problem.clone())
        };
        let (addresses, problem) = say("192.0.2.200, 2001:db8::200,192.0.2.200");
        assert_eq!(addresses, ["192.0.2.200", "2001:db8::200"]);
        assert_eq!(problem, "");
        for (wrong, what) in [
            ("192.0.2.0/24", "\"192.0.2.0/24\" is no address"),
            ("", "\"\" is no address"),
            ("224.0.0.1", "nobody can connect to 224.0.0.1 by the interface"),
            ("127.0.0.1", "nobody can connect to 127.0.0.1 by the interface"),
            ("::", "nobody can connect to :: by the interface"),
        ] {
            let (addresses, problem) = say(&format!("192.0.2.200,{wrong}"));
            assert_eq!(addresses, ["192.0.2.200"]);
            assert_eq!(problem, format!("label lb.addresses: {what}"));
        }
    }

    #[test]
    fn timers_are_set_by_labels_and_unknown_ones_are_named() {
        let view = listing().view(Tunnel::default());
        let seconds = view.cluster.services[1].timers.seconds;
        assert_eq!((seconds[Phase::Established as usize], seconds[Phase::HalfOpen as usize]), (900, 30));
        let said = "label lb.timers.idle=9: there is no timer \"idle\"";
        assert!(view.cluster.services[1].problem.starts_with(said), "{}", view.cluster.services[1].problem);
    }

    #[test]
    fn what_becomes_of_idle_connections_is_set_by_a_label() {
        let idle = |value: &str| {
            let mut listing = listing();
            listing.services[0].spec.labels.insert(IDLE_LABEL.into(), value.into());
            let view = listing.view(Tunnel::default());
            let service = &view.cluster.services[1];
            let said = service.problem.split("; ").find(|said| said.contains(IDLE_LABEL));
            (service.idle, said.map(str::to_owned))
        };
        assert_eq!(listing().view(Tunnel::default()).cluster.services[1].idle, Idle::Forget);
        assert_eq!(idle("forget"), (Idle::Forget, None));
        assert_eq!(idle("reset"), (Idle::Reset, None));
        let said = "label lb.idle=kill is neither forget nor reset".to_owned();
        assert_eq!(idle("kill"), (Idle::Forget, Some(said)));
    }
}
