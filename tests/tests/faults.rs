//! Faults made on purpose, while every request and every packet is counted: programs swapped under load, controllers
//! killed while the cluster changes, nodes that disappear.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    process::Stdio,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use lb_common::abi::Mode;
use lb_tests::{
    agent::{self, Agent, active_tasks, json, offered, outcome},
    cluster::{Cluster, Node, Reach, Task},
    netns::{Netns, Running, eventually, within},
    traffic::{Load, Paced, echo, repeated, requests, segments, stop_echo, tally},
};
use lb_userspace::{
    datapath::{ConnectionLog, Datapath, Sizes},
    plan::Role,
};
use nix::sys::signal::Signal;

const PEERS: Reach = Reach::PEERS;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Attaches to every node, and waits until all tasks are offered by each.
fn attach<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Vec<Agent<'a>> {
    let path = cluster.folder().join("cluster.toml");
    let start = |node: &'a Node| Agent::attach(&node.netns, cluster.folder(), &path, arguments);
    let agents = cluster.nodes.iter().map(start).collect();
    for node in &cluster.nodes {
        let all = || active_tasks(&node.netns, "web") == cluster.tasks.len() as u64;
        within(PATIENCE, "all tasks are offered", all);
    }
    agents
}

/// A task's UDP echo on port 5353, which answers with the task's name.
fn start_echo(task: &Task) -> JoinHandle<()> {
    let name = task.name.clone();
    task.netns.spawn(move || echo(5353, &name))
}

/// A task with iperf3 on port 8080 and a UDP echo on 5353, published as 80 and 53.
fn measured_task() -> (Cluster, JoinHandle<()>) {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    let task = cluster.add_task("web.1", 0);
    cluster.start(task, |netns| {
        let mut command = netns.command("iperf3");
        command.args(["-s", "-p", "8080"]).stdout(Stdio::null());
        command
    });
    cluster.wait_for_listener(task, 8080);
    let server = start_echo(&cluster.tasks[task]);
    cluster.write(&cluster.file("\"80:8080\", \"53:5353/udp\"", &[(&cluster.tasks[task], "running")]));
    (cluster, server)
}

/// Swaps every program of a node's datapath so many times, each time for another copy of itself, as adoption does; `pace`
/// is called between the rounds.
fn swap(node: &Netns, mode: Mode, rounds: u32, mut pace: impl FnMut() + Send) {
    node.enter(|| {
        let mut datapath =
            Datapath::open("eth1", &Sizes::default(), ConnectionLog::Off).unwrap_or_else(failed);
        assert!(datapath.adopted());
        let mut spare = datapath.load_programs(ConnectionLog::Off).unwrap_or_else(failed);
        let (uplink, attached) = datapath.attached().expect("it is attached");
        assert_eq!(attached, mode);
        let task_interfaces: Vec<(u32, String)> = datapath
            .links_beside(Role::Tasks)
            .into_iter()
            .map(|index| (index, nix::net::if_::if_indextoname(index).expect("a name")))
            .map(|(index, name)| (index, name.into_string().expect("a name")))
            .collect();
        assert!(!task_interfaces.is_empty());
        for _ in 0..rounds {
            for (index, name) in &task_interfaces {
                datapath.attach_beside(Role::Tasks, (name, *index), uplink).unwrap_or_else(failed);
            }
            datapath.attach_uplink("eth1", uplink, mode).unwrap_or_else(failed);
            assert_eq!(running("eth1"), program_id(&datapath, "uplink_tc"));
            assert_eq!(running(&task_interfaces[0].1), program_id(&datapath, "task_tc"));
            spare = datapath.exchange(spare);
            pace();
        }
    });
}

fn failed<T>(error: impl std::fmt::Display) -> T {
    panic!("{error}")
}

/// The kernel's number of the program that runs first on what comes in by an interface.
fn running(interface: &str) -> Option<u32> {
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress).expect("the programs");
    programs.first().map(ProgramInfo::id)
}

