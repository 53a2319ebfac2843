//! The engine seam: what one engine must provide for one block of the network.
//!
//! A batch is cut into tiles: a few rows of similar length, padded on the right to the longest. Activations of a tile
//! are `[n, hidden]` with `n = b · t`, row after row. The walk over blocks and tiles ([`crate::walker`]) is written once
//! for all engines; checkpointing, sharding and pipelines are changes of that walk, not of an engine.
//!
//! Parameters come as one flat f32 slice per block in the order of [`ModelConfig::block_params`], and gradients leave
//! in the same order.

use std::ops::Range;

use cosmos_kernels::memory::Buffer;

use crate::model::{ModelConfig, Part, WeightFormat};
use crate::{EngineError, Result};

/// One token of an incremental step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeRow {
    /// Which cache it belongs to.
    pub slot: usize,
    /// Its place in the sequence, from 0. The rows of one slot come in order and continue what its cache holds.
    pub position: usize,
}

/// One tile on its way back through a block.
pub struct BackwardTile<E: BlockEngine> {
    /// Of the tile's length.
    pub geometry: E::Geometry,
    /// Rows of the tile.
    pub b: usize,
    /// From the forward.
    pub saved: E::Saved,
    /// The gradient at the block's output.
    pub dy: E::Tensor,
}

/// A part of the head's matrix on its way back. What it gives has the bits that [`BlockEngine::head_vjp`] gives the whole,
/// called for every `chunk_rows` rows.
pub struct HeadPart<'a> {
    /// Rows of the matrix.
    pub values_ph: &'a [f32],
    /// What the logits were made of.
    pub hidden_rh: &'a [f32],
    /// The gradient at the logits.
    pub dlogits_rp: &'a [f32],
    /// Rows whose sums are added to the matrix' gradient one after the other.
    pub chunk_rows: usize,
    /// Whether the gradient at the hidden states is added to what the parts before this one gave.
    pub add: bool,
}

/// Takes a part of a block, the block's flat slice, and the part's complete gradient row after row. A part with several
/// rows lies within one parameter.
pub type BlockUpdate<'a> = &'a mut (dyn FnMut(Part, &mut [f32], &[f32]) -> Result<()> + Send);

