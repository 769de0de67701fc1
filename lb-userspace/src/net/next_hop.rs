//! Finding the next hop to each task: its host-side veth on this node, or the next hop to another.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use lb_common::{
    backend::{TRANSLATED, VIA_TC},
    tunnel::overhead,
};

use super::{Link, Net, Route, Snapshot, newest};
use crate::plan::{NextHop, NextHops, Reach};

/// What is remembered from one search to the next.
#[derive(Default)]
pub struct NextHopResolver {
    /// Ports behind which local tasks were seen: a bridge forgets a silent task after five minutes.
    ports: HashMap<IpAddr, (u32, [u8; 6])>,
    /// Neighbours that the kernel was asked to keep.
    managed: BTreeSet<(u32, IpAddr)>,
    /// Neighbours that the next hops of the last search lead by.
    wanted: BTreeSet<(u32, IpAddr)>,
    /// Whether IPv6 clients of tasks that have IPv4 alone are translated here.
    translates: bool,
    /// What the last search has found.
    found: NextHops,
    /// The interfaces by which the routes to nodes lead, whether there is a next hop or not.
    by: BTreeMap<IpAddr, u32>,
}

impl NextHopResolver {
    /// Of a node that translates IPv6 clients of tasks that have IPv4 alone, or does not.
    pub fn new(translates: bool) -> Self {
        Self { translates, ..Self::default() }
    }

    /// The next hop to each destination, or why there is none. Neighbours that are not resolved yet are asked for;
    /// their answer is a change that calls for another search. `others` are the uplinks of this machine's other datapaths.
    pub async fn find(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        (uplink, others): (u32, &BTreeSet<String>),
        destinations: &BTreeSet<(IpAddr, Reach)>,
    ) -> NextHops {
        let mut next_hops = BTreeMap::new();
        self.by.clear();
        for (address, reach) in destinations {
            let route = net.route(*address).await;
            if let (Ok(route), Reach::Peer) = (&route, reach) {
                self.by.insert(*address, route.interface);
            }
            let next_hop = match route {
                Err(reason) => Err(reason),
                Ok(route) => match reach {
                    Reach::Local => self.local(net, snapshot, uplink, *address, &route).await,
                    Reach::Translated => self.translated(net, snapshot, uplink, *address, &route).await,
                    Reach::Snat | Reach::Routed => self.remote(net, snapshot, uplink, *address, &route).await,
                    Reach::Peer => self.peer(net, snapshot, (uplink, others), *address, &route).await,
                },
            };
            next_hops.insert((*address, *reach), next_hop);
        }
        let is_here = |address: &IpAddr| [Reach::Local, Reach::Translated].map(|reach| (*address, reach));
        self.ports.retain(|address, _| is_here(address).iter().any(|to| destinations.contains(to)));
        self.release(net, false).await;
        self.found.clone_from(&next_hops);
        next_hops
    }

    /// What the last search has found, if it has found a next hop to all of these: what there was none to may have come up since,
    /// within a container's namespace without a word.
    pub fn found(&self, destinations: &BTreeSet<(IpAddr, Reach)>) -> Option<NextHops> {
        let found = |to: &(IpAddr, Reach)| Some((*to, Ok(self.found.get(to)?.clone().ok()?)));
        destinations.iter().map(found).collect()
    }

    /// The interface by which the route to a node's address led at the last search, whether there is a next hop or not.
    pub fn leads_by(&self, address: &IpAddr) -> Option<u32> {
        self.by.get(address).copied()
    }

    async fn local(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        uplink: u32,
        address: IpAddr,
        route: &Route,
    ) -> Result<NextHop, String> {
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
        Ok(NextHop {
            ifindex: port.index,
            mac,
            source_mac,
            source: route.source,
            mtu,
            flags: VIA_TC,
            silent: None,
        })
    }

    /// The next hop to a task of this node for what is translated there: by its veth's own queue, so that it must be known whom the frame
    /// is for.
    async fn translated(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        uplink: u32,
        task: IpAddr,
        route: &Route,
    ) -> Result<NextHop, String> {
        if task.is_ipv4() && !self.translates {
            return Err("IPv6 clients are not translated here: --v6-pool is off".to_owned());
        }
        let next_hop = self.local(net, snapshot, uplink, task, route).await?;
        if next_hop.mac == [0; 6] {
            return Err(format!("the hardware address of {task} is not known yet"));
        }
        // Its own address on the task's network is one of the other family.
        Ok(NextHop { flags: next_hop.flags | TRANSLATED, source: None, ..next_hop })
    }

