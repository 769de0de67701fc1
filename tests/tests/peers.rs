//! Tasks on other nodes, reached through the tunnel: an agent on every node, the kernel's own stacks on every side.
//! Runs alone: what it waits for are answers within fractions of a second.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use lb_tests::{
    agent::{Agent, active_tasks, json, offered, outcome, text},
    capture::Capture,
    cluster::{CLIENT4, CLIENT6, Cluster, Reach, Task},
    netns::{Netns, eventually},
    traffic::{
        Direction, Load, Probe, ask, echo, in_turns, refusal, requests, segments, stop_echo, tally, transfer,
    },
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

/// Three nodes with five tasks of nginx, spread over them.
fn five_tasks(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.reach = reach;
    cluster.receive_xdp();
    for slot in 1..=5 {
        cluster.add_nginx(&format!("web.{slot}"), (slot - 1) % 3);
    }
    cluster
}

/// An agent on every node, all of which offer all tasks.
fn attach<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Vec<Agent<'a>> {
    attach_all(cluster, arguments, cluster.tasks.len() as u64)
}

/// An agent on every node, all of which offer so many tasks.
fn attach_all<'a>(cluster: &'a Cluster, arguments: &[&str], tasks: u64) -> Vec<Agent<'a>> {
    let path = cluster.folder().join("cluster.toml");
    let path = if path.exists() { path } else { cluster.write_all_running() };
    let attach =
        |node: &'a lb_tests::cluster::Node| Agent::attach(&node.netns, cluster.folder(), &path, arguments);
    let agents = cluster.nodes.iter().map(attach).collect();
    for node in &cluster.nodes {
        eventually("all tasks are offered", || active_tasks(&node.netns, "web") == tasks);
    }
    agents
}

/// Every node answers on both families, two requests a task, and every task sees the client.
fn every_task_sees_the_client_through_every_node(cluster: &Cluster, what: &str) {
    for node in 0..cluster.nodes.len() {
        for address in cluster.addresses(node) {
            let answers = in_turns(cluster.tasks.len(), || requests(&cluster.client, address, 10));
            let seen: IpAddr = if address.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() };
            assert!(
                answers.iter().all(|answer| answer.ends_with(&format!("saw {seen}"))),
                "{what}: {address}: {answers:?}"
            );
        }
        let netns = &cluster.nodes[node].netns;
        assert!(outcome(netns, "forwarded_peer") > 0 && outcome(netns, "forwarded_local") > 0, "{what}");
        for lost in
            ["delivery_lost", "tunnel_not_peer", "tunnel_no_task", "tunnel_malformed", "backend_unreachable"]
        {
            assert_eq!(outcome(netns, lost), 0, "{what}: {lost}");
        }
    }
}

/// In some modes, an agent on each node. The ways of sending and the families are each tried in a mode of their own, and one
/// in all: an attach costs each node seconds of the verifier's time.
fn every_task_sees_the_client(reach: Reach, modes: &[&str]) {
    let cluster = five_tasks(reach);
    for mode in modes {
        let agents = attach(&cluster, &["--mode", mode]);
        every_task_sees_the_client_through_every_node(&cluster, &format!("{reach:?} {mode}"));
        drop(agents);
    }
}

#[test]
fn every_task_sees_the_client_and_answers_through_the_tunnel() {
    every_task_sees_the_client(PEERS, &["native", "tc", "generic"]);
}

#[test]
fn every_task_sees_the_client_and_answers_directly() {
    every_task_sees_the_client(DIRECT, &["tc"]);
}

#[test]
fn every_task_sees_the_client_and_answers_through_a_tunnel_over_ipv6() {
    every_task_sees_the_client(OVER_V6, &["generic"]);
}

#[test]
fn every_task_sees_the_client_and_answers_directly_over_ipv6() {
    every_task_sees_the_client(Reach { direct: true, ..OVER_V6 }, &["native"]);
}

