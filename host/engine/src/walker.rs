//! The walk over the blocks, written once for all engines: forward keeps what the engine's backward can use within a bound,
//! and beyond it each block's input only, from which backward runs the block again. Master parameters and gradients lie on the host, flat, one buffer per
//! block; the device holds what was last made current.
//!
//! Gradients of tiles are added in the order of the tiles, whatever order they were computed in, so that a step's
//! result does not depend on the number of threads.

use std::ops::Range;

use cosmos_kernels::memory::Buffer;

use crate::batch::{Position, TokenBatch};
use crate::block::{BackwardTile, BlockEngine};
use crate::model::{Decoder, HeadLoss, Model, ModelConfig, ParamSpec, Updater, WeightFormat};
use crate::{EngineError, Result};

mod decoder;
pub mod footprint;
mod groups;
pub(crate) mod tile;
mod update;

use decoder::TransformerDecoder;
use groups::Groups;
use tile::{Tile, plan};
pub(crate) use update::FRUGAL_BYTES;

/// Bytes of activations that a forward keeps for its backward, beside each block's input.
pub const KEPT_BYTES_MAX: usize = 1 << 30;
/// Of a model whose parameters are large beside that, it keeps at most this part of their bytes: what is kept spares a
/// fraction of the step's time, and there memory is what decides whether a model can be trained at all.
const KEPT_PART_OF_PARAMS: usize = 16;
/// Bytes of weights up to which the second form of them that decoding reads may be there while training or scoring goes on,
/// which do without where [`BlockEngine::trains_on_masters`].
pub const SECOND_FORM_BYTES_MAX: usize = 256 << 20;

/// Where a parameter lies in the buffers.
struct Place {
    group: usize,
    range: Range<usize>,
}

/// A forward on its way to the backward.
struct Forward<E: BlockEngine> {
    tiles: Vec<Tile>,
    /// By tile.
    geometries: Vec<E::Geometry>,
    /// By tile: what each block keeps.
    kept: Vec<Vec<E::Saved>>,
    /// By tile: the last block's.
    outputs: Vec<E::Tensor>,
    /// The rows of the loss, in the caller's order.
    hidden_rh: Buffer,
}

impl<E: BlockEngine> Forward<E> {
    /// The tiles on their way back through the last block that is still there, `dy` being the gradients at its output.
    fn take_block(&mut self, dy: Vec<E::Tensor>) -> impl Iterator<Item = BackwardTile<E>> {
        let tiles = self.tiles.iter().zip(&self.geometries);
        let saved = self.kept.iter_mut().filter_map(Vec::pop);
        saved.zip(dy).zip(tiles).map(|((saved, dy), (tile, geometry))| BackwardTile {
            geometry: geometry.clone(),
            b: tile.b(),
            saved,
            dy,
        })
    }
}

/// What the device holds.
struct OnDevice<E: BlockEngine> {
    embed: E::Table,
    blocks: Vec<E::Block>,
    norm: E::Norm,
    /// None when tied to the embedding.
    head: Option<E::Table>,
}

