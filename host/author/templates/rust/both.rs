//! A dataset of sums of two numbers below 100, and its reward: 1 when the last number of the completion is the sum.

use cosmos_plugin_sdk::*;

pub struct {{Type}};

export_plugin!({{Type}});

impl Plugin for {{Type}} {
    fn describe() -> Description {
        Description::new("{{name}}", env!("CARGO_PKG_VERSION"), "sums of two numbers")
            .dataset("{{name}}", DatasetRole::Train)
            .reward("{{name}}", RewardRole::Train)
    }

    fn dataset(_name: &str, _settings: &Settings) -> Result<Box<dyn Dataset>, String> {
        Ok(Box::new({{Type}}))
    }

    fn reward(_name: &str, _settings: &Settings) -> Result<Box<dyn Reward>, String> {
        Ok(Box::new({{Type}}))
    }
}

const NUMBERS: u64 = 100;

impl Dataset for {{Type}} {
    fn len(&self) -> Result<u64, String> {
        Ok(NUMBERS * NUMBERS)
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        let (a, b) = (index / NUMBERS, index % NUMBERS);
        let question = Message::user(format!("What is {a} + {b}? End with the number."));
        Ok(Example::messages(vec![question]).reference(a + b))
    }
}

impl Reward for {{Type}} {
    fn score(&self, sample: &Sample) -> Result<Score, String> {
        let wanted: f64 = sample.reference_as()?;
        let found = last_number(&sample.completion);
        let score = Score::new(if found == Some(wanted) { 1.0 } else { 0.0 });
        Ok(score.metric("answered", if found.is_some() { 1.0 } else { 0.0 }))
    }
}

/// The last number in `text`.
fn last_number(text: &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_digit() || c == '.' || c == '-';
    text.split(|c| !is_part(c)).filter_map(|part| part.trim_end_matches('.').parse().ok()).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_answer_to_an_example_scores_1() {
        let example = {{Type}}.get(1234).unwrap();
        let sample = Sample { reference: example.reference.unwrap(), ..Sample::new("", "12 + 34 = 46.", 0) };
        assert_eq!({{Type}}.score(&sample).unwrap().value, 1.0);
    }
}