#[test]
fn a_node_is_a_client_like_any_other_whatever_way_the_nodes_serve() {
    let cluster = five_tasks(PEERS);
    let path = cluster.write_all_running();
    let [asking, others @ ..] = cluster.nodes.as_slice() else { panic!("three nodes") };
    // Between veths the metadata that one node's XDP leaves on a frame reaches the next node with it.
    for (own, theirs) in [
        ("native", "native"),
        ("tc", "native"),
        ("generic", "native"),
        ("native", "tc"),
        ("native", "generic"),
    ] {
        let modes = [own, theirs, theirs];
        let agents: Vec<_> = cluster
            .nodes
            .iter()
            .zip(modes)
            .map(|(node, mode)| Agent::attach(&node.netns, cluster.folder(), &path, &["--mode", mode]))
            .collect();
        for node in &cluster.nodes {
            eventually("all tasks are offered", || active_tasks(&node.netns, "web") == 5);
        }
        for (number, node) in others.iter().enumerate() {
            for (address, seen) in
                cluster.addresses(number + 1).into_iter().zip([asking.v4().into(), IpAddr::from(asking.v6())])
            {
                let answers = in_turns(5, || requests(&asking.netns, address, 10));
                let what = format!("{own} asks {} in {theirs}: {answers:?}", node.name);
                assert!(answers.iter().all(|answer| answer.ends_with(&format!(" saw {seen}"))), "{what}");
            }
        }
        for node in &cluster.nodes {
            for lost in ["delivery_lost", "tunnel_not_peer", "tunnel_no_task"] {
                assert_eq!(outcome(&node.netns, lost), 0, "{own} asks {theirs}: {lost} at {}", node.name);
            }
        }
        drop(agents);
    }
}

const PEERS: Reach = Reach::PEERS;
const DIRECT: Reach = Reach { direct: true, ..Reach::PEERS };
const OVER_V6: Reach = Reach { outer_v6: true, ..Reach::PEERS };

/// Two nodes, and one task without a server on the second.
fn one_far_task(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.reach = reach;
    cluster.receive_xdp();
    cluster.add_task("web.1", 1);
    cluster
}

/// The outcomes by which this node's datapath has lost packets of a connection, or made a peer send them again.
fn lost_by_the_datapath(netns: &Netns) -> Vec<String> {
    const FORWARDED_OR_OTHERS: [&str; 8] = [
        "forwarded_local",
        "forwarded_peer",
        "forwarded_reply",
        "not_ip",
        "not_ours",
        "not_unicast",
        "other_protocol",
        "tunnel_probe",
    ];
    let stats = json(netns, &["stats"]);
    let outcomes = stats["outcomes"].as_object().expect("the outcomes by name");
    let lost = outcomes.iter().filter(|(name, packets)| {
        packets.as_u64() != Some(0) && !FORWARDED_OR_OTHERS.contains(&name.as_str())
    });
    lost.map(|(name, packets)| format!("{packets} {name}")).collect()
}

/// Fragments of either family, also inside the tunnel's outer header.
const FRAGMENTS: &str = "(ip and ip[6:2] & 0x3fff != 0) or (ip6 and ip6[6] == 44)";

#[test]
fn a_gigabyte_goes_through_a_remote_node_each_way_without_a_fragment() {
    let cluster = one_far_task(PEERS);
    let _agents = attach(&cluster, &[]);
    let task = &cluster.tasks[0].netns;
    let capture = Capture::start(cluster.lan(), cluster.folder(), FRAGMENTS);
    let [v4, v6] = cluster.addresses(0);
    for (address, megabytes) in [(v4, 1_000), (v6, 200)] {
        for direction in [Direction::Up, Direction::Down] {
            let before = (segments(&cluster.client), segments(task));
            let started = std::time::Instant::now();
            transfer(&cluster.client, task, SocketAddr::new(address, 80), direction, megabytes);
            let after = (segments(&cluster.client), segments(task));
            let sent = after.0.0 + after.1.0 - before.0.0 - before.1.0;
            let again = after.0.1 + after.1.1 - before.0.1 - before.1.1;
            println!(
                "{address} {direction:?} {megabytes} MB: {:?}, {again} of {sent} again",
                started.elapsed()
            );
        }
    }
    assert_eq!(capture.packets(), Vec::<String>::new());
    // How many segments the queues between the namespaces lose is a matter of the machine's load; the datapath itself loses none.
    for node in &cluster.nodes {
        let not_forwarded = lost_by_the_datapath(&node.netns);
        assert_eq!(not_forwarded, Vec::<String>::new(), "every segment fits and is forwarded");
    }
}

