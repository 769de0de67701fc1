//! The maximum segment size of connections that go through the tunnel (RFC 9293, 3.7.1): lowered in SYN and SYN-ACK to
//! what fits, so that no packet of theirs is too long.

use crate::io::{frame::Frame, packet::Packet};

const END: u8 = 0;
const NOTHING: u8 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;
/// Bytes of a TCP header without options.
const HEADER: usize = 20;
/// Options looked at: those that come before the one that is sought are few.
const OPTIONS: usize = 8;

#[repr(C)]
struct Kind {
    kind: u8,
    length: u8,
}

/// Lowers the maximum segment size in the packet, if it has one, to what leaves `room` bytes for the whole packet.
/// `finished` tells whether its checksum is a whole one.
#[inline(never)]
pub fn clamp<F: Frame, A>(frame: &mut F, packet: &Packet<A>, room: u32, finished: bool) -> Option<()> {
    // A header without options or extension headers (RFC 6691): 20 or 40 bytes, and TCP's own.
    let headers = if size_of::<A>() == 4 { 40 } else { 60 };
    let most = room.saturating_sub(headers) as u16;
    let mut at = packet.transport() + HEADER;
    let end = packet.transport() + packet.header_bytes as usize;
    for _ in 0..OPTIONS {
        if at >= end {
            return Some(());
        }
        let option = frame.read::<Kind>(at)?;
        let (kind, length) = (option.kind, option.length);
        match kind {
            END => return Some(()),
            NOTHING => at += 1,
            MAXIMUM_SEGMENT_SIZE => {
                let size = u16::from_be_bytes(*frame.read::<[u8; 2]>(at + 2)?);
                if length == 4 && size > most {
                    lower(frame, packet, at + 2, most, finished)?;
                }
                return Some(());
            }
            _ if length < 2 => return Some(()),
            _ => at += (length & 0x3f) as usize,
        }
    }
    Some(())
}

/// Writes the size. Checksums count words of the header; the size may lie across two of them.
#[inline(always)]
fn lower<F: Frame, A>(frame: &mut F, packet: &Packet<A>, at: usize, size: u16, finished: bool) -> Option<()> {
    let [high, low] = size.to_be_bytes();
    if (at - packet.transport()) & 1 == 0 {
        return frame.replace_word(packet, at, u16::from_ne_bytes([high, low]), finished);
    }
    let [first, _, _, last] = *frame.read::<[u8; 4]>(at - 1)?;
    frame.replace_word(packet, at - 1, u16::from_ne_bytes([first, high]), finished)?;
    frame.replace_word(packet, at + 1, u16::from_ne_bytes([low, last]), finished)
}
