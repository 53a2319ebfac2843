//! What the ranks of a group do together.

use crate::{ParallelError, Result};

/// The ranks of a group, seen from one of them. All ranks call the same operations in the same order, with buffers of the
/// same length.
///
/// Sums are taken in the order of the ranks, in f32, whatever order the ranks come in: a run repeats bit for bit, and
/// `reduce_scatter_sum` followed by `all_gather` equals `all_reduce_sum`. After an error the group is of no more use.
///
/// `send` and `recv` are between two ranks and need no third. Messages from one rank to another arrive in the order sent.
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

    /// Every rank gets the largest of all ranks' values, place by place; NaN where any rank has NaN.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_reduce_max(&self, values: &mut [f32]) -> Result<()>;

    /// Part r of `send` goes to rank r, and part r of `received` comes from rank r. Both hold `world` parts of equal length.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`]; [`ParallelError::BadLength`] also when the parts are not of equal length.
    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> Result<()>;

    /// Sends `values` to rank `to`. Returns when they may be changed, which can be before they have arrived.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`]; [`ParallelError::NoSuchRank`] also for this rank itself.
    fn send(&self, to: usize, values: &[f32]) -> Result<()>;

    /// Waits for what rank `from` sends; it must have the length of `values`.
    ///
    /// # Errors
    /// As [`Collective::send`]; [`ParallelError::BadLength`].
    fn recv(&self, from: usize, values: &mut [f32]) -> Result<()>;

    /// Every rank gets all ranks' bytes, by rank; each may bring another number of them, at most `bytes_max`. For metrics
    /// and names, not for tensors.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`]; [`ParallelError::TooLarge`].
    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>>;

    /// As [`Collective::all_gather_bytes`], but only rank `root` gets them; the others get none.
    ///
    /// # Errors
    /// As [`Collective::all_gather_bytes`]; [`ParallelError::NoSuchRank`].
    fn gather_bytes(&self, root: usize, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        check_root(root, self.world())?;
        let all = self.all_gather_bytes(mine, bytes_max)?;
        Ok(if self.rank() == root { all } else { Vec::new() })
    }
}

/// The larger of two values; NaN when either is.
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

pub(crate) fn check_root(root: usize, world: usize) -> Result<()> {
    if root < world { Ok(()) } else { Err(ParallelError::NoSuchRank { rank: root, world }) }
}

/// Checks that `other` is a rank of the group and not `rank` itself.
pub(crate) fn check_peer(other: usize, rank: usize, world: usize) -> Result<()> {
    if other < world && other != rank { Ok(()) } else { Err(ParallelError::NoSuchRank { rank: other, world }) }
}

/// Checks the two buffers of an `all_to_all`; the length of a part.
pub(crate) fn check_all_to_all(send: usize, received: usize, world: usize) -> Result<usize> {
    let operation = "all_to_all";
    if received != send {
        return Err(ParallelError::BadLength { operation, given: received, expected: send });
    }
    if !send.is_multiple_of(world) {
        return Err(ParallelError::BadLength { operation, given: send, expected: send.next_multiple_of(world) });
    }
    Ok(send / world)
}

pub(crate) fn check_bytes(operation: &'static str, rank: usize, bytes: usize, bytes_max: usize) -> Result<()> {
    if bytes <= bytes_max { Ok(()) } else { Err(ParallelError::TooLarge { operation, rank, bytes, bytes_max }) }
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

    fn all_reduce_max(&self, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> Result<()> {
        check_all_to_all(send.len(), received.len(), 1)?;
        received.copy_from_slice(send);
        Ok(())
    }

    fn send(&self, to: usize, _values: &[f32]) -> Result<()> {
        check_peer(to, 0, 1)
    }

    fn recv(&self, from: usize, _values: &mut [f32]) -> Result<()> {
        check_peer(from, 0, 1)
    }

    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> Result<Vec<Vec<u8>>> {
        check_bytes("all_gather_bytes", 0, mine.len(), bytes_max)?;
        Ok(vec![mine.to_vec()])
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
        Single.all_to_all(&[7.0, 8.0], &mut a).unwrap();
        Single.all_reduce_max(&mut a).unwrap();
        assert_eq!(a, [7.0, 8.0]);
        assert_eq!(Single.send(0, &a), Err(ParallelError::NoSuchRank { rank: 0, world: 1 }));
        assert_eq!(Single.recv(1, &mut a), Err(ParallelError::NoSuchRank { rank: 1, world: 1 }));
        assert_eq!(Single.gather_bytes(0, b"ab", 2), Ok(vec![b"ab".to_vec()]));
        let error = Single.all_gather_bytes(b"abc", 2).unwrap_err();
        assert_eq!(error.to_string(), "`all_gather_bytes`: rank 0 brings 3 bytes; at most 2 are allowed");
    }
}
