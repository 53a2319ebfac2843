//! Causal attention over whole sequences with grouped key-value heads, forward and backward, a block of queries at a
//! time: the scores of [`QUERIES`] queries exist at once, never those of a whole sequence.
//!
//! Forward, for one head and queries i: `s = q·kᵀ` (the scale is in q), `p = softmax(s)` over keys j ≤ i, `o = p·v`, and
//! the log of the sum, `ℓ = max + ln ∑ exp(s − max)`, is kept.
//!
//! Backward (Dao et al. 2022): from `p = exp(s − ℓ)`, computed again, and `do`:
//! `dv = pᵀ·do`; `dp = do·vᵀ`; the softmax gives `ds = p ∘ (dp − ∑ⱼ p·dp)`; `dq = ds·k`; `dk = dsᵀ·q`. A whole row of p
//! and dp is at hand, so the sum is taken from them and not as `do·o`, which equals it only up to rounding: a query that
//! sees one key has a gradient of exactly zero. Keys and values gather from all query heads of their group, in the order of
//! the heads and blocks.
#![allow(unsafe_code)]

use std::cell::RefCell;

use crate::Isa;
use crate::gemm::{Left, Packed, Right, Shape, gemm};
use crate::memory::Buffer;
use crate::rows::dot;
use crate::simd::{Simd, dispatched, exp};
use crate::threads;

/// Queries whose scores exist at a time.
const QUERIES: usize = 48;

/// The heads of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides the query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    /// Width of a row of queries, keys and values.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Width of a row of queries, and of what comes out.
    pub fn width(&self) -> usize {
        self.heads * self.dim
    }

    fn key(&self, head: usize) -> usize {
        (self.heads + head) * self.dim
    }

    fn value(&self, head: usize) -> usize {
        (self.heads + self.kv_heads + head) * self.dim
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// A buffer that pieces write to in disjoint places.
#[derive(Clone, Copy)]
struct Out {
    data: *mut f32,
    len: usize,
}
// SAFETY: pieces write to disjoint places; the slice behind it outlives them.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn of(slice: &mut [f32]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Copies `from` to `at`.
    ///
    /// # Safety
    /// No other thread touches these numbers.
    unsafe fn put(&self, at: usize, from: &[f32]) {
        assert!(at + from.len() <= self.len);
        // SAFETY: in bounds, and the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.data.add(at), from.len()) }
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    keys_t: Packed,
    keys: Packed,
    values: Packed,
    scores: Buffer,
    slopes: Buffer,
    rows: Buffer,
    dkeys: Buffer,
    dvalues: Buffer,
}

thread_local! {
    /// Held while one sequence's head is computed, which stays on its thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn check(heads: Heads, b: usize, t: usize, qkv: usize, out: usize, log_sums: usize) {
    assert!(heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads) && heads.dim > 0);
    assert!(qkv >= b * t * heads.row() && out >= b * t * heads.width() && log_sums >= b * t * heads.heads);
}

/// Attention of `b` sequences of `t` tokens: rows of `qkv` hold queries (already scaled), keys and values; `out` gets
/// `[b·t, heads·dim]` and `log_sums` `[b·t, heads]`.
pub fn forward(isa: Isa, heads: Heads, b: usize, t: usize, qkv: &[f32], out: &mut [f32], log_sums: &mut [f32]) {
    check(heads, b, t, qkv.len(), out.len(), log_sums.len());
    let (out, log_sums) = (Out::of(out), Out::of(log_sums));
    threads::each(b * heads.kv_heads, b * t * t * heads.width() > 1 << 18, |piece| {
        let (sequence, kv_head) = (piece / heads.kv_heads, piece % heads.kv_heads);
        threads::serial(|| forward_head(isa, heads, t, sequence, kv_head, qkv, out, log_sums));
    });
}

