//! Incremental decoding. Prompts and single steps are the same walk: a list of tokens, each with its slot and place.
//! A token's result depends on its own slot's cache only, never on what else is computed beside it.

use std::ops::Range;
use std::sync::Mutex;

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
        let logits_rv = self.walk(tokens, targets, &|_, _| ())?;
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

    /// Appends `tokens`, sorted by slot and place, shows the logits of each that has a target to `see`, and returns them in
    /// the order of the tokens.
    fn walk(&mut self, tokens: &[Token], targets: usize, see: &Seeing<'_>) -> Result<Vec<f32>> {
        let vocab = self.model.config().vocab_size;
        // Every number is overwritten, so the old ones may stay.
        let mut logits_rv = self.spare();
        logits_rv.resize(targets * vocab, 0.0);
        let lanes = cut_lanes(tokens, self.model.decoding().0.lanes());
        let mut kv: Vec<&mut [E::Kv]> = self.kv.iter_mut().map(Vec::as_mut_slice).collect();
        let mut rest_rv = logits_rv.as_mut_slice();
        let mut slots_before = 0;
        let mut work = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let tokens = &tokens[lane];
            let slots_end = tokens.last().map_or(slots_before, |t| t.row.slot + 1);
            let mut caches = Vec::with_capacity(kv.len());
            for kv in &mut kv {
                let (head, tail) = std::mem::take(kv).split_at_mut(slots_end - slots_before);
                caches.push(head);
                *kv = tail;
            }
            let wanted = tokens.iter().filter(|t| t.target.is_some()).count();
            let (own_rv, tail) = std::mem::take(&mut rest_rv).split_at_mut(wanted * vocab);
            rest_rv = tail;
            work.push(Mutex::new((tokens, slots_before, caches, own_rv)));
            slots_before = slots_end;
        }
        let model = &*self.model;
        let found = model.decoding().0.run_lanes(work.len(), &|lane| {
            let mut work = work[lane].lock().map_err(|_| EngineError::invalid("a decoding thread panicked", ""))?;
            let (tokens, first_slot, caches, logits_rv) = &mut *work;
            run(model, tokens, *first_slot, caches, logits_rv, see)
        });
        drop(work);
        found.into_iter().collect::<Result<()>>()?;
        for token in tokens {
            self.lens[token.row.slot] = token.row.position + 1;
        }
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

/// Sees the logits of a target.
type Seeing<'a> = dyn Fn(usize, &[f32]) + Sync + 'a;

/// Walks the blocks for one lane's tokens; `caches[layer]` starts at slot `first_slot`. `logits_rv` gets those of the tokens
/// with a target, in the tokens' order, and `see` is shown each.
fn run<E: BlockEngine>(
    model: &Transformer<E>,
    tokens: &[Token],
    first_slot: usize,
    caches: &mut [&mut [E::Kv]],
    logits_rv: &mut [f32],
    see: &Seeing<'_>,
) -> Result<()> {
    let (engine, device) = model.decoding();
    let rows: Vec<DecodeRow> = tokens.iter().map(|t| DecodeRow { slot: t.row.slot - first_slot, ..t.row }).collect();
    let mut ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
    ids.resize(engine.decode_rows(ids.len()), 0);
    let mut x = engine.embed(&device.embed, &model.groups[0], &ids)?;
    for (block, kv) in device.blocks.iter().zip(caches) {
        x = engine.block_decode(block, kv, &rows, x)?;
    }
    let mut wanted: Vec<u32> =
        tokens.iter().enumerate().filter(|(_, t)| t.target.is_some()).map(|(row, _)| row as u32).collect();
    let count = wanted.len();
    if count == 0 {
        return Ok(());
    }
    wanted.resize(engine.decode_rows(count), wanted[0]);
    let hidden_rh = engine.final_norm(&device.norm, x, &wanted)?;
    engine.decode_head(device.head(), &hidden_rh, logits_rv)?;
    let targets: Vec<usize> = tokens.iter().filter_map(|t| t.target).collect();
    let vocab = engine.config().vocab_size;
    threads::each(count, true, |row| see(targets[row], &logits_rv[row * vocab..(row + 1) * vocab]));
    Ok(())
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

    fn step_each(&mut self, entries: &[(usize, u32)], see: &Seeing<'_>) -> Result<()> {
        let tokens = self.next_tokens(entries)?;
        if !tokens.is_empty() {
            let logits_rv = self.walk(&tokens, entries.len(), see)?;
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
