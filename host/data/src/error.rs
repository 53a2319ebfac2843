//! What can go wrong with data, tokenizers and templates.

use std::path::PathBuf;

/// An error of this crate. [`DataError::hint`] says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder cannot be read or written.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`, `list` or `map`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// `dataset.name` is neither something on disk nor a hub id.
    #[error("dataset `{name}` is neither a file or folder here nor a hub id")]
    NoSuchDataset {
        /// The name as given.
        name: String,
    },
    /// A folder or repository without a file that can be read.
    #[error("{place} has no parquet, Arrow or JSON data file{}", found_list(found))]
    NoDataFiles {
        /// The folder or repository.
        place: String,
        /// Files that are there.
        found: Vec<String>,
    },
    /// A file in a format that is not read.
    #[error("`{}` has a format that is not read", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A file that is damaged, truncated or not what its name says.
    #[error("`{}`{} is broken: {detail}", path.display(), at_line(*line))]
    Broken {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1, in a text file.
        line: Option<u64>,
        /// What is wrong.
        detail: String,
    },
    /// Some shards of a dataset are there and others are not.
    #[error("{place} lacks `{missing}`, of which other shards are there")]
    MissingShard {
        /// The folder or repository.
        place: String,
        /// The shard's file name, or its part that tells it.
        missing: String,
    },
    /// The files of one table have different columns.
    #[error("`{}` has the columns {}, but the files before it have {}", path.display(), list(columns), list(expected))]
    ColumnsDiffer {
        /// The file.
        path: PathBuf,
        /// Its columns.
        columns: Vec<String>,
        /// The columns of the files before it.
        expected: Vec<String>,
    },
    /// A column that the dataset does not have.
    #[error("{place} has no column `{column}`; it has {}", list(known))]
    MissingColumn {
        /// The dataset.
        place: String,
        /// The column asked for.
        column: String,
        /// The columns that are there.
        known: Vec<String>,
    },
    /// A split that the dataset does not have.
    #[error("{place} has no split `{split}`; it has {}", list(known))]
    MissingSplit {
        /// The dataset.
        place: String,
        /// The split asked for.
        split: String,
        /// The splits that are there.
        known: Vec<String>,
    },
    /// No split was named and the dataset has several.
    #[error("{place} has the splits {} and none was chosen", list(known))]
    SplitNeeded {
        /// The dataset.
        place: String,
        /// The splits that are there.
        known: Vec<String>,
    },
    /// A subset that the dataset does not have.
    #[error("{place} has no subset `{subset}`; it has {}", list(known))]
    MissingSubset {
        /// The dataset.
        place: String,
        /// The subset asked for, empty for none.
        subset: String,
        /// The subsets that are there.
        known: Vec<String>,
    },
    /// A split expression that cannot be understood.
    #[error("split `{split}` is not understood: {detail}")]
    BadSplit {
        /// The expression.
        split: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A dataset, or the part of it that was asked for, without a row.
    #[error("{place} is empty")]
    Empty {
        /// The dataset and split.
        place: String,
    },
    /// Rows beyond the end.
    #[error("row {row} of {place} does not exist: it has {len} rows")]
    NoSuchRow {
        /// The dataset.
        place: String,
        /// The row asked for, counted from 0.
        row: u64,
        /// How many there are.
        len: u64,
    },
    /// `test_size` makes no sense.
    #[error("`test_size` = {value} {detail}")]
    BadTestSize {
        /// The value.
        value: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Not on disk, and the network may not be used.
    #[error("dataset `{name}`{} is not in the cache `{}`, and offline mode is on", file.as_ref().map(|f| format!(" file `{f}`")).unwrap_or_default(), cache.display())]
    Offline {
        /// The hub id.
        name: String,
        /// The file, when others of the dataset are cached.
        file: Option<String>,
        /// The cache folder.
        cache: PathBuf,
    },
    /// The hub refused.
    #[error("the hub answered {status} for `{url}`")]
    HubStatus {
        /// HTTP status.
        status: u16,
        /// What was asked for.
        url: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The hub cannot be reached, or breaks off.
    #[error("`{url}` cannot be downloaded: {detail}")]
    Hub {
        /// What was asked for.
        url: String,
        /// What went wrong.
        detail: String,
    },
    /// Larger than the limit.
    #[error("{what} is {size}, more than the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size, with unit.
        size: String,
        /// The limit, with unit.
        limit: String,
    },
    /// A tokenizer that is missing or cannot be used.
    #[error("tokenizer `{}`: {detail}", path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// No chat template where one is needed.
    #[error("`{}` has no chat template{}", path.display(), found_list(found))]
    NoTemplate {
        /// The folder or file.
        path: PathBuf,
        /// The named templates that are there instead.
        found: Vec<String>,
    },
    /// A chat template that does not parse or fails for these messages.
    #[error("chat template `{name}`{}: {detail}", at_line(*line))]
    Template {
        /// The file that the template came from.
        name: String,
        /// Line in the template, counted from 1.
        line: Option<u64>,
        /// What is wrong.
        detail: String,
    },
}

impl DataError {
    /// What to do about the error, where there is more to say than the error itself does.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NoSuchDataset { name } if looks_like_id(name) => return None,
            Self::NoSuchDataset { .. } => {
                "give an existing file or folder, or a hub id as `owner/name`; relative paths start at the working folder".into()
            }
            Self::NoDataFiles { found, .. } if found.iter().any(|f| f.ends_with(".py")) => {
                "it is loaded by a Python script, which is never run here; the hub's own parquet copy may exist: set `dataset.revision = \"refs/convert/parquet\"`".into()
            }
            Self::NoDataFiles { .. } | Self::UnknownFormat { .. } => {
                "convert it to parquet or JSONL (one JSON object a line), or save it with `datasets.save_to_disk`".into()
            }
            Self::Broken { .. } => "fetch or write the file again; its end may be missing".into(),
            Self::MissingShard { .. } => "fetch the dataset again, all of its files".into(),
            Self::ColumnsDiffer { .. } => "keep files of different tables in different folders".into(),
            Self::MissingColumn { .. } => "name one of these columns in the config or in the plugin's settings".into(),
            Self::MissingSplit { .. } | Self::SplitNeeded { .. } => "set `dataset.split` to one of these".into(),
            Self::MissingSubset { .. } => "set `dataset.subset` to one of these".into(),
            Self::BadSplit { .. } => "write it as `train`, `train[:1000]`, `train[10%:20%]` or `train+test`".into(),
            Self::BadTestSize { .. } => "use a ratio from 0.0 to 1.0, or a whole number of rows".into(),
            Self::Offline { .. } => "unset `HF_HUB_OFFLINE` to download it, or set `HF_HOME` or `HF_HUB_CACHE` to a cache that has it".into(),
            Self::HubStatus { status: 401 | 403, with_token: false, .. } => {
                "the dataset is private, gated or misspelt: check the name, and set `HF_TOKEN` to a token that may read it".into()
            }
            Self::HubStatus { status: 401 | 403, .. } => {
                "the token in `HF_TOKEN` may not read it: check the token, accept the dataset's terms on the hub, and check the name".into()
            }
            Self::HubStatus { status: 404, .. } => {
                "check `dataset.name` and `dataset.revision`; for a private dataset set `HF_TOKEN`".into()
            }
            Self::HubStatus { .. } => "try again later, or set `HF_ENDPOINT` to a mirror".into(),
            Self::Hub { .. } => "check the network and `HF_ENDPOINT`; a download goes on where it broke off".into(),
            Self::TooLarge { .. } => "choose a smaller subset or split, or raise the limit".into(),
            Self::Tokenizer { .. } => "`tokenizer.json` must be the file that `save_pretrained` of a fast tokenizer writes".into(),
            Self::NoTemplate { .. } => {
                "put `chat_template.jinja` beside the tokenizer, or use prompts that need no template".into()
            }
            Self::Template { .. } | Self::Io { .. } | Self::Empty { .. } | Self::NoSuchRow { .. } => return None,
        };
        Some(text)
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn broken(path: impl Into<PathBuf>, detail: impl Into<String>) -> Self {
        Self::Broken { path: path.into(), line: None, detail: detail.into() }
    }
}

fn looks_like_id(name: &str) -> bool {
    crate::dataset::is_hub_id(name)
}

fn at_line(line: Option<u64>) -> String {
    line.map(|line| format!(" line {line}")).unwrap_or_default()
}

/// The names in backticks, at most twenty of them.
fn list(names: &[String]) -> String {
    const SHOWN_MAX: usize = 20;
    if names.is_empty() {
        return "none".into();
    }
    let mut text = names.iter().take(SHOWN_MAX).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN_MAX {
        text.push_str(&format!(" and {} more", names.len() - SHOWN_MAX));
    }
    text
}

fn found_list(found: &[String]) -> String {
    if found.is_empty() { String::new() } else { format!("; it has {}", list(found)) }
}
