//! Rows of logits: sums of exponentials, gradients, divergences. Sums run in vectors over blocks and from block to block
//! in double precision.
#![allow(unsafe_code)]

use crate::Isa;
use crate::simd::{Simd, dispatched, exp, ln};

/// Numbers whose sum stays in single precision.
const BLOCK: usize = 1024;
/// Differences below this count as zero probability.
const LEAST: f32 = -87.0;
/// The smallest normal number: logarithms are taken of nothing smaller.
const SMALLEST: f32 = f32::MIN_POSITIVE;

/// What the log-softmax of a row needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sums {
    /// Largest logit.
    pub max: f32,
    /// Index of the first largest one.
    pub argmax: usize,
    /// `∑ exp(z − max)`.
    pub sum: f64,
    /// `∑ exp(z − max) · (z − max)`.
    pub weighted: f64,
}

/// The [`Sums`] of a row that comes in pieces. Each piece but the last is a multiple of [`SUMS_BLOCK`] long; then the sums have
/// the same bits however the row was cut: blocks are added in order, each relative to the largest logit so far, and what was
/// summed before is scaled when that rises (Milakov & Gimelshein 2018).
#[derive(Debug, Clone, Copy)]
pub struct RunningSums {
    sums: Sums,
    seen: usize,
    /// Whether a logit was NaN or +∞.
    bad: bool,
}

/// Logits whose sums are made at once.
pub const SUMS_BLOCK: usize = BLOCK;

impl Default for RunningSums {
    fn default() -> Self {
        Self { sums: Sums { max: f32::NEG_INFINITY, argmax: 0, sum: 0.0, weighted: 0.0 }, seen: 0, bad: false }
    }
}

impl RunningSums {
    /// How many logits were added.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Adds the logits that follow.
    ///
    /// # Panics
    /// When an earlier piece was no multiple of [`SUMS_BLOCK`].
    pub fn add(&mut self, isa: Isa, z_v: &[f32]) {
        assert!(self.seen.is_multiple_of(BLOCK) || z_v.is_empty(), "a row goes on after {} logits", self.seen);
        for block in z_v.chunks(BLOCK) {
            if !self.bad {
                self.add_block(isa, block);
            }
            self.seen += block.len();
        }
    }

    fn add_block(&mut self, isa: Isa, block: &[f32]) {
        let (max, nan) = block_max(isa, block);
        if nan || max == f32::INFINITY {
            self.bad = true;
            return;
        }
        let sums = &mut self.sums;
        if max > sums.max {
            // At first there is nothing to scale, and −∞ has no difference.
            if sums.sum > 0.0 {
                let below = f64::from(sums.max) - f64::from(max);
                let scale = below.exp();
                sums.weighted = scale * (sums.weighted + below * sums.sum);
                sums.sum *= scale;
            }
            let first = block.iter().position(|z| *z == max).unwrap_or_default();
            (sums.max, sums.argmax) = (max, self.seen + first);
        }
        if sums.max > f32::NEG_INFINITY {
            let (sum, weighted) = block_sums(isa, block, sums.max);
            sums.sum += f64::from(sum);
            sums.weighted += f64::from(weighted);
        }
    }

    /// The sums of the whole row, or `None` when it holds NaN or +∞, or nothing above −∞.
    pub fn finish(&self) -> Option<Sums> {
        (!self.bad && self.sums.max > f32::NEG_INFINITY).then_some(self.sums)
    }
}

/// The sums of a row, or `None` when it holds NaN or +∞, or nothing above −∞.
pub fn sums(isa: Isa, z_v: &[f32]) -> Option<Sums> {
    let mut running = RunningSums::default();
    running.add(isa, z_v);
    running.finish()
}

/// `∑ exp(z − max)`.
pub fn mass(isa: Isa, z_v: &[f32], max: f32) -> f64 {
    z_v.chunks(BLOCK).map(|block| f64::from(block_sums(isa, block, max).0)).sum()
}

/// The first numbers of a slice, `fill` in the lanes beyond its end.
#[inline(always)]
fn some<S: Simd>(s: S, from: &[f32], fill: f32) -> S::V {
    if from.len() >= S::LANES {
        return s.get(from);
    }
    let mut whole = [fill; 16];
    whole[..from.len()].copy_from_slice(from);
    s.get(&whole)
}

