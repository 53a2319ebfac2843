//! What every role process but the controller does first: it joins the run, and learns where its data goes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cosmos_broker::{RedisAddress, RedisLink, RedisStore, Store, StoreLimits};
use cosmos_config::Resolved;
use cosmos_control::{Beating, Client, ClientOptions, ControlError, ControlFile, Identity, Target, Token, Turn};
use cosmos_controller::{Order, OrderId, Outcome, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Result, RunError};
use crate::prepare::Base;
use crate::roles::depot::Depot;
use crate::roles::foreign::Foreign;
use crate::roles::replica::Party;
use crate::roles::{RoleOptions, RoleOutcome};
use crate::signals::StopFlag;

/// Longest wait of one question for an order; a stop signal is seen between two of them.
const NEXT_MS_MAX: u64 = 1_000;
/// Pauses after orders that failed.
const FAILURE_MS_MIN: u64 = 20;
const FAILURE_MS_MAX: u64 = 2_000;

/// What the controller tells every role that joins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunInfo {
    /// Names the run in the broker.
    pub run: String,
    /// Where the broker is, password included.
    pub broker_url: String,
    /// The run folder as the controller sees it.
    pub run_folder: PathBuf,
    /// Steps of the whole run, which shape the learning rate.
    pub total_steps: u64,
}

impl RunInfo {
    /// The run folder; roles of one run share it. `name` is who looks for it.
    pub fn folder(&self, options: &RoleOptions, name: &str) -> Result<PathBuf> {
        let folder = options.run_folder.clone().unwrap_or_else(|| self.run_folder.clone());
        if folder.is_dir() {
            return Ok(folder);
        }
        Err(RunError::shared(
            folder.display().to_string(),
            format!("`{name}` does not see the run folder, through which weights and checkpoints go"),
            "mount it on this machine too, and name it by `--run` if its path is another here",
        ))
    }

    /// A connection to the broker.
    pub fn broker(&self, base: &Base) -> Result<Arc<RedisLink>> {
        let address = RedisAddress::parse(&self.broker_url)?;
        Ok(RedisLink::connect(&address, super::redis_limits(base.config()))?)
    }

    /// The run's store.
    pub fn store(&self, link: Arc<RedisLink>) -> Arc<dyn Store> {
        Arc::new(RedisStore::new(link, &self.run, StoreLimits::default()))
    }
}

/// A process's place in the run.
pub struct Seat {
    /// Its connection to the controller.
    pub client: Client,
    /// What the controller said.
    pub info: RunInfo,
    /// Set by SIGTERM and the like.
    pub stop: StopFlag,
    identity: Identity,
    address: Option<String>,
    group_secret: String,
    broker: Option<Arc<RedisLink>>,
    /// The other processes of this replica, where it has several.
    party: Option<Arc<Party>>,
    /// It was asked to leave, and is to stay until the run is saved.
    staying: bool,
    /// Orders in a row that failed.
    failures: AtomicU32,
}

/// What comes next.
pub enum Next {
    /// Something to do.
    Order(OrderId, Order),
    /// The run is over, or was saved.
    Home(RoleOutcome),
    /// This process was asked to leave, and the run goes on without it.
    Excused,
}

/// A role that carries out orders one after the other.
pub trait Worker {
    /// Its place in the run.
    fn seat(&mut self) -> &mut Seat;

    /// What it holds when it has to join again: for a policy a step.
    fn holds(&self) -> Option<u64> {
        None
    }

    /// Whether what the controller believes it to hold was lost as an order failed.
    fn is_empty_handed(&self) -> bool {
        false
    }

    /// Carries out an order and reports it. An error is reported by [`serve`].
    fn perform(&mut self, id: OrderId, order: Order, beating: &Beating) -> Result<()>;
}

/// Carries out orders until the run is over, or this process may leave it.
pub fn serve(mut worker: impl Worker) -> Result<RoleOutcome> {
    loop {
        let holds = worker.holds();
        let (id, order) = match worker.seat().next(holds)? {
            Next::Order(id, order) => (id, order),
            Next::Home(outcome) => return Ok(outcome),
            Next::Excused => return Ok(RoleOutcome::Done),
        };
        let beating = worker.seat().client.beat_while(id)?;
        let performed = worker.perform(id, order, &beating);
        drop(beating);
        match performed {
            Ok(()) => {}
            Err(error) if crate::roles::is_final(&error) => {
                if matches!(error, RunError::Replica { .. }) {
                    // It is back soon, and whoever reads the controller's log sees why it was away.
                    let _ = worker.seat().failed(id, &error);
                }
                return Err(error);
            }
            Err(error) => {
                worker.seat().failed(id, &error)?;
                if worker.is_empty_handed() {
                    worker.seat().join_again(None)?;
                }
            }
        }
    }
}

