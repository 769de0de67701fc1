//! The side of every agent: proves to a manager's agent that an address is its node's, by speaking from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::{SinkExt as _, StreamExt as _};
use tokio::{
    net::TcpSocket,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::codec::Framed;

use super::{
    CONNECT, FromAgent, FromManager, VERSION, ended,
    lines::Lines,
    tls::{self, Keeper},
};
use crate::source::facts::MOST_ADDRESSES;

/// The first time to wait after a proof that failed; each time it is twice as long.
const RETRY: Duration = Duration::from_secs(1);
/// The longest.
const SELDOM: Duration = Duration::from_secs(60);
/// Longest message that is waited through: an agent that knows no proofs tells the cluster instead.
const LONGEST: usize = 4 << 10;

/// What became of the proof of an address.
#[derive(Clone, Copy, Debug)]
enum Proof {
    /// It was seen.
    Done,
    /// It is due then, after so many that failed.
    Due(Instant, u32),
}

/// Proves the addresses of this node to one manager's agent.
pub(super) struct Prover {
    manager: String,
    keeper: Arc<Keeper>,
    proofs: BTreeMap<IpAddr, Proof>,
    /// Where Swarm says that agent is.
    at: SocketAddr,
    /// Where it says it is.
    more: Vec<SocketAddr>,
    /// The proof that is under way: one at a time is no burden for the manager.
    running: JoinSet<(IpAddr, Result<()>)>,
}

impl Prover {
    /// To the agent of this manager, spoken to at an address from another, which is proven so.
    pub fn new(manager: &str, keeper: &Arc<Keeper>, at: SocketAddr, from: IpAddr) -> Self {
        let proofs = BTreeMap::from([(from.to_canonical(), Proof::Done)]);
        let (manager, keeper) = (manager.to_owned(), keeper.clone());
        Self { manager, keeper, proofs, at, more: Vec::new(), running: JoinSet::new() }
    }

    /// Proves exactly these from now on.
    pub fn follow(&mut self, addresses: &[IpAddr]) {
        let wanted: BTreeSet<IpAddr> =
            addresses.iter().take(MOST_ADDRESSES).map(IpAddr::to_canonical).collect();
        // An address that went and comes again is proven anew: another may have had it meanwhile.
        self.proofs.retain(|address, _| wanted.contains(address));
        for address in wanted {
            self.proofs.entry(address).or_insert(Proof::Due(Instant::now(), 0));
        }
    }

    /// Where the manager's agent says it is: by their uplinks the nodes reach each other.
    pub fn reach(&mut self, addresses: &[IpAddr]) {
        self.more = addresses.iter().map(|address| SocketAddr::new(*address, self.at.port())).collect();
    }

    /// Does what there is to do; never resolves. May be dropped at any time.
    pub async fn run(&mut self) {
        loop {
            if self.running.is_empty() {
                self.wait().await;
            }
            if let Some(Ok((address, done))) = self.running.join_next().await {
                self.take(address, done);
            }
        }
    }

    /// Waits for the proof that is due next, and starts it.
    async fn wait(&mut self) {
        let due = self.proofs.iter().filter_map(|(address, proof)| match proof {
            Proof::Due(due, failures) => Some((*due, *address, *failures)),
            Proof::Done => None,
        });
        let Some((due, address, failures)) = due.min() else {
            return std::future::pending().await;
        };
        sleep_until(due).await;
        let places = self.more.iter().chain([&self.at]);
        let places: Vec<SocketAddr> =
            places.filter(|at| at.is_ipv4() == address.is_ipv4()).copied().collect();
        let (manager, keeper) = (self.manager.clone(), self.keeper.clone());
        self.running.spawn(async move {
            // In turn, so that one which leads nowhere does not stand in the way.
            let done = match places.get(failures as usize % places.len().max(1)) {
                Some(at) => prove(&manager, &keeper, address, *at).await,
                None => Err(anyhow!("no address of its family is known of the manager's node")),
            };
            (address, done)
        });
    }

    /// Takes note of what became of one.
    fn take(&mut self, address: IpAddr, done: Result<()>) {
        let Some(proof) = self.proofs.get_mut(&address) else {
            return;
        };
        let failures = match proof {
            Proof::Due(_, failures) => *failures,
            Proof::Done => 0,
        };
        *proof = match done {
            Ok(()) => Proof::Done,
            Err(error) => {
                // Early failures are in the nature of things: an address that has just come cannot be spoken from yet.
                let level = if failures == 2 { log::Level::Warn } else { log::Level::Debug };
                log::log!(
                    level,
                    "manager {} does not see this node speak from its address {address}, and other nodes will not send there: \
                     {error:#}; does TCP port {} pass between the uplinks?",
                    self.manager,
                    self.at.port()
                );
                let pause = RETRY.saturating_mul(2_u32.saturating_pow(failures)).min(SELDOM);
                Proof::Due(Instant::now() + pause, failures.saturating_add(1))
            }
        };
    }
}

/// Speaks from an address to the agent of a manager.
async fn prove(manager: &str, keeper: &Keeper, from: IpAddr, at: SocketAddr) -> Result<()> {
    let identity = keeper.identity()?;
    let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.bind(SocketAddr::new(from, 0)).context("speak from it")?;
    let talk = async {
        let stream = socket.connect(at).await.context("the manager's agent cannot be reached from it")?;
        let connector = TlsConnector::from(identity.client.clone());
        let stream = connector.connect(tls::manager_name(), stream).await?;
        let other = tls::other_side(&identity.own, stream.get_ref().1.peer_certificates())?;
        if other.node != manager {
            bail!("node {} answers there", other.node);
        }
        let mut lines = Framed::new(stream, Lines::new(LONGEST));
        let hello = FromAgent::Hello { version: VERSION, parts: false, proves: true };
        lines.send(serde_json::to_string(&hello)?).await?;
        loop {
            let line = ended(lines.next().await)?.context("it hung up")?;
            match serde_json::from_str(&line)? {
                FromManager::Proven(seen) if seen == from => return Ok(()),
                FromManager::Proven(seen) => {
                    bail!("it is seen there as {seen}: something between translates it")
                }
                FromManager::Hello { .. } | FromManager::Ping => {}
                _ => bail!("that agent is older, and takes no proof"),
            }
        }
    };
    timeout(CONNECT * 2, talk).await.context("it takes too long")?
}
