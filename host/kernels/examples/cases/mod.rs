//! The kernels at the sizes that they are measured at: one list for `roofline` and `instructions`.

use std::hint::black_box;

use cosmos_kernels::attention::{self, Heads};
use cosmos_kernels::gemm::{Left, Packed, Right, Shape, gemm};
use cosmos_kernels::narrow::{Format, Narrow};
use cosmos_kernels::page::{PAGE_TOKENS, Page, attend};
use cosmos_kernels::vocabulary::{self, Distribution};
use cosmos_kernels::{Isa, rows};

/// The vocabulary of Qwen2.5.
const VOCABULARY: usize = 151_936;
/// Heads of the model that the CPU engine is measured with.
const HEADS: Heads = Heads { heads: 4, kv_heads: 2, dim: 64 };

/// One kernel at one size.
pub struct Case {
    /// Kernel and shape.
    pub name: String,
    /// Floating-point operations that the result needs: a multiply-add counts as two, an exponential as sixteen, reading
    /// for a maximum as one.
    pub flops: f64,
    /// Bytes that must be read and written at least.
    pub bytes: f64,
    /// Makes the inputs; what comes back does the work once a call.
    pub prepare: Box<dyn Fn(Isa) -> Box<dyn FnMut()>>,
}

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    products(&mut cases);
    packing(&mut cases);
    narrow_products(&mut cases);
    rows_of_activations(&mut cases);
    attentions(&mut cases);
    vocabularies(&mut cases);
    cases
}

/// Numbers between −½ and ½ that look like nothing in particular.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect()
}

fn case<W: FnMut() + 'static>(name: String, flops: usize, bytes: usize, prepare: impl Fn(Isa) -> W + 'static) -> Case {
    let prepare = move |isa| Box::new(prepare(isa)) as Box<dyn FnMut()>;
    Case { name, flops: flops as f64, bytes: bytes as f64, prepare: Box::new(prepare) }
}

fn products(cases: &mut Vec<Case>) {
    for (m, n, k) in [
        (1, 768, 256),
        (1, 4096, 256),
        (1, 4864, 896),
        (1, 32768, 896),
        (4, 4864, 896),
        (32, 1536, 256),
        (32, 4096, 256),
        (128, 1536, 256),
        (512, 1536, 256),
        (512, 256, 768),
        (512, 9728, 896),
        (512, 4096, 256),
    ] {
        let (flops, bytes) = (2 * m * n * k, 4 * (n * k + m * k + m * n));
        cases.push(case(format!("x·Wᵀ packed {m}×{n}×{k}"), flops, bytes, move |isa| {
            let (a, packed) = (numbers(m * k), Packed::transposed(isa, &numbers(n * k), n, k));
            let mut out = vec![0.0; m * n];
            move || gemm(isa, Shape { m, n, k }, Left::Rows(&a, k), Right::Packed(&packed), &mut out, n, false)
        }));
        if m < 128 {
            continue;
        }
        cases.push(case(format!("x·Wᵀ {m}×{n}×{k}"), flops, bytes, move |isa| {
            let (a, w, mut out) = (numbers(m * k), numbers(n * k), vec![0.0; m * n]);
            move || gemm(isa, Shape { m, n, k }, Left::Rows(&a, k), Right::Columns(&w, k), &mut out, n, false)
        }));
        cases.push(case(format!("dy·W {m}×{k}×{n}"), flops, bytes, move |isa| {
            let (dy, w, mut dx) = (numbers(m * n), numbers(n * k), vec![0.0; m * k]);
            move || gemm(isa, Shape { m, n: k, k: n }, Left::Rows(&dy, n), Right::Rows(&w, k), &mut dx, k, false)
        }));
        // The gradient is read as well, since it is added to.
        cases.push(case(format!("dyᵀ·x {n}×{k}×{m}"), flops, bytes + 4 * n * k, move |isa| {
            let (dy, x, mut dw) = (numbers(m * n), numbers(m * k), vec![0.0; n * k]);
            move || gemm(isa, Shape { m: n, n: k, k: m }, Left::Columns(&dy, n), Right::Rows(&x, k), &mut dw, k, true)
        }));
    }
}

fn packing(cases: &mut Vec<Case>) {
    let (n, k) = (1536, 256);
    cases.push(case(format!("weights into panels, transposed {n}×{k}"), 0, 8 * n * k, move |isa| {
        let (weights, mut packed) = (numbers(n * k), Packed::default());
        move || packed.set_transposed(isa, &weights, k, n, k)
    }));
    cases.push(case(format!("rows into panels {k}×{n}"), 0, 8 * n * k, move |isa| {
        let (weights, mut packed) = (numbers(n * k), Packed::default());
        move || packed.set_rows(isa, &weights, n, n, k)
    }));
}

