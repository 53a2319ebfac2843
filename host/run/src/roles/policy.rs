//! A policy as a process: it trains on what rollouts left in the depot, alone or with other members, and publishes weights.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use cosmos_broker::BrokerStats;
use cosmos_controller::{Order, OrderId, Outcome, Role, SampleRef};
use cosmos_engine::head::Head;
use cosmos_parallel::{Collective, RankGroups, Single, SocketGroup, SocketOptions, SubMesh};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, HostTensor, Snapshot};
use crate::error::{Result, RunError};
use crate::prepare::{self, Base};
use crate::records::Throughput;
use crate::roles::crew::Crew;
use crate::roles::depot::{Answers, Depot};
use crate::roles::foreign::Foreign;
use crate::roles::seat::{Next, Seat, own_ip};
use crate::roles::shelves::Shelves;
use crate::roles::trainer::{TrainNotes, Trainer, notes_of};
use crate::roles::{RoleOptions, RoleOutcome};
use crate::rollout::Completion;
use crate::shards;
use crate::student::{Members, Student};
use crate::teacher::{Answer, TeacherStats, Wanted};
use crate::teachers;
use crate::weights::WeightPublisher;

/// How long the members of a step may take to come together.
const MEMBERS_MS_MAX: u64 = 120_000;
/// How long one of them may keep the others waiting in a sum.
const SUM_MS_MAX: u64 = 600_000;
/// Bytes of the names of missing samples between members.
const GONE_BYTES_MAX: usize = 16 << 20;

/// What `state.json` of a checkpoint holds that a policy process wrote; the controller's own state is in its ledger.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PolicyState {
    /// Steps made.
    pub policy_step: u64,
    /// The order that it was written for: of several states of one step the one of the highest order counts.
    pub order: u64,
    /// Optimizer updates so far.
    pub optimizer_steps: u64,
    /// Samples in flight, with their completions.
    pub buffered: Vec<Buffered>,
}

/// A completion in flight.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Buffered {
    /// Its name.
    pub sample: SampleRef,
    /// The completion.
    pub completion: Completion,
}

/// One rank's state.
struct Rank {
    number: usize,
    trainer: Trainer,
    heads: Vec<Box<dyn Head>>,
    /// The ranks of this process.
    world: Arc<dyn Collective>,
    groups: Arc<RankGroups>,
}

impl Rank {
    fn student(&self, base: &Base, total_steps: u64) -> Result<Student> {
        Student::load_rank(base.config(), &base.student_folder, total_steps, &self.groups)
    }
}

struct Policy {
    base: Arc<Base>,
    crew: Crew<Rank>,
    depot: Depot,
    seat: Seat,
    wanted: Option<Wanted>,
    /// What the teachers' queues had counted at the last step.
    seen: Vec<BrokerStats>,
    listener: TcpListener,
    run_folder: PathBuf,
    shelves: Shelves,
    total_steps: u64,
    /// The step whose state is in memory.
    holds: Option<u64>,
    /// The order that brought it there.
    held_by: Option<u64>,
    /// Whether nothing was done to the student since it was loaded.
    fresh: bool,
    /// Whether the ranks have failed, after which they cannot work together any more.
    spent: bool,
}

/// Runs one policy until the run is over.
pub fn run(options: RoleOptions) -> Result<RoleOutcome> {
    let base = Base::new(options.resolved.clone())?;
    super::check_processes(&base)?;
    let ip = own_ip(&base, &options)?;
    let unreachable = |e: std::io::Error| {
        RunError::shared(ip.to_string(), format!("it cannot be listened on for the other policies: {e}"), "")
    };
    let listener = TcpListener::bind((ip, 0)).map_err(unreachable)?;
    let address = listener.local_addr().map_err(unreachable)?;
    let mut seat = Seat::take(&base, &options, Role::Policy, Some(address.to_string()))?;
    let run_folder = seat.run_folder(&options)?;
    let depot = seat.depot(&base, Foreign::publisher_of(&base, &options)?)?;
    let shelves = Shelves::open(&base, &options, &seat, &depot.store)?;
    let wanted = prepare::wanted(base.config())?.filter(|_| base.config().distillation.enable);
    let total_steps = seat.info.total_steps;
    let seen = depot.queues.iter().map(|queue| queue.stats()).collect::<std::result::Result<_, _>>()?;
    let base = Arc::new(base);
    let crew = crew(&base, &shelves, total_steps)?;
    Policy {
        base,
        crew,
        depot,
        seat,
        wanted,
        seen,
        listener,
        run_folder,
        shelves,
        total_steps,
        holds: None,
        held_by: None,
        fresh: true,
        spent: false,
    }
    .serve()
}

