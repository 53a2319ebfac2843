//! Rows whose vocabulary is cut over ranks: what each rank finds in its part, put together.
//!
//! Only numbers of rows travel, never logits: a rank's largest logit and sums, the logits of the few ids that are asked
//! for, its own top k. Every rank gets the same numbers and puts them together in the order of the ranks, so that all
//! decide alike.

use cosmos_kernels::Isa;
use cosmos_kernels::vocabulary::{self, Sums};

use super::softmax::RowStats;
use super::{ABSENT, top};
use crate::model::VocabShard;
use crate::{EngineError, Result};

/// What a rank finds in its part of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum PartStats {
    /// NaN or +∞.
    Bad,
    /// Nothing above −∞.
    Empty,
    /// Sums relative to the part's own largest logit; `argmax` is an id.
    Found(Sums),
}

impl PartStats {
    /// Of the logits of ids from `first` on.
    pub(crate) fn of(z_v: &[f32], first: usize) -> PartStats {
        match vocabulary::sums(Isa::best(), z_v) {
            Some(sums) => PartStats::Found(Sums { argmax: sums.argmax + first, ..sums }),
            None if z_v.iter().all(|&z| z == f32::NEG_INFINITY) => PartStats::Empty,
            None => PartStats::Bad,
        }
    }

    /// Numbers of [`PartStats::numbers`].
    const NUMBERS: usize = 4;

    fn numbers(&self) -> [f64; Self::NUMBERS] {
        match self {
            PartStats::Bad => [f64::NAN; 4],
            PartStats::Empty => [f64::NEG_INFINITY, 0.0, 0.0, 0.0],
            PartStats::Found(sums) => [f64::from(sums.max), sums.argmax as f64, sums.sum, sums.weighted],
        }
    }
}

/// The statistics of a row from those of its parts, as [`PartStats::numbers`]; none where the whole row has none.
fn whole_of<'a>(parts: impl Iterator<Item = &'a [f64]> + Clone) -> Option<RowStats> {
    let mut best = (f64::NEG_INFINITY, f64::INFINITY);
    for part in parts.clone() {
        if part[0].is_nan() {
            return None;
        }
        // Of equal logits the lowest id counts, wherever it lies.
        if part[0] > best.0 || part[0] == best.0 && part[1] < best.1 {
            best = (part[0], part[1]);
        }
    }
    let (max, argmax) = best;
    if !max.is_finite() {
        return None;
    }
    let (mut sum, mut weighted) = (0.0, 0.0);
    for part in parts.filter(|part| part[0].is_finite()) {
        let below = part[0] - max;
        sum += below.exp() * part[2];
        weighted += below.exp() * (part[3] + below * part[2]);
    }
    Some(RowStats::from_sums(Sums { max: max as f32, argmax: argmax as usize, sum, weighted }))
}

/// What a rank brings of a row.
#[derive(Debug, Clone)]
pub(crate) struct RowPart {
    pub own: PartStats,
    /// Of another model's logits at the same place.
    pub other: Option<PartStats>,
    /// Logits of ids that are asked for, −∞ for those of other ranks.
    pub picked: Vec<f32>,
    /// The part's largest logits and their ids.
    pub top: Vec<(f32, u32)>,
}

/// What all ranks together know of a row.
#[derive(Debug, Clone)]
pub(crate) struct RowWhole {
    pub own: Option<RowStats>,
    /// As asked for; none inside where the other model's row has none.
    pub other: Option<Option<RowStats>>,
    pub picked: Vec<f32>,
    pub top: Vec<(f32, u32)>,
}

/// The logit of `id` if this rank has it, else −∞; −∞ for [`ABSENT`].
pub(crate) fn pick(shard: &VocabShard, z_v: &[f32], id: u32) -> f32 {
    local(shard, id).and_then(|at| z_v.get(at)).copied().unwrap_or(f32::NEG_INFINITY)
}

/// Where `id` lies in this rank's rows, if it does.
pub(crate) fn local(shard: &VocabShard, id: u32) -> Option<usize> {
    (id as usize).checked_sub(shard.first).filter(|&at| at < shard.len)
}

/// Puts the ranks' parts of the same rows together. All ranks bring the same number of everything, but for `top`, of which
/// at most `top_k`.
///
/// # Errors
/// Ranks that are late, gone or have other rows.
pub(crate) fn join(shard: &VocabShard, parts: &[RowPart], top_k: usize) -> Result<Vec<RowWhole>> {
    let mut mine = Vec::new();
    for part in parts {
        mine.extend(part.own.numbers());
        mine.extend(part.other.iter().flat_map(PartStats::numbers));
        mine.extend(part.picked.iter().map(|&z| f64::from(z)));
        let absent = (f32::NEG_INFINITY, ABSENT);
        for (z, id) in part.top.iter().copied().chain(std::iter::repeat(absent)).take(top_k) {
            mine.extend([f64::from(z), f64::from(id)]);
        }
    }
    let all = gather(shard, &mine)?;
    let ranks: Vec<&[f64]> = all.chunks_exact(mine.len().max(1)).collect();
    let mut at = 0;
    let rows = parts.iter().map(|part| {
        let mut next = |count: usize| {
            at += count;
            at - count..at
        };
        let stats_at = next(PartStats::NUMBERS);
        let own = whole_of(ranks.iter().map(|rank| &rank[stats_at.clone()]));
        let other = part.other.map(|_| {
            let stats_at = next(PartStats::NUMBERS);
            whole_of(ranks.iter().map(|rank| &rank[stats_at.clone()]))
        });
        let picked = next(part.picked.len())
            .map(|i| ranks.iter().fold(f32::NEG_INFINITY, |best, rank| best.max(rank[i] as f32)))
            .collect();
        let top_at = next(2 * top_k);
        let found = ranks.iter().flat_map(|rank| rank[top_at.clone()].chunks_exact(2));
        let found = found.map(|pair| (pair[0] as f32, pair[1] as u32)).filter(|(_, id)| *id != ABSENT);
        RowWhole { own, other, picked, top: top::best(found.collect(), top_k) }
    });
    Ok(rows.collect())
}

