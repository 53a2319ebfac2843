//! A group of ranks in several processes, seen from one of them.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::{Alarm, Span, of_processes};
use crate::collective::{check_all_to_all, check_bytes, check_parts, check_peer, check_root, larger};
use crate::sockets::{PART_VALUES_MAX, PARTS_AHEAD};
use crate::threads::{Call, Post, ThreadRank};
use crate::{Collective, ParallelError, Result, SocketGroup};

/// Sums of at most so many values go to all processes as they are; longer ones pass through them.
const SMALL_VALUES_MAX: usize = 4096;
/// Values of one message between two ranks.
const MESSAGE_VALUES_MAX: usize = 1 << 32;
/// How often who waits for another reader of a connection looks by itself.
const LOOK: Duration = Duration::from_millis(20);

type Join = fn(f32, f32) -> f32;

fn add(a: f32, b: f32) -> f32 {
    a + b
}

/// The processes of one group, as its ranks in this process share it.
pub(super) struct Between {
    /// One rank a process.
    pub group: SocketGroup,
    processes: Vec<usize>,
    /// The group's ranks in each process, and the place of the first of them in the group.
    counts: Vec<usize>,
    starts: Vec<usize>,
    per_node: usize,
    alarm: Arc<Alarm>,
    mail: Mail,
}

