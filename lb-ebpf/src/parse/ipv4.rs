//! IPv4 (RFC 791), with options.

use lb_common::{
    net::{ICMP, TCP, UDP, V4},
    outcome::Outcome,
};

use super::{LINK, icmp, transport};
use crate::{
    frame::Frame,
    packet::{FIRST, LATER, Link, Packet, WHOLE},
};

/// An IPv4 header without options; multi-byte fields in network order.
#[repr(C)]
pub struct Header {
    pub version_and_length: u8,
    pub service: u8,
    pub total_length: u16,
    pub identification: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

/// "Don't fragment".
pub const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
/// "More fragments".
const MORE: u16 = 0x2000_u16.to_be();
/// The fragment's offset.
pub const OFFSET: u16 = 0x1fff_u16.to_be();

/// Reads the header of a TCP or UDP packet without options that is no fragment; false if it is something else.
#[inline(always)]
pub fn plain<F: Frame>(frame: &F, packet: &mut Packet<V4>) -> bool {
    const BYTES: u16 = size_of::<Header>() as u16;
    let Some(header) = frame.at::<Header>(LINK) else {
        return false;
    };
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
    let (bytes, protocol) = (u16::from_be(header.total_length), header.protocol);
    if header.version_and_length != 0x45
        || header.fragment & (OFFSET | MORE) != 0
        || bytes < BYTES
        || protocol != TCP && protocol != UDP
    {
        return false;
    }
    packet.key.source = V4(header.source);
    packet.key.destination = V4(header.destination);
    packet.key.protocol = protocol;
    packet.bytes = bytes;
    packet.transport_bytes = bytes - BYTES;
    packet.hops = header.ttl;
    packet.service = header.service;
    true
}

/// Parses the network and transport headers.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, link: &Link, packet: &mut Packet<V4>) -> Result<(), Outcome> {
    let header = frame.at::<Header>(link.network).ok_or(Outcome::Malformed)?;
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
    let header_bytes = ((header.version_and_length & 0xf) as usize) * 4;
    let bytes = u16::from_be(header.total_length);
    if header.version_and_length >> 4 != 4 || header_bytes < size_of::<Header>() {
        return Err(Outcome::Malformed);
    }
    packet.key.source = V4(header.source);
    packet.key.destination = V4(header.destination);
    packet.hops = header.ttl;
    packet.service = header.service;
    packet.bytes = bytes;
    packet.identification = header.identification as u32;
    packet.form = match header.fragment {
        field if field & OFFSET != 0 => LATER,
        field if field & MORE != 0 => FIRST,
        _ => WHOLE,
    };
    let protocol = header.protocol;
    transport::check_length(frame, link.network, bytes as usize, header_bytes)?;
    packet.transport_bytes = bytes - header_bytes as u16;
    let at = link.network + header_bytes;
    if protocol == ICMP {
        return icmp::parse4(frame, link, at, packet);
    }
    transport::parse(frame, link, at, protocol, packet)
}
