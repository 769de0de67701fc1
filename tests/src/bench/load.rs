//! Clients that make load, and what it costs the machine: connections one after the other, requests at a fixed rate.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddrV4, TcpStream},
    thread,
    time::{Duration, Instant},
};

use super::figure::{IDLE, NICE, STOLEN, WAITING, processor_times};
use crate::netns::Netns;

/// Clients at a time, each a thread.
const THREADS: usize = 16;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

const ONCE: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
const AGAIN: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
/// How an answer ends.
const END: &[u8] = b"\r\n\r\nhello\n";

/// One connection with one request: opened, answered, closed by the server, so that the client's port is free again.
fn connection(to: SocketAddrV4) -> io::Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(ONCE)?;
    let mut answer = Vec::with_capacity(512);
    stream.read_to_end(&mut answer)?;
    if answer.ends_with(END) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn connect(to: SocketAddrV4) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One request on a connection that stays.
fn request(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(AGAIN)?;
    let mut answer = [0; 512];
    let mut length = 0;
    while !answer[..length].ends_with(END) {
        match stream.read(&mut answer[length..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => length += more,
        }
    }
    Ok(())
}

/// What came of many connections or requests.
#[derive(Debug, Default)]
struct Tally {
    done: u64,
    failed: Vec<io::Error>,
}

impl Tally {
    fn add(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.done += 1,
            Err(error) => self.failed.push(error),
        }
    }

    /// How many were done, nearly all of which must have been; a figure made of failures says nothing.
    fn judge(each: Vec<Self>, netns: &Netns) -> u64 {
        let done = each.iter().map(|tally| tally.done).sum();
        let failed: Vec<io::Error> = each.into_iter().flat_map(|tally| tally.failed).collect();
        if let Some(error) = failed.first() {
            eprintln!("from {}: {} failed, {done} did not: {error}", netns.name(), failed.len());
        }
        assert!(failed.len() as u64 <= done / 1_000, "{} failed, {done} did not", failed.len());
        done
    }
}

/// Opens connections for some time as fast as it goes, to the targets in turn; how many.
pub fn connections(netns: &Netns, targets: &[SocketAddrV4], time: Duration) -> u64 {
    let each = in_threads(netns, |number| {
        let (begin, mut tally) = (Instant::now(), Tally::default());
        while begin.elapsed() < time {
            tally.add(connection(targets[(number + tally.done as usize) % targets.len()]));
        }
        tally
    });
    Tally::judge(each, netns)
}

/// What is done at a fixed rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A connection with one request.
    Connection,
    /// A request on a connection that stays.
    Request,
}

/// Does something so many times a second; how long each took, in microseconds, from the time at which it was due: what
/// comes late because others did counts as long.
pub fn paced(netns: &Netns, targets: &[SocketAddrV4], step: Step, rate: u32, time: Duration) -> Vec<f64> {
    let interval = Duration::from_secs(1) / rate;
    let begin = Instant::now() + Duration::from_millis(20);
    let each = in_threads(netns, |number| {
        exact_timers();
        let kept = || connect(targets[number % targets.len()]).expect("connect");
        let mut stream = (step == Step::Request).then(kept);
        let (mut took, mut tally) = (vec![], Tally::default());
        for turn in (number..).step_by(THREADS) {
            let due = begin + interval * turn as u32;
            if due > begin + time {
                return (took, tally);
            }
            thread::sleep(due.saturating_duration_since(Instant::now()));
            tally.add(match &mut stream {
                Some(stream) => request(stream),
                None => connection(targets[turn % targets.len()]),
            });
            took.push(due.elapsed().as_nanos() as f64 / 1_000.0);
        }
        unreachable!("the time ends")
    });
    let (took, tallies): (Vec<_>, Vec<_>) = each.into_iter().unzip();
    Tally::judge(tallies, netns);
    let mut took: Vec<f64> = took.into_iter().flatten().collect();
    took.sort_by(f64::total_cmp);
    took
}

/// Has this thread woken when it asked to be, not up to 50 microseconds later.
fn exact_timers() {
    // SAFETY: this option of prctl takes a number alone.
    let done = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

fn in_threads<T: Send>(netns: &Netns, client: impl Fn(usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let client = &client;
        let start = |number| scope.spawn(move || netns.enter(|| client(number)));
        let threads: Vec<_> = (0..THREADS).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client")).collect()
    })
}

/// Does something, and says how much processor time the whole machine took meanwhile: clients, servers and the kernel on
/// behalf of nobody, by what its processors were not idle.
pub fn watch<T>(body: impl FnOnce() -> T) -> (T, Duration) {
    let (idle, begin) = (idle(), Instant::now());
    let result = body();
    let wall = begin.elapsed() * thread::available_parallelism().map_or(1, |count| count.get() as u32);
    (result, wall.saturating_sub(self::idle() - idle))
}

/// Processor time that nobody here used; nothing here is nice. The kernel counts idle time exactly, all other by what is there at each tick.
fn idle() -> Duration {
    let times = processor_times();
    Duration::from_millis(10 * [NICE, IDLE, WAITING, STOLEN].map(|which| times[which]).iter().sum::<u64>())
}
