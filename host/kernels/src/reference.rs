//! The same in double precision, written as the formulas stand.

use crate::gemm::Shape;

/// Fixed numbers from −1 to 1.
pub fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f64 / f64::from(1u32 << 23) - 1.0) as f32
        })
        .collect()
}

/// `a · b`.
pub fn product(a: &[f32], b: &[f32], shape: Shape) -> Vec<f64> {
    let Shape { m, n, k } = shape;
    let mut out = vec![0.0f64; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                out[i * n + j] += f64::from(a[i * k + p]) * f64::from(b[p * n + j]);
            }
        }
    }
    out
}
