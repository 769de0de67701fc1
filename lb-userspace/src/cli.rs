//! The command line.

mod lists;
#[cfg(test)]
mod texts;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use lists::{
    ConnectionArgs, DoctorArgs, DrainArgs, EventArgs, ExplainArgs, ListArgs, MetricsArgs, UndrainArgs,
};
pub use lists::{client, listener, protocol};

use crate::{
    logging::{Level, LogFormat},
    serve::Listen,
    translation::{self, Pool},
    units::{Time, count},
};

/// The ingress of a Docker Swarm: every published port answers on this node, and the task sees the client.
#[derive(Debug, Parser)]
#[command(name = "lb-userspace", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What is logged: error, warn, info, debug or trace; LEVEL,MODULE=LEVEL for parts [default: RUST_LOG, else info]
    #[arg(long, global = true, value_name = "LEVEL", help_heading = "Logging")]
    pub log_level: Option<Level>,
    /// How the log is written: text, json, journald, or auto, which is the journal where systemd started it, else text
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Auto, help_heading = "Logging",
          hide_possible_values = true)]
    pub log_format: LogFormat,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  it failed; the message says what happened and the next step
  2  the command line is wrong
  3  no datapath is attached, or one is just being attached
  4  another controller holds the interface
  5  it serves, but not as it should (status)
