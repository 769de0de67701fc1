//! Connection tracking: whose packet is it? That of a connection, of a new one, a task's reply, or none of ours.
//!
//! ```text
//! table ◄─ lifecycle ◄─ admission ◄─ mod (classify)
//! ```
//! [`table`] alone touches lines; [`lifecycle`] says what a packet means to its connection; [`admission`] makes connections,
//! with [`guard`], [`scheduler`] and [`alias`]. Imports `wire`, `io` and `parse`.

pub mod admission;
pub mod alias;
pub mod apart;
pub mod fragment;
pub mod guard;
pub mod host_flow;
pub mod lifecycle;
pub mod scheduler;
pub mod table;
pub mod tracked;

use lb_common::{
    backend::{Backend, Kind, State},
    filter::{Side, position},
    net::Be16,
    outcome::Outcome,
    tunnel::TaskKey,
};

use self::{lifecycle::Lookup, table::Found, tracked::Tracked};
use crate::io::{
    counters,
    family::Family,
    frame::Frame,
    maps::{self, BACKENDS, FILTER, TASKS},
    packet::{FIRST, LATER, Packet, TunnelMeta},
    verifier,
};

/// How much of the uplink's work is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// Only what has a connection already: XDP has decided, and could not say so.
    Connections,
}

/// What the search for a packet's connection has come to, and what is to be done next. Each step is a function of its own,
/// beside the others: within each other they would take more of the stack than there is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It goes to its task.
    ToTask = 0,
    /// It goes to the client.
    ToClient = 1,
    /// It may start a connection: [`admission::open`].
    Open = 2,
    /// It does: [`scheduler::choose`] and [`admission::take`].
    Choose = 3,
    /// Its line is drafted: [`alias::reserve`], if it needs one, and [`admission::put`].
    Place = 4,
}

/// Which way a packet of a connection goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To its task.
    Task,
    /// To the client.
    Client,
}

/// A packet of ours: where it goes. What is needed of its connection is in [`Packet::connection`].
pub struct Classified {
    /// In the backend array.
    pub backend: &'static Backend,
    /// Where it goes.
    pub direction: Direction,
}

/// What was found of the packet's connection, for the later stages; the direction as its number.
#[inline(always)]
pub fn classified<A: Family>(packet: &Packet<A>, direction: u32) -> Result<Classified, Outcome> {
    let client = direction == Step::ToClient as u32;
    let direction = if client { Direction::Client } else { Direction::Task };
    let backend = BACKENDS.get(packet.connection.backend).ok_or(Outcome::BackendGone)?;
    Ok(Classified { backend, direction })
}

/// Classifies a packet that came in by the uplink.
#[inline(always)]
pub fn uplink<F: Frame, A: Tracked>(
    frame: &F,
    packet: &mut Packet<A>,
    scope: Scope,
) -> Result<Step, Outcome> {
    if packet.kind == LATER {
        fragment::follow(packet)?;
    }
    let key = &packet.key;
    let asks = may_be_ours(Side::Destination, key.protocol, key.destination_port);
    let replies = may_be_ours(Side::Source, key.protocol, key.source_port);
    // A datagram's also where it is not ours: the later ones are then known not to have come before it, and not held.
    if packet.kind == FIRST && (asks || replies || !packet.is_tcp()) {
        fragment::remember(packet);
    }
    let mut otherwise = Outcome::NotOurs;
    if replies {
        match lifecycle::reply(packet, frame.ifindex()) {
            Ok(Lookup::Hit) => return Ok(Step::ToClient),
            // What looks late may be a packet of another connection.
            Err(Outcome::LateReply) => otherwise = Outcome::LateReply,
            Ok(_) => {}
            Err(outcome) => return Err(outcome),
        }
    }
    if !asks {
        return Err(otherwise);
    }
    match lifecycle::request(packet)? {
        Lookup::Hit => Ok(Step::ToTask),
        Lookup::Stale => Err(Outcome::Reset),
        Lookup::Miss if scope == Scope::All && otherwise == Outcome::NotOurs => Ok(Step::Open),
        Lookup::Miss => Err(otherwise),
    }
}

