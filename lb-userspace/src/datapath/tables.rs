//! Reading and writing the pinned tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray},
};
use lb_common::{
    abi::{
        Config, LABEL_BACKEND, LABEL_BYTES, LABEL_DRAIN, LABEL_KEY, LABEL_NODE, LABEL_PORT, LABEL_SERVICE,
        LABEL_SOURCE, LABEL_TROUBLE, Label, LabelKey, size, table,
    },
    access::AccessKey,
    backend::{Backend, State},
    conntrack::{Phase, Timers},
    endpoint::{Endpoint, Listener, TaskEndpoint},
    filter::{Side, position},
    guard::{Guard, Rate},
    net::{Address, Be16, V4, V6, Wide},
    service::Settings,
    slot::Slot,
    stats::{BackendStats, Open, ServiceStats, TableStats},
    tunnel::{Peer, PeerKey, TaskKey, mapped, unmapped},
};
use serde::{Serialize, de::DeserializeOwned};

use super::{DatapathError, PinDir, error::errno, fault};
use crate::{
    cluster::{Idle, Protocol},
    plan::{At, BackendEntry, BackendLabel, Limits, MapOp, ServiceLabel, Tables, TaskListener},
    report::{Drain, SourceReport, Trouble},
    tunnel_key::Secret,
};

/// Ids of VLANs.
pub type Vlans = BTreeSet<u16>;

type Listeners<A> = HashMap<MapData, Endpoint<A>, Listener>;
type TaskEndpoints<A> = HashMap<MapData, Endpoint<A>, TaskEndpoint<A>>;

/// All tables of one datapath, open.
pub struct TableSet {
    pins: PinDir,
    config: Array<MapData, Config>,
    filter: Array<MapData, u64>,
    listeners4: Listeners<V4>,
    listeners6: Listeners<V6>,
    task_endpoints4: TaskEndpoints<V4>,
    task_endpoints6: TaskEndpoints<V6>,
    slots: Array<MapData, Slot>,
    backends: Array<MapData, Backend>,
    peers: Array<MapData, Peer>,
    peer_keys: Array<MapData, PeerKey>,
    peer_numbers: HashMap<MapData, Wide, u32>,
    tasks: HashMap<MapData, TaskKey, u32>,
    pub(super) stand_ins: HashMap<MapData, V6, V6>,
    pub(super) inner_ranges: LpmTrie<MapData, Wide, u32>,
    pub(super) access: LpmTrie<MapData, AccessKey, u32>,
    vlans: Array<MapData, u64>,
    labels: HashMap<MapData, LabelKey, Label>,
    settings: Array<MapData, Settings>,
    open: Array<MapData, Open>,
    guard: Array<MapData, Guard>,
    rates: PerCpuArray<MapData, Rate>,
    heartbeat: Array<MapData, u32>,
    pub(super) outcomes: PerCpuArray<MapData, u64>,
    pub(super) backend_stats: PerCpuArray<MapData, BackendStats>,
    pub(super) service_stats: PerCpuArray<MapData, ServiceStats>,
    pub(super) table_stats: PerCpuArray<MapData, TableStats>,
}

fn open<T: TryFrom<Map, Error = MapError>>(pins: &PinDir, name: &str) -> Result<T, DatapathError> {
    let map = MapData::from_pin(pins.table(name)).and_then(Map::from_map_data).and_then(T::try_from);
    map.map_err(|error| DatapathError::map("open", error))
}

/// This node's key for the tunnel as it was kept with what is pinned for an interface, if it was; also with tables of another
/// version, so that a node whose tables are made anew is known by the same key.
pub fn kept_secret(interface: &str) -> Option<Secret> {
    let labels: HashMap<_, LabelKey, Label> = open(&PinDir::of(interface).ok()?, table::LABELS).ok()?;
    decode(&labels.get(&LabelKey { kind: LABEL_KEY, index: 0 }, 0).ok()?)
}

