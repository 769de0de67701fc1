//! Making connections: choose a task, draft a line, put it into the table.

use lb_common::{
    abi::{XDP_GENERIC, inner},
    backend::{Backend, Kind},
    conntrack::{
        Control, FiveTuple,
        line::{
            ANSWERED, CLIENT_FIN, CONNECTION, DIRECT, FOREIGN, ONE_WAY, OTHERS, RESET, RETRY, UDP, with_fast,
        },
        tcp::{FIN, RST, SYN},
    },
    endpoint::{AFFINE, CLOSED, CONSISTENT, Endpoint, LIMITED, Listener, RESTRICTED},
    net::Be16,
    outcome::Outcome,
    tags::Tags,
    tunnel::RETURN_DIRECT,
};

use super::{
    Step, alias, guard, host_flow,
    lifecycle::{self, Sender},
    scheduler::PORT_IS_TAKEN,
    table::{self, Found, Inserted},
    tracked::Tracked,
};
use crate::io::{
    clock, counters,
    family::Family,
    maps::{self, BACKENDS},
    packet::{Draft, FIRST, NOBODY, Packet, Search, TunnelMeta, WHOLE},
    verifier,
};

/// Says whether a packet that no line was found for may start a connection, of which listener, and how its task is chosen.
#[inline(always)]
pub fn open<A: Tracked>(packet: &mut Packet<A>) -> Result<Step, Outcome> {
    let key = &packet.key;
    let endpoint = Endpoint::new(key.destination, key.destination_port, key.protocol);
    let listener = A::listener(&endpoint).ok_or(Outcome::NotOurs)?;
    let goes_on = !packet.may_open() && goes_on(packet, &listener);
    if !packet.may_open() && !goes_on {
        return Err(Outcome::NoConnection);
    }
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    if !maps::has_vlan(&packet.tags) {
        return Err(Outcome::ForeignVlan);
    }
    // The kernel refuses them where it routes. A task would trust what its neighbours alone should be, and answer one of this
    // node's addresses, which may be another service's, for ever.
    let source = &packet.key.source;
    if source.is_martian() || maps::inner(source) != inner::OUTSIDE {
        return Err(Outcome::Martian);
    }
    if !packet.is_tcp() && is_of_a_listener(&packet.key) {
        return Err(Outcome::Martian);
    }
    if maps::is_denied(source)
        || listener.flags & RESTRICTED != 0 && !maps::may_connect(listener.service, source)
    {
        counters::denied(listener.service);
        return Err(Outcome::Denied);
    }
    // After those who may not: Swarm's mesh, which knows no lists, would go on serving them.
    if !packet.is_tcp() && host_flow::is_answer(&packet.key) {
        return Err(Outcome::HostFlow);
    }
    // What goes on behind the guard was counted when it was placed.
    let too_many = (!goes_on || listener.flags & CONSISTENT != 0) && guard::takes_over();
    let guarded = goes_on || too_many || guard::was_full();
    if guarded {
        // What goes on has to find the same task without a line that says who was asked before.
        packet.search.retries = 0;
        packet.search.avoid = NOBODY;
    }
    packet.search.goes_on = goes_on as u32;
    packet.search.guarded = guarded as u32;
    packet.listener = listener;
    Ok(Step::Choose)
}

/// Whether a datagram comes, or says to come, from a published port of another node: two services that answer every datagram would
/// answer each other for ever. Nothing is lost by it: what is published here is published there, and a reply to that port would be taken
/// for a request. A function of its own, for the stack's sake.
#[inline(never)]
fn is_of_a_listener<A: Family>(key: &FiveTuple<A>) -> bool {
    maps::is_node(&key.source)
        && A::listener(&Endpoint::new(key.destination, key.source_port, key.protocol)).is_some()
}

/// Whether the packet goes on with a connection that has no line. What was placed without one has to acknowledge the answer to
/// a SYN; where connections are placed by hash it may be any but a SYN, for the task's own kernel knows them.
#[inline(always)]
fn goes_on<A>(packet: &Packet<A>, listener: &Listener) -> bool {
    if !packet.is_tcp() || packet.kind != WHOLE || packet.tcp_flags & SYN != 0 {
        return false;
    }
    listener.flags & CONSISTENT != 0 || guard::was_full() || packet.acknowledges() && guard::lingers()
}

