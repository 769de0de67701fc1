//! The *docker* source: the swarm that this node is part of, through its own Docker.
//!
//! ```text
//! membership ─► manager: lists of the Engine API ─┐                       ┌─► controllers
//!            └► worker:  managers' agents ────────┴─► completed by facts ─┴─► other nodes' agents
//! this node's containers ─► facts ─► managers' agents
//! ```
//!
//! A node's part changes while it runs (`docker node promote`, `demote`, `swarm leave`), and so does what this follows.
//! When nobody says anything any more the last state stands, less what the nodes still tell each other is gone.

mod agents;
pub mod engine;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod labels;
pub mod listing;
mod local;
mod manager;
mod membership;
pub mod model;
mod swarm;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{Engine, EngineError, encode};
use listing::Listing;
use membership::Membership;
use model::Gossip;
use swarm::Swarm;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::MissedTickBehavior,
};

use super::{
    Update,
    peer::{self, tls::Keeper},
};
use crate::{check::runner::Checks, cluster::Tunnel, tunnel_key::PublicKey};

/// What the source is asked to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The uplinks of this node.
    pub interfaces: Vec<String>,
    /// How nodes reach each other; the same on all of them.
    pub tunnel: Tunnel,
    /// Whether a datapath runs already, whose connections the first state must not cut off.
    pub adopts: bool,
    /// What other nodes are told of this one's key for the tunnel.
    pub key: PublicKey,
    /// Whether IPv6 clients of tasks that have IPv4 alone are translated here.
    pub translates: bool,
    /// What is found of this node's tasks by checks of our own.
    pub checks: Checks,
    /// Why this source was chosen, for `status`.
    pub why: String,
    /// Changes when everything is to be looked at again.
    pub reload: watch::Receiver<u64>,
}

/// What the source is called while this node is in no swarm.
pub const OUTSIDE: &str = "docker, outside a swarm";

/// How often the nodes' own word is asked for while there is no other.
const GOSSIP: Duration = Duration::from_secs(1);

/// Follows the swarm, and tells every receiver.
///
/// # Errors
/// The environment does not say where Docker is. That it is not there is an [`Update::Waiting`], not an error.
pub fn watch(settings: Settings, outputs: Vec<mpsc::Sender<Update>>) -> Result<(), EngineError> {
    let engine = Engine::from_environment()?;
    if let Some(warning) = engine.warning() {
        log::warn!("{warning}");
    }
    tokio::spawn(run(engine, settings, outputs));
    Ok(())
}

/// The routing mesh's network.
#[derive(Default)]
struct Ingress {
    known: Option<(String, Instant)>,
}

impl Ingress {
    /// Somebody may have made it anew.
    const FRESH: Duration = Duration::from_secs(30);

