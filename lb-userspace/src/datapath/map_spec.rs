//! The specification that each table must meet: the kernel hands out a pinned table of any.

use aya::maps::{MapInfo, MapType, lpm_trie::Key};
use lb_common::{
    abi::{Config, Label, LabelKey, size, table},
    access::AccessKey,
    backend::Backend,
    budget::Budget,
    conntrack::Set,
    endpoint::{Endpoint, Listener, TaskEndpoint},
    filter::FILTER_WORDS,
    fragment::{Early, EarlyKey, FragmentKey, Ports},
    guard::{Guard, Rate},
    host_flow::HostFlow,
    net::{V4, V6, Wide},
    outcome::OUTCOMES,
    service::Settings,
    slot::Slot,
    stats::{BackendStats, Open, ServiceStats, TableStats},
    translation::PoolEntry,
    tunnel::{Peer, PeerKey, TaskKey},
};

use super::DatapathError;

/// Sizes asked for; what is not asked for is taken from the tables that are pinned, or by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Connections of each family that the table is made for: half of its lines.
    pub connections: Option<u32>,
    /// Services.
    pub services: Option<u32>,
    /// Listeners of each family.
    pub listeners: Option<u32>,
    /// Backends.
    pub backends: Option<u32>,
    /// Slots.
    pub slots: Option<u32>,
    /// Nodes of the cluster.
    pub nodes: Option<u32>,
    /// Datagrams in fragments, of each family.
    pub fragments: Option<u32>,
}

/// What a pinned table must be.
#[derive(Clone, Copy, Debug)]
pub struct MapSpec {
    /// Name.
    pub name: &'static str,
    /// Kind.
    pub kind: MapType,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
    /// Entries asked for; `None` takes what there is, or the object's own number.
    pub entries: Option<u32>,
}

