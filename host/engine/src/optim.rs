//! Adam and AdamW over flat host slices, gradient clipping, and the original's learning-rate schedules.

mod adam;
mod schedule;
pub use adam::{Adam, AdamConfig, Moments, MomentsView, StepStats};
pub use schedule::{DecayType, Schedule, Warmup};
