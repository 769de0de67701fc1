//! What is due once a second: the heartbeat, removing connections that have ended and what comes of it, the guard.

use std::io::ErrorKind;

use super::Controller;
use crate::{
    cluster::Idle,
    datapath::DatapathError,
    net::{Reset, Resetter},
};

impl Controller {
    /// What is due once a second: tells the programs that somebody is there, leaves a new XDP to itself, removes connections
    /// that have ended, and says when the flood guard takes over and lets go.
    pub(super) fn look_after_connections(&mut self) -> Result<(), DatapathError> {
        self.datapath.beat()?;
        self.settle_in()?;
        let mut resets = Vec::new();
        let collected = self.datapath.collect(&mut resets);
        // Their lines are gone, whatever became of the rest.
        self.reset(&resets);
        let interface = &self.settings.interface;
        let collection = collected?;
        if collection.removed > 0 {
            log::debug!(
                "{interface}: {} of {} connections had ended, {} resets for idle ones",
                collection.removed,
                collection.seen,
                collection.resets
            );
        }
        for full in collection.fills.into_iter().filter_map(|fill| self.watch.fill(fill)) {
            log::warn!("{interface}: {full}");
        }
        for full in self.watch.counters(|outcome| self.datapath.outcome(outcome).ok()) {
            log::warn!("{interface}: {full}");
        }
        let guard = self.datapath.guard()?;
        if guard.on != self.flooded {
            self.flooded = guard.on;
            if guard.on {
                log::warn!(
                    "{interface}: more than {} new connections a second: until there are fewer they are placed by hash, \
                     and leave no line before the client goes on",
                    self.datapath.config().flood_rate
                );
            } else {
                log::warn!(
                    "{interface}: the flood is over; {} connections were placed by hash so far",
                    guard.placed
                );
            }
        }
        Ok(())
    }

    /// Tells ends of idle connections that those are gone. Who cannot be told finds out by itself, as where nobody is told.
    fn reset(&self, resets: &[Reset]) {
        let Some(resetter) = self.resetter.as_ref().filter(|_| !resets.is_empty()) else {
            return;
        };
        let interface = &self.settings.interface;
        let done = resetter.send(resets);
        log::debug!("{interface}: sent {} resets to ends of idle connections", done.sent);
        if let Some(error) = done.error {
            log::warn!(
                "{interface}: {} ends of idle connections could not be told by a reset: {error}; they find out when they \
                 send something. Is there a route to them, and does the packet filter let the node's own packets out?",
                done.failed
            );
        }
    }

    /// Sees to it that resets can be sent if a service asks for them; what is to be said where they cannot.
    pub(super) fn open_resetter(&mut self) -> Option<String> {
        if self.resetter.is_some() {
            return None;
        }
        let services = self.datapath.tables().services.values();
        let mut asking = services.filter(|label| label.idle == Idle::Reset).map(|label| &label.name);
        let first = asking.next()?;
        let error = match Resetter::open() {
            Ok(resetter) => {
                self.resetter = Some(resetter);
                return None;
            }
            Err(error) => error,
        };
        let others = match asking.count() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        let needs = match error.kind() {
            ErrorKind::PermissionDenied => "; the agent needs the capability CAP_NET_RAW for it",
            _ => "",
        };
        Some(format!(
            "service {first}{others}: idle connections are forgotten, not reset: open a raw socket: {error}{needs}"
        ))
    }
}
