//! The agent: parses the command line, runs the verb, says in one line what went wrong.

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory as _, Parser as _};
use lb_userspace::{
    cli::{Cli, Command},
    cmd,
    datapath::DatapathError,
    text,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let environment = env_logger::Env::default().default_filter_or("info");
    // What the libraries have to say at these levels helps nobody who runs the agent.
    env_logger::Builder::from_env(environment)
        .filter_module("aya", log::LevelFilter::Warn)
        .filter_module("aya_obj", log::LevelFilter::Warn)
        .filter_module("netlink_proto", log::LevelFilter::Warn)
        // The programs log only when they were asked to.
        .filter_module("lb_ebpf", log::LevelFilter::Debug)
        .format_target(false)
        .init();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lb-userspace: {}", text::clean_lines(&format!("{error:#}")));
            ExitCode::from(code(&error))
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Attach(arguments) => cmd::attach::run(arguments).await,
        Command::Detach { iface } => cmd::detach::run(&iface).await,
        Command::Status(read) => cmd::status::run(&read),
        Command::Service { command } => cmd::service::run(&command),
        Command::Node { command } => cmd::node::run(&command),
        Command::Stats { read, watch } => cmd::stats::run(&read, watch).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "lb-userspace", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// Exit codes, as `--help` lists them.
fn code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<DatapathError>() {
        Some(DatapathError::NotAttached(_)) => 3,
        Some(DatapathError::Held { .. }) => 4,
        _ => 1,
    }
}