#[test]
fn transfers_are_whole_in_every_mode_and_both_return_ways() {
    for (reach, modes) in
        [(PEERS, vec!["tc", "generic"]), (DIRECT, vec!["native", "tc"]), (OVER_V6, vec!["native"])]
    {
        let cluster = one_far_task(reach);
        for mode in modes {
            let _agents = attach(&cluster, &["--mode", mode]);
            for address in cluster.addresses(0) {
                for direction in [Direction::Up, Direction::Down] {
                    println!("{reach:?} {mode} {address} {direction:?}");
                    let to = SocketAddr::new(address, 80);
                    transfer(&cluster.client, &cluster.tasks[0].netns, to, direction, 50);
                }
            }
        }
    }
}

/// Two nodes, and on the second a task that echoes UDP on port 5353, published as 53, beside the TCP port.
struct Echo {
    cluster: Cluster,
    server: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn new(reach: Reach) -> Self {
        let cluster = one_far_task(reach);
        let server = cluster.tasks[0].netns.spawn(|| echo(5353, "echo"));
        let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
        cluster.write(&cluster.file("\"53:5353/udp\", \"80:8080\"", &tasks));
        Self { cluster, server: Some(server) }
    }

    fn to(&self, address: IpAddr) -> SocketAddr {
        SocketAddr::new(address, 53)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        stop_echo(&self.cluster.tasks[0].netns, 5353);
        if let Some(server) = self.server.take() {
            server.join().expect("the server");
        }
    }
}

/// The same for a task's kernel.
fn forget_task_paths(task: &Task) {
    for (address, length) in [(IpAddr::from(task.v4), 24), (task.v6.into(), 64)] {
        let netns = &task.netns;
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        netns.ip(&format!("addr del {address}/{length} dev eth0"));
        netns.ip(&format!("addr add {address}/{length} dev eth0{nodad}"));
    }
    task.add_routes();
}

/// Has the client's kernel forget what it found out about paths: that goes with the addresses.
fn forget_paths(client: &Netns) {
    for (address, length) in [(IpAddr::from(CLIENT4), 24), (CLIENT6.into(), 64)] {
        client.ip(&format!("addr del {address}/{length} dev eth1"));
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        client.ip(&format!("addr add {address}/{length} dev eth1{nodad}"));
    }
}

#[test]
fn a_client_finds_the_mtu_of_the_path_through_the_tunnel() {
    for (reach, overhead) in [(PEERS, 60), (OVER_V6, 80), (DIRECT, 60)] {
        let echo = Echo::new(reach);
        for mode in ["native", "tc", "generic"] {
            let agents = attach(&echo.cluster, &["--mode", mode]);
            for mtu in [1500, 9000] {
                echo.cluster.set_mtu(mtu as u32);
                for address in echo.cluster.addresses(0) {
                    let what = format!("{reach:?} {mode} {mtu} {address}");
                    eventually(&what, || {
                        // What an agent said before it knew of the change.
                        forget_paths(&echo.cluster.client);
                        let probe = || Probe::new(echo.to(address)).find_mtu();
                        echo.cluster.client.enter(probe) == mtu - overhead
                    });
                }
            }
            assert!(outcome(&echo.cluster.nodes[0].netns, "too_big") > 0);
            echo.cluster.set_mtu(1500);
            drop(agents);
        }
    }
}

#[test]
fn where_the_nodes_have_room_for_the_tunnel_no_datagram_is_lost() {
    let echo = Echo::new(PEERS);
    echo.cluster.set_mtu(1600);
    echo.cluster.client.ip("link set eth1 mtu 1500");
    echo.cluster.tasks[0].netns.ip("link set eth0 mtu 1500");
    let _agents = attach(&echo.cluster, &[]);
    for address in echo.cluster.addresses(0) {
        for length in [100, 1_400, 1_472, 8_000] {
            let answer = echo.cluster.client.enter(|| ask(echo.to(address), &"x".repeat(length)));
            assert!(answer.is_some(), "{length} bytes to {address}");
        }
    }
    assert_eq!(outcome(&echo.cluster.nodes[0].netns, "too_big"), 0);
}

