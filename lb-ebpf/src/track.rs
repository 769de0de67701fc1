//! What is known of a packet's flow, and what the packet says of it: state, sequence numbers, time. A flow stays in the
//! half-open table until its client has gone on after the task's answer; then it moves to the established ones.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::{
    backend::{Backend, Kind, RETURN_DIRECT, State},
    flow::{
        ANSWERED, ESTABLISHED, Flow, FlowKey, MAX_RETRIES, OTHERS, REPLY, REQUEST, RESET, RETRY, RST, elapsed,
    },
    net::TCP,
    outcome::Outcome,
};

use crate::{
    family::Family,
    frame::Frame,
    heal,
    maps::{self, BACKENDS, TIMERS},
    neighbour::{self, jiffies},
    packet::{ERROR, LATER, Packet, WHOLE},
    snat,
};

/// What is known of a packet's flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It has one: [`Packet::flow`] is a copy of its entry.
    Yes,
    /// It has none.
    No,
    /// It has one whose task is gone: the client is to be told by a reset.
    Gone,
}

/// Which entries are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// All.
    All,
    /// Those for replies.
    Replies,
    /// Those of flows that are not established: there is no other.
    HalfOpen,
}

/// Who sent a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The client.
    Client,
    /// The task.
    Task,
}

/// Looks for the packet's five-tuple among the established flows. A function of its own, as its like for the others: it
/// has many ends, and the verifier would follow every later stage from each of them.
#[inline(always)]
pub fn established<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    entries: Entries,
) -> Result<Known, Outcome> {
    decode(in_established(frame, packet, entries == Entries::Replies))
}

#[inline(never)]
fn in_established<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>, replies: bool) -> i32 {
    let entries = if replies { Entries::Replies } else { Entries::All };
    match A::flow(&packet.key) {
        Some(known) => encode(usable(frame, packet, known, entries)),
        None => encode(Ok(Known::No)),
    }
}

/// Looks for it among those that are not.
#[inline(always)]
pub fn half_open<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    entries: Entries,
) -> Result<Known, Outcome> {
    decode(in_half_open(frame, packet, entries == Entries::Replies))
}

#[inline(never)]
fn in_half_open<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>, replies: bool) -> i32 {
    let (known, moved) = match A::half_open(&packet.key) {
        Some(known) => (known, false),
        // A SYN does not follow what establishes its flow.
        None if packet.opens() => return encode(Ok(Known::No)),
        // Between the looks into the two tables another CPU may have moved the flow from this one to the other.
        None => match A::flow(&packet.key) {
            Some(known) => (known, true),
            None => return encode(Ok(Known::No)),
        },
    };
    if !replies && goes_to_another(packet, known) {
        return encode(Ok(Known::No));
    }
    let entries = if replies { Entries::Replies } else { Entries::All };
    let done = usable(frame, packet, known, entries);
    if done == Ok(Known::Yes) && packet.flow.established() && !moved {
        establish(packet, known);
    }
    encode(done)
}

/// [`Known`] as the plain number that a function of its own may return: less than zero is one less than the negated
/// outcome.
#[inline(always)]
pub fn encode(known: Result<Known, Outcome>) -> i32 {
    match known {
        Ok(Known::Yes) => 0,
        Ok(Known::No) => 1,
        Ok(Known::Gone) => 2,
        Err(outcome) => -1 - outcome as i32,
    }
}

/// The reverse, for the outcomes that a look into the tables may come to.
#[inline(always)]
pub fn decode(done: i32) -> Result<Known, Outcome> {
    const fn number(outcome: Outcome) -> i32 {
        -1 - outcome as i32
    }
    match done {
        0 => Ok(Known::Yes),
        1 => Ok(Known::No),
        2 => Ok(Known::Gone),
        done if done == number(Outcome::BackendGone) => Err(Outcome::BackendGone),
        done if done == number(Outcome::BackendUnreachable) => Err(Outcome::BackendUnreachable),
        done if done == number(Outcome::TtlExpired) => Err(Outcome::TtlExpired),
        done if done == number(Outcome::TaskRefused) => Err(Outcome::TaskRefused),
        done if done == number(Outcome::LateAnswer) => Err(Outcome::LateAnswer),
        _ => Err(Outcome::NotOurs),
    }
}

