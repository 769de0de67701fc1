//! `doctor`: is it working, and if not, what to do. Each check looks at one thing and says what it found, what that means,
//! and the command that mends it. It changes nothing, and asks the network only what any client may ask.

mod docker;
mod interface;
mod machine;
mod nodes;
mod ping;
mod sockets;

use anyhow::Result;
use serde::Serialize;

pub use machine::dead as dead_pins;

use crate::{
    datapath::{DatapathError, TableSet, attached_interfaces},
    health::{AgentState, assess},
    inventory::Inventory,
    net::{Net, Snapshot},
};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It is as it should be.
    Ok,
    /// Worth knowing; nothing is wrong.
    Note,
    /// It works, but not as it should, or not for all.
    Warning,
    /// It does not work.
    Error,
}

impl Severity {
    /// The word users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found, and what it means.
    pub text: String,
    /// The command or step that mends it.
    pub mend: Option<String>,
}

/// What the checks found.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    fn add(
        &mut self,
        check: &'static str,
        severity: Severity,
        text: impl Into<String>,
        mend: Option<String>,
    ) {
        self.0.push(Finding { check, severity, text: text.into(), mend });
    }

    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        self.add(check, Severity::Ok, text, None);
    }

    fn note(&mut self, check: &'static str, text: impl Into<String>) {
        self.add(check, Severity::Note, text, None);
    }

    fn warn(&mut self, check: &'static str, text: impl Into<String>, mend: impl Into<String>) {
        self.add(check, Severity::Warning, text, Some(mend.into()));
    }

    fn error(&mut self, check: &'static str, text: impl Into<String>, mend: impl Into<String>) {
        self.add(check, Severity::Error, text, Some(mend.into()));
    }

    /// All of them, in the order of the checks.
    pub fn all(&self) -> &[Finding] {
        &self.0
    }

    /// The worst.
    pub fn worst(&self) -> Severity {
        self.0.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }
}

/// What is asked of it.
#[derive(Clone, Debug, Default)]
pub struct Questions {
    /// Only this interface.
    pub interface: Option<String>,
    /// Whether tasks and other nodes are asked for a connection.
    pub probe: bool,
}

/// An attached interface, as the checks look at it.
struct Attached {
    inventory: Inventory,
    around: AgentState,
}

/// Looks at everything.
///
/// # Errors
/// The kernel does not let the network be looked at.
pub async fn examine(questions: &Questions) -> Result<Findings> {
    let mut findings = Findings::default();
    machine::root(&mut findings);
    machine::bpffs(&mut findings);
    machine::kernel(&mut findings);
    let (net, _changes) = Net::connect()?;
    let snapshot = net.snapshot().await?;
    let attached = attached(questions, &snapshot, &mut findings);
    let by_file = attached.iter().any(|one| one.inventory.report.kind == "file");
    let docker = docker::docker(&mut findings, by_file).await;
    machine::ranges(&mut findings);
    machine::firewall(&mut findings, !attached.is_empty());
    machine::abandoned(&mut findings);
    for one in &attached {
        interface::all(&mut findings, one, &snapshot, &attached);
        sockets::taken(&mut findings, one);
        nodes::all(&mut findings, one, &net, &snapshot).await;
        if questions.probe {
            nodes::probe(&mut findings, one).await;
        }
        health(&mut findings, one, &docker);
    }
    Ok(findings)
}

