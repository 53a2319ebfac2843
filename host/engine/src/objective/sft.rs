//! Likelihood of given responses.

use std::ops::Range;

use rayon::prelude::*;

use super::facts::SeenRows;
use super::row_gradient::RowGradient;
use crate::batch::{Position, TokenBatch};
use crate::model::{HeadLoss, VocabShard};
use crate::score::shard::{self, PartStats, RowPart, pick};
use crate::score::softmax::RowStats;
use crate::{EngineError, Result};

/// A sequence and which of its tokens to learn: a response, or the assistant's turns of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SftSample {
    /// Prompt and responses.
    pub ids: Vec<u32>,
    /// Whether each token is learnt; the first never is, since nothing predicts it.
    pub trained: Vec<bool>,
}

impl SftSample {
    /// A prompt of `prompt_len` tokens and its response.
    pub fn response(ids: Vec<u32>, prompt_len: usize) -> Self {
        let trained = (0..ids.len()).map(|t| t >= prompt_len).collect();
        Self { ids, trained }
    }

    /// Number of learnt tokens.
    pub fn scored(&self) -> usize {
        self.targets().count()
    }

    fn targets(&self) -> impl Iterator<Item = usize> {
        self.trained.iter().enumerate().skip(1).filter(|t| *t.1).map(|t| t.0)
    }
}

/// Σ −log p(response token) × `weight`. With `weight` = 1 / response tokens of the optimizer batch, micro-batches add up
/// to the mean over all tokens.
pub struct SftLoss {
    samples: Vec<Range<usize>>,
    targets: Vec<u32>,
    batch: Option<(TokenBatch, Vec<Position>)>,
    weight: f64,
    nll: f64,
    seen: usize,
    correct: usize,
    non_finite_rows: usize,
    /// Which ids the rows hold, where it is not all of them.
    shard: Option<VocabShard>,
    /// Rows whose logits come in parts.
    parts: SeenRows,
    /// The gradients of the rows that were settled.
    settled: Vec<RowGradient>,
}

impl SftLoss {
    /// The loss of a micro-batch.
    ///
    /// # Errors
    /// A sample with another number of marks than tokens, by its index.
    pub fn new(samples: &[SftSample], weight: f64) -> Result<Self> {
        let (mut sequences, mut positions, mut targets, mut ranges) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (index, sample) in samples.iter().enumerate() {
            if sample.trained.len() != sample.ids.len() {
                let message = format!("sample {index}: {} marks for {} tokens", sample.trained.len(), sample.ids.len());
                return Err(EngineError::invalid(message, ""));
            }
            let start = targets.len();
            if let Some(last) = sample.targets().last() {
                let b = sequences.len();
                positions.extend(sample.targets().map(|target| Position { b, t: target - 1 }));
                targets.extend(sample.targets().map(|target| sample.ids[target]));
                // Nothing after the last learnt token has a part in the loss.
                sequences.push(&sample.ids[..last]);
            }
            ranges.push(start..targets.len());
        }
        let batch = if sequences.is_empty() { None } else { Some((TokenBatch::new(&sequences)?, positions)) };
        Ok(Self {
            samples: ranges,
            targets,
            batch,
            weight,
            nll: 0.0,
            seen: 0,
            correct: 0,
            non_finite_rows: 0,
            shard: None,
            parts: SeenRows::default(),
            settled: Vec::new(),
        })
    }

    /// Number of rows; when it is 0 there is nothing to run.
    pub fn rows(&self) -> usize {
        self.targets.len()
    }

    /// Rows of sample `index`.
    pub fn sample_rows(&self, index: usize) -> Range<usize> {
        self.samples.get(index).cloned().unwrap_or(0..0)
    }

    /// The sequences to run the model on and the position of every row.
    ///
    /// # Errors
    /// When no sample has a response.
    pub fn batch(&self) -> Result<(TokenBatch, Vec<Position>)> {
        self.batch
            .clone()
            .ok_or_else(|| EngineError::invalid("no sample of this batch has a response", "check the data"))
    }

