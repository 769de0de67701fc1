//! Nothing is lost: floods, tasks that refuse or die, controllers that are killed, pins that do not fit. Real sockets and
//! kernels on every side.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use lb_tests::{
    agent::{Agent, active_tasks, json, outcome, text, verb},
    cluster::{Cluster, Reach, Task},
    flood::Flood,
    netns::{Netns, eventually},
    packet::{SYN, Transport},
    traffic::{self, Load, client, echo, get, requests, stop_echo},
};
use nix::sys::signal::Signal;

/// Attaches to the first node and waits until all tasks are offered.
fn attach<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Agent<'a> {
    let path = cluster.folder().join("cluster.toml");
    let node = &cluster.nodes[0].netns;
    let agent = Agent::attach(node, cluster.folder(), &path, arguments);
    eventually("all tasks are offered", || active_tasks(node, "web") == cluster.tasks.len() as u64);
    agent
}

/// The hardware address of a namespace's `eth1`.
fn mac(netns: &Netns) -> [u8; 6] {
    let shown: serde_json::Value =
        serde_json::from_str(&netns.output("ip", &["-j", "link", "show", "eth1"])).expect("JSON");
    let bytes = shown[0]["address"].as_str().expect("an address").split(':');
    let bytes: Vec<u8> = bytes.map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
    bytes.try_into().expect("six bytes")
}

/// Connections that are open and trade a message now and then, in the order in which they were opened.
struct Trade {
    clients: Vec<TcpStream>,
    listener: TcpListener,
    server: Option<JoinHandle<()>>,
}

/// How long a message may take on a machine that is flooded.
const PATIENCE: Duration = Duration::from_secs(60);

impl Trade {
    fn open(cluster: &Cluster, task: usize, to: SocketAddr, connections: usize) -> Self {
        let listener = cluster.tasks[task].netns.enter(|| traffic::listen("0.0.0.0:8080"));
        // One thread a connection: they are not accepted in the order in which they were opened.
        let socket = listener.try_clone().expect("the same socket");
        let server = cluster.tasks[task].netns.spawn(move || {
            std::thread::scope(|scope| {
                while let Ok((stream, _)) = socket.accept() {
                    // A client that was lost in a flood never says that it ends.
                    stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
                    let builder = std::thread::Builder::new().stack_size(64 << 10);
                    builder.spawn_scoped(scope, || echo_messages(stream)).expect("start a thread");
                }
            });
        });
        let connect = |_| connect(to).expect("connect");
        let clients = cluster.client.enter(|| (0..connections).map(connect).collect());
        Self { clients, listener, server: Some(server) }
    }

    /// A message and its echo on each connection; which failed, and how.
    fn round(&mut self, number: u64) -> Vec<String> {
        let message = number.to_be_bytes();
        let trade = |(connection, stream): (usize, &mut TcpStream)| {
            let mut answer = [0; 8];
            let done = stream.write_all(&message).and_then(|()| stream.read_exact(&mut answer));
            match done {
                Ok(()) if answer == message => None,
                Ok(()) => Some(format!("connection {connection}: {answer:?} in answer to {message:?}")),
                Err(error) => Some(format!("connection {connection}: {error}")),
            }
        };
        self.clients.iter_mut().enumerate().filter_map(trade).collect()
    }
}

impl Drop for Trade {
    fn drop(&mut self) {
        self.clients.clear();
        // Wakes the thread that accepts.
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Opens connections for one message each, one after another until it is over; how long each took, or why it failed.
fn newcomers(client: &Netns, to: SocketAddr, over: &AtomicBool) -> Vec<Result<Duration, String>> {
    let visit = || {
        let start = Instant::now();
        let mut stream = connect(to)?;
        stream.set_read_timeout(Some(PATIENCE / 3))?;
        let mut answer = [0; 8];
        stream.write_all(&answer)?;
        stream.read_exact(&mut answer)?;
        Ok::<_, std::io::Error>(start.elapsed())
    };
    let mut visits = Vec::new();
    client.enter(|| {
        while !over.load(Ordering::Relaxed) {
            visits.push(visit().map_err(|error| error.to_string()));
        }
    });
    visits
}

/// Sends back each message until its sender ends.
fn echo_messages(mut stream: TcpStream) {
    let mut message = [0; 8];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message).expect("answer");
    }
}

