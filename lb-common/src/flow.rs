//! Flows: one client connection or UDP exchange, both directions in one entry.
//!
//! A request is keyed as it arrives, (client, listener). The reply of a local or routed task finds the same
//! entry through the listeners that lead to the task ([`crate::endpoint::Replies`]). A flow that leaves with
//! an address of this node (snat) has a second entry, keyed as its reply arrives: (task, own address). What a peer
//! sent to a task of this node has only that one: (task, client).

use crate::{
    checksum::Delta,
    net::{Address, Be16, V4, V6},
    pod,
};

/// The five-tuple of a packet as it arrives from the uplink.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct FlowKey<A> {
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
    /// Zero.
    pub _pad: u8,
    /// Zero; not an array, which the BPF compiler would fill by calling a loop.
    pub _pad2: u16,
}

impl<A> FlowKey<A> {
    /// A key with its padding zeroed.
    #[inline(always)]
    pub const fn new(
        source: A,
        destination: A,
        source_port: Be16,
        destination_port: Be16,
        protocol: u8,
    ) -> Self {
        Self { source, destination, source_port, destination_port, protocol, _pad: 0, _pad2: 0 }
    }

    /// The same for all packets of one direction.
    #[inline(always)]
    pub fn hash(&self) -> u32
    where
        A: Address,
    {
        let ports = (self.source_port.raw() as u32) << 16 | self.destination_port.raw() as u32;
        (self.source.sum() ^ self.destination.sum().rotate_left(16) ^ ports).wrapping_mul(0x9e37_79b1)
    }

    /// The key of what travels the other way.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self
    where
        A: Copy,
    {
        Self::new(self.destination, self.source, self.destination_port, self.source_port, self.protocol)
    }
}

/// The addresses and ports that a packet leaves with, and what that adds to its checksums.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rewrite<A> {
    /// Source address, network order.
    pub source: A,
    /// Destination address, network order.
    pub destination: A,
    /// Network order.
    pub source_port: Be16,
    /// Network order.
    pub destination_port: Be16,
    /// [`Delta`] of the addresses: for the IPv4 header and for the pseudo header.
    pub address_delta: u16,
    /// [`Delta`] of the ports.
    pub port_delta: u16,
}

impl<A: Address> Rewrite<A> {
    /// The five-tuple of what answers a packet that leaves so.
    #[must_use]
    pub const fn answer(&self, protocol: u8) -> FlowKey<A> {
        FlowKey::new(self.destination, self.source, self.destination_port, self.source_port, protocol)
    }

    /// Whether a packet leaves with the same addresses and ports. One sum has two deltas that say nothing: they may differ.
    #[inline(always)]
    pub fn leads_as(&self, other: &Self) -> bool {
        self.source_port == other.source_port
            && self.destination_port == other.destination_port
            && self.source == other.source
            && self.destination == other.destination
    }

    /// Becomes the rewrite from a packet's five-tuple to new addresses and ports. In place, for a copy would
    /// take stack that the programs do not have.
    #[inline(always)]
    pub fn set(&mut self, from: &FlowKey<A>, source: (&A, Be16), destination: (&A, Be16)) {
        let addresses = Delta::of_address(from.source, *source.0);
        let ports = Delta::of_port(from.source_port, source.1);
        self.source = *source.0;
        self.destination = *destination.0;
        self.source_port = source.1;
        self.destination_port = destination.1;
        self.address_delta = addresses.and(Delta::of_address(from.destination, *destination.0)).raw();
        self.port_delta = ports.and(Delta::of_port(from.destination_port, destination.1)).raw();
    }
}

/// A flow whose packets go to a task.
pub const REQUEST: u8 = 0;
/// The entry by which replies to an address of this node find their way back (snat).
pub const REPLY: u8 = 1;
/// The entry by which a task's replies find their way back through the peer that the client used.
pub const REPLY_BY_PEER: u8 = 2;
/// The same for replies that go straight to the client.
pub const REPLY_DIRECT: u8 = 3;

