//! Health checks of our own: tasks of images without one are asked by the agent of their node, and get no new connections
//! before they answer, nor while they do not.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use lb_tests::{
    agent::{Agent, json, offered, text},
    cluster::{Cluster, Reach, Task},
    netns::{Netns, succeeds, within},
    service::{create, serves},
    swarm::{Node, PATIENCE, Swarm},
    traffic::{Load, listen, request_over, requests},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Nodes that reach each other through the tunnel, and tasks on them.
fn cluster_of(nodes: u8, tasks: &[(&str, usize)]) -> Cluster {
    let mut cluster = Cluster::new(nodes);
    cluster.reach = Reach::PEERS;
    cluster.receive_xdp();
    for (name, node) in tasks {
        cluster.add_nginx(name, *node);
    }
    cluster
}

/// Writes the cluster file: so many of the tasks run, and are asked at `/up`.
fn write(cluster: &Cluster, tasks: usize) -> PathBuf {
    let tasks: Vec<(&Task, &str)> = cluster.tasks[..tasks].iter().map(|task| (task, "running")).collect();
    let health = "health = { kind = \"http\", path = \"/up\", interval = \"200ms\" }";
    cluster.write(&cluster.file("\"80:8080\"", &tasks).replace("ports =", &format!("{health}\nports =")))
}

fn attach<'a>(cluster: &'a Cluster, node: usize, path: &Path) -> Agent<'a> {
    Agent::attach(&cluster.nodes[node].netns, cluster.folder(), path, &[])
}

fn names(tasks: &[&str]) -> BTreeSet<String> {
    tasks.iter().map(|name| (*name).to_owned()).collect()
}

/// A task as a node's `service ps` has it, if it does.
fn task(netns: &Netns, name: &str) -> Value {
    let tasks = json(netns, &["service", "ps", "web"])["tasks"].clone();
    let mut its = tasks.as_array().into_iter().flatten().filter(|task| task["name"] == name);
    its.next().cloned().unwrap_or_default()
}

/// What is wrong with a task.
fn problem(netns: &Netns, name: &str) -> String {
    task(netns, name)["problem"].as_str().unwrap_or_default().to_owned()
}

/// The tasks that new connections go to.
fn takers(netns: &Netns) -> BTreeSet<String> {
    let tasks = json(netns, &["service", "ps", "web"])["tasks"].clone();
    let takes = |task: &&Value| task["active"] == true && task["share"].as_u64() > Some(0);
    let takers = tasks.as_array().into_iter().flatten().filter(takes);
    takers.filter_map(|task| task["name"].as_str()).map(str::to_owned).collect()
}

/// Waits until a node offers exactly these tasks, and asks it: nobody else answers.
fn offers(cluster: &Cluster, node: usize, what: &str, tasks: &[&str]) {
    let netns = &cluster.nodes[node].netns;
    within(PATIENCE, &format!("{what}: {tasks:?}"), || takers(netns) == names(tasks));
    for address in cluster.addresses(node) {
        for answer in requests(&cluster.client, address, 2 * tasks.len()) {
            let task = answer.split(' ').next().unwrap_or_default();
            assert!(tasks.contains(&task), "{what}: {answer}");
        }
    }
}

/// A connection that a task has, and keeps.
fn held(cluster: &Cluster, name: &str) -> TcpStream {
    let to = SocketAddr::new(cluster.addresses(0)[0], 80);
    succeeds(PATIENCE, "a connection to the task", || {
        let mut stream =
            cluster.client.enter(|| TcpStream::connect(to)).map_err(|error| error.to_string())?;
        let answer = request_over(&mut stream).map_err(|error| error.to_string())?;
        if answer.contains(&format!("{name} saw ")) { Ok(stream) } else { Err(answer) }
    })
}

/// Asserts that a task has a connection yet.
fn goes_on(stream: &mut TcpStream, name: &str) {
    let answer = request_over(stream).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(answer.contains(&format!("{name} saw ")), "{answer}");
}