impl TableSet {
    /// Opens what is pinned.
    ///
    /// # Errors
    /// Nothing is attached, a pin is missing, or a table is not what it should be.
    pub fn of(interface: &str) -> Result<Self, DatapathError> {
        let pins = PinDir::of(interface)?;
        let expected = lb_common::abi::ABI_VERSION;
        let found = if pins.exists()? { Self::version(&pins)? } else { 0 };
        if found == expected {
            return Self::open(&pins);
        }
        // The version is written last: tables without one are being made, or a load of them was cut short.
        match pins.controller() {
            Some(pid) if found == 0 => Err(DatapathError::Starting { interface: interface.to_owned(), pid }),
            _ if found == 0 && !pins.has_links() => {
                Err(DatapathError::NotAttached(Some(interface.to_owned())))
            }
            _ => Err(DatapathError::Version { found, expected }),
        }
    }

    pub(super) fn pins(&self) -> &PinDir {
        &self.pins
    }

    pub(super) fn open(pins: &PinDir) -> Result<Self, DatapathError> {
        Ok(Self {
            pins: pins.clone(),
            config: open(pins, table::CONFIG)?,
            filter: open(pins, table::FILTER)?,
            listeners4: open(pins, table::LISTENERS4)?,
            listeners6: open(pins, table::LISTENERS6)?,
            task_endpoints4: open(pins, table::TASK_ENDPOINTS4)?,
            task_endpoints6: open(pins, table::TASK_ENDPOINTS6)?,
            slots: open(pins, table::SLOTS)?,
            backends: open(pins, table::BACKENDS)?,
            peers: open(pins, table::PEERS)?,
            peer_keys: open(pins, table::PEER_KEYS)?,
            peer_numbers: open(pins, table::PEER_NUMBERS)?,
            tasks: open(pins, table::TASKS)?,
            stand_ins: open(pins, table::STAND_INS)?,
            inner_ranges: open(pins, table::INNER_RANGES)?,
            access: open(pins, table::ACCESS)?,
            vlans: open(pins, table::VLANS)?,
            labels: open(pins, table::LABELS)?,
            settings: open(pins, table::SERVICES)?,
            open: open(pins, table::OPEN)?,
            guard: open(pins, table::GUARD)?,
            rates: open(pins, table::RATES)?,
            heartbeat: open(pins, table::HEARTBEAT)?,
            outcomes: open(pins, table::OUTCOMES)?,
            backend_stats: open(pins, table::BACKEND_STATS)?,
            service_stats: open(pins, table::SERVICE_STATS)?,
            table_stats: open(pins, table::TABLE_STATS)?,
        })
    }

    /// The version that the pinned tables were made by; its place in the first four bytes never changes.
    pub(super) fn version(pins: &PinDir) -> Result<u32, DatapathError> {
        let map = MapData::from_pin(pins.table(table::CONFIG)).map_err(|e| DatapathError::map("open", e))?;
        let value = map.info().map_err(|e| DatapathError::map("inspect", e))?.value_size() as usize;
        if value != size_of::<Config>() {
            return Ok(0);
        }
        let config: Array<_, Config> = open(pins, table::CONFIG)?;
        Ok(config.get(&0, 0).map_err(|e| DatapathError::map("read", e))?.abi_version)
    }