/// The answers of a flow that has one entry, by which its requests are found. No entry's role: a [`Spare`]'s, and then its
/// packet's.
pub const ANSWER: u8 = 4;

/// The client sent FIN.
pub const CLIENT_FIN: u8 = 1;
/// The task sent FIN.
pub const TASK_FIN: u8 = 2;
/// Either side sent RST.
pub const RESET: u8 = 4;
/// The task answered: of TCP, it took the client's SYN.
pub const ANSWERED: u8 = 8;
/// The client went on after the answer: what it sends cannot be a forgery by somebody who sees no answers.
pub const ESTABLISHED: u8 = 16;
/// When the flow was made there were other tasks that could have taken it.
pub const OTHERS: u8 = 32;
/// The lowest of the bits that count to how many tasks a flow was given without an answer, after the first.
pub const RETRY: u8 = 64;
/// The most that they count.
pub const MAX_RETRIES: u8 = u8::MAX / RETRY;

/// Jiffies from `then` to `now`, both their low 32 bits; none if another CPU has noted `then` after `now` was read.
#[inline(always)]
pub const fn elapsed(then: u32, now: u32) -> u32 {
    let elapsed = now.wrapping_sub(then);
    if elapsed >> 31 == 0 { elapsed } else { 0 }
}

/// How far a sequence number may be ahead of what was seen to be taken for what follows a loss, in bytes: more than a
/// connection has under way.
pub const WINDOW: u32 = 1 << 24;

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

impl VlanTag {
    /// No tag.
    pub const NONE: Self = Self { protocol: Be16::from_raw(0), tci: Be16::from_raw(0) };

    /// Whether there is a tag.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.protocol.raw() != 0
    }
}

/// One entry of the flow table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow<A> {
    /// The ready-made rewrite of the packets that find this entry by its key.
    pub rewrite: Rewrite<A>,
    /// Index of the task's backend.
    pub backend: u32,
    /// The backend's generation when the flow was made.
    pub generation: u32,
    /// When the last packet was seen: jiffies, low 32 bits.
    pub seen: u32,
    /// When the next hop to the client was last asked for, jiffies, low 32 bits. A snat request keeps here when
    /// it last looked after its entry for replies.
    pub hop_seen: u32,
    /// Hardware address of the client or of the router to it.
    pub client_mac: [u8; 6],
    /// Own hardware address towards the client.
    pub node_mac: [u8; 6],
    /// The tags the client's packets carry.
    pub tags: Tags,
    /// [`REQUEST`], [`REPLY`], [`REPLY_BY_PEER`] or [`REPLY_DIRECT`].
    pub role: u8,
    /// Bits: [`CLIENT_FIN`], [`TASK_FIN`], [`RESET`], [`ANSWERED`], [`ESTABLISHED`], [`OTHERS`]; from [`RETRY`] on a count.
    pub state: u8,
    /// Number of the peer that the requests came through, with [`REPLY_BY_PEER`] and [`REPLY_DIRECT`].
    pub peer: u16,
    /// Of TCP: the sequence number of the client's next byte, as far as its packets were seen in order; host order.
    pub client_next: u32,
    /// The same of the task.
    pub task_next: u32,
}

/// What a lost entry is made of again: kept beside the entries of established connections to services with consistent
/// placement, by the five-tuple of the packets that it is for, until both sides are seen to close or either to reset.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Spare<A> {
    /// [`Rewrite::source`].
    pub source: A,
    /// [`Rewrite::destination`].
    pub destination: A,
    /// [`Rewrite::source_port`].
    pub source_port: Be16,
    /// [`Rewrite::destination_port`].
    pub destination_port: Be16,
    /// [`Flow::backend`].
    pub backend: u32,
    /// [`Flow::generation`].
    pub generation: u32,
    /// [`Flow::peer`].
    pub peer: u16,
    /// [`Flow::role`], or [`ANSWER`].
    pub role: u8,
    /// Zero.
    pub _pad: u8,
}

