//! Properties of planning: from any state to any state.

mod prefer;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use lb_common::{
    backend::{SINGLE, State},
    slot::Slot,
};
use proptest::prelude::*;

use super::*;
use crate::{
    cluster::{
        Access, Affinity, ClusterState, Idle, Node, Port, Prefer, Protocol, Scheduler, Service, Task,
        TaskState, Via,
    },
    translation::stand_in,
    tunnel_key::Cookies,
};

// Room for two generations of the most that `cluster` makes, for a plan gives nothing again that it frees: backends of five
// services, five tasks, two ports and two families, and consistent placement of all of them.
const LIMITS: Limits =
    Limits { services: 8, listeners: 64, backends: 256, slots: 65_536, nodes: 8, ranges: 64 };

fn addresses() -> Vec<IpAddr> {
    vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap(), "2001:db8::1".parse().unwrap()]
}

/// A cluster of a few services with a few tasks, and the next hops of one node.
fn cluster() -> impl Strategy<Value = ClusterState> {
    let state = prop_oneof![Just(TaskState::Starting), Just(TaskState::Running), Just(TaskState::Draining)];
    let task = (
        0_u8..6,
        state,
        0_u16..4,
        any::<bool>(),
        prop_oneof![Just(Via::Snat), Just(Via::Routed), Just(Via::Peer)],
        any::<bool>(),
    );
    let port = (0_u16..2, prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)], 0_u16..2);
    let scheduler = prop_oneof![
        6 => Just(Scheduler::RoundRobin), 2 => Just(Scheduler::LeastConnections), 1 => Just(Scheduler::Random), 1 => Just(Scheduler::Maglev), 1 => Just(Scheduler::Source)
    ];
    let idle = prop_oneof![3 => Just(Idle::Forget), 1 => Just(Idle::Reset)];
    let range = || prop::sample::select(vec!["10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"]);
    let ranges = move || prop::collection::vec(range().prop_map(|range| range.parse().unwrap()), 0..3);
    let listed = (prop::option::of(ranges()), ranges()).prop_map(|(allow, deny)| Access { allow, deny });
    let access = prop_oneof![2 => Just(Access::default()), 1 => listed];
    let affinity = prop_oneof![3 => Just(Affinity::None), 1 => Just(Affinity::Client)];
    let prefer = prop_oneof![
        3 => Just(Prefer::Any), 1 => Just(Prefer::Local), 1 => Just(Prefer::Zone), 1 => Just(Prefer::LocalOnly)
    ];
    let settings = (scheduler, affinity, prefer, idle, access);
    let service = (prop::collection::vec(task, 0..6), prop::collection::vec(port, 1..3), settings);
    // A third node comes and goes, the second one's agent, and what zones they lie in.
    let others = (any::<bool>(), any::<bool>(), any::<[bool; 3]>());
    (prop::collection::btree_map(0_u8..5, service, 0..5), others).prop_map(
        |(services, (agent, third, near))| {
            let node = |number: u8, agent| Node {
                name: format!("node{number}"),
                addresses: vec![format!("192.0.2.{}", 100 + number).parse().unwrap()],
                agent,
                zone: if near[usize::from(number) - 1] { "a" } else { "" }.to_owned(),
                ..Node::default()
            };
            let mut nodes = vec![node(1, true), node(2, agent)];
            nodes.extend(third.then(|| node(3, true)));
            let services = services.into_iter().map(
                |(number, (tasks, ports, (scheduler, affinity, prefer, idle, access)))| Service {
                    scheduler,
                    affinity,
                    prefer,
                    idle,
                    access,
                    ..build(number, tasks, ports)
                },
            );
            let services = services.map(Arc::new).collect();
            ClusterState { nodes, services, ..ClusterState::default() }
        },
    )
}

type RawTask = (u8, TaskState, u16, bool, Via, bool);

fn build(number: u8, tasks: Vec<RawTask>, ports: Vec<(u16, Protocol, u16)>) -> Service {
    let mut seen = BTreeMap::new();
    for (slot, state, weight, here, via, dual) in tasks {
        let mut addresses: Vec<IpAddr> = vec![format!("10.0.{number}.{}", slot + 1).parse().unwrap()];
        if dual {
            let v6: Ipv6Addr = format!("fd00::{number}:{}", slot + 1).parse().unwrap();
            // One of three has that alone.
            if slot % 3 == 2 {
                addresses = vec![stand_in(v6, |_| false).into()];
            }
            addresses.push(v6.into());
        }
        let node = if here { "node1" } else { "node2" }.to_owned();
        let name = format!("s{number}.{slot}");
        seen.insert(slot, Task { name, node, addresses, overlay: None, state, weight, via, finding: None });
    }
    let ports: BTreeMap<_, _> =
        ports.into_iter().map(|(offset, protocol, target)| ((offset, protocol), target)).collect();
    Service {
        name: format!("s{number}"),
        ports: ports
            .into_iter()
            .map(|((offset, protocol), target)| Port {
                protocol,
                published: 100 * u16::from(number) + offset + 1,
                target: 8000 + target,
            })
            .collect(),
        tasks: seen.into_values().collect(),
        ..Service::default()
    }
}

fn next_hop(address: IpAddr) -> Result<NextHop, String> {
    // Some have no next hop at all.
    if address.to_string().ends_with('4') {
        return Err("no route".into());
    }
    Ok(NextHop {
        ifindex: 7,
        mac: [2; 6],
        source_mac: [4; 6],
        source: Some(address),
        mtu: 1500,
        flags: 0,
        silent: None,
    })
}

