//! Clients come by one interface, and the nodes reach each other by another: a private network, or one without link headers.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use aya::programs::{SchedClassifier, TcAttachType};
use lb_common::{
    abi::program,
    tunnel::{DATA_WORDS, OPTION_CLASS, TO_TASK, VERSION},
};
use lb_tests::{
    agent::{Agent, active_tasks, json, offered, outcome, text, verb},
    capture::Capture,
    cluster::{CLIENT4, CLIENT6, Cluster, Node, Reach},
    netns::{Netns, eventually, within},
    private::{INTERFACE, Private, private4, private6},
    traffic::{Direction, Load, ask, echo, in_turns, requests, stop_echo, tally, transfer},
};
use lb_userspace::datapath::PinDir;
use nix::sys::signal::Signal;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const PRIVATE: Reach = Reach { private: true, ..Reach::PEERS };
/// What other nodes' datapaths send and are sent.
const TUNNEL: &str = "udp port 6081";
/// What would say that a packet was lost.
const LOSSES: [&str; 7] = [
    "delivery_lost",
    "tunnel_not_peer",
    "tunnel_no_task",
    "tunnel_malformed",
    "tunnel_forged",
    "backend_unreachable",
    "backend_gone",
];

fn attach_to<'a>(cluster: &'a Cluster, node: &'a Node, arguments: &[&str]) -> Agent<'a> {
    Agent::attach(&node.netns, cluster.folder(), &cluster.folder().join("cluster.toml"), arguments)
}

/// An agent on every node.
fn attach_each<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Vec<Agent<'a>> {
    cluster.nodes.iter().map(|node| attach_to(cluster, node, arguments)).collect()
}

/// The same, all of which offer all tasks.
fn attach<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Vec<Agent<'a>> {
    let agents = attach_each(cluster, arguments);
    for node in &cluster.nodes {
        within(PATIENCE, "all tasks are offered", || {
            active_tasks(&node.netns, "web") == cluster.tasks.len() as u64
        });
    }
    agents
}

/// Three nodes with five tasks of nginx, spread over them.
fn five_tasks(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.reach = reach;
    cluster.receive_xdp();
    for slot in 1..=5 {
        cluster.add_nginx(&format!("web.{slot}"), (slot - 1) % 3);
    }
    cluster.write_all_running();
    cluster
}

/// Every node answers on both families with every task in turn, and every task sees the client.
fn rotates(cluster: &Cluster, what: &str) {
    for node in 0..cluster.nodes.len() {
        for address in cluster.addresses(node) {
            let answers = in_turns(cluster.tasks.len(), || requests(&cluster.client, address, 10));
            let seen: IpAddr = if address.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() };
            let sees = |answer: &String| answer.ends_with(&format!("saw {seen}"));
            assert!(answers.iter().all(sees), "{what}: {address}: {answers:?}");
        }
        let netns = &cluster.nodes[node].netns;
        assert!(outcome(netns, "forwarded_peer") > 0, "{what}");
        for lost in LOSSES {
            assert_eq!(outcome(netns, lost), 0, "{what}: {lost} at node {node}");
        }
    }
}

