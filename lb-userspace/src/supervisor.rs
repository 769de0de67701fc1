//! What systemd is told of the agent (sd_notify(3)): that it serves, what it serves, that it is alive. Without systemd
//! nothing of this happens.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};
use sd_notify::NotifyState;

use crate::text;

/// A controller that has not gone round its loop for so long is stuck.
const STUCK: Duration = Duration::from_secs(20);
/// The status is told so often, and the watchdog at least as often as it asks for.
const OFTEN: Duration = Duration::from_secs(2);

/// A start may take so long: the kernel's verifier takes its time on a slow machine. The unit says the same.
const START: Duration = Duration::from_secs(180);

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

/// The signals that end the agent or have it start anew. They are held back while one program takes another's place in the
/// process.
pub fn signals() -> SigSet {
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].into_iter().collect()
}

/// Tells systemd that the agent serves.
pub fn ready() {
    notify(&[NotifyState::Ready]);
    if let Some(limit) = sd_notify::watchdog_enabled() {
        notify(&[NotifyState::WatchdogUsec(limit.as_micros() as u32)]);
    }
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
    // Until it serves again nobody beats.
    if sd_notify::watchdog_enabled().is_some() {
        notify(&[NotifyState::WatchdogUsec(START.as_micros() as u32)]);
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
        // Names and errors hold what others have written, and a line's end begins another word to systemd.
        let status = text::clean(&status).into_owned();
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
