//! How much memory the tables take.

use std::{fs, os::fd::AsRawFd as _};

use aya::maps::MapData;
use lb_common::abi::table;

use super::{DatapathError, TableSet};

impl TableSet {
    /// Bytes of kernel memory that each table takes, by the kernel's own count (`memlock` of its descriptor).
    ///
    /// # Errors
    /// A pin is missing.
    pub fn memory(&self) -> Result<Vec<(&'static str, u64)>, DatapathError> {
        table::ALL.iter().map(|name| Ok((*name, self.memory_of(name)?))).collect()
    }

    fn memory_of(&self, name: &str) -> Result<u64, DatapathError> {
        let map = MapData::from_pin(self.pins().table(name)).map_err(|e| DatapathError::map("open", e))?;
        let path = format!("/proc/self/fdinfo/{}", std::os::fd::AsFd::as_fd(map.fd()).as_raw_fd());
        let info = fs::read_to_string(&path).map_err(|error| DatapathError::pin("read", path, error))?;
        let memlock = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        Ok(memlock.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or_default())
    }
}
