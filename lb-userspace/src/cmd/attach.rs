//! `attach`: serve published ports until stopped.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result};
use futures::future::join_all;
use lb_common::abi::Mode;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    cli::{Attach, ModeArg, OnExit, SourceKind},
    controller::{Controller, Settings},
    datapath::Sizes,
    source::{Update, file},
};

/// Attaches to every interface named, and stays until a signal comes.
///
/// # Errors
/// An interface cannot be attached to; those attached before it are let go again.
pub async fn run(arguments: Attach) -> Result<()> {
    let mut controllers: Vec<Controller> = Vec::new();
    for interface in &arguments.iface {
        match Controller::start(settings(&arguments, interface), source(&arguments)?).await {
            Ok(controller) => controllers.push(controller),
            Err(error) => {
                join_all(controllers.into_iter().map(Controller::remove)).await;
                return Err(error);
            }
        }
    }
    // What passes XDP does not pass the host's packet filter: an operator should hear it.
    log::info!(
        "published ports bypass the host's packet filter (nftables, ufw, DOCKER-USER); \
         everything else passes through it as before"
    );
    for controller in &controllers {
        let tables = controller.datapath().tables();
        log::info!("serving {} services on {} listeners", tables.services.len(), tables.listeners.len());
    }
    let (sender, stopped) = watch::channel(false);
    tokio::spawn(async move {
        if wait_for_signal().await.is_ok() {
            let _ = sender.send(true);
        }
    });
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
            flows: arguments.max_flows,
            services: arguments.max_services,
            listeners: arguments.max_listeners,
            backends: arguments.max_backends,
            slots: arguments.max_slots,
        },
        snat_ports: arguments.snat_ports,
    }
}

fn source(arguments: &Attach) -> Result<mpsc::Receiver<Update>> {
    let (sender, updates) = mpsc::channel(4);
    match arguments.source {
        SourceKind::File => file::watch(&arguments.cluster, sender)?,
    }
    Ok(updates)
}

async fn wait_for_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
