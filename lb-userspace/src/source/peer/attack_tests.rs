//! Agents and strangers that behave badly, against a manager's agent over real sockets.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures::{SinkExt as _, StreamExt as _};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::codec::Framed;

use super::{
    lines::Lines,
    talk_tests::{Authority, keeper},
    *,
};
use crate::source::facts::{NodeFacts, TaskFacts};

/// What a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A manager's agent, which knows nodes `w1` and `w2`.
struct Manager {
    authority: Authority,
    at: SocketAddr,
    events: mpsc::Receiver<server::PeerEvent>,
    published: watch::Sender<Published>,
    job: JoinHandle<()>,
    _root: TempDir,
}

impl Manager {
    async fn start() -> Self {
        let authority = Authority::new();
        let root = authority.node("c1", tls::MANAGER, "m1");
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = free.local_addr().unwrap();
        drop(free);
        let (published, snapshots) = watch::channel(None);
        let (sender, events) = mpsc::channel(1024);
        let job = tokio::spawn(server::serve(at.port(), keeper(root.path()), snapshots, sender));
        let manager = Self { authority, at, events, published, job, _root: root };
        manager.tell(&["w1", "w2"]);
        while TcpStream::connect(at).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        manager
    }

    /// The swarm has these nodes, whose agents speak from this machine.
    fn tell(&self, members: &[&str]) {
        let members: BTreeSet<String> = members.iter().map(|member| (*member).to_owned()).collect();
        let node = |name: &String| Node {
            name: name.clone(),
            host: String::new(),
            addresses: vec![self.at.ip()],
            agent: true,
            down: false,
            key: crate::tunnel_key::NodeKey::Unknown,
            ..Node::default()
        };
        let nodes = members.iter().map(node).collect();
        let cluster = ClusterState { nodes, ..ClusterState::default() };
        self.published.send_replace(Some(Arc::new(ClusterSnapshot::new(cluster, members, None))));
    }

    fn worker(&self, node: &str) -> TempDir {
        self.authority.node("c1", tls::WORKER, node)
    }

    /// The next event that is wanted.
    async fn event<T>(&mut self, wanted: impl Fn(server::PeerEvent) -> Option<T>) -> T {
        let next = async {
            loop {
                if let Some(found) = wanted(self.events.recv().await.unwrap()) {
                    return found;
                }
            }
        };
        timeout(PATIENCE, next).await.unwrap()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.job.abort();
    }
}

/// An agent in the hands of somebody else.
struct Talk(Framed<tokio_rustls::client::TlsStream<TcpStream>, Lines>);

impl Talk {
    async fn silent(at: SocketAddr, root: &Path) -> Self {
        let stream = TcpStream::connect(at).await.unwrap();
        let identity = keeper(root).identity().unwrap();
        let connector = TlsConnector::from(identity.client.clone());
        let stream = connector.connect(tls::manager_name(), stream).await.unwrap();
        Self(Framed::new(stream, Lines::new(1 << 20)))
    }

    async fn start(at: SocketAddr, root: &Path) -> Self {
        let mut talk = Self::silent(at, root).await;
        talk.say(&FromAgent::Hello { version: VERSION, parts: true, proves: false }).await.unwrap();
        talk
    }

    async fn say(&mut self, message: &FromAgent) -> Result<(), LineError> {
        self.0.send(serde_json::to_string(message).unwrap()).await
    }

    /// Waits until it is hung up on because it says nothing; how long that took.
    async fn ends(mut self) -> Duration {
        let start = Instant::now();
        let end = async { while matches!(self.0.next().await, Some(Ok(_))) {} };
        timeout(PATIENCE, end).await.expect("it is hung up on");
        start.elapsed()
    }

    /// Waits until it is hung up on, though it says all the time that it is there.
    async fn refused(mut self) {
        let end = async {
            while self.say(&FromAgent::Ping).await.is_ok() {
                let heard = timeout(Duration::from_millis(100), self.0.next()).await;
                if matches!(heard, Ok(None | Some(Err(_)))) {
                    return;
                }
            }
        };
        timeout(PATIENCE, end).await.expect("it is hung up on");
    }

    /// Whether it was told the cluster.
    async fn is_told(&mut self) -> bool {
        let told = async {
            loop {
                match self.0.next().await {
                    Some(Ok(line)) if line.contains("\"cluster\"") => return true,
                    Some(Ok(_)) => {}
                    _ => return false,
                }
            }
        };
        timeout(PATIENCE, told).await.expect("it is told, or hung up on")
    }
}

fn facts(tasks: usize, unhealthy: bool) -> NodeFacts {
    let task = |number| (format!("web.{number}"), TaskFacts { unhealthy, ..TaskFacts::default() });
    NodeFacts { tasks: (0..tasks).map(task).collect(), ..NodeFacts::default() }
}