    /// The weighted loss so far; NaN if a row was not finite.
    pub fn total(&self) -> f64 {
        if self.non_finite_rows > 0 { f64::NAN } else { self.nll * self.weight }
    }

    /// Σ −log p over the finite rows so far, without the weight.
    pub fn nll_sum(&self) -> f64 {
        self.nll
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.seen
    }

    /// Tokens that were the most likely ones.
    pub fn correct(&self) -> usize {
        self.correct
    }

    /// Rows whose logits were NaN or infinite; they have no gradient.
    pub fn non_finite_rows(&self) -> usize {
        self.non_finite_rows
    }
}

impl SftLoss {
    /// Takes the losses of a chunk of rows in; the gradients at its logits.
    fn take(&mut self, rows: &Range<usize>, logits_rv: &[f32]) -> Result<Vec<RowGradient>> {
        let Some(targets) =
            self.targets.get(rows.clone()).filter(|t| !t.is_empty() && logits_rv.len().is_multiple_of(t.len()))
        else {
            return Err(EngineError::invalid(format!("a chunk of rows {rows:?}; the loss has {}", self.rows()), ""));
        };
        let width = logits_rv.len() / targets.len();
        let vocab = self.shard.as_ref().map_or(width, |shard| shard.vocab);
        if let Some(shard) = self.shard.as_ref().filter(|shard| shard.len != width) {
            return Err(EngineError::invalid(format!("rows of {width} logits where the rank has {shard:?}"), ""));
        }
        check_targets(targets, vocab)?;
        let found: Vec<Option<(RowStats, f32)>> = match &self.shard {
            None => {
                let row = |(z_v, &target): (&[f32], &u32)| RowStats::of(z_v).map(|stats| (stats, z_v[target as usize]));
                logits_rv.par_chunks(width).zip(targets).map(row).collect()
            }
            Some(shard) => {
                let part = |(z_v, &target): (&[f32], &u32)| RowPart {
                    own: PartStats::of(z_v, shard.first),
                    other: None,
                    picked: vec![pick(shard, z_v, target)],
                    top: Vec::new(),
                };
                let parts: Vec<RowPart> = logits_rv.par_chunks(width).zip(targets).map(part).collect();
                let whole = shard::join(shard, &parts, 0)?;
                whole.into_iter().map(|row| row.own.map(|stats| (stats, row.picked[0]))).collect()
            }
        };
        Ok(self.losses(rows.clone(), found))
    }

    /// Takes the losses of rows in, from their statistics and the logits of their targets.
    fn losses(&mut self, rows: Range<usize>, found: Vec<Option<(RowStats, f32)>>) -> Vec<RowGradient> {
        let mut gradients = Vec::with_capacity(rows.len());
        for (found, &target) in found.into_iter().zip(&self.targets[rows]) {
            self.seen += 1;
            let found = found.map(|(stats, z)| (stats, stats.log_prob(z)));
            let Some((stats, log_prob)) = found.filter(|f| f.1.is_finite()) else {
                self.non_finite_rows += 1;
                gradients.push(RowGradient::default());
                continue;
            };
            self.nll -= log_prob;
            self.correct += usize::from(stats.argmax == target);
            let mut gradient = RowGradient::new(&stats, self.weight, 0.0);
            gradient.add(target, -self.weight);
            gradients.push(gradient);
        }
        gradients
    }
}

/// Refuses a target that no logit stands for.
fn check_targets(targets: &[u32], vocab: usize) -> Result<()> {
    match targets.iter().find(|&&id| id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(EngineError::invalid(
            format!("token {id} is outside the vocabulary of {vocab}"),
            "use the tokenizer that belongs to the model",
        )),
    }
}

impl HeadLoss for SftLoss {
    fn set_vocab_shard(&mut self, shard: &VocabShard) -> Result<()> {
        shard::check(shard)?;
        self.shard = (!shard.is_whole()).then(|| shard.clone());
        Ok(())
    }

