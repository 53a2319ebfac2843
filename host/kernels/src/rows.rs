//! Work on rows of activations: norms, SwiGLU, rotary positions, sums.
#![allow(unsafe_code)]

use crate::simd::{Simd, dispatched, exp};

/// `∑ a · b`, in vectors and then their lanes.
#[inline(always)]
pub(crate) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 2];
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let step = 2 * S::LANES;
    let mut at = 0;
    while at + step <= len {
        sums[0] = s.fma(s.get(&a[at..]), s.get(&b[at..]), sums[0]);
        sums[1] = s.fma(s.get(&a[at + S::LANES..]), s.get(&b[at + S::LANES..]), sums[1]);
        at += step;
    }
    if at + S::LANES <= len {
        sums[0] = s.fma(s.get(&a[at..]), s.get(&b[at..]), sums[0]);
        at += S::LANES;
    }
    let mut sum = s.sum(s.add(sums[0], sums[1]));
    for (a, b) in a[at..].iter().zip(&b[at..]) {
        sum += a * b;
    }
    sum
}

dispatched! {
    /// RMSNorm of rows as wide as `weight`: `y = x / √(mean(x²) + ε) · w` (Zhang and Sennrich 2019). `x` rows are
    /// `x_stride` apart, each of `heads` parts side by side; `y` likewise.
    pub fn rms_norm(x: &[f32], x_stride: usize, heads: usize, weight: &[f32], eps: f32, y: &mut [f32], y_stride: usize) = rms_norm_body;
}

#[inline(always)]
fn rms_norm_body<S: Simd>(
    s: S,
    x: &[f32],
    x_stride: usize,
    heads: usize,
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
    y_stride: usize,
) {
    let width = weight.len();
    for (x, y) in x.chunks(x_stride).zip(y.chunks_mut(y_stride)) {
        for (x, y) in x[..heads * width].chunks_exact(width).zip(y[..heads * width].chunks_exact_mut(width)) {
            let scale = inverse_root(s, x, eps);
            let scales = s.splat(scale);
            let mut at = 0;
            while at + S::LANES <= width {
                let v = s.mul(s.mul(s.get(&x[at..]), scales), s.get(&weight[at..]));
                s.put(&mut y[at..], v);
                at += S::LANES;
            }
            for i in at..width {
                y[i] = x[i] * scale * weight[i];
            }
        }
    }
}

#[inline(always)]
fn inverse_root<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt()
}

dispatched! {
    /// The vector-Jacobian product of [`rms_norm`]: with `r = 1/√(mean(x²) + ε)`, `x̂ = x·r`, `g = dy·w`:
    /// `dx = r · (g − x̂ · mean(g · x̂))`, and `dw += ∑ dy · x̂`. `dx` is added to where `add`, and may be a buffer of
    /// other strides.
    pub fn rms_norm_vjp(
        x: &[f32], x_stride: usize, heads: usize, weight: &[f32], eps: f32,
        dy: &[f32], dy_stride: usize, dx: &mut [f32], dx_stride: usize, add: bool, dweight: &mut [f32],
    ) = rms_norm_vjp_body;
}

#[inline(always)]
fn rms_norm_vjp_body<S: Simd>(
    s: S,
    x: &[f32],
    x_stride: usize,
    heads: usize,
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dy_stride: usize,
    dx: &mut [f32],
    dx_stride: usize,
    add: bool,
    dweight: &mut [f32],
) {
    let width = weight.len();
    let dweight = &mut dweight[..width];
    for ((x, dy), dx) in x.chunks(x_stride).zip(dy.chunks(dy_stride)).zip(dx.chunks_mut(dx_stride)) {
        for head in 0..heads {
            let part = head * width..(head + 1) * width;
            let (x, dy, dx) = (&x[part.clone()], &dy[part.clone()], &mut dx[part]);
            let r = inverse_root(s, x, eps);
            let rs = s.splat(r);
            let mut sums = s.splat(0.0);
            let mut at = 0;
            while at + S::LANES <= width {
                let (normal, dy_at) = (s.mul(s.get(&x[at..]), rs), s.get(&dy[at..]));
                let dw = s.fma(dy_at, normal, s.get(&dweight[at..]));
                s.put(&mut dweight[at..], dw);
                sums = s.fma(s.mul(dy_at, s.get(&weight[at..])), normal, sums);
                at += S::LANES;
            }
            let mut sum = s.sum(sums);
            for i in at..width {
                let normal = x[i] * r;
                dweight[i] += dy[i] * normal;
                sum += dy[i] * weight[i] * normal;
            }
            let mean = sum / width as f32;
            let means = s.splat(-mean);
            at = 0;
            while at + S::LANES <= width {
                let normal = s.mul(s.get(&x[at..]), rs);
                let g = s.mul(s.get(&dy[at..]), s.get(&weight[at..]));
                let v = s.mul(rs, s.fma(normal, means, g));
                let v = if add { s.add(s.get(&dx[at..]), v) } else { v };
                s.put(&mut dx[at..], v);
                at += S::LANES;
            }
            for i in at..width {
                let v = r * (dy[i] * weight[i] - x[i] * r * mean);
                dx[i] = if add { dx[i] + v } else { v };
            }
        }
    }
}

