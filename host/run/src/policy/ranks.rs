//! The micro-batches of a step on one rank of a sharded student.
//!
//! All ranks know all samples, and cut them into the micro-batches that a single rank would make. The ranks along the
//! data-parallel axes take consecutive ones; who has fewer than the others fills up with empty ones, since all must go through
//! the model equally often. Gradients are sums over ranks, so each micro-batch keeps the weight that it has on a single rank.

use std::ops::Range;

use cosmos_engine::batch::{Position, TokenBatch};
use cosmos_engine::head::Head;
use cosmos_engine::model::{HeadLoss, LogitsSource, Losses, MicroBatch, VocabShard};
use cosmos_engine::objective::{DistillKind, DistillSpec, Normaliser, PolicyLoss, Sample};

use super::{PolicyRole, StepOutcome};
use crate::error::{Result, Role};
use crate::rollout::Completion;
use crate::student::Student;
use crate::teacher::TeacherHidden;

type Engine<T> = cosmos_engine::Result<T>;

/// What the ranks work on.
pub(super) struct RankWork<'a> {
    role: &'a PolicyRole,
    samples: &'a [Sample],
    hidden: &'a [Vec<TeacherHidden>],
    completions: &'a [Completion],
    /// Samples of the mini-batch.
    count: usize,
    record: bool,
}

impl<'a> RankWork<'a> {
    pub fn new(
        role: &'a PolicyRole,
        samples: &'a [Sample],
        hidden: &'a [Vec<TeacherHidden>],
        completions: &'a [Completion],
        count: usize,
        record: bool,
    ) -> Self {
        Self { role, samples, hidden, completions, count, record }
    }

    /// Forward and backward of this rank's part of `micros`.
    pub fn run(
        &self,
        student: &mut Student,
        heads: &mut [Box<dyn Head + '_>],
        micros: &[Range<usize>],
        outcome: &mut StepOutcome,
    ) -> Result<()> {
        let place = student.place;
        let (part, parts) = place.part;
        let scored = |micro: &&Range<usize>| self.samples[(*micro).clone()].iter().any(|s| self.rows(s) > 0);
        let (active, idle): (Vec<&Range<usize>>, Vec<&Range<usize>>) = micros.iter().partition(scored);
        let each = active.len().div_ceil(parts);
        let own: Vec<Option<Range<usize>>> =
            (part * each..(part + 1) * each).map(|at| active.get(at).map(|micro| (*micro).clone())).collect();
        let batches = own.iter().map(|micro| self.batch(micro.as_ref())).collect::<Engine<Vec<_>>>().role("student")?;
        let tokens: usize = own
            .iter()
            .zip(&batches)
            .filter(|(micro, _)| micro.is_some())
            .map(|(_, batch)| batch.batch.lens_b.iter().sum::<usize>())
            .sum();
        let shard = student.model.vocab_shard();
        let width = student.model.config().vocab_size;
        let reports = place.reports && self.record;
        let mut losses = RankLosses { work: self, heads, own: &own, shard, width, reports, outcome };
        student.model.forward_backward_each(&batches, &mut losses).role("student")?;
        // What has no row needs no model, but its missing samples are counted.
        for micro in idle.into_iter().filter(|_| reports && part == 0) {
            losses.of(micro.clone(), &mut |_| Ok(())).role("student")?;
        }
        if place.reports {
            outcome.tokens += tokens as u64;
        }
        Ok(())
    }

    fn rows(&self, sample: &Sample) -> usize {
        sample.targets(&self.role.spec).count()
    }

    fn share(&self, micro: &Range<usize>) -> f64 {
        micro.len() as f64 / self.count as f64
    }

    /// The sequences of a micro-batch that have rows, and these; without one a sequence that nothing is asked of.
    fn batch(&self, micro: Option<&Range<usize>>) -> Engine<MicroBatch> {
        let Some(micro) = micro else {
            // Whoever has none fills up beside one that has rows, so that there is such a sample.
            let scored = self.samples.iter().filter(|sample| self.rows(sample) > 0);
            let ids = scored.map(|sample| sample.ids.as_slice()).min_by_key(|ids| ids.len()).unwrap_or_default();
            let context = &ids[..ids.len().saturating_sub(1)];
            return Ok(MicroBatch { batch: TokenBatch::new(&[context])?, positions: Vec::new() });
        };
        let active: Vec<&Sample> = self.samples[micro.clone()].iter().filter(|s| self.rows(s) > 0).collect();
        // The last token predicts nothing that is scored.
        let sequences: Vec<&[u32]> = active.iter().map(|s| &s.ids[..s.ids.len() - 1]).collect();
        let positions = active
            .iter()
            .enumerate()
            .flat_map(|(b, s)| s.targets(&self.role.spec).map(move |at| Position { b, t: at - 1 }))
            .collect();
        Ok(MicroBatch { batch: TokenBatch::new(&sequences)?, positions })
    }
}

/// The losses of a rank's micro-batches.
struct RankLosses<'w, 'a, 'h, 'o> {
    work: &'w RankWork<'a>,
    heads: &'w mut [Box<dyn Head + 'h>],
    own: &'w [Option<Range<usize>>],
    shard: VocabShard,
    /// Ids of the whole vocabulary.
    width: usize,
    reports: bool,
    outcome: &'o mut StepOutcome,
}

impl Losses for RankLosses<'_, '_, '_, '_> {
    fn with(&mut self, index: usize, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Engine<()>) -> Engine<()> {
        let Some(micro) = self.own.get(index).cloned().flatten() else {
            return run(&mut Nothing);
        };
        self.of(micro, run)
    }
}

impl RankLosses<'_, '_, '_, '_> {
    /// The loss of a micro-batch, and what is told of it.
    fn of(&mut self, micro: Range<usize>, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Engine<()>) -> Engine<()> {
        let (role, work) = (self.work.role, self.work);
        let samples = &work.samples[micro.clone()];
        let share = work.share(&micro);
        let normaliser = Normaliser::of(&role.spec, samples, share);
        let full = matches!(role.spec.distill, Some(DistillSpec { kind: DistillKind::FullVocab, .. }));
        let mut source = match full && !self.heads.is_empty() {
            true => {
                let whole = role.mixture(self.heads, samples, &work.hidden[micro.clone()], self.width)?;
                Some(whole.only(self.shard.ids())?)
            }
            false => None,
        };
        let source = source.as_mut().map(|s| s as &mut dyn LogitsSource);
        let mut loss = PolicyLoss::new(&role.spec, samples, normaliser, source)?;
        run(&mut loss)?;
        if self.reports {
            self.outcome.record(loss, &work.completions[micro], share);
        }
        Ok(())
    }
}

/// The loss of a micro-batch without rows.
struct Nothing;

impl HeadLoss for Nothing {
    fn set_vocab_shard(&mut self, _shard: &VocabShard) -> Engine<()> {
        Ok(())
    }

    fn needs_first_pass(&self) -> bool {
        false
    }

    fn observe(&mut self, _rows: Range<usize>, _logits_rv: &[f32]) -> Engine<()> {
        Ok(())
    }

    fn gradient(&mut self, _rows: Range<usize>, _logits_rv: &mut [f32]) -> Engine<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "ranks_tests.rs"]
mod tests;
