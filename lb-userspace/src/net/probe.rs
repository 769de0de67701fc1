//! Whether the datapaths of other nodes are there, and how long a packet their way lets pass: each is sent probes through the
//! tunnel's port, which it sends back without its controller's help.
//!
//! So a node whose controller is being restarted counts as there, and one that is off, cut off, or without a datapath
//! does not, whatever its controller or the cluster's managers think of it.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lb_common::tunnel::{
    CRITICAL, DATA_WORDS, OPTION_CLASS, PROBE, PROBE_ANSWER, VERSION, VERSION_AND_LENGTH, VERSION_KEYED,
    overhead, uplink_mtu,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::UdpSocket,
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use super::path_mtu::{PACE, PathMtu};

/// Geneve's header and our option.
const BYTES: usize = 8 + 24;
/// Where an answer says what the node's uplink lets pass: in the virtual network.
const NETWORK: std::ops::Range<usize> = 4..8;
/// What ways are asked for at least, in bytes: nobody is believed who says that his uplink lets less pass.
const LEAST: u32 = 576;
/// Where the length of the packet stands, if that is what is asked for: in the option's port.
const LENGTH: std::ops::Range<usize> = 14..16;
/// Where the cookie stands, if there is one: in the first half of the option's address.
const COOKIE: std::ops::Range<usize> = 16..24;
/// Where the nonce stands: in the second half.
const NONCE: std::ops::Range<usize> = 24..32;
/// Probes that may be lost before a node counts as silent.
const TRIES: u32 = 6;
/// A node that was not heard yet is asked this often at the start.
const EAGER: Duration = Duration::from_millis(50);
/// Nodes that are asked at once, before answers are taken.
const BURST: usize = 64;
/// Room for answers that wait for a controller that is busy, in bytes of the kernel's memory: those of thousands of nodes.
const ROOM: libc::c_int = 8 << 20;

/// How a node is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The longest packet that this machine can send there, in bytes.
    pub mtu: u32,
    /// The longest that was known to arrive before anybody was asked.
    pub known: Option<u32>,
    /// The cookie of packets to it; zero if they have none.
    pub cookie: u64,
}

/// What is known of a node.
#[derive(Clone, Debug)]
struct Peer {
    /// The cookie of packets to it.
    cookie: u64,
    /// When it was asked first.
    asked: Instant,
    /// When it last answered.
    heard: Option<Instant>,
    /// Whether it counted as there when somebody was last told.
    there: bool,
    /// How long a packet its way lets pass.
    path: PathMtu,
    /// How long a packet its uplink lets pass, in bytes, if it says so: what it sends to clients for other nodes leaves by that.
    uplink: Option<u32>,
}

impl Peer {
    /// The longest packet that may be sent there, in bytes with the tunnel's headers.
    fn mtu(&self, v4: bool) -> u32 {
        let path = self.path.mtu();
        self.uplink.map_or(path, |uplink| path.min(uplink + u32::from(overhead(v4))))
    }
}

struct Shared {
    peers: Mutex<BTreeMap<IpAddr, Peer>>,
    timeout: Duration,
    /// Told when there is somebody new to ask.
    followed: Notify,
    /// Told when ways are to be looked at again.
    doubted: Notify,
}

