//! Where a block's parameters lie in its flat buffer, and the block as the kernels read it.

use std::ops::Range;

use cosmos_kernels::Isa;
use cosmos_kernels::attention::Heads;
use cosmos_kernels::gemm::Right;

use super::matrix::{Factor, Formats, Matrix};
use crate::model::ModelConfig;

/// Places in a block's flat buffer, in the order of [`ModelConfig::block_params`]. Projections that share an input are one
/// matrix: queries, keys and values; gate and up.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub hidden: usize,
    pub inner: usize,
    pub heads: Heads,
    pub eps: f32,
    pub input_norm: Range<usize>,
    pub qkv: Range<usize>,
    pub qkv_bias: Option<Range<usize>>,
    pub qk_norms: Option<(Range<usize>, Range<usize>)>,
    pub o: Range<usize>,
    pub o_bias: Option<Range<usize>>,
    pub post_norm: Range<usize>,
    pub gate_up: Range<usize>,
    pub gate_up_bias: Option<Range<usize>>,
    pub down: Range<usize>,
    pub down_bias: Option<Range<usize>>,
}

impl Layout {
    pub fn of(config: &ModelConfig) -> Self {
        let heads =
            Heads { heads: config.num_attention_heads, kv_heads: config.num_key_value_heads, dim: config.head_dim };
        Self::of_part(config, heads, config.intermediate_size)
    }

    /// That of a rank which has only these heads, and `f` columns inside the SwiGLU.
    pub fn of_part(config: &ModelConfig, heads: Heads, f: usize) -> Self {
        let (h, d) = (config.hidden_size, config.head_dim);
        let mut end = 0;
        let mut next = |len: usize| {
            end += len;
            end - len..end
        };
        Self {
            hidden: h,
            inner: f,
            heads,
            eps: config.rms_norm_eps as f32,
            input_norm: next(h),
            qkv: next(heads.row() * h),
            qkv_bias: config.qkv_bias.then(|| next(heads.row())),
            qk_norms: config.qk_norm.then(|| (next(d), next(d))),
            o: next(h * heads.width()),
            o_bias: config.o_bias.then(|| next(h)),
            post_norm: next(h),
            gate_up: next(2 * f * h),
            gate_up_bias: config.mlp_bias.then(|| next(2 * f)),
            down: next(h * f),
            down_bias: config.mlp_bias.then(|| next(h)),
        }
    }

    /// The matrices and their biases, in the order of [`CpuBlock::linears`].
    fn linears(&self) -> [(&Range<usize>, &Option<Range<usize>>); 4] {
        [
            (&self.qkv, &self.qkv_bias),
            (&self.o, &self.o_bias),
            (&self.gate_up, &self.gate_up_bias),
            (&self.down, &self.down_bias),
        ]
    }

    /// The parameters in a block's flat buffer. Products take a little longer than on panels, and no memory.
    pub fn weights<'a>(&self, flat: &'a [f32]) -> Weights<'a> {
        let at = |range: &Range<usize>| &flat[range.clone()];
        let projection = |range: &Range<usize>, bias: &Option<Range<usize>>, n: usize, k: usize| Projection {
            weight: Factor::Wide(Right::Columns(at(range), k)),
            bias: bias.as_ref().map(at),
            n,
            k,
        };
        let (h, f, width) = (self.hidden, self.inner, self.heads.width());
        Weights {
            input_norm: at(&self.input_norm),
            qkv: projection(&self.qkv, &self.qkv_bias, self.heads.row(), h),
            qk_norms: self.qk_norms.as_ref().map(|(q, k)| (at(q), at(k))),
            o: projection(&self.o, &self.o_bias, h, width),
            post_norm: at(&self.post_norm),
            gate_up: projection(&self.gate_up, &self.gate_up_bias, 2 * f, h),
            down: projection(&self.down, &self.down_bias, h, f),
        }
    }
}

impl Linear {
    fn projection(&self) -> Projection<'_> {
        let weight = &self.weight;
        Projection { weight: weight.factor(), bias: self.bias.as_deref(), n: weight.n(), k: weight.k() }
    }
}

/// `y = x · Wᵀ + b`, W in panels.
#[derive(Debug, Default)]
pub(super) struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

