//! What a packet means to its connection: which state it leaves it in, how far both sides have come, and whether it may go on.

use lb_common::{
    backend::{Backend, Kind, RETURN_DIRECT, State},
    conntrack::{
        Control, FiveTuple, Numbers,
        line::{ANSWERED, ESTABLISHED, OTHERS, RESET, RETRY, UDP, with_fast},
        tcp::{RST, SYN},
    },
    endpoint::{CONSISTENT, Endpoint, TaskEndpoint},
    outcome::Outcome,
    tunnel::{NAMES_TASK, SELF, name},
};

use super::{
    alias, guard, scheduler,
    table::{self, Entry, Found},
    tracked::Tracked,
};
use crate::io::{
    clock,
    family::Family,
    maps::{self, BACKENDS},
    packet::{ERROR, LATER, NOBODY, Packet, TunnelMeta, WHOLE},
    verifier,
};

/// What is known of a packet's connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// It has one: [`Packet::connection`] tells of it.
    Hit,
    /// It has none.
    Miss,
    /// It has one whose task is gone: the client is to be told by a reset.
    Stale,
}

impl Lookup {
    #[inline(always)]
    fn unpack(packed: u64) -> Result<Self, Outcome> {
        verifier::unpack(packed).map(|code| match code {
            0 => Self::Hit,
            2 => Self::Stale,
            _ => Self::Miss,
        })
    }
}

#[inline(always)]
fn pack(lookup: Result<Lookup, Outcome>) -> u64 {
    verifier::pack(lookup.map(|lookup| lookup as u32))
}

/// Who sent a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The client.
    Client,
    /// The task.
    Task,
}

/// Looks for the connection of a request that came to this node itself.
#[inline(always)]
pub fn request<A: Tracked>(packet: &mut Packet<A>) -> Result<Lookup, Outcome> {
    Lookup::unpack(A::request(packet))
}

/// [`request`], packed.
#[inline(always)]
pub fn packed_request<A: Tracked>(packet: &mut Packet<A>) -> u64 {
    packet.search.avoid = NOBODY;
    packet.search.retries = 0;
    packet.line.anew = 0;
    let Packet { key, line, search, .. } = packet;
    if table::find(key, line, search) != Found::Line {
        return pack(Ok(Lookup::Miss));
    }
    pack(of_client(packet))
}

/// What becomes of a client's packet whose line was found.
#[inline(always)]
fn of_client<A: Family>(packet: &mut Packet<A>) -> Result<Lookup, Outcome> {
    let Some(entry) = table::entry::<A>(packet.line.slot) else {
        return Ok(Lookup::Miss);
    };
    let control = Control(packet.line.control);
    let index = entry.backend();
    let backend = BACKENDS.get(index).ok_or(Outcome::BackendGone)?;
    let starts = packet.may_open();
    if !entry.is_of(backend) || backend.state == State::Free as u8 {
        return stale(packet, &entry, control, starts);
    }
    let given_anew = if starts && should_fail_over(packet, &entry, control, backend) {
        packet.search.avoid = index;
        packet.search.retries = (control.retries() + 1).min(lb_common::conntrack::line::MAX_RETRIES);
        true
    } else {
        !backend.forwards() || entry.is_silent(control, backend) || begins_anew(packet, &entry, control)
    };
    if given_anew {
        packet.line.anew = 1;
        // A later fragment goes where its first one went, which has not come by this line: on, or to the host.
        return if starts || packet.kind == LATER || backend.forwards() {
            Ok(Lookup::Miss)
        } else {
            Err(Outcome::BackendUnreachable)
        };
    }
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    if entry.peer() != 0 {
        come_here(packet, &entry);
    }
    let one_way = backend.flags & RETURN_DIRECT != 0;
    let state = note(&entry, control, packet, Sender::Client, one_way);
    table::copy(&entry, state, &mut packet.connection);
    Ok(Lookup::Hit)
}

/// Whether the packet is a SYN that begins another connection than the line's: also one that a side has closed, and been silent for
/// longer than its kernel remembers that.
#[inline(always)]
pub fn begins_anew<A: Family>(packet: &Packet<A>, entry: &Entry<A>, control: Control) -> bool {
    packet.opens()
        && (control.may_begin_anew() || control.is_closing() && !alias::is_remembered(entry.seen()))
}

/// The client's packets came through another node and come here now: so do the replies.
#[inline(always)]
fn come_here<A: Family>(packet: &Packet<A>, entry: &Entry<A>) {
    entry.set_peer(0);
    entry.set_mac(packet.source_mac);
    entry.set_hop_seen(clock::hop_long_ago(clock::now()));
}

