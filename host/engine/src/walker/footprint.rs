//! Bytes of weights that a model on the CPU holds, from its shape: what a run can say before it loads anything.

use super::SECOND_FORM_BYTES_MAX;
use crate::model::{ModelConfig, ParamSpec, WeightFormat};

const F32: u64 = 4;
const BF16: u64 = 2;

/// Numbers of a model by what is made of them.
struct Counts {
    blocks: u64,
    head: u64,
    /// The embedding, where it is not the head.
    embedding: u64,
}

impl Counts {
    fn new(config: &ModelConfig) -> Self {
        let len = |list: Vec<ParamSpec>| list.iter().map(|spec| spec.len() as u64).sum::<u64>();
        let (embedding, head) = (len(config.embed_params()), len(config.head_params()));
        let blocks = len(config.block_params(0)) * config.num_hidden_layers as u64;
        if config.tie_word_embeddings {
            Self { blocks, head: embedding, embedding: 0 }
        } else {
            Self { blocks, head, embedding }
        }
    }
}

/// Bytes of the matrices that decoding reads, in `format`, up to a few for the ends of panels.
pub fn decoded_bytes(config: &ModelConfig, format: WeightFormat) -> u64 {
    let Counts { blocks, head, .. } = Counts::new(config);
    // A scale of four bytes for every 128 numbers.
    let int8 = |numbers: u64| numbers + numbers / 32;
    match format {
        WeightFormat::F32 => F32 * (blocks + head),
        WeightFormat::Bf16 => BF16 * (blocks + head),
        WeightFormat::Int8 { head: true } => int8(blocks + head),
        WeightFormat::Int8 { head: false } => int8(blocks) + BF16 * head,
    }
}

/// Bytes of the weights of a model that only scores: those of `format`, and the master values where they are kept.
pub fn scoring_bytes(config: &ModelConfig, format: WeightFormat) -> u64 {
    scoring_bytes_with(config, format, SECOND_FORM_BYTES_MAX)
}

pub(super) fn scoring_bytes_with(config: &ModelConfig, format: WeightFormat, second_form_bytes_max: usize) -> u64 {
    let decoded = decoded_bytes(config, format);
    let Counts { head, embedding, .. } = Counts::new(config);
    match format {
        WeightFormat::F32 => {
            let masters = F32 * config.parameter_count();
            if masters > second_form_bytes_max as u64 { masters } else { masters + decoded }
        }
        WeightFormat::Bf16 => decoded + BF16 * embedding,
        // Its tokens are looked up in f32.
        WeightFormat::Int8 { .. } => decoded + F32 * if embedding > 0 { embedding } else { head },
    }
}
