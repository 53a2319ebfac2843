//! One block of Qwen2, Qwen3 and Llama, forward and backward, over a tile of rows. Activations are `[n, width]`.
//!
//! Forward:
//! ```text
//! x̂ = norm(x)                       raw = x̂·Wᵀ_qkv + b_qkv
//! (q, k, v) = (turn(norm_q(raw_q))/√d, turn(norm_k(raw_k)), raw_v)
//! m, ℓ = attention(q, k, v)          z = x + m·Wᵀ_o + b_o
//! ẑ = norm(z)                       (g, u) = ẑ·Wᵀ_gu + b_gu
//! a = g·σ(g)·u                      y = z + a·Wᵀ_d + b_d
//! ```
//! Backward, from `dy`, each line the transpose of one above, last first. A product `y = x·Wᵀ + b` gives `dx = dy·W`,
//! `dW = dyᵀ·x`, `db = ∑ rows of dy`:
//! ```text
//! da = dy·W_d                       dW_d = dyᵀ·a
//! (dg, du) = swiglu′(g, u; da)      (the formula stands at `swiglu_vjp`)
//! dẑ = (dg, du)·W_gu                dW_gu = (dg, du)ᵀ·ẑ
//! dz = dy + norm′(z; dẑ)            (both ways into z: the residual and the norm)
//! dm = dz·W_o                       dW_o = dzᵀ·m
//! (dq, dk, dv) = attention′(dm)     (the derivation stands at the kernel)
//! draw_q = norm_q′(turn⁻¹(dq)/√d)   likewise k; draw_v = dv
//! dx̂ = draw·W_qkv                   dW_qkv = drawᵀ·x̂
//! dx = dz + norm′(x; dx̂)
//! ```
//! What is cheap (norms, rotations, SwiGLU) is computed again, what is a product or an attention is kept ([`Saved`]) where
//! memory allows. Weight gradients are taken afterwards, all threads on one matrix, so that they are added in place in
//! the order of the tiles.

use std::ops::Range;
use std::sync::Arc;

use cosmos_kernels::attention::Heads;
use cosmos_kernels::gemm::{Left, Right, Shape, gemm};
use cosmos_kernels::memory::Buffer;
use cosmos_kernels::{Isa, attention, rows};

use super::inside::Inside;
use super::layout::{Layout, Projection, Weights};
use super::parts::{PART_COLUMNS, column_parts};
use crate::Result;

/// Cosines and sines of positions from 0, `[position, dim / 2]`.
#[derive(Debug)]
pub struct Turns {
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
}

impl Turns {
    /// Those of one position.
    fn at(&self, position: usize, half: usize) -> (&[f32], &[f32]) {
        let row = position * half..(position + 1) * half;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

/// What backward needs of a forward.
pub enum Saved {
    /// The block's input: backward runs forward again.
    Input(Arc<Buffer>),
    /// Everything that costs a product.
    Whole(Box<Whole>),
}

/// What a block's forward computes with products.
pub struct Whole {
    /// The block's input.
    x: Arc<Buffer>,
    /// Queries, keys and values before norm and rotation.
    raw: Buffer,
    /// What the attention gave.
    mixed: Buffer,
    /// Logs of its sums.
    log_sums: Buffer,
    /// The residual stream after the attention.
    z: Buffer,
    /// Gate and up.
    gate_up: Buffer,
}

impl Whole {
    /// The block's input; the rest is given up.
    pub(super) fn into_input(self) -> Arc<Buffer> {
        self.x
    }

    /// Numbers held beside the input.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        [&self.raw, &self.mixed, &self.log_sums, &self.z, &self.gate_up].map(|buffer| buffer.len()).iter().sum()
    }
}

/// A block's attention and what leads to it.
pub(super) struct Attended {
    /// Queries, keys and values before norm and rotation.
    pub raw: Buffer,
    /// What the attention gave.
    pub mixed: Buffer,
    /// Logs of its sums.
    pub log_sums: Buffer,
    /// The residual stream after it.
    pub z: Buffer,
}

/// A block and what it runs with.
pub(super) struct Run<'a> {
    pub isa: Isa,
    pub layout: &'a Layout,
    pub weights: Weights<'a>,
    /// None for whole blocks.
    pub inside: Option<&'a Inside>,
}