`doctor` ends with 0 where all is well, 1 where it warns, 2 where something is wrong.";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve published ports on an interface, until stopped
    #[command(after_help = ATTACH_EXAMPLES)]
    Attach(Attach),
    /// Remove the datapath of an interface, with its tables and connections
    #[command(after_help = "Example:\n  sudo lb-userspace detach --iface eth1")]
    Detach {
        /// The interface
        #[arg(long, value_name = "IF", required_unless_present = "all")]
        iface: Vec<String>,
        /// Every interface that has one
        #[arg(long, conflicts_with = "iface")]
        all: bool,
    },
    /// Show whether all is well: what is attached, who controls it, what is wrong
    ///
    /// Ends with 0 if every interface is served as it should be, with 5 if something is wrong.
    #[command(
        after_help = "Examples:\n  lb-userspace status || lb-userspace doctor\n  lb-userspace status -o json | jq '.interfaces[].verdict'"
    )]
    Status {
        /// Where and how
        #[command(flatten)]
        read: Read,
        /// Show the kernel, hooks, timers and tables too
        #[arg(short, long)]
        verbose: bool,
    },
    /// Find out what is wrong, and what mends it
    ///
    /// Looks at rights, kernel, interface, ways and tunnel to each node, Docker, ports, address ranges, firewall and services.
    /// Ends with 0 if nothing is wrong, 1 if something should be better, 2 if something does not work.
    #[command(
        after_help = "Examples:\n  sudo lb-userspace doctor\n  sudo lb-userspace doctor --probe\n  sudo lb-userspace doctor -o json | jq -r '.findings[] | select(.mend) | .mend'"
    )]
    Doctor(DoctorArgs),
    /// List and inspect services
    Service {
        /// The verb
        #[command(subcommand)]
        command: ServiceCommand,
    },
    /// List, inspect and drain tasks
    Task {
        /// The verb
        #[command(subcommand)]
        command: TaskCommand,
    },
    /// List, inspect and drain nodes
    Node {
        /// The verb
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// List connections, count or end them
    ///
    /// STATE is the timer that runs (half_open, established, closing; one_way and answered of UDP), EXPIRES when it ends if nothing
    /// more is heard. Each line is written as it is read: a million need no more memory than one.
    #[command(visible_alias = "conns", after_help = CONNECTIONS_EXAMPLES)]
    Connections(ConnectionArgs),
    /// List the IPv6 clients whom this node's tasks know by an IPv4 address of --v6-pool, or say who it is
    ///
    /// A task that has IPv4 alone, as on Docker's own bridge, sees such a client as an address of the pool, the same one as long as he
    /// has connections here and for ten minutes after. GET /api/v1/client?address= at --listen says the same to programs.
    #[command(
        after_help = "Examples:\n  # Who is 198.19.37.4 in the access log of a task of this node, and since when?\n  sudo lb-userspace clients 198.19.37.4\n  sudo lb-userspace clients | grep -w 198.19.37.4\n\n  # Everybody\n  sudo lb-userspace clients -o json | jq -r '.interfaces[].clients[] | [.address, .client] | @tsv'"
    )]
    Clients {
        /// Addresses that a task saw [default: all]
        #[arg(value_name = "ADDRESS")]
        addresses: Vec<std::net::Ipv4Addr>,
        /// Where and how
        #[command(flatten)]
        read: Read,
    },
    /// Say what would become of a packet here, and why
    ///
    /// The datapath's own program is run on the packet, with copies of the tables that it writes: no turn is taken, and nothing is
    /// sent, counted or kept. Of a connection that is open the next segment is asked about, else a SYN.
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(ExplainArgs),
    /// Watch services, tasks, nodes and packets, with rates
    #[command(
        after_help = "Example:\n  sudo lb-userspace top\n\nKeys: Tab another pane, Enter a service's tasks, / filter, s sort, ? all keys, q quit"
    )]
    Top {
        /// The interface [default: the first one that is attached]
        #[arg(long, value_name = "IF")]
        iface: Option<String>,
    },
    /// Show what happened: nodes that fell silent, tasks that came and went, services without a task
    #[command(after_help = EVENTS_EXAMPLES)]
    Events(EventArgs),
    /// Show counters by outcome, service and task
    #[command(after_help = STATS_EXAMPLES)]
    Stats {
        /// Where and how
        #[command(flatten)]
        read: Read,
        /// Show again every second, with the change; with -o json a document a line
        #[arg(short, long)]
        watch: bool,
    },
    /// Write files that are made from the code
    #[command(hide = true)]
    Generate {
        /// Which files
        artifact: Artifact,
        /// Where to
        folder: PathBuf,
    },
    /// Print the metrics, or serve them where no controller runs
    ///
    /// A controller serves the same, with a page to look at, as `attach --listen` says.
    #[command(after_help = METRICS_EXAMPLES)]
    Metrics(MetricsArgs),
    /// Change what a running agent logs, until it ends
    #[command(after_help = "Example:\n  sudo lb-userspace log-level debug")]
    LogLevel {
        /// error, warn, info, debug, trace, or LEVEL,MODULE=LEVEL
        level: Level,
    },
    /// Write everything that helps to find out what is wrong into one file of text, without secrets
    #[command(after_help = "Example:\n  sudo lb-userspace support-bundle --to lb.txt")]
    SupportBundle {
        /// The file, which must not be there yet [default: lb-support-HOST-TIME.txt]
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
    /// Make a key for the tunnel between the nodes of a cluster file
    ///
    /// The same file on all nodes, named by `key-file` in `[tunnel]`, has them refuse packets that others send from a node's
    /// address. The nodes of a swarm find keys by themselves.
    #[command(
        after_help = "Example:\n  sudo lb-userspace keygen /etc/lb-userspace/tunnel.key\n  # then copy it to each node, and in the cluster file:\n  [tunnel]\n  key-file = \"/etc/lb-userspace/tunnel.key\""
    )]
    Keygen {
        /// The file, which must not be there yet [default: standard output]
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Print completions for a shell
    #[command(after_help = "Example:\n  lb-userspace completions bash > /etc/bash_completion.d/lb-userspace")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// What can be made from the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Artifact {
    /// Manual pages
    Man,
    /// Completions for shells
    Completions,
    /// The reference pages of the book
    Reference,
}

const STATS_EXAMPLES: &str = "\
Examples:
  # What happens to packets right now, and why
  lb-userspace stats --watch

  # New connections that no task could be given
  lb-userspace stats -o json | jq '.interfaces[].services[] | {name, refused_connections}'";

const CONNECTIONS_EXAMPLES: &str = "\
Examples:
  # Who talks to a task
  sudo lb-userspace connections --filter task=web.1

  # How many connections one network has open
  sudo lb-userspace connections --filter client=198.51.100.0/24 --filter state=established --count

  # The ten clients with most of them
  sudo lb-userspace connections --format '{{.Client}}' | sed 's/:[0-9]*$//' | sort | uniq -c | sort -rn | head

  # End those that were silent for an hour
  sudo lb-userspace connections --filter idle=1h --kill";

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  # Where a client's next connection goes
  sudo lb-userspace explain tcp 198.51.100.7 192.0.2.1:80

  # What happens to one that is open
  sudo lb-userspace explain tcp 198.51.100.7:40312 192.0.2.1:80

  # On the task's node: what becomes of it when it comes out of the tunnel
  sudo lb-userspace explain tcp 198.51.100.7 192.0.2.1:80 --through node1 --task web.3";

