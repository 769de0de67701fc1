//! `task drain`, `node drain` and their opposites: by hand, kept in the tables, so that they outlive controllers.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::{inventories, out, unknown};
use crate::{
    cli::{DrainArgs, Read, UndrainArgs},
    datapath::PinDir,
    events::{make_folder, runtime_folder},
    inventory::Inventory,
    report::{Drain, Drained, now},
};

/// Between two looks of `--wait`.
const LOOK: Duration = Duration::from_millis(200);

/// Drains tasks or nodes; waits for their connections to end if asked to.
///
/// # Errors
/// There is none of a name, they cannot be kept, or connections are open yet when the time is over.
pub async fn drain(what: Drained, arguments: &DrainArgs) -> Result<()> {
    let read = reads(&arguments.iface);
    change(&read, |inventory, drains| {
        for name in &arguments.names {
            let name = known(what, name, inventory)?;
            if !drains.iter().any(|drain| drain.what == what && drain.name == name) {
                drains.push(Drain { what, name, since: now() });
            }
        }
        Ok(())
    })?;
    let controlled = inventories(&read)?
        .iter()
        .all(|(inventory, _)| PinDir::of(&inventory.interface).is_ok_and(|pins| pins.controller().is_some()));
    if !controlled {
        out::line("no controller runs: it takes effect with the next `lb-userspace attach`")?;
        return Ok(());
    }
    match arguments.wait {
        Some(limit) => wait(what, &arguments.names, &read, limit.map(|limit| limit.into())).await,
        None => Ok(()),
    }
}

/// Ends the draining of tasks or nodes.
///
/// # Errors
/// One was not drained, or it cannot be kept.
pub fn undrain(what: Drained, arguments: &UndrainArgs) -> Result<()> {
    let read = reads(&arguments.iface);
    // It may be drained on one of several interfaces alone.
    let mut ended = BTreeSet::new();
    change(&read, |inventory, drains| {
        for name in &arguments.names {
            let before = drains.len();
            // It may be gone meanwhile.
            let known = known(what, name, inventory).unwrap_or_else(|_| name.clone());
            drains.retain(|drain| drain.what != what || drain.name != known);
            if drains.len() != before {
                ended.insert(name.clone());
            }
        }
        Ok(())
    })?;
    match arguments.names.iter().find(|name| !ended.contains(*name)) {
        None => Ok(()),
        Some(name) => {
            bail!("{} {name} is not drained by hand; `lb-userspace status` lists what is", word(what))
        }
    }
}

fn reads(iface: &Option<String>) -> Read {
    Read { iface: iface.clone(), output: crate::cli::Output::Table }
}

const fn word(what: Drained) -> &'static str {
    match what {
        Drained::Task => "task",
        Drained::Node => "node",
    }
}

/// The name in the cluster of what is there by this name.
fn known(what: Drained, name: &str, inventory: &Inventory) -> Result<String> {
    let names: Vec<[String; 2]> = match what {
        Drained::Task => {
            inventory.tasks(|_| true, None).into_iter().map(|task| [task.name.clone(), task.name]).collect()
        }
        Drained::Node => inventory.nodes().into_iter().map(|node| [node.name, node.id]).collect(),
    };
    let found = names.iter().find(|names| names.iter().any(|there| there == name));
    let shown: Vec<String> = names.iter().map(|[shown, _]| shown.clone()).collect();
    found.map(|[_, id]| id.clone()).ok_or_else(|| unknown(word(what), name, &shown))
}

/// Changes what is drained on each interface; of two that do so at once one waits.
fn change(read: &Read, mut change: impl FnMut(&Inventory, &mut Vec<Drain>) -> Result<()>) -> Result<()> {
    let folder = runtime_folder().context("ask the kernel for the network namespace")?;
    make_folder(&folder)?;
    let directory = std::fs::File::open(&folder).with_context(|| format!("open {}", folder.display()))?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("lock {}", folder.display()))?;
    for (inventory, mut set) in inventories(read)? {
        let mut drains = set.drains().all();
        change(&inventory, &mut drains)?;
        set.set_drains(&drains)?;
    }
    Ok(())
}

/// Waits until nothing is open.
async fn wait(what: Drained, names: &[String], read: &Read, limit: Option<Duration>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let (mut open, mut offered) = (0, false);
        for (inventory, set) in inventories(read)? {
            let counts = set.open_connections(&inventory.tables)?;
            // A node may have been named by its identifier.
            let nodes = inventory.nodes().into_iter();
            let nodes = nodes.filter(|node| names.contains(&node.name) || names.contains(&node.id));
            let nodes: BTreeSet<String> = nodes.map(|node| node.name).collect();
            let its = inventory.tasks(|_| true, Some(&counts)).into_iter().filter(|task| match what {
                Drained::Task => names.contains(&task.name),
                Drained::Node => nodes.contains(&task.node),
            });
            for task in its {
                open += task.open_connections.unwrap_or_default();
                offered |= task.active;
            }
        }
        if open == 0 && !offered {
            return out::line(format!("drained: no connection is open to {}", names.join(", ")));
        }
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            bail!(
                "{open} connections are open to {} yet; they stay drained. Wait longer, or take them away: their clients are \
                 then told by a reset",
                names.join(", ")
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}