/// Overwrites the first numbers of a slice, as many as it has.
#[inline(always)]
fn put_some<S: Simd>(s: S, to: &mut [f32], v: S::V) {
    if to.len() >= S::LANES {
        return s.put(to, v);
    }
    let mut whole = [0.0; 16];
    s.put(&mut whole, v);
    let len = to.len();
    to.copy_from_slice(&whole[..len]);
}

dispatched! {
    /// Largest number and whether any is NaN.
    fn block_max(z: &[f32]) -> (f32, bool) = block_max_body;
}

#[inline(always)]
fn block_max_body<S: Simd>(s: S, z: &[f32]) -> (f32, bool) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let mut best = s.splat(f32::NEG_INFINITY);
    let mut nans = zero;
    let mut at = 0;
    while at < z.len() {
        let v = some(s, &z[at..], f32::NEG_INFINITY);
        best = s.max(v, best);
        // Only NaN is neither above −1 nor below 0.
        nans = s.max(s.where_greater(v, s.splat(-1.0), zero, s.where_greater(zero, v, zero, one)), nans);
        at += S::LANES;
    }
    (s.largest(best), s.largest(nans) > 0.0)
}

dispatched! {
    fn block_sums(z: &[f32], max: f32) -> (f32, f32) = block_sums_body;
}

#[inline(always)]
fn block_sums_body<S: Simd>(s: S, z: &[f32], max: f32) -> (f32, f32) {
    let (maxima, least) = (s.splat(max), s.splat(LEAST));
    let (mut sums, mut products) = (s.splat(0.0), s.splat(0.0));
    let mut at = 0;
    while at < z.len() {
        let x = s.sub(some(s, &z[at..], f32::NEG_INFINITY), maxima);
        let e = exp(s, x);
        sums = s.add(sums, e);
        products = s.fma(e, s.max(x, least), products);
        at += S::LANES;
    }
    (s.sum(sums), s.sum(products))
}

/// A row's distribution: `p = exp(z − max) · inverse`, `log p = z − max − log_sum`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distribution {
    /// Largest logit.
    pub max: f32,
    /// 1 / ∑ exp(z − max).
    pub inverse: f32,
    /// ln ∑ exp(z − max).
    pub log_sum: f32,
}

dispatched! {
    /// Replaces each logit by `p · (a + b · log p)`.
    pub fn weigh(z_v: &mut [f32], of: Distribution, a: f32, b: f32) = weigh_body;
}

#[inline(always)]
fn weigh_body<S: Simd>(s: S, z_v: &mut [f32], of: Distribution, a: f32, b: f32) {
    let (maxima, least, scale) = (s.splat(of.max), s.splat(LEAST), s.splat(of.inverse));
    let (a, b, log_sums) = (s.splat(a), s.splat(b), s.splat(of.log_sum));
    let mut at = 0;
    while at < z_v.len() {
        let x = s.sub(some(s, &z_v[at..], f32::NEG_INFINITY), maxima);
        let factor = s.fma(b, s.sub(s.max(x, least), log_sums), a);
        put_some(s, &mut z_v[at..], s.mul(s.mul(exp(s, x), scale), factor));
        at += S::LANES;
    }
}

dispatched! {
    /// `to += by · from`.
    pub fn add_scaled(to: &mut [f32], from: &[f32], by: f32) = add_scaled_body;
}

#[inline(always)]
fn add_scaled_body<S: Simd>(_s: S, to: &mut [f32], from: &[f32], by: f32) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += by * from;
    }
}

dispatched! {
    /// Adds a distribution to a log-density: `out = ln(exp(out) + exp((z − max) + shift))`, where −∞ stands for nothing.
    pub fn add_density(out: &mut [f32], z: &[f32], max: f32, shift: f32) = add_density_body;
}

