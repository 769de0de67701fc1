//! What is said of packets before they come, and of connections that there are: `explain` and `connections`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpStream},
};

use aya::maps::{Array, Map, MapData};
use lb_common::{
    abi::{Config, TC_ALONE, table},
    budget::Budget,
    conntrack::line::ALIAS,
    outcome::Outcome,
    tunnel::PeerKey,
};
use lb_tests::{
    agent::{Agent, active_tasks, outcome, text, verb},
    cluster::{Cluster, Reach},
    lab::{ConnectionState, Lab, REDIRECT, SHOT, UNSPEC, ip, service, task, with_lab},
    netns::{Netns, eventually},
    packet::{ACK, Packet, SYN, SYN_ACK, Transport},
    talk::{CLIENT, FIRST, LISTENER, TASK_FIRST, answer, establish, request, segment, services, slot},
    traffic::{request_over, requests},
};
use lb_userspace::{
    cluster::{Access, Prefer, Protocol, Via},
    datapath::{Counters, PinDir, TableSet, Tools, Verdict},
    explain::{Explanation, Question, explain},
    inventory::Inventory,
};
use serde_json::Value;

/// Everything that a packet may change.
#[derive(Clone, Debug, PartialEq)]
struct Everything {
    connections: ConnectionState,
    counters: Counters,
    cursors: Vec<u64>,
    config: Config,
    guard: (u32, u64),
    keys: Vec<PeerKey>,
    budgets: Vec<Budget>,
}

/// The entries of a pinned array.
fn array<T: aya::Pod>(name: &str) -> Vec<T> {
    let pin = PinDir::of("eth1").expect("the pins").table(name);
    let map = Map::from_map_data(MapData::from_pin(pin).expect("the table")).expect("a table");
    let array: Array<MapData, T> = map.try_into().expect("an array");
    array.iter().map(|entry| entry.expect("an entry")).collect()
}

fn everything(lab: &Lab) -> Everything {
    let set = TableSet::of("eth1").expect("the tables");
    let (guard, placed) = set.guard().expect("the guard");
    Everything {
        connections: lab.connection_state(),
        counters: lab.counters(),
        cursors: array(table::CURSORS),
        config: set.config().expect("the configuration"),
        guard: (guard.switches, placed),
        keys: array(table::PEER_KEYS),
        budgets: array(table::ERROR_BUDGETS),
    }
}

fn ask(protocol: Protocol, client: (&str, u16), listener: (&str, u16), established: bool) -> Explanation {
    let [client, listener] = [client, listener].map(|(address, port)| SocketAddr::new(ip(address), port));
    let question = Question { protocol, client, listener, established, through: None };
    let set = TableSet::of("eth1").expect("the tables");
    let inventory = Inventory::read("eth1", &set).expect("the inventory");
    explain(&inventory, &set, &question).unwrap_or_else(|error| panic!("{error}"))
}

/// What an explanation says of a step.
fn said<'a>(explanation: &'a Explanation, step: &str) -> &'a str {
    explanation.steps.iter().find(|told| told.step == step).map_or("", |told| &told.text)
}

/// The task of a client port's connection.
fn task_of(lab: &Lab, port: u16) -> Option<String> {
    let lines = lab.lines().into_iter();
    let mut its =
        lines.filter(|(_, control, line)| !control.has(ALIAS) && line.tuple.source_port.get() == port);
    its.next().map(|(.., line)| lab.task_of(line.backend))
}

