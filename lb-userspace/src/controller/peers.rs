//! The other nodes' datapaths: whether they are there, and how long a packet the ways to them let pass.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use lb_common::{abi::Config, net::Be16, outcome::Outcome};

use super::{ANSWER, Controller};
use crate::{
    net::{Found, Prober},
    plan::Reach,
};

impl Controller {
    /// Asks the datapaths of the other nodes whether they are there, and marks the ways to those that are not.
    pub(super) async fn ask_peers(&mut self, ways: &mut Found) {
        let Some(prober) = &self.prober else {
            return;
        };
        let peers = ways.iter().filter(|((_, reach), way)| *reach == Reach::Peer && way.is_ok());
        let known: BTreeMap<IpAddr, u32> = self.datapath.tables().peer_mtus().collect();
        let peers = peers.filter_map(|((address, _), way)| {
            Some((*address, (way.as_ref().ok()?.mtu, known.get(address).copied())))
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

/// Resolves when another node falls silent or is heard again.
pub(super) async fn silence(prober: Option<&mut Prober>) {
    match prober {
        Some(prober) => prober.changed().await,
        None => std::future::pending().await,
    }
}
