//! Tasks on other nodes, reached through the tunnel: an agent on every node, the kernel's own stacks on every side.

use std::{
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
};

use lb_tests::{
    agent::{Agent, active_tasks, outcome},
    cluster::{CLIENT4, CLIENT6, Cluster, Reach, Task},
    netns::{Netns, Running, eventually},
    traffic::{Direction, Probe, echo, requests, segments, tally, transfer},
};
use nix::sys::signal::Signal;

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
    let path = cluster.folder().join("cluster.toml");
    let path = if path.exists() { path } else { cluster.write_all_running() };
    let attach =
        |node: &'a lb_tests::cluster::Node| Agent::attach(&node.netns, cluster.folder(), &path, arguments);
    let agents = cluster.nodes.iter().map(attach).collect();
    let tasks = cluster.tasks.len() as u64;
    for node in &cluster.nodes {
        eventually("all tasks are offered", || active_tasks(&node.netns, "web") == tasks);
    }
    agents
}

/// Every node answers on both families, two requests a task, and every task sees the client.
fn every_task_sees_the_client_through_every_node(cluster: &Cluster, what: &str) {
    for node in 0..cluster.nodes.len() {
        for address in cluster.addresses(node) {
            let answers = requests(&cluster.client, address, 2 * cluster.tasks.len());
            let seen: IpAddr = if address.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() };
            assert!(
                answers.iter().all(|answer| answer.ends_with(&format!("saw {seen}"))),
                "{what}: {address}: {answers:?}"
            );
            assert!(tally(&answers).values().all(|count| *count == 2), "{what}: {address}: {answers:?}");
            assert_eq!(tally(&answers).len(), cluster.tasks.len(), "{what}: {address}: {answers:?}");
        }
        let netns = &cluster.nodes[node].netns;
        assert!(outcome(netns, "forwarded_peer") > 0 && outcome(netns, "forwarded_local") > 0, "{what}");
        for lost in
            ["handover_lost", "tunnel_not_peer", "tunnel_no_task", "tunnel_malformed", "backend_unreachable"]
        {
            assert_eq!(outcome(netns, lost), 0, "{what}: {lost}");
        }
    }
}

#[test]
fn every_task_sees_the_client_in_every_mode() {
    for reach in [
        Reach { peers: true, ..Reach::default() },
        Reach { peers: true, direct: true, ..Reach::default() },
        Reach { peers: true, outer_v6: true, ..Reach::default() },
        Reach { peers: true, outer_v6: true, direct: true },
    ] {
        let cluster = five_tasks(reach);
        for mode in ["native", "tc", "generic"] {
            let agents = attach(&cluster, &["--mode", mode]);
            every_task_sees_the_client_through_every_node(&cluster, &format!("{reach:?} {mode}"));
            drop(agents);
        }
    }
}

const PEERS: Reach = Reach { peers: true, direct: false, outer_v6: false };
const DIRECT: Reach = Reach { peers: true, direct: true, outer_v6: false };
const OVER_V6: Reach = Reach { peers: true, direct: false, outer_v6: true };

/// Two nodes, and one task without a server on the second.
fn one_far_task(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.reach = reach;
    cluster.receive_xdp();
    cluster.add_task("web.1", 1);
    cluster
}

/// Captures what a filter matches on the wire of a namespace until it is dropped.
struct Capture {
    running: Running,
    file: std::path::PathBuf,
}

impl Capture {
    fn start(netns: &Netns, folder: &std::path::Path, filter: &str) -> Self {
        let file = folder.join("capture");
        let errors = folder.join("capture.log");
        let log = std::fs::File::create(&errors).expect("create the log");
        let mut command: Command = netns.command("tcpdump");
        command
            .args(["-i", "any", "-n", "-U", "--immediate-mode", "-Z", "root", "-w"])
            .arg(&file)
            .arg(filter)
            .stdout(Stdio::null())
            .stderr(log);
        let running = Running::start(&mut command);
        eventually("the capture runs", || {
            std::fs::read_to_string(&errors).is_ok_and(|text| text.contains("listening on"))
        });
        Self { running, file }
    }

    /// Ends it; the packets, a line each.
    fn packets(mut self) -> Vec<String> {
        self.running.stop(Signal::SIGINT);
        let mut read = Command::new("tcpdump");
        let shown = read.args(["-n", "-Z", "root", "-r"]).arg(&self.file).output().expect("start tcpdump");
        assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
        String::from_utf8_lossy(&shown.stdout).lines().map(str::to_owned).collect()
    }
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
            assert!(again * 100 < sent, "{direction:?} to {address}: {again} of {sent} segments sent again");
        }
    }
    assert_eq!(capture.packets(), Vec::<String>::new());
    for node in &cluster.nodes {
        assert_eq!(outcome(&node.netns, "too_big"), 0, "segments fit from the start");
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
        self.cluster.tasks[0].netns.enter(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
            socket.send_to(&[], "127.0.0.1:5353").expect("send");
        });
        if let Some(server) = self.server.take() {
            server.join().expect("the server");
        }
    }
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
