//! The managers' side: listens for the agents of the swarm, hears what they know of their nodes, tells them the cluster.
//!
//! What a stranger costs is bounded by the [`door`](super::door); what a node costs is bounded here, whatever its agent does:
//! one connection, so many handshakes, messages and bytes.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant as StdInstant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::codec::Framed;

use super::{
    CONNECT, Delta, FromAgent, FromManager, PING, Published, SILENCE, VERSION,
    door::{Door, Place},
    ended,
    lines::{Budget, Lines, Share},
    pace::Pace,
    tls::{self, Keeper},
};
use crate::{cluster::ClusterState, descriptors, source::facts::NodeFacts};

/// Longest message of an agent that has not said what it understands.
const LONGEST_OF_STRANGER: usize = 4 << 10;
/// Longest message of an agent: what it knows of its own node.
const LONGEST_OF_AGENT: usize = 2 << 20;
/// What all agents together may have this side keep, beside what the connections themselves take: the facts of their nodes
/// and messages that have not come whole.
const MEMORY: usize = 128 << 20;
/// Connections of a node: those that come anew, and those that prove an address.
const CONNECTIONS: Pace = Pace::new(24, Duration::from_millis(500));
/// What a node has to say of itself that is passed on; of what comes faster the last is.
const NEWS: Pace = Pace::new(30, Duration::from_millis(300));
/// What is read of a node, in [`PORTION`]s; what comes faster waits in its own buffers.
const READING: Pace = Pace::new(256, Duration::from_millis(20));
/// A message costs at least one of these.
const PORTION: usize = 16 << 10;
/// Nodes whose pace is remembered before those that rest are forgotten.
const REMEMBERED: usize = 16 << 10;

/// What was heard.
#[derive(Debug)]
pub enum PeerEvent {
    /// The agent of a node, by its identifier, speaks from an address by a connection of a number; it has no other.
    Came(String, u64, IpAddr),
    /// It says what it knows through that.
    Facts(String, u64, NodeFacts),
    /// It can speak from this address too.
    Proven(String, IpAddr),
    /// That connection of it has ended.
    Gone(String, u64),
}

/// What all connections share.
#[derive(Clone)]
struct Hall {
    keeper: Arc<Keeper>,
    published: watch::Receiver<Published>,
    events: mpsc::Sender<PeerEvent>,
    door: Door,
    budget: Budget,
    guests: Arc<Mutex<Guests>>,
}

/// The nodes whose agents are connected, and those that were lately.
#[derive(Default)]
struct Guests {
    /// The one connection of a node: dropping the sender ends it.
    connections: HashMap<String, (u64, oneshot::Sender<()>)>,
    paces: HashMap<String, Pace>,
}

impl Guests {
    /// Whether the node may have another connection so soon.
    fn comes(&mut self, node: &str, now: StdInstant) -> bool {
        if self.paces.len() >= REMEMBERED {
            self.paces.retain(|_, pace| !pace.is_rested(now));
        }
        self.paces.entry(node.to_owned()).or_insert(CONNECTIONS).take(now)
    }

    /// Gives a node its one connection, a number, and what resolves when it has another.
    fn sits_down(&mut self, node: &str) -> (u64, oneshot::Receiver<()>) {
        /// Also when a node listens anew.
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (sender, replaced) = oneshot::channel();
        self.connections.insert(node.to_owned(), (number, sender));
        (number, replaced)
    }

    fn leaves(&mut self, node: &str, number: u64) {
        if self.connections.get(node).is_some_and(|(current, _)| *current == number) {
            self.connections.remove(node);
        }
    }
}

/// Listens on all addresses, until the receiver is gone; then everybody is hung up on. A port that is taken is tried again.
pub async fn serve(
    port: u16,
    keeper: Arc<Keeper>,
    published: watch::Receiver<Published>,
    events: mpsc::Sender<PeerEvent>,
) {
    // Who connects would only hear that this side hangs up.
    if let Err(error) = keeper.identity() {
        log::warn!("other nodes' agents cannot be told the cluster's state: {error}");
    }
    let mut warned = false;
    let listener = loop {
        match listen(port) {
            Ok(listener) => break listener,
            Err(error) if !warned => {
                warned = true;
                log::warn!("listen for other nodes' agents on TCP port {port}: {error}; trying again");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(2)) => {}
            () = events.closed() => return,
        }
    };
    let hall = Hall {
        keeper,
        published,
        events,
        door: Door::default(),
        budget: Budget::new(MEMORY),
        guests: Arc::default(),
    };
    receive(listener, hall).await;
}

