//! An environment: the model guesses a hidden number and hears whether it is larger or smaller.
//!
//! The example's reference is the number. Nothing is kept here between the steps: what must be remembered travels in
//! the state, so that any instance of the plugin can go on with any conversation.

use cosmos_plugin_sdk::*;

pub struct {{Type}};

export_environment!({{Type}});

const GUESSES_MAX: u32 = 8;

impl Plugin for {{Type}} {
    fn describe() -> Description {
        Description::new("{{name}}", env!("CARGO_PKG_VERSION"), "guess a number").environment("{{name}}")
    }

    fn environment(_name: &str, _settings: &Settings) -> Result<Box<dyn Environment>, String> {
        Ok(Box::new({{Type}}))
    }
}

impl Environment for {{Type}} {
    fn reset(&self, start: &Start) -> Result<Opened, String> {
        let hidden: i64 = start.reference_as()?;
        let mut messages = vec![Message::system(format!("Guess my number. You have {GUESSES_MAX} guesses."))];
        messages.extend(start.messages.iter().cloned());
        Ok(Opened::new(messages).state(hidden.to_string()))
    }

    fn step(&self, action: &Action) -> Result<Outcome, String> {
        let state = std::str::from_utf8(&action.state).map_err(|e| e.to_string())?;
        let hidden: i64 = state.parse().map_err(|_| "the state is no number".to_owned())?;
        let guesses = action.turn + 1;
        let guess = last_integer(&action.completion);
        if guess == Some(hidden) {
            return Ok(Outcome::done(1.0).metric("guesses", f64::from(guesses)));
        }
        if guesses == GUESSES_MAX || !action.complete {
            return Ok(Outcome::done(0.0).metric("guesses", f64::from(guesses)));
        }
        let answer = match guess {
            None => "That is no number.",
            Some(guess) if guess < hidden => "Larger.",
            Some(_) => "Smaller.",
        };
        Ok(Outcome::next(vec![Message::user(answer)], action.state.clone()))
    }
}

/// The last whole number in `text`.
fn last_integer(text: &str) -> Option<i64> {
    text.split(|c: char| !c.is_ascii_digit() && c != '-').filter_map(|part| part.parse().ok()).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_game() {
        let opened = {{Type}}.reset(&Start::new(vec![Message::user("I am ready.")], 7)).unwrap();
        let next = {{Type}}.step(&Action::new(opened.state, "5", 0)).unwrap();
        assert_eq!((next.done, next.messages[0].content.as_str()), (false, "Larger."));
        let last = {{Type}}.step(&Action::new(next.state, "Then 7.", 1)).unwrap();
        assert_eq!((last.done, last.reward), (true, 1.0));
    }
}
