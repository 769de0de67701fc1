//! Which kernel runs here. Programs ask it what it can do; tests know what it should.

/// Major and minor version of the running kernel.
pub fn version() -> (u32, u32) {
    let release = lb_userspace::datapath::release();
    let mut numbers = release.split(['.', '-', '+']).map_while(|part| part.parse().ok());
    let version = numbers.next().zip(numbers.next());
    version.unwrap_or_else(|| panic!("{release} does not begin with a version"))
}

/// The oldest kernel that serves.
pub const OLDEST: (u32, u32) = (5, 15);
/// XDP takes frames in several pieces.
pub const FRAGS: (u32, u32) = (5, 18);
/// A table's memory is counted as it is taken.
pub const COUNTED_MEMORY: (u32, u32) = (6, 4);
/// TC programs attach by links.
pub const TCX: (u32, u32) = (6, 6);
