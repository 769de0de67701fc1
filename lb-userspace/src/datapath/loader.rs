//! Loading: the object's programs verified by the kernel, on the tables that are pinned or on new ones.

use std::{collections::HashMap, panic::resume_unwind, thread};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapData,
    programs::{Program, SchedClassifier, Xdp},
};
use lb_common::abi::{ABI_VERSION, program, size, table};

use super::{DatapathError, Features, PinDir, Sizes, TableSet, fault, object, shape::Shape};

/// Whether the programs tell of each new connection; the value is the level they log at.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConnectionLog {
    /// They do not.
    #[default]
    Off = 0,
    /// They do, and of each that no task took.
    On = log::Level::Debug as u8,
}

/// The programs' constant that says whether XDP takes frames in several pieces.
const FRAGS: &str = "FRAGS";
/// And how many sets the connection tables have.
const SETS: &str = "SETS";

/// The programs, loaded on a datapath's tables.
pub struct Programs(pub(super) Ebpf);

/// Whether a whole set of tables is pinned, of this version and these sizes. The kernel hands out a pinned
/// table of any shape, so each is compared here.
pub(super) fn check_pins(pins: &PinDir, sizes: &Sizes) -> Result<bool, DatapathError> {
    let have = table::ALL.iter().filter(|name| pins.table(name).exists()).count();
    let version = if pins.exists()? { TableSet::version(pins)? } else { 0 };
    // A load that was cut short: nothing is attached to it.
    if !pins.has_links() && (have < table::ALL.len() || version == 0) {
        for name in table::ALL {
            pins.remove(&pins.table(name));
        }
        return Ok(false);
    }
    if version != ABI_VERSION || have < table::ALL.len() {
        return Err(DatapathError::Version { found: version, expected: ABI_VERSION });
    }
    for shape in Shape::all(sizes) {
        let pinned = MapData::from_pin(pins.table(shape.name)).map_err(|e| DatapathError::map("open", e))?;
        shape.compare(&pinned.info().map_err(|e| DatapathError::map("inspect", e))?)?;
    }
    Ok(true)
}

/// Loads the programs, on the pinned tables or on new ones of their own.
pub(super) fn load(
    pins: Option<&PinDir>,
    sizes: &Sizes,
    log: ConnectionLog,
    features: Features,
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
    for shape in Shape::all(sizes) {
        if let Some(entries) = shape.entries {
            loader.map_max_entries(shape.name, entries);
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
    verify(&mut ebpf)?;
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

/// Has the kernel verify all programs and take them. That takes it seconds: each has a thread of its own.
fn verify(ebpf: &mut Ebpf) -> Result<(), DatapathError> {
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    thread::scope(|scope| {
        let mut verified = Vec::new();
        for name in program::ALL {
            let program = programs.remove(name).ok_or(DatapathError::NoProgram(name))?;
            verified.push(scope.spawn(move || load_program(name, program)));
        }
        let mut ended = verified.into_iter().map(|thread| thread.join());
        ended.try_for_each(|loaded| loaded.unwrap_or_else(|panic| resume_unwind(panic)))
    })
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
