//! From a configuration to everything a run needs. All checks happen here: nothing is written before they pass.

use std::path::{Path, PathBuf};

use cosmos_config::{Config, Resolved};
use cosmos_data::order::Order;
use cosmos_engine::model::{GenerationConfig, Model, ModelConfig};
use serde_json::Value;

use crate::choose::{self, Common, Filter};
use crate::controller::Policy;
use crate::conversation::Conversations;
use crate::error::{Result, Role, RunError};
use crate::mixture::{Mixture, Part, Schedule};
use crate::offers::{OfferRole, Offered};
use crate::plan::{Plan, Use};
use crate::plugins::Plugins;
use crate::policy::PolicyRole;
use crate::rewards::RewardSet;
use crate::rollout::{Sampling, fetch, training_sampling, validation_sampling};
use crate::task::{Dataset, Item, Text, column_dataset};
use crate::teacher::{TeacherRole, Wanted, check_widths};
use crate::validation::Validation;

/// Held-out prompts on which the KL is measured.
const KL_PROMPTS: usize = 128;
/// Prompts with which an environment is tried before the run starts.
const PROMPTS_TRIED: usize = 8;
const TEMPLATE_KEY: &str = "rollout.multi_turn_config.custom_chat_template_path";
/// Prompts looked at before the run starts.
const PROMPTS_CHECKED: u64 = 64;

/// What kind of run a configuration asks for.
pub enum Kind {
    /// Distillation, or GRPO where there is no teacher.
    Policy {
        /// The training step.
        role: Box<PolicyRole>,
        /// How completions are sampled.
        sampling: Box<Sampling>,
        /// The rewards of training completions, unless bypassed.
        rewards: Option<RewardSet>,
        /// The teacher, when distilling.
        teacher: Option<Box<TeacherRole>>,
        /// The frozen copy that `kl_beta` pulls towards.
        reference: Option<Box<dyn Model>>,
    },
    /// Training on given responses.
    Sft {
        /// Samples per forward and backward.
        mini_batch: usize,
        /// Ends a response.
        end_id: Option<u32>,
    },
}

impl Kind {
    /// `distillation`, `grpo` or `sft`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Policy { teacher: Some(_), .. } => "distillation",
            Self::Policy { teacher: None, .. } => "grpo",
            Self::Sft { .. } => "sft",
        }
    }
}

/// Everything a run needs, checked.
pub struct Prepared {
    /// The configuration.
    pub resolved: Resolved,
    /// The student's folder.
    pub student_folder: PathBuf,
    /// The student's shape.
    pub student_config: ModelConfig,
    /// Its tokenizer and chat template.
    pub text: Text,
    /// The plugins, kept alive and named in the records.
    pub plugins: Plugins,
    /// Training prompts.
    pub dataset: Mixture,
    /// Their order.
    pub schedule: Schedule,
    /// What of the plugins the run uses.
    pub uses: Vec<Use>,
    /// Who talks with the student, where completions are conversations.
    pub conversations: Option<Conversations>,
    /// Held-out prompts, when validation is on.
    pub validation: Option<Validation>,
    /// Kind of run.
    pub kind: Kind,
    /// What the controller needs to know.
    pub policy: Policy,
}

impl Prepared {
    /// What the run will do.
    pub fn plan(&self) -> Result<Plan> {
        let teacher = match &self.kind {
            Kind::Policy { teacher: Some(teacher), .. } => Some(teacher.model.config()),
            _ => None,
        };
        let config = &self.resolved.config;
        let prompts = self.validation.as_ref().map_or(0, |v| v.jobs.len() as u64);
        let mini_batch = config.train.train_policy.mini_batch() as u64;
        let plan =
            Plan::new(config, &self.policy, self.kind.name(), prompts, &self.student_config, teacher, mini_batch);
        Ok(plan.with_plugins(&self.plugins, self.uses.clone()))
    }
}

/// `file:line:column: ` of a key, or nothing when it was not given.
pub fn place(resolved: &Resolved, key: &str) -> String {
    resolved.place(key).map(|p| format!("{p}: ")).unwrap_or_default()
}

