//! The policy objective over the rows of a micro-batch.

use std::ops::Range;

use rayon::prelude::*;

use super::divergence::{self, Divergence};
use super::facts::{Asked, Facts, SeenRows};
use super::report::Report;
use super::row_gradient::RowGradient;
use super::spec::{DistillKind, DistillSpec, Mass, Normaliser, ObjectiveSpec, Sample, TeacherView, Variant};
use super::surrogate::{SEQUENCE_LOG_RATIO_MAX, TokenLoss, reference_kl, token_loss, token_ratio};
use crate::batch::{Position, TokenBatch};
use crate::model::{HeadLoss, LogitsSource, VocabShard};
use crate::score::ABSENT;
use crate::score::shard;
use crate::score::softmax::{RowStats, apply_temperature, divides};
use crate::{EngineError, Result};

/// Surrogate, distillation, reference KL and entropy bonus of a micro-batch.
///
/// Rows are the scored tokens of the samples, sample after sample; samples whose teacher result is missing have none.
/// [`PolicyLoss::batch`] gives the sequences and positions to run the model on in that order.
pub struct PolicyLoss<'a> {
    task: Task<'a>,
    teacher: Option<&'a mut dyn LogitsSource>,
    teacher_rv: Vec<f32>,
    needs_first_pass: bool,
    observed: Vec<Option<Observed>>,
    report: Report,
    row_kl: Vec<f32>,
    /// Rows whose logits come in parts.
    parts: SeenRows,
    /// The gradients of the rows that were settled.
    settled: Vec<RowGradient>,
}

/// What the rows share, read by all of them at once.
struct Task<'a> {
    spec: &'a ObjectiveSpec,
    samples: &'a [Sample],
    rows: Vec<Row>,
    /// Rows of each sample.
    ranges: Vec<Range<usize>>,
    /// Factor on each sample's token losses.
    weights: Vec<f64>,
    /// `entropy_coeff` × the token mean's factor.
    entropy_weight: f64,
    plan: Option<Plan>,
    /// Which ids the rows hold, where it is not all of them.
    shard: Option<VocabShard>,
}

/// A row's sample, its index among the sample's scored tokens and its token's index in the sequence.
#[derive(Clone, Copy)]
struct Row {
    sample: usize,
    token: usize,
    at: usize,
}

/// What the first pass keeps of a row.
#[derive(Clone, Copy)]
struct Observed {
    /// Current log-prob of the sampled token.
    c: f64,
    /// Divergence, where the objective has one.
    divergence: f64,
}

/// Numbers that need the whole sequence.
struct Plan {
    /// What each row's advantage gets from the divergences, discounted.
    discounted: Vec<f64>,
    /// Whether each sample's policy loss counts.
    keep: Vec<bool>,
    /// GSPO: each sample's ratio and the derivative of its loss by each of its log-probs.
    sequences: Vec<Option<SequenceRatio>>,
}

#[derive(Clone, Copy)]
struct SequenceRatio {
    ratio: f64,
    by_log_prob: f64,
}

/// What one row adds to the report.
#[derive(Clone, Copy, Default)]
struct RowOutcome {
    finite: bool,
    policy: f64,
    reference: f64,
    entropy_bonus: f64,
    advantage: f64,
    ratio: f64,
    clipped: bool,
    bounded: bool,
    behaviour: Option<(f64, bool)>,
    mismatch: Option<f64>,
    entropy: f64,
    distilled: Option<Distilled>,
    teacher_entropy: Option<f64>,
    agrees: Option<bool>,
    masses: Option<(f64, f64)>,
}

#[derive(Clone, Copy, Default)]
struct Distilled {
    kl: f64,
    advantage: f64,
    discounted: f64,
    clipped: bool,
}

impl<'a> PolicyLoss<'a> {
    /// The loss of `samples`, a micro-batch of the mini-batch that `normaliser` counts. `teacher` gives logits row by
    /// row for [`DistillKind::FullVocab`]; its rows are those of this loss.
    ///
    /// # Errors
    /// A spec that makes no sense, or a sample whose vectors do not have one entry per scored token, by its index.
    pub fn new(
        spec: &'a ObjectiveSpec,
        samples: &'a [Sample],
        normaliser: Normaliser,
        teacher: Option<&'a mut dyn LogitsSource>,
    ) -> Result<Self> {
        spec.check()?;
        let mut rows = Vec::new();
        let mut ranges = Vec::with_capacity(samples.len());
        let mut weights = Vec::with_capacity(samples.len());
        let mut report = Report { samples: samples.len(), ..Report::default() };
        for (index, sample) in samples.iter().enumerate() {
            check_sample(spec, index, sample, teacher.is_some())?;
            let start = rows.len();
            rows.extend(sample.targets(spec).enumerate().map(|(token, at)| Row { sample: index, token, at }));
            ranges.push(start..rows.len());
            weights.push(normaliser.weight(spec, rows.len() - start));
            if sample.is_missing(spec) {
                report.missing_samples += 1;
                report.missing_tokens += sample.completion_tokens();
            }
        }
        report.tokens = rows.len();
        let entropy_weight = spec.entropy_coeff * normaliser.token_mean() * normaliser.scale;
        let row_kl = vec![f32::NAN; rows.len()];
        let observed = vec![None; rows.len()];
        let task = Task { spec, samples, rows, ranges, weights, entropy_weight, plan: None, shard: None };
        let needs_first_pass = task.needs_first_pass();
        let (teacher_rv, parts, settled) = (Vec::new(), SeenRows::default(), Vec::new());
        Ok(Self { task, teacher, teacher_rv, needs_first_pass, observed, report, row_kl, parts, settled })
    }

