//! What somebody drains by hand: the cluster that the controller goes by, less that.

use std::sync::Arc;

use super::Controller;
use crate::{
    cluster::{ClusterState, TaskState},
    datapath::Datapath,
    events::Kind,
    report::{Drain, Drained},
};

impl Controller {
    /// Takes the cluster as it is told by now, less what somebody drains.
    pub(super) fn renew(&mut self) {
        (self.cluster, self.offered) = (self.drained(), None);
    }

    /// The cluster, less what somebody drains.
    pub(super) fn drained(&self) -> Option<ClusterState> {
        let mut cluster = self.told.clone()?;
        for drain in &self.drains.1 {
            let its = |task: &crate::cluster::Task| match drain.what {
                Drained::Task => task.name == drain.name,
                Drained::Node => task.node == drain.name,
            };
            for service in cluster.services.iter_mut().filter(|service| service.tasks.iter().any(its)) {
                for task in Arc::make_mut(service).tasks.iter_mut().filter(|task| its(task)) {
                    if task.state == TaskState::Running {
                        task.state = TaskState::Draining;
                    }
                }
            }
        }
        Some(cluster)
    }

    /// Looks whether somebody drains something else now; whether the tables may have to change.
    pub(super) fn look_at_drains(&mut self) -> bool {
        if self.datapath.drain_version() == self.drains.0 {
            return false;
        }
        let before = std::mem::replace(&mut self.drains, kept(&self.datapath)).1;
        let name = |drain: &Drain| match drain.what {
            Drained::Task => format!("task {}", drain.name),
            Drained::Node => format!("node {}", self.datapath.tables().node_shown(&drain.name)),
        };
        let same = |one: &Drain, other: &Drain| (one.what, &one.name) == (other.what, &other.name);
        for drain in self.drains.1.iter().filter(|drain| !before.iter().any(|other| same(drain, other))) {
            self.record(Kind::Drained, format!("{} is drained by hand: no new connections", name(drain)));
        }
        for drain in before.iter().filter(|drain| !self.drains.1.iter().any(|other| same(drain, other))) {
            self.record(Kind::Undrained, format!("{} is no longer drained by hand", name(drain)));
        }
        // How long ago the cluster changed says nothing of how long this takes.
        if let Some(told) = &mut self.told {
            told.changed = None;
        }
        self.renew();
        true
    }
}

/// What is kept with the tables, and its version.
pub(super) fn kept(datapath: &Datapath) -> (u64, Vec<Drain>) {
    let drains = datapath.drains();
    (drains.version, drains.all())
}
