//! Exact divergences between two models on given sequences, for validation: no gradient, no estimate from the sampled
//! token alone.

use rayon::prelude::*;

use crate::batch::{Position, TokenBatch};
use crate::model::{LogitsSource, Model};
use crate::{EngineError, Result};

/// A sequence and the index of its first scored token (at least 1).
#[derive(Debug, Clone, Copy)]
pub struct Scored<'a> {
    /// Prompt and completion.
    pub ids: &'a [u32],
    /// Index of the first token of the completion.
    pub first: usize,
}

/// KL(student ‖ teacher) over the whole vocabulary at every scored token: one list a sequence, in nats. Both logits are
/// divided by `temperature`. Sequences go `mini_batch` at a time and logits in chunks. Where the teacher's head is wider
/// (padding beyond the shared tokens) its surplus is left out.
pub fn reverse_kl(
    student: &mut dyn Model,
    teacher: &mut dyn Model,
    sequences: &[Scored<'_>],
    temperature: f32,
    mini_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    by_sequence(sequences, mini_batch, &mut |batch, positions, _| {
        kl_at(student, teacher, batch, positions, temperature)
    })
}

/// As [`reverse_kl`], to a teacher that is elsewhere or is a mixture: `teacher` gives logits of `width` tokens for the rows
/// of all sequences, one after the other.
///
/// # Errors
/// Those of the student and of `teacher`.
pub fn reverse_kl_to(
    student: &mut dyn Model,
    teacher: &mut dyn LogitsSource,
    width: usize,
    sequences: &[Scored<'_>],
    temperature: f32,
    mini_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    check_whole(student)?;
    let (hidden, vocab) = (student.config().hidden_size, student.config().vocab_size);
    let shared = vocab.min(width);
    let (mut logits_s, mut logits_t) = (Vec::new(), Vec::new());
    by_sequence(sequences, mini_batch, &mut |batch, positions, first| {
        let hidden_rh = student.hidden_rh(batch, positions)?;
        student.prepare_head()?;
        let mut kl = Vec::with_capacity(positions.len());
        for chunk_rh in hidden_rh.chunks(student.head_chunk_rows().max(1) * hidden) {
            let (rows, at) = (chunk_rh.len() / hidden, first + kl.len());
            student.head_logits_rv(chunk_rh, &mut logits_s)?;
            teacher.logits_rv(at..at + rows, &mut logits_t)?;
            if logits_t.len() != rows * width {
                return Err(EngineError::invalid(
                    format!("the teacher gave {} logits for {rows} rows of {width}", logits_t.len()),
                    "",
                ));
            }
            kl.extend(kl_rows(&logits_s, vocab, &logits_t, width, shared, temperature));
        }
        Ok(kl)
    })
}

/// Refuses a rank that has only a part of every row.
fn check_whole(model: &dyn Model) -> Result<()> {
    if model.has_head() && model.vocab_shard().is_whole() {
        return Ok(());
    }
    Err(EngineError::invalid(
        "an exact divergence needs whole rows of logits, and this rank has a part of the model's head or none",
        "validate with a model that is not cut by `tp_size`, `cp_size` or `pp_size`",
    ))
}

/// Calls `of(batch, positions, index of the first row)` for groups of sequences and cuts what it gives by sequence.
fn by_sequence(
    sequences: &[Scored<'_>],
    mini_batch: usize,
    of: &mut dyn FnMut(&TokenBatch, &[Position], usize) -> Result<Vec<f32>>,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(sequences.len());
    let mut first = 0;
    for group in sequences.chunks(mini_batch.max(1)) {
        let ids: Vec<&[u32]> = group.iter().map(|s| s.ids).collect();
        let batch = TokenBatch::new(&ids)?;
        let positions: Vec<Position> = group
            .iter()
            .enumerate()
            .flat_map(|(b, s)| (s.first.max(1)..s.ids.len()).map(move |target| Position { b, t: target - 1 }))
            .collect();
        let kl = if positions.is_empty() { Vec::new() } else { of(&batch, &positions, first)? };
        first += positions.len();
        let mut rest = kl.as_slice();
        for sequence in group {
            let (own, others) = rest.split_at(sequence.ids.len().saturating_sub(sequence.first.max(1)));
            all.push(own.to_vec());
            rest = others;
        }
    }
    Ok(all)
}

fn kl_rows(
    logits_s: &[f32],
    vocab_s: usize,
    logits_t: &[f32],
    vocab_t: usize,
    shared: usize,
    temperature: f32,
) -> Vec<f32> {
    logits_s
        .par_chunks(vocab_s)
        .zip(logits_t.par_chunks(vocab_t))
        .map(|(s, t)| kl_row(&s[..shared], &t[..shared], temperature))
        .collect()
}

fn kl_at(
    student: &mut dyn Model,
    teacher: &mut dyn Model,
    batch: &TokenBatch,
    positions: &[Position],
    temperature: f32,
) -> Result<Vec<f32>> {
    check_whole(student)?;
    check_whole(teacher)?;
    let (h_s, h_t) = (student.config().hidden_size, teacher.config().hidden_size);
    let (v_s, v_t) = (student.config().vocab_size, teacher.config().vocab_size);
    let shared = v_s.min(v_t);
    let hidden_s = student.hidden_rh(batch, positions)?;
    let hidden_t = teacher.hidden_rh(batch, positions)?;
    student.prepare_head()?;
    teacher.prepare_head()?;
    let rows = student.head_chunk_rows().min(teacher.head_chunk_rows()).max(1);
    let (mut logits_s, mut logits_t) = (Vec::new(), Vec::new());
    let mut kl = Vec::with_capacity(positions.len());
    for (chunk_s, chunk_t) in hidden_s.chunks(rows * h_s).zip(hidden_t.chunks(rows * h_t)) {
        student.head_logits_rv(chunk_s, &mut logits_s)?;
        teacher.head_logits_rv(chunk_t, &mut logits_t)?;
        kl.extend(kl_rows(&logits_s, v_s, &logits_t, v_t, shared, temperature));
    }
    Ok(kl)
}

/// KL(softmax(s/T) ‖ softmax(t/T)) in nats, summed in f64.
fn kl_row(s: &[f32], t: &[f32], temperature: f32) -> f32 {
    let scale = f64::from(temperature).recip();
    let log_normaliser = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| (f64::from(x - max) * scale).exp()).sum();
        f64::from(max) * scale + sum.ln()
    };
    let (z_s, z_t) = (log_normaliser(s), log_normaliser(t));
    let kl: f64 = s
        .iter()
        .zip(t)
        .map(|(&s, &t)| {
            let log_p = f64::from(s) * scale - z_s;
            let p = log_p.exp();
            if p == 0.0 { 0.0 } else { p * (log_p - (f64::from(t) * scale - z_t)) }
        })
        .sum();
    kl as f32
}

#[cfg(test)]
mod tests {
    use super::kl_row;

    #[test]
    fn kl_of_known_distributions() {
        let logits = |p: &[f32]| p.iter().map(|p| p.ln()).collect::<Vec<_>>();
        let (p, q) = (logits(&[0.5, 0.25, 0.25]), logits(&[0.25, 0.5, 0.25]));
        let expected = 0.5 * (0.5f32 / 0.25).ln() + 0.25 * (0.25f32 / 0.5).ln();
        assert!((kl_row(&p, &q, 1.0) - expected).abs() < 1e-6);
        assert_eq!(kl_row(&p, &p, 0.7), 0.0);
        let shifted: Vec<f32> = p.iter().map(|x| x + 1000.0).collect();
        assert!(kl_row(&shifted, &p, 1.0).abs() < 1e-3);
    }
}
