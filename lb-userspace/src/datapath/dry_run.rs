//! What the datapath would do with a frame, found by having it do so: the same program, once, with tables of its own in the place of
//! those that programs write, so that no turn is taken, nothing is counted or kept, and nothing leaves.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, Map, MapData, MapError, PerCpuArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use lb_common::{
    abi::{Config, DENIES, PARTIAL_CHECKSUMS, TC_ALONE, XDP_FRAGS, program, table},
    conntrack::{
        Control, FiveTuple, Set,
        hash::{home, others},
        line::{CONNECTION, WAYS, slot},
    },
    guard::Guard,
    net::{Address, Be16, V4, V6},
    outcome::Outcome,
    stats::Open,
    tunnel::{PeerKey, mapped},
};

use super::{
    ConnectionLog, DatapathError, Features, Programs, Seen, Sizes, TableSet,
    connections::{self, Clock},
    loader::{self, Family, On},
};
use crate::{
    cluster::Protocol,
    plan::{At, Tables},
};

/// What TC returns where it redirects a frame (`TC_ACT_REDIRECT`), and where it drops it (`TC_ACT_SHOT`).
const REDIRECT: u32 = 7;
const SHOT: u32 = 2;
/// Room for the headers that a frame may be given.
const HEADERS: usize = 256;

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The datapath sends it on.
    Forwarded,
    /// The host gets it as it came.
    Passed,
    /// It ends here.
    Dropped,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Ran {
    /// What becomes of the frame.
    pub verdict: Verdict,
    /// Why, as it would be counted; nothing of what is not counted.
    pub outcome: Option<Outcome>,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// The connection as it is.
    pub before: Option<Seen>,
    /// And as it would be.
    pub after: Option<Seen>,
}

/// The five-tuple of a connection's requests, and where its line may be.
#[derive(Clone, Copy)]
enum Wanted {
    V4(FiveTuple<V4>, [u32; 3]),
    V6(FiveTuple<V6>, [u32; 3]),
}

/// The program of an uplink that does all by itself, on tables that nobody else sees.
///
/// XDP and TC run the same stages, and TC alone comes to the end of them for every kind of task.
pub struct DryRun<'a> {
    set: &'a TableSet,
    tables: &'a Tables,
    ebpf: Ebpf,
    config: Config,
    wanted: Wanted,
}

