//! A policy as a process: it trains on what rollouts left in the depot, alone or with other members, and publishes weights.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use cosmos_broker::BrokerStats;
use cosmos_control::Beating;
use cosmos_controller::{Controller, Memory, Order, OrderId, Outcome, Role, SampleRef};
use cosmos_parallel::{Collective, Single};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, HostTensor, Snapshot};
use crate::error::{Result, RunError};
use crate::prepare::{self, Base};
use crate::records::Throughput;
use crate::resume::SavedState;
use crate::roles::depot::{Answers, Depot};
use crate::roles::foreign::Foreign;
use crate::roles::policy_ranks::{Done, Membership, Process, Work};
use crate::roles::replica::{Party, Replica};
use crate::roles::seat::{self, RunInfo, Seat, Worker, own_ip};
use crate::roles::shelves::Shelves;
use crate::roles::trainer::{TrainNotes, notes_of};
use crate::roles::{RoleOptions, RoleOutcome};
use crate::rollout::Completion;
use crate::shards;
use crate::signals::StopFlag;
use crate::teacher::{Answer, TeacherStats, Wanted};
use crate::teachers;
use crate::weights::WeightPublisher;

/// Folder of checkpoints in the run folder.
const CHECKPOINTS: &str = "checkpoints";
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
    /// What the controller had to remember, for those who go on without its ledger; none in a hand-over.
    #[serde(default)]
    pub controller: Option<Memory>,
}

/// A completion in flight.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Buffered {
    /// Its name.
    pub sample: SampleRef,
    /// The completion.
    pub completion: Completion,
}

/// A state that was read.
struct Found {
    folder: PathBuf,
    snapshot: Snapshot,
    state: PolicyState,
}

/// Where a state is.
enum State {
    InMemory,
    OnDisk(Box<Found>),
    /// Nothing whole is left of it, for this reason.
    Gone(String),
}

/// Reads a state, every file of it verified.
fn read_state(folder: &Path) -> Result<Found> {
    let (snapshot, _) = checkpoint::read(folder)?;
    let state = SavedState::of(&snapshot.state, folder)?.for_policy();
    Ok(Found { folder: folder.to_path_buf(), snapshot, state })
}

struct Policy {
    base: Arc<Base>,
    replica: Replica<Work>,
    /// What the ranks of this process have in common.
    process: Arc<Process>,
    /// The other processes of this policy, where it has several.
    party: Option<Arc<Party>>,
    depot: Depot,
    seat: Seat,
    wanted: Option<Wanted>,
    /// What the teachers' queues had counted at the last step.
    seen: Vec<BrokerStats>,
    listener: TcpListener,
    run_folder: PathBuf,
    shelves: Shelves,
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
    let listener = TcpListener::bind((ip, 0)).map_err(|e| unreachable(ip, &e))?;
    let mut address = listener.local_addr().map_err(|e| unreachable(ip, &e))?.to_string();
    let mut party = None;
    if let Some(part) = &options.part {
        let secret = seat::secret(&base, &options)?;
        let met = Party::meet(&options, part, ip, &secret)?;
        if part.node > 0 {
            return follow(base, &options, met, &listener, &secret);
        }
        let all = met.greet(address.as_bytes())?;
        address = all.iter().map(|address| String::from_utf8_lossy(address)).collect::<Vec<_>>().join(",");
        party = Some(met);
    }
    let mut seat = Seat::take(&base, &options, Role::Policy, Some(address))?;
    seat.speak_for(party.clone());
    if let Some(party) = &party {
        party.greet(&serde_json::to_vec(&seat.info).unwrap_or_default())?;
    }
    let run_folder = seat.run_folder(&options)?;
    let depot = seat.depot(&base, Foreign::publisher_of(&base, &options)?)?;
    let shelves = Shelves::open(&base, &options, &seat, &depot.store)?;
    let wanted = prepare::wanted(base.config())?.filter(|_| base.config().distillation.enable);
    let total_steps = seat.info.total_steps;
    let seen = depot.queues.iter().map(|queue| queue.stats()).collect::<std::result::Result<_, _>>()?;
    let base = Arc::new(base);
    let process = Process::new(Arc::clone(&base), shelves.clone(), total_steps);
    let replica = replica(&base, &process, party.clone())?;
    let outcome = seat::serve(Policy {
        base,
        replica,
        process,
        party: party.clone(),
        depot,
        seat,
        wanted,
        seen,
        listener,
        run_folder,
        shelves,
        holds: None,
        held_by: None,
        fresh: true,
        spent: false,
    })?;
    if let Some(party) = party {
        party.go_home(&outcome)?;
    }
    Ok(outcome)
}