/// `y = x · Wᵀ + b` as a product reads it: Wᵀ is `k × n`.
#[derive(Clone, Copy)]
pub(super) struct Projection<'a> {
    pub weight: Factor<'a>,
    pub bias: Option<&'a [f32]>,
    pub n: usize,
    pub k: usize,
}

impl<'a> Projection<'a> {
    /// All rows of W, where they are the masters.
    pub fn masters(&self) -> Option<&'a [f32]> {
        match self.weight {
            Factor::Wide(Right::Columns(rows, stride)) if stride == self.k => Some(rows),
            _ => None,
        }
    }
}

/// A block's parameters as a tile runs on them: in panels, or as they lie in the flat buffer.
pub(super) struct Weights<'a> {
    pub input_norm: &'a [f32],
    pub qkv: Projection<'a>,
    pub qk_norms: Option<(&'a [f32], &'a [f32])>,
    pub o: Projection<'a>,
    pub post_norm: &'a [f32],
    pub gate_up: Projection<'a>,
    pub down: Projection<'a>,
}

/// A block's parameters in panels, for decoding and scoring; training reads the flat buffer itself.
#[derive(Debug, Default)]
pub struct CpuBlock {
    input_norm: Vec<f32>,
    qkv: Linear,
    qk_norms: Option<(Vec<f32>, Vec<f32>)>,
    o: Linear,
    post_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

impl CpuBlock {
    pub(super) fn weights(&self) -> Weights<'_> {
        Weights {
            input_norm: &self.input_norm,
            qkv: self.qkv.projection(),
            qk_norms: self.qk_norms.as_ref().map(|(q, k)| (q.as_slice(), k.as_slice())),
            o: self.o.projection(),
            post_norm: &self.post_norm,
            gate_up: self.gate_up.projection(),
            down: self.down.projection(),
        }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let linears = self.linears();
        let matrices: usize = linears.iter().map(|linear| linear.weight.bytes()).sum();
        let biases = linears.iter().filter_map(|linear| linear.bias.as_ref());
        let norms = self.qk_norms.iter().flat_map(|(q, k)| [q, k]);
        let vectors = [&self.input_norm, &self.post_norm].into_iter().chain(norms).chain(biases);
        matrices + 4 * vectors.map(Vec::capacity).sum::<usize>()
    }

    fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// Its vectors, each with its place in the flat buffer.
    fn vectors(&self, layout: &Layout) -> Vec<(usize, &[f32])> {
        let mut all = vec![(layout.input_norm.start, &*self.input_norm), (layout.post_norm.start, &*self.post_norm)];
        if let (Some((q_at, k_at)), Some((q, k))) = (&layout.qk_norms, &self.qk_norms) {
            all.extend([(q_at.start, &**q), (k_at.start, &**k)]);
        }
        for ((_, at), linear) in layout.linears().into_iter().zip(self.linears()) {
            all.extend(at.as_ref().zip(linear.bias.as_deref()).map(|(at, bias)| (at.start, bias)));
        }
        all
    }

    /// The values at `range` of the flat buffer, from what a block in fewer bits holds.
    pub(super) fn read(&self, layout: &Layout, range: Range<usize>) -> Vec<f32> {
        let mut values = vec![0.0; range.len()];
        for (at, vector) in self.vectors(layout) {
            if (at..at + vector.len()).contains(&range.start) {
                values.copy_from_slice(&vector[range.start - at..][..range.len()]);
            }
        }
        for ((at, _), linear) in layout.linears().into_iter().zip(self.linears()) {
            if let (true, Some(matrix)) = (at.contains(&range.start), linear.weight.narrow()) {
                let first = (range.start - at.start) / matrix.k();
                values.chunks_exact_mut(matrix.k()).enumerate().for_each(|(row, to)| matrix.row(first + row, to));
            }
        }
        values
    }

