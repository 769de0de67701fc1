//! Choosing a task: exact round robin over a listener's slots, one atomic add a new flow.

use lb_common::{
    backend::{Backend, SHARED, State},
    endpoint::{Endpoint, Listener, MAX_REPLY_LISTENERS},
    flow::FlowKey,
    net::TCP,
    outcome::Outcome,
};

use crate::{
    family::Family,
    maps::{self, BACKENDS, CURSORS, SLOTS},
    neighbour,
    packet::Packet,
};

/// Slots looked at for one flow: the tables change one entry at a time, and a task may take no twin.
const TRIES: u64 = 4;

/// The next backend of the listener that can take this flow.
#[inline(always)]
pub fn backend<A: Family>(
    packet: &Packet<A>,
    listener: &Listener,
) -> Result<(u32, &'static Backend), Outcome> {
    if listener.slot_count == 0 {
        return Err(Outcome::NoBackend);
    }
    let cursor = CURSORS.get_ptr_mut(listener.cursor).ok_or(Outcome::NoBackend)?;
    let mut refusal = Outcome::NoBackend;
    for _ in 0..TRIES {
        let turn = take_turn(cursor);
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
        if backend.flags & SHARED != 0
            && (collides(&packet.key, backend, index) || serves_by_peer(&packet.key, backend))
        {
            refusal = Outcome::SourceCollision;
            continue;
        }
        return Ok((index, backend));
    }
    Err(refusal)
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
fn serves_by_peer<A: Family>(key: &FlowKey<A>, backend: &Backend) -> bool {
    let now = neighbour::jiffies() as u32;
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    let task = *A::in_wide(&backend.address);
    let reply = FlowKey::new(task, key.source, backend.port, key.source_port, key.protocol);
    let Some(known) = A::flow(&reply) else {
        return false;
    };
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    if unsafe { (*known).is_alive(key.protocol == TCP, now, hz) } {
        return true;
    }
    let _ = A::delete_flow(&reply);
    false
}

/// Whether the task serves this client's address and port through another listener: it could not tell the two
/// connections apart.
#[inline(never)]
pub fn collides<A: Family>(key: &FlowKey<A>, backend: &Backend, index: u32) -> bool {
    let endpoint = Endpoint::new(A::from_wide(backend.address), backend.port, key.protocol);
    let Some(replies) = A::replies(&endpoint) else {
        return false;
    };
    let now = neighbour::jiffies() as u32;
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    for i in 0..MAX_REPLY_LISTENERS {
        if i as u32 >= replies.count {
            break;
        }
        let other = &replies.sources[i];
        if other.address == key.destination && other.port == key.destination_port {
            continue;
        }
        let twin = FlowKey::new(key.source, other.address, key.source_port, other.port, key.protocol);
        if let Some(flow) = A::flow(&twin) {
            // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
            let flow = unsafe { &*flow };
            if flow.backend == index && flow.is_alive(key.protocol == TCP, now, hz) {
                return true;
            }
        }
    }
    false
}
