//! `detach`: remove the datapath of an interface.

use anyhow::Result;

use crate::{
    datapath::{self, DatapathError, PinDir},
    net::Net,
};

/// Removes links, programs, tables and pins of every interface named.
///
/// # Errors
/// Nothing is attached to one of them, or its controller still runs.
pub async fn run(interfaces: &[String]) -> Result<()> {
    let (net, _changes) = Net::connect()?;
    let links = net.snapshot().await?.links;
    let names: Vec<String> = links.values().map(|link| link.name.clone()).collect();
    let (mut problem, mut filters) = (None, false);
    for interface in interfaces {
        match detach(interface, &names) {
            Ok(by_filters) => filters |= by_filters,
            // The others are detached all the same.
            Err(error) => {
                problem.get_or_insert(error);
            }
        }
    }
    for index in links.keys().filter(|_| filters) {
        net.drop_empty_clsact(*index).await;
    }
    problem.map_or(Ok(()), |error| Err(error.into()))
}

/// Detaches one; true if its TC programs were attached by filters.
fn detach(interface: &str, present: &[String]) -> Result<bool, DatapathError> {
    let pins = PinDir::of(interface)?;
    if !pins.path().exists() {
        return Err(DatapathError::NotAttached(Some(interface.to_owned())));
    }
    let _lock = pins.lock()?;
    let by_filters = !pins.has_tc_link();
    datapath::remove(&pins, present);
    Ok(by_filters)
}
