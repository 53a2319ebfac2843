//! A block whose SwiGLU goes in parts of its columns, for models whose step is bound by memory: of gate and up, which
//! are several times as wide as the stream, only some columns are there at a time, and so are the gradients of the
//! matrices, each part being updated and forgotten before the next. Forward goes in the same parts.
//!
//! Sums are made in the order in which the whole makes them ([`column_parts`]), so the bits are the same: along the columns
//! a product sums in blocks of [`K_BLOCK`], and the gradient at the normed stream takes a part of gate and the same of up
//! before the next.

use std::ops::Range;
use std::sync::Arc;

use cosmos_kernels::gemm::{K_BLOCK, Left, Right, Shape, gemm};
use cosmos_kernels::memory::Buffer;
use cosmos_kernels::rows;

use super::CpuEngine;
use super::network::{Attended, Run, Saved, Turns};
use crate::Result;
use crate::block::{BackwardTile, BlockUpdate};
use crate::model::Part;

/// Columns of a part: whole blocks of the sums along them. Fewer are slower, as factors are copied for each part.
pub(super) const PART_COLUMNS: usize = 4 * K_BLOCK;

/// The parts of `columns` columns.
pub(super) fn column_parts(columns: usize) -> impl Iterator<Item = Range<usize>> {
    (0..columns).step_by(PART_COLUMNS).map(move |first| first..columns.min(first + PART_COLUMNS))
}

/// A tile on its way back through the SwiGLU.
struct PartTile {
    turns: Arc<Turns>,
    b: usize,
    x: Arc<Buffer>,
    dy: Arc<Buffer>,
    /// None where it is made again for the attention's backward.
    attended: Option<Attended>,
    z_normed: Buffer,
    /// The gradient at it, as far as it goes.
    dz_normed: Buffer,
}

impl PartTile {
    fn rows(&self, hidden: usize) -> usize {
        self.x.len() / hidden
    }
}

impl Run<'_> {
    /// Gate and up, and the matrix behind them, where they lie in memory as their masters do and have several parts.
    fn masters_in_parts(&self) -> Option<(&[f32], &[f32])> {
        let wanted = self.inside.is_none() && self.layout.inner > PART_COLUMNS;
        let (gate_up, down) = (self.weights.gate_up.masters(), self.weights.down.masters());
        gate_up.zip(down).filter(|_| wanted)
    }

    /// The block's output from the stream after the attention, in parts; that stream where it goes in one.
    pub fn finished_in_parts(&self, z: Buffer) -> std::result::Result<Buffer, Buffer> {
        let (h, f) = (self.layout.hidden, self.layout.inner);
        let Some((gate_up, down)) = self.masters_in_parts() else { return Err(z) };
        let z_normed = self.norm(&z, self.weights.post_norm);
        let mut y = self.biased(self.weights.down, z);
        for columns in column_parts(f) {
            let shape = Shape { m: y.len() / h, n: h, k: columns.len() };
            let gate_up = self.gate_up_part(gate_up, &columns, &z_normed);
            let mut inner = Buffer::dirty(shape.m * shape.k);
            rows::swiglu(self.isa, &gate_up, shape.k, &mut inner);
            drop(gate_up);
            let (left, right) = (Left::Rows(&inner, shape.k), Right::Columns(&down[columns.start..], f));
            gemm(self.isa, shape, left, right, &mut y, h, true);
        }
        Ok(y)
    }

    /// Some columns of gate and the same of up, `[n, 2, columns]`; `weights` are all rows of both.
    fn gate_up_part(&self, weights: &[f32], columns: &Range<usize>, z_normed: &[f32]) -> Buffer {
        let (h, f, s) = (self.layout.hidden, self.layout.inner, columns.len());
        let shape = Shape { m: z_normed.len() / h, n: s, k: h };
        let mut gate_up = Buffer::dirty(shape.m * 2 * s);
        let bias = self.weights.gate_up.bias;
        if let Some(bias) = bias {
            for row in gate_up.chunks_exact_mut(2 * s) {
                row[..s].copy_from_slice(&bias[columns.clone()]);
                row[s..].copy_from_slice(&bias[f + columns.start..f + columns.end]);
            }
        }
        for (at, first) in [(0, columns.start), (s, f + columns.start)] {
            let (left, right) = (Left::Rows(z_normed, h), Right::Columns(&weights[first * h..][..s * h], h));
            gemm(self.isa, shape, left, right, &mut gate_up[at..], 2 * s, bias.is_some());
        }
        gate_up
    }
}

