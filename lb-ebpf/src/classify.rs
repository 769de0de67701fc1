//! Whose packet is it: that of a known flow, of a new one, a task's answer, or none of ours.

use lb_common::{
    backend::{Backend, Kind, State},
    checksum::Delta,
    endpoint::{CONSISTENT, Endpoint, Listener, MAX_REPLY_LISTENERS, Replies, ReplySource},
    filter::{Side, position},
    flow::{Flow, REQUEST},
    net::Be16,
    outcome::Outcome,
    tunnel::{NAMES_TASK, SELF, TaskKey},
};

use crate::{
    family::Family,
    flow::{self, Found, Way},
    fragment,
    frame::Frame,
    heal,
    maps::{BACKENDS, FILTER, TASKS},
    packet::{Arrival, FIRST, LATER, NOBODY, Packet},
    track::{self, Entries, Known, Sender},
    tunnel,
};

/// How much of the uplink's work is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// Only what has a flow already: XDP has decided, and could not say so.
    Flows,
}

/// Classifies a packet that came in by the uplink, and makes its flow if it starts one; `entries` says whether its flow
/// may be among the established ones.
#[inline(always)]
pub fn uplink<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    scope: Scope,
    entries: Entries,
) -> Result<Found, Outcome> {
    if packet.form == LATER {
        fragment::follow(packet)?;
    }
    let key = &packet.key;
    let asks = may_be_ours(Side::Destination, key.protocol, key.destination_port);
    let answers = may_be_ours(Side::Source, key.protocol, key.source_port);
    if !asks && !answers {
        return Err(Outcome::NotOurs);
    }
    let mut otherwise = Outcome::NotOurs;
    if answers {
        match track::decode(in_answer(frame, packet)) {
            Ok(Known::Yes) => {
                let backend = BACKENDS.get(packet.flow.backend).ok_or(Outcome::BackendGone)?;
                return remembered(packet, Found { backend, way: Way::Client });
            }
            // What looks late may be a packet of another flow.
            Err(Outcome::LateAnswer) => otherwise = Outcome::LateAnswer,
            Err(Outcome::NotOurs) | Ok(_) => {}
            Err(outcome) => return Err(outcome),
        }
    }
    let found = owner(frame, packet, (asks, answers), (scope, entries), otherwise)?;
    remembered(packet, found)
}

/// As [`answer`], which is a function of its own here, for the verifier's sake.
#[inline(never)]
fn in_answer<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> i32 {
    track::encode(answer(frame, packet).map(|_| Known::Yes))
}

/// Lets later fragments follow their first.
#[inline(always)]
fn remembered<A: Family>(packet: &Packet<A>, found: Found) -> Result<Found, Outcome> {
    if packet.form == FIRST {
        fragment::remember(packet);
    }
    Ok(found)
}

/// What a packet belongs to that answers no request of this node's tables, or else; the ports say whether it may ask or
/// answer.
#[inline(always)]
fn owner<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    (asks, answers): (bool, bool),
    (scope, entries): (Scope, Entries),
    otherwise: Outcome,
) -> Result<Found, Outcome> {
    let mut known = Known::No;
    if entries == Entries::All {
        known = track::established(frame, packet, entries)?;
    }
    if known == Known::No {
        packet.avoid = NOBODY;
        packet.retries = 0;
        known = track::half_open(frame, packet, Entries::All)?;
    }
    match known {
        Known::Yes => return found(packet),
        Known::Gone => return Err(Outcome::Reset),
        Known::No => {}
    }
    let key = &packet.key;
    let endpoint = Endpoint::new(key.destination, key.destination_port, key.protocol);
    let all = scope == Scope::All;
    let listener = if asks && all { A::listener(&endpoint) } else { None };
    let (known, listener) = match listener {
        Some(listener) => (true, listener),
        None => (false, Listener::default()),
    };
    // What XDP made of its spare TC makes of it again: not everything leaves an entry.
    let lost = !all || listener.flags & CONSISTENT != 0 || answers && otherwise == Outcome::NotOurs;
    if lost && track::decode(heal::lost(frame, packet, true))? == Known::Yes {
        return found(packet);
    }
    if known { flow::open(frame, packet, &listener) } else { Err(otherwise) }
}