/// Drafts the connection to the task that was chosen, [`super::scheduler::choose`].
#[inline(always)]
pub fn take<A: Tracked>(packet: &mut Packet<A>, chosen: u64) -> Result<Step, Outcome> {
    let taken = try_take(packet, chosen);
    if taken.is_err() {
        counters::refused(packet.listener.service);
    }
    taken
}

#[inline(always)]
fn try_take<A: Tracked>(packet: &mut Packet<A>, chosen: u64) -> Result<Step, Outcome> {
    let index = chosen as u32;
    let goes_on = packet.search.goes_on != 0;
    let backend = BACKENDS.get(index).ok_or_else(|| nobody(packet, goes_on))?;
    // Its port was known to its line alone.
    if goes_on && backend.kind == Kind::Snat as u8 {
        return Err(Outcome::NoConnection);
    }
    // The task may know the client's port from another of its connections, which is usual where clients stay with a task: a line
    // for this packet would turn that one's replies around to the wrong listener.
    if goes_on && packet.listener.flags & AFFINE != 0 && alias::is_taken(packet, backend) {
        return Err(Outcome::NoConnection);
    }
    draft(packet, index, backend);
    packet.search.port_is_taken = (chosen & PORT_IS_TAKEN != 0) as u32;
    // What goes on was counted when it was placed.
    packet.search.is_new = !goes_on as u32;
    if goes_on {
        let segment = packet.segment();
        packet.draft.client_next = segment.end();
        packet.draft.task_next = segment.acknowledgment;
        packet.draft.state |= ended(packet.tcp_flags);
    } else if packet.search.guarded != 0 && guard::needs_no_line(backend) {
        // The port's last connection, to another task: its line would take this one's packets there.
        if packet.line.anew != 0 {
            let _ = table::remove::<A>(packet.line.slot, packet.line.control);
        }
        without_line(packet);
        counters::new_connection(backend.service, index);
        return Ok(Step::ToTask);
    } else if packet.listener.slot_count > 1 {
        packet.draft.state |= OTHERS;
    }
    Ok(Step::Place)
}

/// What becomes of a packet for which there is no task.
#[inline(always)]
fn nobody<A: Family>(packet: &Packet<A>, goes_on: bool) -> Outcome {
    if packet.listener.flags & LIMITED != 0 && packet.listener.slot_count != 0 && packet.search.guarded == 0 {
        return Outcome::TasksFull;
    }
    if packet.listener.flags & CLOSED == 0 || goes_on {
        return Outcome::NoBackend;
    }
    // What XDP cannot answer itself it leaves to TC; where it cannot tell TC so, TC knows connections alone, and this would be the
    // host's. The task that a SYN went to before may answer yet.
    let answers =
        maps::config().is_some_and(|config| config.flags & XDP_GENERIC == 0 && config.metadata_refused == 0);
    if packet.is_tcp() && answers && packet.search.avoid == NOBODY {
        Outcome::Reset
    } else {
        Outcome::BackendUnreachable
    }
}

/// Whether the draft needs an alias before it is put into the table.
#[inline(always)]
pub fn needs_alias<A: Family>(packet: &Packet<A>, backend: &Backend) -> bool {
    packet.search.port_is_taken != 0 || backend.kind == Kind::Snat as u8
}

/// Puts the draft into the table, and the connection into the packet; packed. When there is no place it goes without a line, if
/// it can. [`Step::Place`]: another CPU was at work, see [`look_again`].
#[inline(always)]
pub fn put<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> u64 {
    verifier::pack(try_put(packet, backend))
}

#[inline(always)]
fn try_put<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> Result<u32, Outcome> {
    let (mut inserted, aliased) = (table::insert(packet), needs_alias(packet, backend));
    let is_in = inserted == Inserted::AtHome || inserted == Inserted::Elsewhere;
    if aliased {
        if is_in { alias::bind(packet) } else { alias::release(packet) }
    } else if inserted == Inserted::Elsewhere && alias::sees_the_client(backend) {
        // Its replies would not find it.
        if let Err(outcome) = alias::follow_home(packet, backend) {
            let _ = table::remove::<A>(packet.line.slot, packet.line.control);
            inserted = if outcome == Outcome::TableFull { Inserted::Full } else { Inserted::Again };
        }
    }
    if inserted == Inserted::Again {
        return Ok(Step::Place as u32);
    }
    if inserted == Inserted::Full {
        guard::full();
        // What comes by another node has to go back there, which the line alone would say; and a task that was chosen in turn
        // is not found again. The SYN that the client sends next is placed by its hash.
        let by_hash = packet.search.guarded != 0 || packet.listener.flags & CONSISTENT != 0;
        if aliased || packet.draft.peer != 0 || !by_hash || !guard::needs_no_line(backend) {
            return Err(Outcome::TableFull);
        }
        without_line(packet);
    } else {
        into_packet(packet)?;
    }
    let Search { is_new, avoid, .. } = packet.search;
    if is_new != 0 {
        counters::new_connection(backend.service, packet.draft.backend);
        if avoid != NOBODY && avoid != packet.draft.backend {
            counters::failover(avoid);
        }
    }
    Ok(Step::ToTask as u32)
}

