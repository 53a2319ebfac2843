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
    /// More bytes than the ranks have agreed on.
    #[error("`{operation}`: rank {rank} brings {bytes} bytes; at most {bytes_max} are allowed")]
    TooLarge {
        /// The collective.
        operation: &'static str,
        /// The rank.
        rank: usize,
        /// The bytes it brings.
        bytes: usize,
        /// The most that are allowed.
        bytes_max: usize,
    },
    /// A connection to a rank that ended, or on which nonsense came.
    #[error("`{operation}`: lost rank {rank} at {address}: {reason}")]
    Lost {
        /// The collective, or `connect`.
        operation: &'static str,
        /// The rank.
        rank: usize,
        /// Its address.
        address: String,
        /// What happened.
        reason: String,
    },
    /// A process of the same replica that ended, or on whose connection nonsense came.
    #[error(
        "`{operation}`: lost process {process} of this replica (ranks {first_rank} to {last_rank}) at {address}: {reason}"
    )]
    LostProcess {
        /// The collective, `connect`, or `watch` where none was under way.
        operation: &'static str,
        /// The process, from 0.
        process: usize,
        /// Its first rank.
        first_rank: usize,
        /// Its last rank.
        last_rank: usize,
        /// Its address.
        address: String,
        /// What happened.
        reason: String,
    },
    /// Ranks in other processes that did not come in time.
    #[error("`{operation}`: waited {waited_ms} ms for {}", missing.join(", "))]
    Missing {
        /// The collective, or `connect`.
        operation: &'static str,
        /// The ranks with their addresses, as far as they are known.
        missing: Vec<String>,
        /// How long.
        waited_ms: u64,
    },
    /// A wait for other ranks that was ended from outside, as [`crate::SocketOptions::stop`] asked.
    #[error("`{operation}`: the other ranks are not waited for any longer")]
    Stopped {
        /// The collective, or `connect`.
        operation: &'static str,
    },
    /// A group that does not take this rank.
    #[error("rank {rank} at {address} refuses this rank: {reason}")]
    Refused {
        /// The rank that refuses.
        rank: usize,
        /// Its address.
        address: String,
        /// Why.
        reason: String,
    },
    /// A call to NCCL that failed or did not end.
    #[error("`{operation}`: NCCL at rank {rank}: {reason}")]
    Nccl {
        /// The collective, or `connect`.
        operation: &'static str,
        /// The rank that found out.
        rank: usize,
        /// What the library or the driver said.
        reason: String,
    },
    /// A library of the machine that cannot be used.
    #[error("{library} cannot be loaded: {}", tried.join(", "))]
    NoLibrary {
        /// Its name.
        library: &'static str,
        /// What was tried, and why it failed.
        tried: Vec<String>,
    },
    /// A group that cannot be made.
    #[error("cannot make the group: {reason}")]
    BadGroup {
        /// What is wrong.
        reason: String,
    },
    /// A rank that gave up for a reason of its own.
    #[error("rank {rank} failed: {reason}")]
    Failed {
        /// The rank.
        rank: usize,
        /// Its error.
        reason: String,
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
            ParallelError::TimedOut { .. }
            | ParallelError::PeerGone { .. }
            | ParallelError::Lost { .. }
            | ParallelError::LostProcess { .. }
            | ParallelError::Broken { .. }
            | ParallelError::Failed { .. } => Some("look at the log of the rank that is named: it failed first"),
            ParallelError::Nccl { .. } => Some("`NCCL_DEBUG=INFO` makes NCCL tell more; see the other ranks' logs too"),
            ParallelError::NoLibrary { .. } => Some(
                "install it (the wheel `nvidia-nccl-cu12` will do), and name NCCL's file or folder in `COSMOS_NCCL`",
            ),
            ParallelError::Missing { .. } => {
                Some("see whether the process that is named runs, and whether its address is reachable from here")
            }
            ParallelError::Refused { .. } => {
                Some("all ranks of a group need the same token, attempt and number of ranks, and a number of their own")
            }
            _ => None,
        }
    }
}

fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
