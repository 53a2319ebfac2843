//! How processes find each other and make sure of each other.
//!
//! Rank 0 listens. Whoever connects gets a fresh nonce and answers with what it claims to be and the HMAC of both under the
//! shared token; it gets the same kind of proof back. When all ranks have come, rank 0 tells each the others' addresses,
//! and they connect to each other in the same way. The token itself never goes over a wire, and an answer recorded earlier
//! does not fit another nonce. Every message has a fixed size, so that nothing is reserved for a stranger.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::SocketOptions;
use super::hmac::{equal, hmac_sha256};
use crate::{ParallelError, Result};

const MAGIC: [u8; 8] = *b"CSMGRP01";
const NONCE_BYTES: usize = 32;
/// Magic and nonce.
pub(super) const CHALLENGE_BYTES: usize = 8 + NONCE_BYTES;
/// Magic, attempt, rank, rank called, world, port, nonce.
const CLAIM_BYTES: usize = 8 + 8 + 4 + 4 + 4 + 2 + NONCE_BYTES;
/// Status, attempt, world, proof.
pub(super) const VERDICT_BYTES: usize = 1 + 8 + 4 + 32;
/// Kind of address, address, port.
const ADDRESS_BYTES: usize = 1 + 16 + 2;
const TOKEN_BYTES_MIN: usize = 16;
/// The most ranks of a group: every two have a connection.
const WORLD_MAX: usize = 1024;
/// Strangers that may be asked at the same time.
const ASKED_MAX: usize = 64;
/// How long one may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);
/// How often who waits for bytes looks whether to stop.
const LOOK: Duration = Duration::from_millis(100);

const WELCOME: u8 = 0;
const BAD_TOKEN: u8 = 1;
const BAD_ATTEMPT: u8 = 2;
const BAD_WORLD: u8 = 3;
const BAD_RANK: u8 = 4;
const TAKEN: u8 = 5;

/// The connections to the other ranks, by rank.
type Streams = Vec<Option<TcpStream>>;

/// What one says it is.
#[derive(Clone, Copy)]
struct Claim {
    attempt: u64,
    rank: u32,
    called: u32,
    world: u32,
    port: u16,
    nonce: [u8; NONCE_BYTES],
}

impl Claim {
    fn bytes(&self) -> [u8; CLAIM_BYTES] {
        let mut bytes = [0; CLAIM_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.attempt.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.rank.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.called.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.world.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.port.to_le_bytes());
        bytes[30..].copy_from_slice(&self.nonce);
        bytes
    }

    fn parse(bytes: &[u8; CLAIM_BYTES]) -> Option<Claim> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (bytes[..8] == MAGIC).then(|| Claim {
            attempt: u64::from(number(8)) | u64::from(number(12)) << 32,
            rank: number(16),
            called: number(20),
            world: number(24),
            port: u16::from_le_bytes([bytes[28], bytes[29]]),
            nonce: std::array::from_fn(|i| bytes[30 + i]),
        })
    }
}

fn check(options: &SocketOptions, listens: bool) -> Result<()> {
    let bad = |reason: String| Err(ParallelError::BadGroup { reason });
    if options.token.len() < TOKEN_BYTES_MIN {
        return bad(format!("a token of {} bytes; expected at least {TOKEN_BYTES_MIN}", options.token.len()));
    }
    if options.world == 0 || options.world > WORLD_MAX {
        return bad(format!("{} ranks; expected 1 to {WORLD_MAX}", options.world));
    }
    if options.rank >= options.world {
        return Err(ParallelError::NoSuchRank { rank: options.rank, world: options.world });
    }
    match (options.rank, listens) {
        (0, false) => bad("rank 0 listens; it does not connect".into()),
        (rank, true) if rank > 0 => bad(format!("rank {rank} connects; only rank 0 listens")),
        _ => Ok(()),
    }
}

pub(crate) fn nonce() -> Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce)
        .map_err(|error| ParallelError::BadGroup { reason: format!("no random numbers: {error}") })?;
    Ok(nonce)
}

/// Gives reads and writes of a handshake their deadline; none when it is over.
fn limit(stream: &TcpStream, deadline: Instant) -> std::io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}