/// The ranks of `policy.parallelism`: as threads, and those of other processes.
fn replica(base: &Base, process: &Arc<Process>, party: Option<Arc<Party>>) -> Result<Replica<Work>> {
    let table = "policy.parallelism";
    let mesh = shards::mesh(&base.config().policy.parallelism, table)?;
    let process = Arc::clone(process);
    Replica::new(mesh, table, party, move |groups| process.rank(groups))
}

/// A process of a policy whose first process speaks for it.
fn follow(
    base: Base,
    options: &RoleOptions,
    party: Arc<Party>,
    listener: &TcpListener,
    secret: &str,
) -> Result<RoleOutcome> {
    let stop = StopFlag::listen(&base.config().train.signal_to_handle)?;
    let address = listener.local_addr().map_err(|e| unreachable(listener, &e))?;
    party.greet(address.to_string().as_bytes())?;
    let told = party.greet(&[])?;
    let info: RunInfo = serde_json::from_slice(&told[0]).map_err(|e| {
        RunError::shared(party.name(), format!("what its first process says of the run is not understood: {e}"), "")
    })?;
    let shelves = Shelves::follow(&base, options, &info, party.name())?;
    let base = Arc::new(base);
    let process = Process::new(Arc::clone(&base), shelves, info.total_steps);
    let replica = replica(&base, &process, Some(Arc::clone(&party)))?;
    replica.follow(&stop, |work| process.prepare(work, listener, &party, secret))
}

fn unreachable(at: impl std::fmt::Debug, e: &std::io::Error) -> RunError {
    RunError::shared(format!("{at:?}"), format!("it cannot be listened on for the other policies: {e}"), "")
}

impl Worker for Policy {
    fn seat(&mut self) -> &mut Seat {
        &mut self.seat
    }

    fn holds(&self) -> Option<u64> {
        self.holds
    }

    fn is_empty_handed(&self) -> bool {
        self.holds.is_none()
    }

    fn perform(&mut self, id: OrderId, order: Order, beating: &Beating) -> Result<()> {
        match order {
            Order::Train { step, members, attempt, share, outdated, publish } => {
                let task = Task { id, step, members, attempt, share, outdated, publish };
                self.train(&task, &beating.flag(), beating.deserted())
            }
            Order::Load { step, since, publish } => self.load(id, step, since, publish),
            Order::Save { step, hand_over, last, buffered } => self.save(id, step, hand_over, last, &buffered),
            other => self.seat.refuse(id, &other),
        }
    }
}

impl Policy {
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
        let (membership, group) = self.group(task, rank, deserted)?;
        let told = group.all_gather_bytes(&serde_json::to_vec(&gone).unwrap_or_default(), GONE_BYTES_MAX)?;
        if told.iter().any(|gone| gone.as_slice() != b"[]") {
            self.seat.done(task.id, Outcome::SamplesGone { samples: gone }, &())?;
            return Ok(());
        }
        let Some(answers) = self.answers(task, samples, &completions, withdrawn)? else {
            return Ok(());
        };
        self.seat.client.progress(format!("step {}: training", task.step));
        self.process.work_with(group);
        let made = self.step(task, membership, completions, answers);
        self.process.work_with(Arc::new(Single));
        let mut notes = made?;
        self.holds = Some(task.step);
        self.held_by = Some(task.id.0);
        notes.seconds = started.elapsed().as_secs_f64();
        self.teachers_work(rank == 0, &mut notes)?;
        let mut outcome = Outcome::Trained;
        if task.publish && rank == 0 {
            // The step is made, whatever becomes of its weights.
            if let Err(error) = self.publish(task.step) {
                let hint = error.hint().map_or(String::new(), |hint| format!("; {hint}"));
                tracing::warn!("weights {} could not be published and will be asked for: {error}{hint}", task.step);
                outcome = Outcome::Unpublished;
            }
        }
        if self.seat.done(task.id, outcome, &notes)? {
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
    fn group(
        &self,
        task: &Task,
        rank: usize,
        deserted: Arc<AtomicBool>,
    ) -> Result<(Option<Membership>, Arc<dyn Collective>)> {
        let world = task.members.len();
        if world == 1 {
            return Ok((None, Arc::new(Single)));
        }
        self.seat.client.progress(format!("step {}: waiting for {} members", task.step, world - 1));
        if let Some(party) = &self.party {
            party.set_when_lost(&deserted);
        }
        let addresses = task.members.iter().map(|(_, address)| address.clone()).collect();
        let membership = Membership { addresses, rank, attempt: task.attempt };
        let group = membership.connect(&self.listener, 0, self.seat.secret(), deserted)?;
        Ok((Some(membership), group))
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
        let asked = || withdrawn.load(Ordering::Relaxed) || self.seat.is_asked() || self.is_broken();
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
            Answers::Stopped => {
                self.party.as_ref().map_or(Ok(()), |party| party.check())?;
                Err(self.trouble("it was asked to leave"))
            }
        }
    }

