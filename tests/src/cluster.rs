//! A cluster in namespaces: nodes on a lan, each with a bridge like docker_gwbridge, tasks behind it.
//!
//! ```text
//! client ──┐          ┌── node1: eth1, gwbridge ── task …
//!          ├── lan ───┤
//!          ┘          └── node2: eth1, gwbridge ── task …
//! ```

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    netns::{Netns, Running, run},
    private,
};

/// A machine.
pub struct Node {
    /// Its namespace.
    pub netns: Netns,
    /// `node1`, …
    pub name: String,
    number: u8,
}

/// A task: a namespace behind a node's bridge, and what runs in it.
pub struct Task {
    /// Its namespace.
    pub netns: Netns,
    /// `web.1`, …
    pub name: String,
    /// Index of its node.
    pub node: usize,
    /// What it has of the two.
    families: Families,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Ipv6Addr,
    processes: Vec<Running>,
    /// What its server says at `/up`, if it has one.
    up: Option<PathBuf>,
}

/// The whole.
pub struct Cluster {
    // Dropped in this order: processes and tasks before the namespaces that carry them.
    /// Tasks, in the order they were added.
    pub tasks: Vec<Task>,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// A machine on the same lan that is no node.
    pub client: Netns,
    /// What the cluster file says of nodes' agents and of answers.
    pub reach: Reach,
    lan: Netns,
    folder: tempfile::TempDir,
    made: u8,
}

/// A client behind two routers.
pub struct Distant {
    /// The client.
    pub client: Netns,
    /// Its router.
    pub far: Netns,
    /// The router on the lan.
    pub near: Netns,
}

/// The distant client's IPv4 address.
pub const DISTANT4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// The distant client's IPv6 address.
pub const DISTANT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 10);

/// How nodes reach each other's tasks, as the cluster file says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Whether all nodes have agents; else tasks of other nodes are reached by snat.
    pub peers: bool,
    /// Whether answers go straight to the client.
    pub direct: bool,
    /// Whether the nodes' IPv6 addresses come first.
    pub outer_v6: bool,
    /// Whether the nodes' addresses are those of a network of their own ([`crate::private`]).
    pub private: bool,
    /// What tasks have.
    pub families: Families,
}

/// The families of which tasks have addresses; clients of another one are translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    /// Both.
    #[default]
    Both,
    /// IPv4 alone, as on Docker's own bridge.
    V4,
    /// IPv6 alone.
    V6,
}

impl Reach {
    /// Through the tunnel to the agents of all nodes, and back the same way.
    pub const PEERS: Self =
        Self { peers: true, direct: false, outer_v6: false, private: false, families: Families::Both };
}

/// The name of the file with the key of the tunnel, beside the cluster file.
pub const KEY_FILE: &str = "tunnel.key";

/// The client's IPv4 address.
pub const CLIENT4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The client's IPv6 address.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 10);

impl Node {
    /// Its IPv4 address on the lan.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, 100 + self.number)
    }

    /// Its IPv6 address on the lan.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100 + u16::from(self.number))
    }
}

impl Task {
    /// Its address, that of IPv4 if it has both.
    pub fn address(&self) -> IpAddr {
        if self.families == Families::V6 { self.v6.into() } else { self.v4.into() }
    }

    /// Has it reach everything through its node.
    pub fn add_routes(&self) {
        let number = self.node + 1;
        if self.address().is_ipv4() {
            self.netns.ip(&format!("route replace default via 172.18.{number}.1"));
        }
        if !self.netns.output("ip", &["-6", "address", "show", "dev", "eth0"]).is_empty() {
            self.netns.ip(&format!("route replace default via fd18:{number}::1"));
        }
    }
}

