//! A failure or a kill at any change that is made to the kernel, one run each: what is left is whole.
//!
//! `LB_FAULT` names a file that says after how many changes it happens; the agent removes it then. A run takes the first
//! change and every sixth of the others, another sixth by chance each time (`LB_FAULT_FIRST` chooses it);
//! `LB_FAULT_EVERY=1` takes them all.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use aya::{
    maps::{HashMap, Map, MapData, MapInfo},
    programs::{
        ProgramInfo, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
    },
};
use lb_common::{
    abi::{LABEL_KEY, LABEL_SOURCE, Label, LabelKey, table},
    backend::Backend,
};
use lb_tests::{
    agent::{self, Agent, active_tasks, text, verb},
    cluster::{Cluster, Reach},
    netns::{Netns, Running, eventually, within},
    traffic::{Load, requests},
};
use lb_userspace::{
    datapath::{PinDir, TableSet},
    plan::Tables,
};
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(60);

/// The file that arms the next fault.
struct Fault {
    path: PathBuf,
}

impl Fault {
    fn of(cluster: &Cluster) -> Self {
        Self { path: cluster.folder().join("fault") }
    }

    /// The agent's environment.
    fn variable(&self) -> (&str, &str) {
        ("LB_FAULT", self.path.to_str().expect("a path that is text"))
    }

