//! Clients and servers.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use crate::netns::{Netns, succeeds};

/// A client that opens a connection for each request, as `curl` in a loop does.
pub fn client() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(10)))
        .max_idle_connections(0)
        .build();
    config.into()
}

/// One request; the answer's text.
pub fn get(client: &ureq::Agent, to: SocketAddr, path: &str) -> Result<String, String> {
    let url = format!("http://{to}{path}");
    let answer = client.get(&url).header("connection", "close").call();
    let text = answer.and_then(|mut answer| answer.body_mut().read_to_string());
    text.map_err(|error| format!("{url}: {error}"))
}

/// Requests from a namespace, one after another; the answers.
pub fn requests(netns: &Netns, to: IpAddr, count: usize) -> Vec<String> {
    netns.enter(|| {
        let client = client();
        let to = SocketAddr::new(to, 80);
        (0..count)
            .map(|_| get(&client, to, "/").unwrap_or_else(|error| panic!("{error}")).trim().to_owned())
            .collect()
    })
}

/// A request and its answer, on a connection that stays open.
///
/// # Errors
/// The connection has ended, or nothing comes in time.
pub fn request_over(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")?;
    let mut answer = [0; 4096];
    match stream.read(&mut answer)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        length => Ok(String::from_utf8_lossy(&answer[..length]).into_owned()),
    }
}

/// Answers in whole turns of so many tasks, each of which gives as many.
///
/// A task that knows the client's port through another node, or did in the last minute, is passed over, which happens to a connection
/// in some thousands; and a SYN that is sent again on a busy machine goes to the next task. So it is asked three times at most.
///
/// # Panics
/// The turns are never exact.
pub fn in_turns(tasks: usize, ask: impl Fn() -> Vec<String>) -> Vec<String> {
    let mut tries: Vec<Vec<String>> = Vec::new();
    for _ in 0..3 {
        let answers = ask();
        let counts = tally(&answers);
        if counts.len() == tasks && counts.values().all(|count| count * tasks == answers.len()) {
            return answers;
        }
        tries.push(answers);
    }
    panic!("no turns of {tasks} tasks are exact: {tries:?}");
}

/// How often each answer was given.
pub fn tally(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.as_str()).or_default() += 1;
    }
    counts
}

/// Load in the background: requests to one address until it is stopped or a number is reached.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<Vec<String>>>,
}

impl Load {
    /// Starts `threads` clients in a namespace; they end by themselves after `limit` requests in all.
    pub fn start(netns: &Netns, to: IpAddr, threads: usize, limit: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let failed = Arc::new(AtomicU64::new(0));
        let threads = (0..threads)
            .map(|_| {
                let (stop, done, failed) = (stop.clone(), done.clone(), failed.clone());
                netns.spawn(move || {
                    let client = client();
                    let mut errors = Vec::new();
                    while !stop.load(Ordering::Relaxed) && done.fetch_add(1, Ordering::Relaxed) < limit {
                        if let Err(error) = get(&client, SocketAddr::new(to, 80), "/") {
                            if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                                println!("the first request that failed: {error}");
                            }
                            errors.push(error);
                        }
                    }
                    errors
                })
            })
            .collect();
        Self { stop, done, failed, threads }
    }

    /// Requests made so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Requests that failed so far.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Waits for the limit; what failed.
    pub fn finish(self) -> Vec<String> {
        self.threads.into_iter().flat_map(|thread| thread.join().expect("a client")).collect()
    }

    /// Ends it; what failed.
    pub fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }
}

/// Numbered datagrams at a steady pace from one port, whether or not the ones before were answered: whoever echoes them
/// (see [`echo`]) is to answer each once.
pub struct Paced {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    sender: std::thread::JoinHandle<u64>,
    receiver: std::thread::JoinHandle<BTreeMap<u64, u32>>,
}

/// What became of numbered datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Sent.
    pub sent: u64,
    /// Of those, not answered.
    pub lost: u64,
    /// Answers to what was answered before.
    pub doubled: u64,
}

