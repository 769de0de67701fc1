//! Clients that make load, and what it costs the machine: connections one after the other, requests at a fixed rate.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddrV4, TcpStream},
    thread,
    time::{Duration, Instant},
};

use super::figure::{IDLE, STOLEN, WAITING, processor_times};
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
fn connection(to: SocketAddrV4) {
    let mut stream = connect(to);
    stream.write_all(ONCE).expect("send a request");
    let mut answer = Vec::with_capacity(512);
    stream.read_to_end(&mut answer).expect("read an answer");
    assert!(answer.ends_with(END), "{to}: {}", String::from_utf8_lossy(&answer));
}

fn connect(to: SocketAddrV4) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    stream.set_nodelay(true).expect("send at once");
    stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
    stream
}

/// One request on a connection that stays.
fn request(stream: &mut TcpStream) {
    stream.write_all(AGAIN).expect("send a request");
    let mut answer = [0; 512];
    let mut length = 0;
    while !answer[..length].ends_with(END) {
        let more = stream.read(&mut answer[length..]).expect("read an answer");
        assert!(more > 0, "the server has closed: {}", String::from_utf8_lossy(&answer[..length]));
        length += more;
    }
}

/// Opens connections for some time as fast as it goes, to the targets in turn; how many.
pub fn connections(netns: &Netns, targets: &[SocketAddrV4], time: Duration) -> u64 {
    let each = in_threads(netns, |number| {
        let (begin, mut done) = (Instant::now(), 0);
        while begin.elapsed() < time {
            connection(targets[(number + done as usize) % targets.len()]);
            done += 1;
        }
        done
    });
    each.into_iter().sum()
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
        let mut stream = (step == Step::Request).then(|| connect(targets[number % targets.len()]));
        let mut took = vec![];
        for turn in (number..).step_by(THREADS) {
            let due = begin + interval * turn as u32;
            if due > begin + time {
                return took;
            }
            thread::sleep(due.saturating_duration_since(Instant::now()));
            match &mut stream {
                Some(stream) => request(stream),
                None => connection(targets[turn % targets.len()]),
            }
            took.push(due.elapsed().as_nanos() as f64 / 1_000.0);
        }
        took
    });
    let mut took: Vec<f64> = each.into_iter().flatten().collect();
    took.sort_by(f64::total_cmp);
    took
}

/// Has this thread woken when it asked to be, not up to 50 microseconds later.
fn exact_timers() {
    // SAFETY: this option of prctl takes a number alone.
    let done = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn in_threads<T: Send>(netns: &Netns, client: impl Fn(usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let client = &client;
        let start = |number| scope.spawn(move || netns.enter(|| client(number)));
        let threads: Vec<_> = (0..THREADS).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client")).collect()
    })
}

/// What the machine does beside: processors that are busy while nothing is asked of it.
pub fn background() -> f64 {
    let time = Duration::from_millis(300);
    let ((), busy) = watch(|| thread::sleep(time));
    busy.as_secs_f64() / time.as_secs_f64()
}

/// Does something, and says how much processor time the whole machine took meanwhile: clients, servers and the kernel on
/// behalf of nobody, by what its processors were not idle.
pub fn watch<T>(body: impl FnOnce() -> T) -> (T, Duration) {
    let (idle, begin) = (idle(), Instant::now());
    let result = body();
    let wall = begin.elapsed() * thread::available_parallelism().map_or(1, |count| count.get() as u32);
    (result, wall.saturating_sub(self::idle() - idle))
}

/// Processor time that nobody here used. The kernel counts idle time exactly, all other by what is there at each tick.
fn idle() -> Duration {
    let times = processor_times();
    Duration::from_millis(10 * (times[IDLE] + times[WAITING] + times[STOLEN]))
}
