//! `support-bundle`: everything that helps somebody else to find out what is wrong, in one file of text.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use super::{inventories, out, status};
use crate::{
    cli::{Output, Read},
    datapath, doctor, events,
    health::{AgentState, assess},
    report,
};

/// Commands whose output is taken, where they are there. None of them shows keys or environments.
const COMMANDS: [&[&str]; 9] = [
    &["ip", "-br", "link"],
    &["ip", "-br", "addr"],
    &["ip", "route"],
    &["ip", "-6", "route"],
    &["ip", "-s", "link"],
    &["ss", "-lntu"],
    &["bpftool", "net"],
    &["docker", "version"],
    &["journalctl", "-u", "lb-userspace", "-n", "1000", "--no-pager", "-o", "short-iso"],
];

/// What a command may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Writes the bundle.
///
/// # Errors
/// The file cannot be written.
pub async fn run(to: Option<&Path>) -> Result<()> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let name = format!("lb-support-{host}-{}.txt", report::moment(report::now()).replace(':', ""));
    let path = to.map_or_else(|| Path::new(&name).to_owned(), Path::to_owned);
    let mut text = String::new();
    let mut section = |title: &str, body: &str| text += &format!("===== {title}\n{}\n\n", body.trim_end());
    section("lb-userspace", &format!("{} on Linux {}", env!("CARGO_PKG_VERSION"), datapath::release()));
    section("time", &report::moment(report::now()));
    let questions = doctor::Questions::default();
    match doctor::examine(&questions).await {
        Ok(findings) => section("doctor", &pretty(&json!(findings.all()))),
        Err(error) => section("doctor", &format!("{error:#}")),
    }
    match gathered() {
        Ok(interfaces) => section("interfaces", &pretty(&json!(interfaces))),
        Err(error) => section("interfaces", &format!("{error:#}")),
    }
    let happened = events::path().and_then(|path| events::read(&path));
    let happened: Vec<String> = happened
        .unwrap_or_default()
        .iter()
        .map(|event| format!("{} {} {} {}", event.moment(), event.interface, event.kind.name(), event.text))
        .collect();
    section("events", &happened.join("\n"));
    for command in COMMANDS {
        section(&command.join(" "), &said(command).await);
    }
    for file in ["/proc/meminfo", "/proc/cpuinfo", "/etc/os-release"] {
        section(file, &fs::read_to_string(file).unwrap_or_else(|error| error.to_string()));
    }
    let open = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut file = open.with_context(|| format!("create {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("write {}", path.display()))?;
    out::line(format!(
        "wrote {} ({} KiB). It names services, nodes and addresses, and holds no keys; look at it before you pass it on",
        path.display(),
        text.len().div_ceil(1024)
    ))
}

/// What a command prints. One that hangs, as Docker's may just then, is left behind.
async fn said(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).kill_on_drop(true).output();
    match tokio::time::timeout(PATIENCE, output).await {
        Ok(Ok(output)) => {
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer in {} s", PATIENCE.as_secs()),
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

/// Everything that the tables say, by interface.
fn gathered() -> Result<Vec<Value>> {
    let read = Read { iface: None, output: Output::Json };
    let one = |(inventory, set): (crate::inventory::Inventory, datapath::TableSet)| {
        let around = AgentState::read(&inventory.interface, &set)?;
        let mut document = status::describe(&inventory, &around, &set)?;
        let open = set.open_connections(&inventory.tables)?;
        document["health"] = json!(assess(&inventory, &around));
        document["service_list"] = json!(inventory.services());
        document["tasks"] = json!(inventory.tasks(|_| true, Some(&open)));
        document["nodes"] = json!(inventory.nodes());
        let outcomes = inventory.counters.outcomes.iter().filter(|count| count.packets > 0);
        document["outcomes"] =
            outcomes.map(|count| (count.outcome.name().to_owned(), json!(count.packets))).collect();
        Ok(document)
    };
    inventories(&read)?.into_iter().map(one).collect()
}