/// The interfaces that have a datapath, and what is said where there is none.
fn attached(questions: &Questions, snapshot: &Snapshot, findings: &mut Findings) -> Vec<Attached> {
    const CHECK: &str = "attached";
    let names = match (&questions.interface, attached_interfaces()) {
        (Some(name), _) => vec![name.clone()],
        (None, Ok(names)) => names,
        (None, Err(error)) => {
            findings.error(CHECK, error.to_string(), "sudo lb-userspace doctor");
            return Vec::new();
        }
    };
    if names.is_empty() {
        // Ports of bridges, and bridges, are where tasks are.
        let candidates: Vec<&str> = snapshot
            .links
            .values()
            .filter(|link| link.up && link.mac != [0; 6] && link.master.is_none() && link.kind != "bridge")
            .filter(|link| !snapshot.addresses_of(link.index).is_empty())
            .map(|link| link.name.as_str())
            .collect();
        let name = candidates.first().copied().unwrap_or("IF");
        findings.error(
            CHECK,
            format!(
                "no datapath is attached to any interface: nothing is served. Interfaces with an address: {}",
                if candidates.is_empty() { "none".to_owned() } else { candidates.join(", ") }
            ),
            format!("sudo lb-userspace attach --iface {name}"),
        );
    }
    let mut attached = Vec::new();
    for name in names {
        let read = TableSet::of(&name).and_then(|set| {
            Ok(Attached { inventory: Inventory::read(&name, &set)?, around: AgentState::read(&name, &set)? })
        });
        match read {
            Ok(one) => attached.push(one),
            Err(error @ DatapathError::Starting { .. }) => {
                findings.add(CHECK, Severity::Warning, error.to_string(), Some("lb-userspace doctor".into()));
            }
            Err(error @ DatapathError::Version { .. }) => findings.error(
                CHECK,
                error.to_string(),
                format!("sudo lb-userspace attach --iface {name} --replace-state"),
            ),
            Err(error) => {
                findings.error(CHECK, error.to_string(), format!("sudo lb-userspace attach --iface {name}"))
            }
        }
    }
    attached
}

/// What `status` says, each with what mends it. What a check of its own said better is left out.
fn health(findings: &mut Findings, one: &Attached, docker: &docker::Docker) {
    const CHECK: &str = "serving";
    let Attached { inventory, around } = one;
    let interface = &inventory.interface;
    let problems = assess(inventory, around).problems;
    for problem in problems.iter().filter(|problem| !problem.starts_with("node ")) {
        let mend = if around.controller.is_none() && problem.starts_with("no controller") {
            format!("systemctl start lb-userspace, or: sudo lb-userspace attach --iface {interface}")
        } else if let Some(service) =
            problem.strip_prefix("service ").and_then(|rest| rest.split(": ").next())
        {
            mend_service(problem, service)
        } else if problem.contains(" % full") {
            format!(
                "sudo lb-userspace attach --iface {interface} --replace-state with the higher setting that is named"
            )
        } else if problem.contains("out of date") {
            match docker.is_there {
                true => "lb-userspace events --filter kind=source_lost".to_owned(),
                false => {
                    "systemctl start docker, or mend the cluster file at the line that is named".to_owned()
                }
            }
        } else {
            format!("lb-userspace stats --iface {interface} --watch")
        };
        findings.warn(CHECK, format!("{interface}: {problem}"), mend);
    }
    for task in inventory.tasks(|_| true, None) {
        if let Some(problem) = task.problem.as_ref().filter(|problem| problem.starts_with("refuses")) {
            findings.warn(
                "task",
                format!("task {} on {} ({}): {problem}", task.name, task.node, task.addresses.join(", ")),
                format!(
                    "let it listen on the target port of service {}, or give it a health check, so that it is offered when it \
                     does; meanwhile: sudo lb-userspace task drain {}",
                    task.service, task.name
                ),
            );
        }
    }
    for drain in &inventory.drains {
        let what = match drain.what {
            crate::report::Drained::Task => "task",
            crate::report::Drained::Node => "node",
        };
        findings.note(
            "drained",
            format!(
                "{what} {} is drained by hand since {}; `lb-userspace {what} undrain {}` ends that",
                inventory.drained_name(drain),
                crate::report::moment(drain.since),
                inventory.drained_name(drain)
            ),
        );
    }
    if problems.is_empty() {
        let services = inventory.services();
        findings.ok(
            CHECK,
            format!(
                "{interface}: {} served, nothing is wrong",
                crate::controller::counted(services.len(), "service")
            ),
        );
    }
}

fn mend_service(problem: &str, service: &str) -> String {
    if let Some((_, label)) = problem.split_once("label ") {
        let label = label.split([' ', '=']).next().unwrap_or_default();
        return format!("docker service update --label-rm {label} {service}, and --label-add the right one");
    }
    format!("lb-userspace service ps {service}")
}