/// A thousand connections through a node whose uplink is flooded meanwhile; the datapath's counters afterwards.
fn trade_under(transport: Transport, port: u16, frames: u32, arguments: &[&str]) -> serde_json::Value {
    const CONNECTIONS: usize = 1_000;
    const NONE: [&str; 0] = [];
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    let task = cluster.add_task("web.1", 0);
    let file = cluster.file("\"80:8080\", \"53:5353/udp\"", &[(&cluster.tasks[task], "running")]);
    cluster.write(&file);
    let agent = attach(&cluster, arguments);
    let guarded = !arguments.contains(&"0");
    let node = &cluster.nodes[0];
    let to = SocketAddr::new(node.v4().into(), 80);
    let mut trade = Trade::open(&cluster, task, to, CONNECTIONS);
    assert_eq!(trade.round(0), NONE, "before the flood");
    let flood = Flood { transport, to: (node.v4(), port), mac: mac(&node.netns), frames };
    let over = Arc::new(AtomicBool::new(false));
    let took = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let took = flood.send(&cluster.client);
            over.store(true, Ordering::Relaxed);
            took
        });
        let visitor = scope.spawn(|| newcomers(&cluster.client, to, &over));
        let mut rounds = 0;
        while !over.load(Ordering::Relaxed) {
            rounds += 1;
            assert_eq!(trade.round(rounds), NONE, "in round {rounds} of the flood");
        }
        assert!(rounds > 0);
        println!("{rounds} rounds of {CONNECTIONS} messages during the flood");
        let (visits, failed): (Vec<_>, Vec<_>) =
            visitor.join().expect("the visits").into_iter().partition(Result::is_ok);
        let mut visits: Vec<Duration> = visits.into_iter().flatten().collect();
        visits.sort_unstable();
        let (median, worst) = (visits.get(visits.len() / 2), visits.last());
        println!(
            "{} new connections meanwhile, {median:?} each, {worst:?} at worst; {failed:?}",
            visits.len()
        );
        // Without the guard whoever comes may be evicted before the task has answered.
        assert!(!guarded || !visits.is_empty() && failed.is_empty(), "{failed:?}");
        sender.join().expect("the flood")
    });
    assert_eq!(trade.round(u64::MAX), NONE, "after the flood");
    let status = json(&node.netns, &["status"]);
    println!("{frames} frames of {transport:?} in {took:?}, {arguments:?}: {}", status["flood_guard"]);
    let open = json(&node.netns, &["service", "ps", "web"])["tasks"][0]["open_connections"].as_u64();
    assert!(open >= Some(CONNECTIONS as u64), "{open:?}");
    drop(trade);
    drop(agent);
    status
}

/// Times that the guard took over, as status tells.
fn switches(status: &serde_json::Value) -> u32 {
    let text = status["flood_guard"].as_str().expect("the guard");
    let times = text.split("took over ").nth(1).and_then(|rest| rest.split(' ').next());
    times.and_then(|times| times.parse().ok()).unwrap_or_default()
}

#[test]
fn a_thousand_connections_survive_a_flood_of_syns_with_the_guard() {
    let status = trade_under(SYN, 80, 2_000_000, &["--flood-rate", "1000"]);
    assert!(switches(&status) > 0, "{status}");
}

#[test]
fn a_thousand_connections_survive_a_flood_of_syns_in_small_tables_without_the_guard() {
    let status = trade_under(SYN, 80, 1_000_000, &["--flood-rate", "0", "--max-connections", "4096"]);
    assert_eq!(status["flood_guard"], "off");
}

#[test]
fn a_thousand_connections_survive_a_flood_of_datagrams() {
    let arguments = ["--flood-rate", "1000", "--max-connections", "4096"];
    assert!(switches(&trade_under(Transport::Udp, 53, 1_000_000, &arguments)) > 0);
}

#[test]
fn clients_come_through_while_the_guard_places_them() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    for slot in 1..=3 {
        cluster.add_nginx(&format!("web.{slot}"), 0);
    }
    cluster.write_all_running();
    // Every new connection is one too many.
    let agent = attach(&cluster, &["--flood-rate", "1"]);
    let node = &cluster.nodes[0].netns;
    // Each CPU counts some before it tells the others.
    eventually("the guard takes over", || {
        assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 60).len(), 60);
        switches(&json(node, &["status"])) > 0
    });
    for address in cluster.addresses(0) {
        let answers = requests(&cluster.client, address, 60);
        assert_eq!(answers.len(), 60);
        let tasks: std::collections::BTreeSet<&str> =
            answers.iter().filter_map(|answer| answer.split(' ').next()).collect();
        assert!(tasks.len() > 1, "hashes spread: {tasks:?}");
    }
    eventually("it is said", || agent.log().contains("they are placed by hash"));
    eventually("and its end", || agent.log().contains("the flood is over"));
}

