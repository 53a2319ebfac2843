//! Pictures of runs, as SVG.

mod canvas;
mod comparison;
mod learning_curve;

pub use comparison::{ComparedRun, Comparison, Theme};
pub use learning_curve::LearningCurve;
