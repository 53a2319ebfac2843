//! Word problems with a calculator: a conversation in which the model may call a tool, and the problems to go with it.
//!
//! The environment shows the model a tool called `calculator`. A message that calls it, in the words that Qwen's chat
//! template asks for, is answered with the exact result; a message that calls nothing is the final answer, which GSM8K
//! writes behind `####`. The reward is 1 when that is the right number.

pub mod answer;
pub mod call;
pub mod expression;
mod rows;

use cosmos_plugin_sdk::serde_json::{Value, json};
use cosmos_plugin_sdk::{
    Action, Dataset, DatasetRole, Description, Environment, Message, Opened, Outcome, Plugin, Settings, Start, export,
};
use serde::Deserialize;

/// The plugin.
pub struct Calculator;

export!(Calculator: dataset, environment);

/// `custom.calculator`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Options {
    instructions: String,
    explain_tool: bool,
    question_column: String,
    answer_column: String,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            instructions: "Solve the problem step by step. Compute with the tool `calculator`. When you know the answer, end with a line of `#### ` and the number alone.".to_owned(),
            explain_tool: false,
            question_column: "question".to_owned(),
            answer_column: "answer".to_owned(),
        }
    }
}

impl Plugin for Calculator {
    fn describe() -> Description {
        Description::new("calculator", env!("CARGO_PKG_VERSION"), "word problems with a calculator, several turns")
            .dataset("train", DatasetRole::Train)
            .dataset("validation", DatasetRole::Validation)
            .environment("calculator")
            .settings_schema(include_str!("../schema.json"))
            .wants("table")
    }

    fn dataset(name: &str, settings: &Settings) -> Result<Box<dyn Dataset>, String> {
        if !["train", "validation"].contains(&name) {
            return Err(format!("no dataset `{name}` here: choose `train` or `validation`"));
        }
        let Options { question_column, answer_column, .. } = settings.custom("calculator")?;
        Ok(Box::new(rows::Problems::open(settings, question_column, answer_column)?))
    }

    fn environment(name: &str, settings: &Settings) -> Result<Box<dyn Environment>, String> {
        match name {
            "calculator" => Ok(Box::new(Talk { options: settings.custom("calculator")? })),
            _ => Err(format!("no environment `{name}` here: choose `calculator`")),
        }
    }
}

/// The conversation. Its state is the right answer.
struct Talk {
    options: Options,
}

/// The tool as the chat template's `tools` takes it.
fn tools() -> Value {
    json!([{
        "type": "function",
        "function": {
            "name": call::TOOL,
            "description": "Computes an arithmetic expression exactly.",
            "parameters": {
                "type": "object",
                "properties": {
                    "expression": {
                        "type": "string",
                        "description": "Numbers, + - * / % ^ and parentheses, for example (48 + 24) / 3",
                    },
                },
                "required": ["expression"],
            },
        },
    }])
}

const HOW_TO_CALL: &str = "To call the tool, write\n<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"(48 + 24) / 3\"}}\n</tool_call>\nand end your message. It knows numbers, + - * / % ^ and parentheses.";

impl Environment for Talk {
    fn reset(&self, start: &Start) -> Result<Opened, String> {
        let reference = start.reference_text();
        let answer = answer::number(&reference).ok_or_else(|| {
            format!("the reference is {reference:?}, but must be the number that answers the question")
        })?;
        let mut instructions = self.options.instructions.clone();
        if self.options.explain_tool {
            instructions = format!("{instructions}\n\n{HOW_TO_CALL}");
        }
        let mut messages = start.messages.clone();
        match messages.first_mut().filter(|m| m.role == "system") {
            Some(first) => first.content = format!("{}\n\n{instructions}", first.content),
            None => messages.insert(0, Message::system(instructions)),
        }
        Ok(Opened::new(messages).tools(&tools()).state(answer.to_string()))
    }