impl CpuEngine {
    /// Whether parts are blocks of the whole's sums, and all columns are here.
    pub(super) fn has_parts(&self) -> bool {
        self.inside.is_none() && self.layout.inner.is_multiple_of(K_BLOCK)
    }

    /// Where rows of gate lie in the flat buffer; those of up follow the last of them.
    fn gate_rows(&self, rows: &Range<usize>) -> Range<usize> {
        let (start, h) = (self.layout.gate_up.start, self.layout.hidden);
        start + rows.start * h..start + rows.end * h
    }

    /// Where rows of up lie.
    fn up_rows(&self, rows: &Range<usize>) -> Range<usize> {
        let f = self.layout.inner;
        self.gate_rows(&(f + rows.start..f + rows.end))
    }

    /// [`BlockEngine::block_backward_update`](crate::block::BlockEngine::block_backward_update).
    pub(super) fn backward_in_parts(
        &self,
        params: &mut [f32],
        tiles: Vec<BackwardTile<Self>>,
        freed: usize,
        update: BlockUpdate<'_>,
    ) -> Result<Vec<Arc<Buffer>>> {
        let mut tiles = self.enter_parts(params, tiles, freed)?;
        let mut dbias = vec![0.0; self.layout.gate_up_bias.as_ref().map_or(0, Range::len)];
        for columns in column_parts(self.layout.inner) {
            self.inner_part(params, &mut tiles, columns, &mut dbias, update)?;
        }
        tiles.iter_mut().for_each(|tile| tile.z_normed = Buffer::empty());
        if let Some(range) = &self.layout.gate_up_bias {
            update(Part::whole(range.clone()), params, &dbias)?;
        }
        if let Some(range) = &self.layout.down_bias {
            dbias.clear();
            dbias.resize(range.len(), 0.0);
            tiles.iter().for_each(|tile| rows::add_rows(self.isa, &tile.dy, &mut dbias));
            update(Part::whole(range.clone()), params, &dbias)?;
        }
        self.attention_part(params, tiles, update)
    }

    /// Forward of all tiles up to gate and up.
    fn enter_parts(&self, params: &[f32], tiles: Vec<BackwardTile<Self>>, freed: usize) -> Result<Vec<PartTile>> {
        let layout = &self.layout;
        let run = self.run(layout.weights(params));
        // What the attentions leave beside what has been freed.
        let width = layout.heads.row() + layout.heads.width() + layout.hidden;
        let tokens = tiles.iter().map(|tile| tile.dy.len() / layout.hidden).sum::<usize>();
        let keeps = tokens * width <= freed;
        let enter = |tile: BackwardTile<Self>| {
            let BackwardTile { geometry: turns, b, saved, dy } = tile;
            let x = match saved {
                Saved::Input(x) => x,
                Saved::Whole(whole) => whole.into_input(),
            };
            let attended = run.attended(&turns, b, &x)?;
            let z_normed = run.norm(&attended.z, run.weights.post_norm);
            let attended = keeps.then_some(attended);
            let dz_normed = Buffer::dirty(x.len());
            Ok(PartTile { turns, b, x, dy, attended, z_normed, dz_normed })
        };
        tiles.into_iter().map(enter).collect()
    }

