//! Aliases: where a task's reply does not find its connection by the client, because the task sees another port (translated,
//! or an own address with snat) or because the connection's line lies outside its home. An alias is keyed as the task sees the
//! connection; its insertion is the reservation of that pair, so that no two connections look alike to a task.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use lb_common::{
    abi::Config,
    backend::{Backend, Kind},
    conntrack::{
        Control, FiveTuple, TIME_WAIT, is_within,
        line::{ALIAS, ALIAS_KEY, ALIASED, ANSWERED, CLIENT_FIN, RESET, TASK_FIN, UDP},
    },
    net::{Be16, TCP},
    outcome::Outcome,
};

use super::{
    table::{self, Entry, Found, Inserted, RESERVED},
    tracked::Tracked,
};
use crate::io::{
    clock,
    family::Family,
    maps::{self, BACKENDS},
    packet::{Draft, NOBODY, Packet, Search},
};

/// Ports tried for one connection. With nine tenths of a range in use, all fail once in thirty connections.
const TRIES: usize = 32;

/// Whether the task knows the client's port from another connection: through another listener, or another node. What was never
/// answered may be forged, and gives way.
#[inline(always)]
pub fn is_taken<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> bool {
    sees_the_client(backend) && {
        let (source, port) = (packet.key.source, packet.key.source_port);
        set_pair(packet, backend, &source, port);
        packet.search.forgetful = 0;
        !is_free(packet)
    }
}

/// Whether a task of this backend sees the client's own address from this node.
#[inline(always)]
pub fn sees_the_client(backend: &Backend) -> bool {
    backend.kind == Kind::Local as u8 || backend.kind == Kind::Routed as u8
}

/// The pair that is asked for: the task's endpoint, and the client's as the task would see it.
#[inline(always)]
fn set_pair<A: Family>(packet: &mut Packet<A>, backend: &Backend, client: &A, port: Be16) {
    let Packet { key, sought, .. } = packet;
    sought.source = *A::in_wide(&backend.address);
    sought.destination = *client;
    sought.source_port = backend.port;
    sought.destination_port = port;
    sought.protocol = key.protocol;
    sought.kind = lb_common::conntrack::line::CONNECTION;
    sought.generation = 0;
}

/// Whether the pair that is asked for is free, or becomes so.
#[inline(always)]
fn is_free<A: Tracked>(packet: &mut Packet<A>) -> bool {
    for _ in 0..LOOKS {
        let probed = A::probe(packet);
        if probed != GIVEN_BACK {
            return probed == FREE;
        }
    }
    false
}

/// Looks for one pair: two lines have it at most, of a connection that was placed by its hash and had no choice, and of who had it
/// before.
const LOOKS: usize = 3;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// One who had the pair has it no more, and there may be another: look again.
const GIVEN_BACK: u32 = 2;

/// Whether a pair is taken. What has ended, or never began, gives it back.
#[inline(always)]
pub fn probe<A: Tracked>(packet: &mut Packet<A>) -> u32 {
    let Packet { key, sought, alias_tuple, probed, probe, line, search, .. } = packet;
    match table::find_reply(sought, alias_tuple, probed, probe, 0) {
        Found::Nothing => return FREE,
        Found::Busy => return TAKEN,
        Found::DeadAlias => {
            // One that is reserved has a moment; one that was bound since it was looked at is somebody's; and the task may
            // remember the connection of one that lingers, but takes what is newer by the same port and listener.
            let kept = table::entry::<A>(probe.alias).is_some_and(|alias| {
                let fresh = !clock::is_due(alias.seen(), clock::now());
                let remembered = search.forgetful == 0 && lingers(&alias) && alias.backend() != origin(key);
                fresh && alias.client_next() == RESERVED || table::leads_on(&alias) || remembered
            });
            return if !kept && forget::<A>(probe) { GIVEN_BACK } else { TAKEN };
        }
        Found::Line => {}
    }
    // The line that is given anew to this very connection.
    let own = line.anew != 0 && line.slot == probed.slot;
    if own && probe.alias == NOBODY {
        return FREE;
    }
    let Some(entry) = table::entry::<A>(probed.slot) else {
        return FREE;
    };
    let control = Control(probed.control);
    let over = BACKENDS.get(entry.backend()).is_none_or(|backend| entry.is_silent(control, backend));
    // Its task has never answered, and the datagram may be forged, or the client has given up.
    let never_began = !control.has(ANSWERED) && (control.has(UDP) || control.is_closing());
    if own || over || never_began {
        // What was changed meanwhile is somebody's again.
        let gone = (probe.alias == NOBODY || forget::<A>(probe))
            && (own || table::remove::<A>(probed.slot, probed.control));
        return if gone { GIVEN_BACK } else { TAKEN };
    }
    TAKEN
}

#[inline(always)]
fn forget<A: Family>(probe: &Search) -> bool {
    table::remove::<A>(probe.alias, alias_control(probe).0)
}

