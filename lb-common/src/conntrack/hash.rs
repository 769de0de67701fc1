//! Where a line lies: universal hashes (NH, RFC 4418) of secret keys, so that nobody who chooses addresses and ports
//! chooses a set.

use super::line::{FiveTuple, WAYS};
use crate::{
    net::{Address, Be16},
    pod,
};

/// Keys of the hashes: random, made once with the tables, kept as long as these are.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HashKeys {
    /// Added to the words of what is hashed.
    pub words: [u32; 12],
    /// Multiplies the sum; odd.
    pub multiplier: u64,
}

const _: () = assert!(size_of::<HashKeys>() == 56);

pod!(HashKeys);

/// Where the lines of one endpoint begin, or those of one five-tuple: a set, and a position in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// Index of the set.
    pub set: u32,
    /// The way that a line takes first, and whose home word tells of the others.
    pub way: u32,
}

impl Place {
    /// This one where the mask is zero, the other where it is all ones: without a branch.
    #[inline(always)]
    pub const fn or(self, other: Self, mask: u32) -> Self {
        Self { set: self.set ^ (self.set ^ other.set) & mask, way: self.way ^ (self.way ^ other.way) & mask }
    }
}

impl HashKeys {
    #[inline(always)]
    fn pair(&self, one: u32, other: u32, at: usize) -> u64 {
        let one = one.wrapping_add(self.words[at]) as u64;
        let other = other.wrapping_add(self.words[at + 1]) as u64;
        one.wrapping_mul(other)
    }

    #[inline(always)]
    fn finish(&self, sum: u64) -> u64 {
        let hash = (sum ^ sum >> 32).wrapping_mul(self.multiplier);
        hash ^ hash >> 32
    }

    /// The hash of an endpoint: an address, a port and a protocol.
    #[inline(always)]
    pub fn endpoint<A: Address>(&self, address: &A, port: Be16, protocol: u8) -> u64 {
        let rest = (port.raw() as u32) << 16 | protocol as u32;
        if A::IS_V4 {
            let wide = address.to_wide();
            return self.finish(self.pair(wide[0], rest, 0));
        }
        let wide = address.to_wide();
        let sum = self
            .pair(wide[0], wide[1], 0)
            .wrapping_add(self.pair(wide[2], wide[3], 2))
            .wrapping_add(self.pair(rest, 0, 4));
        self.finish(sum)
    }

    /// The hash of a whole five-tuple, made of its endpoint's.
    #[inline(always)]
    pub fn tuple<A: Address>(&self, endpoint: u64, tuple: &FiveTuple<A>) -> u64 {
        let rest = (tuple.destination_port.raw() as u32) << 16 | tuple.kind as u32;
        let wide = tuple.destination.to_wide();
        let mut sum = self.pair(endpoint as u32, rest, 6).wrapping_add(self.pair(wide[0], wide[1], 8));
        if !A::IS_V4 {
            sum = sum.wrapping_add(self.pair(wide[2], wide[3], 10));
        }
        self.finish(sum.wrapping_add(endpoint))
    }
}

/// A number below `limit` of 32 bits of a hash, each as likely.
#[inline(always)]
const fn below(hash: u32, limit: u32) -> u32 {
    ((hash as u64 * limit as u64) >> 32) as u32
}

/// Where the lines of an endpoint begin.
#[inline(always)]
pub const fn home(endpoint: u64, sets: u32) -> Place {
    Place { set: below(endpoint as u32, sets), way: (endpoint >> 61) as u32 % WAYS }
}

/// The two other sets of a five-tuple whose endpoint has its home there: neither is the home, nor are they one. There are
/// three sets at least.
#[inline(always)]
pub const fn others(home: u32, tuple: u64, sets: u32) -> [Place; 2] {
    let first = 1 + below(tuple as u32, sets - 1);
    let mut second = 1 + below((tuple >> 32) as u32, sets - 2);
    if second >= first {
        second += 1;
    }
    [
        Place { set: around(home + first, sets), way: (tuple >> 40) as u32 % WAYS },
        Place { set: around(home + second, sets), way: (tuple >> 8) as u32 % WAYS },
    ]
}

#[inline(always)]
const fn around(set: u32, sets: u32) -> u32 {
    if set >= sets { set - sets } else { set }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{TCP, V4, V6};

    fn keys() -> HashKeys {
        let mut state = 0x9e37_79b9_u32;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        HashKeys { words: core::array::from_fn(|_| next()), multiplier: 0x9e37_79b9_7f4a_7c15 | 1 }
    }

    #[test]
    fn the_three_sets_of_a_tuple_are_three() {
        let keys = keys();
        for sets in [3, 4, 5, 1_000] {
            for port in 0..2_000_u16 {
                let client = V4(0x0a00_0001);
                let tuple = FiveTuple::new(client, V4(1), Be16::new(port), Be16::new(80), TCP);
                let endpoint = keys.endpoint(&client, tuple.source_port, TCP);
                let home = home(endpoint, sets);
                let [one, other] = others(home.set, keys.tuple(endpoint, &tuple), sets);
                assert!(home.set < sets && one.set < sets && other.set < sets);
                assert!(home.set != one.set && home.set != other.set && one.set != other.set);
                assert!(home.way < WAYS && one.way < WAYS && other.way < WAYS);
            }
        }
    }

    #[test]
    fn sets_are_taken_evenly() {
        fn spread(first: usize, places: impl Iterator<Item = Place>) {
            let mut counts = [[0_u32; WAYS as usize]; 16];
            let mut all = 0;
            for place in places {
                counts[place.set as usize][place.way as usize] += 1;
                all += 1;
            }
            let mean = f64::from(all) / ((16 - first) as f64 * 8.0);
            // None lies in the set that is the home.
            for count in counts[first..].iter().flatten() {
                assert!((f64::from(*count) - mean).abs() < 6.0 * mean.sqrt(), "{counts:?}");
            }
        }
        let keys = keys();
        spread(0, (1..=60_000).map(|port| home(keys.endpoint(&V4(7), Be16::new(port), TCP), 16)));
        spread(0, (1..60_000).map(|n| home(keys.endpoint(&V6([1, 0, 0, n]), Be16::new(9), TCP), 16)));
        spread(
            1,
            (1..=60_000)
                .map(|port| {
                    let tuple = FiveTuple::new(V4(7), V4(9), Be16::new(1), Be16::new(port), TCP);
                    others(0, keys.tuple(keys.endpoint(&V4(7), Be16::new(1), TCP), &tuple), 17)[1]
                })
                .filter(|place| place.set < 16),
        );
    }
}
