//! A guest: an emulated machine that boots a kernel, runs the tests and switches itself off.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::archive::Kernel;

/// A guest that says nothing for so long hangs: no single test takes as long, not on a busy machine either.
const SILENCE: Duration = Duration::from_secs(1200);
/// How much of the console is shown when a guest fails.
const CONSOLE_LINES: usize = 80;
/// The last word of a guest that came to its end.
const DONE: &str = "done";

/// Boots the guest and passes on what the tests print, until it switches off.
///
/// # Errors
/// A test fails, the guest hangs, or its kernel panics.
pub fn run(kernel: &Kernel, initramfs: &Path, place: &Path) -> Result<()> {
    let (console, result) = (place.join("console.log"), place.join("result"));
    for old in [&console, &result] {
        let _ = fs::remove_file(old);
    }
    let started = Instant::now();
    let mut guest = Guest::boot(kernel, initramfs, &console, &result)?;
    let outcome = guest.follow().and_then(|()| judge(&fs::read_to_string(&result).unwrap_or_default()));
    println!("kernel {}: {} s in all", kernel.release, started.elapsed().as_secs());
    outcome.inspect_err(|_| show(&console))
}

/// A machine that is switched off when it is dropped.
struct Guest {
    child: Child,
}

impl Guest {
    fn boot(kernel: &Kernel, initramfs: &Path, console: &Path, result: &Path) -> Result<Self> {
        let image = kernel.image();
        let serial = |file: &Path| format!("file:{}", file.display());
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3G"]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-serial", &serial(console), "-serial", "stdio", "-serial", &serial(result)]);
        command.arg("-kernel").arg(&image).arg("-initrd").arg(initramfs);
        // A panic switches the machine off, as -no-reboot makes of it.
        command.args([
            "-append",
            "console=ttyS0 panic=-1 oops=panic loglevel=5 mitigations=off random.trust_cpu=on",
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let child = command.spawn().context("run qemu-system-x86_64")?;
        Ok(Self { child })
    }

    /// Passes on what the tests print.
    fn follow(&mut self) -> Result<()> {
        let output = self.child.stdout.take().context("the guest has no output")?;
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            let lines = BufReader::new(output).split(b'\n').map_while(Result::ok);
            lines.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
        });
        loop {
            match lines.recv_timeout(SILENCE) {
                Ok(line) => println!("{}", String::from_utf8_lossy(&line).trim_end_matches('\r')),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest has said nothing for {} s; it hangs", SILENCE.as_secs())
                }
            }
        }
        let _ = reader.join();
        let status = self.child.wait().context("wait for the guest")?;
        if status.success() { Ok(()) } else { bail!("the emulator ended with {status}") }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the guest said of the tests; without its last word it did not get to their end.
fn judge(said: &str) -> Result<()> {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.split_last() {
        Some((&DONE, [])) => Ok(()),
        Some((&DONE, failed)) => bail!("{}", failed.join(", ")),
        _ => bail!("the guest ended before the tests did"),
    }
}

/// Shows the end of the console.
fn show(console: &Path) {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    println!("--- the guest's console, whole in {}:", console.display());
    lines.iter().skip(lines.len().saturating_sub(CONSOLE_LINES)).for_each(|line| println!("{line}"));
    println!("---");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_came_to_its_end_without_a_failure_is_good() {
        assert!(judge("done\r\n").is_ok());
        assert_eq!(judge("kernel failed\r\ndone\r\n").expect_err("a failure").to_string(), "kernel failed");
        assert!(judge("").is_err() && judge("kernel failed\n").is_err());
    }
}