/// Messages between single ranks, which share the connections of their processes.
struct Mail {
    /// By sender and receiver, as places in the group.
    came: Mutex<HashMap<(usize, usize), VecDeque<Vec<f32>>>>,
    changed: Condvar,
    /// By process; a message is two pieces that nothing may come between.
    sending: Vec<Mutex<()>>,
    receiving: Vec<Mutex<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Between {
    pub fn new(group: SocketGroup, span: &Span, per_node: usize, alarm: Arc<Alarm>) -> Between {
        debug_assert_eq!(span.counts.iter().sum::<usize>(), span.members.len(), "{:?}", span.sub);
        let starts = span.counts.iter().scan(0, |next, count| {
            *next += count;
            Some(*next - count)
        });
        let locks = || span.processes.iter().map(|_| Mutex::new(())).collect();
        Between {
            group,
            processes: span.processes.clone(),
            starts: starts.collect(),
            counts: span.counts.clone(),
            per_node,
            alarm,
            mail: Mail { came: Mutex::default(), changed: Condvar::new(), sending: locks(), receiving: locks() },
        }
    }

    pub fn lost(&self) -> Option<ParallelError> {
        self.group.lost().map(|error| self.named(error))
    }

    /// An error in the words of the whole replica.
    fn named(&self, error: ParallelError) -> ParallelError {
        if let (ParallelError::Stopped { .. }, Some(why)) = (&error, self.alarm.why()) {
            return why;
        }
        of_processes(error, |place| {
            let process = self.processes.get(place).copied().unwrap_or(place);
            (process, (process * self.per_node, (process + 1) * self.per_node - 1))
        })
    }

    fn me(&self) -> usize {
        self.group.rank()
    }

    fn most(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(1)
    }

    fn world(&self) -> usize {
        self.counts.iter().sum()
    }

    /// The process of a rank, and the rank's place among those of it.
    fn home(&self, rank: usize) -> (usize, usize) {
        let process = self.starts.iter().rposition(|start| *start <= rank).unwrap_or(0);
        (process, rank - self.starts[process])
    }

    /// All ranks' values, from those of this process's ranks, which are `part` each.
    fn gather(&self, posted: &[Post], part: usize) -> Result<Vec<f32>> {
        let most = self.most() * part;
        let mut mine = Vec::with_capacity(most);
        posted.iter().for_each(|post| mine.extend_from_slice(post.values()));
        mine.resize(most, 0.0);
        let mut came = vec![0.0; most * self.counts.len()];
        self.group.all_gather(&mine, &mut came)?;
        // Processes with fewer ranks have filled up.
        let mut all = Vec::with_capacity(self.world() * part);
        for (process, count) in self.counts.iter().enumerate() {
            all.extend_from_slice(&came[process * most..][..count * part]);
        }
        Ok(all)
    }

    /// Sums in the order of the ranks: a running sum goes from process to process, each adds its ranks' values, and the last
    /// one sends every process the part of it that `owned` says. Parts of all processes follow each other. Gives this one's.
    fn fold(&self, posted: &[Post], join: Join, owned: impl Fn(usize) -> Range<usize>) -> Result<Vec<f32>> {
        let (me, last) = (self.me(), self.counts.len() - 1);
        let pieces: Vec<(Range<usize>, usize)> = (0..=last)
            .flat_map(|owner| {
                let Range { start, end } = owned(owner);
                (start..end).step_by(PART_VALUES_MAX).map(move |at| (at..(at + PART_VALUES_MAX).min(end), owner))
            })
            .collect();
        let mut mine = Vec::with_capacity(owned(me).len());
        let mut running = Vec::new();
        for step in 0..pieces.len() + PARTS_AHEAD {
            if let Some((range, owner)) = pieces.get(step) {
                running.clear();
                running.resize(range.len(), 0.0);
                if me > 0 {
                    self.group.recv_part(me - 1, &mut running)?;
                }
                for (place, post) in posted.iter().enumerate() {
                    let values = &post.values()[range.clone()];
                    match (me, place) {
                        (0, 0) => running.copy_from_slice(values),
                        _ => running.iter_mut().zip(values).for_each(|(total, value)| *total = join(*total, *value)),
                    }
                }
                match (me == last, *owner == me) {
                    (false, _) => self.group.send_part(me + 1, &running)?,
                    (true, true) => mine.extend_from_slice(&running),
                    (true, false) => self.group.send_part(*owner, &running)?,
                }
            }
            // What comes back is taken on the way, so that it does not pile up.
            let back = step.checked_sub(PARTS_AHEAD).and_then(|back| pieces.get(back));
            if let Some((range, _)) = back.filter(|(_, owner)| *owner == me && me < last) {
                running.clear();
                running.resize(range.len(), 0.0);
                self.group.recv_part(last, &mut running)?;
                mine.extend_from_slice(&running);
            }
        }
        Ok(mine)
    }

    fn reduce(&self, posted: &[Post], len: usize, join: Join) -> Result<Vec<f32>> {
        if len <= SMALL_VALUES_MAX {
            let all = self.gather(posted, len)?;
            let mut total = all[..len].to_vec();
            for values in all.chunks_exact(len.max(1)).skip(1) {
                total.iter_mut().zip(values).for_each(|(total, value)| *total = join(*total, *value));
            }
            return Ok(total);
        }
        let part = len.div_ceil(self.counts.len());
        let mut mine = self.fold(posted, join, |process| (process * part).min(len)..((process + 1) * part).min(len))?;
        mine.resize(part, 0.0);
        let mut all = vec![0.0; part * self.counts.len()];
        self.group.all_gather(&mine, &mut all)?;
        all.truncate(len);
        Ok(all)
    }

    /// For each rank of this process in order, what all ranks have sent to it, `part` each.
    fn all_to_all(&self, posted: &[Post], part: usize) -> Result<Vec<f32>> {
        let (most, me) = (self.most(), self.me());
        let block = most * most * part;
        let mut send = vec![0.0; block * self.counts.len()];
        for (process, count) in self.counts.iter().enumerate() {
            for (from, post) in posted.iter().enumerate() {
                let whole = &post.values()[self.starts[process] * part..][..count * part];
                send[process * block + from * most * part..][..count * part].copy_from_slice(whole);
            }
        }
        let mut came = vec![0.0; send.len()];
        self.group.all_to_all(&send, &mut came)?;
        let mut all = Vec::with_capacity(self.counts[me] * self.world() * part);
        for to in 0..self.counts[me] {
            for (process, count) in self.counts.iter().enumerate() {
                for from in 0..*count {
                    all.extend_from_slice(&came[process * block + (from * most + to) * part..][..part]);
                }
            }
        }
        Ok(all)
    }

    /// All ranks' bytes behind each other, each after its length.
    fn gather_bytes(&self, posted: &[Post], bytes_max: usize) -> Result<Vec<u8>> {
        let mut mine = Vec::new();
        for post in posted {
            mine.extend_from_slice(&(post.bytes().len() as u64).to_le_bytes());
            mine.extend_from_slice(post.bytes());
        }
        let most = bytes_max.saturating_add(8).saturating_mul(self.most());
        Ok(self.group.all_gather_bytes(&mine, most)?.concat())
    }

    /// Sends from a rank of this process to one of another.
    fn send(&self, from: usize, to: usize, values: &[f32]) -> Result<()> {
        let (process, _) = self.home(to);
        let _whole = lock(&self.mail.sending[process]);
        self.group.send(process, &Envelope { from, to, len: values.len() }.values())?;
        self.group.send(process, values)
    }

    /// Waits for what a rank of another process sends to one of this. Whoever waits reads for the others, too.
    fn recv(&self, from: usize, to: usize, wait_max: Duration) -> Result<Vec<f32>> {
        let (process, _) = self.home(from);
        let begun = Instant::now();
        loop {
            if let Some(values) = lock(&self.mail.came).get_mut(&(from, to)).and_then(VecDeque::pop_front) {
                return Ok(values);
            }
            let _reading = match self.mail.receiving[process].try_lock() {
                Ok(reading) => reading,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if begun.elapsed() < wait_max => {
                    let came = lock(&self.mail.came);
                    drop(self.mail.changed.wait_timeout(came, LOOK));
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    let missing = vec![format!("rank {process}")];
                    let waited_ms = wait_max.as_millis() as u64;
                    return Err(ParallelError::Missing { operation: "recv", missing, waited_ms });
                }
            };
            // It may have come while nobody held the lock.
            if let Some(values) = lock(&self.mail.came).get_mut(&(from, to)).and_then(VecDeque::pop_front) {
                return Ok(values);
            }
            let mut head = [0.0; Envelope::VALUES];
            self.group.recv(process, &mut head)?;
            let envelope = Envelope::read(&head).filter(|e| e.len <= MESSAGE_VALUES_MAX).ok_or_else(|| {
                let reason = "a message without a sender".to_owned();
                ParallelError::Lost { operation: "recv", rank: process, address: String::new(), reason }
            })?;
            let mut values = vec![0.0; envelope.len];
            self.group.recv(process, &mut values)?;
            lock(&self.mail.came).entry((envelope.from, envelope.to)).or_default().push_back(values);
            self.mail.changed.notify_all();
        }
    }
}

/// Whose a message between two ranks is, in numbers that floats hold exactly.
struct Envelope {
    from: usize,
    to: usize,
    len: usize,
}

impl Envelope {
    const VALUES: usize = 5;

