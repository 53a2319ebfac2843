//! Collectives between threads of one process.
//!
//! A round is an exchange: each rank posts what it brings; when all have posted, each takes all posts, without a copy; the
//! last to take them opens the next round. What comes of the posts each rank computes for itself, outside the lock and in
//! the order of the ranks. A long sum takes two rounds: each rank sums its part, then the parts are exchanged.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::collective::{check_all_to_all, check_bytes, check_parts, check_peer, check_root, larger};
use crate::{Collective, Mesh, ParallelError, Result, SubMesh};

/// Makes groups of ranks that are threads of one process.
#[derive(Debug)]
pub struct ThreadGroup;

impl ThreadGroup {
    /// The ranks of a group, in order; give each to its thread. A collective fails when a rank is `wait_ms_max` late.
    pub fn of(world: usize, wait_ms_max: u64) -> Vec<ThreadRank> {
        group((0..world).collect(), wait_ms_max)
    }

    /// The groups of a mesh: element r is rank r's handle in its own group. Errors name ranks by their number in the mesh.
    pub fn for_mesh(mesh: &Mesh, sub: SubMesh, wait_ms_max: u64) -> Vec<ThreadRank> {
        let mut ranks: Vec<(usize, ThreadRank)> = mesh
            .groups(sub)
            .into_iter()
            .flat_map(|members| members.clone().into_iter().zip(group(members, wait_ms_max)))
            .collect();
        ranks.sort_by_key(|(rank, _)| *rank);
        ranks.into_iter().map(|(_, handle)| handle).collect()
    }
}

/// A group whose ranks are called `names` in messages.
pub(crate) fn group(names: Vec<usize>, wait_ms_max: u64) -> Vec<ThreadRank> {
    let world = names.len();
    let state = State {
        round: 0,
        call: None,
        posted: vec![None; world],
        outcome: None,
        taken: vec![false; world],
        mail: HashMap::new(),
        gone: vec![None; world],
        broken: None,
    };
    let shared = Arc::new(Shared {
        names,
        wait_ms_max,
        state: Mutex::new(state),
        changed: Condvar::new(),
        siblings: OnceLock::new(),
    });
    (0..world).map(|rank| ThreadRank { rank, shared: shared.clone(), rounds: Mutex::new(0) }).collect()
}

/// One rank of a [`ThreadGroup`]. Dropping it tells the others that it will not come any more.
pub struct ThreadRank {
    rank: usize,
    shared: Arc<Shared>,
    /// How many rounds this rank has done. Held during a collective, so that a rank does one at a time.
    rounds: Mutex<u64>,
}

pub(crate) struct Shared {
    /// The ranks' numbers in messages.
    names: Vec<usize>,
    wait_ms_max: u64,
    state: Mutex<State>,
    changed: Condvar,
    /// Groups that fail when this one does.
    siblings: OnceLock<Vec<Weak<Shared>>>,
}

struct State {
    round: u64,
    /// Who called first in this round, and what.
    call: Option<(usize, Call)>,
    posted: Vec<Option<Post>>,
    outcome: Option<Arc<Vec<Post>>>,
    taken: Vec<bool>,
    /// What was sent from a rank to another and not yet received.
    mail: HashMap<(usize, usize), VecDeque<Vec<f32>>>,
    /// Ranks whose handle was dropped, and whether in a panic.
    gone: Vec<Option<bool>>,
    /// The name of who found out that the group has failed, and what it found.
    broken: Option<(usize, ParallelError)>,
}

/// What a rank brings to a round. The others read it where it is.
#[derive(Clone)]
pub(crate) enum Post {
    Values(Arc<Vec<f32>>),
    Bytes(Arc<Vec<u8>>),
}

impl Post {
    pub fn of(values: Vec<f32>) -> Post {
        Post::Values(Arc::new(values))
    }

    pub fn nothing() -> Post {
        Post::of(Vec::new())
    }

