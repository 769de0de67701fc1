//! An interface of a namespace as who is plugged into it sees it: whole frames, sent and received by a packet socket.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use crate::netns::Netns;

/// What is waited for a frame.
const PATIENCE: Duration = Duration::from_secs(3);

/// An open interface.
pub struct Wire {
    socket: OwnedFd,
    /// Its hardware address.
    pub mac: [u8; 6],
}

impl Wire {
    /// Opens an interface of a namespace.
    pub fn open(netns: &Netns, interface: &str) -> Self {
        let link: serde_json::Value =
            serde_json::from_str(&netns.output("ip", &["-j", "link", "show", interface])).expect("JSON");
        let mac = link[0]["address"].as_str().expect("an address").to_owned();
        let bytes: Vec<u8> =
            mac.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
        let socket = netns.enter(|| {
            let protocol = (libc::ETH_P_ALL as u16).to_be();
            // SAFETY: the descriptor that the kernel answers is this value's own.
            let socket = unsafe {
                let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into());
                assert!(fd >= 0, "open a packet socket (as root): {}", io::Error::last_os_error());
                OwnedFd::from_raw_fd(fd)
            };
            // SAFETY: all zeroes is an address; the fields that matter are set.
            let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            at.sll_family = libc::AF_PACKET as u16;
            at.sll_protocol = protocol;
            at.sll_ifindex = nix::net::if_::if_nametoindex(interface).expect("an interface") as i32;
            // SAFETY: the address lives across the call.
            let done =
                unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), size_of_val(&at) as u32) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
            socket
        });
        Self { socket, mac: bytes.try_into().expect("six bytes") }
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer lives across the call.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }

    /// The next frame that another machine has sent and that is wanted; none if it does not come.
    pub fn receive(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let until = Instant::now() + PATIENCE;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = until.checked_duration_since(Instant::now())?;
            let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: all buffers live across the calls, and their lengths are theirs.
            let length = unsafe {
                if libc::poll(&raw mut poll, 1, left.as_millis() as i32 + 1) <= 0 {
                    continue;
                }
                let mut from: libc::sockaddr_ll = std::mem::zeroed();
                let mut bytes = size_of_val(&from) as u32;
                let (to, room) = (buffer.as_mut_ptr().cast(), buffer.len());
                let got = libc::recvfrom(
                    self.socket.as_raw_fd(),
                    to,
                    room,
                    0,
                    (&raw mut from).cast(),
                    &raw mut bytes,
                );
                if got < 0 || from.sll_pkttype == libc::PACKET_OUTGOING {
                    continue;
                }
                got as usize
            };
            if wanted(&buffer[..length]) {
                return Some(buffer[..length].to_vec());
            }
        }
    }
}
