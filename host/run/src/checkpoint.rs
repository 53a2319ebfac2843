//! Checkpoints of a run: safetensors and a manifest with hashes, written aside and renamed into place.
//!
//! `checkpoints/step_00000030/` holds `model.safetensors` (f32 master weights), `optimizer.safetensors`, `state.json`
//! (controller, completions in flight, counters) and `manifest.json`, which lists the others with their sizes and
//! SHA-256. A folder without a manifest, or whose files differ from it, is never loaded; the newest good one is.
//!
//! Tensors are whole, whatever mesh they were trained on. Many of them lie in several files,
//! `model-00001-of-00003.safetensors` and so on, so that neither writing nor reading holds all of them twice.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Result, RunError};

/// Layout version written into manifests. 1 had another controller in `state.json`; its weights are still read.
const FORMAT: u32 = 2;
const FORMATS_READ: [u32; 2] = [1, FORMAT];
const MANIFEST: &str = "manifest.json";
/// The system's number of an error of the disk itself.
const EIO: i32 = 5;
/// Tensors of one file, in bytes; a single larger tensor has a file of its own.
const SHARD_BYTES_MAX: u64 = 4 << 30;
/// A manifest lists a handful of files; anything larger is not one of ours.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// A named f32 tensor on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Name in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// Everything a checkpoint holds, in memory.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Steps made.
    pub step: u64,
    /// Master weights by Hugging Face name.
    pub model: Vec<HostTensor>,
    /// Optimizer state by parameter name.
    pub optimizer: Vec<HostTensor>,
    /// The run's own state as JSON.
    pub state: serde_json::Value,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// What `manifest.json` says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout version.
    pub format: u32,
    /// Steps made.
    pub step: u64,
    /// Version of the program that wrote it.
    pub written_by: String,
    /// Folder the student came from, for its config and tokenizer.
    pub model_source: PathBuf,
    /// The other files.
    pub files: BTreeMap<String, FileEntry>,
}

/// A checkpoint as `ckpt ls` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointInfo {
    /// Folder.
    pub path: PathBuf,
    /// Steps made.
    pub step: u64,
    /// Size of all files in bytes.
    pub bytes: u64,
    /// Why it cannot be loaded, if so. Hashes are only checked by `verify`.
    pub problem: Option<String>,
}

/// Folder name of a step.
pub fn folder_name(step: u64) -> String {
    format!("step_{step:08}")
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> RunError + '_ {
    move |source| RunError::Io { path: path.to_path_buf(), source }
}

fn broken(path: &Path, message: impl Into<String>) -> RunError {
    RunError::Checkpoint {
        path: path.to_path_buf(),
        message: message.into(),
        hint: "`ckpt ls` shows the others; an older one still loads".into(),
    }
}

/// Writes `snapshot` under `root` and renames it into place. Returns the folder.
pub fn write(root: &Path, snapshot: &Snapshot, model_source: &Path) -> Result<PathBuf> {
    fs::create_dir_all(root).map_err(io(root))?;
    let target = root.join(folder_name(snapshot.step));
    let aside = root.join(format!(".{}-{}", folder_name(snapshot.step), std::process::id()));
    let _ = fs::remove_dir_all(&aside);
    fs::create_dir(&aside).map_err(io(&aside))?;
    let written = write_files(&aside, snapshot, model_source);
    if let Err(error) = written {
        // A full disk must not be filled further by the leftovers.
        let _ = fs::remove_dir_all(&aside);
        return Err(error);
    }
    if target.exists() {
        let old = root.join(format!(".old-{}-{}", folder_name(snapshot.step), std::process::id()));
        let _ = fs::remove_dir_all(&old);
        fs::rename(&target, &old).map_err(io(&target))?;
        fs::rename(&aside, &target).map_err(io(&target))?;
        let _ = fs::remove_dir_all(&old);
    } else {
        fs::rename(&aside, &target).map_err(io(&target))?;
    }
    sync_folder(root)?;
    Ok(target)
}

fn write_files(folder: &Path, snapshot: &Snapshot, model_source: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    for (stem, tensors) in [(MODEL, &snapshot.model), (OPTIMIZER, &snapshot.optimizer)] {
        let shards = shards(tensors, SHARD_BYTES_MAX);
        for (index, shard) in shards.iter().enumerate() {
            let name = shard_name(stem, index, shards.len());
            let entry = write_synced(&folder.join(&name), &serialize(shard, folder)?)?;
            files.insert(name, entry);
        }
    }
    let state = serde_json::to_vec_pretty(&snapshot.state)
        .map_err(|e| broken(folder, format!("the run's state cannot be written: {e}")))?;
    files.insert(STATE.to_string(), write_synced(&folder.join(STATE), &state)?);
    let manifest = Manifest {
        format: FORMAT,
        step: snapshot.step,
        written_by: format!("cosmos-host {}", env!("CARGO_PKG_VERSION")),
        model_source: model_source.to_path_buf(),
        files,
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| broken(folder, e.to_string()))?;
    // Last, so that a folder with a manifest has all its files.
    write_synced(&folder.join(MANIFEST), &text)?;
    sync_folder(folder)
}

