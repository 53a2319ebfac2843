//! A dataset as a table of rows, wherever it lies.

mod arrow_file;
mod card;
mod files;
mod hub;
mod json_file;
mod locate;
mod parquet_file;
mod rows;
mod split;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use hub::HubOptions;
pub(crate) use hub::is_hub_id;
pub use split::{TestSize, TestSplit, split_test};

use crate::error::DataError;

/// One row: column name to value. Lists, structs, maps, timestamps and decimals are JSON as Arrow's own writer has them:
/// times as ISO 8601 texts, binary as hexadecimal, decimals as numbers, NaN and infinity as null.
pub type Row = serde_json::Map<String, serde_json::Value>;

/// Which rows are wanted: `[train.train_policy] dataset.*` or `validation.dataset.*` of a config.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// A file (parquet, Arrow, JSONL, JSON), a folder of those, a `save_to_disk` folder, or a hub id.
    pub name: String,
    /// The subset (configuration) of a dataset that has several, empty for the usual one.
    #[serde(default)]
    pub subset: String,
    /// Branch, tag or commit on the hub, empty for `main`.
    #[serde(default)]
    pub revision: String,
    /// Splits, concatenated in this order; each may be cut as in `train[:10%]`. None, or only empty ones: the only split
    /// there is.
    #[serde(default)]
    pub splits: Vec<String>,
    /// A folder that has the dataset on disk, empty for none. It wins over `name`, which may then name a folder in it.
    #[serde(default)]
    pub local_dir: String,
}

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnInfo {
    /// Its name.
    pub name: String,
    /// Its type: Arrow's name for it (`Utf8`, `Int64`, `List(…)`), in JSON files `string`, `number` and so on.
    pub kind: String,
}

/// One file of a table.
pub(crate) trait Source: Send + Sync + std::fmt::Debug {
    /// Number of rows.
    fn len(&self) -> u64;
    /// All columns.
    fn columns(&self) -> &[ColumnInfo];
    /// Rows `start..start + count`, which exist, with exactly the columns named.
    fn rows(&self, start: u64, count: u64, columns: &[&str]) -> Result<Vec<Row>, DataError>;
}

/// Rows of one or more files, read when they are asked for.
#[derive(Debug, Clone)]
pub struct Table {
    parts: Arc<[Part]>,
    columns: Arc<[ColumnInfo]>,
    place: Arc<str>,
}

/// The rows `start..start + len` of a file; they are rows `end - len..end` of the table.
#[derive(Debug)]
struct Part {
    source: Arc<dyn Source>,
    start: u64,
    len: u64,
    end: u64,
}

impl Table {
    /// Finds the dataset, downloads what is missing, and opens it. Files are mapped into memory; only JSON is read whole
    /// here, to know that every line is sound.
    ///
    /// # Errors
    /// Whatever [`DataError`] says about places, names, broken files and the hub; [`DataError::Empty`] for no rows.
    pub fn open(spec: &DatasetSpec, hub: &HubOptions) -> Result<Self, DataError> {
        let found = locate::locate(spec, hub)?;
        let cache = Arc::new(parquet_file::ColumnCache::default());
        let mut parts = Vec::new();
        let mut columns: Vec<ColumnInfo> = Vec::new();
        let mut end = 0;
        for chosen in &found.chosen {
            let sources = chosen.files.iter().map(|path| open_file(path, &cache)).collect::<Result<Vec<_>, _>>()?;
            let total = sources.iter().map(|source| source.len()).sum();
            let cut = chosen.cut.range(total);
            let mut first = 0;
            for (source, path) in sources.into_iter().zip(&chosen.files) {
                merge_columns(&mut columns, source.as_ref(), path)?;
                let (from, to) = (cut.start.max(first), cut.end.min(first + source.len()));
                first += source.len();
                if from < to {
                    end += to - from;
                    let start = from - (first - source.len());
                    parts.push(Part { source, start, len: to - from, end });
                }
            }
        }
        if parts.is_empty() {
            return Err(DataError::Empty { place: found.place });
        }
        Ok(Self { parts: parts.into(), columns: columns.into(), place: found.place.into() })
    }

    /// Number of rows, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// The columns, in the order of the first file.
    pub fn columns(&self) -> &[ColumnInfo] {
        &self.columns
    }