/// That of a program in hand.
fn program_id(datapath: &Datapath, name: &str) -> Option<u32> {
    let programs = datapath.programs().unwrap_or_else(failed);
    programs.iter().find(|program| program.name == name).map(|program| program.id)
}

/// Five hundred; a part of them where `LB_SOAK_SECONDS` asks for a part of the soak's two minutes.
fn swaps() -> u32 {
    let text = env::var("LB_SOAK_SECONDS").ok();
    let seconds = text.map_or(120, |text| text.parse().expect("LB_SOAK_SECONDS is a number"));
    (500 * seconds / 120_u32).clamp(50, 500)
}

#[test]
fn five_hundred_swaps_of_every_program_lose_no_packet() {
    let swaps = swaps();
    let (cluster, server) = measured_task();
    let node = &cluster.nodes[0].netns;
    let ends = [&cluster.client, &cluster.tasks[0].netns];
    for (mode, name) in [(Mode::Native, "native"), (Mode::Tc, "tc")] {
        // The programs are the test's to swap.
        attach(&cluster, &["--mode", name]).into_iter().for_each(|agent| agent.stop(Signal::SIGKILL));
        let to = cluster.addresses(0)[0];
        let probe = Paced::start(&cluster.client, SocketAddr::new(to, 53), Duration::from_millis(1));
        // Below what makes a queue overflow, so that whatever is missing was lost here.
        let mut iperf3 = cluster.client.command("iperf3");
        iperf3.args(["-c", &to.to_string(), "-p", "80", "-t", "600", "-b", "100M", "--bidir"]);
        let mut iperf3 = Running::start(iperf3.stdout(Stdio::null()));
        let before = ends.map(|end| (segments(end), repeated(end)));
        within(PATIENCE, "both are served", || probe.answered() > 100 && segments(ends[1]).0 > 1_000);
        let begin = Instant::now();
        swap(node, mode, swaps, || {
            let (next, begin) = (probe.answered() + 10, Instant::now());
            while probe.answered() < next {
                assert!(begin.elapsed() < PATIENCE, "the probe is not answered after a swap");
                thread::sleep(Duration::from_millis(1));
            }
        });
        let took = begin.elapsed();
        assert!(iperf3.is_running());
        let counted = probe.stop();
        iperf3.stop(Signal::SIGKILL);
        let [client, task] = [0, 1].map(|end| {
            let ((sent, again), repeated) = (segments(ends[end]), repeated(ends[end]));
            (sent - before[end].0.0, again - before[end].0.1, repeated - before[end].1)
        });
        println!(
            "{name}: {swaps} swaps of each program in {took:?}: {counted:?}; {client:?} {task:?} segments"
        );
        assert!(counted.sent > u64::from(swaps) * 10);
        assert_eq!((counted.lost, counted.doubled), (0, 0));
        assert!(client.0 > 10_000 && task.0 > 10_000, "segments flow in both directions");
        // What an end sent again in haste came twice: nothing was lost.
        assert_eq!((client.1, task.1), (task.2, client.2), "sent again, and come twice at the other end");
        // It is whole: the next controller adopts it.
        let agents = attach(&cluster, &["--mode", name]);
        assert!(agents[0].log().contains("adopted the running datapath"), "{}", agents[0].log());
    }
    stop_echo(&cluster.tasks[0].netns, 5353);
    server.join().expect("the server");
}

/// Writes a cluster file with these tasks, by name and state, behind port 80.
fn write(cluster: &Cluster, states: &BTreeMap<&str, &str>) {
    let state = |task: &Task| states.get(task.name.as_str()).copied();
    let tasks: Vec<(&Task, &str)> =
        cluster.tasks.iter().filter_map(|task| Some((task, state(task)?))).collect();
    cluster.write(&cluster.file("\"80:8080\"", &tasks));
}