const MODEL: &str = "model";
const OPTIMIZER: &str = "optimizer";
const STATE: &str = "state.json";

/// Consecutive tensors of at most `bytes_max` together; one shard at least.
fn shards(tensors: &[HostTensor], bytes_max: u64) -> Vec<&[HostTensor]> {
    let bytes = |t: &HostTensor| 4 * t.values.len() as u64;
    let mut shards = Vec::new();
    let (mut start, mut held) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && held + bytes(tensor) > bytes_max {
            shards.push(&tensors[start..index]);
            (start, held) = (index, 0);
        }
        held += bytes(tensor);
    }
    shards.push(&tensors[start..]);
    shards
}

fn shard_name(stem: &str, index: usize, count: usize) -> String {
    match count {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

/// The files of a manifest that hold the tensors of `stem`, in order. Every number of a set must be there.
fn shard_files<'a>(manifest: &'a Manifest, stem: &str, folder: &Path) -> Result<Vec<&'a str>> {
    let is_one = |name: &str| {
        name.strip_prefix(stem)
            .and_then(|rest| rest.strip_suffix(".safetensors"))
            .is_some_and(|middle| middle.is_empty() || middle.starts_with('-'))
    };
    let names: Vec<&str> = manifest.files.keys().map(String::as_str).filter(|name| is_one(name)).collect();
    let complete = !names.is_empty()
        && names.iter().enumerate().all(|(index, name)| *name == shard_name(stem, index, names.len()));
    if complete {
        return Ok(names);
    }
    Err(broken(folder, format!("`{MANIFEST}` does not list all files of `{stem}`: {names:?}")))
}

fn serialize(tensors: &[HostTensor], folder: &Path) -> Result<Vec<u8>> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, b)| TensorView::new(Dtype::F32, t.shape.clone(), b).map(|v| (t.name.clone(), v)))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|e| broken(folder, e.to_string()))?;
    safetensors::serialize(views, None).map_err(|e| broken(folder, e.to_string()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<FileEntry> {
    let mut file = File::create(path).map_err(io(path))?;
    file.write_all(bytes).map_err(io(path))?;
    file.sync_all().map_err(io(path))?;
    Ok(FileEntry { bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) })
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(io(folder))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let length = fs::metadata(&path).map_err(unreadable(folder, MANIFEST))?.len();
    if length > MANIFEST_BYTES_MAX {
        return Err(broken(folder, format!("`{MANIFEST}` is {length} bytes long")));
    }
    let text = fs::read_to_string(&path).map_err(io(&path))?;
    let manifest: Manifest =
        serde_json::from_str(&text).map_err(|e| broken(folder, format!("`{MANIFEST}` is damaged: {e}")))?;
    if !FORMATS_READ.contains(&manifest.format) {
        return Err(broken(
            folder,
            format!("layout version {} is not {FORMAT}, which this program reads", manifest.format),
        ));
    }
    if manifest.files.keys().any(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        return Err(broken(folder, format!("`{MANIFEST}` names a file outside the folder")));
    }
    Ok(manifest)
}

/// Every checkpoint under `root` (a `checkpoints` folder or a run folder), oldest first.
pub fn list(root: &Path) -> Result<Vec<CheckpointInfo>> {
    let root = checkpoints_root(root);
    let entries = fs::read_dir(&root).map_err(io(&root))?;
    let mut found: Vec<CheckpointInfo> = entries
        .filter_map(|e| e.ok())
        .filter_map(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            let step = name.strip_prefix("step_")?.parse().ok()?;
            Some((e.path(), step))
        })
        .map(|(path, step)| match read_manifest(&path) {
            Ok(manifest) => {
                let problem = manifest.files.iter().find_map(|(name, entry)| {
                    let length = fs::metadata(path.join(name)).map(|m| m.len()).unwrap_or(0);
                    (length != entry.bytes).then(|| format!("`{name}` is {length} bytes long, not {}", entry.bytes))
                });
                CheckpointInfo { step, bytes: manifest.files.values().map(|f| f.bytes).sum(), problem, path }
            }
            Err(error) => CheckpointInfo { step, bytes: 0, problem: Some(error.to_string()), path },
        })
        .collect();
    found.sort_by_key(|c| c.step);
    Ok(found)
}