#[inline(always)]
fn add_density_body<S: Simd>(s: S, out: &mut [f32], z: &[f32], max: f32, shift: f32) {
    let (one, max, shift) = (s.splat(1.0), s.splat(max), s.splat(shift));
    for (out, z) in out.chunks_mut(S::LANES).zip(z.chunks(S::LANES)) {
        let (a, b) = (some(s, out, f32::NEG_INFINITY), s.add(s.sub(some(s, z, f32::NEG_INFINITY), max), shift));
        // ln(eᵃ + eᵇ) = high + ln(1 + exp(low − high)); two −∞ differ by NaN, whose exponential is 0.
        let (high, low) = (s.max(a, b), s.min(a, b));
        put_some(s, out, s.add(high, ln(s, s.add(one, exp(s, s.sub(low, high))))));
    }
}

/// A divergence between two rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Divergence {
    /// In nats.
    pub value: f64,
    /// Sum of what was written into the second row.
    pub slopes: f64,
    /// Whether any log-ratio met the bound.
    pub clipped: bool,
}

/// The generalised Jensen–Shannon divergence of a student's row (c = log p) from a teacher's (t = log q), log-ratios held
/// within `limit`. The teacher's row becomes the derivatives by c:
///
/// - β = 0: `∑ q·(t − c)`, derivative `−q`;
/// - β = 1: `∑ p·(c − t)`, derivative `p·(c − t)` (the constant `p·1` that every gradient of logits cancels is left out);
/// - between, with `m = ln((1 − β)p + βq)`: `β ∑ q·(t − m) + (1 − β) ∑ p·(c − m)`, derivative
///   `(1 − β)p·((c − m) + (1 − w)) − βq·w`, `w = (1 − β)p / eᵐ`.
///
/// A log-ratio at the bound is constant: its derivative's part is left out.
///
/// # Panics
/// When the rows differ in length.
pub fn divergence(
    isa: Isa,
    student_v: &[f32],
    student: Distribution,
    teacher_v: &mut [f32],
    teacher: Distribution,
    beta: f32,
    limit: f32,
) -> Divergence {
    assert_eq!(student_v.len(), teacher_v.len(), "rows of one vocabulary");
    let mut whole = Divergence::default();
    for (own, slots) in student_v.chunks(BLOCK).zip(teacher_v.chunks_mut(BLOCK)) {
        let (value, slopes, clipped) = if beta == 0.0 {
            forward_block(isa, own, student, slots, teacher, limit)
        } else if beta == 1.0 {
            reverse_block(isa, own, student, slots, teacher, limit)
        } else {
            mixed_block(isa, own, student, slots, teacher, beta, limit)
        };
        whole.value += f64::from(value);
        whole.slopes += f64::from(slopes);
        whole.clipped |= clipped;
    }
    whole
}

/// Probability and its logarithm.
#[inline(always)]
fn of<S: Simd>(s: S, z: S::V, row: Distribution) -> (S::V, S::V) {
    let x = s.sub(z, s.splat(row.max));
    (s.mul(exp(s, x), s.splat(row.inverse)), s.sub(x, s.splat(row.log_sum)))
}

/// A log-ratio within the bound, 1 where it was inside, 1 where it was not.
#[inline(always)]
fn hold<S: Simd>(s: S, ratio: S::V, limit: f32) -> (S::V, S::V, S::V) {
    let (zero, one, most) = (s.splat(0.0), s.splat(1.0), s.splat(limit));
    let size = s.max(ratio, s.sub(zero, ratio));
    let outside = s.where_greater(size, most, one, zero);
    (s.max(s.min(ratio, most), s.sub(zero, most)), s.sub(one, outside), outside)
}

dispatched! {
    fn forward_block(own: &[f32], student: Distribution, slots: &mut [f32], teacher: Distribution, limit: f32) -> (f32, f32, bool) = forward_body;
}

