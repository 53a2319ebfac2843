//! Continuous batching: slots of a decoder are filled again as their sequences end.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;

use super::sampler::{Draw, Sampler, SamplingParams};
use crate::model::{Decoder, Model, ModelConfig, Prefill};
use crate::score::softmax::{RowStats, apply_temperature, divides};
use crate::score::top::top_k;
use crate::{EngineError, Result};

/// Most prompt tokens computed in one go; bounds the memory of a prefill. A single longer prompt still goes alone.
const PREFILL_TOKENS_MAX: usize = 8192;
/// What a sequence's memory may hold beyond its tokens: caches grow in pages, and a shared page is copied by its writers.
const SLACK_TOKENS: usize = 64;

/// Steps that slots go on by themselves when no completion waits for one of them, and when one does: what ends before, idles.
const STEPS_ALONE: usize = 32;
const STEPS_AWAITED: usize = 4;

/// A prompt to complete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GenerateRequest {
    /// Names the random stream: (seed, id, completion, position) decide each draw.
    pub id: u64,
    /// Prompt ids, at least one.
    pub prompt: Vec<u32>,
    /// Number of completions.
    pub n: usize,
    /// Most tokens of each completion, the stop id included.
    pub max_new_tokens: usize,
    /// Number of the first completion in the random stream: a conversation's next turn goes on with its own stream.
    pub first_index: usize,
    /// Position of the first new token in the random stream; 0 unless `prompt` ends with an earlier part of the
    /// completion.
    pub first_position: usize,
}

/// How to run.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Sequences decoded at once, at least 1.
    pub slots: usize,
    /// Ids that end a completion.
    pub stop_ids: Vec<u32>,
    /// Most tokens of prompt and completion together.
    pub context_limit: usize,
    /// Most likely ids with log-probs recorded per step, 0 for none.
    pub candidates: usize,
    /// Record the log-prob of each token.
    pub logprobs: bool,
    /// Temperature of the recorded log-probs (not of the choice).
    pub logprob_temperature: f32,
    /// Most bytes of keys and values of running sequences; the others wait. None: what the engine has.
    pub kv_bytes_max: Option<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            slots: 32,
            stop_ids: Vec::new(),
            context_limit: 4096,
            candidates: 0,
            logprobs: false,
            logprob_temperature: 1.0,
            kv_bytes_max: None,
        }
    }
}

impl GenerateOptions {
    /// Tokens that a completion of `request` may come to hold.
    fn tokens_of(&self, request: &GenerateRequest) -> usize {
        let whole = request.prompt.len().saturating_add(request.max_new_tokens);
        whole.min(self.context_limit).saturating_add(SLACK_TOKENS)
    }
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// At a stop id.
    Stop,
    /// At `max_new_tokens`.
    Length,
    /// At the context limit.
    Context,
}

/// A finished completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The request.
    pub id: u64,
    /// Which of its completions, counted from the request's `first_index`.
    pub index: usize,
    /// The tokens, the stop id included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Log-prob of each token under the model at `logprob_temperature`, without penalty or limits; empty unless asked for.
    pub logprobs: Vec<f32>,
    /// The most likely ids at each step, `[tokens, candidates]`, best first.
    pub candidate_ids: Vec<u32>,
    /// Their log-probs.
    pub candidate_logprobs: Vec<f32>,
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerateStats {
    /// Prompt tokens computed; a prompt shared by several slots counts once.
    pub prompt_tokens: usize,
    /// Tokens of all completions, unfinished ones included.
    pub completion_tokens: usize,
    /// Calls of [`Decoder::step`].
    pub steps: usize,
    /// Sequences in those steps, summed.
    pub row_steps: usize,
    /// Calls of [`Decoder::prefill`].
    pub prefills: usize,
    /// Wall time in seconds.
    pub seconds: f64,
}

/// A sequence in a slot.
struct Active<'a> {
    request: &'a GenerateRequest,
    out: Generated,
    /// Distinct tokens so far, when the sampler wants them, and which they are.
    seen: Vec<u32>,
    is_seen: Vec<bool>,
    state: State,
}

