//! The tables, as `lb_common::abi` names and sizes them. User space may ask for other sizes when it loads.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::{
    abi::{Config, Label, LabelKey, size},
    backend::Backend,
    endpoint::{Endpoint, Listener, Replies},
    filter::FILTER_WORDS,
    flow::{Flow, FlowKey},
    net::{V4, V6},
    outcome::OUTCOMES as OUTCOME_COUNT,
    stats::{BackendStats, ServiceStats},
};

use crate::packet::Scratch;

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static CONFIG: Array<Config, 1> = Array::new();

#[btf_map]
pub static FILTER: Array<u64, FILTER_WORDS> = Array::new();

#[btf_map]
pub static LISTENERS4: HashMap<Endpoint<V4>, Listener, { size::LISTENERS }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub static LISTENERS6: HashMap<Endpoint<V6>, Listener, { size::LISTENERS }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub static REPLIES4: HashMap<Endpoint<V4>, Replies<V4>, { size::BACKENDS }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub static REPLIES6: HashMap<Endpoint<V6>, Replies<V6>, { size::BACKENDS }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub static SLOTS: Array<u32, { size::SLOTS }> = Array::new();

#[btf_map]
pub static BACKENDS: Array<Backend, { size::BACKENDS }> = Array::new();

#[btf_map]
pub static CURSORS: Array<u64, { size::LISTENERS }> = Array::new();

#[btf_map]
pub static FLOWS4: LruHashMap<FlowKey<V4>, Flow<V4>, { size::FLOWS }> = LruHashMap::new();

#[btf_map]
pub static FLOWS6: LruHashMap<FlowKey<V6>, Flow<V6>, { size::FLOWS }> = LruHashMap::new();

#[btf_map]
pub static OUTCOMES: PerCpuArray<u64, OUTCOME_COUNT> = PerCpuArray::new();

#[btf_map]
pub static BACKEND_STATS: PerCpuArray<BackendStats, { size::BACKENDS }> = PerCpuArray::new();

#[btf_map]
pub static SERVICE_STATS: PerCpuArray<ServiceStats, { size::SERVICES }> = PerCpuArray::new();

/// What each program is working on, see [`crate::packet::Packet`]: one entry a program. Not pinned: whoever
/// loads the programs gets one of its own.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 3> = PerCpuArray::new();

/// Kept here so that it is made, pinned and adopted with the rest; no program reads it.
#[btf_map]
pub static LABELS: HashMap<LabelKey, Label, { size::BACKENDS * 2 }, ON_DEMAND> = HashMap::new();

/// The scratch of one program.
#[inline(always)]
pub fn scratch(program: u32) -> Option<&'static mut Scratch> {
    // SAFETY: the entry is this CPU's and this program's own, and a program is not entered again before it
    // returns.
    SCRATCH.get_ptr_mut(program).map(|scratch| unsafe { &mut *scratch })
}

/// The surroundings; missing only before user space has written them.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}
