//! Network-order numbers and addresses of both families.
//!
//! Values are kept exactly as they lie in a packet, in whole words, so that a load from a packet, a table key
//! and a comparison cost one instruction each. The code of the datapath is generic over [`Address`].

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::pod;

/// IP protocol number of TCP (RFC 9293).
pub const TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const UDP: u8 = 17;
/// IP protocol number of ICMP (RFC 792).
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6 (RFC 4443).
pub const ICMP6: u8 = 58;

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct Be16(u16);

impl Be16 {
    /// From a number in host byte order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// From the word as it lies in a packet.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// The word as it lies in a packet.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// The number in host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl core::fmt::Debug for Be16 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.get().fmt(f)
    }
}

/// An IPv4 address as it lies in a packet.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct V4(pub u32);

/// An IPv6 address as it lies in a packet.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct V6(pub [u32; 4]);

/// An address wide enough for either family; IPv4 uses the first word and leaves the rest zero.
pub type Wide = [u32; 4];

/// An address of one family, as tables and packets hold it.
pub trait Address: Copy + Eq + Default + core::fmt::Debug + 'static {
    /// Whether this is the IPv4 family.
    const IS_V4: bool;

    /// The one's complement sum of the address's 16-bit words, not folded (RFC 1071).
    fn sum(self) -> u32;

    /// Widened for a family-agnostic table.
    fn to_wide(self) -> Wide;

    /// Narrowed from a family-agnostic table; IPv4 takes the first word.
    fn from_wide(wide: Wide) -> Self;

    /// The same without a copy: the address in place.
    fn in_wide(wide: &Wide) -> &Self;

    /// Widened with IPv4 as an IPv4-mapped address (RFC 4291, 2.5.5.2), for tables that hold both families.
    fn to_mapped(self) -> Wide;

    /// Whether nobody can have it as a packet's source on a wire: of IPv4 0/8, 127/8 and 224/3 (RFC 1122, 3.2.1.3; RFC 1112, 7.2),
    /// of IPv6 ::, ::1 and ff00::/8 (RFC 4291, 2.5.2, 2.5.3, 2.7).
    fn is_martian(self) -> bool;

    /// As the standard library's address.
    fn to_ip(self) -> IpAddr;
}

#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

impl Address for V4 {
    const IS_V4: bool = true;

    #[inline(always)]
    fn sum(self) -> u32 {
        halves(self.0)
    }

    #[inline(always)]
    fn to_wide(self) -> Wide {
        [self.0, 0, 0, 0]
    }

    #[inline(always)]
    fn from_wide(wide: Wide) -> Self {
        Self(wide[0])
    }

    #[inline(always)]
    fn in_wide(wide: &Wide) -> &Self {
        // SAFETY: `V4` is a transparent `u32`, and the first word is one.
        unsafe { &*wide.as_ptr().cast() }
    }

    #[inline(always)]
    fn to_mapped(self) -> Wide {
        [0, 0, 0xffff_u32.to_be(), self.0]
    }

    #[inline(always)]
    fn is_martian(self) -> bool {
        let first = self.0.to_ne_bytes()[0];
        first == 0 || first == 127 || first >= 224
    }

    fn to_ip(self) -> IpAddr {
        Ipv4Addr::from(self.0.to_ne_bytes()).into()
    }
}

impl Address for V6 {
    const IS_V4: bool = false;

    #[inline(always)]
    fn sum(self) -> u32 {
        halves(self.0[0]) + halves(self.0[1]) + halves(self.0[2]) + halves(self.0[3])
    }

    #[inline(always)]
    fn to_wide(self) -> Wide {
        self.0
    }

    #[inline(always)]
    fn from_wide(wide: Wide) -> Self {
        Self(wide)
    }

    #[inline(always)]
    fn in_wide(wide: &Wide) -> &Self {
        // SAFETY: `V6` is a transparent `Wide`.
        unsafe { &*wide.as_ptr().cast() }
    }

    #[inline(always)]
    fn to_mapped(self) -> Wide {
        self.0
    }

    #[inline(always)]
    fn is_martian(self) -> bool {
        let [first, second, third, fourth] = self.0;
        first.to_ne_bytes()[0] == 0xff || first | second | third == 0 && u32::from_be(fourth) <= 1
    }

    fn to_ip(self) -> IpAddr {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(self.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).into()
    }
}

impl From<Ipv4Addr> for V4 {
    fn from(address: Ipv4Addr) -> Self {
        Self(u32::from_ne_bytes(address.octets()))
    }
}

impl From<Ipv6Addr> for V6 {
    fn from(address: Ipv6Addr) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(address.octets().chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        Self(words)
    }
}

/// Either family's address, widened.
pub fn wide(address: IpAddr) -> Wide {
    match address {
        IpAddr::V4(v4) => V4::from(v4).to_wide(),
        IpAddr::V6(v6) => V6::from(v6).to_wide(),
    }
}

impl core::fmt::Debug for V4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.to_ip(), f)
    }
}

impl core::fmt::Debug for V6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.to_ip(), f)
    }
}

pod!(Be16, V4, V6);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_into_tables_and_back() {
        for text in ["192.0.2.1", "2001:db8::1:2", "::ffff:0:1", "255.255.255.255"] {
            let ip: IpAddr = text.parse().unwrap();
            let back = match ip {
                IpAddr::V4(_) => {
                    V4::from_wide(wide(ip)).to_ip() == ip && V4::in_wide(&wide(ip)).to_ip() == ip
                }
                IpAddr::V6(_) => {
                    V6::from_wide(wide(ip)).to_ip() == ip && V6::in_wide(&wide(ip)).to_ip() == ip
                }
            };
            assert!(back, "{text}");
        }
    }

    #[test]
    fn ports_lie_in_network_order() {
        assert_eq!(Be16::new(80).raw().to_ne_bytes(), [0, 80]);
        assert_eq!(Be16::from_raw(Be16::new(8080).raw()).get(), 8080);
    }
}
