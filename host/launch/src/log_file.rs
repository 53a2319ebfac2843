//! A log that does not grow for ever.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Bytes of one line; a longer one is broken.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Files put aside, beside the one being written.
const OLD_FILES_MAX: u32 = 2;
const TAIL_LINES_MAX: usize = 12;
/// How much of a log is read for them.
const TAIL_BYTES_MAX: u64 = 8 << 10;

/// `NAME.log`, with `NAME.log.1` before it and `NAME.log.2` before that.
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
    tail: VecDeque<String>,
}

impl LogFile {
    /// Opens it to go on at its end.
    pub fn open(path: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.into(), file, bytes, bytes_max, tail: VecDeque::new() })
    }

    /// Adds a line. A disk that is full costs log lines, never the run.
    pub fn line(&mut self, line: &str) {
        if self.tail.len() == TAIL_LINES_MAX {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
        if self.bytes >= self.bytes_max && self.rotate().is_err() {
            return;
        }
        if writeln!(self.file, "{line}").is_ok() {
            self.bytes += line.len() as u64 + 1;
        }
    }

    /// The last lines of the process that wrote last.
    pub fn tail(&self) -> String {
        self.tail.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }

    /// A new process begins.
    pub fn forget_tail(&mut self) {
        self.tail.clear();
    }

    fn rotate(&mut self) -> io::Result<()> {
        let old = |index: u32| PathBuf::from(format!("{}.{index}", self.path.display()));
        for index in (1..OLD_FILES_MAX).rev() {
            if old(index).exists() {
                fs::rename(old(index), old(index + 1))?;
            }
        }
        fs::rename(&self.path, old(1))?;
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.bytes = 0;
        Ok(())
    }
}

/// The last lines of a log that a process wrote itself; empty where it cannot be read.
pub(crate) fn tail_of(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let from = file.metadata()?.len().saturating_sub(TAIL_BYTES_MAX);
        file.seek(io::SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(TAIL_LINES_MAX);
    lines[first..].iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// Hands every line to `take` until the end of input.
pub(crate) fn lines(input: impl Read, mut take: impl FnMut(&str)) {
    let mut reader = BufReader::new(input);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r'])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Whether a line tells of a warning or an error: as the log writes them, or as the command line ends with them.
pub(crate) fn is_alarming(line: &str) -> bool {
    let level = line.split_whitespace().nth(1);
    matches!(level, Some("WARN" | "ERROR"))
        || ["error:", "warning:", "hint:", "thread '", "  caused by:"].iter().any(|start| line.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rotates_and_keeps_three_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let mut log = LogFile::open(&path, 100).unwrap();
        (0..100).for_each(|n| log.line(&format!("line number {n:02}")));
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["a.log", "a.log.1", "a.log.2"]);
        let whole =
            ["a.log.2", "a.log.1", "a.log"].map(|n| fs::read_to_string(folder.path().join(n)).unwrap()).concat();
        assert!(whole.ends_with("line number 99\n") && whole.contains("line number 90\n"));
        assert!(whole.len() < 400);
        assert!(log.tail().contains("number 88") && !log.tail().contains("number 87"));
    }

    #[test]
    fn long_lines_are_broken_and_bytes_that_are_no_text_replaced() {
        let mut seen = Vec::new();
        let bytes = [vec![b'x'; 100_000], b"\n\xff\xfe\nlast".to_vec()].concat();
        lines(&bytes[..], |line| seen.push(line.to_owned()));
        assert_eq!(seen.iter().map(|l| l.chars().count()).collect::<Vec<_>>(), [65_536, 34_464, 2, 4]);
    }

    #[test]
    fn alarming_lines_are_told_from_others() {
        for line in
            ["2026-01-01T00:00:00Z  WARN slow", "2026-01-01T00:00:00Z ERROR no", "error: no such file", "hint: look"]
        {
            assert!(is_alarming(line), "{line}");
        }
        for line in ["2026-01-01T00:00:00Z  INFO 0 errors: fine", "step 3 WARN", ""] {
            assert!(!is_alarming(line), "{line}");
        }
    }
}
