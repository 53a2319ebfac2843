//! From a configuration to everything a run needs. All checks happen here: nothing is written before they pass.

use std::path::{Path, PathBuf};

use cosmos_config::{Config, Resolved};
use cosmos_controller::Plan as RunPlan;
use cosmos_data::order::Order;
use cosmos_engine::model::{GenerationConfig, Model, ModelConfig};
use cosmos_parallel::RankGroups;
use serde_json::Value;

use crate::choose::{self, Common, Filter};
use crate::conversation::Conversations;
use crate::error::{Result, Role, RunError};
use crate::mixture::{Mixture, Part, Schedule};
use crate::offers::{OfferRole, Offered};
use crate::plan::{Plan, Use};
use crate::plugins::Plugins;
use crate::policy::{PolicyRole, objective};
use crate::rewards::RewardSet;
use crate::rollout::{Sampling, fetch, training_sampling, validation_sampling};
use crate::shards;
use crate::task::{Dataset, Item, Text, column_dataset};
use crate::teacher::{TeacherRole, Wanted};
use crate::teachers::{self, Routes, TeacherSpec};
use crate::validation::Validation;

/// Held-out prompts on which the KL is measured.
const KL_PROMPTS: usize = 128;
/// Prompts with which an environment is tried before the run starts.
const PROMPTS_TRIED: usize = 8;
const TEMPLATE_KEY: &str = "rollout.multi_turn_config.custom_chat_template_path";
/// Prompts looked at before the run starts.
const PROMPTS_CHECKED: u64 = 64;

/// What every role needs to know of a run: no model is loaded for it and no plugin opened.
pub struct Base {
    /// The configuration.
    pub resolved: Resolved,
    /// The student's folder.
    pub student_folder: PathBuf,
    /// The student's shape.
    pub student_config: ModelConfig,
    /// Its tokenizer and chat template.
    pub text: Text,
    /// What ends its completions.
    pub generation: GenerationConfig,
}

/// What completions are written from and judged by: the rollouts' part, and what the controller learns lengths from.
pub struct Prompts {
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
    /// How completions are sampled; none where given responses are trained on.
    pub sampling: Option<Box<Sampling>>,
    /// The rewards of training completions, unless bypassed.
    pub rewards: Option<RewardSet>,
    /// Which teachers answer for each training dataset.
    pub routes: Routes,
    /// Held-out prompts, when validation is on.
    pub validation: Option<Validation>,
}