#[test]
fn a_task_that_does_not_pass_gets_no_new_connections_until_it_does() {
    let cluster = cluster_of(2, &[("web.1", 0), ("web.2", 0), ("web.3", 1), ("web.4", 0)]);
    let netns = &cluster.nodes[0].netns;
    let path = write(&cluster, 3);
    let agent = attach(&cluster, 0, &path);
    let _other = attach(&cluster, 1, &path);
    let all = ["web.1", "web.2", "web.3"];
    (0..2).for_each(|node| offers(&cluster, node, "all pass", &all));
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 2, u64::MAX);
    // What is open goes on, whatever is found.
    let mut open = held(&cluster, "web.2");
    cluster.set_up(1, false);
    offers(&cluster, 0, "one fails", &["web.1", "web.3"]);
    goes_on(&mut open, "web.2");
    let said = problem(netns, "web.2");
    assert!(said.starts_with("fails its health check: 172.18.1."), "{said}");
    assert!(said.ends_with(":8080: HTTP 404 Not Found"), "{said}");
    let events = text(netns, &["events", "--filter", "task=web.2"]);
    assert!(events.contains("gets no new connections: fails its health check"), "{events}");
    let health = json(netns, &["service", "inspect", "web"])["settings"]["health"].clone();
    assert_eq!(health, "http :8080/up every 200 ms, rise 2, fall 3");
    cluster.set_up(1, true);
    offers(&cluster, 0, "it passes again", &all);
    assert_eq!(problem(netns, "web.2"), "");

    // One that comes is asked before it is offered to anybody.
    cluster.set_up(3, false);
    write(&cluster, 4);
    within(PATIENCE, "it is known", || problem(netns, "web.4").starts_with("has not passed"));
    offers(&cluster, 0, "one has not passed yet", &all);
    cluster.set_up(3, true);
    offers(&cluster, 0, "it has", &["web.1", "web.2", "web.3", "web.4"]);

    // An agent that comes after another takes what that has found until it has asked for itself.
    cluster.set_up(1, false);
    let fewer = ["web.1", "web.3", "web.4"];
    offers(&cluster, 0, "one fails", &fewer);
    agent.stop(Signal::SIGTERM);
    let _agent = attach(&cluster, 0, &path);
    assert_eq!(takers(netns), names(&fewer));
    offers(&cluster, 0, "one fails as before", &fewer);
    goes_on(&mut open, "web.2");
    assert_eq!(load.stop(), Vec::<String>::new());
}

#[test]
fn a_check_that_comes_later_cuts_nobody_off() {
    let cluster = cluster_of(1, &[("web.1", 0), ("web.2", 0)]);
    let netns = &cluster.nodes[0].netns;
    let path = cluster.write_all_running();
    let _agent = attach(&cluster, 0, &path);
    offers(&cluster, 0, "no check yet", &["web.1", "web.2"]);
    let mut open = held(&cluster, "web.2");
    // One that served until then is taken to go on, and when it has failed three times keeps what it has.
    cluster.set_up(1, false);
    write(&cluster, 2);
    within(PATIENCE, "it is asked, and fails", || {
        goes_on(&mut open, "web.2");
        takers(netns) == names(&["web.1"])
    });
    assert!(problem(netns, "web.2").starts_with("fails its health check"), "{}", problem(netns, "web.2"));
    goes_on(&mut open, "web.2");
}

#[test]
fn where_no_task_passes_all_are_offered() {
    let cluster = cluster_of(1, &[("web.1", 0), ("web.2", 0)]);
    let netns = &cluster.nodes[0].netns;
    let path = write(&cluster, 2);
    let _agent = attach(&cluster, 0, &path);
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 2, u64::MAX);
    cluster.set_up(0, false);
    offers(&cluster, 0, "one fails", &["web.2"]);
    cluster.set_up(1, false);
    let both = ["web.1", "web.2"];
    offers(&cluster, 0, "both fail", &both);
    for task in both {
        let said = problem(netns, task);
        assert!(said.ends_with("offered all the same, for no task passes"), "{said}");
    }
    cluster.set_up(0, true);
    offers(&cluster, 0, "one passes", &["web.1"]);
    assert_eq!(load.stop(), Vec::<String>::new());
}

