//! `status`: what is attached, how, and who controls it.

use std::collections::BTreeSet;

use anyhow::Result;
use lb_common::abi::{Config, Mode, XDP_FRAGS, XDP_REDIRECTS, XDP_TRANSMITS, size, table};
use serde_json::json;

use super::{inventories, out};
use crate::{
    cli::{Output, Read},
    controller::counted,
    datapath::{self, PinDir, TableSet, TcHook},
    health::{AgentState, Health, Verdict, assess},
    inventory::{self, Agent, Inventory},
    report::{Drained, ago},
};

/// Prints the status of every attached interface; whether all are served as they should be.
///
/// # Errors
/// Nothing is attached, or the kernel refuses a read.
pub fn run(read: &Read, verbose: bool) -> Result<bool> {
    let (mut documents, mut healthy) = (Vec::new(), true);
    for (inventory, set) in inventories(read)? {
        let around = AgentState::read(&inventory.interface, &set)?;
        let health = assess(&inventory, &around);
        healthy &= health.verdict == Verdict::Serving;
        let facts = describe(&inventory, &around, &set)?;
        if read.output == Output::Json {
            let mut document = facts;
            document["verdict"] = json!(health.verdict);
            document["problems"] = json!(health.problems);
            documents.push(document);
            continue;
        }
        say(&inventory, &around, &health, facts["memory_bytes"].as_u64().unwrap_or_default())?;
        for (field, value) in facts.as_object().into_iter().flatten().filter(|_| verbose) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if field != "interface" && !value.is_null() && !value.is_array() {
                out::line(format!("  {:<20} {text}", field.replace('_', " ")))?;
            }
        }
    }
    if read.output == Output::Json {
        out::json(json!({ "interfaces": documents }), false)?;
    } else if !verbose {
        out::line(
            "(--verbose for the kernel, hooks and tables; -o json for programs; `lb-userspace doctor` for what to do)",
        )?;
    }
    Ok(healthy)
}

/// The short of it, for people.
fn say(inventory: &Inventory, around: &AgentState, health: &Health, memory: u64) -> Result<()> {
    let report = &inventory.report;
    let mode = Mode::try_from(around.config.mode).map_or("not attached yet", Mode::name);
    let controller = match around.controller {
        None => NO_CONTROLLER.to_owned(),
        Some(pid) => format!("process {pid}, up {}", ago(report.started)),
    };
    let services = inventory.services();
    let count = |active: fn(&inventory::Service) -> usize| services.iter().map(active).sum::<usize>();
    let tasks = format!("{}/{}", count(|s| s.active_tasks), count(|s| s.tasks as usize));
    let nodes = inventory.nodes();
    let agents = nodes.iter().filter(|node| node.agent != Agent::None).count();
    let answer = nodes.iter().filter(|node| node.agent == Agent::Yes).count();
    let state = match &report.problem {
        None => format!("fresh, last change {} ago", ago(report.since)),
        Some(_) => format!("STALE for {}", ago(report.since)),
    };
    let full = |[entries, room]: &[u64; 2]| (*entries as f64 / (*room).max(1) as f64 * 100.0, *entries);
    let fullest = around.fills.iter().map(|(table, fill)| (full(fill), table));
    let fullest = fullest.max_by(|a, b| a.0.0.total_cmp(&b.0.0));
    let fullest = fullest.map_or_else(String::new, |((percent, entries), table)| {
        format!(", {table} the fullest with {percent:.1} % ({entries})")
    });
    out::line(format!("{}  {}", inventory.interface, health.verdict.name()))?;
    out::line(format!("  served by   {mode}"))?;
    out::line(format!("  controller  {controller}"))?;
    out::line(format!("  source      {}: {state}", report.kind))?;
    out::line(format!("  services    {}, {tasks} tasks take new connections", services.len()))?;
    let ways: BTreeSet<&str> = nodes.iter().filter_map(|node| node.reached_by.as_deref()).collect();
    let ways = Vec::from_iter(ways).join(", ");
    let by = if ways.is_empty() { String::new() } else { format!("; the others are reached by {ways}") };
    out::line(format!("  nodes       {answer} of {agents} answer{by}"))?;
    out::line(format!("  tables      {:.1} MiB{fullest}", memory as f64 / f64::from(1 << 20)))?;
    if let denied @ 1.. = inventory.tables.denied().count() {
        out::line(format!("  denied      {} of clients, by every service", counted(denied, "range")))?;
    }
    for drain in &inventory.drains {
        let what = match drain.what {
            Drained::Task => "task",
            Drained::Node => "node",
        };
        out::line(format!(
            "  drained     {what} {}, for {}",
            inventory.drained_name(drain),
            ago(drain.since)
        ))?;
    }
    health.problems.iter().try_for_each(|problem| out::line(format!("  PROBLEM     {problem}")))
}

