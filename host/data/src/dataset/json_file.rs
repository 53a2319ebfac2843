//! JSON files: one object a line, or one list of objects.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{ColumnInfo, Row, Source, rows};
use crate::error::DataError;

/// Bytes of a file that is one list: its rows are all kept in memory.
const LIST_BYTES_MAX: usize = 2 << 30;
/// Columns of one file.
const COLUMNS_MAX: usize = 10_000;

/// Opens a `.jsonl` or `.json` file; what is in it decides how it is read.
pub(super) fn open(path: &Path) -> Result<Arc<dyn Source>, DataError> {
    let bytes = rows::map(path)?;
    let start = if bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let first = bytes[start..].iter().find(|byte| !byte.is_ascii_whitespace());
    if first == Some(&b'[') {
        return Ok(Arc::new(JsonList::read(path, &bytes[start..])?));
    }
    Ok(Arc::new(JsonLines::index(path, bytes, start)?))
}

/// A file with one object a line. Where the lines are is found out on opening, when every line is also checked; a row is
/// read when it is asked for.
#[derive(Debug)]
struct JsonLines {
    path: PathBuf,
    bytes: Bytes,
    /// Where each object lies, empty lines left out.
    lines: Vec<Range<usize>>,
    columns: Vec<ColumnInfo>,
}

impl JsonLines {
    fn index(path: &Path, bytes: Bytes, start: usize) -> Result<Self, DataError> {
        let mut lines = Vec::new();
        let mut columns = Columns::default();
        let mut at = start;
        for (number, line) in bytes[start..].split(|byte| *byte == b'\n').enumerate() {
            let range = at..at + line.len();
            at = range.end + 1;
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            columns.add_line(line).map_err(|error| {
                let last = range.end == bytes.len() && error.is_eof();
                // The reader sees one line at a time and counts each as its first.
                let mut detail = error.to_string();
                if let Some(place) = detail.rfind(" at line 1 column ") {
                    detail.replace_range(place..place + " at line 1".len(), " at");
                }
                let detail = if last { format!("the file is truncated: {detail}") } else { detail };
                DataError::Broken { path: path.to_owned(), line: Some(number as u64 + 1), detail }
            })?;
            lines.push(range);
        }
        Ok(Self { path: path.to_owned(), bytes, lines, columns: columns.finish(path)? })
    }
}

impl Source for JsonLines {
    fn len(&self) -> u64 {
        self.lines.len() as u64
    }

    fn columns(&self) -> &[ColumnInfo] {
        &self.columns
    }

    fn rows(&self, start: u64, count: u64, columns: &[&str]) -> Result<Vec<Row>, DataError> {
        let lines = &self.lines[start as usize..(start + count) as usize];
        let read = |line: &Range<usize>| {
            let row: Row = serde_json::from_slice(&self.bytes[line.clone()])
                .map_err(|error| DataError::broken(&self.path, format!("it changed while it was read: {error}")))?;
            Ok(select(row, columns))
        };
        lines.iter().map(read).collect()
    }
}

/// A file with one list of objects, kept in memory.
#[derive(Debug)]
struct JsonList {
    rows: Vec<Row>,
    columns: Vec<ColumnInfo>,
}

impl JsonList {
    fn read(path: &Path, bytes: &[u8]) -> Result<Self, DataError> {
        if bytes.len() > LIST_BYTES_MAX {
            return Err(DataError::TooLarge {
                what: format!("the JSON list `{}`", path.display()),
                size: format!("{} bytes", bytes.len()),
                limit: format!("{LIST_BYTES_MAX} bytes (as JSONL, one object a line, there is none)"),
            });
        }
        let rows: Vec<Row> = serde_json::from_slice(bytes).map_err(|error| DataError::Broken {
            path: path.to_owned(),
            line: Some(error.line() as u64),
            detail: error.to_string(),
        })?;
        let mut columns = Columns::default();
        for row in &rows {
            row.iter().for_each(|(name, value)| columns.add(name, Kind::of(value)));
        }
        Ok(Self { rows, columns: columns.finish(path)? })
    }
}