impl Run<'_> {
    /// `x · Wᵀ + b` for rows as wide as W's.
    pub fn project(&self, to: Projection<'_>, x: &[f32]) -> Buffer {
        let Projection { weight, bias, n, k } = to;
        let m = x.len() / k;
        let mut y = Buffer::dirty(m * n);
        if let Some(bias) = bias {
            y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
        }
        weight.product(self.isa, Shape { m, n, k }, x, &mut y, bias.is_some());
        y
    }

    /// `stream + x · Wᵀ + b`; the product is a sum over tensor parallel ranks.
    pub fn add_projected(&self, to: Projection<'_>, x: &[f32], stream: Buffer) -> Result<Buffer> {
        let Projection { weight, n, k, .. } = to;
        let shape = Shape { m: x.len() / k, n, k };
        let product = |y: &mut Buffer, add: bool| weight.product(self.isa, shape, x, y, add);
        let mut y = self.biased(to, stream);
        match self.inside {
            None => product(&mut y, true),
            Some(inside) => {
                let mut part = Buffer::dirty(y.len());
                product(&mut part, false);
                inside.sum(&mut part)?;
                rows::add(self.isa, &mut y, &part);
            }
        }
        Ok(y)
    }

    /// `stream + b`.
    pub fn biased(&self, to: Projection<'_>, mut stream: Buffer) -> Buffer {
        if let Some(bias) = to.bias {
            stream.chunks_exact_mut(to.n).for_each(|row| rows::add(self.isa, row, bias));
        }
        stream
    }

    pub fn norm(&self, x: &[f32], weight: &[f32]) -> Buffer {
        let (mut y, width) = (Buffer::dirty(x.len()), weight.len());
        rows::rms_norm(self.isa, x, width, 1, weight, self.layout.eps, &mut y, width);
        y
    }

    /// Queries (scaled), keys and values as the attention wants them; `position` gives each row's.
    pub fn turned(&self, raw: &[f32], turns: &Turns, position: impl Fn(usize) -> usize) -> Buffer {
        let heads = self.layout.heads;
        let (row, width, dim, half) = (heads.row(), heads.width(), heads.dim, heads.dim / 2);
        let keys = width..width + heads.kv_heads * dim;
        let mut qkv = Buffer::dirty(raw.len());
        let scale = 1.0 / (dim as f32).sqrt();
        for (index, (qkv, raw)) in qkv.chunks_exact_mut(row).zip(raw.chunks_exact(row)).enumerate() {
            // Norms write what they read elsewhere.
            let copied = if self.weights.qk_norms.is_some() { keys.end } else { 0 };
            qkv[copied..].copy_from_slice(&raw[copied..]);
            if let Some((q_norm, k_norm)) = self.weights.qk_norms {
                let eps = self.layout.eps;
                rows::rms_norm(self.isa, raw, row, heads.heads, q_norm, eps, qkv, row);
                rows::rms_norm(
                    self.isa,
                    &raw[keys.clone()],
                    row,
                    heads.kv_heads,
                    k_norm,
                    eps,
                    &mut qkv[keys.clone()],
                    row,
                );
            }
            let (cos, sin) = turns.at(position(index), half);
            rows::rotate(self.isa, qkv, heads.heads, cos, sin, 1.0, scale);
            rows::rotate(self.isa, &mut qkv[keys.clone()], heads.kv_heads, cos, sin, 1.0, 1.0);
        }
        qkv
    }

    /// Gate and up, from the stream after the attention.
    pub fn gate_up(&self, z: &[f32]) -> Buffer {
        self.project(self.weights.gate_up, &self.norm(z, self.weights.post_norm))
    }

    /// The block's output, from the stream after the attention and gate and up.
    pub fn finish(&self, z: Buffer, gate_up: &[f32]) -> Result<Buffer> {
        let mut inner = Buffer::dirty(gate_up.len() / 2);
        rows::swiglu(self.isa, gate_up, self.layout.inner, &mut inner);
        self.add_projected(self.weights.down, &inner, z)
    }

    /// The position of the first of `t` tokens.
    fn first_position(&self, t: usize) -> usize {
        self.inside.map_or(0, |inside| inside.first_position(t))
    }

    /// The ranks that have other tokens of the same sequences, if there are any.
    fn contexts(&self) -> Option<&Inside> {
        self.inside.filter(|inside| inside.contexts() > 1)
    }

    /// Attention of `b` sequences: what it gives, and the logs of its sums.
    fn attend(&self, b: usize, t: usize, qkv: &[f32]) -> Result<(Buffer, Buffer)> {
        let attention = |heads: Heads, t: usize, qkv: &[f32]| {
            let (mut mixed, mut log_sums) = (Buffer::dirty(b * t * heads.width()), Buffer::dirty(b * t * heads.heads));
            attention::forward(self.isa, heads, b, t, qkv, &mut mixed, &mut log_sums);
            (mixed, log_sums)
        };
        let heads = self.layout.heads;
        let Some(inside) = self.contexts() else { return Ok(attention(heads, t, qkv)) };
        let qkv = inside.to_all_tokens(b, qkv, heads.row(), &inside.qkv_spans())?;
        let (mixed, log_sums) = attention(inside.attending(), t * inside.contexts(), &qkv);
        Ok((inside.to_own_tokens(b, &mixed, heads.width(), &inside.mixed_spans())?, log_sums))
    }

    /// Its backward: the gradient at queries, keys and values.
    fn attend_vjp(&self, b: usize, t: usize, qkv: &[f32], log_sums: &[f32], dmixed: &[f32]) -> Result<Buffer> {
        let heads = self.layout.heads;
        let mut dqkv = Buffer::dirty(qkv.len());
        let Some(inside) = self.contexts() else {
            attention::backward(self.isa, heads, b, t, qkv, log_sums, dmixed, &mut dqkv);
            return Ok(dqkv);
        };
        let (qkv_spans, mixed_spans) = (inside.qkv_spans(), inside.mixed_spans());
        let qkv = inside.to_all_tokens(b, qkv, heads.row(), &qkv_spans)?;
        let dmixed = inside.to_all_tokens(b, dmixed, heads.width(), &mixed_spans)?;
        let mut dqkv = Buffer::dirty(qkv.len());
        let t = t * inside.contexts();
        attention::backward(self.isa, inside.attending(), b, t, &qkv, log_sums, &dmixed, &mut dqkv);
        inside.to_own_tokens(b, &dqkv, heads.row(), &qkv_spans)
    }

    /// The block over `b` sequences.
    pub fn forward(&self, turns: &Turns, b: usize, x: &[f32]) -> Result<Buffer> {
        // What else the attention leaves is for a backward.
        let Attended { z, .. } = self.attended(turns, b, x)?;
        self.finished_in_parts(z).or_else(|z| {
            let gate_up = self.gate_up(&z);
            self.finish(z, &gate_up)
        })
    }

    /// The block over `b` sequences, and what backward needs of it.
    pub fn forward_keep(&self, turns: &Turns, b: usize, x: Arc<Buffer>) -> Result<(Buffer, Whole)> {
        let whole = self.forward_whole(turns, b, x)?;
        Ok((self.finish(whole.z.clone(), &whole.gate_up)?, whole))
    }

    /// What backward needs of the block over `b` sequences, without its output.
    fn forward_whole(&self, turns: &Turns, b: usize, x: Arc<Buffer>) -> Result<Whole> {
        let Attended { raw, mixed, log_sums, z } = self.attended(turns, b, &x)?;
        let gate_up = self.gate_up(&z);
        Ok(Whole { x, raw, mixed, log_sums, z, gate_up })
    }

    /// The block over `b` sequences up to the stream after the attention.
    pub fn attended(&self, turns: &Turns, b: usize, x: &[f32]) -> Result<Attended> {
        let t = x.len() / self.layout.hidden / b;
        let raw = self.project(self.weights.qkv, &self.norm(x, self.weights.input_norm));
        let first = self.first_position(t);
        let qkv = self.turned(&raw, turns, |row| first + row % t);
        let (mixed, log_sums) = self.attend(b, t, &qkv)?;
        drop(qkv);
        let z = self.add_projected(self.weights.o, &mixed, Buffer::of(x))?;
        Ok(Attended { raw, mixed, log_sums, z })
    }

    /// A gradient at what is the same on all tensor parallel ranks: the sum over them.
    fn joint(&self, mut dx: Buffer) -> Result<Buffer> {
        if let Some(inside) = self.inside {
            inside.sum(&mut dx)?;
        }
        Ok(dx)
    }

    /// As [`Run::back`] for gate and up, summed in the order of [`column_parts`].
    fn back_gate_up(&self, dgate_up: &[f32], weight: &[f32]) -> Buffer {
        let (h, f) = (self.layout.hidden, self.layout.inner);
        if f <= PART_COLUMNS {
            return self.back(dgate_up, weight, 2 * f, h);
        }
        let m = dgate_up.len() / (2 * f);
        let mut dx = Buffer::dirty(m * h);
        let parts = column_parts(f).flat_map(|part| [part.start..part.end, f + part.start..f + part.end]);
        for (index, columns) in parts.enumerate() {
            let shape = Shape { m, n: h, k: columns.len() };
            let (left, right) =
                (Left::Rows(&dgate_up[columns.start..], 2 * f), Right::Rows(&weight[columns.start * h..], h));
            gemm(self.isa, shape, left, right, &mut dx, h, index > 0);
        }
        dx
    }

    /// `dy · W` for a weight `[n, k]` of the flat buffer.
    fn back(&self, dy: &[f32], weight: &[f32], n: usize, k: usize) -> Buffer {
        let m = dy.len() / n;
        let mut dx = Buffer::dirty(m * k);
        gemm(self.isa, Shape { m, n: k, k: n }, Left::Rows(dy, n), Right::Rows(weight, k), &mut dx, k, false);
        dx
    }

    /// Backward over one tile, without the gradients of matrices.
    pub fn backward(&self, params: &[f32], turns: &Turns, b: usize, saved: Saved, dy: Arc<Buffer>) -> Result<Pending> {
        let layout = self.layout;
        let (h, f) = (layout.hidden, layout.inner);
        let Whole { x, raw, mixed, log_sums, z, gate_up } = match saved {
            Saved::Input(x) => self.forward_whole(turns, b, x)?,
            Saved::Whole(whole) => *whole,
        };
        let weight = |range: &Range<usize>| &params[range.clone()];
        let t = z.len() / h / b;

        let mut inner = self.back(&dy, weight(&layout.down), h, f);
        let mut dgate_up = gate_up;
        rows::swiglu_vjp(self.isa, &mut dgate_up, f, &mut inner);
        let dz_normed = self.joint(self.back_gate_up(&dgate_up, weight(&layout.gate_up)))?;
        let mut dz = Buffer::of(&dy);
        let mut dpost_norm = vec![0.0; h];
        let post_norm = self.weights.post_norm;
        rows::rms_norm_vjp(self.isa, &z, h, 1, post_norm, layout.eps, &dz_normed, h, &mut dz, h, true, &mut dpost_norm);
        drop(dz_normed);
        let z_normed = self.norm(&z, post_norm);
        drop(z);

        let attention = self.attention_vjp(params, turns, (b, t), &x, raw, &log_sums, &dz)?;
        Ok(Pending { attention, dy, inner, dgate_up, z_normed, dz, mixed, dpost_norm })
    }

    /// Backward of the block up to the stream after the attention, from the gradient `dz` there; `[b, t]` tokens.
    #[allow(clippy::too_many_arguments)] // a forward's results, one by one, so that each is freed when it was read
    pub fn attention_vjp(
        &self,
        params: &[f32],
        turns: &Turns,
        (b, t): (usize, usize),
        x: &[f32],
        raw: Buffer,
        log_sums: &[f32],
        dz: &[f32],
    ) -> Result<AttentionPending> {
        let layout = self.layout;
        let (h, heads) = (layout.hidden, layout.heads);
        let weight = |range: &Range<usize>| &params[range.clone()];
        let dmixed = self.back(dz, weight(&layout.o), h, heads.width());
        let first = self.first_position(t);
        let qkv = self.turned(&raw, turns, |row| first + row % t);
        // Only norms read it again.
        let raw = self.weights.qk_norms.map(|_| raw);
        let dqkv = self.attend_vjp(b, t, &qkv, log_sums, &dmixed)?;
        drop((qkv, dmixed));
        let (draw, dqk_norms) = self.turned_vjp(raw.as_deref(), dqkv, turns, t);
        drop(raw);
        let dx_normed = self.joint(self.back(&draw, weight(&layout.qkv), heads.row(), h))?;
        let mut dx = Buffer::of(dz);
        let mut dinput_norm = vec![0.0; h];
        let input_norm = self.weights.input_norm;
        let eps = layout.eps;
        rows::rms_norm_vjp(self.isa, x, h, 1, input_norm, eps, &dx_normed, h, &mut dx, h, true, &mut dinput_norm);
        drop(dx_normed);
        let x_normed = self.norm(x, input_norm);
        Ok(AttentionPending { dx, draw, x_normed, dinput_norm, dqk_norms })
    }

    /// Backward of [`Run::turned`]: the gradient at `raw`, and at the norms of queries and keys.
    fn turned_vjp(
        &self,
        raw: Option<&[f32]>,
        mut dqkv: Buffer,
        turns: &Turns,
        t: usize,
    ) -> (Buffer, Option<(Vec<f32>, Vec<f32>)>) {
        let heads = self.layout.heads;
        let (row, width, dim, half) = (heads.row(), heads.width(), heads.dim, heads.dim / 2);
        let keys = width..width + heads.kv_heads * dim;
        let scale = 1.0 / (dim as f32).sqrt();
        let first = self.first_position(t);
        for (index, dqkv) in dqkv.chunks_exact_mut(row).enumerate() {
            let (cos, sin) = turns.at(first + index % t, half);
            rows::rotate(self.isa, dqkv, heads.heads, cos, sin, -1.0, scale);
            rows::rotate(self.isa, &mut dqkv[keys.clone()], heads.kv_heads, cos, sin, -1.0, 1.0);
        }
        let Some(((q_norm, k_norm), raw)) = self.weights.qk_norms.zip(raw) else { return (dqkv, None) };
        let mut draw = Buffer::of(&dqkv);
        let (mut dq_norm, mut dk_norm) = (vec![0.0; dim], vec![0.0; dim]);
        let eps = self.layout.eps;
        rows::rms_norm_vjp(
            self.isa,
            raw,
            row,
            heads.heads,
            q_norm,
            eps,
            &dqkv,
            row,
            &mut draw,
            row,
            false,
            &mut dq_norm,
        );
        for ((raw, dqkv), draw) in raw.chunks_exact(row).zip(dqkv.chunks_exact(row)).zip(draw.chunks_exact_mut(row)) {
            let (raw, dqkv, draw) = (&raw[keys.clone()], &dqkv[keys.clone()], &mut draw[keys.clone()]);
            let stride = keys.len();
            rows::rms_norm_vjp(
                self.isa,
                raw,
                stride,
                heads.kv_heads,
                k_norm,
                eps,
                dqkv,
                stride,
                draw,
                stride,
                false,
                &mut dk_norm,
            );
        }
        (draw, Some((dq_norm, dk_norm)))
    }
}

