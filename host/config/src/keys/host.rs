//! `[host]` and `[plugin.<name>]`: what only this program has.

table! {
    /// What only this program has: device, limits and how much is recorded. Not in the original.
    pub struct Host {
        /// Engine and device: `burn:flex` runs on the CPU. Not in the original.
        pub device: String = "burn:flex".into(),
        /// Sequences that the rollout decodes at the same time. Not in the original.
        #[schemars(range(min = 1, max = 65536))]
        pub decode_slots: usize = 64,
        /// Steps in a row that may be skipped for a loss or gradient that is not finite before the run stops. Not in the original.
        #[schemars(range(min = 1))]
        pub bad_steps_max: usize = 3,
        /// Completions recorded per step, with rewards and per-token KL. Not in the original.
        pub samples_logged: usize = 4,
        /// Answer the validation prompts with the teacher too, once, for comparison. Not in the original.
        pub validate_teacher: bool = false,
        /// Start the student from random weights of its `config.json`, seeded by `train.seed`, instead of reading safetensors. Not in the original.
        pub random_init: bool = false,
        /// Milliseconds to wait for one teacher result before the sample is masked. Not in the original.
        #[schemars(range(min = 1))]
        pub teacher_wait_ms_max: u64 = 1_800_000,
        /// Samples held by a queue between two roles before its producer waits. Not in the original.
        #[schemars(range(min = 1))]
        pub queue_samples_max: usize = 8192,
    }
}

table! {
    /// Grants, limits and settings of one plugin. Not in the original.
    pub struct Plugin {
        /// What the plugin may use: `log`, `table` (the dataset reader), `chat-template` (the student's template), `dir:PATH:ro` (a read-only directory). Nothing is allowed by default. Not in the original.
        pub allow: Vec<String> = Vec::new(),
        /// Memory of one instance in megabytes; absent: 64 for Rust and C, 512 for Python and JavaScript. Not in the original.
        #[schemars(range(min = 1, max = 4096))]
        pub memory_mb_max: Option<u64> = None,
        /// Milliseconds of one call; absent: the plugin host's default. Not in the original.
        #[schemars(range(min = 1))]
        pub call_ms_max: Option<u64> = None,
        /// Size of the component file in megabytes; absent: the plugin host's default. Not in the original.
        #[schemars(range(min = 1, max = 4096))]
        pub component_mb_max: Option<u64> = None,
        /// Free-form settings that the plugin gets as JSON when it starts. Not in the original.
        pub settings: serde_json::Map<String, serde_json::Value> = serde_json::Map::new(),
    }
}
