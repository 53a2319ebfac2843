//! The Countdown numbers game: reach a target with given numbers, each used exactly once.
//!
//! `countdown.wasm` makes its problems up and needs no grant at all. `countdown-hf.wasm` (feature `hf`) reads them from
//! a dataset laid out like `HuggingFaceTB/Countdown-Task-GOLD` and needs the grant `table`. A component's imports are
//! fixed when it is built, hence two components. Both grade with the same [`grade`].

pub mod arith;
pub mod grade;
pub mod made_up;
pub mod solve;

#[cfg(feature = "hf")]
pub mod hub;

use cosmos_plugin_sdk::{
    Dataset, DatasetRole, Description, Plugin, Reward, RewardRole, Sample, Score, Settings, export_plugin,
};

/// The plugin.
pub struct Countdown;

export_plugin!(Countdown);

impl Plugin for Countdown {
    fn describe() -> Description {
        let hub = cfg!(feature = "hf");
        let (name, summary) = if hub {
            ("countdown-hf", "the Countdown numbers game, problems from a Hugging Face dataset, exact grading")
        } else {
            ("countdown", "the Countdown numbers game, every solvable problem of a chosen size, exact grading")
        };
        let description = Description::new(name, env!("CARGO_PKG_VERSION"), summary)
            .dataset("train", DatasetRole::Train)
            .dataset("validation", DatasetRole::Validation)
            .reward("countdown", RewardRole::Train)
            .reward("countdown", RewardRole::Validation)
            .settings_schema(settings_schema());
        if hub { description.wants("table") } else { description }
    }

    fn dataset(name: &str, settings: &Settings) -> Result<Box<dyn Dataset>, String> {
        let held_out = match name {
            "train" => false,
            "validation" => true,
            _ => return Err(format!("no dataset `{name}` here: choose `train` or `validation`")),
        };
        #[cfg(feature = "hf")]
        return Ok(Box::new(hub::Hub::open(held_out, settings)?));
        #[cfg(not(feature = "hf"))]
        return Ok(Box::new(made_up::MadeUp::new(held_out, settings)?));
    }

    fn reward(name: &str, _settings: &Settings) -> Result<Box<dyn Reward>, String> {
        match name {
            "countdown" => Ok(Box::new(ExactAnswer)),
            _ => Err(format!("no reward `{name}` here: choose `countdown`")),
        }
    }
}

fn settings_schema() -> &'static str {
    if cfg!(feature = "hf") { include_str!("../schema-hf.json") } else { include_str!("../schema.json") }
}

/// 1 for a right equation, else 0.
struct ExactAnswer;

impl Reward for ExactAnswer {
    fn score(&self, sample: &Sample) -> Result<Score, String> {
        let reference = grade::Reference::parse(&sample.reference)?;
        Ok(Score::new(if grade::is_right(&sample.completion, &reference) { 1.0 } else { 0.0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_is_json_and_names_are_checked() {
        let schema: serde_json::Value = serde_json::from_str(&Countdown::describe().settings_schema).unwrap();
        assert_eq!(schema["type"], "object");
        assert!(Countdown::reward("other", &Settings::default()).is_err());
        assert!(Countdown::dataset("test", &Settings::default()).is_err());
    }
}