/// A tile's backward through the attention with the gradients of its matrices still to be taken: both factors of that
/// of queries, keys and values, one of the output's.
pub(super) struct AttentionPending {
    pub dx: Buffer,
    draw: Buffer,
    x_normed: Buffer,
    dinput_norm: Vec<f32>,
    dqk_norms: Option<(Vec<f32>, Vec<f32>)>,
}

impl AttentionPending {
    /// Adds this tile's gradients of the parameters up to the attention's output, of which `mixed` and `dz` are the
    /// factors; gives the gradient at the block's input.
    pub fn add_to(self, isa: Isa, layout: &Layout, mixed: &[f32], dz: &[f32], grads: &mut [f32]) -> Buffer {
        let (h, width) = (layout.hidden, layout.heads.width());
        add_product(isa, &mut grads[layout.qkv.clone()], &self.draw, &self.x_normed, layout.heads.row(), h);
        add_product(isa, &mut grads[layout.o.clone()], dz, mixed, h, width);
        for (range, dy) in [(&layout.qkv_bias, &*self.draw), (&layout.o_bias, dz)] {
            if let Some(range) = range {
                rows::add_rows(isa, dy, &mut grads[range.clone()]);
            }
        }
        rows::add(isa, &mut grads[layout.input_norm.clone()], &self.dinput_norm);
        if let (Some((q, k)), Some((dq, dk))) = (&layout.qk_norms, &self.dqk_norms) {
            rows::add(isa, &mut grads[q.clone()], dq);
            rows::add(isa, &mut grads[k.clone()], dk);
        }
        self.dx
    }
}

