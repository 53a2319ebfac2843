//! A role's side: asks for orders and reports them, through lost connections and restarts of the controller.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cosmos_controller::{Order, OrderId, Outcome, Role};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{ControlError, Result};
use crate::file::ControlFile;
use crate::identity::Identity;
use crate::token::Token;
use crate::wire::{self, ANSWER_BYTES_MAX, Refusal};

const CONNECT_MS_MAX: u64 = 5_000;
/// What an answer may take beyond the time that the question asks to be held.
const ANSWER_MS_MAX: u64 = 30_000;
/// How long a role that has nothing more to do waits for a good-bye.
const GOOD_BYE_MS_MAX: u64 = 10_000;
const PAUSE_MS: u64 = 50;
const PAUSE_MS_MAX: u64 = 2_000;

/// Where the controller is.
#[derive(Debug, Clone)]
pub enum Target {
    /// As `control.json` of this run folder says; read again for every attempt, since a restarted controller may be
    /// somewhere else.
    Run(PathBuf),
    /// Here.
    At {
        /// `http://host:port`.
        url: String,
        /// The run's token.
        token: Token,
    },
}

/// Who asks, and how patiently.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Where the controller is.
    pub target: Target,
    /// The replica's name, unique in the run.
    pub replica: String,
    /// What it does.
    pub role: Role,
    /// How long to wait for a controller that does not answer.
    pub wait_ms_max: u64,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// Something to do. It comes again until it is reported.
    Order(OrderId, Order),
    /// Nothing yet: ask again.
    Idle,
    /// The controller has counted this replica as lost, or does not know it: whatever it was doing is somebody else's;
    /// join again.
    Rejoin,
}

/// A role's connection to the controller. Clones are the same connection.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: ClientOptions,
    agent: ureq::Agent,
    nonce: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    incarnation: u64,
    joins: u64,
    beat_ms: u64,
    progress: String,
}

enum Attempt {
    Answered(Value),
    Again(String),
    Refused(Refusal),
}

