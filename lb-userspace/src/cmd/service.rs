//! `service ls`, `service ps`, `service inspect`: what is published, and by which tasks it is served.

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Found, inspect, inventories,
    list::{Column, Rows, show, text},
    unknown,
};
use crate::cli::{ListArgs, ServiceCommand};

/// Runs a service verb.
///
/// # Errors
/// Nothing is attached, there is no such service, or the kernel refuses a read.
pub async fn run(command: &ServiceCommand) -> Result<()> {
    match command {
        ServiceCommand::Ls(arguments) => {
            show(arguments, ("services", Value::Null), SERVICES, || {
                let read = inventories(&arguments.read)?;
                read.iter()
                    .map(|(inventory, _)| Rows::of(&inventory.interface, &inventory.services()))
                    .collect()
            })
            .await
        }
        ServiceCommand::Ps { name, list } => {
            show(list, ("tasks", json!({ "service": name })), TASKS, || ps(name, list)).await
        }
        ServiceCommand::Inspect { name, read } => inspect(read, "service", name, |inventory, set| {
            let services = inventory.services();
            let (Some(index), Some(service)) =
                (inventory.service(name), services.iter().find(|service| service.name == *name))
            else {
                return Ok(Found::Others(services.into_iter().map(|service| service.name).collect()));
            };
            let open = set.open_connections(&inventory.tables)?;
            let tasks = inventory.tasks(|service| service == index, Some(&open));
            let mut document = serde_json::to_value(service)?;
            document["number"] = json!(index);
            document["settings"] = inventory.settings(index);
            document["tasks"] = serde_json::to_value(tasks)?;
            Ok(Found::It(document))
        }),
    }
}

/// The tasks of a service on each interface that has it.
fn ps(name: &str, arguments: &ListArgs) -> Result<Vec<Rows>> {
    let (mut rows, mut known) = (Vec::new(), Vec::new());
    for (inventory, set) in inventories(&arguments.read)? {
        let Some(index) = inventory.service(name) else {
            known.extend(inventory.services().into_iter().map(|service| service.name));
            continue;
        };
        let open = set.open_connections(&inventory.tables)?;
        let tasks = inventory.tasks(|service| service == index, Some(&open));
        rows.push(Rows::of(&inventory.interface, &tasks)?);
    }
    if rows.is_empty() {
        return Err(unknown("service", name, &known));
    }
    Ok(rows)
}

const SERVICES: &[Column] = &[
    Column("NAME", |row| text(row, "name")),
    Column("REPLICAS", |row| {
        let left = row["left_to_swarm"].as_str().unwrap_or_default();
        // What is left to Swarm is not ours to count.
        if text(row, "ports") == left {
            "-".to_owned()
        } else {
            format!("{}/{}", row["active_tasks"], row["tasks"])
        }
    }),
    Column("PORTS", |row| text(row, "ports")),
    Column("CONNECTIONS", |row| text(row, "connections")),
    Column("REFUSED", |row| text(row, "refused_connections")),
    Column("DENIED", |row| text(row, "denied_packets")),
    Column("FAILOVERS", |row| text(row, "failovers")),
    Column("PROBLEM", |row| text(row, "problem")),
];

pub(super) const TASKS: &[Column] = &[
    Column("NAME", |row| text(row, "name")),
    Column("NODE", |row| text(row, "node")),
    Column("STATE", |row| text(row, "state")),
    Column("VIA", |row| text(row, "via")),
    Column("SHARE", |row| format!("{}%", row["share"])),
    Column("ADDRESS", |row| text(row, "addresses")),
    Column("CONNECTIONS", |row| text(row, "connections")),
    Column("OPEN", |row| text(row, "open_connections")),
    Column("FAILOVERS", |row| text(row, "failovers")),
    Column("PROBLEM", |row| text(row, "problem")),
];
