//! Choosing a task: exact round robin over a listener's slots, one atomic add a new connection; by chance; by a hash of its
//! five-tuple; or by what tasks have open.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use lb_common::{
    backend::{Backend, Kind, State},
    conntrack::line::FiveTuple,
    endpoint::{AFFINE, CONSISTENT, IGNORED_SHIFT, LEAST, LIMITED, Listener, RANDOM},
    net::Address,
    slot::{Choice, WINDOW, stride},
};

use super::{alias, tracked::Tracked};
use crate::io::{
    atomic, counters,
    maps::{BACKENDS, CURSORS, SLOTS},
    packet::{NOBODY, Packet},
    verifier::opaque,
};

/// Slots looked at for one connection: the tables change one entry at a time, and a task may have the client's port in use.
const TRIES: u64 = 4;

/// Marks in [`choose`]'s answer a backend at which the client's port is taken, so that it has to be translated.
pub const PORT_IS_TAKEN: u64 = 1 << 32;

/// The index of the backend that takes this connection of the packet's listener, with [`PORT_IS_TAKEN`] or not, or [`NOBODY`].
/// It is the next in turn that can take it; that of the connection's hash, or any, where the listener asks for it, or the next that
/// can; or, where it may have to be found again without a line, that of the hash, and nothing else is looked at. Where open
/// connections count, [`pick`] says which of the slots from there on. Where clients stay with a task, its port is translated before
/// another task is taken.
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
    // Without a branch: none if it is alone.
    let compares = listener.flags & (LEAST | LIMITED) & packet.search.guarded.wrapping_sub(1);
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
        let how = compares | (attempt as u32) << ATTEMPT;
        let index = pick(listener.slot_base, listener.slot_count, turn, how, listener.service);
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

/// From this bit on in what is asked of [`pick`]: which attempt it is.
const ATTEMPT: u32 = 16;

/// The slot of a turn; or, of [`WINDOW`] from there on, with [`LIMITED`] the first whose task has room, and at the first attempt with
/// [`LEAST`] the one with the fewest open connections of this node's clients for its weight, the first of equals. Its backend, or
/// [`NOBODY`]. Looked at by itself ([`super::apart`]): it is all numbers.
#[unsafe(export_name = "connection_pick")]
#[inline(never)]
extern "C" fn pick(base: u32, count: u32, turn: u64, how: u32, service: u32) -> u32 {
    let count = count.max(1) as u64;
    let attempt = (how >> ATTEMPT) as u64;
    if how & (LEAST | LIMITED) == 0 {
        return SLOTS.get(base + (turn % count) as u32).map_or(NOBODY, |slot| slot.backend());
    }
    let stride = stride(count);
    // In the large tables of hashes a task's slots lie at even distances: each attempt has another.
    let large = opaque((WINDOW as u64 * 16).wrapping_sub(count) >> 63);
    let stride = stride + large * attempt * 3;
    // Without a branch: the verifier would follow each through all slots. Of those that are beside each other the last attempt has seen
    // as many, but not where it has seen all: then the next begins with the next.
    let near = opaque(stride.wrapping_sub(2) >> 63) & opaque((WINDOW as u64).wrapping_sub(count) >> 63);
    let seen = near * attempt * (WINDOW as u64 - 1);
    // The one with the fewest is not to be found again.
    let least = opaque((how & LEAST) as u64 / LEAST as u64) & opaque(attempt.wrapping_sub(1) >> 63);
    // Where no number is set this is any.
    let most = counters::most_connections(service);
    let mut at = turn.wrapping_add(seen) % count;
    let mut choice = Choice::NONE;
    for looked in 0..WINDOW as u64 {
        let Some(slot) = SLOTS.get(base + at as u32).copied().filter(|_| looked < count) else {
            break;
        };
        choice.look(slot, counters::opened(slot.backend()), most, least);
        at += stride;
        // Around at the end.
        at -= count & opaque(at.wrapping_sub(count) >> 63).wrapping_sub(1);
    }
    choice.backend
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
    SLOTS.get(listener.slot_base + (turn % slots) as u32).map_or(NOBODY, |slot| slot.backend())
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
