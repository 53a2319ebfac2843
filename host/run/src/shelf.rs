//! Where files lie that one role writes and others read: published weights, teachers' heads.
//!
//! A shelf keeps bytes under plain names. Each file is complete or not there: a folder replaces by rename. Whether bytes
//! are the right ones is for the reader to check, by the hashes that travel with them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cosmos_broker::Store;

use crate::error::{Result, RunError};

/// Bytes under plain names.
pub trait Shelf: Send + Sync {
    /// Puts a file there, in the place of one of that name. When it fails, what was there before is untouched.
    ///
    /// # Errors
    /// Those of the disk or the transport; a full one among them.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()>;
    /// A file's bytes; none when it is not there.
    ///
    /// # Errors
    /// A file longer than `bytes_max`, and those of the disk or the transport.
    fn get(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>>;
    /// Takes a file away; nothing happens when it is not there.
    ///
    /// # Errors
    /// Those of the disk or the transport.
    fn remove(&self, name: &str) -> Result<()>;
    /// Where it is, for messages.
    fn place(&self) -> String;
}

/// A folder, possibly shared between machines.
pub struct FolderShelf {
    root: PathBuf,
}

/// Tells files apart that threads of this process write at the same time.
static WRITES: AtomicU64 = AtomicU64::new(0);

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> RunError + '_ {
    move |source| RunError::Io { path: path.to_path_buf(), source }
}

impl FolderShelf {
    /// A shelf in `root`, which is made when it is not there.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).map_err(io(root))?;
        Ok(Self { root: root.to_path_buf() })
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        let plain = !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !plain {
            return Err(RunError::shared(self.place(), format!("`{name}` is no plain name of a file"), ""));
        }
        Ok(self.root.join(name))
    }
}

impl Shelf for FolderShelf {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(name)?;
        let mark = WRITES.fetch_add(1, Ordering::Relaxed);
        let aside = self.root.join(format!(".{name}-{}-{mark}", std::process::id()));
        let written = (|| {
            let mut file = File::create(&aside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&aside, &path)?;
            File::open(&self.root)?.sync_all()
        })();
        if written.is_err() {
            // A full disk must not be filled further by the leftovers.
            let _ = fs::remove_file(&aside);
        }
        written.map_err(io(&path))
    }

    fn get(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        let path = self.path(name)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(&path)(error)),
        };
        let bytes = file.metadata().map_err(io(&path))?.len();
        if bytes > bytes_max {
            return Err(too_long(self.place(), name, bytes, bytes_max));
        }
        let mut read = Vec::with_capacity(bytes as usize);
        // One more than is allowed, so that a file that grows meanwhile is seen.
        file.take(bytes_max.saturating_add(1)).read_to_end(&mut read).map_err(io(&path))?;
        if read.len() as u64 > bytes_max {
            return Err(too_long(self.place(), name, read.len() as u64, bytes_max));
        }
        Ok(Some(read))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(&path)(error)),
            _ => Ok(()),
        }
    }

    fn place(&self) -> String {
        self.root.display().to_string()
    }
}

/// A shelf in the broker's store, for machines without a common folder.
pub struct StoreShelf {
    store: Arc<dyn Store>,
    /// Before every key.
    prefix: String,
    keep_ms_max: u64,
}

impl StoreShelf {
    /// A shelf under `prefix`, whose files are kept for `keep_ms_max` after they were put.
    pub fn new(store: Arc<dyn Store>, prefix: &str, keep_ms_max: u64) -> Self {
        Self { store, prefix: prefix.to_string(), keep_ms_max }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }
}

impl Shelf for StoreShelf {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.store.put(&self.key(name), bytes, self.keep_ms_max)?)
    }

    fn get(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        let found = self.store.get_many(&[self.key(name)])?.pop().flatten();
        match found {
            Some(bytes) if bytes.len() as u64 > bytes_max => {
                Err(too_long(self.place(), name, bytes.len() as u64, bytes_max))
            }
            found => Ok(found),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        Ok(self.store.remove(&[self.key(name)])?)
    }

    fn place(&self) -> String {
        format!("the broker's store, `{}`", self.prefix)
    }
}

pub(crate) fn too_long(place: String, name: &str, bytes: u64, bytes_max: u64) -> RunError {
    RunError::shared(
        place,
        format!("`{name}` has {bytes} bytes where at most {bytes_max} belong"),
        "it is no file of this run: remove it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_what_it_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = FolderShelf::open(&dir.path().join("a/b")).unwrap();
        assert_eq!(shelf.get("x.json", 10).unwrap(), None);
        shelf.put("x.json", b"one").unwrap();
        shelf.put("x.json", b"other").unwrap();
        assert_eq!(shelf.get("x.json", 5).unwrap().as_deref(), Some(&b"other"[..]));
        let error = shelf.get("x.json", 4).unwrap_err().to_string();
        assert!(error.contains("`x.json` has 5 bytes where at most 4"), "{error}");
        shelf.remove("x.json").unwrap();
        shelf.remove("x.json").unwrap();
        for name in ["", ".x", "../x", "a/b", "a\\b", "a b"] {
            assert!(shelf.put(name, b"").is_err() && shelf.get(name, 1).is_err() && shelf.remove(name).is_err());
        }
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0, "nothing is left over");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = FolderShelf::open(dir.path()).unwrap();
        // A folder stands where the file should be renamed to.
        fs::create_dir_all(dir.path().join("taken/inside")).unwrap();
        let error = shelf.put("taken", b"new").unwrap_err().to_string();
        assert!(error.contains("taken"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_store_is_a_shelf_too() {
        let store = Arc::new(cosmos_broker::MemoryStore::default());
        let shelf = StoreShelf::new(store.clone(), "run/weights", 60_000);
        shelf.put("v1", b"large").unwrap();
        shelf.put("v1", b"small").unwrap();
        assert_eq!(shelf.get("v1", 5).unwrap().as_deref(), Some(&b"small"[..]));
        assert!(shelf.get("v1", 4).unwrap_err().to_string().contains("where at most 4"));
        assert_eq!(StoreShelf::new(store, "run/teachers", 60_000).get("v1", 5).unwrap(), None);
        shelf.remove("v1").unwrap();
        shelf.remove("v1").unwrap();
        assert_eq!(shelf.get("v1", 5).unwrap(), None);
    }
}
