//! What a run works on: the tokenizer and the prompts.

use std::path::Path;
use std::sync::Arc;

use cosmos_data::chat::{ChatTemplate, Message};
use cosmos_data::dataset::{DatasetSpec, HubOptions, Table};
use cosmos_data::tokenizer::Tokenizer;
use cosmos_plugin::{ChatMessage, Prompt};
use serde_json::Value;

use crate::error::{Result, RunError};

/// Text in and out of one model folder.
#[derive(Clone)]
pub struct Text {
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, where the folder has one.
    pub chat: Option<Arc<ChatTemplate>>,
}

impl Text {
    /// Reads the tokenizer and, if there is one, the chat template of a model folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let tokenizer = Arc::new(Tokenizer::load(folder)?);
        let has_template = folder.join("chat_template.jinja").is_file()
            || std::fs::read_to_string(folder.join("tokenizer_config.json"))
                .is_ok_and(|t| t.contains("\"chat_template\""));
        let chat = if has_template { Some(Arc::new(ChatTemplate::load(folder)?)) } else { None };
        Ok(Self { tokenizer, chat })
    }

    /// Text of generated ids. Heads are often wider than the tokenizer; ids beyond it have no text, as in transformers.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let end = self.tokenizer.id_end();
        let known: Vec<u32> = ids.iter().copied().filter(|id| *id < end).collect();
        Ok(self.tokenizer.decode(&known, true)?)
    }

    /// The text of a prompt as the student reads it.
    pub fn render(&self, prompt: &Prompt) -> Result<String> {
        match prompt {
            Prompt::Text(text) => Ok(text.clone()),
            Prompt::Messages(messages) => {
                let messages: Vec<Message> = messages.iter().map(|m| Message::new(&m.role, &m.content)).collect();
                self.render_messages(&messages, true)
            }
        }
    }

    /// The same tokenizer with the chat template of `path` in place of the model's.
    pub fn with_template(self, path: &Path, folder: &Path) -> Result<Self> {
        Ok(Self { chat: Some(Arc::new(ChatTemplate::load_file(path, folder)?)), ..self })
    }

    /// Renders messages with the model's chat template.
    pub fn render_messages(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let Some(chat) = &self.chat else {
            return Err(RunError::config(
                "",
                "the dataset gives chat messages, but the student's folder has no chat template",
                "put `chat_template.jinja` beside its `tokenizer.json`, or let the plugin give ready text",
            ));
        };
        Ok(chat.render(messages, add_generation_prompt, &serde_json::Map::new())?)
    }
}

/// One prompt, ready for the model.
#[derive(Debug, Clone)]
pub struct Item {
    /// Index of its dataset among those of the run.
    pub source: usize,
    /// What a conversation starts from: the example's messages, or its text as one of the user.
    pub messages: Vec<ChatMessage>,
    /// Rendered prompt.
    pub prompt: String,
    /// Its token ids.
    pub prompt_ids: Vec<u32>,
    /// JSON for the reward.
    pub reference: Option<String>,
    /// Completion to imitate.
    pub response: Option<String>,
    /// Metadata for the reward.
    pub metadata: Vec<(String, String)>,
    /// Spans of assistant text to train on, for conversations: token ids and mask.
    pub conversation: Option<(Vec<u32>, Vec<bool>)>,
}

/// Prompts by index.
pub enum Dataset {
    /// A plugin's.
    Plugin(cosmos_plugin::Dataset),
    /// Columns of a table, as the original's built-in dataset.
    Columns {
        /// The rows.
        table: Table,
        /// Column of the prompt text, or of the conversation.
        prompt: String,
        /// Column of the reference answer; empty: none.
        response: String,
        /// Whether `prompt` names a list of messages to train on.
        conversation: bool,
        /// System prompt to put before conversations that have none.
        system_prompt: String,
    },
}

