//! Weights in fewer bits than f32, for models that are bound by the memory that they read: bf16, or whole numbers of one
//! byte with scales. They are widened in registers and summed in f32.
//!
//! **bf16** keeps the upper half of an f32, rounded to the nearest (ties to even). Widened it is an f32 again, and products
//! have the bits of [`crate::gemm::gemm`] on the widened matrix.
//!
//! **int8** (symmetric, in groups): the weights of one output are cut into groups of [`GROUP`] inputs, and
//! ```text
//! s = max |w| / 127        q = round(w / s), a whole number from −127 to 127        w ≈ s·q, |w − s·q| ≤ s / 2
//! y = ∑ over groups  s · ∑ over the group  q·x          so |Δy| ≤ ∑ over groups  s / 2 · ∑ |x|
//! ```
//! A group whose largest weight is below [`SMALLEST`] is all zeros; one with a weight that is not finite makes every product
//! with it NaN, so that a broken model does not look whole.
//!
//! As in [`crate::gemm`], every number of a result is the same sequence of operations whatever the number of rows or threads,
//! and panels of `panel_width` columns are streamed from front to back.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use crate::Isa;
use crate::gemm::{K_BLOCK, panel_width, transpose_into};
use crate::simd::{ROUND, Simd, dispatched};
use crate::threads;

/// Inputs that share a scale of int8.
pub const GROUP: usize = 128;
/// Largest weight of a group that counts as zeros in int8.
pub const SMALLEST: f32 = 1e-30;
/// Panels that a product of few rows reads side by side.
const PANELS_MAX: usize = 4;
/// Rows that are copied at a time.
const ROW_BLOCK: usize = 120;
/// A product cheaper than this many nanoseconds stays on its thread.
const SPREAD_NS: f64 = 12_000.0;

/// How a [`Narrow`] matrix holds its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 16 bits, of which 8 are the exponent.
    Bf16,
    /// 8 bits, and an f32 for each [`GROUP`] of them.
    Int8,
}

impl Format {
    /// Rows of a matrix that are summed before the sum joins what was there.
    fn block(self) -> usize {
        match self {
            Self::Bf16 => K_BLOCK,
            Self::Int8 => GROUP,
        }
    }
}

/// The transpose of a weight matrix `[n, k]`, in panels of narrow numbers.
#[derive(Debug, Clone)]
pub struct Narrow {
    values: Values,
    k: usize,
    n: usize,
    width: usize,
}

#[derive(Debug, Clone)]
enum Values {
    /// `[panel][k][width / 2]`: column i of a panel in the low half of word i, column `i + width / 2` in the high half.
    Bf16(Vec<u32>),
    /// `[panel][k][width]`, and the scales as `[panel][group][width]`.
    Int8(Vec<i8>, Vec<f32>),
}

impl Narrow {
    /// The transpose of `weights`, `[n, k]` row after row: for `y = x · Wᵀ`.
    pub fn transposed(isa: Isa, format: Format, weights: &[f32], n: usize, k: usize) -> Self {
        let mut narrow = Self::zeros(isa, format, n, k);
        narrow.set(isa, 0, weights);
        narrow
    }

