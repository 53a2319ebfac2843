//! What each rewrite does, what each complaint says, and what no input may do.

use super::*;
use cosmos_testkit::repo_root;
use proptest::prelude::*;
use std::path::Path;

const NOW: &str = "20260102030405";

fn resolve(text: &str) -> Resolved {
    resolve_with(text, &[])
}

fn resolve_with(text: &str, overrides: &[&str]) -> Resolved {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let mut file = ConfigFile::parse("run.toml", text).unwrap_or_else(|e| panic!("{e}"));
    file.set(&overrides).unwrap_or_else(|e| panic!("{e}"));
    file.resolve(NOW).unwrap_or_else(|e| panic!("{e}"))
}

/// What is said about a text that is refused, whole.
fn refused(text: &str) -> String {
    let errors =
        ConfigFile::parse("run.toml", text).and_then(|f| f.resolve(NOW)).map(|r| r.config).expect_err("an error");
    assert!(errors.errors().count() > 0);
    errors.to_string()
}

fn refused_override(argument: &str) -> String {
    let mut file = ConfigFile::parse("run.toml", "[train]\n").expect("TOML");
    match file.set(&[argument.to_string()]) {
        Err(errors) => errors.to_string(),
        Ok(()) => file.resolve(NOW).map(|r| r.config).expect_err("an error").to_string(),
    }
}

fn warned(text: &str) -> String {
    resolve(text).warnings.iter().map(|w| w.to_string()).collect::<Vec<_>>().join("\n")
}

fn grpo(config: &Config) -> &GrpoConfig {
    config.train.train_policy.grpo().expect("type grpo")
}

const GRPO: &str = "[train]\n[train.train_policy]\ntype = \"grpo\"\n";

#[test]
fn an_empty_file_is_all_defaults() {
    let config = resolve("").config;
    assert_eq!((config.train.timestamp.as_str(), config.train.output_dir.as_str()), ("", "./outputs"));
    assert_eq!(grpo(&config).reward_function.get("single_choice"), Some(&1.0));
    assert_eq!(config.policy.parallelism.tp_size, 2);
    assert_eq!(config.host, Host::default());
}

#[test]
fn the_start_time_names_the_run_unless_the_file_does() {
    let dated = resolve("[train]\noutput_dir = \"out/\"\n").config.train;
    assert_eq!((dated.timestamp.as_str(), dated.output_dir.as_str()), (NOW, "out/20260102030405"));
    assert_eq!(resolve("[train]\noutput_dir = \"out\"").config.train.output_dir, "out/20260102030405");
    let named = resolve("[train]\noutput_dir = \"out\"\ntimestamp = \"first\"\n").config.train;
    assert_eq!((named.timestamp.as_str(), named.output_dir.as_str()), ("first", "out"));
}

#[test]
fn a_file_without_train_is_refused() {
    assert_eq!(
        refused("[policy]\nmodel_max_length = 10\n"),
        "run.toml:1:1: the table `[train]` is missing\n  hint: add `[train]`, at least with `output_dir`"
    );
}

#[test]
fn the_training_method_is_inferred_as_upstream_does() {
    let kind = |text: &str| resolve(text).config.train.train_policy.grpo().is_some();
    assert!(kind("[train]\n"));
    assert!(kind("[train.train_policy]\nkl_beta = 0\n"));
    assert!(kind("[train.train_policy]\nuse_remote_reward = false\n"));
    assert!(!kind("[train.train_policy]\nmini_batch = 4\n"));
    assert_eq!(
        refused("[train.train_policy]\ntype = \"grop\"\n"),
        "run.toml:2:8: `train.train_policy.type` is the string `\"grop\"`, but must be one of `\"grpo\"`, `\"sft\"`\n  hint: did you mean `\"grpo\"`?"
    );
}

#[test]
fn wrong_values_name_place_value_and_what_is_allowed() {
    assert_eq!(
        refused("redis = 12800\n[train]\n"),
        "run.toml:1:9: `redis` is the integer `12800`, but must be a string\n  hint: put it in quotes"
    );
    assert_eq!(
        refused("[train]\nepoch = \"two\"\n"),
        "run.toml:2:9: `train.epoch` is the string `\"two\"`, but must be an integer of at least 1"
    );
    assert_eq!(
        refused("[train]\n  optm_lr = \"1e-6\"\n"),
        "run.toml:2:13: `train.optm_lr` is the string `\"1e-6\"`, but must be a number or a list (each a number) or a table (each value a number)\n  hint: write `1e-6` without quotes"
    );
    assert_eq!(
        refused("[train.ckpt]\nsave_mode = \"asink\"\n"),
        "run.toml:2:13: `train.ckpt.save_mode` is the string `\"asink\"`, but must be one of `\"async\"`, `\"sync\"`\n  hint: did you mean `\"async\"`?"
    );
    assert_eq!(
        refused("[train]\n[distillation]\njsd_beta = 1.5\n"),
        "run.toml:3:12: `distillation.jsd_beta` is the number `1.5`, but must be a number from 0 to 1"
    );
    assert_eq!(refused("train = 3\n"), "run.toml:1:9: `train` is the integer `3`, but must be a table");
    assert_eq!(
        refused("[train]\noptm_betas = [0.9]\n"),
        "run.toml:2:14: `train.optm_betas` is a list, but must be a list of 2 (each a number)"
    );
    assert_eq!(
        refused("[train]\nsignal_to_handle = [\"SIGUSR1\", 10]\n"),
        "run.toml:2:32: `train.signal_to_handle[1]` is the integer `10`, but must be a string\n  hint: put it in quotes"
    );
    assert_eq!(
        refused("[train]\nepsilon = nan\n"),
        "run.toml:2:11: `train.epsilon` is the infinite or undefined number `nan`, but must be a number of at least 0"
    );
    assert_eq!(
        refused("[train]\nepoch = 99999999999999999999\n"),
        "run.toml:2:9: `train.epoch` is the too large integer `99999999999999999999`, but must be an integer of at least 1"
    );
    assert_eq!(
        refused("[train]\n[custom]\nx = inf\n"),
        "run.toml:3:5: `custom.x` is the infinite or undefined number `inf`, but must be a number"
    );
}