impl<A: PartialEq> Spare<A> {
    /// Whether what leaves by it goes the other way than packets of this five-tuple.
    #[inline(always)]
    pub fn answers(&self, key: &FlowKey<A>) -> bool {
        self.destination_port == key.source_port
            && self.source_port == key.destination_port
            && self.destination == key.source
            && self.source == key.destination
    }
}

/// What is said of a packet's place in its connection (RFC 9293, 3.4); all in host order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Sequence number of its first byte.
    pub sequence: u32,
    /// What it acknowledges, if it does.
    pub acknowledgment: u32,
    /// Bytes of payload.
    pub payload: u32,
    /// [`SYN`], [`ACK`], [`RST`], [`FIN`].
    pub flags: u8,
}

/// FIN, of the TCP flags (RFC 9293, 3.1).
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// ACK.
pub const ACK: u8 = 16;

impl Segment {
    /// Whether it has all of these flags.
    #[inline(always)]
    const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The sequence number after it: SYN and FIN count as a byte each.
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        let marks = ((self.flags & SYN) >> 1) + (self.flags & FIN);
        self.sequence.wrapping_add(self.payload).wrapping_add(marks as u32)
    }
}

/// The most data that comes with a SYN (TCP Fast Open, RFC 7413), in bytes: one packet's.
const SYN_DATA: u32 = 9_000;

/// Whether `number` lies behind `start`, at most [`WINDOW`] away.
#[inline(always)]
const fn ahead(number: u32, start: u32) -> bool {
    let distance = number.wrapping_sub(start);
    distance != 0 && distance <= WINDOW
}

/// In which part of its life a flow is: each has a timer of its own.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// TCP, not established.
    HalfOpen = 0,
    /// TCP, established.
    Established = 1,
    /// TCP, and either side has begun to close.
    Closing = 2,
    /// UDP without an answer.
    OneWay = 4,
    /// UDP with answers.
    Answered = 5,
}

/// Seconds of silence after which a flow has ended, by [`Phase`]; those of a service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Timers {
    /// By the phase's discriminant; what stands for no phase is zero.
    pub seconds: [u32; 8],
}

impl Timers {
    /// What stands where nothing is set. Established: RFC 5382, REQ-5. UDP: RFC 4787, REQ-5 asks for two minutes at
    /// least where answers come, and recommends five.
    pub const DEFAULT: Self = Self { seconds: [30, 7440, 120, 0, 60, 300, 0, 0] };
    /// Less than this no timer may be, in seconds: shorter silences are not looked at.
    pub const LEAST: u32 = 3;
    /// More than this no timer may be, in seconds: the clock of flows turns around.
    pub const MOST: u32 = 1_000_000;

    /// The timer of a phase in seconds.
    #[inline(always)]
    pub const fn of(&self, phase: Phase) -> u32 {
        self.seconds[phase as usize]
    }
}

impl Default for Timers {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The bits of a flow's state that decide its phase.
const PHASE_BITS: u8 = CLIENT_FIN | TASK_FIN | RESET | ANSWERED | ESTABLISHED;

/// The phase by state, of UDP and of TCP.
static PHASES: [[Phase; PHASE_BITS as usize + 1]; 2] = {
    let mut phases = [[Phase::OneWay; PHASE_BITS as usize + 1], [Phase::HalfOpen; PHASE_BITS as usize + 1]];
    let mut state = 0;
    while state <= PHASE_BITS {
        if state & ANSWERED != 0 {
            phases[0][state as usize] = Phase::Answered;
        }
        if state & (CLIENT_FIN | TASK_FIN | RESET) != 0 {
            phases[1][state as usize] = Phase::Closing;
        } else if state & ESTABLISHED != 0 {
            phases[1][state as usize] = Phase::Established;
        }
        state += 1;
    }
    phases
};

impl<A> Flow<A> {
    /// Becomes a copy of an entry. By words, for a copy of the whole would be a call of a loop.
    ///
    /// # Safety
    /// `from` is valid for reads. Another CPU may write it meanwhile: the copy is then as torn as a reader in place
    /// would see it.
    #[inline(always)]
    pub unsafe fn copy_from(&mut self, from: *const Self) {
        let (to, from) = ((&raw mut *self).cast::<u64>(), from.cast::<u64>());
        let mut word = 0;
        while word < size_of::<Self>() / 8 {
            // SAFETY: both have this many words, and are aligned to them.
            unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
            word += 1;
        }
    }

