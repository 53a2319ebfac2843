//! The crate from outside: real data, generated files, a local hub, and hostile input.

mod chat;
mod hostile;
mod hub;
mod local;
mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use cosmos_data::{DataError, DatasetSpec, HubOptions, Table};

/// Options with which any use of the network fails.
fn offline() -> HubOptions {
    let mut options = HubOptions::from_vars(|_| None);
    options.offline = true;
    options.cache_dir = "/nonexistent/cache".into();
    options
}

fn spec(name: impl AsRef<Path>, subset: &str, splits: &[&str]) -> DatasetSpec {
    DatasetSpec {
        name: name.as_ref().to_str().unwrap().into(),
        subset: subset.into(),
        splits: splits.iter().map(|s| (*s).into()).collect(),
        ..DatasetSpec::default()
    }
}

fn open(name: impl AsRef<Path>, splits: &[&str]) -> Result<Table, DataError> {
    Table::open(&spec(name, "", splits), &offline())
}

/// Rows `from..to` of two columns: `n`, the row's number, and `text`.
fn batch(from: i64, to: i64) -> RecordBatch {
    let n: ArrayRef = Arc::new(Int64Array::from_iter_values(from..to));
    let text: ArrayRef = Arc::new(StringArray::from_iter_values((from..to).map(|i| format!("row {i}"))));
    RecordBatch::try_from_iter([("n", n), ("text", text)]).unwrap()
}

/// A parquet file with one row group for every `group_rows` rows.
fn parquet_bytes(batch: &RecordBatch, group_rows: usize) -> Vec<u8> {
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_max_row_group_row_count(Some(group_rows))
        .set_compression(parquet::basic::Compression::SNAPPY)
        .build();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    bytes
}

/// An Arrow stream of these batches.
fn arrow_bytes(batches: &[RecordBatch]) -> Vec<u8> {
    let mut writer = arrow::ipc::writer::StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn numbers(table: &Table) -> Vec<i64> {
    table.rows(0, table.len(), &["n"]).unwrap().iter().map(|row| row["n"].as_i64().unwrap()).collect()
}
