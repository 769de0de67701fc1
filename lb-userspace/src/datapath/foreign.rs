//! Whose an attached program is.

use std::fs;

use aya::programs::ProgramInfo;

use super::PinDir;

/// A program that the kernel has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The kernel's number for it.
    pub id: u32,
    /// Its name; empty where the kernel does not tell.
    pub name: String,
    /// The processes that hold it, by name and number.
    pub owners: Vec<String>,
}

/// What is known of a program by its number.
pub fn loaded(id: u32) -> Loaded {
    let info = aya::programs::loaded_programs().flatten().find(|info| info.id() == id);
    let name = info.and_then(|info| info.name_as_str().map(str::to_owned)).unwrap_or_default();
    Loaded { id, name, owners: owners(id) }
}

/// The number of a datapath's program, if it is pinned.
pub fn own(pins: &PinDir, name: &str) -> Option<u32> {
    ProgramInfo::from_pin(pins.program(name)).ok().map(|info| info.id())
}

/// The processes that hold a program or a link to it open, by what the kernel shows of their descriptors.
fn owners(id: u32) -> Vec<String> {
    let wanted = format!("prog_id:\t{id}");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let holds = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        let mut texts = descriptors.filter_map(|entry| fs::read_to_string(entry.path()).ok());
        texts.any(|text| text.lines().any(|line| line == wanted))
    };
    let name = |pid: u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{} ({pid})", name.trim())
    };
    processes.filter(holds).map(name).collect()
}
