//! The programs that are run for user space alone and never attached: the clock of connections, and the one that removes lines.

use aya::{
    Ebpf,
    programs::{Program, TestRun as _, TestRunOptions, Xdp},
};
use lb_common::abi::{Removal, program};

use super::{
    ConnectionLog, DatapathError, Features, Programs, Sizes, TableSet,
    loader::{self, On},
};

/// These programs on the tables of a datapath that somebody else may control.
pub struct Tools(Programs);

impl Tools {
    /// Has the kernel take them.
    ///
    /// # Errors
    /// It refuses.
    pub fn of(set: &TableSet) -> Result<Self, DatapathError> {
        Self::load(set, &[program::CLOCK, program::GC])
    }

    /// Has it take the clock alone, which is all that is needed to look: the other one it verifies for a tenth of a second.
    ///
    /// # Errors
    /// It refuses.
    pub fn clock(set: &TableSet) -> Result<Self, DatapathError> {
        Self::load(set, &[program::CLOCK])
    }

    fn load(set: &TableSet, names: &[&'static str]) -> Result<Self, DatapathError> {
        let (on, off) = (On::There(set.pins()), ConnectionLog::Off);
        loader::load(on, &Sizes::default(), off, Features::find()?, names).map(Self)
    }

    /// The clock of connections: jiffies, low 32 bits.
    ///
    /// # Errors
    /// The kernel does not run the program that tells it.
    pub fn now(&self) -> Result<u32, DatapathError> {
        now(&self.0.0)
    }

    /// Removes lines; which were, in order. One that has changed since it was read stays.
    ///
    /// # Errors
    /// The kernel does not run the program.
    pub(super) fn remove(&self, lines: &[Removal]) -> Result<Vec<bool>, DatapathError> {
        let gc = gc(&self.0.0)?;
        let batches = lines.chunks(Removal::BATCH).map(|batch| remove(gc, batch));
        Ok(batches.collect::<Result<Vec<_>, _>>()?.concat())
    }
}

/// Runs the clock.
pub(super) fn now(ebpf: &Ebpf) -> Result<u32, DatapathError> {
    let clock = xdp(ebpf, program::CLOCK)?;
    // Any frame will do; there is none shorter.
    let options = TestRunOptions { data_in: Some(&[0; 14]), ..TestRunOptions::default() };
    clock.test_run(options).map(|result| result.return_value).map_err(DatapathError::Program)
}

/// The program that removes lines.
pub(super) fn gc(ebpf: &Ebpf) -> Result<&Xdp, DatapathError> {
    xdp(ebpf, program::GC)
}

fn xdp<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a Xdp, DatapathError> {
    match ebpf.program(name) {
        Some(Program::Xdp(program)) => Ok(program),
        _ => Err(DatapathError::NoProgram(name)),
    }
}

/// Has the program remove a batch; which were.
pub(super) fn remove(gc: &Xdp, batch: &[Removal]) -> Result<Vec<bool>, DatapathError> {
    let mut frame = Vec::with_capacity(size_of_val(batch));
    for Removal { control, slot, seen, what, done } in batch {
        frame.extend(control.to_ne_bytes());
        for word in [slot, seen, what, done] {
            frame.extend(word.to_ne_bytes());
        }
    }
    let mut out = vec![0; frame.len()];
    let options =
        TestRunOptions { data_in: Some(&frame), data_out: Some(&mut out), ..TestRunOptions::default() };
    gc.test_run(options).map_err(DatapathError::Program)?;
    let done = |removal: &[u8]| removal[size_of::<Removal>() - 4..] != [0; 4];
    Ok(out.chunks_exact(size_of::<Removal>()).map(done).collect())
}