    /// What it is, for messages: name, subset and splits.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Fails unless every one of `columns` exists, so that a run can say so before it starts.
    ///
    /// # Errors
    /// [`DataError::MissingColumn`] names the first missing one and those there are.
    pub fn require_columns(&self, columns: &[&str]) -> Result<(), DataError> {
        match columns.iter().find(|wanted| !self.columns.iter().any(|column| column.name == **wanted)) {
            None => Ok(()),
            Some(column) => Err(DataError::MissingColumn {
                place: self.place.to_string(),
                column: (*column).to_owned(),
                known: self.columns.iter().map(|column| column.name.clone()).collect(),
            }),
        }
    }

    /// Rows `start..start + count` with the given columns, all of them when `columns` is empty.
    ///
    /// # Errors
    /// [`DataError::NoSuchRow`], [`DataError::MissingColumn`], [`DataError::Broken`] or [`DataError::Io`].
    pub fn rows(&self, start: u64, count: u64, columns: &[&str]) -> Result<Vec<Row>, DataError> {
        if count > 0 {
            self.require_row(start.saturating_add(count - 1))?;
        }
        self.require_columns(columns)?;
        let mut rows = Vec::new();
        self.append(&mut rows, start, count, &self.wanted(columns))?;
        Ok(rows)
    }

    /// The rows with the given numbers, in the order given; a row may be asked for twice. Columns as in [`Table::rows`].
    ///
    /// # Errors
    /// As [`Table::rows`].
    pub fn rows_at(&self, indices: &[u64], columns: &[&str]) -> Result<Vec<Row>, DataError> {
        indices.iter().try_for_each(|row| self.require_row(*row))?;
        self.require_columns(columns)?;
        let wanted = self.wanted(columns);
        let mut rows = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while let Some(first) = rest.first() {
            // Neighbours are read together.
            let run = rest.iter().zip(*first..).take_while(|(row, expected)| *row == expected).count();
            self.append(&mut rows, *first, run as u64, &wanted)?;
            rest = &rest[run..];
        }
        Ok(rows)
    }

    fn require_row(&self, row: u64) -> Result<(), DataError> {
        if row < self.len() {
            return Ok(());
        }
        Err(DataError::NoSuchRow { place: self.place.to_string(), row, len: self.len() })
    }

    fn wanted<'a>(&'a self, columns: &[&'a str]) -> Vec<&'a str> {
        if columns.is_empty() { self.columns.iter().map(|c| c.name.as_str()).collect() } else { columns.to_vec() }
    }

    fn append(&self, rows: &mut Vec<Row>, mut start: u64, mut count: u64, columns: &[&str]) -> Result<(), DataError> {
        let mut part = self.parts.partition_point(|part| part.end <= start);
        while count > 0 {
            let Part { source, start: first, len, end } = &self.parts[part];
            let take = count.min(end - start);
            rows.extend(source.rows(first + (start - (end - len)), take, columns)?);
            start += take;
            count -= take;
            part += 1;
        }
        Ok(())
    }
}

fn open_file(path: &Path, cache: &Arc<parquet_file::ColumnCache>) -> Result<Arc<dyn Source>, DataError> {
    Ok(match files::Format::of(path) {
        Some(files::Format::Parquet) => Arc::new(parquet_file::ParquetFile::open(path, cache.clone())?),
        Some(files::Format::Arrow) => Arc::new(arrow_file::ArrowFile::open(path)?),
        Some(files::Format::JsonLines | files::Format::Json) => json_file::open(path)?,
        None => return Err(DataError::UnknownFormat { path: path.to_owned() }),
    })
}

/// Typed files must agree on their columns. JSON files need not: an absent key is null.
fn merge_columns(columns: &mut Vec<ColumnInfo>, source: &dyn Source, path: &Path) -> Result<(), DataError> {
    let typed = matches!(files::Format::of(path), Some(files::Format::Parquet | files::Format::Arrow));
    let names = |columns: &[ColumnInfo]| {
        let mut names: Vec<_> = columns.iter().map(|column| column.name.clone()).collect();
        names.sort();
        names
    };
    if typed && !columns.is_empty() && names(columns) != names(source.columns()) {
        let (columns, expected) = (names(source.columns()), names(columns));
        return Err(DataError::ColumnsDiffer { path: path.to_owned(), columns, expected });
    }
    for column in source.columns() {
        match columns.iter_mut().find(|known| known.name == column.name) {
            None => columns.push(column.clone()),
            Some(known) if known.kind == "null" => known.kind.clone_from(&column.kind),
            Some(_) => {}
        }
    }
    Ok(())
}
