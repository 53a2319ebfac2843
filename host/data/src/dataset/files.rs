//! Which files make up which split, by the conventions of Hugging Face datasets.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use super::card::{self, Config};
use crate::error::DataError;

/// The formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Format {
    Parquet,
    Arrow,
    JsonLines,
    Json,
}

impl Format {
    /// By the ending of the name.
    pub fn of(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        Some(match ending.as_str() {
            "parquet" => Self::Parquet,
            "arrow" | "feather" => Self::Arrow,
            "jsonl" | "ndjson" => Self::JsonLines,
            "json" => Self::Json,
            _ => return None,
        })
    }
}

/// Splits in order, each with its files (paths within the folder or repository, with `/`).
pub(super) type Splits = Vec<(String, Vec<String>)>;

/// Splits with the words in folder and file names that tell them.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// JSON files that describe a dataset and are none.
const DESCRIPTIONS: [&str; 6] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "croissant.json"];

/// Finds the splits of `subset` among `files`. `card` is the text of `README.md`; `place` is for messages.
pub(super) fn resolve(files: &[String], card: Option<&str>, subset: &str, place: &str) -> Result<Splits, DataError> {
    let mut files: Vec<&str> = files.iter().map(String::as_str).filter(|file| is_visible(file)).collect();
    files.sort_unstable();
    let data: Vec<&str> = files.iter().copied().filter(|file| is_data(file)).collect();
    let no_data = || DataError::NoDataFiles {
        place: place.to_owned(),
        found: files.iter().map(|file| (*file).to_owned()).collect(),
    };
    let configs = card
        .map(card::configs)
        .transpose()
        .map_err(|detail| DataError::broken(format!("{place}: README.md"), detail))?;
    let configs = configs.unwrap_or_default();
    let splits = match choose(&configs, subset, place)? {
        Some(config) => {
            let data = within(&data, config.data_dir.trim_matches('/'));
            if config.data_files.is_empty() { infer(&data) } else { by_patterns(&data, config) }
        }
        None if subset.is_empty() => infer(&data),
        None => {
            let data_of_subset = within(&data, subset);
            if data_of_subset.is_empty() && !data.is_empty() {
                let known = subset_folders(&data);
                return Err(DataError::MissingSubset { place: place.to_owned(), subset: subset.to_owned(), known });
            }
            infer(&data_of_subset)
        }
    };
    if splits.is_empty() { Err(no_data()) } else { Ok(splits) }
}

/// The configuration that is meant, `None` when the card has none at all.
fn choose<'a>(configs: &'a [Config], subset: &str, place: &str) -> Result<Option<&'a Config>, DataError> {
    if configs.is_empty() {
        return Ok(None);
    }
    let chosen = if subset.is_empty() {
        let default = configs.iter().find(|c| c.default).or_else(|| configs.iter().find(|c| c.name == "default"));
        default.or(if configs.len() == 1 { configs.first() } else { None })
    } else {
        configs.iter().find(|config| config.name == subset)
    };
    match chosen {
        Some(config) => Ok(Some(config)),
        None => Err(DataError::MissingSubset {
            place: place.to_owned(),
            subset: subset.to_owned(),
            known: configs.iter().map(|config| config.name.clone()).collect(),
        }),
    }
}

fn by_patterns(data: &[&str], config: &Config) -> Splits {
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
    let prefix = config.data_dir.trim_matches('/');
    let mut splits: Splits = Vec::new();
    for (split, patterns) in &config.data_files {
        let mut matched: Vec<String> = Vec::new();
        for pattern in patterns {
            let pattern = pattern.trim_start_matches("./");
            let full = if prefix.is_empty() { pattern.to_owned() } else { format!("{prefix}/{pattern}") };
            let Ok(glob) = glob::Pattern::new(&full) else { continue };
            let hits = data.iter().filter(|file| **file == full || glob.matches_with(file, options));
            matched.extend(hits.map(|file| (*file).to_owned()));
        }
        let mut seen = std::collections::HashSet::new();
        matched.retain(|file| seen.insert(file.clone()));
        match splits.iter_mut().find(|(known, _)| known == split) {
            _ if matched.is_empty() => {}
            Some((_, files)) => files.extend(matched),
            None => splits.push((split.clone(), matched)),
        }
    }
    splits
}

