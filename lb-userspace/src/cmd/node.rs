//! `node ls`, `node inspect`: the machines of the cluster.

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Found, drain, inspect, inventories,
    list::{Column, Rows, show, text},
};
use crate::{cli::NodeCommand, report::Drained};

/// Runs a node verb.
///
/// # Errors
/// Nothing is attached, or the kernel refuses a read.
pub async fn run(command: &NodeCommand) -> Result<()> {
    match command {
        NodeCommand::Ls(arguments) => {
            show(arguments, ("nodes", Value::Null), COLUMNS, || {
                let read = inventories(&arguments.read)?;
                read.iter().map(|(inventory, _)| Rows::of(&inventory.interface, &inventory.nodes())).collect()
            })
            .await
        }
        NodeCommand::Drain(arguments) => drain::drain(Drained::Node, arguments).await,
        NodeCommand::Undrain(arguments) => drain::undrain(Drained::Node, arguments),
        NodeCommand::Inspect { name, read } => inspect(read, "node", name, |inventory, _| {
            let nodes = inventory.nodes();
            let Some(node) = nodes.iter().find(|node| node.name == *name || node.id == *name) else {
                return Ok(Found::Others(nodes.into_iter().map(|node| node.name).collect()));
            };
            let number = inventory.tables.nodes.iter().find(|(_, label)| label.name == node.id);
            let tasks = inventory.tasks(|_| true, None).into_iter().filter(|task| task.node == node.name);
            let mut document = serde_json::to_value(node)?;
            document["number"] = json!(number.map(|(number, _)| number));
            document["tasks"] = serde_json::to_value(tasks.collect::<Vec<_>>())?;
            Ok(Found::It(document))
        }),
    }
}

const COLUMNS: &[Column] = &[
    // Docker marks the node that answers with a star.
    Column("NAME", |row| text(row, "name") + if row["this"] == true { " *" } else { "" }),
    Column("ADDRESSES", |row| text(row, "addresses")),
    Column("REACHED BY", |row| text(row, "reached_by")),
    Column("AGENT", |row| text(row, "agent")),
    Column("KEY", |row| text(row, "key")),
    Column("FORGED", |row| text(row, "forged_packets")),
    Column("TASKS", |row| text(row, "tasks")),
    Column("PROBLEM", |row| text(row, "problem")),
];
