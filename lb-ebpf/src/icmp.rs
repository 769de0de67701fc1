//! ICMP errors of our own: a packet too long for the tunnel is answered with the length that fits (RFC 1191, RFC 8201),
//! in place of the packet.

use aya_ebpf::helpers::generated::bpf_csum_diff;
use core::ptr::null_mut;
use lb_common::{
    checksum::fold,
    net::{Address, ICMP, ICMP6, V4, V6},
};

use crate::{
    frame::Frame,
    packet::Packet,
    parse::{Ethernet, icmp, ipv4, ipv6},
};

/// Bytes of the packet that are quoted: more than any receiver needs, and with the ICMP header the most that the
/// kernel sums up at once before 6.15. RFC 1812 allows 576 bytes in all, RFC 4443 1,280.
const QUOTE: u16 = 512 - size_of::<icmp::Header>() as u16;
const HOPS: u8 = 64;
const LINK: usize = size_of::<Ethernet>();
/// Header of an ICMP message and quote.
const MESSAGE: u16 = size_of::<icmp::Header>() as u16 + QUOTE;

/// The families' ways to say "too big".
pub trait TooBig: Address {
    /// Bytes of its header.
    const HEADER: u16;

    /// Writes the network header of the answer, and what follows it up to the checksum; the sum of its pseudo header.
    fn write<F: Frame>(frame: &F, packet: &Packet<Self>, mtu: u32) -> Option<u32>;
}

/// Turns the frame, whose link header is not tagged, into an ICMP error about it: for its sender, from where it was going
/// to. `None` if it cannot be done. Packet pointers are void afterwards.
#[inline(never)]
pub fn too_big<F: Frame, A: TooBig>(frame: &F, packet: &Packet<A>, mtu: u32) -> Option<()> {
    let ethernet = frame.at::<Ethernet>(0)?;
    // SAFETY: `at` checked the bounds.
    let (destination, source, kind) =
        unsafe { ((*ethernet).destination, (*ethernet).source, (*ethernet).kind) };
    if !frame.cut(LINK as u32 + QUOTE as u32)
        || !frame.put_before((A::HEADER as usize + size_of::<icmp::Header>()) as u32)
    {
        return None;
    }
    let ethernet = frame.at::<Ethernet>(0)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*ethernet).destination = source;
        (*ethernet).source = destination;
        (*ethernet).kind = kind;
    }
    let pseudo = A::write(frame, packet, mtu)?;
    let message = frame.at::<[u8; MESSAGE as usize]>(LINK + A::HEADER as usize)?;
    // SAFETY: `at` checked the bounds; the helper reads no more than it is told.
    let sum = unsafe { bpf_csum_diff(null_mut(), 0, message.cast(), MESSAGE as u32, pseudo) };
    let header = message.cast::<icmp::Header>();
    let sum = (sum as u32 & 0xffff) + (sum as u32 >> 16);
    // SAFETY: as above.
    unsafe { (*header).checksum = !fold(sum) };
    Some(())
}

impl TooBig for V4 {
    const HEADER: u16 = size_of::<ipv4::Header>() as u16;

    #[inline(always)]
    fn write<F: Frame>(frame: &F, packet: &Packet<Self>, mtu: u32) -> Option<u32> {
        let header = frame.at::<ipv4::Header>(LINK)?;
        let (source, destination) = (packet.key.destination, packet.key.source);
        let total = (Self::HEADER + MESSAGE).to_be();
        let sum = source.sum()
            + destination.sum()
            + u16::from_ne_bytes([0x45, 0]) as u32
            + total as u32
            + u16::from_ne_bytes([HOPS, ICMP]) as u32;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*header).version_and_length = 0x45;
            (*header).service = 0;
            (*header).total_length = total;
            (*header).identification = 0;
            (*header).fragment = 0;
            (*header).ttl = HOPS;
            (*header).protocol = ICMP;
            (*header).checksum = !fold(sum);
            (*header).source = source.0;
            (*header).destination = destination.0;
        }
        message(frame, Self::HEADER, (icmp::UNREACHABLE, icmp::FRAGMENTATION_NEEDED), mtu & 0xffff)?;
        Some(0)
    }
}

impl TooBig for V6 {
    const HEADER: u16 = size_of::<ipv6::Header>() as u16;

    #[inline(always)]
    fn write<F: Frame>(frame: &F, packet: &Packet<Self>, mtu: u32) -> Option<u32> {
        let header = frame.at::<ipv6::Header>(LINK)?;
        let key = &packet.key;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*header).version_and_flow = 0x6000_0000_u32.to_be();
            (*header).payload_length = MESSAGE.to_be();
            (*header).next = ICMP6;
            (*header).hop_limit = HOPS;
            for word in 0..4 {
                (*header).source[word] = key.destination.0[word];
                (*header).destination[word] = key.source.0[word];
            }
        }
        message(frame, Self::HEADER, (icmp::PACKET_TOO_BIG, 0), mtu)?;
        Some(
            key.source.sum() + key.destination.sum() + MESSAGE.to_be() as u32 + (ICMP6 as u16).to_be() as u32,
        )
    }
}

#[inline(always)]
fn message<F: Frame>(frame: &F, after: u16, (kind, code): (u8, u8), mtu: u32) -> Option<()> {
    let header = frame.at::<icmp::Header>(LINK + after as usize)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*header).kind = kind;
        (*header).code = code;
        (*header).checksum = 0;
        (*header).rest = mtu.to_be();
    }
    Some(())
}