#[test]
fn all_errors_are_reported_in_the_order_of_the_file() {
    assert_eq!(
        refused("[train]\nepoch = 0\nfoo = 1\n[policy]\nmodel_max_length = true\n"),
        "run.toml:2:9: `train.epoch` is the integer `0`, but must be an integer of at least 1\n\
         run.toml:3:1: warning: unknown key `train.foo` is ignored\n\
         run.toml:5:20: `policy.model_max_length` is `true`, but must be an integer of at least 1"
    );
}

#[test]
fn syntax_errors_have_a_place() {
    assert!(refused("[train\nx = 1").starts_with("run.toml:1:7: this is not TOML: "), "{}", refused("[train\nx = 1"));
    assert!(refused("[train]\nepoch = 1\nepoch = 2\n").starts_with("run.toml:3:1: this is not TOML: duplicate key"));
    let deep = format!("{}a = 1", "a.".repeat(100_000));
    assert_eq!(refused(&deep), "run.toml:1:32: this is not TOML: a dotted key has more than 16 parts");
}

#[test]
fn unknown_keys_are_warnings_with_the_nearest_key() {
    assert_eq!(
        warned("[train]\nlogprob_dtpye = \"float32\"\n"),
        "run.toml:2:1: warning: unknown key `train.logprob_dtpye` is ignored\n  hint: did you mean `train.logprob_dtype`?"
    );
    // Upstream ships this one.
    assert_eq!(
        warned("[train]\n[distillation]\nmodel_max_length = 1024\n"),
        "run.toml:3:1: warning: unknown key `distillation.model_max_length` is ignored\n  hint: did you mean `policy.model_max_length`?"
    );
    assert_eq!(warned("[train]\n[custom]\nanything = {goes = 1}\n"), "");
}

#[test]
fn numbers_coerce_as_in_upstream() {
    let config = resolve("[train]\noptm_lr = 1\nepoch = 2.0\noptm_warmup_steps = 0.1\n").config;
    assert_eq!(config.train.optm_lr, LearningRate::One(1.0));
    assert_eq!(config.train.epoch, 2);
    assert_eq!(config.train.optm_warmup_steps, Amount::Ratio(0.1));
    assert_eq!(resolve("[train]\noptm_warmup_steps = 7\n").config.train.optm_warmup_steps, Amount::Count(7));
}

#[test]
fn lists_tables_and_single_values_are_normalised() {
    let config = resolve(&format!(
        "{GRPO}dataset.split = \"train\"\nreward_function = [\"a\", \"b\"]\nfilter_reward_metric = \"a\"\ndataloader_num_workers = -1\ndataloader_prefetch_factor = 3\ndataloader_batch_size = 0\n[logging]\nlogger = [\"Console\"]\n[validation]\nreward_function = {{c = 2}}\n"
    ))
    .config;
    let policy = grpo(&config);
    assert_eq!(policy.dataset.split, ["train"]);
    assert_eq!(policy.reward_function, [("a".to_string(), 1.0), ("b".to_string(), 1.0)].into());
    assert_eq!(policy.filter_reward_metric, ["a"]);
    assert_eq!((policy.dataloader_num_workers, policy.dataloader_prefetch_factor), (0, None));
    assert_eq!(policy.dataloader_batch_size, None);
    assert_eq!(config.logging.logger, ["console"]);
    assert_eq!(config.validation.reward_function, [("c".to_string(), 2.0)].into());
    assert_eq!(
        refused(&format!("{GRPO}reward_function = []\n")),
        "run.toml:4:19: `train.train_policy.reward_function` names no reward\n  hint: name one, for example `\"boxed_math\"`"
    );
}

#[test]
fn grpo_switches_pull_others_along() {
    let of = |keys: &str| grpo(&resolve(&format!("{GRPO}{keys}")).config).clone();
    let decoupled = of("use_decoupled_loss = true\n");
    assert!(decoupled.rollout_as_token_ids && decoupled.collect_rollout_logprobs);
    let engine = of("use_rollout_logprobs_for_loss = true\n");
    assert!(engine.collect_rollout_logprobs && !engine.rollout_as_token_ids);
    assert!(
        refused(&format!("{GRPO}use_decoupled_loss = true\nuse_rollout_logprobs_for_loss = true\n"))
            .starts_with("run.toml:5:33: `use_decoupled_loss` and `use_rollout_logprobs_for_loss` exclude each other")
    );
    assert_eq!(of("variant = \"dapo\"\n").outdated_rollout_fetch_batch_size, 128);
    assert_eq!(of("variant = \"dapo\"\noutdated_rollout_fetch_batch_size = 3\n").outdated_rollout_fetch_batch_size, 3);
    assert_eq!(of("max_inflight_steps = 2\n").max_inflight_steps, Some(5));
    assert_eq!(of("max_inflight_steps = 9\n").max_inflight_steps, Some(9));
    assert!(
        refused(&format!("{GRPO}variant = \"gspo\"\nuncentralized_training = true\n"))
            .contains("`uncentralized_training` works only with `variant = \"grpo\"`")
    );
}

