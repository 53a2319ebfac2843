//! The k largest of a row.

use std::cmp::Ordering;

/// Larger first, then the lower id, so that equal logits always come in the same order.
fn order(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The `k` largest values and their ids, best first, in one pass over the row and `2·k` entries of memory. `k` larger
/// than the row gives the whole row.
pub(crate) fn top_k(z_v: &[f32], k: usize) -> Vec<(f32, u32)> {
    top_k_from(z_v, k, 0)
}

/// The `k` best of candidates in any order.
pub(crate) fn best(mut candidates: Vec<(f32, u32)>, k: usize) -> Vec<(f32, u32)> {
    candidates.sort_unstable_by(order);
    candidates.truncate(k);
    candidates
}

/// As [`top_k`] of a row whose first value has id `first`.
pub(crate) fn top_k_from(z_v: &[f32], k: usize, first: usize) -> Vec<(f32, u32)> {
    let k = k.min(z_v.len());
    if k == 0 {
        return Vec::new();
    }
    let room = (2 * k).max(32);
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(room);
    let mut threshold = f32::NEG_INFINITY;
    let mut full = false;
    for (at, &z) in z_v.iter().enumerate() {
        // A later id with an equal value never displaces an earlier one.
        if full && z <= threshold {
            continue;
        }
        best.push((z, (first + at) as u32));
        if best.len() == room {
            best.select_nth_unstable_by(k - 1, order);
            best.truncate(k);
            threshold = best[k - 1].0;
            full = true;
        }
    }
    best.sort_unstable_by(order);
    best.truncate(k);
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_a_sort(values in prop::collection::vec(-4i32..4, 1..300), k in 0usize..40) {
            let z_v: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            let mut sorted: Vec<(f32, u32)> = z_v.iter().copied().zip(0u32..).collect();
            sorted.sort_by(order);
            sorted.truncate(k.min(z_v.len()));
            prop_assert_eq!(top_k(&z_v, k), sorted);
        }
    }
}
