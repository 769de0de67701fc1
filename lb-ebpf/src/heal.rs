//! Flows without an entry: what the guard placed without one, or what a listener with consistent placement has lost. A hash
//! of the five-tuple says which task a connection has. Where its answers go is said by the task's only listener, or by a
//! note that is kept beside the entry: of the two, one may be lost.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::{
    backend::{self, State},
    endpoint::{self, Listener, Replies},
    flow::{ANSWERED, ESTABLISHED, FIN, Flow, FlowKey, Origin, REQUEST, RESET, RST, SYN, TASK_FIN},
    net::TCP,
};

use crate::{
    family::Family,
    frame::Frame,
    guard,
    maps::BACKENDS,
    neighbour::{self, jiffies},
    packet::{Packet, WHOLE},
    track::{self, Known},
};

/// Whether the packet goes on with a connection that has no entry. Behind the guard it has to acknowledge the answer to a
/// SYN; where connections are placed by hash it may be any but a SYN, for the task's own kernel knows them.
#[inline(always)]
pub fn goes_on<A>(packet: &Packet<A>, listener: &Listener) -> bool {
    if !packet.is_tcp() || packet.form != WHOLE {
        return false;
    }
    if listener.flags & endpoint::CONSISTENT != 0 {
        return packet.flags & SYN == 0;
    }
    packet.acknowledges() && guard::lingers()
}

/// Turns an answer around whose flow the guard placed without an entry: the first of a connection, or any datagram. A single
/// listener leads to the task, which says where it comes from; the routing table says where it goes.
#[inline(never)]
pub fn answers<A: Family>(packet: &mut Packet<A>, replies: &Replies<A>) -> bool {
    let first = !packet.is_tcp() || packet.answers_syn();
    if replies.count != 1 || packet.form != WHOLE || !first || packet.hops <= 1 || !guard::lingers() {
        return false;
    }
    let listener = &replies.sources[0];
    let Packet { key, flow, .. } = packet;
    let client = (&key.destination, key.destination_port);
    flow.rewrite.set(key, (&listener.address, listener.port), client);
    flow.backend = replies.backend;
    flow.role = REQUEST;
    flow.hop_seen = (jiffies() as u32).wrapping_sub(neighbour::LIFETIME);
    flow.forget_hop();
    true
}

/// Notes where the answers of a connection through this node go, which has just been established. Where round robin chooses a
/// task nothing is noted: what its client sends next could not be placed again.
#[inline(never)]
pub fn keep<A: Family>(packet: &mut Packet<A>) -> i32 {
    let Packet { key, flow, reply_key, origin, .. } = packet;
    if key.protocol != TCP || !is_healed(flow.backend) {
        return 0;
    }
    reply_key.source = flow.rewrite.destination;
    reply_key.destination = key.source;
    reply_key.source_port = flow.rewrite.destination_port;
    reply_key.destination_port = key.source_port;
    reply_key.protocol = key.protocol;
    reply_key._pad = 0;
    reply_key._pad2 = 0;
    origin.listener = key.destination;
    origin.port = key.destination_port;
    note(reply_key, flow, origin)
}

/// The same of a connection that comes through a peer: [`Packet::reply`] is its entry.
#[inline(never)]
pub fn keep_by_peer<A: Family>(packet: &mut Packet<A>) -> i32 {
    let Packet { reply, reply_key, origin, .. } = packet;
    if reply_key.protocol != TCP || !is_healed(reply.backend) {
        return 0;
    }
    origin.listener = reply.rewrite.source;
    origin.port = reply.rewrite.source_port;
    note(reply_key, reply, origin)
}

#[inline(always)]
fn is_healed(backend: u32) -> bool {
    BACKENDS.get(backend).is_some_and(|backend| backend.flags & backend::CONSISTENT != 0)
}

#[inline(always)]
fn note<A: Family>(answer: &FlowKey<A>, flow: &Flow<A>, origin: &mut Origin<A>) -> i32 {
    origin.peer = flow.peer;
    origin.backend = flow.backend;
    origin.generation = flow.generation;
    origin.role = flow.role;
    origin._pad = [0; 3];
    A::ORIGINS.insert(answer, origin, BPF_ANY as u64).map_or(-1, |()| 0)
}

/// Finds where an answer goes whose connection has lost its entry; [`Packet::flow`] is then what the entry was. That of a peer
/// is made again; one of this node by what its client sends next. A function of its own, see [`track::encode`].
#[inline(never)]
pub fn lost<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> i32 {
    let none = track::encode(Ok(Known::No));
    if !packet.is_tcp() || packet.form != WHOLE || packet.flags & SYN != 0 || packet.hops <= 1 {
        return none;
    }
    let Packet { key, .. } = packet;
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let Some(origin) = (unsafe { A::ORIGINS.get(key) }) else {
        return none;
    };
    let Some(backend) = BACKENDS.get(origin.backend) else {
        return none;
    };
    let gone = backend.generation != origin.generation || backend.state == State::Free as u8;
    if gone || !track::is_from(frame, backend) {
        return none;
    }
    let now = jiffies() as u32;
    let ended = match packet.flags {
        flags if flags & RST != 0 => RESET,
        flags if flags & FIN != 0 => TASK_FIN,
        _ => 0,
    };
    let Packet { key, flow, .. } = packet;
    flow.rewrite.set(key, (&origin.listener, origin.port), (&key.destination, key.destination_port));
    flow.backend = origin.backend;
    flow.generation = origin.generation;
    flow.peer = origin.peer;
    flow.role = origin.role;
    // A late end does not bring a connection back to life.
    flow.state = ANSWERED | ESTABLISHED | ended;
    flow.seen = now;
    flow.hop_seen = now.wrapping_sub(neighbour::LIFETIME);
    flow.forget_hop();
    let segment = packet.segment();
    packet.flow.client_next = segment.acknowledgment;
    packet.flow.task_next = segment.end();
    let Packet { key, flow, .. } = packet;
    if flow.role != REQUEST && ended & RESET == 0 {
        let _ = A::FLOWS.insert(key, flow, BPF_ANY as u64);
    }
    track::encode(Ok(Known::Yes))
}