impl MapSpec {
    /// Those of all tables.
    pub fn all(sizes: &Sizes) -> Vec<Self> {
        use MapType::{Array, Hash, LpmTrie, LruHash, PerCpuArray};
        fn spec<K, V>(name: &'static str, kind: MapType, entries: Option<u32>) -> MapSpec {
            MapSpec { name, kind, key: size_of::<K>() as u32, value: size_of::<V>() as u32, entries }
        }
        // Zero is no node's number.
        let nodes = sizes.nodes.map(|nodes| nodes + 1);
        let sets = sizes.connections.map(size::sets);
        vec![
            spec::<u32, Config>(table::CONFIG, Array, Some(1)),
            spec::<u32, u64>(table::FILTER, Array, Some(FILTER_WORDS as u32)),
            spec::<Endpoint<V4>, Listener>(table::LISTENERS4, Hash, sizes.listeners),
            spec::<Endpoint<V6>, Listener>(table::LISTENERS6, Hash, sizes.listeners),
            spec::<Endpoint<V4>, TaskEndpoint<V4>>(table::TASK_ENDPOINTS4, Hash, sizes.backends),
            spec::<Endpoint<V6>, TaskEndpoint<V6>>(table::TASK_ENDPOINTS6, Hash, sizes.backends),
            spec::<u32, Slot>(table::SLOTS, Array, sizes.slots),
            spec::<u32, Backend>(table::BACKENDS, Array, sizes.backends),
            spec::<u32, u64>(table::CURSORS, Array, sizes.listeners),
            spec::<u32, Set<V4>>(table::CONNECTIONS4, Array, sets),
            spec::<u32, Set<V6>>(table::CONNECTIONS6, Array, sets),
            spec::<u32, Settings>(table::SERVICES, Array, sizes.services),
            spec::<u32, Open>(table::OPEN, Array, sizes.backends),
            spec::<u32, Guard>(table::GUARD, Array, Some(1)),
            spec::<u32, Rate>(table::RATES, PerCpuArray, Some(1)),
            spec::<u32, Budget>(table::ERROR_BUDGETS, Array, Some(size::ERROR_BUDGETS as u32)),
            spec::<u32, u32>(table::HEARTBEAT, Array, Some(1)),
            spec::<FragmentKey<V4>, Ports>(table::FRAGMENTS4, LruHash, sizes.fragments),
            spec::<FragmentKey<V6>, Ports>(table::FRAGMENTS6, LruHash, sizes.fragments),
            spec::<EarlyKey, Early>(table::EARLY_FRAGMENTS, LruHash, Some(size::EARLY_FRAGMENTS as u32)),
            spec::<HostFlow, u32>(table::HOST_FLOWS, LruHash, Some(size::HOST_FLOWS as u32)),
            spec::<u32, Peer>(table::PEERS, Array, nodes),
            spec::<u32, PeerKey>(table::PEER_KEYS, Array, nodes),
            spec::<Wide, u32>(
                table::PEER_NUMBERS,
                Hash,
                nodes.map(|nodes| nodes * size::NODE_ADDRESSES as u32),
            ),
            spec::<TaskKey, u32>(table::TASKS, Hash, sizes.backends),
            spec::<Key<Wide>, u32>(table::INNER_RANGES, LpmTrie, Some(size::INNER_RANGES as u32)),
            spec::<Key<AccessKey>, u32>(
                table::ACCESS,
                LpmTrie,
                sizes.services.map(|services| size::access(services as usize) as u32),
            ),
            spec::<u32, u64>(table::VLANS, Array, Some(size::VLAN_WORDS as u32)),
            spec::<u32, PoolEntry>(table::POOL, Array, Some(size::POOL as u32)),
            spec::<V6, u32>(table::POOL_CLIENTS, Hash, Some(2 * size::POOL as u32)),
            spec::<V6, V6>(
                table::STAND_INS,
                Hash,
                sizes.backends.map(|backends| size::stand_ins(backends as usize) as u32),
            ),
            spec::<u32, u64>(table::OUTCOMES, PerCpuArray, Some(OUTCOMES as u32)),
            spec::<u32, BackendStats>(table::BACKEND_STATS, PerCpuArray, sizes.backends),
            spec::<u32, ServiceStats>(table::SERVICE_STATS, PerCpuArray, sizes.services),
            spec::<u32, TableStats>(table::TABLE_STATS, PerCpuArray, Some(2)),
            spec::<LabelKey, Label>(table::LABELS, Hash, labels(sizes)),
        ]
    }

    /// Compares a pinned table with it.
    ///
    /// # Errors
    /// The first attribute that differs.
    pub fn compare(&self, info: &MapInfo) -> Result<(), DatapathError> {
        let kind = info.map_type().map_err(|e| DatapathError::map("inspect", e))?;
        let pairs = [
            ("kind", kind as u32, self.kind as u32),
            ("the size of its keys", info.key_size(), self.key),
            ("the size of its values", info.value_size(), self.value),
            ("entries", info.max_entries(), self.entries.unwrap_or(info.max_entries())),
        ];
        match pairs.into_iter().find(|(_, found, expected)| found != expected) {
            None => Ok(()),
            // Told in what the setting counts.
            Some(("entries", found, expected))
                if matches!(self.name, table::CONNECTIONS4 | table::CONNECTIONS6) =>
            {
                let [found, expected] = [found, expected].map(size::connections);
                Err(DatapathError::MapSpec { table: self.name, what: "connections", found, expected })
            }
            Some((what, found, expected)) => {
                Err(DatapathError::MapSpec { table: self.name, what, found, expected })
            }
        }
    }
}

/// Backends, services, ports and nodes all have labels, and there is one of the controller's.
fn labels(sizes: &Sizes) -> Option<u32> {
    let Sizes { backends, services, listeners, nodes, .. } = *sizes;
    // Nothing asked for is the object's own number.
    backends.or(services).or(listeners).or(nodes)?;
    let backends = backends.unwrap_or(size::BACKENDS as u32);
    let services = services.unwrap_or(size::SERVICES as u32);
    let nodes = nodes.unwrap_or(size::NODES as u32);
    Some(backends + services + listeners.unwrap_or(size::LISTENERS as u32) + nodes + 1)
}