/// The kernels of one device. Everything that a walk over blocks needs, and nothing that decides about it.
pub trait BlockEngine: Send + Sync + 'static {
    /// Activations `[n, hidden]` on the device.
    type Tensor: Clone + Send + Sync;
    /// A `[vocab, hidden]` matrix on the device: the embedding, the head, or both.
    type Table: Send + Sync;
    /// One block's parameters on the device.
    type Block: Send + Sync;
    /// The last norm's parameters on the device.
    type Norm: Send + Sync;
    /// What all blocks share for tiles of one length: rotary tables and the causal mask.
    type Geometry: Clone + Send + Sync;
    /// What the backward of one block over one tile needs of its forward.
    type Saved: Send;
    /// Keys and values of one sequence in one block.
    type Kv: Send;

    /// Architecture.
    fn config(&self) -> &ModelConfig;
    /// Tokens that one tile should hold: enough to keep the matrix kernels busy, few enough to stay in a cache.
    fn tile_tokens(&self) -> usize;
    /// How many tiles may run at once.
    fn lanes(&self) -> usize;
    /// Runs `work(0..count)` on the lanes and returns the results in order. Results must not depend on how many lanes
    /// there are.
    fn run_lanes<R: Send>(&self, count: usize, work: &(dyn Fn(usize) -> R + Sync)) -> Vec<R>;

    /// Rows of logits to hold at a time.
    fn head_chunk_rows(&self) -> usize;

    /// Uploads a `[vocab, hidden]` matrix.
    fn table(&self, values: &[f32]) -> Self::Table;
    /// Uploads the embedding, which is the head too when the config ties them.
    fn embedding(&self, values: &[f32]) -> Self::Table {
        self.table(values)
    }
    /// Uploads new values of the embedding.
    fn refresh_embedding(&self, table: &mut Self::Table, values: &[f32]) {
        *table = self.embedding(values);
    }
    /// Uploads the embedding for [`BlockEngine::embed`] only.
    fn lookup(&self, values: &[f32]) -> Self::Table {
        self.table(values)
    }
    /// Bytes of a table of `len` values.
    fn table_bytes(&self, table: &Self::Table, len: usize) -> usize;
    /// Bytes of a block of `len` values.
    fn block_bytes(&self, block: &Self::Block, len: usize) -> usize;
    /// Activations from the host.
    fn activations(&self, values: &[f32]) -> Self::Tensor;
    /// Activations to the host.
    fn values(&self, x: Self::Tensor) -> Result<Vec<f32>>;
    /// Uploads new values of a matrix.
    fn refresh_table(&self, table: &mut Self::Table, values: &[f32]) {
        *table = self.table(values);
    }
    /// Uploads a block's parameters.
    fn block(&self, flat: &[f32]) -> Self::Block;
    /// Uploads new values of a block's parameters.
    fn refresh_block(&self, block: &mut Self::Block, flat: &[f32]) {
        *block = self.block(flat);
    }
    /// The same kernels with matrices in another format.
    ///
    /// # Errors
    /// A format that the engine does not have.
    fn in_format(&self, format: WeightFormat) -> Result<Self>
    where
        Self: Sized,
    {
        Err(EngineError::invalid(
            format!("this engine has no weights in {format}"),
            "use `host.device = \"cpu\"`, or leave the weights in f32",
        ))
    }
    /// Whether [`BlockEngine::Block`] and the head hold their values themselves, so that a model that is not trained keeps no
    /// master values of them; it then reads and writes them by the methods below.
    fn holds_blocks(&self) -> bool {
        false
    }
    /// Whether what [`BlockEngine::embedding`] gives holds its values itself.
    fn holds_embedding(&self) -> bool {
        false
    }
    /// The values at `range` of a block's flat slice, which are those of one parameter. Only where the block holds them.
    fn read_block(&self, block: &Self::Block, range: Range<usize>) -> Vec<f32> {
        let _ = (block, range);
        Vec::new()
    }
    /// Replaces the values from `start` of a block's flat slice on, which are those of one parameter. Only where the block
    /// holds them.
    fn write_block(&self, block: &mut Self::Block, start: usize, values: &[f32]) {
        let _ = (block, start, values);
    }
    /// A table's values. Only where it holds them.
    fn read_table(&self, table: &Self::Table) -> Vec<f32> {
        let _ = table;
        Vec::new()
    }
    /// Whether training reads the master values themselves: then [`BlockEngine::block_forward_keep`] is given them, and tables
    /// and blocks are uploaded only for decoding, and for scoring where they are small.
    fn trains_on_masters(&self) -> bool {
        false
    }
    /// A table that is not uploaded, where [`BlockEngine::trains_on_masters`].
    fn no_table(&self, values: &[f32]) -> Self::Table {
        self.embedding(values)
    }
    /// A block that is not uploaded, where [`BlockEngine::trains_on_masters`].
    fn no_block(&self, flat: &[f32]) -> Self::Block {
        self.block(flat)
    }
    /// Uploads the last norm.
    fn norm(&self, values: &[f32]) -> Self::Norm;
    /// Prepares tiles of length `t`.
    fn geometry(&self, t: usize) -> Self::Geometry;

    /// Rows of the embedding for `ids`; `values` are the master values of `table`.
    fn embed(&self, table: &Self::Table, values: &[f32], ids: &[u32]) -> Result<Self::Tensor>;
    /// Adds the gradient at the embedding's rows to `grads`, `[vocab, hidden]`.
    fn embed_vjp(&self, ids: &[u32], dy: Self::Tensor, grads: &mut [f32]) -> Result<()>;

    /// One block over a tile of `b` rows; the same bits with the master values `params`, which are for engines where
    /// [`BlockEngine::trains_on_masters`], or without.
    fn block_forward(
        &self,
        block: &Self::Block,
        params: Option<&[f32]>,
        geometry: &Self::Geometry,
        b: usize,
        x: Self::Tensor,
    ) -> Result<Self::Tensor> {
        Ok(self.block_forward_keep(block, params, geometry, b, x, false)?.0)
    }
    /// Bytes a token that keeping the whole of one block's forward takes; 0 if the engine has no use for it.
    fn saved_bytes(&self) -> usize;
    /// As [`BlockEngine::block_forward`], and what backward needs: with `whole` everything that spares it from running the
    /// block again, else the input. The gradients are the same bits either way, and with the master values `params` or
    /// without.
    fn block_forward_keep(
        &self,
        block: &Self::Block,
        params: Option<&[f32]>,
        geometry: &Self::Geometry,
        b: usize,
        x: Self::Tensor,
        whole: bool,
    ) -> Result<(Self::Tensor, Self::Saved)>;
    /// What backward needs at least: a block's input.
    fn saved_input(&self, x: Self::Tensor) -> Self::Saved;
    /// The block's vector-Jacobian product over all tiles: the gradients at their inputs, in order; those at the parameters
    /// (whose master values are `params`) are added to `grads` in the order of the tiles.
    fn block_backward(
        &self,
        block: &Self::Block,
        params: &[f32],
        tiles: Vec<BackwardTile<Self>>,
        grads: &mut [f32],
    ) -> Result<Vec<Self::Tensor>>
    where
        Self: Sized;

    /// Whether [`BlockEngine::block_backward_update`] is there and takes less memory for `tokens` tokens than the
    /// gradients of a block.
    fn updates_block_in_parts(&self, tokens: usize) -> bool {
        let _ = tokens;
        false
    }
    /// As [`BlockEngine::block_backward`] over all tiles from gradients of zero, with the same bits, but every part of
    /// the gradients goes to `update` as soon as it is complete, which changes the part of `params` that it belongs to.
    /// `freed` numbers are free by now that were taken when the first block on the way back came: where they are few,
    /// what is cheap to make again is not kept meanwhile.
    ///
    /// # Errors
    /// Those of `update`, and an engine that does not have this.
    fn block_backward_update(
        &self,
        params: &mut [f32],
        tiles: Vec<BackwardTile<Self>>,
        freed: usize,
        update: BlockUpdate<'_>,
    ) -> Result<Vec<Self::Tensor>>
    where
        Self: Sized,
    {
        let _ = (params, tiles, freed, update);
        Err(EngineError::invalid("this engine does not update a block in parts", ""))
    }

    /// Completes a block's gradients, as [`BlockEngine::block_backward`] found them in one call: those of parameters that
    /// several ranks hold and each has seen a part of.
    fn join_block_grads(&self, grads: &mut [f32]) -> Result<()> {
        let _ = grads;
        Ok(())
    }

    /// The last norm at `rows` of `x`: `[rows, hidden]` on the host.
    fn final_norm(&self, norm: &Self::Norm, x: Self::Tensor, rows: &[u32]) -> Result<Buffer>;
    /// Its vector-Jacobian product: the gradient at `x` and at the norm's weight.
    fn final_norm_vjp(
        &self,
        norm: &Self::Norm,
        x: Self::Tensor,
        rows: &[u32],
        dy_rh: &[f32],
    ) -> Result<(Self::Tensor, Vec<f32>)>;

    /// The head over `[rows, hidden]`: logits `[rows, vocab]` into `out`, whose length becomes theirs.
    fn head(&self, table: &Self::Table, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()>;
    /// As [`BlockEngine::head`], from the master values where [`BlockEngine::trains_on_masters`]; `logits` has room for
    /// all.
    fn head_of_masters(
        &self,
        table: &Self::Table,
        values: &[f32],
        hidden_rh: &[f32],
        logits: &mut [f32],
    ) -> Result<()> {
        let _ = values;
        let mut out = Vec::new();
        self.head(table, hidden_rh, &mut out)?;
        logits.copy_from_slice(&out);
        Ok(())
    }
    /// Its vector-Jacobian product: the gradient at the hidden states; that at the matrix (whose master values are
    /// `values`) is added to `grads`.
    fn head_vjp(
        &self,
        table: &Self::Table,
        values: &[f32],
        hidden_rh: &[f32],
        dlogits_rv: &[f32],
        grads: &mut [f32],
    ) -> Result<Vec<f32>>;

    /// Ids of the parts of the head's matrix that [`BlockEngine::head_part_vjp`] should get; none where it is not there.
    fn head_part_ids(&self) -> Option<usize> {
        None
    }
    /// The vector-Jacobian product of a part of the head's matrix of [`BlockEngine::head_part_ids`] ids (the last may have
    /// fewer): that at the hidden states is added to or replaces `dhidden_rh`, that at the part is added to `grads_ph`.
    ///
    /// # Errors
    /// An engine that does not have this.
    fn head_part_vjp(&self, part: HeadPart<'_>, dhidden_rh: &mut [f32], grads_ph: &mut [f32]) -> Result<()> {
        let _ = (part, dhidden_rh, grads_ph);
        Err(EngineError::invalid("this engine has no head in parts", ""))
    }

    /// An empty cache for at most `capacity` tokens.
    fn kv(&self, capacity: usize) -> Self::Kv;
    /// Empties a cache.
    fn kv_clear(&self, kv: &mut Self::Kv);
    /// Makes `to` hold what `from` holds.
    fn kv_copy(&self, from: &Self::Kv, to: &mut Self::Kv);
    /// Tokens that caches may hold together, each in every block.
    fn kv_tokens_max(&self) -> usize {
        usize::MAX
    }
    /// Called when all caches of a decoder are gone.
    fn kv_end(&self) {}
    /// The head of an incremental step: as [`BlockEngine::head`], for as many rows as `logits_rv` has room for; those beyond
    /// are padding.
    fn decode_head(&self, table: &Self::Table, hidden_rh: &[f32], logits_rv: &mut [f32]) -> Result<()> {
        let mut padded_rv = Vec::new();
        self.head(table, hidden_rh, &mut padded_rv)?;
        logits_rv.copy_from_slice(&padded_rv[..logits_rv.len()]);
        Ok(())
    }
    /// Rows that incremental steps should be padded to, so that a row's result does not depend on how many there are.
    fn decode_rows(&self, rows: usize) -> usize;
    /// `blocks` over tokens `x` (`[rows or more, hidden]`; rows beyond `rows` are padding): each appends their keys and
    /// values to its caches `kv[block][slot]` and attends to what these hold. Of the last block, only the rows `wanted` are
    /// read: activations, and where those rows lie in them.
    fn blocks_decode(
        &self,
        blocks: &[Self::Block],
        kv: &mut [&mut [Self::Kv]],
        rows: &[DecodeRow],
        wanted: &[u32],
        x: Self::Tensor,
    ) -> Result<(Self::Tensor, Vec<u32>)>
    where
        Self: Sized;
}
