//! The frames that are asked about, and what the datapath has made of them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use etherparse::{
    EtherType, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpOptionElement, TransportSlice,
};
use lb_common::{
    abi::Config,
    backend::{Kind, NAMED},
    net::{Address as _, V4, V6, Wide},
    tunnel::{
        CRITICAL, DATA_WORDS, OPTION_CLASS, TO_TASK, VERSION, VERSION_AND_LENGTH, VERSION_KEYED, mapped,
        on_wire,
    },
};

use super::{ExplainError, Question};
use crate::{
    cluster::Protocol,
    connection::Names,
    datapath::{Seen, TableSet},
    inventory::Inventory,
};

/// What the SYN says of segments, in bytes, by family: a client's with a link of 1,500.
const MSS: [u16; 2] = [1_460, 1_440];
const HOPS: u8 = 64;
/// The sender on the link: anybody but the uplink itself.
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PAYLOAD: &[u8] = b"what would become of it?";
/// Geneve's header without options.
const GENEVE: usize = 8;

/// The packet in a frame to the uplink.
pub(super) fn plain(config: &Config, question: &Question, known: Option<&Seen>) -> Vec<u8> {
    let v4 = question.client.is_ipv4();
    let ether = if v4 { EtherType::IPV4 } else { EtherType::IPV6 };
    [&config.uplink_mac[..], &SENDER, &ether.0.to_be_bytes(), &packet(question, known)].concat()
}

/// The packet from its network header on.
fn packet(question: &Question, known: Option<&Seen>) -> Vec<u8> {
    let (client, listener) = (question.client, question.listener);
    let network = match (client.ip(), listener.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOPS),
        (from, to) => PacketBuilder::ipv6(octets(from), octets(to), HOPS),
    };
    let mut packet = Vec::new();
    let numbers = known.map_or([1, 1], |seen| [seen.client_next, seen.task_next]);
    // A SYN that is sent again has the number of the first one.
    let numbers = if question.is_syn(known) { [numbers[0].wrapping_sub(1), 0] } else { numbers };
    let tcp =
        |network: PacketBuilderStep<_>| network.tcp(client.port(), listener.port(), numbers[0], u16::MAX);
    let written = if question.protocol == Protocol::Udp {
        network.udp(client.port(), listener.port()).write(&mut packet, PAYLOAD).ok()
    } else if question.is_syn(known) {
        let mss = TcpOptionElement::MaximumSegmentSize(MSS[usize::from(client.is_ipv6())]);
        let syn = tcp(network).syn().options(&[mss]).ok();
        syn.and_then(|syn| syn.write(&mut packet, &[]).ok())
    } else {
        tcp(network).ack(numbers[1]).write(&mut packet, PAYLOAD).ok()
    };
    // Into memory, and there is room for one option.
    debug_assert!(written.is_some());
    packet
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Another node, as this one knows packets of its datapath to a task.
pub(super) struct Sender {
    /// Its address, and this node's that it sends to.
    ends: [IpAddr; 2],
    /// Version of the option's data.
    version: u8,
    /// The option's port, in network order, and address: who is meant, by which right.
    port: [u8; 2],
    address: [u8; 16],
}

/// Finds out how a node sends to a task of this one.
pub(super) fn sender(
    inventory: &Inventory,
    set: &TableSet,
    names: &Names<'_>,
    question: &Question,
    [node, task]: [&str; 2],
) -> Result<Sender, ExplainError> {
    let (tables, protocol) = (&inventory.tables, question.protocol);
    let is_it = |id: &str| id == node || names.node(id) == node;
    let number =
        tables.nodes.iter().find(|(_, label)| !label.this && is_it(&label.name)).map(|(number, _)| number);
    let there = number.and_then(|number| inventory.peers.get(number));
    let (peer, key) = there.ok_or_else(|| {
        ExplainError::Unknown(format!(
            "there is no other node {node} with an agent; `lb-userspace node ls` lists those there are"
        ))
    })?;
    let published = |target: u16| {
        tables.ports.values().any(|port| {
            port.protocol == protocol && port.published == question.listener.port() && port.target == target
        })
    };
    let family = if question.client.is_ipv4() { 4 } else { 6 };
    let found = tables.backends.iter().find(|(_, entry)| {
        let (label, backend) = (&entry.label, &entry.backend);
        (label.task == task && label.protocol == protocol && published(label.target))
            && (backend.family == family && backend.kind == Kind::Local as u8)
    });
    let (index, entry) = found.ok_or_else(|| {
        ExplainError::Unknown(format!(
            "this node has no task {task} behind port {}/{protocol}; `lb-userspace task ls` lists the tasks and their nodes",
            question.listener.port()
        ))
    })?;
    let name = set.task_name(*index)?.ok_or_else(|| {
        ExplainError::Unknown(format!("other nodes know no name for {task}, and send it nothing"))
    })?;
    let (version, address) = match key.current {
        0 if entry.backend.flags & NAMED != 0 => (VERSION, entry.backend.source),
        0 => (VERSION, mapped(entry.label.overlay.unwrap_or(entry.label.address))),
        cookie => {
            let [first, second] = on_wire(cookie);
            (VERSION_KEYED, [first, second, name.name[0], name.name[1]])
        }
    };
    let ip =
        |wide: Wide| if peer.family == 4 { V4::from_wide(wide).to_ip() } else { V6::from_wide(wide).to_ip() };
    let mut bytes = [0; 16];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(address) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(Sender {
        ends: [ip(peer.address), ip(peer.source)],
        version,
        port: entry.backend.port.get().to_be_bytes(),
        address: bytes,
    })
}

