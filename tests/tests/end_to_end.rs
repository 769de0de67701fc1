//! The agent on a cluster of namespaces: real sockets, real servers, the kernel's own stacks on every side.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use lb_tests::{
    agent::{Agent, active_tasks, json, other_xdp, outcome, text, verb},
    cluster::{CLIENT4, CLIENT6, Cluster, Task},
    netns::eventually,
    traffic::{
        Load, client, converse, echo, exchange, get, hash, hash_one_upload, listen, requests, stop_echo,
        tally, upload,
    },
};
use nix::sys::signal::Signal;

/// Two nodes, five tasks: three on the first, two on the second.
fn five_tasks() -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.receive_xdp();
    for slot in 1..=5 {
        cluster.add_nginx(&format!("web.{slot}"), usize::from(slot > 3));
    }
    cluster
}

/// Attaches to a node and waits until all its tasks are offered.
fn attach<'a>(cluster: &'a Cluster, node: usize, arguments: &[&str]) -> Agent<'a> {
    let path = cluster.folder().join("cluster.toml");
    let path = if path.exists() { path } else { cluster.write_all_running() };
    let agent = Agent::attach(&cluster.nodes[node].netns, cluster.folder(), &path, arguments);
    let tasks = cluster.tasks.len() as u64;
    eventually("all tasks are offered", || active_tasks(&cluster.nodes[node].netns, "web") == tasks);
    agent
}

/// Who answers: the task's name, without the client it saw.
fn names(answers: &[String]) -> Vec<&str> {
    answers.iter().map(|answer| answer.split(' ').next().unwrap_or_default()).collect()
}

#[test]
fn any_node_answers_and_rotation_is_exact() {
    let cluster = five_tasks();
    let agents = [attach(&cluster, 0, &[]), attach(&cluster, 1, &[])];
    for node in 0..2 {
        for address in cluster.addresses(node) {
            let answers = requests(&cluster.client, address, 10);
            let names = names(&answers);
            assert_eq!(names[..5], names[5..], "one fixed order");
            assert!(tally(&answers).values().all(|count| *count == 2), "{answers:?}");
            assert_eq!(tally(&answers).len(), 5, "{answers:?}");
            let seen: IpAddr = if address.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() };
            for (answer, task) in
                answers.iter().map(|a| (a, cluster.tasks.iter().find(|t| a.starts_with(&t.name))))
            {
                // A task of the node sees the client; one of another node, reached by snat, sees the node.
                let expected = if task.expect("a task").node == node { seen } else { address };
                assert!(answer.ends_with(&format!("saw {expected}")), "{answer}: not {expected}");
            }
        }
        let netns = &cluster.nodes[node].netns;
        assert!(outcome(netns, "forwarded_local") > 0 && outcome(netns, "forwarded_snat") > 0);
        assert_eq!(outcome(netns, "delivery_lost"), 0);
        let tasks = json(netns, &["service", "ps", "web"])["tasks"].as_array().expect("tasks").clone();
        assert_eq!(tasks.len(), 5);
        assert!(tasks.iter().all(|task| task["connections"] == 4), "{tasks:?}");
    }
    drop(agents);
}

#[test]
fn every_mode_serves_local_and_remote_tasks() {
    let cluster = five_tasks();
    for mode in ["native", "generic", "tc", "auto"] {
        let agent = attach(&cluster, 0, &["--mode", mode]);
        let status = text(&cluster.nodes[0].netns, &["status"]);
        let expected =
            if mode == "tc" { "TC alone".into() } else { format!("{} XDP", mode.replace("auto", "native")) };
        assert!(status.contains(&expected), "{status}");
        for address in cluster.addresses(0) {
            let answers = requests(&cluster.client, address, 10);
            assert!(tally(&answers).values().all(|count| *count == 2), "{mode} {address}: {answers:?}");
        }
        drop(agent);
    }
}

