//! TensorBoard event files: scalars in TFRecord framing.
//!
//! A record is `length: u64 LE`, `masked crc32c of length: u32 LE`, `data`, `masked crc32c of data: u32 LE`, with
//! `masked = rotate_right(crc, 15) + 0xa282ead8`. The data is a protobuf `Event`: `wall_time` (1, double), `step`
//! (2, varint), `file_version` (3, string, first record only) or `summary` (5), a list (1) of `tag` (1, string) and
//! `simple_value` (2, float). See `tensorflow/core/util/event.proto` and `summary.proto`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::folder::replace_file_with;
use crate::{ReportError, Result};

/// Longest record that is written or read back.
pub const EVENT_RECORD_BYTES_MAX: u64 = 16 << 20;

/// Bytes of a record around its data.
const FRAME_BYTES: u64 = 8 + 4 + 4;

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Goes on with the newest event file in `folder`, or begins one. A record that a kill left unfinished is dropped.
    ///
    /// # Errors
    /// [`ReportError::CannotRead`], [`ReportError::CannotWrite`].
    pub fn open(folder: &Path) -> Result<EventFile> {
        match event_files(folder)?.pop() {
            Some(path) => EventFile::append_to(path),
            None => EventFile::begin(folder),
        }
    }

    fn begin(folder: &Path) -> Result<EventFile> {
        // TensorBoard looks for `tfevents` in the name and sorts the files by it.
        let path = folder.join(format!("events.out.tfevents.{:010}.cosmos-host", unix_seconds() as u64));
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(ReportError::write(&path))?;
        let mut event = EventFile { path, file };
        event.version()?;
        Ok(event)
    }

    /// The first record of a file.
    fn version(&mut self) -> Result<()> {
        let mut data = Vec::new();
        put_double(&mut data, 1, unix_seconds());
        put_bytes(&mut data, 3, b"brain.Event:2");
        self.append(&data)
    }

    fn append_to(path: PathBuf) -> Result<EventFile> {
        let mut file = OpenOptions::new().read(true).write(true).open(&path).map_err(ReportError::write(&path))?;
        let mut end = 0;
        for_each_record(&path, |record| {
            end = record.end();
            Ok(())
        })?;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(ReportError::write(&path))?;
        let mut event = EventFile { path, file };
        if end == 0 {
            event.version()?;
        }
        Ok(event)
    }

    /// Appends the scalars of one step in one write. Values are stored as f32, as TensorBoard does.
    ///
    /// # Errors
    /// [`ReportError::CannotWrite`].
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            put_float(&mut entry, 2, *value as f32);
            put_bytes(&mut summary, 1, &entry);
        }
        let mut data = Vec::new();
        put_double(&mut data, 1, unix_seconds());
        put_varint_field(&mut data, 2, step);
        put_bytes(&mut data, 5, &summary);
        self.append(&data)
    }

    /// Drops every event of a step greater than `step` from every event file in this one's folder, by rename.
    ///
    /// # Errors
    /// [`ReportError::BadRecord`] for a file that another program changed, [`ReportError::CannotWrite`].
    pub fn truncate_after(&mut self, step: u64) -> Result<()> {
        let folder = self.path.parent().map(Path::to_owned).unwrap_or_default();
        for path in event_files(&folder)? {
            let mut failed = None;
            replace_file_with(&path, |file| {
                let mut out = BufWriter::new(file);
                let outcome = for_each_record(&path, |record| {
                    if record.step().map_err(|reason| record.bad(&path, reason))? <= step {
                        write_record(&mut out, &record.data).map_err(ReportError::write(&path))?;
                    }
                    Ok(())
                });
                if let Err(error) = outcome {
                    failed = Some(error);
                    return Err(io::Error::other("an earlier record is bad"));
                }
                out.flush()
            })
            .map_err(|error| failed.unwrap_or(error))?;
        }
        *self = EventFile::append_to(self.path.clone())?;
        Ok(())
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn append(&mut self, data: &[u8]) -> Result<()> {
        let mut record = Vec::with_capacity(data.len() + FRAME_BYTES as usize);
        write_record(&mut record, data)
            .and_then(|()| self.file.write_all(&record))
            .map_err(ReportError::write(&self.path))
    }
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs_f64()).unwrap_or(0.0)
}

