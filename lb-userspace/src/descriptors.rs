//! How many files this process may have open: a connection to each node takes one, and the datapath, Docker and the network
//! need theirs.

use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Kept for all that is no connection of another node's agent: tables and programs (some hundred), Docker, the network.
const OWN: u64 = 512;
/// More is asked for from nobody: tables of descriptors cost memory.
const ENOUGH: u64 = 65_536;

/// Asks for as many as this process may have; how many that are.
pub fn raise() -> u64 {
    static LIMIT: OnceLock<u64> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
            return 1024;
        };
        let wanted = hard.min(ENOUGH);
        if soft < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok() { wanted } else { soft }
    })
}

/// As many connections of other nodes' agents there may be.
pub fn connections() -> usize {
    raise().saturating_sub(OWN).max(64) as usize
}

/// What is wrong if there are so many nodes in the swarm whose agents connect here.
pub fn problem(nodes: usize) -> Option<String> {
    let (limit, room) = (raise(), connections());
    (nodes > room).then(|| {
        format!(
            "this process may have {limit} files open, which is enough for the agents of {room} nodes, and the swarm has \
             {nodes}; raise the limit to {} (LimitNOFILE= in the unit, ulimits in a stack, `ulimit -n` in a shell)",
            nodes as u64 + OWN
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swarm_that_is_too_large_is_said() {
        assert_eq!(problem(3), None);
        let problem = problem(10_000_000).unwrap();
        assert!(problem.contains("the swarm has 10000000; raise the limit to 10000512"), "{problem}");
    }
}