impl<E: BlockEngine> OnDevice<E> {
    fn head(&self) -> &E::Table {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Uploads the groups that are `stale`, and marks them as fresh.
    fn refresh(&mut self, engine: &E, groups: &Groups, stale: &mut [bool]) {
        let layers = self.blocks.len();
        for (group, values) in groups.iter().enumerate() {
            if !std::mem::take(&mut stale[group]) {
                continue;
            }
            if group == 0 {
                engine.refresh_embedding(&mut self.embed, values);
            } else if group <= layers {
                engine.refresh_block(&mut self.blocks[group - 1], values);
            } else if group == layers + 1 {
                self.norm = engine.norm(values);
            } else if let Some(head) = &mut self.head {
                engine.refresh_table(head, values);
            }
        }
    }
}

/// A second form of the weights, which sequences are decoded with.
struct Decoding<E: BlockEngine> {
    engine: E,
    device: OnDevice<E>,
    /// Groups whose master values are newer than the copy's.
    stale: Vec<bool>,
}

/// Sets the values of a parameter, which is given by its number.
pub type Source<'a> = &'a mut dyn FnMut(usize, &ParamSpec, &mut [f32]) -> Result<()>;

/// A model: an engine and the parameters it runs on.
pub struct Transformer<E: BlockEngine> {
    engine: E,
    specs: Vec<ParamSpec>,
    places: Vec<Place>,
    /// Master values: the embedding, each block, the norm, and the head unless tied. Empty where the device holds them itself.
    groups: Groups,
    /// Gradients in the same layout; empty until the first backward, so that a frozen model pays nothing.
    grads: Vec<Vec<f32>>,
    /// Groups whose master values are newer than the device's.
    stale: Vec<bool>,
    /// Whether the gradients may be other than zero.
    accumulated: bool,
    /// Bytes of parameters from which on an update within the backward spares memory at the cost of time.
    frugal_bytes: usize,
    /// [`SECOND_FORM_BYTES_MAX`].
    second_form_bytes_max: usize,
    device: OnDevice<E>,
    /// None where decoding reads what training reads.
    decoding: Option<Decoding<E>>,
}

impl<E: BlockEngine> Transformer<E> {
    /// A model from its parameters, `values` in the order of [`ModelConfig::params`].
    pub fn new(engine: E, mut values: Vec<Vec<f32>>) -> Result<Self> {
        let expected = engine.config().params().len();
        if expected != values.len() {
            return Err(EngineError::invalid(
                format!("the model has {expected} parameters, {} were given", values.len()),
                "",
            ));
        }
        Self::from_source(engine, &mut |index, spec, to| {
            // Taken, so that no more than one parameter is there twice.
            let own = std::mem::take(&mut values[index]);
            check_len(spec, own.len())?;
            to.copy_from_slice(&own);
            Ok(())
        })
    }

    /// As [`Transformer::new`], asking for one parameter after the other, whose values `source` puts where they belong:
    /// what the device holds itself is never all there in f32.
    pub fn from_source(engine: E, source: Source<'_>) -> Result<Self> {
        let config = engine.config().clone();
        let layers = config.num_hidden_layers;
        // What training does not read is made when it is first asked for.
        let lazy = engine.trains_on_masters();
        let (mut specs, mut places) = (Vec::new(), Vec::new());
        let mut group = 0;
        let mut fill = |list: Vec<ParamSpec>, to: &mut [f32]| -> Result<()> {
            let mut end = 0;
            for spec in list {
                let range = end..end + spec.len();
                source(specs.len(), &spec, &mut to[range.clone()])?;
                end = range.end;
                places.push(Place { group, range });
                specs.push(spec);
            }
            group += 1;
            Ok(())
        };
        let len_of = |list: &[ParamSpec]| list.iter().map(ParamSpec::len).sum::<usize>();
        let held_embed = if engine.holds_embedding() { len_of(&config.embed_params()) } else { 0 };
        let mut groups = match engine.holds_blocks() {
            true => Groups::with_capacity(len_of(&config.embed_params()) - held_embed + len_of(&config.norm_params())),
            false => Groups::with_capacity(config.params().iter().map(ParamSpec::len).sum::<usize>() - held_embed),
        };
        // Adds a group and hands its values to `make`; where the device holds them, they are not kept.
        let mut next =
            |groups: &mut Groups, list: Vec<ParamSpec>, held: bool, make: &mut dyn FnMut(&[f32])| -> Result<()> {
                let len = len_of(&list);
                let mut passing = Buffer::dirty(if held { len } else { 0 });
                let own = groups.add(if held { 0 } else { len });
                let to = if held { &mut *passing } else { own };
                fill(list, to)?;
                make(to);
                Ok(())
            };
        let (mut embed, mut blocks, mut norm, mut head) = (None, Vec::with_capacity(layers), None, None);
        next(&mut groups, config.embed_params(), engine.holds_embedding(), &mut |flat| {
            embed = Some(if lazy { engine.no_table(flat) } else { engine.embedding(flat) });
        })?;
        for layer in 0..layers {
            next(&mut groups, config.block_params(layer), engine.holds_blocks(), &mut |flat| {
                blocks.push(if lazy { engine.no_block(flat) } else { engine.block(flat) });
            })?;
        }
        next(&mut groups, config.norm_params(), false, &mut |flat| norm = Some(engine.norm(flat)))?;
        if !config.tie_word_embeddings {
            next(&mut groups, config.head_params(), engine.holds_blocks(), &mut |flat| {
                head = Some(if lazy { engine.no_table(flat) } else { engine.table(flat) });
            })?;
        }
        let (Some(embed), Some(norm)) = (embed, norm) else {
            return Err(EngineError::invalid("the model has no embedding or no norm", ""));
        };
        let stale = vec![lazy; groups.len()];
        let grads = vec![Vec::new(); groups.len()];
        let device = OnDevice { embed, blocks, norm, head };
        Ok(Self {
            device,
            engine,
            specs,
            places,
            groups,
            grads,
            stale,
            accumulated: false,
            frugal_bytes: FRUGAL_BYTES,
            second_form_bytes_max: SECOND_FORM_BYTES_MAX,
            decoding: None,
        })
    }

