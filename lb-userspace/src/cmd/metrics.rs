//! `metrics`: what is measured, without a controller.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result};

use super::out;
use crate::{
    cli::MetricsArgs,
    datapath::{DatapathError, attached_interfaces},
    serve::{self, Listen, Shared, Source, metrics},
};

/// Prints the metrics once, or serves them until the end.
///
/// # Errors
/// Nothing is attached, the kernel refuses a read, or it cannot be listened there.
pub async fn run(arguments: &MetricsArgs) -> Result<()> {
    let names = match &arguments.iface {
        Some(name) => vec![name.clone()],
        None => attached_interfaces()?,
    };
    if names.is_empty() {
        return Err(DatapathError::NotAttached(None).into());
    }
    let sources: Vec<Source> = names.iter().map(|name| Source::new(name, None)).collect();
    if arguments.once {
        let exposed: Result<Vec<_>> = sources.iter().map(Source::read).collect();
        let text = metrics::text(exposed?, BTreeMap::new()).context("write the metrics")?;
        return out::line(text.trim_end());
    }
    let shared = Shared { sources: Arc::new(sources), events: None, explains: Arc::default() };
    let addresses =
        if arguments.listen.is_empty() { vec![Listen::default()] } else { arguments.listen.clone() };
    for at in &addresses {
        let router = serve::router(shared.clone(), at.is_local());
        serve::listen(at, router).with_context(|| format!("listen on {at}"))?;
        out::line(format!("serving {at}"))?;
    }
    std::future::pending().await
}
