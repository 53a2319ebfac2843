//! Several teachers in a run: who answers for which dataset, and one answer out of many.
//!
//! A completion is compared with the mixture of the teachers that answer for its dataset, `p = Σ w p_t` with the weights
//! scaled to sum to one: an ensemble's own distribution, which is a distribution for every objective to be compared with.
//! (A mean of divergences would pull the student to each teacher at once, and a mean of log-probs is no distribution.)
//! Each teacher has a queue of its own; a sample counts when all of its teachers have answered.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use cosmos_broker::Broker;
use cosmos_config::{Config, Parallelism, Resolved, SupportRule};
use cosmos_data::tokenizer::Tokenizer;
use cosmos_engine::head::log_add;
use cosmos_engine::model::{self, ModelConfig};

use crate::error::{Result, Role, RunError};
use crate::offers::quoted;
use crate::plugins::text_of;
use crate::prepare::{Base, model_folder, place};
use crate::rollout::Completion;
use crate::shards;
use crate::teacher::{self, Answer, TeacherHidden, TeacherRole, TeacherStats, Wanted};

/// A teacher as every role knows it: checked, not loaded.
#[derive(Debug, Clone)]
pub struct TeacherSpec {
    /// Its name.
    pub name: String,
    /// Folder of its model.
    pub folder: PathBuf,
    /// The model's shape.
    pub config: ModelConfig,
    /// Its weight in mixtures.
    pub weight: f64,
    /// What it is asked.
    pub wanted: Wanted,
    /// How it is spread over devices.
    pub parallelism: Parallelism,
}

/// The teachers of a run, in the order of the configuration; none when not distilling.
///
/// # Errors
/// A model that is not there, another tokenizer or vocabulary than the student's, a context that is too short; each with
/// the teacher's name where there are several.
pub fn specs(base: &Base) -> Result<Vec<TeacherSpec>> {
    let config = base.config();
    let Some(wanted) = crate::prepare::wanted(config)?.filter(|_| config.distillation.enable) else {
        return Ok(Vec::new());
    };
    let d = &config.distillation;
    let entries = d.each_teacher();
    entries
        .iter()
        .enumerate()
        .map(|(index, entry)| {
            let wanted = Wanted { mini_batch: entry.mini_batch.unwrap_or(wanted.mini_batch), ..wanted };
            let (folder, shape) = checked(base, index, &wanted)?;
            Ok(TeacherSpec {
                name: entry.name.clone(),
                folder,
                config: shape,
                weight: entry.weight,
                wanted,
                parallelism: entry.parallelism.clone().unwrap_or_else(|| d.parallelism.clone()),
            })
        })
        .collect()
}

fn checked(base: &Base, index: usize, wanted: &Wanted) -> Result<(PathBuf, ModelConfig)> {
    let Base { resolved, text, student_config: student, .. } = base;
    let config = &resolved.config;
    let entry = &config.distillation.each_teacher()[index];
    let several = !config.distillation.teachers.is_empty();
    let which = if several { format!("teacher `{}`", entry.name) } else { "teacher".to_string() };
    let (key, at) = match several {
        true => {
            let key = format!("distillation.teachers[{index}].model_name_or_path");
            let at = ["distillation", "teachers", &index.to_string(), "model_name_or_path"];
            (key, text_of(resolved.nearest_place(&at)))
        }
        false => {
            let key = "distillation.model_name_or_path".to_string();
            let at = place(resolved, &key);
            (key, at)
        }
    };
    let folder = model_folder(resolved, &key, &entry.model_name_or_path, entry.model_revision.as_deref())
        .map_err(|e| e.at(|| at.clone()))?;
    let tokenizer = Tokenizer::load(&folder)?;
    if let Some(difference) = text.tokenizer.first_difference(&tokenizer) {
        return Err(RunError::config(
            at,
            format!("student and {which} have different vocabularies: {difference}"),
            "choose a teacher with the student's tokenizer; mapping between tokenizers is not there yet",
        ));
    }
    let shape = ModelConfig::from_folder(&folder).role("teacher")?;
    if wanted.full_vocabulary && shape.vocab_size < student.vocab_size {
        return Err(RunError::config(
            place(resolved, "distillation.top_k"),
            format!(
                "`distillation.top_k = -1` compares whole vocabularies, but the {which}'s head has {} rows and the student's {}",
                shape.vocab_size, student.vocab_size
            ),
            "use `top_k = 0` or a positive `top_k`",
        ));
    }
    if config.policy.model_max_length > shape.max_position_embeddings {
        let of = if several { format!("{which}'s") } else { "teacher's".into() };
        return Err(RunError::config(
            place(resolved, "policy.model_max_length"),
            format!("`policy.model_max_length` is beyond the {of} {} positions", shape.max_position_embeddings),
            format!("use at most {}", shape.max_position_embeddings),
        ));
    }
    Ok((folder, shape))
}