#[test]
fn train_rewrites() {
    let train = |text: &str| resolve(text).config.train;
    assert_eq!(train("[train]\ndeterministic = true\n").seed, Some(42));
    assert_eq!(train("[train]\ndeterministic = true\nseed = 7\n").seed, Some(7));
    assert_eq!(train("[train]\nseed = -3\n").seed, Some(42));
    assert!(train("[train]\ncoalesce_weight_sync = true\n").coalesce_weight_sync);
    let strict =
        resolve("[train]\ncoalesce_weight_sync = true\n[train.train_policy]\non_policy = true\nkl_beta = 0.0\n").config;
    assert!(!strict.train.coalesce_weight_sync);
    assert_eq!(grpo(&strict).allowed_outdated_steps, 0);
    assert_eq!(train("[train]\nmaster_dtype = \"bfloat16\"\n").transfer_dtype, Some(Dtype::Bfloat16));
    assert_eq!(train("[train]\ntransfer_dtype = \"float16\"\n").transfer_dtype, Some(Dtype::Float16));
    let rare =
        resolve("[train]\nsync_weight_interval = 8\n[train.train_policy]\nkl_beta = 0.0\nmax_inflight_steps = 5\n")
            .config;
    assert_eq!((grpo(&rare).allowed_outdated_steps, grpo(&rare).max_inflight_steps), (7, Some(8)));
}

#[test]
fn train_checks() {
    assert_eq!(
        refused("[train]\nsync_weight_interval = 2\n[train.train_policy]\ntype = \"grpo\"\non_policy = true\n"),
        "run.toml:2:24: `train.sync_weight_interval` is 2, but `on_policy = true` needs 1"
    );
    assert!(
        refused("[train]\ncompile = false\nasync_tp_enabled = true\n")
            .starts_with("run.toml:3:20: `train.async_tp_enabled` needs")
    );
    assert!(
        refused("[train]\noptm_lr = {a = 1}\n")
            .starts_with("run.toml:2:11: `train.optm_lr` is a table without the key `global`")
    );
    assert!(refused("[train]\noptm_betas = [0.9, 1.0]\n").contains("each must be at least 0 and below 1"));
    assert!(refused("[train]\nmax_num_steps = 0\n").contains("must be an integer of at least 1"));
    assert!(refused("[train.ckpt]\nsave_freq = 0\n").starts_with("run.toml:2:13: `train.ckpt.save_freq` is 0"));
    assert_eq!(resolve("[train.ckpt]\nsave_freq = 0\nsave_freq_in_epoch = 1\n").config.train.ckpt.save_freq, 0);
    assert!(refused("[train.ckpt]\nupload_s3 = true\n").contains("must be `false`, `\"final\"` or `\"all\"`"));
    assert!(refused("[train.ckpt]\nupload_s3 = \"all\"\n").contains("needs `train.ckpt.s3_bucket`"));
    assert_eq!(
        refused("[train]\ntrain_batch_per_replica = 10\n[train.train_policy]\ntype = \"grpo\"\nmini_batch = 4\n"),
        "run.toml:2:27: `train.train_batch_per_replica` is 10, which 4 does not divide: `policy.parallelism.dp_shard_size` = 1 × `train.train_policy.mini_batch` = 4\n  hint: the next batch that fits is 12"
    );
}

#[test]
fn model_checks() {
    assert!(
        refused("[train]\n[policy]\nmodel_name_or_path = \"\"\n")
            .starts_with("run.toml:3:22: `policy.model_name_or_path` is empty")
    );
    assert!(
        refused("[train]\n[policy.parallelism]\ndp_shard_size = 0\n")
            .contains("`policy.parallelism.dp_shard_size` is 0")
    );
    assert!(
        refused("[train]\n[policy]\nfreeze_pattern = [\"a\"]\ntrainable_pattern = [\"b\"]\n")
            .starts_with("run.toml:4:21: ")
    );
    let lora = refused("[train]\n[policy.lora]\nr = 4\n");
    assert!(
        lora.contains("needs `train.compile = false`") && lora.contains("`policy.parallelism.tp_size = 1`, not 2"),
        "{lora}"
    );
    assert!(
        refused("[train]\ncompile = false\n[policy.lora]\ntarget_modules = \"some\"\n")
            .contains("a list or `\"all-linear\"`")
    );
    let stages = refused(
        "[train]\nfsdp_offload = true\ntrain_batch_per_replica = 8\n[policy.parallelism]\npp_size = 2\npp_micro_batch_size = 3\n",
    );
    assert!(
        stages.contains("`train.fsdp_offload` does not work") && stages.contains("= 3 does not divide"),
        "{stages}"
    );
    assert!(
        refused("[train]\n[rollout.parallelism]\ncp_size = 2\n")
            .starts_with("run.toml:3:11: `rollout.parallelism.cp_size` must keep")
    );
    assert_eq!(
        resolve("[train]\n[rollout]\nbackend = \"own\"\nparallelism.cp_size = 2\n").config.rollout.parallelism.cp_size,
        2
    );
    assert!(
        refused("[train]\n[rollout.multi_turn_config]\nenable_tools = true\ncontinue_final_message = true\n")
            .contains("exclude each other")
    );
}

