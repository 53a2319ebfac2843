//! Learning-rate factor of every step, as the original's scheduler gives it.

use crate::{EngineError, Result};

/// Length of the warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps, from 0 to 1, rounded down.
    Ratio(f64),
}

/// Shape of the decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecayType {
    /// Straight to the minimum.
    Linear,
    /// 1 − √progress.
    Sqrt,
    /// Half a cosine.
    Cosine,
    /// The factor stays at 1.
    #[default]
    None,
}

/// Warm-up, a stable stretch, decay. The decay of the last step ends exactly at the minimum.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Number of optimizer steps of the run.
    pub total_steps: u64,
    /// `optm_warmup_steps`.
    pub warmup: Warmup,
    /// `optm_decay_ratio`: share of steps that decay; `None` means all after the warm-up.
    pub decay_ratio: Option<f64>,
    /// `optm_decay_type`.
    pub decay_type: DecayType,
    /// `optm_min_lr_factor`.
    pub min_lr_factor: f64,
    /// `optm_warmup_start_factor`: the factor of step 0 when there is a warm-up of more than one step.
    pub warmup_start_factor: f64,
}

impl Schedule {
    /// Checks that the numbers make sense.
    pub fn check(&self) -> Result<()> {
        let share = |name: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                return Ok(());
            }
            Err(EngineError::invalid(format!("`{name}` is {value}"), "use a number from 0 to 1"))
        };
        if let Warmup::Ratio(ratio) = self.warmup {
            share("optm_warmup_steps", ratio)?;
        }
        share("optm_decay_ratio", self.decay_ratio.unwrap_or(0.0))?;
        share("optm_min_lr_factor", self.min_lr_factor)?;
        share("optm_warmup_start_factor", self.warmup_start_factor)
    }

    /// Factor on the learning rate of `step`, counted from 0. Steps past the end keep the last value.
    pub fn factor(&self, step: u64) -> f64 {
        let total = self.total_steps;
        let warmup = match self.warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (ratio * total as f64) as u64,
        }
        .min(total);
        if step < warmup {
            let progress = if warmup == 1 { 1.0 } else { step as f64 / (warmup - 1) as f64 };
            return self.warmup_start_factor + (1.0 - self.warmup_start_factor) * progress;
        }
        let decay = match self.decay_ratio {
            // Python's `round`: halves go to the even neighbour.
            Some(ratio) => ((total as f64 * ratio).round_ties_even() as u64).min(total - warmup),
            None => total - warmup,
        };
        let stable_end = total + 1 - decay;
        if step < stable_end || decay == 0 {
            return 1.0;
        }
        let progress = ((step + 1 - stable_end) as f64 / decay as f64).min(1.0);
        let shape = match self.decay_type {
            DecayType::Linear => 1.0 - progress,
            DecayType::Sqrt => 1.0 - progress.sqrt(),
            DecayType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            DecayType::None => 1.0,
        };
        self.min_lr_factor + (1.0 - self.min_lr_factor) * shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(total_steps: u64, warmup: Warmup, decay_ratio: Option<f64>) -> Schedule {
        Schedule {
            total_steps,
            warmup,
            decay_ratio,
            decay_type: DecayType::Linear,
            min_lr_factor: 0.25,
            warmup_start_factor: 0.0,
        }
    }

    #[test]
    fn ends_at_the_minimum_and_stays_there() {
        let s = schedule(10, Warmup::Steps(2), None);
        assert_eq!([s.factor(0), s.factor(1), s.factor(2)], [0.0, 1.0, 1.0]);
        assert_eq!(s.factor(10), 0.25);
        assert_eq!(s.factor(1000), 0.25);
    }

    #[test]
    fn odd_sizes_never_divide_by_zero() {
        for total in 0..5 {
            for warmup in [Warmup::Steps(0), Warmup::Steps(1), Warmup::Steps(9), Warmup::Ratio(1.0), Warmup::Ratio(0.5)]
            {
                for decay in [None, Some(0.0), Some(0.5), Some(1.0)] {
                    for step in 0..8 {
                        let factor = schedule(total, warmup, decay).factor(step);
                        assert!((0.0..=1.0).contains(&factor), "{total} {warmup:?} {decay:?} {step}: {factor}");
                    }
                }
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(schedule(10, Warmup::Ratio(1.5), None).check().is_err());
        assert!(schedule(10, Warmup::Steps(2), Some(-0.1)).check().is_err());
        assert!(schedule(10, Warmup::Steps(2), Some(0.1)).check().is_ok());
    }
}