dispatched! {
    /// SwiGLU (Shazeer 2020) of rows `[gate, up]`, each half `width` wide: `out = gate · σ(gate) · up`.
    pub fn swiglu(gate_up: &[f32], width: usize, out: &mut [f32]) = swiglu_body;
}

#[inline(always)]
fn swiglu_body<S: Simd>(s: S, gate_up: &[f32], width: usize, out: &mut [f32]) {
    let one = s.splat(1.0);
    for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        let mut at = 0;
        while at < width {
            let len = S::LANES.min(width - at);
            let (g, u) = (part(s, &gate[at..], len), part(s, &up[at..], len));
            let e = exp(s, s.sub(s.splat(0.0), g));
            put_part(s, &mut out[at..], s.mul(s.div(g, s.add(one, e)), u), len);
            at += len;
        }
    }
}

/// The first `len` numbers, zeros in the lanes beyond.
#[inline(always)]
fn part<S: Simd>(s: S, from: &[f32], len: usize) -> S::V {
    if len == S::LANES {
        return s.get(from);
    }
    let mut whole = [0.0; 16];
    whole[..len].copy_from_slice(&from[..len]);
    s.get(&whole)
}

#[inline(always)]
fn put_part<S: Simd>(s: S, to: &mut [f32], v: S::V, len: usize) {
    if len == S::LANES {
        return s.put(to, v);
    }
    let mut whole = [0.0; 16];
    s.put(&mut whole, v);
    to[..len].copy_from_slice(&whole[..len]);
}

dispatched! {
    /// The vector-Jacobian product of [`swiglu`], and its result again. With `σ = σ(gate)`:
    /// `dup = dout · gate·σ`, `dgate = dout · up · σ · (1 + gate · (1 − σ))`. Leaves the gradient in the place of gate and up,
    /// and the result in that of `dout`.
    pub fn swiglu_vjp(gate_up_to_grad: &mut [f32], width: usize, dout_to_out: &mut [f32]) = swiglu_vjp_body;
}

#[inline(always)]
fn swiglu_vjp_body<S: Simd>(s: S, gate_up_to_grad: &mut [f32], width: usize, dout_to_out: &mut [f32]) {
    let one = s.splat(1.0);
    for (row, out) in gate_up_to_grad.chunks_exact_mut(2 * width).zip(dout_to_out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at_mut(width);
        let mut at = 0;
        while at < width {
            let len = S::LANES.min(width - at);
            let (g, u, d) = (part(s, &gate[at..], len), part(s, &up[at..], len), part(s, &out[at..], len));
            let sigma = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), g))));
            let silu = s.mul(g, sigma);
            // σ + g·σ·(1 − σ) = σ + silu·(1 − σ).
            let slope = s.fma(silu, s.sub(one, sigma), sigma);
            put_part(s, &mut gate[at..], s.mul(s.mul(d, u), slope), len);
            put_part(s, &mut up[at..], s.mul(d, silu), len);
            put_part(s, &mut out[at..], s.mul(silu, u), len);
            at += len;
        }
    }
}

