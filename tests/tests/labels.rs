//! Labels of a real Swarm's services and nodes, heeded by every node's agent.

use std::collections::BTreeMap;

use lb_tests::{
    agent::json,
    netns::within,
    service::{by_task, create, failovers, rotates, serves},
    swarm::{CLIENT, Node, PATIENCE, Swarm},
    traffic::in_turns,
};

#[test]
fn who_may_connect_is_a_label_that_every_node_heeds() {
    let swarm = Swarm::new(3);
    let first = &swarm.nodes[0];
    let _agents = swarm.attach();
    create(first, "web", 5, "80:8080", &["--label", "lb.deny=10.9.9.0/24"], &[]);
    serves(&swarm, "web", 5);
    swarm.nodes.iter().for_each(|node| rotates(&swarm, node, 80, 5));
    let shown = |node: &Node| json(&node.netns, &["service", "ls"])["services"][0].clone();
    let label = |change: [&str; 2]| {
        first.docker(&["service", "update", "-d", change[0], change[1], "web"]);
    };
    let lets_nobody_in = |what: &str| {
        for node in &swarm.nodes {
            within(PATIENCE, &format!("{}: {what}", node.name), || swarm.ask(node, 80).is_err());
            assert!(shown(node)["denied_packets"].as_u64() > Some(0), "{}", shown(node));
        }
    };
    label(["--label-add", "lb.allow=10.0.0.0/8"]);
    lets_nobody_in("the client is not on the list");
    let within_its_network = format!("lb.allow={CLIENT}/24");
    label(["--label-add", &within_its_network]);
    for node in &swarm.nodes {
        within(PATIENCE, "the client is on the list", || swarm.ask(node, 80).is_ok());
        rotates(&swarm, node, 80, 5);
    }
    label(["--label-add", "lb.deny=office"]);
    lets_nobody_in("a list is wrong");
    let wrong = "label lb.deny: \"office\" is neither an address nor a range of them";
    for node in &swarm.nodes {
        assert!(
            shown(node)["problem"].as_str().is_some_and(|said| said.starts_with(wrong)),
            "{}",
            shown(node)
        );
    }
    label(["--label-rm", "lb.deny"]);
    label(["--label-rm", "lb.allow"]);
    // Of the cluster, whichever service says so.
    let all_of_it = format!("lb.cluster.deny=192.0.2.1,{CLIENT}/24");
    label(["--label-add", &all_of_it]);
    lets_nobody_in("no service takes the client");
    let denied = |node: &Node| json(&node.netns, &["status"])["denied"].as_array().map(Vec::len);
    swarm.nodes.iter().for_each(|node| assert_eq!(denied(node), Some(2), "{}", node.name));
    label(["--label-rm", "lb.cluster.deny"]);
    for node in &swarm.nodes {
        let inspect = || json(&node.netns, &["service", "inspect", "web"]);
        within(PATIENCE, "everybody may connect", || {
            inspect()["settings"]["access"].is_null() && denied(node) == Some(0)
        });
        assert!(shown(node)["problem"].is_null(), "{}", shown(node));
        rotates(&swarm, node, 80, 5);
    }
}

#[test]
fn the_addresses_of_a_service_are_a_label_and_need_not_be_there_yet() {
    let swarm = Swarm::new(2);
    let first = &swarm.nodes[0];
    let _agents = swarm.attach();
    create(first, "web", 3, "80:8080", &["--label", "lb.addresses=203.0.113.200"], &[]);
    serves(&swarm, "web", 3);
    let virtual_one = "203.0.113.200".parse().expect("an address");
    for node in &swarm.nodes {
        swarm.client.ip(&format!("route replace {virtual_one} via {}", node.address()));
        in_turns(3, || swarm.ask_at(virtual_one, 80, 9));
        assert!(swarm.ask(node, 80).is_err(), "{} has none of the addresses", node.name);
    }
    first.docker(&["service", "update", "-d", "--label-add", "lb.addresses=192.0.2.0/24", "web"]);
    for node in &swarm.nodes {
        within(PATIENCE, "it is served on every address", || swarm.ask(node, 80).is_ok());
        let shown = json(&node.netns, &["service", "ls"])["services"][0]["problem"].clone();
        assert_eq!(shown, "label lb.addresses: \"192.0.2.0/24\" is no address");
    }
    first.docker(&["service", "update", "-d", "--label-rm", "lb.addresses", "web"]);
    for node in &swarm.nodes {
        let shown = || json(&node.netns, &["service", "ls"])["services"][0]["problem"].clone();
        within(PATIENCE, "nothing is wrong", || shown().is_null());
        rotates(&swarm, node, 80, 3);
    }
}