/// What stands in place of a controller.
const NO_CONTROLLER: &str = "none; the datapath goes on by itself";

/// The facts of an interface, for programs.
pub(super) fn describe(
    inventory: &Inventory,
    around: &AgentState,
    set: &TableSet,
) -> Result<serde_json::Value> {
    let (interface, config, tables) = (&inventory.interface, &around.config, &inventory.tables);
    let memory = set.memory()?;
    let total: u64 = memory.iter().map(|(_, bytes)| bytes).sum();
    let pins = PinDir::of(interface)?;
    let (state, placed) = set.guard()?;
    let guard = match config.flood_rate {
        0 => "off".to_owned(),
        rate => format!(
            "above {rate} new connections a second; took over {} times, placed {placed} connections",
            state.switches
        ),
    };
    let report = &inventory.report;
    let delay = report.delay;
    Ok(json!({
        "interface": interface,
        "mode": Mode::try_from(config.mode).map_or("not attached", Mode::name),
        "kernel": datapath::release(),
        "tc_hook": if pins.has_tc_link() { TcHook::Tcx } else { TcHook::Clsact }.to_string(),
        "xdp_frags": config.flags & XDP_FRAGS != 0,
        "sent_by": sender(config),
        "told_to_tc_by": note(config),
        "clock": format!("jiffies, {} a second", config.jiffies_per_second),
        "controller": around.controller.map_or_else(|| NO_CONTROLLER.to_owned(), |pid| format!("process {pid}")),
        "controller_pid": around.controller,
        "source": report.kind,
        "source_why": report.why,
        "source_problem": report.problem,
        "state_since": humantime::format_rfc3339_seconds(report.since()).to_string(),
        "change_delay_last_ms": delay.last_ms,
        "change_delay_max_ms": delay.max_ms,
        "change_delay_mean_ms": delay.sum_ms.checked_div(delay.count).unwrap_or_default(),
        "changes": delay.count,
        "tunnel_port": config.tunnel_port.get(),
        "services": tables.services.len(),
        "listeners": tables.listeners.len(),
        "backends": tables.backends.len(),
        "flood_guard": guard,
        "flooded": report.flooded,
        "abi_version": config.abi_version,
        "fills": around.fills,
        "denied": inventory.tables.denied().map(|range| range.to_string()).collect::<Vec<_>>(),
        "drains": inventory.drains,
        "connection_room": size::connections(set.entries(table::CONNECTIONS4)?),
        "memory_bytes": total,
        "tables": memory.iter().map(|(name, bytes)| json!({ "table": name, "memory_bytes": bytes })).collect::<Vec<_>>(),
    }))
}

/// What sends packets out of the uplink.
fn sender(config: &Config) -> &'static str {
    match (config.flags & XDP_TRANSMITS != 0, config.flags & XDP_REDIRECTS != 0) {
        (true, false) => "XDP_TX",
        (true, true) => "XDP, bpf_redirect",
        (false, _) => "TC",
    }
}

/// How XDP tells TC what it decided.
fn note(config: &Config) -> &'static str {
    if config.mode == Mode::Native as u32 && config.metadata_refused == 0 {
        "metadata of the frame"
    } else {
        "nothing; TC looks connections up itself"
    }
}
