//! Achieved GF/s and GB/s of each kernel beside the machine's peaks, measured in the same minute.
//!
//! `cargo run --release -p cosmos-kernels --example roofline -- [PART OF A NAME]`; `COSMOS_ISA` picks an instruction set
//! and `RAYON_NUM_THREADS` the threads.

mod cases;

use std::hint::black_box;
use std::time::Instant;

use cosmos_kernels::{Isa, threads};

/// Best seconds of several runs. On one thread, where the system tells it, the time that the thread was running: on a
/// busy machine the clock tells nothing.
fn best(work: &mut dyn FnMut()) -> f64 {
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

/// Vectors that are multiplied and added to side by side: enough to fill two pipelines of any depth so far.
const VECTORS: usize = 12;

/// Fused multiply-adds on registers alone, and how many operations they were.
fn fused(isa: Isa, repeats: usize) -> usize {
    let lanes = match isa.name() {
        #[cfg(target_arch = "x86_64")]
        "avx512" => {
            // SAFETY: an `Isa` of this name is made only where the processor has AVX-512.
            #[allow(unsafe_code)]
            unsafe {
                fused_avx512(repeats)
            };
            16
        }
        #[cfg(target_arch = "x86_64")]
        "avx2" => {
            // SAFETY: an `Isa` of this name is made only where the processor has AVX2 and FMA.
            #[allow(unsafe_code)]
            unsafe {
                fused_avx2(repeats)
            };
            8
        }
        #[cfg(target_arch = "aarch64")]
        "neon" => {
            // SAFETY: an `Isa` of this name is made only where the processor has NEON.
            #[allow(unsafe_code)]
            unsafe {
                fused_neon(repeats)
            };
            4
        }
        _ => {
            multiplied_and_added(repeats);
            4
        }
    };
    2 * lanes * VECTORS * repeats
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fused_avx512(repeats: usize) {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let (factor, term) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
    let mut sums = [term; VECTORS];
    for _ in 0..repeats {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, term);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fused_avx2(repeats: usize) {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let (factor, term) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
    let mut sums = [term; VECTORS];
    for _ in 0..repeats {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, term);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn fused_neon(repeats: usize) {
    use std::arch::aarch64::{vdupq_n_f32, vfmaq_f32};
    let (factor, term) = (vdupq_n_f32(black_box(0.5)), vdupq_n_f32(black_box(1.0)));
    let mut sums = [term; VECTORS];
    for _ in 0..repeats {
        for sum in &mut sums {
            *sum = vfmaq_f32(term, *sum, factor);
        }
    }
    black_box(sums);
}

/// What plain Rust may do: four numbers at a time by the compiler's own choice, nothing fused.
fn multiplied_and_added(repeats: usize) {
    let (factor, term) = (black_box(0.5f32), black_box(1.0f32));
    let mut sums = [[term; 4]; VECTORS];
    for _ in 0..repeats {
        for sum in &mut sums {
            for x in sum {
                *x = *x * factor + term;
            }
        }
    }
    black_box(sums);
}

/// What the arithmetic units do when nothing has to be fetched.
fn flops_peak(isa: Isa) -> f64 {
    let (count, repeats) = (rayon::current_num_threads(), 4_000_000);
    let seconds = best(&mut || {
        threads::each(count, true, |_| {
            black_box(fused(isa, repeats));
        });
    });
    (fused(isa, repeats) * count) as f64 / seconds
}

/// Bytes a second of sums over `len` numbers, read `rounds` times.
fn bytes_peak(len: usize, rounds: usize) -> f64 {
    let values = vec![1.0f32; len];
    let mut parts = vec![0.0f32; rayon::current_num_threads()];
    let part = values.len() / parts.len();
    let seconds = best(&mut || {
        threads::each_part(&mut parts, 1, true, |index, to| {
            for _ in 0..rounds {
                let mut sums = [0.0f32; 64];
                for chunk in black_box(&values[index * part..(index + 1) * part]).as_chunks::<64>().0 {
                    for (sum, x) in sums.iter_mut().zip(chunk) {
                        *sum += x;
                    }
                }
                to[0] = sums.iter().sum();
            }
        });
        black_box(&parts);
    });
    (4 * values.len() * rounds) as f64 / seconds
}

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let isa = Isa::best();
    let (flops_peak, memory_peak) = (flops_peak(isa), bytes_peak(64 << 20, 1));
    println!(
        "{}, {} threads; peaks: {:.1} GF/s, {:.1} GB/s from memory, {:.1} GB/s from the second cache",
        isa.name(),
        rayon::current_num_threads(),
        flops_peak / 1e9,
        memory_peak / 1e9,
        bytes_peak(rayon::current_num_threads() << 16, 256) / 1e9
    );
    println!("Percentages are of the arithmetic peak and of memory's: what stays in a cache may pass 100.\n");
    println!("| kernel | µs | GF/s | of peak | GB/s | of memory |\n|---|--:|--:|--:|--:|--:|");
    for case in cases::all().iter().filter(|case| case.name.contains(&wanted)) {
        let seconds = best(&mut (case.prepare)(isa));
        let rate = |amount: f64, peak: f64| match amount {
            0.0 => "– | –".to_owned(),
            _ => format!("{:.1} | {:.0} %", amount / seconds / 1e9, 100.0 * amount / seconds / peak),
        };
        let (flops, bytes) = (rate(case.flops, flops_peak), rate(case.bytes, memory_peak));
        println!("| {} | {:.1} | {flops} | {bytes} |", case.name, seconds * 1e6);
    }
}
