//! The layout of the connection table: sets of eight lines, each one connection, in arrays that user space maps.

use crate::{
    net::{Address, Be16, V4, V6},
    pod,
};

/// Lines of a set.
pub const WAYS: u32 = 8;

/// The five-tuple of a packet, and of a line.
///
/// A connection's is that of its requests as the client sends them: (client, listener). An alias' is that of its requests as
/// its task sees them, where a reply would not find the connection by its client: (translated client, task).
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct FiveTuple<A> {
    /// Source address, network order.
    pub source: A,
    /// Destination address, network order.
    pub destination: A,
    /// Network order.
    pub source_port: Be16,
    /// Network order.
    pub destination_port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`CONNECTION`] or [`ALIAS_KEY`]; zero in a packet's.
    pub kind: u8,
    /// Of a line: the low half of [`crate::backend::Backend::generation`] when it was made. Zero in a packet's; not compared.
    pub generation: u16,
}

/// The five-tuple of a connection's requests.
pub const CONNECTION: u8 = 0;
/// The five-tuple of an alias.
pub const ALIAS_KEY: u8 = 1;

/// The bits of the last word of a five-tuple that are compared: all but the generation.
const COMPARED: u64 = u64::MAX >> 16;

/// Has every bit of a sum decide over every bit of the hash. A product's low bits know its factors' low bits alone, and those are
/// what tells few tasks apart: every bit is folded down before each product and after the last.
#[inline(always)]
fn mix(mut hash: u32) -> u32 {
    hash = (hash ^ hash >> 16).wrapping_mul(0x9e37_79b1);
    hash = (hash ^ hash >> 15).wrapping_mul(0x85eb_ca77);
    hash ^ hash >> 16
}

impl<A> FiveTuple<A> {
    /// A packet's.
    #[inline(always)]
    pub const fn new(
        source: A,
        destination: A,
        source_port: Be16,
        destination_port: Be16,
        protocol: u8,
    ) -> Self {
        Self { source, destination, source_port, destination_port, protocol, kind: CONNECTION, generation: 0 }
    }

    /// Words of eight bytes.
    pub const WORDS: usize = size_of::<Self>() / 8;

    /// That of what travels the other way.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self
    where
        A: Copy,
    {
        Self::new(self.destination, self.source, self.destination_port, self.source_port, self.protocol)
    }

    /// The same for all packets of one direction; everybody can compute it.
    #[inline(always)]
    pub fn flow_hash(&self) -> u32
    where
        A: Address,
    {
        let ports = (self.source_port.raw() as u32) << 16 | self.destination_port.raw() as u32;
        mix(self.source.sum() ^ self.destination.sum().rotate_left(16) ^ ports)
    }

    /// The same for all packets of one sender, whatever it sends and where to. Of its words, not of their sum, which is the same for
    /// 10.1.0.5 and 10.0.1.5. So many of its last bits do not count, of IPv6 none or at least 64: senders of one network have one
    /// hash.
    #[inline(always)]
    pub fn source_hash(&self, ignored: u32) -> u32
    where
        A: Address,
    {
        let [first, second, third, fourth] = self.source.to_wide();
        if A::IS_V4 {
            return mix(first & (u32::MAX << (ignored & 31)).to_be());
        }
        // Of none that are left out the shift is none too.
        let network = u64::MAX << (ignored.wrapping_sub(64) & 63);
        let (high, low) = (((network >> 32) as u32).to_be(), (network as u32).to_be());
        let host = if ignored == 0 { u32::MAX } else { 0 };
        mix(mix(mix(mix(first & high) ^ second & low) ^ third & host) ^ fourth & host)
    }

