//! Answers each datagram on a UDP port with the host's name: what containers of the swarm tests run, because busybox
//! has no server of datagrams.

use std::{fs, net::UdpSocket};

fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or(5353);
    let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    loop {
        let (_, from) = socket.recv_from(&mut [0; 64])?;
        socket.send_to(name.trim().as_bytes(), from)?;
    }
}