#[tokio::test]
async fn silent_strangers_do_not_lock_an_agent_out() {
    let manager = Manager::start().await;
    let worker = manager.worker("w1");
    // From the agent's own machine, too: a container there looks like it.
    let mut strangers = Vec::new();
    for _ in 0..200 {
        strangers.push(TcpStream::connect(manager.at).await.unwrap());
    }
    for attempt in 0..10 {
        let mut talk = Talk::start(manager.at, worker.path()).await;
        assert!(talk.is_told().await, "attempt {attempt}");
        strangers.push(TcpStream::connect(manager.at).await.unwrap());
    }
    // Nobody holds a place for ever, either.
    let mut ended = 0;
    for stranger in &mut strangers {
        let end = timeout(PATIENCE, stranger.read(&mut [0; 1])).await;
        ended += usize::from(matches!(end, Ok(Ok(0) | Err(_))));
    }
    assert_eq!(ended, strangers.len());
}

#[tokio::test]
async fn a_handshake_that_does_not_go_on_ends() {
    let manager = Manager::start().await;
    let worker = manager.worker("w1");
    let mut stream = TcpStream::connect(manager.at).await.unwrap();
    // The beginning of a record, which never ends.
    stream.write_all(&[22, 3, 1, 0x40, 0]).await.unwrap();
    assert!(matches!(timeout(PATIENCE, stream.read(&mut [0; 1])).await.unwrap(), Ok(0) | Err(_)));
    // Who has a certificate and does not greet is no better.
    Talk::silent(manager.at, worker.path()).await.ends().await;
    // Nor one that greets and falls silent, though it has longer.
    let took = Talk::start(manager.at, worker.path()).await.ends().await;
    assert!(took >= SILENCE, "{took:?}");
}

#[tokio::test]
async fn handshakes_without_a_certificate_are_few() {
    let manager = Manager::start().await;
    // No agent is known to speak from here.
    manager.tell(&[]);
    // Of another swarm.
    let stranger = Authority::new().node("c1", tls::WORKER, "w1");
    let identity = keeper(stranger.path()).identity().unwrap();
    let attempt = async || {
        let mut stream = TcpStream::connect(manager.at).await.unwrap();
        // Any ClientHello; whether the other side begins to answer tells whether it worked.
        let mut client = rustls::ClientConnection::new(identity.client.clone(), tls::manager_name()).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        stream.write_all(&hello).await.unwrap();
        matches!(timeout(PATIENCE, stream.read(&mut [0; 1])).await.unwrap(), Ok(1))
    };
    let start = Instant::now();
    let mut answered = 0;
    for _ in 0..300 {
        answered += usize::from(attempt().await);
    }
    // Ten at once, then five a second.
    let most = 11 + 5 * start.elapsed().as_secs() as usize + 5;
    assert!((5..=most).contains(&answered), "{answered} in {:?}", start.elapsed());
}

#[tokio::test]
async fn a_node_has_one_connection_and_the_newest() {
    let mut manager = Manager::start().await;
    let worker = manager.worker("w1");
    let mut talks = Vec::new();
    for _ in 0..5 {
        talks.push(Talk::start(manager.at, worker.path()).await);
        manager.event(|event| matches!(event, server::PeerEvent::Came(..)).then_some(())).await;
    }
    let mut last = talks.pop().unwrap();
    for talk in talks {
        talk.refused().await;
    }
    assert!(last.is_told().await);
    last.say(&FromAgent::Facts(facts(1, false))).await.unwrap();
    let (node, heard) = manager
        .event(|event| match event {
            server::PeerEvent::Facts(node, _, facts) => Some((node, facts.tasks.len())),
            _ => None,
        })
        .await;
    assert_eq!((node.as_str(), heard), ("w1", 1));
    // A node that comes again and again has to wait, and another does not.
    // Not more often than it takes: all speak from one machine, which may begin forty handshakes at once.
    let (mut asked, mut refused) = (0, 0);
    while refused <= 5 {
        assert!(asked < 100, "{refused} of {asked} were refused");
        asked += 1;
        let mut talk = Talk::silent(manager.at, worker.path()).await;
        // The greeting may fail already.
        let _ = talk.say(&FromAgent::Hello { version: VERSION, parts: true, proves: false }).await;
        refused += usize::from(!talk.is_told().await);
    }
    let other = manager.worker("w2");
    assert!(Talk::start(manager.at, other.path()).await.is_told().await);
}

