//! A running controller.

use std::collections::VecDeque;
use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use cosmos_controller::Event;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use crate::clock::unix_ms;
use crate::desk::Desk;
use crate::error::{ControlError, Result};
use crate::file::ControlFile;
use crate::http::{Door, router};
use crate::identity::Identity;
use crate::ledger::{Ledger, Record};
use crate::listener::{Bounded, Taken};
use crate::machine::Machine;
use crate::need::Need;
use crate::supervisor::{Ask, End, Fate, Report, Restored, Supervisor};
use crate::token::Token;

const LEDGER: &str = "ledger.log";
const LOCK: &str = "ledger.lock";
/// Longest hold of a question for an order.
const POLL_MS_MAX: u64 = 20_000;
const CONNECTIONS_MAX: usize = 8192;

/// How long things may take, and how many there may be.
#[derive(Debug, Clone)]
pub struct Deadlines {
    /// A replica that has not been heard from for so long is lost.
    pub silent_ms_max: u64,
    /// A replica that has been lost for so long is removed.
    pub gone_ms_max: u64,
    /// A run that has had no replica of a role for so long fails.
    pub absent_ms_max: u64,
    /// Whether a run may go on with fewer policies.
    pub policies_may_leave: bool,
    /// Replicas at the same time.
    pub replicas_max: usize,
    /// From a connection to the end of its request.
    pub request_ms_max: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            silent_ms_max: 60_000,
            gone_ms_max: 300_000,
            absent_ms_max: 1_800_000,
            policies_may_leave: false,
            replicas_max: 4096,
            request_ms_max: 10_000,
        }
    }
}

impl Deadlines {
    pub(crate) fn poll_ms_max(&self) -> u64 {
        POLL_MS_MAX.min(self.silent_ms_max / 2)
    }

    pub(crate) fn beat_ms(&self) -> u64 {
        (self.silent_ms_max / 4).clamp(10, 15_000)
    }
}

/// What a controller's endpoint is started with.
pub struct EndpointOptions {
    /// Where to listen; port 0: any free one.
    pub address: SocketAddr,
    /// The run's token; none: a new random one.
    pub token: Option<Token>,
    /// Folder of the run: `ledger.log` and `control.json` are kept there.
    pub run_folder: PathBuf,
    /// What all processes of the run have in common.
    pub identity: Identity,
    /// What every role is told as it joins, such as the broker's address.
    pub info: Value,
    /// Whom the run cannot go on without.
    pub needs: Vec<Need>,
    /// Whether a run that was saved to be resumed goes on (its processes of before are gone), instead of ending again.
    pub reopen: bool,
    /// How long things may take.
    pub deadlines: Deadlines,
}

/// A running controller. Ends with [`stop`](Self::stop) or when it is dropped.
pub struct Endpoint {
    asks: mpsc::Sender<Ask>,
    fate: Arc<Fate>,
    file: ControlFile,
    run_folder: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    _lock: File,
}

impl Endpoint {
    /// Restores `machine` from the ledger in the run folder, if there is one, else begins a ledger with it; listens; writes
    /// `control.json`. Carried-out orders arrive at the receiver; [`recorded`](Self::recorded) says that they have been
    /// dealt with.
    ///
    /// # Errors
    /// A damaged or foreign ledger, an address that is in use, a folder that cannot be written.
    pub fn start<M: Machine>(options: EndpointOptions, machine: M) -> Result<(Self, mpsc::Receiver<Report>)> {
        Self::start_with(options, machine, |_| {})
    }

