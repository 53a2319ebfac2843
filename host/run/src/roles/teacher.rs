//! A teacher as a process: requests out of the broker, answers into it, until the controller says that the run is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cosmos_broker::{Broker, BrokerError, RedisAddress, RedisLink};
use cosmos_controller::Role;

use crate::error::{Result, RunError};
use crate::prepare::{self, Base};
use crate::roles::foreign::{self, Foreign};
use crate::roles::seat::{Next, Seat};
use crate::roles::shelves::Shelves;
use crate::roles::teacher_ranks::Teacher;
use crate::roles::{RoleOptions, RoleOutcome};
use crate::signals::StopFlag;
use crate::teachers::{self, TeacherSpec};

/// How long to wait for requests before the controller's word is looked at again.
const TAKE_MS_MAX: u64 = 500;
/// How often to look for requests whose teacher has died.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a teacher that leaves may take to finish its batch; then another one takes it over.
const LAST_BATCH: Duration = Duration::from_secs(60);

/// Runs one teacher until the run is over.
pub fn run(options: RoleOptions) -> Result<RoleOutcome> {
    let base = Base::new(options.resolved.clone())?;
    super::check_processes(&base)?;
    let specs = teachers::specs(&base)?;
    let spec = of_process(&base, &specs, options.name.as_deref())?;
    let foreign = foreign::is_spoken(base.config()).then(|| side(&base, &options, false)).transpose()?;
    let mut teacher = Teacher::load(base.config(), spec)?;
    let number = specs.iter().position(|s| s.name == spec.name).unwrap_or(0);
    let mut seat = Seat::take(&base, &options, Role::Teacher, None)?;
    let depot = seat.depot(&base, foreign)?;
    let shelves = Shelves::open(&base, &options, &seat, &depot.store)?;
    shelves.put_head(|| teacher.head(), &spec.name, false)?;
    let Some(queue) = depot.queues.get(number).cloned() else {
        return Err(RunError::shared(seat.name(), format!("teacher `{}` has no queue", spec.name), ""));
    };
    let (name, teacher_name) = (seat.name().to_string(), spec.name.clone());
    // Whoever has held a request for so long has died, or is so slow that another may try it too.
    let idle_ms_max = base.config().host.silent_ms_max;
    let over = Arc::new(AtomicBool::new(false));
    let (told, ended) = mpsc::channel();
    let asked = Arc::clone(&over);
    // The controller only says when the run is over. It is asked beside the work, so that a long batch is no silence, and so
    // that a broker that has gone with the run holds nobody up.
    std::thread::Builder::new()
        .name("teacher".into())
        .spawn(move || {
            let look = |teacher: &mut Teacher| shelves.put_head(|| teacher.head(), &teacher_name, true);
            let over = || asked.load(Ordering::Acquire);
            drop(told.send(serve(&mut teacher, queue.as_ref(), &name, idle_ms_max, &over, &look)));
        })
        .map_err(|e| RunError::shared(seat.name(), format!("a thread cannot be started: {e}"), ""))?;
    let (outcome, patience) = wait_for_the_end(&mut seat, &ended)?;
    over.store(true, Ordering::Release);
    match ended.recv_timeout(patience) {
        Ok(Err(error)) => tracing::debug!("after its end: {error}"),
        Ok(Ok(())) => {}
        Err(_) => tracing::debug!("the last requests were not finished within {} ms", patience.as_millis()),
    }
    Ok(outcome)
}

/// Answers requests until it is over, or until the queue is closed. A batch in hand is finished whatever happens meanwhile.
/// `look` is called every second.
fn serve(
    teacher: &mut Teacher,
    queue: &dyn Broker,
    name: &str,
    idle_ms_max: u64,
    over: &dyn Fn() -> bool,
    look: &dyn Fn(&mut Teacher) -> Result<()>,
) -> Result<()> {
    // Somebody of this name that was killed has left what it was working on.
    let again = queue.reclaim_from(name)?;
    if again > 0 {
        tracing::warn!("{again} requests that an earlier `{name}` had taken are handed out again");
    }
    let mut looked = Instant::now();
    while !over() {
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            let again = queue.reclaim(idle_ms_max)?;
            if again > 0 {
                tracing::warn!("{again} requests were held for {idle_ms_max} ms and are handed out again");
            }
            look(teacher)?;
        }
        match teacher.serve(queue, name, TAKE_MS_MAX) {
            Err(RunError::Broker(BrokerError::Closed { .. })) => return Ok(()),
            served => {
                let stats = served?;
                if stats.tokens > 0 {
                    queue.worked(stats.tokens, (stats.seconds * 1e3).ceil() as u64)?;
                }
            }
        }
    }
    Ok(())
}