    fn step(&self, action: &Action) -> Result<Outcome, String> {
        let calls = call::calls(&action.completion);
        let outcome = if !action.complete || calls.is_empty() {
            let wanted = std::str::from_utf8(&action.state).ok().and_then(answer::number);
            let wanted = wanted.ok_or("the state of the conversation is lost")?;
            let given = answer::final_answer(&action.completion);
            let right = given.as_ref() == Some(&wanted);
            Outcome::done(if right { 1.0 } else { 0.0 }).metric("answered", f64::from(u8::from(given.is_some())))
        } else {
            let results: Vec<_> =
                calls.iter().map(|call| call.as_ref().map_err(Clone::clone).and_then(call::run)).collect();
            let errors = results.iter().filter(|r| r.is_err()).count();
            let say = |result: Result<String, String>| Message::tool(result.unwrap_or_else(|e| format!("error: {e}")));
            Outcome::next(results.into_iter().map(say).collect(), action.state.clone())
                .metric("tool_calls", calls.len() as f64)
                .metric("tool_errors", errors as f64)
        };
        Ok(outcome.metric("turns", 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(custom: &str) -> Talk {
        let settings = Settings::parse(&format!(r#"{{"custom": {{"calculator": {custom}}}}}"#)).unwrap();
        Talk { options: settings.custom("calculator").unwrap() }
    }

    fn metric(outcome: &Outcome, name: &str) -> Option<f64> {
        outcome.metrics.iter().find(|m| m.name == name).map(|m| m.value)
    }

    #[test]
    fn a_conversation() {
        let talk = talk("{}");
        let opened = talk.reset(&Start::new(vec![Message::user("How many are 48 + 24, in dozens?")], "6")).unwrap();
        assert_eq!(opened.messages.iter().map(|m| m.role.as_str()).collect::<Vec<_>>(), ["system", "user"]);
        let shown: Value = serde_json::from_str(&opened.tools).unwrap();
        assert_eq!(shown[0]["function"]["name"], "calculator");
        let first = "Let me see.\n<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"(48+24)/12\"}}\n</tool_call>\n<tool_call>{\"name\": \"calculator\", \"arguments\": {\"expression\": \"1/0\"}}</tool_call>";
        let heard = talk.step(&Action::new(opened.state, first, 0)).unwrap();
        assert!(!heard.done);
        assert_eq!(heard.messages, [Message::tool("6"), Message::tool("error: division by zero")]);
        assert_eq!((metric(&heard, "tool_calls"), metric(&heard, "tool_errors")), (Some(2.0), Some(1.0)));
        let last = talk.step(&Action::new(heard.state.clone(), "So it is 6.\n#### 6.0", 1)).unwrap();
        assert!(last.done && last.reward == 1.0 && metric(&last, "answered") == Some(1.0));
        for wrong in ["#### 7", "6", "", "####"] {
            assert_eq!(talk.step(&Action::new(heard.state.clone(), wrong, 1)).unwrap().reward, 0.0, "{wrong}");
        }
        // A message that a limit cut off is the last, whatever it calls.
        let cut = Action { complete: false, ..Action::new(heard.state.clone(), first, 1) };
        assert!(talk.step(&cut).unwrap().done);
        assert!(talk.step(&Action::new("", "#### 6", 1)).is_err());
    }

    #[test]
    fn what_the_model_first_reads() {
        let own = talk(r#"{"instructions": "Be quick.", "explain_tool": true}"#);
        let start = Start::new(vec![Message::system("You are kind."), Message::user("?")], 6);
        let opened = own.reset(&start).unwrap();
        assert!(opened.messages[0].content.starts_with("You are kind.\n\nBe quick.\n\nTo call the tool"));
        assert!(own.reset(&Start::new(vec![], "six")).err().unwrap().contains("\"six\""));
        let schema: Value = serde_json::from_str(include_str!("../schema.json")).unwrap();
        assert_eq!(schema["type"], "object");
        assert!(Calculator::environment("other", &Settings::default()).is_err());
        assert!(Calculator::dataset("test", &Settings::default()).is_err());
    }
}
