//! What a guest says: log lines, standard output and its last words before a trap. Text of a guest is hostile: it is
//! escaped, cut and counted before anyone sees it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use wasmtime_wasi::async_trait;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use crate::Limits;

/// Longest reason of a failed sample.
pub(crate) const REASON_BYTES_MAX: usize = 2048;

/// How much of a guest's last lines is kept for the reason of a trap. Of a Python traceback the end says most.
const LAST_WORDS_BYTES_MAX: usize = 768;

/// `text` in one line: control characters and those that reorder text are escaped, and what is beyond `bytes_max` is
/// replaced by a count.
pub(crate) fn one_line(text: &str, bytes_max: usize) -> String {
    let cut = text.floor_char_boundary(bytes_max);
    let mut line = String::with_capacity(cut);
    for c in text[..cut].chars() {
        let reorders =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if c.is_control() || reorders {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    if cut < text.len() {
        line.push_str(&format!("… ({} bytes left out)", text.len() - cut));
    }
    line
}

/// Between two lines of a guest's last words.
const WORDS_BETWEEN: &str = " / ";

/// The severity that a guest gives its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// One instance's way to be heard.
#[derive(Debug)]
pub(crate) struct Voice {
    plugin: String,
    /// Whether `log` is granted. The last words are kept either way, for the reason of a trap.
    granted: bool,
    line_bytes_max: usize,
    lines_per_second_max: u32,
    second: Instant,
    lines: u32,
    left_out: u64,
    /// The last warnings, errors and lines of standard error, the newest last.
    last_words: VecDeque<String>,
    /// A line of standard error without its end yet.
    unfinished: String,
}

pub(crate) type SharedVoice = Arc<Mutex<Voice>>;

pub(crate) fn lock(voice: &SharedVoice) -> MutexGuard<'_, Voice> {
    voice.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Voice {
    pub(crate) fn new(plugin: &str, granted: bool, limits: &Limits) -> Self {
        Self {
            plugin: plugin.into(),
            granted,
            line_bytes_max: limits.log_line_bytes_max,
            lines_per_second_max: limits.log_lines_per_second_max,
            second: Instant::now(),
            lines: 0,
            left_out: 0,
            last_words: VecDeque::new(),
            unfinished: String::new(),
        }
    }

    /// One line of the guest.
    pub(crate) fn say(&mut self, level: Level, message: &str) {
        if matches!(level, Level::Warn | Level::Error) {
            self.remember(message);
        }
        for (level, line) in self.pass(level, message, Instant::now()) {
            emit(&self.plugin, level, &line);
        }
    }

    /// The lines that may be logged now: none, the message, or a count of those left out before it.
    fn pass(&mut self, level: Level, message: &str, now: Instant) -> Vec<(Level, String)> {
        if !self.granted {
            return Vec::new();
        }
        let mut lines = Vec::new();
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            if self.left_out > 0 {
                lines.push((Level::Warn, format!("{} log lines left out", self.left_out)));
            }
            (self.second, self.lines, self.left_out) = (now, 0, 0);
        }
        if self.lines >= self.lines_per_second_max {
            self.left_out += 1;
        } else {
            self.lines += 1;
            lines.push((level, one_line(message, self.line_bytes_max)));
        }
        lines
    }

    fn remember(&mut self, message: &str) {
        self.last_words.push_back(one_line(message, LAST_WORDS_BYTES_MAX));
        let mut bytes: usize = self.last_words.iter().map(|line| line.len() + WORDS_BETWEEN.len()).sum();
        while bytes > LAST_WORDS_BYTES_MAX && self.last_words.len() > 1 {
            bytes -= self.last_words.pop_front().map_or(0, |line| line.len() + WORDS_BETWEEN.len());
        }
    }

    /// Warnings, errors and standard error belong to the call that wrote them.
    pub(crate) fn forget_last_words(&mut self) {
        self.last_words.clear();
    }

    /// The last warnings, errors and lines of standard error since [`Voice::forget_last_words`], as many as fit.
    pub(crate) fn last_words(&mut self) -> Option<String> {
        let unfinished = std::mem::take(&mut self.unfinished);
        if !unfinished.trim().is_empty() {
            self.remember(unfinished.trim_end());
        }
        if self.last_words.is_empty() {
            return None;
        }
        Some(Vec::from_iter(self.last_words.iter().map(String::as_str)).join(WORDS_BETWEEN))
    }
}

fn emit(plugin: &str, level: Level, line: &str) {
    match level {
        Level::Trace => tracing::trace!(target: "cosmos_plugin::guest", plugin, "{line}"),
        Level::Debug => tracing::debug!(target: "cosmos_plugin::guest", plugin, "{line}"),
        Level::Info => tracing::info!(target: "cosmos_plugin::guest", plugin, "{line}"),
        Level::Warn => tracing::warn!(target: "cosmos_plugin::guest", plugin, "{line}"),
        Level::Error => tracing::error!(target: "cosmos_plugin::guest", plugin, "{line}"),
    }
}

/// Standard output or error of a WASI guest, line by line into its voice.
#[derive(Clone)]
pub(crate) struct GuestStream {
    voice: SharedVoice,
    level: Level,
    /// The unfinished line; never longer than a log line.
    pending: Arc<Mutex<Vec<u8>>>,
}

impl GuestStream {
    pub(crate) fn new(voice: SharedVoice, level: Level) -> Self {
        Self { voice, level, pending: Arc::default() }
    }

    fn take(&self, bytes: &[u8]) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let mut voice = lock(&self.voice);
        for chunk in bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = chunk.strip_suffix(b"\n").unwrap_or(chunk);
            let room = voice.line_bytes_max.saturating_sub(pending.len());
            pending.extend_from_slice(&line[..line.len().min(room)]);
            if line.len() < chunk.len() {
                let text = String::from_utf8_lossy(&pending);
                if !text.trim().is_empty() {
                    voice.say(self.level, text.trim_end());
                }
                pending.clear();
            }
        }
        if self.level == Level::Error {
            voice.unfinished = String::from_utf8_lossy(&pending).into_owned();
        }
    }
}

