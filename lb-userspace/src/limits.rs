//! Limits that the datapath has run into, and whom it refuses, in words with the next step: said when it begins, and again only
//! after it was over for a while. What a plan has no room for the planner says itself.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::{
    abi::{size, table},
    outcome::Outcome,
};

/// How full a table of the datapath is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Its name.
    pub table: &'static str,
    /// Entries that are alive.
    pub entries: u64,
    /// Entries that it is made for: of connections half of its lines, of fragments what is there before the least recently used
    /// go.
    pub room: u64,
}

/// What packets run into, by the outcome that counts them.
const COUNTED: [(Outcome, &str); 7] = [
    (
        Outcome::SnatPortsExhausted,
        "no port is free under which a task could tell a new connection from others: of a task that is reached by snat, attach \
         again with a wider --snat-ports; else one client has too many connections to one task through several nodes or listeners",
    ),
    (
        Outcome::TableFull,
        "the connection table had no place for a connection that needs one; attach again with --replace-state and a higher \
         --max-connections",
    ),
    (
        Outcome::Martian,
        "clients are refused that say to have an address of this node, or one behind a bridge of its containers: they are forged, \
         or a network outside has the same range (`ip route get CLIENT` names the bridge); give the bridge another range then. \
         Or datagrams come from a published port of another node, which would answer each other for ever",
    ),
    (
        Outcome::TunnelImpostor,
        "a program or a container of this node sends packets that only its datapath may send to other nodes: they are dropped; \
         `tcpdump -ni any udp dst port 6081` (or the port of --tunnel-port) shows where they come from before they get this \
         node's address",
    ),
    (
        Outcome::TunnelForged,
        "packets come through the tunnel from addresses of other nodes, but without those nodes' keys: they are dropped; \
         `lb-userspace node ls` says under whose address. A node that has just begun anew sends some before its new key is known \
         here; if it goes on, somebody forges them",
    ),
    (
        Outcome::PoolExhausted,
        "IPv6 clients of tasks that have IPv4 alone are dropped: each IPv4 address that a task could know them by is another's; \
         attach again with a wider --v6-pool if it is not of the greatest width, or give the tasks IPv6",
    ),
    (
        Outcome::ForeignVlan,
        "frames came that are addressed to this node, of a VLAN that it does not have on the uplink: they are left alone; if they \
         are for it, add the VLAN's interface, else the switch sends more than it should",
    ),
];

/// A limit that was not run into for so many looks is no longer one.
const QUIET: u32 = 60;

/// What was said, and is still so.
#[derive(Debug)]
pub struct Watch {
    /// By outcome: how many packets there were, and for how many looks no more came.
    counted: BTreeMap<Outcome, (u64, u32)>,
    /// The tables that are full.
    full: BTreeSet<&'static str>,
}

impl Watch {
    /// Begins to look: what was counted before is not news.
    pub fn new(packets: impl Fn(Outcome) -> Option<u64>) -> Self {
        let counted =
            COUNTED.into_iter().map(|(outcome, _)| (outcome, (packets(outcome).unwrap_or_default(), QUIET)));
        Self { counted: counted.collect(), full: BTreeSet::new() }
    }

    /// Looks at the counters, about once a second; what is to be said.
    pub fn counters(&mut self, packets: impl Fn(Outcome) -> Option<u64>) -> Vec<&'static str> {
        let mut said = Vec::new();
        for (outcome, words) in COUNTED {
            let Some(now) = packets(outcome) else { continue };
            let (before, quiet) = self.counted.entry(outcome).or_insert((0, QUIET));
            if now == *before {
                *quiet = quiet.saturating_add(1);
                continue;
            }
            if *quiet >= QUIET {
                said.push(words);
            }
            (*before, *quiet) = (now, 0);
        }
        said
    }

    /// Looks at how full a table is; what is to be said.
    pub fn fill(&mut self, fill: Fill) -> Option<String> {
        let Fill { table, entries, room } = fill;
        if entries < room - room / 4 {
            self.full.remove(table);
        }
        if entries < room - room / 16 || !self.full.insert(table) {
            return None;
        }
        let (what, setting) = setting(table);
        if table == table::POOL {
            return Some(format!(
                "tasks know {entries} IPv6 clients by the {room} addresses of the pool; {}",
                wider(room)
            ));
        }
        Some(format!(
            "the table of {what} ({table}) has {entries} of the {room} that it is made for; attach again with \
             --replace-state and a higher {setting}"
        ))
    }
}

/// What helps where a pool of so many addresses for IPv6 clients is full.
pub fn wider(room: u64) -> &'static str {
    match room < size::POOL as u64 {
        true => "attach again with a wider --v6-pool, or give the tasks IPv6",
        false => "give the tasks IPv6: no pool is wider",
    }
}

/// The setting of `attach` that says how much a table holds.
pub fn setting_of(table: &str) -> &'static str {
    match table {
        table::LISTENERS4 | table::LISTENERS6 => "--max-listeners",
        table::SLOTS => "--max-slots",
        table::BACKENDS
        | table::BACKEND_STATS
        | table::TASKS
        | table::LABELS
        | table::TASK_ENDPOINTS4
        | table::TASK_ENDPOINTS6 => "--max-backends",
        table::SERVICE_STATS | table::SERVICES => "--max-services",
        table::PEERS | table::PEER_KEYS | table::PEER_NUMBERS => "--max-nodes",
        other => setting(other).1,
    }
}

/// What a table holds, and the setting that says how much.
fn setting(name: &str) -> (&'static str, &'static str) {
    match name {
        table::POOL | table::POOL_CLIENTS => ("IPv6 clients", "--v6-pool"),
        table::FRAGMENTS4 | table::FRAGMENTS6 => ("fragmented datagrams", "--max-fragments"),
        _ => ("connections", "--max-connections"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_grows_is_said_once_until_it_was_quiet() {
        let mut watch = Watch::new(|_| Some(7));
        let mut look = |packets: u64| {
            let count = |outcome| (outcome == Outcome::SnatPortsExhausted).then_some(packets);
            watch.counters(count).len()
        };
        assert_eq!([7, 7, 8, 9, 9, 100].map(&mut look), [0, 0, 1, 0, 0, 0]);
        for _ in 0..QUIET {
            assert_eq!(look(100), 0);
        }
        assert_eq!([101, 102].map(&mut look), [1, 0]);
    }

    #[test]
    fn a_table_that_is_full_is_said_once_until_there_is_room() {
        let mut watch = Watch::new(|_| None);
        let mut look = |entries| watch.fill(Fill { table: table::CONNECTIONS4, entries, room: 1_000 });
        assert_eq!(look(800), None);
        assert!(
            look(950).is_some_and(
                |said| said.contains("has 950 of the 1000") && said.contains("--max-connections")
            )
        );
        assert_eq!([1_000, 800, 950].map(&mut look), [None, None, None]);
        assert_eq!(look(700), None);
        assert!(look(990).is_some());
    }
}
