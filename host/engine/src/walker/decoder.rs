//! Incremental decoding. Prompts and single steps are the same walk: a list of tokens, each with its slot and place.
//! A token's result depends on its own slot's cache only, never on what else is computed beside it.

use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use cosmos_kernels::threads;

use super::Transformer;
use super::tile::check_ids;
use crate::block::{BlockEngine, DecodeRow};
use crate::model::{Decoder, Model, Prefill};
use crate::{EngineError, Result};

/// Fewer rows than this are not worth a lane of their own.
const LANE_ROWS_MIN: usize = 8;
/// Buffers of logits kept for the next steps: those of a step, and those of one that names its slots in disorder.
const SPARE_MAX: usize = 2;
/// Most slots of one decoder.
const SLOTS_MAX: usize = 1 << 16;

/// A token to append to a slot.
#[derive(Clone, Copy)]
struct Token {
    row: DecodeRow,
    id: u32,
    /// Where its logits go, if anyone wants them.
    target: Option<usize>,
}

/// A decoder over a [`Transformer`].
pub(super) struct TransformerDecoder<'a, E: BlockEngine> {
    model: &'a mut Transformer<E>,
    /// Caches, `[layer][slot]`.
    kv: Vec<Vec<E::Kv>>,
    /// Tokens in each slot; 0 means free.
    lens: Vec<usize>,
    capacity: usize,
    /// Memory of earlier logits.
    spare: Vec<Vec<f32>>,
}

impl<'a, E: BlockEngine> TransformerDecoder<'a, E> {
    pub fn new(model: &'a mut Transformer<E>, slots: usize, capacity: usize) -> Result<Self> {
        let context = model.config().max_position_embeddings;
        if slots == 0 || slots > SLOTS_MAX || capacity == 0 {
            return Err(EngineError::invalid(
                format!("a decoder of {slots} slots of {capacity} tokens"),
                format!("ask for 1 to {SLOTS_MAX} slots"),
            ));
        }
        if capacity > context {
            return Err(EngineError::invalid(
                format!("prompt and completion of {capacity} tokens do not fit the model's context of {context}"),
                "lower `max_response_length` or the prompt's length",
            ));
        }
        let kv = (0..model.layers()).map(|_| (0..slots).map(|_| model.decoding().0.kv(capacity)).collect()).collect();
        Ok(Self { model, kv, lens: vec![0; slots], capacity, spare: Vec::new() })
    }

    /// Memory to overwrite.
    fn spare(&mut self) -> Vec<f32> {
        self.spare.pop().unwrap_or_default()
    }

    fn check_slot(&self, slot: usize) -> Result<()> {
        if slot < self.lens.len() {
            return Ok(());
        }
        Err(EngineError::invalid(format!("slot {slot} of {}", self.lens.len()), ""))
    }

    /// Appends `tokens`, sorted by slot and place, and returns the logits of those that have a target, in the order of the
    /// targets.
    fn append(&mut self, tokens: &[Token], targets: usize) -> Result<Vec<f32>> {
        let logits_rv = self.walk(tokens, targets, 1, &|_, _| None)?;
        // A step names its slots in order, mostly.
        if tokens.iter().filter_map(|t| t.target).eq(0..targets) {
            return Ok(logits_rv);
        }
        let vocab = self.model.config().vocab_size;
        let mut ordered_rv = self.spare();
        ordered_rv.resize(targets * vocab, 0.0);
        for (target, row) in tokens.iter().filter_map(|t| t.target).zip(logits_rv.chunks_exact(vocab)) {
            ordered_rv[target * vocab..(target + 1) * vocab].copy_from_slice(row);
        }
        self.recycle(logits_rv);
        Ok(ordered_rv)
    }

