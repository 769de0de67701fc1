//! What stands in for tasks that have IPv6 alone, as the kernel's table has it: each by its address, and by its stand-in.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aya::maps::MapError;
use lb_common::{
    net::V6,
    tunnel::{mapped, unmapped},
};

use super::{
    DatapathError,
    tables::{TableSet, insert, remove},
};

/// The table, and what makes room in it.
const STAND_INS: (&str, &str) = ("STAND_INS", "--max-backends");

impl TableSet {
    /// Those of which both halves are there: where a change was cut short one is not.
    pub(super) fn read_stand_ins(&self) -> Result<BTreeMap<Ipv4Addr, Ipv6Addr>, DatapathError> {
        let mut found = BTreeMap::new();
        for item in self.stand_ins.iter() {
            let (address, own) = item.map_err(|error| DatapathError::map("read", error))?;
            if let (IpAddr::V4(v4), IpAddr::V6(v6)) = (unmapped(address.0), unmapped(own.0))
                && self.stand_in(&own)?.is_some()
            {
                found.insert(v4, v6);
            }
        }
        Ok(found)
    }

    /// Has an address stand in for a task. By the stand-in it is found last: then it has an answer.
    pub(super) fn set_stand_in(&mut self, address: Ipv4Addr, own: Ipv6Addr) -> Result<(), DatapathError> {
        self.remove_stand_in(address)?;
        let (address, own) = (V6(mapped(address.into())), V6::from(own));
        insert(&mut self.stand_ins, &own, &address, STAND_INS)?;
        insert(&mut self.stand_ins, &address, &own, STAND_INS)
    }

    /// Has an address stand in for nobody, and whom it stood in for have none, unless another one does already.
    pub(super) fn remove_stand_in(&mut self, address: Ipv4Addr) -> Result<(), DatapathError> {
        let address = V6(mapped(address.into()));
        let Some(own) = self.stand_in(&address)? else { return Ok(()) };
        remove(&mut self.stand_ins, &address)?;
        match self.stand_in(&own)? {
            Some(known) if known == address => remove(&mut self.stand_ins, &own),
            _ => Ok(()),
        }
    }

    /// What stands beside a task's address, or beside its stand-in.
    fn stand_in(&self, key: &V6) -> Result<Option<V6>, DatapathError> {
        match self.stand_ins.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(DatapathError::map("read", error)),
        }
    }
}
