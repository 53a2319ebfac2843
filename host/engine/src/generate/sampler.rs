//! From logits to a token.
//!
//! Processors in the order of vLLM and transformers: repetition penalty, temperature, top-k, top-p. The random number of
//! a draw comes from ChaCha keyed with (seed, request, completion, position): no state is carried from draw to draw, so
//! slots, batch sizes and the order of requests cannot change a completion.

use cosmos_kernels::{Isa, vocabulary};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::score::softmax::{RowStats, exp_nonpositive};
use crate::score::top::top_k;
use crate::{EngineError, Result};

/// Temperatures below this are greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

/// How to choose tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep the k most likely tokens (and those equal to the k-th); -1 and 0 keep all, 1 is greedy.
    pub top_k: i64,
    /// Logits of tokens in the prompt or completion are divided by this when positive, else multiplied; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of all draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: -1, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingParams {
    /// Refuses values without a meaning.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(EngineError::invalid(
                format!("`temperature` is {}", self.temperature),
                "use 0 (greedy) or more",
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(EngineError::invalid(
                format!("`top_p` is {}", self.top_p),
                "use a number above 0, at most 1 (1 keeps all)",
            ));
        }
        if self.top_k < -1 {
            return Err(EngineError::invalid(format!("`top_k` is {}", self.top_k), "use -1 (all) or at least 1"));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Err(EngineError::invalid(
                format!("`repetition_penalty` is {}", self.repetition_penalty),
                "use a number above 0 (1 is off)",
            ));
        }
        Ok(())
    }

    /// Whether every token is the most likely one.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.top_k == 1
    }
}

/// Which draw of which completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Draw {
    pub request: u64,
    pub completion: u64,
    pub position: u64,
}

