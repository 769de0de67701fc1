//! Flows without an entry: what the guard placed without one, or what a listener with consistent placement has lost. Such a
//! listener's connections have a spare of each entry, in tables of their own: of the two, one may be lost. Without either, a
//! hash of the five-tuple says which task a connection has.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    backend::{self, Kind, State},
    endpoint::{self, Listener, Replies},
    flow::{
        ANSWER, ANSWERED, CLIENT_FIN, ESTABLISHED, FIN, Flow, FlowKey, REPLY, REQUEST, RESET, RST, SYN,
        Spare, TASK_FIN,
    },
    net::TCP,
    outcome::Outcome,
};

use crate::{
    count,
    family::Family,
    frame::Frame,
    guard,
    maps::BACKENDS,
    neighbour::{self, jiffies},
    packet::{Packet, WHOLE, mac},
    parse::Ethernet,
    track::{self, Known},
};

/// Whether the packet goes on with a connection that has no entry. Behind the guard it has to acknowledge the answer to a
/// SYN; where connections are placed by hash it may be any but a SYN, for the task's own kernel knows them.
#[inline(always)]
pub fn goes_on<A>(packet: &Packet<A>, listener: &Listener) -> bool {
    if listener.flags & endpoint::CONSISTENT != 0 {
        return may_be_lost(packet);
    }
    packet.is_tcp() && packet.form == WHOLE && packet.acknowledges() && guard::lingers()
}

/// Whether the packet may be of a connection whose entry is lost.
#[inline(always)]
fn may_be_lost<A>(packet: &Packet<A>) -> bool {
    packet.is_tcp() && packet.form == WHOLE && packet.flags & SYN == 0
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

/// Keeps spares of the packet's entry, which is established, and of what travels the other way. Where round robin chooses a
/// task nothing is kept: what is evicted there is over. Nor where answers pass elsewhere: nothing shows that the client is
/// more than a forger's.
#[inline(never)]
pub fn keep<A: Family>(packet: &mut Packet<A>) -> i32 {
    let Packet { key, flow, reply_key, spare, .. } = packet;
    let Some(backend) = BACKENDS.get(flow.backend) else {
        return 0;
    };
    if key.protocol != TCP || backend.flags & backend::CONSISTENT == 0 || flow.is_over() {
        return 0;
    }
    if flow.role == REQUEST && backend.flags & backend::RETURN_DIRECT != 0 {
        return 0;
    }
    spare_of(key, flow, spare);
    let other = match flow.role {
        // What a peer answers finds its way without an entry.
        REQUEST if backend.kind == Kind::Peer as u8 => return 0,
        REQUEST if backend.kind == Kind::Snat as u8 => REPLY,
        REQUEST => ANSWER,
        REPLY => REQUEST,
        _ => return 0,
    };
    set_twin(flow, key.protocol, reply_key);
    spare.source = key.destination;
    spare.source_port = key.destination_port;
    spare.destination = key.source;
    spare.destination_port = key.source_port;
    spare.role = other;
    A::SPARES.insert(reply_key, spare, BPF_ANY as u64).map_or(-1, |()| 0)
}

/// The same of a connection that comes through a peer: [`Packet::reply`] is its only entry here.
#[inline(never)]
pub fn keep_by_peer<A: Family>(packet: &mut Packet<A>) -> i32 {
    let Packet { reply, reply_key, spare, .. } = packet;
    let consistent =
        BACKENDS.get(reply.backend).is_some_and(|backend| backend.flags & backend::CONSISTENT != 0);
    if reply_key.protocol == TCP && consistent && !reply.is_over() {
        spare_of(reply_key, reply, spare);
    }
    0
}

#[inline(always)]
fn spare_of<A: Family>(key: &FlowKey<A>, flow: &Flow<A>, spare: &mut Spare<A>) {
    spare.source = flow.rewrite.source;
    spare.destination = flow.rewrite.destination;
    spare.source_port = flow.rewrite.source_port;
    spare.destination_port = flow.rewrite.destination_port;
    spare.backend = flow.backend;
    spare.generation = flow.generation;
    spare.peer = flow.peer;
    spare.role = flow.role;
    spare._pad = 0;
    let _ = A::SPARES.insert(key, spare, BPF_ANY as u64);
}

/// The key of what travels the other way: what leaves by the one entry comes back by the other.
#[inline(always)]
pub fn set_twin<A: Family>(flow: &Flow<A>, protocol: u8, key: &mut FlowKey<A>) {
    key.source = flow.rewrite.destination;
    key.destination = flow.rewrite.source;
    key.source_port = flow.rewrite.destination_port;
    key.destination_port = flow.rewrite.source_port;
    key.protocol = protocol;
    key._pad = 0;
    key._pad2 = 0;
}

/// Takes away the spares of a connection that is over, by the five-tuples of both ways.
#[inline(never)]
pub fn end<A: Family>(index: u32, one: &FlowKey<A>, other: &FlowKey<A>) -> i32 {
    let consistent = BACKENDS.get(index).is_some_and(|backend| backend.flags & backend::CONSISTENT != 0);
    if one.protocol == TCP && consistent {
        let _ = A::SPARES.remove(one);
        take_twin(one, other);
    }
    0
}

/// Takes the spare at `other` away if it is of the same connection as `one`: snat may have given the port to another.
#[inline(always)]
fn take_twin<A: Family>(one: &FlowKey<A>, other: &FlowKey<A>) {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let same = unsafe { A::SPARES.get(other) }.is_some_and(|spare| spare.answers(one));
    if same {
        let _ = A::SPARES.remove(other);
    }
}

/// Takes away what an earlier connection of the packet's five-tuple has left.
#[inline(never)]
pub fn forget<A: Family>(packet: &mut Packet<A>) -> i32 {
    let Packet { key, reply_key, .. } = packet;
    if key.protocol != TCP {
        return 0;
    }
    let (key, other) = (&*key, reply_key);
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let Some(spare) = (unsafe { A::SPARES.get(key) }) else {
        return 0;
    };
    other.source = spare.destination;
    other.destination = spare.source;
    other.source_port = spare.destination_port;
    other.destination_port = spare.source_port;
    other.protocol = TCP;
    other._pad = 0;
    other._pad2 = 0;
    take_twin(key, other);
    let _ = A::SPARES.remove(key);
    0
}

/// Whether the port that the packet's flow leaves with is that of another connection by now.
#[inline(always)]
fn is_anothers<A: Family>(packet: &mut Packet<A>) -> bool {
    let Packet { key, flow, reply_key, .. } = packet;
    set_twin(flow, key.protocol, reply_key);
    let Some(there) = A::any_flow(reply_key) else {
        return false;
    };
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let there = unsafe { &(*there).rewrite };
    let listener = there.source == key.destination && there.source_port == key.destination_port;
    let client = there.destination == key.source && there.destination_port == key.source_port;
    !(listener && client)
}

/// Makes the packet's entry again of its spare; [`Packet::flow`] is then what it was. `asks` says that it may be a client's.
/// A function of its own, see [`track::encode`].
#[inline(never)]
pub fn lost<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>, asks: bool) -> i32 {
    track::encode(from_spare(frame, packet, asks))
}

