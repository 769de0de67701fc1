//! A cluster's description in pieces, a service each, so that a change of one costs what that one costs.
//!
//! A file is cut at its `[[service]]` lines. A piece that is as it was stands for the service that it was; the others are
//! parsed each by itself. Whatever is out of the ordinary, a mistake before all, is left to who reads the whole: what is
//! taken here, that one would take too, and make the same of it.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    ops::Range,
    path::PathBuf,
    sync::Arc,
};

use ipnet::IpNet;

use super::parse::{self, Published, RawCluster};
use crate::cluster::{ClusterState, Node, Port, Service, Tunnel};

/// How a piece begins.
const HEADER: &str = "[[service]]";

/// What was read last.
#[derive(Default)]
pub(super) struct Pieces {
    text: String,
    /// Where the first service begins.
    head: usize,
    nodes: Vec<Node>,
    denied: Vec<IpNet>,
    /// Their names.
    known: HashSet<String>,
    tunnel: Tunnel,
    key_file: Option<(usize, PathBuf)>,
    services: Vec<Piece>,
    unique: Unique,
}

#[derive(Clone)]
struct Piece {
    place: Range<usize>,
    service: Arc<Service>,
}

impl Pieces {
    /// The cluster that a text describes, if its parts can be told from each other; [`Self::keep`] must follow with the same
    /// text. Else everything is forgotten.
    pub fn read(&mut self, text: &str) -> Option<ClusterState> {
        let state = self.take(text);
        if state.is_none() {
            *self = Self::default();
        }
        state
    }

    /// Where the tunnel's key is, and where that stands.
    pub fn key_file(&self) -> Option<(usize, PathBuf)> {
        self.key_file.clone()
    }

    /// Keeps the text that was read.
    pub fn keep(&mut self, text: String) {
        self.text = text;
    }

    fn take(&mut self, text: &str) -> Option<ClusterState> {
        let head = headers(text, 0..text.len()).next().unwrap_or(text.len());
        if self.text.get(..self.head) != text.get(..head) || self.text.is_empty() {
            *self = Self::default();
            self.take_head(text.get(..head)?)?;
            self.head = head;
        }
        let (before, after) = self.same(text);
        let start = before.checked_sub(1).map_or(head, |last| self.services[last].place.end);
        let end = self.services.get(self.services.len() - after).map_or(text.len(), |piece| {
            // Counted from the end both texts are the same.
            text.len() - (self.text.len() - piece.place.start)
        });
        let places = places(text, start..end);
        let last = self.services.len() - after;
        for piece in &self.services[before..last] {
            self.unique.forget(&piece.service);
        }
        let mut new = Vec::with_capacity(places.len());
        for place in places {
            new.push(self.take_service(text, place)?);
        }
        let moved = text.len() as isize - self.text.len() as isize;
        for piece in &mut self.services[last..] {
            let at = |position: usize| position.wrapping_add_signed(moved);
            piece.place = at(piece.place.start)..at(piece.place.end);
        }
        self.services.splice(before..last, new);
        let services = self.services.iter().map(|piece| piece.service.clone()).collect();
        Some(ClusterState {
            nodes: self.nodes.clone(),
            services,
            tunnel: self.tunnel,
            denied: self.denied.clone(),
            ..ClusterState::default()
        })
    }

    /// What stands before the first service.
    fn take_head(&mut self, text: &str) -> Option<()> {
        let raw = alone(text)?;
        // Not even none of them: such a list could not go on.
        if raw.service.is_some() {
            return None;
        }
        self.nodes = parse::nodes(&raw, &mut HashMap::new()).ok()?;
        self.denied = parse::ranges(&raw.deny).ok()?;
        self.known = self.nodes.iter().map(|node| node.name.clone()).collect();
        self.tunnel = parse::tunnel(raw.tunnel.as_ref(), &Published::new()).ok()?;
        self.key_file = parse::key_file(&raw).map(|(at, path)| (at, path.to_owned()));
        Some(())
    }

