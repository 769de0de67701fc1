//! What the managers know, as the cluster: from the Engine API's lists to plain data, without I/O.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use ipnet::IpNet;

use super::{labels, model};
use crate::{
    cluster::{ClusterState, Node, Port, Protocol, Service, Task, TaskState, Tunnel, Via},
    source::facts::task_name,
    text,
    tunnel_key::NodeKey,
};

/// Host names are cut to so many bytes.
const LONGEST_HOST: usize = 64;

/// The lists of a manager at one moment.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Services.
    pub services: Vec<model::Service>,
    /// Tasks that run, will run, or still run though they should not.
    pub tasks: Vec<model::Task>,
    /// Nodes.
    pub nodes: Vec<model::Node>,
}

/// The cluster as the managers have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ManagerView {
    /// The cluster.
    pub cluster: ClusterState,
    /// The nodes of the swarm, by identifier.
    pub members: BTreeSet<String>,
    /// What the operator should hear once.
    pub notes: Vec<String>,
}

/// What the manager says of a task.
pub fn state(task: &model::Task) -> Option<TaskState> {
    let wanted = matches!(task.desired_state.as_str(), "running" | "ready" | "accepted");
    match task.status.state.as_str() {
        "running" if task.desired_state == "running" => Some(TaskState::Running),
        // Past what is desired, and still there.
        "running" if !wanted => Some(TaskState::Draining),
        "complete" | "shutdown" | "failed" | "rejected" | "remove" | "orphaned" => None,
        // On its way, or in a state that is not known here: no connections yet.
        _ if wanted => Some(TaskState::Starting),
        _ => None,
    }
}

impl Listing {
    /// Whether something is on its way to another state.
    pub fn is_changing(&self) -> bool {
        self.tasks.iter().any(|task| state(task) != Some(TaskState::Running))
    }

    /// When the youngest of all was changed.
    pub fn youngest(&self) -> Option<SystemTime> {
        let services = self.services.iter().filter_map(|service| service.updated_at);
        let tasks = self.tasks.iter().filter_map(|task| task.updated_at);
        services.chain(tasks).chain(self.nodes.iter().filter_map(|node| node.updated_at)).max()
    }

    /// The cluster as these lists have it.
    pub fn view(&self, tunnel: Tunnel) -> ManagerView {
        let mut notes = Vec::new();
        let nodes = self.nodes();
        let members: BTreeSet<String> = self.nodes.iter().map(|node| node.id.clone()).collect();
        let down: BTreeSet<&str> =
            nodes.iter().filter(|node| node.down).map(|node| node.name.as_str()).collect();
        let weighed =
            self.nodes.iter().filter_map(|node| Some((node.id.as_str(), labels::weight(node).ok()??)));
        let weights: HashMap<&str, u16> = weighed.collect();
        let mut tasks: HashMap<&str, Vec<&model::Task>> = HashMap::new();
        for task in &self.tasks {
            tasks.entry(&task.service_id).or_default().push(task);
        }
        let mut services = Vec::new();
        for service in &self.services {
            let (ports, left) = ports(service, tunnel.port, &mut notes);
            let of = tasks.remove(service.id.as_str()).unwrap_or_default();
            let of = of.into_iter().filter_map(|raw| {
                let mut task = task(raw, &service.spec.name).filter(|task| members.contains(&task.node))?;
                // Its node does not answer the managers; if its connections still get there, they go on.
                if task.state == TaskState::Running && down.contains(raw.node_id.as_str()) {
                    task.state = TaskState::Draining;
                }
                task.weight = weights.get(raw.node_id.as_str()).copied().unwrap_or(1);
                Some(task)
            });
            let mut tasks: Vec<Task> = of.collect();
            // Docker lists in no order; the turn of a rotation should not depend on it.
            tasks.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
            let name = service.spec.name.clone();
            let described = labels::service(service, &ports);
            services.push(Arc::new(Service { name, ports, tasks, left, ..described }));
        }
        services.sort_by(|a, b| a.name.cmp(&b.name));
        let denied: BTreeSet<IpNet> = self.services.iter().flat_map(labels::denied).collect();
        let denied = denied.into_iter().collect();
        let cluster =
            ClusterState { nodes, services, denied, tunnel, checks: true, ..ClusterState::default() };
        ManagerView { cluster, members, notes }
    }