#[test]
fn what_is_explained_is_what_then_happens_and_nothing_changes_before() {
    let mut all = services();
    let far = task("far.1", false, Via::Peer, &["10.0.1.9"]);
    all.push(service("far", &["84:8084"], vec![far]));
    all.push(service("empty", &["85:8085"], vec![]));
    let closed = task("closed.1", false, Via::Peer, &["10.0.1.10"]);
    all.push(lb_userspace::cluster::Service {
        prefer: Prefer::LocalOnly,
        ..service("closed", &["86:8086"], vec![closed])
    });
    all.push(lb_userspace::cluster::Service {
        access: Access { allow: Some(vec!["203.0.113.0/24".parse().expect("a range")]), deny: vec![] },
        ..service("shut", &["87:8087"], vec![task("shut.1", true, Via::Snat, &["172.18.0.17"])])
    });
    with_lab(all, |lab| {
        lab.configure(|config| config.flags = TC_ALONE);
        // Client port, protocol, published port, whether it is said to be established, at which address.
        let cases: [(u16, bool, u16, bool, &str, Outcome); 14] = [
            (41_001, true, 80, false, LISTENER, Outcome::Local),
            (41_002, true, 80, false, LISTENER, Outcome::Local),
            (41_003, true, 80, false, LISTENER, Outcome::Local),
            (41_004, false, 53, false, LISTENER, Outcome::Local),
            (41_005, true, 81, false, LISTENER, Outcome::Routed),
            (41_006, true, 82, false, LISTENER, Outcome::Snat),
            (41_007, true, 84, false, LISTENER, Outcome::Peer),
            (41_008, true, 85, false, LISTENER, Outcome::NoBackend),
            (41_009, true, 86, false, LISTENER, Outcome::Reset),
            (41_010, true, 87, false, LISTENER, Outcome::Denied),
            (41_011, true, 80, true, LISTENER, Outcome::NoConnection),
            (41_012, true, 99, false, LISTENER, Outcome::NotOurs),
            (41_013, true, 80, false, "192.0.2.77", Outcome::NotOurs),
            (41_014, false, 99, false, LISTENER, Outcome::NotOurs),
        ];
        let mut tasks = Vec::new();
        for (port, is_tcp, to, established, at, wanted) in cases {
            let protocol = if is_tcp { Protocol::Tcp } else { Protocol::Udp };
            let before = everything(lab);
            let said = ask(protocol, (CLIENT, port), (at, to), established);
            if port == 41_001 {
                assert_eq!(said, ask(protocol, (CLIENT, port), (at, to), established), "it takes no turn");
            }
            assert_eq!(everything(lab), before, "{said:?}");
            assert_eq!(said.outcome, Some(wanted.name()), "{said:?}");
            let transport = match (is_tcp, established) {
                (false, _) => Transport::Udp,
                (true, true) => ACK,
                (true, false) => SYN,
            };
            let packet = Packet::new(transport, (ip(CLIENT), port), (ip(at), to));
            let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&packet.bytes()));
            assert_eq!(counted, BTreeMap::from([(wanted, 1)]), "{said:?}");
            let action = match said.verdict {
                Verdict::Forwarded => REDIRECT,
                Verdict::Dropped => SHOT,
                Verdict::Passed => UNSPEC,
            };
            assert_eq!(verdict.action, action, "{said:?}");
            assert_eq!(task_of(lab, port), said.task, "{said:?}");
            assert!(
                !said.steps.is_empty() && said.steps.iter().all(|told| !told.text.is_empty()),
                "{said:?}"
            );
            tasks.extend(said.task);
        }
        assert_eq!(tasks[..2].iter().collect::<BTreeSet<_>>().len(), 2, "tasks take turns: {tasks:?}");
    });
}