impl TeacherSpec {
    /// Loads the model.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn load(&self, config: &Config) -> Result<TeacherRole> {
        let format = shards::teacher_format(config);
        let model = model::load_frozen(&self.folder, &config.host.device, format).role("teacher")?;
        Ok(TeacherRole::new(&self.name, model, self.wanted))
    }
}

/// Which teachers answer for each dataset of a run, by the dataset's index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    of_dataset: Vec<Vec<u32>>,
}

impl Routes {
    /// The teachers of the training datasets `names`.
    ///
    /// # Errors
    /// A dataset that no teacher answers for, a teacher that answers for none of them, teachers whose answers have no exact
    /// mixture.
    pub fn training(resolved: &Resolved, names: &[String]) -> Result<Self> {
        let config = &resolved.config;
        if !config.distillation.enable || config.distillation.teachers.is_empty() {
            return Ok(Self::default());
        }
        let teachers = &config.distillation.teachers;
        let of = |name: &String| -> Vec<u32> {
            let answers = |index: &u32| teachers[*index as usize].datasets.as_ref().is_none_or(|d| d.contains(name));
            (0..teachers.len() as u32).filter(answers).collect()
        };
        let routes = Self { of_dataset: names.iter().map(of).collect() };
        if let Some((_, name)) = routes.of_dataset.iter().zip(names).find(|(route, _)| route.is_empty()) {
            return Err(RunError::config(
                text_of(resolved.nearest_place(&["distillation", "teachers"])),
                format!("no teacher answers for the dataset `{name}`"),
                "add it to a teacher's `datasets`, or leave that key out to have the teacher answer for all",
            ));
        }
        let d = &config.distillation;
        let joint = routes.of_dataset.iter().zip(names).find(|(route, _)| route.len() > 1);
        if let (Some((route, name)), true, false) = (joint, d.top_k > 0, d.top_k_support == SupportRule::Student) {
            let who: Vec<String> = route.iter().map(|t| teachers[*t as usize].name.clone()).collect();
            return Err(RunError::config(
                place(resolved, "distillation.top_k_support"),
                format!(
                    "the teachers {} answer for `{name}` together, but with this `distillation.top_k_support` each names candidates that the others do not score",
                    quoted(&who)
                ),
                "use `top_k_support = \"student\"` or `top_k = -1`, whose mixtures are exact, or give each dataset one teacher",
            ));
        }
        Ok(routes)
    }

    /// The teachers of the validation datasets `names`: those that name one, else those of the same plugin's training
    /// datasets (`training`, with their routes `of_training`).
    ///
    /// # Errors
    /// A dataset without a teacher.
    pub fn validation(resolved: &Resolved, names: &[String], training: &[String], of_training: &Self) -> Result<Self> {
        let config = &resolved.config;
        if of_training.of_dataset.is_empty() {
            return Ok(Self::default());
        }
        let teachers = &config.distillation.teachers;
        let plugin = |name: &str| name.split('/').next().unwrap_or_default().to_string();
        let mut of_dataset = Vec::new();
        for name in names {
            let named = |t: &u32| teachers[*t as usize].datasets.as_ref().is_none_or(|d| d.contains(name));
            let mut route: Vec<u32> = (0..teachers.len() as u32).filter(named).collect();
            if route.is_empty() {
                let same = training.iter().zip(&of_training.of_dataset).filter(|(t, _)| plugin(t) == plugin(name));
                route = same.flat_map(|(_, route)| route).copied().collect();
                route.sort_unstable();
                route.dedup();
            }
            if route.is_empty() {
                return Err(RunError::config(
                    text_of(resolved.nearest_place(&["distillation", "teachers"])),
                    format!("no teacher answers for the validation dataset `{name}`"),
                    "add it to a teacher's `datasets`: the KL to the teacher is measured on it",
                ));
            }
            of_dataset.push(route);
        }
        Ok(Self { of_dataset })
    }

