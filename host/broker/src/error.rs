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
    /// A value of the config key `redis` that is no address.
    #[error("`redis`: `{address}` is no address of a Redis server: {reason}")]
    BadAddress {
        /// The address, its password left out.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// The server could not be reached for as long as was allowed.
    #[error("redis `{address}` did not answer for {waited_ms} ms while {doing}: {reason}")]
    Unreachable {
        /// The server.
        address: String,
        /// What was tried.
        doing: &'static str,
        /// How long.
        waited_ms: u64,
        /// The last error.
        reason: String,
    },
    /// The server's memory or disk stayed full for as long as was allowed.
    #[error("redis `{address}` is full, still after waiting {waited_ms} ms while {doing}: {reason}")]
    ServerFull {
        /// The server.
        address: String,
        /// What was tried.
        doing: &'static str,
        /// How long.
        waited_ms: u64,
        /// What the server says.
        reason: String,
    },
    /// A server that this program does not work with.
    #[error("redis `{address}` cannot be used: {reason}")]
    Unfit {
        /// The server.
        address: String,
        /// What is wrong with it.
        reason: String,
        /// What the user can do.
        fix: &'static str,
    },
    /// The server refused a command.
    #[error("redis `{address}` refused while {doing}: {reason}")]
    Refused {
        /// The server.
        address: String,
        /// What was tried.
        doing: &'static str,
        /// What the server says.
        reason: String,
    },
    /// A private server could not be started.
    #[error("cannot start `redis-server` in `{dir}`: {reason}")]
    Start {
        /// Its folder.
        dir: String,
        /// Why.
        reason: String,
        /// What the user can do.
        fix: Option<&'static str>,
    },
    /// Something larger than may travel.
    #[error("`{key}` has {bytes} bytes, more than {max}")]
    TooLarge {
        /// Sample or key.
        key: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The original's request has no place for what is asked, or our side lacks what it needs.
    #[error("`distillation.wire = \"cosmos-rl\"`: {reason}")]
    Foreign {
        /// What does not fit.
        reason: String,
    },
}

impl BrokerError {
    /// Whether the config or the machine is wrong rather than the run: a bad address, a server that is not there or not fit.
    pub fn is_usage(&self) -> bool {
        let settings =
            matches!(self, BrokerError::BadAddress { .. } | BrokerError::Unfit { .. } | BrokerError::Foreign { .. });
        settings || matches!(self, BrokerError::Start { .. })
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            BrokerError::QueueFull { queue: crate::broker::REQUEST_QUEUE, .. } => {
                Some("the teacher is too slow or gone: look at its log, add teachers, or raise the queue's limit")
            }
            BrokerError::QueueFull { queue: crate::store::BLOB_STORE, .. } => {
                Some("nobody takes the blobs out: look at the policy's log, or raise the store's limit")
            }
            BrokerError::QueueFull { .. } => Some("the trainer does not fetch results: look at its log"),
            BrokerError::Closed { .. } => None,
            BrokerError::SampleInUse { .. } => Some("forget the sample before it is generated again"),
            BrokerError::BadMessage { .. } => None,
            BrokerError::BadAddress { .. } => Some(
                "give a port of this machine as text, `\"12800\"`, or `redis://user:password@host:port/db`, with TLS `rediss://`",
            ),
            BrokerError::Unreachable { .. } => Some("start the server, or correct the config key `redis`"),
            BrokerError::ServerFull { .. } => {
                Some("raise its `maxmemory` (or free its disk), add teachers, or lower the batch sizes")
            }
            BrokerError::Unfit { fix, .. } => Some(fix),
            BrokerError::Refused { .. } => Some("check user, password and rights in the config key `redis`"),
            BrokerError::Start { fix, .. } => *fix,
            BrokerError::TooLarge { .. } => {
                Some("shorten the completions, or send less per token (`top_k`, `distillation.wire_logprob_dtype`)")
            }
            BrokerError::Foreign { .. } => {
                Some("use `distillation.wire = \"native\"` where both sides are this program")
            }
            BrokerError::BadBytes { .. } => {
                Some("the other side must speak the same wire format: compare `distillation.wire` on both sides")
            }
        }
    }
}
