//! Judges what a guest gave back: nothing unusable gets past this point.

use serde::de::IgnoredAny;
use serde_json::Value;

use crate::{ChatMessage, Example, Limits, Opened, Prompt, Score, Turn};

/// What `environment.reset-batch` gave for one conversation.
pub(crate) struct RawOpened {
    pub(crate) messages: Vec<ChatMessage>,
    pub(crate) tools: String,
    pub(crate) state: Vec<u8>,
}

/// The example, or what is wrong with it.
pub(crate) fn example(example: Example) -> Result<Example, String> {
    if matches!(&example.prompt, Prompt::Messages(messages) if messages.is_empty()) {
        return Err("the prompt has no messages".into());
    }
    if let Some(reference) = &example.reference {
        serde_json::from_str::<IgnoredAny>(reference).map_err(|error| format!("the reference is not JSON: {error}"))?;
    }
    Ok(example)
}

/// The score, or what is wrong with it.
pub(crate) fn score(score: Score, limits: &Limits) -> Result<Score, String> {
    numbers("score", score.value, &score.metrics, limits)?;
    Ok(score)
}

/// The opening of a conversation, or what is wrong with it.
pub(crate) fn opened(raw: RawOpened, limits: &Limits) -> Result<Opened, String> {
    if raw.messages.is_empty() {
        return Err("the conversation opens without a message".into());
    }
    state(&raw.state, limits)?;
    let tools = match raw.tools.trim() {
        "" => None,
        text => match serde_json::from_str(text) {
            Ok(tools @ Value::Array(_)) => Some(tools),
            Ok(_) => return Err("the tools are no JSON list".into()),
            Err(error) => return Err(format!("the tools are not JSON: {error}")),
        },
    };
    Ok(Opened { messages: raw.messages, tools, state: raw.state })
}

/// The outcome of a step, or what is wrong with it.
pub(crate) fn turn(turn: Turn, limits: &Limits) -> Result<Turn, String> {
    if turn.messages.is_empty() && !turn.done {
        return Err("the conversation goes on, yet there is no message for the model".into());
    }
    state(&turn.state, limits)?;
    numbers("reward", turn.reward, &turn.metrics, limits)?;
    Ok(turn)
}

fn state(state: &[u8], limits: &Limits) -> Result<(), String> {
    if state.len() > limits.state_bytes_max {
        return Err(format!(
            "the state has {} bytes, above `state_bytes_max` = {}",
            state.len(),
            limits.state_bytes_max
        ));
    }
    Ok(())
}

fn numbers(what: &str, value: f64, metrics: &[(String, f64)], limits: &Limits) -> Result<(), String> {
    number(value, limits).map_err(|detail| format!("the {what} is {detail}"))?;
    if metrics.len() > limits.metrics_max {
        let count = metrics.len();
        return Err(format!("the {what} has {count} metrics, above `metrics_max` = {}", limits.metrics_max));
    }
    for (index, (name, value)) in metrics.iter().enumerate() {
        number(*value, limits).map_err(|detail| format!("the metric `{name}` is {detail}"))?;
        if metrics[..index].iter().any(|(other, _)| other == name) {
            return Err(format!("the metric `{name}` is given twice"));
        }
    }
    Ok(())
}

fn number(value: f64, limits: &Limits) -> Result<(), String> {
    if !value.is_finite() {
        return Err(value.to_string());
    }
    if value.abs() > limits.score_abs_max {
        return Err(format!("{value:e}, beyond `score_abs_max` = {:e}", limits.score_abs_max));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(value: f64, metrics: &[(&str, f64)]) -> Result<Score, String> {
        let metrics = metrics.iter().map(|(name, value)| (name.to_string(), *value)).collect();
        score(Score { value, metrics }, &Limits::default())
    }

    #[test]
    fn scores_must_be_usable_numbers() {
        assert_eq!(scored(-0.5, &[("a", 1.0)]).unwrap().metrics, [("a".to_string(), 1.0)]);
        assert!(scored(f64::NAN, &[]).unwrap_err().contains("NaN"));
        assert!(scored(f64::NEG_INFINITY, &[]).unwrap_err().contains("-inf"));
        assert!(scored(1e308, &[]).unwrap_err().contains("score_abs_max"));
        assert!(scored(0.0, &[("a", f64::NAN)]).unwrap_err().contains("`a`"));
        assert!(scored(0.0, &[("a", 1.0), ("a", 2.0)]).unwrap_err().contains("twice"));
        let many: Vec<_> = (0..65).map(|number| (format!("m{number}"), 0.0)).collect();
        let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        assert!(scored(0.0, &many).unwrap_err().contains("metrics_max"));
    }

    #[test]
    fn examples_must_have_messages_and_json_references() {
        let judged = |prompt, reference: Option<&str>| {
            let reference = reference.map(String::from);
            example(Example { prompt, reference, response: None, metadata: Vec::new() })
        };
        assert!(judged(Prompt::Text("x".into()), Some("{\"a\": [1]}")).is_ok());
        assert!(judged(Prompt::Text("x".into()), Some("{")).unwrap_err().contains("not JSON"));
        assert!(judged(Prompt::Messages(Vec::new()), None).unwrap_err().contains("no messages"));
    }

    #[test]
    fn conversations_must_go_on_with_a_message_and_a_small_state() {
        let limits = Limits { state_bytes_max: 4, ..Limits::default() };
        let message = || vec![ChatMessage { role: "user".into(), content: "x".into() }];
        let open = |messages, tools: &str, state: &[u8]| {
            opened(RawOpened { messages, tools: tools.into(), state: state.into() }, &limits)
        };
        assert_eq!(open(message(), "", b"1234").unwrap().tools, None);
        assert_eq!(open(message(), " [{\"type\": \"function\"}]", b"").unwrap().tools.unwrap()[0]["type"], "function");
        assert!(open(message(), "{}", b"").unwrap_err().contains("no JSON list"));
        assert!(open(message(), "[", b"").unwrap_err().contains("not JSON"));
        assert!(open(Vec::new(), "", b"").unwrap_err().contains("without a message"));
        assert!(open(message(), "", b"12345").unwrap_err().contains("`state_bytes_max` = 4"));
        let step = |messages, state: &[u8], done, reward| {
            turn(Turn { messages, state: state.into(), done, reward, metrics: Vec::new() }, &limits)
        };
        assert!(step(Vec::new(), b"", true, 1.0).is_ok());
        assert!(step(message(), b"", false, 0.0).is_ok());
        assert!(step(Vec::new(), b"", false, 0.0).unwrap_err().contains("no message"));
        assert!(step(message(), b"12345", true, 0.0).unwrap_err().contains("state_bytes_max"));
        assert!(step(message(), b"", true, f64::NAN).unwrap_err().contains("the reward is NaN"));
    }
}