#[test]
fn a_hundred_megabytes_arrive_whole_both_ways() {
    // Without receive_xdp: XDP cannot send out of this veth, and TC does.
    let mut cluster = Cluster::new(2);
    let big = cluster.add_nginx("web.1", 0);
    let bytes = fs::read(cluster.folder().join("big")).expect("the big file");
    let sum = hash(&bytes);
    let tasks = cluster.add_task("up.1", 0);
    let far = cluster.add_task("up.2", 1);
    for (transmits, far_away) in [(false, false), (false, true), (true, true)] {
        if transmits {
            cluster.receive_xdp();
        }
        let task = if far_away { far } else { tasks };
        let file = cluster.file("\"80:8080\"", &[(&cluster.tasks[task], "running")]);
        let path = cluster.write(&file);
        let agent = Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &[]);
        eventually("the task is offered", || active_tasks(&cluster.nodes[0].netns, "web") == 1);
        for address in cluster.addresses(0) {
            let server = cluster.tasks[task].netns.spawn(hash_one_upload);
            cluster.wait_for_listener(task, 8080);
            let answer = cluster.client.enter(|| upload(SocketAddr::new(address, 80), &bytes));
            server.join().expect("the server");
            assert_eq!(answer, sum, "upload to {address}");
        }
        drop(agent);
    }
    let path = cluster.write(&cluster.file("\"80:8080\"", &[(&cluster.tasks[big], "running")]));
    let agent = Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &[]);
    eventually("the task is offered", || active_tasks(&cluster.nodes[0].netns, "web") == 1);
    for address in cluster.addresses(0) {
        let body = cluster.client.enter(|| {
            let url = format!("http://{}/big", SocketAddr::new(address, 80));
            let mut answer = client().get(&url).call().expect("the big file");
            answer.body_mut().with_config().limit(200_000_000).read_to_vec().expect("the big file")
        });
        assert_eq!(hash(&body), sum, "download from {address}");
    }
    drop(agent);
}

#[test]
fn iperf3_runs_both_ways() {
    let mut cluster = Cluster::new(1);
    let task = cluster.add_task("iperf.1", 0);
    cluster.start(task, |netns| {
        let mut command = netns.command("iperf3");
        command.args(["-s", "-p", "8080"]).stdout(std::process::Stdio::null());
        command
    });
    cluster.wait_for_listener(task, 8080);
    let _agent = attach(&cluster, 0, &[]);
    for address in cluster.addresses(0) {
        for direction in [None, Some("-R")] {
            let address = address.to_string();
            let mut arguments = vec!["-c", &address, "-p", "80", "-t", "1", "-J"];
            arguments.extend(direction);
            let report: serde_json::Value =
                serde_json::from_str(&cluster.client.output("iperf3", &arguments)).expect("a report");
            let received = report["end"]["sum_received"]["bytes"].as_u64().expect("bytes");
            assert!(received > 1_000_000, "{address} {direction:?}: {received} bytes");
        }
    }
}

#[test]
fn udp_is_answered_from_the_listener_both_families() {
    let (cluster, servers, path) = two_echoes();
    let agent = Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &[]);
    eventually("both tasks are offered", || active_tasks(&cluster.nodes[0].netns, "web") == 2);
    for address in cluster.addresses(0) {
        let answers: Vec<String> = cluster
            .client
            .enter(|| (0..6).map(|i| exchange(SocketAddr::new(address, 53), &format!("hello{i}"))).collect());
        let names = names(&answers);
        assert_eq!(names[..2], names[2..4]);
        assert_ne!(names[0], names[1]);
        assert!(
            answers.iter().enumerate().all(|(i, answer)| answer.contains(&format!("hello{i} "))),
            "{answers:?}"
        );
    }
    drop(agent);
    stop_echoes(&cluster, servers);
}

#[test]
fn new_connections_are_logged_by_the_kernel_when_asked_for() {
    let cluster = five_tasks();
    let agent = attach(&cluster, 0, &["--log-connections"]);
    requests(&cluster.client, cluster.addresses(0)[0], 3);
    eventually("three connections are logged", || {
        agent.log().matches("new connection to backend").count() == 3
    });
}

