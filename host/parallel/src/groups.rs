//! All groups of a rank.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, Weak};

use crate::threads::{ThreadRank, group};
use crate::{Collective, Coordinates, Mesh, ParallelError, Result, Single, SubMesh};

/// Whoever tells a whole world that it is lost.
pub(crate) trait Bell: Send + Sync {
    /// Lets every group of the world fail.
    fn ring(&self, error: &ParallelError);
}

/// Where a rank sits in its mesh, and its handle in each of its groups.
pub struct RankGroups {
    rank: usize,
    mesh: Mesh,
    at: Coordinates,
    /// By the place of the kind in [`SubMesh::ALL`].
    groups: Vec<Arc<dyn Collective>>,
    /// The ranks of this process as threads, through which all groups are told of a failure; none where the rank is alone.
    world: Option<Arc<ThreadRank>>,
    /// The ranks of this process.
    local: Arc<dyn Collective>,
    /// Tells the other processes of the world of a failure, where there are some.
    bell: Option<Weak<dyn Bell>>,
    /// Whether somebody else tells the groups of a panic.
    watched: bool,
}

impl RankGroups {
    /// The groups of a rank that is alone.
    pub fn single() -> RankGroups {
        let at = Coordinates { pp: 0, dp_replicate: 0, dp_shard: 0, cp: 0, tp: 0 };
        let groups = SubMesh::ALL.map(|_| Arc::new(Single) as Arc<dyn Collective>).into();
        RankGroups {
            rank: 0,
            mesh: Mesh::one(),
            at,
            groups,
            world: None,
            local: Arc::new(Single),
            bell: None,
            watched: false,
        }
    }

    /// Those of a rank whose world several processes have a part in; `local` are the ranks of this one.
    pub(crate) fn of_node(
        rank: usize,
        mesh: Mesh,
        groups: Vec<Arc<dyn Collective>>,
        local: Arc<ThreadRank>,
        bell: Weak<dyn Bell>,
    ) -> Result<RankGroups> {
        let at = mesh.coordinates(rank)?;
        let world = Some(Arc::clone(&local));
        Ok(RankGroups { rank, mesh, at, groups, world, local, bell: Some(bell), watched: false })
    }

    /// The ranks of the world that are in this process.
    pub fn local(&self) -> &Arc<dyn Collective> {
        &self.local
    }

    /// This rank's number in the mesh.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Where this rank sits.
    pub fn coordinates(&self) -> Coordinates {
        self.at
    }

    /// This rank's group of a kind; its ranks stand in the order of [`Mesh::group`].
    pub fn group(&self, sub: SubMesh) -> &Arc<dyn Collective> {
        &self.groups[sub.index()]
    }

    /// Lets every group of the world fail, so that no rank waits for this one. For errors outside of a collective; those of
    /// a collective do it by themselves.
    pub fn fail(&self, reason: impl fmt::Display) {
        let error = ParallelError::Failed { rank: self.rank, reason: reason.to_string() };
        if let Some(bell) = self.bell.as_ref().and_then(Weak::upgrade) {
            bell.ring(&error);
        } else if let Some(world) = &self.world {
            world.fail(error);
        }
    }
}

impl fmt::Debug for RankGroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RankGroups({} of {})", self.rank, self.mesh)
    }
}

impl Drop for RankGroups {
    fn drop(&mut self) {
        // Handles may live on where others hold them too.
        if std::thread::panicking() && !self.watched {
            self.fail("it panicked");
        }
    }
}

/// Why a rank of a world of threads did not end well.
#[derive(Debug)]
pub enum RankFailure<E> {
    /// It returned an error.
    Failed {
        /// The rank.
        rank: usize,
        /// What it returned.
        error: E,
    },
    /// It panicked.
    Panicked {
        /// The rank.
        rank: usize,
        /// The panic's message.
        message: String,
    },
}

impl<E: fmt::Display> fmt::Display for RankFailure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RankFailure::Failed { rank, error } => write!(f, "rank {rank} failed: {error}"),
            RankFailure::Panicked { rank, message } => write!(f, "rank {rank} panicked: {message}"),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> std::error::Error for RankFailure<E> {}

/// Makes a world of ranks that are threads of one process.
#[derive(Debug)]
pub struct ThreadWorld;

