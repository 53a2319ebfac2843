//! Matrix products `C = A · B` and `C += A · B` in f32.
//!
//! B is read in *panels*: [`panel_width`] columns side by side, row after row, so that a product streams it from front
//! to back. Weights are put into panels once ([`Packed`]); other matrices piece by piece as the product goes. A's rows are
//! copied a few at a time, column after column. A micro-tile keeps a block of C in registers while it walks down k.
//!
//! Every number of C is the same sequence of fused multiply-adds whatever the number of rows, columns or threads: along
//! k in blocks of [`K_BLOCK`], each summed in order, the blocks added in order.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use crate::Isa;
use crate::ahead::{self, LINE};
use crate::isa::Kind;
use crate::memory::Buffer;
use crate::simd::{Simd, dispatched};
use crate::threads;

/// Rows of B per pass: a panel of them stays in the first cache.
pub const K_BLOCK: usize = 256;
/// Rows of A that are copied at a time: with [`K_BLOCK`] columns they stay in the second cache. A multiple of every
/// micro-tile's rows.
const ROW_BLOCK: usize = 120;
/// Panels of B that are copied at a time when B is not in panels already.
const PANEL_BLOCK: usize = 16;
/// The same where they are shallower than [`K_BLOCK`], so that A's rows are copied less often.
const SHALLOW_PANEL_BLOCK: usize = 28;
/// Numbers of the longest vector.
const VECTOR_MAX: usize = 16;
/// A micro-tile of few rows reads up to this many panels.
const PANELS_MAX: usize = 4;
/// Streams of memory that a micro-tile may ask for while it runs.
const STREAMS: usize = 3;
/// Steps of a micro-tile in which a stream of what others asked for comes a line further. The first cache can wait for some
/// dozens of lines; where slow memory takes all of these places, what the tile itself reads has to queue behind it.
const STEPS_PER_LINE: usize = 2;
/// Parts may take so much longer than the fastest ones if there are more of them.
const PARTS_COST_MAX: f64 = 1.015;
/// A product cheaper than this many nanoseconds stays on its thread.
const SPREAD_NS: f64 = 12_000.0;

/// A matrix in panels, zeros beyond its last column.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    data: Buffer,
    k: usize,
    n: usize,
}

