//! The other nodes' datapaths: whether they are there, and how long a packet the next hops to them let pass.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    time::Instant,
};

use anyhow::{Context as _, Result};
use lb_common::{abi::Config, net::Be16, outcome::Outcome};

use super::{ANSWER, Controller};
use crate::{
    cluster::{ClusterState, Node},
    net::{Prober, Snapshot, Wanted},
    plan::{NextHops, Reach},
    tunnel_key::{Cookies, NodeKey},
};

impl Controller {
    /// The cookies between this node and each of the others. What is not known of a node's key is what was known before: it is
    /// cut off from the managers, or its agent is being replaced.
    pub(super) fn cookies(&mut self, cluster: &ClusterState, this: &str) -> BTreeMap<String, Cookies> {
        let others = cluster.nodes.iter().filter(|node| node.agent && node.name != this);
        let there: HashSet<&str> = cluster.nodes.iter().map(|node| node.name.as_str()).collect();
        self.keyring.retain(|name| there.contains(name));
        let before = self.datapath.tables().cookies();
        let cookies = others.filter_map(|node| {
            let cookies = match (cluster.shared_key, node.key) {
                (Some(key), _) => Some(key.cookies(this, &node.name)),
                (None, NodeKey::Public(key)) => self.keyring.cookies(this, &node.name, &key),
                (None, NodeKey::Unknown) => before.get(node.name.as_str()).copied(),
                (None, NodeKey::None) => None,
            };
            Some((node.name.clone(), cookies?))
        });
        cookies.collect()
    }

    /// Leaves of the next hops to a node those by the interface that leads to its first address: what was to stay in one network goes by no
    /// other while that is silent, or gone. An address of a family that this machine has not is nobody's choice. Several uplinks
    /// have their own next hops each.
    pub(super) fn keep_one_interface(
        &self,
        cluster: &ClusterState,
        snapshot: &Snapshot,
        next_hops: &mut NextHops,
    ) {
        if !self.other_uplinks(snapshot).is_empty() {
            return;
        }
        let has =
            |v4: bool| snapshot.addresses.iter().any(|(_, own)| own.is_ipv4() == v4 && !own.is_loopback());
        let mut kept = BTreeSet::<IpAddr>::new();
        for node in &cluster.nodes {
            let possible = || node.addresses.iter().filter(|address| has(address.is_ipv4()));
            let Some(first) = possible().next() else {
                continue;
            };
            match self.next_hops.leads_by(first) {
                Some(by) => kept.extend(
                    possible().filter(|address| self.next_hops.leads_by(address) == Some(by)).copied(),
                ),
                None => drop(kept.insert(*first)),
            }
        }
        next_hops.retain(|(address, reach), _| *reach != Reach::Peer || kept.contains(address));
    }

    /// Asks the datapaths of the other nodes whether they are there, and marks the next hops to those that are not.
    pub(super) async fn ask_peers(&mut self, next_hops: &mut NextHops, cookies: &BTreeMap<IpAddr, u64>) {
        let known: BTreeMap<IpAddr, u32> = self.datapath.tables().peer_mtus().collect();
        for (index, prober) in &self.probers {
            let peers = next_hops.iter().filter_map(|((address, reach), next_hop)| {
                let next_hop = next_hop
                    .as_ref()
                    .ok()
                    .filter(|next_hop| *reach == Reach::Peer && next_hop.ifindex == *index)?;
                let cookie = cookies.get(address).copied().unwrap_or_default();
                let known = known.get(address).copied();
                Some((*address, Wanted { mtu: next_hop.mtu, known, cookie }))
            });
            prober.follow(&peers.collect());
        }
        let deadline = Instant::now() + ANSWER;
        for prober in self.probers.values() {
            if self.served.is_none() {
                prober.settle(deadline).await;
            }
            for (address, reason) in prober.silent() {
                if let Some(Ok(next_hop)) = next_hops.get_mut(&(address, Reach::Peer)) {
                    next_hop.silent = Some(reason);
                }
            }
            for (address, mtu) in prober.mtus() {
                if let Some(Ok(next_hop)) = next_hops.get_mut(&(address, Reach::Peer)) {
                    next_hop.mtu = next_hop.mtu.min(mtu);
                }
            }
        }
    }

    /// Has the next hops to nodes looked at again when somebody says that a packet in the tunnel was too long.
    pub(super) fn look_at_tunnel_errors(&mut self) {
        let errors = self.datapath.outcome(Outcome::TunnelError).unwrap_or(self.tunnel_errors);
        if std::mem::replace(&mut self.tunnel_errors, errors) != errors {
            self.probers.values().for_each(Prober::doubt);
        }
    }

    /// Tells the programs which port the tunnel has, and asks other nodes by it through the uplink and through the interfaces beside
    /// it that lead to them.
    pub(super) fn open_tunnel(&mut self, port: u16, interfaces: &BTreeMap<u32, String>) -> Result<()> {
        self.probers.retain(|index, prober| interfaces.contains_key(index) && prober.asks(port));
        for (index, interface) in interfaces {
            if self.probers.contains_key(index) {
                continue;
            }
            let (timeout, changed) = (self.settings.peer_timeout, self.peers_changed.0.clone());
            let prober = Prober::start(interface, port, timeout, changed)
                .with_context(|| format!("open a socket for probes to other nodes on {interface}"))?;
            if !prober.has_port() {
                log::warn!(
                    "{interface}: another program has UDP port {port}, which is the tunnel's; of what comes to it only other \
                     nodes' tunnel packets are taken"
                );
            }
            self.probers.insert(*index, prober);
        }
        let config = self.datapath.config();
        if config.tunnel_port != Be16::new(port) {
            self.datapath.set_config(Config { tunnel_port: Be16::new(port), ..config })?;
        }
        Ok(())
    }
}

/// The cookies of packets to nodes, by their addresses. Of a node that has left and joined again its new one counts.
pub(super) fn outgoing(cluster: &ClusterState, cookies: &BTreeMap<String, Cookies>) -> BTreeMap<IpAddr, u64> {
    let (gone, there): (Vec<_>, Vec<_>) = cluster.nodes.iter().partition(|node| node.down);
    let of = |node: &Node| Some((node.addresses.clone(), cookies.get(&node.name)?.outgoing));
    let nodes = gone.into_iter().chain(there).filter_map(of);
    nodes
        .flat_map(|(addresses, cookie)| addresses.into_iter().map(move |address| (address, cookie)))
        .collect()
}
