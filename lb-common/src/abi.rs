//! The contract between programs, pinned tables and controllers: names, sizes, version.

use crate::{
    conntrack::{hash::HashKeys, table::Longest},
    net::Be16,
    pod,
};

/// Changes whenever a table's key, value or meaning does. Tables pinned by another version are not adopted.
pub const ABI_VERSION: u32 = 14;

/// Names of the tables, in the object and as pins.
pub mod table {
    /// [`super::Config`], one entry.
    pub const CONFIG: &str = "CONFIG";
    /// The port filter, [`crate::filter`].
    pub const FILTER: &str = "FILTER";
    /// Listeners by [`crate::endpoint::Endpoint`], IPv4.
    pub const LISTENERS4: &str = "LISTENERS4";
    /// Listeners, IPv6.
    pub const LISTENERS6: &str = "LISTENERS6";
    /// [`crate::endpoint::TaskEndpoint`] by endpoint of the task, IPv4.
    pub const TASK_ENDPOINTS4: &str = "TASK_ENDPOINTS4";
    /// The same, IPv6.
    pub const TASK_ENDPOINTS6: &str = "TASK_ENDPOINTS6";
    /// [`crate::slot::Slot`]s, in ranges that listeners name.
    pub const SLOTS: &str = "SLOTS";
    /// [`crate::backend::Backend`] by index.
    pub const BACKENDS: &str = "BACKENDS";
    /// Round-robin cursor of each published port.
    pub const CURSORS: &str = "CURSORS";
    /// The connection table, [`crate::conntrack::Set`] by index, IPv4.
    pub const CONNECTIONS4: &str = "CONNECTIONS4";
    /// The same, IPv6.
    pub const CONNECTIONS6: &str = "CONNECTIONS6";
    /// [`crate::service::Settings`] by service.
    pub const SERVICES: &str = "SERVICES";
    /// [`crate::stats::Open`] by backend.
    pub const OPEN: &str = "OPEN";
    /// [`crate::guard::Guard`], one entry.
    pub const GUARD: &str = "GUARD";
    /// [`crate::guard::Rate`], by CPU.
    pub const RATES: &str = "RATES";
    /// [`crate::budget::Budget`] of errors, by a hash of whom they go to.
    pub const ERROR_BUDGETS: &str = "ERROR_BUDGETS";
    /// When the controller was last there: the clock of connections, one entry.
    pub const HEARTBEAT: &str = "HEARTBEAT";
    /// [`crate::fragment::Ports`] by [`crate::fragment::FragmentKey`], IPv4.
    pub const FRAGMENTS4: &str = "FRAGMENTS4";
    /// Fragments, IPv6.
    pub const FRAGMENTS6: &str = "FRAGMENTS6";
    /// [`crate::fragment::Early`] by [`crate::fragment::EarlyKey`].
    pub const EARLY_FRAGMENTS: &str = "EARLY_FRAGMENTS";
    /// When the host last sent a datagram from a published port, by [`crate::host_flow::HostFlow`]: the clock of connections.
    pub const HOST_FLOWS: &str = "HOST_FLOWS";
    /// [`crate::tunnel::Peer`] by number of the node.
    pub const PEERS: &str = "PEERS";
    /// [`crate::tunnel::PeerKey`] by number of the node.
    pub const PEER_KEYS: &str = "PEER_KEYS";
    /// Number of the node by address, IPv4 as an IPv4-mapped one; [`crate::tunnel::SELF`] for this node's own.
    pub const PEER_NUMBERS: &str = "PEER_NUMBERS";
    /// Index of the backend by [`crate::tunnel::TaskKey`].
    pub const TASKS: &str = "TASKS";
    /// What ranges of addresses are to this node, mapped ([`crate::net::Address::to_mapped`]): [`super::inner`].
    pub const INNER_RANGES: &str = "INNER_RANGES";
    /// Whether clients may connect, by ranges of their addresses ([`crate::access::AccessKey`]): [`crate::access::ALLOWED`] or
    /// [`crate::access::DENIED`].
    pub const ACCESS: &str = "ACCESS";
    /// Bits of the VLANs that this node has on the uplink, by their ids.
    pub const VLANS: &str = "VLANS";
    /// [`crate::translation::PoolEntry`] by number of the address in the pool.
    pub const POOL: &str = "POOL";
    /// Number of the address that a client of IPv6 has in the pool.
    pub const POOL_CLIENTS: &str = "POOL_CLIENTS";
    /// The IPv6 address of each task that has IPv6 alone by its stand-in, and the reverse, mapped
    /// ([`crate::translation::is_stand_in`]).
    pub const STAND_INS: &str = "STAND_INS";
    /// Counter of each [`crate::outcome::Outcome`].
    pub const OUTCOMES: &str = "OUTCOMES";
    /// [`crate::stats::BackendStats`] by backend.
    pub const BACKEND_STATS: &str = "BACKEND_STATS";
    /// [`crate::stats::ServiceStats`] by service.
    pub const SERVICE_STATS: &str = "SERVICE_STATS";
    /// [`crate::stats::TableStats`] of the connection tables: IPv4, IPv6.
    pub const TABLE_STATS: &str = "TABLE_STATS";
    /// [`super::Label`] by [`super::LabelKey`]: what user space calls the numbers.
    pub const LABELS: &str = "LABELS";

