//! Network namespaces: made with a name of their own, entered by thread or by command, removed with everything
//! that runs in them.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace.
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one. `label` is for people who look at it.
    pub fn new(label: &str) -> Self {
        assert!(
            geteuid().is_root(),
            "these tests make network namespaces: run them as root (cargo xtask test)"
        );
        bpffs();
        let name = format!("lb{}-{}-{label}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run(Command::new("ip").args(["netns", "add", &name]));
        let netns = Self { name };
        netns.ip("link set lo up");
        netns
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// `ip` in the namespace, its arguments in one string.
    pub fn ip(&self, arguments: &str) {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments.split_whitespace()));
    }

    /// A command in the namespace. Not by `ip netns exec`, which hides bpffs.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Has all packets of a flow that come by an interface taken on one CPU, as a NIC's queues do. Between veths a
    /// connection's last acknowledgment and its first data may reach a task on two CPUs at once; Linux 6.18 then answers the
    /// data with a reset once in some two million connections, for it takes the half-open socket out of its table before it
    /// puts the new one in.
    pub fn keep_flows_on_one_cpu(&self, interface: &str) {
        let cpus = thread::available_parallelism().map_or(1, usize::from).min(32);
        let write =
            format!("echo {:x} > /sys/class/net/{interface}/queues/rx-0/rps_cpus", (1_u64 << cpus) - 1);
        // `ip` shows the namespace's own devices in /sys.
        run(Command::new("ip").args(["netns", "exec", self.name(), "sh", "-c", &write]));
    }

    /// What a command in the namespace prints.
    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().expect("start nsenter");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {arguments:?} in {}: {}: {errors}",
            self.name,
            output.status
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a closure on a thread of its own in the namespace.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let handle = scope.spawn(|| {
                let file = File::open(self.path()).expect("open the namespace");
                setns(file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                body()
            });
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Like [`Self::enter`], without waiting.
    pub fn spawn<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let path = self.path();
        thread::spawn(move || {
            let file = File::open(path).expect("open the namespace");
            setns(file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            body()
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Removes its interfaces too: veths go with either end.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A process that is stopped when it is dropped.
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts a command, its output thrown away unless it was redirected.
    pub fn start(command: &mut Command) -> Self {
        // A group of its own: Ctrl-C is for whoever started it, who then stops it in order.
        let child = command
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        Self { child }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Sends a signal and waits for the end.
    pub fn stop(&mut self, signal: Signal) {
        if self.child.try_wait().ok().flatten().is_some() {
            return;
        }
        let _ = kill(self.pid(), signal);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if self.child.try_wait().ok().flatten().is_some() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.ended().is_none()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait for a process")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop(Signal::SIGTERM);
    }
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {errors}", output.status);
}

/// Set where the machine is an emulated one: how many times slower it is.
const PATIENCE: &str = "LB_PATIENCE";

/// A time that is long enough on this machine where it would be on a real one.
pub fn patience(time: Duration) -> Duration {
    let factor = std::env::var(PATIENCE).ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
    time * factor
}

/// Waits until something is so, half a minute at most: on a busy machine the verifier alone takes many seconds.
pub fn eventually(what: &str, holds: impl FnMut() -> bool) {
    within(Duration::from_secs(30), what, holds);
}

/// Waits until something is so, for as long as it may take on a busy machine.
pub fn within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience(limit);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The same for what says why it is not so yet: the last reason is told where the wait was in vain.
pub fn succeeds<T>(limit: Duration, what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + patience(limit);
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < deadline, "waited in vain: {what}: {error}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Mounts bpffs where a bare machine has none.
fn bpffs() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let path = "/sys/fs/bpf";
        let kind = nix::sys::statfs::statfs(path).map(|stat| stat.filesystem_type());
        if kind != Ok(nix::sys::statfs::BPF_FS_MAGIC) {
            run(Command::new("mount").args(["-t", "bpf", "bpf", path]));
        }
        sweep();
    });
}

/// Removes what runs that were killed have left: namespaces of processes that are no more, and their pins.
fn sweep() {
    let listed = Command::new("ip").args(["netns", "list"]).output().expect("start ip");
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let owner = name.strip_prefix("lb").and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
        let Some(owner) = owner.filter(|pid| kill(Pid::from_raw(*pid), None).is_err()) else {
            continue;
        };
        println!("removing {name}, which process {owner} has left");
        let left = Netns { name: name.to_owned() };
        let _ = Command::new("ip").args(["netns", "pids", name]).output().map(|pids| {
            for pid in String::from_utf8_lossy(&pids.stdout).lines().filter_map(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        });
        left.enter(|| {
            if let Ok(pins) = lb_userspace::datapath::PinDir::of("eth1") {
                lb_userspace::datapath::remove(&pins, &[]);
            }
        });
    }
}
