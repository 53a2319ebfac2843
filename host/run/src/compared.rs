//! The student against its teachers, wherever those are: the exact KL that validation reports.

use std::collections::HashMap;

use cosmos_broker::{Broker, SampleId, TeacherRequest};
use cosmos_config::Config;
use cosmos_engine::divergence::{Scored, reverse_kl, reverse_kl_to};
use cosmos_engine::head::{Head, MixedLogits, ModelHead, Part};
use cosmos_engine::model::Model;
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};

use crate::error::{Result, Role, RunError};
use crate::rollout::Completion;
use crate::teacher::{TeacherHidden, TeacherRole};
use crate::teachers::asks;

/// What a student is compared with.
pub trait Compared {
    /// KL(student ‖ teachers) over the whole vocabulary at every token of each completion, in nats. Both sides' logits are
    /// divided by `temperature`; sequences go `mini_batch` at a time.
    ///
    /// # Errors
    /// Those of the models, and a teacher that does not answer in time.
    fn reverse_kl(
        &mut self,
        student: &mut dyn Model,
        completions: &[Completion],
        temperature: f32,
        mini_batch: usize,
    ) -> Result<Vec<Vec<f32>>>;
}

/// Teachers whose models are in this process.
pub struct OwnTeachers<'a> {
    /// The run's teachers.
    pub teachers: &'a mut [TeacherRole],
    /// Their weights.
    pub config: &'a Config,
}

impl Compared for OwnTeachers<'_> {
    fn reverse_kl(
        &mut self,
        student: &mut dyn Model,
        completions: &[Completion],
        temperature: f32,
        mini_batch: usize,
    ) -> Result<Vec<Vec<f32>>> {
        let ids: Vec<Vec<u32>> = completions.iter().map(Completion::ids).collect();
        if let [teacher] = &mut *self.teachers {
            let sequences = sequences(&ids, completions);
            return reverse_kl(student, teacher.model.as_mut(), &sequences, temperature, mini_batch).role("teacher");
        }
        let weights: Vec<f64> = self.config.distillation.each_teacher().iter().map(|t| t.weight).collect();
        let mut hidden: Vec<Vec<TeacherHidden>> = vec![Vec::new(); completions.len()];
        for (number, teacher) in self.teachers.iter_mut().enumerate() {
            let own: Vec<usize> = (0..completions.len()).filter(|i| asks(&completions[*i], number)).collect();
            let requests: Vec<ScoreRequest<'_>> = own
                .iter()
                .map(|i| ScoreRequest { ids: &ids[*i], first: completions[*i].prompt_ids.len(), candidates: None })
                .collect();
            let options = ScoreOptions { mini_batch, keep_hidden: true, head: false, ..ScoreOptions::default() };
            let scored = score(teacher.model.as_mut(), &requests, &options).role("teacher")?;
            for (i, scored) in own.into_iter().zip(scored) {
                let weight = weights.get(number).copied().unwrap_or(1.0);
                let values_rh = scored.hidden_rh.unwrap_or_default();
                hidden[i].push(TeacherHidden { teacher: number, weight, values_rh });
            }
        }
        let mut heads: Vec<Box<dyn Head + '_>> =
            self.teachers.iter_mut().map(|t| Box::new(ModelHead(t.model.as_mut())) as Box<dyn Head + '_>).collect();
        against(student, &mut heads, &ids, completions, &hidden, temperature, mini_batch)
    }
}

/// Teachers in other processes: they are asked for last hidden states, and their heads are applied here.
pub struct DistantTeachers<'a> {
    /// The queue of each of the run's teachers.
    pub queues: Vec<&'a dyn Broker>,
    /// Their heads, in the same order.
    pub heads: Vec<Box<dyn Head + 'a>>,
    /// Their names, for messages.
    pub names: Vec<String>,
    /// Their weights.
    pub weights: Vec<f64>,
    /// Tells the requests of one validation from all others: the order's id.
    pub order: u32,
    /// How long an answer may take.
    pub wait_ms_max: u64,
}

