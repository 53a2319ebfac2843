//! Token sequences as models take them.

use crate::{EngineError, Result};

/// Sequences padded on the right to one length.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    /// Token ids, `[b, t]` row-major; padding holds id 0 and is never attended to or scored.
    pub ids_bt: Vec<u32>,
    /// Real length of each row, `[b]`, each at least 1.
    pub lens_b: Vec<usize>,
    /// Padded length.
    pub t: usize,
}

impl TokenBatch {
    /// Pads `sequences` to the longest. Errors on an empty batch or an empty sequence.
    pub fn new(sequences: &[&[u32]]) -> Result<Self> {
        let t = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
        if t == 0 || sequences.iter().any(|s| s.is_empty()) {
            return Err(EngineError::invalid("a batch holds no sequence or an empty one", ""));
        }
        let mut ids_bt = vec![0; t * sequences.len()];
        for (row, sequence) in ids_bt.chunks_exact_mut(t).zip(sequences) {
            row[..sequence.len()].copy_from_slice(sequence);
        }
        Ok(Self { ids_bt, lens_b: sequences.iter().map(|s| s.len()).collect(), t })
    }

    /// Number of rows.
    pub fn b(&self) -> usize {
        self.lens_b.len()
    }
}

/// A position whose next-token distribution is wanted: row `b`, time `t` (predicts the token at `t + 1`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Row of the batch.
    pub b: usize,
    /// Time within the row.
    pub t: usize,
}