#[test]
fn a_task_that_listens_late_costs_a_retransmission_and_no_error() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    // Its kernel refuses: nothing listens.
    let late = cluster.add_task("web.2", 0);
    cluster.write_all_running();
    let _agent = attach(&cluster, &[]);
    let node = &cluster.nodes[0].netns;
    for address in cluster.addresses(0) {
        let answers = requests(&cluster.client, address, 4);
        assert!(answers.iter().all(|answer| answer.starts_with("web.1 ")), "{answers:?}");
    }
    assert!(outcome(node, "task_refused") >= 4);
    let shown = json(node, &["service", "ps", "web"]);
    let failovers: Vec<_> =
        shown["tasks"].as_array().expect("tasks").iter().map(|t| &t["failovers"]).collect();
    assert_eq!((failovers[0].as_u64(), failovers[1].as_u64() >= Some(4)), (Some(0), true), "{shown}");
    // Once it listens it is served like the other.
    let server = cluster.tasks[late].netns.spawn(|| {
        let listener = traffic::listen("[::]:8080");
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.read(&mut [0; 1024]);
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nweb.2 ")
                .expect("answer");
        }
    });
    cluster.wait_for_listener(late, 8080);
    let answers = requests(&cluster.client, cluster.addresses(0)[0], 4);
    assert_eq!(answers.iter().filter(|answer| answer.starts_with("web.2")).count(), 2, "{answers:?}");
    server.join().expect("the server");
}

#[test]
fn clients_of_a_task_that_is_gone_are_told_at_once() {
    const CLIENTS: usize = 200;
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    let dying = cluster.add_task("dying.1", 0);
    for mode in ["native", "tc"] {
        let only = cluster.file("\"80:8080\"", &[(&cluster.tasks[dying], "running")]);
        cluster.write(&only);
        let node = &cluster.nodes[0].netns;
        let path = cluster.folder().join("cluster.toml");
        let _agent = Agent::attach(node, cluster.folder(), &path, &["--mode", mode]);
        eventually("the task is offered", || active_tasks(node, "web") == 1);
        for address in cluster.addresses(0) {
            let listener = cluster.tasks[dying].netns.enter(|| traffic::listen("[::]:8080"));
            let to = SocketAddr::new(address, 80);
            // One after another: a listener's queue is shorter.
            let (mut clients, servers): (Vec<TcpStream>, Vec<TcpStream>) = cluster.client.enter(|| {
                let connect = |_| {
                    let client = TcpStream::connect_timeout(&to, PATIENCE).expect("connect");
                    (client, listener.accept().expect("a client").0)
                };
                (0..CLIENTS).map(connect).unzip()
            });
            let shown = json(node, &["service", "ps", "web"]);
            assert_eq!(shown["tasks"][0]["open_connections"].as_u64(), Some(CLIENTS as u64), "{shown}");
            let resets = outcome(node, "reset");
            cluster.write(&cluster.file("\"80:8080\"", &[(&cluster.tasks[0], "running")]));
            eventually("the task is gone", || !text(node, &["service", "ps", "web"]).contains("dying.1"));
            for client in &mut clients {
                client.set_read_timeout(Some(Duration::from_secs(10))).expect("set a time limit");
                client.write_all(b"anybody there?").expect("send");
                let told = client.read(&mut [0; 1]).map_err(|error| error.kind());
                assert_eq!(told, Err(ErrorKind::ConnectionReset), "{mode} {address}");
            }
            assert!(outcome(node, "reset") - resets >= CLIENTS as u64);
            drop(servers);
            cluster.write(&only);
            eventually("it is back", || text(node, &["service", "ps", "web"]).contains("dying.1"));
        }
    }
}

/// Datagrams from one port, one after another, until it is told to stop; those sent, and those answered.
fn probe(netns: &Netns, to: SocketAddr, stop: Arc<AtomicBool>) -> JoinHandle<(u32, u32)> {
    netns.spawn(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
        let (mut sent, mut answered, mut buffer) = (0, 0, [0; 256]);
        while !stop.load(Ordering::Relaxed) {
            socket.send_to(format!("probe{sent}").as_bytes(), to).expect("send");
            sent += 1;
            let answer = socket.recv_from(&mut buffer);
            let text = answer.map(|(length, _)| String::from_utf8_lossy(&buffer[..length]).into_owned());
            answered += u32::from(text.is_ok_and(|text| text.contains(&format!("probe{} ", sent - 1))));
        }
        (sent, answered)
    })
}

