//! What crosses the border: examples in, scores out, and the samples that failed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// What the student is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Finished text.
    Text(String),
    /// Messages for the student's chat template.
    Messages(Vec<ChatMessage>),
}

/// One item of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// What the student is asked.
    pub prompt: Prompt,
    /// JSON that the reward gets back.
    pub reference: Option<String>,
    /// The completion to imitate, for supervised fine-tuning.
    pub response: Option<String>,
    /// Free pairs, in the plugin's order; the reward gets them back.
    pub metadata: Vec<(String, String)>,
}

/// One completion to score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardSample {
    /// The rendered prompt.
    pub prompt: String,
    /// What the model answered.
    pub completion: String,
    /// The example's reference JSON.
    pub reference: Option<String>,
    /// The example's metadata.
    pub metadata: Vec<(String, String)>,
}

/// A reward's verdict. All numbers are finite and within `Limits::score_abs_max`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The reward.
    pub value: f64,
    /// Extra numbers, by name.
    pub metrics: Vec<(String, f64)>,
}

/// One item that a plugin could not do. The others of its batch are not affected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleFailure {
    /// The plugin's name.
    pub plugin: String,
    /// Position in the list that was asked for.
    pub item: usize,
    /// The plugin's own message, the trap, or the limit that was broken. Escaped and of bounded length.
    pub reason: String,
}

impl fmt::Display for SampleFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "plugin `{}` failed on item {}: {}", self.plugin, self.item, self.reason)
    }
}

impl std::error::Error for SampleFailure {}