    /// Zeros for `n` outputs of `k` inputs.
    pub fn zeros(isa: Isa, format: Format, n: usize, k: usize) -> Self {
        let width = panel_width(isa);
        // Whole groups of panels, so that a product of few rows may always read a group.
        let columns = n.div_ceil(width).next_multiple_of(PANELS_MAX) * width;
        let values = match format {
            Format::Bf16 => Values::Bf16(vec![0; columns / 2 * k]),
            Format::Int8 => Values::Int8(vec![0; columns * k], vec![0.0; columns * k.div_ceil(GROUP)]),
        };
        Self { values, k, n, width }
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// How it holds its numbers.
    pub fn format(&self) -> Format {
        match self.values {
            Values::Bf16(_) => Format::Bf16,
            Values::Int8(..) => Format::Int8,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::Bf16(words) => 4 * words.capacity(),
            Values::Int8(bytes, scales) => bytes.capacity() + 4 * scales.capacity(),
        }
    }

    /// Replaces the weights of the outputs from `first` on by `rows`, of `k` numbers each.
    ///
    /// # Panics
    /// When these are no whole rows, or more than there are.
    pub fn set(&mut self, isa: Isa, first: usize, rows: &[f32]) {
        if rows.is_empty() {
            return;
        }
        let (k, width, format) = (self.k, self.width, self.format());
        assert!(rows.len().is_multiple_of(k) && first + rows.len() / k <= self.n, "rows that the matrix does not have");
        assert_eq!(width, panel_width(isa), "a matrix in panels of another instruction set");
        let outputs = first..first + rows.len() / k;
        let from = |panel: usize| {
            let columns = (panel * width).max(outputs.start)..((panel + 1) * width).min(outputs.end);
            // Those of a panel that none is for are an empty range that starts behind its end.
            let place = columns.start - panel * width..columns.end.max(columns.start) - panel * width;
            (place, &rows[(columns.start - first).min(outputs.len()) * k..])
        };
        let spread = rows.len() > 1 << 16;
        let panels = outputs.start / width..outputs.end.div_ceil(width);
        match &mut self.values {
            Values::Bf16(words) => {
                let part = k * width / 2;
                let words = &mut words[panels.start * part..panels.end * part];
                threads::each_part(words, part, spread, |panel, to| {
                    let (place, from) = from(panels.start + panel);
                    round_panel(isa, from, k, place, to);
                });
            }
            Values::Int8(bytes, scales) => {
                let (part, scale_part) = (k * width, k.div_ceil(format.block()) * width);
                let bytes = &mut bytes[panels.start * part..panels.end * part];
                let scales = &mut scales[panels.start * scale_part..panels.end * scale_part];
                let mut both: Vec<_> = bytes.chunks_exact_mut(part).zip(scales.chunks_exact_mut(scale_part)).collect();
                threads::each_part(&mut both, 1, spread, |panel, both| {
                    let (place, from) = from(panels.start + panel);
                    both.iter_mut().for_each(|(to, scales)| quantise_panel(isa, from, k, place.clone(), to, scales));
                });
            }
        }
    }

    /// The weights of output `output` as products see them.
    ///
    /// # Panics
    /// When there is no such output, or `to` is not `k` long.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        assert!(output < self.n && to.len() == self.k, "output {output} of {}", self.n);
        let (panel, column, width) = (output / self.width, output % self.width, self.width);
        match &self.values {
            Values::Bf16(words) => {
                let half = width / 2;
                let words = words[panel * self.k * half + column % half..].iter().step_by(half);
                let shift = if column < half { 16 } else { 0 };
                to.iter_mut().zip(words).for_each(|(to, word)| *to = f32::from_bits((word << shift) & 0xffff_0000));
            }
            Values::Int8(bytes, scales) => {
                let bytes = bytes[panel * self.k * width + column..].iter().step_by(width);
                let scales = scales[panel * self.k.div_ceil(GROUP) * width + column..].iter().step_by(width);
                let scales = scales.flat_map(|scale| std::iter::repeat_n(scale, GROUP));
                to.iter_mut().zip(bytes.zip(scales)).for_each(|(to, (q, scale))| *to = scale * f32::from(*q));
            }
        }
    }

    /// `out = x · Wᵀ`, or `out += x · Wᵀ`, for `m` rows `x` of `k` numbers; `out` holds rows of `n`.
    ///
    /// # Panics
    /// When a slice is not as long as that, or the matrix was made for another instruction set.
    pub fn product(&self, isa: Isa, m: usize, x: &[f32], out: &mut [f32], add: bool) {
        let (k, n) = (self.k, self.n);
        assert!(x.len() == m * k && out.len() == m * n, "a product of {m} rows by {n} x {k}");
        assert_eq!(self.width, panel_width(isa), "a matrix in panels of another instruction set");
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            if !add {
                out.fill(0.0);
            }
            return;
        }
        let panels = n.div_ceil(self.width);
        // At 80 GF/s, and 10 GB/s for what is read.
        let ns = (2 * m * n) as f64 * k as f64 / 80.0 + self.bytes() as f64 / 10.0;
        let count = if ns < SPREAD_NS { 1 } else { 4 * threads::available() };
        let each = panels.div_ceil(count).next_multiple_of(PANELS_MAX);
        let mut copy = COPY.take();
        for start in (0..m).step_by(ROW_BLOCK) {
            let rows = ROW_BLOCK.min(m - start);
            copy.resize(copy.len().max(rows * k), 0.0);
            copy_rows(isa, &x[start * k..][..rows * k], k, self.format().block(), &mut copy);
            let job = Job { matrix: self, rows, x: &copy[..rows * k], out: Out(out[start * n..].as_mut_ptr()), add };
            threads::each(panels.div_ceil(each), count > 1, |part| {
                // Sizes were checked above, and no two parts share panels.
                piece(isa, job, part * each..panels.min((part + 1) * each));
            });
        }
        COPY.set(copy);
    }
}

