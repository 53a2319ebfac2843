//! Tables of models that this program does not train. They are read and written back so that upstream's files resolve
//! to the same configuration; nothing here looks at them.

use super::Lora;

table! {
    /// Settings of diffusion models. No effect here.
    pub struct Diffusers {
        /// Floating-point format. No effect here.
        pub dtype: String = "float32".into(),
        /// Frames per sampled video. No effect here.
        pub inference_frames: i64 = 41,
        /// Height and width of a sample. No effect here.
        pub inference_size: Vec<i64> = vec![1024, 1024],
        /// Whether the model makes videos. No effect here.
        pub is_video: bool = false,
        /// Mean of the logit-normal time steps. No effect here.
        pub logit_mean: f64 = 0.0,
        /// Deviation of the logit-normal time steps. No effect here.
        pub logit_std: f64 = 1.0,
        /// Low-rank adapters. No effect here.
        pub lora: Option<Lora> = None,
        /// Tokens of a prompt. No effect here.
        pub max_prompt_length: i64 = 300,
        /// Strength of negative-aware fine-tuning. No effect here.
        pub nft_beta: f64 = 1.0,
        /// Move parts of the model to the host. No effect here.
        pub offload: bool = true,
        /// Sampling. No effect here.
        pub sample: DiffusersSample = DiffusersSample::default(),
        /// Share of the time steps trained on. No effect here.
        pub timesteps_fraction: f64 = 1.0,
        /// Video tokenizer. No effect here.
        pub tokenizer: DiffusersTokenizer = DiffusersTokenizer::default(),
        /// Shift of the time steps. No effect here.
        pub train_flow_shift: f64 = 3.0,
        /// Frames per training video. No effect here.
        pub train_frames: i64 = 41,
        /// Decay of the copied weights. No effect here.
        pub weight_copy_decay_type: i64 = 0,
        /// Distribution of the time steps. No effect here.
        pub weighting_scheme: String = "logit_normal".into(),
    }
}

table! {
    /// Sampling of diffusion models. No effect here.
    pub struct DiffusersSample {
        /// Sample without noise. No effect here.
        pub deterministic_sampling: bool = false,
        /// Steps in evaluation. No effect here.
        pub eval_num_steps: i64 = 40,
        /// Deviation over the whole batch. No effect here.
        pub global_std: bool = true,
        /// Classifier-free guidance. No effect here.
        pub guidance_scale: f64 = 4.5,
        /// Noise of a step. No effect here.
        pub noise_level: f64 = 1.0,
        /// Steps. No effect here.
        pub num_steps: i64 = 40,
        /// Solver. No effect here.
        pub solver: String = "dpm2".into(),
    }
}

table! {
    /// Video tokenizer of diffusion models. No effect here.
    pub struct DiffusersTokenizer {
        /// Frames per chunk. No effect here.
        pub chunk_duration: i64 = 81,
        /// Compile the encoder. No effect here.
        pub compile_encode: bool = false,
        /// Load mean and deviation. No effect here.
        pub load_mean_std: bool = false,
        /// Frames per window. No effect here.
        pub temporal_window: i64 = 16,
    }
}

table! {
    /// Settings of vision-language-action models. No effect here.
    pub struct Vla {
        /// Model family. No effect here.
        pub vla_type: String = "openvla-oft".into(),
        /// Continuous actions. No effect here.
        pub continuous: bool = false,
        /// Steps of an episode. No effect here.
        pub max_steps: Option<i64> = None,
        /// Environments at the same time. No effect here.
        pub num_envs: i64 = 1,
        /// Images per input. No effect here.
        pub num_images_in_input: i64 = 1,
        /// Size of the proprioceptive input. No effect here.
        pub proprio_dim: i64 = 7,
        /// Save videos. No effect here.
        pub save_video: bool = false,
        /// Detail of traces. No effect here.
        pub trace_verbosity: i64 = 1,
        /// Chunks per training step. No effect here.
        pub training_chunk_size: i64 = 16,
        /// Statistics by which actions are scaled. No effect here.
        pub unnorm_key: String = "libero_10_no_noops".into(),
        /// Use the proprioceptive input. No effect here.
        pub use_proprio: bool = false,
        /// Run environments in processes. No effect here.
        pub use_subprocess: Option<bool> = None,
    }
}