    /// Appends `tokens`, sorted by slot and place, shows the logits of each that has a target to `next`, and goes on with the
    /// tokens that it chooses for `steps` steps in all. Returns the logits of the last step, and if that was the only one, in
    /// the order of the tokens.
    fn walk(&mut self, tokens: &[Token], targets: usize, steps: usize, next: &Next<'_>) -> Result<Vec<f32>> {
        let vocab = self.model.config().vocab_size;
        // Every number is overwritten, so the old ones may stay.
        let mut logits_rv = self.spare();
        logits_rv.resize(targets * vocab, 0.0);
        let lanes = cut_lanes(tokens, self.model.decoding().0.lanes());
        let mut rest_kv: Vec<&mut [E::Kv]> = self.kv.iter_mut().map(Vec::as_mut_slice).collect();
        let (mut rest_rv, mut rest_lens) = (logits_rv.as_mut_slice(), self.lens.as_mut_slice());
        let mut first_slot = 0;
        let mut work = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let tokens = &tokens[lane];
            let slots_end = tokens.last().map_or(first_slot, |t| t.row.slot + 1);
            let slots = slots_end - first_slot;
            let wanted = tokens.iter().filter(|t| t.target.is_some()).count();
            let of_lane = |token: &Token| {
                let row = DecodeRow { slot: token.row.slot - first_slot, ..token.row };
                Token { row, ..*token }
            };
            work.push(Mutex::new(Lane {
                tokens: tokens.iter().map(of_lane).collect(),
                caches: rest_kv.iter_mut().map(|kv| kv.split_off_mut(..slots).unwrap_or_default()).collect(),
                lens: rest_lens.split_off_mut(..slots).unwrap_or_default(),
                capacity: self.capacity,
                logits_rv: rest_rv.split_off_mut(..wanted * vocab).unwrap_or_default(),
            }));
            first_slot = slots_end;
        }
        let model = &*self.model;
        let found = model.decoding().0.run_lanes(work.len(), &|lane| {
            let mut lane = work[lane].lock().map_err(|_| EngineError::invalid("a decoding thread panicked", ""))?;
            lane.run(model, steps, next)
        });
        drop(work);
        found.into_iter().collect::<Result<()>>()?;
        Ok(logits_rv)
    }
}

/// Cuts `tokens` into ranges of about equal size, none of which shares a slot with another: one for each lane, which then
/// go their ways without waiting for each other, or a single one whose kernels spread over the threads.
fn cut_lanes(tokens: &[Token], lanes: usize) -> Vec<Range<usize>> {
    let count = if tokens.len() < lanes * LANE_ROWS_MIN { 1 } else { lanes.max(1) };
    let mut cuts = Vec::with_capacity(count);
    let mut start = 0;
    for lane in 1..=count {
        let mut end = (tokens.len() * lane / count).max(start);
        while end > start && end < tokens.len() && tokens[end].row.slot == tokens[end - 1].row.slot {
            end += 1;
        }
        if end > start {
            cuts.push(start..end);
        }
        start = end;
    }
    cuts
}

/// Chooses the token that follows a target, from its logits; none ends its sequence.
type Next<'a> = dyn Fn(usize, &[f32]) -> Option<u32> + Sync + 'a;

/// The slots of some tokens, numbered from 0, and everything that their decoding writes to: no two lanes share any of it.
struct Lane<'a, E: BlockEngine> {
    tokens: Vec<Token>,
    /// `[layer][slot]`.
    caches: Vec<&'a mut [E::Kv]>,
    /// Of the slots.
    lens: &'a mut [usize],
    capacity: usize,
    /// Of the tokens with a target, in the tokens' order.
    logits_rv: &'a mut [f32],
}

