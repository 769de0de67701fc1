//! IPv4 to IPv6 (RFC 7915, 4): what a task sends to a client whom it knows by an address of the pool; and what an IPv4 client, or a
//! router, has for a task that has IPv6 alone.

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use lb_common::{
    abi::Config,
    checksum::{Delta, fold, pseudo_header},
    net::{Address as _, ICMP6, UDP, V4, V6},
    outcome::Outcome,
    translation::{LONGER, PREFIX, embed_in},
};

use super::{
    Error6, FRAGMENT_BYTES, MAY_BE_CUT, NOT_OURS, REFUSED, WHOLE_ONLY, halves, pool, requote, saying,
    stand_in, sum_of_said, to_v4_delta,
};
use crate::{
    io::{
        family::Family as _,
        frame::{Frame as _, Skb},
        maps,
        packet::{ERROR, FIRST, LATER, OFFSETS, Offsets, Packet, WHOLE},
        sum,
        verifier::{self, opaque},
    },
    wire::{
        ethernet::{Ethernet, IPV4, IPV6, LINK},
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
    },
};

/// Whether a frame without tags is IPv4 for a task's stand-in.
#[inline(always)]
pub fn may_be_for(frame: &Skb) -> bool {
    frame.read::<Ethernet>(0).is_some_and(|header| header.kind == IPV4)
        && frame.read::<Ipv4>(LINK).is_some_and(|header| stand_in::is_one(V4(header.destination)))
}

/// Makes an IPv4 packet for a task's stand-in one of IPv6 for the task.
#[inline(always)]
pub fn to_task(frame: &mut Skb, packet: &Packet<V4>, config: &Config) -> Result<(), Outcome> {
    let task = stand_in::own(packet.key.destination).ok_or(Outcome::Untranslatable)?;
    if packet.network() != LINK || give_sum(frame, packet) == NO_SUM {
        return Err(Outcome::Untranslatable);
    }
    let done = if packet.kind == ERROR {
        error(frame, packet, task, config.pref64)
    } else {
        datagram(frame, packet, task, config.pref64)
    };
    verifier::unpack(done).map(|_| ())
}

/// Makes an IPv4 packet for an address of the pool one of IPv6 for the client.
#[inline(always)]
pub fn from_task(frame: &mut Skb, packet: &Packet<V4>) -> u32 {
    let number = maps::config().and_then(|config| pool::number(config, packet.key.destination));
    match number {
        Some(number) => translate(frame, packet, number),
        None => NOT_OURS,
    }
}

/// Notes that what was made IPv6 was of a connection.
#[inline(always)]
pub fn note(packet: &Packet<V4>) {
    if let Some(number) = maps::config().and_then(|config| pool::number(config, packet.key.destination)) {
        pool::answered(number);
    }
}

/// A function of its own, beside which what is for others is little.
#[inline(never)]
fn translate(frame: &mut Skb, packet: &Packet<V4>, number: u32) -> u32 {
    let Some(client) = pool::client(number) else {
        // A later fragment does not say whose it is.
        return if packet.kind == LATER { NOT_OURS } else { REFUSED };
    };
    if packet.network() != LINK || give_sum(frame, packet) == NO_SUM {
        return REFUSED;
    }
    let may_be_cut =
        frame.read::<Ipv4>(packet.network()).is_some_and(|header| header.fragment & ipv4::DONT_FRAGMENT == 0);
    let done = if packet.kind == ERROR {
        error(frame, packet, client, PREFIX[2])
    } else {
        datagram(frame, packet, client, PREFIX[2])
    };
    match verifier::unpack_raw(done) {
        Ok(_) if may_be_cut => MAY_BE_CUT,
        Ok(_) => WHOLE_ONLY,
        Err(_) => REFUSED,
    }
}

/// It has no sum, and can be given none.
const NO_SUM: u32 = 1;

