//! The managers' side: listens for the agents of the swarm, hears what they know of their nodes, tells them the cluster.

use std::{net::Ipv6Addr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::codec::{Framed, LinesCodec};

use super::{CONNECT, FromAgent, FromManager, PING, SILENCE, Tale, Telling, VERSION, ended, tls};
use crate::{cluster::ClusterState, source::facts::NodeFacts};

/// Connections at once: swarms are smaller.
const ROOM: usize = 4096;
/// Strangers among them: who has not shown a certificate yet.
const STRANGERS: usize = 64;
/// Longest message of an agent: what it knows of its own node.
const LONGEST_OF_AGENT: usize = 4 << 20;

/// What was heard.
#[derive(Debug)]
pub enum Word {
    /// The agent of a node, by its identifier, says what it knows through a connection of a number.
    Facts(String, u64, NodeFacts),
    /// That connection of it has ended.
    Gone(String, u64),
}

/// Listens on all addresses, until the receiver is gone; then everybody is hung up on. A port that is taken is tried again.
pub async fn serve(port: u16, root: PathBuf, telling: watch::Receiver<Telling>, words: mpsc::Sender<Word>) {
    // Who connects would only hear that this side hangs up.
    if let Err(error) = tls::Identity::load(&root) {
        log::warn!("other nodes' agents cannot be told the cluster's state: {error}");
    }
    let mut told = false;
    let listener = loop {
        match listen(port) {
            Ok(listener) => break listener,
            Err(error) if !told => {
                told = true;
                log::warn!("listen for other nodes' agents on TCP port {port}: {error}; trying again");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(2)) => {}
            () = words.closed() => return,
        }
    };
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    // Dropped with this, and so ended.
    let mut talks = JoinSet::new();
    let mut number = 0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = talks.join_next() => continue,
            () = words.closed() => return,
        };
        let Ok((stream, from)) = accepted else {
            // No descriptors, mostly: they come back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = strangers.clone().try_acquire_owned() else {
            continue;
        };
        if talks.len() >= ROOM {
            continue;
        }
        let (root, telling, words) = (root.clone(), telling.clone(), words.clone());
        number += 1;
        talks.spawn(async move {
            let talk = async {
                let (lines, node) = welcome(stream, root).await?;
                drop(permit);
                let done = converse(lines, (&node, number), telling, &words).await;
                let _ = words.send(Word::Gone(node, number)).await;
                done
            };
            if let Err(error) = talk.await {
                log::debug!("agent at {from}: {error:#}");
            }
        });
    }
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    // Both families by one socket; a kernel without IPv6 has the other one.
    let (socket, any) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, std::net::SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        }
        Err(_) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            (socket, std::net::SocketAddr::from(([0, 0, 0, 0], port)))
        }
    };
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&any.into())?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into())
}

type Lines = Framed<tokio_rustls::server::TlsStream<TcpStream>, LinesCodec>;

/// Finds out who it is: a node of this swarm, by its identifier.
async fn welcome(stream: TcpStream, root: PathBuf) -> Result<(Lines, String)> {
    stream.set_nodelay(true)?;
    let identity = tls::Identity::load(&root)?;
    let own = identity.own.clone();
    let acceptor = TlsAcceptor::from(identity.server()?);
    let stream = timeout(CONNECT, acceptor.accept(stream)).await.context("no TLS in time")??;
    let other = tls::other_side(&own, stream.get_ref().1.peer_certificates())?;
    Ok((Framed::new(stream, LinesCodec::new_with_max_length(LONGEST_OF_AGENT)), other.node))
}

async fn converse(
    mut lines: Lines,
    (node, number): (&str, u64),
    mut telling: watch::Receiver<Telling>,
    words: &mpsc::Sender<Word>,
) -> Result<()> {
    lines.send(serde_json::to_string(&FromManager::Hello { version: VERSION })?).await?;
    // What it was told, and by which name.
    let mut sent: Option<(Arc<ClusterState>, Option<String>)> = None;
    // Nobody is told anything before he has said what he understands.
    let mut greeting = None;
    // Whether it was told that what it was told may be out of date.
    let mut doubted = true;
    let mut ping = interval(PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    telling.mark_changed();
    loop {
        let message = tokio::select! {
            line = timeout_at(heard + SILENCE, lines.next()) => {
                let Some(line) = ended(line.context("not heard for too long")?)? else {
                    return Ok(());
                };
                heard = Instant::now();
                match serde_json::from_str(&line)? {
                    FromAgent::Hello { version, .. } if version != VERSION => bail!("it speaks version {version}, this agent {VERSION}"),
                    FromAgent::Hello { parts, .. } => greeting = Some(parts),
                    FromAgent::Ping => {}
                    FromAgent::Facts(facts) => words.send(Word::Facts(node.to_owned(), number, facts)).await?,
                }
                continue;
            }
            changed = telling.changed(), if greeting.is_some() => {
                changed?;
                let told = telling.borrow_and_update().clone();
                match told {
                    None => {
                        doubted = true;
                        sent = None;
                        FromManager::Problem("it does not know the cluster".into())
                    }
                    // Its certificate may outlive its place in the swarm.
                    Some(told) if !told.names.contains_key(node) => bail!("node {node} is not in the swarm's list"),
                    Some(told) => {
                        let this = told.names.get(node).cloned();
                        // That it is sure again is told by what did not change too.
                        let sure = doubted && told.problem.is_none();
                        let before = sent.as_ref().map(|(state, _)| state);
                        let tale = match greeting {
                            Some(true) => told.since(before),
                            _ => Arc::new(told.at_once(before)),
                        };
                        if sure || tale.news || sent.as_ref().is_none_or(|(_, name)| *name != this) {
                            tell(&mut lines, &tale, this.as_deref()).await?;
                        }
                        sent = Some((told.cluster.clone(), this));
                        doubted = told.problem.is_some();
                        told.problem.clone().map_or(FromManager::Ping, FromManager::Problem)
                    }
                }
            }
            _ = ping.tick() => FromManager::Ping,
        };
        timeout(SILENCE, lines.send(serde_json::to_string(&message)?)).await??;
    }
}

/// Tells what leads from one state to the next.
async fn tell(lines: &mut Lines, tale: &Tale, this: Option<&str>) -> Result<()> {
    for line in tale.lines(this) {
        // Past the codec, which would keep room for the longest line for as long as the connection stands.
        let stream = lines.get_mut();
        let written = async {
            stream.write_all(line.as_bytes()).await?;
            stream.write_all(b"\n").await?;
            stream.flush().await
        };
        timeout(SILENCE, written).await??;
    }
    Ok(())
}