/// Classifies a packet that a task sent.
#[inline(always)]
pub fn task<F: Frame, A: Tracked>(frame: &F, packet: &mut Packet<A>) -> Result<Step, Outcome> {
    if packet.kind == LATER {
        fragment::follow(packet)?;
    }
    if !may_be_ours(Side::Source, packet.key.protocol, packet.key.source_port) {
        return Err(Outcome::NotOurs);
    }
    match lifecycle::reply(packet, frame.ifindex())? {
        Lookup::Hit => {
            if packet.kind == FIRST {
                fragment::remember(packet);
            }
            Ok(Step::ToClient)
        }
        _ => Err(Outcome::NotOurs),
    }
}

/// Finds the task of this node that a peer sent a packet to, and sees to it that its replies find their way back. The backend's
/// index is then in [`Packet::draft`].
#[inline(always)]
pub fn for_task<A: Tracked>(packet: &mut Packet<A>, tunnel: &mut TunnelMeta) -> Result<u32, Outcome> {
    tunnel.task.protocol = packet.key.protocol;
    tunnel.task.family = if A::IS_V4 { 4 } else { 6 };
    let task: &TaskKey = &tunnel.task;
    // SAFETY: copied at once.
    let index = unsafe { TASKS.get(task) }.copied().ok_or(Outcome::TunnelNoTask)?;
    let backend = BACKENDS.get(index).ok_or(Outcome::TunnelNoTask)?;
    if backend.kind != Kind::Local as u8 || backend.state == State::Free as u8 {
        return Err(Outcome::TunnelNoTask);
    }
    if !backend.forwards() {
        return Err(Outcome::BackendUnreachable);
    }
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    packet.draft.backend = index;
    verifier::unpack(A::from_peer(packet, tunnel, backend, index))
}

/// Tries to put a line into the table while other CPUs insert lines of the same endpoint.
const PLACE_TRIES: u32 = 8;

/// Puts a drafted line into the table.
#[inline(always)]
pub fn place<A: Tracked>(packet: &mut Packet<A>) -> Result<u32, Outcome> {
    let backend = BACKENDS.get(packet.draft.backend).ok_or(Outcome::NoBackend)?;
    let mut tries = if packet.line.anew != 0 { PLACE_TRIES } else { 0 };
    while tries > 0 && A::linger(packet) != 0 {
        tries -= 1;
    }
    packet.search.stays = 0;
    let placed = place_again(packet, backend);
    if placed.is_err() {
        counters::refused(backend.service);
    }
    placed
}

/// The same, once for each time that another CPU inserts a line of the same endpoint meanwhile.
#[inline(always)]
fn place_again<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> Result<u32, Outcome> {
    for _ in 0..PLACE_TRIES {
        if admission::needs_alias(packet, backend) {
            alias::reserve(packet, backend)?;
        }
        let step = verifier::unpack(A::put(packet, backend))?;
        if step != Step::Place as u32 {
            return Ok(step);
        }
        let step = verifier::unpack(admission::look_again(packet, backend))?;
        if step != Step::Place as u32 {
            return Ok(step);
        }
    }
    Err(Outcome::SourceCollision)
}

/// The connection of a reply that a peer sent for the client; false if this node has it no more: a reply needs none.
#[inline(always)]
pub fn for_client<A: Tracked>(packet: &mut Packet<A>, tunnel: &TunnelMeta) -> Result<bool, Outcome> {
    // The request's way, from the client to this node.
    let Packet { key, sought, line, search, .. } = packet;
    sought.source = key.destination;
    sought.destination = key.source;
    sought.source_port = key.destination_port;
    sought.destination_port = key.source_port;
    sought.protocol = key.protocol;
    sought.kind = lb_common::conntrack::line::CONNECTION;
    sought.generation = 0;
    if table::find(sought, line, search) == Found::Line {
        return match lifecycle::peer_reply(packet, tunnel)? {
            Lookup::Hit => Ok(true),
            _ => Ok(false),
        };
    }
    if maps::is_own(&packet.key.source) { Ok(false) } else { Err(Outcome::TunnelNotPeer) }
}

/// False if no listener, connection or reply can match the port.
#[inline(always)]
pub fn may_be_ours(side: Side, protocol: u8, port: Be16) -> bool {
    let (word, bit) = position(side, protocol, port);
    FILTER.get(word).is_some_and(|bits| bits & bit != 0)
}