#[test]
fn each_step_says_what_decides_there_and_what_to_do() {
    let mut all = services();
    all[0].access = Access { allow: None, deny: vec!["198.51.100.66/32".parse().expect("a range")] };
    all.push(service("far", &["84:8084"], vec![task("far.1", false, Via::Peer, &["10.0.1.9"])]));
    with_lab(all, |lab| {
        lab.configure(|config| config.flags = TC_ALONE);
        let tcp = |client: (&str, u16), listener: (&str, u16)| ask(Protocol::Tcp, client, listener, false);
        let open = tcp((CLIENT, 41_001), (LISTENER, 80));
        assert!(said(&open, "listener").ends_with("80/tcp of web: 2 tasks take new connections"), "{open:?}");
        assert!(said(&open, "access").contains("198.51.100.7 may connect: 0.0.0.0/0 is allowed"), "{open:?}");
        assert!(said(&open, "choice").contains("whose turn it is"), "{open:?}");
        assert!(said(&open, "rewrite").contains("destination 192.0.2.1:80 becomes 172.18.0.1"), "{open:?}");
        assert_eq!(said(&open, "end"), "delivered to the task");
        let denied = tcp(("198.51.100.66", 41_001), (LISTENER, 80));
        assert!(
            said(&denied, "access").contains("may not connect: 198.51.100.66/32 is denied"),
            "{denied:?}"
        );
        assert!(denied.next.as_deref().is_some_and(|next| next.contains("lb.deny")), "{denied:?}");
        assert_eq!((denied.verdict, denied.service.as_deref()), (Verdict::Dropped, Some("web")));
        lab.update(|cluster| cluster.denied = vec!["203.0.113.0/28".parse().expect("a range")]);
        let denied = tcp(("203.0.113.9", 41_001), (LISTENER, 80));
        assert!(
            said(&denied, "access").contains("may not connect: no service takes 203.0.113.0/28"),
            "{denied:?}"
        );
        assert!(denied.next.as_deref().is_some_and(|next| next.contains("lb.cluster.deny")), "{denied:?}");
        assert_eq!(denied.verdict, Verdict::Dropped);
        let elsewhere = tcp((CLIENT, 41_001), ("192.0.2.77", 80));
        assert!(
            said(&elsewhere, "listener").contains("the port is served on 192.0.2.1, 2001:db8::1"),
            "{elsewhere:?}"
        );
        assert!(elsewhere.next.as_deref().is_some_and(|next| next.contains("--address 192.0.2.77")));
        let nobody = tcp((CLIENT, 41_001), (LISTENER, 99));
        assert!(said(&nobody, "filter").contains("nobody publishes port 99/tcp"), "{nobody:?}");
        let far = tcp((CLIENT, 41_001), (LISTENER, 84));
        assert!(said(&far, "way").starts_with("through the tunnel to node2"), "{far:?}");
        assert!(
            said(&far, "mtu").contains("1440 bytes go through the tunnel; the MSS of 1460 becomes 1400"),
            "{far:?}"
        );
        assert!(said(&far, "rewrite").contains("in Geneve from 192.0.2.1 to 192.0.2.2"), "{far:?}");
        let next =
            "on node2: lb-userspace explain tcp 198.51.100.7:41001 192.0.2.1:84 --through node1 --task far.1";
        assert_eq!(far.next.as_deref(), Some(next));
        let six = tcp(("2001:db8:9::9", 41_001), ("2001:db8::1", 84));
        assert_eq!((six.outcome, six.task.as_deref()), (Some("no_backend"), None), "{six:?}");

        // A SYN that nobody has answered is asked about again, and would go to the next task.
        let asked = lab.uplink_tc(&request(SYN, 42_000, 80).at(FIRST, 0).bytes());
        assert_eq!(asked.action, REDIRECT);
        let first = task_of(lab, 42_000).expect("a task");
        let again = tcp((CLIENT, 42_000), (LISTENER, 80));
        assert!(said(&again, "packet").starts_with("a SYN"), "{again:?}");
        assert!(said(&again, "connection").starts_with(&format!("half_open, with {first}")), "{again:?}");
        assert_ne!(again.task.as_deref(), Some(first.as_str()), "{again:?}");
        assert!(said(&again, "choice").contains("whose turn it is"), "{again:?}");

        // A connection that is open keeps its task, whoever's turn it is.
        lab.configure(|config| config.flags = 0);
        let task = format!("web.{}", establish(lab, 42_001));
        lab.configure(|config| config.flags = TC_ALONE);
        let known = tcp((CLIENT, 42_001), (LISTENER, 80));
        assert_eq!(known.task.as_deref(), Some(task.as_str()), "{known:?}");
        assert!(said(&known, "connection").starts_with(&format!("established, with {task}")), "{known:?}");
        assert!(said(&known, "choice").contains("its connection's"), "{known:?}");
        assert!(said(&known, "packet").starts_with("a segment of an open connection"), "{known:?}");
        let families = Question {
            protocol: Protocol::Tcp,
            client: "198.51.100.7:1".parse().expect("an address"),
            listener: "[2001:db8::1]:80".parse().expect("an address"),
            established: false,
            through: None,
        };
        let set = TableSet::of("eth1").expect("the tables");
        let inventory = Inventory::read("eth1", &set).expect("the inventory");
        let error = explain(&inventory, &set, &families).expect_err("of two families").to_string();
        assert!(error.contains("not of one family"), "{error}");
    });
}

/// Two nodes that reach each other through the tunnel, two tasks on the first, one on the second.
fn three_tasks() -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.reach = Reach::PEERS;
    cluster.receive_xdp();
    for (name, node) in [("web.1", 0), ("web.2", 0), ("web.3", 1)] {
        cluster.add_nginx(name, node);
    }
    cluster
}

fn attach(cluster: &Cluster) -> Vec<Agent<'_>> {
    let path = cluster.write_all_running();
    let agents: Vec<_> =
        cluster.nodes.iter().map(|node| Agent::attach(&node.netns, cluster.folder(), &path, &[])).collect();
    for node in &cluster.nodes {
        eventually("all tasks are offered", || active_tasks(&node.netns, "web") == 3);
    }
    agents
}