    /// The next hop to another node's agent: by whatever interface leads there, but one that leads to containers alone. Of several
    /// datapaths on this machine one would take the answers to another, so that each has its own uplink's.
    async fn peer(
        &mut self,
        net: &Net,
        snapshot: &Snapshot,
        (uplink, others): (u32, &BTreeSet<String>),
        address: IpAddr,
        route: &Route,
    ) -> Result<NextHop, String> {
        let (device, uplink) = (link(snapshot, route.interface)?, link(snapshot, uplink)?);
        if device.index == uplink.index {
            return self.remote(net, snapshot, uplink.index, address, route).await;
        }
        if !others.is_empty() {
            let others = Vec::from_iter(others.iter().map(String::as_str)).join(", ");
            return Err(format!(
                "the route to {address} leaves by {0}, and not by {1}; {others} has a datapath of its own: attach to {1} \
                 alone, and {0} serves as the way between the nodes",
                device.name, uplink.name
            ));
        }
        if snapshot.leads_to_containers(device.index) {
            return Err(format!(
                "the route to {address} leaves by {}, which leads to containers of this node: its range overlaps with \
                 that of the nodes",
                device.name
            ));
        }
        let next_hop = if device.ethernet {
            self.remote(net, snapshot, uplink.index, address, route).await?
        } else {
            pointed(device, address, route)?
        };
        // What comes out of the tunnel leaves by the uplink, or came by it.
        let mtu = next_hop.mtu.min(uplink.mtu + overhead(address.is_ipv4()) as u32);
        Ok(NextHop { mtu, ..next_hop })
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
    ) -> Result<NextHop, String> {
        let device = link(snapshot, route.interface)?;
        if !device.up {
            return Err(format!("{}, which leads to {address}, is down", device.name));
        }
        let hop = route.gateway.unwrap_or(address);
        if !device.ethernet {
            return Err(format!(
                "{} leads to {address}, and has no Ethernet header (WireGuard, tun, PPP, GRE): tasks behind it are reached \
                 by an agent on their node alone",
                device.name
            ));
        }
        let mac = self
            .neighbour(net, snapshot, device.index, hop)
            .await
            .ok_or_else(|| format!("the next hop {hop} on {} does not answer", device.name))?;
        let source =
            route.source.ok_or_else(|| format!("there is no own address to reach {address} from"))?;
        // Drivers send what XDP redirects to them only while they have XDP themselves, and drop it in silence else.
        let flags = if device.index == uplink { 0 } else { VIA_TC };
        let mtu = route.mtu.map_or(device.mtu, |mtu| mtu.min(device.mtu));
        Ok(NextHop {
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

    /// Lets go of every neighbour that is not wanted: `all` of them, or those no next hop leads by any more.
    pub async fn release(&mut self, net: &Net, all: bool) {
        let wanted = if all { BTreeSet::new() } else { std::mem::take(&mut self.wanted) };
        for (interface, address) in self.managed.difference(&wanted) {
            net.forget(*interface, *address).await;
        }
        self.managed.retain(|neighbour| wanted.contains(neighbour));
    }
}

/// The next hop by an interface without link headers: there is no neighbour to ask for.
fn pointed(device: &Link, address: IpAddr, route: &Route) -> Result<NextHop, String> {
    if !device.up {
        return Err(format!("{}, which leads to {address}, is down", device.name));
    }
    let source = route.source.ok_or_else(|| format!("there is no own address to reach {address} from"))?;
    Ok(NextHop {
        ifindex: device.index,
        mac: [0; 6],
        source_mac: [0; 6],
        source: Some(source),
        mtu: route.mtu.map_or(device.mtu, |mtu| mtu.min(device.mtu)),
        flags: VIA_TC,
        silent: None,
    })
}

fn link(snapshot: &Snapshot, index: u32) -> Result<&Link, String> {
    snapshot.links.get(&index).ok_or_else(|| format!("interface {index}, which leads there, is gone"))
}
