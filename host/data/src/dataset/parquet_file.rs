//! Parquet files: mapped, decoded a column of a row group at a time, and kept while there is room.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arrow::array::{Array, ArrayRef};
use arrow::datatypes::{Field, Schema};
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use super::{ColumnInfo, Row, Source, rows};
use crate::error::DataError;
use crate::guard::guarded;

/// Decoded bytes that a table keeps. A shuffled order touches every row group all the time, so what does not fit is
/// decoded again and again; most datasets of prompts fit.
const CACHE_BYTES_MAX: usize = 2 << 30;
/// Rows decoded into one array.
const CHUNK_ROWS: usize = 8192;

/// Decoded columns of all parquet files of a table, the least recently used thrown out first.
#[derive(Debug, Default)]
pub(super) struct ColumnCache {
    state: Mutex<CacheState>,
    files: AtomicU64,
}

#[derive(Debug, Default)]
struct CacheState {
    entries: HashMap<Key, Entry>,
    bytes: usize,
    clock: u64,
}

/// File, row group, column.
type Key = (u64, usize, usize);

#[derive(Debug)]
struct Entry {
    column: Chunks,
    bytes: usize,
    used: u64,
}

/// A column of a row group, in arrays of [`CHUNK_ROWS`] rows, the last one shorter.
type Chunks = Arc<[ArrayRef]>;

impl ColumnCache {
    fn get(&self, key: Key) -> Option<Chunks> {
        let mut state = self.state.lock().ok()?;
        state.clock += 1;
        let clock = state.clock;
        let entry = state.entries.get_mut(&key)?;
        entry.used = clock;
        Some(entry.column.clone())
    }

    fn put(&self, key: Key, column: &Chunks) {
        let bytes = column.iter().map(|chunk| chunk.get_array_memory_size()).sum();
        let Ok(mut state) = self.state.lock() else { return };
        if bytes > CACHE_BYTES_MAX || state.entries.contains_key(&key) {
            return;
        }
        while state.bytes + bytes > CACHE_BYTES_MAX {
            let Some(oldest) = state.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key) else {
                break;
            };
            let freed = state.entries.remove(&oldest).map_or(0, |entry| entry.bytes);
            state.bytes -= freed;
        }
        state.clock += 1;
        state.bytes += bytes;
        let used = state.clock;
        state.entries.insert(key, Entry { column: column.clone(), bytes, used });
    }
}

/// A parquet file. Only its footer is read when it is opened.
#[derive(Debug)]
pub(super) struct ParquetFile {
    path: PathBuf,
    bytes: Bytes,
    metadata: ArrowReaderMetadata,
    columns: Vec<ColumnInfo>,
    /// One past the last row of every row group.
    group_ends: Vec<u64>,
    cache: Arc<ColumnCache>,
    number: u64,
}

impl ParquetFile {
    pub fn open(path: &Path, cache: Arc<ColumnCache>) -> Result<Self, DataError> {
        let bytes = rows::map(path)?;
        let metadata = guarded(|| ArrowReaderMetadata::load(&bytes, ArrowReaderOptions::new()))
            .map_err(|detail| DataError::broken(path, detail))?;
        let mut group_ends = Vec::new();
        let mut end = 0_u64;
        for group in metadata.metadata().row_groups() {
            let rows = u64::try_from(group.num_rows()).ok().and_then(|rows| end.checked_add(rows));
            end = rows.ok_or_else(|| DataError::broken(path, "a row group has a negative number of rows"))?;
            group_ends.push(end);
        }
        let columns = rows::columns(metadata.schema());
        let number = cache.files.fetch_add(1, Ordering::Relaxed);
        Ok(Self { path: path.to_owned(), bytes, metadata, columns, group_ends, cache, number })
    }

    fn group_rows(&self, group: usize) -> u64 {
        self.group_ends[group] - group.checked_sub(1).map_or(0, |before| self.group_ends[before])
    }

    fn column(&self, group: usize, column: usize) -> Result<Chunks, DataError> {
        let key = (self.number, group, column);
        if let Some(chunks) = self.cache.get(key) {
            return Ok(chunks);
        }
        let name = &self.columns[column].name;
        let broken =
            |detail: String| DataError::broken(&self.path, format!("column `{name}`, row group {group}: {detail}"));
        let chunks: Chunks = guarded(|| self.decode(group, column)).map_err(broken)?.into();
        let rows: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let even = chunks.iter().rev().skip(1).all(|chunk| chunk.len() == CHUNK_ROWS);
        if rows as u64 != self.group_rows(group) || !even {
            return Err(broken(format!("it says {} rows and has {rows}", self.group_rows(group))));
        }
        self.cache.put(key, &chunks);
        Ok(chunks)
    }

    fn decode(&self, group: usize, column: usize) -> Result<Vec<ArrayRef>, String> {
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), [column]);
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(self.bytes.clone(), self.metadata.clone())
            .with_row_groups(vec![group])
            .with_projection(mask)
            .with_batch_size(CHUNK_ROWS)
            .build()
            .map_err(|e| e.to_string())?;
        let mut chunks = Vec::new();
        for batch in reader {
            let batch = batch.map_err(|e| e.to_string())?;
            chunks.push(batch.columns().first().ok_or("it is not there")?.clone());
        }
        Ok(chunks)
    }

    /// Rows of one row group that lie in one chunk.
    fn chunk_rows(&self, group: usize, offset: u64, count: u64, wanted: &[usize]) -> Result<Vec<Row>, DataError> {
        let (chunk, first) = ((offset / CHUNK_ROWS as u64) as usize, (offset % CHUNK_ROWS as u64) as usize);
        let mut fields = Vec::new();
        let mut arrays = Vec::new();
        for column in wanted {
            let chunks = self.column(group, *column)?;
            let array = chunks.get(chunk).filter(|array| first + count as usize <= array.len());
            let array = array.ok_or_else(|| DataError::broken(&self.path, "rows are missing"))?;
            fields.push(Field::new(&self.columns[*column].name, array.data_type().clone(), true));
            arrays.push(array.slice(first, count as usize));
        }
        let options = RecordBatchOptions::new().with_row_count(Some(count as usize));
        let batch = RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), arrays, &options);
        rows::to_rows(&batch.map_err(|e| DataError::broken(&self.path, e.to_string()))?, &self.path)
    }
}

impl Source for ParquetFile {
    fn len(&self) -> u64 {
        self.group_ends.last().copied().unwrap_or(0)
    }

    fn columns(&self) -> &[ColumnInfo] {
        &self.columns
    }

    fn rows(&self, mut start: u64, mut count: u64, columns: &[&str]) -> Result<Vec<Row>, DataError> {
        let position = |name: &&str| self.columns.iter().position(|column| column.name == **name);
        let wanted: Vec<usize> = columns.iter().filter_map(position).collect();
        let mut found = Vec::new();
        while count > 0 {
            let group = self.group_ends.partition_point(|end| *end <= start);
            let end = self.group_ends.get(group).ok_or_else(|| DataError::broken(&self.path, "rows are missing"))?;
            let offset = start - (end - self.group_rows(group));
            let in_chunk = CHUNK_ROWS as u64 - offset % CHUNK_ROWS as u64;
            let take = count.min(end - start).min(in_chunk);
            found.extend(self.chunk_rows(group, offset, take, &wanted)?);
            start += take;
            count -= take;
        }
        Ok(found)
    }
}
