//! TCP (RFC 9293) and UDP (RFC 768).

use lb_common::net::TCP;

/// A TCP header without options; multi-byte fields in network order.
#[repr(C)]
pub struct Tcp {
    pub source: u16,
    pub destination: u16,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub offset: u8,
    pub flags: u8,
    pub window: u16,
    pub checksum: u16,
    pub urgent: u16,
}

/// A UDP header; fields in network order.
#[repr(C)]
pub struct Udp {
    pub source: u16,
    pub destination: u16,
    pub length: u16,
    pub checksum: u16,
}

/// The ports, with which both begin; network order.
#[repr(C)]
pub struct Ports {
    pub source: u16,
    pub destination: u16,
}

/// Offset of the checksum in a transport header.
#[inline(always)]
pub fn checksum_at(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}
