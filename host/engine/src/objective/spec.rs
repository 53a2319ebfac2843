//! What to optimise, and the samples to do it on.

use crate::{EngineError, Result};

/// How token losses become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LossType {
    /// Σ loss / (Σ tokens + 1e-8).
    #[default]
    TokenMean,
    /// Mean over sequences of each one's sum.
    SeqMeanTokenSum,
    /// Mean over sequences of each one's mean (or sum / `unbiased_loss_max_tokens`).
    SeqMeanTokenMean,
    /// Σ loss.
    TokenSum,
}

/// Which ratio the surrogate uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Variant {
    /// A ratio per token.
    #[default]
    Grpo,
    /// One ratio per sequence: exp of the mean log-ratio.
    Gspo,
    /// As GRPO; the variant differs in which samples are kept, before the loss.
    Dapo,
}

/// What happens to the probability outside the candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mass {
    /// One further bucket holds it: a true divergence, never negative, zero only where all buckets agree.
    #[default]
    Tail,
    /// Both distributions are scaled to sum to one over the candidates.
    Renormalize,
    /// It is ignored, as in the original: not a divergence, and it can be negative.
    Raw,
}

/// Which distillation term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DistillKind {
    /// Reverse KL of the sampled token as an advantage.
    Sampled,
    /// Generalised Jensen–Shannon divergence over given candidates, minimised directly.
    Gjsd {
        /// Treatment of the remaining mass.
        mass: Mass,
    },
    /// The original's top-k objective: the raw divergence is an advantage and keeps its own gradient, so that the
    /// gradient is a score-function term plus the direct one. With discounting only the score-function term is left.
    CosmosGjsd,
    /// The divergence over the whole vocabulary, minimised directly.
    FullVocab,
}

/// Distillation from a teacher.
#[derive(Debug, Clone, PartialEq)]
pub struct DistillSpec {
    /// Which term.
    pub kind: DistillKind,
    /// `jsd_beta`: 0 is forward KL (teacher to student), 1 reverse KL, between them the generalised Jensen–Shannon
    /// divergence with the mixture (1 − β)·student + β·teacher. Unused by `Sampled`.
    pub beta: f64,
    /// `kl_penalty_coef`.
    pub coef: f64,
    /// `kl_discount_factor` γ; 0 counts each token's own divergence only. For `Sampled` and `CosmosGjsd` an advantage
    /// becomes the discounted sum of itself and the later ones (as in the original). For the direct kinds γ ≠ 0 *adds* a
    /// score-function term with the discounted divergences of the later tokens, which the direct gradient cannot see.
    pub discount: f64,
    /// Bound on every |log-ratio| of student and teacher: of the sampled token, or of each candidate inside the
    /// divergence.
    pub kl_clip: Option<f64>,
    /// Prompt tokens are distilled too.
    pub include_prompt: bool,
}

/// The whole objective of policy training.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectiveSpec {
    /// Reduction.
    pub loss: LossType,
    /// Lower clip of the ratio is 1 − this; negative means none.
    pub epsilon_low: f64,
    /// Upper clip of the ratio is 1 + this; negative means none.
    pub epsilon_high: f64,
    /// Dual clip: with a negative advantage a token's loss is at most this times its size.
    pub lower_bound_ratio: f64,
    /// Divides all logits, student's and teacher's, when above 1e-6 and not 1.
    pub temperature: f32,
    /// Weight of the KL to the reference policy; 0 for none.
    pub kl_beta: f64,
    /// The reference KL is weighted by current / old probability.
    pub unbiased_kl_estimate: bool,
    /// Which ratio.
    pub variant: Variant,
    /// AIPO: the loss is −min(ratio, ρ)·advantage and no other clip applies.
    pub aipo_rho: Option<f64>,
    /// A sequence with a negative mean advantage whose mean log(rollout / current) is above this has no policy loss.
    pub off_policy_masking_delta: Option<f64>,
    /// Divisor of `SeqMeanTokenMean` instead of each sequence's own length.
    pub unbiased_loss_max_tokens: Option<usize>,
    /// Weight of the mean token entropy, which is subtracted from the loss. Here it has its gradient; the original
    /// computes the entropy without one, so that its coefficient only shifts the reported number.
    pub entropy_coeff: f64,
    /// Weighs each token by old / rollout probability (needs rollout log-probs).
    pub use_decoupled_loss: bool,
    /// Tokens with a larger such weight are left out.
    pub behav_imp_weight_cap: Option<f64>,
    /// Distillation, or none for plain policy training.
    pub distill: Option<DistillSpec>,
}

