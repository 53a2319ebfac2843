//! The optimizer's update within the backward: every parameter is updated as soon as its gradient is complete, and the gradient
//! is forgotten. Gradients take as much memory as the weights; here those of one block are there at a time, and of the head
//! those of a part of its vocabulary:
//!
//! 1. Forward, keeping block inputs; the head in parts of the vocabulary, for the loss alone. Nothing has changed yet, and a
//!    number that is not finite ends it here.
//! 2. The head in parts of the vocabulary: logits of the part again, their gradient, that at the hidden states, that at the
//!    part's weights, and their update. Weights of a part are read for the last time before they change.
//! 3. The norm and the blocks, last first; nothing below reads what has changed.
//! 4. The embedding. Where it is the head too, the rows of tokens in the batch have waited for this second gradient since 2.
//!
//! Making the logits again costs a few hundredths of the step, so a small model, and an objective that cannot make a row's
//! gradient again ([`HeadLoss::remakes`]), have the head's gradient held whole between 1 and 2. Every sum is made in the order
//! of [`forward_backward`](crate::model::Model::forward_backward), so weights and losses have the same bits.

use cosmos_kernels::memory::Buffer;
use rayon::prelude::*;

use super::{Forward, Place, Transformer, chunks};
use crate::batch::{Position, TokenBatch};
use crate::block::{BlockEngine, HeadPart};
use crate::model::{HeadLoss, Part, Updater};
use crate::{EngineError, Result};

/// Bytes of parameters from which on memory counts for more than a few hundredths of the time: nothing is kept beside the
/// blocks' inputs, and tiles go one at a time, so that the activations of only one are there, in memory that is used again.
pub(crate) const FRUGAL_BYTES: usize = 1 << 30;
/// Bytes of a table that are updated at a time.
const TABLE_PART_BYTES: usize = 16 << 20;
/// Bytes of logits of a part of the vocabulary.
const PART_LOGITS_BYTES: usize = 32 << 20;
/// Numbers that a thread takes at a time.
const SLICE: usize = 1 << 16;

/// Rows of a table whose gradient is not complete before the embedding's: those of the tokens in the batch.
struct Waiting {
    /// Rising.
    ids: Vec<u32>,
    /// `[ids, hidden]`.
    grads: Buffer,
}

impl<E: BlockEngine> Transformer<E> {
    pub(super) fn backward_update(
        &mut self,
        batch: &TokenBatch,
        positions: &[Position],
        loss: &mut dyn HeadLoss,
        updater: &mut dyn Updater,
    ) -> Result<bool> {
        self.check_trainable()?;
        if self.accumulated {
            return Err(EngineError::invalid(
                "gradients of an earlier backward wait for their update",
                "use them and call `zero_grads` before an update within the backward",
            ));
        }
        self.grads.iter_mut().for_each(|grads| *grads = Vec::new());
        let frugal = self.is_frugal();
        let mut forward = self.forward(batch, positions, frugal)?;
        let parts = self.engine.head_part_ids().filter(|_| frugal && loss.remakes());
        if let Some(part_ids) = parts {
            self.settle(&forward.hidden_rh, loss, part_ids)?;
        }
        let mut waiting = self.waiting(&forward);
        let dhidden_rh = match parts {
            Some(part_ids) => self.head_in_parts(&forward.hidden_rh, loss, part_ids, &mut waiting, updater)?,
            None => self.head_at_once(&forward.hidden_rh, loss, &mut waiting, updater)?,
        };
        let Some(dhidden_rh) = dhidden_rh else { return Ok(false) };
        let mut dy = self.norm_backward(&mut forward, &dhidden_rh)?;
        (forward.hidden_rh, forward.outputs) = (Buffer::empty(), Vec::new());
        drop(dhidden_rh);
        let norm = self.norm_group();
        let grads = self.take_grads(norm);
        self.update_group(norm, &grads, updater)?;
        for layer in (0..self.layers()).rev() {
            dy = self.update_block(layer, &mut forward, dy, frugal, updater)?;
        }
        self.update_embedding(&forward, dy, waiting, updater)?;
        if !self.engine.trains_on_masters() {
            self.refresh();
        }
        Ok(true)
    }

