//! The eBPF object in this binary.

use std::borrow::Cow;

use aya::{
    include_bytes_aligned,
    programs::{Program, ProgramError},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf.o"));

/// The section of an XDP program that takes frames in several pieces, and that of one that does not.
const FRAGS: &[u8] = b"xdp.frags\0";
const LINEAR: &[u8] = b"xdp\0";

/// The object's bytes. Whether XDP takes frames in several pieces is said by the name of its program's section
/// alone, so that a kernel that cannot gets the same object with another name in it.
pub(super) fn bytes(frags: bool) -> Cow<'static, [u8]> {
    if frags { Cow::Borrowed(OBJECT) } else { Cow::Owned(linear(OBJECT)) }
}

/// Shortens the section's name wherever it stands: among the sections' names and in BTF, which refers to them.
fn linear(object: &[u8]) -> Vec<u8> {
    let mut bytes = object.to_vec();
    let mut at = 0;
    while let Some(found) = bytes[at..].windows(FRAGS.len()).position(|window| window == FRAGS) {
        at += found;
        bytes[at..at + LINEAR.len()].copy_from_slice(LINEAR);
    }
    bytes
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_is_renamed_wherever_it_is_named() {
        let object = b"\0.relxdp.frags\0xdp.fragsel\0#[xdp(frags)]\0xdp.frags\0";
        let renamed = linear(object);
        assert_eq!(renamed, b"\0.relxdp\0frags\0xdp.fragsel\0#[xdp(frags)]\0xdp\0frags\0");
    }
}
