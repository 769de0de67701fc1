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

/// Loads the programs, on the pinned tables or on new ones of their own; `all` of them, or those that every datapath needs.
pub(super) fn load(
    pins: Option<&PinDir>,
    sizes: &Sizes,
    log: ConnectionLog,
    features: Features,
    all: bool,
) -> Result<Programs, DatapathError> {
    let mut loader = EbpfLoader::new();
    // Frozen when it is loaded: what is off costs nothing, the verifier cuts it out.
    let level = log as u8;
    loader.override_global(aya_log::LEVEL, &level, true);
    let frags = u8::from(features.frags);
    loader.override_global(FRAGS, &frags, true);
    let sets = sets(pins, sizes)?;
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
        if let Some(pins) = pins {
            loader.map_pin_path(name, pins.table(name));
        }
    }
    fault::point("make the tables").map_err(DatapathError::Fault)?;
    let mut ebpf = loader.load(&object::bytes(features.frags)).map_err(DatapathError::Load)?;
    fault::point("load the programs").map_err(DatapathError::Fault)?;
    verify(&mut ebpf, all)?;
    Ok(Programs(ebpf))
}

/// Sets of the connection tables: those that are pinned, or those that are asked for.
fn sets(pins: Option<&PinDir>, sizes: &Sizes) -> Result<u32, DatapathError> {
    if let Some(path) = pins.map(|pins| pins.table(table::CONNECTIONS4)).filter(|path| path.exists()) {
        let pinned = MapData::from_pin(path).map_err(|e| DatapathError::map("open", e))?;
        return Ok(pinned.info().map_err(|e| DatapathError::map("inspect", e))?.max_entries());
    }
    Ok(sizes.connections.map_or(size::SETS as u32, size::sets))
}

/// The programs that a datapath may never need: the kernel takes them before they are attached first. To verify one costs it
/// a quarter of what all the others cost.
const ON_DEMAND: [&str; 1] = [program::PEER_TC];

/// Has the kernel verify the programs and take them. That takes it seconds: each has a thread of its own.
fn verify(ebpf: &mut Ebpf, all: bool) -> Result<(), DatapathError> {
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    thread::scope(|scope| {
        let mut verified = Vec::new();
        for name in program::ALL.into_iter().filter(|name| all || !ON_DEMAND.contains(name)) {
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
