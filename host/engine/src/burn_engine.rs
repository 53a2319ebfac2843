//! The reference engine: model families written with Burn's tensors, backward by its autodiff, block by block. Every
//! Burn device runs it, and every other engine is checked against it.
//!
//! Incremental decoding keeps keys and values on the host and attends there ([`attend`]): a token's result then depends
//! on its own sequence only, bit for bit, whatever is decoded beside it.

use std::path::Path;
use std::sync::{Mutex, RwLock};

use burn::tensor::{Device, Int, Tensor, TensorData};
use cosmos_kernels::memory::Buffer;

use crate::block::{BackwardTile, BlockEngine, DecodeRow};
use crate::model::{Model, ModelConfig};
use crate::rope::{self, Rope};
use crate::walker::Transformer;
use crate::{EngineError, Result, weights};

mod attend;
mod device;
mod lanes;
mod network;
use lanes::Lanes;
use network::{BlockParams, Shapes};

/// Tokens of a tile on the CPU: its activations stay within a core's cache.
const TILE_TOKENS_CPU: usize = 768;
/// Tokens of a tile on a GPU, which wants large matrices.
const TILE_TOKENS_GPU: usize = 16 * 1024;
/// Largest chunk of logits in memory.
const HEAD_CHUNK_BYTES_MAX: usize = 64 << 20;
/// Tiles whose gradients are held at a time before they are added up.
const WAVE_TILES: usize = 16;
/// Incremental steps are padded to a multiple of this many rows.
const DECODE_ROWS: usize = 16;

/// A model on `device` from a Hugging Face folder.
pub fn load(folder: &Path, device: &str) -> Result<Box<dyn Model>> {
    let config = ModelConfig::from_folder(folder)?;
    let engine = BurnEngine::new(config, device)?;
    let values = weights::read(folder, &engine.config)?;
    Ok(Box::new(Transformer::new(engine, values)?))
}

/// A model on `device` with fresh weights from `seed`.
pub fn random(config: &ModelConfig, device: &str, seed: u64) -> Result<Box<dyn Model>> {
    config.check().map_err(|message| EngineError::invalid(message, ""))?;
    let engine = BurnEngine::new(config.clone(), device)?;
    let values = weights::random(config, seed);
    Ok(Box::new(Transformer::new(engine, values)?))
}

/// Burn on one device.
pub struct BurnEngine {
    config: ModelConfig,
    shapes: Shapes,
    device: Device,
    on_cpu: bool,
    lanes: Lanes,
    rope: Rope,
    /// The rotation by a quarter turn of every head: see [`rope::half_turn`].
    half_turn: Tensor<2>,
    /// The last geometries made, newest last.
    geometries: RwLock<Vec<(usize, Geometry)>>,
}

/// What the blocks share for tiles of one length.
#[derive(Clone)]
pub struct Geometry {
    /// Cosines and sines, `[1, t, 1, head_dim]`.
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// 0 where a position may look, a large negative number elsewhere: `[1, 1, 1, t, t]`.
    mask: Tensor<5>,
}

/// Keys and values of one sequence in one block, `[tokens, kv heads · head_dim]` each.
pub struct HostKv {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Geometries kept for lengths that come again.
const GEOMETRIES_MAX: usize = 64;

impl BurnEngine {
    /// The engine on a device string such as `burn:flex`.
    pub fn new(config: ModelConfig, device: &str) -> Result<Self> {
        let found = device::open(device)?;
        let shapes = Shapes::of(&config);
        let rope = Rope::new(&config);
        let half_turn = Tensor::from_data(
            TensorData::new(rope::half_turn(config.head_dim), [config.head_dim, config.head_dim]),
            &found.device,
        );
        let lanes = Lanes::new(if found.on_cpu { lanes::available() } else { 1 })?;
        Ok(Self {
            config,
            shapes,
            device: found.device,
            on_cpu: found.on_cpu,
            lanes,
            rope,
            half_turn,
            geometries: RwLock::new(Vec::new()),
        })
    }