/// What was found of the packet's flow, for the later stages.
#[inline(always)]
pub fn found<A: Family>(packet: &Packet<A>) -> Result<Found, Outcome> {
    let way = if packet.flow.is_reply() { Way::Client } else { Way::Task };
    let backend = BACKENDS.get(packet.flow.backend).ok_or(Outcome::BackendGone)?;
    Ok(Found { backend, way })
}

/// Classifies a packet that a task sent.
#[inline(always)]
pub fn task<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> Result<Found, Outcome> {
    if packet.form == LATER {
        fragment::follow(packet)?;
    }
    if !may_be_ours(Side::Source, packet.key.protocol, packet.key.source_port) {
        return Err(Outcome::NotOurs);
    }
    let found = reply(frame, packet)?;
    if packet.form == FIRST {
        fragment::remember(packet);
    }
    Ok(found)
}

/// The flow that a task's packet answers: what a peer sent to it or snat did has an entry of its own; the next hop of
/// a snat backend may lie behind another interface than the uplink.
#[inline(always)]
fn reply<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> Result<Found, Outcome> {
    if track::established(frame, packet, Entries::Replies)? == Known::Yes {
        return found(packet);
    }
    let done = answer(frame, packet);
    // What looks late to a connection through this node may answer one that the client's port has through another.
    match done {
        Err(Outcome::NotOurs | Outcome::LateAnswer) => {}
        done => return done,
    }
    if track::half_open(frame, packet, Entries::Replies)? == Known::Yes {
        return found(packet);
    }
    if let Err(Outcome::LateAnswer) = done {
        return done;
    }
    match track::decode(heal::lost(frame, packet, false))? {
        Known::Yes => found(packet),
        _ => Err(Outcome::NotOurs),
    }
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

/// The flow of an answer that a peer sent for the client; false if this node has it no more: an answer needs none.
#[inline(always)]
pub fn for_client<A: Family>(packet: &mut Packet<A>, arrival: &Arrival) -> Result<bool, Outcome> {
    // The request's way, from the client to this node.
    let Packet { key, flow_key, .. } = packet;
    flow_key.source = key.destination;
    flow_key.destination = key.source;
    flow_key.source_port = key.destination_port;
    flow_key.destination_port = key.source_port;
    flow_key.protocol = key.protocol;
    flow_key._pad = 0;
    flow_key._pad2 = 0;
    if let Some(known) = A::flow(&packet.flow_key) {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        if unsafe { (*known).role } == REQUEST {
            if is_late(known, arrival) {
                return Err(Outcome::LateAnswer);
            }
            take_up(packet, known);
            return Ok(true);
        }
    }
    if track::decode(half_open_client(packet, arrival))? == Known::Yes {
        return Ok(true);
    }
    if tunnel::is_own(&packet.key.source) { Ok(false) } else { Err(Outcome::TunnelNotPeer) }
}

#[inline(never)]
fn half_open_client<A: Family>(packet: &mut Packet<A>, arrival: &Arrival) -> i32 {
    let Some(known) = A::half_open(&packet.flow_key) else {
        return track::encode(Ok(Known::No));
    };
    // SAFETY: as above.
    if unsafe { (*known).role } != REQUEST {
        return track::encode(Ok(Known::No));
    }
    if is_late(known, arrival) {
        return track::encode(Err(Outcome::LateAnswer));
    }
    take_up(packet, known);
    track::encode(if track::is_refusal(packet) { Err(Outcome::TaskRefused) } else { Ok(Known::Yes) })
}

/// Whether an answer comes from another task than the flow's, as far as its node says which: the client has been given to
/// another meanwhile.
#[inline(always)]
fn is_late<A>(known: *const Flow<A>, arrival: &Arrival) -> bool {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let Some(backend) = BACKENDS.get(unsafe { (*known).backend }) else {
        return false;
    };
    let (from, task) = (arrival.peer, &arrival.task);
    from != SELF
        && (backend.peer as u32 != from
            || arrival.flags & NAMES_TASK != 0
                && !(backend.address == task.address && backend.port == task.port))
}

/// Notes what an answer says in the entry of its flow, and copies that.
#[inline(always)]
fn take_up<A: Family>(packet: &mut Packet<A>, known: *mut Flow<A>) {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    unsafe {
        let changed = track::note(&mut *known, packet, Sender::Task, false);
        packet.flow.copy_from(known);
        if changed && packet.flow.is_over() {
            let _ = heal::end(packet.flow.backend, &packet.flow_key, &packet.key);
        }
    }
}

/// False if no listener, flow or reply can match the port.
#[inline(always)]
pub fn may_be_ours(side: Side, protocol: u8, port: Be16) -> bool {
    let (word, bit) = position(side, protocol, port);
    FILTER.get(word).is_some_and(|bits| bits & bit != 0)
}

/// The flow that a packet from a task answers.
#[inline(always)]
fn answer<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>) -> Result<Found, Outcome> {
    let key = &packet.key;
    let endpoint = Endpoint::new(key.source, key.source_port, key.protocol);
    let replies = A::replies(&endpoint).ok_or(Outcome::NotOurs)?;
    let backend = BACKENDS.get(replies.backend).ok_or(Outcome::NotOurs)?;
    if !track::is_from(frame, backend) {
        return Err(Outcome::NotOurs);
    }
    let mut late = false;
    for index in 0..MAX_REPLY_LISTENERS {
        if index as u32 >= replies.count {
            break;
        }
        let listener = &replies.sources[index];
        set_request(packet, listener);
        let Some(known) = A::flow(&packet.flow_key) else {
            continue;
        };
        if !is_answer(known, replies.backend, &mut late) {
            continue;
        }
        return answered(packet, known, backend, listener);
    }
    match track::decode(half_open_answer(packet, replies, backend))? {
        Known::No if late => Err(Outcome::LateAnswer),
        Known::No if !heal::answers(packet, replies) => Err(Outcome::NotOurs),
        _ => Ok(Found { backend, way: Way::Client }),
    }
}