    /// All of them.
    pub const ALL: [&str; 36] = [
        CONFIG,
        FILTER,
        LISTENERS4,
        LISTENERS6,
        TASK_ENDPOINTS4,
        TASK_ENDPOINTS6,
        SLOTS,
        BACKENDS,
        CURSORS,
        CONNECTIONS4,
        CONNECTIONS6,
        SERVICES,
        OPEN,
        GUARD,
        RATES,
        ERROR_BUDGETS,
        HEARTBEAT,
        FRAGMENTS4,
        FRAGMENTS6,
        EARLY_FRAGMENTS,
        HOST_FLOWS,
        PEERS,
        PEER_KEYS,
        PEER_NUMBERS,
        TASKS,
        INNER_RANGES,
        ACCESS,
        VLANS,
        POOL,
        POOL_CLIENTS,
        STAND_INS,
        OUTCOMES,
        BACKEND_STATS,
        SERVICE_STATS,
        TABLE_STATS,
        LABELS,
    ];

    /// Those that the programs of an uplink's ingress write: who runs one to see what it would do gives it others.
    pub const WRITTEN: [&str; 16] = [
        CONFIG,
        CURSORS,
        OPEN,
        CONNECTIONS4,
        CONNECTIONS6,
        GUARD,
        RATES,
        ERROR_BUDGETS,
        FRAGMENTS4,
        FRAGMENTS6,
        EARLY_FRAGMENTS,
        PEER_KEYS,
        OUTCOMES,
        BACKEND_STATS,
        SERVICE_STATS,
        TABLE_STATS,
    ];
}

/// What a range of addresses is to this node; the narrowest one that has an address counts.
pub mod inner {
    /// It lies behind an interface that leads outside.
    pub const OUTSIDE: u32 = 0;
    /// It lies behind a bridge of containers of this node.
    pub const BRIDGE: u32 = 1;
    /// It is an address of this node itself.
    pub const OWN: u32 = 2;
}

/// Names of the programs in the object.
pub mod program {
    /// XDP on the uplink.
    pub const UPLINK_XDP: &str = "uplink_xdp";
    /// TC ingress on the uplink.
    pub const UPLINK_TC: &str = "uplink_tc";
    /// TC egress on the uplink and where other nodes are reached beside it: what the host itself sends.
    pub const UPLINK_EGRESS: &str = "uplink_egress";
    /// TC ingress where other nodes' packets arrive beside the uplink.
    pub const PEER_TC: &str = "peer_tc";
    /// TC ingress where tasks' replies arrive: host-side veths and other interfaces that lead to backends.
    pub const TASK_TC: &str = "task_tc";