impl Client {
    /// Makes a client; nothing is sent before [`join`](Self::join).
    pub fn new(options: ClientOptions) -> Result<Self> {
        wire::check_name(&options.replica).map_err(|refusal| ControlError::Refused {
            replica: options.replica.clone(),
            url: options.target.to_string(),
            request: "join".into(),
            kind: refusal.kind,
            message: refusal.message,
        })?;
        // Any number that another process of this name would not have.
        let random = Token::random()?;
        let nonce = u64::from_str_radix(&random.reveal()[..15], 16).unwrap_or_default();
        let inner = Inner { options, agent: agent(), nonce, state: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The replica's name.
    pub fn replica(&self) -> &str {
        &self.inner.options.replica
    }

    /// Joins, and joins again after [`Turn::Rejoin`]. Gives what the controller tells every role.
    ///
    /// `holds`: for a policy, the step whose state it holds. `address`: for a policy, where the others of its group
    /// reach it.
    ///
    /// # Errors
    /// [`ControlError::Refused`] for another config (kind `identity`), a taken name or a wrong token.
    pub fn join(&self, holds: Option<u64>, address: Option<&str>, identity: &Identity) -> Result<Value> {
        let nonce = {
            let mut state = self.state();
            state.joins += 1;
            self.inner.nonce.wrapping_add(state.joins)
        };
        let join = wire::Join {
            replica: self.replica().to_owned(),
            role: self.inner.options.role,
            holds,
            address: address.map(str::to_owned),
            identity: identity.clone(),
            nonce,
        };
        let joined: wire::Joined = self.call("join", &to_json(&join), 0)?;
        let mut state = self.state();
        state.incarnation = joined.incarnation;
        state.beat_ms = joined.beat_ms.max(10);
        Ok(joined.info)
    }

    /// Which join of the run this was; ascending.
    pub fn incarnation(&self) -> u64 {
        self.state().incarnation
    }

    /// Asks what to do, waiting up to `wait_ms` (the controller may answer [`Turn::Idle`] sooner).
    pub fn next(&self, wait_ms: u64) -> Result<Turn> {
        let next = wire::Next { who: self.who(), wait_ms };
        match self.call::<wire::NextAnswer>("next", &to_json(&next), wait_ms) {
            Ok(wire::NextAnswer { order: Some((id, order)) }) => Ok(Turn::Order(id, order)),
            Ok(wire::NextAnswer { order: None }) => Ok(Turn::Idle),
            Err(error) if is_rejoin(&error) => Ok(Turn::Rejoin),
            Err(error) => Err(error),
        }
    }

    /// Reports an order as carried out, with what belongs to the run's records. False: it was reported before, or is no
    /// longer this replica's, so nothing came of it.
    pub fn done(&self, order: OrderId, outcome: Outcome, payload: Value) -> Result<bool> {
        let done = wire::Done { who: self.who(), order, outcome, payload };
        self.report("done", &to_json(&done))
    }

    /// Reports that an order could not be carried out.
    pub fn failed(&self, order: OrderId, reason: &str) -> Result<bool> {
        let failed = wire::Failed { who: self.who(), order, reason: wire::short_reason(reason) };
        self.report("failed", &to_json(&failed))
    }

    fn report(&self, request: &'static str, body: &Value) -> Result<bool> {
        match self.call::<wire::Reported>(request, body, 0) {
            Ok(reported) => Ok(reported.accepted),
            Err(error) if is_rejoin(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Says good-bye: the run goes on without this replica. A controller that is not there any more does not mind.
    pub fn leave(&self) -> Result<()> {
        self.say_good_bye(false).map(drop)
    }

    /// Wishes to leave, since somebody asked this process to end. True: it is the last of its role, so the run is saved,
    /// and it goes on taking orders until it is told to leave.
    pub fn wish_to_leave(&self) -> Result<bool> {
        self.say_good_bye(true)
    }

    fn say_good_bye(&self, asked: bool) -> Result<bool> {
        let patience_ms = self.inner.options.wait_ms_max.min(GOOD_BYE_MS_MAX);
        let leave = wire::Leave { who: self.who(), asked };
        match self.call_within::<wire::LeaveAnswer>("leave", &to_json(&leave), 0, patience_ms) {
            Ok(answer) => Ok(answer.stay),
            // It ends as soon as everybody has left, and may have done so before its answer arrived.
            Err(error @ ControlError::Unreachable { .. }) => {
                tracing::debug!("{error}");
                Ok(false)
            }
            Err(error) if is_rejoin(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The controller's state as JSON at this moment, for what a checkpoint remembers of it.
    pub fn snapshot(&self) -> Result<Value> {
        self.call("snapshot", &json!({}), 0)
    }

    /// What it is doing, in a few words, for the status; goes with the next heartbeat.
    pub fn progress(&self, text: impl Into<String>) {
        self.state().progress = text.into();
    }

    /// Sends heartbeats from a thread of its own while `order` is carried out, until the guard is dropped.
    pub fn beat_while(&self, order: OrderId) -> Result<Beating> {
        let withdrawn = Arc::new(AtomicBool::new(false));
        let deserted = Arc::new(AtomicBool::new(false));
        let lonely = Arc::clone(&deserted);
        let (stop, stopped) = mpsc::channel::<()>();
        let (client, flag) = (self.clone(), Arc::clone(&withdrawn));
        std::thread::Builder::new()
            .name("control-beat".into())
            .spawn(move || {
                let pause = Duration::from_millis(client.state().beat_ms.max(10));
                // The thread ends by the guard's end of the channel going away.
                while let Err(mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
                    client.beat(order, &flag, &lonely);
                }
            })
            .map_err(|source| ControlError::Start { what: "heartbeat", source })?;
        Ok(Beating { withdrawn, deserted, _stop: stop })
    }

    /// One heartbeat, one attempt: the next one follows soon.
    fn beat(&self, order: OrderId, withdrawn: &AtomicBool, deserted: &AtomicBool) {
        let beat = wire::Beat { who: self.who(), order, progress: self.state().progress.clone() };
        match self.attempt("beat", &to_json(&beat), Duration::from_millis(CONNECT_MS_MAX)) {
            Ok((_, Attempt::Answered(answer))) if answer["wanted"] == false => {
                withdrawn.store(true, Ordering::Relaxed);
                deserted.store(true, Ordering::Relaxed);
            }
            Ok((_, Attempt::Answered(answer))) if answer["deserted"] == true => deserted.store(true, Ordering::Relaxed),
            Ok((_, Attempt::Refused(refusal))) if refusal.kind != "ledger" => withdrawn.store(true, Ordering::Relaxed),
            Ok((_, Attempt::Answered(_) | Attempt::Refused(_))) => {}
            Ok((_, Attempt::Again(reason))) => tracing::debug!("no answer to a heartbeat: {reason}"),
            Err(error) => tracing::debug!("no heartbeat: {error}"),
        }
    }

    fn who(&self) -> wire::Who {
        wire::Who { replica: self.replica().to_owned(), incarnation: self.state().incarnation }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks until there is an answer or patience ends.
    fn call<T: DeserializeOwned>(&self, request: &'static str, body: &Value, held_ms: u64) -> Result<T> {
        self.call_within(request, body, held_ms, self.inner.options.wait_ms_max.saturating_add(held_ms))
    }

    fn call_within<T: DeserializeOwned>(
        &self,
        request: &'static str,
        body: &Value,
        held_ms: u64,
        patience_ms: u64,
    ) -> Result<T> {
        let options = &self.inner.options;
        let started = Instant::now();
        let patience = Duration::from_millis(patience_ms);
        let mut pause_ms = PAUSE_MS + self.inner.nonce % PAUSE_MS;
        let mut said = false;
        loop {
            let timeout = Duration::from_millis(held_ms + ANSWER_MS_MAX);
            let (url, reason) = match self.attempt(request, body, timeout) {
                Ok((url, Attempt::Answered(value))) => {
                    if said {
                        tracing::info!("the controller at {url} answers again");
                    }
                    return serde_json::from_value(value).map_err(|e| ControlError::Refused {
                        replica: self.replica().into(),
                        url,
                        request: request.into(),
                        kind: "answer".into(),
                        message: format!("its answer is not understood: {e}"),
                    });
                }
                Ok((_, Attempt::Refused(refusal))) if refusal.kind == "run_failed" => {
                    return Err(ControlError::RunFailed { reason: refusal.message });
                }
                Ok((url, Attempt::Refused(refusal))) => {
                    return Err(ControlError::Refused {
                        replica: self.replica().into(),
                        url,
                        request: request.into(),
                        kind: refusal.kind,
                        message: refusal.message,
                    });
                }
                Ok((url, Attempt::Again(reason))) => (url, reason),
                // `control.json` appears when the controller is up.
                Err(error) => (options.target.to_string(), error.to_string()),
            };
            let waited = started.elapsed();
            if waited + Duration::from_millis(pause_ms) > patience {
                return Err(ControlError::Unreachable {
                    replica: self.replica().into(),
                    url,
                    request: request.into(),
                    waited_ms: waited.as_millis() as u64,
                    reason,
                });
            }
            if !said && waited > Duration::from_secs(2) {
                tracing::warn!("`{}` waits for the controller at {url}: {reason}", self.replica());
                said = true;
            }
            std::thread::sleep(Duration::from_millis(pause_ms));
            pause_ms = (pause_ms * 2).min(PAUSE_MS_MAX);
        }
    }

    fn attempt(&self, request: &str, body: &Value, timeout: Duration) -> Result<(String, Attempt)> {
        let (url, token) = self.inner.options.target.resolve()?;
        let attempt = post(&self.inner.agent, &format!("{url}/v1/{request}"), &token, body, timeout);
        // A new controller may just be writing its `control.json`.
        if let (Attempt::Refused(refusal), Target::Run(_)) = (&attempt, &self.inner.options.target)
            && refusal.kind == "token"
            && self.inner.options.target.resolve().is_ok_and(|(now, _)| now != url)
        {
            return Ok((url, Attempt::Again("its token has changed".into())));
        }
        Ok((url, attempt))
    }
}

impl Target {
    fn resolve(&self) -> Result<(String, Token)> {
        match self {
            Self::Run(folder) => ControlFile::read(folder).map(|file| (file.url, file.token)),
            Self::At { url, token } => Ok((url.trim_end_matches('/').to_owned(), token.clone())),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Run(folder) => write!(f, "`{}`", ControlFile::path(folder).display()),
            Self::At { url, .. } => f.write_str(url),
        }
    }
}

/// Heartbeats until it is dropped.
pub struct Beating {
    withdrawn: Arc<AtomicBool>,
    deserted: Arc<AtomicBool>,
    _stop: mpsc::Sender<()>,
}

impl Beating {
    /// Whether the order is no longer wanted, so that going on with it is in vain.
    pub fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::Relaxed)
    }

    /// Set when a member of the step that is being made no longer works on it: to wait for it is in vain.
    pub fn deserted(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.deserted)
    }

    /// The flag itself, for loops that look at it between tokens.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.withdrawn)
    }
}

/// `GET /status` of a run's controller.
pub fn fetch_status(target: &Target, timeout_ms: u64) -> Result<Value> {
    let (url, token) = target.resolve()?;
    let request = agent().get(format!("{url}/status")).config().timeout_global(Some(Duration::from_millis(timeout_ms)));
    let response = request.build().header("authorization", format!("Bearer {}", token.reveal())).call();
    match read(response) {
        Attempt::Answered(value) => Ok(value),
        Attempt::Again(reason) => Err(ControlError::Unreachable {
            replica: "status".into(),
            url,
            request: "status".into(),
            waited_ms: timeout_ms,
            reason,
        }),
        Attempt::Refused(refusal) => Err(ControlError::Refused {
            replica: "status".into(),
            url,
            request: "status".into(),
            kind: refusal.kind,
            message: refusal.message,
        }),
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        // The controller is on this machine or beside it; a proxy for the internet does not know it.
        .proxy(None)
        .max_idle_connections(0)
        .timeout_connect(Some(Duration::from_millis(CONNECT_MS_MAX)))
        .build()
        .new_agent()
}

fn post(agent: &ureq::Agent, url: &str, token: &Token, body: &Value, timeout: Duration) -> Attempt {
    let request = agent.post(url).config().timeout_global(Some(timeout)).build();
    let request = request
        .header("authorization", format!("Bearer {}", token.reveal()))
        .header("content-type", "application/json");
    read(request.send(body.to_string().as_bytes()))
}

fn read(response: std::result::Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Attempt {
    let mut response = match response {
        Ok(response) => response,
        Err(error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_))) => {
            return Attempt::Refused(Refusal::new(0, "request", error.to_string()));
        }
        Err(error) => return Attempt::Again(error.to_string()),
    };
    let status = response.status().as_u16();
    let bytes = match response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec() {
        Ok(bytes) => bytes,
        Err(error) => return Attempt::Again(error.to_string()),
    };
    if status == 200 {
        return match serde_json::from_slice(&bytes) {
            Ok(value) => Attempt::Answered(value),
            Err(error) => Attempt::Again(format!("its answer is no JSON: {error}")),
        };
    }
    let mut refusal: Refusal = serde_json::from_slice(&bytes)
        .unwrap_or_else(|_| Refusal::new(status, "status", format!("it answered with HTTP status {status}")));
    refusal.status = status;
    match status {
        401 => Attempt::Refused(Refusal::new(401, "token", "it does not accept the token")),
        // Space may be made, and who is busy or stopping may be there again in a moment.
        408 | 429 | 500..=599 => Attempt::Again(refusal.message),
        _ => Attempt::Refused(refusal),
    }
}

fn is_rejoin(error: &ControlError) -> bool {
    matches!(error, ControlError::Refused { kind, .. } if kind == "rejoin")
}

fn to_json(value: &impl serde::Serialize) -> Value {
    // The messages are maps with text keys; serde_json cannot fail on them.
    serde_json::to_value(value).unwrap_or_else(|_| json!({}))
}
