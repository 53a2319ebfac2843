//! Problems in GSM8K's layout, read through the host's `table`: a question, and an answer that ends with `#### NUMBER`.

use cosmos_plugin_sdk::host::table;
use cosmos_plugin_sdk::serde_json::{self, Value};
use cosmos_plugin_sdk::{Dataset, Example, Message, Settings};

use crate::answer;

/// An open table.
pub struct Problems {
    rows: table::Rows,
    len: u64,
    question: String,
    answer: String,
}

impl Problems {
    /// Opens the table that `settings.dataset` names and checks its columns.
    ///
    /// # Errors
    /// When it cannot be opened or a column is missing.
    pub fn open(settings: &Settings, question: String, answer: String) -> Result<Self, String> {
        let rows = table::open(&settings.dataset.source()?)?;
        let present = rows.columns();
        for column in [&question, &answer] {
            if !present.contains(column) {
                return Err(format!("the dataset has no column `{column}`; it has {}", present.join(", ")));
            }
        }
        let len = settings.dataset.limit(rows.len())?;
        Ok(Problems { rows, len, question, answer })
    }
}

impl Dataset for Problems {
    fn len(&self) -> Result<u64, String> {
        Ok(self.len)
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        let columns = [self.question.clone(), self.answer.clone()];
        let row = self.rows.read(index, 1, &columns)?.pop().ok_or_else(|| format!("row {index} is missing"))?;
        let row: Value = serde_json::from_str(&row).map_err(|e| format!("row {index}: {e}"))?;
        example(&row, &self.question, &self.answer).map_err(|e| format!("row {index}: {e}"))
    }
}

fn example(row: &Value, question: &str, answer: &str) -> Result<Example, String> {
    let text = |column: &str| row[column].as_str().ok_or_else(|| format!("`{column}` is no text"));
    let solution = text(answer)?;
    let number =
        answer::final_answer(solution).ok_or_else(|| format!("`{answer}` does not end with `####` and a number"))?;
    Ok(Example::messages(vec![Message::user(text(question)?)]).reference(number.to_string()).response(solution))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_a_question_and_a_number() {
        let row = serde_json::json!({"q": "How many?", "a": "48/2 = <<48/2=24>>24\n#### 1,024"});
        let example = example(&row, "q", "a").unwrap();
        assert_eq!(example.reference.as_deref(), Some("\"1024\""));
        assert!(super::example(&row, "a", "q").unwrap_err().contains("####"));
        assert!(super::example(&row, "x", "a").is_err());
    }
}
