//! Achieved GF/s and GB/s of each kernel beside the machine's peaks, measured in the same second.
//!
//! `cargo run --release -p cosmos-kernels --example roofline -- [threads]`; `COSMOS_ISA` picks an instruction set.

use std::hint::black_box;
use std::time::Instant;

use cosmos_kernels::attention::{self, Heads};
use cosmos_kernels::gemm::{Left, Packed, Right, Shape, gemm};
use cosmos_kernels::page::{PAGE_TOKENS, Page, attend};
use cosmos_kernels::{Isa, rows, threads};

/// Best seconds of several runs. On one thread, where the system tells it, the time that the thread was running: on a
/// busy machine the clock tells nothing.
fn best(mut work: impl FnMut()) -> f64 {
    work();
    let alone = rayon::current_num_threads() == 1;
    (0..9)
        .map(|_| {
            let (start, ran) = (Instant::now(), thread_seconds());
            work();
            match (ran, thread_seconds()) {
                (Some(before), Some(after)) if alone => after - before,
                _ => start.elapsed().as_secs_f64(),
            }
        })
        .fold(f64::INFINITY, f64::min)
}

/// Seconds that this thread has run, on Linux.
fn thread_seconds() -> Option<f64> {
    // Asking the scheduler brings its own count up to date.
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split(' ').next()?.parse::<f64>().ok().map(|ns| ns / 1e9)
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect()
}

struct Report {
    isa: Isa,
    flops_peak: f64,
    bytes_peak: f64,
}

impl Report {
    /// Prints a kernel's speed; flops and bytes are those that the work needs at least.
    fn line(&self, name: &str, flops: f64, bytes: f64, work: impl FnMut()) {
        let seconds = best(work);
        println!(
            "{name:<42}{:>10.3}{:>9.1}{:>7.0}{:>9.1}{:>7.0}",
            seconds * 1e3,
            flops / seconds / 1e9,
            100.0 * flops / seconds / self.flops_peak,
            bytes / seconds / 1e9,
            100.0 * bytes / seconds / self.bytes_peak
        );
    }
}

/// A product whose panels stay in the second cache: the best that this code reaches, not what the processor could.
fn flops_peak(isa: Isa) -> f64 {
    let (m, n, k) = (120, 512, 256);
    let (a, w) = (numbers(m * k), numbers(n * k));
    let packed = Packed::transposed(isa, &w, n, k);
    let count = rayon::current_num_threads();
    let repeats = 60;
    let seconds = best(|| {
        threads::each(count, true, |_| {
            threads::serial(|| {
                let mut out = vec![0.0; m * n];
                for _ in 0..repeats {
                    gemm(isa, Shape { m, n, k }, Left::Rows(&a, k), Right::Packed(&packed), &mut out, n, false);
                }
                black_box(&out);
            });
        });
    });
    (2 * m * n * k * repeats * count) as f64 / seconds
}

/// Sums over more than any cache holds.
fn bytes_peak() -> f64 {
    let values = vec![1.0f32; 64 << 20];
    let mut parts = vec![0.0f32; 64];
    let part = values.len() / parts.len();
    let seconds = best(|| {
        threads::each_part(&mut parts, 1, true, |index, to| {
            let mut sums = [0.0f32; 64];
            for chunk in values[index * part..(index + 1) * part].as_chunks::<64>().0 {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum += x;
                }
            }
            to[0] = sums.iter().sum();
        });
        black_box(&parts);
    });
    4.0 * values.len() as f64 / seconds
}

fn main() {
    let isa = Isa::best();
    let report = Report { isa, flops_peak: flops_peak(isa), bytes_peak: bytes_peak() };
    println!(
        "{}, {} threads; best product {:.1} GF/s in cache, {:.1} GB/s from memory",
        isa.name(),
        rayon::current_num_threads(),
        report.flops_peak / 1e9,
        report.bytes_peak / 1e9
    );
    println!("{:<42}{:>10}{:>9}{:>7}{:>9}{:>7}", "kernel", "ms", "GF/s", "%", "GB/s", "%");
    products(&report);
    others(&report);
}