/// Weights in fewer bits: what is read of them is what counts.
fn narrow_products(cases: &mut Vec<Case>) {
    for (n, k) in [(1536, 256), (4864, 896), (32768, 896)] {
        for (name, format, weight_bytes) in [("bf16", Format::Bf16, 2), ("int8", Format::Int8, 1)] {
            cases.push(case(format!("pack {name} {n}×{k}"), 0, (4 + weight_bytes) * n * k, move |isa| {
                let (w, mut narrow) = (numbers(n * k), Narrow::zeros(isa, format, n, k));
                move || narrow.set(isa, 0, &w)
            }));
            for m in [1, 32] {
                let bytes = weight_bytes * n * k + 4 * (m * k + m * n);
                cases.push(case(format!("x·Wᵀ {name} {m}×{n}×{k}"), 2 * m * n * k, bytes, move |isa| {
                    let mut narrow = Narrow::zeros(isa, format, n, k);
                    narrow.set(isa, 0, &numbers(n * k));
                    let (x, mut out) = (numbers(m * k), vec![0.0; m * n]);
                    move || narrow.product(isa, m, &x, &mut out, false)
                }));
            }
        }
    }
}

fn rows_of_activations(cases: &mut Vec<Case>) {
    let (count, h, f) = (512, 256, 768);
    let len = count * h;
    cases.push(case(format!("RMSNorm {count}×{h}"), 4 * len, 8 * len, move |isa| {
        let (x, w, mut y) = (numbers(len), numbers(h), vec![0.0; len]);
        move || rows::rms_norm(isa, &x, h, 1, &w, 1e-6, &mut y, h)
    }));
    cases.push(case(format!("RMSNorm backward {count}×{h}"), 10 * len, 12 * len, move |isa| {
        let (x, w, dy) = (numbers(len), numbers(h), numbers(len));
        let (mut dx, mut dw) = (vec![0.0; len], vec![0.0; h]);
        move || rows::rms_norm_vjp(isa, &x, h, 1, &w, 1e-6, &dy, h, &mut dx, h, false, &mut dw)
    }));
    let out_len = count * f;
    cases.push(case(format!("SwiGLU {count}×{f}"), 19 * out_len, 12 * out_len, move |isa| {
        let (gate_up, mut out) = (numbers(2 * out_len), vec![0.0; out_len]);
        move || rows::swiglu(isa, &gate_up, f, &mut out)
    }));
    cases.push(case(format!("SwiGLU backward {count}×{f}"), 25 * out_len, 24 * out_len, move |isa| {
        let (gate_up, dout) = (numbers(2 * out_len), numbers(out_len));
        let (mut out, mut dgate_up) = (vec![0.0; out_len], vec![0.0; 2 * out_len]);
        move || {
            // The gradient's buffer becomes the activations, and the other way round, so both have to be filled again.
            out.copy_from_slice(&dout);
            dgate_up.copy_from_slice(&gate_up);
            rows::swiglu_vjp(isa, &mut dgate_up, f, &mut out);
        }
    }));
    let width = HEADS.width();
    let turned = count * width;
    cases.push(case(format!("rotary positions {count}×{width}"), 3 * turned, 8 * turned, move |isa| {
        let mut x = numbers(turned);
        let angles = (0..HEADS.dim / 2).map(|i| i as f32 * 0.1);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos(), a.sin())).unzip();
        move || {
            for row in x.chunks_exact_mut(width) {
                rows::rotate(isa, row, HEADS.heads, &cos, &sin, 1.0, 1.0);
            }
        }
    }));
    cases.push(case(format!("sum of two {count}×{h}"), len, 12 * len, move |isa| {
        let (mut to, from) = (vec![0.0; len], numbers(len));
        move || rows::add(isa, &mut to, &from)
    }));
    cases.push(case(format!("sum of rows {count}×{h}"), len, 4 * len, move |isa| {
        let (x, mut sums) = (numbers(len), vec![0.0; h]);
        move || rows::add_rows(isa, &x, &mut sums)
    }));
}

