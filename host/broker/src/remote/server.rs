//! A private Redis server.
//!
//! Whoever starts a server in a folder keeps `redis.owner` there locked and ends the server. The system lets go of the lock
//! when that process ends, however it ends; then the next one that comes to the folder takes the server over, and ends it.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{RedisAddress, RedisLimits, RedisLink};
use crate::{BrokerError, Result};

const BINARY: &str = "redis-server";
/// Ports that are tried, as upstream does.
const PORTS_MAX: u16 = 10;
/// The file in the server's folder that has its address with the password.
const ADDRESS_FILE: &str = "redis.url";
/// The file beside it that the process which ends the server keeps locked.
const OWNER_FILE: &str = "redis.owner";
const ADDRESS_FILE_BYTES_MAX: u64 = 4096;
/// How long a server may take to end.
const END_MAX: Duration = Duration::from_secs(10);

/// How a private server is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// Its memory in bytes, beyond which it takes nothing in; none for no limit.
    pub maxmemory_bytes: Option<u64>,
    /// How long it may take to answer.
    pub start_ms_max: u64,
    /// Whether the next ports are tried when one is in use.
    pub next_ports: bool,
    /// The program.
    pub binary: PathBuf,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions { maxmemory_bytes: None, start_ms_max: 30_000, next_ports: true, binary: BINARY.into() }
    }
}

/// A Redis server of our own on the loopback device, with a password and an append-only file. It ends when this is dropped.
#[derive(Debug)]
pub struct RedisServer {
    /// None: it was taken over.
    child: Option<Child>,
    process_id: u32,
    address: RedisAddress,
    /// The lock on [`OWNER_FILE`].
    _owner: File,
}