/// Makes a rank of the replica.
fn rank(base: &Base, shelves: &Shelves, total_steps: u64, groups: RankGroups) -> Result<Rank> {
    let student = Student::load_rank(base.config(), &base.student_folder, total_steps, &groups)?;
    let trainer = Trainer { student, training: prepare::training_rank(base, &groups)? };
    let heads = if super::wants_heads(base) { shelves.heads(base)? } else { Vec::new() };
    let world = Arc::clone(groups.group(SubMesh::World));
    Ok(Rank { number: groups.rank(), trainer, heads, world, groups: Arc::new(groups) })
}

/// The ranks of `policy.parallelism`, as threads.
fn crew(base: &Arc<Base>, shelves: &Shelves, total_steps: u64) -> Result<Crew<Rank>> {
    let mesh = shards::mesh(&base.config().policy.parallelism, "policy.parallelism")?;
    let (base, shelves) = (Arc::clone(base), shelves.clone());
    Crew::on(mesh, SUM_MS_MAX, move |groups| rank(&base, &shelves, total_steps, groups))
}

impl Policy {
    fn serve(mut self) -> Result<RoleOutcome> {
        loop {
            let (id, order) = match self.seat.next(self.holds)? {
                Next::Order(id, order) => (id, order),
                Next::Rejoined => continue,
                Next::Home(outcome) => return Ok(outcome),
                Next::Asked => match self.seat.leave()? {
                    Some(outcome) => return Ok(outcome),
                    None => continue,
                },
            };
            let beating = self.seat.client.beat_while(id)?;
            let withdrawn = beating.flag();
            let performed = match order {
                Order::Train { step, members, attempt, share, outdated, publish } => {
                    let task = Task { id, step, members, attempt, share, outdated, publish };
                    self.train(&task, &withdrawn, beating.deserted())
                }
                Order::Load { step, publish } => self.load(id, step, publish),
                Order::Save { step, hand_over, last, buffered } => self.save(id, step, hand_over, last, &buffered),
                other => self.seat.refuse(id, &other).map(drop),
            };
            drop(beating);
            match performed {
                Ok(()) => {}
                Err(error) if super::is_final(&error) => return Err(error),
                Err(error) => {
                    self.seat.failed(id, &error)?;
                    if self.holds.is_none() {
                        // What is in memory is no step's state any more.
                        self.seat.join_again(None)?;
                    }
                }
            }
        }
    }

    fn train(&mut self, task: &Task, withdrawn: &AtomicBool, deserted: Arc<AtomicBool>) -> Result<()> {
        let started = Instant::now();
        let Some(rank) = task.members.iter().position(|(name, _)| name == self.seat.name()) else {
            return Err(self.trouble(format!("step {} is not made by `{}`", task.step, self.seat.name())));
        };
        let samples = &task.share;
        if self.holds != Some(task.step - 1) {
            let held = self.holds.map_or("nothing".to_string(), |step| format!("step {step}"));
            return Err(self.trouble(format!("step {} was ordered, but {held} is in memory", task.step)));
        }
        self.seat.client.progress(format!("step {}: fetching {} completions", task.step, samples.len()));
        let (completions, gone) = self.depot.get(samples)?;
        let group = self.group(task, rank, deserted)?;
        let told = group.all_gather_bytes(&serde_json::to_vec(&gone).unwrap_or_default(), GONE_BYTES_MAX)?;
        if told.iter().any(|gone| gone.as_slice() != b"[]") {
            self.seat.done(task.id, Outcome::SamplesGone { samples: gone }, &())?;
            return Ok(());
        }
        let Some(answers) = self.answers(task, samples, &completions, withdrawn)? else {
            return Ok(());
        };
        self.seat.client.progress(format!("step {}: training", task.step));
        let mut notes = self.step(task, &group, completions, answers)?;
        self.holds = Some(task.step);
        self.held_by = Some(task.id.0);
        notes.seconds = started.elapsed().as_secs_f64();
        self.teachers_work(rank == 0, &mut notes)?;
        if task.publish && rank == 0 {
            self.publish(task.step)?;
        }
        if self.seat.done(task.id, Outcome::Trained, &notes)? {
            self.depot.forget(samples)?;
            if rank == 0 {
                self.depot.forget(&task.outdated)?;
            }
        }
        Ok(())
    }