fn checkpoints_root(path: &Path) -> PathBuf {
    let inner = path.join("checkpoints");
    if inner.is_dir() { inner } else { path.to_path_buf() }
}

/// Checks every file of a checkpoint against its manifest.
pub fn verify(folder: &Path) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    for (name, entry) in &manifest.files {
        let path = folder.join(name);
        let (bytes, sha256) = hash_file(&path).map_err(unreadable(folder, name))?;
        if bytes != entry.bytes {
            return Err(broken(folder, format!("`{name}` is {bytes} bytes long, the manifest says {}", entry.bytes)));
        }
        if sha256 != entry.sha256 {
            return Err(broken(folder, format!("`{name}` does not match its hash")));
        }
    }
    Ok(manifest)
}

/// A file that is missing or lies on broken ground makes a checkpoint a damaged one; one that the system does not let us
/// read may be whole.
fn unreadable<'a>(folder: &'a Path, name: &'a str) -> impl FnOnce(std::io::Error) -> RunError + 'a {
    move |source| match source.kind() {
        std::io::ErrorKind::NotFound => broken(folder, format!("`{name}` is missing")),
        _ if source.raw_os_error() == Some(EIO) => broken(folder, format!("`{name}` cannot be read: {source}")),
        _ => RunError::Io { path: folder.join(name), source },
    }
}

fn hash_file(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((total, hex(&hasher.finalize())));
        }
        hasher.update(&buffer[..n]);
        total += n as u64;
    }
}

/// Reads a checkpoint, every file verified.
pub fn read(folder: &Path) -> Result<(Snapshot, Manifest)> {
    let manifest = verify(folder)?;
    let snapshot = Snapshot {
        step: manifest.step,
        model: read_shards(folder, &manifest, MODEL)?,
        optimizer: read_shards(folder, &manifest, OPTIMIZER)?,
        state: read_state(folder)?,
    };
    Ok((snapshot, manifest))
}

/// The run's own state in a checkpoint that was verified, without its tensors.
pub fn read_state(folder: &Path) -> Result<serde_json::Value> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).map_err(io(&path))?;
    serde_json::from_str(&text).map_err(|e| broken(folder, format!("`state.json`: {e}")))
}

fn read_shards(folder: &Path, manifest: &Manifest, stem: &str) -> Result<Vec<HostTensor>> {
    let mut tensors = Vec::new();
    for name in shard_files(manifest, stem, folder)? {
        tensors.extend(read_tensors(&folder.join(name))?);
    }
    Ok(tensors)
}

fn read_tensors(path: &Path) -> Result<Vec<HostTensor>> {
    let bytes = fs::read(path).map_err(io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(path, e.to_string()))?;
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            if view.dtype() != Dtype::F32 {
                return Err(broken(path, format!("`{name}` is {:?}, not F32", view.dtype())));
            }
            let values = view.data().chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
            Ok(HostTensor { name, shape: view.shape().to_vec(), values })
        })
        .collect()
}

/// The newest checkpoint under `root` that verifies. Damaged ones are passed over with a warning.
pub fn newest(root: &Path) -> Result<Option<PathBuf>> {
    if !checkpoints_root(root).is_dir() {
        return Ok(None);
    }
    for info in list(root)?.into_iter().rev() {
        match verify(&info.path) {
            Ok(_) => return Ok(Some(info.path)),
            Err(error) => tracing::warn!("passed over: {error}"),
        }
    }
    Ok(None)
}