impl<E: BlockEngine> Lane<'_, E> {
    /// Computes the lane's tokens, then those that `next` chooses, for `steps` steps in all.
    fn run(&mut self, model: &Transformer<E>, steps: usize, next: &Next<'_>) -> Result<()> {
        for step in 1..=steps {
            self.step(model)?;
            let vocab = model.config().vocab_size;
            let shown: Vec<&Token> = self.tokens.iter().filter(|t| t.target.is_some()).collect();
            let chosen: Vec<OnceLock<u32>> = shown.iter().map(|_| OnceLock::new()).collect();
            threads::each(shown.len(), true, |row| {
                let logits_v = &self.logits_rv[row * vocab..(row + 1) * vocab];
                let found = shown[row].target.and_then(|target| next(target, logits_v));
                // Each row comes once.
                found.into_iter().for_each(|id| _ = chosen[row].set(id));
            });
            let follow = |(token, id): (&&Token, &OnceLock<u32>)| {
                let row = DecodeRow { position: token.row.position + 1, ..token.row };
                Some(Token { row, id: *id.get()?, target: token.target })
            };
            let following: Vec<Token> = shown.iter().zip(&chosen).filter_map(follow).collect();
            if step == steps || following.is_empty() {
                break;
            }
            self.tokens = following;
        }
        Ok(())
    }

    /// Walks the blocks for the tokens.
    fn step(&mut self, model: &Transformer<E>) -> Result<()> {
        let (engine, device) = model.decoding();
        if let Some(full) = self.tokens.iter().find(|t| t.row.position >= self.capacity) {
            return Err(EngineError::invalid(format!("a slot is full with {} tokens", full.row.position), ""));
        }
        let rows: Vec<DecodeRow> = self.tokens.iter().map(|t| t.row).collect();
        let mut ids: Vec<u32> = self.tokens.iter().map(|t| t.id).collect();
        check_ids(&ids, engine.config())?;
        ids.resize(engine.decode_rows(ids.len()), 0);
        let x = engine.embed(&device.embed, &model.groups[0], &ids)?;
        let tokens = (0..).zip(&self.tokens);
        let wanted: Vec<u32> = tokens.filter(|(_, t)| t.target.is_some()).map(|(row, _)| row).collect();
        let (x, mut places) = engine.blocks_decode(&device.blocks, &mut self.caches, &rows, &wanted, x)?;
        for row in &rows {
            self.lens[row.slot] = row.position + 1;
        }
        let vocab = engine.config().vocab_size;
        let count = places.len();
        if count == 0 {
            return Ok(());
        }
        places.resize(engine.decode_rows(count), places[0]);
        let hidden_rh = engine.final_norm(&device.norm, x, &places)?;
        engine.decode_head(device.head(), &hidden_rh, &mut self.logits_rv[..count * vocab])
    }
}

impl<E: BlockEngine> Drop for TransformerDecoder<'_, E> {
    fn drop(&mut self) {
        self.kv.clear();
        self.model.decoding().0.kv_end();
    }
}

