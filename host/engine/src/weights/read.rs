//! Reading safetensors, single or in shards, into f32.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::{SafeTensorError, SafeTensors, TensorView};

use crate::model::{ModelConfig, ParamSpec};
use crate::{EngineError, Result};

/// Largest index file.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Most shards of one checkpoint.
const SHARDS_MAX: usize = 4096;

fn bad(path: &Path, message: impl Into<String>, hint: impl Into<String>) -> EngineError {
    EngineError::Checkpoint { path: path.to_path_buf(), message: message.into(), hint: hint.into() }
}

/// The parameters of the checkpoint in `folder`, in the order of [`ModelConfig::params`]. Every tensor must be there
/// once with the shape that the config implies, and no other; a head beside tied embeddings is left out.
pub fn read(folder: &Path, config: &ModelConfig) -> Result<Vec<Vec<f32>>> {
    let checkpoint = Checkpoint::open(folder, config)?;
    let whole = |(index, spec): (usize, ParamSpec)| {
        let mut values = vec![0.0; spec.len()];
        checkpoint.read_part(index, 0, &mut values);
        values
    };
    Ok(config.params().into_iter().enumerate().map(whole).collect())
}

/// A checkpoint whose tensors were found to be those of a config; values are read when they are asked for.
pub struct Checkpoint {
    maps: Vec<Mmap>,
    /// File, bytes within it and type of each parameter.
    places: Vec<(usize, Range<usize>, Dtype)>,
}

impl Checkpoint {
    /// Opens the checkpoint in `folder`, with the checks of [`read`].
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let specs = config.params();
        let index_of: HashMap<&str, usize> =
            specs.iter().enumerate().map(|(index, spec)| (spec.name.as_str(), index)).collect();
        let mut places: Vec<Option<(usize, Range<usize>, Dtype)>> = vec![None; specs.len()];
        let mut maps = Vec::new();
        let files = files(folder)?;
        for path in &files {
            let map = map(path)?;
            for (name, view) in parse(path, &map)?.tensors() {
                let Some(index) = index_of.get(name.as_str()) else {
                    if ignored(&name, config) {
                        continue;
                    }
                    return Err(bad(
                        path,
                        format!("unexpected tensor `{name}`"),
                        "does `config.json` belong to these weights?",
                    ));
                };
                if places[*index].is_some() {
                    return Err(bad(
                        path,
                        format!("tensor `{name}` is in more than one file"),
                        "remove the left-over file",
                    ));
                }
                let bytes = check(path, &specs[*index], &view)?;
                // A view's data is a part of the map.
                let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
                places[*index] = Some((maps.len(), start..start + bytes, view.dtype()));
            }
            maps.push(map);
        }
        let missing: Vec<&str> =
            specs.iter().zip(&places).filter(|(_, place)| place.is_none()).map(|(s, _)| s.name.as_str()).collect();
        if let Some(first) = missing.first() {
            let more = if missing.len() > 1 { format!(" and {} more", missing.len() - 1) } else { String::new() };
            let place = if files.len() == 1 { files[0].as_path() } else { folder };
            return Err(bad(
                place,
                format!("tensor `{first}`{more} is missing"),
                "does `config.json` belong to these weights?",
            ));
        }
        Ok(Self { maps, places: places.into_iter().flatten().collect() })
    }

    /// Values of parameter `index` from `first` on, as many as `out` holds. No other page of the file is read.
    ///
    /// # Panics
    /// When the parameter has fewer.
    pub fn read_part(&self, index: usize, first: usize, out: &mut [f32]) {
        let (file, range, dtype) = &self.places[index];
        let data = &self.maps[*file][range.clone()];
        match dtype {
            Dtype::BF16 => fill(&data[2 * first..], out, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => fill(&data[2 * first..], out, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
            _ => fill(&data[4 * first..], out, f32::from_le_bytes),
        }
    }
}

fn fill<const N: usize>(data: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let data = &data.as_chunks::<N>().0[..out.len()];
    out.iter_mut().zip(data).for_each(|(out, bytes)| *out = value(*bytes));
}

/// Tensors that some checkpoints carry and no model needs.
fn ignored(name: &str, config: &ModelConfig) -> bool {
    (config.tie_word_embeddings && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
}

/// The weight files of a folder: `model.safetensors`, or what the index names.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = folder.join("model.safetensors.index.json");
    if !index.is_file() {
        let pickled =
            folder.join("pytorch_model.bin").is_file() || folder.join("pytorch_model.bin.index.json").is_file();
        let hint = if pickled {
            "the folder holds pickled weights; save them as safetensors first"
        } else {
            "name a Hugging Face model folder"
        };
        return Err(bad(&single, "no such file, and no `model.safetensors.index.json` either", hint));
    }
    let io = |source| EngineError::Io { path: index.clone(), source };
    let bytes = std::fs::metadata(&index).map_err(io)?.len();
    if bytes > INDEX_BYTES_MAX {
        return Err(bad(
            &index,
            format!("holds {bytes} bytes, the limit is {INDEX_BYTES_MAX}"),
            "is this the right file?",
        ));
    }
    let text = std::fs::read_to_string(&index).map_err(io)?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| bad(&index, format!("is not JSON: {e}"), ""))?;
    let map = value
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| bad(&index, "key `weight_map` is missing", ""))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let plain =
            file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\', '\0']) && *f != "." && *f != "..");
        names.insert(plain.ok_or_else(|| {
            bad(&index, format!("tensor `{tensor}` is in `{file}`, expected the name of a file in the same folder"), "")
        })?);
    }
    if names.len() > SHARDS_MAX {
        return Err(bad(&index, format!("names {} files, the limit is {SHARDS_MAX}", names.len()), ""));
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    match files.iter().find(|path| !path.is_file()) {
        Some(path) => Err(bad(path, "no such file, but the index names it", "download the checkpoint again")),
        None => Ok(files),
    }
}