/// Takes connections.
async fn receive(listener: TcpListener, mut hall: Hall) {
    // Dropped with this, and so ended.
    let mut talks = JoinSet::new();
    hall.published.mark_changed();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = talks.join_next() => continue,
            Ok(()) = hall.published.changed() => {
                let snapshot = hall.published.borrow_and_update().clone();
                hall.door.know(snapshot.as_ref().map(|snapshot| snapshot.addresses()));
                continue;
            }
            () = hall.events.closed() => return,
        };
        let Ok((stream, from)) = accepted else {
            // No descriptors, mostly: they come back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // The rest of the process needs descriptors too.
        if talks.len() >= descriptors::connections() {
            continue;
        }
        let (place, hall) = (hall.door.enter(from.ip()), hall.clone());
        talks.spawn(async move {
            if let Err(error) = hall.host(stream, (from, place)).await {
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
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        }
        Err(_) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            (socket, SocketAddr::from(([0, 0, 0, 0], port)))
        }
    };
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&any.into())?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into())
}

type Talk = Framed<tokio_rustls::server::TlsStream<TcpStream>, Lines>;

/// What an agent understands, and what it has come for.
enum Greeting {
    /// To tell and to be told, in parts or at once.
    Talk { parts: bool },
    /// To show that it can speak from its address.
    Proof,
}

impl Hall {
    /// One connection from its beginning to its end.
    async fn host(self, stream: TcpStream, (from, mut place): (SocketAddr, Place)) -> Result<()> {
        let address = from.ip().to_canonical();
        // However it goes on: no place is held for longer.
        let (mut lines, other) = tokio::select! {
            welcomed = timeout(CONNECT, self.welcome(stream, address)) => welcomed.context("no TLS in time")??,
            () = place.taken() => bail!("it has not shown who it is, and its place was needed"),
        };
        drop(place);
        lines.send(serde_json::to_string(&FromManager::Hello { version: VERSION })?).await?;
        let greeting =
            timeout(CONNECT, greeting(&mut lines)).await.context("it does not say what it wants")??;
        let node = other.node;
        let parts = match greeting {
            Greeting::Talk { parts } => parts,
            Greeting::Proof => {
                self.events.send(PeerEvent::Proven(node, address)).await?;
                let proven = serde_json::to_string(&FromManager::Proven(address))?;
                timeout(CONNECT, lines.send(proven)).await??;
                return Ok(());
            }
        };
        // A node has one: the newest, for the agent may have lost the others without a word.
        let (number, mut replaced) = self.guests().sits_down(&node);
        self.events.send(PeerEvent::Came(node.clone(), number, address)).await?;
        let expired = Instant::now() + other.until.duration_since(SystemTime::now()).unwrap_or_default();
        let done = tokio::select! {
            done = self.converse(&mut lines, (&node, number), parts) => done,
            _ = &mut replaced => Err(anyhow::anyhow!("node {node} has a newer connection")),
            () = sleep_until(expired) => Err(anyhow::anyhow!("the certificate of node {node} has expired")),
        };
        self.guests().leaves(&node, number);
        let _ = self.events.send(PeerEvent::Gone(node, number)).await;
        done
    }

    fn guests(&self) -> std::sync::MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out who it is: a node of this swarm, by its identifier.
    async fn welcome(&self, stream: TcpStream, from: IpAddr) -> Result<(Talk, tls::Member)> {
        stream.set_nodelay(true)?;
        // Who says nothing costs a place, and no work.
        if stream.peek(&mut [0]).await? == 0 {
            bail!("it hung up");
        }
        self.door.begin(from, StdInstant::now())?;
        let identity = self.keeper.identity()?;
        let acceptor = TlsAcceptor::from(identity.server.clone());
        let stream = acceptor.accept(stream).await?;
        let other = tls::other_side(&identity.own, stream.get_ref().1.peer_certificates())?;
        if !self.guests().comes(&other.node, StdInstant::now()) {
            bail!("node {} connects too often", other.node);
        }
        // Its certificate may outlive its place in the swarm.
        let snapshot = self.published.borrow().clone();
        if snapshot.is_some_and(|snapshot| !snapshot.members.contains(&other.node)) {
            bail!("node {} is not in the swarm's list", other.node);
        }
        let lines = Lines::within(LONGEST_OF_STRANGER, self.budget.clone());
        Ok((Framed::new(stream, lines), other))
    }