/// The clients of two nodes while both have no controller, and tasks come, drain and go: `LB_ORPHAN_SECONDS` says how long
/// (15 seconds).
#[test]
fn no_request_fails_without_controllers_while_the_cluster_changes() {
    let length = env::var("LB_ORPHAN_SECONDS").map_or(15, |text| text.parse().expect("a number of seconds"));
    let length = Duration::from_secs(length);
    let mut cluster = Cluster::new(2);
    cluster.reach = PEERS;
    cluster.receive_xdp();
    cluster.keep_connections_on_one_cpu();
    for slot in 0..4 {
        cluster.add_nginx(&format!("web.{}", slot + 1), slot % 2);
    }
    let path = cluster.write_all_running();
    let agents = attach(&cluster, &[]);
    // A machine for each node: a task remembers a client's port for a minute, whichever node it used.
    let crowd: Vec<Netns> = (21..23)
        .map(|number| {
            let (v4, v6) = ([192, 0, 2, number], [0x2001, 0xdb8, 1, 0, 0, 0, 0, number.into()]);
            cluster.plug("crowd", v4.into(), v6.into())
        })
        .collect();
    let start =
        |(client, node): (&Netns, usize)| Load::start(client, cluster.addresses(node)[0], 1, u64::MAX);
    let loads: Vec<Load> = crowd.iter().zip(0..).map(start).collect();
    let done = || loads.iter().map(Load::done).sum::<u64>();
    eventually("requests are answered", || done() > 100);
    // It is to go while there is no controller: a task that goes with open connections resets them.
    let mut states: BTreeMap<&str, &str> =
        ["web.1", "web.2", "web.3", "web.4"].map(|name| (name, "running")).into();
    states.insert("web.2", "draining");
    write(&cluster, &states);
    let drained = || cluster.nodes.iter().all(|node| active_tasks(&node.netns, "web") == 3);
    within(PATIENCE, "a task drains", drained);
    for agent in agents {
        agent.stop(Signal::SIGKILL);
    }
    let (begin, before) = (Instant::now(), done());
    let mut changes = 0;
    // What is written here is read by nobody before a controller is back.
    while begin.elapsed() < length {
        match changes % 6 {
            0 => drop(states.insert("web.1", "draining")),
            1 => drop(states.insert("web.5", "running")),
            2 => drop(states.remove("web.2")),
            3 => drop(states.insert("web.6", "running")),
            4 => drop(states.insert("web.1", "running")),
            _ => drop(states.insert("web.2", "running")),
        }
        // Namespaces and veths come too.
        for (name, node) in [("web.5", 0), ("web.6", 1)] {
            if states.contains_key(name) && cluster.tasks.iter().all(|task| task.name != name) {
                cluster.add_nginx(name, node);
            }
        }
        write(&cluster, &states);
        changes += 1;
        let more = done() + 500;
        within(PATIENCE, "requests are answered", || done() >= more);
        let failed: u64 = loads.iter().map(Load::failed).sum();
        assert_eq!(failed, 0, "after {:?} without a controller", begin.elapsed());
    }
    states.insert("web.1", "draining");
    states.remove("web.2");
    write(&cluster, &states);
    let (alone, took) = (done() - before, begin.elapsed());
    assert!(changes >= 4, "{changes} changes");
    // Both are back, and the tables as the file says. What was taken out was served until then.
    let attach = |node: usize| Agent::attach(&cluster.nodes[node].netns, cluster.folder(), &path, &[]);
    let agents = [attach(0), attach(1)];
    let running = ["web.3", "web.4", "web.5", "web.6"].map(str::to_owned).into();
    for (agent, node) in agents.iter().zip(&cluster.nodes) {
        assert!(agent.log().contains("adopted the running datapath"), "{}", agent.log());
        within(PATIENCE, "it is as the file says", || offered(&node.netns, "web") == running);
    }
    let more = done() + 200;
    within(PATIENCE, "requests are answered", || done() >= more);
    println!("{alone} requests in {took:?} without a controller, {changes} changes; {} in all", done());
    let failed: Vec<String> = loads.into_iter().flat_map(Load::stop).collect();
    assert_eq!(failed, Vec::<String>::new());
    let names: Vec<String> = requests(&cluster.client, cluster.addresses(0)[0], 8)
        .into_iter()
        .map(|answer| answer.split(' ').next().unwrap_or_default().to_owned())
        .collect();
    assert!(tally(&names).values().all(|count| *count == 2) && tally(&names).len() == 4, "{names:?}");
}

