//! The policy role: one training step from completions and the teacher's answers.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use cosmos_config::{Config, GrpoConfig, LossType as ConfigLoss, MassRule, ObjectiveKind, Variant as ConfigVariant};
use cosmos_engine::head::{Head, MixedLogits, Part};
use cosmos_engine::model::{LogitsSource, Model};
use cosmos_engine::objective::{
    DistillKind, DistillSpec, LossType, Mass, Normaliser, ObjectiveSpec, PolicyLoss, Report, Sample, Summary,
    TeacherView, Variant,
};
use cosmos_engine::optim::StepStats;
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};

use serde::{Deserialize, Serialize};

use crate::error::{Result, Role};
use crate::rollout::Completion;
use crate::student::Student;
use crate::teacher::{Answer, TeacherHidden};

mod ranks;
use ranks::RankWork;

/// How steps are made.
pub struct PolicyRole {
    /// The objective.
    pub spec: ObjectiveSpec,
    mini_batch: usize,
    tokens_max: Option<usize>,
    optimize_batch: Option<usize>,
    mu_iterations: usize,
    rollout_is_old: bool,
    wants_rollout: bool,
}

/// What the micro-batches of one update share.
struct MicroWork<'a> {
    samples: &'a [Sample],
    hidden: &'a [Vec<TeacherHidden>],
    completions: &'a [Completion],
    /// Samples of the update.
    count: usize,
    record: bool,
    /// The step, where the only micro-batch makes the update within its backward.
    update: Option<u64>,
}

/// What a step did.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct StepOutcome {
    /// Numbers over every token of the step.
    pub report: Report,
    /// Largest micro-batch loss.
    pub loss_max: f64,
    /// Reference KL, largest micro-batch.
    pub kl_loss_max: f64,
    /// Largest gradient norm of its optimizer steps.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Optimizer steps whose gradient was not finite; the weights did not change then.
    pub skipped: u64,
    /// Per-token divergence of each sample, for the record.
    pub kl_of: HashMap<u64, Vec<f32>>,
    /// Tokens that went through forward and backward.
    pub tokens: u64,
    /// Scored tokens that were the most likely ones (supervised fine-tuning).
    pub top1: u64,
}

impl PolicyRole {
    /// From the configuration.
    pub fn new(config: &Config, grpo: &GrpoConfig) -> Result<Self> {
        let spec = objective(config, grpo);
        spec.check().role("student")?;
        Ok(Self {
            spec,
            mini_batch: grpo.mini_batch,
            tokens_max: grpo.max_token_len_per_mini_batch,
            optimize_batch: grpo.batch_size_per_optimize,
            mu_iterations: grpo.mu_iterations.max(1),
            rollout_is_old: grpo.use_rollout_logprobs_for_loss,
            wants_rollout: grpo.collect_rollout_logprobs
                || grpo.use_decoupled_loss
                || grpo.off_policy_masking_delta.is_some(),
        })
    }