impl Paced {
    /// Starts to send.
    pub fn start(netns: &Netns, to: SocketAddr, pace: Duration) -> Self {
        let socket = netns.enter(|| {
            let any: SocketAddr =
                if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
            let socket = UdpSocket::bind(any).expect("bind");
            socket.connect(to).expect("connect");
            // The last answers have this time to come.
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
            socket
        });
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sender = std::thread::spawn({
            let (socket, stop) = (socket.try_clone().expect("share the socket"), stop.clone());
            move || {
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    socket.send(number.to_string().as_bytes()).expect("send");
                    number += 1;
                    std::thread::sleep(pace);
                }
                number
            }
        });
        let receiver = std::thread::spawn({
            let (stop, count) = (stop.clone(), answered.clone());
            move || {
                let (mut answers, mut buffer) = (BTreeMap::new(), [0; 256]);
                loop {
                    match socket.recv(&mut buffer) {
                        Ok(length) => {
                            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                            let number = text.split(' ').nth(1).and_then(|number| number.parse().ok());
                            *answers.entry(number.expect("an echo")).or_default() += 1;
                            count.store(answers.len() as u64, Ordering::Relaxed);
                        }
                        Err(_) if stop.load(Ordering::Relaxed) => return answers,
                        Err(_) => {}
                    }
                }
            }
        });
        Self { stop, answered, sender, receiver }
    }

    /// How many were answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Sends no more, waits for the last answers, and says what became of all.
    pub fn stop(self) -> Counted {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("the sender");
        let answers = self.receiver.join().expect("the receiver");
        let doubled = answers.values().map(|count| u64::from(count - 1)).sum();
        Counted { sent, lost: sent - answers.len() as u64, doubled }
    }
}

/// The SHA-256 of some bytes.
pub fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Serves one TCP connection on port 8080 of every address: answers with the hash of what it receives until the
/// client stops sending.
pub fn hash_one_upload() {
    let listener = listen("[::]:8080");
    let (mut stream, _) = listener.accept().expect("a client");
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer).expect("read") {
            0 => break,
            length => sum.update(&buffer[..length]),
        }
    }
    stream.write_all(&sum.finalize()).expect("write");
}

/// Sends bytes to a port and reads the answer.
pub fn upload(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(to).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set a time limit");
    stream.write_all(bytes).expect("write");
    stream.shutdown(std::net::Shutdown::Write).expect("stop sending");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("read");
    answer
}

/// Echoes UDP datagrams on a port with a name before them, until told to stop by an empty one.
pub fn echo(port: u16, name: &str) {
    let bind = || UdpSocket::bind(("::", port)).map_err(|error| error.to_string());
    let socket = succeeds(Duration::from_secs(10), &format!("bind port {port}"), bind);
    let mut buffer = [0; 9000];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).expect("receive");
        if length == 0 {
            return;
        }
        let answer =
            [name.as_bytes(), b" ", &buffer[..length], b" ", from.ip().to_canonical().to_string().as_bytes()]
                .concat();
        socket.send_to(&answer, from).expect("send");
    }
}

/// Tells a task's [`echo`] to stop.
pub fn stop_echo(task: &Netns, port: u16) {
    task.enter(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
        socket.send_to(&[], ("127.0.0.1", port)).expect("send");
    });
}