    /// TC egress on the host-side veths of tasks that have IPv4 alone: makes what IPv6 clients have for them IPv4.
    pub const TASK_EGRESS: &str = "task_egress";

    /// Never attached: run by user space (BPF_PROG_TEST_RUN) it returns the clock of connections, jiffies, low 32 bits.
    pub const CLOCK: &str = "clock";

    /// Never attached: run by user space on a batch of [`super::Removal`]s it takes lines out of the connection table.
    pub const GC: &str = "gc";

    /// All of them.
    pub const ALL: [&str; 8] =
        [UPLINK_XDP, UPLINK_TC, UPLINK_EGRESS, PEER_TC, TASK_TC, TASK_EGRESS, CLOCK, GC];
}

/// No XDP program decides, though one may be attached for a moment: TC on the uplink does all.
pub const TC_ALONE: u32 = 1;
/// XDP can send frames back out of the uplink itself; otherwise TC forwards.
pub const XDP_TRANSMITS: u32 = 2;
/// XDP sends by `bpf_redirect` instead of `XDP_TX` (a veth delivers the latter only to a peer with XDP).
pub const XDP_REDIRECTS: u32 = 4;
/// Frames of a local stack may arrive here with an unfinished checksum (veth, virtio): XDP checks for it.
pub const PARTIAL_CHECKSUMS: u32 = 8;

/// XDP runs on socket buffers: its metadata does not reach TC, which may get frames whose link header the kernel has
/// hidden. XDP decides, TC does the rest.
pub const XDP_GENERIC: u32 = 16;

/// XDP takes frames in several pieces; the programs were loaded so, and do not read it.
pub const XDP_FRAGS: u32 = 32;

/// XDP takes no packet the fast path: for tests, which hold that both ways come to the same.
pub const STAGES_ONLY: u32 = 64;

/// XDP came a moment ago: frames that the device took in before have no metadata. TC decides them too; of the others it comes
/// to what XDP has come to, and does not count it again.
pub const XDP_IS_NEW: u32 = 128;

/// There are clients whom no service takes: [`crate::access::every_service`].
pub const DENIES: u32 = 256;

/// The configuration of the programs; read on the fly, so that it may change.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// [`ABI_VERSION`] of the controller that made the tables.
    pub abi_version: u32,
    /// Interface index of the uplink.
    pub uplink: u32,
    /// [`TC_ALONE`], [`XDP_TRANSMITS`], [`XDP_REDIRECTS`], [`PARTIAL_CHECKSUMS`],
    /// [`XDP_GENERIC`], [`XDP_FRAGS`], [`STAGES_ONLY`], [`XDP_IS_NEW`], [`DENIES`].
    pub flags: u32,
    /// Lowest and highest source port for snat, host order, inclusive.
    pub snat_ports: [u16; 2],
    /// The host's own range of ephemeral ports, host order, inclusive: snat never takes a client's port in it.
    pub host_ports: [u16; 2],
    /// How the uplink is served: [`Mode`]; the programs do not read it.
    pub mode: u32,
    /// Jiffies a second, the unit of the connections' timestamps.
    pub jiffies_per_second: u32,
    /// UDP port of the tunnel, network order.
    pub tunnel_port: Be16,
    /// Zero.
    pub _pad: u16,
    /// New connections a second above which they are placed by hash; zero is never.
    pub flood_rate: u32,
    /// Seconds without a controller after which nothing is served any more; zero is never.
    pub stale_after: u32,
    /// Set by XDP when the driver has no room for metadata, so that TC looks connections up itself.
    pub metadata_refused: u32,
    /// Marks metadata as this datapath's: random, made with the tables.
    pub nonce: u32,
    /// Hardware address of the uplink.
    pub uplink_mac: [u8; 6],
    /// Zero.
    pub _pad2: [u16; 3],
    /// The longest timers of all services, by class of a line.
    pub longest: Longest,
    /// Of the connection table.
    pub hash_keys: HashKeys,
    /// First address of the pool of IPv4 addresses by which tasks know clients of IPv6, network order.
    pub pool: u32,
    /// How many addresses it has, as a power of two; zero if there is none.
    pub pool_bits: u32,
    /// Third word of the prefix behind which tasks know IPv4 clients (RFC 7050 calls one Pref64; [`crate::translation::embed_in`]), network order: each of several
    /// datapaths of a node has its own, so that what a task sends is for one of them.
    pub pref64: u32,
    /// Zero.
    pub _pad3: u32,
}

