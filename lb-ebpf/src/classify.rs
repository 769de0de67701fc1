//! Whose packet is it: that of a known flow, of a new one, a task's answer, or none of ours.

use core::ptr::null;

use lb_common::{
    backend::{Kind, State},
    endpoint::{Endpoint, MAX_REPLY_LISTENERS},
    filter::{Side, position},
    flow::{ANSWERED, CLIENT_FIN, Flow, FlowKey, REPLY, REQUEST, RESET, TASK_FIN},
    net::Be16,
    outcome::Outcome,
};

use crate::{
    family::Family,
    flow::{self, Found, Way},
    frame::Frame,
    maps::{BACKENDS, FILTER},
    neighbour,
    packet::{FIN, Packet, RST},
    snat,
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
    let key = &packet.key;
    if !may_be_ours(Side::Destination, key.protocol, key.destination_port)
        && !may_be_ours(Side::Source, key.protocol, key.source_port)
    {
        return Err(Outcome::NotOurs);
    }
    if let Some(known) = A::flow(&packet.key)
        && let Some(found) = usable(packet, known)?
    {
        return Ok(found);
    }
    if scope == Scope::Flows {
        return answer_from_afar(packet);
    }
    let key = &packet.key;
    let endpoint = Endpoint::new(key.destination, key.destination_port, key.protocol);
    match A::listener(&endpoint) {
        Some(listener) => flow::open(frame, packet, &listener),
        None => answer_from_afar(packet),
    }
}

/// The flow that a packet from another machine answers. A task of this node answers by its own veth: whoever
/// sends its address by the uplink is not the task.
#[inline(always)]
fn answer_from_afar<A: Family>(packet: &Packet<A>) -> Result<Found<A>, Outcome> {
    let found = answer(packet)?;
    if found.backend.kind == Kind::Local as u8 {
        return Err(Outcome::NotOurs);
    }
    Ok(found)
}

/// Classifies a packet that a task sent.
#[inline(always)]
pub fn task<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> Result<Found<A>, Outcome> {
    if !may_be_ours(Side::Source, packet.key.protocol, packet.key.source_port) {
        return Err(Outcome::NotOurs);
    }
    match answer(packet) {
        // Only the task itself answers for its address.
        Ok(found) if found.backend.kind == Kind::Local as u8 && found.backend.ifindex != frame.ifindex() => {
            Err(Outcome::NotOurs)
        }
        Ok(found) => Ok(found),
        // The next hop of a backend may lie behind another interface than the uplink.
        Err(_) => {
            let known = A::flow(&packet.key).ok_or(Outcome::NotOurs)?;
            // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
            if unsafe { (*known).role } != REPLY {
                return Err(Outcome::NotOurs);
            }
            usable(packet, known)?.ok_or(Outcome::NotOurs)
        }
    }
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
    let way = if flow.role == REPLY { Way::Client } else { Way::Task };
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
fn note<A>(flow: &mut Flow<A>, packet: &Packet<A>, from_task: bool) {
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