    pub(crate) fn start_with<M: Machine>(
        options: EndpointOptions,
        machine: M,
        adjust: impl FnOnce(&mut Supervisor<M>),
    ) -> Result<(Self, mpsc::Receiver<Report>)> {
        let EndpointOptions { address, token, run_folder, identity, info, needs, reopen, deadlines } = options;
        let token = token.map_or_else(Token::random, Ok)?;
        let (mut restored, lock) = restore(&run_folder, &identity, machine)?;
        if reopen && restored.desk.machine.is_stopping() {
            let seq = restored.desk.seq + 1;
            let resumed = Record::Event { seq, at_ms: unix_ms(), event: Event::Resumed, payload: Value::Null };
            restored.ledger.append(&resumed)?;
            // The controller has nothing against it.
            drop(restored.desk.apply(seq, Event::Resumed, Value::Null));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("control-http")
            .enable_all()
            .build()
            .map_err(|source| ControlError::Start { what: "runtime", source })?;
        let bind = |source| ControlError::Bind { address: address.to_string(), source };
        let listener = runtime.block_on(TcpListener::bind(address)).map_err(bind)?;
        let local = listener.local_addr().map_err(bind)?;
        if !local.ip().is_loopback() {
            tracing::warn!(
                "the controller listens on {local} without TLS: whoever can read that network can read the token"
            );
        }

        let (asks, questions) = mpsc::channel();
        let (reports, reported) = mpsc::channel();
        let fate = Arc::new(Fate::default());
        let mut supervisor =
            Supervisor::new(restored, identity, info, needs, deadlines.clone(), reports, Arc::clone(&fate));
        adjust(&mut supervisor);
        let spawn = |what: &'static str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(format!("control-{what}"))
                .spawn(work)
                .map_err(|source| ControlError::Start { what, source })
        };
        let supervising = spawn("ledger", Box::new(move || supervisor.run(questions)))?;

        let answer_ms_max = deadlines.poll_ms_max() + 10_000;
        let bounded = Bounded {
            listener,
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            request_ms_max: deadlines.request_ms_max,
            connection_ms_max: deadlines.request_ms_max + answer_ms_max + 10_000,
        };
        let door =
            Door { token: token.clone(), asks: asks.clone(), request_ms_max: deadlines.request_ms_max, answer_ms_max };
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = spawn("http", Box::new(move || serve(runtime, bounded, door, stopped)))?;

        let file = ControlFile { url: format!("http://{local}"), token, pid: std::process::id() };
        let endpoint =
            Self { asks, fate, file, run_folder, stop: Some(stop), threads: vec![supervising, serving], _lock: lock };
        endpoint.file.write(&endpoint.run_folder)?;
        Ok((endpoint, reported))
    }

    /// Where it listens: `http://host:port`.
    pub fn url(&self) -> &str {
        &self.file.url
    }

    /// The run's token.
    pub fn token(&self) -> &Token {
        &self.file.token
    }

    /// Gives the controller an event of the owner's, such as `StopRequested`. It is in the ledger when this returns.
    pub fn inject(&self, event: Event) -> Result<()> {
        self.ask(|reply| Ask::Inject(event, reply)).map(drop)
    }

    /// Says that all reports up to `seq` have been dealt with: they will not come again.
    pub fn recorded(&self, seq: u64) {
        let _ = self.asks.send(Ask::Recorded(seq));
    }

    /// Replaces the ledger by the controller's state; for after a checkpoint. Whether that was possible.
    pub fn compact(&self) -> Result<bool> {
        Ok(self.ask(Ask::Compact)?["compacted"] == true)
    }

    /// Ends the run as failed: every role is told the reason.
    pub fn fail(&self, reason: impl Into<String>) {
        let _ = self.asks.send(Ask::Fail(reason.into()));
    }

    /// How the run ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.fate.get()
    }

    /// Waits for the run's end, at most so long.
    pub fn wait(&self, timeout: Duration) -> Option<End> {
        self.fate.wait(timeout)
    }

    /// The same as `GET /status`.
    pub fn status(&self) -> Result<Value> {
        self.ask(Ask::Status)
    }

    /// The controller's state as JSON (null if the machine's cannot be written down), for a checkpoint's memory.
    pub fn snapshot(&self) -> Result<Value> {
        self.ask(Ask::Snapshot)
    }

    /// Ends it: no more requests are taken, `control.json` goes away.
    pub fn stop(mut self) {
        self.end_threads();
    }

    fn ask(&self, ask: impl FnOnce(crate::supervisor::Reply) -> Ask) -> Result<Value> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(ask(reply)).map_err(|_| ControlError::Stopped)?;
        match answer.blocking_recv() {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refusal)) if refusal.kind == "ledger" => {
                Err(ControlError::LedgerFull { path: self.run_folder.join(LEDGER), reason: refusal.message })
            }
            Ok(Err(refusal)) => Err(ControlError::RunFailed { reason: refusal.message }),
            Err(_) => Err(ControlError::Stopped),
        }
    }

    fn end_threads(&mut self) {
        let _ = self.asks.send(Ask::Stop);
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.file.remove(&self.run_folder);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if self.stop.is_some() {
            self.end_threads();
        }
    }
}

