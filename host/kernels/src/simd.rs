//! Vectors of f32 behind one trait, so that a kernel is written once and compiled for every instruction set.
//!
//! A kernel's body is an `#[inline(always)]` function over [`Simd`]; [`dispatched!`] wraps it in one function per
//! instruction set with that set switched on. A token such as [`Avx512`] is made only inside such a wrapper, which runs
//! only where [`crate::Isa`] has found the instructions.
#![allow(unsafe_code)]

/// Adding this to a float of small size rounds it to a whole number, which then stands in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// Bits of √½: subtracting them splits a float into an exponent and a mantissa around 1.
const ROOT_HALF: i32 = 0x3f35_04f3;

/// The micro-tile of `$rows` by `$vectors`, one of those listed; see [`crate::gemm::micro_tile`].
macro_rules! micro_tiles {
    ($s:ident, $rows:ident, $vectors:ident, $tile:ident, [$($r:literal by $v:literal),* $(,)?]) => {
        match ($rows, $vectors) {
            $(($r, $v) => crate::gemm::micro_tile::<Self, $r, $v>($s, $tile),)*
            _ => unreachable!("a tile of {} rows and {} vectors", $rows, $vectors),
        }
    };
}

/// One instruction set's vectors.
pub(crate) trait Simd: Copy {
    /// A vector of [`Simd::LANES`] numbers.
    type V: Copy;
    /// Numbers in a vector.
    const LANES: usize;
    /// Most rows of the product's micro-tile, two vectors wide.
    const ROWS: usize;
    /// Most rows of a micro-tile where there are more rows than [`Simd::ROWS`].
    const MANY_ROWS: usize = Self::ROWS;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `from` may be read for [`Simd::LANES`] numbers.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `to` may be written for [`Simd::LANES`] numbers.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// Two vectors of bf16 numbers from [`Simd::LANES`] words, the first vector's in their low halves.
    /// # Safety
    /// `from` may be read for [`Simd::LANES`] words.
    unsafe fn load_bf16(self, from: *const u32) -> [Self::V; 2];
    /// Whole numbers of one byte.
    /// # Safety
    /// `from` may be read for [`Simd::LANES`] bytes.
    unsafe fn load_i8(self, from: *const i8) -> Self::V;
    /// Asks for the cache line of an address that will be read soon. It need not exist.
    #[inline(always)]
    fn prefetch(self, _at: *const f32) {}
    /// As [`Simd::prefetch`], where it is read once: other things keep their places in the larger caches.
    #[inline(always)]
    fn prefetch_once(self, _at: *const f32) {}
    /// As [`Simd::prefetch`], for later: into the second cache.
    #[inline(always)]
    fn prefetch_far(self, _at: *const f32) {}
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `yes` where `a > b`, else `no`.
    fn where_greater(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// `2^n` for `n + ROUND`, n from −126 to 127.
    fn pow2(self, shifted: Self::V) -> Self::V;
    /// Exponent and mantissa (from √½ to √2) of positive normal numbers.
    fn split(self, v: Self::V) -> (Self::V, Self::V);
    /// Sum of the lanes, in a fixed order.
    fn sum(self, v: Self::V) -> f32;
    /// Largest lane.
    fn largest(self, v: Self::V) -> f32;
    /// The transpose of [`Simd::LANES`] rows.
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::V]) {
        let mut grid = [[0.0; 16]; 16];
        for (line, row) in grid.iter_mut().zip(&*rows) {
            self.put(line, *row);
        }
        for (i, row) in rows.iter_mut().enumerate() {
            let mut column = [0.0; 16];
            for (x, line) in column.iter_mut().zip(&grid[..Self::LANES]) {
                *x = line[i];
            }
            *row = self.get(&column);
        }
    }

    /// Whether [`Simd::turn_eight`] is there.
    const TURNS_EIGHT: bool = false;
    /// Eight rows become their columns, one after the other: eight numbers each, so that a vector holds several.
    #[inline(always)]
    fn turn_eight(self, _rows: &mut [Self::V; 8]) {
        unreachable!("asked for without `TURNS_EIGHT`")
    }

    /// The product's micro-tile: `rows` (1 to [`Simd::ROWS`]) by [`Simd::vectors`]; see [`crate::gemm`].
    /// # Safety
    /// As [`crate::gemm::micro_tile`].
    unsafe fn micro(self, rows: usize, vectors: usize, tile: &crate::gemm::Tile);
    /// Vectors that a micro-tile of `rows` rows takes of those that are `left`: few rows take many, so that enough sums run
    /// side by side to hide an addition's latency; never more than there are to the end of a panel.
    #[inline(always)]
    fn vectors(self, rows: usize, left: usize) -> usize {
        match rows {
            1 if left >= 8 => 8,
            2 | 3 if left >= 4 => 4,
            _ => 2,
        }
    }
    /// As [`Simd::vectors`], for panels of narrow weights.
    fn panels(self, rows: usize) -> usize {
        match rows {
            1 => 4,
            2 | 3 => 2,
            _ => 1,
        }
    }

    /// The first [`Simd::LANES`] numbers of a slice that is at least as long.
    #[inline(always)]
    fn get(self, from: &[f32]) -> Self::V {
        assert!(from.len() >= Self::LANES);
        // SAFETY: the length was just checked.
        unsafe { self.load(from.as_ptr()) }
    }

    /// Overwrites the first [`Simd::LANES`] numbers of a slice that is at least as long.
    #[inline(always)]
    fn put(self, to: &mut [f32], v: Self::V) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the length was just checked.
        unsafe { self.store(to.as_mut_ptr(), v) }
    }
}