/// The packet as that node sends it, in a frame to the uplink.
pub(super) fn tunnelled(
    config: &Config,
    question: &Question,
    known: Option<&Seen>,
    sender: &Sender,
) -> Vec<u8> {
    let inner = if question.client.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
    let geneve = [&[VERSION_AND_LENGTH, CRITICAL][..], &inner.0.to_be_bytes(), &[0; 4]].concat();
    let option = [
        &OPTION_CLASS.get().to_be_bytes()[..],
        &[TO_TASK, DATA_WORDS, sender.version, 0],
        &sender.port,
        &sender.address,
    ]
    .concat();
    let payload = [geneve, option, packet(question, known)].concat();
    let link = PacketBuilder::ethernet2(SENDER, config.uplink_mac);
    let network = match sender.ends {
        [IpAddr::V4(from), IpAddr::V4(to)] => link.ipv4(from.octets(), to.octets(), HOPS),
        [from, to] => link.ipv6(octets(from), octets(to), HOPS),
    };
    let port = config.tunnel_port.get();
    let mut frame = Vec::new();
    let written = network.udp(port, port).write(&mut frame, &payload);
    debug_assert!(written.is_ok());
    frame
}

/// What the datapath has made of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Made {
    /// The ends of the tunnel that it is in.
    pub(super) tunnel: Option<[IpAddr; 2]>,
    /// The packet's source and destination.
    pub(super) ends: [SocketAddr; 2],
    /// What a SYN says of segments, in bytes.
    pub(super) mss: Option<u16>,
    /// It resets the connection.
    pub(super) reset: bool,
}

impl Made {
    /// Reads it; none of what is neither TCP nor UDP: an error that says why the packet does not go on.
    pub(super) fn of(frame: &[u8], config: &Config) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        if let Some(TransportSlice::Udp(udp)) = &packet.transport
            && udp.destination_port() == config.tunnel_port.get()
        {
            let options = usize::from(udp.payload().first()? & 0x3f) * 4;
            let inner = udp.payload().get(GENEVE + options..)?;
            let ether = u16::from_be_bytes(udp.payload().get(2..4)?.try_into().ok()?);
            let inner = SlicedPacket::from_ether_type(EtherType(ether), inner).ok()?;
            return Some(Self { tunnel: Some(addresses(&packet)?), ..Self::of_packet(&inner)? });
        }
        Self::of_packet(&packet)
    }

    fn of_packet(packet: &SlicedPacket<'_>) -> Option<Self> {
        let [from, to] = addresses(packet)?;
        let (ports, mss, reset) = match packet.transport.as_ref()? {
            TransportSlice::Tcp(tcp) => {
                let mss = tcp.options_iterator().flatten().find_map(|option| match option {
                    TcpOptionElement::MaximumSegmentSize(mss) => Some(mss),
                    _ => None,
                });
                ([tcp.source_port(), tcp.destination_port()], mss, tcp.rst())
            }
            TransportSlice::Udp(udp) => ([udp.source_port(), udp.destination_port()], None, false),
            _ => return None,
        };
        let ends = [SocketAddr::new(from, ports[0]), SocketAddr::new(to, ports[1])];
        Some(Self { tunnel: None, ends, mss, reset })
    }
}

fn addresses(packet: &SlicedPacket<'_>) -> Option<[IpAddr; 2]> {
    match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => Some([ip.header().source_addr().into(), ip.header().destination_addr().into()]),
        NetSlice::Ipv6(ip) => {
            let [from, to]: [Ipv6Addr; 2] = [ip.header().source_addr(), ip.header().destination_addr()];
            Some([from.into(), to.into()])
        }
        NetSlice::Arp(_) => None,
    }
}

/// What the SYN that is asked about says of segments, in bytes.
pub(super) fn asked_mss(question: &Question) -> u16 {
    MSS[usize::from(question.client.is_ipv6())]
}
