//! The agent: parses the command line, runs the verb, says in one line what went wrong.

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory as _, Parser as _};
use lb_userspace::{
    cli::{Cli, Command},
    cmd,
    datapath::DatapathError,
    logging, text,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if !matches!(cli.command, Command::Attach(_)) {
        end_with_the_reader();
    }
    logging::start(cli.log_format, cli.log_level);
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lb-userspace: {}", text::clean_lines(&format!("{error:#}")));
            ExitCode::from(code(&error))
        }
    }
}

/// A verb whose output nobody reads any more (`| head`) ends, as other programs do; an agent goes on.
fn end_with_the_reader() {
    // SAFETY: the default is no handler of ours.
    let _ = unsafe {
        nix::sys::signal::signal(nix::sys::signal::Signal::SIGPIPE, nix::sys::signal::SigHandler::SigDfl)
    };
}

#[tokio::main(flavor = "current_thread")]
async fn run(command: Command) -> Result<ExitCode> {
    let done = ExitCode::SUCCESS;
    match command {
        Command::Attach(arguments) => cmd::attach::run(arguments).await.map(|()| done),
        Command::Detach { iface } => cmd::detach::run(&iface).await.map(|()| done),
        Command::Status { read, verbose } => cmd::status::run(&read, verbose)
            .map(|healthy| if healthy { done } else { ExitCode::from(DEGRADED) }),
        Command::Doctor(arguments) => cmd::doctor::run(&arguments).await.map(ExitCode::from),
        Command::Service { command } => cmd::service::run(&command).await.map(|()| done),
        Command::Task { command } => cmd::task::run(&command).await.map(|()| done),
        Command::Node { command } => cmd::node::run(&command).await.map(|()| done),
        Command::Events(arguments) => cmd::events::run(&arguments).await.map(|()| done),
        Command::Metrics(arguments) => cmd::metrics::run(&arguments).await.map(|()| done),
        Command::LogLevel { level } => cmd::log_level::run(&level).map(|()| done),
        Command::Top { iface } => cmd::top::run(iface.as_deref()).map(|()| done),
        Command::SupportBundle { to } => cmd::support::run(to.as_deref()).await.map(|()| done),
        Command::Stats { read, watch } => cmd::stats::run(&read, watch).await.map(|()| done),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "lb-userspace", &mut std::io::stdout());
            Ok(done)
        }
    }
}

/// It serves, but not as it should.
const DEGRADED: u8 = 5;

/// Exit codes, as `--help` lists them.
fn code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<DatapathError>() {
        Some(DatapathError::NotAttached(_) | DatapathError::Starting { .. }) => 3,
        Some(DatapathError::Held { .. }) => 4,
        _ => 1,
    }
}
