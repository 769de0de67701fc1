//! Making flows: choose a task, compute the rewrite and its checksum deltas once, put both into the table.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_log_ebpf::debug;
use lb_common::{
    backend::{Backend, Kind, SHARED},
    endpoint::{CONSISTENT, Listener},
    flow::{CLIENT_FIN, FIN, OTHERS, REPLY_BY_PEER, REPLY_DIRECT, REQUEST, RESET, RETRY, RST},
    outcome::Outcome,
    tunnel::RETURN_DIRECT,
};

use crate::{
    classify, count,
    family::Family,
    frame::Frame,
    guard, heal, neighbour,
    packet::{Arrival, NOBODY, Packet, mac},
    parse::Ethernet,
    select::{self, By},
    snat,
    track::{self, Sender},
};

const EEXIST: i32 = -17;

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the flow's task.
    Task,
    /// To the client.
    Client,
}

/// A packet of ours: where it goes. Its flow is copied to [`Packet::flow`].
pub struct Found {
    /// In the backend array.
    pub backend: &'static Backend,
    /// Where it goes.
    pub way: Way,
}

/// Starts a flow for a packet that reached a listener.
#[inline(always)]
pub fn open<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    listener: &Listener,
) -> Result<Found, Outcome> {
    let goes_on = !packet.may_open() && heal::goes_on(packet, listener);
    if !packet.may_open() && !goes_on {
        return Err(Outcome::NoFlow);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    if !goes_on && listener.flags & CONSISTENT != 0 {
        let _ = heal::forget(packet);
    }
    if let Err(outcome) = make(frame, packet, listener, goes_on) {
        debug!(frame.ebpf(), "service {}: no flow, outcome {}", listener.service, outcome as u8);
        count::refused(listener.service);
        return Err(outcome);
    }
    classify::found(packet)
}

#[inline(always)]
fn make<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    listener: &Listener,
    goes_on: bool,
) -> Result<(), Outcome> {
    // What goes on behind the guard was counted when it was placed.
    let too_many = (!goes_on || listener.flags & CONSISTENT != 0) && guard::takes_over();
    let guarded = goes_on || too_many;
    if guarded {
        // What goes on has to find the same task without an entry that says who was asked before.
        packet.retries = 0;
        packet.avoid = NOBODY;
    }
    let by = match listener.flags & CONSISTENT {
        _ if guarded => By::HashAlone,
        0 => By::Turn,
        _ => By::Hash,
    };
    let (index, backend) = select::backend(packet, listener, by)?;
    // Its port was known to its entry and its spare alone.
    if goes_on && backend.kind == Kind::Snat as u8 {
        return Err(Outcome::NoFlow);
    }
    draft(frame, packet, index, backend)?;
    if goes_on {
        let segment = packet.segment();
        packet.flow.client_next = segment.end();
        packet.flow.task_next = segment.acknowledgment;
        packet.flow.state |= ended(packet.flags);
    } else if guarded && guard::needs_no_entry(backend) {
        guard::placed();
        count::new_flow(listener.service, index);
        return Ok(());
    } else if listener.slot_count > 1 {
        packet.flow.state |= OTHERS;
    }
    let snat = backend.kind == Kind::Snat as u8;
    if snat {
        snat::reserve(packet, backend)?;
    }
    let Packet { key, flow, .. } = packet;
    match A::HALF_OPEN.insert(key, flow, BPF_NOEXIST as u64) {
        Ok(()) => {
            debug!(frame.ebpf(), "service {}: new flow to backend {}", listener.service, index);
            // What goes on was counted when it was placed.
            if !goes_on {
                count::new_flow(listener.service, index);
            }
            if packet.avoid != NOBODY && packet.avoid != index {
                count::failover(packet.avoid);
            }
            Ok(())
        }
        Err(EEXIST) => {
            // Another CPU was first with the same flow, and its choice stands.
            let first = A::half_open(&packet.key).ok_or(Outcome::FlowTableFull)?;
            // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
            let same = unsafe { (*first).rewrite == packet.flow.rewrite };
            if snat && !same {
                let _ = A::delete_flow(&packet.reply_key);
            }
            // SAFETY: as above.
            unsafe { packet.flow.copy_from(first) };
            Ok(())
        }
        Err(_) => {
            if snat {
                let _ = A::delete_flow(&packet.reply_key);
            }
            Err(Outcome::FlowTableFull)
        }
    }
}