/// Deletes the oldest checkpoints beyond `keep` (negative: keeps all) and leftovers of writers that died. Those after `step`,
/// the newest one, neither count nor go: the run went back over them, because they are damaged.
pub fn prune(root: &Path, keep: i64, step: u64) -> Result<()> {
    for entry in fs::read_dir(root).map_err(io(root))?.filter_map(|e| e.ok()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mine = name.ends_with(&format!("-{}", std::process::id()));
        if (name.starts_with(".step_") || name.starts_with(".old-")) && !mine {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    if keep < 0 {
        return Ok(());
    }
    let all = list(root)?;
    let good: Vec<_> = all.iter().filter(|c| c.problem.is_none() && c.step <= step).collect();
    for info in good.iter().take(good.len().saturating_sub(keep.max(1) as usize)) {
        fs::remove_dir_all(&info.path).map_err(io(&info.path))?;
    }
    Ok(())
}

/// Writes checkpoints behind the training loop, one at a time.
pub struct Writer {
    root: PathBuf,
    model_source: PathBuf,
    keep: i64,
    in_background: bool,
    running: Option<JoinHandle<Result<PathBuf>>>,
    last: Option<PathBuf>,
}

impl Writer {
    /// A writer into `root`; with `in_background` the loop only waits for the previous write.
    pub fn new(root: PathBuf, model_source: PathBuf, keep: i64, in_background: bool) -> Self {
        Self { root, model_source, keep, in_background, running: None, last: None }
    }

    /// Starts (or does) the write; an error of the previous one surfaces here.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<()> {
        self.wait()?;
        let (root, source, keep) = (self.root.clone(), self.model_source.clone(), self.keep);
        let job = move || {
            let folder = write(&root, &snapshot, &source)?;
            prune(&root, keep, snapshot.step)?;
            Ok(folder)
        };
        if self.in_background {
            self.running = Some(std::thread::spawn(job));
        } else {
            self.last = Some(job()?);
        }
        Ok(())
    }

    /// Waits for the write under way. Returns the newest folder written.
    pub fn wait(&mut self) -> Result<Option<PathBuf>> {
        if let Some(handle) = self.running.take() {
            let folder = handle.join().map_err(|_| broken(&self.root, "the writer thread died"))??;
            self.last = Some(folder);
        }
        Ok(self.last.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(step: u64) -> Snapshot {
        let tensor = |name: &str| HostTensor {
            name: name.into(),
            shape: vec![2, 3],
            values: (0..6).map(|i| i as f32 + step as f32).collect(),
        };
        Snapshot {
            step,
            model: vec![tensor("w")],
            optimizer: vec![tensor("w.m")],
            state: serde_json::json!({"step": step}),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let folder = write(dir.path(), &snapshot(3), Path::new("/model")).unwrap();
        let (read, manifest) = read(&folder).unwrap();
        assert_eq!((read.model, read.step, manifest.step), (snapshot(3).model, 3, 3));
        write(dir.path(), &snapshot(3), Path::new("/model")).unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn many_tensors_lie_in_several_files() {
        let tensors: Vec<HostTensor> =
            (0..5).map(|i| HostTensor { name: format!("t{i}"), shape: vec![4], values: vec![i as f32; 4] }).collect();
        let sizes = |max| shards(&tensors, max).iter().map(|s| s.len()).collect::<Vec<_>>();
        assert_eq!((sizes(32), sizes(1), sizes(1 << 20)), (vec![2, 2, 1], vec![1; 5], vec![5]));
        assert_eq!(shards(&[], 1).len(), 1);
        let manifest = |names: &[String]| Manifest {
            format: FORMAT,
            step: 1,
            written_by: String::new(),
            model_source: PathBuf::new(),
            files: names.iter().map(|n| (n.clone(), FileEntry { bytes: 0, sha256: String::new() })).collect(),
        };
        let names: Vec<String> = (0..3).map(|i| shard_name(MODEL, i, 3)).collect();
        let whole = manifest(&names);
        assert_eq!(shard_files(&whole, MODEL, Path::new("x")).unwrap(), names);
        assert!(shard_files(&manifest(&names[..2]), MODEL, Path::new("x")).is_err());
        assert!(shard_files(&whole, OPTIMIZER, Path::new("x")).is_err());
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &snapshot(1), Path::new("/m")).unwrap();
        let bad = write(dir.path(), &snapshot(2), Path::new("/m")).unwrap();
        let torn = write(dir.path(), &snapshot(3), Path::new("/m")).unwrap();
        let file = bad.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        fs::remove_file(torn.join(MANIFEST)).unwrap();
        assert!(newest(dir.path()).unwrap().unwrap().ends_with(folder_name(1)));
        assert!(verify(&bad).unwrap_err().to_string().contains("does not match its hash"));
    }

    #[test]
    fn only_the_newest_are_kept_and_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        for step in 1..=5 {
            write(dir.path(), &snapshot(step), Path::new("/m")).unwrap();
        }
        fs::create_dir(dir.path().join(".step_00000009-1")).unwrap();
        prune(dir.path(), 1, 2).unwrap();
        let steps = || list(dir.path()).unwrap().iter().map(|c| c.step).collect::<Vec<_>>();
        assert_eq!(steps(), [2, 3, 4, 5], "the run went back to step 2");
        prune(dir.path(), 2, 5).unwrap();
        assert_eq!(steps(), [4, 5]);
        assert!(!dir.path().join(".step_00000009-1").exists());
    }
}
