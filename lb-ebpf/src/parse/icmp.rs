//! ICMP errors (RFC 792, RFC 4443) that quote a TCP or UDP packet. Whether extensions follow the quote (RFC 4884) does
//! not matter: nothing here or later changes its length.

use lb_common::{
    conntrack::line::CONNECTION,
    net::{Address, Be16, TCP, UDP, V4, V6},
    outcome::Outcome,
};

use super::transport;
use crate::{
    io::{
        frame::Frame,
        packet::{ERROR, Link, Packet, WHOLE},
    },
    wire::{
        icmp::{INFORMATIONAL, Icmp, PARAMETER_PROBLEM, QuotedPorts, TIME_EXCEEDED, UNREACHABLE},
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
    },
};

/// Parses an ICMP message in an IPv4 packet.
#[inline(always)]
pub fn parse4<F: Frame>(frame: &F, link: &Link, at: usize, packet: &mut Packet<V4>) -> Result<(), Outcome> {
    if packet.kind != WHOLE {
        return Err(Outcome::OtherProtocol);
    }
    match kind(frame, at)? {
        UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM => {}
        _ => return Err(Outcome::OtherProtocol),
    }
    let quoted_at = at + size_of::<Icmp>();
    let quoted = frame.read::<Ipv4>(quoted_at).ok_or(Outcome::Malformed)?;
    let header_bytes = ((quoted.version_and_length & 0xf) as usize) * 4;
    if quoted.version_and_length >> 4 != 4 || header_bytes < size_of::<Ipv4>() {
        return Err(Outcome::Malformed);
    }
    // Only a first fragment says whose it is.
    if quoted.fragment & ipv4::OFFSET != 0 {
        return Err(Outcome::Fragment);
    }
    // An error goes to who sent what it quotes.
    if packet.key.destination.0 != quoted.source {
        return Err(Outcome::OtherProtocol);
    }
    packet.key.source = V4(quoted.destination);
    packet.key.protocol = quoted.protocol;
    finish(frame, link, (at, quoted_at, quoted_at + header_bytes), packet)
}

/// Parses an ICMPv6 message.
#[inline(always)]
pub fn parse6<F: Frame>(frame: &F, link: &Link, at: usize, packet: &mut Packet<V6>) -> Result<(), Outcome> {
    if packet.kind != WHOLE || kind(frame, at)? >= INFORMATIONAL {
        return Err(Outcome::OtherProtocol);
    }
    let quoted_at = at + size_of::<Icmp>();
    let quoted = frame.read::<Ipv6>(quoted_at).ok_or(Outcome::Malformed)?;
    // Word by word: a copy between memory that may overlap would be a call.
    for word in 0..4 {
        if packet.key.destination.0[word] != quoted.source[word] {
            return Err(Outcome::OtherProtocol);
        }
        packet.key.source.0[word] = quoted.destination[word];
    }
    let mut next = quoted.next;
    let mut transport_at = quoted_at + size_of::<Ipv6>();
    // Of the extension headers only the one that fragmenting puts there.
    if next == ipv6::FRAGMENT {
        let fragment = frame.read::<ipv6::Fragment>(transport_at).ok_or(Outcome::Malformed)?;
        if fragment.offset & ipv6::OFFSET != 0 {
            return Err(Outcome::Fragment);
        }
        next = fragment.next;
        transport_at += size_of::<ipv6::Fragment>();
    }
    packet.key.protocol = next;
    finish(frame, link, (at, quoted_at, transport_at), packet)
}

#[inline(always)]
fn kind<F: Frame>(frame: &F, at: usize) -> Result<u8, Outcome> {
    frame.read::<Icmp>(at).map(|header| header.kind).ok_or(Outcome::Malformed)
}

/// Completes the packet: the quoted ports turned around, and where everything is.
#[inline(always)]
fn finish<F: Frame, A: Address>(
    frame: &F,
    link: &Link,
    (at, quoted_at, transport_at): (usize, usize, usize),
    packet: &mut Packet<A>,
) -> Result<(), Outcome> {
    if packet.key.protocol != TCP && packet.key.protocol != UDP {
        return Err(Outcome::OtherProtocol);
    }
    let ports = frame.read::<QuotedPorts>(transport_at).ok_or(Outcome::Malformed)?;
    if transport_at + size_of::<QuotedPorts>() > at + packet.transport_bytes as usize {
        return Err(Outcome::Malformed);
    }
    packet.key.kind = CONNECTION;
    packet.key.generation = 0;
    packet.key.source_port = Be16::from_raw(ports.destination);
    packet.key.destination_port = Be16::from_raw(ports.source);
    packet.tcp_flags = 0;
    packet.kind = ERROR;
    packet.quoted_at = quoted_at as u16;
    packet.quoted_transport_at = transport_at as u16;
    transport::place(link, at, packet);
    Ok(())
}