const DISTIL: &str = "[train]\n[distillation]\nenable = true\n";

#[test]
fn distillation_switches() {
    let config = resolve(&format!("{DISTIL}top_k = 8\n")).config;
    assert!(grpo(&config).bypass_reward && grpo(&config).rollout_as_token_ids);
    assert!(config.distillation.trainer_token_ids_from_teacher);
    assert_eq!(config.distillation.top_k, 8);
    assert!(!resolve(&format!("{DISTIL}top_k = -1\n")).config.distillation.trainer_token_ids_from_teacher);
    assert_eq!(resolve("[train]\n[distillation]\ntop_k = 8\n").config.distillation.top_k, 0);
    let mixed = resolve(&format!("{DISTIL}[train.train_policy]\ntype = \"grpo\"\nbypass_reward = false\n")).config;
    assert!(!grpo(&mixed).bypass_reward && grpo(&mixed).rollout_as_token_ids);
    assert!(
        refused(&format!("{DISTIL}[train.train_policy]\ntype = \"sft\"\n"))
            .starts_with("run.toml:5:8: `distillation.enable = true` needs `train.train_policy.type = \"grpo\"`")
    );
    assert!(refused(&format!("{DISTIL}mini_batch = 16\n")).contains("`dp_shard_size` × `mini_batch` is 16"));
    assert!(refused(&format!("{DISTIL}parallelism.dp_shard_size = 3\n")).contains("= 3 does not divide"));
    assert!(refused(&format!("{DISTIL}parallelism.dp_replicate_size = 2\n")).contains("is 2, but must be 1"));
}

#[test]
fn validation_takes_training_rewards_and_warns_when_greedy() {
    let config = resolve(&format!("{GRPO}remote_reward.scale = 2\n")).config;
    assert_eq!(config.validation.use_remote_reward, Some(false));
    assert_eq!(config.validation.remote_reward.map(|r| r.scale), Some(2.0));
    assert!(refused("[train]\n[validation]\nuse_remote_reward = true\n").starts_with("run.toml:3:21: "));
    assert_eq!(resolve("[train.train_policy]\ntype = \"sft\"\n").config.validation.use_remote_reward, None);
    let greedy = "[train]\n[validation]\nenable = true\ntemperature = 0.6\n";
    assert!(warned(greedy).contains("`validation.top_k` is 1, so validation is greedy"), "{}", warned(greedy));
    assert_eq!(warned(&format!("{greedy}top_k = -1\n")), "");
    let upstream = format!("{DISTIL}top_k = 4\nobjective = \"cosmos_gjsd\"\n");
    assert_eq!(warned(&upstream), "");
    assert!(
        warned(&format!("{upstream}top_k_mass = \"tail\"\n"))
            .starts_with("run.toml:6:14: warning: `distillation.top_k_mass` is not used")
    );
    assert!(warned("[train]\n[policy]\nmodel_max_length = 512\n").contains("`rollout.max_response_length` is 2048"));
}

#[test]
fn plugin_grants_are_checked() {
    let config = resolve("[train]\n[plugin.math]\nallow = [\"log\", \"dir:/data:ro\"]\nsettings.level = 3\n").config;
    assert_eq!(config.plugin["math"].settings["level"], 3);
    assert_eq!(
        refused("[train]\n[plugin.math]\nallow = [\"dir:/data:rw\"]\n").lines().next(),
        Some(
            "run.toml:3:9: `plugin.math.allow` holds `\"dir:/data:rw\"`, but each must be one of `\"log\"`, `\"table\"`, `\"chat-template\"`, `\"dir:PATH:ro\"`"
        )
    );
}

#[test]
fn overrides_win_and_are_named_in_errors() {
    let set = |argument: &str| resolve_with("[train]\noptm_lr = 1e-3\n", &[argument]).config;
    assert_eq!(set("train.optm_lr=1e-5").train.optm_lr, LearningRate::One(1e-5));
    assert_eq!(set("train.timestamp=20260102030405").train.timestamp, "20260102030405");
    assert_eq!(set("redis = 12800").redis, "12800");
    assert_eq!(set("policy.model_name_or_path=Qwen/Qwen3-8B").policy.model_name_or_path, "Qwen/Qwen3-8B");
    assert_eq!(set("policy.model_name_or_path=\"a b\"").policy.model_name_or_path, "a b");
    assert_eq!(set("logging.logger=[\"console\"]").logging.logger, ["console"]);
    assert_eq!(set("train.optm_lr.global=2").train.optm_lr, LearningRate::ByModule([("global".into(), 2.0)].into()));
    assert_eq!(set("custom.a.b=x").custom["a"]["b"], "x");
    assert_eq!(set("train.resume=true").train.resume, FlagOrText::Flag(true));
    assert_eq!(set("train.resume=out/old").train.resume, FlagOrText::Text("out/old".into()));
    assert_eq!(set("plugin.p.memory_mb_max=7").plugin["p"].memory_mb_max, Some(7));
    assert_eq!(
        refused_override("train.optm_rl=1"),
        "--set train.optm_rl=1: unknown key `train.optm_rl`\n  hint: did you mean `train.optm_lr`?"
    );
    assert_eq!(
        refused_override("train.epoch=two"),
        "--set train.epoch=two: `train.epoch` is the string `\"two\"`, but must be an integer of at least 1"
    );
    assert_eq!(
        refused_override("train.epoch"),
        "--set train.epoch: `train.epoch` has no `=` between key and value\n  hint: write `--set train.optm_lr=1e-5`"
    );
    assert_eq!(refused_override("a b=1"), "--set a b=1: `a b` is not a dotted key");
    assert!(refused_override("train.epoch=1\ntrain.seed=2").contains("must be an integer"));
}

