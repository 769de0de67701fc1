//! The agent: parses the command line, runs the verb, says in one line what went wrong.

use std::{os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::Result;
use lb_userspace::{
    cli::Command,
    cmd::{self, attach::End},
    datapath::{DatapathError, attached_interfaces},
    logging, settings, supervisor, text,
};

fn main() -> ExitCode {
    let cli = settings::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
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
        Command::Attach(arguments) => {
            let misspelt = settings::misspelt(std::env::vars_os().map(|(name, _)| name));
            // Who asks for a check has been told, or will be.
            for name in misspelt.iter().filter(|_| !arguments.check) {
                log::warn!("{name} is set and is no option; `lb-userspace attach --help` names them all");
            }
            match cmd::attach::run(arguments).await? {
                End::Stop => Ok(done),
                End::Reload => Err(anyhow::Error::from(start_anew()).context(
                    "start the installed program anew (the datapath goes on); install lb-userspace again, then start the agent",
                )),
            }
        }
        Command::Detach { all: true, .. } => cmd::detach::run(&attached_interfaces()?).await.map(|()| done),
        Command::Detach { iface, .. } => cmd::detach::run(&iface).await.map(|()| done),
        Command::Status { read, verbose } => cmd::status::run(&read, verbose)
            .map(|healthy| if healthy { done } else { ExitCode::from(DEGRADED) }),
        Command::Doctor(arguments) => cmd::doctor::run(&arguments).await.map(ExitCode::from),
        Command::Service { command } => cmd::service::run(&command).await.map(|()| done),
        Command::Task { command } => cmd::task::run(&command).await.map(|()| done),
        Command::Node { command } => cmd::node::run(&command).await.map(|()| done),
        Command::Events(arguments) => cmd::events::run(&arguments).await.map(|()| done),
        Command::Clients { addresses, read } => cmd::clients::run(&addresses, &read).map(|()| done),
        Command::Connections(arguments) => cmd::connections::run(&arguments).await.map(|()| done),
        Command::Explain(arguments) => cmd::explain::run(&arguments).map(|()| done),
        Command::Metrics(arguments) => cmd::metrics::run(&arguments).await.map(|()| done),
        Command::LogLevel { level } => cmd::log_level::run(&level).map(|()| done),
        Command::Top { iface } => cmd::top::run(iface.as_deref()).map(|()| done),
        Command::SupportBundle { to } => cmd::support::run(to.as_deref()).await.map(|()| done),
        Command::Stats { read, watch } => cmd::stats::run(&read, watch).await.map(|()| done),
        Command::Keygen { file } => cmd::keygen::run(file.as_deref()).map(|()| done),
        Command::Generate { artifact, folder } => cmd::generate::run(artifact, &folder).map(|()| done),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut settings::command(), "lb-userspace", &mut std::io::stdout());
            Ok(done)
        }
    }
}

/// It serves, but not as it should.
const DEGRADED: u8 = 5;

/// Puts the program as it is installed by now in this one's place, with the same command line: systemd, and whoever else
/// started this process, sees no other one. Returns only if that fails.
fn start_anew() -> std::io::Error {
    supervisor::reloading();
    if let Err(error) = supervisor::signals().thread_block() {
        log::debug!("hold signals back: {error}");
    }
    match settings::program() {
        Ok(program) => std::process::Command::new(program).args(std::env::args_os().skip(1)).exec(),
        Err(error) => error,
    }
}

/// Exit codes, as `--help` lists them.
fn code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<DatapathError>() {
        Some(DatapathError::NotAttached(_) | DatapathError::Starting { .. }) => 3,
        Some(DatapathError::Held { .. }) => 4,
        _ => 1,
    }
}
