//! Tiles side by side. Burn's CPU kernels run most element-wise work on one thread, so whole tiles run in parallel, each
//! on a thread of its own in which the kernels stay serial.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{EngineError, Result};

/// Most lanes; beyond this the matrix kernels' own threads do as well.
const LANES_MAX: usize = 64;

/// Cores of this machine that lanes may use.
pub(super) fn available() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get()).min(LANES_MAX)
}

/// One single-threaded pool for each lane: inside it, kernels that would spread over a pool find only themselves.
pub(super) struct Lanes {
    pools: Vec<ThreadPool>,
}

impl Lanes {
    pub fn new(count: usize) -> Result<Self> {
        let pool =
            |lane| ThreadPoolBuilder::new().num_threads(1).thread_name(move |_| format!("engine-lane-{lane}")).build();
        let pools = (0..count.max(1)).map(pool).collect::<std::result::Result<_, _>>();
        let pools = pools.map_err(|e| {
            EngineError::invalid(
                format!("cannot start {count} threads: {e}"),
                "raise the limit on processes (`ulimit -u`)",
            )
        })?;
        Ok(Self { pools })
    }

    pub fn count(&self) -> usize {
        self.pools.len()
    }

    /// Runs `work(0..count)`, each on some lane, and returns the results in order. A single piece of work runs on the
    /// caller's thread, where the kernels may spread over all cores.
    pub fn run<R: Send>(&self, count: usize, work: &(dyn Fn(usize) -> R + Sync)) -> Vec<R> {
        if count <= 1 || self.pools.len() == 1 {
            return (0..count).map(work).collect();
        }
        let next = AtomicUsize::new(0);
        let found: Vec<Mutex<Option<R>>> = (0..count).map(|_| Mutex::new(None)).collect();
        let lane = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                let result = work(index);
                *found[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            }
        };
        std::thread::scope(|scope| {
            for pool in &self.pools[..self.pools.len().min(count)] {
                scope.spawn(|| pool.install(lane));
            }
        });
        // The scope has passed on any lane's panic, so every place is filled.
        found.into_iter().filter_map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        for lanes in [1, 3] {
            let lanes = Lanes::new(lanes).unwrap();
            for count in [0, 1, 2, 50] {
                assert_eq!(lanes.run(count, &|i| i * i), (0..count).map(|i| i * i).collect::<Vec<_>>());
            }
        }
    }
}
