//! Choosing a task: exact round robin over a listener's slots, one atomic add a new connection; by chance; or by a hash of its
//! five-tuple.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use lb_common::{
    backend::{Backend, Kind, State},
    conntrack::line::FiveTuple,
    endpoint::{AFFINE, CONSISTENT, IGNORED_SHIFT, Listener, RANDOM},
    net::Address,
};

use super::{alias, tracked::Tracked};
use crate::io::{
    atomic,
    maps::{BACKENDS, CURSORS, SLOTS},
    packet::{NOBODY, Packet},
};

/// Slots looked at for one connection: the tables change one entry at a time, and a task may have the client's port in use.
const TRIES: u64 = 4;

/// Marks in [`choose`]'s answer a backend at which the client's port is taken, so that it has to be translated.
pub const PORT_IS_TAKEN: u64 = 1 << 32;

/// The index of the backend that takes this connection of the packet's listener, with [`PORT_IS_TAKEN`] or not, or [`NOBODY`].
/// It is the next in turn that can take it; that of the connection's hash, or any, where the listener asks for it, or the next that
/// can; or, where it may have to be found again without a line, that of the hash, and nothing else is looked at. Where clients stay with
/// a task, its port is translated before another task is taken.
#[inline(always)]
pub fn choose<A: Tracked>(packet: &mut Packet<A>) -> u64 {
    let (listener, alone) = (packet.listener, packet.search.guarded != 0);
    let by_hash = alone || listener.flags & CONSISTENT != 0;
    let Some(cursor) = CURSORS.get_ptr_mut(listener.cursor) else {
        return NOBODY as u64;
    };
    if listener.slot_count == 0 {
        return NOBODY as u64;
    }
    // The next best: a task that has not answered this client is the last, one that has its port in use comes before.
    let mut second = NOBODY as u64;
    for attempt in 0..TRIES {
        // A SYN that is sent again tries others.
        let turn = if by_hash {
            hash(&listener, &packet.key) + packet.search.retries as u64 * TRIES + attempt
        } else if attempt == 0 && listener.flags & RANDOM != 0 {
            // SAFETY: the helper has no preconditions.
            unsafe { bpf_get_prandom_u32() as u64 }
        } else {
            take_turn(cursor)
        };
        let index = slot(&listener, turn);
        let Some(backend) = BACKENDS.get(index) else {
            continue;
        };
        // A slot that is being rewritten may name another service's backend for a moment.
        if backend.service != listener.service || backend.state != State::Active as u8 {
            continue;
        }
        let avoided = packet.search.avoid;
        // It has not answered this client, but it may be the only one; so may a task of the same node, which may have died.
        if avoided != NOBODY && (index == avoided || is_beside(backend, avoided)) {
            if second == NOBODY as u64 || index != avoided && second as u32 == avoided {
                second = index as u64;
            }
            continue;
        }
        if !alone && alias::is_taken(packet, backend) {
            if listener.flags & AFFINE != 0 {
                return index as u64 | PORT_IS_TAKEN;
            }
            if second as u32 == NOBODY || second as u32 == avoided {
                second = index as u64 | PORT_IS_TAKEN;
            }
            continue;
        }
        return index as u64;
    }
    second
}

/// What decides over the slot of a connection that is placed by hash; `tuple` is its client's.
#[inline(always)]
pub fn hash<A: Address>(listener: &Listener, tuple: &FiveTuple<A>) -> u64 {
    (if listener.flags & AFFINE != 0 {
        tuple.source_hash(listener.flags >> IGNORED_SHIFT)
    } else {
        tuple.flow_hash()
    }) as u64
}

/// The backend in the slot of a listener that a turn, or a hash, falls on; [`NOBODY`] in none. Not an `Option`, whose empty half
/// the verifier would see read.
#[inline(always)]
pub fn slot(listener: &Listener, turn: u64) -> u32 {
    let slots = listener.slot_count.max(1) as u64;
    SLOTS.get(listener.slot_base + (turn % slots) as u32).copied().unwrap_or(NOBODY)
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
    // SAFETY: an array's entry is valid while the program runs, and aligned to eight bytes.
    unsafe { atomic::fetch_add(cursor, 1) }
}
