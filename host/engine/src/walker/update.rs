//! The optimizer's update within the backward: every parameter is updated as soon as its gradient is complete, and the gradient
//! is forgotten. Gradients take as much memory as the weights; here those of one block are there at a time, and of the head
//! those of a part of its vocabulary:
//!
//! 1. Forward, keeping block inputs; the head in chunks of rows, for the loss alone. Nothing has changed yet, and a number
//!    that is not finite ends it here.
//! 2. The head in parts of the vocabulary: logits of the part again, their gradient, that at the hidden states, that at the
//!    part's weights, and their update. Weights of a part are read for the last time before they change.
//! 3. The norm and the blocks, last first; nothing below reads what has changed.
//! 4. The embedding. Where it is the head too, the rows of tokens in the batch have waited for this second gradient since 2.
//!
//! Making the logits again costs a few hundredths of the step, so a small model, and an objective that cannot make a row's
//! gradient again ([`HeadLoss::remakes`]), have the head's gradient held whole between 1 and 2. Every sum is made in the order
//! of [`forward_backward`](crate::model::Model::forward_backward), so weights and losses have the same bits.

use rayon::prelude::*;

use super::{Forward, Transformer};
use crate::batch::{Position, TokenBatch};
use crate::block::{BlockEngine, HeadPart};
use crate::model::{HeadLoss, Updater};
use crate::{EngineError, Result};

