//! IPv6 (RFC 8200), with the extension headers that may precede TCP and UDP.

use lb_common::{
    net::{ICMP6, TCP, UDP, V6},
    outcome::Outcome,
};

use super::{icmp, transport};
use crate::{
    io::{
        frame::Frame,
        packet::{FIRST, LATER, Link, Packet, WHOLE},
    },
    wire::{
        ethernet::LINK,
        ipv6::{
            AUTHENTICATION, DESTINATION_OPTIONS, Extension, FRAGMENT, Fragment, HOP_BY_HOP, Ipv6, MORE,
            NO_NEXT, OFFSET, ROUTING,
        },
    },
};

/// Extension headers followed; each occurs once, destination options at most twice (RFC 8200, 4.1).
const MAX_EXTENSIONS: usize = 5;
/// Bytes of extension headers followed.
const MAX_EXTENSION_BYTES: usize = 256;

/// Reads the header of a TCP or UDP packet without extension headers; false if it is something else.
#[inline(always)]
pub fn simple<F: Frame>(frame: &F, packet: &mut Packet<V6>) -> bool {
    const BYTES: u16 = size_of::<Ipv6>() as u16;
    let Some(header) = frame.read::<Ipv6>(LINK) else {
        return false;
    };
    let (payload, protocol) = (u16::from_be(header.payload_length), header.next);
    let first = u32::from_be(header.version_and_flow);
    if first >> 28 != 6 || payload > u16::MAX - BYTES || protocol != TCP && protocol != UDP {
        return false;
    }
    for word in 0..4 {
        packet.key.source.0[word] = header.source[word];
        packet.key.destination.0[word] = header.destination[word];
    }
    packet.key.protocol = protocol;
    packet.bytes = payload + BYTES;
    packet.transport_bytes = payload;
    packet.ttl = header.hop_limit;
    packet.tos = (first >> 20) as u8;
    true
}

/// Parses the network and transport headers.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, link: &Link, packet: &mut Packet<V6>) -> Result<(), Outcome> {
    let header = frame.read::<Ipv6>(link.network).ok_or(Outcome::Malformed)?;
    if header.version_and_flow & 0xf000_0000_u32.to_be() != 0x6000_0000_u32.to_be() {
        return Err(Outcome::Malformed);
    }
    let payload = u16::from_be(header.payload_length);
    // Word by word: a copy between memory that may overlap would be a call.
    for word in 0..4 {
        packet.key.source.0[word] = header.source[word];
        packet.key.destination.0[word] = header.destination[word];
    }
    packet.ttl = header.hop_limit;
    packet.tos = (u32::from_be(header.version_and_flow) >> 20) as u8;
    packet.kind = WHOLE;
    let (protocol, extensions) =
        skip_extensions(frame, link.network + size_of::<Ipv6>(), header.next, packet)?;
    let bytes = payload as usize + size_of::<Ipv6>();
    transport::check_length(frame, link.network, bytes, size_of::<Ipv6>() + extensions)?;
    // A payload within forty bytes of the limit saturates the byte counter, nothing else.
    packet.bytes = if bytes > u16::MAX as usize { u16::MAX } else { bytes as u16 };
    packet.transport_bytes = payload - extensions as u16;
    let at = link.network + size_of::<Ipv6>() + extensions;
    if protocol == ICMP6 {
        return icmp::parse6(frame, link, at, packet);
    }
    transport::parse(frame, link, at, protocol, packet)
}

/// The protocol after the extension headers, and their length in bytes. Says in the packet whether it is a fragment.
#[inline(always)]
fn skip_extensions<F: Frame>(
    frame: &F,
    start: usize,
    first: u8,
    packet: &mut Packet<V6>,
) -> Result<(u8, usize), Outcome> {
    let (mut next, mut skipped) = (first, 0);
    for _ in 0..MAX_EXTENSIONS {
        match next {
            TCP | UDP | ICMP6 => return Ok((next, skipped)),
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let extension = frame.read::<Extension>(start + skipped).ok_or(Outcome::Malformed)?;
                next = extension.next;
                skipped += (extension.length as usize + 1) * 8;
                if skipped > MAX_EXTENSION_BYTES {
                    return Err(Outcome::ExtensionHeaders);
                }
            }
            FRAGMENT => {
                let fragment = frame.read::<Fragment>(start + skipped).ok_or(Outcome::Malformed)?;
                next = fragment.next;
                skipped += size_of::<Fragment>();
                packet.identification = fragment.identification;
                if fragment.offset & OFFSET != 0 {
                    packet.kind = LATER;
                    // What follows is data.
                    return match next {
                        TCP | UDP => Ok((next, skipped)),
                        _ => Err(Outcome::Fragment),
                    };
                }
                // One that is the first and the last is whole (RFC 6946).
                if fragment.offset & MORE != 0 {
                    packet.kind = FIRST;
                }
                if skipped > MAX_EXTENSION_BYTES {
                    return Err(Outcome::ExtensionHeaders);
                }
            }
            AUTHENTICATION | NO_NEXT => return Err(Outcome::ExtensionHeaders),
            _ => return Err(Outcome::OtherProtocol),
        }
    }
    match next {
        TCP | UDP | ICMP6 => Ok((next, skipped)),
        _ => Err(Outcome::ExtensionHeaders),
    }
}