#[inline(always)]
fn from_spare<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>, asks: bool) -> Result<Known, Outcome> {
    if !may_be_lost(packet) {
        return Ok(Known::No);
    }
    let key = &packet.key;
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let Some(spare) = (unsafe { A::SPARES.get(key) }) else {
        return Ok(Known::No);
    };
    let Some(backend) = BACKENDS.get(spare.backend) else {
        return Ok(Known::No);
    };
    let request = spare.role == REQUEST;
    let gone = backend.generation != spare.generation || backend.state == State::Free as u8;
    if gone || request && !asks || !request && !track::is_from(frame, backend) {
        return Ok(Known::No);
    }
    if request && !backend.forwards() {
        return Err(Outcome::BackendUnreachable);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    let Packet { key, flow, .. } = packet;
    let source = (&spare.source, spare.source_port);
    flow.rewrite.set(key, source, (&spare.destination, spare.destination_port));
    flow.backend = spare.backend;
    flow.generation = spare.generation;
    flow.peer = spare.peer;
    flow.role = spare.role;
    // A late end does not bring a connection back to life.
    let ended = match packet.flags {
        flags if flags & RST != 0 => RESET,
        flags if flags & FIN == 0 => 0,
        _ if request => CLIENT_FIN,
        _ => TASK_FIN,
    };
    flow.state = ANSWERED | ESTABLISHED | ended;
    let now = jiffies() as u32;
    flow.seen = now;
    flow.hop_seen = now;
    let segment = packet.segment();
    let flow = &mut packet.flow;
    if request {
        let ethernet = frame.at::<Ethernet>(0).ok_or(Outcome::Malformed)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            flow.client_mac = mac((*ethernet).source);
            flow.node_mac = mac((*ethernet).destination);
        }
        flow.tags = packet.tags;
        (flow.client_next, flow.task_next) = (segment.end(), segment.acknowledgment);
    } else {
        // The next hop to the client is due at once.
        flow.hop_seen = now.wrapping_sub(neighbour::LIFETIME);
        flow.forget_hop();
        (flow.client_next, flow.task_next) = (segment.acknowledgment, segment.end());
    }
    let service = backend.service;
    if request && backend.kind == Kind::Snat as u8 {
        if is_anothers(packet) {
            let _ = forget(packet);
            return Ok(Known::No);
        }
        // The next packet looks after the entry for replies.
        packet.flow.hop_seen = now.wrapping_sub(neighbour::LIFETIME);
    }
    let Packet { key, flow, .. } = packet;
    // A flow whose entry is that of its requests gets it by what its client sends next. Where another CPU was first, its
    // entry stands.
    if flow.role != ANSWER && ended & RESET == 0 && A::FLOWS.insert(key, flow, BPF_NOEXIST as u64).is_ok() {
        count::healed(service);
    }
    Ok(Known::Yes)
}
