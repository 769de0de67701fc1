//! A large cluster around one node: its services and tasks in a file, its local tasks behind veths, and all other nodes
//! played by one namespace whose datapath answers for them.
//!
//! ```text
//! node ── eth1 ── others: 192.0.2.1, the router to the other nodes' addresses, and their datapath
//!      ── hv1 … ── containers: an interface for each local task
//! ```

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::{
    abi::table,
    endpoint::{Endpoint, Listener},
    net::{Be16, TCP, V4},
};
use lb_userspace::datapath::PinDir;

use crate::{
    agent::Agent,
    netns::{Netns, patience},
};

/// How large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Services, each with a published port.
    pub services: u32,
    /// Tasks, the same number for each service.
    pub tasks: u32,
}

/// Tasks that each node runs.
const TASKS_OF_A_NODE: u32 = 100;

/// The node's address on the uplink.
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The port that the first service publishes; the others follow.
pub const FIRST_PORT: u16 = 10_000;

impl Size {
    /// Nodes, this one among them.
    pub fn nodes(self) -> u32 {
        (self.tasks / TASKS_OF_A_NODE).max(2)
    }

    /// Tasks of each service.
    pub fn tasks_of_a_service(self) -> u32 {
        self.tasks / self.services
    }

    /// The cluster as a file has it; `grown` is a service with one task more than the others.
    pub fn text(self, grown: Option<u32>) -> String {
        let mut text = String::with_capacity(self.tasks as usize * 140);
        for node in 0..self.nodes() {
            let _ = writeln!(text, "[[node]]\nname = \"node{node}\"\naddresses = [\"{}\"]\n", address(node));
        }
        let mut next = 0;
        for service in 0..self.services {
            let port = u32::from(FIRST_PORT) + service;
            let _ = writeln!(text, "[[service]]\nname = \"service-{service}\"\nports = [\"{port}:8080\"]\n");
            for slot in 0..self.tasks_of_a_service() {
                task(&mut text, (service, slot), (next % self.nodes(), next / self.nodes()), next);
                next += 1;
            }
            if grown == Some(service) {
                // Of another node: its own address there is nobody else's business.
                task(&mut text, (service, self.tasks_of_a_service()), (1, TASKS_OF_A_NODE), self.tasks);
            }
        }
        text
    }

    /// Options of `attach` that give it room.
    pub fn options(self) -> Vec<String> {
        let room = |name: &str, entries: u32| format!("--max-{name}={}", entries.next_power_of_two());
        vec![
            room("services", self.services * 3 / 2),
            room("listeners", self.services * 3 / 2),
            room("backends", self.tasks * 5 / 4),
            room("slots", self.tasks * 4),
        ]
    }
}

/// A node among many.
pub struct Large {
    /// How many.
    pub size: Size,
    /// The node.
    pub node: Netns,
    others: Netns,
    _containers: Netns,
    folder: tempfile::TempDir,
}

/// The address of a node; the first is this one.
fn address(node: u32) -> Ipv4Addr {
    if node == 0 { NODE } else { Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + node) }
}

/// The address of the `n`th task of a node, on that node.
fn on_node(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 18, 1, 0)) + n)
}

/// The address in the cluster of a task.
fn in_cluster(task: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 2)) + task)
}

impl Large {
    /// Makes the namespaces.
    pub fn new(size: Size) -> Self {
        let [node, others, containers] = ["node", "others", "containers"].map(Netns::new);
        node.ip(&format!("link add eth1 type veth peer name eth1 netns {}", others.name()));
        for (netns, own) in [(&node, NODE), (&others, ROUTER)] {
            netns.ip(&format!("addr add {own}/24 dev eth1"));
            netns.ip("link set eth1 up");
        }
        node.ip(&format!("route add 10.64.0.0/12 via {ROUTER}"));
        node.ip("link add gwbridge type bridge");
        node.ip("addr add 172.18.0.1/16 dev gwbridge");
        node.ip("link set gwbridge up");
        let (mut outside, mut inside) = (String::new(), String::new());
        for task in 0..TASKS_OF_A_NODE.min(size.tasks / size.nodes()) {
            let _ = writeln!(
                outside,
                "link add hv{task} type veth peer name c{task} netns {}",
                containers.name()
            );
            let _ = writeln!(outside, "link set hv{task} master gwbridge up");
            let _ = writeln!(inside, "addr add {}/16 dev c{task}\nlink set c{task} up", on_node(task));
        }
        batch(&node, &outside);
        batch(&containers, &inside);
        let folder = tempfile::tempdir().expect("make a folder");
        Self { size, node, others, _containers: containers, folder }
    }