/// What all processes of a run must have in common.
pub fn identity(resolved: &Resolved, plugins: &[PathBuf]) -> Result<Identity> {
    // Where it writes, where its broker is and how long it waits may differ by process.
    let left_out =
        ["train.output_dir", "train.timestamp", "train.resume", "redis", "host.device", "host.control_wait_ms_max"];
    Ok(Identity::new(&resolved.to_json(), &left_out, plugins, env!("CARGO_PKG_VERSION"))?)
}

impl Seat {
    /// Joins the run as `role`. `holds` and the address are those of a policy.
    pub fn take(base: &Base, options: &RoleOptions, role: Role, address: Option<String>) -> Result<Self> {
        let target = target(options)?;
        let wait_ms_max = base.config().host.control_wait_ms_max;
        let (_, secret) = resolve(&target, wait_ms_max)?;
        let replica = options.name.clone().unwrap_or_else(|| format!("{role}-{}", std::process::id()));
        let stop = StopFlag::listen(&base.config().train.signal_to_handle)?;
        let identity = identity(&base.resolved, &options.plugins)?;
        let client = Client::new(ClientOptions { target, replica, role, wait_ms_max })?;
        let info = client.join(None, address.as_deref(), &identity)?;
        let info = understand(info)?;
        tracing::info!("`{}` joined the run in {} as {role}", client.replica(), info.run_folder.display());
        Ok(Self {
            client,
            info,
            stop,
            identity,
            address,
            group_secret: secret,
            broker: None,
            party: None,
            staying: false,
            failures: AtomicU32::new(0),
        })
    }

    /// Its name in the run.
    pub fn name(&self) -> &str {
        self.client.replica()
    }

    /// A secret that all processes of the run know.
    pub fn secret(&self) -> &str {
        &self.group_secret
    }

    /// The run folder; roles of one run share it.
    pub fn run_folder(&self, options: &RoleOptions) -> Result<PathBuf> {
        self.info.folder(options, self.name())
    }

    /// The run's data plane. `foreign`: this side of the original's wire, where that is spoken.
    pub fn depot(&mut self, base: &Base, foreign: Option<Foreign>) -> Result<Depot> {
        let link = match &self.broker {
            Some(link) => Arc::clone(link),
            None => {
                let link = self.info.broker(base)?;
                self.broker = Some(Arc::clone(&link));
                link
            }
        };
        let store = self.info.store(Arc::clone(&link));
        let queues = crate::roles::depot::queues(&link, &self.info.run, self.name(), base.config(), foreign)?;
        Ok(Depot::new(store, queues, base.config(), base.n_generation()))
    }

    /// This process speaks for those of `party`.
    pub fn speak_for(&mut self, party: Option<Arc<Party>>) {
        self.party = party;
    }

    /// Whether it, or another process of its replica, was asked to leave.
    pub fn is_asked(&self) -> bool {
        self.stop.is_set() || self.party.as_ref().is_some_and(|party| party.is_asked())
    }

    /// Waits for an order. `holds` is what a policy holds when it has to join again.
    fn next(&mut self, holds: Option<u64>) -> Result<Next> {
        loop {
            if let Some(next) = self.look(holds)? {
                return Ok(next);
            }
        }
    }

    /// Waits a moment for an order.
    pub fn look(&mut self, holds: Option<u64>) -> Result<Option<Next>> {
        if let Some(party) = &self.party {
            party.check()?;
        }
        if self.is_asked() && !self.staying && self.leave()? {
            return Ok(Some(Next::Excused));
        }
        Ok(match self.client.next(NEXT_MS_MAX)? {
            Turn::Idle => None,
            Turn::Rejoin => {
                self.join_again(holds)?;
                None
            }
            Turn::Order(_, Order::Finish) => Some(self.go_home(RoleOutcome::Done)?),
            Turn::Order(_, Order::Leave) => Some(self.go_home(RoleOutcome::Saved)?),
            Turn::Order(id, order) => Some(Next::Order(id, order)),
        })
    }

    /// Joins again under the same name: whatever this process was doing is somebody else's then.
    fn join_again(&mut self, holds: Option<u64>) -> Result<()> {
        let info = self.client.join(holds, self.address.as_deref(), &self.identity)?;
        self.info = understand(info)?;
        tracing::info!("`{}` joined the run again", self.name());
        Ok(())
    }

    fn go_home(&mut self, outcome: RoleOutcome) -> Result<Next> {
        self.client.leave()?;
        let end = if outcome == RoleOutcome::Done { "over" } else { "saved, to be resumed" };
        tracing::info!("`{}` leaves: the run is {end}", self.name());
        Ok(Next::Home(outcome))
    }

    /// Says good-bye after a signal. False: the run cannot do without this process, so it stays until the run is saved and
    /// it is told to leave.
    fn leave(&mut self) -> Result<bool> {
        self.staying = self.client.wish_to_leave()?;
        tracing::info!("`{}` was asked to leave", self.name());
        Ok(!self.staying)
    }