/// Stands for no port: none is as high.
const NO_PORT: u32 = u32::MAX;
/// And for no place in the table.
const NO_PLACE: u32 = u32::MAX - 1;

/// Reserves a port towards the backend for the connection that is being made, and an alias for its replies: with the client's own
/// address another port of the client's, with snat a port of this node's.
#[inline(always)]
pub fn reserve<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> Result<(), Outcome> {
    match A::free_port(packet, backend, (backend.kind == Kind::Snat as u8) as u32) {
        NO_PORT => Err(Outcome::SnatPortsExhausted),
        NO_PLACE => Err(Outcome::TableFull),
        port => {
            packet.draft.port = Be16::from_raw(port as u16);
            packet.draft.state |= ALIASED;
            Ok(())
        }
    }
}

/// A port that no connection to the backend has, network order, reserved.
#[inline(always)]
pub fn free_port<A: Tracked>(packet: &mut Packet<A>, backend: &Backend, snat: u32) -> u32 {
    let snat = snat != 0;
    let Some(config) = maps::config() else {
        return NO_PORT;
    };
    let mut port = if snat { first_choice(config, packet.key.source_port) } else { another() };
    let client = if snat { *A::in_wide(&backend.source) } else { packet.key.source };
    set_pair(packet, backend, &client, port);
    for attempt in 0..TRIES {
        packet.sought.destination_port = port;
        // Where nothing else is found, a pair that the task may remember costs a second, and none at all the connection.
        packet.search.forgetful = (attempt >= TRIES / 2 || packet.search.guarded != 0) as u32;
        match A::probe(packet) {
            FREE => match claim(packet, (RESERVED, 0), (0, NOBODY)) {
                Inserted::AtHome | Inserted::Elsewhere => return port.raw() as u32,
                Inserted::Full => return NO_PLACE,
                Inserted::Again => continue,
            },
            GIVEN_BACK => continue,
            _ => {}
        }
        port = if snat { any(config) } else { another() };
    }
    NO_PORT
}

/// Inserts the alias of the pair that was found free: of the connection in this line, in this version; in this state, and of this
/// [`origin`] if it lingers.
#[inline(always)]
fn claim<A: Tracked>(
    packet: &mut Packet<A>,
    (slot, version): (u32, u32),
    (state, origin): (u32, u32),
) -> Inserted {
    let Packet { key, alias, alias_tuple, alias_line, probe, .. } = packet;
    draft(alias, slot, version, state | if key.protocol == lb_common::net::UDP { UDP } else { 0 });
    alias.backend = origin;
    alias.tuple.source = alias_tuple.source;
    alias.tuple.destination = alias_tuple.destination;
    alias.tuple.source_port = alias_tuple.source_port;
    alias.tuple.destination_port = alias_tuple.destination_port;
    alias.tuple.protocol = alias_tuple.protocol;
    table::insert_draft(alias, alias_line, probe)
}

#[inline(always)]
fn draft<A: Family>(alias: &mut Draft<A>, slot: u32, version: u32, state: u32) {
    alias.tuple.kind = ALIAS_KEY;
    alias.tuple.generation = 0;
    alias.backend = NOBODY;
    alias.client_next = slot;
    alias.task_next = version;
    alias.state = ALIAS | state;
    alias.hop_seen = 0;
    alias.peer = 0;
    alias.mac = [0; 3];
    alias.port = Be16::from_raw(0);
    alias.tci = [Be16::from_raw(0); 2];
    alias.link = 0;
}

/// The reserved alias is the inserted connection's.
#[inline(always)]
pub fn bind<A: Family>(packet: &Packet<A>) {
    table::bind::<A>(&packet.alias_line, &packet.line);
}

/// Gives a reserved alias back.
#[inline(always)]
pub fn release<A: Family>(packet: &Packet<A>) {
    let _ = table::remove::<A>(packet.alias_line.slot, packet.alias_line.control);
}

/// Makes an alias for a connection whose line lies outside its home, under the client's own port. A source collision: the line is
/// to be placed again.
#[inline(always)]
pub fn follow_home<A: Tracked>(packet: &mut Packet<A>, backend: &Backend) -> Result<(), Outcome> {
    for _ in 0..4 {
        let (source, port) = (packet.key.source, packet.key.source_port);
        set_pair(packet, backend, &source, port);
        // What was placed by its hash has no choice.
        packet.search.forgetful = packet.search.guarded;
        if !is_free(packet) {
            // Another CPU was first with this pair.
            return Err(Outcome::SourceCollision);
        }
        let (slot, version) = (packet.line.slot, Control(packet.line.control).version());
        match claim(packet, (slot, version), (0, NOBODY)) {
            Inserted::AtHome | Inserted::Elsewhere => {
                // In a full table the place that it took may be the connection's own.
                let stands = table::entry::<A>(packet.line.slot)
                    .is_some_and(|entry| entry.control().0 == packet.line.control);
                if stands {
                    return Ok(());
                }
                release(packet);
                // So it would at each further try: the line itself has to lie where it needs none.
                packet.search.stays = u32::MAX;
                return Err(Outcome::SourceCollision);
            }
            Inserted::Full => return Err(Outcome::TableFull),
            Inserted::Again => {}
        }
    }
    Err(Outcome::SourceCollision)
}

