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

/// Heads of one key-value head that are computed side by side, so that what is loaded serves them all.
const HEADS_TOGETHER: usize = 2;

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

    /// What attention over its first `tokens` tokens reads, piece by piece.
    pub fn read(&self, heads: Heads, tokens: usize) -> impl Iterator<Item = &[f32]> {
        let (own, len) = (heads.dim * PAGE_TOKENS, heads.dim * tokens.min(PAGE_TOKENS));
        // The values of a full page lie one behind the other.
        let (own, len) = if len == own { (self.values.len(), self.values.len()) } else { (own, len) };
        std::iter::once(&*self.keys).chain(self.values.chunks(own.max(1)).map(move |values| &values[..len]))
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
/// scratch. `next` is a page that will be read after this call, if the caller knows one.
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
    next: Option<&Page>,
) {
    assert!(len > 0 && pages.len() * PAGE_TOKENS >= len);
    let pages = &pages[..len.div_ceil(PAGE_TOKENS)];
    scores.resize(HEADS_TOGETHER * pages.len() * PAGE_TOKENS, 0.0);
    attend_with(isa, heads, pages, len, queries, scores, out, next);
}

dispatched! {
    fn attend_with(
        heads: Heads, pages: &[&Page], len: usize, queries: &[f32], scores: &mut [f32], out: &mut [f32], next: Option<&Page>,
    ) = attend_body;
}

/// The cached tokens as one key-value head sees them.
struct Seen<'a> {
    pages: &'a [&'a Page],
    len: usize,
    dim: usize,
    kv_head: usize,
    /// What is read after this head's values.
    after: Option<&'a [f32]>,
}

impl<'a> Seen<'a> {
    /// `[dim][token]` of a page.
    fn keys(&self, page: usize) -> &'a [f32] {
        part(&self.pages[page].keys, self.kv_head, self.dim)
    }

    /// `[token][dim]` of a page.
    fn values(&self, page: usize) -> &'a [f32] {
        part(&self.pages[page].values, self.kv_head, self.dim)
    }

    fn after_keys(&self, page: usize) -> &'a [f32] {
        if page + 1 < self.pages.len() { self.keys(page + 1) } else { self.values(0) }
    }

    fn after_values(&self, page: usize) -> Option<&'a [f32]> {
        if page + 1 < self.pages.len() { Some(self.values(page + 1)) } else { self.after }
    }
}

/// One head's numbers of a page's keys or values.
fn part(numbers: &[f32], kv_head: usize, dim: usize) -> &[f32] {
    &numbers[kv_head * dim * PAGE_TOKENS..][..dim * PAGE_TOKENS]
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
    next: Option<&Page>,
) {
    let (dim, group) = (heads.dim, heads.heads / heads.kv_heads);
    for kv_head in 0..heads.kv_heads {
        let after = match next {
            _ if kv_head + 1 < heads.kv_heads => Some(part(&pages[0].keys, kv_head + 1, dim)),
            Some(page) => Some(part(&page.keys, 0, dim)),
            None => None,
        };
        let seen = Seen { pages, len, dim, kv_head, after };
        let own = kv_head * group * dim..(kv_head + 1) * group * dim;
        let (queries, out) = (&queries[own.clone()], &mut out[own]);
        let pairs = group / HEADS_TOGETHER * HEADS_TOGETHER * dim;
        let step = HEADS_TOGETHER * dim;
        for (queries, out) in queries[..pairs].chunks_exact(step).zip(out[..pairs].chunks_exact_mut(step)) {
            attend_heads::<S, HEADS_TOGETHER>(s, &seen, queries, scores, out);
        }
        for (queries, out) in queries[pairs..].chunks_exact(dim).zip(out[pairs..].chunks_exact_mut(dim)) {
            attend_heads::<S, 1>(s, &seen, queries, scores, out);
        }
    }
}

/// `HEADS` heads that read the same keys and values, each as if it were alone.
#[inline(always)]
fn attend_heads<S: Simd, const HEADS: usize>(
    s: S,
    seen: &Seen<'_>,
    queries: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let stride = seen.pages.len() * PAGE_TOKENS;
    for page in 0..seen.pages.len() {
        page_scores::<S, HEADS>(s, seen, page, queries, &mut scores[page * PAGE_TOKENS..], stride);
    }
    let mut scales = [0.0; HEADS];
    for (scale, scores) in scales.iter_mut().zip(scores.chunks_exact_mut(stride)) {
        let scores = &mut scores[..seen.len];
        let max = largest(s, scores);
        *scale = 1.0 / exponentials(s, scores, max);
    }
    mix::<S, HEADS>(s, seen, scores, stride, &scales, out);
}

