//! Buffers that are used again: activations come and go with every tile, and fresh pages from the system cost more than
//! the arithmetic of a small model.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Bytes that may lie idle for later use.
const IDLE_BYTES_MAX: usize = 768 << 20;

/// Bytes that a thread keeps to itself: what it wrote last is in its own cache, and nobody else need be asked.
const OWN_BYTES_MAX: usize = 1 << 20;

/// Idle memory, shortest first.
struct Idle {
    buffers: Vec<Vec<f32>>,
    bytes: usize,
}

impl Idle {
    const fn new() -> Self {
        Self { buffers: Vec::new(), bytes: 0 }
    }

    /// Memory of at least `len` numbers, and not much more: that is left for those who need it.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let at = self.buffers.partition_point(|memory| memory.len() < len);
        self.buffers.get(at).filter(|memory| memory.len() <= 2 * len + 1024)?;
        let memory = self.buffers.remove(at);
        self.bytes -= 4 * memory.len();
        Some(memory)
    }

    /// Keeps `memory` if no more than `bytes_max` are idle with it, or gives it back.
    fn keep(&mut self, memory: Vec<f32>, bytes_max: usize) -> Option<Vec<f32>> {
        let bytes = 4 * memory.len();
        if self.bytes + bytes > bytes_max {
            return Some(memory);
        }
        let at = self.buffers.partition_point(|other| other.len() < memory.len());
        self.buffers.insert(at, memory);
        self.bytes += bytes;
        None
    }
}

static IDLE: Mutex<Idle> = Mutex::new(Idle::new());

thread_local! {
    static OWN: RefCell<Idle> = const { RefCell::new(Idle::new()) };
}

/// A buffer of numbers; its memory is kept for the next one when it is dropped.
#[derive(Debug, Default)]
pub struct Buffer {
    memory: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// `len` numbers that hold anything: whoever asks overwrites all of them.
    pub(super) fn dirty(len: usize) -> Self {
        let own = OWN.with_borrow_mut(|own| own.take(len));
        // A poisoned lock still holds whole buffers.
        let shared = || IDLE.lock().unwrap_or_else(PoisonError::into_inner).take(len);
        let memory = own.or_else(shared).unwrap_or_else(|| vec![0.0; len]);
        Self { memory, len }
    }

    /// `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let mut buffer = Self::dirty(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of `values`.
    pub(super) fn of(values: &[f32]) -> Self {
        let mut buffer = Self::dirty(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if memory.is_empty() {
            return;
        }
        // A thread that is ending has nothing of its own any more.
        let rest = OWN.try_with(|own| own.borrow_mut().keep(memory, OWN_BYTES_MAX)).unwrap_or_default();
        if let Some(memory) = rest {
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).keep(memory, IDLE_BYTES_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_have_the_length_that_was_asked_for() {
        let first = Buffer::of(&[1.0; 5000]);
        drop(first);
        let second = Buffer::dirty(4000);
        assert_eq!(second.len(), 4000);
        assert!(Buffer::zeros(4500).iter().all(|x| *x == 0.0));
        assert_eq!(&*Buffer::of(&[1.0, 2.0]), [1.0, 2.0]);
        assert!(Buffer::zeros(0).is_empty());
    }
}