    /// Backward and update of some rows of gate and up, and the same columns of down.
    fn inner_part(
        &self,
        params: &mut [f32],
        tiles: &mut [PartTile],
        columns: Range<usize>,
        dbias: &mut [f32],
        update: BlockUpdate<'_>,
    ) -> Result<()> {
        let (h, f, s) = (self.layout.hidden, self.layout.inner, columns.len());
        // Gate and up: their place beside each other here, and in the flat buffer.
        let both = [(0, self.gate_rows(&columns)), (s, self.up_rows(&columns))];
        let down_at = self.layout.down.start + columns.start;
        let mut dboth = [Buffer::empty(), Buffer::empty()];
        let mut ddown = Buffer::zeros(h * s);
        let mut sums = vec![0.0; if dbias.is_empty() { 0 } else { 2 * s }];
        let down = &params[down_at..self.layout.down.end];
        let run = self.run(self.layout.weights(params));
        for tile in tiles {
            let n = tile.rows(h);
            // Gate and up become the gradients there, and the gradient behind them what they give.
            let mut gate_up = run.gate_up_part(&params[self.layout.gate_up.clone()], &columns, &tile.z_normed);
            let mut inner = Buffer::dirty(n * s);
            let back = Shape { m: n, n: s, k: h };
            gemm(self.isa, back, Left::Rows(&tile.dy, h), Right::Rows(down, f), &mut inner, s, false);
            rows::swiglu_vjp(self.isa, &mut gate_up, s, &mut inner);
            let gather = Shape { m: h, n: s, k: n };
            gemm(self.isa, gather, Left::Columns(&tile.dy, h), Right::Rows(&inner, s), &mut ddown, s, true);
            drop(inner);
            for ((at, rows), grads) in both.iter().zip(&mut dboth) {
                let (back, add) = (Shape { m: n, n: h, k: s }, columns.start + at > 0);
                let (left, right) = (Left::Rows(&gate_up[*at..], 2 * s), Right::Rows(&params[rows.clone()], h));
                gemm(self.isa, back, left, right, &mut tile.dz_normed, h, add);
                let gather = Shape { m: s, n: h, k: n };
                let (left, right) = (Left::Columns(&gate_up[*at..], 2 * s), Right::Rows(&tile.z_normed, h));
                // Only now, when what the gradient of down was made of is gone.
                let first = grads.is_empty();
                gemm(self.isa, gather, left, right, grads.room(s * h), h, !first);
            }
            if !sums.is_empty() {
                rows::add_rows(self.isa, &gate_up, &mut sums);
            }
        }
        if !sums.is_empty() {
            dbias[columns.clone()].copy_from_slice(&sums[..s]);
            dbias[f + columns.start..f + columns.end].copy_from_slice(&sums[s..]);
        }
        for ((_, rows), grads) in both.into_iter().zip(dboth) {
            update(Part::whole(rows), params, &grads)?;
        }
        update(Part { first: down_at, rows: h, width: s, stride: f }, params, &ddown)
    }

    /// Backward of everything before gate and up, and its update.
    fn attention_part(
        &self,
        params: &mut [f32],
        tiles: Vec<PartTile>,
        update: BlockUpdate<'_>,
    ) -> Result<Vec<Arc<Buffer>>> {
        let layout = &self.layout;
        let (h, eps) = (layout.hidden, layout.eps);
        // The parameters before gate and up.
        let mut grads = Buffer::zeros(layout.gate_up.start);
        let run = self.run(layout.weights(params));
        let post_norm = run.weights.post_norm;
        let back = |tile: PartTile, grads: &mut Buffer| {
            let PartTile { turns, b, x, dy, attended, dz_normed, .. } = tile;
            let Attended { raw, mixed, log_sums, z } = attended.map_or_else(|| run.attended(&turns, b, &x), Ok)?;
            let mut dz = Buffer::of(&dy);
            drop(dy);
            let mut dpost_norm = vec![0.0; h];
            rows::rms_norm_vjp(self.isa, &z, h, 1, post_norm, eps, &dz_normed, h, &mut dz, h, true, &mut dpost_norm);
            drop((z, dz_normed));
            rows::add(self.isa, &mut grads[layout.post_norm.clone()], &dpost_norm);
            let t = x.len() / h / b;
            let pending = run.attention_vjp(params, &turns, (b, t), &x, raw, &log_sums, &dz)?;
            Ok(Arc::new(pending.add_to(self.isa, layout, &mixed, &dz, grads)))
        };
        let dx = tiles.into_iter().map(|tile| back(tile, &mut grads)).collect::<Result<Vec<_>>>()?;
        update(Part::whole(0..layout.gate_up.start), params, &grads)?;
        Ok(dx)
    }
}
