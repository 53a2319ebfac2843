//! The threads behind an open dataset, reward or environment: a bounded queue of batches, and seats that take them.
//! Whoever waits for results looks after the threads, so that a host call that hangs costs a thread, not the run.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::CallClock;
use crate::seat::{Blueprint, OpenTimes, Role, Seat, Stop};
use crate::{Limits, PluginError};

/// How much longer than the guest's own deadline a waiting caller gives it. The guest's deadline gives the better
/// reason.
const GRACE: Duration = Duration::from_secs(5);
/// How often a waiting caller looks at the clocks, which the seats restart for each stage of a call.
pub(crate) const LOOK: Duration = Duration::from_millis(200);
/// Text that may wait in the queue before a caller has to wait with more.
const QUEUED_BYTES_MAX: usize = 256 << 20;

/// Where the results of batches go.
pub(crate) trait Order: Send + Sync {
    /// Asks the guest about the items of `range` and keeps the results. After an error there are none.
    fn run(&self, seat: &mut Seat, range: Range<usize>, alone: bool) -> Result<(), Stop>;
    /// These items have failed for good.
    fn give_up(&self, range: Range<usize>, stop: Stop);
    /// There is no thread for the rest.
    fn host_failed(&self, detail: &str);
    /// Nobody waits for the results any more.
    fn is_cancelled(&self) -> bool;
    fn plugin(&self) -> &str;
}

/// A batch, or one item of a batch that failed.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) order: Arc<dyn Order>,
    pub(crate) range: Range<usize>,
    /// In a fresh instance, and the last try.
    pub(crate) alone: bool,
    pub(crate) bytes: usize,
}

/// The handle. Its threads end when the last one is gone.
pub(crate) struct Crew(Arc<Hall>);

struct Hall {
    blueprint: Arc<Blueprint>,
    role: Role,
    workers_max: usize,
    floor: Mutex<Floor>,
    /// There is something to do.
    work: Condvar,
    /// The queue got shorter.
    room: Condvar,
    memory_bytes: Arc<AtomicU64>,
    times: Arc<OpenTimes>,
}

#[derive(Default)]
struct Floor {
    queue: VecDeque<Job>,
    queued_bytes: usize,
    posts: Vec<Post>,
    /// Threads that will look at the queue next: waiting or being started.
    free: usize,
    next_id: u64,
    closed: bool,
}

/// One thread as its crew knows it.
struct Post {
    id: u64,
    clock: Arc<CallClock>,
    job: Option<Job>,
}

impl Crew {
    /// A crew of at most `workers_max` threads. None is started before there is work.
    pub(crate) fn new(blueprint: Arc<Blueprint>, role: Role, workers_max: usize) -> Arc<Self> {
        Arc::new(Self(Arc::new(Hall {
            blueprint,
            role,
            workers_max: workers_max.max(1),
            floor: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            memory_bytes: Arc::default(),
            times: Arc::default(),
        })))
    }

    pub(crate) fn limits(&self) -> &Arc<Limits> {
        &self.0.blueprint.limits
    }

    pub(crate) fn plugin(&self) -> &str {
        &self.0.blueprint.plugin
    }

    /// Whether requests are cut small enough to be shared.
    pub(crate) fn spreads(&self) -> bool {
        !matches!(self.0.role, Role::Dataset { .. } | Role::Describe)
    }

    /// Memory of the largest instance so far.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.0.memory_bytes.load(Ordering::Relaxed)
    }

    /// How long making the last instance took, without its `init`.
    pub(crate) fn instantiate_time(&self) -> Duration {
        Duration::from_nanos(self.0.times.instantiate_ns.load(Ordering::Relaxed))
    }

    /// Puts `jobs` behind the others, and waits first while too much waits already.
    pub(crate) fn enqueue(&self, jobs: Vec<Job>) -> Result<(), PluginError> {
        let hall = &self.0;
        let mut floor = hall.floor();
        while floor.queued_bytes > QUEUED_BYTES_MAX {
            let (next, waited) = hall.room.wait_timeout(floor, LOOK).unwrap_or_else(PoisonError::into_inner);
            floor = next;
            if waited.timed_out() {
                drop(floor);
                self.supervise();
                floor = hall.floor();
            }
        }
        floor.queued_bytes += jobs.iter().map(|job| job.bytes).sum::<usize>();
        floor.queue.extend(jobs);
        hall.staff(floor).map_err(|detail| PluginError::Host { detail })
    }

    /// Gives up threads whose guest is far beyond its deadline: a call into the host hangs. The thread is left to
    /// itself and ends when that call returns.
    pub(crate) fn supervise(&self) {
        let hall = &self.0;
        let mut lost = Vec::new();
        let mut floor = hall.floor();
        floor.posts.retain(|post| match &post.job {
            Some(job) if post.clock.overdue() >= GRACE => {
                lost.push((job.clone(), post.clock.limit()));
                false
            }
            _ => true,
        });
        drop(floor);
        for (job, limit) in lost {
            let reason = format!("no answer within {} ms: a call into the host hangs", limit.as_millis());
            hall.failed(job, Stop::call(reason));
        }
    }

    /// Takes what nobody waits for out of the queue.
    pub(crate) fn forget_cancelled(&self) {
        let mut floor = self.0.floor();
        floor.queue.retain(|job| !job.order.is_cancelled());
        floor.queued_bytes = floor.queue.iter().map(|job| job.bytes).sum();
        drop(floor);
        self.0.room.notify_all();
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        let mut floor = self.0.floor();
        floor.closed = true;
        floor.clear_queue();
        drop(floor);
        self.0.work.notify_all();
    }
}

