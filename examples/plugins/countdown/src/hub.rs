//! Problems from a dataset laid out like `HuggingFaceTB/Countdown-Task-GOLD`, read through the host's `table`.
//!
//! Training rows hold a conversation, of which the last message is the answer. Validation rows hold the prompt's
//! messages, the numbers and the target. The host renders the messages with the student's chat template.

use cosmos_plugin_sdk::host::table;
use cosmos_plugin_sdk::{Dataset, Example, Message, Prompt, Settings};
use serde::Deserialize;
use serde_json::Value;

/// `custom.countdown` of `countdown-hf.wasm`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Columns {
    messages_column: String,
    prompt_column: String,
    nums_column: String,
    target_column: String,
}

impl Default for Columns {
    fn default() -> Self {
        Columns {
            messages_column: "messages".to_owned(),
            prompt_column: "prompt".to_owned(),
            nums_column: "nums".to_owned(),
            target_column: "target".to_owned(),
        }
    }
}

/// An open table.
pub struct Hub {
    rows: table::Rows,
    validation: bool,
    columns: Columns,
    len: u64,
}

impl Hub {
    /// Opens the table that `settings.dataset` names and checks its columns.
    ///
    /// # Errors
    /// When it cannot be opened or a column is missing.
    pub fn open(validation: bool, settings: &Settings) -> Result<Self, String> {
        let columns: Columns = settings.custom("countdown")?;
        let rows = table::open(&settings.dataset.source()?)?;
        let hub = Hub { len: 0, rows, validation, columns };
        let present = hub.rows.columns();
        for column in hub.needed() {
            if !present.contains(&column) {
                return Err(format!("the dataset has no column `{column}`; it has {}", present.join(", ")));
            }
        }
        let rows = hub.rows.len();
        let len = if validation { settings.dataset.limit(rows)? } else { rows };
        Ok(Hub { len, ..hub })
    }

    fn needed(&self) -> Vec<String> {
        let columns = &self.columns;
        if self.validation {
            vec![columns.prompt_column.clone(), columns.nums_column.clone(), columns.target_column.clone()]
        } else {
            vec![columns.messages_column.clone()]
        }
    }
}

impl Dataset for Hub {
    fn len(&self) -> Result<u64, String> {
        Ok(self.len)
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        let row = self.rows.read(index, 1, &self.needed())?.pop().ok_or_else(|| format!("row {index} is missing"))?;
        let row: Value = serde_json::from_str(&row).map_err(|e| format!("row {index}: {e}"))?;
        let made = if self.validation {
            validation_example(&row, &self.columns)
        } else {
            training_example(&row, &self.columns)
        };
        made.map_err(|e| format!("row {index}: {e}"))
    }
}

fn training_example(row: &Value, columns: &Columns) -> Result<Example, String> {
    let mut messages = messages(&row[&columns.messages_column], &columns.messages_column)?;
    let answer = messages.pop().filter(|_| !messages.is_empty());
    let answer = answer.ok_or_else(|| format!("`{}` holds fewer than two messages", columns.messages_column))?;
    Ok(Example {
        prompt: Prompt::Messages(messages),
        reference: None,
        response: Some(answer.content),
        metadata: Vec::new(),
    })
}

fn validation_example(row: &Value, columns: &Columns) -> Result<Example, String> {
    let messages = messages(&row[&columns.prompt_column], &columns.prompt_column)?;
    let reference =
        serde_json::json!({"nums": row[&columns.nums_column], "target": row[&columns.target_column]}).to_string();
    crate::grade::Reference::parse(&reference)?;
    Ok(Example { prompt: Prompt::Messages(messages), reference: Some(reference), response: None, metadata: Vec::new() })
}

fn messages(value: &Value, column: &str) -> Result<Vec<Message>, String> {
    let list = value.as_array().ok_or_else(|| format!("`{column}` is not a list of messages"))?;
    let text = |message: &Value, key: &str| message[key].as_str().map(str::to_owned);
    list.iter()
        .map(|m| Some(Message { role: text(m, "role")?, content: text(m, "content")? }))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| format!("`{column}` holds something else than messages with `role` and `content`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_examples() {
        let row = serde_json::json!({
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1+2=3"}],
            "prompt": [{"role": "user", "content": "p"}], "nums": [1, 2], "target": 3,
        });
        let columns = Columns::default();
        let train = training_example(&row, &columns).unwrap();
        assert_eq!(train.response.as_deref(), Some("1+2=3"));
        assert!(matches!(&train.prompt, Prompt::Messages(m) if m.len() == 1 && m[0].content == "q"));
        let validation = validation_example(&row, &columns).unwrap();
        assert_eq!(validation.reference.as_deref(), Some(r#"{"nums":[1,2],"target":3}"#));
        assert!(validation_example(&serde_json::json!({"prompt": []}), &columns).is_err());
        assert!(training_example(&serde_json::json!({"messages": []}), &columns).is_err());
    }
}
