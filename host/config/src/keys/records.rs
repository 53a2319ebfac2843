//! `[logging]` and `[profiler]`.

table! {
    /// Where metrics go.
    pub struct Logging {
        /// Sinks: `console`, `wandb`; written in lower case. Metrics are always in the run folder too.
        pub logger: Vec<String> = Vec::new(),
        /// Steps between summaries of the original's logs. No effect here: every step is recorded.
        pub log_interval: i64 = 100,
        /// Steps between logged images. No effect here.
        pub multi_modal_log_interval: Option<i64> = None,
        /// Project of the experiment tracker.
        pub project_name: String = "cosmos_rl".into(),
        /// Group of the experiment tracker.
        pub group_name: Option<String> = None,
        /// Name of the run; absent, empty or `None`: the output folder.
        pub experiment_name: Option<String> = None,
        /// Record the model FLOPs utilization.
        pub report_mfu: bool = false,
    }
}

table! {
    /// Profiling of the training steps. No effect here.
    pub struct Profiler {
        /// Profile with PyTorch's profiler. No effect here.
        pub enable_profiler: bool = false,
        /// Profile with Nsight Systems. No effect here.
        pub enable_nsys: bool = false,
        /// What is profiled. No effect here.
        pub sub_profiler_config: SubProfiler = SubProfiler::default(),
    }
}

table! {
    /// What is profiled. No effect here.
    pub struct SubProfiler {
        /// Profile now. No effect here.
        pub do_profile: bool = false,
        /// Steps recorded. No effect here.
        pub active_steps: i64 = 1,
        /// Steps before recording that are thrown away. No effect here.
        pub warmup_steps: i64 = 1,
        /// Steps before those. No effect here.
        pub wait_steps: i64 = 1,
        /// Ranks that are profiled. No effect here.
        pub rank_filter: Vec<i64> = Vec::new(),
        /// Record shapes. No effect here.
        pub record_shape: bool = false,
        /// Record memory. No effect here.
        pub profile_memory: bool = false,
        /// Record call stacks. No effect here.
        pub with_stack: bool = false,
        /// Record module names. No effect here.
        pub with_modules: bool = false,
    }
}