    /// Has the change after so many others fail, or kill the agent.
    fn arm(&self, changes: u32, action: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, format!("{changes} {action}")).expect("arm the fault");
        fs::rename(new, &self.path).expect("arm the fault");
    }

    /// Whether it has not happened yet.
    fn is_armed(&self) -> bool {
        self.path.exists()
    }

    fn disarm(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The tables of a node.
fn read(node: &Netns) -> Tables {
    node.enter(|| TableSet::of("eth1").and_then(|set| set.read()).unwrap_or_else(|error| panic!("{error}")))
}

/// What they mean, while nobody changes them.
fn meaning(node: &Netns) -> BTreeSet<String> {
    let tables = read(node);
    assert_eq!(tables.contradictions(), Vec::<String>::new());
    let named = tables.nodes.len() + tables.services.len() + tables.ports.len() + tables.backends.len();
    assert_eq!(label_count(node), named, "every number has a name, and every name a number");
    described(&tables)
}

/// What tables mean, free of numbers.
fn described(tables: &Tables) -> BTreeSet<String> {
    // While a plan is under way a number may have no name yet.
    let task = |index: &u32| tables.backends.get(index).map(|entry| &entry.label.task);
    let service = |index: &u32| tables.services.get(index).map(|label| &label.name);
    let mut all = BTreeSet::new();
    for (number, node) in &tables.nodes {
        let peer = tables.peers.contains_key(number);
        all.insert(format!("node {} {:?} agent {} peer {peer}", node.name, node.addresses, node.agent));
    }
    for (address, number) in &tables.peer_numbers {
        all.insert(format!("{address} is of {:?}", tables.nodes.get(number).map(|node| &node.name)));
    }
    for label in tables.services.values() {
        all.insert(format!("{label:?}"));
    }
    for label in tables.ports.values() {
        let (of, target) = (service(&label.service), label.target);
        all.insert(format!("port {}/{} of {of:?} to {target}", label.published, label.protocol));
    }
    for entry in tables.backends.values() {
        let peer = tables.nodes.get(&entry.backend.peer.into()).map(|node| &node.name);
        let backend = Backend { service: 0, generation: 0, peer: 0, ..entry.backend };
        all.insert(format!("{:?} {peer:?} {:?} {backend:?}", service(&entry.backend.service), entry.label));
    }
    for (key, index) in &tables.tasks {
        all.insert(format!("{key:?} is {:?}", task(index)));
    }
    for (at, known) in &tables.endpoints {
        all.insert(format!("{at:?} of {:?} answers {:?}", task(&known.backend), known.listener));
    }
    for (at, listener) in &tables.listeners {
        let slots = tables.slots_of(listener).expect("slots");
        let tasks: Vec<_> = slots.iter().map(|slot| task(&slot.backend())).collect();
        all.insert(format!(
            "{at:?} of {:?} {} leads to {tasks:?}",
            service(&listener.service),
            listener.flags
        ));
    }
    for ((number, range), allowed) in &tables.access {
        all.insert(format!("{range} of {:?} {allowed}", service(number)));
    }
    all.insert(format!("filter {:?}", tables.filter));
    all
}

/// The labels that name a number; the controller's own are of one kind.
fn label_count(node: &Netns) -> usize {
    let pin = node.enter(|| PinDir::of("eth1").expect("the pins").table(table::LABELS));
    let map = Map::from_map_data(MapData::from_pin(pin).expect("the labels")).expect("a table");
    let labels: HashMap<_, LabelKey, Label> = map.try_into().expect("labels");
    // Some are of no number.
    labels.keys().flatten().filter(|key| ![LABEL_SOURCE, LABEL_KEY].contains(&key.kind)).count()
}

/// A task in a cluster file, IPv4 alone.
fn task(cluster: &Cluster, name: &str, state: &str) -> String {
    let task = cluster.tasks.iter().find(|task| task.name == name).expect("a task of that name");
    let node = &cluster.nodes[task.node].name;
    format!(
        "[[service.task]]\nname = \"{name}\"\nnode = \"{node}\"\naddresses = [\"{}\"]\nstate = \"{state}\"\n\n",
        task.v4
    )
}

/// Two clusters that differ in a node, a service, a port, who may connect and the state of tasks, with everything that has a table; none of
/// the web service's tasks, which all are asked meanwhile, is taken out before it has drained.
fn two_clusters(cluster: &Cluster) -> [String; 2] {
    let nodes = cluster.file("\"80:8080\"", &[]);
    let web = |third, fourth| {
        let states = [("web.1", "running"), ("web.2", "running"), ("web.3", third), ("web.4", fourth)];
        states.map(|(name, state)| task(cluster, name, state)).concat()
    };
    let one = format!("{nodes}{}", web("running", "draining"));
    let node = "[[node]]\nname = \"node9\"\naddresses = [\"198.51.100.9\"]\nagent = true\n\n";
    let extra = ["extra.1", "extra.2"].map(|name| task(cluster, name, "running")).concat();
    let service = format!("[[service]]\nname = \"extra\"\nports = [\"81:8080\", \"82:8081/udp\"]\n\n{extra}");
    // All who ask are on the list: nobody notices that it comes or goes, whole or half written.
    let listed = nodes.replacen("ports =", "allow = [\"192.0.2.0/24\"]\ndeny = [\"192.0.2.66\"]\nports =", 1);
    let two = format!("{node}{listed}{}{service}", web("draining", "running"));
    [one, two]
}

#[test]
fn a_plan_that_is_killed_at_any_step_is_taken_up_by_the_next_controller() {
    let mut cluster = Cluster::new(2);
    cluster.reach = Reach { peers: true, ..Reach::default() };
    cluster.receive_xdp();
    cluster.keep_connections_on_one_cpu();
    for slot in 0..4 {
        cluster.add_nginx(&format!("web.{}", slot + 1), slot % 2);
    }
    for slot in 0..2 {
        cluster.add_task(&format!("extra.{}", slot + 1), slot);
    }
    let clusters = two_clusters(&cluster);
    let path = cluster.write(&clusters[0]);
    let [node, other] = [0, 1].map(|node| &cluster.nodes[node].netns);
    let _other = Agent::attach(other, cluster.folder(), &path, &[]);
    let fault = Fault::of(&cluster);
    let attach =
        || Agent::attach_with(node, cluster.folder(), &path, &[], &[("LB_TEST", "1"), fault.variable()]);
    let mut agent = attach();
    let settle = |what: &str, wanted: &BTreeSet<String>| {
        let mut last = BTreeSet::new();
        within(PATIENCE, what, || {
            let before = std::mem::replace(&mut last, described(&read(node)));
            if last != *wanted && last != before {
                let missing: Vec<_> = wanted.difference(&last).collect();
                println!(
                    "{what}: missing {missing:?}, too many {:?}",
                    last.difference(wanted).collect::<Vec<_>>()
                );
            }
            last == *wanted
        });
        assert_eq!(meaning(node), *wanted, "{what}");
    };
    // What each of the two means, undisturbed.
    let offers = |web: u64, extra: u64| {
        let all = || active_tasks(node, "web") == web && active_tasks(node, "extra") == extra;
        within(PATIENCE, "tasks are offered", all);
        meaning(node)
    };
    let first = offers(3, 0);
    cluster.write(&clusters[1]);
    let second = offers(3, 2);
    assert_ne!(first, second);
    let meanings = [first, second];
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 1, u64::MAX);
    eventually("requests are answered", || load.done() > 50);
    let mut walks = [changes(), changes()];
    let mut steps = walks.each_mut().map(|walk| walk.next().expect("a change"));
    let (mut now, mut whole) = (1, [false; 2]);
    while whole != [true, true] {
        let next = 1 - now;
        fault.arm(steps[next], "kill");
        cluster.write(&clusters[next]);
        let mut ended = false;
        // Killed, or done with what there was to do.
        within(PATIENCE, "the plan is applied, as far as it goes", || {
            ended = !agent.is_running();
            ended || described(&read(node)) == meanings[next]
        });
        if ended {
            assert!(!fault.is_armed());
            steps[next] = walks[next].next().expect("a change");
            agent.stop(Signal::SIGKILL);
            agent = attach();
            assert!(agent.log().contains("adopted the running datapath"), "{}", agent.log());
        } else {
            fault.disarm();
            whole[next] = true;
        }
        settle(&format!("killed at change {}", steps[next]), &meanings[next]);
        assert_eq!(load.failed(), 0, "killed at change {}", steps[next]);
        now = next;
    }
    println!("killed at changes up to {} and {}; {} requests", steps[0], steps[1], load.done());
    assert!(steps.iter().all(|steps| *steps > 15), "{steps:?}");
    assert_eq!(load.stop(), Vec::<String>::new());
}

