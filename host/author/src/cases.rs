//! Recorded cases: what a plugin is asked, and what it must answer.
//!
//! A file of cases is JSONL. A line with `completion` asks a reward, one with `index` a dataset, one with `completions`
//! an environment. A line with none of them is a header: what it says of `reward`, `dataset`, `environment`,
//! `settings` and `tolerance` holds for the lines after it, and a case may say otherwise for itself. Fields that are
//! not known here are left alone.

mod compare;
mod judge;
mod play;
mod update;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cosmos_plugin::{ChatMessage, ChatRenderer, PluginInfo, RewardSample};
use serde_json::{Map, Value};

use crate::error::{AuthorError, Result};

pub use compare::Difference;
pub use judge::{Judged, Verdict, judge};
pub use update::update;

/// Cases are a test's input, not a dataset.
const FILE_BYTES_MAX: u64 = 1 << 28;
/// Of all files together.
const CASES_MAX: usize = 1_000_000;
/// Scores are compared as numbers that went through JSON.
pub const TOLERANCE: f64 = 1e-9;

const HINT: &str = "a case is one line of JSON with `completion` (for a reward), `index` (for a dataset) or `completions` (for an environment)";

/// Where a case stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<Path>,
    /// Counted from 1.
    pub line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What kind of offer a case is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Scores a completion.
    Reward,
    /// Gives an example.
    Dataset,
    /// Holds a conversation.
    Environment,
}

impl Kind {
    /// Its key in a case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Dataset => "dataset",
            Self::Environment => "environment",
        }
    }
}

/// Who is asked: an offer, set up with settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// Reward, dataset or environment.
    pub kind: Kind,
    /// By name or role; none: the only one.
    pub name: Option<String>,
    /// What its `init` gets; none: what the command says.
    pub settings: Option<Map<String, Value>>,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// What is this completion worth?
    Completion {
        /// The text that the model saw, or the messages that the student's template makes it of.
        prompt: Prompt,
        /// What the model said.
        completion: String,
    },
    /// What is the example at this index?
    Index(u64),
    /// What does the model hear after each of these?
    Completions {
        /// What the conversation starts from.
        messages: Vec<ChatMessage>,
        /// What the model says, turn by turn.
        completions: Vec<String>,
    },
}

/// A case's prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Ready text.
    Text(String),
    /// Messages to render.
    Messages(Vec<ChatMessage>),
}

/// One recorded case.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Where it stands.
    pub place: Place,
    /// Names it in the output; null: its place does.
    pub id: Value,
    /// Who is asked.
    pub subject: Subject,
    /// What.
    pub question: Question,
    /// The example's reference as JSON.
    pub reference: Option<String>,
    /// The example's metadata.
    pub metadata: Vec<(String, String)>,
    /// What must come of it, as far as the case says: `score`, `metrics` and `error` of a completion, else what stands
    /// under `expect`.
    pub expected: Map<String, Value>,
    /// How far a number may be off.
    pub tolerance: f64,
    /// The line as it was read.
    line: Map<String, Value>,
}

/// What a header said last.
#[derive(Debug, Clone, Default)]
struct Defaults {
    reward: Option<String>,
    dataset: Option<String>,
    environment: Option<String>,
    settings: Option<Map<String, Value>>,
    tolerance: Option<f64>,
}

/// Reads files of cases. Empty lines are passed over; files without a single case are an error.
///
/// # Errors
/// A file cannot be read, or a line is no case: file and line are named.
pub fn read(files: &[PathBuf]) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for path in files {
        read_file(path, &mut cases)?;
        if cases.len() > CASES_MAX {
            let message = format!("more than {CASES_MAX} cases");
            return Err(AuthorError::Project { place: format!("{}: ", path.display()), message, hint: String::new() });
        }
    }
    if cases.is_empty() {
        let files: Vec<String> = files.iter().map(|f| format!("`{}`", f.display())).collect();
        let message = format!("there is no case in {}", files.join(", "));
        return Err(AuthorError::project(message, HINT));
    }
    Ok(cases)
}

