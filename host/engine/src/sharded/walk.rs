//! The walk of one rank over its blocks: groups of parameters are put together before use, gradients handed out after it,
//! and micro-batches go through the stages of a pipeline in turn.
//!
//! All blocks of all tiles are walked block by block, not tile by tile: ranks with different numbers of tiles then meet in
//! the same collectives.

use std::collections::VecDeque;

use super::Reshard;
use super::model::{RankModel, Ready};
use super::store::Whole;
use crate::Result;
use crate::batch::{Position, TokenBatch};
use crate::block::{BackwardTile, BlockEngine};
use crate::model::{HeadLoss, Losses, Model, VocabShard};
use crate::walker::tile::plan;

/// This rank's part of a tile: some rows of a batch, padded to one length, and of each the tokens of this context parallel
/// rank.
struct LocalTile<E: BlockEngine> {
    /// Sequences.
    b: usize,
    /// Ids, `[b, tokens of this rank]`.
    ids: Vec<u32>,
    /// Wanted positions of this rank as rows of `ids`.
    wanted: Vec<u32>,
    /// For each, its index in the caller's list.
    targets: Vec<usize>,
    /// Of the whole length.
    geometry: E::Geometry,
}

/// A micro-batch between its forward and its backward.
pub(super) struct Flight<E: BlockEngine> {
    index: usize,
    rows: usize,
    tiles: Vec<LocalTile<E>>,
    /// What each block of the stage keeps, by tile; emptied from the back.
    kept: Vec<Vec<E::Saved>>,
    /// At the last stage.
    outputs: Vec<E::Tensor>,
}