    /// What sequences are decoded with.
    fn decoding(&self) -> (&E, &OnDevice<E>) {
        self.decoding.as_ref().map_or((&self.engine, &self.device), |copy| (&copy.engine, &copy.device))
    }

    /// Whether the device holds the values of `group` itself.
    fn is_held(&self, group: usize) -> bool {
        match group {
            0 => self.engine.holds_embedding(),
            _ => group != self.norm_group() && self.engine.holds_blocks(),
        }
    }

    /// Refuses to train a model without master values.
    fn check_trainable(&self) -> Result<()> {
        if self.engine.holds_blocks() {
            return Err(EngineError::invalid(
                "a model that was loaded to be read only cannot be trained",
                "load it with f32 weights",
            ));
        }
        Ok(())
    }

    /// Marks a group's master values as newer than what was made of them.
    fn outdate(&mut self, group: usize) {
        self.stale[group] = true;
        if let Some(copy) = &mut self.decoding {
            copy.stale[group] = true;
        }
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
        self.device.refresh(&self.engine, &self.groups, &mut self.stale);
    }

    /// Whether scoring reads the master values, as training does, although products take a little longer there.
    fn scores_on_masters(&self) -> bool {
        self.engine.trains_on_masters() && self.params_bytes() > self.second_form_bytes_max
    }

    /// Makes ready what scoring reads.
    fn prepare_scoring(&mut self) {
        if self.scores_on_masters() { self.prepare_training() } else { self.refresh() }
    }

    /// Makes ready what forward and backward read.
    fn prepare_training(&mut self) {
        if !self.engine.trains_on_masters() {
            return self.refresh();
        }
        let norm = self.norm_group();
        if std::mem::take(&mut self.stale[norm]) {
            self.device.norm = self.engine.norm(&self.groups[norm]);
        }
        if self.device_bytes() > self.second_form_bytes_max {
            self.device.embed = self.engine.no_table(&self.groups[0]);
            for (block, flat) in self.device.blocks.iter_mut().zip(self.groups.iter().skip(1)) {
                *block = self.engine.no_block(flat);
            }
            if let Some(head) = &mut self.device.head {
                *head = self.engine.no_table(&self.groups[norm + 1]);
            }
            self.stale.fill(true);
            self.stale[norm] = false;
        }
    }

