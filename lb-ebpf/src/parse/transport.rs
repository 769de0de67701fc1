//! TCP (RFC 9293) and UDP (RFC 768): ports, flags, plausibility.

use lb_common::{
    conntrack::line::CONNECTION,
    net::{Address, Be16, TCP, UDP},
    outcome::Outcome,
};

use crate::{
    io::{
        frame::Frame,
        packet::{FIRST, LATER, Link, Packet},
    },
    wire::transport::{Tcp, Udp},
};

/// Whether the packet's own length holds its headers, and the frame holds the packet.
#[inline(always)]
pub fn check_length<F: Frame>(
    frame: &F,
    network: usize,
    bytes: usize,
    headers: usize,
) -> Result<(), Outcome> {
    if bytes < headers {
        return Err(Outcome::Malformed);
    }
    // Nearly always the bytes lie in one piece, which needs no helper to be seen.
    if network + bytes > frame.data_end() - frame.data() && network + bytes > frame.length() {
        return Err(Outcome::Malformed);
    }
    Ok(())
}

/// Reads the header at `at` of a packet that is no fragment, and completes its five-tuple; false if it contradicts itself.
#[inline(always)]
pub fn simple<F: Frame, A>(frame: &F, at: usize, packet: &mut Packet<A>) -> bool {
    let bytes = packet.transport_bytes;
    let read = if packet.is_tcp() { tcp(frame, at, bytes, packet) } else { udp(frame, at, bytes) };
    let Ok((source_port, destination_port, flags, header)) = read else {
        return false;
    };
    packet.key.source_port = source_port;
    packet.key.destination_port = destination_port;
    packet.key.kind = CONNECTION;
    packet.key.generation = 0;
    packet.tcp_flags = flags;
    packet.header_bytes = header;
    true
}

/// Parses the transport header at `at` and completes the packet, whose addresses, protocol and lengths the
/// network header has filled in.
#[inline(always)]
pub fn parse<F: Frame, A: Address>(
    frame: &F,
    link: &Link,
    at: usize,
    protocol: u8,
    packet: &mut Packet<A>,
) -> Result<(), Outcome> {
    const NONE: Be16 = Be16::from_raw(0);
    // A first fragment's UDP length is that of the whole datagram.
    let room = if packet.kind == FIRST { u16::MAX } else { packet.transport_bytes };
    let (source_port, destination_port, flags, header) = match protocol {
        TCP | UDP if packet.kind == LATER => (NONE, NONE, 0, 0),
        TCP => tcp(frame, at, room, packet)?,
        UDP => udp(frame, at, room)?,
        _ => return Err(Outcome::OtherProtocol),
    };
    packet.key.source_port = source_port;
    packet.key.destination_port = destination_port;
    packet.key.protocol = protocol;
    packet.key.kind = CONNECTION;
    packet.key.generation = 0;
    packet.tcp_flags = flags;
    packet.header_bytes = header;
    place(link, at, packet);
    Ok(())
}

/// Notes where the headers are.
#[inline(always)]
pub fn place<A>(link: &Link, at: usize, packet: &mut Packet<A>) {
    packet.tags = link.tags;
    packet.source_mac = link.source;
    packet.network_at = link.network as u16;
    packet.transport_at = at as u16;
}

#[inline(always)]
fn tcp<F: Frame, A>(
    frame: &F,
    at: usize,
    bytes: u16,
    packet: &mut Packet<A>,
) -> Result<(Be16, Be16, u8, u8), Outcome> {
    let header = frame.read::<Tcp>(at).ok_or(Outcome::Malformed)?;
    let length = ((header.offset >> 4) as u16) * 4;
    if length < size_of::<Tcp>() as u16 || length > bytes {
        return Err(Outcome::Malformed);
    }
    packet.sequence = u32::from_be(header.sequence);
    packet.acknowledgment = u32::from_be(header.acknowledgment);
    Ok((Be16::from_raw(header.source), Be16::from_raw(header.destination), header.flags, length as u8))
}

#[inline(always)]
fn udp<F: Frame>(frame: &F, at: usize, bytes: u16) -> Result<(Be16, Be16, u8, u8), Outcome> {
    let header = frame.read::<Udp>(at).ok_or(Outcome::Malformed)?;
    let length = u16::from_be(header.length);
    if length < size_of::<Udp>() as u16 || length > bytes {
        return Err(Outcome::Malformed);
    }
    Ok((Be16::from_raw(header.source), Be16::from_raw(header.destination), 0, size_of::<Udp>() as u8))
}
