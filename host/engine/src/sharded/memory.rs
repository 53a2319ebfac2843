//! Counting what a rank holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes held now and at most.
#[derive(Debug, Default)]
pub(super) struct Meter {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl Meter {
    /// Counts `bytes` until what is returned is dropped.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Held {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
        Held { bytes, meter: self.clone() }
    }

    pub fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }
}

/// Bytes that are counted as long as this lives.
#[derive(Debug)]
pub(super) struct Held {
    bytes: usize,
    meter: Arc<Meter>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.meter.now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