    /// Clears what is known of the client's link. By volatile writes, which the BPF compiler does not join to the call
    /// of a loop.
    #[inline(always)]
    pub fn forget_hop(&mut self) {
        // SAFETY: the fields are valid for writes.
        unsafe {
            for byte in 0..6 {
                (&raw mut self.client_mac[byte]).write_volatile(0);
                (&raw mut self.node_mac[byte]).write_volatile(0);
            }
            (&raw mut self.tags.outer).write_volatile(VlanTag::NONE);
            (&raw mut self.tags.inner).write_volatile(VlanTag::NONE);
        }
    }

    /// The part of its life it is in. Read from a table, without a branch: the verifier would walk each of them.
    #[inline(always)]
    pub fn phase(&self, tcp: bool) -> Phase {
        PHASES[tcp as usize][(self.state & PHASE_BITS) as usize]
    }

    /// Whether nothing was heard of the flow for so long that it has ended.
    #[inline(always)]
    pub fn expired(&self, tcp: bool, now: u32, timers: &Timers, jiffies_per_second: u32) -> bool {
        // The compiler knows that no phase is as high, and would take the mask away that tells the verifier.
        // SAFETY: a phase is a byte, valid for reads.
        let phase = unsafe {
            (&raw const PHASES[tcp as usize][(self.state & PHASE_BITS) as usize]).cast::<u8>().read_volatile()
        };
        let limit = timers.seconds[(phase & 7) as usize].wrapping_mul(jiffies_per_second);
        elapsed(self.seen, now) > limit
    }

    /// Whether the entry is for replies, keyed as they arrive.
    #[inline(always)]
    pub const fn is_reply(&self) -> bool {
        self.role != REQUEST
    }

    /// Whether either side has begun to close: a SYN starts a new flow.
    #[inline(always)]
    pub const fn closing(&self) -> bool {
        self.state & (CLIENT_FIN | TASK_FIN | RESET) != 0
    }

    /// Whether both sides have closed it, or either has reset it.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        const CLOSED: u8 = CLIENT_FIN | TASK_FIN;
        self.state & RESET != 0 || self.state & CLOSED == CLOSED
    }

    /// Whether the hop to the client is known: no interface's hardware address is zero.
    #[inline(always)]
    pub const fn has_hop(&self) -> bool {
        let [a, b, c, d, e, f] = self.client_mac;
        a | b | c | d | e | f != 0
    }

    /// Whether it belongs to the established ones: the client went on after the answer.
    #[inline(always)]
    pub const fn established(&self) -> bool {
        self.state & ESTABLISHED != 0
    }

    /// Notes what a segment of the client says, and whether the state changed. What is not plausible changes nothing:
    /// a forged RST or FIN must not close a flow (RFC 5961).
    ///
    /// `one_sided` says that the task's answers do not pass here.
    #[inline(always)]
    pub fn client_sent(&mut self, segment: &Segment, one_sided: bool) -> bool {
        let mut state = self.state;
        // A reset is believed at the one number that its receiver takes at once (RFC 5961, 3.2).
        if segment.has(RST) {
            if segment.sequence == self.client_next {
                state |= RESET;
            }
            return self.set_state(state);
        }
        let end = segment.end();
        if segment.sequence == self.client_next && end != self.client_next {
            self.client_next = end;
        }
        if segment.has(FIN) && end == self.client_next {
            state |= CLIENT_FIN;
        }
        let answers = if one_sided {
            segment.sequence == self.client_next
        } else {
            state & ANSWERED != 0 && segment.acknowledgment == self.task_next
        };
        if segment.flags & (SYN | ACK) == ACK && (answers || one_sided && end == self.client_next) {
            state |= ESTABLISHED;
        }
        self.set_state(state)
    }

