//! Who is let in before it has shown who it is: a stranger costs little, and keeps nobody else out.
//!
//! The machines from which the swarm's agents are known to speak have room of their own, so that strangers from elsewhere
//! fill only theirs. Where there is no room the one that has waited longest gives way: an agent shows its certificate within
//! milliseconds, and who only holds a place does not.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::pace::Pace;

/// At once from one source.
const OF_A_SOURCE: usize = 8;
/// At once from all sources that no agent is known to speak from.
const OF_STRANGERS: usize = 64;
/// Places for all together while it is not known who is a stranger.
const OF_ALL: usize = 4096;
/// Handshakes of a machine of the swarm: its agent, and whoever else shares its address.
const KNOWN: Pace = Pace::new(40, Duration::from_millis(50));
/// Handshakes of another source.
const UNKNOWN: Pace = Pace::new(10, Duration::from_millis(200));
/// Handshakes of all other sources together.
const STRANGERS: Pace = Pace::new(100, Duration::from_millis(20));
/// Sources that are remembered; beyond that those that rest are forgotten.
const REMEMBERED: usize = 4096;

/// Why somebody was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// It, or all strangers, ask too often.
    #[error("too many handshakes from there")]
    Pace,
}

/// The door of a listening socket.
#[derive(Clone, Debug, Default)]
pub struct Door(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    /// From where the swarm's agents speak; `None` while that is not known, and everybody may be one.
    known: Option<HashSet<IpAddr>>,
    /// Who has not shown who it is, by order of arrival; dropping the sender hangs up on it.
    waiting: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
    /// By source, and whether it was known.
    paces: HashMap<(IpAddr, bool), Pace>,
    strangers: Pace,
    next: u64,
}

impl Default for Inner {
    fn default() -> Self {
        Self { known: None, waiting: BTreeMap::new(), paces: HashMap::new(), strangers: STRANGERS, next: 0 }
    }
}

impl Inner {
    /// Where somebody comes from, and whether an agent speaks from there: an address, or of a stranger the network that one
    /// host of IPv6 has addresses of.
    fn source(&self, from: IpAddr) -> (IpAddr, bool) {
        match from.to_canonical() {
            from if self.known.as_ref().is_none_or(|known| known.contains(&from)) => (from, true),
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                (Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into(), false)
            }
            v4 => (v4, false),
        }
    }
}

/// A place at the door, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    door: Door,
    number: u64,
    gone: oneshot::Receiver<()>,
}

impl Door {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From where the swarm's agents speak, as far as that is known.
    pub fn know(&self, addresses: Option<impl Iterator<Item = IpAddr>>) {
        self.inner().known =
            addresses.map(|addresses| addresses.map(|address| address.to_canonical()).collect());
    }

    /// A place for somebody who has connected; whoever has waited longest may lose his for it.
    pub fn enter(&self, from: IpAddr) -> Place {
        let mut inner = self.inner();
        let (from, known) = inner.source(from);
        let of_source = |inner: &Inner| -> Vec<u64> {
            inner.waiting.iter().filter(|(_, (source, _))| *source == from).map(|(n, _)| *n).collect()
        };
        // While nothing is known all may be the swarm's, and have room as its largest needs it.
        let (most, bounded) = match inner.known {
            None => (OF_ALL, true),
            Some(_) => (OF_STRANGERS, !known),
        };
        let same = of_source(&inner);
        if same.len() >= OF_A_SOURCE {
            inner.waiting.remove(&same[0]);
        } else if bounded {
            let known = |source: &IpAddr| inner.known.as_ref().is_some_and(|known| known.contains(source));
            let strange = inner.waiting.iter().filter(|(_, (source, _))| !known(source));
            let strange: Vec<u64> = strange.map(|(number, _)| *number).collect();
            if strange.len() >= most {
                inner.waiting.remove(&strange[0]);
            }
        }
        let (sender, gone) = oneshot::channel();
        let number = inner.next;
        inner.next += 1;
        inner.waiting.insert(number, (from, sender));
        Place { door: self.clone(), number, gone }
    }

