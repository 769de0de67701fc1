//! Whether packets of some size get to a machine and back: ICMP echoes that may not be fragmented.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

/// What came of an echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// It came back.
    Answered,
    /// It did not.
    Silent,
    /// It cannot be sent: it is too long for the way as this machine knows it.
    TooLong,
    /// It cannot be sent at all.
    Refused,
}

/// IP's and ICMP's headers.
const HEADERS: usize = 20 + 8;
const ECHO: u8 = 8;
const ANSWER: u8 = 0;

/// Sends echoes of so many bytes, IP's header included, until one comes back or the time is over.
pub fn ping(to: Ipv4Addr, size: usize, patience: Duration) -> Echo {
    match echo(to, size, patience) {
        Ok(true) => Echo::Answered,
        Ok(false) => Echo::Silent,
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Echo::TooLong,
        Err(_) => Echo::Refused,
    }
}

fn echo(to: Ipv4Addr, size: usize, patience: Duration) -> io::Result<bool> {
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    let discover = libc::IP_PMTUDISC_DO;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is an int that lives through the call.
    let set = unsafe {
        use std::os::fd::AsRawFd as _;
        let value = (&raw const discover).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value, length)
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let deadline = Instant::now() + patience;
    socket.set_read_timeout(Some(patience / 4))?;
    let identifier = (std::process::id() as u16 ^ size as u16).to_be_bytes();
    let mut buffer = vec![0; 65_536];
    let mut sequence = 0_u16;
    while Instant::now() < deadline {
        sequence += 1;
        let request = request(identifier, sequence, size.saturating_sub(HEADERS));
        socket.send_to(&request, &SocketAddr::new(to.into(), 0).into())?;
        let until = Instant::now() + patience / 4;
        while Instant::now() < until {
            let Ok(count) = socket.read(&mut buffer) else { break };
            let header = usize::from(buffer[0] & 0xf) * 4;
            let (from, message) = (&buffer[12..16], buffer.get(header..count).unwrap_or_default());
            if from == to.octets()
                && message.len() >= 8
                && message[0] == ANSWER
                && message[4..6] == identifier
            {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn request(identifier: [u8; 2], sequence: u16, payload: usize) -> Vec<u8> {
    let mut message = vec![0; 8 + payload];
    message[0] = ECHO;
    message[4..6].copy_from_slice(&identifier);
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum =
        message.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let mut sum: u32 = sum.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_sums_up_to_zero() {
        let message = request([1, 2], 3, 5);
        let words = message
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(sum, 0xffff);
        assert_eq!(message.len(), 13);
    }
}
