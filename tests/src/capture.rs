//! What passes on the wires of a namespace, by tcpdump.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sys::signal::Signal;

use crate::netns::{Netns, Running, eventually};

/// Captures what a filter matches on all interfaces of a namespace until it is dropped.
pub struct Capture {
    running: Running,
    file: PathBuf,
}

impl Capture {
    /// Starts it, and waits until it runs; what it sees lies in the folder.
    pub fn start(netns: &Netns, folder: &Path, filter: &str) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let file = folder.join(format!("capture-{number}"));
        let errors = folder.join(format!("capture-{number}.log"));
        let log = File::create(&errors).expect("create the log");
        let mut command: Command = netns.command("tcpdump");
        command
            .args(["-i", "any", "-n", "-U", "--immediate-mode", "-Z", "root", "-w"])
            .arg(&file)
            .arg(filter)
            .stdout(Stdio::null())
            .stderr(log);
        let running = Running::start(&mut command);
        eventually("the capture runs", || {
            std::fs::read_to_string(&errors).is_ok_and(|text| text.contains("listening on"))
        });
        Self { running, file }
    }

    /// Ends it; the packets, a line each.
    pub fn packets(mut self) -> Vec<String> {
        self.running.stop(Signal::SIGINT);
        let mut read = Command::new("tcpdump");
        let shown = read.args(["-n", "-Z", "root", "-r"]).arg(&self.file).output().expect("start tcpdump");
        assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
        String::from_utf8_lossy(&shown.stdout).lines().map(str::to_owned).collect()
    }
}
