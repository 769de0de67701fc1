//! IPv4 (RFC 791), with options.

use lb_common::{
    net::{ICMP, TCP, UDP, V4},
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
        ipv4::{Ipv4, MORE, OFFSET, PLAIN},
    },
};

/// Reads the header of a TCP or UDP packet without options that is no fragment; false if it is something else.
#[inline(always)]
pub fn simple<F: Frame>(frame: &F, packet: &mut Packet<V4>) -> bool {
    const BYTES: u16 = size_of::<Ipv4>() as u16;
    let Some(header) = frame.read::<Ipv4>(LINK) else {
        return false;
    };
    let (bytes, protocol) = (u16::from_be(header.total_length), header.protocol);
    if header.version_and_length != PLAIN
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
    packet.ttl = header.ttl;
    packet.tos = header.tos;
    true
}

/// Parses the network and transport headers.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, link: &Link, packet: &mut Packet<V4>) -> Result<(), Outcome> {
    let header = frame.read::<Ipv4>(link.network).ok_or(Outcome::Malformed)?;
    let header_bytes = ((header.version_and_length & 0xf) as usize) * 4;
    let bytes = u16::from_be(header.total_length);
    if header.version_and_length >> 4 != 4 || header_bytes < size_of::<Ipv4>() {
        return Err(Outcome::Malformed);
    }
    packet.key.source = V4(header.source);
    packet.key.destination = V4(header.destination);
    packet.ttl = header.ttl;
    packet.tos = header.tos;
    packet.bytes = bytes;
    packet.identification = header.identification as u32;
    packet.kind = match header.fragment {
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
