//! What the verifier looks at by itself: functions that it takes for what their types say, once, instead of following each of
//! their calls from each way that leads there ("global functions", Linux 5.6; pointers to structures, 5.12). Their parameters may
//! be null as far as it knows, and all that they return is a number.

use lb_common::{
    backend::Backend,
    conntrack::FiveTuple,
    net::{V4, V6},
};

use super::{admission, alias, lifecycle, scheduler, table};
use crate::io::{
    family::Family,
    packet::{Draft, Located, NOBODY, Packet, Search, TunnelMeta},
    verifier,
};

/// What is answered for null, which no caller passes.
const NOTHING: u64 = verifier::PACKED_MALFORMED;

/// A family whose connections are tracked, by functions that are verified apart.
pub trait Tracked: Family {
    /// [`table::by_tuple`].
    fn by_tuple(line: &mut Located, search: &mut Search, tuple: &FiveTuple<Self>) -> u32;
    /// [`table::by_task`].
    fn by_task(line: &mut Located, search: &mut Search, alias: &FiveTuple<Self>, interface: u32) -> u32;
    /// [`table::insert_new`].
    fn insert_new(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32;
    /// [`table::insert_anew`].
    fn insert_anew(line: &mut Located, draft: &Draft<Self>) -> u32;
    /// [`alias::probe`].
    fn probe(packet: &mut Packet<Self>) -> u32;
    /// [`alias::free_port`].
    fn free_port(packet: &mut Packet<Self>, backend: &Backend, snat: u32) -> u32;
    /// [`scheduler::choose`].
    fn choose(packet: &mut Packet<Self>) -> u64;
    /// [`admission::put`].
    fn put(packet: &mut Packet<Self>, backend: &Backend) -> u64;
    /// [`admission::from_peer`].
    fn from_peer(packet: &mut Packet<Self>, tunnel: &TunnelMeta, backend: &Backend, index: u32) -> u64;
    /// [`lifecycle::packed_request`].
    fn request(packet: &mut Packet<Self>) -> u64;
    /// [`lifecycle::packed_reply`].
    fn reply(packet: &mut Packet<Self>, interface: u32) -> u64;
    /// [`lifecycle::packed_told`].
    fn told(packet: &mut Packet<Self>, tunnel: &TunnelMeta) -> u64;
}

/// Exports a function for one family: what is changed, what is read, numbers.
macro_rules! apart {
    ($symbol:ident($($changed:ident: $c:ty),*; $($read:ident: $r:ty),*; $($number:ident),*) -> $result:ty
        = $function:path, $otherwise:expr) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $symbol($($changed: *mut $c,)* $($read: *const $r,)* $($number: u32),*) -> $result {
            // SAFETY: what is not null is a reference of the caller's.
            $(let Some($changed) = (unsafe { $changed.as_mut() }) else { return $otherwise };)*
            // SAFETY: as above.
            $(let Some($read) = (unsafe { $read.as_ref() }) else { return $otherwise };)*
            $function($($changed,)* $($read,)* $($number),*)
        }
    };
}

apart!(connection_by_tuple4(line: Located, search: Search; tuple: FiveTuple<V4>; ) -> u32 = table::by_tuple, 1);
apart!(connection_by_task4(line: Located, search: Search; alias: FiveTuple<V4>; interface) -> u32 = table::by_task, 1);
apart!(connection_insert_new4(line: Located; draft: Draft<V4>, search: Search; ) -> u32 = table::insert_new, 3);
apart!(connection_insert_anew4(line: Located; draft: Draft<V4>; ) -> u32 = table::insert_anew, 3);
apart!(connection_probe4(packet: Packet<V4>; ; ) -> u32 = alias::probe, 1);
apart!(connection_free_port4(packet: Packet<V4>; backend: Backend; snat) -> u32 = alias::free_port, u32::MAX);
apart!(connection_choose4(packet: Packet<V4>; ; ) -> u64 = scheduler::choose, NOBODY as u64);
apart!(connection_put4(packet: Packet<V4>; backend: Backend;) -> u64 = admission::put, NOTHING);
apart!(connection_from_peer4(packet: Packet<V4>; tunnel: TunnelMeta, backend: Backend; index) -> u64 = admission::from_peer, NOTHING);
apart!(connection_request4(packet: Packet<V4>; ; ) -> u64 = lifecycle::packed_request, NOTHING);
apart!(connection_reply4(packet: Packet<V4>; ; interface) -> u64 = lifecycle::packed_reply, NOTHING);
apart!(connection_told4(packet: Packet<V4>; tunnel: TunnelMeta; ) -> u64 = lifecycle::packed_told, NOTHING);

