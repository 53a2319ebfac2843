//! Compiled components on disk, so that a Python plugin's half minute of compiling happens once.
//!
//! Compiled code runs outside the sandbox, so an entry is only used when it was written by this user, by nobody else,
//! and is complete.

use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use wasmtime::Engine;

use crate::PluginError;

/// The code comes first, so that it can be mapped; this and the checksum follow it.
const MAGIC: &[u8; 16] = b"cosmos-plugin 2\n";
const TRAILER_BYTES: usize = MAGIC.len() + 4;
/// Read at once while an entry is checked; small enough to stay in the processor's cache.
const CHUNK_BYTES: usize = 256 << 10;
/// Largest entry that is read back: the compiled form of the largest component.
const ENTRY_BYTES_MAX: u64 = 2 << 30;
/// The oldest entries beyond this many are removed.
const ENTRIES_MAX: usize = 64;
const SUFFIX: &str = "cosmos-plugin";

/// A folder of compiled components.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Opens or makes the folder.
    pub(crate) fn open(folder: PathBuf) -> Result<Self, PluginError> {
        let refused = |detail: String| PluginError::CacheFolder { path: folder.clone(), detail };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|e| refused(e.to_string()))?;
        // The link itself is judged, not its target: whoever owns it can point it elsewhere later.
        let metadata = fs::symlink_metadata(&folder).map_err(|e| refused(e.to_string()))?;
        if !metadata.is_dir() {
            return Err(refused("it is not a folder".into()));
        }
        private(&metadata).map_err(refused)?;
        Ok(Self { folder })
    }

    fn entry(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.{SUFFIX}"))
    }

    /// The compiled code under `key`, when there is any that can be trusted. Anything else is reported and ignored:
    /// the component is compiled again.
    pub(crate) fn read(&self, key: &str) -> Option<Entry> {
        let path = self.entry(key);
        match open_entry(&path, key) {
            Ok(entry) => entry,
            Err(detail) => {
                tracing::warn!("ignored `{}` in the plugin cache: {detail}", path.display());
                None
            }
        }
    }

    /// Keeps `code` under `key`. A full disk only costs the next start's time, so this reports and goes on.
    pub(crate) fn write(&self, key: &str, code: &[u8]) {
        if let Err(error) = self.write_entry(key, code) {
            tracing::warn!("cannot write to the plugin cache `{}`: {error}", self.folder.display());
        }
        self.prune();
    }

    fn write_entry(&self, key: &str, code: &[u8]) -> std::io::Result<()> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let temporary = self.folder.join(format!("{key}.{}-{serial}.tmp", std::process::id()));
        let written = (|| {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(code)?;
            file.write_all(MAGIC)?;
            file.write_all(&crc32c::crc32c_append(seed(key), code).to_le_bytes())?;
            fs::rename(&temporary, self.entry(key))
        })();
        if written.is_err() {
            // Nothing more can be done about a file that cannot be removed either.
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    fn prune(&self) {
        let Ok(folder) = fs::read_dir(&self.folder) else { return };
        let mut entries: Vec<(SystemTime, PathBuf)> = folder
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|suffix| suffix == SUFFIX))
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        entries.sort();
        let surplus = entries.len().saturating_sub(ENTRIES_MAX);
        for (_, path) in &entries[..surplus] {
            // Another process may have removed it already.
            let _ = fs::remove_file(path);
        }
    }
}