/// Has a socket let its datagrams of IPv4 be cut, and believe no error about them (`ip(7)`).
pub fn let_be_cut(socket: &UdpSocket) {
    let value = libc::IP_PMTUDISC_OMIT;
    let (at, length) = ((&raw const value).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the option's value is a number, and the socket lives.
    let done = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            at,
            length,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// One datagram from a new port, and its answer if one comes soon.
pub fn ask(to: SocketAddr, text: &str) -> Option<String> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = UdpSocket::bind(any).expect("bind");
    socket.set_read_timeout(Some(Duration::from_millis(1_500))).expect("set a time limit");
    socket.send_to(text.as_bytes(), to).expect("send");
    let mut buffer = [0; 9000];
    let (length, from) = socket.recv_from(&mut buffer).ok()?;
    assert_eq!(from, to, "the answer comes from the listener");
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// What the kernel says of a datagram that nobody wants, if an error comes back.
pub fn refusal(to: SocketAddr) -> Option<std::io::ErrorKind> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = UdpSocket::bind(any).expect("bind");
    socket.connect(to).expect("connect");
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
    socket.send(b"anybody?").expect("send");
    socket.recv(&mut [0; 16]).err().map(|error| error.kind())
}

/// One datagram from a new port, and its answer.
pub fn exchange(to: SocketAddr, text: &str) -> String {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = UdpSocket::bind(any).expect("bind");
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
    socket.send_to(text.as_bytes(), to).expect("send");
    let mut buffer = [0; 9000];
    let (length, from) = socket.recv_from(&mut buffer).expect("an answer");
    assert_eq!(from, to, "the answer comes from the listener");
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// Datagrams from one port, a pause between each two, and their answers.
pub fn converse(to: SocketAddr, rounds: usize, pause: Duration) -> Vec<String> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = UdpSocket::bind(any).expect("bind");
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a time limit");
    let mut buffer = [0; 2048];
    let mut round = |number| {
        socket.send_to(format!("round{number}").as_bytes(), to).expect("send");
        let (length, _) =
            socket.recv_from(&mut buffer).unwrap_or_else(|error| panic!("round {number}: {error}"));
        std::thread::sleep(pause);
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    (0..rounds).map(&mut round).collect()
}

/// A stream of bytes that no compression and no repetition makes easy, a buffer at a time.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// Writes so many megabytes of noise; the hash of what was written.
fn write_noise(stream: &mut TcpStream, megabytes: usize) -> [u8; 32] {
    let (mut noise, mut sum) = (Noise(0x9e37_79b9_7f4a_7c15), Sha256::new());
    let mut buffer = vec![0; 1_000_000];
    for _ in 0..megabytes {
        noise.fill(&mut buffer);
        sum.update(&buffer);
        stream.write_all(&buffer).expect("write");
    }
    sum.finalize().into()
}

/// Reads to the end, or until nothing came for a minute; the hash of what was read and its length.
fn read_hash(stream: &mut TcpStream) -> ([u8; 32], usize) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set a time limit");
    let (mut sum, mut total, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 18]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (sum.finalize().into(), total),
            Ok(length) => {
                sum.update(&buffer[..length]);
                total += length;
            }
            // A read with a time limit is not resumed by the kernel after a signal.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("read: {error}"),
        }
    }
}

/// Listens at an address of this namespace. A program that another test is starting holds copies of all descriptors until it runs:
/// what listened there before is gone a moment after it was closed.
pub fn listen(address: &str) -> TcpListener {
    let bind = || TcpListener::bind(address).map_err(|error| error.to_string());
    succeeds(Duration::from_secs(10), &format!("listen at {address}"), bind)
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the task.
    Up,
    /// From the task to the client.
    Down,
}

/// Sends megabytes between a client and a task that listens on port 8080, and compares the hashes of both ends.
pub fn transfer(client: &Netns, task: &Netns, to: SocketAddr, direction: Direction, megabytes: usize) {
    let listener = task.enter(|| listen("[::]:8080"));
    let server = task.spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        match direction {
            Direction::Up => read_hash(&mut stream),
            Direction::Down => (write_noise(&mut stream, megabytes), megabytes * 1_000_000),
        }
    });
    let there = client.enter(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10)).expect("connect");
        match direction {
            Direction::Up => {
                let sum = write_noise(&mut stream, megabytes);
                stream.shutdown(std::net::Shutdown::Write).expect("stop sending");
                // Until the task has read it all and closes.
                let _ = stream.read(&mut [0; 1]);
                (sum, megabytes * 1_000_000)
            }
            Direction::Down => read_hash(&mut stream),
        }
    });
    assert_eq!(there, server.join().expect("the server"), "{direction:?} to {to}");
}

/// TCP segments sent and sent again in a namespace so far, by the kernel's counters.
pub fn segments(netns: &Netns) -> (u64, u64) {
    (kernel_counter(netns, "snmp", "Tcp:", "OutSegs"), kernel_counter(netns, "snmp", "Tcp:", "RetransSegs"))
}

/// TCP segments that came to a namespace a second time so far, by the kernel's counters: its answers said so (RFC 2883).
pub fn repeated(netns: &Netns) -> u64 {
    kernel_counter(netns, "netstat", "TcpExt:", "TCPDSACKOldSent")
        + kernel_counter(netns, "netstat", "TcpExt:", "TCPDSACKOfoSent")
}

/// SYNs that a namespace has sent again so far, by the kernel's counters.
pub fn syns_repeated(netns: &Netns) -> u64 {
    kernel_counter(netns, "netstat", "TcpExt:", "TCPSynRetrans")
}