/// `exp(x)`, relative error below 3e-7; 0 below −87, and what `exp(88)` is above 88.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // exp(x) = 2^n · exp(r), |r| ≤ ½·ln 2; Taylor up to r^7, whose remainder is below 6e-9 there.
    let least = s.splat(-87.0);
    let held = s.min(s.max(x, least), s.splat(88.0));
    let shifted = s.fma(held, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(shifted, s.splat(ROUND));
    let r = s.fma(n, s.splat(2.121_944_4e-4), s.fma(n, s.splat(-0.693_359_4), held));
    let mut p = s.splat(1.0 / 5040.0);
    p = s.fma(p, r, s.splat(1.0 / 720.0));
    p = s.fma(p, r, s.splat(1.0 / 120.0));
    p = s.fma(p, r, s.splat(1.0 / 24.0));
    p = s.fma(p, r, s.splat(1.0 / 6.0));
    p = s.fma(p, r, s.splat(0.5));
    p = s.fma(p, r, s.splat(1.0));
    p = s.fma(p, r, s.splat(1.0));
    s.where_greater(x, least, s.mul(p, s.pow2(shifted)), s.splat(0.0))
}

/// `ln(x)` of positive normal numbers, absolute error below 2e-7 near 1.
#[inline(always)]
pub(crate) fn ln<S: Simd>(s: S, x: S::V) -> S::V {
    // ln(2^e · m) = e·ln 2 + 2·artanh(t), t = (m − 1)/(m + 1), |t| ≤ 0.172.
    let (e, m) = s.split(x);
    let f = s.sub(m, s.splat(1.0));
    let t = s.div(f, s.add(m, s.splat(1.0)));
    let tt = s.mul(t, t);
    let mut p = s.splat(2.0 / 9.0);
    p = s.fma(p, tt, s.splat(2.0 / 7.0));
    p = s.fma(p, tt, s.splat(2.0 / 5.0));
    p = s.fma(p, tt, s.splat(2.0 / 3.0));
    // 2t = f − f·t: the leading term keeps f's own bits.
    let small = s.fma(s.mul(p, tt), t, s.fma(e, s.splat(-2.121_944_4e-4), s.mul(f, s.sub(s.splat(0.0), t))));
    s.fma(e, s.splat(0.693_359_4), s.add(f, small))
}