#[test]
fn a_connection_lives_on_past_every_renewal_of_its_next_hop() {
    let (cluster, servers, path) = two_echoes();
    for mode in ["native", "generic", "tc"] {
        let agent = Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &["--mode", mode]);
        eventually("both tasks are offered", || active_tasks(&cluster.nodes[0].netns, "web") == 2);
        // Four conversations at once, one a task and family; a next hop is renewed about every second.
        let talks: Vec<_> = cluster
            .addresses(0)
            .into_iter()
            .flat_map(|address| [address, address])
            .map(|address| {
                let to = SocketAddr::new(address, 53);
                cluster.client.spawn(move || converse(to, 12, Duration::from_millis(300)))
            })
            .collect();
        for talk in talks {
            let answers = talk.join().expect("a conversation");
            let task = answers[0].split(' ').next().expect("a name");
            assert!(answers.iter().all(|answer| answer.starts_with(task)), "{mode}: {answers:?}");
        }
        assert_eq!(outcome(&cluster.nodes[0].netns, "delivery_lost"), 0);
        drop(agent);
    }
    stop_echoes(&cluster, servers);
}

#[test]
fn jumbo_frames_travel_whole() {
    let (cluster, servers, path) = two_echoes();
    cluster.set_mtu(9000);
    let agent = Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &["--mode", "native"]);
    eventually("both tasks are offered", || active_tasks(&cluster.nodes[0].netns, "web") == 2);
    for address in cluster.addresses(0) {
        for (round, letter) in ["a", "b"].iter().enumerate() {
            // More than the four kilobytes that lie in one piece.
            let text = letter.repeat(8_000);
            let answer = cluster.client.enter(|| exchange(SocketAddr::new(address, 53), &text));
            assert!(answer.contains(&text), "round {round} to {address}: {} bytes", answer.len());
        }
    }
    assert_eq!(outcome(&cluster.nodes[0].netns, "fragment"), 0);
    drop(agent);
    stop_echoes(&cluster, servers);
}

/// Two nodes with a task each that echoes UDP on port 5353, and the cluster file that publishes it as 53.
fn two_echoes() -> (Cluster, Vec<thread::JoinHandle<()>>, PathBuf) {
    let mut cluster = Cluster::new(2);
    cluster.receive_xdp();
    let servers: Vec<_> = (1..=2)
        .map(|slot| {
            let task = cluster.add_task(&format!("echo.{slot}"), slot - 1);
            cluster.tasks[task].netns.spawn(move || echo(5353, &format!("echo.{slot}")))
        })
        .collect();
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
    let path = cluster.write(&cluster.file("\"53:5353/udp\"", &tasks));
    (cluster, servers, path)
}

fn stop_echoes(cluster: &Cluster, servers: Vec<thread::JoinHandle<()>>) {
    for (task, server) in cluster.tasks.iter().zip(servers) {
        stop_echo(&task.netns, 5353);
        server.join().expect("the server");
    }
}

#[test]
fn ten_thousand_requests_survive_scaling_five_seven_five() {
    let mut cluster = five_tasks();
    for slot in 6..=7 {
        cluster.add_nginx(&format!("web.{slot}"), slot % 2);
    }
    let states = |extra: &str| {
        let tasks: Vec<(&Task, &str)> = cluster
            .tasks
            .iter()
            .enumerate()
            .filter(|(index, _)| *index < 5 || extra != "none")
            .map(|(index, task)| (task, if index < 5 { "running" } else { extra }))
            .collect();
        cluster.write(&cluster.file("\"80:8080\"", &tasks))
    };
    let path = states("none");
    let node = &cluster.nodes[0].netns;
    let _agent = Agent::attach(node, cluster.folder(), &path, &[]);
    eventually("five tasks are offered", || active_tasks(node, "web") == 5);
    let load = Load::start(&cluster.client, cluster.nodes[0].v4().into(), 4, 10_000);
    let mut rounds = 0;
    while load.done() < 9_000 {
        states("running");
        eventually("seven tasks are offered", || active_tasks(node, "web") == 7 || load.done() >= 10_000);
        states("draining");
        eventually("five take new connections", || active_tasks(node, "web") == 5);
        // Drained first, then taken away.
        let connections = load.done() + 40;
        eventually("their connections end", || load.done() >= connections.min(10_000));
        states("none");
        eventually("five tasks are left", || tasks_shown(node) == 5);
        rounds += 1;
    }
    assert_eq!(load.finish(), Vec::<String>::new(), "after {rounds} rounds");
    assert!(rounds > 0);
}

