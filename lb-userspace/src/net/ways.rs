//! Finding the way to each task: its host-side veth on this node, or the next hop to another.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use lb_common::backend::VIA_TC;

use super::{Link, Net, Route, Snapshot, netdev, newest};
use crate::plan::{Reach, Way};

/// What is remembered from one search to the next.
#[derive(Default)]
pub struct Ways {
    /// Ports behind which local tasks were seen: a bridge forgets a silent task after five minutes.
    ports: HashMap<IpAddr, (u32, [u8; 6])>,
    /// Neighbours that the kernel was asked to keep.
    managed: BTreeSet<(u32, IpAddr)>,
    /// Neighbours that the ways of the last search lead by.
    wanted: BTreeSet<(u32, IpAddr)>,
    /// What the last search has found.
    found: Found,
}

/// The way to each destination, or why there is none.
pub type Found = BTreeMap<(IpAddr, Reach), Result<Way, String>>;

impl Ways {
    /// The way to each destination, or why there is none. Neighbours that are not resolved yet are asked for;
    /// their answer is a change that calls for another search.
    pub async fn find(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        uplink: u32,
        destinations: &BTreeSet<(IpAddr, Reach)>,
    ) -> Found {
        let mut ways = BTreeMap::new();
        for (address, reach) in destinations {
            let way = match net.route(*address).await {
                Err(reason) => Err(reason),
                Ok(route) => match reach {
                    Reach::Local => self.local(net, snapshot, uplink, *address, &route).await,
                    Reach::Snat | Reach::Routed => self.remote(net, snapshot, uplink, *address, &route).await,
                    Reach::Peer => self.peer(net, snapshot, uplink, *address, &route).await,
                },
            };
            ways.insert((*address, *reach), way);
        }
        self.ports.retain(|address, _| destinations.contains(&(*address, Reach::Local)));
        self.release(net, false).await;
        self.found.clone_from(&ways);
        ways
    }

    /// What the last search has found, if it has found a way to all of these: what there was none to may have come up since,
    /// within a container's namespace without a word.
    pub fn found(&self, destinations: &BTreeSet<(IpAddr, Reach)>) -> Option<Found> {
        let found = |to: &(IpAddr, Reach)| Some((*to, Ok(self.found.get(to)?.clone().ok()?)));
        destinations.iter().map(found).collect()
    }

    async fn local(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        uplink: u32,
        address: IpAddr,
        route: &Route,
    ) -> Result<Way, String> {
        let device = link(snapshot, route.interface)?;
        if route.gateway.is_some() || device.index == uplink {
            return Err(format!(
                "it is said to run on this node, but the route to {address} leaves by {}",
                device.name
            ));
        }
        let leads_there = |port: &Link| port.index == device.index || port.master == Some(device.index);
        let inside = newest(&snapshot.containers, |container| {
            container.addresses.contains(&address)
                && snapshot.links.get(&container.port).is_some_and(leads_there)
        });
        let mac = match inside {
            Some(container) => Some(container.mac),
            None => self.neighbour(net, snapshot, device.index, address).await,
        };
        let port = match device.kind.as_str() {
            "veth" => device,
            "bridge" => match inside {
                Some(container) => link(snapshot, container.port)?,
                None => self.port(snapshot, device, address, mac).ok_or_else(|| {
                    format!("no port of bridge {} is known yet to lead to {address}", device.name)
                })?,
            },
            _ => {
                return Err(format!(
                    "{} leads to {address}, and is neither a veth nor a bridge",
                    device.name
                ));
            }
        };
        if port.kind != "veth" || !port.lower_elsewhere {
            return Err(format!(
                "port {} leads to {address}, and is no veth into another namespace",
                port.name
            ));
        }
        if !port.up {
            return Err(format!("{} is down", port.name));
        }
        if let Some(mac) = mac {
            self.ports.insert(address, (port.index, mac));
        }
        let mac = mac.unwrap_or_default();
        let source_mac = device.mac;
        let mtu = device.mtu;
        Ok(Way {
            ifindex: port.index,
            mac,
            source_mac,
            source: route.source,
            mtu,
            flags: VIA_TC,
            silent: None,
        })
    }

    /// The way to another node's agent. Its packets are answered to where they come from, so that only the uplink will
    /// do.
    async fn peer(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        uplink: u32,
        address: IpAddr,
        route: &Route,
    ) -> Result<Way, String> {
        if route.interface != uplink {
            let device = link(snapshot, route.interface)?;
            return Err(format!(
                "the route to {address} leaves by {}, not by the uplink; give the node an address that the uplink \
                 reaches, or attach to {} instead",
                device.name, device.name
            ));
        }
        self.remote(net, snapshot, uplink, address, route).await
    }

    /// The bridge's port behind which a task is, now or when it was last heard of.
    fn port<'a>(
        &self,
        snapshot: &'a Snapshot,
        bridge: &Link,
        address: IpAddr,
        mac: Option<[u8; 6]>,
    ) -> Option<&'a Link> {
        let mac = mac?;
        let learned = snapshot.ports.get(&(bridge.index, mac)).copied();
        let remembered =
            || self.ports.get(&address).filter(|(_, known)| *known == mac).map(|(port, _)| *port);
        let port = snapshot.links.get(&learned.or_else(remembered)?)?;
        (port.master == Some(bridge.index)).then_some(port)
    }

    async fn remote(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        uplink: u32,
        address: IpAddr,
        route: &Route,
    ) -> Result<Way, String> {
        let device = link(snapshot, route.interface)?;
        if !device.up {
            return Err(format!("{}, which leads to {address}, is down", device.name));
        }
        let hop = route.gateway.unwrap_or(address);
        let mac = self
            .neighbour(net, snapshot, device.index, hop)
            .await
            .ok_or_else(|| format!("the next hop {hop} on {} does not answer", device.name))?;
        let source =
            route.source.ok_or_else(|| format!("there is no own address to reach {address} from"))?;
        let by_tc = device.index != uplink && !netdev::transmits(device.index);
        let flags = if by_tc { VIA_TC } else { 0 };
        let mtu = route.mtu.map_or(device.mtu, |mtu| mtu.min(device.mtu));
        Ok(Way {
            ifindex: device.index,
            mac,
            source_mac: device.mac,
            source: Some(source),
            mtu,
            flags,
            silent: None,
        })
    }

    /// A neighbour's hardware address; the kernel is asked to resolve it and keep it.
    async fn neighbour(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        interface: u32,
        address: IpAddr,
    ) -> Option<[u8; 6]> {
        let known = snapshot.neighbours.get(&(interface, address));
        self.wanted.insert((interface, address));
        if known.is_some_and(|neighbour| neighbour.fixed) {
            return known.map(|neighbour| neighbour.mac);
        }
        if self.managed.insert((interface, address)) || known.is_none() {
            net.resolve(interface, address, known.map(|neighbour| neighbour.mac)).await;
        }
        known.map(|neighbour| neighbour.mac)
    }

    /// Lets go of every neighbour that is not wanted: `all` of them, or those no way leads by any more.
    pub async fn release(&mut self, net: &Net, all: bool) {
        let wanted = if all { BTreeSet::new() } else { std::mem::take(&mut self.wanted) };
        for (interface, address) in self.managed.difference(&wanted) {
            net.forget(*interface, *address).await;
        }
        self.managed.retain(|neighbour| wanted.contains(neighbour));
    }
}

fn link(snapshot: &Snapshot, index: u32) -> Result<&Link, String> {
    snapshot.links.get(&index).ok_or_else(|| format!("interface {index}, which leads there, is gone"))
}
