//! Whose packet is it: that of a known flow, of a new one, a task's answer, or none of ours.

use core::ptr::{null, null_mut};

use lb_common::{
    backend::{Kind, State},
    endpoint::{Endpoint, MAX_REPLY_LISTENERS},
    filter::{Side, position},
    flow::{ANSWERED, CLIENT_FIN, Flow, FlowKey, REQUEST, RESET, TASK_FIN},
    net::Be16,
    outcome::Outcome,
    tunnel::TaskKey,
};

use crate::{
    family::Family,
    flow::{self, Found, Way},
    fragment,
    frame::Frame,
    maps::{BACKENDS, FILTER, TASKS},
    neighbour,
    packet::{Arrival, ERROR, FIN, FIRST, LATER, Packet, RST},
    snat, tunnel,
};

/// How much of the uplink's work is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// Only what has a flow already: XDP has decided, and could not say so.
    Flows,
}

/// Classifies a packet that came in by the uplink, and makes its flow if it starts one.
#[inline(always)]
pub fn uplink<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    scope: Scope,
) -> Result<Found<A>, Outcome> {
    if packet.form == LATER {
        fragment::follow(packet)?;
    }
    let key = &packet.key;
    if !may_be_ours(Side::Destination, key.protocol, key.destination_port)
        && !may_be_ours(Side::Source, key.protocol, key.source_port)
    {
        return Err(Outcome::NotOurs);
    }
    let found = owner(frame, packet, scope)?;
    if packet.form == FIRST {
        fragment::remember(packet);
    }
    Ok(found)
}

#[inline(always)]
fn owner<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>, scope: Scope) -> Result<Found<A>, Outcome> {
    if let Some(known) = A::flow(&packet.key)
        && let Some(found) = usable(packet, known)?
    {
        return from_afar(found);
    }
    let key = &packet.key;
    let endpoint = Endpoint::new(key.destination, key.destination_port, key.protocol);
    match A::listener(&endpoint) {
        Some(listener) if scope == Scope::All => flow::open(frame, packet, &listener),
        _ => from_afar(answer(packet)?),
    }
}

/// A task of this node answers by its own veth: whoever sends its address by the uplink is not the task.
#[inline(always)]
fn from_afar<A: Family>(found: Found<A>) -> Result<Found<A>, Outcome> {
    if found.way != Way::Task && found.backend.kind == Kind::Local as u8 {
        return Err(Outcome::NotOurs);
    }
    Ok(found)
}

/// Classifies a packet that a task sent.
#[inline(always)]
pub fn task<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> Result<Found<A>, Outcome> {
    if packet.form == LATER {
        fragment::follow(packet)?;
    }
    if !may_be_ours(Side::Source, packet.key.protocol, packet.key.source_port) {
        return Err(Outcome::NotOurs);
    }
    let found = reply(packet)?;
    // Only the task itself answers for its address.
    if found.backend.kind == Kind::Local as u8 && found.backend.ifindex != frame.ifindex() {
        return Err(Outcome::NotOurs);
    }
    if packet.form == FIRST {
        fragment::remember(packet);
    }
    Ok(found)
}

/// The flow that a task's packet answers: what a peer sent to it or snat did has an entry of its own; the next hop of
/// a snat backend may lie behind another interface than the uplink.
#[inline(always)]
fn reply<A: Family>(packet: &mut Packet<A>) -> Result<Found<A>, Outcome> {
    if let Some(known) = A::flow(&packet.key) {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        if unsafe { (*known).is_reply() } {
            return usable(packet, known)?.ok_or(Outcome::NotOurs);
        }
    }
    answer(packet)
}