    /// Number of rows; when it is 0 there is nothing to run.
    pub fn rows(&self) -> usize {
        self.task.rows.len()
    }

    /// The sequences to run the model on and the position of every row. Samples without rows are left out.
    ///
    /// # Errors
    /// When no sample has a row.
    pub fn batch(&self) -> Result<(TokenBatch, Vec<Position>)> {
        let task = &self.task;
        let active: Vec<usize> = (0..task.samples.len()).filter(|&i| !task.ranges[i].is_empty()).collect();
        // The last token predicts nothing that is scored.
        let sequences: Vec<&[u32]> =
            active.iter().map(|&i| &task.samples[i].ids[..task.samples[i].ids.len() - 1]).collect();
        let mut positions = Vec::with_capacity(self.rows());
        for (b, &i) in active.iter().enumerate() {
            positions.extend(task.rows[task.ranges[i].clone()].iter().map(|row| Position { b, t: row.at - 1 }));
        }
        Ok((TokenBatch::new(&sequences)?, positions))
    }

    /// Rows of sample `index`.
    pub fn sample_rows(&self, index: usize) -> Range<usize> {
        self.task.ranges.get(index).cloned().unwrap_or(0..0)
    }

    /// Divergence from the teacher at each row of sample `index`, NaN where there is none.
    pub fn sample_kl(&self, index: usize) -> &[f32] {
        &self.row_kl[self.sample_rows(index)]
    }

    /// What was seen so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What was seen.
    pub fn into_report(self) -> Report {
        self.report
    }

    /// Fetches the teacher's logits of a chunk where the objective needs them, with temperature.
    fn fetch_teacher(&mut self, rows: &Range<usize>, size: usize) -> Result<()> {
        self.teacher_rv.clear();
        if !matches!(self.task.spec.distill, Some(DistillSpec { kind: DistillKind::FullVocab, .. })) {
            return Ok(());
        }
        let any =
            self.task.rows[rows.clone()].iter().any(|row| self.task.samples[row.sample].teacher == TeacherView::Full);
        let Some(teacher) = self.teacher.as_mut().filter(|_| any) else { return Ok(()) };
        teacher.logits_rv(rows.clone(), &mut self.teacher_rv)?;
        if self.teacher_rv.len() != size {
            return Err(EngineError::invalid(
                format!("the teacher gave {} logits where the student has {size}", self.teacher_rv.len()),
                "teacher and student must share one vocabulary",
            ));
        }
        let temperature = self.task.spec.temperature;
        if divides(temperature) {
            self.teacher_rv.par_chunks_mut(1 << 16).for_each(|part| apply_temperature(part, temperature));
        }
        Ok(())
    }

    /// What depends on whole sequences, once every row was seen.
    fn make_plan(&mut self) {
        if self.task.plan.is_none() && self.task.needs_plan() {
            self.task.plan = Some(self.task.plan(&self.observed));
            let kept = self.task.plan.iter().flat_map(|plan| &plan.keep);
            self.report.masked_sequences += kept.filter(|keep| !**keep).count();
        }
    }

    fn check_chunk(&self, rows: &Range<usize>, logits: usize) -> Result<usize> {
        let width = self.chunk_width(rows, logits)?;
        let vocab = self.task.shard.as_ref().map_or(width, |shard| shard.vocab);
        if let Some(shard) = self.task.shard.as_ref().filter(|shard| shard.len != width) {
            return Err(EngineError::invalid(format!("rows of {width} logits where the rank has {shard:?}"), ""));
        }
        self.task.check_ids(rows, vocab)?;
        Ok(width)
    }

    /// Logits of a row of a chunk.
    fn chunk_width(&self, rows: &Range<usize>, logits: usize) -> Result<usize> {
        let count = rows.len();
        if rows.end > self.rows() || count == 0 || !logits.is_multiple_of(count) || logits == 0 {
            return Err(EngineError::invalid(
                format!("a chunk of rows {rows:?} with {logits} logits; the loss has {} rows", self.rows()),
                "",
            ));
        }
        Ok(logits / count)
    }