/// The sums over the ranks, in their order.
///
/// # Errors
/// As [`join`].
pub(crate) fn sum(shard: &VocabShard, mine: &[f64]) -> Result<Vec<f64>> {
    let mut total = vec![0.0; mine.len()];
    for rank in gather(shard, mine)?.chunks_exact(mine.len().max(1)) {
        total.iter_mut().zip(rank).for_each(|(total, value)| *total += value);
    }
    Ok(total)
}

/// All ranks' numbers, one rank after the other. They travel as pairs of f32 with 48 bits between them.
pub(crate) fn gather(shard: &VocabShard, mine: &[f64]) -> Result<Vec<f64>> {
    let halves = |&x: &f64| {
        let high = x as f32;
        let low = if high.is_finite() { (x - f64::from(high)) as f32 } else { 0.0 };
        // A negative zero stays one: it counts less than the positive in the order of a top k.
        let low = if low == 0.0 { low.copysign(high) } else { low };
        [high, low]
    };
    let halves: Vec<f32> = mine.iter().flat_map(halves).collect();
    let mut all = vec![0.0; halves.len() * shard.collective.world()];
    shard.collective.all_gather(&halves, &mut all)?;
    Ok(all.chunks_exact(2).map(|pair| f64::from(pair[0]) + f64::from(pair[1])).collect())
}

/// Checks that a shard lies in its vocabulary.
pub(crate) fn check(shard: &VocabShard) -> Result<()> {
    if shard.len == 0 || shard.first.checked_add(shard.len).is_none_or(|end| end > shard.vocab) {
        return Err(EngineError::invalid(format!("a part of the vocabulary that is none: {shard:?}"), ""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cosmos_parallel::ThreadGroup;
    use proptest::prelude::*;

    use super::*;

    /// Runs `work` on every rank of a cut vocabulary whose parts differ in length and do not lie in the order of the ranks.
    fn on_shards<T: Send>(vocab: usize, ranks: usize, work: impl Fn(VocabShard) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> = ThreadGroup::of(ranks, 30_000)
                .into_iter()
                .enumerate()
                .map(|(rank, handle)| {
                    let cut = |part: usize| vocab * part / ranks;
                    let first = cut(ranks - 1 - rank);
                    let len = cut(ranks - rank) - first;
                    let shard = VocabShard { first, len, vocab, collective: Arc::new(handle) };
                    scope.spawn(move || work(shard))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Few different values: many ties, whole parts at −∞, rows that are bad in one part only.
        #[test]
        fn parts_make_the_row(
            z_v in prop::collection::vec(prop_oneof![8 => (-3..3_i32).prop_map(|z| z as f32 * 1.5), 3 => Just(f32::NEG_INFINITY)], 8..60),
            bad in prop::option::weighted(0.2, (0..60_usize, prop::sample::select(vec![f32::NAN, f32::INFINITY]))),
            ranks in prop::sample::select(vec![2, 3, 4]),
            top_k in 0..9_usize,
            asked in prop::collection::vec(0..60_u32, 0..4),
        ) {
            let mut z_v = z_v;
            if let Some((at, value)) = bad {
                let at = at % z_v.len();
                z_v[at] = value;
            }
            let expected = RowStats::of(&z_v);
            let asked: Vec<u32> = asked.iter().map(|id| id % z_v.len() as u32).chain([ABSENT]).collect();
            let found = on_shards(z_v.len(), ranks, |shard| {
                let own_v = &z_v[shard.ids()];
                let part = RowPart {
                    own: PartStats::of(own_v, shard.first),
                    other: Some(PartStats::of(own_v, shard.first)),
                    picked: asked.iter().map(|&id| pick(&shard, own_v, id)).collect(),
                    top: top::top_k_from(own_v, top_k, shard.first),
                };
                join(&shard, &[part.clone(), part], top_k).unwrap()
            });
            for rows in found {
                prop_assert_eq!(rows.len(), 2);
                for row in rows {
                    match (&expected, &row.own) {
                        (None, None) => prop_assert!(row.other.unwrap().is_none()),
                        (Some(expected), Some(got)) => {
                            prop_assert_eq!((expected.max, expected.argmax), (got.max, got.argmax));
                            prop_assert!((expected.sum / got.sum - 1.0).abs() < 1e-6);
                            prop_assert!((expected.entropy - got.entropy).abs() < 2e-6);
                            prop_assert_eq!(got.sum, row.other.unwrap().unwrap().sum);
                            prop_assert_eq!(row.top, top::top_k(&z_v, top_k));
                            let picked: Vec<f32> =
                                asked.iter().map(|&id| z_v.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY)).collect();
                            prop_assert_eq!(row.picked, picked);
                        }
                        (expected, got) => prop_assert!(false, "{expected:?} {got:?}"),
                    }
                }
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let whole = VocabShard::whole(4);
        assert!(check(&whole).is_ok());
        for (first, len) in [(0, 0), (1, 4), (usize::MAX, 2)] {
            assert!(check(&VocabShard { first, len, ..whole.clone() }).is_err());
        }
        assert_eq!((local(&whole, 3), local(&whole, 4), local(&whole, ABSENT)), (Some(3), None, None));
    }
}
