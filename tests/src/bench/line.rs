//! A client, a node and its tasks in a line, wired to each other without a switch between, so that nothing but the node's
//! work lies on the way.
//!
//! ```text
//! client ──eth1─eth1── node ── gwbridge ──hv──eth0── tasks
//!    └ also stands for another node and for routed backends
//! ```

use std::{
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use crate::netns::{Netns, run};

/// The client's address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The node's.
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
/// Another node's, where the client is.
pub const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 102);
/// The client's hardware address.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 10];
/// The node's.
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// That of the bridge before the tasks.
pub const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 51];
/// The tasks'.
pub const TASK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 50];
/// Backends of each kind.
pub const BACKENDS: u8 = 4;

/// The address of a task.
pub const fn task(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 18, 1, 11 + number)
}

/// The address of a routed backend, behind the client.
pub const fn routed(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, 1 + number)
}

/// The network of the clients that the live generator makes.
pub const CLIENTS: &str = "198.18.0.0/15";

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The machines.
pub struct Line {
    /// The client.
    pub client: Netns,
    /// The node.
    pub node: Netns,
    /// All of the node's tasks.
    pub task: Netns,
    folder: tempfile::TempDir,
}

/// A published port of a cluster file.
pub struct Published {
    /// Its number.
    pub port: u16,
    /// The tasks' port.
    pub target: u16,
    /// Name of the node on which the tasks are.
    pub node: &'static str,
    /// How they are reached.
    pub via: &'static str,
    /// Their addresses.
    pub addresses: Vec<Ipv4Addr>,
}

impl Line {
    /// The machines, wired.
    pub fn new(label: &str) -> Self {
        let [client, node, task] =
            ["client", "node", "task"].map(|who| Netns::new(&format!("{label}-{who}")));
        client.ip(&format!("link add eth1 type veth peer name eth1 netns {}", node.name()));
        node.ip(&format!("link add hv type veth peer name eth0 netns {}", task.name()));
        node.ip("link add gwbridge type bridge");
        for (netns, link, mac) in [
            (&client, "eth1", CLIENT_MAC),
            (&node, "eth1", NODE_MAC),
            (&node, "gwbridge", BRIDGE_MAC),
            (&task, "eth0", TASK_MAC),
        ] {
            netns.ip(&format!("link set {link} address {} up", text(mac)));
        }
        node.ip("link set hv master gwbridge up");
        for (netns, address, link) in
            [(&client, CLIENT, "eth1"), (&client, PEER, "eth1"), (&node, NODE, "eth1")]
        {
            netns.ip(&format!("addr add {address}/24 dev {link}"));
        }
        node.ip("addr add 172.18.1.1/24 dev gwbridge");
        for number in 0..BACKENDS {
            client.ip(&format!("addr add {}/32 dev eth1", routed(number)));
            task.ip(&format!("addr add {}/24 dev eth0", self::task(number)));
        }
        client.ip(&format!("route add 172.18.1.0/24 via {NODE}"));
        task.ip("route add default via 172.18.1.1");
        node.ip(&format!("route add 10.9.0.0/24 via {CLIENT}"));
        node.ip(&format!("route add {CLIENTS} via {CLIENT}"));
        // What is sent at once is more than waits for a neighbour to be found.
        let neighbour = |address: Ipv4Addr, mac: [u8; 6], link: &str| {
            node.ip(&format!("neigh replace {address} lladdr {} dev {link} nud permanent", text(mac)));
        };
        neighbour(CLIENT, CLIENT_MAC, "eth1");
        (0..BACKENDS).for_each(|number| neighbour(self::task(number), TASK_MAC, "gwbridge"));
        run(node.command("sysctl").arg("-qw").args([
            "net.ipv4.ip_forward=1",
            // What comes in by the uplink may leave by it again.
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.eth1.send_redirects=0",
        ]));
        Self { client, node, task, folder: tempfile::tempdir().expect("make a folder") }
    }

    /// A folder that goes with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Has an end of a wire poll for frames that XDP sends to its other end, as a network card does of itself.
    pub fn poll(netns: &Netns, link: &str) {
        run(netns.command("ethtool").args(["-K", link, "gro", "on"]));
    }

    /// Writes the cluster file: two nodes with agents, and a service for each published port.
    pub fn write(&self, services: &[Published]) -> PathBuf {
        let mut text = String::new();
        for (name, address) in [("node1", NODE), ("node2", PEER)] {
            let _ =
                writeln!(text, "[[node]]\nname = \"{name}\"\naddresses = [\"{address}\"]\nagent = true\n");
        }
        for Published { port, target, node, via, addresses } in services {
            let _ = writeln!(text, "[[service]]\nname = \"s{port}\"\nports = [\"{port}:{target}\"]\n");
            for (number, address) in addresses.iter().enumerate() {
                let _ = writeln!(
                    text,
                    "[[service.task]]\nname = \"s{port}.{number}\"\nnode = \"{node}\"\nvia = \"{via}\"\n\
                     addresses = [\"{address}\"]\nstate = \"running\"\n"
                );
            }
        }
        let path = self.folder().join("cluster.toml");
        fs::write(&path, text).expect("write the cluster file");
        path
    }
}
