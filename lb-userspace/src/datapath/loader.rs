//! Loading: the object's programs verified by the kernel, on the tables that are pinned or on new ones.

use std::{collections::HashMap, panic::resume_unwind, thread};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapData,
    programs::{Program, SchedClassifier, Xdp},
};
use lb_common::abi::{ABI_VERSION, program, size, table};

use super::{DatapathError, Features, PinDir, Sizes, TableSet, fault, map_spec::MapSpec, object};

/// Whether the programs tell of each new connection; the value is the level they log at.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConnectionLog {
    /// They do not.
    #[default]
    Off = 0,
    /// They do.
    On = log::Level::Debug as u8,
}

/// The programs' constant that says whether XDP takes frames in several pieces.
const FRAGS: &str = "FRAGS";
/// And how many sets the connection tables have.
const SETS: &str = "SETS";

/// The programs, loaded on a datapath's tables.
pub struct Programs(pub(super) Ebpf);

/// What is pinned of a datapath.
struct Pinned {
    /// How many tables.
    tables: usize,
    /// Of which version they are; zero before they are whole.
    version: u32,
}

impl Pinned {
    fn find(pins: &PinDir) -> Result<Self, DatapathError> {
        let tables = table::ALL.iter().filter(|name| pins.table(name).exists()).count();
        Ok(Self { tables, version: if pins.exists()? { TableSet::version(pins)? } else { 0 } })
    }

    /// Whether a load was cut short: nothing is attached to it. So it is where nothing is pinned at all.
    fn is_cut_short(&self, pins: &PinDir) -> bool {
        !pins.has_links() && (self.tables < table::ALL.len() || self.version == 0)
    }

    /// Refuses tables of another version, or of other sizes than are asked for. The kernel hands out a pinned table of any
    /// shape, so each is compared here.
    fn fits(&self, pins: &PinDir, sizes: &Sizes) -> Result<(), DatapathError> {
        if self.version != ABI_VERSION || self.tables < table::ALL.len() {
            return Err(DatapathError::Version { found: self.version, expected: ABI_VERSION });
        }
        for spec in MapSpec::all(sizes) {
            let pinned =
                MapData::from_pin(pins.table(spec.name)).map_err(|e| DatapathError::map("open", e))?;
            spec.compare(&pinned.info().map_err(|e| DatapathError::map("inspect", e))?)?;
        }
        Ok(())
    }
}

/// Whether a whole set of tables is pinned, of this version and these sizes. What is left of a load that was cut short is taken
/// away.
pub(super) fn check_pins(pins: &PinDir, sizes: &Sizes) -> Result<bool, DatapathError> {
    let pinned = Pinned::find(pins)?;
    if pinned.is_cut_short(pins) {
        for name in table::ALL {
            pins.remove(&pins.table(name));
        }
        return Ok(false);
    }
    pinned.fits(pins, sizes)?;
    Ok(true)
}

/// Whether an attach with these sizes would take what is pinned for an interface, if anything is. Nothing is changed.
///
/// # Errors
/// It would not, and why.
pub fn would_adopt(interface: &str, sizes: &Sizes) -> Result<(), DatapathError> {
    let pins = PinDir::of(interface)?;
    let pinned = Pinned::find(&pins)?;
    if pinned.is_cut_short(&pins) { Ok(()) } else { pinned.fits(&pins, sizes) }
}

/// On which tables programs are loaded.
#[derive(Clone, Copy)]
pub(super) enum On<'a> {
    /// New ones, which go with them.
    Own,
    /// Those that are pinned, or new ones that are.
    Pinned(&'a PinDir),
    /// Those that are pinned, all of them.
    There(&'a PinDir),
    /// The same; but of those that programs write new ones, which go with them: for connections of one family as large, and of those
    /// for others no larger than need be.
    Beside(&'a PinDir, Family),
}

/// Of the tables that one packet hardly needs, so many entries are enough.
const FEW: u32 = 64;

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// Entries of a table of its own for one packet of the family, where that is not as large as the one that is pinned.
    fn entries(self, name: &str) -> Option<u32> {
        const HARDLY: [&str; 5] = [
            table::BACKEND_STATS,
            table::SERVICE_STATS,
            table::FRAGMENTS4,
            table::FRAGMENTS6,
            table::EARLY_FRAGMENTS,
        ];
        let other = if self == Self::V4 { table::CONNECTIONS6 } else { table::CONNECTIONS4 };
        (name == other || HARDLY.contains(&name)).then_some(FEW)
    }
}

impl<'a> On<'a> {
    /// Where the tables are that there may be already.
    fn pins(self) -> Option<&'a PinDir> {
        match self {
            Self::Own => None,
            Self::Pinned(pins) | Self::There(pins) | Self::Beside(pins, _) => Some(pins),
        }
    }

    /// Where this table is pinned, if it is not one of their own.
    fn pin(self, name: &str) -> Option<std::path::PathBuf> {
        match self {
            Self::Own => None,
            Self::Beside(..) if table::WRITTEN.contains(&name) => None,
            Self::Pinned(pins) | Self::There(pins) | Self::Beside(pins, _) => Some(pins.table(name)),
        }
    }

    /// Refuses tables that have gone: they would be made anew, and be nobody's.
    fn check(self) -> Result<(), DatapathError> {
        let (Self::There(pins) | Self::Beside(pins, _)) = self else { return Ok(()) };
        let there = table::ALL.iter().all(|name| pins.table(name).exists());
        if there { Ok(()) } else { Err(DatapathError::NotAttached(None)) }
    }
}