#[test]
fn no_packet_is_lost_when_controllers_are_killed_and_their_datapath_is_adopted() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    let task = cluster.add_task("web.1", 0);
    let server = cluster.tasks[task].netns.spawn(|| echo(5353, "web.1"));
    let other = cluster.add_task("web.2", 0);
    let one = cluster.file("\"53:5353/udp\"", &[(&cluster.tasks[task], "running")]);
    let tasks: Vec<(&Task, &str)> =
        vec![(&cluster.tasks[task], "running"), (&cluster.tasks[other], "draining")];
    let two = cluster.file("\"53:5353/udp\"", &tasks);
    let path = cluster.write(&one);
    let node = &cluster.nodes[0].netns;
    let mut agent = Agent::attach(node, cluster.folder(), &path, &[]);
    eventually("the task is offered", || active_tasks(node, "web") == 1);
    let stop = Arc::new(AtomicBool::new(false));
    let probe = probe(&cluster.client, SocketAddr::new(cluster.addresses(0)[0], 53), stop.clone());
    for round in 0..12 {
        agent.stop(Signal::SIGKILL);
        // What changes meanwhile is made up for.
        let (text_now, shown) = if round % 2 == 0 { (&two, 2) } else { (&one, 1) };
        cluster.write(text_now);
        agent = Agent::attach(node, cluster.folder(), &path, &[]);
        assert!(agent.log().contains("adopted the running datapath"), "{}", agent.log());
        let count = || json(node, &["service", "ps", "web"])["tasks"].as_array().map_or(0, Vec::len);
        eventually("it is as the file says", || count() == shown);
    }
    stop.store(true, Ordering::Relaxed);
    let (sent, answered) = probe.join().expect("the probe");
    println!("{sent} datagrams through 12 kills and adoptions");
    assert!(sent > 100);
    assert_eq!(answered, sent);
    stop_echo(&cluster.tasks[task].netns, 5353);
    server.join().expect("the server");
}

#[test]
fn no_request_fails_while_the_mode_changes() {
    let mut cluster = Cluster::new(2);
    cluster.reach = Reach { peers: true, ..Reach::default() };
    cluster.receive_xdp();
    cluster.keep_connections_on_one_cpu();
    for (name, node) in [("web.1", 0), ("web.2", 1)] {
        cluster.add_nginx(name, node);
    }
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
    let path = cluster.write(&cluster.file("\"80:8080\"", &tasks));
    let start = |node: usize, mode: &str| {
        Agent::attach(&cluster.nodes[node].netns, cluster.folder(), &path, &["--mode", mode])
    };
    let offered = |node: usize| {
        eventually("all tasks are offered", || active_tasks(&cluster.nodes[node].netns, "web") == 2);
    };
    let mut agents = [0, 1].map(|node| Some(start(node, "native")));
    (0..2).for_each(offered);
    // A machine for each node: a task remembers a client's port for a minute, whichever node it used.
    let other = cluster.plug("other", [192, 0, 2, 21].into(), [0x2001, 0xdb8, 1, 0, 0, 0, 0, 21].into());
    let clients = [(&cluster.client, 0), (&other, 1)];
    let loads = clients.map(|(client, node)| Load::start(client, cluster.addresses(node)[0], 2, u64::MAX));
    let done = || loads.iter().map(Load::done).sum::<u64>();
    let modes = ["tc", "native", "generic", "native", "generic", "tc", "generic", "native"];
    for mode in modes {
        for (node, agent) in agents.iter_mut().enumerate() {
            agent.take().expect("an agent").stop(Signal::SIGKILL);
            *agent = Some(start(node, mode));
            offered(node);
            let more = done() + 50;
            eventually("requests are answered", || done() > more);
        }
    }
    println!("{} requests through {} changes of the mode", done(), 2 * modes.len());
    let failed: Vec<String> = loads.into_iter().flat_map(Load::stop).collect();
    assert_eq!(failed, Vec::<String>::new());
}

#[test]
fn without_a_controller_for_too_long_everything_is_the_host_s_if_so_asked() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let to = SocketAddr::new(cluster.addresses(0)[0], 80);
    for mode in ["native", "tc"] {
        let agent = attach(&cluster, &["--stale-after", "1s", "--mode", mode]);
        assert_eq!(requests(&cluster.client, to.ip(), 3).len(), 3);
        agent.stop(Signal::SIGKILL);
        // Nothing of the host listens there.
        eventually("the host answers", || {
            cluster.client.enter(|| get(&client(), to, "/")).is_err() && outcome(node, "stale") > 0
        });
        let agent = attach(&cluster, &["--mode", mode]);
        assert_eq!(requests(&cluster.client, to.ip(), 3).len(), 3);
        drop(agent);
    }
}