impl<E: BlockEngine> RankModel<E> {
    /// This rank's part of a batch.
    fn tiles(&self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<LocalTile<E>>> {
        let (ranks, rank) = (self.cp.world(), self.cp.rank());
        let tiles = plan(batch, positions, self.engine.config(), self.engine.tile_tokens())?;
        let local = |tile: crate::walker::tile::Tile| {
            let own = tile.t.div_ceil(ranks);
            let first = own * rank;
            let mut ids = vec![0; tile.b() * own];
            for (to, from) in ids.chunks_exact_mut(own).zip(tile.ids.chunks_exact(tile.t)) {
                let from = &from[first.min(tile.t)..(first + own).min(tile.t)];
                to[..from.len()].copy_from_slice(from);
            }
            let mut part = LocalTile {
                b: tile.b(),
                ids,
                wanted: Vec::new(),
                targets: Vec::new(),
                geometry: self.engine.geometry(own * ranks),
            };
            for (row, target) in tile.wanted.iter().zip(&tile.targets) {
                let (row, time) = (*row as usize / tile.t, *row as usize % tile.t);
                if (first..first + own).contains(&time) {
                    part.wanted.push((row * own + time - first) as u32);
                    part.targets.push(*target);
                }
            }
            part
        };
        Ok(tiles.into_iter().map(local).collect())
    }

    /// Whether block `layer` stays put together between forward and backward.
    fn stays(&self, layer: usize) -> bool {
        match self.options.reshard {
            _ if !self.sharded => true,
            Reshard::Always => false,
            Reshard::Never => true,
            Reshard::Default => self.pp.world() > 1 || layer + 1 == self.layers(),
        }
    }

    /// A block put together; with `flat`, its values too.
    fn take_block(&mut self, layer: usize, flat: bool) -> Result<Ready<E::Block>> {
        if let Some(ready) = self.blocks[layer].take() {
            return Ok(ready);
        }
        let shard = self.shard(1 + layer)?;
        let whole = shard.whole(self.options.param_dtype, &self.gathered)?;
        let device = self.engine.block(whole.values(shard));
        let held = self.gathered.hold(self.engine.block_bytes(&device, shard.plan.len));
        Ok(Ready { whole: flat.then_some(whole), device, _held: held })
    }

    fn ready_embed(&mut self) -> Result<Ready<E::Table>> {
        if let Some(ready) = self.embed.take() {
            return Ok(ready);
        }
        let shard = self.shard(0)?;
        let whole = shard.whole(self.options.param_dtype, &self.gathered)?;
        let device = self.engine.lookup(whole.values(shard));
        let held = self.gathered.hold(self.engine.table_bytes(&device, shard.plan.len));
        Ok(Ready { whole: Some(whole), device, _held: held })
    }

    fn ready_norm(&mut self) -> Result<Ready<E::Norm>> {
        if let Some(ready) = self.norm.take() {
            return Ok(ready);
        }
        let shard = self.shard(1 + self.layers())?;
        let whole = shard.whole(self.options.param_dtype, &self.gathered)?;
        let device = self.engine.norm(whole.values(shard));
        let held = self.gathered.hold(4 * shard.plan.len);
        Ok(Ready { whole: None, device, _held: held })
    }

    /// This rank's ids of the head.
    pub(super) fn ready_head(&mut self) -> Result<Ready<E::Table>> {
        if let Some(ready) = self.head.take() {
            return Ok(ready);
        }
        let shard = self.shard(self.head_group())?;
        let whole = shard.whole(self.options.param_dtype, &self.gathered)?;
        let own = self.head_range();
        let len = own.len();
        let device = self.engine.table(&whole.values(shard)[own]);
        let held = self.gathered.hold(self.engine.table_bytes(&device, len));
        Ok(Ready { whole: Some(whole), device, _held: held })
    }

    /// Values of this rank's ids in the head's group.
    fn head_range(&self) -> std::ops::Range<usize> {
        let hidden = self.engine.config().hidden_size;
        self.head_rows.start * hidden..self.head_rows.end * hidden
    }

    /// The stream at the stage's first block: from the embedding, or from the stage before.
    fn enter(&mut self, tiles: &[LocalTile<E>]) -> Result<Vec<E::Tensor>> {
        if !self.stage.first {
            return self.receive(self.pp.rank() - 1, tiles);
        }
        let ready = self.ready_embed()?;
        let (engine, shard) = (&self.engine, self.shard(0)?);
        let values = ready.whole.as_ref().map_or(&[][..], |whole| whole.values(shard));
        let found = engine.run_lanes(tiles.len(), &|index| engine.embed(&ready.device, values, &tiles[index].ids));
        let found = found.into_iter().collect();
        if !self.sharded {
            self.embed = Some(ready);
        }
        found
    }

    /// Sends the stream or its gradient to another stage.
    fn pass_on(&self, stage: usize, stream: Vec<E::Tensor>) -> Result<()> {
        let mut values = Vec::new();
        for tile in stream {
            values.extend(self.engine.values(tile)?);
        }
        if !values.is_empty() {
            self.pp.send(stage, &values)?;
        }
        Ok(())
    }

    fn receive(&self, stage: usize, tiles: &[LocalTile<E>]) -> Result<Vec<E::Tensor>> {
        let hidden = self.engine.config().hidden_size;
        let tokens: usize = tiles.iter().map(|tile| tile.ids.len()).sum();
        let mut values = vec![0.0; tokens * hidden];
        if !values.is_empty() {
            self.pp.recv(stage, &mut values)?;
        }
        let mut rest = values.as_slice();
        let tile = |tile: &LocalTile<E>| {
            let (own, others) = rest.split_at(tile.ids.len() * hidden);
            rest = others;
            self.engine.activations(own)
        };
        Ok(tiles.iter().map(tile).collect())
    }

    /// The blocks of this stage, for backward or not.
    fn forward_blocks(
        &mut self,
        tiles: &[LocalTile<E>],
        mut xs: Vec<E::Tensor>,
        mut kept: Option<&mut Vec<Vec<E::Saved>>>,
    ) -> Result<Vec<E::Tensor>> {
        let tokens: usize = tiles.iter().map(|tile| tile.ids.len()).sum();
        let layers = self.stage.layers.clone();
        // Several micro-batches are on their way at once.
        let flights = self.pp.world() - self.pp.rank();
        let block_bytes = (self.engine.saved_bytes() * tokens * flights).max(1);
        let recomputed = layers.end - (self.options.kept_bytes_max / block_bytes).min(layers.len());
        for layer in layers {
            let ready = self.take_block(layer, self.stays(layer))?;
            let engine = &self.engine;
            if let Some(kept) = kept.as_mut() {
                let found = engine.run_lanes(tiles.len(), &|index| {
                    let (tile, x) = (&tiles[index], xs[index].clone());
                    engine.block_forward_keep(&ready.device, None, &tile.geometry, tile.b, x, layer >= recomputed)
                });
                let found = found.into_iter().collect::<Result<Vec<_>>>()?;
                let (ys, saved): (Vec<_>, Vec<_>) = found.into_iter().unzip();
                kept.push(saved);
                xs = ys;
            } else {
                let found = engine.run_lanes(tiles.len(), &|index| {
                    let (tile, x) = (&tiles[index], xs[index].clone());
                    engine.block_forward(&ready.device, None, &tile.geometry, tile.b, x)
                });
                xs = found.into_iter().collect::<Result<Vec<_>>>()?;
            }
            if self.stays(layer) {
                self.blocks[layer] = Some(ready);
            }
        }
        Ok(xs)
    }

    /// Hidden states after the last norm at all wanted positions, on every rank that shares the sequences.
    fn hidden(&mut self, tiles: &[LocalTile<E>], outputs: &[E::Tensor], rows: usize) -> Result<Vec<f32>> {
        let ready = self.ready_norm()?;
        let engine = &self.engine;
        let found = engine.run_lanes(tiles.len(), &|index| {
            engine.final_norm(&ready.device, outputs[index].clone(), &tiles[index].wanted)
        });
        let hidden = engine.config().hidden_size;
        let mut hidden_rh = vec![0.0; rows * hidden];
        for (tile, found) in tiles.iter().zip(found) {
            for (target, row) in tile.targets.iter().zip(found?.chunks_exact(hidden)) {
                hidden_rh[target * hidden..(target + 1) * hidden].copy_from_slice(row);
            }
        }
        self.norm = Some(ready);
        if rows > 0 && self.cp.world() > 1 {
            // Each row has one rank, the others add zeros.
            self.cp.all_reduce_sum(&mut hidden_rh)?;
        }
        Ok(hidden_rh)
    }

    pub(super) fn forward_only(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>> {
        self.leave_head();
        let tiles = self.tiles(batch, positions)?;
        let xs = self.enter(&tiles)?;
        let xs = self.forward_blocks(&tiles, xs, None)?;
        if self.stage.last {
            return self.hidden(&tiles, &xs, positions.len());
        }
        self.pass_on(self.pp.rank() + 1, xs)?;
        Ok(Vec::new())
    }

    /// Forgets the head unless it stays.
    fn leave_head(&mut self) {
        if self.sharded && self.options.reshard != Reshard::Never {
            self.head = None;
        }
    }

    /// Forward and backward of all micro-batches: a stage goes forward until the stages after it are busy, then backward
    /// and forward in turn. Neighbours may send to each other at the same time, so a send must not wait for its receiver.
    pub(super) fn pipeline(&mut self, micro: &[(&TokenBatch, &[Position])], losses: &mut dyn Losses) -> Result<()> {
        self.leave_head();
        let ahead = (self.pp.world() - 1 - self.pp.rank()).min(micro.len());
        let mut flights = VecDeque::new();
        for (index, (batch, positions)) in micro.iter().enumerate() {
            flights.push_back(self.forward(index, batch, positions)?);
            if index >= ahead
                && let Some(flight) = flights.pop_front()
            {
                self.backward(flight, losses)?;
            }
        }
        for flight in flights {
            self.backward(flight, losses)?;
        }
        for group in 0..self.shards.len() {
            if self.settles_later(group) && self.shards[group].is_some() {
                let (replicas, pp) = (self.replicas.clone(), self.pp.clone());
                let (other, options) = (self.other_end(group), self.options.clone());
                self.shard_mut(group)?.settle(&*replicas, other.map(|stage| (&*pp, stage)), &options)?;
            }
        }
        Ok(())
    }

    fn forward(&mut self, index: usize, batch: &TokenBatch, positions: &[Position]) -> Result<Flight<E>> {
        let tiles = self.tiles(batch, positions)?;
        let xs = self.enter(&tiles)?;
        let mut kept = Vec::new();
        let xs = self.forward_blocks(&tiles, xs, Some(&mut kept))?;
        let mut flight = Flight { index, rows: positions.len(), tiles, kept, outputs: Vec::new() };
        if self.stage.last {
            flight.outputs = xs;
        } else {
            self.pass_on(self.pp.rank() + 1, xs)?;
        }
        Ok(flight)
    }

    fn backward(&mut self, mut flight: Flight<E>, losses: &mut dyn Losses) -> Result<()> {
        let mut dy = if self.stage.last {
            let outputs = std::mem::take(&mut flight.outputs);
            let hidden_rh = self.hidden(&flight.tiles, &outputs, flight.rows)?;
            let mut dhidden_rh = Vec::new();
            losses.with(flight.index, &mut |loss| {
                dhidden_rh = self.head_pass(&hidden_rh, loss)?;
                Ok(())
            })?;
            self.norm_backward(&flight.tiles, outputs, &dhidden_rh)?
        } else {
            self.receive(self.pp.rank() + 1, &flight.tiles)?
        };
        for layer in self.stage.layers.clone().rev() {
            let saved = flight.kept.pop().unwrap_or_default();
            dy = self.block_backward(layer, &flight.tiles, saved, dy)?;
        }
        if !self.stage.first {
            return self.pass_on(self.pp.rank() - 1, dy);
        }
        let (mut grads, held) = self.shard(0)?.whole_grads(&self.whole_grads);
        for (tile, dy) in flight.tiles.iter().zip(dy) {
            self.engine.embed_vjp(&tile.ids, dy, &mut grads)?;
        }
        self.reduce(0, grads)?;
        drop(held);
        Ok(())
    }

    fn block_backward(
        &mut self,
        layer: usize,
        tiles: &[LocalTile<E>],
        saved: Vec<E::Saved>,
        dy: Vec<E::Tensor>,
    ) -> Result<Vec<E::Tensor>> {
        let group = 1 + layer;
        let ready = self.take_block(layer, true)?;
        let (mut grads, held) = self.shard(group)?.whole_grads(&self.whole_grads);
        let work = saved.into_iter().zip(dy).zip(tiles).map(|((saved, dy), tile)| BackwardTile {
            geometry: tile.geometry.clone(),
            b: tile.b,
            saved,
            dy,
        });
        let shard = self.shard(group)?;
        let params = ready.whole.as_ref().map_or(&[][..], |whole: &Whole| whole.values(shard));
        let own = shard.plan.len;
        let dx = self.engine.block_backward(&ready.device, params, work.collect(), &mut grads[..own])?;
        self.engine.join_block_grads(&mut grads[..own])?;
        if self.sharded {
            drop(ready);
        } else {
            self.blocks[layer] = Some(ready);
        }
        self.reduce(group, grads)?;
        drop(held);
        Ok(dx)
    }

    fn reduce(&mut self, group: usize, grads: Vec<f32>) -> Result<()> {
        let (later, options) = (self.settles_later(group), self.options.clone());
        self.shard_mut(group)?.reduce(grads, &options, later)
    }

    /// Backward through the final norm: the gradient at the last block's output, tile by tile.
    fn norm_backward(
        &mut self,
        tiles: &[LocalTile<E>],
        outputs: Vec<E::Tensor>,
        dhidden_rh: &[f32],
    ) -> Result<Vec<E::Tensor>> {
        let ready = self.ready_norm()?;
        let group = 1 + self.layers();
        let (engine, hidden) = (&self.engine, self.engine.config().hidden_size);
        let found = engine.run_lanes(tiles.len(), &|index| {
            let tile = &tiles[index];
            let dy_rh: Vec<f32> =
                tile.targets.iter().flat_map(|row| &dhidden_rh[row * hidden..(row + 1) * hidden]).copied().collect();
            engine.final_norm_vjp(&ready.device, outputs[index].clone(), &tile.wanted, &dy_rh)
        });
        let (mut grads, held) = self.shard(group)?.whole_grads(&self.whole_grads);
        let mut dx = Vec::with_capacity(tiles.len());
        for found in found {
            let (dx_tile, dnorm) = found?;
            grads.iter_mut().zip(dnorm).for_each(|(sum, value)| *sum += value);
            dx.push(dx_tile);
        }
        if !self.sharded {
            self.norm = Some(ready);
        }
        self.reduce(group, grads)?;
        drop(held);
        Ok(dx)
    }

    /// The head and the loss in chunks: from hidden states to their gradient, on every rank that shares the sequences.
    fn head_pass(&mut self, hidden_rh: &[f32], loss: &mut dyn HeadLoss) -> Result<Vec<f32>> {
        let ready = self.ready_head()?;
        let shard: VocabShard = self.vocab_shard();
        let hidden = self.engine.config().hidden_size;
        let (rows, chunk_rows) = (hidden_rh.len() / hidden, self.head_chunk_rows());
        let (group, own) = (self.head_group(), self.head_range());
        let mut logits_rv = std::mem::take(&mut self.logits_rv);
        let (mut grads, held) = self.shard(group)?.whole_grads(&self.whole_grads);
        let stored = self.shard(group)?;
        let values = ready.whole.as_ref().map_or(&[][..], |whole| &whole.values(stored)[own.clone()]);
        let chunks: Vec<_> = (0..rows).step_by(chunk_rows).map(|start| start..rows.min(start + chunk_rows)).collect();
        let part = |range: &std::ops::Range<usize>| &hidden_rh[range.start * hidden..range.end * hidden];
        let engine = &self.engine;
        if rows > 0 {
            loss.set_vocab_shard(&shard)?;
        }
        if loss.needs_first_pass() {
            for range in &chunks {
                engine.head(&ready.device, part(range), &mut logits_rv)?;
                loss.observe(range.clone(), &logits_rv)?;
            }
        }
        let mut dhidden_rh = Vec::with_capacity(hidden_rh.len());
        for range in &chunks {
            // With a single chunk the first pass's logits serve the second one too.
            if chunks.len() > 1 || !loss.needs_first_pass() {
                engine.head(&ready.device, part(range), &mut logits_rv)?;
            }
            loss.gradient(range.clone(), &mut logits_rv)?;
            dhidden_rh.extend(engine.head_vjp(
                &ready.device,
                values,
                part(range),
                &logits_rv,
                &mut grads[own.clone()],
            )?);
        }
        self.logits_rv = logits_rv;
        if rows > 0 && self.vocabulary.world() > 1 {
            self.vocabulary.all_reduce_sum(&mut dhidden_rh)?;
        }
        if !self.sharded {
            self.head = Some(ready);
        }
        self.reduce(group, grads)?;
        drop(held);
        Ok(dhidden_rh)
    }
}
