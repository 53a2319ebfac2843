//! One row of logits: stable log-softmax, entropy and the gradient of anything that depends on log-probs.
//!
//! Whole rows go through [`cosmos_kernels::vocabulary`]; the exponential here serves single numbers.

use cosmos_kernels::Isa;
use cosmos_kernels::vocabulary::{self, Distribution, Sums};

/// Below this, `exp` is treated as zero (the smallest normal f32 is `exp(-87.3)`).
const EXP_MIN: f32 = -87.0;

/// `exp(x)` for `x <= 0`, zero below -87, relative error below 2e-7. NaN gives zero: callers look for NaN before.
#[inline(always)]
pub(crate) fn exp_nonpositive(x: f32) -> f32 {
    // exp(x) = 2^n · exp(r), |r| <= ln 2 / 2; adding 1.5·2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > EXP_MIN { x } else { EXP_MIN };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    // Taylor up to r^7: the remainder is below 1e-8 on this interval.
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let power = f32::from_bits(exponent.wrapping_add(127) << 23);
    if x > EXP_MIN { p * power } else { 0.0 }
}

/// What the log-softmax of one row needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowStats {
    /// Largest logit.
    pub max: f32,
    /// Index of the first largest logit.
    pub argmax: u32,
    /// Σ exp(z − max).
    pub sum: f64,
    /// Entropy in nats.
    pub entropy: f64,
}

impl RowStats {
    /// Statistics of the row, or `None` when it holds NaN or +∞, or nothing above −∞.
    pub fn of(z_v: &[f32]) -> Option<Self> {
        vocabulary::sums(Isa::best(), z_v).map(Self::from_sums)
    }

    /// From the sums of the whole row.
    pub fn from_sums(sums: Sums) -> Self {
        let entropy = (sums.sum.ln() - sums.weighted / sums.sum).max(0.0);
        Self { max: sums.max, argmax: sums.argmax as u32, sum: sums.sum, entropy }
    }

    /// As the kernels take it.
    pub fn distribution(&self) -> Distribution {
        Distribution { max: self.max, inverse: (1.0 / self.sum) as f32, log_sum: self.sum.ln() as f32 }
    }

    /// Log-prob of a token with logit `z`.
    pub fn log_prob(&self, z: f32) -> f64 {
        // The difference first: it is exact where it matters.
        (f64::from(z) - f64::from(self.max)) - self.sum.ln()
    }
}

/// Divides by the temperature as the original does: only when it is above 1e-6 and not 1.
pub(crate) fn apply_temperature(z_v: &mut [f32], temperature: f32) {
    if divides(temperature) {
        for z in z_v {
            *z /= temperature;
        }
    }
}

/// Whether a temperature has an effect.
pub(crate) fn divides(temperature: f32) -> bool {
    temperature > 1e-6 && temperature != 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_exact_one() {
        let mut x = 0.0f32;
        while x > -86.9 {
            let exact = f64::from(x).exp();
            assert!((f64::from(exp_nonpositive(x)) / exact - 1.0).abs() < 2.5e-7, "exp({x})");
            x -= 0.003_7;
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn statistics_agree_with_double_precision() {
        let z_v: Vec<f32> = (0..1037).map(|i| ((i * 7919) % 613) as f32 * 0.02 - 3.0).collect();
        let row = RowStats::of(&z_v).unwrap();
        let sum: f64 = z_v.iter().map(|&z| f64::from(z).exp()).sum();
        assert!((row.log_prob(0.0) + sum.ln()).abs() < 1e-6);
        let entropy: f64 = z_v.iter().map(|&z| f64::from(z) - sum.ln()).map(|l| -l * l.exp()).sum();
        assert!((row.entropy - entropy).abs() < 1e-5, "{} {entropy}", row.entropy);
    }

    #[test]
    fn bad_rows_are_found() {
        let mut z_v = vec![0.5f32; 40];
        assert!(RowStats::of(&z_v).is_some());
        z_v[3] = f32::NEG_INFINITY;
        assert!(RowStats::of(&z_v).unwrap().entropy.is_finite());
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 17, 39] {
                let mut bad_v = z_v.clone();
                bad_v[at] = bad;
                assert!(RowStats::of(&bad_v).is_none(), "{bad} at {at}");
            }
        }
        assert!(RowStats::of(&[f32::NEG_INFINITY; 5]).is_none());
        assert!(RowStats::of(&[]).is_none());
    }
}
