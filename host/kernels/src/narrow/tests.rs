use super::*;
use crate::gemm::{Left, Packed, Right, Shape, gemm};
use crate::reference::{numbers, product};

const SHAPES: [(usize, usize); 7] = [(1, 1), (5, 3), (33, 17), (64, 256), (97, 300), (130, 513), (257, 128)];

/// What `matrix` holds, `[n, k]`.
fn widened(matrix: &Narrow) -> Vec<f32> {
    let mut all = vec![0.0; matrix.n() * matrix.k()];
    all.chunks_exact_mut(matrix.k()).enumerate().for_each(|(output, row)| matrix.row(output, row));
    all
}

/// The transpose of `[n, k]`.
fn turned(weights: &[f32], n: usize, k: usize) -> Vec<f32> {
    (0..n * k).map(|i| weights[i % n * k + i / n]).collect()
}

/// Largest |w| of the group of each weight, over 127.
fn scales(weights: &[f32], k: usize) -> Vec<f32> {
    let of_row = |row: &[f32]| -> Vec<f32> {
        let largest = |group: &[f32]| group.iter().fold(0.0f32, |most, w| most.max(w.abs())) / 127.0;
        row.chunks(GROUP).flat_map(|group| std::iter::repeat_n(largest(group), group.len())).collect()
    };
    weights.chunks(k).flat_map(of_row).collect()
}

#[test]
fn bf16_multiplies_as_the_widened_matrix_does_bit_for_bit() {
    for isa in Isa::available() {
        for (n, k) in SHAPES {
            let weights = numbers(n * k, 1);
            let narrow = Narrow::transposed(isa, Format::Bf16, &weights, n, k);
            let wide = widened(&narrow);
            let rounded: Vec<f32> = weights.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
            assert_eq!(wide, rounded, "{isa:?} {n}×{k}");
            let packed = Packed::transposed(isa, &wide, n, k);
            for m in [1, 2, 3, 4, 7, 12, 13, 25, 121, 131] {
                let x = numbers(m * k, 2);
                for add in [false, true] {
                    let start = if add { numbers(m * n, 3) } else { vec![7.0; m * n] };
                    let (mut found, mut expected) = (start.clone(), start);
                    narrow.product(isa, m, &x, &mut found, add);
                    let shape = Shape { m, n, k };
                    gemm(isa, shape, Left::Rows(&x, k), Right::Packed(&packed), &mut expected, n, add);
                    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&found), bits(&expected), "{isa:?} {shape:?} {add}");
                }
            }
        }
    }
}

