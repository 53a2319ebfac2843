//! The connections of a rank: a thread reads each, so that a peer's death is seen while this rank does something else.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frame::{CHUNK_BYTES_MAX, HEADER_BYTES, Header, Operation};
use super::is_set;
use crate::{ParallelError, Result};

/// Frames of collectives that may wait to be taken; the ranks go in lockstep, so that two are enough.
const FRAMES_MAX: usize = 8;

/// Frames of messages between two ranks that may wait to be received: 1 GiB. Pipeline stages send to each other before either
/// receives, so that what one step sends must fit.
const MAIL_FRAMES_MAX: usize = 1024;

/// Frames of sums that may wait; more than [`super::PARTS_AHEAD`], so that nobody who sums waits for a reader.
const PARTS_MAX: usize = 4 * super::PARTS_AHEAD;

/// How often who is blocked looks at the state of the group, and whether to stop.
const POLL: Duration = Duration::from_millis(50);

/// The most bytes of a reason that a failed rank sends.
const REASON_BYTES_MAX: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Queue {
    Collective,
    Mail,
    Parts,
}

impl Queue {
    fn of(operation: Operation) -> Queue {
        match operation {
            Operation::Message => Queue::Mail,
            Operation::Part => Queue::Parts,
            _ => Queue::Collective,
        }
    }

    /// Frames that may wait in it.
    fn frames_max(self) -> usize {
        match self {
            Queue::Collective => FRAMES_MAX,
            Queue::Mail => MAIL_FRAMES_MAX,
            Queue::Parts => PARTS_MAX,
        }
    }
}

/// The connections of a rank, by rank.
pub(super) struct Links {
    peers: Vec<Option<Peer>>,
    shared: Arc<Shared>,
    /// Ends waits once it is set.
    stop: Option<Arc<AtomicBool>>,
}

struct Peer {
    address: SocketAddr,
    /// Held for a whole frame. None once a frame was broken off: nothing more can be written after half a frame.
    writer: Mutex<Option<TcpStream>>,
    /// For shutting down while the writer is in use.
    stream: TcpStream,
    reader: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    inboxes: Vec<Inbox>,
    /// The error of this rank's own that ended the group.
    broken: Option<ParallelError>,
    closed: bool,
}

#[derive(Default)]
struct Inbox {
    collective: VecDeque<(Header, Vec<u8>)>,
    mail: VecDeque<(Header, Vec<u8>)>,
    parts: VecDeque<(Header, Vec<u8>)>,
    gone: Option<Gone>,
}

impl Inbox {
    fn of(&mut self, queue: Queue) -> &mut VecDeque<(Header, Vec<u8>)> {
        match queue {
            Queue::Collective => &mut self.collective,
            Queue::Mail => &mut self.mail,
            Queue::Parts => &mut self.parts,
        }
    }
}

