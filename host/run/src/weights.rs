//! Weights on their way from the trainer to rollouts in other processes.
//!
//! `v00000012-1f6e….safetensors` holds the tensors that version 12 changed, `v00000012.json` says of every tensor which file
//! has it and what its hash is, and `versions.json` lists the versions that are kept. They are written in this order, so that
//! a version that can be found is complete. A reader takes the tensors whose hashes differ from what it holds, checks each of
//! them, and only then hands them over: weights of two versions are never mixed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cosmos_config::Dtype;
use cosmos_engine::model::{Model, ParamSpec};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredDtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::checkpoint::HostTensor;
use crate::error::{Result, Role, RunError};
use crate::shelf::Shelf;
use crate::student::weights_of;

/// Layout version written into manifests.
const FORMAT: u32 = 1;
const VERSIONS: &str = "versions.json";
/// A manifest has a line for every tensor; anything larger is not one of ours.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Names and shapes at the head of a file of tensors.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Pause between two looks for a version that is not there yet.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Files that a version refers to may be this many times as large as its tensors before all are written anew.
const SPREAD_MAX: u64 = 2;

/// Where a tensor of a version is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    file: String,
    shape: Vec<usize>,
    sha256: String,
}

/// All tensors of a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    version: u64,
    dtype: Dtype,
    tensors: BTreeMap<String, Entry>,
    /// Bytes of every file that the tensors are in.
    files: BTreeMap<String, u64>,
}

impl Manifest {
    fn name(version: u64) -> String {
        format!("v{version:08}.json")
    }

    fn bytes(&self) -> u64 {
        let width = width(self.dtype) as u64;
        self.tensors.values().map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>() * width).sum()
    }
}

fn width(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Float32 => 4,
        Dtype::Bfloat16 | Dtype::Float16 => 2,
    }
}

fn stored(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::Float32 => StoredDtype::F32,
        Dtype::Bfloat16 => StoredDtype::BF16,
        Dtype::Float16 => StoredDtype::F16,
    }
}

/// Values as little-endian bytes in `dtype`, rounded to nearest. A finite number stays finite.
pub(crate) fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::Float32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::Bfloat16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::Float16 => values.iter().flat_map(|v| half_of(*v).to_le_bytes()).collect(),
    }
}

fn half_of(value: f32) -> half::f16 {
    let rounded = half::f16::from_f32(value);
    if rounded.is_infinite() && value.is_finite() { half::f16::MAX.copysign(rounded) } else { rounded }
}

/// The opposite of [`encode`].
pub(crate) fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        Dtype::Float32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::Bfloat16 => pairs().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::Float16 => pairs().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
    }
}

pub(crate) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// JSON under its own hash, so that what was damaged on the way is told from what was written.
fn sealed(value: &impl Serialize) -> std::result::Result<Vec<u8>, String> {
    let json = serde_json::to_string(value).map_err(|e| e.to_string())?;
    Ok(format!("{}\n{json}\n", hash(json.as_bytes())).into_bytes())
}

fn unsealed<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let (seal, json) = text.split_once('\n').ok_or("it is cut off")?;
    let json = json.strip_suffix('\n').ok_or("it is cut off")?;
    if hash(json.as_bytes()) != seal {
        return Err("its hash is another".into());
    }
    serde_json::from_str(json).map_err(|e| e.to_string())
}

/// What a publication wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Published {
    /// Tensors that changed.
    pub tensors: usize,
    /// Bytes of them.
    pub bytes: u64,
}

/// Writes versions of the weights. One at a time writes to a shelf.
pub struct WeightPublisher {
    shelf: Arc<dyn Shelf>,
    dtype: Dtype,
    keep: usize,
    /// Versions on the shelf, oldest first.
    kept: Vec<Manifest>,
}

impl WeightPublisher {
    /// A publisher that keeps the newest `keep` versions (at least 1). What an earlier one left on the shelf is continued.
    ///
    /// # Errors
    /// Those of the shelf. A damaged list of versions is none: everything is published anew then.
    pub fn open(shelf: Arc<dyn Shelf>, dtype: Dtype, keep: usize) -> Result<Self> {
        let mut kept = Vec::new();
        for version in versions(shelf.as_ref())?.unwrap_or_default() {
            let bytes = shelf.get(&Manifest::name(version), MANIFEST_BYTES_MAX)?;
            match bytes.map(|bytes| unsealed::<Manifest>(&bytes)) {
                Some(Ok(manifest)) if manifest.format == FORMAT && manifest.version == version => kept.push(manifest),
                Some(Ok(_)) => tracing::warn!("{}: version {version} is of another program", shelf.place()),
                Some(Err(reason)) => tracing::warn!("{}: the manifest of version {version}: {reason}", shelf.place()),
                None => {}
            }
        }
        Ok(Self { shelf, dtype, keep: keep.max(1), kept })
    }