#[test]
fn pins_that_do_not_fit_are_replaced_when_asked_for() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    let path = cluster.write_all_running();
    let path = path.to_str().expect("a plain path");
    let node = &cluster.nodes[0].netns;
    let arguments = ["--max-connections", "2048"];
    attach(&cluster, &[]).stop(Signal::SIGTERM);
    let refused = verb(node, &[&["attach", "--iface", "eth1", "--cluster", path], &arguments[..]].concat());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    let expected = "--max-connections 2048: the datapath that runs has 262144 (connections of CONNECTIONS4)";
    assert!(said.contains(expected), "{said}");
    assert!(said.contains("--replace-state"), "{said}");
    // Refusing changed nothing.
    assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 3).len(), 3);
    let agent = attach(&cluster, &[&arguments[..], &["--replace-state"]].concat());
    assert_eq!(json(node, &["status"])["connection_room"], 2_048);
    assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 3).len(), 3);
    drop(agent);
}

#[test]
fn what_has_ended_is_swept_out_and_numbers_are_given_again() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    let node = &cluster.nodes[0].netns;
    let timers = "[service.timers]\nhalf_open = 3\nestablished = 3\nclosing = 3\n[[service.task]]";
    let text_of =
        |tasks: &[(&Task, &str)]| cluster.file("\"80:8080\"", tasks).replacen("[[service.task]]", timers, 1);
    cluster.write(&text_of(&[(&cluster.tasks[0], "running")]));
    let agent = attach(&cluster, &[]);
    let to: IpAddr = cluster.addresses(0)[0];
    requests(&cluster.client, to, 20);
    eventually("they are swept out", || agent.log().contains(" connections had ended"));
    let open = || json(node, &["service", "ps", "web"])["tasks"][0]["open_connections"].as_u64();
    eventually("none is left", || open() == Some(0));
    drop(agent);
}

/// A cluster file in which the last task serves with established connections ended by three seconds of silence, and what
/// else is said of the service.
fn with_short_silence(cluster: &Cluster, setting: &str) -> String {
    let task = cluster.tasks.last().expect("a task");
    let said = format!("{setting}\n[service.timers]\nestablished = 3\n[[service.task]]");
    cluster.file("\"80:8080\"", &[(task, "running")]).replacen("[[service.task]]", &said, 1)
}

/// The last task's server.
fn listen(cluster: &Cluster) -> TcpListener {
    let task = &cluster.tasks.last().expect("a task").netns;
    task.enter(|| traffic::listen("[::]:8080"))
}

/// A connection. While a test beside this one floods, this machine may drop what resolves neighbours too.
fn reach(to: SocketAddr) -> TcpStream {
    let started = Instant::now();
    loop {
        match TcpStream::connect_timeout(&to, PATIENCE) {
            Err(error) if error.kind() == ErrorKind::HostUnreachable && started.elapsed() < PATIENCE => {}
            connected => return connected.expect("connect"),
        }
    }
}

/// Both ends of a connection through an address that has carried a message each way.
fn talk(cluster: &Cluster, listener: &TcpListener, to: IpAddr) -> [TcpStream; 2] {
    let to = SocketAddr::new(to, 80);
    let mut client = cluster.client.enter(|| reach(to));
    let (mut server, _) = listener.accept().expect("a client");
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
    }
    let mut message = [0; 4];
    client.write_all(b"ping").expect("send");
    server.read_exact(&mut message).expect("the client's message");
    server.write_all(b"pong").expect("answer");
    client.read_exact(&mut message).expect("the task's answer");
    [client, server]
}

/// What an end of a connection hears next.
fn hears(mut stream: &TcpStream) -> Result<usize, ErrorKind> {
    stream.read(&mut [0; 1]).map_err(|error| error.kind())
}

/// Open connections of all tasks.
fn open_connections(node: &Netns) -> u64 {
    let shown = json(node, &["service", "ps", "web"]);
    let tasks = shown["tasks"].as_array().expect("tasks");
    tasks.iter().map(|task| task["open_connections"].as_u64().expect("a number")).sum()
}

