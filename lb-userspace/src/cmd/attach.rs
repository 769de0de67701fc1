//! `attach`: serve published ports until stopped.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result, bail};
use futures::future::join_all;
use lb_common::abi::Mode;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    cli::{Attach, ModeArg, OnExit, ReturnArg, SourceKind},
    cluster::{Return, Tunnel},
    controller::{Controller, Settings},
    datapath::{FlowLog, PinDir, Sizes},
    descriptors,
    source::{Origin, Update, docker, file},
    testing,
};

/// Attaches to every interface named, and stays until a signal comes.
///
/// # Errors
/// An interface cannot be attached to; those attached before it are let go again.
pub async fn run(arguments: Attach) -> Result<()> {
    testing::warnings().iter().for_each(|warning| log::warn!("{warning}"));
    // A connection to each node's agent takes a descriptor, and each table and program.
    descriptors::raise();
    let (sender, mut stopped) = watch::channel(false);
    tokio::spawn(async move {
        if wait_for_signal().await.is_ok() {
            let _ = sender.send(true);
        }
    });
    let started = tokio::select! {
        started = start(&arguments) => started,
        // What was begun is undone as it is dropped.
        _ = stopped.wait_for(|stopped| *stopped) => return Ok(()),
    };
    let mut controllers = started?;
    // What passes XDP does not pass the host's packet filter: an operator should hear it.
    log::info!(
        "published ports bypass the host's packet filter (nftables, ufw, DOCKER-USER); \
         everything else passes through it as before"
    );
    for controller in &controllers {
        let tables = controller.datapath().tables();
        log::info!("serving {} services on {} listeners", tables.services.len(), tables.listeners.len());
    }
    join_all(controllers.iter_mut().map(|controller| {
        let mut stopped = stopped.clone();
        controller.run(async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        })
    }))
    .await;
    let usual = if std::io::stdin().is_terminal() { OnExit::Detach } else { OnExit::Keep };
    match arguments.on_exit.unwrap_or(usual) {
        OnExit::Detach => {
            join_all(controllers.into_iter().map(Controller::remove)).await;
            log::info!("detached");
        }
        OnExit::Keep => log::info!("the datapath goes on without its controller; `attach` adopts it again"),
    }
    Ok(())
}

/// Starts a controller on every interface. If one cannot be, what was made anew for the others is taken away;
/// what was adopted goes on as it was.
async fn start(arguments: &Attach) -> Result<Vec<Controller>> {
    let mut controllers: Vec<Controller> = Vec::new();
    for (interface, updates) in arguments.iface.iter().zip(sources(arguments)?) {
        match Controller::start(settings(arguments, interface), updates).await {
            Ok(controller) => controllers.push(controller),
            Err(error) => {
                let fresh = controllers.into_iter().filter(|controller| !controller.datapath().adopted());
                join_all(fresh.map(Controller::remove)).await;
                return Err(error);
            }
        }
    }
    Ok(controllers)
}

fn settings(arguments: &Attach, interface: &str) -> Settings {
    Settings {
        interface: interface.to_owned(),
        node: arguments.node.clone(),
        mode: match arguments.mode {
            ModeArg::Auto => None,
            ModeArg::Native => Some(Mode::Native),
            ModeArg::Generic => Some(Mode::Generic),
            ModeArg::Tc => Some(Mode::Tc),
        },
        sizes: Sizes {
            connections: arguments.max_connections,
            services: arguments.max_services,
            listeners: arguments.max_listeners,
            backends: arguments.max_backends,
            slots: arguments.max_slots,
            nodes: arguments.max_nodes,
            fragments: arguments.max_fragments,
        },
        snat_ports: arguments.snat_ports,
        flow_log: if arguments.log_flows { FlowLog::On } else { FlowLog::Off },
        peer_timeout: arguments.peer_timeout,
        flood_rate: arguments.flood_rate,
        stale_after: arguments.stale_after,
        replace_state: arguments.replace_state,
    }
}

/// What is said to each of the interfaces' controllers.
fn sources(arguments: &Attach) -> Result<Vec<mpsc::Receiver<Update>>> {
    let (senders, updates): (Vec<_>, Vec<_>) = arguments.iface.iter().map(|_| mpsc::channel(4)).unzip();
    let asked = match arguments.source {
        SourceKind::Auto => "found by itself",
        _ => "asked for by --source",
    };
    match (arguments.source, &arguments.cluster) {
        (SourceKind::File | SourceKind::Auto, Some(path)) => {
            let why = format!("--cluster names {}", path.display());
            for sender in senders {
                sender.try_send(Update::Origin(Origin { kind: "file".into(), why: why.clone() }))?;
                file::watch(path, sender)?;
            }
        }
        (SourceKind::Docker, Some(path)) => {
            bail!("--source docker has no use for --cluster {}; leave one of them out", path.display());
        }
        _ => {
            let returns = match arguments.returns {
                ReturnArg::Tunnel => Return::Tunnel,
                ReturnArg::Direct => Return::Direct,
            };
            let settings = docker::Settings {
                interfaces: arguments.iface.clone(),
                tunnel: Tunnel { port: arguments.tunnel_port, returns },
                adopts: arguments.iface.iter().any(|name| PinDir::of(name).is_ok_and(|pins| pins.exists())),
                why: asked.into(),
            };
            docker::watch(settings, senders)?;
        }
    }
    Ok(updates)
}

async fn wait_for_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    tokio::select! {
        _ = hangup.recv() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
