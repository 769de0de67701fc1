//! What ranges of addresses are to this node: nobody out there can have one of its own, or one of its containers'.

use std::{collections::BTreeMap, net::IpAddr};

use aya::maps::lpm_trie::Key;
use lb_common::{
    net::Wide,
    tunnel::{mapped, unmapped},
};

use super::{DatapathError, tables::TableSet};

/// Ranges, by their first address and the length of their prefix in bits: one of [`lb_common::abi::inner`].
pub type InnerRanges = BTreeMap<(IpAddr, u8), u32>;

/// Bits before an IPv4 address where it is mapped.
const MAPPED: u32 = 96;

/// Bits of a range's address, mapped, that decide, by the length of its prefix.
pub(super) fn bits(address: IpAddr, prefix: u8) -> u32 {
    u32::from(prefix) + if address.is_ipv4() { MAPPED } else { 0 }
}

/// The length of its prefix, by the bits that decide.
pub(super) fn prefix(address: IpAddr, bits: u32) -> u8 {
    bits.saturating_sub(if address.is_ipv4() { MAPPED } else { 0 }) as u8
}

fn key((address, prefix): &(IpAddr, u8)) -> Key<Wide> {
    Key::new(bits(*address, *prefix), mapped(*address))
}

fn range(key: &Key<Wide>) -> (IpAddr, u8) {
    let address = unmapped(key.data());
    (address, prefix(address, key.prefix_len()))
}

impl TableSet {
    /// Makes the table hold these ranges and no other.
    ///
    /// # Errors
    /// The kernel refuses a read or a write.
    pub(super) fn set_inner_ranges(&mut self, wanted: &InnerRanges) -> Result<(), DatapathError> {
        let read: Result<InnerRanges, _> =
            self.inner_ranges.iter().map(|entry| entry.map(|(key, what)| (range(&key), what))).collect();
        let there = read.map_err(|error| DatapathError::map("read", error))?;
        let written = |error| DatapathError::map("write", error);
        for gone in there.keys().filter(|range| !wanted.contains_key(range)) {
            self.inner_ranges.remove(&key(gone)).map_err(written)?;
        }
        for (range, what) in wanted.iter().filter(|(range, what)| there.get(range) != Some(what)) {
            self.inner_ranges.insert(&key(range), what, 0).map_err(written)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_told_from_its_key() {
        for (address, prefix) in [("172.18.0.0", 16), ("0.0.0.0", 0), ("fd00:1::", 64), ("10.0.0.7", 32)] {
            let wanted = (address.parse().unwrap(), prefix);
            assert_eq!(range(&key(&wanted)), wanted);
        }
    }
}
