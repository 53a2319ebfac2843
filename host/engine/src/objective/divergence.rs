//! The generalised Jensen–Shannon divergence of a student c and a teacher t, both log-probs, and its derivative.
//!
//! β = 0: Σ eᵗ(t − c); β = 1: Σ eᶜ(c − t); between: β·Σ eᵗ(t − m) + (1 − β)·Σ eᶜ(c − m), m = ln((1 − β)eᶜ + βeᵗ)
//! (Agarwal et al. 2024, "On-Policy Distillation of Language Models", with the mixture as TRL writes it).

use cosmos_kernels::{Isa, vocabulary};

use super::spec::Mass;
use crate::score::softmax::RowStats;

/// A tail lighter than this counts as this much: log-probs in f32 cannot tell lighter ones apart.
const TAIL_MIN: f64 = 1e-8;

/// A divergence at one position.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Divergence {
    /// In nats.
    pub value: f64,
    /// Whether any log-ratio met the bound.
    pub clipped: bool,
    /// Probability that the student gives the candidates.
    pub student_mass: f64,
    /// Probability that the teacher gives the candidates.
    pub teacher_mass: f64,
    /// Sum of the derivatives by the student's log-probs (whole vocabulary only).
    pub gradient_sum: f64,
}

/// A bounded number and 1 where the bound leaves its derivative, else 0.
fn bound(x: f64, clip: Option<f64>, clipped: &mut bool) -> (f64, f64) {
    match clip {
        Some(limit) if x.abs() > limit => {
            *clipped = true;
            (x.clamp(-limit, limit), 0.0)
        }
        _ => (x, 1.0),
    }
}

/// One summand: its value and its derivative by c.
fn term(c: f64, t: f64, beta: f64, clip: Option<f64>, clipped: &mut bool) -> (f64, f64) {
    if beta == 0.0 {
        let q = t.exp();
        if q == 0.0 {
            return (0.0, 0.0);
        }
        let (ratio, inside) = bound(t - c, clip, clipped);
        (q * ratio, -q * inside)
    } else if beta == 1.0 {
        let p = c.exp();
        if p == 0.0 {
            return (0.0, 0.0);
        }
        let (ratio, inside) = bound(c - t, clip, clipped);
        (p * ratio, p * (ratio + inside))
    } else {
        let (p, q) = ((1.0 - beta) * c.exp(), beta * t.exp());
        let mixture = p + q;
        if mixture == 0.0 {
            return (0.0, 0.0);
        }
        let m = mixture.ln();
        let (teacher, inside_t) = if q == 0.0 { (0.0, 0.0) } else { bound(t - m, clip, clipped) };
        let (student, inside_c) = if p == 0.0 { (0.0, 0.0) } else { bound(c - m, clip, clipped) };
        let dm = p / mixture;
        (q * teacher + p * student, -q * inside_t * dm + p * (student + inside_c * (1.0 - dm)))
    }
}

/// The divergence over candidates; `gradient_k` becomes its derivative by each of the student's log-probs (cleared
/// first). Log-probs are those of the whole vocabulary.
pub(super) fn over_candidates(
    c_k: &[f64],
    t_k: &[f64],
    beta: f64,
    mass: Mass,
    clip: Option<f64>,
    gradient_k: &mut Vec<f64>,
) -> Divergence {
    gradient_k.clear();
    let mut d = Divergence {
        student_mass: c_k.iter().map(|c| c.exp()).sum(),
        teacher_mass: t_k.iter().map(|t| t.exp()).sum(),
        ..Divergence::default()
    };
    let (student_shift, teacher_shift) = match mass {
        Mass::Renormalize if !c_k.is_empty() => {
            (d.student_mass.max(f64::MIN_POSITIVE).ln(), d.teacher_mass.max(f64::MIN_POSITIVE).ln())
        }
        _ => (0.0, 0.0),
    };
    for (c, t) in c_k.iter().zip(t_k) {
        let (value, slope) = term(c - student_shift, t - teacher_shift, beta, clip, &mut d.clipped);
        d.value += value;
        gradient_k.push(slope);
    }
    match mass {
        Mass::Raw => {}
        Mass::Renormalize => {
            let sum: f64 = gradient_k.iter().sum();
            for (g, c) in gradient_k.iter_mut().zip(c_k) {
                *g -= (c - student_shift).exp() * sum;
            }
        }
        Mass::Tail => {
            let rest = 1.0 - d.student_mass;
            let (tail, inside) = if rest > TAIL_MIN { (rest, 1.0) } else { (TAIL_MIN, 0.0) };
            let teacher_tail = (1.0 - d.teacher_mass).max(TAIL_MIN);
            let (value, slope) = term(tail.ln(), teacher_tail.ln(), beta, clip, &mut d.clipped);
            d.value += value;
            for (g, c) in gradient_k.iter_mut().zip(c_k) {
                *g -= slope * inside * c.exp() / tail;
            }
        }
    }
    d
}

