//! How much of the BPF stack a program uses, read from its object: the kernel bounds it and does not tell.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use aya_obj::{Object, generated::bpf_insn};

/// The frame pointer.
const FRAME: u8 = 10;
/// A frame takes a multiple of so many bytes (`check_max_stack_depth` in the kernel's verifier; of 16 since Linux 6.8, where
/// programs are compiled).
const ROUNDED: u32 = 32;

// Classes and operations of instructions (RFC 9669).
const CLASS: u8 = 0x07;
const LOAD: u8 = 0x01;
const STORE_VALUE: u8 = 0x02;
const STORE: u8 = 0x03;
const MOVE: u8 = 0xbf;
const ADD_VALUE: u8 = 0x07;
const CALL: u8 = 0x85;
/// What a call's source register says where it calls a function of the program.
const OWN_FUNCTION: u8 = 1;

/// The frames of the deepest chain of calls of each program of an object, in bytes, rounded as the kernel does.
///
/// # Panics
/// The object is none.
pub fn frames(object: &[u8]) -> BTreeMap<String, Vec<u32>> {
    let mut object = Object::parse(object).expect("an object");
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections).expect("its calls");
    let programs = object.programs.iter();
    programs
        .map(|(name, program)| {
            let function = &object.functions[&program.function_key()];
            (name.clone(), Frames::of(&function.instructions).deepest(0))
        })
        .collect()
}

/// The functions of a linked program, by their first instruction.
struct Frames {
    /// Bytes, and what is called.
    functions: BTreeMap<usize, (u32, BTreeSet<usize>)>,
}

impl Frames {
    fn of(instructions: &[bpf_insn]) -> Self {
        let target = |at: usize, call: &bpf_insn| {
            at.checked_add_signed(call.imm as isize + 1).expect("a call into the program")
        };
        let is_call =
            |instruction: &bpf_insn| instruction.code == CALL && instruction.src_reg() == OWN_FUNCTION;
        let mut functions: BTreeMap<usize, (u32, BTreeSet<usize>)> =
            BTreeMap::from([(0, Default::default())]);
        for (at, call) in instructions.iter().enumerate().filter(|(_, instruction)| is_call(instruction)) {
            functions.entry(target(at, call)).or_default();
        }
        let mut pointers = BTreeSet::new();
        for (at, instruction) in instructions.iter().enumerate() {
            let (_, (bytes, calls)) = functions.range_mut(..=at).next_back().expect("the first");
            if is_call(instruction) {
                calls.insert(target(at, instruction));
            }
            let offset = match instruction.code & CLASS {
                LOAD if instruction.src_reg() == FRAME => instruction.off.into(),
                STORE | STORE_VALUE if instruction.dst_reg() == FRAME => instruction.off.into(),
                // A pointer into the frame is made by a copy of the frame pointer and an addition to it.
                _ if instruction.code == ADD_VALUE && pointers.contains(&instruction.dst_reg()) => {
                    instruction.imm
                }
                _ => 0,
            };
            *bytes = (*bytes).max(offset.min(0).unsigned_abs());
            pointers.remove(&instruction.dst_reg());
            if instruction.code == MOVE && instruction.src_reg() == FRAME {
                pointers.insert(instruction.dst_reg());
            }
        }
        Self { functions }
    }

    /// Those of a function and what it calls; there is no recursion in BPF.
    fn deepest(&self, function: usize) -> Vec<u32> {
        let (bytes, calls) = &self.functions[&function];
        let below =
            calls.iter().map(|called| self.deepest(*called)).max_by_key(|chain| chain.iter().sum::<u32>());
        let own = (*bytes).max(1).next_multiple_of(ROUNDED);
        [own].into_iter().chain(below.unwrap_or_default()).collect()
    }
}