    /// Whether a line has this five-tuple; its generation is not compared.
    ///
    /// # Safety
    /// `line` is valid for reads. Another CPU may write it meanwhile.
    #[inline(always)]
    pub unsafe fn is_of(&self, line: *const Self) -> bool {
        let (own, its) = ((&raw const *self).cast::<u64>(), line.cast::<u64>());
        let mut difference = 0;
        let mut word = 0;
        while word < Self::WORDS {
            let mask = if word + 1 == Self::WORDS { COMPARED } else { u64::MAX };
            // SAFETY: both have this many words, and are aligned to them.
            difference |= unsafe { own.add(word).read() ^ its.add(word).read_volatile() } & mask;
            word += 1;
        }
        difference == 0
    }
}

/// The client sent FIN.
pub const CLIENT_FIN: u32 = 1;
/// The task sent FIN.
pub const TASK_FIN: u32 = 2;
/// Either side sent RST; of an alias: its connection is closed, and its task may remember it.
pub const RESET: u32 = 4;
/// The task answered, seen here or told by its node: of TCP, it took the client's SYN.
pub const ANSWERED: u32 = 8;
/// The client went on after the answer: what it sends cannot be a forgery by somebody who sees no answers.
pub const ESTABLISHED: u32 = 16;
/// When the connection was made there were other tasks that could have taken it.
pub const OTHERS: u32 = 32;
/// The lowest of the bits that count to how many tasks a connection was given without an answer, after the first.
pub const RETRY: u32 = 64;
/// The most that they count.
pub const MAX_RETRIES: u32 = 3;
const RETRY_BITS: u32 = RETRY * MAX_RETRIES;
/// The fast path may send on what changes no state: [`with_fast`] of the rest, kept so that it asks for one bit.
pub const FAST: u32 = 256;
/// It is an exchange of datagrams.
pub const UDP: u32 = 512;
/// The line is an alias.
pub const ALIAS: u32 = 1024;
/// The connection has an alias: its replies find it by that alone.
pub const ALIASED: u32 = 2048;
/// Its client came through another node when the line was made.
pub const FOREIGN: u32 = 4096;
/// Replies go straight to the client, and pass here only until it is established.
pub const ONE_WAY: u32 = 8192;

/// The word of a line that says whose it is and in which state: changed by compare-and-swap alone.
///
/// ```text
/// 0..2 status │ 4..7 way of its home │ 8..32 state │ 32..64 version
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Control(pub u64);

const STATUS: u64 = 3;
const LIVE: u64 = 1;
const CLAIMED: u64 = 2;
const HOME: u32 = 4;
const STATE: u32 = 8;
const STATE_BITS: u64 = 0x00ff_ffff;
const VERSION: u32 = 32;

