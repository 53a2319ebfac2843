//! Cutting a batch into tiles of similar length.

use crate::batch::{Position, TokenBatch};
use crate::model::ModelConfig;
use crate::{EngineError, Result};

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
    let mut tiles = Vec::new();
    let mut start = 0;
    while start < rows.len() {
        let mut end = start + 1;
        while end < rows.len() && rows[end].0 * (end + 1 - start) <= tile_tokens {
            end += 1;
        }
        tiles.push(tile(batch, &rows[start..end], &wanted_b));
        start = end;
    }
    Ok(tiles)
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
