//! The native CPU engine: hand-written kernels ([`cosmos_kernels`]) on packed weights, forward and backward, and paged
//! keys and values. `burn:flex` computes the same and is what its results are held against. A model that is not trained may
//! hold its weights in fewer bits ([`WeightFormat`]) and no f32 beside them.
//!
//! Tiles run side by side, one thread each, when there are enough of them; otherwise each kernel spreads over the threads.
//! Neither changes a result.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use cosmos_kernels::gemm::{K_BLOCK, Left, Right, Shape, gemm};
use cosmos_kernels::memory::Buffer;
use cosmos_kernels::vocabulary::SUMS_BLOCK;
use cosmos_kernels::{Isa, rows, threads};
use cosmos_parallel::RankGroups;
use rayon::prelude::*;

use crate::block::{BackwardTile, BlockEngine, BlockUpdate, DecodeRow, HeadPart};
use crate::model::{Model, ModelConfig, ParamSpec, WeightFormat};
use crate::rope::Rope;
use crate::sharded::cut::TpPart;
use crate::walker::{FRUGAL_BYTES, Transformer};
use crate::weights::Checkpoint;
use crate::{EngineError, Result, weights};

mod cache;
mod decode;
mod inside;
mod layout;
mod matrix;
mod network;
mod parts;
use cache::{Cache, Pool};
use inside::Inside;
use layout::{CpuBlock, Layout, Weights};
use matrix::{Factor, Formats, Matrix};
use network::{Run, Saved, Turns};

/// Tokens of a tile: the products' matrices are large enough, and the activations stay near the core.
const TILE_TOKENS: usize = 512;
/// The same for a model of [`FRUGAL_BYTES`] and more, whose weights are read from memory for every tile.
const LARGE_TILE_TOKENS: usize = 1024;
/// Logits that a chunk holds where they fit the shared cache.
const HEAD_CACHE_BYTES: usize = 8 << 20;
/// Rows of a chunk below which the head's weights would be read for too few rows.
const HEAD_ROWS_MIN: usize = 96;
/// Largest chunk of logits.
const HEAD_BYTES_MAX: usize = 64 << 20;
/// Bytes of a part of the head's matrix: it, its gradient and its logits fit the shared cache.
const HEAD_PART_BYTES: usize = 8 << 20;
/// Keys and values may take this part of the memory that was available when the engine started.
const KV_SHARE: f64 = 0.5;
/// Taken as available where the system does not say.
const MEMORY_BYTES_ASSUMED: usize = 8 << 30;

/// A model on the CPU from a Hugging Face folder.
pub fn load(folder: &Path) -> Result<Box<dyn Model>> {
    read(CpuEngine::new(ModelConfig::from_folder(folder)?), folder)
}

/// A model on the CPU that is not trained, with its weights held in `format`.
pub fn load_frozen(folder: &Path, format: WeightFormat) -> Result<Box<dyn Model>> {
    read(CpuEngine::new(ModelConfig::from_folder(folder)?).holding(format), folder)
}

/// Reads parameter by parameter, so that no value is there twice, and of a model that is held in fewer bits no more
/// than a block in f32.
fn read(engine: CpuEngine, folder: &Path) -> Result<Box<dyn Model>> {
    let checkpoint = Checkpoint::open(folder, &engine.config)?;
    Ok(Box::new(Transformer::from_source(engine, &mut |index, _, to| {
        checkpoint.read_part(index, 0, to);
        Ok(())
    })?))
}

/// A model on the CPU with fresh weights from `seed`.
pub fn random(config: &ModelConfig, seed: u64) -> Result<Box<dyn Model>> {
    with_random(CpuEngine::new(config.clone()), seed)
}

/// As [`load_frozen`], with the weights that [`random`] makes.
pub fn random_frozen(config: &ModelConfig, format: WeightFormat, seed: u64) -> Result<Box<dyn Model>> {
    with_random(CpuEngine::new(config.clone()).holding(format), seed)
}

fn with_random(engine: CpuEngine, seed: u64) -> Result<Box<dyn Model>> {
    let config = engine.config.clone();
    config.check().map_err(|message| EngineError::invalid(message, ""))?;
    let mut source = |index: usize, spec: &ParamSpec, to: &mut [f32]| {
        to.copy_from_slice(&weights::random_param(&config, index, spec, seed));
        Ok(())
    };
    Ok(Box::new(Transformer::from_source(engine, &mut source)?))
}

