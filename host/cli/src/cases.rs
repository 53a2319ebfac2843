//! Recorded cases for `plugin test`: a completion, its reference and the score it must get.

use std::path::Path;

use cosmos_plugin::{PluginInfo, Reward, RewardSample};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::failure::Failure;

/// A file of cases is a test's input, not a dataset.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Cases given to the reward at a time; it makes its own batches of them.
const CASES_AT_A_TIME: usize = 1024;

/// Scores are compared as numbers that went through JSON.
const SCORE_TOLERANCE: f64 = 1e-9;

/// One case.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Names it in the output.
    id: Value,
    completion: String,
    /// Any JSON; what the reward gets as the example's reference.
    #[serde(default)]
    reference: Value,
    /// What the reward must say; absent: anything is right.
    #[serde(default)]
    score: Option<f64>,
    #[serde(default)]
    prompt: String,
    #[serde(default)]
    metadata: Map<String, Value>,
}

/// What the reward said.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// Of the case.
    pub id: Value,
    /// None when the sample failed.
    pub score: Option<f64>,
    /// As the case says.
    pub expected: Option<f64>,
    /// Why the sample failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Verdict {
    /// Whether the score is the expected one.
    pub fn agrees(&self) -> bool {
        match (self.score, self.expected) {
            (Some(score), Some(expected)) => (score - expected).abs() <= SCORE_TOLERANCE,
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

/// Reads a JSONL file of cases. Empty lines are passed over; a file without a case is an error.
pub fn read(path: &Path) -> Result<Vec<Case>, Failure> {
    let shown = path.display();
    let cannot = |e: std::io::Error| {
        Failure::usage(format!("cannot read `{shown}`: {e}")).with_hint("check the path after `--cases`")
    };
    let bytes = std::fs::metadata(path).map_err(cannot)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(Failure::usage(format!(
            "`{shown}` has {bytes} bytes, more than the {FILE_BYTES_MAX} that are read"
        )));
    }
    let text = std::fs::read_to_string(path).map_err(cannot)?;
    let mut cases = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let case: Case = serde_json::from_str(line).map_err(|e| {
            Failure::usage(format!("{shown}:{}: not a case: {e}", index + 1))
                .with_hint("a line holds `id`, `completion`, `reference` and `score`")
        })?;
        cases.push(case);
    }
    if cases.is_empty() {
        return Err(Failure::usage(format!("`{shown}` has no case")));
    }
    Ok(cases)
}

/// The reward that `asked` names or whose role it is; without it, the only one.
pub fn reward_name(info: &PluginInfo, asked: Option<&str>) -> Result<String, Failure> {
    let found = match asked {
        Some(asked) => {
            info.rewards.iter().find(|o| o.name == asked).or_else(|| info.rewards.iter().find(|o| o.role == asked))
        }
        None if info.rewards.len() == 1 => info.rewards.first(),
        None => None,
    };
    found.map(|offer| offer.name.clone()).ok_or_else(|| {
        let offers: Vec<String> = info.rewards.iter().map(|o| format!("`{}` ({})", o.name, o.role)).collect();
        let message = match asked {
            Some(asked) => format!("plugin `{}` offers no reward `{asked}`", info.name),
            None => format!("plugin `{}` offers {} rewards", info.name, offers.len()),
        };
        let failure = Failure::usage(message);
        if offers.is_empty() {
            failure
        } else {
            failure.with_hint(format!("choose one with `--reward`: {}", offers.join(", ")))
        }
    })
}

/// Scores every case.
pub fn judge(reward: &mut Reward, cases: &[Case]) -> Result<Vec<Verdict>, Failure> {
    let mut verdicts = Vec::with_capacity(cases.len());
    for group in cases.chunks(CASES_AT_A_TIME) {
        let samples: Vec<RewardSample> = group.iter().map(sample).collect();
        for (case, result) in group.iter().zip(reward.score(&samples)?) {
            let (score, error) = match result {
                Ok(score) => (Some(score.value), None),
                Err(failure) => (None, Some(failure.reason)),
            };
            verdicts.push(Verdict { id: case.id.clone(), score, expected: case.score, error });
        }
    }
    Ok(verdicts)
}

fn sample(case: &Case) -> RewardSample {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    RewardSample {
        prompt: case.prompt.clone(),
        completion: case.completion.clone(),
        reference: (!case.reference.is_null()).then(|| case.reference.to_string()),
        metadata: case.metadata.iter().map(|(key, value)| (key.clone(), text(value))).collect(),
    }
}
