//! `status`: what is attached, how, and who controls it.

use anyhow::Result;
use lb_common::abi::{Config, Mode, XDP_FRAGS, XDP_REDIRECTS, XDP_TRANSMITS};
use serde_json::json;

use super::{attached, print_json};
use crate::{
    cli::{Output, Read},
    controller::name,
    datapath::{self, PinDir, TableSet, TcHook},
};

/// Prints the status of every attached interface.
///
/// # Errors
/// Nothing is attached, or the kernel refuses a read.
pub fn run(read: &Read) -> Result<()> {
    let mut interfaces = Vec::new();
    for (interface, set) in attached(read)? {
        interfaces.push(describe(&interface, &set)?);
    }
    if read.output == Output::Json {
        print_json(json!({ "interfaces": interfaces }));
        return Ok(());
    }
    for status in interfaces {
        println!("{}", status["interface"].as_str().unwrap_or_default());
        for (field, value) in status.as_object().into_iter().flatten() {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if field != "interface" && field != "tables" && !value.is_null() {
                println!("  {:<20} {text}", field.replace('_', " "));
            }
        }
    }
    Ok(())
}

fn describe(interface: &str, set: &TableSet) -> Result<serde_json::Value> {
    let config = set.surroundings()?;
    let tables = set.read_labelled()?;
    let memory = set.memory()?;
    let total: u64 = memory.iter().map(|(_, bytes)| bytes).sum();
    let pins = PinDir::of(interface)?;
    let controller = pins.controller();
    let (state, placed) = set.guard()?;
    let guard = match config.flood_rate {
        0 => "off".to_owned(),
        rate => format!(
            "above {rate} new connections a second; took over {} times, placed {placed} connections",
            state.switches
        ),
    };
    let report = set.report().unwrap_or_default();
    let delay = report.delay;
    Ok(json!({
        "interface": interface,
        "mode": Mode::try_from(config.mode).map_or("not attached", name),
        "kernel": datapath::release(),
        "tc_hook": if pins.has_tc_link() { TcHook::Tcx } else { TcHook::Clsact }.to_string(),
        "xdp_frags": config.flags & XDP_FRAGS != 0,
        "sent_by": sender(&config),
        "told_to_tc_by": note(&config),
        "clock": format!("jiffies, {} a second", config.jiffies_per_second),
        "controller": controller.map_or_else(|| "none; the datapath goes on by itself".to_owned(), |pid| format!("process {pid}")),
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
        "connection_room": set.entries(lb_common::abi::table::CONNECTIONS4)? * lb_common::conntrack::line::WAYS,
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
