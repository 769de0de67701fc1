//! The pool by which tasks that have IPv4 alone know IPv6 clients: mapped, read by anybody; what nobody needs any more is freed by
//! the controller, by the same swap by which programs take it.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::maps::{self, Map, MapData};
use lb_common::{
    abi::{Config, table},
    conntrack::elapsed,
    net::{Address as _, V6},
    translation::{ANSWERED, BUSY, CONFIRMED, FREE, PoolEntry, is_held, seen, state, word as word_of},
};

use serde::Serialize;

use super::{DatapathError, PinDir, TableSet, connections::Mapping};
use crate::{
    limits::Fill,
    net::Reset,
    plan::Tables,
    translation::{Pool, client_in_six, is_made_up},
};

/// A client keeps his address for so many seconds after his last packet, and as long as he has connections.
const KEPT_SECONDS: u32 = 600;

/// A client of IPv6, and the address by which this node's tasks know him.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Alias {
    /// The client.
    pub client: IpAddr,
    /// As tasks know him.
    pub address: Ipv4Addr,
    /// Whether he has answered a task: nobody takes the address from him while he has connections.
    pub confirmed: bool,
    /// Seconds since he was given it.
    pub held_seconds: u32,
    /// Seconds since his last packet, or the last one for him.
    pub idle_seconds: u32,
}

/// The table, mapped into this process.
struct Entries {
    first: NonNull<PoolEntry>,
    count: u32,
    writable: bool,
}

impl Entries {
    fn open(pins: &PinDir, writable: bool) -> Result<Self, DatapathError> {
        let map = open(pins, table::POOL)?;
        let count = map.info().map_err(|error| DatapathError::map("inspect", error))?.max_entries();
        let bytes = count as usize * size_of::<PoolEntry>();
        let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let fd = map.fd().as_fd().as_raw_fd();
        // SAFETY: a new mapping of the table's whole length; the kernel keeps the table as long as it is there.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(DatapathError::pin("map into memory", pins.table(table::POOL), error));
        }
        let first = NonNull::new(address.cast()).ok_or(DatapathError::NotAttached(None))?;
        Ok(Self { first, count, writable })
    }

    fn entry(&self, number: u32) -> *mut PoolEntry {
        assert!(number < self.count, "{number} is no entry of the pool");
        // SAFETY: the mapping has so many.
        unsafe { self.first.as_ptr().add(number as usize) }
    }

    fn word(&self, number: u32) -> &AtomicU64 {
        // SAFETY: a word is aligned, and read and written by atomic accesses alone as long as the mapping is there.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.entry(number)).word) }
    }

    /// The client that has an address, and the word by which he has it.
    fn held(&self, number: u32) -> Option<(u64, V6)> {
        let word = self.word(number).load(Ordering::Acquire);
        if !is_held(word) {
            return None;
        }
        // SAFETY: as above.
        let read = || unsafe { (&raw const (*self.entry(number)).client).read_volatile() };
        let client = read();
        std::sync::atomic::fence(Ordering::Acquire);
        let again = self.word(number).load(Ordering::Acquire);
        // Who changes the address swaps the word before and after; whole it is the same twice.
        (is_held(again) && read() == client).then_some((again, client))
    }

    /// When the client was given the address: jiffies.
    fn since(&self, number: u32) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.entry(number)).since).read_volatile() }
    }

    /// Has a word take the place of another one, if that is there.
    fn swap(&self, number: u32, from: u64, to: u64) -> bool {
        assert!(self.writable, "the pool is mapped to be read");
        self.word(number).compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Has a client give way to others again.
    fn demote(&self, number: u32, from: u64) {
        self.swap(number, from, word_of(ANSWERED, seen(from)));
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, of this length.
        unsafe { libc::munmap(self.first.as_ptr().cast(), self.count as usize * size_of::<PoolEntry>()) };
    }
}

fn open(pins: &PinDir, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(pins.table(name)).map_err(|error| DatapathError::map("open", error))
}

fn clients(pins: &PinDir) -> Result<maps::HashMap<MapData, V6, u32>, DatapathError> {
    let map = Map::HashMap(open(pins, table::POOL_CLIENTS)?);
    map.try_into().map_err(|error| DatapathError::map("open", error))
}

/// Takes an address from a client, and the client's name off it.
fn take(
    entries: &Entries,
    clients: &mut maps::HashMap<MapData, V6, u32>,
    number: u32,
    (word, client): (u64, V6),
) -> bool {
    // Nobody takes it while the name is there.
    let taken = entries.swap(number, word, word_of(BUSY, 0));
    if taken {
        // He may have another one by now; and one that is gone is as good.
        if clients.get(&client, 0).is_ok_and(|known| known == number) {
            let _ = clients.remove(&client);
        }
        entries.swap(number, word_of(BUSY, 0), word_of(FREE, 0));
    }
    taken
}

/// How clients and tasks of different families know each other.
pub struct Translations {
    config: Config,
    /// By what address tasks know an IPv6 client.
    clients: HashMap<IpAddr, Ipv4Addr>,
    /// [`Tables::own_addresses`].
    tasks: HashMap<IpAddr, IpAddr>,
}

impl Translations {
    /// Of these aliases and tasks.
    pub fn new(config: Config, aliases: &[Alias], tables: &Tables) -> Self {
        let clients = aliases.iter().map(|alias| (alias.client, alias.address)).collect();
        Self { config, clients, tasks: tables.own_addresses() }
    }