fn read_file(path: &Path, cases: &mut Vec<Case>) -> Result<()> {
    let text = read_text(path)?;
    let file: Arc<Path> = path.into();
    let mut defaults = Defaults::default();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = Place { file: file.clone(), line: index + 1 };
        let wrong = |message: String| AuthorError::Project {
            place: format!("{place}: "),
            message: format!("not a case: {message}"),
            hint: HINT.into(),
        };
        let fields: Map<String, Value> = serde_json::from_str(line)
            .map_err(|error| wrong(error.to_string().replace(" at line 1 column ", ", column ")))?;
        if let Some(case) = parse(fields, &place, &mut defaults).map_err(wrong)? {
            cases.push(case);
        }
    }
    Ok(())
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::metadata(path).map_err(AuthorError::io("cannot read the cases", path))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(AuthorError::Project {
            place: format!("{}: ", path.display()),
            message: format!("it has {bytes} bytes, more than the {FILE_BYTES_MAX} that are read"),
            hint: "cases are examples of what matters: keep some hundred".into(),
        });
    }
    std::fs::read_to_string(path).map_err(AuthorError::io("cannot read the cases", path))
}

/// The case of a line, or none when it is a header.
fn parse(
    fields: Map<String, Value>,
    place: &Place,
    defaults: &mut Defaults,
) -> std::result::Result<Option<Case>, String> {
    let own = Defaults {
        reward: text(&fields, "reward")?,
        dataset: text(&fields, "dataset")?,
        environment: text(&fields, "environment")?,
        settings: object(&fields, "settings")?,
        tolerance: number(&fields, "tolerance")?,
    };
    if own.tolerance.is_some_and(|t| t < 0.0) {
        return Err("`tolerance` must not be negative".into());
    }
    let Some((kind, question)) = question(&fields)? else {
        let header = ["reward", "dataset", "environment", "settings", "tolerance"];
        if !fields.keys().any(|key| header.contains(&key.as_str())) || fields.contains_key("id") {
            return Err("it has none of `completion`, `index` and `completions`".into());
        }
        defaults.reward = own.reward.or(defaults.reward.take());
        defaults.dataset = own.dataset.or(defaults.dataset.take());
        defaults.environment = own.environment.or(defaults.environment.take());
        defaults.settings = own.settings.or(defaults.settings.take());
        defaults.tolerance = own.tolerance.or(defaults.tolerance.take());
        return Ok(None);
    };
    let name = match kind {
        Kind::Reward => own.reward.or(defaults.reward.clone()),
        Kind::Dataset => own.dataset.or(defaults.dataset.clone()),
        Kind::Environment => own.environment.or(defaults.environment.clone()),
    };
    let reference = fields.get("reference").filter(|reference| !reference.is_null()).map(Value::to_string);
    Ok(Some(Case {
        place: place.clone(),
        id: fields.get("id").cloned().unwrap_or(Value::Null),
        subject: Subject { kind, name, settings: own.settings.or(defaults.settings.clone()) },
        question,
        reference: if kind == Kind::Dataset { None } else { reference },
        metadata: metadata(&fields)?,
        expected: expected(kind, &fields)?,
        tolerance: own.tolerance.or(defaults.tolerance).unwrap_or(TOLERANCE),
        line: fields,
    }))
}

fn question(fields: &Map<String, Value>) -> std::result::Result<Option<(Kind, Question)>, String> {
    let asked: Vec<&str> =
        ["completion", "index", "completions"].into_iter().filter(|key| fields.contains_key(*key)).collect();
    match asked[..] {
        [] => Ok(None),
        ["completion"] => {
            let completion = text(fields, "completion")?.ok_or("`completion` must be a text")?;
            let prompt = match (text(fields, "prompt")?, messages(fields)?) {
                (Some(_), Some(_)) => return Err("it has both `prompt` and `messages`".into()),
                (prompt, None) => Prompt::Text(prompt.unwrap_or_default()),
                (None, Some(messages)) => Prompt::Messages(messages),
            };
            Ok(Some((Kind::Reward, Question::Completion { prompt, completion })))
        }
        ["index"] => {
            let index = fields.get("index").and_then(Value::as_u64).ok_or("`index` must be a whole number from 0")?;
            Ok(Some((Kind::Dataset, Question::Index(index))))
        }
        ["completions"] => {
            let wrong = "`completions` must be a list of texts";
            let list = fields.get("completions").and_then(Value::as_array).ok_or(wrong)?;
            let completions: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
            let messages = match (text(fields, "prompt")?, messages(fields)?) {
                (Some(_), Some(_)) => return Err("it has both `prompt` and `messages`".into()),
                (Some(prompt), None) => vec![ChatMessage { role: "user".into(), content: prompt }],
                (None, Some(messages)) => messages,
                (None, None) => return Err("it has neither `prompt` nor `messages`".into()),
            };
            let question = Question::Completions { messages, completions: completions.ok_or(wrong)? };
            Ok(Some((Kind::Environment, question)))
        }
        _ => Err(format!("it has `{}`, but only one of them says what is asked", asked.join("` and `"))),
    }
}

