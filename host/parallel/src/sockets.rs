//! Collectives between processes, over TCP.
//!
//! Every two ranks have a connection. A sum is a reduce-scatter followed by an all-gather: rank r gets part r of every
//! rank's values, sums them in the order of the ranks and sends the sum to all. A rank thus moves 2·(n−1)/n of the buffer
//! each way, as in a ring, and in two steps instead of 2·(n−1); a ring would sum each part in another order, and a star
//! would move n−1 buffers through rank 0. So the sums are those of [`crate::ThreadGroup`], bit for bit.
//!
//! Buffers go in chunks, in lockstep: a rank sends chunk c to everybody and takes chunk c from everybody before it goes on.
//! No rank can be more than two chunks ahead of what another has taken, which fits the inbox, so writing never waits for
//! a reader that waits for a writer.

mod frame;
mod handshake;
mod hmac;
mod link;

use std::fmt;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::collective::{check_all_to_all, check_bytes, check_parts, check_peer, check_root, larger};
use crate::{Collective, ParallelError, Result};
use frame::{CHUNK_BYTES_MAX, Header, Operation};
pub(crate) use handshake::nonce;
use link::{Links, Queue};

/// Values of a part of a sum: those of a chunk.
pub(crate) const PART_VALUES_MAX: usize = CHUNK_BYTES_MAX / 4;

/// Parts of a sum through the processes that a process may be ahead of what has come back.
pub(crate) const PARTS_AHEAD: usize = 16;

/// Sums of more bytes are shared out among the ranks.
const SMALL_BYTES_MAX: usize = 16 * 1024;

/// How a process joins a group.
#[derive(Clone)]
pub struct SocketOptions {
    /// This process's rank.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// What all ranks know and nobody else; at least 16 bytes. It never goes over the wire.
    pub token: Vec<u8>,
    /// Which try at this group: ranks of another attempt are refused.
    pub attempt: u64,
    /// How long all ranks may take to come together.
    pub connect_ms_max: u64,
    /// How long a collective may wait without a chunk arriving or leaving.
    pub wait_ms_max: u64,
    /// Ends this rank's waits soon after somebody has set it.
    pub stop: Option<Arc<AtomicBool>>,
}

impl SocketOptions {
    fn is_stopped(&self) -> bool {
        is_set(self.stop.as_ref())
    }

    /// What a wait has ended with: if it was told to end, that is why.
    fn told(&self, error: ParallelError) -> ParallelError {
        if self.is_stopped() { ParallelError::Stopped { operation: "connect" } } else { error }
    }
}

fn is_set(stop: Option<&Arc<AtomicBool>>) -> bool {
    stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
}

impl fmt::Debug for SocketOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SocketOptions(rank {} of {}, attempt {})", self.rank, self.world, self.attempt)
    }
}

/// One rank of a group of processes. Dropping it closes its connections.
pub struct SocketGroup {
    rank: usize,
    world: usize,
    wait_max: Duration,
    links: Links,
    /// How many collectives this rank has begun. Held during a collective, so that a rank does one at a time.
    sequence: Mutex<u64>,
}

/// A collective as its ranks must agree on it.
#[derive(Clone, Copy)]
struct Call {
    operation: Operation,
    root: Option<usize>,
    /// Bytes that the ranks agree on.
    total: usize,
}

impl SocketGroup {
    /// Rank 0: waits on `listener` until all other ranks have come.
    ///
    /// # Errors
    /// Options that make no sense; [`ParallelError::Missing`] with the ranks that did not come; [`ParallelError::Stopped`].
    pub fn listen(listener: TcpListener, options: &SocketOptions) -> Result<SocketGroup> {
        SocketGroup::over(handshake::listen(listener, options).map_err(|error| options.told(error))?, options)
    }

    /// Any other rank: connects to rank 0 at `address` (host and port), which may come up later, and to the other ranks.
    ///
    /// # Errors
    /// Options that make no sense; [`ParallelError::Refused`] when rank 0 does not take this rank;
    /// [`ParallelError::Missing`] with the rank that did not answer and its address; [`ParallelError::Stopped`].
    pub fn connect(address: &str, options: &SocketOptions) -> Result<SocketGroup> {
        SocketGroup::over(handshake::connect(address, options).map_err(|error| options.told(error))?, options)
    }

    fn over(streams: Vec<Option<std::net::TcpStream>>, options: &SocketOptions) -> Result<SocketGroup> {
        Ok(SocketGroup {
            rank: options.rank,
            world: options.world,
            wait_max: Duration::from_millis(options.wait_ms_max),
            links: Links::new(streams, options.stop.clone())?,
            sequence: Mutex::new(0),
        })
    }