#[inline(always)]
fn forward_body<S: Simd>(
    s: S,
    own: &[f32],
    student: Distribution,
    slots: &mut [f32],
    teacher: Distribution,
    limit: f32,
) -> (f32, f32, bool) {
    let zero = s.splat(0.0);
    let (mut values, mut slopes, mut met) = (zero, zero, zero);
    let mut at = 0;
    while at < own.len() {
        let (_, c) = of(s, some(s, &own[at..], f32::NEG_INFINITY), student);
        let (q, t) = of(s, some(s, &slots[at..], f32::NEG_INFINITY), teacher);
        let (ratio, inside, outside) = hold(s, s.sub(t, c), limit);
        // What has no weight counts as nothing, also where its logarithm is infinite.
        let value = s.where_greater(q, zero, s.mul(q, ratio), zero);
        let slope = s.where_greater(q, zero, s.mul(s.sub(zero, q), inside), zero);
        met = s.max(s.where_greater(q, zero, outside, zero), met);
        put_some(s, &mut slots[at..], slope);
        (values, slopes) = (s.add(values, value), s.add(slopes, slope));
        at += S::LANES;
    }
    (s.sum(values), s.sum(slopes), s.largest(met) > 0.0)
}

dispatched! {
    fn reverse_block(own: &[f32], student: Distribution, slots: &mut [f32], teacher: Distribution, limit: f32) -> (f32, f32, bool) = reverse_body;
}

#[inline(always)]
fn reverse_body<S: Simd>(
    s: S,
    own: &[f32],
    student: Distribution,
    slots: &mut [f32],
    teacher: Distribution,
    limit: f32,
) -> (f32, f32, bool) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let (mut values, mut slopes, mut met) = (zero, zero, zero);
    let mut at = 0;
    while at < own.len() {
        let (p, c) = of(s, some(s, &own[at..], f32::NEG_INFINITY), student);
        let (_, t) = of(s, some(s, &slots[at..], f32::NEG_INFINITY), teacher);
        let (ratio, inside, outside) = hold(s, s.sub(c, t), limit);
        let value = s.where_greater(p, zero, s.mul(p, ratio), zero);
        let slope = s.where_greater(p, zero, s.mul(p, s.add(ratio, s.sub(inside, one))), zero);
        met = s.max(s.where_greater(p, zero, outside, zero), met);
        put_some(s, &mut slots[at..], slope);
        (values, slopes) = (s.add(values, value), s.add(slopes, slope));
        at += S::LANES;
    }
    (s.sum(values), s.sum(slopes), s.largest(met) > 0.0)
}

dispatched! {
    fn mixed_block(own: &[f32], student: Distribution, slots: &mut [f32], teacher: Distribution, beta: f32, limit: f32) -> (f32, f32, bool) = mixed_body;
}

