//! Cutting a datagram that is too long for its way into fragments (RFC 791, 3.2; RFC 8200, 4.5; for IPv6 as RFC 7915, 4 has it),
//! because no helper does, and because the kernel takes what says to come from this host for a martian.
//!
//! Nothing of the datagram has been rewritten yet: its fragments come in once more by the interface that it came by, and go the
//! way of all fragments. So no stage has to know of them.

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_NET,
    helpers::generated::{
        bpf_get_prandom_u32, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
};
use lb_common::{
    abi::Config,
    backend::Kind,
    checksum::{Delta, pseudo_header},
    conntrack::line::DIRECT,
    net::{UDP, V4, V6},
};

use super::{
    early::{send_in_again, send_out_again},
    encap, mtu,
};
use crate::{
    conntrack::{Classified, Direction},
    io::{
        family::Family,
        frame::{Frame, Skb},
        maps,
        packet::{Cutting, LATER, LONGEST_PIECE, NOBODY, OFFSETS, Packet, Place, WHOLE},
        sum::{self, LONGEST},
        verifier::opaque,
    },
    wire::{
        ipv4::{self, Ipv4},
        ipv6::{self, Fragment, Ipv6},
        transport::checksum_at,
    },
};

/// Bytes behind the network header of the longest datagram that IPv4 knows (RFC 791, 3.1); IPv6's is hardly longer.
const LONGEST_DATAGRAM: u32 = 0xffff - size_of::<Ipv4>() as u32;
/// Bytes of a fragment's payload, at least: what IPv4 lets pass everywhere (RFC 791, 3.1), less the tunnel's headers.
const SHORTEST_PIECE: u32 = 480;
/// Bytes that hold the link and network headers and the transport checksum.
const HEADERS: u32 = 72;

/// A family's fragments.
pub trait Cut: Family {
    /// Bytes of a fragment's headers up to its payload.
    const HEADERS: usize;

    /// Whether a UDP packet may become fragments that let so many bytes pass, and has headers that are understood.
    fn may_be_cut<F: Frame>(frame: &F, packet: &Packet<Self>, limit: u32) -> bool;

    /// Where in its datagram the packet lies.
    fn place<F: Frame>(frame: &F, packet: &Packet<Self>) -> Option<Place>;

    /// Writes the headers of the next fragment.
    fn write_piece<F: Frame>(frame: &mut F, network: usize, cutting: &Cutting) -> Option<()>;
}

impl Cut for V4 {
    const HEADERS: usize = size_of::<Ipv4>();

    // Options would have to be looked at one by one: not all of them belong into each fragment.
    #[inline(always)]
    fn may_be_cut<F: Frame>(frame: &F, packet: &Packet<Self>, _: u32) -> bool {
        frame.read::<Ipv4>(packet.network()).is_some_and(|header| {
            header.version_and_length == ipv4::PLAIN && header.fragment & ipv4::DONT_FRAGMENT == 0
        })
    }

    #[inline(always)]
    fn place<F: Frame>(frame: &F, packet: &Packet<Self>) -> Option<Place> {
        let field = frame.read::<Ipv4>(packet.network())?.fragment;
        let offset = u16::from_be(field & ipv4::OFFSET) * 8;
        Some(Place { offset, more: (field & ipv4::MORE != 0) as u16, identification: 0 })
    }

    #[inline(always)]
    fn write_piece<F: Frame>(frame: &mut F, network: usize, cutting: &Cutting) -> Option<()> {
        let header = frame.at::<Ipv4>(network)?;
        let length = (Self::HEADERS as u16 + cutting.length as u16).to_be();
        let fragment = (cutting.offset() / 8).to_be() | (cutting.more() * ipv4::MORE);
        let change =
            Delta::of_word(header.total_length, length).and(Delta::of_word(header.fragment, fragment));
        header.total_length = length;
        header.fragment = fragment;
        header.checksum = change.apply(header.checksum);
        Some(())
    }
}

/// Bytes of IPv6's headers of a packet that is a fragment already.
const FRAGMENT6: usize = size_of::<Ipv6>() + size_of::<Fragment>();

impl Cut for V6 {
    const HEADERS: usize = FRAGMENT6;

    // No router cuts IPv6. But what a sender need not make shorter the tunnel may have no room for, and who sends IPv4 may leave
    // cutting to others.
    #[inline(always)]
    fn may_be_cut<F: Frame>(frame: &F, packet: &Packet<Self>, limit: u32) -> bool {
        let headers = packet.transport().wrapping_sub(packet.network());
        let must_pass = limit < ipv6::LEAST_MTU && packet.bytes as u32 <= ipv6::LEAST_MTU;
        (must_pass || packet.may_be_cut != 0)
            && frame.read::<Ipv6>(packet.network()).is_some_and(|header| match header.next {
                UDP => headers == size_of::<Ipv6>(),
                ipv6::FRAGMENT => headers == FRAGMENT6,
                _ => false,
            })
    }