#[test]
fn a_task_that_comes_gets_its_share_by_and_by() {
    let cluster = cluster_of(1, &[("web.1", 0), ("web.2", 0), ("web.3", 0)]);
    let netns = &cluster.nodes[0].netns;
    let write = |tasks: usize| {
        let tasks: Vec<(&Task, &str)> = cluster.tasks[..tasks].iter().map(|task| (task, "running")).collect();
        let text = cluster.file("\"80:8080\"", &tasks);
        cluster.write(&text.replace("ports =", "slow-start = \"10s\"\nports ="))
    };
    let path = write(2);
    let _agent = attach(&cluster, 0, &path);
    let share = |name: &str| task(netns, name)["share"].as_u64();
    assert_eq!([share("web.1"), share("web.2")], [Some(50); 2]);
    assert_eq!(json(netns, &["service", "inspect", "web"])["settings"]["slow_start"], 10);
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 2, u64::MAX);
    write(3);
    let mut shares: Vec<u64> = Vec::new();
    within(PATIENCE, "it has its whole share", || {
        let now = share("web.3").filter(|now| *now > 0);
        shares.extend(now.filter(|now| shares.last() != Some(now)));
        shares.last() == Some(&33)
    });
    // From one in 21 to one in three, without a step back.
    assert!(shares[0] <= 9 && shares.len() >= 5 && shares.is_sorted(), "{shares:?}");
    offers(&cluster, 0, "all are there", &["web.1", "web.2", "web.3"]);
    assert_eq!(load.stop(), Vec::<String>::new());
}

/// Answers requests in this namespace, one after the other, until it is over.
fn answer_as(name: &str, over: &AtomicBool) {
    let listener = listen("[::]:8080");
    for stream in listener.incoming() {
        if over.load(Ordering::Acquire) {
            return;
        }
        let mut stream = stream.expect("a connection");
        let (mut head, body) = ([0; 4096], format!("{name} saw somebody\n"));
        // Its node's agent says nothing.
        if stream.read(&mut head).is_ok_and(|length| length > 0) {
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
            let _ = stream.write_all((head + &body).as_bytes());
        }
    }
}

/// Writes the cluster file with a setting of the service; all tasks run.
fn write_with(cluster: &Cluster, setting: &str) -> PathBuf {
    let tasks: Vec<(&Task, &str)> = cluster.tasks.iter().map(|task| (task, "running")).collect();
    cluster.write(&cluster.file("\"80:8080\"", &tasks).replace("ports =", &format!("{setting}\nports =")))
}

/// How many connections were given to another task because this one did not take them, as a node has counted.
fn failovers(netns: &Netns, name: &str) -> u64 {
    task(netns, name)["failovers"].as_u64().unwrap_or_default()
}

#[test]
fn a_task_that_refuses_in_a_row_is_left_until_its_node_finds_that_it_takes() {
    let mut cluster = cluster_of(1, &[("web.1", 0)]);
    // Nobody listens there.
    cluster.add_task("web.2", 0);
    cluster.add_nginx("web.3", 0);
    let path = write_with(&cluster, "eject = 3");
    let agent = attach(&cluster, 0, &path);
    let netns = &cluster.nodes[0].netns;
    assert_eq!(json(netns, &["service", "inspect", "web"])["settings"]["eject"], 3);
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 2, u64::MAX);
    offers(&cluster, 0, "one refuses", &["web.1", "web.3"]);
    let said = problem(netns, "web.2");
    assert!(said.starts_with("does not take connections: "), "{said}");
    assert!(said.ends_with(":8080: Connection refused"), "{said}");
    let met = failovers(netns, "web.2");
    assert!((2..20).contains(&met), "{met} clients met it");
    let events = text(netns, &["events", "--filter", "task=web.2"]);
    assert!(events.contains("gets no new connections: does not take connections"), "{events}");
    let before = load.done();
    within(PATIENCE, "a thousand requests", || load.done() > before + 1_000);
    assert_eq!(failovers(netns, "web.2"), met, "nobody meets it any more");
    // Until somebody does.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| cluster.tasks[1].netns.enter(|| answer_as("web.2", &over)));
        offers(&cluster, 0, "it takes again", &["web.1", "web.2", "web.3"]);
        assert_eq!(load.stop(), Vec::<String>::new());
        over.store(true, Ordering::Release);
        cluster.tasks[1].netns.enter(|| TcpStream::connect("127.0.0.1:8080")).expect("the last one");
    });
    drop(agent);

    // The only one is left to nobody.
    let cluster = {
        let mut cluster = cluster_of(1, &[]);
        cluster.add_task("web.1", 0);
        cluster
    };
    let path = write_with(&cluster, "eject = 1");
    let _agent = attach(&cluster, 0, &path);
    let to = SocketAddr::new(cluster.addresses(0)[0], 80);
    let node = &cluster.nodes[0].netns;
    within(PATIENCE, "it is asked", || {
        let refused = cluster.client.enter(|| TcpStream::connect(to)).map_err(|error| error.kind());
        assert_eq!(refused.err(), Some(std::io::ErrorKind::ConnectionRefused));
        problem(node, "web.1").ends_with("offered all the same, for no task passes")
    });
}

