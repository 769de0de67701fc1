//! What differs between IPv4 and IPv6: header layouts and the tables of each. The stages are generic over it.

use lb_common::{
    checksum::Delta,
    endpoint::{Endpoint, Listener, Replies},
    flow::{Flow, FlowKey},
    net::{Address, V4, V6},
};

use crate::{
    frame::Frame,
    maps::{
        FLOWS4, FLOWS6, FRAGMENTS4, FRAGMENTS6, Flows, Fragments, HALF_OPEN4, HALF_OPEN6, HalfOpen,
        LISTENERS4, LISTENERS6, Listeners, REPLIES4, REPLIES6, ReplyTable, SPARES4, SPARES6, Spares,
    },
    packet::Packet,
    parse::{IPV4, IPV6, ipv4, ipv6},
    reply::Back,
};

/// An address family, with its headers and tables.
pub trait Family: Address + Back {
    /// Its number for `bpf_fib_lookup`.
    const NUMBER: u8;

    /// Its established flows.
    const FLOWS: &'static Flows<Self>;

    /// Its flows that are not established yet.
    const HALF_OPEN: &'static HalfOpen<Self>;

    /// What lost entries are made of again.
    const SPARES: &'static Spares<Self>;

    /// Its listeners.
    const LISTENERS: &'static Listeners<Self>;

    /// Its tasks' endpoints.
    const REPLIES: &'static ReplyTable<Self>;

    /// Its datagrams in fragments.
    const FRAGMENTS: &'static Fragments<Self>;

    /// Its EtherType.
    const KIND: u16;

    /// Reads the header, behind a link header without tags, of a TCP or UDP packet that has nothing unusual; false if it
    /// has.
    fn plain<F: Frame>(frame: &F, packet: &mut Packet<Self>) -> bool;

    /// The source address in the network header at `offset`.
    fn source<F: Frame>(frame: &F, offset: usize) -> Option<Self>;

    /// Writes addresses into a quoted network header at `offset`, and says what that adds to the sum over it.
    fn requote<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<Delta>;

    /// Writes addresses into the network header at `offset` and takes one hop off.
    fn rewrite<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<()>;

    /// The established flow with this five-tuple. The entry may be evicted and reused while it is looked at; what it
    /// holds is then another flow's: the packet goes where that one goes, lost as any packet may be, and what is noted
    /// of its state or next hop is wrong there until the next packet or second.
    #[inline(always)]
    fn flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        Self::FLOWS.get_ptr_mut(key)
    }

    /// The flow with this five-tuple that is not established.
    #[inline(always)]
    fn half_open(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        Self::HALF_OPEN.get_ptr_mut(key)
    }

    /// The flow with this five-tuple, in either table. For what is rare: the verifier follows both.
    #[inline(always)]
    fn any_flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        Self::flow(key).or_else(|| Self::half_open(key))
    }

    /// The flow with this five-tuple that was not among the established ones a moment ago: it may have been moved there
    /// since.
    #[inline(always)]
    fn late_flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        Self::half_open(key).or_else(|| Self::flow(key))
    }

    /// Takes a flow out of the tables; of several CPUs that try, one succeeds.
    #[inline(always)]
    fn delete_flow(key: &FlowKey<Self>) -> Result<(), i32> {
        Self::FLOWS.remove(key).or_else(|_| Self::HALF_OPEN.remove(key))
    }

    /// The listener at this endpoint, copied at once: base and count belong together.
    #[inline(always)]
    fn listener(endpoint: &Endpoint<Self>) -> Option<Listener> {
        // SAFETY: copied at once; the chosen backend is checked to belong to the service.
        unsafe { Self::LISTENERS.get(endpoint) }.copied()
    }

    /// The listeners that lead to this endpoint of a task.
    #[inline(always)]
    fn replies(endpoint: &Endpoint<Self>) -> Option<&'static Replies<Self>> {
        // SAFETY: read only to build keys; the flow that is found confirms the backend.
        unsafe { Self::REPLIES.get(endpoint) }
    }
}

/// `AF_INET`.
const AF_INET: u8 = 2;
/// `AF_INET6`.
const AF_INET6: u8 = 10;

impl Family for V4 {
    const NUMBER: u8 = AF_INET;
    const FLOWS: &'static Flows<Self> = &FLOWS4;
    const HALF_OPEN: &'static HalfOpen<Self> = &HALF_OPEN4;
    const SPARES: &'static Spares<Self> = &SPARES4;
    const LISTENERS: &'static Listeners<Self> = &LISTENERS4;
    const REPLIES: &'static ReplyTable<Self> = &REPLIES4;
    const FRAGMENTS: &'static Fragments<Self> = &FRAGMENTS4;
    const KIND: u16 = IPV4;

    #[inline(always)]
    fn plain<F: Frame>(frame: &F, packet: &mut Packet<Self>) -> bool {
        ipv4::plain(frame, packet)
    }

    #[inline(always)]
    fn source<F: Frame>(frame: &F, offset: usize) -> Option<Self> {
        let header = frame.at::<ipv4::Header>(offset)?;
        // SAFETY: `at` checked the bounds.
        Some(Self(unsafe { (*header).source }))
    }

    #[inline(always)]
    fn requote<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<Delta> {
        let header = frame.at::<ipv4::Header>(offset)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            let old = (*header).checksum;
            (*header).source = source.0;
            (*header).destination = destination.0;
            (*header).checksum = delta.apply(old);
            Some(delta.and(Delta::of_word(old, (*header).checksum)))
        }
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<()> {
        let header = frame.at::<ipv4::Header>(offset)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*header).source = source.0;
            (*header).destination = destination.0;
            (*header).ttl -= 1;
            (*header).checksum = delta.and(Delta::IPV4_HOP).apply((*header).checksum);
        }
        Some(())
    }
}

impl Family for V6 {
    const NUMBER: u8 = AF_INET6;
    const FLOWS: &'static Flows<Self> = &FLOWS6;
    const HALF_OPEN: &'static HalfOpen<Self> = &HALF_OPEN6;
    const SPARES: &'static Spares<Self> = &SPARES6;
    const LISTENERS: &'static Listeners<Self> = &LISTENERS6;
    const REPLIES: &'static ReplyTable<Self> = &REPLIES6;
    const FRAGMENTS: &'static Fragments<Self> = &FRAGMENTS6;
    const KIND: u16 = IPV6;

    #[inline(always)]
    fn plain<F: Frame>(frame: &F, packet: &mut Packet<Self>) -> bool {
        ipv6::plain(frame, packet)
    }

    #[inline(always)]
    fn source<F: Frame>(frame: &F, offset: usize) -> Option<Self> {
        let header = frame.at::<ipv6::Header>(offset)?;
        // SAFETY: `at` checked the bounds.
        Some(Self(unsafe { (*header).source }))
    }

    #[inline(always)]
    fn requote<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<Delta> {
        let header = frame.at::<ipv6::Header>(offset)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*header).source = source.0;
            (*header).destination = destination.0;
        }
        Some(delta)
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        _: Delta,
    ) -> Option<()> {
        let header = frame.at::<ipv6::Header>(offset)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*header).source = source.0;
            (*header).destination = destination.0;
            (*header).hop_limit -= 1;
        }
        Some(())
    }
}