    /// What nodes are called. A host name is the node's own to choose: one that another node has too, or that could be taken
    /// for another's, is told apart by the identifier.
    fn hosts(&self) -> HashMap<&str, String> {
        let host = |node: &model::Node| text::name(&node.description.hostname, LONGEST_HOST);
        let with_id =
            |node: &model::Node| format!("{}-{}", host(node), node.id.get(..12).unwrap_or(&node.id));
        // However often a name could be meant.
        let mut count: HashMap<String, usize> = HashMap::new();
        for node in &self.nodes {
            for name in [host(node), with_id(node), node.id.clone()] {
                *count.entry(name).or_default() += 1;
            }
        }
        let is_one = |name: &String| !name.is_empty() && count.get(name) == Some(&1);
        let shown = |node: &model::Node| {
            let chosen = [host(node), with_id(node)].into_iter().find(is_one);
            chosen.filter(|_| !host(node).is_empty()).unwrap_or_else(|| node.id.clone())
        };
        self.nodes.iter().map(|node| (node.id.as_str(), shown(node))).collect()
    }

    fn nodes(&self) -> Vec<Node> {
        let hosts = self.hosts();
        let node = |node: &model::Node| {
            let mut addresses: Vec<IpAddr> = Vec::new();
            let manager = node.manager_status.addr.parse::<SocketAddr>().ok().map(|at| at.ip());
            for address in [manager, node.status.addr.parse().ok()].into_iter().flatten() {
                let useful = !address.is_unspecified() && !address.is_loopback();
                if useful && !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
            let host = hosts.get(node.id.as_str()).filter(|host| **host != node.id).cloned();
            // Whether an agent is there shows when its datapath is asked.
            Node {
                name: node.id.clone(),
                host: host.unwrap_or_default(),
                addresses,
                agent: true,
                down: is_down(node),
                key: NodeKey::Unknown,
                zone: labels::zone(node),
                label_problem: labels::node_problem(node),
            }
        };
        let mut nodes: Vec<Node> = self.nodes.iter().map(node).collect();
        nodes.sort_by(|a, b| (a.shown(), &a.name).cmp(&(b.shown(), &b.name)));
        nodes
    }
}

/// Whether the managers do not hear a node. A new leader knows of no node for a moment; whether an `unknown` one is there its
/// datapath says.
fn is_down(node: &model::Node) -> bool {
    matches!(node.status.state.as_str(), "down" | "disconnected")
}

fn task(raw: &model::Task, service: &str) -> Option<Task> {
    let state = state(raw)?;
    let place = if raw.slot == 0 { raw.node_id.clone() } else { raw.slot.to_string() };
    let attached = raw.networks_attachments.iter().filter(|attachment| attachment.network.spec.ingress);
    let overlay = attached
        .flat_map(|attachment| &attachment.addresses)
        .find_map(|address| address.split('/').next()?.parse::<IpAddr>().ok());
    Some(Task {
        name: task_name(&format!("{service}.{place}.{}", raw.id)),
        node: raw.node_id.clone(),
        addresses: overlay.into_iter().collect(),
        overlay,
        state,
        weight: 1,
        via: Via::Peer,
        finding: None,
    })
}

/// The ports that are served, and those that are not, as users read them.
fn ports(service: &model::Service, tunnel: u16, notes: &mut Vec<String>) -> (Vec<Port>, String) {
    let name = &service.spec.name;
    let (mut served, mut left) = (Vec::new(), Vec::new());
    for port in &service.endpoint.ports {
        let model::Port { protocol, target_port: target, published_port: published, publish_mode } = port;
        if publish_mode == "host" {
            left.push(format!("{published}->{target}/{protocol} (host)"));
            continue;
        }
        let known = match protocol.as_str() {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            _ => None,
        };
        match known {
            _ if *published == 0 || *target == 0 => {}
            // By UDP the nodes send each other packets, by TCP the agents talk.
            Some(protocol) if *published == tunnel => {
                left.push(format!(
                    "*:{published}->{target}/{protocol} (left to Swarm: it is the tunnel's port)"
                ));
                notes.push(format!(
                    "service {name}: port {published}/{protocol} is the tunnel's; publish another, or attach on every node \
                     with another --tunnel-port"
                ));
            }
            Some(protocol) => {
                let port = Port { protocol, published: *published, target: *target };
                if !served.contains(&port) {
                    served.push(port);
                }
            }
            None => {
                left.push(format!("*:{published}->{target}/{protocol} (left to Swarm)"));
                notes
                    .push(format!("service {name}: port {published}/{protocol} is left to Swarm's own mesh"));
            }
        }
    }
    (served, left.join(", "))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::Return;

    /// As Docker 20.10 answered, shortened; a state that is not known here among them.
    pub(in crate::source::docker) fn listing() -> Listing {
        let services = r#"[{"ID": "s1", "UpdatedAt": "2026-11-25T13:22:04.332660173Z",
            "Spec": {"Name": "web", "Labels": {"lb.return": "direct", "lb.timers.established": "900", "lb.timers.idle": "9"}},
            "Endpoint": {"Ports": [
                {"Protocol": "tcp", "TargetPort": 8080, "PublishedPort": 80, "PublishMode": "ingress"},
                {"Protocol": "sctp", "TargetPort": 132, "PublishedPort": 132, "PublishMode": "ingress"},
                {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 6081, "PublishMode": "ingress"},
                {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 6081, "PublishMode": "ingress"},
                {"Protocol": "tcp", "TargetPort": 81, "PublishedPort": 8081, "PublishMode": "host"}]}},
            {"ID": "s2", "Spec": {"Name": "quiet", "Labels": null}, "Endpoint": {"Ports": null}}]"#;
        let task = |id: &str, slot: u8, node: &str, desired: &str, state: &str, address: u8| {
            format!(
                r#"{{"ID": "{id}", "ServiceID": "s1", "Slot": {slot}, "NodeID": "{node}", "DesiredState": "{desired}",
                "UpdatedAt": "2026-11-25T13:22:06.5Z", "Status": {{"State": "{state}"}}, "NetworksAttachments": [
                {{"Network": {{"Spec": {{"Name": "ingress", "Ingress": true}}}}, "Addresses": ["10.0.0.{address}/24"]}}]}}"#
            )
        };
        let tasks = [
            task("taskaaaaaaaaaaaaaa", 2, "n1", "running", "running", 7),
            task("taskbbbbbbbbbbbbbb", 1, "n2", "shutdown", "running", 8),
            task("taskcccccccccccccc", 1, "n2", "running", "defrosting", 9),
            task("taskdddddddddddddd", 3, "n2", "shutdown", "failed", 10),
            task("taskeeeeeeeeeeeeee", 4, "n3", "running", "running", 11),
        ];
        let nodes = r#"[{"ID": "n1", "Description": {"Hostname": "node1"}, "Status": {"State": "ready", "Addr": "0.0.0.0"},
                "ManagerStatus": {"Addr": "192.0.2.1:2377"}},
            {"ID": "n2", "Description": {"Hostname": "twin"}, "Status": {"State": "unknown", "Addr": "127.0.0.1"}},
            {"ID": "n3", "Description": {"Hostname": "twin"}, "Status": {"State": "down", "Addr": "192.0.2.3"}}]"#;
        Listing {
            services: serde_json::from_str(services).unwrap(),
            tasks: tasks.iter().map(|text| serde_json::from_str(text).unwrap()).collect(),
            nodes: serde_json::from_str(nodes).unwrap(),
        }
    }

    #[test]
    fn tasks_are_eligible_draining_starting_or_gone() {
        let view = listing().view(Tunnel::default());
        let web = &view.cluster.services[1];
        let tasks: Vec<_> = web.tasks.iter().map(|t| (t.name.as_str(), t.node.as_str(), t.state)).collect();
        assert_eq!(
            tasks,
            [
                ("web.1.taskbbbbbbbb", "n2", TaskState::Draining),
                ("web.1.taskcccccccc", "n2", TaskState::Starting),
                ("web.2.taskaaaaaaaa", "n1", TaskState::Running),
                // Its node is down.
                ("web.4.taskeeeeeeee", "n3", TaskState::Draining),
            ]
        );
        assert_eq!(web.tasks[2].overlay, "10.0.0.7".parse().ok());
        assert!(listing().is_changing());
    }

    #[test]
    fn ports_that_are_not_served_are_named() {
        let view = listing().view(Tunnel::default());
        let web = &view.cluster.services[1];
        assert_eq!(web.ports, ["80:8080".parse().unwrap()]);
        assert_eq!(
            web.left,
            "*:132->132/sctp (left to Swarm), *:6081->53/udp (left to Swarm: it is the tunnel's port), \
             *:6081->80/tcp (left to Swarm: it is the tunnel's port), 8081->81/tcp (host)"
        );
        assert_eq!(view.notes.len(), 3, "{:?}", view.notes);
        assert_eq!(web.returns, Some(Return::Direct));
        let quiet = &view.cluster.services[0];
        assert_eq!((quiet.name.as_str(), quiet.ports.len(), quiet.left.as_str()), ("quiet", 0, ""));
    }

    #[test]
    fn nodes_are_where_the_managers_see_them() {
        let nodes = listing().view(Tunnel::default()).cluster.nodes;
        let nodes: Vec<_> =
            nodes.iter().map(|node| (&*node.name, node.shown(), node.addresses.clone())).collect();
        let ip = |text: &str| vec![text.parse::<IpAddr>().unwrap()];
        assert_eq!(
            nodes,
            [("n1", "node1", ip("192.0.2.1")), ("n2", "twin-n2", vec![]), ("n3", "twin-n3", ip("192.0.2.3"))]
        );
    }

    /// What a node calls itself is nobody else's name, whatever it is.
    #[test]
    fn no_host_name_is_taken_for_another_s() {
        let shown = |hosts: &[(&str, &str)]| -> Vec<String> {
            let node = |(id, host): &(&str, &str)| {
                serde_json::from_value(serde_json::json!({"ID": id, "Description": {"Hostname": host}}))
                    .unwrap()
            };
            let listing = Listing { nodes: hosts.iter().map(node).collect(), ..Listing::default() };
            let hosts = listing.hosts();
            listing.nodes.iter().map(|node| hosts[node.id.as_str()].clone()).collect()
        };
        let (a, b, c) =
            ("aaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbbb", "ccccccccccccccccccccccccc");
        assert_eq!(shown(&[(a, "node1"), (b, ""), (c, "node3")]), ["node1", b, "node3"]);
        assert_eq!(
            shown(&[(a, "node2"), (b, "node2"), (c, "node2-aaaaaaaaaaaa")]),
            [a, "node2-bbbbbbbbbbbb", "node2-aaaaaaaaaaaa-cccccccccccc"]
        );
        assert_eq!(shown(&[(a, "node1"), (b, a)]), ["node1", &format!("{a}-bbbbbbbbbbbb")]);
        // What is the same once it is cut and cleaned is the same.
        let long = |end: &str| format!("{}{end}", "x".repeat(64));
        let names = shown(&[(a, &long("1")), (b, &long("2")), (c, "node9\u{1b}[2J")]);
        assert_eq!(names[0], format!("{}-aaaaaaaaaaaa", "x".repeat(64)));
        assert_ne!(names[0], names[1]);
        assert_eq!(names[2], "node9\u{fffd}[2J");
    }

    #[test]
    fn the_youngest_change_is_known() {
        let youngest = listing().youngest().unwrap();
        assert_eq!(youngest, humantime::parse_rfc3339("2026-11-25T13:22:06.5Z").unwrap());
    }
}
