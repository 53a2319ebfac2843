//! Keys and values of sequences in pages. Sequences with the same beginning share its pages; one that writes into a
//! shared page gets its own copy first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cosmos_kernels::attention::Heads;
use cosmos_kernels::page::{PAGE_TOKENS, Page};

use crate::{EngineError, Result};

/// Bytes of pages that a pool without sequences keeps.
const IDLE_BYTES_MAX: usize = 128 << 20;

/// Where pages come from and go to.
pub(super) struct Pool {
    heads: Heads,
    free: Mutex<Vec<Page>>,
    taken: AtomicUsize,
    pages_max: usize,
}

/// A page that goes back to its pool.
pub(super) struct Held {
    page: Option<Page>,
    pool: Arc<Pool>,
}

impl Held {
    fn page(&self) -> &Page {
        self.page.as_ref().expect("taken only when dropped")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(page) = self.page.take() {
            // A poisoned lock still holds whole pages.
            self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(page);
            self.pool.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Pool {
    /// A pool that hands out at most `bytes_max`.
    pub fn new(heads: Heads, bytes_max: usize) -> Arc<Self> {
        let pages_max = (bytes_max / Page::bytes(heads)).max(1);
        Arc::new(Self { heads, free: Mutex::new(Vec::new()), taken: AtomicUsize::new(0), pages_max })
    }

    fn take(self: &Arc<Self>) -> Result<Held> {
        if self.taken.fetch_add(1, Ordering::Relaxed) >= self.pages_max {
            self.taken.fetch_sub(1, Ordering::Relaxed);
            let mib = (self.pages_max * Page::bytes(self.heads)) >> 20;
            return Err(EngineError::invalid(
                format!("the keys and values of running sequences fill the {mib} MiB that they may take"),
                "lower `rollout.max_response_length` or shorten the prompts, or run on a machine with more memory",
            ));
        }
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Ok(Held { page: Some(free.unwrap_or_else(|| Page::new(self.heads))), pool: self.clone() })
    }

    /// Tokens that fit into all pages.
    pub fn tokens_max(&self) -> usize {
        self.pages_max.saturating_mul(PAGE_TOKENS)
    }

    /// Gives most of the memory of pages that nothing uses back; a little is kept for the next rollout.
    pub fn trim(&self) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.truncate(IDLE_BYTES_MAX / Page::bytes(self.heads));
        free.shrink_to_fit();
    }
}

/// Keys and values of one sequence in one block.
pub struct Cache {
    pages: Vec<Arc<Held>>,
    len: usize,
    pool: Arc<Pool>,
}

impl Cache {
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self { pages: Vec::new(), len: 0, pool }
    }

    /// Tokens held.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        self.pages.clear();
        self.len = 0;
    }

    /// Shares what `from` holds.
    pub(super) fn share(&mut self, from: &Self) {
        self.pages.clone_from(&from.pages);
        self.len = from.len;
    }

    /// Appends a token.
    pub(super) fn push(&mut self, keys: &[f32], values: &[f32]) -> Result<()> {
        let (index, token) = (self.len / PAGE_TOKENS, self.len % PAGE_TOKENS);
        if index == self.pages.len() {
            self.pages.push(Arc::new(self.pool.take()?));
        }
        if Arc::get_mut(&mut self.pages[index]).is_none() {
            let mut own = self.pool.take()?;
            if let Some(page) = &mut own.page {
                page.copy_from(self.pages[index].page());
            }
            self.pages[index] = Arc::new(own);
        }
        if let Some(page) = Arc::get_mut(&mut self.pages[index]).and_then(|held| held.page.as_mut()) {
            page.put(self.pool.heads, token, keys, values);
        }
        self.len += 1;
        Ok(())
    }

    /// What attention over all tokens and the one that comes next reads, piece by piece.
    pub(super) fn read(&self) -> impl Iterator<Item = &[f32]> {
        let pages = self.pages().enumerate();
        pages.flat_map(|(index, page)| page.read(self.pool.heads, self.len + 1 - index * PAGE_TOKENS))
    }

    /// The pages in order.
    pub(super) fn pages(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter().map(|held| held.page())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { heads: 1, kv_heads: 1, dim: 2 };

    #[test]
    fn shared_pages_are_copied_by_whoever_writes() {
        let pool = Pool::new(HEADS, 4 * Page::bytes(HEADS));
        let mut first = Cache::new(pool.clone());
        for token in 0..40 {
            first.push(&[token as f32; 2], &[1.0; 2]).unwrap();
        }
        let mut second = Cache::new(pool.clone());
        second.share(&first);
        assert_eq!(pool.taken.load(Ordering::Relaxed), 2);
        second.push(&[7.0; 2], &[2.0; 2]).unwrap();
        assert_eq!((pool.taken.load(Ordering::Relaxed), first.len(), second.len()), (3, 40, 41));
        assert!(Arc::ptr_eq(&first.pages[0], &second.pages[0]) && !Arc::ptr_eq(&first.pages[1], &second.pages[1]));
        first.clear();
        assert_eq!(pool.taken.load(Ordering::Relaxed), 2);
        drop(second);
        assert_eq!(pool.taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_pool_says_so() {
        let pool = Pool::new(HEADS, 2 * Page::bytes(HEADS));
        let mut cache = Cache::new(pool);
        for _ in 0..2 * PAGE_TOKENS {
            cache.push(&[0.0; 2], &[0.0; 2]).unwrap();
        }
        let error = cache.push(&[0.0; 2], &[0.0; 2]).unwrap_err();
        assert!(error.to_string().contains("MiB") && error.hint().is_some());
        cache.clear();
        cache.push(&[0.0; 2], &[0.0; 2]).unwrap();
    }
}
