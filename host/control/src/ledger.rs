//! The log of everything that was applied, on disk before anybody is answered.
//!
//! One record a line: CRC-32C and length of the JSON in eight hexadecimal digits each, the JSON, a newline. Text, so that
//! it can be read when something went wrong. A record that was being written as the machine died is cut off at the next
//! start; damage before the end is an error, since what came after it would be applied to another state.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use cosmos_controller::Event;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{ControlError, Result};
use crate::identity::Identity;
use crate::supervisor::Report;

/// Bytes of one record, a snapshot being the largest.
const RECORD_BYTES_MAX: u64 = 256 << 20;
/// Bytes of the header.
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// 1 held a hash of the config only.
const FORMAT: u32 = 2;

/// One record.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(crate) enum Record {
    /// The first: whose ledger it is.
    Header { format: u32, identity: Value },
    /// Something happened. Sequence numbers have no gaps.
    Event {
        seq: u64,
        at_ms: u64,
        event: Event,
        #[serde(default, skip_serializing_if = "Value::is_null")]
        payload: Value,
    },
    /// The state after event `seq`, in place of all before.
    Snapshot { seq: u64, state: Value },
    /// A report from before the snapshot that the owner had not recorded.
    Report { report: Box<Report> },
    /// The owner has recorded all reports up to this one.
    Recorded { seq: u64 },
}

/// What the ledger writes on.
pub(crate) trait Disk: Send {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
    fn cut(&mut self, len: u64) -> io::Result<()>;
}

impl Disk for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)?;
        self.sync_data()
    }
}

/// An open ledger.
pub(crate) struct Ledger {
    path: PathBuf,
    disk: Box<dyn Disk>,
    identity: Identity,
    bytes: u64,
    /// Set while the file may hold more than was applied: nothing is taken until it has been cut.
    uncut: bool,
}

