//! `control.json`: where a run's controller listens.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{ControlError, Result};
use crate::token::Token;

const NAME: &str = "control.json";
const BYTES_MAX: u64 = 16 << 10;

/// Where a run's controller listens, and with which token; readable by its owner alone.
#[derive(Debug, Clone)]
pub struct ControlFile {
    /// `http://host:port`.
    pub url: String,
    /// The run's token.
    pub token: Token,
    /// The controller's process.
    pub pid: u32,
}

#[derive(Serialize, Deserialize)]
struct Content {
    url: String,
    token: String,
    pid: u32,
}

impl ControlFile {
    /// The file's path in a run folder.
    pub fn path(run_folder: &Path) -> PathBuf {
        run_folder.join(NAME)
    }

    /// Reads it.
    pub fn read(run_folder: &Path) -> Result<Self> {
        let path = Self::path(run_folder);
        let mut text = String::new();
        File::open(&path)
            .and_then(|file| file.take(BYTES_MAX + 1).read_to_string(&mut text))
            .map_err(|source| ControlError::Io { doing: "read", path: path.clone(), source })?;
        let bad = |reason: String| ControlError::ControlFile { path: path.clone(), reason };
        if text.len() as u64 > BYTES_MAX {
            return Err(bad(format!("larger than {BYTES_MAX} bytes")));
        }
        // serde's message would quote the value, which may be the token.
        let content: Content = serde_json::from_str(&text)
            .map_err(|e| bad(format!("not JSON with url, token and pid (line {})", e.line())))?;
        if !content.url.starts_with("http://") || content.url.len() > 512 {
            return Err(bad("`url` is no `http://` address".into()));
        }
        let token = Token::parse(&content.token).map_err(|e| bad(e.to_string()))?;
        Ok(Self { url: content.url, token, pid: content.pid })
    }

    /// Writes it by rename, with mode 0600.
    pub fn write(&self, run_folder: &Path) -> Result<()> {
        let path = Self::path(run_folder);
        let new = run_folder.join(format!(".{NAME}.{}", self.pid));
        let content = Content { url: self.url.clone(), token: self.token.reveal().into(), pid: self.pid };
        let text = serde_json::to_string_pretty(&content).unwrap_or_default();
        let write = || {
            // A left-over of this name may have another mode.
            let _ = fs::remove_file(&new);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| ControlError::Io { doing: "write", path: path.clone(), source })
    }

    /// Takes it away if it is still this controller's.
    pub fn remove(&self, run_folder: &Path) {
        if Self::read(run_folder).is_ok_and(|file| file.pid == self.pid && file.url == self.url) {
            let _ = fs::remove_file(Self::path(run_folder));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn written_for_its_owner_alone_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = ControlFile { url: "http://127.0.0.1:7".into(), token: Token::random().unwrap(), pid: 5 };
        file.write(folder.path()).unwrap();
        file.write(folder.path()).unwrap();
        let mode = fs::metadata(ControlFile::path(folder.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = ControlFile::read(folder.path()).unwrap();
        assert_eq!((read.url.as_str(), read.pid), ("http://127.0.0.1:7", 5));
        assert!(file.token.admits(read.token.reveal().as_bytes()));
        ControlFile { pid: 6, ..file.clone() }.remove(folder.path());
        assert!(ControlFile::path(folder.path()).exists());
        file.remove(folder.path());
        assert!(!ControlFile::path(folder.path()).exists());
    }

    #[test]
    fn garbage_is_refused_without_quoting_it() {
        let folder = tempfile::tempdir().unwrap();
        let secret = "s".repeat(40);
        let long = " ".repeat(20 << 10);
        for text in [
            "",
            "{}",
            "[1]",
            &long,
            &format!("{{\"url\": \"http://a\", \"token\": \"{secret}\", \"pid\": \"{secret}\"}}"),
        ] {
            fs::write(ControlFile::path(folder.path()), text).unwrap();
            let error = ControlFile::read(folder.path()).unwrap_err();
            assert!(matches!(error, ControlError::ControlFile { .. }), "{error}");
            assert!(!error.to_string().contains(&secret));
        }
    }
}
