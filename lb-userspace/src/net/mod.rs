//! What the kernel knows of the network around this node: links, addresses, neighbours, routes.
//!
//! It reads by netlink and, where a neighbour is not resolved, asks the kernel to resolve it and keep it so. It
//! knows nothing of services; the next hops it finds are what the planner turns into backends.

mod container_netns;
mod device;
mod netdev;
mod next_hop;
mod path_mtu;
mod probe;
mod reset;
pub mod sockets;
mod uplink;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use container_netns::ContainerNetnsCache;
pub use container_netns::{ContainerNetns, newest};
pub use device::{Device, device};
use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::{IpNet, Ipv4Net};
use lb_common::abi::inner;
pub use netdev::xdp_features;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{
        InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
    },
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
        NeighbourState,
    },
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHopFlags,
        RouteType,
    },
};
pub use next_hop::NextHopResolver;
pub use probe::{Asked, Prober, Wanted, ask_once};
pub use reset::{Reset, Resetter, Sent};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, sys::AsyncSocket as _};
use tokio::sync::mpsc;
pub use uplink::{Choice, DefaultRoute, choose};

/// Why the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No netlink socket.
    #[error("open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// A request failed.
    #[error("ask the kernel for {what}: {source}")]
    Request {
        /// What was asked for.
        what: &'static str,
        /// The kernel's words.
        source: Box<rtnetlink::Error>,
    },
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Hardware address; zero where there is none.
    pub mac: [u8; 6],
    /// Administratively up, and the lower layer too.
    pub up: bool,
    /// `veth`, `bridge`, `vlan`, …; empty for a plain device.
    pub kind: String,
    /// Whether its frames have an Ethernet header.
    pub ethernet: bool,
    /// The id of the VLAN that it is.
    pub vlan: Option<u16>,
    /// The bridge or bond it is a port of.
    pub master: Option<u32>,
    /// The interface it sits on, or a veth's peer.
    pub lower: Option<u32>,
    /// Whether the peer or lower interface is in another network namespace.
    pub lower_elsewhere: bool,
    /// The kernel's number for that namespace, as seen from this one.
    pub namespace: Option<i32>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// The kernel's number for the XDP program that is attached to it.
    pub xdp: Option<u32>,
}

/// What the kernel said at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses by interface, in the kernel's order; link-local ones are left out.
    pub addresses: Vec<(u32, IpAddr)>,
    /// The ranges that lie behind interfaces by their addresses' prefixes, and each one's first address; link-local ones are left
    /// out.
    pub ranges: Vec<Range>,
    /// Resolved neighbours, by interface and address.
    pub neighbours: HashMap<(u32, IpAddr), Neighbour>,
    /// Ports of bridges behind which hardware addresses were seen, by bridge and address.
    pub ports: HashMap<(u32, [u8; 6]), u32>,
    /// What lies behind the veths of containers.
    pub containers: Vec<ContainerNetns>,
}

impl Snapshot {
    /// The interface of a name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// Why nobody would be served on an interface, and what to do, if so it is.
    pub fn unfit(&self, link: &Link) -> Option<String> {
        let name = &link.name;
        let master = link.master.and_then(|index| self.links.get(&index));
        if !link.ethernet {
            return Some(format!(
                "{name} has no Ethernet header (WireGuard, tun, PPP, GRE), and packets without one are not read: take the \
                 interface by which clients and other nodes come"
            ));
        }
        // What a port of these takes in is its master's.
        let master = master.filter(|master| ["bridge", "bond", "team"].contains(&master.kind.as_str()))?;
        Some(format!(
            "{name} is a port of the {0} {1}, which has the addresses: take --iface {1}",
            master.kind, master.name
        ))
    }

    /// Whether an interface is a bridge of containers: it is up, and has veths alone as its ports. Behind others are machines, or
    /// the network itself.
    pub fn leads_to_containers(&self, index: u32) -> bool {
        let mut ports = self.links.values().filter(|link| link.master == Some(index)).peekable();
        self.links.get(&index).is_some_and(|link| link.kind == "bridge" && link.up)
            && ports.peek().is_some()
            && ports.all(|port| port.kind == "veth")
    }

