//! Keys and values of one sequence in pages, and attention of single tokens over them.
//!
//! In a page the keys of a head lie transposed, so that the scores of a page's tokens are computed side by side; the
//! values lie row after row. A token's result depends on its own pages only, in one order of operations.
#![allow(unsafe_code)]

use crate::Isa;
use crate::attention::{Heads, exponentials, largest};
use crate::simd::{Simd, dispatched};

/// Tokens of a page: two of the widest vectors.
pub const PAGE_TOKENS: usize = 32;

/// Keys `[kv head][dim][token]` and values `[kv head][token][dim]` of up to [`PAGE_TOKENS`] tokens.
#[derive(Debug, Clone)]
pub struct Page {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Page {
    /// An empty page.
    pub fn new(heads: Heads) -> Self {
        let len = heads.kv_heads * heads.dim * PAGE_TOKENS;
        Self { keys: vec![0.0; len], values: vec![0.0; len] }
    }

    /// Bytes of a page.
    pub fn bytes(heads: Heads) -> usize {
        8 * heads.kv_heads * heads.dim * PAGE_TOKENS
    }

    /// Takes what another page holds, in its own memory.
    pub fn copy_from(&mut self, other: &Self) {
        self.keys.copy_from_slice(&other.keys);
        self.values.copy_from_slice(&other.values);
    }