fn forward_head(
    isa: Isa,
    heads: Heads,
    t: usize,
    sequence: usize,
    kv_head: usize,
    qkv: &[f32],
    out: Out,
    log_sums: Out,
) {
    let (dim, stride) = (heads.dim, heads.row());
    let own = &qkv[sequence * t * stride..(sequence + 1) * t * stride];
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { keys_t, values, scores, rows: mixed, .. } = scratch;
        keys_t.set_transposed(isa, &own[heads.key(kv_head)..], stride, t, dim);
        values.set_rows(isa, &own[heads.value(kv_head)..], stride, dim, t);
        let (scores, mixed) = (scores.room(QUERIES * t), mixed.room(QUERIES * dim));
        for head in kv_head * heads.group()..(kv_head + 1) * heads.group() {
            for first in (0..t).step_by(QUERIES) {
                let rows = QUERIES.min(t - first);
                let keys = first + rows;
                let queries = &own[first * stride + head * dim..];
                let scores = &mut scores[..rows * keys];
                let shape = Shape { m: rows, n: keys, k: dim };
                gemm(isa, shape, Left::Rows(queries, stride), Right::Packed(keys_t), scores, keys, false);
                let mut sums = [0.0; QUERIES];
                softmax(isa, scores, keys, first, &mut sums[..rows]);
                let shape = Shape { m: rows, n: dim, k: keys };
                gemm(isa, shape, Left::Rows(scores, keys), Right::Packed(values), mixed, dim, false);
                for (row, (from, sum)) in mixed.chunks_exact(dim).zip(&sums[..rows]).enumerate() {
                    let token = sequence * t + first + row;
                    // SAFETY: this head of this token belongs to this piece alone.
                    unsafe {
                        out.put(token * heads.width() + head * dim, from);
                        log_sums.put(token * heads.heads + head, std::slice::from_ref(sum));
                    }
                }
            }
        }
    });
}

dispatched! {
    /// Softmax of rows of `keys` scores in place; row r sees `first + r + 1` of them. `log_sums` gets each row's log of
    /// the sum of exponentials.
    fn softmax(scores: &mut [f32], keys: usize, first: usize, log_sums: &mut [f32]) = softmax_body;
}

#[inline(always)]
fn softmax_body<S: Simd>(s: S, scores: &mut [f32], keys: usize, first: usize, log_sums: &mut [f32]) {
    for (r, (row, log_sum)) in scores.chunks_exact_mut(keys).zip(log_sums).enumerate() {
        let (seen, hidden) = row.split_at_mut(first + r + 1);
        hidden.fill(0.0);
        let max = largest(s, seen);
        let sum = exponentials(s, seen, max);
        *log_sum = max + sum.ln();
        scale(s, seen, 1.0 / sum);
    }
}

#[inline(always)]
pub(crate) fn largest<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut best = s.splat(f32::NEG_INFINITY);
    let mut at = 0;
    while at + S::LANES <= row.len() {
        best = s.max(s.get(&row[at..]), best);
        at += S::LANES;
    }
    row[at..].iter().fold(s.largest(best), |max, x| if *x > max { *x } else { max })
}

/// `exp(x − shift)` in place, and the sum.
#[inline(always)]
pub(crate) fn exponentials<S: Simd>(s: S, row: &mut [f32], shift: f32) -> f32 {
    let shifts = s.splat(shift);
    let mut sums = s.splat(0.0);
    let mut at = 0;
    while at + S::LANES <= row.len() {
        let e = exp(s, s.sub(s.get(&row[at..]), shifts));
        s.put(&mut row[at..], e);
        sums = s.add(sums, e);
        at += S::LANES;
    }
    let rest = &mut row[at..];
    if !rest.is_empty() {
        let mut whole = [f32::NEG_INFINITY; 16];
        whole[..rest.len()].copy_from_slice(rest);
        let e = exp(s, s.sub(s.get(&whole), shifts));
        s.put(&mut whole, e);
        rest.copy_from_slice(&whole[..rest.len()]);
        sums = s.add(sums, e);
    }
    s.sum(sums)
}

#[inline(always)]
fn scale<S: Simd>(_s: S, row: &mut [f32], by: f32) {
    for x in row {
        *x *= by;
    }
}

/// The vector-Jacobian product of [`forward`]: from `log_sums` and `dout` to `dqkv`, which is overwritten.
pub fn backward(
    isa: Isa,
    heads: Heads,
    b: usize,
    t: usize,
    qkv: &[f32],
    log_sums: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) {
    check(heads, b, t, qkv.len(), dout.len(), log_sums.len());
    assert!(dqkv.len() >= b * t * heads.row());
    let dqkv = Out::of(dqkv);
    threads::each(b * heads.kv_heads, b * t * t * heads.width() > 1 << 17, |piece| {
        let (sequence, kv_head) = (piece / heads.kv_heads, piece % heads.kv_heads);
        threads::serial(|| backward_head(isa, heads, t, sequence, kv_head, qkv, log_sums, dout, dqkv));
    });
}