    /// The newest version on the shelf.
    pub fn newest(&self) -> Option<u64> {
        self.kept.last().map(|m| m.version)
    }

    /// Publishes `version`, one tensor at a time, and prunes. Versions at or after it are withdrawn first: they were left by
    /// a run that was rolled back, or somebody could not read them. Nothing that lies there is relied on then.
    ///
    /// # Errors
    /// Those of the shelf (a full disk among them). The older versions can be read as before then.
    pub fn publish(&mut self, version: u64, tensors: impl Iterator<Item = HostTensor>) -> Result<Published> {
        let again = self.kept.last().is_some_and(|last| last.version >= version);
        if again {
            let withdrawn: Vec<Manifest> = self.kept.extract_if(.., |m| m.version >= version).collect();
            self.write_versions()?;
            self.sweep(withdrawn)?;
        }
        let mut before: HashMap<String, Entry> = HashMap::new();
        if let Some(last) = self.kept.last().filter(|last| !again && last.dtype == self.dtype && !spread(last)) {
            before.extend(last.tensors.clone());
        }
        let mut manifest =
            Manifest { format: FORMAT, version, dtype: self.dtype, tensors: BTreeMap::new(), files: BTreeMap::new() };
        let mut changed: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for tensor in tensors {
            let bytes = encode(&tensor.values, self.dtype);
            let sha256 = hash(&bytes);
            let entry = match before.remove(&tensor.name) {
                Some(entry) if entry.sha256 == sha256 && entry.shape == tensor.shape => entry,
                _ => {
                    changed.push((tensor.name.clone(), tensor.shape.clone(), bytes));
                    Entry { file: String::new(), shape: tensor.shape, sha256 }
                }
            };
            manifest.tensors.insert(tensor.name, entry);
        }
        let published =
            Published { tensors: changed.len(), bytes: changed.iter().map(|(_, _, bytes)| bytes.len() as u64).sum() };
        if !changed.is_empty() {
            self.write_tensors(&mut manifest, changed)?;
        }
        for entry in manifest.tensors.values() {
            let known = self.kept.iter().rev().find_map(|m| m.files.get(&entry.file));
            if let (false, Some(bytes)) = (manifest.files.contains_key(&entry.file), known) {
                manifest.files.insert(entry.file.clone(), *bytes);
            }
        }
        let text = sealed(&manifest).map_err(|e| self.wrong(e))?;
        self.shelf.put(&Manifest::name(version), &text)?;
        self.kept.push(manifest);
        let surplus = self.kept.len().saturating_sub(self.keep);
        let pruned: Vec<Manifest> = self.kept.drain(..surplus).collect();
        self.write_versions()?;
        self.sweep(pruned)?;
        Ok(published)
    }

    /// Publishes all parameters of a model. Of a sharded model every rank gathers them (`student::weights_of`), and one rank
    /// passes them to [`WeightPublisher::publish`].
    ///
    /// # Errors
    /// As [`WeightPublisher::publish`].
    pub fn publish_model(&mut self, version: u64, model: &dyn Model) -> Result<Published> {
        self.publish(version, weights_of(model)?.into_iter())
    }

    fn wrong(&self, message: String) -> RunError {
        RunError::shared(self.shelf.place(), format!("the weights cannot be written: {message}"), "")
    }

    fn write_tensors(&self, manifest: &mut Manifest, changed: Vec<(String, Vec<usize>, Vec<u8>)>) -> Result<()> {
        let views = changed
            .iter()
            .map(|(name, shape, bytes)| {
                TensorView::new(stored(self.dtype), shape.clone(), bytes).map(|view| (name.as_str(), view))
            })
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|e| self.wrong(e.to_string()))?;
        let file = safetensors::serialize(views, None).map_err(|e| self.wrong(e.to_string()))?;
        // The hash keeps a version that is published again, after a rollback, from writing over what an older manifest names.
        let hashes: String =
            changed.iter().filter_map(|(name, ..)| manifest.tensors.get(name)).fold(String::new(), |mut all, entry| {
                all.push_str(&entry.sha256);
                all
            });
        let name = format!("v{:08}-{}.safetensors", manifest.version, &hash(hashes.as_bytes())[..16]);
        self.shelf.put(&name, &file)?;
        manifest.files.insert(name.clone(), file.len() as u64);
        for (tensor, ..) in &changed {
            if let Some(entry) = manifest.tensors.get_mut(tensor) {
                entry.file.clone_from(&name);
            }
        }
        Ok(())
    }

    fn write_versions(&self) -> Result<()> {
        let versions: Vec<u64> = self.kept.iter().map(|m| m.version).collect();
        let text = sealed(&versions).map_err(|e| self.wrong(e))?;
        self.shelf.put(VERSIONS, &text)
    }

    /// Removes manifests that are no longer listed and the files that no listed one names.
    fn sweep(&self, gone: Vec<Manifest>) -> Result<()> {
        let named: HashSet<&String> = self.kept.iter().flat_map(|m| m.files.keys()).collect();
        for manifest in &gone {
            self.shelf.remove(&Manifest::name(manifest.version))?;
        }
        let files: HashSet<&String> = gone.iter().flat_map(|m| m.files.keys()).collect();
        for file in files.difference(&named) {
            self.shelf.remove(file)?;
        }
        Ok(())
    }
}