/// Gives a datagram that has no sum one, of IPv4: IPv6 knows none without (RFC 8200, 8.1; RFC 7915, 4.5). Over a fragment none can
/// be made.
#[inline(never)]
fn give_sum(frame: &mut Skb, packet: &Packet<V4>) -> u32 {
    let key = &packet.key;
    if key.protocol != UDP || packet.kind == LATER || packet.kind == ERROR {
        return 0;
    }
    let at = Offsets::of(packet).checksum() as u32;
    let Some(sum) = frame.load::<u16>(at) else {
        return NO_SUM;
    };
    if sum != 0 {
        return 0;
    }
    let (whole, bytes) = (packet.transport_bytes, opaque(packet.transport_bytes as u64) as u32 & OFFSETS);
    let Some(cutting) = maps::cutting() else {
        return NO_SUM;
    };
    if packet.kind != WHOLE || whole as u32 > sum::LONGEST || bytes < 8 || frame.segment_bytes() != 0 {
        return NO_SUM;
    }
    cutting.bytes = whole as u32;
    let to = cutting.payload.as_mut_ptr().cast();
    // SAFETY: the context is the program's own, and the entry longer than what is read into it.
    if unsafe { bpf_skb_load_bytes(frame.raw().cast(), packet.transport() as u32, to, bytes) } != 0 {
        return NO_SUM;
    }
    let pseudo = pseudo_header(key.source, key.destination, UDP, whole);
    let sum = sum::of(cutting, pseudo as u32) as u16;
    if frame.store(at, &sum) { 0 } else { NO_SUM }
}

/// An IPv6 header.
#[inline(always)]
fn header6(source: V6, destination: &V6, next: u8, ttl: u8, tos: u8, payload: u16) -> Ipv6 {
    Ipv6 {
        version_and_flow: (0x6000_0000 | (tos as u32) << 20).to_be(),
        payload_length: payload.to_be(),
        next,
        hop_limit: ttl,
        source: source.0,
        destination: destination.0,
    }
}

/// What the addresses of IPv6 add to a sum when they take the place of those of IPv4.
#[inline(always)]
fn to_v6_delta(from: (V4, V4), to: (&V6, &V6)) -> Delta {
    to_v4_delta(to, from).reversed()
}

#[inline(never)]
fn datagram(frame: &mut Skb, packet: &Packet<V4>, destination: &V6, third: u32) -> u64 {
    verifier::pack(try_datagram(frame, packet, destination, third).map(|()| 0))
}

#[inline(always)]
fn try_datagram(frame: &mut Skb, packet: &Packet<V4>, destination: &V6, third: u32) -> Result<(), Outcome> {
    let key = &packet.key;
    let source = embed_in(third, key.source);
    let options = packet.transport() - packet.network() - size_of::<Ipv4>();
    let is_fragment = packet.kind == FIRST || packet.kind == LATER;
    if packet.kind != LATER {
        let offsets = Offsets::of(packet);
        let delta = to_v6_delta((key.source, key.destination), (&source, destination));
        frame.update_sum(&offsets, delta).ok_or(Outcome::Untranslatable)?;
    }
    let field = frame.read::<Ipv4>(packet.network()).ok_or(Outcome::Untranslatable)?.fragment;
    let behind = if is_fragment { FRAGMENT_BYTES } else { 0 };
    become_v6(frame, options, behind)?;
    let next = if is_fragment { ipv6::FRAGMENT } else { key.protocol };
    let payload = packet.transport_bytes.wrapping_add(behind as u16);
    if !frame.store(LINK as u32, &header6(source, destination, next, packet.ttl, packet.tos, payload)) {
        return Err(Outcome::Untranslatable);
    }
    if is_fragment {
        let more = if field & ipv4::MORE != 0 { ipv6::MORE } else { 0 };
        let fragment = ipv6::Fragment {
            next: key.protocol,
            reserved: 0,
            offset: (u16::from_be(field & ipv4::OFFSET) * 8).to_be() | more,
            identification: (u16::from_be(packet.identification as u16) as u32).to_be(),
        };
        if !frame.store((LINK + size_of::<Ipv6>()) as u32, &fragment) {
            return Err(Outcome::Untranslatable);
        }
    }
    Ok(())
}

