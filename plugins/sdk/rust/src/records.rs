//! Making and reading the records of the contract in few words.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    Action, DatasetOffer, DatasetRole, Description, EnvironmentOffer, Example, Message, Metric, Opened, Outcome,
    Prompt, RewardOffer, RewardRole, Sample, Score, Start, StringPair,
};

impl Description {
    /// A plugin that offers nothing yet.
    pub fn new(name: &str, version: &str, summary: &str) -> Self {
        Description {
            name: name.to_owned(),
            version: version.to_owned(),
            summary: summary.to_owned(),
            datasets: Vec::new(),
            rewards: Vec::new(),
            environments: Vec::new(),
            settings_schema: String::new(),
            wants: Vec::new(),
        }
    }

    /// Offers a dataset.
    #[must_use]
    pub fn dataset(mut self, name: &str, role: DatasetRole) -> Self {
        self.datasets.push(DatasetOffer { name: name.to_owned(), role });
        self
    }

    /// Offers a reward.
    #[must_use]
    pub fn reward(mut self, name: &str, role: RewardRole) -> Self {
        self.rewards.push(RewardOffer { name: name.to_owned(), role });
        self
    }

    /// Offers an environment.
    #[must_use]
    pub fn environment(mut self, name: &str) -> Self {
        self.environments.push(EnvironmentOffer { name: name.to_owned() });
        self
    }

    /// Says with a JSON schema which settings it takes; the host checks them before the plugin sees them.
    #[must_use]
    pub fn settings_schema(mut self, schema: &str) -> Self {
        self.settings_schema = schema.to_owned();
        self
    }

    /// Asks for a grant, as the configuration writes it: `log`, `table`, `chat-template`, `dir:/path:ro`.
    #[must_use]
    pub fn wants(mut self, grant: &str) -> Self {
        self.wants.push(grant.to_owned());
        self
    }
}

impl Message {
    /// A message of any role.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Message { role: role.to_owned(), content: content.into() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// A message of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// What a tool answered.
    pub fn tool(content: impl Into<String>) -> Self {
        Self::new("tool", content)
    }
}

impl Example {
    /// An example with a ready prompt, which the host hands to the model as it is.
    pub fn text(prompt: impl Into<String>) -> Self {
        Self::of(Prompt::Text(prompt.into()))
    }

    /// An example of messages, which the host renders with the student's chat template.
    pub fn messages(messages: Vec<Message>) -> Self {
        Self::of(Prompt::Messages(messages))
    }

    fn of(prompt: Prompt) -> Self {
        Example { prompt, reference: None, response: None, metadata: Vec::new() }
    }

    /// What the reward gets back with the completion, usually the right answer.
    #[must_use]
    pub fn reference(mut self, reference: impl Into<Value>) -> Self {
        self.reference = Some(reference.into().to_string());
        self
    }

    /// The completion to imitate in supervised fine-tuning.
    #[must_use]
    pub fn response(mut self, response: impl Into<String>) -> Self {
        self.response = Some(response.into());
        self
    }

    /// A text that travels along, to the reward and into the logs.
    #[must_use]
    pub fn meta(mut self, key: &str, value: impl Into<String>) -> Self {
        self.metadata.push(StringPair { key: key.to_owned(), value: value.into() });
        self
    }
}

impl Score {
    /// A score with no metrics.
    pub fn new(value: f64) -> Self {
        Score { value, metrics: Vec::new() }
    }

    /// A number beside the score; the run logs its mean.
    #[must_use]
    pub fn metric(mut self, name: &str, value: f64) -> Self {
        self.metrics.push(Metric { name: name.to_owned(), value });
        self
    }
}

/// A reference as text: a JSON string without its quotes, anything else as it stands.
fn as_text(reference: &str) -> String {
    serde_json::from_str::<String>(reference).unwrap_or_else(|_| reference.to_owned())
}

fn as_type<T: DeserializeOwned>(reference: &str) -> Result<T, String> {
    serde_json::from_str(reference).map_err(|e| format!("the reference is not what this plugin takes: {e}"))
}

fn find<'a>(metadata: &'a [StringPair], key: &str) -> Option<&'a str> {
    metadata.iter().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
}

