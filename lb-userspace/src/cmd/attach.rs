//! `attach`: serve published ports until stopped.

use std::{io::IsTerminal as _, sync::Arc};

use anyhow::{Context as _, Result, bail};
use futures::future::join_all;
use lb_common::abi::Mode;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    cli::{Attach, Command, ModeArg, OnExit, ReturnArg, SourceKind},
    cluster::{Return, Tunnel},
    controller::{Controller, Settings, counted},
    datapath::{DatapathError, FlowLog, PinDir, Sizes},
    descriptors,
    events::{Kind, Recorder},
    net::Net,
    serve::{self, Changed, Listen, Shared, Source},
    settings,
    source::{Origin, Update, docker, file},
    supervisor, testing,
};

/// Why the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to.
    Stop,
    /// It is to start anew in this process, with its configuration and its program as they are by then. The datapath goes
    /// on meanwhile.
    Reload,
}

/// Attaches to every interface named, and stays until a signal comes.
///
/// # Errors
/// An interface cannot be attached to; those attached before it are let go again.
pub async fn run(arguments: Attach) -> Result<End> {
    testing::warnings().iter().for_each(|warning| log::warn!("{warning}"));
    // A connection to each node's agent takes a descriptor, and each table and program.
    descriptors::raise();
    let (sender, mut stopped) = watch::channel(None);
    let (reload, reloads) = watch::channel(0);
    let running = format!("{arguments:?}");
    tokio::spawn(async move {
        if let Ok(end) = wait_for_signal(&reload, &running).await {
            let _ = sender.send(Some(end));
        }
        // Who listens for reloads goes on doing so until the end.
        std::future::pending::<()>().await;
    });
    present(&arguments.iface).await?;
    let events = Arc::new(Recorder::open());
    let started = tokio::select! {
        started = start(&arguments, &events, &reloads) => started,
        // What was begun is undone as it is dropped.
        end = stopped.wait_for(Option::is_some) => return Ok(end.ok().and_then(|end| *end).unwrap_or(End::Stop)),
    };
    let mut controllers = started?;
    serve(&arguments, &controllers, &events)?;
    // What passes XDP does not pass the host's packet filter: an operator should hear it.
    log::info!(
        "published ports bypass the host's packet filter (nftables, ufw, DOCKER-USER); \
         everything else passes through it as before"
    );
    for controller in &controllers {
        let tables = controller.datapath().tables();
        let (services, listeners) = (tables.services.len(), tables.listeners.len());
        log::info!("serving {} on {}", counted(services, "service"), counted(listeners, "listener"));
    }
    let usual = if std::io::stdin().is_terminal() { OnExit::Detach } else { OnExit::Keep };
    let on_exit = arguments.on_exit.unwrap_or(usual);
    log::info!(
        "when this ends the datapath {}{}",
        if on_exit == OnExit::Keep { "goes on" } else { "is removed" },
        if arguments.on_exit.is_none() { " (--on-exit says otherwise)" } else { "" }
    );
    supervisor::ready();
    let pulses: Vec<_> = controllers.iter().map(Controller::pulse).collect();
    let reporter = tokio::spawn(async move { supervisor::report(&pulses).await });
    join_all(controllers.iter_mut().map(|controller| {
        let mut stopped = stopped.clone();
        controller.run(async move {
            let _ = stopped.wait_for(Option::is_some).await;
        })
    }))
    .await;
    reporter.abort();
    for controller in &controllers {
        controller.record(Kind::ControllerStopped, "the controller stops");
    }
    if *stopped.borrow() == Some(End::Reload) {
        log::info!("starting anew; the datapath serves meanwhile");
        return Ok(End::Reload);
    }
    supervisor::stopping();
    match on_exit {
        OnExit::Detach => {
            join_all(controllers.into_iter().map(Controller::remove)).await;
            log::info!("detached");
        }
        OnExit::Keep => log::info!("the datapath goes on without its controller; `attach` adopts it again"),
    }
    Ok(End::Stop)
}