    /// Backward through a block and its update: the gradient at its input.
    fn update_block(
        &mut self,
        layer: usize,
        forward: &mut Forward<E>,
        dy: Vec<E::Tensor>,
        frugal: bool,
        updater: &mut dyn Updater,
    ) -> Result<Vec<E::Tensor>> {
        let group = 1 + layer;
        if frugal && layer == 0 {
            // The rows that are read here have waited for their update.
            for (tile, kept) in forward.tiles.iter().zip(&mut forward.kept) {
                let x = self.engine.embed(&self.device.embed, &self.groups[0], &tile.ids)?;
                kept.push(self.engine.saved_input(x));
            }
        }
        let tokens: usize = forward.tiles.iter().map(|tile| tile.ids.len()).sum();
        if !frugal || !self.engine.updates_block_in_parts(tokens) {
            let mut grads = Buffer::dirty(self.groups[group].len());
            clear(&mut grads);
            let dx = self.block_backward(layer, forward, dy, if frugal { 1 } else { usize::MAX }, &mut grads)?;
            self.update_group(group, &grads, updater)?;
            return Ok(dx);
        }
        self.outdate(group);
        let places: Vec<(usize, &Place)> =
            self.places.iter().enumerate().filter(|(_, place)| place.group == group).collect();
        let mut update = |part: Part, values: &mut [f32], grads: &[f32]| {
            let span = part.span();
            let mut grads = grads;
            for (index, place) in &places {
                let own = span.start.max(place.range.start)..span.end.min(place.range.end);
                if own.is_empty() {
                    continue;
                }
                let first = own.start - place.range.start;
                let own_part =
                    if part.rows > 1 { Part { first, ..part } } else { Part::whole(first..first + own.len()) };
                let (now, later) = grads.split_at(own_part.len());
                updater.update(*index, own_part, &mut values[own], now)?;
                grads = later;
            }
            Ok(())
        };
        let freed = (self.layers() - group) * tokens * self.engine.config().hidden_size;
        let tiles = forward.take_block(dy).collect();
        self.engine.block_backward_update(&mut self.groups[group], tiles, freed, &mut update)
    }

    fn is_frugal(&self) -> bool {
        self.params_bytes() >= self.frugal_bytes
    }

    /// The rows of the embedding that the batch reads, with gradients of zero.
    fn waiting(&self, forward: &Forward<E>) -> Waiting {
        let mut ids: Vec<u32> = forward.tiles.iter().flat_map(|tile| &tile.ids).copied().collect();
        ids.sort_unstable();
        ids.dedup();
        let grads = Buffer::zeros(ids.len() * self.engine.config().hidden_size);
        Waiting { ids, grads }
    }

    /// The head and the loss, which was [settled](Self::settle), all rows of the vocabulary in a part being updated
    /// before the next: the gradient at the hidden states, or none where a number is not finite and nothing was
    /// updated.
    fn head_in_parts(
        &mut self,
        hidden_rh: &[f32],
        loss: &mut dyn HeadLoss,
        part_ids: usize,
        waiting: &mut Waiting,
        updater: &mut dyn Updater,
    ) -> Result<Option<Buffer>> {
        let (hidden, group) = (self.engine.config().hidden_size, self.head_group());
        let rows = hidden_rh.len() / hidden;
        // Logits that are not finite have no gradient, but NaN comes of it where it meets what made them so.
        if !all_finite(hidden_rh) || !all_finite(&self.groups[group]) {
            return Ok(None);
        }
        let (chunk_rows, rows_each) = (self.engine.head_chunk_rows(), self.part_rows(part_ids));
        let mut dhidden_rh = Buffer::zeros(hidden_rh.len());
        let vocab = self.groups[group].len() / hidden;
        let mut logits_rp = Buffer::dirty(rows_each.min(rows) * part_ids.min(vocab));
        let mut grads = Buffer::dirty(part_ids.min(vocab) * hidden);
        for start in (0..self.groups[group].len()).step_by(part_ids * hidden) {
            let values_ph = &self.groups[group][start..self.groups[group].len().min(start + part_ids * hidden)];
            let grads_ph = &mut grads[..values_ph.len()];
            clear(grads_ph);
            for range in chunks(rows, rows_each) {
                let at = range.start * hidden..range.end * hidden;
                let part_rh = &hidden_rh[at.clone()];
                let logits_rp = &mut logits_rp[..range.len() * (values_ph.len() / hidden)];
                self.engine.head_of_masters(self.device.head(), values_ph, part_rh, logits_rp)?;
                loss.remake(range, start / hidden, logits_rp)?;
                let (add, dlogits_rp) = (start > 0, &*logits_rp);
                let part = HeadPart { values_ph, hidden_rh: part_rh, dlogits_rp, chunk_rows, add };
                self.engine.head_part_vjp(part, &mut dhidden_rh[at], grads_ph)?;
            }
            self.update_head_rows(start, grads_ph, waiting, updater)?;
        }
        Ok(Some(dhidden_rh))
    }

