//! Floods: frames with forged sources, as fast as a socket takes them.

use std::{io, net::Ipv4Addr, os::fd::AsRawFd as _, time::Duration};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::{
    netns::Netns,
    packet::{Packet, Transport},
};

/// What a flood is made of.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// SYNs or datagrams.
    pub transport: Transport,
    /// Where it goes.
    pub to: (Ipv4Addr, u16),
    /// Hardware address of that.
    pub mac: [u8; 6],
    /// Frames, each from another source.
    pub frames: u32,
}

/// Frames given to the kernel at once.
const BATCH: u32 = 64;

impl Flood {
    /// Sends it out of `eth1` of a namespace; how long that took.
    pub fn send(self, netns: &Netns) -> Duration {
        netns.enter(|| {
            let begin = std::time::Instant::now();
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None)
                .expect("open a packet socket (as root)");
            let index = nix::net::if_::if_nametoindex("eth1").expect("eth1");
            // SAFETY: all zero is a valid address of this kind.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_ifindex = index as i32;
            address.sll_halen = 6;
            let mut frames: Vec<Vec<u8>> = (0..BATCH).map(|_| self.template()).collect();
            for number in 0..self.frames / BATCH {
                for (frame, offset) in frames.iter_mut().zip(0..) {
                    from(frame, number * BATCH + offset);
                }
                let mut vectors: Vec<libc::iovec> = frames
                    .iter_mut()
                    .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
                    .collect();
                let mut messages: Vec<libc::mmsghdr> = vectors
                    .iter_mut()
                    .map(|vector| {
                        // SAFETY: all zero is a valid message without anything.
                        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                        message.msg_hdr.msg_name = (&raw mut address).cast();
                        message.msg_hdr.msg_namelen = size_of_val(&address) as u32;
                        message.msg_hdr.msg_iov = vector;
                        message.msg_hdr.msg_iovlen = 1;
                        message
                    })
                    .collect();
                let mut sent = 0;
                while sent < messages.len() {
                    let rest = &mut messages[sent..];
                    // SAFETY: messages, vectors and frames live across the call.
                    let done = unsafe {
                        libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0)
                    };
                    match done {
                        done if done > 0 => sent += done as usize,
                        _ => match io::Error::last_os_error().raw_os_error() {
                            Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR) => std::thread::yield_now(),
                            error => panic!("send: {error:?}"),
                        },
                    }
                }
            }
            begin.elapsed()
        })
    }

    /// A frame whose source is yet to be written; of its checksums the sums without that.
    fn template(&self) -> Vec<u8> {
        let packet =
            Packet::new(self.transport, (Ipv4Addr::UNSPECIFIED.into(), 0), (self.to.0.into(), self.to.1));
        packet.with(|p| (p.macs.1, p.payload) = (self.mac, vec![0; 6])).bytes()
    }
}

/// Gives a frame another source: a million addresses and their ports.
fn from(frame: &mut [u8], number: u32) {
    const ADDRESS: usize = 14 + 12;
    const PORT: usize = 14 + 20;
    let address = (0x0a00_0000 | number & 0xf_ffff).to_be_bytes();
    let port = (1_024 + (number >> 20) as u16).to_be_bytes();
    let old: [u8; 6] =
        [&frame[ADDRESS..ADDRESS + 4], &frame[PORT..PORT + 2]].concat().try_into().expect("six");
    frame[ADDRESS..ADDRESS + 4].copy_from_slice(&address);
    frame[PORT..PORT + 2].copy_from_slice(&port);
    let new = [&address[..], &port].concat();
    let checksum = if frame[14 + 9] == 6 { PORT + 16 } else { PORT + 6 };
    update(frame, 14 + 10, &old[..4], &new[..4]);
    update(frame, checksum, &old, &new);
}

/// Brings a checksum up to date with changed words (RFC 1624, equation 3).
pub fn update(frame: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    let mut sum = u32::from(!u16::from_be_bytes([frame[at], frame[at + 1]]));
    for (old, new) in old.chunks(2).zip(new.chunks(2)) {
        sum += 0xffff - word(old) + word(new);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{SYN, assert_checksums};

    #[test]
    fn every_frame_of_a_flood_has_its_own_source_and_right_sums() {
        for transport in [SYN, Transport::Udp] {
            let flood = Flood { transport, to: (Ipv4Addr::new(192, 0, 2, 1), 80), mac: [2; 6], frames: 0 };
            let mut frame = flood.template();
            let mut seen = std::collections::BTreeSet::new();
            for number in [0, 1, 255, 256, 65_535, 1 << 19, 1 << 20, (1 << 20) + 1, 3 << 20] {
                from(&mut frame, number);
                assert_checksums(&frame);
                assert!(seen.insert(frame[26..36].to_vec()), "{number}");
            }
        }
    }
}
