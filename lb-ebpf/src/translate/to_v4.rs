//! IPv6 to IPv4 (RFC 7915, 5): what a client, or a router about what he sent or got, has for a task that has IPv4 alone; and what a
//! task that has IPv6 alone sends to an IPv4 client.

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_get_prandom_u32};
use core::ptr::null_mut;
use lb_common::{
    abi::Config,
    checksum::{Delta, fold},
    net::{Address as _, ICMP, ICMP6, V4, V6},
    outcome::Outcome,
    translation::{MAY_BE_CUT, embedded, embedded_in},
};

use super::{
    Error4, FRAGMENT_BYTES, NOT_OURS, REFUSED, WHOLE_ONLY, halves, header4, pool, requote, saying, stand_in,
    sum_of_said, to_v4_delta,
};
use crate::{
    io::{
        family::Family as _,
        frame::{Frame as _, Skb},
        packet::{ERROR, FIRST, LATER, NOBODY, Offsets, Packet},
        verifier,
    },
    wire::{
        ethernet::{Ethernet, IPV4, IPV6, LINK},
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
    },
};

/// Whether a frame without tags is IPv6 for a task's embedded address.
#[inline(always)]
pub fn may_be_for(frame: &Skb) -> bool {
    frame.read::<Ethernet>(0).is_some_and(|header| header.kind == IPV6)
        && frame.read::<Ipv6>(LINK).is_some_and(|header| embedded(&V6(header.destination)).is_some())
}

/// Makes an IPv6 packet for a task's embedded address one of IPv4 for the task.
#[inline(always)]
pub fn to_task(frame: &mut Skb, packet: &Packet<V6>, config: &Config) -> Result<(), Outcome> {
    let task = embedded(&packet.key.destination).ok_or(Outcome::Untranslatable)?;
    let is_error = packet.kind == ERROR;
    let number = if is_error { pool::find(&packet.key.source) } else { pool::take(&packet.key.source) };
    if number == NOBODY {
        return Err(if is_error { Outcome::Untranslatable } else { Outcome::PoolExhausted });
    }
    let client = pool::address(config, number);
    let done = if is_error {
        error(frame, packet, client.0, task.0, pool::router(config).0)
    } else {
        datagram(frame, packet, client.0, task.0)
    };
    verifier::unpack(done).map(|_| ())
}

/// Makes what a task that has IPv6 alone sends to an IPv4 client a packet of IPv4, from the task's stand-in.
#[inline(always)]
pub fn from_task(frame: &mut Skb, packet: &Packet<V6>, config: &Config) -> u32 {
    let Some(client) = embedded_in(config.pref64, &packet.key.destination) else {
        return NOT_OURS;
    };
    let Some(task) = stand_in::of(&packet.key.source) else {
        return REFUSED;
    };
    let done = if packet.kind == ERROR {
        error(frame, packet, task.0, client.0, task.0)
    } else {
        datagram(frame, packet, task.0, client.0)
    };
    verifier::unpack_raw(done).map_or(REFUSED, |_| WHOLE_ONLY)
}

/// A TCP or UDP packet, or a fragment of one.
#[inline(never)]
fn datagram(frame: &mut Skb, packet: &Packet<V6>, source: u32, destination: u32) -> u64 {
    verifier::pack(try_datagram(frame, packet, (V4(source), V4(destination))).map(|()| 0))
}

#[inline(always)]
fn try_datagram(frame: &mut Skb, packet: &Packet<V6>, to: (V4, V4)) -> Result<(), Outcome> {
    let key = &packet.key;
    let extensions = packet.transport() - packet.network() - size_of::<Ipv6>();
    let bytes = packet.transport_bytes as u32 + size_of::<Ipv4>() as u32;
    if bytes > u16::MAX as u32 || packet.network() != LINK {
        return Err(Outcome::Untranslatable);
    }
    let place = place(frame, packet, bytes)?;
    if packet.kind != LATER {
        let delta = to_v4_delta((&key.source, &key.destination), to);
        frame.update_sum(&Offsets::of(packet), delta).ok_or(Outcome::Untranslatable)?;
    }
    let header = header4(to, key.protocol, packet.ttl, packet.tos, bytes as u16, place);
    become_v4(frame, extensions)?;
    if frame.store(LINK as u32, &header) { Ok(()) } else { Err(Outcome::Untranslatable) }
}

/// Identification, and the field of the fragment: those of a fragment header, else as short packets may be cut and long ones not.
#[inline(always)]
fn place(frame: &Skb, packet: &Packet<V6>, bytes: u32) -> Result<(u16, u16), Outcome> {
    if packet.kind != FIRST && packet.kind != LATER {
        // Of a frame that the kernel will cut each segment is a packet.
        let one = match frame.segment_bytes() {
            0 => bytes,
            segment => size_of::<Ipv4>() as u32 + packet.header_bytes as u32 + segment,
        };
        return Ok(match one > MAY_BE_CUT {
            true => (0, ipv4::DONT_FRAGMENT),
            // SAFETY: the helper has no preconditions.
            false => (unsafe { bpf_get_prandom_u32() } as u16, 0),
        });
    }
    // Where options stand behind it, those are not taken for it.
    let at = packet.transport().wrapping_sub(FRAGMENT_BYTES);
    let field = frame.load::<ipv6::Fragment>(at as u32).ok_or(Outcome::Untranslatable)?;
    if field.next != packet.key.protocol || field.identification != packet.identification {
        return Err(Outcome::Untranslatable);
    }
    let offset = u16::from_be(field.offset & ipv6::OFFSET) / 8;
    let more = if field.offset & ipv6::MORE != 0 { ipv4::MORE } else { 0 };
    Ok(((u32::from_be(field.identification) as u16).to_be(), offset.to_be() | more))
}