/// The CPU.
pub struct CpuEngine {
    config: ModelConfig,
    layout: Layout,
    formats: Formats,
    isa: Isa,
    rope: Rope,
    turns: RwLock<Arc<Turns>>,
    pool: Arc<Pool>,
    /// None where the engine has whole blocks.
    inside: Option<Inside>,
    /// Ids of a part of the head, a multiple of the blocks in which products along the vocabulary and rows of logits are summed.
    head_part_ids: usize,
}

impl CpuEngine {
    /// The engine for models of this architecture.
    pub fn new(config: ModelConfig) -> Self {
        Self::with_kv_bytes(config, (available_bytes() as f64 * KV_SHARE) as usize)
    }

    /// As [`CpuEngine::new`], with at most `kv_bytes_max` of keys and values.
    pub fn with_kv_bytes(config: ModelConfig, kv_bytes_max: usize) -> Self {
        let layout = Layout::of(&config);
        Self::with_layout(config, layout, None, kv_bytes_max)
    }

    /// The engine of one rank, which has a part of every block.
    pub(crate) fn of_rank(config: ModelConfig, groups: &RankGroups, part: &TpPart) -> Self {
        let inside = Inside::of(&config, groups, part);
        let layout = match &inside {
            Some(inside) => Layout::of_part(&config, inside.heads, inside.inner),
            None => Layout::of(&config),
        };
        // Ranks do not decode.
        Self::with_layout(config, layout, inside, 0)
    }

    fn with_layout(config: ModelConfig, layout: Layout, inside: Option<Inside>, kv_bytes_max: usize) -> Self {
        Self {
            rope: Rope::new(&config),
            isa: Isa::best(),
            turns: RwLock::new(Arc::new(Turns { cos: Vec::new(), sin: Vec::new() })),
            pool: Pool::new(layout.heads, kv_bytes_max),
            layout,
            formats: Formats::default(),
            // A power of two, which falls into equal parts for any number of threads and is a multiple of both.
            head_part_ids: ((HEAD_PART_BYTES / (4 * config.hidden_size.max(1))).max(K_BLOCK.max(SUMS_BLOCK)) + 1)
                .next_power_of_two()
                / 2,
            config,
            inside,
        }
    }

    /// With the head in parts of `ids`, a multiple of [`K_BLOCK`] and [`SUMS_BLOCK`].
    #[cfg(test)]
    pub(crate) fn with_head_parts(self, ids: usize) -> Self {
        Self { head_part_ids: ids, ..self }
    }

    /// This engine with matrices in `format`.
    fn holding(self, format: WeightFormat) -> Self {
        Self { formats: Formats::of(format), ..self }
    }

    fn run<'a>(&'a self, weights: Weights<'a>) -> Run<'a> {
        Run { isa: self.isa, layout: &self.layout, weights, inside: self.inside.as_ref() }
    }

    /// The row of the embedding that this rank has for an id.
    fn row_of(&self, id: u32) -> Option<usize> {
        let id = id as usize;
        match &self.inside {
            None => Some(id),
            Some(inside) => inside.vocab.contains(&id).then(|| id - inside.vocab.start),
        }
    }

    fn logits(&self, table: Factor<'_>, v: usize, hidden_rh: &[f32], out: &mut Vec<f32>) {
        // Every number is overwritten, so the old ones may stay.
        out.resize(hidden_rh.len() / self.config.hidden_size * v, 0.0);
        self.logits_into(table, v, hidden_rh, out);
    }

    fn logits_into(&self, table: Factor<'_>, v: usize, hidden_rh: &[f32], out: &mut [f32]) {
        let h = self.config.hidden_size;
        table.product(self.isa, Shape { m: hidden_rh.len() / h, n: v, k: h }, hidden_rh, out, false);
    }

    fn norm_row(&self, norm: &[f32], x: &[f32], y: &mut [f32]) {
        rows::rms_norm(self.isa, x, norm.len(), 1, norm, self.layout.eps, y, norm.len());
    }
}

/// Memory that the system can give without swapping.
fn available_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<usize>().ok());
    kib.map_or(MEMORY_BYTES_ASSUMED, |kib| kib.saturating_mul(1024))
}

impl BlockEngine for CpuEngine {
    type Tensor = Arc<Buffer>;
    type Table = Matrix;
    type Block = CpuBlock;
    type Norm = Vec<f32>;
    type Geometry = Arc<Turns>;
    type Saved = Saved;
    type Kv = Cache;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tile_tokens(&self) -> usize {
        if 4 * self.config.parameter_count() < FRUGAL_BYTES as u64 { TILE_TOKENS } else { LARGE_TILE_TOKENS }
    }