    /// Bytes of tables and blocks on the device.
    fn device_bytes(&self) -> usize {
        let (engine, device) = (&self.engine, &self.device);
        let tables = [Some((&device.embed, 0)), device.head.as_ref().map(|head| (head, self.norm_group() + 1))];
        let tables =
            tables.into_iter().flatten().map(|(table, group)| engine.table_bytes(table, self.groups[group].len()));
        let blocks = device.blocks.iter().zip(self.groups.iter().skip(1));
        tables.sum::<usize>() + blocks.map(|(block, flat)| engine.block_bytes(block, flat.len())).sum::<usize>()
    }

    /// Bytes of activations to keep between forward and backward.
    fn kept_bytes_max(&self) -> usize {
        let params = self.params_bytes();
        KEPT_BYTES_MAX.min((params / KEPT_PART_OF_PARAMS).max(KEPT_BYTES_MAX / 4))
    }

    /// Bytes of the master values.
    fn params_bytes(&self) -> usize {
        self.groups.bytes()
    }

    /// The gradient buffer of `group`, for as long as it is written to.
    fn take_grads(&mut self, group: usize) -> Vec<f32> {
        let mut grads = std::mem::take(&mut self.grads[group]);
        grads.resize(self.groups[group].len(), 0.0);
        grads
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
    fn gather_hidden(&self, tiles: &[Tile], found: Vec<Result<Buffer>>, rows: usize) -> Result<Buffer> {
        let hidden = self.engine.config().hidden_size;
        let mut hidden_rh = Buffer::zeros(rows * hidden);
        for (tile, found) in tiles.iter().zip(found) {
            for (target, row) in tile.targets.iter().zip(found?.chunks_exact(hidden)) {
                hidden_rh[target * hidden..(target + 1) * hidden].copy_from_slice(row);
            }
        }
        Ok(hidden_rh)
    }

    /// Memory for the logits of at most `chunk_rows` of `rows`.
    fn logits_memory(&self, rows: usize, chunk_rows: usize) -> Buffer {
        Buffer::dirty(rows.min(chunk_rows) * self.engine.config().vocab_size)
    }

    /// The loss's first pass over the logits, where it needs one. Leaves the last chunk's in `logits_rv`.
    fn observe(
        &self,
        hidden_rh: &[f32],
        loss: &mut dyn HeadLoss,
        chunk_rows: usize,
        logits_rv: &mut [f32],
    ) -> Result<()> {
        let hidden = self.engine.config().hidden_size;
        if loss.needs_first_pass() {
            for range in chunks(hidden_rh.len() / hidden, chunk_rows) {
                let part_rh = &hidden_rh[range.start * hidden..range.end * hidden];
                loss.observe(range, self.training_logits(part_rh, logits_rv)?)?;
            }
        }
        Ok(())
    }

    /// The head and the loss in chunks: from hidden states to their gradient. That at the head's matrix is added to `grads`.
    fn head_pass(&mut self, hidden_rh: &[f32], loss: &mut dyn HeadLoss, grads: &mut [f32]) -> Result<Buffer> {
        let hidden = self.engine.config().hidden_size;
        let (rows, chunk_rows) = (hidden_rh.len() / hidden, self.head_chunk_rows());
        let mut logits_rv = self.logits_memory(rows, chunk_rows);
        self.observe(hidden_rh, loss, chunk_rows, &mut logits_rv)?;
        let chunks = chunks(rows, chunk_rows);
        let mut dhidden_rh = Buffer::dirty(hidden_rh.len());
        for range in &chunks {
            let at = range.start * hidden..range.end * hidden;
            let part_rh = &hidden_rh[at.clone()];
            // With a single chunk the first pass's logits serve the second one too.
            let logits_rv = match chunks.len() > 1 || !loss.needs_first_pass() {
                true => self.training_logits(part_rh, &mut logits_rv)?,
                false => &mut logits_rv,
            };
            loss.gradient(range.clone(), logits_rv)?;
            let values = &self.groups[self.head_group()];
            let part = self.engine.head_vjp(self.device.head(), values, part_rh, logits_rv, grads)?;
            dhidden_rh[at].copy_from_slice(&part);
        }
        Ok(dhidden_rh)
    }

    /// Logits of a chunk of rows, in as much of `memory` as they take.
    fn training_logits<'m>(&self, hidden_rh: &[f32], memory: &'m mut [f32]) -> Result<&'m mut [f32]> {
        let config = self.engine.config();
        let logits_rv = &mut memory[..hidden_rh.len() / config.hidden_size * config.vocab_size];
        let values = &self.groups[self.head_group()];
        self.engine.head_of_masters(self.device.head(), values, hidden_rh, logits_rv)?;
        Ok(logits_rv)
    }