thread_local! {
    /// Rows of x in the order in which tiles read them. Taken out while it is used, since other work may run meanwhile.
    static COPY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

// ---- from f32 ---------------------------------------------------------------------------------------------------------

/// A block of at most [`K_BLOCK`] rows of a panel in f32.
const BLOCK_NUMBERS: usize = K_BLOCK * 32;

dispatched! {
    /// The outputs `place` of a panel, whose weights are the first rows of `rows`.
    fn round_panel(rows: &[f32], k: usize, place: Range<usize>, to: &mut [u32]) = round_panel_body;
}

#[inline(always)]
fn round_panel_body<S: Simd>(s: S, rows: &[f32], k: usize, place: Range<usize>, to: &mut [u32]) {
    let (half, width, count) = (S::LANES, 2 * S::LANES, place.len());
    let mut block = [0.0f32; BLOCK_NUMBERS];
    for start in (0..k).step_by(K_BLOCK) {
        let len = K_BLOCK.min(k - start);
        transpose_into(s, &rows[start..], k, count, len, &mut block, width);
        let to = &mut to[start * half..(start + len) * half];
        for (to, from) in to.chunks_exact_mut(half).zip(block.chunks_exact(width)) {
            if count == width {
                let (low, high) = from.split_at(half);
                for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
                    *to = rounded(*low) | rounded(*high) << 16;
                }
                continue;
            }
            for (column, x) in place.clone().zip(from) {
                let (word, shift) = (&mut to[column % half], if column < half { 0 } else { 16 });
                *word = *word & !(0xffff << shift) | rounded(*x) << shift;
            }
        }
    }
}

/// Rounds numbers to the nearest bf16.
pub fn round_bf16(values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x = f32::from_bits(rounded(*x) << 16));
}

#[inline(always)]
fn rounded(x: f32) -> u32 {
    u32::from(bf16::from_f32(x).to_bits())
}

dispatched! {
    /// Likewise, with the scales of the panel.
    fn quantise_panel(rows: &[f32], k: usize, place: Range<usize>, to: &mut [i8], scales: &mut [f32]) = quantise_panel_body;
}

#[inline(always)]
fn quantise_panel_body<S: Simd>(s: S, rows: &[f32], k: usize, place: Range<usize>, to: &mut [i8], scales: &mut [f32]) {
    let (width, count) = (2 * S::LANES, place.len());
    let mut block = [0.0f32; GROUP * 32];
    for (start, scales) in (0..k).step_by(GROUP).zip(scales.chunks_exact_mut(width)) {
        let len = GROUP.min(k - start);
        transpose_into(s, &rows[start..], k, count, len, &mut block, width);
        // Bits without the sign rise with the size, infinities and NaN last.
        let mut largest = [0u32; 32];
        for row in block[..len * width].chunks_exact(width) {
            for (largest, x) in largest[..width].iter_mut().zip(row) {
                *largest = (*largest).max(x.to_bits() & 0x7fff_ffff);
            }
        }
        let (mut inverse, mut found) = ([0.0f32; 32], [0.0f32; 32]);
        for ((inverse, scale), largest) in inverse.iter_mut().zip(&mut found).zip(largest.map(f32::from_bits)) {
            (*inverse, *scale) = match largest {
                _ if !largest.is_finite() => (0.0, f32::NAN),
                _ if largest < SMALLEST => (0.0, 0.0),
                _ => (127.0 / largest, largest / 127.0),
            };
        }
        scales[place.clone()].copy_from_slice(&found[..count]);
        let to = &mut to[start * width..(start + len) * width];
        for (to, from) in to.chunks_exact_mut(width).zip(block.chunks_exact(width)) {
            for ((to, x), inverse) in to[place.clone()].iter_mut().zip(from).zip(&inverse) {
                // The sum's low bits are the rounded number.
                *to = (x * inverse + ROUND).to_bits() as i8;
            }
        }
    }
}

// ---- products ---------------------------------------------------------------------------------------------------------

dispatched! {
    /// Rows of x as `[block of k][row group][k of the block][rows of the group]`.
    fn copy_rows(x: &[f32], k: usize, block: usize, to: &mut [f32]) = copy_rows_body;
}

#[inline(always)]
fn copy_rows_body<S: Simd>(s: S, x: &[f32], k: usize, block: usize, to: &mut [f32]) {
    let rows = x.len() / k;
    let group = group_rows::<S>(rows);
    for start in (0..k).step_by(block) {
        let len = block.min(k - start);
        for first in (0..rows).step_by(group) {
            let count = group.min(rows - first);
            let to = &mut to[start * rows + first * len..][..count * len];
            transpose_into(s, &x[first * k + start..], k, count, len, to, count);
        }
    }
}

