//! Resets of our own: what a client sends to a task that is gone is answered as the host of a task that was stopped
//! would (RFC 9293, 3.10.7.1), in place of the packet.

use lb_common::{
    checksum::fold,
    conntrack::tcp::{ACK, RST},
    net::TCP,
};

use super::headers::{Back, turn_link};
use crate::{
    io::{frame::Frame, packet::Packet},
    wire::{ethernet::Ethernet, transport::Tcp},
};

const LINK: usize = size_of::<Ethernet>();
/// Bytes of a TCP header without options.
const HEADER: u16 = size_of::<Tcp>() as u16;
/// The header's length in its own unit, four bytes, in the upper half of a byte.
const OFFSET: u8 = (HEADER as u8 / 4) << 4;

/// Turns the frame, whose link header is not tagged, into a reset for its sender. `None` if it cannot be done.
#[inline(never)]
pub fn answer<F: Frame, A: Back>(frame: &mut F, packet: &Packet<A>) -> Option<()> {
    if !frame.cut(LINK as u32 + A::HEADER as u32 + HEADER as u32) {
        return None;
    }
    turn_link(frame)?;
    let pseudo = A::write(frame, packet, TCP, HEADER)?;
    // The number is the one that the receiver takes: what it acknowledged.
    let (sequence, acknowledgment, flags) = if packet.tcp_flags & ACK != 0 {
        (packet.acknowledgment, 0, RST)
    } else {
        (0, packet.segment().end(), RST | ACK)
    };
    let (sequence, acknowledgment) = (sequence.to_be(), acknowledgment.to_be());
    let key = &packet.key;
    let offset_and_flags = u16::from_ne_bytes([OFFSET, flags]);
    let halves = |word: u32| (word & 0xffff) + (word >> 16);
    let sum = pseudo
        + key.source_port.raw() as u32
        + key.destination_port.raw() as u32
        + halves(sequence)
        + halves(acknowledgment)
        + offset_and_flags as u32;
    *frame.at::<Tcp>(LINK + A::HEADER)? = Tcp {
        source: key.destination_port.raw(),
        destination: key.source_port.raw(),
        sequence,
        acknowledgment,
        offset: OFFSET,
        flags,
        window: 0,
        checksum: !fold(sum),
        urgent: 0,
    };
    Some(())
}
