//! Scheduler by hash: connections go on though their lines in the connection tables are taken away, and clients keep their task.
//! Two nodes, real sockets and kernels on every side.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicU64, Ordering},
    thread::JoinHandle,
    time::Duration,
};

use lb_common::outcome::Outcome;
use lb_tests::{
    agent::{Agent, active_tasks, json, outcome, text, verb},
    cluster::{Cluster, Node, Reach, Task},
    lab::{Lab, Whose, ip, service, take_lines, task, with_lab},
    netns::{Netns, eventually},
    packet::{ACK, Packet, SYN, Transport},
    traffic::{listen, requests},
};
use lb_userspace::cluster::{Affinity, Via};
use nix::sys::signal::Signal;

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
        let listener = task.netns.enter(|| listen("[::]:8080"));
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
const PEERS: Reach = Reach::PEERS;
const DIRECT: Reach = Reach { direct: true, ..PEERS };

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
    cluster.write(&text.replace("name = \"web\"\n", "name = \"web\"\nscheduler = \"maglev\"\n"));
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

/// Takes each line of a node away in turn, and has `trade` look after each; how many there were.
fn take_each(node: &Node, whose: Whose, trade: &mut (impl FnMut() + Send)) -> usize {
    node.netns.enter(|| take_lines(whose, trade))
}

/// Connections to tasks of all nodes, of which every line is taken away.
fn all_go_on(reach: Reach) {
    let cluster = cluster(reach);
    let _servers = servers(&cluster);
    let _agents = attach(&cluster);
    let mut connections = connect(&cluster, CONNECTIONS);
    for some in connections.chunks(CONNECTIONS) {
        let tasks: BTreeSet<u8> = some.iter().map(|connection| connection.task).collect();
        assert!(tasks.len() > 1, "hashes spread: {tasks:?}");
    }
    let mut trade = || connections.iter_mut().for_each(|connection| connection.ask(8, || ()));
    trade();
    for node in &cluster.nodes {
        let taken = take_each(node, Whose::All, &mut trade);
        // Each connection has one at the node that its client used.
        assert!(taken >= 2 * CONNECTIONS, "{taken} lines at {}", node.name);
    }
    for _ in 0..3 {
        let taken: usize = cluster.nodes.iter().map(|node| take_each(node, Whose::All, &mut || ())).sum();
        assert!(taken >= 4 * CONNECTIONS, "{taken} lines, all at once");
        trade();
    }
    for node in &cluster.nodes {
        assert_eq!(outcome(&node.netns, "no_connection"), 0);
    }
}

#[test]
fn connections_go_on_whichever_line_is_taken_away() {
    all_go_on(PEERS);
}

#[test]
fn they_go_on_where_answers_go_straight_to_the_client() {
    all_go_on(DIRECT);
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
    for node in &cluster.nodes {
        assert_eq!(outcome(&node.netns, "no_connection"), 0);
    }
}

/// A task's node alone knows by which node a reply has to leave: where that line is lost between a client's acknowledgment and
/// the next data, the connection waits for the client's next word, which a download never has. Nothing gives up such a line but
/// the end of its node, which ends the task.
#[test]
fn transfers_go_on_while_lines_of_the_clients_nodes_are_taken_away() {
    let cluster = cluster(PEERS);
    let _servers = servers(&cluster);
    let _agents = attach(&cluster);
    let taken = AtomicU64::new(0);
    let take_all = || {
        let own = |node| take_each(node, Whose::OwnClients, &mut || ());
        let lines: usize = cluster.nodes.iter().map(own).sum();
        taken.fetch_add(lines as u64, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        let connections = connect(&cluster, 2);
        let transfer = |mut connection: Connection| scope.spawn(move || connection.ask(4 << 20, take_all));
        connections.into_iter().map(transfer).for_each(drop);
    });
    println!("{} lines were taken away", taken.load(Ordering::Relaxed));
    assert!(taken.load(Ordering::Relaxed) > 50);
}

/// Tasks of two nodes, a client's connections all to one of them.
fn with_affinity(cluster: &Cluster, tasks: &[(&Task, &str)]) -> String {
    let text = cluster.file("\"80:8080\"", tasks);
    text.replacen("name = \"web\"\n", "name = \"web\"\naffinity = \"client\"\n", 1)
}