/// Starts a controller on every interface. If one cannot be, what was made anew for the others is taken away;
/// what was adopted goes on as it was.
async fn start(
    arguments: &Attach,
    events: &Arc<Recorder>,
    reloads: &watch::Receiver<u64>,
) -> Result<Vec<Controller>> {
    let mut controllers: Vec<Controller> = Vec::new();
    for (interface, updates) in arguments.iface.iter().zip(sources(arguments, reloads)?) {
        let settings = controller_settings(arguments, interface, events.clone(), reloads.clone());
        match Controller::start(settings, updates).await {
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

/// Serves metrics and the page. Where nothing was asked for, another program may have the usual port.
fn serve(arguments: &Attach, controllers: &[Controller], events: &Arc<Recorder>) -> Result<()> {
    let source = |controller: &Controller| {
        let settings = controller.settings();
        Source::new(&settings.interface, Some(settings.changed.clone()))
    };
    let sources = Arc::new(controllers.iter().map(source).collect());
    let shared = Shared { sources, events: Some(events.clone()) };
    let asked = !arguments.listen.is_empty();
    let addresses = if asked { arguments.listen.clone() } else { vec![Listen::default()] };
    for at in &addresses {
        let router = serve::router(shared.clone(), at.is_local());
        match serve::listen(at, router) {
            Ok(()) if *at == Listen::Nowhere => {}
            Ok(()) => log::info!("metrics and a page at {at}"),
            Err(error) if asked => return Err(error).with_context(|| format!("listen on {at}")),
            Err(error) => {
                log::warn!("no metrics and no page: listen on {at}: {error}; --listen names another place")
            }
        }
    }
    Ok(())
}

/// Refuses interfaces that are not there before any is touched.
async fn present(wanted: &[String]) -> Result<()> {
    let (net, _changes) = Net::connect().context("start watching the network")?;
    let links = net.snapshot().await?.links;
    for name in wanted {
        if !links.values().any(|link| link.name == *name) {
            let there = links.values().map(|link| link.name.as_str());
            return Err(DatapathError::no_interface(name, there).into());
        }
    }
    Ok(())
}

fn controller_settings(
    arguments: &Attach,
    interface: &str,
    events: Arc<Recorder>,
    reload: watch::Receiver<u64>,
) -> Settings {
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
            half_open: arguments.max_half_open,
            spares: arguments.max_spares,
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
        events,
        reload,
        changed: Changed::default(),
        pulse: Arc::default(),
    }
}

/// What is said to each of the interfaces' controllers.
fn sources(arguments: &Attach, reloads: &watch::Receiver<u64>) -> Result<Vec<mpsc::Receiver<Update>>> {
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
                file::watch(path, sender, reloads.clone())?;
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
                adopts: arguments.iface.iter().any(|name| is_attached(name)),
                why: asked.into(),
                reload: reloads.clone(),
            };
            docker::watch(settings, senders)?;
        }
    }
    Ok(updates)
}

fn is_attached(name: &str) -> bool {
    PinDir::of(name).and_then(|pins| pins.exists()).unwrap_or_default()
}

/// Waits for a signal to stop. SIGHUP has everything looked at again; where the configuration or the program is another
/// one by now, it starts anew. `running` is the configuration that runs.
async fn wait_for_signal(reload: &watch::Sender<u64>, running: &str) -> Result<End> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    loop {
        tokio::select! {
            _ = hangup.recv() => {}
            _ = terminate.recv() => return Ok(End::Stop),
            _ = interrupt.recv() => return Ok(End::Stop),
        }
        // What could not be started must not end what runs.
        match settings::parse(std::env::args_os()).map(|cli| cli.command) {
            Ok(Command::Attach(wanted)) if format!("{wanted:?}") == running && !settings::is_replaced() => {
                reload.send_modify(|count| *count += 1);
            }
            Ok(_) => return Ok(End::Reload),
            Err(error) => {
                log::error!("SIGHUP: the configuration stays as it was: {}", error.to_string().trim());
            }
        }
    }
}