/// What a verb prints as JSON.
fn explained(netns: &Netns, words: &[&str]) -> Value {
    serde_json::from_str(&text(netns, &[words, &["-o", "json"]].concat())).expect("a document")
}

#[test]
fn the_next_client_gets_the_task_that_was_named_and_each_node_says_its_part() {
    let cluster = three_tasks();
    let _agents = attach(&cluster);
    let [first, second] = [&cluster.nodes[0].netns, &cluster.nodes[1].netns];
    let mut tasks = BTreeSet::new();
    for address in cluster.addresses(0) {
        let client = if address.is_ipv4() { "192.0.2.10" } else { "2001:db8:1::10" };
        let listener = SocketAddr::new(address, 80).to_string();
        for _ in 0..3 {
            let document = explained(first, &["explain", "tcp", client, &listener]);
            let explanation = &document["explanation"];
            let task =
                explanation["task"].as_str().unwrap_or_else(|| panic!("no task: {document:#}")).to_owned();
            let answer = requests(&cluster.client, address, 1);
            assert!(answer[0].starts_with(&format!("{task} ")), "{answer:?} is by {document:#}");
            if let Some(next) = explanation["next"].as_str() {
                let words = next.strip_prefix("on node2: lb-userspace ").expect("a verb for the other node");
                let words: Vec<&str> = words.split(' ').collect();
                let there = explained(second, &words);
                let there = &there["explanation"];
                assert_eq!(there["outcome"], "forwarded_local", "{there:#}");
                assert_eq!(there["task"], task.as_str(), "{there:#}");
            }
            tasks.insert(task);
        }
    }
    assert_eq!(tasks.len(), 3);
    // Who says that another node has sent it, without that node's key or for a task that is not here, is told so.
    let words = ["explain", "tcp", "192.0.2.10", "192.0.2.101:80", "--through", "node1", "--task", "web.1"];
    let output = verb(second, &words);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("this node has no task web.1"), "{error}");
    let said = text(first, &["explain", "tcp", "192.0.2.10", "192.0.2.101:81"]);
    assert!(said.starts_with("PASSED TO THE HOST (not_ours)\n") && said.contains("Next: "), "{said}");
    let before = outcome(first, "not_ours");
    text(first, &["explain", "tcp", "192.0.2.10", "192.0.2.101:81"]);
    assert_eq!(outcome(first, "not_ours"), before, "nothing is counted");
}

/// A connection that stays open, after one request over it.
fn hold(client: &Netns, to: SocketAddr) -> TcpStream {
    client.enter(|| {
        let mut stream = TcpStream::connect(to).expect("connect");
        request_over(&mut stream).expect("an answer");
        stream
    })
}

/// The connections of a node that some filters choose.
fn listed(netns: &Netns, filters: &[&str]) -> Vec<Value> {
    let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
    let words: Vec<&str> = ["connections", "-o", "json"].into_iter().chain(filters).collect();
    let lines = text(netns, &words);
    lines.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect()
}

