//! What differs between IPv4 and IPv6: header layouts and the tables of each. The stages are generic over it.

use lb_common::{
    checksum::Delta,
    endpoint::{Endpoint, Listener, Replies},
    flow::{Flow, FlowKey},
    net::{Address, V4, V6},
};

use crate::{
    frame::Frame,
    maps::{FLOWS4, FLOWS6, LISTENERS4, LISTENERS6, REPLIES4, REPLIES6},
    parse::{ipv4, ipv6},
    rewrite::HOP,
};

/// An address family, with its headers and tables.
pub trait Family: Address {
    /// Its number for `bpf_fib_lookup`.
    const NUMBER: u8;

    /// The flow with this five-tuple. The entry may be evicted and reused while it is looked at; what it holds
    /// is then another flow's: the packet goes where that one goes, lost as any packet may be, and what is noted of
    /// its state or next hop is wrong there until the next packet or second.
    fn flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>>;

    /// Puts a flow into the table.
    fn insert_flow(key: &FlowKey<Self>, flow: &Flow<Self>, flags: u64) -> Result<(), i32>;

    /// Takes a flow out of the table; of several CPUs that try, one succeeds.
    fn delete_flow(key: &FlowKey<Self>) -> Result<(), i32>;

    /// The listener at this endpoint, copied at once: base and count belong together.
    fn listener(endpoint: &Endpoint<Self>) -> Option<Listener>;

    /// The listeners that lead to this endpoint of a task.
    fn replies(endpoint: &Endpoint<Self>) -> Option<&'static Replies<Self>>;

    /// Writes addresses into the network header at `offset` and takes one hop off.
    fn rewrite<F: Frame>(
        frame: &F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<()>;
}

/// `AF_INET`.
const AF_INET: u8 = 2;
/// `AF_INET6`.
const AF_INET6: u8 = 10;

impl Family for V4 {
    const NUMBER: u8 = AF_INET;

    #[inline(always)]
    fn flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        FLOWS4.get_ptr_mut(key)
    }

    #[inline(always)]
    fn insert_flow(key: &FlowKey<Self>, flow: &Flow<Self>, flags: u64) -> Result<(), i32> {
        FLOWS4.insert(key, flow, flags)
    }

    #[inline(always)]
    fn delete_flow(key: &FlowKey<Self>) -> Result<(), i32> {
        FLOWS4.remove(key)
    }

    #[inline(always)]
    fn listener(endpoint: &Endpoint<Self>) -> Option<Listener> {
        // SAFETY: copied at once; the chosen backend is checked to belong to the service.
        unsafe { LISTENERS4.get(endpoint) }.copied()
    }

    #[inline(always)]
    fn replies(endpoint: &Endpoint<Self>) -> Option<&'static Replies<Self>> {
        // SAFETY: read only to build keys; the flow that is found confirms the backend.
        unsafe { REPLIES4.get(endpoint) }
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
            (*header).checksum = delta.and(HOP).apply((*header).checksum);
        }
        Some(())
    }
}

impl Family for V6 {
    const NUMBER: u8 = AF_INET6;

    #[inline(always)]
    fn flow(key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
        FLOWS6.get_ptr_mut(key)
    }

    #[inline(always)]
    fn insert_flow(key: &FlowKey<Self>, flow: &Flow<Self>, flags: u64) -> Result<(), i32> {
        FLOWS6.insert(key, flow, flags)
    }

    #[inline(always)]
    fn delete_flow(key: &FlowKey<Self>) -> Result<(), i32> {
        FLOWS6.remove(key)
    }

    #[inline(always)]
    fn listener(endpoint: &Endpoint<Self>) -> Option<Listener> {
        // SAFETY: as for IPv4.
        unsafe { LISTENERS6.get(endpoint) }.copied()
    }

    #[inline(always)]
    fn replies(endpoint: &Endpoint<Self>) -> Option<&'static Replies<Self>> {
        // SAFETY: as for IPv4.
        unsafe { REPLIES6.get(endpoint) }
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
