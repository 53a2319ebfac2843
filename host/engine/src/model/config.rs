//! Architectures: what a Hugging Face `config.json` says about a dense decoder of the Qwen2, Qwen3 or Llama family.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::ParamSpec;
use crate::{EngineError, Result};

/// Largest `config.json` and `generation_config.json` that is read.
const JSON_BYTES_MAX: u64 = 4 << 20;
/// Largest size that a config may name for one dimension.
const DIM_MAX: u64 = 1 << 22;
/// Largest number of layers.
const LAYERS_MAX: u64 = 1024;

/// The model families that share one block: pre-norm attention and SwiGLU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on the query, key and value projections.
    Qwen2,
    /// Qwen3 (dense): an RMSNorm on every query and key head.
    Qwen3,
    /// Llama 2 and 3 and models of the same shape.
    Llama,
}

impl Family {
    /// The `model_type` key.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Llama => "llama",
        }
    }

    /// The class that transformers loads.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// How the rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// Stretch, at least 1.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// Stretch, at least 1.
        factor: f64,
        /// Wavelengths longer than the original context divided by this are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context divided by this are kept.
        high_freq_factor: f64,
        /// Context of pre-training.
        original_max_position_embeddings: usize,
    },
}

/// An architecture. Field names follow `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which family.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the SwiGLU.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// Added to the mean square inside every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretched rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases in the SwiGLU.
    pub mlp_bias: bool,
    /// RMSNorm on every query and key head.
    pub qk_norm: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Every end-of-sequence id.
    pub eos_token_ids: Vec<u32>,
    /// Padding.
    pub pad_token_id: Option<u32>,
}

/// What `generation_config.json` (or, without it, `config.json`) says about sampling.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Every end-of-sequence id.
    pub eos_token_ids: Vec<u32>,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Padding.
    pub pad_token_id: Option<u32>,
    /// Whether the author samples rather than takes the likeliest token.
    pub do_sample: Option<bool>,
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Nucleus.
    pub top_p: Option<f64>,
    /// Number of candidates.
    pub top_k: Option<i64>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f64>,
}

/// Keys of one JSON object, with errors that name the file and the key.
struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// Put before a key in messages: `rope_parameters.` inside that object.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    fn error(&self, message: impl Into<String>, hint: impl Into<String>) -> EngineError {
        EngineError::Checkpoint { path: self.path.to_path_buf(), message: message.into(), hint: hint.into() }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn wrong<T>(&self, key: &str, value: &Value, expected: &str) -> Result<T> {
        Err(self.error(format!("`{}{key}` is `{value}`, expected {expected}", self.prefix), ""))
    }

    fn size(&self, key: &str, max: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max => Ok(Some(n as usize)),
            _ => self.wrong(key, value, &format!("a whole number from 1 to {max}")),
        }
    }

    fn required_size(&self, key: &str, max: u64) -> Result<usize> {
        self.size(key, max)?.ok_or_else(|| {
            self.error(
                format!("key `{}{key}` is missing", self.prefix),
                "take the `config.json` that belongs to the checkpoint",
            )
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|v| v.is_finite()) {
            Some(v) => Ok(Some(v)),
            None => self.wrong(key, value, "a number"),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(v) if v <= 0.0 => self.wrong(key, &json!(v), "a number above 0"),
            v => Ok(v),
        }
    }

    fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.error(format!("key `{}{key}` is missing", self.prefix), ""))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_bool() {
            Some(v) => Ok(Some(v)),
            None => self.wrong(key, value, "`true` or `false`"),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_str() {
            Some(v) => Ok(Some(v)),
            None => self.wrong(key, value, "a string"),
        }
    }

    /// One id or a list of ids; a list is also accepted where transformers writes one id, its first counts there.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let found = match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|n| vec![n]),
        };
        match found {
            Some(ids) => Ok(ids),
            None => self.wrong(key, value, "a token id or a list of token ids"),
        }
    }
}

