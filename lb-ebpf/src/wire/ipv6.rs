//! IPv6 (RFC 8200), with the extension headers that may precede TCP and UDP.

/// A header; multi-byte fields in network order.
#[repr(C)]
pub struct Ipv6 {
    pub version_and_flow: u32,
    pub payload_length: u16,
    pub next: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// The fields that hop-by-hop, routing and destination options headers share (RFC 8200, 4.2 to 4.6).
#[repr(C)]
pub struct Extension {
    pub next: u8,
    /// In units of eight bytes, without the first eight.
    pub length: u8,
}

/// The fragment header (RFC 8200, 4.5); multi-byte fields in network order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Fragment {
    pub next: u8,
    pub reserved: u8,
    pub offset: u16,
    pub identification: u32,
}

/// The fragment's offset.
pub const OFFSET: u16 = 0xfff8_u16.to_be();
/// More fragments follow.
pub const MORE: u16 = 1_u16.to_be();

/// What every network that IPv6 uses lets pass, in bytes (RFC 8200, 5): no sender makes its packets shorter than that.
pub const LEAST_MTU: u32 = 1280;
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
/// Next header of a fragment.
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const NO_NEXT: u8 = 59;
pub const DESTINATION_OPTIONS: u8 = 60;