#[test]
fn of_many_controllers_one_serves_and_its_death_leaves_no_lock() {
    const RACERS: usize = 4;
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.add_nginx("web.1", 0);
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let logs: Vec<_> = (0..RACERS).map(|racer| cluster.folder().join(format!("racer{racer}.log"))).collect();
    // The first round finds nothing, each after it a datapath whose controller was killed.
    for round in 0..3 {
        let mut racers: Vec<_> = logs
            .iter()
            .map(|log| {
                let mut command = node.command(agent::program());
                command.args(["attach", "--iface", "eth1", "--on-exit", "keep", "--cluster"]).arg(&path);
                let log = fs::File::create(log).expect("create the log");
                Running::start(command.stdout(Stdio::null()).stderr(log))
            })
            .collect();
        let mut codes = [None; RACERS];
        within(PATIENCE, "all but one give way", || {
            for (code, racer) in codes.iter_mut().zip(&mut racers) {
                *code = code.or(racer.ended().map(|status| status.code()));
            }
            codes.iter().flatten().count() == RACERS - 1
        });
        let winner = codes.iter().position(Option::is_none).expect("one that runs");
        let said = |racer: usize| fs::read_to_string(&logs[racer]).expect("a log");
        for (racer, code) in codes.iter().enumerate().filter(|(_, code)| code.is_some()) {
            assert_eq!(*code, Some(Some(4)), "round {round}, racer {racer}: {}", said(racer));
            assert!(said(racer).contains("is held by another controller, process "), "{}", said(racer));
        }
        within(PATIENCE, "the one serves", || said(winner).contains("serving "));
        let controller = || json(node, &["status"])["controller"].as_str().map(str::to_owned);
        assert_eq!(controller(), Some(format!("process {}", racers[winner].pid())), "round {round}");
        assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 3).len(), 3);
        racers[winner].stop(Signal::SIGKILL);
        assert_eq!(controller().as_deref(), Some("none; the datapath goes on by itself"), "round {round}");
    }
    let agents = attach(&cluster, &[]);
    assert!(agents[0].log().contains("adopted the running datapath"), "{}", agents[0].log());
}

/// A connection that stays, and the task that has it.
struct Kept {
    stream: TcpStream,
    task: String,
}

impl Kept {
    fn open(to: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&to, PATIENCE).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
        let mut kept = Self { stream, task: String::new() };
        kept.task = kept.ask().expect("an answer");
        kept
    }

    /// A request; the name of the task that answers.
    fn ask(&mut self) -> std::io::Result<String> {
        self.stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")?;
        let (mut answer, mut buffer) = (String::new(), [0; 1024]);
        while !answer.ends_with("\n") || !answer.contains(" saw ") {
            match self.stream.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                length => answer += &String::from_utf8_lossy(&buffer[..length]),
            }
        }
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        Ok(body.split(' ').next().unwrap_or_default().to_owned())
    }
}

/// The task that answers a datagram from this socket, if one does soon.
fn ask(socket: &UdpSocket) -> Option<String> {
    socket.send(b"who is there?").expect("send");
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).ok()?;
    String::from_utf8_lossy(&buffer[..length]).split(' ').next().map(str::to_owned)
}

