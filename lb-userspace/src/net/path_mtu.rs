//! The longest packet that the way to a node lets pass, found by probes of that length (RFC 8899): what routers say of it anybody
//! can say, and many ways let no word of theirs through.

use std::time::{Duration, Instant};

/// What every way lets pass, of each family (RFC 791, 3.2; RFC 8200, 5), in bytes.
const LEAST: [u32; 2] = [576, 1_280];
/// Lengths that are tried at once.
const TEETH: u32 = 8;
/// Times that a length is tried before it counts as too long.
const TRIES: u32 = 4;
/// Probes that are not answered are sent again after this time.
pub(super) const PACE: Duration = Duration::from_millis(50);
/// A way is looked at again after this time: it may have become longer or shorter, and nobody says so.
const AGAIN: Duration = Duration::from_secs(60);
/// And at most this often, whoever asks.
const PAUSE: Duration = Duration::from_secs(2);

/// What is known of a way.
#[derive(Clone, Debug)]
pub(super) struct PathMtu {
    /// The longest packet that this machine can send, in bytes.
    route: u32,
    least: u32,
    /// The longest that came through, once that is known.
    known: Option<u32>,
    search: Option<Search>,
    /// When the last search began.
    began: Option<Instant>,
    /// When the next begins.
    due: Instant,
}

/// Between which lengths it is.
#[derive(Clone, Debug)]
struct Search {
    /// It is known to come through, and tried beside the others: if not even this is answered, silence says nothing of the way.
    passes: u32,
    /// It is known not to.
    fails: u32,
    /// The longest that was answered since these bounds stand; zero if none was.
    heard: u32,
    tries: u32,
    sent: Instant,
}

impl Search {
    /// The lengths that are tried: the bounds and what lies evenly between them.
    fn teeth(&self) -> impl Iterator<Item = u32> + use<> {
        let (passes, width) = (self.passes, self.fails - 1 - self.passes);
        let teeth = TEETH.min(width);
        (0..=teeth).map(move |tooth| passes + width * tooth / teeth.max(1))
    }
}

impl PathMtu {
    /// A way that nothing is known of.
    pub(super) fn new(route: u32, v4: bool, now: Instant) -> Self {
        let least = LEAST[usize::from(!v4)].min(route);
        Self { route, least, known: None, search: None, began: None, due: now }
    }

    /// Takes note of what this machine can send now.
    pub(super) fn set_route(&mut self, route: u32, v4: bool, now: Instant) {
        if route != self.route {
            *self = Self::new(route, v4, now);
        }
    }

    /// The longest packet that is known to come through, in bytes; what this machine can send before that is known.
    pub(super) fn mtu(&self) -> u32 {
        self.known.unwrap_or(self.route)
    }

    /// Whether it is being looked for.
    pub(super) fn is_sought(&self) -> bool {
        self.search.is_some()
    }

    /// There is reason to look again soon.
    pub(super) fn doubt(&mut self, now: Instant) {
        let earliest = self.began.map_or(now, |began| began + PAUSE);
        self.due = self.due.min(earliest.max(now));
    }

    /// The lengths of the probes that are to be sent now, in bytes from the IP header on.
    pub(super) fn probes(&mut self, now: Instant) -> Vec<u32> {
        if self.search.is_none() && now >= self.due {
            self.began = Some(now);
            self.search = Some(self.whole());
        }
        let Some(search) = &mut self.search else {
            return Vec::new();
        };
        if search.tries > 0 && now < search.sent + PACE {
            return Vec::new();
        }
        if search.tries == TRIES && !self.narrow(now) {
            return Vec::new();
        }
        let route = self.route;
        let Some(search) = &mut self.search else {
            return Vec::new();
        };
        search.tries += 1;
        search.sent = now;
        // Most ways let pass what this machine can send: that is tried alone first.
        let alone = search.fails > route && search.tries == 1;
        if alone { vec![route] } else { search.teeth().collect() }
    }

    /// A probe of this length came back.
    pub(super) fn answered(&mut self, length: u32, now: Instant) {
        if let Some(search) = &mut self.search {
            search.heard = search.heard.max(length.min(search.fails - 1));
            if search.heard == search.fails - 1 {
                self.end(now);
            }
        }
    }

    fn whole(&self) -> Search {
        Search { passes: self.least, fails: self.route + 1, heard: 0, tries: 0, sent: self.due }
    }

