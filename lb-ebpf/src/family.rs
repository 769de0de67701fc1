//! What differs between IPv4 and IPv6: header layouts and the tables of each. The stages are generic over it.

use lb_common::{
    checksum::Delta,
    endpoint::{Endpoint, Listener, Replies},
    flow::{Flow, FlowKey},
    net::{Address, V4, V6},
};

use crate::{
    frame::Frame,
    icmp::TooBig,
    maps::{
        FLOWS4, FLOWS6, FRAGMENTS4, FRAGMENTS6, Flows, Fragments, LISTENERS4, LISTENERS6, Listeners,
        REPLIES4, REPLIES6, ReplyTable,
    },
    parse::{IPV4, IPV6, ipv4, ipv6},
};

/// An address family, with its headers and tables.
pub trait Family: Address + TooBig {
    /// Its number for `bpf_fib_lookup`.
    const NUMBER: u8;

    /// Its flow table.
    const FLOWS: &'static Flows<Self>;

    /// Its listeners.
    const LISTENERS: &'static Listeners<Self>;

    /// Its tasks' endpoints.
    const REPLIES: &'static ReplyTable<Self>;

    /// Its datagrams in fragments.
    const FRAGMENTS: &'static Fragments<Self>;

    /// Its EtherType.
    const KIND: u16;

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

    /// The flow with this five-tuple. The entry may be evicted and reused while it is looked at; what it holds
    /// is then another flow's: the packet goes where that one goes, lost as any packet may be, and what is noted of
    /// its state or next hop is wrong there until the next packet or second.
    #[inline(always)]
    fn flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        Self::FLOWS.get_ptr_mut(key)
    }

    /// Puts a flow into the table.
    #[inline(always)]
    fn insert_flow(key: &FlowKey<Self>, flow: &Flow<Self>, flags: u64) -> Result<(), i32> {
        Self::FLOWS.insert(key, flow, flags)
    }

    /// Takes a flow out of the table; of several CPUs that try, one succeeds.
    #[inline(always)]
    fn delete_flow(key: &FlowKey<Self>) -> Result<(), i32> {
        Self::FLOWS.remove(key)
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
    const LISTENERS: &'static Listeners<Self> = &LISTENERS4;
    const REPLIES: &'static ReplyTable<Self> = &REPLIES4;
    const FRAGMENTS: &'static Fragments<Self> = &FRAGMENTS4;
    const KIND: u16 = IPV4;

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
    const LISTENERS: &'static Listeners<Self> = &LISTENERS6;
    const REPLIES: &'static ReplyTable<Self> = &REPLIES6;
    const FRAGMENTS: &'static Fragments<Self> = &FRAGMENTS6;
    const KIND: u16 = IPV6;

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
