//! Clients of tasks that have the other family alone: what the two sides of a translator (RFC 7915) know each other by.
//!
//! Within a node a task has an address of the family that it does not have itself; no packet with it leaves the node. So
//! connections, tunnel and replies know the client's family alone, and only where the task is attached are packets translated.
//!
//! - A task that has IPv4 alone has its address behind a prefix ([`PREFIX`], RFC 6052), and sees each IPv6 client as an address of a
//!   pool, [`PoolEntry`].
//! - A task that has IPv6 alone has a stand-in ([`is_stand_in`]), and sees each IPv4 client as his address behind the prefix.

use crate::{
    conntrack::elapsed,
    net::{V4, V6},
    pod,
};

/// The first 96 bits of what an IPv4 address is in IPv6: 64:ff9b:1:6c62::/96, of the range that RFC 8215 leaves to translators. Clients'
/// may have another third word.
pub const PREFIX: [u32; 3] = [0x0064_ff9b_u32.to_be(), 0x0001_6c62_u32.to_be(), 0];

/// What an IPv4 address is in IPv6.
#[inline(always)]
pub const fn embed(address: V4) -> V6 {
    embed_in(PREFIX[2], address)
}

/// The same behind the prefix with this third word, network order.
#[inline(always)]
pub const fn embed_in(third: u32, address: V4) -> V6 {
    V6([PREFIX[0], PREFIX[1], third, address.0])
}

/// The reverse of [`embed`]; `None` of any other address.
#[inline(always)]
pub const fn embedded(address: &V6) -> Option<V4> {
    embedded_in(PREFIX[2], address)
}

/// The reverse of [`embed_in`].
#[inline(always)]
pub const fn embedded_in(third: u32, address: &V6) -> Option<V4> {
    let [first, second, its, last] = address.0;
    if first == PREFIX[0] && second == PREFIX[1] && its == third { Some(V4(last)) } else { None }
}

/// The first of the addresses that stand in for tasks which have IPv6 alone, in host order: 240.0.0.0/4, which nobody has (RFC 1112,
/// 4).
pub const STAND_INS: u32 = 0xf000_0000;
/// Bits by which stand-ins differ.
pub const STAND_IN_BITS: u32 = 28;

/// Whether an address is one that a task with IPv6 alone has within its node.
#[inline(always)]
pub const fn is_stand_in(address: V4) -> bool {
    u32::from_be(address.0) >> STAND_IN_BITS == STAND_INS >> STAND_IN_BITS
}

/// Bytes by which IPv6's header is longer than IPv4's.
pub const LONGER: u32 = 20;

/// The longest IPv4 packet that may be cut on its way, in bytes, where IPv6's said nothing of it (RFC 7915, 5.1).
pub const MAY_BE_CUT: u32 = 1_260;

/// An address of the pool is nobody's.
pub const FREE: u32 = 0;
/// It is being given to a client.
pub const BUSY: u32 = 1;
/// A client has it of whom a task heard, and nobody knows that he exists.
pub const NEW: u32 = 2;
/// A task has answered him.
pub const ANSWERED: u32 = 3;
/// He went on after that: only user space takes it from him, when he has no connection any more.
pub const CONFIRMED: u32 = 4;

/// The first addresses of the pool that are nobody's: that of the network, and that of all routers ([`ROUTER`]).
pub const RESERVED: u32 = 2;
/// The number of the address from which errors come whose sender is no client: a router's, which has none of IPv4 (RFC 6791).
pub const ROUTER: u32 = 1;
/// The most addresses that a pool has, as a power of two.
pub const MOST_BITS: u32 = 16;
/// The fewest.
pub const LEAST_BITS: u32 = 4;
/// Addresses of the pool that are tried for a client.
pub const TRIES: u32 = 16;
/// A pool is in so many parts, as a power of two: who holds an IPv6 network of 48 bits takes no more than one of them.
pub const PART_BITS: u32 = 4;

/// One address of the pool: which client it stands for.
///
/// `word` says whose the rest is: who changes the client's address has swapped it for [`BUSY`] before. User space frees an address
/// by the same swap, in the mapped table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolEntry {
    /// State in the upper half; in the lower one when the client was last heard, jiffies, low 32 bits, about every second.
    pub word: u64,
    /// The client.
    pub client: V6,
    /// When he was given the address: jiffies, low 32 bits.
    pub since: u32,
    /// Zero.
    pub _pad: u32,
}

const _: () = assert!(size_of::<PoolEntry>() == 32);

pod!(PoolEntry);

/// The word of an entry.
#[inline(always)]
pub const fn word(state: u32, seen: u32) -> u64 {
    (state as u64) << 32 | seen as u64
}

