//! The importance-weighted policy loss of one token and its derivatives.

use super::spec::{ObjectiveSpec, Variant};

/// Bound on a token's log-ratio, and on a sequence's mean (GSPO, from above only).
pub(super) const LOG_RATIO_MAX: f64 = 20.0;
pub(super) const SEQUENCE_LOG_RATIO_MAX: f64 = 10.0;
/// Bound on the reference KL of a token.
const REFERENCE_KL_MAX: f64 = 10.0;

/// Loss of a token given its ratio and advantage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct TokenLoss {
    pub value: f64,
    /// Derivative by the ratio.
    pub by_ratio: f64,
    /// Derivative by the advantage.
    pub by_advantage: f64,
    /// The ratio's clip decided the loss.
    pub clipped: bool,
    /// The dual clip decided the loss.
    pub bounded: bool,
}

/// AIPO, or PPO's clipped loss with the dual clip (PPO: Schulman et al. 2017; dual clip: Ye et al. 2020).
pub(super) fn token_loss(spec: &ObjectiveSpec, ratio: f64, advantage: f64) -> TokenLoss {
    if let Some(rho) = spec.aipo_rho {
        let clipped = ratio > rho;
        let used = ratio.min(rho);
        return TokenLoss {
            value: -used * advantage,
            by_ratio: if clipped { 0.0 } else { -advantage },
            by_advantage: -used,
            clipped,
            bounded: false,
        };
    }
    let low = if spec.epsilon_low >= 0.0 { 1.0 - spec.epsilon_low } else { f64::NEG_INFINITY };
    let high = if spec.epsilon_high >= 0.0 { 1.0 + spec.epsilon_high } else { f64::INFINITY };
    let held = ratio.max(low).min(high);
    let (free_value, held_value) = (ratio * advantage, held * advantage);
    let inside = if held == ratio { 1.0 } else { 0.0 };
    let mut loss = if free_value < held_value {
        TokenLoss { value: -free_value, by_ratio: -advantage, by_advantage: -ratio, ..TokenLoss::default() }
    } else if free_value > held_value {
        TokenLoss {
            value: -held_value,
            by_ratio: -advantage * inside,
            by_advantage: -held,
            clipped: true,
            bounded: false,
        }
    } else {
        // At a tie PyTorch gives each side half the gradient.
        let by_ratio = -advantage * (1.0 + inside) / 2.0;
        TokenLoss { value: -held_value, by_ratio, by_advantage: -(ratio + held) / 2.0, ..TokenLoss::default() }
    };
    let limit = -spec.lower_bound_ratio * advantage;
    if spec.variant != Variant::Gspo && advantage < 0.0 && limit < loss.value {
        loss = TokenLoss {
            value: limit,
            by_ratio: 0.0,
            by_advantage: -spec.lower_bound_ratio,
            clipped: false,
            bounded: true,
        };
    }
    loss
}

/// exp of the bounded log-ratio and its derivative by the log-ratio.
pub(super) fn token_ratio(log_ratio: f64) -> (f64, f64) {
    let ratio = log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp();
    (ratio, if log_ratio.abs() <= LOG_RATIO_MAX { ratio } else { 0.0 })
}

/// Reference KL of a token (k3, Schulman's estimator), and its derivative by the current log-prob c. `unbiased`
/// weighs it by exp(c − old).
pub(super) fn reference_kl(c: f64, old: f64, reference: f64, unbiased: bool) -> (f64, f64) {
    let free = reference - c;
    let x = free.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX);
    let inside = if free.abs() <= LOG_RATIO_MAX { 1.0 } else { 0.0 };
    let mut value = x.exp() - x - 1.0;
    let mut slope = -(x.exp() - 1.0) * inside;
    if unbiased {
        let weight = (c - old).exp();
        slope = weight * (slope + value);
        value *= weight;
    }
    if value.abs() > REFERENCE_KL_MAX {
        (value.clamp(-REFERENCE_KL_MAX, REFERENCE_KL_MAX), 0.0)
    } else {
        (value, slope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_and_bounds() {
        let spec = ObjectiveSpec::default();
        let loss = |ratio, advantage| token_loss(&spec, ratio, advantage);
        assert_eq!(loss(1.0, 2.0).value, -2.0);
        assert!(loss(1.5, 1.0).clipped && loss(1.5, 1.0).by_ratio == 0.0);
        assert_eq!(loss(1.5, 1.0).value, -1.2);
        assert!(!loss(0.5, 1.0).clipped);
        assert_eq!(loss(1.5, -1.0).value, 1.5);
        assert_eq!(
            loss(7.0, -1.0),
            TokenLoss { value: 3.0, by_ratio: 0.0, by_advantage: -3.0, clipped: false, bounded: true }
        );
        let gspo = ObjectiveSpec { variant: Variant::Gspo, ..spec.clone() };
        assert_eq!(token_loss(&gspo, 7.0, -1.0).value, 7.0);
        let aipo = ObjectiveSpec { aipo_rho: Some(2.0), ..spec.clone() };
        assert_eq!(
            token_loss(&aipo, 7.0, -1.0),
            TokenLoss { value: 2.0, by_ratio: 0.0, by_advantage: -2.0, clipped: true, bounded: false }
        );
        let free = ObjectiveSpec { epsilon_low: -1.0, epsilon_high: -1.0, ..spec };
        assert_eq!(token_loss(&free, 1.5, 1.0).value, -1.5);
    }

    #[test]
    fn reference_kl_is_zero_at_the_reference_and_slopes_match() {
        assert_eq!(reference_kl(-1.0, -1.0, -1.0, false), (0.0, 0.0));
        for unbiased in [false, true] {
            for (c, old, reference) in [(-1.0, -0.8, -2.0), (-3.0, -2.0, -1.0), (-0.1, -0.4, -0.2), (-9.0, -9.0, -1.0)]
            {
                let at = |c: f64| reference_kl(c, old, reference, unbiased).0;
                let slope = (at(c + 1e-6) - at(c - 1e-6)) / 2e-6;
                assert!((slope - reference_kl(c, old, reference, unbiased).1).abs() < 1e-6);
            }
        }
    }
}