#[test]
fn connections_are_listed_counted_and_ended_and_no_others() {
    let cluster = three_tasks();
    let _agents = attach(&cluster);
    let [first, second] = [&cluster.nodes[0].netns, &cluster.nodes[1].netns];
    let mut streams = Vec::new();
    for address in cluster.addresses(0) {
        for _ in 0..3 {
            streams.push(hold(&cluster.client, SocketAddr::new(address, 80)));
        }
    }
    let of = |stream: &TcpStream| stream.local_addr().expect("an address").to_string();
    let mine: BTreeSet<String> = streams.iter().map(of).collect();
    let all = listed(first, &["service=web", "state=established"]);
    let clients: BTreeSet<String> =
        all.iter().filter_map(|row| row["client"].as_str().map(str::to_owned)).collect();
    assert_eq!(clients, mine, "{all:?}");
    for row in &all {
        let client = row["client"].as_str().expect("a client");
        let task = row["task"].as_str().expect("a task");
        assert_eq!(row["via"], if task == "web.3" { "peer" } else { "local" }, "{row}");
        assert_eq!((row["from"].is_null(), row["protocol"].as_str()), (true, Some("tcp")), "{row}");
        assert!(row["expires_seconds"].as_u64().is_some_and(|left| (7_000..=7_440).contains(&left)), "{row}");
        let [one] = listed(first, &[&format!("client={client}")])[..].to_vec().try_into().expect("one");
        let one: Value = one;
        assert_eq!((&one["task"], &one["listener"]), (&row["task"], &row["listener"]));
    }
    // The same connections on the task's node, which knows by whom they come.
    let there = listed(second, &["from=node1", "state!=half-open"]);
    assert_eq!(there.len(), all.iter().filter(|row| row["task"] == "web.3").count(), "{there:?}");
    let count = |filters: &[&str]| {
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        let words: Vec<&str> = ["connections", "--count"].into_iter().chain(filters).collect();
        text(first, &words).trim().parse::<usize>().expect("a number")
    };
    assert_eq!(count(&["service=web", "state=established"]), 6);
    assert_eq!(count(&["client=192.0.2.0/24", "state=established"]), 3);
    assert_eq!(count(&["listener=:81"]), 0);
    let table = text(first, &["connections", "--filter", "state=established"]);
    assert!(table.starts_with("PROTOCOL ") && table.lines().count() == 7, "{table}");
    let tasks = text(first, &["connections", "--filter", "state=established", "--format", "{{.Task}}"]);
    assert_eq!(tasks.lines().collect::<BTreeSet<_>>(), BTreeSet::from(["web.1", "web.2", "web.3"]));

    // Nobody is asked where there is no terminal.
    let output = verb(first, &["connections", "--filter", "task=web.1", "--kill"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("would be ended; add --force"), "{error}");
    assert_eq!(count(&["service=web", "state=established"]), 6);
    let doomed: BTreeSet<String> = all
        .iter()
        .filter(|row| row["task"] != "web.2")
        .filter_map(|row| row["client"].as_str().map(str::to_owned))
        .collect();
    let words =
        ["connections", "--filter", "task!=web.2", "--filter", "state=established", "--kill", "--force"];
    let said = text(first, &words);
    assert!(said.starts_with("4 connections ended, 6 ends told by resets"), "{said}");
    assert!(said.contains("do the same on node2"), "{said}");
    for stream in &mut streams {
        let ended = doomed.contains(&of(stream));
        match request_over(stream) {
            Ok(answer) => assert!(!ended && answer.contains("web.2"), "{answer}"),
            Err(error) => {
                let reset = matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
                assert!(ended && reset, "{error}");
            }
        }
    }
    assert_eq!(count(&["service=web", "state=established"]), 2);
    let said = text(second, &["connections", "--filter", "from=node1", "--kill", "--force"]);
    assert!(said.contains(" ended, "), "{said}");
    eventually("nothing of them is left", || listed(second, &["state=established"]).is_empty());
    assert_eq!(
        text(first, &["connections", "--filter", "task=web.9", "--kill"]),
        "no connection matches the filters\n"
    );
}

#[test]
fn what_a_line_says_is_what_is_listed() {
    with_lab(services(), |lab| {
        let to = slot(&lab.delivered_to(&request(SYN, 40_001, 80).at(FIRST, 0)));
        lab.task_tc(&answer(SYN_ACK, to, 8080, 40_001).at(TASK_FIRST, FIRST + 1).bytes());
        lab.delivered_to(&segment(ACK, 40_001, 80, 0));
        lab.delivered_to(&request(SYN, 40_002, 80).at(FIRST, 0));
        lab.delivered_to(&request(Transport::Udp, 40_003, 53));
        let set = TableSet::of("eth1").expect("the tables");
        let inventory = Inventory::read("eth1", &set).expect("the inventory");
        let names = lb_userspace::connection::Names::of(&inventory, Config::default(), &[]);
        let mut states = BTreeMap::new();
        let tools = Tools::of(&set).expect("the programs");
        set.each_connection(&inventory.tables, &tools, |seen, _| {
            let connection = names.connection(seen);
            states.insert(connection.client.port(), (connection.protocol, connection.state));
            assert_eq!(connection.client.ip(), ip(CLIENT));
            assert_eq!(connection.listener.ip(), IpAddr::from([192, 0, 2, 1]));
            Ok::<_, lb_userspace::datapath::DatapathError>(())
        })
        .expect("the connections");
        let wanted = [
            (40_001, (Protocol::Tcp, "established")),
            (40_002, (Protocol::Tcp, "half_open")),
            (40_003, (Protocol::Udp, "one_way")),
        ];
        assert_eq!(states, BTreeMap::from(wanted));
    });
}