impl Dataset {
    /// Number of prompts.
    pub fn len(&self) -> u64 {
        match self {
            Self::Plugin(d) => d.len(),
            Self::Columns { table, .. } => table.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Prompts at `indices`; a failed one is `Err` with its reason and costs only itself.
    pub fn get(&mut self, indices: &[u64], text: &Text) -> Result<Vec<std::result::Result<Item, String>>> {
        match self {
            Self::Plugin(dataset) => {
                let examples = dataset.get(indices)?;
                examples.into_iter().map(|example| plugin_item(example, text)).collect()
            }
            Self::Columns { table, prompt, response, conversation, system_prompt } => {
                let mut columns = vec![prompt.as_str()];
                if !response.is_empty() {
                    columns.push(response.as_str());
                }
                let rows = table.rows_at(indices, &columns)?;
                rows.into_iter()
                    .map(|row| {
                        if *conversation {
                            conversation_item(&row[prompt.as_str()], system_prompt, text)
                        } else {
                            column_item(&row, prompt, response, text)
                        }
                    })
                    .collect()
            }
        }
    }
}

type ItemResult = std::result::Result<Item, String>;

fn plugin_item(
    example: std::result::Result<cosmos_plugin::Example, cosmos_plugin::SampleFailure>,
    text: &Text,
) -> Result<ItemResult> {
    let example = match example {
        Ok(example) => example,
        Err(failure) => return Ok(Err(failure.to_string())),
    };
    let prompt = text.render(&example.prompt)?;
    let prompt_ids = text.tokenizer.encode(&prompt, false)?;
    if prompt_ids.is_empty() {
        return Ok(Err("the prompt is empty".into()));
    }
    let messages = match example.prompt {
        Prompt::Messages(messages) => messages,
        Prompt::Text(text) => vec![of_user(text)],
    };
    Ok(Ok(Item {
        messages,
        source: 0,
        prompt,
        prompt_ids,
        reference: example.reference,
        response: example.response,
        metadata: example.metadata,
        conversation: None,
    }))
}

fn of_user(content: String) -> ChatMessage {
    ChatMessage { role: "user".into(), content }
}

fn column_item(row: &serde_json::Map<String, Value>, prompt: &str, response: &str, text: &Text) -> Result<ItemResult> {
    let content = match &row[prompt] {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    // The original renders a plain string of the built-in dataset as one user turn when the model has a template.
    let prompt = match &text.chat {
        Some(_) => text.render_messages(&[Message::new("user", &content)], true)?,
        None => content.clone(),
    };
    let prompt_ids = text.tokenizer.encode(&prompt, false)?;
    if prompt_ids.is_empty() {
        return Ok(Err("the prompt is empty".into()));
    }
    let answer = (!response.is_empty()).then(|| match &row[response] {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    });
    Ok(Ok(Item {
        messages: vec![of_user(content)],
        source: 0,
        prompt,
        prompt_ids,
        reference: answer.as_ref().map(|a| Value::String(a.clone()).to_string()),
        response: answer,
        metadata: Vec::new(),
        conversation: None,
    }))
}

/// Renders growing prefixes of a conversation; the tokens that an assistant turn adds are the ones to train on.
fn conversation_item(value: &Value, system_prompt: &str, text: &Text) -> Result<ItemResult> {
    let Some(turns) = value.as_array() else {
        return Ok(Err("the conversation is not a list of messages".into()));
    };
    let mut messages = Vec::new();
    if !system_prompt.is_empty() && turns.first().and_then(|t| t["role"].as_str()) != Some("system") {
        messages.push(Message::new("system", system_prompt));
    }
    for turn in turns {
        match (turn["role"].as_str(), turn["content"].as_str()) {
            (Some(role), Some(content)) => messages.push(Message::new(role, content)),
            _ => return Ok(Err("a message lacks `role` or `content`".into())),
        }
    }
    let (mut ids, mut mask, mut rendered) = (Vec::new(), Vec::new(), String::new());
    for end in 1..=messages.len() {
        let assistant = messages[end - 1].role == "assistant";
        if assistant {
            let opened = text.render_messages(&messages[..end - 1], true)?;
            if let Some(added) = opened.strip_prefix(&rendered) {
                let added_ids = text.tokenizer.encode(added, false)?;
                mask.extend(added_ids.iter().map(|_| false));
                ids.extend(added_ids);
                rendered = opened;
            }
        }
        let whole = text.render_messages(&messages[..end], false)?;
        let Some(added) = whole.strip_prefix(&rendered) else {
            return Ok(Err(
                "the chat template changes earlier turns, so the assistant's tokens cannot be told apart".into()
            ));
        };
        let added_ids = text.tokenizer.encode(added, false)?;
        mask.extend(added_ids.iter().map(|_| assistant));
        ids.extend(added_ids);
        rendered = whole;
    }
    if !mask.contains(&true) {
        return Ok(Err("the conversation has no assistant turn".into()));
    }
    Ok(Ok(Item {
        messages: Vec::new(),
        source: 0,
        prompt: String::new(),
        prompt_ids: Vec::new(),
        reference: None,
        response: None,
        metadata: Vec::new(),
        conversation: Some((ids, mask)),
    }))
}

/// The built-in dataset over a table's columns, for runs without a plugin dataset.
pub fn column_dataset(
    spec: &Value,
    prompt: &str,
    response: &str,
    conversation: bool,
    system_prompt: &str,
) -> Result<Dataset> {
    let text = |key: &str| spec[key].as_str().unwrap_or_default().to_string();
    let splits = spec["split"].as_array().map(|a| a.iter().filter_map(|v| v.as_str().map(str::to_string)).collect());
    let spec = DatasetSpec {
        name: text("name"),
        subset: text("subset"),
        revision: text("revision"),
        splits: splits.unwrap_or_default(),
        local_dir: text("local_dir"),
    };
    let table = Table::open(&spec, &HubOptions::from_env())?;
    Ok(Dataset::Columns {
        table,
        prompt: prompt.into(),
        response: response.into(),
        conversation,
        system_prompt: system_prompt.into(),
    })
}
