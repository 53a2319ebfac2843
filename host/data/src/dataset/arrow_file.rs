//! Arrow IPC files, in the stream format of `save_to_disk` and in the file format: mapped, and decoded a batch at a time.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use arrow::array::ArrayRef;
use arrow::buffer::Buffer;
use arrow::datatypes::SchemaRef;
use arrow::ipc;
use arrow::record_batch::RecordBatch;

use super::{ColumnInfo, Row, Source, rows};
use crate::error::DataError;
use crate::guard::guarded;

/// Bytes that one compressed buffer may grow to.
const INFLATED_BYTES_MAX: i64 = 4 << 30;
/// Rows of one batch; far more than writers make, and small enough that no sum of them overflows.
const BATCH_ROWS_MAX: i64 = 1 << 32;

/// An Arrow IPC file. Only the headers of its messages are read when it is opened.
#[derive(Debug)]
pub(super) struct ArrowFile {
    path: PathBuf,
    data: Buffer,
    schema: SchemaRef,
    columns: Vec<ColumnInfo>,
    batches: Vec<Batch>,
    /// The compressed batch that was decoded last: those are not kept, as they take memory of their own.
    last_inflated: Mutex<Option<(usize, RecordBatch)>>,
}

#[derive(Debug)]
struct Batch {
    /// The message's header in the file.
    header: Range<usize>,
    /// Its buffers in the file.
    body: Range<usize>,
    rows: u64,
    /// One past its last row.
    end: u64,
    compressed: bool,
    dictionaries: Arc<HashMap<i64, ArrayRef>>,
    /// Decoded once: the arrays point into the map, so keeping them costs next to nothing.
    decoded: OnceLock<RecordBatch>,
}

/// One message of the stream.
struct Message {
    header: Range<usize>,
    body: Range<usize>,
}

impl ArrowFile {
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let data = Buffer::from(rows::map(path)?);
        guarded(|| Self::index(path, data)).map_err(|detail| DataError::broken(path, detail))
    }

    fn index(path: &Path, data: Buffer) -> Result<Self, String> {
        const MAGIC: &[u8] = b"ARROW1";
        let bytes = data.as_slice();
        // The file format is the stream format between a mark with padding and an index that is not needed here.
        let mut at = 0;
        if bytes.starts_with(MAGIC) {
            if bytes.len() < 16 || !bytes.ends_with(MAGIC) {
                return Err("its end mark `ARROW1` is missing: the file is truncated".into());
            }
            at = 8;
            // Some writers fill up to the alignment of their buffers, which is 64 bytes at most.
            while at < 64 && bytes.get(at..at + 8).is_some_and(|word| word == [0; 8]) {
                at += 8;
            }
        }
        let first = next_message(bytes, &mut at)?.ok_or("it has no schema")?;
        let header = parse(&bytes[first.header])?;
        let schema = header.header_as_schema().ok_or("it does not start with a schema")?;
        let schema: SchemaRef = Arc::new(ipc::convert::try_fb_to_schema(schema).map_err(|e| e.to_string())?);
        let mut dictionaries = Arc::new(HashMap::new());
        let mut batches = Vec::new();
        let mut end = 0;
        while let Some(message) = next_message(bytes, &mut at)? {
            let header = parse(&bytes[message.header.clone()])?;
            if let Some(batch) = header.header_as_record_batch() {
                let compressed = check_buffers(&batch, &bytes[message.body.clone()])?;
                let rows = batch.length() as u64;
                end += rows;
                let Message { header, body } = message;
                let dictionaries = Arc::clone(&dictionaries);
                batches.push(Batch { header, body, rows, end, compressed, dictionaries, decoded: OnceLock::new() });
            } else if let Some(dictionary) = header.header_as_dictionary_batch() {
                let inner = dictionary.data().ok_or("a dictionary has no data")?;
                check_buffers(&inner, &bytes[message.body.clone()])?;
                let body = data.slice_with_length(message.body.start, message.body.len());
                let known = Arc::make_mut(&mut dictionaries);
                ipc::reader::read_dictionary(&body, dictionary, &schema, known, &header.version())
                    .map_err(|e| format!("a dictionary cannot be read: {e}"))?;
            } else {
                return Err(format!("a message of type {:?} does not belong into a table", header.header_type()));
            }
        }
        let columns = rows::columns(&schema);
        Ok(Self { path: path.to_owned(), data, schema, columns, batches, last_inflated: Mutex::new(None) })
    }

    fn batch(&self, number: usize) -> Result<RecordBatch, DataError> {
        let batch = &self.batches[number];
        if let Some(decoded) = batch.decoded.get() {
            return Ok(decoded.clone());
        }
        if batch.compressed
            && let Ok(last) = self.last_inflated.lock()
            && let Some((of, decoded)) = last.as_ref()
            && *of == number
        {
            return Ok(decoded.clone());
        }
        let decoded = guarded(|| self.decode(batch));
        let decoded = decoded.map_err(|e| DataError::broken(&self.path, format!("batch {number}: {e}")))?;
        if !batch.compressed {
            return Ok(batch.decoded.get_or_init(|| decoded).clone());
        }
        if let Ok(mut last) = self.last_inflated.lock() {
            *last = Some((number, decoded.clone()));
        }
        Ok(decoded)
    }

    fn decode(&self, batch: &Batch) -> Result<RecordBatch, String> {
        let header = parse(&self.data[batch.header.clone()])?;
        let message = header.header_as_record_batch().ok_or("it is not a batch of rows")?;
        let body = self.data.slice_with_length(batch.body.start, batch.body.len());
        let schema = self.schema.clone();
        let version = header.version();
        let decoded = ipc::reader::read_record_batch(&body, message, schema, &batch.dictionaries, None, &version)
            .map_err(|e| e.to_string())?;
        if decoded.num_rows() as u64 != batch.rows {
            return Err(format!("it says {} rows and has {}", batch.rows, decoded.num_rows()));
        }
        Ok(decoded)
    }
}

