//! Internet checksum updates (RFC 1071, RFC 1624).
//!
//! A rewrite changes the same words in every packet of a connection, so the change of the sum is computed once, when
//! the connection is made, as a *delta*, and added to each packet's checksum. Sums are taken over words as they lie
//! in the packet: the one's complement sum does not depend on the byte order (RFC 1071, 2.B).

use crate::net::{Address, Be16};

/// What a rewrite adds to the one's complement sum of the words it changes, folded to 16 bits.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Delta(u16);

/// Folds a sum of 16-bit words to 16 bits with end-around carry.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

impl Delta {
    /// No change.
    pub const NONE: Self = Self(0);

    /// What one hop less adds to an IPv4 header's sum: TTL is the first byte of its word (RFC 791).
    pub const IPV4_HOP: Self = Self::of_word(Be16::new(0x0100).raw(), 0);

    /// What one hop less adds to an IPv6 header's sum: the hop limit is the second byte of its word (RFC 8200).
    pub const IPV6_HOP: Self = Self::of_word(Be16::new(0x0001).raw(), 0);

    /// From the folded value.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// The folded value.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// The change from one word to another.
    #[inline(always)]
    pub const fn of_word(old: u16, new: u16) -> Self {
        Self(fold(!old as u32 + new as u32))
    }

    /// The change from one port to another.
    #[inline(always)]
    pub const fn of_port(old: Be16, new: Be16) -> Self {
        Self::of_word(old.raw(), new.raw())
    }

    /// The change from one address to another.
    #[inline(always)]
    pub fn of_address<A: Address>(old: A, new: A) -> Self {
        Self::of_word(fold(old.sum()), fold(new.sum()))
    }

    /// Both changes.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(fold(self.0 as u32 + other.0 as u32))
    }

    /// The change that takes this one back.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self(!self.0)
    }

    /// The checksum after the change: `~(~HC + ~m + m')`, equation 3 of RFC 1624.
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(!checksum as u32 + self.0 as u32)
    }
}

/// The folded sum of a TCP or UDP pseudo header (RFC 9293 3.1, RFC 768, RFC 8200 8.1), words as in the packet.
///
/// A local stack that leaves the rest to the device stores exactly this in the checksum field
/// (`CHECKSUM_PARTIAL`). `length` is that of header and payload in bytes.
#[inline(always)]
pub fn pseudo_header<A: Address>(source: A, destination: A, protocol: u8, length: u16) -> u16 {
    fold(source.sum() + destination.sum() + (protocol as u16).to_be() as u32 + length.to_be() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::V4;

    /// RFC 1624, section 4: a header whose checksum is 0xDD2F, one word going from 0x5555 to 0x3285.
    #[test]
    fn matches_the_example_of_rfc_1624() {
        let (old, new) = (0x5555_u16.to_be(), 0x3285_u16.to_be());
        assert_eq!(Delta::of_word(old, new).apply(0xdd2f_u16.to_be()), 0x0000_u16.to_be());
    }

    fn full(words: &[u16]) -> u16 {
        !fold(words.iter().map(|w| u32::from(*w)).sum())
    }

    #[test]
    fn equals_a_full_computation_and_reverses() {
        let mut seed = 1_u32;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) as u16
        };
        for _ in 0..100_000 {
            let (a, b, c, d, rest) = (next(), next(), next(), next(), next() | 1);
            let delta = Delta::of_word(a, c).and(Delta::of_word(b, d));
            let (before, after) = (full(&[a, b, rest]), full(&[c, d, rest]));
            assert_eq!(delta.apply(before), after);
            // 0x0000 and 0xffff are one number in one's complement.
            let back = delta.reversed().apply(after);
            assert!(back == before || back ^ before == 0xffff && (back == 0 || before == 0));
        }
    }

    #[test]
    fn pseudo_header_is_the_sum_of_its_words() {
        let (s, d) =
            (V4::from(core::net::Ipv4Addr::new(1, 2, 3, 4)), V4::from(core::net::Ipv4Addr::new(5, 6, 7, 8)));
        let sum = pseudo_header(s, d, 6, 20);
        assert_eq!(u16::from_be(sum), 0x0102 + 0x0304 + 0x0506 + 0x0708 + 6 + 20);
    }
}
