//! What lies behind the host-side veths of containers: the addresses in the network namespaces that they lead into.
//!
//! The kernel numbers the namespaces that a veth's peer may be in, and answers questions about a numbered one
//! (`IFA_TARGET_NETNSID`, Linux 4.20) to who may administer it: nobody enters a namespace, nothing asks the bridge's
//! forwarding table, which forgets who is silent, and Docker need not be running.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::TryStreamExt as _;
use netlink_packet_route::{
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkMessage},
};
use rtnetlink::Handle;

use super::{Link, address, mac};

/// A container's network namespace, seen through one of its veths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerNetns {
    /// The host-side veth.
    pub port: u32,
    /// Hardware address of its peer, inside.
    pub mac: [u8; 6],
    /// Addresses of the peer.
    pub addresses: Vec<IpAddr>,
    /// Addresses of the namespace's other interfaces.
    pub others: Vec<IpAddr>,
}

/// The namespace that something holds for. Somebody may keep a namespace whose container has ended (a capture of its
/// packets, a monitor), and Docker gives its addresses to the next container: the newer veth is that one's, for the
/// kernel counts interfaces upwards.
pub fn newest(
    containers: &[ContainerNetns],
    holds: impl Fn(&ContainerNetns) -> bool,
) -> Option<&ContainerNetns> {
    containers.iter().filter(|container| holds(container)).max_by_key(|container| container.port)
}

/// An address may come a moment after its interface: until so long after the veth was first seen it is read each time.
const SETTLED: Duration = Duration::from_secs(5);
/// And after this time again, in case another came later.
const FRESH: Duration = Duration::from_secs(30);

/// A veth and its peer; neither number is given again to another while both live.
type Identity = (u32, i32, u32);

#[derive(Clone, Debug)]
struct Known {
    since: Instant,
    read: Instant,
    container: ContainerNetns,
}

/// What was learnt so far.
#[derive(Clone, Default)]
pub struct ContainerNetnsCache {
    known: Arc<Mutex<HashMap<Identity, Known>>>,
}

impl ContainerNetnsCache {
    /// The containers behind the veths among some links.
    pub async fn behind(&self, handle: &Handle, links: &BTreeMap<u32, Link>) -> Vec<ContainerNetns> {
        let wanted: Vec<Identity> = links
            .values()
            .filter(|link| link.kind == "veth")
            .filter_map(|link| Some((link.index, link.namespace?, link.lower?)))
            .collect();
        let known: HashMap<Identity, Known> = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|identity, _| wanted.contains(identity));
            known.clone()
        };
        let stale = |identity: &&Identity| {
            known.get(*identity).is_none_or(|known| {
                // On a busy machine the first one takes longer.
                let bare = known.container.addresses.is_empty();
                bare || known.read.duration_since(known.since) < SETTLED || known.read.elapsed() > FRESH
            })
        };
        let unsettled: Vec<Identity> = wanted.iter().filter(stale).copied().collect();
        let namespaces: BTreeSet<i32> = unsettled.iter().map(|(_, namespace, _)| *namespace).collect();
        let mut fresh = HashMap::new();
        for namespace in namespaces {
            let Some(inside) = addresses(handle, namespace).await else {
                continue;
            };
            for (port, _, peer) in unsettled.iter().filter(|(_, of, _)| *of == namespace) {
                let of = |own: bool| {
                    let mine = inside.iter().filter(move |(index, _)| (*index == *peer) == own);
                    mine.map(|(_, address)| *address).collect()
                };
                let mac = hardware(handle, namespace, *peer).await.unwrap_or_default();
                let container = ContainerNetns { port: *port, mac, addresses: of(true), others: of(false) };
                fresh.insert((*port, namespace, *peer), container);
            }
        }
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (identity, container) in fresh {
            let since = known.get(&identity).map_or(now, |known| known.since);
            known.insert(identity, Known { since, read: now, container });
        }
        wanted
            .iter()
            .filter_map(|identity| known.get(identity))
            .map(|known| known.container.clone())
            .collect()
    }
}

/// The addresses in a namespace, by interface; `None` where the kernel does not say.
async fn addresses(handle: &Handle, namespace: i32) -> Option<Vec<(u32, IpAddr)>> {
    let mut request = handle.address().get();
    request.message_mut().attributes.push(AddressAttribute::TargetNetNsId(namespace));
    let messages: Result<Vec<AddressMessage>, _> = request.execute().try_collect().await;
    match messages {
        // Who does not know the question answers another one, about this namespace.
        Ok(messages) if messages.iter().all(|message| is_from(message, namespace)) => {
            Some(messages.iter().filter_map(address).collect())
        }
        Ok(_) => None,
        Err(error) => {
            log::debug!("ask the kernel for addresses in namespace {namespace}: {error}");
            None
        }
    }
}

fn is_from(message: &AddressMessage, namespace: i32) -> bool {
    message.attributes.contains(&AddressAttribute::TargetNetNsId(namespace))
}

async fn hardware(handle: &Handle, namespace: i32, index: u32) -> Option<[u8; 6]> {
    let mut request = handle.link().get().match_index(index);
    request.message_mut().attributes.push(LinkAttribute::IfNetnsId(namespace));
    let message: LinkMessage = request.execute().try_next().await.ok()??;
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => mac(bytes),
        _ => None,
    })
}