    /// Forward, backward and optimizer on every rank. After a failure that came in the middle of a step of several updates
    /// nothing is held any more.
    fn step(
        &mut self,
        task: &Task,
        membership: Option<Membership>,
        completions: Vec<Completion>,
        answers: HashMap<u64, Answer>,
    ) -> Result<TrainNotes> {
        let before = self.optimizer_steps()?;
        self.fresh = false;
        let started = Instant::now();
        let completions = Arc::new(completions);
        let given = Arc::clone(&completions);
        match self.all(Work::Step { step: task.step, completions: given, answers, membership }) {
            Ok(outcomes) => {
                let seen = outcomes.into_iter().filter_map(|done| match done {
                    Done::Step(seen) => seen.map(|seen| *seen),
                    _ => None,
                });
                let merged = seen.reduce(|mut all, other| {
                    all.merge(other);
                    all
                });
                let Some(outcome) = merged else { return Err(self.trouble("no rank has seen the loss")) };
                Ok(notes_of(&self.base, &outcome, &completions, task.step, started.elapsed().as_secs_f64()))
            }
            Err(error @ RunError::Replica { .. }) => Err(error),
            Err(error) => {
                let intact = self.optimizer_steps().is_ok_and(|now| now == before);
                let cleared = self.all(Work::ZeroGrads);
                if !intact || cleared.is_err() {
                    self.holds = None;
                }
                Err(error)
            }
        }
    }

    /// Every rank does `work`. When that fails, several ranks are not able to work together any more, and nothing is held.
    fn all(&mut self, work: Work) -> Result<Vec<Done>> {
        let done = self.replica.all(work);
        if done.is_err() && self.replica.ranks() > 1 {
            (self.holds, self.spent) = (None, true);
        }
        done
    }

    fn optimizer_steps(&mut self) -> Result<u64> {
        match self.all(Work::Updates)?.first() {
            Some(Done::Updates(updates)) => Ok(*updates),
            _ => Err(self.trouble("its ranks do not say how often they were updated")),
        }
    }

    /// Whole tensors, from all ranks.
    fn whole(&mut self, work: Work) -> Result<Vec<HostTensor>> {
        match self.all(work)?.into_iter().next() {
            Some(Done::Tensors(whole)) => Ok(whole),
            _ => Err(self.trouble("its first rank does not give its tensors")),
        }
    }

    fn publish(&mut self, step: u64) -> Result<()> {
        self.seat.client.progress(format!("publishing weights {step}"));
        let train = &self.base.config().train;
        let dtype = train.transfer_dtype.unwrap_or(train.master_dtype);
        // Another policy may have published since.
        let mut publisher =
            WeightPublisher::open(self.shelves.weights()?, dtype, self.base.config().host.weights_keep)?;
        let weights = self.whole(Work::Weights)?;
        publisher.publish(step, weights.into_iter())?;
        Ok(())
    }