/// Whether a version's tensors lie in files that are mostly outdated.
fn spread(manifest: &Manifest) -> bool {
    manifest.files.values().sum::<u64>() > SPREAD_MAX * manifest.bytes() + HEADER_BYTES_MAX
}

/// Versions listed on a shelf; none when there is no readable list.
fn versions(shelf: &dyn Shelf) -> Result<Option<Vec<u64>>> {
    let Some(bytes) = shelf.get(VERSIONS, MANIFEST_BYTES_MAX)? else { return Ok(None) };
    match unsealed(&bytes) {
        Ok(versions) => Ok(Some(versions)),
        Err(reason) => {
            tracing::warn!("{}: `{VERSIONS}`: {reason}", shelf.place());
            Ok(None)
        }
    }
}

/// Verified tensors of a version that the reader did not hold.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightUpdate {
    /// The version.
    pub version: u64,
    /// What changed.
    pub tensors: Vec<HostTensor>,
    /// Hashes of all tensors of the version.
    hashes: HashMap<String, String>,
}

/// Reads versions of the weights. Each reader remembers what it holds and takes only what differs.
pub struct WeightReader {
    shelf: Arc<dyn Shelf>,
    /// Who publishes, for messages.
    writer: String,
    /// Hash of each tensor that was handed over.
    held: HashMap<String, String>,
    version: Option<u64>,
}

/// Why an attempt to read failed.
enum Miss {
    /// Another attempt may succeed.
    Yet(String),
    /// None will.
    Never(RunError),
}

impl From<RunError> for Miss {
    fn from(error: RunError) -> Self {
        Self::Never(error)
    }
}

impl WeightReader {
    /// A reader that holds nothing. `writer` names whom it waits for: the policy.
    pub fn new(shelf: Arc<dyn Shelf>, writer: &str) -> Self {
        Self { shelf, writer: writer.to_string(), held: HashMap::new(), version: None }
    }

    /// The version that was loaded last.
    pub fn version(&self) -> Option<u64> {
        self.version
    }

    /// The newest version that is kept, if there is one.
    ///
    /// # Errors
    /// Those of the shelf.
    pub fn newest(&self) -> Result<Option<u64>> {
        Ok(versions(self.shelf.as_ref())?.and_then(|versions| versions.last().copied()))
    }

