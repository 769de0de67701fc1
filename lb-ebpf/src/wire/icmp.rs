//! ICMP (RFC 792) and ICMPv6 (RFC 4443).

/// The header of a message; the last word depends on the type.
#[repr(C)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    pub checksum: u16,
    pub rest: u32,
}

/// The quote's first eight bytes after its network header are there always (RFC 792).
#[repr(C)]
pub struct QuotedPorts {
    pub source: u16,
    pub destination: u16,
    pub rest: u32,
}

/// "Destination unreachable".
pub const UNREACHABLE: u8 = 3;
/// Its code "fragmentation needed and DF set".
pub const FRAGMENTATION_NEEDED: u8 = 4;
pub const TIME_EXCEEDED: u8 = 11;
pub const PARAMETER_PROBLEM: u8 = 12;
/// "Packet too big" of ICMPv6.
pub const PACKET_TOO_BIG: u8 = 2;
/// ICMPv6 types from here on are no errors (RFC 4443, 2.1).
pub const INFORMATIONAL: u8 = 128;