#[test]
fn a_node_that_disappears_harms_nobody_else_and_fails_no_new_connection() {
    const EACH: usize = 10;
    let mut cluster = Cluster::new(3);
    cluster.reach = PEERS;
    cluster.receive_xdp();
    for slot in 0..3 {
        cluster.add_nginx(&format!("web.{}", slot + 1), slot);
    }
    let servers: Vec<JoinHandle<()>> = cluster.tasks.iter().map(start_echo).collect();
    let text = |states: &[(&Task, &str)]| cluster.file("\"80:8080\", \"53:5353/udp\"", states);
    let all: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
    cluster.write(&text(&all));
    let _agents = attach(&cluster, &[]);
    let node = &cluster.nodes[0].netns;
    let address: IpAddr = cluster.addresses(0)[0];
    let (mut kept, sockets) = cluster.client.enter(|| {
        let kept: Vec<Kept> = (0..3 * EACH).map(|_| Kept::open(SocketAddr::new(address, 80))).collect();
        let socket = |_| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            socket.connect(SocketAddr::new(address, 53)).expect("connect");
            socket.set_read_timeout(Some(Duration::from_secs(2))).expect("set a time limit");
            socket
        };
        (kept, (0..3 * EACH).map(socket).collect::<Vec<UdpSocket>>())
    });
    // Twice: the second datagram after an answer is what establishes a connection.
    sockets.iter().for_each(|socket| drop(ask(socket).expect("an answer")));
    let exchanges: Vec<String> = sockets.iter().map(|socket| ask(socket).expect("an answer")).collect();
    let of = |names: &[String], task: &str| names.iter().filter(|name| *name == task).count();
    let connections: Vec<String> = kept.iter().map(|kept| kept.task.clone()).collect();
    for task in ["web.1", "web.2", "web.3"] {
        assert_eq!((of(&connections, task), of(&exchanges, task)), (EACH, EACH), "{task}");
    }
    let lost = "web.3";
    let unharmed = |kept: &mut [Kept], when: &str| {
        for kept in kept.iter_mut().filter(|kept| kept.task != lost) {
            assert_eq!(kept.ask().ok().as_ref(), Some(&kept.task), "{when}");
        }
        for (socket, task) in sockets.iter().zip(&exchanges).filter(|(_, task)| *task != lost) {
            assert_eq!(ask(socket).as_ref(), Some(task), "{when}");
        }
    };

    let port = Cluster::port(&cluster.nodes[2].netns);
    let again = segments(&cluster.client).1;
    cluster.lan().ip(&format!("link set {port} down"));
    // Nobody knows yet: every third connection begins at the node that is gone.
    let load = Load::start(&cluster.client, address, 4, 200);
    unharmed(&mut kept, "nobody knows yet");
    let silent = || json(node, &["node", "ls"])["nodes"].to_string().contains("does not answer");
    within(PATIENCE, "it is noticed", silent);
    unharmed(&mut kept, "it is noticed");
    assert_eq!(load.finish(), Vec::<String>::new(), "no new connection fails");
    let again = segments(&cluster.client).1 - again;
    println!("200 new connections, 0 failed; {again} segments sent again");
    let after = segments(&cluster.client).1;
    let answers = requests(&cluster.client, address, 20);
    assert!(answers.iter().all(|answer| !answer.starts_with(lost)), "{answers:?}");
    assert_eq!(segments(&cluster.client).1, after, "once it is known nothing is sent again");

    // The cluster calls the node's tasks lost.
    cluster.write(&text(&all[..2]));
    eventually("the task is gone", || offered(node, "web").len() == 2);
    unharmed(&mut kept, "its tasks are gone");
    for (socket, task) in sockets.iter().zip(&exchanges).filter(|(_, task)| *task == lost) {
        let now = ask(socket);
        assert!(now.is_some() && now.as_ref() != Some(task), "the next datagram finds another task: {now:?}");
    }
    let resets = outcome(node, "reset");
    for kept in kept.iter_mut().filter(|kept| kept.task == lost) {
        let told = kept.ask().map_err(|error| error.kind());
        assert_eq!(told, Err(std::io::ErrorKind::ConnectionReset), "its clients are told");
    }
    assert!(outcome(node, "reset") - resets >= EACH as u64);

    // It comes back.
    cluster.lan().ip(&format!("link set {port} up"));
    cluster.write(&text(&all));
    within(PATIENCE, "it is offered again", || offered(node, "web").len() == 3);
    let answers = requests(&cluster.client, address, 12);
    assert_eq!(answers.iter().filter(|answer| answer.starts_with(lost)).count(), 4, "{answers:?}");
    unharmed(&mut kept, "it is back");
    for (task, server) in cluster.tasks.iter().zip(servers) {
        stop_echo(&task.netns, 5353);
        server.join().expect("the server");
    }
}