/// How an uplink is served.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// XDP in the driver, then TC.
    Native = 1,
    /// XDP on socket buffers, then TC.
    Generic = 2,
    /// TC alone.
    Tc = 3,
}

impl Mode {
    /// Its name in sentences.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native XDP",
            Self::Generic => "generic XDP",
            Self::Tc => "TC alone",
        }
    }
}

impl TryFrom<u32> for Mode {
    type Error = u32;

    fn try_from(raw: u32) -> Result<Self, u32> {
        match raw {
            1 => Ok(Self::Native),
            2 => Ok(Self::Generic),
            3 => Ok(Self::Tc),
            other => Err(other),
        }
    }
}

/// What XDP tells TC about a frame. The same for every frame of a connection, since GRO merges only equal metadata.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct XdpMetadata {
    /// [`Config::nonce`].
    pub nonce: u32,
    /// Index of the local backend to deliver to, [`META_TC_DECIDES`] or [`META_TC_SENDS_REPLY`].
    pub backend: u32,
    /// The client's port as the task is to see it, network order.
    pub port: Be16,
    /// Zero.
    pub _pad: u16,
}

/// XDP could not forward the frame itself and has not counted it: TC decides anew.
pub const META_TC_DECIDES: u32 = u32::MAX;

/// A task's reply out of the tunnel: TC sends it to the client. No index of a backend is as high.
pub const META_TC_SENDS_REPLY: u32 = u32::MAX - 1;

/// A line of the connection table that user space has found to have ended.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Removal {
    /// Its control word, as it was read.
    pub control: u64,
    /// Its number. Of a home: that of its way.
    pub slot: u32,
    /// When it was last seen, as it was read. Of a home: its home word.
    pub seen: u32,
    /// [`remove::CONNECTION4`] or those after it.
    pub what: u32,
    /// Whether it was removed: 1, written by the program.
    pub done: u32,
}

impl Removal {
    /// How many one run takes: they fit a frame of one page.
    pub const BATCH: usize = 128;
}

/// What is removed.
pub mod remove {
    /// A line of IPv4.
    pub const CONNECTION4: u32 = 1;
    /// A line of IPv6.
    pub const CONNECTION6: u32 = 2;
    /// The mark of a home that lines of it lie in other sets, IPv4.
    pub const SPILLED4: u32 = 3;
    /// The same, IPv6.
    pub const SPILLED6: u32 = 4;
    /// A line of IPv4 whose client may no longer connect: also if it was seen since.
    pub const DENIED4: u32 = 5;
    /// The same, IPv6.
    pub const DENIED6: u32 = 6;
}

/// What a label names.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct LabelKey {
    /// [`LABEL_SERVICE`], [`LABEL_BACKEND`], [`LABEL_NODE`], [`LABEL_PORT`], [`LABEL_SOURCE`], [`LABEL_TROUBLE`],
    /// [`LABEL_DRAIN`] or [`LABEL_KEY`].
    pub kind: u32,
    /// Index of the service, backend or cursor; the number of a node; for drains any.
    pub index: u32,
}

/// A service.
pub const LABEL_SERVICE: u32 = 1;
/// A backend.
pub const LABEL_BACKEND: u32 = 2;
/// A node of the cluster.
pub const LABEL_NODE: u32 = 3;

/// A published port, by the index of its cursor.
pub const LABEL_PORT: u32 = 4;

/// What the controller says of its source; there is one, at index zero.
pub const LABEL_SOURCE: u32 = 5;

