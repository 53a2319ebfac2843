//! Collectives between threads of one process.
//!
//! A round is one collective. Each rank posts what it brings; the last to come computes the outcome in the order of the
//! ranks; each takes the outcome; the last to take it opens the next round.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::collective::check_parts;
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

fn group(names: Vec<usize>, wait_ms_max: u64) -> Vec<ThreadRank> {
    let world = names.len();
    let state = State {
        round: 0,
        call: None,
        posted: vec![None; world],
        outcome: None,
        taken: vec![false; world],
        gone: vec![None; world],
        broken: None,
    };
    let shared = Arc::new(Shared { names, wait_ms_max, state: Mutex::new(state), changed: Condvar::new() });
    (0..world).map(|rank| ThreadRank { rank, shared: shared.clone(), rounds: Mutex::new(0) }).collect()
}

/// One rank of a [`ThreadGroup`]. Dropping it tells the others that it will not come any more.
pub struct ThreadRank {
    rank: usize,
    shared: Arc<Shared>,
    /// How many rounds this rank has done. Held during a collective, so that a rank does one at a time.
    rounds: Mutex<u64>,
}

struct Shared {
    /// The ranks' numbers in messages.
    names: Vec<usize>,
    wait_ms_max: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    round: u64,
    /// Who called first in this round, and what.
    call: Option<(usize, Call)>,
    posted: Vec<Option<Vec<f32>>>,
    outcome: Option<Arc<Vec<f32>>>,
    taken: Vec<bool>,
    /// Ranks whose handle was dropped, and whether in a panic.
    gone: Vec<Option<bool>>,
    /// Who found out that the group has failed, and what it found.
    broken: Option<(usize, ParallelError)>,
}

/// A collective as its ranks must agree on it.
#[derive(Clone, Copy, PartialEq)]
struct Call {
    operation: &'static str,
    /// Values that each rank brings.
    len: usize,
    root: Option<usize>,
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
    /// One collective: brings `values`, and gets what `combine` makes of all ranks' values.
    fn round(
        &self,
        call: Call,
        values: Vec<f32>,
        combine: impl FnOnce(&[Vec<f32>]) -> Vec<f32>,
    ) -> Result<Arc<Vec<f32>>> {
        let mut rounds = self.rounds.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let begun = Instant::now();
        let shared = &*self.shared;
        let mut state = shared.lock();
        // The ranks may still be taking the outcome of the round before.
        while state.round < *rounds {
            let behind = |state: &State, rank: usize| !state.taken[rank];
            state = self.sleep(state, call, begun, behind)?;
        }
        state.healthy(call.operation, &shared.names)?;
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
        state.posted[self.rank] = Some(values);
        if state.posted.iter().all(Option::is_some) {
            let posted: Vec<Vec<f32>> = state.posted.iter_mut().filter_map(Option::take).collect();
            state.outcome = Some(Arc::new(combine(&posted)));
            shared.changed.notify_all();
        }
        let outcome = loop {
            if let Some(outcome) = &state.outcome {
                break outcome.clone();
            }
            let missing = |state: &State, rank: usize| state.posted[rank].is_none();
            state = self.sleep(state, call, begun, missing)?;
        };
        state.taken[self.rank] = true;
        if state.taken.iter().all(|taken| *taken) {
            state.open_next_round();
            shared.changed.notify_all();
        }
        *rounds += 1;
        Ok(outcome)
    }

    /// Sleeps until something changes. Fails when the group has failed, when a rank that is `waited_for` is gone, and at the
    /// deadline.
    fn sleep<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        call: Call,
        begun: Instant,
        waited_for: impl Fn(&State, usize) -> bool,
    ) -> Result<MutexGuard<'a, State>> {
        let shared = &*self.shared;
        let operation = call.operation;
        state.healthy(operation, &shared.names)?;
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
    fn break_group(&self, mut state: MutexGuard<'_, State>, error: ParallelError) -> ParallelError {
        state.broken.get_or_insert((self.rank, error.clone()));
        drop(state);
        self.shared.changed.notify_all();
        error
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A rank that panics inside a round leaves its post missing, and its handle's drop names it.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn healthy(&self, operation: &'static str, names: &[usize]) -> Result<()> {
        match &self.broken {
            None => Ok(()),
            Some((rank, error)) => {
                Err(ParallelError::Broken { operation, rank: names[*rank], reason: error.to_string() })
            }
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
        self.shared.lock().gone[self.rank] = Some(std::thread::panicking());
        self.shared.changed.notify_all();
    }
}

/// The sum over ranks, in their order.
fn sum(posted: &[Vec<f32>]) -> Vec<f32> {
    let mut total = posted.first().cloned().unwrap_or_default();
    for values in posted.iter().skip(1) {
        for (sum, value) in total.iter_mut().zip(values) {
            *sum += value;
        }
    }
    total
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.names.len()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let call = Call { operation: "all_reduce_sum", len: values.len(), root: None };
        values.copy_from_slice(&self.round(call, values.to_vec(), sum)?);
        Ok(())
    }

    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> Result<()> {
        let call = Call { operation: "all_gather", len: mine.len(), root: None };
        check_parts(call.operation, mine.len(), all.len(), self.world())?;
        all.copy_from_slice(&self.round(call, mine.to_vec(), |posted| posted.concat())?);
        Ok(())
    }

    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()> {
        let call = Call { operation: "reduce_scatter_sum", len: all.len(), root: None };
        check_parts(call.operation, mine.len(), all.len(), self.world())?;
        let total = self.round(call, all.to_vec(), sum)?;
        let start = self.rank * mine.len();
        mine.copy_from_slice(&total[start..start + mine.len()]);
        Ok(())
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        if root >= self.world() {
            return Err(ParallelError::NoSuchRank { rank: root, world: self.world() });
        }
        let call = Call { operation: "broadcast", len: values.len(), root: Some(root) };
        let mine = if root == self.rank { values.to_vec() } else { Vec::new() };
        values.copy_from_slice(&self.round(call, mine, |posted| posted[root].clone())?);
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let call = Call { operation: "barrier", len: 0, root: None };
        self.round(call, Vec::new(), |_| Vec::new()).map(drop)
    }
}

#[cfg(test)]
mod tests;