/// How far a sequence is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Ended(FinishReason),
    /// Its logits were not finite.
    Broken,
}

/// What one row of logits led to.
struct Choice {
    token: u32,
    logprob: f32,
    candidates: Vec<(f32, u32)>,
}

/// Completes every request and hands each completion to `done` as it ends; `Break` stops the run. Completions depend on
/// the parameters' seed, the request's id and prompt, and the model alone: not on slots, order or company.
///
/// # Errors
/// A request that cannot be served, by its id, before anything is computed; logits that are not finite; what the model
/// reports.
pub fn generate(
    model: &mut dyn Model,
    requests: &[GenerateRequest],
    params: &SamplingParams,
    options: &GenerateOptions,
    done: &mut dyn FnMut(Generated) -> ControlFlow<()>,
) -> Result<GenerateStats> {
    generate_with(model, requests, params, options, false, &mut |_, _| {}, done)
}

/// As [`generate`], and `token` sees every token (request id, token) as soon as it is chosen.
///
/// # Errors
/// As [`generate`].
pub fn generate_streaming(
    model: &mut dyn Model,
    requests: &[GenerateRequest],
    params: &SamplingParams,
    options: &GenerateOptions,
    token: &mut dyn FnMut(u64, u32),
    done: &mut dyn FnMut(Generated) -> ControlFlow<()>,
) -> Result<GenerateStats> {
    generate_with(model, requests, params, options, true, token, done)
}

fn generate_with(
    model: &mut dyn Model,
    requests: &[GenerateRequest],
    params: &SamplingParams,
    options: &GenerateOptions,
    watched: bool,
    token: &mut dyn FnMut(u64, u32),
    done: &mut dyn FnMut(Generated) -> ControlFlow<()>,
) -> Result<GenerateStats> {
    let started = Instant::now();
    let sampler = Sampler::new(params)?;
    let vocab = model.config().vocab_size;
    check(requests, options, vocab)?;
    let completions: usize = requests.iter().map(|r| r.n).sum();
    if completions == 0 {
        return Ok(GenerateStats::default());
    }
    let slots = options.slots.min(completions);
    let capacity = requests
        .iter()
        .map(|r| options.context_limit.min(r.prompt.len().saturating_add(r.max_new_tokens)))
        .max()
        .unwrap_or(1);
    let tokens_max = kv_tokens_max(model.config(), requests, options)?;
    let decoder = model.decoder(slots, capacity)?;
    let tokens_max = tokens_max.min(decoder.tokens_max());
    let mut run = Run {
        decoder,
        tokens_max,
        sampler: &sampler,
        options,
        vocab,
        active: (0..slots).map(|_| None).collect(),
        waiting: requests.iter().flat_map(|r| (r.n > 0).then_some((r, 0))).collect(),
        stats: GenerateStats::default(),
        token,
        watched,
    };
    run.all(done)?;
    Ok(GenerateStats { seconds: started.elapsed().as_secs_f64(), ..run.stats })
}

/// Tokens whose keys and values fit into the bytes that they may take.
fn kv_tokens_max(config: &ModelConfig, requests: &[GenerateRequest], options: &GenerateOptions) -> Result<usize> {
    let Some(bytes) = options.kv_bytes_max else { return Ok(usize::MAX) };
    let room = bytes / config.kv_token_bytes();
    match requests.iter().find(|request| request.n > 0 && options.tokens_of(request) > room) {
        None => Ok(room),
        Some(request) => Err(EngineError::invalid(
            format!(
                "request {}: prompt and completion may come to {} tokens, but the {bytes} bytes that keys and values may take \
                 have room for {room}",
                request.id,
                options.tokens_of(request)
            ),
            format!(
                "set `host.kv_mib_max` to at least {}, or lower `rollout.max_response_length`",
                (options.tokens_of(request) * config.kv_token_bytes()).div_ceil(1 << 20)
            ),
        )),
    }
}