/// Who cannot be answered, because the task's own network has his range or because he forges where he is, makes no task look dead.
#[test]
fn clients_who_are_not_answered_eject_nobody() {
    let cluster = cluster_of(1, &[("web.1", 0), ("web.2", 0)]);
    let netns = &cluster.nodes[0].netns;
    // What this task says to the client goes nowhere.
    for range in ["192.0.2.0/24", "2001:db8::/32"] {
        cluster.tasks[1].netns.ip(&format!("route add blackhole {range} metric 1"));
    }
    let path = write_with(&cluster, "eject = 2");
    let _agent = attach(&cluster, 0, &path);
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 4, u64::MAX);
    within(PATIENCE * 2, "it has not answered many", || failovers(netns, "web.2") >= 12);
    assert_eq!(takers(netns), names(&["web.1", "web.2"]));
    let events = text(netns, &["events", "--filter", "task=web.2"]);
    assert!(!events.contains("gets no new connections"), "{events}");
    assert_eq!(load.stop(), Vec::<String>::new());
}

#[test]
fn a_task_has_no_more_connections_than_it_may_whoever_s_clients_they_are() {
    let cluster = cluster_of(2, &[("web.1", 0), ("web.2", 1)]);
    let path = write_with(&cluster, "task-max-connections = 3");
    let _agents = [0, 1].map(|node| attach(&cluster, node, &path));
    let hold = |node: usize| {
        let to = SocketAddr::new(cluster.addresses(node)[0], 80);
        let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(4));
        let mut stream = cluster.client.enter(connect).ok()?;
        request_over(&mut stream).ok()?;
        Some(stream)
    };
    (0..2).for_each(|node| offers(&cluster, node, "both have room", &["web.1", "web.2"]));
    // Those of the requests have to be forgotten as ended first: they are closed by both sides.
    let mut open: Vec<TcpStream> = (0..6).map(|number| hold(number % 2).expect("there is room")).collect();
    for node in 0..2 {
        assert!(hold(node).is_none(), "both have three");
        let full = json(&cluster.nodes[node].netns, &["stats"])["outcomes"]["tasks_full"].as_u64();
        assert!(full > Some(0), "{full:?}");
    }
    let node = &cluster.nodes[0].netns;
    within(PATIENCE, "it is said", || problem(node, "web.1") == "has 3 connections, as many as it may have");
    for stream in &mut open {
        request_over(stream).expect("those that are open go on");
    }
    open.pop();
    open.push(succeeds(PATIENCE, "one that ends makes room", || {
        hold(0).ok_or_else(|| "none yet".to_owned())
    }));
    open.clear();
    (0..2).for_each(|node| offers(&cluster, node, "all have room", &["web.1", "web.2"]));
}

/// A server that takes its time until it listens, as many do, of an image without a health check.
const SLOW: [&str; 3] = ["/bin/sh", "-c", "sleep 2; exec /bin/httpd -f -p 8080 -h /www"];
/// One task after the other, and time for each.
const UPDATE: [&str; 4] = ["--update-order", "start-first", "--update-delay", "5s"];

