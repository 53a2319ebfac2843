//! Tool calls in a message, as Qwen's chat template asks the model to write them:
//! `<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 1"}}</tool_call>`.

use cosmos_plugin_sdk::serde_json::{self, Value};

use crate::expression;

/// The only tool.
pub const TOOL: &str = "calculator";
/// Calls of one message that are carried out.
const CALLS_MAX: usize = 8;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call: the expression to compute.
pub type Call = String;

/// The calls in a message, in order; a broken one says what is wrong with it. Empty: it calls nothing.
pub fn calls(message: &str) -> Vec<Result<Call, String>> {
    let mut calls = Vec::new();
    let mut rest = message;
    while let Some((_, inside)) = rest.split_once(OPEN) {
        if calls.len() == CALLS_MAX {
            calls.push(Err(format!("only {CALLS_MAX} calls are carried out in one message")));
            break;
        }
        let (body, after) = match inside.split_once(CLOSE) {
            Some((body, after)) => (Ok(body), after),
            None => (Err(format!("`{OPEN}` is not closed with `{CLOSE}`")), ""),
        };
        calls.push(body.and_then(parse));
        rest = after;
    }
    calls
}

fn parse(body: &str) -> Result<Call, String> {
    let call: Value = serde_json::from_str(body.trim()).map_err(|e| format!("the call is not JSON: {e}"))?;
    let name = call.get("name").and_then(Value::as_str).ok_or("the call has no `name`")?;
    if name != TOOL {
        return Err(format!("there is no tool `{}`, only `{TOOL}`", shortened(name)));
    }
    // Some models write the arguments as a text that holds JSON.
    let arguments = match call.get("arguments") {
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|e| format!("`arguments` is not JSON: {e}"))?,
        Some(arguments) => arguments.clone(),
        None => return Err("the call has no `arguments`".to_owned()),
    };
    match arguments.get("expression") {
        Some(Value::String(expression)) => Ok(expression.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        _ => Err("`arguments` has no text `expression`".to_owned()),
    }
}

/// The result of a call as the model reads it.
///
/// # Errors
/// What is wrong with the expression.
pub fn run(call: &Call) -> Result<String, String> {
    expression::value(call).map(|value| expression::shown(&value))
}

fn shortened(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn found_in_a_message() {
        assert!(calls("no call, #### 4").is_empty());
        let two = "a <tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"1+1\"}}\n</tool_call> b <tool_call>{\"name\":\"calculator\",\"arguments\":\"{\\\"expression\\\": 7}\"}</tool_call>";
        assert_eq!(calls(two), [Ok("1+1".to_owned()), Ok("7".to_owned())]);
        for (message, why) in [
            ("<tool_call>{\"name\": \"calculator\"", "is not closed"),
            ("<tool_call>[1]</tool_call>", "has no `name`"),
            ("<tool_call>one</tool_call>", "is not JSON"),
            ("<tool_call>{\"name\": \"search\", \"arguments\": {}}</tool_call>", "no tool `search`"),
            ("<tool_call>{\"name\": \"calculator\"}</tool_call>", "no `arguments`"),
            ("<tool_call>{\"name\": \"calculator\", \"arguments\": {\"x\": 1}}</tool_call>", "no text `expression`"),
        ] {
            let found = calls(message);
            assert!(found.len() == 1 && found[0].as_ref().unwrap_err().contains(why), "{message}: {found:?}");
        }
        assert_eq!(calls(&"<tool_call>1</tool_call>".repeat(50)).len(), CALLS_MAX + 1);
        assert_eq!(run(&"2*(3+4)".to_owned()), Ok("14".to_owned()));
    }
}