/// The event files of a folder, oldest first.
fn event_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(ReportError::read(folder))? {
        let path = entry.map_err(ReportError::read(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("events.out.tfevents.") && !name.ends_with(".tmp") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn write_record(out: &mut impl Write, data: &[u8]) -> io::Result<()> {
    if data.len() as u64 > EVENT_RECORD_BYTES_MAX {
        return Err(io::Error::other(format!("an event of {} bytes, more than {EVENT_RECORD_BYTES_MAX}", data.len())));
    }
    let length = (data.len() as u64).to_le_bytes();
    out.write_all(&length)?;
    out.write_all(&masked_crc(&length).to_le_bytes())?;
    out.write_all(data)?;
    out.write_all(&masked_crc(data).to_le_bytes())
}

struct Record {
    offset: u64,
    data: Vec<u8>,
}

impl Record {
    fn end(&self) -> u64 {
        self.offset + FRAME_BYTES + self.data.len() as u64
    }

    fn bad(&self, path: &Path, reason: &str) -> ReportError {
        ReportError::BadRecord { path: path.to_owned(), offset: self.offset, reason: reason.to_owned() }
    }

    /// Field 2 of the event; 0 when it is left out, as protobuf does with zeros.
    fn step(&self) -> std::result::Result<u64, &'static str> {
        let mut rest = self.data.as_slice();
        while !rest.is_empty() {
            let key = take_varint(&mut rest).ok_or("a field key is cut off")?;
            match (key >> 3, key & 7) {
                (2, 0) => return take_varint(&mut rest).ok_or("the step is cut off"),
                (_, 0) => drop(take_varint(&mut rest).ok_or("a number is cut off")?),
                (_, 1) => rest = rest.get(8..).ok_or("a double is cut off")?,
                (_, 5) => rest = rest.get(4..).ok_or("a float is cut off")?,
                (_, 2) => {
                    let bytes = take_varint(&mut rest).ok_or("a length is cut off")?;
                    let bytes = usize::try_from(bytes).map_err(|_| "a length is out of range")?;
                    rest = rest.get(bytes..).ok_or("a field is cut off")?;
                }
                _ => return Err("an unknown wire type"),
            }
        }
        Ok(0)
    }
}

/// Calls `use_record` with every record. What a kill left of an unfinished last one is ignored; a wrong checksum is an error.
fn for_each_record(path: &Path, mut use_record: impl FnMut(Record) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(ReportError::read(path))?;
    let total = file.metadata().map_err(ReportError::read(path))?.len();
    let mut reader = BufReader::new(file);
    let mut offset = 0;
    while offset < total {
        let bad = |reason: &str| ReportError::BadRecord { path: path.to_owned(), offset, reason: reason.to_owned() };
        let mut head = [0_u8; 12];
        if total - offset < 12 {
            return Ok(());
        }
        reader.read_exact(&mut head).map_err(ReportError::read(path))?;
        let length_bytes = [head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]];
        let length = u64::from_le_bytes(length_bytes);
        if masked_crc(&length_bytes).to_le_bytes() != head[8..] || length > EVENT_RECORD_BYTES_MAX {
            return Err(bad("the length's checksum is wrong"));
        }
        if total - offset < length + FRAME_BYTES {
            return Ok(());
        }
        // Bounded by `EVENT_RECORD_BYTES_MAX`, and the file is known to be that long.
        let mut data = vec![0; length as usize];
        let mut crc = [0_u8; 4];
        reader.read_exact(&mut data).and_then(|()| reader.read_exact(&mut crc)).map_err(ReportError::read(path))?;
        if masked_crc(&data).to_le_bytes() != crc {
            return Err(bad("the data's checksum is wrong"));
        }
        let record = Record { offset, data };
        offset = record.end();
        use_record(record)?;
    }
    Ok(())
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn put_varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3);
    put_varint(out, value);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, field << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_float(out: &mut Vec<u8>, field: u64, value: f32) {
    put_varint(out, field << 3 | 5);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// CRC-32C bit by bit, so that the checksum is not checked by the library that made it.
    fn slow_masked_crc(bytes: &[u8]) -> u32 {
        let mut crc = !0_u32;
        for &byte in bytes {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        let crc = !crc;
        crc.rotate_right(15).wrapping_add(0xa282_ead8)
    }

    /// Every (step, tag, value) of a file, by a decoder that shares nothing with the writer.
    fn decode(bytes: &[u8]) -> Vec<(u64, String, f32)> {
        fn number(bytes: &[u8], at: &mut usize) -> u64 {
            let mut value = 0;
            let mut shift = 0;
            loop {
                let byte = bytes[*at];
                *at += 1;
                value += u64::from(byte % 128) << shift;
                shift += 7;
                if byte < 128 {
                    return value;
                }
            }
        }
        fn fields(bytes: &[u8]) -> Vec<(u64, Vec<u8>, u64)> {
            let (mut at, mut found) = (0, Vec::new());
            while at < bytes.len() {
                let key = number(bytes, &mut at);
                let (payload, value) = match key % 8 {
                    0 => (vec![], number(bytes, &mut at)),
                    wire => {
                        let size = match wire {
                            1 => 8,
                            5 => 4,
                            2 => number(bytes, &mut at) as usize,
                            other => panic!("wire type {other}"),
                        };
                        at += size;
                        (bytes[at - size..at].to_vec(), 0)
                    }
                };
                found.push((key / 8, payload, value));
            }
            found
        }
        let (mut at, mut out) = (0, Vec::new());
        let mut first = true;
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            assert_eq!(
                u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()),
                slow_masked_crc(&bytes[at..at + 8])
            );
            let data = &bytes[at + 12..at + 12 + length];
            at += 12 + length + 4;
            assert_eq!(u32::from_le_bytes(bytes[at - 4..at].try_into().unwrap()), slow_masked_crc(data));
            let event = fields(data);
            if std::mem::take(&mut first) {
                assert_eq!(event[1].1, b"brain.Event:2");
                continue;
            }
            let step = event.iter().find(|f| f.0 == 2).map_or(0, |f| f.2);
            for summary in event.iter().filter(|f| f.0 == 5) {
                for entry in fields(&summary.1) {
                    let parts = fields(&entry.1);
                    let value = f32::from_le_bytes(parts[1].1.clone().try_into().unwrap());
                    out.push((step, String::from_utf8(parts[0].1.clone()).unwrap(), value));
                }
            }
        }
        out
    }

    #[test]
    fn the_known_checksum() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), slow_masked_crc(b"123456789"));
    }

    #[test]
    fn written_scalars_are_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(temp.path()).unwrap();
        file.scalars(0, &[("train/loss_avg", 1.5), ("val/reward_avg", f64::NAN)]).unwrap();
        file.scalars(300, &[("train/loss_avg", -0.25)]).unwrap();
        let path = file.path().to_owned();
        drop(file);
        EventFile::open(temp.path()).unwrap().scalars(u64::MAX, &[("é", 1e300)]).unwrap();
        let read = decode(&fs::read(path).unwrap());
        assert_eq!(read[0], (0, "train/loss_avg".into(), 1.5));
        assert!(read[1].2.is_nan());
        assert_eq!(read[2], (300, "train/loss_avg".into(), -0.25));
        assert_eq!(read[3], (u64::MAX, "é".into(), f32::INFINITY));
        assert_eq!(read.len(), 4);
    }

    #[test]
    fn cutting_back_and_going_on() {
        let temp = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(temp.path()).unwrap();
        for step in 0..10 {
            file.scalars(step, &[("a", step as f64)]).unwrap();
        }
        file.truncate_after(4).unwrap();
        file.scalars(5, &[("a", 50.0)]).unwrap();
        let read = decode(&fs::read(file.path()).unwrap());
        let values: Vec<_> = read.iter().map(|r| r.2).collect();
        assert_eq!(values, [0.0, 1.0, 2.0, 3.0, 4.0, 50.0]);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_kill_at_any_byte_leaves_a_file_to_go_on_with() {
        let temp = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(temp.path()).unwrap();
        let head = fs::read(file.path()).unwrap().len();
        file.scalars(1, &[("a", 1.0)]).unwrap();
        let whole = fs::read(file.path()).unwrap();
        for cut in 0..whole.len() {
            fs::write(file.path(), &whole[..cut]).unwrap();
            let reopened = EventFile::open(temp.path()).unwrap();
            let left = fs::read(reopened.path()).unwrap().len();
            assert_eq!(left, head, "cut at {cut}");
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        let temp = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(temp.path()).unwrap();
        file.scalars(1, &[("a", 1.0)]).unwrap();
        let mut bytes = fs::read(file.path()).unwrap();
        bytes[20] ^= 1;
        fs::write(file.path(), &bytes).unwrap();
        let error = file.truncate_after(1).unwrap_err();
        assert!(matches!(error, ReportError::BadRecord { offset: 0, .. }), "{error}");
        assert_eq!(fs::read(file.path()).unwrap(), bytes);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let record = Record { offset: 0, data: bytes.clone() };
            let _ = record.step();
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join("events.out.tfevents.1");
            fs::write(&path, &bytes).unwrap();
            let _ = EventFile::open(temp.path());
        }
    }
}