/// The first of several problems, with the number of the others.
fn first_problem(errors: cosmos_config::ConfigErrors) -> RunError {
    let others = match errors.problems.len() {
        0 | 1 => String::new(),
        n => format!(" (and {} more problem(s))", n - 1),
    };
    match errors.problems.into_iter().next() {
        Some(problem) => RunError::config(
            problem.place.map(|p| format!("{p}: ")).unwrap_or_default(),
            problem.message + &others,
            problem.hint.unwrap_or_default(),
        ),
        None => RunError::config("", "the configuration cannot be run", ""),
    }
}

/// Text in and out of a model folder, with the chat template that the configuration puts in place of the model's.
pub(crate) fn text(config: &Config, folder: &Path) -> Result<Text> {
    let text = Text::load(folder)?;
    let turns = &config.rollout.multi_turn_config;
    match turns.custom_chat_template_path.as_deref().filter(|_| turns.enable) {
        Some(path) if !Path::new(path).is_file() => Err(RunError::config(
            "",
            format!("`{TEMPLATE_KEY}` = `{path}` is not a file"),
            "give the path of a Jinja template, or leave it out to use the student's own",
        )),
        Some(path) => text.with_template(Path::new(path), folder),
        None => Ok(text),
    }
}

/// Loads and checks everything.
pub fn prepare(resolved: Resolved, plugin_paths: &[PathBuf]) -> Result<Prepared> {
    let config = &resolved.config;
    resolved.check_runnable().map_err(first_problem)?;
    let student_folder = model_folder(
        &resolved,
        "policy.model_name_or_path",
        &config.policy.model_name_or_path,
        config.policy.model_revision.as_deref(),
    )?;
    let student_config = ModelConfig::from_folder(&student_folder).role("student")?;
    let text = text(config, &student_folder).map_err(|e| e.at(|| place(&resolved, TEMPLATE_KEY)))?;
    check_tokenizer(&text, &student_config, &student_folder)?;
    check_batches(&resolved)?;
    check_context(&resolved, &student_config)?;
    let plugins = Plugins::load(plugin_paths, &resolved, Some(&text))?;
    let chosen = Chosen::new(&resolved, &plugins)?;
    let mut uses = Vec::new();
    let mut dataset = training_dataset(&resolved, &plugins, chosen.train)?;
    uses.extend(Use::datasets(&dataset, OfferRole::Train));
    let (shuffle, seed) = match (config.train.train_policy.grpo(), config.train.train_policy.sft()) {
        (Some(g), _) => (g.dataloader_shuffle, g.dataloader_seed),
        (_, Some(s)) => (s.dataloader_shuffle, s.dataloader_seed),
        _ => (true, 0),
    };
    let order = Order { seed: seed as u64, shuffle };
    check_prompts(&resolved, &mut dataset, &order, &text)?;
    let schedule = schedule(&dataset, order);
    let generation = GenerationConfig::from_folder(&student_folder, &student_config).role("student")?;
    let conversations = conversations(&resolved, &plugins, &mut dataset, &order, &text, &generation)?;
    uses.extend(conversations.iter().map(|c| Use::environment(c.plugin(), c.name())));
    let rewards = training_rewards(&resolved, &plugins, &dataset, chosen.training_rewards, chosen.filter, &mut uses)?;
    let holds = conversations.is_some();
    let kind = kind(&resolved, rewards, &text, &student_folder, &student_config, &generation, holds)?;
    let validation = match chosen.validation {
        Some((datasets, rewards)) => {
            Some(validation(&resolved, &plugins, &text, &generation, datasets, rewards, &mut uses)?)
        }
        None => None,
    };
    warn_of_idle_plugins(&plugins, &uses);
    let policy = controller_policy(&resolved, schedule.epoch_len(), &kind, validation.is_some())?;
    Ok(Prepared {
        student_folder,
        student_config,
        text,
        plugins,
        dataset,
        schedule,
        uses,
        conversations,
        validation,
        kind,
        policy,
        resolved,
    })
}

