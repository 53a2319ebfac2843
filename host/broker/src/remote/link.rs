//! Connections to one Redis server that survive its restarts.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use redis::{Client, Connection, ConnectionLike, RedisError, RedisResult};

use super::RedisAddress;
use crate::{BrokerError, Result};

/// The oldest server that has what is used (`XAUTOCLAIM`, `XPENDING IDLE`, `GETDEL`, `ZMSCORE`).
const VERSION_MIN: (u32, u32) = (6, 2);
const PAUSE_MS_MIN: u64 = 10;
const PAUSE_MS_MAX: u64 = 1000;
/// How long a server may be away before that is told.
const QUIET: Duration = Duration::from_secs(1);
/// Idle connections that are kept.
const IDLE_MAX: usize = 8;

/// How long a server may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisLimits {
    /// Connecting, at the start.
    pub connect_ms_max: u64,
    /// One answer.
    pub reply_ms_max: u64,
    /// A server that has gone, until it is there again.
    pub away_ms_max: u64,
    /// A server without memory, for what has no deadline of its own.
    pub full_ms_max: u64,
}

impl Default for RedisLimits {
    fn default() -> RedisLimits {
        RedisLimits { connect_ms_max: 10_000, reply_ms_max: 60_000, away_ms_max: 120_000, full_ms_max: 120_000 }
    }
}

/// Connections to one Redis server, for any number of threads. A lost connection is made again with growing pauses.
pub struct RedisLink {
    address: RedisAddress,
    client: Client,
    limits: RedisLimits,
    idle: Mutex<Vec<Connection>>,
}

/// What to do about an error.
enum Trouble {
    /// The server is away: try again.
    Away,
    /// It is full: try again, others may take something out.
    Full,
    /// It will not do that.
    Refused,
}

fn trouble(error: &RedisError) -> Trouble {
    match error.code() {
        Some("OOM" | "MISCONF") => Trouble::Full,
        Some("LOADING" | "TRYAGAIN" | "MASTERDOWN" | "READONLY" | "BUSY" | "CLUSTERDOWN") => Trouble::Away,
        Some(_) => Trouble::Refused,
        None if error.kind() == redis::ErrorKind::AuthenticationFailed => Trouble::Refused,
        None if error.is_io_error() || error.is_unrecoverable_error() => Trouble::Away,
        None => Trouble::Refused,
    }
}

impl RedisLink {
    /// Connects and checks that the server is fit: at least 6.2, never evicting, and not open to others without a password.
    ///
    /// # Errors
    /// `Unreachable` after `connect_ms_max`, `Refused` for a wrong password, `Unfit`, `BadAddress`.
    pub fn connect(address: &RedisAddress, limits: RedisLimits) -> Result<Arc<RedisLink>> {
        let client = address.client()?;
        let first = RedisLimits { away_ms_max: limits.connect_ms_max, ..limits };
        let mut link = RedisLink { address: address.clone(), client, limits: first, idle: Mutex::default() };
        link.check()?;
        link.limits = limits;
        Ok(Arc::new(link))
    }

    /// Where it leads.
    pub fn address(&self) -> &RedisAddress {
        &self.address
    }