#[inline(never)]
fn half_open_answer<A: Family>(
    packet: &mut Packet<A>,
    replies: &Replies<A>,
    backend: &'static Backend,
) -> i32 {
    let mut late = false;
    for index in 0..MAX_REPLY_LISTENERS {
        if index as u32 >= replies.count {
            break;
        }
        let listener = &replies.sources[index];
        set_request(packet, listener);
        // Another CPU may have moved it meanwhile, see `track::half_open`.
        let Some(known) = A::late_flow(&packet.flow_key) else {
            continue;
        };
        if is_answer(known, replies.backend, &mut late) {
            let done = answered(packet, known, backend, listener);
            let refused = done.is_ok() && track::is_refusal(packet);
            let done = if refused { Err(Outcome::TaskRefused) } else { done.map(|_| Known::Yes) };
            return track::encode(done);
        }
    }
    track::encode(if late { Err(Outcome::LateAnswer) } else { Ok(Known::No) })
}

/// The key of the request that the packet answers, if it was to this listener.
#[inline(always)]
fn set_request<A: Family>(packet: &mut Packet<A>, listener: &ReplySource<A>) {
    let Packet { key, flow_key, .. } = packet;
    flow_key.source = key.destination;
    flow_key.destination = listener.address;
    flow_key.source_port = key.destination_port;
    flow_key.destination_port = listener.port;
    flow_key.protocol = key.protocol;
    flow_key._pad = 0;
    flow_key._pad2 = 0;
}

/// Whether an entry is that of a request to this backend. One to another backend is noted: the task answers late, its
/// client has been given to another.
#[inline(always)]
fn is_answer<A>(known: *const Flow<A>, backend: u32, late: &mut bool) -> bool {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let (role, of) = unsafe { ((*known).role, (*known).backend) };
    *late |= role == REQUEST && of != backend;
    role == REQUEST && of == backend
}

/// Takes up the entry of the request that a task's packet answers; the copy's rewrite is turned around.
#[inline(always)]
fn answered<A: Family>(
    packet: &mut Packet<A>,
    known: *mut Flow<A>,
    backend: &'static Backend,
    listener: &ReplySource<A>,
) -> Result<Found, Outcome> {
    // SAFETY: as above.
    if unsafe { (*known).generation } != backend.generation {
        return Err(Outcome::BackendGone);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    take_up(packet, known);
    let Packet { key, flow, .. } = packet;
    flow.rewrite.source = listener.address;
    flow.rewrite.source_port = listener.port;
    flow.rewrite.destination = key.destination;
    flow.rewrite.destination_port = key.destination_port;
    flow.rewrite.address_delta = Delta::from_raw(flow.rewrite.address_delta).reversed().raw();
    flow.rewrite.port_delta = Delta::from_raw(flow.rewrite.port_delta).reversed().raw();
    Ok(Found { backend, way: Way::Client })
}
