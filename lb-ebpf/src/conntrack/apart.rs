//! What the verifier looks at by itself: functions that it takes for what their types say, once, instead of following each of
//! their calls from each way that leads there ("global functions", Linux 5.6; pointers to structures, 5.12). Their parameters may
//! be null as far as it knows, and all that they return is a number.

use lb_common::{
    backend::Backend,
    conntrack::FiveTuple,
    net::{V4, V6},
};

use super::{admission, alias, lifecycle, scheduler, table, tracked::Tracked};
use crate::io::{
    packet::{Draft, Located, NOBODY, Packet, Search, TunnelMeta},
    verifier,
};

/// What is answered for null, which no caller passes.
const NOTHING: u64 = verifier::PACKED_MALFORMED;

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

/// A family's functions, under the names that the verifier's log shows.
macro_rules! tracked {
    ($family:ty: $by_tuple:ident $by_task:ident $insert_new:ident $insert_anew:ident $probe:ident $free_port:ident $linger:ident $choose:ident $put:ident $from_peer:ident $request:ident $reply:ident $peer_reply:ident) => {
        apart!($by_tuple(line: Located, search: Search; tuple: FiveTuple<$family>; ) -> u32 = table::by_tuple, 1);
        apart!($by_task(line: Located, search: Search; alias: FiveTuple<$family>; interface) -> u32 = table::by_task, 1);
        apart!($insert_new(line: Located; draft: Draft<$family>, search: Search; ) -> u32 = table::insert_new, 3);
        apart!($insert_anew(line: Located; draft: Draft<$family>, search: Search; ) -> u32 = table::insert_anew, 3);
        apart!($probe(packet: Packet<$family>; ; ) -> u32 = alias::probe, 1);
        apart!($free_port(packet: Packet<$family>; backend: Backend; snat) -> u32 = alias::free_port, u32::MAX);
        apart!($linger(packet: Packet<$family>; ; ) -> u32 = alias::linger, 0);
        apart!($choose(packet: Packet<$family>; ; ) -> u64 = scheduler::choose, NOBODY as u64);
        apart!($put(packet: Packet<$family>; backend: Backend;) -> u64 = admission::put, NOTHING);
        apart!($from_peer(packet: Packet<$family>; tunnel: TunnelMeta, backend: Backend; index) -> u64 = admission::from_peer, NOTHING);
        apart!($request(packet: Packet<$family>; ; ) -> u64 = lifecycle::packed_request, NOTHING);
        apart!($reply(packet: Packet<$family>; ; interface) -> u64 = lifecycle::packed_reply, NOTHING);
        apart!($peer_reply(packet: Packet<$family>; tunnel: TunnelMeta; ) -> u64 = lifecycle::packed_peer_reply, NOTHING);

        impl Tracked for $family {
            #[inline(always)]
            fn by_tuple(line: &mut Located, search: &mut Search, tuple: &FiveTuple<Self>) -> u32 {
                $by_tuple(line, search, tuple)
            }

            #[inline(always)]
            fn by_task(line: &mut Located, search: &mut Search, alias: &FiveTuple<Self>, interface: u32) -> u32 {
                $by_task(line, search, alias, interface)
            }

            #[inline(always)]
            fn insert_new(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32 {
                $insert_new(line, draft, search)
            }

            #[inline(always)]
            fn insert_anew(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32 {
                $insert_anew(line, draft, search)
            }

            #[inline(always)]
            fn probe(packet: &mut Packet<Self>) -> u32 {
                $probe(packet)
            }

            #[inline(always)]
            fn free_port(packet: &mut Packet<Self>, backend: &Backend, snat: u32) -> u32 {
                $free_port(packet, backend, snat)
            }

            #[inline(always)]
            fn linger(packet: &mut Packet<Self>) -> u32 {
                $linger(packet)
            }

            #[inline(always)]
            fn choose(packet: &mut Packet<Self>) -> u64 {
                $choose(packet)
            }

            #[inline(always)]
            fn put(packet: &mut Packet<Self>, backend: &Backend) -> u64 {
                $put(packet, backend)
            }

            #[inline(always)]
            fn from_peer(packet: &mut Packet<Self>, tunnel: &TunnelMeta, backend: &Backend, index: u32) -> u64 {
                $from_peer(packet, tunnel, backend, index)
            }

            #[inline(always)]
            fn request(packet: &mut Packet<Self>) -> u64 {
                $request(packet)
            }

            #[inline(always)]
            fn reply(packet: &mut Packet<Self>, interface: u32) -> u64 {
                $reply(packet, interface)
            }

            #[inline(always)]
            fn peer_reply(packet: &mut Packet<Self>, tunnel: &TunnelMeta) -> u64 {
                $peer_reply(packet, tunnel)
            }
        }
    };
}

tracked!(V4:
    connection_by_tuple4 connection_by_task4 connection_insert_new4 connection_insert_anew4 connection_probe4 connection_free_port4 connection_linger4 connection_choose4 connection_put4 connection_from_peer4 connection_request4 connection_reply4 connection_peer_reply4
);
tracked!(V6:
    connection_by_tuple6 connection_by_task6 connection_insert_new6 connection_insert_anew6 connection_probe6 connection_free_port6 connection_linger6 connection_choose6 connection_put6 connection_from_peer6 connection_request6 connection_reply6 connection_peer_reply6
);
