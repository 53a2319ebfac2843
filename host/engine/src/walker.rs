//! The walk over the blocks, written once for all engines: forward keeps each block's input only, backward re-runs a
//! block and takes its vector-Jacobian product. Master parameters and gradients lie on the host, flat, one buffer per
//! block; the device holds what was last made current.
//!
//! Gradients of tiles are added in the order of the tiles, whatever order they were computed in, so that a step's
//! result does not depend on the number of threads.

use std::ops::Range;
use std::sync::Mutex;

use crate::batch::{Position, TokenBatch};
use crate::block::BlockEngine;
use crate::model::{Decoder, HeadLoss, Model, ModelConfig, ParamSpec};
use crate::{EngineError, Result};

mod decoder;
mod tile;
use decoder::TransformerDecoder;
use tile::{Tile, plan};

/// Largest chunk of logits in memory.
const HEAD_CHUNK_BYTES_MAX: usize = 64 << 20;
/// Tiles whose gradients are held at a time before they are added up.
const WAVE_TILES: usize = 16;

/// Where a parameter lies in the buffers.
struct Place {
    group: usize,
    range: Range<usize>,
}

/// What the device holds.
struct OnDevice<E: BlockEngine> {
    embed: E::Table,
    blocks: Vec<E::Block>,
    norm: E::Norm,
    head: E::Table,
}

/// A model: an engine and the parameters it runs on.
pub struct Transformer<E: BlockEngine> {
    engine: E,
    specs: Vec<ParamSpec>,
    places: Vec<Place>,
    /// Master values: the embedding, each block, the norm, and the head unless tied.
    groups: Vec<Vec<f32>>,
    /// Gradients in the same layout; empty until the first backward, so that a frozen model pays nothing.
    grads: Vec<Vec<f32>>,
    /// Groups whose master values are newer than the device's.
    stale: Vec<bool>,
    device: OnDevice<E>,
}

impl<E: BlockEngine> Transformer<E> {
    /// A model from its parameters, `values` in the order of [`ModelConfig::params`].
    pub fn new(engine: E, values: Vec<Vec<f32>>) -> Result<Self> {
        let config = engine.config();
        let mut lists = vec![config.embed_params()];
        lists.extend((0..config.num_hidden_layers).map(|layer| config.block_params(layer)));
        lists.push(config.norm_params());
        lists.push(config.head_params());
        lists.retain(|list| !list.is_empty());
        let specs: Vec<ParamSpec> = lists.concat();
        if specs.len() != values.len() {
            return Err(EngineError::invalid(
                format!("the model has {} parameters, {} were given", specs.len(), values.len()),
                "",
            ));
        }
        let (mut groups, mut places) = (Vec::new(), Vec::new());
        let mut values = values.into_iter().zip(&specs);
        for (group, list) in lists.iter().enumerate() {
            let mut flat = Vec::with_capacity(list.iter().map(ParamSpec::len).sum());
            for (value, spec) in values.by_ref().take(list.len()) {
                check_len(spec, value.len())?;
                places.push(Place { group, range: flat.len()..flat.len() + value.len() });
                flat.extend_from_slice(&value);
            }
            groups.push(flat);
        }
        let layers = config.num_hidden_layers;
        let embed = engine.table(&groups[0]);
        let head = if config.tie_word_embeddings { embed.clone() } else { engine.table(&groups[layers + 2]) };
        let blocks = (0..layers).map(|layer| engine.block(&groups[1 + layer])).collect();
        let norm = engine.norm(&groups[1 + layers]);
        let stale = vec![false; groups.len()];
        let grads = vec![Vec::new(); groups.len()];
        Ok(Self { device: OnDevice { embed, blocks, norm, head }, engine, specs, places, groups, grads, stale })
    }

    fn layers(&self) -> usize {
        self.engine.config().num_hidden_layers
    }

    fn norm_group(&self) -> usize {
        1 + self.layers()
    }

