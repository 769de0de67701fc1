//! Options of the verbs that print lists, as Docker's own have them.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::Args;

use super::{Output, Read};
use crate::{
    cluster::Protocol,
    connection::Filter,
    explain::{CLIENT_PORT, Question},
    serve::Listen,
    units::Time,
};

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

/// Options of `connections`.
#[derive(Clone, Debug, Args)]
pub struct ConnectionArgs {
    /// Where and how; JSON is an object a line
    #[command(flatten)]
    pub read: Read,
    /// Only connections with this: service=, task=, node= (of the task), from= (the node by which the client comes), client= and
    /// listener= (an address, range, :PORT or both), state=, protocol=, idle= (for at least this time); != for all others; may be
    /// given more than once
    #[arg(short, long, value_name = "FIELD=VALUE")]
    pub filter: Vec<Filter>,
    /// Print each by a template, as in '{{.Client}}\t{{.Task}}'; the fields are those of -o json
    #[arg(long, value_name = "TEMPLATE")]
    pub format: Option<String>,
    /// Print only how many there are
    #[arg(short, long, conflicts_with = "format")]
    pub count: bool,
    /// Show again every second
    #[arg(short, long)]
    pub watch: bool,
    /// End them: forget them, and reset TCP's ends that are next to this node
    #[arg(long, conflicts_with_all = ["format", "count", "watch"])]
    pub kill: bool,
    /// Do not ask before
    #[arg(long, requires = "kill")]
    pub force: bool,
}

/// Options of `explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// tcp or udp
    #[arg(value_name = "PROTOCOL", value_parser = protocol)]
    pub protocol: Protocol,
    /// Who sends it: an address, with a port or any
    #[arg(value_name = "CLIENT[:PORT]", value_parser = client)]
    pub client: SocketAddr,
    /// Where to
    #[arg(value_name = "ADDRESS:PORT", value_parser = listener)]
    pub listener: SocketAddr,
    /// Where and how
    #[command(flatten)]
    pub read: Read,
    /// Ask about a segment of an open connection, also if none is known here
    #[arg(long)]
    pub established: bool,
    /// The node through whose tunnel it comes
    #[arg(long, value_name = "NODE", requires = "task")]
    pub through: Option<String>,
    /// The task of this node that the other one has chosen
    #[arg(long, value_name = "TASK", requires = "through")]
    pub task: Option<String>,
}

impl ExplainArgs {
    /// What is asked.
    pub fn question(&self) -> Question {
        let through = self.through.clone().zip(self.task.clone());
        Question {
            protocol: self.protocol,
            client: self.client,
            listener: self.listener,
            established: self.established,
            through: through.map(Into::into),
        }
    }
}

/// A protocol from text.
///
/// # Errors
/// It is none.
pub fn protocol(text: &str) -> Result<Protocol, String> {
    match text.to_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err("it may be tcp or udp".to_owned()),
    }
}

/// A client from text, with a port or any.
///
/// # Errors
/// It is none.
pub fn client(text: &str) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = || bare.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, CLIENT_PORT));
    let error = "write it like 198.51.100.7, 198.51.100.7:40312, 2001:db8::7 or [2001:db8::7]:40312";
    text.parse().ok().or_else(address).ok_or_else(|| error.to_owned())
}

/// An address and port from text.
///
/// # Errors
/// It is none.
pub fn listener(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "write it like 192.0.2.1:80 or [2001:db8::1]:80".to_owned())
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