/// Bytes that a guest may write at once; the stream never blocks.
const WRITE_BYTES_MAX: usize = 64 << 10;

#[async_trait]
impl Pollable for GuestStream {
    async fn ready(&mut self) {}
}

#[async_trait]
impl OutputStream for GuestStream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.take(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_BYTES_MAX)
    }
}

impl IsTerminal for GuestStream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestStream {
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl tokio::io::AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.take(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_escaped_and_cut_at_a_character() {
        assert_eq!(one_line("a\tb\n\u{1b}[31m\u{202e}ü", 100), "a\\tb\\n\\u{1b}[31m\\u{202e}ü");
        assert_eq!(one_line("üüü", 3), "ü… (4 bytes left out)");
        assert_eq!(one_line("", 0), "");
    }

    #[test]
    fn a_flood_is_counted_not_logged() {
        let limits = Limits { log_lines_per_second_max: 2, ..Limits::default() };
        let mut voice = Voice::new("p", true, &limits);
        let start = voice.second;
        let passed: usize = (0..10).map(|_| voice.pass(Level::Info, "x", start).len()).sum();
        assert_eq!(passed, 2);
        let later = voice.pass(Level::Info, "y", start + Duration::from_secs(1));
        assert_eq!(later, [(Level::Warn, "8 log lines left out".to_string()), (Level::Info, "y".to_string())]);
    }

    #[test]
    fn an_ungranted_voice_is_silent_but_leaves_last_words() {
        let mut voice = Voice::new("p", false, &Limits::default());
        assert!(voice.pass(Level::Error, "x", Instant::now()).is_empty());
        voice.say(Level::Error, "panicked at\n3");
        assert_eq!(voice.last_words().as_deref(), Some("panicked at\\n3"));
        voice.forget_last_words();
        assert_eq!(voice.last_words(), None);
    }

    #[test]
    fn standard_error_is_split_into_lines_of_bounded_length() {
        let limits = Limits { log_line_bytes_max: 5, ..Limits::default() };
        let voice: SharedVoice = Arc::new(Mutex::new(Voice::new("p", false, &limits)));
        let stream = GuestStream::new(voice.clone(), Level::Error);
        stream.take(b"abc");
        stream.take(b"defgh\nnext\n\n");
        assert_eq!(lock(&voice).last_words().as_deref(), Some("abcde / next"));
        lock(&voice).forget_last_words();
        stream.take(b"\xff\xff123456789\nhalf");
        assert_eq!(lock(&voice).last_words().as_deref(), Some("\u{fffd}\u{fffd}123 / half"));
        lock(&voice).forget_last_words();
        assert_eq!(lock(&voice).last_words(), None);
    }

    #[test]
    fn of_a_long_traceback_the_last_lines_are_kept() {
        let mut voice = Voice::new("p", false, &Limits::default());
        for number in 0..200 {
            voice.say(Level::Error, &format!("  File \"app.py\", line {number}"));
        }
        voice.say(Level::Error, "ValueError: no");
        let words = voice.last_words().unwrap();
        assert!(words.ends_with("line 199 / ValueError: no"), "{words}");
        assert!(words.len() <= LAST_WORDS_BYTES_MAX && words.len() > 600, "{}", words.len());
    }
}