/// The left factor, `m × k`.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// Rows of k numbers, `stride` apart.
    Rows(&'a [f32], usize),
    /// Columns of m numbers, `stride` apart: a matrix of `k × m` read transposed.
    Columns(&'a [f32], usize),
}

/// The right factor, `k × n`.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// In panels. It may have more rows than the product uses.
    Packed(&'a Packed),
    /// Rows of n numbers, `stride` apart.
    Rows(&'a [f32], usize),
    /// Columns of k numbers, `stride` apart: a matrix of `n × k` read transposed, as weights are in `y = x · Wᵀ`.
    Columns(&'a [f32], usize),
}

/// Sizes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// One micro-tile of a product.
pub(crate) struct Tile {
    /// `[k][rows]`.
    a: *const f32,
    /// `[panel][k][width]`, panels `panel_stride` apart.
    b: *const f32,
    panel_stride: usize,
    /// Whether the first column is in the middle of a panel.
    odd: bool,
    k: usize,
    c: *mut f32,
    c_stride: usize,
    /// Columns of C that exist here.
    columns: usize,
    add: bool,
    /// What is wanted soon after this tile, of which it asks for as many as [`streams`] says.
    soon: [Stream; STREAMS],
}

/// Memory that a micro-tile asks for, a little with every row of k.
#[derive(Clone, Copy)]
struct Stream {
    at: *const f32,
    /// How far it goes with a row.
    step: usize,
}

/// # Safety
/// `tile.a` may be read for `k · ROWS` numbers, `tile.b` for `k` rows of `VECTORS` vectors, two in a panel, and `tile.c` read
/// and written in `ROWS` rows of `min(columns, VECTORS · LANES)` numbers.
#[inline(always)]
pub(crate) unsafe fn micro_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(s: S, tile: &Tile) {
    let width = 2 * S::LANES;
    let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
    let mut places = [0; VECTORS];
    for (j, place) in (usize::from(tile.odd)..).zip(&mut places) {
        *place = j / 2 * tile.panel_stride + j % 2 * S::LANES;
    }
    let (mut a, mut b, mut soon) = (tile.a, tile.b, tile.soon);
    for i in 0..ROWS {
        // C is read or written only at the end, and comes from memory: it is asked for now.
        let c = tile.c.wrapping_add(i * tile.c_stride);
        for j in 0..VECTORS {
            s.prefetch(c.wrapping_add(j * S::LANES));
        }
    }
    for _ in 0..tile.k {
        for stream in &mut soon[..const { streams(VECTORS) }] {
            s.prefetch_far(stream.at);
            stream.at = stream.at.wrapping_add(stream.step);
        }
        let mut row = [s.splat(0.0); VECTORS];
        for (b_j, place) in row.iter_mut().zip(&places) {
            // SAFETY: row `k` of this vector lies within what the caller promised.
            *b_j = unsafe { s.load(b.add(*place)) };
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above, for `a`.
            let a_i = s.splat(unsafe { *a.add(i) });
            for j in 0..VECTORS {
                sums[j] = s.fma(a_i, row[j], sums[j]);
            }
        }
        // SAFETY: at most one past the end.
        (a, b) = unsafe { (a.add(ROWS), b.add(width)) };
    }
    if tile.columns >= VECTORS * S::LANES {
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                // SAFETY: row i of C, in which all of these columns exist.
                unsafe {
                    let to = tile.c.add(i * tile.c_stride + j * S::LANES);
                    s.store(to, if tile.add { s.add(s.load(to), *sum) } else { *sum });
                }
            }
        }
        return;
    }
    // Apart, with sums in memory, so that those above stay in registers.
    let mut spilt = [[[0.0f32; VECTOR_MAX]; VECTORS]; ROWS];
    for (spilt, sums) in spilt.iter_mut().zip(&sums) {
        for (spilt, sum) in spilt.iter_mut().zip(sums) {
            s.put(spilt, *sum);
        }
    }
    for (i, spilt) in spilt.iter().enumerate() {
        for column in 0..tile.columns {
            // SAFETY: these columns of row i of C exist.
            unsafe {
                let to = tile.c.add(i * tile.c_stride + column);
                let sum = spilt[column / S::LANES][column % S::LANES];
                *to = if tile.add { *to + sum } else { sum };
            }
        }
    }
}

/// Columns of a panel.
pub fn panel_width(isa: Isa) -> usize {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => 32,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => 16,
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => 8,
        Kind::Scalar => 8,
    }
}

impl Packed {
    /// The transpose of `weights`, `[n, k]` row after row: for `y = x · Wᵀ`.
    pub fn transposed(isa: Isa, weights: &[f32], n: usize, k: usize) -> Self {
        let mut packed = Self::default();
        packed.set_transposed(isa, weights, k, n, k);
        packed
    }

    /// Rows.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * self.data.len()
    }

    /// Says that a product with this matrix follows the next one of this thread.
    pub fn follows(&self) {
        ahead::follow(&self.data);
    }

    /// Becomes the transpose of `n` rows of k numbers, `stride` apart, in the memory that it has.
    pub fn set_transposed(&mut self, isa: Isa, rows: &[f32], stride: usize, n: usize, k: usize) {
        assert!(n == 0 || k == 0 || rows.len() >= (n - 1) * stride + k, "a matrix of {n} rows is too short");
        let width = self.resize(isa, n, k);
        threads::each_part(&mut self.data, (k * width).max(1), n * k > 1 << 16, |panel, to| {
            let first = panel * width;
            if first < n {
                transpose(isa, &rows[first * stride..], stride, width.min(n - first), k, to, width);
            }
        });
    }

    /// Becomes `k` rows of n numbers, `stride` apart, in the memory that it has.
    pub fn set_rows(&mut self, isa: Isa, rows: &[f32], stride: usize, n: usize, k: usize) {
        assert!(n == 0 || k == 0 || rows.len() >= (k - 1) * stride + n, "a matrix of {k} rows is too short");
        let width = self.resize(isa, n, k);
        for (panel, to) in self.data.chunks_exact_mut((k * width).max(1)).enumerate() {
            let first = panel * width;
            if first < n {
                copy_panel(&rows[first..], stride, width.min(n - first), k, to, width);
            }
        }
    }

    fn resize(&mut self, isa: Isa, n: usize, k: usize) -> usize {
        let width = panel_width(isa);
        // Whole groups of panels, so that a micro-tile of few rows may always read a group.
        let panels = n.div_ceil(width).next_multiple_of(PANELS_MAX);
        if self.data.len() != panels * width * k {
            // The old memory first, so that the new may lie there.
            self.data = Buffer::empty();
            self.data = Buffer::zeros(panels * width * k);
        }
        (self.k, self.n) = (k, n);
        width
    }
}