#[allow(unsafe_code)]
fn map(path: &Path) -> Result<Mmap> {
    let io = |source| EngineError::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes < 8 {
        return Err(bad(path, format!("holds {bytes} bytes, too few for a safetensors file"), "download it again"));
    }
    // SAFETY: the map is read only. Another process that shortens the file meanwhile
    // would end this one with a bus error; checkpoints are replaced by rename, never rewritten in place.
    unsafe { Mmap::map(&file) }.map_err(io)
}

/// Checks the header: its length against the file's, places and sizes of all tensors without gap or overlap.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|error| {
        let claimed = bytes.first_chunk::<8>().map_or(0, |head| u64::from_le_bytes(*head));
        let message = match error {
            SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
                format!("the header claims {claimed} bytes, the file holds {}", bytes.len())
            }
            SafeTensorError::MetadataIncompleteBuffer => {
                format!("the tensors that the header lists do not fill the file's {} bytes exactly", bytes.len())
            }
            other => format!("is not safetensors: {other}"),
        };
        bad(path, message, "the file is truncated or damaged; download it again")
    })
}

/// A tensor must have the shape that the config implies, and a type that can be read; its bytes.
fn check(path: &Path, spec: &ParamSpec, view: &TensorView<'_>) -> Result<usize> {
    if view.shape() != spec.shape {
        let message = format!("tensor `{}` has shape {:?}, expected {:?}", spec.name, view.shape(), spec.shape);
        return Err(bad(path, message, "does `config.json` belong to these weights?"));
    }
    match view.dtype() {
        Dtype::F32 | Dtype::BF16 | Dtype::F16 => Ok(view.data().len()),
        other => Err(bad(
            path,
            format!("tensor `{}` has dtype {other:?}, expected F32, BF16 or F16", spec.name),
            "take the unquantized checkpoint",
        )),
    }
}
