//! Mean, deviation, extremes and percentiles of a step's numbers.
//!
//! Values that are not finite are left out of the numbers and counted, so that one bad token does not blank a metric.

/// Mean, population standard deviation (divisor n, as NumPy's `std`), largest and smallest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanStdMaxMin {
    /// How many finite values there were; 0 makes the other numbers NaN.
    pub count: usize,
    /// How many values were NaN or infinite.
    pub not_finite: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Population standard deviation.
    pub std: f64,
    /// Largest value.
    pub max: f64,
    /// Smallest value.
    pub min: f64,
}

/// The [`MeanStdMaxMin`] of `values`, in two passes, so that large offsets do not eat the deviation.
pub fn mean_std_max_min(values: impl IntoIterator<Item = f64>) -> MeanStdMaxMin {
    let (finite, not_finite) = finite(values);
    let n = finite.len() as f64;
    if finite.is_empty() {
        return MeanStdMaxMin { count: 0, not_finite, mean: f64::NAN, std: f64::NAN, max: f64::NAN, min: f64::NAN };
    }
    // Each divided first, so that the sum of large values stays finite.
    let mean: f64 = finite.iter().map(|v| v / n).sum();
    let variance: f64 = finite.iter().map(|v| (v - mean) * (v - mean) / n).sum();
    MeanStdMaxMin {
        count: finite.len(),
        not_finite,
        mean,
        std: variance.sqrt(),
        max: finite.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        min: finite.iter().copied().fold(f64::INFINITY, f64::min),
    }
}

impl MeanStdMaxMin {
    /// The four numbers under the names that the original gives them: `{name}_mean`, `_std`, `_max`, `_min`.
    pub fn named(&self, name: &str) -> [(String, f64); 4] {
        [("mean", self.mean), ("std", self.std), ("max", self.max), ("min", self.min)]
            .map(|(suffix, value)| (format!("{name}_{suffix}"), value))
    }
}

/// Sorted values that percentiles are read from, with linear interpolation between neighbours, as NumPy's default.
#[derive(Debug, Clone, PartialEq)]
pub struct Percentiles {
    sorted: Vec<f64>,
}

impl Percentiles {
    /// Sorts the finite values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Percentiles {
        let (mut sorted, _) = finite(values);
        sorted.sort_by(f64::total_cmp);
        Percentiles { sorted }
    }

    /// The value below which `percent` (0 to 100, clamped) of the values lie; NaN when there are none.
    pub fn at(&self, percent: f64) -> f64 {
        let Some(last) = self.sorted.len().checked_sub(1) else { return f64::NAN };
        let place = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
        if place.is_nan() {
            return f64::NAN;
        }
        let below = place.floor() as usize;
        let (low, high) = (self.sorted[below], self.sorted[(below + 1).min(last)]);
        low + (high - low) * (place - below as f64)
    }

    /// Several percentiles under the names `{name}_p{percent}`.
    pub fn named(&self, name: &str, percents: &[u8]) -> Vec<(String, f64)> {
        percents.iter().map(|&percent| (format!("{name}_p{percent}"), self.at(percent.into()))).collect()
    }
}

fn finite(values: impl IntoIterator<Item = f64>) -> (Vec<f64>, usize) {
    let mut not_finite = 0;
    let kept = values
        .into_iter()
        .filter(|value| {
            not_finite += usize::from(!value.is_finite());
            value.is_finite()
        })
        .collect();
    (kept, not_finite)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_numbers_of_numpy() {
        let s = mean_std_max_min([1.0, 2.0, f64::NAN, 4.0, 9.0]);
        assert_eq!((s.count, s.not_finite, s.mean, s.max, s.min), (4, 1, 4.0, 9.0, 1.0));
        assert!((s.std - 3.082207001484488).abs() < 1e-15);
        let p = Percentiles::of([9.0, 1.0, 4.0, 2.0, f64::INFINITY]);
        for (percent, value) in [(0.0, 1.0), (25.0, 1.75), (50.0, 3.0), (90.0, 7.5), (100.0, 9.0), (120.0, 9.0)] {
            assert!((p.at(percent) - value).abs() < 1e-14, "{percent}: {}", p.at(percent));
        }
        assert_eq!(p.named("kl", &[50])[0], ("kl_p50".to_owned(), 3.0));
        assert_eq!(s.named("rollout/completion_length")[2], ("rollout/completion_length_max".to_owned(), 9.0));
    }

    #[test]
    fn nothing_gives_nan() {
        assert!(mean_std_max_min([]).mean.is_nan());
        assert!(Percentiles::of([f64::NAN]).at(50.0).is_nan());
    }

    proptest! {
        #[test]
        fn percentiles_rise_between_the_extremes(values in proptest::collection::vec(-1e9..1e9_f64, 1..50), a in 0.0..100.0_f64, b in 0.0..100.0_f64) {
            let p = Percentiles::of(values.iter().copied());
            let s = mean_std_max_min(values);
            prop_assert!(p.at(a.min(b)) <= p.at(a.max(b)));
            prop_assert_eq!((p.at(0.0), p.at(100.0)), (s.min, s.max));
            prop_assert!(s.min - 1e-3 <= s.mean && s.mean <= s.max + 1e-3 && s.std >= 0.0);
        }
    }
}
