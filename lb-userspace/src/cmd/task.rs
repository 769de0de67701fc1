//! `task ls`, `task inspect`: what serves.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Found, drain, inspect, inventories, list, list::Rows, service};
use crate::{cli::TaskCommand, report::Drained};

/// Runs a task verb.
///
/// # Errors
/// Nothing is attached, there is no such task, or the kernel refuses a read.
pub async fn run(command: &TaskCommand) -> Result<()> {
    match command {
        TaskCommand::Ls(arguments) => {
            list::show(arguments, ("tasks", Value::Null), service::TASKS, || {
                let read = inventories(&arguments.read)?.into_iter().map(|(inventory, set)| {
                    let open = set.open_connections(&inventory.tables)?;
                    Rows::of(&inventory.interface, &inventory.tasks(|_| true, Some(&open)))
                });
                read.collect()
            })
            .await
        }
        TaskCommand::Drain(arguments) => drain::drain(Drained::Task, arguments).await,
        TaskCommand::Undrain(arguments) => drain::undrain(Drained::Task, arguments),
        TaskCommand::Inspect { name, read } => inspect(read, "task", name, |inventory, set| {
            let mut tasks = inventory.tasks(|_| true, None);
            let Some(at) = tasks.iter().position(|task| task.name == *name) else {
                return Ok(Found::Others(tasks.into_iter().map(|task| task.name).collect()));
            };
            let open = set.open_connections(&inventory.tables)?;
            let mut task = tasks.swap_remove(at);
            let its = inventory.tables.backends.iter().filter(|(_, entry)| entry.label.task == *name);
            let mut total = 0;
            let ports: Vec<Value> = its
                .map(|(number, entry)| {
                    let stats = inventory.counters.backends.get(number).copied().unwrap_or_default();
                    let open = open.get(number).copied().unwrap_or_default();
                    total += open;
                    json!({
                        "backend": number, "generation": entry.backend.generation,
                        "address": entry.label.own(), "target": entry.label.target,
                        "translated": entry.label.own.is_some(),
                        "protocol": entry.label.protocol, "overlay": entry.label.overlay,
                        "connections": stats.connections, "open_connections": open, "failovers": stats.failovers,
                    })
                })
                .collect();
            task.open_connections = Some(total);
            let mut document = serde_json::to_value(&task)?;
            document["ports"] = json!(ports);
            Ok(Found::It(document))
        }),
    }
}