    #[inline(always)]
    fn place<F: Frame>(frame: &F, packet: &Packet<Self>) -> Option<Place> {
        if frame.read::<Ipv6>(packet.network())?.next == ipv6::FRAGMENT {
            let header = frame.read::<Fragment>(packet.network() + size_of::<Ipv6>())?;
            let offset = u16::from_be(header.offset & ipv6::OFFSET);
            let more = (header.offset & ipv6::MORE != 0) as u16;
            return Some(Place { offset, more, identification: header.identification });
        }
        // SAFETY: the helper has no preconditions.
        Some(Place { offset: 0, more: 0, identification: unsafe { bpf_get_prandom_u32() } })
    }

    #[inline(always)]
    fn write_piece<F: Frame>(frame: &mut F, network: usize, cutting: &Cutting) -> Option<()> {
        let header = frame.at::<Ipv6>(network)?;
        header.payload_length = (size_of::<Fragment>() as u16 + cutting.length as u16).to_be();
        header.next = ipv6::FRAGMENT;
        let header = frame.at::<Fragment>(network + size_of::<Ipv6>())?;
        *header = Fragment {
            next: UDP,
            reserved: 0,
            offset: cutting.offset().to_be() | (cutting.more() * ipv6::MORE),
            identification: cutting.place.identification,
        };
        Some(())
    }
}

/// Stands for no limit but that of the way.
pub const ANY: u32 = u32::MAX;

/// What the way of a datagram lets pass, in bytes, if the datagram is longer and may be cut; no more than `most`.
#[inline(always)]
pub fn limit<A: Cut>(
    frame: &Skb,
    packet: &Packet<A>,
    found: &Classified,
    config: &Config,
    most: u32,
) -> Option<u32> {
    if packet.key.protocol != UDP || frame.segment_bytes() != 0 {
        return None;
    }
    let backend = found.backend;
    let connection = &packet.connection;
    let (peer, interface) = match found.direction {
        Direction::Task if backend.kind == Kind::Local as u8 => return None,
        Direction::Task if backend.kind == Kind::Peer as u8 => (backend.peer as u32, 0),
        Direction::Task => (0, backend.ifindex),
        Direction::Client if connection.link & DIRECT == 0 => (connection.peer as u32, config.uplink),
        Direction::Client => (0, config.uplink),
    };
    let limit = if peer != 0 {
        encap::inner_mtu(encap::peer(peer).ok()?)
    } else if packet.bytes as u32 > most {
        mtu::of_interface(frame, interface)
    } else {
        mtu::exceeded(frame, packet, interface)?
    };
    let limit = if limit < most { limit } else { most };
    (packet.bytes as u32 > limit && can_be_cut(frame, packet, limit)).then_some(limit)
}

/// Whether a packet may become fragments that let so many bytes pass, and can. One without a line cannot: its later fragments
/// would not find where their first one went. Nor can one whose second tag lies in its bytes: the kernel makes no room in it.
#[inline(always)]
pub fn can_be_cut<F: Frame, A: Cut>(frame: &F, packet: &Packet<A>, limit: u32) -> bool {
    packet.line.slot != NOBODY && has_pieces(frame, packet, limit)
}

/// The same of one that need not be found again.
#[inline(always)]
pub fn has_pieces<F: Frame, A: Cut>(frame: &F, packet: &Packet<A>, limit: u32) -> bool {
    packet.key.protocol == UDP
        && packet.kind <= LATER
        && !packet.tags.inner.is_some()
        && packet.transport_bytes as u32 <= LONGEST
        && limit >= A::HEADERS as u32 + SHORTEST_PIECE
        && A::may_be_cut(frame, packet, limit)
}

/// Reads a packet that is to be sent in, or out, once more as fragments of at most so many bytes. `None` if it cannot be cut.
#[inline(always)]
pub fn begin<A: Cut>(frame: &Skb, packet: &Packet<A>, limit: u32, goes_out: bool) -> Option<()> {
    let cutting = maps::cutting()?;
    cutting.goes_out = goes_out as u32;
    (read(frame, packet, cutting, limit) == DONE).then_some(())
}

/// Sends what was read once more, fragment by fragment. `None` if the kernel has no room for one; some may have been sent then.
#[inline(always)]
pub fn send(frame: &mut Skb) -> Option<()> {
    let cutting = maps::cutting()?;
    if forget_sums(frame) != DONE {
        return None;
    }
    for _ in 0..LONGEST.div_ceil(SHORTEST_PIECE) {
        match send_next(frame, cutting) {
            MORE => {}
            DONE => return Some(()),
            _ => break,
        }
    }
    None
}

// What the steps answer: plain numbers, as functions of their own may.
const DONE: u32 = 0;
const MORE: u32 = 1;
const FAILED: u32 = 2;