/// Loads programs on tables: those of these names.
pub(super) fn load(
    on: On<'_>,
    sizes: &Sizes,
    log: ConnectionLog,
    features: Features,
    names: &[&'static str],
) -> Result<Programs, DatapathError> {
    let mut loader = EbpfLoader::new();
    // Frozen when it is loaded: what is off costs nothing, the verifier cuts it out.
    let level = log as u8;
    loader.override_global(aya_log::LEVEL, &level, true);
    let frags = u8::from(features.frags);
    loader.override_global(FRAGS, &frags, true);
    let sets = sets(on.pins(), sizes)?;
    loader.override_global(SETS, &sets, true);
    for name in [table::CONNECTIONS4, table::CONNECTIONS6] {
        loader.map_max_entries(name, sets);
    }
    for spec in MapSpec::all(sizes) {
        if let Some(entries) = spec.entries {
            loader.map_max_entries(spec.name, entries);
        }
    }
    for name in table::ALL {
        if let Some(pin) = on.pin(name) {
            loader.map_pin_path(name, pin);
        } else if let On::Beside(pins, family) = on {
            loader.map_max_entries(name, family.entries(name).map_or_else(|| entries(pins, name), Ok)?);
        }
    }
    fault::point("make the tables").map_err(DatapathError::Fault)?;
    on.check()?;
    let mut ebpf = loader.load(&object::bytes(features.frags)).map_err(DatapathError::Load)?;
    fault::point("load the programs").map_err(DatapathError::Fault)?;
    verify(&mut ebpf, names)?;
    Ok(Programs(ebpf))
}

/// Entries that a pinned table has room for.
fn entries(pins: &PinDir, name: &str) -> Result<u32, DatapathError> {
    let pinned = MapData::from_pin(pins.table(name)).map_err(|e| DatapathError::map("open", e))?;
    Ok(pinned.info().map_err(|e| DatapathError::map("inspect", e))?.max_entries())
}

/// Sets of the connection tables: those that are pinned, or those that are asked for.
fn sets(pins: Option<&PinDir>, sizes: &Sizes) -> Result<u32, DatapathError> {
    match pins.filter(|pins| pins.table(table::CONNECTIONS4).exists()) {
        Some(pins) => entries(pins, table::CONNECTIONS4),
        None => Ok(sizes.connections.map_or(size::SETS as u32, size::sets)),
    }
}

/// The programs that every datapath needs. The kernel takes the others before they are attached first: to verify one costs it
/// a quarter of what all these cost.
pub(super) const NEEDED: [&str; 6] = [
    program::UPLINK_XDP,
    program::UPLINK_TC,
    program::UPLINK_EGRESS,
    program::TASK_TC,
    program::CLOCK,
    program::GC,
];

/// Has the kernel verify programs and take them. That takes it seconds: each has a thread of its own.
fn verify(ebpf: &mut Ebpf, names: &[&'static str]) -> Result<(), DatapathError> {
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    thread::scope(|scope| {
        let mut verified = Vec::new();
        for name in names.iter().copied() {
            let program = programs.remove(name).ok_or(DatapathError::NoProgram(name))?;
            verified.push(scope.spawn(move || load_program(name, program)));
        }
        let mut ended = verified.into_iter().map(|thread| thread.join());
        ended.try_for_each(|loaded| loaded.unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Has the kernel take a program that was left out.
///
/// # Errors
/// It refuses.
pub(super) fn demand(ebpf: &mut Ebpf, name: &'static str) -> Result<(), DatapathError> {
    let program = ebpf.program_mut(name).ok_or(DatapathError::NoProgram(name))?;
    if is_loaded(program) {
        return Ok(());
    }
    fault::point("load a program on demand").map_err(DatapathError::Fault)?;
    load_program(name, program)
}

/// Whether the kernel has taken a program.
pub(super) fn is_loaded(program: &Program) -> bool {
    program.fd().is_ok()
}

fn load_program(name: &'static str, program: &mut Program) -> Result<(), DatapathError> {
    let loaded = match name {
        program::UPLINK_XDP | program::CLOCK | program::GC => {
            <&mut Xdp>::try_from(program).and_then(Xdp::load)
        }
        _ => <&mut SchedClassifier>::try_from(program).and_then(SchedClassifier::load),
    };
    loaded.map_err(|error| DatapathError::Verify { program: name, cause: Box::new(error) })
}