impl RedisServer {
    /// Starts a server in `dir` (which also keeps its data: what a former server there held is there again). One that was
    /// left behind there is ended first. The password is random unless given, and travels in a file of mode 0600, never on a
    /// command line.
    ///
    /// # Errors
    /// [`BrokerError::Start`], also when another process has a server in `dir`.
    pub fn start(dir: &Path, port: u16, password: Option<&str>, options: &ServerOptions) -> Result<RedisServer> {
        let failed = |reason: String, fix| BrokerError::Start { dir: dir.display().to_string(), reason, fix };
        let io = |what: &str, e: std::io::Error| failed(format!("{what}: {e}"), None);
        fs::create_dir_all(dir).map_err(|e| io("cannot make the folder", e))?;
        let dir = &dir.canonicalize().map_err(|e| io("cannot find the folder", e))?;
        let password = match password {
            Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric()) => text.to_owned(),
            Some(_) => return Err(failed("its password is not made of letters and digits".into(), None)),
            None => random_password().map_err(|e| io("cannot read random numbers", e))?,
        };
        if let Some(left_behind) = RedisServer::take_over(dir)? {
            tracing::warn!("ending `redis-server` at {}, left behind in {}", left_behind.address, dir.display());
        }
        let Some(owner) = own(dir)? else {
            let reason = format!("another process has a server in that folder: its number is in `{OWNER_FILE}`");
            return Err(failed(reason, Some("end that run first, or take another run folder")));
        };
        let last = if options.next_ports { port.saturating_add(PORTS_MAX - 1) } else { port };
        for port in port..=last {
            if TcpListener::bind(("127.0.0.1", port)).is_err() {
                continue;
            }
            let config = dir.join("redis.conf");
            let maxmemory_bytes = options.maxmemory_bytes;
            let (bind, password) = ("127.0.0.1", password.as_str());
            let text = ServerConfig { bind, port, password, dir, log: Some("redis.log"), maxmemory_bytes }.to_string();
            private_file(&config, &text).map_err(|e| io("cannot write `redis.conf`", e))?;
            let child = Command::new(&options.binary)
                .arg(&config)
                .current_dir(dir)
                // A signal to the terminal's or the job's group is not for it: others have to save first.
                .process_group(0)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            let child = match child {
                Ok(child) => child,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    let fix =
                        Some("install it: `apt-get install redis-server`, or give the URL of a server in `redis`");
                    return Err(failed(format!("there is no program `{}`", options.binary.display()), fix));
                }
                Err(e) => return Err(io("cannot run the program", e)),
            };
            let mut server = RedisServer {
                process_id: child.id(),
                child: Some(child),
                address: RedisAddress::local(port, Some(password)),
                _owner: owner.try_clone().map_err(|e| io("cannot keep its lock", e))?,
            };
            if server.wait_until_ready(dir, options.start_ms_max)? {
                private_file(&dir.join(ADDRESS_FILE), &server.address.secret_url())
                    .map_err(|e| io("cannot write its address", e))?;
                return Ok(server);
            }
        }
        let fix = Some("give another port in `redis`");
        Err(failed(format!("the ports from {port} to {last} are in use"), fix))
    }

    /// The server in `dir` that a process which has died left running there; drop it to end it. None: there is none, or
    /// another process has it.
    ///
    /// # Errors
    /// [`BrokerError::Start`] for a lock that cannot be looked at.
    pub fn take_over(dir: &Path) -> Result<Option<RedisServer>> {
        let Some((address, link)) = running(dir) else { return Ok(None) };
        let Some(owner) = own(dir)? else { return Ok(None) };
        Ok(Some(RedisServer { child: None, process_id: process_of(&link), address, _owner: owner }))
    }

    /// Where it listens, with its password inside.
    pub fn address(&self) -> &RedisAddress {
        &self.address
    }

    /// Its process.
    pub fn process_id(&self) -> u32 {
        self.process_id
    }

    /// As if this process had died: the lock is gone, the server stays.
    #[cfg(test)]
    pub(super) fn let_go(&self) {
        self._owner.unlock().unwrap();
    }

    /// Whether it answers; false when somebody else has taken the port in the meantime.
    fn wait_until_ready(&mut self, dir: &Path, start_ms_max: u64) -> Result<bool> {
        let begun = Instant::now();
        let failed = |reason: String, fix| Err(BrokerError::Start { dir: dir.display().to_string(), reason, fix });
        let limits = RedisLimits { connect_ms_max: 250, reply_ms_max: 5000, away_ms_max: 0, full_ms_max: 0 };
        loop {
            let answer = RedisLink::connect(&self.address, limits);
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                let log = last_lines(&dir.join("redis.log"));
                if log.contains("Address already in use") {
                    return Ok(false);
                }
                return failed(format!("it ended with {status}; the end of `redis.log`: {log}"), None);
            }
            match answer {
                Ok(_) => return Ok(true),
                Err(error) if begun.elapsed() >= Duration::from_millis(start_ms_max) => {
                    let reason = format!("it does not answer after {start_ms_max} ms: {error}");
                    return failed(reason, Some("look at `redis.log` in that folder"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // What it holds is of use to nobody once the run is over; its file has what it acknowledged.
        match &mut self.child {
            Some(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => shut_down(&self.address),
        }
    }
}

/// Asks a server of ours to end, and waits until it has; one that does not answer has ended.
fn shut_down(address: &RedisAddress) {
    let Ok(link) = RedisLink::connect(address, at_once()) else { return };
    // It answers by closing the connection, which is an error.
    let _ = link.run("ending the server", |c| redis::cmd("SHUTDOWN").arg("NOSAVE").exec(c));
    let begun = Instant::now();
    while TcpListener::bind(("127.0.0.1", address.port())).is_err() {
        if begun.elapsed() >= END_MAX {
            tracing::warn!("`redis-server` at {address} was asked to end and has not within {} s", END_MAX.as_secs());
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The server of the config key `redis`: a URL is joined; a port is joined when a server of this folder, or one without a
/// password, listens there, else a private one is started in `dir`. A server that was left behind in `dir` is taken over:
/// it ends with the handle.
///
/// # Errors
/// Those of [`RedisAddress::parse`] and [`RedisServer::start`].
pub fn open_or_start(redis: &str, dir: &Path, options: &ServerOptions) -> Result<(RedisAddress, Option<RedisServer>)> {
    let address = RedisAddress::parse(redis)?;
    if !address.is_port() {
        return Ok((address, None));
    }
    if let Some(server) = RedisServer::take_over(dir)? {
        return Ok((server.address.clone(), Some(server)));
    }
    if let Some((of_another, _)) = running(dir) {
        return Ok((of_another, None));
    }
    match RedisLink::connect(&address, at_once()) {
        Ok(_) => return Ok((address, None)),
        // A server that must not be used is not silently passed over, except that it wants a password that we lack.
        Err(error @ BrokerError::Unfit { .. }) => return Err(error),
        Err(_) => {}
    }
    let server = RedisServer::start(dir, address.port(), None, options)?;
    Ok((server.address().clone(), Some(server)))
}

/// For a server on this machine of which mostly nothing is left, which is known at once; one that is just starting gets a
/// moment.
fn at_once() -> RedisLimits {
    RedisLimits { connect_ms_max: 250, reply_ms_max: 5000, away_ms_max: 0, full_ms_max: 0 }
}

/// The last server that was started in `dir`, if it still answers.
fn running(dir: &Path) -> Option<(RedisAddress, Arc<RedisLink>)> {
    let path = dir.join(ADDRESS_FILE);
    let fits = fs::metadata(&path).is_ok_and(|m| m.len() <= ADDRESS_FILE_BYTES_MAX);
    let url = fits.then(|| fs::read_to_string(&path).ok()).flatten()?;
    let address = RedisAddress::parse(&url).ok()?;
    let link = RedisLink::connect(&address, at_once()).ok()?;
    Some((address, link))
}

/// The right to start and end the server of `dir`, for as long as the file is open. None: another process has it.
fn own(dir: &Path) -> Result<Option<File>> {
    let path = dir.join(OWNER_FILE);
    let failed = |e: std::io::Error| BrokerError::Start {
        dir: dir.display().to_string(),
        reason: format!("cannot lock `{OWNER_FILE}`: {e}"),
        fix: None,
    };
    let mut file = File::options().create(true).read(true).append(true).mode(0o600).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // For people who wonder.
    file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(Some(file))
}

/// A server's process; 0 when it does not say.
fn process_of(link: &RedisLink) -> u32 {
    let info = link.run("asking its process", |c| redis::cmd("INFO").arg("server").query::<String>(c));
    let info = info.unwrap_or_default();
    info.lines().find_map(|line| line.strip_prefix("process_id:")?.trim().parse().ok()).unwrap_or(0)
}

/// The configuration of a server that is ours alone: with a password, an append-only file, and nothing evicted.
#[derive(Debug, Clone)]
pub struct ServerConfig<'a> {
    /// The address of this machine that it listens on.
    pub bind: &'a str,
    /// The port.
    pub port: u16,
    /// Letters and digits.
    pub password: &'a str,
    /// Where its files lie.
    pub dir: &'a Path,
    /// Its log in `dir`; none: standard output.
    pub log: Option<&'a str>,
    /// Its memory in bytes; none for no limit.
    pub maxmemory_bytes: Option<u64>,
}

impl fmt::Display for ServerConfig<'_> {
    /// As the server reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ServerConfig { bind, port, password, dir, log, maxmemory_bytes } = self;
        // Redis reads a quoted text as C does.
        let quoted = dir.display().to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        write!(
            f,
            "bind {bind}\nport {port}\nprotected-mode yes\nrequirepass {password}\ndir \"{quoted}\"\nlogfile \"{}\"\n\
             daemonize no\nappendonly yes\nappendfsync everysec\nsave \"\"\nmaxmemory-policy noeviction\n",
            log.unwrap_or_default()
        )?;
        maxmemory_bytes.map_or(Ok(()), |bytes| writeln!(f, "maxmemory {bytes}"))
    }
}

fn private_file(path: &Path, text: &str) -> std::io::Result<()> {
    let partial = path.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&partial, path)
}

fn random_password() -> std::io::Result<String> {
    let mut bytes = [0_u8; 32];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(600)..];
    String::from_utf8_lossy(tail).trim().replace('\n', "; ")
}
