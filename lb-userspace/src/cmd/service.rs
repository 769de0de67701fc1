//! `service ls` and `service ps`: what is published, and by which tasks it is served.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use lb_common::{
    backend::{Kind, State},
    stats::BackendStats,
};
use serde_json::{Value, json};

use super::{attached, print_json, print_table, table};
use crate::{
    cli::{Output, Read, ServiceCommand},
    datapath::{Counters, TableSet},
    plan::{BackendEntry, Tables},
};

/// Runs a service verb.
///
/// # Errors
/// Nothing is attached, there is no such service, or the kernel refuses a read.
pub fn run(command: &ServiceCommand) -> Result<()> {
    match command {
        ServiceCommand::Ls(read) => ls(read),
        ServiceCommand::Ps { name, read } => ps(name, read),
    }
}

/// Tasks of a service that take new flows on all their ports and addresses.
fn active(tables: &Tables, service: u32) -> usize {
    let mut tasks: BTreeMap<&str, bool> = BTreeMap::new();
    for entry in tables.backends.values().filter(|entry| entry.backend.service == service) {
        *tasks.entry(&entry.label.task).or_insert(true) &= entry.backend.state == State::Active as u8;
    }
    tasks.values().filter(|active| **active).count()
}

fn ls(read: &Read) -> Result<()> {
    let attached = attached(read)?;
    let several = attached.len() > 1;
    let mut documents = Vec::new();
    for (interface, set) in attached {
        let tables = set.read_labelled()?;
        let counters = set.counters(&tables)?;
        let mut rows = table(["NAME", "REPLICAS", "PORTS", "CONNECTIONS", "REFUSED"]);
        let mut services = Vec::new();
        let mut by_name: Vec<_> = tables.services.iter().collect();
        by_name.sort_by(|a, b| a.1.name.cmp(&b.1.name));
        for (index, service) in by_name {
            let mut ports: Vec<String> = tables
                .ports
                .values()
                .filter(|port| port.service == *index)
                .map(|port| format!("*:{}->{}/{}", port.published, port.target, port.protocol))
                .collect();
            let served = !ports.is_empty();
            ports.extend(service.left.clone());
            let active = active(&tables, *index);
            let stats = counters.services.get(index).copied().unwrap_or_default();
            rows.add_row([
                service.name.clone(),
                if served { format!("{active}/{}", service.tasks) } else { "-".to_owned() },
                ports.join(", "),
                stats.connections.to_string(),
                stats.refused.to_string(),
            ]);
            services.push(json!({
                "name": service.name, "active_tasks": active, "tasks": service.tasks, "ports": ports, "left_to_swarm": service.left,
                "connections": stats.connections, "refused_connections": stats.refused,
            }));
        }
        documents.push(json!({ "interface": interface, "services": services }));
        if read.output == Output::Table {
            print_table(&interface, several, &rows);
        }
    }
    if read.output == Output::Json {
        print_json(json!({ "interfaces": documents }));
    }
    Ok(())
}

fn ps(name: &str, read: &Read) -> Result<()> {
    let attached = attached(read)?;
    let several = attached.len() > 1;
    let mut documents = Vec::new();
    for (interface, set) in attached {
        let Some(tasks) = tasks(&set, name)? else {
            continue;
        };
        let mut rows =
            table(["NAME", "NODE", "STATE", "VIA", "ADDRESS", "CONNECTIONS", "OPEN", "FAILOVERS", "PROBLEM"]);
        for task in &tasks {
            let text =
                |field: &str| task[field].as_str().map_or_else(|| task[field].to_string(), str::to_owned);
            let addresses: Vec<&str> =
                task["addresses"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            rows.add_row([
                text("name"),
                text("node"),
                text("state"),
                text("via"),
                addresses.join(", "),
                text("connections"),
                text("open_connections"),
                text("failovers"),
                task["problem"].as_str().unwrap_or_default().to_owned(),
            ]);
        }
        documents.push(json!({ "interface": interface, "service": name, "tasks": tasks }));
        if read.output == Output::Table {
            print_table(&interface, several, &rows);
        }
    }
    if documents.is_empty() {
        bail!("there is no service {name}; `lb-userspace service ls` lists those there are");
    }
    if read.output == Output::Json {
        print_json(json!({ "interfaces": documents }));
    }
    Ok(())
}

/// The tasks of a service, each with all its ports; `None` if there is no such service.
fn tasks(set: &TableSet, name: &str) -> Result<Option<Vec<Value>>> {
    let tables = set.read_labelled()?;
    let Some(index) =
        tables.services.iter().find(|(_, service)| service.name == name).map(|(index, _)| *index)
    else {
        return Ok(None);
    };
    let counters = set.counters(&tables)?;
    let open = set.open_connections(&tables)?;
    let mut tasks: BTreeMap<(usize, &str), Vec<(u32, &BackendEntry)>> = BTreeMap::new();
    for (number, entry) in &tables.backends {
        if entry.backend.service == index {
            // web.2 before web.10
            let task = entry.label.task.as_str();
            tasks.entry((task.len(), task)).or_default().push((*number, entry));
        }
    }
    Ok(Some(tasks.into_values().map(|backends| task(&tables, &backends, &counters, &open)).collect()))
}

fn task(
    tables: &Tables,
    backends: &[(u32, &BackendEntry)],
    counters: &Counters,
    open: &BTreeMap<u32, u64>,
) -> Value {
    let label = &backends[0].1.label;
    let stats = backends
        .iter()
        .filter_map(|(number, _)| counters.backends.get(number))
        .fold(BackendStats::default(), |total, stats| total.plus(*stats));
    let addresses: BTreeSet<String> = backends
        .iter()
        .map(|(_, entry)| std::net::SocketAddr::new(entry.label.address, entry.label.target).to_string())
        .collect();
    let problem = backends.iter().find_map(|(_, entry)| entry.label.problem.clone());
    let via = backends.iter().find_map(|(_, entry)| Kind::try_from(entry.backend.kind).ok()).map_or("-", via);
    json!({
        "name": label.task, "node": tables.node_shown(&label.node), "state": label.state.to_string(), "via": via,
        "addresses": addresses, "problem": problem,
        "connections": stats.connections,
        "open_connections": backends.iter().filter_map(|(number, _)| open.get(number)).sum::<u64>(),
        "failovers": stats.failovers,
        "request_packets": stats.request_packets, "request_bytes": stats.request_bytes,
        "reply_packets": stats.reply_packets, "reply_bytes": stats.reply_bytes,
    })
}

/// The name of a backend kind.
fn via(kind: Kind) -> &'static str {
    match kind {
        Kind::Local => "local",
        Kind::Routed => "routed",
        Kind::Snat => "snat",
        Kind::Peer => "peer",
    }
}