#[test]
fn places_point_at_values() {
    let resolved =
        resolve_with("[train]\n# ü\noptm_lr = 1e-3\ntrain_policy.dataset.name = \"x\"\n", &["train.epoch=3"]);
    let place = resolved.place("train.optm_lr").expect("it is in the file");
    assert_eq!((place.file.as_str(), place.line, place.column), ("run.toml", 3, 11));
    assert_eq!(&resolved.text()[place.span], "1e-3");
    assert_eq!(resolved.place("train.train_policy.dataset.name").map(|p| (p.line, p.column)), Some((4, 29)));
    assert_eq!(resolved.place("train.epoch").map(|p| p.to_string()).as_deref(), Some("--set train.epoch=3"));
    assert_eq!(resolved.place("train.seed"), None);
    assert_eq!(
        resolved.error("train.optm_lr", "`train.optm_lr` is too bold", None).to_string(),
        "run.toml:3:11: `train.optm_lr` is too bold"
    );
}

#[test]
fn what_cannot_be_run_is_refused_at_its_place() {
    let check = |text: &str| resolve(text).check_runnable().map_err(|e| e.to_string());
    assert_eq!(check(GRPO), Ok(()));
    assert_eq!(
        check("[train]\noptm_name = \"Adam8bit\"\n"),
        Err("run.toml:2:13: `train.optm_name` asks for an optimizer with 8-bit state, which is not supported\n  hint: use `\"Adam\"` or `\"AdamW\"`".into())
    );
    assert_eq!(check("[train]\n[rollout.multi_turn_config]\nenable = true\nenable_tools = true\n"), Ok(()));
    assert_eq!(check("[train]\n[rollout]\nquantization = \"int8\"\nquantize_head = true\n"), Ok(()));
    assert!(
        warned("[train]\n[rollout]\nquantize_head = true\n").contains("`rollout.quantize_head` is not used without")
    );
    assert!(refused("[train]\n[rollout]\nquantization = \"int4\"\n").contains("`\"int8\"`"));
    assert!(warned("[train]\n[host]\nenvironment = \"a/b\"\n").contains("`host.environment` is not used without"));
    for refused in [
        "[train]\nnon_text = true\n",
        "[train]\n[policy]\nis_diffusers = true\n",
        "[train]\ncompile = false\n[policy]\nlora.r = 4\nparallelism.tp_size = 1\n",
        "[train]\n[rollout.multi_turn_config]\nenable = true\ncontinue_final_message = true\n",
        "[train]\n[rollout]\nquantization = \"fp8\"\n",
        "[train]\n[rollout]\nquantization = \"int8\"\n[host]\ndevice = \"burn:flex\"\n",
        "[train.train_policy]\ntype = \"sft\"\ntrainer_type = \"own\"\n",
        &format!("{GRPO}trainer_type = \"own\"\n"),
        &format!("{GRPO}algo = \"own\"\n"),
        &format!("{GRPO}use_remote_reward = true\n"),
        &format!("{GRPO}uncentralized_training = true\n"),
    ] {
        let errors = resolve(refused).check_runnable().expect_err(refused);
        assert!(errors.problems.len() == 1 && errors.problems[0].place.is_some(), "{errors}");
    }
}

#[test]
fn explanations() {
    let rate = explain("train.optm_lr").expect("a key");
    assert_eq!(rate.default, Some(serde_json::json!(1e-6)));
    assert!(rate.doc.starts_with("Learning rate"));
    let mass = explain("distillation.top_k_mass").expect("a key");
    assert_eq!(
        mass.allowed.iter().map(|(value, _)| value.as_str()).collect::<Vec<_>>(),
        ["tail", "renormalize", "raw"]
    );
    assert!(mass.doc.contains("Not in the original"));
    let table = explain("distillation").expect("a table");
    assert!(table.keys.iter().any(|(name, doc)| name == "jsd_beta" && doc.starts_with("Mixes")));
    assert!(explain("").expect("the root").keys.iter().any(|(name, _)| name == "train"));
    assert!(explain("train.train_policy.balance_dp_token").expect("a key").doc.contains("the default is `true`"));
    assert_eq!(explain("plugin.any.call_ms_max").expect("a key").default, None);
    let error = explain("train.optm_lrr").expect_err("no such key");
    assert_eq!(error.to_string(), "there is no key `train.optm_lrr`");
    assert_eq!(error.hint().as_deref(), Some("did you mean `train.optm_lr`?"));
    assert!(explain("= 1 [").is_err());
}