/// Makes the network header, which may have options, one of IPv6, to be written, with so many bytes behind it.
#[inline(always)]
fn become_v6(frame: &mut Skb, options: usize, behind: usize) -> Result<(), Outcome> {
    let done = (options == 0 || frame.shift_behind_network(-(options as i32)))
        && frame.change_family(IPV6)
        && (behind == 0 || frame.shift_behind_network(behind as i32));
    if !done {
        return Err(Outcome::Untranslatable);
    }
    frame.at::<Ethernet>(0).ok_or(Outcome::Untranslatable)?.kind = IPV6;
    frame.adjust_sum(Delta::of_word(IPV4, IPV6));
    Ok(())
}

/// An ICMP error about a packet from its destination to its source.
#[inline(never)]
fn error(frame: &mut Skb, packet: &Packet<V4>, destination: &V6, third: u32) -> u64 {
    verifier::pack(try_error(frame, packet, destination, third).map(|()| 0))
}

#[inline(always)]
fn try_error(frame: &mut Skb, packet: &Packet<V4>, destination: &V6, third: u32) -> Result<(), Outcome> {
    let key = &packet.key;
    let plain = packet.transport() == LINK + size_of::<Ipv4>()
        && packet.quoted_transport() == packet.quoted() + size_of::<Ipv4>();
    if !plain {
        return Err(Outcome::Untranslatable);
    }
    let sender = V4::source(frame, LINK).ok_or(Outcome::Untranslatable)?;
    let (said, checksum) = super::said(frame, packet.transport()).ok_or(Outcome::Untranslatable)?;
    let quoted = frame.read::<Ipv4>(packet.quoted()).ok_or(Outcome::Untranslatable)?;
    let inner = u16::from_be(quoted.total_length);
    let says = said.to_v6(inner).ok_or(Outcome::Untranslatable)?;
    let (from, source) = (embed_in(third, sender), embed_in(third, key.source));
    let bytes = packet.transport_bytes.wrapping_add(LONGER as u16);
    let header = header6(
        *destination,
        &source,
        key.protocol,
        quoted.ttl,
        quoted.tos,
        inner.wrapping_sub(size_of::<Ipv4>() as u16),
    );

    // What the sum was over, but for the quoted header, whose own is zero; and what it is over now.
    let old = sum_of_said(&said) + sum_of(quoted);
    let mut new = from.sum() + destination.sum() + (ICMP6 as u16).to_be() as u32 + bytes.to_be() as u32;
    new += sum_of_said(&says);
    new = fold(new) as u32 + halves(header.version_and_flow) + header.payload_length as u32;
    new += u16::from_ne_bytes([header.next, header.hop_limit]) as u32 + destination.sum() + source.sum();
    let addresses = to_v6_delta((key.destination, key.source), (destination, &source));
    let change = Delta::of_word(fold(old), fold(new)).and(requote(frame, packet, addresses)?);
    let headers = Error6 {
        outer: header6(from, destination, ICMP6, packet.ttl, packet.tos, bytes),
        icmp: saying(&says, change.apply(checksum)),
        quoted: header,
    };
    become_v6(frame, 0, LONGER as usize)?;
    if frame.store(LINK as u32, &headers) { Ok(()) } else { Err(Outcome::Untranslatable) }
}

/// The sum over a header, which who quotes it may have changed without its checksum.
#[inline(always)]
fn sum_of(header: &Ipv4) -> u32 {
    let sum = u16::from_ne_bytes([header.version_and_length, header.tos]) as u32
        + header.total_length as u32
        + header.identification as u32
        + header.fragment as u32
        + u16::from_ne_bytes([header.ttl, header.protocol]) as u32
        + header.checksum as u32
        + halves(header.source)
        + halves(header.destination);
    fold(sum) as u32
}