    /// The interface of this node that has addresses of a range, or lies in it, and which.
    pub fn owner_of(&self, range: &IpNet) -> Option<(&str, IpNet)> {
        let own = self.addresses.iter().map(|(index, own)| (*index, IpNet::from(*own)));
        let behind = self.ranges.iter();
        let behind = behind.filter_map(|its| Some((its.interface, IpNet::new(its.first, its.prefix).ok()?)));
        let mut theirs = behind.chain(own).filter(|(_, its)| its.contains(range) || range.contains(its));
        // Who has all addresses behind him has none in particular.
        let (index, its) = theirs.find(|(_, its)| its.prefix_len() > 0)?;
        Some((self.links.get(&index).map_or("an interface", |link| &link.name), its))
    }

    /// An address of a range that a container has, and the host's side of its veth.
    pub fn container_in(&self, range: &IpNet) -> Option<(&str, IpAddr)> {
        self.containers.iter().find_map(|container| {
            let mut all = container.addresses.iter().chain(&container.others);
            let its = all.find(|address| range.contains(*address))?;
            Some((self.links.get(&container.port).map_or("a veth", |link| &link.name), *its))
        })
    }

    /// What the ranges behind this node's interfaces are to it, by their first address and prefix; as the kernel routes, the
    /// narrowest one counts.
    pub fn inner_ranges(&self) -> BTreeMap<(IpAddr, u8), u32> {
        let mut ranges = BTreeMap::new();
        for range in &self.ranges {
            let what = if self.leads_to_containers(range.interface) { inner::BRIDGE } else { inner::OUTSIDE };
            // Where two interfaces have one range, its clients may be behind either.
            let known: &mut u32 = ranges.entry((range.first, range.prefix)).or_insert(what);
            *known = (*known).min(what);
        }
        let own =
            self.addresses.iter().map(|(_, own)| ((*own, if own.is_ipv4() { 32 } else { 128 }), inner::OWN));
        ranges.extend(own);
        ranges
    }

    /// The VLANs on an interface, or on the bond or bridge that it is a port of, that this machine has itself.
    pub fn vlans_on(&self, index: u32) -> impl Iterator<Item = &Link> {
        let master = self.links.get(&index).and_then(|link| link.master);
        let here = move |link: &&Link| {
            !link.lower_elsewhere && link.lower.is_some_and(|lower| lower == index || Some(lower) == master)
        };
        self.links.values().filter(|link| link.kind == "vlan").filter(here)
    }

    /// The addresses of an interface.
    pub fn addresses_of(&self, index: u32) -> Vec<IpAddr> {
        self.addresses.iter().filter(|(owner, _)| *owner == index).map(|(_, address)| *address).collect()
    }
}

/// A range of addresses that an interface leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Index of the interface.
    pub interface: u32,
    /// Its first address.
    pub first: IpAddr,
    /// Length of its prefix in bits.
    pub prefix: u8,
}

/// A resolved neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Hardware address.
    pub mac: [u8; 6],
    /// Somebody set it by hand, or the link needs no resolution: it is not ours to touch.
    pub fixed: bool,
}

/// The next hop to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Interface it is reached by.
    pub interface: u32,
    /// The router, if it is not on the link.
    pub gateway: Option<IpAddr>,
    /// Own address that the kernel would use.
    pub source: Option<IpAddr>,
    /// Largest packet in bytes, where the route says so.
    pub mtu: Option<u32>,
}

/// A connection to the kernel.
#[derive(Clone)]
pub struct Net {
    handle: Handle,
    /// A socket of its own for questions about other namespaces: those are heard only with strict checking.
    strict: Handle,
    containers: ContainerNetnsCache,
}

/// Something changed that next hops may depend on.
pub type Changes = mpsc::Receiver<()>;

/// A burst of netlink events is one change.
const SETTLE: Duration = Duration::from_millis(20);