    /// The same of the task. It may be ahead of what was seen: a segment was lost before it came here. What it
    /// acknowledges tells how far the client is, where a segment was lost or overtaken.
    #[inline(always)]
    pub fn task_sent(&mut self, segment: &Segment) -> bool {
        let mut state = self.state;
        if state & ANSWERED == 0 {
            // Whatever answers a SYN acknowledges it (RFC 9293, 3.10.7.3), and data that came with it or not. Where the
            // entry was made anew the task goes on from where the client has seen it.
            let acknowledged = segment.acknowledgment.wrapping_sub(self.client_next);
            if segment.has(ACK) && acknowledged <= SYN_DATA {
                self.client_next = segment.acknowledgment;
                self.task_next = segment.end();
                state |= if segment.has(RST) { RESET } else { ANSWERED };
            } else if self.task_next != 0 && segment.sequence.wrapping_sub(self.task_next) <= WINDOW {
                self.task_next = segment.end();
                state |= if segment.has(RST) { RESET } else { ANSWERED };
            }
            return self.set_state(state);
        }
        if segment.has(RST) {
            if segment.sequence == self.task_next {
                state |= RESET;
            }
            return self.set_state(state);
        }
        let end = segment.end();
        if ahead(end, self.task_next) {
            self.task_next = end;
        }
        if segment.has(ACK) && ahead(segment.acknowledgment, self.client_next) {
            self.client_next = segment.acknowledgment;
        }
        if segment.has(FIN) && end == self.task_next {
            state |= TASK_FIN;
        }
        self.set_state(state)
    }

    #[inline(always)]
    fn set_state(&mut self, state: u8) -> bool {
        let changed = state != self.state;
        if changed {
            self.state = state;
        }
        changed
    }
}

const _: () = {
    assert!(size_of::<FlowKey<V4>>() == 16 && align_of::<FlowKey<V4>>() == 4);
    assert!(size_of::<FlowKey<V6>>() == 40 && align_of::<FlowKey<V6>>() == 4);
    assert!(size_of::<Rewrite<V4>>() == 16 && size_of::<Rewrite<V6>>() == 40);
    // With the kernel's own part an IPv4 entry is two cache lines, of which the value is one.
    assert!(size_of::<Flow<V4>>() == 64 && size_of::<Flow<V6>>() == 88);
    assert!(size_of::<Spare<V4>>() == 24 && size_of::<Spare<V6>>() == 48);
    assert!(size_of::<Timers>() == 32);
};

