//! The agent against a real Docker Swarm. This kernel may have no IPVS, so that what answers on a published port is ours.
//! Runs alone: three engines and the load fill it.

use std::{
    collections::BTreeSet,
    io::Read as _,
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use lb_tests::{
    agent::{self, Agent, json, text},
    capture::Capture,
    netns::{succeeds, within},
    service::{by_task, create, offered, rotates, serves},
    swarm::{CLIENT6, Node, PATIENCE, Public, Swarm, big, packaging},
    traffic::{Load, ask, client, hash, in_turns, losses, refusal, syns_repeated},
};
use nix::sys::signal::Signal;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// A service that is asked whether it is well; `/tmp/sick` in a task makes it say no.
const HEALTH: [&str; 6] = [
    "--health-cmd",
    "test ! -e /tmp/sick && wget -q -O /dev/null http://127.0.0.1:8080/",
    "--health-interval",
    "500ms",
    "--health-retries",
    "1",
];

/// The containers of a service on a node, by the host names that they answer with.
fn containers(node: &Node, service: &str) -> Vec<String> {
    let filter = format!("label=com.docker.swarm.service.name={service}");
    node.docker(&["ps", "-q", "--filter", &filter]).lines().map(str::to_owned).collect()
}

/// The nodes on which Docker says that a service's tasks run.
fn nodes_of(manager: &Node, service: &str) -> Vec<String> {
    let filter = ["service", "ps", service, "--filter", "desired-state=running"];
    let listed = manager.docker(&[&filter[..], &["--format", "{{.Node}} {{.CurrentState}}"]].concat());
    let running = listed.lines().filter_map(|line| line.split_once(" Running"));
    running.map(|(node, _)| node.to_owned()).collect()
}

/// Load through every node at once, until all have made so many requests and the closure has returned; what failed.
fn under_load(swarm: &Swarm, requests: u64, body: impl FnOnce()) -> Vec<String> {
    let machines = swarm.crowd.iter().zip(&swarm.nodes);
    let loads: Vec<Load> =
        machines.map(|(client, node)| Load::start(client, node.address(), 1, u64::MAX)).collect();
    body();
    within(PATIENCE * 3, "the load has made its requests", || {
        loads.iter().all(|load| load.done() >= requests)
    });
    let done: Vec<u64> = loads.iter().map(Load::done).collect();
    let failed: Vec<String> = loads.into_iter().flat_map(Load::stop).collect();
    println!("{done:?} requests, {} failed", failed.len());
    failed
}

/// Runs `docker service update` and waits for its end.
fn update(manager: &Node, service: &str, options: &[&str]) {
    manager.docker(&[&["service", "update", "-d"], options, &[service]].concat());
    within(PATIENCE * 3, "the update is completed", || {
        let format = "{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}";
        manager.docker(&["service", "inspect", service, "--format", format]) == "completed"
    });
}

/// The swarm has a private network, clients have a public one, and the agents are told nothing but the interface of that.
#[test]
fn clients_come_by_a_network_that_is_not_the_swarm_s() {
    let swarm = Swarm::new(3);
    let public = Public::new(&swarm);
    let capture = Capture::start(&public.lan, swarm.folder(), "udp port 6081");
    let _agents: Vec<_> = swarm.nodes.iter().map(|node| swarm.attach_public(node)).collect();
    create(&swarm.nodes[0], "web", 5, "80:8080", &[], &[]);
    serves(&swarm, "web", 5);
    for node in &swarm.nodes {
        let answers = in_turns(5, || public.ask(node, 80, 10));
        for answer in &answers {
            let (_, seen) = answer.split_once(" saw ").unwrap_or_else(|| panic!("an answer: {answer:?}"));
            let seen: IpAddr = seen.trim_matches(['[', ']']).parse().expect("an address");
            assert_eq!(seen.to_canonical(), IpAddr::from(Public::CLIENT), "{answers:?}");
        }
        let nodes = json(&node.netns, &["node", "ls"])["nodes"].clone();
        let others = nodes.as_array().expect("nodes").iter().filter(|node| node["this"] == false);
        let by: Vec<&str> = others.filter_map(|node| node["reached_by"].as_str()).collect();
        assert_eq!(by, ["eth1", "eth1"], "{nodes}");
    }
    assert_eq!(capture.packets(), Vec::<String>::new(), "nothing of the tunnel is public");
}

#[test]
fn the_walk_through() {
    let swarm = Swarm::machines(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    // Attached before there is a swarm, with nothing but the interface to go by.
    let _agents = swarm.attach();
    within(PATIENCE, "an agent says that there is no swarm yet", || {
        json(&first.netns, &["status"])["source"] == "docker, outside a swarm"
    });
    first.init();
    second.join(first, "worker");
    third.join(first, "worker");
    let source =
        |node: &Node| json(&node.netns, &["status"])["source"].as_str().unwrap_or_default().to_owned();
    for (node, role) in [(first, "docker manager"), (second, "docker worker"), (third, "docker worker")] {
        within(PATIENCE, "each agent knows its part", || source(node) == role);
    }
    first.docker(&["node", "promote", "node2"]);
    within(PATIENCE, "the promoted node's agent follows", || source(second) == "docker manager");
    assert_eq!(first.docker(&["node", "ls", "-q"]).lines().count(), 3);

    create(first, "web", 5, "80:8080", &["--update-parallelism", "0"], &[]);
    serves(&swarm, "web", 5);
    for node in &swarm.nodes {
        rotates(&swarm, node, 80, 5);
    }
    // Ours beside Docker's.
    let listed = text(&third.netns, &["service", "ls"]);
    assert!(
        listed
            .lines()
            .any(|line| line.starts_with("web ") && line.contains("5/5") && line.contains("*:80->8080/tcp")),
        "{listed}"
    );
    let theirs = first.docker(&["service", "ls", "--format", "{{.Name}} {{.Replicas}} {{.Ports}}"]);
    assert_eq!(theirs, "web 5/5 *:80->8080/tcp");
    let mut ours: Vec<String> = json(&second.netns, &["service", "ps", "web"])["tasks"]
        .as_array()
        .expect("tasks")
        .iter()
        .map(|task| task["node"].as_str().expect("a node").to_owned())
        .collect();
    let mut running = nodes_of(first, "web");
    ours.sort();
    running.sort();
    assert_eq!(ours, running);
    assert_eq!(json(&third.netns, &["node", "ls"])["nodes"].as_array().expect("nodes").len(), 3);

    for tasks in [2, 7] {
        first.docker(&["service", "scale", "-d", &format!("web={tasks}")]);
        serves(&swarm, "web", tasks);
        for node in &swarm.nodes {
            rotates(&swarm, node, 80, tasks);
        }
    }
    first.docker(&["service", "update", "-d", "--publish-rm", "8080", "--publish-add", "81:8080", "web"]);
    within(PATIENCE, "the new port is served", || {
        swarm.nodes.iter().all(|node| swarm.ask(node, 81).is_ok()) && nodes_of(first, "web").len() == 7
    });
    // A task that was asked before it listened is named until it has answered somebody.
    within(PATIENCE, "every task has answered", || {
        let asked = |node: &Node| (0..7).all(|_| swarm.ask(node, 81).is_ok());
        swarm.nodes.iter().all(|node| asked(node) && offered(node, "web").len() == 7)
    });
    serves(&swarm, "web", 7);
    rotates(&swarm, third, 81, 7);
    within(PATIENCE, "the old port is closed", || swarm.ask(second, 80).is_err());
    first.docker(&["service", "rm", "web"]);
    within(PATIENCE, "the service is gone everywhere", || {
        swarm.nodes.iter().all(|node| {
            json(&node.netns, &["service", "ls"])["services"].as_array().is_some_and(Vec::is_empty)
        })
    });
    within(Duration::from_secs(20), "its port is closed", || swarm.ask(first, 81).is_err());
}

#[test]
fn a_start_first_update_with_a_health_check_fails_no_request() {
    let swarm = Swarm::new(3);
    let manager = &swarm.nodes[0];
    let _agents = swarm.attach();
    create(manager, "web", 3, "80:8080", &[&HEALTH[..], &["--update-order", "start-first"]].concat(), &[]);
    serves(&swarm, "web", 3);
    let failed = under_load(&swarm, 5_000, || update(manager, "web", &["--force"]));
    assert_eq!(failed, Vec::<String>::new());
    // Without one a task that is `running` before it listens refuses: the suite `health` has that.
    manager.docker(&["service", "rm", "web"]);
    within(PATIENCE, "the old service is gone", || containers(manager, "web").is_empty());
    create(manager, "web", 3, "80:8080", &[&HEALTH[..], &["--update-order", "stop-first"]].concat(), &[]);
    serves(&swarm, "web", 3);
    let failed = under_load(&swarm, 1_000, || update(manager, "web", &["--force"]));
    assert_eq!(failed, Vec::<String>::new(), "stop-first");
}

#[test]
fn tasks_that_fail_or_move_get_no_new_connections() {
    let swarm = Swarm::new(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let _agents = swarm.attach();
    create(first, "web", 6, "80:8080", &HEALTH, &[]);
    serves(&swarm, "web", 6);
    let gone = |container: &str| {
        for node in &swarm.nodes {
            within(PATIENCE, "no new connection comes to a task", || {
                let answers: Vec<_> = (0..12).map(|_| swarm.ask(node, 80)).collect();
                answers.iter().all(|answer| answer.as_ref().is_ok_and(|text| !text.starts_with(container)))
            });
        }
    };
    let victim = containers(third, "web").remove(0);

    // Ill: no new connections, before Swarm replaces it.
    third.docker(&["exec", &victim, "touch", "/tmp/sick"]);
    gone(&victim);
    serves(&swarm, "web", 6);

    // Paused, and back.
    let victim = containers(second, "web").remove(0);
    second.docker(&["pause", &victim]);
    within(PATIENCE, "a paused task gets no new connections", || offered(third, "web").len() == 5);
    gone(&victim);
    second.docker(&["unpause", &victim]);
    serves(&swarm, "web", 6);

    // Killed.
    let victim = containers(third, "web").remove(0);
    let pid = third.docker(&["inspect", "--format", "{{.State.Pid}}", &victim]);
    third.signal_in(&pid, "KILL");
    gone(&victim);
    serves(&swarm, "web", 6);

    // Moved away by draining its node: nothing fails.
    let failed = under_load(&swarm, 500, || {
        first.docker(&["node", "update", "--availability", "drain", "node3"]);
        within(PATIENCE, "the node is drained", || {
            let running = nodes_of(first, "web");
            running.len() == 6 && !running.contains(&"node3".to_owned())
        });
        serves(&swarm, "web", 6);
    });
    assert_eq!(failed, Vec::<String>::new());
    for node in &swarm.nodes {
        rotates(&swarm, node, 80, 6);
    }
    // Back to nothing and up again.
    first.docker(&["service", "scale", "-d", "web=0"]);
    serves(&swarm, "web", 0);
    first.docker(&["service", "scale", "-d", "web=2"]);
    serves(&swarm, "web", 2);
    rotates(&swarm, third, 80, 2);
}

#[test]
fn engines_crash_and_traffic_goes_on() {
    let swarm = Swarm::new(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let _agents = swarm.attach();
    create(first, "web", 6, "80:8080", &["--mode", "replicated"], &[]);
    serves(&swarm, "web", 6);
    let all = |tasks: usize| swarm.nodes.iter().for_each(|node| rotates(&swarm, node, 80, tasks));

    // A worker's.
    third.kill_docker();
    all(6);
    third.restart_docker();
    within(PATIENCE, "Swarm runs all tasks again", || nodes_of(first, "web").len() == 6);
    serves(&swarm, "web", 6);
    all(6);

    // The only manager's: the last state stands, and who is asked says so.
    first.kill_docker();
    within(PATIENCE, "every agent says that its state may be out of date", || {
        swarm.nodes.iter().all(|node| json(&node.netns, &["status"])["source_problem"].is_string())
    });
    all(6);
    // What the nodes know by themselves still counts: a task that dies is gone on its node, and on the others.
    let victim = containers(second, "web").remove(0);
    let pid = second.docker(&["inspect", "--format", "{{.State.Pid}}", &victim]);
    second.signal_in(&pid, "KILL");
    for node in [second, third] {
        within(PATIENCE, "the dead task gets no new connections", || offered(node, "web").len() == 5);
        rotates(&swarm, node, 80, 5);
    }
    first.restart_docker();
    within(PATIENCE, "Swarm runs all tasks again", || nodes_of(first, "web").len() == 6);
    serves(&swarm, "web", 6);
    within(PATIENCE, "every agent has fresh state", || {
        swarm.nodes.iter().all(|node| json(&node.netns, &["status"])["source_problem"].is_null())
    });
    all(6);
}

#[test]
fn managers_change_and_workers_follow() {
    let swarm = Swarm::machines(3);
    let [first, second, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    // Attached while there is no engine: it is waited for.
    second.kill_docker();
    let mut agents = swarm.attach();
    let said = json(&second.netns, &["status"])["source_problem"].as_str().unwrap_or_default().to_owned();
    assert!(said.contains("Docker is not running at unix://"), "{said:?}");
    second.restart_docker();
    first.init();
    second.join(first, "worker");
    third.join(first, "worker");
    create(first, "web", 3, "80:8080", &[], &[]);
    serves(&swarm, "web", 3);
    first.docker(&["node", "promote", "node2"]);
    let role = |node: &Node| json(&node.netns, &["status"])["source"].as_str().unwrap_or_default().to_owned();
    within(PATIENCE, "the agent of the promoted node follows", || role(second) == "docker manager");
    second.docker(&["node", "demote", "node1"]);
    within(PATIENCE, "the agent of the demoted node follows", || role(first) == "docker worker");
    second.docker(&["service", "scale", "-d", "web=4"]);
    serves(&swarm, "web", 4);
    // The swarm changes its authority; who connects anew is known by the new one.
    second.docker(&["swarm", "ca", "--rotate", "--quiet"]);
    agents.remove(2).stop(Signal::SIGTERM);
    agents.push(swarm.attach_one(third, &[]));
    second.docker(&["service", "scale", "-d", "web=3"]);
    serves(&swarm, "web", 3);
    // The former manager goes for good, its agent with it.
    agents.remove(0).stop(Signal::SIGKILL);
    assert!(agent::verb(&first.netns, &["detach", "--iface", "eth1"]).status.success());
    first.switch_off();
    second.docker(&["service", "scale", "-d", "web=5"]);
    within(PATIENCE, "Swarm runs all tasks elsewhere", || {
        let running = nodes_of(second, "web");
        running.len() == 5 && !running.contains(&"node1".to_owned())
    });
    for node in [second, third] {
        within(PATIENCE, "the tasks are served", || offered(node, "web").len() == 5);
        rotates(&swarm, node, 80, 5);
    }
    let told = json(&third.netns, &["status"]);
    assert!(told["source_problem"].is_null(), "{told}");
    let manager = second.docker(&["info", "--format", "{{.Swarm.NodeID}}"]);
    assert!(told["source_why"].as_str().is_some_and(|why| why.contains(&manager)), "{told}");
}

#[test]
fn a_node_that_falls_silent_gets_no_new_connections() {
    let swarm = Swarm::new(3);
    let [first, _, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let _agents = swarm.attach();
    create(first, "web", 6, "80:8080", &[], &[]);
    serves(&swarm, "web", 6);
    let there = containers(third, "web");
    assert!(!there.is_empty());
    swarm.set_cable(third, false);
    let cut = std::time::Instant::now();
    let problem = |node: &Node| {
        let nodes = json(&node.netns, &["node", "ls"])["nodes"].as_array().cloned().unwrap_or_default();
        let third = nodes.into_iter().find(|node| node["name"] == "node3").expect("node3");
        third["problem"].as_str().unwrap_or_default().to_owned()
    };
    within(Duration::from_secs(10), "the silence is noticed", || problem(first).contains("silent"));
    println!("noticed after {:?}", cut.elapsed());
    // Long before Swarm takes the node for down.
    let answers = swarm.ask_often(first, 80, 12);
    let counts = by_task(&answers);
    assert!(there.iter().all(|task| !counts.contains_key(task.as_str())), "{counts:?}");
    swarm.set_cable(third, true);
    within(PATIENCE, "it is heard again", || problem(first).is_empty());
    within(PATIENCE, "Swarm runs six tasks", || nodes_of(first, "web").len() == 6);
    serves(&swarm, "web", 6);
    swarm.nodes.iter().for_each(|node| rotates(&swarm, node, 80, 6));
}

#[test]
fn a_worker_that_left_and_joined_again_is_no_stranger() {
    let swarm = Swarm::new(3);
    let [first, _, third] = swarm.nodes.as_slice() else { panic!("three nodes") };
    let _agents = swarm.attach();
    create(first, "web", 6, "80:8080", &[], &[]);
    serves(&swarm, "web", 6);
    third.docker(&["swarm", "leave"]);
    let listed = || first.docker(&["node", "ls", "--format", "{{.Hostname}} {{.Status}}"]);
    within(PATIENCE, "the managers miss it", || listed().contains("node3 Down"));
    third.join(first, "worker");
    within(PATIENCE, "it stands in Swarm's list twice", || {
        listed().contains("node3 Ready") && listed().contains("node3 Down")
    });
    update(first, "web", &["--force"]);
    within(PATIENCE, "tasks run on it again", || nodes_of(first, "web").contains(&"node3".to_owned()));
    serves(&swarm, "web", 6);
    // Who takes replies of the new one for late ones of the old one costs each third client a second, every time.
    for node in &swarm.nodes {
        within(PATIENCE, &format!("{} keeps its tasks for a hundred requests", node.name), || {
            let (there, before) = (offered(node, "web"), syns_repeated(&swarm.client));
            let replies = swarm.ask_often(node, 80, 102);
            if there.len() != 6 || offered(node, "web") != there {
                return false;
            }
            let tasks = by_task(&replies);
            let repeated = syns_repeated(&swarm.client) - before;
            let lost = || format!("{}: {tasks:?}, lost {}", node.name, losses(&swarm.client));
            assert_eq!(repeated, 0, "a SYN that is sent again costs its client a second: {}", lost());
            assert_eq!(tasks.len(), 6, "{}", lost());
            // A client's port that a task knows yet, from another node within the last minute, goes to the next task.
            let turns = |count: &usize| (16..=18).contains(count);
            assert!(tasks.values().all(turns), "{}", lost());
            tasks.values().all(|count| *count == 17)
        });
    }
    // Both are listed, each by a name of its own, and what is wrong with the old one is said.
    for node in &swarm.nodes {
        let document = json(&node.netns, &["node", "ls"]);
        let nodes = document["nodes"].as_array().cloned().unwrap_or_default();
        let third: Vec<_> = nodes
            .iter()
            .filter(|node| node["name"].as_str().is_some_and(|name| name.starts_with("node3")))
            .map(|node| (node["problem"].as_str().unwrap_or_default(), node["addresses"].clone()))
            .collect();
        let ours = |address: &serde_json::Value| address.to_string().contains("192.0.2.103");
        assert_eq!(third.iter().filter(|(said, at)| said.is_empty() && ours(at)).count(), 1, "{document}");
        assert_eq!(third.iter().filter(|(said, _)| said.contains("down")).count(), 1, "{document}");
        assert_eq!(third.len(), 2, "{document}");
    }
}

#[test]
fn services_side_by_side_and_ports_that_are_left_to_swarm() {
    let swarm = Swarm::new(2);
    let manager = &swarm.nodes[0];
    let agents = swarm.attach();
    create(manager, "web", 2, "80:8080", &["-p", "82:8080"], &[]);
    create(manager, "other", 3, "81:8080", &["--label", "lb.return=sideways"], &[]);
    create(manager, "names", 2, "53:5353/udp", &[], &["/bin/names", "5353"]);
    let host = "mode=host,published=83,target=8080";
    create(manager, "local", 1, "132:132/sctp", &["--publish", host], &[]);
    for (service, tasks) in [("web", 2), ("other", 3), ("names", 2)] {
        serves(&swarm, service, tasks);
    }
    for node in &swarm.nodes {
        for (port, tasks) in [(80, 2), (82, 2), (81, 3)] {
            rotates(&swarm, node, port, tasks);
        }
        // Each from a port of its own, as one exchange is one connection; lost ones are sent again.
        let names: BTreeSet<String> = (0..20)
            .filter_map(|_| {
                swarm.client.enter(|| {
                    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
                    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
                    socket.send_to(b"who\n", (node.address(), 53)).expect("send");
                    let mut buffer = [0; 64];
                    let (count, _) = socket.recv_from(&mut buffer).ok()?;
                    Some(String::from_utf8_lossy(&buffer[..count]).trim().to_owned())
                })
            })
            .collect();
        assert_eq!(names.len(), 2, "through {}: {names:?}", node.name);
        within(PATIENCE, "what is left to Swarm is listed", || {
            let listed = text(&node.netns, &["service", "ls"]);
            let line = listed.lines().find(|line| line.starts_with("local ")).unwrap_or_default().to_owned();
            line.contains("132->132/sctp (left to Swarm)") && line.contains("83->8080/tcp (host)")
        });
    }
    let log = agents[0].log();
    let said = |part: &str| log.lines().filter(|line| line.contains(part)).count();
    assert_eq!(said("service local: port 132/sctp is left to Swarm's own mesh"), 1, "{log}");
    assert_eq!(said("service other: label lb.return=sideways is neither tunnel nor direct"), 1, "{log}");
}

#[test]
fn clients_with_ipv6_are_served_where_the_gateway_bridge_has_it() {
    let swarm = Swarm::machines(2);
    let [first, second] = swarm.nodes.as_slice() else { panic!("two nodes") };
    swarm.nodes.iter().for_each(Node::make_gateway_bridge_with_v6);
    first.init();
    second.join(first, "worker");
    let _agents = swarm.attach();
    create(first, "web", 4, "80:8080", &[], &[]);
    serves(&swarm, "web", 4);
    for node in &swarm.nodes {
        rotates(&swarm, node, 80, 4);
        let answers = in_turns(4, || swarm.ask_at(node.address6(), 80, 8));
        assert!(answers.iter().all(|answer| answer.contains(&CLIENT6.to_string())), "{answers:?}");
    }
}

/// Docker's own bridge has no IPv6, and nobody made another: tasks know IPv6 clients by addresses of their nodes' pools.
#[test]
fn clients_with_ipv6_are_served_by_a_swarm_that_has_none() {
    let swarm = Swarm::new(3);
    let manager = &swarm.nodes[0];
    let _agents = swarm.attach();
    create(manager, "web", 5, "80:8080", &[&HEALTH[..], &["--update-order", "start-first"]].concat(), &[]);
    serves(&swarm, "web", 5);
    for node in &swarm.nodes {
        let answers = in_turns(5, || swarm.ask_at(node.address6(), 80, 10));
        let seen = |answer: &String| {
            let (_, seen) = answer.split_once(" saw ").unwrap_or_else(|| panic!("an answer: {answer:?}"));
            seen.trim_matches(['[', ']']).parse::<IpAddr>().expect("an address").to_canonical()
        };
        let aliases: Vec<String> = answers.iter().map(|answer| seen(answer).to_string()).collect();
        assert!(aliases.iter().all(|alias| alias.starts_with("198.19.")), "{answers:?}");
        // The task's own node knows who that is.
        let known: Vec<_> =
            swarm.nodes.iter().map(|node| json(&node.netns, &["clients"])["clients"].clone()).collect();
        let known: Vec<_> = known.iter().flat_map(|clients| clients.as_array().expect("a list")).collect();
        for alias in &aliases {
            let its =
                known.iter().find(|client| client["address"] == **alias).expect("an address that is known");
            assert_eq!(its["client"], CLIENT6.to_string(), "{alias}");
        }
        rotates(&swarm, node, 80, 5);
    }
    create(manager, "names", 5, "53:5353/udp", &[], &["/bin/names", "5353"]);
    serves(&swarm, "names", 5);
    // Behind a path of 1,280 bytes, too.
    let distant = swarm.distant(1_280);
    for (client, node) in [&swarm.client, &distant]
        .into_iter()
        .flat_map(|client| swarm.nodes.iter().map(move |node| (client, node)))
    {
        let whole = client.enter(|| files_are_whole(node.address6()));
        assert_eq!(whole, Ok(()), "through {}", node.name);
        let to = SocketAddr::new(node.address6(), 53);
        in_turns(5, || client.enter(|| (0..10).filter_map(|_| ask(to, "who?")).collect()));
        // Of what is too long for the path the first is lost while its sender is told.
        let long = [1_200, 1_200, 1_200, 1_400, 1_400, 1_400];
        let answered =
            client.enter(|| long.iter().filter(|length| ask(to, &"x".repeat(**length)).is_some()).count());
        assert!(answered >= 5, "through {}: {answered}", node.name);
    }
    manager.docker(&["service", "update", "-d", "--publish-add", "54:1/udp", "names"]);
    for node in &swarm.nodes {
        let to = SocketAddr::new(node.address6(), 54);
        let refused = || swarm.client.enter(|| refusal(to)) == Some(std::io::ErrorKind::ConnectionRefused);
        within(PATIENCE, "a task's own error reaches the client", refused);
    }
    let loads: Vec<Load> = (swarm.crowd.iter().zip(&swarm.nodes))
        .map(|(client, node)| Load::start(client, node.address6(), 1, u64::MAX))
        .collect();
    update(manager, "web", &["--force"]);
    within(PATIENCE, "the load has made its requests", || loads.iter().all(|load| load.done() >= 1_000));
    let failed: Vec<String> = loads.into_iter().flat_map(Load::stop).collect();
    assert_eq!(failed, Vec::<String>::new());
}

/// Fetches a file of five megabytes from a task, sends one to a task, and compares both with what they should be.
fn files_are_whole(at: IpAddr) -> Result<(), String> {
    let (client, big) = (client(), big());
    let url = |path: &str| format!("http://{}/{path}", SocketAddr::new(at, 80));
    let failed = |error: ureq::Error| error.to_string();
    let fetched = client.get(url("big")).call().map_err(failed)?.body_mut().read_to_vec().map_err(failed)?;
    if fetched != big {
        return Err(format!("{} bytes came of {}", fetched.len(), big.len()));
    }
    let said = client.post(url("cgi-bin/sum")).send(&big).map_err(failed)?.body_mut().read_to_string();
    let sum: String = hash(&big).iter().map(|byte| format!("{byte:02x}")).collect();
    match said.map_err(failed)? {
        said if said.starts_with(&sum) => Ok(()),
        said => Err(format!("the task has {said:?}, not {sum}")),
    }
}

/// An authority, and a certificate and key by it for an engine and its clients, in a folder as `docker` wants them.
fn certificates(folder: &Path) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().expect("a key");
    let root = params.self_signed(&key).expect("an authority");
    let authority = Issuer::new(params, key);
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    for (name, text) in [("ca", root.pem()), ("cert", certificate.pem()), ("key", key.serialize_pem())] {
        std::fs::write(folder.join(format!("{name}.pem")), text).expect("write a certificate");
    }
}

#[test]
fn the_engine_is_reached_as_the_environment_says() {
    let swarm = Swarm::machines(1);
    let node = &swarm.nodes[0];
    let folder = swarm.folder();
    certificates(folder);
    node.stop_docker();
    let file = |name: &str| {
        format!(
            "--tls{}={}",
            if name == "ca" { "cacert" } else { name },
            folder.join(format!("{name}.pem")).display()
        )
    };
    node.start_docker_with(&[
        "-H",
        "tcp://127.0.0.1:2376",
        "--tlsverify",
        &file("ca"),
        &file("cert"),
        &file("key"),
    ]);
    node.wait_for_docker();
    node.init();
    create(node, "web", 2, "80:8080", &[], &[]);
    let path = folder.to_str().expect("text");
    let variables =
        [("DOCKER_HOST", "tcp://127.0.0.1:2376"), ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", path)];
    let _agent = Agent::start(&node.netns, folder, &[], &variables);
    serves(&swarm, "web", 2);
    rotates(&swarm, node, 80, 2);
    let status = json(&node.netns, &["status"]);
    assert!(
        status["source_why"].as_str().is_some_and(|why| why.contains("tcp://127.0.0.1:2376")),
        "{status}"
    );
}

#[test]
fn a_hundred_services_at_once() {
    const SERVICES: u16 = 100;
    let swarm = Swarm::new(2);
    let manager = &swarm.nodes[0];
    let _agents = swarm.attach();
    for number in 0..SERVICES {
        create(manager, &format!("s{number}"), 1, &format!("{}:8080", 1000 + number), &[], &[]);
    }
    let start = std::time::Instant::now();
    within(PATIENCE * 10, "Docker runs all of them", || {
        let listed = manager.docker(&["service", "ls", "--format", "{{.Replicas}}"]);
        listed.lines().filter(|line| *line == "1/1").count() == usize::from(SERVICES)
    });
    println!("Docker took {:?}", start.elapsed());
    for node in &swarm.nodes {
        within(PATIENCE, "all services are served", || {
            let listed = json(&node.netns, &["service", "ls"]);
            let services = listed["services"].as_array().cloned().unwrap_or_default();
            services.iter().filter(|service| service["active_tasks"] == 1).count() == usize::from(SERVICES)
        });
        // Docker calls a container running before its server listens, and there is no other task to ask.
        for number in 0..SERVICES {
            let service = format!("s{number}");
            let what = format!("{service} answers through {}", node.name);
            succeeds(PATIENCE, &what, || {
                swarm.ask(node, 1000 + number).map_err(|error| {
                    let ours = text(&node.netns, &["service", "ps", &service]);
                    let theirs = manager.docker(&["service", "ps", "--no-trunc", &service]);
                    format!("{error}\n{ours}\n{theirs}")
                })
            });
        }
    }
}

/// The powers that packaging gives the agent, as `setpriv` takes them.
const POWERS: &str = "-all,+bpf,+net_admin,+net_raw,+perfmon";

#[test]
fn the_unit_is_in_order_and_its_powers_suffice() {
    let unit = std::fs::read_to_string(packaging("lb-userspace.service")).expect("the unit");
    let powers =
        unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("its powers");
    let named = powers.split_whitespace().map(|power| power.to_lowercase().replace("cap_", ",+"));
    assert_eq!(format!("-all{}", named.collect::<String>().replace(' ', "")), POWERS);
    let swarm = Swarm::new(2);
    // Where the unit's program is on this machine.
    let copy = swarm.folder().join("lb-userspace.service");
    let here = unit.replace("/usr/sbin/lb-userspace", agent::program().to_str().expect("text"));
    std::fs::write(&copy, here).expect("write the unit");
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&copy)
        .output()
        .expect("start systemd-analyze");
    let said = [verified.stdout, verified.stderr].concat();
    assert_eq!(String::from_utf8_lossy(&said), "");
    // A manager and a worker, adopted by themselves, with these powers alone.
    let start = || {
        let attach = |node| {
            let under =
                ["setpriv", "--no-new-privs", &format!("--bounding-set={POWERS}"), "--inh-caps=-all", "--"];
            swarm.attach_under(node, &under)
        };
        swarm.nodes.iter().map(attach).collect::<Vec<_>>()
    };
    let agents = start();
    create(&swarm.nodes[0], "web", 4, "80:8080", &[], &[]);
    serves(&swarm, "web", 4);
    agents.into_iter().for_each(|agent| agent.stop(Signal::SIGTERM));
    let _agents = start();
    serves(&swarm, "web", 4);
    swarm.nodes.iter().for_each(|node| rotates(&swarm, node, 80, 4));
    idle_connections_are_reset(&swarm);
}

/// Connections on which nobody speaks, two through each node to two tasks, are reset at both ends.
fn idle_connections_are_reset(swarm: &Swarm) {
    let labels = ["--label", "lb.idle=reset", "--label", "lb.timers.established=3"];
    create(&swarm.nodes[0], "quiet", 2, "81:8080", &labels, &[]);
    serves(swarm, "quiet", 2);
    swarm.nodes.iter().for_each(|node| rotates(swarm, node, 81, 2));
    let connect = |node: &Node| {
        let to = SocketAddr::new(node.address(), 81);
        swarm.client.enter(|| TcpStream::connect_timeout(&to, PATIENCE).expect("connect"))
    };
    let connections: Vec<_> = swarm.nodes.iter().flat_map(|node| [connect(node), connect(node)]).collect();
    // Sockets of tasks that have a client.
    let established = || -> usize {
        let containers = swarm.nodes.iter().flat_map(|node| {
            containers(node, "quiet").into_iter().map(move |container| {
                let tables = ["exec", &container, "cat", "/proc/net/tcp", "/proc/net/tcp6"];
                node.docker(&tables)
                    .lines()
                    .filter(|line| line.split_whitespace().nth(3) == Some("01"))
                    .count()
            })
        });
        containers.sum()
    };
    assert_eq!(established(), connections.len());
    for mut connection in connections {
        connection.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
        let heard = connection.read(&mut [0; 1]).map_err(|error| error.kind());
        assert_eq!(heard, Err(std::io::ErrorKind::ConnectionReset), "{connection:?}");
    }
    within(Duration::from_secs(10), "the tasks have been told too", || established() == 0);
}

#[test]
fn the_agent_runs_as_a_global_service() {
    let swarm = Swarm::new(2);
    let manager = &swarm.nodes[0];
    swarm.build_agent_image();
    let stack = std::fs::read_to_string(packaging("stack.yml")).expect("the stack");
    for (number, node) in (1..).zip(&swarm.nodes) {
        // The stack names no interface.
        node.netns.ip("route add default via 192.0.2.1 dev eth1");
        // Each engine has its root directory and its socket elsewhere here; a stack of its own is kept to the node.
        let (socket, root) = (node.docker_host(), node.root());
        let here = stack
            .replace("/var/run/docker.sock:", &format!("{}:", socket.trim_start_matches("unix://")))
            .replace("/var/lib/docker/", &format!("{}/", root.display()))
            .replace(
                "mode: global",
                &format!("mode: global\n      placement: {{constraints: [node.hostname == {}]}}", node.name),
            );
        // Docker before 23 knows neither BPF nor PERFMON.
        let here = match node.docker_version() {
            ..23 => here.replace("[BPF, NET_ADMIN, NET_RAW, PERFMON]", "[NET_ADMIN, NET_RAW, SYS_ADMIN]"),
            _ => here,
        };
        let file = swarm.folder().join(format!("stack{number}.yml"));
        std::fs::write(&file, here).expect("write the stack");
        manager.docker(&["stack", "deploy", "-c", file.to_str().expect("text"), &format!("lb{number}")]);
    }
    // Others may be silent yet.
    let attached = |node: &Node| matches!(agent::verb(&node.netns, &["status"]).status.code(), Some(0 | 5));
    for node in &swarm.nodes {
        within(PATIENCE, "the agent has attached", || attached(node));
    }
    create(manager, "web", 4, "80:8080", &[], &[]);
    serves(&swarm, "web", 4);
    swarm.nodes.iter().for_each(|node| rotates(&swarm, node, 80, 4));
    // Replaced, without a request that fails.
    let failed = under_load(&swarm, 500, || update(manager, "lb2_agent", &["--force"]));
    assert_eq!(failed, Vec::<String>::new());
    serves(&swarm, "web", 4);
    for (number, node) in (1..).zip(&swarm.nodes) {
        manager.docker(&["stack", "rm", &format!("lb{number}")]);
        within(PATIENCE, "the agent has ended", || containers(node, &format!("lb{number}_agent")).is_empty());
        let detached = agent::verb(&node.netns, &["detach", "--iface", "eth1"]);
        assert!(detached.status.success(), "{}", String::from_utf8_lossy(&detached.stderr));
    }
}
