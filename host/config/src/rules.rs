//! What depends on more than one key: upstream's rewrites, in upstream's order, and the checks. Every complaint points at a
//! value of the file that takes part in it.

use crate::document::Document;
use crate::keys::*;
use crate::problem::{Problem, Severity};
use crate::shapes::{FlagOrText, LearningRate, OneOrMany};

pub(crate) struct Rules<'a> {
    document: &'a Document,
    pub problems: Vec<Problem>,
}

/// Applies the rewrites and collects what does not fit together.
pub(crate) fn apply(config: &mut Config, document: &Document) -> Vec<Problem> {
    let mut rules = Rules { document, problems: Vec::new() };
    match &mut config.train.train_policy {
        TrainPolicy::Grpo(grpo) => rules.grpo(grpo),
        TrainPolicy::Sft(sft) => {
            if sft.dataloader_num_workers == 0 {
                sft.dataloader_prefetch_factor = None;
            }
        }
    }
    rules.checkpoint(&config.train.ckpt);
    rules.train(&mut config.train);
    rules.policy(&config.policy);
    rules.rollout(&config.rollout);
    rules.distillation(&mut config.distillation);
    for name in &mut config.logging.logger {
        *name = name.to_lowercase();
    }
    rules.pipeline(config);
    rules.lora(config);
    rules.staleness(config);
    rules.validation(config);
    config.train.transfer_dtype.get_or_insert(config.train.master_dtype);
    rules.distilling(config);
    rules.batches(config);
    rules.update_in_backward(config);
    rules.advice(config);
    rules.problems
}

