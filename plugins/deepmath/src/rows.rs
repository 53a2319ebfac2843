//! Rows of the host's table as examples.

use cosmos_plugin_sdk::host::{chat_template, table};
use cosmos_plugin_sdk::{Dataset, Example, Message, Prompt, Settings};
use serde::Deserialize;
use serde_json::Value;

use crate::extract;

/// `custom.deepmath`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Columns {
    question_column: String,
    problem_column: String,
    solution_column: String,
}

impl Default for Columns {
    fn default() -> Self {
        Columns {
            question_column: "question".to_owned(),
            problem_column: "problem".to_owned(),
            solution_column: "solution".to_owned(),
        }
    }
}

/// A table and the columns read from it.
struct Table {
    rows: table::Rows,
    columns: Vec<String>,
}

impl Table {
    fn open(settings: &Settings, columns: Vec<String>) -> Result<Self, String> {
        let rows = table::open(&settings.dataset.source()?)?;
        let present = rows.columns();
        if let Some(missing) = columns.iter().find(|c| !present.contains(c)) {
            return Err(format!("the dataset has no column `{missing}`; it has {}", present.join(", ")));
        }
        Ok(Table { rows, columns })
    }

    fn row(&self, index: u64) -> Result<Value, String> {
        let row = self.rows.read(index, 1, &self.columns)?.pop().ok_or_else(|| format!("row {index} is missing"))?;
        serde_json::from_str(&row).map_err(|e| format!("row {index}: {e}"))
    }

    /// The text in column `column` (an index into `columns`) of `row`; a number counts as its text.
    fn text(&self, row: &Value, column: usize) -> Result<String, String> {
        match &row[&self.columns[column]] {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(format!("column `{}` holds {other}, not a text", self.columns[column])),
        }
    }
}

/// Questions to distil on.
pub struct Training {
    table: Table,
}

impl Training {
    /// Opens the table that `settings.dataset` names.
    ///
    /// # Errors
    /// When it cannot be opened or lacks the question column.
    pub fn open(settings: &Settings) -> Result<Self, String> {
        let columns: Columns = settings.custom("deepmath")?;
        Ok(Training { table: Table::open(settings, vec![columns.question_column])? })
    }
}

impl Dataset for Training {
    fn len(&self) -> Result<u64, String> {
        Ok(self.table.rows.len())
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        let question = self.table.text(&self.table.row(index)?, 0)?;
        Ok(Example {
            prompt: Prompt::Text(training_prompt(&question)),
            reference: None,
            response: None,
            metadata: Vec::new(),
        })
    }
}

/// The recipe's own text: no system prompt, no template, and the completion starts inside the thoughts.
fn training_prompt(question: &str) -> String {
    format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n")
}

/// Problems with answers.
pub struct Validation {
    table: Table,
    len: u64,
}

impl Validation {
    /// Opens the table that `settings.dataset` names.
    ///
    /// # Errors
    /// When it cannot be opened or lacks a column.
    pub fn open(settings: &Settings) -> Result<Self, String> {
        let columns: Columns = settings.custom("deepmath")?;
        let table = Table::open(settings, vec![columns.problem_column, columns.solution_column])?;
        let len = settings.dataset.limit(table.rows.len())?;
        Ok(Validation { table, len })
    }
}

impl Dataset for Validation {
    fn len(&self) -> Result<u64, String> {
        Ok(self.len)
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        let row = self.table.row(index)?;
        let turn = Message { role: "user".to_owned(), content: validation_turn(&self.table.text(&row, 0)?) };
        let rendered = chat_template::render(&[turn], true, r#"{"enable_thinking": true}"#)?;
        let solution = self.table.text(&row, 1)?;
        Ok(Example {
            prompt: Prompt::Text(with_open_thoughts(rendered)),
            reference: Some(Value::from(answer_of(&solution)).to_string()),
            response: None,
            metadata: Vec::new(),
        })
    }
}

fn validation_turn(problem: &str) -> String {
    format!("{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.", problem.trim())
}

/// The completion starts inside the thoughts, whether the template opens them or not.
fn with_open_thoughts(mut prompt: String) -> String {
    if !prompt.contains("<think>") {
        prompt.push_str("<think>\n");
    }
    prompt
}

fn answer_of(solution: &str) -> &str {
    extract::last_boxed(solution).unwrap_or(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_and_references() {
        assert_eq!(training_prompt("1+1?"), "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n");
        assert_eq!(
            validation_turn(" 1+1? \n"),
            "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
        );
        assert_eq!(with_open_thoughts("a".to_owned()), "a<think>\n");
        assert_eq!(with_open_thoughts("<think>\n\n".to_owned()), "<think>\n\n");
        assert_eq!(answer_of("so \\boxed{1}, no: \\boxed{\\frac{1}{2}}."), "\\frac{1}{2}");
        assert_eq!(answer_of("204"), "204");
    }
}
