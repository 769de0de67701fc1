//! What an agent may say to another, in whatever pieces it comes.

use std::collections::BTreeSet;

use tokio_util::{bytes::BytesMut, codec::Decoder as _};

use super::{
    Changes, FromAgent, FromManager,
    lines::{Budget, Lines},
};
use crate::cluster::ClusterState;

/// The longest line here: more only takes longer.
const LONGEST: usize = 4096;

/// The first byte says how the others are cut into what comes at once.
pub fn agents(data: &[u8]) {
    let [cut, data @ ..] = data else {
        return;
    };
    let whole = read(data.chunks(data.len().max(1)));
    let pieces = read(data.chunks(usize::from(*cut) + 1));
    assert_eq!(whole, pieces, "what is read depends on how it comes");
    let mut state = ClusterState::default();
    for line in whole {
        if let Ok(FromAgent::Facts(facts)) = serde_json::from_str(&line) {
            let _ = facts.check();
            say(&FromAgent::Facts(facts));
        }
        if let Ok(FromManager::Cluster(changes)) = serde_json::from_str(&line) {
            let before = state.clone();
            changes.apply(&mut state);
            lead(&before, &state);
        }
    }
}

/// The lines that are read, until there is one that is not taken.
fn read<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    let mut lines = Lines::within(LONGEST, Budget::new(1 << 20));
    let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
    for chunk in chunks {
        buffer.extend_from_slice(chunk);
        loop {
            match lines.decode(&mut buffer) {
                Ok(Some(line)) => read.push(line),
                Ok(None) => break,
                Err(_) => return read,
            }
        }
    }
    read
}

/// What is understood is said so that it is understood again.
fn say(message: &FromAgent) {
    let text = serde_json::to_string(message).expect("a message");
    let again: FromAgent = serde_json::from_str(&text).expect("a message that was said");
    assert_eq!(serde_json::to_string(&again).expect("a message"), text);
}

/// What leads from one state to the next does, if they are such as agents tell.
fn lead(before: &ClusterState, after: &ClusterState) {
    let is_told = |state: &ClusterState| {
        let names: BTreeSet<&str> = state.services.iter().map(|service| service.name.as_str()).collect();
        names.len() == state.services.len() && state.services.is_sorted_by_key(|service| &service.name)
    };
    if !is_told(before) || !is_told(after) {
        return;
    }
    let mut state = before.clone();
    for part in Changes::between(Some(before), after).in_parts() {
        part.apply(&mut state);
    }
    state.this.clone_from(&after.this);
    assert_eq!(&state, after);
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_found_once_stays_mended() {
        crate::source::play("agents", super::agents);
    }
}