/// The parts of a node's new connections that tasks get, in percent, by the tasks' nodes.
fn shares(node: &Node) -> BTreeMap<String, Vec<u64>> {
    let mut shares: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for task in json(&node.netns, &["service", "ps", "web"])["tasks"].as_array().expect("a list") {
        let of = task["node"].as_str().expect("a name").to_owned();
        shares.entry(of).or_default().push(task["share"].as_u64().expect("a number"));
    }
    shares
}

/// Asks through a node: so often do tasks answer, least first. Asks again if a SYN was lost.
fn asked(swarm: &Swarm, node: &Node, times: usize, wanted: &[usize]) {
    within(PATIENCE, &format!("{} answers without a SYN that is sent again", node.name), || {
        let before = failovers(node, "web");
        let answers = swarm.ask_often(node, 80, times);
        let mut counts: Vec<usize> = by_task(&answers).into_values().collect();
        counts.sort_unstable();
        let is_certain = failovers(node, "web") == before;
        assert!(!is_certain || counts == wanted, "{answers:?}");
        is_certain
    });
}

#[test]
fn labels_say_whose_tasks_come_first_and_what_they_weigh() {
    let swarm = Swarm::new(2);
    let [first, second] = &swarm.nodes[..] else { unreachable!("two nodes were asked for") };
    let _agents = swarm.attach();
    // Two on each node.
    create(first, "web", 4, "80:8080", &["--replicas-max-per-node", "2"], &[]);
    serves(&swarm, "web", 4);
    let label = |change: &str| first.docker(&["service", "update", "-d", "--label-add", change, "web"]);
    let node_label =
        |node: &Node, change: &str| first.docker(&["node", "update", "--label-add", change, &node.name]);
    let settles = |what: &str, node: &Node, own: u64, other: u64| {
        let wanted = |name: &str| if name == node.name { vec![own; 2] } else { vec![other; 2] };
        let wanted: BTreeMap<_, _> =
            swarm.nodes.iter().map(|node| (node.name.clone(), wanted(&node.name))).collect();
        within(PATIENCE, &format!("{what}, at {}", node.name), || shares(node) == wanted);
    };
    swarm.nodes.iter().for_each(|node| settles("all are equal", node, 25, 25));
    label("lb.prefer=local");
    for node in &swarm.nodes {
        settles("its own come first", node, 50, 0);
        asked(&swarm, node, 4, &[2, 2]);
    }
    swarm.nodes.iter().for_each(|node| drop(node_label(node, "zone=fsn1")));
    label("lb.prefer=zone");
    swarm.nodes.iter().for_each(|node| settles("both are in one zone", node, 25, 25));
    node_label(second, "zone=nbg1");
    swarm.nodes.iter().for_each(|node| settles("each is in a zone of its own", node, 50, 0));
    label("lb.prefer=any");
    node_label(second, "lb.weight=3");
    settles("three times as much", first, 13, 38);
    settles("three times as much", second, 38, 13);
    asked(&swarm, first, 8, &[1, 1, 3, 3]);
    node_label(second, "lb.weight=0");
    settles("none of the other's", first, 50, 0);
    label("lb.prefer=local-only");
    settles("its own are to get none", second, 0, 0);
    within(PATIENCE, "they are refused there", || swarm.ask(second, 80).is_err());
    assert!(swarm.ask(first, 80).is_ok());
    label("lb.prefer=any");
    node_label(second, "lb.weight=heavy");
    let said = "label lb.weight=heavy is no number from 0 to 10";
    for node in &swarm.nodes {
        settles("what is wrong weighs what all do", node, 25, 25);
        let nodes = json(&node.netns, &["node", "ls"])["nodes"].clone();
        let shown = nodes.as_array().expect("a list").iter().find(|of| of["name"] == second.name.as_str());
        assert_eq!(shown.expect("the node")["problem"], said, "{nodes}");
    }
}
