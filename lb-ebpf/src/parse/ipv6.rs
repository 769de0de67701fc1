//! IPv6 (RFC 8200), with the extension headers that may precede TCP and UDP.

use lb_common::{
    net::{ICMP6, TCP, UDP, V6},
    outcome::Outcome,
};

use super::{LINK, icmp, transport};
use crate::{
    frame::Frame,
    packet::{FIRST, LATER, Link, Packet, WHOLE},
};

/// An IPv6 header; multi-byte fields in network order.
#[repr(C)]
pub struct Header {
    pub version_and_flow: u32,
    pub payload_length: u16,
    pub next: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// The fields that hop-by-hop, routing and destination options headers share (RFC 8200, 4.2 to 4.6).
#[repr(C)]
struct Extension {
    next: u8,
    /// In units of eight bytes, without the first eight.
    length: u8,
}

/// The fragment header (RFC 8200, 4.5); multi-byte fields in network order.
#[repr(C)]
pub struct Fragment {
    pub next: u8,
    pub reserved: u8,
    pub offset: u16,
    pub identification: u32,
}

/// The fragment's offset.
pub const OFFSET: u16 = 0xfff8_u16.to_be();
/// More fragments follow.
const MORE: u16 = 1_u16.to_be();

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
/// Next header of a fragment.
pub const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const NO_NEXT: u8 = 59;
const DESTINATION_OPTIONS: u8 = 60;

/// Extension headers followed; each occurs once, destination options at most twice (RFC 8200, 4.1).
const MAX_EXTENSIONS: usize = 5;
/// Bytes of extension headers followed.
const MAX_EXTENSION_BYTES: usize = 256;

/// Reads the header of a TCP or UDP packet without extension headers; false if it is something else.
#[inline(always)]
pub fn plain<F: Frame>(frame: &F, packet: &mut Packet<V6>) -> bool {
    const BYTES: u16 = size_of::<Header>() as u16;
    let Some(header) = frame.at::<Header>(LINK) else {
        return false;
    };
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
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
    packet.hops = header.hop_limit;
    packet.service = (first >> 20) as u8;
    true
}

/// Parses the network and transport headers.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, link: &Link, packet: &mut Packet<V6>) -> Result<(), Outcome> {
    let header = frame.at::<Header>(link.network).ok_or(Outcome::Malformed)?;
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
    if header.version_and_flow & 0xf000_0000_u32.to_be() != 0x6000_0000_u32.to_be() {
        return Err(Outcome::Malformed);
    }
    let payload = u16::from_be(header.payload_length);
    // Word by word: a copy between memory that may overlap would be a call.
    for word in 0..4 {
        packet.key.source.0[word] = header.source[word];
        packet.key.destination.0[word] = header.destination[word];
    }
    packet.hops = header.hop_limit;
    packet.service = (u32::from_be(header.version_and_flow) >> 20) as u8;
    packet.form = WHOLE;
    let (protocol, extensions) =
        skip_extensions(frame, link.network + size_of::<Header>(), header.next, packet)?;
    let bytes = payload as usize + size_of::<Header>();
    transport::check_length(frame, link.network, bytes, size_of::<Header>() + extensions)?;
    // A payload within forty bytes of the limit saturates the byte counter, nothing else.
    packet.bytes = if bytes > u16::MAX as usize { u16::MAX } else { bytes as u16 };
    packet.transport_bytes = payload - extensions as u16;
    let at = link.network + size_of::<Header>() + extensions;
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
                let extension = frame.at::<Extension>(start + skipped).ok_or(Outcome::Malformed)?;
                // SAFETY: `at` checked the bounds.
                let extension = unsafe { &*extension };
                next = extension.next;
                skipped += (extension.length as usize + 1) * 8;
                if skipped > MAX_EXTENSION_BYTES {
                    return Err(Outcome::ExtensionHeaders);
                }
            }
            FRAGMENT => {
                let fragment = frame.at::<Fragment>(start + skipped).ok_or(Outcome::Malformed)?;
                // SAFETY: `at` checked the bounds.
                let fragment = unsafe { &*fragment };
                next = fragment.next;
                skipped += size_of::<Fragment>();
                packet.identification = fragment.identification;
                if fragment.offset & OFFSET != 0 {
                    packet.form = LATER;
                    // What follows is data.
                    return match next {
                        TCP | UDP => Ok((next, skipped)),
                        _ => Err(Outcome::Fragment),
                    };
                }
                // One that is the first and the last is whole (RFC 6946).
                if fragment.offset & MORE != 0 {
                    packet.form = FIRST;
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