/// A task that closes its port sends the client an error; the client sees it come from the listener.
#[test]
fn a_closed_port_is_told_to_the_client_by_the_listener() {
    for (reach, modes) in [(PEERS, vec!["native", "tc", "generic"]), (DIRECT, vec!["native"])] {
        let mut cluster = Cluster::new(2);
        cluster.reach = reach;
        cluster.receive_xdp();
        cluster.add_task("web.1", 0);
        cluster.add_task("web.2", 1);
        for mode in modes {
            let serve = |task: usize| {
                let tasks = [(&cluster.tasks[task], "running")];
                cluster.write(&cluster.file("\"53:5353/udp\", \"80:8080\"", &tasks))
            };
            serve(0);
            let agents = attach_all(&cluster, &["--mode", mode], 1);
            for task in 0..2 {
                serve(task);
                let name = cluster.tasks[task].name.clone();
                for node in &cluster.nodes {
                    let alone = BTreeSet::from([name.clone()]);
                    eventually("the task alone is offered", || offered(&node.netns, "web") == alone);
                }
                let seen =
                    Capture::start(&cluster.client, cluster.folder(), "icmp or icmp6 and ip6[40] < 128");
                for address in cluster.addresses(0) {
                    let what = format!("{reach:?} {mode} {task} {address}");
                    // The kernel matches the error with the socket by what it quotes.
                    let refused = cluster.client.enter(|| refusal(SocketAddr::new(address, 53)));
                    assert_eq!(refused, Some(std::io::ErrorKind::ConnectionRefused), "{what}");
                }
                for line in seen.packets() {
                    assert!(
                        !line.contains("172.18.") && !line.contains("fd18:"),
                        "a task's address leaks: {line}"
                    );
                }
            }
            drop(agents);
        }
    }
}

#[test]
fn a_peer_that_dies_in_the_middle_of_a_transfer_and_returns_goes_on() {
    let cluster = one_far_task(PEERS);
    let _agents = attach(&cluster, &[]);
    let node = &cluster.nodes[1].netns;
    let port = Cluster::port(node);
    let (client, task) = (&cluster.client, &cluster.tasks[0].netns);
    let to = SocketAddr::new(cluster.addresses(0)[0], 80);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| transfer(client, task, to, Direction::Up, 400));
        eventually("the transfer runs", || outcome(node, "forwarded_local") > 1_000);
        let again = segments(client).1;
        cluster.lan().ip(&format!("link set {port} down"));
        eventually("the client sends again in vain", || segments(client).1 >= again + 3);
        assert!(!transfer.is_finished());
        cluster.lan().ip(&format!("link set {port} up"));
        transfer.join().expect("the transfer");
    });
}

#[test]
fn a_node_without_an_agent_is_reached_by_snat_or_its_tasks_are_left_out() {
    let cluster = five_tasks(PEERS);
    let first = &cluster.nodes[0].netns;
    let text_of = |routable: bool| {
        if !routable {
            for family in ["route del 172.18.2.0/24", "-6 route del fd18:2::/64"] {
                first.ip(family);
            }
        }
        let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
        let file = cluster.file("\"80:8080\"", &tasks);
        // The second node's.
        let (before, after) = file.split_once("name = \"node2\"").expect("the second node");
        format!("{before}name = \"node2\"{}", after.replacen("agent = true", "agent = false", 1))
    };
    let path = cluster.write(&text_of(true));
    let _agent = Agent::attach(first, cluster.folder(), &path, &[]);
    let _third = Agent::attach(&cluster.nodes[2].netns, cluster.folder(), &path, &[]);
    for netns in [first, &cluster.nodes[2].netns] {
        eventually("all tasks are offered", || active_tasks(netns, "web") == 5);
    }
    let address = cluster.addresses(0)[0];
    for answer in requests(&cluster.client, address, 5) {
        // web.2 and web.5 run on the second node.
        let seen =
            if answer.starts_with("web.2") || answer.starts_with("web.5") { address } else { CLIENT4.into() };
        assert!(answer.ends_with(&format!("saw {seen}")), "{answer}");
    }
    cluster.write(&text_of(false));
    eventually("three tasks are left", || active_tasks(first, "web") == 3);
    let shown = text(first, &["service", "ps", "web"]);
    assert!(
        shown.lines().any(|line| line.starts_with("web.2 ") && line.contains("node2 has no agent")),
        "{shown}"
    );
    assert_eq!(tally(&requests(&cluster.client, address, 6)).len(), 3);
}