/// Reads a small JSON object.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let io = |source| EngineError::Io { path: path.to_path_buf(), source };
    let bad =
        |message: String, hint: &str| EngineError::Checkpoint { path: path.to_path_buf(), message, hint: hint.into() };
    let bytes_found = std::fs::metadata(path).map_err(io)?.len();
    if bytes_found > JSON_BYTES_MAX {
        return Err(bad(
            format!("holds {bytes_found} bytes, the limit is {JSON_BYTES_MAX}"),
            "is this the right file?",
        ));
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(bad("holds no JSON object".into(), "")),
        Err(e) => Err(bad(format!("is not JSON: {e}"), "")),
    }
}

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        if !path.is_file() {
            return Err(EngineError::Checkpoint {
                path,
                message: "no such file".into(),
                hint: "name a Hugging Face model folder: `config.json`, `model.safetensors`, `tokenizer.json`".into(),
            });
        }
        Self::from_map(&read_object(&path)?, &path)
    }

    /// Reads the text of a `config.json`; `path` is named in errors.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Self::from_map(&map, path),
            Ok(_) => Err(EngineError::Checkpoint {
                path: path.into(),
                message: "holds no JSON object".into(),
                hint: String::new(),
            }),
            Err(e) => Err(EngineError::Checkpoint {
                path: path.into(),
                message: format!("is not JSON: {e}"),
                hint: String::new(),
            }),
        }
    }

    fn from_map(map: &Map<String, Value>, path: &Path) -> Result<Self> {
        let keys = Keys { path, map, prefix: "" };
        let family = match keys.text("model_type")? {
            Some("qwen2") => Family::Qwen2,
            Some("qwen3") => Family::Qwen3,
            Some("llama") => Family::Llama,
            other => {
                let found = other.map_or("missing".into(), |o| format!("`{o}`"));
                return Err(keys.error(
                    format!("`model_type` is {found}, expected `qwen2`, `qwen3` or `llama`"),
                    "only these dense families run today",
                ));
            }
        };
        refuse_unsupported(&keys)?;
        let hidden_size = keys.required_size("hidden_size", DIM_MAX)?;
        let heads = keys.required_size("num_attention_heads", DIM_MAX)?;
        let head_dim = match (keys.size("head_dim", DIM_MAX)?, family) {
            (Some(d), _) => d,
            // Qwen3's own default; the other families divide the hidden size.
            (None, Family::Qwen3) => 128,
            (None, _) => hidden_size / heads,
        };
        let attention_bias = keys.bool("attention_bias")?.unwrap_or(false);
        let (rope_theta, rope_scaling) = rope(&keys)?;
        let config = Self {
            family,
            vocab_size: keys.required_size("vocab_size", DIM_MAX)?,
            hidden_size,
            intermediate_size: keys.required_size("intermediate_size", DIM_MAX)?,
            num_hidden_layers: keys.required_size("num_hidden_layers", LAYERS_MAX)?,
            num_attention_heads: heads,
            num_key_value_heads: keys.size("num_key_value_heads", DIM_MAX)?.unwrap_or(heads),
            head_dim,
            max_position_embeddings: keys.required_size("max_position_embeddings", 1 << 30)?,
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.bool("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            o_bias: family != Family::Qwen2 && attention_bias,
            mlp_bias: family == Family::Llama && keys.bool("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02),
            bos_token_id: keys.ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.ids("eos_token_id")?,
            pad_token_id: keys.ids("pad_token_id")?.first().copied(),
        };
        config.check().map_err(|message| keys.error(message, ""))?;
        Ok(config)
    }

    /// Sizes that must fit together.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { num_attention_heads: heads, num_key_value_heads: kv, head_dim, hidden_size, .. } = *self;
        if heads == 0
            || kv == 0
            || self.vocab_size == 0
            || hidden_size == 0
            || self.intermediate_size == 0
            || self.num_hidden_layers == 0
        {
            return Err("a size is 0".into());
        }
        if !heads.is_multiple_of(kv) {
            return Err(format!("`num_attention_heads` {heads} is no multiple of `num_key_value_heads` {kv}"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("`head_dim` is {head_dim}, rotary positions need an even number"));
        }
        if (heads as u64) * (head_dim as u64) > DIM_MAX {
            return Err(format!("`num_attention_heads` {heads} times `head_dim` {head_dim} is above {DIM_MAX}"));
        }
        Ok(())
    }

    /// The `config.json` that transformers (4 and 5) loads. `dtype` is that of the weights beside it.
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        put("architectures", json!([self.family.architecture()]));
        put("model_type", json!(self.family.model_type()));
        if self.family != Family::Qwen2 {
            put("attention_bias", json!(self.qkv_bias));
        }
        if self.family == Family::Llama {
            put("mlp_bias", json!(self.mlp_bias));
        }
        put("attention_dropout", json!(0.0));
        put("bos_token_id", json!(self.bos_token_id));
        put("eos_token_id", one_or_list(&self.eos_token_ids));
        put("pad_token_id", json!(self.pad_token_id));
        put("head_dim", json!(self.head_dim));
        put("hidden_act", json!("silu"));
        put("hidden_size", json!(self.hidden_size));
        put("initializer_range", json!(self.initializer_range));
        put("intermediate_size", json!(self.intermediate_size));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("num_hidden_layers", json!(self.num_hidden_layers));
        put("num_key_value_heads", json!(self.num_key_value_heads));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        // Version 4 reads `rope_theta` and `rope_scaling`, version 5 reads `rope_parameters`; each ignores the other's.
        put("rope_theta", json!(self.rope_theta));
        let scaling = self.rope_scaling.map(rope_scaling_json);
        let mut parameters =
            scaling.clone().unwrap_or_else(|| Map::from_iter([("rope_type".to_string(), json!("default"))]));
        parameters.insert("rope_theta".into(), json!(self.rope_theta));
        put("rope_parameters", Value::Object(parameters));
        put("rope_scaling", scaling.map_or(Value::Null, Value::Object));
        if self.family != Family::Llama {
            put("sliding_window", Value::Null);
            put("use_sliding_window", json!(false));
        }
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("torch_dtype", json!(dtype));
        put("use_cache", json!(true));
        put("vocab_size", json!(self.vocab_size));
        Value::Object(map)
    }

    /// Parameters before the blocks: the embedding.
    pub fn embed_params(&self) -> Vec<ParamSpec> {
        vec![spec("model.embed_tokens.weight".into(), &[self.vocab_size, self.hidden_size])]
    }

    /// Parameters of block `layer`, in the order of a block's flat buffer: projections that share an input lie next to
    /// each other, so that an engine can treat them as one matrix.
    pub fn block_params(&self, layer: usize) -> Vec<ParamSpec> {
        let (h, f, d) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (q, kv) = (self.num_attention_heads * d, self.num_key_value_heads * d);
        let mut list = Vec::new();
        let mut put = |name: &str, shape: &[usize]| list.push(spec(format!("model.layers.{layer}.{name}"), shape));
        put("input_layernorm.weight", &[h]);
        put("self_attn.q_proj.weight", &[q, h]);
        put("self_attn.k_proj.weight", &[kv, h]);
        put("self_attn.v_proj.weight", &[kv, h]);
        if self.qkv_bias {
            put("self_attn.q_proj.bias", &[q]);
            put("self_attn.k_proj.bias", &[kv]);
            put("self_attn.v_proj.bias", &[kv]);
        }
        if self.qk_norm {
            put("self_attn.q_norm.weight", &[d]);
            put("self_attn.k_norm.weight", &[d]);
        }
        put("self_attn.o_proj.weight", &[h, q]);
        if self.o_bias {
            put("self_attn.o_proj.bias", &[h]);
        }
        put("post_attention_layernorm.weight", &[h]);
        put("mlp.gate_proj.weight", &[f, h]);
        put("mlp.up_proj.weight", &[f, h]);
        if self.mlp_bias {
            put("mlp.gate_proj.bias", &[f]);
            put("mlp.up_proj.bias", &[f]);
        }
        put("mlp.down_proj.weight", &[h, f]);
        if self.mlp_bias {
            put("mlp.down_proj.bias", &[h]);
        }
        list
    }

    /// The norm after the last block.
    pub fn norm_params(&self) -> Vec<ParamSpec> {
        vec![spec("model.norm.weight".into(), &[self.hidden_size])]
    }

    /// The head, unless it is the embedding.
    pub fn head_params(&self) -> Vec<ParamSpec> {
        if self.tie_word_embeddings {
            Vec::new()
        } else {
            vec![spec("lm_head.weight".into(), &[self.vocab_size, self.hidden_size])]
        }
    }

    /// All parameters in the order of the network: embedding, blocks, norm, head. Tied weights appear once.
    pub fn params(&self) -> Vec<ParamSpec> {
        let mut list = self.embed_params();
        list.extend((0..self.num_hidden_layers).flat_map(|layer| self.block_params(layer)));
        list.extend(self.norm_params());
        list.extend(self.head_params());
        list
    }

    /// Numbers a token that one block's forward keeps for its backward beside its input: queries, keys and values; the
    /// attention's result and its sums; the stream after it; gate and up.
    pub fn kept_width(&self) -> usize {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        (2 * heads + 2 * kv_heads) * self.head_dim + heads + self.hidden_size + 2 * self.intermediate_size
    }

    /// Bytes that the keys and values of one token take in all blocks.
    pub fn kv_token_bytes(&self) -> usize {
        4 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
    }

    /// Number of trainable numbers; tied weights count once.
    pub fn parameter_count(&self) -> u64 {
        let count = |list: Vec<ParamSpec>| list.iter().map(|p| p.len() as u64).sum::<u64>();
        count(self.embed_params())
            + count(self.block_params(0)) * self.num_hidden_layers as u64
            + count(self.norm_params())
            + count(self.head_params())
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `folder`; what it lacks comes from `config`.
    pub fn from_folder(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let mut found = Self::default();
        let path = folder.join("generation_config.json");
        if path.is_file() {
            let map = read_object(&path)?;
            let keys = Keys { path: &path, map: &map, prefix: "" };
            found = Self {
                eos_token_ids: keys.ids("eos_token_id")?,
                bos_token_id: keys.ids("bos_token_id")?.first().copied(),
                pad_token_id: keys.ids("pad_token_id")?.first().copied(),
                do_sample: keys.bool("do_sample")?,
                temperature: keys.number("temperature")?,
                top_p: keys.number("top_p")?,
                top_k: match keys.get("top_k") {
                    None => None,
                    Some(v) => Some(v.as_i64().map_or_else(|| keys.wrong("top_k", v, "a whole number"), Ok)?),
                },
                repetition_penalty: keys.positive("repetition_penalty")?,
            };
        }
        if found.eos_token_ids.is_empty() {
            found.eos_token_ids = config.eos_token_ids.clone();
        }
        found.bos_token_id = found.bos_token_id.or(config.bos_token_id);
        found.pad_token_id = found.pad_token_id.or(config.pad_token_id);
        Ok(found)
    }

    /// The `generation_config.json` that transformers loads.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            if !value.is_null() {
                map.insert(key.into(), value);
            }
        };
        put("bos_token_id", json!(self.bos_token_id));
        put("eos_token_id", one_or_list(&self.eos_token_ids));
        put("pad_token_id", json!(self.pad_token_id));
        put("do_sample", json!(self.do_sample));
        put("temperature", json!(self.temperature));
        put("top_p", json!(self.top_p));
        put("top_k", json!(self.top_k));
        put("repetition_penalty", json!(self.repetition_penalty));
        Value::Object(map)
    }
}