    /// Forward up to the head, keeping activations beside each block's input unless memory is to be spared.
    fn forward(&mut self, batch: &TokenBatch, positions: &[Position], frugal: bool) -> Result<Forward<E>> {
        self.prepare_training();
        let tiles = plan(batch, positions, self.config(), self.engine.tile_tokens())?;
        let geometries = self.geometries(&tiles);
        let kept = self.forward_keep(&tiles, &geometries, frugal)?;
        let (kept, outputs): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
        let found = self.engine.run_lanes(tiles.len(), &|index| {
            self.engine.final_norm(&self.device.norm, outputs[index].clone(), &tiles[index].wanted)
        });
        let hidden_rh = self.gather_hidden(&tiles, found, positions.len())?;
        Ok(Forward { tiles, geometries, kept, outputs, hidden_rh })
    }

    /// Forward of all tiles: what each block keeps, and the output of the last.
    #[allow(clippy::type_complexity)] // a tile's two results
    fn forward_keep(
        &self,
        tiles: &[Tile],
        geometries: &[E::Geometry],
        frugal: bool,
    ) -> Result<Vec<(Vec<E::Saved>, E::Tensor)>> {
        let tokens: usize = tiles.iter().map(|tile| tile.ids.len()).sum();
        let block_bytes = (self.engine.saved_bytes() * tokens).max(1);
        // The last blocks first: theirs is freed before the walk back comes to the others.
        let recomputed = self.layers().saturating_sub(if frugal { 0 } else { self.kept_bytes_max() / block_bytes });
        let masters = self.engine.trains_on_masters();
        let each = |index: usize| {
            let (tile, geometry) = (&tiles[index], &geometries[index]);
            let mut x = self.engine.embed(&self.device.embed, &self.groups[0], &tile.ids)?;
            let mut kept = Vec::with_capacity(self.layers());
            for (layer, block) in self.device.blocks.iter().enumerate() {
                let (params, whole) = (masters.then(|| &self.groups[1 + layer]), layer >= recomputed);
                let (y, saved) = self.engine.block_forward_keep(block, params, geometry, tile.b(), x, whole)?;
                // The first block's input costs nothing to make again.
                if !frugal || layer > 0 {
                    kept.push(saved);
                }
                x = y;
            }
            Ok((kept, x))
        };
        match frugal {
            // One after the other, so that only one is within a block.
            true => (0..tiles.len()).flat_map(|tile| self.engine.run_lanes(1, &|_| each(tile))).collect(),
            false => self.engine.run_lanes(tiles.len(), &each).into_iter().collect(),
        }
    }