/// A plan by a planner that remembers, for a cluster seen from its first node.
fn plan_by(
    planner: &mut Planner,
    (cluster, next_hops): (&ClusterState, impl Fn((IpAddr, Reach)) -> Result<NextHop, String>),
    actual: &Tables,
    limits: &Limits,
) -> Plan {
    let next_hops: NextHops =
        planner.destinations(cluster, "node1").into_iter().map(|to| (to, next_hops(to))).collect();
    let view = View {
        cluster,
        node: "node1",
        addresses: &addresses(),
        named: &[],
        cookies: &BTreeMap::new(),
        next_hops: &next_hops,
    };
    planner.plan(&view, actual, limits)
}

/// A plan by one that remembers nothing.
fn plan_for(cluster: &ClusterState, actual: &Tables, limits: &Limits) -> Plan {
    plan_by(&mut Planner::default(), (cluster, |(address, _)| next_hop(address)), actual, limits)
}

fn apply(tables: &mut Tables, plan: &Plan) -> Result<(), TestCaseError> {
    for (step, op) in plan.ops.iter().enumerate() {
        tables.apply(op.clone());
        let wrong = tables.contradictions();
        prop_assert!(wrong.is_empty(), "after step {step} {op:?}: {wrong:?}");
    }
    Ok(())
}