/// What is said of the way between the nodes.
fn is_said(cluster: &Cluster, agents: &[Agent<'_>]) {
    for (node, agent) in cluster.nodes.iter().zip(agents) {
        let log = agent.log();
        assert!(log.contains(&format!("eth1: other nodes are reached by {INTERFACE}")), "{log}");
        let status = text(&node.netns, &["status"]);
        assert!(status.contains(&format!("; the others are reached by {INTERFACE}\n")), "{status}");
        let nodes = json(&node.netns, &["node", "ls"])["nodes"].clone();
        let by = |node: &serde_json::Value| node["reached_by"].as_str().map(str::to_owned);
        let by: Vec<_> =
            nodes.as_array().expect("nodes").iter().filter(|node| node["this"] == false).map(by).collect();
        assert!(by.len() == 2 && by.iter().all(|by| by.as_deref() == Some(INTERFACE)), "{nodes}");
        let findings = String::from_utf8(verb(&node.netns, &["doctor", "--verbose"]).stdout).expect("text");
        assert!(findings.contains(&format!("by {INTERFACE}, UDP port 6081 passes both ways")), "{findings}");
    }
}

/// The numbers of the programs on an interface.
fn programs(netns: &Netns, interface: &str) -> Vec<u32> {
    let on = |side| {
        let programs = netns.enter(|| SchedClassifier::query_tcx(interface, side)).expect("ask for programs");
        programs.1.iter().map(aya::programs::ProgramInfo::id).collect::<Vec<_>>()
    };
    [on(TcAttachType::Ingress), on(TcAttachType::Egress)].concat()
}

/// The numbers of the programs that the next controller would put back there.
fn pinned(netns: &Netns) -> Vec<u32> {
    let number = |name: &&str| {
        let pins = PinDir::of("eth1").expect("pins");
        let program = SchedClassifier::from_pin(pins.program(name)).expect(name);
        program.info().expect("what it is").id()
    };
    netns.enter(|| [program::PEER_TC, program::UPLINK_EGRESS].iter().map(number).collect())
}

#[test]
fn clients_come_by_the_public_network_and_the_tunnel_goes_by_the_private_one() {
    let cluster = five_tasks(PRIVATE);
    let private = Private::wire(&cluster, 1_500);
    for mode in ["native", "tc", "generic"] {
        let public = Capture::start(cluster.lan(), cluster.folder(), TUNNEL);
        let between = Capture::start(private.netns(), cluster.folder(), TUNNEL);
        let agents = attach(&cluster, &["--mode", mode]);
        rotates(&cluster, mode);
        is_said(&cluster, &agents);
        assert_eq!(public.packets(), Vec::<String>::new(), "{mode}: nothing of the tunnel is public");
        assert!(!between.packets().is_empty(), "{mode}");
        // Each detaches.
        drop(agents);
        for node in &cluster.nodes {
            assert_eq!(programs(&node.netns, INTERFACE), Vec::<u32>::new(), "{mode}: {}", node.name);
        }
    }
}

#[test]
fn the_tunnel_goes_by_an_interface_without_link_headers() {
    let cluster = five_tasks(PRIVATE);
    let _private = Private::tun(&cluster, 1_420);
    for mode in ["native", "tc", "generic"] {
        let public = Capture::start(cluster.lan(), cluster.folder(), TUNNEL);
        let agents = attach(&cluster, &["--mode", mode]);
        rotates(&cluster, mode);
        is_said(&cluster, &agents);
        assert_eq!(public.packets(), Vec::<String>::new(), "{mode}: nothing of the tunnel is public");
        drop(agents);
    }
}

#[test]
fn transfers_are_whole_whatever_the_two_networks_let_pass() {
    for (outer_v6, direct, wire, mtu, mode) in [
        (false, false, true, 1_400, "native"),
        (true, false, true, 9_000, "tc"),
        (false, true, true, 1_500, "native"),
        (true, false, false, 1_420, "native"),
        (false, false, false, 1_420, "generic"),
    ] {
        let mut cluster = Cluster::new(2);
        cluster.reach = Reach { outer_v6, direct, ..PRIVATE };
        cluster.receive_xdp();
        cluster.add_task("web.1", 1);
        let private = if wire { Private::wire(&cluster, mtu) } else { Private::tun(&cluster, mtu) };
        cluster.write_all_running();
        let agents = attach(&cluster, &["--mode", mode]);
        for address in cluster.addresses(0) {
            for direction in [Direction::Up, Direction::Down] {
                println!(
                    "outer IPv6 {outer_v6}, direct {direct}, wire {wire}, {mtu}, {mode}: {address} {direction:?}"
                );
                let to = SocketAddr::new(address, 80);
                transfer(&cluster.client, &cluster.tasks[0].netns, to, direction, 5);
            }
        }
        drop((agents, private));
    }
}

#[test]
fn datagrams_and_their_answers_go_by_the_private_network() {
    let mut cluster = Cluster::new(2);
    cluster.reach = PRIVATE;
    cluster.receive_xdp();
    let task = cluster.add_task("web.1", 1);
    let _private = Private::tun(&cluster, 1_420);
    let server = cluster.tasks[task].netns.spawn(|| echo(5353, "echo"));
    cluster.write(&cluster.file("\"53:5353/udp\", \"80:8080\"", &[(&cluster.tasks[task], "running")]));
    let _agents = attach(&cluster, &[]);
    for address in cluster.addresses(0) {
        let to = SocketAddr::new(address, 53);
        let answer = || cluster.client.enter(|| ask(to, "hello"));
        within(PATIENCE, "it is echoed", || answer().is_some_and(|answer| answer.contains("hello")));
    }
    stop_echo(&cluster.tasks[task].netns, 5353);
    server.join().expect("the server");
}

#[test]
fn nothing_is_lost_while_controllers_come_and_go_and_a_silent_network_is_noticed() {
    let cluster = five_tasks(PRIVATE);
    let private = Private::wire(&cluster, 1_500);
    let node = &cluster.nodes[0];
    let address = cluster.addresses(0)[0];
    // The private network comes after the agent.
    node.netns.ip(&format!("link set {INTERFACE} down"));
    let mut agents = attach_each(&cluster, &[]);
    let local: BTreeSet<String> = ["web.1", "web.4"].map(str::to_owned).into();
    within(PATIENCE, "its own tasks alone are offered", || offered(&node.netns, "web") == local);
    assert_eq!(programs(&node.netns, INTERFACE), Vec::<u32>::new());
    node.netns.ip(&format!("link set {INTERFACE} up"));
    node.netns.ip(&format!("addr add {}/64 dev {INTERFACE} nodad", private6(node)));
    within(PATIENCE, "all tasks are offered", || active_tasks(&node.netns, "web") == 5);
    let before = programs(&node.netns, INTERFACE);
    assert_eq!(before.len(), 2, "ingress and egress");
    assert_eq!(pinned(&node.netns), before);
    let load = Load::start(&cluster.client, address, 2, u64::MAX);
    agents.remove(0).stop(Signal::SIGKILL);
    agents.insert(0, attach_to(&cluster, node, &[]));
    assert!(agents[0].log().contains("adopted the running datapath"), "{}", agents[0].log());
    let after = programs(&node.netns, INTERFACE);
    assert!(after.len() == 2 && after.iter().all(|program| !before.contains(program)), "they are swapped");
    assert_eq!(pinned(&node.netns), after);
    let done = load.done();
    within(PATIENCE, "the load goes on", || load.done() > done + 100);
    assert_eq!(load.stop(), Vec::<String>::new());

    let port = Cluster::port(&node.netns);
    let public = Capture::start(cluster.lan(), cluster.folder(), TUNNEL);
    private.netns().ip(&format!("link set {port} down"));
    within(PATIENCE, "the others' tasks are left out", || offered(&node.netns, "web") == local);
    assert_eq!(tally(&requests(&cluster.client, address, 4)).len(), 2);
    assert_eq!(public.packets(), Vec::<String>::new(), "what is private stays so");
    private.netns().ip(&format!("link set {port} up"));
    let all = || active_tasks(&node.netns, "web") == 5;
    within(PATIENCE, "all tasks are back", all);
    // Down with its routes, and nothing but the public network left, to which private addresses have no route.
    for route in ["unreachable 10.99.0.0/24 metric 4000", "-6 unreachable fd99::/64 metric 4000"] {
        let (family, route) = route.strip_prefix("-6 ").map_or(("-4", route), |route| ("-6", route));
        node.netns.ip(&format!("{family} route add {route}"));
    }
    let public = Capture::start(cluster.lan(), cluster.folder(), TUNNEL);
    node.netns.ip(&format!("link set {INTERFACE} down"));
    within(PATIENCE, "the others' tasks are left out again", || offered(&node.netns, "web") == local);
    assert_eq!(tally(&requests(&cluster.client, address, 4)).len(), 2);
    assert_eq!(public.packets(), Vec::<String>::new(), "what is private stays so");
    node.netns.ip(&format!("link set {INTERFACE} up"));
    node.netns.ip(&format!("addr add {}/64 dev {INTERFACE} nodad", private6(node)));
    within(PATIENCE, "all tasks are back again", all);
    eventually("they serve in turn", || tally(&requests(&cluster.client, address, 5)).len() == 5);
}

#[test]
fn no_program_of_a_node_speaks_to_a_peer_by_the_private_network() {
    for wire in [true, false] {
        let cluster = five_tasks(PRIVATE);
        let _private = if wire { Private::wire(&cluster, 1_500) } else { Private::tun(&cluster, 1_420) };
        let _agents = attach(&cluster, &[]);
        let [near, far, _] = cluster.nodes.as_slice() else { panic!("three nodes") };
        let mut forged = [0; 32];
        forged[0] = 6;
        forged[2..4].copy_from_slice(&0x0800_u16.to_be_bytes());
        forged[8..10].copy_from_slice(&OPTION_CLASS.get().to_be_bytes());
        forged[10] = TO_TASK;
        forged[11] = DATA_WORDS;
        forged[12] = VERSION;
        let sent = 20;
        let to = SocketAddr::new(private4(far).into(), 6081);
        near.netns.enter(|| {
            let socket = UdpSocket::bind((private4(near), 0)).expect("a socket");
            for _ in 0..sent {
                // Who is refused hears of it.
                let _ = socket.send_to(&forged, to);
            }
        });
        eventually("it ends here", || outcome(&near.netns, "tunnel_impostor") == sent);
        assert!(LOSSES.iter().all(|lost| outcome(&far.netns, lost) == 0), "none arrives");
    }
}

#[test]
fn each_of_several_uplinks_reaches_the_nodes_by_itself() {
    let mut cluster = Cluster::new(2);
    cluster.reach = PRIVATE;
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    cluster.add_nginx("web.2", 1);
    let _private = Private::wire(&cluster, 1_500);
    let path = cluster.write_all_running();
    let nodes = cluster.nodes.iter();
    let _agents: Vec<_> = nodes.map(|node| attach_to(&cluster, node, &["--iface", INTERFACE])).collect();
    let node = &cluster.nodes[0].netns;
    let ask = |of: &str| json(node, &[of, "ls"]);
    within(PATIENCE, "both tasks are offered", || active_tasks(node, "web") == 2);
    let answers = requests(&cluster.client, cluster.addresses(0)[0], 4);
    assert_eq!(tally(&answers).into_values().collect::<Vec<_>>(), [2, 2], "{answers:?}");
    assert!(ask("node")["nodes"].to_string().contains("\"reached_by\":\"eth1\""), "{}", ask("node"));
    let findings = String::from_utf8(verb(node, &["doctor", "--verbose"]).stdout).expect("text");
    for uplink in ["eth1", INTERFACE] {
        assert!(findings.contains(&format!("by {uplink}, UDP port 6081 passes both ways")), "{findings}");
    }
    // What only the other one leads to is nobody's way.
    let text = std::fs::read_to_string(&path).expect("the cluster file");
    let public = cluster.addresses(1).map(|address| format!(", \"{address}\"")).concat();
    cluster.write(&text.replace(&public, ""));
    let said = format!(
        "leaves by {INTERFACE}, and not by eth1; {INTERFACE} has a datapath of its own: attach to eth1 alone, and \
         {INTERFACE} serves as the way between the nodes"
    );
    within(PATIENCE, "it is said", || ask("node")["nodes"].to_string().contains(&said));
    assert_eq!(offered(node, "web"), BTreeSet::from(["web.1".to_owned()]));
}

/// By links and, as on kernels before 6.6, by filters.
#[test]
fn tasks_may_answer_by_the_interface_that_leads_to_nodes() {
    for lacks in ["", "tcx"] {
        let mut cluster = Cluster::new(2);
        cluster.reach = PRIVATE;
        for (name, node) in [("web.1", 0), ("web.2", 1), ("web.3", 1)] {
            cluster.add_nginx(name, node);
        }
        let _private = Private::wire(&cluster, 1_500);
        let [near, far] = cluster.nodes.as_slice() else { panic!("two nodes") };
        near.netns.ip(&format!("route replace 172.18.2.0/24 via {}", private4(far)));
        far.netns.ip(&format!("route replace 172.18.1.0/24 via {}", private4(near)));
        let tasks: Vec<_> = cluster.tasks.iter().map(|task| (task, "running")).collect();
        let text = cluster.file("\"80:8080\"", &tasks);
        let third = text.find("name = \"web.3\"").expect("the third task");
        let (before, its) = text.split_at(third);
        let its = its.replacen("state =", "via = \"snat\"\nstate =", 1);
        let path = cluster.write(&format!("{before}{its}"));
        let variables = [("LB_TEST", "1"), ("LB_KERNEL_LACKS", lacks)];
        let agents: Vec<_> = [near, far]
            .map(|node| Agent::attach_with(&node.netns, cluster.folder(), &path, &[], &variables))
            .into();
        within(PATIENCE, "all tasks are offered", || active_tasks(&near.netns, "web") == 3);
        let answers = requests(&cluster.client, cluster.addresses(0)[0], 6);
        let of = |task: &str| answers.iter().filter(|answer| answer.starts_with(task)).cloned().collect();
        let seen = |task: &str, address: &dyn std::fmt::Display| vec![format!("{task} saw {address}"); 2];
        let all: [Vec<String>; 3] = ["web.1", "web.2", "web.3"].map(of);
        assert_eq!(
            all,
            [seen("web.1", &CLIENT4), seen("web.2", &CLIENT4), seen("web.3", &private4(near))],
            "{lacks}"
        );
        drop(agents);
        for node in [near, far] {
            assert_eq!(programs(&node.netns, INTERFACE), Vec::<u32>::new(), "{}", node.name);
            let filters = ["ingress", "egress"]
                .map(|side| node.netns.output("tc", &["filter", "show", "dev", INTERFACE, side]));
            assert_eq!(filters, ["", ""], "{}", node.name);
        }
    }
}