/// `∑ query · key` for every token of a page and every head; a head's scores are `stride` apart.
#[inline(always)]
fn page_scores<S: Simd, const HEADS: usize>(
    s: S,
    seen: &Seen<'_>,
    page: usize,
    queries: &[f32],
    to: &mut [f32],
    stride: usize,
) {
    let (dim, keys, after) = (seen.dim, seen.keys(page), seen.after_keys(page).as_ptr());
    // 32 tokens in steps of at most two vectors, each with two partial sums so that additions overlap.
    let step = (2 * S::LANES).min(PAGE_TOKENS);
    for first in (0..PAGE_TOKENS).step_by(step) {
        let mut even = [[s.splat(0.0); 2]; HEADS];
        let mut odd = [[s.splat(0.0); 2]; HEADS];
        let mut at = first;
        for d in (0..dim - dim % 2).step_by(2) {
            for j in 0..2 {
                let (low, high) = (at + j * S::LANES, at + PAGE_TOKENS + j * S::LANES);
                let (x, y) = (s.get(&keys[low..]), s.get(&keys[high..]));
                s.prefetch_once(after.wrapping_add(low));
                s.prefetch_once(after.wrapping_add(high));
                for h in 0..HEADS {
                    even[h][j] = s.fma(s.splat(queries[h * dim + d]), x, even[h][j]);
                    odd[h][j] = s.fma(s.splat(queries[h * dim + d + 1]), y, odd[h][j]);
                }
            }
            at += 2 * PAGE_TOKENS;
        }
        if !dim.is_multiple_of(2) {
            for j in 0..2 {
                let x = s.get(&keys[at + j * S::LANES..]);
                for h in 0..HEADS {
                    even[h][j] = s.fma(s.splat(queries[h * dim + dim - 1]), x, even[h][j]);
                }
            }
        }
        for h in 0..HEADS {
            for j in 0..2 {
                s.put(&mut to[h * stride + first + j * S::LANES..], s.add(even[h][j], odd[h][j]));
            }
        }
    }
}

/// `out = scale · ∑ weight · value` over the tokens, for each head.
#[inline(always)]
fn mix<S: Simd, const HEADS: usize>(
    s: S,
    seen: &Seen<'_>,
    weights: &[f32],
    stride: usize,
    scales: &[f32; HEADS],
    out: &mut [f32],
) {
    const VECTORS: usize = 4;
    let dim = seen.dim;
    let mut first = 0;
    while first + VECTORS * S::LANES <= dim {
        mixed::<S, HEADS, VECTORS>(s, seen, first, weights, stride, scales, out);
        first += VECTORS * S::LANES;
    }
    while first + S::LANES <= dim {
        mixed::<S, HEADS, 1>(s, seen, first, weights, stride, scales, out);
        first += S::LANES;
    }
    for d in first..dim {
        for (h, scale) in scales.iter().enumerate() {
            let mut sum = 0.0;
            for (index, weight) in weights[h * stride..][..seen.len].iter().enumerate() {
                sum += weight * seen.values(index / PAGE_TOKENS)[index % PAGE_TOKENS * dim + d];
            }
            out[h * dim + d] = sum * scale;
        }
    }
}

/// As [`mix`], for some vectors of every head from number `first`.
#[inline(always)]
fn mixed<S: Simd, const HEADS: usize, const VECTORS: usize>(
    s: S,
    seen: &Seen<'_>,
    first: usize,
    weights: &[f32],
    stride: usize,
    scales: &[f32; HEADS],
    out: &mut [f32],
) {
    let dim = seen.dim;
    let mut sums = [[s.splat(0.0); VECTORS]; HEADS];
    for page in 0..seen.pages.len() {
        let tokens = page * PAGE_TOKENS..seen.len.min((page + 1) * PAGE_TOKENS);
        let after = seen.after_values(page).map_or(std::ptr::null(), <[f32]>::as_ptr);
        for (row, (token, values)) in tokens.zip(seen.values(page).chunks_exact(dim)).enumerate() {
            for j in 0..VECTORS {
                let value = s.get(&values[first + j * S::LANES..]);
                s.prefetch_once(after.wrapping_add(row * dim + first + j * S::LANES));
                for h in 0..HEADS {
                    sums[h][j] = s.fma(s.splat(weights[h * stride + token]), value, sums[h][j]);
                }
            }
        }
    }
    for (h, (sums, scale)) in sums.iter().zip(scales).enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            s.put(&mut out[h * dim + first + j * S::LANES..], s.mul(*sum, s.splat(*scale)));
        }
    }
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
                    attend(isa, heads, &seen, token + 1, queries, &mut scores, &mut found, pages.first());
                    for (f, e) in found.iter().zip(&out[token * width..]) {
                        assert!((f - e).abs() < 4e-6, "{isa:?} {heads:?} token {token}: {f} instead of {e}");
                    }
                }
            }
        }
    }
}