fn tasks_shown(netns: &lb_tests::netns::Netns) -> usize {
    json(netns, &["service", "ps", "web"])["tasks"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_bad_file_is_named_by_line_and_the_last_state_stands() {
    let cluster = five_tasks();
    let agent = attach(&cluster, 0, &[]);
    let good = fs::read_to_string(cluster.folder().join("cluster.toml")).expect("the file");
    cluster.write(&good.replace("\"80:8080\"", "\"80:http\""));
    eventually("the mistake is said", || agent.log().contains("is not a port"));
    let line = 1 + good.lines().position(|line| line.starts_with("ports")).expect("ports");
    assert!(agent.log().contains(&format!("cluster.toml:{line}: ")), "{}", agent.log());
    assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 5).len(), 5);
    cluster.write(&good.replace("\"80:8080\"", "\"80:8080\", \"81:8080\""));
    eventually("the new port answers", || {
        let to = SocketAddr::new(cluster.addresses(0)[0], 81);
        cluster.client.enter(|| get(&client(), to, "/").is_ok())
    });
}

#[test]
fn an_interface_may_go_and_come_back() {
    let cluster = five_tasks();
    let agent = attach(&cluster, 0, &[]);
    let node = &cluster.nodes[0];
    let address = cluster.addresses(0)[0];
    requests(&cluster.client, address, 5);
    node.netns.ip("link del eth1");
    eventually("its end is said", || agent.log().contains("interface eth1 is gone"));
    let port = Cluster::port(&node.netns);
    cluster.lan().ip(&format!("link add {port} type veth peer name eth1 netns {}", node.netns.name()));
    cluster.lan().ip(&format!("link set {port} master lanbr up"));
    node.netns.ip(&format!("addr add {}/24 dev eth1", node.v4()));
    node.netns.ip("link set eth1 up");
    node.netns.ip(&format!("addr add {}/64 dev eth1 nodad", node.v6()));
    node.netns.ip(&format!("route add 172.18.2.0/24 via {}", cluster.nodes[1].v4()));
    node.netns.ip(&format!("route add fd18:2::/64 via {}", cluster.nodes[1].v6()));
    eventually("it is served again", || {
        agent.log().matches("served by").count() == 2 && active_tasks(&node.netns, "web") == 5
    });
    let answers = requests(&cluster.client, address, 10);
    assert!(tally(&answers).values().all(|count| *count == 2), "{answers:?}");
}

#[test]
fn a_task_whose_veth_disappears_is_said_and_left_out() {
    let mut cluster = five_tasks();
    let gone = cluster.remove_task(0);
    let path = {
        let tasks: Vec<(&Task, &str)> =
            std::iter::once(&gone).chain(&cluster.tasks).map(|task| (task, "running")).collect();
        cluster.write(&cluster.file("\"80:8080\"", &tasks))
    };
    let node = &cluster.nodes[0].netns;
    let _agent = Agent::attach(node, cluster.folder(), &path, &[]);
    eventually("five tasks are offered", || active_tasks(node, "web") == 5);
    drop(gone);
    eventually("four are left", || active_tasks(node, "web") == 4);
    let shown = text(node, &["service", "ps", "web"]);
    assert!(
        shown.lines().any(|line| line.starts_with("web.1 ") && line.contains("no port of bridge")),
        "{shown}"
    );
    let answers = requests(&cluster.client, cluster.addresses(0)[0], 8);
    assert!(tally(&answers).values().all(|count| *count == 2), "{answers:?}");
}

