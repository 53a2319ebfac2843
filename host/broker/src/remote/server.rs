//! A private Redis server.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{RedisAddress, RedisLimits, RedisLink};
use crate::{BrokerError, Result};

const BINARY: &str = "redis-server";
/// Ports that are tried, as upstream does.
const PORTS_MAX: u16 = 10;
/// The file in the server's folder that has its address with the password.
const ADDRESS_FILE: &str = "redis.url";
/// The file beside it that has the process which started the server, and which ends it.
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
    /// None: it was started by a process of this run that has died.
    child: Option<Child>,
    process_id: u32,
    address: RedisAddress,
}

impl RedisServer {
    /// Starts a server in `dir` (which also keeps its data: what a former server there held is there again). Its password is
    /// random unless given, and travels in a file of mode 0600, never on a command line.
    ///
    /// # Errors
    /// [`BrokerError::Start`].
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
        let last = if options.next_ports { port.saturating_add(PORTS_MAX - 1) } else { port };
        for port in port..=last {
            if TcpListener::bind(("127.0.0.1", port)).is_err() {
                continue;
            }
            let config = dir.join("redis.conf");
            private_file(&config, &server_config(dir, port, &password, options))
                .map_err(|e| io("cannot write `redis.conf`", e))?;
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
            let process_id = child.id();
            let mut server =
                RedisServer { child: Some(child), process_id, address: RedisAddress::local(port, Some(&password)) };
            if server.wait_until_ready(dir, options.start_ms_max)? {
                private_file(&dir.join(OWNER_FILE), &std::process::id().to_string())
                    .and_then(|()| private_file(&dir.join(ADDRESS_FILE), &server.address.secret_url()))
                    .map_err(|e| io("cannot write its address", e))?;
                return Ok(server);
            }
        }
        let fix = Some("give another port in `redis`");
        Err(failed(format!("the ports from {port} to {last} are in use"), fix))
    }

    /// Ends the server of `dir` whose owner was killed and could not end it; it would go on for ever, and write to the files
    /// of the next one. Whether there was one.
    pub fn end_former(dir: &Path) -> bool {
        let limits = RedisLimits { connect_ms_max: 200, reply_ms_max: 5000, away_ms_max: 0, full_ms_max: 0 };
        let Some(former) = former(dir) else { return false };
        let Ok(link) = RedisLink::connect(&former, limits) else { return false };
        // It answers by closing the connection, which is an error.
        let _ = link.run("ending a server that was left behind", |c| redis::cmd("SHUTDOWN").arg("NOSAVE").exec(c));
        let begun = Instant::now();
        while TcpListener::bind(("127.0.0.1", former.port())).is_err() && begun.elapsed() < END_MAX {
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Where it listens, with its password inside.
    pub fn address(&self) -> &RedisAddress {
        &self.address
    }

    /// Its process.
    pub fn process_id(&self) -> u32 {
        self.process_id
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

/// Asks a server of ours to end; one that does not answer has ended.
fn shut_down(address: &RedisAddress) {
    let limits = RedisLimits { connect_ms_max: 1000, reply_ms_max: 5000, away_ms_max: 0, full_ms_max: 0 };
    if let Ok(link) = RedisLink::connect(address, limits) {
        // It ends without an answer.
        let _ = link.run("ending the server", |c| redis::cmd("SHUTDOWN").arg("NOSAVE").exec(c));
    }
}

/// The server of the config key `redis`: a URL is joined; a port is joined when a server of this folder, or one without a
/// password, listens there, else a private one is started in `dir`. A server that an earlier process started in `dir`, and
/// did not live to end, is taken over: it ends with the handle.
///
/// # Errors
/// Those of [`RedisAddress::parse`] and [`RedisServer::start`].
pub fn open_or_start(redis: &str, dir: &Path, options: &ServerOptions) -> Result<(RedisAddress, Option<RedisServer>)> {
    let address = RedisAddress::parse(redis)?;
    if !address.is_port() {
        return Ok((address, None));
    }
    // Mostly nothing listens there, which is known at once; a server that is just starting gets a moment.
    let limits = RedisLimits { connect_ms_max: 250, away_ms_max: 0, ..RedisLimits::default() };
    if let Some(former) = former(dir)
        && RedisLink::connect(&former, limits).is_ok()
    {
        if owner_lives(dir) {
            return Ok((former, None));
        }
        let process_id = process_of(&former, limits);
        return Ok((former.clone(), Some(RedisServer { child: None, process_id, address: former })));
    }
    match RedisLink::connect(&address, limits) {
        Ok(_) => return Ok((address, None)),
        // A server that must not be used is not silently passed over, except that it wants a password that we lack.
        Err(error @ BrokerError::Unfit { .. }) => return Err(error),
        Err(_) => {}
    }
    let server = RedisServer::start(dir, address.port(), None, options)?;
    Ok((server.address().clone(), Some(server)))
}

/// The address of the last server that was started in `dir`.
fn former(dir: &Path) -> Option<RedisAddress> {
    let path = dir.join(ADDRESS_FILE);
    let fits = fs::metadata(&path).is_ok_and(|m| m.len() <= ADDRESS_FILE_BYTES_MAX);
    let url = fits.then(|| fs::read_to_string(&path).ok()).flatten()?;
    RedisAddress::parse(&url).ok()
}

/// A server's process; 0 when it does not say.
fn process_of(address: &RedisAddress, limits: RedisLimits) -> u32 {
    let info = RedisLink::connect(address, limits)
        .and_then(|link| link.run("asking its process", |c| redis::cmd("INFO").arg("server").query::<String>(c)));
    let info = info.unwrap_or_default();
    info.lines().find_map(|line| line.strip_prefix("process_id:")?.trim().parse().ok()).unwrap_or(0)
}

/// Whether the process that started the server of this folder still is.
fn owner_lives(dir: &Path) -> bool {
    let Ok(text) = fs::read_to_string(dir.join(OWNER_FILE)) else { return false };
    text.trim().parse::<u32>().is_ok_and(|pid| Path::new("/proc").join(pid.to_string()).exists())
}

fn server_config(dir: &Path, port: u16, password: &str, options: &ServerOptions) -> String {
    // Redis reads `"` and `\` in a quoted text as C does.
    let quoted = dir.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
    let memory = options.maxmemory_bytes.map_or(String::new(), |bytes| format!("maxmemory {bytes}\n"));
    format!(
        "bind 127.0.0.1\nport {port}\nprotected-mode yes\nrequirepass {password}\ndir \"{quoted}\"\nlogfile redis.log\n\
         daemonize no\nappendonly yes\nappendfsync everysec\nsave \"\"\nmaxmemory-policy noeviction\n{memory}"
    )
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
