//! Network address translation: writing addresses and ports into a packet, and what that does to its checksums (RFC 1624).

use lb_common::{
    backend::{Backend, Kind},
    checksum::Delta,
    net::Be16,
};

use crate::{
    conntrack::Direction,
    io::{
        family::Family,
        frame::Frame,
        packet::{ERROR, LATER, Offsets, Packet},
    },
    wire::{
        ethernet::{Ethernet, Mac, words},
        icmp::Icmp,
        transport::{Ports, checksum_at},
    },
};

/// What a packet leaves with. It points into the packet's connection, its five-tuple or its backend: copies of IPv6 addresses
/// would take the stack that the programs do not have.
pub struct Target<'a, A> {
    /// Source address.
    pub source: &'a A,
    /// Destination address.
    pub destination: &'a A,
    source_port: Be16,
    destination_port: Be16,
    addresses: Delta,
    ports: Delta,
}

impl<'a, A: Family> Target<'a, A> {
    #[inline(always)]
    fn new(packet: &Packet<A>, source: (&'a A, Be16), destination: (&'a A, Be16)) -> Self {
        let key = &packet.key;
        let addresses = Delta::of_address(key.source, *source.0);
        let ports = Delta::of_port(key.source_port, source.1);
        Self {
            source: source.0,
            destination: destination.0,
            source_port: source.1,
            destination_port: destination.1,
            addresses: addresses.and(Delta::of_address(key.destination, *destination.0)),
            ports: ports.and(Delta::of_port(key.destination_port, destination.1)),
        }
    }

    /// Of a request: as its task is to see it, from this port.
    #[inline(always)]
    pub fn task(packet: &'a Packet<A>, backend: &'a Backend, port: Be16) -> Self {
        let snat = backend.kind == Kind::Snat as u8;
        let source = if snat { A::in_wide(&backend.source) } else { &packet.key.source };
        Self::new(packet, (source, port), (A::in_wide(&backend.address), backend.port))
    }

    /// Of a reply: from the listener to the client.
    #[inline(always)]
    pub fn client(packet: &'a Packet<A>) -> Self {
        let tuple = &packet.connection.tuple;
        Self::new(packet, (&tuple.destination, tuple.destination_port), (&tuple.source, tuple.source_port))
    }

    /// Of a packet of a connection.
    #[inline(always)]
    pub fn of(packet: &'a Packet<A>, backend: &'a Backend, direction: Direction) -> Self {
        match direction {
            Direction::Task => Self::task(packet, backend, packet.connection.port),
            Direction::Client => Self::client(packet),
        }
    }
}

/// Hardware addresses of a hop.
#[derive(Clone, Copy)]
pub struct Hop {
    /// Of the receiver.
    pub destination: Mac,
    /// Of the sender.
    pub source: Mac,
    /// Whether they are written: a local task's need not be known. Not an `Option`, whose empty half the verifier
    /// would see read.
    pub known: bool,
}

/// The hop to a backend. A local task's hardware address may not be known, and need not be: the buffer goes
/// straight to its device.
#[inline(always)]
pub fn backend_hop(backend: &Backend) -> Hop {
    let known = backend.kind != Kind::Local as u8 || backend.mac != [0; 6];
    Hop { destination: words(&backend.mac), source: words(&backend.source_mac), known }
}

/// Rewrites the packet. `None` if the headers are not where the parser saw them, which the bounds checks
/// ask for and no packet shows.
#[inline(always)]
pub fn apply<F: Frame, A: Family>(
    frame: &mut F,
    packet: &Packet<A>,
    target: &Target<'_, A>,
    hop: Hop,
) -> Option<()> {
    if packet.kind == ERROR {
        return error(frame, packet, target, hop);
    }
    if packet.kind == LATER {
        A::rewrite(frame, packet.network(), target.source, target.destination, target.addresses)?;
        // No transport header, and so no sum over the addresses: the change is the device's sum's.
        if !A::IS_V4 {
            frame.adjust_sum(target.addresses.and(Delta::IPV6_HOP));
        }
        return link(frame, hop);
    }
    simple(frame, &Offsets::of(packet), target, hop)
}

