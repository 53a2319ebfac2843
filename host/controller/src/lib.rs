//! The control plane of a run as a pure state machine: [`Controller::apply`] takes what happened and says who does what next.
//!
//! It has no clock, no IO and no randomness of its own; time comes to it as events (`Lost`, `Removed`). Its state is its event
//! log: whoever applies the same events in the same order gets the same orders, which is how a controller that was killed
//! goes on from its ledger.
//!
//! `lineage` is what a rollback takes back: steps, samples, position in the dataset. `roster` is what it does not: who is
//! there, doing what. `controller` takes events in, `decide` gives orders out.
//!
//! What it asks of whoever feeds it: the joins of one replica arrive in the order they were sent (a late copy of an old join
//! is dropped before). Reports may arrive doubled, late, in any order, or not at all.

mod controller;
mod decide;
mod lineage;
mod message;
mod plan;
mod refused;
mod roster;
mod status;

#[cfg(test)]
mod tests;

pub use controller::{Controller, Dispatch, Memory};
pub use lineage::{EMPTY_PROMPTS_MIN, EMPTY_ROUNDS_MAX};
pub use message::{Event, Order, OrderId, Outcome, Role, SampleRef};
pub use plan::Plan;
pub use refused::{ADDRESS_BYTES_MAX, NAME_BYTES_MAX, REPLICAS_MAX, Refused};
pub use status::{ReplicaStatus, Status};