    /// What the teachers did since the last step; the first member tells it.
    fn teachers_work(&mut self, tell: bool, notes: &mut TrainNotes) -> Result<()> {
        let names = self.base.config().distillation.each_teacher().into_iter().map(|teacher| teacher.name);
        let mut done = Vec::new();
        for ((name, queue), seen) in names.zip(&self.depot.queues).zip(&mut self.seen) {
            let now = queue.stats()?;
            // A broker that was restarted empty counts from zero.
            let since = |now: u64, seen: u64| now.checked_sub(seen).unwrap_or(now);
            let stats = TeacherStats {
                tokens: since(now.scored_tokens, seen.scored_tokens),
                seconds: since(now.scored_ms, seen.scored_ms) as f64 / 1e3,
                depth_max: now.waiting + now.delivered,
                latency_ms_max: now.latency_ms_max,
            };
            *seen = now;
            notes.scoring.add(stats.tokens, stats.seconds);
            done.push((name, stats));
        }
        match tell && notes.scoring.tokens > 0 {
            true => notes.metrics.extend(teachers::work_metrics(&done)),
            false => notes.scoring = Throughput::default(),
        }
        // A queue's depth is looked at after the step, when it says nothing of the longest.
        notes.metrics.retain(|(name, _)| !(name.starts_with("teacher/") && name.ends_with("queue_depth_max")));
        Ok(())
    }

    /// The members of a step, connected. When one of them has gone, nobody waits on.
    fn group(&self, task: &Task, rank: usize, deserted: Arc<AtomicBool>) -> Result<Arc<dyn Collective>> {
        let world = task.members.len();
        if world == 1 {
            return Ok(Arc::new(Single));
        }
        self.seat.client.progress(format!("step {}: waiting for {} members", task.step, world - 1));
        let options = SocketOptions {
            rank,
            world,
            token: self.seat.secret().as_bytes().to_vec(),
            attempt: task.attempt,
            connect_ms_max: MEMBERS_MS_MAX,
            wait_ms_max: SUM_MS_MAX,
            stop: Some(deserted),
        };
        let group = match rank {
            0 => {
                let listener = self.listener.try_clone().map_err(|e| self.trouble(e.to_string()))?;
                SocketGroup::listen(listener, &options)?
            }
            _ => SocketGroup::connect(&task.members[0].1, &options)?,
        };
        Ok(Arc::new(group))
    }

    /// The teacher's answers; none when the order was withdrawn, or this process asked to leave, meanwhile.
    fn answers(
        &self,
        task: &Task,
        samples: &[SampleRef],
        completions: &[Completion],
        withdrawn: &AtomicBool,
    ) -> Result<Option<HashMap<u64, Answer>>> {
        let Some(wanted) = &self.wanted else { return Ok(Some(HashMap::new())) };
        let stop = &self.seat.stop;
        let asked = || withdrawn.load(Ordering::Relaxed) || stop.is_set();
        let progress = |missing: usize| {
            if missing > 0 {
                self.seat.client.progress(format!(
                    "step {}: waiting for the teacher's answers to {missing} of {} completions",
                    task.step,
                    samples.len()
                ));
            }
        };
        let wait_ms_max = self.base.config().host.teacher_wait_ms_max;
        match self.depot.answers(samples, completions, wanted, wait_ms_max, &progress, &asked)? {
            Answers::Come(answers) => Ok(Some(answers)),
            Answers::Stopped if withdrawn.load(Ordering::Relaxed) => Ok(None),
            Answers::Stopped => Err(self.trouble("it was asked to leave")),
        }
    }

    /// Forward, backward and optimizer on every rank. After a failure that came in the middle of a step of several updates
    /// nothing is held any more.
    fn step(
        &mut self,
        task: &Task,
        group: &Arc<dyn Collective>,
        completions: Vec<Completion>,
        answers: HashMap<u64, Answer>,
    ) -> Result<TrainNotes> {
        let before = self.optimizer_steps()?;
        self.fresh = false;
        let (base, step, group) = (Arc::clone(&self.base), task.step, Arc::clone(group));
        let started = Instant::now();
        let (completions, answers) = (Arc::new(completions), Arc::new(answers));
        let given = Arc::clone(&completions);
        let made = self.all(move |rank| {
            let members = Members { group: Arc::clone(&group), turns: Arc::clone(&rank.world) };
            rank.trainer.student.with_members(Some(members));
            let heads: &mut [Box<dyn Head>] = &mut rank.heads;
            let outcome = rank.trainer.outcome(&base, heads, &given, answers.as_ref().clone(), step);
            rank.trainer.student.with_members(None);
            outcome.map(|outcome| (rank.trainer.student.place.reports, outcome))
        });
        match made {
            Ok(outcomes) => {
                let seen = outcomes.into_iter().filter(|(reports, _)| *reports).map(|(_, outcome)| outcome);
                let merged = seen.reduce(|mut all, other| {
                    all.merge(other);
                    all
                });
                let Some(outcome) = merged else { return Err(self.trouble("no rank has seen the loss")) };
                Ok(notes_of(&self.base, &outcome, &completions, task.step, started.elapsed().as_secs_f64()))
            }
            Err(error) => {
                let intact = self.optimizer_steps().is_ok_and(|now| now == before);
                let cleared = self.all(|rank| {
                    rank.trainer.student.model.zero_grads();
                    Ok(())
                });
                if !intact || cleared.is_err() {
                    self.holds = None;
                }
                Err(error)
            }
        }
    }

