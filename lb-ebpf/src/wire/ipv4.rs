//! IPv4 (RFC 791).

/// A header without options; multi-byte fields in network order.
#[repr(C)]
pub struct Ipv4 {
    pub version_and_length: u8,
    pub tos: u8,
    pub total_length: u16,
    pub identification: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

/// Version 4, and a header without options.
pub const PLAIN: u8 = 0x45;
/// "Don't fragment".
pub const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
/// "More fragments".
pub const MORE: u16 = 0x2000_u16.to_be();
/// The fragment's offset.
pub const OFFSET: u16 = 0x1fff_u16.to_be();
