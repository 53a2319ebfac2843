//! The ranks of a teacher process: all are given the same requests, and each answers its part.

use std::sync::Arc;

use cosmos_broker::wire::frame::FrameLimits;
use cosmos_broker::wire::native;
use cosmos_broker::{Broker, TeacherRequest};
use cosmos_config::Config;
use cosmos_engine::model::ModelConfig;
use cosmos_parallel::RankGroups;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Result, RunError};
use crate::heads::TeacherHead;
use crate::roles::RoleOutcome;
use crate::roles::replica::{Job, Party, Replica};
use crate::shards;
use crate::signals::StopFlag;
use crate::teacher::{Answer, Served, TeacherRole, TeacherStats, serve};
use crate::teachers::TeacherSpec;

/// A teacher on the ranks of its `parallelism`.
pub struct Teacher {
    replica: Replica<Work>,
    name: String,
    batch: usize,
    asked: i32,
    shape: ModelConfig,
}

/// One rank of a teacher.
pub struct Rank {
    role: TeacherRole,
    groups: Arc<RankGroups>,
    name: String,
    revision: String,
}

/// What all ranks of a teacher do.
#[derive(Serialize, Deserialize)]
pub enum Work {
    /// Put the output head together.
    Head,
    /// Answer requests, each rank its part.
    Answer(#[serde(with = "frames")] Vec<Arc<TeacherRequest>>),
}

/// What a rank says of it.
#[derive(Serialize, Deserialize)]
pub enum Done {
    /// The head, at rank 0, which is in the process that asks.
    Head(#[serde(skip)] Option<TeacherHead>),
    /// Its answers, with the requests' places.
    Answers(Vec<(usize, Answer)>),
}

impl Job for Work {
    type Rank = Rank;
    type Done = Done;

    fn groups(rank: &Rank) -> &Arc<RankGroups> {
        &rank.groups
    }

    fn perform(&self, rank: &mut Rank) -> Result<Done> {
        match self {
            Work::Head => {
                let head = TeacherHead::of(&rank.name, &rank.revision, rank.role.model.as_ref())?;
                // Every rank has it then, and one is enough.
                Ok(Done::Head((rank.groups.rank() == 0).then_some(head)))
            }
            Work::Answer(requests) => {
                let requests: Vec<&TeacherRequest> = requests.iter().map(AsRef::as_ref).collect();
                rank.role.answer_part(&requests).map(Done::Answers)
            }
        }
    }
}

/// Requests as the frames in which they lie in the broker.
mod frames {
    use super::*;

    pub fn serialize<S: Serializer>(requests: &[Arc<TeacherRequest>], to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_seq(requests.iter().map(|request| native::encode_request(request)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<Arc<TeacherRequest>>, D::Error> {
        let frames = Vec::<Vec<u8>>::deserialize(from)?;
        let read = |frame: &Vec<u8>| native::decode_request(frame, &FrameLimits::default());
        frames.iter().map(|f| read(f).map(Arc::new).map_err(serde::de::Error::custom)).collect()
    }
}

impl Teacher {
    /// Loads a teacher of the run, each rank its piece; `party` has the ranks of other processes, if there are some.
    ///
    /// # Errors
    /// Sizes that do not go together, naming the table, and those of the engine.
    pub fn load(config: &Config, spec: &TeacherSpec, party: Option<Arc<Party>>) -> Result<Self> {
        let table = table(config, &spec.name);
        let mesh = shards::mesh(&spec.parallelism, &table)?;
        let (config, own) = (config.clone(), spec.clone());
        let replica = Replica::new(mesh, &table, party, move |groups| {
            let role = match groups.mesh().world() {
                1 => own.load(&config)?,
                _ => {
                    let model = shards::load_teacher(&config, &own.folder, &groups)?;
                    TeacherRole::rank(&own.name, model, own.wanted, &groups)
                }
            };
            let (name, revision) = (own.name.clone(), own.folder.display().to_string());
            Ok(Rank { role, groups: Arc::new(groups), name, revision })
        })?;
        Ok(Self {
            replica,
            name: spec.name.clone(),
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
        match self.replica.all(Work::Head)?.into_iter().next() {
            Some(Done::Head(Some(head))) => Ok(head),
            _ => Err(self.silent("the output head")),
        }
    }

    /// Does what the first process of this teacher says, until it goes home.
    ///
    /// # Errors
    /// Those of the ranks, and a process that is lost.
    pub fn follow(self, stop: &StopFlag) -> Result<RoleOutcome> {
        self.replica.follow(stop, |_| Ok(()))
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
        let parts = self.replica.all(Work::Answer(requests))?.into_iter().flat_map(|done| match done {
            Done::Answers(answers) => answers,
            Done::Head(_) => Vec::new(),
        });
        let mut answers: Vec<Option<Answer>> = vec![None; count];
        for (index, answer) in parts {
            if let Some(place) = answers.get_mut(index) {
                *place = Some(answer);
            }
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
