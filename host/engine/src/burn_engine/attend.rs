//! Attention of single tokens over cached keys and values on the host. Each token reads its own sequence only, in one
//! order of summation, so its result is the same whatever runs beside it.

use super::HostKv;
use super::network::Shapes;
use crate::block::DecodeRow;

/// Partial sums of a dot product, so that it runs in vector registers.
const PARTIAL_SUMS: usize = 16;

/// Mixed values `[padded, heads · head_dim]` for queries `q` of the same shape; padding rows stay 0. The caches already
/// hold every listed row; a row sees positions up to its own.
pub(super) fn attend(shapes: &Shapes, q: &[f32], kv: &[HostKv], rows: &[DecodeRow], padded: usize) -> Vec<f32> {
    let width = shapes.heads * shapes.head_dim;
    let mut mixed = vec![0.0; padded * width];
    let mut scores = Vec::new();
    for ((row, q), out) in rows.iter().zip(q.chunks_exact(width)).zip(mixed.chunks_exact_mut(width)) {
        one(shapes, q, &kv[row.slot], row.position + 1, &mut scores, out);
    }
    mixed
}

/// One token over the first `len` cached positions.
fn one(shapes: &Shapes, q: &[f32], kv: &HostKv, len: usize, scores: &mut Vec<f32>, out: &mut [f32]) {
    let (dim, stride) = (shapes.head_dim, shapes.kv_heads * shapes.head_dim);
    let group = shapes.heads / shapes.kv_heads;
    for (head, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        let offset = head / group * dim;
        scores.clear();
        scores.extend(kv.keys.chunks_exact(stride).take(len).map(|k| dot(q, &k[offset..offset + dim])));
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for (score, v) in scores.iter().zip(kv.values.chunks_exact(stride)) {
            let weight = (score - max).exp();
            sum += weight;
            for (o, v) in out.iter_mut().zip(&v[offset..offset + dim]) {
                *o += weight * v;
            }
        }
        for o in out.iter_mut() {
            *o /= sum;
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; PARTIAL_SUMS];
    let (a_chunks, b_chunks) = (a.chunks_exact(PARTIAL_SUMS), b.chunks_exact(PARTIAL_SUMS));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..PARTIAL_SUMS {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}
