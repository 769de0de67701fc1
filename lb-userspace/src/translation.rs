//! Clients of tasks that have the other family alone, as user space sees them: the address that such a task has within its node, and
//! the pool of IPv4 addresses by which tasks know IPv6 clients.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use ipnet::Ipv4Net;
use lb_common::{
    abi::Config,
    net::{Address as _, V4, V6},
    translation::{self, LEAST_BITS, MOST_BITS, STAND_IN_BITS, STAND_INS, is_stand_in},
    tunnel::{mapped, name},
};

/// The pool where nothing else is asked for: the second half of what RFC 2544 sets aside for measurements between networks. Docker gives
/// it to nobody; of providers some have management or storage there.
pub const DEFAULT: &str = "198.19.0.0/16";

/// The IPv6 address that a task with this IPv4 address has within its node.
pub fn embed(address: Ipv4Addr) -> IpAddr {
    translation::embed(V4::from(address)).to_ip()
}

/// The IPv6 address by which tasks that have it alone know an IPv4 client, where the programs are configured so.
pub fn client_in_six(client: Ipv4Addr, config: &Config) -> IpAddr {
    translation::embed_in(config.pref64, V4::from(client)).to_ip()
}

/// The third word of the prefix of IPv4 clients for one of several interfaces, each of which has tables of its own.
pub fn pref64(interface: usize) -> u32 {
    (interface as u32).to_be()
}

/// All prefixes, of tasks and of clients.
pub fn prefixes() -> (IpAddr, u8) {
    (embed(Ipv4Addr::UNSPECIFIED), 64)
}

/// The IPv4 address that stands behind such an address; of any other address none.
fn embedded(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(v6) = address else { return None };
    translation::embedded(&V6::from(v6)).map(|task| task.to_ip())
}

/// The IPv4 address that a task with this IPv6 address has within its node: the same one at each start, unless another task has
/// taken it.
pub fn stand_in(own: Ipv6Addr, is_taken: impl Fn(Ipv4Addr) -> bool) -> Ipv4Addr {
    const MASK: u32 = (1 << STAND_IN_BITS) - 1;
    let [first, second] = name(&mapped(own.into())).map(u32::to_be);
    let start = first ^ second ^ (first >> STAND_IN_BITS);
    let nth = |offset: u32| Ipv4Addr::from_bits(STAND_INS | start.wrapping_add(offset) & MASK);
    (0..=MASK).map(nth).find(|address| !address.is_broadcast() && !is_taken(*address)).unwrap_or(nth(0))
}

/// Whether a task has an address within its node alone, by which clients of the family that it does not have reach it.
pub fn is_made_up(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_stand_in(V4::from(v4)),
        IpAddr::V6(_) => embedded(address).is_some(),
    }
}

/// The address that a task has itself, of one that it may have within its node alone, and all that are known of it; `None` if it is
/// its own.
pub fn own(address: IpAddr, all: &[IpAddr]) -> Option<IpAddr> {
    match address {
        IpAddr::V4(_) if is_made_up(address) => {
            all.iter().copied().find(|one| one.is_ipv6() && !is_made_up(*one))
        }
        IpAddr::V4(_) => None,
        IpAddr::V6(_) => embedded(address),
    }
}

/// A task's address as people know it, and whether packets for it are translated.
pub fn shown(at: SocketAddr, own: Option<IpAddr>) -> String {
    match own {
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
    pub fn of(config: &Config) -> Self {
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
        let config = Config { pool: pool.first(), pool_bits: pool.bits(), ..Default::default() };
        assert_eq!(Pool::of(&config), pool);
        assert_eq!(Pool::of(&Config::default()), Pool(None));
    }

    #[test]
    fn a_task_is_known_by_its_own_address() {
        let v4: Ipv4Addr = "172.18.0.3".parse().unwrap();
        let v6: Ipv6Addr = "fd18::3".parse().unwrap();
        let with_v4 = [v4.into(), embed(v4)];
        assert_eq!(own(embed(v4), &with_v4), Some(v4.into()));
        let instead = IpAddr::V4(stand_in(v6, |_| false));
        let with_v6 = [instead, v6.into()];
        assert_eq!(own(instead, &with_v6), Some(v6.into()));
        for (address, all) in [(v4.into(), with_v4), (v6.into(), with_v6)] {
            assert_eq!((own(address, &all), is_made_up(address)), (None, false), "{address}");
        }
        assert!(is_made_up(instead) && is_made_up(embed(v4)));
        assert_eq!(shown(SocketAddr::new(instead, 8080), Some(v6.into())), "[fd18::3]:8080 (translated)");
        assert_eq!(shown(SocketAddr::new(v6.into(), 8080), None), "[fd18::3]:8080");
    }

    #[test]
    fn tasks_have_stand_ins_of_their_own() {
        let mut taken = std::collections::BTreeSet::new();
        for number in 0..20_000_u128 {
            let own = Ipv6Addr::from_bits(0xfd00_0bad_cafe_0000_u128 << 64 | number);
            let first = stand_in(own, |address| taken.contains(&address));
            assert!(
                first.octets()[0] >= 240 && !first.is_broadcast() && taken.insert(first),
                "{own}: {first}"
            );
        }
        // Whose is taken has the next one, and the last one is nobody's.
        let own: Ipv6Addr = "fd18::3".parse().unwrap();
        let first = stand_in(own, |_| false);
        let second = stand_in(own, |address| address == first);
        assert_eq!(second.to_bits(), first.to_bits() + 1);
    }
}
