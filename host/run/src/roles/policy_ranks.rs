//! The ranks of a policy and what they are told to do.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use cosmos_broker::wire::frame::FrameLimits;
use cosmos_engine::head::Head;
use cosmos_parallel::{Collective, RankGroups, Single, SocketGroup, SocketOptions};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::checkpoint::{self, HostTensor, Snapshot};
use crate::error::{Result, RunError};
use crate::policy::StepOutcome;
use crate::prepare::{self, Base};
use crate::roles::parcel;
use crate::roles::replica::{Job, Party, RANK_MS_MAX};
use crate::roles::shelves::Shelves;
use crate::roles::trainer::Trainer;
use crate::rollout::Completion;
use crate::student::{Members, Student};
use crate::teacher::Answer;

/// How long the members of a step may take to come together.
const MEMBERS_MS_MAX: u64 = 120_000;

/// What the ranks of one process have in common.
pub struct Process {
    base: Arc<Base>,
    shelves: Shelves,
    total_steps: u64,
    /// The same processes of the other members of a step, while it is made.
    members: Mutex<Arc<dyn Collective>>,
    /// The checkpoint that is being loaded.
    snapshot: Mutex<Option<Arc<Snapshot>>>,
}

impl Process {
    /// Without members yet.
    pub fn new(base: Arc<Base>, shelves: Shelves, total_steps: u64) -> Arc<Self> {
        let (members, snapshot) = (Mutex::new(Arc::new(Single) as Arc<dyn Collective>), Mutex::default());
        Arc::new(Self { base, shelves, total_steps, members, snapshot })
    }

    /// Makes a rank of it.
    ///
    /// # Errors
    /// A model that cannot be loaded; teachers' heads that do not come.
    pub fn rank(self: &Arc<Self>, groups: RankGroups) -> Result<Rank> {
        let student = self.student(&groups)?;
        let trainer = Trainer { student, training: prepare::training_rank(&self.base, &groups)? };
        let heads = if super::wants_heads(&self.base) { self.shelves.heads(&self.base)? } else { Vec::new() };
        Ok(Rank { number: groups.rank(), trainer, heads, groups: Arc::new(groups), process: Arc::clone(self) })
    }

    fn student(&self, groups: &RankGroups) -> Result<Student> {
        Student::load_rank(self.base.config(), &self.base.student_folder, self.total_steps, groups)
    }

    /// The members of the next step.
    pub fn work_with(&self, members: Arc<dyn Collective>) {
        *self.members.lock().unwrap_or_else(PoisonError::into_inner) = members;
    }

    /// The checkpoint that ranks load next; none when they have.
    pub fn hold(&self, snapshot: Option<Arc<Snapshot>>) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }

    /// Does for a process that follows what the first one has done before it gives out a job. `listener` is where the same
    /// processes of other policies find this one.
    ///
    /// # Errors
    /// A checkpoint that cannot be read here; members that do not come.
    pub fn prepare(&self, work: &Work, listener: &TcpListener, party: &Party, secret: &str) -> Result<()> {
        match work {
            Work::Restore { folder, .. } => self.hold(Some(Arc::new(checkpoint::read(folder)?.0))),
            Work::Step { membership: Some(membership), .. } => {
                let stop = Arc::new(AtomicBool::new(false));
                party.set_when_lost(&stop);
                self.work_with(membership.connect(listener, party.node(), secret, stop)?);
            }
            _ => {}
        }
        Ok(())
    }
}

/// The members of a step, as one of them sees them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Membership {
    /// Addresses of each member's processes, separated by commas.
    pub addresses: Vec<String>,
    /// Which member this is.
    pub rank: usize,
    /// Which try.
    pub attempt: u64,
}

impl Membership {
    /// Connects this process with the same one, `node`, of every member. `stop` ends the waiting.
    ///
    /// # Errors
    /// A member that does not come, or has fewer processes.
    pub fn connect(
        &self,
        listener: &TcpListener,
        node: usize,
        secret: &str,
        stop: Arc<AtomicBool>,
    ) -> Result<Arc<dyn Collective>> {
        let trouble = |message: String| RunError::shared("members", message, "");
        let options = SocketOptions {
            rank: self.rank,
            world: self.addresses.len(),
            token: secret.as_bytes().to_vec(),
            attempt: self.attempt,
            connect_ms_max: MEMBERS_MS_MAX,
            wait_ms_max: RANK_MS_MAX,
            stop: Some(stop),
        };
        let group = match self.rank {
            0 => SocketGroup::listen(listener.try_clone().map_err(|e| trouble(e.to_string()))?, &options)?,
            _ => {
                let first = self.addresses.first().map(String::as_str).unwrap_or_default();
                let address = first.split(',').nth(node).ok_or_else(|| {
                    trouble(format!("the first policy ({first}) has no process {node}; all policies need as many"))
                })?;
                SocketGroup::connect(address, &options)?
            }
        };
        Ok(Arc::new(group))
    }
}

