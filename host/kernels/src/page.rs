//! Keys and values of one sequence in pages, and attention of single tokens over them.
//!
//! In a page the keys of a head lie transposed in blocks of tokens, so that these tokens' scores are computed side by side; the
//! values lie row after row. A token's result depends on its own pages only, in one order of operations.
#![allow(unsafe_code)]

use crate::Isa;
use crate::attention::{Heads, exponentials, largest};
use crate::memory::Buffer;
use crate::simd::{Simd, dispatched};

/// Tokens of a page: two of the widest vectors.
pub const PAGE_TOKENS: usize = 32;

/// Heads of one key-value head that are computed side by side, so that what is loaded serves them all.
const HEADS_TOGETHER: usize = 2;

/// Tokens whose keys lie side by side. Blocks without tokens are not read.
const BLOCK_TOKENS: usize = 16;

/// Keys `[kv head][block][dim][token of the block]`, then values `[kv head][token][dim]`, of up to [`PAGE_TOKENS`] tokens.
#[derive(Debug, Clone)]
pub struct Page(Buffer);

impl Page {
    /// An empty page.
    pub fn new(heads: Heads) -> Self {
        Self(Buffer::zeros(Self::bytes(heads) / 4))
    }

    /// Bytes of a page.
    pub fn bytes(heads: Heads) -> usize {
        8 * heads.kv_heads * heads.dim * PAGE_TOKENS
    }

    fn keys(&self) -> &[f32] {
        &self.0[..self.0.len() / 2]
    }

    fn values(&self) -> &[f32] {
        &self.0[self.0.len() / 2..]
    }

    /// Takes what another page holds, in its own memory.
    pub fn copy_from(&mut self, other: &Self) {
        self.0.copy_from_slice(&other.0);
    }

    /// What attention over its first `tokens` tokens reads, piece by piece.
    pub fn read<'a>(&'a self, heads: Heads, tokens: usize) -> impl Iterator<Item = &'a [f32]> {
        let (dim, full) = (heads.dim, tokens >= PAGE_TOKENS);
        let (whole, keys, values) =
            if full { (Some(&*self.0), &[][..], &[][..]) } else { (None, self.keys(), self.values()) };
        let parts = move |numbers: &'a [f32], tokens: usize| {
            numbers.chunks((dim * PAGE_TOKENS).max(1)).map(move |part| &part[..dim * tokens])
        };
        whole.into_iter().chain(parts(keys, tokens.next_multiple_of(BLOCK_TOKENS))).chain(parts(values, tokens))
    }

    /// Puts a token's keys and values, `[kv heads · dim]` each, into place `token`.
    pub fn put(&mut self, heads: Heads, token: usize, keys: &[f32], values: &[f32]) {
        let (dim, half) = (heads.dim, self.0.len() / 2);
        let (own_keys, own_values) = self.0.split_at_mut(half);
        for (head, from) in keys.chunks_exact(dim).enumerate() {
            let (rows, _) = part_mut(own_keys, head, dim).as_chunks_mut::<BLOCK_TOKENS>();
            let rows = &mut rows[token / BLOCK_TOKENS * dim..][..dim];
            rows.iter_mut().zip(from).for_each(|(row, from)| row[token % BLOCK_TOKENS] = *from);
        }
        for (head, from) in values.chunks_exact(dim).enumerate() {
            part_mut(own_values, head, dim)[token * dim..][..dim].copy_from_slice(from);
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
    /// `[block][dim][token of the block]` of a page.
    fn keys(&self, page: usize) -> &'a [f32] {
        part(self.pages[page].keys(), self.kv_head, self.dim)
    }

    /// `[token][dim]` of a page.
    fn values(&self, page: usize) -> &'a [f32] {
        part(self.pages[page].values(), self.kv_head, self.dim)
    }

    /// How many of a page's tokens there are.
    fn tokens(&self, page: usize) -> usize {
        self.len.saturating_sub(page * PAGE_TOKENS).min(PAGE_TOKENS)
    }

    /// What is read after a page's keys, and how many tokens of it.
    fn after_keys(&self, page: usize) -> (&'a [f32], usize) {
        let next = page + 1;
        if next < self.pages.len() { (self.keys(next), self.tokens(next)) } else { (self.values(0), self.tokens(0)) }
    }

    /// As [`Seen::after_keys`], after a page's values.
    fn after_values(&self, page: usize) -> (&'a [f32], usize) {
        let next = page + 1;
        match self.after {
            _ if next < self.pages.len() => (self.values(next), self.tokens(next)),
            Some(after) => (after, PAGE_TOKENS),
            None => (&[], 0),
        }
    }
}

/// One head's numbers of a page's keys or values.
fn part(numbers: &[f32], kv_head: usize, dim: usize) -> &[f32] {
    &numbers[kv_head * dim * PAGE_TOKENS..][..dim * PAGE_TOKENS]
}

