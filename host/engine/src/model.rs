//! What a role may ask of a model, whatever engine runs it.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use cosmos_parallel::{Collective, Single};
use rayon::prelude::*;

use crate::batch::{Position, TokenBatch};
use crate::{EngineError, Result};

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

/// Which part of the vocabulary a rank's logits cover, and how it talks to the ranks that cover the rest.
#[derive(Clone)]
pub struct VocabShard {
    /// First id of this rank.
    pub first: usize,
    /// Ids of this rank, at least one.
    pub len: usize,
    /// Ids of all ranks together.
    pub vocab: usize,
    /// The ranks whose parts make up the vocabulary. Each has the same rows in the same chunks; their parts need not lie in
    /// the order of the ranks.
    pub collective: Arc<dyn Collective>,
}

impl VocabShard {
    /// The whole vocabulary on one rank.
    pub fn whole(vocab: usize) -> Self {
        Self { first: 0, len: vocab, vocab, collective: Arc::new(Single) }
    }

    /// Whether there is nobody to talk to.
    pub fn is_whole(&self) -> bool {
        self.len == self.vocab
    }

    /// Ids of this rank.
    pub fn ids(&self) -> Range<usize> {
        self.first..self.first + self.len
    }
}

impl fmt::Debug for VocabShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        write!(f, "ids {:?} of {}, rank {rank} of {world}", self.ids(), self.vocab)
    }
}

/// The loss at the head of a model. The model computes logits chunk by chunk (rows = scored positions in the order
/// given to [`Model::forward_backward`]); the loss turns each chunk into its own gradient. No tensor of
/// all positions × vocabulary ever exists.
pub trait HeadLoss {
    /// Called before the first chunk where the vocabulary is cut over ranks: chunks are `[rows, shard.len]` then, and every
    /// rank of `shard.collective` gets the same rows of its own ids.
    ///
    /// # Errors
    /// A loss that needs the whole vocabulary at once (the default).
    fn set_vocab_shard(&mut self, shard: &VocabShard) -> Result<()> {
        if shard.is_whole() {
            return Ok(());
        }
        Err(EngineError::invalid(
            format!("this objective needs the whole vocabulary, the rank has {shard:?}"),
            "set `tp_size` and `cp_size` to 1",
        ))
    }
    /// Whether `observe` must see every chunk once before the first `gradient` call (discounting, sequence-level ratios).
    fn needs_first_pass(&self) -> bool;
    /// First pass: the logits `[rows, vocab]` of a chunk, before temperature.
    fn observe(&mut self, rows: Range<usize>, logits_rv: &[f32]) -> Result<()>;
    /// Logits `[rows, vocab]` in, d loss / d logits out, in place.
    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()>;
    /// Whether a row's loss and gradient can be made of a few numbers and its logits, for a part of the vocabulary at a time:
    /// then [`HeadLoss::see`] may be called for every part instead of [`HeadLoss::observe`] and [`HeadLoss::gradient`],
    /// [`HeadLoss::settle`] after it, and [`HeadLoss::remake`] for every part again.
    fn remakes(&self) -> bool {
        false
    }
    /// Logits `[rows, part]`, before temperature, of the ids from `first` on; the parts of a row come in order and each but the last
    /// is a multiple of [`SUMS_BLOCK`](cosmos_kernels::vocabulary::SUMS_BLOCK) wide. What stands in them afterwards is
    /// worth nothing.
    ///
    /// # Errors
    /// As [`HeadLoss::gradient`], and a loss that does not [remake](HeadLoss::remakes).
    fn see(&mut self, rows: Range<usize>, first: usize, logits_rp: &mut [f32]) -> Result<()> {
        let _ = (rows, first, logits_rp);
        Err(EngineError::invalid(WHOLE_ROWS_ONLY, ""))
    }
    /// Takes the losses of all rows in, of which every part was [seen](HeadLoss::see), as both passes over whole rows do.
    ///
    /// # Errors
    /// A loss that does not [remake](HeadLoss::remakes).
    fn settle(&mut self) -> Result<()> {
        Err(EngineError::invalid(WHOLE_ROWS_ONLY, ""))
    }
    /// Logits `[rows, part]` of the ids from `first` on in, d loss / d logits out, in place: the bits that
    /// [`HeadLoss::gradient`] gives these ids.
    ///
    /// # Errors
    /// Rows that were not settled.
    fn remake(&self, rows: Range<usize>, first: usize, logits_rp: &mut [f32]) -> Result<()> {
        let _ = (rows, first, logits_rp);
        Err(EngineError::invalid(WHOLE_ROWS_ONLY, ""))
    }
}

