//! Who may connect to services, as the kernel's table has it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use aya::maps::{MapError, lpm_trie::Key};
use ipnet::IpNet;
use lb_common::{
    access::{ALLOWED, AccessKey, DENIED, LAST_SERVICE, SERVICE_BITS},
    endpoint::RESTRICTED,
    tunnel::{mapped, unmapped},
};

use super::{
    DatapathError,
    error::errno,
    fault,
    inner_ranges::{bits, prefix},
    tables::TableSet,
};
use crate::plan::{ClientRange, Tables};

fn key((service, range): &ClientRange) -> Key<AccessKey> {
    let address = range.network();
    Key::new(
        SERVICE_BITS + bits(address, range.prefix_len()),
        AccessKey { service: *service, address: mapped(address) },
    )
}

/// `None` of a key that no plan makes.
fn range(key: &Key<AccessKey>) -> Option<ClientRange> {
    let AccessKey { service, address } = key.data();
    let address = unmapped(address);
    let length = prefix(address, key.prefix_len().checked_sub(SERVICE_BITS)?);
    Some((service, IpNet::new(address, length).ok()?))
}

impl TableSet {
    pub(super) fn read_access(&self) -> Result<BTreeMap<ClientRange, bool>, DatapathError> {
        let read: Result<Vec<_>, _> = self.access.iter().collect();
        let read = read.map_err(|error| DatapathError::map("read", error))?;
        Ok(read.into_iter().filter_map(|(key, what)| Some((range(&key)?, what == ALLOWED))).collect())
    }

    pub(super) fn set_access(&mut self, of: &ClientRange, allowed: bool) -> Result<(), DatapathError> {
        fault::point("insert an entry").map_err(DatapathError::Fault)?;
        let what = if allowed { ALLOWED } else { DENIED };
        self.access.insert(&key(of), what, 0).map_err(|error| DatapathError::map("write", error))
    }

    pub(super) fn remove_access(&mut self, of: &ClientRange) -> Result<(), DatapathError> {
        fault::point("remove an entry").map_err(DatapathError::Fault)?;
        match self.access.remove(&key(of)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(DatapathError::map("write", error)),
        }
    }
}

/// Answers for many clients, as the kernel's trie does for one.
pub(super) struct AccessLists {
    by_service: HashMap<u32, AccessList>,
    /// Of every service.
    everywhere: AccessList,
}

#[derive(Default)]
struct AccessList {
    ranges: HashMap<IpNet, bool>,
    /// Lengths of prefixes that there are, IPv4 and IPv6.
    lengths: [BTreeSet<u8>; 2],
}

impl AccessList {
    fn insert(&mut self, range: IpNet, allowed: bool) {
        self.ranges.insert(range, allowed);
        self.lengths[usize::from(range.addr().is_ipv6())].insert(range.prefix_len());
    }

    /// What the narrowest range says that has the client.
    fn says(&self, client: IpAddr) -> Option<bool> {
        let lengths = &self.lengths[usize::from(client.is_ipv6())];
        let of = |length: &u8| self.ranges.get(&IpNet::new(client, *length).ok()?.trunc()).copied();
        lengths.iter().rev().find_map(of)
    }
}

impl AccessLists {
    /// Those of the services whose listeners ask for them: others may be half written.
    pub(super) fn of(tables: &Tables) -> Self {
        let asking = tables.listeners.values().filter(|listener| listener.flags & RESTRICTED != 0);
        let mut by_service: HashMap<u32, AccessList> =
            asking.map(|listener| (listener.service, AccessList::default())).collect();
        let mut everywhere = AccessList::default();
        for ((service, range), allowed) in &tables.access {
            match by_service.get_mut(service) {
                Some(list) => list.insert(*range, *allowed),
                None if *service > LAST_SERVICE => everywhere.insert(*range, *allowed),
                None => {}
            }
        }
        Self { by_service, everywhere }
    }

    /// Whether everybody may connect to all services.
    pub(super) fn is_empty(&self) -> bool {
        self.by_service.is_empty() && self.everywhere.ranges.is_empty()
    }

    /// Whether the client may connect to the service.
    pub(super) fn allow(&self, service: u32, client: IpAddr) -> bool {
        self.everywhere.says(client) != Some(false)
            && self.by_service.get(&service).is_none_or(|list| list.says(client).unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{access::every_service, endpoint::Listener};

    use super::*;
    use crate::{cluster::Protocol, plan::At};

    #[test]
    fn a_range_is_told_from_its_key() {
        for text in ["10.1.0.0/16", "0.0.0.0/0", "10.0.0.7/32", "::/0", "fd00:1::/64", "2001:db8::7/128"] {
            let wanted = (7, text.parse().unwrap());
            assert_eq!(range(&key(&wanted)), Some(wanted), "{text}");
        }
    }

    #[test]
    fn the_narrowest_range_decides() {
        let mut tables = Tables::empty(0);
        for (range, allowed) in [
            ("0.0.0.0/0", false),
            ("::/0", true),
            ("10.0.0.0/8", true),
            ("10.1.0.0/16", false),
            ("fd00::/8", false),
        ] {
            tables.access.insert((1, range.parse().unwrap()), allowed);
        }
        let asked = |tables: &Tables, client: &str| AccessLists::of(tables).allow(1, client.parse().unwrap());
        assert!(asked(&tables, "10.1.0.1"), "no listener asks: the list may be half written");
        assert!(AccessLists::of(&tables).is_empty());
        let at = At { address: "192.0.2.1".parse().unwrap(), protocol: Protocol::Tcp, port: 80 };
        tables.listeners.insert(at, Listener { service: 1, flags: RESTRICTED, ..Listener::default() });
        let lists = AccessLists::of(&tables);
        let allowed = |client: &str| lists.allow(1, client.parse().unwrap());
        let clients = ["10.0.0.1", "10.1.0.1", "11.0.0.1", "fd00::1", "2001:db8::1"];
        assert_eq!(clients.map(allowed), [true, false, false, false, true]);
        assert!(lists.allow(2, "11.0.0.1".parse().unwrap()), "a service without lists is everybody's");
        // But for whom no service takes, whatever its own list says.
        for range in ["10.0.0.0/24", "::/1"] {
            let range: IpNet = range.parse().unwrap();
            tables.access.insert((every_service(range.addr().is_ipv4()), range), false);
        }
        let lists = AccessLists::of(&tables);
        let allowed = |service| {
            ["10.0.0.1", "10.0.1.1", "11.0.0.1"].map(|client| lists.allow(service, client.parse().unwrap()))
        };
        assert_eq!((allowed(1), allowed(2)), ([false, true, false], [false, true, true]));
        assert!(
            !lists.allow(2, "2001:db8::1".parse().unwrap()) && lists.allow(2, "fd00::1".parse().unwrap())
        );
    }
}
