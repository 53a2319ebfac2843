//! The ranks of a teacher process: all are given the same requests, and each answers its part.

use std::sync::Arc;

use cosmos_broker::{Broker, TeacherRequest};
use cosmos_config::Config;
use cosmos_engine::model::ModelConfig;
use cosmos_parallel::RankGroups;

use crate::error::{Result, RunError};
use crate::heads::TeacherHead;
use crate::roles::crew::Crew;
use crate::shards;
use crate::teacher::{Answer, Served, TeacherRole, TeacherStats, serve};
use crate::teachers::TeacherSpec;

/// How long a rank may keep the others waiting.
const RANK_MS_MAX: u64 = 600_000;

/// A teacher on the ranks of its `parallelism`.
pub struct Teacher {
    crew: Crew<Rank>,
    name: String,
    revision: String,
    batch: usize,
    asked: i32,
    shape: ModelConfig,
}

struct Rank {
    role: TeacherRole,
    groups: RankGroups,
}

impl Teacher {
    /// Loads a teacher of the run, each rank its piece.
    ///
    /// # Errors
    /// Sizes that do not go together, naming the table, and those of the engine.
    pub fn load(config: &Config, spec: &TeacherSpec) -> Result<Self> {
        let mesh = shards::mesh(&spec.parallelism, &table(config, &spec.name))?;
        let (config, own) = (config.clone(), spec.clone());
        let crew = Crew::on(mesh, RANK_MS_MAX, move |groups| {
            let role = match groups.mesh().world() {
                1 => own.load(&config.host.device)?,
                _ => {
                    let model = shards::load_teacher(&config, &own.folder, &groups)?;
                    TeacherRole::rank(&own.name, model, own.wanted, &groups)
                }
            };
            Ok(Rank { role, groups })
        })?;
        Ok(Self {
            crew,
            name: spec.name.clone(),
            revision: spec.folder.display().to_string(),
            batch: spec.wanted.batch,
            asked: spec.wanted.asked(),
            shape: spec.config.clone(),
        })
    }

    /// The whole output head, from all ranks.
    ///
    /// # Errors
    /// Those of the ranks.
    pub fn head(&mut self) -> Result<TeacherHead> {
        let (name, revision) = (self.name.clone(), self.revision.clone());
        let mut heads = self.crew.all(move |rank| {
            let Rank { role, groups } = rank;
            let head = shards::together(groups, || TeacherHead::of(&name, &revision, role.model.as_ref()))?;
            // Every rank has it then, and one is enough.
            Ok((groups.rank() == 0).then_some(head))
        })?;
        heads.swap_remove(0).ok_or_else(|| self.silent("the output head"))
    }

    /// Answers one batch of requests, as [`serve`].
    ///
    /// # Errors
    /// Those of the broker and of the ranks.
    pub fn serve(&mut self, broker: &dyn Broker, consumer: &str, wait_ms_max: u64) -> Result<TeacherStats> {
        let (name, shape) = (self.name.clone(), self.shape.clone());
        let served = Served { name: &name, batch: self.batch, asked: self.asked, shape: &shape };
        serve(broker, consumer, wait_ms_max, &served, &mut |requests| self.answer(requests))
    }

    fn answer(&mut self, requests: Vec<Arc<TeacherRequest>>) -> Result<Vec<Answer>> {
        let count = requests.len();
        let parts = self.crew.all(move |rank| {
            let Rank { role, groups } = rank;
            let requests: Vec<&TeacherRequest> = requests.iter().map(AsRef::as_ref).collect();
            shards::together(groups, || role.answer_part(&requests))
        })?;
        let mut answers: Vec<Option<Answer>> = vec![None; count];
        for (index, answer) in parts.into_iter().flatten() {
            answers[index] = Some(answer);
        }
        let all: Option<Vec<Answer>> = answers.into_iter().collect();
        all.ok_or_else(|| self.silent("one of its requests"))
    }

    fn silent(&self, what: &str) -> RunError {
        RunError::shared(&self.name, format!("no rank of this teacher has {what}"), "")
    }
}

/// The table that says how a teacher is spread over devices.
fn table(config: &Config, name: &str) -> String {
    let own = config.distillation.teachers.iter().position(|t| t.name == name && t.parallelism.is_some());
    own.map_or("distillation.parallelism".into(), |index| format!("distillation.teachers[{index}].parallelism"))
}

#[cfg(test)]
#[path = "teacher_ranks_tests.rs"]
mod tests;