/// How the student is trained.
pub enum Training {
    /// Distillation, or GRPO where there is no teacher.
    Policy {
        /// The training step.
        role: Box<PolicyRole>,
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

/// Everything a run in one process needs, checked.
pub struct Prepared {
    /// What every role knows.
    pub base: Base,
    /// The rollout's part.
    pub prompts: Prompts,
    /// The trainer's part, without the student.
    pub training: Training,
    /// The teachers, when distilling.
    pub teachers: Vec<TeacherRole>,
    /// What the controller needs to know.
    pub plan: RunPlan,
}

impl Prepared {
    /// What the run will do.
    pub fn plan(&self) -> Result<Plan> {
        Ok(self.base.plan(&self.prompts, &self.plan, &teachers::specs(&self.base)?, 1))
    }
}

impl Base {
    /// Checks what needs neither plugins nor models.
    pub fn new(resolved: Resolved) -> Result<Self> {
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
        let generation = GenerationConfig::from_folder(&student_folder, &student_config).role("student")?;
        Ok(Self { student_folder, student_config, text, generation, resolved })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.resolved.config
    }

    /// `distillation`, `grpo` or `sft`.
    pub fn kind(&self) -> &'static str {
        match (self.config().train.train_policy.grpo(), self.config().distillation.enable) {
            (None, _) => "sft",
            (Some(_), true) => "distillation",
            (Some(_), false) => "grpo",
        }
    }

    /// Completions of one prompt that are trained on; 1 where given responses are.
    pub fn n_generation(&self) -> u64 {
        if self.kind() == "sft" { 1 } else { self.config().rollout.n_generation as u64 }
    }

    /// What the run will do, each policy having `ranks` ranks.
    pub fn plan(&self, prompts: &Prompts, plan: &RunPlan, teachers: &[TeacherSpec], ranks: u64) -> Plan {
        let config = self.config();
        let held_out = prompts.validation.as_ref().map_or(0, |v| v.jobs.len() as u64);
        let plan = Plan::new(config, plan, self.kind(), held_out, &self.student_config, teachers, ranks);
        plan.with_plugins(&prompts.plugins, prompts.uses.clone())
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
    let base = Base::new(resolved)?;
    let prompts = prompts(&base, plugin_paths)?;
    let training = training(&base)?;
    let teachers = teachers(&base)?;
    let plan = run_plan(&base, &prompts)?;
    Ok(Prepared { base, prompts, training, teachers, plan })
}

/// Checks the plugins and what the configuration names of them, without a model and without opening a dataset: for
/// launchers, before anything is queued.
pub fn check_plugins(resolved: &Resolved, plugin_paths: &[PathBuf]) -> Result<()> {
    let plugins = Plugins::load(plugin_paths, resolved, None)?;
    match Chosen::new(resolved, &plugins)?.train {
        Some(_) => Ok(()),
        None => check_something_named(resolved),
    }
}

/// Opens datasets, environment and rewards, and tries them on the first prompts.
pub fn prompts(base: &Base, plugin_paths: &[PathBuf]) -> Result<Prompts> {
    let Base { resolved, text, generation, .. } = base;
    let config = &resolved.config;
    let plugins = Plugins::load(plugin_paths, resolved, Some(text))?;
    let chosen = Chosen::new(resolved, &plugins)?;
    let mut uses = Vec::new();
    let mut dataset = training_dataset(resolved, &plugins, chosen.train)?;
    uses.extend(Use::datasets(&dataset, OfferRole::Train));
    let (shuffle, seed) = match (config.train.train_policy.grpo(), config.train.train_policy.sft()) {
        (Some(g), _) => (g.dataloader_shuffle, g.dataloader_seed),
        (_, Some(s)) => (s.dataloader_shuffle, s.dataloader_seed),
        _ => (true, 0),
    };
    let order = Order { seed: seed as u64, shuffle };
    check_prompts(resolved, &mut dataset, &order, text)?;
    let names: Vec<String> = dataset.parts().iter().map(|part| part.name.clone()).collect();
    let routes = Routes::training(resolved, &names)?;
    let schedule = schedule(&dataset, order);
    let conversations = conversations(resolved, &plugins, &mut dataset, &order, text, generation)?;
    uses.extend(conversations.iter().map(|c| Use::environment(c.plugin(), c.name())));
    let rewards = training_rewards(resolved, &plugins, &dataset, chosen.training_rewards, chosen.filter, &mut uses)?;
    check_something_to_learn(resolved, rewards.is_some() || conversations.is_some())?;
    let sampling = sampling(base)?.map(Box::new);
    let mut validation = match chosen.validation {
        Some((datasets, rewards)) => {
            Some(validation(resolved, &plugins, text, generation, datasets, rewards, &mut uses)?)
        }
        None => None,
    };
    if let Some(validation) = &mut validation {
        validation.routes = Routes::validation(resolved, &validation.datasets, &names, &routes)?;
    }
    let held_out = validation.as_ref().map(|v| v.datasets.as_slice()).unwrap_or_default();
    teachers::warn_of_idle(config, &names, held_out);
    warn_of_idle_plugins(&plugins, &uses);
    Ok(Prompts { plugins, dataset, schedule, uses, conversations, sampling, rewards, routes, validation })
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

/// Where no plugin offers a training dataset, the configuration must name one.
fn check_something_named(resolved: &Resolved) -> Result<()> {
    let dataset = resolved.config.train.train_policy.dataset();
    if !dataset.name.is_empty() || !dataset.local_dir.is_empty() {
        return Ok(());
    }
    Err(RunError::config(
        place(resolved, "train.train_policy.dataset.name"),
        "there is nothing to train on: no plugin offers a training dataset and `train.train_policy.dataset.name` is empty",
        "pass `--plugin FILE.wasm`, or name a dataset",
    ))
}

fn training_columns(resolved: &Resolved) -> Result<Mixture> {
    check_something_named(resolved)?;
    let policy = &resolved.config.train.train_policy;
    let (name, table) = (&policy.dataset().name, json_of(policy.dataset()));
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

fn check_something_to_learn(resolved: &Resolved, judged: bool) -> Result<()> {
    let Some(grpo) = resolved.config.train.train_policy.grpo() else { return Ok(()) };
    if resolved.config.distillation.enable || (judged && !grpo.bypass_reward) {
        return Ok(());
    }
    Err(RunError::config(
        place(resolved, "distillation.enable"),
        match grpo.bypass_reward {
            true => "there is nothing to learn from: distillation is off and `train.train_policy.bypass_reward` is on",
            false => "there is nothing to learn from: distillation is off and no plugin offers a training reward",
        },
        "set `distillation.enable = true`, or pass a plugin with a training reward",
    ))
}

/// How training completions are sampled; none where given responses are trained on.
fn sampling(base: &Base) -> Result<Option<Sampling>> {
    let config = base.config();
    let Some(wanted) = wanted(config)? else {
        return Ok(None);
    };
    let d = &config.distillation;
    let candidates = if d.enable && !d.rollout_top_k_recompute { wanted.student_candidates() } else { 0 };
    let seed = config.rollout.seed.or(config.train.seed).unwrap_or(0) as u64;
    Ok(Some(training_sampling(config, base.generation.eos_token_ids.clone(), candidates, seed)))
}

/// What is asked of a teacher; none where given responses are trained on.
pub fn wanted(config: &Config) -> Result<Option<Wanted>> {
    let Some(grpo) = config.train.train_policy.grpo() else { return Ok(None) };
    let spec = objective(config, grpo);
    spec.check().role("student")?;
    Ok(Some(Wanted::new(config, &spec)))
}

/// The objective, and the reference model where it needs one.
pub fn training(base: &Base) -> Result<Training> {
    training_rank(base, &RankGroups::single())
}

/// As [`training`], for one rank of a student that is cut over several; the reference is cut alike.
pub fn training_rank(base: &Base, groups: &RankGroups) -> Result<Training> {
    let config = base.config();
    let Some(grpo) = config.train.train_policy.grpo() else {
        let mini_batch = config.train.train_policy.mini_batch();
        return Ok(Training::Sft { mini_batch, end_id: base.generation.eos_token_ids.first().copied() });
    };
    let role = Box::new(PolicyRole::new(config, grpo)?);
    let (folder, device) = (&base.student_folder, &config.host.device);
    let reference = match (grpo.kl_beta != 0.0, groups.mesh().world()) {
        (false, _) => None,
        (true, 1) => Some(cosmos_engine::model::load(folder, device).role("reference")?),
        (true, _) => {
            let options = shards::policy_options(&config.train);
            Some(cosmos_engine::sharded::load(folder, device, groups, &options).role("reference")?)
        }
    };
    Ok(Training::Policy { role, reference })
}

/// The teachers with their models, when distilling.
pub fn teachers(base: &Base) -> Result<Vec<TeacherRole>> {
    teachers::specs(base)?.iter().map(|spec| spec.load(base.config())).collect()
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
        routes: Routes::default(),
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

/// What the controller of a run in one process needs to know. Rollout and trainer take turns there, with the same weights.
pub fn run_plan(base: &Base, prompts: &Prompts) -> Result<RunPlan> {
    let Base { resolved, .. } = base;
    let config: &Config = &resolved.config;
    let ckpt = &config.train.ckpt;
    let (epoch_len, n_generation) = (prompts.schedule.epoch_len(), base.n_generation());
    let train_batch = config.train.train_batch_per_replica as u64;
    let plan = RunPlan {
        dataset_len: epoch_len,
        epochs: config.train.epoch as u64,
        n_generation,
        train_batch,
        policy_replicas: 1,
        steps_max: config.train.max_num_steps.map(|n| n as u64),
        allowed_outdated_steps: config.train.train_policy.grpo().map_or(0, |g| g.allowed_outdated_steps as u64),
        steps_ahead_max: 0,
        sync_weight_interval: 1,
        prompts_per_order_max: u64::MAX,
        validation_freq: if prompts.validation.is_some() { config.validation.freq.max(1) as u64 } else { 0 },
        validate_before: config.validation.val_before_train,
        save_freq: 0,
        save_last: ckpt.enable_checkpoint,
    };
    with_frequencies(base, plan)
}

/// What the controller of a run in many processes needs to know.
pub fn plan_of_processes(base: &Base, prompts: &Prompts) -> Result<RunPlan> {
    let config = base.config();
    let mut plan = run_plan(base, prompts)?;
    plan.policy_replicas = config.policy.parallelism.n_init_replicas.max(1) as u64;
    plan.sync_weight_interval = config.train.sync_weight_interval.max(1) as u64;
    let in_flight = config.train.train_policy.grpo().and_then(|g| g.max_inflight_steps);
    let ahead = in_flight.map_or(u64::MAX, |steps| (steps as u64).saturating_sub(1));
    plan.steps_ahead_max = plan.allowed_outdated_steps.min(ahead);
    // As many as a rollout decodes at a time, so that several rollouts share a step's prompts evenly.
    let together = config.host.decode_slots.div_ceil(config.rollout.n_generation.max(1));
    plan.prompts_per_order_max = together.max(config.rollout.batch_size).max(1) as u64;
    with_frequencies(base, plan)
}

fn with_frequencies(base: &Base, mut plan: RunPlan) -> Result<RunPlan> {
    let ckpt = &base.config().train.ckpt;
    let group = plan.train_batch * plan.policy_replicas;
    let steps_per_epoch = (plan.dataset_len * plan.n_generation / group.max(1)).max(1);
    plan.save_freq = match (ckpt.enable_checkpoint, ckpt.save_freq_in_epoch) {
        (false, _) => 0,
        (true, epochs) if epochs > 0 => epochs as u64 * steps_per_epoch,
        (true, _) => ckpt.save_freq.max(0) as u64,
    };
    if plan.total_steps() == 0 {
        return Err(RunError::config(
            place(&base.resolved, "train.train_batch_per_replica"),
            format!(
                "not one step: {} prompts x {} completions x {} epoch(s) are fewer than `train.train_batch_per_replica` = {}",
                plan.dataset_len, plan.n_generation, plan.epochs, plan.train_batch
            ),
            "lower the batch or raise `train.epoch`",
        ));
    }
    Ok(plan)
}