const METRICS_EXAMPLES: &str = "\
Examples:
  # What Prometheus would see
  lb-userspace metrics --once

  # From the agent, which listens on 127.0.0.1:9464 unless --listen says otherwise
  curl http://127.0.0.1:9464/metrics

  # Over a socket of the file system
  curl --unix-socket /run/lb.sock http://localhost/metrics";

const EVENTS_EXAMPLES: &str = "\
Examples:
  # The last ten, and those that come
  lb-userspace events -n 10 --follow

  # What happened to a service within the last hour
  lb-userspace events --since 1h --filter service=web

  # When nodes fell silent
  lb-userspace events -o json | jq -r 'select(.kind == \"node_silent\") | [.time, .node] | @tsv'";

const ATTACH_EXAMPLES: &str = "\
Examples:
  # On every node of a swarm: serve what it publishes on eth1, in the foreground
  sudo lb-userspace attach --iface eth1

  # Which interface would be served where none is named, and why
  lb-userspace attach --print

  # As a service: the datapath goes on while the controller restarts
  lb-userspace attach --iface eth1 --on-exit keep

  # Without Docker: serve the cluster of a file
  sudo lb-userspace attach --iface eth1 --cluster /etc/lb/cluster.toml

  # Where the driver has no XDP, or to compare
  sudo lb-userspace attach --iface eth1 --mode tc

Where the cluster's state comes from, unless --source says:
  --cluster is given           the file
  this node manages a swarm    its Docker's lists
  this node works in one       the agents of the managers, over TLS with the swarm's own certificates
Docker is found as its own client finds it: DOCKER_HOST, else the local socket. A node that is promoted, demoted
or not there yet is followed without a restart. The agents talk on the tunnel's port, UDP and TCP.

An option that is not given is taken from the environment, else from the file of --config, by the same name:
--peer-timeout 2s is LB_PEER_TIMEOUT=2s there, and peer-timeout = \"2s\" in the file.";

