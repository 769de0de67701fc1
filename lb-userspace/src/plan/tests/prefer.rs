//! Whose tasks come first, and how much each gets.

use super::*;

/// Three nodes, the first of which is this one; web.1 to web.5 on nodes 1, 1, 2, 2 and 3.
fn five() -> ClusterState {
    let mut cluster = nodes(&[1, 2, 3]);
    let task = |(slot, node): (u8, u8)| Task {
        name: format!("web.{slot}"),
        node: format!("node{node}"),
        addresses: vec![format!("172.18.0.{slot}").parse().unwrap()],
        overlay: Some(format!("10.0.0.{slot}").parse().unwrap()),
        state: TaskState::Running,
        weight: 1,
        via: Via::Peer,
        finding: None,
    };
    cluster.service_mut(0).tasks = [(1, 1), (2, 1), (3, 2), (5, 2), (6, 3)].map(task).into();
    cluster
}

/// The tasks that new connections get in turn, after the tables have come from what they were to this.
fn turns(planner: &mut Planner, tables: &mut Tables, cluster: &ClusterState) -> Vec<String> {
    // All next hops are there, whatever the addresses.
    let next_hops = |_| next_hop("192.0.2.250".parse().unwrap());
    let plan = plan_by(planner, (cluster, next_hops), tables, &LIMITS);
    assert_eq!(plan.refused, Vec::<String>::new());
    apply(tables, &plan).unwrap();
    let v4 = |at: &&At| at.address.is_ipv4();
    let at = *tables.listeners.keys().find(v4).unwrap();
    meaning(tables)[&at].iter().map(|name| name.trim_start_matches("web.").to_owned()).collect()
}

/// Whether new connections are refused.
fn is_closed(tables: &Tables) -> bool {
    let v4 = |at: &&At| at.address.is_ipv4();
    let at = tables.listeners.keys().find(v4).unwrap();
    tables.listeners[at].flags & lb_common::endpoint::CLOSED != 0
}

#[test]
fn the_tasks_of_this_node_come_first_while_it_has_any() {
    let (mut planner, mut tables, mut cluster) = (Planner::default(), Tables::empty(LIMITS.slots), five());
    let mut now = |cluster: &ClusterState| turns(&mut planner, &mut tables, cluster).concat();
    assert_eq!(now(&cluster), "12356");
    cluster.service_mut(0).prefer = Prefer::Local;
    assert_eq!(now(&cluster), "12");
    cluster.service_mut(0).tasks[0].state = TaskState::Draining;
    assert_eq!(now(&cluster), "2");
    cluster.service_mut(0).tasks[1].state = TaskState::Starting;
    assert_eq!(now(&cluster), "356", "it falls over");
    cluster.service_mut(0).tasks[0].state = TaskState::Running;
    assert_eq!(now(&cluster), "1", "and comes back");
    cluster.service_mut(0).prefer = Prefer::LocalOnly;
    assert_eq!(now(&cluster), "1");
    cluster.service_mut(0).tasks[0].state = TaskState::Draining;
    assert_eq!(now(&cluster), "", "nobody else gets any");
    assert!(is_closed(&tables), "nor the host, whose mesh would give it to the others");
    cluster.service_mut(0).prefer = Prefer::Local;
    assert_eq!(turns(&mut planner, &mut tables, &cluster).concat(), "356");
    assert!(!is_closed(&tables));
    cluster.service_mut(0).tasks.clear();
    assert_eq!(turns(&mut planner, &mut tables, &cluster).concat(), "");
    assert!(!is_closed(&tables), "who has no task is the host's");
}

#[test]
fn the_tasks_of_this_node_s_zone_come_first() {
    let (mut planner, mut tables, mut cluster) = (Planner::default(), Tables::empty(LIMITS.slots), five());
    cluster.service_mut(0).prefer = Prefer::Zone;
    let problem = |tables: &Tables| tables.services.values().next().unwrap().problem.clone();
    let mut now = |cluster: &ClusterState| {
        let turns = turns(&mut planner, &mut tables, cluster).concat();
        (turns, problem(&tables))
    };
    let said = Some("this node is in no zone, and prefers no tasks".to_owned());
    assert_eq!(now(&cluster), ("12356".to_owned(), said.clone()));
    for (node, zone) in [(0, "a"), (1, "b"), (2, "a")] {
        cluster.nodes[node].zone = zone.to_owned();
    }
    assert_eq!(now(&cluster), ("126".to_owned(), None));
    // Another node's zone alone is a change.
    cluster.nodes[2].zone = "b".to_owned();
    assert_eq!(now(&cluster), ("12".to_owned(), None));
    // As is this one's.
    cluster.nodes[0].zone = "b".to_owned();
    assert_eq!(now(&cluster), ("12356".to_owned(), None));
    cluster.nodes[0].zone = "c".to_owned();
    cluster.service_mut(0).tasks.drain(..2);
    assert_eq!(now(&cluster), ("356".to_owned(), None), "none is in its zone");
    cluster.nodes[0].zone.clear();
    assert_eq!(now(&cluster), ("356".to_owned(), said));
}

#[test]
fn weights_are_exact_shares_and_zero_is_none() {
    let (mut planner, mut tables, mut cluster) = (Planner::default(), Tables::empty(LIMITS.slots), five());
    for (task, weight) in [3, 3, 0, 0, 1].into_iter().enumerate() {
        cluster.service_mut(0).tasks[task].weight = weight;
    }
    let mut now = |cluster: &ClusterState| turns(&mut planner, &mut tables, cluster).concat();
    assert_eq!(now(&cluster), "1261212");
    // Of what comes first, whatever others weigh.
    cluster.service_mut(0).prefer = Prefer::Local;
    assert_eq!(now(&cluster), "12");
    cluster.service_mut(0).tasks[0].weight = 0;
    assert_eq!(now(&cluster), "2");
    cluster.service_mut(0).tasks[1].weight = 0;
    assert_eq!(now(&cluster), "6", "what weighs nothing does not come first");
    cluster.service_mut(0).tasks[4].weight = 0;
    assert_eq!(now(&cluster), "");
    assert!(is_closed(&tables), "nor the host");
}

/// A client's task is chosen among those that come first.
#[test]
fn affinity_chooses_among_those_that_come_first() {
    let (mut planner, mut tables, mut cluster) = (Planner::default(), Tables::empty(LIMITS.slots), five());
    (cluster.service_mut(0).affinity, cluster.service_mut(0).prefer) = (Affinity::Client, Prefer::Local);
    let found: BTreeSet<String> = turns(&mut planner, &mut tables, &cluster).into_iter().collect();
    assert_eq!(found.into_iter().collect::<String>(), "12");
}