/// Reads all of `bytes` by the deadline, however slowly they drip.
fn read_by(
    stream: &mut TcpStream,
    bytes: &mut [u8],
    deadline: Instant,
    options: &SocketOptions,
) -> std::io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let now = Instant::now();
        if now >= deadline || options.is_stopped() {
            return Err(ErrorKind::TimedOut.into());
        }
        limit(stream, if options.stop.is_some() { deadline.min(now + LOOK) } else { deadline })?;
        match stream.read(&mut bytes[at..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => at += read,
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn listen(listener: TcpListener, options: &SocketOptions) -> Result<Streams> {
    check(options, true)?;
    let deadline = Instant::now() + Duration::from_millis(options.connect_ms_max);
    let missing: Vec<usize> = (1..options.world).collect();
    let came = accept(&listener, options, &missing, deadline)?;
    let mut streams: Streams = (0..options.world).map(|_| None).collect();
    let mut table = vec![0; options.world * ADDRESS_BYTES];
    for (rank, stream, port) in came {
        let ip = stream.peer_addr().map_err(|error| lost(rank, "an unknown address", &error))?.ip();
        write_address(&mut table[rank * ADDRESS_BYTES..][..ADDRESS_BYTES], SocketAddr::new(ip, port));
        streams[rank] = Some(stream);
    }
    for (rank, stream) in streams.iter_mut().enumerate() {
        if let Some(stream) = stream {
            let address = stream.peer_addr().map_or_else(|_| "its address".into(), |address| address.to_string());
            let told = limit(stream, deadline).and_then(|()| stream.write_all(&table));
            told.map_err(|error| lost(rank, &address, &error))?;
        }
    }
    Ok(streams)
}

pub(super) fn connect(address: &str, options: &SocketOptions) -> Result<Streams> {
    check(options, false)?;
    let deadline = Instant::now() + Duration::from_millis(options.connect_ms_max);
    // The others will find this rank where rank 0 does; the listener must be there before they are told.
    let (mut first, listener) = call(0, address, options, deadline, true)?;
    let listener = listener.ok_or_else(|| ParallelError::BadGroup { reason: "no address to listen at".into() })?;
    let mut table = vec![0; options.world * ADDRESS_BYTES];
    read_by(&mut first, &mut table, deadline, options).map_err(|error| match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => ParallelError::Missing {
            operation: "connect",
            missing: vec![format!("rank 0 at {address}, which waits for the other ranks")],
            waited_ms: options.connect_ms_max,
        },
        _ => lost(0, address, &error),
    })?;
    let mut streams: Streams = (0..options.world).map(|_| None).collect();
    streams[0] = Some(first);
    for (rank, place) in streams.iter_mut().enumerate().take(options.rank).skip(1) {
        let address = read_address(&table[rank * ADDRESS_BYTES..][..ADDRESS_BYTES])
            .ok_or_else(|| lost(0, address, &std::io::Error::other("it sent a table that is no table")))?;
        *place = Some(call(rank, &address.to_string(), options, deadline, false)?.0);
    }
    let missing: Vec<usize> = (options.rank + 1..options.world).collect();
    for (rank, stream, _) in accept(&listener, options, &missing, deadline)? {
        streams[rank] = Some(stream);
    }
    Ok(streams)
}

fn lost(rank: usize, address: &str, error: &std::io::Error) -> ParallelError {
    let reason = match error.kind() {
        ErrorKind::UnexpectedEof => "the connection was closed".into(),
        _ => error.to_string(),
    };
    ParallelError::Lost { operation: "connect", rank, address: address.into(), reason }
}

fn write_address(bytes: &mut [u8], address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes[0] = 4;
            bytes[1..5].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes[0] = 6;
            bytes[1..17].copy_from_slice(&ip.octets());
        }
    }
    bytes[17..19].copy_from_slice(&address.port().to_le_bytes());
}

fn read_address(bytes: &[u8]) -> Option<SocketAddr> {
    let octets: [u8; 16] = bytes.get(1..17)?.try_into().ok()?;
    let ip = match bytes[0] {
        4 => IpAddr::from([octets[0], octets[1], octets[2], octets[3]]),
        6 => IpAddr::from(octets),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_le_bytes([bytes[17], bytes[18]])))
}

