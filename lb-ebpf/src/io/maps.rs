//! The tables, as `lb_common::abi` names and sizes them. User space may ask for other sizes when it loads.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
    macros::btf_map,
};
use lb_common::{
    abi::{Config, DENIES, Label, LabelKey, inner, size},
    access::{self, AccessKey},
    backend::Backend,
    budget::Budget,
    conntrack::{Set, is_within},
    endpoint::{Endpoint, Listener, TaskEndpoint},
    filter::FILTER_WORDS,
    fragment::{Early, EarlyKey, FragmentKey, Ports},
    guard::{Guard, Rate},
    host_flow::HostFlow,
    net::{Address, V4, V6, Wide},
    outcome::OUTCOMES as OUTCOME_COUNT,
    service::Settings,
    slot::Slot,
    stats::{BackendStats, Open, ServiceStats, TableStats},
    tags::Tags,
    translation::PoolEntry,
    tunnel::{Peer, PeerKey, SELF, TaskKey},
};

use super::{
    clock,
    packet::{Cutting, Scratch},
};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;
/// Values begin at a page: one of 64 bytes is one cache line. Others begin 312 bytes after one.
const ALIGNED: usize = BPF_F_MMAPABLE as usize;

/// Connections of one family.
pub type Connections<A> = Array<Set<A>, { size::SETS }, ALIGNED>;
/// Listeners of one family.
pub type Listeners<A> = HashMap<Endpoint<A>, Listener, { size::LISTENERS }, ON_DEMAND>;
/// Tasks' endpoints of one family.
pub type TaskEndpoints<A> = HashMap<Endpoint<A>, TaskEndpoint<A>, { size::BACKENDS }, ON_DEMAND>;
/// Fragmented datagrams of one family.
pub type Fragments<A> = LruHashMap<FragmentKey<A>, Ports, { size::FRAGMENTS }>;

/// Sets of the connection tables; the loader says.
#[unsafe(no_mangle)]
static SETS: Global<u32> = Global::new(size::SETS as u32);

/// Sets of the connection table of each family.
#[inline(always)]
pub fn sets() -> u32 {
    SETS.load()
}

#[btf_map]
pub static CONFIG: Array<Config, 1> = Array::new();

#[btf_map]
pub static FILTER: Array<u64, FILTER_WORDS> = Array::new();

#[btf_map]
pub static LISTENERS4: Listeners<V4> = HashMap::new();

#[btf_map]
pub static LISTENERS6: Listeners<V6> = HashMap::new();

#[btf_map]
pub static TASK_ENDPOINTS4: TaskEndpoints<V4> = HashMap::new();

#[btf_map]
pub static TASK_ENDPOINTS6: TaskEndpoints<V6> = HashMap::new();

#[btf_map]
pub static SLOTS: Array<Slot, { size::SLOTS }> = Array::new();

#[btf_map]
pub static BACKENDS: Array<Backend, { size::BACKENDS }, ALIGNED> = Array::new();

#[btf_map]
pub static CURSORS: Array<u64, { size::LISTENERS }> = Array::new();

#[btf_map]
pub static CONNECTIONS4: Connections<V4> = Array::new();

#[btf_map]
pub static CONNECTIONS6: Connections<V6> = Array::new();

#[btf_map]
pub static SERVICES: Array<Settings, { size::SERVICES }> = Array::new();

#[btf_map]
pub static OPEN: Array<Open, { size::BACKENDS }> = Array::new();

#[btf_map]
pub static GUARD: Array<Guard, 1> = Array::new();

#[btf_map]
pub static RATES: PerCpuArray<Rate, 1> = PerCpuArray::new();

#[btf_map]
pub static ERROR_BUDGETS: Array<Budget, { size::ERROR_BUDGETS }> = Array::new();

#[btf_map]
pub static HEARTBEAT: Array<u32, 1> = Array::new();

#[btf_map]
pub static FRAGMENTS4: Fragments<V4> = LruHashMap::new();

#[btf_map]
pub static FRAGMENTS6: Fragments<V6> = LruHashMap::new();

#[btf_map]
pub static EARLY_FRAGMENTS: LruHashMap<EarlyKey, Early, { size::EARLY_FRAGMENTS }> = LruHashMap::new();

#[btf_map]
pub static HOST_FLOWS: LruHashMap<HostFlow, u32, { size::HOST_FLOWS }> = LruHashMap::new();

#[btf_map]
pub static PEERS: Array<Peer, { size::NODES }, ALIGNED> = Array::new();

#[btf_map]
pub static PEER_KEYS: Array<PeerKey, { size::NODES }, ALIGNED> = Array::new();

#[btf_map]
pub static PEER_NUMBERS: HashMap<Wide, u32, { size::NODES * size::NODE_ADDRESSES }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub static TASKS: HashMap<TaskKey, u32, { size::BACKENDS }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub static INNER_RANGES: LpmTrie<Wide, u32, { size::INNER_RANGES }> = LpmTrie::new();