    /// Tells and hears until one side has had enough.
    async fn converse(&self, lines: &mut Talk, (node, number): (&str, u64), parts: bool) -> Result<()> {
        lines.codec_mut().longest = LONGEST_OF_AGENT;
        let mut published = self.published.clone();
        let mut teller = Teller { node, parts, sent: None, doubted: true };
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut reader, mut news) = (Reader::new(), News::new());
        published.mark_changed();
        loop {
            let message = tokio::select! {
                line = reader.next(lines) => {
                    let Some(line) = line? else {
                        return Ok(());
                    };
                    reader.charge(&line);
                    news.take(&line, &self.budget)?;
                    continue;
                }
                facts = news.next() => {
                    self.events.send(PeerEvent::Facts(node.to_owned(), number, facts)).await?;
                    continue;
                }
                changed = published.changed() => {
                    changed?;
                    let snapshot = published.borrow_and_update().clone();
                    teller.tell(lines, snapshot).await?
                }
                _ = ping.tick() => FromManager::Ping,
            };
            timeout(SILENCE, lines.send(serde_json::to_string(&message)?)).await??;
        }
    }
}

/// The first message: nobody is told anything before he has said what he understands.
async fn greeting(lines: &mut Talk) -> Result<Greeting> {
    let line = ended(lines.next().await)?.context("it hung up")?;
    match serde_json::from_str(&line)? {
        FromAgent::Hello { version, .. } if version != VERSION => {
            bail!("it speaks version {version}, this agent {VERSION}")
        }
        FromAgent::Hello { proves: true, .. } => Ok(Greeting::Proof),
        FromAgent::Hello { parts, .. } => Ok(Greeting::Talk { parts }),
        FromAgent::Facts(_) | FromAgent::Ping => bail!("it does not greet"),
    }
}

/// Reads what one agent says, at a pace that the others do not feel.
struct Reader {
    /// When it was heard last, or may be heard again.
    since: Instant,
    pace: Pace,
}

impl Reader {
    fn new() -> Self {
        Self { since: Instant::now(), pace: READING }
    }

    /// The next line, when it may be read.
    async fn next(&self, lines: &mut Talk) -> Result<Option<String>> {
        sleep_until(self.since).await;
        let line = timeout_at(self.since + SILENCE, lines.next()).await;
        Ok(ended(line.context("not heard for too long")?)?)
    }

    fn charge(&mut self, line: &str) {
        let now = StdInstant::now();
        self.pace.charge(now, 1 + (line.len() / PORTION) as u32);
        self.since = self.pace.due(now).into();
    }
}

/// What one agent said of its node and was not passed on yet: the last.
struct News {
    pace: Pace,
    facts: Option<NodeFacts>,
    /// The memory that they take, here and where they are passed on to.
    share: Option<Share>,
}

impl News {
    fn new() -> Self {
        Self { pace: NEWS, facts: None, share: None }
    }

    /// Takes note of a message.
    fn take(&mut self, line: &str, budget: &Budget) -> Result<()> {
        if let FromAgent::Facts(facts) = serde_json::from_str(line)? {
            facts.check()?;
            // What was taken for the last is free for what comes instead.
            self.share = None;
            let share = budget.share(line.len()).context("the facts of all nodes together are too long")?;
            (self.share, self.facts) = (Some(share), Some(facts));
        }
        Ok(())
    }

    /// What there is to pass on, when it may be.
    async fn next(&mut self) -> NodeFacts {
        if self.facts.is_none() {
            return std::future::pending().await;
        }
        sleep_until(self.pace.due(StdInstant::now()).into()).await;
        self.pace.charge(StdInstant::now(), 1);
        self.facts.take().unwrap_or_default()
    }
}

/// What one agent is told.
struct Teller<'a> {
    node: &'a str,
    parts: bool,
    /// What it was told last.
    sent: Option<Arc<ClusterState>>,
    /// Whether it was told that what it was told may be out of date.
    doubted: bool,
}

impl Teller<'_> {
    /// Tells what is new; the message that ends it.
    async fn tell(&mut self, lines: &mut Talk, snapshot: Published) -> Result<FromManager> {
        let Some(snapshot) = snapshot else {
            (self.doubted, self.sent) = (true, None);
            return Ok(FromManager::Problem("it does not know the cluster".into()));
        };
        if !snapshot.members.contains(self.node) {
            bail!("node {} is not in the swarm's list", self.node);
        }
        // That it is sure again is told by what did not change too.
        let sure = self.doubted && snapshot.problem.is_none();
        let delta = match self.parts {
            true => snapshot.since(self.sent.as_ref()),
            false => Arc::new(snapshot.at_once(self.sent.as_ref())),
        };
        if sure || delta.news {
            write(lines, &delta, self.node).await?;
        }
        self.sent = Some(snapshot.cluster.clone());
        self.doubted = snapshot.problem.is_some();
        Ok(snapshot.problem.clone().map_or(FromManager::Ping, FromManager::Problem))
    }
}

/// Writes what leads from one state to the next.
async fn write(lines: &mut Talk, delta: &Delta, this: &str) -> Result<()> {
    for line in delta.lines(Some(this)) {
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