    async fn id(&mut self, engine: &Engine) -> Result<Option<String>, EngineError> {
        if let Some((id, since)) = &self.known
            && since.elapsed() < Self::FRESH
        {
            return Ok(Some(id.clone()));
        }
        let path = format!("/networks?filters={}", encode(r#"{"scope":["swarm"]}"#));
        let networks: Vec<model::Network> = match (engine.list(&path).await, &self.known) {
            (Ok(networks), _) => networks,
            // It will hardly have been made anew just now.
            (Err(_), Some((id, _))) => return Ok(Some(id.clone())),
            (Err(error), None) => return Err(error),
        };
        let id = networks.into_iter().find(|network| network.ingress).map(|network| network.id);
        self.known = id.clone().map(|id| (id, Instant::now()));
        Ok(id)
    }

    /// What the nodes tell each other; nothing where there is no mesh.
    async fn gossip(&mut self, engine: &Engine) -> Result<Gossip, EngineError> {
        match self.id(engine).await? {
            Some(id) => engine.get(&format!("/networks/{id}?verbose=true")).await,
            None => Ok(Gossip::default()),
        }
    }
}

/// A task that ends when nobody wants it any more.
struct Job(JoinHandle<()>);

impl Job {
    fn start(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Everybody who is listened to, as this node's part in the swarm asks for it.
struct Sources {
    lister: Option<Job>,
    /// What this node proves itself with.
    keeper: Option<Arc<Keeper>>,
    server: Option<Job>,
    clients: BTreeMap<(String, SocketAddr), Job>,
    /// Asks for the lists at once.
    nudge: Arc<Notify>,
    lists: mpsc::Sender<Result<Listing, EngineError>>,
    agents: mpsc::Sender<peer::server::PeerEvent>,
    managers: mpsc::Sender<peer::client::ManagerEvent>,
}

impl Sources {
    fn follow(&mut self, membership: &Membership, swarm: &mut Swarm) {
        let Some(member) = membership.member() else {
            (self.lister, self.server, self.keeper) = (None, None, None);
            self.clients.clear();
            return;
        };
        let keeper = match &self.keeper {
            Some(keeper) if keeper.root() == member.root => keeper.clone(),
            _ => {
                // Everybody is spoken to anew, as who this node is now.
                self.server = None;
                self.clients.clear();
                swarm.agents.hang_up(Instant::now());
                self.keeper.insert(Arc::new(Keeper::new(&member.root))).clone()
            }
        };
        let port = swarm.settings.tunnel.port;
        if !member.manager {
            self.lister = None;
        } else if self.lister.is_none() {
            let follow = manager::follow(swarm.engine.clone(), self.nudge.clone(), self.lists.clone());
            self.lister = Some(Job::start(follow));
        }
        // Only managers have something to tell, and nobody asks the others.
        if !member.manager {
            self.server = None;
        } else if self.server.is_none() {
            let (published, events) = (swarm.published.subscribe(), self.agents.clone());
            self.server = Some(Job::start(peer::server::serve(port, keeper.clone(), published, events)));
        }
        let wanted = member.other_managers(port);
        self.clients.retain(|key, _| wanted.contains(key));
        for (id, at) in wanted {
            self.clients.entry((id.clone(), at)).or_insert_with(|| {
                let (facts, events) = (swarm.own.clone(), self.managers.clone());
                Job::start(peer::client::follow(id, at, keeper.clone(), facts, events))
            });
        }
    }
}

/// Follows the swarm until nobody listens any more.
async fn run(engine: Engine, settings: Settings, outputs: Vec<mpsc::Sender<Update>>) {
    let mut reload = settings.reload.clone();
    let (own_sender, own) = watch::channel(None);
    let mut own_changed = own.clone();
    let node = local::ThisNode {
        interfaces: settings.interfaces.clone(),
        key: settings.key,
        translates: settings.translates,
    };
    let checks = settings.checks.clone();
    let _local = Job::start(local::follow(engine.clone(), node, checks, own_sender));
    let mut memberships = membership::follow(engine.clone());
    let (list_sender, mut lists) = mpsc::channel(1);
    let (agent_sender, mut agents) = mpsc::channel(64);
    let (manager_sender, mut managers) = mpsc::channel(64);
    let nudge = Arc::new(Notify::new());
    let mut sources = Sources {
        lister: None,
        keeper: None,
        server: None,
        clients: BTreeMap::new(),
        nudge: nudge.clone(),
        lists: list_sender,
        agents: agent_sender,
        managers: manager_sender,
    };
    let mut ingress = Ingress::default();
    let mut look = tokio::time::interval(GOSSIP);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut swarm = Swarm::new(engine, settings, outputs, own);
    while !swarm.outputs.iter().all(mpsc::Sender::is_closed) {
        tokio::select! {
            Some(membership) = memberships.recv() => {
                swarm.becomes(&membership);
                if !matches!(membership, Membership::Unknown(_)) {
                    sources.follow(&membership, &mut swarm);
                }
            }
            Some(listed) = lists.recv() => swarm.listed(listed),
            Some(event) = agents.recv() => {
                if swarm.agent_said(event) {
                    // A task that came or went there has changed for the managers too.
                    nudge.notify_one();
                }
            }
            Some(event) = managers.recv() => swarm.manager_said(event),
            Ok(()) = own_changed.changed() => nudge.notify_one(),
            Ok(()) = reload.changed() => nudge.notify_one(),
            _ = look.tick() => {
                swarm.expire();
                swarm.gossip = None;
                if swarm.problem().is_some() {
                    // An engine that hangs must not hold up what others say.
                    let heard = tokio::time::timeout(GOSSIP / 2, ingress.gossip(&swarm.engine)).await;
                    swarm.gossip = heard.ok().and_then(Result::ok).filter(|gossip| !gossip.peers.is_empty());
                }
            }
        }
        swarm.tell().await;
    }
}