fn backward_head(
    isa: Isa,
    heads: Heads,
    t: usize,
    sequence: usize,
    kv_head: usize,
    qkv: &[f32],
    log_sums: &[f32],
    dout: &[f32],
    dqkv: Out,
) {
    let (dim, stride, width) = (heads.dim, heads.row(), heads.width());
    let own = &qkv[sequence * t * stride..(sequence + 1) * t * stride];
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { keys_t, keys, values, scores, slopes, rows: small, dkeys, dvalues } = scratch;
        keys_t.set_transposed(isa, &own[heads.key(kv_head)..], stride, t, dim);
        keys.set_rows(isa, &own[heads.key(kv_head)..], stride, dim, t);
        values.set_transposed(isa, &own[heads.value(kv_head)..], stride, t, dim);
        let (scores, slopes, small) = (scores.room(QUERIES * t), slopes.room(QUERIES * t), small.room(QUERIES * dim));
        let (dkeys, dvalues) = (dkeys.room(t * dim), dvalues.room(t * dim));
        dkeys.fill(0.0);
        dvalues.fill(0.0);
        for head in kv_head * heads.group()..(kv_head + 1) * heads.group() {
            for first in (0..t).step_by(QUERIES) {
                let rows = QUERIES.min(t - first);
                let seen = first + rows;
                let token = sequence * t + first;
                let queries = Left::Rows(&own[first * stride + head * dim..], stride);
                let douts = &dout[token * width + head * dim..];
                let (p, ds) = (&mut scores[..rows * seen], &mut slopes[..rows * seen]);
                let to_keys = Shape { m: rows, n: seen, k: dim };
                gemm(isa, to_keys, queries, Right::Packed(keys_t), p, seen, false);
                gemm(isa, to_keys, Left::Rows(douts, width), Right::Packed(values), ds, seen, false);
                let sums = &log_sums[token * heads.heads + head..];
                softmax_vjp(isa, p, ds, seen, first, sums, heads.heads);
                let from_keys = Shape { m: rows, n: dim, k: seen };
                gemm(isa, from_keys, Left::Rows(ds, seen), Right::Packed(keys), small, dim, false);
                for (row, from) in small.chunks_exact(dim).take(rows).enumerate() {
                    // SAFETY: this head of this token belongs to this piece alone.
                    unsafe { dqkv.put((token + row) * stride + head * dim, from) }
                }
                let to_gather = Shape { m: seen, n: dim, k: rows };
                let queries = Right::Rows(&own[first * stride + head * dim..], stride);
                gemm(isa, to_gather, Left::Columns(ds, seen), queries, dkeys, dim, true);
                gemm(isa, to_gather, Left::Columns(p, seen), Right::Rows(douts, width), dvalues, dim, true);
            }
        }
        for (row, (dk, dv)) in dkeys.chunks_exact(dim).zip(dvalues.chunks_exact(dim)).enumerate() {
            let token = (sequence * t + row) * stride;
            // SAFETY: this key-value head belongs to this piece alone.
            unsafe {
                dqkv.put(token + heads.key(kv_head), dk);
                dqkv.put(token + heads.value(kv_head), dv);
            }
        }
    });
}

dispatched! {
    /// Scores become `p = exp(s − ℓ)` and `dp` becomes `ds = p ∘ (dp − ∑ p·dp)`, row r for its first `first + r + 1` keys,
    /// zeros beyond.
    fn softmax_vjp(
        p: &mut [f32], ds: &mut [f32], keys: usize, first: usize, log_sums: &[f32], sums_stride: usize,
    ) = softmax_vjp_body;
}

