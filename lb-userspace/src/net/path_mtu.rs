//! The longest packet that the way to a node lets pass, found by probes of that length (RFC 8899): what routers say of it anybody
//! can say, and many ways let no word of theirs through.

use std::time::{Duration, Instant};

/// What every way lets pass, of each family (RFC 791, 3.2; RFC 8200, 5), in bytes.
const LEAST: [u32; 2] = [576, 1_280];
/// Lengths that are tried at once, and one more.
const TEETH: u32 = 8;
/// Times that a length is tried before it counts as too long.
const TRIES: u32 = 4;
/// Probes that are not answered are sent again after this time.
pub(super) const PACE: Duration = Duration::from_millis(50);
/// The longest time for which an answer may be on its way.
const PATIENCE: Duration = Duration::from_secs(1);
/// A way is looked at again after this time: it may have become longer or shorter, and nobody says so.
const AGAIN: Duration = Duration::from_secs(60);
/// And at most this often, whoever asks.
const PAUSE: Duration = Duration::from_secs(5);

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
    /// It is known not to, or longer than what is asked for.
    fails: u32,
    /// Whether the bounds are what was known before, which may have changed.
    checks: bool,
    /// The longest that was answered since these bounds stand; zero if none was.
    heard: u32,
    tries: u32,
    /// When the first probe between these bounds was sent, and the last.
    first: Instant,
    last: Instant,
    /// How long the first answer took.
    delay: Option<Duration>,
}

impl Search {
    fn between(passes: u32, fails: u32, now: Instant) -> Self {
        Self { passes, fails, checks: false, heard: 0, tries: 0, first: now, last: now, delay: None }
    }

    /// The lengths that are tried: the bounds and what lies evenly between them.
    fn teeth(&self) -> impl Iterator<Item = u32> + use<> {
        let (passes, width) = (self.passes, self.fails - 1 - self.passes);
        let teeth = TEETH.min(width);
        (0..=teeth).map(move |tooth| passes + width * tooth / teeth.max(1))
    }

    /// When what was not answered will not be.
    fn ends(&self) -> Instant {
        let wait = self.delay.map_or(PATIENCE, |delay| (2 * delay).clamp(PACE, PATIENCE));
        self.last + wait
    }
}

impl PathMtu {
    /// A way of which nothing is known but what was `known` before.
    pub(super) fn new(route: u32, known: Option<u32>, v4: bool, now: Instant) -> Self {
        let least = LEAST[usize::from(!v4)].min(route);
        let known = known.filter(|known| (least..=route).contains(known));
        Self { route, least, known, search: None, began: None, due: now }
    }

    /// Takes note of what this machine can send now.
    pub(super) fn set_route(&mut self, route: u32, v4: bool, now: Instant) {
        if route != self.route {
            *self = Self::new(route, self.known.map(|known| known.min(route)), v4, now);
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
            self.search = Some(self.begin(now));
        }
        let Some(search) = &self.search else {
            return Vec::new();
        };
        if search.tries > 0 && now < search.last + PACE {
            return Vec::new();
        }
        if search.tries == TRIES {
            if now < search.ends() {
                return Vec::new();
            }
            self.narrow(now);
        }
        let route = self.route;
        let Some(search) = &mut self.search else {
            return Vec::new();
        };
        search.tries += 1;
        search.last = now;
        // Most ways let pass what this machine can send: that is tried alone first.
        if search.tries == 1 && search.fails > route && search.passes == self.least {
            return vec![route];
        }
        let (passes, heard) = (search.passes, search.heard);
        // The shortest is for those that answer nothing at all.
        search.teeth().filter(|length| *length > heard || *length == passes && heard == 0).collect()
    }

    /// A probe of this length came back.
    pub(super) fn answered(&mut self, length: u32, now: Instant) {
        let Some(search) = &mut self.search else {
            return;
        };
        search.delay = search.delay.or(Some(now.saturating_duration_since(search.first)));
        search.heard = search.heard.max(length.min(self.route));
        if search.heard < search.fails - 1 {
            return;
        }
        // A late answer may be one for a length that was taken for too long.
        let is_all = search.heard == search.fails - 1 && !search.checks || search.heard == self.route;
        if is_all {
            self.end(now);
        } else {
            *search = Search::between(search.heard, self.route + 1, now);
        }
    }

    /// What was known is looked at first, and what is one byte longer.
    fn begin(&self, now: Instant) -> Search {
        match self.known.filter(|known| *known < self.route) {
            Some(known) => Search { checks: true, ..Search::between(known, known + 2, now) },
            None => Search::between(self.least, self.route + 1, now),
        }
    }