    /// Every rank does `work`, as [`Crew::all`]. When that fails, several ranks are not able to work together any more, and
    /// nothing is held.
    fn all<T: Send + 'static>(
        &mut self,
        work: impl Fn(&mut Rank) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Vec<T>> {
        let done = self.crew.all(move |rank| {
            let groups = Arc::clone(&rank.groups);
            shards::together(&groups, || work(rank))
        });
        if done.is_err() && self.crew.ranks() > 1 {
            (self.holds, self.spent) = (None, true);
        }
        done
    }

    fn optimizer_steps(&mut self) -> Result<u64> {
        let steps = self.all(|rank| Ok(rank.trainer.student.optimizer_steps()))?;
        Ok(steps.first().copied().unwrap_or(0))
    }

    /// Whole weights, from all ranks.
    fn weights(&mut self) -> Result<Vec<HostTensor>> {
        let mut all = self.all(|rank| rank.trainer.student.weights(rank.number == 0))?;
        Ok(all.swap_remove(0))
    }

    fn publish(&mut self, step: u64) -> Result<()> {
        self.seat.client.progress(format!("publishing weights {step}"));
        let train = &self.base.config().train;
        let dtype = train.transfer_dtype.unwrap_or(train.master_dtype);
        // Another policy may have published since.
        let mut publisher =
            WeightPublisher::open(self.shelves.weights()?, dtype, self.base.config().host.weights_keep)?;
        let weights = self.weights()?;
        publisher.publish(step, weights.into_iter())?;
        Ok(())
    }

    fn load(&mut self, id: OrderId, step: u64, publish: bool) -> Result<()> {
        self.seat.client.progress(format!("loading step {step}"));
        // Who holds this very state is only asked to publish it; otherwise what is in memory is of no use.
        let held = self.holds.take().zip(self.held_by).filter(|_| publish);
        if self.spent {
            self.crew = crew(&self.base, &self.shelves, self.total_steps)?;
            (self.spent, self.fresh) = (false, true);
        }
        match step {
            0 if self.fresh => {}
            0 => self.load_start()?,
            _ => self.load_checkpoint(step, held)?,
        }
        self.holds = Some(step);
        self.held_by = Some(self.held_by.filter(|_| held.is_some()).unwrap_or(0).max(id.0));
        if publish {
            self.publish(step)?;
        }
        self.seat.done(id, Outcome::Loaded, &()).map(drop)
    }

    /// The run's beginning.
    fn load_start(&mut self) -> Result<()> {
        let (base, total_steps) = (Arc::clone(&self.base), self.total_steps);
        self.all(move |rank| {
            rank.trainer.student = rank.student(&base, total_steps)?;
            rank.trainer.training = prepare::training_rank(&base, &rank.groups)?;
            Ok(())
        })?;
        self.fresh = true;
        Ok(())
    }

    /// The states of a step that lie in the run folder, the one of the highest order first; why the others cannot be read.
    fn states(&self, step: u64) -> (Vec<(PathBuf, Snapshot, PolicyState)>, Option<RunError>) {
        let name = checkpoint::folder_name(step);
        let (mut found, mut wrong) = (Vec::new(), None);
        for folder in [super::HAND_OVER, "checkpoints"].map(|root| self.run_folder.join(root).join(&name)) {
            if !folder.is_dir() {
                continue;
            }
            let read = checkpoint::read(&folder).and_then(|(snapshot, _)| {
                let state = serde_json::from_value(snapshot.state.clone()).map_err(|e| RunError::Checkpoint {
                    path: folder.clone(),
                    message: format!("`state.json` is not that of a policy process: {e}"),
                    hint: "a checkpoint of `run` is resumed by `run --resume`".into(),
                })?;
                Ok((folder.clone(), snapshot, state))
            });
            match read {
                Ok(state) => found.push(state),
                Err(error) => {
                    tracing::warn!("passed over: {error}");
                    wrong = Some(error);
                }
            }
        }
        found.sort_by_key(|(_, _, state): &(PathBuf, Snapshot, PolicyState)| std::cmp::Reverse(state.order));
        (found, wrong)
    }

