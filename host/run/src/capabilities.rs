//! What the host lends to a plugin whose grants ask for it: dataset rows and the student's chat template.

use std::path::Path;
use std::sync::Arc;

use cosmos_data::chat::{ChatTemplate, Message};
use cosmos_data::dataset::{DatasetSpec, HubOptions, Table};
use cosmos_plugin::{Capabilities, ChatMessage, ChatRenderer, TableRequest, TableRows, TableSource};

use crate::error::RunError;

/// The capabilities of a run: tables from anywhere the config may name, and `chat` if the student has a template.
pub(crate) fn capabilities(chat: Option<Arc<ChatTemplate>>) -> Capabilities {
    Capabilities {
        table: Some(Arc::new(Tables { hub: HubOptions::from_env() })),
        chat: chat.map(|template| Arc::new(Renderer { template }) as Arc<dyn ChatRenderer>),
    }
}

/// What a command lends that tries a plugin outside a run: tables as in a run, and the chat template of a model folder
/// where one is named.
///
/// # Errors
/// The folder has no chat template, or one that cannot be read.
pub fn lent(model: Option<&Path>) -> Result<Capabilities, RunError> {
    Ok(capabilities(model.map(ChatTemplate::load).transpose()?.map(Arc::new)))
}

struct Tables {
    hub: HubOptions,
}

impl TableSource for Tables {
    fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String> {
        let spec = DatasetSpec {
            name: source.name.clone(),
            subset: source.subset.clone(),
            revision: source.revision.clone(),
            splits: source.splits.clone(),
            local_dir: String::new(),
        };
        let table = Table::open(&spec, &self.hub).map_err(|e| with_hint(&e))?;
        Ok(Box::new(Rows { table }))
    }
}

fn with_hint(error: &cosmos_data::DataError) -> String {
    match error.hint() {
        Some(hint) => format!("{error} (hint: {hint})"),
        None => error.to_string(),
    }
}

struct Rows {
    table: Table,
}

impl TableRows for Rows {
    fn len(&self) -> u64 {
        self.table.len()
    }

    fn columns(&self) -> Vec<String> {
        self.table.columns().iter().map(|c| c.name.clone()).collect()
    }

    fn read(&self, start: u64, count: u32, columns: &[String]) -> Result<Vec<String>, String> {
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let rows = self.table.rows(start, u64::from(count), &columns).map_err(|e| with_hint(&e))?;
        Ok(rows.into_iter().map(|row| serde_json::Value::Object(row).to_string()).collect())
    }
}

struct Renderer {
    template: Arc<ChatTemplate>,
}

impl ChatRenderer for Renderer {
    fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        options_json: &str,
    ) -> Result<String, String> {
        let options = match options_json.trim() {
            "" => serde_json::Map::new(),
            text => {
                serde_json::from_str(text).map_err(|e| format!("the template options are not a JSON object: {e}"))?
            }
        };
        let messages: Vec<Message> = messages.iter().map(|m| Message::new(&m.role, &m.content)).collect();
        self.template.render(&messages, add_generation_prompt, &options).map_err(|e| with_hint(&e))
    }
}
