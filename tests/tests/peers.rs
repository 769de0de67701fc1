//! Tasks on other nodes, reached through the tunnel: an agent on every node, the kernel's own stacks on every side.

use std::net::IpAddr;

use lb_tests::{
    agent::{Agent, active_tasks, outcome},
    cluster::{CLIENT4, CLIENT6, Cluster, Reach},
    netns::eventually,
    traffic::{requests, tally},
};

/// Three nodes with five tasks of nginx, spread over them.
fn five_tasks(reach: Reach) -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.reach = reach;
    cluster.receive_xdp();
    for slot in 1..=5 {
        cluster.add_nginx(&format!("web.{slot}"), (slot - 1) % 3);
    }
    cluster
}

/// An agent on every node, all of which offer all tasks.
fn attach<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Vec<Agent<'a>> {
    let path = cluster.folder().join("cluster.toml");
    let path = if path.exists() { path } else { cluster.write_all_running() };
    let attach =
        |node: &'a lb_tests::cluster::Node| Agent::attach(&node.netns, cluster.folder(), &path, arguments);
    let agents = cluster.nodes.iter().map(attach).collect();
    let tasks = cluster.tasks.len() as u64;
    for node in &cluster.nodes {
        eventually("all tasks are offered", || active_tasks(&node.netns, "web") == tasks);
    }
    agents
}

/// Every node answers on both families, two requests a task, and every task sees the client.
fn every_task_sees_the_client_through_every_node(cluster: &Cluster, what: &str) {
    for node in 0..cluster.nodes.len() {
        for address in cluster.addresses(node) {
            let answers = requests(&cluster.client, address, 2 * cluster.tasks.len());
            let seen: IpAddr = if address.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() };
            assert!(
                answers.iter().all(|answer| answer.ends_with(&format!("saw {seen}"))),
                "{what}: {address}: {answers:?}"
            );
            assert!(tally(&answers).values().all(|count| *count == 2), "{what}: {address}: {answers:?}");
            assert_eq!(tally(&answers).len(), cluster.tasks.len(), "{what}: {address}: {answers:?}");
        }
        let netns = &cluster.nodes[node].netns;
        assert!(outcome(netns, "forwarded_peer") > 0 && outcome(netns, "forwarded_local") > 0, "{what}");
        for lost in
            ["handover_lost", "tunnel_not_peer", "tunnel_no_task", "tunnel_malformed", "backend_unreachable"]
        {
            assert_eq!(outcome(netns, lost), 0, "{what}: {lost}");
        }
    }
}

#[test]
fn every_task_sees_the_client_in_every_mode() {
    for reach in [
        Reach { peers: true, ..Reach::default() },
        Reach { peers: true, direct: true, ..Reach::default() },
        Reach { peers: true, outer_v6: true, ..Reach::default() },
        Reach { peers: true, outer_v6: true, direct: true },
    ] {
        let cluster = five_tasks(reach);
        for mode in ["native", "tc", "generic"] {
            let agents = attach(&cluster, &["--mode", mode]);
            every_task_sees_the_client_through_every_node(&cluster, &format!("{reach:?} {mode}"));
            drop(agents);
        }
    }
}
