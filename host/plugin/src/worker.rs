//! One thread per open dataset or reward: an actor over one wasmtime store. The caller waits with a deadline of its
//! own, so that a host call that hangs costs a thread, not the run.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use wasmtime::component::{InstancePre, ResourceTableError};
use wasmtime::{Store, Trap, UpdateDeadline};

use crate::clock::{CallClock, ticks};
use crate::sandbox::GuestState;
use crate::since_v0_1_0::{dataset, metadata, reward};
use crate::voice::{REASON_BYTES_MAX, lock, one_line};
use crate::{Capabilities, Grant, Limits, PluginError};

/// How much longer than the guest's own deadline the caller waits. The guest's deadline gives the better reason.
const GRACE: Duration = Duration::from_secs(2);
/// How often a waiting caller looks at the clock, which the seat restarts for each stage of a call.
const LOOK: Duration = Duration::from_millis(200);

/// A loaded component with all that an instance of it needs.
pub(crate) struct Blueprint {
    pub(crate) plugin: String,
    pub(crate) pre: InstancePre<GuestState>,
    pub(crate) metadata: metadata::GuestIndices,
    pub(crate) dataset: Option<dataset::GuestIndices>,
    pub(crate) reward: Option<reward::GuestIndices>,
    pub(crate) grants: Vec<Grant>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) capabilities: Capabilities,
}

/// What an instance is for, and so which `init` it runs.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    Describe,
    Dataset { name: String, settings: String },
    Reward { name: String, settings: String },
}

/// Where a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The component's start code.
    Instantiate,
    /// Matching the exports' types.
    Interface,
    /// `dataset.init` or `reward.init`.
    Init,
    /// The call itself.
    Call,
}

/// Why a call gave no answer. The instance is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stop {
    pub(crate) stage: Stage,
    pub(crate) reason: String,
}

/// A live instance.
pub(crate) struct Live {
    pub(crate) store: Store<GuestState>,
    pub(crate) metadata: metadata::Guest,
    pub(crate) dataset: Option<dataset::Guest>,
    pub(crate) reward: Option<reward::Guest>,
    calls: u32,
}

pub(crate) type Asked<'a, T> = Pin<Box<dyn Future<Output = wasmtime::Result<T>> + 'a>>;
type Job = Box<dyn FnOnce(&mut Seat) + Send>;

/// The caller's end.
pub(crate) struct Worker {
    blueprint: Arc<Blueprint>,
    role: Role,
    clock: Arc<CallClock>,
    jobs: Option<mpsc::Sender<Job>>,
}

impl Worker {
    pub(crate) fn new(blueprint: Arc<Blueprint>, role: Role) -> Self {
        Self { blueprint, role, clock: Arc::new(CallClock::new()), jobs: None }
    }

    pub(crate) fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// Asks the guest, on an instance that is made when there is none, or always when `fresh`.
    ///
    /// # Errors
    /// The outer one when the host has no thread to give; [`Stop`] when the guest trapped or took too long.
    pub(crate) fn call<T: Send + 'static>(
        &mut self,
        fresh: bool,
        limit: Duration,
        ask: impl for<'a> FnOnce(&'a mut Live) -> Asked<'a, T> + Send + 'static,
    ) -> Result<Result<T, Stop>, PluginError> {
        let (answer, answers) = mpsc::sync_channel(1);
        // Starting a thread and an instance is bounded by this; the seat restarts the clock for each stage.
        self.clock.start(self.init_limit());
        let job: Job = Box::new(move |seat| {
            // A caller that gave up no longer listens.
            let _ = answer.send(seat.perform(fresh, limit, ask));
        });
        let hosted = |detail| PluginError::Host { detail };
        let jobs = match self.jobs.take() {
            Some(jobs) => jobs,
            None => Seat::start(&self.blueprint, &self.role, &self.clock)?,
        };
        jobs.send(job).map_err(|_| hosted("a plugin's thread ended early".into()))?;
        loop {
            match answers.recv_timeout(LOOK) {
                Ok(result) => {
                    self.jobs = Some(jobs);
                    return Ok(result);
                }
                Err(mpsc::RecvTimeoutError::Timeout) if self.clock.overdue() < GRACE => {}
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    // The thread is left to itself and ends when its host call returns; its clock stays expired.
                    self.clock = Arc::new(CallClock::new());
                    let reason = format!("no answer within {} ms: a call into the host hangs", limit.as_millis());
                    return Ok(Err(Stop { stage: Stage::Call, reason }));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let reason = "a call into the host panicked".into();
                    return Ok(Err(Stop { stage: Stage::Call, reason }));
                }
            }
        }
    }

    fn init_limit(&self) -> Duration {
        Duration::from_millis(self.blueprint.limits.init_ms_max)
    }
}