/// Drafts a flow from this packet to a backend that keeps the client's address and port.
#[inline(always)]
fn draft<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    index: u32,
    backend: &Backend,
) -> Result<(), Outcome> {
    let ethernet = frame.at::<Ethernet>(0).ok_or(Outcome::Malformed)?;
    let now = neighbour::jiffies();
    let Packet { key, flow, .. } = packet;
    // Through the tunnel the packet travels as it came.
    let (task, port) = if backend.kind == Kind::Peer as u8 {
        (&key.destination, key.destination_port)
    } else {
        (A::in_wide(&backend.address), backend.port)
    };
    flow.rewrite.set(key, (&key.source, key.source_port), (task, port));
    flow.backend = index;
    flow.generation = backend.generation;
    flow.seen = now as u32;
    // Until the routing table is asked, answer to where the question came from.
    flow.hop_seen = now as u32;
    // SAFETY: `at` checked the bounds.
    unsafe {
        flow.client_mac = mac((*ethernet).source);
        flow.node_mac = mac((*ethernet).destination);
    }
    flow.tags = packet.tags;
    flow.role = REQUEST;
    flow.state = packet.retries.wrapping_mul(RETRY);
    flow.peer = 0;
    // Data that comes with the SYN is counted when the task acknowledges it.
    flow.client_next = packet.sequence.wrapping_add(1);
    flow.task_next = 0;
    Ok(())
}

/// What a client's packet says of the end of a connection that has no entry: a late one does not bring it back to life.
#[inline(always)]
fn ended(flags: u8) -> u8 {
    match flags {
        flags if flags & RST != 0 => RESET,
        flags if flags & FIN != 0 => CLIENT_FIN,
        _ => 0,
    }
}

/// Sees to it that the answers to a packet that a peer sent to a task of this node go back to where the client sent it:
/// refreshes their entry, or makes it from any packet of the flow, so that a lost one heals.
#[inline(never)]
fn entry_by_peer<A: Family>(packet: &mut Packet<A>, arrival: &Arrival, index: u32, backend: &Backend) -> i32 {
    let (tcp, opens) = (packet.is_tcp(), packet.opens());
    let role = if arrival.flags & RETURN_DIRECT != 0 { REPLY_DIRECT } else { REPLY_BY_PEER };
    let task = A::in_wide(&backend.address);
    let Packet { key, reply_key, .. } = packet;
    reply_key.source = *task;
    reply_key.destination = key.source;
    reply_key.source_port = backend.port;
    reply_key.destination_port = key.source_port;
    reply_key.protocol = key.protocol;
    reply_key._pad = 0;
    reply_key._pad2 = 0;
    if let Some(known) = A::any_flow(reply_key) {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        let flow = unsafe { &mut *known };
        let same = flow.rewrite.source == key.destination
            && flow.rewrite.source_port == key.destination_port
            && flow.generation == backend.generation;
        if same && !(opens && flow.closing()) {
            let moved = flow.peer != arrival.peer as u16 || flow.role != role;
            if moved {
                flow.peer = arrival.peer as u16;
                flow.role = role;
            }
            let changed = track::note(flow, packet, Sender::Client, false);
            if changed && flow.is_over() {
                let _ = heal::end(index, &packet.reply_key, &packet.key);
            } else if (changed || moved) && flow.established() {
                // SAFETY: as above.
                unsafe { packet.reply.copy_from(known) };
                // It is where it was, or moves.
                let there = A::flow(&packet.reply_key) == Some(known);
                if there || track::move_over(&packet.reply_key, known, &packet.reply) {
                    let _ = heal::keep_by_peer(packet);
                }
            }
            return 0;
        }
        // The task could not tell two connections apart that differ only in the listener.
        if !same && flow.generation == backend.generation && track::is_alive(flow, tcp, backend.service) {
            return Outcome::TunnelCollision as i32;
        }
        let _ = A::delete_flow(reply_key);
    }
    if backend.flags & SHARED != 0 && select::collides(packet, backend, index) {
        return Outcome::TunnelCollision as i32;
    }
    if opens {
        let _ = heal::end(index, &packet.reply_key, &packet.key);
    }
    let now = neighbour::jiffies() as u32;
    let segment = packet.segment();
    let state = ended(packet.flags);
    let Packet { key, reply, reply_key, .. } = packet;
    reply.rewrite.set(reply_key, (&key.destination, key.destination_port), (&key.source, key.source_port));
    reply.backend = index;
    reply.generation = backend.generation;
    reply.seen = now;
    // Nothing is known of the way to the client: the hop is due at once.
    reply.hop_seen = now.wrapping_sub(neighbour::LIFETIME);
    reply.forget_hop();
    reply.role = role;
    reply.state = state;
    reply.peer = arrival.peer as u16;
    reply.client_next = if opens { segment.sequence.wrapping_add(1) } else { segment.end() };
    reply.task_next = if opens { 0 } else { segment.acknowledgment };
    match A::HALF_OPEN.insert(reply_key, reply, BPF_ANY as u64) {
        Ok(()) => 0,
        Err(_) => Outcome::FlowTableFull as i32,
    }
}

/// As [`entry_by_peer`], which is a function of its own and returns a number: zero, or the outcome that refuses.
#[inline(always)]
pub fn return_by_peer<A: Family>(
    packet: &mut Packet<A>,
    arrival: &Arrival,
    index: u32,
    backend: &Backend,
) -> Result<(), Outcome> {
    match entry_by_peer(packet, arrival, index, backend) {
        0 => Ok(()),
        refused if refused == Outcome::TunnelCollision as i32 => Err(Outcome::TunnelCollision),
        _ => Err(Outcome::FlowTableFull),
    }
}