    /// Replaces the values from `start` of the flat buffer on: those of one parameter.
    pub(super) fn write(&mut self, isa: Isa, layout: &Layout, formats: Formats, start: usize, values: &[f32]) {
        let within = |range: &Range<usize>| range.contains(&start).then(|| start - range.start);
        let put =
            |to: &mut [f32], first: usize| to[first..first + values.len()].copy_from_slice(&formats.vector(values));
        for (range, norm) in [(&layout.input_norm, &mut self.input_norm), (&layout.post_norm, &mut self.post_norm)] {
            if let Some(first) = within(range) {
                put(norm, first);
            }
        }
        if let (Some((q_at, k_at)), Some((q, k))) = (&layout.qk_norms, &mut self.qk_norms) {
            for (range, norm) in [(q_at, q), (k_at, k)] {
                if let Some(first) = within(range) {
                    put(norm, first);
                }
            }
        }
        let linears = [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down];
        for ((at, bias_at), linear) in layout.linears().into_iter().zip(linears) {
            if let (Some(first), Some(matrix)) = (within(at), linear.weight.narrow_mut()) {
                matrix.set(isa, first / matrix.k(), values);
            }
            if let (Some(first), Some(bias)) = (bias_at.as_ref().and_then(within), &mut linear.bias) {
                put(bias, first);
            }
        }
    }

    /// Takes the values of a flat buffer, in the memory that it has.
    pub(super) fn set(&mut self, isa: Isa, layout: &Layout, formats: Formats, flat: &[f32]) {
        let vector = |range: &Range<usize>| formats.vector(&flat[range.clone()]);
        let set = |linear: &mut Linear, range: &Range<usize>, bias: &Option<Range<usize>>, n: usize, k: usize| {
            linear.weight.set(isa, formats.blocks, &flat[range.clone()], n, k);
            linear.bias = bias.as_ref().map(vector);
        };
        let (h, f, width) = (layout.hidden, layout.inner, layout.heads.width());
        self.input_norm = vector(&layout.input_norm);
        self.post_norm = vector(&layout.post_norm);
        self.qk_norms = layout.qk_norms.as_ref().map(|(q, k)| (vector(q), vector(k)));
        set(&mut self.qkv, &layout.qkv, &layout.qkv_bias, layout.heads.row(), h);
        set(&mut self.o, &layout.o, &layout.o_bias, h, width);
        set(&mut self.gate_up, &layout.gate_up, &layout.gate_up_bias, 2 * f, h);
        set(&mut self.down, &layout.down, &layout.down_bias, h, f);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_parameters() {
        for family in [
            r#""model_type": "qwen2""#,
            r#""model_type": "qwen3", "head_dim": 10"#,
            r#""model_type": "llama", "attention_bias": true, "mlp_bias": true"#,
        ] {
            let text = format!(
                r#"{{{family}, "vocab_size": 19, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}}"#
            );
            let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
            let layout = Layout::of(&config);
            let mut places = std::collections::BTreeMap::new();
            let mut end = 0;
            for param in config.block_params(0) {
                let name = param.name.trim_start_matches("model.layers.0.").to_owned();
                places.insert(name, end..end + param.len());
                end += param.len();
            }
            let at = |name: &str| places[name].clone();
            assert_eq!(layout.input_norm, at("input_layernorm.weight"));
            assert_eq!(layout.qkv, at("self_attn.q_proj.weight").start..at("self_attn.v_proj.weight").end);
            assert_eq!(layout.o, at("self_attn.o_proj.weight"));
            assert_eq!(layout.post_norm, at("post_attention_layernorm.weight"));
            assert_eq!(layout.gate_up, at("mlp.gate_proj.weight").start..at("mlp.up_proj.weight").end);
            assert_eq!(layout.down, at("mlp.down_proj.weight"));
            if let Some(bias) = &layout.qkv_bias {
                assert_eq!(*bias, at("self_attn.q_proj.bias").start..at("self_attn.v_proj.bias").end);
            }
            if let Some((q, k)) = &layout.qk_norms {
                assert_eq!((q, k), (&at("self_attn.q_norm.weight"), &at("self_attn.k_norm.weight")));
            }
            assert_eq!(layout.o_bias, places.get("self_attn.o_proj.bias").cloned());
            if let Some(bias) = &layout.gate_up_bias {
                assert_eq!(*bias, at("mlp.gate_proj.bias").start..at("mlp.up_proj.bias").end);
            }
            assert_eq!(layout.down_bias, places.get("mlp.down_proj.bias").cloned());
            let last = layout.down_bias.as_ref().unwrap_or(&layout.down);
            assert_eq!(last.end, end);
        }
    }
}