/// Everything that an attach leaves in a node's kernel: pins and what they hold, programs where they run, qdiscs, filters,
/// settings.
fn footprint(node: &Netns) -> BTreeSet<String> {
    let mut all: BTreeSet<String> = node.enter(|| {
        let folder = PinDir::of("eth1").expect("the pins").path().to_owned();
        let pins = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
        pins.map(|path| format!("{} {}", path.display(), held(&path))).collect()
    });
    let links: serde_json::Value =
        serde_json::from_str(&node.output("ip", &["-j", "-d", "link", "show"])).expect("JSON");
    for link in links.as_array().expect("links") {
        let name = link["ifname"].as_str().expect("a name");
        let tcx = node.enter(|| SchedClassifier::query_tcx(name, TcAttachType::Ingress));
        let programs = tcx.map(|(_, all)| all.iter().map(ProgramInfo::id).collect::<Vec<u32>>());
        all.insert(format!("{name}: TC {:?}, XDP {}", programs.ok(), link["xdp"]));
        all.insert(format!(
            "{name}: filters {}",
            node.output("tc", &["filter", "show", "dev", name, "ingress"])
        ));
    }
    all.insert(node.output("tc", &["qdisc", "show"]));
    let settings = node.output("sysctl", &["-a", "-e", "-r", r"^net\.(core|ipv4|ipv6)\."]);
    // Those that count by themselves are no settings.
    let counts = |line: &&str| line.contains("_count") || line.contains("stable_secret");
    all.extend(settings.lines().filter(|line| !counts(line)).map(str::to_owned));
    all
}

/// The kernel's number of what a pin holds.
fn held(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name.starts_with("table-") {
        return format!("{:?}", MapInfo::from_pin(path).map(|info| info.id()).ok());
    }
    if name.contains("program-") {
        return format!("{:?}", ProgramInfo::from_pin(path).map(|info| info.id()).ok());
    }
    let link = PinnedLink::from_pin(path).map(FdLink::from);
    let info = link.and_then(|link| link.info());
    format!("{:?}", info.map(|info| (info.id(), info.program_id())).ok())
}

/// One node with one task, and its cluster file.
fn one_task() -> Cluster {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    cluster.keep_connections_on_one_cpu();
    cluster.add_nginx("web.1", 0);
    let text = cluster.file("\"80:8080\"", &[]) + &task(&cluster, "web.1", "running");
    cluster.write(&text);
    // The way to the task is known from the start: its veth is attached to before the uplink.
    let to = SocketAddr::new(cluster.tasks[0].v4.into(), 8080);
    cluster.nodes[0].netns.enter(|| std::net::TcpStream::connect(to)).expect("connect");
    cluster
}

