//! What keeps the compiler from knowing more than the kernel's verifier does.

/// The same number, of which the compiler knows nothing: it can neither drop a mask that the verifier needs nor make a
/// branch of arithmetic.
#[inline(always)]
#[must_use]
pub fn opaque(number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut number = number;
        // An instruction that does nothing: without one two lines of source have the next, and the kernel refuses that.
        // SAFETY: the register is moved to itself.
        unsafe {
            core::arch::asm!("{0} = {0}", inout(reg) number, options(pure, nomem, nostack, preserves_flags))
        };
        number
    }
    #[cfg(not(target_arch = "bpf"))]
    number
}

/// Zero, made of a number that was read: an address to which it is added is read after it, as every processor keeps the order
/// of reads whose address depends on one another.
#[inline(always)]
#[must_use]
pub fn zero_of(number: u64) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut number = number;
        // SAFETY: two shifts of a register. The verifier knows their outcome, the compiler does not.
        unsafe {
            core::arch::asm!("{0} >>= 63", "{0} >>= 1", inout(reg) number, options(pure, nomem, nostack));
        }
        number as usize
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        (number >> 63 >> 1) as usize
    }
}