/// Splits by names alone: first shards (`train-00000-of-00002`), then folders, then words in file names; else all files
/// are `train`.
fn infer(data: &[&str]) -> Splits {
    let data = one_format(data);
    let mut sharded: Splits = Vec::new();
    for file in &data {
        if let Some((split, _, _)) = shard(file_name(file)) {
            add(&mut sharded, split, file);
        }
    }
    if !sharded.is_empty() {
        return in_usual_order(sharded);
    }
    let mut by_folder: Splits = Vec::new();
    let mut by_name: Splits = Vec::new();
    for file in &data {
        let mut folders: Vec<&str> = file.split('/').collect();
        let name = folders.pop().unwrap_or_default();
        if let Some(split) = folders.iter().rev().find_map(|folder| keyword(folder)) {
            add(&mut by_folder, split, file);
        }
        if let Some(split) = keyword(name.rsplit_once('.').map_or(name, |(stem, _)| stem)) {
            add(&mut by_name, split, file);
        }
    }
    if !by_folder.is_empty() {
        return in_usual_order(by_folder);
    }
    if !by_name.is_empty() {
        return in_usual_order(by_name);
    }
    if data.is_empty() { Vec::new() } else { vec![("train".into(), data.iter().map(|f| (*f).to_owned()).collect())] }
}

/// The split that a file's or folder's name tells: a keyword that stands by itself in it.
pub(super) fn keyword(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let words: Vec<&str> = name.split(|c: char| matches!(c, '-' | '.' | '_' | ' ') || c.is_ascii_digit()).collect();
    KEYWORDS.iter().find(|(_, keys)| keys.iter().any(|key| words.contains(key))).map(|(split, _)| *split)
}

/// `train-00003-of-00010-hash.parquet` is shard 3 of 10 of `train`.
fn shard(name: &str) -> Option<(&str, u32, u32)> {
    let digits = |text: &str| -> Option<u32> {
        let number = text.get(..5).filter(|number| number.bytes().all(|b| b.is_ascii_digit()))?;
        number.parse().ok()
    };
    let (before, after) = name.split_once("-of-")?;
    let (split, number) = before.rsplit_once('-')?;
    (number.len() == 5 && !split.is_empty()).then_some(())?;
    Some((split, digits(number)?, digits(after)?))
}

/// Fails when some shards of a file are there and others are not.
pub(super) fn check_shards(files: &[String], place: &str) -> Result<(), DataError> {
    let mut groups: BTreeMap<(String, u32), Vec<u32>> = BTreeMap::new();
    for file in files {
        if let Some((split, number, count)) = shard(file_name(file)) {
            let folder = &file[..file.len() - file_name(file).len()];
            groups.entry((format!("{folder}{split}"), count)).or_default().push(number);
        }
    }
    for ((name, count), numbers) in groups {
        if let Some(missing) = (0..count).find(|number| !numbers.contains(number)) {
            let missing = format!("{name}-{missing:05}-of-{count:05}");
            return Err(DataError::MissingShard { place: place.to_owned(), missing });
        }
    }
    Ok(())
}

/// A folder may hold the same data in several formats: the one with the most files is read.
fn one_format<'a>(data: &[&'a str]) -> Vec<&'a str> {
    let mut counts: BTreeMap<Format, usize> = BTreeMap::new();
    for format in data.iter().filter_map(|file| Format::of(Path::new(file))) {
        *counts.entry(format).or_default() += 1;
    }
    // The first of equals: parquet before Arrow before JSON.
    let most =
        counts.iter().max_by_key(|(format, count)| (**count, std::cmp::Reverse(**format))).map(|(format, _)| *format);
    data.iter().copied().filter(|file| Format::of(Path::new(file)) == most).collect()
}

fn within<'a>(data: &[&'a str], folder: &str) -> Vec<&'a str> {
    if folder.is_empty() || folder == "." {
        return data.to_vec();
    }
    let inside = |file: &str, folder: &str| file.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let direct: Vec<&str> = data.iter().copied().filter(|file| inside(file, folder)).collect();
    if !direct.is_empty() {
        return direct;
    }
    let under_data = format!("data/{folder}");
    data.iter().copied().filter(|file| inside(file, &under_data)).collect()
}

/// Folders that could be meant by a subset.
fn subset_folders(data: &[&str]) -> Vec<String> {
    let mut folders: Vec<String> = data
        .iter()
        .filter_map(|file| file.strip_prefix("data/").unwrap_or(file).split_once('/'))
        .map(|(f, _)| f.to_owned())
        .collect();
    folders.dedup();
    folders
}

fn add(splits: &mut Splits, split: &str, file: &str) {
    match splits.iter_mut().find(|(known, _)| known == split) {
        Some((_, files)) => files.push(file.to_owned()),
        None => splits.push((split.to_owned(), vec![file.to_owned()])),
    }
}