fn check(requests: &[GenerateRequest], options: &GenerateOptions, vocab: usize) -> Result<()> {
    if options.slots == 0 {
        return Err(EngineError::invalid("generation with 0 slots", "use at least 1"));
    }
    for request in requests {
        let wrong =
            |what: String, hint: &str| Err(EngineError::invalid(format!("request {}: {what}", request.id), hint));
        if request.prompt.is_empty() {
            return wrong("the prompt is empty".into(), "a prompt needs at least one token");
        }
        if request.prompt.len() >= options.context_limit {
            return wrong(
                format!(
                    "the prompt of {} tokens leaves no room in a context of {}",
                    request.prompt.len(),
                    options.context_limit
                ),
                "shorten the prompt or raise the context limit",
            );
        }
        if request.max_new_tokens == 0 {
            return wrong("no new tokens are allowed".into(), "set the response length to at least 1");
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= vocab) {
            return wrong(
                format!("prompt token {id} is outside the vocabulary of {vocab}"),
                "use the tokenizer that belongs to the model",
            );
        }
    }
    Ok(())
}

struct Run<'a, 'm> {
    decoder: Box<dyn Decoder + 'm>,
    /// Tokens that running sequences may hold together.
    tokens_max: usize,
    sampler: &'a Sampler,
    options: &'a GenerateOptions,
    vocab: usize,
    active: Vec<Option<Active<'a>>>,
    /// Requests and the next completion of each.
    waiting: VecDeque<(&'a GenerateRequest, usize)>,
    stats: GenerateStats,
    /// Sees every token.
    token: &'a mut dyn FnMut(u64, u32),
    /// Whether it must see them at once.
    watched: bool,
}

impl<'a> Run<'a, '_> {
    fn all(&mut self, done: &mut dyn FnMut(Generated) -> ControlFlow<()>) -> Result<()> {
        loop {
            if self.fill(done)?.is_break() {
                return Ok(());
            }
            let steps = self.steps();
            let mut slots = Vec::new();
            let (mut entries, mut rows) = (Vec::new(), Vec::new());
            for (slot, active) in self.active.iter_mut().enumerate() {
                let Some(active) = active else { continue };
                let Some(last) = active.out.tokens.last() else { continue };
                slots.push((slot, active.out.tokens.len()));
                entries.push((slot, *last));
                rows.push(Mutex::new(active));
            }
            if entries.is_empty() {
                return Ok(());
            }
            let (sampler, options) = (self.sampler, self.options);
            self.decoder.run_each(&entries, steps, &|index, logits_v| {
                // Nobody else wants this row.
                rows[index].lock().unwrap_or_else(PoisonError::into_inner).go_on(logits_v, sampler, options)
            })?;
            drop(rows);
            let made = |(slot, before): &(usize, usize)| {
                self.active[*slot].as_ref().map_or(0, |active| active.out.tokens.len() - before)
            };
            let made: Vec<usize> = slots.iter().map(made).collect();
            self.stats.steps += made.iter().copied().max().unwrap_or(0);
            self.stats.row_steps += made.iter().sum::<usize>();
            if self.settle(&slots, done)?.is_break() {
                return Ok(());
            }
        }
    }

    /// Steps to the next look at what has ended: one where somebody watches every token.
    fn steps(&self) -> usize {
        if self.watched {
            return 1;
        }
        if self.waiting.is_empty() {
            return STEPS_ALONE;
        }
        // Until the first of them must end, whose slot is wanted; a stop id may end it sooner.
        let left = |active: &Active<'_>| active.request.max_new_tokens.saturating_sub(active.out.tokens.len());
        self.active.iter().flatten().map(left).min().unwrap_or(1).clamp(1, STEPS_AWAITED)
    }