/// Copies what the later stages need of the line into the packet.
#[inline(always)]
fn into_packet<A: Family>(packet: &mut Packet<A>) -> Result<(), Outcome> {
    let entry = table::entry::<A>(packet.line.slot).ok_or(Outcome::TableFull)?;
    let state = Control(packet.line.control).state();
    table::copy(&entry, state, &mut packet.connection);
    Ok(())
}

/// What was inserted for the client's endpoint since it was looked for. Another CPU that was first with the same connection has
/// counted it; one that was first with the client's port at this task leaves it another port. Packed.
#[inline(never)]
pub fn look_again<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> u64 {
    let Packet { key, line, search, .. } = packet;
    let (anew, slot, version) = (line.anew != 0, line.slot, Control(line.control).version());
    line.anew = 0;
    if table::find(key, line, search) == Found::Line {
        let control = Control(line.control);
        let answered = search.avoid != NOBODY && control.has(ANSWERED) && !control.is_closing();
        // The line that was to be given anew, in another state by now, is nobody's new one; but a task that is late may have
        // answered after all.
        let still = anew && line.slot == slot && control.version() == version && !answered;
        if !still {
            return verifier::pack(into_packet(packet).map(|()| Step::ToTask as u32));
        }
        line.anew = 1;
    }
    // What was placed by its hash has no choice.
    if !needs_alias(packet, backend) && packet.search.guarded == 0 {
        packet.search.port_is_taken = alias::is_taken(packet, backend) as u32;
    }
    Step::Place as u64
}

/// Lets the packet go on as its draft says, without a line.
#[inline(always)]
fn without_line<A: Family>(packet: &mut Packet<A>) {
    guard::placed();
    let Packet { key, draft, connection, .. } = packet;
    connection.tuple.source = key.source;
    connection.tuple.destination = key.destination;
    connection.tuple.source_port = key.source_port;
    connection.tuple.destination_port = key.destination_port;
    connection.backend = draft.backend;
    connection.state = draft.state;
    connection.mac = draft.mac;
    connection.hop_seen = draft.hop_seen;
    connection.peer = draft.peer;
    connection.port = draft.port;
    connection.mtu = 0;
    connection.link = draft.link;
    connection.tags = packet.tags;
    packet.line.slot = NOBODY;
}

/// Drafts whose connection it is: the packet's five-tuple, under the client's own port, and its task.
#[inline(always)]
fn draft_whose<A: Family>(draft: &mut Draft<A>, key: &FiveTuple<A>, index: u32, backend: &Backend) {
    draft.tuple.source = key.source;
    draft.tuple.destination = key.destination;
    draft.tuple.source_port = key.source_port;
    draft.tuple.destination_port = key.destination_port;
    draft.tuple.protocol = key.protocol;
    draft.tuple.kind = CONNECTION;
    draft.tuple.generation = backend.generation as u16;
    draft.backend = index;
    draft.port = key.source_port;
}

/// Drafts a connection of this packet's client to a backend, under the client's own port.
#[inline(always)]
fn draft<A: Family>(packet: &mut Packet<A>, index: u32, backend: &Backend) {
    let now = clock::now();
    let Packet { key, draft, .. } = packet;
    draft_whose(draft, key, index, backend);
    draft.peer = 0;
    // Until the routing table is asked, answer to where the question came from.
    draft.hop_seen = clock::hop_ticks(now);
    draft.mac = packet.source_mac;
    if packet.network_at == 0 {
        // Generic XDP hides it.
        draft.hop_seen = clock::hop_long_ago(now);
    }
    let Tags { outer, inner } = packet.tags;
    draft.tci = [outer.tci, inner.tci];
    draft.link = packet.tags.link();
    let udp = if packet.key.protocol == lb_common::net::UDP { UDP } else { 0 };
    let one_way = if backend.flags & lb_common::backend::RETURN_DIRECT != 0 { ONE_WAY } else { 0 };
    draft.state = packet.search.retries.wrapping_mul(RETRY) | udp | one_way;
    // Data that comes with the SYN is counted when the task acknowledges it.
    draft.client_next = packet.sequence.wrapping_add(1);
    draft.task_next = 0;
}