fn products(report: &Report) {
    let isa = report.isa;
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
        let (a, w) = (numbers(m * k), numbers(n * k));
        let packed = Packed::transposed(isa, &w, n, k);
        let mut out = vec![0.0; m * n];
        let flops = (2 * m * n * k) as f64;
        let bytes = (4 * (n * k + m * k + m * n)) as f64;
        let shape = Shape { m, n, k };
        report.line(&format!("x·Wᵀ packed {m}×{n}×{k}"), flops, bytes, || {
            gemm(isa, shape, Left::Rows(&a, k), Right::Packed(&packed), &mut out, n, false);
        });
        if m < 128 {
            continue;
        }
        let mut dx = vec![0.0; m * k];
        report.line(&format!("dy·W {m}×{k}×{n}"), flops, bytes, || {
            gemm(isa, Shape { m, n: k, k: n }, Left::Rows(&out, n), Right::Rows(&w, k), &mut dx, k, false);
        });
        let mut dw = vec![0.0; n * k];
        report.line(&format!("dyᵀ·x {n}×{k}×{m}"), flops, bytes, || {
            gemm(isa, Shape { m: n, n: k, k: m }, Left::Columns(&out, n), Right::Rows(&a, k), &mut dw, k, true);
        });
    }
}

fn others(report: &Report) {
    let isa = report.isa;
    let (rows_count, h, f) = (512, 256, 768);
    let (x, w) = (numbers(rows_count * h), numbers(h));
    let mut y = vec![0.0; rows_count * h];
    report.line("RMSNorm 512×256", 4.0 * (rows_count * h) as f64, 8.0 * (rows_count * h) as f64, || {
        rows::rms_norm(isa, &x, h, 1, &w, 1e-6, &mut y, h);
    });
    let gate_up = numbers(rows_count * 2 * f);
    let mut out = vec![0.0; rows_count * f];
    let numbers_out = (rows_count * f) as f64;
    report.line("SwiGLU 512×768", 24.0 * numbers_out, 12.0 * numbers_out, || {
        rows::swiglu(isa, &gate_up, f, &mut out);
    });
    let mut dgate_up = vec![0.0; rows_count * 2 * f];
    report.line("SwiGLU backward 512×768", 30.0 * numbers_out, 24.0 * numbers_out, || {
        rows::swiglu_vjp(isa, &gate_up, f, &mut out, &mut dgate_up);
    });
    let heads = Heads { heads: 4, kv_heads: 2, dim: 64 };
    for (b, t) in [(16, 24), (2, 256), (1, 1024)] {
        let qkv = numbers(b * t * heads.row());
        let (mut out, mut sums) = (vec![0.0; b * t * heads.width()], vec![0.0; b * t * heads.heads]);
        let flops = (2 * b * t * t * heads.width()) as f64;
        let bytes = 4.0 * (qkv.len() + out.len()) as f64;
        report.line(&format!("attention {b}×{t}"), flops, bytes, || {
            attention::forward(isa, heads, b, t, &qkv, &mut out, &mut sums);
        });
        let mut dqkv = vec![0.0; qkv.len()];
        let dout = out.clone();
        report.line(&format!("attention backward {b}×{t}"), 2.5 * flops, 3.0 * bytes, || {
            attention::backward(isa, heads, b, t, &qkv, &out, &sums, &dout, &mut dqkv);
        });
    }
    let len = 256;
    let pages: Vec<Page> = (0..len / PAGE_TOKENS).map(|_| Page::new(heads)).collect();
    let pages: Vec<&Page> = pages.iter().collect();
    let (query, mut out, mut scores) = (numbers(heads.width()), vec![0.0; heads.width()], Vec::new());
    let flops = (4 * len * heads.width()) as f64;
    report.line("one token over 256", flops * 100.0, (100 * pages.len() * Page::bytes(heads)) as f64, || {
        for _ in 0..100 {
            attend(isa, heads, &pages, len, &query, &mut scores, &mut out);
        }
    });
}
