//! The controller as a process: it knows who does what, and keeps the books. It holds no model and sees no completion.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use cosmos_broker::{RedisAddress, RedisLink, RedisServer, ServerOptions, open_or_start};
use cosmos_config::shapes::FlagOrText;
use cosmos_control::{End, Endpoint, EndpointOptions, Report, Token};
use cosmos_controller::{Event, Order, Outcome, Role};
use cosmos_report::{Progress, ProgressKind, RunFolder};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::error::{Result, RunError};
use crate::prepare::{self, Base, Prompts};
use crate::records::{History, Records, Throughput};
use crate::rewards::Tally;
use crate::roles::books::{Books, TeacherView, write_description};
use crate::roles::foreign;
use crate::roles::policy::Saved;
use crate::roles::seat::{RunInfo, identity};
use crate::roles::shelves;
use crate::roles::trainer::TrainNotes;
use crate::roles::writer::WrittenNotes;
use crate::roles::{RoleOptions, RoleOutcome};
use crate::signals::StopFlag;
use crate::validation::Share;

const BOOKS: &str = "books.json";
const BOOKS_BYTES_MAX: u64 = 1 << 30;
const RUN_NAME: &str = "run_name";
const LEDGER: &str = "ledger.log";
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
    let known = root.join(LEDGER).is_file();
    let resume = options.resume || options.restarted || config.train.resume == FlagOrText::Flag(true);
    if known && !resume {
        return Err(RunError::config(
            "",
            format!("{} holds a run already", root.display()),
            "go on with it by `--resume`, or take another folder",
        ));
    }
    if !known && resume {
        check_is_ours(&root)?;
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
    let folder = if known { RunFolder::open_existing(&root)? } else { RunFolder::create(&root)? };
    write_description(&folder, &base, &prompts.plugins, &prompts.uses)?;
    let run = run_name(&root)?;
    // Lives as long as this process.
    let (broker_url, server) = broker(&base, &options, &root)?;
    let total_steps = plan.total_steps();
    let identity = identity(&base.resolved, &options.plugins)?;
    let controller = cosmos_controller::Controller::new(plan.clone());
    let mut clerk = Clerk::open(&base, &prompts, folder, total_steps)?;
    for line in base.plan(&prompts, &plan, &crate::teachers::specs(&base)?).lines() {
        clerk.books.records.progress.note(&line);
    }
    let mut needs = vec![Role::Policy, Role::Rollout];
    if config.distillation.enable && !foreign::has_the_teacher(config) {
        needs.push(Role::Teacher);
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
    drop(prompts);
    let (endpoint, reports) = Endpoint::start(endpoint, controller)?;
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
        let _ = fs::remove_dir_all(clerk.books.records.folder.root().join("redis"));
    }
    Ok(outcome)
}

