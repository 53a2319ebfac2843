//! One block of Qwen2, Qwen3 and Llama, as their papers write it: pre-norm attention with rotary positions and grouped
//! key-value heads, then SwiGLU. The families differ in biases and in the norm of queries and keys.
//!
//! Activations are `[n, hidden]`, `n = b · t`, so that every projection is one two-dimensional product.

use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Device, Gradients, Tensor, TensorData};

use super::{Geometry, no_gradient, to_host};
use crate::Result;
use crate::model::ModelConfig;

/// Added to scores that must not count; its exponential is exactly 0.
pub(super) const MASKED: f32 = -1e30;

/// Sizes of the attention.
pub(super) struct Shapes {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f64,
    /// The narrowest result of any product.
    pub narrowest: usize,
}

impl Shapes {
    pub fn of(config: &ModelConfig) -> Self {
        let (heads, kv_heads, head_dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let widths = [config.hidden_size, config.intermediate_size, kv_heads * head_dim, config.vocab_size];
        Self { heads, kv_heads, head_dim, eps: config.rms_norm_eps, narrowest: widths.into_iter().min().unwrap_or(1) }
    }
}

/// `y = x · Wᵀ + b`.
struct Linear {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl Linear {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = x.matmul(self.weight.clone().transpose());
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

/// A block's parameters.
pub struct BlockParams {
    input_norm: Tensor<1>,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Norms of query and key heads (Qwen3).
    qk_norm: Option<(Tensor<1>, Tensor<1>)>,
    o: Linear,
    post_norm: Tensor<1>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Cuts tensors from a flat slice, one after the other.
struct Cutter<'a> {
    flat: &'a [f32],
    device: &'a Device,
}

impl Cutter<'_> {
    fn take<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let (values, rest) = self.flat.split_at(shape.iter().product());
        self.flat = rest;
        Tensor::from_data(TensorData::new(values.to_vec(), shape), self.device)
    }

    fn bias(&mut self, wanted: bool, width: usize) -> Option<Tensor<1>> {
        wanted.then(|| self.take([width]))
    }
}

impl BlockParams {
    /// From a flat slice in the order of [`ModelConfig::block_params`], whose total length the caller has checked.
    pub(super) fn from_flat(config: &ModelConfig, flat: &[f32], device: &Device) -> Self {
        let (h, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q_width, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let mut cut = Cutter { flat, device };
        let input_norm = cut.take([h]);
        let (w_q, w_k, w_v) = (cut.take([q_width, h]), cut.take([kv, h]), cut.take([kv, h]));
        let q = Linear { weight: w_q, bias: cut.bias(config.qkv_bias, q_width) };
        let k = Linear { weight: w_k, bias: cut.bias(config.qkv_bias, kv) };
        let v = Linear { weight: w_v, bias: cut.bias(config.qkv_bias, kv) };
        let qk_norm = config.qk_norm.then(|| (cut.take([d]), cut.take([d])));
        let o = Linear { weight: cut.take([h, q_width]), bias: cut.bias(config.o_bias, h) };
        let post_norm = cut.take([h]);
        let (w_gate, w_up) = (cut.take([f, h]), cut.take([f, h]));
        let gate = Linear { weight: w_gate, bias: cut.bias(config.mlp_bias, f) };
        let up = Linear { weight: w_up, bias: cut.bias(config.mlp_bias, f) };
        let down = Linear { weight: cut.take([h, f]), bias: cut.bias(config.mlp_bias, h) };
        Self { input_norm, q, k, v, qk_norm, o, post_norm, gate, up, down }
    }

    /// The same values as leaves of a fresh autodiff graph.
    pub(super) fn tracked(&self) -> Self {
        fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
            tensor.clone().autodiff().require_grad()
        }
        let linear = |l: &Linear| Linear { weight: leaf(&l.weight), bias: l.bias.as_ref().map(leaf) };
        Self {
            input_norm: leaf(&self.input_norm),
            q: linear(&self.q),
            k: linear(&self.k),
            v: linear(&self.v),
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| (leaf(q), leaf(k))),
            o: linear(&self.o),
            post_norm: leaf(&self.post_norm),
            gate: linear(&self.gate),
            up: linear(&self.up),
            down: linear(&self.down),
        }
    }

    /// Gradients of all parameters in the order of the flat slice.
    pub(super) fn flat_grads(&self, grads: &mut Gradients) -> Result<Vec<f32>> {
        let mut list = GradList { flat: Vec::new(), grads };
        list.push(&self.input_norm)?;
        list.linears(&[&self.q, &self.k, &self.v])?;
        if let Some((q, k)) = &self.qk_norm {
            list.push(q)?;
            list.push(k)?;
        }
        list.linears(&[&self.o])?;
        list.push(&self.post_norm)?;
        list.linears(&[&self.gate, &self.up])?;
        list.linears(&[&self.down])?;
        Ok(list.flat)
    }
}

