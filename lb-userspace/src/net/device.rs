//! What a driver says of its interface, by the ethtool ioctl of the current network namespace.

use std::{
    io,
    os::{fd::AsRawFd as _, unix::net::UnixDatagram},
};

const GET_DRIVER: u32 = 0x3;
const GET_FLAGS: u32 = 0x25;
const RX_VLAN: u32 = 1 << 8;

/// What a driver says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name: `veth`, `virtio_net`, `ixgbe`, …
    pub driver: String,
    /// Where the device sits; empty for one made of software.
    pub bus: String,
    /// Whether the device takes VLAN tags out of the frames it receives.
    pub takes_tags: bool,
}

impl Device {
    /// Whether a local stack may hand frames with unfinished checksums to this device's receiving side: another
    /// namespace through a veth, or the host of a virtual machine.
    pub fn passes_partial_checksums(&self) -> bool {
        self.bus.is_empty() || self.driver == "virtio_net"
    }
}

#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    rest: [u8; 64],
}

#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Asks the driver of an interface.
///
/// # Errors
/// There is no such interface, or its driver does not answer.
pub fn device(interface: &str) -> io::Result<Device> {
    let mut info = DriverInfo {
        command: GET_DRIVER,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        rest: [0; 64],
    };
    ethtool(interface, (&raw mut info).cast())?;
    let mut flags = Value { command: GET_FLAGS, data: 0 };
    // A driver without offloads need not know the question.
    let _ = ethtool(interface, (&raw mut flags).cast());
    Ok(Device { driver: text(&info.driver), bus: text(&info.bus), takes_tags: flags.data & RX_VLAN != 0 })
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn ethtool(interface: &str, data: *mut libc::c_char) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = data;
    // SAFETY: the request names a buffer of the size that its command asks for.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