/// Why an objective cannot be asked for a part of the vocabulary.
const WHOLE_ROWS_ONLY: &str = "this objective makes the gradient of whole rows only";

/// Numbers within a parameter, or within a block's parameters: rows of `width` of them, `stride` apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where the first row begins.
    pub first: usize,
    /// Number of rows.
    pub rows: usize,
    /// Numbers of a row.
    pub width: usize,
    /// From row to row; at least the width.
    pub stride: usize,
}

impl Part {
    /// Numbers that lie together.
    pub fn whole(range: Range<usize>) -> Self {
        Self { first: range.start, rows: 1, width: range.len(), stride: range.len() }
    }

    /// Numbers of all rows.
    pub fn len(&self) -> usize {
        self.rows * self.width
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From the first number to the last, what lies between rows included.
    pub fn span(&self) -> Range<usize> {
        self.first..self.first + self.rows.saturating_sub(1) * self.stride + self.width
    }
}

/// Takes every gradient of a backward once, as soon as it is complete.
pub trait Updater: Send {
    /// Changes a `part` of parameter `index` by its complete `gradient`, row after row; `values` are its
    /// [`Part::span`]. Every value of every parameter comes once, in any order.
    ///
    /// # Errors
    /// [`EngineError::NotFinite`], and nothing was changed by this gradient.
    fn update(&mut self, index: usize, part: Part, values: &mut [f32], gradient: &[f32]) -> Result<()>;
}

/// Logits of another model at the same rows (the teacher, for full-vocabulary objectives). Where the vocabulary is cut
/// over ranks, both models are cut alike: a row holds the ids of the student's [`VocabShard`].
pub trait LogitsSource {
    /// Logits `[rows, vocab]`, before temperature, row-major into `out` (cleared first).
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()>;
}

/// A part of a mini-batch that goes through the model at once.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// The sequences.
    pub batch: TokenBatch,
    /// The rows of the loss; may be empty where other ranks have more micro-batches than this one.
    pub positions: Vec<Position>,
}

/// The losses of a list of micro-batches, made when they are needed.
pub trait Losses {
    /// Calls `run` once with the loss of micro-batch `index`. Called for each in rising order, and only on ranks that have
    /// the head.
    fn with(&mut self, index: usize, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Result<()>) -> Result<()>;
}

/// How a model holds the weights that it only reads: those of a model that is not trained, or those that a model in training
/// decodes with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// 32 bits.
    #[default]
    F32,
    /// Matrices and embedding in bf16, rounded to the nearest.
    Bf16,
    /// The blocks' matrices in whole numbers of one byte with a scale for every 128 inputs of an output (the formula stands
    /// at `cosmos_kernels::narrow`); the embedding in f32.
    Int8 {
        /// Whether the head is in int8 too; in bf16 otherwise.
        head: bool,
    },
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 { head: false } => "int8",
            Self::Int8 { head: true } => "int8 with its head",
        })
    }
}

/// A causal language model on some device. Host slices are f32.
///
/// A rank of a sharded model is a `Model` too. All ranks of a replica then call the same methods in the same order, those
/// marked *collective* wait for each other, and `params`, `read_param`, `read_grad` and `update_params` are about the
/// pieces that this rank holds (of every parameter of the model, some of them empty).
pub trait Model: Send {
    /// Architecture.
    fn config(&self) -> &ModelConfig;
    /// Parameters in a fixed order; tied weights appear once.
    fn params(&self) -> &[ParamSpec];
    /// Values of parameter `index`.
    fn read_param(&self, index: usize) -> Vec<f32>;
    /// Replaces parameter `index`; the length must fit its shape.
    fn write_param(&mut self, index: usize, values: &[f32]) -> Result<()>;

