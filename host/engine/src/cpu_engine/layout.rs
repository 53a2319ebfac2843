//! Where a block's parameters lie in its flat buffer, and the block as the kernels read it.

use std::ops::Range;

use cosmos_kernels::Isa;
use cosmos_kernels::attention::Heads;
use cosmos_kernels::gemm::Packed;

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
}

/// `y = x · Wᵀ + b`.
#[derive(Debug, Default)]
pub(super) struct Linear {
    pub weight: Packed,
    pub bias: Option<Vec<f32>>,
}

/// A block's parameters as forward reads them; backward reads the flat buffer itself.
#[derive(Debug, Default)]
pub struct CpuBlock {
    pub(super) input_norm: Vec<f32>,
    pub(super) qkv: Linear,
    pub(super) qk_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) o: Linear,
    pub(super) post_norm: Vec<f32>,
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

impl CpuBlock {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let linears = [&self.qkv, &self.o, &self.gate_up, &self.down];
        let matrices: usize = linears.iter().map(|linear| linear.weight.bytes()).sum();
        let biases = linears.iter().filter_map(|linear| linear.bias.as_ref());
        let norms = self.qk_norms.iter().flat_map(|(q, k)| [q, k]);
        let vectors = [&self.input_norm, &self.post_norm].into_iter().chain(norms).chain(biases);
        matrices + 4 * vectors.map(Vec::capacity).sum::<usize>()
    }

    /// Takes the values of a flat buffer, in the memory that it has.
    pub(super) fn set(&mut self, isa: Isa, layout: &Layout, flat: &[f32]) {
        let vector = |range: &Range<usize>| flat[range.clone()].to_vec();
        let set = |linear: &mut Linear, range: &Range<usize>, bias: &Option<Range<usize>>, n: usize, k: usize| {
            linear.weight.set_transposed(isa, &flat[range.clone()], k, n, k);
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
