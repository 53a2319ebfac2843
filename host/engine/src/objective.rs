//! Losses at the head of a model: gradients of logits chunks, and what a step wants to know about its tokens.
//!
//! [`PolicyLoss`] is the clipped surrogate of policy-gradient training, with distillation from a teacher, a reference
//! KL and an entropy bonus; [`SftLoss`] is the likelihood of given responses. Both implement
//! [`HeadLoss`](crate::model::HeadLoss): they see rows of logits a chunk at a time and hold nothing of the size of all
//! rows × vocabulary. Rows are independent once the few numbers that couple a sequence (discounted advantages,
//! sequence ratios) are known; when they are needed, a first pass collects them.
//! Must not know: models, optimizers, where samples come from.

mod divergence;
mod facts;
mod policy;
mod report;
mod row_gradient;
mod sft;
mod spec;
mod surrogate;

pub use policy::PolicyLoss;
pub use report::{Report, Spread, Summary};
pub use sft::{SftLoss, SftSample};
pub use spec::{DistillKind, DistillSpec, LossType, Mass, Normaliser, ObjectiveSpec, Sample, TeacherView, Variant};
