//! From a dataset's name to the files of the wanted splits.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::DatasetSpec;
use super::files::{self, Format, Splits};
use super::hub::{self, HubOptions};
use super::split::{self, Cut};
use crate::error::DataError;

/// Files and folders looked at below a dataset's folder.
const ENTRIES_MAX: usize = 100_000;
/// Bytes of a small description file.
const DESCRIPTION_BYTES_MAX: u64 = 16 << 20;

/// What was found.
pub(super) struct Found {
    /// The dataset in words.
    pub place: String,
    /// The wanted splits, in order.
    pub chosen: Vec<Chosen>,
}

/// A split, or a part of one.
pub(super) struct Chosen {
    /// Its files, in order.
    pub files: Vec<PathBuf>,
    /// Which of its rows.
    pub cut: Cut,
}

pub(super) fn locate(spec: &DatasetSpec, hub: &HubOptions) -> Result<Found, DataError> {
    let place = if spec.subset.is_empty() {
        format!("`{}`", spec.name)
    } else {
        format!("`{}` (subset `{}`)", spec.name, spec.subset)
    };
    if !spec.local_dir.is_empty() {
        let folder = PathBuf::from(&spec.local_dir);
        let named = folder.join(&spec.name);
        let root = if !spec.name.is_empty() && named.exists() { named } else { folder };
        if !root.exists() {
            return Err(DataError::NoSuchDataset { name: spec.local_dir.clone() });
        }
        return on_disk(spec, &root, format!("`{}`", root.display()));
    }
    let path = PathBuf::from(&spec.name);
    if !spec.name.is_empty() && path.exists() {
        return on_disk(spec, &path, place);
    }
    if !hub::is_hub_id(&spec.name) || Format::of(&path).is_some() {
        return Err(DataError::NoSuchDataset { name: spec.name.clone() });
    }
    let mut repository = hub::Repository::open(&spec.name, &spec.revision, hub)?;
    let card = repository.card()?;
    let splits = files::resolve(&repository.files(), card.as_deref(), &spec.subset, &place)?;
    choose(spec, splits, place, |files| repository.fetch(files))
}

fn on_disk(spec: &DatasetSpec, path: &Path, place: String) -> Result<Found, DataError> {
    if path.is_file() {
        return single_file(spec, path, place);
    }
    if let Some(saved) = saved_folder(path, &spec.subset) {
        let splits = saved_splits(&saved)?;
        return choose(spec, splits, place, |files| Ok(files.iter().map(|file| saved.join(file)).collect()));
    }
    let mut found = Vec::new();
    walk(path, "", &mut found)?;
    let card = path.join("README.md");
    let card = if card.is_file() { Some(read_description(&card)?) } else { None };
    let splits = files::resolve(&found, card.as_deref(), &spec.subset, &place)?;
    choose(spec, splits, place, |files| Ok(files.iter().map(|file| path.join(file)).collect()))
}

/// A file is the split that its name tells, and by convention also `train`. One whose name tells none is whatever split
/// the configuration asks for, so that a preset can be pointed at a local file by its name alone.
fn single_file(spec: &DatasetSpec, path: &Path, place: String) -> Result<Found, DataError> {
    if Format::of(path).is_none() {
        return Err(DataError::UnknownFormat { path: path.to_owned() });
    }
    if !spec.subset.is_empty() {
        return Err(DataError::MissingSubset { place, subset: spec.subset.clone(), known: Vec::new() });
    }
    let told = path.file_stem().and_then(|stem| files::keyword(stem.to_str()?));
    let mut known = vec!["train".to_owned()];
    known.extend(told.filter(|s| *s != "train").map(str::to_owned));
    let mut chosen = Vec::new();
    for part in split::parse(&spec.splits)? {
        if told.is_some() && !part.name.is_empty() && !known.contains(&part.name) {
            return Err(DataError::MissingSplit { place, split: part.name, known });
        }
        chosen.push(Chosen { files: vec![path.to_owned()], cut: part.cut });
    }
    Ok(Found { place: in_words(place, spec), chosen })
}

/// Picks the wanted splits and gets their files.
fn choose(
    spec: &DatasetSpec,
    splits: Splits,
    place: String,
    mut fetch: impl FnMut(&[String]) -> Result<Vec<PathBuf>, DataError>,
) -> Result<Found, DataError> {
    let known = || splits.iter().map(|(split, _)| split.clone()).collect::<Vec<_>>();
    let mut wanted = Vec::new();
    for part in split::parse(&spec.splits)? {
        let found = if part.name.is_empty() {
            match splits.as_slice() {
                [only] => only,
                _ => return Err(DataError::SplitNeeded { place, known: known() }),
            }
        } else {
            match splits.iter().find(|(split, _)| *split == part.name) {
                Some(found) => found,
                None => return Err(DataError::MissingSplit { place, split: part.name, known: known() }),
            }
        };
        files::check_shards(&found.1, &place)?;
        wanted.push((&found.1, part.cut));
    }
    let mut chosen = Vec::new();
    for (files, cut) in wanted {
        chosen.push(Chosen { files: fetch(files)?, cut });
    }
    Ok(Found { place: in_words(place, spec), chosen })
}