/// Starts of an agent, each with a fault at another change.
struct Walk<'a> {
    cluster: &'a Cluster,
    fault: Fault,
    /// What the kernel is to be taken to lack.
    lacks: &'a str,
    arguments: &'a [&'a str],
}

/// How a start came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// It ended with this code.
    Failed(Option<i32>),
    /// It served, and was stopped; its datapath stays.
    Served,
}

impl<'a> Walk<'a> {
    fn node(&self) -> &'a Netns {
        &self.cluster.nodes[0].netns
    }

    /// Starts the agent; how that came out, and what it said.
    fn start(&self) -> (Start, String) {
        let log = self.cluster.folder().join("start.log");
        let mut command = self.node().command(agent::program());
        command.args(["attach", "--iface", "eth1", "--on-exit", "keep", "--cluster"]);
        command.arg(self.cluster.folder().join("cluster.toml")).args(self.arguments);
        command.envs([("LB_TEST", "1"), self.fault.variable(), ("LB_KERNEL_LACKS", self.lacks)]);
        let file = fs::File::create(&log).expect("create the log");
        let mut running = Running::start(command.stdout(Stdio::null()).stderr(file));
        let said = || fs::read_to_string(&log).expect("the log");
        let mut outcome = Start::Served;
        within(PATIENCE, "the agent serves or ends", || match running.ended() {
            Some(status) => {
                outcome = Start::Failed(status.code());
                true
            }
            None => said().contains("serving "),
        });
        if outcome == Start::Served {
            // A fault at a task's veth is no reason not to serve the others; it is tried again.
            within(PATIENCE, "the task is offered", || active_tasks(self.node(), "web") == 1);
            within(PATIENCE, "the new program runs at the task", || self.is_up_to_date());
            running.stop(Signal::SIGTERM);
        }
        (outcome, said())
    }

    /// Whether the program that is pinned is the one that runs where the task answers.
    fn is_up_to_date(&self) -> bool {
        let pin = self.node().enter(|| PinDir::of("eth1").expect("the pins").program("task_tc"));
        let Ok(id) = ProgramInfo::from_pin(pin).map(|info| info.id()) else {
            return false;
        };
        let task = "hv11";
        let tcx = self.node().enter(|| SchedClassifier::query_tcx(task, TcAttachType::Ingress));
        tcx.is_ok_and(|(_, programs)| programs.iter().any(|program| program.id() == id))
            || self
                .node()
                .output("tc", &["filter", "show", "dev", task, "ingress"])
                .contains(&format!(" id {id} "))
    }

    /// Has changes that a start makes fail, one a start, and calls `look` after each. The first that a start did not come
    /// to.
    fn go(&self, mut look: impl FnMut(Start, &str)) -> u32 {
        for change in changes() {
            self.fault.arm(change, "fail");
            let (outcome, said) = self.start();
            if self.fault.is_armed() {
                self.fault.disarm();
                assert_eq!(outcome, Start::Served, "{said}");
                return change;
            }
            assert!(said.contains("LB_FAULT: fail, instead of: "), "{said}");
            if let Start::Failed(code) = outcome {
                assert_eq!(code, Some(1), "{said}");
                assert!(said.contains("Cannot allocate memory"), "{said}");
            }
            look(outcome, &said);
        }
        unreachable!("a start ends")
    }
}

/// The changes at which a fault is made: the first, which nothing can do without, and every so many of the others.
fn changes() -> impl Iterator<Item = u32> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u32>().expect("a number"));
    let every = number("LB_FAULT_EVERY").unwrap_or(6).max(1);
    let first = number("LB_FAULT_FIRST").unwrap_or_else(std::process::id) % every;
    println!("LB_FAULT_EVERY={every} LB_FAULT_FIRST={first}");
    (0..).filter(move |change| *change == 0 || change % every == first)
}

