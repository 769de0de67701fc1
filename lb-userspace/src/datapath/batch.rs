//! Reading a hash table many entries at a time (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6): a system call for thousands of
//! entries instead of two for each.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{Pod, maps::MapData};

use super::{DatapathError, sys};

/// `BPF_MAP_LOOKUP_BATCH` of the kernel's user API.
const LOOKUP_BATCH: libc::c_long = 24;

/// Entries asked for at once.
const ENTRIES: u32 = 4_096;

/// The attributes of the call: `struct { … } batch` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A walk through a table, which may change meanwhile: what is there all the time is seen once.
pub(super) struct Batches<K, V> {
    map: MapData,
    /// Where the kernel goes on; none before the first call.
    position: Option<u64>,
    ended: bool,
    /// Entries asked for: one bucket's must fit.
    entries: u32,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K: Pod + Default, V: Pod + Default> Batches<K, V> {
    pub(super) fn new(map: MapData) -> Self {
        Self { map, position: None, ended: false, entries: ENTRIES, keys: Vec::new(), values: Vec::new() }
    }

    /// The next entries; none when the walk has ended.
    pub(super) fn next(&mut self) -> Result<Option<impl Iterator<Item = (K, V)> + '_>, DatapathError> {
        if self.ended {
            return Ok(None);
        }
        let count = loop {
            match self.read() {
                Ok(count) => break count,
                // A bucket has more entries than were asked for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && self.entries < 1 << 20 => {
                    self.entries *= 2;
                }
                Err(error) => return Err(DatapathError::pin("read", "a table of connections", error)),
            }
        };
        Ok(Some(self.keys[..count].iter().copied().zip(self.values[..count].iter().copied())))
    }

    fn read(&mut self) -> io::Result<usize> {
        self.keys.resize(self.entries as usize, K::default());
        self.values.resize(self.entries as usize, V::default());
        let mut next = 0_u64;
        let mut attributes = Attributes {
            in_batch: self.position.as_ref().map_or(0, |position| std::ptr::from_ref(position) as u64),
            out_batch: &raw mut next as u64,
            keys: self.keys.as_mut_ptr() as u64,
            values: self.values.as_mut_ptr() as u64,
            count: self.entries,
            map_fd: self.map.fd().as_fd().as_raw_fd() as u32,
            ..Attributes::default()
        };
        // SAFETY: the attributes are those of the call, and the kernel writes at most `count` keys and values, of the
        // sizes that the table was opened with, to vectors that hold as many, and a word to `next`.
        if let Err(error) = unsafe { sys::bpf(LOOKUP_BATCH, &mut attributes) } {
            if error.raw_os_error() != Some(libc::ENOENT) {
                return Err(error);
            }
            // The last of them.
            self.ended = true;
        }
        self.position = Some(next);
        Ok(attributes.count as usize)
    }
}
