//! The controller as a process: it knows who does what, and keeps the books. It holds no model and sees no completion.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use cosmos_broker::{RedisAddress, RedisLink, RedisServer, ServerOptions, open_or_start};
use cosmos_config::shapes::FlagOrText;
use cosmos_control::{End, Endpoint, EndpointOptions, Need, Report, Token};
use cosmos_controller::{Controller, Event, Order, Outcome, Role};
use cosmos_report::{Progress, ProgressKind, RunFolder};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Result, RunError};
use crate::prepare::{self, Base, Prompts};
use crate::records::{History, Records, Throughput};
use crate::resume::{self, Begun};
use crate::rewards::Tally;
use crate::roles::books::{Books, TeacherView, write_description};
use crate::roles::foreign;
use crate::roles::policy::Saved;
use crate::roles::seat::{RunInfo, identity};
use crate::roles::shelves;
use crate::roles::trainer::TrainNotes;
use crate::roles::writer::WrittenNotes;
use crate::roles::{RoleOptions, RoleOutcome, teacher};
use crate::signals::StopFlag;
use crate::validation::Share;

const BOOKS: &str = "books.json";
const BOOKS_BYTES_MAX: u64 = 1 << 30;
const RUN_NAME: &str = "run_name";
pub(crate) const LEDGER: &str = "ledger.log";
/// Keys of the config in which a run that goes on by `--resume` may differ from before: it begins at its newest checkpoint.
const MAY_CHANGE: [&str; 1] = ["train.max_num_steps"];
const LOOK: Duration = Duration::from_millis(200);
/// How long roles have to hear that the run has failed before the controller goes.
const BAD_NEWS: Duration = Duration::from_secs(3);

/// What the books know beside the records themselves, as of the ledger's report `seq`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Page {
    seq: u64,
    step: u64,
    /// Samples of the steps made, as runs of steps with equally many: how many samples, in how many steps.
    samples: Vec<(u64, u64)>,
    history: History,
    tally: Tally,
    generated: Throughput,
    /// Reports of a step or validation that not all who take part in it have made.
    pending: Vec<Report>,
    checkpoint: Option<PathBuf>,
    /// Steps with a loss or gradient that was not finite.
    bad_steps: Vec<u64>,
    /// Those before them that are only counted: of before the checkpoint that this controller's part of the run began with.
    #[serde(default)]
    skipped_before: u64,
    /// Lengths of the record files, in bytes.
    metrics_bytes: u64,
    samples_bytes: u64,
}

impl Page {
    fn add_step(&mut self, samples: u64) {
        match self.samples.last_mut() {
            Some((each, steps)) if *each == samples => *steps += 1,
            _ => self.samples.push((samples, 1)),
        }
    }

    /// Takes back the last `steps` steps.
    fn take_back(&mut self, mut steps: u64) {
        while steps > 0
            && let Some((_, last)) = self.samples.last_mut()
        {
            let taken = steps.min(*last);
            (*last, steps) = (*last - taken, steps - taken);
            if *last == 0 {
                self.samples.pop();
            }
        }
    }

    /// The page of a run that begins anew with a checkpoint: nothing before it is ever taken back.
    fn of(begun: &Begun) -> Self {
        let (step, in_a_row) = (begun.controller.step(), begun.history.skipped_in_a_row);
        Self {
            step,
            bad_steps: (step.saturating_sub(in_a_row) + 1..=step).collect(),
            samples: vec![(begun.controller.trained(), 1)],
            history: begun.history.clone(),
            tally: begun.tally,
            skipped_before: begun.history.skipped_steps.saturating_sub(in_a_row),
            checkpoint: Some(begun.checkpoint.clone()),
            ..Self::default()
        }
    }

    /// Takes back what came after `step` from the numbers of the whole run.
    fn forget_after(&mut self, step: u64) {
        self.bad_steps.retain(|bad| *bad <= step);
        let in_a_row = self.bad_steps.iter().rev().enumerate().take_while(|(i, bad)| **bad + *i as u64 == step);
        self.history.skipped_in_a_row = in_a_row.count() as u64;
        self.history.skipped_steps = self.skipped_before + self.bad_steps.len() as u64;
        self.history.validations.retain(|v| v.step <= step);
        self.take_back(self.step.saturating_sub(step));
        self.step = step;
    }

