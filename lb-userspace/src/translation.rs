//! IPv6 clients of tasks that have IPv4 alone, as user space sees them: the address that such a task has within its node, and the
//! pool of IPv4 addresses by which tasks know those clients.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use ipnet::Ipv4Net;
use lb_common::{
    net::{Address as _, V4, V6},
    translation::{self, LEAST_BITS, MOST_BITS},
};

/// The pool where nothing else is asked for: the second half of what RFC 2544 sets aside for measurements between networks. Docker gives
/// it to nobody; of providers some have management or storage there.
pub const DEFAULT: &str = "198.19.0.0/16";

/// The IPv6 address that a task with this IPv4 address has within its node.
pub fn embed(task: Ipv4Addr) -> IpAddr {
    translation::embed(V4::from(task)).to_ip()
}

/// The IPv4 address of a task that stands behind such an address; of any other address none.
pub fn embedded(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(v6) = address else { return None };
    translation::embedded(&V6::from(v6)).map(|task| task.to_ip())
}

/// The address that a task has itself.
pub fn real(address: IpAddr) -> IpAddr {
    embedded(address).unwrap_or(address)
}

/// A task's address as people know it, and whether packets for it are translated.
pub fn shown(at: SocketAddr) -> String {
    match embedded(at.ip()) {
        Some(task) => format!("{} (translated)", SocketAddr::new(task, at.port())),
        None => at.to_string(),
    }
}

/// The IPv4 addresses by which tasks know IPv6 clients, if there are any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Pool(pub Option<Ipv4Net>);

impl Pool {
    /// How many addresses there are, as a power of two; zero if there are none.
    pub fn bits(self) -> u32 {
        self.0.map_or(0, |range| 32 - u32::from(range.prefix_len()))
    }

    /// The first one, in network order.
    pub fn first(self) -> u32 {
        self.0.map_or(0, |range| u32::from(range.network()).to_be())
    }

    /// The pool of a configuration.
    pub fn of(config: &lb_common::abi::Config) -> Self {
        let prefix = config.pool_bits.checked_sub(1).map(|_| 32_u32.saturating_sub(config.pool_bits) as u8);
        let first = Ipv4Addr::from_bits(u32::from_be(config.pool));
        Self(prefix.and_then(|prefix| Ipv4Net::new(first, prefix).ok()))
    }

    /// The part of the pool that one of several interfaces has, each of which has tables of its own; none where it is too small for
    /// all.
    pub fn part(self, index: usize, of: usize) -> Self {
        let Some(range) = self.0 else { return self };
        let prefix = u32::from(range.prefix_len()) + of.next_power_of_two().trailing_zeros();
        let mut parts = range.subnets(prefix.min(32) as u8).into_iter().flatten();
        let part = parts.nth(index).filter(|part| u32::from(part.prefix_len()) <= 32 - LEAST_BITS);
        Self(part)
    }

    /// The address of this number.
    pub fn address(self, number: u32) -> Option<Ipv4Addr> {
        self.0.map(|range| Ipv4Addr::from_bits(range.network().to_bits() | number))
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(range) => range.fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl FromStr for Pool {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let range: Ipv4Net = text
            .parse()
            .map_err(|_| format!("{text:?} is no range of IPv4 addresses such as {DEFAULT}, nor `off`"))?;
        let (widest, narrowest) = (32 - MOST_BITS, 32 - LEAST_BITS);
        if !(widest..=narrowest).contains(&range.prefix_len().into()) {
            return Err(format!("a pool has a prefix from /{widest} to /{narrowest}"));
        }
        let first = range.network();
        if first.is_loopback() || first.is_multicast() || first.octets()[0] == 0 || first.octets()[0] >= 240 {
            return Err(format!("no task takes {range} for addresses of clients"));
        }
        Ok(Self(Some(range.trunc())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_read_and_nonsense_is_refused() {
        let pool: Pool = "198.19.7.9/16".parse().unwrap();
        assert_eq!((pool.to_string().as_str(), pool.bits()), ("198.19.0.0/16", 16));
        assert_eq!(pool.address(0x102).unwrap().to_string(), "198.19.1.2");
        let parts = [(0, 1), (0, 2), (1, 2), (2, 3)].map(|(index, of)| pool.part(index, of).to_string());
        assert_eq!(parts, ["198.19.0.0/16", "198.19.0.0/17", "198.19.128.0/17", "198.19.128.0/18"]);
        assert_eq!("198.19.0.0/28".parse::<Pool>().unwrap().part(1, 2), Pool(None));
        assert_eq!("off".parse::<Pool>().unwrap().bits(), 0);
        for bad in
            ["", "198.19.0.0", "198.19.0.0/15", "198.19.0.0/29", "fd00::/64", "127.0.0.0/16", "224.0.0.0/16"]
        {
            assert!(bad.parse::<Pool>().is_err(), "{bad}");
        }
        let config =
            lb_common::abi::Config { pool: pool.first(), pool_bits: pool.bits(), ..Default::default() };
        assert_eq!(Pool::of(&config), pool);
        assert_eq!(Pool::of(&lb_common::abi::Config::default()), Pool(None));
    }

    #[test]
    fn a_task_is_known_by_its_own_address() {
        let at = SocketAddr::new(embed("172.18.0.3".parse().unwrap()), 8080);
        assert_eq!(shown(at), "172.18.0.3:8080 (translated)");
        assert_eq!(shown("[fd18::3]:8080".parse().unwrap()), "[fd18::3]:8080");
    }
}
