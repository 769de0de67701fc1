//! Whose tasks come first: of three nodes with real servers, the first two have tasks, the third none.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use lb_common::{
    abi::{TC_ALONE, XDP_GENERIC, XDP_TRANSMITS},
    outcome::Outcome,
};
use lb_tests::{
    agent::{Agent, active_tasks, json, text},
    cluster::{Cluster, Reach, Task},
    lab::{DROP, Lab, REDIRECT, SHOT, TX, ip, service, task, with_lab},
    netns::{Netns, eventually, within},
    packet::{ACK, Packet, SYN, Transport},
    traffic::{Load, requests, tally},
};
use lb_userspace::cluster::{Prefer, TaskState, Via};

const PATIENCE: Duration = Duration::from_secs(60);
const PEERS: Reach = Reach::PEERS;

/// Two tasks on the first node, one on the second.
fn three_tasks() -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.reach = PEERS;
    cluster.receive_xdp();
    for (name, node) in [("web.1", 0), ("web.2", 0), ("web.3", 1)] {
        cluster.add_nginx(name, node);
    }
    cluster
}

/// Writes the cluster file: whose tasks come first, and what each does. The first and the third node share a zone.
fn prefer(cluster: &Cluster, whose: &str, states: [&str; 3]) {
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().zip(states).collect();
    let text =
        cluster.file("\"80:8080\"", &tasks).replace("ports =", &format!("prefer = \"{whose}\"\nports ="));
    let text = text.replace("name = \"node1\"\naddresses", "name = \"node1\"\nzone = \"a\"\naddresses");
    let text = text.replace("name = \"node2\"\naddresses", "name = \"node2\"\nzone = \"b\"\naddresses");
    let text = text.replace("name = \"node3\"\naddresses", "name = \"node3\"\nzone = \"a\"\naddresses");
    cluster.write(&text);
}

/// The tasks that a node gives new connections, and how much of them in percent.
fn shares(cluster: &Cluster, node: usize) -> BTreeMap<String, u64> {
    let document = json(&cluster.nodes[node].netns, &["service", "ps", "web"]);
    let tasks = document["tasks"].as_array().cloned().unwrap_or_default();
    let share = |task: &serde_json::Value| {
        (task["name"].as_str().unwrap_or_default().to_owned(), task["share"].as_u64())
    };
    tasks
        .iter()
        .map(share)
        .filter_map(|(name, share)| Some((name, share?)))
        .filter(|(_, share)| *share > 0)
        .collect()
}

/// Waits until each node gives these tasks new connections, all as many, and asks it: nobody else answers.
fn come_first(cluster: &Cluster, what: &str, wanted: [&[&str]; 3]) {
    for (node, tasks) in wanted.into_iter().enumerate() {
        let percent = 100_u64.checked_div(tasks.len() as u64).unwrap_or_default();
        let wanted: BTreeMap<String, u64> = tasks.iter().map(|name| ((*name).to_owned(), percent)).collect();
        within(PATIENCE, &format!("{what}: {wanted:?} at node {}", node + 1), || {
            shares(cluster, node) == wanted
        });
        for counts in turns(cluster, &cluster.client, node, tasks.len()) {
            assert!(counts.keys().all(|name| tasks.contains(&name.as_str())), "{what}: {counts:?}");
        }
    }
}

/// How often each task answers in two turns, by each address of a node.
fn turns(cluster: &Cluster, client: &Netns, node: usize, tasks: usize) -> [BTreeMap<String, usize>; 2] {
    cluster.addresses(node).map(|address| {
        let answers = requests(client, address, 2 * tasks);
        let name = |answer: &str| answer.split(' ').next().unwrap_or_default().to_owned();
        tally(&answers).into_iter().map(|(answer, count)| (name(answer), count)).collect()
    })
}

/// Status and text of what a node's agent says at a path.
fn get(cluster: &Cluster, node: usize, path: &str) -> (u16, String) {
    cluster.nodes[node].netns.enter(|| {
        let mut stream = TcpStream::connect("127.0.0.1:9464").expect("the agent listens");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, answer.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned())
    })
}