impl Net {
    /// Connects, and listens for changes.
    ///
    /// # Errors
    /// No netlink socket is to be had.
    pub fn connect() -> Result<(Self, Changes), NetError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&groups)?;
        tokio::spawn(connection);
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let (mut connection, strict, _) = rtnetlink::new_connection()?;
        connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true)?;
        tokio::spawn(connection);
        let (changed, changes) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some((message, _)) = messages.next().await {
                if !matters(&message.payload) {
                    continue;
                }
                tokio::time::sleep(SETTLE).await;
                while messages.try_recv().is_ok() {}
                if changed.send(()).await.is_err() {
                    return;
                }
            }
        });
        Ok((Self { handle, strict, containers: ContainerNetnsCache::default() }, changes))
    }

    /// Everything there is now.
    ///
    /// # Errors
    /// The kernel refuses a request.
    pub async fn snapshot(&self) -> Result<Snapshot, NetError> {
        let failed = |what| move |source| NetError::Request { what, source: Box::new(source) };
        let mut snapshot = self.links_and_addresses().await?;
        let neighbours: Vec<NeighbourMessage> =
            self.handle.neighbours().get().execute().try_collect().await.map_err(failed("neighbours"))?;
        snapshot.neighbours = neighbours.iter().filter_map(neighbour).collect();
        let mut request = self.handle.neighbours().get();
        request.message_mut().header.family = AddressFamily::Bridge;
        let ports: Vec<NeighbourMessage> =
            request.execute().try_collect().await.map_err(failed("forwarding tables of bridges"))?;
        snapshot.ports = ports.iter().filter_map(bridge_port).collect();
        snapshot.containers = self.containers.behind(&self.strict, &snapshot.links).await;
        Ok(snapshot)
    }

    /// The same without neighbours, bridges' ports and containers.
    ///
    /// # Errors
    /// The kernel refuses a request.
    pub async fn links_and_addresses(&self) -> Result<Snapshot, NetError> {
        let failed = |what| move |source| NetError::Request { what, source: Box::new(source) };
        let mut snapshot = Snapshot::default();
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(failed("links"))?;
        for link in links.iter().map(link) {
            snapshot.links.insert(link.index, link);
        }
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.map_err(failed("addresses"))?;
        snapshot.addresses = addresses.iter().filter_map(address).collect();
        snapshot.ranges = addresses.iter().filter_map(range).collect();
        Ok(snapshot)
    }

    /// The route to an address, or why there is none.
    pub async fn route(&self, to: IpAddr) -> Result<Route, String> {
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to, if to.is_ipv4() { 32 } else { 128 })
            .map_err(|error| error.to_string())?
            .build();
        let mut answers = self.handle.route().get(message).execute();
        let route = match answers.try_next().await {
            Ok(Some(route)) => route,
            Ok(None) => return Err(format!("there is no route to {to}")),
            Err(error) => return Err(format!("there is no route to {to}: {error}")),
        };
        if route.header.kind != RouteType::Unicast {
            return Err(format!("the route to {to} is of kind {:?}", route.header.kind).to_lowercase());
        }
        let mut found = Route { interface: 0, gateway: None, source: None, mtu: None };
        let mut is_hearsay = false;
        for attribute in route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => found.interface = index,
                RouteAttribute::Gateway(address) => found.gateway = ip(&address),
                RouteAttribute::PrefSource(address) => found.source = ip(&address),
                RouteAttribute::Metrics(metrics) => {
                    found.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                // What will be forgotten a router has said, or somebody who says to be one (RFC 5927).
                RouteAttribute::CacheInfo(info) => is_hearsay = info.expires != 0,
                _ => {}
            }
        }
        if is_hearsay {
            found.mtu = None;
        }
        Ok(found)
    }

    /// The default routes of the main table, which are what the kernel takes unless a rule says otherwise.
    ///
    /// # Errors
    /// The kernel refuses the request.
    pub async fn default_routes(&self) -> Result<Vec<DefaultRoute>, NetError> {
        let failed = |source| NetError::Request { what: "routes", source: Box::new(source) };
        let mut found = Vec::new();
        let every =
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
        for message in every {
            let routes: Vec<RouteMessage> =
                self.handle.route().get(message).execute().try_collect().await.map_err(failed)?;
            found.extend(routes.iter().flat_map(default_routes));
        }
        Ok(found)
    }

    /// Where a route leads that is for some of a range, or for all of it and more, but for default ones; of any table.
    ///
    /// # Errors
    /// The kernel refuses the request.
    pub async fn route_into(&self, range: &Ipv4Net) -> Result<Option<Ipv4Net>, NetError> {
        let failed = |source| NetError::Request { what: "routes", source: Box::new(source) };
        let mut routes = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(route) = routes.try_next().await.map_err(failed)? {
            let to = destination(&route).filter(|to| to.contains(range) || range.contains(to));
            if to.is_some() {
                return Ok(to);
            }
        }
        Ok(None)
    }

    /// Has the kernel resolve a neighbour, and keep it resolved where it can (`NTF_EXT_MANAGED`, Linux 5.16;
    /// before that it is resolved once). XDP's traffic alone would let the entry go stale.
    ///
    /// What is known already is passed along, so that it stays known meanwhile.
    pub async fn resolve(&self, interface: u32, address: IpAddr, known: Option<[u8; 6]>) {
        let request = self.handle.neighbours().add(interface, address).replace();
        let mut request = match known {
            None => request.state(NeighbourState::None).flags(NeighbourFlags::Use),
            Some(mac) => {
                request.state(NeighbourState::Stale).link_layer_address(&mac).flags(NeighbourFlags::Use)
            }
        };
        request.message_mut().attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        if let Err(error) = request.execute().await {
            log::debug!("ask the kernel to resolve {address}: {error}");
        }
    }
}

