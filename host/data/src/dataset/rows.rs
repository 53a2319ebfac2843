//! Arrow batches to JSON rows, and files to memory.

use std::fs::File;
use std::path::Path;

use arrow::json::writer::{JsonArray, WriterBuilder};
use arrow::record_batch::RecordBatch;
use bytes::Bytes;

use super::{ColumnInfo, Row};
use crate::error::DataError;
use crate::guard::guarded;

/// The rows of `batch` as JSON objects.
pub(super) fn to_rows(batch: &RecordBatch, path: &Path) -> Result<Vec<Row>, DataError> {
    if batch.num_columns() == 0 {
        return Ok(vec![Row::new(); batch.num_rows()]);
    }
    let json = guarded(|| {
        let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(Vec::new());
        writer.write(batch)?;
        writer.finish()?;
        Ok::<_, arrow::error::ArrowError>(writer.into_inner())
    });
    let json = json.map_err(|detail| DataError::broken(path, detail))?;
    serde_json::from_slice(&json).map_err(|e| DataError::broken(path, format!("a row cannot be written as JSON: {e}")))
}

/// The columns of an Arrow schema.
pub(super) fn columns(schema: &arrow::datatypes::Schema) -> Vec<ColumnInfo> {
    let column = |field: &arrow::datatypes::FieldRef| ColumnInfo {
        name: field.name().clone(),
        kind: field.data_type().to_string(),
    };
    schema.fields().iter().map(column).collect()
}

/// Maps a file into memory.
#[allow(unsafe_code)]
pub(super) fn map(path: &Path) -> Result<Bytes, DataError> {
    let file = File::open(path).map_err(DataError::io("read", path))?;
    let metadata = file.metadata().map_err(DataError::io("read", path))?;
    if !metadata.is_file() {
        return Err(DataError::broken(path, "it is not a regular file"));
    }
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is only read. Dataset files are written once and replaced by rename, never in place, in the hub's
    // cache and by `save_to_disk` alike; a program that truncates one while a run reads it breaks every reader of maps.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(DataError::io("map", path))?;
    Ok(Bytes::from_owner(map))
}