dispatched! {
    fn transpose(rows: &[f32], stride: usize, count: usize, k: usize, to: &mut [f32], width: usize) = transpose_into;
}

/// `to[p · width + i] = rows[i · stride + p]` for the first `count` rows of `k` numbers, zeros beyond. Where `width` is less
/// than a vector, what follows in `to` may be overwritten.
#[inline(always)]
pub(crate) fn transpose_into<S: Simd>(
    s: S,
    rows: &[f32],
    stride: usize,
    count: usize,
    k: usize,
    to: &mut [f32],
    width: usize,
) {
    let whole = width.is_multiple_of(S::LANES);
    let mut p = 0;
    if S::TURNS_EIGHT && (count, width) == (8, 8) {
        p = turn_eights(s, rows, stride, k, to);
    }
    // A vector that ends beyond its column is mended by the column after it, which comes later.
    while (whole || width < S::LANES) && p + S::LANES <= k && (p + S::LANES - 1) * width + S::LANES <= to.len() {
        let mut i = 0;
        while i < width {
            let mut block = [s.splat(0.0); 16];
            if count >= i + S::LANES {
                // Of a length that is known, so that it stays in registers.
                load_rows(s, rows, i * stride + p, stride, width * stride, &mut block[..S::LANES]);
            } else {
                let there = count.saturating_sub(i);
                load_rows(s, rows, i * stride + p, stride, width * stride, &mut block[..there]);
            }
            s.transpose(&mut block[..S::LANES]);
            for (q, column) in block[..S::LANES].iter().enumerate() {
                s.put(&mut to[(p + q) * width + i..], *column);
            }
            i += S::LANES;
        }
        p += S::LANES;
    }
    for p in p..k {
        for i in 0..width {
            to[p * width + i] = if i < count { rows[i * stride + p] } else { 0.0 };
        }
    }
}

/// Vectors of rows `stride` apart, the first at `at`.
#[inline(always)]
fn load_rows<S: Simd>(s: S, rows: &[f32], at: usize, stride: usize, next: usize, to: &mut [S::V]) {
    for (j, row) in to.iter_mut().enumerate() {
        let from = &rows[at + j * stride..];
        *row = s.get(from);
        // The rows of the next panel come from memory, too short for the hardware to see a stream.
        s.prefetch_far(from.as_ptr().wrapping_add(next));
    }
}

/// As [`transpose_into`] for eight rows in full, as far as vectors go: how many numbers of each row.
#[inline(always)]
fn turn_eights<S: Simd>(s: S, rows: &[f32], stride: usize, k: usize, to: &mut [f32]) -> usize {
    let whole = k / S::LANES * S::LANES;
    for (at, to) in (0..whole).step_by(S::LANES).zip(to.chunks_exact_mut(8 * S::LANES)) {
        let mut block = [s.splat(0.0); 8];
        load_rows(s, rows, at, stride, 8 * stride, &mut block);
        s.turn_eight(&mut block);
        for (to, columns) in to.chunks_exact_mut(S::LANES).zip(&block) {
            s.put(to, *columns);
        }
    }
    whole
}