    fn collect(&mut self, rows: Range<usize>, outcomes: Vec<RowOutcome>) {
        let report = &mut self.report;
        for (row, outcome) in rows.zip(outcomes) {
            if !outcome.finite {
                report.non_finite_rows += 1;
                report.total = f64::NAN;
                continue;
            }
            report.policy_loss += outcome.policy;
            report.kl_loss += outcome.reference;
            report.entropy_bonus += outcome.entropy_bonus;
            report.total += outcome.policy + self.task.spec.kl_beta * outcome.reference - outcome.entropy_bonus;
            report.advantages.push(outcome.advantage as f32);
            report.student_entropy.push(outcome.entropy as f32);
            report.ratio.add(outcome.ratio);
            report.ratio_clipped_tokens += usize::from(outcome.clipped);
            report.dual_clipped_tokens += usize::from(outcome.bounded);
            if let Some((ratio, capped)) = outcome.behaviour {
                report.behaviour_ratio.add(ratio);
                report.behaviour_capped_tokens += usize::from(capped);
            }
            if let Some(mismatch) = outcome.mismatch {
                report.mismatch.add(mismatch);
            }
            if let Some(distilled) = outcome.distilled {
                self.row_kl[row] = distilled.kl as f32;
                report.kl.push(distilled.kl as f32);
                report.kl_advantages.push(distilled.advantage as f32);
                report.kl_advantages_discounted.push(distilled.discounted as f32);
                report.kl_clipped_tokens += usize::from(distilled.clipped);
            }
            report.teacher_entropy.extend(outcome.teacher_entropy.map(|e| e as f32));
            if let Some(agrees) = outcome.agrees {
                report.top1_compared += 1;
                report.top1_agreed += usize::from(agrees);
            }
            if let Some((student, teacher)) = outcome.masses {
                report.top_k_mass_student.push(student as f32);
                report.top_k_mass_teacher.push(teacher as f32);
            }
        }
    }
}

impl HeadLoss for PolicyLoss<'_> {
    fn needs_first_pass(&self) -> bool {
        self.needs_first_pass
    }

    fn set_vocab_shard(&mut self, shard: &VocabShard) -> Result<()> {
        shard::check(shard)?;
        self.task.shard = (!shard.is_whole()).then(|| shard.clone());
        Ok(())
    }

    fn observe(&mut self, rows: Range<usize>, logits_rv: &[f32]) -> Result<()> {
        let width = self.check_chunk(&rows, logits_rv.len())?;
        self.fetch_teacher(&rows, logits_rv.len())?;
        let task = &self.task;
        let row_of = |r: usize| task.rows[rows.start + r];
        let seen: Vec<Option<Observed>> = if task.shard.is_some() {
            let temperature = task.spec.temperature;
            let mut scaled_rv = Vec::new();
            if divides(temperature) {
                // The chunk still serves the model.
                scaled_rv.extend_from_slice(logits_rv);
                scaled_rv.par_chunks_mut(width).for_each(|z_v| apply_temperature(z_v, temperature));
            }
            let own_rv = if scaled_rv.is_empty() { logits_rv } else { &scaled_rv };
            let facts = task.facts_of_parts(&rows, own_rv, &mut self.teacher_rv)?;
            facts.iter().enumerate().map(|(r, facts)| task.observe(row_of(r), facts.as_ref()?)).collect()
        } else {
            let one = |scaled_v: &mut Vec<f32>, r: usize, z_v: &[f32], teacher_v: Option<&mut [f32]>| {
                let own_v = task.tempered(z_v, scaled_v);
                task.observe(row_of(r), &Facts::of(&task.asked(row_of(r)), own_v, teacher_v)?)
            };
            // The teacher's rows are fetched again for the gradient, so the divergence may write into them.
            let rows_v = logits_rv.par_chunks(width).enumerate();
            if self.teacher_rv.is_empty() {
                rows_v.map_init(Vec::new, |scaled_v, (r, z_v)| one(scaled_v, r, z_v, None)).collect()
            } else {
                rows_v
                    .zip(self.teacher_rv.par_chunks_mut(width))
                    .map_init(Vec::new, |scaled_v, ((r, z_v), t_v)| one(scaled_v, r, z_v, Some(t_v)))
                    .collect()
            }
        };
        self.observed[rows].copy_from_slice(&seen);
        Ok(())
    }

    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        let width = self.check_chunk(&rows, logits_rv.len())?;
        self.make_plan();
        self.fetch_teacher(&rows, logits_rv.len())?;
        let task = &self.task;
        let temperature = task.spec.temperature;
        let facts = match task.shard {
            Some(_) => {
                logits_rv.par_chunks_mut(width).for_each(|z_v| apply_temperature(z_v, temperature));
                Some(task.facts_of_parts(&rows, logits_rv, &mut self.teacher_rv)?)
            }
            None => None,
        };
        let one = |r: usize, z_v: &mut [f32], mut teacher_v: Option<&mut [f32]>| {
            let row = task.rows[rows.start + r];
            let found;
            let facts = match &facts {
                Some(all) => all[r].as_ref(),
                None => {
                    apply_temperature(z_v, temperature);
                    found = Facts::of(&task.asked(row), z_v, teacher_v.as_deref_mut());
                    found.as_ref()
                }
            };
            task.gradient(rows.start + r, row, facts, z_v, teacher_v)
        };
        let outcomes: Vec<RowOutcome> = if self.teacher_rv.is_empty() {
            logits_rv.par_chunks_mut(width).enumerate().map(|(r, z_v)| one(r, z_v, None)).collect()
        } else {
            let chunks = logits_rv.par_chunks_mut(width).zip(self.teacher_rv.par_chunks_mut(width)).enumerate();
            chunks.map(|(r, (z_v, t_v))| one(r, z_v, Some(t_v))).collect()
        };
        self.collect(rows, outcomes);
        Ok(())
    }

    fn remakes(&self) -> bool {
        let whole = matches!(self.task.spec.distill, Some(DistillSpec { kind: DistillKind::FullVocab, .. }));
        // What a teacher says about every id is too much to keep, and would have to be computed again.
        self.task.shard.is_none() && !whole
    }

    fn see(&mut self, rows: Range<usize>, first: usize, logits_rp: &mut [f32]) -> Result<()> {
        self.chunk_width(&rows, logits_rp.len())?;
        let task = &self.task;
        self.parts.add(rows, first, logits_rp, task.spec.temperature, |row| task.asked(task.rows[row]).ids)
    }

    fn settle(&mut self) -> Result<()> {
        let parts = std::mem::take(&mut self.parts);
        parts.check_rows(self.rows())?;
        self.task.check_ids(&(0..self.rows()), parts.vocab())?;
        let facts: Vec<Option<Facts>> = parts.into_facts().collect();
        if self.needs_first_pass {
            let seen = self.task.rows.iter().zip(&facts);
            self.observed = seen.map(|(row, facts)| self.task.observe(*row, facts.as_ref()?)).collect();
        }
        self.make_plan();
        let task = &self.task;
        let settled = |row: usize| task.settled(row, task.rows[row], facts[row].as_ref());
        let found: Vec<(RowOutcome, RowGradient)> = (0..facts.len()).into_par_iter().map(settled).collect();
        let (outcomes, gradients): (Vec<RowOutcome>, Vec<RowGradient>) = found.into_iter().unzip();
        self.settled = gradients;
        self.collect(0..facts.len(), outcomes);
        Ok(())
    }

    fn remake(&self, rows: Range<usize>, first: usize, logits_rp: &mut [f32]) -> Result<()> {
        RowGradient::remake(&self.settled, rows, first, logits_rp, self.task.spec.temperature)
    }
}