    fn needs_first_pass(&self) -> bool {
        false
    }

    fn observe(&mut self, _rows: Range<usize>, _logits_rv: &[f32]) -> Result<()> {
        Ok(())
    }

    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        let gradients = self.take(&rows, logits_rv)?;
        let first = self.shard.as_ref().map_or(0, |shard| shard.first);
        RowGradient::write_all(&gradients, first, logits_rv, 1.0);
        Ok(())
    }

    fn remakes(&self) -> bool {
        self.shard.is_none()
    }

    fn see(&mut self, rows: Range<usize>, first: usize, logits_rp: &mut [f32]) -> Result<()> {
        let Some(targets) = self.targets.get(rows.clone()) else {
            return Err(EngineError::invalid(format!("a chunk of rows {rows:?}; the loss has {}", self.rows()), ""));
        };
        let start = rows.start;
        self.parts.add(rows, first, logits_rp, 1.0, |row| vec![targets[row - start]])
    }

    fn settle(&mut self) -> Result<()> {
        let parts = std::mem::take(&mut self.parts);
        parts.check_rows(self.rows())?;
        check_targets(&self.targets, parts.vocab())?;
        let found = parts.into_facts().map(|facts| facts.map(|facts| (facts.stats, facts.logits[0]))).collect();
        self.settled = self.losses(0..self.rows(), found);
        Ok(())
    }

    fn remake(&self, rows: Range<usize>, first: usize, logits_rp: &mut [f32]) -> Result<()> {
        RowGradient::remake(&self.settled, rows, first, logits_rp, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: usize, vocab: usize) -> Vec<f32> {
        (0..rows * vocab).map(|i| ((i * 37) % 23) as f32 * 0.2 - 2.0).collect()
    }

    #[test]
    fn gradient_matches_differences() {
        let samples = [
            SftSample::response(vec![1, 4, 2, 0], 2),
            SftSample::response(vec![3], 1),
            SftSample::response(vec![2, 5, 5], 0),
        ];
        let run = |z: &[f32]| {
            let mut loss = SftLoss::new(&samples, 0.25).unwrap();
            let mut out = z.to_vec();
            for (r, chunk) in out.chunks_mut(2 * 7).enumerate() {
                loss.gradient(2 * r..2 * r + 2, chunk).unwrap();
            }
            (loss.total(), out)
        };
        let z = logits(4, 7);
        let (total, gradient) = run(&z);
        assert!(total > 0.0);
        for i in 0..z.len() {
            let at = |step: f32| {
                let mut moved = z.clone();
                moved[i] += step;
                run(&moved).0
            };
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((slope - f64::from(gradient[i])).abs() < 1e-4, "{i}: {slope} {}", gradient[i]);
        }
        let loss = SftLoss::new(&samples, 0.25).unwrap();
        let (batch, positions) = loss.batch().unwrap();
        assert_eq!(
            (batch.lens_b, positions.len(), loss.sample_rows(1), loss.sample_rows(2)),
            (vec![3, 2], 4, 2..2, 2..4)
        );
    }

    #[test]
    fn bad_rows_are_counted_and_bad_input_refused() {
        let samples = [SftSample::response(vec![1, 4, 2], 1)];
        let mut loss = SftLoss::new(&samples, 1.0).unwrap();
        let mut z = logits(2, 7);
        z[9] = f32::NAN;
        loss.gradient(0..2, &mut z).unwrap();
        assert!(loss.total().is_nan() && loss.non_finite_rows() == 1 && z[7..].iter().all(|&g| g == 0.0));
        assert!(loss.gradient(0..2, &mut [0.0; 6]).unwrap_err().to_string().contains("outside the vocabulary"));
        assert!(loss.gradient(0..3, &mut [0.0; 21]).is_err());
        assert!(SftLoss::new(&[SftSample { ids: vec![1], trained: vec![] }], 1.0).is_err());
        assert!(SftLoss::new(&[SftSample::response(vec![1], 1)], 1.0).unwrap().batch().is_err());
    }
}