impl Sample {
    /// A sample to test a reward with.
    pub fn new(prompt: &str, completion: &str, reference: impl Into<Value>) -> Self {
        Sample {
            prompt: prompt.to_owned(),
            completion: completion.to_owned(),
            reference: reference.into().to_string(),
            metadata: Vec::new(),
        }
    }

    /// The reference as text: a JSON string without its quotes, a number as it is written.
    pub fn reference_text(&self) -> String {
        as_text(&self.reference)
    }

    /// The reference as a type of yours, or as [`serde_json::Value`].
    ///
    /// # Errors
    /// The reference is something else.
    pub fn reference_as<T: DeserializeOwned>(&self) -> Result<T, String> {
        as_type(&self.reference)
    }

    /// The example's metadata of that key.
    pub fn meta(&self, key: &str) -> Option<&str> {
        find(&self.metadata, key)
    }
}

impl Start {
    /// The start of a conversation to test an environment with.
    pub fn new(messages: Vec<Message>, reference: impl Into<Value>) -> Self {
        Start { messages, reference: reference.into().to_string(), metadata: Vec::new() }
    }

    /// The reference as text: a JSON string without its quotes, a number as it is written.
    pub fn reference_text(&self) -> String {
        as_text(&self.reference)
    }

    /// The reference as a type of yours, or as [`serde_json::Value`].
    ///
    /// # Errors
    /// The reference is something else.
    pub fn reference_as<T: DeserializeOwned>(&self) -> Result<T, String> {
        as_type(&self.reference)
    }

    /// The example's metadata of that key.
    pub fn meta(&self, key: &str) -> Option<&str> {
        find(&self.metadata, key)
    }
}

impl Opened {
    /// A conversation that begins with `messages`.
    pub fn new(messages: Vec<Message>) -> Self {
        Opened { messages, tools: String::new(), state: Vec::new() }
    }

    /// Tool definitions, a JSON list, for the chat template.
    #[must_use]
    pub fn tools(mut self, tools: &Value) -> Self {
        self.tools = tools.to_string();
        self
    }

    /// What comes back with the next step; at most 65,536 bytes.
    #[must_use]
    pub fn state(mut self, state: impl Into<Vec<u8>>) -> Self {
        self.state = state.into();
        self
    }
}

impl Action {
    /// A message of the model to test an environment with.
    pub fn new(state: impl Into<Vec<u8>>, completion: &str, turn: u32) -> Self {
        Action { state: state.into(), completion: completion.to_owned(), turn, complete: true }
    }
}

impl Outcome {
    /// The conversation goes on with `messages`.
    pub fn next(messages: Vec<Message>, state: impl Into<Vec<u8>>) -> Self {
        Outcome { messages, state: state.into(), done: false, reward: 0.0, metrics: Vec::new() }
    }

    /// The conversation is over.
    pub fn done(reward: f64) -> Self {
        Outcome { messages: Vec::new(), state: Vec::new(), done: true, reward, metrics: Vec::new() }
    }

    /// What this step adds to the conversation's reward.
    #[must_use]
    pub fn reward(mut self, reward: f64) -> Self {
        self.reward = reward;
        self
    }

    /// A number beside the reward; the run logs its mean.
    #[must_use]
    pub fn metric(mut self, name: &str, value: f64) -> Self {
        self.metrics.push(Metric { name: name.to_owned(), value });
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_as_text_and_as_types() {
        assert_eq!(Sample::new("", "", "a \"b\"").reference_text(), "a \"b\"");
        assert_eq!(Sample::new("", "", 72).reference_text(), "72");
        assert_eq!(Sample::new("", "", vec![1, 2]).reference_as::<Vec<u8>>(), Ok(vec![1, 2]));
        let none = Sample { reference: String::new(), ..Sample::new("", "", 0) };
        assert_eq!(none.reference_text(), "");
        assert!(none.reference_as::<f64>().unwrap_err().contains("reference"));
    }

    #[test]
    fn examples_carry_their_reference_as_json() {
        let example = Example::text("1+1=").reference("2").response("2").meta("source", "made up");
        assert_eq!(example.reference.as_deref(), Some("\"2\""));
        assert_eq!(example.metadata[0].value, "made up");
    }
}
