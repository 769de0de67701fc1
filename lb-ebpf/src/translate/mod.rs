//! Between clients and tasks that have the other family alone, where such a task is attached: what leads there is of the client's
//! family, for an address that the task has within its node ([`lb_common::translation`]), until it leaves the host's side of its
//! veth, and what comes from it is of the client's family again before anything else is made of it. No other stage knows of it.
//!
//! Each way the address of whom the packet is from or for is looked up on the side of the family that has fewer addresses
//! ([`pool`], [`stand_in`]), and the other one stands behind the prefix. So [`to_v4`] and [`to_v6`] are the same for both.
//!
//! Headers, fragments and errors are those of RFC 7915. Beside `forward`: imports `wire`, `io` and `parse`.

pub mod pool;
pub mod stand_in;
pub mod to_v4;
pub mod to_v6;

use lb_common::{
    checksum::{Delta, fold},
    net::{Address as _, V4, V6},
    outcome::Outcome,
    translation::IcmpError,
};

use crate::{
    io::{
        frame::{Frame as _, Skb},
        packet::Packet,
    },
    wire::{
        icmp::Icmp,
        ipv4::{Ipv4, PLAIN},
        ipv6::{Fragment, Ipv6},
        transport::checksum_at,
    },
};

// What became of a packet that a task sent.
/// It is for no client of the other family.
pub const NOT_OURS: u32 = 0;
/// It is one of the client's family now, and nobody may cut it by what IPv6 says.
pub const WHOLE_ONLY: u32 = 1;
/// It is one of IPv6 now, whose sender let it be cut.
pub const MAY_BE_CUT: u32 = 2;
/// It is for a client of the other family, and there is no way to say it in that.
pub const REFUSED: u32 = 3;

/// Bytes of a fragment header.
const FRAGMENT_BYTES: usize = size_of::<Fragment>();

/// An error's headers, and the one that it quotes, in IPv4.
#[repr(C)]
struct Error4 {
    outer: Ipv4,
    icmp: Icmp,
    quoted: Ipv4,
}

/// The same in IPv6.
#[repr(C)]
struct Error6 {
    outer: Ipv6,
    icmp: Icmp,
    quoted: Ipv6,
}

/// What two families' addresses of the same ends add to a sum when the others take the place of the ones.
#[inline(always)]
fn to_v4_delta((source, destination): (&V6, &V6), to: (V4, V4)) -> Delta {
    let six = fold(source.sum() + destination.sum());
    Delta::of_word(six, fold(to.0.sum() + to.1.sum()))
}

/// An IPv4 header without options; its checksum is made last.
#[inline(always)]
fn header4(
    addresses: (V4, V4),
    protocol: u8,
    ttl: u8,
    tos: u8,
    bytes: u16,
    (id, fragment): (u16, u16),
) -> Ipv4 {
    let total_length = bytes.to_be();
    let sum = addresses.0.sum()
        + addresses.1.sum()
        + u16::from_ne_bytes([PLAIN, tos]) as u32
        + total_length as u32
        + id as u32
        + fragment as u32
        + u16::from_ne_bytes([ttl, protocol]) as u32;
    Ipv4 {
        version_and_length: PLAIN,
        tos,
        total_length,
        identification: id,
        fragment,
        ttl,
        protocol,
        checksum: !fold(sum),
        source: addresses.0.0,
        destination: addresses.1.0,
    }
}

#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

/// What an ICMP message says, and its checksum.
#[inline(always)]
fn said(frame: &Skb, at: usize) -> Option<(IcmpError, u16)> {
    let header = frame.read::<Icmp>(at)?;
    let said = IcmpError { kind: header.kind, code: header.code, rest: u32::from_be(header.rest) };
    Some((said, header.checksum))
}

/// The header that says it.
#[inline(always)]
fn saying(says: &IcmpError, checksum: u16) -> Icmp {
    Icmp { kind: says.kind, code: says.code, checksum, rest: says.rest.to_be() }
}

/// The sum over that header, without its checksum.
#[inline(always)]
fn sum_of_said(says: &IcmpError) -> u32 {
    u16::from_ne_bytes([says.kind, says.code]) as u32 + halves(says.rest.to_be())
}

/// Changes the checksum that an error's quote has, if the quote is as long, for other addresses; what that adds to a sum over it.
#[inline(always)]
fn requote<A>(frame: &mut Skb, packet: &Packet<A>, addresses: Delta) -> Result<Delta, Outcome> {
    let at = packet.quoted_transport() + checksum_at(packet.key.protocol);
    if at + 2 > packet.transport() + packet.transport_bytes as usize {
        return Ok(Delta::NONE);
    }
    let Some(old) = frame.load::<u16>(at as u32) else {
        return Ok(Delta::NONE);
    };
    if !packet.is_tcp() && old == 0 {
        return Ok(Delta::NONE);
    }
    let new = addresses.apply(old);
    if frame.store(at as u32, &new) { Ok(Delta::of_word(old, new)) } else { Err(Outcome::Untranslatable) }
}