fn part_mut(numbers: &mut [f32], kv_head: usize, dim: usize) -> &mut [f32] {
    &mut numbers[kv_head * dim * PAGE_TOKENS..][..dim * PAGE_TOKENS]
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
            _ if kv_head + 1 < heads.kv_heads => Some(part(pages[0].keys(), kv_head + 1, dim)),
            Some(page) => Some(part(page.keys(), 0, dim)),
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

/// `∑ query · key` for every token of a page and every head; a head's scores are `stride` apart, and those of tokens beyond
/// the last hold anything.
#[inline(always)]
fn page_scores<S: Simd, const HEADS: usize>(
    s: S,
    seen: &Seen<'_>,
    page: usize,
    queries: &[f32],
    to: &mut [f32],
    stride: usize,
) {
    let tokens = seen.tokens(page);
    let mut first = 0;
    while first < tokens {
        if tokens - first > S::LANES {
            token_scores::<S, HEADS, 2>(s, seen, page, first, queries, to, stride);
            first += 2 * S::LANES;
        } else {
            token_scores::<S, HEADS, 1>(s, seen, page, first, queries, to, stride);
            first += S::LANES;
        }
    }
}

/// As [`page_scores`] for some vectors of tokens from the first on, each with two partial sums so that additions overlap.
#[inline(always)]
fn token_scores<S: Simd, const HEADS: usize, const VECTORS: usize>(
    s: S,
    seen: &Seen<'_>,
    page: usize,
    first: usize,
    queries: &[f32],
    to: &mut [f32],
    stride: usize,
) {
    let (dim, keys) = (seen.dim, seen.keys(page));
    let (after, after_tokens) = seen.after_keys(page);
    // Two of them, so that what follows a page that is half empty is asked for as a whole.
    let mut places = [0; 2];
    // Where nothing is wanted, what is at hand is asked for.
    let mut asked = [keys.as_ptr(); 2];
    for (j, (place, asked)) in places.iter_mut().zip(&mut asked).enumerate() {
        let (block, token) = ((first + j * S::LANES) / BLOCK_TOKENS, (first + j * S::LANES) % BLOCK_TOKENS);
        *place = block * BLOCK_TOKENS * dim + token;
        if block * BLOCK_TOKENS < after_tokens {
            *asked = after.as_ptr().wrapping_add(*place);
        }
    }
    let mut even = [[s.splat(0.0); VECTORS]; HEADS];
    let mut odd = [[s.splat(0.0); VECTORS]; HEADS];
    assert!(queries.len() >= HEADS * dim && dim > 0);
    for place in &places[..VECTORS] {
        assert!(place + (dim - 1) * BLOCK_TOKENS + S::LANES <= keys.len());
    }
    let at = keys.as_ptr();
    for d in (0..dim - dim % 2).step_by(2) {
        for asked in &asked {
            s.prefetch_once(asked.wrapping_add(d * BLOCK_TOKENS));
            s.prefetch_once(asked.wrapping_add((d + 1) * BLOCK_TOKENS));
        }
        for j in 0..VECTORS {
            // SAFETY: the vectors of all of `dim` were checked above.
            let (x, y) = unsafe {
                let low = at.add(places[j] + d * BLOCK_TOKENS);
                (s.load(low), s.load(low.add(BLOCK_TOKENS)))
            };
            for h in 0..HEADS {
                even[h][j] = s.fma(s.splat(queries[h * dim + d]), x, even[h][j]);
                odd[h][j] = s.fma(s.splat(queries[h * dim + d + 1]), y, odd[h][j]);
            }
        }
    }
    if !dim.is_multiple_of(2) {
        for j in 0..VECTORS {
            // SAFETY: as above.
            let x = unsafe { s.load(at.add(places[j] + (dim - 1) * BLOCK_TOKENS)) };
            for h in 0..HEADS {
                even[h][j] = s.fma(s.splat(queries[h * dim + dim - 1]), x, even[h][j]);
            }
        }
    }
    for h in 0..HEADS {
        for j in 0..VECTORS {
            s.put(&mut to[h * stride + first + j * S::LANES..], s.add(even[h][j], odd[h][j]));
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
        let (after, after_tokens) = seen.after_values(page);
        for (row, (token, values)) in tokens.zip(seen.values(page).chunks_exact(dim)).enumerate() {
            let asked = if row < after_tokens { after.as_ptr().wrapping_add(row * dim) } else { values.as_ptr() };
            for j in 0..VECTORS {
                let value = s.get(&values[first + j * S::LANES..]);
                s.prefetch_once(asked.wrapping_add(first + j * S::LANES));
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

    #[test]
    fn what_is_read_holds_every_token_and_little_else() {
        let heads = Heads { heads: 4, kv_heads: 2, dim: 6 };
        let width = heads.kv_heads * heads.dim;
        let mut page = Page::new(heads);
        for token in 0..PAGE_TOKENS {
            let (key, value) = (2.0 * token as f32 + 1.0, 2.0 * token as f32 + 2.0);
            page.put(heads, token, &vec![key; width], &vec![value; width]);
            let read: Vec<f32> = page.read(heads, token + 1).flatten().copied().filter(|x| *x > 0.0).collect();
            for seen in 1..=2 * token + 2 {
                assert_eq!(read.iter().filter(|x| **x == seen as f32).count(), width, "{seen} of {token}");
            }
            let len: usize = page.read(heads, token + 1).map(<[f32]>::len).sum();
            assert!(len <= width * (2 * (token + 1) + BLOCK_TOKENS - 1));
        }
    }
}