/// Rows of each tile, so that they are about equal.
#[inline(always)]
fn group_rows<S: Simd>(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(S::ROWS))
}

/// The result's place, shared by the pieces of a product, which write to different parts of it.
#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: pieces write to disjoint parts; the slice behind it outlives the product.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

/// What every piece of a product needs.
#[derive(Clone, Copy)]
struct Job<'a> {
    matrix: &'a Narrow,
    rows: usize,
    /// As [`copy_rows`] leaves them.
    x: &'a [f32],
    out: Out,
    add: bool,
}

dispatched! {
    /// The panels `panels` of a product. Only for [`Narrow::product`], which has checked that `x` and `out` fit and that nothing
    /// else writes to these panels.
    fn piece(job: Job<'_>, panels: Range<usize>) = piece_body;
}

#[inline(always)]
fn piece_body<S: Simd>(s: S, job: Job<'_>, panels: Range<usize>) {
    match &job.matrix.values {
        Values::Bf16(words) => panels_body(s, job, words, None, panels),
        Values::Int8(bytes, scales) => panels_body(s, job, bytes, Some(scales.as_slice()), panels),
    }
}

/// Numbers of a panel's row as they lie in memory.
trait Element: Copy {
    /// How many of them hold a vector.
    fn per_vector<S: Simd>() -> usize;
    /// A row of a panel.
    /// # Safety
    /// `from` may be read for two vectors.
    unsafe fn pair<S: Simd>(s: S, from: *const Self) -> [S::V; 2];
}

impl Element for u32 {
    #[inline(always)]
    fn per_vector<S: Simd>() -> usize {
        S::LANES / 2
    }
    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u32) -> [S::V; 2] {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(from) }
    }
}

impl Element for i8 {
    #[inline(always)]
    fn per_vector<S: Simd>() -> usize {
        S::LANES
    }
    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const i8) -> [S::V; 2] {
        // SAFETY: the caller's promise.
        unsafe { [s.load_i8(from), s.load_i8(from.add(S::LANES))] }
    }
}

#[inline(always)]
fn panels_body<S: Simd, E: Element>(s: S, job: Job<'_>, values: &[E], scales: Option<&[f32]>, panels: Range<usize>) {
    let Job { matrix, rows, .. } = job;
    let (k, n, width) = (matrix.k, matrix.n, 2 * S::LANES);
    let block = matrix.format().block();
    let row = 2 * E::per_vector::<S>();
    let group = group_rows::<S>(rows);
    let taken = if rows > S::ROWS { 1 } else { s.panels(rows) };
    let blocks = k.div_ceil(block);
    for panel in panels.step_by(taken) {
        let column = panel * width;
        for (index, start) in (0..k).step_by(block).enumerate() {
            let len = block.min(k - start);
            let from = &values[(panel * k + start) * row..];
            for first in (0..rows).step_by(group) {
                let tile = Tile {
                    x: &job.x[start * rows + first * len..],
                    k: len,
                    scales: scales.map(|scales| &scales[(panel * blocks + index) * width..]),
                    scales_stride: blocks * width,
                    // SAFETY: within the result, whose size was checked.
                    out: unsafe { job.out.0.add(first * n + column) },
                    out_stride: n,
                    columns: (n - column).min(taken * width),
                    add: job.add || index > 0,
                    soon: if first == 0 { len * row } else { 0 },
                };
                // SAFETY: x holds `rows` rows of each block; the panels are there, since parts are whole groups of panels and
                // so is the matrix; the result was checked, and no other part has these columns.
                unsafe { rows_of(s, group.min(rows - first), taken, &tile, from, k * row) };
            }
        }
    }
}

/// One tile of a product.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// `[k][rows]`.
    x: &'a [f32],
    k: usize,
    /// A panel's, `scales_stride` apart; none where products are not scaled.
    scales: Option<&'a [f32]>,
    scales_stride: usize,
    out: *mut f32,
    out_stride: usize,
    /// Columns of the result that exist here.
    columns: usize,
    add: bool,
    /// How many numbers of the panel further on the next block begins, or 0 where it was asked for already.
    soon: usize,
}