    fn load(&mut self, id: OrderId, step: u64, since: OrderId, publish: bool) -> Result<()> {
        self.seat.client.progress(format!("loading step {step}"));
        // Who holds this very state is only asked to publish it; otherwise what is in memory is of no use.
        let held = self.holds.take().zip(self.held_by).filter(|_| publish);
        if self.spent {
            self.replica = replica(&self.base, &self.process, None)?;
            (self.spent, self.fresh) = (false, true);
        }
        match step {
            0 if self.fresh => {}
            0 => self.load_start()?,
            _ => match self.state(step, since, held)? {
                State::InMemory => {}
                State::OnDisk(found) => self.restore(*found)?,
                // The state that the run was resumed with: there is none before it.
                State::Gone(why) if since == OrderId(0) => return Err(self.trouble(why)),
                State::Gone(why) => {
                    tracing::warn!("`{}`: step {step} cannot be loaded: {why}", self.seat.name());
                    return self.seat.done(id, Outcome::StateGone, &why).map(drop);
                }
            },
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
        self.all(Work::Start)?;
        self.fresh = true;
        Ok(())
    }

    /// Where the state of a step is: of those in the run folder that are whole and were written for `since` or a later order
    /// the one of the highest order, unless the one in memory, `held` with its order, is as new.
    ///
    /// # Errors
    /// A run folder that cannot be looked into: what lies there may be whole.
    fn state(&self, step: u64, since: OrderId, held: Option<(u64, u64)>) -> Result<State> {
        let name = checkpoint::folder_name(step);
        let (mut found, mut wrong) = (None::<Found>, Vec::new());
        for root in [super::HAND_OVER, CHECKPOINTS].map(|root| self.run_folder.join(root)) {
            let folder = root.join(&name);
            if !folder.try_exists().map_err(|source| RunError::Io { path: folder.clone(), source })? {
                continue;
            }
            match read_state(&folder) {
                Ok(state) if state.state.order < since.0 => {
                    tracing::debug!("{} is of a branch that was given up", folder.display());
                }
                Ok(state) if found.as_ref().is_none_or(|found| found.state.order < state.state.order) => {
                    found = Some(state);
                }
                Ok(_) => {}
                Err(error @ RunError::Checkpoint { .. }) => {
                    tracing::warn!("passed over: {error}");
                    wrong.push(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        let held = held.filter(|(own, _)| *own == step).map(|(_, order)| order);
        match (found, held) {
            // Nobody has written a newer state of this step than the one in memory.
            (Some(found), Some(order)) if found.state.order <= order => Ok(State::InMemory),
            (None, Some(_)) => Ok(State::InMemory),
            (Some(found), None | Some(_)) => Ok(State::OnDisk(Box::new(found))),
            (None, None) if !wrong.is_empty() => Ok(State::Gone(wrong.join("; "))),
            (None, None) => {
                let checkpoints = self.run_folder.join(CHECKPOINTS);
                if !checkpoints.is_dir() {
                    // More likely out of sight than lost.
                    return Err(RunError::shared(
                        checkpoints.display().to_string(),
                        format!("`{}` does not see the run's checkpoints", self.seat.name()),
                        "is the run folder mounted on this machine?",
                    ));
                }
                Ok(State::Gone(format!("{} is not there", checkpoints.join(name).display())))
            }
        }
    }

    fn restore(&mut self, found: Found) -> Result<()> {
        let Found { folder, snapshot, state } = found;
        for buffered in &state.buffered {
            self.depot.put(buffered.sample.order, &buffered.completion)?;
        }
        self.fresh = false;
        self.process.hold(Some(Arc::new(snapshot)));
        let restored = self.all(Work::Restore { folder, updates: state.optimizer_steps });
        self.process.hold(None);
        restored.map(drop)
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
        let model = self.whole(Work::Weights)?;
        let optimizer = self.whole(Work::OptimizerState)?;
        let controller = if hand_over { None } else { Some(self.controllers_memory(step)?) };
        let optimizer_steps = self.optimizer_steps()?;
        let state = PolicyState { policy_step: step, order: id.0, optimizer_steps, buffered, controller };
        let snapshot = Snapshot {
            step,
            model,
            optimizer,
            state: serde_json::to_value(state)
                .map_err(|e| self.trouble(format!("its state cannot be written: {e}")))?,
        };
        let root = self.run_folder.join(if hand_over { super::HAND_OVER } else { CHECKPOINTS });
        let folder = checkpoint::write(&root, &snapshot, &self.base.student_folder)?;
        let ckpt = &self.base.config().train.ckpt;
        checkpoint::prune(&root, if hand_over { 1 } else { ckpt.max_keep }, step)?;
        if !hand_over && (last || ckpt.export_safetensors) {
            self.export(&folder, step)?;
        }
        self.seat.done(id, Outcome::Saved, &Saved { checkpoint: folder }).map(drop)
    }

    /// What a checkpoint of `step` that is written now has to remember of the controller.
    fn controllers_memory(&self, step: u64) -> Result<Memory> {
        let controller: Controller = serde_json::from_value(self.seat.client.snapshot()?)
            .map_err(|e| self.trouble(format!("the controller's state is not understood: {e}")))?;
        let memory = controller.memory();
        match memory.step() == step {
            true => Ok(memory),
            false => {
                Err(self.trouble(format!("step {step} was to be saved, but the run is at step {}", memory.step())))
            }
        }
    }

    /// A Hugging Face folder of a checkpoint's weights.
    fn export(&self, checkpoint: &Path, step: u64) -> Result<()> {
        let train = &self.base.config().train;
        let root = self.run_folder.join("safetensors");
        let target = root.join(checkpoint::folder_name(step));
        crate::export::from_checkpoint(checkpoint, &target, crate::export::dtype(train.param_dtype))?;
        crate::export::prune(&root, train.ckpt.max_keep)
    }

    /// Whether another process of this policy is lost.
    fn is_broken(&self) -> bool {
        self.party.as_ref().is_some_and(|party| party.check().is_err())
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
