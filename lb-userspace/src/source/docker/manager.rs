//! Following a manager's lists: events say that something changed, lists say what.
//!
//! Events may be lost, and tasks have none (moby#37403). So the lists are read again soon while anything is changing,
//! slowly when nothing is, and whole from time to time.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::FutureExt as _;
use tokio::sync::{Notify, mpsc};

use super::{
    engine::{Engine, EngineError, Events, encode},
    listing::{Listing, state},
    model,
};

/// A burst of events is one change.
const SETTLE: Duration = Duration::from_millis(20);
/// Between two readings while something is changing.
const SOON: Duration = Duration::from_millis(200);
/// Between two readings while nothing is.
const IDLE: Duration = Duration::from_secs(2);
/// What has not settled by then (a task that no node has room for) is no reason to hurry.
const HURRY: Duration = Duration::from_secs(60);
/// After a change others tend to follow.
const WAKE: Duration = Duration::from_secs(5);
/// Readings take at most this share of the time: a list of 100,000 tasks is no small thing for the manager either.
const SHARE: u32 = 4;
/// Everything is read anew after this time.
const RESYNC: Duration = Duration::from_secs(60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);
/// More tasks than this are not asked for one by one.
const ONE_BY_ONE: usize = 32;

const EVENTS: &str = r#"{"type":["service","node","network"],"scope":["swarm"]}"#;
const WANTED: &str = r#"{"desired-state":["running"]}"#;

/// Follows until the receiver is gone. `nudge` asks for a reading at once.
pub async fn follow(engine: Engine, nudge: Arc<Notify>, out: mpsc::Sender<Result<Listing, EngineError>>) {
    let mut follower = Follower::new(engine);
    loop {
        let (read, pause) = match follower.read().await {
            Ok(listing) => {
                let pause = follower.pause(&listing);
                (Ok(listing), pause)
            }
            Err(error) => {
                follower.events = None;
                (Err(error), RETRY)
            }
        };
        if out.send(read).await.is_err() {
            return;
        }
        follower.wait(pause, &nudge).await;
    }
}

struct Follower {
    engine: Engine,
    events: Option<Events>,
    /// Tasks as they were read last.
    tasks: BTreeMap<String, model::Task>,
    whole: Option<Instant>,
    /// When the lists last differed from those before.
    changed: Instant,
    seen: Option<std::time::SystemTime>,
    took: Duration,
}

impl Follower {
    fn new(engine: Engine) -> Self {
        Self {
            engine,
            events: None,
            tasks: BTreeMap::new(),
            whole: None,
            changed: Instant::now(),
            seen: None,
            took: Duration::ZERO,
        }
    }

    async fn read(&mut self) -> Result<Listing, EngineError> {
        // Events first: what happens between them and the lists is not missed.
        if self.events.is_none() {
            self.events = Some(self.engine.events(EVENTS).await?);
            self.whole = None;
        }
        let start = Instant::now();
        let services = self.engine.list("/services").await?;
        let nodes = self.engine.list("/nodes").await?;
        let tasks = self.tasks().await?;
        self.took = start.elapsed();
        let listing = Listing { services, tasks, nodes };
        let seen = listing.youngest();
        if seen != self.seen {
            (self.seen, self.changed) = (seen, Instant::now());
        }
        Ok(listing)
    }

    /// All tasks that should run, and those that still do though they should not.
    async fn tasks(&mut self) -> Result<Vec<model::Task>, EngineError> {
        let all = self.whole.is_none_or(|whole| whole.elapsed() > RESYNC);
        let mut tasks: Vec<model::Task> = if all { self.everything().await? } else { self.wanted().await? };
        tasks.retain(|task| state(task).is_some());
        let now: BTreeMap<String, model::Task> =
            tasks.into_iter().map(|task| (task.id.clone(), task)).collect();
        self.tasks = now;
        Ok(self.tasks.values().cloned().collect())
    }

    async fn everything(&mut self) -> Result<Vec<model::Task>, EngineError> {
        let tasks = self.engine.list("/tasks").await?;
        self.whole = Some(Instant::now());
        Ok(tasks)
    }

    /// The tasks that should run; of those that did and should no more, what each does now. The whole list has a long
    /// history of them.
    async fn wanted(&mut self) -> Result<Vec<model::Task>, EngineError> {
        let path = format!("/tasks?filters={}", encode(WANTED));
        let mut tasks: Vec<model::Task> = self.engine.list(&path).await?;
        let listed: std::collections::HashSet<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
        let vanished: Vec<String> =
            self.tasks.keys().filter(|id| !listed.contains(id.as_str())).cloned().collect();
        if vanished.len() > ONE_BY_ONE {
            return self.everything().await;
        }
        for id in vanished {
            match self.engine.get(&format!("/tasks/{id}")).await {
                Ok(task) => tasks.push(task),
                Err(error) if error.status() == Some(404) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tasks)
    }

    fn pause(&self, listing: &Listing) -> Duration {
        let quiet = self.changed.elapsed();
        let soon = quiet < WAKE || listing.is_changing() && quiet < HURRY;
        let pause = if soon { SOON } else { IDLE };
        pause.max(self.took * SHARE)
    }

    /// Waits until something may have changed.
    async fn wait(&mut self, pause: Duration, nudge: &Notify) {
        let events = &mut self.events;
        let heard = async {
            match events {
                Some(stream) => stream.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            more = heard => {
                if !more {
                    // The engine is going; the next reading says more.
                    *events = None;
                }
                self.changed = Instant::now();
            }
            () = nudge.notified() => self.changed = Instant::now(),
            () = tokio::time::sleep(pause) => return,
        }
        // A burst is one change; and the manager has other things to do than to list.
        tokio::time::sleep(SETTLE.max(self.took)).await;
        if let Some(stream) = &mut self.events {
            while stream.next().now_or_never() == Some(true) {}
        }
    }
}
