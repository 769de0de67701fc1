//! The order of a service's slots: each task as often as its weight says, spread as evenly as can be.

/// The smooth weighted order of `weights`: a list of indexes in which index `i` stands `weights[i] / gcd` times.
///
/// Equal weights give `0, 1, 2, …`. The method is nginx's smooth weighted round robin: every turn each task's
/// credit grows by its weight, the richest is taken and pays the sum of all weights.
pub fn order(weights: &[u16]) -> Vec<usize> {
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

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_weights_take_turns() {
        assert_eq!(order(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(order(&[7, 7]), [0, 1]);
        assert_eq!(order(&[]), [0_usize; 0]);
    }

    #[test]
    fn unequal_weights_are_spread() {
        assert_eq!(order(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(order(&[4, 2]), [0, 1, 0]);
    }

    proptest! {
        #[test]
        fn each_index_has_its_share(weights in prop::collection::vec(1_u16..=100, 1..20)) {
            let order = order(&weights);
            let total: usize = weights.iter().map(|w| *w as usize).sum();
            for (index, weight) in weights.iter().enumerate() {
                let turns = order.iter().filter(|i| **i == index).count();
                prop_assert_eq!(turns * total, *weight as usize * order.len());
            }
        }
    }
}
