//! The formats in which messages travel between processes.
//!
//! [`frame`] is the envelope of everything of ours and the packing inside it, [`native`] the teacher's messages in it,
//! [`cosmos_rl`] the original's messages.

pub mod cosmos_rl;
pub mod frame;
pub mod native;
pub mod part;