/// What compiled code depends on: the component, the compiler's version and settings, and this machine's CPU.
pub(crate) fn key(component_sha256: &str, engine: &Engine) -> String {
    struct Feed(Sha256);
    impl Hasher for Feed {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
        fn finish(&self) -> u64 {
            0
        }
    }
    let mut feed = Feed(Sha256::new());
    // The entries' own format.
    MAGIC.hash(&mut feed);
    component_sha256.hash(&mut feed);
    // The compiler's version is pinned in the workspace; the hash below holds its settings and the CPU's features.
    "wasmtime 48.0.8".hash(&mut feed);
    engine.precompile_compatibility_hash().hash(&mut feed);
    hex(&feed.0.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An entry found under another name has another checksum.
fn seed(key: &str) -> u32 {
    crc32c::crc32c(key.as_bytes())
}

/// An open entry that was checked.
#[derive(Debug)]
pub(crate) struct Entry(fs::File);

impl Entry {
    /// A name for the very file that was checked, whatever has happened to its own name since.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

fn open_entry(path: &Path, key: &str) -> Result<Option<Entry>, String> {
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    // The open file is judged, so that it cannot be exchanged between the look and the reading.
    let metadata = file.metadata().map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a plain file".into());
    }
    private(&metadata)?;
    if metadata.len() > ENTRY_BYTES_MAX {
        return Err(format!("it has {} bytes", metadata.len()));
    }
    check_sum(&mut file, metadata.len(), key)?;
    Ok(Some(Entry(file)))
}

/// Who wrote the entry is settled: nobody but this user can have. The checksum is against accidents, such as a disk
/// that was full or a machine that lost power, so that a fast one does.
fn check_sum(file: &mut fs::File, bytes: u64, key: &str) -> Result<(), String> {
    let incomplete = || "it is no entry of this cache, or truncated".to_owned();
    let mut left = bytes.checked_sub(TRAILER_BYTES as u64).ok_or_else(incomplete)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut sum = seed(key);
    while left > 0 {
        let part = &mut chunk[..left.min(CHUNK_BYTES as u64) as usize];
        file.read_exact(part).map_err(|e| e.to_string())?;
        sum = crc32c::crc32c_append(sum, part);
        left -= part.len() as u64;
    }
    let mut trailer = [0; TRAILER_BYTES];
    file.read_exact(&mut trailer).map_err(|e| e.to_string())?;
    let (magic, written) = trailer.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(incomplete());
    }
    if written != sum.to_le_bytes() {
        return Err("its checksum does not match".into());
    }
    Ok(())
}

/// Owned by this user, and nobody else can write to it.
fn private(metadata: &fs::Metadata) -> Result<(), String> {
    let user = effective_user();
    if metadata.uid() != user {
        return Err(format!("it belongs to user {}, not to {user}", metadata.uid()));
    }
    let mode = metadata.permissions().mode();
    if mode & 0o022 != 0 {
        return Err(format!("others may write to it (mode {:o})", mode & 0o7777));
    }
    Ok(())
}

#[allow(unsafe_code)]
fn effective_user() -> u32 {
    // SAFETY: `geteuid` takes nothing, touches no memory of ours and cannot fail.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn read(cache: &Cache, key: &str) -> Option<Vec<u8>> {
        cache.read(key).map(|entry| fs::read(entry.path()).unwrap())
    }

    #[test]
    fn entries_come_back_only_whole_private_and_under_their_key() {
        let outer = tempfile::tempdir().unwrap();
        let cache = Cache::open(outer.path().join("a/b")).unwrap();
        assert_eq!(fs::metadata(&cache.folder).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(read(&cache, "k"), None);
        cache.write("k", b"code");
        let entry = cache.read("k").unwrap();
        cache.write("k", b"other");
        assert!(fs::read(entry.path()).unwrap().starts_with(b"code"));
        cache.write("k", b"code");

        mode(&cache.entry("k"), 0o620);
        assert_eq!(read(&cache, "k"), None);
        mode(&cache.entry("k"), 0o600);
        assert!(cache.read("k").is_some());

        fs::rename(cache.entry("k"), cache.entry("other")).unwrap();
        assert_eq!(read(&cache, "other"), None);

        cache.write("k", b"code");
        let mut bytes = fs::read(cache.entry("k")).unwrap();
        bytes[1] ^= 1;
        fs::write(cache.entry("k"), &bytes).unwrap();
        assert_eq!(read(&cache, "k"), None);
        fs::write(cache.entry("k"), &bytes[..TRAILER_BYTES - 1]).unwrap();
        assert_eq!(read(&cache, "k"), None);

        fs::write(outer.path().join("target"), b"x").unwrap();
        fs::remove_file(cache.entry("k")).unwrap();
        std::os::unix::fs::symlink(outer.path().join("target"), cache.entry("k")).unwrap();
        assert_eq!(read(&cache, "k"), None);
        cache.write("k", b"code");
        assert!(cache.read("k").is_some());
        assert_eq!(fs::read(outer.path().join("target")).unwrap(), b"x");
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("shared");
        fs::create_dir(&folder).unwrap();
        mode(&folder, 0o777);
        let error = Cache::open(folder.clone()).unwrap_err();
        assert!(error.to_string().contains("mode 777"), "{error}");
        assert!(error.hint().unwrap().contains("chmod 700"));
        mode(&folder, 0o700);
        Cache::open(folder.clone()).unwrap();
        let link = outer.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert!(Cache::open(link).is_err());
        fs::write(outer.path().join("file"), b"").unwrap();
        assert!(Cache::open(outer.path().join("file")).is_err());
    }

    #[test]
    fn the_oldest_entries_are_removed() {
        let outer = tempfile::tempdir().unwrap();
        let cache = Cache::open(outer.path().join("c")).unwrap();
        for number in 0..ENTRIES_MAX + 3 {
            cache.write(&format!("{number:03}"), b"code");
        }
        let kept = fs::read_dir(&cache.folder).unwrap().count();
        assert_eq!(kept, ENTRIES_MAX);
        assert!(cache.read(&format!("{:03}", ENTRIES_MAX + 2)).is_some());
    }
}