    /// Reports an order as carried out. False: nothing came of it.
    pub fn done(&self, id: OrderId, outcome: Outcome, notes: &impl Serialize) -> Result<bool> {
        let payload = serde_json::to_value(notes)
            .map_err(|e| RunError::shared("controller", format!("the notes of an order cannot be written: {e}"), ""))?;
        self.failures.store(0, Ordering::Relaxed);
        Ok(self.client.done(id, outcome, payload)?)
    }

    /// Reports that an order failed, with its reason and the fix, and waits before the next one is asked for, longer with
    /// every failure in a row: a full disk or server gets time to be mended.
    pub fn failed(&self, id: OrderId, error: &RunError) -> Result<()> {
        tracing::warn!("`{}`: order {}: {error}", self.name(), id.0);
        let hint = error.hint().map_or(String::new(), |hint| format!("; {hint}"));
        self.client.failed(id, &format!("{error}{hint}"))?;
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(16);
        let until = Instant::now() + Duration::from_millis((FAILURE_MS_MIN << failures).min(FAILURE_MS_MAX));
        while Instant::now() < until && !self.stop.is_set() {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// An order that this role does not know.
    pub fn refuse(&self, id: OrderId, order: &Order) -> Result<()> {
        self.client.failed(id, &format!("`{}` does not carry out {order:?}", self.name()))?;
        Ok(())
    }
}

fn understand(info: Value) -> Result<RunInfo> {
    serde_json::from_value(info).map_err(|e| {
        RunError::shared(
            "controller",
            format!("what it says of the run is not understood: {e}"),
            "use one version of this program everywhere",
        )
    })
}

fn target(options: &RoleOptions) -> Result<Target> {
    match (&options.controller_url, &options.run_folder) {
        (Some(url), _) => {
            let text = options.token.as_deref().ok_or_else(|| {
                RunError::config(
                    "",
                    "the controller is named by its address, but the run's token is not given",
                    format!("set `{}` to the token in the run folder's `control.json`", cosmos_control::TOKEN_VARIABLE),
                )
            })?;
            Ok(Target::At { url: url.clone(), token: Token::parse(text)? })
        }
        (None, Some(folder)) => Ok(Target::Run(folder.clone())),
        (None, None) => Err(RunError::config(
            "",
            "it is not known where the run's controller is",
            "name the run folder, or the controller's address",
        )),
    }
}

/// A secret that all processes of the run know, for one that does not join it itself.
pub fn secret(base: &Base, options: &RoleOptions) -> Result<String> {
    Ok(resolve(&target(options)?, base.config().host.control_wait_ms_max)?.1)
}

/// The controller's address and the run's secret; waits until the controller has written them.
fn resolve(target: &Target, wait_ms_max: u64) -> Result<(String, String)> {
    match target {
        Target::At { url, token } => Ok((url.clone(), token.reveal().to_string())),
        Target::Run(folder) => {
            let file = wait_for_control(folder, wait_ms_max)?;
            Ok((file.url, file.token.reveal().to_string()))
        }
    }
}

/// Why there is no controller to join in a run folder.
fn nobody_home(folder: &Path, waited_ms: u64, error: ControlError) -> RunError {
    if !matches!(error, ControlError::Io { .. }) {
        return error.into();
    }
    let place = folder.display().to_string();
    if folder.join("summary.json").exists() {
        return RunError::shared(place, "its run is over", "`cosmos-host status` says how it ended");
    }
    RunError::shared(
        place,
        format!("no controller has appeared in this run folder within {waited_ms} ms: it has no `control.json`"),
        "start `cosmos-host controller --run` on it first, or name the folder of a run that is going on; `host.control_wait_ms_max` is how long a role waits",
    )
}

fn wait_for_control(folder: &Path, wait_ms_max: u64) -> Result<ControlFile> {
    let started = std::time::Instant::now();
    loop {
        match ControlFile::read(folder) {
            Ok(file) => return Ok(file),
            Err(error) if started.elapsed().as_millis() as u64 >= wait_ms_max => {
                return Err(nobody_home(folder, wait_ms_max, error));
            }
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
    }
}

/// The address under which others of the run reach this machine: the one from which it reaches the controller.
pub fn own_ip(base: &Base, options: &RoleOptions) -> Result<IpAddr> {
    let (url, _) = resolve(&target(options)?, base.config().host.control_wait_ms_max)?;
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let unknown = |reason: String| {
        RunError::shared(url.clone(), format!("this machine's own address cannot be found out: {reason}"), "")
    };
    let address: SocketAddr = host
        .to_socket_addrs()
        .map_err(|e| unknown(e.to_string()))?
        .next()
        .ok_or_else(|| unknown("the controller's name has no address".into()))?;
    if address.ip().is_loopback() {
        return Ok(address.ip());
    }
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    // Nothing is sent: connecting a datagram socket only chooses the way.
    let socket = UdpSocket::bind((any, 0)).map_err(|e| unknown(e.to_string()))?;
    socket.connect(address).map_err(|e| unknown(e.to_string()))?;
    socket.local_addr().map(|a| a.ip()).map_err(|e| unknown(e.to_string()))
}
