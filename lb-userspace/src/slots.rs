//! The order of a service's slots: each task as often as its weight says, spread as evenly as can be, or so that few change
//! when tasks come and go.

/// The smooth weighted order of `weights`: a list of indexes in which index `i` stands `weights[i] / gcd` times.
///
/// Equal weights give `0, 1, 2, …`. The method is nginx's smooth weighted round robin: every turn each task's
/// credit grows by its weight, the richest is taken and pays the sum of all weights.
pub fn smooth_wrr(weights: &[u16]) -> Vec<usize> {
    let divisor = weights.iter().fold(0, |a, b| gcd(a, *b)).max(1);
    let weights: Vec<i64> = weights.iter().map(|weight| i64::from(weight / divisor)).collect();
    let total: i64 = weights.iter().sum();
    if weights.iter().all(|weight| *weight == 1) {
        return (0..weights.len()).collect();
    }
    let mut credit = vec![0_i64; weights.len()];
    let mut order = Vec::with_capacity(total as usize);
    for _ in 0..total {
        for (credit, weight) in credit.iter_mut().zip(&weights) {
            *credit += weight;
        }
        // The first of the richest, so that the order is fixed.
        let Some(richest) = (0..credit.len()).max_by_key(|index| (credit[*index], std::cmp::Reverse(*index)))
        else {
            break;
        };
        credit[richest] -= total;
        order.push(richest);
    }
    order
}

/// Weights as slots have them where open connections are compared: in eight bits, none of them zero.
pub fn compared(weights: &[u16]) -> Vec<u8> {
    let divisor = weights.iter().fold(0, |a, b| gcd(a, *b)).max(1);
    let heaviest = u32::from(weights.iter().copied().max().unwrap_or_default() / divisor).max(1);
    let scaled = |weight: &u16| {
        let weight = u32::from(weight / divisor);
        let fits = if heaviest > 255 { (weight * 255 + heaviest / 2) / heaviest } else { weight };
        fits.clamp(1, 255) as u8
    };
    weights.iter().map(scaled).collect()
}

/// Numbers of slots for consistent placement, primes. The share of a task is right to a hundredth as long as there are a
/// hundred slots for each; from one number to the other nearly all connections would be placed anew.
const TABLES: [usize; 2] = [1_021, 16_381];
const SLOTS_OF_A_TASK: usize = 100;

/// A table in which task `i` stands `weights[i] / sum` of all times, and in which nearly all slots stay what they were when
/// a task comes or goes. The tasks are known by their names.
///
/// The order in which they are given does not matter as long as it is that of their names.
///
/// The method is Maglev's (Eisenbud et al., NSDI 2016, 3.4): each task prefers the slots in an order of its own, and in turn
/// takes the first of them that is free; one of less weight misses turns.
pub fn maglev_table(names: &[&str], weights: &[u16]) -> Vec<usize> {
    let heaviest = weights.iter().copied().max().unwrap_or_default();
    if heaviest == 0 {
        return Vec::new();
    }
    let size = TABLES.into_iter().find(|size| *size >= names.len() * SLOTS_OF_A_TASK);
    let size = size.unwrap_or(TABLES[TABLES.len() - 1]);
    let mut tasks: Vec<Preference> = names.iter().map(|name| Preference::new(name, size)).collect();
    // Whatever its weight, each gets a slot in the first turn.
    let mut credit: Vec<u32> = weights.iter().map(|weight| u32::from(heaviest - weight)).collect();
    let mut table = vec![usize::MAX; size];
    let mut free = size;
    while free > 0 {
        for (index, task) in tasks.iter_mut().enumerate() {
            credit[index] += u32::from(weights[index]);
            if credit[index] < u32::from(heaviest) || free == 0 {
                continue;
            }
            credit[index] -= u32::from(heaviest);
            let slot = task.find(|slot| table[*slot] == usize::MAX).unwrap_or_default();
            table[slot] = index;
            free -= 1;
        }
    }
    table
}

/// The order in which a task prefers the slots: each once, for their number is prime.
struct Preference {
    next: usize,
    skip: usize,
    size: usize,
}

impl Preference {
    fn new(name: &str, size: usize) -> Self {
        let [offset, skip] = [0, 1].map(|salt| hash(name, salt));
        let size64 = size as u64;
        Self { next: (offset % size64) as usize, skip: (skip % (size64 - 1) + 1) as usize, size }
    }
}

impl Iterator for Preference {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let slot = self.next;
        self.next = (slot + self.skip) % self.size;
        Some(slot)
    }
}

