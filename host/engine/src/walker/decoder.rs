//! Incremental decoding. Prompts and single steps are the same walk: a list of tokens, each with its slot and place.
//! A token's result depends on its own slot's cache only, never on what else is computed beside it.

use std::ops::Range;
use std::sync::Mutex;

use super::Transformer;
use super::tile::check_ids;
use crate::block::{BlockEngine, DecodeRow};
use crate::model::{Decoder, Model, Prefill};
use crate::{EngineError, Result};

/// Fewer rows than this are not worth a lane of their own.
const LANE_ROWS_MIN: usize = 32;
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
        let kv = (0..model.layers()).map(|_| (0..slots).map(|_| model.engine.kv(capacity)).collect()).collect();
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

    /// Appends `tokens`, sorted by slot and place, and returns the logits of those that have a target.
    fn append(&mut self, tokens: &[Token], targets: usize) -> Result<Vec<f32>> {
        let vocab = self.model.config().vocab_size;
        let lanes = cut_lanes(tokens, self.model.engine.lanes());
        let mut rest: Vec<&mut [E::Kv]> = self.kv.iter_mut().map(Vec::as_mut_slice).collect();
        let mut slots_before = 0;
        let mut work = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let tokens = &tokens[lane];
            let slots_end = tokens.last().map_or(slots_before, |t| t.row.slot + 1);
            let mut caches = Vec::with_capacity(rest.len());
            for kv in &mut rest {
                let (head, tail) = std::mem::take(kv).split_at_mut(slots_end - slots_before);
                caches.push(head);
                *kv = tail;
            }
            let logits = self.spare.pop().unwrap_or_default();
            work.push(Mutex::new((tokens, slots_before, caches, logits)));
            slots_before = slots_end;
        }
        let model = &*self.model;
        let found = model.engine.run_lanes(work.len(), &|lane| {
            let mut work = work[lane].lock().map_err(|_| EngineError::invalid("a decoding thread panicked", ""))?;
            let (tokens, first_slot, caches, logits) = &mut *work;
            run(model, tokens, *first_slot, caches, std::mem::take(logits))
        });
        let mut parts = Vec::with_capacity(found.len());
        for part in found {
            parts.push(part?);
        }
        // A step names its slots in order, mostly: then the parts are the result.
        let in_order = tokens.iter().filter_map(|t| t.target).eq(0..targets);
        let logits = if in_order && parts.len() == 1 {
            parts.swap_remove(0)
        } else if in_order {
            let mut logits = self.spare();
            logits.clear();
            parts.iter().for_each(|part| logits.extend_from_slice(part));
            logits
        } else {
            let mut logits = vec![0.0; targets * vocab];
            let rows = parts.iter().flat_map(|part| part.chunks_exact(vocab));
            for (target, row) in tokens.iter().filter_map(|t| t.target).zip(rows) {
                logits[target * vocab..(target + 1) * vocab].copy_from_slice(row);
            }
            logits
        };
        parts.into_iter().for_each(|part| self.recycle(part));
        for token in tokens {
            self.lens[token.row.slot] = token.row.position + 1;
        }
        Ok(logits)
    }
}

/// Cuts `tokens` into ranges of about equal size, none of which shares a slot with another.
fn cut_lanes(tokens: &[Token], lanes: usize) -> Vec<Range<usize>> {
    let count = lanes.min(tokens.len() / LANE_ROWS_MIN).max(1);
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

/// Walks the blocks for one lane's tokens; `caches[layer]` starts at slot `first_slot`. Logits in the tokens' order.
fn run<E: BlockEngine>(
    model: &Transformer<E>,
    tokens: &[Token],
    first_slot: usize,
    caches: &mut [&mut [E::Kv]],
    mut logits: Vec<f32>,
) -> Result<Vec<f32>> {
    let engine = &model.engine;
    let rows: Vec<DecodeRow> = tokens.iter().map(|t| DecodeRow { slot: t.row.slot - first_slot, ..t.row }).collect();
    let mut ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
    ids.resize(engine.decode_rows(ids.len()), 0);
    let mut x = engine.embed(&model.device.embed, &model.groups[0], &ids)?;
    for (block, kv) in model.device.blocks.iter().zip(caches) {
        x = engine.block_decode(block, kv, &rows, x)?;
    }
    let mut wanted: Vec<u32> =
        tokens.iter().enumerate().filter(|(_, t)| t.target.is_some()).map(|(row, _)| row as u32).collect();
    let count = wanted.len();
    if count == 0 {
        logits.clear();
        return Ok(logits);
    }
    wanted.resize(engine.decode_rows(count), wanted[0]);
    let hidden_rh = engine.final_norm(&model.device.norm, x, &wanted)?;
    engine.head(model.device.head(), &hidden_rh, &mut logits)?;
    logits.truncate(count * engine.config().vocab_size);
    Ok(logits)
}

impl<E: BlockEngine> Drop for TransformerDecoder<'_, E> {
    fn drop(&mut self) {
        self.kv.clear();
        self.model.engine.kv_end();
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
        let chunk = self.model.engine.tile_tokens() * self.model.engine.lanes();
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
        }
        for entry in entries {
            for slot in &entry.slots[1..] {
                self.copy_slot(entry.slots[0], *slot)?;
            }
        }
        Ok(logits)
    }

    fn step(&mut self, entries: &[(usize, u32)]) -> Result<Vec<f32>> {
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
        if tokens.is_empty() { Ok(Vec::new()) } else { self.append(&tokens, entries.len()) }
    }

    fn recycle(&mut self, logits: Vec<f32>) {
        // One for each lane and one for all of them together.
        let most = self.model.engine.lanes() + 1;
        if self.spare.len() < most {
            self.spare.push(logits);
        }
    }

    fn tokens_max(&self) -> usize {
        self.model.engine.kv_tokens_max()
    }

    fn release(&mut self, slot: usize) {
        let Some(len) = self.lens.get_mut(slot) else { return };
        *len = 0;
        for kv in &mut self.kv {
            self.model.engine.kv_clear(&mut kv[slot]);
        }
    }
}

impl<E: BlockEngine> TransformerDecoder<'_, E> {
    /// Makes slot `to` hold what slot `from` holds.
    fn copy_slot(&mut self, from: usize, to: usize) -> Result<()> {
        for kv in &mut self.kv {
            let [from, to] = kv
                .get_disjoint_mut([from, to])
                .map_err(|_| EngineError::invalid("a slot cannot be copied onto itself", ""))?;
            self.model.engine.kv_copy(from, to);
        }
        self.lens[to] = self.lens[from];
        Ok(())
    }
}