    fn matrix(&self, values: Vec<f32>, rows: usize, columns: usize) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, [rows, columns]), &self.device)
    }

    fn hidden_rows(&self, values: &[f32]) -> Tensor<2> {
        let hidden = self.config.hidden_size;
        self.matrix(values.to_vec(), values.len() / hidden, hidden)
    }

    fn indices(&self, ids: &[u32]) -> Tensor<1, Int> {
        let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        let len = ids.len();
        Tensor::from_data(TensorData::new(ids, [len]), &self.device)
    }

    fn make_geometry(&self, t: usize) -> Geometry {
        let dim = self.config.head_dim;
        let positions: Vec<usize> = (0..t).collect();
        let (cos, sin) = self.rope.tables(&positions);
        let table = |values| Tensor::from_data(TensorData::new(values, [1, t, 1, dim]), &self.device);
        let mut mask = vec![0.0f32; t * t];
        for (query, row) in mask.chunks_exact_mut(t).enumerate() {
            row[query + 1..].fill(network::MASKED);
        }
        Geometry {
            cos: table(cos),
            sin: table(sin),
            mask: Tensor::from_data(TensorData::new(mask, [1, 1, 1, t, t]), &self.device),
        }
    }
}

impl BurnEngine {
    /// Re-runs the block at input `x` and takes its vector-Jacobian product: the gradient at the input, and that of the
    /// parameters as one flat slice.
    fn block_vjp(
        &self,
        block: &BlockParams,
        geometry: &Geometry,
        b: usize,
        x: Tensor<2>,
        dy: Tensor<2>,
    ) -> Result<(Tensor<2>, Vec<f32>)> {
        let block = block.tracked();
        let x = x.autodiff().require_grad();
        let y = network::block(&block, &self.shapes, geometry, &self.half_turn, b, x.clone());
        // Burn has no backward from a given gradient; the sum of products has `dy` as its gradient at `y`.
        let mut grads = (y * dy).sum().backward();
        let dx = x.grad_remove(&mut grads).ok_or_else(no_gradient)?;
        Ok((dx, block.flat_grads(&mut grads)?))
    }
}

/// A tensor's values on the host.
fn to_host<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|e| EngineError::invalid(format!("the device gave no result: {e:?}"), "see the device's own log"))
}

impl BlockEngine for BurnEngine {
    type Tensor = Tensor<2>;
    type Table = Tensor<2>;
    type Block = BlockParams;
    type Norm = Tensor<1>;
    type Geometry = Geometry;
    type Saved = Tensor<2>;
    type Kv = HostKv;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tile_tokens(&self) -> usize {
        if self.on_cpu { TILE_TOKENS_CPU } else { TILE_TOKENS_GPU }
    }

    fn lanes(&self) -> usize {
        self.lanes.count()
    }

    fn run_lanes<R: Send>(&self, count: usize, work: &(dyn Fn(usize) -> R + Sync)) -> Vec<R> {
        self.lanes.run(count, work)
    }

    fn head_chunk_rows(&self) -> usize {
        (HEAD_CHUNK_BYTES_MAX / (4 * self.config.vocab_size)).max(1)
    }

    fn table(&self, values: &[f32]) -> Tensor<2> {
        self.hidden_rows(values)
    }

    fn table_bytes(&self, _table: &Tensor<2>, len: usize) -> usize {
        4 * len
    }

    fn block_bytes(&self, _block: &BlockParams, len: usize) -> usize {
        4 * len
    }

    fn activations(&self, values: &[f32]) -> Tensor<2> {
        self.hidden_rows(values)
    }

    fn values(&self, x: Tensor<2>) -> Result<Vec<f32>> {
        to_host(x)
    }

    fn block(&self, flat: &[f32]) -> BlockParams {
        BlockParams::from_flat(&self.config, flat, &self.device)
    }

