//! Options of the verbs that print lists, as Docker's own have them.

use std::time::Duration;

use clap::Args;

use super::{Output, Read, time::Time};
use crate::serve::Listen;

/// Options of the verbs that list.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// Where and how
    #[command(flatten)]
    pub read: Read,
    /// Only rows with this: name=web finds part of a name, other fields are compared whole, FIELD alone is "has one";
    /// may be given more than once
    #[arg(short, long, value_name = "FIELD[=VALUE]")]
    pub filter: Vec<String>,
    /// Print each row by a template, as in '{{.Name}}\t{{.Problem}}'; the fields are those of -o json
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "quiet")]
    pub format: Option<String>,
    /// Print names alone
    #[arg(short, long)]
    pub quiet: bool,
    /// Do not shorten what a terminal has no room for
    #[arg(long)]
    pub no_trunc: bool,
    /// Show again every second; with -o json a document a line
    #[arg(short, long)]
    pub watch: bool,
}

/// Options of `events`.
#[derive(Clone, Debug, Args)]
pub struct EventArgs {
    /// Go on with those that come
    #[arg(short = 'F', long)]
    pub follow: bool,
    /// Only the last so many [default: all that are kept, 1000]
    #[arg(short = 'n', long, value_name = "N")]
    pub last: Option<usize>,
    /// Only those that are younger, as in 10m
    #[arg(long, value_name = "TIME", value_parser = age)]
    pub since: Option<Duration>,
    /// Only events with this, as in kind=node_silent, service=web or task=web.1; may be given more than once
    #[arg(short, long, value_name = "FIELD=VALUE")]
    pub filter: Vec<String>,
    /// Print for people, or as a JSON object a line
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

fn age(text: &str) -> Result<Duration, String> {
    Ok(text.parse::<Time>()?.into())
}

/// Options of the verbs that drain.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// Names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Only on this interface
    #[arg(long, value_name = "IF")]
    pub iface: Option<String>,
    /// Wait until no connection is open, for so long at most [default: for ever]
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true)]
    pub wait: Option<Option<Time>>,
}

/// Options of the verbs that end a drain.
#[derive(Clone, Debug, Args)]
pub struct UndrainArgs {
    /// Names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Only on this interface
    #[arg(long, value_name = "IF")]
    pub iface: Option<String>,
}

/// Options of `metrics`.
#[derive(Clone, Debug, Args)]
pub struct MetricsArgs {
    /// Only this interface
    #[arg(long, value_name = "IF")]
    pub iface: Option<String>,
    /// Print them once, as for the node exporter's textfile collector
    #[arg(long)]
    pub once: bool,
    /// Where to serve them: an address and port, unix:/PATH; may be given more than once [default: 127.0.0.1:9464]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "once")]
    pub listen: Vec<Listen>,
}

/// Options of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Only this interface
    #[arg(long, value_name = "IF")]
    pub iface: Option<String>,
    /// Ask this node's tasks, and services by each other node, for a connection
    #[arg(long)]
    pub probe: bool,
    /// List what is fine, too
    #[arg(short, long)]
    pub verbose: bool,
    /// Remove datapaths of network namespaces that are gone, and do nothing else
    #[arg(long, exclusive = true)]
    pub remove_dead_pins: bool,
    /// Print for people, or as JSON for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}