    /// The head's buffer: the embedding's when tied.
    fn head_group(&self) -> usize {
        if self.engine.config().tie_word_embeddings { 0 } else { 2 + self.layers() }
    }

    /// Uploads what changed since the device was last current.
    fn refresh(&mut self) {
        let (layers, head_group) = (self.layers(), self.head_group());
        for group in 0..self.groups.len() {
            if !std::mem::take(&mut self.stale[group]) {
                continue;
            }
            let values = &self.groups[group];
            if group == 0 {
                self.device.embed = self.engine.table(values);
            } else if group <= layers {
                self.device.blocks[group - 1] = self.engine.block(values);
            } else if group == layers + 1 {
                self.device.norm = self.engine.norm(values);
            }
            if group == head_group {
                self.device.head = if group == 0 { self.device.embed.clone() } else { self.engine.table(values) };
            }
        }
    }

    /// The gradient buffer of `group`, made on first use.
    fn grads_of(&mut self, group: usize) -> &mut [f32] {
        let len = self.groups[group].len();
        let grads = &mut self.grads[group];
        grads.resize(len, 0.0);
        grads
    }

    fn add_grads(&mut self, group: usize, found: &[f32]) {
        for (sum, value) in self.grads_of(group).iter_mut().zip(found) {
            *sum += value;
        }
    }

    /// Geometries of the tiles, one for each length.
    fn geometries(&self, tiles: &[Tile]) -> Vec<E::Geometry> {
        let mut known: Vec<(usize, E::Geometry)> = Vec::new();
        tiles
            .iter()
            .map(|tile| match known.iter().find(|(t, _)| *t == tile.t) {
                Some((_, geometry)) => geometry.clone(),
                None => {
                    let geometry = self.engine.geometry(tile.t);
                    known.push((tile.t, geometry.clone()));
                    geometry
                }
            })
            .collect()
    }

    /// Hidden states of every tile's wanted positions, put where the caller's positions are.
    fn gather_hidden(&self, tiles: &[Tile], found: Vec<Result<Vec<f32>>>, rows: usize) -> Result<Vec<f32>> {
        let hidden = self.engine.config().hidden_size;
        let mut hidden_rh = vec![0.0; rows * hidden];
        for (tile, found) in tiles.iter().zip(found) {
            for (target, row) in tile.targets.iter().zip(found?.chunks_exact(hidden)) {
                hidden_rh[target * hidden..(target + 1) * hidden].copy_from_slice(row);
            }
        }
        Ok(hidden_rh)
    }

    /// The head and the loss in chunks: from hidden states to their gradient.
    fn head_pass(&mut self, hidden_rh: &[f32], loss: &mut dyn HeadLoss) -> Result<Vec<f32>> {
        let hidden = self.engine.config().hidden_size;
        let rows = hidden_rh.len() / hidden;
        let chunk_rows = self.head_chunk_rows();
        let chunks: Vec<Range<usize>> =
            (0..rows).step_by(chunk_rows).map(|start| start..rows.min(start + chunk_rows)).collect();
        let part = |range: &Range<usize>| &hidden_rh[range.start * hidden..range.end * hidden];
        // With a single chunk the first pass's logits serve the second one too.
        let mut kept = None;
        if loss.needs_first_pass() {
            for range in &chunks {
                let logits_rv = self.engine.head(&self.device.head, part(range))?;
                loss.observe(range.clone(), &logits_rv)?;
                kept = (chunks.len() == 1).then_some(logits_rv);
            }
        }
        let mut dhidden_rh = Vec::with_capacity(hidden_rh.len());
        let head_group = self.head_group();
        for range in &chunks {
            let mut logits_rv = match kept.take() {
                Some(logits_rv) => logits_rv,
                None => self.engine.head(&self.device.head, part(range))?,
            };
            loss.gradient(range.clone(), &mut logits_rv)?;
            let len = self.groups[head_group].len();
            self.grads[head_group].resize(len, 0.0);
            dhidden_rh.extend(self.engine.head_vjp(
                &self.device.head,
                part(range),
                logits_rv,
                &mut self.grads[head_group],
            )?);
        }
        Ok(dhidden_rh)
    }

