//! Resets to the ends of a connection that is given up, sent in the other end's name.
//!
//! The kernel routes them as any packet of this node; that their source is not an address of the node needs raw sockets,
//! and those CAP_NET_RAW. Whom to tell is decided where connections are known.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use etherparse::PacketBuilder;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Hops that a reset may take: what Linux gives to its own.
const HOPS: u8 = 64;
/// How long a packet may wait for room in the socket, which drains as fast as the interface sends.
const PATIENCE: Duration = Duration::from_millis(100);

/// A reset for one end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The other end, as this one knows it.
    pub from: SocketAddr,
    /// The end that is told; of the same family.
    pub to: SocketAddr,
    /// The number that it expects next: at any other it takes no reset (RFC 5961, 3.2).
    pub sequence: u32,
    /// What it has sent so far.
    pub acknowledgment: u32,
}

impl Reset {
    /// The packet from its network header on; none where the families of the ends differ.
    fn packet(&self) -> Option<Vec<u8>> {
        let network = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOPS),
            (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), HOPS),
            _ => return None,
        };
        // Nothing is to be sent to who is told that the connection is gone: no window.
        let reset = network.tcp(self.from.port(), self.to.port(), self.sequence, 0).rst();
        let reset = reset.ack(self.acknowledgment);
        let mut packet = Vec::with_capacity(reset.size(0));
        reset.write_to_vec(&mut packet, &[]).ok()?;
        Some(packet)
    }
}

/// What came of sending resets.
#[derive(Debug, Default)]
pub struct Sent {
    /// Those that left.
    pub sent: usize,
    /// Those that did not.
    pub failed: usize,
    /// Why the last of them did not, in the kernel's words.
    pub error: Option<io::Error>,
}

/// Sends resets.
pub struct Resetter {
    v4: Socket,
    /// None on a kernel without IPv6, which has no such connections.
    v6: Option<Socket>,
}

impl Resetter {
    /// Opens its sockets.
    ///
    /// # Errors
    /// The kernel refuses: raw sockets need CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        Ok(Self { v4: socket(Domain::IPV4)?, v6: socket(Domain::IPV6).ok() })
    }

    /// Sends them one after another. A socket that has no room for so long ends it: the rest fails too.
    pub fn send(&self, resets: &[Reset]) -> Sent {
        let mut done = Sent::default();
        for (index, reset) in resets.iter().enumerate() {
            match self.send_one(reset) {
                Ok(()) => done.sent += 1,
                Err(error) => {
                    let blocked = error.kind() == io::ErrorKind::WouldBlock;
                    done.failed += if blocked { resets.len() - index } else { 1 };
                    done.error = Some(error);
                    if blocked {
                        break;
                    }
                }
            }
        }
        done
    }

    fn send_one(&self, reset: &Reset) -> io::Result<()> {
        let socket = if reset.to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        let packet = reset.packet().ok_or(io::ErrorKind::InvalidInput)?;
        // Of a raw socket's address the port is the protocol, which the header names.
        let to = SockAddr::from(SocketAddr::new(reset.to.ip(), 0));
        socket.ok_or(io::ErrorKind::Unsupported)?.send_to(&packet, &to).map(drop)
    }
}

/// A socket that takes whole packets (raw(7): IPPROTO_RAW implies the header's inclusion), and gets none.
fn socket(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    if domain == Domain::IPV4 {
        socket.set_header_included_v4(true)?;
    } else {
        socket.set_header_included_v6(true)?;
    }
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_reset_is_a_whole_packet_of_either_family() {
        for (from, to) in
            [("192.0.2.1:80", "198.51.100.9:40000"), ("[2001:db8::1]:80", "[2001:db8:9::9]:40000")]
        {
            let reset = Reset { from: at(from), to: at(to), sequence: u32::MAX, acknowledgment: 7 };
            let packet = reset.packet().unwrap();
            let sliced = SlicedPacket::from_ip(&packet).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else { panic!("no TCP in {packet:?}") };
            assert_eq!((tcp.source_port(), tcp.destination_port()), (80, 40_000));
            assert_eq!((tcp.sequence_number(), tcp.acknowledgment_number()), (u32::MAX, 7));
            assert!(tcp.rst() && tcp.ack() && !tcp.syn() && !tcp.fin() && !tcp.psh());
            assert!(tcp.payload().is_empty());
            let sum = match &sliced.net {
                Some(NetSlice::Ipv4(ip)) => {
                    let header = ip.header().to_header();
                    assert_eq!(usize::from(header.total_len), packet.len());
                    assert_eq!(
                        (IpAddr::from(header.source), IpAddr::from(header.destination)),
                        (reset.from.ip(), reset.to.ip())
                    );
                    assert_eq!(header.header_checksum, header.calc_header_checksum());
                    tcp.to_header().calc_checksum_ipv4(&header, &[]).unwrap()
                }
                Some(NetSlice::Ipv6(ip)) => {
                    let header = ip.header().to_header();
                    assert_eq!(usize::from(header.payload_length) + 40, packet.len());
                    assert_eq!(
                        (IpAddr::from(header.source), IpAddr::from(header.destination)),
                        (reset.from.ip(), reset.to.ip())
                    );
                    tcp.to_header().calc_checksum_ipv6(&header, &[]).unwrap()
                }
                other => panic!("{other:?}"),
            };
            assert_eq!(tcp.checksum(), sum);
        }
    }

    #[test]
    fn ends_of_two_families_are_refused() {
        let reset = Reset { from: at("192.0.2.1:80"), to: at("[::1]:9"), sequence: 0, acknowledgment: 0 };
        assert_eq!(reset.packet(), None);
    }
}