    fn lanes(&self) -> usize {
        rayon::current_num_threads().max(1)
    }

    fn run_lanes<R: Send>(&self, count: usize, work: &(dyn Fn(usize) -> R + Sync)) -> Vec<R> {
        if self.inside.is_some() {
            // Tiles meet other ranks, so they come in order, and on this thread: one that waits must not hold up the pool.
            return (0..count).map(work).collect();
        }
        if count < self.lanes() {
            // On a thread of the pool, where spreading a kernel costs a fraction of what it costs from outside.
            return rayon::scope(|_| (0..count).map(work).collect());
        }
        (0..count).into_par_iter().with_max_len(1).map(|index| threads::serial(|| work(index))).collect()
    }

    fn head_chunk_rows(&self) -> usize {
        let row = 4 * self.config.vocab_size;
        (HEAD_CACHE_BYTES / row).max(HEAD_ROWS_MIN).min(HEAD_BYTES_MAX / row).max(1)
    }

    fn table(&self, values: &[f32]) -> Matrix {
        let h = self.config.hidden_size;
        Matrix::of(self.isa, self.formats.head, values, values.len() / h, h)
    }

    fn lookup(&self, _values: &[f32]) -> Matrix {
        Matrix::default()
    }

    fn table_bytes(&self, table: &Matrix, _len: usize) -> usize {
        table.bytes()
    }

    fn block_bytes(&self, block: &CpuBlock, _len: usize) -> usize {
        block.bytes()
    }

    fn activations(&self, values: &[f32]) -> Arc<Buffer> {
        Arc::new(Buffer::of(values))
    }

    fn values(&self, x: Arc<Buffer>) -> Result<Vec<f32>> {
        Ok(x.to_vec())
    }

    fn embedding(&self, values: &[f32]) -> Matrix {
        // Embedding reads the f32 values where there are some; only a head needs panels then.
        if self.config.tie_word_embeddings || self.holds_embedding() { self.table(values) } else { Matrix::default() }
    }

    fn refresh_table(&self, table: &mut Matrix, values: &[f32]) {
        let h = self.config.hidden_size;
        table.set(self.isa, self.formats.head, values, values.len() / h, h);
    }

    fn refresh_embedding(&self, table: &mut Matrix, values: &[f32]) {
        // As above.
        if self.config.tie_word_embeddings || self.holds_embedding() {
            self.refresh_table(table, values);
        }
    }

    fn trains_on_masters(&self) -> bool {
        !self.holds_blocks()
    }

    fn no_table(&self, _values: &[f32]) -> Matrix {
        Matrix::default()
    }

    fn no_block(&self, _flat: &[f32]) -> CpuBlock {
        CpuBlock::default()
    }

    fn in_format(&self, format: WeightFormat) -> Result<Self> {
        if self.inside.is_some() {
            return Err(EngineError::invalid("a rank of a sharded model holds its weights in f32 only", ""));
        }
        Ok(Self::new(self.config.clone()).holding(format))
    }

    fn holds_blocks(&self) -> bool {
        self.formats.blocks.is_some()
    }

    fn holds_embedding(&self) -> bool {
        self.formats.embedding.is_some()
    }

    fn read_block(&self, block: &CpuBlock, range: Range<usize>) -> Vec<f32> {
        block.read(&self.layout, range)
    }

    fn write_block(&self, block: &mut CpuBlock, start: usize, values: &[f32]) {
        block.write(self.isa, &self.layout, self.formats, start, values);
    }

    fn read_table(&self, table: &Matrix) -> Vec<f32> {
        let h = self.config.hidden_size;
        let mut values = vec![0.0; table.n() * h];
        if let Some(narrow) = table.narrow() {
            values.chunks_exact_mut(h).enumerate().for_each(|(id, row)| narrow.row(id, row));
        }
        values
    }

    fn block(&self, flat: &[f32]) -> CpuBlock {
        let mut block = CpuBlock::default();
        block.set(self.isa, &self.layout, self.formats, flat);
        block
    }

    fn refresh_block(&self, block: &mut CpuBlock, flat: &[f32]) {
        block.set(self.isa, &self.layout, self.formats, flat);
    }

