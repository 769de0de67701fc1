//! Choosing a task: exact round robin over a listener's slots, one atomic add a new flow, or by a hash of the flow.

use lb_common::{
    backend::{Backend, Kind, SHARED, State},
    endpoint::{Endpoint, Listener, MAX_REPLY_LISTENERS},
    outcome::Outcome,
};

use crate::{
    family::Family,
    maps::{BACKENDS, CURSORS, SLOTS},
    packet::{NOBODY, Packet},
    track,
};

/// Slots looked at for one flow: the tables change one entry at a time, and a task may take no twin.
const TRIES: u64 = 4;

/// How a backend is chosen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The next one that can take the flow.
    Turn,
    /// That of the flow's five-tuple, or the next that can take it.
    Hash,
    /// That of the flow's five-tuple, as it was chosen before: nothing else is looked at.
    HashAlone,
}

/// The backend of the listener that takes this flow.
#[inline(always)]
pub fn backend<A: Family>(
    packet: &mut Packet<A>,
    listener: &Listener,
    by: By,
) -> Result<(u32, &'static Backend), Outcome> {
    match choose(packet, listener, by != By::Turn, by == By::HashAlone) {
        COLLIDES => Err(Outcome::SourceCollision),
        index => BACKENDS.get(index).map(|backend| (index, backend)).ok_or(Outcome::NoBackend),
    }
}

/// Stands for no backend, because the client's port is in use with each that was tried.
const COLLIDES: u32 = NOBODY - 1;

/// Its index, [`NOBODY`] or [`COLLIDES`]. A function of its own, for the verifier's sake: its many ways end in one.
#[inline(never)]
fn choose<A: Family>(packet: &mut Packet<A>, listener: &Listener, by_hash: bool, alone: bool) -> u32 {
    let Some(cursor) = CURSORS.get_ptr_mut(listener.cursor) else {
        return NOBODY;
    };
    if listener.slot_count == 0 {
        return NOBODY;
    }
    // What is said if nobody takes it.
    let mut choice = NOBODY;
    for attempt in 0..TRIES {
        // A SYN that is sent again tries others.
        let turn = if by_hash {
            packet.key.hash() as u64 + packet.retries as u64 * TRIES + attempt
        } else {
            take_turn(cursor)
        };
        let slot = listener.slot_base + (turn % listener.slot_count as u64) as u32;
        let Some(&index) = SLOTS.get(slot) else {
            continue;
        };
        let Some(backend) = BACKENDS.get(index) else {
            continue;
        };
        // A slot that is being rewritten may name another service's backend for a moment.
        if backend.service != listener.service || backend.state != State::Active as u8 {
            continue;
        }
        if !alone
            && backend.flags & SHARED != 0
            && (collides(packet, backend, index) || serves_by_peer(packet, backend, index))
        {
            if choice == NOBODY {
                choice = COLLIDES;
            }
            continue;
        }
        // It has not answered this client, but it may be the only one; so may a task of the same node, which may have died.
        if packet.avoid != NOBODY && (index == packet.avoid || is_beside(backend, packet.avoid)) {
            if index != packet.avoid || choice == NOBODY || choice == COLLIDES {
                choice = index;
            }
            continue;
        }
        return index;
    }
    choice
}

/// Whether a task is behind the same peer as another one.
#[inline(always)]
fn is_beside(backend: &Backend, other: u32) -> bool {
    backend.kind == Kind::Peer as u8
        && BACKENDS.get(other).is_some_and(|other| other.kind == backend.kind && other.peer == backend.peer)
}

/// Takes the next turn of a published port, one atomic add.
#[inline(always)]
fn take_turn(cursor: *mut u64) -> u64 {
    // The target has the instruction, but the standard library offers it only where there is compare-and-swap
    // as well. Relaxed would do, but LLVM 22 then emits the add that does not fetch and takes its operand for
    // the result.
    // SAFETY: an array's entry is valid while the program runs, and aligned to eight bytes.
    #[cfg(target_arch = "bpf")]
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_xadd};
        atomic_xadd::<u64, u64, { AtomicOrdering::AcqRel }>(cursor, 1)
    }
    // SAFETY: as above.
    #[cfg(not(target_arch = "bpf"))]
    unsafe {
        use core::sync::atomic::{AtomicU64, Ordering};
        AtomicU64::from_ptr(cursor).fetch_add(1, Ordering::AcqRel)
    }
}

/// Whether the task serves this client's address and port through a listener of another node. What is left of such a
/// connection when it is over goes: it would claim the answers of the one that starts.
#[inline(never)]
fn serves_by_peer<A: Family>(packet: &mut Packet<A>, backend: &Backend, index: u32) -> bool {
    let Packet { key, flow_key, .. } = packet;
    flow_key.source = *A::in_wide(&backend.address);
    flow_key.destination = key.source;
    flow_key.source_port = backend.port;
    flow_key.destination_port = key.source_port;
    flow_key.protocol = key.protocol;
    flow_key._pad = 0;
    flow_key._pad2 = 0;
    if track::is_alive_at(flow_key, index, backend.service) {
        return true;
    }
    let _ = A::delete_flow(flow_key);
    false
}

/// Whether the task serves this client's address and port through another listener: it could not tell the two
/// connections apart.
#[inline(never)]
pub fn collides<A: Family>(packet: &mut Packet<A>, backend: &Backend, index: u32) -> bool {
    let Packet { key, flow_key, .. } = packet;
    let endpoint = Endpoint::new(A::from_wide(backend.address), backend.port, key.protocol);
    let Some(replies) = A::replies(&endpoint) else {
        return false;
    };
    flow_key.source = key.source;
    flow_key.source_port = key.source_port;
    flow_key.protocol = key.protocol;
    flow_key._pad = 0;
    flow_key._pad2 = 0;
    for i in 0..MAX_REPLY_LISTENERS {
        if i as u32 >= replies.count {
            break;
        }
        let other = &replies.sources[i];
        if other.address == key.destination && other.port == key.destination_port {
            continue;
        }
        flow_key.destination = other.address;
        flow_key.destination_port = other.port;
        if track::is_alive_at(flow_key, index, backend.service) {
            return true;
        }
    }
    false
}