impl Compared for DistantTeachers<'_> {
    fn reverse_kl(
        &mut self,
        student: &mut dyn Model,
        completions: &[Completion],
        temperature: f32,
        mini_batch: usize,
    ) -> Result<Vec<Vec<f32>>> {
        let id = |c: &Completion| SampleId { epoch: self.order, prompt: c.sample, generation: 0 };
        for (number, queue) in self.queues.iter().enumerate() {
            for completion in completions.iter().filter(|c| asks(c, number)) {
                let request = TeacherRequest {
                    sample: id(completion),
                    weight_version: completion.version,
                    prompt_ids: completion.prompt_ids.clone(),
                    completion_ids: completion.tokens.clone(),
                    include_prompt: false,
                    top_k: -1,
                    candidate_ids: None,
                };
                queue.publish(request, self.wait_ms_max)?;
            }
        }
        let asked: Vec<SampleId> = completions.iter().map(id).collect();
        let hidden = match self.answers(completions, &asked) {
            Ok(hidden) => hidden,
            Err(error) => {
                // Nobody will fetch what the others answer.
                self.queues.iter().try_for_each(|queue| queue.forget(&asked))?;
                return Err(error);
            }
        };
        let ids: Vec<Vec<u32>> = completions.iter().map(Completion::ids).collect();
        against(student, &mut self.heads, &ids, completions, &hidden, temperature, mini_batch)
    }
}

impl DistantTeachers<'_> {
    /// The hidden states of each completion from each of its teachers.
    fn answers(&self, completions: &[Completion], asked: &[SampleId]) -> Result<Vec<Vec<TeacherHidden>>> {
        let mut hidden: Vec<Vec<TeacherHidden>> = vec![Vec::new(); completions.len()];
        for (number, queue) in self.queues.iter().enumerate() {
            let own: Vec<usize> = (0..completions.len()).filter(|i| asks(&completions[*i], number)).collect();
            let ids: Vec<SampleId> = own.iter().map(|i| asked[*i]).collect();
            let fetched = queue.fetch(&ids, self.wait_ms_max)?;
            if let Some((sample, reason)) = fetched.failed.first() {
                return Err(self.silent(number, format!("could not score sample {sample}: {reason}")));
            }
            if !fetched.missing.is_empty() {
                let (missing, all) = (fetched.missing.len(), ids.len());
                let message = format!("has not answered {missing} of {all} requests within {} ms", self.wait_ms_max);
                return Err(self.silent(number, message));
            }
            let mut found: HashMap<SampleId, Vec<f32>> =
                fetched.results.into_iter().map(|r| (r.sample, r.hidden.unwrap_or_default().values_sh)).collect();
            for (i, sample) in own.into_iter().zip(ids) {
                let values_rh = found.remove(&sample).unwrap_or_default();
                let weight = self.weights.get(number).copied().unwrap_or(1.0);
                hidden[i].push(TeacherHidden { teacher: number, weight, values_rh });
            }
        }
        Ok(hidden)
    }

    fn silent(&self, teacher: usize, message: String) -> RunError {
        let name = self.names.get(teacher).cloned().unwrap_or_else(|| teacher.to_string());
        RunError::shared(
            "validation",
            format!("teacher `{name}` {message}"),
            format!("look at the log of teacher `{name}`; `host.teacher_wait_ms_max` is the limit"),
        )
    }
}

fn sequences<'s>(ids: &'s [Vec<u32>], completions: &[Completion]) -> Vec<Scored<'s>> {
    ids.iter().zip(completions).map(|(ids, c)| Scored { ids, first: c.prompt_ids.len() }).collect()
}

fn against(
    student: &mut dyn Model,
    heads: &mut [Box<dyn Head + '_>],
    ids: &[Vec<u32>],
    completions: &[Completion],
    hidden: &[Vec<TeacherHidden>],
    temperature: f32,
    mini_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    let used = |(number, _): &(usize, &mut Box<dyn Head + '_>)| completions.iter().any(|c| asks(c, *number));
    // Heads are padded to different widths beyond the tokens that all tokenizers share.
    let width = heads
        .iter_mut()
        .enumerate()
        .filter(used)
        .map(|(_, head)| head.vocab())
        .chain([student.config().vocab_size])
        .min()
        .unwrap_or_default();
    let mut parts: Vec<Part<'_>> =
        heads.iter_mut().map(|head| Part { head: &mut **head, hidden_rh: Vec::new(), spans: Vec::new() }).collect();
    let mut rows = 0;
    for (completion, hidden) in completions.iter().zip(hidden) {
        let span = rows..rows + completion.tokens.len();
        rows = span.end;
        for own in hidden {
            if let Some(part) = parts.get_mut(own.teacher) {
                part.hidden_rh.extend_from_slice(&own.values_rh);
                part.spans.push((span.clone(), own.weight));
            }
        }
    }
    parts.retain(|part| !part.spans.is_empty());
    let mut source = MixedLogits::new(parts, rows, width, temperature).role("teacher")?;
    reverse_kl_to(student, &mut source, width, &sequences(ids, completions), temperature, mini_batch).role("student")
}

#[cfg(test)]
#[path = "compared_tests.rs"]
mod tests;