/// Whether a SYN that was sent again is to go to another task than the one that has not answered it, or has refused it.
/// The flow is then gone.
#[inline(always)]
fn goes_to_another<A: Family>(packet: &mut Packet<A>, known: *mut Flow<A>) -> bool {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let flow = unsafe { &*known };
    if !packet.opens() || flow.role != REQUEST || flow.state & ANSWERED != 0 {
        return false;
    }
    let Some(backend) = BACKENDS.get(flow.backend) else {
        return false;
    };
    // No client sends again so soon: it is one SYN that the network doubled.
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    let soon = elapsed(flow.seen, jiffies() as u32) < hz / 4;
    if is_one_sided(flow, backend) || soon && flow.state & RESET == 0 {
        return false;
    }
    packet.avoid = flow.backend;
    packet.retries = flow.state / RETRY;
    if packet.retries < MAX_RETRIES {
        packet.retries += 1;
    }
    let _ = A::delete_flow(&packet.key);
    true
}

/// Takes up the entry for the packet, if its task is still there and the packet does not start anew.
#[inline(always)]
pub fn usable<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    known: *mut Flow<A>,
    entries: Entries,
) -> Result<Known, Outcome> {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let flow = unsafe { &mut *known };
    if entries == Entries::Replies && flow.role == REQUEST {
        return Ok(Known::No);
    }
    let backend = BACKENDS.get(flow.backend).ok_or(Outcome::BackendGone)?;
    let anew = flow.role == REQUEST && packet.may_open();
    if backend.generation != flow.generation || backend.state == State::Free as u8 {
        return gone(packet, flow, anew);
    }
    // An answer comes from the task by itself; only what goes to it needs a way.
    let unusable = flow.role == REQUEST && !backend.forwards();
    if unusable && !anew {
        return Err(Outcome::BackendUnreachable);
    }
    let silent =
        neighbour::is_due(flow.seen, jiffies() as u32) && expired(flow, packet.is_tcp(), backend.service);
    if unusable || silent || anew && packet.opens() && flow.closing() {
        let _ = A::delete_flow(&packet.key);
        if silent {
            let _ = heal::forget(packet);
        }
        return Ok(Known::No);
    }
    if flow.is_reply() && !is_from(frame, backend) {
        return Err(Outcome::NotOurs);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    let sender = if flow.is_reply() { Sender::Task } else { Sender::Client };
    let changed = note(flow, packet, sender, is_one_sided(flow, backend));
    let snat = backend.kind == Kind::Snat as u8;
    let now = jiffies() as u32;
    let looks_after = snat && flow.role == REQUEST && neighbour::is_due(flow.hop_seen, now);
    if looks_after {
        flow.hop_seen = now;
    }
    // SAFETY: as above.
    unsafe { packet.flow.copy_from(known) };
    if looks_after && !looked_after(packet) {
        let _ = A::delete_flow(&packet.key);
        return Err(Outcome::BackendGone);
    }
    if changed && snat {
        snat::tell(packet);
    }
    if changed && packet.flow.is_over() {
        heal::set_twin(&packet.flow, packet.key.protocol, &mut packet.reply_key);
        let _ = heal::end(packet.flow.backend, &packet.key, &packet.reply_key);
    }
    if sender == Sender::Task && is_refusal(packet) {
        return Err(Outcome::TaskRefused);
    }
    Ok(Known::Yes)
}

/// Looks after snat's other entry, and after the spares of both; false if the port has gone to another flow.
#[inline(always)]
fn looked_after<A: Family>(packet: &mut Packet<A>) -> bool {
    if !snat::look_after(packet) {
        let _ = heal::forget(packet);
        return false;
    }
    if packet.flow.established() {
        let _ = heal::keep(packet);
    }
    true
}

/// What becomes of a packet whose task is gone. The entry of a connection stays for a while: whatever else its client has
/// sent is answered too.
#[inline(always)]
fn gone<A: Family>(packet: &mut Packet<A>, flow: &mut Flow<A>, anew: bool) -> Result<Known, Outcome> {
    let answerable = packet.is_tcp() && packet.form == WHOLE && packet.flags & RST == 0;
    if flow.role == REQUEST && answerable && !anew {
        flow.seen = jiffies() as u32;
        flow.state |= RESET;
        return Ok(Known::Gone);
    }
    let _ = A::delete_flow(&packet.key);
    if anew { Ok(Known::No) } else { Err(Outcome::BackendGone) }
}

/// Whether a packet that claims to come from the backend can: a task of this node answers by its own veth alone.
#[inline(always)]
pub fn is_from<F: Frame>(frame: &F, backend: &Backend) -> bool {
    backend.kind != Kind::Local as u8 || backend.ifindex == frame.ifindex()
}

/// Whether the task's answers to the client do not pass here.
#[inline(always)]
fn is_one_sided<A>(flow: &Flow<A>, backend: &Backend) -> bool {
    flow.role == REQUEST && backend.flags & RETURN_DIRECT != 0
}

/// Moves the packet's flow, of whose entry it has a copy, to the established ones.
#[inline(always)]
pub fn establish<A: Family>(packet: &mut Packet<A>, entry: *mut Flow<A>) {
    if !move_over(&packet.key, entry, &packet.flow) {
        return;
    }
    let _ = heal::keep(packet);
    snat::establish(packet);
}

/// Moves an entry, of which there is a copy, to the established ones. False if it is not there any more: another CPU has
/// moved it, and may have given its place to another flow before it was copied. What goes astray by that is one packet; a
/// copy that was kept would lead the whole connection to the other's task.
#[inline(always)]
pub fn move_over<A: Family>(key: &FlowKey<A>, entry: *mut Flow<A>, copy: &Flow<A>) -> bool {
    if A::half_open(key) != Some(entry) {
        return false;
    }
    if A::FLOWS.insert(key, copy, BPF_ANY as u64).is_ok() {
        let _ = A::HALF_OPEN.remove(key);
    }
    true
}

/// Whether a flow has been silent for longer than its service's timer for it.
#[inline(always)]
pub fn expired<A: Family>(flow: &Flow<A>, tcp: bool, service: u32) -> bool {
    let (Some(config), Some(timers)) = (maps::config(), TIMERS.get(service)) else {
        return false;
    };
    flow.expired(tcp, jiffies() as u32, timers, config.jiffies_per_second)
}

/// Whether a flow's client may still use it: another flow of the same client's port would disturb it.
#[inline(always)]
pub fn is_alive<A: Family>(flow: &Flow<A>, tcp: bool, service: u32) -> bool {
    !flow.closing() && !expired(flow, tcp, service)
}

/// Whether the flow of this key goes to the backend and is alive.
#[inline(never)]
pub fn is_alive_at<A: Family>(key: &FlowKey<A>, index: u32, service: u32) -> bool {
    let Some(known) = A::any_flow(key) else {
        return false;
    };
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let flow = unsafe { &*known };
    flow.backend == index && is_alive(flow, key.protocol == TCP, service)
}

/// Notes in the flow what the packet says of it, and whether that changed its state. Written only where it changes
/// something, so that CPUs do not take a busy flow's cache line from each other.
#[inline(always)]
pub fn note<A: Family>(flow: &mut Flow<A>, packet: &Packet<A>, sender: Sender, one_sided: bool) -> bool {
    // Anybody can send an error.
    if packet.form == ERROR {
        return false;
    }
    let now = jiffies() as u32;
    if flow.seen != now {
        flow.seen = now;
    }
    if !packet.is_tcp() {
        return noted(flow, sender);
    }
    if packet.form == LATER {
        return false;
    }
    match sender {
        Sender::Client => flow.client_sent(&packet.segment(), one_sided),
        Sender::Task => flow.task_sent(&packet.segment()),
    }
}

/// The same of a datagram.
#[inline(always)]
fn noted<A>(flow: &mut Flow<A>, sender: Sender) -> bool {
    let state = match sender {
        Sender::Task => flow.state | ANSWERED,
        Sender::Client if flow.state & ANSWERED != 0 => flow.state | ESTABLISHED,
        Sender::Client => return false,
    };
    let changed = state != flow.state;
    if changed {
        flow.state = state;
    }
    changed
}

/// Refusals that are kept from a client, one a SYN that it sends.
const REFUSALS: u8 = 3;

/// Whether the packet is a refusal (RST to a SYN) that the client need not see, because the SYN that it will send again
/// goes to another task.
#[inline(always)]
pub fn is_refusal<A: Family>(packet: &Packet<A>) -> bool {
    let flow = &packet.flow;
    packet.flags & RST != 0
        && packet.form != ERROR
        && flow.state & (ANSWERED | RESET) == RESET
        && flow.role <= REPLY
        && flow.state / RETRY < REFUSALS
        && flow.state & OTHERS != 0
}