/// Reads all of the packet.
#[inline(never)]
fn read<A: Cut>(frame: &Skb, packet: &Packet<A>, cutting: &mut Cutting, limit: u32) -> u32 {
    let bytes = opaque(packet.transport_bytes as u64) as u32 & OFFSETS;
    let piece = limit.saturating_sub(A::HEADERS as u32);
    cutting.piece = if piece < LONGEST_PIECE { piece & !7 } else { LONGEST_PIECE };
    cutting.bytes = packet.transport_bytes as u32;
    cutting.sent = 0;
    cutting.network = packet.network() as u32;
    cutting.headers = A::HEADERS as u32;
    let Some(place) = A::place(frame, packet) else {
        return FAILED;
    };
    cutting.place = place;
    // What goes on behind the end of the longest datagram would begin anew at its start.
    let end = cutting.place.offset as u32 + cutting.bytes;
    if cutting.piece < SHORTEST_PIECE || cutting.bytes > LONGEST || bytes < HEADERS || end > LONGEST_DATAGRAM
    {
        return FAILED;
    }
    let to = cutting.payload.as_mut_ptr().cast();
    // SAFETY: the context is the program's own, and the entry longer than what is read into it.
    if unsafe { bpf_skb_load_bytes(frame.raw().cast(), packet.transport() as u32, to, bytes) } != 0 {
        return FAILED;
    }
    finish_sum(packet, cutting)
}

/// Finishes a sum over the whole datagram that its stack left to the device, which will not see it whole.
#[inline(never)]
fn finish_sum<A: Family>(packet: &Packet<A>, cutting: &mut Cutting) -> u32 {
    let key = &packet.key;
    let pseudo = pseudo_header(key.source, key.destination, key.protocol, packet.transport_bytes);
    let field = checksum_at(UDP);
    let found = u16::from_ne_bytes([cutting.payload[field], cutting.payload[field + 1]]);
    if packet.kind != WHOLE || found != pseudo {
        return DONE;
    }
    let sum = sum::of(cutting, 0) as u16;
    [cutting.payload[field], cutting.payload[field + 1]] = sum.to_ne_bytes();
    DONE
}

/// Has the kernel forget what it knows of sums. That one is to be finished it forgets when the bytes at which that begins are taken
/// away; they are put back at once, for it remembers where the transport header was, and what they hold is written later. What a
/// device has summed up it forgets when a frame grows.
#[inline(never)]
fn forget_sums(frame: &mut Skb) -> u32 {
    let (bytes, longer) = (HEADERS as i32, frame.length() as u32 + 1);
    // SAFETY: the context is the program's own.
    let done = unsafe {
        bpf_skb_adjust_room(frame.raw(), -bytes, BPF_ADJ_ROOM_NET, 0) == 0
            && bpf_skb_adjust_room(frame.raw(), bytes, BPF_ADJ_ROOM_NET, 0) == 0
            && bpf_skb_change_tail(frame.raw(), longer, 0) == 0
    };
    if done { DONE } else { FAILED }
}

/// Says what the next fragment is. A function of its own, so that the verifier follows what is made of it once.
#[inline(never)]
fn choose_next(cutting: &mut Cutting) -> u32 {
    let rest = cutting.bytes.wrapping_sub(cutting.sent);
    let last = rest <= cutting.piece;
    cutting.is_last = last as u32;
    cutting.length = if last { rest } else { cutting.piece };
    DONE
}

/// Makes the frame the next fragment, and has a copy of it come in once more.
#[inline(never)]
fn send_next(frame: &mut Skb, cutting: &mut Cutting) -> u32 {
    choose_next(cutting);
    // Never nothing: older kernels do not learn that from a comparison with zero.
    let length = (opaque(cutting.length.wrapping_sub(1) as u64) as u32 & (LONGEST_PIECE | 7)) + 1;
    let network = (cutting.network & 0x1f) as usize;
    let at = network as u32 + cutting.headers;
    // SAFETY: the mask keeps it in the entry, and leaves room for what a fragment has.
    let from = unsafe { cutting.payload.as_ptr().add((cutting.sent & OFFSETS) as usize) };
    // SAFETY: the context is the program's own.
    let shaped = unsafe {
        bpf_skb_change_tail(frame.raw(), at + length, 0) == 0
            && bpf_skb_store_bytes(frame.raw(), at, from.cast(), length, 0) == 0
    };
    if !shaped {
        return FAILED;
    }
    let written = if cutting.headers == V4::HEADERS as u32 {
        V4::write_piece(frame, network, cutting)
    } else {
        V6::write_piece(frame, network, cutting)
    };
    if written.is_none() {
        return FAILED;
    }
    let sent = if cutting.goes_out != 0 { send_out_again(frame) } else { send_in_again(frame) };
    if !sent {
        return FAILED;
    }
    cutting.sent = cutting.sent.wrapping_add(length);
    if cutting.is_last != 0 { DONE } else { MORE }
}