/// Updates every task while each node is asked: what failed, and how many connections a task refused.
fn updated(swarm: &Swarm) -> (Vec<String>, u64) {
    let manager = &swarm.nodes[0];
    // By task: those that go take what they refused with them.
    let refused = || -> BTreeMap<String, u64> {
        let of = |node: &Node| json(&node.netns, &["service", "ps", "web"])["tasks"].clone();
        let all = swarm.nodes.iter().map(|node| (node.name.clone(), of(node)));
        let tasks = all.flat_map(|(node, tasks)| {
            let tasks = tasks.as_array().cloned().unwrap_or_default();
            tasks
                .into_iter()
                .map(move |task| (format!("{node} {}", task["name"]), task["failovers"].as_u64()))
        });
        tasks.filter_map(|(name, count)| Some((name, count?))).collect()
    };
    let machines = swarm.crowd.iter().zip(&swarm.nodes);
    let loads: Vec<Load> =
        machines.map(|(client, node)| Load::start(client, node.address(), 1, u64::MAX)).collect();
    let (before, mut most) = (refused(), BTreeMap::new());
    manager.docker(&["service", "update", "-d", "--force", "web"]);
    within(PATIENCE * 3, "the update is completed", || {
        most.extend(refused());
        let format = "{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}";
        manager.docker(&["service", "inspect", "web", "--format", format]) == "completed"
    });
    most.extend(refused());
    let since = most.iter().map(|(task, count)| count - before.get(task).unwrap_or(&0));
    (loads.into_iter().flat_map(Load::stop).collect(), since.sum())
}

#[test]
fn an_update_of_a_swarm_without_docker_s_health_check_refuses_nobody() {
    let swarm = Swarm::new(2);
    let [first, second] = &swarm.nodes[..] else { unreachable!("two nodes were asked for") };
    let _agents = swarm.attach();
    let label = |change: &str| first.docker(&["service", "update", "-d", "--label-add", change, "web"]);
    create(first, "web", 2, "80:8080", &UPDATE, &SLOW);
    serves(&swarm, "web", 2);
    // Docker takes a task for running before it listens.
    let (failed, refused) = updated(&swarm);
    println!("without a check {} failed, {refused} were refused by a task", failed.len());
    assert!(refused > 0, "nobody was refused: the update shows nothing");
    label("lb.health=http");
    label("lb.health.path=/index.html");
    label("lb.health.interval=500ms");
    let asked = |node: &Node| json(&node.netns, &["service", "inspect", "web"])["settings"]["health"].clone();
    for node in [first, second] {
        within(PATIENCE, "tasks are asked", || {
            asked(node) == "http :8080/index.html every 500 ms, rise 2, fall 3"
        });
    }
    serves(&swarm, "web", 2);
    let (failed, refused) = updated(&swarm);
    assert_eq!((failed, refused), (Vec::new(), 0));
    serves(&swarm, "web", 2);

    // What a node finds every node knows.
    let (node, container) = [first, second]
        .into_iter()
        .find_map(|node| Some((node, containers(node).pop()?)))
        .expect("a container of the service");
    node.docker(&["exec", &container, "rm", "/www/index.html"]);
    for node in [first, second] {
        within(PATIENCE, "the other task is left", || offered(&node.netns, "web").len() == 1);
        let tasks = json(&node.netns, &["service", "ps", "web"])["tasks"].clone();
        assert!(tasks.to_string().contains("fails its health check: "), "{tasks}");
        assert!(
            (0..4).all(|_| swarm.ask(node, 80).is_ok_and(|answer| !container.starts_with(&answer[..12])))
        );
    }
    node.docker(&["exec", &container, "touch", "/www/index.html"]);
    serves(&swarm, "web", 2);
}

/// One that listens at once, and one that takes so long that many are refused meanwhile.
const QUICK: [&str; 5] = ["/bin/httpd", "-f", "-p8080", "-h", "/www"];
const LATE: &str = "/bin/sh -c 'sleep 8; exec /bin/httpd -f -p 8080 -h /www'";