/// How the divergence of a row acts.
struct Pull {
    divergence: Divergence,
    /// Derivatives by the candidates' log-probs; empty for the whole vocabulary, whose derivatives lie in the teacher's row.
    sparse: Vec<(u32, f64)>,
    sparse_sum: f64,
    dense: bool,
}

impl Task<'_> {
    /// Refuses ids of these rows that no logit stands for.
    fn check_ids(&self, rows: &Range<usize>, vocab: usize) -> Result<()> {
        for row in &self.rows[rows.clone()] {
            let target = std::iter::once(self.target(*row));
            let candidates = self.candidates(*row).map_or(&[][..], |c| c.0);
            let mut ids = target.chain(candidates.iter().copied().filter(|&id| id != ABSENT));
            if let Some(id) = ids.find(|&id| id as usize >= vocab) {
                return Err(EngineError::invalid(
                    format!(
                        "sample {}: token {id} is outside the vocabulary of {vocab} (sequence of {})",
                        row.sample,
                        self.samples[row.sample].ids.len()
                    ),
                    "teacher and student must share one tokenizer",
                ));
            }
        }
        Ok(())
    }

    /// A row over the temperature, in `scaled_v` where that has an effect: the chunk still serves the model.
    fn tempered<'v>(&self, z_v: &'v [f32], scaled_v: &'v mut Vec<f32>) -> &'v [f32] {
        if !divides(self.spec.temperature) {
            return z_v;
        }
        scaled_v.clear();
        scaled_v.extend_from_slice(z_v);
        apply_temperature(scaled_v, self.spec.temperature);
        scaled_v
    }

    fn distill(&self, sample: usize) -> Option<&DistillSpec> {
        self.spec.distill.as_ref().filter(|_| self.samples[sample].teacher != TeacherView::NotDistilled)
    }

    fn target(&self, row: Row) -> u32 {
        self.samples[row.sample].ids[row.at]
    }

    /// The reward's advantage: of completion tokens only, also when the prompt is distilled.
    fn reward(&self, row: Row) -> f64 {
        let sample = &self.samples[row.sample];
        if row.at >= sample.prompt_len { f64::from(sample.advantage) } else { 0.0 }
    }

    /// A row's candidate ids and the teacher's log-probs of them.
    fn candidates(&self, row: Row) -> Option<(&[u32], &[f32])> {
        self.distill(row.sample)?;
        let sample = &self.samples[row.sample];
        let TeacherView::TopK { ids, logprobs } = &sample.teacher else { return None };
        let k = ids.len() / self.ranges[row.sample].len().max(1);
        let own = row.token * k..(row.token + 1) * k;
        Some((ids.get(own.clone())?, logprobs.get(own)?))
    }

    /// Whether anything depends on a whole sequence.
    fn needs_plan(&self) -> bool {
        !self.rows.is_empty() && (self.discounts() || self.is_gspo() || self.spec.off_policy_masking_delta.is_some())
    }

    /// Whether what depends on a whole sequence depends on its logits.
    fn needs_first_pass(&self) -> bool {
        let spec = self.spec;
        let any = |test: &dyn Fn(&Sample) -> bool| self.samples.iter().any(test);
        let sampled = spec.distill.as_ref().is_some_and(|d| d.kind == DistillKind::Sampled);
        !self.rows.is_empty()
            && (self.is_gspo()
                || spec.off_policy_masking_delta.is_some() && any(&|s| s.rollout.is_some() || s.old.is_some())
                || self.discounts()
                    && (!sampled || any(&|s| s.old.as_ref().is_none_or(|old| old.len() < s.scored(spec)))))
    }

    fn discounts(&self) -> bool {
        self.spec.distill.as_ref().is_some_and(|d| d.discount != 0.0)
    }

    /// AIPO has its own token ratio, whatever the variant.
    fn is_gspo(&self) -> bool {
        self.spec.variant == Variant::Gspo && self.spec.aipo_rho.is_none()
    }

    /// A row's entry of a vector that covers all scored tokens or the completion's only.
    fn aligned(&self, values: &[f32], row: Row) -> Option<f64> {
        let missing = self.ranges[row.sample].len().checked_sub(values.len())?;
        values.get(row.token.checked_sub(missing)?).map(|&v| f64::from(v))
    }

    fn old(&self, row: Row, c: f64) -> f64 {
        self.samples[row.sample].old.as_ref().and_then(|old| self.aligned(old, row)).unwrap_or(c)
    }

    /// The sampled reverse KL: log-ratio old − teacher, and the same within `kl_clip`.
    fn log_ratio(&self, row: Row, c: f64, distill: &DistillSpec) -> (f64, f64) {
        let TeacherView::Sampled(logprobs) = &self.samples[row.sample].teacher else { return (0.0, 0.0) };
        let free = self.old(row, c) - f64::from(logprobs[row.token]);
        (free, distill.kl_clip.map_or(free, |clip| free.clamp(-clip, clip)))
    }

    /// What the loss of a row needs of its logits.
    fn asked(&self, row: Row) -> Asked {
        let distill = self.distill(row.sample);
        let candidates = self.candidates(row).map_or(&[][..], |c| c.0);
        let present = candidates.iter().copied().filter(|&id| id != ABSENT);
        Asked {
            ids: std::iter::once(self.target(row)).chain(present).collect(),
            teacher: distill.filter(|d| d.kind == DistillKind::FullVocab).map(|d| (d.beta, d.kl_clip)),
        }
    }

    fn facts_of_parts(
        &self,
        rows: &Range<usize>,
        logits_rv: &[f32],
        teacher_rv: &mut [f32],
    ) -> Result<Vec<Option<Facts>>> {
        let Some(shard) = &self.shard else { return Ok(Vec::new()) };
        let asked: Vec<Asked> = self.rows[rows.clone()].iter().map(|row| self.asked(*row)).collect();
        Facts::of_parts(shard, &asked, logits_rv, teacher_rv)
    }

    /// The divergence of a row.
    fn pull(&self, row: Row, facts: &Facts) -> Option<Pull> {
        let distill = self.distill(row.sample)?;
        let mass = match distill.kind {
            DistillKind::Sampled => return None,
            DistillKind::FullVocab => {
                let divergence = facts.teacher.as_ref()?.1;
                return Some(Pull { divergence, sparse: Vec::new(), sparse_sum: 0.0, dense: true });
            }
            DistillKind::CosmosGjsd => Mass::Raw,
            DistillKind::Gjsd { mass } => mass,
        };
        let (ids, logprobs) = self.candidates(row)?;
        let present = ids.iter().copied().filter(|&id| id != ABSENT);
        let c_k: Vec<f64> = facts.logits[1..].iter().map(|&z| facts.stats.log_prob(z)).collect();
        let t_k: Vec<f64> =
            ids.iter().zip(logprobs).filter(|(id, _)| **id != ABSENT).map(|(_, &t)| f64::from(t)).collect();
        let mut gradient_k = Vec::new();
        let divergence = divergence::over_candidates(&c_k, &t_k, distill.beta, mass, distill.kl_clip, &mut gradient_k);
        let sparse_sum = gradient_k.iter().sum();
        Some(Pull { divergence, sparse: present.zip(gradient_k).collect(), sparse_sum, dense: false })
    }

    fn observe(&self, row: Row, facts: &Facts) -> Option<Observed> {
        let c = facts.stats.log_prob(facts.logits[0]);
        let divergence = self.pull(row, facts).map_or(0.0, |pull| pull.divergence.value);
        Some(Observed { c, divergence })
    }

    /// Discounted advantages, sequence ratios and masks from the first pass. Rows that were not finite count as zero;
    /// the second pass reports them.
    fn plan(&self, observed: &[Option<Observed>]) -> Plan {
        let rows = self.rows.len();
        let mut plan = Plan {
            discounted: vec![0.0; rows],
            keep: vec![true; self.samples.len()],
            sequences: vec![None; self.samples.len()],
        };
        let seen = |row: usize| observed[row].unwrap_or(Observed { c: 0.0, divergence: 0.0 });
        for (index, range) in self.ranges.iter().enumerate() {
            if range.is_empty() {
                continue;
            }
            if let Some(distill) = self.distill(index) {
                let gamma = distill.discount;
                let mut with_own = 0.0f64;
                for row in range.clone().rev() {
                    let divergence = match distill.kind {
                        DistillKind::Sampled => self.log_ratio(self.rows[row], seen(row).c, distill).1,
                        _ => seen(row).divergence,
                    };
                    let own = -distill.coef * divergence;
                    let later = gamma * with_own;
                    with_own = own + later;
                    plan.discounted[row] = match distill.kind {
                        DistillKind::Sampled | DistillKind::CosmosGjsd => with_own,
                        DistillKind::Gjsd { .. } | DistillKind::FullVocab => later,
                    };
                }
            }
            plan.keep[index] = self.keeps(index, range, &plan.discounted, &seen);
            if self.is_gspo() {
                plan.sequences[index] = Some(self.sequence_ratio(range, &plan.discounted, &seen));
            }
        }
        plan
    }

    /// Off-policy mask of DeepSeek-V3.2 (section 3.1), with the mean advantage as the sequence's.
    fn keeps(&self, index: usize, range: &Range<usize>, discounted: &[f64], seen: &dyn Fn(usize) -> Observed) -> bool {
        let Some(delta) = self.spec.off_policy_masking_delta else { return true };
        let sample = &self.samples[index];
        let Some(behaviour) = sample.rollout.as_ref().or(sample.old.as_ref()) else { return true };
        let count = range.len() as f64;
        let advantage: f64 =
            range.clone().map(|row| self.reward(self.rows[row]) + discounted[row]).sum::<f64>() / count;
        let gap = |row: usize| self.aligned(behaviour, self.rows[row]).map_or(0.0, |b| b - seen(row).c);
        let drift: f64 = range.clone().map(gap).sum::<f64>() / behaviour.len().max(1) as f64;
        !(advantage < 0.0 && drift > delta)
    }

    /// GSPO's ratio of a sequence; every token's loss depends on every log-prob through it.
    fn sequence_ratio(
        &self,
        range: &Range<usize>,
        discounted: &[f64],
        seen: &dyn Fn(usize) -> Observed,
    ) -> SequenceRatio {
        let count = range.len() as f64;
        let mean = range.clone().map(|row| seen(row).c - self.old(self.rows[row], seen(row).c)).sum::<f64>() / count;
        let ratio = mean.min(SEQUENCE_LOG_RATIO_MAX).exp();
        if mean > SEQUENCE_LOG_RATIO_MAX {
            return SequenceRatio { ratio, by_log_prob: 0.0 };
        }
        let by_ratio: f64 = range
            .clone()
            .map(|row| {
                let at = self.rows[row];
                token_loss(self.spec, ratio, self.reward(at) + discounted[row]).by_ratio
                    * self.behaviour(at, self.old(at, seen(row).c)).map_or(1.0, |b| b.0)
            })
            .sum();
        SequenceRatio { ratio, by_log_prob: by_ratio * ratio / count }
    }

    /// The decoupled loss's weight of a token, whether the cap removed it, and the ratio itself.
    fn behaviour(&self, row: Row, old: f64) -> Option<(f64, bool, f64)> {
        let rollout = self.samples[row.sample].rollout.as_ref()?;
        let ratio = (old - self.aligned(rollout, row)?).exp();
        if !self.spec.use_decoupled_loss {
            return Some((1.0, false, ratio));
        }
        let capped = self.spec.behav_imp_weight_cap.is_some_and(|cap| ratio > cap);
        Some((if capped { 0.0 } else { ratio }, capped, ratio))
    }

    /// Turns a row of logits, with temperature, into the gradient of the loss.
    fn gradient(
        &self,
        index: usize,
        row: Row,
        facts: Option<&Facts>,
        z_v: &mut [f32],
        teacher_v: Option<&mut [f32]>,
    ) -> RowOutcome {
        let (outcome, gradient) = self.settled(index, row, facts);
        let first = self.shard.as_ref().map_or(0, |shard| shard.first);
        gradient.write(first, z_v, teacher_v.as_deref(), self.spec.temperature);
        outcome
    }

    /// What a row adds to the report, and its gradient; neither where a number is not finite.
    fn settled(&self, index: usize, row: Row, facts: Option<&Facts>) -> (RowOutcome, RowGradient) {
        let found = facts.map(|facts| self.settled_finite(index, row, facts));
        found.filter(|found| found.0.finite).unwrap_or_default()
    }

    fn settled_finite(&self, index: usize, row: Row, facts: &Facts) -> (RowOutcome, RowGradient) {
        let spec = self.spec;
        let stats = facts.stats;
        let c = stats.log_prob(facts.logits[0]);
        let distill = self.distill(row.sample);
        let teacher_stats = facts.teacher.as_ref().map(|t| t.0);
        let pull = self.pull(row, facts);
        let distilled = distill.map(|d| self.distilled(index, row, c, d, pull.as_ref()));

        // The policy loss: advantage, ratio, clips.
        let scored_by = distill.map(|d| d.kind);
        let direct = matches!(scored_by, Some(DistillKind::Gjsd { .. } | DistillKind::FullVocab));
        let credit = match (&self.plan, direct) {
            (Some(plan), _) => plan.discounted[index],
            (None, false) => distilled.map_or(0.0, |d| d.discounted),
            (None, true) => 0.0,
        };
        let advantage = self.reward(row) + credit;
        let old = self.old(row, c);
        let (loss, by_log_prob, ratio) = self.policy_loss(row, c, old, advantage);
        let keep = self.plan.as_ref().is_none_or(|plan| plan.keep[row.sample]);
        let behaviour = self.behaviour(row, old);
        let factor = if keep { behaviour.map_or(1.0, |b| b.0) } else { 0.0 };
        // GSPO's derivative already has each token's own weight in it.
        let by_log_prob = by_log_prob * if self.is_gspo() { f64::from(u8::from(keep)) } else { factor };

        // The divergence's own gradient: whole for the direct objectives; through the advantage for the original's.
        let (coef, discount) = distill.map_or((0.0, 0.0), |d| (d.coef, d.discount));
        let pull_weight = match scored_by {
            Some(DistillKind::Gjsd { .. } | DistillKind::FullVocab) => coef,
            Some(DistillKind::CosmosGjsd) if discount == 0.0 => -coef * loss.by_advantage * factor,
            _ => 0.0,
        };
        let direct_value = match &pull {
            Some(pull) if direct => coef * pull.divergence.value,
            _ => 0.0,
        };
        let reference = self.samples[row.sample].reference.as_ref().filter(|_| spec.kl_beta != 0.0);
        let (reference_value, reference_slope) =
            reference.map_or((0.0, 0.0), |r| reference_kl(c, old, f64::from(r[row.token]), spec.unbiased_kl_estimate));

        let weight = self.weights[row.sample];
        let outcome = RowOutcome {
            policy: weight * (loss.value * factor + direct_value),
            reference: weight * reference_value,
            entropy_bonus: self.entropy_weight * stats.entropy,
            advantage: if direct { advantage } else { self.reward(row) + distilled.map_or(0.0, |d| d.discounted) },
            ratio,
            clipped: loss.clipped,
            bounded: loss.bounded,
            behaviour: behaviour.map(|b| (b.2, b.1)),
            mismatch: self.samples[row.sample]
                .recorded
                .as_ref()
                .and_then(|recorded| self.aligned(recorded, row))
                .map(|recorded| (c - recorded).abs()),
            entropy: stats.entropy,
            distilled,
            ..RowOutcome::default()
        };
        let outcome = self.with_teacher_metrics(outcome, row, &stats, teacher_stats.as_ref(), pull.as_ref());
        let at_target = weight * (by_log_prob + spec.kl_beta * reference_slope);
        let finite = [outcome.policy, outcome.reference, outcome.entropy_bonus, at_target, weight * pull_weight]
            .iter()
            .all(|x| x.is_finite());
        let kl_finite = distilled.is_none_or(|d| d.kl.is_finite());
        let gradient = self.row_gradient(row, &stats, at_target, weight * pull_weight, pull.as_ref());
        (RowOutcome { finite: finite && kl_finite, ..outcome }, gradient)
    }

    fn distilled(&self, index: usize, row: Row, c: f64, distill: &DistillSpec, pull: Option<&Pull>) -> Distilled {
        let (kl, used, clipped) = match pull {
            Some(pull) => (pull.divergence.value, pull.divergence.value, pull.divergence.clipped),
            None => {
                let (free, held) = self.log_ratio(row, c, distill);
                (free, held, free != held)
            }
        };
        let advantage = -distill.coef * used;
        let discounted = match &self.plan {
            Some(plan) if distill.discount != 0.0 => match distill.kind {
                DistillKind::Sampled | DistillKind::CosmosGjsd => plan.discounted[index],
                // For the metrics: what the token's own divergence and the later ones come to.
                DistillKind::Gjsd { .. } | DistillKind::FullVocab => advantage + plan.discounted[index],
            },
            _ => advantage,
        };
        Distilled { kl, advantage, discounted, clipped }
    }

    /// The surrogate, its derivative by this row's log-prob, and the ratio.
    fn policy_loss(&self, row: Row, c: f64, old: f64, advantage: f64) -> (TokenLoss, f64, f64) {
        if let Some(sequence) = self.plan.as_ref().and_then(|plan| plan.sequences[row.sample]) {
            return (token_loss(self.spec, sequence.ratio, advantage), sequence.by_log_prob, sequence.ratio);
        }
        let (ratio, slope) = token_ratio(c - old);
        let loss = token_loss(self.spec, ratio, advantage);
        (loss, loss.by_ratio * slope, ratio)
    }

    fn with_teacher_metrics(
        &self,
        mut outcome: RowOutcome,
        row: Row,
        stats: &RowStats,
        teacher: Option<&RowStats>,
        pull: Option<&Pull>,
    ) -> RowOutcome {
        let sample = &self.samples[row.sample];
        if self.distill(row.sample).is_none() {
            return outcome;
        }
        outcome.teacher_entropy =
            teacher.map(|t| t.entropy).or_else(|| sample.teacher_entropy.as_ref().map(|e| f64::from(e[row.token])));
        let top1 = match (&sample.teacher_top1, teacher) {
            (Some(top1), _) => Some(top1[row.token]),
            (None, Some(teacher)) => Some(teacher.argmax),
            (None, None) => None,
        };
        outcome.agrees = top1.map(|top1| top1 == stats.argmax);
        outcome.masses = pull.filter(|p| !p.dense).map(|p| (p.divergence.student_mass, p.divergence.teacher_mass));
        outcome
    }

    /// d loss / d logits from the derivatives by log-probs: G − p·ΣG.
    fn row_gradient(
        &self,
        row: Row,
        stats: &RowStats,
        at_target: f64,
        pull_weight: f64,
        pull: Option<&Pull>,
    ) -> RowGradient {
        let pull_sum =
            pull.map_or(0.0, |p| pull_weight * if p.dense { p.divergence.gradient_sum } else { p.sparse_sum });
        let entropy = self.entropy_weight;
        // d(−w·H)/dz = w·p·(log p + H).
        let mut gradient = RowGradient::new(stats, entropy * stats.entropy - at_target - pull_sum, entropy);
        gradient.add(self.target(row), at_target);
        match pull {
            Some(pull) if pull.dense => gradient.by_teacher = Some(pull_weight as f32),
            Some(pull) => pull.sparse.iter().for_each(|(id, slope)| gradient.add(*id, pull_weight * slope)),
            None => {}
        }
        gradient
    }
}

