//! Hugging Face folders of a run's weights.

use std::fs;
use std::path::{Path, PathBuf};

use cosmos_config::Dtype as ConfigDtype;
use cosmos_engine::model::{self, Model};
use cosmos_engine::weights::{self, Dtype, ExportOptions};

use crate::checkpoint;
use crate::error::{Result, Role, RunError};
use crate::student::write_weights;

/// Writes `model` as a folder that transformers loads, with the tokenizer files of `source`. Written aside and renamed.
pub fn model_folder(model: &dyn Model, source: &Path, target: &Path, dtype: Dtype) -> Result<()> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| RunError::Io { path, source }
    };
    let parent = target.parent().unwrap_or(Path::new("."));
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let aside = parent.join(format!(".{name}-{}", std::process::id()));
    fs::create_dir_all(parent).map_err(io(parent))?;
    let _ = fs::remove_dir_all(&aside);
    let options = ExportOptions { dtype, source: Some(source.to_path_buf()), ..ExportOptions::default() };
    if let Err(error) = weights::export(model, &aside, &options).role("student") {
        let _ = fs::remove_dir_all(&aside);
        return Err(error);
    }
    let _ = fs::remove_dir_all(target);
    fs::rename(&aside, target).map_err(io(target))
}

/// The stored type for `train.param_dtype`. Half precision is written as bfloat16.
pub fn dtype(config: ConfigDtype) -> Dtype {
    match config {
        ConfigDtype::Float32 => Dtype::F32,
        ConfigDtype::Bfloat16 | ConfigDtype::Float16 => Dtype::Bf16,
    }
}

/// Deletes the oldest exports beyond `keep`; negative keeps all.
pub fn prune(root: &Path, keep: i64) -> Result<()> {
    if keep < 0 {
        return Ok(());
    }
    let mut folders: Vec<PathBuf> = fs::read_dir(root)
        .map_err(|source| RunError::Io { path: root.to_path_buf(), source })?
        .filter_map(|e| e.ok())
        .filter(|e| e.file_name().to_string_lossy().starts_with("step_"))
        .map(|e| e.path())
        .collect();
    folders.sort();
    let surplus = folders.len().saturating_sub(keep.max(1) as usize);
    for folder in folders.into_iter().take(surplus) {
        fs::remove_dir_all(&folder).map_err(|source| RunError::Io { path: folder, source })?;
    }
    Ok(())
}

/// Exports a run's checkpoint to `target` as `float32` or `bfloat16`.
pub fn checkpoint_to_folder(checkpoint: &Path, target: &Path, dtype: &str) -> Result<()> {
    let dtype = match dtype {
        "float32" | "f32" => Dtype::F32,
        "bfloat16" | "bf16" => Dtype::Bf16,
        other => {
            return Err(RunError::config(
                "",
                format!("weights cannot be stored as `{other}`"),
                "use float32 or bfloat16",
            ));
        }
    };
    if target.exists() {
        return Err(RunError::config(
            "",
            format!("{} exists already", target.display()),
            "name a folder that does not exist",
        ));
    }
    from_checkpoint(checkpoint, target, dtype)
}

/// Exports a run's checkpoint to `target`, in the place of what is there.
pub fn from_checkpoint(checkpoint: &Path, target: &Path, dtype: Dtype) -> Result<()> {
    let (snapshot, manifest) = checkpoint::read(checkpoint)?;
    let config =
        cosmos_engine::model::ModelConfig::from_folder(&manifest.model_source).map_err(|e| RunError::Checkpoint {
            path: checkpoint.to_path_buf(),
            message: format!("its model's shape cannot be read: {e}"),
            hint: format!("put the student's folder back at {}", manifest.model_source.display()),
        })?;
    let mut model = model::random(&config, "cpu", 0).role("student")?;
    write_weights(model.as_mut(), &snapshot.model, checkpoint)?;
    model_folder(model.as_ref(), &manifest.model_source, target, dtype)
}