    fn norm(&self, values: &[f32]) -> Vec<f32> {
        self.formats.vector(values)
    }

    fn geometry(&self, t: usize) -> Arc<Turns> {
        let half = self.config.head_dim / 2;
        let known = self.turns.read().unwrap_or_else(PoisonError::into_inner).clone();
        if known.cos.len() >= t * half {
            return known;
        }
        let positions: Vec<usize> = (0..t.next_power_of_two()).collect();
        let (cos, sin) = self.rope.tables(&positions);
        // Both halves of a head turn alike.
        let first = |table: Vec<f32>| table.chunks_exact(2 * half).flat_map(|row| row[..half].to_vec()).collect();
        let turns = Arc::new(Turns { cos: first(cos), sin: first(sin) });
        let mut known = self.turns.write().unwrap_or_else(PoisonError::into_inner);
        if known.cos.len() < turns.cos.len() {
            known.clone_from(&turns);
        }
        turns
    }

    fn embed(&self, table: &Matrix, values: &[f32], ids: &[u32]) -> Result<Arc<Buffer>> {
        let h = self.config.hidden_size;
        let mut x = Buffer::dirty(ids.len() * h);
        if let (true, Some(narrow)) = (self.holds_embedding(), table.narrow()) {
            x.chunks_exact_mut(h).zip(ids).for_each(|(row, id)| narrow.row(*id as usize, row));
            return Ok(Arc::new(x));
        }
        for (row, id) in x.chunks_exact_mut(h).zip(ids) {
            match self.row_of(*id) {
                Some(id) => row.copy_from_slice(&values[id * h..][..h]),
                None => row.fill(0.0),
            }
        }
        if let Some(inside) = &self.inside {
            inside.sum(&mut x)?;
        }
        Ok(Arc::new(x))
    }

    fn embed_vjp(&self, ids: &[u32], dy: Arc<Buffer>, grads: &mut [f32]) -> Result<()> {
        let h = self.config.hidden_size;
        for (id, dy) in ids.iter().zip(dy.chunks_exact(h)) {
            if let Some(id) = self.row_of(*id) {
                rows::add(self.isa, &mut grads[id * h..][..h], dy);
            }
        }
        Ok(())
    }

    fn saved_bytes(&self) -> usize {
        4 * self.config.kept_width()
    }

    fn block_forward_keep(
        &self,
        block: &CpuBlock,
        params: Option<&[f32]>,
        turns: &Arc<Turns>,
        b: usize,
        x: Arc<Buffer>,
        whole: bool,
    ) -> Result<(Arc<Buffer>, Saved)> {
        let run = self.run(params.map_or_else(|| block.weights(), |params| self.layout.weights(params)));
        if !whole {
            return Ok((Arc::new(run.forward(turns, b, &x)?), Saved::Input(x)));
        }
        let (y, whole) = run.forward_keep(turns, b, x)?;
        Ok((Arc::new(y), Saved::Whole(Box::new(whole))))
    }

    fn saved_input(&self, x: Arc<Buffer>) -> Saved {
        Saved::Input(x)
    }

    fn block_backward(
        &self,
        _block: &CpuBlock,
        params: &[f32],
        tiles: Vec<BackwardTile<Self>>,
        grads: &mut [f32],
    ) -> Result<Vec<Arc<Buffer>>> {
        let mut dx = Vec::with_capacity(tiles.len());
        let mut tiles = tiles.into_iter();
        // A few tiles at a time: what their matrices' gradients need is held until those are taken.
        let wave = 2 * self.lanes();
        loop {
            let part: Vec<_> = tiles.by_ref().take(wave).map(|tile| std::sync::Mutex::new(Some(tile))).collect();
            if part.is_empty() {
                return Ok(dx);
            }
            let found = self.run_lanes(part.len(), &|index| {
                // Taken out, so that what backward has read is freed as it goes.
                let tile = part[index].lock().unwrap_or_else(PoisonError::into_inner).take();
                let run = self.run(self.layout.weights(params));
                tile.map(|tile| run.backward(params, &tile.geometry, tile.b, tile.saved, tile.dy))
            });
            for pending in found.into_iter().flatten() {
                dx.push(Arc::new(pending?.add_to(self.isa, &self.layout, grads)));
            }
        }
    }

    fn updates_block_in_parts(&self, tokens: usize) -> bool {
        let block = self.config.block_params(0).iter().map(ParamSpec::len).sum::<usize>();
        // Parts want the normed stream of all tokens and the gradient there, the whole the gradient of all matrices.
        self.has_parts() && 2 * tokens * self.layout.hidden <= block
    }