#[test]
fn the_datapath_goes_on_without_its_controller_and_is_adopted() {
    let cluster = five_tasks();
    let node = &cluster.nodes[0].netns;
    let address = cluster.addresses(0)[0];
    let agent = attach(&cluster, 0, &[]);
    let load = Load::start(&cluster.client, address, 2, u64::MAX);
    eventually("load", || load.done() > 200);
    agent.stop(Signal::SIGKILL);
    let status = text(node, &["status"]);
    assert!(status.contains("none; the datapath goes on"), "{status}");
    let done = load.done();
    eventually("traffic goes on", || load.done() > done + 500);
    // Verbs that read need no controller.
    assert!(text(node, &["service", "ls"]).contains("5/5"));
    assert!(text(node, &["node", "ls"]).contains("node1 *"));
    // What changed meanwhile is made up for, without losing a connection.
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().skip(1).map(|task| (task, "running")).collect();
    let all: Vec<(&Task, &str)> = std::iter::once((&cluster.tasks[0], "draining")).chain(tasks).collect();
    cluster.write(&cluster.file("\"80:8080\"", &all));
    let agent = Agent::attach(node, cluster.folder(), &cluster.folder().join("cluster.toml"), &[]);
    assert!(agent.log().contains("adopted the running datapath"), "{}", agent.log());
    eventually("four take new connections", || active_tasks(node, "web") == 4);
    let done = load.done();
    eventually("traffic goes on", || load.done() > done + 500);
    assert_eq!(load.stop(), Vec::<String>::new());
}

#[test]
fn connections_that_others_carry_survive_attach_and_detach() {
    let cluster = five_tasks();
    let node = &cluster.nodes[0];
    let (ready, listening) = std::sync::mpsc::channel();
    // On the node itself, as Swarm's own mesh is.
    let server = node.netns.spawn(move || {
        let listener = listen("0.0.0.0:80");
        ready.send(()).expect("somebody waits");
        let (mut stream, _) = listener.accept().expect("a client");
        let mut words = [0; 4];
        while stream.read_exact(&mut words).is_ok() {
            stream.write_all(&words).expect("answer");
        }
    });
    listening.recv().expect("a server");
    let to = SocketAddr::new(node.v4().into(), 80);
    let mut stream = cluster.client.enter(|| TcpStream::connect(to)).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut exchange = |what: &str| {
        stream.write_all(b"here").expect(what);
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).expect(what);
        assert_eq!(&answer, b"here", "{what}");
    };
    exchange("before");
    let agent = attach(&cluster, 0, &[]);
    exchange("attached");
    assert_eq!(tally(&requests(&cluster.client, node.v4().into(), 10)).len(), 5);
    exchange("while new ones are ours");
    drop(agent);
    exchange("detached");
    drop(stream);
    server.join().expect("the server");
}

#[test]
fn detach_leaves_nothing() {
    let cluster = five_tasks();
    let node = &cluster.nodes[0].netns;
    let agent = attach(&cluster, 0, &[]);
    let pid = agent.pid();
    let ids = kernel_objects(pid);
    assert!(
        ids.iter().any(|id| id.starts_with("prog")) && ids.iter().any(|id| id.starts_with("map")),
        "{ids:?}"
    );
    let held = verb(node, &["detach", "--iface", "eth1"]);
    assert_eq!(held.status.code(), Some(4), "a running controller's datapath is not taken away");
    assert!(String::from_utf8_lossy(&held.stderr).contains(&format!("process {pid}")));
    agent.stop(Signal::SIGTERM);
    assert_eq!(verb(node, &["status"]).status.code(), Some(5), "kept on exit, without a controller");
    assert!(verb(node, &["detach", "--iface", "eth1"]).status.success());
    assert_eq!(verb(node, &["status"]).status.code(), Some(3));
    eventually("programs and maps are gone", || ids.iter().all(|id| !exists(id)));
    assert_eq!(node.output("tc", &["qdisc", "show", "dev", "eth1"]).matches("clsact").count(), 0);
    assert!(!node.output("ip", &["-d", "link", "show", "eth1"]).contains("xdp"));
    let refused = cluster.client.enter(|| get(&client(), SocketAddr::new(cluster.addresses(0)[0], 80), "/"));
    assert!(refused.is_err(), "{refused:?}");
}

