//! The verbs, a file each: arguments in, text out.

pub mod attach;
pub mod detach;
pub mod node;
pub mod service;
pub mod stats;
pub mod status;

use anyhow::Result;
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use crate::{
    cli::Read,
    datapath::{DatapathError, TableSet, attached_interfaces},
    text,
};

/// Version of the fields in JSON; it changes when one goes or changes its meaning, not when one is added.
const SCHEMA: u32 = 1;

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

/// Prints a document with its schema version.
fn print_json(mut document: Value) {
    if let Some(fields) = document.as_object_mut() {
        fields.insert("schema".into(), json!(SCHEMA));
    }
    println!("{}", text::clean_json(&format!("{document:#}")));
}

/// A table as Docker prints them: columns apart, no lines.
fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
}

/// Prints a table without blanks at the ends of lines, under the interface's name where there are several.
fn print_table(interface: &str, several: bool, table: &Table) {
    if several {
        println!("{interface}:");
    }
    for line in table.lines() {
        println!("{}", text::clean(line.trim_end()));
    }
}
