//! Ethernet (IEEE 802.3) and VLAN tags (IEEE 802.1Q).

/// A hardware address in words, as it is compared and copied.
pub type Mac = [u16; 3];

/// An Ethernet header.
#[repr(C)]
pub struct Ethernet {
    pub destination: Mac,
    pub source: Mac,
    pub kind: u16,
}

/// A VLAN tag: what stands before the next EtherType.
#[repr(C)]
pub struct Tag {
    pub tci: u16,
    pub kind: u16,
}

/// Bytes of an Ethernet header without tags.
pub const LINK: usize = size_of::<Ethernet>();

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800_u16.to_be();
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd_u16.to_be();
/// Tag protocol of a customer tag.
pub const VLAN: u16 = 0x8100_u16.to_be();
/// Tag protocol of a service tag.
pub const VLAN_SERVICE: u16 = 0x88a8_u16.to_be();
/// The group bit is the lowest of the first byte on the wire.
pub const GROUP: u16 = 0x0100_u16.to_be();

/// Whether an EtherType is that of a tag.
#[inline(always)]
pub fn is_tag(kind: u16) -> bool {
    kind == VLAN || kind == VLAN_SERVICE
}

/// A hardware address of a table as it is written: the compiler would put bytes together one by one.
///
/// The tables' structures are aligned to four bytes at least, and their hardware addresses lie at even offsets.
#[inline(always)]
pub fn words(mac: &[u8; 6]) -> Mac {
    // SAFETY: aligned to two bytes, see above.
    unsafe { (&raw const *mac).cast::<Mac>().read() }
}