    fn samples_total(&self) -> u64 {
        self.samples.iter().map(|(each, steps)| each * steps).sum()
    }
}

struct Clerk {
    books: Books,
    page: Page,
    at: PathBuf,
}

/// Runs the controller until the run is over.
pub fn run(options: RoleOptions) -> Result<RoleOutcome> {
    let base = Base::new(options.resolved.clone())?;
    super::check_processes(&base)?;
    let config = base.config();
    let prompts = prepare::prompts(&base, &options.plugins)?;
    let plan = prepare::plan_of_processes(&base, &prompts)?;
    let stop = StopFlag::listen(&config.train.signal_to_handle)?;
    let root = options.run_folder.clone().unwrap_or_else(|| PathBuf::from(&config.train.output_dir));
    let mut known = root.join(LEDGER).is_file();
    let resume = options.resume || options.restarted || config.train.resume == FlagOrText::Flag(true);
    if known && !resume {
        return Err(RunError::config(
            "",
            format!("{} holds a run already", root.display()),
            "go on with it by `--resume`, or take another folder",
        ));
    }
    if let FlagOrText::Text(checkpoint) = &config.train.resume {
        return Err(RunError::config(
            prepare::place(&base.resolved, "train.resume"),
            format!(
                "`train.resume` names a checkpoint, {checkpoint}, and a run of several processes goes on only in its folder"
            ),
            "name its run folder with `--resume` instead, or start anew from `ckpt export`'s folder as `policy.model_name_or_path`",
        ));
    }
    let identity = identity(&base.resolved, &options.plugins)?;
    let is_longer = options.resume
        && !options.restarted
        && cosmos_control::identity_in(&root).is_some_and(|theirs| theirs.differs_only_in(&identity, &MAY_CHANGE));
    let begun = if resume && (!known || is_longer) { resume::begun(&root)? } else { None };
    if begun.is_some() && known {
        // What the ledger promised was for another number of steps; the checkpoint says all that is needed.
        super::retire(&root)?;
        known = false;
    }
    let old = known || begun.is_some();
    let folder = if old { RunFolder::open_existing(&root)? } else { RunFolder::create(&root)? };
    if !known {
        write_description(&folder, &base, &prompts.plugins, &prompts.uses)?;
    }
    let run = run_name(&root)?;
    // Lives as long as this process.
    let (broker_url, server) = broker(&base, &options, &root)?;
    let total_steps = plan.total_steps();
    let mut clerk = Clerk::open(&base, &prompts, folder, total_steps, begun.as_ref())?;
    let controller = match begun {
        None => Controller::new(plan.clone()),
        Some(begun) => Controller::resume(plan.clone(), begun.controller),
    };
    let ranks = crate::shards::mesh(&base.config().policy.parallelism, "policy.parallelism")?.world() as u64;
    for line in base.plan(&prompts, &plan, &crate::teachers::specs(&base)?, ranks).lines() {
        clerk.books.records.progress.note(&line);
    }
    let mut needs = vec![Need::from(Role::Policy), Need::from(Role::Rollout)];
    if config.distillation.enable && !foreign::has_the_teacher(config) {
        let names = config.distillation.each_teacher().into_iter().map(|teacher| teacher.name);
        needs.extend(teacher::needs(names.collect()));
    }
    let end_for = foreign::has_the_teacher(config).then(|| (broker_url.clone(), run.clone()));
    let info = RunInfo { run, broker_url, run_folder: root.clone(), total_steps };
    let endpoint = EndpointOptions {
        address: address(&base)?,
        token: options.token.as_deref().map(Token::parse).transpose()?,
        run_folder: root,
        identity,
        info: serde_json::to_value(info).unwrap_or_default(),
        needs,
        reopen: options.resume && !options.restarted,
        deadlines: super::deadlines(config),
    };
    let (endpoint, reports) = Endpoint::start(endpoint, controller)?;
    if known {
        // Not before the ledger has said that it is this run's.
        write_description(&clerk.books.records.folder, &base, &prompts.plugins, &prompts.uses)?;
    }
    drop(prompts);
    clerk.books.records.progress.note(&format!("controller at {}", endpoint.url()));
    let outcome = serve(&endpoint, &reports, &mut clerk, &stop)?;
    if let (RoleOutcome::Done, Some((broker_url, run))) = (&outcome, end_for) {
        // All is trained and saved: a teacher that does not hear of the end changes nothing of that.
        if let Err(error) = foreign::say_the_end(base.config(), &broker_url, &run) {
            tracing::warn!("the original's teacher was not told that the run is over: {error}");
        }
    }
    if let (Some(server), RoleOutcome::Done) = (server, &outcome) {
        drop(server);
        remove(&clerk.books.records.folder.root().join("redis"));
    }
    Ok(outcome)
}