/// Offers of plugins, with weights where they are mixed by weight; none: columns of a table.
type Datasets = Option<Vec<(Offered, Option<f64>)>>;

/// What the configuration names of the plugins: all of it is looked up before anything is opened.
struct Chosen {
    train: Datasets,
    training_rewards: Common,
    filter: Option<Filter>,
    /// When validation is on.
    validation: Option<(Datasets, Common)>,
}

impl Chosen {
    fn new(resolved: &Resolved, plugins: &Plugins) -> Result<Self> {
        Ok(Self {
            train: choose::datasets(resolved, plugins, OfferRole::Train)?,
            training_rewards: choose::training_rewards(resolved, plugins)?,
            filter: choose::filter(resolved, plugins)?,
            validation: match resolved.config.validation.enable {
                true => Some((
                    choose::datasets(resolved, plugins, OfferRole::Validation)?,
                    choose::validation_rewards(resolved, plugins)?,
                )),
                false => None,
            },
        })
    }
}

/// The order of the prompts.
fn schedule(dataset: &Mixture, order: Order) -> Schedule {
    let lens = dataset.parts().iter().map(|part| part.dataset.len()).collect();
    let weights: Option<Vec<f64>> = dataset.parts().iter().map(|part| part.weight).collect();
    Schedule::new(order, lens, weights.as_deref())
}

/// Who talks with the student, tried on the first prompts; none when completions are single answers.
fn conversations(
    resolved: &Resolved,
    plugins: &Plugins,
    dataset: &mut Mixture,
    order: &Order,
    text: &Text,
    generation: &GenerationConfig,
) -> Result<Option<Conversations>> {
    let config = &resolved.config;
    let at = || {
        let key =
            if config.host.environment.is_some() { "host.environment" } else { "rollout.multi_turn_config.enable" };
        place(resolved, key)
    };
    let Some(mut conversations) = Conversations::open(resolved, plugins).map_err(|e| e.at(at))? else {
        return Ok(None);
    };
    let first: Vec<u64> = order.indices(dataset.len(), 1).into_iter().take(PROMPTS_TRIED).collect();
    let items: Vec<Item> = dataset.get(&first, text)?.into_iter().flatten().collect();
    let sampling = training_sampling(config, generation.eos_token_ids.clone(), 0, 0);
    conversations.check(&items, text, &sampling).map_err(|e| e.at(at))?;
    Ok(Some(conversations))
}

fn warn_of_idle_plugins(plugins: &Plugins, uses: &[Use]) {
    for loaded in plugins.iter() {
        let name = &loaded.plugin.info().name;
        if !uses.iter().any(|u| u.plugin == *name) {
            tracing::warn!("plugin `{name}` ({}) is loaded, but nothing of it is used", loaded.path.display());
        }
    }
}

pub(crate) fn json_of(value: &impl serde::Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// The folder of a model: a path, else a snapshot in the hub's cache, downloaded if need be.
pub fn model_folder(resolved: &Resolved, key: &str, name: &str, revision: Option<&str>) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let looks_like_a_path = name.starts_with(['.', '/', '~']) || name.matches('/').count() != 1;
    if looks_like_a_path {
        return Err(RunError::config(
            place(resolved, key),
            format!("`{key}` = `{name}` is not a folder"),
            "give the folder that holds `config.json`, `tokenizer.json` and the safetensors, or a hub id such as `Qwen/Qwen3-8B`",
        ));
    }
    let hub = cosmos_data::dataset::HubOptions::from_env();
    let repository = hub.cache_dir.join(format!("models--{}", name.replace('/', "--")));
    let revision = revision.unwrap_or("main");
    let commit = std::fs::read_to_string(repository.join("refs").join(revision)).map(|t| t.trim().to_string());
    let snapshot = repository.join("snapshots").join(commit.as_deref().unwrap_or(revision));
    if snapshot.is_dir() {
        return Ok(snapshot);
    }
    Err(RunError::config(
        place(resolved, key),
        format!("`{key}` = `{name}` is neither a folder nor a model in the hub cache {}", hub.cache_dir.display()),
        format!(
            "download it first (`huggingface-cli download {name}`) or give its folder; downloading models is not there yet"
        ),
    ))
}