/// What is there now and was not, and the other way round.
fn differences(before: &BTreeSet<String>, now: &BTreeSet<String>) -> Vec<String> {
    let gone = before.difference(now).map(|line| format!("- {line}"));
    gone.chain(now.difference(before).map(|line| format!("+ {line}"))).collect()
}

fn detach(node: &Netns) {
    assert!(verb(node, &["detach", "--iface", "eth1"]).status.success());
}

/// Has each change of a first attach fail.
fn first_attach(lacks: &str, least: u32) {
    let cluster = one_task();
    let walk =
        Walk { cluster: &cluster, fault: Fault::of(&cluster), lacks, arguments: &["--mode", "native"] };
    let before = footprint(walk.node());
    let mut failed = 0;
    let changes = walk.go(|outcome, said| match outcome {
        Start::Failed(_) => {
            failed += 1;
            assert_eq!(differences(&before, &footprint(walk.node())), Vec::<String>::new(), "{said}");
        }
        Start::Served => detach(walk.node()),
    });
    println!("a first attach makes up to {changes} changes; it failed at {failed}, and left nothing");
    assert!(changes >= least && failed > 0, "{changes}, {failed}");
    detach(walk.node());
    // The kernel lets go of a link a moment later.
    within(PATIENCE, "all is as it was", || differences(&before, &footprint(walk.node())).is_empty());
}

#[test]
fn a_first_attach_that_fails_at_any_change_leaves_nothing() {
    first_attach("", 25);
}

#[test]
fn a_first_attach_by_filters_that_fails_at_any_change_leaves_nothing() {
    first_attach("tcx", 25);
}

/// Has each change of an adoption fail, while requests go on.
fn adoption(lacks: &str, least: u32) {
    let cluster = one_task();
    let mut walk =
        Walk { cluster: &cluster, fault: Fault::of(&cluster), lacks, arguments: &["--mode", "native"] };
    let node = walk.node();
    assert_eq!(walk.start().0, Start::Served);
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 1, u64::MAX);
    let mut before = footprint(node);
    let mut failed = 0;
    let changes = walk.go(|outcome, said| {
        let now = footprint(node);
        match outcome {
            Start::Failed(_) => {
                failed += 1;
                assert_eq!(differences(&before, &now), Vec::<String>::new(), "{said}");
            }
            // Its programs are new.
            Start::Served => before = now,
        }
        let more = load.done() + 5;
        within(PATIENCE, "requests are answered", || load.done() >= more);
        assert_eq!(load.failed(), 0, "{said}");
    });
    println!(
        "an adoption makes up to {changes} changes; it failed at {failed}, and {} requests at none",
        load.done()
    );
    assert!(changes >= least && failed > 0, "{changes}, {failed}");
    // Nor does one that changes the mode, and fails.
    walk.arguments = &["--mode", "tc"];
    let mut before = footprint(node);
    let mut failed = 0;
    let changes = walk.go(|outcome, said| {
        let now = footprint(node);
        match outcome {
            Start::Failed(_) => {
                failed += 1;
                // The link that has to go for another mode comes back as another.
                let but_links = |all: &BTreeSet<String>| -> BTreeSet<String> {
                    all.iter().filter(|line| !line.contains("/link-xdp ")).cloned().collect()
                };
                let differs = differences(&but_links(&before), &but_links(&now));
                assert_eq!(differs, Vec::<String>::new(), "{said}");
            }
            Start::Served => {
                // Back to XDP.
                walk.fault.disarm();
                let native = Walk { fault: Fault::of(&cluster), arguments: &["--mode", "native"], ..walk };
                assert_eq!(native.start().0, Start::Served);
                before = footprint(node);
            }
        }
        assert_eq!(load.failed(), 0, "{said}");
    });
    assert!(changes >= least && failed > 0, "{changes}, {failed}");
    assert_eq!(load.stop(), Vec::<String>::new());
    detach(node);
}

#[test]
fn an_adoption_that_fails_at_any_change_leaves_what_ran() {
    adoption("", 10);
}

#[test]
fn an_adoption_by_filters_that_fails_at_any_change_leaves_what_ran() {
    adoption("tcx", 10);
}