    /// Backward through the final norm: the gradient at the last block's output, tile by tile.
    fn norm_backward(&mut self, forward: &mut Forward<E>, dhidden_rh: &[f32]) -> Result<Vec<E::Tensor>> {
        let hidden = self.engine.config().hidden_size;
        let (tiles, outputs) = (&forward.tiles, std::mem::take(&mut forward.outputs));
        let found = self.engine.run_lanes(tiles.len(), &|index| {
            let tile = &tiles[index];
            let mut dy_rh = Buffer::dirty(tile.targets.len() * hidden);
            for (dy, row) in dy_rh.chunks_exact_mut(hidden).zip(&tile.targets) {
                dy.copy_from_slice(&dhidden_rh[row * hidden..(row + 1) * hidden]);
            }
            self.engine.final_norm_vjp(&self.device.norm, outputs[index].clone(), &tile.wanted, &dy_rh)
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

    /// Backward through the last block that `forward` still has, `tiles_max` tiles at a time: the gradient at its input. That
    /// at its parameters is added to `grads`.
    fn block_backward(
        &self,
        layer: usize,
        forward: &mut Forward<E>,
        dy: Vec<E::Tensor>,
        tiles_max: usize,
        grads: &mut [f32],
    ) -> Result<Vec<E::Tensor>> {
        let tiles = forward.tiles.len();
        let mut work = forward.take_block(dy);
        let (block, params) = (&self.device.blocks[layer], &self.groups[1 + layer]);
        let mut dx = Vec::with_capacity(tiles);
        loop {
            let part: Vec<_> = work.by_ref().take(tiles_max).collect();
            if part.is_empty() {
                return Ok(dx);
            }
            dx.extend(self.engine.block_backward(block, params, part, grads)?);
        }
    }
}

/// Rows that the head takes at a time.
fn chunks(rows: usize, chunk_rows: usize) -> Vec<Range<usize>> {
    (0..rows).step_by(chunk_rows.max(1)).map(|start| start..rows.min(start + chunk_rows)).collect()
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
        let Place { group, range } = &self.places[index];
        let (held, layers) = (self.is_held(*group), self.layers());
        match *group {
            0 if held => self.engine.read_table(&self.device.embed),
            group if held && group <= layers => self.engine.read_block(&self.device.blocks[group - 1], range.clone()),
            _ if held => self.engine.read_table(self.device.head()),
            group => self.groups[group][range.clone()].to_vec(),
        }
    }

    fn write_param(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let count = self.specs.len();
        let spec =
            self.specs.get(index).ok_or_else(|| EngineError::invalid(format!("parameter {index} of {count}"), ""))?;
        check_len(spec, values.len())?;
        let Place { group, range } = &self.places[index];
        let (group, range) = (*group, range.clone());
        if !self.is_held(group) {
            self.groups[group][range].copy_from_slice(values);
            self.outdate(group);
        } else if group == 0 {
            self.engine.refresh_embedding(&mut self.device.embed, values);
        } else if group <= self.layers() {
            self.engine.write_block(&mut self.device.blocks[group - 1], range.start, values);
        } else if let Some(head) = &mut self.device.head {
            self.engine.refresh_table(head, values);
        }
        Ok(())
    }

    fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>> {
        self.prepare_scoring();
        let masters = self.scores_on_masters();
        let tiles = plan(batch, positions, self.config(), self.engine.tile_tokens())?;
        let geometries = self.geometries(&tiles);
        let found = self.engine.run_lanes(tiles.len(), &|index| {
            let (tile, geometry) = (&tiles[index], &geometries[index]);
            let mut x = self.engine.embed(&self.device.embed, &self.groups[0], &tile.ids)?;
            for (layer, block) in self.device.blocks.iter().enumerate() {
                let params = masters.then(|| &self.groups[1 + layer]);
                x = self.engine.block_forward(block, params, geometry, tile.b(), x)?;
            }
            self.engine.final_norm(&self.device.norm, x, &tile.wanted)
        });
        Ok(self.gather_hidden(&tiles, found, positions.len())?.to_vec())
    }

    fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.prepare_scoring();
        let hidden = self.config().hidden_size;
        if !hidden_rh.len().is_multiple_of(hidden) {
            return Err(EngineError::invalid(format!("{} hidden values are no rows of {hidden}", hidden_rh.len()), ""));
        }
        if hidden_rh.is_empty() {
            out.clear();
            return Ok(());
        }
        if !self.scores_on_masters() {
            return self.engine.head(self.device.head(), hidden_rh, out);
        }
        // Every number is overwritten, so the old ones may stay.
        out.resize(hidden_rh.len() / hidden * self.config().vocab_size, 0.0);
        self.engine.head_of_masters(self.device.head(), &self.groups[self.head_group()], hidden_rh, out)
    }

    fn head_chunk_rows(&self) -> usize {
        self.engine.head_chunk_rows()
    }

    fn forward_backward(&mut self, batch: &TokenBatch, positions: &[Position], loss: &mut dyn HeadLoss) -> Result<()> {
        self.check_trainable()?;
        self.accumulated = true;
        let mut forward = self.forward(batch, positions, false)?;
        let head = self.head_group();
        let mut grads = self.take_grads(head);
        let dhidden_rh = self.head_pass(&forward.hidden_rh, loss, &mut grads);
        self.grads[head] = grads;
        let mut dy = self.norm_backward(&mut forward, &dhidden_rh?)?;
        for layer in (0..self.layers()).rev() {
            let mut grads = self.take_grads(1 + layer);
            let dx = self.block_backward(layer, &mut forward, dy, usize::MAX, &mut grads);
            self.grads[1 + layer] = grads;
            dy = dx?;
        }
        let len = self.groups[0].len();
        self.grads[0].resize(len, 0.0);
        for (tile, dy) in forward.tiles.iter().zip(dy) {
            self.engine.embed_vjp(&tile.ids, dy, &mut self.grads[0])?;
        }
        Ok(())
    }

    fn updates_in_backward(&self) -> bool {
        !self.engine.holds_blocks()
    }

    fn forward_backward_update(
        &mut self,
        batch: &TokenBatch,
        positions: &[Position],
        loss: &mut dyn HeadLoss,
        updater: &mut dyn Updater,
    ) -> Result<bool> {
        self.backward_update(batch, positions, loss, updater)
    }

    fn read_grad(&self, index: usize) -> Vec<f32> {
        let place = &self.places[index];
        match self.grads[place.group].get(place.range.clone()) {
            Some(grads) => grads.to_vec(),
            None => vec![0.0; place.range.len()],
        }
    }

    fn visit_grads(&self, visit: &mut dyn FnMut(usize, &[f32])) {
        for (index, place) in self.places.iter().enumerate() {
            // A gradient that was never computed is zero.
            if let Some(grads) = self.grads[place.group].get(place.range.clone()) {
                visit(index, grads);
            }
        }
    }

    fn zero_grads(&mut self) {
        self.accumulated = false;
        self.grads.iter_mut().for_each(|grads| update::clear(grads));
    }

    fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()> {
        self.check_trainable()?;
        for group in 0..self.groups.len() {
            self.grads_of(group);
        }
        for (index, place) in self.places.iter().enumerate() {
            let values = &mut self.groups[place.group][place.range.clone()];
            update(index, values, &mut self.grads[place.group][place.range.clone()]);
        }
        (0..self.groups.len()).for_each(|group| self.outdate(group));
        if !self.engine.trains_on_masters() {
            self.refresh();
        }
        Ok(())
    }

    fn decode_in(&mut self, format: WeightFormat) -> Result<()> {
        self.check_trainable()?;
        self.decoding = None;
        if format == WeightFormat::F32 {
            return Ok(());
        }
        let engine = self.engine.in_format(format)?;
        let (layers, groups) = (self.layers(), &self.groups);
        let device = OnDevice {
            embed: engine.embedding(&groups[0]),
            blocks: groups.iter().skip(1).take(layers).map(|flat| engine.block(flat)).collect(),
            norm: engine.norm(&groups[1 + layers]),
            head: (groups.len() > 2 + layers).then(|| engine.table(&groups[2 + layers])),
        };
        self.decoding = Some(Decoding { engine, device, stale: vec![false; groups.len()] });
        Ok(())
    }

    fn decoder(&mut self, slots: usize, capacity: usize) -> Result<Box<dyn Decoder + '_>> {
        match &mut self.decoding {
            Some(copy) => copy.device.refresh(&copy.engine, &self.groups, &mut copy.stale),
            None => self.refresh(),
        }
        Ok(Box::new(TransformerDecoder::new(self, slots, capacity)?))
    }
}

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod update_tests;
