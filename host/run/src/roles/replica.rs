//! What all ranks of a replica are told to do, in this process or in several.
//!
//! The first process speaks for the replica: it joins the run, and tells the others every [`Job`] by way of their common
//! [`NodeWorld`]. The others follow it, do each job on their own ranks, and end with it. When one of them is lost they all end
//! with an error that names it, and whoever started them starts them again together: nothing of a replica is repaired.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use cosmos_parallel::{Mesh, NodeOptions, NodeWorld, ParallelError, RankGroups, Rendezvous};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Result, RunError};
use crate::roles::crew::Crew;
use crate::roles::{ReplicaPart, RoleOptions, RoleOutcome};
use crate::shards;
use crate::signals::StopFlag;

/// How long a rank may keep the others waiting.
pub const RANK_MS_MAX: u64 = 600_000;
/// How long the processes of a replica may take to come together. One that was killed is started again meanwhile.
const MEET_MS_MAX: u64 = 300_000;
/// How long the port of the rendezvous may still belong to a process that is ending.
const PORT_WAIT: Duration = Duration::from_secs(20);
/// How often the first process tells the others that it has nothing for them.
const BEAT: Duration = Duration::from_secs(1);
/// Bytes of a job with its samples, and of what a process says of it.
const JOB_BYTES_MAX: usize = 64 << 30;
/// Bytes of what processes tell each other when they have met.
const GREETING_BYTES_MAX: usize = 1 << 20;

/// Something that every rank of a replica does, as data, since some of them may be in other processes.
pub trait Job: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// A rank's state.
    type Rank: Send + 'static;
    /// What a rank says of it.
    type Done: Serialize + DeserializeOwned + Send + 'static;

    /// The rank's groups, which fail when the job does.
    fn groups(rank: &Self::Rank) -> &Arc<RankGroups>;

    /// Does a rank's part.
    ///
    /// # Errors
    /// Whatever keeps it from that.
    fn perform(&self, rank: &mut Self::Rank) -> Result<Self::Done>;
}

/// What the first process tells the others.
#[derive(Serialize, Deserialize)]
enum Word {
    /// Nothing yet.
    Idle,
    /// A job follows.
    Work(Vec<u8>),
    /// The replica leaves the run, which is over or saved.
    Home { saved: bool },
}

/// What the others answer.
#[derive(Serialize, Deserialize)]
struct Heard {
    /// Whether the process was asked to leave.
    asked: bool,
}

/// The processes of a replica, seen from one of them.
pub struct Party {
    name: String,
    world: NodeWorld,
    /// Held from an order to what came of it.
    turn: Mutex<()>,
    asked: AtomicBool,
    trouble: OnceLock<String>,
}

impl Party {
    /// Waits until all processes of this replica are there. `ip` is where others reach this machine, `secret` what the
    /// processes of the run know.
    ///
    /// # Errors
    /// A part that makes no sense; a port that cannot be listened on; processes that do not come, by their numbers.
    pub fn meet(options: &RoleOptions, part: &ReplicaPart, ip: IpAddr, secret: &str) -> Result<Arc<Self>> {
        let Some(name) = options.name.clone() else {
            return Err(RunError::config(
                "",
                "a replica over several processes needs a name that they all know",
                "give each of them the same `--name`",
            ));
        };
        if part.nodes < 2 || part.node >= part.nodes {
            return Err(RunError::config(
                "",
                format!("process {} of {} of `{name}` does not exist", part.node, part.nodes),
                "`--node-rank` counts from 0 to one less than `--nodes`, which is 2 or more",
            ));
        }
        tracing::info!("`{name}`: process {} of {} meets the others at {}", part.node, part.nodes, part.rendezvous);
        let rendezvous = match part.node {
            0 => Rendezvous::Listen(listen(&part.rendezvous, ip)?),
            _ => Rendezvous::Connect(part.rendezvous.clone()),
        };
        let node_options = NodeOptions {
            node: part.node,
            nodes: part.nodes,
            token: format!("{secret}\n{name}").into_bytes(),
            connect_ms_max: MEET_MS_MAX,
            wait_ms_max: RANK_MS_MAX,
        };
        let world = NodeWorld::meet(rendezvous, node_options).map_err(|error| at_meeting(&name, error))?;
        Ok(Self::of(name, world))
    }

    /// The processes of `world`, which have met.
    pub(crate) fn of(name: String, world: NodeWorld) -> Arc<Self> {
        let (turn, asked, trouble) = (Mutex::default(), AtomicBool::new(false), OnceLock::new());
        Arc::new(Self { name, world, turn, asked, trouble })
    }