/// Bytes of parameters from which on memory counts for more than a few hundredths of the time: nothing is kept beside the
/// blocks' inputs, and tiles go one at a time, so that the activations of only one are there, in memory that is used again.
pub(super) const FRUGAL_BYTES: usize = 1 << 30;
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
    grads: Vec<f32>,
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
        // Room for a chunk of logits or a block's gradients, whichever it is the turn of.
        let largest = (1..=self.layers()).map(|group| self.groups[group].len()).max().unwrap_or(0);
        self.logits_rv.clear();
        self.logits_rv.reserve(largest);
        let mut waiting = self.waiting(&forward);
        let dhidden_rh = match self.engine.head_part_ids().filter(|_| frugal && loss.remakes()) {
            Some(part_ids) => self.head_in_parts(&forward.hidden_rh, loss, part_ids, &mut waiting, updater)?,
            None => self.head_at_once(&forward.hidden_rh, loss, &mut waiting, updater)?,
        };
        let Some(dhidden_rh) = dhidden_rh else { return Ok(false) };
        let mut dy = self.norm_backward(&mut forward, &dhidden_rh)?;
        (forward.hidden_rh, forward.outputs) = (Vec::new(), Vec::new());
        drop(dhidden_rh);
        let norm = self.norm_group();
        let grads = self.take_grads(norm);
        self.update_group(norm, &grads, updater)?;
        let mut grads = std::mem::take(&mut self.logits_rv);
        for layer in (0..self.layers()).rev() {
            grads.resize(self.groups[1 + layer].len(), 0.0);
            clear(&mut grads);
            dy = self.block_backward(layer, &mut forward, dy, if frugal { 1 } else { usize::MAX }, &mut grads)?;
            self.update_group(1 + layer, &grads, updater)?;
        }
        self.logits_rv = grads;
        self.update_embedding(&forward, dy, waiting, updater)?;
        if !self.engine.trains_on_masters() {
            self.refresh();
        }
        Ok(true)
    }

    fn is_frugal(&self) -> bool {
        self.params_bytes() >= self.frugal_bytes
    }

    /// The rows of the embedding that the batch reads, with gradients of zero.
    fn waiting(&self, forward: &Forward<E>) -> Waiting {
        let mut ids: Vec<u32> = forward.tiles.iter().flat_map(|tile| &tile.ids).copied().collect();
        ids.sort_unstable();
        ids.dedup();
        let grads = vec![0.0; ids.len() * self.engine.config().hidden_size];
        Waiting { ids, grads }
    }

    /// The head and the loss, all rows of the vocabulary in a part being updated before the next: the gradient at the hidden
    /// states, or none where a number is not finite and nothing was updated.
    fn head_in_parts(
        &mut self,
        hidden_rh: &[f32],
        loss: &mut dyn HeadLoss,
        part_ids: usize,
        waiting: &mut Waiting,
        updater: &mut dyn Updater,
    ) -> Result<Option<Vec<f32>>> {
        let (hidden, group) = (self.engine.config().hidden_size, self.head_group());
        let rows = hidden_rh.len() / hidden;
        self.settle(hidden_rh, loss)?;
        // Logits that are not finite have no gradient, but NaN comes of it where it meets what made them so.
        if !all_finite(hidden_rh) || !all_finite(&self.groups[group]) {
            return Ok(None);
        }
        let chunk_rows = self.engine.head_chunk_rows();
        // Whole chunks, so that the sums over rows stay those of chunks.
        let rows_each = (PART_LOGITS_BYTES / (4 * part_ids) / chunk_rows).max(1) * chunk_rows;
        let (mut dhidden_rh, mut logits_rp) = (vec![0.0; hidden_rh.len()], std::mem::take(&mut self.logits_rv));
        let mut grads = vec![0.0; part_ids.min(self.groups[group].len() / hidden) * hidden];
        for start in (0..self.groups[group].len()).step_by(part_ids * hidden) {
            let values_ph = &self.groups[group][start..self.groups[group].len().min(start + part_ids * hidden)];
            let grads_ph = &mut grads[..values_ph.len()];
            clear(grads_ph);
            for first in (0..rows).step_by(rows_each) {
                let range = first..rows.min(first + rows_each);
                let at = range.start * hidden..range.end * hidden;
                let part_rh = &hidden_rh[at.clone()];
                self.engine.head_of_masters(self.device.head(), values_ph, part_rh, &mut logits_rp)?;
                loss.remake(range, start / hidden, &mut logits_rp)?;
                let (add, dlogits_rp) = (start > 0, &logits_rp);
                let part = HeadPart { values_ph, hidden_rh: part_rh, dlogits_rp, chunk_rows, add };
                self.engine.head_part_vjp(part, &mut dhidden_rh[at], grads_ph)?;
            }
            self.update_head_rows(start, grads_ph, waiting, updater)?;
        }
        self.logits_rv = logits_rp;
        Ok(Some(dhidden_rh))
    }

    /// The losses of all rows, from the whole head.
    fn settle(&mut self, hidden_rh: &[f32], loss: &mut dyn HeadLoss) -> Result<()> {
        let hidden = self.engine.config().hidden_size;
        let mut logits_rv = std::mem::take(&mut self.logits_rv);
        self.observe(hidden_rh, loss, &mut logits_rv)?;
        let chunks = self.head_chunks(hidden_rh.len() / hidden);
        for range in &chunks {
            // As in the pass that makes gradients.
            if chunks.len() > 1 || !loss.needs_first_pass() {
                self.training_logits(&hidden_rh[range.start * hidden..range.end * hidden], &mut logits_rv)?;
            }
            loss.settle(range.clone(), &logits_rv)?;
        }
        self.logits_rv = logits_rv;
        Ok(())
    }

    /// As [`Transformer::head_in_parts`], with the gradient of the whole head held before its update.
    fn head_at_once(
        &mut self,
        hidden_rh: &[f32],
        loss: &mut dyn HeadLoss,
        waiting: &mut Waiting,
        updater: &mut dyn Updater,
    ) -> Result<Option<Vec<f32>>> {
        let mut grads = vec![0.0; self.groups[self.head_group()].len()];
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
        updater.update(index, start, &mut self.groups[group][start..start + grads_ph.len()], grads_ph)
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
            false => updater.update(index, start + at, &mut values[start + at..][..grads.len()], grads),
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
            updater.update(index, first, &mut self.groups[0][first..first + hidden], gradient)?;
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
            updater.update(index, 0, &mut values[place.range.clone()], &grads[place.range.clone()])?;
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
