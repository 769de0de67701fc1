//! What XDP can do on an interface, by the kernel's netdev family of generic netlink (Linux 6.3).
//!
//! Its few messages are written out here: no maintained crate speaks this family.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

const CONTROL: u16 = 0x10;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;
const DEV_GET: u8 = 1;
const DEV_IFINDEX: u16 = 1;
const DEV_XDP_FEATURES: u16 = 3;

/// The XDP features of an interface in the current network namespace, as `enum netdev_xdp_act`; `None` where
/// the kernel does not tell.
pub fn xdp_features(ifindex: u32) -> Option<u64> {
    ask(ifindex).ok().flatten()
}

fn ask(ifindex: u32) -> io::Result<Option<u64>> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let name = exchange(&socket, CONTROL, CONTROL_GET_FAMILY, CONTROL_FAMILY_NAME, b"netdev\0")?;
    let Some(family) =
        attribute(&name, CONTROL_FAMILY_ID).and_then(|id| id.try_into().ok()).map(u16::from_ne_bytes)
    else {
        return Ok(None);
    };
    let device = exchange(&socket, family, DEV_GET, DEV_IFINDEX, &ifindex.to_ne_bytes())?;
    Ok(attribute(&device, DEV_XDP_FEATURES).and_then(|bits| bits.try_into().ok()).map(u64::from_ne_bytes))
}

/// One request with one attribute; the attributes of the answer.
fn exchange(socket: &Socket, family: u16, command: u8, attribute: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    const HEADER: usize = 16;
    const GENERIC: usize = 4;
    let padded = value.len().next_multiple_of(4);
    let length = HEADER + GENERIC + 4 + padded;
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend((4 + value.len() as u16).to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    message.resize(length, 0);
    socket.send(&message, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    if kind == Some(libc::NLMSG_ERROR as u16) {
        let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
        return Err(io::Error::from_raw_os_error(-code));
    }
    Ok(answer.get(HEADER + GENERIC..).unwrap_or_default().to_vec())
}

/// The value of an attribute among others.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while attributes.len() >= 4 {
        let length = u16::from_ne_bytes([attributes[0], attributes[1]]) as usize;
        let kind = u16::from_ne_bytes([attributes[2], attributes[3]]) & 0x3fff;
        if length < 4 || length > attributes.len() {
            return None;
        }
        if kind == wanted {
            return Some(&attributes[4..length]);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_nonsense_is_not() {
        let bytes = [5, 0, 1, 0, 9, 0, 0, 0, 8, 0, 3, 0, 1, 2, 3, 4];
        assert_eq!(attribute(&bytes, 1), Some(&[9][..]));
        assert_eq!(attribute(&bytes, 3), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(&bytes, 2), None);
        assert_eq!(attribute(&[0, 0, 1, 0], 1), None);
        assert_eq!(attribute(&[9, 0, 1, 0], 1), None);
    }

    #[test]
    fn the_loopback_device_transmits_nothing() {
        // Kernels before 6.3 do not know the family.
        assert!(matches!(xdp_features(1), None | Some(0)));
    }
}