    /// The teachers that a completion of dataset `source` is compared with; empty: all.
    pub fn of(&self, source: usize) -> Vec<u32> {
        self.of_dataset.get(source).cloned().unwrap_or_default()
    }
}

/// Names in `datasets` of teachers that are no dataset of this run change nothing; one may be misspelt.
pub fn warn_of_idle(config: &Config, training: &[String], validation: &[String]) {
    for teacher in &config.distillation.teachers {
        let known = |name: &&String| training.contains(name) || validation.contains(name);
        let idle: Vec<String> = teacher.datasets.iter().flatten().filter(|name| !known(name)).cloned().collect();
        if !idle.is_empty() {
            let all: Vec<String> = training.iter().chain(validation).cloned().collect();
            tracing::warn!(
                "teacher `{}` names {}, which this run does not use; its datasets are {}",
                teacher.name,
                quoted(&idle),
                quoted(&all)
            );
        }
    }
}

/// Whether `completion` is for teacher number `teacher`.
pub(crate) fn asks(completion: &Completion, teacher: usize) -> bool {
    completion.teachers.is_empty() || completion.teachers.contains(&(teacher as u32))
}

/// Asks about completions, each of its own teachers. `queues` are the teachers', in their order.
///
/// # Errors
/// Those of the brokers.
pub fn request(
    queues: &[&dyn Broker],
    completions: &[Completion],
    n_generation: u64,
    wanted: &Wanted,
    wait_ms_max: u64,
) -> Result<()> {
    for (teacher, queue) in queues.iter().enumerate() {
        let own = completions.iter().filter(|c| asks(c, teacher));
        teacher::request(*queue, own, n_generation, wanted, wait_ms_max)?;
    }
    Ok(())
}

/// What the teachers say of completions, mixed. A completion one of whose teachers has not answered within the deadline is
/// missing.
///
/// # Errors
/// Those of the brokers, and answers that do not fit each other.
pub fn collect(
    queues: &[&dyn Broker],
    completions: &[Completion],
    n_generation: u64,
    weights: &[f64],
    wait_ms_max: u64,
) -> Result<HashMap<u64, Answer>> {
    let begun = Instant::now();
    let mut said = Vec::with_capacity(queues.len());
    for (teacher, queue) in queues.iter().enumerate() {
        let own: Vec<u64> = completions.iter().filter(|c| asks(c, teacher)).map(|c| c.sample).collect();
        let left = wait_ms_max.saturating_sub(begun.elapsed().as_millis() as u64);
        said.push(if own.is_empty() { HashMap::new() } else { teacher::collect(*queue, &own, n_generation, left)? });
    }
    mix(completions, said, weights)
}

/// Lets go of requests whose step was abandoned.
///
/// # Errors
/// Those of the brokers.
pub fn forget(queues: &[&dyn Broker], samples: &[u64], n_generation: u64) -> Result<()> {
    queues.iter().try_for_each(|queue| teacher::forget(*queue, samples, n_generation))
}

/// One answer for each completion out of those of its teachers.
///
/// # Errors
/// Answers of one completion that do not fit each other.
pub fn mix(
    completions: &[Completion],
    mut said: Vec<HashMap<u64, Answer>>,
    weights: &[f64],
) -> Result<HashMap<u64, Answer>> {
    let mut answers = HashMap::with_capacity(completions.len());
    for completion in completions {
        let wanted: Vec<usize> = (0..said.len()).filter(|t| asks(completion, *t)).collect();
        let own: Vec<(usize, f64, Answer)> = wanted
            .iter()
            .filter_map(|t| Some((*t, weights.get(*t).copied()?, said[*t].remove(&completion.sample)?)))
            .collect();
        if own.is_empty() || own.len() < wanted.len() {
            continue;
        }
        let mixed = Answer::mix(own).map_err(|reason| {
            RunError::shared(format!("sample {}", completion.sample), reason, "all teachers must run the same program")
        })?;
        answers.insert(completion.sample, mixed);
    }
    Ok(answers)
}