impl Default for ObjectiveSpec {
    /// The original's defaults, without distillation.
    fn default() -> Self {
        Self {
            loss: LossType::TokenMean,
            epsilon_low: 0.2,
            epsilon_high: 0.2,
            lower_bound_ratio: 3.0,
            temperature: 1.0,
            kl_beta: 0.0,
            unbiased_kl_estimate: false,
            variant: Variant::Grpo,
            aipo_rho: None,
            off_policy_masking_delta: None,
            unbiased_loss_max_tokens: None,
            entropy_coeff: 0.0,
            use_decoupled_loss: false,
            behav_imp_weight_cap: None,
            distill: None,
        }
    }
}

impl ObjectiveSpec {
    /// Refuses what would only give NaN later.
    pub fn check(&self) -> Result<()> {
        if let Some(distill) = &self.distill {
            if !(0.0..=1.0).contains(&distill.beta) {
                return Err(EngineError::invalid(
                    format!("`jsd_beta` is {}", distill.beta),
                    "use a number from 0 to 1",
                ));
            }
            if !(distill.coef.is_finite() && distill.discount.is_finite()) {
                return Err(EngineError::invalid(
                    "`kl_penalty_coef` or `kl_discount_factor` is not a finite number",
                    "",
                ));
            }
            if distill.kl_clip.is_some_and(|clip| clip.is_nan() || clip <= 0.0) {
                return Err(EngineError::invalid("`kl_clip` is not above 0", "leave it out for no bound"));
            }
        }
        if self.unbiased_loss_max_tokens == Some(0) {
            return Err(EngineError::invalid("`unbiased_loss_max_tokens` is 0", "use at least 1, or leave it out"));
        }
        Ok(())
    }
}

/// What the teacher said about a sample. Vectors follow the sample's scored tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum TeacherView {
    /// This sample is not distilled: only its reward advantage counts.
    #[default]
    NotDistilled,
    /// The teacher's result never came: the sample has no loss, and is counted.
    Missing,
    /// Log-prob of each token.
    Sampled(Vec<f32>),
    /// Candidates of each position, `[tokens, k]` for some k: the student's, the teacher's or both, each id once per
    /// row, [`crate::score::ABSENT`] where a row has fewer.
    TopK {
        /// Candidate ids.
        ids: Vec<u32>,
        /// The teacher's log-probs of them over its whole vocabulary.
        logprobs: Vec<f32>,
    },
    /// Logits come from a [`crate::model::LogitsSource`].
    Full,
}

/// A sequence to train on. Optional vectors have one entry per scored token: the completion's own, or the prompt's but
/// the first as well when the prompt is distilled too (see [`Sample::first`]); `old` and `rollout` may then cover the completion only, and
/// prompt tokens count as on-policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Prompt and completion.
    pub ids: Vec<u32>,
    /// Length of the prompt, at least 1.
    pub prompt_len: usize,
    /// Which completion tokens the model sampled itself, in conversations where others speak too; none: all. The others
    /// are context: they are not scored, so no vector of this sample has entries for them.
    pub own: Option<Vec<bool>>,
    /// Reward advantage, spread over the completion's tokens.
    pub advantage: f32,
    /// Log-probs of the old policy with the training temperature; none means the current ones without gradient.
    pub old: Option<Vec<f32>>,
    /// Log-probs that the rollout engine gave, for the decoupled loss and the off-policy mask.
    pub rollout: Option<Vec<f32>>,
    /// Log-probs that the rollout recorded under the very weights that are trained now, for the metric of how far the two
    /// paths' numbers lie apart.
    pub recorded: Option<Vec<f32>>,
    /// Log-probs of the reference policy; needed when `kl_beta` is not 0.
    pub reference: Option<Vec<f32>>,
    /// The teacher's view.
    pub teacher: TeacherView,
    /// Entropy of the teacher at each token, for the metrics.
    pub teacher_entropy: Option<Vec<f32>>,
    /// The teacher's most likely ids, for the metrics.
    pub teacher_top1: Option<Vec<u32>>,
}