/// Refuses to go on with a run that has no ledger: its checkpoints are those of `run`.
fn check_is_ours(root: &Path) -> Result<()> {
    match checkpoint::newest(&root.join("checkpoints"))? {
        None => Ok(()),
        Some(found) => Err(RunError::config(
            "",
            format!("{} holds a run of one process, which wrote {}", root.display(), found.display()),
            "go on with it by `run --resume`, or start anew in another folder from `ckpt export`'s folder as `policy.model_name_or_path`",
        )),
    }
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
                if let Err(error) = clerk.enter(report) {
                    let error = error.during(step);
                    endpoint.fail(error.to_string());
                    std::thread::sleep(BAD_NEWS);
                    return Err(error);
                }
                endpoint.recorded(seq);
                continue;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        match end {
            None => {}
            Some(End::Done) => {
                clerk.finish()?;
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

/// Takes away what only processes of a run that is going on need. What is left over costs space and nothing else.
fn tidy(root: &Path) {
    for folder in [shelves::WEIGHTS, shelves::TEACHERS, super::HAND_OVER] {
        if let Err(error) = fs::remove_dir_all(root.join(folder))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::debug!("{folder} of the run stays: {error}");
        }
    }
}

impl Clerk {
    /// Opens the books of a run folder, and brings the record files to where the last page was written.
    fn open(base: &Base, prompts: &Prompts, folder: RunFolder, total_steps: u64) -> Result<Self> {
        let at = folder.root().join(BOOKS);
        let page = read_page(&at)?;
        // Lines after the last page belong to a report that will come again.
        cut(&folder.metrics_jsonl(), page.metrics_bytes)?;
        cut(&folder.samples_jsonl(), page.samples_bytes)?;
        let progress = Progress::new(ProgressKind::detect(), total_steps);
        progress.note(&format!("run folder {}", folder.root().display()));
        if page.step > 0 {
            progress.start_at(page.step);
            progress.note(&format!("resumed at step {}", page.step));
        }
        let records = Records::open(folder, progress, page.history.clone(), None)?;
        let mut books = Books::new(base, prompts, records, page.tally, total_steps);
        books.generated = page.generated;
        Ok(Self { books, page, at })
    }

    /// Takes a report into the books. One that they hold already changes nothing.
    fn enter(&mut self, report: Report) -> Result<()> {
        if report.seq <= self.page.seq {
            return Ok(());
        }
        let seq = report.seq;
        match (&report.order, &report.outcome) {
            (Order::Generate { .. }, Outcome::Generated { .. }) => {
                let notes: WrittenNotes = notes(&report)?;
                self.books.written(&notes);
            }
            (Order::Train { step, members, attempt, .. }, Outcome::Trained) => {
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
        if step <= self.page.step {
            self.roll_back(step - 1)?;
        }
        self.page.pending.push(report);
        let of_attempt = |r: &Report| matches!(&r.order, Order::Train { attempt: a, .. } if *a == attempt);
        let mut by_member: BTreeMap<&str, &Report> = BTreeMap::new();
        for report in self.page.pending.iter().filter(|r| of_attempt(r)) {
            by_member.insert(&report.replica, report);
        }
        let present: Vec<&Report> =
            members.iter().filter_map(|(name, _)| by_member.get(name.as_str()).copied()).collect();
        if present.len() < members.len() {
            return Ok(());
        }
        let all: Vec<TrainNotes> = present.iter().map(|report| notes(report)).collect::<Result<_>>()?;
        let (mut samples, mut outdated) = (Vec::new(), 0);
        // In the order of the ranks, so ascending.
        for report in &present {
            if let Order::Train { share, outdated: old, .. } = &report.order {
                samples.extend(share.iter().map(|s| s.sample));
                outdated = old.len();
            }
        }
        self.page.pending.retain(|r| !matches!(&r.order, Order::Train { .. }));
        if all.iter().any(|note| note.bad) {
            self.page.bad_steps.push(step);
        }
        self.books.trained(step, all, &samples, outdated)?;
        self.page.step = step;
        self.page.add_step(samples.len() as u64);
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
        self.page.bad_steps.retain(|bad| *bad <= step);
        let history = &mut self.books.records.history;
        history.validations.retain(|v| v.step <= step);
        history.skipped_steps = self.page.bad_steps.len() as u64;
        let in_a_row = self.page.bad_steps.iter().rev().enumerate().take_while(|(i, bad)| **bad + *i as u64 == step);
        history.skipped_in_a_row = in_a_row.count() as u64;
        self.page.pending.retain(|r| match &r.order {
            Order::Train { .. } => false,
            Order::Validate { step: s, .. } => *s <= step,
            _ => true,
        });
        self.page.take_back(self.page.step.saturating_sub(step));
        self.page.step = step;
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

    fn finish(&mut self) -> Result<()> {
        let (steps, samples) = (self.page.step, self.page.samples_total());
        self.books.finish(steps, samples, self.page.checkpoint.clone()).map(drop)
    }
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
