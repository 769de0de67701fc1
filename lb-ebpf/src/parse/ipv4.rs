//! IPv4 (RFC 791), with options.

use lb_common::{net::V4, outcome::Outcome};

use super::transport;
use crate::{
    frame::Frame,
    packet::{Link, Packet},
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

/// "More fragments" and the fragment's offset.
const FRAGMENT: u16 = 0x3fff_u16.to_be();

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
    if header.fragment & FRAGMENT != 0 {
        return Err(Outcome::Fragment);
    }
    packet.key.source = V4(header.source);
    packet.key.destination = V4(header.destination);
    packet.hops = header.ttl;
    packet.bytes = bytes;
    let protocol = header.protocol;
    transport::check_length(frame, link.network, bytes as usize, header_bytes)?;
    packet.transport_bytes = bytes - header_bytes as u16;
    transport::parse(frame, link, link.network + header_bytes, protocol, packet)
}