    fn load_checkpoint(&mut self, step: u64, held: Option<(u64, u64)>) -> Result<()> {
        let (states, wrong) = self.states(step);
        match (states.into_iter().next(), held) {
            // Nobody has written a newer state of this step than the one in memory.
            (Some((_, _, state)), Some((own, order))) if own == step && state.order <= order => Ok(()),
            (None, Some((own, _))) if own == step => Ok(()),
            (Some((folder, snapshot, state)), _) => self.restore(&folder, snapshot, state),
            (None, _) => Err(wrong.unwrap_or_else(|| {
                let folder = self.run_folder.join("checkpoints").join(checkpoint::folder_name(step));
                self.trouble(format!("step {step} is to be loaded, but {} is not there", folder.display()))
            })),
        }
    }

    fn restore(&mut self, folder: &Path, snapshot: Snapshot, state: PolicyState) -> Result<()> {
        for buffered in &state.buffered {
            self.depot.put(buffered.sample.order, &buffered.completion)?;
        }
        self.fresh = false;
        let (snapshot, at, steps) = (Arc::new(snapshot), folder.to_path_buf(), state.optimizer_steps);
        self.all(move |rank| {
            rank.trainer.student.model.zero_grads();
            rank.trainer.student.restore(&at, &snapshot, steps)
        })
        .map(drop)
    }

    fn save(&mut self, id: OrderId, step: u64, hand_over: bool, last: bool, buffered: &[SampleRef]) -> Result<()> {
        if self.holds != Some(step) {
            return Err(self.trouble(format!("step {step} was to be saved, but it is not in memory")));
        }
        self.seat.client.progress(format!("saving step {step}"));
        let (completions, gone) = self.depot.get(buffered)?;
        if !gone.is_empty() {
            tracing::warn!(
                "{} completions in flight are gone; they are written again when they are wanted",
                gone.len()
            );
        }
        let by_sample: HashMap<u64, &SampleRef> = buffered.iter().map(|s| (s.sample, s)).collect();
        let buffered = completions
            .into_iter()
            .filter_map(|completion| {
                by_sample.get(&completion.sample).map(|sample| Buffered { sample: **sample, completion })
            })
            .collect();
        let model = self.weights()?;
        let mut optimizer = self.all(|rank| rank.trainer.student.optimizer_state(rank.number == 0))?;
        let state = PolicyState { policy_step: step, order: id.0, optimizer_steps: self.optimizer_steps()?, buffered };
        let snapshot = Snapshot {
            step,
            model,
            optimizer: optimizer.swap_remove(0),
            state: serde_json::to_value(state)
                .map_err(|e| self.trouble(format!("its state cannot be written: {e}")))?,
        };
        let root = self.run_folder.join(if hand_over { super::HAND_OVER } else { "checkpoints" });
        let folder = checkpoint::write(&root, &snapshot, &self.base.student_folder)?;
        let ckpt = &self.base.config().train.ckpt;
        checkpoint::prune(&root, if hand_over { 1 } else { ckpt.max_keep })?;
        if !hand_over && (last || ckpt.export_safetensors) {
            self.export(&folder, step)?;
        }
        self.seat.done(id, Outcome::Saved, &Saved { checkpoint: folder }).map(drop)
    }

    /// A Hugging Face folder of a checkpoint's weights.
    fn export(&self, checkpoint: &Path, step: u64) -> Result<()> {
        let train = &self.base.config().train;
        let root = self.run_folder.join("safetensors");
        let target = root.join(checkpoint::folder_name(step));
        crate::export::from_checkpoint(checkpoint, &target, crate::export::dtype(train.param_dtype))?;
        crate::export::prune(&root, train.ckpt.max_keep)
    }

    fn trouble(&self, message: impl Into<String>) -> RunError {
        RunError::shared(self.seat.name(), message, "")
    }
}

/// An order to train.
struct Task {
    id: OrderId,
    step: u64,
    members: Vec<(String, String)>,
    attempt: u64,
    share: Vec<SampleRef>,
    outdated: Vec<SampleRef>,
    publish: bool,
}

/// What is told to the controller of a save.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    /// Where it is.
    pub checkpoint: PathBuf,
}
