//! Where one instance lives: its store, its clock and the timer that wakes a sleeping guest. A seat belongs to one
//! thread.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wasmtime::component::InstancePre;
use wasmtime::{Store, UpdateDeadline};

use crate::batch::BatchCall;
use crate::clock::{CallClock, ticks};
use crate::guest::{Exports, Indices, Outcomes};
use crate::host::Ticker;
use crate::sandbox::GuestState;
use crate::trap::{DeadlineReached, explain};
use crate::voice::{REASON_BYTES_MAX, one_line};
use crate::{Capabilities, Grant, Limits, PluginError};

/// A loaded component with all that an instance of it needs.
#[derive(Clone)]
pub(crate) struct Blueprint {
    pub(crate) plugin: String,
    pub(crate) pre: InstancePre<GuestState>,
    pub(crate) indices: Indices,
    pub(crate) grants: Vec<Grant>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) capabilities: Capabilities,
    /// Without it no deadline would ever be reached.
    pub(crate) _ticker: Arc<Ticker>,
}

/// What an instance is for, and so which `init` it runs.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    Describe,
    Dataset { name: String, settings: String },
    Reward { name: String, settings: String },
    Environment { name: String, settings: String },
}

/// Where a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The component's start code.
    Instantiate,
    /// Matching the exports' types.
    Interface,
    /// `init` of the dataset, reward or environment.
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

impl Stop {
    pub(crate) fn call(reason: String) -> Self {
        Self { stage: Stage::Call, reason }
    }

    pub(crate) fn into_error(self, plugin: &str, function: &str) -> PluginError {
        PluginError::Call { plugin: plugin.into(), function: function.into(), reason: self.reason_with_stage() }
    }

    /// The reason, with the place when it is not the call itself.
    pub(crate) fn reason_with_stage(&self) -> String {
        match self.stage {
            Stage::Instantiate => format!("while it was started: {}", self.reason),
            Stage::Interface | Stage::Call => self.reason.clone(),
            Stage::Init => format!("`init`: {}", self.reason),
        }
    }
}

/// A live instance.
pub(crate) struct Live {
    pub(crate) store: Store<GuestState>,
    pub(crate) exports: Exports,
    calls: u32,
}

pub(crate) type Asked<'a, T> = Pin<Box<dyn Future<Output = wasmtime::Result<T>> + 'a>>;

/// The time that loading took.
#[derive(Debug, Default)]
pub(crate) struct OpenTimes {
    pub(crate) instantiate_ns: AtomicU64,
}

/// One instance at a time, made when it is needed.
pub(crate) struct Seat {
    blueprint: Arc<Blueprint>,
    role: Role,
    clock: Arc<CallClock>,
    runtime: tokio::runtime::Runtime,
    live: Option<Live>,
    /// The largest memory of any instance of the crew.
    memory_bytes: Arc<AtomicU64>,
    times: Arc<OpenTimes>,
}

impl Seat {
    pub(crate) fn new(
        blueprint: Arc<Blueprint>,
        role: Role,
        clock: Arc<CallClock>,
        memory_bytes: Arc<AtomicU64>,
        times: Arc<OpenTimes>,
    ) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().max_blocking_threads(2).build()?;
        Ok(Self { blueprint, role, clock, runtime, live: None, memory_bytes, times })
    }

    /// Asks the guest, on an instance that is made when there is none, or always when `fresh`.
    pub(crate) fn ask<C: BatchCall>(
        &mut self,
        items: &[C::Item],
        fresh: bool,
        limit: Duration,
    ) -> Result<Outcomes<C::Raw>, Stop> {
        let worn = self.live.as_ref().is_some_and(|live| live.calls >= self.blueprint.limits.calls_per_instance_max);
        let mut live = match self.live.take() {
            Some(live) if !fresh && !worn => live,
            old => {
                // Before the new one is made, so that a recycled instance never doubles the memory.
                drop(old);
                self.open()?
            }
        };
        live.calls += 1;
        self.begin(&mut live.store, limit);
        let answer = self.runtime.block_on(within(&self.clock, C::ask(&mut live, items)));
        self.memory_bytes.fetch_max(live.store.data().meter.bytes(), Ordering::Relaxed);
        match answer {
            Ok(answer) => {
                self.live = Some(live);
                Ok(answer)
            }
            Err(error) => Err(Stop::call(explain(&error, live.store.data()))),
        }
    }

    fn begin(&self, store: &mut Store<GuestState>, limit: Duration) {
        store.data_mut().begin_call();
        self.clock.start(limit);
        store.set_epoch_deadline(ticks(limit));
    }

    fn open(&self) -> Result<Live, Stop> {
        let started = std::time::Instant::now();
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
        let ready = self.runtime.block_on(within(&self.clock, blueprint.pre.instantiate_async(&mut store)));
        let instance = ready.map_err(|error| stop(Stage::Instantiate, explain(&error, store.data())))?;
        let unlike = |error: wasmtime::Error| stop(Stage::Interface, format!("{error:#}"));
        let exports = blueprint.indices.load(&mut store, &instance).map_err(unlike)?;
        self.times.instantiate_ns.store(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        let mut live = Live { store, exports, calls: 0 };
        let initialised = self.runtime.block_on(within(&self.clock, init(&mut live, &self.role)));
        match initialised {
            Ok(Ok(())) => Ok(live),
            Ok(Err(message)) => Err(stop(Stage::Init, message)),
            Err(error) => Err(stop(Stage::Init, explain(&error, live.store.data()))),
        }
    }
}

async fn init(live: &mut Live, role: &Role) -> wasmtime::Result<Result<(), String>> {
    let Live { store, exports, .. } = live;
    match role {
        Role::Describe => Ok(Ok(())),
        Role::Dataset { name, settings } => exports.init_dataset(store, name, settings).await,
        Role::Reward { name, settings } => exports.init_reward(store, name, settings).await,
        Role::Environment { name, settings } => exports.init_environment(store, name, settings).await,
    }
}

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