#[test]
fn filters_serve_where_the_kernel_has_no_links() {
    let cluster = five_tasks();
    let node = &cluster.nodes[0].netns;
    let path = cluster.write_all_running();
    // The ways to the tasks are known from the start: filters come before the uplink is attached.
    for task in cluster.tasks.iter().filter(|task| task.node == 0) {
        node.enter(|| TcpStream::connect((task.v4, 8080)).expect("connect"));
    }
    let attach = || {
        let agent = Agent::attach_with(
            node,
            cluster.folder(),
            &path,
            &[],
            &[("LB_TEST", "1"), ("LB_KERNEL_LACKS", "tcx")],
        );
        eventually("all tasks are offered", || active_tasks(node, "web") == 5);
        assert!(agent.log().contains("(clsact)"), "{}", agent.log());
        for address in cluster.addresses(0) {
            let answers = requests(&cluster.client, address, 10);
            assert!(tally(&answers).values().all(|count| *count == 2), "{answers:?}");
        }
        agent
    };
    attach().stop(Signal::SIGKILL);
    // Adopted: the same filters, not more of them.
    let agent = attach();
    let filters = node.output("tc", &["filter", "show", "dev", "eth1", "ingress"]);
    assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
    let veths = node.output("tc", &["qdisc", "show"]);
    for veth in veths.lines().filter_map(|line| line.split("dev ").nth(1)?.split(' ').next()) {
        let filters = node.output("tc", &["filter", "show", "dev", veth, "ingress"]);
        assert!(filters.matches("direct-action").count() <= 1, "{veth}: {filters}");
    }
    agent.stop(Signal::SIGTERM);
    assert!(verb(node, &["detach", "--iface", "eth1"]).status.success());
    assert_eq!(node.output("tc", &["qdisc", "show"]).matches("clsact").count(), 0);
}

/// The kernel's numbers of the programs and maps that a process holds, as its descriptors tell.
fn kernel_objects(pid: i32) -> Vec<String> {
    let folder = format!("/proc/{pid}/fdinfo");
    let mut ids = Vec::new();
    for entry in fs::read_dir(folder).expect("descriptors").flatten() {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        for key in ["prog_id", "map_id"] {
            if let Some(id) = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')) {
                ids.push(format!("{} {}", key.trim_end_matches("_id"), id.trim()));
            }
        }
    }
    ids
}

fn exists(object: &str) -> bool {
    let (kind, id) = object.split_once(' ').expect("a kind and a number");
    let id: u32 = id.parse().expect("a number");
    match kind {
        "prog" => aya::programs::loaded_programs().flatten().any(|program| program.id() == id),
        _ => aya::maps::loaded_maps().flatten().any(|map| map.id() == id),
    }
}