impl Cluster {
    /// Nodes without tasks.
    pub fn new(nodes: u8) -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        let key_file = folder.path().join(KEY_FILE);
        run(Command::new(crate::agent::program()).arg("keygen").arg(key_file));
        let lan = Netns::new("lan");
        lan.ip("link add lanbr type bridge");
        lan.ip("link set lanbr up");
        let client = Netns::new("client");
        plug(&lan, &client, CLIENT4, CLIENT6);
        let nodes = (1..=nodes).map(|number| node(&lan, number)).collect::<Vec<_>>();
        for node in &nodes {
            for other in nodes.iter().filter(|other| other.number != node.number) {
                node.netns.ip(&format!("route add 172.18.{}.0/24 via {}", other.number, other.v4()));
                node.netns.ip(&format!("route add fd18:{}::/64 via {}", other.number, other.v6()));
            }
        }
        Self { tasks: Vec::new(), nodes, client, reach: Reach::default(), lan, folder, made: 0 }
    }

    /// Plugs another machine into the lan, by `eth1`.
    pub fn plug(&self, label: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Netns {
        let netns = Netns::new(label);
        plug(&self.lan, &netns, v4, v6);
        netns
    }

    /// Plugs a router that is in the lan already into it once more, by `eth2`, which forwards packets of so many bytes.
    pub fn plug_second(&self, router: &Netns, mtu: u32) {
        let port = format!("{}b", Self::port(router));
        self.lan.ip(&format!("link add {port} type veth peer name eth2 netns {}", router.name()));
        self.lan.ip(&format!("link set {port} master lanbr up"));
        // Each of its links answers for itself alone.
        run(router.command("sysctl").args([
            "-qw",
            "net.ipv4.conf.all.arp_ignore=1",
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.eth1.send_redirects=0",
        ]));
        router.ip(&format!("link set eth2 mtu {mtu} up"));
    }

    /// A client behind two routers, the hop between which lets packets of so many bytes pass.
    ///
    /// ```text
    /// lan ── near ──(mtu)── far ── client 198.51.100.10
    /// ```
    pub fn distant(&self, mtu: u32) -> Distant {
        let near =
            self.plug("near", Ipv4Addr::new(192, 0, 2, 20), "2001:db8:1::20".parse().expect("an address"));
        let (far, client) = (Netns::new("far"), Netns::new("distant"));
        near.ip(&format!("link add far type veth peer name near netns {}", far.name()));
        far.ip(&format!("link add client type veth peer name eth1 netns {}", client.name()));
        for (netns, link, number) in [(&near, "far", 1), (&far, "near", 2)] {
            netns.ip(&format!("link set {link} mtu {mtu} up"));
            netns.ip(&format!("addr add 203.0.113.{number}/30 dev {link}"));
            netns.ip(&format!("addr add 2001:db8:2::{number}/64 dev {link} nodad"));
        }
        far.ip("link set client up");
        far.ip("addr add 198.51.100.1/24 dev client");
        far.ip("addr add 2001:db8:3::1/64 dev client nodad");
        client.ip("link set eth1 up");
        client.ip(&format!("addr add {DISTANT4}/24 dev eth1"));
        client.ip(&format!("addr add {DISTANT6}/64 dev eth1 nodad"));
        client.ip("route add default via 198.51.100.1");
        client.ip("route add default via 2001:db8:3::1");
        far.ip("route add default via 203.0.113.1");
        far.ip("route add default via 2001:db8:2::1");
        near.ip("route add 198.51.100.0/24 via 203.0.113.2");
        near.ip("route add 2001:db8:3::/64 via 2001:db8:2::2");
        for router in [&near, &far] {
            run(router.command("sysctl").args([
                "-qw",
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
            ]));
        }
        for node in &self.nodes {
            node.netns.ip("route add 198.51.100.0/24 via 192.0.2.20");
            node.netns.ip("route add 2001:db8:3::/64 via 2001:db8:1::20");
        }
        Distant { client, far, near }
    }

    /// Sets the MTU of a node's uplink, and tells the router before it, which takes the wire for one of 1,500 bytes: a router heeds a
    /// route's MTU only if it is locked.
    pub fn set_uplink_mtu_behind(&self, router: &Netns, node: usize, mtu: u32) {
        self.set_uplink_mtu(node, mtu);
        router.ip(&format!("route replace {} dev eth1 mtu lock {mtu}", self.nodes[node].v4()));
        router.ip(&format!("route replace {} dev eth1 mtu lock {mtu}", self.nodes[node].v6()));
    }

    /// A folder that goes with the cluster.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The namespace of the wire.
    pub fn lan(&self) -> &Netns {
        &self.lan
    }

    /// The port of the lan's bridge that a namespace is plugged into.
    pub fn port(netns: &Netns) -> String {
        let number = netns.name().split('-').nth(1).expect("a name made here");
        format!("port{number}")
    }

    /// Lets frames that XDP sends out of a node's veth arrive: its other end must poll for them, as a switch's
    /// port does of itself.
    pub fn receive_xdp(&self) {
        for node in &self.nodes {
            run(self.lan.command("ethtool").args(["-K", &Self::port(&node.netns), "gro", "on"]));
        }
    }

    /// [`Netns::keep_connections_on_one_cpu`] at each node.
    pub fn keep_connections_on_one_cpu(&self) {
        self.nodes.iter().for_each(|node| node.netns.keep_connections_on_one_cpu("eth1"));
    }

    /// Sets the MTU of a node's uplink; the other links, the client's too, keep theirs.
    pub fn set_uplink_mtu(&self, node: usize, mtu: u32) {
        let node = &self.nodes[node].netns;
        self.lan.ip(&format!("link set {} mtu {mtu}", Self::port(node)));
        node.ip(&format!("link set eth1 mtu {mtu}"));
    }

    /// Sets the MTU of every interface there is.
    pub fn set_mtu(&self, mtu: u32) {
        for node in &self.nodes {
            self.lan.ip(&format!("link set {} mtu {mtu}", Self::port(&node.netns)));
            node.netns.ip(&format!("link set eth1 mtu {mtu}"));
        }
        self.lan.ip(&format!("link set {} mtu {mtu}", Self::port(&self.client)));
        self.lan.ip(&format!("link set lanbr mtu {mtu}"));
        self.client.ip(&format!("link set eth1 mtu {mtu}"));
        for task in &self.tasks {
            let host = &self.nodes[task.node].netns;
            let [.., slot] = task.v4.octets();
            host.ip(&format!("link set hv{slot} mtu {mtu}"));
            host.ip(&format!("link set gwbridge mtu {mtu}"));
            task.netns.ip(&format!("link set eth0 mtu {mtu}"));
        }
    }

    /// Adds a task without a server.
    pub fn add_task(&mut self, name: &str, node: usize) -> usize {
        self.made += 1;
        let (slot, number) = (10 + self.made, self.nodes[node].number);
        let v4 = Ipv4Addr::new(172, 18, number, slot);
        let v6 = Ipv6Addr::new(0xfd18, u16::from(number), 0, 0, 0, 0, 0, u16::from(slot));
        let netns = Netns::new("task");
        let host = &self.nodes[node].netns;
        host.ip(&format!("link add hv{slot} type veth peer name eth0 netns {}", netns.name()));
        host.ip(&format!("link set hv{slot} master gwbridge up"));
        let families = self.reach.families;
        if families != Families::V6 {
            netns.ip(&format!("addr add {v4}/24 dev eth0"));
        }
        netns.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
        netns.ip("link set eth0 up");
        if families == Families::V4 {
            run(netns.command("sysctl").args(["-qw", "net.ipv6.conf.all.disable_ipv6=1"]));
        }
        let name = name.to_owned();
        let task = Task { netns, name, node, families, v4, v6, processes: Vec::new(), up: None };
        task.add_routes();
        self.tasks.push(task);
        self.tasks.len() - 1
    }

    /// Adds a task with nginx on port 8080: `/` says who answered and which client it saw, `/big` is a file of
    /// 100 MB; at `/up` it is there as [`Self::set_up`] says, first it is.
    pub fn add_nginx(&mut self, name: &str, node: usize) -> usize {
        let task = self.add_task(name, node);
        self.start_nginx(task);
        task
    }

    /// Starts nginx in a task that has no server yet.
    pub fn start_nginx(&mut self, task: usize) {
        let name = self.tasks[task].name.clone();
        self.made += 1;
        let folder = self.folder().join(format!("nginx-{}", self.made));
        fs::create_dir(&folder).expect("make a folder");
        let folder_text = folder.display();
        let big = self.folder().join("big");
        if !big.exists() {
            fs::write(&big, big_file()).expect("write the big file");
        }
        let config = format!(
            "daemon off; worker_processes 1; pid {folder_text}/pid; error_log {folder_text}/error.log;\n\
             worker_rlimit_nofile 32768; events {{ worker_connections 16384; }}\n\
             http {{ access_log off; keepalive_requests 1000000; keepalive_timeout 600; client_body_temp_path {folder_text}/body; proxy_temp_path {folder_text}/p;\n\
             fastcgi_temp_path {folder_text}/f; uwsgi_temp_path {folder_text}/u; scgi_temp_path {folder_text}/s;\n\
             server {{ listen 8080 backlog=4096; listen [::]:8080 ipv6only=on backlog=4096;\n\
             location = / {{ return 200 \"{name} saw $remote_addr\\n\"; }}\n\
             location = /up {{ root {folder_text}; }}\n\
             location = /big {{ root {}; }} }} }}\n",
            self.folder().display()
        );
        let path = folder.join("nginx.conf");
        fs::write(&path, config).expect("write nginx's configuration");
        let nginx =
            self.tasks[task].netns.command("nginx").args(["-c"]).arg(&path).args(["-e", "/dev/null"]).start();
        self.tasks[task].processes.push(nginx);
        self.tasks[task].up = Some(folder.join("up"));
        self.set_up(task, true);
        self.wait_for_port(task, 8080);
    }

    /// Whether a task's nginx answers with 200 at `/up`, or with 404.
    pub fn set_up(&self, task: usize, up: bool) {
        let path = self.tasks[task].up.as_ref().expect("a task with nginx");
        if up { fs::write(path, "up\n") } else { fs::remove_file(path) }.expect("say whether it is up");
    }

    /// Starts a command in a task's namespace; it is stopped with the task.
    pub fn start(&mut self, task: usize, command: impl FnOnce(&Netns) -> Command) {
        let running = Running::start(&mut command(&self.tasks[task].netns));
        self.tasks[task].processes.push(running);
    }

    /// Waits until a task listens on a TCP port.
    pub fn wait_for_port(&self, task: usize, port: u16) {
        let task = &self.tasks[task];
        crate::netns::eventually("the task listens", || {
            task.netns.enter(|| std::net::TcpStream::connect((task.address(), port)).is_ok())
        });
    }

    /// Waits until something listens on a TCP port of a task, without connecting to it.
    pub fn wait_for_listener(&self, task: usize, port: u16) {
        let wanted = format!(":{port:04X} ");
        let listens = |netns: &Netns| {
            let tables = netns.enter(|| {
                ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")))
            });
            tables.into_iter().flatten().any(|table| {
                // local_address … st: 0A is LISTEN
                table.lines().any(|line| {
                    let fields: Vec<&str> = line.split_whitespace().collect();
                    fields.len() > 3 && format!("{} ", fields[1]).ends_with(&wanted) && fields[3] == "0A"
                })
            })
        };
        crate::netns::eventually("the task listens", || listens(&self.tasks[task].netns));
    }

    /// Removes a task and what runs in it.
    pub fn remove_task(&mut self, task: usize) -> Task {
        self.tasks.remove(task)
    }

    /// A cluster file with one service of these tasks; each with its state.
    pub fn file(&self, ports: &str, tasks: &[(&Task, &str)]) -> String {
        let mut text = String::new();
        if self.reach.peers {
            let returns = if self.reach.direct { "direct" } else { "tunnel" };
            let _ = writeln!(text, "[tunnel]\nreturn = \"{returns}\"\nkey-file = \"{KEY_FILE}\"\n");
        }
        for node in &self.nodes {
            let public: [IpAddr; 2] = [node.v4().into(), node.v6().into()];
            let mut addresses = if self.reach.private { private::addresses(node) } else { public };
            if self.reach.outer_v6 {
                addresses.reverse();
            }
            let [first, second] = addresses;
            // As agents say them of themselves, behind Swarm's.
            let more = match public.map(|address| format!(", \"{address}\"")) {
                more if self.reach.private => more.concat(),
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                "[[node]]\nname = \"{}\"\naddresses = [\"{first}\", \"{second}\"{more}]\nagent = {}\n",
                node.name, self.reach.peers
            );
        }
        let _ = writeln!(text, "[[service]]\nname = \"web\"\nports = [{ports}]");
        let both = self.reach.families == Families::Both;
        let _ = writeln!(text, "{}", if both { "" } else { "family = \"auto\"\n" });
        for (task, state) in tasks {
            let addresses = match task.families {
                Families::Both => format!("\"{}\", \"{}\"", task.v4, task.v6),
                Families::V4 | Families::V6 => format!("\"{}\"", task.address()),
            };
            let _ = writeln!(
                text,
                "[[service.task]]\nname = \"{}\"\nnode = \"{}\"\naddresses = [{addresses}]\nstate = \"{state}\"\n",
                task.name, self.nodes[task.node].name
            );
        }
        text
    }

    /// Writes the cluster file, by renaming, so that nobody reads half of it.
    pub fn write(&self, text: &str) -> PathBuf {
        let path = self.folder().join("cluster.toml");
        let new = self.folder().join("cluster.toml.new");
        fs::write(&new, text).expect("write the cluster file");
        fs::rename(&new, &path).expect("rename the cluster file");
        path
    }

    /// Writes a cluster file in which all tasks run, behind port 80.
    pub fn write_all_running(&self) -> PathBuf {
        let tasks: Vec<(&Task, &str)> = self.tasks.iter().map(|task| (task, "running")).collect();
        self.write(&self.file("\"80:8080\"", &tasks))
    }

    /// The addresses of a node, both families.
    pub fn addresses(&self, node: usize) -> [IpAddr; 2] {
        [self.nodes[node].v4().into(), self.nodes[node].v6().into()]
    }
}

