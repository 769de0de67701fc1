//! Slots: what a listener leads to, a task each.

use crate::{pod, stats::Open, verifier::opaque};

/// An entry of the slot table.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Slot(pub u32);

/// Bits of a backend's index.
const INDEX_BITS: u32 = 24;

impl Slot {
    /// The highest index of a backend that a slot can name.
    pub const HIGHEST: u32 = (1 << INDEX_BITS) - 1;

    /// A slot of a backend, whose weight counts where the open connections of tasks are compared
    /// ([`crate::endpoint::LEAST`]): each task has one slot there. Elsewhere a task has as many slots as it weighs.
    #[inline(always)]
    pub const fn new(backend: u32, weight: u8) -> Self {
        Self(backend & Self::HIGHEST | (weight as u32) << INDEX_BITS)
    }

    /// Index of the backend.
    #[inline(always)]
    pub const fn backend(self) -> u32 {
        self.0 & Self::HIGHEST
    }

    /// Weight of the task, one at least.
    #[inline(always)]
    pub const fn weight(self) -> u32 {
        let weight = self.0 >> INDEX_BITS;
        weight | (weight == 0) as u32
    }
}

/// Slots that are compared for one connection.
pub const WINDOW: u32 = 8;

/// From one of them to the next, of so many slots: they are spread over all, for tasks that came together stand together.
#[inline(always)]
pub const fn stride(count: u64) -> u64 {
    let stride = count / WINDOW as u64;
    stride | (stride == 0) as u64
}

/// Which of some slots takes a connection: the first whose task has room, or of those the one with the fewest open connections for
/// its weight, the first of equals.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Backend of the best so far; [`Choice::NOBODY`] while none has room.
    pub backend: u32,
    /// Connections that it would have, where they are compared.
    connections: u64,
    /// Its weight, likewise.
    weight: u64,
}

impl Choice {
    /// Stands for no backend.
    pub const NOBODY: u32 = u32::MAX;
    /// Worse than any.
    pub const NONE: Self = Self { backend: Self::NOBODY, connections: 1 << 40, weight: 1 };

    /// Looks at a slot, whose task has so many connections and may have `most`, of which zero is any number; `least` is 1 where they
    /// are compared, else 0. Without a branch: the verifier would walk each of them for each slot.
    #[inline(always)]
    pub fn look(&mut self, slot: Slot, open: Open, most: u64, least: u64) {
        let connections = open.own() * least + 1;
        let weight = slot.weight() as u64 * least + (1 - least);
        let has_room =
            opaque(open.established().wrapping_sub(most) >> 63) | opaque(most.wrapping_sub(1) >> 63);
        let fewer = opaque((connections * self.weight).wrapping_sub(self.connections * weight) >> 63);
        let taken = (has_room & fewer).wrapping_neg();
        self.backend ^= (self.backend ^ slot.backend()) & taken as u32;
        self.connections ^= (self.connections ^ connections) & taken;
        self.weight ^= (self.weight ^ weight) & taken;
    }
}