/// As in a Swarm: the same range behind every node's bridge, tasks with addresses that only their own node can reach, and
/// others that are unique in the cluster by which nodes name them.
#[test]
fn tasks_behind_bridges_of_the_same_range_are_told_apart() {
    for reach in [PEERS, DIRECT] {
        let mut cluster = Cluster::new(2);
        cluster.reach = reach;
        cluster.receive_xdp();
        for slot in 1..=2 {
            cluster.add_nginx(&format!("web.{slot}"), slot - 1);
        }
        // Both tasks become 172.19.0.11 and fd19::11.
        for (task, node) in cluster.tasks.iter_mut().zip(&cluster.nodes) {
            (task.v4, task.v6) = ("172.19.0.11".parse().expect("v4"), "fd19::11".parse().expect("v6"));
            for (netns, link, own) in [(&node.netns, "gwbridge", 1), (&task.netns, "eth0", 11)] {
                netns.ip(&format!("addr add 172.19.0.{own}/24 dev {link}"));
                netns.ip(&format!("addr add fd19::{own}/64 dev {link} nodad"));
            }
            task.netns.ip("route replace default via 172.19.0.1");
            task.netns.ip("route replace default via fd19::1");
        }
        let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
        let file = cluster.file("\"80:8080\"", &tasks);
        let (first, second) = file.rsplit_once("state =").expect("two tasks");
        let first = first.replacen("state =", "overlay = \"10.0.0.7\"\nstate =", 1);
        cluster.write(&format!("{first}overlay = \"10.0.0.8\"\nstate ={second}"));
        let _agents = attach(&cluster, &[]);
        every_task_sees_the_client_through_every_node(&cluster, &format!("{reach:?}"));
    }
}

#[test]
fn a_task_learns_the_mtu_of_a_router_behind_the_client() {
    for reach in [PEERS, DIRECT] {
        let mut cluster = Cluster::new(2);
        cluster.reach = reach;
        cluster.receive_xdp();
        cluster.add_task("web.1", 0);
        cluster.add_task("web.2", 1);
        let distant = cluster.distant(1280);
        for mode in ["native", "tc", "generic"] {
            // One task on the client's node, one behind the tunnel.
            for task in 0..2 {
                cluster.write(&cluster.file("\"80:8080\"", &[(&cluster.tasks[task], "running")]));
                let agents = attach_all(&cluster, &["--mode", mode], 1);
                for address in cluster.addresses(0) {
                    println!("{reach:?} {mode} {task} {address}");
                    let to = SocketAddr::new(address, 80);
                    // Its segments are too long for the hop between the routers; only their error tells the task so.
                    transfer(&distant.client, &cluster.tasks[task].netns, to, Direction::Down, 5);
                    forget_task_paths(&cluster.tasks[task]);
                }
                drop(agents);
            }
        }
    }
}