/// Every key has documentation, and the schema describes what serde writes.
#[test]
fn every_key_is_documented() {
    fn walk(shape: &shape::Shape, path: &str) {
        for name in shape.key_names() {
            for (key, child) in shape.child(name) {
                let path = format!("{path}.{name}");
                let key = key.expect("a named key");
                assert!(name == "type" || key.doc.len() > 3, "{path} has no documentation");
                for choice in child.choices() {
                    assert!(
                        name == "type" || !choice.doc.is_empty(),
                        "{path} = {:?} has no documentation",
                        choice.value
                    );
                }
                walk(child, &path);
            }
        }
    }
    walk(shape::root(), "");
    let schema = schema();
    assert!(schema.pointer("/properties/train").is_some() && schema.get("$defs").is_some());
}

#[test]
fn files_that_cannot_be_read_say_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = ConfigFile::read(folder.path().join("no.toml")).expect_err("no file");
    assert!(missing.to_string().starts_with("cannot read `") && missing.hint().is_some());
    let binary = folder.path().join("binary.toml");
    std::fs::write(&binary, [b'a', b'=', 0xff]).expect("written");
    assert!(ConfigFile::read(&binary).expect_err("not text").to_string().contains("byte 2 does not belong"));
    let large = folder.path().join("large.toml");
    std::fs::write(&large, vec![b'\n'; FILE_BYTES_MAX as usize + 1]).expect("written");
    assert!(ConfigFile::read(&large).expect_err("too large").to_string().contains("more than the 1048576"));
}

fn survives_its_own_toml(resolved: &Resolved) {
    let text = resolved.to_toml().expect("TOML");
    let again = ConfigFile::parse("again.toml", &text)
        .and_then(|f| f.resolve("other"))
        .unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert_eq!(again.config, resolved.config, "{text}");
    assert_eq!(again.to_toml().expect("TOML"), text);
}

#[test]
fn a_resolved_configuration_resolves_to_itself() {
    for text in [
        "",
        "[train]\n",
        "[train]\n[distillation]\ntop_k = 8\n",
        &format!("{DISTIL}top_k = 8\nkl_clip = 0.1\n[train.train_policy]\ntype = \"grpo\"\nbypass_reward = false\n"),
        &format!("{GRPO}dataloader_batch_size = -1\nmax_inflight_steps = 1\nvariant = \"dapo\"\non_policy = true\n"),
        "[train]\nsync_weight_interval = 4\ncoalesce_weight_sync = true\noptm_lr = [1, 2]\n[custom]\na.b = [1, {c = 1.5}]\n[plugin.\"x y\"]\ncall_ms_max = 5\n",
        "[train]\ncompile = false\n[train.train_policy]\ntype = \"sft\"\n[policy]\ntrainable_map.\"a.b\" = false\n[policy.lora]\nr_pattern = {\"^a\\\\.b$\" = 3}\n",
    ] {
        // Without `[train]` nothing dates the run, and what is written has one.
        let resolved = if text.is_empty() { resolve_with(text, &["train.timestamp=x"]) } else { resolve(text) };
        survives_its_own_toml(&resolved);
    }
}

#[test]
fn serde_reads_what_it_writes() {
    let config = resolve(&format!("{DISTIL}top_k = 8\n")).config;
    let text = serde_json::to_string(&config.to_json()).expect("JSON");
    assert_eq!(serde_json::from_str::<Config>(&text).expect("a config"), config);
}

/// The shipped presets load without a complaint that upstream's files do not have, and mean the same as those.
#[test]
fn presets_mean_the_same_as_upstreams() {
    let upstream = repo_root().join("../shared/golden/configs");
    let fixed = ["train.timestamp=x".to_string(), "train.output_dir=out".to_string()];
    let load = |path: &Path| {
        let mut file = ConfigFile::read(path).unwrap_or_else(|e| panic!("{e}"));
        file.set(&fixed).unwrap_or_else(|e| panic!("{e}"));
        file.resolve(NOW).unwrap_or_else(|e| panic!("{}:\n{e}", path.display()))
    };
    let presets =
        ["qwen3/qwen3-8b-distill", "qwen3/qwen3-8b-distill-deepmath", "qwen2-5/qwen2-5-1.5b-distill-countdown"];
    for preset in presets {
        let ours = repo_root().join(format!("configs/{preset}.toml"));
        let resolved = load(&ours);
        assert!(resolved.config.distillation.enable);
        assert!(resolved.warnings.iter().all(|w| !w.message.contains("unknown key")), "{:?}", resolved.warnings);
        survives_its_own_toml(&resolved);
        let theirs = upstream.join(ours.file_name().expect("a file has a name"));
        if theirs.exists() {
            // Grants are ours alone: upstream runs its scripts unsandboxed.
            let without_grants = Config { plugin: Default::default(), ..resolved.config };
            assert_eq!(without_grants, load(&theirs).config, "{preset}");
        } else {
            eprintln!("skipped: `{}` is not there to compare with", theirs.display());
        }
    }
}

#[test]
fn the_originals_messages_have_limits() {
    let wire = |more: &str| {
        let head =
            "[train]\n[train.train_policy]\ntype = \"grpo\"\n[distillation]\nenable = true\nwire = \"cosmos-rl\"\n";
        resolve(&format!("{head}{more}\n")).check_runnable().map_err(|e| e.to_string())
    };
    assert_eq!(wire("top_k = 0"), Ok(()));
    let whole = wire("top_k = -1").unwrap_err();
    assert!(whole.contains("`distillation.top_k` asks for the whole vocabulary in the original's messages"), "{whole}");
    let theirs = wire("top_k = 4\ntop_k_support = \"teacher\"").unwrap_err();
    assert!(theirs.contains("`distillation.top_k_support` asks for candidates"), "{theirs}");
}