    /// Prefills waiting requests into free slots until none waits or none is worth filling.
    fn fill(&mut self, done: &mut dyn FnMut(Generated) -> ControlFlow<()>) -> Result<ControlFlow<()>> {
        loop {
            let entries = self.admit();
            if entries.is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            let logits_rv = self.decoder.prefill(&entries)?;
            self.stats.prefills += 1;
            self.stats.prompt_tokens += entries.iter().map(|e| e.prompt.len()).sum::<usize>();
            let vocab = self.vocab;
            if logits_rv.len() != entries.len() * vocab {
                let (found, wanted) = (logits_rv.len(), entries.len() * vocab);
                return Err(EngineError::invalid(
                    format!("the decoder gave {found} logits where {wanted} were expected"),
                    "",
                ));
            }
            let mut rows: Vec<Option<&[f32]>> = vec![None; self.active.len()];
            for (entry, logits_v) in entries.iter().zip(logits_rv.chunks_exact(vocab)) {
                entry.slots.iter().for_each(|slot| rows[*slot] = Some(logits_v));
            }
            let (sampler, options) = (self.sampler, self.options);
            self.active.par_iter_mut().zip(&rows).for_each(|(active, logits_v)| {
                if let (Some(active), Some(logits_v)) = (active, logits_v) {
                    active.go_on(logits_v, sampler, options);
                }
            });
            let slots: Vec<(usize, usize)> =
                entries.iter().flat_map(|e| e.slots.iter().map(|slot| (*slot, 0))).collect();
            if self.settle(&slots, done)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    /// Takes waiting completions into free slots. Completions of one prompt share its prefill; for their sake a few
    /// slots (an eighth at most) may stay free for a while, unless nothing runs.
    fn admit(&mut self) -> Vec<Prefill<'a>> {
        let mut free: VecDeque<usize> = (0..self.active.len()).filter(|&slot| self.active[slot].is_none()).collect();
        let enough = (self.active.len() / 8).max(1);
        let mut entries: Vec<Prefill<'a>> = Vec::new();
        let mut tokens = 0;
        while let Some(&(request, next)) = self.waiting.front() {
            let left = request.n - next;
            let idle = free.len() == self.active.len();
            if free.is_empty() || (free.len() < left.min(enough) && !idle) {
                break;
            }
            tokens += request.prompt.len();
            if tokens > PREFILL_TOKENS_MAX && !entries.is_empty() {
                break;
            }
            let each = self.options.tokens_of(request);
            let fitting = self.tokens_max.saturating_sub(self.tokens_reserved()) / each;
            // One alone is tried even so: the decoder says what does not fit.
            let fitting = if idle && entries.is_empty() { fitting.max(1) } else { fitting };
            let count = left.min(free.len()).min(fitting);
            if count == 0 {
                break;
            }
            let slots: Vec<usize> = free.drain(..count).collect();
            for (offset, &slot) in slots.iter().enumerate() {
                self.active[slot] = Some(self.start(request, next + offset));
            }
            entries.push(Prefill { slots, prompt: &request.prompt });
            self.waiting.pop_front();
            if count < left {
                self.waiting.push_front((request, next + count));
            }
        }
        entries
    }

    /// Tokens that everything running may come to hold.
    fn tokens_reserved(&self) -> usize {
        self.active.iter().flatten().map(|active| self.options.tokens_of(active.request)).sum()
    }

    fn start(&self, request: &'a GenerateRequest, index: usize) -> Active<'a> {
        let out = Generated {
            id: request.id,
            index: request.first_index + index,
            tokens: Vec::new(),
            finish: FinishReason::Length,
            logprobs: Vec::new(),
            candidate_ids: Vec::new(),
            candidate_logprobs: Vec::new(),
        };
        let mut active = Active { request, out, seen: Vec::new(), is_seen: Vec::new(), state: State::Running };
        if self.sampler.penalizes() {
            active.is_seen = vec![false; self.vocab];
            request.prompt.iter().for_each(|&id| active.saw(id));
        }
        active
    }

    /// Looks at slots that have gone on, each with the tokens that it had before, and takes out finished sequences in the
    /// order in which they ended.
    fn settle(
        &mut self,
        slots: &[(usize, usize)],
        done: &mut dyn FnMut(Generated) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let mut ended = Vec::new();
        for &(slot, before) in slots {
            let Some(active) = self.active[slot].as_ref() else { continue };
            let (id, made) = (active.request.id, &active.out.tokens[before..]);
            self.stats.completion_tokens += made.len();
            made.iter().for_each(|made| (self.token)(id, *made));
            match active.state {
                State::Running => {}
                State::Ended(finish) => ended.push((made.len(), slot, finish)),
                State::Broken => {
                    let at = active.out.tokens.len();
                    return Err(EngineError::invalid(
                        format!("request {id}: the logits of completion token {at} are not finite"),
                        "the model's weights hold NaN or infinite values, or overflow",
                    ));
                }
            }
        }
        ended.sort_by_key(|(made, ..)| *made);
        for (_, slot, finish) in ended {
            self.decoder.release(slot);
            if let Some(mut ended) = self.active[slot].take() {
                ended.out.finish = finish;
                if done(ended.out).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl Active<'_> {
    fn saw(&mut self, id: u32) {
        if let Some(seen) = self.is_seen.get_mut(id as usize).filter(|seen| !**seen) {
            *seen = true;
            self.seen.push(id);
        }
    }

    /// Chooses the next token from its logits and appends it. None: it was the last, or none can be chosen.
    fn go_on(&mut self, logits_v: &[f32], sampler: &Sampler, options: &GenerateOptions) -> Option<u32> {
        let Some(choice) = choose(self, logits_v, sampler, options) else {
            self.state = State::Broken;
            return None;
        };
        let token = choice.token;
        match self.take(choice, options) {
            Some(finish) => {
                self.state = State::Ended(finish);
                None
            }
            None => Some(token),
        }
    }

    /// Appends a token; the reason when it was the last.
    fn take(&mut self, choice: Choice, options: &GenerateOptions) -> Option<FinishReason> {
        self.saw(choice.token);
        let out = &mut self.out;
        out.tokens.push(choice.token);
        if options.logprobs {
            out.logprobs.push(choice.logprob);
        }
        out.candidate_ids.extend(choice.candidates.iter().map(|c| c.1));
        out.candidate_logprobs.extend(choice.candidates.iter().map(|c| c.0));
        if options.stop_ids.contains(&choice.token) {
            Some(FinishReason::Stop)
        } else if out.tokens.len() >= self.request.max_new_tokens {
            Some(FinishReason::Length)
        } else if self.request.prompt.len() + out.tokens.len() >= options.context_limit {
            Some(FinishReason::Context)
        } else {
            None
        }
    }
}

/// The next token of a sequence from its row of logits; none when these are not finite.
fn choose(active: &Active<'_>, logits_v: &[f32], sampler: &Sampler, options: &GenerateOptions) -> Option<Choice> {
    let position = active.request.first_position + active.out.tokens.len();
    let draw = Draw { request: active.out.id, completion: active.out.index as u64, position: position as u64 };
    let mut plain = None;
    let token = if sampler.changes_logits() {
        let mut own_v = logits_v.to_vec();
        sampler.process(&mut own_v, &active.seen);
        sampler.choose(&own_v, &RowStats::of(&own_v)?, draw)
    } else {
        let stats = plain.insert(RowStats::of(logits_v)?);
        sampler.choose(logits_v, stats, draw)
    };
    let mut choice = Choice { token, logprob: 0.0, candidates: Vec::new() };
    if !options.logprobs && options.candidates == 0 {
        return Some(choice);
    }
    let mut own_v = Vec::new();
    let (recorded_v, stats) = if divides(options.logprob_temperature) {
        own_v.extend_from_slice(logits_v);
        apply_temperature(&mut own_v, options.logprob_temperature);
        (own_v.as_slice(), RowStats::of(&own_v)?)
    } else {
        (logits_v, plain.or_else(|| RowStats::of(logits_v))?)
    };
    choice.logprob = stats.log_prob(recorded_v[token as usize]) as f32;
    choice.candidates = top_k(recorded_v, options.candidates);
    choice.candidates.iter_mut().for_each(|c| c.0 = stats.log_prob(c.0) as f32);
    Some(choice)
}

#[cfg(test)]
mod tests;