/// What a new connection to each listener may get, by task: the meaning of the tables, free of numbers.
fn meaning(tables: &Tables) -> BTreeMap<At, Vec<String>> {
    let tasks = |listener| {
        let slots = tables.slots_of(listener).unwrap();
        slots.iter().map(|slot| tables.backends[&slot.backend()].label.task.clone()).collect()
    };
    tables.listeners.iter().map(|(at, listener)| (*at, tasks(listener))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Through any sequence of states: no step contradicts itself, the end means what a start from nothing
    /// means, and planning again changes nothing.
    #[test]
    fn any_sequence_of_states_is_planned(states in prop::collection::vec(cluster(), 1..6)) {
        let mut tables = Tables::empty(LIMITS.slots);
        let mut planner = Planner::default();
        for state in &states {
            let plan = plan_by(&mut planner, (state, |(address, _)| next_hop(address)), &tables, &LIMITS);
            prop_assert_eq!(&plan.refused, &Vec::<String>::new());
            apply(&mut tables, &plan)?;
            let mut fresh = Tables::empty(LIMITS.slots);
            apply(&mut fresh, &plan_for(state, &Tables::empty(LIMITS.slots), &LIMITS))?;
            prop_assert_eq!(meaning(&tables), meaning(&fresh));
            prop_assert_eq!(&tables.filter, &fresh.filter);
            prop_assert_eq!(tables.backends.len(), fresh.backends.len());
            prop_assert_eq!(tables.endpoints.len(), fresh.endpoints.len());
            prop_assert_eq!(&tables.tasks.keys().collect::<Vec<_>>(), &fresh.tasks.keys().collect::<Vec<_>>());
            prop_assert_eq!(tables.peers.len(), fresh.peers.len());
            prop_assert_eq!(tables.peer_numbers.len(), fresh.peer_numbers.len());
            prop_assert_eq!(tables.services.len(), fresh.services.len());
            prop_assert_eq!(tables.ports.len(), fresh.ports.len());
            prop_assert_eq!(tables.access.len(), fresh.access.len());
            prop_assert!(plan_for(state, &tables, &LIMITS).ops.is_empty());
        }
    }

    /// What a planner remembers changes nothing: through states in which services claim each other's ports and addresses,
    /// next hops come and go and tables are too small, its plans are those of one that remembers nothing.
    #[test]
    fn what_is_remembered_changes_nothing(
        states in prop::collection::vec((cluster(), any::<[u8; 3]>(), stir()), 1..12),
        services in 2_u32..8, listeners in 4_u32..32, backends in 4_u32..64, slots in 8_u32..128, nodes in 1_u32..4,
    ) {
        let limits = Limits { services, listeners, backends, slots, nodes, ranges: 8 };
        let (mut planner, mut tables) = (Planner::default(), Tables::empty(slots));
        let mut before = ClusterState::default();
        for (mut state, chance, stir) in states {
            if stir.quarrel {
                quarrel(&mut state, chance[0]);
            }
            if stir.returns {
                state.tunnel.returns = crate::cluster::Return::Direct;
            }
            keep(&mut state, &before, &stir);
            state.share(&before);
            let next_hops = |to| next_hop_at_times(to, if stir.next_hops { chance[1] } else { 0 });
            let fresh = plan_by(&mut Planner::default(), (&state, next_hops), &tables, &limits);
            let plan = plan_by(&mut planner, (&state, next_hops), &tables, &limits);
            prop_assert_eq!(&plan, &fresh);
            let problems = |tables: &Tables| tables.backends.values().filter(|e| e.label.problem.is_some()).count();
            // Cut short at times: then all is forgotten.
            let steps = if chance[2] < 32 { plan.ops.len() / 2 } else { plan.ops.len() };
            apply(&mut tables, &Plan { ops: plan.ops[..steps].to_vec(), refused: vec![], again: false })?;
            if steps < plan.ops.len() {
                planner.forget();
            } else {
                prop_assert_eq!(planner.unreached(), problems(&tables));
            }
            before = state;
        }
    }

    /// With tables too small, what is left out is left out whole and said, and the rest is right.
    #[test]
    fn what_does_not_fit_is_left_out_whole(
        states in prop::collection::vec(cluster(), 1..5),
        services in 1_u32..4, listeners in 1_u32..8, backends in 1_u32..12, slots in 1_u32..24,
    ) {
        let limits = Limits { services, listeners, backends, slots, nodes: 8, ranges: 64 };
        let mut tables = Tables::empty(slots);
        for state in &states {
            let plan = plan_for(state, &tables, &limits);
            apply(&mut tables, &plan)?;
            let left_out = plan.refused.len();
            prop_assert_eq!(tables.services.len() + left_out, state.services.len());
            prop_assert!(plan.refused.iter().all(|reason| reason.contains("--max-")));
            prop_assert!(tables.services.keys().all(|index| *index < services));
            prop_assert!(tables.backends.keys().all(|index| *index < backends));
            // What was freed may have been enough.
            if plan.again {
                let more = plan_for(state, &tables, &limits);
                apply(&mut tables, &more)?;
                prop_assert!(more.refused.len() <= plan.refused.len());
            } else {
                prop_assert!(plan_for(state, &tables, &limits).ops.is_empty());
            }
        }
    }

    /// Crashing after any step and planning anew from what stands ends in the same meaning.
    #[test]
    fn a_plan_cut_short_is_taken_up_again(from in cluster(), to in cluster(), cut in any::<prop::sample::Index>()) {
        let mut tables = Tables::empty(LIMITS.slots);
        apply(&mut tables, &plan_for(&from, &Tables::empty(LIMITS.slots), &LIMITS))?;
        let plan = plan_for(&to, &tables, &LIMITS);
        let steps = cut.index(plan.ops.len() + 1);
        apply(&mut tables, &Plan { ops: plan.ops[..steps].to_vec(), refused: vec![], again: false })?;
        let rest = plan_for(&to, &tables, &LIMITS);
        apply(&mut tables, &rest)?;
        let mut fresh = Tables::empty(LIMITS.slots);
        apply(&mut fresh, &plan_for(&to, &Tables::empty(LIMITS.slots), &LIMITS))?;
        prop_assert_eq!(meaning(&tables), meaning(&fresh));
    }
}

/// What is other than before in a state: most changes concern few services, and little else.
#[derive(Debug)]
struct Stir {
    services: u8,
    nodes: bool,
    quarrel: bool,
    returns: bool,
    next_hops: bool,
}

fn stir() -> impl Strategy<Value = Stir> {
    let seldom = || prop::bool::weighted(0.15);
    let services = (any::<u8>(), any::<u8>()).prop_map(|(one, other)| one & other);
    (services, seldom(), seldom(), seldom(), seldom()).prop_map(
        |(services, nodes, quarrel, returns, next_hops)| Stir {
            services,
            nodes,
            quarrel,
            returns,
            next_hops,
        },
    )
}

/// Leaves what is not stirred as it was.
fn keep(state: &mut ClusterState, before: &ClusterState, stir: &Stir) {
    if !stir.nodes && !before.nodes.is_empty() {
        state.nodes.clone_from(&before.nodes);
    }
    for (index, service) in state.services.iter_mut().enumerate() {
        if stir.services & (1 << index) == 0
            && let Some(known) = before.services.iter().find(|known| known.name == service.name)
        {
            service.clone_from(known);
        }
    }
}

/// Has the services claim each other's ports and addresses, by chance.
fn quarrel(state: &mut ClusterState, chance: u8) {
    for index in 1..state.services.len() {
        let first = state.services[0].clone();
        let service = state.service_mut(index);
        if chance & 1 != 0 {
            service.ports[0].published = first.ports[0].published;
        }
        if chance & 2 != 0
            && let (Some(task), Some(own)) = (service.tasks.first_mut(), first.tasks.first())
        {
            task.addresses.clone_from(&own.addresses);
        }
    }
    if chance & 4 != 0 {
        state.services.reverse();
    }
}

/// Next hops that come, go and fall silent, by chance.
fn next_hop_at_times((address, reach): (IpAddr, Reach), chance: u8) -> Result<NextHop, String> {
    let next_hop = next_hop(address)?;
    match (chance % 4, reach) {
        (1, Reach::Local) => Err("the veth is down".into()),
        (2, Reach::Peer) => Ok(NextHop { silent: Some("it sleeps".into()), ..next_hop }),
        (3, _) => Ok(NextHop { ifindex: 8, flags: 1, ..next_hop }),
        _ => Ok(next_hop),
    }
}

fn one_service(states: &[TaskState]) -> ClusterState {
    let tasks =
        states.iter().enumerate().map(|(slot, state)| (slot as u8, *state, 1, true, Via::Snat, false));
    let service = build(1, tasks.collect(), vec![(0, Protocol::Tcp, 0)]);
    ClusterState { services: vec![service.into()], ..ClusterState::default() }
}

#[test]
fn a_freed_number_rests_and_comes_back_with_another_generation() {
    let limits = Limits { backends: 2, ..LIMITS };
    let mut tables = Tables::empty(LIMITS.slots);
    let mut go = |states: &[TaskState]| {
        let plan = plan_for(&one_service(states), &tables, &limits);
        plan.ops.into_iter().for_each(|op| tables.apply(op));
        tables.backends.iter().map(|(i, e)| (*i, e.backend.generation)).collect::<Vec<_>>()
    };
    assert_eq!(go(&[TaskState::Running]), [(0, 1)]);
    assert_eq!(go(&[]), []);
    assert_eq!(go(&[TaskState::Running]), [(1, 1)]);
    assert_eq!(go(&[TaskState::Running, TaskState::Running]), [(0, 2), (1, 1)]);
}

#[test]
fn what_one_service_leaves_the_next_has_by_a_second_plan() {
    let limits = Limits { backends: 2, ..LIMITS };
    let mut tables = Tables::empty(LIMITS.slots);
    let mut planner = Planner::default();
    let mut go = |cluster: &ClusterState| {
        let plan = plan_by(&mut planner, (cluster, |(address, _)| next_hop(address)), &tables, &limits);
        plan.ops.iter().for_each(|op| tables.apply(op.clone()));
        let there = tables.services.values().map(|label| label.name.clone()).collect::<Vec<_>>();
        (there, plan.refused.len(), plan.again)
    };
    let first = one_service(&[TaskState::Running; 2]);
    let mut other = first.clone();
    other.service_mut(0).name = "other".into();
    assert_eq!(go(&first), (vec!["s1".into()], 0, false));
    assert_eq!(go(&other), (vec![], 1, true));
    assert_eq!(go(&other), (vec!["other".into()], 0, false));
    // A service that is too large is left out whole, and nothing is freed for it.
    let large = one_service(&[TaskState::Running; 3]);
    assert_eq!(go(&large), (vec![], 1, true));
    assert_eq!(go(&large), (vec![], 1, false));
}

#[test]
fn addresses_of_nodes_without_room_are_said() {
    let limits = Limits { nodes: 1, ..LIMITS };
    let address = |i: u8| IpAddr::from([198, 51, 100, i]);
    let node = |name: &str, first: u8| Node {
        name: name.into(),
        addresses: (first..first + 5).map(address).collect(),
        agent: true,
        ..Node::default()
    };
    let mut tables = Tables::empty(LIMITS.slots);
    let mut go = |cluster: &ClusterState| {
        let plan = plan_for(cluster, &tables, &limits);
        for op in plan.ops {
            tables.apply(op);
            assert!(tables.peer_numbers.len() <= 8, "there is no room for more in the kernel's table");
        }
        (tables.peer_numbers.contains_key(&address(9)), plan.refused)
    };
    let cluster = |nodes: Vec<Node>| ClusterState { nodes, ..ClusterState::default() };
    assert_eq!(go(&cluster(vec![node("a", 1)])), (false, vec![]));
    // Another in its place.
    assert_eq!(go(&cluster(vec![])), (false, vec![]));
    assert_eq!(go(&cluster(vec![node("b", 6)])), (true, vec![]));
    let mut many = node("b", 6);
    many.addresses.extend((11..20).map(address));
    let (known, refused) = go(&cluster(vec![many]));
    assert!(known && refused[0].contains("8 of its 14 addresses"), "{refused:?}");
}

#[test]
fn a_draining_task_keeps_its_number_and_leaves_the_slots() {
    let mut tables = Tables::empty(LIMITS.slots);
    for states in [[TaskState::Running; 2], [TaskState::Running, TaskState::Draining]] {
        plan_for(&one_service(&states), &tables, &LIMITS).ops.into_iter().for_each(|op| tables.apply(op));
    }
    assert_eq!(tables.backends[&1].backend.state, State::Draining as u8);
    assert!(tables.listeners.values().filter(|l| l.slot_count > 0).all(|l| l.slot_count == 1));
}

#[test]
fn a_way_that_is_lost_and_found_leaves_the_backend_what_it_was() {
    let cluster = one_service(&[TaskState::Running]);
    let (mut planner, mut tables) = (Planner::default(), Tables::empty(LIMITS.slots));
    let mut seen = Vec::new();
    for next_hop in [next_hop(addresses()[0]), Err("lost".into()), next_hop(addresses()[0])] {
        plan_by(&mut planner, (&cluster, |_| next_hop.clone()), &tables, &LIMITS)
            .ops
            .into_iter()
            .for_each(|op| tables.apply(op));
        let (index, entry) = tables.backends.first_key_value().unwrap();
        seen.push((*index, entry.backend.generation, entry.backend.state, entry.label.problem.is_some()));
    }
    let (active, unavailable) = (State::Active as u8, State::Unavailable as u8);
    assert_eq!(seen, [(0, 1, active, false), (0, 1, unavailable, true), (0, 1, active, false)]);
}

#[test]
fn a_task_inherits_the_clients_of_the_one_whose_place_it_takes() {
    let mut cluster = one_service(&[TaskState::Running; 5]);
    let name = |slot: usize, id: &str| format!("s1.{slot}.{id}");
    let tasks = &mut cluster.service_mut(0).tasks;
    tasks.iter_mut().enumerate().for_each(|(slot, task)| task.name = name(slot, "aaaaaaaaaaaa"));
    let limits = Limits { slots: 8_192, ..LIMITS };
    let mut tables = Tables::empty(limits.slots);
    let mut slots = |cluster: &ClusterState| {
        let plan = plan_for(cluster, &tables, &limits);
        assert_eq!(plan.refused, Vec::<String>::new());
        apply(&mut tables, &plan).unwrap();
        let listener = tables.listeners.values().find(|listener| listener.slot_count > 0).unwrap();
        let place =
            |slot: &Slot| tables.backends[&slot.backend()].label.task.split('.').nth(1).unwrap().to_owned();
        let places = tables.slots_of(listener).unwrap().iter().map(place).collect::<Vec<_>>();
        (listener.flags, places)
    };
    assert_eq!(slots(&cluster).0, 0);
    // The setting alone is a change.
    cluster.service_mut(0).affinity = Affinity::Client;
    let before = slots(&cluster);
    assert_eq!(before.0, lb_common::endpoint::CONSISTENT | lb_common::endpoint::AFFINE);
    // The next hop to one of the five is none.
    assert_eq!(before.1.iter().collect::<BTreeSet<_>>().len(), 4);
    for slot in [3, 0] {
        cluster.service_mut(0).tasks[slot].name = name(slot, "bbbbbbbbbbbb");
        assert_eq!(slots(&cluster), before);
    }
}

#[test]
fn consistent_placement_changes_few_slots_when_a_task_goes() {
    let mut cluster = one_service(&[TaskState::Running; 5]);
    cluster.service_mut(0).scheduler = Scheduler::Maglev;
    let limits = Limits { slots: 8_192, ..LIMITS };
    let mut tables = Tables::empty(limits.slots);
    let mut slots = Vec::new();
    for gone in [None, Some(2)] {
        if let Some(gone) = gone {
            cluster.service_mut(0).tasks.remove(gone);
        }
        let plan = plan_for(&cluster, &tables, &limits);
        assert_eq!(plan.refused, Vec::<String>::new());
        apply(&mut tables, &plan).unwrap();
        let listener = tables.listeners.values().find(|listener| listener.slot_count > 0).unwrap();
        assert_eq!(listener.flags, lb_common::endpoint::CONSISTENT);
        let names = |slot: &Slot| tables.backends[&slot.backend()].label.task.clone();
        slots.push(tables.slots_of(listener).unwrap().iter().map(names).collect::<Vec<_>>());
    }
    let moved = slots[0].iter().zip(&slots[1]).filter(|(before, after)| *before != "s1.2" && before != after);
    assert!(moved.count() * 20 < slots[0].len());
    // Back in turn, with as few slots as tasks.
    cluster.service_mut(0).scheduler = Scheduler::RoundRobin;
    let plan = plan_for(&cluster, &tables, &limits);
    apply(&mut tables, &plan).unwrap();
    assert!(tables.listeners.values().all(|listener| listener.flags == 0 && listener.slot_count <= 4));
}

/// Whether the tables say that a client may connect to the service's listeners; nothing if they do not ask.
fn may_connect(tables: &Tables, client: &str) -> Option<bool> {
    let listener = tables.listeners.values().next()?;
    let client: IpAddr = client.parse().unwrap();
    let ranges = tables
        .access
        .iter()
        .filter(|((service, range), _)| *service == listener.service && range.contains(&client));
    let narrowest = ranges.max_by_key(|((_, range), _)| range.prefix_len()).map(|(_, allowed)| *allowed);
    (listener.flags & lb_common::endpoint::RESTRICTED != 0).then(|| narrowest.unwrap())
}

#[test]
fn who_may_connect_before_and_after_may_at_each_step_between() {
    let list = |allow: Option<&[&str]>, deny: &[&str]| {
        let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Access { allow: allow.map(ranges), deny: ranges(deny) }
    };
    let lists = [
        list(None, &[]),
        list(None, &["10.0.0.0/8"]),
        list(Some(&["10.1.0.0/16", "192.0.2.0/24"]), &["10.1.1.0/24"]),
        list(Some(&["192.0.2.7/32"]), &[]),
        list(Some(&[]), &[]),
    ];
    let clients = ["10.1.0.1", "10.1.1.1", "192.0.2.7", "198.51.100.1", "2001:db8::9"];
    let expected = [
        [None; 5],
        [Some(false), Some(false), Some(true), Some(true), Some(true)],
        [Some(true), Some(false), Some(true), Some(false), Some(false)],
        [Some(false), Some(false), Some(true), Some(false), Some(false)],
        [Some(false); 5],
    ];
    for from in 0..lists.len() {
        for to in 0..lists.len() {
            let mut cluster = one_service(&[TaskState::Running]);
            let mut tables = Tables::empty(LIMITS.slots);
            cluster.service_mut(0).access = lists[from].clone();
            apply_all(&mut tables, &cluster);
            assert_eq!(clients.map(|client| may_connect(&tables, client)), expected[from]);
            cluster.service_mut(0).access = lists[to].clone();
            for op in plan_for(&cluster, &tables, &LIMITS).ops {
                tables.apply(op);
                for (index, client) in clients.iter().enumerate() {
                    let may = |answer: Option<bool>| answer.unwrap_or(true);
                    let (before, after) = (may(expected[from][index]), may(expected[to][index]));
                    let now = may(may_connect(&tables, client));
                    assert!(now == before || now == after, "{client} from {from} to {to}");
                }
            }
            assert_eq!(clients.map(|client| may_connect(&tables, client)), expected[to]);
            assert_eq!(tables.access.is_empty(), to == 0);
        }
    }
}

#[test]
fn a_service_whose_list_finds_no_room_is_closed_and_keeps_its_connections() {
    let list = |first: u8, count: u8| {
        let ranges = (0..count).map(|number| format!("10.{first}.{number}.0/24").parse().unwrap());
        Access { allow: Some(ranges.collect()), deny: Vec::new() }
    };
    let mut cluster = one_service(&[TaskState::Running]);
    cluster.service_mut(0).access = list(0, 40);
    let mut tables = Tables::empty(LIMITS.slots);
    assert_eq!(apply_all(&mut tables, &cluster), Vec::<String>::new());
    let backends = tables.backends.clone();
    let closed = [
        "service s1: nobody may connect: there is room for 64 ranges in the lists of all services; allow or deny fewer, \
                   wider ones",
    ];
    // Before the old ones have gone there is no room for as many new ones.
    cluster.service_mut(0).access = list(1, 40);
    let plan = plan_for(&cluster, &tables, &LIMITS);
    assert_eq!((plan.refused.as_slice(), plan.again), ([closed[0].to_owned()].as_slice(), true));
    apply(&mut tables, &plan).unwrap();
    assert_eq!((may_connect(&tables, "10.1.0.1"), &tables.backends), (Some(false), &backends));
    let plan = plan_for(&cluster, &tables, &LIMITS);
    assert_eq!((plan.refused.len(), plan.again), (0, false));
    apply(&mut tables, &plan).unwrap();
    assert_eq!((may_connect(&tables, "10.1.0.1"), &tables.backends), (Some(true), &backends));
    cluster.service_mut(0).access = list(2, 63);
    for again in [true, false] {
        let plan = plan_for(&cluster, &tables, &LIMITS);
        assert_eq!((plan.refused.as_slice(), plan.again), ([closed[0].to_owned()].as_slice(), again));
        apply(&mut tables, &plan).unwrap();
        assert_eq!((may_connect(&tables, "10.2.0.1"), &tables.backends), (Some(false), &backends));
    }
    assert!(tables.listeners.values().all(|listener| listener.flags & lb_common::endpoint::RESTRICTED != 0));
}

#[test]
fn whom_no_service_takes_is_denied_as_far_as_there_is_room() {
    let ranges = |count: u8| -> Vec<ipnet::IpNet> {
        (0..count).map(|number| format!("10.9.{number}.7/24").parse().unwrap()).collect()
    };
    let mut cluster = one_service(&[TaskState::Running]);
    let mut tables = Tables::empty(LIMITS.slots);
    let mut planner = Planner::default();
    let mut follow = |tables: &mut Tables, cluster: &ClusterState| {
        let plan = plan_by(&mut planner, (cluster, |(address, _)| next_hop(address)), tables, &LIMITS);
        apply(tables, &plan).unwrap();
        plan.refused
    };
    for count in [0, 3, 2, 32, 1] {
        cluster.denied = ranges(count);
        assert_eq!(follow(&mut tables, &cluster), Vec::<String>::new());
        let denied: Vec<_> = ranges(count).iter().map(ipnet::IpNet::trunc).collect();
        assert_eq!(tables.denied().collect::<Vec<_>>(), denied);
        // A service's own list is its own.
        assert_eq!(may_connect(&tables, "10.9.0.1"), None);
        // Who begins anew has nothing to change.
        assert!(plan_for(&cluster, &tables, &LIMITS).ops.is_empty());
    }
    cluster.denied = ranges(38);
    let said = follow(&mut tables, &cluster);
    assert!(
        said[0].starts_with("6 of 38 ranges of clients whom no service is to take are not denied"),
        "{said:?}"
    );
    assert_eq!(tables.denied().count(), 32);
    cluster.denied = ranges(9);
    assert_eq!((follow(&mut tables, &cluster), tables.denied().count()), (Vec::new(), 9));
}

#[test]
fn what_two_services_claim_goes_to_the_first_and_is_said() {
    let mut cluster = one_service(&[TaskState::Running]);
    let twin = |name: &str, port: u16| {
        let mut service = Service::clone(&cluster.services[0]);
        service.name = name.into();
        service.ports[0].published = port;
        service.tasks[0].name = format!("{name}.1");
        Arc::new(service)
    };
    let (same_port, same_task) = (twin("t1", cluster.services[0].ports[0].published), twin("t2", 999));
    cluster.services.extend([same_port, same_task]);
    let mut tables = Tables::empty(LIMITS.slots);
    let plan = plan_for(&cluster, &tables, &LIMITS);
    plan.ops.into_iter().for_each(|op| tables.apply(op));
    assert_eq!(tables.services.len(), 1);
    assert!(plan.refused[0].contains("already listens"), "{:?}", plan.refused);
    assert!(plan.refused[1].contains("already the address"), "{:?}", plan.refused);
}

#[test]
fn a_task_behind_two_listeners_is_marked_and_knows_both() {
    let cluster = one_service(&[TaskState::Running]);
    let mut tables = Tables::empty(LIMITS.slots);
    plan_for(&cluster, &tables, &LIMITS).ops.into_iter().for_each(|op| tables.apply(op));
    assert_eq!(tables.backends[&0].backend.flags & SINGLE, 0);
    assert_eq!(tables.endpoints.values().next().unwrap().listener, None);
}

#[test]
fn every_address_of_a_node_may_lead_to_a_task() {
    let cluster = one_service(&[TaskState::Running]);
    let addresses: Vec<IpAddr> = (1..=9).map(|i| format!("192.0.2.{i}").parse().unwrap()).collect();
    let next_hops = BTreeMap::new();
    let view = View {
        cluster: &cluster,
        node: "node1",
        addresses: &addresses,
        named: &[],
        cookies: &BTreeMap::new(),
        next_hops: &next_hops,
    };
    let plan = Planner::default().plan(&view, &Tables::empty(LIMITS.slots), &LIMITS);
    let listeners = plan.ops.iter().filter(|op| matches!(op, MapOp::SetListener(..)));
    assert_eq!(listeners.count(), 9);
    assert_eq!(plan.refused, Vec::<String>::new());
}

/// Nodes of these numbers, the first of them this one, and a task on each.
fn nodes(numbers: &[u8]) -> ClusterState {
    let task = |number: &u8| Task {
        name: format!("web.{number}"),
        node: format!("node{number}"),
        addresses: vec![format!("172.18.0.{number}").parse().unwrap()],
        overlay: Some(format!("10.0.0.{number}").parse().unwrap()),
        state: TaskState::Running,
        weight: 1,
        via: Via::Peer,
        finding: None,
    };
    let mut service = build(1, vec![], vec![(0, Protocol::Tcp, 0)]);
    service.tasks = numbers.iter().map(task).collect();
    let node = |number: &u8| Node {
        name: format!("node{number}"),
        addresses: vec![format!("192.0.2.{}", 100 + number).parse().unwrap()],
        agent: true,
        ..Node::default()
    };
    ClusterState {
        nodes: numbers.iter().map(node).collect(),
        services: vec![service.into()],
        ..ClusterState::default()
    }
}

fn apply_all(tables: &mut Tables, cluster: &ClusterState) -> Vec<String> {
    let plan = plan_for(cluster, tables, &LIMITS);
    plan.ops.into_iter().for_each(|op| tables.apply(op));
    plan.refused
}

#[test]
fn peers_are_numbered_and_a_task_is_named_by_its_address_in_the_cluster() {
    let mut tables = Tables::empty(LIMITS.slots);
    assert_eq!(apply_all(&mut tables, &nodes(&[1, 2, 3])), Vec::<String>::new());
    let number = |tables: &Tables, name: &str| {
        tables.nodes.iter().find(|(_, node)| node.name == name).map(|(number, _)| *number).unwrap()
    };
    let (second, third) = (number(&tables, "node2"), number(&tables, "node3"));
    assert_eq!(tables.peers.keys().copied().collect::<Vec<_>>(), [second, third]);
    assert_eq!(tables.peer_numbers[&"192.0.2.102".parse().unwrap()], second);
    // This node's addresses: the cluster's and the uplink's.
    for own in ["192.0.2.101", "192.0.2.1", "2001:db8::1"] {
        assert_eq!(tables.peer_numbers[&own.parse().unwrap()], lb_common::tunnel::SELF);
    }
    let named = tables.tasks.keys().map(|key| key.name).collect::<Vec<_>>();
    let own = lb_common::tunnel::mapped("10.0.0.1".parse().unwrap());
    assert_eq!(named, [lb_common::tunnel::name(&own)], "only its own tasks");
    let far = tables.backends.values().find(|entry| entry.label.task == "web.2").unwrap();
    assert_eq!(far.backend.peer, second as u16);
    assert_eq!(far.backend.address, lb_common::tunnel::mapped("10.0.0.2".parse().unwrap()));
    // A number that entries for answers may still name is not given to the next node.
    apply_all(&mut tables, &nodes(&[1, 2]));
    apply_all(&mut tables, &nodes(&[1, 2, 4]));
    assert_ne!(number(&tables, "node4"), third);
    assert_eq!(number(&tables, "node2"), second);
}

/// A peer's packets are judged by its own cookie from the first on that is taken for its; what is sent to it has the other one.
#[test]
fn cookies_come_before_the_addresses_of_their_peers_and_go_after_them() {
    let (cluster, next_hops) = (nodes(&[1, 2, 3]), |(address, _)| next_hop(address));
    let mut tables = Tables::empty(LIMITS.slots);
    let mut planner = Planner::default();
    let plan = |planner: &mut Planner, tables: &Tables, cluster: &ClusterState, cookies: &[(&str, u64)]| {
        let next_hops: NextHops =
            planner.destinations(cluster, "node1").into_iter().map(|to| (to, next_hops(to))).collect();
        let both = |(name, cookie): &(&str, u64)| {
            ((*name).to_owned(), Cookies { outgoing: *cookie, incoming: cookie + 1 })
        };
        let cookies = cookies.iter().map(both).collect();
        let addresses = addresses();
        let view = View {
            cluster,
            node: "node1",
            addresses: &addresses,
            named: &[],
            cookies: &cookies,
            next_hops: &next_hops,
        };
        planner.plan(&view, tables, &LIMITS).ops
    };
    let ops = plan(&mut planner, &tables, &cluster, &[("node2", 10)]);
    let at = |ops: &[MapOp], which: &dyn Fn(&MapOp) -> bool| ops.iter().position(which).unwrap();
    let key = at(&ops, &|op| matches!(op, MapOp::SetPeerKey(_, 11)));
    assert!(
        key < at(
            &ops,
            &|op| matches!(op, MapOp::SetPeerNumber(ip, _) if *ip == "192.0.2.102".parse::<IpAddr>().unwrap())
        )
    );
    ops.into_iter().for_each(|op| tables.apply(op));
    let of = |tables: &Tables, name: &str| {
        tables.cookies().get(name).map(|cookies| (cookies.outgoing, cookies.incoming))
    };
    assert_eq!((of(&tables, "node2"), of(&tables, "node3")), (Some((10, 11)), None));
    // Another one, and one for another node: nothing else of the tables changes, and no service is planned anew.
    let ops = plan(&mut planner, &tables, &cluster, &[("node2", 20), ("node3", 30)]);
    assert!(ops.iter().all(|op| matches!(op, MapOp::SetPeer(..) | MapOp::SetPeerKey(..))), "{ops:?}");
    ops.into_iter().for_each(|op| tables.apply(op));
    assert_eq!((of(&tables, "node2"), of(&tables, "node3")), (Some((20, 21)), Some((30, 31))));
    // A node that goes, and one that has none any more.
    let ops = plan(&mut planner, &tables, &nodes(&[1, 3]), &[]);
    let gone = at(&ops, &|op| matches!(op, MapOp::RemovePeerNumber(_)));
    let key = at(&ops, &|op| matches!(op, MapOp::RemovePeerKey(_)));
    assert!(gone < key && key < at(&ops, &|op| matches!(op, MapOp::RemoveNode(_))), "{ops:?}");
    ops.into_iter().for_each(|op| tables.apply(op));
    assert!(tables.peer_keys.is_empty() && tables.peers.values().all(|peer| peer.cookie == 0));
}

#[test]
fn addresses_that_two_claim_are_said() {
    let mut twice = nodes(&[1, 2]);
    twice.nodes[1].addresses.push("192.0.2.101".parse().unwrap());
    let mut tables = Tables::empty(LIMITS.slots);
    let refused = apply_all(&mut tables, &twice);
    assert!(refused[0].contains("of both node1 and node2"), "{refused:?}");
    assert_eq!(tables.peer_numbers[&"192.0.2.101".parse().unwrap()], lb_common::tunnel::SELF);
    let mut twins = nodes(&[1]);
    let mut other = Service::clone(&twins.services[0]);
    (other.name, other.ports[0].published) = ("other".into(), 999);
    (other.tasks[0].name, other.tasks[0].addresses) =
        ("other.1".into(), vec!["172.18.0.99".parse().unwrap()]);
    twins.services.push(other.into());
    let refused = apply_all(&mut Tables::empty(LIMITS.slots), &twins);
    assert!(refused[0].contains("has the address in the cluster of task"), "{refused:?}");
}

#[test]
fn bridges_of_one_range_behind_every_node_are_no_conflict() {
    let mut cluster = nodes(&[1, 2]);
    let mut other = Service::clone(&cluster.services[0]);
    (other.name, other.ports[0].published) = ("other".into(), 999);
    for (number, task) in (1..).zip(&mut other.tasks) {
        task.name = format!("other.{number}");
        task.overlay = Some(format!("10.0.0.{}", 100 + number).parse().unwrap());
        // On this node what the first service's task has on the other, and the other way round.
        task.addresses = vec![format!("172.18.0.{}", 3 - number).parse().unwrap()];
    }
    cluster.services.push(other.into());
    let mut tables = Tables::empty(LIMITS.slots);
    assert_eq!(apply_all(&mut tables, &cluster), Vec::<String>::new());
    assert_eq!(tables.endpoints.len(), 2);
    assert_eq!(tables.services.len(), 2);
}

#[test]
fn a_label_of_an_agent_that_knew_no_idle_connections_means_what_it_meant() {
    let before = r#"{"name":"web","tasks":1,"timers":[30,7440,120,0,60,300,0,0]}"#;
    let label: ServiceLabel = serde_json::from_str(before).unwrap();
    assert_eq!((label.idle, serde_json::to_string(&label).unwrap().as_str()), (Idle::Forget, before));
    let asks = ServiceLabel { idle: Idle::Reset, ..label };
    let text = serde_json::to_string(&asks).unwrap();
    assert_eq!(serde_json::from_str::<ServiceLabel>(&text).unwrap(), asks);
}

#[test]
fn a_silent_node_keeps_its_connections_and_gets_no_new_ones() {
    let cluster = nodes(&[1, 2]);
    let (mut planner, mut tables) = (Planner::default(), Tables::empty(LIMITS.slots));
    let mut states = Vec::new();
    for silent in [None, Some("it sleeps".to_owned()), None] {
        let to_peer = |next_hop: Result<NextHop, String>| {
            next_hop.map(|next_hop| NextHop { silent: silent.clone(), ..next_hop })
        };
        let next_hops = |(address, reach)| {
            let next_hop = next_hop(address);
            if reach == Reach::Peer { to_peer(next_hop) } else { next_hop }
        };
        plan_by(&mut planner, (&cluster, next_hops), &tables, &LIMITS)
            .ops
            .into_iter()
            .for_each(|op| tables.apply(op));
        let (number, entry) = tables.backends.iter().find(|(_, e)| e.label.task == "web.2").unwrap();
        let node = tables.nodes.values().find(|node| node.name == "node2").unwrap();
        assert_eq!(node.problem, silent);
        assert!(tables.peers.values().all(|peer| peer.reachable == 1));
        states.push((*number, entry.backend.state, entry.label.problem.clone()));
    }
    let (active, draining) = (State::Active as u8, State::Draining as u8);
    let number = states[0].0;
    assert_eq!(
        states,
        [(number, active, None), (number, draining, Some("it sleeps".into())), (number, active, None)]
    );
}

#[test]
fn an_address_stands_in_for_a_task_as_long_as_any_service_has_it() {
    let v6: Ipv6Addr = "fd00::7".parse().unwrap();
    let instead = stand_in(v6, |_| false);
    let service = |number: u8, addresses: Vec<IpAddr>| {
        let mut service = build(number, vec![(0, TaskState::Running, 1, true, Via::Peer, true)], vec![]);
        service.ports =
            vec![Port { protocol: Protocol::Tcp, published: 80 + u16::from(number), target: number.into() }];
        service.tasks[0].addresses = addresses;
        service.tasks[0].overlay = Some(format!("10.0.9.{number}").parse().unwrap());
        Arc::new(service)
    };
    let both = vec![instead.into(), v6.into()];
    let (one, other) = (service(1, both.clone()), service(2, both));
    let (mut planner, mut tables) = (Planner::default(), Tables::empty(LIMITS.slots));
    let mut go = |services: Vec<Arc<Service>>| {
        let cluster = ClusterState { services, ..ClusterState::default() };
        let plan = plan_by(&mut planner, (&cluster, |(address, _)| next_hop(address)), &tables, &LIMITS);
        apply(&mut tables, &plan).unwrap();
        (plan.refused, tables.stand_ins.clone())
    };
    let expected = BTreeMap::from([(instead, v6)]);
    assert_eq!(go(vec![one.clone(), other.clone()]), (vec![], expected.clone()));
    assert_eq!(go(vec![other.clone()]), (vec![], expected.clone()));
    // Two tasks that share one cannot be told apart.
    let stranger = service(3, vec![instead.into(), "fd00::8".parse().unwrap()]);
    let (refused, stand_ins) = go(vec![other.clone(), stranger]);
    assert!(refused[0].contains(&format!("{instead} stands in for both")), "{refused:?}");
    assert_eq!(stand_ins, expected);
    assert_eq!(go(vec![]), (vec![], BTreeMap::new()));
}

#[test]
fn more_stand_ins_than_there_is_room_for_leave_their_service_out_and_no_other() {
    let room = lb_common::abi::size::stand_ins(LIMITS.backends as usize) / 2;
    let of = |number: u8, tasks: usize| {
        let mut service = build(
            number,
            vec![(0, TaskState::Running, 1, true, Via::Peer, true)],
            vec![(0, Protocol::Tcp, 0)],
        );
        let first = service.tasks.remove(0);
        service.tasks.extend((0..tasks).map(|task| {
            let v6: Ipv6Addr = format!("fd00::{number}:{:x}", 0x100 + task).parse().unwrap();
            let (name, overlay) =
                (format!("s{number}.{task}"), Some(format!("10.{number}.1.{task}").parse().unwrap()));
            Task {
                name,
                overlay,
                addresses: vec![stand_in(v6, |_| false).into(), v6.into()],
                ..first.clone()
            }
        }));
        Arc::new(service)
    };
    let cluster = ClusterState { services: vec![of(1, room - 1), of(2, 2)], ..ClusterState::default() };
    let mut tables = Tables::empty(LIMITS.slots);
    let plan = plan_for(&cluster, &tables, &LIMITS);
    apply(&mut tables, &plan).unwrap();
    assert_eq!(plan.refused.len(), 1, "{:?}", plan.refused);
    assert!(
        plan.refused[0].contains("service s2 is left out: the table of backends is full"),
        "{:?}",
        plan.refused
    );
    assert_eq!(tables.stand_ins.len(), room - 1);
    assert_eq!(tables.services.len(), 1);
}
