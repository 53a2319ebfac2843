//! The JSON that goes over HTTP.

use cosmos_controller::{Order, OrderId, Outcome, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::identity::Identity;

/// Bytes of one request's body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Bytes of one answer.
pub const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a progress text; the rest is cut off.
pub const PROGRESS_BYTES_MAX: usize = 1 << 10;
const NAME_BYTES_MAX: usize = 128;
const ADDRESS_BYTES_MAX: usize = 256;
const REASON_BYTES_MAX: usize = 16 << 10;

/// Who asks, in every request after `join`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Who {
    pub replica: String,
    pub incarnation: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Join {
    pub replica: String,
    pub role: Role,
    pub holds: Option<u64>,
    pub address: Option<String>,
    pub identity: Identity,
    /// Chosen by the process: the same join, asked again, is not another one.
    pub nonce: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Joined {
    pub incarnation: u64,
    /// How often to be heard from while busy.
    pub beat_ms: u64,
    /// What the run's owner tells every role, such as the broker's address.
    pub info: Value,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Next {
    #[serde(flatten)]
    pub who: Who,
    pub wait_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct NextAnswer {
    /// The order to carry out, with its number; none: ask again.
    pub order: Option<(OrderId, Order)>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Beat {
    #[serde(flatten)]
    pub who: Who,
    pub order: OrderId,
    pub progress: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct BeatAnswer {
    /// Whether the order is still wanted.
    pub wanted: bool,
    /// Whether a member of the step no longer works on it, so that the others wait for it in vain.
    #[serde(default)]
    pub deserted: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Done {
    #[serde(flatten)]
    pub who: Who,
    pub order: OrderId,
    pub outcome: Outcome,
    #[serde(default)]
    pub payload: Value,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Failed {
    #[serde(flatten)]
    pub who: Who,
    pub order: OrderId,
    pub reason: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Leave {
    #[serde(flatten)]
    pub who: Who,
    /// Somebody asked it to leave, rather than the controller.
    #[serde(default)]
    pub asked: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct LeaveAnswer {
    /// It is the last of its role: it stays until the run is saved and it is told to leave.
    #[serde(default)]
    pub stay: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Reported {
    /// False: the order was reported before, or is no longer this replica's.
    pub accepted: bool,
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    #[serde(skip, default)]
    pub status: u16,
    pub kind: String,
    pub message: String,
}

impl Refusal {
    pub fn new(status: u16, kind: &str, message: impl Into<String>) -> Self {
        Self { status, kind: kind.into(), message: message.into() }
    }

    /// The request itself is wrong.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(400, "request", message)
    }
}

/// Whether a name can be a replica's: it is shown in tables and becomes a file name.
pub fn check_name(name: &str) -> Result<(), Refusal> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.starts_with('.') || !name.bytes().all(fits) {
        return Err(Refusal::new(
            400,
            "name",
            format!("a replica's name is 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_`, `.` or `:`"),
        ));
    }
    Ok(())
}

impl Join {
    pub fn check(&self) -> Result<(), Refusal> {
        check_name(&self.replica)?;
        if self.address.as_ref().is_some_and(|a| a.len() > ADDRESS_BYTES_MAX || a.contains(char::is_control)) {
            return Err(Refusal::request(format!("`address` is no address of at most {ADDRESS_BYTES_MAX} bytes")));
        }
        if !self.identity.is_bounded() {
            return Err(Refusal::request("`identity` is too large"));
        }
        Ok(())
    }
}

/// At most `max` bytes of a text, without what would disturb a terminal.
pub fn short(text: &str, max: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out
}

/// A reason, cut to what the ledger takes.
pub fn short_reason(text: &str) -> String {
    short(text, REASON_BYTES_MAX)
}
