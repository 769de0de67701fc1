//! What systemd is told of the agent (sd_notify(3)): that it serves, what it serves, that it is alive. Without systemd
//! nothing of this happens.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sd_notify::NotifyState;

/// A controller that has not gone round its loop for so long is stuck.
const STUCK: Duration = Duration::from_secs(20);
/// The status is told so often, and the watchdog at least as often as it asks for.
const OFTEN: Duration = Duration::from_secs(2);

/// The last sign of life of a controller, and what it serves.
#[derive(Debug)]
pub struct Pulse(Mutex<(Instant, String)>);

impl Default for Pulse {
    fn default() -> Self {
        Self(Mutex::new((Instant::now(), String::new())))
    }
}

impl Pulse {
    /// The controller is alive, and serves this.
    pub fn beat(&self, serves: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), serves);
    }

    fn read(&self) -> (Instant, String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Tells systemd that the agent serves.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells systemd that the agent stops.
pub fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("the datapath is left to itself, or removed")]);
}

/// Tells systemd that the agent starts anew, in this process.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => log::debug!("read the clock: {error}"),
    }
}

/// Tells systemd what is served, and that all controllers are alive, for as long as they are.
pub async fn report(pulses: &[std::sync::Arc<Pulse>]) {
    let watchdog = sd_notify::watchdog_enabled();
    let mut ticks = tokio::time::interval(watchdog.map_or(OFTEN, |limit| OFTEN.min(limit / 3)));
    let mut said = String::new();
    loop {
        ticks.tick().await;
        let beats: Vec<(Instant, String)> = pulses.iter().map(|pulse| pulse.read()).collect();
        let status = beats.iter().map(|(_, serves)| serves.as_str()).collect::<Vec<_>>().join("; ");
        if status != said {
            notify(&[NotifyState::Status(&status)]);
            said = status;
        }
        if watchdog.is_some() && beats.iter().all(|(last, _)| last.elapsed() < STUCK) {
            notify(&[NotifyState::Watchdog]);
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("tell systemd: {error}");
    }
}
