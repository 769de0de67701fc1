//! `attach`: serve published ports until stopped.

use std::{io::IsTerminal as _, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use futures::future::join_all;
use lb_common::abi::Mode;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
};

use super::uplinks::{self, Uplinks};
use crate::{
    check::runner::Checks,
    cli::{Attach, Cli, Command, ModeArg, OnExit, ReturnArg, SourceKind},
    cluster::{Return, Tunnel},
    controller::{Controller, Settings, counted},
    datapath::{self, ConnectionLog, PinDir, Sizes},
    descriptors,
    events::{Kind, Recorder},
    net::{Choice, Net},
    serve::{self, Changed, Listen, Shared, Source},
    settings,
    source::{Origin, Update, docker, file},
    supervisor, testing,
    translation::{self, Pool},
    tunnel_key::{PublicKey, Secret},
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
pub async fn run(mut arguments: Attach) -> Result<End> {
    if arguments.print {
        agree(&arguments)?;
        uplinks::print(&arguments, &sizes(&arguments)).await?;
        return Ok(End::Stop);
    }
    if arguments.check {
        check(arguments).await?;
        return Ok(End::Stop);
    }
    testing::warnings().iter().for_each(|warning| log::warn!("{warning}"));
    // A connection to each node's agent takes a descriptor, and each table and program.
    descriptors::raise();
    let (sender, mut stopped) = watch::channel(None);
    let (reload, reloads) = watch::channel(0);
    let running = format!("{arguments:?}");
    let mut signals = Signals::listen()?;
    let found = Uplinks::find(&arguments).await?;
    found.say();
    let mut moves = found.follow();
    if let Some(choice) = &found.choice {
        let (options, served) = (arguments.clone(), choice.interface.clone());
        tokio::spawn(async move {
            if let Some(elsewhere) = uplinks::swarm_elsewhere(&options, &served).await {
                log::info!("--iface auto: {elsewhere}");
            }
        });
    }
    arguments.v6_pool = pool(arguments.v6_pool).await?;
    // One that was chosen is left when another one is; one that was named is the operator's.
    let is_chosen = found.choice.is_some();
    arguments.iface = found.names;
    tokio::spawn(async move {
        // Who is asked to stop while it ends to start anew, stops.
        loop {
            let end = signals.wait(&reload, &running, &mut moves).await;
            let _ = sender.send(Some(end));
            if end == End::Stop {
                break;
            }
        }
        // Who listens for reloads goes on doing so until the end.
        std::future::pending::<()>().await;
    });
    let events = Arc::new(Recorder::open());
    let mut controllers = Vec::new();
    let started = tokio::select! {
        started = start(&arguments, &events, &reloads, &mut controllers) => started.map(|()| None),
        // The one that was begun is undone as it is dropped.
        end = stopped.wait_for(Option::is_some) => Ok(Some(end.ok().and_then(|end| *end).unwrap_or(End::Stop))),
    };
    match started {
        Ok(None) => {}
        Ok(Some(end)) => {
            remove_fresh(controllers).await;
            return Ok(end);
        }
        Err(error) => {
            remove_fresh(controllers).await;
            return Err(error);
        }
    }
    if let Err(error) = serve(&arguments, &controllers, &events) {
        remove_fresh(controllers).await;
        return Err(error);
    }
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
        let wanted = wanted().await.unwrap_or_else(|_| arguments.iface.clone());
        let (kept, left): (Vec<_>, Vec<_>) =
            controllers.into_iter().partition(|controller| wanted.contains(&controller.settings().interface));
        let (end, why) = match is_chosen {
            true => (OnExit::Detach, "is no longer what --iface auto takes"),
            false => (on_exit, "is no longer in the configuration"),
        };
        leave(left, end, why).await;
        // Who asked for an end meanwhile is not to be forgotten in the next program.
        if *stopped.borrow() == Some(End::Reload) {
            return Ok(End::Reload);
        }
        controllers = kept;
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

/// Starts a controller on every interface.
async fn start(
    arguments: &Attach,
    events: &Arc<Recorder>,
    reloads: &watch::Receiver<u64>,
    controllers: &mut Vec<Controller>,
) -> Result<()> {
    let (secret, checks) = (secret(&arguments.iface)?, Checks::default());
    let sources = sources(arguments, (secret.public(), checks.clone()), reloads)?;
    for (interface, updates) in arguments.iface.iter().zip(sources) {
        let shared = (events.clone(), checks.clone());
        let settings = controller_settings(arguments, interface, secret, shared, reloads.clone());
        controllers.push(Controller::start(settings, updates).await?);
    }
    Ok(())
}

/// This node's key for the tunnel: as an agent before this one kept it with its tables, or stored it where systemd keeps what
/// outlasts a reboot, or a new one.
fn secret(interfaces: &[String]) -> Result<Secret> {
    // More than one would be parted by colons (systemd.exec(5)); the unit has one.
    let folder = std::env::var_os("STATE_DIRECTORY").map(PathBuf::from);
    let kept = interfaces.iter().find_map(|interface| datapath::kept_secret(interface));
    let secret = match kept.or_else(|| Secret::load(folder.as_deref()?)) {
        Some(secret) => secret,
        None => Secret::generate().context("make a key for the tunnel")?,
    };
    if let Some(folder) = folder
        && let Err(error) = secret.store(&folder)
    {
        log::warn!(
            "store this node's key for the tunnel in {}: {error}; after a reboot other nodes refuse it until they hear of another",
            folder.display()
        );
    }
    Ok(secret)
}

/// Lets go of interfaces that are not to be served any more, and says why.
async fn leave(controllers: Vec<Controller>, on_exit: OnExit, why: &str) {
    for controller in controllers {
        let interface = controller.settings().interface.clone();
        match on_exit {
            OnExit::Detach => {
                controller.remove().await;
                log::info!("{interface} {why}: detached");
            }
            OnExit::Keep => log::warn!(
                "{interface} {why}: its datapath goes on without a controller; `lb-userspace \
                 detach --iface {interface}` removes it"
            ),
        }
    }
}

/// Takes away what was made anew; what was adopted goes on as it was.
async fn remove_fresh(controllers: Vec<Controller>) {
    let fresh = controllers.into_iter().filter(|controller| !controller.datapath().adopted());
    join_all(fresh.map(Controller::remove)).await;
}

/// Serves metrics and the page. Where nothing was asked for, another program may have the usual port.
fn serve(arguments: &Attach, controllers: &[Controller], events: &Arc<Recorder>) -> Result<()> {
    let source = |controller: &Controller| {
        let settings = controller.settings();
        Source::new(&settings.interface, Some(settings.changed.clone()))
    };
    let sources = Arc::new(controllers.iter().map(source).collect());
    let shared = Shared { sources, events: Some(events.clone()), explains: Arc::default() };
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

/// Whether the agent could be started so: what a start would refuse is refused, and nothing is touched.
async fn check(mut arguments: Attach) -> Result<()> {
    arguments.iface = Uplinks::find(&arguments).await?.names;
    agree(&arguments)?;
    pool(arguments.v6_pool).await?;
    if !arguments.replace_state {
        let sizes = sizes(&arguments);
        arguments.iface.iter().try_for_each(|interface| datapath::would_adopt(interface, &sizes))?;
    }
    for at in &arguments.listen {
        serve::could_listen(at).with_context(|| format!("listen on {at}"))?;
    }
    Ok(())
}

/// The pool for IPv6 clients, unless something of this node has some of its addresses already: then what was asked for is refused,
/// and what was not is done without.
async fn pool(wanted: Pool) -> Result<Pool> {
    let Some(range) = wanted.0 else { return Ok(wanted) };
    let (net, _) = Net::connect().context("start watching the network")?;
    let snapshot = net.snapshot().await?;
    let taken = if let Some((owner, its)) = snapshot.owner_of(&range.into()) {
        format!("{owner} has {its}")
    } else if let Some((veth, its)) = snapshot.container_in(&range.into()) {
        format!("a container behind {veth} has {its}")
    } else if let Some(to) = net.route_into(&range).await? {
        format!("there is a route to {to}")
    } else {
        return Ok(wanted);
    };
    let what = format!("{taken}, of which tasks would know IPv6 clients by {range}");
    if wanted.to_string() != translation::DEFAULT {
        bail!("--v6-pool {range}: {what}; take a range that nothing on this node uses, or off");
    }
    log::warn!("{what}: clients of IPv6 reach only tasks that have IPv6; --v6-pool names another range");
    Ok(Pool(None))
}

/// Refuses a cluster file that nobody would read.
fn agree(arguments: &Attach) -> Result<()> {
    match (arguments.source, &arguments.cluster) {
        (SourceKind::Docker, Some(path)) => {
            bail!("--source docker has no use for --cluster {}; leave one of them out", path.display())
        }
        _ => Ok(()),
    }
}

fn controller_settings(
    arguments: &Attach,
    interface: &str,
    secret: Secret,
    (events, checks): (Arc<Recorder>, Checks),
    reload: watch::Receiver<u64>,
) -> Settings {
    let index = arguments.iface.iter().position(|other| other == interface).unwrap_or_default();
    Settings {
        interface: interface.to_owned(),
        others: arguments.iface.iter().filter(|other| *other != interface).cloned().collect(),
        node: arguments.node.clone(),
        mode: match arguments.mode {
            ModeArg::Auto => None,
            ModeArg::Native => Some(Mode::Native),
            ModeArg::Generic => Some(Mode::Generic),
            ModeArg::Tc => Some(Mode::Tc),
        },
        sizes: sizes(arguments),
        addresses: arguments.address.clone(),
        snat_ports: arguments.snat_ports,
        v6_pool: arguments.v6_pool.part(index, arguments.iface.len()),
        pref64: translation::pref64(index),
        connection_log: if arguments.log_connections { ConnectionLog::On } else { ConnectionLog::Off },
        secret,
        peer_timeout: arguments.peer_timeout,
        flood_rate: arguments.flood_rate,
        stale_after: arguments.stale_after,
        replace_state: arguments.replace_state,
        checks,
        events,
        reload,
        changed: Changed::default(),
        pulse: Arc::default(),
    }
}

fn sizes(arguments: &Attach) -> Sizes {
    Sizes {
        connections: arguments.max_connections,
        services: arguments.max_services,
        listeners: arguments.max_listeners,
        backends: arguments.max_backends,
        slots: arguments.max_slots,
        nodes: arguments.max_nodes,
        fragments: arguments.max_fragments,
    }
}

/// What is said to each of the interfaces' controllers.
fn sources(
    arguments: &Attach,
    (key, checks): (PublicKey, Checks),
    reloads: &watch::Receiver<u64>,
) -> Result<Vec<mpsc::Receiver<Update>>> {
    agree(arguments)?;
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
        _ => {
            let returns = match arguments.returns {
                ReturnArg::Tunnel => Return::Tunnel,
                ReturnArg::Direct => Return::Direct,
            };
            let settings = docker::Settings {
                interfaces: arguments.iface.clone(),
                tunnel: Tunnel { port: arguments.tunnel_port, returns },
                adopts: arguments.iface.iter().any(|name| is_attached(name)),
                key,
                translates: arguments.v6_pool.0.is_some(),
                checks,
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

/// The configuration as it is by now.
fn configuration() -> Result<Attach, String> {
    match settings::parse(std::env::args_os()) {
        Ok(Cli { command: Command::Attach(wanted), .. }) => Ok(wanted),
        Ok(_) => Err("it is no `attach` any more".to_owned()),
        Err(error) => Err(error.to_string().trim().to_owned()),
    }
}

/// The interfaces that it names, or that are chosen, by now.
async fn wanted() -> Result<Vec<String>> {
    let arguments = configuration().map_err(anyhow::Error::msg)?;
    Uplinks::find(&arguments).await.map(|found| found.names)
}

/// The signals that the agent does something at.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        let signals = Self {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            hangup: signal(SignalKind::hangup()).context("listen for SIGHUP")?,
        };
        // Whoever started this program anew in its own process has held them back.
        supervisor::signals().thread_unblock().context("let signals through")?;
        Ok(signals)
    }

    /// Waits for a signal to stop. SIGHUP has everything looked at again; where the configuration or the program is another
    /// one by now, it starts anew, if the installed program says that it can; so it does where another interface is the choice.
    /// `running` is the configuration that runs.
    async fn wait(
        &mut self,
        reload: &watch::Sender<u64>,
        running: &str,
        moves: &mut mpsc::Receiver<Choice>,
    ) -> End {
        loop {
            let moved = tokio::select! {
                _ = self.hangup.recv() => None,
                choice = uplinks::moved(moves) => Some(choice),
                _ = self.terminate.recv() => return End::Stop,
                _ = self.interrupt.recv() => return End::Stop,
            };
            let same =
                moved.is_none() && configuration().is_ok_and(|wanted| format!("{wanted:?}") == running);
            if same && !settings::is_replaced() {
                reload.send_modify(|count| *count += 1);
                continue;
            }
            // What could not be started must not end what runs.
            let could = tokio::select! {
                could = could_start() => could,
                _ = self.terminate.recv() => return End::Stop,
                _ = self.interrupt.recv() => return End::Stop,
            };
            match could {
                Ok(()) => {
                    if let Some(choice) = &moved {
                        log::info!("{}: taken by --iface auto from now on: {}", choice.interface, choice.why);
                    }
                    return End::Reload;
                }
                Err(reason) => {
                    let what = if moved.is_some() { "--iface auto" } else { "SIGHUP" };
                    log::error!("{what}: the agent goes on as it was: {reason}");
                }
            }
        }
    }
}

/// Asks the program as it is installed by now whether it could be started with the configuration as it is by now.
async fn could_start() -> Result<(), String> {
    let again = "install lb-userspace again";
    let program = settings::program().map_err(|error| format!("find the program: {error}; {again}"))?;
    let mut command = tokio::process::Command::new(&program);
    command.args(std::env::args_os().skip(1)).arg("--check").stdin(std::process::Stdio::null());
    command.kill_on_drop(true);
    let failed = |what: String| format!("start {}: {what}; {again}", program.display());
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .map_err(|_| failed(format!("it does not answer within {} s", PATIENCE.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(()),
        // Its command line is another one: older programs know no --check.
        Some(2) => {
            Err(format!("{said}\nwhere the options are right, restart the agent instead of reloading it"))
        }
        _ if said.is_empty() => Err(format!("{} --check ended with {}", program.display(), output.status)),
        _ => Err(said),
    }
}

/// The installed program may take so long to say whether it could be started.
const PATIENCE: Duration = Duration::from_secs(10);
