//! What Docker may answer, whoever put it there: users choose names and labels, workers their host names.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use super::{
    engine::entries,
    listing::{Listing, ManagerView},
    membership, model,
};
use crate::cluster::{TIMERS, Tunnel};

/// A service of a name, with labels: a line each, `key=value`; the first line is its name.
pub fn labels(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut lines = text.lines();
    let name = lines.next().unwrap_or_default();
    let labels: BTreeMap<&str, &str> = lines.filter_map(|line| line.split_once('=')).collect();
    let service = serde_json::json!({
        "ID": "s1", "Spec": {"Name": name, "Labels": labels},
        "Endpoint": {"Ports": [{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 80, "PublishMode": "ingress"}]},
    });
    let services = vec![serde_json::from_value(service).expect("a service")];
    let view = Listing { services, ..Listing::default() }.view(Tunnel::default());
    check(&view);
    let service = &view.cluster.services[0];
    for (_, phase) in TIMERS {
        let seconds = service.timers.seconds[phase as usize];
        assert!(
            (lb_common::conntrack::Timers::LEAST..=lb_common::conntrack::Timers::MOST).contains(&seconds),
            "{seconds}"
        );
    }
    // What is wrong is said, and nothing else is.
    assert!(view.notes.len() <= labels.len(), "{:?}", view.notes);
}

/// The answers to `/services`, `/tasks`, `/nodes`, `/info`, `/networks/ingress?verbose=true`, `/containers/json` and
/// `/version`: a line each.
pub fn engine_api(data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let listing = Listing { services: list(next()), tasks: list(next()), nodes: list(next()) };
    check(&listing.view(Tunnel::default()));
    let _ = (listing.is_changing(), listing.youngest());
    let _ = serde_json::from_slice::<model::Info>(next()).map(membership::of);
    let _ = serde_json::from_slice::<model::Gossip>(next());
    list::<model::Container>(next());
}

fn list<T: DeserializeOwned>(bytes: &[u8]) -> Vec<T> {
    serde_json::from_slice(bytes).map(|raw| entries("the list", raw)).unwrap_or_default()
}

/// What everybody after relies on.
fn check(view: &ManagerView) {
    let cluster = &view.cluster;
    let shown: std::collections::BTreeSet<&str> = cluster.nodes.iter().map(|node| node.shown()).collect();
    let names: std::collections::BTreeSet<&str> =
        cluster.nodes.iter().map(|node| node.name.as_str()).collect();
    // Docker gives no identifier twice, the input may.
    if names.len() == cluster.nodes.len() {
        assert_eq!(shown.len(), cluster.nodes.len(), "two nodes are shown as one: {shown:?}");
    }
    assert!(cluster.nodes.iter().all(|node| !node.host.contains(char::is_control)), "{shown:?}");
    for service in &cluster.services {
        assert!(service.ports.iter().all(|port| port.published != 0 && port.target != 0));
        assert!(service.tasks.iter().all(|task| view.members.contains(&task.node)));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_found_once_stays_mended() {
        crate::source::play("labels", super::labels);
        crate::source::play("engine_api", super::engine_api);
    }
}
