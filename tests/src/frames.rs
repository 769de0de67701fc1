//! Frames that should be the same: a difference is shown field by field, and both frames are left for Wireshark.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use etherparse::{LinkExtHeader, NetHeaders, PacketHeaders, PayloadSlice, TransportHeader};

/// Asserts that a frame is the one that was expected.
///
/// # Panics
/// It is not: the fields that differ are named, and where the frames have been written to.
#[track_caller]
pub fn assert_frame(what: &str, frame: &[u8], expected: &[u8]) {
    if frame != expected {
        let place = keep(&[expected, frame])
            .map_or_else(|error| format!("not kept: {error}"), |path| path.display().to_string());
        panic!(
            "{what}: another frame than expected\n{}both, the expected first: {place}",
            difference(frame, expected)
        );
    }
}

/// The fields in which two frames differ, a line each.
pub fn difference(frame: &[u8], expected: &[u8]) -> String {
    let (got, wanted) = (fields(frame), fields(expected));
    let mut text = String::new();
    let names = wanted.iter().chain(&got).map(|(name, _)| name);
    let mut seen = Vec::new();
    for name in names {
        if seen.contains(&name) {
            continue;
        }
        seen.push(name);
        let of = |fields: &[(String, String)]| {
            let found = fields.iter().find(|(known, _)| known == name);
            found.map_or_else(|| "none".to_owned(), |(_, value)| value.clone())
        };
        let (wanted, got) = (of(&wanted), of(&got));
        if wanted != got {
            let _ = writeln!(text, "  {name:<24} expected {wanted}, got {got}");
        }
    }
    if text.is_empty() {
        let at =
            frame.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(frame.len().min(expected.len()));
        let _ = writeln!(text, "  byte {at}, in no field that is known");
    }
    text
}

/// What a frame says, field by field; of one in a tunnel only the outer headers, then the payload.
fn fields(frame: &[u8]) -> Vec<(String, String)> {
    let mut fields = vec![("length".to_owned(), frame.len().to_string())];
    let mut put = |name: &str, value: String| fields.push((name.to_owned(), value));
    let headers = match PacketHeaders::from_ethernet_slice(frame) {
        Ok(headers) => headers,
        Err(error) => {
            put("frame", format!("not understood ({error}): {}", hex(frame)));
            return fields;
        }
    };
    if let Some(etherparse::LinkHeader::Ethernet2(link)) = &headers.link {
        put("ethernet source", hex(&link.source));
        put("ethernet destination", hex(&link.destination));
        put("ethernet type", format!("{:?}", link.ether_type));
    }
    for extension in &headers.link_exts {
        if let LinkExtHeader::Vlan(vlan) = extension {
            put("vlan", format!("{} priority {}", vlan.vlan_id.value(), vlan.pcp.value()));
        }
    }
    match &headers.net {
        Some(NetHeaders::Ipv4(ip, _)) => {
            put("ipv4 source", std::net::Ipv4Addr::from(ip.source).to_string());
            put("ipv4 destination", std::net::Ipv4Addr::from(ip.destination).to_string());
            put("ipv4 ttl", ip.time_to_live.to_string());
            put("ipv4 protocol", format!("{:?}", ip.protocol));
            put("ipv4 length", ip.total_len.to_string());
            put("ipv4 identification", ip.identification.to_string());
            put("ipv4 dscp, ecn", format!("{}, {}", ip.dscp.value(), ip.ecn.value()));
            put(
                "ipv4 fragment",
                format!(
                    "df {} mf {} offset {}",
                    ip.dont_fragment,
                    ip.more_fragments,
                    ip.fragment_offset.value()
                ),
            );
            put("ipv4 checksum", format!("{:#06x}", ip.header_checksum));
            put("ipv4 options", hex(&ip.options));
        }
        Some(NetHeaders::Ipv6(ip, extensions)) => {
            put("ipv6 source", std::net::Ipv6Addr::from(ip.source).to_string());
            put("ipv6 destination", std::net::Ipv6Addr::from(ip.destination).to_string());
            put("ipv6 hop limit", ip.hop_limit.to_string());
            put("ipv6 next header", format!("{:?}", ip.next_header));
            put("ipv6 length", ip.payload_length.to_string());
            put("ipv6 traffic class", ip.traffic_class.to_string());
            put("ipv6 flow label", ip.flow_label.value().to_string());
            put("ipv6 extensions", format!("{extensions:?}"));
        }
        Some(other) => put("network", format!("{other:?}")),
        None => {}
    }
    match &headers.transport {
        Some(TransportHeader::Tcp(tcp)) => {
            put("tcp source port", tcp.source_port.to_string());
            put("tcp destination port", tcp.destination_port.to_string());
            put("tcp sequence", tcp.sequence_number.to_string());
            put("tcp acknowledgment", tcp.acknowledgment_number.to_string());
            put("tcp flags", flags(tcp));
            put("tcp window", tcp.window_size.to_string());
            put("tcp checksum", format!("{:#06x}", tcp.checksum));
            put("tcp options", hex(tcp.options.as_slice()));
        }
        Some(TransportHeader::Udp(udp)) => {
            put("udp source port", udp.source_port.to_string());
            put("udp destination port", udp.destination_port.to_string());
            put("udp length", udp.length.to_string());
            put("udp checksum", format!("{:#06x}", udp.checksum));
        }
        Some(other) => put("icmp", format!("{other:?}")),
        None => {}
    }
    put("payload", payload(&headers.payload));
    fields
}

fn flags(tcp: &etherparse::TcpHeader) -> String {
    let all = [
        (tcp.syn, "SYN"),
        (tcp.ack, "ACK"),
        (tcp.fin, "FIN"),
        (tcp.rst, "RST"),
        (tcp.psh, "PSH"),
        (tcp.urg, "URG"),
        (tcp.ece, "ECE"),
        (tcp.cwr, "CWR"),
    ];
    all.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

fn payload(payload: &PayloadSlice<'_>) -> String {
    let bytes = payload.slice();
    let shown = &bytes[..bytes.len().min(96)];
    format!("{} bytes {}{}", bytes.len(), hex(shown), if shown.len() < bytes.len() { "…" } else { "" })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Writes frames as Wireshark reads them, under the name of the test that runs.
fn keep(frames: &[&[u8]]) -> std::io::Result<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/failed");
    fs::create_dir_all(&folder)?;
    let thread = std::thread::current();
    let path = folder.join(format!("{}.pcap", thread.name().unwrap_or("test").replace("::", "-")));
    // The magic number, version 2.4, UTC, no accuracy, the largest frame, Ethernet.
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 0xffff, 1] {
        bytes.extend(word.to_le_bytes());
    }
    for frame in frames {
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        for word in [0, 0, length, length] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(*frame);
    }
    fs::write(&path, bytes)?;
    path.canonicalize()
}
