//! IPv4 to IPv6 (RFC 7915, 4): what a task sends to a client whom it knows by an address of the pool.

use lb_common::{
    checksum::{Delta, fold},
    net::{Address as _, ICMP6, UDP, V4, V6},
    outcome::Outcome,
    translation::{LONGER, embed},
};

use super::{Error6, FRAGMENT_BYTES, halves, pool, requote, saying, sum_of_said, to_v4_delta};
use crate::{
    io::{
        family::Family as _,
        frame::{Frame as _, Skb},
        maps,
        packet::{ERROR, FIRST, LATER, Offsets, Packet},
        verifier,
    },
    wire::{
        ethernet::{Ethernet, IPV6, LINK},
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
    },
};

/// It is not for an address of the pool by which a client is known.
pub const NOT_OURS: u32 = 0;
/// It is one of IPv6 now, and nobody may cut it.
pub const WHOLE_ONLY: u32 = 1;
/// It is one of IPv6 now, whose sender let it be cut.
pub const MAY_BE_CUT: u32 = 2;
/// It is for an address of the pool, and there is no way to say it in IPv6.
pub const REFUSED: u32 = 3;

/// Makes an IPv4 packet for an address of the pool one of IPv6 for the client.
#[inline(always)]
pub fn apply(frame: &mut Skb, packet: &Packet<V4>) -> u32 {
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
    if packet.network() != LINK {
        return REFUSED;
    }
    let may_be_cut =
        frame.read::<Ipv4>(packet.network()).is_some_and(|header| header.fragment & ipv4::DONT_FRAGMENT == 0);
    let done =
        if packet.kind == ERROR { error(frame, packet, client) } else { datagram(frame, packet, client) };
    match verifier::unpack_raw(done) {
        Ok(_) if may_be_cut => MAY_BE_CUT,
        Ok(_) => WHOLE_ONLY,
        Err(_) => REFUSED,
    }
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
fn datagram(frame: &mut Skb, packet: &Packet<V4>, client: &V6) -> u64 {
    verifier::pack(try_datagram(frame, packet, client).map(|()| 0))
}

#[inline(always)]
fn try_datagram(frame: &mut Skb, packet: &Packet<V4>, client: &V6) -> Result<(), Outcome> {
    let key = &packet.key;
    let task = embed(key.source);
    let options = packet.transport() - packet.network() - size_of::<Ipv4>();
    let is_fragment = packet.kind == FIRST || packet.kind == LATER;
    if packet.kind != LATER {
        let offsets = Offsets::of(packet);
        // A datagram without a sum: IPv6 knows none (RFC 8200, 8.1), and over a fragment none can be made.
        if key.protocol == UDP && frame.read::<u16>(offsets.checksum()).is_none_or(|sum| *sum == 0) {
            return Err(Outcome::Untranslatable);
        }
        let delta = to_v6_delta((key.source, key.destination), (&task, client));
        frame.update_sum(&offsets, delta).ok_or(Outcome::Untranslatable)?;
    }
    let field = frame.read::<Ipv4>(packet.network()).ok_or(Outcome::Untranslatable)?.fragment;
    let behind = if is_fragment { FRAGMENT_BYTES } else { 0 };
    become_v6(frame, options, behind)?;
    let next = if is_fragment { ipv6::FRAGMENT } else { key.protocol };
    let payload = packet.transport_bytes.wrapping_add(behind as u16);
    if !frame.store(LINK as u32, &header6(task, client, next, packet.ttl, packet.tos, payload)) {
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
    // A task's packets come without a device's sum over all of them.
    frame.at::<Ethernet>(0).ok_or(Outcome::Untranslatable)?.kind = IPV6;
    Ok(())
}

/// An ICMP error about a packet that the client sent.
#[inline(never)]
fn error(frame: &mut Skb, packet: &Packet<V4>, client: &V6) -> u64 {
    verifier::pack(try_error(frame, packet, client).map(|()| 0))
}

#[inline(always)]
fn try_error(frame: &mut Skb, packet: &Packet<V4>, client: &V6) -> Result<(), Outcome> {
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
    let (from, task) = (embed(sender), embed(key.source));
    let bytes = packet.transport_bytes.wrapping_add(LONGER as u16);
    let header = header6(
        *client,
        &task,
        key.protocol,
        quoted.ttl,
        quoted.tos,
        inner.wrapping_sub(size_of::<Ipv4>() as u16),
    );

    // What the sum was over, but for the quoted header, whose own is zero; and what it is over now.
    let old = sum_of_said(&said) + sum_of(quoted);
    let mut new = from.sum() + client.sum() + (ICMP6 as u16).to_be() as u32 + bytes.to_be() as u32;
    new += sum_of_said(&says);
    new = fold(new) as u32 + halves(header.version_and_flow) + header.payload_length as u32;
    new += u16::from_ne_bytes([header.next, header.hop_limit]) as u32 + client.sum() + task.sum();
    let addresses = to_v6_delta((key.destination, key.source), (client, &task));
    let change = Delta::of_word(fold(old), fold(new)).and(requote(frame, packet, addresses)?);
    let headers = Error6 {
        outer: header6(from, client, ICMP6, packet.ttl, packet.tos, bytes),
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
