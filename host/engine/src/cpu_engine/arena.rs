//! Buffers that are used again: activations come and go with every tile, and fresh pages from the system cost more than
//! the arithmetic of a small model.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Bytes that may lie idle for later use.
const IDLE_BYTES_MAX: usize = 768 << 20;

/// Idle memory, shortest first.
struct Idle {
    buffers: Vec<Vec<f32>>,
    bytes: usize,
}

static IDLE: Mutex<Idle> = Mutex::new(Idle { buffers: Vec::new(), bytes: 0 });

/// A buffer of numbers; its memory is kept for the next one when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// `len` numbers that hold anything: whoever asks overwrites all of them.
    pub(super) fn dirty(len: usize) -> Self {
        // A poisoned lock still holds whole buffers.
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let at = idle.buffers.partition_point(|memory| memory.len() < len);
        // One that is much larger is left for those who need it.
        if idle.buffers.get(at).is_some_and(|memory| memory.len() <= 2 * len + 1024) {
            let memory = idle.buffers.remove(at);
            idle.bytes -= 4 * memory.len();
            return Self { memory, len };
        }
        drop(idle);
        Self { memory: vec![0.0; len], len }
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
        let bytes = 4 * memory.len();
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes == 0 || idle.bytes + bytes > IDLE_BYTES_MAX {
            return;
        }
        let at = idle.buffers.partition_point(|other| other.len() < memory.len());
        idle.buffers.insert(at, memory);
        idle.bytes += bytes;
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