    /// Puts a token's keys and values, `[kv heads · dim]` each, into place `token`.
    pub fn put(&mut self, heads: Heads, token: usize, keys: &[f32], values: &[f32]) {
        let dim = heads.dim;
        let places = self.keys[token..].iter_mut().step_by(PAGE_TOKENS);
        places.zip(keys).for_each(|(to, from)| *to = *from);
        for (head, from) in values.chunks_exact(dim).enumerate() {
            self.values[(head * PAGE_TOKENS + token) * dim..][..dim].copy_from_slice(from);
        }
    }
}

/// One token's queries (already scaled) over the first `len` cached tokens: `out` gets `[heads · dim]`. `scores` is
/// scratch.
///
/// # Panics
/// When the pages hold fewer tokens, or a slice is too short.
pub fn attend(
    isa: Isa,
    heads: Heads,
    pages: &[&Page],
    len: usize,
    queries: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    assert!(len > 0 && pages.len() * PAGE_TOKENS >= len);
    let pages = &pages[..len.div_ceil(PAGE_TOKENS)];
    scores.resize(heads.heads / heads.kv_heads * pages.len() * PAGE_TOKENS, 0.0);
    attend_with(isa, heads, pages, len, queries, scores, out);
}

dispatched! {
    fn attend_with(heads: Heads, pages: &[&Page], len: usize, queries: &[f32], scores: &mut [f32], out: &mut [f32]) = attend_body;
}

#[inline(always)]
fn attend_body<S: Simd>(
    s: S,
    heads: Heads,
    pages: &[&Page],
    len: usize,
    queries: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let (dim, group) = (heads.dim, heads.heads / heads.kv_heads);
    let stride = pages.len() * PAGE_TOKENS;
    for kv_head in 0..heads.kv_heads {
        let queries = &queries[kv_head * group * dim..][..group * dim];
        for (index, page) in pages.iter().enumerate() {
            let keys = &page.keys[kv_head * dim * PAGE_TOKENS..][..dim * PAGE_TOKENS];
            for (g, query) in queries.chunks_exact(dim).enumerate() {
                page_scores(s, keys, query, &mut scores[g * stride + index * PAGE_TOKENS..][..PAGE_TOKENS]);
            }
        }
        let out = &mut out[kv_head * group * dim..][..group * dim];
        for (scores, out) in scores.chunks_exact_mut(stride).zip(out.chunks_exact_mut(dim)) {
            let seen = &mut scores[..len];
            let max = largest(s, seen);
            let sum = exponentials(s, seen, max);
            mix(s, pages, kv_head, len, scores, 1.0 / sum, out);
        }
    }
}

/// `∑ query · key` for every token of a page.
#[inline(always)]
fn page_scores<S: Simd>(s: S, keys: &[f32], query: &[f32], to: &mut [f32]) {
    // 32 tokens in steps of at most two vectors, each with two partial sums so that additions overlap.
    let step = (2 * S::LANES).min(PAGE_TOKENS);
    for first in (0..PAGE_TOKENS).step_by(step) {
        let mut even = [s.splat(0.0); 2];
        let mut odd = [s.splat(0.0); 2];
        let mut pairs = query.chunks_exact(2);
        let mut at = first;
        for pair in &mut pairs {
            let (x, y) = (s.splat(pair[0]), s.splat(pair[1]));
            for j in 0..2 {
                even[j] = s.fma(x, s.get(&keys[at + j * S::LANES..]), even[j]);
                odd[j] = s.fma(y, s.get(&keys[at + PAGE_TOKENS + j * S::LANES..]), odd[j]);
            }
            at += 2 * PAGE_TOKENS;
        }
        for x in pairs.remainder() {
            for j in 0..2 {
                even[j] = s.fma(s.splat(*x), s.get(&keys[at + j * S::LANES..]), even[j]);
            }
        }
        for j in 0..2 {
            s.put(&mut to[first + j * S::LANES..], s.add(even[j], odd[j]));
        }
    }
}

/// `out = by · ∑ weight · value` over the first `len` tokens.
#[inline(always)]
fn mix<S: Simd>(s: S, pages: &[&Page], kv_head: usize, len: usize, weights: &[f32], by: f32, out: &mut [f32]) {
    const VECTORS: usize = 4;
    let dim = out.len();
    let mut first = 0;
    while first + VECTORS * S::LANES <= dim {
        let sums = mixed::<S, VECTORS>(s, pages, kv_head, dim, first, len, weights);
        for (j, sum) in sums.into_iter().enumerate() {
            s.put(&mut out[first + j * S::LANES..], s.mul(sum, s.splat(by)));
        }
        first += VECTORS * S::LANES;
    }
    while first + S::LANES <= dim {
        let [sum] = mixed::<S, 1>(s, pages, kv_head, dim, first, len, weights);
        s.put(&mut out[first..], s.mul(sum, s.splat(by)));
        first += S::LANES;
    }
    for (d, out) in out.iter_mut().enumerate().take(dim).skip(first) {
        let mut sum = 0.0;
        for (index, weight) in weights[..len].iter().enumerate() {
            let row = kv_head * PAGE_TOKENS + index % PAGE_TOKENS;
            sum += weight * pages[index / PAGE_TOKENS].values[row * dim + d];
        }
        *out = sum * by;
    }
}

#[inline(always)]
fn mixed<S: Simd, const VECTORS: usize>(
    s: S,
    pages: &[&Page],
    kv_head: usize,
    dim: usize,
    first: usize,
    len: usize,
    weights: &[f32],
) -> [S::V; VECTORS] {
    let mut sums = [s.splat(0.0); VECTORS];
    for (page, weights) in pages.iter().zip(weights[..len].chunks(PAGE_TOKENS)) {
        let values = &page.values[kv_head * PAGE_TOKENS * dim..][..PAGE_TOKENS * dim];
        for (row, weight) in values.chunks_exact(dim).zip(weights) {
            let weight = s.splat(*weight);
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = s.fma(weight, s.get(&row[first + j * S::LANES..]), *sum);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::forward;
    use crate::reference::numbers;

    #[test]
    fn single_tokens_agree_with_whole_sequences() {
        for isa in Isa::available() {
            for (heads, t) in [
                (Heads { heads: 4, kv_heads: 2, dim: 64 }, 70),
                (Heads { heads: 3, kv_heads: 1, dim: 10 }, 33),
                (Heads { heads: 2, kv_heads: 2, dim: 24 }, 32),
                (Heads { heads: 1, kv_heads: 1, dim: 2 }, 1),
            ] {
                let qkv = numbers(t * heads.row(), 1);
                let (mut out, mut sums) = (vec![0.0; t * heads.width()], vec![0.0; t * heads.heads]);
                forward(isa, heads, 1, t, &qkv, &mut out, &mut sums);
                let mut pages: Vec<Page> = (0..t.div_ceil(PAGE_TOKENS)).map(|_| Page::new(heads)).collect();
                let (width, kv) = (heads.width(), heads.kv_heads * heads.dim);
                let mut scores = Vec::new();
                for (token, row) in qkv.chunks_exact(heads.row()).enumerate() {
                    let (queries, rest) = row.split_at(width);
                    let (keys, values) = rest.split_at(kv);
                    pages[token / PAGE_TOKENS].put(heads, token % PAGE_TOKENS, keys, values);
                    let seen: Vec<&Page> = pages.iter().collect();
                    let mut found = vec![0.0; width];
                    attend(isa, heads, &seen, token + 1, queries, &mut scores, &mut found);
                    for (f, e) in found.iter().zip(&out[token * width..]) {
                        assert!((f - e).abs() < 4e-6, "{isa:?} {heads:?} token {token}: {f} instead of {e}");
                    }
                }
            }
        }
    }
}