impl Control {
    /// Whether the line holds a connection or an alias.
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        self.0 & STATUS == LIVE
    }

    /// Whether somebody is making or giving up the line.
    #[inline(always)]
    pub const fn is_claimed(self) -> bool {
        self.0 & CLAIMED != 0
    }

    /// Whether nobody has it.
    #[inline(always)]
    pub const fn is_free(self) -> bool {
        self.0 & STATUS == 0
    }

    /// The way of the set whose home word has a hint to this line.
    #[inline(always)]
    pub const fn home(self) -> u32 {
        (self.0 >> HOME) as u32 & (WAYS - 1)
    }

    /// Bits: [`CLIENT_FIN`] and those after it.
    #[inline(always)]
    pub const fn state(self) -> u32 {
        (self.0 >> STATE & STATE_BITS) as u32
    }

    /// Whether any of these bits is set.
    #[inline(always)]
    pub const fn has(self, bits: u32) -> bool {
        self.0 & (bits as u64) << STATE != 0
    }

    /// Changes whenever the line is given to another, or given anew.
    #[inline(always)]
    pub const fn version(self) -> u32 {
        (self.0 >> VERSION) as u32
    }

    /// The same line in another state.
    #[inline(always)]
    #[must_use]
    pub const fn with_state(self, state: u32) -> Self {
        Self(self.0 & !(STATE_BITS << STATE) | (state as u64 & STATE_BITS) << STATE)
    }

    /// The line as its claimer has it: of the next version, its old home kept so that the hint can be taken away.
    #[inline(always)]
    #[must_use]
    pub const fn claimed(self) -> Self {
        Self(self.next_version().0 | (self.home() as u64) << HOME | CLAIMED)
    }

    /// The line as its claimer gives it to a new owner.
    #[inline(always)]
    #[must_use]
    pub const fn live(self, home: u32, state: u32) -> Self {
        let version = self.0 >> VERSION << VERSION;
        Self(version | (state as u64 & STATE_BITS) << STATE | ((home & (WAYS - 1)) as u64) << HOME | LIVE)
    }

    /// The line as its claimer gives it up.
    #[inline(always)]
    #[must_use]
    pub const fn free(self) -> Self {
        self.next_version()
    }

    #[inline(always)]
    const fn next_version(self) -> Self {
        Self((self.0 >> VERSION).wrapping_add(1) << VERSION)
    }

    /// Whether either side has begun to close.
    #[inline(always)]
    pub const fn is_closing(self) -> bool {
        self.has(CLIENT_FIN | TASK_FIN | RESET)
    }

    /// Whether both sides have closed it, or either has reset it.
    #[inline(always)]
    pub const fn is_over(self) -> bool {
        is_over(self.state())
    }

    /// Whether a SYN begins another connection: both sides have closed this one, or the one that was heard alone, or it was reset.
    /// Before that the task is asked, who answers a SYN that it does not expect by what it expects (RFC 5961, 4.2).
    #[inline(always)]
    pub const fn may_begin_anew(self) -> bool {
        self.is_over() || self.is_closing() && !self.has(ANSWERED)
    }

    /// To how many tasks it was given without an answer, after the first.
    #[inline(always)]
    pub const fn retries(self) -> u32 {
        (self.state() & RETRY_BITS) / RETRY
    }
}

/// [`Control::is_over`] of a state.
#[inline(always)]
pub const fn is_over(state: u32) -> bool {
    state & RESET != 0 || state & (CLIENT_FIN | TASK_FIN) == CLIENT_FIN | TASK_FIN
}

/// The state with [`FAST`] as it has to be: both sides have been heard, neither has begun to close, nothing is unusual.
#[inline(always)]
#[must_use]
pub const fn with_fast(state: u32) -> u32 {
    const LIVES: u32 = ANSWERED | ESTABLISHED;
    const ENDS: u32 = CLIENT_FIN | TASK_FIN | RESET | ALIAS;
    // Of an exchange whose replies pass elsewhere only the client is heard.
    let heard = state & LIVES == LIVES || state & (ONE_WAY | ESTABLISHED) == ONE_WAY | ESTABLISHED;
    if heard && state & ENDS == 0 { state | FAST } else { state & !FAST }
}

/// A line of the table: 64 bytes of IPv4, 128 of IPv6, whose first 64 hold all that a request asks for.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Line<A> {
    /// [`Control`].
    pub control: u64,
    /// Of the *way*, not of what it holds: a bit for each way of the set that holds a line whose home is here (the bit's number
    /// XOR this way's), [`table::SPILLED`](super::table::SPILLED), and a count of what was made.
    pub home: u32,
    /// When the last packet was seen: jiffies, low 32 bits.
    pub seen: u32,
    /// Whose it is.
    pub tuple: FiveTuple<A>,
    /// Index of the task's backend.
    pub backend: u32,
    /// Of TCP: the sequence number of the client's next byte, as far as its packets were seen in order; host order. Of an alias:
    /// the number of its connection's line ([`slot`]).
    pub client_next: u32,
    /// The same of the task. Of an alias: the version of its connection's line.
    pub task_next: u32,
    /// When the next hop to the client was last asked for, in [`HOP_TICK`]s.
    pub hop_seen: u16,
    /// Number of the node through which the client's packets come; zero if they come to this one.
    pub peer: u16,
    /// Hardware address of the client or of the router to it; zero if it is not known.
    pub mac: [u16; 3],
    /// The client's port as the task sees it, network order.
    pub port: Be16,
    /// Largest packet that the way to the client lets pass, in bytes; zero if nothing is known.
    pub mtu: u16,
    /// The client's tags, outer and inner: their TCI, network order.
    pub tci: [Be16; 2],
    /// Which tags there are: [`OUTER_TAG`] and those after it.
    pub link: u16,
}