    /// The configuration of the programs.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn config(&self) -> Result<Config, DatapathError> {
        self.config.get(&0, 0).map_err(|e| DatapathError::map("read", e))
    }

    /// Makes the table hold these VLANs and no other.
    pub(super) fn set_vlans(&mut self, wanted: &Vlans) -> Result<(), DatapathError> {
        for word in 0..size::VLAN_WORDS as u32 {
            let first = word as u16 * u64::BITS as u16;
            let ids = wanted.range(first..first + u64::BITS as u16);
            let bits = ids.fold(0_u64, |bits, id| bits | 1 << (id - first));
            if self.vlans.get(&word, 0).map_err(|e| DatapathError::map("read", e))? != bits {
                write(&mut self.vlans, word, bits)?;
            }
        }
        Ok(())
    }

    /// The name by which other nodes ask for a task of this node, by the number of its backend; none of a task that they do not
    /// reach.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn task_name(&self, backend: u32) -> Result<Option<TaskKey>, DatapathError> {
        for item in self.tasks.iter() {
            let (key, index) = item.map_err(|e| DatapathError::map("read", e))?;
            if index == backend {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Whether the port filter has packets to this port looked at.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn looks_at(&self, protocol: Protocol, port: u16) -> Result<bool, DatapathError> {
        let (word, bit) = position(Side::Destination, protocol.number(), Be16::new(port));
        self.filter.get(&word, 0).map(|bits| bits & bit != 0).map_err(|e| DatapathError::map("read", e))
    }

    /// The flood guard, and how many connections it has placed.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn guard(&self) -> Result<(Guard, u64), DatapathError> {
        let guard = self.guard.get(&0, 0).map_err(|e| DatapathError::map("read", e))?;
        let rates = self.rates.get(&0, 0).map_err(|e| DatapathError::map("read", e))?;
        Ok((guard, rates.iter().map(|rate| rate.placed).sum()))
    }

    pub(super) fn set_heartbeat(&mut self, now: u32) -> Result<(), DatapathError> {
        self.heartbeat.set(0, now, 0).map_err(|e| DatapathError::map("write", e))
    }

    pub(super) fn set_config(&mut self, config: Config) -> Result<(), DatapathError> {
        write(&mut self.config, 0, config)
    }

    pub(super) fn limits(&self) -> Result<Limits, DatapathError> {
        Ok(Limits {
            services: self.entries(table::SERVICE_STATS)?,
            listeners: self.entries(table::LISTENERS4)?,
            backends: self.entries(table::BACKENDS)?,
            slots: self.entries(table::SLOTS)?,
            // Zero is this node.
            nodes: self.entries(table::PEERS)?.saturating_sub(1),
            ranges: size::RANGES as u32,
        })
    }

    /// Entries a table has room for.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn entries(&self, name: &str) -> Result<u32, DatapathError> {
        let map = MapData::from_pin(self.pins.table(name)).map_err(|e| DatapathError::map("open", e))?;
        Ok(map.info().map_err(|e| DatapathError::map("inspect", e))?.max_entries())
    }

    /// Everything that user space has written.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn read(&self) -> Result<Tables, DatapathError> {
        let mut tables = self.read_labelled()?;
        // Free numbers too: their generations must go on.
        for index in 0..self.backends.len() {
            let backend = self.backends.get(&index, 0).map_err(|e| DatapathError::map("read", e))?;
            if backend.generation != 0 {
                tables.generations.insert(index, backend.generation);
            }
            if backend.state != State::Free as u8 && !tables.backends.contains_key(&index) {
                tables.backends.insert(index, BackendEntry { backend, label: nameless(&backend, index) });
            }
        }
        // Connections may name any of them.
        tables.resting =
            tables.generations.keys().filter(|index| !tables.backends.contains_key(index)).copied().collect();
        tables.last_node = tables.nodes.keys().next_back().copied().unwrap_or_default();
        let peers = tables.nodes.iter().filter(|(_, node)| node.agent && !node.this);
        for number in peers.map(|(number, _)| *number).collect::<Vec<_>>() {
            tables.peers.insert(number, self.peer(number)?);
        }
        // Also of numbers that are no peer's: what a change that was cut short has left is taken away.
        for number in 0..self.peer_keys.len() {
            let key = self.peer_key(number)?.current;
            if key != 0 {
                tables.peer_keys.insert(number, key);
            }
        }
        for item in self.peer_numbers.iter() {
            let (address, number) = item.map_err(|e| DatapathError::map("read", e))?;
            tables.peer_numbers.insert(unmapped(address), number);
        }
        for item in self.tasks.iter() {
            let (key, index) = item.map_err(|e| DatapathError::map("read", e))?;
            tables.tasks.insert(key, index);
        }
        tables.stand_ins = self.read_stand_ins()?;
        self.read_task_endpoints(&self.task_endpoints4, &mut tables)?;
        self.read_task_endpoints(&self.task_endpoints6, &mut tables)?;
        for word in 0..self.filter.len() {
            let bits = self.filter.get(&word, 0).map_err(|e| DatapathError::map("read", e))?;
            if bits != 0 {
                tables.filter.insert(word, bits);
            }
        }
        Ok(tables)
    }

    /// What users may ask about: names, listeners, backends and their slots.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn read_labelled(&self) -> Result<Tables, DatapathError> {
        let mut tables = Tables::empty(self.entries(table::SLOTS)?);
        for item in self.labels.iter() {
            let (key, label) = item.map_err(|e| DatapathError::map("read", e))?;
            match key.kind {
                LABEL_NODE => keep(&mut tables.nodes, key.index, decode(&label)),
                LABEL_SERVICE => keep(&mut tables.services, key.index, decode(&label)),
                LABEL_PORT => keep(&mut tables.ports, key.index, decode(&label)),
                LABEL_BACKEND => self.read_backend(key.index, decode(&label), &mut tables)?,
                _ => {}
            }
        }
        self.read_listeners(&self.listeners4, &mut tables)?;
        self.read_listeners(&self.listeners6, &mut tables)?;
        tables.access = self.read_access()?;
        Ok(tables)
    }

    /// What a controller said last of its source.
    pub fn report(&self) -> Option<SourceReport> {
        self.labels.get(&LabelKey { kind: LABEL_SOURCE, index: 0 }, 0).ok().as_ref().and_then(decode)
    }

    /// What is wrong with those of these backends of which the datapath counted something wrong.
    pub fn troubles(&self, counters: &BTreeMap<u32, BackendStats>) -> BTreeMap<u32, Trouble> {
        let suspects = counters.iter().filter(|(_, stats)| stats.failovers > 0);
        suspects.filter_map(|(index, _)| Some((*index, self.kept(LABEL_TROUBLE, *index)?))).collect()
    }

    /// What somebody drains, and which version of that it is.
    pub fn drains(&self) -> Drains {
        let Some(head) = self.kept::<DrainHead>(LABEL_DRAIN, 0) else { return Drains::default() };
        let drains = (1..=head.slots).filter_map(|index| Some((index, self.kept(LABEL_DRAIN, index)?)));
        Drains { version: head.version, by_index: drains.collect() }
    }

    /// The version of what somebody drains.
    pub fn drain_version(&self) -> u64 {
        self.kept::<DrainHead>(LABEL_DRAIN, 0).map_or(0, |head| head.version)
    }

    /// Keeps what somebody drains, as a new version.
    ///
    /// # Errors
    /// The kernel refuses a write.
    pub fn set_drains(&mut self, drains: &[Drain]) -> Result<(), DatapathError> {
        let before = self.drains();
        let last = before.by_index.keys().next_back().copied().unwrap_or_default();
        let slots = drains.len() as u32;
        for (index, drain) in (1..).zip(drains) {
            self.keep_label(LABEL_DRAIN, index, Some(drain))?;
        }
        // The version comes last: who has seen it finds all of it.
        self.keep_label(LABEL_DRAIN, 0, Some(&DrainHead { slots, version: before.version + 1 }))?;
        (slots + 1..=last).try_for_each(|index| self.keep_label::<Drain>(LABEL_DRAIN, index, None))
    }

    fn kept<T: DeserializeOwned>(&self, kind: u32, index: u32) -> Option<T> {
        self.labels.get(&LabelKey { kind, index }, 0).ok().as_ref().and_then(decode)
    }

    /// Entries and room of the tables of connections, as the controller counted them last.
    pub fn fills(&self) -> BTreeMap<String, [u64; 2]> {
        self.kept(FILLS.kind, FILLS.index).unwrap_or_default()
    }

    /// This node's key for the tunnel, if it was kept.
    pub fn secret(&self) -> Option<Secret> {
        self.kept(LABEL_KEY, 0)
    }

    /// Keeps this node's key for the tunnel.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_secret(&mut self, secret: &Secret) -> Result<(), DatapathError> {
        self.keep_label(LABEL_KEY, 0, Some(secret))
    }

    /// By what the packets of a peer are known.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn peer_key(&self, number: u32) -> Result<PeerKey, DatapathError> {
        self.peer_keys.get(&number, 0).map_err(|e| DatapathError::map("read", e))
    }

    /// How packets get to a peer.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn peer(&self, number: u32) -> Result<Peer, DatapathError> {
        self.peers.get(&number, 0).map_err(|e| DatapathError::map("read", e))
    }

    /// What the agent is asked to log, if somebody asked.
    pub fn log_level(&self) -> Option<String> {
        self.kept(LOG_LEVEL.kind, LOG_LEVEL.index)
    }

    /// Asks the agent to log something else; `None` takes it back.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_log_level(&mut self, level: Option<&str>) -> Result<(), DatapathError> {
        self.keep_label(LOG_LEVEL.kind, LOG_LEVEL.index, level.as_ref())
    }

    /// Keeps how full the tables of connections are.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_fills(&mut self, fills: &BTreeMap<&str, [u64; 2]>) -> Result<(), DatapathError> {
        put(&mut self.labels, &FILLS, &label(&json_of(fills)), LABELS)
    }

    /// Keeps what is wrong with a backend; `None` is nothing.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_trouble(&mut self, index: u32, trouble: Option<&Trouble>) -> Result<(), DatapathError> {
        self.keep_label(LABEL_TROUBLE, index, trouble)
    }

    fn keep_label<T: Serialize + ?Sized>(
        &mut self,
        kind: u32,
        index: u32,
        value: Option<&T>,
    ) -> Result<(), DatapathError> {
        let key = LabelKey { kind, index };
        match value {
            Some(value) => put(&mut self.labels, &key, &label(&json_of(value)), LABELS),
            None => match self.labels.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
                Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
                Err(error) => Err(DatapathError::map("write", error)),
            },
        }
    }

    fn read_backend(
        &self,
        index: u32,
        label: Option<BackendLabel>,
        tables: &mut Tables,
    ) -> Result<(), DatapathError> {
        let backend = match self.backends.get(&index, 0) {
            Ok(backend) => backend,
            Err(MapError::OutOfBounds { .. }) => return Ok(()),
            Err(error) => return Err(DatapathError::map("read", error)),
        };
        if backend.state != State::Free as u8 {
            let label = label.unwrap_or_else(|| nameless(&backend, index));
            tables.backends.insert(index, BackendEntry { backend, label });
        }
        Ok(())
    }

    fn read_listeners<A: Address>(
        &self,
        table: &Listeners<A>,
        tables: &mut Tables,
    ) -> Result<(), DatapathError>
    where
        Endpoint<A>: Pod,
    {
        for item in table.iter() {
            let (endpoint, listener) = item.map_err(|e| DatapathError::map("read", e))?;
            let Some(at) = at(&endpoint) else { continue };
            let end = listener.slot_base.saturating_add(listener.slot_count).min(self.slots.len());
            for slot in listener.slot_base..end {
                let index = self.slots.get(&slot, 0).map_err(|e| DatapathError::map("read", e))?;
                tables.slots[slot as usize] = index;
            }
            tables.listeners.insert(at, listener);
        }
        Ok(())
    }

    fn read_task_endpoints<A: Address>(
        &self,
        table: &TaskEndpoints<A>,
        tables: &mut Tables,
    ) -> Result<(), DatapathError>
    where
        Endpoint<A>: Pod,
        TaskEndpoint<A>: Pod,
    {
        for item in table.iter() {
            let (endpoint, task) = item.map_err(|e| DatapathError::map("read", e))?;
            let Some(at) = at(&endpoint) else { continue };
            let listener =
                (task.listener_port.get() != 0).then(|| (task.listener.to_ip(), task.listener_port.get()));
            tables.endpoints.insert(at, TaskListener { backend: task.backend, listener });
        }
        Ok(())
    }

    /// Writes a backend; its counters start anew if it is a new one. The name comes last and goes first: of what is cut
    /// short between the two the next controller finds a backend without a name, which it frees, never a name that
    /// nobody removes.
    pub(super) fn set_backend(
        &mut self,
        index: u32,
        entry: &BackendEntry,
        new: bool,
    ) -> Result<(), DatapathError> {
        if new {
            zero(&mut self.backend_stats, index)?;
        }
        write(&mut self.backends, index, entry.backend)?;
        self.set_label(LABEL_BACKEND, index, &fitted(&entry.label, &[|label| &mut label.problem]))
    }

    /// The open connections of a backend, as the programs count them.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn counted_open(&self, index: u32) -> Result<Open, DatapathError> {
        self.open.get(&index, 0).map_err(|e| DatapathError::map("read", e))
    }

    /// Frees a backend.
    pub(super) fn free_backend(&mut self, index: u32, free: Backend) -> Result<(), DatapathError> {
        self.remove_label(LABEL_BACKEND, index)?;
        write(&mut self.backends, index, free)
    }

    /// Names a service; its counters start anew if it is a new one.
    pub(super) fn set_service(
        &mut self,
        index: u32,
        label: &ServiceLabel,
        new: bool,
    ) -> Result<(), DatapathError> {
        if new {
            zero(&mut self.service_stats, index)?;
        }
        write(&mut self.settings, index, settings(label))?;
        self.set_label(
            LABEL_SERVICE,
            index,
            &fitted(label, &[|label| &mut label.problem, |label| &mut label.left, |label| &mut label.health]),
        )
    }

    /// Applies the operations that need nothing but the tables.
    pub(super) fn apply(&mut self, op: &MapOp) -> Result<(), DatapathError> {
        match op {
            MapOp::SetNode(index, label) => self.set_label(
                LABEL_NODE,
                *index,
                &fitted(label, &[|label| &mut label.label_problem, |label| &mut label.problem]),
            ),
            MapOp::RemoveNode(index) => self.remove_label(LABEL_NODE, *index),
            MapOp::SetPeer(number, peer) => self.set_peer(*number, *peer),
            MapOp::RemovePeer(number) => self.set_peer(*number, Peer::default()),
            MapOp::SetPeerKey(number, cookie) => {
                let key = self.peer_key(*number)?.renewed(*cookie);
                write(&mut self.peer_keys, *number, key)
            }
            MapOp::RemovePeerKey(number) => write(&mut self.peer_keys, *number, PeerKey::default()),
            MapOp::SetPeerNumber(address, number) => {
                let table = ("PEER_NUMBERS", "--max-nodes");
                insert(&mut self.peer_numbers, &mapped(*address), number, table)
            }
            MapOp::RemovePeerNumber(address) => remove(&mut self.peer_numbers, &mapped(*address)),
            MapOp::SetTask(key, index) => insert(&mut self.tasks, key, index, ("TASKS", "--max-backends")),
            MapOp::RemoveTask(key) => remove(&mut self.tasks, key),
            MapOp::SetAccess(of, allowed) => self.set_access(of, *allowed),
            MapOp::RemoveAccess(of) => self.remove_access(of),
            MapOp::SetService(index, label) => self.set_service(*index, label, false),
            MapOp::RemoveService(index) => self.remove_label(LABEL_SERVICE, *index),
            MapOp::SetPort(index, label) => self.set_label(LABEL_PORT, *index, &json_of(label)),
            MapOp::RemovePort(index) => self.remove_label(LABEL_PORT, *index),
            MapOp::SetBackend(index, entry) => self.set_backend(*index, entry, false),
            MapOp::FreeBackend(index) => self.free_backend(*index, Backend::default()),
            MapOp::SetSlots(base, slots) => {
                for (slot, index) in (*base..).zip(slots) {
                    write(&mut self.slots, slot, *index)?;
                }
                Ok(())
            }
            MapOp::SetFilter(word, bits) => write(&mut self.filter, *word, *bits),
            MapOp::SetListener(at, listener) => match at.address {
                IpAddr::V4(a) => {
                    insert(&mut self.listeners4, &endpoint(V4::from(a), at), listener, LISTENERS)
                }
                IpAddr::V6(a) => {
                    insert(&mut self.listeners6, &endpoint(V6::from(a), at), listener, LISTENERS)
                }
            },
            MapOp::RemoveListener(at) => match at.address {
                IpAddr::V4(a) => remove(&mut self.listeners4, &endpoint(V4::from(a), at)),
                IpAddr::V6(a) => remove(&mut self.listeners6, &endpoint(V6::from(a), at)),
            },
            MapOp::SetStandIn(address, own) => self.set_stand_in(*address, *own),
            MapOp::RemoveStandIn(address) => self.remove_stand_in(*address),
            MapOp::SetTaskEndpoint(at, task) => match at.address {
                IpAddr::V4(a) => {
                    let v4 = |ip| if let IpAddr::V4(ip) = ip { Some(V4::from(ip)) } else { None };
                    let (key, value) = (endpoint(V4::from(a), at), task_endpoint(task, v4));
                    insert(&mut self.task_endpoints4, &key, &value, TASK_ENDPOINTS)
                }
                IpAddr::V6(a) => {
                    let v6 = |ip| if let IpAddr::V6(ip) = ip { Some(V6::from(ip)) } else { None };
                    let (key, value) = (endpoint(V6::from(a), at), task_endpoint(task, v6));
                    insert(&mut self.task_endpoints6, &key, &value, TASK_ENDPOINTS)
                }
            },
            MapOp::RemoveTaskEndpoint(at) => match at.address {
                IpAddr::V4(a) => remove(&mut self.task_endpoints4, &endpoint(V4::from(a), at)),
                IpAddr::V6(a) => remove(&mut self.task_endpoints6, &endpoint(V6::from(a), at)),
            },
        }
    }

    /// Keeps what the controller says of its source.
    pub(super) fn set_report(&mut self, report: &SourceReport) -> Result<(), DatapathError> {
        let value = label(&fitted(report, &[|report| &mut report.problem, |report| &mut report.failing]));
        let key = LabelKey { kind: LABEL_SOURCE, index: 0 };
        put(&mut self.labels, &key, &value, LABELS)
    }

    fn set_peer(&mut self, number: u32, peer: Peer) -> Result<(), DatapathError> {
        write(&mut self.peers, number, peer)
    }

    fn set_label(&mut self, kind: u32, index: u32, json: &[u8]) -> Result<(), DatapathError> {
        insert(&mut self.labels, &LabelKey { kind, index }, &label(json), LABELS)
    }

    fn remove_label(&mut self, kind: u32, index: u32) -> Result<(), DatapathError> {
        remove(&mut self.labels, &LabelKey { kind, index })
    }
}

