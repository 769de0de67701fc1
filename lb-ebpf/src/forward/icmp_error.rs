//! ICMP errors of our own: a packet too long for the tunnel is answered with the length that fits (RFC 1191, RFC 8201),
//! in place of the packet.

use core::ptr::null_mut;

use aya_ebpf::helpers::generated::bpf_csum_diff;
use lb_common::{
    abi::size,
    checksum::fold,
    net::{Address, Be16},
};

use super::headers::{Back, turn_link};
use crate::{
    io::{
        clock,
        frame::Frame,
        maps::{self, ERROR_BUDGETS},
        packet::Packet,
    },
    wire::{ethernet::Ethernet, icmp::Icmp},
};

/// Bytes of the packet that are quoted: more than any receiver needs, and with the ICMP header the most that the
/// kernel sums up at once before 6.15. RFC 1812 allows 576 bytes in all, RFC 4443 1,280.
const QUOTE: u16 = 512 - size_of::<Icmp>() as u16;
const LINK: usize = size_of::<Ethernet>();
/// Header of an ICMP message and quote.
const MESSAGE: u16 = size_of::<Icmp>() as u16 + QUOTE;

/// Whether an address gets one more error in this second; of IPv6 those of a network share them. A function of its own, for the
/// verifier's sake.
#[inline(never)]
pub fn may_answer<A: Address>(client: &A) -> bool {
    let Some(config) = maps::config() else {
        return false;
    };
    let [network, rest, ..] = client.to_wide();
    let whose = A::from_wide([network, rest, 0, 0]);
    let hash = config.hash_keys.endpoint(&whose, Be16::from_raw(0), 0) as u32;
    let Some(budget) = ERROR_BUDGETS.get_ptr_mut(hash % size::ERROR_BUDGETS as u32) else {
        return false;
    };
    // SAFETY: an array's entry is valid while the program runs; what two CPUs count at once may be lost.
    unsafe { (*budget).spend(clock::now(), config.jiffies_per_second) }
}

/// Turns the frame, whose link header is not tagged, into an ICMP error about it: for its sender, from where it was going
/// to. `None` if it cannot be done.
#[inline(never)]
pub fn too_big<F: Frame, A: Back>(frame: &mut F, packet: &Packet<A>, mtu: u32) -> Option<()> {
    let Ethernet { destination, source, kind } = *frame.read::<Ethernet>(0)?;
    if !frame.cut(LINK as u32 + QUOTE as u32) || !frame.put_before((A::HEADER + size_of::<Icmp>()) as u32) {
        return None;
    }
    *frame.at::<Ethernet>(0)? = Ethernet { destination, source, kind };
    turn_link(frame)?;
    let (protocol, (kind, code)) = A::TOO_BIG;
    let pseudo = A::write(frame, packet, protocol, MESSAGE)?;
    let header = frame.at::<Icmp>(LINK + A::HEADER)?;
    header.kind = kind;
    header.code = code;
    header.checksum = 0;
    // The upper half is unused by IPv4, whose packets are not as long (RFC 1191).
    header.rest = mtu.max(A::LEAST).to_be();
    let message = frame.at::<[u8; MESSAGE as usize]>(LINK + A::HEADER)?;
    // SAFETY: the helper reads no more than it is told, which is all of the message.
    let sum = unsafe { bpf_csum_diff(null_mut(), 0, message.as_mut_ptr().cast(), MESSAGE as u32, pseudo) };
    let sum = (sum as u32 & 0xffff) + (sum as u32 >> 16);
    frame.at::<Icmp>(LINK + A::HEADER)?.checksum = !fold(sum);
    Some(())
}
