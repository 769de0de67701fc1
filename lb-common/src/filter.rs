//! The port filter: what is not ours leaves before any table is asked.
//!
//! Four bitmaps of 65,536 ports, 32 KiB in all, of which traffic touches a few cache lines. A clear bit is a
//! promise that no listener, connection or reply can match; a set bit promises nothing.

use crate::net::{Be16, TCP};

/// Words of the filter table.
pub const FILTER_WORDS: usize = 4 * 1024;

/// Which port of a packet a bitmap speaks of.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Side {
    /// A published port, or a source port that snat uses.
    Destination = 0,
    /// A target port that replies come from.
    Source = 2,
}

/// The word of the filter table and the bit in it that stand for a port.
///
/// Any protocol but TCP is taken as UDP.
#[inline(always)]
pub const fn position(side: Side, protocol: u8, port: Be16) -> (u32, u64) {
    let bitmap = side as u32 + (protocol != TCP) as u32;
    let port = port.get() as u32;
    (bitmap * 1024 + port / 64, 1 << (port % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::net::UDP;

    #[test]
    fn every_port_has_a_place_of_its_own() {
        let mut seen = HashSet::new();
        for side in [Side::Destination, Side::Source] {
            for protocol in [TCP, UDP] {
                for port in 0..=u16::MAX {
                    let (word, bit) = position(side, protocol, Be16::new(port));
                    assert!((word as usize) < FILTER_WORDS);
                    assert!(seen.insert((word, bit)));
                }
            }
        }
        assert_eq!(seen.len(), FILTER_WORDS * 64);
    }
}
