//! What the stages of this folder ask of each other through the verifier's back: functions that it looks at by itself, once, for
//! each family. [`super::apart`] makes them of the stages' own.

use lb_common::{backend::Backend, conntrack::FiveTuple};

use crate::io::{
    family::Family,
    packet::{Draft, Located, Packet, Search, TunnelMeta},
};

/// A family whose connections are tracked, by functions that are verified apart.
pub trait Tracked: Family {
    /// [`super::table::by_tuple`].
    fn by_tuple(line: &mut Located, search: &mut Search, tuple: &FiveTuple<Self>) -> u32;
    /// [`super::table::by_task`].
    fn by_task(line: &mut Located, search: &mut Search, alias: &FiveTuple<Self>, interface: u32) -> u32;
    /// [`super::table::insert_new`].
    fn insert_new(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32;
    /// [`super::table::insert_anew`].
    fn insert_anew(line: &mut Located, draft: &Draft<Self>, search: &Search) -> u32;
    /// [`super::alias::probe`].
    fn probe(packet: &mut Packet<Self>) -> u32;
    /// [`super::alias::free_port`].
    fn free_port(packet: &mut Packet<Self>, backend: &Backend, snat: u32) -> u32;
    /// [`super::alias::linger`].
    fn linger(packet: &mut Packet<Self>) -> u32;
    /// [`super::scheduler::choose`].
    fn choose(packet: &mut Packet<Self>) -> u64;
    /// [`super::admission::put`].
    fn put(packet: &mut Packet<Self>, backend: &Backend) -> u64;
    /// [`super::admission::from_peer`].
    fn from_peer(packet: &mut Packet<Self>, tunnel: &TunnelMeta, backend: &Backend, index: u32) -> u64;
    /// [`super::lifecycle::packed_request`].
    fn request(packet: &mut Packet<Self>) -> u64;
    /// [`super::lifecycle::packed_reply`].
    fn reply(packet: &mut Packet<Self>, interface: u32) -> u64;
    /// [`super::lifecycle::packed_peer_reply`].
    fn peer_reply(packet: &mut Packet<Self>, tunnel: &TunnelMeta) -> u64;
}
