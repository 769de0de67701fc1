//! Parsing: check, advance, say what comes next. Nothing here writes or looks anything up.

pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod transport;

use lb_common::{
    flow::{Tags, VlanTag},
    net::Be16,
    outcome::Outcome,
};

use crate::{
    frame::Frame,
    packet::{Link, Scratch},
};

/// What [`frame`] answers for an IPv4 packet.
pub const IS_IPV4: u32 = 0;
/// What [`frame`] answers for an IPv6 packet.
pub const IS_IPV6: u32 = 1;
/// What [`frame`] answers for an outcome: this and its discriminant.
pub const IS_OUTCOME: u32 = 2;

/// An Ethernet header (IEEE 802.3). Addresses in words, as they are compared and copied.
#[repr(C)]
pub struct Ethernet {
    pub destination: [u16; 3],
    pub source: [u16; 3],
    pub kind: u16,
}

#[repr(C)]
struct Tag {
    tci: u16,
    kind: u16,
}

/// Bytes of an Ethernet header without tags.
pub const LINK: usize = size_of::<Ethernet>();

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800_u16.to_be();
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd_u16.to_be();
const VLAN: u16 = 0x8100_u16.to_be();
const VLAN_SERVICE: u16 = 0x88a8_u16.to_be();
/// The group bit is the lowest of the first byte on the wire.
pub const GROUP: u16 = 0x0100_u16.to_be();

/// Parses a frame into the scratch. A function of its own, for the verifier's sake, so that it returns a plain
/// number: [`IS_IPV4`], [`IS_IPV6`], or from [`IS_OUTCOME`] on the outcome of what is none of ours.
#[inline(never)]
pub fn frame<F: Frame>(frame: &F, scratch: &mut Scratch) -> u32 {
    match packet(frame, scratch) {
        Ok(family) => family,
        Err(outcome) => IS_OUTCOME + outcome as u32,
    }
}

#[inline(always)]
fn packet<F: Frame>(frame: &F, scratch: &mut Scratch) -> Result<u32, Outcome> {
    let (link, kind) = match frame.without_link_header() {
        Some(kind) => (Link { network: 0, tags: Tags { outer: VlanTag::NONE, inner: VlanTag::NONE } }, kind),
        None => link(frame)?,
    };
    match kind {
        IPV4 => ipv4::parse(frame, &link, &mut scratch.v4).map(|()| IS_IPV4),
        IPV6 => ipv6::parse(frame, &link, &mut scratch.v6).map(|()| IS_IPV6),
        _ => Err(Outcome::NotIp),
    }
}

/// Parses the Ethernet header and up to two VLAN tags (IEEE 802.1Q), offloaded or not.
#[inline(always)]
fn link<F: Frame>(frame: &F) -> Result<(Link, u16), Outcome> {
    let header = frame.at::<Ethernet>(0).ok_or(Outcome::Malformed)?;
    // SAFETY: `at` checked the bounds.
    let (destination, mut kind) = unsafe { ((*header).destination[0], (*header).kind) };
    if destination & GROUP != 0 {
        return Err(Outcome::NotUnicast);
    }
    let mut link =
        Link { network: size_of::<Ethernet>(), tags: Tags { outer: VlanTag::NONE, inner: VlanTag::NONE } };
    match frame.offloaded_tag() {
        Some(tag) => link.tags.outer = tag,
        None if is_tag(kind) => link.tags.outer = inline_tag(frame, &mut link.network, &mut kind)?,
        None => {}
    }
    if link.tags.outer.is_some() && is_tag(kind) {
        link.tags.inner = inline_tag(frame, &mut link.network, &mut kind)?;
    }
    Ok((link, kind))
}

#[inline(always)]
fn is_tag(kind: u16) -> bool {
    kind == VLAN || kind == VLAN_SERVICE
}

/// Steps over a tag that lies in the frame's bytes.
#[inline(always)]
fn inline_tag<F: Frame>(frame: &F, at: &mut usize, kind: &mut u16) -> Result<VlanTag, Outcome> {
    let tag = frame.at::<Tag>(*at).ok_or(Outcome::Malformed)?;
    *at += size_of::<Tag>();
    // SAFETY: `at` checked the bounds.
    unsafe {
        let seen = VlanTag { protocol: Be16::from_raw(*kind), tci: Be16::from_raw((*tag).tci) };
        *kind = (*tag).kind;
        Ok(seen)
    }
}
