//! What is served over HTTP: the metrics, whether all is well, and a page to look at. Read-only.
//!
//! It reads the pinned tables as the verbs do, on a thread of its own, and never holds up a controller.

mod listen;
pub mod metrics;
mod routes;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
pub use listen::{Listen, could_listen, listen};
use metrics::Exposed;
pub use routes::router;

use crate::{
    datapath::TableSet,
    events::Recorder,
    health::{AgentState, assess},
    inventory::Inventory,
    plan::Tables,
};

/// Open connections are counted at most once in this time: it is a walk through all of them.
const COUNT: Duration = Duration::from_secs(10);

/// Tells the server that the tables have changed.
#[derive(Clone, Debug, Default)]
pub struct Changed(Arc<AtomicU64>);

impl Changed {
    /// They have.
    pub fn mark(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn version(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// An interface that is served, and what is remembered of it between requests.
pub struct Source {
    interface: String,
    /// Without a controller in this process everything is read anew each time.
    changed: Option<Changed>,
    known: Mutex<Option<Known>>,
}

struct Known {
    set: TableSet,
    tables: Arc<Tables>,
    version: u64,
    open: Option<(Instant, BTreeMap<u32, u64>)>,
}

impl Source {
    /// An interface whose tables change when `changed` says so.
    pub fn new(interface: &str, changed: Option<Changed>) -> Self {
        Self { interface: interface.to_owned(), changed, known: Mutex::new(None) }
    }

    /// Its name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything there is to know of it now.
    ///
    /// # Errors
    /// Nothing is attached, or the kernel refuses a read.
    pub fn read(&self) -> Result<Exposed> {
        let mut known = self.known();
        let version = self.changed.as_ref().map_or(0, Changed::version);
        let fresh = self.changed.is_some() && known.as_ref().is_some_and(|known| known.version == version);
        if !fresh {
            let set = TableSet::of(&self.interface)?;
            let open = known.take().and_then(|known| known.open);
            *known = Some(Known { tables: Arc::new(set.read_labelled()?), set, version, open });
        }
        let Some(Known { set, tables, open, .. }) = known.as_mut() else {
            anyhow::bail!("nothing is known of {}", self.interface);
        };
        if open.as_ref().is_none_or(|(at, _)| at.elapsed() > COUNT) {
            *open = Some((Instant::now(), set.open_connections(tables)?));
        }
        let inventory = Inventory::read_with(&self.interface, set, tables.clone())?;
        let around = AgentState::read(&self.interface, set)?;
        let health = assess(&inventory, &around);
        let memory = set.memory()?.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        Ok(Exposed { inventory, around, health, open: open.as_ref().map(|(_, open)| open.clone()), memory })
    }
}

/// What all requests share.
#[derive(Clone)]
pub struct Shared {
    /// The interfaces.
    pub sources: Arc<Vec<Source>>,
    /// What happened; none where no controller runs in this process.
    pub events: Option<Arc<Recorder>>,
    /// Who explains a packet holds it.
    pub explains: Arc<tokio::sync::Mutex<()>>,
}

impl Shared {
    /// Everything of every interface; what is said of one that cannot be read.
    pub fn read(&self) -> Vec<(String, Result<Exposed>)> {
        self.sources.iter().map(|source| (source.interface.clone(), source.read())).collect()
    }
}
