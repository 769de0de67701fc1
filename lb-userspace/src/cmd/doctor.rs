//! `doctor`: prints what the checks found.

use anyhow::Result;
use serde_json::json;

use super::out;
use crate::{
    cli::{DoctorArgs, Output},
    datapath,
    doctor::{Questions, Severity, dead_pins, examine},
};

/// Prints the findings; how bad the worst is, as an exit code.
///
/// # Errors
/// The kernel does not let the network be looked at, or the findings cannot be written.
pub async fn run(arguments: &DoctorArgs) -> Result<u8> {
    if arguments.remove_dead_pins {
        let dead = dead_pins();
        for path in &dead {
            datapath::remove_abandoned(path);
            out::line(format!("removed {}", path.display()))?;
        }
        if dead.is_empty() {
            out::line("there are no pins of network namespaces that are gone")?;
        }
        return Ok(0);
    }
    let questions = Questions { interface: arguments.iface.clone(), probe: arguments.probe };
    let findings = examine(&questions).await?;
    if arguments.output == Output::Json {
        out::json(json!({ "worst": findings.worst(), "findings": findings.all() }), false)?;
    } else {
        print(&findings, arguments.verbose)?;
    }
    Ok(match findings.worst() {
        Severity::Ok | Severity::Note => 0,
        Severity::Warning => 1,
        Severity::Error => 2,
    })
}

fn print(findings: &crate::doctor::Findings, verbose: bool) -> Result<()> {
    let all = findings.all();
    let shown = all.iter().filter(|finding| verbose || finding.severity > Severity::Ok);
    for finding in shown {
        out::line(format!("{:<8} {:<13} {}", finding.severity.name(), finding.check, finding.text))?;
        if let Some(mend) = &finding.mend {
            out::line(format!("{:<8} {:<13} -> {mend}", "", ""))?;
        }
    }
    let count = |severity| all.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings, fine) = (count(Severity::Error), count(Severity::Warning), count(Severity::Ok));
    out::line(match (errors, warnings) {
        (0, 0) => format!(
            "nothing is wrong ({fine} checks; --verbose lists them, --probe asks the tasks themselves)"
        ),
        _ => format!("{errors} errors, {warnings} warnings, {fine} checks are fine (--verbose lists them)"),
    })
}