/// A connection through each of the first node's addresses; its ends.
fn talk_by_each_family(cluster: &Cluster, listener: &TcpListener) -> [[TcpStream; 2]; 2] {
    cluster.addresses(0).map(|to| talk(cluster, listener, to))
}

/// Both ends of connections hear that those are gone, of either family.
fn are_reset(connections: &[[TcpStream; 2]; 2], what: &str) {
    for (family, ends) in ["IPv4", "IPv6"].iter().zip(connections) {
        let heard = ends.each_ref().map(hears);
        assert_eq!(heard, [Err(ErrorKind::ConnectionReset); 2], "client and task, {family}, {what}");
    }
}

/// Connections go, and neither end hears of it.
fn are_forgotten_in_silence(cluster: &Cluster) {
    let connections = talk_by_each_family(cluster, &listen(cluster));
    let node = &cluster.nodes[0].netns;
    assert_eq!(open_connections(node), 2);
    eventually("they are forgotten", || open_connections(node) == 0);
    for end in connections.iter().flatten() {
        end.set_read_timeout(Some(Duration::from_millis(500))).expect("set a time limit");
        assert_eq!(hears(end), Err(ErrorKind::WouldBlock), "{end:?}");
    }
}

#[test]
fn an_idle_connection_to_a_task_of_the_node_is_reset_at_both_ends_if_so_asked() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_task("web.1", 0);
    cluster.write(&with_short_silence(&cluster, "idle = \"reset\""));
    let node = &cluster.nodes[0].netns;
    let listener = listen(&cluster);
    for mode in ["native", "tc"] {
        let agent = attach(&cluster, &["--mode", mode]);
        let connections = talk_by_each_family(&cluster, &listener);
        assert_eq!(open_connections(node), 2, "{mode}");
        are_reset(&connections, mode);
        assert_eq!(open_connections(node), 0, "{mode}");
        assert_eq!(outcome(node, "no_connection"), 0, "nobody had anything to say to a reset");
        drop(agent);
    }
}

#[test]
fn an_idle_connection_to_another_node_is_reset_at_both_ends_if_so_asked() {
    for reach in [
        Reach { peers: true, ..Reach::default() },
        Reach { peers: true, direct: true, ..Reach::default() },
        Reach { peers: true, outer_v6: true, ..Reach::default() },
        // From an address of the node.
        Reach::default(),
    ] {
        let mut cluster = Cluster::new(2);
        cluster.reach = reach;
        cluster.receive_xdp();
        cluster.add_task("web.1", 1);
        let path = cluster.write(&with_short_silence(&cluster, "idle = \"reset\""));
        let nodes = if reach.peers { &cluster.nodes[..] } else { &cluster.nodes[..1] };
        let agents: Vec<Agent<'_>> =
            nodes.iter().map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
        for node in nodes {
            eventually("the task is offered", || active_tasks(&node.netns, "web") == 1);
        }
        are_reset(&talk_by_each_family(&cluster, &listen(&cluster)), &format!("{reach:?}"));
        for node in nodes {
            eventually("none is left", || open_connections(&node.netns) == 0);
            assert_eq!(
                outcome(&node.netns, "no_connection"),
                0,
                "nobody had anything to say to a reset: {reach:?}"
            );
        }
        drop(agents);
    }
}

#[test]
fn an_idle_connection_is_forgotten_in_silence_otherwise() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_task("web.1", 0);
    cluster.write(&with_short_silence(&cluster, ""));
    let agent = attach(&cluster, &[]);
    are_forgotten_in_silence(&cluster);
    assert!(!agent.log().contains("CAP_NET_RAW"), "nobody asked: {}", agent.log());
}

#[test]
fn without_raw_sockets_idle_connections_are_forgotten_and_one_warning_says_so() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_task("web.1", 0);
    let path = cluster.write(&with_short_silence(&cluster, "idle = \"reset\""));
    let node = &cluster.nodes[0].netns;
    let under = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-all", "--"];
    let arguments = ["--cluster", path.to_str().expect("a plain path")];
    let agent = Agent::start_under(node, cluster.folder(), &under, &arguments, &[]);
    eventually("the task is offered", || active_tasks(node, "web") == 1);
    are_forgotten_in_silence(&cluster);
    let log = agent.log();
    let said = "eth1: service web: connections that are idle, or whose client is denied, are forgotten, not reset: open a raw socket: Operation not permitted \
                (os error 1); the agent needs the capability CAP_NET_RAW";
    assert_eq!(log.matches(said).count(), 1, "{log}");
}