    /// Whether a handshake with somebody may begin: that is work.
    ///
    /// # Errors
    /// There were too many from there.
    pub fn begin(&self, from: IpAddr, now: Instant) -> Result<(), Closed> {
        let mut inner = self.inner();
        let (from, known) = inner.source(from);
        if inner.paces.len() >= REMEMBERED {
            inner.paces.retain(|_, pace| !pace.is_rested(now));
            if inner.paces.len() >= REMEMBERED && !known {
                return Err(Closed::Pace);
            }
        }
        let pace = inner.paces.entry((from, known)).or_insert(if known { KNOWN } else { UNKNOWN });
        let own = pace.take(now);
        if own && (known || inner.strangers.take(now)) { Ok(()) } else { Err(Closed::Pace) }
    }
}

impl Place {
    /// Resolves when the place is needed for somebody else.
    pub async fn taken(&mut self) {
        let _ = (&mut self.gone).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.inner().waiting.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn holds(place: &mut Place) -> bool {
        matches!(place.gone.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    #[test]
    fn strangers_take_places_from_strangers_alone_and_the_longest_wait_ends() {
        let door = Door::default();
        door.know(Some([ip("192.0.2.2")].into_iter()));
        let mut agent = door.enter(ip("192.0.2.2"));
        let mut early = door.enter(ip("198.51.100.1"));
        // One source never has more than its share.
        let mut same: Vec<Place> = (0..OF_A_SOURCE).map(|_| door.enter(ip("203.0.113.9"))).collect();
        let _more: Vec<Place> = (0..3).map(|_| door.enter(ip("::ffff:203.0.113.9"))).collect();
        assert_eq!(same.iter_mut().map(holds).filter(|holds| !holds).count(), 3);
        assert!(holds(&mut early));
        // Many sources: the first gives way, the swarm's own machine does not.
        let many: Vec<Place> =
            (0..OF_STRANGERS as u8).map(|last| door.enter(IpAddr::from([10, 0, last, 1]))).collect();
        assert!(!holds(&mut early) && holds(&mut agent));
        assert!(door.inner().waiting.len() <= OF_STRANGERS + 1);
        drop((many, same));
        assert!(door.inner().waiting.len() <= 5);
    }

    #[test]
    fn a_network_of_ipv6_is_one_source() {
        let door = Door::default();
        door.know(Some([ip("2001:db8:1:2::1")].into_iter()));
        let source = |from: &str| door.inner().source(ip(from));
        assert_eq!(source("2001:db8:1:2:3:4:5:6"), (ip("2001:db8:1:2::"), false));
        assert_eq!(source("2001:db8:1:2::1"), (ip("2001:db8:1:2::1"), true));
        assert_eq!(source("::ffff:192.0.2.1"), (ip("192.0.2.1"), false));
    }

    #[test]
    fn handshakes_of_strangers_are_few_and_cost_the_swarm_none() {
        let door = Door::default();
        door.know(Some([ip("192.0.2.2")].into_iter()));
        let now = Instant::now();
        let begun = |from: IpAddr| (0..1000).filter(|_| door.begin(from, now).is_ok()).count();
        assert_eq!(begun(ip("203.0.113.9")), 10);
        let all: usize = (0..255).map(|last| begun(IpAddr::from([10, 0, last, 1]))).sum();
        assert_eq!(all, 90);
        assert_eq!(begun(ip("192.0.2.2")), 40);
        // Before anybody is known each source has its share, and all of a swarm come at once.
        let early = Door::default();
        let all = (0..255).filter(|last| early.begin(IpAddr::from([10, 0, *last, 1]), now).is_ok()).count();
        assert_eq!(all, 255);
        // In ten seconds: of strangers 50 a second, however many they are.
        let mut later = 0;
        for tenth in 1..=100 {
            let now = now + Duration::from_millis(100 * tenth);
            later += (0..255).filter(|last| door.begin(IpAddr::from([10, 0, *last, 1]), now).is_ok()).count();
        }
        assert!((480..=510).contains(&later), "{later}");
        // What is remembered is bounded, and the swarm's machines come in all the same.
        for number in 0..10_000_u32 {
            let _ = door.begin(IpAddr::from(number.to_be_bytes()), now);
        }
        assert!(door.inner().paces.len() <= REMEMBERED + 1);
        assert!(door.begin(ip("192.0.2.2"), now + Duration::from_secs(60)).is_ok());
    }
}
