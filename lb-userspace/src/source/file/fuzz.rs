//! A cluster file that anybody may have written, and what it is changed to.

use super::{parse, pieces::Pieces};
use crate::cluster::ClusterState;

/// What cuts the input into the texts that a file holds one after another.
const NEXT: &str = "\n#next\n";

/// Reads each text as one that follows the last. What is read in pieces is what the whole is, and makes sense.
pub fn cluster_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut pieces = Pieces::default();
    for text in text.split(NEXT) {
        let whole = parse::raw(text).and_then(|raw| parse::cluster(&raw));
        if let Some(state) = pieces.read(text) {
            pieces.keep(text.to_owned());
            match &whole {
                Ok(whole) => assert_eq!(&state, whole, "in pieces it is another cluster"),
                Err(wrong) => panic!("in pieces it is taken, as a whole not: {}", wrong.reason),
            }
        }
        match whole {
            Ok(state) => check(&state),
            Err(wrong) => assert!(!wrong.reason.is_empty() && wrong.at <= text.len(), "{}", wrong.at),
        }
    }
}

/// What everybody after relies on.
fn check(state: &ClusterState) {
    let nodes: std::collections::BTreeSet<&str> = state.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(nodes.len(), state.nodes.len(), "two nodes have a name");
    let mut published = std::collections::BTreeSet::new();
    for service in &state.services {
        for port in &service.ports {
            assert!(port.published != 0 && port.target != 0, "{port}");
            let places = if service.addresses.is_empty() {
                vec![None]
            } else {
                service.addresses.iter().map(Some).collect()
            };
            for at in places {
                assert!(published.insert((at, port.protocol, port.published)), "{port} is published twice");
            }
        }
        for task in &service.tasks {
            assert!(nodes.contains(task.node.as_str()), "{} is nowhere", task.name);
            assert!(
                !task.addresses.is_empty() && task.addresses.len() <= 2 && task.weight > 0,
                "{}",
                task.name
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_found_once_stays_mended() {
        crate::source::play("cluster_file", super::cluster_file);
    }
}