fn expected(kind: Kind, fields: &Map<String, Value>) -> std::result::Result<Map<String, Value>, String> {
    if kind != Kind::Reward {
        return Ok(object(fields, "expect")?.unwrap_or_default());
    }
    let mut expected = Map::new();
    if let Some(score) = number(fields, "score")? {
        expected.insert("score".into(), score.into());
    }
    if let Some(metrics) = object(fields, "metrics")? {
        if let Some((name, _)) = metrics.iter().find(|(_, value)| !value.is_number()) {
            return Err(format!("the metric `{name}` must be a number"));
        }
        expected.insert("metrics".into(), metrics.into());
    }
    if let Some(error) = text(fields, "error")? {
        if !expected.is_empty() {
            return Err("it expects both an `error` and a score".into());
        }
        expected.insert("error".into(), error.into());
    }
    Ok(expected)
}

fn metadata(fields: &Map<String, Value>) -> std::result::Result<Vec<(String, String)>, String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Ok(object(fields, "metadata")?.unwrap_or_default().iter().map(|(key, value)| (key.clone(), text(value))).collect())
}

fn text(fields: &Map<String, Value>, key: &str) -> std::result::Result<Option<String>, String> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("`{key}` must be a text")),
    }
}

fn number(fields: &Map<String, Value>, key: &str) -> std::result::Result<Option<f64>, String> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("`{key}` must be a number")),
    }
}

fn object(fields: &Map<String, Value>, key: &str) -> std::result::Result<Option<Map<String, Value>>, String> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object.clone())),
        Some(_) => Err(format!("`{key}` must be an object")),
    }
}

fn messages(fields: &Map<String, Value>) -> std::result::Result<Option<Vec<ChatMessage>>, String> {
    match fields.get("messages") {
        None | Some(Value::Null) => Ok(None),
        Some(list) => serde_json::from_value(list.clone())
            .map(Some)
            .map_err(|_| "`messages` must be a list of {\"role\": \"…\", \"content\": \"…\"}".into()),
    }
}

impl Case {
    /// The sample of a case for a reward; none for the others. Messages are rendered with the template, or as ChatML
    /// where there is none.
    ///
    /// # Errors
    /// The template's own words.
    pub fn sample(&self, chat: Option<&dyn ChatRenderer>) -> std::result::Result<Option<RewardSample>, String> {
        let Question::Completion { prompt, completion } = &self.question else { return Ok(None) };
        let prompt = match (prompt, chat) {
            (Prompt::Text(text), _) => text.clone(),
            (Prompt::Messages(messages), Some(chat)) => chat.render(messages, true, "{}")?,
            (Prompt::Messages(messages), None) => chat_ml(messages),
        };
        Ok(Some(RewardSample {
            prompt,
            completion: completion.clone(),
            reference: self.reference.clone(),
            metadata: self.metadata.clone(),
        }))
    }

    /// Its id, or its place.
    pub fn name(&self) -> String {
        match &self.id {
            Value::Null => self.place.to_string(),
            Value::String(id) => id.clone(),
            other => other.to_string(),
        }
    }
}

fn chat_ml(messages: &[ChatMessage]) -> String {
    let turn = |message: &ChatMessage| format!("<|im_start|>{}\n{}<|im_end|>\n", message.role, message.content);
    messages.iter().map(turn).chain(["<|im_start|>assistant\n".to_owned()]).collect()
}

