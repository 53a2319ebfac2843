//! Rotary tables.

use std::sync::RwLock;

use crate::model::{ModelConfig, RopeScaling};

/// Cosines and sines of every position seen so far.
pub(crate) struct Rope {
    frequencies: Vec<f32>,
    /// `[position][frequency]`, cosine and sine.
    table: RwLock<Vec<(f32, f32)>>,
}

impl Rope {
    pub fn new(config: &ModelConfig) -> Self {
        Self { frequencies: frequencies(config), table: RwLock::new(Vec::new()) }
    }

    /// Cosines and sines at `positions`: `[positions, head_dim]` each, both halves of a head alike.
    pub fn tables(&self, positions: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let half = self.frequencies.len();
        let needed = positions.iter().max().map_or(0, |p| p + 1);
        self.grow(needed);
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * 2 * half), Vec::with_capacity(positions.len() * 2 * half));
        // A poisoned lock still holds whole entries: they are only ever appended.
        let table = self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        for position in positions {
            let row = &table[position * half..(position + 1) * half];
            for _ in 0..2 {
                cos.extend(row.iter().map(|(c, _)| c));
                sin.extend(row.iter().map(|(_, s)| s));
            }
        }
        (cos, sin)
    }

    fn grow(&self, positions: usize) {
        let half = self.frequencies.len();
        if self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner).len() >= positions * half {
            return;
        }
        let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        for position in table.len() / half..positions.next_power_of_two() {
            // In f32 throughout, as transformers computes it.
            table.extend(self.frequencies.iter().map(|f| (position as f32 * f).sin_cos()).map(|(sin, cos)| (cos, sin)));
        }
    }
}

/// The matrix that takes `(x₁, x₂)` to `(−x₂, x₁)` when multiplied from the right, `[dim, dim]`. A product with it costs
/// less than cutting and joining halves, and so does its gradient.
pub(crate) fn half_turn(dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let mut matrix = vec![0.0; dim * dim];
    for i in 0..half {
        matrix[(half + i) * dim + i] = -1.0;
        matrix[i * dim + half + i] = 1.0;
    }
    matrix
}

/// One frequency for each pair of a head's numbers: `θ^(−2i/d)`, stretched as the config says.
fn frequencies(config: &ModelConfig) -> Vec<f32> {
    let dim = config.head_dim;
    (0..dim / 2)
        .map(|i| {
            let frequency = 1.0 / config.rope_theta.powf(2.0 * i as f64 / dim as f64);
            match config.rope_scaling {
                None => frequency,
                Some(RopeScaling::Linear { factor }) => frequency / factor,
                Some(RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings,
                }) => {
                    let wavelengths = original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                    // 0 at wavelengths that are stretched fully, 1 at those that are kept.
                    let kept = ((wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    frequency * (kept + (1.0 - kept) / factor)
                }
            }
        })
        .map(|f| f as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(rope: &str) -> ModelConfig {
        let text = format!(
            r#"{{"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 8192, "rope_parameters": {rope}}}"#
        );
        ModelConfig::from_json(&text, Path::new("config.json")).unwrap()
    }

    #[test]
    fn llama3_keeps_short_and_stretches_long_wavelengths() {
        let plain = frequencies(&config(r#"{"rope_theta": 500000.0}"#));
        let scaled = frequencies(&config(
            r#"{"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048}"#,
        ));
        // 1, 0.0376, 0.00141, 5.3e-5: wavelengths 6, 167, 4443 and 118,000 of a context of 2048.
        assert_eq!(scaled[..2], plain[..2]);
        assert_eq!(scaled[2..], [plain[2] / 8.0, plain[3] / 8.0]);
    }

    #[test]
    fn half_turn_turns() {
        let matrix = half_turn(4);
        let x = [1.0, 2.0, 3.0, 4.0];
        let y: Vec<f32> = (0..4).map(|j| (0..4).map(|i| x[i] * matrix[i * 4 + j]).sum()).collect();
        assert_eq!(y, [-3.0, -4.0, 1.0, 2.0]);
    }

    #[test]
    fn tables_repeat_the_halves() {
        let rope = Rope::new(&config(r#"{"rope_theta": 10000.0}"#));
        let (cos, sin) = rope.tables(&[3, 0]);
        assert_eq!(cos[..4], cos[4..8]);
        assert_eq!((cos[0], sin[0]), (3f32.cos(), 3f32.sin()));
        assert_eq!((&cos[8..], &sin[8..]), ([1.0; 8].as_slice(), [0.0; 8].as_slice()));
    }
}