/// What a client's packet says of the end of a connection that has no line: a late one does not bring it back to life.
#[inline(always)]
fn ended(flags: u8) -> u32 {
    match flags {
        flags if flags & RST != 0 => RESET,
        flags if flags & FIN != 0 => CLIENT_FIN,
        _ => 0,
    }
}

/// Sees to it that the replies to a packet that a peer sent to a task of this node go back to where the client sent it: notes it
/// in its line, or drafts that from any packet of the connection, so that a lost one is there again. Packed.
#[inline(always)]
pub fn from_peer<A: Tracked>(
    packet: &mut Packet<A>,
    tunnel: &TunnelMeta,
    backend: &Backend,
    index: u32,
) -> u64 {
    verifier::pack(try_from_peer(packet, tunnel, index, backend))
}

#[inline(always)]
fn try_from_peer<A: Tracked>(
    packet: &mut Packet<A>,
    tunnel: &TunnelMeta,
    index: u32,
    backend: &Backend,
) -> Result<u32, Outcome> {
    packet.search.avoid = NOBODY;
    packet.search.retries = 0;
    packet.search.guarded = 0;
    packet.line.anew = 0;
    packet.connection.port = packet.key.source_port;
    let Packet { key, line, search, .. } = packet;
    let found = table::find(key, line, search) == Found::Line;
    if found && let Some(entry) = table::entry::<A>(packet.line.slot) {
        let control = Control(packet.line.control);
        let same = entry.backend() == index && entry.is_of(backend);
        if same && !lifecycle::begins_anew(packet, &entry, control) {
            packet.connection.port = entry.port();
            // An error or a later fragment says nothing of where its connection comes from.
            if packet.kind <= FIRST {
                entry.set_peer(tunnel.peer as u16);
                let link = entry.link() & !DIRECT;
                entry.set_link(if tunnel.flags & RETURN_DIRECT != 0 { link | DIRECT } else { link });
                let _ = lifecycle::note(&entry, control, packet, Sender::Client, false);
            }
            return Ok(Step::ToTask as u32);
        }
        // The key may be another's of this node's own, whose client comes through the tunnel now.
        packet.line.anew = 1;
    }
    // An error or a later fragment makes no connection; its packet or first fragment has.
    if packet.kind > FIRST {
        return Ok(Step::ToTask as u32);
    }
    // The node that the client used knows its own bridges alone; the client may be this node itself.
    if maps::inner(&packet.key.source) == inner::BRIDGE {
        return Err(Outcome::Martian);
    }
    // The nodes that clients use each know their own alone. Who sends a SYN again is given to another task there.
    if counters::is_full(backend.service, index) && (!packet.is_tcp() || packet.opens()) {
        return Err(Outcome::TasksFull);
    }
    draft_by_peer(packet, tunnel, index, backend);
    packet.search.port_is_taken = alias::is_taken(packet, backend) as u32;
    // The node that the client used has counted it.
    packet.search.is_new = 0;
    Ok(Step::Place as u32)
}

#[inline(always)]
fn draft_by_peer<A: Family>(packet: &mut Packet<A>, tunnel: &TunnelMeta, index: u32, backend: &Backend) {
    let segment = packet.segment();
    let opens = packet.opens();
    let Packet { key, draft, .. } = packet;
    draft_whose(draft, key, index, backend);
    draft.peer = tunnel.peer as u16;
    // Nothing is known of the way to the client: the next hop is due at once.
    draft.hop_seen = clock::hop_long_ago(clock::now());
    draft.mac = [0; 3];
    draft.tci = [Be16::from_raw(0); 2];
    draft.link = if tunnel.flags & RETURN_DIRECT != 0 { DIRECT } else { 0 };
    let udp = if key.protocol == lb_common::net::UDP { UDP } else { 0 };
    draft.state = with_fast(udp | FOREIGN | ended(packet.tcp_flags));
    draft.client_next = if opens { segment.sequence.wrapping_add(1) } else { segment.end() };
    draft.task_next = if opens { 0 } else { segment.acknowledgment };
}
