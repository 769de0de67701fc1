//! Network namespaces: made with a name of their own, entered by thread or by command, removed with everything
//! that runs in them.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    task::Poll,
    thread,
    time::{Duration, Instant},
};

use lb_userspace::datapath::{PinDir, remove_abandoned};
use nix::{
    fcntl::{Flock, FlockArg},
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use tokio::signal::unix::{SignalKind, signal};

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
        // Nobody else has an interface's own address, and what is asked of neighbours in its first second waits for no one.
        run(netns.command("sysctl").args(["-qw", "net.ipv6.conf.default.accept_dad=0"]));
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

    /// A command in the namespace, without what the environment says to tests. Not by `ip netns exec`, which hides bpffs.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        forget_ours(&mut command);
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Has all packets of a connection that come by an interface taken on one CPU, as a NIC's queues do. Between veths a
    /// connection's last acknowledgment and its first data may reach a task on two CPUs at once; Linux 6.18 then answers the
    /// data with a reset once in some two million connections, for it takes the half-open socket out of its table before it
    /// puts the new one in.
    pub fn keep_connections_on_one_cpu(&self, interface: &str) {
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

    /// Takes away what agents keep in /run and what they left pinned, both by the namespace's number, which never comes again.
    fn forget_agents(&self) {
        let Ok(file) = File::open(self.path()) else { return };
        let forget = move || {
            setns(file, CloneFlags::CLONE_NEWNET).ok()?;
            remove_abandoned(PinDir::of("any").ok()?.path().parent()?);
            std::fs::remove_dir_all(lb_userspace::events::runtime_folder().ok()?).ok()
        };
        let _ = thread::spawn(forget).join();
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
        self.forget_agents();
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

/// Keeps the variables that begin as the agent's do from a command: `LB_SOAK_SECONDS` is for a test, and an agent that is
/// tested has the options that the test gives it, whatever the shell has set.
pub fn forget_ours(command: &mut Command) {
    let names = std::env::vars_os().map(|(name, _)| name);
    for name in names.filter(|name| name.as_encoded_bytes().starts_with(b"LB_")) {
        command.env_remove(name);
    }
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
        // Two suites at once would both mount it, one on the other.
        let lock = File::create(std::env::temp_dir().join("lb-tests-bpffs")).expect("a file to lock");
        let _locked = Flock::lock(lock, FlockArg::LockExclusive).expect("lock it");
        let kind = nix::sys::statfs::statfs(path).map(|stat| stat.filesystem_type());
        if kind != Ok(nix::sys::statfs::BPF_FS_MAGIC) {
            run(Command::new("mount").args(["-t", "bpf", "bpf", path]));
        }
        sweep(|owner| kill(Pid::from_raw(owner), None).is_err());
        sweep_at_the_end();
    });
}

/// Takes this process's namespaces away when a signal ends it: no destructor runs then. Who has a handler of its own ends in
/// order.
fn sweep_at_the_end() {
    const SIGNALS: [(Signal, fn() -> SignalKind); 3] = [
        (Signal::SIGHUP, SignalKind::hangup),
        (Signal::SIGINT, SignalKind::interrupt),
        (Signal::SIGTERM, SignalKind::terminate),
    ];
    let handlers = SIGNALS.map(|(signal, _)| handler(signal));
    if handlers.iter().any(|handler| ![libc::SIG_DFL, libc::SIG_IGN].contains(handler)) {
        return;
    }
    let ends = SIGNALS.into_iter().zip(handlers).filter(|(_, handler)| *handler == libc::SIG_DFL);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut streams: Vec<_> = {
        let _entered = runtime.enter();
        ends.map(|((number, kind), _)| (number, signal(kind()).expect("watch for signals"))).collect()
    };
    thread::spawn(move || {
        let number = runtime.block_on(std::future::poll_fn(|context| {
            let came = streams
                .iter_mut()
                .find_map(|(number, stream)| stream.poll_recv(context).is_ready().then_some(*number as i32));
            came.map_or(Poll::Pending, Poll::Ready)
        }));
        sweep(|owner| owner == std::process::id() as i32);
        std::process::exit(128 + number);
    });
}

/// What this process does at a signal.
fn handler(signal: Signal) -> libc::sighandler_t {
    // SAFETY: nothing is changed; what is filled in is plain data.
    unsafe {
        let mut now = std::mem::zeroed::<libc::sigaction>();
        libc::sigaction(signal as i32, std::ptr::null(), &mut now);
        now.sa_sigaction
    }
}

/// Removes the namespaces of these processes with all that runs in them, and their pins: what runs that were killed have left,
/// or what this one has when it is.
fn sweep(owned: impl Fn(i32) -> bool) {
    let listed = Command::new("ip").args(["netns", "list"]).output().expect("start ip");
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let owner = name.strip_prefix("lb").and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
        let Some(owner) = owner.filter(|pid| owned(*pid)) else {
            continue;
        };
        // Whoever read this may be gone.
        let _ = writeln!(std::io::stdout(), "removing {name}, which process {owner} has left");
        let left = Netns { name: name.to_owned() };
        let _ = Command::new("ip").args(["netns", "pids", name]).output().map(|pids| {
            for pid in String::from_utf8_lossy(&pids.stdout).lines().filter_map(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        });
        // With its pins.
        drop(left);
    }
}
