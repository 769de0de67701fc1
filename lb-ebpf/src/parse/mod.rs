//! Parsing: a frame into a packet. Check, advance, say what comes next; nothing here writes the frame or looks anything up.
//! Imports `wire` and `io`.

pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod transport;

use lb_common::{
    net::{Be16, V4, V6},
    outcome::Outcome,
    tags::{Tags, VlanTag},
};

use crate::{
    io::{
        frame::Frame,
        packet::{Link, Packet, Scratch},
    },
    wire::ethernet::{Ethernet, GROUP, IPV4, IPV6, Tag, is_tag},
};

/// What [`frame`] answers for an IPv4 packet.
pub const IS_IPV4: u32 = 0;
/// What [`frame`] answers for an IPv6 packet.
pub const IS_IPV6: u32 = 1;
/// What [`frame`] answers for an outcome: this and its discriminant.
pub const IS_OUTCOME: u32 = 2;

/// What of a family's header the fast path reads.
pub trait Simple: Sized {
    /// Reads the header, behind a link header without tags, of a TCP or UDP packet that has nothing unusual; false if it
    /// has.
    fn simple<F: Frame>(frame: &F, packet: &mut Packet<Self>) -> bool;
}

impl Simple for V4 {
    #[inline(always)]
    fn simple<F: Frame>(frame: &F, packet: &mut Packet<Self>) -> bool {
        ipv4::simple(frame, packet)
    }
}

impl Simple for V6 {
    #[inline(always)]
    fn simple<F: Frame>(frame: &F, packet: &mut Packet<Self>) -> bool {
        ipv6::simple(frame, packet)
    }
}

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
        Some(kind) => (Link { network: 0, tags: Tags::NONE, source: [0; 3] }, kind),
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
    let header = frame.read::<Ethernet>(0).ok_or(Outcome::Malformed)?;
    let (destination, source, mut kind) = (header.destination[0], header.source, header.kind);
    if destination & GROUP != 0 {
        return Err(Outcome::NotUnicast);
    }
    let mut link = Link { network: size_of::<Ethernet>(), tags: Tags::NONE, source };
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

/// Steps over a tag that lies in the frame's bytes.
#[inline(always)]
fn inline_tag<F: Frame>(frame: &F, at: &mut usize, kind: &mut u16) -> Result<VlanTag, Outcome> {
    let tag = frame.read::<Tag>(*at).ok_or(Outcome::Malformed)?;
    *at += size_of::<Tag>();
    let seen = VlanTag { protocol: Be16::from_raw(*kind), tci: Be16::from_raw(tag.tci) };
    *kind = tag.kind;
    Ok(seen)
}