impl Floor {
    fn clear_queue(&mut self) -> VecDeque<Job> {
        self.queued_bytes = 0;
        std::mem::take(&mut self.queue)
    }
}

impl Hall {
    fn floor(&self) -> MutexGuard<'_, Floor> {
        self.floor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes or starts as many threads as there is work for.
    ///
    /// # Errors
    /// When there is work, and no thread at all can be had: everybody who waits for some of it is told.
    fn staff(self: &Arc<Self>, mut floor: MutexGuard<'_, Floor>) -> Result<(), String> {
        let wanted = floor.queue.len().saturating_sub(floor.free);
        let vacant = self.workers_max.saturating_sub(floor.posts.len());
        for _ in 0..wanted.min(vacant) {
            if let Err(error) = self.hire(&mut floor) {
                if floor.posts.is_empty() {
                    let detail = format!("no thread for a plugin: {error}");
                    let queue = floor.clear_queue();
                    drop(floor);
                    queue.into_iter().for_each(|job| job.order.host_failed(&detail));
                    return Err(detail);
                }
                tracing::warn!(plugin = self.blueprint.plugin, "one thread less for the plugin: {error}");
                break;
            }
        }
        match floor.queue.len() {
            0 => {}
            1 => self.work.notify_one(),
            _ => self.work.notify_all(),
        }
        Ok(())
    }

    fn hire(self: &Arc<Self>, floor: &mut Floor) -> std::io::Result<()> {
        let clock = Arc::new(CallClock::new());
        let mut seat = Seat::new(
            self.blueprint.clone(),
            self.role.clone(),
            clock.clone(),
            self.memory_bytes.clone(),
            self.times.clone(),
        )?;
        let id = floor.next_id;
        let hall = self.clone();
        std::thread::Builder::new().name("cosmos-plugin".into()).spawn(move || hall.work(id, &mut seat))?;
        floor.next_id += 1;
        floor.free += 1;
        floor.posts.push(Post { id, clock, job: None });
        Ok(())
    }

    /// The life of a thread.
    fn work(self: &Arc<Self>, id: u64, seat: &mut Seat) {
        while let Some(job) = self.next(id) {
            let asked = || job.order.run(seat, job.range.clone(), job.alone);
            let (result, is_sound) = match catch_unwind(AssertUnwindSafe(asked)) {
                Ok(result) => (result, true),
                Err(_) => (Err(Stop::call("a call into the host panicked".into())), false),
            };
            if !self.back(id, is_sound) {
                return;
            }
            if let Err(stop) = result {
                self.failed(job, stop);
            }
            if !is_sound {
                // What unwound through the seat is not trusted again; `failed` has staffed the rest of the work.
                return;
            }
        }
    }

    fn next(&self, id: u64) -> Option<Job> {
        let mut floor = self.floor();
        loop {
            if floor.closed {
                floor.posts.retain(|post| post.id != id);
                return None;
            }
            if let Some(job) = floor.queue.pop_front() {
                floor.queued_bytes = floor.queued_bytes.saturating_sub(job.bytes);
                floor.free = floor.free.saturating_sub(1);
                if let Some(post) = floor.posts.iter_mut().find(|post| post.id == id) {
                    // Making the instance is bounded by this; the seat restarts the clock for each stage.
                    post.clock.start(Duration::from_millis(self.blueprint.limits.init_ms_max));
                    post.job = Some(job.clone());
                }
                drop(floor);
                self.room.notify_all();
                return Some(job);
            }
            floor = self.work.wait(floor).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread is back from its guest; `false` when it was given up meanwhile.
    fn back(&self, id: u64, stays: bool) -> bool {
        let mut floor = self.floor();
        let Some(at) = floor.posts.iter().position(|post| post.id == id) else { return false };
        if stays {
            floor.posts[at].job = None;
            floor.free += 1;
        } else {
            floor.posts.swap_remove(at);
        }
        true
    }

    /// A batch's items are tried one by one; an item alone has failed.
    fn failed(self: &Arc<Self>, job: Job, stop: Stop) {
        let mut floor;
        if job.alone {
            job.order.give_up(job.range, stop);
            floor = self.floor();
        } else {
            tracing::warn!(
                plugin = job.order.plugin(),
                "a batch of {} items failed and is retried item by item: {}",
                job.range.len(),
                stop.reason_with_stage()
            );
            floor = self.floor();
            if floor.closed {
                return;
            }
            for item in job.range.rev() {
                let order = job.order.clone();
                floor.queue.push_front(Job { order, range: item..item + 1, alone: true, bytes: 0 });
            }
        }
        // Whoever waits is told of a failure.
        let _ = self.staff(floor);
    }
}
