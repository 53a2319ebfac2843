//! Rollout: continuous batching over a [`crate::model::Decoder`], and the sampler.

mod sampler;
mod scheduler;
pub use sampler::{Sampler, SamplingParams};
pub use scheduler::{
    FinishReason, GenerateOptions, GenerateRequest, GenerateStats, Generated, generate, generate_streaming,
};

#[cfg(test)]
pub(crate) mod fake;