impl<'a> DryRun<'a> {
    /// Has the kernel take the program, beside the datapath of these tables, for a frame from a client to a listener of the same
    /// family.
    ///
    /// # Errors
    /// It refuses, or a read.
    pub fn new(
        set: &'a TableSet,
        tables: &'a Tables,
        protocol: Protocol,
        (client, listener): (SocketAddr, SocketAddr),
    ) -> Result<Self, DatapathError> {
        let names = [program::UPLINK_TC, program::CLOCK];
        let family = if client.is_ipv4() { Family::V4 } else { Family::V6 };
        let (on, off) = (On::Beside(set.pins(), family), ConnectionLog::Off);
        let Programs(ebpf) = loader::load(on, &Sizes::default(), off, Features::find()?, &names)?;
        let config = set.config()?;
        let ports = [client.port(), listener.port()];
        let wanted = match (client.ip(), listener.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let [source, destination] =
                    [source, destination].map(|ip| V4(u32::from_ne_bytes(ip.octets())));
                let tuple = tuple(source, destination, ports, protocol);
                Wanted::V4(tuple, places(&config, &tuple, set.entries(table::CONNECTIONS4)?))
            }
            (source, destination) => {
                let [source, destination] = [source, destination].map(|ip| V6::from_wide(mapped(ip)));
                let tuple = tuple(source, destination, ports, protocol);
                Wanted::V6(tuple, places(&config, &tuple, set.entries(table::CONNECTIONS6)?))
            }
        };
        let mut run = Self { set, tables, ebpf, config, wanted };
        let flags = config.flags & (PARTIAL_CHECKSUMS | XDP_FRAGS | DENIES) | TC_ALONE;
        run.own(table::CONFIG)?.set(0, Config { flags, ..config }, 0).map_err(written)?;
        run.copy::<Guard>(table::GUARD, [0])?;
        run.copy::<PeerKey>(table::PEER_KEYS, tables.nodes.keys().copied())?;
        let at = At { address: listener.ip(), protocol, port: listener.port() };
        let listener = tables.listeners.get(&at);
        run.copy::<u64>(table::CURSORS, listener.map(|listener| listener.cursor))?;
        let slots = listener.and_then(|listener| tables.slots_of(listener)).into_iter().flatten();
        run.copy::<Open>(table::OPEN, BTreeSet::from_iter(slots.map(|slot| slot.backend())))?;
        match wanted {
            Wanted::V4(_, places) => run.copy::<Set<V4>>(table::CONNECTIONS4, places)?,
            Wanted::V6(_, places) => run.copy::<Set<V6>>(table::CONNECTIONS6, places)?,
        }
        Ok(run)
    }

    /// The connection that there is.
    ///
    /// # Errors
    /// The kernel refuses a read.
    pub fn connection(&self) -> Result<Option<Seen>, DatapathError> {
        match &self.wanted {
            Wanted::V4(tuple, places) => self.line(table::CONNECTIONS4, tuple, *places),
            Wanted::V6(tuple, places) => self.line(table::CONNECTIONS6, tuple, *places),
        }
    }

    /// Runs it on a frame that comes in by the uplink: from the client to the listener, or the same in the tunnel.
    ///
    /// # Errors
    /// The kernel refuses a read, or does not run it.
    pub fn run(self, frame: &[u8]) -> Result<Ran, DatapathError> {
        let before = self.connection()?;
        let (action, frame) = self.run_program(frame)?;
        let verdict = match action {
            REDIRECT => Verdict::Forwarded,
            SHOT => Verdict::Dropped,
            _ => Verdict::Passed,
        };
        Ok(Ran { verdict, outcome: self.outcome()?, frame, before, after: self.connection()? })
    }

    fn run_program(&self, frame: &[u8]) -> Result<(u32, Vec<u8>), DatapathError> {
        let program =
            self.ebpf.program(program::UPLINK_TC).ok_or(DatapathError::NoProgram(program::UPLINK_TC))?;
        let program: &SchedClassifier = program.try_into().map_err(DatapathError::Program)?;
        let mut out = vec![0; frame.len() + HEADERS];
        let context = context(self.config.uplink);
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result = program.test_run(options).map_err(DatapathError::Program)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }

    /// The outcome that was counted; one that passed or dropped comes before one that says where it was going.
    fn outcome(&self) -> Result<Option<Outcome>, DatapathError> {
        let map = self.ebpf.map(table::OUTCOMES).ok_or(DatapathError::NoProgram(table::OUTCOMES))?;
        let counts: PerCpuArray<&MapData, u64> = map.try_into().map_err(read)?;
        let mut counted = Vec::new();
        for outcome in Outcome::ALL {
            let packets = counts.get(&(*outcome as u32), 0).map_err(read)?;
            if packets.iter().any(|packets| *packets > 0) {
                counted.push(*outcome);
            }
        }
        Ok(counted.iter().find(|outcome| !outcome.is_forwarded()).or(counted.first()).copied())
    }

    /// What the line of this five-tuple says, in the sets where it may be.
    fn line<A: Address>(
        &self,
        name: &'static str,
        tuple: &FiveTuple<A>,
        places: [u32; 3],
    ) -> Result<Option<Seen>, DatapathError>
    where
        Set<A>: Pod,
    {
        let now = super::tools::now(&self.ebpf)?;
        let Config { jiffies_per_second, hash_keys, .. } = &self.config;
        let clock = Clock {
            tables: self.tables,
            access: None,
            now,
            jiffies_per_second: *jiffies_per_second,
            hash_keys,
        };
        let map = self.ebpf.map(name).ok_or(DatapathError::NoProgram(name))?;
        let own: Array<&MapData, Set<A>> = map.try_into().map_err(read)?;
        for place in places {
            let set = own.get(&place, 0).map_err(read)?;
            for (way, line) in (0..WAYS).zip(&set.lines) {
                let its = FiveTuple { generation: 0, ..line.tuple };
                let control = Control(line.control);
                if control.is_live() && its == *tuple && its.kind == CONNECTION {
                    return Ok(connections::seen(slot(place, way), control, line, &clock));
                }
            }
        }
        Ok(None)
    }

    /// A table of its own.
    fn own<T: Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, T>, DatapathError> {
        let map = self.ebpf.map_mut(name).ok_or(DatapathError::NoProgram(name))?;
        map.try_into().map_err(written)
    }

    /// Copies entries of a table as they are now.
    fn copy<T: Pod>(
        &mut self,
        name: &'static str,
        indexes: impl IntoIterator<Item = u32>,
    ) -> Result<(), DatapathError> {
        let pinned = MapData::from_pin(self.set.pins().table(name)).and_then(Map::from_map_data);
        let there: Array<MapData, T> = pinned.and_then(TryInto::try_into).map_err(read)?;
        let mut own = self.own(name)?;
        for index in indexes {
            own.set(index, there.get(&index, 0).map_err(read)?, 0).map_err(written)?;
        }
        Ok(())
    }
}

/// The sets where the line of a five-tuple may be.
fn places<A: Address>(config: &Config, tuple: &FiveTuple<A>, sets: u32) -> [u32; 3] {
    let keys = &config.hash_keys;
    let endpoint = keys.endpoint(&tuple.source, tuple.source_port, tuple.protocol);
    let first = home(endpoint, sets).set;
    let [second, third] = others(first, keys.tuple(endpoint, tuple), sets).map(|place| place.set);
    [first, second, third]
}

fn tuple<A>(source: A, destination: A, ports: [u16; 2], protocol: Protocol) -> FiveTuple<A> {
    let [source_port, destination_port] = ports.map(Be16::new);
    FiveTuple::new(source, destination, source_port, destination_port, protocol.number())
}

fn read(error: MapError) -> DatapathError {
    DatapathError::map("read", error)
}

fn written(error: MapError) -> DatapathError {
    DatapathError::map("write", error)
}

/// `struct __sk_buff` of a frame that comes in by this interface: its index is the eleventh word.
fn context(ifindex: u32) -> Vec<u8> {
    let mut context = vec![0; 192];
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    context
}