/// How XDP is attached to the uplink, by `ip`.
fn xdp(node: &Netns) -> &'static str {
    let shown = node.output("ip", &["link", "show", "dev", "eth1"]);
    match shown {
        shown if shown.contains(" xdpgeneric ") => "generic",
        shown if shown.contains(" xdp ") => "native",
        _ => "tc",
    }
}

#[test]
fn a_change_of_the_mode_that_is_killed_at_any_step_is_taken_up() {
    let cluster = one_task();
    let walk = |mode| Walk { cluster: &cluster, fault: Fault::of(&cluster), lacks: "", arguments: mode };
    let node = walk(&[]).node();
    let modes = [
        ["--mode", "native"],
        ["--mode", "generic"],
        ["--mode", "native"],
        ["--mode", "tc"],
        ["--mode", "native"],
    ];
    assert_eq!(walk(&modes[0]).start().0, Start::Served);
    let load = Load::start(&cluster.client, cluster.addresses(0)[0], 1, u64::MAX);
    let mut killed = 0;
    for pair in modes.windows(2) {
        let (from, to) = (walk(&pair[0]), walk(&pair[1]));
        for change in changes() {
            to.fault.arm(change, "kill");
            let (outcome, said) = to.start();
            if to.fault.is_armed() {
                to.fault.disarm();
                assert_eq!((outcome, xdp(node)), (Start::Served, pair[1][1]), "{said}");
                break;
            }
            assert_eq!(outcome, Start::Failed(None), "{said}");
            killed += 1;
            let more = load.done() + 5;
            within(PATIENCE, "requests are answered without a controller", || load.done() >= more);
            for (walk, mode) in [(&to, pair[1][1]), (&from, pair[0][1])] {
                assert_eq!((walk.start().0, xdp(node)), (Start::Served, mode), "after: {said}");
            }
            assert_eq!(load.failed(), 0, "{said}");
        }
    }
    println!("{killed} kills, {} requests", load.done());
    // Nearly twenty changes a pair of modes, or a sixth of them.
    assert!(killed > 4, "{killed}");
    assert_eq!(load.stop(), Vec::<String>::new());
    detach(node);
}

#[test]
fn what_is_to_be_replaced_runs_on_if_the_new_one_cannot_be_loaded() {
    let cluster = one_task();
    let arguments = ["--mode", "native", "--replace-state", "--max-connections", "2048"];
    let mut walk =
        Walk { cluster: &cluster, fault: Fault::of(&cluster), lacks: "", arguments: &arguments[..2] };
    let node = walk.node();
    assert_eq!(walk.start().0, Start::Served);
    let before = footprint(node);
    walk.arguments = &arguments;
    // Tables and programs.
    for change in 0..2 {
        walk.fault.arm(change, "fail");
        let (outcome, said) = walk.start();
        assert_eq!(outcome, Start::Failed(Some(1)), "{said}");
        assert_eq!(differences(&before, &footprint(node)), Vec::<String>::new(), "{said}");
        assert_eq!(requests(&cluster.client, cluster.addresses(0)[0], 3).len(), 3);
    }
    assert_eq!(walk.start().0, Start::Served);
    assert!(text(node, &["status", "--verbose"]).contains("2048"));
    detach(node);
}

#[test]
fn another_s_xdp_program_is_left_alone_and_nothing_else_is_left() {
    let cluster = one_task();
    let walk =
        Walk { cluster: &cluster, fault: Fault::of(&cluster), lacks: "", arguments: &["--mode", "native"] };
    let other = walk.node().enter(|| {
        // Any XDP program will do: our own object, in other hands.
        let path = std::env::var_os("LB_OBJECT").expect("LB_OBJECT names the object");
        let mut object = aya::Ebpf::load_file(path).expect("load the object");
        let program: &mut Xdp =
            object.program_mut("clock").expect("a program").try_into().expect("an XDP program");
        program.load().expect("load the program");
        program.attach("eth1", XdpMode::Driver).expect("attach");
        object
    });
    let before = footprint(walk.node());
    let (outcome, said) = walk.start();
    assert_eq!(outcome, Start::Failed(Some(1)), "{said}");
    assert!(said.contains("another XDP program holds the interface"), "{said}");
    assert_eq!(differences(&before, &footprint(walk.node())), Vec::<String>::new(), "{said}");
    drop(other);
}