    /// The address of another rank; none for this rank itself.
    pub fn address_of(&self, rank: usize) -> Option<SocketAddr> {
        self.links.address_of(rank)
    }

    /// This machine's address on the connection to another rank, where others can reach it too.
    pub fn own_ip(&self, rank: usize) -> Option<IpAddr> {
        self.links.own_ip(rank)
    }

    /// Why the group cannot go on, if a rank has gone or given up; without waiting for anything.
    pub fn lost(&self) -> Option<ParallelError> {
        self.links.lost()
    }

    /// Ends the group, and tells the other ranks why.
    pub(crate) fn abort(&self, error: &ParallelError) {
        self.links.abort(self.rank, error);
    }

    /// Sends a part of a sum, of at most [`PART_VALUES_MAX`] values.
    pub(crate) fn send_part(&self, to: usize, values: &[f32]) -> Result<()> {
        self.post(Operation::Part, to, values)
    }

    /// Waits for a part of a sum.
    pub(crate) fn recv_part(&self, from: usize, values: &mut [f32]) -> Result<()> {
        self.fetch(Operation::Part, Queue::Parts, from, values)
    }

    fn post(&self, operation: Operation, to: usize, values: &[f32]) -> Result<()> {
        check_peer(to, self.rank, self.world)?;
        self.links.healthy("send")?;
        let (total, mut bytes) = (values.len() * 4, Vec::new());
        let mut chunks = values.chunks(CHUNK_BYTES_MAX / 4);
        let mut chunk = chunks.next().unwrap_or(&[]);
        loop {
            let header = Header { operation, root: None, sequence: 0, total: total as u64, len: chunk.len() * 4 };
            header.start(&mut bytes);
            append(&mut bytes, chunk);
            let sent = self.links.write(to, "send", &bytes, self.wait_max);
            sent.map_err(|error| self.failed(error))?;
            match chunks.next() {
                Some(next) => chunk = next,
                None => return Ok(()),
            }
        }
    }

    fn fetch(&self, operation: Operation, queue: Queue, from: usize, values: &mut [f32]) -> Result<()> {
        check_peer(from, self.rank, self.world)?;
        self.links.healthy("recv")?;
        let total = values.len() * 4;
        let mut came = vec![Vec::new(); self.world];
        let mut at = 0;
        loop {
            let len = (total - at).min(CHUNK_BYTES_MAX);
            let header = Header { operation, root: None, sequence: 0, total: total as u64, len };
            came[from].clear();
            let waited = self.links.collect(queue, self.rank, &[(from, header)], self.wait_max, &mut came);
            waited.map_err(|error| self.failed(error))?;
            put_floats(&mut values[at / 4..], &came[from]);
            at += len;
            if at >= total {
                return Ok(());
            }
        }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.rank;
        (0..self.world).filter(move |rank| *rank != me)
    }

    /// Lets the other ranks know of an error, unless it came from there, and returns it.
    fn failed(&self, error: ParallelError) -> ParallelError {
        self.links.abort(self.rank, &error);
        error
    }

    /// Moves bytes between ranks in chunks. `outgoing` and `incoming` say how many bytes go to and come from a rank, none
    /// where nothing does; `fill` appends the bytes of a range for a rank; `take` gets each chunk's place and, by rank, what
    /// came in.
    fn trade(
        &self,
        call: Call,
        outgoing: impl Fn(usize) -> Option<usize>,
        incoming: impl Fn(usize) -> Option<usize>,
        mut fill: impl FnMut(usize, std::ops::Range<usize>, &mut Vec<u8>),
        mut take: impl FnMut(usize, &[Vec<u8>]),
    ) -> Result<()> {
        let mut sequence = self.sequence.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.links.healthy(call.operation.name())?;
        *sequence += 1;
        // An operation without bytes still moves a chunk: the ranks wait for each other.
        let chunks = |len: Option<usize>| len.map_or(0, |len| len.div_ceil(CHUNK_BYTES_MAX).max(1));
        let range = |len: usize, chunk: usize| {
            let start = chunk * CHUNK_BYTES_MAX;
            start..(start + CHUNK_BYTES_MAX).min(len)
        };
        let steps = self.others().map(|rank| chunks(outgoing(rank)).max(chunks(incoming(rank)))).max().unwrap_or(0);
        let mut bytes = Vec::new();
        let mut came = vec![Vec::new(); self.world];
        for step in 0..steps {
            for rank in self.others() {
                if let Some(len) = outgoing(rank).filter(|len| step < chunks(Some(*len))) {
                    let range = range(len, step);
                    let header = Header {
                        operation: call.operation,
                        root: call.root,
                        sequence: *sequence,
                        total: call.total as u64,
                        len: range.len(),
                    };
                    header.start(&mut bytes);
                    fill(rank, range, &mut bytes);
                    let sent = self.links.write(rank, call.operation.name(), &bytes, self.wait_max);
                    sent.map_err(|error| self.failed(error))?;
                }
            }
            let expected: Vec<(usize, Header)> = self
                .others()
                .filter_map(|rank| {
                    let len = incoming(rank).filter(|len| step < chunks(Some(*len)))?;
                    let (operation, root) = (call.operation, call.root);
                    let len = range(len, step).len();
                    Some((rank, Header { operation, root, sequence: *sequence, total: call.total as u64, len }))
                })
                .collect();
            came.iter_mut().for_each(Vec::clear);
            let waited = self.links.collect(Queue::Collective, self.rank, &expected, self.wait_max, &mut came);
            waited.map_err(|error| self.failed(error))?;
            if !expected.is_empty() {
                take(step * CHUNK_BYTES_MAX, &came);
            }
        }
        Ok(())
    }