    /// Which rank of how many this is; none for a model that is not sharded.
    fn rank(&self) -> Option<(usize, usize)> {
        None
    }
    /// The parameters of the whole model, in the order of [`Model::params`].
    fn whole_params(&self) -> &[ParamSpec] {
        self.params()
    }
    /// Collective: parameter `index`, or a gradient or moment of its shape, from the ranks' pieces `local`; every rank gets
    /// the whole.
    fn gather(&self, index: usize, local: &[f32]) -> Result<Vec<f32>> {
        let _ = index;
        Ok(local.to_vec())
    }
    /// This rank's piece of `whole`, a tensor of the shape of parameter `index`.
    fn cut(&self, index: usize, whole: &[f32]) -> Result<Vec<f32>> {
        let _ = index;
        Ok(whole.to_vec())
    }

    /// Collective. Hidden states after the final norm at `positions`: `[positions, hidden]`; empty on a rank without the
    /// head.
    fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>>;
    /// Whether this rank has the head: all but the earlier stages of a pipeline.
    fn has_head(&self) -> bool {
        true
    }
    /// The ids that this rank's logits cover.
    fn vocab_shard(&self) -> VocabShard {
        VocabShard::whole(self.config().vocab_size)
    }
    /// Collective: makes the head ready for [`Model::head_logits_rv`], which then needs no other rank, so that ranks may
    /// have different numbers of rows. Ready until the next collective call or change of parameters.
    fn prepare_head(&mut self) -> Result<()> {
        Ok(())
    }
    /// The head over hidden states `[rows, hidden]`: logits `[rows, vocab]` ([`Model::vocab_shard`]) into `out` (cleared
    /// first). Callers chunk.
    fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()>;
    /// Rows of logits to hold at a time, from the vocabulary size and the chunk's memory bound.
    fn head_chunk_rows(&self) -> usize;

    /// Collective. Forward, loss at `positions`, backward; *adds* into the gradients. Between the two passes it keeps what the engine
    /// can use within a bound, and each block's input beyond that, from which backward runs the block again.
    fn forward_backward(&mut self, batch: &TokenBatch, positions: &[Position], loss: &mut dyn HeadLoss) -> Result<()>;
    /// Collective: as [`Model::forward_backward`] for each micro-batch, all ranks having the same number; a pipeline keeps
    /// its stages busy with several.
    fn forward_backward_each(&mut self, micro: &[MicroBatch], losses: &mut dyn Losses) -> Result<()> {
        for (index, part) in micro.iter().enumerate() {
            losses.with(index, &mut |loss| self.forward_backward(&part.batch, &part.positions, loss))?;
        }
        Ok(())
    }
    /// Whether [`Model::forward_backward_update`] is there.
    fn updates_in_backward(&self) -> bool {
        false
    }
    /// As [`Model::forward_backward`] from gradients of zero and [`Model::update_params`] after it, with the same bits, but
    /// every gradient goes to `updater` as soon as it is complete and is forgotten then, so that the gradients of all
    /// parameters are never there together. False: a number at the head is not finite; nothing was updated then.
    ///
    /// # Errors
    /// Those of `updater`, after which parameters nearer to the head are updated and the others are not; gradients that an
    /// earlier backward has left; a model that does not do this.
    fn forward_backward_update(
        &mut self,
        batch: &TokenBatch,
        positions: &[Position],
        loss: &mut dyn HeadLoss,
        updater: &mut dyn Updater,
    ) -> Result<bool> {
        let _ = (batch, positions, loss, updater);
        Err(EngineError::invalid("this model does not update its parameters in the backward", ""))
    }
    /// Gradient of parameter `index` as accumulated; zeros where none was computed yet.
    fn read_grad(&self, index: usize) -> Vec<f32>;
    /// Calls `visit` with every parameter's gradient as accumulated, in order.
    fn visit_grads(&self, visit: &mut dyn FnMut(usize, &[f32])) {
        for index in 0..self.params().len() {
            visit(index, &self.read_grad(index));
        }
    }
    /// Collective: the sum of `square` over all gradients of the model, each counted once however many ranks hold it.
    fn sum_of_squares(&self, square: &dyn Fn(&[f32]) -> f64) -> Result<f64> {
        let mut sum = 0.0;
        self.visit_grads(&mut |_, gradient| sum += square(gradient));
        Ok(sum)
    }
    /// Sets all gradients to zero.
    fn zero_grads(&mut self);
    /// Calls `update(index, parameter, gradient)` for every parameter with its master values and gradient, then makes
    /// the new values current. The optimizer's and the clipper's way in.
    fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()>;

