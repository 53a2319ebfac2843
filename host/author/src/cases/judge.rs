//! Puts the cases to the plugin.

use cosmos_plugin::{ChatRenderer, Example, Plugin, PluginError, SampleFailure, Score};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::compare::{Difference, differences};
use super::{Case, Kind, Question, Subject, offer_name, play};
use crate::error::Result;

/// Cases given to an offer at a time; the plugin host makes its own batches of them.
const CASES_AT_A_TIME: usize = 1024;
/// Characters that a verdict shows of what was asked.
const SHOWN_CHARS: usize = 200;

/// How a case went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judged {
    /// As expected.
    Agrees,
    /// Otherwise.
    Differs,
    /// It worked, and the case does not say what must come of it.
    ExpectsNothing,
}

impl Judged {
    /// Whether the case says what must come of it.
    pub fn expects(self) -> bool {
        self != Self::ExpectsNothing
    }
}

/// What came of a case.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Of the case; null when it has none.
    pub id: Value,
    /// Its file.
    pub file: String,
    /// Its line, counted from 1.
    pub line: usize,
    /// Who was asked.
    pub kind: Kind,
    /// By name.
    pub name: String,
    /// How it went.
    pub judged: Judged,
    /// Of a reward; null when the sample failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<Value>,
    /// The score that the case expects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<Value>,
    /// Why the sample failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What is not as expected.
    pub differences: Vec<Difference>,
    /// All that came of it.
    pub got: Map<String, Value>,
    /// The beginning of what was asked.
    #[serde(skip)]
    pub asked: String,
    /// The offer could be set up.
    #[serde(skip)]
    pub opened: bool,
}

impl Verdict {
    pub(super) fn blank(case: &Case, name: &str) -> Self {
        let asked = match &case.question {
            Question::Completion { completion, .. } => completion.clone(),
            Question::Index(index) => format!("index {index}"),
            Question::Completions { completions, .. } => completions.join(" | "),
        };
        Self {
            id: case.id.clone(),
            file: case.place.file.display().to_string(),
            line: case.place.line,
            kind: case.subject.kind,
            name: name.to_owned(),
            judged: Judged::ExpectsNothing,
            score: None,
            expected: None,
            error: None,
            differences: Vec::new(),
            got: Map::new(),
            asked: shortened(&asked),
            opened: true,
        }
    }

    fn new(case: &Case, name: &str, got: Map<String, Value>) -> Self {
        let mut differences = differences(&case.expected, &got, case.tolerance);
        for difference in differences.iter_mut().filter(|d| d.got.is_null()) {
            let other = match difference.what.as_str() {
                "prompt" => "messages",
                "messages" => "prompt",
                _ => continue,
            };
            if let Some(other) = got.get(other) {
                // The other form is what there is to see.
                difference.got = other.clone();
            }
        }
        let judged = match (differences.is_empty(), case.expected.is_empty()) {
            (false, _) => Judged::Differs,
            (true, true) => Judged::ExpectsNothing,
            (true, false) => Judged::Agrees,
        };
        let is_reward = case.subject.kind == Kind::Reward;
        Self {
            judged,
            score: is_reward.then(|| got.get("score").cloned().unwrap_or(Value::Null)),
            expected: is_reward.then(|| case.expected.get("score").cloned().unwrap_or(Value::Null)),
            error: got.get("error").and_then(Value::as_str).map(str::to_owned),
            differences,
            got,
            ..Self::blank(case, name)
        }
    }