/// A service's settings as the programs have them. They forget a connection that has ended with the next packet of it, and tell
/// nobody: where the ends of an idle connection are to be told, only the walk may find it, which goes by the label.
fn settings(label: &ServiceLabel) -> Settings {
    let mut timers = Timers { seconds: label.timers };
    if label.idle == Idle::Reset {
        timers.seconds[Phase::Established as usize] = Timers::MOST;
    }
    Settings { timers, task_connections: label.task_max_connections, ..Settings::default() }
}

fn json_of(label: &(impl Serialize + ?Sized)) -> Vec<u8> {
    serde_json::to_vec(label).unwrap_or_default()
}

/// A label as the table has it. Names are bounded where they come in; what is too long all the same is kept nameless.
fn label(json: &[u8]) -> Label {
    let mut value = Label { length: 0, text: [0; LABEL_BYTES] };
    if json.len() <= LABEL_BYTES {
        value.length = json.len() as u32;
        value.text[..json.len()].copy_from_slice(json);
    }
    value
}

/// A label's text that fits: the first of its texts is told as far as there is room, then the next.
fn fitted<T: Serialize + Clone>(label: &T, texts: &[fn(&mut T) -> &mut Option<String>]) -> Vec<u8> {
    let mut json = json_of(label);
    let mut shorter = None;
    while json.len() > LABEL_BYTES {
        let label = shorter.get_or_insert_with(|| label.clone());
        let longest = texts.iter().find(|text| text(label).as_ref().is_some_and(|text| !text.is_empty()));
        let Some(text) = longest.and_then(|text| text(label).as_mut()) else { break };
        text.truncate(text.floor_char_boundary(text.len() - 1));
        json = json_of(label);
    }
    json
}