/// Jiffies of one unit of [`Line::hop_seen`].
pub const HOP_TICK: u32 = 16;

/// The task replies straight to the client, though its packets come through another node.
pub const DIRECT: u16 = 16;

/// There is an outer tag.
pub const OUTER_TAG: u16 = 1;
/// The outer tag is a service tag (0x88a8).
pub const OUTER_SERVICE: u16 = 2;
/// There is an inner tag.
pub const INNER_TAG: u16 = 4;
/// The inner tag is a service tag.
pub const INNER_SERVICE: u16 = 8;

/// A set: what one look into the table brings.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Set<A> {
    /// The lines.
    pub lines: [Line<A>; WAYS as usize],
}

/// The number of a line in the table.
#[inline(always)]
pub const fn slot(set: u32, way: u32) -> u32 {
    set * WAYS + way
}

/// The set of a line's number.
#[inline(always)]
pub const fn set_of(slot: u32) -> u32 {
    slot / WAYS
}

/// The way of a line's number.
#[inline(always)]
pub const fn way_of(slot: u32) -> u32 {
    slot % WAYS
}

const _: () = {
    assert!(size_of::<FiveTuple<V4>>() == 16 && size_of::<FiveTuple<V6>>() == 40);
    assert!(size_of::<Line<V4>>() == 64 && size_of::<Line<V6>>() == 128);
    assert!(core::mem::offset_of!(Line<V6>, task_next) == 64);
    assert!(size_of::<Set<V4>>() == 512 && size_of::<Set<V6>>() == 1024);
};