#[inline(always)]
fn softmax_vjp_body<S: Simd>(
    s: S,
    p: &mut [f32],
    ds: &mut [f32],
    keys: usize,
    first: usize,
    log_sums: &[f32],
    sums_stride: usize,
) {
    for (r, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
        let seen = first + r + 1;
        exponentials(s, &mut p[..seen], log_sums[r * sums_stride]);
        let common = dot(s, &p[..seen], &ds[..seen]);
        p[seen..].fill(0.0);
        for (ds, p) in ds.iter_mut().zip(p.iter()) {
            *ds = p * (*ds - common);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::numbers;

    /// Attention as the formula stands, for `b` sequences of `t` tokens.
    fn plain(heads: Heads, b: usize, t: usize, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut sums) = (vec![0.0; b * t * heads.width()], vec![0.0; b * t * heads.heads]);
        for token in 0..b * t {
            let start = token / t * t;
            for head in 0..heads.heads {
                let kv = head / heads.group();
                let at = |row: usize, offset: usize, d: usize| qkv[row * heads.row() + offset + d];
                let scores: Vec<f64> = (start..=token)
                    .map(|j| (0..heads.dim).map(|d| at(token, head * heads.dim, d) * at(j, heads.key(kv), d)).sum())
                    .collect();
                let sum: f64 = scores.iter().map(|s: &f64| s.exp()).sum();
                sums[token * heads.heads + head] = sum.ln();
                for d in 0..heads.dim {
                    out[token * heads.width() + head * heads.dim + d] =
                        scores.iter().zip(start..).map(|(s, j)| s.exp() / sum * at(j, heads.value(kv), d)).sum();
                }
            }
        }
        (out, sums)
    }

    #[test]
    fn attention_and_its_gradient() {
        for isa in Isa::available() {
            for (heads, b, t) in [
                (Heads { heads: 4, kv_heads: 2, dim: 6 }, 2, 5),
                (Heads { heads: 3, kv_heads: 1, dim: 16 }, 1, 53),
                (Heads { heads: 2, kv_heads: 2, dim: 33 }, 2, 49),
            ] {
                let qkv = numbers(b * t * heads.row(), 1);
                let double: Vec<f64> = qkv.iter().map(|x| f64::from(*x)).collect();
                let (mut out, mut sums) = (vec![0.0; b * t * heads.width()], vec![0.0; b * t * heads.heads]);
                forward(isa, heads, b, t, &qkv, &mut out, &mut sums);
                let (expected, expected_sums) = plain(heads, b, t, &double);
                for (f, e) in out.iter().zip(&expected).chain(sums.iter().zip(&expected_sums)) {
                    assert!((f64::from(*f) - e).abs() < 4e-6, "{isa:?} {heads:?}: {f} instead of {e}");
                }
                let dout = numbers(out.len(), 2);
                let mut dqkv = vec![9.0; qkv.len()];
                backward(isa, heads, b, t, &qkv, &sums, &dout, &mut dqkv);
                let total =
                    |x: &[f64]| plain(heads, b, t, x).0.iter().zip(&dout).map(|(o, d)| o * f64::from(*d)).sum::<f64>();
                for index in (0..qkv.len()).step_by(if qkv.len() > 500 { 97 } else { 1 }) {
                    let mut moved = double.clone();
                    moved[index] += 1e-5;
                    let up = total(&moved);
                    moved[index] -= 2e-5;
                    let slope = (up - total(&moved)) / 2e-5;
                    let found = f64::from(dqkv[index]);
                    assert!((found - slope).abs() < 2e-5, "{isa:?} {heads:?} at {index}: {found} instead of {slope}");
                }
            }
        }
    }

    #[test]
    fn one_key_leaves_queries_and_keys_without_gradient() {
        let heads = Heads { heads: 4, kv_heads: 2, dim: 19 };
        for isa in Isa::available() {
            let qkv = numbers(3 * heads.row(), 1);
            let (mut out, mut sums) = (vec![0.0; 3 * heads.width()], vec![0.0; 3 * heads.heads]);
            forward(isa, heads, 3, 1, &qkv, &mut out, &mut sums);
            let (dout, mut dqkv) = (numbers(out.len(), 2), vec![9.0; qkv.len()]);
            backward(isa, heads, 3, 1, &qkv, &sums, &dout, &mut dqkv);
            for row in dqkv.chunks_exact(heads.row()) {
                assert!(row[..heads.value(0)].iter().all(|d| *d == 0.0), "{isa:?}: {row:?}");
                assert!(row[heads.value(0)..].iter().all(|d| *d != 0.0), "{isa:?}: {row:?}");
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        let (heads, b, t) = (Heads { heads: 8, kv_heads: 4, dim: 32 }, 3, 130);
        let isa = Isa::best();
        let qkv = numbers(b * t * heads.row(), 1);
        let run = || {
            let (mut out, mut sums) = (vec![0.0; b * t * heads.width()], vec![0.0; b * t * heads.heads]);
            forward(isa, heads, b, t, &qkv, &mut out, &mut sums);
            let mut dqkv = vec![0.0; qkv.len()];
            backward(isa, heads, b, t, &qkv, &sums, &out, &mut dqkv);
            (out, dqkv)
        };
        assert_eq!(run(), threads::serial(run));
    }
}