/// Takes connections until all of `missing` have come; their ranks, connections and ports.
fn accept(
    listener: &TcpListener,
    options: &SocketOptions,
    missing: &[usize],
    deadline: Instant,
) -> Result<Vec<(usize, TcpStream, u16)>> {
    let mut came: Vec<(usize, TcpStream, u16)> = Vec::new();
    if missing.is_empty() {
        return Ok(came);
    }
    let broken = |error: std::io::Error| ParallelError::BadGroup { reason: format!("cannot listen: {error}") };
    listener.set_nonblocking(true).map_err(broken)?;
    let (asked, answers) = mpsc::channel::<Option<(TcpStream, Claim)>>();
    let mut asking = 0_usize;
    while came.len() < missing.len() {
        let now = Instant::now();
        if options.is_stopped() {
            return Err(ParallelError::Stopped { operation: "connect" });
        }
        if now >= deadline {
            let absent = missing.iter().filter(|rank| came.iter().all(|(other, ..)| other != *rank));
            return Err(ParallelError::Missing {
                operation: "connect",
                missing: absent.map(|rank| format!("rank {rank}")).collect(),
                waited_ms: options.connect_ms_max,
            });
        }
        match listener.accept() {
            // A stranger too many; the ranks try again.
            Ok(_) if asking >= ASKED_MAX => {}
            Ok((stream, _)) => {
                asking += 1;
                let (asked, options, until) = (asked.clone(), options.clone(), deadline.min(now + ANSWER_MAX));
                std::thread::spawn(move || asked.send(ask(stream, &options, until)));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                std::thread::sleep(POLL);
            }
            // A connection that broke before it was taken.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) => {}
            Err(error) => return Err(broken(error)),
        }
        while let Ok(answer) = answers.try_recv() {
            asking -= 1;
            let Some((mut stream, claim)) = answer else { continue };
            let rank = claim.rank as usize;
            came.retain(|(other, stream, _)| *other != rank || alive(stream));
            let status = match missing.contains(&rank) {
                false => BAD_RANK,
                true if came.iter().any(|(other, ..)| *other == rank) => TAKEN,
                true => WELCOME,
            };
            if decide(&mut stream, options, &claim, status, deadline).is_ok() && status == WELCOME {
                came.push((rank, stream, claim.port));
            }
        }
    }
    Ok(came)
}

/// Whether the other side has not closed a connection on which nothing is due.
fn alive(stream: &TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return false;
    }
    matches!(stream.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

/// Asks who has connected. None when it is not one of the group; it has then been told.
fn ask(mut stream: TcpStream, options: &SocketOptions, deadline: Instant) -> Option<(TcpStream, Claim)> {
    let nonce = nonce().ok()?;
    limit(&stream, deadline).ok()?;
    stream.write_all(&[&MAGIC[..], &nonce].concat()).ok()?;
    let mut answer = [0; CLAIM_BYTES + 32];
    read_by(&mut stream, &mut answer, deadline, options).ok()?;
    let (claimed, proof): (&[u8; CLAIM_BYTES], &[u8; 32]) =
        (answer[..CLAIM_BYTES].try_into().ok()?, answer[CLAIM_BYTES..].try_into().ok()?);
    let claim = Claim::parse(claimed)?;
    let status = if !equal(proof, &hmac_sha256(&options.token, &[b"claim", &nonce, claimed])) {
        BAD_TOKEN
    } else if claim.attempt != options.attempt {
        BAD_ATTEMPT
    } else if claim.world as usize != options.world {
        BAD_WORLD
    } else if claim.called as usize != options.rank {
        BAD_RANK
    } else {
        return Some((stream, claim));
    };
    let _ = decide(&mut stream, options, &claim, status, deadline);
    None
}

/// Sends the verdict on a claim, with this side's proof.
fn decide(
    stream: &mut TcpStream,
    options: &SocketOptions,
    claim: &Claim,
    status: u8,
    deadline: Instant,
) -> std::io::Result<()> {
    let mut verdict = [0; VERDICT_BYTES];
    verdict[0] = status;
    // One that does not know the token learns nothing else.
    if status != BAD_TOKEN {
        verdict[1..9].copy_from_slice(&options.attempt.to_le_bytes());
        verdict[9..13].copy_from_slice(&(options.world as u32).to_le_bytes());
        let proof = hmac_sha256(&options.token, &[b"verdict", &verdict[..13], &claim.bytes()]);
        verdict[13..].copy_from_slice(&proof);
    }
    limit(stream, deadline)?;
    stream.write_all(&verdict)
}

/// Connects to rank `called` at `address`, trying until the deadline while nobody answers there.
fn call(
    called: usize,
    address: &str,
    options: &SocketOptions,
    deadline: Instant,
    listens: bool,
) -> Result<(TcpStream, Option<TcpListener>)> {
    let missing = |why: &str| ParallelError::Missing {
        operation: "connect",
        missing: vec![format!("rank {called} at {address} ({why})")],
        waited_ms: options.connect_ms_max,
    };
    let mut why = "no answer".to_owned();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if options.is_stopped() {
            return Err(ParallelError::Stopped { operation: "connect" });
        }
        if left.is_zero() {
            return Err(missing(&why));
        }
        let found = address.to_socket_addrs().map(|mut found| found.next());
        let tried = match found {
            Ok(Some(found)) => TcpStream::connect_timeout(&found, left.min(ANSWER_MAX)),
            Ok(None) => Err(std::io::Error::other("the name has no address")),
            Err(error) => Err(error),
        };
        match tried.and_then(|stream| introduce(stream, called, options, deadline, listens)) {
            Ok(Verdict::Welcome(stream, listener)) => return Ok((stream, listener)),
            // A leftover of an earlier attempt may still hold the address.
            Ok(Verdict::Refused { reason, passes: true }) => why = reason,
            Ok(Verdict::Refused { reason, .. }) => {
                return Err(ParallelError::Refused { rank: called, address: address.into(), reason });
            }
            Err(error) => why = error.to_string(),
        }
        std::thread::sleep(POLL.min(left) * 4);
    }
}