#[btf_map]
pub static ACCESS: LpmTrie<AccessKey, u32, { size::access(size::SERVICES) }> = LpmTrie::new();

#[btf_map]
pub static VLANS: Array<u64, { size::VLAN_WORDS }> = Array::new();

#[btf_map]
pub static OUTCOMES: PerCpuArray<u64, OUTCOME_COUNT> = PerCpuArray::new();

#[btf_map]
pub static BACKEND_STATS: PerCpuArray<BackendStats, { size::BACKENDS }> = PerCpuArray::new();

#[btf_map]
pub static SERVICE_STATS: PerCpuArray<ServiceStats, { size::SERVICES }> = PerCpuArray::new();

#[btf_map]
pub static POOL: Array<PoolEntry, { size::POOL }, ALIGNED> = Array::new();

#[btf_map]
pub static POOL_CLIENTS: HashMap<V6, u32, { 2 * size::POOL }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub static STAND_INS: HashMap<V6, V6, { size::STAND_INS }, ON_DEMAND> = HashMap::new();

/// Of IPv4, of IPv6.
#[btf_map]
pub static TABLE_STATS: PerCpuArray<TableStats, 2> = PerCpuArray::new();

/// What each program is working on, see [`super::packet::Packet`]: one entry a program. Not pinned: whoever
/// loads the programs gets one of its own.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 5> = PerCpuArray::new();

/// Room for a packet that is being cut, see [`Cutting`]. Not pinned either.
#[btf_map]
pub static CUTTING: PerCpuArray<Cutting, 1> = PerCpuArray::new();

/// Room for a packet that is being cut.
#[inline(always)]
pub fn cutting() -> Option<&'static mut Cutting> {
    // SAFETY: the entry is this CPU's own, and whoever cuts a packet is done with it before it returns: what it sends comes in later.
    CUTTING.get_ptr_mut(0).map(|cutting| unsafe { &mut *cutting })
}

/// Room for an early fragment that is put into its table. Not pinned either.
#[btf_map]
pub static EARLY: PerCpuArray<Early, 1> = PerCpuArray::new();

/// Room for an early fragment.
#[inline(always)]
pub fn early() -> Option<&'static mut Early> {
    // SAFETY: as above; the table has a copy.
    EARLY.get_ptr_mut(0).map(|early| unsafe { &mut *early })
}

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

/// The configuration; missing only before user space has written it.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Whether nobody has controlled the datapath for longer than it may serve by itself.
#[inline(always)]
pub fn is_stale(config: &Config) -> bool {
    config.stale_after != 0 && is_silent(config)
}

/// A function of its own, so that the verifier follows the packet once.
#[inline(never)]
fn is_silent(config: &Config) -> bool {
    HEARTBEAT.get(0).is_some_and(|beat| {
        !is_within(*beat, clock::now(), config.stale_after.wrapping_mul(config.jiffies_per_second))
    })
}

/// Whether the address is one of a node's of the cluster.
#[inline(always)]
pub fn is_node<A: Address>(address: &A) -> bool {
    let mapped = address.to_mapped();
    // SAFETY: not read.
    unsafe { PEER_NUMBERS.get(mapped) }.is_some()
}

/// Whether the address is one of this node's.
#[inline(always)]
pub fn is_own<A: Address>(address: &A) -> bool {
    let mapped = address.to_mapped();
    // SAFETY: copied at once.
    unsafe { PEER_NUMBERS.get(mapped) }.is_some_and(|number| *number == SELF)
}

/// What the address is to this node, one of [`mod@inner`].
#[inline(always)]
pub fn inner<A: Address>(address: &A) -> u32 {
    INNER_RANGES.get(&Key::new(128, address.to_mapped())).copied().unwrap_or(inner::OUTSIDE)
}

/// Whether a client may connect to a service that not everybody may connect to.
#[inline(always)]
pub fn may_connect<A: Address>(service: u32, client: &A) -> bool {
    listed(service, client) == access::ALLOWED
}

/// Whether no service takes a client.
#[inline(always)]
pub fn is_denied<A: Address>(client: &A) -> bool {
    config().is_some_and(|config| config.flags & DENIES != 0)
        && listed(access::every_service(A::IS_V4), client) == access::DENIED
}

/// What a list says of a client; 0 if nothing. A function of its own: the key is large.
#[inline(never)]
fn listed<A: Address>(service: u32, client: &A) -> u32 {
    let key = Key::new(access::KEY_BITS, AccessKey { service, address: client.to_mapped() });
    ACCESS.get(&key).copied().unwrap_or_default()
}

/// Whether a frame with these tags is one of this node's: it has no VLAN, or one that the node has on the uplink. A tag that
/// has a priority alone is of none; the kernel takes it off and looks at the next.
#[inline(always)]
pub fn has_vlan(tags: &Tags) -> bool {
    let id = match tags.outer.id() {
        0 => tags.inner.id(),
        id => id,
    } as u32;
    id == 0 || VLANS.get(id / u64::BITS).is_some_and(|bits| bits >> (id % u64::BITS) & 1 != 0)
}
