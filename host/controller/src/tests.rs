//! Runs of one process, which fix the order of the orders, and single rules.

mod one_process;
mod refusals;
mod several;