#[test]
fn mistakes_are_said_with_the_next_step() {
    let cluster = five_tasks();
    let node = &cluster.nodes[0].netns;
    let path = cluster.write_all_running();
    let path = path.to_str().expect("a plain path");
    let says = |arguments: &[&str], code: i32, part: &str| {
        let output = verb(node, arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(part), "{arguments:?}: {errors}");
    };
    says(&["attach", "--iface", "eth7", "--cluster", path], 1, "there is no interface eth7");
    says(
        &["attach", "--iface", "eth1", "--cluster", "/nonexistent.toml"],
        1,
        "read cluster file /nonexistent.toml",
    );
    says(&["attach", "--iface", "eth1", "--source", "file"], 2, "--cluster");
    says(
        &["attach", "--iface", "eth1", "--source", "docker", "--cluster", path],
        1,
        "--source docker has no use for --cluster",
    );
    says(&["attach", "--iface", "eth1", "--peer-timeout", "soon"], 2, "write it like");
    says(&["attach", "--iface", "eth1", "--cluster", path, "--snat-ports", "9"], 2, "range of ports");
    says(&["status"], 3, "no datapath is attached");
    says(&["detach", "--iface", "eth1"], 3, "no datapath is attached to eth1");
    says(&["service", "ls"], 3, "attach");
    let agent = attach(&cluster, 0, &[]);
    says(&["attach", "--iface", "eth1", "--cluster", path], 4, &format!("process {}", agent.pid()));
    says(&["service", "ps", "nothing"], 1, "there is no service nothing");
    agent.stop(Signal::SIGTERM);
    says(
        &["attach", "--iface", "eth1", "--cluster", path, "--max-connections", "1000"],
        1,
        "--max-connections 1000: the datapath that runs has 262144",
    );
    assert!(verb(node, &["detach", "--iface", "eth1"]).status.success());
    // Without its capabilities the agent says which it needs.
    let mut command = node.command("setpriv");
    command.args(["--bounding-set=-bpf,-sys_admin,-net_admin,-perfmon", "--inh-caps=-all"]);
    // Who is not refused would serve for ever.
    command.args(["timeout", "60"]).arg(lb_tests::agent::program());
    command.args(["attach", "--iface", "eth1", "--cluster", path]);
    let output = command.output().expect("start setpriv");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("CAP_BPF"), "{errors}");
    // In a mount namespace without bpffs the agent says how to mount one.
    let script = format!(
        "while umount -l /sys/fs/bpf 2> /dev/null; do :; done; exec timeout 60 {} attach --iface eth1 --cluster {path}",
        lb_tests::agent::program().display()
    );
    let output =
        node.command("unshare").args(["--mount", "sh", "-c", &script]).output().expect("start unshare");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("mount -t bpf bpf /sys/fs/bpf"), "{errors}");
}

#[test]
fn another_xdp_program_on_the_uplink_makes_way_for_tc() {
    let cluster = five_tasks();
    let other = other_xdp(&cluster.nodes[0].netns);
    let agent = attach(&cluster, 0, &[]);
    assert!(agent.log().contains("served by TC alone"), "{}", agent.log());
    assert!(agent.log().contains("another XDP program holds the interface"), "{}", agent.log());
    let answers = requests(&cluster.client, cluster.addresses(0)[0], 10);
    assert!(tally(&answers).values().all(|count| *count == 2), "{answers:?}");
    drop(agent);
    drop(other);
}

#[test]
fn vlan_interfaces_on_an_offloading_uplink_make_way_for_tc() {
    let cluster = five_tasks();
    let node = &cluster.nodes[0].netns;
    // Not every kernel has VLAN interfaces; what is above the uplink is then not there to be noticed either.
    if !node
        .command("ip")
        .args(["link", "add", "link", "eth1", "name", "eth1.7", "type", "vlan", "id", "7"])
        .status()
        .is_ok_and(|s| s.success())
    {
        let agent = attach(&cluster, 0, &[]);
        assert!(agent.log().contains("served by native XDP"), "{}", agent.log());
        return;
    }
    let agent = attach(&cluster, 0, &[]);
    assert!(agent.log().contains("rxvlan off"), "{}", agent.log());
    assert!(agent.log().contains("served by TC alone"), "{}", agent.log());
}

#[test]
fn agents_in_many_namespaces_keep_apart() {
    let cluster = five_tasks();
    let first = attach(&cluster, 0, &[]);
    let second = attach(&cluster, 1, &[]);
    drop(first);
    assert_eq!(verb(&cluster.nodes[0].netns, &["status"]).status.code(), Some(3));
    let answers = requests(&cluster.client, cluster.addresses(1)[0], 5);
    assert_eq!(tally(&answers).len(), 5);
    drop(second);
}