fn serve(endpoint: &Endpoint, reports: &Receiver<Report>, clerk: &mut Clerk, stop: &StopFlag) -> Result<RoleOutcome> {
    let mut asked = false;
    loop {
        if stop.is_set() && !asked {
            asked = true;
            clerk.books.records.progress.note("asked to leave: saving");
            endpoint.inject(Event::StopRequested)?;
        }
        // Looked at before the reports, so that none that came before the end is missed.
        let end = endpoint.end();
        match reports.recv_timeout(if end.is_some() { Duration::ZERO } else { LOOK }) {
            Ok(report) => {
                let (seq, step) = (report.seq, clerk.page.step);
                let is_checkpoint = matches!(report.order, Order::Save { hand_over: false, .. });
                if let Err(error) = clerk.enter(report) {
                    let error = error.during(step);
                    endpoint.fail(error.to_string());
                    std::thread::sleep(BAD_NEWS);
                    return Err(error);
                }
                endpoint.recorded(seq);
                if is_checkpoint && let Err(error) = endpoint.compact() {
                    tracing::warn!("the ledger stays as long as it is: {error}");
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        match end {
            None => {}
            Some(End::Done) => {
                let made = endpoint.status()?["run"]["step"].as_u64();
                clerk.finish(made.unwrap_or(clerk.page.step))?;
                tidy(clerk.books.records.folder.root());
                return Ok(RoleOutcome::Done);
            }
            Some(End::Saved) => {
                clerk.books.records.progress.finish();
                return Ok(RoleOutcome::Saved);
            }
            Some(End::Failed(reason)) => {
                std::thread::sleep(BAD_NEWS);
                return Err(RunError::Diverged { message: reason, hint: "the roles' logs say more".into() });
            }
        }
    }
}

/// What the books of a run folder say of the run as of `step`; what they do not know is left out.
pub fn history_at(run_folder: &Path, step: u64) -> Result<(History, Tally)> {
    let mut page = read_page(&run_folder.join(BOOKS))?;
    let tally = if page.step == step { page.tally } else { Tally::default() };
    page.forget_after(step);
    Ok((page.history, tally))
}

/// Takes away what only processes of a run that is going on need. What is left over costs space and nothing else.
pub fn tidy(root: &Path) {
    [shelves::WEIGHTS, shelves::TEACHERS, super::HAND_OVER].iter().for_each(|folder| remove(&root.join(folder)));
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!("{} stays: {error}", folder.display());
    }
}

impl Clerk {
    /// Opens the books of a run folder, and brings the record files to where the last page was written.
    /// `begun`: a checkpoint that the run begins with.
    fn open(
        base: &Base,
        prompts: &Prompts,
        folder: RunFolder,
        total_steps: u64,
        begun: Option<&Begun>,
    ) -> Result<Self> {
        let at = folder.root().join(BOOKS);
        let page = match begun {
            Some(begun) => Page::of(begun),
            None => {
                let page = read_page(&at)?;
                // Lines after the last page belong to a report that will come again.
                cut(&folder.metrics_jsonl(), page.metrics_bytes)?;
                cut(&folder.samples_jsonl(), page.samples_bytes)?;
                page
            }
        };
        let progress = Progress::new(ProgressKind::detect(), total_steps);
        progress.note(&format!("run folder {}", folder.root().display()));
        if page.step > 0 {
            progress.start_at(page.step);
            progress.note(&format!("resumed at step {}", page.step));
        }
        let records = Records::open(folder, progress, page.history.clone(), begun.map(|_| page.step))?;
        let mut books = Books::new(base, prompts, records, page.tally, total_steps);
        books.generated = page.generated;
        let mut clerk = Self { books, page, at };
        if begun.is_some() {
            // Before there is a ledger, which would pass for the whole run's.
            clerk.turn(0)?;
        }
        Ok(clerk)
    }

    /// Takes a report into the books. One that they hold already changes nothing.
    fn enter(&mut self, report: Report) -> Result<()> {
        if report.seq <= self.page.seq {
            return Ok(());
        }
        let seq = report.seq;
        if let Some(step) = standing(&report).filter(|_| !self.is_of_a_step_under_way(&report)) {
            self.stands_at(step)?;
        }
        match (&report.order, &report.outcome) {
            (Order::Generate { .. }, Outcome::Generated { .. }) => {
                let notes: WrittenNotes = notes(&report)?;
                self.books.written(&notes);
            }
            (Order::Train { step, members, attempt, .. }, Outcome::Trained | Outcome::Unpublished) => {
                let (step, members, attempt) = (*step, members.clone(), *attempt);
                self.trained(report, step, &members, attempt)?;
            }
            (Order::Validate { step, parts, .. }, Outcome::Validated) => {
                let (step, parts) = (*step, *parts);
                self.validated(report, step, parts)?;
            }
            (Order::Save { step, hand_over: false, .. }, Outcome::Saved) => {
                let step = *step;
                let saved: Saved = notes(&report)?;
                self.books.records.progress.note(&format!("saved step {step}: {}", saved.checkpoint.display()));
                self.page.checkpoint = Some(saved.checkpoint);
            }
            (Order::Load { step, .. }, Outcome::Loaded) => {
                tracing::debug!("`{}` holds step {step}", report.replica);
            }
            _ => {}
        }
        self.turn(seq)
    }

    fn trained(&mut self, report: Report, step: u64, members: &[(String, String)], attempt: u64) -> Result<()> {
        self.page.pending.push(report);
        match self.members_heard(attempt) == members.len() {
            true => self.record_step(step, attempt),
            false => Ok(()),
        }
    }

    /// Whether another member has told of the same attempt at a step.
    fn is_of_a_step_under_way(&self, report: &Report) -> bool {
        matches!(report.order, Order::Train { attempt, .. } if self.members_heard(attempt) > 0)
    }

    /// Members that have told what they know of an attempt at a step.
    fn members_heard(&self, attempt: u64) -> usize {
        self.page.pending.iter().filter(|r| is_of_attempt(r, attempt)).count()
    }

    /// The run stands at `step` for certain. A step before it that some of its members have told of, and others have not
    /// before they were lost, is recorded by what is known of it; what comes after it is taken back.
    fn stands_at(&mut self, step: u64) -> Result<()> {
        if step < self.page.step {
            return self.roll_back(step);
        }
        let attempts = self.page.pending.iter().filter_map(|report| match &report.order {
            Order::Train { step: made, attempt, members, .. } => Some((*made, *attempt, members.clone())),
            _ => None,
        });
        let Some((made, attempt, members)) = attempts.max_by_key(|(_, attempt, _)| *attempt) else { return Ok(()) };
        if made > step {
            // Those who have made it are gone, and it is made again.
            self.page.pending.retain(|r| !matches!(r.order, Order::Train { .. }));
            return Ok(());
        }
        let heard = |name: &String| self.page.pending.iter().any(|r| is_of_attempt(r, attempt) && r.replica == *name);
        let silent: Vec<&str> =
            members.iter().map(|(name, _)| name).filter(|n| !heard(n)).map(String::as_str).collect();
        tracing::warn!(
            "step {made} is recorded without what {} had to tell of it before it was lost",
            silent.join(", ")
        );
        self.record_step(made, attempt)
    }

    /// Records step `step` by what its members have told of it.
    fn record_step(&mut self, step: u64, attempt: u64) -> Result<()> {
        let trained = std::mem::take(&mut self.page.pending).into_iter();
        let (trained, others) = trained.partition(|r| matches!(r.order, Order::Train { .. }));
        self.page.pending = others;
        let mut heard: Vec<Report> = trained;
        heard.retain(|report| is_of_attempt(report, attempt));
        let rank = |report: &Report| match &report.order {
            Order::Train { members, .. } => members.iter().position(|(name, _)| *name == report.replica),
            _ => None,
        };
        heard.sort_by_key(rank);
        let all: Vec<TrainNotes> = heard.iter().map(notes).collect::<Result<_>>()?;
        let (mut samples, mut outdated, mut ranks) = (Vec::new(), 0, 0);
        // In the order of the ranks, so ascending.
        for report in &heard {
            if let Order::Train { share, outdated: old, members, .. } = &report.order {
                samples.extend(share.iter().map(|s| s.sample));
                (outdated, ranks) = (old.len(), members.len());
            }
        }
        if all.iter().any(|note| note.bad) {
            self.page.bad_steps.push(step);
        }
        self.books.trained(step, all, &samples, outdated)?;
        self.page.step = step;
        // All shares of a step have one size.
        self.page.add_step((samples.len() / heard.len().max(1) * ranks) as u64);
        Ok(())
    }

    fn validated(&mut self, report: Report, step: u64, parts: u64) -> Result<()> {
        if self.books.records.history.validations.iter().any(|v| v.step == step) {
            return Ok(());
        }
        let part_of = |r: &Report| match &r.order {
            Order::Validate { step: s, part, parts: p } if *s == step && *p == parts => Some(*part),
            _ => None,
        };
        self.page.pending.push(report);
        let mut shares: BTreeMap<u64, Share> = BTreeMap::new();
        for report in &self.page.pending {
            if let Some(part) = part_of(report) {
                shares.insert(part, notes(report)?);
            }
        }
        if (shares.len() as u64) < parts {
            return Ok(());
        }
        self.page.pending.retain(|r| part_of(r).is_none());
        let kl = shares.values().find_map(|share| share.kl);
        let rewards = shares.values_mut().map(|share| std::mem::take(&mut share.teachers));
        let rewards: Vec<(String, f64)> = rewards.flatten().collect();
        let mut found = self.books.merged(shares.into_values().collect());
        let mut reward = None;
        if self.books.records.history.teacher.is_none() {
            // Of several, the best is what the student is held against.
            reward = rewards.iter().map(|(_, reward)| *reward).reduce(f64::max);
            for (name, reward) in rewards.iter().filter(|_| rewards.len() > 1) {
                found.metrics.insert(format!("val/teacher/{name}/reward_avg"), *reward);
            }
        }
        self.books.validated(step, found, TeacherView { reward, kl })
    }

    /// The run went back to `step`: what came after it is trained again.
    fn roll_back(&mut self, step: u64) -> Result<()> {
        tracing::warn!("the run went back from step {} to step {step}", self.page.step);
        self.books.records.truncate_after(step)?;
        self.page.history = self.books.records.history.clone();
        self.page.forget_after(step);
        self.books.records.history = self.page.history.clone();
        self.page.pending.retain(|r| match &r.order {
            Order::Train { .. } => false,
            Order::Validate { step: s, .. } => *s <= step,
            _ => true,
        });
        Ok(())
    }

    /// Writes the page that ends with report `seq`.
    fn turn(&mut self, seq: u64) -> Result<()> {
        let records = &self.books.records;
        self.page.seq = seq;
        self.page.history = records.history.clone();
        self.page.history.seconds = records.seconds();
        self.page.tally = self.books.tally;
        self.page.generated = self.books.generated;
        self.page.metrics_bytes = length(&records.folder.metrics_jsonl())?;
        self.page.samples_bytes = length(&records.folder.samples_jsonl())?;
        let text = serde_json::to_vec(&self.page).map_err(|e| {
            RunError::shared(self.at.display().to_string(), format!("the books cannot be written: {e}"), "")
        })?;
        Ok(cosmos_report::replace_file(&self.at, &text)?)
    }

    /// The run is over, after `made` steps.
    fn finish(&mut self, made: u64) -> Result<()> {
        self.stands_at(made)?;
        let (steps, samples) = (self.page.step, self.page.samples_total());
        self.books.finish(steps, samples, self.page.checkpoint.clone()).map(drop)
    }
}

/// The step that the run stands at, where a report proves it: orders to load, save and validate are about the current state.
fn standing(report: &Report) -> Option<u64> {
    match (&report.order, &report.outcome) {
        (Order::Train { step, .. }, Outcome::Trained | Outcome::Unpublished) => Some(step.saturating_sub(1)),
        (Order::Load { step, .. }, Outcome::Loaded)
        | (Order::Save { step, .. }, Outcome::Saved)
        | (Order::Validate { step, .. }, Outcome::Validated) => Some(*step),
        _ => None,
    }
}

fn is_of_attempt(report: &Report, attempt: u64) -> bool {
    matches!(&report.order, Order::Train { attempt: own, .. } if *own == attempt)
}

fn notes<T: DeserializeOwned>(report: &Report) -> Result<T> {
    serde_json::from_value(report.payload.clone()).map_err(|e| {
        RunError::shared(
            report.replica.clone(),
            format!("what it says of order {} is not understood: {e}", report.id.0),
            "use one version of this program everywhere",
        )
    })
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> RunError + '_ {
    move |source| RunError::Io { path: path.to_path_buf(), source }
}

fn read_page(at: &Path) -> Result<Page> {
    let length = length(at)?;
    if length == 0 {
        return Ok(Page::default());
    }
    if length > BOOKS_BYTES_MAX {
        return Err(RunError::shared(
            at.display().to_string(),
            format!("it is {length} bytes long"),
            "it is no file of this run",
        ));
    }
    let text = fs::read(at).map_err(io(at))?;
    serde_json::from_slice(&text).map_err(|e| {
        RunError::shared(
            at.display().to_string(),
            format!("the books are damaged: {e}"),
            "resume from a checkpoint in another folder",
        )
    })
}

/// 0 where there is no file.
fn length(path: &Path) -> Result<u64> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(io(path)(error)),
    }
}