#[test]
fn a_short_hop_between_the_nodes_is_found_and_the_connection_goes_on() {
    for reach in [PEERS, OVER_V6] {
        let cluster = one_far_task(reach);
        // From the first node to the second by a router whose second link lets 1,400 bytes pass.
        let (v4, v6) = ("192.0.2.30".parse().expect("v4"), "2001:db8:1::30".parse().expect("v6"));
        let router = cluster.plug("router", v4, v6);
        let [to4, to6] = cluster.addresses(1);
        cluster.plug_second(&router, 1400);
        router.ip(&format!("route add {to4} dev eth2"));
        router.ip(&format!("route add {to6} dev eth2"));
        cluster.nodes[0].netns.ip(&format!("route add {to4} via {v4}"));
        cluster.nodes[0].netns.ip(&format!("route add {to6} via {v6}"));
        let _agents = attach(&cluster, &[]);
        for address in cluster.addresses(0) {
            let to = SocketAddr::new(address, 80);
            transfer(&cluster.client, &cluster.tasks[0].netns, to, Direction::Up, 20);
        }
        let node = &cluster.nodes[0].netns;
        let errors = outcome(node, "tunnel_error");
        assert!(errors > 0, "the router's errors arrived");
        // It becomes shorter under a connection.
        let (client, task) = (&cluster.client, &cluster.tasks[0].netns);
        let to = SocketAddr::new(cluster.addresses(0)[0], 80);
        std::thread::scope(|scope| {
            let before = outcome(&cluster.nodes[1].netns, "forwarded_local");
            let transfer = scope.spawn(|| transfer(client, task, to, Direction::Up, 200));
            eventually("the transfer runs", || {
                outcome(&cluster.nodes[1].netns, "forwarded_local") > before + 1_000
            });
            router.ip("link set eth2 mtu 1340");
            assert!(!transfer.is_finished());
            transfer.join().expect("the transfer");
        });
        assert!(outcome(node, "tunnel_error") > errors, "the router's errors arrived");
        assert!(outcome(node, "too_big") > 0, "what was too long is said in the client's words");
    }
}

/// A switch that lets less pass says nothing to anybody.
#[test]
fn a_way_between_nodes_that_swallows_long_packets_is_found() {
    for (reach, overhead) in [(PEERS, 60), (OVER_V6, 80)] {
        let echo = Echo::new(reach);
        let cluster = &echo.cluster;
        let port = Cluster::port(&cluster.nodes[1].netns);
        cluster.lan().ip(&format!("link set {port} mtu 1370"));
        let mut agents = attach(cluster, &[]);
        for address in cluster.addresses(0) {
            eventually("the client is told what fits", || {
                forget_paths(&cluster.client);
                cluster.client.enter(|| Probe::new(echo.to(address)).find_mtu()) == 1370 - overhead
            });
            for direction in [Direction::Up, Direction::Down] {
                let to = SocketAddr::new(address, 80);
                transfer(&cluster.client, &cluster.tasks[0].netns, to, direction, 5);
            }
            // The next controller knows what the last one has found.
            agents.remove(0).stop(Signal::SIGKILL);
            let path = cluster.folder().join("cluster.toml");
            agents.insert(0, Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &[]));
            forget_paths(&cluster.client);
            let told = cluster.client.enter(|| {
                let probe = Probe::new(echo.to(address));
                assert_eq!(probe.send(1_500), None);
                probe.mtu() as usize
            });
            assert_eq!(told, 1370 - overhead, "{reach:?} {address}, adopted");
        }
    }
}

/// Packets that were too long for the tunnel, at each node.
fn too_big(cluster: &Cluster) -> Vec<u64> {
    cluster.nodes.iter().map(|node| outcome(&node.netns, "too_big")).collect()
}

