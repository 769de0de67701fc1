//! The other nodes' datapaths: whether they are there, and how long a packet the ways to them let pass.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use anyhow::{Context as _, Result};
use lb_common::{abi::Config, net::Be16, outcome::Outcome};

use super::{ANSWER, Controller};
use crate::{
    cluster::{ClusterState, Node},
    net::{Found, Prober, Wanted},
    plan::Reach,
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

    /// Asks the datapaths of the other nodes whether they are there, and marks the ways to those that are not.
    pub(super) async fn ask_peers(&mut self, ways: &mut Found, cookies: &BTreeMap<IpAddr, u64>) {
        let Some(prober) = &self.prober else {
            return;
        };
        let peers = ways.iter().filter(|((_, reach), way)| *reach == Reach::Peer && way.is_ok());
        let known: BTreeMap<IpAddr, u32> = self.datapath.tables().peer_mtus().collect();
        let peers = peers.filter_map(|((address, _), way)| {
            let cookie = cookies.get(address).copied().unwrap_or_default();
            let (mtu, known) = (way.as_ref().ok()?.mtu, known.get(address).copied());
            Some((*address, Wanted { mtu, known, cookie }))
        });
        prober.follow(&peers.collect());
        if self.served.is_none() {
            prober.settle(ANSWER).await;
        }
        for (address, reason) in prober.silent() {
            if let Some(Ok(way)) = ways.get_mut(&(address, Reach::Peer)) {
                way.silent = Some(reason);
            }
        }
        for (address, mtu) in prober.mtus() {
            if let Some(Ok(way)) = ways.get_mut(&(address, Reach::Peer)) {
                way.mtu = way.mtu.min(mtu);
            }
        }
    }

    /// Has the ways to nodes looked at again when somebody says that a packet in the tunnel was too long.
    pub(super) fn look_at_tunnel_errors(&mut self) {
        let errors = self.datapath.outcome(Outcome::TunnelError).unwrap_or(self.tunnel_errors);
        if std::mem::replace(&mut self.tunnel_errors, errors) != errors
            && let Some(prober) = &self.prober
        {
            prober.doubt();
        }
    }

    /// Tells the programs which port the tunnel has, and asks other nodes by it.
    pub(super) fn open_tunnel(&mut self, port: u16, uplink: u32) -> Result<()> {
        let interface = self.settings.interface.clone();
        if !self.prober.as_ref().is_some_and(|prober| prober.asks(port, uplink)) {
            self.prober = None;
            let prober = Prober::start((&interface, uplink), port, self.settings.peer_timeout);
            let prober = prober.context("open a socket for probes to other nodes")?;
            if !prober.has_port() {
                log::warn!(
                    "{interface}: another program has UDP port {port}, which is the tunnel's; of what comes to it only other \
                     nodes' tunnel packets are taken"
                );
            }
            self.prober = Some(prober);
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

/// Resolves when another node falls silent or is heard again.
pub(super) async fn silence(prober: Option<&mut Prober>) {
    match prober {
        Some(prober) => prober.changed().await,
        None => std::future::pending().await,
    }
}
