//! Tables that are too small for what comes: a named reason, one warning with the setting to raise, and everything that fits
//! is served all the same.

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use lb_common::abi::table;
use lb_tests::{
    agent::{Agent, active_tasks, outcome, text},
    cluster::{Cluster, Task},
    netns::{Netns, within},
    traffic::{echo, exchange, requests, stop_echo},
};
use lb_userspace::datapath::PinDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// When the controller was last there.
fn heartbeat(node: &Netns) -> u32 {
    let pin = node.enter(|| PinDir::of("eth1").expect("the pins").table(table::HEARTBEAT));
    let map = Map::from_map_data(MapData::from_pin(pin).expect("the heartbeat")).expect("a table");
    let beats: Array<_, u32> = map.try_into().expect("an array");
    beats.get(&0, 0).expect("an entry")
}

/// Waits until the agent has said something, and has looked three times more without saying it again.
fn said_once(node: &Netns, agent: &mut Agent<'_>, part: &str, mut provoke: impl FnMut()) {
    provoke();
    within(PATIENCE, part, || agent.log().contains(part));
    for _ in 0..3 {
        provoke();
        let last = heartbeat(node);
        within(PATIENCE, "another look", || heartbeat(node) != last);
    }
    assert_eq!(agent.log().matches(part).count(), 1, "{part}: {}", agent.log());
    assert!(agent.is_running());
}

#[test]
fn what_a_plan_has_no_room_for_is_said_and_the_rest_is_served() {
    let mut cluster = Cluster::new(2);
    cluster.receive_xdp();
    for slot in 1..=3 {
        cluster.add_nginx(&format!("web.{slot}"), 0);
    }
    let task = |task: &Task, name: &str| {
        format!(
            "[[service.task]]\nname = \"{name}\"\nnode = \"node1\"\naddresses = [\"{}\", \"{}\"]\nstate = \"running\"\n\n",
            task.v4, task.v6
        )
    };
    let web = cluster.file("\"80:8080\"", &[(&cluster.tasks[0], "running")]);
    // Comes after the other, and has no room.
    let more = task(&cluster.tasks[1], "more.1") + &task(&cluster.tasks[2], "more.2");
    let more = format!("[[service]]\nname = \"xmore\"\nports = [\"81:8080\", \"82:8080\"]\n\n{more}");
    let node = &cluster.nodes[0].netns;
    for (setting, room, said) in [
        ("--max-services", "1", "service xmore is left out: the table of services is full"),
        ("--max-listeners", "2", "service xmore is left out: the table of listeners is full"),
        ("--max-backends", "4", "service xmore is left out: the table of backends is full"),
        ("--max-slots", "5", "service xmore is left out: the table of slots is full"),
        ("--max-nodes", "1", "node node2 is left out: there is room for 1 nodes"),
    ] {
        let path = cluster.write(&format!("{web}{more}"));
        let mut agent = Agent::attach(node, cluster.folder(), &path, &[setting, room]);
        let mut spaces = String::new();
        said_once(node, &mut agent, said, || {
            // Another file, another plan.
            spaces.push('\n');
            cluster.write(&format!("{web}{more}{spaces}"));
        });
        let line = agent.log().lines().find(|line| line.contains(said)).map(str::to_owned);
        assert!(line.as_ref().is_some_and(|line| line.contains(&format!("a higher {setting}"))), "{line:?}");
        assert_eq!(active_tasks(node, "web"), 1, "{setting}");
        assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 3).len(), 3, "{setting}");
        if setting == "--max-nodes" {
            assert_eq!(active_tasks(node, "xmore"), 2);
        } else {
            assert!(!text(node, &["service", "ls"]).contains("xmore"), "left out whole");
            // It is served once there is room.
            cluster.write(&web.replace("\"web\"", "\"gone\"").replace("80:8080", "79:8080"));
        }
    }
}

/// A task that echoes UDP, on this node or another, and its agent.
fn with_echo(arguments: &[&str], test: impl FnOnce(&Cluster, &mut Agent<'_>, SocketAddr)) {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    let task = cluster.add_task("web.1", 0);
    let server = cluster.tasks[task].netns.spawn(|| echo(5353, "web.1"));
    let path = cluster.write(&cluster.file("\"53:5353/udp\"", &[(&cluster.tasks[task], "running")]));
    let node = &cluster.nodes[0].netns;
    let mut agent = Agent::attach(node, cluster.folder(), &path, arguments);
    within(PATIENCE, "the task is offered", || active_tasks(node, "web") == 1);
    test(&cluster, &mut agent, SocketAddr::new(cluster.addresses(0)[0], 53));
    // What is new is served.
    let asked =
        cluster.client.enter(|| exchange(SocketAddr::new(cluster.addresses(0)[0], 53), "still there?"));
    assert!(asked.starts_with("web.1 still there?"), "{asked}");
    drop(agent);
    stop_echo(&cluster.tasks[task].netns, 5353);
    server.join().expect("the server");
}

/// Exchanges of so many datagrams each, from so many new ports.
fn exchanges(client: &Netns, to: SocketAddr, ports: usize, datagrams: usize) {
    client.enter(|| {
        for _ in 0..ports {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
            socket.connect(to).expect("connect");
            for _ in 0..datagrams {
                socket.send(b"hello").expect("send");
                socket.recv(&mut [0; 64]).expect("an answer");
            }
        }
    });
}

#[test]
fn a_full_connection_table_is_said_once() {
    with_echo(&["--max-connections", "1024", "--flood-rate", "0"], |cluster, agent, to| {
        let node = &cluster.nodes[0].netns;
        said_once(node, agent, "--max-connections", || exchanges(&cluster.client, to, 1_500, 2));
    });
}

#[test]
fn a_full_table_of_fragments_is_said_once() {
    with_echo(&["--max-fragments", "128"], |cluster, agent, to| {
        let node = &cluster.nodes[0].netns;
        let long = "x".repeat(3_000);
        said_once(node, agent, "--max-fragments", || {
            cluster.client.enter(|| (0..150).for_each(|_| drop(exchange(to, &long))));
        });
    });
}

#[test]
fn snat_ports_that_are_used_up_have_a_reason_and_are_said_once() {
    // Without agents a task of another node is reached by snat.
    let mut cluster = Cluster::new(2);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 1);
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let mut agent = Agent::attach(node, cluster.folder(), &path, &["--snat-ports", "20000-20003"]);
    within(PATIENCE, "the task is offered", || active_tasks(node, "web") == 1);
    let to = SocketAddr::new(cluster.addresses(0)[0], 80);
    let mut kept = Vec::new();
    said_once(node, &mut agent, "a wider --snat-ports", || {
        let new =
            cluster.client.enter(|| (0..8).filter_map(|_| TcpStream::connect(to).ok()).collect::<Vec<_>>());
        kept.extend(new);
    });
    assert!((1..=4).contains(&kept.len()), "{} connections by four ports", kept.len());
    assert!(outcome(node, "snat_ports_exhausted") > 0);
}
