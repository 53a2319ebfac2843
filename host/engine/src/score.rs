//! Teacher scoring: log-probs of given tokens and top-k candidates, the head in chunks.

use std::ops::Range;

use rayon::prelude::*;

use crate::batch::{Position, TokenBatch};
use crate::model::{LogitsSource, Model};
use crate::{EngineError, Result};

pub(crate) mod softmax;
pub(crate) mod top;

use softmax::{RowStats, apply_temperature};

/// A candidate id that stands for "no candidate here".
pub const ABSENT: u32 = u32::MAX;

/// A sequence to score.
#[derive(Debug, Clone)]
pub struct ScoreRequest<'a> {
    /// Prompt and completion, at least two tokens.
    pub ids: &'a [u32],
    /// Index of the first token to score, at least 1: the prompt's length, or 1 to score the prompt too.
    pub first: usize,
    /// Ids whose log-probs are wanted beside the sampled ones, `[scored, k]` row-major; [`ABSENT`] pads.
    pub candidates: Option<&'a [u32]>,
}

impl ScoreRequest<'_> {
    /// Number of scored tokens.
    pub fn scored(&self) -> usize {
        self.ids.len().saturating_sub(self.first)
    }
}

/// How to score.
#[derive(Debug, Clone)]
pub struct ScoreOptions {
    /// Divides the logits when above 1e-6 and not 1 (`train_policy.temperature`).
    pub temperature: f32,
    /// Own candidates to return for each token, 0 for none.
    pub top_k: usize,
    /// Sequences per forward pass, at least 1.
    pub mini_batch: usize,
    /// Return the hidden states of the scored rows, for full-vocabulary objectives.
    pub keep_hidden: bool,
    /// Run the head (log-probs, entropy, candidates). Off, with `keep_hidden`, only hidden states come back.
    pub head: bool,
}

impl Default for ScoreOptions {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, mini_batch: 8, keep_hidden: false, head: true }
    }
}

/// The scores of one sequence; every vector has one entry per scored token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scored {
    /// Log-prob of each token, exact over the whole vocabulary; NaN where the model's logits were not finite.
    pub logprobs: Vec<f32>,
    /// Entropy of each distribution in nats.
    pub entropy: Vec<f32>,
    /// Most likely id at each position.
    pub top1: Vec<u32>,
    /// The `top_k` most likely ids, `[scored, top_k]`, best first.
    pub top_ids: Vec<u32>,
    /// Their log-probs.
    pub top_logprobs: Vec<f32>,
    /// Log-probs of the request's candidates, in their order; −∞ for [`ABSENT`].
    pub candidate_logprobs: Vec<f32>,
    /// Hidden states `[scored, hidden]` when asked for.
    pub hidden_rh: Option<Vec<f32>>,
}

/// What one row gave.
struct RowScore {
    logprob: f32,
    entropy: f32,
    top1: u32,
    top: Vec<(f32, u32)>,
    candidates: Vec<f32>,
}