/// Train, validation, test, then others as they came.
fn in_usual_order(mut splits: Splits) -> Splits {
    splits.sort_by_key(|(split, _)| KEYWORDS.iter().position(|(known, _)| known == split).unwrap_or(KEYWORDS.len()));
    splits
}

fn file_name(file: &str) -> &str {
    file.rsplit_once('/').map_or(file, |(_, name)| name)
}

/// Hidden files and folders are not data, nor is anything that would lead out of the folder.
fn is_visible(file: &str) -> bool {
    is_inside(file) && file.split('/').all(|part| !part.starts_with('.') && !part.starts_with("__"))
}

/// A relative path that stays below where it starts.
pub(super) fn is_inside(file: &str) -> bool {
    !file.is_empty()
        && !file.contains(['\\', '\0'])
        && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)))
}

fn is_data(file: &str) -> bool {
    Format::of(Path::new(file)).is_some() && !DESCRIPTIONS.contains(&file_name(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splits(files: &[&str], card: Option<&str>, subset: &str) -> Result<Vec<(String, usize)>, DataError> {
        let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
        resolve(&files, card, subset, "`x`").map(|s| s.into_iter().map(|(split, files)| (split, files.len())).collect())
    }

    fn owned(splits: &[(&str, usize)]) -> Vec<(String, usize)> {
        splits.iter().map(|(s, n)| ((*s).to_owned(), *n)).collect()
    }

    #[test]
    fn conventions() {
        let cases: &[(&[&str], &[(&str, usize)])] = &[
            (
                &[
                    "data/train-00000-of-00002.parquet",
                    "data/train-00001-of-00002-ab12.parquet",
                    "data/test-00000-of-00001.parquet",
                ],
                &[("train", 2), ("test", 1)],
            ),
            (&["train.jsonl", "dev.jsonl", "README.md"], &[("train", 1), ("validation", 1)]),
            (&["my_test_file.jsonl", "my-training.jsonl"], &[("train", 1), ("test", 1)]),
            (&["test/a.parquet", "train/a.parquet", "train/b.parquet"], &[("train", 2), ("test", 1)]),
            (&["a.jsonl", "b.jsonl", "dataset_info.json"], &[("train", 2)]),
            (&["latest.jsonl"], &[("train", 1)]),
            (&["a.parquet", "a.jsonl"], &[("train", 1)]),
            (&[".cache/train.jsonl", "../train.jsonl", "x.jsonl"], &[("train", 1)]),
            (&["default/partial-train/0000.parquet"], &[("train", 1)]),
            (&["extra-00000-of-00001.parquet"], &[("extra", 1)]),
        ];
        for (files, expected) in cases {
            assert_eq!(splits(files, None, "").unwrap(), owned(expected), "{files:?}");
        }
    }

    #[test]
    fn subsets_by_folder() {
        let files = [
            "main/train-00000-of-00001.parquet",
            "main/test-00000-of-00001.parquet",
            "socratic/train-00000-of-00001.parquet",
        ];
        assert_eq!(splits(&files, None, "main").unwrap(), owned(&[("train", 1), ("test", 1)]));
        let error = splits(&files, None, "mian").unwrap_err();
        assert_eq!(error.to_string(), "`x` has no subset `mian`; it has `main`, `socratic`");
    }

    #[test]
    fn card_decides() {
        let card = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/tr*\n  - split: test\n    path: [\"main/te*.parquet\"]\n- config_name: all\n  data_files: '**/*.parquet'\n---\n# Title";
        let files = ["main/tr.parquet", "main/te.parquet", "other/x.parquet"];
        assert_eq!(splits(&files, Some(card), "main").unwrap(), owned(&[("train", 1), ("test", 1)]));
        assert_eq!(splits(&files, Some(card), "all").unwrap(), owned(&[("train", 3)]));
        assert!(
            matches!(splits(&files, Some(card), ""), Err(DataError::MissingSubset { known, .. }) if known == ["main", "all"])
        );
    }

    #[test]
    fn nothing_to_read() {
        let error = splits(&["load.py", "data.csv"], None, "").unwrap_err();
        assert_eq!(error.to_string(), "`x` has no parquet, Arrow or JSON data file; it has `data.csv`, `load.py`");
        assert!(error.hint().unwrap().contains("refs/convert/parquet"));
    }

    #[test]
    fn missing_shards() {
        let files = ["data/train-00000-of-00003.parquet".to_owned(), "data/train-00002-of-00003.parquet".to_owned()];
        let error = check_shards(&files, "`x`").unwrap_err();
        assert!(error.to_string().contains("`data/train-00001-of-00003`"), "{error}");
    }
}