/// One rank of a policy.
pub struct Rank {
    number: usize,
    trainer: Trainer,
    heads: Vec<Box<dyn Head>>,
    groups: Arc<RankGroups>,
    process: Arc<Process>,
}

/// What all ranks of a policy do.
#[derive(Serialize, Deserialize)]
pub enum Work {
    /// Forward, backward and optimizer.
    Step {
        /// The step, counted from 1.
        step: u64,
        /// What is trained on.
        #[serde(with = "parcels")]
        completions: Arc<Vec<Completion>>,
        /// What the teachers say of it, by sample.
        answers: HashMap<u64, Answer>,
        /// With whom; none: alone.
        membership: Option<Membership>,
    },
    /// Forget gradients.
    ZeroGrads,
    /// Say how many updates were made.
    Updates,
    /// Put the weights together at rank 0.
    Weights,
    /// The same of the optimizer's state.
    OptimizerState,
    /// Go back to the run's beginning.
    Start,
    /// Go on from a checkpoint.
    Restore {
        /// Where it is.
        folder: PathBuf,
        /// Optimizer updates until then.
        updates: u64,
    },
}

/// What a rank says of it.
#[derive(Serialize, Deserialize)]
pub enum Done {
    /// It is done.
    Nothing,
    /// What was seen of a step, by the ranks that see the loss.
    Step(Option<Box<StepOutcome>>),
    /// Updates so far.
    Updates(u64),
    /// Whole tensors at rank 0, which is in the process that asks.
    Tensors(#[serde(skip)] Vec<HostTensor>),
}

impl Job for Work {
    type Rank = Rank;
    type Done = Done;

    fn groups(rank: &Rank) -> &Arc<RankGroups> {
        &rank.groups
    }

    fn perform(&self, rank: &mut Rank) -> Result<Done> {
        match self {
            Work::Step { step, completions, answers, .. } => rank.step(*step, completions, answers),
            Work::ZeroGrads => {
                rank.trainer.student.model.zero_grads();
                Ok(Done::Nothing)
            }
            Work::Updates => Ok(Done::Updates(rank.trainer.student.optimizer_steps())),
            Work::Weights => rank.trainer.student.weights(rank.number == 0).map(Done::Tensors),
            Work::OptimizerState => rank.trainer.student.optimizer_state(rank.number == 0).map(Done::Tensors),
            Work::Start => {
                rank.trainer.student = rank.process.student(&rank.groups)?;
                rank.trainer.training = prepare::training_rank(&rank.process.base, &rank.groups)?;
                Ok(Done::Nothing)
            }
            Work::Restore { folder, updates } => rank.restore(folder, *updates),
        }
    }
}

impl Rank {
    fn step(&mut self, step: u64, completions: &[Completion], answers: &HashMap<u64, Answer>) -> Result<Done> {
        let group = Arc::clone(&self.process.members.lock().unwrap_or_else(PoisonError::into_inner));
        let turns = Arc::clone(self.groups.local());
        self.trainer.student.with_members(Some(Members { group, turns }));
        let outcome = self.trainer.outcome(&self.process.base, &mut self.heads, completions, answers.clone(), step);
        self.trainer.student.with_members(None);
        let outcome = outcome?;
        Ok(Done::Step(self.trainer.student.place.reports.then(|| Box::new(outcome))))
    }

    fn restore(&mut self, folder: &Path, updates: u64) -> Result<Done> {
        let held = self.process.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(snapshot) = held else {
            return Err(RunError::shared(folder.display().to_string(), "nobody has read this checkpoint", ""));
        };
        self.trainer.student.model.zero_grads();
        self.trainer.student.restore(folder, &snapshot, updates)?;
        Ok(Done::Nothing)
    }
}

/// Completions as the frames in which they also lie in the depot.
mod parcels {
    use super::*;

    pub fn serialize<S: Serializer>(completions: &Arc<Vec<Completion>>, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_seq(completions.iter().map(parcel::encode))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Arc<Vec<Completion>>, D::Error> {
        let frames = Vec::<Vec<u8>>::deserialize(from)?;
        let read = |frame: &Vec<u8>| parcel::decode(frame, &FrameLimits::default()).map_err(serde::de::Error::custom);
        frames.iter().map(read).collect::<std::result::Result<Vec<_>, _>>().map(Arc::new)
    }
}
