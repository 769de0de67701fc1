//! Packets for BPF_PROG_TEST_RUN, built and checked by etherparse: a code path that shares nothing with ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, TcpHeader, TransportSlice,
    UdpHeader, VlanId,
};

/// The client's or its router's hardware address.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 10];
/// The uplink's hardware address.
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A TCP or UDP packet, and how it is framed.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Source and destination hardware address.
    pub macs: ([u8; 6], [u8; 6]),
    /// VLAN tags, outermost first: type and id.
    pub tags: Vec<(u16, u16)>,
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// TTL or hop limit.
    pub hops: u8,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: (their number, the bytes after "next header").
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Transport.
    pub transport: Transport,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP acknowledgment number.
    pub acknowledgment: u32,
    /// TCP window.
    pub window: u16,
    /// IPv4 identification.
    pub identification: u16,
    /// Whether IPv4 may not fragment it.
    pub dont_fragment: bool,
    /// TCP options, a multiple of four bytes.
    pub tcp_options: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
    /// What the transport checksum is.
    pub checksum: Checksum,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP with these flags.
    Tcp(Flags),
    /// UDP.
    Udp,
}

/// TCP flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// Opens.
    pub syn: bool,
    /// Acknowledges.
    pub ack: bool,
    /// Ends.
    pub fin: bool,
    /// Aborts.
    pub rst: bool,
}

/// What a transport checksum is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Right.
    Full,
    /// The pseudo header's sum, as a local stack leaves it to the device.
    Unfinished,
    /// Zero: none (UDP over IPv4).
    None,
}

/// SYN alone.
pub const SYN: Transport = Transport::Tcp(Flags { syn: true, ack: false, fin: false, rst: false });
/// SYN and ACK.
pub const SYN_ACK: Transport = Transport::Tcp(Flags { syn: true, ack: true, fin: false, rst: false });
/// ACK alone.
pub const ACK: Transport = Transport::Tcp(Flags { syn: false, ack: true, fin: false, rst: false });
/// FIN and ACK.
pub const FIN: Transport = Transport::Tcp(Flags { syn: false, ack: true, fin: true, rst: false });
/// RST alone.
pub const RST: Transport = Transport::Tcp(Flags { syn: false, ack: false, fin: false, rst: true });

/// RST and ACK.
pub const RST_ACK: Transport = Transport::Tcp(Flags { syn: false, ack: true, fin: false, rst: true });

impl Packet {
    /// A packet from the client to the node.
    pub fn new(transport: Transport, from: (IpAddr, u16), to: (IpAddr, u16)) -> Self {
        Self {
            macs: (CLIENT_MAC, NODE_MAC),
            tags: vec![],
            source: from.0,
            destination: to.0,
            source_port: from.1,
            destination_port: to.1,
            hops: 64,
            options: vec![],
            extensions: vec![],
            transport,
            sequence: 1_000,
            acknowledgment: 0,
            window: 65_000,
            identification: 0x1234,
            dont_fragment: true,
            tcp_options: vec![],
            payload: b"some payload".to_vec(),
            checksum: Checksum::Full,
        }
    }

    /// The same with other fields.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The same at a place in the connection, without payload.
    #[must_use]
    pub fn at(mut self, sequence: u32, acknowledgment: u32) -> Self {
        (self.sequence, self.acknowledgment) = (sequence, acknowledgment);
        self.payload.clear();
        self
    }

    /// What it becomes when it is forwarded: other addresses and hardware addresses, one hop less.
    #[must_use]
    pub fn forwarded(&self, from: (IpAddr, u16), to: (IpAddr, u16), macs: ([u8; 6], [u8; 6])) -> Self {
        self.clone().with(|packet| {
            (packet.source, packet.source_port) = from;
            (packet.destination, packet.destination_port) = to;
            packet.macs = macs;
            packet.hops -= 1;
        })
    }

