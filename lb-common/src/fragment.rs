//! Fragments: the first one of a datagram has its ports, the later ones are known by their identification.

use crate::{
    net::{Be16, V4, V6, Wide},
    pod,
};

/// What the fragments of one datagram have in common (RFC 791, 3.2; RFC 8200, 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct FragmentKey<A> {
    /// Source address, network order.
    pub source: A,
    /// Destination address, network order.
    pub destination: A,
    /// As it lies in the packet; IPv4 uses the lower half.
    pub identification: u32,
    /// IP protocol number of the datagram, in the lowest byte.
    pub protocol: u32,
}

/// The ports of a datagram whose first fragment was forwarded.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    /// Network order.
    pub source: Be16,
    /// Network order.
    pub destination: Be16,
    /// When the first fragment came: jiffies, low 32 bits.
    pub seen: u32,
}

/// Which early fragment: one of a datagram whose first one has not come.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct EarlyKey {
    /// Source address, IPv4 as an IPv4-mapped one.
    pub source: Wide,
    /// Destination address likewise.
    pub destination: Wide,
    /// As it lies in the packet; IPv4 uses the lower half.
    pub identification: u32,
    /// How many of the datagram were held before it: less than [`EARLY_OF_A_DATAGRAM`].
    pub number: u32,
}

/// An early fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Early {
    /// When it came: jiffies, low 32 bits.
    pub seen: u32,
    /// Its bytes from the network header on.
    pub bytes: u32,
    /// What they are.
    pub packet: [u8; EARLY_BYTES],
}

/// Bytes of the longest fragment that is held: more than an Ethernet frame has; a power of two, for the verifier.
pub const EARLY_BYTES: usize = 2_048;
/// Early fragments that are held of one datagram: with the first one 13,000 bytes.
pub const EARLY_OF_A_DATAGRAM: u32 = 8;

/// Seconds for which later fragments follow their first one; receivers give a datagram up after 30 (Linux) or 60
/// (RFC 8200, 4.5), and identifications come around.
pub const FRAGMENT_SECONDS: u32 = 30;

const _: () = {
    assert!(size_of::<FragmentKey<V4>>() == 16 && size_of::<FragmentKey<V6>>() == 40);
    assert!(size_of::<Ports>() == 8);
    assert!(size_of::<EarlyKey>() == 40 && size_of::<Early>() == 8 + EARLY_BYTES);
};

pod!(FragmentKey<V4>, FragmentKey<V6>, Ports, EarlyKey, Early);