pod!(Slot);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_keeps_its_parts_apart() {
        for (backend, weight) in [(0, 1), (7, 255), (Slot::HIGHEST, 1), (Slot::HIGHEST, 255)] {
            let slot = Slot::new(backend, weight);
            assert_eq!((slot.backend(), slot.weight()), (backend, u32::from(weight)));
        }
        assert_eq!(Slot::new(5, 0).weight(), 1);
    }

    /// What is chosen of tasks with these connections and weights.
    fn chosen(open: &[u64], weights: &[u8], most: u64, least: u64) -> Option<usize> {
        let mut choice = Choice::NONE;
        for (backend, (open, weight)) in open.iter().zip(weights).enumerate() {
            choice.look(Slot::new(backend as u32, *weight), Open(*open), most, least);
        }
        (choice.backend != Choice::NOBODY).then_some(choice.backend as usize)
    }

    #[test]
    fn who_has_room_comes_first_and_of_those_who_has_the_fewest_for_its_weight() {
        const ESTABLISHED: u64 = 1 << 32;
        for (open, weights, most, least, wanted) in [
            (&[3, 2, 2][..], [1, 1, 1], 0, 1, Some(1)),
            // Five of three shares are fewer than two of one.
            (&[5, 2, 9], [3, 1, 3], 0, 1, Some(0)),
            (&[0, 0, 0], [1, 3, 2], 0, 1, Some(1)),
            // Those that are established take room, and this node's are compared.
            (&[1, 9 * ESTABLISHED, 2], [1; 3], 0, 1, Some(1)),
            (&[1, 9 * ESTABLISHED, 2], [1; 3], 9, 1, Some(0)),
            (&[4 * ESTABLISHED, 3 * ESTABLISHED, 9], [1; 3], 4, 0, Some(1)),
            (&[4 * ESTABLISHED, 5 * ESTABLISHED, 4 * ESTABLISHED], [1; 3], 4, 0, None),
            (&[7, 0, 0], [1; 3], 0, 0, Some(0)),
            (&[7 * ESTABLISHED, 8 * ESTABLISHED, 9 * ESTABLISHED], [255; 3], 7, 1, None),
            (&[u32::MAX as u64 - 1, u32::MAX as u64, u32::MAX as u64], [255, 1, 255], 0, 1, Some(0)),
        ] {
            assert_eq!(chosen(open, &weights, most, least), wanted, "{open:?} {weights:?} {most} {least}");
        }
    }

    /// A number that looks like chance (xorshift).
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % end
        }
    }

    /// Tasks with connections that come in turn and end by chance.
    struct Tasks {
        open: Vec<u64>,
        weights: Vec<u8>,
        turn: usize,
        connections: Vec<usize>,
        random: Random,
    }

    impl Tasks {
        fn new(weights: Vec<u8>) -> Self {
            let open = vec![0; weights.len()];
            Self { open, weights, turn: 0, connections: vec![], random: Random(7) }
        }

        /// As the datapath does: some slots from a turn on, each task one.
        fn comes(&mut self) {
            let mut choice = Choice::NONE;
            for offset in 0..WINDOW as usize {
                let at = (self.turn + offset * stride(self.open.len() as u64) as usize) % self.open.len();
                choice.look(Slot::new(at as u32, self.weights[at]), Open(self.open[at]), 0, 1);
            }
            self.turn += 1;
            self.open[choice.backend as usize] += 1;
            self.connections.push(choice.backend as usize);
        }

        fn ends(&mut self) {
            let one = self.random.below(self.connections.len() as u64) as usize;
            self.open[self.connections.swap_remove(one)] -= 1;
        }

        /// The fewest and most connections for a task's weight, in percent of what each should have.
        fn skew(&self) -> (u64, u64) {
            let shares: u64 = self.weights.iter().map(|weight| u64::from(*weight)).sum();
            let percent = |(open, weight): (&u64, &u8)| {
                open * 100 * shares / (u64::from(*weight) * self.connections.len() as u64)
            };
            let all: Vec<u64> = self.open.iter().zip(&self.weights).map(percent).collect();
            (all.iter().copied().min().unwrap_or_default(), all.iter().copied().max().unwrap_or_default())
        }
    }

    #[test]
    fn connections_that_end_by_chance_leave_no_task_with_many_more_than_others() {
        let weighted: Vec<u8> = [1, 2, 3].into_iter().cycle().take(1_000).collect();
        for (weights, least, most) in [
            (vec![1; 5], 95, 105),
            (vec![1; 1_000], 90, 110),
            (vec![3, 1, 1, 2, 1], 95, 105),
            (weighted, 85, 115),
        ] {
            let mut tasks = Tasks::new(weights);
            let each = 100 * tasks.open.len();
            (0..each).for_each(|_| tasks.comes());
            for _ in 0..5 * each {
                tasks.ends();
                tasks.comes();
            }
            let skew = tasks.skew();
            assert!(skew.0 >= least && skew.1 <= most, "{} tasks: {skew:?} percent", tasks.open.len());
        }
    }

    /// A fifth of the tasks are replaced: they have nothing, and are given what ends at all.
    #[test]
    fn tasks_that_come_have_their_share_when_a_third_of_the_connections_has_gone() {
        for count in [5, 1_000] {
            let mut tasks = Tasks::new(vec![1; count]);
            (0..100 * count).for_each(|_| tasks.comes());
            let new = count / 5;
            tasks.connections.retain(|task| *task >= new);
            tasks.open[..new].fill(0);
            (0..100 * new).for_each(|_| tasks.comes());
            for _ in 0..100 * count / 3 {
                tasks.ends();
                tasks.comes();
            }
            let skew = tasks.skew();
            assert!(skew.0 >= 85 && skew.1 <= 115, "{count} tasks: {skew:?} percent");
        }
    }
}