impl Source for JsonList {
    fn len(&self) -> u64 {
        self.rows.len() as u64
    }

    fn columns(&self) -> &[ColumnInfo] {
        &self.columns
    }

    fn rows(&self, start: u64, count: u64, columns: &[&str]) -> Result<Vec<Row>, DataError> {
        let rows = &self.rows[start as usize..(start + count) as usize];
        Ok(rows.iter().map(|row| select(row.clone(), columns)).collect())
    }
}

/// The columns asked for, in that order; null where the row has none.
fn select(mut row: Row, columns: &[&str]) -> Row {
    let mut selected = Row::new();
    for name in columns {
        if !selected.contains_key(*name) {
            selected.insert((*name).to_owned(), row.get_mut(*name).map(serde_json::Value::take).unwrap_or_default());
        }
    }
    selected
}

/// The columns seen so far, in order of appearance.
#[derive(Default)]
struct Columns {
    found: Vec<(String, Kind)>,
    /// Where the next key is expected: rows mostly have the same keys in the same order.
    next: usize,
}

impl Columns {
    fn add_line(&mut self, line: &[u8]) -> serde_json::Result<()> {
        let mut reader = serde_json::Deserializer::from_slice(line);
        self.next = 0;
        reader.deserialize_map(self)?;
        reader.end()
    }

    fn add(&mut self, name: &str, kind: Kind) {
        let at_next = self.found.get(self.next).is_some_and(|(known, _)| known == name);
        let place = if at_next { Some(self.next) } else { self.found.iter().position(|(known, _)| known == name) };
        match place {
            Some(place) => {
                self.found[place].1 = self.found[place].1.join(kind);
                self.next = place + 1;
            }
            // One too many is enough to refuse the file at its end.
            None if self.found.len() <= COLUMNS_MAX => self.found.push((name.to_owned(), kind)),
            None => {}
        }
    }

    fn finish(self, path: &Path) -> Result<Vec<ColumnInfo>, DataError> {
        if self.found.len() > COLUMNS_MAX {
            return Err(DataError::TooLarge {
                what: format!("the number of different keys in `{}`", path.display()),
                size: format!("{} columns", self.found.len()),
                limit: format!("{COLUMNS_MAX} columns"),
            });
        }
        Ok(self.found.into_iter().map(|(name, kind)| ColumnInfo { name, kind: kind.name().into() }).collect())
    }
}

impl<'de> Visitor<'de> for &mut Columns {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            let kind = map.next_value::<Kind>()?;
            self.add(&key, kind);
        }
        Ok(())
    }
}

/// What kind of values a column has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Null,
    Bool,
    Number,
    String,
    List,
    Object,
    Mixed,
}

impl Kind {
    fn of(value: &serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Self::Null,
            serde_json::Value::Bool(_) => Self::Bool,
            serde_json::Value::Number(_) => Self::Number,
            serde_json::Value::String(_) => Self::String,
            serde_json::Value::Array(_) => Self::List,
            serde_json::Value::Object(_) => Self::Object,
        }
    }

    fn join(self, other: Self) -> Self {
        match (self, other) {
            (Self::Null, kind) | (kind, Self::Null) => kind,
            (a, b) if a == b => a,
            _ => Self::Mixed,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "bool",
            Self::Number => "number",
            Self::String => "string",
            Self::List => "list",
            Self::Object => "object",
            Self::Mixed => "mixed",
        }
    }
}

/// Reads a value for its kind alone.
impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KindVisitor;

        impl<'de> Visitor<'de> for KindVisitor {
            type Value = Kind;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> Result<Kind, E> {
                Ok(Kind::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Kind, E> {
                Ok(Kind::Bool)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Kind, E> {
                Ok(Kind::Number)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Kind, E> {
                Ok(Kind::Number)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Kind, E> {
                Ok(Kind::Number)
            }

            fn visit_str<E>(self, _: &str) -> Result<Kind, E> {
                Ok(Kind::String)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Kind, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Kind::List)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kind, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Kind::Object)
            }
        }

        deserializer.deserialize_any(KindVisitor)
    }
}