impl Shared {
    fn peers(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks nodes whether they are there, until it is dropped.
pub struct Prober {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
    port: u16,
    /// Whether it has the tunnel's own port.
    bound: bool,
}

impl Prober {
    /// Starts asking through an interface. The answers come to the tunnel's own port if that is free, so that a filter that
    /// lets the tunnel pass lets them pass too. `changed` is told when a node fell silent or was heard again, or its way lets
    /// pass what it did not, or not what it did.
    ///
    /// # Errors
    /// No socket is to be had.
    pub fn start(
        interface: &str,
        port: u16,
        timeout: Duration,
        changed: mpsc::Sender<()>,
    ) -> io::Result<Self> {
        let v4 = socket(Domain::IPV4, interface, port)?;
        // A kernel without IPv6 has no peers to ask by it.
        let v6 = socket(Domain::IPV6, interface, port).ok();
        let bound = v4.local_addr()?.port() == port;
        let shared = Arc::new(Shared {
            peers: Mutex::default(),
            timeout,
            followed: Notify::new(),
            doubted: Notify::new(),
        });
        let work = ask(v4, v6, port, shared.clone(), changed);
        Ok(Self { shared, task: tokio::spawn(work), port, bound })
    }

    /// Whether it asks this port of the tunnel.
    pub fn asks(&self, port: u16) -> bool {
        self.port == port
    }

    /// Whether it has the tunnel's port of this machine; another program has it else.
    pub fn has_port(&self) -> bool {
        self.bound
    }

    /// Asks exactly these nodes from now on.
    pub fn follow(&self, nodes: &BTreeMap<IpAddr, Wanted>) {
        let (mut peers, now) = (self.shared.peers(), Instant::now());
        peers.retain(|address, _| nodes.contains_key(address));
        for (address, Wanted { mtu, known, cookie }) in nodes {
            let (v4, mtu) = (address.is_ipv4(), (*mtu).min(u16::MAX.into()));
            let peer = peers.entry(*address).or_insert_with(|| {
                self.shared.followed.notify_one();
                let path = PathMtu::new(mtu, *known, v4, now);
                Peer { cookie: *cookie, asked: now, heard: None, there: false, path, uplink: None }
            });
            if std::mem::replace(&mut peer.cookie, *cookie) != *cookie {
                // It may take this one where it did not take the last.
                self.shared.followed.notify_one();
            }
            peer.path.set_route(mtu, v4, now);
        }
    }

    /// The longest packets that the ways to nodes let pass, and out of the tunnel on to clients, in bytes.
    pub fn mtus(&self) -> BTreeMap<IpAddr, u32> {
        let peers = self.shared.peers();
        peers.iter().map(|(address, peer)| (*address, peer.mtu(address.is_ipv4()))).collect()
    }

    /// There is reason to look at the ways again: somebody says that a packet was too long.
    pub fn doubt(&self) {
        let now = Instant::now();
        self.shared.peers().values_mut().for_each(|peer| peer.path.doubt(now));
        self.shared.doubted.notify_one();
    }

    /// Waits until every node has answered, until `deadline` at most.
    pub async fn settle(&self, deadline: Instant) {
        while Instant::now() < deadline && self.shared.peers().values().any(|peer| peer.heard.is_none()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The nodes that do not answer, and since when in words.
    pub fn silent(&self) -> BTreeMap<IpAddr, String> {
        let now = Instant::now();
        let peers = self.shared.peers();
        let silent = peers.iter().filter(|(_, peer)| !is_there(peer, now, self.shared.timeout));
        silent.map(|(address, peer)| (*address, words(*address, peer, now, self.port))).collect()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What came of a single probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The datapath there answers.
    Answered,
    /// The machine says that nobody takes packets to this port.
    NobodyThere,
    /// This machine's own packet filter does not let it out.
    Forbidden,
    /// Nothing comes back.
    Silent,
}

/// Asks a node's datapath whether it is there, a few times, with the cookie of packets to it or with none (zero).
pub async fn ask_once(
    interface: &str,
    (address, port): (IpAddr, u16),
    cookie: u64,
    patience: Duration,
) -> Asked {
    let asked = async {
        // Any port: the tunnel's own is the agent's.
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = socket(domain, interface, 0)?;
        socket.connect(SocketAddr::new(address, port)).await?;
        let nonce = RandomState::new().hash_one(interface).to_be_bytes();
        let mut buffer = [0; 256];
        loop {
            socket.send(&probe(nonce, cookie)).await?;
            match tokio::time::timeout(patience / 4, socket.recv(&mut buffer)).await {
                Ok(received) => {
                    let bytes = &buffer[..received?];
                    if bytes.len() >= BYTES && bytes[10] == PROBE_ANSWER && bytes[NONCE] == nonce {
                        return io::Result::Ok(());
                    }
                }
                Err(_) => continue,
            }
        }
    };
    match tokio::time::timeout(patience, asked).await {
        Ok(Ok(())) => Asked::Answered,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Asked::NobodyThere,
        Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => Asked::Forbidden,
        _ => Asked::Silent,
    }
}

fn is_there(peer: &Peer, now: Instant, timeout: Duration) -> bool {
    peer.heard.is_some_and(|heard| now.duration_since(heard) < timeout)
}

fn words(address: IpAddr, peer: &Peer, now: Instant, port: u16) -> String {
    match peer.heard {
        // Coarse, so that a table that is compared with its last version does not change each second.
        Some(_) => {
            format!("the datapath at {address} has fallen silent: no probe to UDP port {port} comes back")
        }
        None if now.duration_since(peer.asked) < Duration::from_secs(1) => {
            format!("the datapath at {address} has not answered yet")
        }
        None => format!(
            "no datapath answers at {address}: is lb-userspace attached there, and does UDP port {port} pass?"
        ),
    }
}

/// A socket bound to the interface, on the tunnel's port or on any.
fn socket(domain: Domain, interface: &str, port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind_device(Some(interface.as_bytes()))?;
    // No SO_REUSEADDR: with it any user of this machine could bind one of its addresses, and take the answers.
    socket.set_nonblocking(true)?;
    // As long as the device takes, whatever was heard of the way, and never in pieces.
    if domain == Domain::IPV4 {
        option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
    } else {
        option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
    }
    // Beyond what a process may ask for; who may not have it has fewer nodes, or loses some answers.
    let _ = option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM);
    // The datapath that answers does not sum up: a sum of zero says so (RFC 768, RFC 6936).
    let any: IpAddr = if domain == Domain::IPV4 {
        option(&socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)?;
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        socket.set_only_v6(true)?;
        option(&socket, libc::SOL_UDP, UDP_NO_CHECK6_TX, 1)?;
        option(&socket, libc::SOL_UDP, UDP_NO_CHECK6_RX, 1)?;
        Ipv6Addr::UNSPECIFIED.into()
    };
    if socket.bind(&SocketAddr::new(any, port).into()).is_err() {
        // Somebody else's: answers come to any port.
        socket.bind(&SocketAddr::new(any, 0).into())?;
    }
    UdpSocket::from_std(socket.into())
}

/// From `linux/udp.h`.
const UDP_NO_CHECK6_TX: libc::c_int = 101;
/// From `linux/udp.h`.
const UDP_NO_CHECK6_RX: libc::c_int = 102;

fn option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is an int that lives through the call.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the node that answers says of its uplink.
fn uplink_of(answer: &[u8]) -> Option<u32> {
    let network = answer[NETWORK].try_into().ok().map(u32::from_ne_bytes)?;
    uplink_mtu(network).map(|mtu| mtu.max(LEAST))
}

/// A probe as the tunnel carries it: Geneve and our option, nothing inside.
fn probe(nonce: [u8; 8], cookie: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[0] = VERSION_AND_LENGTH;
    bytes[1] = CRITICAL;
    // The option names the kind; the inner protocol must only be one that is known.
    bytes[2..4].copy_from_slice(&0x0800_u16.to_be_bytes());
    bytes[8..10].copy_from_slice(&OPTION_CLASS.get().to_be_bytes());
    bytes[10] = PROBE;
    bytes[11] = DATA_WORDS;
    bytes[12] = if cookie == 0 { VERSION } else { VERSION_KEYED };
    bytes[COOKIE].copy_from_slice(&cookie.to_le_bytes());
    bytes[NONCE].copy_from_slice(&nonce);
    bytes
}

/// The same, so long that the packet has this length, in bytes from the IP header on. The answer is as long.
fn padded(probe: [u8; BYTES], address: IpAddr, length: u32) -> Vec<u8> {
    let headers = if address.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let mut bytes = probe.to_vec();
    bytes[LENGTH].copy_from_slice(&(length as u16).to_be_bytes());
    bytes.resize((length as usize).saturating_sub(headers).max(BYTES), 0);
    bytes
}

async fn ask(
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    port: u16,
    shared: Arc<Shared>,
    changed: mpsc::Sender<()>,
) {
    let interval = shared.timeout / TRIES;
    // One for each node: none can answer for another.
    let secret = RandomState::new();
    let nonce = |address: IpAddr| secret.hash_one(address).to_be_bytes();
    let (mut first, mut second) = ([0; 256], [0; 256]);
    let mut due = Instant::now();
    // Who is still to be asked in this round, by a packet of which length if that matters, and with which cookie.
    let mut round: Vec<(IpAddr, u32, u64)> = Vec::new();
    // When ways are looked at next.
    let mut paced = Instant::now();
    loop {
        let heard = tokio::select! {
            // Answers first: they are dropped where they find no room.
            biased;
            received = v4.recv_from(&mut first) => received.map(|(count, from)| (from, &first[..count])),
            received = receive(v6.as_ref(), &mut second) => {
                received.map(|(count, from)| (from, &second[..count]))
            }
            () = shared.followed.notified() => {
                due = due.min(Instant::now() + EAGER);
                continue;
            }
            () = shared.doubted.notified() => {
                paced = paced.min(Instant::now() + PACE);
                continue;
            }
            () = std::future::ready(()), if !round.is_empty() => {
                for (address, length, cookie) in round.split_off(round.len().saturating_sub(BURST)) {
                    let socket = if address.is_ipv4() { Some(&v4) } else { v6.as_ref() };
                    let request = probe(nonce(address), cookie);
                    let request = if length == 0 { request.to_vec() } else { padded(request, address, length) };
                    if let Some(socket) = socket {
                        // What is not sent is not answered.
                        let _ = socket.send_to(&request, SocketAddr::new(address, port)).await;
                    }
                }
                // Others have work too.
                tokio::task::yield_now().await;
                continue;
            }
            () = tokio::time::sleep_until(due.into()) => {
                notice(&shared, &changed);
                let peers = shared.peers();
                let eager = |peer: &Peer| peer.heard.is_none() && peer.asked.elapsed() < interval;
                due = Instant::now() + if peers.values().any(eager) { EAGER.min(interval) } else { interval };
                round.extend(peers.iter().map(|(address, peer)| (*address, 0, peer.cookie)));
                continue;
            }
            () = tokio::time::sleep_until(paced.into()) => {
                let (mut peers, now) = (shared.peers(), Instant::now());
                let mut sought = false;
                for (address, peer) in peers.iter_mut().filter(|(_, peer)| is_there(peer, now, shared.timeout)) {
                    let (probes, cookie) = (peer.path.probes(now), peer.cookie);
                    round.extend(probes.into_iter().map(|length| (*address, length, cookie)));
                    sought |= peer.path.is_sought();
                }
                paced = now + if sought { PACE } else { interval };
                continue;
            }
        };
        let Ok((from, bytes)) = heard else {
            // An ICMP error that a probe came to.
            continue;
        };
        let address = from.ip().to_canonical();
        let answers = bytes.len() >= BYTES && bytes[10] == PROBE_ANSWER && bytes[NONCE] == nonce(address);
        if answers && let Some(peer) = shared.peers().get_mut(&address) {
            let (now, v4) = (Instant::now(), address.is_ipv4());
            let before = (peer.path.mtu(), peer.mtu(v4), peer.uplink);
            peer.heard = Some(now);
            peer.uplink = uplink_of(bytes);
            let length = u16::from_be_bytes([bytes[LENGTH.start], bytes[LENGTH.start + 1]]);
            if length > 0 {
                peer.path.answered(length.into(), now);
            }
            if !std::mem::replace(&mut peer.there, true) {
                // Its way is looked at at once.
                paced = now;
                let _ = changed.try_send(());
            }
            if peer.path.mtu() != before.0 {
                log::info!("the way to {address} lets packets of {} bytes pass", peer.path.mtu());
            }
            if peer.uplink != before.2
                && let Some(bytes) = peer.uplink
            {
                log::debug!("the uplink of the node at {address} lets packets of {bytes} bytes pass");
            }
            if peer.mtu(v4) != before.1 {
                let _ = changed.try_send(());
            }
        }
    }
}

async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    match socket {
        Some(socket) => socket.recv_from(buffer).await,
        None => std::future::pending().await,
    }
}

/// Tells who waits when a node fell silent or was heard.
fn notice(shared: &Shared, changed: &mpsc::Sender<()>) {
    let now = Instant::now();
    let mut news = false;
    for peer in shared.peers().values_mut() {
        let there = is_there(peer, now, shared.timeout);
        news |= there != peer.there;
        peer.there = there;
    }
    if news {
        // A full channel means that somebody is told already.
        let _ = changed.try_send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_packet_to_a_node_fits_its_way_and_then_its_uplink() {
        let now = Instant::now();
        let of = |network: [u8; 4]| {
            let mut answer = probe([0; 8], 0);
            answer[NETWORK].copy_from_slice(&network);
            let path = PathMtu::new(9_000, Some(9_000), true, now);
            let uplink = uplink_of(&answer);
            Peer { cookie: 0, asked: now, heard: None, there: true, path, uplink }.mtu(true)
        };
        assert_eq!(of([0; 4]), 9_000, "an agent that says nothing");
        assert_eq!(of([0, 0x05, 0xdc, 0]), 1_560);
        assert_eq!(of([0, 0x23, 0x28, 0]), 9_000, "the tunnel's headers do not fit");
        assert_eq!(of([0, 0, 1, 0]), 636, "nobody means that");
    }

    /// As any user of the machine can: a more specific address, a more specific device, every option that shares.
    #[tokio::test]
    async fn no_other_socket_takes_the_answers() {
        for (domain, own) in
            [(Domain::IPV4, IpAddr::from(Ipv4Addr::LOCALHOST)), (Domain::IPV6, Ipv6Addr::LOCALHOST.into())]
        {
            let Ok(prober) = socket(domain, "lo", 0) else {
                assert_eq!(domain, Domain::IPV6, "a kernel without IPv6");
                continue;
            };
            let port = prober.local_addr().unwrap().port();
            for (address, device) in [(own, false), (own, true), (prober.local_addr().unwrap().ip(), true)] {
                let thief = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap();
                thief.set_reuse_address(true).unwrap();
                thief.set_reuse_port(true).unwrap();
                if device {
                    thief.bind_device(Some(b"lo")).unwrap();
                }
                let stolen = thief.bind(&SocketAddr::new(address, port).into());
                let error = stolen.expect_err("the port is taken").kind();
                assert_eq!(error, io::ErrorKind::AddrInUse, "{address} {device}");
            }
            // What is sent there comes to the prober.
            let asker = std::net::UdpSocket::bind((own, 0)).unwrap();
            asker.send_to(b"x", (own, port)).unwrap();
            let mut buffer = [0; 8];
            let heard = tokio::time::timeout(Duration::from_secs(20), prober.recv_from(&mut buffer)).await;
            assert_eq!(heard.expect("it comes").unwrap().0, 1);
        }
    }
}