    /// Takes for true what was heard; whether there is more to be tried.
    fn narrow(&mut self, now: Instant) -> bool {
        let Some(search) = &mut self.search else {
            return false;
        };
        if search.heard == 0 {
            self.search = None;
            self.due = now + PAUSE;
            return false;
        }
        let fails = search.teeth().find(|length| *length > search.heard).unwrap_or(search.fails);
        if fails == search.heard + 1 {
            self.end(now);
            return false;
        }
        *search = Search { passes: search.heard, fails, heard: 0, tries: 0, sent: now };
        true
    }

    fn end(&mut self, now: Instant) {
        if let Some(search) = self.search.take() {
            self.known = Some(search.heard);
            self.due = now + AGAIN;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks for a way that lets `passes` bytes through and loses what `lost` says; how long it took, and how many probes.
    fn look(
        path: &mut PathMtu,
        start: Instant,
        passes: u32,
        mut lost: impl FnMut(u32) -> bool,
    ) -> (Duration, usize) {
        let (mut now, mut sent) = (start, 0);
        loop {
            let probes = path.probes(now);
            sent += probes.len();
            for length in probes {
                if length <= passes && !lost(length) {
                    path.answered(length, now + Duration::from_millis(1));
                }
            }
            if !path.is_sought() {
                return (now - start, sent);
            }
            now += PACE;
        }
    }

    #[test]
    fn whatever_passes_is_found_to_the_byte() {
        let start = Instant::now();
        for (route, v4) in
            [(1_500, true), (1_500, false), (9_000, true), (65_535, false), (1_280, false), (576, true)]
        {
            for passes in (LEAST[usize::from(!v4)]..=route).step_by(if route > 9_000 { 97 } else { 1 }) {
                let mut path = PathMtu::new(route, v4, start);
                assert_eq!(path.mtu(), route);
                let (took, sent) = look(&mut path, start, passes, |_| false);
                assert_eq!(path.mtu(), passes, "of {route}");
                assert!(took <= 7 * TRIES * PACE, "{passes} of {route} took {took:?}");
                if passes == route {
                    assert_eq!(sent, 1, "most ways cost one probe");
                }
            }
        }
    }

    #[test]
    fn a_way_that_changes_is_found_again_and_losses_do_not_shorten_it() {
        let start = Instant::now();
        let mut path = PathMtu::new(1_500, true, start);
        // Three of four are lost.
        let mut count = 0;
        look(&mut path, start, 1_500, |_| {
            count += 1;
            count % TRIES != 0
        });
        assert_eq!(path.mtu(), 1_500);
        assert!(path.probes(start + AGAIN).is_empty());
        let later = start + 2 * AGAIN;
        look(&mut path, later, 1_400, |_| false);
        assert_eq!(path.mtu(), 1_400);
        look(&mut path, later + 2 * AGAIN, 1_500, |_| false);
        assert_eq!(path.mtu(), 1_500);
        path.set_route(9_000, true, later + 3 * AGAIN);
        assert_eq!(path.mtu(), 9_000);
    }

    #[test]
    fn a_node_that_is_silent_says_nothing_of_its_way() {
        let start = Instant::now();
        let mut path = PathMtu::new(1_500, false, start);
        look(&mut path, start, 1_400, |_| false);
        let later = start + AGAIN + PAUSE;
        look(&mut path, later, 0, |_| false);
        assert_eq!(path.mtu(), 1_400, "it stands");
        assert!(!path.probes(later + PAUSE + TRIES * PACE).is_empty(), "and is looked at soon");
        // It falls silent while it is looked at.
        let mut path = PathMtu::new(1_500, false, start);
        for from in 0..40 {
            let mut count = 0;
            let mut falls = PathMtu::new(1_500, false, start);
            look(&mut falls, start, 1_400, |_| {
                count += 1;
                count > from
            });
            assert!(
                falls.mtu() == 1_500 || (1_390..=1_400).contains(&falls.mtu()),
                "after {from}: {}",
                falls.mtu()
            );
        }
        look(&mut path, start, 0, |_| false);
        assert_eq!(path.mtu(), 1_500);
    }

    #[test]
    fn who_casts_doubt_has_it_looked_at_now_and_not_too_often() {
        let start = Instant::now();
        let mut path = PathMtu::new(1_500, true, start);
        look(&mut path, start, 1_500, |_| false);
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(10) {
            path.doubt(now);
            let probes = path.probes(now);
            sent += probes.len();
            for length in probes {
                path.answered(length, now);
            }
            now += Duration::from_millis(1);
        }
        assert_eq!(sent, 4);
        assert_eq!(path.mtu(), 1_500);
    }
}
