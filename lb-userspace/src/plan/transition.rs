//! The order of changes. Applied one by one, no listener ever leads to a slot or a backend that is not valid:
//! what is new comes before what names it, what goes after what named it.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use lb_common::{
    backend::State,
    endpoint::Listener,
    tunnel::{Peer, TaskKey},
};

use super::{
    table_diff::TableDiff,
    tables::{
        At, BackendEntry, ClientRange, MapOp, NodeLabel, PortLabel, ServiceLabel, Tables, TaskListener,
    },
};

/// The tables as they are to be.
pub(super) struct Next<'a> {
    pub nodes: TableDiff<'a, u32, NodeLabel>,
    pub peers: TableDiff<'a, u32, Peer>,
    pub peer_keys: TableDiff<'a, u32, u64>,
    pub peer_numbers: TableDiff<'a, IpAddr, u32>,
    pub tasks: TableDiff<'a, TaskKey, u32>,
    pub services: TableDiff<'a, u32, ServiceLabel>,
    pub ports: TableDiff<'a, u32, PortLabel>,
    pub backends: TableDiff<'a, u32, BackendEntry>,
    pub listeners: TableDiff<'a, At, Listener>,
    pub stand_ins: TableDiff<'a, Ipv4Addr, Ipv6Addr>,
    pub endpoints: TableDiff<'a, At, TaskListener>,
    pub access: TableDiff<'a, ClientRange, bool>,
    pub filter: TableDiff<'a, u32, u64>,
    /// Slots by the start of a range that no listener reads today.
    pub slots: BTreeMap<u32, Vec<lb_common::slot::Slot>>,
}

impl<'a> Next<'a> {
    /// As they are.
    pub fn new(actual: &'a Tables) -> Self {
        Self {
            nodes: TableDiff::new(&actual.nodes),
            peers: TableDiff::new(&actual.peers),
            peer_keys: TableDiff::new(&actual.peer_keys),
            peer_numbers: TableDiff::new(&actual.peer_numbers),
            tasks: TableDiff::new(&actual.tasks),
            services: TableDiff::new(&actual.services),
            ports: TableDiff::new(&actual.ports),
            backends: TableDiff::new(&actual.backends),
            listeners: TableDiff::new(&actual.listeners),
            stand_ins: TableDiff::new(&actual.stand_ins),
            endpoints: TableDiff::new(&actual.endpoints),
            access: TableDiff::new(&actual.access),
            filter: TableDiff::new(&actual.filter),
            slots: BTreeMap::new(),
        }
    }
}