apart!(connection_by_tuple6(line: Located, search: Search; tuple: FiveTuple<V6>; ) -> u32 = table::by_tuple, 1);
apart!(connection_by_task6(line: Located, search: Search; alias: FiveTuple<V6>; interface) -> u32 = table::by_task, 1);
apart!(connection_insert_new6(line: Located; draft: Draft<V6>, search: Search; ) -> u32 = table::insert_new, 3);
apart!(connection_insert_anew6(line: Located; draft: Draft<V6>; ) -> u32 = table::insert_anew, 3);
apart!(connection_probe6(packet: Packet<V6>; ; ) -> u32 = alias::probe, 1);
apart!(connection_free_port6(packet: Packet<V6>; backend: Backend; snat) -> u32 = alias::free_port, u32::MAX);
apart!(connection_choose6(packet: Packet<V6>; ; ) -> u64 = scheduler::choose, NOBODY as u64);
apart!(connection_put6(packet: Packet<V6>; backend: Backend;) -> u64 = admission::put, NOTHING);
apart!(connection_from_peer6(packet: Packet<V6>; tunnel: TunnelMeta, backend: Backend; index) -> u64 = admission::from_peer, NOTHING);
apart!(connection_request6(packet: Packet<V6>; ; ) -> u64 = lifecycle::packed_request, NOTHING);
apart!(connection_reply6(packet: Packet<V6>; ; interface) -> u64 = lifecycle::packed_reply, NOTHING);
apart!(connection_told6(packet: Packet<V6>; tunnel: TunnelMeta; ) -> u64 = lifecycle::packed_told, NOTHING);

impl Tracked for V4 {
    #[inline(always)]
    fn by_tuple(line: &mut Located, search: &mut Search, tuple: &FiveTuple<Self>) -> u32 {
        connection_by_tuple4(line, search, tuple)
    }

    #[inline(always)]
    fn by_task(line: &mut Located, search: &mut Search, alias: &FiveTuple<Self>, interface: u32) -> u32 {
        connection_by_task4(line, search, alias, interface)
    }

    #[inline(always)]
    fn insert_new(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32 {
        connection_insert_new4(line, draft, search)
    }

    #[inline(always)]
    fn insert_anew(line: &mut Located, draft: &Draft<Self>) -> u32 {
        connection_insert_anew4(line, draft)
    }

    #[inline(always)]
    fn probe(packet: &mut Packet<Self>) -> u32 {
        connection_probe4(packet)
    }

    #[inline(always)]
    fn free_port(packet: &mut Packet<Self>, backend: &Backend, snat: u32) -> u32 {
        connection_free_port4(packet, backend, snat)
    }

    #[inline(always)]
    fn choose(packet: &mut Packet<Self>) -> u64 {
        connection_choose4(packet)
    }

    #[inline(always)]
    fn put(packet: &mut Packet<Self>, backend: &Backend) -> u64 {
        connection_put4(packet, backend)
    }

    #[inline(always)]
    fn from_peer(packet: &mut Packet<Self>, tunnel: &TunnelMeta, backend: &Backend, index: u32) -> u64 {
        connection_from_peer4(packet, tunnel, backend, index)
    }

    #[inline(always)]
    fn request(packet: &mut Packet<Self>) -> u64 {
        connection_request4(packet)
    }

    #[inline(always)]
    fn reply(packet: &mut Packet<Self>, interface: u32) -> u64 {
        connection_reply4(packet, interface)
    }

    #[inline(always)]
    fn told(packet: &mut Packet<Self>, tunnel: &TunnelMeta) -> u64 {
        connection_told4(packet, tunnel)
    }
}

impl Tracked for V6 {
    #[inline(always)]
    fn by_tuple(line: &mut Located, search: &mut Search, tuple: &FiveTuple<Self>) -> u32 {
        connection_by_tuple6(line, search, tuple)
    }

    #[inline(always)]
    fn by_task(line: &mut Located, search: &mut Search, alias: &FiveTuple<Self>, interface: u32) -> u32 {
        connection_by_task6(line, search, alias, interface)
    }

    #[inline(always)]
    fn insert_new(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32 {
        connection_insert_new6(line, draft, search)
    }

    #[inline(always)]
    fn insert_anew(line: &mut Located, draft: &Draft<Self>) -> u32 {
        connection_insert_anew6(line, draft)
    }

    #[inline(always)]
    fn probe(packet: &mut Packet<Self>) -> u32 {
        connection_probe6(packet)
    }

    #[inline(always)]
    fn free_port(packet: &mut Packet<Self>, backend: &Backend, snat: u32) -> u32 {
        connection_free_port6(packet, backend, snat)
    }

    #[inline(always)]
    fn choose(packet: &mut Packet<Self>) -> u64 {
        connection_choose6(packet)
    }

    #[inline(always)]
    fn put(packet: &mut Packet<Self>, backend: &Backend) -> u64 {
        connection_put6(packet, backend)
    }

    #[inline(always)]
    fn from_peer(packet: &mut Packet<Self>, tunnel: &TunnelMeta, backend: &Backend, index: u32) -> u64 {
        connection_from_peer6(packet, tunnel, backend, index)
    }

    #[inline(always)]
    fn request(packet: &mut Packet<Self>) -> u64 {
        connection_request6(packet)
    }

    #[inline(always)]
    fn reply(packet: &mut Packet<Self>, interface: u32) -> u64 {
        connection_reply6(packet, interface)
    }

    #[inline(always)]
    fn told(packet: &mut Packet<Self>, tunnel: &TunnelMeta) -> u64 {
        connection_told6(packet, tunnel)
    }
}
