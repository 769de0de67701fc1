//! `explain`: what would become of a packet, step by step.

use anyhow::Result;

use super::{inventories, out};
use crate::{
    cli::{ExplainArgs, Output},
    datapath::Verdict,
    explain::{self, Explanation},
};

/// Prints what would become of a packet. Nothing is sent, counted or kept.
///
/// # Errors
/// Nothing is attached, it is about no packet, or the kernel refuses.
pub fn run(arguments: &ExplainArgs) -> Result<()> {
    let (question, attached) = (arguments.question(), inventories(&arguments.read)?);
    match arguments.read.output {
        Output::Json => out::json(explain::document(&attached, &question)?, false),
        Output::Table => print(&explain::explain_one(&attached, &question)?),
    }
}

fn print(explanation: &Explanation) -> Result<()> {
    let verdict = match explanation.verdict {
        Verdict::Forwarded => "FORWARDED",
        Verdict::Passed => "PASSED TO THE HOST",
        Verdict::Dropped => "DROPPED",
    };
    out::line(match explanation.outcome {
        Some(outcome) => format!("{verdict} ({outcome})"),
        None => verdict.to_owned(),
    })?;
    let wide = explanation.steps.iter().map(|told| told.step.len()).max().unwrap_or_default();
    for told in &explanation.steps {
        out::line(format!("  {:<wide$}  {}", told.step, told.text))?;
    }
    if let Some(meaning) = explanation.meaning {
        out::line(format!("Meaning: {meaning}"))?;
    }
    match &explanation.next {
        Some(next) => out::line(format!("Next: {next}")),
        None => Ok(()),
    }
}