/// One panel of a matrix of rows: `count` columns of `k` rows, zeros beyond.
fn copy_panel(rows: &[f32], stride: usize, count: usize, k: usize, to: &mut [f32], width: usize) {
    fn whole<const WIDTH: usize>(rows: &[f32], stride: usize, to: &mut [f32]) {
        for (p, to) in to.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
            if let Some(from) = rows[p * stride..].first_chunk() {
                *to = *from;
            }
        }
    }
    let to = &mut to[..k * width];
    match (count == width, width) {
        (true, 32) => whole::<32>(rows, stride, to),
        (true, 16) => whole::<16>(rows, stride, to),
        (true, 8) => whole::<8>(rows, stride, to),
        _ => {
            for (p, to) in to.chunks_exact_mut(width).enumerate() {
                to[..count].copy_from_slice(&rows[p * stride..][..count]);
                to[count..].fill(0.0);
            }
        }
    }
}

/// C's place, shared by the pieces of a product, which write to different parts of it.
#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: pieces write to disjoint parts; the slice behind it outlives the product.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

/// Everything that a piece of a product needs.
#[derive(Clone, Copy)]
struct Job<'a> {
    shape: Shape,
    left: Left<'a>,
    right: Right<'a>,
    out: Out,
    out_stride: usize,
    add: bool,
}