#[test]
fn a_client_keeps_its_task_by_any_node_and_after_any_restart() {
    let mut cluster = Cluster::new(2);
    cluster.reach = Reach { peers: true, ..Reach::default() };
    for (name, node) in [("web.1", 0), ("web.2", 1), ("web.3", 0), ("web.4", 1)] {
        cluster.add_nginx(name, node);
    }
    let all: Vec<_> = cluster.tasks.iter().map(|task| (task, "running")).collect();
    let path = cluster.write(&with_affinity(&cluster, &all));
    let attach = |number: usize| Agent::attach(&cluster.nodes[number].netns, cluster.folder(), &path, &[]);
    let clients: Vec<Netns> = (0..8)
        .map(|number| {
            let v6 = format!("2001:db8:1::c:{number}").parse().expect("an address");
            cluster.plug("kin", Ipv4Addr::new(192, 0, 2, 30 + number), v6)
        })
        .collect();
    let offers = |tasks: u64| {
        for node in &cluster.nodes {
            eventually("all are offered", || active_tasks(&node.netns, "web") == tasks);
        }
    };
    // The tasks of each client and family by both nodes.
    let addresses: Vec<[IpAddr; 2]> = [0, 1].map(|node| cluster.addresses(node)).into();
    let found = || -> Vec<BTreeSet<String>> {
        let pairs = clients.iter().flat_map(|client| [(client, 0), (client, 1)]);
        let tasks = |(client, family): (&Netns, usize)| {
            let answers = addresses.iter().flat_map(|of| requests(client, of[family], 3));
            answers.map(|answer| answer.split(' ').next().unwrap_or_default().to_owned()).collect()
        };
        pairs.map(tasks).collect()
    };
    // Tables change one entry at a time, and nodes one after the other.
    let settled = |what: &str, is_right: &dyn Fn(&[BTreeSet<String>]) -> bool| -> Vec<BTreeSet<String>> {
        let each_has_one = |all: &[BTreeSet<String>]| all.iter().all(|tasks| tasks.len() == 1);
        eventually(what, || {
            let all = found();
            each_has_one(&all) && is_right(&all)
        });
        let all = found();
        assert!(each_has_one(&all) && is_right(&all), "{what}: {all:?}");
        all
    };
    let first = attach(0);
    let _second = attach(1);
    offers(4);
    let kept =
        settled("all tasks have clients", &|all| all.iter().flatten().collect::<BTreeSet<_>>().len() == 4);
    let shown = text(&cluster.nodes[0].netns, &["service", "inspect", "web"]);
    assert!(shown.lines().any(|line| line.split_whitespace().eq(["affinity:", "client"])), "{shown}");

    // Nothing is left of what this node knew.
    first.stop(Signal::SIGKILL);
    let gone = verb(&cluster.nodes[0].netns, &["detach", "--iface", "eth1"]);
    assert!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
    // Else the other node can find it silent when it is back already, and place clients elsewhere while they are counted.
    eventually("the other node avoids it", || active_tasks(&cluster.nodes[1].netns, "web") == 2);
    let _first = attach(0);
    offers(4);
    settled("after a restart they are as before", &|all| all == kept);

    // One task less: its clients move, and hardly another one does.
    let three: Vec<_> = all.iter().filter(|(task, _)| task.name != "web.4").copied().collect();
    cluster.write(&with_affinity(&cluster, &three));
    offers(3);
    let fourth = BTreeSet::from(["web.4".to_owned()]);
    settled("others stay", &|all| {
        let moved = kept.iter().zip(all).filter(|(before, after)| before != after);
        !all.contains(&fourth) && moved.filter(|(before, _)| **before != fourth).count() <= 1
    });
    // It returns, and so do they.
    cluster.write(&with_affinity(&cluster, &all));
    offers(4);
    settled("they return with their task", &|all| all == kept);
}

#[test]
fn a_client_s_address_alone_decides() {
    let tasks: Vec<_> = (1..=5)
        .map(|number| {
            task(
                &format!("web.{number}"),
                true,
                Via::Peer,
                &[&format!("172.18.0.1{number}"), &format!("fd18::1{number}")],
            )
        })
        .collect();
    let mut web = service("web", &["80:8080", "81:8080", "53:5353/udp"], tasks);
    web.affinity = Affinity::Client;
    let ask = |lab: &Lab, client: &str, transport: Transport, port: u16, to: u16| {
        let listener = if client.contains(':') { "2001:db8::1" } else { "192.0.2.1" };
        lab.delivered_to(&Packet::new(transport, (ip(client), port), (ip(listener), to)))
    };
    let clients: Vec<String> = (1..=40)
        .flat_map(|number| [format!("198.51.100.{number}"), format!("2001:db8:77::{number:x}")])
        .collect();
    // Each datapath has keys of its own; what they place agrees.
    let mut seen = Vec::new();
    for _ in 0..2 {
        with_lab(vec![web.clone()], |lab| {
            let place = |client: &String| {
                let kept = ask(lab, client, SYN, 40_000, 80);
                for port in 40_001..40_010 {
                    assert_eq!(ask(lab, client, SYN, port, 80), kept, "{client}, port {port}");
                }
                // The same port again, of another listener of the task: that port is translated, the task is not another one.
                assert_eq!(ask(lab, client, SYN, 40_000, 81), kept, "{client}, another listener");
                assert_eq!(ask(lab, client, Transport::Udp, 40_000, 53), kept, "{client}, another protocol");
                // What goes on by the other listener without a line would be taken for the first one's at the task.
                let listener = if client.contains(':') { "2001:db8::1" } else { "192.0.2.1" };
                let stray = Packet::new(ACK, (ip(client), 40_001), (ip(listener), 81)).at(1_000, 2_000);
                lab.passes("the port is the first one's there", &stray.bytes(), Outcome::NoConnection);
                kept
            };
            seen.push(clients.iter().map(place).collect::<Vec<_>>());
        });
    }
    assert_eq!(seen[0], seen[1]);
    let mut counts = BTreeMap::new();
    seen[0].iter().for_each(|task| *counts.entry(task.as_str()).or_insert(0) += 1);
    assert!(
        counts.len() == 5 && counts.values().all(|count| (4..=32).contains(count)),
        "80 clients: {counts:?}"
    );
}