    /// The frames of its fragments, cut at these bytes of its transport header and payload.
    pub fn cut(&self, at: &[usize]) -> Vec<Vec<u8>> {
        let whole = self.bytes();
        let v4 = self.source.is_ipv4();
        let header = if v4 { 34 } else { 54 };
        let body = &whole[header..];
        let ends = at.iter().copied().chain([body.len()]);
        let begins = [0].into_iter().chain(at.iter().copied());
        begins
            .zip(ends)
            .map(|(from, to)| {
                let (part, more) = (&body[from..to], to < body.len());
                let mut frame = whole[..header].to_vec();
                if v4 {
                    frame[16..18].copy_from_slice(&((20 + part.len()) as u16).to_be_bytes());
                    let field = (from / 8) as u16 | if more { 0x2000 } else { 0 };
                    frame[20..22].copy_from_slice(&field.to_be_bytes());
                    frame[24..26].fill(0);
                    let words = frame[14..34].chunks(2);
                    let mut sum: u32 =
                        words.map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
                    while sum > 0xffff {
                        sum = (sum & 0xffff) + (sum >> 16);
                    }
                    frame[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
                } else {
                    frame[18..20].copy_from_slice(&((8 + part.len()) as u16).to_be_bytes());
                    let next = std::mem::replace(&mut frame[20], 44);
                    frame.extend([next, 0]);
                    frame.extend((from as u16 | u16::from(more)).to_be_bytes());
                    frame.extend((0xabcd_0000 | u32::from(self.identification)).to_be_bytes());
                }
                frame.extend(part);
                frame
            })
            .collect()
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let transport = self.transport_bytes();
        let mut frame = self.link_bytes();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend(self.ipv4_bytes(source, destination, transport.len()));
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend(self.ipv6_bytes(source, destination, transport.len()));
            }
            _ => panic!("one family at a time"),
        }
        frame.extend(transport);
        frame
    }

    fn link_bytes(&self) -> Vec<u8> {
        let network = if self.source.is_ipv4() { 0x0800 } else { 0x86dd };
        let kinds: Vec<u16> = self.tags.iter().map(|(kind, _)| *kind).chain([network]).collect();
        let header = Ethernet2Header {
            source: self.macs.0,
            destination: self.macs.1,
            ether_type: EtherType(kinds[0]),
        };
        let mut bytes = header.to_bytes().to_vec();
        for ((_, id), next) in self.tags.iter().zip(&kinds[1..]) {
            assert!(VlanId::try_new(*id).is_ok());
            bytes.extend(id.to_be_bytes());
            bytes.extend(next.to_be_bytes());
        }
        bytes
    }

    fn number(&self) -> IpNumber {
        match self.transport {
            Transport::Tcp(_) => IpNumber::TCP,
            Transport::Udp => IpNumber::UDP,
        }
    }

    fn ipv4_bytes(&self, source: Ipv4Addr, destination: Ipv4Addr, length: usize) -> Vec<u8> {
        let mut header =
            Ipv4Header::new(length as u16, self.hops, self.number(), source.octets(), destination.octets())
                .expect("a short packet");
        header.options = self.options.as_slice().try_into().expect("short options");
        header.set_payload_len(length).expect("a short packet");
        header.identification = self.identification;
        header.dont_fragment = self.dont_fragment;
        header.header_checksum = header.calc_header_checksum();
        header.to_bytes().to_vec()
    }

    fn ipv6_bytes(&self, source: Ipv6Addr, destination: Ipv6Addr, length: usize) -> Vec<u8> {
        let extensions: usize = self.extensions.iter().map(|(_, rest)| 1 + rest.len()).sum();
        let numbers: Vec<u8> =
            self.extensions.iter().map(|(number, _)| *number).chain([self.number().0]).collect();
        let header = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: (extensions + length) as u16,
            next_header: IpNumber(numbers[0]),
            hop_limit: self.hops,
            source: source.octets(),
            destination: destination.octets(),
        };
        let mut bytes = header.to_bytes().to_vec();
        for ((_, rest), next) in self.extensions.iter().zip(&numbers[1..]) {
            bytes.push(*next);
            bytes.extend(rest);
        }
        bytes
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let mut bytes = match self.transport {
            Transport::Tcp(flags) => {
                let mut header =
                    TcpHeader::new(self.source_port, self.destination_port, self.sequence, self.window);
                header.acknowledgment_number = self.acknowledgment;
                (header.syn, header.ack, header.fin, header.rst) =
                    (flags.syn, flags.ack, flags.fin, flags.rst);
                header.set_options_raw(&self.tcp_options).expect("short options");
                header.to_bytes().to_vec()
            }
            Transport::Udp => {
                let length = (8 + self.payload.len()) as u16;
                let header = UdpHeader {
                    source_port: self.source_port,
                    destination_port: self.destination_port,
                    length,
                    checksum: 0,
                };
                header.to_bytes().to_vec()
            }
        };
        bytes.extend(&self.payload);
        let at = if self.number() == IpNumber::TCP { 16 } else { 6 };
        let checksum = match self.checksum {
            Checksum::None => 0,
            Checksum::Unfinished => fold(self.pseudo_header(bytes.len())),
            Checksum::Full => match !fold(self.pseudo_header(bytes.len()) + sum(&bytes)) {
                0 if self.transport == Transport::Udp => 0xffff,
                checksum => checksum,
            },
        };
        bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    fn pseudo_header(&self, length: usize) -> u32 {
        let addresses = match (self.source, self.destination) {
            (IpAddr::V4(s), IpAddr::V4(d)) => sum(&s.octets()) + sum(&d.octets()),
            (IpAddr::V6(s), IpAddr::V6(d)) => sum(&s.octets()) + sum(&d.octets()),
            _ => panic!("one family at a time"),
        };
        addresses + u32::from(self.number().0) + length as u32
    }
}