/// Where a namespace's kernel lost packets so far: its links' and its stack's counters of that which are not zero.
pub fn losses(netns: &Netns) -> String {
    let mut lost = Vec::new();
    let links = netns.output("ip", &["-s", "-j", "link", "show"]);
    let links: serde_json::Value = serde_json::from_str(&links).expect("the links as JSON");
    for link in links.as_array().into_iter().flatten() {
        for way in ["rx", "tx"] {
            let counters = link["stats64"][way].as_object().expect("counters");
            for (name, count) in counters {
                if !["bytes", "packets", "multicast"].contains(&name.as_str()) && *count != 0 {
                    lost.push(format!("{} {way} {name} {count}", link["ifname"]));
                }
            }
        }
    }
    for line in netns.output("nstat", &["-asz"]).lines() {
        let mut fields = line.split_whitespace();
        let (Some(name), Some(count)) = (fields.next(), fields.next()) else { continue };
        let says =
            ["Drop", "Discard", "Overflow", "Retrans", "Error", "Rejected", "Fail", "InErrs", "OutRsts"];
        if count != "0" && says.iter().any(|word| name.contains(word)) {
            lost.push(format!("{name} {count}"));
        }
    }
    lost.join(", ")
}

/// A counter of a namespace in a file of `/proc/net` that has a line of names and one of values.
fn kernel_counter(netns: &Netns, file: &str, line: &str, name: &str) -> u64 {
    let path = format!("/proc/thread-self/net/{file}");
    let text = netns.enter(|| std::fs::read_to_string(path).expect("the counters"));
    let mut lines = text.lines().filter(|text| text.starts_with(line));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let at = names.split(' ').position(|field| field == name).expect("a counter");
    values.split(' ').nth(at).and_then(|value| value.parse().ok()).expect("a number")
}

/// A UDP socket that never lets the kernel fragment what it sends.
pub struct Probe {
    socket: UdpSocket,
    v4: bool,
}

impl Probe {
    /// Connects it.
    pub fn new(to: SocketAddr) -> Self {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
        let socket = UdpSocket::bind(any).expect("bind");
        socket.connect(to).expect("connect");
        socket.set_read_timeout(Some(Duration::from_millis(500))).expect("set a time limit");
        let probe = Self { socket, v4: to.is_ipv4() };
        // IP_MTU_DISCOVER, IPV6_MTU_DISCOVER: "do".
        let (level, option) = if probe.v4 { (libc::IPPROTO_IP, 10) } else { (libc::IPPROTO_IPV6, 23) };
        let on: libc::c_int = 2;
        // SAFETY: the option's value is an int that lives across the call.
        let done = unsafe {
            libc::setsockopt(probe.fd(), level, option, (&raw const on).cast(), size_of_val(&on) as u32)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        probe
    }

    fn fd(&self) -> libc::c_int {
        std::os::fd::AsRawFd::as_raw_fd(&self.socket)
    }

    /// The path's MTU as the kernel has it.
    pub fn mtu(&self) -> i32 {
        let (level, option) = if self.v4 { (libc::IPPROTO_IP, 14) } else { (libc::IPPROTO_IPV6, 24) };
        let mut mtu: libc::c_int = 0;
        let mut length = size_of_val(&mtu) as u32;
        // SAFETY: the value and its length live across the call.
        let done =
            unsafe { libc::getsockopt(self.fd(), level, option, (&raw mut mtu).cast(), &raw mut length) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        mtu
    }

    /// Sends a datagram whose packet has so many bytes; the length of the answer, if one comes.
    pub fn send(&self, packet: usize) -> Option<usize> {
        let payload = vec![b'x'; packet - if self.v4 { 28 } else { 48 }];
        // Too long for what is known of the path already, or an error that came meanwhile.
        self.socket.send(&payload).ok()?;
        self.socket.recv(&mut [0; 9000]).ok()
    }

    /// Finds the path's MTU as applications do: sends the longest packet that may pass until one is answered.
    pub fn find_mtu(&self) -> usize {
        for _ in 0..10 {
            let mtu = self.mtu() as usize;
            if self.send(mtu).is_some() && self.mtu() as usize == mtu {
                return mtu;
            }
        }
        panic!("no path MTU was found, the last was {}", self.mtu());
    }
}