/// Options of `attach`.
#[derive(Clone, Debug, Args)]
pub struct Attach {
    /// Interface by which clients come; the nodes may reach each other by another. May be given more than once; auto takes the one
    /// that the default route leads by, and follows it
    #[arg(long, value_name = "IF", default_value = "auto", value_delimiter = ',')]
    pub iface: Vec<String>,
    /// Address to serve on beside those of the interface, whether the node has it yet or not: a virtual one that moves, one of
    /// another interface (lo, dummy); may be given more than once
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = crate::cluster::served_address)]
    pub address: Vec<std::net::IpAddr>,
    /// File with the options that neither the command line nor the environment gives
    /// [default: /etc/lb-userspace/agent.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the cluster's state comes from
    #[arg(long, value_enum, default_value_t = SourceKind::Auto)]
    pub source: SourceKind,
    /// Cluster file of the file source (TOML); followed while it changes
    #[arg(long, value_name = "FILE", required_if_eq("source", "file"))]
    pub cluster: Option<PathBuf>,
    /// Port of the tunnel (UDP) and of the agents (TCP), the same on all nodes; a cluster file has its own
    #[arg(long, value_name = "PORT", default_value_t = lb_common::tunnel::DEFAULT_PORT,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub tunnel_port: u16,
    /// How answers of tasks on other nodes travel, unless the service's label lb.return says; a cluster file has its own
    #[arg(long = "return", value_enum, value_name = "WAY", default_value_t = ReturnArg::Tunnel)]
    pub returns: ReturnArg,
    /// Another node whose datapath is silent for this long gets no new connections
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = timeout)]
    pub peer_timeout: Duration,
    /// Where to serve metrics (/metrics), health (/-/healthy, /-/ready) and a page: an address and port, unix:/PATH, or
    /// none; may be given more than once [default: 127.0.0.1:9464]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Vec<Listen>,
    /// Name of this node [default: the node with an address of this machine]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// How to serve the interface; auto takes native XDP where it works, else tc
    #[arg(long, value_enum, default_value_t = ModeArg::Auto)]
    pub mode: ModeArg,
    /// What becomes of the datapath when the controller stops [default: detach on a terminal, else keep]
    #[arg(long, value_enum)]
    pub on_exit: Option<OnExit>,
    /// Source ports for tasks reached by snat, outside the host's own ephemeral ports
    #[arg(long, value_name = "LOW-HIGH", default_value = "16384-32767", value_parser = ports)]
    pub snat_ports: [u16; 2],
    /// IPv4 addresses by which tasks that have IPv4 alone know IPv6 clients, who are translated then; a range that nothing on this
    /// node or in its containers uses, or off
    #[arg(long, value_name = "RANGE", default_value = translation::DEFAULT)]
    pub v6_pool: Pool,
    /// Log each new connection, from the kernel, and by which address tasks know which IPv6 client; costly under load
    #[arg(long)]
    pub log_connections: bool,
    /// New connections a second above which they are placed by hash, and stored only once their client goes on; 0 is never
    /// [default: half of --max-connections]
    #[arg(long, value_name = "RATE")]
    pub flood_rate: Option<u32>,
    /// Pass everything to the host when there was no controller for so long, as in 90s, 10m or 2h [default: keep serving]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub stale_after: Option<Duration>,
    /// Start anew where another version or other sizes are pinned: established connections are lost
    #[arg(long)]
    pub replace_state: bool,
    /// Show which interfaces would be served, why and how, and touch nothing
    #[arg(long)]
    pub print: bool,
    /// Only say whether it could be started so
    #[arg(long, hide = true)]
    pub check: bool,
    /// Connections of each family that the table is made for, which has room for twice as many [default: 262144]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=67_108_864))]
    pub max_connections: Option<u32>,
    /// Room for services [default: 16384]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=1_048_576))]
    pub max_services: Option<u32>,
    /// Room for listeners of each family: published ports by address [default: 65536]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=1_048_576))]
    pub max_listeners: Option<u32>,
    /// Room for backends: ports of tasks, by family [default: 65536]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=1_048_576))]
    pub max_backends: Option<u32>,
    /// Room for slots: eligible tasks by weight, or 1,021 or 16,381 with consistent placement; at least twice the sum over
    /// all ports [default: 262144]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=16_777_216))]
    pub max_slots: Option<u32>,
    /// Room for nodes of the cluster [default: 4095]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=65_534))]
    pub max_nodes: Option<u32>,
    /// Room for datagrams in fragments that are followed at once, of each family [default: 8192]
    #[arg(long, value_name = "N", value_parser = |text: &str| count(text, 1..=1_048_576))]
    pub max_fragments: Option<u32>,
}

fn duration(text: &str) -> Result<Duration, String> {
    let time: Duration = text.parse::<Time>()?.into();
    let most = Duration::from_secs(lb_common::conntrack::Timers::MOST.into());
    let usable = (Duration::from_secs(1)..=most).contains(&time);
    usable.then_some(time).ok_or_else(|| format!("it may be from 1s to {}s", most.as_secs()))
}

fn ports(text: &str) -> Result<[u16; 2], String> {
    let error = || format!("{text:?} is not a range of ports such as 16384-32767");
    let (low, high) = text.split_once('-').ok_or_else(error)?;
    let range: [u16; 2] = [low.parse().map_err(|_| error())?, high.parse().map_err(|_| error())?];
    if range[0] == 0 || range[0] > range[1] { Err(error()) } else { Ok(range) }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time = text.parse::<Time>()?.into();
    let usable = (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&time);
    usable.then_some(time).ok_or_else(|| "it may be from 100ms to 1h".to_owned())
}

/// How answers travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReturnArg {
    /// Back through the node that the client used
    Tunnel,
    /// Straight to the client, where the network lets a node send from another node's address
    Direct,
}

/// Where the cluster's state comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceKind {
    /// The file if --cluster names one, else Docker
    Auto,
    /// The swarm that this node's Docker is part of
    Docker,
    /// A TOML file
    File,
}

