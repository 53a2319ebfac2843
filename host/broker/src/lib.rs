//! Queues, results and keys between roles, and their wire formats.
//!
//! Rollout publishes a [`TeacherRequest`] for every completion; a teacher takes it, scores it and completes it with a
//! [`TeacherResult`]; the trainer fetches results by sample. Delivery is at least once: a request leaves the broker only when
//! its result is stored, a dead teacher's requests are handed out again, and a result is stored under its sample, so that a
//! second copy is harmless. [`MemoryBroker`] does this inside one process. [`wire`] has the formats between processes.
//!
//! This crate moves numbers; it does not know what they mean to a trainer.

#[cfg(test)]
mod behaviour;
mod broker;
mod clock;
mod error;
mod memory;
mod message;
mod remote;
mod rows;
mod store;
pub mod wire;

pub use broker::{Broker, BrokerLimits, BrokerStats, Completion, Delivery, Fetched};
pub use clock::{Clock, ManualClock, SystemClock};
pub use error::BrokerError;
pub use memory::MemoryBroker;
pub use message::{HiddenStates, SampleId, TeacherRequest, TeacherResult};
pub use remote::{
    CosmosRlBroker, CosmosRlOptions, PromptOf, QueueOptions, RedisAddress, RedisBroker, RedisLimits, RedisLink,
    RedisServer, RedisStore, Rejected, RowOf, ServerConfig, ServerOptions, open_or_start,
};
pub use rows::Rows;
pub use store::{MemoryStore, Store, StoreLimits};

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, BrokerError>;
