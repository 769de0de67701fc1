//! The side of every agent: tells each manager's agent what it knows of its node, and hears the cluster from it.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;
use tokio_util::codec::Framed;

use super::{
    CONNECT, FromAgent, FromManager, LONGEST, PING, SILENCE, VERSION, ended,
    lines::Lines,
    prove::Prover,
    tls::{self, Keeper},
};
use crate::{cluster::ClusterState, source::facts::NodeFacts};

/// Between two tries to reach a manager's agent.
const RETRY: Duration = Duration::from_millis(500);

/// What was heard of a manager, by its node's identifier.
#[derive(Debug)]
pub enum ManagerEvent {
    /// The cluster as it knows it.
    Cluster(String, Box<ClusterState>),
    /// What it knows may be out of date.
    Problem(String, String),
    /// It is not heard, and why.
    Gone(String, String),
}

/// Keeps in touch with one manager's agent, until the receiver is gone or the task is aborted.
pub async fn follow(
    manager: String,
    at: SocketAddr,
    keeper: Arc<Keeper>,
    facts: watch::Receiver<Option<NodeFacts>>,
    events: mpsc::Sender<ManagerEvent>,
) {
    loop {
        let reason = match talk(&manager, at, &keeper, facts.clone(), &events).await {
            Ok(()) => "it ended the connection".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        let event = ManagerEvent::Gone(
            manager.clone(),
            format!(
                "manager's agent at {at}: {reason}; is lb-userspace attached there, and does TCP port {} pass?",
                at.port()
            ),
        );
        if events.send(event).await.is_err() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn talk(
    manager: &str,
    at: SocketAddr,
    keeper: &Arc<Keeper>,
    mut facts: watch::Receiver<Option<NodeFacts>>,
    events: &mpsc::Sender<ManagerEvent>,
) -> Result<()> {
    let identity = keeper.identity()?;
    let stream = timeout(CONNECT, TcpStream::connect(at)).await.context("it cannot be reached")??;
    stream.set_nodelay(true)?;
    let from = stream.local_addr()?.ip();
    // That it is a manager is among the names that are checked.
    let connect = TlsConnector::from(identity.client.clone()).connect(tls::manager_name(), stream);
    let stream = timeout(CONNECT, connect).await.context("no TLS in time")??;
    let other = tls::other_side(&identity.own, stream.get_ref().1.peer_certificates())?;
    if other.node != manager || other.role != tls::MANAGER {
        bail!("node {} answers there with the role {}, not manager {manager}", other.node, other.role);
    }
    let mut lines = Framed::new(stream, Lines::new(LONGEST));
    lines
        .send(serde_json::to_string(&FromAgent::Hello { version: VERSION, parts: true, proves: false })?)
        .await?;
    let mut state = ClusterState::default();
    let mut prover = Prover::new(manager, keeper, at, from);
    let until = other.until.min(identity.own.until);
    let expired = Instant::now() + until.duration_since(SystemTime::now()).unwrap_or_default();
    let mut ping = interval(PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    facts.mark_changed();
    loop {
        let message = tokio::select! {
            line = timeout_at(heard + SILENCE, lines.next()) => {
                let Some(line) = ended(line.context("not heard for too long")?)? else {
                    return Ok(());
                };
                heard = Instant::now();
                let event = match serde_json::from_str(&line)? {
                    FromManager::Hello { version } if version != VERSION => {
                        bail!("it speaks version {version}, this agent {VERSION}")
                    }
                    FromManager::Hello { .. } | FromManager::Ping | FromManager::Proven(_) => continue,
                    FromManager::Problem(problem) => ManagerEvent::Problem(manager.to_owned(), problem),
                    FromManager::Cluster(changes) => {
                        let more = changes.more;
                        changes.apply(&mut state);
                        if more {
                            continue;
                        }
                        let node = state.nodes.iter().find(|node| node.name == manager);
                        prover.reach(node.map_or(&[], |node| &node.addresses));
                        ManagerEvent::Cluster(manager.to_owned(), Box::new(state.clone()))
                    }
                };
                events.send(event).await?;
                continue;
            }
            changed = facts.changed() => {
                changed?;
                let known = facts.borrow_and_update().clone();
                prover.follow(known.as_ref().map_or(&[], |known| &known.addresses));
                known.map_or(FromAgent::Ping, FromAgent::Facts)
            }
            () = prover.run() => continue,
            () = sleep_until(expired) => bail!("a certificate has expired; the next one is asked for"),
            _ = ping.tick() => FromAgent::Ping,
        };
        timeout(SILENCE, lines.send(serde_json::to_string(&message)?)).await??;
    }
}