impl Answer {
    /// The answer of the mixture of teachers, each with its number and weight. One alone stays bit for bit what it said, with
    /// hidden states under its number. Of several: log-probs of the mixture where each gave one; no entropy, which is not
    /// known without the whole distributions; the most likely token where all name the same one at every position (then it is
    /// the mixture's), else none.
    ///
    /// # Errors
    /// Parts of different lengths, or other candidates.
    pub fn mix(parts: Vec<(usize, f64, Answer)>) -> std::result::Result<Answer, String> {
        let total: f64 = parts.iter().map(|(_, weight, _)| weight).sum();
        let count = parts.len();
        let mut mixed = Answer::default();
        for (index, (teacher, weight, answer)) in parts.into_iter().enumerate() {
            let share = (weight / total).ln();
            let mut hidden: Vec<TeacherHidden> =
                answer.hidden.into_iter().map(|h| TeacherHidden { teacher, weight, ..h }).collect();
            if count == 1 {
                return Ok(Answer { hidden, ..answer });
            }
            if index == 0 {
                let scaled =
                    |values: &[f32]| -> Vec<f32> { values.iter().map(|l| (f64::from(*l) + share) as f32).collect() };
                mixed = Answer {
                    logprobs: scaled(&answer.logprobs),
                    entropy: Vec::new(),
                    top1: answer.top1,
                    candidate_logprobs: scaled(&answer.candidate_logprobs),
                    candidate_ids: answer.candidate_ids,
                    hidden,
                };
                continue;
            }
            if answer.candidate_ids != mixed.candidate_ids {
                return Err("its teachers scored different candidates".into());
            }
            if answer.top1 != mixed.top1 {
                mixed.top1.clear();
            }
            add(&mut mixed.logprobs, &answer.logprobs, share)?;
            add(&mut mixed.candidate_logprobs, &answer.candidate_logprobs, share)?;
            mixed.hidden.append(&mut hidden);
        }
        Ok(mixed)
    }
}

/// `into = log(exp(into) + exp(of + share))`.
fn add(into: &mut [f32], of: &[f32], share: f64) -> std::result::Result<(), String> {
    if into.len() != of.len() {
        return Err(format!("its teachers gave {} and {} log-probs", into.len(), of.len()));
    }
    into.iter_mut().zip(of).for_each(|(a, b)| *a = log_add(f64::from(*a), f64::from(*b) + share) as f32);
    Ok(())
}

/// Metrics of each of several teachers: `teacher/<name>/completions` and `/kl`, the mean divergence at the tokens that it
/// was compared at (from the mixture, where it was not alone). `kl_of` is each sample's.
pub fn metrics(config: &Config, completions: &[Completion], kl_of: &HashMap<u64, Vec<f32>>) -> Vec<(String, f64)> {
    let mut metrics = Vec::new();
    for (index, teacher) in config.distillation.teachers.iter().enumerate() {
        let own: Vec<&Completion> = completions.iter().filter(|c| asks(c, index)).collect();
        metrics.push((format!("teacher/{}/completions", teacher.name), own.len() as f64));
        let kl = own.iter().filter_map(|c| kl_of.get(&c.sample)).flatten().filter(|kl| kl.is_finite());
        let (sum, tokens) = kl.fold((0.0, 0u64), |(sum, tokens), kl| (sum + f64::from(*kl), tokens + 1));
        if tokens > 0 {
            metrics.push((format!("teacher/{}/kl", teacher.name), sum / tokens as f64));
        }
    }
    metrics
}

/// Metrics of what teachers of this process did: `teacher/…` of all, and of each where there are several.
pub fn work_metrics(done: &[(String, TeacherStats)]) -> BTreeMap<String, f64> {
    let of = |stats: &TeacherStats| {
        [
            ("queue_depth_max", stats.depth_max as f64),
            ("seconds", stats.seconds),
            ("tokens_per_second", stats.tokens as f64 / stats.seconds.max(1e-9)),
            ("latency_max_seconds", stats.latency_ms_max as f64 / 1e3),
        ]
    };
    let all = done.iter().fold(TeacherStats::default(), |all, (_, own)| TeacherStats {
        tokens: all.tokens + own.tokens,
        seconds: all.seconds + own.seconds,
        depth_max: all.depth_max.max(own.depth_max),
        latency_ms_max: all.latency_ms_max.max(own.latency_ms_max),
    });
    let mut metrics: BTreeMap<String, f64> =
        of(&all).into_iter().map(|(name, value)| (format!("teacher/{name}"), value)).collect();
    for (name, own) in done.iter().filter(|_| done.len() > 1) {
        metrics.extend(of(own).into_iter().map(|(key, value)| (format!("teacher/{name}/{key}"), value)));
    }
    metrics
}

#[cfg(test)]
#[path = "teachers_tests.rs"]
mod tests;
