//! The device mesh of a replica and its collectives.
//!
//! A replica is one world of ranks, laid out along five axes ([`ParallelDims`], [`Mesh`]). Ranks that differ along some of
//! the axes only form a group ([`SubMesh`]): the ranks that shard weights, those that average gradients, those that share a
//! slice of the data. Within a group they talk through a [`Collective`]: [`Single`] for one rank, [`ThreadGroup`] for
//! threads of one process. [`ThreadWorld`] gives every rank of a mesh all its groups ([`RankGroups`]), and [`NodeWorld`] does
//! so where the mesh lies over several processes. [`SocketGroup`] joins processes over TCP; `NcclGroup` (feature `nccl`)
//! joins GPUs.
//!
//! Every collective has a deadline, and its sums are taken in the order of the ranks, so that a run repeats bit for bit.
//! This crate knows numbers and ranks; it does not know models.

mod collective;
mod error;
mod groups;
mod layout;
mod mesh;
#[cfg(any(test, feature = "nccl"))]
mod nccl;
mod nodes;
mod sockets;
mod threads;

pub use collective::{Collective, Single};
pub use error::ParallelError;
pub use groups::{RankFailure, RankGroups, ThreadWorld};
pub use layout::FlatLayout;
pub use mesh::{Axis, Coordinates, Mesh, ParallelDims, SubMesh};
#[cfg(feature = "nccl")]
pub use nccl::{CudaMemory, CudaNccl, Dtype, Launch, NcclCalls, NcclGroup, Progress, Reduce, library_version};
pub use nodes::{NodeOptions, NodeWorld, Rendezvous};
pub use sockets::{SocketGroup, SocketOptions};
pub use threads::{ThreadGroup, ThreadRank};

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, ParallelError>;
