//! What a manager's agent holds of the other nodes' agents: who said what, who speaks from where, and for how long that stands.
//!
//! A node is its identifier, which its certificate says. What it says of itself takes nothing from another: an address is its
//! only if it was seen speaking from it, or if Swarm's managers see it there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    cluster::Node,
    source::{
        facts::{MOST_ADDRESSES, NodeFacts, NodeReport},
        peer::server::PeerEvent,
    },
    tunnel_key::NodeKey,
};

/// What an agent said stands for so long after its connection has ended: it may be replaced, and its datapath serves on.
const GRACE: Duration = Duration::from_secs(60);

/// One node's agent.
#[derive(Debug, Default)]
struct Agent {
    /// By which connection it speaks, if it does.
    connection: Option<u64>,
    /// Since when it does not.
    gone: Option<Instant>,
    /// What it said last, if it has said anything.
    facts: Option<Arc<NodeFacts>>,
    /// The addresses that it was seen to speak from.
    proofs: BTreeMap<IpAddr, Proof>,
}

/// That a node speaks from an address.
#[derive(Clone, Copy, Debug)]
struct Proof {
    since: Instant,
    /// Until when that stands without being seen again: the connection by which it was seen first has ended.
    until: Option<Instant>,
}

/// All nodes' agents but this one.
#[derive(Debug, Default)]
pub(super) struct Agents {
    by_node: BTreeMap<String, Agent>,
    /// Their keys as they told them last, for as long as they are of the swarm: a datapath uses its key after its agent has ended.
    keys: BTreeMap<String, NodeKey>,
}

impl Agents {
    /// Takes note of an event; whether a task came or went, of which the managers may know too.
    pub fn take(&mut self, event: PeerEvent, now: Instant) -> bool {
        match event {
            PeerEvent::Came(node, connection, address) => {
                let agent = self.by_node.entry(node).or_default();
                agent.doubt(now);
                (agent.connection, agent.gone) = (Some(connection), None);
                agent.proven(address, now);
            }
            PeerEvent::Proven(node, address) => {
                // Before its agent came it has nothing to prove.
                if let Some(agent) = self.by_node.get_mut(&node) {
                    agent.proven(address, now);
                }
            }
            PeerEvent::Facts(node, connection, facts) => return self.said(&node, connection, facts),
            PeerEvent::Gone(node, connection) => {
                let agent = self.by_node.get_mut(&node);
                // It may have come back by another one already.
                if let Some(agent) = agent.filter(|agent| agent.connection == Some(connection)) {
                    (agent.connection, agent.gone) = (None, Some(now));
                    agent.doubt(now);
                }
            }
        }
        false
    }

    fn said(&mut self, node: &str, connection: u64, facts: NodeFacts) -> bool {
        // One that was replaced may have said something yet.
        let agent = self.by_node.get_mut(node).filter(|agent| agent.connection == Some(connection));
        let Some(agent) = agent else {
            return false;
        };
        self.keys.insert(node.to_owned(), facts.key.map_or(NodeKey::None, NodeKey::Public));
        let before = agent.facts.replace(Arc::new(facts));
        let (Some(before), Some(after)) = (before, &agent.facts) else {
            return true;
        };
        // An address that it gives up has to be seen anew when it takes it again.
        agent
            .proofs
            .retain(|address, _| !before.addresses.contains(address) || after.addresses.contains(address));
        !before.tasks.keys().eq(after.tasks.keys())
    }

    /// All connections have ended.
    pub fn hang_up(&mut self, now: Instant) {
        for agent in self.by_node.values_mut().filter(|agent| agent.connection.is_some()) {
            (agent.connection, agent.gone) = (None, Some(now));
            agent.doubt(now);
        }
    }

    /// Forgets what nobody has said for too long, and who is not of the swarm.
    pub fn expire(&mut self, members: Option<&BTreeSet<String>>, now: Instant) {
        self.keys.retain(|node, _| members.is_none_or(|members| members.contains(node)));
        self.by_node.retain(|node, agent| {
            agent.proofs.retain(|_, proof| proof.until.is_none_or(|until| until > now));
            let member = members.is_none_or(|members| members.contains(node));
            member && agent.gone.is_none_or(|gone| now < gone + GRACE)
        });
    }

    /// Whether this node's agent was heard, and has proven all addresses that it claims.
    pub fn is_settled(&self, node: &str) -> bool {
        self.by_node.get(node).is_some_and(|agent| {
            let facts = agent.facts.as_ref();
            facts.is_some_and(|facts| {
                facts.addresses.iter().take(MOST_ADDRESSES).all(|address| agent.proofs.contains_key(address))
            })
        })
    }