enum Verdict {
    Welcome(TcpStream, Option<TcpListener>),
    Refused { reason: String, passes: bool },
}

/// Says to `called` what this rank is, and hears whether it is taken.
fn introduce(
    mut stream: TcpStream,
    called: usize,
    options: &SocketOptions,
    deadline: Instant,
    listens: bool,
) -> std::io::Result<Verdict> {
    let mut challenge = [0; CHALLENGE_BYTES];
    read_by(&mut stream, &mut challenge, deadline.min(Instant::now() + ANSWER_MAX), options)?;
    limit(&stream, deadline)?;
    if challenge[..8] != MAGIC {
        return Ok(Verdict::Refused { reason: "what listens there is no rank of a group".into(), passes: false });
    }
    // Bound to the address by which the group is reached, not to every one that this machine has.
    let listener = match listens {
        true => Some(TcpListener::bind(SocketAddr::new(stream.local_addr()?.ip(), 0))?),
        false => None,
    };
    let port = listener.as_ref().map(|listener| listener.local_addr()).transpose()?.map_or(0, |at| at.port());
    let claim = Claim {
        attempt: options.attempt,
        rank: options.rank as u32,
        called: called as u32,
        world: options.world as u32,
        port,
        nonce: nonce().map_err(|error| std::io::Error::other(error.to_string()))?,
    };
    let claimed = claim.bytes();
    let proof = hmac_sha256(&options.token, &[b"claim", &challenge[8..], &claimed]);
    stream.write_all(&[&claimed[..], &proof].concat())?;
    let mut verdict = [0; VERDICT_BYTES];
    read_by(&mut stream, &mut verdict, deadline, options)?;
    let mut theirs = [0; 32];
    theirs.copy_from_slice(&verdict[13..]);
    let refused = |reason: String, passes| Ok(Verdict::Refused { reason, passes });
    if verdict[0] == BAD_TOKEN {
        return refused("it has another token".into(), false);
    }
    if !equal(&theirs, &hmac_sha256(&options.token, &[b"verdict", &verdict[..13], &claimed])) {
        return refused("it does not know the token".into(), false);
    }
    let mut attempt = [0; 8];
    attempt.copy_from_slice(&verdict[1..9]);
    let attempt = u64::from_le_bytes(attempt);
    let world = u32::from_le_bytes([verdict[9], verdict[10], verdict[11], verdict[12]]);
    match verdict[0] {
        WELCOME => Ok(Verdict::Welcome(stream, listener)),
        BAD_ATTEMPT => {
            let reason = format!("the group is at attempt {attempt}, this rank at attempt {}", options.attempt);
            refused(reason, attempt < options.attempt)
        }
        BAD_WORLD => refused(format!("the group has {world} ranks, not {}", options.world), false),
        BAD_RANK => refused(format!("it does not wait for rank {}", options.rank), false),
        TAKEN => refused(format!("rank {} is there already", options.rank), false),
        other => refused(format!("unknown answer {other}"), false),
    }
}

/// A connection to rank 0 that has passed the handshake, for tests that then misbehave.
#[cfg(test)]
pub(super) fn raw_member(address: &str, options: &SocketOptions) -> TcpStream {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut stream = call(0, address, options, deadline, true).unwrap().0;
    let mut table = vec![0; options.world * ADDRESS_BYTES];
    read_by(&mut stream, &mut table, deadline, options).unwrap();
    stream
}