    /// The address by which tasks of the other family know a client.
    pub fn client(&self, client: IpAddr) -> Option<IpAddr> {
        match client {
            IpAddr::V4(client) => Some(client_in_six(client, &self.config)),
            IpAddr::V6(_) => self.clients.get(&client).map(|address| (*address).into()),
        }
    }

    /// Has resets for tasks that are reached by translation go to them as they know the client; who is known by no address any more
    /// has nothing open there, nor has a task that is gone.
    pub fn readdress(&self, resets: &mut Vec<Reset>) {
        resets.retain_mut(|reset| {
            let Some(task) = self.tasks.get(&reset.to.ip()) else { return !is_made_up(reset.to.ip()) };
            let Some(from) = self.client(reset.from.ip()) else { return false };
            reset.to.set_ip(*task);
            reset.from.set_ip(from);
            true
        });
    }
}

impl TableSet {
    /// The clients of IPv6 whom this node's tasks know by an address of the pool, in its order.
    ///
    /// # Errors
    /// The table cannot be mapped, or the clock is not told.
    pub fn aliases(&self, now: u32) -> Result<Vec<Alias>, DatapathError> {
        let config = self.config()?;
        let pool = Pool::of(&config);
        if pool.0.is_none() {
            return Ok(Vec::new());
        }
        let entries = Entries::open(self.pins(), false)?;
        let alias = |number| {
            let (word, client) = entries.held(number)?;
            let ago = |then: u32| elapsed(then, now) / config.jiffies_per_second.max(1);
            Some(Alias {
                client: client.to_ip(),
                address: pool.address(number)?,
                confirmed: state(word) == CONFIRMED,
                held_seconds: ago(entries.since(number)),
                idle_seconds: ago(seen(word)),
            })
        };
        Ok((0..1 << config.pool_bits.min(16)).filter_map(alias).collect())
    }

    /// The client of IPv6 whom this node's tasks know by an address, if there is one.
    ///
    /// # Errors
    /// The table cannot be mapped.
    pub fn alias(&self, address: Ipv4Addr) -> Result<Option<IpAddr>, DatapathError> {
        let config = self.config()?;
        let pool = Pool::of(&config).0;
        let Some(range) = pool.filter(|range| range.contains(&address)) else { return Ok(None) };
        let number = address.to_bits() & !range.netmask().to_bits();
        let held = Entries::open(self.pins(), false)?.held(number);
        Ok(held.map(|(_, client)| client.to_ip()))
    }

    /// [`Translations::readdress`] of resets for whom it matters.
    pub(super) fn send_as_tasks_know(
        &self,
        (config, tables): (&Config, &Tables),
        now: u32,
        resets: &mut Vec<Reset>,
    ) {
        if resets.iter().all(|reset| !is_made_up(reset.to.ip())) {
            return;
        }
        let known = self.aliases(now).unwrap_or_else(|error| {
            log::debug!("who tasks know IPv6 clients as: {error}");
            Vec::new()
        });
        Translations::new(*config, &known, tables).readdress(resets);
    }

    /// Frees the addresses of clients who were silent for long and have no connection; how many are held. Where more than half are,
    /// those who have no established connection of TCP give way to others again: anybody can send two datagrams.
    pub(super) fn collect_aliases(
        &self,
        now: u32,
        established: &HashSet<IpAddr>,
    ) -> Result<Option<Fill>, DatapathError> {
        let config = self.config()?;
        if config.pool_bits == 0 {
            return Ok(None);
        }
        let entries = Entries::open(self.pins(), true)?;
        let size = 1_u32 << config.pool_bits.min(16);
        // A controller that was killed may have left one half freed; programs write no such word.
        let half_freed = word_of(BUSY, 0);
        for number in 0..size.min(entries.count) {
            if entries.word(number).load(Ordering::Relaxed) == half_freed {
                entries.swap(number, half_freed, word_of(FREE, 0));
            }
        }
        let held = |number| entries.held(number).map(|held| (number, held));
        let all: Vec<(u32, (u64, V6))> = (0..size.min(entries.count)).filter_map(held).collect();
        if all.len() as u32 > size / 2 {
            let unproven = all.iter().filter(|(_, (word, client))| {
                let is_silent = elapsed(seen(*word), now) > config.jiffies_per_second;
                state(*word) == CONFIRMED && is_silent && !established.contains(&client.to_ip())
            });
            unproven.for_each(|(number, (word, _))| entries.demote(*number, *word));
        }
        let kept = KEPT_SECONDS * config.jiffies_per_second;
        let silent: Vec<_> = all.iter().filter(|(_, (word, _))| elapsed(seen(*word), now) > kept).collect();
        let mut freed = 0;
        if !silent.is_empty() {
            let connected: HashSet<[u32; 4]> = Mapping::<V6>::open(self.pins(), table::CONNECTIONS6)?
                .clients()
                .map(|client| client.0)
                .collect();
            let mut clients = clients(self.pins())?;
            for (number, held) in silent.into_iter().filter(|(_, (_, client))| !connected.contains(&client.0))
            {
                freed += u64::from(take(&entries, &mut clients, *number, *held));
            }
        }
        Ok(Some(Fill { table: table::POOL, entries: all.len() as u64 - freed, room: u64::from(size) }))
    }

    /// Takes all addresses from their clients: they are to be of another range.
    pub(super) fn clear_aliases(&self) -> Result<(), DatapathError> {
        let entries = Entries::open(self.pins(), true)?;
        let mut clients = clients(self.pins())?;
        for number in 0..entries.count {
            if let Some(held) = entries.held(number) {
                take(&entries, &mut clients, number, held);
            }
        }
        Ok(())
    }
}
