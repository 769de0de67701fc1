//! `node ls`: the machines of the cluster.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::json;

use super::{attached, print_json, print_table, table};
use crate::{
    cli::{NodeCommand, Output, Read},
    plan::Tables,
};

/// Runs a node verb.
///
/// # Errors
/// Nothing is attached, or the kernel refuses a read.
pub fn run(command: &NodeCommand) -> Result<()> {
    let NodeCommand::Ls(read) = command;
    ls(read)
}

fn tasks_of(tables: &Tables, node: &str) -> usize {
    let tasks = tables.backends.values().filter(|entry| entry.label.node == node);
    tasks.map(|entry| (entry.backend.service, &entry.label.task)).collect::<BTreeSet<_>>().len()
}

fn ls(read: &Read) -> Result<()> {
    let attached = attached(read)?;
    let several = attached.len() > 1;
    let mut documents = Vec::new();
    for (interface, set) in attached {
        let tables = set.read_labelled()?;
        let mut rows = table(["NAME", "ADDRESSES", "AGENT", "TASKS", "PROBLEM"]);
        let mut nodes = Vec::new();
        for node in tables.nodes.values() {
            let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
            let tasks = tasks_of(&tables, &node.name);
            // Docker marks the node that answers with a star.
            let mark = if node.this { " *" } else { "" };
            let agent = if node.agent { "yes" } else { "no" };
            rows.add_row([
                format!("{}{mark}", node.shown()),
                addresses.join(", "),
                agent.to_owned(),
                tasks.to_string(),
                node.problem.clone().unwrap_or_default(),
            ]);
            nodes.push(json!({
                "name": node.shown(), "id": node.name, "addresses": addresses, "agent": node.agent, "tasks": tasks,
                "this": node.this, "problem": node.problem,
            }));
        }
        documents.push(json!({ "interface": interface, "nodes": nodes }));
        if read.output == Output::Table {
            print_table(&interface, several, &rows);
        }
    }
    if read.output == Output::Json {
        print_json(json!({ "interfaces": documents }));
    }
    Ok(())
}