    fn values(&self) -> [f32; Envelope::VALUES] {
        let digit = |at: u32| (self.len >> (16 * at) & 0xffff) as f32;
        [self.from as f32, self.to as f32, digit(0), digit(1), digit(2)]
    }

    fn read(values: &[f32; Envelope::VALUES]) -> Option<Envelope> {
        let whole = |value: f32| ((0.0..=65535.0).contains(&value) && value.fract() == 0.0).then_some(value as usize);
        let [from, to, low, middle, high] = *values;
        let len = whole(low)? | whole(middle)? << 16 | whole(high)? << 32;
        Some(Envelope { from: whole(from)?, to: whole(to)?, len })
    }
}

/// A rank of a group over several processes.
pub(super) struct NodeRank {
    local: ThreadRank,
    between: Arc<Between>,
}

impl NodeRank {
    pub fn new(local: ThreadRank, between: Arc<Between>) -> NodeRank {
        NodeRank { local, between }
    }

    /// The ranks of this process bring something, the first of them does `work` with it all, and all get what came of it.
    fn together(&self, call: Call, mine: Post, work: impl FnOnce(&[Post]) -> Result<Post>) -> Result<Post> {
        let posted = self.local.exchange(call, mine)?;
        let made = match self.local.rank() {
            0 => work(&posted).map_err(|error| self.failed(error))?,
            _ => Post::nothing(),
        };
        drop(posted);
        let made = self.local.exchange(Call { operation: call.operation, len: call.len, root: call.root }, made)?;
        Ok(made[0].clone())
    }

    fn values(&self, call: Call, mine: &[f32], work: impl FnOnce(&[Post]) -> Result<Vec<f32>>) -> Result<Post> {
        self.together(call, Post::of(mine.to_vec()), |posted| work(posted).map(Post::of))
    }

    /// Tells the other ranks of this process; those of the other processes hear of it by the watching thread.
    fn failed(&self, error: ParallelError) -> ParallelError {
        let error = self.between.named(error);
        self.local.fail(error.clone());
        error
    }

    fn reduce(&self, operation: &'static str, values: &mut [f32], join: Join) -> Result<()> {
        let len = values.len();
        let call = Call { operation, len, root: None };
        let total = self.values(call, values, |posted| self.between.reduce(posted, len, join))?;
        values.copy_from_slice(total.values());
        Ok(())
    }
}

impl Collective for NodeRank {
    fn rank(&self) -> usize {
        self.between.starts[self.between.me()] + self.local.rank()
    }

