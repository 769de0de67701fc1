//! What differs between IPv4 and IPv6: header layouts and the tables of each. The stages are generic over it.

use lb_common::{
    checksum::Delta,
    endpoint::{Endpoint, Listener, TaskEndpoint},
    net::{Address, V4, V6},
};

use super::{
    frame::Frame,
    maps::{
        CONNECTIONS4, CONNECTIONS6, Connections, FRAGMENTS4, FRAGMENTS6, Fragments, LISTENERS4, LISTENERS6,
        Listeners, TASK_ENDPOINTS4, TASK_ENDPOINTS6, TaskEndpoints,
    },
};
use crate::wire::{
    ethernet::{IPV4, IPV6},
    ipv4::Ipv4,
    ipv6::Ipv6,
};

/// An address family, with its headers and tables.
pub trait Family: Address {
    /// Its number for `bpf_fib_lookup`.
    const NUMBER: u8;

    /// Bytes of its network header without options.
    const HEADER: usize;

    /// Its connections.
    const CONNECTIONS: &'static Connections<Self>;

    /// Its listeners.
    const LISTENERS: &'static Listeners<Self>;

    /// Its tasks' endpoints.
    const TASK_ENDPOINTS: &'static TaskEndpoints<Self>;

    /// Its datagrams in fragments.
    const FRAGMENTS: &'static Fragments<Self>;

    /// Its EtherType.
    const ETHER_TYPE: u16;

    /// The source address in the network header at `offset`.
    fn source<F: Frame>(frame: &F, offset: usize) -> Option<Self>;

    /// Writes addresses into a quoted network header at `offset`, and says what that adds to the sum over it.
    fn requote<F: Frame>(
        frame: &mut F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<Delta>;

    /// Writes addresses into the network header at `offset` and takes one hop off.
    fn rewrite<F: Frame>(
        frame: &mut F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<()>;

    /// The listener at this endpoint, copied at once: base and count belong together.
    #[inline(always)]
    fn listener(endpoint: &Endpoint<Self>) -> Option<Listener> {
        // SAFETY: copied at once; the chosen backend is checked to belong to the service.
        unsafe { Self::LISTENERS.get(endpoint) }.copied()
    }

    /// What is known of this endpoint of a task.
    #[inline(always)]
    fn task_endpoint(endpoint: &Endpoint<Self>) -> Option<&'static TaskEndpoint<Self>> {
        // SAFETY: a hint: what is done with it is checked against the backend.
        unsafe { Self::TASK_ENDPOINTS.get(endpoint) }
    }
}

/// `AF_INET`.
const AF_INET: u8 = 2;
/// `AF_INET6`.
const AF_INET6: u8 = 10;

impl Family for V4 {
    const NUMBER: u8 = AF_INET;
    const HEADER: usize = size_of::<Ipv4>();
    const CONNECTIONS: &'static Connections<Self> = &CONNECTIONS4;
    const LISTENERS: &'static Listeners<Self> = &LISTENERS4;
    const TASK_ENDPOINTS: &'static TaskEndpoints<Self> = &TASK_ENDPOINTS4;
    const FRAGMENTS: &'static Fragments<Self> = &FRAGMENTS4;
    const ETHER_TYPE: u16 = IPV4;

    #[inline(always)]
    fn source<F: Frame>(frame: &F, offset: usize) -> Option<Self> {
        frame.read::<Ipv4>(offset).map(|header| Self(header.source))
    }

    #[inline(always)]
    fn requote<F: Frame>(
        frame: &mut F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<Delta> {
        let header = frame.at::<Ipv4>(offset)?;
        let old = header.checksum;
        header.source = source.0;
        header.destination = destination.0;
        header.checksum = delta.apply(old);
        Some(delta.and(Delta::of_word(old, header.checksum)))
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &mut F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<()> {
        let header = frame.at::<Ipv4>(offset)?;
        header.source = source.0;
        header.destination = destination.0;
        header.ttl = header.ttl.wrapping_sub(1);
        header.checksum = delta.and(Delta::IPV4_HOP).apply(header.checksum);
        Some(())
    }
}

impl Family for V6 {
    const NUMBER: u8 = AF_INET6;
    const HEADER: usize = size_of::<Ipv6>();
    const CONNECTIONS: &'static Connections<Self> = &CONNECTIONS6;
    const LISTENERS: &'static Listeners<Self> = &LISTENERS6;
    const TASK_ENDPOINTS: &'static TaskEndpoints<Self> = &TASK_ENDPOINTS6;
    const FRAGMENTS: &'static Fragments<Self> = &FRAGMENTS6;
    const ETHER_TYPE: u16 = IPV6;

    #[inline(always)]
    fn source<F: Frame>(frame: &F, offset: usize) -> Option<Self> {
        frame.read::<Ipv6>(offset).map(|header| Self(header.source))
    }

    #[inline(always)]
    fn requote<F: Frame>(
        frame: &mut F,
        offset: usize,
        source: &Self,
        destination: &Self,
        delta: Delta,
    ) -> Option<Delta> {
        let header = frame.at::<Ipv6>(offset)?;
        header.source = source.0;
        header.destination = destination.0;
        Some(delta)
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &mut F,
        offset: usize,
        source: &Self,
        destination: &Self,
        _: Delta,
    ) -> Option<()> {
        let header = frame.at::<Ipv6>(offset)?;
        header.source = source.0;
        header.destination = destination.0;
        header.hop_limit = header.hop_limit.wrapping_sub(1);
        Some(())
    }
}
