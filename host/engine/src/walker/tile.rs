//! Cutting a batch into tiles of similar length.

use std::ops::Range;

use crate::batch::{Position, TokenBatch};
use crate::model::ModelConfig;
use crate::{EngineError, Result};

/// Tiles come in multiples of this: what 2 or 4 threads share evenly.
const TOGETHER: usize = 4;

/// A few rows of a batch, padded to the longest of them.
pub(crate) struct Tile {
    /// Padded length.
    pub t: usize,
    /// Token ids, `[b, t]`.
    pub ids: Vec<u32>,
    /// Wanted positions as rows of `[b · t]`.
    pub wanted: Vec<u32>,
    /// For each wanted position, its index in the caller's list.
    pub targets: Vec<usize>,
}

impl Tile {
    /// Number of rows.
    pub fn b(&self) -> usize {
        self.ids.len() / self.t
    }
}

/// Tiles of about `tile_tokens` tokens that hold every wanted position and the tokens before it. Tokens after a row's
/// last wanted position change nothing and are left out, and so are rows without one.
pub(crate) fn plan(
    batch: &TokenBatch,
    positions: &[Position],
    config: &ModelConfig,
    tile_tokens: usize,
) -> Result<Vec<Tile>> {
    check(batch, config)?;
    let mut wanted_b: Vec<Vec<(usize, usize)>> = vec![Vec::new(); batch.b()];
    for (target, position) in positions.iter().enumerate() {
        match batch.lens_b.get(position.b) {
            Some(len) if position.t < *len => wanted_b[position.b].push((position.t, target)),
            _ => {
                return Err(EngineError::invalid(
                    format!("position {} of row {} lies outside the batch", position.t, position.b),
                    "",
                ));
            }
        }
    }
    let mut rows: Vec<(usize, usize)> = Vec::new();
    for (row, wanted) in wanted_b.iter().enumerate() {
        if let Some(last) = wanted.iter().map(|(t, _)| *t).max() {
            rows.push((last + 1, row));
        }
    }
    // Rows of like length share a tile; equal lengths keep the order of the batch.
    rows.sort_unstable();
    let lens: Vec<usize> = rows.iter().map(|(len, _)| *len).collect();
    Ok(cuts(&lens, tile_tokens).into_iter().map(|cut| tile(batch, &rows[cut], &wanted_b)).collect())
}

/// Where rows of these ascending lengths are cut: into tiles of at most `tile_tokens` (a longer row is one), and where there
/// are enough of them into a multiple of [`TOGETHER`], about equal, so that no thread waits for the last of them.
fn cuts(lens: &[usize], tile_tokens: usize) -> Vec<Range<usize>> {
    let fewest = within(lens, tile_tokens);
    let padded: usize = fewest.iter().map(|cut| cut.len() * lens[cut.end - 1]).sum();
    if padded < tile_tokens {
        return fewest;
    }
    let count = fewest.len().next_multiple_of(TOGETHER);
    // The smallest tiles of which there are no more than that. They decide about bits of gradients, so neither may depend on
    // the number of threads.
    let (mut low, mut high) = (padded.div_ceil(count), tile_tokens);
    while low < high {
        let middle = low.midpoint(high);
        if within(lens, middle).len() <= count { high = middle } else { low = middle + 1 }
    }
    within(lens, high)
}

/// As few tiles as hold at most `tokens` each.
fn within(lens: &[usize], tokens: usize) -> Vec<Range<usize>> {
    let mut cuts: Vec<Range<usize>> = Vec::new();
    for (row, len) in lens.iter().enumerate() {
        match cuts.last_mut() {
            Some(cut) if len * (cut.len() + 1) <= tokens => cut.end = row + 1,
            _ => cuts.push(row..row + 1),
        }
    }
    cuts
}

fn tile(batch: &TokenBatch, rows: &[(usize, usize)], wanted_b: &[Vec<(usize, usize)>]) -> Tile {
    let t = rows.iter().map(|(len, _)| *len).max().unwrap_or(1);
    let mut tile = Tile { t, ids: vec![0; rows.len() * t], wanted: Vec::new(), targets: Vec::new() };
    for (index, (len, row)) in rows.iter().enumerate() {
        let ids = &batch.ids_bt[row * batch.t..row * batch.t + len];
        tile.ids[index * t..index * t + len].copy_from_slice(ids);
        for (time, target) in &wanted_b[*row] {
            tile.wanted.push((index * t + time) as u32);
            tile.targets.push(*target);
        }
    }
    tile
}

fn check(batch: &TokenBatch, config: &ModelConfig) -> Result<()> {
    if batch.ids_bt.len() != batch.b() * batch.t || batch.lens_b.iter().any(|len| *len == 0 || *len > batch.t) {
        return Err(EngineError::invalid(
            format!("a batch of {} rows of {} tokens holds {} ids", batch.b(), batch.t, batch.ids_bt.len()),
            "",
        ));
    }
    if batch.ids_bt.len() > u32::MAX as usize {
        return Err(EngineError::invalid("a batch holds more than 2^32 tokens", "make it smaller"));
    }
    for (row, len) in batch.lens_b.iter().enumerate() {
        if *len > config.max_position_embeddings {
            return Err(EngineError::invalid(
                format!("row {row} holds {len} tokens, the model's context is {}", config.max_position_embeddings),
                "shorten the prompt or `max_response_length`",
            ));
        }
        let ids = &batch.ids_bt[row * batch.t..row * batch.t + len];
        check_ids(ids, config)?;
    }
    Ok(())
}

/// Ids must be rows of the embedding.
pub(crate) fn check_ids(ids: &[u32], config: &ModelConfig) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= config.vocab_size) {
        None => Ok(()),
        Some(id) => Err(EngineError::invalid(
            format!("token id {id} is outside the model's vocabulary of {}", config.vocab_size),
            "use the tokenizer that belongs to this model",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tiles_are_even() {
        // Three of at most 512 tokens would leave one of two threads idle for a third of the time.
        assert_eq!(cuts(&[159; 8], 512), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!(cuts(&[10; 8], 512), Vec::from_iter(std::iter::once(0..8)));
        assert_eq!(cuts(&[600, 700], 512), [0..1, 1..2]);
        assert!(cuts(&[], 512).is_empty());
    }

    proptest! {
        #[test]
        fn every_row_is_in_one_tile(mut lens in prop::collection::vec(1usize..900, 0..60)) {
            lens.sort_unstable();
            let found = cuts(&lens, 512);
            prop_assert_eq!(found.iter().cloned().flatten().collect::<Vec<_>>(), (0..lens.len()).collect::<Vec<_>>());
            for cut in &found {
                prop_assert!(cut.len() == 1 || cut.len() * lens[cut.end - 1] <= 512);
            }
            prop_assert!(found.len() < within(&lens, 512).len() + TOGETHER);
        }
    }
}
