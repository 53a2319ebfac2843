//! From the parallelism tables and the settings of sharding to the ranks of a replica.
//!
//! A replica's ranks are threads of one process ([`cosmos_parallel::ThreadWorld`]) that run the same role, each with its rank
//! of the model. What they need of each other goes through the model; which samples are whose is [`crate::student::Place`].

use cosmos_config::{Config, Distillation, Dtype, Parallelism, Quantization, Reshard as ConfigReshard, Train};
use cosmos_engine::model::WeightFormat;
use cosmos_engine::sharded::{Reshard, Rounding, ShardOptions};
use cosmos_parallel::{Mesh, ParallelDims, RankGroups};

use crate::error::{Result, Role, RunError};

/// The ranks of a replica, from `table`, for example `policy.parallelism`. `dp_shard_size = -1` is 1: there are as many
/// threads as are asked for, so no device is left over.
///
/// # Errors
/// Sizes that do not go together, naming the table.
pub fn mesh(parallelism: &Parallelism, table: &str) -> Result<Mesh> {
    let refuse = |message: String, hint: &str| RunError::config("", format!("`{table}`: {message}"), hint);
    if parallelism.ep_size > 1 {
        let message = format!("`ep_size` is {}, but the models that run here have no experts", parallelism.ep_size);
        return Err(refuse(message, "set it to 1"));
    }
    let shard = if parallelism.dp_shard_size == -1 { 1 } else { parallelism.dp_shard_size };
    let size = |size: usize| i64::try_from(size).unwrap_or(i64::MAX);
    let dims = ParallelDims {
        pp: size(parallelism.pp_size),
        dp_replicate: size(parallelism.dp_replicate_size),
        dp_shard: shard,
        cp: size(parallelism.cp_size),
        tp: size(parallelism.tp_size),
    };
    let sizes = [dims.pp, dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp];
    let world = sizes.iter().try_fold(1_usize, |product, size| product.checked_mul(usize::try_from(*size).ok()?));
    match world {
        Some(world) if world <= RANKS_MAX => {
            Mesh::new(dims, world).map_err(|e| refuse(e.to_string(), e.hint().unwrap_or_default()))
        }
        _ => Err(refuse(
            format!("sizes {sizes:?} make more than {RANKS_MAX} ranks, or none"),
            "more data-parallel ranks come with more replicas (`n_init_replicas`)",
        )),
    }
}

/// Most ranks of a replica, each of which is a thread.
const RANKS_MAX: usize = 1024;

/// How the student is cut.
pub fn policy_options(train: &Train) -> ShardOptions {
    ShardOptions {
        reshard: reshard(train.fsdp_reshard_after_forward),
        reduce_dtype: rounding(train.fsdp_reduce_dtype),
        master_dtype: rounding(train.master_dtype),
        offload: train.fsdp_offload,
        // `param_dtype` is for devices that gain from it, and `pp_layers_per_stage` for interleaved schedules.
        ..ShardOptions::default()
    }
}

/// How a teacher is cut.
pub fn teacher_options(distillation: &Distillation) -> ShardOptions {
    ShardOptions {
        reshard: reshard(distillation.fsdp_reshard_after_forward),
        master_dtype: rounding(distillation.master_dtype),
        offload: distillation.fsdp_offload,
        ..ShardOptions::default()
    }
}

fn reshard(wanted: ConfigReshard) -> Reshard {
    match wanted {
        ConfigReshard::Always => Reshard::Always,
        ConfigReshard::Never => Reshard::Never,
        ConfigReshard::Default => Reshard::Default,
    }
}

fn rounding(dtype: Dtype) -> Rounding {
    match dtype {
        Dtype::Float32 => Rounding::F32,
        Dtype::Bfloat16 => Rounding::Bf16,
        Dtype::Float16 => Rounding::F16,
    }
}

/// In which format the rollout holds the student's weights.
pub fn rollout_format(config: &Config) -> WeightFormat {
    match (config.rollout.quantization, config.train.transfer_dtype) {
        (Quantization::Int8, _) => WeightFormat::Int8 { head: config.rollout.quantize_head },
        (_, Some(Dtype::Bfloat16)) if is_native(config) => WeightFormat::Bf16,
        _ => WeightFormat::F32,
    }
}

/// In which format a teacher that is not cut holds its weights.
pub fn teacher_format(config: &Config) -> WeightFormat {
    match config.distillation.master_dtype {
        Dtype::Bfloat16 if is_native(config) => WeightFormat::Bf16,
        _ => WeightFormat::F32,
    }
}

/// Whether the native CPU engine computes.
pub(crate) fn is_native(config: &Config) -> bool {
    config.host.device == "cpu"
}

/// The frozen model in `folder` as one rank of a teacher.
///
/// # Errors
/// Those of the engine.
pub fn load_teacher(
    config: &Config,
    folder: &std::path::Path,
    groups: &RankGroups,
) -> Result<Box<dyn cosmos_engine::model::Model>> {
    let options = teacher_options(&config.distillation);
    cosmos_engine::sharded::load(folder, &config.host.device, groups, &options).role("teacher")
}

/// Does a rank's part of what the ranks do together. When it fails or panics, the others do not wait for it.
///
/// # Errors
/// Those of `work`.
pub fn together<T>(groups: &RankGroups, work: impl FnOnce() -> Result<T>) -> Result<T> {
    struct Watched<'g>(&'g RankGroups);
    impl Drop for Watched<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.fail("it panicked");
            }
        }
    }
    let _watched = Watched(groups);
    work().inspect_err(|error| groups.fail(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Parallelism {
        Parallelism { tp_size: 1, ..Parallelism::default() }
    }

    #[test]
    fn tables_become_meshes() {
        let found = mesh(&Parallelism { tp_size: 2, pp_size: 2, dp_shard_size: -1, ..table() }, "policy.parallelism");
        assert_eq!(found.unwrap().to_string(), "pp 2 × dp_replicate 1 × dp_shard 1 × cp 1 × tp 2");
        let refused = |table: &Parallelism| {
            let error = mesh(table, "policy.parallelism").unwrap_err();
            assert!(error.is_usage() && error.hint().is_some());
            error.to_string()
        };
        assert!(refused(&Parallelism { ep_size: 2, ..table() }).contains("`policy.parallelism`: `ep_size` is 2"));
        let both = Parallelism { pp_size: 2, dp_replicate_size: 2, ..table() };
        assert!(refused(&both).contains("cannot both be larger than 1"));
        for cp_size in [4096, usize::MAX] {
            assert!(refused(&Parallelism { cp_size, ..table() }).contains("more than 1024 ranks"));
        }
    }
}
