//! A teacher as a process: requests out of the broker, answers into it, until the controller says that the run is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cosmos_broker::{Broker, BrokerError, RedisAddress, RedisLink};
use cosmos_control::Need;
use cosmos_controller::Role;

use crate::error::{Result, RunError};
use crate::prepare::{self, Base};
use crate::roles::foreign::{self, Foreign};
use crate::roles::replica::Party;
use crate::roles::seat::{self, Next, Seat, own_ip};
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
    let party = match &options.part {
        None => None,
        Some(part) => Some(Party::meet(&options, part, own_ip(&base, &options)?, &seat::secret(&base, &options)?)?),
    };
    let mut teacher = Teacher::load(base.config(), spec, party.clone())?;
    if options.part.as_ref().is_some_and(|part| part.node > 0) {
        return teacher.follow(&StopFlag::listen(&base.config().train.signal_to_handle)?);
    }
    let number = specs.iter().position(|s| s.name == spec.name).unwrap_or(0);
    let mut seat = Seat::take(&base, &options, Role::Teacher, None)?;
    seat.speak_for(party.clone());
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
        Ok(Ok(())) => {
            if let Some(party) = party {
                party.go_home(&outcome)?;
            }
        }
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
    if options.part.is_some() {
        return Err(RunError::config(
            "",
            "a teacher without a run is one process, and `--nodes` says that it has several",
            "leave `--nodes`, `--node-rank` and `--rendezvous` away",
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
    let mut teacher = Teacher::load(config, spec, None)?;
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
            let names: Vec<&str> = several.iter().map(|s| s.name.as_str()).collect();
            which(&names, replica.unwrap_or_default()).and_then(|number| several.get(number)).ok_or_else(|| {
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

/// Which of several teachers a replica of this name is; none if its name does not say.
fn which(names: &[&str], replica: &str) -> Option<usize> {
    let rest = replica.strip_prefix("teacher-").unwrap_or(replica);
    let behind = |name: &str| rest.strip_prefix(name).filter(|r| r.is_empty() || r.starts_with('-'));
    // `a` and `a-0` may both be teachers: `teacher-a-0` is the first replica of `a`.
    let is_numbered = |name: &str| {
        let number = behind(name).and_then(|r| r.strip_prefix('-'));
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let named = (0..names.len()).filter(|&i| behind(names[i]).is_some());
    let number = || rest.rsplit('-').next()?.parse::<usize>().ok()?.checked_rem(names.len());
    named.max_by_key(|&i| (is_numbered(names[i]), names[i].len())).or_else(number)
}

/// What a run needs of its teachers, which are called `names`: one replica of each.
pub fn needs(names: Vec<String>) -> Vec<Need> {
    let all = Arc::new(names);
    if all.len() < 2 {
        return vec![Role::Teacher.into()];
    }
    let need = |number: usize| {
        let names = Arc::clone(&all);
        Need::some_of(Role::Teacher, &format!("teacher `{}`", all[number]), move |replica| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            which(&names, replica) == Some(number)
        })
    };
    (0..all.len()).map(need).collect()
}

/// How the run ended for this process, and how long the batch in hand may take after it.
fn wait_for_the_end(seat: &mut Seat, ended: &mpsc::Receiver<Result<()>>) -> Result<(RoleOutcome, Duration)> {
    loop {
        if let Ok(Err(error)) = ended.try_recv() {
            return Err(error);
        }
        match seat.look(None)? {
            None => {}
            // Nobody waits for its answers any more.
            Some(Next::Home(outcome)) => return Ok((outcome, Duration::from_millis(2 * TAKE_MS_MAX))),
            Some(Next::Excused) => return Ok((RoleOutcome::Done, LAST_BATCH)),
            Some(Next::Order(id, order)) => seat.refuse(id, &order)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::which;

    #[test]
    fn a_replica_is_the_teacher_that_its_name_says() {
        let of = |names: &[&str], replica| which(names, replica).map(|i| names[i].to_string());
        for (replica, teacher) in [
            ("teacher-math-0", Some("math")),
            ("teacher-code-12", Some("code")),
            ("code", Some("code")),
            ("teacher-0", Some("math")),
            ("teacher-3", Some("code")),
            ("teacher-mathematics", None),
            ("", None),
        ] {
            assert_eq!(of(&["math", "code"], replica).as_deref(), teacher, "{replica}");
        }
        assert_eq!(of(&["a", "a-0"], "teacher-a-0").as_deref(), Some("a"));
        assert_eq!(of(&["a", "a-0"], "teacher-a-0-0").as_deref(), Some("a-0"));
        assert_eq!(which(&[], "teacher-0"), None);
    }
}