    fn block_backward_update(
        &self,
        params: &mut [f32],
        tiles: Vec<BackwardTile<Self>>,
        freed: usize,
        update: BlockUpdate<'_>,
    ) -> Result<Vec<Arc<Buffer>>> {
        // On a thread of the pool, as in `run_lanes`.
        rayon::scope(|_| self.backward_in_parts(params, tiles, freed, update))
    }

    fn join_block_grads(&self, grads: &mut [f32]) -> Result<()> {
        self.inside.as_ref().map_or(Ok(()), |inside| inside.join(&self.layout, grads))
    }

    fn final_norm(&self, norm: &Vec<f32>, x: Arc<Buffer>, rows: &[u32]) -> Result<Buffer> {
        let h = norm.len();
        let mut y = Buffer::dirty(rows.len() * h);
        for (row, y) in rows.iter().zip(y.chunks_exact_mut(h)) {
            self.norm_row(norm, &x[*row as usize * h..][..h], y);
        }
        Ok(y)
    }

    fn final_norm_vjp(
        &self,
        norm: &Vec<f32>,
        x: Arc<Buffer>,
        rows: &[u32],
        dy_rh: &[f32],
    ) -> Result<(Arc<Buffer>, Vec<f32>)> {
        let h = norm.len();
        let (mut dx, mut dnorm) = (Buffer::zeros(x.len()), vec![0.0; h]);
        for (row, dy) in rows.iter().zip(dy_rh.chunks_exact(h)) {
            let at = *row as usize * h..(*row as usize + 1) * h;
            let (x, dx) = (&x[at.clone()], &mut dx[at]);
            rows::rms_norm_vjp(self.isa, x, h, 1, norm, self.layout.eps, dy, h, dx, h, true, &mut dnorm);
        }
        Ok((Arc::new(dx), dnorm))
    }

    fn head(&self, table: &Matrix, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.logits(table.factor(), table.n(), hidden_rh, out);
        Ok(())
    }

    fn decode_head(&self, table: &Matrix, hidden_rh: &[f32], logits_rv: &mut [f32]) -> Result<()> {
        self.logits_into(table.factor(), table.n(), hidden_rh, logits_rv);
        Ok(())
    }

    fn head_of_masters(&self, _table: &Matrix, values: &[f32], hidden_rh: &[f32], logits: &mut [f32]) -> Result<()> {
        let h = self.config.hidden_size;
        self.logits_into(Factor::Wide(Right::Columns(values, h)), values.len() / h, hidden_rh, logits);
        Ok(())
    }

    fn head_vjp(
        &self,
        _table: &Matrix,
        values: &[f32],
        hidden_rh: &[f32],
        dlogits_rv: &[f32],
        grads: &mut [f32],
    ) -> Result<Vec<f32>> {
        let h = self.config.hidden_size;
        let v = values.len() / h;
        let m = hidden_rh.len() / h;
        let mut dhidden = vec![0.0; m * h];
        let back = Shape { m, n: h, k: v };
        gemm(self.isa, back, Left::Rows(dlogits_rv, v), Right::Rows(values, h), &mut dhidden, h, false);
        let gather = Shape { m: v, n: h, k: m };
        gemm(self.isa, gather, Left::Columns(dlogits_rv, v), Right::Rows(hidden_rh, h), grads, h, true);
        Ok(dhidden)
    }

    fn head_part_ids(&self) -> Option<usize> {
        self.inside.is_none().then_some(self.head_part_ids)
    }

    fn head_part_vjp(&self, part: HeadPart<'_>, dhidden_rh: &mut [f32], grads_ph: &mut [f32]) -> Result<()> {
        let HeadPart { values_ph, hidden_rh, dlogits_rp, chunk_rows, add } = part;
        let h = self.config.hidden_size;
        let (rows, ids) = (hidden_rh.len() / h, values_ph.len() / h);
        let back = Shape { m: rows, n: h, k: ids };
        gemm(self.isa, back, Left::Rows(dlogits_rp, ids), Right::Rows(values_ph, h), dhidden_rh, h, add);
        let chunks = dlogits_rp.chunks(chunk_rows.max(1) * ids).zip(hidden_rh.chunks(chunk_rows.max(1) * h));
        for (dlogits_rp, hidden_rh) in chunks {
            let gather = Shape { m: ids, n: h, k: hidden_rh.len() / h };
            gemm(self.isa, gather, Left::Columns(dlogits_rp, ids), Right::Rows(hidden_rh, h), grads_ph, h, true);
        }
        Ok(())
    }