    /// Trains on `completions`. `answers` are the teachers', by sample; a missing one masks its sample. `heads` are those of
    /// the run's teachers, in their order, where the objective compares whole vocabularies.
    pub fn step(
        &self,
        student: &mut Student,
        heads: &mut [Box<dyn Head + '_>],
        reference: Option<&mut dyn Model>,
        completions: &[Completion],
        mut answers: HashMap<u64, Answer>,
        step: u64,
    ) -> Result<StepOutcome> {
        let mut hidden: Vec<Vec<TeacherHidden>> = Vec::with_capacity(completions.len());
        let mut samples: Vec<Sample> = Vec::with_capacity(completions.len());
        for completion in completions {
            let lead = if self.include_prompt() { completion.prompt_ids.len() - 1 } else { 0 };
            let mut answer = answers.remove(&completion.sample).map(|answer| answer.of_own(completion, lead));
            hidden.push(answer.as_mut().map(|a| std::mem::take(&mut a.hidden)).unwrap_or_default());
            samples.push(self.sample(completion, answer));
        }
        let batch = self.optimize_batch.unwrap_or(samples.len()).clamp(1, samples.len().max(1));
        let several_updates = batch < samples.len() || self.mu_iterations > 1;
        // Under other weights the difference would be training, not a mismatch of the two paths: later batches of a step see
        // what the first has changed.
        for (sample, completion) in samples.iter_mut().zip(completions).take(batch) {
            if completion.version == step && !completion.logprobs.is_empty() {
                sample.recorded = Some(completion.logprobs.clone());
            }
        }
        self.add_reference(reference, &mut samples)?;
        if several_updates && !self.rollout_is_old {
            let old = self.logprobs(student.model.as_mut(), &samples)?;
            samples.iter_mut().zip(old).for_each(|(sample, old)| sample.old = Some(old));
        }
        let mut outcome = StepOutcome {
            learning_rate: student.learning_rate(step),
            loss_max: f64::NEG_INFINITY,
            ..StepOutcome::default()
        };
        for iteration in 0..self.mu_iterations {
            for start in (0..samples.len()).step_by(batch) {
                let slice = start..(start + batch).min(samples.len());
                let record = iteration == 0;
                let micros = self.micro_batches(&samples, slice.clone());
                if student.place.world > 1 {
                    let work = RankWork::new(self, &samples, &hidden, completions, slice.len(), record);
                    work.run(student, heads, &micros, &mut outcome)?;
                }
                let alone = student.place.world == 1;
                let update = student.updates_in_backward(micros.len())?.then_some(step);
                let work =
                    MicroWork { samples: &samples, hidden: &hidden, completions, count: slice.len(), record, update };
                let mut stats = None;
                for micro in micros.into_iter().filter(|_| alone) {
                    stats = self.micro_step(student, heads, &work, micro, &mut outcome)?;
                }
                // Without a row there was no backward, and yet weights decay.
                let stats = stats.map_or_else(|| student.optimizer_step(step), Ok)?;
                outcome.skipped += u64::from(!stats.finite);
                outcome.grad_norm =
                    if stats.grad_norm.is_finite() { outcome.grad_norm.max(stats.grad_norm) } else { stats.grad_norm };
            }
        }
        Ok(outcome)
    }

    /// Forward and backward of one micro-batch; what the update did, where it was made with them.
    fn micro_step(
        &self,
        student: &mut Student,
        heads: &mut [Box<dyn Head + '_>],
        work: &MicroWork<'_>,
        micro: Range<usize>,
        outcome: &mut StepOutcome,
    ) -> Result<Option<StepStats>> {
        let share = micro.len() as f64 / work.count as f64;
        let own = &work.samples[micro.clone()];
        let normaliser = Normaliser::of(&self.spec, own, share);
        let full = matches!(self.spec.distill, Some(DistillSpec { kind: DistillKind::FullVocab, .. }));
        let vocab = student.model.config().vocab_size;
        let shard = student.model.vocab_shard().ids();
        let mut source = match full && !heads.is_empty() {
            true => {
                let mixed = self.mixture(heads, own, &work.hidden[micro.clone()], vocab);
                Some(mixed.and_then(|mixed| mixed.only(shard)).role("teacher")?)
            }
            false => None,
        };
        let source = source.as_mut().map(|s| s as &mut dyn LogitsSource);
        let mut loss = PolicyLoss::new(&self.spec, own, normaliser, source).role("student")?;
        let mut stats = None;
        if loss.rows() > 0 {
            let (batch, positions) = loss.batch().role("student")?;
            match work.update {
                Some(step) => stats = Some(student.backward_step(step, &batch, &positions, &mut loss)?),
                None => student.model.forward_backward(&batch, &positions, &mut loss).role("student")?,
            }
            outcome.tokens += batch.lens_b.iter().sum::<usize>() as u64;
        }
        if work.record {
            outcome.record(loss, &work.completions[micro], share);
        }
        Ok(stats)
    }

    /// The teachers' logits over the student's vocabulary (checkpoints pad their heads to different widths beyond the tokens
    /// that both tokenizers share), at the rows of `samples`.
    fn mixture<'h>(
        &self,
        heads: &'h mut [Box<dyn Head + '_>],
        samples: &[Sample],
        hidden: &[Vec<TeacherHidden>],
        vocab: usize,
    ) -> cosmos_engine::Result<MixedLogits<'h>> {
        let mut parts: Vec<Part<'h>> =
            heads.iter_mut().map(|head| Part { head: &mut **head, hidden_rh: Vec::new(), spans: Vec::new() }).collect();
        let mut rows = 0;
        for (sample, hidden) in samples.iter().zip(hidden) {
            let span = rows..rows + sample.targets(&self.spec).count();
            rows = span.end;
            for own in hidden.iter().filter(|_| !span.is_empty()) {
                if let Some(part) = parts.get_mut(own.teacher) {
                    part.hidden_rh.extend_from_slice(&own.values_rh);
                    part.spans.push((span.clone(), own.weight));
                }
            }
        }
        // One that answers none of these may have too narrow a head for them.
        parts.retain(|part| !part.spans.is_empty());
        MixedLogits::new(parts, rows, vocab, self.spec.temperature)
    }

    fn include_prompt(&self) -> bool {
        self.spec.distill.as_ref().is_some_and(|d| d.include_prompt)
    }

    /// Consecutive samples: `mini_batch` at a time, or as many as fit `max_token_len_per_mini_batch`.
    fn micro_batches(&self, samples: &[Sample], slice: Range<usize>) -> Vec<Range<usize>> {
        let mut batches = Vec::new();
        let mut start = slice.start;
        let mut longest = 0;
        for i in slice.clone() {
            let length = samples[i].ids.len();
            let full = match self.tokens_max {
                Some(max) => i > start && longest.max(length) * (i - start + 1) > max,
                None => i - start >= self.mini_batch,
            };
            if full {
                batches.push(start..i);
                (start, longest) = (i, 0);
            }
            longest = longest.max(length);
        }
        if start < slice.end {
            batches.push(start..slice.end);
        }
        batches
    }

    fn sample(&self, completion: &Completion, answer: Option<Answer>) -> Sample {
        let distilling = self.spec.distill.as_ref();
        let (teacher, teacher_entropy, teacher_top1) = match (distilling, answer) {
            (None, _) => (TeacherView::NotDistilled, None, None),
            (Some(_), None) => (TeacherView::Missing, None, None),
            (Some(distill), Some(answer)) => {
                let view = match distill.kind {
                    DistillKind::Sampled => TeacherView::Sampled(answer.logprobs),
                    DistillKind::FullVocab => TeacherView::Full,
                    _ => TeacherView::TopK { ids: answer.candidate_ids, logprobs: answer.candidate_logprobs },
                };
                (
                    view,
                    (!answer.entropy.is_empty()).then_some(answer.entropy),
                    (!answer.top1.is_empty()).then_some(answer.top1),
                )
            }
        };
        Sample {
            ids: completion.ids(),
            prompt_len: completion.prompt_ids.len(),
            own: (!completion.own.is_empty()).then(|| completion.own.clone()),
            advantage: completion.advantage,
            old: self.rollout_is_old.then(|| completion.logprobs.clone()),
            rollout: self.wants_rollout.then(|| completion.logprobs.clone()),
            recorded: None,
            reference: None,
            teacher,
            teacher_entropy,
            teacher_top1,
        }
    }

    fn add_reference(&self, reference: Option<&mut dyn Model>, samples: &mut [Sample]) -> Result<()> {
        if let (Some(reference), true) = (reference, self.spec.kl_beta != 0.0) {
            let logprobs = self.logprobs(reference, samples)?;
            samples.iter_mut().zip(logprobs).for_each(|(sample, l)| sample.reference = Some(l));
        }
        Ok(())
    }

    /// Log-probs of every scored token under the training temperature.
    fn logprobs(&self, model: &mut dyn Model, samples: &[Sample]) -> Result<Vec<Vec<f32>>> {
        let requests: Vec<ScoreRequest<'_>> = samples
            .iter()
            .map(|s| ScoreRequest { ids: &s.ids, first: s.first(&self.spec), candidates: None })
            .collect();
        let options =
            ScoreOptions { temperature: self.spec.temperature, mini_batch: self.mini_batch, ..ScoreOptions::default() };
        let scored = score(model, &requests, &options).role("student")?;
        let own_only = |(all, sample): (Vec<f32>, &Sample)| match sample.own {
            Some(_) => {
                let first = sample.first(&self.spec);
                sample.targets(&self.spec).filter_map(|at| all.get(at - first).copied()).collect()
            }
            None => all,
        };
        Ok(scored.into_iter().map(|s| s.logprobs).zip(samples).map(own_only).collect())
    }
}