#[test]
fn int8_keeps_within_half_a_scale_of_each_weight_and_its_products_within_the_bound() {
    for isa in Isa::available() {
        for (n, k) in SHAPES {
            // Sizes from 1 to 1/1000 beside each other, as real weights have them.
            let weights: Vec<f32> = numbers(n * k, 4).iter().map(|w| w * w * w).collect();
            let scales = scales(&weights, k);
            let narrow = Narrow::transposed(isa, Format::Int8, &weights, n, k);
            let wide = widened(&narrow);
            for ((w, found), scale) in weights.iter().zip(&wide).zip(&scales) {
                let error = f64::from(*w) - f64::from(*found);
                assert!(error.abs() <= f64::from(*scale) * 0.500_01, "{isa:?}: {w} became {found}, scale {scale}");
            }
            for m in [1, 3, 4, 12, 13, 121] {
                let x = numbers(m * k, 5);
                let mut found = numbers(m * n, 6);
                let shape = Shape { m, n, k };
                let start = found.clone();
                let exact = product(&x, &turned(&weights, n, k), shape);
                let of_wide = product(&x, &turned(&wide, n, k), shape);
                narrow.product(isa, m, &x, &mut found, true);
                for index in 0..m * n {
                    let (x, scales) = (&x[index / n * k..][..k], &scales[index % n * k..][..k]);
                    let bound: f64 =
                        x.iter().zip(scales).map(|(x, s)| f64::from(s / 2.0) * f64::from(x.abs())).sum::<f64>();
                    let value = f64::from(found[index]) - f64::from(start[index]);
                    // What f32 sums lose, beside what the bytes have lost.
                    let sums = 1e-6 * (k as f64).sqrt() * 4.0 + 1e-6;
                    assert!((value - of_wide[index]).abs() <= sums, "{isa:?} {shape:?}: {value} {}", of_wide[index]);
                    assert!((value - exact[index]).abs() <= bound * 1.0001 + sums, "{isa:?} {shape:?} at {index}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let (n, k, rows) = (203, 530, 150);
    let (x, w) = (numbers(rows * k, 4), numbers(n * k, 5));
    for isa in Isa::available() {
        for format in [Format::Bf16, Format::Int8] {
            let narrow = Narrow::transposed(isa, format, &w, n, k);
            let run = |rows: Range<usize>| {
                let mut out = vec![0.0; rows.len() * n];
                narrow.product(isa, rows.len(), &x[rows.start * k..rows.end * k], &mut out, false);
                out
            };
            let together = run(0..rows);
            for count in 1..=14 {
                assert_eq!(run(3..3 + count), together[3 * n..(3 + count) * n], "{isa:?} {format:?}, {count} rows");
            }
            assert_eq!(threads::serial(|| run(0..rows)), together);
        }
    }
}

#[test]
fn every_instruction_set_rounds_alike() {
    let (n, k) = (75, 333);
    let weights = numbers(n * k, 9);
    for format in [Format::Bf16, Format::Int8] {
        let of = |isa: Isa| widened(&Narrow::transposed(isa, format, &weights, n, k));
        let first = of(Isa::best());
        assert!(Isa::available().into_iter().all(|isa| of(isa) == first));
    }
}

#[test]
fn a_part_of_the_outputs_is_replaced_and_the_others_keep_their_bits() {
    let (n, k) = (150, 200);
    let (before, after) = (numbers(n * k, 1), numbers(n * k, 2));
    for isa in Isa::available() {
        for format in [Format::Bf16, Format::Int8] {
            for outputs in [0..n, 0..1, 3..70, 31..33, 64..96, 149..150, 150..150] {
                let mut changed = Narrow::transposed(isa, format, &before, n, k);
                changed.set(isa, outputs.start, &after[outputs.start * k..outputs.end * k]);
                let mut mixed = before.clone();
                mixed[outputs.start * k..outputs.end * k].copy_from_slice(&after[outputs.start * k..outputs.end * k]);
                let fresh = Narrow::transposed(isa, format, &mixed, n, k);
                assert_eq!(widened(&changed), widened(&fresh), "{isa:?} {format:?} {outputs:?}");
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_what_is_not_finite_is_seen() {
    for isa in Isa::available() {
        let (n, k) = (40, 260);
        let mut weights = vec![0.0; n * k];
        weights[3 * k + 5] = 1e-35;
        weights[4 * k..5 * k].fill(-0.0);
        let narrow = Narrow::transposed(isa, Format::Int8, &weights, n, k);
        assert!(widened(&narrow).iter().all(|w| *w == 0.0));
        for format in [Format::Bf16, Format::Int8] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut broken = numbers(n * k, 7);
                broken[7 * k + 140] = bad;
                let mut out = vec![0.0; n];
                Narrow::transposed(isa, format, &broken, n, k).product(isa, 1, &numbers(k, 8), &mut out, false);
                let seen = out.iter().map(|y| !y.is_finite());
                assert!(seen.eq((0..n).map(|output| output == 7)), "{isa:?} {format:?} {bad}: {out:?}");
            }
        }
    }
}

#[test]
fn half_the_bytes_and_a_quarter() {
    let (isa, n, k) = (Isa::best(), 1024, 896);
    let whole = 4 * n * k;
    assert_eq!(Narrow::zeros(isa, Format::Bf16, n, k).bytes(), whole / 2);
    assert_eq!(Narrow::zeros(isa, Format::Int8, n, k).bytes(), whole / 4 + whole / GROUP);
}
