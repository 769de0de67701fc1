//! What things cost, beside what a user would pick instead. `cargo xtask bench` builds and runs it.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, ValueEnum};
use lb_tests::bench::{
    control,
    figure::{PATIENCE, Report},
    forward,
    packets::{self, Options},
    tcp, translation,
};

/// Measures, side by side.
#[derive(Parser)]
struct Arguments {
    /// Only these; all by default
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Fewer rounds and sizes
    #[arg(long)]
    quick: bool,
    /// Do not wait for an idle machine
    #[arg(long)]
    now: bool,
    /// How to show the figures
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Pinned XDP programs to feed with the same packets
    #[arg(long, value_name = "PINNED_PROGRAM", num_args = 1..)]
    compare: Vec<PathBuf>,
    /// Where the packets for those programs go to; by default to a listener of ours
    #[arg(long, value_name = "ADDRESS:PORT", requires = "compare")]
    compare_to: Option<SocketAddr>,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Nanoseconds a packet in the programs
    Packets,
    /// Packets forwarded between veths, beside routing, nftables and iptables
    Forward,
    /// TCP through namespaces, beside nftables, HAProxy and nginx
    Tcp,
    /// IPv6 clients of a task that has IPv4 alone, beside one that has both families
    Translation,
    /// Loading clusters of three sizes, one change of them, memory, garbage collection over a million connections
    Control,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Tables, as they are measured
    Table,
    /// One JSON document at the end
    Json,
}

fn main() {
    let arguments = Arguments::parse();
    let wanted = |part| arguments.parts.is_empty() || arguments.parts.contains(&part);
    let patience = if arguments.now { Duration::ZERO } else { PATIENCE };
    let mut report = Report::new(arguments.output == Format::Json, patience);
    if wanted(Part::Packets) {
        let compare_to = arguments.compare_to.map(|to: SocketAddr| -> (IpAddr, u16) { (to.ip(), to.port()) });
        packets::run(
            &mut report,
            &Options { quick: arguments.quick, compare: arguments.compare, compare_to },
        );
    }
    if wanted(Part::Forward) {
        forward::measure(
            &mut report,
            if arguments.quick { forward::Effort::QUICK } else { forward::Effort::FULL },
        );
    }
    if wanted(Part::Tcp) {
        tcp::measure(&mut report, if arguments.quick { tcp::Effort::QUICK } else { tcp::Effort::FULL });
    }
    if wanted(Part::Translation) {
        translation::measure(&mut report, arguments.quick);
    }
    if wanted(Part::Control) {
        control::run(&mut report, &control::Options { quick: arguments.quick });
    }
    report.finish();
}
