//! Consistent placement: connections go on though their entries in the tables of flows are taken away. Two nodes, real
//! sockets and kernels on every side.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicU64, Ordering},
    thread::JoinHandle,
    time::Duration,
};

use aya::Pod;
use lb_common::{
    abi::table,
    flow::{Flow, FlowKey, Spare},
    net::{V4, V6},
};
use lb_tests::{
    agent::{Agent, active_tasks, healed_flows, json, outcome},
    cluster::{Cluster, Node, Reach, Task},
    lab::table_by_flow,
    netns::eventually,
};

/// How long an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const CONNECTIONS: usize = 10;
/// Bytes of a transfer between two losses.
const PART: usize = 256 << 10;

/// A task that tells each connection its number, and then sends as many bytes as it is asked for.
struct Server {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(task: &Task, number: u8) -> Self {
        let listener = task.netns.enter(|| TcpListener::bind("[::]:8080").expect("listen"));
        let socket = listener.try_clone().expect("the same socket");
        let thread = task.netns.spawn(move || {
            std::thread::scope(|scope| {
                while let Ok((stream, _)) = socket.accept() {
                    scope.spawn(move || serve(stream, number));
                }
            });
        });
        Self { listener, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread that accepts.
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, number: u8) {
    let mut wanted = [0; 4];
    let mut ready = stream.write_all(&[number]);
    while ready.is_ok() && stream.read_exact(&mut wanted).is_ok() {
        ready = stream.write_all(&pattern(u32::from_be_bytes(wanted)));
    }
}

fn pattern(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|number| (number % 251) as u8).collect()
}

/// A client's connection.
struct Connection {
    stream: TcpStream,
    task: u8,
}

impl Connection {
    fn open(to: SocketAddr) -> Self {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
        let mut number = [0];
        stream.read_exact(&mut number).expect("the task's number");
        Self { stream, task: number[0] }
    }

    /// Asks for so many bytes and checks them; `between` is done after each part of them.
    fn ask(&mut self, bytes: u32, mut between: impl FnMut()) {
        let to = self.stream.peer_addr();
        self.stream.write_all(&bytes.to_be_bytes()).unwrap_or_else(|error| panic!("ask {to:?}: {error}"));
        let mut answer = vec![0; bytes as usize];
        for part in answer.chunks_mut(PART) {
            self.stream.read_exact(part).unwrap_or_else(|error| panic!("answer of {to:?}: {error}"));
            between();
        }
        assert!(answer == pattern(bytes), "{to:?} answers what it was asked for");
    }
}

/// How the nodes reach each other's tasks.
const PEERS: Reach = Reach { peers: true, direct: false, outer_v6: false };
const DIRECT: Reach = Reach { direct: true, ..PEERS };
const SNAT: Reach = Reach { peers: false, ..PEERS };

/// Two nodes with two tasks each behind a service with consistent placement.
fn cluster(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.reach = reach;
    cluster.receive_xdp();
    for slot in 0..4 {
        cluster.add_task(&format!("web.{slot}"), slot % 2);
    }
    offer(&cluster, "running");
    cluster
}

/// Says of all tasks that they are in this state.
fn offer(cluster: &Cluster, state: &str) {
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, state)).collect();
    let text = cluster.file("\"80:8080\"", &tasks);
    cluster.write(&text.replace("name = \"web\"\n", "name = \"web\"\nplacement = \"consistent\"\n"));
}

fn attach(cluster: &Cluster) -> Vec<Agent<'_>> {
    let path = cluster.folder().join("cluster.toml");
    let nodes = cluster.nodes.iter();
    let agents = nodes.map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    for node in &cluster.nodes {
        eventually("all tasks are offered", || active_tasks(&node.netns, "web") == 4);
    }
    agents
}

fn servers(cluster: &Cluster) -> Vec<Server> {
    (1..).zip(&cluster.tasks).map(|(number, task)| Server::start(task, number)).collect()
}

