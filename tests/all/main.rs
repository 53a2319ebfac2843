//! One integration binary for the whole workspace.

mod cli;
mod golden;
mod launch;
mod run;
