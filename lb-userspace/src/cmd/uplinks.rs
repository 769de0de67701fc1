//! Which interfaces `attach` serves: those that are named, or the one that `--iface auto` finds and follows.

use std::{io, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::future::pending;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::list::{table, table_out};
use crate::{
    cli::{Attach, ModeArg, SourceKind},
    datapath::{self, DatapathError, PinDir, Sizes},
    net::{self, Changes, Choice, Link, Net, Snapshot},
    source::docker::{engine::Engine, model},
};

/// Stands for the interface that is found.
pub const AUTO: &str = "auto";

/// How long another interface must have been the choice until the agent moves there: a lease that is renewed, or a cable that is
/// put in again, is no move.
const HOLD: Duration = Duration::from_secs(10);

/// The routes are looked at no more often.
const PACE: Duration = Duration::from_secs(1);

/// Docker is asked for Swarm's address, and is waited for no longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The interfaces that are to be served.
pub struct Uplinks {
    /// Their names.
    pub names: Vec<String>,
    /// How the one was chosen, where none is named.
    pub choice: Option<Choice>,
}

impl Uplinks {
    /// Those that an agent with these options would serve now.
    ///
    /// # Errors
    /// One that is named is not there, or none can be chosen.
    pub async fn find(arguments: &Attach) -> Result<Self> {
        let (net, _changes) = Net::connect().context("start watching the network")?;
        if is_auto(&arguments.iface)? {
            let chosen = match choose(&net).await {
                Err(reason) => former(&net).await.ok_or(reason),
                chosen => chosen,
            };
            let choice = chosen.map_err(|reason| anyhow!("--iface auto: {reason}"))?;
            return Ok(Self { names: vec![choice.interface.clone()], choice: Some(choice) });
        }
        let links = net.links_and_addresses().await?.links;
        for name in &arguments.iface {
            if !links.values().any(|link| link.name == *name) {
                let there = links.values().map(|link| link.name.as_str());
                return Err(DatapathError::no_interface(name, there).into());
            }
        }
        Ok(Self { names: arguments.iface.clone(), choice: None })
    }

    /// Says in the log what was chosen, and what is served by nobody any more.
    pub fn say(&self) {
        if let Some(choice) = &self.choice {
            log::info!("{}: taken by --iface auto: {}", choice.interface, choice.why);
            choice.others.iter().for_each(|other| log::info!("--iface auto: {other}"));
        }
        let former = datapath::attached_interfaces().unwrap_or_default().into_iter();
        let is_left = |name: &String| {
            !self.names.contains(name) && PinDir::of(name).is_ok_and(|pins| pins.controller().is_none())
        };
        for name in former.filter(is_left) {
            log::warn!(
                "the datapath of {name} goes on without a controller, as it was left; `lb-userspace detach --iface {name}` removes it"
            );
        }
    }

    /// Follows the choice: tells of each that has been another one than is served for a while. Nothing is told where none was chosen.
    pub fn follow(&self) -> mpsc::Receiver<Choice> {
        let (sender, moves) = mpsc::channel(1);
        let Some(served) = self.choice.clone() else { return moves };
        tokio::spawn(async move {
            let (net, mut changes) = match Net::connect() {
                Ok(connected) => connected,
                Err(error) => return log::warn!("--iface auto: no other interface is looked for: {error}"),
            };
            while let Some(choice) = another(&net, &mut changes, &served).await {
                if sender.send(choice).await.is_err() {
                    return;
                }
            }
            log::warn!(
                "--iface auto: no other interface is looked for any more: the kernel says nothing of routes"
            );
        });
        moves
    }
}

/// Waits for a move; for ever where none can come.
pub async fn moved(moves: &mut mpsc::Receiver<Choice>) -> Choice {
    match moves.recv().await {
        Some(choice) => choice,
        None => pending().await,
    }
}

/// Whether the interface is to be found.
fn is_auto(names: &[String]) -> Result<bool> {
    match names {
        [one] if one == AUTO => Ok(true),
        names if names.iter().any(|name| name == AUTO) => {
            bail!("--iface auto stands alone: leave it out, or the names beside it")
        }
        _ => Ok(false),
    }
}

/// What an agent before this one left running, if it is one interface: while there is none to choose it stays.
async fn former(net: &Net) -> Option<Choice> {
    let attached = datapath::attached_interfaces().ok()?;
    let [interface] = attached.as_slice() else { return None };
    let snapshot = net.links_and_addresses().await.ok()?;
    let index = snapshot.link(interface)?.index;
    let why = "it was served before, and there is no default route now";
    Some(Choice { index, interface: interface.clone(), why, others: Vec::new() })
}

async fn choose(net: &Net) -> Result<Choice, String> {
    let snapshot = net.links_and_addresses().await.map_err(|error| error.to_string())?;
    let routes = net.default_routes().await.map_err(|error| error.to_string())?;
    net::choose(&snapshot, &routes)
}

/// Waits until another interface than the one that is served has been the choice for [`HOLD`], whatever else changes meanwhile. An
/// interface that is renamed is none. While there is none to choose, what is served stays.
async fn another(net: &Net, changes: &mut Changes, served: &Choice) -> Option<Choice> {
    let mut wanted: Option<(Choice, Instant)> = None;
    loop {
        let now = choose(net).await.ok().filter(|choice| choice.index != served.index);
        let index = |choice: &Choice| choice.index;
        if now.as_ref().map(index) != wanted.as_ref().map(|(choice, _)| choice.index) {
            let shown = now.as_ref().map_or(&served.interface, |choice| &choice.interface);
            log::debug!("--iface auto: {shown} is the choice now");
            wanted = now.map(|choice| (choice, Instant::now()));
        }
        let heard = match &wanted {
            None => changes.recv().await,
            // Where something changes all the time there is always something to hear.
            Some((choice, since)) if since.elapsed() >= HOLD => return Some(choice.clone()),
            Some((choice, since)) => match timeout_at(*since + HOLD, changes.recv()).await {
                Ok(heard) => heard,
                Err(_) => return Some(choice.clone()),
            },
        };
        heard?;
        // Neighbours come and go many times a second; a route is no more urgent than that.
        sleep(PACE).await;
    }
}

/// What is said where Swarm has this node's address on another interface than the one that was chosen.
pub async fn swarm_elsewhere(arguments: &Attach, served: &str) -> Option<String> {
    if arguments.source == SourceKind::File || arguments.cluster.is_some() {
        return None;
    }
    let asked = async { Engine::from_environment().ok()?.get::<model::Info>("/info").await.ok() };
    let address: IpAddr = timeout(PATIENCE, asked).await.ok()??.swarm.node_addr.parse().ok()?;
    let (net, _changes) = Net::connect().ok()?;
    let snapshot = net.links_and_addresses().await.ok()?;
    let index = snapshot.addresses.iter().find(|(_, own)| *own == address)?.0;
    let other = snapshot.links.get(&index).filter(|other| other.name != served)?;
    let instead = match snapshot.unfit(other) {
        None => format!("; --iface {} serves those instead", other.name),
        Some(_) => String::new(),
    };
    Some(format!(
        "Swarm's address {address} is on {}: other nodes are reached by it, and clients that come by it are not served{instead}",
        other.name
    ))
}

/// Shows what an agent with these options would serve, and how. Nothing is touched.
///
/// # Errors
/// It could not serve, and why.
pub async fn print(arguments: &Attach, sizes: &Sizes) -> Result<()> {
    let uplinks = Uplinks::find(arguments).await?;
    let (net, _changes) = Net::connect().context("start watching the network")?;
    let snapshot = net.links_and_addresses().await?;
    let mut rows = table(["INTERFACE", "WHY", "MODE", "DATAPATH", "ADDRESSES"]);
    for name in &uplinks.names {
        let link = snapshot.link(name).with_context(|| format!("{name} has gone meanwhile"))?;
        if let Some(reason) = snapshot.unfit(link) {
            bail!("{reason}");
        }
        rows.add_row([
            name.as_str(),
            uplinks.choice.as_ref().map_or("--iface", |choice| choice.why),
            mode(arguments.mode, link),
            state(name, arguments.replace_state, sizes)?,
            &addresses(&snapshot, link, &arguments.address),
        ]);
    }
    table_out("", false, &rows)?;
    let elsewhere = match &uplinks.choice {
        Some(choice) => swarm_elsewhere(arguments, &choice.interface).await,
        None => None,
    };
    for other in uplinks.choice.iter().flat_map(|choice| &choice.others).chain(&elsewhere) {
        super::out::line(format!("\n{other}"))?;
    }
    Ok(())
}

/// What becomes of the datapath that is there.
fn state(name: &str, replaces: bool, sizes: &Sizes) -> Result<&'static str, DatapathError> {
    match PinDir::of(name).and_then(|pins| Ok((pins.exists()?, pins.controller()))) {
        Ok((false, _)) => Ok("new"),
        Ok((true, Some(_))) => Ok("another agent has it"),
        Ok((true, None)) if replaces => Ok("new, in place of the running one"),
        Ok((true, None)) => datapath::would_adopt(name, sizes).map(|()| "the running one is taken over"),
        Err(DatapathError::Pin { cause, .. }) if cause.kind() == io::ErrorKind::PermissionDenied => {
            Ok("known to root alone")
        }
        Err(error) => Err(error),
    }
}

/// How an interface would be served.
fn mode(wanted: ModeArg, link: &Link) -> &'static str {
    match wanted {
        ModeArg::Auto if net::xdp_features(link.index) == Some(0) => "TC: its driver has no XDP",
        ModeArg::Auto => "native XDP if its driver takes it, else TC",
        ModeArg::Native => "native XDP",
        ModeArg::Generic => "generic XDP",
        ModeArg::Tc => "TC",
    }
}

fn addresses(snapshot: &Snapshot, link: &Link, named: &[IpAddr]) -> String {
    let own = snapshot.addresses_of(link.index);
    let all = own.iter().chain(named.iter().filter(|address| !own.contains(address)));
    let all: Vec<String> = all.map(ToString::to_string).collect();
    if all.is_empty() { "none yet".to_owned() } else { all.join(" ") }
}
