//! What the ranks of a group do together.

use crate::{ParallelError, Result};

/// The ranks of a group, seen from one of them. All ranks call the same operations in the same order, with buffers of the
/// same length.
///
/// Sums are taken in the order of the ranks, in f32, whatever order the ranks come in: a run repeats bit for bit, and
/// `reduce_scatter_sum` followed by `all_gather` equals `all_reduce_sum`. After an error the group is of no more use.
pub trait Collective: Send + Sync {
    /// This rank's place in the group, from 0.
    fn rank(&self) -> usize;

    /// How many ranks the group has.
    fn world(&self) -> usize;

    /// Every rank gets the sum of all ranks' `values`.
    ///
    /// # Errors
    /// A rank that is late, gone, or calls something else.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()>;

    /// Every rank gets all ranks' `mine`, one after the other; `all` is `world` times as long.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`]; [`ParallelError::BadLength`].
    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> Result<()>;

    /// Each rank gets its part of the sum of all ranks' `all`, which is `world` times as long as `mine`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`]; [`ParallelError::BadLength`].
    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()>;

    /// Every rank gets the `values` of rank `root`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`]; [`ParallelError::NoSuchRank`].
    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()>;

    /// Returns when all ranks have come here.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn barrier(&self) -> Result<()>;
}

/// Checks that `whole` is `world` times as long as `part`.
pub(crate) fn check_parts(operation: &'static str, part: usize, whole: usize, world: usize) -> Result<()> {
    let expected = part.saturating_mul(world);
    if whole == expected { Ok(()) } else { Err(ParallelError::BadLength { operation, given: whole, expected }) }
}

/// A group of one rank: nothing to wait for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> Result<()> {
        check_parts("all_gather", mine.len(), all.len(), 1)?;
        all.copy_from_slice(mine);
        Ok(())
    }

    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> Result<()> {
        check_parts("reduce_scatter_sum", mine.len(), all.len(), 1)?;
        mine.copy_from_slice(all);
        Ok(())
    }

    fn broadcast(&self, root: usize, _values: &mut [f32]) -> Result<()> {
        if root == 0 { Ok(()) } else { Err(ParallelError::NoSuchRank { rank: root, world: 1 }) }
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_keeps_its_values() {
        let (mut a, mut b) = ([1.0, 2.0], [0.0; 2]);
        Single.all_reduce_sum(&mut a).unwrap();
        Single.all_gather(&a, &mut b).unwrap();
        assert_eq!((a, b), ([1.0, 2.0], [1.0, 2.0]));
        Single.reduce_scatter_sum(&[5.0, 6.0], &mut a).unwrap();
        Single.broadcast(0, &mut a).unwrap();
        Single.barrier().unwrap();
        assert_eq!(a, [5.0, 6.0]);
        assert_eq!(Single.broadcast(1, &mut a), Err(ParallelError::NoSuchRank { rank: 1, world: 1 }));
        let error = Single.all_gather(&a, &mut [0.0; 3]).unwrap_err();
        assert_eq!(error.to_string(), "`all_gather` of 3 values; expected 2");
    }
}