    /// Forward of all tiles; for each, the input of every block and the output of the last.
    fn forward_keep(&self, tiles: &[Tile], geometries: &[E::Geometry]) -> Vec<Vec<E::Tensor>> {
        self.engine.run_lanes(tiles.len(), &|index| {
            let (tile, geometry) = (&tiles[index], &geometries[index]);
            let mut inputs = vec![self.engine.embed(&self.device.embed, &tile.ids)];
            for block in &self.device.blocks {
                let x = inputs[inputs.len() - 1].clone();
                inputs.push(self.engine.block_forward(block, geometry, tile.b(), x));
            }
            inputs
        })
    }

    /// Backward through the final norm: the gradient at the last block's output, tile by tile.
    fn norm_backward(&mut self, tiles: &[Tile], outputs: Vec<E::Tensor>, dhidden_rh: &[f32]) -> Result<Vec<E::Tensor>> {
        let hidden = self.engine.config().hidden_size;
        let found = self.engine.run_lanes(tiles.len(), &|index| {
            let tile = &tiles[index];
            let dy_rh =
                tile.targets.iter().flat_map(|row| &dhidden_rh[row * hidden..(row + 1) * hidden]).copied().collect();
            self.engine.final_norm_vjp(&self.device.norm, outputs[index].clone(), &tile.wanted, dy_rh)
        });
        let group = self.norm_group();
        found
            .into_iter()
            .map(|result| {
                let (dx, dnorm) = result?;
                self.add_grads(group, &dnorm);
                Ok(dx)
            })
            .collect()
    }

    /// Backward through one block, wave after wave of tiles.
    fn block_backward(
        &mut self,
        layer: usize,
        tiles: &[Tile],
        geometries: &[E::Geometry],
        pairs: Vec<(E::Tensor, E::Tensor)>,
    ) -> Result<Vec<E::Tensor>> {
        let mut dx = Vec::with_capacity(tiles.len());
        let pairs: Vec<Mutex<Option<_>>> = pairs.into_iter().map(|pair| Mutex::new(Some(pair))).collect();
        for first in (0..tiles.len()).step_by(WAVE_TILES) {
            let count = WAVE_TILES.min(tiles.len() - first);
            let found = self.engine.run_lanes(count, &|offset| {
                let index = first + offset;
                // Taken out, so that the engine owns its inputs and frees them as soon as it can.
                let pair = pairs[index].lock().ok().and_then(|mut pair| pair.take());
                let (x, dy) = pair.ok_or_else(|| EngineError::invalid("a tile was walked twice", ""))?;
                self.engine.block_vjp(&self.device.blocks[layer], &geometries[index], tiles[index].b(), x, dy)
            });
            for result in found {
                let (dx_tile, dparams) = result?;
                self.add_grads(1 + layer, &dparams);
                dx.push(dx_tile);
            }
        }
        Ok(dx)
    }
}

fn check_len(spec: &ParamSpec, found: usize) -> Result<()> {
    if spec.len() == found {
        return Ok(());
    }
    Err(EngineError::invalid(format!("`{}` has shape {:?}, {found} values were given", spec.name, spec.shape), ""))
}

impl<E: BlockEngine> Model for Transformer<E> {
    fn config(&self) -> &ModelConfig {
        self.engine.config()
    }

    fn params(&self) -> &[ParamSpec] {
        &self.specs
    }

    fn read_param(&self, index: usize) -> Vec<f32> {
        let place = &self.places[index];
        self.groups[place.group][place.range.clone()].to_vec()
    }