#[tokio::test]
async fn what_a_node_says_is_bounded() {
    let manager = Manager::start().await;
    let worker = manager.worker("w1");
    let endless = async |greet: bool| {
        let mut talk = Talk::silent(manager.at, worker.path()).await;
        if greet {
            talk.say(&FromAgent::Hello { version: VERSION, parts: true, proves: false }).await.unwrap();
        }
        let mut written = 0;
        let portion = vec![b' '; 64 << 10];
        while written < 64 << 20 && talk.0.get_mut().write_all(&portion).await.is_ok() {
            written += portion.len();
        }
        written
    };
    // A line without an end: it is hung up on, whatever the sockets hold beside what is read.
    for greet in [false, true] {
        let written = timeout(PATIENCE, endless(greet)).await.expect("it is hung up on");
        assert!(written < 64 << 20, "greeted: {greet}: {written}");
    }
    // More tasks than a node has.
    let mut talk = Talk::start(manager.at, worker.path()).await;
    let _ = talk.say(&FromAgent::Facts(facts(10_001, false))).await;
    talk.refused().await;
    // Nothing that is no message.
    for line in ["", "{", "[]", "{\"facts\":{}}", "{\"facts\":null}", "\u{0}", &"[".repeat(4000)] {
        let mut talk = Talk::start(manager.at, worker.path()).await;
        talk.0.send(line.to_owned()).await.unwrap();
        println!("{line:?}");
        talk.refused().await;
    }
}

#[tokio::test]
async fn a_node_that_flaps_is_heard_at_a_bounded_pace_and_its_last_word_counts() {
    let mut manager = Manager::start().await;
    let worker = manager.worker("w1");
    let mut talk = Talk::start(manager.at, worker.path()).await;
    let start = Instant::now();
    for flip in 0..400 {
        talk.say(&FromAgent::Facts(facts(1, flip % 2 == 0))).await.unwrap();
    }
    talk.say(&FromAgent::Facts(facts(3, false))).await.unwrap();
    let mut passed = 0;
    let mut last = 0;
    while last != 3 {
        last = manager
            .event(|event| match event {
                server::PeerEvent::Facts(_, _, facts) => Some(facts.tasks.len()),
                _ => None,
            })
            .await;
        passed += 1;
    }
    let most = 32 + 4 * start.elapsed().as_secs() as usize + 4;
    assert!(passed <= most, "{passed} in {:?}", start.elapsed());
}

#[tokio::test]
async fn a_node_that_was_removed_is_not_heard() {
    let mut manager = Manager::start().await;
    let worker = manager.worker("w1");
    let mut talk = Talk::start(manager.at, worker.path()).await;
    assert!(talk.is_told().await);
    manager.tell(&["w2"]);
    talk.refused().await;
    let node = manager
        .event(|event| match event {
            server::PeerEvent::Gone(node, _) => Some(node),
            _ => None,
        })
        .await;
    assert_eq!(node, "w1");
    // Its certificate is good yet.
    let mut talk = Talk::silent(manager.at, worker.path()).await;
    let _ = talk.say(&FromAgent::Hello { version: VERSION, parts: true, proves: false }).await;
    let _ = talk.say(&FromAgent::Facts(facts(1, false))).await;
    assert!(!talk.is_told().await);
    assert!(manager.events.try_recv().is_err(), "nothing is heard of it");
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate_and_a_new_one_is_taken_up() {
    let mut manager = Manager::start().await;
    let worker = manager.worker("w1");
    // Certificates know whole seconds.
    manager.authority.certify(worker.path(), ("c1", tls::WORKER, "w1"), Duration::from_secs(10));
    let keeper = keeper(worker.path());
    let before = keeper.identity().unwrap();
    let talk = Talk::start(manager.at, worker.path()).await;
    manager.event(|event| matches!(event, server::PeerEvent::Came(..)).then_some(())).await;
    let ping = async {
        let mut talk = talk;
        // It is alive all the time.
        while talk.say(&FromAgent::Ping).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(PATIENCE, ping).await.unwrap();
    // One that has not changed is read once; one that has is the one that is shown.
    assert!(Arc::ptr_eq(&keeper.identity().unwrap(), &keeper.identity().unwrap()));
    manager.authority.certify(worker.path(), ("c1", tls::WORKER, "w1"), Duration::from_secs(3600));
    assert!(keeper.identity().unwrap().own.until > before.own.until);
    assert!(Talk::start(manager.at, worker.path()).await.is_told().await);
}

/// An agent as it is, whose node has one address that it speaks from, another that it can speak from, and claims more.
#[tokio::test]
async fn only_addresses_that_an_agent_speaks_from_are_proven() {
    let mut manager = Manager::start().await;
    let worker = manager.worker("w1");
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let addresses = ["127.0.0.9", "192.0.2.77", "127.0.0.8"].map(ip).into();
    let (_facts, known) = watch::channel(Some(NodeFacts { addresses, ..NodeFacts::default() }));
    let (sender, _managers) = mpsc::channel(1024);
    let (at, own) = (manager.at, keeper(worker.path()));
    let job = tokio::spawn(client::follow("m1".into(), at, own, known, sender));
    let mut seen = BTreeSet::new();
    while seen.len() < 3 {
        seen.insert(
            manager
                .event(|event| match event {
                    server::PeerEvent::Came(node, _, address) | server::PeerEvent::Proven(node, address) => {
                        Some((node, address))
                    }
                    _ => None,
                })
                .await,
        );
    }
    job.abort();
    assert_eq!(seen, ["127.0.0.1", "127.0.0.8", "127.0.0.9"].map(|at| ("w1".to_owned(), ip(at))).into());
}