    /// Every rank gets all ranks' bytes; `len_of` tells their lengths, `put` where they go.
    fn gather(
        &self,
        call: Call,
        mine: &[u8],
        len_of: impl Fn(usize) -> usize,
        mut put: impl FnMut(usize, usize, &[u8]),
    ) -> Result<()> {
        let fill = |_: usize, range: std::ops::Range<usize>, bytes: &mut Vec<u8>| bytes.extend_from_slice(&mine[range]);
        self.trade(
            call,
            |_| Some(mine.len()),
            |rank| Some(len_of(rank)),
            fill,
            |at, came| {
                for (rank, bytes) in came.iter().enumerate() {
                    put(rank, at, bytes);
                }
            },
        )
    }

    /// Sums part r of all ranks' values at rank r; `range` tells the parts.
    fn reduce_parts(
        &self,
        call: Call,
        values: &[f32],
        range: impl Fn(usize) -> std::ops::Range<usize>,
        reduced: &mut [f32],
        join: fn(f32, f32) -> f32,
    ) -> Result<()> {
        let mine = &values[range(self.rank)];
        let len = mine.len() * 4;
        let fill = |rank: usize, bytes_at: std::ops::Range<usize>, bytes: &mut Vec<u8>| {
            append(bytes, &values[range(rank)][bytes_at.start / 4..bytes_at.end / 4]);
        };
        let take = |at: usize, came: &[Vec<u8>]| {
            let at = at / 4;
            let upto = (at + CHUNK_BYTES_MAX / 4).min(mine.len());
            for (rank, bytes) in came.iter().enumerate() {
                let total = &mut reduced[at..upto];
                match (rank == self.rank, rank) {
                    (true, 0) => total.copy_from_slice(&mine[at..upto]),
                    (true, _) => total.iter_mut().zip(&mine[at..upto]).for_each(|(t, v)| *t = join(*t, *v)),
                    (false, 0) => total.iter_mut().zip(floats(bytes)).for_each(|(t, v)| *t = v),
                    (false, _) => total.iter_mut().zip(floats(bytes)).for_each(|(t, v)| *t = join(*t, v)),
                }
            }
        };
        self.trade(call, |rank| Some(range(rank).len() * 4), |_| Some(len), fill, take)
    }

    fn reduce(&self, operation: Operation, values: &mut [f32], join: fn(f32, f32) -> f32) -> Result<()> {
        let (len, world) = (values.len(), self.world);
        let call = Call { operation, root: None, total: len * 4 };
        if world == 1 {
            return Ok(());
        }
        if len * 4 <= SMALL_BYTES_MAX {
            let mine = bytes_of(values);
            let rows = values.to_vec();
            let take = |_: usize, came: &[Vec<u8>]| {
                for (rank, bytes) in came.iter().enumerate() {
                    let of_rank = if rank == self.rank { rows.clone() } else { floats(bytes).collect() };
                    if rank == 0 {
                        values.copy_from_slice(&of_rank);
                    } else {
                        values.iter_mut().zip(of_rank).for_each(|(total, value)| *total = join(*total, value));
                    }
                }
            };
            let fill = |_: usize, at: std::ops::Range<usize>, bytes: &mut Vec<u8>| bytes.extend_from_slice(&mine[at]);
            return self.trade(call, |_| Some(len * 4), |_| Some(len * 4), fill, take);
        }
        let part = len.div_ceil(world);
        let range = |rank: usize| (rank * part).min(len)..((rank + 1) * part).min(len);
        let mut reduced = vec![0.0; range(self.rank).len()];
        self.reduce_parts(call, values, range, &mut reduced, join)?;
        values[range(self.rank)].copy_from_slice(&reduced);
        let mine = bytes_of(&reduced);
        self.gather(
            call,
            &mine,
            |rank| range(rank).len() * 4,
            |rank, at, bytes| {
                let to = range(rank).start + at / 4;
                put_floats(&mut values[to..], bytes);
            },
        )
    }
}

