//! `stats`: counters by outcome, service and task.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::json;

use super::{
    attached,
    list::{PERIOD, table, table_out},
    out,
};
use crate::{
    cli::{Output, Read},
    datapath::{Counters, TableSet},
    plan::Tables,
};

/// Prints the counters, again every second if asked to.
///
/// # Errors
/// Nothing is attached, or the kernel refuses a read.
pub async fn run(read: &Read, watch: bool) -> Result<()> {
    let mut before: BTreeMap<String, Counters> = BTreeMap::new();
    let mut first = true;
    loop {
        if watch && read.output == Output::Table {
            out::redraw(first)?;
        }
        let attached = attached(read)?;
        let several = attached.len() > 1;
        let mut documents = Vec::new();
        for (interface, set) in attached {
            let tables = set.read_labelled()?;
            let counters = set.counters(&tables)?;
            if read.output == Output::Json {
                documents.push(document(&interface, &tables, &counters));
            } else {
                print(&interface, several, &tables, &counters, before.get(&interface))?;
            }
            before.insert(interface, counters);
        }
        if read.output == Output::Json {
            out::json(json!({ "interfaces": documents }), watch)?;
        }
        if !watch {
            return Ok(());
        }
        first = false;
        tokio::time::sleep(PERIOD).await;
    }
}

fn print(
    interface: &str,
    several: bool,
    tables: &Tables,
    counters: &Counters,
    before: Option<&Counters>,
) -> Result<()> {
    let mut rows = table(["OUTCOME", "PACKETS", "CHANGE", "MEANING"]);
    for count in counters.outcomes.iter().filter(|count| count.packets > 0) {
        let change = before.map_or(0, |before| count.packets.saturating_sub(before.of(count.outcome)));
        rows.add_row([
            count.outcome.name().to_owned(),
            count.packets.to_string(),
            before.map_or_else(String::new, |_| format!("+{change}")),
            count.outcome.help().to_owned(),
        ]);
    }
    table_out(interface, several, &rows)?;
    let mut rows =
        table(["SERVICE", "TASK", "CONNECTIONS", "PACKETS IN", "BYTES IN", "PACKETS OUT", "BYTES OUT"]);
    for (index, entry) in &tables.backends {
        let stats = counters.backends.get(index).copied().unwrap_or_default();
        let service = tables.services.get(&entry.backend.service).map_or("", |service| &service.name);
        let numbers = [
            stats.connections,
            stats.request_packets,
            stats.request_bytes,
            stats.reply_packets,
            stats.reply_bytes,
        ];
        let task = format!("{} {}/{}", entry.label.task, entry.label.target, entry.label.protocol);
        rows.add_row([service.to_owned(), task].into_iter().chain(numbers.map(|number| number.to_string())));
    }
    if !tables.backends.is_empty() {
        out::line("")?;
        table_out(interface, several, &rows)?;
    }
    Ok(())
}

fn document(interface: &str, tables: &Tables, counters: &Counters) -> serde_json::Value {
    let outcomes: serde_json::Map<_, _> = counters
        .outcomes
        .iter()
        .map(|count| (count.outcome.name().to_owned(), json!(count.packets)))
        .collect();
    let services: Vec<_> = tables
        .services
        .iter()
        .map(|(index, service)| {
            let stats = counters.services.get(index).copied().unwrap_or_default();
            json!({ "name": service.name, "connections": stats.connections, "refused_connections": stats.refused })
        })
        .collect();
    let backends: Vec<_> = tables
        .backends
        .iter()
        .map(|(index, entry)| {
            let stats = counters.backends.get(index).copied().unwrap_or_default();
            json!({
                "service": tables.services.get(&entry.backend.service).map(|service| &service.name),
                "task": entry.label.task, "protocol": entry.label.protocol, "target": entry.label.target,
                "address": entry.label.own(), "translated": entry.label.own.is_some(), "connections": stats.connections, "failovers": stats.failovers,
                "request_packets": stats.request_packets, "request_bytes": stats.request_bytes,
                "reply_packets": stats.reply_packets, "reply_bytes": stats.reply_bytes,
            })
        })
        .collect();
    json!({ "interface": interface, "outcomes": outcomes, "services": services, "backends": backends })
}

/// The counters of one interface; tests read them as users would.
///
/// # Errors
/// Nothing is attached, or the kernel refuses a read.
pub fn counters(interface: &str) -> Result<Counters> {
    let set = TableSet::of(interface)?;
    Ok(set.counters(&set.read_labelled()?)?)
}