impl Rules<'_> {
    fn is_set(&self, key: &str) -> bool {
        self.document.root.at(key.split('.')).is_some()
    }

    /// A complaint about the first of `keys` that the file sets.
    fn complain(&mut self, severity: Severity, keys: &[&str], message: String, hint: &str) {
        let set = keys.iter().find_map(|key| Some((*key, self.document.root.at(key.split('.'))?)));
        let (key, place) = match set {
            Some((key, node)) => (key, Some(self.document.place(node))),
            None => (keys.first().copied().unwrap_or_default(), None),
        };
        let hint = (!hint.is_empty()).then(|| hint.to_string());
        self.problems.push(Problem { severity, key: key.into(), message, hint, place });
    }

    fn error(&mut self, keys: &[&str], message: impl Into<String>, hint: &str) {
        self.complain(Severity::Error, keys, message.into(), hint);
    }

    fn grpo(&mut self, grpo: &mut GrpoConfig) {
        const AT: &str = "train.train_policy";
        if grpo.dataloader_num_workers == 0 {
            grpo.dataloader_prefetch_factor = None;
        }
        if grpo.reward_function.is_empty() {
            let key = format!("{AT}.reward_function");
            self.error(&[&key], format!("`{key}` names no reward"), "name one, for example `\"boxed_math\"`");
        }
        if grpo.use_decoupled_loss {
            grpo.rollout_as_token_ids = true;
            grpo.collect_rollout_logprobs = true;
        }
        if grpo.use_rollout_logprobs_for_loss {
            grpo.collect_rollout_logprobs = true;
        }
        if grpo.use_decoupled_loss && grpo.use_rollout_logprobs_for_loss {
            let keys = [&*format!("{AT}.use_rollout_logprobs_for_loss"), &*format!("{AT}.use_decoupled_loss")];
            let message = "`use_decoupled_loss` and `use_rollout_logprobs_for_loss` exclude each other";
            self.error(&keys, message, "switch one of them off");
        }
        if grpo.variant == Variant::Dapo && grpo.outdated_rollout_fetch_batch_size <= 0 {
            grpo.outdated_rollout_fetch_batch_size = 128;
        }
        raise_inflight(grpo);
        if grpo.uncentralized_training && grpo.variant != Variant::Grpo {
            let keys = [&*format!("{AT}.uncentralized_training"), &*format!("{AT}.variant")];
            self.error(&keys, "`uncentralized_training` works only with `variant = \"grpo\"`", "");
        }
    }

    fn checkpoint(&mut self, ckpt: &Checkpoint) {
        match &ckpt.upload_s3 {
            FlagOrText::Flag(false) => {}
            FlagOrText::Text(when) if when == "final" || when == "all" => {
                if ckpt.s3_bucket.is_none() {
                    let message = "`train.ckpt.upload_s3` needs `train.ckpt.s3_bucket`";
                    self.error(&["train.ckpt.upload_s3"], message, "name the bucket");
                }
            }
            _ => {
                let message = "`train.ckpt.upload_s3` must be `false`, `\"final\"` or `\"all\"`";
                self.error(&["train.ckpt.upload_s3"], message, "");
            }
        }
        if ckpt.save_freq_in_epoch <= 0 && ckpt.save_freq <= 0 {
            let message = format!("`train.ckpt.save_freq` is {}, but must be at least 1", ckpt.save_freq);
            self.error(&["train.ckpt.save_freq"], message, "or set `train.ckpt.save_freq_in_epoch`");
        }
    }

    fn train(&mut self, train: &mut Train) {
        if train.async_tp_enabled && !train.compile {
            let message = "`train.async_tp_enabled` needs `train.compile = true`";
            self.error(&["train.async_tp_enabled", "train.compile"], message, "switch `async_tp_enabled` off");
        }
        let mut off_policy = false;
        if let TrainPolicy::Grpo(grpo) = &mut train.train_policy {
            if grpo.on_policy {
                if train.sync_weight_interval != 1 {
                    let message = format!(
                        "`train.sync_weight_interval` is {}, but `on_policy = true` needs 1",
                        train.sync_weight_interval
                    );
                    self.error(&["train.sync_weight_interval", "train.train_policy.on_policy"], message, "");
                }
                grpo.allowed_outdated_steps = 0;
            }
            off_policy = !grpo.on_policy && grpo.allowed_outdated_steps > 0;
        }
        train.coalesce_weight_sync &= off_policy;
        if train.deterministic {
            train.seed.get_or_insert(42);
        }
        match &train.optm_lr {
            LearningRate::ByModule(rates) if !rates.contains_key("global") => {
                self.error(
                    &["train.optm_lr"],
                    "`train.optm_lr` is a table without the key `global`",
                    "add `global = 1e-6`",
                );
            }
            LearningRate::Each(rates) if rates.is_empty() => {
                self.error(&["train.optm_lr"], "`train.optm_lr` is an empty list", "");
            }
            _ => {}
        }
        if train.optm_betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            let message =
                format!("`train.optm_betas` is {:?}, but each must be at least 0 and below 1", train.optm_betas);
            self.error(&["train.optm_betas"], message, "");
        }
    }

    fn policy(&mut self, policy: &Policy) {
        self.model("policy", &policy.model_name_or_path, &policy.parallelism);
        if policy.freeze_pattern.is_some() && policy.trainable_pattern.is_some() {
            let message = "`policy.freeze_pattern` and `policy.trainable_pattern` exclude each other";
            self.error(&["policy.trainable_pattern", "policy.freeze_pattern"], message, "keep one of them");
        }
        if let Some(Lora { target_modules: Some(OneOrMany::One(target)), .. }) = &policy.lora
            && target != "all-linear"
        {
            let message = format!(
                "`policy.lora.target_modules` is the string `{target:?}`, but must be a list or `\"all-linear\"`"
            );
            self.error(&["policy.lora.target_modules"], message, "");
        }
    }

    fn model(&mut self, table: &str, path: &str, parallelism: &Parallelism) {
        if path.is_empty() {
            let key = format!("{table}.model_name_or_path");
            self.error(&[&key], format!("`{key}` is empty"), "give a hub id or a folder");
        }
        if parallelism.dp_shard_size == 0 {
            let key = format!("{table}.parallelism.dp_shard_size");
            self.error(
                &[&key],
                format!("`{key}` is 0, but must be at least 1, or -1 for all devices that are left"),
                "",
            );
        }
    }

    fn rollout(&mut self, rollout: &Rollout) {
        if !["vllm", "vllm_async", "trtllm"].contains(&rollout.backend.as_str()) {
            return self.multi_turn(&rollout.multi_turn_config);
        }
        let (set, normal) = (&rollout.parallelism, Parallelism::default());
        let fixed = [
            ("cp_size", set.cp_size == normal.cp_size),
            ("ep_size", set.ep_size == normal.ep_size),
            ("pp_dynamic_shape", set.pp_dynamic_shape == normal.pp_dynamic_shape),
            ("pp_micro_batch_size", set.pp_micro_batch_size == normal.pp_micro_batch_size),
            ("dp_replicate_size", set.dp_replicate_size == normal.dp_replicate_size),
            ("pp_schedule", set.pp_schedule == normal.pp_schedule),
            ("pp_layers_per_stage", set.pp_layers_per_stage == normal.pp_layers_per_stage),
        ];
        for (name, _) in fixed.iter().filter(|(_, same)| !same) {
            let key = format!("rollout.parallelism.{name}");
            let message = format!("`{key}` must keep its default with `rollout.backend = \"{}\"`", rollout.backend);
            let hint = "only `n_init_replicas`, `tp_size`, `pp_size` and `dp_shard_size` may be set for a rollout";
            self.error(&[&key], message, hint);
        }
        self.multi_turn(&rollout.multi_turn_config);
    }

    fn multi_turn(&mut self, turns: &MultiTurn) {
        if turns.enable_tools && turns.add_generation_prompt && turns.continue_final_message {
            let keys = ["rollout.multi_turn_config.continue_final_message", "rollout.multi_turn_config.enable_tools"];
            self.error(
                &keys,
                "`continue_final_message` and `add_generation_prompt` exclude each other",
                "keep one of them",
            );
        }
    }

    fn distillation(&mut self, distillation: &mut Distillation) {
        self.model("distillation", &distillation.model_name_or_path, &distillation.parallelism);
        self.teachers(distillation);
        if distillation.top_k <= 0 {
            distillation.trainer_token_ids_from_teacher = false;
        }
    }

    /// Each of several teachers has a name of its own, a model and a weight.
    fn teachers(&mut self, distillation: &Distillation) {
        if distillation.teachers.is_empty() {
            return;
        }
        for own in ["model_name_or_path", "model_revision"].map(|key| format!("distillation.{key}")) {
            if self.is_set(&own) {
                let message = format!("`{own}` and `[[distillation.teachers]]` exclude each other");
                self.error(&[&own], message, "name the model in the list of teachers");
            }
        }
        for (index, teacher) in distillation.teachers.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            let at = index.to_string();
            let which = if teacher.name.is_empty() { format!("number {}", index + 1) } else { teacher.name.clone() };
            if teacher.name.is_empty() || teacher.name.len() > 64 || !teacher.name.chars().all(plain) {
                let message = format!("teacher {which} has no plain `name`");
                self.error_below(&at, "name", message, "use up to 64 letters, digits, `-` and `_`");
            }
            if distillation.teachers[..index].iter().any(|other| other.name == teacher.name) {
                self.error_below(&at, "name", format!("two teachers have the name `{which}`"), "give each its own");
            }
            if teacher.model_name_or_path.is_empty() {
                let message = format!("teacher `{which}` has no `model_name_or_path`");
                self.error_below(&at, "model_name_or_path", message, "give a hub id or a folder");
            }
            if !(teacher.weight.is_finite() && teacher.weight > 0.0) {
                let message = format!("the `weight` of teacher `{which}` is {}, but must be above 0", teacher.weight);
                self.error_below(&at, "weight", message, "leave the teacher out to take nothing of it");
            }
            if teacher.datasets.as_ref().is_some_and(Vec::is_empty) {
                let message = format!("teacher `{which}` answers for no dataset");
                self.error_below(&at, "datasets", message, "name some, or leave `datasets` out for all");
            }
            if let Some(parallelism) = teacher.parallelism.as_ref().filter(|p| p.dp_replicate_size != 1) {
                let message = format!(
                    "`parallelism.dp_replicate_size` of teacher `{which}` is {}, but must be 1",
                    parallelism.dp_replicate_size
                );
                self.error_below(&at, "parallelism", message, "use `n_init_replicas`");
            }
        }
    }

    /// A complaint about `key` of teacher number `at`.
    fn error_below(&mut self, at: &str, key: &str, message: String, hint: &str) {
        let path = ["distillation", "teachers", at, key];
        let (node, depth) = self.document.root.deepest(&path);
        let place = if depth < path.len() { self.document.key_place(node) } else { self.document.place(node) };
        let (severity, hint) = (Severity::Error, Some(hint.to_string()));
        self.problems.push(Problem { severity, key: path.join("."), message, hint, place: Some(place) });
    }

    fn pipeline(&mut self, config: &Config) {
        let parallelism = &config.policy.parallelism;
        if parallelism.pp_size <= 1 {
            return;
        }
        let (batch, micro) = (config.train.train_batch_per_replica, parallelism.pp_micro_batch_size);
        let keys =
            ["policy.parallelism.pp_micro_batch_size", "train.train_batch_per_replica", "policy.parallelism.pp_size"];
        match usize::try_from(micro) {
            Ok(micro) if micro > 0 => {
                if batch % micro != 0 {
                    let message = format!(
                        "`train.train_batch_per_replica` is {batch}, which `policy.parallelism.pp_micro_batch_size` = {micro} does not divide"
                    );
                    self.error(&keys, message, "");
                }
            }
            _ => {
                let message =
                    format!("`policy.parallelism.pp_micro_batch_size` is {micro}, but pipeline stages need at least 1");
                self.error(&keys, message, "");
            }
        }
        if config.train.fsdp_offload {
            let message = "`train.fsdp_offload` does not work with pipeline stages";
            self.error(
                &["train.fsdp_offload", "policy.parallelism.pp_size"],
                message,
                "switch it off, or set `pp_size = 1`",
            );
        }
    }

    fn lora(&mut self, config: &Config) {
        if config.policy.lora.is_none() || config.train.train_policy.grpo().is_none() {
            return;
        }
        if config.train.compile {
            let message = "LoRA with `type = \"grpo\"` needs `train.compile = false`";
            self.error(&["train.compile", "policy.lora"], message, "");
        }
        if config.policy.parallelism.tp_size != 1 {
            let message = format!(
                "LoRA with `type = \"grpo\"` needs `policy.parallelism.tp_size = 1`, not {}",
                config.policy.parallelism.tp_size
            );
            self.error(&["policy.parallelism.tp_size", "policy.lora"], message, "");
        }
    }

    fn staleness(&mut self, config: &mut Config) {
        let interval = config.train.sync_weight_interval;
        if let TrainPolicy::Grpo(grpo) = &mut config.train.train_policy {
            grpo.allowed_outdated_steps = grpo.allowed_outdated_steps.max(interval.saturating_sub(1));
            raise_inflight(grpo);
            let outdated = grpo.allowed_outdated_steps;
            self.weights_kept(&mut config.host.weights_keep, outdated);
        }
    }

    /// A rollout may be at work with the oldest version that counts while the next one is published.
    fn weights_kept(&mut self, keep: &mut usize, outdated: usize) {
        let least = outdated.saturating_add(2);
        if !self.is_set("host.weights_keep") {
            *keep = (*keep).max(least);
        } else if *keep < least {
            let message = format!(
                "`host.weights_keep` is {keep}, but with `allowed_outdated_steps` = {outdated} rollouts need {least} versions"
            );
            let keys = ["host.weights_keep", "train.train_policy.allowed_outdated_steps"];
            self.error(&keys, message, "raise it, or leave it out");
        }
    }

    fn validation(&mut self, config: &mut Config) {
        let Some(grpo) = config.train.train_policy.grpo() else { return };
        let remote = *config.validation.use_remote_reward.get_or_insert(grpo.use_remote_reward);
        if remote != grpo.use_remote_reward {
            let message = format!(
                "`validation.use_remote_reward` is {remote}, but `train.train_policy.use_remote_reward` is {}",
                grpo.use_remote_reward
            );
            self.error(&["validation.use_remote_reward"], message, "leave it out");
        }
        config.validation.remote_reward.get_or_insert_with(|| grpo.remote_reward.clone());
    }

    fn distilling(&mut self, config: &mut Config) {
        if !config.distillation.enable {
            config.distillation.top_k = 0;
            // Upstream leaves it on here, and turns it off when a worker resolves the result again.
            config.distillation.trainer_token_ids_from_teacher = false;
            return;
        }
        // Upstream forces it on; a file that says `false` wants the reward as well.
        let keeps_reward = self.is_set("train.train_policy.bypass_reward");
        match &mut config.train.train_policy {
            TrainPolicy::Grpo(grpo) => {
                grpo.rollout_as_token_ids = true;
                if !keeps_reward {
                    grpo.bypass_reward = true;
                }
            }
            TrainPolicy::Sft(_) => {
                let keys = ["train.train_policy.type", "distillation.enable"];
                let message = "`distillation.enable = true` needs `train.train_policy.type = \"grpo\"`, not `\"sft\"`";
                self.error(&keys, message, "distillation trains on the student's own completions");
            }
        }
        let parallelism = &config.distillation.parallelism;
        if parallelism.dp_replicate_size != 1 {
            let key = "distillation.parallelism.dp_replicate_size";
            self.error(
                &[key],
                format!("`{key}` is {}, but must be 1", parallelism.dp_replicate_size),
                "use `n_init_replicas`",
            );
        }
        let batch = config.distillation.batch_size_per_replica;
        let ranks = usize::try_from(parallelism.dp_shard_size).unwrap_or(1).max(1);
        let rows = ranks.saturating_mul(config.distillation.mini_batch);
        let keys = [
            "distillation.batch_size_per_replica",
            "distillation.mini_batch",
            "distillation.parallelism.dp_shard_size",
        ];
        if !batch.is_multiple_of(ranks) {
            let message = format!(
                "`distillation.batch_size_per_replica` is {batch}, which `distillation.parallelism.dp_shard_size` = {ranks} does not divide"
            );
            self.error(&keys, message, "");
        } else if batch < rows {
            let message = format!(
                "`distillation.batch_size_per_replica` is {batch}, but `dp_shard_size` × `mini_batch` is {rows}"
            );
            self.error(&keys, message, "raise the batch or lower `distillation.mini_batch`");
        }
    }

    fn batches(&mut self, config: &Config) {
        let train = &config.train;
        let Some(grpo) = train.train_policy.grpo().filter(|grpo| grpo.max_token_len_per_mini_batch.is_none()) else {
            return;
        };
        let ranks = usize::try_from(config.policy.parallelism.dp_shard_size).unwrap_or(1).max(1);
        let (batch, rows) = (train.train_batch_per_replica, ranks.saturating_mul(grpo.mini_batch));
        if batch % rows != 0 {
            let message = format!(
                "`train.train_batch_per_replica` is {batch}, which {rows} does not divide: `policy.parallelism.dp_shard_size` = {ranks} × `train.train_policy.mini_batch` = {}",
                grpo.mini_batch
            );
            let keys =
                ["train.train_batch_per_replica", "train.train_policy.mini_batch", "policy.parallelism.dp_shard_size"];
            let next = batch.div_ceil(rows).saturating_mul(rows);
            self.error(&keys, message, &format!("the next batch that fits is {next}"));
        }
    }

    /// `host.update_in_backward = "always"` where an update has to wait for all gradients.
    fn update_in_backward(&mut self, config: &Config) {
        const KEY: &str = "host.update_in_backward";
        let train = &config.train;
        if config.host.update_in_backward != UpdateInBackward::Always {
            return;
        }
        if train.optm_grad_norm_clip > 0.0 {
            let message = format!(
                "`{KEY} = \"always\"`, but gradients are clipped to a norm of {}, which is known only when all are there",
                train.optm_grad_norm_clip
            );
            let hint = "set `train.optm_grad_norm_clip = 0`, or `host.update_in_backward = \"auto\"`";
            self.error(&[KEY, "train.optm_grad_norm_clip"], message, hint);
        }
        let samples = train.train_policy.samples_of_update(train.train_batch_per_replica);
        if let Some((batch, mini_batch)) = samples.filter(|(batch, mini_batch)| mini_batch < batch) {
            let message = format!(
                "`{KEY} = \"always\"`, but an update is made of {} micro-batches: {batch} samples, {mini_batch} at a time",
                batch.div_ceil(mini_batch)
            );
            let keys = [KEY, "train.train_policy.mini_batch", "train.train_batch_per_replica"];
            self.error(&keys, message, &format!("set `train.train_policy.mini_batch` = {batch}"));
        }
    }

    fn advice(&mut self, config: &Config) {
        let validation = &config.validation;
        if validation.enable && validation.temperature > 0.0 && validation.top_k == Some(1) {
            let message = format!(
                "`validation.temperature` is {:?}, but `validation.top_k` is 1, so validation is greedy",
                validation.temperature
            );
            let keys = ["validation.top_k", "validation.temperature"];
            self.complain(Severity::Warning, &keys, message, "set `validation.top_k = -1` to sample");
        }
        if config.host.environment.is_some() && !config.rollout.multi_turn_config.enable {
            let message = "`host.environment` is not used without `rollout.multi_turn_config.enable = true`";
            let keys = ["host.environment"];
            self.complain(Severity::Warning, &keys, message.into(), "switch it on to hold conversations");
        }
        if config.rollout.quantize_head && config.rollout.quantization != Quantization::Int8 {
            let message = "`rollout.quantize_head` is not used without `rollout.quantization = \"int8\"`";
            let keys = ["rollout.quantize_head"];
            self.complain(Severity::Warning, &keys, message.into(), "set both, or remove it");
        }
        let distillation = &config.distillation;
        let own_mass = self.is_set("distillation.top_k_mass") && distillation.top_k_mass != MassRule::Raw;
        if distillation.enable && distillation.objective == ObjectiveKind::CosmosGjsd && own_mass {
            let message = "`distillation.top_k_mass` is not used with `distillation.objective = \"cosmos_gjsd\"`";
            let keys = ["distillation.top_k_mass"];
            self.complain(Severity::Warning, &keys, message.into(), "`\"gjsd\"` is the objective that it belongs to");
        }
        let context = config.policy.model_max_length;
        let lengths = [
            (
                "rollout.max_response_length",
                Some(config.rollout.max_response_length),
                config.train.train_policy.grpo().is_some(),
            ),
            ("validation.max_response_length", validation.max_response_length, validation.enable),
        ];
        for (key, length, used) in lengths {
            if let Some(length) = length.filter(|length| used && *length >= context) {
                let message = format!(
                    "`{key}` is {length}, but prompt and completion together have at most `policy.model_max_length` = {context} tokens"
                );
                self.complain(
                    Severity::Warning,
                    &[key, "policy.model_max_length"],
                    message,
                    "completions end at the context limit",
                );
            }
        }
        for (name, plugin) in &config.plugin {
            for grant in &plugin.allow {
                let is_dir = grant
                    .strip_prefix("dir:")
                    .and_then(|rest| rest.strip_suffix(":ro"))
                    .is_some_and(|dir| !dir.is_empty());
                if !is_dir && !["log", "table", "chat-template"].contains(&grant.as_str()) {
                    let key = format!("plugin.{name}.allow");
                    let message = format!(
                        "`{key}` holds `\"{grant}\"`, but each must be one of `\"log\"`, `\"table\"`, `\"chat-template\"`, `\"dir:PATH:ro\"`"
                    );
                    self.error(&[&key], message, "plugins can read directories, but neither write nor use the network");
                }
            }
        }
    }
}

