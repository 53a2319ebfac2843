//! Standard output that stays quiet when its reader has gone away.

use std::io::{BufWriter, Stdout, Write};

use crate::failure::Failure;

/// Buffered standard output.
pub struct Output(BufWriter<Stdout>);

impl Output {
    /// The process's standard output.
    pub fn stdout() -> Self {
        Self(BufWriter::new(std::io::stdout()))
    }

    /// Writes `text` and a newline.
    pub fn line(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.text(text)?;
        self.text("\n")
    }

    /// Writes `text` as it is.
    pub fn text(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.0.write_all(text.as_ref().as_bytes()).map_err(Failure::stdout)
    }

    /// Writes one JSON document on one line.
    pub fn json_line(&mut self, value: &impl serde::Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(value).map_err(|e| Failure::failed(format!("cannot write JSON: {e}")))?;
        self.line(text)
    }

    /// Writes one JSON document, indented.
    pub fn json(&mut self, value: &impl serde::Serialize) -> Result<(), Failure> {
        let text =
            serde_json::to_string_pretty(value).map_err(|e| Failure::failed(format!("cannot write JSON: {e}")))?;
        self.line(text)
    }

    /// Hands everything to the reader.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.0.flush().map_err(Failure::stdout)
    }
}