    /// How many pieces are what they were, at the beginning and at the end.
    fn same(&self, text: &str) -> (usize, usize) {
        let (old, new) = (self.text.as_bytes(), text.as_bytes());
        let begins = |at: usize| at == text.len() || is_header(text, at);
        let stays = |piece: &&Piece| new.get(piece.place.clone()) == Some(&old[piece.place.clone()]);
        let mut before = self.services.iter().take_while(stays).count();
        // More may have been written behind the last of them.
        while before > 0 && !begins(self.services[before - 1].place.end) {
            before -= 1;
        }
        let least = before.checked_sub(1).map_or(self.head, |last| self.services[last].place.end);
        let ends = |piece: &&Piece| {
            let from_end = old.len() - piece.place.start;
            let start = new.len().checked_sub(from_end).filter(|start| *start >= least);
            start.is_some_and(|start| {
                is_header(text, start) && new[start..][..piece.place.len()] == old[piece.place.clone()]
            })
        };
        (before, self.services[before..].iter().rev().take_while(ends).count())
    }

    fn take_service(&mut self, text: &str, place: Range<usize>) -> Option<Piece> {
        let raw = alone(text.get(place.clone())?)?;
        let [service] = raw.service.as_deref()? else {
            return None;
        };
        if !raw.node.is_empty() || raw.tunnel.is_some() {
            return None;
        }
        let (mut names, mut places) = (HashMap::new(), Published::new());
        let service = parse::service(service.get_ref(), &self.known, &mut names, &mut places).ok()?;
        let udp = |port: &Port| port.protocol.number() == lb_common::net::UDP;
        let takes_tunnel = service.ports.iter().any(|port| udp(port) && port.published == self.tunnel.port);
        (!takes_tunnel && self.unique.learn(&service)).then(|| Piece { place, service: Arc::new(service) })
    }
}

/// A part of the description that can be told from the rest of it: no string begins in one and ends in another.
fn alone(text: &str) -> Option<RawCluster> {
    if text.contains("\"\"\"") || text.contains("'''") {
        return None;
    }
    parse::raw(text).ok()
}

/// Whether a header stands at the beginning of a line there.
fn is_header(text: &str, at: usize) -> bool {
    let begins = at == 0 || text.as_bytes().get(at - 1) == Some(&b'\n');
    begins
        && text.get(at..).and_then(|rest| rest.strip_prefix(HEADER)).is_some_and(|rest| {
            let rest = rest.split('\n').next().unwrap_or_default().trim();
            rest.is_empty() || rest.starts_with('#')
        })
}

/// Where headers stand in a part of the text.
fn headers(text: &str, part: Range<usize>) -> impl Iterator<Item = usize> {
    let found = text[part.clone()].match_indices(HEADER).map(move |(at, _)| part.start + at);
    found.filter(|at| is_header(text, *at))
}

/// The pieces of a part that begins with a header.
fn places(text: &str, part: Range<usize>) -> Vec<Range<usize>> {
    let starts: Vec<usize> = headers(text, part.clone()).collect();
    let ends = starts.iter().skip(1).copied().chain([part.end]);
    starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
}

/// What must be unique in a cluster. Of names only hashes are kept: two that happen to be the same are found to differ by who
/// reads the whole.
#[derive(Default)]
struct Unique {
    hasher: RandomState,
    names: HashSet<u64>,
    published: HashSet<(u8, u16, Option<IpAddr>)>,
}

impl Unique {
    /// Takes note of a service; false if something of it is taken.
    fn learn(&mut self, service: &Service) -> bool {
        let (names, published) = (self.names(service), published(service));
        names.into_iter().all(|name| self.names.insert(name))
            && published.into_iter().all(|place| self.published.insert(place))
    }

    /// A service that has gone.
    fn forget(&mut self, service: &Service) {
        for name in self.names(service) {
            self.names.remove(&name);
        }
        for place in published(service) {
            self.published.remove(&place);
        }
    }

    fn names(&self, service: &Service) -> Vec<u64> {
        let tasks = service.tasks.iter().map(|task| self.hasher.hash_one(("task", &task.name)));
        tasks.chain([self.hasher.hash_one(("service", &service.name))]).collect()
    }
}