/// Scores sequences in batches of `mini_batch`, longest together so that little is padded. Results come in the order of
/// the requests. At most [`Model::head_chunk_rows`] rows of logits exist at a time.
///
/// # Errors
/// A request with nothing to score, ids outside the vocabulary or candidates of the wrong length, by its index; and
/// what the model reports.
pub fn score(model: &mut dyn Model, requests: &[ScoreRequest<'_>], options: &ScoreOptions) -> Result<Vec<Scored>> {
    let vocab = model.config().vocab_size;
    for (index, request) in requests.iter().enumerate() {
        check(index, request, vocab)?;
    }
    if options.mini_batch == 0 {
        return Err(EngineError::invalid("scoring with `mini_batch` 0", "set `mini_batch` to at least 1"));
    }
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(requests[i].ids.len()));
    let mut scored = vec![Scored::default(); requests.len()];
    for group in order.chunks(options.mini_batch) {
        // The last token predicts nothing that is scored.
        let sequences: Vec<&[u32]> = group.iter().map(|&i| &requests[i].ids[..requests[i].ids.len() - 1]).collect();
        let batch = TokenBatch::new(&sequences)?;
        let mut positions = Vec::new();
        for (b, &i) in group.iter().enumerate() {
            positions.extend((requests[i].first..requests[i].ids.len()).map(|target| Position { b, t: target - 1 }));
        }
        let hidden_rh = model.hidden_rh(&batch, &positions)?;
        let width = row_width(&hidden_rh, positions.len())?;
        let mut row = 0;
        for &i in group {
            let request = &requests[i];
            let rows = request.scored();
            let own_rh = &hidden_rh[row * width..(row + rows) * width];
            row += rows;
            if options.head {
                let wanted =
                    Wanted { targets: &request.ids[request.first..], candidates: request.candidates.unwrap_or(&[]) };
                scored[i] = head_logprobs(model, own_rh, &wanted, options)?;
            }
            if options.keep_hidden {
                scored[i].hidden_rh = Some(own_rh.to_vec());
            }
        }
    }
    Ok(scored)
}

fn check(index: usize, request: &ScoreRequest<'_>, vocab: usize) -> Result<()> {
    if request.first == 0 || request.first >= request.ids.len() {
        return Err(EngineError::invalid(
            format!(
                "score request {index}: {} tokens and the first scored one is {}",
                request.ids.len(),
                request.first
            ),
            "the first scored token is at least 1 and lies within the sequence",
        ));
    }
    if let Some(id) = request.ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(EngineError::invalid(
            format!("score request {index}: token {id} is outside the vocabulary of {vocab}"),
            "teacher and student must share one tokenizer",
        ));
    }
    let candidates = request.candidates.unwrap_or(&[]);
    if !candidates.len().is_multiple_of(request.scored()) {
        return Err(EngineError::invalid(
            format!("score request {index}: {} candidates for {} scored tokens", candidates.len(), request.scored()),
            "give the same number of candidates for each scored token",
        ));
    }
    if let Some(id) = candidates.iter().find(|&&id| id != ABSENT && id as usize >= vocab) {
        return Err(EngineError::invalid(
            format!("score request {index}: candidate {id} is outside the vocabulary of {vocab}"),
            "teacher and student must share one tokenizer",
        ));
    }
    Ok(())
}

fn row_width(hidden_rh: &[f32], rows: usize) -> Result<usize> {
    if rows == 0 || !hidden_rh.len().is_multiple_of(rows) {
        return Err(EngineError::invalid(format!("{} hidden values for {rows} rows", hidden_rh.len()), ""));
    }
    Ok(hidden_rh.len() / rows)
}

/// Which log-probs are wanted of a run of rows.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// One id per row.
    pub targets: &'a [u32],
    /// `[rows, k]` further ids, or none.
    pub candidates: &'a [u32],
}