/// Gradients, one after the other.
struct GradList<'a> {
    flat: Vec<f32>,
    grads: &'a mut Gradients,
}

impl GradList<'_> {
    fn push<const D: usize>(&mut self, tensor: &Tensor<D>) -> Result<()> {
        self.flat.extend(to_host(tensor.grad_remove(self.grads).ok_or_else(no_gradient)?)?);
        Ok(())
    }

    /// All weights, then all biases.
    fn linears(&mut self, linears: &[&Linear]) -> Result<()> {
        for linear in linears {
            self.push(&linear.weight)?;
        }
        for bias in linears.iter().filter_map(|linear| linear.bias.as_ref()) {
            self.push(bias)?;
        }
        Ok(())
    }
}

/// `x / √(mean(x²) + ε) · w` over the last dimension (Zhang and Sennrich 2019).
pub(super) fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let scale = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    x * scale * weight.clone().unsqueeze()
}

/// Rotary positions (Su et al. 2021, in the half-split form): `x · cos + half_turn(x) · sin`.
fn rotate(x: Tensor<4>, cos: &Tensor<4>, sin: &Tensor<4>, half_turn: &Tensor<2>) -> Tensor<4> {
    let [b, t, heads, dim] = x.dims();
    let turned = x.clone().reshape([b * t * heads, dim]).matmul(half_turn.clone()).reshape([b, t, heads, dim]);
    x * cos.clone() + turned * sin.clone()
}

/// Queries (scaled by `1/√head_dim`), keys and values of `b` rows: `[b, t, heads, head_dim]`.
pub(super) fn queries_keys_values(
    block: &BlockParams,
    shapes: &Shapes,
    cos: &Tensor<4>,
    sin: &Tensor<4>,
    half_turn: &Tensor<2>,
    b: usize,
    x: Tensor<2>,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let [n, _] = x.dims();
    let (t, dim) = (n / b, shapes.head_dim);
    let x = rms_norm(x, &block.input_norm, shapes.eps);
    let head_norm = |x: Tensor<2>, norm: Option<&Tensor<1>>, heads: usize| match norm {
        Some(norm) => rms_norm(x.reshape([n * heads, dim]), norm, shapes.eps).reshape([b, t, heads, dim]),
        None => x.reshape([b, t, heads, dim]),
    };
    let norms = block.qk_norm.as_ref();
    let q = head_norm(block.q.forward(x.clone()), norms.map(|(q, _)| q), shapes.heads);
    let k = head_norm(block.k.forward(x.clone()), norms.map(|(_, k)| k), shapes.kv_heads);
    let v = block.v.forward(x).reshape([b, t, shapes.kv_heads, dim]);
    let q = rotate(q, cos, sin, half_turn).mul_scalar(1.0 / (dim as f64).sqrt());
    (q, rotate(k, cos, sin, half_turn), v)
}

/// Causal attention; the query heads of a key-value head are treated as more queries of one head, so that keys and
/// values are never repeated. `[n, heads · head_dim]`.
fn attention(shapes: &Shapes, mask: &Tensor<5>, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<2> {
    let [b, t, heads, dim] = q.dims();
    let (kv, group) = (shapes.kv_heads, heads / shapes.kv_heads);
    let q = q.reshape([b, t, kv, group, dim]).permute([0, 2, 3, 1, 4]).reshape([b, kv, group * t, dim]);
    let scores = q.matmul(k.permute([0, 2, 3, 1])).reshape([b, kv, group, t, t]) + mask.clone();
    let weights = softmax(scores, 4).reshape([b, kv, group * t, t]);
    let mixed = weights.matmul(v.permute([0, 2, 1, 3])).reshape([b, kv, group, t, dim]);
    mixed.permute([0, 3, 1, 2, 4]).reshape([b * t, heads * dim])
}

/// What follows the attention: its output projection and the SwiGLU (Shazeer 2020), each added to the residual stream.
pub(super) fn after_attention(block: &BlockParams, shapes: &Shapes, x: Tensor<2>, mixed: Tensor<2>) -> Tensor<2> {
    let x = x + block.o.forward(mixed);
    let z = rms_norm(x.clone(), &block.post_norm, shapes.eps);
    let inner = silu(block.gate.forward(z.clone())) * block.up.forward(z);
    x + block.down.forward(inner)
}

/// One block over `b` rows.
pub(super) fn block(
    block: &BlockParams,
    shapes: &Shapes,
    geometry: &Geometry,
    half_turn: &Tensor<2>,
    b: usize,
    x: Tensor<2>,
) -> Tensor<2> {
    let (q, k, v) = queries_keys_values(block, shapes, &geometry.cos, &geometry.sin, half_turn, b, x.clone());
    let mixed = attention(shapes, &geometry.mask, q, k, v);
    after_attention(block, shapes, x, mixed)
}