fn check_tokenizer(text: &Text, model: &ModelConfig, folder: &Path) -> Result<()> {
    let end = text.tokenizer.id_end() as usize;
    if end > model.vocab_size {
        return Err(RunError::config(
            "",
            format!(
                "{}: the tokenizer has ids up to {}, but the model's vocabulary ends at {}",
                folder.display(),
                end - 1,
                model.vocab_size
            ),
            "use the tokenizer that belongs to the model",
        ));
    }
    Ok(())
}

fn check_batches(resolved: &Resolved) -> Result<()> {
    let config = &resolved.config;
    let (batch, mini) = (config.train.train_batch_per_replica, config.train.train_policy.mini_batch());
    let shards = config.policy.parallelism.dp_shard_size.max(1) as usize;
    if mini == 0 || batch % (mini * shards) != 0 {
        return Err(RunError::config(
            place(resolved, "train.train_batch_per_replica"),
            format!(
                "`train.train_batch_per_replica` = {batch} does not divide into mini-batches of {mini} on {shards} data-parallel shard(s)"
            ),
            format!("use a multiple of {}", mini.max(1) * shards),
        ));
    }
    Ok(())
}

fn check_context(resolved: &Resolved, model: &ModelConfig) -> Result<()> {
    let wanted = resolved.config.policy.model_max_length;
    if wanted > model.max_position_embeddings {
        return Err(RunError::config(
            place(resolved, "policy.model_max_length"),
            format!(
                "`policy.model_max_length` = {wanted} is beyond the model's {} positions (`max_position_embeddings`)",
                model.max_position_embeddings
            ),
            format!("use at most {}", model.max_position_embeddings),
        ));
    }
    Ok(())
}

/// Looks at the first prompts of each dataset, in its own order.
fn check_prompts(resolved: &Resolved, dataset: &mut Mixture, order: &Order, text: &Text) -> Result<()> {
    let context = resolved.config.policy.model_max_length;
    for part in 0..dataset.parts().len() {
        let (start, len) = (dataset.start(part), dataset.parts()[part].dataset.len());
        let first: Vec<u64> = order.indices(len, 1).into_iter().take(PROMPTS_CHECKED as usize).collect();
        let indices: Vec<u64> = first.iter().map(|index| start + index).collect();
        let mut last_failure = None;
        let mut good = 0;
        for (index, item) in first.iter().zip(dataset.get(&indices, text)?) {
            match item {
                Ok(item) if item.prompt_ids.len() >= context => {
                    return Err(RunError::config(
                        place(resolved, "policy.model_max_length"),
                        format!(
                            "prompt {index} has {} tokens, but `policy.model_max_length` = {context} must hold prompt and completion",
                            item.prompt_ids.len()
                        ),
                        "raise `policy.model_max_length` or leave long prompts out of the dataset",
                    ));
                }
                Ok(_) => good += 1,
                Err(reason) => last_failure = Some((index, reason)),
            }
        }
        if let (Some((index, reason)), 0) = (last_failure, good) {
            let of = match dataset.parts() {
                [_] => String::new(),
                parts => format!(" of `{}`", parts[part].name),
            };
            return Err(RunError::config(
                place(resolved, "train.train_policy.dataset.name"),
                format!("none of the first {} prompts{of} can be used; prompt {index}: {reason}", first.len()),
                "`plugin inspect` shows what the plugin expects",
            ));
        }
    }
    Ok(())
}

/// Opens datasets that plugins offer.
fn plugin_datasets(
    resolved: &Resolved,
    plugins: &Plugins,
    chosen: Vec<(Offered, Option<f64>)>,
    role: OfferRole,
) -> Result<Mixture> {
    let parts = chosen.into_iter().map(|(offered, weight)| {
        let dataset = plugins.open_dataset(resolved, &offered, role)?;
        Ok(Part { name: offered.full(), offered: Some(offered), weight, dataset })
    });
    Ok(Mixture::new(parts.collect::<Result<Vec<_>>>()?))
}