/// Appends the values' bytes, little-endian.
fn append(bytes: &mut Vec<u8>, values: &[f32]) {
    bytes.reserve(values.len() * 4);
    for value in values {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    append(&mut bytes, values);
    bytes
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Overwrites the first values; as many as there are bytes for.
fn put_floats(values: &mut [f32], bytes: &[u8]) {
    values.iter_mut().zip(floats(bytes)).for_each(|(place, value)| *place = value);
}

impl Collective for SocketGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        self.reduce(Operation::AllReduceSum, values, |a, b| a + b)
    }

    fn all_reduce_max(&self, values: &mut [f32]) -> Result<()> {
        self.reduce(Operation::AllReduceMax, values, larger)
    }

    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> Result<()> {
        check_parts("all_gather", mine.len(), all.len(), self.world)?;
        let part = mine.len();
        all[self.rank * part..][..part].copy_from_slice(mine);
        let call = Call { operation: Operation::AllGather, root: None, total: part * 4 };
        self.gather(
            call,
            &bytes_of(mine),
            |_| part * 4,
            |rank, at, bytes| {
                put_floats(&mut all[rank * part + at / 4..], bytes);
            },
        )
    }

    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()> {
        check_parts("reduce_scatter_sum", mine.len(), all.len(), self.world)?;
        if self.world == 1 {
            mine.copy_from_slice(all);
            return Ok(());
        }
        let part = mine.len();
        let call = Call { operation: Operation::ReduceScatterSum, root: None, total: all.len() * 4 };
        self.reduce_parts(call, all, |rank| rank * part..(rank + 1) * part, mine, |a, b| a + b)
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        check_root(root, self.world)?;
        let call = Call { operation: Operation::Broadcast, root: Some(root), total: values.len() * 4 };
        let len = values.len() * 4;
        let is_root = root == self.rank;
        let bytes = if is_root { bytes_of(values) } else { Vec::new() };
        self.trade(
            call,
            |_| is_root.then_some(len),
            |rank| (rank == root).then_some(len),
            |_, range, to| to.extend_from_slice(&bytes[range]),
            |at, came| put_floats(&mut values[at / 4..], &came[root]),
        )
    }

    fn barrier(&self) -> Result<()> {
        let call = Call { operation: Operation::Barrier, root: None, total: 0 };
        self.gather(call, &[], |_| 0, |_, _, _| ())
    }

    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> Result<()> {
        let part = check_all_to_all(send.len(), received.len(), self.world)?;
        let call = Call { operation: Operation::AllToAll, root: None, total: send.len() * 4 };
        let mine = self.rank * part..(self.rank + 1) * part;
        received[mine.clone()].copy_from_slice(&send[mine]);
        self.trade(
            call,
            |_| Some(part * 4),
            |_| Some(part * 4),
            |rank, at, bytes| append(bytes, &send[rank * part..][at.start / 4..at.end / 4]),
            |at, came| {
                for (rank, bytes) in came.iter().enumerate() {
                    put_floats(&mut received[rank * part + at / 4..], bytes);
                }
            },
        )
    }

    fn send(&self, to: usize, values: &[f32]) -> Result<()> {
        self.post(Operation::Message, to, values)
    }

    fn recv(&self, from: usize, values: &mut [f32]) -> Result<()> {
        self.fetch(Operation::Message, Queue::Mail, from, values)
    }
    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        let operation = "all_gather_bytes";
        check_bytes(operation, self.rank, mine.len(), bytes_max).map_err(|error| self.failed(error))?;
        let call = Call { operation: Operation::AllGatherBytes, root: None, total: bytes_max };
        let mut lens = vec![mine.len() as u64; self.world];
        let own = (mine.len() as u64).to_le_bytes();
        self.gather(
            call,
            &own,
            |_| own.len(),
            |rank, _, bytes| {
                if let Ok(bytes) = bytes.try_into() {
                    lens[rank] = u64::from_le_bytes(bytes);
                }
            },
        )?;
        for (rank, len) in lens.iter().enumerate() {
            let bytes = usize::try_from(*len).unwrap_or(usize::MAX);
            check_bytes(operation, rank, bytes, bytes_max).map_err(|error| self.failed(error))?;
        }
        let mut all: Vec<Vec<u8>> = vec![Vec::new(); self.world];
        all[self.rank] = mine.to_vec();
        self.gather(call, mine, |rank| lens[rank] as usize, |rank, _, bytes| all[rank].extend_from_slice(bytes))?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests;
