//! What a role may ask of a model, whatever engine runs it.

use std::ops::Range;
use std::path::Path;

use crate::Result;
use crate::batch::{Position, TokenBatch};

mod config;
pub use config::{Family, GenerationConfig, ModelConfig, RopeScaling};

/// A parameter by its Hugging Face name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// As in the safetensors file: `[out, in]` for projections.
    pub shape: Vec<usize>,
}

impl ParamSpec {
    /// Number of values.
    #[allow(clippy::len_without_is_empty)] // no parameter is empty
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The loss at the head of a model. The model computes logits chunk by chunk (rows = scored positions in the order
/// given to [`Model::forward_backward`]); the loss turns each chunk into its own gradient. No tensor of
/// all positions × vocabulary ever exists.
pub trait HeadLoss {
    /// Whether `observe` must see every chunk once before the first `gradient` call (discounting, sequence-level ratios).
    fn needs_first_pass(&self) -> bool;
    /// First pass: the logits `[rows, vocab]` of a chunk, before temperature.
    fn observe(&mut self, rows: Range<usize>, logits_rv: &[f32]) -> Result<()>;
    /// Logits `[rows, vocab]` in, d loss / d logits out, in place.
    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()>;
}

/// Logits of another model at the same rows (the teacher, for full-vocabulary objectives).
pub trait LogitsSource {
    /// Logits `[rows, vocab]`, before temperature, row-major into `out` (cleared first).
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()>;
}

/// A causal language model on some device. Host slices are f32.
pub trait Model: Send {
    /// Architecture.
    fn config(&self) -> &ModelConfig;
    /// Parameters in a fixed order; tied weights appear once.
    fn params(&self) -> &[ParamSpec];
    /// Values of parameter `index`.
    fn read_param(&self, index: usize) -> Vec<f32>;
    /// Replaces parameter `index`; the length must fit its shape.
    fn write_param(&mut self, index: usize, values: &[f32]) -> Result<()>;

    /// Hidden states after the final norm at `positions`: `[positions, hidden]`.
    fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>>;
    /// The head over hidden states `[rows, hidden]`: logits `[rows, vocab]` into `out` (cleared first). Callers chunk.
    fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()>;
    /// Rows of logits to hold at a time, from the vocabulary size and the chunk's memory bound.
    fn head_chunk_rows(&self) -> usize;

    /// Forward, loss at `positions`, backward; *adds* into the gradients. Between the two passes it keeps what the engine
    /// can use within a bound, and each block's input beyond that, from which backward runs the block again.
    fn forward_backward(&mut self, batch: &TokenBatch, positions: &[Position], loss: &mut dyn HeadLoss) -> Result<()>;
    /// Gradient of parameter `index` as accumulated; zeros where none was computed yet.
    fn read_grad(&self, index: usize) -> Vec<f32>;
    /// Calls `visit` with every parameter's gradient as accumulated, in order.
    fn visit_grads(&self, visit: &mut dyn FnMut(usize, &[f32])) {
        for index in 0..self.params().len() {
            visit(index, &self.read_grad(index));
        }
    }
    /// Sets all gradients to zero.
    fn zero_grads(&mut self);
    /// Calls `update(index, parameter, gradient)` for every parameter with its master values and gradient, then makes
    /// the new values current. The optimizer's and the clipper's way in.
    fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()>;

    /// A decoder with `slots` sequences of at most `capacity` tokens each (prompt and completion).
    fn decoder(&mut self, slots: usize, capacity: usize) -> Result<Box<dyn Decoder + '_>>;
}

/// A prompt to prefill. It is computed once and placed into every one of `slots`.
#[derive(Debug, Clone)]
pub struct Prefill<'a> {
    /// Free slots.
    pub slots: Vec<usize>,
    /// Prompt ids, at least one.
    pub prompt: &'a [u32],
}

/// Incremental decoding with a KV cache of slots.
pub trait Decoder {
    /// Number of slots.
    fn slots(&self) -> usize;
    /// Fills slots with prompts; logits of each prompt's last position, `[entries, vocab]`.
    fn prefill(&mut self, entries: &[Prefill<'_>]) -> Result<Vec<f32>>;
    /// Appends one token to each listed slot; the logits that follow, `[entries, vocab]`, in the order given.
    fn step(&mut self, entries: &[(usize, u32)]) -> Result<Vec<f32>>;
    /// Frees a slot.
    fn release(&mut self, slot: usize);
    /// Takes logits back, so that the next step has their memory instead of fresh pages.
    fn recycle(&mut self, logits: Vec<f32>) {
        drop(logits);
    }
    /// Tokens whose keys and values fit into memory together; sequences beyond that must wait.
    fn tokens_max(&self) -> usize {
        usize::MAX
    }
}

/// A model on `device` (`cpu`; `burn:flex`; `burn:cuda` with the feature) from a Hugging Face folder.
pub fn load(folder: &Path, device: &str) -> Result<Box<dyn Model>> {
    match device {
        "cpu" => crate::cpu_engine::load(folder),
        _ => crate::burn_engine::load(folder, device),
    }
}

/// A model on `device` with fresh weights (normal, std `initializer_range`; norms one, biases zero) from `seed`.
pub fn random(config: &ModelConfig, device: &str, seed: u64) -> Result<Box<dyn Model>> {
    match device {
        "cpu" => crate::cpu_engine::random(config, seed),
        _ => crate::burn_engine::random(config, device, seed),
    }
}