dispatched! {
    /// Rotary positions (Su et al. 2021, half-split) of one row of `heads` heads in place, scaled by `scale`; `cos` and
    /// `sin` are half a head wide. A negated `sin` turns back, which is also the transpose.
    pub fn rotate(row: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], direction: f32, scale: f32) = rotate_body;
}

#[inline(always)]
fn rotate_body<S: Simd>(s: S, row: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], direction: f32, scale: f32) {
    let half = cos.len();
    for head in row[..heads * 2 * half].chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        let mut at = 0;
        while at < half {
            let len = S::LANES.min(half - at);
            let (x, y) = (part(s, &first[at..], len), part(s, &second[at..], len));
            let c = s.mul(part(s, &cos[at..], len), s.splat(scale));
            let d = s.mul(part(s, &sin[at..], len), s.splat(scale * direction));
            put_part(s, &mut first[at..], s.sub(s.mul(x, c), s.mul(y, d)), len);
            put_part(s, &mut second[at..], s.fma(y, c, s.mul(x, d)), len);
            at += len;
        }
    }
}

dispatched! {
    /// `to += from`.
    pub fn add(to: &mut [f32], from: &[f32]) = add_body;
}

#[inline(always)]
fn add_body<S: Simd>(_s: S, to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

dispatched! {
    /// Adds every row's numbers to `sums`, row after row: the gradient of a bias.
    pub fn add_rows(rows: &[f32], sums: &mut [f32]) = add_rows_body;
}

#[inline(always)]
fn add_rows_body<S: Simd>(_s: S, rows: &[f32], sums: &mut [f32]) {
    for row in rows.chunks_exact(sums.len().max(1)) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::reference::numbers;

    fn near(found: &[f32], expected: &[f64], what: &str) {
        assert_eq!(found.len(), expected.len());
        for (index, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(*f) - e).abs() <= 3e-6 * e.abs().max(1.0), "{what}[{index}]: {f} instead of {e}");
        }
    }

    fn norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| x * r * w).collect()
    }

    fn double(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    /// The gradient of `∑ f(x)·dy` by central differences.
    fn slopes(x: &[f64], dy: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        let total = |x: &[f64]| f(x).iter().zip(dy).map(|(y, d)| y * f64::from(*d)).sum::<f64>();
        (0..x.len())
            .map(|i| {
                let mut moved = x.to_vec();
                moved[i] += 1e-5;
                let up = total(&moved);
                moved[i] -= 2e-5;
                (up - total(&moved)) / 2e-5
            })
            .collect()
    }

    #[test]
    fn norms_and_their_gradients() {
        for isa in Isa::available() {
            for width in [2, 10, 16, 24, 64, 77] {
                let (heads, rows, stride) = (2, 3, 2 * width + 5);
                let (x, w, dy) = (numbers(rows * stride, 1), numbers(width, 2), numbers(rows * stride, 3));
                let (mut y, mut dx, mut dw) = (vec![0.0; rows * stride], vec![1.0; rows * stride], vec![0.5; width]);
                rms_norm(isa, &x, stride, heads, &w, 1e-5, &mut y, stride);
                rms_norm_vjp(isa, &x, stride, heads, &w, 1e-5, &dy, stride, &mut dx, stride, true, &mut dw);
                let mut dw_expected = vec![0.5; width];
                for part in (0..rows).flat_map(|row| (0..heads).map(move |head| row * stride + head * width)) {
                    let at = part..part + width;
                    let (x, w) = (double(&x[at.clone()]), double(&w));
                    near(&y[at.clone()], &norm(&x, &w, 1e-5), "norm");
                    let by_x = slopes(&x, &dy[at.clone()], |x| norm(x, &w, 1e-5));
                    near(&dx[at.clone()], &by_x.iter().map(|d| d + 1.0).collect::<Vec<_>>(), "by x");
                    let by_w = slopes(&w, &dy[at], |w| norm(&x, w, 1e-5));
                    dw_expected.iter_mut().zip(by_w).for_each(|(sum, d)| *sum += d);
                }
                near(&dw, &dw_expected, "by the weight");
                assert!((0..rows).all(|row| dx[row * stride + 2 * width..][..5] == [1.0; 5]), "beyond the heads");
            }
        }
    }

    #[test]
    fn swiglu_and_its_gradient() {
        for isa in Isa::available() {
            for width in [1, 7, 16, 40] {
                let x: Vec<f32> = numbers(4 * width, 1).iter().map(|x| x * 9.0).collect();
                let dy = numbers(2 * width, 2);
                let f = |x: &[f64]| -> Vec<f64> {
                    let (g, u) = x.split_at(width);
                    g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
                };
                let mut out = vec![0.0; 2 * width];
                swiglu(isa, &x, width, &mut out);
                let (mut both, mut dx) = (dy.clone(), x.clone());
                swiglu_vjp(isa, &mut dx, width, &mut both);
                near(&both, &double(&out), "again");
                for row in 0..2 {
                    let x = double(&x[row * 2 * width..][..2 * width]);
                    near(&out[row * width..][..width], &f(&x), "swiglu");
                    let slopes = slopes(&x, &dy[row * width..][..width], f);
                    for (found, expected) in dx[row * 2 * width..].iter().zip(slopes) {
                        assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} {expected}");
                    }
                }
            }
            let mut far = [0.0; 2];
            swiglu(isa, &[100.0, -100.0, 1.0, 1.0], 2, &mut far);
            assert!((far[0] - 100.0).abs() < 1e-4 && far[1].abs() < 1e-30, "{far:?}");
        }
    }

    #[test]
    fn turning_and_turning_back() {
        for isa in Isa::available() {
            for half in [1, 5, 16, 20] {
                let x = numbers(6 * half, 1);
                let angles = numbers(half, 2);
                let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
                let mut y = x.clone();
                rotate(isa, &mut y, 3, &cos, &sin, 1.0, 0.5);
                let mut expected = Vec::new();
                for head in x.chunks_exact(2 * half) {
                    let turn = |i: usize, j: usize, sign: f64| {
                        0.5 * (f64::from(head[i]) * f64::from(cos[i % half])
                            + sign * f64::from(head[j]) * f64::from(sin[i % half]))
                    };
                    expected.extend((0..half).map(|i| turn(i, half + i, -1.0)));
                    expected.extend((0..half).map(|i| turn(half + i, i, 1.0)));
                }
                near(&y, &expected, "turned");
                rotate(isa, &mut y, 3, &cos, &sin, -1.0, 2.0);
                near(&y, &double(&x), "back");
            }
        }
    }

    #[test]
    fn exponentials_and_logarithms() {
        dispatched! {
            fn both(x: &mut [f32], logarithm: bool) = both_body;
        }
        #[inline(always)]
        fn both_body<S: Simd>(s: S, x: &mut [f32], logarithm: bool) {
            for x in x.chunks_exact_mut(S::LANES) {
                let v = s.get(x);
                s.put(x, if logarithm { crate::simd::ln(s, v) } else { exp(s, v) });
            }
        }
        for isa in Isa::available() {
            let x: Vec<f32> = (0..1 << 16).map(|i| i as f32 * 0.002_67 - 86.9).collect();
            let mut y = x.clone();
            both(isa, &mut y, false);
            for (x, y) in x.iter().zip(&y).filter(|(x, _)| **x < 87.9) {
                assert!((f64::from(*y) / f64::from(*x).exp() - 1.0).abs() < 3e-7, "{isa:?}: exp({x}) = {y}");
            }
            let mut ends = [0.0f32; 16];
            (ends[0], ends[1], ends[2]) = (f32::NEG_INFINITY, -88.0, 0.0);
            both(isa, &mut ends, false);
            assert_eq!(ends[..3], [0.0, 0.0, 1.0]);
            let x: Vec<f32> = (1..1 << 16).map(|i| (i as f32 * 0.013).exp2() * 1e-37).filter(|x| *x < 1e38).collect();
            let mut x = x[..x.len() / 16 * 16].to_vec();
            x.extend((0..1600).map(|i| 0.6 + i as f32 * 5e-4));
            let mut y = x.clone();
            both(isa, &mut y, true);
            for (x, y) in x.iter().zip(&y) {
                let exact = f64::from(*x).ln();
                assert!((f64::from(*y) - exact).abs() < 3e-7 * exact.abs().max(0.3), "{isa:?}: ln({x}) = {y}, {exact}");
            }
        }
    }
}