/// What a tunnel packet says beside the packet inside, field by field as RFC 8926 has it.
#[derive(Clone, Debug)]
pub struct Tunnelled {
    /// Source and destination hardware address.
    pub macs: ([u8; 6], [u8; 6]),
    /// Outer addresses.
    pub nodes: (IpAddr, IpAddr),
    /// UDP ports.
    pub ports: (u16, u16),
    /// Virtual network.
    pub network: u32,
    /// Option class.
    pub class: u16,
    /// Option type.
    pub kind: u8,
    /// Version of the option's data, and its flags.
    pub version_and_flags: [u8; 2],
    /// The task: its address in the cluster and its port.
    pub task: (IpAddr, u16),
    /// What its sender's packets are known by, if anything: then the task has a name instead of an address.
    pub cookie: Option<u64>,
    /// The packet inside, from its network header on.
    pub inner: Vec<u8>,
}

impl Tunnelled {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mapped = match self.task.0 {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let ether: [u8; 2] =
            if self.inner.first().is_none_or(|byte| byte >> 4 == 4) { [0x08, 0x00] } else { [0x86, 0xdd] };
        let mut geneve = vec![6, 0x40, ether[0], ether[1]];
        geneve.extend((self.network << 8).to_be_bytes());
        geneve.extend(self.class.to_be_bytes());
        geneve.extend([self.kind, 5]);
        geneve.extend(self.version_and_flags);
        geneve.extend(self.task.1.to_be_bytes());
        match self.cookie {
            None => geneve.extend(mapped.octets()),
            Some(cookie) => {
                geneve.extend(cookie.to_le_bytes());
                geneve.extend(short_name(mapped));
            }
        }
        geneve.extend(&self.inner);
        let outer = Packet::new(Transport::Udp, (self.nodes.0, self.ports.0), (self.nodes.1, self.ports.1));
        let outer = outer.with(|p| {
            p.macs = self.macs;
            p.payload = geneve;
            p.checksum = Checksum::None;
        });
        let mut bytes = outer.bytes();
        if self.nodes.0.is_ipv4() {
            // No identification, not to be fragmented.
            bytes[18..22].copy_from_slice(&[0, 0, 0x40, 0]);
            bytes[24..26].fill(0);
            let checksum = !fold(sum(&bytes[14..34]));
            bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        bytes
    }
}

/// The eight bytes that name a task beside a cookie: the last half of its address, mixed with the first.
fn short_name(mapped: Ipv6Addr) -> [u8; 8] {
    let bits = u128::from_le_bytes(mapped.octets());
    let spread = (bits as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((bits >> 64) as u64 ^ spread).to_le_bytes()
}

/// An ICMP error that quotes so many bytes of a packet, which was sent by `to`.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Source and destination hardware address.
    pub macs: ([u8; 6], [u8; 6]),
    /// Who says it.
    pub from: IpAddr,
    /// Who sent the packet.
    pub to: IpAddr,
    /// Type and code.
    pub kind: (u8, u8),
    /// The last word of its header.
    pub rest: u32,
    /// TTL or hop limit.
    pub hops: u8,
    /// The packet from its network header on, as far as it is quoted, and what follows.
    pub quote: Vec<u8>,
}

impl IcmpError {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut message = vec![self.kind.0, self.kind.1, 0, 0];
        message.extend(self.rest.to_be_bytes());
        message.extend(&self.quote);
        let length = message.len();
        let mut frame = [&self.macs.1[..], &self.macs.0].concat();
        let pseudo = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header =
                    Ipv4Header::new(length as u16, self.hops, IpNumber::ICMP, from.octets(), to.octets())
                        .expect("a short packet");
                header.dont_fragment = false;
                header.header_checksum = header.calc_header_checksum();
                frame.extend([8, 0]);
                frame.extend(header.to_bytes());
                0
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let header = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: length as u16,
                    next_header: IpNumber::IPV6_ICMP,
                    hop_limit: self.hops,
                    source: from.octets(),
                    destination: to.octets(),
                };
                frame.extend([0x86, 0xdd]);
                frame.extend(header.to_bytes());
                sum(&from.octets()) + sum(&to.octets()) + length as u32 + 58
            }
            _ => panic!("one family at a time"),
        };
        let checksum = !fold(pseudo + sum(&message));
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        frame.extend(message);
        frame
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Checks every checksum of a frame by a full computation.
pub fn assert_checksums(frame: &[u8]) {
    let parsed = etherparse::SlicedPacket::from_ethernet(frame).expect("a well-formed frame");
    let transport = parsed.transport.as_ref().expect("TCP or UDP");
    match parsed.net.as_ref().expect("IP") {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum(), "IPv4 header checksum");
            let (source, destination) = (header.source, header.destination);
            match transport {
                TransportSlice::Tcp(tcp) => {
                    let full = tcp.calc_checksum_ipv4(source, destination).expect("a short packet");
                    assert_eq!(tcp.checksum(), full, "TCP checksum");
                }
                TransportSlice::Udp(udp) if udp.checksum() != 0 => {
                    let full = udp.to_header().calc_checksum_ipv4_raw(source, destination, udp.payload());
                    assert_eq!(udp.checksum(), full.expect("a short packet"), "UDP checksum");
                }
                _ => {}
            }
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            let (source, destination) = (header.source, header.destination);
            match transport {
                TransportSlice::Tcp(tcp) => {
                    let full = tcp.calc_checksum_ipv6(source, destination).expect("a short packet");
                    assert_eq!(tcp.checksum(), full, "TCP checksum");
                }
                TransportSlice::Udp(udp) => {
                    let full = udp.to_header().calc_checksum_ipv6_raw(source, destination, udp.payload());
                    assert_eq!(udp.checksum(), full.expect("a short packet"), "UDP checksum");
                }
                _ => {}
            }
        }
        other => panic!("not IP: {other:?}"),
    }
}
