//! The formats in which messages travel between processes.

pub mod cosmos_rl;