impl Ledger {
    /// Opens the ledger at `path` and hands every record after the header to `visit`, which may refuse one. Where there is
    /// none, one is made that begins with `begin`.
    pub fn open(
        path: &Path,
        identity: &Identity,
        begin: Option<Record>,
        mut visit: impl FnMut(Record) -> std::result::Result<(), String>,
    ) -> Result<Self> {
        let io = |doing| move |source| ControlError::Io { doing, path: path.to_path_buf(), source };
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io("open"))?;
        let len = file.metadata().map_err(io("read"))?.len();
        let mut reader = BufReader::new(&file);
        let (mut at, mut first) = (0u64, true);
        while at < len {
            let damaged = |reason: String| ControlError::Damaged { path: path.into(), byte: at, reason };
            let mut line = Vec::new();
            let read =
                io::Read::take(&mut reader, RECORD_BYTES_MAX + 1).read_until(b'\n', &mut line).map_err(io("read"))?;
            if read as u64 > RECORD_BYTES_MAX {
                return Err(damaged(format!("a record of more than {RECORD_BYTES_MAX} bytes")));
            }
            let is_last = at + read as u64 >= len;
            let record = match parse(&line) {
                Ok(record) => record,
                // A header is written by rename, so it is never torn.
                Err(reason) if is_last && !first && !is_longer_than_it_says(&line) => {
                    tracing::warn!(
                        "ledger {}: its last record ({read} bytes at byte {at}) is torn ({reason}) and was cut off: \
                         whoever sent it was not answered and asks again",
                        path.display()
                    );
                    file.set_len(at).and_then(|()| file.sync_data()).map_err(io("cut"))?;
                    break;
                }
                Err(reason) => return Err(damaged(reason)),
            };
            match record {
                Record::Header { format, identity: theirs } if first => {
                    let differs = match serde_json::from_value(theirs) {
                        _ if format != FORMAT => Some(format!("format {format}, and not {FORMAT}")),
                        Ok(theirs) => identity.difference(&theirs),
                        Err(error) => return Err(damaged(format!("its header is not readable: {error}"))),
                    };
                    if let Some(differs) = differs {
                        return Err(ControlError::OtherRun { path: path.into(), differs });
                    }
                }
                _ if first => return Err(damaged("it does not begin with a header".into())),
                Record::Header { .. } => return Err(damaged("a second header".into())),
                record => visit(record).map_err(damaged)?,
            }
            first = false;
            at += read as u64;
        }
        let ledger =
            Self { path: path.into(), disk: Box::new(file), identity: identity.clone(), bytes: at, uncut: false };
        if first { ledger.replaced(begin.as_slice()) } else { Ok(ledger) }
    }

    /// Whose ledger lies at `path`, by its header alone; none where there is no ledger, or none that can be read.
    pub fn identity_in(path: &Path) -> Option<Identity> {
        let mut line = Vec::new();
        let file = File::open(path).ok()?;
        io::Read::take(BufReader::new(file), HEADER_BYTES_MAX).read_until(b'\n', &mut line).ok()?;
        match parse(&line).ok()? {
            Record::Header { format: FORMAT, identity } => serde_json::from_value(identity).ok(),
            _ => None,
        }
    }

    /// Appends a record and waits until it is on disk. On an error the file is as before.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let line = line(record);
        if self.uncut {
            self.disk.cut(self.bytes).map_err(|e| self.full(&e))?;
            self.uncut = false;
        }
        if let Err(error) = self.disk.append(&line).and_then(|()| self.disk.sync()) {
            // Whatever part of it has arrived must not be there when this file is read again.
            self.uncut = self.disk.cut(self.bytes).is_err();
            return Err(self.full(&error));
        }
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Replaces the file by a header and `records`, by rename.
    pub fn replaced(self, records: &[Record]) -> Result<Self> {
        let identity = serde_json::to_value(&self.identity).unwrap_or_default();
        let mut text = line(&Record::Header { format: FORMAT, identity });
        records.iter().for_each(|record| text.extend(line(record)));
        let new = self.path.with_extension("new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &self.path)?;
            if let Some(folder) = self.path.parent().filter(|p| !p.as_os_str().is_empty()) {
                File::open(folder)?.sync_all()?;
            }
            OpenOptions::new().append(true).open(&self.path)
        };
        let file = write().map_err(|source| {
            let _ = fs::remove_file(&new);
            ControlError::Io { doing: "write", path: self.path.clone(), source }
        })?;
        Ok(Self { disk: Box::new(file), bytes: text.len() as u64, uncut: false, ..self })
    }

    /// The file and what a new one of the same run needs.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The same file, opened again: for trying what may fail while this one stays in use.
    pub fn again(&self) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(&self.path).map_err(|source| ControlError::Io {
            doing: "open",
            path: self.path.clone(),
            source,
        })?;
        Ok(Self {
            path: self.path.clone(),
            disk: Box::new(file),
            identity: self.identity.clone(),
            bytes: self.bytes,
            uncut: self.uncut,
        })
    }

    #[cfg(test)]
    pub fn swap_disk(&mut self, disk: Box<dyn Disk>) {
        self.disk = disk;
    }

    fn full(&self, error: &io::Error) -> ControlError {
        ControlError::LedgerFull { path: self.path.clone(), reason: error.to_string() }
    }
}

fn line(record: &Record) -> Vec<u8> {
    // Records are maps with text keys; serde_json cannot fail on them.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:08x} {:08x} {json}\n", crc32c::crc32c(json.as_bytes()), json.len()).into_bytes()
}

/// Bytes before the JSON.
const PREFIX: usize = 18;

fn parse(line: &[u8]) -> std::result::Result<Record, String> {
    let (sum, len) = prefix(line).ok_or("its beginning is not readable")?;
    let json = line[PREFIX..].strip_suffix(b"\n").ok_or("it has no end")?;
    if json.len() as u64 != u64::from(len) {
        return Err(format!("it has {} bytes, and not {len}", json.len()));
    }
    if sum != crc32c::crc32c(json) {
        return Err("its checksum does not fit".into());
    }
    serde_json::from_slice(json).map_err(|e| format!("not a record: {e}"))
}

fn prefix(line: &[u8]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(line.get(..PREFIX)?).ok()?;
    let (sum, len) = text.strip_suffix(' ')?.split_once(' ')?;
    Some((u32::from_str_radix(sum, 16).ok()?, u32::from_str_radix(len, 16).ok()?))
}

/// A torn record is never longer than it was to be: two that have run together are damage.
fn is_longer_than_it_says(line: &[u8]) -> bool {
    prefix(line).is_some_and(|(_, len)| line.len() as u64 > PREFIX as u64 + u64::from(len) + 1)
}
