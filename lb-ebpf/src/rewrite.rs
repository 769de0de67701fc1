//! Writing a flow's rewrite into a packet: link, network and transport header, and their checksums.

use core::mem::offset_of;

use lb_common::{
    backend::Backend,
    checksum::Delta,
    flow::{Flow, Rewrite},
    net::{Be16, TCP, V4, V6},
    tunnel::Peer,
};

use crate::{
    family::Family,
    frame::Frame,
    packet::{ERROR, LATER, Packet},
    parse::{Ethernet, icmp},
};

#[repr(C)]
struct Ports {
    source: u16,
    destination: u16,
}

/// What a packet leaves with. It points into the flow table, or at the packet's own five-tuple: copies of IPv6
/// addresses would take the stack that the programs do not have.
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
    /// As a ready-made rewrite says.
    #[inline(always)]
    pub fn of(rewrite: &'a Rewrite<A>) -> Self {
        Self {
            source: &rewrite.source,
            destination: &rewrite.destination,
            source_port: rewrite.source_port,
            destination_port: rewrite.destination_port,
            addresses: Delta::from_raw(rewrite.address_delta),
            ports: Delta::from_raw(rewrite.port_delta),
        }
    }

    /// As a backend wants it, for a packet whose flow is not at hand.
    #[inline(always)]
    pub fn task(packet: &'a Packet<A>, address: &'a A, port: Be16) -> Self {
        let key = &packet.key;
        Self {
            source: &key.source,
            destination: address,
            source_port: key.source_port,
            destination_port: port,
            addresses: Delta::of_address(key.destination, *address),
            ports: Delta::of_port(key.destination_port, port),
        }
    }
}

/// Where the headers of a TCP or UDP packet are.
pub struct Place {
    /// Offset of the network header in bytes.
    pub network: usize,
    /// Offset of the transport header in bytes.
    pub transport: usize,
    /// Its protocol.
    pub protocol: u8,
}

impl Place {
    /// As the parser saw them.
    #[inline(always)]
    pub fn of<A>(packet: &Packet<A>) -> Self {
        Self { network: packet.network(), transport: packet.transport(), protocol: packet.key.protocol }
    }

    /// Offset of the transport checksum.
    #[inline(always)]
    pub fn checksum(&self) -> usize {
        self.transport + if self.protocol == TCP { 16 } else { 6 }
    }
}

/// Hardware addresses of a hop, as words.
#[derive(Clone, Copy)]
pub struct Hop {
    /// Of the receiver.
    pub destination: [u16; 3],
    /// Of the sender.
    pub source: [u16; 3],
    /// Whether they are written: a local task's need not be known. Not an `Option`, whose empty half the verifier
    /// would see read.
    pub known: bool,
}

/// Rewrites the packet. `None` if the headers are not where the parser saw them, which the bounds checks
/// ask for and no packet shows. Packet pointers are void afterwards.
#[inline(always)]
pub fn apply<F: Frame, A: Family>(
    frame: &F,
    packet: &Packet<A>,
    target: &Target<'_, A>,
    hop: Hop,
) -> Option<()> {
    if packet.form == ERROR {
        return error(frame, packet, target, hop);
    }
    if packet.form != LATER {
        return plain(frame, &Place::of(packet), target, hop);
    }
    A::rewrite(frame, packet.network(), target.source, target.destination, target.addresses)?;
    link(frame, hop)?;
    if !A::IS_V4 {
        frame.adjust_sum(target.addresses.and(Delta::IPV6_HOP));
    }
    Some(())
}

/// The same for a packet with ports that is no error.
#[inline(always)]
pub fn plain<F: Frame, A: Family>(frame: &F, place: &Place, target: &Target<'_, A>, hop: Hop) -> Option<()> {
    let ports = frame.at::<Ports>(place.transport)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*ports).source = target.source_port.raw();
        (*ports).destination = target.destination_port.raw();
    }
    A::rewrite(frame, place.network, target.source, target.destination, target.addresses)?;
    link(frame, hop)?;
    frame.update_checksum(place, target.addresses, target.ports, A::IS_V4)
}

/// Writes the hardware addresses, where they are known.
#[inline(always)]
pub fn link<F: Frame>(frame: &F, hop: Hop) -> Option<()> {
    if hop.known {
        let ethernet = frame.at::<Ethernet>(0)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*ethernet).destination = hop.destination;
            (*ethernet).source = hop.source;
        }
    }
    Some(())
}

/// Rewrites an ICMP error: its own header, and the packet it quotes the other way around (RFC 5508, 4.2 and 4.3).
#[inline(never)]
fn error<F: Frame, A: Family>(frame: &F, packet: &Packet<A>, target: &Target<'_, A>, hop: Hop) -> Option<()> {
    let key = &packet.key;
    let quoted = A::requote(frame, packet.quoted(), target.destination, target.source, target.addresses)?;
    let ports = frame.at::<Ports>(packet.quoted_transport())?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*ports).source = target.destination_port.raw();
        (*ports).destination = target.source_port.raw();
    }
    let mut change = quoted.and(target.ports);
    // The quote may end before TCP's checksum.
    let at = packet.quoted_transport() + if packet.is_tcp() { 16 } else { 6 };
    if at + 2 <= packet.transport() + packet.transport_bytes as usize
        && let Some(checksum) = frame.at::<u16>(at)
    {
        // SAFETY: `at` checked the bounds.
        unsafe {
            let old = *checksum;
            if packet.is_tcp() || old != 0 {
                *checksum = target.addresses.and(target.ports).apply(old);
                change = change.and(Delta::of_word(old, *checksum));
            }
        }
    }
    // The sender's address stays where the client's is kept: it may be a router's. Where the source is translated
    // it is ours, so that nobody sees what lies behind.
    let sender = A::source(frame, packet.network())?;
    let source = if *target.source == key.source { &sender } else { target.source };
    let outer =
        Delta::of_address(sender, *source).and(Delta::of_address(key.destination, *target.destination));
    A::rewrite(frame, packet.network(), source, target.destination, outer)?;
    link(frame, hop)?;
    let header = frame.at::<icmp::Header>(packet.transport())?;
    // ICMPv6 has a pseudo header (RFC 4443, 2.3), ICMP none.
    let change = if A::IS_V4 { change } else { change.and(outer) };
    // SAFETY: `at` checked the bounds.
    unsafe { (*header).checksum = change.apply((*header).checksum) };
    if !A::IS_V4 {
        frame.adjust_sum(Delta::IPV6_HOP);
    }
    Some(())
}

/// A hardware address of a table as it is written: the compiler would put bytes together one by one.
#[inline(always)]
pub fn words(mac: &[u8; 6]) -> [u16; 3] {
    const _: () = assert!(offset_of!(Backend, mac) % 2 == 0 && offset_of!(Backend, source_mac) % 2 == 0);
    const _: () = assert!(offset_of!(Peer, mac) % 2 == 0 && offset_of!(Peer, source_mac) % 2 == 0);
    const _: () =
        assert!(offset_of!(Flow<V4>, client_mac) % 2 == 0 && offset_of!(Flow<V4>, node_mac) % 2 == 0);
    const _: () =
        assert!(offset_of!(Flow<V6>, client_mac) % 2 == 0 && offset_of!(Flow<V6>, node_mac) % 2 == 0);
    // SAFETY: the tables' structures are aligned to four bytes at least, and their hardware addresses lie at even offsets.
    unsafe { (&raw const *mac).cast::<[u16; 3]>().read() }
}