fn in_words(place: String, spec: &DatasetSpec) -> String {
    let splits: Vec<&str> = spec.splits.iter().map(String::as_str).filter(|split| !split.is_empty()).collect();
    if splits.is_empty() { place } else { format!("{place} split `{}`", splits.join("+")) }
}

/// The folder that `save_to_disk` wrote, if `path` is or holds one.
fn saved_folder(path: &Path, subset: &str) -> Option<PathBuf> {
    let is_saved = |path: &Path| path.join("dataset_dict.json").is_file() || path.join("state.json").is_file();
    if !subset.is_empty() {
        return files::is_inside(subset).then(|| path.join(subset)).filter(|path| is_saved(path));
    }
    is_saved(path).then(|| path.to_owned())
}

fn saved_splits(folder: &Path) -> Result<Splits, DataError> {
    #[derive(Deserialize)]
    struct Dict {
        splits: Vec<String>,
    }
    let dict = folder.join("dataset_dict.json");
    if !dict.is_file() {
        let (split, files) = saved_split(folder, "")?;
        return Ok(vec![(split.unwrap_or_else(|| "train".into()), files)]);
    }
    let dict_file: Dict = read_json(&dict)?;
    let mut splits = Vec::new();
    for split in dict_file.splits {
        if !files::is_inside(&split) {
            return Err(DataError::broken(dict, format!("`{split}` cannot be the name of a split")));
        }
        let (_, files) = saved_split(&folder.join(&split), &format!("{split}/"))?;
        splits.push((split, files));
    }
    Ok(splits)
}

/// A split's own name and its files below the dataset's folder.
fn saved_split(folder: &Path, prefix: &str) -> Result<(Option<String>, Vec<String>), DataError> {
    #[derive(Deserialize)]
    struct State {
        #[serde(rename = "_data_files")]
        data_files: Vec<DataFile>,
        #[serde(rename = "_split")]
        split: Option<String>,
        #[serde(rename = "_indices_data_files")]
        indices: Option<serde_json::Value>,
    }
    #[derive(Deserialize)]
    struct DataFile {
        filename: String,
    }
    let path = folder.join("state.json");
    let state: State = read_json(&path)?;
    if state.indices.is_some_and(|indices| indices.as_array().is_some_and(|list| !list.is_empty())) {
        return Err(DataError::broken(
            path,
            "it has an index of rows, as old versions of `datasets` wrote; save it again",
        ));
    }
    if let Some(bad) = state.data_files.iter().find(|file| !files::is_inside(&file.filename)) {
        return Err(DataError::broken(path, format!("`{}` leads out of the folder", bad.filename)));
    }
    Ok((state.split, state.data_files.into_iter().map(|file| format!("{prefix}{}", file.filename)).collect()))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, DataError> {
    serde_json::from_str(&read_description(path)?).map_err(|error| DataError::Broken {
        path: path.to_owned(),
        line: Some(error.line() as u64),
        detail: error.to_string(),
    })
}

pub(super) fn read_description(path: &Path) -> Result<String, DataError> {
    let size_bytes = std::fs::metadata(path).map_err(DataError::io("read", path))?.len();
    if size_bytes > DESCRIPTION_BYTES_MAX {
        return Err(DataError::TooLarge {
            what: format!("`{}`", path.display()),
            size: format!("{size_bytes} bytes"),
            limit: format!("{DESCRIPTION_BYTES_MAX} bytes"),
        });
    }
    let bytes = std::fs::read(path).map_err(DataError::io("read", path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Adds all files below `folder` to `found`, as paths with `/` that start with `prefix`.
pub(super) fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) -> Result<(), DataError> {
    const DEPTH_MAX: usize = 16;
    for entry in std::fs::read_dir(folder).map_err(DataError::io("list", folder))? {
        let entry = entry.map_err(DataError::io("list", folder))?;
        // A name that is not UTF-8 cannot be written in a config either.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = format!("{prefix}{name}");
        if entry.path().is_dir() {
            if !name.starts_with('.') && path.matches('/').count() < DEPTH_MAX {
                walk(&entry.path(), &format!("{path}/"), found)?;
            }
        } else {
            found.push(path);
        }
        if found.len() > ENTRIES_MAX {
            return Err(DataError::TooLarge {
                what: format!("the number of files below `{}`", folder.display()),
                size: format!("over {ENTRIES_MAX}"),
                limit: ENTRIES_MAX.to_string(),
            });
        }
    }
    Ok(())
}