    /// What `version` changed of what this reader holds; `specs` are the parameters of the model that it is for. Waits until
    /// the version is published and whole. A torn or damaged file is asked for again, never handed over.
    ///
    /// # Errors
    /// The deadline, with the policy it waited for and what was wrong last; a version that is no longer kept; weights of
    /// another model.
    pub fn fetch(&self, version: u64, specs: &[ParamSpec], wait_ms_max: u64) -> Result<WeightUpdate> {
        let begun = Instant::now();
        loop {
            let reason = match self.attempt(version, specs) {
                Ok(update) => return Ok(update),
                Err(Miss::Never(error)) => return Err(error),
                Err(Miss::Yet(reason)) => reason,
            };
            if begun.elapsed() >= Duration::from_millis(wait_ms_max) {
                return Err(RunError::shared(
                    self.shelf.place(),
                    format!("waited {wait_ms_max} ms for weights {version} of {}: {reason}", self.writer),
                    format!("look at the log of {}, and whether both see the same folder or server", self.writer),
                ));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Writes an update into a model, a rank's pieces where it is sharded, and remembers it.
    ///
    /// # Errors
    /// A parameter that the model refuses; the reader then holds nothing and takes all tensors the next time.
    pub fn apply(&mut self, update: WeightUpdate, model: &mut dyn Model) -> Result<()> {
        let places: HashMap<String, usize> =
            model.whole_params().iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)).collect();
        self.held.clear();
        self.version = None;
        for tensor in &update.tensors {
            let Some(index) = places.get(&tensor.name) else { return Err(self.foreign(&tensor.name)) };
            let own = model.cut(*index, &tensor.values).role("student")?;
            model.write_param(*index, &own).role("student")?;
        }
        self.held = update.hashes;
        self.version = Some(update.version);
        Ok(())
    }

    /// Brings a model to `version`. Returns how many tensors were written: none when it has the version already, and some
    /// when the version was published again after a rollback.
    ///
    /// # Errors
    /// As [`WeightReader::fetch`] and [`WeightReader::apply`].
    pub fn load(&mut self, version: u64, model: &mut dyn Model, wait_ms_max: u64) -> Result<usize> {
        let update = self.fetch(version, model.whole_params(), wait_ms_max)?;
        let written = update.tensors.len();
        self.apply(update, model)?;
        Ok(written)
    }

    fn foreign(&self, tensor: &str) -> RunError {
        RunError::shared(
            self.shelf.place(),
            format!("the published weights do not fit this model: tensor `{tensor}`"),
            "all roles must have the same `policy.model_name_or_path`",
        )
    }

    #[expect(clippy::result_large_err, reason = "once per version of the weights")]
    fn attempt(&self, version: u64, specs: &[ParamSpec]) -> std::result::Result<WeightUpdate, Miss> {
        let manifest = self.manifest(version)?;
        let differs = specs.len() != manifest.tensors.len();
        let other =
            specs.iter().find(|spec| manifest.tensors.get(&spec.name).is_none_or(|entry| entry.shape != spec.shape));
        if let (true, _) | (_, Some(_)) = (differs, other) {
            return Err(Miss::Never(self.foreign(other.map_or("(another number of them)", |spec| spec.name.as_str()))));
        }
        let mut wanted: BTreeMap<&str, Vec<(&str, &Entry)>> = BTreeMap::new();
        for spec in specs {
            let Some(entry) = manifest.tensors.get(&spec.name) else { continue };
            if self.held.get(&spec.name) != Some(&entry.sha256) {
                wanted.entry(&entry.file).or_default().push((&spec.name, entry));
            }
        }
        let all: u64 = specs.iter().map(|spec| (spec.len() * width(manifest.dtype)) as u64).sum();
        let mut tensors = Vec::new();
        for (file, entries) in wanted {
            let listed = manifest.files.get(file).copied().unwrap_or(0).min(all.saturating_add(HEADER_BYTES_MAX));
            let bytes = match self.shelf.get(file, listed)? {
                Some(bytes) => bytes,
                None => return Err(Miss::Yet(format!("`{file}` is gone"))),
            };
            tensors.extend(checked(&bytes, &entries, manifest.dtype).map_err(|e| Miss::Yet(format!("`{file}`: {e}")))?);
        }
        let hashes = manifest.tensors.into_iter().map(|(name, entry)| (name, entry.sha256)).collect();
        Ok(WeightUpdate { version, tensors, hashes })
    }

    #[expect(clippy::result_large_err, reason = "once per version of the weights")]
    fn manifest(&self, version: u64) -> std::result::Result<Manifest, Miss> {
        let name = Manifest::name(version);
        let Some(bytes) = self.shelf.get(&name, MANIFEST_BYTES_MAX)? else {
            let listed = versions(self.shelf.as_ref())?.unwrap_or_default();
            return Err(match (listed.first(), listed.last()) {
                (Some(oldest), Some(newest)) if *oldest > version => Miss::Never(RunError::shared(
                    self.shelf.place(),
                    format!("weights {version} are no longer kept: the shelf has {oldest} to {newest}"),
                    "a role this far behind must ask for newer work; `host.weights_keep` keeps more versions",
                )),
                _ => Miss::Yet("they are not published".into()),
            });
        };
        let manifest: Manifest = unsealed(&bytes).map_err(|e| Miss::Yet(format!("`{name}`: {e}")))?;
        if manifest.format != FORMAT || manifest.version != version {
            return Err(Miss::Yet(format!("`{name}` is of layout {} version {}", manifest.format, manifest.version)));
        }
        Ok(manifest)
    }
}

/// The tensors `entries` of a file, each held against its hash.
fn checked(bytes: &[u8], entries: &[(&str, &Entry)], dtype: Dtype) -> std::result::Result<Vec<HostTensor>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let read = entries.iter().map(|(name, entry)| {
        let view = file.tensor(name).map_err(|e| e.to_string())?;
        if view.dtype() != stored(dtype) || view.shape() != entry.shape {
            return Err(format!("`{name}` is {:?} {:?}", view.dtype(), view.shape()));
        }
        if hash(view.data()) != entry.sha256 {
            return Err(format!("`{name}` is damaged"));
        }
        Ok(HostTensor { name: name.to_string(), shape: entry.shape.clone(), values: decode(view.data(), dtype) })
    });
    read.collect()
}

#[cfg(test)]
#[path = "weights_tests.rs"]
mod tests;