impl Net {
    /// Lets go of a neighbour that [`Self::resolve`] had the kernel keep.
    pub async fn forget(&self, interface: u32, address: IpAddr) {
        let mut message = NeighbourMessage::default();
        message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.ifindex = interface;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        }));
        // Gone with its interface is as good.
        let _ = self.handle.neighbours().del(message).execute().await;
    }

    /// Removes the clsact qdisc of an interface if it holds no filter any more.
    pub async fn drop_empty_clsact(&self, interface: u32) {
        const CLSACT: u32 = 0xffff_fff1;
        let handle = self.handle.clone();
        for ingress in [true, false] {
            let mut filters = handle.traffic_filter(interface as i32);
            let request = if ingress { filters.get().ingress() } else { filters.get().egress() };
            let found: Vec<_> = request.execute().try_collect().await.unwrap_or_default();
            if !found.is_empty() {
                return;
            }
        }
        let mut request = handle.qdisc().del(interface as i32);
        request.message_mut().header.parent = CLSACT.into();
        // No qdisc is as good.
        let _ = request.execute().await;
    }
}

/// A client's neighbour entry that only changes its freshness is no news.
fn matters(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => !matches!(
            message.header.state,
            NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe
        ),
        NetlinkPayload::InnerMessage(_) => true,
        // The kernel had more to say than the socket could hold: look at everything.
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

fn mac(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok()
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// Where packets go by a route; of a default one, and one that leads nowhere, `None`.
fn destination(route: &RouteMessage) -> Option<Ipv4Net> {
    let prefix = route.header.destination_prefix_length;
    let to = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(to)) => Some(*to),
        _ => None,
    })?;
    let leads = route.header.kind == RouteType::Unicast && prefix > 0;
    Ipv4Net::new(to, prefix).ok().filter(|_| leads)
}