/// The thread's end: the store and the timer.
struct Seat {
    blueprint: Arc<Blueprint>,
    role: Role,
    clock: Arc<CallClock>,
    runtime: tokio::runtime::Runtime,
    live: Option<Live>,
}

impl Seat {
    fn start(
        blueprint: &Arc<Blueprint>,
        role: &Role,
        clock: &Arc<CallClock>,
    ) -> Result<mpsc::Sender<Job>, PluginError> {
        let hosted = |error: std::io::Error| PluginError::Host { detail: format!("no thread for a plugin: {error}") };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .max_blocking_threads(2)
            .build()
            .map_err(hosted)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let mut seat =
            Self { blueprint: blueprint.clone(), role: role.clone(), clock: clock.clone(), runtime, live: None };
        std::thread::Builder::new()
            .name("cosmos-plugin".into())
            .spawn(move || {
                while let Ok(job) = queue.recv() {
                    job(&mut seat);
                }
            })
            .map_err(hosted)?;
        Ok(jobs)
    }

    fn perform<T>(
        &mut self,
        fresh: bool,
        limit: Duration,
        ask: impl for<'a> FnOnce(&'a mut Live) -> Asked<'a, T>,
    ) -> Result<T, Stop> {
        let worn = self.live.as_ref().is_some_and(|live| live.calls >= self.blueprint.limits.calls_per_instance_max);
        let mut live = match self.live.take() {
            Some(live) if !fresh && !worn => live,
            _ => self.open()?,
        };
        live.calls += 1;
        self.begin(&mut live.store, limit);
        match self.runtime.block_on(within(&self.clock, ask(&mut live))) {
            Ok(answer) => {
                self.live = Some(live);
                Ok(answer)
            }
            Err(error) => Err(Stop { stage: Stage::Call, reason: explain(&error, live.store.data()) }),
        }
    }

    fn begin(&self, store: &mut Store<GuestState>, limit: Duration) {
        store.data_mut().begin_call();
        self.clock.start(limit);
        store.set_epoch_deadline(ticks(limit));
    }

    fn open(&self) -> Result<Live, Stop> {
        let blueprint = &self.blueprint;
        let limits = &blueprint.limits;
        let stop = |stage: Stage, reason: String| Stop { stage, reason: one_line(&reason, REASON_BYTES_MAX) };
        let state = GuestState::new(
            &blueprint.plugin,
            &blueprint.grants,
            blueprint.capabilities.clone(),
            limits.clone(),
            self.clock.clone(),
        )
        .map_err(|error| stop(Stage::Instantiate, error.to_string()))?;
        let mut store = Store::new(blueprint.pre.engine(), state);
        store.limiter(|state| &mut state.meter);
        store.set_hostcall_fuel(limits.result_bytes_max);
        store.epoch_deadline_callback(|context| match context.data().clock.left() {
            // A download that was excused has moved the deadline.
            Some(left) => Ok(UpdateDeadline::Continue(ticks(left))),
            None => Err(DeadlineReached.into()),
        });
        self.begin(&mut store, Duration::from_millis(limits.init_ms_max));
        let started = self.runtime.block_on(within(&self.clock, blueprint.pre.instantiate_async(&mut store)));
        let instance = started.map_err(|error| stop(Stage::Instantiate, explain(&error, store.data())))?;
        let unlike = |error: wasmtime::Error| stop(Stage::Interface, format!("{error:#}"));
        let metadata = blueprint.metadata.load(&mut store, &instance).map_err(unlike)?;
        let dataset = blueprint.dataset.as_ref().map(|d| d.load(&mut store, &instance)).transpose().map_err(unlike)?;
        let reward = blueprint.reward.as_ref().map(|r| r.load(&mut store, &instance)).transpose().map_err(unlike)?;
        let mut live = Live { store, metadata, dataset, reward, calls: 0 };
        let initialised = self.runtime.block_on(within(&self.clock, init(&mut live, &self.role)));
        match initialised {
            Ok(Ok(())) => Ok(live),
            Ok(Err(message)) => Err(stop(Stage::Init, message)),
            Err(error) => Err(stop(Stage::Init, explain(&error, live.store.data()))),
        }
    }
}

