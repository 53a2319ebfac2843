//! Teacher scoring: log-probs of given tokens and top-k candidates, the head in chunks.

use rayon::prelude::*;

use crate::batch::{Position, TokenBatch};
use crate::model::{Model, VocabShard};
use crate::{EngineError, Result};

pub(crate) mod shard;
pub(crate) mod softmax;
pub(crate) mod top;

use shard::{PartStats, RowPart, RowWhole, pick};
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

impl Scored {
    /// Appends a token's scores.
    fn push(&mut self, row: RowScore) {
        self.logprobs.push(row.logprob);
        self.entropy.push(row.entropy);
        self.top1.push(row.top1);
        self.top_ids.extend(row.top.iter().map(|t| t.1));
        self.top_logprobs.extend(row.top.iter().map(|t| t.0));
        self.candidate_logprobs.extend(row.candidates);
    }
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
/// the requests; on a rank without the head they are empty. At most [`Model::head_chunk_rows`] rows of logits exist at a
/// time.
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
    let mut logits_rv = Vec::new();
    for group in order.chunks(options.mini_batch) {
        // The last token predicts nothing that is scored.
        let sequences: Vec<&[u32]> = group.iter().map(|&i| &requests[i].ids[..requests[i].ids.len() - 1]).collect();
        let batch = TokenBatch::new(&sequences)?;
        let mut positions = Vec::new();
        for (b, &i) in group.iter().enumerate() {
            positions.extend((requests[i].first..requests[i].ids.len()).map(|target| Position { b, t: target - 1 }));
        }
        let hidden_rh = model.hidden_rh(&batch, &positions)?;
        if options.head {
            model.prepare_head()?;
        }
        if !model.has_head() {
            continue;
        }
        let width = row_width(&hidden_rh, positions.len())?;
        // The rows of all sequences go through the head together, so that short ones do not make it read its weights for a
        // few rows each.
        let wanted: Vec<RowWanted<'_>> = match options.head {
            true => group.iter().flat_map(|&i| RowWanted::of(&requests[i])).collect(),
            false => Vec::new(),
        };
        let mut found = head_rows(model, &hidden_rh, &wanted, options, &mut logits_rv)?.into_iter();
        let mut own_rh = hidden_rh.chunks_exact(width);
        for &i in group {
            let rows = requests[i].scored();
            found.by_ref().take(rows).for_each(|row| scored[i].push(row));
            let own_rh = own_rh.by_ref().take(rows);
            if options.keep_hidden {
                scored[i].hidden_rh = Some(own_rh.flatten().copied().collect());
            } else {
                own_rh.for_each(drop);
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

/// Which log-probs are wanted of a row.
#[derive(Clone, Copy)]
struct RowWanted<'a> {
    target: u32,
    candidates: &'a [u32],
}

impl<'a> RowWanted<'a> {
    /// Of each scored token of a checked request.
    fn of(request: &ScoreRequest<'a>) -> impl Iterator<Item = Self> + use<'a> {
        let all = request.candidates.unwrap_or(&[]);
        let k = all.len() / request.scored();
        let targets = request.ids[request.first..].iter().enumerate();
        targets.map(move |(row, &target)| Self { target, candidates: &all[row * k..(row + 1) * k] })
    }
}

/// The head over hidden states `[wanted, hidden]`, chunk by chunk: log-probs of the targets and candidates and the top k.
/// Each row is computed on its own, so neither the chunk size nor the order of rows changes a result. Where the vocabulary
/// is cut over ranks, all of them give the same rows and get the same scores. `logits_rv` is memory for a chunk.
fn head_rows(
    model: &mut dyn Model,
    hidden_rh: &[f32],
    wanted: &[RowWanted<'_>],
    options: &ScoreOptions,
    logits_rv: &mut Vec<f32>,
) -> Result<Vec<RowScore>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let width = row_width(hidden_rh, wanted.len())?;
    let shard = model.vocab_shard();
    shard::check(&shard)?;
    let chunk_rows = model.head_chunk_rows().max(1);
    let mut scores = Vec::with_capacity(wanted.len());
    for (wanted, hidden_rh) in wanted.chunks(chunk_rows).zip(hidden_rh.chunks(chunk_rows * width)) {
        model.head_logits_rv(hidden_rh, logits_rv)?;
        if logits_rv.len() != wanted.len() * shard.len {
            return Err(EngineError::invalid(
                format!("the head gave {} logits for {} rows of {}", logits_rv.len(), wanted.len(), shard.len),
                "",
            ));
        }
        let rows = wanted.par_iter().zip(logits_rv.par_chunks_mut(shard.len));
        if shard.is_whole() {
            scores.par_extend(rows.map(|(wanted, z_v)| row_score(z_v, wanted, options)));
        } else {
            let parts: Vec<RowPart> = rows.map(|(wanted, z_v)| row_part(&shard, z_v, wanted, options)).collect();
            let whole = shard::join(&shard, &parts, options.top_k)?;
            scores.extend(whole.into_iter().map(|row| score_of(row, options.top_k.min(shard.vocab))));
        }
    }
    Ok(scores)
}

fn row_score(z_v: &mut [f32], wanted: &RowWanted<'_>, options: &ScoreOptions) -> RowScore {
    apply_temperature(z_v, options.temperature);
    let logit = |&id: &u32| if id == ABSENT { f32::NEG_INFINITY } else { z_v[id as usize] };
    let picked = std::iter::once(&wanted.target).chain(wanted.candidates).map(logit).collect();
    let top = top::top_k(z_v, options.top_k);
    let k = top.len();
    score_of(RowWhole { own: RowStats::of(z_v), other: None, picked, top }, k)
}

/// What a rank knows of a row of which it has a part of the vocabulary.
fn row_part(shard: &VocabShard, z_v: &mut [f32], wanted: &RowWanted<'_>, options: &ScoreOptions) -> RowPart {
    apply_temperature(z_v, options.temperature);
    RowPart {
        own: PartStats::of(z_v, shard.first),
        other: None,
        picked: std::iter::once(&wanted.target).chain(wanted.candidates).map(|&id| pick(shard, z_v, id)).collect(),
        top: top::top_k_from(z_v, options.top_k, shard.first),
    }
}

/// The scores of a row: the first of `picked` is the target's logit, the others the candidates'.
fn score_of(row: RowWhole, k: usize) -> RowScore {
    let RowWhole { own, mut picked, mut top, .. } = row;
    let Some(stats) = own else {
        // NaN may stand anywhere in the order; the ids only fill their places.
        top.resize(k, (f32::NAN, 0));
        top.iter_mut().for_each(|t| t.0 = f32::NAN);
        picked.fill(f32::NAN);
        return RowScore { logprob: f32::NAN, entropy: f32::NAN, top1: 0, top, candidates: picked.split_off(1) };
    };
    top.iter_mut().for_each(|t| t.0 = stats.log_prob(t.0) as f32);
    picked.iter_mut().for_each(|z| *z = stats.log_prob(*z) as f32);
    let logprob = picked[0];
    let (entropy, top1) = (stats.entropy as f32, stats.argmax);
    RowScore { logprob, entropy, top1, top, candidates: picked.split_off(1) }
}

#[cfg(test)]
mod tests;