/// The offer that `asked` names or whose role it is; without it, the only one.
///
/// # Errors
/// There is none, or several to choose from.
pub fn offer_name(info: &PluginInfo, kind: Kind, asked: Option<&str>) -> Result<String> {
    let offers: Vec<(&str, &str)> = match kind {
        Kind::Reward => info.rewards.iter().map(|o| (o.name.as_str(), o.role.as_str())).collect(),
        Kind::Dataset => info.datasets.iter().map(|o| (o.name.as_str(), o.role.as_str())).collect(),
        Kind::Environment => info.environments.iter().map(|name| (name.as_str(), "")).collect(),
    };
    let mut names: Vec<&str> = offers.iter().map(|(name, _)| *name).collect();
    names.dedup();
    let found = match asked {
        Some(asked) => {
            offers.iter().find(|(name, _)| *name == asked).or(offers.iter().find(|(_, role)| *role == asked))
        }
        // One name in several roles leaves nothing to choose.
        None if names.len() == 1 => offers.first(),
        None => None,
    };
    if let Some((name, _)) = found {
        return Ok((*name).to_owned());
    }
    let kind = kind.name();
    let shown =
        |(name, role): &(&str, &str)| if role.is_empty() { format!("`{name}`") } else { format!("`{name}` ({role})") };
    let list: Vec<String> = offers.iter().map(shown).collect();
    let (message, hint) = match (asked, list.is_empty()) {
        (_, true) => (format!("plugin `{}` offers no {kind}", info.name), String::new()),
        (Some(asked), false) => {
            (format!("plugin `{}` offers no {kind} `{asked}`", info.name), format!("it offers {}", list.join(", ")))
        }
        (None, false) => (
            format!("plugin `{}` offers {} {kind}s", info.name, list.len()),
            format!("choose one with `\"{kind}\": \"NAME\"` in the cases or a header line: {}", list.join(", ")),
        ),
    };
    Err(AuthorError::project(message, hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_str(text: &str) -> Result<Vec<Case>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&[path])
    }

    #[test]
    fn headers_hold_for_the_lines_after_them() {
        let cases = read_str(concat!(
            "{\"id\": 1, \"completion\": \"a\", \"score\": 1}\n\n",
            "{\"reward\": \"train\", \"settings\": {\"x\": 1}, \"tolerance\": 0.5}\n",
            "{\"completion\": \"b\", \"messages\": [{\"role\": \"user\", \"content\": \"q\"}], \"extra\": [1]}\n",
            "{\"completion\": \"c\", \"reward\": \"filter\", \"settings\": {}, \"error\": \"no\"}\n",
            "{\"index\": 3, \"dataset\": \"train\", \"expect\": {\"prompt\": \"p\"}}\n",
            "{\"completions\": [\"x\"], \"prompt\": \"p\"}\n",
        ))
        .unwrap();
        assert_eq!(cases.iter().map(|c| c.place.line).collect::<Vec<_>>(), [1, 4, 5, 6, 7]);
        assert_eq!(cases[0].subject, Subject { kind: Kind::Reward, name: None, settings: None });
        assert_eq!((cases[1].subject.name.as_deref(), cases[1].tolerance), (Some("train"), 0.5));
        assert_eq!(cases[1].subject.settings.as_ref().unwrap()["x"], 1);
        let sample = cases[1].sample(None).unwrap().unwrap();
        assert_eq!(sample.prompt, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(cases[2].subject.name.as_deref(), Some("filter"));
        assert!(cases[2].subject.settings.as_ref().unwrap().is_empty());
        assert_eq!(cases[2].expected["error"], "no");
        assert_eq!((cases[3].subject.kind, &cases[3].question), (Kind::Dataset, &Question::Index(3)));
        assert_eq!(cases[4].subject.kind, Kind::Environment);
        assert!(cases[1].name().ends_with("c.jsonl:4"), "{}", cases[1].name());
    }

    #[test]
    fn what_is_no_case_is_refused_with_its_line() {
        for (line, why) in [
            ("{", "EOF"),
            ("[1]", "map"),
            ("{\"id\": 1}", "none of `completion`"),
            ("{\"prompt\": \"p\"}", "none of `completion`"),
            ("{\"completion\": 3}", "`completion` must be a text"),
            ("{\"completion\": \"\", \"index\": 0}", "only one of them"),
            ("{\"completion\": \"\", \"score\": \"1\"}", "`score` must be a number"),
            ("{\"completion\": \"\", \"metrics\": {\"a\": []}}", "metric `a`"),
            ("{\"completion\": \"\", \"score\": 1, \"error\": \"x\"}", "both an `error`"),
            ("{\"completion\": \"\", \"prompt\": \"\", \"messages\": []}", "both `prompt` and `messages`"),
            ("{\"completion\": \"\", \"messages\": [{\"role\": 1}]}", "`messages` must be"),
            ("{\"completion\": \"\", \"tolerance\": -1}", "negative"),
            ("{\"index\": -1}", "`index` must be"),
            ("{\"completions\": [1], \"prompt\": \"\"}", "list of texts"),
            ("{\"completions\": []}", "neither `prompt` nor"),
            ("{\"settings\": 3}", "`settings` must be an object"),
        ] {
            let error = read_str(&format!("{{\"completion\": \"a\"}}\n{line}\n")).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("c.jsonl:2: not a case") && text.contains(why), "{line}: {text}");
            assert!(error.hint().is_some());
        }
        assert!(read_str("{\"reward\": \"train\"}\n").unwrap_err().to_string().contains("no case in"));
        assert!(read(&["no-such.jsonl".into()]).unwrap_err().to_string().contains("no-such.jsonl"));
    }
}