/// Why nothing more comes from a rank.
#[derive(Clone)]
enum Gone {
    Lost(String),
    Aborted(String),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Links {
    /// Takes over connected streams, by rank; none at this rank's own place.
    pub(super) fn new(streams: Vec<Option<TcpStream>>, stop: Option<Arc<AtomicBool>>) -> Result<Links> {
        let inboxes = streams.iter().map(|_| Inbox::default()).collect();
        let state = Mutex::new(State { inboxes, broken: None, closed: false });
        let shared = Arc::new(Shared { state, changed: Condvar::new() });
        let mut links = Links { peers: Vec::new(), shared: shared.clone(), stop };
        for (rank, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else {
                links.peers.push(None);
                continue;
            };
            let opened = || -> std::io::Result<Peer> {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(Some(POLL))?;
                let (reading, address, shared) = (stream.try_clone()?, stream.peer_addr()?, shared.clone());
                let writer = Mutex::new(Some(stream.try_clone()?));
                let name = format!("group-rank-{rank}");
                let reader = std::thread::Builder::new().name(name).spawn(move || read_all(rank, reading, &shared))?;
                Ok(Peer { address, writer, stream, reader: Some(reader) })
            };
            let peer = opened().map_err(|error| ParallelError::Lost {
                operation: "connect",
                rank,
                address: "its connection".into(),
                reason: error.to_string(),
            })?;
            links.peers.push(Some(peer));
        }
        Ok(links)
    }

    pub(super) fn address_of(&self, rank: usize) -> Option<SocketAddr> {
        Some(self.peers.get(rank)?.as_ref()?.address)
    }

    /// This machine's address on the connection to another rank.
    pub(super) fn own_ip(&self, rank: usize) -> Option<std::net::IpAddr> {
        Some(self.peers.get(rank)?.as_ref()?.stream.local_addr().ok()?.ip())
    }

    /// Why nothing more comes from some rank, if that is so.
    pub(super) fn lost(&self) -> Option<ParallelError> {
        let gone = |(rank, inbox): (usize, &Inbox)| Some((rank, inbox.gone.clone()?));
        let (rank, gone) = self.shared.lock().inboxes.iter().enumerate().find_map(gone)?;
        Some(self.gone("watch", rank, gone))
    }

    fn named(&self, rank: usize) -> String {
        self.address_of(rank).map_or_else(String::new, |address| address.to_string())
    }

    /// Fails when the group has failed before.
    pub(super) fn healthy(&self, operation: &'static str) -> Result<()> {
        match &self.shared.lock().broken {
            None => Ok(()),
            Some(ParallelError::Broken { rank, reason, .. }) => {
                Err(ParallelError::Broken { operation, rank: *rank, reason: reason.clone() })
            }
            Some(error) => Err(error.clone()),
        }
    }

    fn gone(&self, operation: &'static str, rank: usize, gone: Gone) -> ParallelError {
        match gone {
            Gone::Lost(reason) => ParallelError::Lost { operation, rank, address: self.named(rank), reason },
            Gone::Aborted(reason) => ParallelError::Broken { operation, rank, reason },
        }
    }

    /// Writes a frame to a rank. The deadline is counted from the last byte that went out.
    pub(super) fn write(&self, rank: usize, operation: &'static str, frame: &[u8], wait_max: Duration) -> Result<()> {
        let Some(peer) = self.peers.get(rank).and_then(Option::as_ref) else {
            return Err(ParallelError::NoSuchRank { rank, world: self.peers.len() });
        };
        let mut writer = peer.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let lost = |reason: String| self.gone(operation, rank, self.gone_of(rank).unwrap_or(Gone::Lost(reason)));
        let Some(mut stream) = writer.take() else {
            return Err(lost("the connection was broken off".into()));
        };
        let (mut sent, mut progress) = (0, Instant::now());
        while sent < frame.len() {
            match stream.write(&frame[sent..]) {
                Ok(0) => return Err(lost("the connection takes nothing".into())),
                Ok(bytes) => (sent, progress) = (sent + bytes, Instant::now()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if let Some(gone) = self.gone_of(rank) {
                        return Err(self.gone(operation, rank, gone));
                    }
                    if is_set(self.stop.as_ref()) {
                        return Err(ParallelError::Stopped { operation });
                    }
                    if progress.elapsed() >= wait_max {
                        return Err(self.missing(operation, &[rank], wait_max));
                    }
                }
                Err(error) => return Err(lost(error.to_string())),
            }
        }
        *writer = Some(stream);
        Ok(())
    }

    fn gone_of(&self, rank: usize) -> Option<Gone> {
        self.shared.lock().inboxes[rank].gone.clone()
    }

    fn missing(&self, operation: &'static str, ranks: &[usize], waited: Duration) -> ParallelError {
        let missing = ranks.iter().map(|rank| format!("rank {rank} at {}", self.named(*rank))).collect();
        ParallelError::Missing { operation, missing, waited_ms: waited.as_millis() as u64 }
    }

    /// Takes the next frame of each of `expected`; its bytes go to the rank's place in `came`.
    pub(super) fn collect(
        &self,
        queue: Queue,
        me: usize,
        expected: &[(usize, Header)],
        wait_max: Duration,
        came: &mut [Vec<u8>],
    ) -> Result<()> {
        let mut progress = Instant::now();
        let mut pending: Vec<&(usize, Header)> = expected.iter().collect();
        let mut state = self.shared.lock();
        while !pending.is_empty() {
            let before = pending.len();
            let mut failed = None;
            pending.retain(|(rank, header)| {
                let inbox = &mut state.inboxes[*rank];
                match inbox.of(queue).pop_front() {
                    Some((got, bytes)) if got == *header => {
                        came[*rank] = bytes;
                        false
                    }
                    Some((got, _)) => {
                        failed.get_or_insert_with(|| match &inbox.gone {
                            // What it was at no longer matters.
                            Some(gone @ Gone::Aborted(_)) => self.gone(header.operation.name(), *rank, gone.clone()),
                            _ => ParallelError::Disagreement {
                                rank: *rank,
                                called: got.to_string(),
                                other: me,
                                other_called: header.to_string(),
                            },
                        });
                        true
                    }
                    None => {
                        if let Some(gone) = &inbox.gone {
                            failed.get_or_insert_with(|| self.gone(header.operation.name(), *rank, gone.clone()));
                        }
                        true
                    }
                }
            });
            if let Some(error) = failed {
                return Err(error);
            }
            if pending.len() < before {
                progress = Instant::now();
                self.shared.changed.notify_all();
                continue;
            }
            let left = wait_max.saturating_sub(progress.elapsed());
            if left.is_zero() {
                let ranks: Vec<usize> = pending.iter().map(|(rank, _)| *rank).collect();
                return Err(self.missing(pending[0].1.operation.name(), &ranks, wait_max));
            }
            if is_set(self.stop.as_ref()) {
                return Err(ParallelError::Stopped { operation: pending[0].1.operation.name() });
            }
            let left = if self.stop.is_some() { left.min(POLL) } else { left };
            let woken = self.shared.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        Ok(())
    }

    /// Ends the group, and tells the other ranks why as far as they still listen.
    pub(super) fn abort(&self, me: usize, error: &ParallelError) {
        let (rank, mut reason) = match error {
            ParallelError::Broken { rank, reason, .. } => (*rank, reason.clone()),
            other => (me, other.to_string()),
        };
        {
            let mut state = self.shared.lock();
            if state.broken.is_some() {
                return;
            }
            let reason = reason.clone();
            state.broken = Some(ParallelError::Broken { operation: "abort", rank, reason });
        }
        while reason.len() > REASON_BYTES_MAX {
            reason.pop();
        }
        let header = Header { operation: Operation::Abort, root: Some(rank), sequence: 0, total: 0, len: reason.len() };
        let mut frame = Vec::new();
        header.start(&mut frame);
        frame.extend_from_slice(reason.as_bytes());
        for (rank, peer) in self.peers.iter().enumerate() {
            if let Some(peer) = peer {
                // A peer that does not read gets the end of the connection instead.
                let _ = self.write(rank, "abort", &frame, POLL);
                let _ = peer.stream.shutdown(Shutdown::Write);
            }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        for peer in self.peers.iter_mut().flatten() {
            let _ = peer.stream.shutdown(Shutdown::Both);
            if let Some(reader) = peer.reader.take() {
                let _ = reader.join();
            }
        }
    }
}

/// Reads frames of a rank into its inbox until the connection ends.
fn read_all(rank: usize, mut stream: TcpStream, shared: &Shared) {
    let gone = loop {
        match read_one(&mut stream) {
            Ok((header, bytes)) if header.operation == Operation::Abort => {
                break Gone::Aborted(String::from_utf8_lossy(&bytes).into_owned());
            }
            Ok((header, bytes)) => {
                let mut state = shared.lock();
                let queue = Queue::of(header.operation);
                while state.inboxes[rank].of(queue).len() >= queue.frames_max() && !state.closed {
                    state = shared.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
                }
                state.inboxes[rank].of(queue).push_back((header, bytes));
                drop(state);
                shared.changed.notify_all();
            }
            Err(reason) => break Gone::Lost(reason),
        }
    };
    shared.lock().inboxes[rank].gone.get_or_insert(gone);
    shared.changed.notify_all();
    let _ = stream.shutdown(Shutdown::Both);
}

fn read_one(stream: &mut TcpStream) -> std::result::Result<(Header, Vec<u8>), String> {
    let told = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => "the connection was closed".to_owned(),
        _ => error.to_string(),
    };
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).map_err(told)?;
    let header = Header::parse(&header)?;
    debug_assert!(header.len <= CHUNK_BYTES_MAX);
    let mut bytes = vec![0; header.len];
    stream.read_exact(&mut bytes).map_err(told)?;
    Ok((header, bytes))
}
