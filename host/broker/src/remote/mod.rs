//! Queues, results and blobs in a Redis server.

mod address;
mod broker;
mod cosmos_rl;
mod link;
mod scripts;
mod server;
mod store;

pub use address::RedisAddress;
pub use broker::{QueueOptions, RedisBroker, Rejected};
pub use cosmos_rl::{CosmosRlBroker, CosmosRlOptions, PromptOf, RowOf};
pub use link::{RedisLimits, RedisLink};
pub use server::{RedisServer, ServerConfig, ServerOptions, open_or_start};
pub use store::RedisStore;

#[cfg(test)]
mod tests;
