//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The ingress of a Docker Swarm: every published port answers on this node, and the task sees the client.
#[derive(Debug, Parser)]
#[command(name = "lb-userspace", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  it failed; the message says what happened and the next step
  2  the command line is wrong
  3  no datapath is attached
  4  another controller holds the interface

Logging: RUST_LOG=debug says more.";

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
        #[arg(long, value_name = "IF", required = true)]
        iface: Vec<String>,
    },
    /// Show what is attached, how, and who controls it
    #[command(after_help = "Example:\n  lb-userspace status -o json | jq '.interfaces[].mode'")]
    Status(Read),
    /// Services: ls, ps
    Service {
        /// What of them
        #[command(subcommand)]
        command: ServiceCommand,
    },
    /// Nodes: ls
    Node {
        /// What of them
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Show counters by outcome, service and task
    #[command(after_help = STATS_EXAMPLES)]
    Stats {
        /// Where and how
        #[command(flatten)]
        read: Read,
        /// Show again every second, with the change
        #[arg(long)]
        watch: bool,
    },
    /// Print completions for a shell
    #[command(after_help = "Example:\n  lb-userspace completions bash > /etc/bash_completion.d/lb-userspace")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

const STATS_EXAMPLES: &str = "\
Examples:
  # What happens to packets right now, and why
  lb-userspace stats --watch

  # New connections that no task took
  lb-userspace stats -o json | jq '.interfaces[].services[] | {name, refused_connections}'";

const ATTACH_EXAMPLES: &str = "\
Examples:
  # On every node of a swarm: serve what it publishes on eth1, in the foreground
  sudo lb-userspace attach --iface eth1

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
or not there yet is followed without a restart. The agents talk on the tunnel's port, UDP and TCP.";

/// Options of `attach`.
#[derive(Clone, Debug, Args)]
pub struct Attach {
    /// Interface that clients and other nodes reach; may be given more than once
    #[arg(long, value_name = "IF", required = true)]
    pub iface: Vec<String>,
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
    /// Log each new connection, from the kernel; costly under load
    #[arg(long)]
    pub log_flows: bool,
    /// New connections a second above which they are placed by hash, and stored only once their client goes on; 0 is never
    /// [default: a quarter of --max-connections]
    #[arg(long, value_name = "RATE")]
    pub flood_rate: Option<u32>,
    /// Pass everything to the host when there was no controller for so long, as in 90s, 10m or 2h [default: keep serving]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub stale_after: Option<Duration>,
    /// Start anew where another version or other sizes are pinned: established connections are lost
    #[arg(long)]
    pub replace_state: bool,
    /// Connections of each family that the table is made for, which has room for twice as many [default: 262144]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=67_108_864))]
    pub max_connections: Option<u32>,
    /// Room for services [default: 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub max_services: Option<u32>,
    /// Room for listeners of each family [default: 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub max_listeners: Option<u32>,
    /// Room for backends: ports of tasks, by family [default: 65536]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub max_backends: Option<u32>,
    /// Room for slots: eligible tasks by weight, or 1,021 or 16,381 with consistent placement; at least twice the sum over
    /// all ports [default: 262144]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub max_slots: Option<u32>,
    /// Room for nodes of the cluster [default: 4095]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_534))]
    pub max_nodes: Option<u32>,
    /// Room for datagrams in fragments that are followed at once, of each family [default: 8192]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub max_fragments: Option<u32>,
}

fn duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is not a duration such as 90s, 10m or 2h");
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit {
        "s" | "" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(error()),
    };
    let seconds = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    let seconds =
        seconds.filter(|seconds| (1..=u64::from(lb_common::conntrack::Timers::MOST)).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(error)
}

fn ports(text: &str) -> Result<[u16; 2], String> {
    let error = || format!("{text:?} is not a range of ports such as 16384-32767");
    let (low, high) = text.split_once('-').ok_or_else(error)?;
    let range: [u16; 2] = [low.parse().map_err(|_| error())?, high.parse().map_err(|_| error())?];
    if range[0] == 0 || range[0] > range[1] { Err(error()) } else { Ok(range) }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time =
        humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 3s or 500ms"))?;
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
    /// How to print
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

/// What of services.
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// List services
    #[command(after_help = "Example:\n  lb-userspace service ls --iface eth1")]
    Ls(Read),
    /// List the tasks of a service, and why one is not offered
    #[command(after_help = "Example:\n  lb-userspace service ps web")]
    Ps {
        /// Name of the service
        name: String,
        /// Where and how
        #[command(flatten)]
        read: Read,
    },
}

/// What of nodes.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List nodes; a star marks this one
    #[command(after_help = "Example:\n  lb-userspace node ls")]
    Ls(Read),
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
        for bad in ["", "3", "1ms", "2h", "-1s", "soon"] {
            assert!(timeout(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_and_nonsense_is_refused() {
        for (text, seconds) in [("90s", 90), ("90", 90), ("10m", 600), ("2h", 7_200)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for bad in ["", "0", "s", "1d", "-1s", "99999999h"] {
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