fn cut(path: &Path, bytes: u64) -> Result<()> {
    if length(path)? <= bytes {
        return Ok(());
    }
    let file: File = OpenOptions::new().write(true).open(path).map_err(io(path))?;
    file.set_len(bytes).map_err(io(path))
}

/// Names the run in the broker: the same for a controller that was restarted, another for every run.
fn run_name(root: &Path) -> Result<String> {
    let path = root.join(RUN_NAME);
    if length(&path)? == 0 {
        let token = Token::random()?;
        let name = format!("cosmos-{}", &token.reveal()[..16]);
        cosmos_report::replace_file(&path, name.as_bytes())?;
    }
    let name = fs::read_to_string(&path).map_err(io(&path))?;
    let plain = !name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    match plain {
        true => Ok(name),
        false => Err(RunError::shared(path.display().to_string(), "it does not hold a run's name", "remove the file")),
    }
}

fn broker(base: &Base, options: &RoleOptions, root: &Path) -> Result<(String, Option<RedisServer>)> {
    let limits = super::redis_limits(base.config());
    if let Some(url) = &options.broker_url {
        RedisLink::connect(&RedisAddress::parse(url)?, limits)?;
        return Ok((url.clone(), None));
    }
    let redis = &base.config().redis;
    if redis.is_empty() {
        return Err(RunError::config(
            "",
            "a run of several processes needs a broker, and `redis` is empty",
            "set `redis` to a port (a server is started there) or to a URL, or use `launch local`",
        ));
    }
    let (address, server) = open_or_start(redis, &root.join("redis"), &ServerOptions::default())
        .and_then(|(address, server)| {
            // One that must not be used is refused here, before anybody loads a model.
            RedisLink::connect(&address, limits)?;
            Ok((address, server))
        })
        .map_err(|e| RunError::from(e).at(|| prepare::place(&base.resolved, "redis")))?;
    Ok((address.secret_url(), server))
}

fn address(base: &Base) -> Result<SocketAddr> {
    let text = &base.config().host.control_address;
    let bad = |reason: String| {
        RunError::config(
            prepare::place(&base.resolved, "host.control_address"),
            format!("`host.control_address` = `{text}` cannot be listened on: {reason}"),
            "give an address of this machine with a port, such as `127.0.0.1:0`",
        )
    };
    let mut found = text.to_socket_addrs().map_err(|e| bad(e.to_string()))?;
    found.next().ok_or_else(|| bad("it names no address".into()))
}