#[test]
fn the_tasks_of_a_node_come_first_and_others_follow_when_it_has_none() {
    const ALL: [&str; 3] = ["running"; 3];
    let cluster = three_tasks();
    prefer(&cluster, "any", ALL);
    let path = cluster.folder().join("cluster.toml");
    let _agents: Vec<Agent<'_>> =
        cluster.nodes.iter().map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    for node in &cluster.nodes {
        eventually("all tasks are offered", || active_tasks(&node.netns, "web") == 3);
    }
    let every: &[&str] = &["web.1", "web.2", "web.3"];
    come_first(&cluster, "any", [every; 3]);
    let loads: Vec<Load> =
        (0..3).map(|node| Load::start(&cluster.client, cluster.addresses(node)[0], 1, u64::MAX)).collect();
    prefer(&cluster, "local", ALL);
    come_first(&cluster, "local", [&every[..2], &every[2..], every]);
    prefer(&cluster, "local", ["draining", "running", "running"]);
    come_first(&cluster, "one of two", [&every[1..2], &every[2..], &every[1..]]);
    prefer(&cluster, "local", ["draining", "draining", "running"]);
    come_first(&cluster, "none left", [&every[2..], &every[2..], &every[2..]]);
    prefer(&cluster, "zone", ALL);
    come_first(&cluster, "zone", [&every[..2], &every[2..], &every[..2]]);
    prefer(&cluster, "any", ALL);
    come_first(&cluster, "any again", [every; 3]);
    let done: u64 = loads.iter().map(Load::done).sum();
    assert!(done > 100, "{done} requests meanwhile");
    for load in loads {
        assert_eq!(load.stop(), Vec::<String>::new(), "no request failed");
    }

    prefer(&cluster, "local-only", ALL);
    come_first(&cluster, "local-only", [&every[..2], &every[2..], &[]]);
    // Nobody else takes a turn now, nor has one of this client's ports been used already.
    let other =
        cluster.plug("other", Ipv4Addr::new(192, 0, 2, 11), "2001:db8:1::11".parse().expect("an address"));
    let two = every[..2].iter().map(|name| ((*name).to_owned(), 2)).collect::<BTreeMap<_, _>>();
    within(PATIENCE, "two turns without a SYN that is sent again", || {
        turns(&cluster, &other, 0, 2) == [two.clone(), two.clone()]
    });
    let to = SocketAddr::new(cluster.addresses(2)[0], 80);
    let refused =
        cluster.client.enter(|| TcpStream::connect_timeout(&to, PATIENCE)).map_err(|error| error.kind());
    assert_eq!(refused.err(), Some(std::io::ErrorKind::ConnectionRefused), "as of a service without tasks");
    // What an outer balancer asks.
    let ready = [0, 1, 2].map(|node| get(&cluster, node, "/-/ready/web"));
    let why = "eth1: no task gets new connections here\n";
    let yes = (200, "ready\n".to_owned());
    assert_eq!(ready, [yes.clone(), yes.clone(), (503, why.to_owned())]);
    assert_eq!(get(&cluster, 2, "/-/ready"), yes, "the node itself is");
    assert_eq!(get(&cluster, 0, "/-/ready/wbe").0, 503);
    let third = &cluster.nodes[2].netns;
    let problem = json(third, &["service", "ls"])["services"][0]["problem"].clone();
    assert!(problem.is_null(), "as was asked for: {problem}");
    let events = text(third, &["events"]);
    assert!(
        events.contains("service web has no task that takes new connections: they are refused"),
        "{events}"
    );
    let shown = json(&cluster.nodes[2].netns, &["service", "inspect", "web"])["settings"]["prefer"].clone();
    assert_eq!(shown, "local-only");
}

/// By the host Swarm's mesh would give it to the very tasks that are not to get it.
#[test]
fn who_is_to_get_no_task_is_refused_and_not_left_to_the_host() {
    let far = task("web.1", false, Via::Peer, &["10.7.7.7"]);
    with_lab(vec![service("web", &["80:8080", "53:5353/udp"], vec![far])], |lab| {
        let packet = |transport, port| {
            Packet::new(transport, (ip("192.0.2.10"), 40_000), (ip("192.0.2.1"), port)).bytes()
        };
        let (syn, datagram) = (packet(SYN, 80), packet(Transport::Udp, 53));
        let is_refused = |lab: &mut Lab, what: &str| {
            for (tc, sent) in [(false, TX), (true, REDIRECT)] {
                let flags = lab.datapath().config().flags;
                lab.configure(|config| config.flags = if tc { TC_ALONE } else { XDP_TRANSMITS });
                let run = |frame: &[u8]| {
                    let run = |lab: &Lab| if tc { lab.uplink_tc(frame) } else { lab.xdp(frame) };
                    let (verdict, counted) = lab.counting(run);
                    (verdict.action, counted)
                };
                assert_eq!(run(&syn), (sent, [(Outcome::Reset, 1)].into()), "{what}, in TC {tc}");
                let drop = if tc { SHOT } else { DROP };
                let dropped = (drop, [(Outcome::BackendUnreachable, 1)].into());
                assert_eq!(run(&datagram), dropped, "{what}, in TC {tc}");
                lab.configure(|config| config.flags = flags);
            }
            lab.passes(what, &packet(ACK, 80), Outcome::NoConnection);
        };
        lab.update(|cluster| cluster.service_mut(0).prefer = Prefer::LocalOnly);
        is_refused(lab, "the task is on another node");
        // Generic XDP cannot answer, nor tell TC to.
        let flags = lab.datapath().config().flags;
        lab.configure(|config| config.flags = XDP_GENERIC);
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&syn));
        assert_eq!((verdict.action, counted), (DROP, [(Outcome::BackendUnreachable, 1)].into()));
        lab.configure(|config| config.flags = flags);
        lab.update(|cluster| {
            cluster.service_mut(0).prefer = Prefer::Any;
            cluster.service_mut(0).tasks[0].weight = 0;
        });
        is_refused(lab, "the task weighs nothing");
        lab.update(|cluster| {
            cluster.service_mut(0).tasks[0].weight = 1;
            cluster.service_mut(0).tasks[0].state = TaskState::Draining;
        });
        lab.passes("a service whose tasks all drain is the host's", &syn, Outcome::NoBackend);
    });
}
