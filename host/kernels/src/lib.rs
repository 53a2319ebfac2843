//! Numeric kernels for the CPU, chosen at run time by what the machine can do: AVX-512, AVX2, NEON, or plain Rust.
//!
//! Every result is a fixed sequence of operations per output number: it depends neither on how many rows are computed
//! together nor on the number of threads. That is what lets a sequence decode to the same bits alone and in company.
//!
//! Must not know: models, weights' names, anything but slices of numbers.

pub mod ahead;
pub mod attention;
pub mod gemm;
pub mod isa;
pub mod memory;
pub mod narrow;
pub mod page;
pub mod rows;
mod simd;
pub mod threads;
pub mod vocabulary;

pub use isa::Isa;

#[cfg(test)]
mod reference;