/// Finds the task of this node that a peer sent a packet to, and sees to it that its replies find their way back; the
/// backend's index.
#[inline(always)]
pub fn for_task<A: Family>(packet: &mut Packet<A>, arrival: &mut Arrival) -> Result<u32, Outcome> {
    arrival.task.protocol = packet.key.protocol;
    arrival.task.family = if A::IS_V4 { 4 } else { 6 };
    let task: &TaskKey = &arrival.task;
    // SAFETY: copied at once.
    let index = unsafe { TASKS.get(task) }.copied().ok_or(Outcome::TunnelNoTask)?;
    let backend = BACKENDS.get(index).ok_or(Outcome::TunnelNoTask)?;
    if backend.kind != Kind::Local as u8 || backend.state == State::Free as u8 {
        return Err(Outcome::TunnelNoTask);
    }
    if !backend.forwards() {
        return Err(Outcome::BackendUnreachable);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    // An error or a later fragment makes no flow; its packet or first fragment has.
    if packet.form <= FIRST {
        flow::return_by_peer(packet, arrival, index, backend)?;
    }
    Ok(index)
}

/// The flow of an answer that a peer sent for the client, null if this node has it no more: an answer needs none.
#[inline(always)]
pub fn for_client<A: Family>(packet: &Packet<A>) -> Result<*mut Flow<A>, Outcome> {
    // The request's way, from the client to this node.
    let request = packet.key.reversed();
    if let Some(known) = A::flow(&request) {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        let flow = unsafe { &mut *known };
        if flow.role == REQUEST {
            note(flow, packet, true);
            return Ok(known);
        }
    }
    if tunnel::is_own(&packet.key.source) { Ok(null_mut()) } else { Err(Outcome::TunnelNotPeer) }
}

/// False if no listener, flow or reply can match the port.
#[inline(always)]
fn may_be_ours(side: Side, protocol: u8, port: Be16) -> bool {
    let (word, bit) = position(side, protocol, port);
    FILTER.get(word).is_some_and(|bits| bits & bit != 0)
}

/// The flow, if its task is still there and the packet does not start anew; `None` has it made anew.
#[inline(always)]
fn usable<A: Family>(packet: &mut Packet<A>, known: *mut Flow<A>) -> Result<Option<Found<A>>, Outcome> {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let flow = unsafe { &mut *known };
    let backend = BACKENDS.get(flow.backend).ok_or(Outcome::BackendGone)?;
    let anew = flow.role == REQUEST && packet.may_open();
    if backend.generation != flow.generation || backend.state == State::Free as u8 {
        let _ = A::delete_flow(&packet.key);
        return if anew { Ok(None) } else { Err(Outcome::BackendGone) };
    }
    // An answer comes from the task by itself; only what goes to it needs a way.
    let unusable = flow.role == REQUEST && !backend.forwards();
    if unusable || anew && packet.opens() && flow.closing() {
        if !anew {
            return Err(Outcome::BackendUnreachable);
        }
        let _ = A::delete_flow(&packet.key);
        return Ok(None);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    let way = if flow.is_reply() { Way::Client } else { Way::Task };
    if backend.kind == Kind::Snat as u8 && flow.role == REQUEST {
        let now = neighbour::jiffies() as u32;
        if neighbour::is_due(flow.hop_seen, now) {
            flow.hop_seen = now;
            if !snat::look_after(packet, flow) {
                let _ = A::delete_flow(&packet.key);
                return Err(Outcome::BackendGone);
            }
        }
    }
    note(flow, packet, matches!(way, Way::Client));
    Ok(Some(Found { flow: known, backend, way, listener: null() }))
}

/// The flow that a packet from a task answers.
#[inline(always)]
fn answer<A: Family>(packet: &Packet<A>) -> Result<Found<A>, Outcome> {
    let key = &packet.key;
    let endpoint = Endpoint::new(key.source, key.source_port, key.protocol);
    let replies = A::replies(&endpoint).ok_or(Outcome::NotOurs)?;
    for index in 0..MAX_REPLY_LISTENERS {
        if index as u32 >= replies.count {
            break;
        }
        let listener = &replies.sources[index];
        let request = FlowKey::new(
            key.destination,
            listener.address,
            key.destination_port,
            listener.port,
            key.protocol,
        );
        let Some(known) = A::flow(&request) else {
            continue;
        };
        // SAFETY: as above.
        let flow = unsafe { &mut *known };
        if flow.backend != replies.backend || flow.role != REQUEST {
            continue;
        }
        let backend = BACKENDS.get(flow.backend).ok_or(Outcome::BackendGone)?;
        if backend.generation != flow.generation {
            return Err(Outcome::BackendGone);
        }
        if packet.hops <= 1 {
            return Err(Outcome::TtlExpired);
        }
        note(flow, packet, true);
        return Ok(Found { flow: known, backend, way: Way::Back, listener });
    }
    Err(Outcome::NotOurs)
}

/// Notes in the flow what the packet says of its state. Written only where it changes something, so that
/// CPUs do not take a busy flow's cache line from each other.
#[inline(always)]
pub fn note<A>(flow: &mut Flow<A>, packet: &Packet<A>, from_task: bool) {
    // Anybody can send an error.
    if packet.form == ERROR {
        return;
    }
    let mut state = flow.state;
    if from_task {
        state |= ANSWERED;
    }
    if packet.flags & FIN != 0 {
        state |= if from_task { TASK_FIN } else { CLIENT_FIN };
    }
    if packet.flags & RST != 0 {
        state |= RESET;
    }
    if state != flow.state {
        flow.state = state;
    }
    let now = neighbour::jiffies() as u32;
    if flow.seen != now {
        flow.seen = now;
    }
}