    fn kv(&self, _capacity: usize) -> Cache {
        Cache::new(self.pool.clone())
    }

    fn kv_clear(&self, kv: &mut Cache) {
        kv.clear();
    }

    fn kv_copy(&self, from: &Cache, to: &mut Cache) {
        to.share(from);
    }

    fn kv_tokens_max(&self) -> usize {
        self.pool.tokens_max() / self.config.num_hidden_layers
    }

    fn kv_end(&self) {
        self.pool.trim();
    }

    fn decode_rows(&self, rows: usize) -> usize {
        // Every kernel's row is the same in any company.
        rows
    }

    fn blocks_decode(
        &self,
        blocks: &[CpuBlock],
        kv: &mut [&mut [Cache]],
        rows: &[DecodeRow],
        wanted: &[u32],
        x: Arc<Buffer>,
    ) -> Result<(Arc<Buffer>, Vec<u32>)> {
        let x = self.walk(blocks, kv, rows, wanted, &x)?;
        Ok((Arc::new(x), (0..wanted.len() as u32).collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::generate::{GenerateOptions, GenerateRequest, SamplingParams, generate};

    fn config() -> ModelConfig {
        let text = r#"{"model_type": "qwen3", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "max_position_embeddings": 4096, "initializer_range": 0.3}"#;
        ModelConfig::from_json(text, Path::new("config.json")).unwrap()
    }

    /// Completions of `count` prompts, three each, with room for `tokens` tokens and `slots` sequences.
    fn run(
        count: usize,
        slots: usize,
        tokens: usize,
        new_tokens: usize,
    ) -> Result<Vec<(u64, usize, Vec<u32>, Vec<f32>)>> {
        let config = config();
        let heads = Layout::of(&config).heads;
        let pages = tokens / cosmos_kernels::page::PAGE_TOKENS * config.num_hidden_layers;
        let values = weights::random(&config, 5);
        let bytes = pages * cosmos_kernels::page::Page::bytes(heads);
        let mut model = Transformer::new(CpuEngine::with_kv_bytes(config, bytes), values)?;
        let requests: Vec<GenerateRequest> = (0..count)
            .map(|id| GenerateRequest {
                id: id as u64,
                prompt: [id as u32 % 31, 7, 9].into_iter().cycle().take(3 + id % 70).collect(),
                n: 3,
                max_new_tokens: new_tokens,
                ..GenerateRequest::default()
            })
            .collect();
        let options = GenerateOptions { slots, logprobs: true, ..GenerateOptions::default() };
        let mut all = Vec::new();
        generate(&mut model, &requests, &SamplingParams::default(), &options, &mut |done| {
            all.push((done.id, done.index, done.tokens, done.logprobs));
            ControlFlow::Continue(())
        })?;
        all.sort_by_key(|one| (one.0, one.1));
        Ok(all)
    }

    #[test]
    fn sequences_are_the_same_in_any_company() {
        // More than one group on each thread, so that some are attended to within the products of others.
        let all = run(100, 300, 1 << 16, 40).unwrap();
        assert_eq!(all.len(), 300);
        assert!(all == run(100, 5, 1 << 16, 40).unwrap());
    }

    #[test]
    fn what_is_kept_is_what_is_counted() {
        let config = config();
        let engine = CpuEngine::new(config.clone());
        let flat = weights::random(&config, 1)[1..=config.block_params(0).len()].concat();
        let (block, n) = (engine.block(&flat), 12);
        let x = Arc::new(Buffer::zeros(n * config.hidden_size));
        let (_, whole) = engine.run(block.weights()).forward_keep(&engine.geometry(6), 2, x).unwrap();
        assert_eq!(whole.kept(), n * config.kept_width());
    }

    #[test]
    fn sequences_wait_for_memory() {
        let all = run(12, 24, 1 << 16, 100).unwrap();
        assert_eq!(all.len(), 36);
        // Three of them fit at a time.
        assert_eq!(run(12, 24, 3 * 192, 100).unwrap(), all);
        // A single one that does not fit is refused with a way out.
        let error = run(12, 24, 64, 100).unwrap_err();
        assert!(error.to_string().contains("MiB") && error.hint().is_some(), "{error}");
    }
}
