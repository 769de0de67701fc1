//! A network of the nodes' own beside the lan on which their clients are, as providers sell it and WireGuard makes it.
//!
//! ```text
//! client ── lan ── eth1 node1 eth2 ── private
//!              └── eth1 node2 eth2 ──┘
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _},
    thread::JoinHandle,
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};

use crate::{
    cluster::{Cluster, Node},
    netns::Netns,
};

/// The network. It goes when it is dropped.
pub struct Private {
    /// What carries frames; none carries packets.
    wire: Option<Netns>,
    /// What carries packets between tuns; ended by what closes.
    relay: Option<(File, JoinHandle<()>)>,
}

/// The interface by which nodes have it.
pub const INTERFACE: &str = "eth2";

impl Private {
    /// One with Ethernet, whose frames carry packets of so many bytes.
    pub fn wire(cluster: &Cluster, mtu: u32) -> Self {
        let wire = Netns::new("private");
        wire.ip("link add lanbr type bridge");
        wire.ip(&format!("link set lanbr mtu {mtu} up"));
        for node in &cluster.nodes {
            let port = Cluster::port(&node.netns);
            wire.ip(&format!("link add {port} type veth peer name {INTERFACE} netns {}", node.netns.name()));
            wire.ip(&format!("link set {port} mtu {mtu} master lanbr up"));
            join(node, mtu);
        }
        Self { wire: Some(wire), relay: None }
    }

    /// One without link headers, as WireGuard and Tailscale have it.
    pub fn tun(cluster: &Cluster, mtu: u32) -> Self {
        let tuns = cluster.nodes.iter().map(|node| {
            let tun = node.netns.enter(open_tun);
            join(node, mtu);
            (tun, [private4(node).octets().to_vec(), private6(node).octets().to_vec()])
        });
        let tuns: Vec<(File, [Vec<u8>; 2])> = tuns.collect();
        // No program that another test starts meanwhile holds its end open.
        let (ended, end) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let relay = std::thread::spawn(move || relay(&tuns, &File::from(ended)));
        Self { wire: None, relay: Some((File::from(end), relay)) }
    }

    /// The namespace of the wire.
    ///
    /// # Panics
    /// There is none.
    pub fn netns(&self) -> &Netns {
        self.wire.as_ref().expect("a wire")
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if let Some((end, relay)) = self.relay.take() {
            drop(end);
            let _ = relay.join();
        }
    }
}

/// A node's IPv4 address there.
pub fn private4(node: &Node) -> Ipv4Addr {
    let [.., last] = node.v4().octets();
    Ipv4Addr::new(10, 99, 0, last)
}

/// A node's IPv6 address there.
pub fn private6(node: &Node) -> Ipv6Addr {
    let [.., last] = node.v6().segments();
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, last)
}

/// The addresses of a node there, both families.
pub fn addresses(node: &Node) -> [IpAddr; 2] {
    [private4(node).into(), private6(node).into()]
}

fn join(node: &Node, mtu: u32) {
    let netns = &node.netns;
    netns.ip(&format!("link set {INTERFACE} mtu {mtu} up"));
    netns.ip(&format!("addr add {}/24 dev {INTERFACE}", private4(node)));
    netns.ip(&format!("addr add {}/64 dev {INTERFACE} nodad", private6(node)));
}

/// Makes a tun of the current namespace, and holds it.
fn open_tun() -> File {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("open /dev/net/tun");
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(INTERFACE.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request lives through the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "make a tun: {}", std::io::Error::last_os_error());
    tun
}

/// Passes packets to the tun whose address they are for, until the pipe closes.
fn relay(tuns: &[(File, [Vec<u8>; 2])], ended: &File) {
    let mut packet = vec![0; 65_536];
    loop {
        let mut polled: Vec<PollFd<'_>> =
            tuns.iter().map(|(tun, _)| PollFd::new(tun.as_fd(), PollFlags::POLLIN)).collect();
        polled.push(PollFd::new(ended.as_fd(), PollFlags::POLLIN));
        poll(&mut polled, PollTimeout::NONE).expect("poll");
        let is_ready = |polled: &PollFd<'_>| polled.revents().is_some_and(|events| !events.is_empty());
        if polled.last().is_some_and(is_ready) {
            return;
        }
        let ready: Vec<bool> = polled.iter().map(is_ready).collect();
        for ((tun, _), _) in tuns.iter().zip(ready).filter(|(_, ready)| *ready) {
            let Ok(count) = (&*tun).read(&mut packet) else { continue };
            let packet = &packet[..count];
            let destination = if packet[0] >> 4 == 4 { &packet[16..20] } else { &packet[24..40] };
            let to = tuns.iter().find(|(_, addresses)| addresses.iter().any(|known| known == destination));
            if let Some((to, _)) = to {
                // One that is down takes nothing.
                let _ = (&*to).write(packet);
            }
        }
    }
}
