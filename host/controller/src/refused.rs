//! Reports that cannot be true. They change nothing.

use std::fmt;

use crate::{OrderId, Role};

/// Replicas of a run at most, lost ones included.
pub const REPLICAS_MAX: usize = 16_384;
/// Length of a replica's name at most.
pub const NAME_BYTES_MAX: usize = 256;
/// Length of a replica's address at most.
pub const ADDRESS_BYTES_MAX: usize = 1024;

/// Why an event was refused. The state is as before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// The name is empty or too long.
    Name {
        /// Its length.
        bytes: usize,
    },
    /// The address is too long.
    Address {
        /// Whose.
        replica: String,
        /// Its length.
        bytes: usize,
    },
    /// The name belongs to a replica of another role.
    OtherRole {
        /// The name.
        replica: String,
        /// What the known one does.
        known: Role,
        /// What the new one says it does.
        claimed: Role,
    },
    /// There are [`REPLICAS_MAX`] already.
    TooMany {
        /// Who wanted to join.
        replica: String,
    },
    /// The order was never given to anybody.
    NoSuchOrder {
        /// Who reported it.
        replica: String,
        /// The order.
        order: OrderId,
    },
    /// The result does not answer the order.
    OtherOutcome {
        /// Who reported it.
        replica: String,
        /// The order.
        order: OrderId,
    },
    /// Samples that the order did not ask for, or not in ascending order.
    Samples {
        /// Who reported it.
        replica: String,
        /// The order.
        order: OrderId,
        /// The first that is wrong.
        sample: u64,
    },
}

impl Refused {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Name { .. } | Self::Address { .. } => "give the replica a short name and address",
            Self::OtherRole { .. } => {
                "a replica's name is unique in the run over all roles; start it under another one"
            }
            Self::TooMany { .. } => "remove replicas that will not come back",
            Self::NoSuchOrder { .. } => {
                "it may belong to another run; check the address and the token of the controller"
            }
            Self::OtherOutcome { .. } | Self::Samples { .. } => {
                "the replica is of another version of this program, or broken; stop it"
            }
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { bytes } => write!(f, "a replica's name has {bytes} bytes, not 1 to {NAME_BYTES_MAX}"),
            Self::Address { replica, bytes } => {
                write!(f, "the address of `{replica}` has {bytes} bytes, more than {ADDRESS_BYTES_MAX}")
            }
            Self::OtherRole { replica, known, claimed } => {
                write!(f, "`{replica}` joined as a {claimed}, but is known as a {known}")
            }
            Self::TooMany { replica } => {
                write!(f, "`{replica}` cannot join: there are {REPLICAS_MAX} replicas already")
            }
            Self::NoSuchOrder { replica, order } => {
                write!(f, "`{replica}` reported order {}, which was never given out", order.0)
            }
            Self::OtherOutcome { replica, order } => {
                write!(f, "what `{replica}` reported for order {} is no answer to it", order.0)
            }
            Self::Samples { replica, order, sample } => {
                write!(f, "`{replica}` reported sample {sample} for order {}, which did not ask for it there", order.0)
            }
        }
    }
}

impl std::error::Error for Refused {}
