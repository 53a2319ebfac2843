//! What the host lends to plugins. The command that runs them provides the implementations.

use std::sync::Arc;

use crate::ChatMessage;

/// The dataset that a plugin asks for. Empty strings mean the source's own default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRequest {
    /// Hub id or local path.
    pub name: String,
    /// Hub subset (configuration).
    pub subset: String,
    /// Hub revision.
    pub revision: String,
    /// Splits, concatenated in this order.
    pub splits: Vec<String>,
}

/// Opens datasets for the import `table`.
pub trait TableSource: Send + Sync {
    /// Opens one; may block to download.
    ///
    /// # Errors
    /// A message for the plugin's author and user: what failed, where, and the fix.
    fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String>;
}

/// An open dataset.
pub trait TableRows: Send {
    /// Number of rows.
    fn len(&self) -> u64;

    /// No rows at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of the columns.
    fn columns(&self) -> Vec<String>;

    /// `count` rows from `start`, each a JSON object that holds `columns` (all when empty). The host has checked the
    /// range against [`TableRows::len`].
    ///
    /// # Errors
    /// A message that names the missing column or the broken file.
    fn read(&self, start: u64, count: u32, columns: &[String]) -> Result<Vec<String>, String>;
}

/// Renders messages with the student's chat template, for the import `chat-template`.
pub trait ChatRenderer: Send + Sync {
    /// `options_json` is a JSON object of template variables.
    ///
    /// # Errors
    /// The template's own message.
    fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        options_json: &str,
    ) -> Result<String, String>;
}

/// What this command can lend. A granted import without a provider fails when the plugin calls it.
#[derive(Clone, Default)]
pub struct Capabilities {
    /// Behind the grant `table`.
    pub table: Option<Arc<dyn TableSource>>,
    /// Behind the grant `chat-template`.
    pub chat: Option<Arc<dyn ChatRenderer>>,
}

impl std::fmt::Debug for Capabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capabilities")
            .field("table", &self.table.is_some())
            .field("chat", &self.chat.is_some())
            .finish()
    }
}