/// How to serve the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Native XDP where it works, else TC alone
    Auto,
    /// XDP in the driver
    Native,
    /// XDP on socket buffers
    Generic,
    /// TC alone
    Tc,
}

/// What becomes of the datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// It goes on forwarding; the next attach adopts it
    Keep,
    /// It is removed
    Detach,
}

/// Options of the verbs that read.
#[derive(Clone, Debug, Args)]
pub struct Read {
    /// Only this interface
    #[arg(long, value_name = "IF")]
    pub iface: Option<String>,
    /// Print for people, or as JSON for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// For programs; "schema" says which version of the fields
    Json,
}

/// Verbs about services.
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// List services
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  lb-userspace service ls --filter problem\n  lb-userspace service ls --format '{{.Name}}: {{.ActiveTasks}}/{{.Tasks}}'"
    )]
    Ls(ListArgs),
    /// List the tasks of a service, and why one takes no new connections
    #[command(after_help = "Example:\n  lb-userspace service ps web --watch")]
    Ps {
        /// Name of the service
        name: String,
        /// Where and how
        #[command(flatten)]
        list: ListArgs,
    },
    /// Show everything about a service
    #[command(
        after_help = "Example:\n  lb-userspace service inspect web -o json | jq '.interfaces[0].settings'"
    )]
    Inspect {
        /// Name of the service
        name: String,
        /// Where and how
        #[command(flatten)]
        read: Read,
    },
}

/// Verbs about tasks.
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// List the tasks of all services
    #[command(
        visible_alias = "list",
        after_help = "Example:\n  lb-userspace task ls --filter node=node2 --filter problem"
    )]
    Ls(ListArgs),
    /// Give new connections to other tasks than these; those that are open go on
    ///
    /// It is kept while agents and datapath are replaced, until `undrain`, or `detach`. It counts on this node: clients that
    /// come by other nodes are not concerned.
    #[command(after_help = "Example:\n  sudo lb-userspace task drain web.1 --wait=5m")]
    Drain(DrainArgs),
    /// Let tasks have new connections again
    #[command(after_help = "Example:\n  sudo lb-userspace task undrain web.1")]
    Undrain(UndrainArgs),
    /// Show everything about a task
    #[command(after_help = "Example:\n  lb-userspace task inspect web.1")]
    Inspect {
        /// Name of the task
        name: String,
        /// Where and how
        #[command(flatten)]
        read: Read,
    },
}

/// Verbs about nodes.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List nodes; a star marks this one
    #[command(visible_alias = "list", after_help = "Example:\n  lb-userspace node ls --filter agent=silent")]
    Ls(ListArgs),
    /// Give new connections to tasks of other nodes than these; those that are open go on
    ///
    /// It is kept while agents and datapath are replaced, until `undrain`, or `detach`. It counts on this node: clients that
    /// come by other nodes are not concerned.
    #[command(after_help = "Example:\n  sudo lb-userspace node drain node2 --wait=5m")]
    Drain(DrainArgs),
    /// Let nodes have new connections again
    #[command(after_help = "Example:\n  sudo lb-userspace node undrain node2")]
    Undrain(UndrainArgs),
    /// Show everything about a node
    #[command(after_help = "Example:\n  lb-userspace node inspect node2")]
    Inspect {
        /// Name of the node
        name: String,
        /// Where and how
        #[command(flatten)]
        read: Read,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read_and_nonsense_is_refused() {
        assert_eq!(timeout("3s"), Ok(Duration::from_secs(3)));
        assert_eq!(timeout("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(timeout("3"), Ok(Duration::from_secs(3)));
        for bad in ["", "1ms", "2h", "-1s", "soon"] {
            assert!(timeout(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_and_nonsense_is_refused() {
        for (text, seconds) in [("90s", 90), ("90", 90), ("10m", 600), ("2h", 7_200), ("1d", 86_400)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for bad in ["", "0", "s", "1w", "-1s", "99999999h", "500ms"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_ranges_are_read_and_nonsense_is_refused() {
        assert_eq!(ports("1000-2000"), Ok([1000, 2000]));
        for bad in ["", "1000", "2000-1000", "0-10", "1-70000", "a-b"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }
}
