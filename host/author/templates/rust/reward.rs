//! A reward: 1 when the last number of the completion is the reference's.

use cosmos_plugin_sdk::*;

pub struct {{Type}};

export_reward!({{Type}});

impl Plugin for {{Type}} {
    fn describe() -> Description {
        Description::new("{{name}}", env!("CARGO_PKG_VERSION"), "is the last number the right one?")
            .reward("{{name}}", RewardRole::Train)
            .reward("{{name}}", RewardRole::Validation)
    }

    fn reward(_name: &str, _settings: &Settings) -> Result<Box<dyn Reward>, String> {
        Ok(Box::new({{Type}}))
    }
}

impl Reward for {{Type}} {
    fn score(&self, sample: &Sample) -> Result<Score, String> {
        let wanted: f64 = sample.reference_text().trim().parse().map_err(|_| "the reference is no number".to_owned())?;
        let found = last_number(&sample.completion);
        let right = found == Some(wanted);
        let score = Score::new(if right { 1.0 } else { 0.0 });
        Ok(score.metric("answered", if found.is_some() { 1.0 } else { 0.0 }))
    }
}

/// The last number in `text`; commas between digits do not count.
fn last_number(text: &str) -> Option<f64> {
    let text = text.replace(',', "");
    let is_part = |c: char| c.is_ascii_digit() || c == '.' || c == '-';
    text.split(|c| !is_part(c)).filter_map(|part| part.trim_end_matches('.').parse().ok()).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(last_number("first 12, then 1,234."), Some(1234.0));
        assert_eq!(last_number("none"), None);
    }

    #[test]
    fn scores() {
        let score = |completion: &str| {{Type}}.score(&Sample::new("", completion, 72)).unwrap().value;
        assert_eq!(score("so it is 72."), 1.0);
        assert_eq!(score("so it is 71."), 0.0);
    }
}
