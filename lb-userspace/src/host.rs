//! What this process may do on this machine, as the kernel says it.

use std::fs;

/// The capabilities that the agent cannot do without, by their numbers in `linux/capability.h`.
const NEEDED: [(&str, u32); 3] = [("CAP_BPF", 39), ("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38)];
/// What stands for [`NEEDED`] but CAP_NET_ADMIN, as before Linux 5.8.
const SYS_ADMIN: u32 = 21;

/// What a process may do: the bits of `CapEff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// This process's.
    pub fn own() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::of(&status).unwrap_or(Self(0))
    }

    /// As `/proc/PID/status` has them.
    fn of(status: &str) -> Option<Self> {
        let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(bits.trim(), 16).ok().map(Self)
    }

    fn has(self, number: u32) -> bool {
        self.0 & 1 << number != 0
    }

    /// The names of those that the agent needs and this process lacks.
    pub fn missing(self) -> Vec<&'static str> {
        let stands_in = |number: u32| number != 12 && self.has(SYS_ADMIN);
        let lacks = NEEDED.iter().filter(|(_, number)| !self.has(*number) && !stands_in(*number));
        lacks.map(|(name, _)| *name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let missing = |bits: &str| {
            Capabilities::of(&format!("Name:\tx\nCapEff:\t{bits}\n")).map(Capabilities::missing).unwrap()
        };
        assert_eq!(missing("000001ffffffffff"), Vec::<&str>::new());
        assert_eq!(missing("0000000000000000"), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]);
        // CAP_BPF and CAP_NET_ADMIN.
        assert_eq!(missing("0000008000001000"), ["CAP_PERFMON"]);
        // CAP_SYS_ADMIN stands for the two that were split off it.
        assert_eq!(missing("0000000000200000"), ["CAP_NET_ADMIN"]);
    }
}
