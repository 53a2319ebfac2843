//! The controller at its edge: an HTTP endpoint that the roles ask for orders, the run's token, and the ledger that brings
//! a killed controller back.
//!
//! [`Endpoint`] runs a [`Machine`] (the pure controller) in threads of its own. Nothing is applied or answered that is
//! not in the [`Ledger`] on disk. A role talks to it through a [`Client`], which sits out a controller that is being
//! restarted. What the orders mean is none of this crate's business: it knows `cosmos-controller`'s messages, no models,
//! no brokers, no config files.

mod client;
mod clock;
mod desk;
mod endpoint;
mod error;
mod file;
mod http;
mod identity;
mod ledger;
mod listener;
mod machine;
mod need;
mod supervisor;
#[cfg(test)]
mod tests;
mod token;
mod wire;

pub use client::{Beating, Client, ClientOptions, Target, Turn, fetch_status};
pub use endpoint::{Deadlines, Endpoint, EndpointOptions, identity_in, retire};
pub use error::{ControlError, Result};
pub use file::ControlFile;
pub use identity::Identity;
pub use machine::{Ending, Machine};
pub use need::Need;
pub use supervisor::{End, Report};
pub use token::{TOKEN_VARIABLE, Token};