/// The operations that lead there.
pub(super) fn transition(next: Next<'_>) -> Vec<MapOp> {
    let mut ops = Vec::new();
    let (nodes, nodes_gone) = next.nodes.split();
    let (peers, peers_gone) = next.peers.split();
    let (peer_keys, peer_keys_gone) = next.peer_keys.split();
    let (peer_numbers, peer_numbers_gone) = next.peer_numbers.split();
    let (services, services_gone) = next.services.split();
    let (ports, ports_gone) = next.ports.split();
    let actual = next.backends.base;
    let (backends, backends_gone) = next.backends.split();
    let (tasks, tasks_gone) = next.tasks.split();
    let (stand_ins, stand_ins_gone) = next.stand_ins.split();
    let (endpoints, endpoints_gone) = next.endpoints.split();
    let (listeners, listeners_gone) = next.listeners.split();
    let (mut access, mut access_gone) = next.access.split();
    // The narrowest range decides: each client has the old answer until it has the new one.
    access.sort_by_key(|((_, range), _)| Reverse(range.prefix_len()));
    access_gone.sort_by_key(|(_, range)| range.prefix_len());
    let (before, after) = filter(next.filter);
    let (demoted, promoted): (Vec<_>, Vec<_>) =
        backends.into_iter().partition(|(index, entry)| demoted(actual.get(index), entry));
    // Names first: they decide nothing, and a reader never finds a number without one.
    ops.extend(nodes.into_iter().map(|(i, label)| MapOp::SetNode(i, label)));
    // What a peer sends is judged by its own key from the first packet on that is taken for its.
    ops.extend(peer_keys.into_iter().map(|(i, cookie)| MapOp::SetPeerKey(i, cookie)));
    ops.extend(peers.into_iter().map(|(i, peer)| MapOp::SetPeer(i, peer)));
    // A node that goes makes room for the addresses of one that comes.
    ops.extend(peer_numbers_gone.into_iter().map(MapOp::RemovePeerNumber));
    ops.extend(peer_numbers.into_iter().map(|(ip, i)| MapOp::SetPeerNumber(ip, i)));
    ops.extend(services.into_iter().map(|(i, label)| MapOp::SetService(i, label)));
    ops.extend(ports.into_iter().map(|(i, label)| MapOp::SetPort(i, label)));
    // Whom packets are for, before any are sent there.
    ops.extend(stand_ins.into_iter().map(|(address, own)| MapOp::SetStandIn(address, own)));
    // Backends that take connections, then what names them: peers, their endpoints, the ports that lead to them.
    ops.extend(promoted.into_iter().map(|(i, entry)| MapOp::SetBackend(i, entry)));
    ops.extend(tasks.into_iter().map(|(key, index)| MapOp::SetTask(key, index)));
    ops.extend(endpoints.into_iter().map(|(at, task)| MapOp::SetTaskEndpoint(at, task)));
    // Who may connect, before a listener asks.
    ops.extend(access.into_iter().map(|(of, allowed)| MapOp::SetAccess(of, allowed)));
    ops.extend(before);
    ops.extend(next.slots.into_iter().map(|(base, slots)| MapOp::SetSlots(base, slots)));
    ops.extend(listeners.into_iter().map(|(at, listener)| MapOp::SetListener(at, listener)));
    // Nothing leads to what goes now.
    ops.extend(listeners_gone.into_iter().map(MapOp::RemoveListener));
    ops.extend(access_gone.into_iter().map(MapOp::RemoveAccess));
    ops.extend(demoted.into_iter().map(|(i, entry)| MapOp::SetBackend(i, entry)));
    ops.extend(endpoints_gone.into_iter().map(MapOp::RemoveTaskEndpoint));
    ops.extend(tasks_gone.into_iter().map(MapOp::RemoveTask));
    ops.extend(backends_gone.into_iter().map(MapOp::FreeBackend));
    ops.extend(stand_ins_gone.into_iter().map(MapOp::RemoveStandIn));
    ops.extend(peers_gone.into_iter().map(MapOp::RemovePeer));
    ops.extend(peer_keys_gone.into_iter().map(MapOp::RemovePeerKey));
    ops.extend(after);
    ops.extend(ports_gone.into_iter().map(MapOp::RemovePort));
    ops.extend(services_gone.into_iter().map(MapOp::RemoveService));
    ops.extend(nodes_gone.into_iter().map(MapOp::RemoveNode));
    ops
}

/// Whether a backend stops taking new connections: it may do so only when no slot names it any more.
fn demoted(actual: Option<&BackendEntry>, next: &BackendEntry) -> bool {
    let active = State::Active as u8;
    actual.is_some_and(|entry| entry.backend.state == active) && next.backend.state != active
}

/// What the filter is to let through as long as both the old and the new listeners are there, and what after that.
fn filter(next: TableDiff<'_, u32, u64>) -> (Vec<MapOp>, Vec<MapOp>) {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let actual = next.base;
    let (set, gone) = next.split();
    for (word, wanted) in set.into_iter().chain(gone.into_iter().map(|word| (word, 0))) {
        let bits = actual.get(&word).copied().unwrap_or_default();
        let both = bits | wanted;
        if both != bits {
            before.push(MapOp::SetFilter(word, both));
        }
        if both != wanted {
            after.push(MapOp::SetFilter(word, wanted));
        }
    }
    (before, after)
}