/// What upstream's files may ask for and this program cannot do.
pub(crate) fn unsupported(config: &Config, document: &Document) -> Vec<Problem> {
    let mut rules = Rules { document, problems: Vec::new() };
    let mut refuse = |key: &str, asked: bool, what: &str, hint: &str| {
        if asked {
            rules.error(&[key], format!("`{key}` asks for {what}, which is not supported"), hint);
        }
    };
    let (train, policy) = (&config.train, &config.policy);
    let eight_bit = matches!(train.optm_name, OptimizerName::Adam8bit | OptimizerName::AdamW8bit);
    refuse("train.optm_name", eight_bit, "an optimizer with 8-bit state", "use `\"Adam\"` or `\"AdamW\"`");
    refuse("train.non_text", train.non_text, "data that is not text", "");
    refuse("policy.lora", policy.lora.is_some(), "low-rank adapters", "remove `[policy.lora]` to train all weights");
    refuse("policy.is_diffusers", policy.is_diffusers, "a diffusion model", "");
    let turns = &config.rollout.multi_turn_config;
    refuse(
        "rollout.multi_turn_config.continue_final_message",
        turns.enable && turns.continue_final_message,
        "a continuation of the last message",
        "the student answers in messages of its own: remove it",
    );
    let rollout = &config.rollout;
    let narrow = matches!(rollout.quantization, Quantization::Fp8 | Quantization::Mxfp4);
    refuse("rollout.quantization", narrow, "sampling in FP8 or MXFP4", "use `\"int8\"` or `\"none\"`");
    let elsewhere = rollout.quantization == Quantization::Int8 && config.host.device != "cpu";
    refuse(
        "rollout.quantization",
        elsewhere,
        &format!("int8 weights on `{}`", config.host.device),
        "only the native engine has them: set `host.device = \"cpu\"`",
    );
    let partly = "remove it to train all weights";
    refuse("policy.freeze_pattern", policy.freeze_pattern.is_some(), "frozen parameters", partly);
    refuse("policy.trainable_pattern", policy.trainable_pattern.is_some(), "frozen parameters", partly);
    refuse("policy.trainable_map", policy.trainable_map.is_some(), "frozen parameters", partly);
    refuse("train.fp8.enable_fp8", train.fp8.enable_fp8, "FP8 training", "");
    refuse("train.fp4.enable_fp4", train.fp4.enable_fp4, "FP4 training", "");
    refuse("train.ema_enable", train.ema_enable, "an average of the weights", "");
    refuse(
        "train.ckpt.upload_hf",
        train.ckpt.upload_hf,
        "an upload to the hub",
        "`ckpt export` makes a folder to upload",
    );
    let uploads = !matches!(train.ckpt.upload_s3, FlagOrText::Flag(false));
    refuse("train.ckpt.upload_s3", uploads, "an upload to S3", "`ckpt export` makes a folder to upload");
    let distillation = &config.distillation;
    let foreign = distillation.enable && distillation.wire == Wire::CosmosRl;
    let native = "use `distillation.wire = \"native\"`";
    let whole = foreign && distillation.top_k < 0;
    refuse(
        "distillation.top_k",
        whole,
        "the whole vocabulary in the original's messages, which have no place for it",
        native,
    );
    let others = foreign && distillation.top_k > 0 && distillation.top_k_support != SupportRule::Student;
    refuse("distillation.top_k_support", others, "candidates that the original's teacher does not pick", native);
    let nccl = config.host.weights_transport == WeightsTransport::Nccl;
    refuse("host.weights_transport", nccl, "weights that travel between GPUs", "use `\"auto\"`");
    let several = foreign && !config.distillation.teachers.is_empty();
    refuse("distillation.teachers", several, "several teachers over the original's wire", "it knows a single one");
    match &train.train_policy {
        TrainPolicy::Grpo(grpo) => {
            let own = "the trainers are `\"grpo\"` and, with `type = \"sft\"`, `\"sft\"`";
            refuse("train.train_policy.trainer_type", grpo.trainer_type != "grpo", "a trainer of its own", own);
            refuse(
                "train.train_policy.algo",
                grpo.algo != "grpo",
                "an algorithm of its own",
                "the only one is `\"grpo\"`",
            );
            let remote = "write the reward as a plugin";
            refuse("train.train_policy.use_remote_reward", grpo.use_remote_reward, "a remote reward server", remote);
            let grouped = grpo.group_reward_calculation;
            refuse("train.train_policy.group_reward_calculation", grouped, "rewards of a whole group at once", "");
            let positive = grpo.positive_nll_coef.is_some();
            refuse("train.train_policy.positive_nll_coef", positive, "a likelihood term on good completions", "");
            let overlong = grpo.overlong_reward.enable_overlong_penalty;
            let own_key = "train.train_policy.overlong_reward.enable_overlong_penalty";
            refuse(own_key, overlong, "a penalty on long completions", "put it into the plugin's reward");
            let uncentralized = grpo.uncentralized_training;
            refuse("train.train_policy.uncentralized_training", uncentralized, "training without a controller", "");
        }
        TrainPolicy::Sft(sft) => {
            let own = "the only one for `type = \"sft\"` is `\"sft\"`";
            refuse("train.train_policy.trainer_type", sft.trainer_type != "sft", "a trainer of its own", own);
        }
    }
    rules.problems
}

/// The ceiling of samples in flight is never below what the staleness window needs.
fn raise_inflight(grpo: &mut GrpoConfig) {
    if let Some(steps) = &mut grpo.max_inflight_steps {
        *steps = (*steps).max(grpo.allowed_outdated_steps.saturating_add(1));
    }
}