/// What is said of the drains that follow it.
#[derive(Serialize, serde::Deserialize)]
struct DrainHead {
    slots: u32,
    version: u64,
}

/// What somebody drains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drains {
    /// Another with each change.
    pub version: u64,
    by_index: BTreeMap<u32, Drain>,
}

impl Drains {
    /// All of them.
    pub fn all(&self) -> Vec<Drain> {
        self.by_index.values().cloned().collect()
    }
}

/// Where the agent is told what to log: beside what it says of its source.
const LOG_LEVEL: LabelKey = LabelKey { kind: LABEL_SOURCE, index: 2 };

/// Where the controller keeps how full the tables of connections are: beside what it says of its source.
const FILLS: LabelKey = LabelKey { kind: LABEL_SOURCE, index: 1 };

const LISTENERS: (&str, &str) = ("LISTENERS", "--max-listeners");
const TASK_ENDPOINTS: (&str, &str) = ("TASK_ENDPOINTS", "--max-backends");
const LABELS: (&str, &str) = ("LABELS", "--max-backends");

/// Every change that a plan makes goes through this, [`insert`] or [`remove`].
fn write<T: Pod>(map: &mut Array<MapData, T>, index: u32, value: T) -> Result<(), DatapathError> {
    fault::point("write an entry").map_err(DatapathError::Fault)?;
    map.set(index, value, 0).map_err(|e| DatapathError::map("write", e))
}