#[test]
fn datagrams_of_eight_kilobytes_go_through_any_node() {
    // Each way of answering in a mode of its own, and one in all: an attach costs each node seconds of the verifier's time.
    for (reach, modes) in
        [(PEERS, vec!["native", "tc", "generic"]), (DIRECT, vec!["native"]), (OVER_V6, vec!["tc"])]
    {
        let mut far = Echo::new(reach);
        let near = far.cluster.add_task("web.2", 0);
        let server = far.cluster.tasks[near].netns.spawn(|| echo(5353, "near"));
        let tasks: Vec<(&Task, &str)> = far.cluster.tasks.iter().map(|task| (task, "running")).collect();
        far.cluster.write(&far.cluster.file("\"53:5353/udp\", \"80:8080\"", &tasks));
        for mode in modes {
            let agents = attach(&far.cluster, &["--mode", mode]);
            for node in 0..2 {
                for address in far.cluster.addresses(node) {
                    let text = "x".repeat(8_000);
                    let ask = || (0..6).map(|_| ask(far.to(address), &text)).collect::<Vec<_>>();
                    let what = format!("{reach:?} {mode} {address}");
                    let mut answers = far.cluster.client.enter(ask);
                    // From then on both ends have been told of the tunnel's MTU: nothing is too long any more.
                    let told = too_big(&far.cluster);
                    answers.extend(far.cluster.client.enter(ask));
                    assert_eq!(too_big(&far.cluster), told, "{what}");
                    assert!(answers.iter().flatten().all(|answer| answer.contains(&text)), "{what}");
                    // Until they have been told; one more for a machine that is busy, whenever that is.
                    let lost = answers.iter().filter(|answer| answer.is_none()).count();
                    assert!(lost <= 3, "{what}: {lost} lost");
                }
            }
            for node in &far.cluster.nodes {
                assert_eq!(outcome(&node.netns, "fragment"), 0, "later fragments found their first ones");
            }
            drop(agents);
        }
        stop_echo(&far.cluster.tasks[near].netns, 5353);
        server.join().expect("the server");
    }
}

#[test]
fn ten_thousand_requests_survive_scaling_over_three_nodes() {
    let mut cluster = five_tasks(PEERS);
    for slot in 6..=7 {
        cluster.add_nginx(&format!("web.{slot}"), slot % 3);
    }
    let states = |extra: &str| {
        let tasks: Vec<(&Task, &str)> = cluster
            .tasks
            .iter()
            .enumerate()
            .filter(|(index, _)| *index < 2 || extra != "none")
            .map(|(index, task)| (task, if index < 2 { "running" } else { extra }))
            .collect();
        cluster.write(&cluster.file("\"80:8080\"", &tasks))
    };
    states("none");
    let _agents = attach_all(&cluster, &[], 2);
    let load = Load::start(&cluster.client, cluster.nodes[0].v4().into(), 4, 10_000);
    let everywhere = |tasks: u64| {
        for node in &cluster.nodes {
            eventually("all nodes know", || active_tasks(&node.netns, "web") == tasks);
        }
    };
    let mut rounds = 0;
    while load.done() < 9_000 {
        states("running");
        everywhere(7);
        states("draining");
        everywhere(2);
        // Drained first, then taken away.
        let connections = load.done() + 40;
        eventually("their connections end", || load.done() >= connections.min(10_000));
        states("none");
        for node in &cluster.nodes {
            let shown =
                || json(&node.netns, &["service", "ps", "web"])["tasks"].as_array().map_or(0, Vec::len);
            eventually("two tasks are left", || shown() == 2);
        }
        rounds += 1;
    }
    let failed = load.finish();
    if !failed.is_empty() {
        for node in &cluster.nodes {
            println!("{}", text(&node.netns, &["stats"]));
        }
    }
    assert_eq!(failed, Vec::<String>::new(), "after {rounds} rounds");
    assert!(rounds > 0);
}

/// One request from a port of the client's choice.
fn from_port(port: u16, to: SocketAddr) -> String {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    // What its last connection has left behind is no matter.
    socket.set_reuse_address(true).expect("share the port");
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into()).expect("bind");
    socket.connect(&to.into()).unwrap_or_else(|error| panic!("from port {port} to {to}: {error}"));
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn a_client_s_port_may_be_used_through_one_node_after_another() {
    let cluster = five_tasks(PEERS);
    let _agents = attach(&cluster, &[]);
    // Each port first through the one node, then through the other, to whichever task has its turn there.
    for port in 40_000..40_030 {
        for node in &cluster.nodes {
            let answer = cluster.client.enter(|| from_port(port, SocketAddr::new(node.v4().into(), 80)));
            assert!(answer.contains(" saw 192.0.2.10"), "port {port} through {}: {answer:?}", node.name);
        }
    }
    for node in &cluster.nodes {
        // What a task answers to the second connection is not taken for a late word on the first.
        assert_eq!(outcome(&node.netns, "late_reply"), 0, "{}", node.name);
    }
}