/// What the ledger holds, and the lock on it.
fn restore<M: Machine>(run_folder: &std::path::Path, identity: &Identity, machine: M) -> Result<(Restored<M>, File)> {
    std::fs::create_dir_all(run_folder).map_err(|source| ControlError::Io {
        doing: "make",
        path: run_folder.into(),
        source,
    })?;
    let lock = lock(run_folder)?;
    let mut desk = Desk::new(machine);
    let mut unrecorded = VecDeque::new();
    // The machine may have a past of its own, from a checkpoint that will be gone one day.
    let begin = desk.snapshot().map(|state| Record::Snapshot { seq: 0, state });
    let ledger = Ledger::open(&run_folder.join(LEDGER), identity, begin, |record| {
        match record {
            Record::Header { .. } => {}
            Record::Event { seq, event, payload, .. } => {
                if seq != desk.seq + 1 {
                    return Err(format!("event {seq} follows event {}", desk.seq));
                }
                // What was refused then is refused now.
                unrecorded.extend(desk.apply(seq, event, payload).ok().and_then(|(report, _)| report));
            }
            Record::Snapshot { seq, state } => {
                desk.restore(seq, state)?;
                unrecorded.clear();
            }
            Record::Report { report } => unrecorded.push_back(*report),
            Record::Recorded { seq } => unrecorded.retain(|report: &Report| report.seq > seq),
        }
        Ok(())
    })?;
    if desk.seq > 0 {
        tracing::info!("{} events restored from {}", desk.seq, ledger.path().display());
    }
    Ok((Restored { desk, ledger, unrecorded }, lock))
}

/// Two controllers on one ledger would each overwrite what the other has promised. The system lets go of the lock when
/// the process ends, however it ends.
fn lock(run_folder: &std::path::Path) -> Result<File> {
    let path = run_folder.join(LOCK);
    let io = |doing| move |source| ControlError::Io { doing, path: run_folder.join(LOCK), source };
    let file = File::options().create(true).append(true).open(&path).map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ControlError::Taken { path: run_folder.into() }),
        Err(TryLockError::Error(source)) => Err(io("lock")(source)),
    }
}

/// Whose ledger lies in a run folder; none where there is none that can be read.
pub fn identity_in(run_folder: &std::path::Path) -> Option<Identity> {
    Ledger::identity_in(&run_folder.join(LEDGER))
}

/// Ends the ledger in a run folder, since the run goes on without it: as one process, or from a checkpoint. Whether there was one.
///
/// # Errors
/// [`ControlError::Taken`] where a controller is at work; a file that cannot be removed.
pub fn retire(run_folder: &std::path::Path) -> Result<bool> {
    let path = run_folder.join(LEDGER);
    if !path.exists() {
        return Ok(false);
    }
    let _lock = lock(run_folder)?;
    std::fs::remove_file(&path).map_err(|source| ControlError::Io { doing: "remove", path, source })?;
    Ok(true)
}

fn serve(runtime: tokio::runtime::Runtime, bounded: Bounded, door: Door, stopped: oneshot::Receiver<()>) {
    runtime.block_on(async move {
        let app = router(door).into_make_service_with_connect_info::<Taken>();
        let (begin, begun) = oneshot::channel::<()>();
        let ending = async move {
            let _ = stopped.await;
            let _ = begin.send(());
        };
        let serving = std::future::IntoFuture::into_future(axum::serve(bounded, app).with_graceful_shutdown(ending));
        let last_answers = async move {
            let _ = begun.await;
            tokio::time::sleep(Duration::from_millis(1000)).await;
        };
        tokio::select! {
            _ = serving => {}
            () = last_answers => {}
        }
    });
    runtime.shutdown_timeout(Duration::from_millis(500));
}