impl Source for ArrowFile {
    fn len(&self) -> u64 {
        self.batches.last().map_or(0, |batch| batch.end)
    }

    fn columns(&self) -> &[ColumnInfo] {
        &self.columns
    }

    fn rows(&self, mut start: u64, mut count: u64, columns: &[&str]) -> Result<Vec<Row>, DataError> {
        let wanted: Vec<usize> = columns.iter().filter_map(|name| self.schema.index_of(name).ok()).collect();
        let mut found = Vec::new();
        let mut number = self.batches.partition_point(|batch| batch.end <= start);
        while count > 0 {
            let place = self.batches.get(number).ok_or_else(|| DataError::broken(&self.path, "rows are missing"))?;
            let take = count.min(place.end - start);
            let offset = start - (place.end - place.rows);
            if take > 0 {
                let batch = self.batch(number)?.slice(offset as usize, take as usize);
                let batch = batch.project(&wanted).map_err(|e| DataError::broken(&self.path, e.to_string()))?;
                found.extend(rows::to_rows(&batch, &self.path)?);
            }
            start += take;
            count -= take;
            number += 1;
        }
        Ok(found)
    }
}

/// Takes the message at `at` and moves on; `None` at the end mark.
fn next_message(bytes: &[u8], at: &mut usize) -> Result<Option<Message>, String> {
    const CONTINUATION: u32 = u32::MAX;
    let start = *at;
    let truncated = |what: &str| format!("it ends within {what} of the message at byte {start}: the file is truncated");
    let word = |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_le_bytes);
    let mut length = word(*at).ok_or_else(|| truncated("the head"))?;
    *at += 4;
    // Before version 0.15 of the format the length came first.
    if length == CONTINUATION {
        length = word(*at).ok_or_else(|| truncated("the head"))?;
        *at += 4;
    }
    if length == 0 {
        return Ok(None);
    }
    let header = *at..at.checked_add(length as usize).ok_or_else(|| truncated("the header"))?;
    let message = parse(bytes.get(header.clone()).ok_or_else(|| truncated("the header"))?)?;
    let body_len = usize::try_from(message.bodyLength()).map_err(|_| "a message has a negative length")?;
    let body_end =
        header.end.checked_add(body_len).filter(|end| *end <= bytes.len()).ok_or_else(|| truncated("the data"))?;
    *at = body_end;
    Ok(Some(Message { body: header.end..body_end, header }))
}

fn parse(header: &[u8]) -> Result<ipc::Message<'_>, String> {
    ipc::root_as_message(header).map_err(|e| format!("a message cannot be read: {e}"))
}

/// Checks every number in a batch's header that the decoder takes on trust; true when its buffers are compressed.
fn check_buffers(batch: &ipc::RecordBatch<'_>, body: &[u8]) -> Result<bool, String> {
    if !(0..=BATCH_ROWS_MAX).contains(&batch.length()) {
        return Err(format!("a batch says it has {} rows", batch.length()));
    }
    let compressed = batch.compression().is_some();
    for node in batch.nodes().iter().flatten() {
        if node.length() < 0 || node.null_count() < 0 || node.null_count() > node.length() {
            return Err("a column has a length that cannot be".into());
        }
    }
    for buffer in batch.buffers().iter().flatten() {
        let range = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
        let bytes = range.and_then(|(offset, len)| body.get(offset..offset.checked_add(len)?));
        let bytes = bytes.ok_or("a column lies outside of its message")?;
        if compressed
            && let Some(size) = bytes.first_chunk().map(|size| i64::from_le_bytes(*size))
            && size > INFLATED_BYTES_MAX
        {
            return Err(format!("a column says it has {size} bytes, more than the limit of {INFLATED_BYTES_MAX}"));
        }
    }
    Ok(compressed)
}
