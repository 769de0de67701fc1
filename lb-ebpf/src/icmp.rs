//! ICMP errors of our own: a packet too long for the tunnel is answered with the length that fits (RFC 1191, RFC 8201),
//! in place of the packet.

use core::ptr::null_mut;

use aya_ebpf::helpers::generated::bpf_csum_diff;
use lb_common::checksum::fold;

use crate::{
    frame::Frame,
    packet::Packet,
    parse::{Ethernet, icmp},
    reply::{Back, turn_link},
};

/// Bytes of the packet that are quoted: more than any receiver needs, and with the ICMP header the most that the
/// kernel sums up at once before 6.15. RFC 1812 allows 576 bytes in all, RFC 4443 1,280.
const QUOTE: u16 = 512 - size_of::<icmp::Header>() as u16;
const LINK: usize = size_of::<Ethernet>();
/// Header of an ICMP message and quote.
const MESSAGE: u16 = size_of::<icmp::Header>() as u16 + QUOTE;

/// Turns the frame, whose link header is not tagged, into an ICMP error about it: for its sender, from where it was going
/// to. `None` if it cannot be done. Packet pointers are void afterwards.
#[inline(never)]
pub fn too_big<F: Frame, A: Back>(frame: &F, packet: &Packet<A>, mtu: u32) -> Option<()> {
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
        (*ethernet).destination = destination;
        (*ethernet).source = source;
        (*ethernet).kind = kind;
    }
    turn_link(frame)?;
    let (protocol, (kind, code)) = A::TOO_BIG;
    let pseudo = A::write(frame, packet, protocol, MESSAGE)?;
    let header = frame.at::<icmp::Header>(LINK + A::HEADER as usize)?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*header).kind = kind;
        (*header).code = code;
        (*header).checksum = 0;
        // The upper half is unused by IPv4's, whose packets are not as long (RFC 1191).
        (*header).rest = mtu.to_be();
    }
    let message = frame.at::<[u8; MESSAGE as usize]>(LINK + A::HEADER as usize)?;
    // SAFETY: `at` checked the bounds; the helper reads no more than it is told.
    let sum = unsafe { bpf_csum_diff(null_mut(), 0, message.cast(), MESSAGE as u32, pseudo) };
    let header = message.cast::<icmp::Header>();
    let sum = (sum as u32 & 0xffff) + (sum as u32 >> 16);
    // SAFETY: as above.
    unsafe { (*header).checksum = !fold(sum) };
    Some(())
}