/// The divergence over the whole vocabulary. `teacher_v` holds the teacher's logits and becomes the derivative by the
/// student's log-probs, up to a constant times the student's probabilities, which no gradient of logits can see.
pub(super) fn over_vocabulary(
    student_v: &[f32],
    student: &RowStats,
    teacher_v: &mut [f32],
    teacher: &RowStats,
    beta: f64,
    clip: Option<f64>,
) -> Divergence {
    let limit = clip.map_or(f32::INFINITY, |clip| clip as f32);
    let (own, other) = (student.distribution(), teacher.distribution());
    let found = vocabulary::divergence(Isa::best(), student_v, own, teacher_v, other, beta as f32, limit);
    Divergence {
        value: found.value,
        clipped: found.clipped,
        student_mass: 1.0,
        teacher_mass: 1.0,
        gradient_sum: found.slopes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log_softmax(z_v: &[f32]) -> Vec<f64> {
        let stats = RowStats::of(z_v).unwrap();
        z_v.iter().map(|&z| stats.log_prob(z)).collect()
    }

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-6.0f32..6.0, 12)
    }

    proptest! {
        #[test]
        fn tail_divergence_is_never_negative_and_zero_only_when_equal(a in logits(), b in logits(), k in 0usize..12, beta in prop::sample::select(vec![0.0, 0.2, 0.5, 1.0])) {
            let (c, t) = (log_softmax(&a), log_softmax(&b));
            let mut gradient = Vec::new();
            let d = over_candidates(&c[..k], &t[..k], beta, Mass::Tail, None, &mut gradient);
            prop_assert!(d.value >= -1e-7, "{}", d.value);
            let gap: f64 = c[..k].iter().zip(&t[..k]).map(|(c, t)| (c.exp() - t.exp()).abs()).sum();
            prop_assert!(gap < 1e-2 || d.value > 1e-8, "{} at distance {gap}", d.value);
            let same = over_candidates(&c[..k], &c[..k], beta, Mass::Tail, None, &mut gradient);
            prop_assert!(same.value.abs() < 1e-12);
        }

        #[test]
        fn derivatives_by_log_probs_match_differences(a in logits(), b in logits(), beta in prop::sample::select(vec![0.0, 0.3, 1.0]), clip in prop::option::of(0.5f64..4.0)) {
            for mass in [Mass::Raw, Mass::Tail, Mass::Renormalize] {
                let (c, t) = (log_softmax(&a), log_softmax(&b));
                let (c, t) = (&c[..6], &t[..6]);
                let mut gradient = Vec::new();
                over_candidates(c, t, beta, mass, clip, &mut gradient);
                for i in 0..c.len() {
                    let mut ignored = Vec::new();
                    let mut at = |step: f64| {
                        let mut moved = c.to_vec();
                        moved[i] += step;
                        over_candidates(&moved, t, beta, mass, clip, &mut ignored).value
                    };
                    let (up, down, here) = (at(1e-6) - at(0.0), at(0.0) - at(-1e-6), at(0.0));
                    // At a kink of the bound the two sides differ and no derivative is right.
                    if (up - down).abs() < 1e-9 {
                        prop_assert!(((up + down) / 2e-6 - gradient[i]).abs() < 1e-4 * (1.0 + gradient[i].abs() + here.abs()), "{mass:?} {beta}");
                    }
                }
            }
        }

        #[test]
        fn whole_vocabulary_equals_all_candidates(a in logits(), b in logits(), beta in prop::sample::select(vec![0.0, 0.3, 1.0]), clip in prop::option::of(0.5f64..4.0)) {
            let (c, t) = (log_softmax(&a), log_softmax(&b));
            let mut gradient = Vec::new();
            let sparse = over_candidates(&c, &t, beta, Mass::Raw, clip, &mut gradient);
            let (student, teacher) = (RowStats::of(&a).unwrap(), RowStats::of(&b).unwrap());
            let mut slots = b.clone();
            let dense = over_vocabulary(&a, &student, &mut slots, &teacher, beta, clip);
            prop_assert!((dense.value - sparse.value).abs() < 1e-5 * (1.0 + sparse.value.abs()));
            let sum: f64 = gradient.iter().sum();
            for i in 0..a.len() {
                let p = c[i].exp();
                let (x, y) = (gradient[i] - p * sum, f64::from(slots[i]) - p * dense.gradient_sum);
                // A ratio at the bound may fall on either side of it in f32.
                prop_assert!((x - y).abs() < 1e-5 || clip.is_some(), "{x} {y}");
            }
        }
    }
}
