//! One address before several nodes, as of a proxy, a NAT or a CDN: one client port reaches one task in several ways. The
//! ports are few, so that each is used through all nodes, and what nginx closes first stays in TIME_WAIT at the task.
//! Runs alone: it counts SYNs, which a busy machine has sent again.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use lb_tests::{
    agent::{Agent, active_tasks, outcome, text},
    cluster::{CLIENT4, CLIENT6, Cluster, Reach},
    netns::{eventually, run},
    traffic::{losses, syns_repeated},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Connections that stay open through each node.
const KEPT: usize = 3_000;
/// Connections for one request through all nodes together.
const SHORT: usize = 11_000;

const TUNNEL: Reach = Reach::PEERS;
const DIRECT: Reach = Reach { direct: true, ..Reach::PEERS };

/// Three nodes with so many tasks, spread over them.
fn cluster(reach: Reach, tasks: usize) -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.reach = reach;
    cluster.receive_xdp();
    cluster.keep_connections_on_one_cpu();
    for slot in 1..=tasks {
        cluster.add_nginx(&format!("web.{slot}"), slot % 3);
    }
    // Every port is wanted through every node.
    let few = ["net.ipv4.ip_local_port_range=20000 25999", "net.ipv4.tcp_tw_reuse=1"];
    run(cluster.client.command("sysctl").arg("-qw").args(few));
    cluster
}

fn attach(cluster: &Cluster) -> Vec<Agent<'_>> {
    let path = cluster.write_all_running();
    let attach = |node| Agent::attach(node, cluster.folder(), &path, &[]);
    let agents = cluster.nodes.iter().map(|node| attach(&node.netns)).collect();
    for node in &cluster.nodes {
        eventually("all tasks are offered", || {
            active_tasks(&node.netns, "web") == cluster.tasks.len() as u64
        });
    }
    agents
}

/// Who asks for a connection's end: that side keeps it in TIME_WAIT.
#[derive(Clone, Copy)]
enum Closes {
    Task,
    Client,
}

fn connect(to: SocketAddr) -> Result<TcpStream, String> {
    let stream = TcpStream::connect(to).map_err(|error| format!("connect: {error}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set a time limit");
    Ok(stream)
}

/// A request on an open connection; what nginx says.
fn ask(stream: &mut TcpStream, closes: Closes) -> Result<String, String> {
    let connection = match closes {
        Closes::Task => "close",
        Closes::Client => "keep-alive",
    };
    let request = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|error| format!("ask: {error}"))?;
    let mut answer = Vec::new();
    let mut buffer = [0; 1024];
    // The body is one line.
    while !answer.ends_with(b"\n") || answer.ends_with(b"\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) => return Err("it ended early".into()),
            Ok(length) => answer.extend(&buffer[..length]),
            Err(error) => return Err(format!("read: {error}")),
        }
    }
    let text = String::from_utf8_lossy(&answer).into_owned();
    let line = text.lines().next_back().unwrap_or_default().to_owned();
    if let Closes::Task = closes {
        match stream.read(&mut buffer) {
            Ok(0) => {}
            other => return Err(format!("no end: {other:?}")),
        }
    }
    Ok(line)
}

/// Threads through each node share a number of requests, a connection each.
fn short(to: &[SocketAddr], count: usize) -> (BTreeMap<String, usize>, Vec<String>) {
    let next = AtomicUsize::new(0);
    let work = |to: SocketAddr| {
        let (mut seen, mut failed) = (BTreeMap::<String, usize>::new(), Vec::new());
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return (seen, failed);
            }
            let closes = if number.is_multiple_of(2) { Closes::Task } else { Closes::Client };
            match connect(to).and_then(|mut stream| ask(&mut stream, closes)) {
                Ok(line) => *seen.entry(line).or_default() += 1,
                Err(error) => failed.push(format!("{to}: {error}")),
            }
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = to.iter().map(|to| scope.spawn(move || work(*to))).collect();
        let mut all = (BTreeMap::<String, usize>::new(), Vec::new());
        for thread in threads {
            let (seen, failed) = thread.join().expect("a client");
            seen.into_iter().for_each(|(line, count)| *all.0.entry(line).or_default() += count);
            all.1.extend(failed);
        }
        all
    })
}