/// Our side of the original's wire: prompts come from the same dataset as the trainer's.
fn side(base: &Base, options: &RoleOptions, heeds_end: bool) -> Result<Foreign> {
    let prompts = prepare::prompts(base, &options.plugins)?;
    Ok(Foreign::teacher(prompts.dataset, base.text.clone(), heeds_end))
}

/// Runs a teacher for a trainer of the original.
pub fn alone(options: RoleOptions) -> Result<RoleOutcome> {
    let base = Base::new(options.resolved.clone())?;
    super::check_processes(&base)?;
    let config = base.config();
    if !foreign::is_spoken(config) {
        return Err(RunError::config(
            prepare::place(&base.resolved, "distillation.wire"),
            "a teacher without a run answers a trainer of the original, and `distillation.wire` is not `\"cosmos-rl\"`",
            "set it, or name the run by its folder or its controller's address",
        ));
    }
    let url = options.broker_url.clone().unwrap_or_else(|| config.redis.clone());
    if url.is_empty() {
        return Err(RunError::config(
            prepare::place(&base.resolved, "redis"),
            "`redis` is empty, and a teacher without a run starts no server",
            "set `redis` to the port or URL of the trainer's server",
        ));
    }
    let specs = teachers::specs(&base)?;
    let spec = of_process(&base, &specs, options.name.as_deref())?;
    let at = |e: BrokerError| RunError::from(e).at(|| prepare::place(&base.resolved, "redis"));
    let address = RedisAddress::parse(&url).map_err(at)?;
    let link = RedisLink::connect(&address, super::redis_limits(config)).map_err(at)?;
    let side = side(&base, &options, true)?;
    let stop = StopFlag::listen(&config.train.signal_to_handle)?;
    let name = options.name.clone().unwrap_or_else(|| format!("teacher-{}", std::process::id()));
    let queue = side.queue(link, "", &name, config)?;
    let mut teacher = Teacher::load(config, spec)?;
    tracing::info!("`{name}` answers the requests at {address}");
    serve(&mut teacher, queue.as_ref(), &name, config.host.silent_ms_max, &|| stop.is_set(), &|_| Ok(()))?;
    Ok(RoleOutcome::Done)
}

/// Which of the run's teachers this process is: the only one, or the one that the replica's name begins with, as
/// `teacher-NAME-0`; a name that only ends with a number takes turns.
fn of_process<'s>(base: &Base, specs: &'s [TeacherSpec], replica: Option<&str>) -> Result<&'s TeacherSpec> {
    match specs {
        [] => Err(RunError::config(
            prepare::place(&base.resolved, "distillation.enable"),
            "this run has no teacher: `distillation.enable` is false",
            "start no teacher for it, or switch distillation on",
        )),
        [only] => Ok(only),
        several => {
            let rest = replica.unwrap_or_default();
            let rest = rest.strip_prefix("teacher-").unwrap_or(rest);
            let is_named = |s: &&TeacherSpec| {
                rest.strip_prefix(s.name.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('-'))
            };
            let number =
                || rest.rsplit('-').next().and_then(|n| n.parse::<usize>().ok()).map(|n| &several[n % several.len()]);
            // `a` and `a-0` may both be teachers: `teacher-a-0` is the first replica of `a`.
            let is_numbered = |s: &TeacherSpec| {
                let number = rest.strip_prefix(s.name.as_str()).and_then(|r| r.strip_prefix('-'));
                number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
            };
            let named = several.iter().filter(is_named).max_by_key(|s| (is_numbered(s), s.name.len()));
            named.or_else(number).ok_or_else(|| {
                let names: Vec<&str> = several.iter().map(|s| s.name.as_str()).collect();
                RunError::config(
                    "",
                    format!(
                        "this run has the teachers {}, and it is not said which of them this process is",
                        names.join(", ")
                    ),
                    format!("name the replica after it: `--name teacher-{}-0`", names[0]),
                )
            })
        }
    }
}

/// How the run ended for this process, and how long the batch in hand may take after it.
fn wait_for_the_end(seat: &mut Seat, ended: &mpsc::Receiver<Result<()>>) -> Result<(RoleOutcome, Duration)> {
    loop {
        if let Ok(Err(error)) = ended.try_recv() {
            return Err(error);
        }
        match seat.next(None)? {
            // Nobody waits for its answers any more.
            Next::Home(outcome) => return Ok((outcome, Duration::from_millis(2 * TAKE_MS_MAX))),
            Next::Asked => {
                if let Some(outcome) = seat.leave()? {
                    return Ok((outcome, LAST_BATCH));
                }
            }
            Next::Rejoined => {}
            Next::Order(id, order) => drop(seat.refuse(id, &order)?),
        }
    }
}
