//! What can go wrong between roles.

use crate::SampleId;

/// What can go wrong between roles.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BrokerError {
    /// A queue stayed full for as long as the caller was ready to wait.
    #[error("queue `{queue}` is full: {held} of {max} after waiting {waited_ms} ms")]
    QueueFull {
        /// Name of the queue.
        queue: &'static str,
        /// How many it holds.
        held: usize,
        /// How many it may hold.
        max: usize,
        /// How long the caller waited.
        waited_ms: u64,
    },
    /// The run is over; nothing is taken in any more.
    #[error("queue `{queue}` is closed")]
    Closed {
        /// Name of the queue.
        queue: &'static str,
    },
    /// A sample was published again with other content while the first is still under way.
    #[error(
        "sample `{sample}` is already under way with weights {held_version}, and came again with weights {new_version}"
    )]
    SampleInUse {
        /// The sample.
        sample: SampleId,
        /// Weight version of the message that the broker holds.
        held_version: u64,
        /// Weight version of the new one.
        new_version: u64,
    },
    /// A message whose parts do not fit together.
    #[error("sample `{sample}`: {reason}")]
    BadMessage {
        /// The sample.
        sample: SampleId,
        /// What does not fit.
        reason: String,
    },
    /// Bytes from outside that are no message.
    #[error("{format} at byte {at}: `{field}`: {reason}")]
    BadBytes {
        /// What the bytes should have been.
        format: &'static str,
        /// Where they are wrong.
        at: usize,
        /// The key being read.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl BrokerError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            BrokerError::QueueFull { queue: crate::broker::REQUEST_QUEUE, .. } => {
                Some("the teacher is too slow or gone: look at its log, add teachers, or raise the queue's limit")
            }
            BrokerError::QueueFull { .. } => Some("the trainer does not fetch results: look at its log"),
            BrokerError::Closed { .. } => None,
            BrokerError::SampleInUse { .. } => Some("forget the sample before it is generated again"),
            BrokerError::BadMessage { .. } => None,
            BrokerError::BadBytes { .. } => {
                Some("the other side must speak the same wire format: compare `distillation.wire` on both sides")
            }
        }
    }
}