    /// The losses of all rows, from the head in the same parts.
    fn settle(&self, hidden_rh: &[f32], loss: &mut dyn HeadLoss, part_ids: usize) -> Result<()> {
        let (hidden, values) = (self.engine.config().hidden_size, &self.groups[self.head_group()]);
        let (rows, rows_each) = (hidden_rh.len() / hidden, self.part_rows(part_ids));
        let mut logits_rp = Buffer::dirty(rows_each.min(rows) * part_ids.min(values.len() / hidden));
        for start in (0..values.len()).step_by(part_ids * hidden) {
            let values_ph = &values[start..values.len().min(start + part_ids * hidden)];
            for range in chunks(rows, rows_each) {
                let part_rh = &hidden_rh[range.start * hidden..range.end * hidden];
                let logits_rp = &mut logits_rp[..range.len() * (values_ph.len() / hidden)];
                self.engine.head_of_masters(self.device.head(), values_ph, part_rh, logits_rp)?;
                loss.see(range, start / hidden, logits_rp)?;
            }
        }
        loss.settle()
    }

    /// Rows of logits of a part of the vocabulary: whole chunks, so that the sums over rows stay those of chunks.
    fn part_rows(&self, part_ids: usize) -> usize {
        let chunk_rows = self.engine.head_chunk_rows();
        (PART_LOGITS_BYTES / (4 * part_ids) / chunk_rows).max(1) * chunk_rows
    }

    /// As [`Transformer::head_in_parts`], with the gradient of the whole head held before its update.
    fn head_at_once(
        &mut self,
        hidden_rh: &[f32],
        loss: &mut dyn HeadLoss,
        waiting: &mut Waiting,
        updater: &mut dyn Updater,
    ) -> Result<Option<Buffer>> {
        let mut grads = Buffer::dirty(self.groups[self.head_group()].len());
        clear(&mut grads);
        let dhidden_rh = self.head_pass(hidden_rh, loss, &mut grads)?;
        if !all_finite(&dhidden_rh) || !all_finite(&grads) {
            return Ok(None);
        }
        let part = self.table_part();
        for (index, grads_ph) in grads.chunks(part).enumerate() {
            self.update_head_rows(index * part, grads_ph, waiting, updater)?;
        }
        Ok(Some(dhidden_rh))
    }

    /// Numbers of a table that are updated at a time: whole rows.
    fn table_part(&self) -> usize {
        let hidden = self.engine.config().hidden_size;
        (TABLE_PART_BYTES / (4 * hidden)).max(1) * hidden
    }

    /// Updates rows of the head, the values from `start` on, but for those that wait for the embedding's gradient.
    fn update_head_rows(
        &mut self,
        start: usize,
        grads_ph: &[f32],
        waiting: &mut Waiting,
        updater: &mut dyn Updater,
    ) -> Result<()> {
        let group = self.head_group();
        if group == 0 {
            return self.update_rows(start, grads_ph, waiting, updater);
        }
        self.outdate(group);
        let index = self.index_of(group);
        let range = start..start + grads_ph.len();
        updater.update(index, Part::whole(range.clone()), &mut self.groups[group][range], grads_ph)
    }