fn spec(name: String, shape: &[usize]) -> ParamSpec {
    ParamSpec { name, shape: shape.to_vec() }
}

fn one_or_list(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// Features that would silently change the numbers if they were ignored.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<()> {
    if let Some(act) = keys.text("hidden_act")?.filter(|a| *a != "silu" && *a != "swish") {
        return Err(keys.error(format!("`hidden_act` is `{act}`, expected `silu`"), "only SwiGLU models run today"));
    }
    if keys.bool("use_sliding_window")? == Some(true) {
        return Err(keys.error(
            "`use_sliding_window` is `true`, which does not run yet",
            "set it to `false` if the context stays within `sliding_window`",
        ));
    }
    if let Some(types) = keys.get("layer_types").and_then(Value::as_array)
        && let Some(other) = types.iter().find(|t| t.as_str() != Some("full_attention"))
    {
        return Err(keys.error(
            format!("`layer_types` holds `{other}`, expected `full_attention` in every place"),
            "only full attention runs today",
        ));
    }
    if keys.get("quantization_config").is_some() {
        return Err(keys.error(
            "`quantization_config` is set: quantized weights do not run",
            "take the unquantized checkpoint (f32, bf16 or f16)",
        ));
    }
    Ok(())
}

/// Rotary base and stretch, from the newer `rope_parameters` or the older `rope_theta` and `rope_scaling`.
fn rope(keys: &Keys<'_>) -> Result<(f64, Option<RopeScaling>)> {
    let object = |key: &'static str| match keys.get(key) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => keys.wrong(key, other, "an object"),
    };
    let (map, prefix) = match object("rope_parameters")? {
        Some(map) => (Some(map), "rope_parameters."),
        None => (object("rope_scaling")?, "rope_scaling."),
    };
    let theta_outside = keys.positive("rope_theta")?;
    let Some(map) = map else { return Ok((theta_outside.unwrap_or(10_000.0), None)) };
    let inner = Keys { path: keys.path, map, prefix };
    let theta = inner.positive("rope_theta")?.or(theta_outside).unwrap_or(10_000.0);
    let kind = match inner.text("rope_type")? {
        Some(kind) => Some(kind),
        None => inner.text("type")?,
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: inner.required_positive("factor")? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: inner.required_positive("factor")?,
            low_freq_factor: inner.required_positive("low_freq_factor")?,
            high_freq_factor: inner.required_positive("high_freq_factor")?,
            original_max_position_embeddings: inner.required_size("original_max_position_embeddings", 1 << 30)?,
        }),
        other => {
            let hint = "remove it if the context stays within the one of pre-training";
            return Err(
                keys.error(format!("`{prefix}rope_type` is `{other}`, expected `default`, `linear` or `llama3`"), hint)
            );
        }
    };
    if let Some(RopeScaling::Llama3 { low_freq_factor: low, high_freq_factor: high, .. }) = scaling
        && high <= low
    {
        return Err(keys.error(format!("`{prefix}high_freq_factor` {high} is not above `low_freq_factor` {low}"), ""));
    }
    Ok((theta, scaling))
}

fn rope_scaling_json(scaling: RopeScaling) -> Map<String, Value> {
    let value = match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original_max_position_embeddings,
        }),
    };
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests;