pod!(FiveTuple<V4>, FiveTuple<V6>, Set<V4>, Set<V6>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_word_keeps_its_parts_apart() {
        let free = Control::default();
        assert!(free.is_free() && !free.is_live() && !free.is_claimed());
        let claimed = free.claimed();
        assert!(claimed.is_claimed() && !claimed.is_live() && claimed.version() == 1);
        let live = claimed.live(5, ANSWERED | OTHERS | UDP);
        assert!(live.is_live() && live.home() == 5 && live.version() == 1);
        assert_eq!(live.state(), ANSWERED | OTHERS | UDP);
        let next = live.with_state(RESET);
        assert_eq!((next.state(), next.home(), next.version()), (RESET, 5, 1));
        let again = next.claimed();
        assert_eq!((again.home(), again.version(), again.state()), (5, 2, 0));
        assert_eq!((again.free().version(), again.free().is_free()), (3, true));
        assert_eq!(Control(u64::MAX).claimed().version(), 0);
    }

    #[test]
    fn only_a_connection_in_the_midst_of_its_life_is_fast() {
        let lives = ANSWERED | ESTABLISHED;
        for state in [lives, lives | OTHERS | RETRY, lives | UDP, ESTABLISHED | ONE_WAY] {
            assert_eq!(with_fast(state), state | FAST);
            for end in [CLIENT_FIN, TASK_FIN, RESET, ALIAS] {
                assert_eq!(with_fast(state | end | FAST), state | end);
            }
        }
        for state in [0, ANSWERED, ESTABLISHED, ONE_WAY, ONE_WAY | ANSWERED] {
            assert_eq!(with_fast(state | FAST), state);
        }
    }

    #[test]
    fn clients_of_one_network_have_one_hash() {
        let v4 = |text: &str| FiveTuple {
            source: V4::from(text.parse::<core::net::Ipv4Addr>().unwrap()),
            ..FiveTuple::default()
        };
        let v6 = |text: &str| FiveTuple {
            source: V6::from(text.parse::<core::net::Ipv6Addr>().unwrap()),
            ..FiveTuple::default()
        };
        let of = |text: &str, prefix: u32| match text.contains(':') {
            true => v6(text).source_hash(128 - prefix),
            false => v4(text).source_hash(32 - prefix),
        };
        for (one, other, prefix) in [
            ("198.51.100.7", "198.51.100.200", 24),
            ("198.51.100.7", "198.51.107.200", 20),
            ("10.1.2.3", "10.200.2.3", 8),
            ("2001:db8:1:2::7", "2001:db8:1:2:ffff::1", 64),
            ("2001:db8:1:2::7", "2001:db8:1:ff::7", 56),
            ("2001:db8:1:2::7", "2001:db8:ffff::7", 32),
            ("2001:db8::7", "2001:db9::7", 31),
        ] {
            assert_eq!(of(one, prefix), of(other, prefix), "{one} and {other} are of one /{prefix}");
            let most = if one.contains(':') { 64 } else { 32 };
            for longer in prefix + 1..=most {
                if of(one, longer) != of(other, longer) {
                    break;
                }
                assert!(longer < most, "{one} and {other} are of two networks somewhere above /{prefix}");
            }
        }
        assert_ne!(v6("2001:db8::1").source_hash(0), v6("2001:db8::2").source_hash(0));
    }

    #[test]
    fn few_tasks_share_clients_that_differ_in_one_number() {
        let port = |number: u16| {
            FiveTuple::new(V4(0x0100_a8c0), V4(0x0200_a8c0), Be16::new(number), Be16::new(80), 6)
        };
        let at_high_port = |number: u16| port(20_000 + number).flow_hash();
        let at_port_apart = |number: u16| port(number << 8 | 0x4e).flow_hash();
        let at_address = |number: u16| {
            let source = V4(0x0000_a8c0 | (number as u32) << 24);
            FiveTuple { source, ..port(20_000) }.flow_hash()
        };
        let of_address = |number: u16| {
            let source = V4(0x0000_a8c0 | (number as u32) << 24);
            FiveTuple { source, ..port(number) }.source_hash(0)
        };
        let of_site = |number: u16| {
            let source = V4(0x0500_000a | (number as u32) << 8 | (255 - number as u32) << 16);
            FiveTuple { source, ..port(number) }.source_hash(0)
        };
        assert_eq!(port(1).source_hash(0), FiveTuple { destination: V4(7), ..port(2) }.source_hash(0));
        let by: [(&str, &dyn Fn(u16) -> u32); 5] = [
            ("port", &at_high_port),
            ("port's other byte", &at_port_apart),
            ("address", &at_address),
            ("address alone", &of_address),
            ("address alone, its sum the same", &of_site),
        ];
        for (name, hash) in by {
            for tasks in [2, 3, 5, 7, 16] {
                let mut taken = [0_u32; 16];
                (0..240).for_each(|number| taken[hash(number) as usize % tasks] += 1);
                let fair = 240 / tasks as u32;
                // Four standard deviations of a fair draw, about.
                let off = 4 * fair.isqrt();
                assert!(taken[..tasks].iter().all(|count| count.abs_diff(fair) <= off), "{name}: {taken:?}");
            }
        }
    }

    #[test]
    fn a_tuple_finds_its_own_line_whatever_the_generation() {
        let tuple = FiveTuple::new(V4(1), V4(2), Be16::new(3), Be16::new(4), 6);
        let is = |other: FiveTuple<V4>| {
            // SAFETY: a reference is valid for reads.
            unsafe { tuple.is_of(&raw const other) }
        };
        assert!(is(FiveTuple { generation: 7, ..tuple }));
        assert!(!is(FiveTuple { kind: ALIAS_KEY, ..tuple }));
        assert!(!is(FiveTuple { protocol: 17, ..tuple }));
        assert!(!is(FiveTuple { destination_port: Be16::new(5), ..tuple }));
        assert!(!is(FiveTuple { source: V4(9), ..tuple }));
    }
}