/// The state of a word.
#[inline(always)]
pub const fn state(word: u64) -> u32 {
    (word >> 32) as u32
}

/// When the client was last heard.
#[inline(always)]
pub const fn seen(word: u64) -> u32 {
    word as u32
}

/// Whether a client has the address.
#[inline(always)]
pub const fn is_held(word: u64) -> bool {
    state(word) >= NEW
}

/// The state after the client has sent something.
#[inline(always)]
pub const fn after_request(state: u32) -> u32 {
    if state == ANSWERED { CONFIRMED } else { state }
}

/// The state after a task has answered.
#[inline(always)]
pub const fn after_reply(state: u32) -> u32 {
    if state == NEW { ANSWERED } else { state }
}

/// For how long an entry is better to be given to another client than others: the longest silent of those that are nobody's or of
/// whom nobody knows that he exists. `None` of one that is somebody's.
#[inline(always)]
pub const fn silence(word: u64, now: u32) -> Option<u32> {
    match state(word) {
        FREE => Some(u32::MAX),
        NEW | ANSWERED => Some(elapsed(seen(word), now)),
        _ => None,
    }
}

/// A type, a code, and the word after the checksum in host order, of an ICMP error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IcmpError {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// The word after the checksum: a length, a place, or nothing.
    pub rest: u32,
}

impl IcmpError {
    const fn new(kind: u8, code: u8, rest: u32) -> Self {
        Self { kind, code, rest }
    }

    /// The ICMP error that says what this ICMPv6 error does; `None` if there is none (RFC 7915, 5.2).
    #[inline(always)]
    pub const fn to_v4(self) -> Option<Self> {
        Some(match (self.kind, self.code) {
            (1, 0 | 2 | 3) => Self::new(3, 1, 0),
            (1, 1) => Self::new(3, 10, 0),
            (1, 4) => Self::new(3, 3, 0),
            (2, _) => {
                let mtu = self.rest.saturating_sub(LONGER);
                Self::new(3, 4, if mtu > 0xffff { 0xffff } else { mtu })
            }
            (3, code) => Self::new(11, code, 0),
            (4, 0) => match place_in_v4(self.rest) {
                Some(place) => Self::new(12, 0, place << 24),
                None => return None,
            },
            (4, 1) => Self::new(3, 2, 0),
            _ => return None,
        })
    }

    /// The ICMPv6 error that says what this ICMP error about a packet of so many bytes does; `None` if there is none (RFC 7915, 4.2).
    #[inline(always)]
    pub const fn to_v6(self, bytes: u16) -> Option<Self> {
        Some(match (self.kind, self.code) {
            (3, 0 | 1 | 5 | 6 | 7 | 8 | 11 | 12) => Self::new(1, 0, 0),
            (3, 2) => Self::new(4, 1, 6),
            (3, 3) => Self::new(1, 4, 0),
            (3, 4) => {
                let said = self.rest & 0xffff;
                let mtu = if said == 0 { plateau(bytes) } else { said } + LONGER;
                // Less no sender of IPv6 believes (RFC 8201, 4).
                Self::new(2, 0, if mtu < 1_280 { 1_280 } else { mtu })
            }
            (3, 9 | 10 | 13 | 15) => Self::new(1, 1, 0),
            (11, code) => Self::new(3, code, 0),
            (12, 0 | 2) => match place_in_v6(self.rest >> 24) {
                Some(place) => Self::new(4, 0, place),
                None => return None,
            },
            _ => return None,
        })
    }
}

/// Where in an IPv4 header the field lies that lies here in an IPv6 header, in bytes (RFC 7915, figure 6).
#[inline(always)]
const fn place_in_v4(place: u32) -> Option<u32> {
    Some(match place {
        0 | 1 => place,
        4 | 5 => 2,
        6 => 9,
        7 => 8,
        8..=23 => 12,
        24..=39 => 16,
        _ => return None,
    })
}

/// The reverse (RFC 7915, figure 3).
#[inline(always)]
const fn place_in_v6(place: u32) -> Option<u32> {
    Some(match place {
        0 | 1 => place,
        2 | 3 => 4,
        8 => 7,
        9 => 6,
        12..=15 => 8,
        16..=19 => 24,
        _ => return None,
    })
}

