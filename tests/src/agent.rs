//! The agent, as users run it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::netns::{Netns, Running, within};

/// The agent's program.
pub fn program() -> PathBuf {
    std::env::var_os("LB_AGENT").map(PathBuf::from).expect("LB_AGENT names the agent; run `cargo xtask test`")
}

/// An agent that controls an interface of a namespace, `eth1` if not said.
pub struct Agent<'a> {
    netns: &'a Netns,
    interface: String,
    program: PathBuf,
    running: Running,
    log: PathBuf,
}

impl<'a> Agent<'a> {
    /// Attaches, and waits until the interface is served.
    pub fn attach(netns: &'a Netns, folder: &Path, cluster: &Path, arguments: &[&str]) -> Self {
        Self::attach_with(netns, folder, cluster, arguments, &[])
    }

    /// The same with variables in the agent's environment.
    pub fn attach_with(
        netns: &'a Netns,
        folder: &Path,
        cluster: &Path,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let cluster = cluster.to_str().expect("a path that is text");
        Self::start(netns, folder, &[&["--cluster", cluster], arguments].concat(), variables)
    }

    /// Attaches with these arguments and nothing else, and waits until the interface is served.
    pub fn start(netns: &'a Netns, folder: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_under(netns, folder, &[], arguments, variables)
    }

    /// The same, started by another program that `under` is the beginning of the command of.
    pub fn start_under(
        netns: &'a Netns,
        folder: &Path,
        under: &[&str],
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        Self::start_program(&program(), netns, folder, under, arguments, variables)
    }

    /// The same of another program than the one that is tested.
    pub fn start_program(
        program: &Path,
        netns: &'a Netns,
        folder: &Path,
        under: &[&str],
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        Self::start_at("eth1", program, netns, folder, under, arguments, variables)
    }

    /// The same on another interface.
    pub fn start_at(
        interface: &str,
        program: &Path,
        netns: &'a Netns,
        folder: &Path,
        under: &[&str],
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let log = folder.join(format!("{}.log", netns.name()));
        let file = File::create(&log).expect("create the log");
        let mut command = match under {
            [] => netns.command(program),
            [first, rest @ ..] => {
                let mut command = netns.command(first);
                command.args(rest).arg(program);
                command
            }
        };
        command.args(["attach", "--iface", interface, "--on-exit", "keep"]).args(arguments);
        command.envs(variables.iter().copied());
        command.env("RUST_LOG", "debug").stderr(file.try_clone().expect("share the log")).stdout(file);
        let program = program.to_owned();
        let interface = interface.to_owned();
        let mut agent = Self { netns, interface, program, running: Running::start(&mut command), log };
        // The verifier takes its time on a busy machine.
        within(Duration::from_secs(60), "the agent serves", || {
            assert!(agent.running.is_running(), "the agent ended: {}", agent.log());
            agent.log().contains("serving ")
        });
        agent
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.running.is_running()
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.running.pid().as_raw()
    }

    /// Ends it; the datapath stays.
    pub fn stop(mut self, signal: Signal) {
        self.running.stop(signal);
        // Dropping would remove the datapath.
        std::mem::forget(self);
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- agent in {}:\n{}", self.netns.name(), self.log());
            eprintln!("{}", String::from_utf8_lossy(&verb(self.netns, &["stats"]).stdout));
        }
        self.running.stop(Signal::SIGTERM);
        let _ = self.netns.command(&self.program).args(["detach", "--iface", &self.interface]).output();
    }
}

/// Puts another XDP program on a namespace's `eth1`, which goes with what is given back. Any will do: our own object, in other hands.
pub fn other_xdp(netns: &Netns) -> aya::Ebpf {
    netns.enter(|| {
        let object = std::env::var_os("LB_OBJECT").expect("LB_OBJECT names the object");
        let object = fs::read(object).expect("the object");
        let mut object = aya::Ebpf::load(&object).expect("load the object");
        let program: &mut aya::programs::Xdp =
            object.program_mut("uplink_xdp").expect("a program").try_into().expect("an XDP program");
        program.load().expect("load the program");
        program.attach("eth1", aya::programs::XdpMode::Driver).expect("attach");
        object
    })
}

/// Runs a verb of the agent in a namespace.
pub fn verb(netns: &Netns, arguments: &[&str]) -> Output {
    netns.command(program()).args(arguments).output().expect("start the agent")
}

/// What a verb prints, which must succeed; that something is wrong with what it shows is no failure.
pub fn text(netns: &Netns, arguments: &[&str]) -> String {
    const DEGRADED: i32 = 5;
    let output = verb(netns, arguments);
    assert!(
        output.status.success() || output.status.code() == Some(DEGRADED),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a verb prints as JSON, for the first interface.
pub fn json(netns: &Netns, arguments: &[&str]) -> Value {
    let text = text(netns, &[arguments, &["-o", "json"]].concat());
    let document: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(document["schema"], 2);
    document["interfaces"][0].clone()
}

/// Tasks of a service that take new connections, as `service ls` has it.
pub fn active_tasks(netns: &Netns, service: &str) -> u64 {
    of_service(netns, service, "active_tasks")
}

fn of_service(netns: &Netns, service: &str, figure: &str) -> u64 {
    let output = verb(netns, &["service", "ls", "-o", "json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let services = document["interfaces"][0]["services"].as_array().cloned().unwrap_or_default();
    services.iter().find(|s| s["name"] == service).and_then(|s| s[figure].as_u64()).unwrap_or_default()
}

/// The tasks of a service that take new connections, as `service ps` has it.
pub fn offered(netns: &Netns, service: &str) -> BTreeSet<String> {
    let output = verb(netns, &["service", "ps", service, "-o", "json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let tasks = document["interfaces"][0]["tasks"].as_array().cloned().unwrap_or_default();
    let running = tasks.iter().filter(|task| task["state"] == "running" && task["problem"].is_null());
    running.filter_map(|task| task["name"].as_str()).map(str::to_owned).collect()
}

/// Packets that came to an outcome.
pub fn outcome(netns: &Netns, name: &str) -> u64 {
    json(netns, &["stats"])["outcomes"][name].as_u64().expect("a counter of that name")
}

/// A command line for people to copy.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