    /// What agents said, by identifier of their nodes.
    pub fn facts(&self) -> BTreeMap<String, NodeReport> {
        let report = |(node, agent): (&String, &Agent)| {
            let facts = agent.facts.clone()?;
            Some((node.clone(), NodeReport { facts, now: agent.connection.is_some() }))
        };
        self.by_node.iter().filter_map(report).collect()
    }

    /// Gives each node its key and the addresses that are its, the best first; what two of them claim is said, and what one claims
    /// that it was not seen to have. `own` is this node with its addresses.
    pub fn place(&self, nodes: &mut [Node], own: (&str, &[IpAddr])) -> Vec<String> {
        let mut claims: BTreeMap<IpAddr, Vec<Claim>> = BTreeMap::new();
        for (index, node) in nodes.iter().enumerate() {
            for (address, by) in self.claims(node, own) {
                claims.entry(address).or_default().push(Claim { by, index });
            }
        }
        let mut owned: Vec<Vec<IpAddr>> = vec![Vec::new(); nodes.len()];
        let mut said = Vec::new();
        for (address, claims) in &mut claims {
            claims.sort();
            let [first, rest @ ..] = claims.as_slice() else {
                continue;
            };
            let real = first.by != By::Claim;
            if real {
                owned[first.index].push(*address);
            }
            // One that has left and joined again stands twice with one address, and nobody contradicts anybody.
            let is_down = |claim: &Claim| nodes[claim.index].down;
            let other = |claim: &&Claim| claim.index != first.index && !is_down(claim);
            said.extend(rest.iter().filter(other).map(|claim| {
                let (one, other) = (nodes[first.index].shown(), nodes[claim.index].shown());
                let stays =
                    if real { format!("it is taken for {one}'s") } else { "it is taken for nobody's".into() };
                format!("{address} is said to be an address of both {one} and {other}; {stays}")
            }));
        }
        for (node, owned) in nodes.iter_mut().zip(owned) {
            node.key = self.keys.get(&node.name).copied().unwrap_or_default();
            let order = self.order(node, own);
            node.addresses = order.into_iter().filter(|address| owned.contains(address)).collect();
        }
        said
    }

    /// What a node claims, and by what.
    fn claims(&self, node: &Node, (this, own): (&str, &[IpAddr])) -> Vec<(IpAddr, By)> {
        let agent = self.by_node.get(&node.name);
        let proof = |address: &IpAddr| agent.and_then(|agent| agent.proofs.get(address));
        let claim = |address: IpAddr| {
            let by = match proof(&address) {
                _ if this == node.name && own.contains(&address) => By::Here,
                proof if node.addresses.contains(&address) && !node.down => By::Managers(proof.is_none()),
                Some(proof) => By::Proof(proof.since),
                None if node.addresses.contains(&address) => By::Past,
                None => By::Claim,
            };
            (address, by)
        };
        self.order(node, (this, own)).into_iter().map(claim).collect()
    }

    /// All addresses that anybody says are a node's: first Swarm's, which is the way that its operator chose for what the nodes say
    /// to each other; then what itself says, the most usual first.
    fn order(&self, node: &Node, (this, own): (&str, &[IpAddr])) -> Vec<IpAddr> {
        let agent = self.by_node.get(&node.name);
        let told = agent.and_then(|agent| agent.facts.as_ref()).map_or(&[][..], |facts| &facts.addresses);
        let own = if this == node.name { own } else { &[] };
        let seen = agent.into_iter().flat_map(|agent| agent.proofs.keys());
        let mut order = Vec::new();
        for address in node.addresses.iter().chain(own).chain(told.iter().take(MOST_ADDRESSES)).chain(seen) {
            if !order.contains(address) {
                order.push(*address);
            }
        }
        order
    }
}

impl Agent {
    fn proven(&mut self, address: IpAddr, now: Instant) {
        if let Some(proof) = self.proofs.get_mut(&address) {
            proof.until = None;
        } else if self.proofs.len() < 2 * MOST_ADDRESSES {
            self.proofs.insert(address, Proof { since: now, until: None });
        }
    }

    /// What was seen by the connection that ended is to be seen anew.
    fn doubt(&mut self, now: Instant) {
        for proof in self.proofs.values_mut() {
            proof.until = proof.until.or(Some(now + GRACE));
        }
    }
}

/// By what an address is a node's, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum By {
    /// It is this machine's.
    Here,
    /// The swarm's managers see the node there; first those that have proven it besides.
    Managers(bool),
    /// It speaks from it; first who has done so for longest.
    Proof(Instant),
    /// The managers saw it there before it went down.
    Past,
    /// It says so, and nothing else does.
    Claim,
}

