//! One rank of a model that is cut over several.
//!
//! The ranks of a replica run the same program, each with a [`Model`] of its own that holds its part of the weights:
//! - `dp_shard` × `cp` (FSDP): a group of parameters (the embedding, a block, the norm, the head) is one flat buffer, cut
//!   into equal shards. It is put together before use and forgotten after it; its gradient is summed over the ranks and each
//!   keeps its shard.
//! - `dp_replicate`: copies; gradients are summed.
//! - `tp`, `cp`: parts of each matrix and of each sequence, inside the engine's block ([`crate::cpu_engine`]). The head's
//!   vocabulary is cut over both, so that every rank sees all rows of the loss, its own ids only ([`VocabShard`]).
//! - `pp`: stages of blocks; micro-batches go forward and backward in turn (1F1B), the loss is at the last stage.
//!
//! Ranks along `dp_*` are given samples of their own, those along `pp`, `cp` and `tp` the same ones. Gradients are *sums*
//! over ranks: losses must be normalised by the counts of all of them.

use std::path::Path;

use cosmos_parallel::{Axis, RankGroups};
use half::{bf16, f16};

use crate::burn_engine::BurnEngine;
use crate::cpu_engine::CpuEngine;
use crate::model::{Model, ModelConfig};
use crate::weights::{self, Checkpoint};
use crate::{EngineError, Result};

pub(crate) mod cut;
mod memory;
mod model;
mod pieces;
mod store;
mod walk;
pub use model::RankModel;

use cut::TpPart;

/// When a block's parameters, put together for its forward, are forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reshard {
    /// After all blocks but the last, which backward wants first; in a pipeline after none.
    #[default]
    Default,
    /// After every block.
    Always,
    /// Only after its backward.
    Never,
}

/// How numbers are rounded. They are kept and computed with as f32 all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// Not at all.
    #[default]
    F32,
    /// To the nearest bfloat16.
    Bf16,
    /// To the nearest float16.
    F16,
}

impl Rounding {
    fn apply(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            Self::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        }
    }
}

/// How a model is cut, beside the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardOptions {
    /// `fsdp_reshard_after_forward`.
    pub reshard: Reshard,
    /// `param_dtype`: parameters are rounded to this when they are put together.
    pub param_dtype: Rounding,
    /// `fsdp_reduce_dtype`: gradients are rounded to this before they are summed over ranks.
    pub reduce_dtype: Rounding,
    /// `master_dtype`: parameters are rounded to this after each update.
    pub master_dtype: Rounding,
    /// `fsdp_offload`: parameters, gradients and optimizer state on the host. They are there anyway, so this changes nothing.
    pub offload: bool,
    /// `pp_layers_per_stage`; none: as even as can be, the later stages having more.
    pub layers_per_stage: Option<usize>,
    /// Bytes of activations that a forward keeps for its backward, beside each block's input, on all ranks together: they
    /// are threads of one process.
    pub kept_bytes_max: usize,
}

impl Default for ShardOptions {
    fn default() -> Self {
        Self {
            reshard: Reshard::Default,
            param_dtype: Rounding::F32,
            reduce_dtype: Rounding::F32,
            master_dtype: Rounding::F32,
            offload: false,
            layers_per_stage: None,
            kept_bytes_max: crate::walker::KEPT_BYTES_MAX,
        }
    }
}

/// This rank's part of the model in a Hugging Face folder; it reads no more of the files than that. With a single rank
/// this is [`crate::model::load`].
pub fn load(folder: &Path, device: &str, groups: &RankGroups, options: &ShardOptions) -> Result<Box<dyn Model>> {
    if groups.mesh().world() == 1 {
        return crate::model::load(folder, device);
    }
    let config = ModelConfig::from_folder(folder)?;
    let checkpoint = Checkpoint::open(folder, &config)?;
    build(config, device, groups, options, &mut |index, runs, out| {
        let mut at = 0;
        for (first, len) in runs {
            checkpoint.read_part(index, *first, &mut out[at..at + len]);
            at += len;
        }
    })
}

/// This rank's part of the model that [`crate::model::random`] makes of `seed`.
pub fn random(
    config: &ModelConfig,
    device: &str,
    seed: u64,
    groups: &RankGroups,
    options: &ShardOptions,
) -> Result<Box<dyn Model>> {
    if groups.mesh().world() == 1 {
        return crate::model::random(config, device, seed);
    }
    config.check().map_err(|message| EngineError::invalid(message, ""))?;
    let specs = config.params();
    build(config.clone(), device, groups, options, &mut |index, runs, out| {
        let whole = weights::random_param(config, index, &specs[index], seed);
        let mut at = 0;
        for (first, len) in runs {
            out[at..at + len].copy_from_slice(&whole[*first..first + len]);
            at += len;
        }
    })
}

/// Fills `out` with runs (first, length) of a parameter.
type Source<'a> = dyn FnMut(usize, &[(usize, usize)], &mut [f32]) + 'a;

fn build(
    config: ModelConfig,
    device: &str,
    groups: &RankGroups,
    options: &ShardOptions,
    source: &mut Source<'_>,
) -> Result<Box<dyn Model>> {
    let (tp, cp) = (groups.mesh().size(Axis::Tp), groups.mesh().size(Axis::Cp));
    let part = TpPart::of(&config, groups.coordinates().tp, tp, cp)?;
    if options.offload {
        tracing::info!("`fsdp_offload`: parameters, gradients and optimizer state are on the host anyway");
    }
    if device == "cpu" {
        let engine = CpuEngine::of_rank(config, groups, &part);
        return Ok(Box::new(RankModel::new(engine, part, groups, options.clone(), source)?));
    }
    if tp * cp > 1 {
        return Err(EngineError::Device {
            device: device.into(),
            message: format!("cannot cut a block over tp {tp} × cp {cp} ranks"),
            hint: "use `cpu`, or `dp_shard_size` and `pp_size` only".into(),
        });
    }
    let engine = BurnEngine::new(config, device)?;
    Ok(Box::new(RankModel::new(engine, part, groups, options.clone(), source)?))
}

/// The blocks of pipeline stage `stage` of `stages`.
fn stage_layers(
    layers: usize,
    stages: usize,
    stage: usize,
    per_stage: Option<usize>,
) -> Result<std::ops::Range<usize>> {
    let refuse =
        |what: String| EngineError::invalid(what, "choose a smaller `pp_size`, or leave `pp_layers_per_stage` out");
    match per_stage {
        Some(each) if stages > 1 => {
            if each.saturating_mul(stages) != layers {
                return Err(refuse(format!("{stages} stages of {each} layers are not the model's {layers} layers")));
            }
            Ok(stage * each..(stage + 1) * each)
        }
        _ if layers < stages => Err(refuse(format!("{layers} layers cannot be cut into {stages} stages"))),
        _ => Ok(cut::even(layers, stages, stage)),
    }
}

#[cfg(test)]
mod tests;