    fn norm(&self, values: &[f32]) -> Tensor<1> {
        Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &self.device)
    }

    fn geometry(&self, t: usize) -> Geometry {
        if let Ok(known) = self.geometries.read()
            && let Some((_, geometry)) = known.iter().find(|(known_t, _)| *known_t == t)
        {
            return geometry.clone();
        }
        let geometry = self.make_geometry(t);
        if let Ok(mut known) = self.geometries.write() {
            if known.len() >= GEOMETRIES_MAX {
                known.remove(0);
            }
            known.push((t, geometry.clone()));
        }
        geometry
    }

    fn embed(&self, table: &Tensor<2>, _values: &[f32], ids: &[u32]) -> Result<Tensor<2>> {
        Ok(table.clone().select(0, self.indices(ids)))
    }

    fn embed_vjp(&self, ids: &[u32], dy: Tensor<2>, grads: &mut [f32]) -> Result<()> {
        let hidden = self.config.hidden_size;
        for (id, dy_h) in ids.iter().zip(to_host(dy)?.chunks_exact(hidden)) {
            let row = &mut grads[*id as usize * hidden..][..hidden];
            for (sum, value) in row.iter_mut().zip(dy_h) {
                *sum += value;
            }
        }
        Ok(())
    }

    fn saved_bytes(&self) -> usize {
        0
    }

    fn block_forward_keep(
        &self,
        block: &BlockParams,
        _params: Option<&[f32]>,
        geometry: &Geometry,
        b: usize,
        x: Tensor<2>,
        _whole: bool,
    ) -> Result<(Tensor<2>, Tensor<2>)> {
        Ok((network::block(block, &self.shapes, geometry, &self.half_turn, b, x.clone()), x))
    }

    fn saved_input(&self, x: Tensor<2>) -> Tensor<2> {
        x
    }

    fn block_backward(
        &self,
        block: &BlockParams,
        _params: &[f32],
        tiles: Vec<BackwardTile<Self>>,
        grads: &mut [f32],
    ) -> Result<Vec<Tensor<2>>> {
        let mut dx = Vec::with_capacity(tiles.len());
        let tiles: Vec<Mutex<Option<_>>> = tiles.into_iter().map(|tile| Mutex::new(Some(tile))).collect();
        for wave in tiles.chunks(WAVE_TILES) {
            let found = self.run_lanes(wave.len(), &|index| {
                // Taken out, so that autodiff owns its inputs and frees them as soon as it can.
                let tile = wave[index].lock().ok().and_then(|mut tile| tile.take());
                let tile = tile.ok_or_else(|| EngineError::invalid("a tile was walked twice", ""))?;
                self.block_vjp(block, &tile.geometry, tile.b, tile.saved, tile.dy)
            });
            for result in found {
                let (dx_tile, dparams) = result?;
                grads.iter_mut().zip(dparams).for_each(|(sum, value)| *sum += value);
                dx.push(dx_tile);
            }
        }
        Ok(dx)
    }

    fn final_norm(&self, norm: &Tensor<1>, x: Tensor<2>, rows: &[u32]) -> Result<Buffer> {
        let found_rh = to_host(network::rms_norm(x.select(0, self.indices(rows)), norm, self.shapes.eps))?;
        Ok(Buffer::of(&found_rh))
    }

    fn final_norm_vjp(
        &self,
        norm: &Tensor<1>,
        x: Tensor<2>,
        rows: &[u32],
        dy_rh: &[f32],
    ) -> Result<(Tensor<2>, Vec<f32>)> {
        let norm = norm.clone().autodiff().require_grad();
        let x = x.autodiff().require_grad();
        let y = network::rms_norm(x.clone().select(0, self.indices(rows)), &norm, self.shapes.eps);
        let dy = self.matrix(dy_rh.to_vec(), rows.len(), self.config.hidden_size);
        let mut grads = (y * dy).sum().backward();
        let dx = x.grad_remove(&mut grads).ok_or_else(no_gradient)?;
        let dnorm = norm.grad_remove(&mut grads).ok_or_else(no_gradient)?;
        Ok((dx, to_host(dnorm)?))
    }

    fn head(&self, table: &Tensor<2>, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        *out = to_host(self.hidden_rows(hidden_rh).matmul(table.clone().transpose()))?;
        Ok(())
    }

    fn head_vjp(
        &self,
        table: &Tensor<2>,
        _values: &[f32],
        hidden_rh: &[f32],
        dlogits_rv: &[f32],
        grads: &mut [f32],
    ) -> Result<Vec<f32>> {
        let rows = hidden_rh.len() / self.config.hidden_size;
        let dlogits = self.matrix(dlogits_rv.to_vec(), rows, self.config.vocab_size);
        let dtable = dlogits.clone().transpose().matmul(self.hidden_rows(hidden_rh));
        for (sum, value) in grads.iter_mut().zip(to_host(dtable)?) {
            *sum += value;
        }
        to_host(dlogits.matmul(table.clone()))
    }

    fn kv(&self, _capacity: usize) -> HostKv {
        // Grows with the sequence: most completions end long before their limit.
        HostKv { keys: Vec::new(), values: Vec::new() }
    }

    fn kv_clear(&self, kv: &mut HostKv) {
        kv.keys.clear();
        kv.values.clear();
    }

    fn kv_copy(&self, from: &HostKv, to: &mut HostKv) {
        to.keys.clone_from(&from.keys);
        to.values.clone_from(&from.values);
    }

    fn decode_rows(&self, rows: usize) -> usize {
        // The matrix crate takes another summation order for results of at most 256 numbers.
        let least = 256 / self.shapes.narrowest + 1;
        rows.max(least).next_multiple_of(DECODE_ROWS)
    }

    fn blocks_decode(
        &self,
        blocks: &[BlockParams],
        kv: &mut [&mut [HostKv]],
        rows: &[DecodeRow],
        wanted: &[u32],
        mut x: Tensor<2>,
    ) -> Result<(Tensor<2>, Vec<u32>)> {
        for (block, kv) in blocks.iter().zip(kv) {
            x = self.block_decode(block, kv, rows, x)?;
        }
        Ok((x, wanted.to_vec()))
    }
}

