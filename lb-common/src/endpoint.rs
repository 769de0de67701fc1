//! Listeners (where a service answers) and reply sources (where its tasks answer from).

use crate::{
    net::{Be16, V4, V6},
    pod,
};

/// An address, protocol and port: the key of a listener, or of the tasks' side of a flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord, Default)]
pub struct Endpoint<A> {
    /// Network order.
    pub address: A,
    /// Network order.
    pub port: Be16,
    /// IP protocol number, [`crate::net::TCP`] or [`crate::net::UDP`].
    pub protocol: u8,
    /// Zero.
    pub _pad: u8,
}

impl<A> Endpoint<A> {
    /// An endpoint with its padding zeroed.
    #[inline(always)]
    pub const fn new(address: A, port: Be16, protocol: u8) -> Self {
        Self { address, port, protocol, _pad: 0 }
    }
}

/// What a listener leads to: a range of the slot table.
///
/// A whole value is replaced at once by an update of the hash table, so that base and count always belong
/// together.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Listener {
    /// Index of the service and of its counters.
    pub service: u32,
    /// First slot.
    pub slot_base: u32,
    /// Number of slots; zero when no task is eligible.
    pub slot_count: u32,
    /// Index of the published port's round-robin cursor.
    pub cursor: u32,
    /// [`CONSISTENT`] or nothing.
    pub flags: u32,
}

/// New flows of a listener are placed by a hash of their five-tuple, so that one whose entry is lost is found again.
pub const CONSISTENT: u32 = 1;

/// How many listeners may lead to one port of one task.
///
/// A reply is matched against each of them, so this bounds the work of a reply and the size of [`Replies`].
pub const MAX_REPLY_LISTENERS: usize = 8;

/// A listener as a candidate for the source of a reply.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct ReplySource<A> {
    /// Network order.
    pub address: A,
    /// Network order.
    pub port: Be16,
    /// Zero.
    pub _pad: u16,
}

/// The listeners that lead to one port of one task, keyed by that [`Endpoint`].
///
/// A reply is turned around by asking the flow table for each of them; nearly always there is one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Replies<A> {
    /// Index of the backend whose replies these are.
    pub backend: u32,
    /// How many of `sources` are set.
    pub count: u32,
    /// The candidates.
    pub sources: [ReplySource<A>; MAX_REPLY_LISTENERS],
}

const _: () = {
    assert!(size_of::<Endpoint<V4>>() == 8 && align_of::<Endpoint<V4>>() == 4);
    assert!(size_of::<Endpoint<V6>>() == 20 && align_of::<Endpoint<V6>>() == 4);
    assert!(size_of::<Listener>() == 20);
    assert!(size_of::<Replies<V4>>() == 8 + 8 * MAX_REPLY_LISTENERS);
    assert!(size_of::<Replies<V6>>() == 8 + 20 * MAX_REPLY_LISTENERS);
};

pod!(Endpoint<V4>, Endpoint<V6>, Listener, Replies<V4>, Replies<V6>);
