//! `clients`: the IPv6 clients whom this node's tasks know by an IPv4 address of the pool, and who it was that a task saw.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Result, bail};
use serde_json::json;

use super::{attached, out};
use crate::{
    cli::{Output, Read},
    datapath::{Alias, Tools},
};

/// Lists all, or says who is known by these addresses.
///
/// # Errors
/// Nothing is attached, the kernel refuses a read, or nobody is known by an address.
pub fn run(wanted: &[Ipv4Addr], read: &Read) -> Result<()> {
    let mut known = Vec::new();
    for (interface, set) in attached(read)? {
        let aliases = set.aliases(Tools::clock(&set)?.now()?)?;
        known.extend(aliases.into_iter().map(|alias| (interface.clone(), alias)));
    }
    if !wanted.is_empty() {
        for address in wanted {
            if known.iter().all(|(_, alias)| alias.address != *address) {
                bail!(
                    "no client is known by {address} here now; an address is kept for ten minutes after its client's last \
                     packet, and `lb-userspace clients` lists all"
                );
            }
        }
        let known_as =
            |address: Ipv4Addr| known.iter().filter(move |(_, alias)| alias.address == address).cloned();
        known = wanted.iter().flat_map(|address| known_as(*address)).collect();
    }
    match read.output {
        Output::Json => {
            let mut interfaces: BTreeMap<&str, Vec<&Alias>> = BTreeMap::new();
            known.iter().for_each(|(interface, alias)| interfaces.entry(interface).or_default().push(alias));
            let documents = interfaces.into_iter();
            let documents: Vec<_> = documents
                .map(|(interface, clients)| json!({ "interface": interface, "clients": clients }))
                .collect();
            out::json(json!({ "interfaces": documents }), false)
        }
        Output::Table if !wanted.is_empty() => {
            known.iter().try_for_each(|(_, alias)| out::line(alias.client.to_string()))
        }
        Output::Table => {
            let row = |address: &str, client: &str, since: &str, idle: &str| {
                out::line(format!("{address:<17} {client:<41} {since:<9} {idle}"))
            };
            row("ADDRESS", "CLIENT", "SINCE", "IDLE")?;
            known.iter().try_for_each(|(_, Alias { client, address, held_seconds, idle_seconds, .. })| {
                let (since, idle) = (format!("{held_seconds}s"), format!("{idle_seconds}s"));
                row(&address.to_string(), &client.to_string(), &since, &idle)
            })
        }
    }
}