    /// Has the other nodes' datapath answer, until it is dropped.
    pub fn answer(&self) -> Agent<'_> {
        let mut text = format!("[[node]]\nname = \"node0\"\naddresses = [\"{NODE}\"]\n\n");
        let addresses: Vec<String> = (1..self.size.nodes()).map(|n| format!("\"{}\"", address(n))).collect();
        let _ = writeln!(
            text,
            "[[node]]\nname = \"others\"\naddresses = [{}, \"{ROUTER}\"]",
            addresses.join(", ")
        );
        let path = self.folder().join("others.toml");
        fs::write(&path, text).expect("write a file");
        Agent::attach(&self.others, self.folder(), &path, &["--node", "others"])
    }

    /// A folder that goes with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Attaches the agent that is looked at.
    pub fn attach(&self, file: &Path, options: &[&str]) -> Agent<'_> {
        let room = self.size.options();
        let room: Vec<&str> = room.iter().map(String::as_str).chain(options.iter().copied()).collect();
        Agent::attach(&self.node, self.folder(), file, &room)
    }

    /// Writes a cluster file under another name, to be put in place by [`Self::put`].
    pub fn write(&self, text: &str) -> PathBuf {
        let path = self.folder().join("cluster.toml.new");
        fs::write(&path, text).expect("write the cluster file");
        path
    }

    /// Replaces the file, and waits until the listener of a service leads to as many tasks as it says; how long that took.
    pub fn change(&self, listeners: &Listeners, grown: Option<u32>, service: u32) -> Duration {
        self.write(&self.size.text(grown));
        let wanted = self.size.tasks_of_a_service() + u32::from(grown.is_some());
        let start = Instant::now();
        self.put();
        while listeners.slots(service) != wanted {
            assert!(start.elapsed() < patience(CHANGE), "a change does not reach the tables");
            std::thread::sleep(Duration::from_micros(200));
        }
        start.elapsed()
    }

    /// Puts what was written in place, whole.
    pub fn put(&self) -> PathBuf {
        let path = self.folder().join("cluster.toml");
        fs::rename(self.folder().join("cluster.toml.new"), &path).expect("rename the cluster file");
        path
    }
}

/// As long as a change may take.
const CHANGE: Duration = Duration::from_secs(30);

/// The table of listeners, as the programs see it.
pub struct Listeners(HashMap<MapData, Endpoint<V4>, Listener>);

impl Listeners {
    /// Opens what is pinned.
    pub fn open(pins: &PinDir) -> Self {
        Self(open(pins, table::LISTENERS4))
    }

    /// To how many tasks the listener of a service leads.
    pub fn slots(&self, service: u32) -> u32 {
        let port = Be16::new(FIRST_PORT + service as u16);
        self.0.get(&Endpoint::new(V4::from(NODE), port, TCP), 0).map_or(0, |listener| listener.slot_count)
    }

    /// Waits until every service has its listener, and that leads to all its tasks.
    pub fn complete(&self, size: Size, limit: Duration) {
        let start = Instant::now();
        for service in 0..size.services {
            while self.slots(service) != size.tasks_of_a_service() {
                assert!(start.elapsed() < patience(limit), "service {service} is not loaded");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Opens a table.
pub fn open<T: TryFrom<Map, Error = MapError>>(pins: &PinDir, name: &str) -> T {
    let map = MapData::from_pin(pins.table(name)).and_then(Map::from_map_data).and_then(T::try_from);
    map.unwrap_or_else(|error| panic!("open {name}: {error}"))
}

fn task(text: &mut String, (service, slot): (u32, u32), (node, n): (u32, u32), number: u32) {
    let _ = writeln!(
        text,
        "[[service.task]]\nname = \"service-{service}.{slot}\"\nnode = \"node{node}\"\naddresses = [\"{}\"]\noverlay = \"{}\"\n",
        on_node(n),
        in_cluster(number)
    );
}

/// Many commands of `ip` at once.
fn batch(netns: &Netns, commands: &str) {
    let mut ip = netns.command("ip");
    let mut child = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("start ip");
    child.stdin.take().expect("its input").write_all(commands.as_bytes()).expect("tell ip");
    assert!(child.wait().expect("wait for ip").success(), "ip -batch in {}", netns.name());
}
