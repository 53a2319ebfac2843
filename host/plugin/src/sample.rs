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

/// What a conversation of several turns starts from: one example of the dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpisodeStart {
    /// The example's messages; one user message when it gives ready text.
    pub messages: Vec<ChatMessage>,
    /// The example's reference JSON.
    pub reference: Option<String>,
    /// The example's metadata.
    pub metadata: Vec<(String, String)>,
}

/// A conversation that an environment opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Opened {
    /// What the model first sees; never empty.
    pub messages: Vec<ChatMessage>,
    /// Definitions for the chat template's `tools`: a JSON list.
    pub tools: Option<serde_json::Value>,
    /// What the next [`Action`] brings back.
    pub state: Vec<u8>,
}

/// What the model said in one turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// From [`Opened`] or the [`Turn`] before.
    pub state: Vec<u8>,
    /// The model's words, without the token that ended them.
    pub completion: String,
    /// How many messages the model has said before this one.
    pub turn: u32,
    /// The model ended its message itself; otherwise a limit cut it off, and no further turn follows.
    pub complete: bool,
}

/// An environment's answer to an [`Action`]. All numbers are finite and within `Limits::score_abs_max`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// What the model hears next; never empty unless `done`.
    pub messages: Vec<ChatMessage>,
    /// What the next [`Action`] brings back.
    pub state: Vec<u8>,
    /// The conversation is over.
    pub done: bool,
    /// Added to the conversation's reward.
    pub reward: f64,
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
