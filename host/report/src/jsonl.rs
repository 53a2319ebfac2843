//! A file of JSON lines that only grows, survives a kill at any moment, and can be cut back to a step.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::folder::replace_file_with;
use crate::{ReportError, Result};

/// Longest line that is read back. A longer one was not written by this program.
pub const LINE_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug)]
pub(crate) struct JsonlFile {
    path: PathBuf,
    file: File,
}

impl JsonlFile {
    /// Opens `path` to append to, making it when it is not there. A last line that a kill left unfinished is dropped.
    pub(crate) fn open(path: &Path) -> Result<JsonlFile> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(ReportError::write(path))?;
        drop_unfinished_line(&mut file).map_err(ReportError::write(path))?;
        Ok(JsonlFile { path: path.to_owned(), file })
    }

    /// Appends one line in one write.
    pub(crate) fn append(&mut self, value: &impl serde::Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value)
            .map_err(|e| ReportError::CannotWrite { path: self.path.clone(), source: e.into() })?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(ReportError::write(&self.path))
    }

    /// Drops every line with a `step` greater than `step`, by rename.
    pub(crate) fn truncate_after(&mut self, step: u64) -> Result<()> {
        let kept = self.path.clone();
        let mut failed = None;
        replace_file_with(&kept, |file| {
            let mut out = BufWriter::new(file);
            let outcome = for_each_line(&kept, |text, value| {
                if step_of(&value) <= step {
                    out.write_all(text).map_err(ReportError::write(&kept))?;
                }
                Ok(())
            });
            if let Err(error) = outcome {
                failed = Some(error);
                return Err(std::io::Error::other("an earlier line is bad"));
            }
            out.flush()
        })
        .map_err(|error| failed.unwrap_or(error))?;
        *self = JsonlFile::open(&kept)?;
        Ok(())
    }

    /// The last line, or none in an empty file.
    pub(crate) fn last(&self) -> Result<Option<Value>> {
        let mut last = None;
        for_each_line(&self.path, |_, value| {
            last = Some(value);
            Ok(())
        })?;
        Ok(last)
    }
}

fn step_of(value: &Value) -> u64 {
    value.get("step").and_then(Value::as_u64).unwrap_or(0)
}

/// Calls `use_line` with the bytes (newline included) and the value of every line.
fn for_each_line(path: &Path, mut use_line: impl FnMut(&[u8], Value) -> Result<()>) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(ReportError::read(path))?);
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let bytes =
            (&mut reader).take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut text).map_err(ReportError::read(path))?;
        if bytes == 0 {
            break;
        }
        let bad = |reason: String| ReportError::BadLine { path: path.to_owned(), line, reason };
        if bytes as u64 > LINE_BYTES_MAX {
            return Err(bad(format!("longer than {LINE_BYTES_MAX} bytes")));
        }
        let value: Value = serde_json::from_slice(&text).map_err(|e| bad(format!("not JSON: {e}")))?;
        if value.get("step").and_then(Value::as_u64).is_none() {
            return Err(bad("no whole number under `step`".into()));
        }
        use_line(&text, value)?;
    }
    Ok(())
}

/// Cuts the file after its last newline and leaves the position there.
fn drop_unfinished_line(file: &mut File) -> std::io::Result<()> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut block = [0_u8; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(newline) = part.iter().rposition(|&b| b == b'\n') {
            end = start + newline as u64 + 1;
            break;
        }
        end = start;
    }
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_unfinished_last_line_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("m.jsonl");
        for unfinished in ["{\"step\":2,\"a", &"x".repeat(10_000), "", "{\"step\":2}"] {
            std::fs::write(&path, format!("{{\"step\":1}}\n{unfinished}")).unwrap();
            let mut file = JsonlFile::open(&path).unwrap();
            file.append(&json!({"step": 3})).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":3}\n");
        }
    }

    #[test]
    fn cutting_back_keeps_earlier_lines_byte_for_byte() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("m.jsonl");
        std::fs::write(&path, "{\"step\": 1, \"a\":0.10}\n{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n").unwrap();
        let mut file = JsonlFile::open(&path).unwrap();
        file.truncate_after(2).unwrap();
        file.append(&json!({"step": 9})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\": 1, \"a\":0.10}\n{\"step\":1}\n{\"step\":2}\n{\"step\":9}\n");
        assert_eq!(file.last().unwrap(), Some(json!({"step": 9})));
    }

    #[test]
    fn a_bad_line_is_named_and_the_file_stays() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("m.jsonl");
        for bad in ["nonsense", "{}", "{\"step\":-1}", "[1]"] {
            let text = format!("{{\"step\":1}}\n{bad}\n");
            std::fs::write(&path, &text).unwrap();
            let error = JsonlFile::open(&path).unwrap().truncate_after(5).unwrap_err();
            assert!(matches!(error, ReportError::BadLine { line: 2, .. }), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
    }
}