/// Opens connections through each node, and asks once on each.
fn keep(to: &[SocketAddr]) -> Vec<(TcpStream, String)> {
    let open = |to: SocketAddr| {
        let one = move |_| {
            let mut stream = connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
            let line = ask(&mut stream, Closes::Client).unwrap_or_else(|error| panic!("{to}: {error}"));
            (stream, line)
        };
        (0..KEPT).map(one).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = to.iter().map(|to| scope.spawn(move || open(*to))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a client")).collect()
    })
}

fn one_address(reach: Reach, tasks: usize, v6: bool) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raise the limit");
    let cluster = cluster(reach, tasks);
    let _agents = attach(&cluster);
    let to: Vec<_> =
        (0..3).map(|node| SocketAddr::new(cluster.addresses(node)[usize::from(v6)], 80)).collect();
    let client: IpAddr = if v6 { CLIENT6.into() } else { CLIENT4.into() };
    let (mut kept, short) = cluster.client.enter(|| {
        thread::scope(|scope| {
            let kept = scope.spawn(|| keep(&to));
            let short = short(&to, SHORT);
            (kept.join().expect("the kept ones"), short)
        })
    });
    let (seen, failed) = short;
    let explain = || {
        for node in &cluster.nodes {
            println!("{}: {}", node.name, text(&node.netns, &["stats"]));
            println!("{} lost: {}", node.name, losses(&node.netns));
        }
        for task in &cluster.tasks {
            println!("{} lost: {}", task.name, losses(&task.netns));
        }
        println!("the client lost: {}", losses(&cluster.client));
        println!("between them: {}", losses(cluster.lan()));
    };
    if !failed.is_empty() {
        explain();
        panic!("{} failed, as {:?}", failed.len(), &failed[..failed.len().min(5)]);
    }
    // Each open one is still with its task, whatever else its port did meanwhile.
    for (stream, before) in &mut kept {
        let now = ask(stream, Closes::Client).unwrap_or_else(|error| {
            explain();
            panic!("{:?} to {:?}: {error}", stream.local_addr(), stream.peer_addr())
        });
        assert_eq!(now, *before);
    }
    let lines = seen.keys().chain(kept.iter().map(|(_, line)| line));
    for line in lines {
        assert!(line.ends_with(&format!(" saw {client}")), "{line}");
    }
    let ports = kept.iter().map(|(stream, _)| stream.local_addr().expect("an address").port());
    let mut used = BTreeMap::<u16, usize>::new();
    ports.for_each(|port| *used.entry(port).or_default() += 1);
    let shared = used.values().filter(|count| **count > 1).count();
    assert!(shared > KEPT / 2, "{shared} ports are open through more than one node");
    let repeated = syns_repeated(&cluster.client);
    if repeated > 0 {
        explain();
    }
    assert_eq!(repeated, 0, "a SYN that is sent again costs its client a second");
    for node in &cluster.nodes {
        for lost in ["source_collision", "snat_ports_exhausted", "table_full", "late_reply", "stale_alias"] {
            assert_eq!(outcome(&node.netns, lost), 0, "{}: {lost}", node.name);
        }
    }
}

#[test]
fn one_task_serves_one_address_through_three_nodes() {
    one_address(TUNNEL, 1, false);
}

#[test]
fn two_tasks_serve_one_address_through_three_nodes_over_ipv6() {
    one_address(TUNNEL, 2, true);
}

#[test]
fn ten_tasks_serve_one_address_through_three_nodes() {
    one_address(TUNNEL, 10, false);
}

#[test]
fn one_task_answers_one_address_directly_through_three_nodes() {
    one_address(DIRECT, 1, false);
}