impl BurnEngine {
    /// One block over single tokens.
    fn block_decode(
        &self,
        block: &BlockParams,
        kv: &mut [HostKv],
        rows: &[DecodeRow],
        x: Tensor<2>,
    ) -> Result<Tensor<2>> {
        let [padded, _] = x.dims();
        let mut positions: Vec<usize> = rows.iter().map(|row| row.position).collect();
        positions.resize(padded, 0);
        let (cos, sin) = self.rope.tables(&positions);
        let table = |values| {
            Tensor::<4>::from_data(TensorData::new(values, [padded, 1, 1, self.config.head_dim]), &self.device)
        };
        let (q, k, v) = network::queries_keys_values(
            block,
            &self.shapes,
            &table(cos),
            &table(sin),
            &self.half_turn,
            padded,
            x.clone(),
        );
        let (q, k, v) = (to_host(q)?, to_host(k)?, to_host(v)?);
        let width = self.shapes.kv_heads * self.shapes.head_dim;
        for (index, row) in rows.iter().enumerate() {
            let kv = &mut kv[row.slot];
            if kv.keys.len() != row.position * width {
                return Err(EngineError::invalid(
                    format!(
                        "slot {} holds {} tokens, token {} cannot follow",
                        row.slot,
                        kv.keys.len() / width,
                        row.position
                    ),
                    "",
                ));
            }
            kv.keys.extend_from_slice(&k[index * width..(index + 1) * width]);
            kv.values.extend_from_slice(&v[index * width..(index + 1) * width]);
        }
        let mixed = attend::attend(&self.shapes, &q, kv, rows, padded);
        let mixed = self.matrix(mixed, padded, self.shapes.heads * self.shapes.head_dim);
        Ok(network::after_attention(block, &self.shapes, x, mixed))
    }
}

fn no_gradient() -> EngineError {
    EngineError::invalid("Burn gave no gradient for a parameter", "report this as a bug")
}
