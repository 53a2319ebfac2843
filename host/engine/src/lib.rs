//! Models, weights, sampling, objectives and the optimizer behind one seam.
//!
//! Roles talk to [`model::Model`], [`generate`], [`score`] and [`objective`]; they never see a back end's tensors.
//! An engine implements [`block::BlockEngine`]: what happens inside one block of the network on one device. The walk
//! over the blocks ([`walker`]) is written once for all engines.
//! Must not know: plugins, brokers, configuration files.

pub mod batch;
pub mod block;
pub mod burn_engine;
pub mod cpu_engine;
pub mod divergence;
pub mod error;
pub mod generate;
pub mod head;
pub mod model;
pub mod objective;
pub mod optim;
mod rope;
pub mod score;
pub mod sharded;
pub mod walker;
pub mod weights;

pub use error::{EngineError, Result};