impl ThreadWorld {
    /// Every rank's groups, by rank; give each to its thread. When a collective fails in one group, or a rank panics, all
    /// groups fail with an error that names the rank, so that nobody waits for long. A collective fails when a rank is
    /// `wait_ms_max` late.
    ///
    /// # Errors
    /// None for a mesh that [`Mesh::new`] made.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(mesh: Mesh, wait_ms_max: u64) -> Result<Vec<RankGroups>> {
        if mesh.world() == 1 {
            return Ok(vec![RankGroups::single()]);
        }
        let mut handles: Vec<Vec<Arc<dyn Collective>>> = (0..mesh.world()).map(|_| Vec::new()).collect();
        let mut worlds = Vec::new();
        let mut shared = Vec::new();
        for sub in SubMesh::ALL {
            for members in mesh.groups(sub) {
                if let [alone] = members[..] {
                    handles[alone].push(Arc::new(Single));
                    continue;
                }
                let ranks: Vec<Arc<ThreadRank>> =
                    group(members.clone(), wait_ms_max).into_iter().map(Arc::new).collect();
                shared.extend(ranks.first().map(|rank| rank.shared().clone()));
                if sub == SubMesh::World {
                    worlds = ranks.clone();
                }
                for (member, rank) in members.into_iter().zip(ranks) {
                    handles[member].push(rank);
                }
            }
        }
        for group in &shared {
            group.stand_with(shared.iter().map(Arc::downgrade).collect());
        }
        let ranks = handles.into_iter().zip(worlds).enumerate();
        ranks
            .map(|(rank, (groups, world))| {
                let (at, local) = (mesh.coordinates(rank)?, Arc::clone(&world) as Arc<dyn Collective>);
                Ok(RankGroups { rank, mesh, at, groups, world: Some(world), local, bell: None, watched: false })
            })
            .collect()
    }

    /// Runs `work` as every rank, each in a thread of its own, and returns the results by rank. When a rank fails or panics
    /// the others' collectives fail too; the one that failed first is returned.
    ///
    /// # Errors
    /// The first failure.
    pub fn run<T, E>(
        mesh: Mesh,
        wait_ms_max: u64,
        work: impl Fn(RankGroups) -> std::result::Result<T, E> + Sync,
    ) -> std::result::Result<Vec<T>, RankFailure<E>>
    where
        T: Send,
        E: From<ParallelError> + Send + fmt::Display,
    {
        let worlds = ThreadWorld::new(mesh, wait_ms_max)
            .map_err(|error| RankFailure::Failed { rank: 0, error: E::from(error) })?;
        let first: Mutex<Option<RankFailure<E>>> = Mutex::new(None);
        let as_rank = |mut groups: RankGroups| {
            let rank = groups.rank();
            let world = groups.world.clone();
            // The handles outlive `work`, so that the others hear of a failure only once it is noted.
            groups.watched = true;
            let _kept = groups.groups.clone();
            // Nothing that `work` was given is used again after a panic.
            let failure = match catch_unwind(AssertUnwindSafe(|| work(groups))) {
                Ok(Ok(result)) => return Some(result),
                Ok(Err(error)) => RankFailure::Failed { rank, error },
                Err(panic) => RankFailure::Panicked { rank, message: message_of(&*panic) },
            };
            let reason = match &failure {
                RankFailure::Failed { error, .. } => error.to_string(),
                RankFailure::Panicked { message, .. } => format!("it panicked: {message}"),
            };
            // Noted before the others are told, so that theirs comes later.
            first.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(failure);
            if let Some(world) = world {
                world.fail(ParallelError::Failed { rank, reason });
            }
            None
        };
        let results: Vec<Option<T>> = std::thread::scope(|scope| {
            let as_rank = &as_rank;
            let threads: Vec<_> = worlds.into_iter().map(|groups| scope.spawn(move || as_rank(groups))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(None)).collect()
        });
        match first.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            None => Ok(results.into_iter().flatten().collect()),
            Some(failure) => Err(failure),
        }
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{Axis, ParallelDims};

    fn mesh(dp_shard: i64, cp: i64, tp: i64) -> Mesh {
        let dims = ParallelDims { dp_shard, cp, tp, ..ParallelDims::default() };
        Mesh::new(dims, (dp_shard * cp * tp) as usize).unwrap()
    }

    #[test]
    fn every_rank_has_all_its_groups() {
        let mesh = mesh(2, 2, 2);
        let sums = ThreadWorld::run(mesh, 30_000, |groups| -> Result<Vec<f32>> {
            SubMesh::ALL
                .into_iter()
                .map(|sub| {
                    let group = groups.group(sub);
                    let members = groups.mesh().group(groups.rank(), sub)?;
                    assert_eq!((group.world(), members[group.rank()]), (members.len(), groups.rank()));
                    let mut sum = [groups.rank() as f32];
                    group.all_reduce_sum(&mut sum)?;
                    assert_eq!(sum[0], members.iter().sum::<usize>() as f32);
                    Ok(sum[0])
                })
                .collect()
        })
        .unwrap();
        assert_eq!(sums.len(), 8);
        assert!(sums.iter().all(|sum| sum[SubMesh::World.index()] == 28.0));
    }

    #[test]
    fn a_rank_that_fails_or_panics_frees_those_it_never_met() {
        // Rank 3 fails while 0 and 1 wait for each other's partners in groups that rank 3 is not in.
        for panics in [false, true] {
            let begun = Instant::now();
            let failure = ThreadWorld::run(mesh(2, 1, 2), 60_000, |groups| -> Result<()> {
                let tp = groups.group(SubMesh::Along(Axis::Tp));
                match groups.rank() {
                    3 if panics => panic!("out of luck"),
                    3 => Err(ParallelError::Failed { rank: 3, reason: "disk full".into() }),
                    2 => tp.barrier(),
                    _ => groups.group(SubMesh::Along(Axis::DpShard)).barrier(),
                }
            })
            .unwrap_err();
            let text = failure.to_string();
            let expected =
                if panics { "rank 3 panicked: out of luck" } else { "rank 3 failed: rank 3 failed: disk full" };
            assert_eq!(text, expected);
            assert!(begun.elapsed() < Duration::from_secs(30));
        }
    }

    #[test]
    fn handles_that_outlive_a_panic_do_not_hide_it() {
        let mut ranks = ThreadWorld::new(mesh(2, 1, 1), 60_000).unwrap();
        let (second, first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        let kept = second.group(SubMesh::World).clone();
        let panicked = std::thread::spawn(move || {
            let _mine = second;
            panic!("gone");
        });
        assert!(panicked.join().is_err());
        let error = first.group(SubMesh::Dp).barrier().unwrap_err();
        assert!(error.to_string().contains("rank 1"), "{error}");
        assert!(kept.barrier().is_err());
    }

    #[test]
    fn one_rank_needs_no_threads() {
        for groups in [RankGroups::single(), ThreadWorld::new(Mesh::one(), 1).unwrap().remove(0)] {
            assert_eq!((groups.rank(), groups.mesh().world()), (0, 1));
            for sub in SubMesh::ALL {
                groups.group(sub).barrier().unwrap();
            }
            groups.fail("of no consequence");
        }
    }
}