/// What a route says if it is a default one of the main table: a hop each.
fn default_routes(message: &RouteMessage) -> Vec<DefaultRoute> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut metric, mut hops) = (0, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(wide) => table = *wide,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => hops.push(*index),
            RouteAttribute::MultiPath(several) => {
                let dead = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
                let alive = several.iter().filter(|hop| !hop.flags.intersects(dead));
                hops.extend(alive.map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let is_dead = header.flags.intersects(RouteFlags::Dead | RouteFlags::Linkdown);
    let is_default = header.destination_prefix_length == 0
        && header.source_prefix_length == 0
        && header.tos == 0
        && !is_dead
        && header.kind == RouteType::Unicast
        && table == u32::from(RouteHeader::RT_TABLE_MAIN);
    let v6 = header.address_family == AddressFamily::Inet6;
    let routes = hops.into_iter().map(|interface| DefaultRoute { v6, metric, interface });
    if is_default { routes.collect() } else { Vec::new() }
}

fn link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        up: flags.contains(LinkFlags::Up) && flags.contains(LinkFlags::LowerUp),
        kind: String::new(),
        // The loopback interface has one too.
        ethernet: matches!(message.header.link_layer_type, LinkLayerType::Ether | LinkLayerType::Loopback),
        vlan: None,
        master: None,
        lower: None,
        lower_elsewhere: false,
        namespace: None,
        mtu: 0,
        xdp: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = mac(bytes).unwrap_or_default(),
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => link.lower = Some(*index),
            LinkAttribute::LinkNetNsId(number) => {
                link.lower_elsewhere = true;
                link.namespace = Some(*number);
            }
            LinkAttribute::Mtu(bytes) => link.mtu = *bytes,
            LinkAttribute::Xdp(facts) => {
                link.xdp = facts.iter().find_map(|fact| match fact {
                    LinkXdp::ProgId(id) => Some(*id),
                    _ => None,
                });
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind_name(kind),
                        LinkInfo::Data(InfoData::Vlan(facts)) => {
                            link.vlan = facts.iter().find_map(|fact| match fact {
                                InfoVlan::Id(id) => Some(*id),
                                _ => None,
                            });
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn kind_name(kind: &InfoKind) -> String {
    kind.to_string()
}

fn address(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    if message.header.scope != AddressScope::Universe {
        return None;
    }
    let of = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    // On a point-to-point link "local" is ours and "address" the peer's.
    let local = of(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    let plain = of(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None });
    Some((message.header.index, local.or(plain)?))
}

/// The range that lies behind an interface by its address, if it is more than the address itself.
fn range(message: &AddressMessage) -> Option<Range> {
    let (interface, own) = address(message)?;
    let prefix = message.header.prefix_len;
    let bits: u32 = if own.is_ipv4() { 32 } else { 128 };
    let host = bits.checked_sub(prefix.into()).filter(|host| *host > 0)?;
    let first = match own {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & u32::MAX.checked_shl(host).unwrap_or(0)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & u128::MAX.checked_shl(host).unwrap_or(0)).into(),
    };
    Some(Range { interface, first, prefix })
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    if matches!(
        message.header.state,
        NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::None
    ) {
        return None;
    }
    let (mut to, mut hardware) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => to = Some(IpAddr::from(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => to = Some(IpAddr::from(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => hardware = mac(bytes),
            _ => {}
        }
    }
    let fixed = matches!(message.header.state, NeighbourState::Permanent | NeighbourState::Noarp);
    Some(((message.header.ifindex, to?), Neighbour { mac: hardware?, fixed }))
}

/// An address that a bridge learned on a port; its own are permanent.
fn bridge_port(message: &NeighbourMessage) -> Option<((u32, [u8; 6]), u32)> {
    if message.header.state == NeighbourState::Permanent {
        return None;
    }
    let (mut master, mut hardware) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Controller(index) => master = Some(*index),
            NeighbourAttribute::LinkLayerAddress(bytes) => hardware = mac(bytes),
            _ => {}
        }
    }
    Some(((master?, hardware?), message.header.ifindex))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: &str, master: Option<u32>, lower: Option<u32>) -> (u32, Link) {
        let link = Link {
            index,
            name: format!("link{index}"),
            mac: [2, 0, 0, 0, 0, index as u8],
            up: true,
            kind: kind.into(),
            ethernet: kind != "tun",
            vlan: (kind == "vlan").then_some(index as u16),
            master,
            lower,
            lower_elsewhere: false,
            namespace: None,
            mtu: 1500,
            xdp: None,
        };
        (index, link)
    }

    fn range(interface: u32, first: &str, prefix: u8) -> Range {
        Range { interface, first: first.parse().unwrap(), prefix }
    }

    #[test]
    fn who_would_serve_nobody_is_named_with_what_to_take_instead() {
        let links = BTreeMap::from([
            link(1, "", None, None),
            link(2, "bridge", None, None),
            link(3, "veth", Some(2), None),
            link(4, "bond", None, None),
            link(5, "", Some(4), None),
            link(6, "tun", None, None),
            link(7, "vrf", None, None),
            link(8, "", Some(7), None),
            link(9, "vlan", None, Some(1)),
        ]);
        let snapshot = Snapshot { links, ..Snapshot::default() };
        let said = |index: u32| snapshot.unfit(&snapshot.links[&index]);
        for fit in [1, 2, 4, 7, 8, 9] {
            assert_eq!(said(fit), None, "link{fit}");
        }
        assert_eq!(
            said(3).unwrap(),
            "link3 is a port of the bridge link2, which has the addresses: take --iface link2"
        );
        assert_eq!(
            said(5).unwrap(),
            "link5 is a port of the bond link4, which has the addresses: take --iface link4"
        );
        assert!(said(6).unwrap().starts_with("link6 has no Ethernet header"));
    }

    #[test]
    fn only_bridges_of_containers_are_inside() {
        let mut links = BTreeMap::from([
            link(1, "", None, None),
            // One of containers, one of machines, one with the network itself, one that nobody is plugged into.
            link(2, "bridge", None, None),
            link(3, "veth", Some(2), None),
            link(4, "bridge", None, None),
            link(5, "veth", Some(4), None),
            link(6, "tun", Some(4), None),
            link(7, "bridge", None, None),
            link(8, "vlan", Some(7), Some(1)),
            link(9, "bridge", None, None),
            // One that is down.
            link(10, "bridge", None, None),
            link(11, "veth", Some(10), None),
        ]);
        links.get_mut(&10).unwrap().up = false;
        let ranges = vec![
            range(1, "192.0.2.0", 24),
            range(2, "172.18.0.0", 16),
            range(2, "fd18::", 64),
            range(4, "192.168.122.0", 24),
            range(7, "10.0.0.0", 8),
            range(9, "172.19.0.0", 16),
            range(10, "172.20.0.0", 16),
            // The uplink has it too, and a part of the containers'.
            range(2, "198.51.100.0", 24),
            range(1, "198.51.100.0", 24),
            range(1, "172.18.40.0", 24),
        ];
        let own: IpAddr = "172.18.0.1".parse().unwrap();
        let snapshot = Snapshot { links, ranges, addresses: vec![(2, own)], ..Snapshot::default() };
        let inside: Vec<_> =
            snapshot.inner_ranges().into_iter().filter(|(_, what)| *what != inner::OUTSIDE).collect();
        let of = |first: &str, prefix, what| ((first.parse::<IpAddr>().unwrap(), prefix), what);
        assert_eq!(
            inside,
            [
                of("172.18.0.0", 16, inner::BRIDGE),
                of("172.18.0.1", 32, inner::OWN),
                of("fd18::", 64, inner::BRIDGE)
            ]
        );
        assert_eq!(snapshot.inner_ranges()[&("172.18.40.0".parse().unwrap(), 24)], inner::OUTSIDE);
    }

    #[test]
    fn vlans_sit_on_the_uplink_or_on_what_it_is_a_port_of() {
        let mut links = BTreeMap::from([
            link(1, "", Some(2), None),
            link(2, "bond", None, None),
            link(5, "vlan", None, Some(1)),
            link(6, "vlan", None, Some(2)),
            link(7, "vlan", None, Some(3)),
            link(8, "vlan", None, Some(1)),
        ]);
        links.get_mut(&8).unwrap().lower_elsewhere = true;
        let snapshot = Snapshot { links, ..Snapshot::default() };
        assert_eq!(snapshot.vlans_on(1).filter_map(|link| link.vlan).collect::<Vec<_>>(), [5, 6]);
    }

    #[test]
    fn the_id_of_a_vlan_is_read_from_what_the_kernel_says() {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vlan),
            LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(4_094)])),
        ])];
        let link = super::link(&message);
        assert_eq!((link.kind.as_str(), link.vlan), ("vlan", Some(4_094)));
    }

    #[test]
    fn a_range_begins_where_its_prefix_says() {
        let message = |own: &str, prefix| {
            let mut message = AddressMessage::default();
            message.header.prefix_len = prefix;
            message.attributes = vec![AddressAttribute::Local(own.parse().unwrap())];
            super::range(&message).map(|range| (range.first.to_string(), range.prefix))
        };
        let is = |first: &str, prefix| Some((first.to_owned(), prefix));
        assert_eq!(message("172.18.7.9", 16), is("172.18.0.0", 16));
        assert_eq!(message("10.0.0.5", 31), is("10.0.0.4", 31));
        assert_eq!(message("10.0.0.5", 0), is("0.0.0.0", 0));
        assert_eq!(message("10.0.0.5", 32), None);
        assert_eq!(message("fd18::1:0:0:9", 64), is("fd18::", 64));
        assert_eq!(message("fd18::9", 128), None);
    }
}