/// `COSMOS_WRITE_REFERENCE=1` writes the page anew.
#[test]
fn the_reference_page_is_up_to_date() {
    let path = repo_root().join("docs/config.md");
    let page = markdown_reference();
    if std::env::var_os("COSMOS_WRITE_REFERENCE").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("docs/");
        std::fs::write(&path, &page).expect("written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == page, "docs/config.md is old: run the tests of `cosmos-config` with COSMOS_WRITE_REFERENCE=1");
}

#[test]
fn deep_nesting_is_no_stack_overflow() {
    let lists = format!("[train]\n[custom]\nx = {}{}", "[".repeat(5000), "]".repeat(5000));
    assert!(refused(&lists).contains("this is not TOML"));
    let mixed = format!("[train]\n[custom]\nx = {}1{}", "{a.a.a.a.a.a.a.a.a.a.a.a = ".repeat(70), "}".repeat(70));
    assert!(resolve(&mixed).config.custom.contains_key("x"));
}

/// Lines that are nearly configurations.
fn lines() -> impl Strategy<Value = String> {
    let key = prop_oneof![
        Just("train.optm_lr"),
        Just("train.train_policy"),
        Just("[train]"),
        Just("[distillation]"),
        Just("top_k"),
        Just("train.train_policy.type"),
        Just("seed"),
        Just("\"\""),
        Just("[[plugin]]"),
        Just("[plugin.x]"),
        Just("allow"),
        Just("dataloader_batch_size"),
        Just("[train.train_policy.remote_reward]"),
        Just("reward_fns"),
        Just("policy.lora"),
    ];
    let value = prop_oneof![
        Just("1"),
        Just("-1"),
        Just("1e400"),
        Just("nan"),
        Just("\"grpo\""),
        Just("{a = 1}"),
        Just("[1, \"x\", {}]"),
        Just("1979-05-27"),
        Just("true"),
        Just("9223372036854775807"),
        Just("{global = 0.1}"),
        Just("[[1], [2]]"),
        Just("'é"),
    ];
    let line = (key, value)
        .prop_map(|(key, value)| if key.starts_with('[') { format!("{key}\n") } else { format!("{key} = {value}\n") });
    proptest::collection::vec(line, 0..8).prop_map(|lines| lines.concat())
}

fn never_panics(text: &str, overrides: &[String]) {
    let Ok(mut file) = ConfigFile::parse("any.toml", text) else { return };
    let _ = file.set(overrides);
    match file.resolve(NOW) {
        Ok(resolved) => {
            let _ = resolved.to_toml();
        }
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>(), key in any::<String>(), value in any::<String>()) {
        never_panics(&text, &[format!("{key}={value}"), key.clone()]);
        let _ = explain(&key);
    }

    #[test]
    fn nothing_like_a_configuration_panics(text in lines(), set in lines()) {
        let overrides: Vec<String> = set.lines().map(|line| line.replace(" = ", "=")).collect();
        never_panics(&text, &overrides);
    }

    #[test]
    fn what_resolves_resolves_to_itself(text in lines()) {
        if let Ok(resolved) = ConfigFile::parse("any.toml", &text).and_then(|f| f.resolve(NOW))
            && !resolved.config.train.timestamp.is_empty()
        {
            survives_its_own_toml(&resolved);
        }
    }
}

#[test]
fn datasets_and_rewards_of_the_host_are_names_lists_or_weights() {
    let text = "[train]\n[host]\ntrain_dataset = { \"a/x\" = 2, b = 0.5 }\nvalidation_dataset = \"a/y\"\n[host.rewards]\n\"a/x\" = \"r\"\nb = [\"p\", \"q\"]\nc = { r = 0.1 }\n";
    let resolved = resolve(text);
    let host = &resolved.config.host;
    assert_eq!(host.train_dataset.as_ref().unwrap().entries(), [("a/x", Some(2.0)), ("b", Some(0.5))]);
    assert_eq!(host.validation_dataset, Some(OneOrMany::One("a/y".into())));
    assert_eq!(host.rewards["b"].weights, [("p".to_string(), 1.0), ("q".to_string(), 1.0)].into());
    assert_eq!(host.rewards["c"].weights["r"], 0.1);
    // What is written back means the same.
    let again = resolve(&resolved.to_toml().unwrap());
    assert_eq!(again.config, resolved.config);
    assert!(
        refused("[train]\n[host]\ntrain_dataset = 3\n")
            .starts_with("run.toml:3:17: `host.train_dataset` is the integer")
    );
}

#[test]
fn names_and_settings_have_their_places() {
    let text = "[train]\n[host]\ntrain_dataset = { \"a/x\" = 2 }\nvalidation_dataset = [\"v\", \"w\"]\n[custom.game]\nlist = [1, 2]\n";
    let resolved = resolve(text);
    let at = |place: Option<Place>| place.map(|p| (p.line, p.column));
    assert_eq!(at(resolved.place_of_name(&["host", "train_dataset"], "a/x")), Some((3, 19)));
    assert_eq!(at(resolved.place_of_name(&["host", "validation_dataset"], "w")), Some((4, 28)));
    assert_eq!(at(resolved.place_of_name(&["host", "validation_dataset"], "x")), None);
    assert_eq!(at(resolved.place_of_name(&["host", "rewards"], "x")), None);
    assert_eq!(at(resolved.nearest_place(&["custom", "game", "list", "1"])), Some((6, 12)));
    // What is missing is missing from its table.
    assert_eq!(at(resolved.nearest_place(&["custom", "game", "max"])).map(|(line, _)| line), Some(5));
    assert_eq!(at(resolved.nearest_place(&["plugin", "x"])), None);
}

const TWO_TEACHERS: &str = "[train]\n[train.train_policy]\ntype = \"grpo\"\n[distillation]\nenable = true\n\
    [[distillation.teachers]]\nname = \"math\"\nmodel_name_or_path = \"m\"\nweight = 2.0\ndatasets = [\"gsm8k/train\"]\n\
    [[distillation.teachers]]\nname = \"code\"\nmodel_name_or_path = \"c\"\nmini_batch = 4\n\
    [distillation.teachers.parallelism]\nn_init_replicas = 3\n";

#[test]
fn several_teachers_stand_in_a_list() {
    let resolved = resolve(TWO_TEACHERS);
    let teachers = resolved.config.distillation.each_teacher();
    assert_eq!(teachers.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["math", "code"]);
    assert_eq!((teachers[0].weight, teachers[1].weight), (2.0, 1.0));
    assert_eq!((teachers[0].mini_batch, teachers[1].mini_batch), (None, Some(4)));
    assert_eq!(teachers[1].parallelism.as_ref().map(|p| p.n_init_replicas), Some(3));
    assert_eq!(teachers[0].datasets.as_deref(), Some(&["gsm8k/train".to_string()][..]));
    survives_its_own_toml(&resolved);
    // The simple form is one teacher.
    let one =
        resolve("[train]\n[distillation]\nmodel_name_or_path = \"m\"\nmodel_revision = \"r\"\n").config.distillation;
    let [teacher] = one.each_teacher().try_into().unwrap();
    assert_eq!((teacher.name.as_str(), teacher.model_name_or_path.as_str(), teacher.weight), ("teacher", "m", 1.0));
    assert_eq!(teacher.model_revision.as_deref(), Some("r"));
    let explained = explain("distillation.teachers.weight").unwrap();
    assert!(explained.doc.contains("mixture") && explained.default == Some(1.0.into()), "{explained:?}");
}

#[test]
fn teachers_that_make_no_sense_are_refused_at_their_place() {
    let said = |from: &str, to: &str| refused(&TWO_TEACHERS.replace(from, to));
    assert!(said("\"code\"", "\"math\"").contains("run.toml:12:8: two teachers have the name `math`"));
    assert!(said("\"code\"", "\"a/b\"").contains("run.toml:12:8: teacher a/b has no plain `name`"));
    assert!(said("name = \"code\"\n", "").contains("teacher number 2 has no plain `name`"));
    assert!(said("weight = 2.0", "weight = 0").contains("run.toml:9:10: the `weight` of teacher `math` is 0"));
    assert!(said("weight = 2.0", "weight = -1").contains("is -1, but must be above 0"));
    assert!(said("[\"gsm8k/train\"]", "[]").contains("run.toml:10:12: teacher `math` answers for no dataset"));
    assert!(said("model_name_or_path = \"c\"\n", "").contains("teacher `code` has no `model_name_or_path`"));
    assert!(
        said("n_init_replicas = 3", "dp_replicate_size = 2")
            .contains("`parallelism.dp_replicate_size` of teacher `code` is 2")
    );
    let both = said("enable = true\n", "enable = true\nmodel_name_or_path = \"m\"\n");
    assert!(
        both.contains("`distillation.model_name_or_path` and `[[distillation.teachers]]` exclude each other"),
        "{both}"
    );
    let wrong = warned(&TWO_TEACHERS.replace("mini_batch = 4", "mini_batches = 4"));
    assert!(wrong.contains("distillation.teachers[1].mini_batches"), "{wrong}");
}

#[test]
fn an_update_within_the_backward_is_refused_where_it_cannot_be() {
    let always = |train: &str, policy: &str| {
        format!(
            "[train]\ntrain_batch_per_replica = 8\n{train}[train.train_policy]\ntype = \"grpo\"\n{policy}[host]\nupdate_in_backward = \"always\"\n"
        )
    };
    let fits = resolve(&always("optm_grad_norm_clip = 0\n", "mini_batch = 8\n")).config;
    assert_eq!(fits.host.update_in_backward, UpdateInBackward::Always);
    let clipped = refused(&always("", "mini_batch = 8\n"));
    assert!(clipped.starts_with(
        "run.toml:7:22: `host.update_in_backward = \"always\"`, but gradients are clipped to a norm of 1"
    ));
    assert!(clipped.contains("set `train.optm_grad_norm_clip = 0`"), "{clipped}");
    let several = refused(&always("optm_grad_norm_clip = 0\n", "mini_batch = 2\n"));
    assert!(several.contains("4 micro-batches: 8 samples, 2 at a time"), "{several}");
    assert!(several.contains("set `train.train_policy.mini_batch` = 8"), "{several}");
    let smaller = always("optm_grad_norm_clip = 0\n", "mini_batch = 2\nbatch_size_per_optimize = 2\n");
    assert_eq!(resolve(&smaller).config.host.update_in_backward, UpdateInBackward::Always);
    // Elsewhere it is left to the run, which knows.
    assert_eq!(resolve("[train]\n").config.host.update_in_backward, UpdateInBackward::Auto);
}