pub(super) fn insert<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: &K,
    value: &V,
    table: (&'static str, &'static str),
) -> Result<(), DatapathError> {
    fault::point("insert an entry").map_err(DatapathError::Fault)?;
    put(map, key, value, table)
}

fn put<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: &K,
    value: &V,
    (table, setting): (&'static str, &'static str),
) -> Result<(), DatapathError> {
    map.insert(key, value, 0).map_err(|error| match errno(&error) {
        Some(libc::E2BIG) => DatapathError::Full { table, setting },
        _ => DatapathError::map("write", error),
    })
}

pub(super) fn remove<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, key: &K) -> Result<(), DatapathError> {
    fault::point("remove an entry").map_err(DatapathError::Fault)?;
    match map.remove(key) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(DatapathError::map("write", error)),
    }
}

fn zero<T: Pod + Default>(map: &mut PerCpuArray<MapData, T>, index: u32) -> Result<(), DatapathError> {
    let cpus = aya::util::nr_cpus().map_err(|(what, source)| DatapathError::pin("read", what, source))?;
    let values = aya::maps::PerCpuValues::try_from(vec![T::default(); cpus])
        .map_err(|source| DatapathError::pin("count", "CPUs", source))?;
    map.set(index, values, 0).map_err(|e| DatapathError::map("write", e))
}

