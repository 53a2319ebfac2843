//! What a step wants to know about its tokens, collected over micro-batches.

use serde::{Deserialize, Serialize};

/// Mean and extremes of a number seen many times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// How many.
    pub count: usize,
    /// Their sum.
    pub sum: f64,
    /// Smallest, +∞ when there was none.
    pub min: f64,
    /// Largest, −∞ when there was none.
    pub max: f64,
}

impl Default for Spread {
    fn default() -> Self {
        Self { count: 0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY }
    }
}

impl Spread {
    /// Adds one number.
    pub fn add(&mut self, value: f64) {
        self.merge(&Self { count: 1, sum: value, min: value, max: value });
    }

    /// Adds another spread.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// The mean, none when nothing was added.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// Mean, extremes and percentiles of per-token numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Mean, summed in f64.
    pub mean: f64,
    /// Smallest.
    pub min: f32,
    /// 10th percentile (nearest rank, as the others).
    pub p10: f32,
    /// Median.
    pub p50: f32,
    /// 90th percentile.
    pub p90: f32,
    /// 99th percentile.
    pub p99: f32,
    /// Largest.
    pub max: f32,
}

impl Summary {
    /// Of these values; none when there are none. NaN sorts last.
    pub fn of(values: &[f32]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f32::total_cmp);
        let rank = |share: f64| sorted[((share * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1];
        Some(Self {
            mean,
            min: rank(0.0),
            p10: rank(0.1),
            p50: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
            max: rank(1.0),
        })
    }
}

/// Sums, counts and per-token values of a loss. Vectors hold one entry per token they make sense for, in the order of
/// samples.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The loss: `policy_loss + kl_beta · kl_loss − entropy_bonus`, reduced as the spec says. NaN if any row was not finite.
    pub total: f64,
    /// Surrogate and direct divergence, reduced.
    pub policy_loss: f64,
    /// Reference KL, reduced.
    pub kl_loss: f64,
    /// `entropy_coeff` times the mean entropy.
    pub entropy_bonus: f64,
    /// Samples seen, missing ones included.
    pub samples: usize,
    /// Tokens with a loss.
    pub tokens: usize,
    /// Samples whose teacher result is missing.
    pub missing_samples: usize,
    /// Their completion tokens.
    pub missing_tokens: usize,
    /// Rows whose logits or loss are NaN or infinite; they have no gradient.
    pub non_finite_rows: usize,
    /// Distilled tokens with a log-ratio at `kl_clip`.
    pub kl_clipped_tokens: usize,

    /// Divergence from the teacher: log-ratio of the sampled token before `kl_clip`, or the divergence.
    pub kl: Vec<f32>,
    /// −coefficient · divergence, before discounting.
    pub kl_advantages: Vec<f32>,
    /// The same after discounting.
    pub kl_advantages_discounted: Vec<f32>,
    /// Advantage of every token with a loss: reward plus distillation.
    pub advantages: Vec<f32>,
    /// Entropy of the student at every token with a loss.
    pub student_entropy: Vec<f32>,
    /// Entropy of the teacher where known.
    pub teacher_entropy: Vec<f32>,
    /// Student's probability of the candidates.
    pub top_k_mass_student: Vec<f32>,
    /// Teacher's probability of the candidates.
    pub top_k_mass_teacher: Vec<f32>,
    /// Tokens where the most likely ids of both are known, and how often they agree.
    pub top1_compared: usize,
    /// See `top1_compared`.
    pub top1_agreed: usize,

    /// Current / old probability.
    pub ratio: Spread,
    /// Tokens whose loss the ratio's clip decided.
    pub ratio_clipped_tokens: usize,
    /// Tokens whose loss the dual clip decided.
    pub dual_clipped_tokens: usize,
    /// Tokens left out by `behav_imp_weight_cap`.
    pub behaviour_capped_tokens: usize,
    /// Sequences left out by `off_policy_masking_delta`.
    pub masked_sequences: usize,
    /// Old / rollout probability, where rollout log-probs are known.
    pub behaviour_ratio: Spread,
    /// |log-prob now − log-prob that the rollout recorded| under the same weights, where it was recorded.
    pub mismatch: Spread,
}

impl Report {
    /// Adds the report of another micro-batch.
    pub fn merge(&mut self, other: Report) {
        self.total += other.total;
        self.policy_loss += other.policy_loss;
        self.kl_loss += other.kl_loss;
        self.entropy_bonus += other.entropy_bonus;
        self.samples += other.samples;
        self.tokens += other.tokens;
        self.missing_samples += other.missing_samples;
        self.missing_tokens += other.missing_tokens;
        self.non_finite_rows += other.non_finite_rows;
        self.kl_clipped_tokens += other.kl_clipped_tokens;
        self.kl.extend(other.kl);
        self.kl_advantages.extend(other.kl_advantages);
        self.kl_advantages_discounted.extend(other.kl_advantages_discounted);
        self.advantages.extend(other.advantages);
        self.student_entropy.extend(other.student_entropy);
        self.teacher_entropy.extend(other.teacher_entropy);
        self.top_k_mass_student.extend(other.top_k_mass_student);
        self.top_k_mass_teacher.extend(other.top_k_mass_teacher);
        self.top1_compared += other.top1_compared;
        self.top1_agreed += other.top1_agreed;
        self.ratio.merge(&other.ratio);
        self.ratio_clipped_tokens += other.ratio_clipped_tokens;
        self.dual_clipped_tokens += other.dual_clipped_tokens;
        self.behaviour_capped_tokens += other.behaviour_capped_tokens;
        self.masked_sequences += other.masked_sequences;
        self.behaviour_ratio.merge(&other.behaviour_ratio);
        self.mismatch.merge(&other.mismatch);
    }

    /// Share of tokens on whose most likely id student and teacher agree.
    pub fn top1_agreement(&self) -> Option<f64> {
        (self.top1_compared > 0).then(|| self.top1_agreed as f64 / self.top1_compared as f64)
    }

    /// Share of distilled tokens with a log-ratio at `kl_clip`.
    pub fn kl_clipped_fraction(&self) -> Option<f64> {
        (!self.kl.is_empty()).then(|| self.kl_clipped_tokens as f64 / self.kl.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let values: Vec<f32> = (1..=100).rev().map(|v| v as f32).collect();
        let s = Summary::of(&values).unwrap();
        assert_eq!((s.mean, s.min, s.p10, s.p50, s.p90, s.p99, s.max), (50.5, 1.0, 10.0, 50.0, 90.0, 99.0, 100.0));
        assert_eq!(Summary::of(&[2.0]).unwrap().p99, 2.0);
        assert!(Summary::of(&[]).is_none());
    }

    #[test]
    fn reports_merge() {
        let mut a = Report { total: 1.0, tokens: 2, kl: vec![0.5], kl_clipped_tokens: 1, ..Report::default() };
        a.ratio.add(2.0);
        let mut b =
            Report { total: 0.5, tokens: 1, kl: vec![1.5], top1_compared: 4, top1_agreed: 1, ..Report::default() };
        b.ratio.add(1.0);
        a.merge(b);
        assert_eq!((a.total, a.tokens, a.kl.as_slice()), (1.5, 3, &[0.5, 1.5][..]));
        assert_eq!((a.ratio.mean(), a.ratio.min, a.ratio.max), (Some(1.5), 1.0, 2.0));
        assert_eq!((a.top1_agreement(), a.kl_clipped_fraction()), (Some(0.25), Some(0.5)));
    }
}