/// FNV-1a, its bits mixed once more: the same in every build, for the next controller must come to the same table.
fn hash(name: &str, salt: u8) -> u64 {
    let hash = name.bytes().chain([0, salt]).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        conntrack::FiveTuple,
        net::{Be16, V4},
    };
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_weights_take_turns() {
        assert_eq!(smooth_wrr(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(smooth_wrr(&[7, 7]), [0, 1]);
        assert_eq!(smooth_wrr(&[]), [0_usize; 0]);
    }

    #[test]
    fn unequal_weights_are_spread() {
        assert_eq!(smooth_wrr(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(smooth_wrr(&[4, 2]), [0, 1, 0]);
    }

    #[test]
    fn weights_that_are_compared_fit_a_byte() {
        assert_eq!(compared(&[1, 1]), [1, 1]);
        assert_eq!(compared(&[30, 10, 20]), [3, 1, 2]);
        assert_eq!(compared(&[1_000, 100, 1]), [255, 26, 1]);
        assert_eq!(compared(&[]), [0_u8; 0]);
    }

    /// How often each of the tasks stands in the table.
    fn shares(table: &[usize], tasks: usize) -> Vec<usize> {
        (0..tasks).map(|task| table.iter().filter(|i| **i == task).count()).collect()
    }

    #[test]
    fn consistent_shares_are_even_or_as_the_weights_say() {
        let names: Vec<String> = (1..=200).map(|number| format!("web.{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for count in [1, 2, 3, 10, 11, 163, 200] {
            let table = maglev_table(&names[..count], &vec![1; count]);
            let shares = shares(&table, count);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count}: {least} to {most} of {}", table.len());
        }
        assert!(shares(&maglev_table(&names[..2], &[1, 60_000]), 2).iter().all(|share| *share > 0));
        let table = maglev_table(&names[..3], &[1, 2, 5]);
        let wanted = [1, 2, 5].map(|weight| weight * table.len() / 8);
        let close = |(share, wanted): (&usize, &usize)| share.abs_diff(*wanted) <= 2;
        assert!(shares(&table, 3).iter().zip(&wanted).all(close), "{:?}", shares(&table, 3));
        assert_eq!(maglev_table(&[], &[]), [0_usize; 0]);
    }

    #[test]
    fn a_task_that_goes_moves_little_but_its_own_slots() {
        let names: Vec<String> = (1..=10).map(|number| format!("web.{number}.{number}x")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let all = maglev_table(&names, &[1; 10]);
        for gone in 0..10 {
            let rest: Vec<&str> = names.iter().copied().filter(|name| *name != names[gone]).collect();
            let then = maglev_table(&rest, &[1; 9]);
            let moved = all
                .iter()
                .zip(&then)
                .filter(|(before, after)| **before != gone && names[**before] != rest[**after])
                .count();
            assert!(moved * 20 < all.len(), "{moved} of {} when {gone} goes", all.len());
        }
    }

    /// By chance a task has as many as its share says, and five standard deviations more or fewer at most; its share of a table's slots
    /// is right to one slot.
    #[test]
    fn clients_that_come_by_chance_are_spread_as_chance_spreads_them() {
        for count in [5_usize, 1_000] {
            let names: Vec<String> = (1..=count).map(|number| format!("web.{number}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let table = maglev_table(&names, &vec![1; count]);
            let clients = 400 * count as u32;
            // Addresses in a row, as those of a provider's network, each with the port after its last one's.
            let tuple = |client: u32| {
                let source = V4((0x0a00_0000 + client).to_be());
                let port = Be16::new(20_000 + (client % 40_000) as u16);
                FiveTuple::new(source, V4(0x0102_00c0), port, Be16::new(80), 6)
            };
            let by: [fn(&FiveTuple<V4>) -> u32; 2] = [FiveTuple::flow_hash, |tuple| tuple.source_hash(0)];
            for (what, hash) in ["five-tuple", "address"].into_iter().zip(by) {
                let mut given = vec![0_u32; count];
                (0..clients)
                    .for_each(|client| given[table[hash(&tuple(client)) as usize % table.len()]] += 1);
                let share = 400.0 * (1.0 + count as f64 / table.len() as f64);
                let off = share - 400.0 + 5.0 * share.sqrt();
                let (least, most) = (given.iter().min().unwrap(), given.iter().max().unwrap());
                let fits = f64::from(*least) > 400.0 - off && f64::from(*most) < 400.0 + off;
                assert!(fits, "by {what}, {count} tasks: {least} to {most} of 400, {off:.0} off at most");
            }
        }
    }

    #[test]
    fn of_a_thousand_tasks_one_that_goes_moves_little_but_its_own_share() {
        let names: Vec<String> = (1..=1_000).map(|number| format!("web.{number}")).collect();
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        let before = maglev_table(&all, &[1; 1_000]);
        for gone in [0, 499, 999] {
            let rest: Vec<&str> = all.iter().copied().filter(|name| *name != all[gone]).collect();
            let after = maglev_table(&rest, &[1; 999]);
            let others = before.iter().zip(&after).filter(|(before, _)| **before != gone);
            let moved = others.filter(|(before, after)| all[**before] != rest[**after]).count();
            // Of 16,381 slots 16 were its own.
            assert!(moved * 50 < before.len(), "{moved} slots of others move when {gone} goes");
        }
    }

    proptest! {
        #[test]
        fn each_index_has_its_share(weights in prop::collection::vec(1_u16..=100, 1..20)) {
            let order = smooth_wrr(&weights);
            let total: usize = weights.iter().map(|w| *w as usize).sum();
            for (index, weight) in weights.iter().enumerate() {
                let turns = order.iter().filter(|i| **i == index).count();
                prop_assert_eq!(turns * total, *weight as usize * order.len());
            }
        }
    }
}