/// # Safety
/// As [`micro_tile`], with one panel or [`Simd::panels`] of them.
#[inline(always)]
unsafe fn rows_of<S: Simd, E: Element>(s: S, rows: usize, panels: usize, tile: &Tile<'_>, from: &[E], stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match (rows, panels) {
            (1, 1) => micro_tile::<S, E, 1, 1>(s, tile, from, stride),
            (2, 1) => micro_tile::<S, E, 2, 1>(s, tile, from, stride),
            (3, 1) => micro_tile::<S, E, 3, 1>(s, tile, from, stride),
            (1, _) => micro_tile::<S, E, 1, 4>(s, tile, from, stride),
            (2, _) => micro_tile::<S, E, 2, 2>(s, tile, from, stride),
            (3, _) => micro_tile::<S, E, 3, 2>(s, tile, from, stride),
            (4, _) => micro_tile::<S, E, 4, 1>(s, tile, from, stride),
            (5, _) => micro_tile::<S, E, 5, 1>(s, tile, from, stride),
            (6, _) => micro_tile::<S, E, 6, 1>(s, tile, from, stride),
            (7, _) => micro_tile::<S, E, 7, 1>(s, tile, from, stride),
            (8, _) => micro_tile::<S, E, 8, 1>(s, tile, from, stride),
            (9, _) => micro_tile::<S, E, 9, 1>(s, tile, from, stride),
            (10, _) => micro_tile::<S, E, 10, 1>(s, tile, from, stride),
            (11, _) => micro_tile::<S, E, 11, 1>(s, tile, from, stride),
            _ => micro_tile::<S, E, 12, 1>(s, tile, from, stride),
        }
    }
}

/// # Safety
/// `tile.x` holds `k · ROWS` numbers, `from` `k` rows of each of `PANELS` panels that are `stride` apart, `tile.scales` a row
/// of each; `tile.out` may be read and written in `ROWS` rows of `min(columns, PANELS · 2 · LANES)` numbers.
#[inline(always)]
unsafe fn micro_tile<S: Simd, E: Element, const ROWS: usize, const PANELS: usize>(
    s: S,
    tile: &Tile<'_>,
    from: &[E],
    stride: usize,
) {
    let (width, row) = (2 * S::LANES, 2 * E::per_vector::<S>());
    let mut sums = [[[s.splat(0.0); 2]; PANELS]; ROWS];
    let (mut x, mut b) = (tile.x.as_ptr(), from.as_ptr());
    for _ in 0..tile.k {
        let mut pairs = [[s.splat(0.0); 2]; PANELS];
        for (j, pair) in pairs.iter_mut().enumerate() {
            // SAFETY: a row of panel j.
            *pair = unsafe { E::pair(s, b.add(j * stride)) };
        }
        // Of more panels, each is a stream that the processor follows by itself.
        if PANELS == 1 {
            s.prefetch_far(b.wrapping_add(tile.soon).cast());
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: row i at this k.
            let x_i = s.splat(unsafe { *x.add(i) });
            for j in 0..PANELS {
                sums[j][0] = s.fma(x_i, pairs[j][0], sums[j][0]);
                sums[j][1] = s.fma(x_i, pairs[j][1], sums[j][1]);
            }
        }
        // SAFETY: at most one past the end.
        (x, b) = unsafe { (x.add(ROWS), b.add(row)) };
    }
    let columns = tile.columns.min(PANELS * width);
    for (i, sums) in sums.iter().enumerate() {
        let mut edge = [0.0f32; PANELS_MAX * 32];
        // SAFETY: row i of the result.
        let out = unsafe { tile.out.add(i * tile.out_stride) };
        let whole = columns == PANELS * width;
        if !whole && tile.add {
            // SAFETY: these columns exist.
            unsafe { std::ptr::copy_nonoverlapping(out, edge.as_mut_ptr(), columns) };
        }
        let to = if whole { out } else { edge.as_mut_ptr() };
        for j in 0..2 * PANELS {
            let sum = sums[j / 2][j % 2];
            // SAFETY: `to` has all columns, and the scales a row of every panel.
            unsafe {
                let to = to.add(j * S::LANES);
                let value = match (tile.scales, tile.add) {
                    (None, false) => sum,
                    (None, true) => s.add(s.load(to), sum),
                    (Some(scales), add) => {
                        let scale = s.get(&scales[j / 2 * tile.scales_stride + j % 2 * S::LANES..]);
                        if add { s.fma(scale, sum, s.load(to)) } else { s.mul(scale, sum) }
                    }
                };
                s.store(to, value);
            }
        }
        if !whole {
            // SAFETY: these columns exist.
            unsafe { std::ptr::copy_nonoverlapping(edge.as_ptr(), out, columns) };
        }
    }
}

#[cfg(test)]
mod tests;