/// `out = left · right`, or `out += left · right`; `out` holds rows of `n` numbers, `out_stride` apart.
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm(isa: Isa, shape: Shape, left: Left<'_>, right: Right<'_>, out: &mut [f32], out_stride: usize, add: bool) {
    let Shape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    assert!(out_stride >= n && out.len() >= (m - 1) * out_stride + n, "the result is too short");
    if k == 0 {
        if !add {
            out.chunks_mut(out_stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    match left {
        Left::Rows(data, stride) => assert!(stride >= k && data.len() >= (m - 1) * stride + k, "A is too short"),
        Left::Columns(data, stride) => assert!(stride >= m && data.len() >= (k - 1) * stride + m, "A is too short"),
    }
    match right {
        Right::Packed(packed) => assert!(packed.k >= k && packed.n >= n, "B is too short"),
        Right::Rows(data, stride) => assert!(stride >= n && data.len() >= (k - 1) * stride + n, "B is too short"),
        Right::Columns(data, stride) => assert!(stride >= k && data.len() >= (n - 1) * stride + k, "B is too short"),
    }
    let job = Job { shape, left, right, out: Out(out.as_mut_ptr()), out_stride, add };
    let (row_parts, column_parts) = cut(isa, &job);
    let panels = n.div_ceil(panel_width(isa));
    let rows_each = m.div_ceil(row_parts).next_multiple_of(ROW_BLOCK.min(12));
    let panels_each = panels.div_ceil(column_parts).next_multiple_of(PANELS_MAX);
    let (row_parts, column_parts) = (m.div_ceil(rows_each), panels.div_ceil(panels_each));
    threads::each(row_parts * column_parts, true, |part| {
        let (row, column) = (part % row_parts, part / row_parts);
        let rows = row * rows_each..m.min((row + 1) * rows_each);
        let panels = column * panels_each..panels.min((column + 1) * panels_each);
        // The slices were checked above, and no two parts share rows and panels.
        piece(isa, job, rows, panels);
    });
}

/// Into how many parts rows and columns are cut.
fn cut(isa: Isa, job: &Job<'_>) -> (usize, usize) {
    let Shape { m, n, k } = job.shape;
    // At 90 GF/s, and 10 GB/s where B is read for few rows.
    let ns = (2 * m * n) as f64 * k as f64 / 90.0 + (4 * n) as f64 * k as f64 / 10.0;
    let threads = threads::available();
    if threads == 1 || ns < SPREAD_NS {
        return (1, 1);
    }
    let wanted = (4 * threads).min((ns / (SPREAD_NS / 4.0)) as usize).max(1);
    let panels = n.div_ceil(panel_width(isa)).div_ceil(PANELS_MAX);
    let row_blocks = m.div_ceil(ROW_BLOCK);
    match job.right {
        // Panels cost nothing to read again; A's rows are copied once for each part of the columns.
        Right::Packed(_) => {
            let rows = row_blocks.min(wanted);
            (rows, wanted.div_ceil(rows).min(panels))
        }
        Right::Rows(..) | Right::Columns(..) => {
            let parts =
                (1..=row_blocks.min(wanted)).flat_map(|rows| (1..=(wanted / rows).min(panels)).map(move |c| (rows, c)));
            let timed =
                parts.map(|(rows, columns)| (copying_ns(isa, job.shape, threads, rows, columns), rows, columns));
            let timed: Vec<(f64, usize, usize)> = timed.collect();
            let least = timed.iter().map(|(ns, ..)| *ns).fold(f64::INFINITY, f64::min);
            // More parts even out what else the machine does.
            let good = timed.into_iter().filter(|(ns, ..)| *ns <= PARTS_COST_MAX * least);
            good.max_by_key(|(_, rows, columns)| rows * columns).map_or((1, 1), |(_, rows, columns)| (rows, columns))
        }
    }
}

/// Nanoseconds until `threads` threads are through with a product that copies both factors, in these parts: A's rows are
/// copied for each block of panels, and B's panels for each part of the rows.
fn copying_ns(isa: Isa, shape: Shape, threads: usize, row_parts: usize, column_parts: usize) -> f64 {
    const COPY_NS: f64 = 0.7;
    let Shape { m, n, k } = shape;
    let width = panel_width(isa);
    let panels = n.div_ceil(width).div_ceil(column_parts).next_multiple_of(PANELS_MAX);
    let rows = m.div_ceil(row_parts).next_multiple_of(ROW_BLOCK.min(12)) as f64;
    let columns = (panels * width) as f64;
    let each = 2.0 * rows * columns / 90.0 + COPY_NS * (rows * panels.div_ceil(panel_block(k)) as f64 + columns);
    (row_parts * column_parts).div_ceil(threads) as f64 * each * k as f64
}

/// Panels of B that are copied at a time in a product of depth `k`: as many as the room for copies holds.
fn panel_block(k: usize) -> usize {
    (PANEL_BLOCK * K_BLOCK / k.clamp(1, K_BLOCK)).min(SHALLOW_PANEL_BLOCK) / PANELS_MAX * PANELS_MAX
}

thread_local! {
    /// Copies of parts of A and B. Held only while one piece runs, which calls nothing that could run another: what
    /// [`ahead::along`] adds must not.
    static COPIES: RefCell<(Buffer, Buffer)> = const { RefCell::new((Buffer::empty(), Buffer::empty())) };
}

/// A part of a product. Only for [`gemm`], which has checked that the slices of `job` fit its shape and that nothing else
/// writes to these rows and panels.
fn piece(isa: Isa, job: Job<'_>, rows: Range<usize>, panels: Range<usize>) {
    COPIES.with_borrow_mut(|(a, b)| {
        let a = a.room(ROW_BLOCK * K_BLOCK + VECTOR_MAX);
        let b = match job.right {
            Right::Packed(_) => &mut [],
            _ => b.room((PANEL_BLOCK + PANELS_MAX) * K_BLOCK * panel_width(isa)),
        };
        piece_with(isa, job, rows, panels, a, b);
    });
}

dispatched! {
    fn piece_with(job: Job<'_>, rows: Range<usize>, panels: Range<usize>, a: &mut [f32], b: &mut [f32]) = piece_body;
}

// No closure here or below: one would be compiled without the instruction set.
#[inline(always)]
fn piece_body<S: Simd>(s: S, job: Job<'_>, rows: Range<usize>, panels: Range<usize>, a: &mut [f32], b: &mut [f32]) {
    let (k, width) = (job.shape.k, 2 * S::LANES);
    match job.right {
        Right::Packed(packed) => {
            let stride = packed.k * width;
            let mut first = 0;
            while first < k {
                let depth = first..k.min(first + K_BLOCK);
                let numbers = &packed.data[panels.start * stride + first * width..];
                first += K_BLOCK;
                let then = if first < k { numbers[K_BLOCK * width..].as_ptr() } else { ahead::then() };
                let from = Panels { numbers, stride, then };
                pass(s, &job, rows.clone(), panels.clone(), depth, a, from);
            }
        }
        Right::Rows(data, data_stride) | Right::Columns(data, data_stride) => {
            let columns = matches!(job.right, Right::Columns(..));
            let stride = k.min(K_BLOCK) * width;
            let panel_block = panel_block(k);
            let mut first_panel = panels.start;
            while first_panel < panels.end {
                let panels = first_panel..panels.end.min(first_panel + panel_block);
                let mut first = 0;
                while first < k {
                    let depth = first..k.min(first + K_BLOCK);
                    for panel in panels.clone() {
                        let column = panel * width;
                        let count = width.min(job.shape.n - column);
                        let to = &mut b[(panel - panels.start) * stride..];
                        if columns {
                            let from = &data[column * data_stride + first..];
                            transpose_into(s, from, data_stride, count, depth.len(), to, width);
                        } else {
                            copy_panel(
                                &data[first * data_stride + column..],
                                data_stride,
                                count,
                                depth.len(),
                                to,
                                width,
                            );
                        }
                    }
                    let from = Panels { numbers: b, stride, then: std::ptr::null() };
                    pass(s, &job, rows.clone(), panels.clone(), depth, a, from);
                    first += K_BLOCK;
                }
                first_panel += panel_block;
            }
        }
    }
}

/// Panels of one block of k.
#[derive(Clone, Copy)]
struct Panels<'a> {
    /// From the first number on.
    numbers: &'a [f32],
    /// From one panel to the next.
    stride: usize,
    /// What is read after the last of them.
    then: *const f32,
}

/// One block of k.
#[inline(always)]
fn pass<S: Simd>(
    s: S,
    job: &Job<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    depth: Range<usize>,
    a: &mut [f32],
    from: Panels<'_>,
) {
    let (first_column, k) = (panels.start * 2 * S::LANES, depth.len());
    let vectors = (job.shape.n - first_column).div_ceil(S::LANES).min(2 * panels.len());
    let mut ahead = ahead::Requests::new();
    for block in rows.clone().step_by(ROW_BLOCK) {
        let block = block..rows.end.min(block + ROW_BLOCK);
        copy_rows(s, job.left, block.clone(), depth.clone(), a);
        let group = group_rows::<S>(block.len());
        let mut vector = 0;
        while vector < vectors {
            let taken = s.vectors(group, vectors - vector);
            let column = first_column + vector * S::LANES;
            for (index, row) in block.clone().step_by(group).enumerate() {
                let count = group.min(block.end - row);
                let place =
                    Place { tile: index, tiles: block.len().div_ceil(group), vector, taken, panels: panels.len(), k };
                let tile = Tile {
                    a: a[(row - block.start) * k..].as_ptr(),
                    b: from.numbers[vector / 2 * from.stride..].as_ptr(),
                    panel_stride: from.stride,
                    odd: vector % 2 > 0,
                    k,
                    // SAFETY: within C, whose size was checked.
                    c: unsafe { job.out.0.add(row * job.out_stride + column) },
                    c_stride: job.out_stride,
                    columns: (job.shape.n - column).min(taken * S::LANES),
                    add: job.add || depth.start > 0,
                    soon: soon::<S>(place, from, &mut ahead, a.as_ptr()),
                };
                // SAFETY: `a` holds `count` rows of this block. The vectors are there: parts are whole groups of panels,
                // and so are packed matrices and the copies. C was checked, and no other part has these rows and panels.
                unsafe { s.micro(count, taken, &tile) };
            }
            ahead::meanwhile();
            vector += taken;
        }
    }
}

/// Where a micro-tile is.
#[derive(Clone, Copy)]
struct Place {
    /// Among those with the same columns.
    tile: usize,
    tiles: usize,
    /// The first of its vectors, and how many it has.
    vector: usize,
    taken: usize,
    /// All that the pass reads.
    panels: usize,
    k: usize,
}

/// What is wanted after a micro-tile: as much of B as tiles with these columns read, in the order in which it lies, shared out
/// among the tiles as evenly as may be, since only so many requests wait for memory at once; then what others asked for.
/// Where there is nothing, `near` is asked for again, which is at hand.
#[inline(always)]
fn soon<S: Simd>(place: Place, from: Panels<'_>, ahead: &mut ahead::Requests, near: *const f32) -> [Stream; STREAMS] {
    let Place { tile, tiles, vector, taken, k, .. } = place;
    let none = Stream { at: near, step: 0 };
    // Half a panel is a line with every row of k. The next tiles may begin in the middle of a panel, which was asked for as
    // a whole then.
    let first = (vector + taken + taken % 2).next_multiple_of(if taken == 3 { 1 } else { 2 });
    let half = |index: usize| {
        let (panel, rest) = ((first + index) / 2, (first + index) % 2 * k * S::LANES);
        let at = match panel.checked_sub(place.panels) {
            None => from.numbers.as_ptr().wrapping_add(panel * from.stride),
            Some(_) if from.then.is_null() => near,
            Some(beyond) => from.then.wrapping_add(beyond * from.stride),
        };
        Stream { at: at.wrapping_add(rest), step: S::LANES }
    };
    let mut soon = [none; STREAMS];
    let soon_len = streams(taken);
    let own = match (tiles, tile) {
        (1, _) => {
            soon[..soon_len].iter_mut().enumerate().for_each(|(index, stream)| *stream = half(index));
            soon_len
        }
        // Two tiles have half of the third each.
        (2, _) if taken == 3 => {
            let third = half(2);
            let at = third.at.wrapping_add(tile * k / 2 * S::LANES);
            (soon[0], soon[1]) = (half(tile), Stream { at, step: S::LANES / 2 });
            2
        }
        _ if tile < taken => {
            soon[0] = half(tile);
            1
        }
        _ => 0,
    };
    for stream in &mut soon[own..soon_len] {
        let lines = k.div_ceil(STEPS_PER_LINE);
        *stream = ahead.take(lines).map_or(none, |(at, lines)| Stream { at, step: (lines * LINE).div_ceil(k) });
    }
    soon
}

/// Streams that a micro-tile of so many vectors asks for.
#[inline(always)]
const fn streams(vectors: usize) -> usize {
    if vectors == 3 { STREAMS } else { 2 }
}

/// Rows of each micro-tile of a block, so that they are about equal.
#[inline(always)]
fn group_rows<S: Simd>(rows: usize) -> usize {
    if rows <= S::ROWS { rows } else { rows.div_ceil(rows.div_ceil(S::MANY_ROWS)) }
}

/// Copies rows of A as `[row group][k][rows of the group]`; what follows in `to` may be overwritten.
#[inline(always)]
fn copy_rows<S: Simd>(s: S, left: Left<'_>, rows: Range<usize>, depth: Range<usize>, to: &mut [f32]) {
    let k = depth.len();
    let group = group_rows::<S>(rows.len());
    for first in rows.clone().step_by(group) {
        let count = group.min(rows.end - first);
        let to = &mut to[(first - rows.start) * k..];
        match left {
            Left::Rows(data, stride) => {
                transpose_into(s, &data[first * stride + depth.start..], stride, count, k, to, count);
            }
            Left::Columns(data, stride) => {
                let from = &data[depth.start * stride + first..];
                let to = &mut to[..count * k];
                match count {
                    12 => copy_columns::<12>(from, stride, to),
                    8 => copy_columns::<8>(from, stride, to),
                    7 => copy_columns::<7>(from, stride, to),
                    6 => copy_columns::<6>(from, stride, to),
                    _ => to
                        .chunks_exact_mut(count)
                        .enumerate()
                        .for_each(|(p, to)| to.copy_from_slice(&from[p * stride..][..count])),
                }
            }
        }
    }
}

#[inline(always)]
fn copy_columns<const ROWS: usize>(from: &[f32], stride: usize, to: &mut [f32]) {
    for (p, to) in to.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        if let Some(from) = from[p * stride..].first_chunk() {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{numbers, product};

    fn check(isa: Isa, shape: Shape, transposed: bool, b_form: usize, add: bool) {
        let Shape { m, n, k } = shape;
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let start = if add { numbers(m * n, 3) } else { vec![7.0; m * n] };
        let mut expected = product(&a, &b, shape);
        if add {
            expected.iter_mut().zip(&start).for_each(|(e, s)| *e += f64::from(*s));
        }
        let turned: Vec<f32> = (0..k * m).map(|i| a[i % m * k + i / m]).collect();
        let left = if transposed { Left::Columns(&turned, m) } else { Left::Rows(&a, k) };
        let b_t: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
        let packed = Packed::transposed(isa, &b_t, n, k);
        let right = [Right::Packed(&packed), Right::Rows(&b, n), Right::Columns(&b_t, k)][b_form];
        let mut found = start;
        gemm(isa, shape, left, right, &mut found, n, add);
        for (index, (f, e)) in found.iter().zip(&expected).enumerate() {
            let bound = 1e-6 * (k as f64).sqrt() * 4.0 + 1e-6;
            assert!((f64::from(*f) - e).abs() <= bound, "{isa:?} {shape:?} at {index}: {f} instead of {e}");
        }
    }

    #[test]
    fn products_agree_with_double_precision() {
        for isa in Isa::available() {
            for m in [1, 2, 3, 4, 5, 7, 11, 12, 13, 25, 121, 131] {
                for (n, k) in [(1, 1), (5, 3), (33, 17), (64, 256), (97, 300), (257, 70)] {
                    for (flags, b_form) in (0..4).flat_map(|flags| (0..3).map(move |form| (flags, form))) {
                        check(isa, Shape { m, n, k }, flags & 1 > 0, b_form, flags & 2 > 0);
                    }
                }
            }
            check(isa, Shape { m: 300, n: 700, k: 600 }, false, 0, false);
            check(isa, Shape { m: 300, n: 700, k: 600 }, true, 1, true);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        for isa in Isa::available() {
            let (n, k, rows) = (203, 530, 150);
            let (a, w) = (numbers(rows * k, 4), numbers(n * k, 5));
            let packed = Packed::transposed(isa, &w, n, k);
            let run = |rows: Range<usize>, right: Right<'_>| {
                let mut out = vec![0.0; rows.len() * n];
                let shape = Shape { m: rows.len(), n, k };
                gemm(isa, shape, Left::Rows(&a[rows.start * k..], k), right, &mut out, n, false);
                out
            };
            let together = run(0..rows, Right::Packed(&packed));
            for count in 1..=14 {
                let found = run(3..3 + count, Right::Packed(&packed));
                assert_eq!(found, together[3 * n..(3 + count) * n], "{isa:?}, {count} rows");
            }
            let alone = threads::serial(|| run(0..rows, Right::Packed(&packed)));
            assert_eq!(alone, together);
            let b: Vec<f32> = (0..n * k).map(|i| w[i % n * k + i / n]).collect();
            assert_eq!(run(0..rows, Right::Rows(&b, n)), together);
            assert_eq!(run(0..rows, Right::Columns(&w, k)), together);
        }
    }

    #[test]
    fn wider_strides_and_empty_products() {
        let isa = Isa::best();
        let (a, b) = (numbers(3 * 9, 1), numbers(4 * 8, 2));
        let mut out = vec![5.0; 3 * 7];
        gemm(isa, Shape { m: 3, n: 5, k: 4 }, Left::Rows(&a, 9), Right::Rows(&b, 8), &mut out, 7, false);
        assert!(out.chunks(7).all(|row| row[5..] == [5.0, 5.0] && row[0] != 5.0));
        gemm(isa, Shape { m: 3, n: 5, k: 0 }, Left::Rows(&a, 9), Right::Rows(&b, 8), &mut out, 7, false);
        assert!(out.chunks(7).all(|row| row[..5] == [0.0; 5]));
        gemm(isa, Shape { m: 0, n: 5, k: 4 }, Left::Rows(&a, 9), Right::Rows(&b, 8), &mut out, 7, false);
    }
}
