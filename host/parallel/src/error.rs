//! What can go wrong between ranks.

/// What can go wrong between ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParallelError {
    /// A size that no axis can have.
    #[error("`{axis}` is {size}; expected at least 1{}", if *axis == "dp_shard" { ", or -1 to infer it" } else { "" })]
    BadSize {
        /// Name of the axis.
        axis: &'static str,
        /// The size given.
        size: i64,
    },
    /// The sizes do not multiply to the number of ranks.
    #[error("{sizes} = {product}, but the world has {world} ranks")]
    WorldMismatch {
        /// The sizes, with their names.
        sizes: String,
        /// Their product.
        product: u128,
        /// The number of ranks.
        world: usize,
    },
    /// `dp_shard` cannot be inferred.
    #[error("cannot infer `dp_shard`: {world} ranks do not divide by {sizes} = {product}")]
    CannotInfer {
        /// The other sizes, with their names.
        sizes: String,
        /// Their product.
        product: u128,
        /// The number of ranks.
        world: usize,
    },
    /// Two axes that cannot both be used.
    #[error("`{first}` is {first_size} and `{second}` is {second_size}: they cannot both be larger than 1")]
    Conflict {
        /// Name of an axis.
        first: &'static str,
        /// Its size.
        first_size: usize,
        /// Name of the other.
        second: &'static str,
        /// Its size.
        second_size: usize,
    },
    /// A rank that the world does not have.
    #[error("rank {rank} is not in a world of {world}")]
    NoSuchRank {
        /// The rank.
        rank: usize,
        /// The number of ranks.
        world: usize,
    },
    /// A batch that does not divide among the ranks.
    #[error("a batch of {batch} does not divide by dp_shard {dp_shard} × mini-batch {mini_batch}")]
    BatchDoesNotDivide {
        /// Samples of the batch.
        batch: usize,
        /// Ranks that share it.
        dp_shard: usize,
        /// Samples that a rank takes at a time.
        mini_batch: usize,
    },
    /// Buffers whose lengths do not fit the operation.
    #[error("`{operation}` of {given} values; expected {expected}")]
    BadLength {
        /// The collective.
        operation: &'static str,
        /// The length given.
        given: usize,
        /// The length that the other buffer asks for.
        expected: usize,
    },
    /// Ranks that called different collectives, or the same with other sizes.
    #[error("rank {rank} called {called} while rank {other} called {other_called}")]
    Disagreement {
        /// A rank.
        rank: usize,
        /// What it called.
        called: String,
        /// The rank that called first.
        other: usize,
        /// What that one called.
        other_called: String,
    },
    /// Ranks that did not come in time.
    #[error("`{operation}`: rank {} did not come within {waited_ms} ms", list(missing))]
    TimedOut {
        /// The collective.
        operation: &'static str,
        /// The ranks that were waited for.
        missing: Vec<usize>,
        /// How long.
        waited_ms: u64,
    },
    /// A rank that will never come.
    #[error("`{operation}`: rank {rank} {}", if *panicked { "panicked" } else { "has left the group" })]
    PeerGone {
        /// The collective.
        operation: &'static str,
        /// The rank.
        rank: usize,
        /// Whether it went down in a panic.
        panicked: bool,
    },
    /// The group failed earlier, at another rank.
    #[error("`{operation}`: the group failed at rank {rank}: {reason}")]
    Broken {
        /// The collective.
        operation: &'static str,
        /// The rank that found out.
        rank: usize,
        /// What it found.
        reason: String,
    },
}

impl ParallelError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ParallelError::BadSize { .. } | ParallelError::WorldMismatch { .. } | ParallelError::CannotInfer { .. } => {
                Some(
                    "set the sizes under `parallelism` so that they multiply to the number of ranks, or `dp_shard_size = -1`",
                )
            }
            ParallelError::Conflict { .. } => {
                Some("set one of the two to 1; more data-parallel ranks come with more replicas")
            }
            ParallelError::BatchDoesNotDivide { .. } => {
                Some("choose a `train_batch_per_replica` that is a multiple of dp_shard × `mini_batch`")
            }
            ParallelError::TimedOut { .. } | ParallelError::PeerGone { .. } | ParallelError::Broken { .. } => {
                Some("look at the log of the rank that is named: it failed first")
            }
            _ => None,
        }
    }
}

fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