/// The same of a whole packet or a first fragment.
#[inline(always)]
pub fn simple<F: Frame, A: Family>(
    frame: &mut F,
    offsets: &Offsets,
    target: &Target<'_, A>,
    hop: Hop,
) -> Option<()> {
    *frame.at::<Ports>(offsets.transport)? =
        Ports { source: target.source_port.raw(), destination: target.destination_port.raw() };
    A::rewrite(frame, offsets.network, target.source, target.destination, target.addresses)?;
    link(frame, hop)?;
    frame.update_checksum(offsets, target.addresses, target.ports, A::IS_V4)
}

/// Writes the hardware addresses, where they are known.
#[inline(always)]
pub fn link<F: Frame>(frame: &mut F, hop: Hop) -> Option<()> {
    if hop.known {
        let ethernet = frame.at::<Ethernet>(0)?;
        ethernet.destination = hop.destination;
        ethernet.source = hop.source;
    }
    Some(())
}

/// Rewrites an ICMP error: the packet it quotes the other way around, then its own header (RFC 5508, 4.2 and 4.3).
#[inline(always)]
fn error<F: Frame, A: Family>(
    frame: &mut F,
    packet: &Packet<A>,
    target: &Target<'_, A>,
    hop: Hop,
) -> Option<()> {
    let (quoted, outer) = (requote(frame, packet, target), readdress(frame, packet, target));
    if quoted == MISPLACED || outer == MISPLACED {
        return None;
    }
    let (quoted, outer) = (Delta::from_raw(quoted as u16), Delta::from_raw(outer as u16));
    // ICMPv6 has a pseudo header (RFC 4443, 2.3), ICMP none.
    let change = if A::IS_V4 { quoted } else { quoted.and(outer) };
    let header = frame.at::<Icmp>(packet.transport())?;
    header.checksum = change.apply(header.checksum);
    if !A::IS_V4 {
        frame.adjust_sum(Delta::IPV6_HOP);
    }
    link(frame, hop)
}

/// The headers are not where the parser saw them.
const MISPLACED: u32 = u32::MAX;

/// Rewrites the packet that an error quotes: what that adds to a sum over it, or [`MISPLACED`]. Beside [`readdress`], because
/// in one they would take more of the stack than there is.
#[inline(never)]
fn requote<F: Frame, A: Family>(frame: &mut F, packet: &Packet<A>, target: &Target<'_, A>) -> u32 {
    try_requote(frame, packet, target).map_or(MISPLACED, |change| change.raw() as u32)
}

#[inline(always)]
fn try_requote<F: Frame, A: Family>(
    frame: &mut F,
    packet: &Packet<A>,
    target: &Target<'_, A>,
) -> Option<Delta> {
    let quoted = A::requote(frame, packet.quoted(), target.destination, target.source, target.addresses)?;
    *frame.at::<Ports>(packet.quoted_transport())? =
        Ports { source: target.destination_port.raw(), destination: target.source_port.raw() };
    let mut change = quoted.and(target.ports);
    // The quote may end before TCP's checksum.
    let at = packet.quoted_transport() + checksum_at(packet.key.protocol);
    if at + 2 <= packet.transport() + packet.transport_bytes as usize
        && let Some(checksum) = frame.at::<u16>(at)
        && (packet.is_tcp() || *checksum != 0)
    {
        let old = *checksum;
        *checksum = target.addresses.and(target.ports).apply(old);
        change = change.and(Delta::of_word(old, *checksum));
    }
    Some(change)
}

/// Rewrites an error's own addresses: what that adds to a sum over them, or [`MISPLACED`].
#[inline(never)]
fn readdress<F: Frame, A: Family>(frame: &mut F, packet: &Packet<A>, target: &Target<'_, A>) -> u32 {
    try_readdress(frame, packet, target).map_or(MISPLACED, |change| change.raw() as u32)
}

#[inline(always)]
fn try_readdress<F: Frame, A: Family>(
    frame: &mut F,
    packet: &Packet<A>,
    target: &Target<'_, A>,
) -> Option<Delta> {
    let key = &packet.key;
    // The sender's address stays where the client's is kept: it may be a router's. Where the source is translated
    // it is ours, so that nobody sees what lies behind.
    let sender = A::source(frame, packet.network())?;
    let source = if *target.source == key.source { &sender } else { target.source };
    let outer =
        Delta::of_address(sender, *source).and(Delta::of_address(key.destination, *target.destination));
    A::rewrite(frame, packet.network(), source, target.destination, outer)?;
    Some(outer)
}