impl Sample {
    /// Index of the first scored token: the prompt's length, or 1 when this sample's prompt is distilled too.
    pub fn first(&self, spec: &ObjectiveSpec) -> usize {
        match &spec.distill {
            Some(distill) if distill.include_prompt && self.teacher != TeacherView::NotDistilled => 1,
            _ => self.prompt_len,
        }
    }

    /// Number of tokens with a loss: none when the teacher's result is missing.
    pub fn scored(&self, spec: &ObjectiveSpec) -> usize {
        if self.is_missing(spec) {
            return 0;
        }
        self.prompt_len.saturating_sub(self.first(spec)) + self.completion_tokens()
    }

    /// Indices of the scored tokens in `ids`, in order, as many as [`Sample::scored`].
    pub fn targets(&self, spec: &ObjectiveSpec) -> impl Iterator<Item = usize> {
        let first = if self.is_missing(spec) { self.ids.len() } else { self.first(spec) };
        let own = move |at: usize| match (at.checked_sub(self.prompt_len), &self.own) {
            (Some(token), Some(own)) => own.get(token).copied().unwrap_or(false),
            _ => true,
        };
        (first..self.ids.len()).filter(move |at| own(*at))
    }

    /// Completion tokens that the model sampled itself.
    pub fn completion_tokens(&self) -> usize {
        match &self.own {
            Some(own) => own.iter().filter(|own| **own).count(),
            None => self.ids.len().saturating_sub(self.prompt_len),
        }
    }

    /// Whether the sample waits in vain for its teacher.
    pub fn is_missing(&self, spec: &ObjectiveSpec) -> bool {
        spec.distill.is_some() && self.teacher == TeacherView::Missing
    }
}

/// What the reductions divide by. A mini-batch may be computed in several micro-batches, so each must know the whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normaliser {
    /// Scored tokens of the mini-batch (of all ranks with `balance_dp_token`).
    pub tokens: usize,
    /// Sequences of the mini-batch, those without a loss included, as in the original.
    pub sequences: usize,
    /// Further factor, for example mini-batch size / optimizer batch size.
    pub scale: f64,
}

impl Normaliser {
    /// Counts a whole mini-batch.
    pub fn of(spec: &ObjectiveSpec, samples: &[Sample], scale: f64) -> Self {
        Self { tokens: samples.iter().map(|s| s.scored(spec)).sum(), sequences: samples.len(), scale }
    }

    /// Factor on every token's loss of a sequence with `own` scored tokens.
    pub(super) fn weight(&self, spec: &ObjectiveSpec, own: usize) -> f64 {
        let sequences = self.sequences.max(1) as f64;
        self.scale
            * match spec.loss {
                LossType::TokenMean => self.token_mean(),
                LossType::SeqMeanTokenSum => 1.0 / sequences,
                LossType::SeqMeanTokenMean => {
                    1.0 / (sequences * spec.unbiased_loss_max_tokens.unwrap_or(own.max(1)) as f64)
                }
                LossType::TokenSum => 1.0,
            }
    }

    /// 1 / tokens as the original guards it.
    pub(super) fn token_mean(&self) -> f64 {
        1.0 / (self.tokens as f64 + 1e-8)
    }
}