    /// From now on decodes with a copy of the weights in `format`, which is brought up to date where they have changed when a
    /// decoder is made. F32 gives the copy up.
    ///
    /// # Errors
    /// A format that the engine does not have.
    fn decode_in(&mut self, format: WeightFormat) -> Result<()> {
        match format {
            WeightFormat::F32 => Ok(()),
            _ => {
                Err(EngineError::invalid(format!("this model does not decode in {format}"), "leave the weights in f32"))
            }
        }
    }

    /// A decoder with `slots` sequences of at most `capacity` tokens each (prompt and completion).
    fn decoder(&mut self, slots: usize, capacity: usize) -> Result<Box<dyn Decoder + '_>>;

    /// What a rank of a sharded model holds; none for a model that is not sharded.
    fn memory(&self) -> Option<RankMemory> {
        None
    }
}

/// Bytes that a rank of a sharded model holds, counted as they are allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RankMemory {
    /// Its shards of the parameters.
    pub params: usize,
    /// Its shards of the gradients.
    pub grads: usize,
    /// Parameters put together for use, at most at any time, whatever form the engine keeps them in.
    pub gathered_peak: usize,
    /// Gradients of whole groups before they were handed out, at most at any time.
    pub whole_grads_peak: usize,
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
    /// Appends the given tokens, one to a slot, and then those that `next` chooses, up to `steps` for each entry. `next` is
    /// shown the index of an entry and the logits that follow its last token, where they were computed: several at a time on
    /// as many threads, which need not wait for each other between steps. None ends the entry, whose slot stays as it is.
    fn run_each(
        &mut self,
        entries: &[(usize, u32)],
        steps: usize,
        next: &(dyn Fn(usize, &[f32]) -> Option<u32> + Sync),
    ) -> Result<()> {
        let mut running: Vec<(usize, (usize, u32))> = entries.iter().copied().enumerate().collect();
        for _ in 0..steps {
            if running.is_empty() {
                break;
            }
            let tokens: Vec<(usize, u32)> = running.iter().map(|(_, entry)| *entry).collect();
            let logits_rv = self.step(&tokens)?;
            let rows = logits_rv.par_chunks_exact((logits_rv.len() / tokens.len()).max(1));
            running = (running.par_iter().zip(rows))
                .filter_map(|((index, (slot, _)), logits_v)| Some((*index, (*slot, next(*index, logits_v)?))))
                .collect();
            self.recycle(logits_rv);
        }
        Ok(())
    }
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

/// A model that is not trained, with its weights held in `format` and nothing beside them.
///
/// # Errors
/// As [`load`], and a format that the device does not have.
pub fn load_frozen(folder: &Path, device: &str, format: WeightFormat) -> Result<Box<dyn Model>> {
    match (device, format) {
        (_, WeightFormat::F32) => load(folder, device),
        ("cpu", _) => crate::cpu_engine::load_frozen(folder, format),
        _ => Err(no_format(device, format)),
    }
}

/// As [`load_frozen`], with the weights that [`random`] makes.
///
/// # Errors
/// As [`load_frozen`].
pub fn random_frozen(config: &ModelConfig, device: &str, format: WeightFormat, seed: u64) -> Result<Box<dyn Model>> {
    match (device, format) {
        (_, WeightFormat::F32) => random(config, device, seed),
        ("cpu", _) => crate::cpu_engine::random_frozen(config, format, seed),
        _ => Err(no_format(device, format)),
    }
}

fn no_format(device: &str, format: WeightFormat) -> EngineError {
    EngineError::Device {
        device: device.into(),
        message: format!("it has no weights in {format}"),
        hint: "use the native engine, `cpu`, or leave the weights in f32".into(),
    }
}

/// A model on `device` with fresh weights (normal, std `initializer_range`; norms one, biases zero) from `seed`.
pub fn random(config: &ModelConfig, device: &str, seed: u64) -> Result<Box<dyn Model>> {
    match device {
        "cpu" => crate::cpu_engine::random(config, seed),
        _ => crate::burn_engine::random(config, device, seed),
    }
}
