//! Who listens on which port of this network namespace, by what the kernel shows in /proc.

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::cluster::Protocol;

/// A socket that takes what comes to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Its address; unspecified is all of them.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The kernel's number for it.
    pub inode: u64,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its name.
    pub name: String,
    /// Its number.
    pub pid: u32,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The sockets that listen.
pub fn sockets() -> Vec<Socket> {
    let tables =
        [("tcp", Protocol::Tcp), ("tcp6", Protocol::Tcp), ("udp", Protocol::Udp), ("udp6", Protocol::Udp)];
    let read = |(name, protocol): (&str, Protocol)| {
        let text = fs::read_to_string(format!("/proc/self/net/{name}")).unwrap_or_default();
        text.lines().filter_map(|line| parse(line, protocol)).collect::<Vec<_>>()
    };
    tables.into_iter().flat_map(read).collect()
}

/// `sl local_address rem_address st …`: 0A is listening, 07 a UDP socket that is connected to nobody.
fn parse(line: &str, protocol: Protocol) -> Option<Socket> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let wanted = if protocol == Protocol::Tcp { "0A" } else { "07" };
    if *fields.get(3)? != wanted {
        return None;
    }
    let (address, port) = fields.get(1)?.split_once(':')?;
    Some(Socket {
        protocol,
        address: self::address(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// Words of 32 bits in the machine's order.
fn address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    if text.len() == 8 {
        return word(0).map(|bytes| Ipv4Addr::from(bytes).into());
    }
    let mut bytes = [0; 16];
    for at in 0..4 {
        bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
    }
    Some(Ipv6Addr::from(bytes).to_canonical())
}

/// The process that holds a socket.
pub fn who(inode: u64) -> Option<Owner> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = processes.find(|pid| {
        let mut descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors.any(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str())
        })
    })?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(Owner { name: name.trim().to_owned(), pid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 12345 1 0 100 0 0 10 0";
        let socket = parse(line, Protocol::Tcp).unwrap();
        assert_eq!(
            (socket.address.to_string().as_str(), socket.port, socket.inode),
            ("127.0.0.1", 8_080, 12_345)
        );
        assert_eq!(parse(&line.replace(" 0A ", " 01 "), Protocol::Tcp), None);
        let line = line.replace("0100007F", "00000000000000000000000001000000").replace(" 0A ", " 07 ");
        assert_eq!(parse(&line, Protocol::Udp).unwrap().address.to_string(), "::1");
    }

    #[test]
    fn the_owner_of_a_socket_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let socket =
            sockets().into_iter().find(|socket| socket.port == port && socket.protocol == Protocol::Tcp);
        assert_eq!(who(socket.unwrap().inode).unwrap().pid, std::process::id());
    }
}