    fn world(&self) -> usize {
        self.between.world()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        self.reduce("all_reduce_sum", values, add)
    }

    fn all_reduce_max(&self, values: &mut [f32]) -> Result<()> {
        self.reduce("all_reduce_max", values, larger)
    }

    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> Result<()> {
        let call = Call { operation: "all_gather", len: mine.len(), root: None };
        check_parts(call.operation, mine.len(), all.len(), self.world())?;
        let came = self.values(call, mine, |posted| self.between.gather(posted, mine.len()))?;
        all.copy_from_slice(came.values());
        Ok(())
    }

    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()> {
        let call = Call { operation: "reduce_scatter_sum", len: all.len(), root: None };
        check_parts(call.operation, mine.len(), all.len(), self.world())?;
        let (part, between) = (mine.len(), &*self.between);
        let owned = |process: usize| {
            let start = between.starts[process] * part;
            start..start + between.counts[process] * part
        };
        let came = self.values(call, all, |posted| between.fold(posted, add, owned))?;
        mine.copy_from_slice(&came.values()[self.local.rank() * part..][..part]);
        Ok(())
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        check_root(root, self.world())?;
        let call = Call { operation: "broadcast", len: values.len(), root: Some(root) };
        let (process, place) = self.between.home(root);
        let mine: &[f32] = if root == self.rank() { values } else { &[] };
        let len = values.len();
        let came = self.values(call, mine, |posted| {
            let mut sent = vec![0.0; len];
            if process == self.between.me() {
                sent.copy_from_slice(posted[place].values());
            }
            self.between.group.broadcast(process, &mut sent)?;
            Ok(sent)
        })?;
        values.copy_from_slice(came.values());
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let call = Call { operation: "barrier", len: 0, root: None };
        self.values(call, &[], |_| self.between.group.barrier().map(|()| Vec::new())).map(drop)
    }

    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> Result<()> {
        let part = check_all_to_all(send.len(), received.len(), self.world())?;
        let call = Call { operation: "all_to_all", len: send.len(), root: None };
        let came = self.values(call, send, |posted| self.between.all_to_all(posted, part))?;
        received.copy_from_slice(&came.values()[self.local.rank() * send.len()..][..send.len()]);
        Ok(())
    }

    fn send(&self, to: usize, values: &[f32]) -> Result<()> {
        check_peer(to, self.rank(), self.world())?;
        let (process, place) = self.between.home(to);
        if process == self.between.me() {
            return self.local.send(place, values);
        }
        self.between.send(self.rank(), to, values).map_err(|error| self.failed(error))
    }

    fn recv(&self, from: usize, values: &mut [f32]) -> Result<()> {
        check_peer(from, self.rank(), self.world())?;
        let (process, place) = self.between.home(from);
        if process == self.between.me() {
            return self.local.recv(place, values);
        }
        let wait_max = Duration::from_millis(self.local.shared().wait_ms_max());
        let came = self.between.recv(from, self.rank(), wait_max).map_err(|error| self.failed(error))?;
        if came.len() != values.len() {
            let error = ParallelError::BadLength { operation: "recv", given: values.len(), expected: came.len() };
            return Err(self.failed(error));
        }
        values.copy_from_slice(&came);
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        let operation = "all_gather_bytes";
        check_bytes(operation, self.rank(), mine.len(), bytes_max).map_err(|error| self.failed(error))?;
        let call = Call { operation, len: bytes_max, root: None };
        let post = Post::Bytes(Arc::new(mine.to_vec()));
        let came = self
            .together(call, post, |posted| Ok(Post::Bytes(Arc::new(self.between.gather_bytes(posted, bytes_max)?))))?;
        let mut rest = came.bytes();
        let mut all = Vec::with_capacity(self.world());
        while let Some((head, tail)) = rest.split_first_chunk::<8>() {
            let len = usize::try_from(u64::from_le_bytes(*head)).unwrap_or(usize::MAX).min(tail.len());
            check_bytes(operation, all.len(), len, bytes_max).map_err(|error| self.failed(error))?;
            all.push(tail[..len].to_vec());
            rest = &tail[len..];
        }
        if all.len() != self.world() {
            let error = ParallelError::BadLength { operation, given: all.len(), expected: self.world() };
            return Err(self.failed(error));
        }
        Ok(all)
    }
}