/// What is wrong with a backend by what the datapath counts.
pub const LABEL_TROUBLE: u32 = 6;

/// A task or node that gets no new connections because somebody said so.
pub const LABEL_DRAIN: u32 = 7;

/// This node's own key for the tunnel. It is of no use to who may not read the tables.
pub const LABEL_KEY: u32 = 8;

/// Room for a label's text in bytes.
pub const LABEL_BYTES: usize = 444;

/// What user space calls a number, as JSON; the datapath never reads it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label {
    /// Bytes of `text` in use.
    pub length: u32,
    /// UTF-8.
    pub text: [u8; LABEL_BYTES],
}

/// Sizes of the tables when nothing else is asked for.
pub mod size {
    /// Connections of each family that the table is made for: half of its lines.
    pub const CONNECTIONS: usize = 262_144;
    /// Sets of that table.
    pub const SETS: usize = sets(CONNECTIONS as u32) as usize;

    /// Sets of a table for so many connections: half full it finds a place for nearly all, and there are three at least.
    pub const fn sets(connections: u32) -> u32 {
        let sets = connections.div_ceil(crate::conntrack::line::WAYS / 2);
        if sets < 3 { 3 } else { sets }
    }

    /// Connections that a table of so many sets is made for.
    pub const fn connections(sets: u32) -> u32 {
        sets.saturating_mul(crate::conntrack::line::WAYS / 2)
    }

    /// Listeners of each family.
    pub const LISTENERS: usize = 65_536;
    /// Services.
    pub const SERVICES: usize = 16_384;
    /// Backends (ports of tasks, by family).
    pub const BACKENDS: usize = 65_536;
    /// Slots.
    pub const SLOTS: usize = 262_144;
    /// Nodes of the cluster; their numbers start at one.
    pub const NODES: usize = 4_096;
    /// Addresses of a node that there is room for, on average.
    pub const NODE_ADDRESSES: usize = 4;
    /// Words of the VLANs' bits: ids have twelve bits (IEEE 802.1Q).
    pub const VLAN_WORDS: usize = (1 << 12) / u64::BITS as usize;
    /// Ranges of this node's interfaces, and its addresses.
    pub const INNER_RANGES: usize = 1_024;
    /// Ranges in the lists of who may connect, of all services.
    pub const RANGES: usize = 32_768;
    /// The same in a table that has two more for each of so many services: those of everybody, of each family, so that one whose
    /// list finds no room can always be closed. Before Linux 6.13 a full trie refuses to change what is in it.
    pub const fn access(services: usize) -> usize {
        RANGES + 2 * services + 1
    }
    /// Tasks of a node that have IPv6 alone, each by its address and by its stand-in: few, for a bridge has 1,024 ports at most.
    pub const STAND_INS: usize = stand_ins(BACKENDS);

    /// The same where there is room for so many backends.
    pub const fn stand_ins(backends: usize) -> usize {
        if backends < 1_024 { 64 } else { backends / 16 }
    }
    /// Addresses of the pool by which tasks know clients of IPv6.
    pub const POOL: usize = 1 << crate::translation::MOST_BITS;
    /// Budgets of errors; a power of two.
    pub const ERROR_BUDGETS: usize = 1_024;
    /// Datagrams in fragments that are followed at once, of each family.
    pub const FRAGMENTS: usize = 8_192;
    /// Fragments that came before the first one of their datagram: what they take is what others may make of it, a megabyte.
    pub const EARLY_FRAGMENTS: usize = 512;
    /// Exchanges of the host's own datagrams from published ports that are known at once.
    pub const HOST_FLOWS: usize = 16_384;
}

const _: () = {
    assert!(size_of::<Config>() == 168 && size_of::<XdpMetadata>() == 12 && size_of::<Removal>() == 24);
    assert!(size_of::<Label>() == 448 && size_of::<LabelKey>() == 8);
};

pod!(Config, XdpMetadata, Removal, LabelKey, Label);
