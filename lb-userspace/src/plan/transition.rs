//! The order of changes. Applied one by one, no listener ever leads to a slot or a backend that is not valid:
//! what is new comes before what names it, what goes after what named it.

use std::collections::BTreeMap;

use lb_common::backend::State;

use super::tables::{BackendEntry, MapOp, Tables};

/// The operations from one state of the tables to the next.
pub fn transition(actual: &Tables, next: &Tables) -> Vec<MapOp> {
    let mut ops = Vec::new();
    // Names first: they decide nothing, and a reader never finds a number without one.
    changed(&actual.nodes, &next.nodes, |i, label| ops.push(MapOp::SetNode(*i, label.clone())));
    changed(&actual.peers, &next.peers, |i, peer| ops.push(MapOp::SetPeer(*i, *peer)));
    changed(&actual.peer_numbers, &next.peer_numbers, |ip, i| ops.push(MapOp::SetPeerNumber(*ip, *i)));
    changed(&actual.services, &next.services, |i, label| ops.push(MapOp::SetService(*i, label.clone())));
    changed(&actual.ports, &next.ports, |i, label| ops.push(MapOp::SetPort(*i, label.clone())));
    // Backends that take flows, then what names them: peers, their replies, the ports that lead to them.
    changed(&actual.backends, &next.backends, |i, entry| {
        if !demoted(actual.backends.get(i), entry) {
            ops.push(MapOp::SetBackend(*i, entry.clone()));
        }
    });
    changed(&actual.tasks, &next.tasks, |key, index| ops.push(MapOp::SetTask(*key, *index)));
    changed(&actual.replies, &next.replies, |at, set| ops.push(MapOp::SetReplies(*at, set.clone())));
    let mut filter = actual.filter.clone();
    for (word, bits) in &next.filter {
        let both = bits | filter.get(word).copied().unwrap_or(0);
        if filter.insert(*word, both) != Some(both) {
            ops.push(MapOp::SetFilter(*word, both));
        }
    }
    new_slots(actual, next, &mut ops);
    changed(&actual.listeners, &next.listeners, |at, listener| ops.push(MapOp::SetListener(*at, *listener)));
    // Nothing leads to what goes now.
    removed(&actual.listeners, &next.listeners, |at| ops.push(MapOp::RemoveListener(*at)));
    changed(&actual.backends, &next.backends, |i, entry| {
        if demoted(actual.backends.get(i), entry) {
            ops.push(MapOp::SetBackend(*i, entry.clone()));
        }
    });
    removed(&actual.replies, &next.replies, |at| ops.push(MapOp::RemoveReplies(*at)));
    removed(&actual.tasks, &next.tasks, |key| ops.push(MapOp::RemoveTask(*key)));
    removed(&actual.backends, &next.backends, |i| ops.push(MapOp::FreeBackend(*i)));
    removed(&actual.peer_numbers, &next.peer_numbers, |ip| ops.push(MapOp::RemovePeerNumber(*ip)));
    removed(&actual.peers, &next.peers, |i| ops.push(MapOp::RemovePeer(*i)));
    for (word, bits) in &filter {
        let wanted = next.filter.get(word).copied().unwrap_or(0);
        if wanted != *bits {
            ops.push(MapOp::SetFilter(*word, wanted));
        }
    }
    removed(&actual.ports, &next.ports, |i| ops.push(MapOp::RemovePort(*i)));
    removed(&actual.services, &next.services, |i| ops.push(MapOp::RemoveService(*i)));
    removed(&actual.nodes, &next.nodes, |i| ops.push(MapOp::RemoveNode(*i)));
    ops
}

/// Whether a backend stops taking new flows: it may do so only when no slot names it any more.
fn demoted(actual: Option<&BackendEntry>, next: &BackendEntry) -> bool {
    let active = State::Active as u8;
    actual.is_some_and(|entry| entry.backend.state == active) && next.backend.state != active
}

/// The slots of ranges that no listener reads today. One range may serve several listeners.
fn new_slots(actual: &Tables, next: &Tables, ops: &mut Vec<MapOp>) {
    let reads = actual.listeners.values().filter(|listener| listener.slot_count > 0);
    let read: BTreeMap<u32, u32> = reads.map(|listener| (listener.slot_base, listener.slot_count)).collect();
    let mut written = BTreeMap::new();
    for listener in next.listeners.values() {
        let same = read.get(&listener.slot_base) == Some(&listener.slot_count)
            && actual.slots_of(listener) == next.slots_of(listener);
        if listener.slot_count == 0 || same || written.insert(listener.slot_base, ()).is_some() {
            continue;
        }
        if let Some(slots) = next.slots_of(listener) {
            ops.push(MapOp::SetSlots(listener.slot_base, slots.to_vec()));
        }
    }
}

fn changed<K: Ord, V: PartialEq>(
    actual: &BTreeMap<K, V>,
    next: &BTreeMap<K, V>,
    mut each: impl FnMut(&K, &V),
) {
    for (key, value) in next {
        if actual.get(key) != Some(value) {
            each(key, value);
        }
    }
}

fn removed<K: Ord, V>(actual: &BTreeMap<K, V>, next: &BTreeMap<K, V>, mut each: impl FnMut(&K)) {
    for key in actual.keys() {
        if !next.contains_key(key) {
            each(key);
        }
    }
}