/// `grads += dyᵀ · x`, for a matrix `[n, k]`.
fn add_product(isa: Isa, grads: &mut [f32], dy: &[f32], x: &[f32], n: usize, k: usize) {
    let shape = Shape { m: n, n: k, k: dy.len() / n };
    gemm(isa, shape, Left::Columns(dy, n), Right::Rows(x, k), grads, k, true);
}

/// A tile's backward with the gradients of its matrices still to be taken: both factors of each.
pub(super) struct Pending {
    attention: AttentionPending,
    dy: Arc<Buffer>,
    inner: Buffer,
    dgate_up: Buffer,
    z_normed: Buffer,
    dz: Buffer,
    mixed: Buffer,
    dpost_norm: Vec<f32>,
}

impl Pending {
    /// Adds this tile's gradients of a block's parameters to `grads` and gives the gradient at its input.
    pub fn add_to(self, isa: Isa, layout: &Layout, grads: &mut [f32]) -> Buffer {
        let (h, f) = (layout.hidden, layout.inner);
        add_product(isa, &mut grads[layout.gate_up.clone()], &self.dgate_up, &self.z_normed, 2 * f, h);
        add_product(isa, &mut grads[layout.down.clone()], &self.dy, &self.inner, h, f);
        for (range, dy) in [(&layout.gate_up_bias, &*self.dgate_up), (&layout.down_bias, &**self.dy)] {
            if let Some(range) = range {
                rows::add_rows(isa, dy, &mut grads[range.clone()]);
            }
        }
        rows::add(isa, &mut grads[layout.post_norm.clone()], &self.dpost_norm);
        self.attention.add_to(isa, layout, &self.mixed, &self.dz, grads)
    }
}