/// Some connections to each address of each node.
fn connect(cluster: &Cluster, each: usize) -> Vec<Connection> {
    let addresses = (0..cluster.nodes.len()).flat_map(|node| cluster.addresses(node));
    let targets = addresses.flat_map(|address| std::iter::repeat_n(SocketAddr::new(address, 80), each));
    cluster.client.enter(|| targets.map(Connection::open).collect())
}

/// Takes each entry out of a table in turn, and has `trade` look after each; how many there were.
fn take<A: 'static, V: Pod>(name: &str, trade: &mut impl FnMut()) -> usize
where
    FlowKey<A>: Pod,
{
    let mut entries = table_by_flow::<A, V>(name);
    let keys: Vec<FlowKey<A>> = entries.keys().flatten().collect();
    // It may have moved to the other table meanwhile.
    keys.iter().filter(|key| entries.remove(key).is_ok()).map(|_| trade()).count()
}

/// Takes each flow of a node in turn.
fn take_each(node: &Node, trade: &mut (impl FnMut() + Send)) -> usize {
    let entries = [
        node.netns.enter(|| take::<V4, Flow<V4>>(table::FLOWS4, trade)),
        node.netns.enter(|| take::<V4, Flow<V4>>(table::HALF_OPEN4, trade)),
        node.netns.enter(|| take::<V6, Flow<V6>>(table::FLOWS6, trade)),
        node.netns.enter(|| take::<V6, Flow<V6>>(table::HALF_OPEN6, trade)),
    ];
    entries.iter().sum()
}

/// Takes each spare of a node in turn.
fn take_spares(node: &Node, trade: &mut (impl FnMut() + Send)) -> usize {
    node.netns.enter(|| take::<V4, Spare<V4>>(table::SPARES4, trade))
        + node.netns.enter(|| take::<V6, Spare<V6>>(table::SPARES6, trade))
}

/// How many a node has.
fn spares_of(node: &Node) -> usize {
    node.netns.enter(|| {
        table_by_flow::<V4, Spare<V4>>(table::SPARES4).keys().count()
            + table_by_flow::<V6, Spare<V6>>(table::SPARES6).keys().count()
    })
}

/// Connections to tasks of all nodes, of which every entry and every spare is taken away.
fn all_go_on(reach: Reach) {
    let cluster = cluster(reach);
    let _servers = servers(&cluster);
    let _agents = attach(&cluster);
    let mut connections = connect(&cluster, CONNECTIONS);
    for some in connections.chunks(CONNECTIONS) {
        let tasks: BTreeSet<u8> = some.iter().map(|connection| connection.task).collect();
        assert!(tasks.len() > 1, "hashes spread: {tasks:?}");
    }
    // Through a node to tasks of the other one.
    let far = (0..).zip(&connections).filter(|(number, connection)| {
        let node = number / (2 * CONNECTIONS);
        usize::from(connection.task - 1) % 2 != node
    });
    let far = far.count();
    let mut trade = || connections.iter_mut().for_each(|connection| connection.ask(8, || ()));
    trade();
    for node in &cluster.nodes {
        let taken = take_each(node, &mut trade);
        // Each connection has one at the node that its client used.
        assert!(taken >= 2 * CONNECTIONS, "{taken} entries at {}", node.name);
    }
    for _ in 0..3 {
        let taken: usize = cluster.nodes.iter().map(|node| take_each(node, &mut || ())).sum();
        assert!(taken >= 4 * CONNECTIONS, "{taken} entries, all at once");
        trade();
    }
    // Where answers pass elsewhere the client's node has none, and goes by the hash alone.
    let without = if reach == DIRECT { far } else { 0 };
    let healed: u64 = cluster.nodes.iter().map(|node| healed_flows(&node.netns, "web")).sum();
    assert!(healed >= 4 * (4 * CONNECTIONS - without) as u64, "{healed} entries healed");
    // One for each direction, wherever it passes.
    let spares: usize = cluster.nodes.iter().map(|node| take_spares(node, &mut trade)).sum();
    assert!(spares >= 8 * CONNECTIONS - without, "{spares} spares");
    if reach == SNAT {
        // Its ports are nowhere else: what is busy gets its spares again.
        eventually("spares are kept anew", || {
            trade();
            cluster.nodes.iter().map(spares_of).sum::<usize>() >= 2 * far
        });
    }
    for _ in 0..3 {
        cluster.nodes.iter().for_each(|node| {
            take_each(node, &mut || ());
        });
        trade();
    }
    for node in &cluster.nodes {
        assert_eq!(outcome(&node.netns, "no_flow"), 0);
    }
}