impl<E: BlockEngine> Decoder for TransformerDecoder<'_, E> {
    fn slots(&self) -> usize {
        self.lens.len()
    }

    fn prefill(&mut self, entries: &[Prefill<'_>]) -> Result<Vec<f32>> {
        let config = self.model.config();
        let mut taken = vec![false; self.lens.len()];
        for entry in entries {
            check_ids(entry.prompt, config)?;
            if entry.prompt.is_empty() || entry.slots.is_empty() {
                return Err(EngineError::invalid("a prompt without tokens or without a slot", ""));
            }
            if entry.prompt.len() > self.capacity {
                let message = format!(
                    "a prompt of {} tokens does not fit the {} tokens of a slot",
                    entry.prompt.len(),
                    self.capacity
                );
                return Err(EngineError::invalid(message, "shorten the prompt or raise the context"));
            }
            for slot in &entry.slots {
                self.check_slot(*slot)?;
                if self.lens[*slot] > 0 || std::mem::replace(&mut taken[*slot], true) {
                    return Err(EngineError::invalid(format!("slot {slot} is not free"), "release it first"));
                }
            }
        }
        let mut tokens = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            let last = entry.prompt.len() - 1;
            for (position, id) in entry.prompt.iter().enumerate() {
                let target = (position == last).then_some(index);
                tokens.push(Token { row: DecodeRow { slot: entry.slots[0], position }, id: *id, target });
            }
        }
        tokens.sort_by_key(|t| (t.row.slot, t.row.position));
        let engine = self.model.decoding().0;
        let chunk = engine.tile_tokens() * engine.lanes();
        let vocab = self.model.config().vocab_size;
        let mut logits = vec![0.0; entries.len() * vocab];
        for part in tokens.chunks_mut(chunk) {
            let targets: Vec<usize> = part.iter().filter_map(|t| t.target).collect();
            for (local, token) in part.iter_mut().filter(|t| t.target.is_some()).enumerate() {
                token.target = Some(local);
            }
            let found = self.append(part, targets.len())?;
            for (target, row) in targets.iter().zip(found.chunks_exact(vocab)) {
                logits[target * vocab..(target + 1) * vocab].copy_from_slice(row);
            }
            self.recycle(found);
        }
        for entry in entries {
            for slot in &entry.slots[1..] {
                self.copy_slot(entry.slots[0], *slot)?;
            }
        }
        Ok(logits)
    }

    fn step(&mut self, entries: &[(usize, u32)]) -> Result<Vec<f32>> {
        let tokens = self.next_tokens(entries)?;
        if tokens.is_empty() { Ok(Vec::new()) } else { self.append(&tokens, entries.len()) }
    }

    fn run_each(&mut self, entries: &[(usize, u32)], steps: usize, next: &Next<'_>) -> Result<()> {
        let tokens = self.next_tokens(entries)?;
        if !tokens.is_empty() && steps > 0 {
            let logits_rv = self.walk(&tokens, entries.len(), steps, next)?;
            self.recycle(logits_rv);
        }
        Ok(())
    }

    fn recycle(&mut self, logits: Vec<f32>) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(logits);
        }
    }

    fn tokens_max(&self) -> usize {
        self.model.decoding().0.kv_tokens_max()
    }

    fn release(&mut self, slot: usize) {
        let Some(len) = self.lens.get_mut(slot) else { return };
        *len = 0;
        for kv in &mut self.kv {
            self.model.decoding().0.kv_clear(&mut kv[slot]);
        }
    }
}

impl<E: BlockEngine> TransformerDecoder<'_, E> {
    /// The tokens of a step, by slot.
    fn next_tokens(&self, entries: &[(usize, u32)]) -> Result<Vec<Token>> {
        let mut tokens = Vec::with_capacity(entries.len());
        for (target, (slot, id)) in entries.iter().enumerate() {
            self.check_slot(*slot)?;
            let position = self.lens[*slot];
            if position == 0 {
                return Err(EngineError::invalid(format!("slot {slot} holds no prompt"), ""));
            }
            if position >= self.capacity {
                return Err(EngineError::invalid(format!("slot {slot} is full with {position} tokens"), ""));
            }
            check_ids(&[*id], self.model.config())?;
            tokens.push(Token { row: DecodeRow { slot: *slot, position }, id: *id, target: Some(target) });
        }
        tokens.sort_by_key(|t| t.row.slot);
        if let Some(pair) = tokens.windows(2).find(|pair| pair[0].row.slot == pair[1].row.slot) {
            return Err(EngineError::invalid(format!("slot {} is named twice in one step", pair[0].row.slot), ""));
        }
        Ok(tokens)
    }

    /// Makes slot `to` hold what slot `from` holds.
    fn copy_slot(&mut self, from: usize, to: usize) -> Result<()> {
        for kv in &mut self.kv {
            let [from, to] = kv
                .get_disjoint_mut([from, to])
                .map_err(|_| EngineError::invalid("a slot cannot be copied onto itself", ""))?;
            self.model.decoding().0.kv_copy(from, to);
        }
        self.lens[to] = self.lens[from];
        Ok(())
    }
}