    fn write_param(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let count = self.specs.len();
        let spec =
            self.specs.get(index).ok_or_else(|| EngineError::invalid(format!("parameter {index} of {count}"), ""))?;
        check_len(spec, values.len())?;
        let place = &self.places[index];
        self.groups[place.group][place.range.clone()].copy_from_slice(values);
        self.stale[place.group] = true;
        Ok(())
    }

    fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>> {
        self.refresh();
        let tiles = plan(batch, positions, self.config(), self.engine.tile_tokens())?;
        let geometries = self.geometries(&tiles);
        let found = self.engine.run_lanes(tiles.len(), &|index| {
            let (tile, geometry) = (&tiles[index], &geometries[index]);
            let mut x = self.engine.embed(&self.device.embed, &tile.ids);
            for block in &self.device.blocks {
                x = self.engine.block_forward(block, geometry, tile.b(), x);
            }
            self.engine.final_norm(&self.device.norm, x, &tile.wanted)
        });
        self.gather_hidden(&tiles, found, positions.len())
    }

    fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.refresh();
        let hidden = self.config().hidden_size;
        if !hidden_rh.len().is_multiple_of(hidden) {
            return Err(EngineError::invalid(format!("{} hidden values are no rows of {hidden}", hidden_rh.len()), ""));
        }
        *out = if hidden_rh.is_empty() { Vec::new() } else { self.engine.head(&self.device.head, hidden_rh)? };
        Ok(())
    }

    fn head_chunk_rows(&self) -> usize {
        (HEAD_CHUNK_BYTES_MAX / (4 * self.config().vocab_size)).max(1)
    }

    fn forward_backward(&mut self, batch: &TokenBatch, positions: &[Position], loss: &mut dyn HeadLoss) -> Result<()> {
        self.refresh();
        let tiles = plan(batch, positions, self.config(), self.engine.tile_tokens())?;
        let geometries = self.geometries(&tiles);
        let mut kept = self.forward_keep(&tiles, &geometries);
        let outputs: Vec<E::Tensor> = kept.iter_mut().filter_map(Vec::pop).collect();
        let found = self.engine.run_lanes(tiles.len(), &|index| {
            self.engine.final_norm(&self.device.norm, outputs[index].clone(), &tiles[index].wanted)
        });
        let hidden_rh = self.gather_hidden(&tiles, found, positions.len())?;
        let dhidden_rh = self.head_pass(&hidden_rh, loss)?;
        let mut dy = self.norm_backward(&tiles, outputs, &dhidden_rh)?;
        for layer in (0..self.layers()).rev() {
            let pairs = kept.iter_mut().filter_map(Vec::pop).zip(dy).collect();
            dy = self.block_backward(layer, &tiles, &geometries, pairs)?;
        }
        let len = self.groups[0].len();
        self.grads[0].resize(len, 0.0);
        for (tile, dy) in tiles.iter().zip(dy) {
            self.engine.embed_vjp(&tile.ids, dy, &mut self.grads[0])?;
        }
        Ok(())
    }

    fn read_grad(&self, index: usize) -> Vec<f32> {
        let place = &self.places[index];
        match self.grads[place.group].get(place.range.clone()) {
            Some(grads) => grads.to_vec(),
            None => vec![0.0; place.range.len()],
        }
    }

    fn zero_grads(&mut self) {
        for grads in &mut self.grads {
            grads.fill(0.0);
        }
    }

    fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()> {
        for group in 0..self.groups.len() {
            self.grads_of(group);
        }
        for (index, place) in self.places.iter().enumerate() {
            let values = &mut self.groups[place.group][place.range.clone()];
            update(index, values, &mut self.grads[place.group][place.range.clone()]);
        }
        self.stale.fill(true);
        self.refresh();
        Ok(())
    }

    fn decoder(&mut self, slots: usize, capacity: usize) -> Result<Box<dyn Decoder + '_>> {
        self.refresh();
        Ok(Box::new(TransformerDecoder::new(self, slots, capacity)?))
    }
}

#[cfg(test)]
mod tests;