/// Columns of a table as the only dataset.
fn only_columns(name: &str, dataset: Dataset) -> Mixture {
    Mixture::new(vec![Part { name: format!("columns of {name}"), offered: None, weight: None, dataset }])
}

/// An empty dataset leaves nothing to do.
fn check_filled(resolved: &Resolved, dataset: &Mixture, role: OfferRole, key: &str, hint: &str) -> Result<()> {
    let Some(part) = dataset.parts().iter().find(|part| part.dataset.is_empty()) else { return Ok(()) };
    let which = if dataset.parts().len() > 1 { format!(" `{}`", part.name) } else { String::new() };
    Err(RunError::config(place(resolved, key), format!("the {} dataset{which} is empty", role.word()), hint))
}

fn training_dataset(resolved: &Resolved, plugins: &Plugins, chosen: Datasets) -> Result<Mixture> {
    let dataset = match chosen {
        Some(chosen) => plugin_datasets(resolved, plugins, chosen, OfferRole::Train)?,
        None => training_columns(resolved)?,
    };
    let hint = "choose another split or dataset";
    check_filled(resolved, &dataset, OfferRole::Train, "train.train_policy.dataset.name", hint)?;
    Ok(dataset)
}

fn training_columns(resolved: &Resolved) -> Result<Mixture> {
    let policy = &resolved.config.train.train_policy;
    let (name, table) = (&policy.dataset().name, json_of(policy.dataset()));
    if name.is_empty() && policy.dataset().local_dir.is_empty() {
        return Err(RunError::config(
            place(resolved, "train.train_policy.dataset.name"),
            "there is nothing to train on: no plugin offers a training dataset and `train.train_policy.dataset.name` is empty",
            "pass `--plugin FILE.wasm`, or name a dataset",
        ));
    }
    let dataset = match (policy.grpo(), policy.sft()) {
        (Some(g), _) if !g.prompt_column_name.is_empty() => {
            column_dataset(&table, &g.prompt_column_name, &g.response_column_name, false, "")
        }
        (_, Some(s)) if !s.prompt_column_name.is_empty() => {
            column_dataset(&table, &s.prompt_column_name, &s.response_column_name, false, &s.system_prompt)
        }
        (_, Some(s)) => column_dataset(&table, &s.conversation_column_name, "", true, &s.system_prompt),
        _ => Err(RunError::config(
            place(resolved, "train.train_policy.prompt_column_name"),
            "without a plugin dataset `train.train_policy.prompt_column_name` must name the column of the prompts",
            "name it, or pass `--plugin FILE.wasm`",
        )),
    }?;
    Ok(only_columns(name, dataset))
}

/// Opens the rewards of training, unless they are bypassed.
fn training_rewards(
    resolved: &Resolved,
    plugins: &Plugins,
    dataset: &Mixture,
    common: Common,
    filter: Option<Filter>,
    uses: &mut Vec<Use>,
) -> Result<Option<RewardSet>> {
    let Some(grpo) = resolved.config.train.train_policy.grpo() else { return Ok(None) };
    if grpo.bypass_reward && !resolved.config.host.score_bypassed {
        return Ok(None);
    }
    let routes = choose::routes(resolved, plugins, dataset.parts(), common, OfferRole::Train)?;
    let set = RewardSet::open(resolved, plugins, OfferRole::Train, &routes, filter.as_ref())?;
    uses.extend(Use::rewards(dataset, &routes, OfferRole::Train));
    if let Some(Filter::Terms(terms)) = &filter {
        uses.extend(terms.iter().map(|offered| Use::reward(offered, OfferRole::Filter, None, None)));
    }
    Ok(set)
}

