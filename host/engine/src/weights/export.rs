//! Export to a folder that transformers loads. Every file is replaced by rename.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::View;
use serde_json::{Map, Value, json};

use crate::model::{GenerationConfig, Model, ParamSpec};
use crate::{EngineError, Result};

/// Largest weight file unless asked otherwise, as transformers writes them.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// What belongs to a tokenizer, copied as it is.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Exactly as they are in memory.
    F32,
    /// Rounded to the nearest bfloat16.
    Bf16,
}

impl Dtype {
    /// As `config.json` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// How to export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// How weights are stored.
    pub dtype: Dtype,
    /// Largest weight file; a larger model is written in shards.
    pub shard_bytes_max: u64,
    /// The folder whose tokenizer, chat template and `generation_config.json` are copied.
    pub source: Option<PathBuf>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { dtype: Dtype::F32, shard_bytes_max: SHARD_BYTES_MAX, source: None }
    }
}

/// Writes `model` as a Hugging Face folder: `config.json`, `generation_config.json`, weights, tokenizer. Collective for a
/// sharded model: its first rank writes, and holds the whole of one weight file at a time.
pub fn export(model: &dyn Model, folder: &Path, options: &ExportOptions) -> Result<()> {
    if model.rank().is_some_and(|(rank, _)| rank > 0) {
        // The others only give their pieces.
        return (0..model.whole_params().len())
            .try_for_each(|index| model.gather(index, &model.read_param(index)).map(drop));
    }
    fs::create_dir_all(folder).map_err(|source| EngineError::Io { path: folder.to_path_buf(), source })?;
    write_weights(model, folder, options)?;
    write_json(&folder.join("config.json"), &model.config().to_json(options.dtype.name()))?;
    let generation = match &options.source {
        Some(source) => GenerationConfig::from_folder(source, model.config())?,
        None => GenerationConfig::from_folder(Path::new(""), model.config())?,
    };
    write_json(&folder.join("generation_config.json"), &generation.to_json())?;
    if let Some(source) = &options.source {
        for name in TOKENIZER_FILES {
            let from = source.join(name);
            if from.is_file() && !same_file(&from, &folder.join(name)) {
                replace(&folder.join(name), &|to| fs::copy(&from, to).map(|_| ()))?;
            }
        }
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Writes beside `path`, makes it durable, then renames.
fn replace(path: &Path, write: &dyn Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let done =
        write(&partial).and_then(|()| File::open(&partial)?.sync_all()).and_then(|()| fs::rename(&partial, path));
    done.map_err(|source| {
        // Nothing half written stays behind; the error that matters is the first one.
        let _ = fs::remove_file(&partial);
        EngineError::Io { path: path.to_path_buf(), source }
    })
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    replace(path, &|to| fs::write(to, &text))
}

/// One parameter, converted only when its bytes are asked for.
struct Stored<'a> {
    model: &'a dyn Model,
    index: usize,
    /// Put together from the ranks of a sharded model.
    gathered: Option<&'a [f32]>,
    spec: &'a ParamSpec,
    dtype: Dtype,
}

impl View for Stored<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = match self.gathered {
            Some(values) => Cow::Borrowed(values),
            None => Cow::Owned(self.model.read_param(self.index)),
        };
        Cow::Owned(match self.dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        self.spec.len() * self.dtype.bytes() as usize
    }
}

/// Ranges of parameters whose bytes stay within the limit; a parameter that is larger alone gets its own file.
fn shards(specs: &[ParamSpec], options: &ExportOptions) -> Vec<Range<usize>> {
    let mut shards: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (index, spec) in specs.iter().enumerate() {
        let size = spec.len() as u64 * options.dtype.bytes();
        match shards.last_mut() {
            Some(shard) if bytes + size <= options.shard_bytes_max => {
                shard.end = index + 1;
                bytes += size;
            }
            _ => {
                shards.push(index..index + 1);
                bytes = size;
            }
        }
    }
    shards
}

fn write_weights(model: &dyn Model, folder: &Path, options: &ExportOptions) -> Result<()> {
    let specs = model.whole_params();
    let shards = shards(specs, options);
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let gather = |index| model.rank().map(|_| model.gather(index, &model.read_param(index))).transpose();
        let gathered = shard.clone().map(gather).collect::<Result<Vec<_>>>()?;
        replace(&folder.join(&name), &|to| {
            let views = shard.clone().zip(&gathered).map(|(index, gathered)| {
                let (spec, gathered) = (&specs[index], gathered.as_deref());
                (spec.name.as_str(), Stored { model, index, gathered, spec, dtype: options.dtype })
            });
            // transformers refuses weights that do not say which framework they are for.
            let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
            safetensors::serialize_to_file(views, Some(metadata), to).map_err(std::io::Error::other)
        })?;
        weight_map.extend(specs[shard.clone()].iter().map(|spec| (spec.name.clone(), json!(name))));
    }
    // The left-over of an earlier export of another size would be read instead.
    let left_over = if shards.len() > 1 {
        let total: u64 = specs.iter().map(|spec| spec.len() as u64 * options.dtype.bytes()).sum();
        write_json(&index, &json!({"metadata": {"total_size": total}, "weight_map": weight_map}))?;
        single
    } else {
        index
    };
    match fs::remove_file(&left_over) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(EngineError::Io { path: left_over, source })
        }
        _ => Ok(()),
    }
}