/// The objective that the configuration asks for.
pub fn objective(config: &Config, grpo: &GrpoConfig) -> ObjectiveSpec {
    let d = &config.distillation;
    let distill = d.enable.then_some(DistillSpec {
        kind: match (d.top_k, d.objective) {
            (0, _) => DistillKind::Sampled,
            (k, _) if k < 0 => DistillKind::FullVocab,
            (_, ObjectiveKind::CosmosGjsd) => DistillKind::CosmosGjsd,
            (_, ObjectiveKind::Gjsd) => DistillKind::Gjsd {
                mass: match d.top_k_mass {
                    MassRule::Tail => Mass::Tail,
                    MassRule::Renormalize => Mass::Renormalize,
                    MassRule::Raw => Mass::Raw,
                },
            },
        },
        beta: d.jsd_beta,
        coef: d.kl_penalty_coef,
        discount: d.kl_discount_factor,
        kl_clip: d.kl_clip,
        include_prompt: d.include_prompt,
    });
    ObjectiveSpec {
        loss: match grpo.loss_type {
            ConfigLoss::TokenMean => LossType::TokenMean,
            ConfigLoss::SeqMeanTokenSum => LossType::SeqMeanTokenSum,
            ConfigLoss::SeqMeanTokenMean => LossType::SeqMeanTokenMean,
            ConfigLoss::TokenSum => LossType::TokenSum,
        },
        epsilon_low: grpo.epsilon_low,
        epsilon_high: grpo.epsilon_high,
        lower_bound_ratio: grpo.lower_bound_ratio,
        temperature: grpo.temperature as f32,
        kl_beta: grpo.kl_beta,
        unbiased_kl_estimate: grpo.unbiased_kl_estimate,
        variant: match grpo.variant {
            ConfigVariant::Grpo => Variant::Grpo,
            ConfigVariant::Gspo => Variant::Gspo,
            ConfigVariant::Dapo => Variant::Dapo,
        },
        aipo_rho: grpo.aipo_rho,
        off_policy_masking_delta: grpo.off_policy_masking_delta,
        unbiased_loss_max_tokens: grpo.unbiased_loss_max_tokens,
        entropy_coeff: grpo.entropy_coeff,
        use_decoupled_loss: grpo.use_decoupled_loss,
        behav_imp_weight_cap: grpo.behav_imp_weight_cap,
        distill,
    }
}