    fn check(&self) -> Result<()> {
        self.run("connecting", |c| redis::cmd("PING").exec(c))?;
        let info: String = self.run("asking its version", |c| redis::cmd("INFO").query(c))?;
        let field =
            |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let unfit = |reason: String, fix: &'static str| {
            Err(BrokerError::Unfit { address: self.address.to_string(), reason, fix })
        };
        let version = field("redis_version").unwrap_or("unknown");
        let mut numbers = version.split('.').map_while(|part| part.parse::<u32>().ok());
        let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if number < VERSION_MIN {
            let (major, minor) = VERSION_MIN;
            return unfit(
                format!("it is version {version}, at least {major}.{minor} is needed"),
                "install a newer server",
            );
        }
        let policy = field("maxmemory_policy").unwrap_or("unknown");
        if policy != "noeviction" {
            return unfit(
                format!("its `maxmemory-policy` is `{policy}`, which throws requests and results away unseen"),
                "set `maxmemory-policy noeviction` in its configuration, or start it with `--maxmemory-policy noeviction`",
            );
        }
        self.check_open()
    }

    /// Whether others on the network could use the server without a password.
    fn check_open(&self) -> Result<()> {
        if self.address.has_password() {
            return Ok(());
        }
        let fix = "give it a password (`requirepass`) and put it into `redis`, or bind it to 127.0.0.1";
        let open =
            |reason: &str| Err(BrokerError::Unfit { address: self.address.to_string(), reason: reason.into(), fix });
        if !self.address.is_loopback() {
            return open("it is reached over the network without a password");
        }
        let asked = self.run("asking where it listens", |c| {
            redis::cmd("CONFIG").arg("GET").arg("bind").query::<Vec<String>>(c).and_then(|bind| {
                let protected: Vec<String> = redis::cmd("CONFIG").arg("GET").arg("protected-mode").query(c)?;
                Ok((bind, protected))
            })
        });
        let (bind, protected) = match asked {
            Ok(settings) => settings,
            Err(BrokerError::Refused { reason, .. }) => {
                tracing::warn!("redis `{}` does not say whether others can reach it: {reason}", self.address);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let bind = bind.get(1).map_or("", String::as_str);
        let loopback = |name: &str| {
            let name = name.trim_start_matches('-');
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
        };
        let only_here = !bind.trim().is_empty() && bind.split_whitespace().all(loopback);
        // In protected mode a server without a password answers to this machine only.
        if only_here || protected.get(1).is_some_and(|mode| mode == "yes") {
            return Ok(());
        }
        open("it listens beyond this machine without a password")
    }

    /// Does something with a connection; again while the server is away or full, to the limits.
    pub(crate) fn run<T>(&self, doing: &'static str, act: impl FnMut(&mut Connection) -> RedisResult<T>) -> Result<T> {
        self.run_for(doing, self.limits.full_ms_max, act)
    }

    /// The same with another limit for a full server.
    pub(crate) fn run_for<T>(
        &self,
        doing: &'static str,
        full_ms_max: u64,
        mut act: impl FnMut(&mut Connection) -> RedisResult<T>,
    ) -> Result<T> {
        let mut pause_ms = PAUSE_MS_MIN;
        let (mut away_since, mut full_since): (Option<Instant>, Option<Instant>) = (None, None);
        let (mut told, mut cleared) = (false, false);
        loop {
            let error = match self.once(&mut act) {
                Ok(value) => {
                    if told {
                        tracing::info!("redis `{}` is back", self.address);
                    }
                    return Ok(value);
                }
                Err(error) => error,
            };
            let (address, reason) = (self.address.to_string(), error.to_string());
            let (since, max_ms) = match trouble(&error) {
                Trouble::Refused => return Err(BrokerError::Refused { address, doing, reason }),
                Trouble::Full => {
                    let full = *full_since.get_or_insert_with(Instant::now);
                    if !told && full.elapsed() >= QUIET && full_ms_max > 0 {
                        told = true;
                        tracing::warn!("redis `{address}` takes nothing in while {doing}: {reason}; trying again");
                    }
                    (full_since.get_or_insert_with(Instant::now), full_ms_max)
                }
                Trouble::Away => {
                    full_since = None;
                    let away = *away_since.get_or_insert_with(Instant::now);
                    // A server that is just starting, or was replaced at once, is no news.
                    if !told && away.elapsed() >= QUIET && self.limits.away_ms_max > 0 {
                        told = true;
                        tracing::warn!("redis `{address}` is away while {doing}: {reason}; trying again");
                    }
                    if !cleared {
                        cleared = true;
                        // Connections of before the restart are of no use.
                        self.lock().clear();
                    }
                    (away_since.get_or_insert_with(Instant::now), self.limits.away_ms_max)
                }
            };
            let waited_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
            if waited_ms >= max_ms {
                return Err(match trouble(&error) {
                    Trouble::Full => BrokerError::ServerFull { address, doing, waited_ms, reason },
                    _ => BrokerError::Unreachable { address, doing, waited_ms, reason },
                });
            }
            std::thread::sleep(Duration::from_millis(pause_ms.min(max_ms - waited_ms)));
            pause_ms = (pause_ms * 2).min(PAUSE_MS_MAX);
        }
    }

    fn once<T>(&self, act: &mut impl FnMut(&mut Connection) -> RedisResult<T>) -> RedisResult<T> {
        let pooled = self.lock().pop();
        let mut connection = match pooled {
            Some(connection) => connection,
            None => self.open()?,
        };
        let done = act(&mut connection);
        // After a lost or late answer the next one would be read as the answer to something else.
        let sound = done.as_ref().err().is_none_or(|error| error.code().is_some());
        if sound && connection.is_open() {
            let mut idle = self.lock();
            if idle.len() < IDLE_MAX {
                idle.push(connection);
            }
        }
        done
    }

    fn open(&self) -> RedisResult<Connection> {
        let limit = Duration::from_millis(self.limits.connect_ms_max.max(1));
        let connection = self.client.get_connection_with_timeout(limit)?;
        let reply = Some(Duration::from_millis(self.limits.reply_ms_max.max(1)));
        connection.set_read_timeout(reply)?;
        connection.set_write_timeout(reply)?;
        Ok(connection)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