    /// Takes for true what was heard.
    fn narrow(&mut self, now: Instant) {
        let Some(search) = &mut self.search else {
            return;
        };
        match search.heard {
            // It is shorter than it was, or silent.
            0 if search.checks && search.passes > self.least => {
                *search = Search::between(self.least, search.passes, now)
            }
            0 => {
                self.search = None;
                self.due = now + PAUSE;
            }
            heard => {
                let fails = search.teeth().find(|length| *length > heard).unwrap_or(search.fails);
                if fails == heard + 1 {
                    self.end(now);
                } else {
                    *search = Search::between(heard, fails, now);
                }
            }
        }
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

    /// A way that lets so many bytes through, takes so long and loses what `lost` says.
    struct Way<F> {
        passes: u32,
        delay: Duration,
        lost: F,
    }

    impl<F: FnMut(u32) -> bool> Way<F> {
        /// Looks for it; how long it took, and how many probes.
        fn look(&mut self, path: &mut PathMtu, start: Instant) -> (Duration, usize) {
            let (mut now, mut sent, mut flying) = (start, 0, Vec::new());
            loop {
                flying.retain(|(arrives, length)| {
                    if *arrives <= now {
                        path.answered(*length, now);
                    }
                    *arrives > now
                });
                let probes = path.probes(now);
                sent += probes.len();
                let answered =
                    probes.into_iter().filter(|length| *length <= self.passes && !(self.lost)(*length));
                flying.extend(answered.map(|length| (now + self.delay, length)));
                if !path.is_sought() {
                    return (now - start, sent);
                }
                now += Duration::from_millis(5);
            }
        }
    }

    fn way(passes: u32) -> Way<impl FnMut(u32) -> bool> {
        Way { passes, delay: Duration::from_millis(1), lost: |_| false }
    }

    fn new(route: u32, v4: bool, now: Instant) -> PathMtu {
        PathMtu::new(route, None, v4, now)
    }

    #[test]
    fn whatever_passes_is_found_to_the_byte() {
        let start = Instant::now();
        for (route, v4) in
            [(1_500, true), (1_500, false), (9_000, true), (65_535, false), (1_280, false), (576, true)]
        {
            for passes in (LEAST[usize::from(!v4)]..=route).step_by(if route > 9_000 { 997 } else { 13 }) {
                let mut path = new(route, v4, start);
                assert_eq!(path.mtu(), route);
                let (took, sent) = way(passes).look(&mut path, start);
                assert_eq!(path.mtu(), passes, "of {route}");
                assert!(took <= 7 * TRIES * PACE, "{passes} of {route} took {took:?}");
                if passes == route {
                    assert_eq!(sent, 1, "most ways cost one probe");
                }
            }
        }
    }

    #[test]
    fn a_long_way_is_found_as_a_short_one() {
        let start = Instant::now();
        for delay in [0, 40, 120, 250, 600, 900].map(Duration::from_millis) {
            for passes in [1_280, 1_281, 1_400, 1_499, 1_500] {
                let mut path = new(1_500, false, start);
                let mut way = Way { delay, ..way(passes) };
                way.look(&mut path, start);
                assert_eq!(path.mtu(), passes, "{delay:?} there and back");
                way.look(&mut path, start + 2 * AGAIN);
                assert_eq!(path.mtu(), passes, "again, {delay:?} there and back");
            }
        }
    }

    #[test]
    fn a_way_that_changes_is_found_again_and_losses_do_not_shorten_it() {
        let start = Instant::now();
        let mut path = new(1_500, true, start);
        // Three of four are lost.
        let mut count = 0;
        let lost = |_| {
            count += 1;
            count % TRIES != 0
        };
        Way { passes: 1_500, delay: PACE, lost }.look(&mut path, start);
        assert_eq!(path.mtu(), 1_500);
        assert!(path.probes(start + AGAIN).is_empty());
        let mut now = start;
        for passes in [1_400, 1_401, 1_399, 576, 1_500, 1_340, 1_340] {
            now += 2 * AGAIN;
            way(passes).look(&mut path, now);
            assert_eq!(path.mtu(), passes);
        }
        let (_, sent) = way(1_340).look(&mut path, now + 2 * AGAIN);
        assert!(sent <= 2 * TRIES as usize, "what has not changed costs {sent} probes");
        // What is known stands until it is found to be otherwise.
        path.set_route(9_000, true, now + 3 * AGAIN);
        assert_eq!(path.mtu(), 1_340);
        path.set_route(1_300, true, now + 3 * AGAIN);
        assert_eq!(path.mtu(), 1_300);
        assert_eq!(PathMtu::new(1_500, Some(1_400), true, now).mtu(), 1_400);
        assert_eq!(PathMtu::new(1_500, Some(0), true, now).mtu(), 1_500);
    }

    #[test]
    fn a_node_that_is_silent_says_nothing_of_its_way() {
        let start = Instant::now();
        let mut path = new(1_500, false, start);
        way(1_400).look(&mut path, start);
        let later = start + 2 * AGAIN;
        let (took, _) = way(0).look(&mut path, later);
        assert_eq!(path.mtu(), 1_400, "it stands");
        assert!(!path.probes(later + took + PAUSE).is_empty(), "and is looked at soon");
        // It falls silent while it is looked at.
        for from in 0..40 {
            let (mut count, mut falls) = (0, new(1_500, false, start));
            let lost = |_| {
                count += 1;
                count > from
            };
            Way { passes: 1_400, delay: PACE, lost }.look(&mut falls, start);
            let found = falls.mtu();
            assert!(found == 1_500 || (1_390..=1_400).contains(&found), "after {from}: {found}");
        }
        let mut path = new(1_500, false, start);
        way(0).look(&mut path, start);
        assert_eq!(path.mtu(), 1_500);
    }

    #[test]
    fn who_casts_doubt_has_it_looked_at_now_and_not_too_often() {
        let start = Instant::now();
        let mut path = new(1_500, true, start);
        way(1_500).look(&mut path, start);
        let (mut now, mut sent) = (start, 0);
        while now < start + 5 * PAUSE {
            path.doubt(now);
            let probes = path.probes(now);
            sent += probes.len();
            for length in probes {
                path.answered(length, now);
            }
            now += Duration::from_millis(1);
        }
        assert_eq!((sent, path.mtu()), (4, 1_500));
    }
}