/// One node's claim to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    by: By,
    /// Of the node.
    index: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::facts::TaskFacts;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn nodes(addresses: &[(&str, &[&str])]) -> Vec<Node> {
        let node = |(name, addresses): &(&str, &[&str])| Node {
            name: (*name).into(),
            host: format!("host-{name}"),
            addresses: addresses.iter().map(|address| ip(address)).collect(),
            agent: true,
            down: false,
            key: NodeKey::Unknown,
            ..Node::default()
        };
        addresses.iter().map(node).collect()
    }

    fn facts(addresses: &[&str], tasks: &[&str]) -> NodeFacts {
        NodeFacts {
            addresses: addresses.iter().map(|address| ip(address)).collect(),
            tasks: tasks.iter().map(|task| ((*task).to_owned(), TaskFacts::default())).collect(),
            complete: true,
            ..NodeFacts::default()
        }
    }

    /// The agents, and this manager, which is node `m` at 192.0.2.1.
    #[derive(Default)]
    struct Bench {
        agents: Agents,
        down: BTreeSet<String>,
    }

    impl Bench {
        fn comes(&mut self, node: &str, connection: u64, addresses: &[&str], now: Instant) {
            let from = if node == "a" { "192.0.2.2" } else { "192.0.2.3" };
            self.agents.take(PeerEvent::Came(node.into(), connection, ip(from)), now);
            self.says(node, connection, addresses, now);
        }

        fn says(&mut self, node: &str, connection: u64, addresses: &[&str], now: Instant) {
            self.agents.take(PeerEvent::Facts(node.into(), connection, facts(addresses, &[])), now);
        }

        fn proves(&mut self, node: &str, address: &str, now: Instant) {
            self.agents.take(PeerEvent::Proven(node.into(), ip(address)), now);
        }

        /// The addresses of two nodes that the managers see at 192.0.2.2 and .3, and what is said.
        fn placed(&self) -> ([Vec<String>; 2], Vec<String>) {
            let mut nodes = nodes(&[("a", &["192.0.2.2"]), ("b", &["192.0.2.3"]), ("m", &[])]);
            nodes.iter_mut().for_each(|node| node.down = self.down.contains(&node.name));
            let said = self.agents.place(&mut nodes, ("m", &[ip("192.0.2.1")]));
            assert_eq!(nodes[2].addresses, [ip("192.0.2.1")]);
            let shown = |node: &Node| node.addresses.iter().map(ToString::to_string).collect();
            ([shown(&nodes[0]), shown(&nodes[1])], said)
        }
    }

    const A: &str = "198.51.100.2";
    const B: &str = "198.51.100.3";

    #[test]
    fn an_address_is_a_node_s_when_it_speaks_from_it() {
        let (mut bench, now) = (Bench::default(), Instant::now());
        bench.comes("a", 1, &[A, "2001:db8::2"], now);
        assert_eq!(bench.placed().0, [vec!["192.0.2.2"], vec!["192.0.2.3"]]);
        assert!(!bench.agents.is_settled("a"));
        bench.proves("a", A, now);
        bench.proves("a", "2001:db8::2", now);
        assert!(bench.agents.is_settled("a"));
        // Swarm's first, then its own order.
        assert_eq!(bench.placed().0[0], ["192.0.2.2", A, "2001:db8::2"]);
        assert!(bench.placed().1.is_empty());
        // Given up and taken again, it has to be seen anew.
        bench.says("a", 1, &["2001:db8::2"], now);
        bench.says("a", 1, &[A, "2001:db8::2"], now);
        assert_eq!(bench.placed().0[0], ["192.0.2.2", "2001:db8::2"]);
    }

    /// What is known of a key stands while its node is of the swarm, and an agent that tells none has none.
    #[test]
    fn a_node_s_key_is_what_its_agent_says() {
        let (mut bench, now) = (Bench::default(), Instant::now());
        let key = crate::tunnel_key::Secret::generate().unwrap().public();
        let keys = |bench: &Bench| {
            let mut nodes = nodes(&[("a", &["192.0.2.2"]), ("b", &["192.0.2.3"])]);
            bench.agents.place(&mut nodes, ("m", &[]));
            [nodes[0].key, nodes[1].key]
        };
        bench.comes("a", 1, &[], now);
        assert_eq!(keys(&bench), [NodeKey::None, NodeKey::Unknown]);
        let told = NodeFacts { key: Some(key), ..NodeFacts::default() };
        bench.agents.take(PeerEvent::Facts("a".into(), 1, told), now);
        bench.agents.take(PeerEvent::Gone("a".into(), 1), now);
        assert_eq!(keys(&bench), [NodeKey::Public(key), NodeKey::Unknown]);
        // Its datapath goes on with it.
        bench.agents.expire(None, now + GRACE);
        assert_eq!(keys(&bench), [NodeKey::Public(key), NodeKey::Unknown]);
        bench.agents.expire(Some(&BTreeSet::from(["b".to_owned()])), now + GRACE);
        assert_eq!(keys(&bench), [NodeKey::Unknown; 2]);
    }

    #[test]
    fn a_claim_takes_nothing_and_both_are_said() {
        let (mut bench, now) = (Bench::default(), Instant::now());
        bench.comes("b", 1, &[B], now);
        bench.proves("b", B, now);
        // Every address that another has, and one that nobody has.
        bench.comes("a", 2, &[B, "192.0.2.1", "192.0.2.3", "8.8.8.8"], now);
        let (addresses, said) = bench.placed();
        assert_eq!(addresses, [vec!["192.0.2.2"], vec!["192.0.2.3", B]]);
        let of = |address: &str, owner: &str| {
            format!(
                "{address} is said to be an address of both {owner} and host-a; it is taken for {owner}'s"
            )
        };
        assert_eq!(said, [of("192.0.2.1", "host-m"), of("192.0.2.3", "host-b"), of(B, "host-b")]);
        // Nor if it manages to speak from it later, as one on the link can.
        bench.proves("a", B, now + Duration::from_secs(1));
        bench.proves("a", "192.0.2.3", now);
        bench.proves("a", "192.0.2.1", now);
        let (addresses, said) = bench.placed();
        assert_eq!(addresses, [vec!["192.0.2.2"], vec!["192.0.2.3", B]]);
        assert_eq!(said.len(), 3);
    }

    #[test]
    fn an_address_moves_when_its_owner_gives_it_up_or_is_gone() {
        let (mut bench, now) = (Bench::default(), Instant::now());
        bench.comes("a", 1, &[A], now);
        bench.proves("a", A, now);
        bench.comes("b", 2, &[A], now);
        bench.proves("b", A, now);
        assert_eq!(bench.placed().0[0], ["192.0.2.2", A]);
        bench.says("a", 1, &[], now);
        assert_eq!(bench.placed().0[1], ["192.0.2.3", A]);
        // The managers no longer hear `b`, and what they saw of it before another has now.
        bench.down.insert("b".into());
        bench.says("a", 1, &["192.0.2.3"], now);
        bench.proves("a", "192.0.2.3", now);
        // Who is down contradicts nobody: it may be the same machine, which left and joined again.
        let (addresses, said) = bench.placed();
        assert_eq!(
            (&addresses[0][..], said),
            (&["192.0.2.2".to_owned(), "192.0.2.3".to_owned()][..], vec![])
        );
    }

    #[test]
    fn what_was_said_ends_with_the_connection_and_a_grace() {
        let (mut bench, start) = (Bench::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        bench.comes("a", 1, &[A], start);
        bench.proves("a", A, start);
        // The agent is replaced, and its former connection ends late.
        bench.comes("a", 2, &[A], at(10));
        bench.agents.take(PeerEvent::Gone("a".into(), 1), at(11));
        bench.says("a", 1, &[], at(11));
        bench.agents.expire(None, at(30));
        assert_eq!(bench.placed().0[0], ["192.0.2.2", A]);
        assert!(bench.agents.facts()["a"].now);
        // The new one does not speak from there.
        bench.agents.expire(None, at(71));
        assert_eq!(bench.placed().0[0], ["192.0.2.2"]);
        bench.proves("a", A, at(72));
        bench.agents.take(PeerEvent::Gone("a".into(), 2), at(80));
        bench.agents.expire(None, at(139));
        assert!(!bench.agents.facts()["a"].now);
        assert_eq!(bench.placed().0[0], ["192.0.2.2", A]);
        bench.agents.expire(None, at(140));
        assert!(bench.agents.facts().is_empty());
        assert_eq!(bench.placed().0[0], ["192.0.2.2"]);
    }

    #[test]
    fn who_is_not_of_the_swarm_is_forgotten() {
        let (mut bench, now) = (Bench::default(), Instant::now());
        for node in ["a", "x"] {
            bench.comes(node, 1, &[], now);
        }
        // What it says before it has come is nobody's.
        bench.says("b", 2, &[], now);
        bench.proves("b", B, now);
        bench.agents.expire(Some(&BTreeSet::from(["a".to_owned(), "b".to_owned()])), now);
        assert_eq!(bench.agents.facts().into_keys().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn only_tasks_that_come_or_go_are_news_to_the_managers() {
        let (mut agents, now) = (Agents::default(), Instant::now());
        agents.take(PeerEvent::Came("a".into(), 1, ip(A)), now);
        let mut says = |unhealthy: bool, tasks: &[&str]| {
            let mut facts = facts(&[], tasks);
            facts.tasks.values_mut().for_each(|task| task.unhealthy = unhealthy);
            agents.take(PeerEvent::Facts("a".into(), 1, facts), now)
        };
        assert!(says(false, &["web.1"]));
        assert!((0..100).all(|flip| !says(flip % 2 == 0, &["web.1"])));
        assert!(says(false, &["web.1", "web.2"]) && says(false, &[]));
    }
}