pod!(FlowKey<V4>, FlowKey<V6>, Flow<V4>, Flow<V6>, Spare<V4>, Spare<V6>, Timers);

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: u32 = u32::MAX - 2;
    const TASK: u32 = 5_000;

    fn segment(flags: u8, sequence: u32, acknowledgment: u32, payload: u32) -> Segment {
        Segment { sequence, acknowledgment, payload, flags }
    }

    /// A flow after the client's SYN; its numbers turn around soon.
    fn opened() -> Flow<V4> {
        Flow { client_next: CLIENT.wrapping_add(1), ..Flow::default() }
    }

    /// A flow after the handshake.
    fn established() -> Flow<V4> {
        let mut flow = opened();
        assert!(flow.task_sent(&segment(SYN | ACK, TASK, CLIENT.wrapping_add(1), 0)));
        assert_eq!(flow.phase(true), Phase::HalfOpen);
        assert!(flow.client_sent(&segment(ACK, CLIENT.wrapping_add(1), TASK + 1, 0), false));
        assert_eq!(flow.phase(true), Phase::Established);
        flow
    }

    #[test]
    fn a_handshake_establishes_and_only_the_right_numbers_do() {
        let flow = established();
        assert_eq!((flow.client_next, flow.task_next), (CLIENT.wrapping_add(1), TASK + 1));
        let mut flow = opened();
        // An acknowledgment of something else is an answer of something else.
        assert!(!flow.task_sent(&segment(SYN | ACK, TASK, 7_000_000, 0)));
        // Who sees no answers cannot go on after one.
        assert!(!flow.client_sent(&segment(ACK, CLIENT.wrapping_add(1), TASK + 1, 0), false));
        assert!(flow.task_sent(&segment(SYN | ACK, TASK, CLIENT.wrapping_add(1), 0)));
        for guess in [0, TASK, TASK + 2, u32::MAX] {
            assert!(!flow.client_sent(&segment(ACK, CLIENT.wrapping_add(1), guess, 0), false), "{guess}");
        }
        assert_eq!(flow.phase(true), Phase::HalfOpen);
    }

    #[test]
    fn a_refusal_is_a_reset_without_an_answer() {
        let mut flow = opened();
        assert!(!flow.task_sent(&segment(RST | ACK, 0, 99_000, 0)));
        assert!(flow.task_sent(&segment(RST | ACK, 0, CLIENT.wrapping_add(1), 0)));
        assert_eq!(flow.state, RESET);
    }

    #[test]
    fn data_with_a_syn_is_counted_when_the_task_takes_it() {
        let mut flow = opened();
        assert!(flow.task_sent(&segment(SYN | ACK, TASK, CLIENT.wrapping_add(11), 0)));
        assert_eq!(flow.client_next, CLIENT.wrapping_add(11));
    }

    #[test]
    fn resets_and_ends_are_believed_at_their_number_alone() {
        let next = CLIENT.wrapping_add(1);
        for wrong in [0, next.wrapping_sub(1), next.wrapping_add(1), next.wrapping_add(1 << 31)] {
            let mut flow = established();
            assert!(!flow.client_sent(&segment(RST, wrong, 0, 0), false), "{wrong}");
            assert!(
                !flow.client_sent(&segment(FIN | ACK, wrong.wrapping_add(9), TASK + 1, 0), false),
                "{wrong}"
            );
            assert_eq!(flow.phase(true), Phase::Established);
        }
        for wrong in [0, TASK, TASK + 2, TASK + 1 + (1 << 31)] {
            let mut flow = established();
            assert!(!flow.task_sent(&segment(RST, wrong, 0, 0)), "{wrong}");
        }
        let mut flow = established();
        assert!(flow.client_sent(&segment(RST, next, 0, 0), false));
        assert!(flow.closing());
        let mut flow = established();
        assert!(flow.task_sent(&segment(RST, TASK + 1, 0, 0)));
        assert!(flow.closing());
    }

    #[test]
    fn both_sides_close_in_any_order_and_at_once() {
        let next = CLIENT.wrapping_add(1);
        let from_client = segment(FIN | ACK, next, TASK + 1, 100);
        let from_task = segment(FIN | ACK, TASK + 1, next, 50);
        for client_first in [true, false] {
            let mut flow = established();
            if client_first {
                assert!(flow.client_sent(&from_client, false));
                assert!(flow.task_sent(&from_task));
            } else {
                assert!(flow.task_sent(&from_task));
                assert!(flow.client_sent(&from_client, false));
            }
            assert_eq!(flow.state & (CLIENT_FIN | TASK_FIN | RESET), CLIENT_FIN | TASK_FIN);
            // Sent again it changes nothing.
            assert!(!flow.client_sent(&from_client, false));
            assert!(!flow.task_sent(&from_task));
        }
    }

    #[test]
    fn what_was_lost_or_overtaken_before_it_came_here_heals() {
        let next = CLIENT.wrapping_add(1);
        let mut flow = established();
        // The client's second segment comes first, the first one after it.
        flow.client_sent(&segment(ACK, next.wrapping_add(100), TASK + 1, 100), false);
        assert_eq!(flow.client_next, next);
        flow.client_sent(&segment(ACK, next, TASK + 1, 100), false);
        assert_eq!(flow.client_next, next.wrapping_add(100));
        // The task's acknowledgment tells of both.
        flow.task_sent(&segment(ACK, TASK + 1, next.wrapping_add(200), 0));
        assert_eq!(flow.client_next, next.wrapping_add(200));
        assert!(flow.client_sent(&segment(FIN | ACK, next.wrapping_add(200), TASK + 1, 0), false));
        // A segment of the task that did not come this way.
        flow.task_sent(&segment(ACK, TASK + 1_001, next.wrapping_add(201), 100));
        assert_eq!(flow.task_next, TASK + 1_101);
        assert!(flow.task_sent(&segment(RST | ACK, TASK + 1_101, 0, 0)));
    }

    #[test]
    fn an_entry_made_anew_in_the_middle_goes_on() {
        let mut flow = Flow::<V4> { client_next: 300, task_next: 900, ..Flow::default() };
        // Ahead of what the client had when it sent that: data is under way.
        assert!(flow.task_sent(&segment(ACK, 2_900, 100, 1_000)));
        assert_eq!((flow.state, flow.task_next), (ANSWERED, 3_900));
        assert!(!flow.client_sent(&segment(ACK, 300, 2_900, 0), false));
        assert!(flow.client_sent(&segment(ACK, 300, 3_900, 0), false));
        assert_eq!(flow.phase(true), Phase::Established);
    }

    #[test]
    fn where_answers_go_elsewhere_the_client_alone_establishes() {
        let mut flow = opened();
        let next = CLIENT.wrapping_add(1);
        assert!(!flow.client_sent(&segment(ACK, next.wrapping_add(1), TASK + 1, 0), true));
        assert!(flow.client_sent(&segment(ACK, next, TASK + 1, 10), true));
        assert_eq!((flow.phase(true), flow.client_next), (Phase::Established, next.wrapping_add(10)));
    }

    #[test]
    fn each_phase_has_its_timer_and_the_clock_may_turn_around() {
        let timers = Timers::DEFAULT;
        let hz = 250;
        let cases = [
            (0, true, 30),
            (ANSWERED, true, 30),
            (ANSWERED | ESTABLISHED, true, 7440),
            (ANSWERED | ESTABLISHED | CLIENT_FIN, true, 120),
            (RESET | OTHERS, true, 120),
            (0, false, 60),
            (ANSWERED | ESTABLISHED, false, 300),
        ];
        for (state, tcp, seconds) in cases {
            for seen in [0, u32::MAX - 100] {
                let flow = Flow::<V4> { state, seen, ..Flow::default() };
                assert_eq!(timers.of(flow.phase(tcp)), seconds, "{state}");
                assert!(!flow.expired(tcp, seen.wrapping_add(seconds * hz), &timers, hz), "{state}");
                assert!(flow.expired(tcp, seen.wrapping_add(seconds * hz + 1), &timers, hz), "{state}");
                // Seen by another CPU after this one has read the clock.
                assert!(!flow.expired(tcp, seen.wrapping_sub(1), &timers, hz), "{state}");
            }
        }
    }

    #[test]
    fn a_copy_is_whole() {
        let flow = Flow::<V4> { state: 7, client_next: 9, task_next: 11, seen: 13, ..Flow::default() };
        let mut copy = Flow::default();
        // SAFETY: a reference is valid for reads.
        unsafe { copy.copy_from(&raw const flow) };
        assert_eq!(copy, flow);
    }
}