/// Whether a SYN that was sent again is to go to another task than the one that has not answered it, or has refused it.
#[inline(always)]
fn should_fail_over<A: Family>(
    packet: &Packet<A>,
    entry: &Entry<A>,
    control: Control,
    backend: &Backend,
) -> bool {
    if !packet.opens() || control.has(ANSWERED) || entry.peer() != 0 {
        return false;
    }
    // Whether the task has answered is not known where its replies pass elsewhere.
    if backend.flags & RETURN_DIRECT != 0 {
        return false;
    }
    // No client sends again so soon: it is one SYN that the network doubled.
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    let soon = lb_common::conntrack::elapsed(entry.seen(), clock::now()) < hz / 4;
    !soon || control.has(RESET)
}

/// What becomes of a packet whose task is gone. The line of a connection stays for a while: whatever else its client has
/// sent is answered too.
#[inline(always)]
fn stale<A: Family>(
    packet: &mut Packet<A>,
    entry: &Entry<A>,
    control: Control,
    starts: bool,
) -> Result<Lookup, Outcome> {
    if starts {
        packet.line.anew = 1;
        return Ok(Lookup::Miss);
    }
    if packet.is_tcp() && packet.kind == WHOLE && packet.tcp_flags & RST == 0 {
        entry.set_seen(clock::now());
        entry.set_state(control, with_fast(control.state() | RESET));
        return Ok(Lookup::Stale);
    }
    Err(Outcome::BackendGone)
}

/// Looks for the connection that a task's packet belongs to.
#[inline(always)]
pub fn reply<A: Tracked>(packet: &mut Packet<A>, interface: u32) -> Result<Lookup, Outcome> {
    Lookup::unpack(A::reply(packet, interface))
}

/// [`reply`], packed.
#[inline(always)]
pub fn packed_reply<A: Tracked>(packet: &mut Packet<A>, interface: u32) -> u64 {
    let Packet { key, alias_tuple, line, search, .. } = packet;
    match table::find_reply(key, alias_tuple, line, search, interface) {
        Found::Line => pack(of_task(packet)),
        Found::DeadAlias => pack(Err(Outcome::StaleAlias)),
        Found::Nothing | Found::Busy => pack(without_line(packet, interface)),
    }
}

/// What becomes of a task's packet whose connection was found.
#[inline(always)]
fn of_task<A: Family>(packet: &mut Packet<A>) -> Result<Lookup, Outcome> {
    let Some(entry) = table::entry::<A>(packet.line.slot) else {
        return Ok(Lookup::Miss);
    };
    let control = Control(packet.line.control);
    let backend = BACKENDS.get(entry.backend()).ok_or(Outcome::BackendGone)?;
    if !entry.is_of(backend) {
        return Err(Outcome::BackendGone);
    }
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    record(packet, &entry, control)
}

/// Notes what a task's packet says, and copies its connection.
#[inline(always)]
fn record<A: Family>(packet: &mut Packet<A>, entry: &Entry<A>, control: Control) -> Result<Lookup, Outcome> {
    let state = note(entry, control, packet, Sender::Task, false);
    table::copy(entry, state, &mut packet.connection);
    if is_refusal(packet) { Err(Outcome::TaskRefused) } else { Ok(Lookup::Hit) }
}

/// What becomes of a reply that a peer sent for the client, whose line was found.
#[inline(always)]
pub fn peer_reply<A: Tracked>(packet: &mut Packet<A>, tunnel: &TunnelMeta) -> Result<Lookup, Outcome> {
    Lookup::unpack(A::peer_reply(packet, tunnel))
}

/// [`peer_reply`], packed.
#[inline(always)]
pub fn packed_peer_reply<A: Family>(packet: &mut Packet<A>, tunnel: &TunnelMeta) -> u64 {
    let Some(entry) = table::entry::<A>(packet.line.slot) else {
        return pack(Ok(Lookup::Miss));
    };
    // A number that is another's by now says nothing.
    if BACKENDS.get(entry.backend()).is_some_and(|backend| is_late(backend, tunnel)) {
        return pack(Err(Outcome::LateReply));
    }
    pack(record(packet, &entry, Control(packet.line.control)))
}

/// Whether a reply comes from another task than the connection's, as far as its node says which: the client has been given to
/// another meanwhile.
#[inline(always)]
fn is_late(backend: &Backend, tunnel: &TunnelMeta) -> bool {
    let (from, task) = (tunnel.peer, &tunnel.task);
    from != SELF
        && (backend.kind != Kind::Peer as u8
            || backend.peer as u32 != from
            || tunnel.flags & NAMES_TASK != 0
                && !(name(&backend.address) == task.name && backend.port == task.port))
}