/// Plain Rust: what every machine runs, and what the others are held against.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type V = [f32; 4];
    const LANES: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: [f32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u32) -> [[f32; 4]; 2] {
        // SAFETY: the caller's promise.
        let words = unsafe { from.cast::<[u32; 4]>().read_unaligned() };
        [words.map(|w| f32::from_bits(w << 16)), words.map(|w| f32::from_bits(w & 0xffff_0000))]
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[i8; 4]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn fma(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Two roundings: without the instruction a fused one is a slow call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn where_greater(self, a: [f32; 4], b: [f32; 4], yes: [f32; 4], no: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] > b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn pow2(self, shifted: [f32; 4]) -> [f32; 4] {
        shifted.map(|x| f32::from_bits(x.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23))
    }
    #[inline(always)]
    fn split(self, v: [f32; 4]) -> ([f32; 4], [f32; 4]) {
        let e = v.map(|x| (x.to_bits() as i32).wrapping_sub(ROOT_HALF) >> 23);
        let m = std::array::from_fn(|i| f32::from_bits((v[i].to_bits() as i32).wrapping_sub(e[i] << 23) as u32));
        (e.map(|e| e as f32), m)
    }
    #[inline(always)]
    fn sum(self, v: [f32; 4]) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn largest(self, v: [f32; 4]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn micro(self, rows: usize, vectors: usize, tile: &crate::gemm::Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            micro_tiles!(self, rows, vectors, tile, [
                1 by 8, 2 by 4, 3 by 4, 1 by 2, 2 by 2, 3 by 2, 4 by 2,
            ])
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{ROOT_HALF, ROUND, Simd};
    use crate::gemm::Tile;

    /// AVX-512 (F, BW, DQ, VL).
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());
    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    impl Avx512 {
        /// # Safety
        /// The machine has AVX-512 F, BW, DQ and VL, AVX2 and FMA.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Avx2 {
        /// # Safety
        /// The machine has AVX2 and FMA.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    /// Of four rows, quarter L becomes their columns 4L to 4L + 3.
    #[inline(always)]
    unsafe fn turn_four(rows: &mut [__m512; 4]) {
        // SAFETY: the caller has found the instructions.
        unsafe {
            let pairs = [
                _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1])),
                _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1])),
                _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3])),
                _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3])),
            ];
            *rows = [
                _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[2])),
                _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[2])),
                _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[1], pairs[3])),
                _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[1], pairs[3])),
            ];
        }
    }

    // SAFETY of every block below: the token exists only where the machine has the instructions; loads and stores pass
    // on the caller's promise.
    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const ROWS: usize = 12;
        const MANY_ROWS: usize = 8;

        #[inline(always)]
        fn vectors(self, rows: usize, left: usize) -> usize {
            match (rows, left) {
                (1, 8..) => 8,
                (2 | 3, 4 | 8..) => 4,
                (..=8, 3 | 5..) => 3,
                _ => 2,
            }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        fn prefetch(self, at: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
        #[inline(always)]
        fn prefetch_once(self, at: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.cast()) }
        }
        #[inline(always)]
        fn prefetch_far(self, at: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u32) -> [__m512; 2] {
            unsafe {
                let words = _mm512_loadu_si512(from.cast());
                let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(high)]
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, from: *const i8) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn where_greater(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
            unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), no, yes) }
        }
        #[inline(always)]
        fn pow2(self, shifted: __m512) -> __m512 {
            unsafe {
                let n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(ROUND.to_bits() as i32 - 127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
            }
        }
        #[inline(always)]
        fn split(self, v: __m512) -> (__m512, __m512) {
            unsafe {
                let bits = _mm512_castps_si512(v);
                let e = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(ROOT_HALF)));
                let m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(e)));
                (_mm512_cvtepi32_ps(e), m)
            }
        }
        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            unsafe { _mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        fn largest(self, v: __m512) -> f32 {
            unsafe { _mm512_reduce_max_ps(v) }
        }
        #[inline(always)]
        fn transpose(self, rows: &mut [__m512]) {
            let Some(rows) = rows.first_chunk_mut::<16>() else { return };
            unsafe {
                for four in rows.as_chunks_mut().0 {
                    turn_four(four);
                }
                // Then the quarters change places.
                for c in 0..4 {
                    let even = _mm512_shuffle_f32x4::<0x88>(rows[c], rows[4 + c]);
                    let odd = _mm512_shuffle_f32x4::<0xdd>(rows[c], rows[4 + c]);
                    let even_below = _mm512_shuffle_f32x4::<0x88>(rows[8 + c], rows[12 + c]);
                    let odd_below = _mm512_shuffle_f32x4::<0xdd>(rows[8 + c], rows[12 + c]);
                    rows[c] = _mm512_shuffle_f32x4::<0x88>(even, even_below);
                    rows[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd, odd_below);
                    rows[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even, even_below);
                    rows[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_below);
                }
            }
        }
        const TURNS_EIGHT: bool = true;
        #[inline(always)]
        fn turn_eight(self, rows: &mut [__m512; 8]) {
            unsafe {
                for four in rows.as_chunks_mut().0 {
                    turn_four(four);
                }
                let [a, b, c, d, below_a, below_b, below_c, below_d] = *rows;
                // Quarters of four vectors change places: those numbered L become vector L.
                for (first, [w, x, y, z]) in [(0, [a, below_a, b, below_b]), (1, [c, below_c, d, below_d])] {
                    let (low, high) = (_mm512_shuffle_f32x4::<0x44>(w, x), _mm512_shuffle_f32x4::<0xee>(w, x));
                    let (low_2, high_2) = (_mm512_shuffle_f32x4::<0x44>(y, z), _mm512_shuffle_f32x4::<0xee>(y, z));
                    rows[first] = _mm512_shuffle_f32x4::<0x88>(low, low_2);
                    rows[first + 2] = _mm512_shuffle_f32x4::<0xdd>(low, low_2);
                    rows[first + 4] = _mm512_shuffle_f32x4::<0x88>(high, high_2);
                    rows[first + 6] = _mm512_shuffle_f32x4::<0xdd>(high, high_2);
                }
            }
        }
        #[inline(always)]
        unsafe fn micro(self, rows: usize, vectors: usize, tile: &Tile) {
            // SAFETY: the caller's promise.
            unsafe {
                micro_tiles!(self, rows, vectors, tile, [
                    1 by 8, 2 by 4, 3 by 4, 1 by 3, 2 by 3, 3 by 3, 4 by 3, 5 by 3, 6 by 3, 7 by 3, 8 by 3,
                    1 by 2, 2 by 2, 3 by 2, 4 by 2, 5 by 2, 6 by 2, 7 by 2, 8 by 2, 9 by 2, 10 by 2, 11 by 2,
                    12 by 2,
                ])
            }
        }
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const ROWS: usize = 6;

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(to, v) }
        }
        #[inline(always)]
        fn prefetch(self, at: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
        #[inline(always)]
        fn prefetch_once(self, at: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.cast()) }
        }
        #[inline(always)]
        fn prefetch_far(self, at: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u32) -> [__m256; 2] {
            unsafe {
                let words = _mm256_loadu_si256(from.cast());
                let high = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)), _mm256_castsi256_ps(high)]
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, from: *const i8) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        fn max(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_min_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn where_greater(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
            unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) }
        }
        #[inline(always)]
        fn pow2(self, shifted: __m256) -> __m256 {
            unsafe {
                let n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(ROUND.to_bits() as i32 - 127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
            }
        }
        #[inline(always)]
        fn split(self, v: __m256) -> (__m256, __m256) {
            unsafe {
                let bits = _mm256_castps_si256(v);
                let e = _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, _mm256_set1_epi32(ROOT_HALF)));
                let m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(e)));
                (_mm256_cvtepi32_ps(e), m)
            }
        }
        #[inline(always)]
        fn sum(self, v: __m256) -> f32 {
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
        #[inline(always)]
        fn largest(self, v: __m256) -> f32 {
            unsafe {
                let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
        #[inline(always)]
        fn transpose(self, rows: &mut [__m256]) {
            let Some(rows) = rows.first_chunk_mut::<8>() else { return };
            unsafe {
                // Four rows at a time: their half L becomes columns 4L to 4L + 3.
                for four in rows.as_chunks_mut::<4>().0 {
                    let pairs = [
                        _mm256_castps_pd(_mm256_unpacklo_ps(four[0], four[1])),
                        _mm256_castps_pd(_mm256_unpackhi_ps(four[0], four[1])),
                        _mm256_castps_pd(_mm256_unpacklo_ps(four[2], four[3])),
                        _mm256_castps_pd(_mm256_unpackhi_ps(four[2], four[3])),
                    ];
                    *four = [
                        _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[0], pairs[2])),
                        _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[0], pairs[2])),
                        _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[1], pairs[3])),
                        _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[1], pairs[3])),
                    ];
                }
                // Then the halves change places.
                for c in 0..4 {
                    let (above, below) = (rows[c], rows[4 + c]);
                    rows[c] = _mm256_permute2f128_ps::<0x20>(above, below);
                    rows[4 + c] = _mm256_permute2f128_ps::<0x31>(above, below);
                }
            }
        }
        #[inline(always)]
        unsafe fn micro(self, rows: usize, vectors: usize, tile: &Tile) {
            // SAFETY: the caller's promise.
            unsafe {
                micro_tiles!(self, rows, vectors, tile, [
                    1 by 8, 2 by 4, 3 by 4, 1 by 2, 2 by 2, 3 by 2, 4 by 2, 5 by 2, 6 by 2,
                ])
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(crate) use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{ROOT_HALF, ROUND, Simd};
    use crate::gemm::Tile;

    /// NEON.
    #[derive(Clone, Copy)]
    pub(crate) struct Neon(());

    impl Neon {
        /// # Safety
        /// The machine has NEON.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    // SAFETY of every block below: the token exists only where the machine has the instructions; loads and stores pass
    // on the caller's promise.
    impl Simd for Neon {
        type V = float32x4_t;
        const LANES: usize = 4;
        const ROWS: usize = 12;

        #[inline(always)]
        fn splat(self, x: f32) -> float32x4_t {
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> float32x4_t {
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: float32x4_t) {
            unsafe { vst1q_f32(to, v) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u32) -> [float32x4_t; 2] {
            unsafe {
                let words = vld1q_u32(from);
                let high = vandq_u32(words, vdupq_n_u32(0xffff_0000));
                [vreinterpretq_f32_u32(vshlq_n_u32::<16>(words)), vreinterpretq_f32_u32(high)]
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, from: *const i8) -> float32x4_t {
            unsafe {
                // Four bytes; a whole register's eight may not be there.
                let bytes = vreinterpret_s8_u32(vdup_n_u32(from.cast::<u32>().read_unaligned()));
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
            }
        }
        #[inline(always)]
        fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            unsafe { vaddq_f32(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            unsafe { vsubq_f32(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            unsafe { vmulq_f32(a, b) }
        }
        #[inline(always)]
        fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            unsafe { vdivq_f32(a, b) }
        }
        #[inline(always)]
        fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            unsafe { vmaxq_f32(a, b) }
        }
        #[inline(always)]
        fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            unsafe { vminq_f32(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
            unsafe { vfmaq_f32(c, a, b) }
        }
        #[inline(always)]
        fn where_greater(self, a: float32x4_t, b: float32x4_t, yes: float32x4_t, no: float32x4_t) -> float32x4_t {
            unsafe { vbslq_f32(vcgtq_f32(a, b), yes, no) }
        }
        #[inline(always)]
        fn pow2(self, shifted: float32x4_t) -> float32x4_t {
            unsafe {
                let n = vsubq_s32(vreinterpretq_s32_f32(shifted), vdupq_n_s32(ROUND.to_bits() as i32 - 127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
            }
        }
        #[inline(always)]
        fn split(self, v: float32x4_t) -> (float32x4_t, float32x4_t) {
            unsafe {
                let bits = vreinterpretq_s32_f32(v);
                let e = vshrq_n_s32::<23>(vsubq_s32(bits, vdupq_n_s32(ROOT_HALF)));
                let m = vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32::<23>(e)));
                (vcvtq_f32_s32(e), m)
            }
        }
        #[inline(always)]
        fn sum(self, v: float32x4_t) -> f32 {
            unsafe { vaddvq_f32(v) }
        }
        #[inline(always)]
        fn largest(self, v: float32x4_t) -> f32 {
            unsafe { vmaxvq_f32(v) }
        }
        #[inline(always)]
        unsafe fn micro(self, rows: usize, vectors: usize, tile: &Tile) {
            // SAFETY: the caller's promise.
            unsafe {
                micro_tiles!(self, rows, vectors, tile, [
                    1 by 8, 2 by 4, 3 by 4, 1 by 2, 2 by 2, 3 by 2, 4 by 2, 5 by 2, 6 by 2, 7 by 2, 8 by 2,
                    9 by 2, 10 by 2, 11 by 2, 12 by 2,
                ])
            }
        }
    }
}

/// Defines a function that takes an [`crate::Isa`] first and runs `body`, compiled for it.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            match isa.kind() {
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Kind::Avx512 => {
                    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                    fn run($($arg: $ty),*) $(-> $ret)? {
                        // SAFETY: this function runs only where the machine has its features.
                        $body(unsafe { $crate::simd::Avx512::new() }, $($arg),*)
                    }
                    // SAFETY: an `Isa` of this kind is made only after asking the machine.
                    unsafe { run($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Kind::Avx2 => {
                    #[target_feature(enable = "avx2,fma")]
                    fn run($($arg: $ty),*) $(-> $ret)? {
                        // SAFETY: as above.
                        $body(unsafe { $crate::simd::Avx2::new() }, $($arg),*)
                    }
                    // SAFETY: as above.
                    unsafe { run($($arg),*) }
                }
                #[cfg(target_arch = "aarch64")]
                $crate::isa::Kind::Neon => {
                    #[target_feature(enable = "neon")]
                    fn run($($arg: $ty),*) $(-> $ret)? {
                        // SAFETY: as above.
                        $body(unsafe { $crate::simd::Neon::new() }, $($arg),*)
                    }
                    // SAFETY: as above.
                    unsafe { run($($arg),*) }
                }
                $crate::isa::Kind::Scalar => $body($crate::simd::Scalar, $($arg),*),
            }
        }
    };
}
pub(crate) use dispatched;