fn attentions(cases: &mut Vec<Case>) {
    let heads = HEADS;
    for (b, t) in [(16, 24), (2, 256), (1, 1024)] {
        // Half of every square is masked and not computed.
        let flops = 2 * b * t * t * heads.width();
        let bytes = 4 * b * t * (heads.row() + heads.width());
        cases.push(case(format!("attention {b}×{t}"), flops, bytes, move |isa| {
            let qkv = numbers(b * t * heads.row());
            let (mut out, mut sums) = (vec![0.0; b * t * heads.width()], vec![0.0; b * t * heads.heads]);
            move || attention::forward(isa, heads, b, t, &qkv, &mut out, &mut sums)
        }));
        let bytes = 4 * b * t * (2 * heads.row() + heads.width());
        cases.push(case(format!("attention backward {b}×{t}"), 5 * flops / 2, bytes, move |isa| {
            let qkv = numbers(b * t * heads.row());
            let (mut out, mut sums) = (vec![0.0; b * t * heads.width()], vec![0.0; b * t * heads.heads]);
            attention::forward(isa, heads, b, t, &qkv, &mut out, &mut sums);
            let mut dqkv = vec![0.0; qkv.len()];
            move || attention::backward(isa, heads, b, t, &qkv, &sums, &out, &mut dqkv)
        }));
    }
    let (len, repeats) = (256, 50);
    let count = len / PAGE_TOKENS;
    let (flops, bytes) = (4 * len * heads.width(), count * Page::bytes(heads));
    cases.push(case(format!("{repeats} × one token over {len}"), repeats * flops, repeats * bytes, move |isa| {
        let pages: Vec<Page> = (0..count).map(|_| Page::new(heads)).collect();
        let (query, mut out, mut scores) = (numbers(heads.width()), vec![0.0; heads.width()], Vec::new());
        move || {
            let pages: Vec<&Page> = pages.iter().collect();
            for _ in 0..repeats {
                attend(isa, heads, &pages, len, &query, &mut scores, &mut out, None);
            }
        }
    }));
    cases.push(case(format!("{len} tokens into pages"), 0, 16 * len * heads.kv_heads * heads.dim, move |_| {
        let mut pages: Vec<Page> = (0..count).map(|_| Page::new(heads)).collect();
        let row = numbers(heads.kv_heads * heads.dim);
        move || {
            for token in 0..len {
                pages[token / PAGE_TOKENS].put(heads, token % PAGE_TOKENS, &row, &row);
            }
        }
    }));
}

fn vocabularies(cases: &mut Vec<Case>) {
    let v = VOCABULARY;
    cases.push(case(format!("softmax sums {v}"), 21 * v, 4 * v, move |isa| {
        let z_v = numbers(v);
        move || {
            black_box(vocabulary::sums(isa, &z_v));
        }
    }));
    cases.push(case(format!("softmax mass {v}"), 18 * v, 4 * v, move |isa| {
        let z_v = numbers(v);
        move || {
            black_box(vocabulary::mass(isa, &z_v, 0.5));
        }
    }));
    cases.push(case(format!("softmax gradient {v}"), 22 * v, 8 * v, move |isa| {
        let (z_v, of) = row_and_distribution(isa);
        let mut slots = z_v.clone();
        move || {
            slots.copy_from_slice(&z_v);
            vocabulary::weigh(isa, &mut slots, of, 1.0, 0.5);
        }
    }));
    cases.push(case(format!("scaled sum {v}"), 2 * v, 12 * v, move |isa| {
        let (mut to, from) = (vec![0.0; v], numbers(v));
        move || vocabulary::add_scaled(isa, &mut to, &from, 0.5)
    }));
    // Forward, reverse and the mixture, whose logarithm costs most.
    for (beta, flops) in [(0.0, 39), (1.0, 40), (0.5, 76)] {
        cases.push(case(format!("divergence β={beta} {v}"), flops * v, 12 * v, move |isa| {
            let (teacher_v, of) = row_and_distribution(isa);
            let student_v: Vec<f32> = teacher_v.iter().rev().copied().collect();
            let mut slots = teacher_v.clone();
            move || {
                slots.copy_from_slice(&teacher_v);
                black_box(vocabulary::divergence(isa, &student_v, of, &mut slots, of, beta, 20.0));
            }
        }));
    }
}

/// Logits and what they sum to. They are read backwards too, which leaves the sums as they are.
fn row_and_distribution(isa: Isa) -> (Vec<f32>, Distribution) {
    let z_v = numbers(VOCABULARY);
    let max = z_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum = vocabulary::mass(isa, &z_v, max);
    (z_v, Distribution { max, inverse: (1.0 / sum) as f32, log_sum: sum.ln() as f32 })
}