#[inline(always)]
fn mixed_body<S: Simd>(
    s: S,
    own: &[f32],
    student: Distribution,
    slots: &mut [f32],
    teacher: Distribution,
    beta: f32,
    limit: f32,
) -> (f32, f32, bool) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let (alphas, betas) = (s.splat(1.0 - beta), s.splat(beta));
    let (mut values, mut slopes, mut met) = (zero, zero, zero);
    let mut at = 0;
    while at < own.len() {
        let (p, c) = of(s, some(s, &own[at..], f32::NEG_INFINITY), student);
        let (q, t) = of(s, some(s, &slots[at..], f32::NEG_INFINITY), teacher);
        let (p, q) = (s.mul(p, alphas), s.mul(q, betas));
        let mixture = s.max(s.add(p, q), s.splat(SMALLEST));
        let m = ln(s, mixture);
        let (from_teacher, inside_t, outside_t) = hold(s, s.sub(t, m), limit);
        let (from_student, inside_c, outside_c) = hold(s, s.sub(c, m), limit);
        let share = s.div(p, mixture);
        let teacher_value = s.where_greater(q, zero, s.mul(q, from_teacher), zero);
        let student_value = s.where_greater(p, zero, s.mul(p, from_student), zero);
        let pull = s.where_greater(p, zero, s.mul(p, s.fma(inside_c, s.sub(one, share), from_student)), zero);
        let push = s.where_greater(q, zero, s.mul(s.mul(q, inside_t), share), zero);
        let slope = s.sub(pull, push);
        met = s.max(s.where_greater(q, zero, outside_t, zero), met);
        met = s.max(s.where_greater(p, zero, outside_c, zero), met);
        put_some(s, &mut slots[at..], slope);
        (values, slopes) = (s.add(values, s.add(teacher_value, student_value)), s.add(slopes, slope));
        at += S::LANES;
    }
    (s.sum(values), s.sum(slopes), s.largest(met) > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::numbers;

    fn distribution(isa: Isa, z: &[f32]) -> Distribution {
        let sums = sums(isa, z).unwrap();
        Distribution { max: sums.max, inverse: (1.0 / sums.sum) as f32, log_sum: sums.sum.ln() as f32 }
    }

    fn logs(z: &[f32]) -> Vec<f64> {
        let sum: f64 = z.iter().map(|z| f64::from(*z).exp()).sum();
        z.iter().map(|z| f64::from(*z) - sum.ln()).collect()
    }

    fn row(len: usize, seed: u64) -> Vec<f32> {
        numbers(len, seed).iter().map(|x| x * 8.0).collect()
    }

    #[test]
    fn sums_and_gradients_agree_with_double_precision() {
        for isa in Isa::available() {
            for len in [1, 3, 16, 37, 1024, 3001] {
                let z = row(len, 1);
                let found = sums(isa, &z).unwrap();
                let exact = logs(&z);
                assert_eq!(z.iter().copied().fold(f32::MIN, f32::max), found.max);
                assert_eq!(z[found.argmax], found.max);
                let log = |z: f32| f64::from(z) - f64::from(found.max) - found.sum.ln();
                assert!((log(z[0]) - exact[0]).abs() < 2e-6);
                // Not the same bits in a row of many blocks, the first of which were summed relative to a smaller logit.
                let apart = if len > SUMS_BLOCK { 1e-6 } else { 0.0 };
                assert!((mass(isa, &z, found.max) - found.sum).abs() <= apart * found.sum);
                let entropy: f64 = exact.iter().map(|l| -l * l.exp()).sum();
                assert!((found.sum.ln() - found.weighted / found.sum - entropy).abs() < 1e-5);
                let mut weighed = z.clone();
                weigh(isa, &mut weighed, distribution(isa, &z), -0.7, 0.3);
                for (w, l) in weighed.iter().zip(&exact) {
                    let expected = l.exp() * (0.3 * l - 0.7);
                    assert!((f64::from(*w) - expected).abs() < 3e-6 * expected.abs() + 1e-9, "{w} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_row_in_pieces_has_the_same_bits() {
        for isa in Isa::available() {
            // Rising, so that the largest logit changes with every block, and far enough that the first ones vanish.
            let mut z = row(5 * SUMS_BLOCK + 77, 8);
            z.iter_mut().enumerate().for_each(|(i, z)| *z += (i / SUMS_BLOCK) as f32 * 30.0);
            z[..SUMS_BLOCK].fill(f32::NEG_INFINITY);
            let whole = sums(isa, &z).unwrap();
            for piece in [1, 2, 3, 6] {
                let mut running = RunningSums::default();
                z.chunks(piece * SUMS_BLOCK).for_each(|part| running.add(isa, part));
                assert_eq!(running.finish(), Some(whole), "{isa:?}, {piece}");
            }
            let exact: f64 = z.iter().map(|z| (f64::from(*z) - f64::from(whole.max)).exp()).sum();
            assert!((whole.sum / exact - 1.0).abs() < 1e-6);
            assert_eq!(z[whole.argmax], whole.max);
            let weighted =
                |z: &f32| (f64::from(*z) - f64::from(whole.max)) * (f64::from(*z) - f64::from(whole.max)).exp();
            let exact: f64 = z.iter().filter(|z| z.is_finite()).map(weighted).sum();
            assert!((whole.weighted / exact - 1.0).abs() < 1e-5);
            for at in [SUMS_BLOCK + 3, 5 * SUMS_BLOCK] {
                let mut bad = z.clone();
                bad[at] = f32::NAN;
                assert!(sums(isa, &bad).is_none());
            }
        }
    }

    #[test]
    fn densities_add() {
        for isa in Isa::available() {
            for len in [1, 16, 37, 1030] {
                let (mut out, z) = (row(len, 5), row(len, 6));
                out[0] = f32::NEG_INFINITY;
                if len > 16 {
                    (out[3], out[17]) = (-300.0, f32::NEG_INFINITY);
                }
                let expected: Vec<f64> = out
                    .iter()
                    .zip(&z)
                    .map(|(a, z)| {
                        let (a, b) = (f64::from(*a), f64::from(*z) - 0.75);
                        a.max(b) + (a.min(b) - a.max(b)).exp().ln_1p()
                    })
                    .collect();
                add_density(isa, &mut out, &z, 1.25, 0.5);
                for (found, expected) in out.iter().zip(&expected) {
                    assert!((f64::from(*found) - expected).abs() < 1e-6, "{isa:?}: {found} instead of {expected}");
                }
            }
            let mut nothing = [f32::NEG_INFINITY; 3];
            add_density(isa, &mut nothing, &[f32::NEG_INFINITY; 3], 0.0, 1.0);
            assert_eq!(nothing, [f32::NEG_INFINITY; 3]);
        }
    }

    #[test]
    fn bad_rows_are_found() {
        for isa in Isa::available() {
            for bad in [f32::NAN, f32::INFINITY] {
                for at in [0, 17, 39] {
                    let mut z = row(40, 2);
                    z[3] = f32::NEG_INFINITY;
                    assert!(sums(isa, &z).is_some());
                    z[at] = bad;
                    assert!(sums(isa, &z).is_none(), "{isa:?}: {bad} at {at}");
                }
            }
            assert!(sums(isa, &[f32::NEG_INFINITY; 5]).is_none() && sums(isa, &[]).is_none());
        }
    }

    /// Value and derivative of one summand, as the formulas stand.
    fn term(c: f64, t: f64, beta: f64, limit: f64) -> (f64, f64) {
        let inside = |r: f64| f64::from(u8::from(r.abs() <= limit));
        if beta == 0.0 {
            return (t.exp() * (t - c).clamp(-limit, limit), -t.exp() * inside(t - c));
        }
        if beta == 1.0 {
            let held = (c - t).clamp(-limit, limit);
            return (c.exp() * held, c.exp() * (held + inside(c - t) - 1.0));
        }
        let (p, q) = ((1.0 - beta) * c.exp(), beta * t.exp());
        let m = (p + q).ln();
        let (a, b) = ((t - m).clamp(-limit, limit), (c - m).clamp(-limit, limit));
        let w = p / (p + q);
        (q * a + p * b, p * (b + inside(c - m) * (1.0 - w)) - q * inside(t - m) * w)
    }

    #[test]
    fn divergences_agree_with_double_precision() {
        for isa in Isa::available() {
            for len in [1, 5, 33, 2050] {
                let (student, teacher) = (row(len, 3), row(len, 4));
                for (beta, limit) in [(0.0, 1e9), (0.3, 1e9), (0.5, 0.4), (1.0, 1e9), (1.0, 2.0), (0.0, 2.0)] {
                    let mut slots = teacher.clone();
                    let (s, t) = (distribution(isa, &student), distribution(isa, &teacher));
                    let found = divergence(isa, &student, s, &mut slots, t, beta as f32, limit as f32);
                    let terms: Vec<(f64, f64)> =
                        logs(&student).into_iter().zip(logs(&teacher)).map(|(c, t)| term(c, t, beta, limit)).collect();
                    let value: f64 = terms.iter().map(|t| t.0).sum();
                    assert!(
                        (found.value - value).abs() < 1e-5 * value.abs().max(0.1),
                        "{isa:?} {beta}: {found:?} {value}"
                    );
                    for (slot, (_, slope)) in slots.iter().zip(&terms) {
                        assert!((f64::from(*slot) - slope).abs() < 3e-6 * slope.abs() + 1e-7, "{beta}: {slot} {slope}");
                    }
                    let sum: f64 = slots.iter().map(|s| f64::from(*s)).sum();
                    assert!((found.slopes - sum).abs() < 1e-5);
                    if len > 30 {
                        assert_eq!(found.clipped, limit < 10.0, "{beta} {limit}");
                    }
                }
            }
            // What has no probability on either side adds nothing.
            let (student, mut slots) = ([0.0, f32::NEG_INFINITY, 1.0], [1.0, f32::NEG_INFINITY, 0.0]);
            let (s, t) = (distribution(isa, &student), distribution(isa, &slots));
            let found = divergence(isa, &student, s, &mut slots, t, 0.5, f32::INFINITY);
            assert!(found.value.is_finite() && slots[1] == 0.0 && !found.clipped);
        }
    }
}