/// Uniform in [0, 1) with 53 bits, a function of the seed and the draw alone.
fn uniform(seed: u64, draw: Draw) -> f64 {
    let mut key = [0u8; 32];
    for (part, value) in key.chunks_exact_mut(8).zip([seed, draw.request, draw.completion, draw.position]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    let bits = ChaCha12Rng::from_seed(key).next_u64() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Chooses tokens by fixed parameters.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
}

impl Sampler {
    /// Checks the parameters.
    pub fn new(params: &SamplingParams) -> Result<Self> {
        params.check()?;
        Ok(Self { params: params.clone() })
    }

    /// Whether [`Sampler::choose`] looks at earlier tokens.
    pub(super) fn penalizes(&self) -> bool {
        self.params.repetition_penalty != 1.0
    }

    /// Whether [`Sampler::process`] changes anything.
    pub(super) fn changes_logits(&self) -> bool {
        self.penalizes() || self.divides()
    }

    fn divides(&self) -> bool {
        !self.params.is_greedy() && self.params.temperature != 1.0
    }

    /// The repetition penalty and the temperature. `seen` are the distinct tokens of prompt and completion.
    pub(super) fn process(&self, logits_v: &mut [f32], seen: &[u32]) {
        let params = &self.params;
        if self.penalizes() {
            for &id in seen {
                if let Some(z) = logits_v.get_mut(id as usize) {
                    *z = if *z > 0.0 { *z / params.repetition_penalty } else { *z * params.repetition_penalty };
                }
            }
        }
        if self.divides() {
            logits_v.iter_mut().for_each(|z| *z /= params.temperature);
        }
    }

    /// Chooses from one processed row, whose statistics are `stats`.
    pub(super) fn choose(&self, logits_v: &[f32], stats: &RowStats, draw: Draw) -> u32 {
        let params = &self.params;
        if params.is_greedy() {
            return stats.argmax;
        }
        let u = uniform(params.seed, draw);
        let limits_k = params.top_k > 0 && (params.top_k as u64) < logits_v.len() as u64;
        if !limits_k && params.top_p >= 1.0 {
            return draw_from_row(logits_v, stats, u).unwrap_or(stats.argmax);
        }
        let mut kept = if limits_k {
            with_ties(logits_v, params.top_k as usize)
        } else {
            nucleus_candidates(logits_v, stats, params.top_p)
        };
        if params.top_p < 1.0 {
            let whole = if limits_k { kept.iter().map(|k| weight(k.0, stats.max)).sum() } else { stats.sum };
            cut_nucleus(&mut kept, stats.max, f64::from(params.top_p) * whole);
        }
        // In the order of ids, as without limits, so that a limit that removes nothing changes nothing.
        kept.sort_unstable_by_key(|k| k.1);
        let sum = kept.iter().map(|k| weight(k.0, stats.max)).sum();
        draw_from(kept.into_iter(), stats.max, sum, u).unwrap_or(stats.argmax)
    }
}

fn weight(z: f32, max: f32) -> f64 {
    f64::from(exp_nonpositive(z - max))
}

/// The k most likely and all equal to the last of them.
fn with_ties(logits_v: &[f32], k: usize) -> Vec<(f32, u32)> {
    let mut kept = top_k(logits_v, k);
    if let Some(&(last, last_id)) = kept.last() {
        // Equal logits come in the order of ids, so those left out come later.
        kept.extend(logits_v.iter().copied().zip(0u32..).filter(|&(z, id)| z == last && id > last_id));
    }
    kept
}

/// The most likely tokens, best first, at least as many as the nucleus holds.
fn nucleus_candidates(logits_v: &[f32], stats: &RowStats, top_p: f32) -> Vec<(f32, u32)> {
    let mut k = 64;
    loop {
        let kept = top_k(logits_v, k);
        let mass: f64 = kept.iter().map(|t| weight(t.0, stats.max)).sum();
        if mass >= f64::from(top_p) * stats.sum || kept.len() == logits_v.len() {
            return kept;
        }
        k *= 8;
    }
}

/// Keeps the shortest run of most likely tokens that holds `wanted`, at least one.
fn cut_nucleus(kept: &mut Vec<(f32, u32)>, max: f32, wanted: f64) {
    let mut mass = 0.0;
    for index in 0..kept.len() {
        mass += weight(kept[index].0, max);
        if mass >= wanted {
            kept.truncate(index + 1);
            return;
        }
    }
}

/// As [`draw_from`] over a whole row: blocks are summed at once, and only the one that holds the draw is walked.
fn draw_from_row(logits_v: &[f32], stats: &RowStats, u: f64) -> Option<u32> {
    const BLOCK: usize = 256;
    let mut left = u * stats.sum;
    for (index, block) in logits_v.chunks(BLOCK).enumerate() {
        let whole = vocabulary::mass(Isa::best(), block, stats.max);
        if whole > left {
            let ids = (index * BLOCK) as u32..;
            let tokens = block.iter().copied().zip(ids);
            // Rounding may leave the draw just beyond the block's last token.
            let last = || tokens.clone().filter(|(z, _)| weight(*z, stats.max) > 0.0).last().map(|(_, id)| id);
            return draw_from(tokens.clone(), stats.max, left, 1.0).or_else(last);
        }
        left -= whole;
    }
    None
}

/// Inverse of the cumulative distribution; `None` when rounding leaves `u` beyond the end.
fn draw_from(tokens: impl Iterator<Item = (f32, u32)>, max: f32, sum: f64, u: f64) -> Option<u32> {
    let target = u * sum;
    let mut mass = 0.0;
    for (z, id) in tokens {
        mass += weight(z, max);
        if mass > target {
            return Some(id);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(vocab: usize) -> Vec<f32> {
        (0..vocab).map(|i| ((i * 7919 + 13) % 101) as f32 * 0.05 - 2.0).collect()
    }

    fn probabilities(z_v: &[f32]) -> Vec<f64> {
        let sum: f64 = z_v.iter().map(|&z| f64::from(z).exp()).sum();
        z_v.iter().map(|&z| f64::from(z).exp() / sum).collect()
    }

    /// All steps on one row, which is overwritten.
    fn chosen(sampler: &Sampler, logits_v: &mut [f32], seen: &[u32], draw: Draw) -> Option<u32> {
        sampler.process(logits_v, seen);
        RowStats::of(logits_v).map(|stats| sampler.choose(logits_v, &stats, draw))
    }

    fn counts(params: &SamplingParams, z_v: &[f32], draws: u64) -> Vec<u64> {
        let sampler = Sampler::new(params).unwrap();
        let mut counts = vec![0; z_v.len()];
        for position in 0..draws {
            let id = chosen(&sampler, &mut z_v.to_vec(), &[], Draw { request: 1, completion: 0, position }).unwrap();
            counts[id as usize] += 1;
        }
        counts
    }

    fn chi_square(counts: &[u64], expected: &[f64]) -> f64 {
        let total: u64 = counts.iter().sum();
        counts
            .iter()
            .zip(expected)
            .filter(|(_, p)| **p > 0.0)
            .map(|(&n, &p)| (n as f64 - p * total as f64).powi(2) / (p * total as f64))
            .sum()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let z_v = logits(20);
        let plain = SamplingParams { seed: 7, ..SamplingParams::default() };
        // 19 degrees of freedom: above 43.8 once in a thousand seeds; this seed is fixed.
        assert!(chi_square(&counts(&plain, &z_v, 20_000), &probabilities(&z_v)) < 43.8);
        let warm = SamplingParams { temperature: 1.7, ..plain };
        let scaled: Vec<f32> = z_v.iter().map(|z| z / 1.7).collect();
        assert!(chi_square(&counts(&warm, &z_v, 20_000), &probabilities(&scaled)) < 43.8);
        // The test can fail: the other distribution is far away.
        assert!(chi_square(&counts(&warm, &z_v, 20_000), &probabilities(&z_v)) > 100.0);
    }

    #[test]
    fn top_k_and_top_p_keep_what_they_should() {
        let z_v = logits(20);
        let p = probabilities(&z_v);
        let mut order: Vec<usize> = (0..20).collect();
        order.sort_by(|&a, &b| z_v[b].total_cmp(&z_v[a]));
        let limited = |kept: &[usize]| {
            let mass: f64 = kept.iter().map(|&i| p[i]).sum();
            (0..20).map(|i| if kept.contains(&i) { p[i] / mass } else { 0.0 }).collect::<Vec<_>>()
        };
        let check = |params: SamplingParams, kept: &[usize]| {
            let counts = counts(&params, &z_v, 8_000);
            assert!((0..20).all(|i| counts[i] == 0 || kept.contains(&i)), "{params:?}");
            assert!(chi_square(&counts, &limited(kept)) < 43.8, "{params:?}");
        };
        let base = SamplingParams { seed: 3, ..SamplingParams::default() };
        check(SamplingParams { top_k: 4, ..base.clone() }, &order[..4]);
        let mut mass = 0.0;
        let nucleus = order
            .iter()
            .take_while(|&&i| {
                let before = mass;
                mass += p[i];
                before < 0.6
            })
            .count();
        check(SamplingParams { top_p: 0.6, ..base.clone() }, &order[..nucleus]);
        // Top-p after top-k is a share of what top-k left.
        let kept: f64 = order[..6].iter().map(|&i| p[i]).sum();
        mass = 0.0;
        let nucleus = order[..6]
            .iter()
            .take_while(|&&i| {
                let before = mass;
                mass += p[i] / kept;
                before < 0.5
            })
            .count();
        check(SamplingParams { top_k: 6, top_p: 0.5, ..base.clone() }, &order[..nucleus]);
        check(SamplingParams { top_p: 1e-6, ..base.clone() }, &order[..1]);
        check(SamplingParams { top_k: 1, ..base.clone() }, &order[..1]);
        check(SamplingParams { temperature: 0.0, ..base.clone() }, &order[..1]);
        let everything = counts(&base, &z_v, 500);
        for same in [
            SamplingParams { top_k: 0, ..base.clone() },
            SamplingParams { top_k: 99, ..base.clone() },
            SamplingParams { top_k: 20, ..base.clone() },
        ] {
            assert_eq!(counts(&same, &z_v, 500), everything);
        }
        let almost = SamplingParams { top_p: 0.999_999, ..base };
        assert_eq!(counts(&almost, &z_v, 500), everything);
    }

    #[test]
    fn ties_at_the_kth_place_stay() {
        let z_v = [1.0, 3.0, 2.0, 2.0, 2.0, 0.0];
        let counts = counts(&SamplingParams { top_k: 2, seed: 1, ..SamplingParams::default() }, &z_v, 2_000);
        assert!(counts[1] > 0 && counts[2] > 0 && counts[3] > 0 && counts[4] > 0);
        assert_eq!((counts[0], counts[5]), (0, 0));
        assert_eq!(
            chosen(
                &Sampler::new(&SamplingParams { temperature: 0.0, ..SamplingParams::default() }).unwrap(),
                &mut [1.0, 5.0, 5.0],
                &[],
                Draw { request: 0, completion: 0, position: 0 }
            ),
            Some(1)
        );
    }

    #[test]
    fn a_large_nucleus_is_found() {
        let z_v = vec![0.0f32; 5_000];
        let counts = counts(&SamplingParams { top_p: 0.5, seed: 5, ..SamplingParams::default() }, &z_v, 3_000);
        assert!(counts[2500..].iter().all(|&n| n == 0) && counts[..2500].iter().any(|&n| n > 0));
    }

    #[test]
    fn repetition_penalty_is_that_of_transformers() {
        let sampler =
            Sampler::new(&SamplingParams { temperature: 0.0, repetition_penalty: 2.0, ..SamplingParams::default() })
                .unwrap();
        let draw = Draw { request: 0, completion: 0, position: 0 };
        let mut z_v = [4.0, 3.0, -1.0, -1.5, 0.0];
        assert_eq!(chosen(&sampler, &mut z_v, &[0, 2, 4], draw), Some(1));
        assert_eq!(z_v, [2.0, 3.0, -2.0, -1.5, 0.0]);
        assert_eq!(chosen(&sampler, &mut [4.0, 3.0], &[], draw), Some(0));
    }

    #[test]
    fn bad_logits_and_bad_parameters() {
        let sampler = Sampler::new(&SamplingParams::default()).unwrap();
        let draw = Draw { request: 0, completion: 0, position: 0 };
        assert_eq!(chosen(&sampler, &mut [0.0, f32::NAN], &[], draw), None);
        assert_eq!(chosen(&sampler, &mut [0.0, f32::INFINITY], &[], draw), None);
        assert_eq!(chosen(&sampler, &mut [0.0, f32::NEG_INFINITY], &[], draw), Some(0));
        let base = SamplingParams::default();
        for bad in [
            SamplingParams { temperature: -1.0, ..base.clone() },
            SamplingParams { temperature: f32::NAN, ..base.clone() },
            SamplingParams { top_p: 0.0, ..base.clone() },
            SamplingParams { top_p: 1.5, ..base.clone() },
            SamplingParams { top_k: -2, ..base.clone() },
            SamplingParams { repetition_penalty: 0.0, ..base },
        ] {
            assert!(Sampler::new(&bad).is_err(), "{bad:?}");
        }
    }
}