#[test]
fn connections_go_on_whichever_entry_is_taken_away() {
    all_go_on(PEERS);
}

#[test]
fn they_go_on_where_answers_go_straight_to_the_client() {
    all_go_on(DIRECT);
}

#[test]
fn they_go_on_where_they_leave_with_an_address_of_the_node() {
    all_go_on(SNAT);
}

#[test]
fn connections_of_draining_tasks_go_on() {
    for reach in [PEERS, SNAT] {
        let cluster = cluster(reach);
        let _servers = servers(&cluster);
        let _agents = attach(&cluster);
        let mut connections = connect(&cluster, CONNECTIONS);
        offer(&cluster, "draining");
        for node in &cluster.nodes {
            eventually("no task is offered", || active_tasks(&node.netns, "web") == 0);
        }
        for _ in 0..3 {
            let taken: usize = cluster.nodes.iter().map(|node| take_each(node, &mut || ())).sum();
            assert!(taken >= 4 * CONNECTIONS, "{taken} entries");
            connections.iter_mut().for_each(|connection| connection.ask(8, || ()));
        }
    }
}

/// An address that is now this node's and now that one's, as keepalived has them.
const SHARED: &str = "192.0.2.200";

/// How many listeners a node has.
fn listeners(node: &Node) -> u64 {
    json(&node.netns, &["status"])["listeners"].as_u64().unwrap_or_default()
}

#[test]
fn connections_follow_their_address_to_another_node() {
    let cluster = cluster(PEERS);
    let _servers = servers(&cluster);
    let [first, second] = [&cluster.nodes[0], &cluster.nodes[1]];
    first.netns.ip(&format!("address add {SHARED}/24 dev eth1"));
    let _agents = attach(&cluster);
    eventually("the first node serves it", || listeners(first) == 3);
    let to = SocketAddr::new(SHARED.parse().expect("an address"), 80);
    let mut connections: Vec<Connection> =
        cluster.client.enter(|| (0..2 * CONNECTIONS).map(|_| Connection::open(to)).collect());
    for (from, to) in [(first, second), (second, first)] {
        to.netns.ip(&format!("address add {SHARED}/24 dev eth1"));
        eventually("the other node serves it too", || listeners(to) == 3);
        from.netns.ip(&format!("address delete {SHARED}/24 dev eth1"));
        eventually("the first node serves it no more", || listeners(from) == 2);
        cluster.client.ip("neighbour flush dev eth1");
        connections.iter_mut().for_each(|connection| connection.ask(8, || ()));
    }
    // By their hash: neither has spares of what the other had. Each keeps them then.
    for node in &cluster.nodes {
        assert!(spares_of(node) >= 2 * CONNECTIONS, "{} spares at {}", spares_of(node), node.name);
        assert_eq!(outcome(&node.netns, "no_flow"), 0);
    }
}

#[test]
fn transfers_go_on_while_entries_are_taken_away() {
    let cluster = cluster(PEERS);
    let _servers = servers(&cluster);
    let _agents = attach(&cluster);
    let taken = AtomicU64::new(0);
    let take_all = || {
        let entries: usize = cluster.nodes.iter().map(|node| take_each(node, &mut || ())).sum();
        taken.fetch_add(entries as u64, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        let connections = connect(&cluster, 2);
        let transfer = |mut connection: Connection| scope.spawn(move || connection.ask(4 << 20, take_all));
        connections.into_iter().map(transfer).for_each(drop);
    });
    println!("{} entries were taken away", taken.load(Ordering::Relaxed));
    assert!(taken.load(Ordering::Relaxed) > 50);
}