trait Start {
    fn start(&mut self) -> Running;
}

impl Start for Command {
    fn start(&mut self) -> Running {
        Running::start(self)
    }
}

fn plug(lan: &Netns, netns: &Netns, v4: Ipv4Addr, v6: Ipv6Addr) {
    let port = Cluster::port(netns);
    lan.ip(&format!("link add {port} type veth peer name eth1 netns {}", netns.name()));
    lan.ip(&format!("link set {port} master lanbr up"));
    netns.ip(&format!("addr add {v4}/24 dev eth1"));
    netns.ip(&format!("addr add {v6}/64 dev eth1 nodad"));
    netns.ip("link set eth1 up");
}

fn node(lan: &Netns, number: u8) -> Node {
    let name = format!("node{number}");
    let node = Node { netns: Netns::new(&name), name, number };
    plug(lan, &node.netns, node.v4(), node.v6());
    node.netns.ip("link add gwbridge type bridge");
    node.netns.ip(&format!("addr add 172.18.{number}.1/24 dev gwbridge"));
    node.netns.ip(&format!("addr add fd18:{number}::1/64 dev gwbridge nodad"));
    node.netns.ip("link set gwbridge up");
    // As Docker leaves it.
    let forwarding = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
    run(node.netns.command("sysctl").arg("-qw").args(forwarding));
    node
}

/// 100 MB that no compression and no repetition makes easy.
pub fn big_file() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(100_000_000);
    while bytes.len() < 100_000_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}