fn keep<T>(map: &mut BTreeMap<u32, T>, index: u32, label: Option<T>) {
    if let Some(label) = label {
        map.insert(index, label);
    }
}

fn decode<T: DeserializeOwned>(label: &Label) -> Option<T> {
    serde_json::from_slice(label.text.get(..label.length as usize)?).ok()
}

/// What stands for a backend whose name was lost: the planner will find nothing like it, and free it.
fn nameless(backend: &Backend, index: u32) -> BackendLabel {
    let address = if backend.family == 6 {
        V6::from_wide(backend.address).to_ip()
    } else {
        V4::from_wide(backend.address).to_ip()
    };
    BackendLabel {
        task: format!("backend {index}"),
        node: String::new(),
        state: crate::cluster::TaskState::Draining,
        protocol: Protocol::Tcp,
        target: backend.port.get(),
        address,
        own: None,
        overlay: None,
        problem: None,
    }
}

fn at<A: Address>(endpoint: &Endpoint<A>) -> Option<At> {
    let protocol = match endpoint.protocol {
        lb_common::net::TCP => Protocol::Tcp,
        lb_common::net::UDP => Protocol::Udp,
        _ => return None,
    };
    Some(At { address: endpoint.address.to_ip(), protocol, port: endpoint.port.get() })
}

fn endpoint<A>(address: A, at: &At) -> Endpoint<A> {
    Endpoint::new(address, Be16::new(at.port), at.protocol.number())
}

fn task_endpoint<A: Address>(task: &TaskListener, narrow: impl Fn(IpAddr) -> Option<A>) -> TaskEndpoint<A> {
    let listener = task.listener.and_then(|(address, port)| Some((narrow(address)?, port)));
    let (listener, port) = listener.unwrap_or_default();
    TaskEndpoint { backend: task.backend, listener, listener_port: Be16::new(port), _pad: 0 }
}