async fn init(live: &mut Live, role: &Role) -> wasmtime::Result<Result<(), String>> {
    match role {
        Role::Describe => Ok(Ok(())),
        Role::Dataset { name, settings } => {
            let guest = live.dataset.as_ref().ok_or(NotExported)?;
            guest.call_init(&mut live.store, name, settings).await
        }
        Role::Reward { name, settings } => {
            let guest = live.reward.as_ref().ok_or(NotExported)?;
            guest.call_init(&mut live.store, name, settings).await
        }
    }
}

/// The component lacks the interface that is asked. Loading checks this, so it only guards later changes.
#[derive(Debug, thiserror::Error)]
#[error("the component does not export this interface")]
pub(crate) struct NotExported;

#[derive(Debug, thiserror::Error)]
#[error("the deadline was reached")]
struct DeadlineReached;

/// Runs the guest until it is done or its clock has run out. A sleeping guest is dropped where it sleeps.
async fn within<T>(clock: &CallClock, guest: impl Future<Output = wasmtime::Result<T>>) -> wasmtime::Result<T> {
    let mut guest = pin!(guest);
    while let Some(left) = clock.left() {
        if let Ok(done) = tokio::time::timeout(left, guest.as_mut()).await {
            return done;
        }
    }
    Err(DeadlineReached.into())
}

/// A trap in words that help: what the guest did, which limit it met, and the last thing it said.
fn explain(error: &wasmtime::Error, state: &GuestState) -> String {
    let limits = &state.limits;
    let trap = error.downcast_ref::<Trap>();
    let what = if error.downcast_ref::<DeadlineReached>().is_some() {
        format!("took longer than {} ms", state.clock.limit().as_millis())
    } else if let Some(denied) = &state.meter.denied {
        denied.clone()
    } else if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
        format!("ended itself with exit code {}", exit.0)
    } else if trap == Some(&Trap::StackOverflow) {
        format!("call stack exhausted, `stack_bytes_max` = {}: endless recursion?", limits.stack_bytes_max)
    } else if trap == Some(&Trap::UnreachableCodeReached) {
        "trapped: a panic, an abort or unreachable code".into()
    } else if matches!(error.downcast_ref::<ResourceTableError>(), Some(ResourceTableError::Full)) {
        "holds too many open handles".into()
    } else {
        let text = format!("{error:#}");
        if text.contains("fuel allocated for hostcalls") {
            format!("gave the host more data than `result_bytes_max` = {}", limits.result_bytes_max)
        } else {
            text
        }
    };
    let reason = match lock(&state.voice).last_words() {
        Some(words) => format!("{what}; its last words: {words}"),
        None => what,
    };
    one_line(&reason, REASON_BYTES_MAX)
}