fn kind(
    resolved: &Resolved,
    rewards: Option<RewardSet>,
    text: &Text,
    student_folder: &Path,
    student: &ModelConfig,
    generation: &GenerationConfig,
    holds_conversations: bool,
) -> Result<Kind> {
    let config = &resolved.config;
    let Some(grpo) = config.train.train_policy.grpo() else {
        let mini_batch = config.train.train_policy.mini_batch();
        return Ok(Kind::Sft { mini_batch, end_id: generation.eos_token_ids.first().copied() });
    };
    let role = PolicyRole::new(config, grpo)?;
    let mut candidates = 0;
    let teacher = if config.distillation.enable {
        let teacher = teacher(resolved, text, student, &role)?;
        if !config.distillation.rollout_top_k_recompute {
            candidates = teacher.wanted().student_candidates();
        }
        Some(Box::new(teacher))
    } else {
        None
    };
    if teacher.is_none() && (rewards.is_none() && !holds_conversations || grpo.bypass_reward) {
        return Err(RunError::config(
            place(resolved, "distillation.enable"),
            match grpo.bypass_reward {
                true => {
                    "there is nothing to learn from: distillation is off and `train.train_policy.bypass_reward` is on"
                }
                false => "there is nothing to learn from: distillation is off and no plugin offers a training reward",
            },
            "set `distillation.enable = true`, or pass a plugin with a training reward",
        ));
    }
    let reference = if grpo.kl_beta != 0.0 {
        Some(cosmos_engine::model::load(student_folder, &config.host.device).role("reference")?)
    } else {
        None
    };
    let seed = config.rollout.seed.or(config.train.seed).unwrap_or(0) as u64;
    let sampling = training_sampling(config, generation.eos_token_ids.clone(), candidates, seed);
    Ok(Kind::Policy { role: Box::new(role), sampling: Box::new(sampling), rewards, teacher, reference })
}

fn teacher(resolved: &Resolved, text: &Text, student: &ModelConfig, role: &PolicyRole) -> Result<TeacherRole> {
    let config = &resolved.config;
    let key = "distillation.model_name_or_path";
    let folder = model_folder(
        resolved,
        key,
        &config.distillation.model_name_or_path,
        config.distillation.model_revision.as_deref(),
    )?;
    let tokenizer = cosmos_data::tokenizer::Tokenizer::load(&folder)?;
    if let Some(difference) = text.tokenizer.first_difference(&tokenizer) {
        return Err(RunError::config(
            place(resolved, key),
            format!("student and teacher have different vocabularies: {difference}"),
            "choose a teacher with the student's tokenizer; mapping between tokenizers is not there yet",
        ));
    }
    let model = cosmos_engine::model::load(&folder, &config.host.device).role("teacher")?;
    let wanted = Wanted::new(config, &role.spec);
    check_widths(student.vocab_size, model.config().vocab_size, &wanted, place(resolved, "distillation.top_k"))?;
    if config.policy.model_max_length > model.config().max_position_embeddings {
        return Err(RunError::config(
            place(resolved, "policy.model_max_length"),
            format!(
                "`policy.model_max_length` is beyond the teacher's {} positions",
                model.config().max_position_embeddings
            ),
            format!("use at most {}", model.config().max_position_embeddings),
        ));
    }
    Ok(TeacherRole::new(model, wanted))
}

