//! `--iface auto`: the interface by which clients come, found by the kernel's default routes.

use super::Snapshot;

/// A default route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DefaultRoute {
    /// Whether it is IPv6's.
    pub v6: bool,
    /// The kernel takes the least.
    pub metric: u32,
    /// Index of the interface it leads by.
    pub interface: u32,
}

/// The interface that is to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its index, which stays when it is renamed.
    pub index: u32,
    /// Its name.
    pub interface: String,
    /// Why it is this one.
    pub why: &'static str,
    /// What an operator may have expected instead, a sentence each.
    pub others: Vec<String>,
}

/// What is said where nothing can be chosen.
const NAME_IT: &str = "name the interface by which clients come: --iface IF";

/// Chooses the interface of the default route: IPv4's before IPv6's, the least metric first, the first that can be
/// served. Of equal ones it is the interface with the lowest index.
///
/// # Errors
/// There is none, and what to do.
pub fn choose(snapshot: &Snapshot, routes: &[DefaultRoute]) -> Result<Choice, String> {
    let mut routes = routes.to_vec();
    routes.sort_unstable();
    let mut others = Vec::new();
    let mut chosen = None;
    for route in &routes {
        let Some(link) = snapshot.links.get(&route.interface) else { continue };
        let family = if route.v6 { "IPv6" } else { "IPv4" };
        match (chosen, snapshot.unfit(link)) {
            (None, None) => chosen = Some((link, route.v6)),
            (None, Some(reason)) => {
                others.push(format!("{family}'s default route leads by {}: {reason}", link.name));
            }
            (Some((taken, _)), _) if taken.index == link.index => {}
            (Some(_), _) => others.push(format!(
                "{family}'s default route leads by {} too, metric {}; clients that come by it are not served",
                link.name, route.metric
            )),
        }
    }
    let Some((link, v6)) = chosen else {
        others.push(if others.is_empty() {
            format!("there is no default route; {NAME_IT}")
        } else {
            NAME_IT.to_owned()
        });
        return Err(others.join("; "));
    };
    let why = if v6 { "IPv6's default route leads by it" } else { "the default route leads by it" };
    others.dedup();
    Ok(Choice { index: link.index, interface: link.name.clone(), why, others })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::net::Link;

    fn link(index: u32, name: &str, ethernet: bool, master: Option<u32>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mac: [0; 6],
            up: true,
            kind: if name.starts_with("br") { "bridge".to_owned() } else { String::new() },
            ethernet,
            vlan: None,
            master,
            lower: None,
            lower_elsewhere: false,
            namespace: None,
            mtu: 1_500,
            xdp: None,
        }
    }

    fn snapshot() -> Snapshot {
        let links = [
            link(1, "lo", true, None),
            link(2, "eth0", true, None),
            link(3, "eth1", true, None),
            link(4, "wg0", false, None),
            link(5, "br0", true, None),
            link(6, "eth2", true, Some(5)),
        ];
        let addresses = vec![(2, "192.0.2.1".parse().unwrap()), (3, "10.0.0.1".parse().unwrap())];
        Snapshot {
            links: BTreeMap::from(links.map(|link| (link.index, link))),
            addresses,
            ..Snapshot::default()
        }
    }

    fn v4(interface: u32, metric: u32) -> DefaultRoute {
        DefaultRoute { v6: false, metric, interface }
    }

    fn v6(interface: u32, metric: u32) -> DefaultRoute {
        DefaultRoute { v6: true, metric, interface }
    }

    fn chosen(routes: &[DefaultRoute]) -> (String, Vec<String>) {
        let choice = choose(&snapshot(), routes).unwrap();
        (choice.interface, choice.others)
    }

    #[test]
    fn the_interface_of_the_default_route_is_taken() {
        assert_eq!(chosen(&[v4(2, 100)]), ("eth0".into(), vec![]));
        // Both families by one interface.
        assert_eq!(chosen(&[v6(2, 1024), v4(2, 0)]), ("eth0".into(), vec![]));
        // A node of IPv6 alone.
        assert_eq!(chosen(&[v6(3, 1024)]), ("eth1".into(), vec![]));
    }

    #[test]
    fn of_several_the_kernels_first_is_taken_and_the_others_are_named() {
        let (taken, others) = chosen(&[v4(3, 600), v4(2, 100), v6(3, 1)]);
        assert_eq!(taken, "eth0");
        assert_eq!(others.len(), 2, "{others:?}");
        assert!(others[0].starts_with("IPv4's default route leads by eth1 too, metric 600; "), "{others:?}");
        assert!(others[1].starts_with("IPv6's default route leads by eth1 too"), "{others:?}");
    }

    #[test]
    fn what_cannot_be_served_is_passed_over_and_named() {
        let (taken, others) = chosen(&[v4(4, 0), v4(2, 100)]);
        assert_eq!(taken, "eth0");
        assert!(
            others[0].starts_with("IPv4's default route leads by wg0: wg0 has no Ethernet header"),
            "{others:?}"
        );
        let none = choose(&snapshot(), &[v4(4, 0), v6(6, 0)]).unwrap_err();
        assert!(none.contains("eth2 is a port of the bridge br0"), "{none}");
        assert!(none.ends_with("; name the interface by which clients come: --iface IF"), "{none}");
    }

    #[test]
    fn without_a_default_route_the_operator_must_name_one() {
        let error = choose(&snapshot(), &[]).unwrap_err();
        assert_eq!(error, "there is no default route; name the interface by which clients come: --iface IF");
    }
}