    /// Whether nothing is other than expected.
    pub fn agrees(&self) -> bool {
        self.judged != Judged::Differs
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Asks the plugin everything, and says of each case, in their order, what came of it. `settings` is for subjects whose
/// case says none, `chat` renders messages.
///
/// # Errors
/// A case is for something that the plugin does not offer, or the plugin host itself failed. Whatever the plugin
/// does is a verdict.
pub fn judge(
    plugin: &Plugin,
    cases: &[Case],
    settings: &Map<String, Value>,
    chat: Option<&dyn ChatRenderer>,
) -> Result<Vec<Verdict>> {
    // One instance for all cases of a subject, wherever they stand.
    let mut groups: Vec<(&Subject, Vec<usize>)> = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        match groups.iter_mut().find(|(subject, _)| **subject == case.subject) {
            Some((_, members)) => members.push(index),
            None => groups.push((&case.subject, vec![index])),
        }
    }
    let mut verdicts: Vec<Option<Verdict>> = cases.iter().map(|_| None).collect();
    for (subject, members) in groups {
        let name = offer_name(plugin.info(), subject.kind, subject.name.as_deref())?;
        let settings = Value::Object(subject.settings.clone().unwrap_or_else(|| settings.clone())).to_string();
        let group: Vec<&Case> = members.iter().map(|index| &cases[*index]).collect();
        let answers = match subject.kind {
            Kind::Reward => scores(plugin, &name, &settings, &group, chat),
            Kind::Dataset => examples(plugin, &name, &settings, &group),
            Kind::Environment => play::play(plugin, &name, &settings, &group),
        };
        let (answers, opened) = match answers {
            Ok(answers) => (answers, true),
            // Refused settings are something to test too.
            Err(error @ (PluginError::Call { .. } | PluginError::BadSettings { .. })) => {
                (vec![failed(&error.to_string()); group.len()], false)
            }
            Err(error) => return Err(error.into()),
        };
        for ((index, case), got) in members.iter().zip(group).zip(answers) {
            verdicts[*index] = Some(Verdict { opened, ..Verdict::new(case, &name, got) });
        }
    }
    Ok(verdicts.into_iter().flatten().collect())
}

/// What came of each case of a group.
pub(super) type Answers = std::result::Result<Vec<Map<String, Value>>, PluginError>;

pub(super) fn failed(reason: &str) -> Map<String, Value> {
    Map::from_iter([("error".to_owned(), Value::from(reason))])
}

fn scores(plugin: &Plugin, name: &str, settings: &str, cases: &[&Case], chat: Option<&dyn ChatRenderer>) -> Answers {
    let mut reward = plugin.reward(name, settings)?;
    let mut answers = Vec::with_capacity(cases.len());
    for group in cases.chunks(CASES_AT_A_TIME) {
        let asked: Vec<_> = group.iter().map(|case| case.sample(chat)).collect();
        let samples: Vec<_> = asked.iter().flatten().flatten().cloned().collect();
        let mut scored = reward.score(&samples)?.into_iter();
        answers.extend(asked.into_iter().map(|asked| match asked {
            Ok(Some(_)) => scored.next().map_or_else(|| failed("it was not scored"), score),
            Ok(None) => failed("it has no completion"),
            Err(reason) => failed(&format!("the chat template: {reason}")),
        }));
    }
    Ok(answers)
}

fn score(result: std::result::Result<Score, SampleFailure>) -> Map<String, Value> {
    match result {
        Ok(score) => Map::from_iter([
            ("score".to_owned(), json!(score.value)),
            ("metrics".to_owned(), Value::Object(numbers(score.metrics))),
        ]),
        Err(failure) => failed(&failure.reason),
    }
}

pub(super) fn numbers(metrics: Vec<(String, f64)>) -> Map<String, Value> {
    metrics.into_iter().map(|(name, value)| (name, json!(value))).collect()
}

fn examples(plugin: &Plugin, name: &str, settings: &str, cases: &[&Case]) -> Answers {
    let mut dataset = plugin.dataset(name, settings)?;
    let len = dataset.len();
    let indices: Vec<u64> = cases
        .iter()
        .map(|case| match case.question {
            Question::Index(index) => index,
            _ => u64::MAX,
        })
        .collect();
    Ok(dataset.get(&indices)?.into_iter().map(|result| example(result, len)).collect())
}

fn example(result: std::result::Result<Example, SampleFailure>, len: u64) -> Map<String, Value> {
    let example = match result {
        Ok(example) => example,
        Err(failure) => return failed(&failure.reason),
    };
    let mut got = Map::new();
    match example.prompt {
        cosmos_plugin::Prompt::Text(text) => got.insert("prompt".into(), text.into()),
        cosmos_plugin::Prompt::Messages(messages) => got.insert("messages".into(), json!(messages)),
    };
    // The host has checked that it is JSON.
    let reference = example.reference.and_then(|text| serde_json::from_str(&text).ok());
    got.insert("reference".into(), reference.unwrap_or(Value::Null));
    got.insert("response".into(), example.response.map_or(Value::Null, Value::from));
    let metadata: Map<String, Value> = example.metadata.into_iter().map(|(key, value)| (key, value.into())).collect();
    got.insert("metadata".into(), metadata.into());
    got.insert("len".into(), len.into());
    got
}
