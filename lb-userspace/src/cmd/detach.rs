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
    let present: Vec<String> = net.snapshot().await?.links.into_values().map(|link| link.name).collect();
    for interface in interfaces {
        let pins = PinDir::of(interface)?;
        if !pins.path().exists() {
            return Err(DatapathError::NotAttached(Some(interface.clone())).into());
        }
        if let Some(pid) = pins.controller() {
            return Err(DatapathError::Held { interface: interface.clone(), pid: Some(pid) }.into());
        }
        datapath::remove(&pins, &present);
    }
    Ok(())
}
