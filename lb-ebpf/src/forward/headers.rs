//! Packets of our own, sent back in place of one that came: the link and network headers.

use lb_common::{
    checksum::fold,
    net::{Address as _, ICMP, ICMP6, V4, V6},
};

use super::fragmentation::Cut;
use crate::{
    conntrack::tracked::Tracked,
    io::{family::Family as _, frame::Frame, packet::Packet},
    wire::{
        ethernet::Ethernet,
        icmp,
        ipv4::{Ipv4, PLAIN},
        ipv6::{self, Ipv6},
    },
};

const TTL: u8 = 64;
const LINK: usize = size_of::<Ethernet>();

/// The families' headers of a packet that goes back to where one came from, or on in fragments.
pub trait Back: Tracked + Cut {
    /// Its ICMP: the protocol's number, and type and code of "too big".
    const TOO_BIG: (u8, (u8, u8));
    /// What every network of the family lets pass, in bytes: a receiver does not believe that less would.
    const LEAST: u32;

    /// Writes the network header, for so many bytes of a protocol after it; the sum of the pseudo header.
    fn write<F: Frame>(frame: &mut F, packet: &Packet<Self>, protocol: u8, bytes: u16) -> Option<u32>;
}

/// Turns the link header, which carries no tag, around.
#[inline(always)]
pub fn turn_link<F: Frame>(frame: &mut F) -> Option<()> {
    let ethernet = frame.at::<Ethernet>(0)?;
    let (destination, source) = (ethernet.destination, ethernet.source);
    ethernet.destination = source;
    ethernet.source = destination;
    Some(())
}

/// The sum of the pseudo header's protocol and length.
#[inline(always)]
fn pseudo(protocol: u8, bytes: u16) -> u32 {
    (protocol as u16).to_be() as u32 + bytes.to_be() as u32
}

impl Back for V4 {
    const TOO_BIG: (u8, (u8, u8)) = (ICMP, (icmp::UNREACHABLE, icmp::FRAGMENTATION_NEEDED));
    // RFC 791, 3.2: the longest header and eight bytes.
    const LEAST: u32 = 68;

    #[inline(always)]
    fn write<F: Frame>(frame: &mut F, packet: &Packet<Self>, protocol: u8, bytes: u16) -> Option<u32> {
        let (source, destination) = (packet.key.destination, packet.key.source);
        let total = (Self::HEADER as u16 + bytes).to_be();
        let addresses = source.sum() + destination.sum();
        let sum = addresses
            + u16::from_ne_bytes([PLAIN, 0]) as u32
            + total as u32
            + u16::from_ne_bytes([TTL, protocol]) as u32;
        let header = frame.at::<Ipv4>(LINK)?;
        header.version_and_length = PLAIN;
        header.tos = 0;
        header.total_length = total;
        header.identification = 0;
        header.fragment = 0;
        header.ttl = TTL;
        header.protocol = protocol;
        header.checksum = !fold(sum);
        header.source = source.0;
        header.destination = destination.0;
        // ICMP has no pseudo header (RFC 792).
        Some(if protocol == ICMP { 0 } else { addresses + pseudo(protocol, bytes) })
    }
}

impl Back for V6 {
    const TOO_BIG: (u8, (u8, u8)) = (ICMP6, (icmp::PACKET_TOO_BIG, 0));
    // An error that says less must be discarded (RFC 8201, 4): its sender makes no packet shorter, and it is cut.
    const LEAST: u32 = ipv6::LEAST_MTU;

    #[inline(always)]
    fn write<F: Frame>(frame: &mut F, packet: &Packet<Self>, protocol: u8, bytes: u16) -> Option<u32> {
        let key = &packet.key;
        let header = frame.at::<Ipv6>(LINK)?;
        header.version_and_flow = 0x6000_0000_u32.to_be();
        header.payload_length = bytes.to_be();
        header.next = protocol;
        header.hop_limit = TTL;
        for word in 0..4 {
            header.source[word] = key.destination.0[word];
            header.destination[word] = key.source.0[word];
        }
        Some(key.source.sum() + key.destination.sum() + pseudo(protocol, bytes))
    }
}