fn validation(
    resolved: &Resolved,
    plugins: &Plugins,
    text: &Text,
    generation: &GenerationConfig,
    datasets: Datasets,
    common: Common,
    uses: &mut Vec<Use>,
) -> Result<Validation> {
    let config = &resolved.config;
    let mut dataset = match datasets {
        Some(chosen) => plugin_datasets(resolved, plugins, chosen, OfferRole::Validation)?,
        None => validation_columns(resolved)?,
    };
    let hint = "choose another split or size";
    check_filled(resolved, &dataset, OfferRole::Validation, "validation.dataset.name", hint)?;
    let indices: Vec<(u64, u64)> = (0..dataset.len()).map(|i| (i, i)).collect();
    let mut failed = 0;
    let jobs = fetch(&mut dataset, text, &indices, &mut failed)?;
    let routes = choose::routes(resolved, plugins, dataset.parts(), common, OfferRole::Validation)?;
    let rewards = RewardSet::open(resolved, plugins, OfferRole::Validation, &routes, None)?;
    uses.extend(Use::datasets(&dataset, OfferRole::Validation));
    uses.extend(Use::rewards(&dataset, &routes, OfferRole::Validation));
    // Not the training seed: its random streams are keyed by ordinals that validation uses too.
    let seed = config.rollout.seed.or(config.train.seed).unwrap_or(0) as u64 ^ 0x5641_4c49_4441_5445;
    let stop_ids = generation.eos_token_ids.clone();
    if config.validation.temperature > 0.0 && config.validation.top_k == Some(1) {
        tracing::warn!(
            "`validation.top_k` is 1 (the original's default), so validation is greedy whatever its temperature; set `validation.top_k = -1` to sample"
        );
    }
    let mut kl_sampling = training_sampling(config, stop_ids.clone(), 0, seed);
    kl_sampling.n = 1;
    let temperature = config.train.train_policy.grpo().map_or(1.0, |g| g.temperature as f32);
    Ok(Validation {
        jobs,
        rewards,
        datasets: dataset.parts().iter().map(|part| part.name.clone()).collect(),
        sampling: validation_sampling(config, stop_ids, seed),
        kl_sampling,
        kl_prompts: KL_PROMPTS,
        mini_batch: config.distillation.mini_batch.max(1),
        temperature,
    })
}

/// The columns of `validation.dataset` under the training set's names, as in the original.
fn validation_columns(resolved: &Resolved) -> Result<Mixture> {
    let config = &resolved.config;
    let (name, table) = (&config.validation.dataset.name, json_of(&config.validation.dataset));
    match config.train.train_policy.grpo() {
        Some(grpo) if !name.is_empty() && !grpo.prompt_column_name.is_empty() => Ok(only_columns(
            name,
            column_dataset(&table, &grpo.prompt_column_name, &grpo.response_column_name, false, "")?,
        )),
        _ => Err(RunError::config(
            place(resolved, "validation.enable"),
            "validation is on, but no plugin offers a validation dataset and no `validation.dataset.name` with `train.train_policy.prompt_column_name` is given",
            "pass a plugin that does, or set `validation.enable = false`",
        )),
    }
}

fn controller_policy(resolved: &Resolved, epoch_len: u64, kind: &Kind, validating: bool) -> Result<Policy> {
    let config: &Config = &resolved.config;
    let ckpt = &config.train.ckpt;
    let n_generation = match kind {
        Kind::Policy { sampling, .. } => sampling.n as u64,
        Kind::Sft { .. } => 1,
    };
    let train_batch = config.train.train_batch_per_replica as u64;
    let steps_per_epoch = (epoch_len * n_generation / train_batch).max(1);
    let save_freq = match (ckpt.enable_checkpoint, ckpt.save_freq_in_epoch) {
        (false, _) => 0,
        (true, epochs) if epochs > 0 => epochs as u64 * steps_per_epoch,
        (true, _) => ckpt.save_freq.max(0) as u64,
    };
    let policy = Policy {
        dataset_len: epoch_len,
        epochs: config.train.epoch as u64,
        n_generation,
        train_batch,
        steps_max: config.train.max_num_steps.map(|n| n as u64),
        allowed_outdated_steps: config.train.train_policy.grpo().map_or(0, |g| g.allowed_outdated_steps as u64),
        validation_freq: if validating { config.validation.freq.max(1) as u64 } else { 0 },
        validate_before: config.validation.val_before_train,
        save_freq,
        save_last: ckpt.enable_checkpoint,
    };
    if policy.total_steps() == 0 {
        return Err(RunError::config(
            place(resolved, "train.train_batch_per_replica"),
            format!(
                "not one step: {} prompts x {} completions x {} epoch(s) are fewer than `train.train_batch_per_replica` = {}",
                policy.dataset_len, policy.n_generation, policy.epochs, policy.train_batch
            ),
            "lower the batch or raise `train.epoch`",
        ));
    }
    Ok(policy)
}