/// Whether the task may still remember the connection that an alias was of.
#[inline(always)]
fn lingers<A: Family>(alias: &Entry<A>) -> bool {
    alias.control().has(RESET) && is_remembered(alias.seen())
}

/// Whether a task may still remember a connection that was closed then.
#[inline(always)]
pub fn is_remembered(seen: u32) -> bool {
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    is_within(seen, clock::now(), TIME_WAIT * hz)
}

/// Before a line is given anew: keeps the pair that the task knew its closed connection by, for as long as the task may remember
/// it. What came there by another listener or node meanwhile would not be taken for a new connection. Not 0 if another CPU was at
/// work with this client: it is to be tried again.
#[inline(always)]
pub fn linger<A: Tracked>(packet: &mut Packet<A>) -> u32 {
    let Some(entry) = table::entry::<A>(packet.line.slot) else {
        return 0;
    };
    let (control, index) = (Control(packet.line.control), entry.backend());
    let Some(backend) = BACKENDS.get(index) else {
        return 0;
    };
    // By its own listener the client's port is known as the same one's, and what is newer is taken.
    let by_itself = index == packet.draft.backend && !control.has(ALIASED);
    let remembered = control.has(ANSWERED) && control.has(CLIENT_FIN | TASK_FIN) && entry.is_of(backend);
    if by_itself
        || !remembered
        || !is_remembered(entry.seen())
        || packet.key.protocol != TCP
        || backend.kind == Kind::Peer as u8
    {
        return 0;
    }
    let snat = backend.kind == Kind::Snat as u8;
    let client = if snat { *A::in_wide(&backend.source) } else { packet.key.source };
    set_pair(packet, backend, &client, entry.port());
    let Packet { sought, alias_tuple, probed, probe, line, .. } = packet;
    let found = table::find_reply(sought, alias_tuple, probed, probe, 0);
    if found != Found::Line || probed.slot != line.slot {
        return (found == Found::Busy) as u32;
    }
    let (at, seen) = ((line.slot, control.version()), entry.seen());
    if probe.alias == NOBODY {
        // From a SYN that found no place before.
        if table::find(alias_tuple, probed, probe) == Found::Line {
            return 0;
        }
        // Without room it is not remembered: the client may have to send again.
        let of = origin(&packet.key);
        let claimed = claim(packet, at, (RESET, of));
        if claimed == Inserted::AtHome
            && let Some(alias) = table::entry::<A>(packet.alias_line.slot)
        {
            alias.set_seen(seen);
        }
        return (claimed == Inserted::Again) as u32;
    } else if let Some(alias) = table::entry::<A>(probe.alias) {
        // Where the task was shown another port, what is late must not leave by the host.
        let translated = control.state() & ALIASED;
        let control = alias_control(probe);
        if alias.set_state(control, control.state() | RESET | translated) {
            alias.set_seen(seen);
        }
    }
    0
}

/// Stands for the client's port and the listener that its packet asks for, in an alias that lingers: a connection's
/// numbers are newer than the last one's between the same two ports alone (RFC 6528, 3; Linux' timestamps likewise).
#[inline(always)]
fn origin<A: Family>(key: &FiveTuple<A>) -> u32 {
    let ports = (key.source_port.raw() as u32) << 16 | key.destination_port.raw() as u32;
    key.destination.sum().wrapping_mul(0x9e37_79b1) ^ ports
}

/// The control word of the alias that was found.
#[inline(always)]
fn alias_control(probe: &Search) -> Control {
    Control((probe.alias_control[1] as u64) << 32 | probe.alias_control[0] as u64)
}

/// The client's own port where it cannot clash with a connection of the host itself, else any of the range.
#[inline(always)]
fn first_choice(config: &Config, port: Be16) -> Be16 {
    let [low, high] = config.host_ports;
    if port.get() < 1024 || (low <= port.get() && port.get() <= high) { any(config) } else { port }
}

#[inline(always)]
fn any(config: &Config) -> Be16 {
    let [low, high] = config.snat_ports;
    Be16::new(low.wrapping_add((random() % (high.wrapping_sub(low) as u32 + 1)) as u16))
}

/// Any port that clients use (RFC 6056, 3.2).
#[inline(always)]
fn another() -> Be16 {
    Be16::new(1024 + (random() % (65_536 - 1024)) as u16)
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_prandom_u32() }
}