impl StepOutcome {
    /// Takes in what a micro-batch has seen, which is `share` of its mini-batch.
    fn record(&mut self, loss: PolicyLoss<'_>, completions: &[Completion], share: f64) {
        for (index, completion) in completions.iter().enumerate() {
            let kl = loss.sample_kl(index);
            let own = completion.own_len().min(kl.len());
            self.kl_of.insert(completion.sample, kl[kl.len() - own..].to_vec());
        }
        let report = loss.into_report();
        self.loss_max = self.loss_max.max(report.total / share);
        self.kl_loss_max = self.kl_loss_max.max(report.kl_loss / share);
        self.report.merge(report);
    }

    /// Takes in what another rank of the replica has seen of the same step.
    pub fn merge(&mut self, other: Self) {
        self.report.merge(other.report);
        self.loss_max = self.loss_max.max(other.loss_max);
        self.kl_loss_max = self.kl_loss_max.max(other.kl_loss_max);
        self.grad_norm =
            if other.grad_norm.is_finite() { self.grad_norm.max(other.grad_norm) } else { other.grad_norm };
        self.skipped = self.skipped.max(other.skipped);
        self.kl_of.extend(other.kl_of);
        self.tokens += other.tokens;
        self.top1 += other.top1;
    }

    /// Metrics of the step, under the original's names where they exist.
    pub fn metrics(&self, config: &Config) -> BTreeMap<String, f64> {
        let mut m = BTreeMap::new();
        let r = &self.report;
        let mut put = |name: &str, value: f64| {
            m.insert(format!("train/{name}"), value);
        };
        put("loss_avg", r.total);
        put("loss_max", self.loss_max);
        put("grad_norm", self.grad_norm);
        put("learning_rate", self.learning_rate);
        put("tokens", r.tokens as f64);
        put("non_finite_rows", r.non_finite_rows as f64);
        put("ratio_clipped_tokens", r.ratio_clipped_tokens as f64);
        put("masked_sequences", r.masked_sequences as f64);
        if let Some(mean) = r.ratio.mean() {
            put("ratio_mean", mean);
            put("ratio_max", r.ratio.max);
        }
        // `ratio` is to the old policy, which is this one unless `use_rollout_logprobs_for_loss`: 1 however old the
        // completions are. This is to the weights that wrote them.
        if let Some(mean) = r.behaviour_ratio.mean() {
            put("behaviour_ratio_mean", mean);
            put("behaviour_ratio_max", r.behaviour_ratio.max);
        }
        if let Some(s) = Summary::of(&r.student_entropy) {
            put("effective_entropy", s.mean);
        }
        if config.train.train_policy.grpo().is_some_and(|g| g.kl_beta != 0.0) {
            put("kl_loss_avg", r.kl_loss);
            put("kl_loss_max", self.kl_loss_max);
        }
        let d = &config.distillation;
        if d.enable {
            let name = match d.top_k {
                0 => "teacher_kl_reversed".to_string(),
                k if k < 0 => "teacher_kl_jsd_full".to_string(),
                k => format!("teacher_kl_jsd_top{k}"),
            };
            if let Some(s) = Summary::of(&r.kl) {
                put(&name, s.mean);
                for (suffix, value) in [("p10", s.p10), ("p50", s.p50), ("p90", s.p90), ("p99", s.p99), ("max", s.max)]
                {
                    put(&format!("{name}_{suffix}"), f64::from(value));
                }
            }
            for (name, values) in [
                ("teacher_kl_advantages", &r.kl_advantages),
                ("teacher_kl_advantages_discounted", &r.kl_advantages_discounted),
                ("teacher_entropy", &r.teacher_entropy),
                ("top_k_mass_student", &r.top_k_mass_student),
                ("top_k_mass_teacher", &r.top_k_mass_teacher),
            ] {
                if let Some(s) = Summary::of(values) {
                    put(name, s.mean);
                }
            }
            if let Some(share) = r.top1_agreement() {
                put("teacher_top1_agreement", share);
            }
            if let Some(share) = r.kl_clipped_fraction().filter(|_| d.kl_clip.is_some()) {
                put("teacher_kl_clipped_ratio", share);
            }
            put("teacher_missing_samples", r.missing_samples as f64);
            put("teacher_missing_tokens", r.missing_tokens as f64);
        }
        if let Some(mean) = r.mismatch.mean() {
            m.insert("rollout/logprob_mismatch_mean".into(), mean);
            m.insert("rollout/logprob_mismatch_max".into(), r.mismatch.max);
        }
        m
    }
}