/// Where a service answers.
fn published(service: &Service) -> Vec<(u8, u16, Option<IpAddr>)> {
    let places: Vec<Option<IpAddr>> = match service.addresses.as_slice() {
        [] => vec![None],
        addresses => addresses.iter().copied().map(Some).collect(),
    };
    let ports = service.ports.iter();
    ports
        .flat_map(|port| places.iter().map(|place| (port.protocol.number(), port.published, *place)))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lines of which files are made: whole services among them, and what breaks them.
    const LINES: [&str; 16] = [
        "[[node]]\nname = \"n1\"\naddresses = [\"192.0.2.1\"]\n",
        "[[node]]\nname = \"n2\"\naddresses = []\n",
        "[tunnel]\nport = 7000\n",
        "[[service]]\nname = \"a\"\nports = [\"80:80\"]\n",
        "[[service]] # b\nname = \"b\"\nports = [\"81:80\", \"7000:53/udp\"]\n",
        "[[service]]\nname = \"c\"\nports = [\n\"80:80\"]\n",
        "[[service]]\nname = \"d\"\nports = []\nidle = \"reset\"\n[service.timers]\nclosing = 9\n",
        "[[service.task]]\nname = \"t1\"\nnode = \"n1\"\naddresses = [\"10.0.0.1\"]\n",
        "[[service.task]]\nname = \"t2\"\nnode = \"n1\"\naddresses = [\"10.0.0.2\"]\n",
        "[[service.task]]\nname = \"t3\"\nnode = \"n2\"\naddresses = [\"10.0.0.3\"]\n",
        " [[service]]\nname = \"e\"\nports = []\n",
        "# [[service]]\n",
        "[[service]]\nname = '''\n[[service]]\n'''\nports = []\n",
        "[[\"service\"]]\nname = \"f\"\nports = []\n",
        "name = \"again\"\n",
        "service = []\n",
    ];

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        /// Through any changes: what is made of the pieces is what is made of the whole.
        #[test]
        fn pieces_come_to_what_the_whole_comes_to(
            first in prop::collection::vec(0..LINES.len(), 0..10),
            edits in prop::collection::vec((any::<prop::sample::Index>(), 0..LINES.len(), 0..3), 0..8),
        ) {
            let (mut lines, mut pieces) = (first, Pieces::default());
            // Those that usually come first.
            lines.splice(0..0, [0, 1]);
            for (place, line, kind) in edits {
                let text: String = lines.iter().map(|line| LINES[*line]).collect();
                let whole = parse::raw(&text).and_then(|raw| parse::cluster(&raw));
                if let Some(state) = pieces.read(&text) {
                    prop_assert_eq!(Some(state), whole.ok(), "{}", text);
                    pieces.keep(text);
                }
                let at = place.index(lines.len() + 1);
                match kind {
                    0 => lines.insert(at, line),
                    1 if at < lines.len() => drop(lines.remove(at)),
                    _ if at < lines.len() => lines[at] = line,
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn services_that_stand_are_the_same_ones() {
        let service = |name: u32, tasks: u32| {
            let tasks = (0..tasks).map(|task| {
                let name = format!("{name}.{task}");
                format!(
                    "[[service.task]]\nname = \"{name}\"\nnode = \"n1\"\naddresses = [\"10.0.{task}.1\"]\n"
                )
            });
            let tasks: String = tasks.collect();
            format!("[[service]]\nname = \"{name}\"\nports = [\"{}:80\"]\n{tasks}\n", 1000 + name)
        };
        let text = |tasks: [u32; 5]| {
            let services: String = (0..).zip(tasks).map(|(name, tasks)| service(name, tasks)).collect();
            format!("{}\n{services}", LINES[0])
        };
        let mut pieces = Pieces::default();
        let mut read = |text: String| {
            let state = pieces.read(&text).unwrap();
            let whole = parse::raw(&text).and_then(|raw| parse::cluster(&raw));
            assert_eq!(Some(&state), whole.ok().as_ref());
            pieces.keep(text);
            state
        };
        let mut before = read(text([2, 2, 2, 2, 2]));
        for (changed, tasks) in
            [(2, [2, 2, 3, 2, 2]), (0, [1, 2, 3, 2, 2]), (4, [1, 2, 3, 2, 5]), (3, [1, 2, 3, 0, 5])]
        {
            let now = read(text(tasks));
            for (index, (before, now)) in before.services.iter().zip(&now.services).enumerate() {
                assert_eq!(Arc::ptr_eq(before, now), index != changed, "service {index} of {tasks:?}");
            }
            before = now;
        }
    }
}