/// The next length below that of a packet which did not pass, where a router does not say what would (RFC 1191, 7).
#[inline(always)]
const fn plateau(bytes: u16) -> u32 {
    match bytes {
        0..=1_006 => 508,
        1_007..=1_492 => 1_006,
        1_493..=2_002 => 1_492,
        2_003..=4_352 => 2_002,
        4_353..=8_166 => 4_352,
        8_167..=17_914 => 8_166,
        17_915..=32_000 => 17_914,
        _ => 32_000,
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::net::Address as _;

    #[test]
    fn a_task_s_address_lies_behind_the_prefix_and_comes_out_again() {
        let task = V4::from(Ipv4Addr::new(172, 18, 0, 3));
        assert_eq!(embed(task).to_ip().to_string(), "64:ff9b:1:6c62::ac12:3");
        assert_eq!(embedded(&embed(task)), Some(task));
        let other: Ipv6Addr = "64:ff9b:1::ac12:3".parse().unwrap();
        assert_eq!(embedded(&V6::from(other)), None);
    }

    #[test]
    fn only_who_went_on_after_an_answer_keeps_an_address() {
        let mut state = NEW;
        for (then, expected) in [
            (after_request as fn(u32) -> u32, NEW),
            (after_reply, ANSWERED),
            (after_reply, ANSWERED),
            (after_request, CONFIRMED),
            (after_reply, CONFIRMED),
        ] {
            state = then(state);
            assert_eq!(state, expected);
        }
        let silent = |state, seen| silence(word(state, seen), 1_000);
        assert_eq!((silent(CONFIRMED, 0), silent(BUSY, 0)), (None, None));
        assert!(silent(FREE, 1_000) > silent(NEW, 0) && silent(NEW, 0) > silent(ANSWERED, 900));
        // The clock goes round.
        assert!(silence(word(NEW, u32::MAX - 10), 5) < silence(word(NEW, u32::MAX - 10), 50));
    }

    /// The tables of RFC 7915, 4.2 and 5.2, figures 3 and 6.
    #[test]
    fn errors_say_in_the_other_family_what_they_said() {
        let error = |kind, code, rest| IcmpError { kind, code, rest };
        for (six, four) in [
            ((1, 0, 0), Some((3, 1, 0))),
            ((1, 1, 0), Some((3, 10, 0))),
            ((1, 2, 0), Some((3, 1, 0))),
            ((1, 3, 0), Some((3, 1, 0))),
            ((1, 4, 0), Some((3, 3, 0))),
            ((1, 5, 0), None),
            ((2, 0, 1_280), Some((3, 4, 1_260))),
            ((2, 0, 9_000), Some((3, 4, 8_980))),
            ((3, 0, 0), Some((11, 0, 0))),
            ((3, 1, 0), Some((11, 1, 0))),
            ((4, 0, 0), Some((12, 0, 0))),
            ((4, 0, 1), Some((12, 0, 1 << 24))),
            ((4, 0, 2), None),
            ((4, 0, 4), Some((12, 0, 2 << 24))),
            ((4, 0, 6), Some((12, 0, 9 << 24))),
            ((4, 0, 7), Some((12, 0, 8 << 24))),
            ((4, 0, 23), Some((12, 0, 12 << 24))),
            ((4, 0, 39), Some((12, 0, 16 << 24))),
            ((4, 0, 40), None),
            ((4, 1, 6), Some((3, 2, 0))),
            ((4, 2, 6), None),
            ((128, 0, 0), None),
        ] {
            let expected = four.map(|(kind, code, rest)| error(kind, code, rest));
            assert_eq!(error(six.0, six.1, six.2).to_v4(), expected, "{six:?}");
        }
        for (four, six) in [
            ((3, 0, 0), Some((1, 0, 0))),
            ((3, 1, 0), Some((1, 0, 0))),
            ((3, 2, 0), Some((4, 1, 6))),
            ((3, 3, 0), Some((1, 4, 0))),
            ((3, 4, 1_400), Some((2, 0, 1_420))),
            // A word of zero before the length, and one that is not (RFC 4884).
            ((3, 4, 0x0200_0000 | 1_400), Some((2, 0, 1_420))),
            ((3, 4, 576), Some((2, 0, 1_280))),
            ((3, 4, 0), Some((2, 0, 1_512))),
            ((3, 9, 0), Some((1, 1, 0))),
            ((3, 13, 0), Some((1, 1, 0))),
            ((3, 14, 0), None),
            ((3, 16, 0), None),
            ((11, 1, 0), Some((3, 1, 0))),
            ((12, 0, 8 << 24), Some((4, 0, 7))),
            ((12, 2, 16 << 24), Some((4, 0, 24))),
            ((12, 1, 0), None),
            ((12, 0, 10 << 24), None),
            ((8, 0, 0), None),
        ] {
            let expected = six.map(|(kind, code, rest)| error(kind, code, rest));
            assert_eq!(error(four.0, four.1, four.2).to_v6(1_500), expected, "{four:?}");
        }
    }
}
