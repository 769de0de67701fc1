//! Running other programs.

use std::{
    env,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// The project's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where builds go.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or does not succeed.
pub fn exec(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.status().with_context(|| format!("run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// After the end of a program what it has said is there within this time.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The same, beside others: what it says is shown when it has ended, in one piece.
///
/// # Errors
/// As of [`exec`].
pub fn exec_whole(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let (mut said, writer) = std::io::pipe().context("make a pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone().context("share a pipe")?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("run {shown}"))?;
    // The command has the ends that it writes to; they are to close with the child.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (pieces, text) = mpsc::channel();
    thread::spawn(move || {
        let mut piece = [0; 4_096];
        while let Ok(length @ 1..) = said.read(&mut piece) {
            if pieces.send(piece[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    let status = child.wait().with_context(|| format!("wait for {shown}"))?;
    // What it has left behind may hold the other end for ever.
    let mut whole = Vec::new();
    while let Ok(piece) = text.recv_timeout(LAST_WORDS) {
        whole.extend(piece);
    }
    std::io::stdout().lock().write_all(&whole).context("show it")?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// What a command prints.
///
/// # Errors
/// It cannot be started, or does not succeed.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("run {shown}"))?;
    if !output.status.success() {
        bail!("{shown}: {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command quietly. What it said is part of the error.
///
/// # Errors
/// It cannot be started, or does not succeed.
pub fn capture(command: &mut Command, what: &str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {what}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{what}: {}:\n{}", output.status, String::from_utf8_lossy(&said).trim_end());
    }
    Ok(())
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The cargo that runs this.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// A program of the search path.
pub fn find(program: &str) -> Option<PathBuf> {
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let home = env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin"));
    let cargo = env::var_os("CARGO_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = env::split_paths(&path).chain(cargo).chain(home).chain(extra);
    places.find_map(|place| Some(place.join(program)).filter(|path| path.is_file()))
}

/// A command run as root: by sudo for an ordinary user, who is told what for.
pub fn as_root(program: impl AsRef<Path>, why: &str) -> Command {
    // Root by `su` has an ordinary user's search path.
    let path = format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default());
    if nix::unistd::geteuid().is_root() {
        let mut command = Command::new(program.as_ref());
        command.env("PATH", path);
        return command;
    }
    eprintln!("(sudo: root is needed to {why})");
    let mut command = Command::new("sudo");
    command.arg("--preserve-env=RUST_LOG,RUST_BACKTRACE").arg(program.as_ref());
    command
}
