//! Weights: reading Hugging Face checkpoints, fresh weights, and export to a folder that transformers loads.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::model::{ModelConfig, ParamSpec};

mod export;
mod read;
pub use export::{Dtype, ExportOptions, export};
pub use read::{Checkpoint, read};

/// Fresh weights in the order of [`ModelConfig::params`]: normal with std `initializer_range`, norms 1, biases 0. Each
/// parameter has its own random stream, so that it does not depend on the others' sizes.
pub fn random(config: &ModelConfig, seed: u64) -> Vec<Vec<f32>> {
    config.params().iter().enumerate().map(|(index, spec)| random_param(config, index, spec, seed)).collect()
}

/// Fresh values of parameter `index` as [`random`] makes them.
pub(crate) fn random_param(config: &ModelConfig, index: usize, spec: &ParamSpec, seed: u64) -> Vec<f32> {
    if spec.name.ends_with("norm.weight") {
        return vec![1.0; spec.len()];
    }
    if spec.name.ends_with(".bias") {
        return vec![0.0; spec.len()];
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    normal(&mut rng, spec.len(), config.initializer_range)
}

/// `len` normal numbers of standard deviation `std`, two at a time (Box and Muller 1958).
fn normal(rng: &mut ChaCha8Rng, len: usize, std: f64) -> Vec<f32> {
    // In (0, 1], so that the logarithm is finite.
    let mut uniform = || (rng.next_u32() as f64 + 1.0) / (u32::MAX as f64 + 1.0);
    let mut values = Vec::with_capacity(len + 1);
    while values.len() < len {
        let radius = std * (-2.0 * uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(len);
    values
}

#[cfg(test)]
mod tests;