    /// Updates rows of the embedding, the values from `start` on; those that wait take their gradient along instead.
    fn update_rows(
        &mut self,
        start: usize,
        grads_ph: &[f32],
        waiting: &mut Waiting,
        updater: &mut dyn Updater,
    ) -> Result<()> {
        self.outdate(0);
        let (hidden, index) = (self.engine.config().hidden_size, self.index_of(0));
        let values = &mut self.groups[0];
        let mut run = |at: usize, grads: &[f32]| match grads.is_empty() {
            true => Ok(()),
            false => {
                let range = start + at..start + at + grads.len();
                updater.update(index, Part::whole(range.clone()), &mut values[range], grads)
            }
        };
        let end = start + grads_ph.len();
        let slots = |value: usize| waiting.ids.partition_point(|id| (*id as usize) * hidden < value);
        let mut done = 0;
        for slot in slots(start)..slots(end) {
            let at = waiting.ids[slot] as usize * hidden - start;
            run(done, &grads_ph[done..at])?;
            done = at + hidden;
            waiting.grads[slot * hidden..(slot + 1) * hidden].copy_from_slice(&grads_ph[at..done]);
        }
        run(done, &grads_ph[done..])
    }

    /// Backward of the embedding, and the update of what is left of it.
    fn update_embedding(
        &mut self,
        forward: &Forward<E>,
        dy: Vec<E::Tensor>,
        mut waiting: Waiting,
        updater: &mut dyn Updater,
    ) -> Result<()> {
        let hidden = self.engine.config().hidden_size;
        if self.head_group() != 0 {
            // Rows without a token have a gradient of zero, and an update all the same.
            let zeros = vec![0.0; self.table_part().min(self.groups[0].len())];
            for start in (0..self.groups[0].len()).step_by(zeros.len()) {
                let part = zeros.len().min(self.groups[0].len() - start);
                self.update_rows(start, &zeros[..part], &mut waiting, updater)?;
            }
        }
        for (tile, dy) in forward.tiles.iter().zip(dy) {
            let slot = |id: &u32| waiting.ids.partition_point(|known| known < id) as u32;
            let slots: Vec<u32> = tile.ids.iter().map(slot).collect();
            self.engine.embed_vjp(&slots, dy, &mut waiting.grads)?;
        }
        self.outdate(0);
        let index = self.index_of(0);
        for (id, gradient) in waiting.ids.iter().zip(waiting.grads.chunks_exact(hidden)) {
            let first = *id as usize * hidden;
            let row = first..first + hidden;
            updater.update(index, Part::whole(row.clone()), &mut self.groups[0][row], gradient)?;
        }
        Ok(())
    }

    /// The parameter that a table is.
    fn index_of(&self, group: usize) -> usize {
        self.places.iter().position(|place| place.group == group).unwrap_or_default()
    }

    /// Updates the parameters of a group.
    fn update_group(&mut self, group: usize, grads: &[f32], updater: &mut dyn Updater) -> Result<()> {
        self.outdate(group);
        let values = &mut self.groups[group];
        for (index, place) in self.places.iter().enumerate().filter(|(_, place)| place.group == group) {
            let (values, grads) = (&mut values[place.range.clone()], &grads[place.range.clone()]);
            updater.update(index, Part::whole(0..grads.len()), values, grads)?;
        }
        Ok(())
    }
}

/// Sets all numbers to zero.
pub(super) fn clear(values: &mut [f32]) {
    values.par_chunks_mut(SLICE).for_each(|slice| slice.fill(0.0));
}

/// Whether no number is NaN or infinite.
fn all_finite(values: &[f32]) -> bool {
    let finite =
        |slice: &[f32]| slice.iter().fold(0, |max, v| (v.to_bits() & 0x7fff_ffff).max(max)) < f32::INFINITY.to_bits();
    values.par_chunks(SLICE).all(finite)
}