#[test]
fn what_a_task_s_node_counts_of_its_connections_every_node_knows() {
    let swarm = Swarm::new(2);
    let [first, second] = &swarm.nodes[..] else { unreachable!("two nodes were asked for") };
    let _agents = swarm.attach();
    let update = |change: &[&str]| {
        first.docker(&[&["service", "update", "-d"], change, &["web"]].concat());
    };
    create(first, "web", 2, "80:8080", &UPDATE, &QUICK);
    serves(&swarm, "web", 2);
    let problems = |node: &Node| -> Vec<String> {
        let tasks = json(&node.netns, &["service", "ps", "web"])["tasks"].clone();
        let said = tasks.as_array().into_iter().flatten().filter_map(|task| task["problem"].as_str());
        said.filter(|said| !said.is_empty()).map(str::to_owned).collect()
    };

    update(&["--label-add", "lb.task-max-connections=2"]);
    let set = |node: &Node| json(&node.netns, &["service", "inspect", "web"])["settings"].clone();
    for node in [first, second] {
        within(PATIENCE, "the label is known", || set(node)["task_max_connections"] == 2);
    }
    let connect = |node: &Node| {
        let to = SocketAddr::new(node.address(), 80);
        let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(4));
        swarm.crowd[0].enter(connect).map_err(|error| error.to_string())
    };
    let full = "has 2 connections, as many as it may have";
    let open: Vec<TcpStream> =
        (0..4).map(|number| connect([first, second][number % 2]).expect("there is room")).collect();
    for node in [first, second] {
        within(PATIENCE, "both are full", || {
            let said = problems(node);
            said.len() == 2 && said.iter().all(|said| said.starts_with(full))
        });
        assert!(connect(node).is_err(), "nobody has room");
    }
    drop(open);
    serves(&swarm, "web", 2);

    update(&["--label-rm", "lb.task-max-connections", "--label-add", "lb.eject=2"]);
    for node in [first, second] {
        within(PATIENCE, "the label is known", || set(node)["eject"] == 2);
    }
    let machines = swarm.crowd.iter().zip(&swarm.nodes);
    let loads: Vec<Load> =
        machines.map(|(client, node)| Load::start(client, node.address(), 1, u64::MAX)).collect();
    update(&["--args", LATE, "--update-delay", "10s"]);
    let refuses = |said: &String| said.starts_with("does not take connections: ");
    let mut known = [false; 2];
    within(PATIENCE, "both nodes know of one that does not listen yet", || {
        for (known, node) in known.iter_mut().zip([first, second]) {
            *known |= problems(node).iter().any(refuses);
        }
        known == [true; 2]
    });
    let format = "{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}";
    within(PATIENCE * 3, "the update is completed", || {
        first.docker(&["service", "inspect", "web", "--format", format]) == "completed"
    });
    serves(&swarm, "web", 2);
    assert_eq!(loads.into_iter().flat_map(Load::stop).collect::<Vec<_>>(), Vec::<String>::new());
}

/// A node knows the way to its own tasks alone, and the others that it has the task.
#[test]
fn a_task_that_its_own_node_cannot_reach_gets_nothing_from_the_others() {
    let swarm = Swarm::new(2);
    let [first, second] = &swarm.nodes[..] else { unreachable!("two nodes were asked for") };
    let _agents = swarm.attach();
    create(first, "web", 2, "80:8080", &UPDATE, &QUICK);
    serves(&swarm, "web", 2);
    let container = containers(second).pop().expect("a task on the second node");
    // The interface by which its node reaches it: the last one, for Docker's own bridge.
    let peer = second.docker(&["exec", &container, "sh", "-c", "cat /sys/class/net/eth1/iflink"]);
    let index = peer.trim().parse::<u32>().expect("the number of an interface");
    let link = second.netns.enter(|| nix::net::if_::if_indextoname(index)).expect("its name");
    let link = link.to_str().expect("a name").to_owned();
    second.netns.ip(&format!("link set {link} down"));
    for node in [first, second] {
        within(PATIENCE, "the other task alone is offered", || offered(&node.netns, "web").len() == 1);
    }
    let tasks = json(&first.netns, &["service", "ps", "web"])["tasks"].clone();
    assert!(tasks.to_string().contains("its own node has no way to it: "), "{tasks}");
    for _ in 0..8 {
        let answer = swarm.ask(first, 80).expect("an answer");
        assert!(!container.starts_with(&answer[..12]), "{answer}");
    }
    second.netns.ip(&format!("link set {link} up"));
    serves(&swarm, "web", 2);
}

/// The containers of the service on a node.
fn containers(node: &Node) -> Vec<String> {
    let listed =
        node.docker(&["ps", "-q", "--no-trunc", "--filter", "label=com.docker.swarm.service.name=web"]);
    listed.lines().map(str::to_owned).collect()
}