/// Makes the network header one of IPv4, to be written, and takes what lies behind it away.
#[inline(always)]
fn become_v4(frame: &mut Skb, behind: usize) -> Result<(), Outcome> {
    if !frame.change_family(IPV4) || behind != 0 && !frame.shift_behind_network(-(behind as i32)) {
        return Err(Outcome::Untranslatable);
    }
    frame.at::<Ethernet>(0).ok_or(Outcome::Untranslatable)?.kind = IPV4;
    frame.adjust_sum(Delta::of_word(IPV6, IPV4));
    Ok(())
}

/// An ICMPv6 error about a packet from its destination to its source. A sender who is neither, a router, has no address of IPv4.
#[inline(never)]
fn error(frame: &mut Skb, packet: &Packet<V6>, source: u32, destination: u32, router: u32) -> u64 {
    verifier::pack(try_error(frame, packet, V4(source), V4(destination), V4(router)).map(|()| 0))
}

#[inline(always)]
fn try_error(
    frame: &mut Skb,
    packet: &Packet<V6>,
    source: V4,
    destination: V4,
    router: V4,
) -> Result<(), Outcome> {
    let key = &packet.key;
    let behind = packet.quoted_transport() - packet.quoted() - size_of::<Ipv6>();
    if packet.network() != LINK || packet.transport() != LINK + size_of::<Ipv6>() {
        return Err(Outcome::Untranslatable);
    }
    let sender = V6::source(frame, LINK).ok_or(Outcome::Untranslatable)?;
    let from = if sender == key.source { source } else { router };
    let (said, checksum) = super::said(frame, packet.transport()).ok_or(Outcome::Untranslatable)?;
    let says = said.to_v4().ok_or(Outcome::Untranslatable)?;

    // What the sum was over, and what it is over now.
    let mut old = sender.sum() + key.destination.sum() + (ICMP6 as u16).to_be() as u32;
    old += packet.transport_bytes.to_be() as u32;
    old += sum_of_said(&said);
    let header = packet.quoted();
    old += sum_of_quoted(frame, header, size_of::<Ipv6>() + behind)?;
    let place = if behind != 0 {
        let field = frame
            .load::<ipv6::Fragment>((header + size_of::<Ipv6>()) as u32)
            .ok_or(Outcome::Untranslatable)?;
        let more = if field.offset & ipv6::MORE != 0 { ipv4::MORE } else { 0 };
        ((u32::from_be(field.identification) as u16).to_be(), more)
    } else {
        (0, 0)
    };
    let quoted = frame.read::<Ipv6>(header).ok_or(Outcome::Untranslatable)?;
    let inner = u16::from_be(quoted.payload_length)
        .wrapping_sub(behind as u16)
        .wrapping_add(size_of::<Ipv4>() as u16);
    let tos = (u32::from_be(quoted.version_and_flow) >> 20) as u8;
    let quote = header4((destination, source), key.protocol, quoted.hop_limit, tos, inner, place);
    // A header's own sum, its checksum with it, is zero.
    let new = sum_of_said(&says);
    let addresses = to_v4_delta((&key.destination, &key.source), (destination, source));
    let change = Delta::of_word(fold(old), fold(new)).and(requote(frame, packet, addresses)?);
    let bytes = packet.transport_bytes.wrapping_sub(behind as u16);
    let headers = Error4 {
        outer: header4((from, destination), ICMP, packet.ttl, packet.tos, bytes, (0, 0)),
        icmp: saying(&says, change.apply(checksum)),
        quoted: quote,
    };
    become_v4(frame, size_of::<Ipv6>() - size_of::<Ipv4>() + behind)?;
    if frame.store(LINK as u32, &headers) { Ok(()) } else { Err(Outcome::Untranslatable) }
}

/// The sum over the header that an error quotes: plain, or with a fragment header.
#[inline(always)]
fn sum_of_quoted(frame: &Skb, at: usize, bytes: usize) -> Result<u32, Outcome> {
    const PLAIN: usize = size_of::<Ipv6>();
    const CUT: usize = PLAIN + FRAGMENT_BYTES;
    // SAFETY: the helper reads no more than was checked.
    let sum = unsafe {
        match bytes {
            PLAIN => {
                let header = frame.read::<[u8; PLAIN]>(at).ok_or(Outcome::Untranslatable)?;
                bpf_csum_diff(null_mut(), 0, header.as_ptr().cast_mut().cast(), PLAIN as u32, 0)
            }
            CUT => {
                let header = frame.read::<[u8; CUT]>(at).ok_or(Outcome::Untranslatable)?;
                bpf_csum_diff(null_mut(), 0, header.as_ptr().cast_mut().cast(), CUT as u32, 0)
            }
            _ => return Err(Outcome::Untranslatable),
        }
    };
    Ok(fold(halves(sum as u32)) as u32)
}