fn check_sample(spec: &ObjectiveSpec, index: usize, sample: &Sample, has_source: bool) -> Result<()> {
    let wrong = |what: String, hint: &str| Err(EngineError::invalid(format!("sample {index}: {what}"), hint));
    if sample.prompt_len == 0 || sample.prompt_len > sample.ids.len() {
        return wrong(format!("a prompt of {} tokens in a sequence of {}", sample.prompt_len, sample.ids.len()), "");
    }
    let all = sample.ids.len() - sample.prompt_len;
    if let Some(own) = sample.own.as_ref().filter(|own| own.len() != all) {
        return wrong(format!("a mask of {} entries for a completion of {all} tokens", own.len()), "");
    }
    if sample.is_missing(spec) {
        return Ok(());
    }
    let tokens = sample.scored(spec);
    let completion = sample.completion_tokens();
    let lengths = [
        ("old log-probs", sample.old.as_ref().map(Vec::len).filter(|&length| length != completion)),
        ("rollout log-probs", sample.rollout.as_ref().map(Vec::len).filter(|&length| length != completion)),
        ("recorded log-probs", sample.recorded.as_ref().map(Vec::len).filter(|&length| length != completion)),
        ("reference log-probs", sample.reference.as_ref().map(Vec::len)),
        ("teacher entropies", sample.teacher_entropy.as_ref().map(Vec::len)),
        ("teacher top-1 ids", sample.teacher_top1.as_ref().map(Vec::len)),
    ];
    for (what, length) in lengths {
        if let Some(length) = length.filter(|&length| length != tokens) {
            return wrong(format!("{length} {what} for {tokens} scored tokens"), "score the same tokens everywhere");
        }
    }
    if spec.kl_beta != 0.0 && sample.reference.is_none() && tokens > 0 {
        return wrong(
            "no reference log-probs, and `kl_beta` is not 0".into(),
            "score the samples with the reference model",
        );
    }
    if spec.use_decoupled_loss && sample.rollout.is_none() && tokens > 0 {
        return wrong("no rollout log-probs for the decoupled loss".into(), "set `collect_rollout_logprobs = true`");
    }
    let Some(distill) = &spec.distill else { return Ok(()) };
    match (&sample.teacher, distill.kind) {
        (TeacherView::NotDistilled | TeacherView::Missing, _) => Ok(()),
        (TeacherView::Sampled(logprobs), DistillKind::Sampled) if logprobs.len() == tokens => Ok(()),
        (TeacherView::Sampled(logprobs), DistillKind::Sampled) => wrong(
            format!("{} teacher log-probs for {tokens} scored tokens", logprobs.len()),
            "score the same tokens everywhere",
        ),
        (TeacherView::TopK { ids, logprobs }, DistillKind::Gjsd { .. } | DistillKind::CosmosGjsd) => {
            if ids.len() == logprobs.len()
                && (tokens == 0 && ids.is_empty() || tokens > 0 && ids.len().is_multiple_of(tokens))
            {
                return Ok(());
            }
            wrong(format!("{} candidates with {} log-probs for {tokens} scored tokens", ids.len(), logprobs.len()), "")
        }
        (TeacherView::Full, DistillKind::FullVocab) if has_source => Ok(()),
        (TeacherView::Full, DistillKind::FullVocab) => {
            wrong("the whole vocabulary is wanted and no teacher logits are given".into(), "")
        }
        (_, kind) => wrong(format!("the teacher's view does not fit the objective {kind:?}"), ""),
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