    /// The replica's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// This process's number.
    pub fn node(&self) -> usize {
        self.world.node()
    }

    /// Before the first job: what every process tells all others, by process.
    ///
    /// # Errors
    /// A process that is gone.
    pub fn greet(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.world.exchange(mine, GREETING_BYTES_MAX).map_err(|error| self.broken(error))
    }

    /// `flag` is set when a process of the replica is lost.
    pub fn set_when_lost(&self, flag: &Arc<AtomicBool>) {
        self.world.set_when_lost(flag);
    }

    /// Whether one of the other processes was asked to leave.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Whether the replica can go on.
    ///
    /// # Errors
    /// Who is lost.
    pub fn check(&self) -> Result<()> {
        let told = || self.trouble.get().map(|message| RunError::shared("replica", message.clone(), ""));
        match self.world.lost().map(RunError::from).or_else(told) {
            None => Ok(()),
            Some(error) => Err(self.broken(error)),
        }
    }

    fn broken(&self, error: impl Into<RunError>) -> RunError {
        match error.into() {
            error @ RunError::Replica { .. } => error,
            error => RunError::Replica { replica: self.name.clone(), source: Box::new(error) },
        }
    }

    fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first process says something; it must have the turn.
    fn say(&self, word: &Word) -> Result<()> {
        let heard = self.world.exchange(&encode(word)?, JOB_BYTES_MAX).map_err(|error| self.broken(error))?;
        for heard in &heard[1..] {
            if decode::<Heard>(heard)?.asked {
                self.asked.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Sends everybody home.
    ///
    /// # Errors
    /// A process that is gone.
    pub fn go_home(&self, outcome: &RoleOutcome) -> Result<()> {
        let _turn = self.take_turn();
        self.say(&Word::Home { saved: *outcome == RoleOutcome::Saved })
    }

    /// While there is nothing to do the processes still hear of each other, so that one whose machine is gone is missed.
    fn beat(this: &Weak<Self>) {
        loop {
            std::thread::sleep(BEAT);
            let Some(party) = this.upgrade() else { return };
            let _turn = match party.turn.try_lock() {
                Ok(turn) => turn,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => continue,
            };
            if let Err(error) = party.say(&Word::Idle) {
                let _ = party.trouble.set(error.to_string());
                return;
            }
        }
    }
}

fn at_meeting(name: &str, error: ParallelError) -> RunError {
    let hint = "see whether the process that is named was started, with the same `--name`, `--nodes` and \
                `--rendezvous`, and whether that address is reachable from its machine";
    RunError::shared(format!("replica `{name}`"), error.to_string(), hint)
}

fn listen(rendezvous: &str, ip: IpAddr) -> Result<TcpListener> {
    let port = rendezvous.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).filter(|port| *port > 0);
    let Some(port) = port else {
        return Err(RunError::config(
            "",
            format!("`--rendezvous {rendezvous}` is no address with a port"),
            "such as `10.0.0.1:29345`",
        ));
    };
    // The machine's name may stand for another of its addresses than the others use.
    let any: IpAddr = match ip {
        ip if ip.is_loopback() => ip,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let until = Instant::now() + PORT_WAIT;
    loop {
        match TcpListener::bind((any, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) => {
                return Err(RunError::shared(
                    format!("{any}:{port}"),
                    format!("it cannot be listened on for the other processes of this replica: {error}"),
                    "choose another port: `--rdzv-port` of the launcher",
                ));
            }
        }
    }
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    let failed =
        |e| RunError::shared("replica", format!("what its processes tell each other cannot be written: {e}"), "");
    postcard::to_allocvec(value).map_err(failed)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(|e| {
        let message = format!("what another process of it says is not understood: {e}");
        RunError::shared("replica", message, "use one version of this program everywhere")
    })
}

/// The ranks of a replica.
pub struct Replica<J: Job> {
    crew: Crew<J::Rank>,
    party: Option<Arc<Party>>,
    /// Nothing more can be done together.
    broken: bool,
}

impl<J: Job> Replica<J> {
    /// The ranks of `mesh`, of which `party`, if there is one, has a part in this process. `table` is where the mesh's sizes
    /// come from.
    ///
    /// # Errors
    /// A mesh that cannot be dealt out; those of `make`.
    pub fn new(
        mesh: Mesh,
        table: &str,
        party: Option<Arc<Party>>,
        make: impl Fn(RankGroups) -> Result<J::Rank> + Send + Sync + 'static,
    ) -> Result<Self> {
        let Some(party) = party else {
            return Ok(Self { crew: Crew::on(mesh, RANK_MS_MAX, make)?, party: None, broken: false });
        };
        let nodes = party.world.nodes();
        if !mesh.world().is_multiple_of(nodes) {
            return Err(RunError::config(
                "",
                format!("`{table}`: {} ranks ({mesh}) cannot be dealt out evenly to {nodes} processes", mesh.world()),
                "choose sizes whose product is a multiple of the number of processes",
            ));
        }
        let groups = party.world.ranks(mesh).map_err(|error| party.broken(error))?;
        let crew = Crew::of(groups, make).inspect_err(|error| party.world.fail(error))?;
        if party.node() == 0 {
            let beating = Arc::downgrade(&party);
            let spawned = std::thread::Builder::new().name("beat".into()).spawn(move || Party::beat(&beating));
            spawned.map_err(|e| RunError::shared("replica", format!("a thread cannot be started: {e}"), ""))?;
        }
        Ok(Self { crew, party: Some(party), broken: false })
    }

    /// How many ranks are in this process.
    pub fn ranks(&self) -> usize {
        self.crew.ranks()
    }

    /// Every rank does `job`; what came of it, by rank.
    ///
    /// # Errors
    /// The first rank's. Over several processes there is no way on after it.
    pub fn all(&mut self, job: J) -> Result<Vec<J::Done>> {
        let Some(party) = self.party.clone() else { return self.here(job) };
        party.check()?;
        if self.broken {
            return Err(party.broken(RunError::shared("replica", "its ranks have failed before", "")));
        }
        let done = self.everywhere(&party, job);
        self.broken = done.is_err();
        done.map_err(|error| party.broken(error))
    }

    fn everywhere(&mut self, party: &Party, job: J) -> Result<Vec<J::Done>> {
        let _turn = party.take_turn();
        party.say(&Word::Work(encode(&job)?))?;
        let mut done = self.here(job).inspect_err(|error| party.world.fail(error))?;
        let told = party.world.exchange(&[], JOB_BYTES_MAX).map_err(|error| party.broken(error))?;
        for (process, told) in told.iter().enumerate().skip(1) {
            match decode::<std::result::Result<Vec<J::Done>, String>>(told)? {
                Ok(theirs) => done.extend(theirs),
                Err(reason) => {
                    return Err(RunError::shared(format!("process {process} of `{}`", party.name), reason, ""));
                }
            }
        }
        Ok(done)
    }

    fn here(&mut self, job: J) -> Result<Vec<J::Done>> {
        self.crew.all(move |rank| {
            let groups = Arc::clone(J::groups(rank));
            shards::together(&groups, || job.perform(rank))
        })
    }

    /// Does what the first process says until it goes home. `prepare` sees every job first, once for all ranks of this
    /// process; `stop` is passed on.
    ///
    /// # Errors
    /// Whatever fails here or elsewhere: this process is of no more use then.
    pub fn follow(mut self, stop: &StopFlag, mut prepare: impl FnMut(&J) -> Result<()>) -> Result<RoleOutcome> {
        let Some(party) = self.party.clone() else { return Ok(RoleOutcome::Done) };
        tracing::info!("`{}`: process {} follows the first", party.name, party.node());
        loop {
            let heard = encode(&Heard { asked: stop.is_set() })?;
            let told = party.world.exchange(&heard, JOB_BYTES_MAX).map_err(|error| party.broken(error))?;
            match decode::<Word>(&told[0])? {
                Word::Idle => {}
                Word::Home { saved } => {
                    tracing::info!("`{}`: process {} goes home with the first", party.name, party.node());
                    return Ok(if saved { RoleOutcome::Saved } else { RoleOutcome::Done });
                }
                Word::Work(job) => {
                    let job: J = decode(&job)?;
                    let done = prepare(&job).and_then(|()| self.here(job));
                    let done = done.inspect_err(|error| party.world.fail(error));
                    let told = done.as_ref().map_err(ToString::to_string);
                    let told = encode(&told).and_then(|told| Ok(party.world.exchange(&told, JOB_BYTES_MAX)?));
                    // Why it failed here says more than that the others have left since.
                    done.map_err(|error| party.broken(error))?;
                    told.map_err(|error| party.broken(error))?;
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "replica_tests.rs"]
pub mod tests;