/// What a task's packet is that has no line: late, the first reply of what was placed without one, or none of ours.
#[inline(always)]
fn without_line<A: Family>(packet: &mut Packet<A>, interface: u32) -> Result<Lookup, Outcome> {
    let key = &packet.key;
    let endpoint = Endpoint::new(key.source, key.source_port, key.protocol);
    let Some(task) = A::task_endpoint(&endpoint) else {
        return Ok(Lookup::Miss);
    };
    let Some(backend) = BACKENDS.get(task.backend) else {
        return Ok(Lookup::Miss);
    };
    let local = backend.kind == Kind::Local as u8;
    if local && backend.ifindex != interface {
        return Ok(Lookup::Miss);
    }
    if table::has_other_task(&packet.alias_tuple, &packet.search, backend.service) {
        return Err(Outcome::LateReply);
    }
    // A single listener leads to the task: it says where the reply comes from, the routing table where it goes.
    let Packet { key, connection, .. } = &mut *packet;
    connection.tuple.source = key.destination;
    connection.tuple.source_port = key.destination_port;
    connection.tuple.destination = task.listener;
    connection.tuple.destination_port = task.listener_port;
    connection.tuple.protocol = key.protocol;
    let first = !packet.is_tcp() || packet.answers_syn();
    let goes_on =
        packet.is_tcp() && packet.tcp_flags & SYN == 0 && is_by_hash(&packet.connection.tuple, task);
    if task.listener_port.raw() == 0
        || packet.kind != WHOLE
        || packet.ttl <= 1
        || !(guard::lingers() && first || goes_on)
        || maps::is_own(&packet.key.destination)
    {
        return Ok(Lookup::Miss);
    }
    let Packet { key, connection, .. } = packet;
    connection.backend = task.backend;
    connection.state = 0;
    connection.mac = [0; 3];
    connection.hop_seen = clock::hop_long_ago(clock::now());
    connection.peer = 0;
    connection.port = key.destination_port;
    connection.mtu = 0;
    connection.link = 0;
    connection.tags = lb_common::tags::Tags::NONE;
    packet.line.slot = NOBODY;
    Ok(Lookup::Hit)
}

/// Whether a connection was placed by its hash, and this is its task: the client's next packet makes the line again that a reply
/// did not find, and until then replies may be all that is sent. While the table is full all are placed so.
#[inline(always)]
fn is_by_hash<A: Family>(tuple: &FiveTuple<A>, task: &TaskEndpoint<A>) -> bool {
    let listener = A::listener(&Endpoint::new(tuple.destination, tuple.destination_port, tuple.protocol));
    let Some(listener) = listener.filter(|listener| listener.flags & CONSISTENT != 0 || guard::was_full())
    else {
        return false;
    };
    scheduler::slot(&listener, scheduler::hash(&listener, tuple)) == task.backend
}

/// Notes in the line what the packet says; the state after it. Written only where it changes something, so that CPUs do not take
/// a busy connection's line from each other.
#[inline(always)]
pub fn note<A: Family>(
    entry: &Entry<A>,
    control: Control,
    packet: &Packet<A>,
    sender: Sender,
    one_way: bool,
) -> u32 {
    let before = control.state();
    // Anybody can send an error.
    if packet.kind == ERROR {
        return before;
    }
    entry.set_seen(clock::now());
    let state = if !packet.is_tcp() {
        before | datagram_state(before, sender)
    } else if packet.kind == LATER {
        return before;
    } else {
        segment(entry, before, packet, sender, one_way)
    };
    let state = with_fast(state);
    if state != before && !entry.set_state(control, state) {
        // Another CPU has noted something else: bits come, and do not go.
        let now = entry.control();
        if now.version() == control.version() {
            entry.set_state(now, with_fast(now.state() | state));
        }
    }
    state
}

/// What a datagram adds to the state.
#[inline(always)]
fn datagram_state(before: u32, sender: Sender) -> u32 {
    match sender {
        Sender::Task => ANSWERED,
        Sender::Client if before & ANSWERED != 0 => ESTABLISHED,
        Sender::Client => 0,
    }
}

/// The state after a segment of TCP.
#[inline(always)]
fn segment<A: Family>(
    entry: &Entry<A>,
    before: u32,
    packet: &Packet<A>,
    sender: Sender,
    one_way: bool,
) -> u32 {
    let before_it = Numbers { client_next: entry.client_next(), task_next: entry.task_next() };
    let mut numbers = before_it;
    let state = match sender {
        Sender::Client => numbers.client_sent(before, &packet.segment(), one_way),
        Sender::Task => numbers.task_sent(before, &packet.segment()),
    };
    // What this segment leaves as it was may be moved by one of the other side, on another CPU.
    if numbers.client_next != before_it.client_next {
        entry.set_client_next(numbers.client_next);
    }
    if numbers.task_next != before_it.task_next {
        entry.set_task_next(numbers.task_next);
    }
    state
}

/// Refusals that are kept from a client, one a SYN that it sends.
const REFUSALS: u32 = 3;

/// Whether the packet is a refusal (RST to a SYN) that the client need not see, because the SYN that it will send again
/// goes to another task.
#[inline(always)]
fn is_refusal<A: Family>(packet: &Packet<A>) -> bool {
    let connection = &packet.connection;
    packet.tcp_flags & RST != 0
        && packet.kind != ERROR
        && connection.state & (ANSWERED | RESET | UDP) == RESET
        && connection.peer == 0
        && connection.state / RETRY % 4 < REFUSALS
        && connection.state & OTHERS != 0
}
