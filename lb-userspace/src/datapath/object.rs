//! The eBPF object in this binary.

use aya::{
    include_bytes_aligned,
    programs::{Program, ProgramError},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf.o"));

/// The object's bytes.
pub(super) fn bytes() -> &'static [u8] {
    OBJECT
}

/// Whether this build has an object; `cargo build` alone makes one without.
pub fn is_embedded() -> bool {
    !OBJECT.is_empty()
}

/// What the kernel knows of a loaded program.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ProgramFacts {
    /// Name in the object.
    pub name: String,
    /// The kernel's number for it.
    pub id: u32,
    /// Instructions the verifier walked through; it stops at a million.
    pub verified_instructions: u32,
    /// Size after translation in bytes; eight to an instruction.
    pub translated_bytes: u32,
    /// Size of the machine code in bytes.
    pub jited_bytes: u32,
}

/// Asks the kernel about a program.
///
/// # Errors
/// The program is not loaded.
pub fn program_facts(name: &str, program: &Program) -> Result<ProgramFacts, ProgramError> {
    let info = program.info()?;
    Ok(ProgramFacts {
        name: name.to_owned(),
        id: info.id(),
        verified_instructions: info.verified_instruction_count().unwrap_or_default(),
        translated_bytes: info.size_translated().unwrap_or_default(),
        jited_bytes: info.size_jitted(),
    })
}