/// The head over hidden states `[rows, hidden]`, chunk by chunk: log-probs of the targets and candidates and the top k.
/// Each row is computed on its own, so neither the chunk size nor the order of rows changes a result.
pub fn head_logprobs(
    model: &mut dyn Model,
    hidden_rh: &[f32],
    wanted: &Wanted<'_>,
    options: &ScoreOptions,
) -> Result<Scored> {
    let rows = wanted.targets.len();
    let width = row_width(hidden_rh, rows)?;
    let k = wanted.candidates.len() / rows;
    let vocab = model.config().vocab_size;
    let outside = |&id: &u32| id != ABSENT && id as usize >= vocab;
    if wanted.targets.iter().any(|&id| id as usize >= vocab) || wanted.candidates.iter().any(outside) {
        return Err(EngineError::invalid(format!("an id to score is outside the vocabulary of {vocab}"), ""));
    }
    let chunk_rows = model.head_chunk_rows().max(1);
    let mut scored = Scored::default();
    let mut logits_rv = Vec::new();
    let mut start = 0;
    while start < rows {
        let end = rows.min(start + chunk_rows);
        model.head_logits_rv(&hidden_rh[start * width..end * width], &mut logits_rv)?;
        if logits_rv.len() != (end - start) * vocab {
            return Err(EngineError::invalid(
                format!("the head gave {} logits for {} rows of {vocab}", logits_rv.len(), end - start),
                "",
            ));
        }
        let parts: Vec<RowScore> = logits_rv
            .par_chunks_mut(vocab)
            .enumerate()
            .map(|(r, z_v)| {
                let row = start + r;
                row_score(z_v, wanted.targets[row], &wanted.candidates[row * k..(row + 1) * k], options)
            })
            .collect();
        for part in parts {
            scored.logprobs.push(part.logprob);
            scored.entropy.push(part.entropy);
            scored.top1.push(part.top1);
            scored.top_ids.extend(part.top.iter().map(|t| t.1));
            scored.top_logprobs.extend(part.top.iter().map(|t| t.0));
            scored.candidate_logprobs.extend(part.candidates);
        }
        start = end;
    }
    Ok(scored)
}

fn row_score(z_v: &mut [f32], target: u32, candidates: &[u32], options: &ScoreOptions) -> RowScore {
    apply_temperature(z_v, options.temperature);
    let mut top = top::top_k(z_v, options.top_k);
    let Some(stats) = RowStats::of(z_v) else {
        top.iter_mut().for_each(|t| t.0 = f32::NAN);
        return RowScore {
            logprob: f32::NAN,
            entropy: f32::NAN,
            top1: 0,
            top,
            candidates: vec![f32::NAN; candidates.len()],
        };
    };
    top.iter_mut().for_each(|t| t.0 = stats.log_prob(t.0) as f32);
    let of = |&id: &u32| if id == ABSENT { f32::NEG_INFINITY } else { stats.log_prob(z_v[id as usize]) as f32 };
    RowScore {
        logprob: stats.log_prob(z_v[target as usize]) as f32,
        entropy: stats.entropy as f32,
        top1: stats.argmax,
        top,
        candidates: candidates.iter().map(of).collect(),
    }
}

/// A teacher's logits, recomputed from its last hidden states when a full-vocabulary objective asks for them.
pub struct HiddenLogits<'a> {
    model: &'a mut dyn Model,
    hidden_rh: Vec<f32>,
    width: usize,
    part_rv: Vec<f32>,
}

impl<'a> HiddenLogits<'a> {
    /// From the hidden states `[rows, hidden]` of the samples in a loss's order, joined.
    ///
    /// # Errors
    /// Hidden states whose size is not a multiple of the model's width.
    pub fn new(model: &'a mut dyn Model, hidden_rh: Vec<f32>) -> Result<Self> {
        let width = model.config().hidden_size;
        if width == 0 || !hidden_rh.len().is_multiple_of(width) {
            return Err(EngineError::invalid(
                format!("{} hidden values are no whole rows of a model {width} wide", hidden_rh.len()),
                "use the teacher that computed the hidden states",
            ));
        }
        Ok(Self { model, hidden_rh, width, part_rv: Vec::new() })
    }
}

impl LogitsSource for HiddenLogits<'_> {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let width = self.width;
        let have = self.hidden_rh.len() / width;
        let Some(own_rh) = self.hidden_rh.get(rows.start * width..rows.end * width) else {
            return Err(EngineError::invalid(
                format!("teacher rows {rows:?} wanted, {have} kept"),
                "keep the hidden states of every scored token",
            ));
        };
        out.clear();
        // The student's chunk may be larger than what the teacher's head should hold at once.
        let step = self.model.head_chunk_rows().max(1) * width;
        for part_rh in own_rh.chunks(step) {
            self.model.head_logits_rv(part_rh, &mut self.part_rv)?;
            out.extend_from_slice(&self.part_rv);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
