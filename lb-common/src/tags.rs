//! VLAN tags (IEEE 802.1Q), as frames carry them and as a line of the connection table keeps them.

use crate::{
    conntrack::line::{INNER_SERVICE, INNER_TAG, OUTER_SERVICE, OUTER_TAG},
    net::Be16,
};

/// A VLAN tag: protocol (TPID) and TCI, both network order; zero is no tag.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VlanTag {
    /// 0x8100 or 0x88a8, network order.
    pub protocol: Be16,
    /// Priority and VLAN id, network order.
    pub tci: Be16,
}

/// The VLAN tags of a frame.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tags {
    /// The first on the wire.
    pub outer: VlanTag,
    /// The second; never without the first.
    pub inner: VlanTag,
}

const CUSTOMER: Be16 = Be16::new(0x8100);
const SERVICE: Be16 = Be16::new(0x88a8);

impl VlanTag {
    /// No tag.
    pub const NONE: Self = Self { protocol: Be16::from_raw(0), tci: Be16::from_raw(0) };

    /// The VLAN's id; zero in a tag that has a priority alone.
    #[inline(always)]
    pub const fn id(self) -> u16 {
        self.tci.get() & 0xfff
    }

    /// Whether there is a tag.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.protocol.raw() != 0
    }

    #[inline(always)]
    const fn of(link: u16, (there, service): (u16, u16), tci: Be16) -> Self {
        match link & (there | service) {
            0 => Self::NONE,
            bits if bits & service != 0 => Self { protocol: SERVICE, tci },
            _ => Self { protocol: CUSTOMER, tci },
        }
    }

    #[inline(always)]
    const fn link(self, (there, service): (u16, u16)) -> u16 {
        match self.protocol.raw() {
            0 => 0,
            protocol if protocol == SERVICE.raw() => there | service,
            _ => there,
        }
    }
}

const OUTER: (u16, u16) = (OUTER_TAG, OUTER_SERVICE);
const INNER: (u16, u16) = (INNER_TAG, INNER_SERVICE);

impl Tags {
    /// No tags.
    pub const NONE: Self = Self { outer: VlanTag::NONE, inner: VlanTag::NONE };

    /// Those of a line: its link bits and its two TCIs.
    #[inline(always)]
    pub const fn of_line(link: u16, tci: [Be16; 2]) -> Self {
        Self { outer: VlanTag::of(link, OUTER, tci[0]), inner: VlanTag::of(link, INNER, tci[1]) }
    }

    /// The link bits by which a line keeps them, beside their TCIs.
    #[inline(always)]
    pub const fn link(self) -> u16 {
        self.outer.link(OUTER) | self.inner.link(INNER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_tags_as_they_came() {
        let tag = |protocol, tci| VlanTag { protocol, tci: Be16::new(tci) };
        let kinds = [VlanTag::NONE, tag(CUSTOMER, 0x2007), tag(SERVICE, 0x0fff)];
        for outer in kinds {
            for inner in kinds {
                let tags = Tags { outer, inner };
                assert_eq!(Tags::of_line(tags.link(), [outer.tci, inner.tci]), tags);
            }
        }
    }
}