    pub fn values(&self) -> &[f32] {
        match self {
            Post::Values(values) => values,
            // The ranks of a round agree on its operation, and an operation brings one kind.
            Post::Bytes(_) => &[],
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Post::Bytes(bytes) => bytes,
            Post::Values(_) => &[],
        }
    }
}

/// Messages that may wait between two ranks before `send` does.
const MAIL_MAX: usize = 64;

/// Sums of more values are shared out among the ranks: each sums its part, in the order of the ranks.
const SMALL_VALUES_MAX: usize = 4096;

/// A collective as its ranks must agree on it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Call {
    pub operation: &'static str,
    /// Values that each rank brings.
    pub len: usize,
    pub root: Option<usize>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` of {} values", self.operation, self.len)?;
        if let Some(root) = self.root { write!(f, " from place {root}") } else { Ok(()) }
    }
}

impl fmt::Debug for ThreadRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ThreadRank({} of {:?})", self.rank, self.shared.names)
    }
}

impl ThreadRank {
    /// One round: brings `post`, and gets what all ranks brought, by rank.
    pub(crate) fn exchange(&self, call: Call, post: Post) -> Result<Arc<Vec<Post>>> {
        let mut rounds = self.rounds.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let begun = Instant::now();
        let shared = &*self.shared;
        let mut state = shared.lock();
        // The ranks may still be taking the outcome of the round before.
        while state.round < *rounds {
            let behind = |state: &State, rank: usize| !state.taken[rank];
            state = self.sleep(state, call.operation, begun, behind)?;
        }
        state.healthy(call.operation)?;
        let (first, agreed) = *state.call.get_or_insert((self.rank, call));
        if agreed != call {
            let error = ParallelError::Disagreement {
                rank: shared.names[self.rank],
                called: call.to_string(),
                other: shared.names[first],
                other_called: agreed.to_string(),
            };
            return Err(self.break_group(state, error));
        }
        state.posted[self.rank] = Some(post);
        if state.posted.iter().all(Option::is_some) {
            let posted: Vec<Post> = state.posted.iter_mut().filter_map(Option::take).collect();
            state.outcome = Some(Arc::new(posted));
            shared.changed.notify_all();
        }
        let outcome = loop {
            if let Some(outcome) = &state.outcome {
                break outcome.clone();
            }
            let missing = |state: &State, rank: usize| state.posted[rank].is_none();
            state = self.sleep(state, call.operation, begun, missing)?;
        };
        state.taken[self.rank] = true;
        if state.taken.iter().all(|taken| *taken) {
            state.open_next_round();
            shared.changed.notify_all();
        }
        *rounds += 1;
        Ok(outcome)
    }

    fn exchange_values(&self, call: Call, values: Vec<f32>) -> Result<Arc<Vec<Post>>> {
        self.exchange(call, Post::of(values))
    }

    /// Reduces `values` over the ranks, in their order. Of a long buffer each rank reduces its part only, so that the work
    /// of a rank does not grow with the number of ranks.
    fn reduce(&self, operation: &'static str, values: &mut [f32], join: fn(f32, f32) -> f32) -> Result<()> {
        let (len, world) = (values.len(), self.world());
        let call = Call { operation, len, root: None };
        let posted = self.exchange_values(call, values.to_vec())?;
        if len <= SMALL_VALUES_MAX {
            reduce_into(&posted, 0, values, join);
            return Ok(());
        }
        let part = len.div_ceil(world);
        let range = |rank: usize| (rank * part).min(len)..((rank + 1) * part).min(len);
        let mine = range(self.rank);
        let mut reduced = vec![0.0; mine.len()];
        reduce_into(&posted, mine.start, &mut reduced, join);
        drop(posted);
        let parts = self.exchange_values(call, reduced)?;
        for (rank, part) in parts.iter().enumerate() {
            values[range(rank)].copy_from_slice(part.values());
        }
        Ok(())
    }

    /// Lets the group and those that stand with it fail, for a reason that has nothing to do with a collective.
    pub(crate) fn fail(&self, error: ParallelError) {
        self.break_group(self.shared.lock(), error);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Sleeps until something changes. Fails when the group has failed, when a rank that is `waited_for` is gone, and at the
    /// deadline.
    fn sleep<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        operation: &'static str,
        begun: Instant,
        waited_for: impl Fn(&State, usize) -> bool,
    ) -> Result<MutexGuard<'a, State>> {
        let shared = &*self.shared;
        state.healthy(operation)?;
        let missing: Vec<usize> = (0..shared.names.len()).filter(|rank| waited_for(&state, *rank)).collect();
        if let Some((rank, panicked)) = missing.iter().find_map(|rank| Some((*rank, state.gone[*rank]?))) {
            let error = ParallelError::PeerGone { operation, rank: shared.names[rank], panicked };
            return Err(self.break_group(state, error));
        }
        let left = Duration::from_millis(shared.wait_ms_max).saturating_sub(begun.elapsed());
        if left.is_zero() {
            let missing = missing.into_iter().map(|rank| shared.names[rank]).collect();
            let error = ParallelError::TimedOut { operation, missing, waited_ms: shared.wait_ms_max };
            return Err(self.break_group(state, error));
        }
        let woken = shared.changed.wait_timeout(state, left);
        Ok(woken.unwrap_or_else(|poisoned| poisoned.into_inner()).0)
    }

    /// Lets the other ranks know, and returns the error.
    fn break_group(&self, state: MutexGuard<'_, State>, error: ParallelError) -> ParallelError {
        drop(state);
        let name = self.shared.names[self.rank];
        self.shared.set_broken(name, &error);
        for sibling in self.shared.siblings.get().into_iter().flatten().filter_map(Weak::upgrade) {
            sibling.set_broken(name, &error);
        }
        error
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A rank that panics inside a round leaves its post missing, and its handle's drop names it.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn set_broken(&self, name: usize, error: &ParallelError) {
        self.lock().broken.get_or_insert_with(|| (name, error.clone()));
        self.changed.notify_all();
    }

    /// What has ended the group, if something has.
    pub(crate) fn broken(&self) -> Option<ParallelError> {
        self.lock().broken.as_ref().map(|(_, error)| error.clone())
    }

    /// Lets the group and those that stand with it fail, as `name` has found out.
    pub(crate) fn fail_all(&self, name: usize, error: &ParallelError) {
        self.set_broken(name, error);
        for sibling in self.siblings.get().into_iter().flatten().filter_map(Weak::upgrade) {
            sibling.set_broken(name, error);
        }
    }

    pub(crate) fn wait_ms_max(&self) -> u64 {
        self.wait_ms_max
    }

    /// Groups that fail when this one does; the first call counts.
    pub(crate) fn stand_with(&self, siblings: Vec<Weak<Shared>>) {
        self.siblings.get_or_init(|| siblings);
    }
}

impl State {
    fn healthy(&self, operation: &'static str) -> Result<()> {
        match &self.broken {
            None => Ok(()),
            Some((rank, error)) => Err(ParallelError::Broken { operation, rank: *rank, reason: error.to_string() }),
        }
    }

    fn open_next_round(&mut self) {
        self.round += 1;
        self.call = None;
        self.outcome = None;
        self.taken.fill(false);
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let name = self.shared.names[self.rank];
            let reason = ParallelError::Failed { rank: name, reason: "it panicked".into() };
            for sibling in self.shared.siblings.get().into_iter().flatten().filter_map(Weak::upgrade) {
                if !Arc::ptr_eq(&sibling, &self.shared) {
                    sibling.set_broken(name, &reason);
                }
            }
        }
        self.shared.lock().gone[self.rank] = Some(std::thread::panicking());
        self.shared.changed.notify_all();
    }
}

/// Reduces, in the order of the ranks, the values of all ranks from place `start` on.
fn reduce_into(posted: &[Post], start: usize, reduced: &mut [f32], join: fn(f32, f32) -> f32) {
    for (rank, post) in posted.iter().enumerate() {
        let values = &post.values()[start..];
        if rank == 0 {
            reduced.copy_from_slice(&values[..reduced.len()]);
        } else {
            for (total, value) in reduced.iter_mut().zip(values) {
                *total = join(*total, *value);
            }
        }
    }
}

fn add(a: f32, b: f32) -> f32 {
    a + b
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.names.len()
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
        let posted = self.exchange_values(call, mine.to_vec())?;
        if !mine.is_empty() {
            for (part, post) in all.chunks_exact_mut(mine.len()).zip(posted.iter()) {
                part.copy_from_slice(post.values());
            }
        }
        Ok(())
    }

    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()> {
        let call = Call { operation: "reduce_scatter_sum", len: all.len(), root: None };
        check_parts(call.operation, mine.len(), all.len(), self.world())?;
        let posted = self.exchange_values(call, all.to_vec())?;
        reduce_into(&posted, self.rank * mine.len(), mine, add);
        Ok(())
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        check_root(root, self.world())?;
        let call = Call { operation: "broadcast", len: values.len(), root: Some(root) };
        let mine = if root == self.rank { values.to_vec() } else { Vec::new() };
        let posted = self.exchange_values(call, mine)?;
        if root != self.rank {
            values.copy_from_slice(posted[root].values());
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let call = Call { operation: "barrier", len: 0, root: None };
        self.exchange_values(call, Vec::new()).map(drop)
    }

    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> Result<()> {
        let part = check_all_to_all(send.len(), received.len(), self.world())?;
        let call = Call { operation: "all_to_all", len: send.len(), root: None };
        let posted = self.exchange_values(call, send.to_vec())?;
        if part > 0 {
            for (received, post) in received.chunks_exact_mut(part).zip(posted.iter()) {
                received.copy_from_slice(&post.values()[self.rank * part..][..part]);
            }
        }
        Ok(())
    }

    fn send(&self, to: usize, values: &[f32]) -> Result<()> {
        check_peer(to, self.rank, self.world())?;
        let (operation, begun) = ("send", Instant::now());
        let between = (self.rank, to);
        let mut state = self.shared.lock();
        state.healthy(operation)?;
        while state.mail.get(&between).is_some_and(|mail| mail.len() >= MAIL_MAX) {
            state = self.sleep(state, operation, begun, |_, rank| rank == to)?;
        }
        state.mail.entry(between).or_default().push_back(values.to_vec());
        self.shared.changed.notify_all();
        Ok(())
    }

    fn recv(&self, from: usize, values: &mut [f32]) -> Result<()> {
        check_peer(from, self.rank, self.world())?;
        let (operation, begun) = ("recv", Instant::now());
        let mut state = self.shared.lock();
        let sent = loop {
            if let Some(sent) = state.mail.get_mut(&(from, self.rank)).and_then(VecDeque::pop_front) {
                break sent;
            }
            state = self.sleep(state, operation, begun, |_, rank| rank == from)?;
        };
        if sent.len() != values.len() {
            let error = ParallelError::BadLength { operation, given: values.len(), expected: sent.len() };
            return Err(self.break_group(state, error));
        }
        drop(state);
        self.shared.changed.notify_all();
        values.copy_from_slice(&sent);
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        let operation = "all_gather_bytes";
        if let Err(error) = check_bytes(operation, self.shared.names[self.rank], mine.len(), bytes_max) {
            return Err(self.break_group(self.shared.lock(), error));
        }
        let call = Call { operation, len: bytes_max, root: None };
        let posted = self.exchange(call, Post::Bytes(Arc::new(mine.to_vec())))?;
        Ok(posted.iter().map(|post| post.bytes().to_vec()).collect())
    }
}

#[cfg(test)]
mod tests;
