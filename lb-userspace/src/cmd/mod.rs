//! The verbs, a file each: arguments in, text out.

pub mod attach;
pub mod clients;
pub mod connections;
pub mod detach;
pub mod doctor;
pub mod drain;
pub mod events;
pub mod explain;
pub mod generate;
pub mod keygen;
mod list;
pub mod log_level;
pub mod metrics;
pub mod node;
mod out;
pub mod service;
pub mod stats;
pub mod status;
pub mod support;
pub mod task;
pub mod top;
mod uplinks;

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    cli::{Output, Read},
    datapath::{DatapathError, Hint, TableSet, attached_interfaces},
    inventory::Inventory,
};

/// The interfaces to read from, each with its tables.
fn attached(read: &Read) -> Result<Vec<(String, TableSet)>, DatapathError> {
    let names = match &read.iface {
        Some(name) => vec![name.clone()],
        None => attached_interfaces()?,
    };
    if names.is_empty() {
        return Err(DatapathError::NotAttached(None));
    }
    names.into_iter().map(|name| TableSet::of(&name).map(|set| (name, set))).collect()
}

/// What there is on each interface.
fn inventories(read: &Read) -> Result<Vec<(Inventory, TableSet)>> {
    let attached = attached(read)?;
    let read = |(name, set): (String, TableSet)| Ok((Inventory::read(&name, &set)?, set));
    attached.into_iter().map(read).collect()
}

/// Prints everything about one thing, as `docker inspect` does: a list of documents, one an interface.
fn inspect(
    read: &Read,
    kind: &str,
    name: &str,
    of: impl Fn(&Inventory, &TableSet) -> Result<Found>,
) -> Result<()> {
    let (mut documents, mut known) = (Vec::new(), Vec::new());
    for (inventory, set) in inventories(read)? {
        match of(&inventory, &set)? {
            Found::It(mut document) => {
                document["interface"] = json!(inventory.interface);
                documents.push(document);
            }
            Found::Others(names) => known.extend(names),
        }
    }
    if documents.is_empty() {
        return Err(unknown(kind, name, &known));
    }
    if read.output == Output::Json {
        return out::json(json!({ "interfaces": documents }), false);
    }
    documents.iter().try_for_each(|document| out::line(tree(document, 0).trim_end()))
}

/// What was asked for, or the names of those there are.
enum Found {
    It(Value),
    Others(Vec<String>),
}

/// There is nothing of this name.
fn unknown(kind: &str, name: &str, known: &[String]) -> anyhow::Error {
    let hint = Hint::nearest(name, known.iter().map(String::as_str));
    let list = if kind == "task" { "service ps SERVICE".to_owned() } else { format!("{kind} ls") };
    anyhow::anyhow!("there is no {kind} {name}{hint}; `lb-userspace {list}` lists those there are")
}

/// A document as people read it: fields under each other, what belongs to one indented.
fn tree(document: &Value, depth: usize) -> String {
    let indent = "  ".repeat(depth);
    let mut lines = String::new();
    for (field, value) in document.as_object().into_iter().flatten() {
        let label = format!("{indent}{}:", field.replace('_', " "));
        match value {
            Value::Null => {}
            Value::Object(_) => lines += &format!("{label}\n{}", tree(value, depth + 1)),
            Value::Array(items) if items.iter().any(Value::is_object) => {
                lines += &format!("{label}\n");
                for item in items {
                    let item = tree(item, depth + 2);
                    // A dash takes the place of the first line's indentation.
                    lines += &format!("{indent}  - {}", item.trim_start());
                }
            }
            _ => lines += &format!("{label:<26} {}\n", list::text(document, field)),
        }
    }
    lines
}
