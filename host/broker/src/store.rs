//! Blobs between roles by key: finished completions, the teacher's head, weights where there is no shared folder.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::{BrokerError, Clock, Result, SystemClock};

pub(crate) const BLOB_STORE: &str = "blobs (bytes)";

/// How much a store takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// Bytes of a blob.
    pub blob_bytes_max: u64,
    /// Bytes of all blobs, for a store that counts them; Redis has its `maxmemory`.
    pub total_bytes_max: u64,
    /// A larger blob is kept in parts of so many bytes.
    pub part_bytes_max: usize,
    /// Bytes of a key.
    pub key_bytes_max: usize,
}

impl Default for StoreLimits {
    fn default() -> StoreLimits {
        StoreLimits { blob_bytes_max: 256 << 30, total_bytes_max: 1 << 40, part_bytes_max: 8 << 20, key_bytes_max: 512 }
    }
}

impl StoreLimits {
    pub(crate) fn check_key(&self, key: &str) -> Result<()> {
        if key.len() > self.key_bytes_max {
            let shown = key.chars().take(40).collect::<String>() + "…";
            let (bytes, max) = (key.len() as u64, self.key_bytes_max as u64);
            return Err(BrokerError::TooLarge { key: shown, bytes, max });
        }
        Ok(())
    }

    pub(crate) fn check(&self, key: &str, bytes: usize) -> Result<()> {
        self.check_key(key)?;
        if bytes as u64 > self.blob_bytes_max {
            return Err(BrokerError::TooLarge { key: key.into(), bytes: bytes as u64, max: self.blob_bytes_max });
        }
        Ok(())
    }
}

/// Blobs by key, for a time. A reader gets a whole blob or none, never a mixture of two.
pub trait Store: Send + Sync {
    /// Keeps a blob for `keep_ms_max`. One of the same key is replaced, so that doing it twice is doing it once.
    ///
    /// # Errors
    /// `TooLarge`, `QueueFull` or `ServerFull` when there is no room, those of the transport.
    fn put(&self, key: &str, bytes: &[u8], keep_ms_max: u64) -> Result<()>;

    /// The blobs of `keys` in their order; none for one that is not there, has expired, or was damaged (which is logged and
    /// counted in [`Store::rejected`]).
    ///
    /// # Errors
    /// Those of the transport.
    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>>;

    /// Lets go of `keys`; one that is not there changes nothing.
    ///
    /// # Errors
    /// Those of the transport.
    fn remove(&self, keys: &[String]) -> Result<()>;

    /// How many damaged or foreign blobs were dropped.
    fn rejected(&self) -> u64 {
        0
    }
}

/// The store inside one process.
pub struct MemoryStore {
    limits: StoreLimits,
    clock: Arc<dyn Clock>,
    blobs: Mutex<Blobs>,
}

#[derive(Default)]
struct Blobs {
    by_key: HashMap<String, Blob>,
    bytes: u64,
}

struct Blob {
    bytes: Arc<[u8]>,
    until_ms: u64,
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore::new(StoreLimits::default())
    }
}

impl MemoryStore {
    /// An empty store on the machine's clock.
    pub fn new(limits: StoreLimits) -> MemoryStore {
        MemoryStore::with_clock(limits, Arc::new(SystemClock::default()))
    }

    /// An empty store on another clock.
    pub fn with_clock(limits: StoreLimits, clock: Arc<dyn Clock>) -> MemoryStore {
        MemoryStore { limits, clock, blobs: Mutex::default() }
    }

    fn blobs(&self) -> MutexGuard<'_, Blobs> {
        self.blobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Blobs {
    fn remove(&mut self, key: &str) {
        if let Some(blob) = self.by_key.remove(key) {
            self.bytes -= blob.bytes.len() as u64;
        }
    }

    fn expire(&mut self, now_ms: u64) {
        self.by_key.retain(|_, blob| blob.until_ms > now_ms);
        self.bytes = self.by_key.values().map(|blob| blob.bytes.len() as u64).sum();
    }
}

impl Store for MemoryStore {
    fn put(&self, key: &str, bytes: &[u8], keep_ms_max: u64) -> Result<()> {
        self.limits.check(key, bytes.len())?;
        let now_ms = self.clock.now_ms();
        let mut blobs = self.blobs();
        // What goes in replaces what is there, which need not fit beside it.
        let free = |blobs: &Blobs| {
            let old = blobs.by_key.get(key).map_or(0, |blob| blob.bytes.len() as u64);
            self.limits.total_bytes_max.saturating_sub(blobs.bytes - old)
        };
        if bytes.len() as u64 > free(&blobs) {
            blobs.expire(now_ms);
        }
        if bytes.len() as u64 > free(&blobs) {
            let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
            let (held, max) = (count(blobs.bytes), count(self.limits.total_bytes_max));
            return Err(BrokerError::QueueFull { queue: BLOB_STORE, held, max, waited_ms: 0 });
        }
        blobs.remove(key);
        blobs.bytes += bytes.len() as u64;
        blobs.by_key.insert(key.into(), Blob { bytes: bytes.into(), until_ms: now_ms.saturating_add(keep_ms_max) });
        Ok(())
    }

    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>> {
        let now_ms = self.clock.now_ms();
        let found: Vec<Option<Arc<[u8]>>> = {
            let blobs = self.blobs();
            let get = |key| blobs.by_key.get(key).filter(|blob| blob.until_ms > now_ms).map(|blob| blob.bytes.clone());
            keys.iter().map(get).collect()
        };
        Ok(found.into_iter().map(|blob| blob.map(|bytes| bytes.to_vec())).collect())
    }

    fn remove(&self, keys: &[String]) -> Result<()> {
        let mut blobs = self.blobs();
        keys.iter().for_each(|key| blobs.remove(key));
        Ok(())
    }
}
