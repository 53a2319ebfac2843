//! Messages to prompt text, by the Jinja template that came with the model.
//!
//! A template is part of a downloaded model, so it is treated as untrusted: it can reach nothing but its messages, and a
//! budget bounds its time and memory. The template engine leaves two gaps: adding a list to itself more than thirty times
//! over, and `~` with a list that holds the same list many times, take time and memory that nobody counts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::error::DataError;
use crate::python_json;

/// Bytes of a template or of a tokenizer configuration.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// What rendering a short conversation may spend: about one unit an instruction and one for 64 bytes of text, so at most
/// some seconds and 64 MB. Real templates spend a few thousand.
const FUEL: u64 = 1_000_000;
/// Bytes of messages and options from which on a rendering gets one more unit a byte.
const LONG_BYTES: u64 = 100_000;
/// The most that a long conversation gets on top.
const LONG_FUEL_MAX: u64 = 20_000_000;
/// Stack of the thread that renders, bytes; only what is touched takes memory.
const STACK_BYTES: usize = 512 << 20;
/// Bytes of text that a unit of fuel pays for, as the template engine counts its own.
const BYTES_PER_FUEL: u64 = 64;
/// How deep macros may call each other.
const RECURSION_MAX: usize = 100;
/// How deep the JSON of messages and options may nest.
const DEPTH_MAX: usize = 100;
/// Stands for an assistant's message: a word that templates neither trim nor escape. It grows where a text holds it.
const STAND_IN: &str = "zqMessageq";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or whatever the template knows.
    pub role: String,
    /// A text, or a list of parts for templates that know them; `None` when the message has no such key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<serde_json::Value>,
    /// Other keys, such as `reasoning_content` or `tool_calls`.
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Message {
    /// A message with a text and nothing else.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into().into()), extra: Map::new() }
    }
}

/// What a template puts behind an assistant's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AfterTurn {
    /// What ends the message, for example `<|im_end|>` and a line break.
    pub closing: String,
    /// The same, then the messages that follow and, where asked for, the head of the next turn.
    pub whole: String,
}

/// A model's chat template, parsed and ready.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Name of a template to the file that it came from. The usual one is called `default`.
    sources: BTreeMap<String, PathBuf>,
    /// `bos_token` and the like, as far as the tokenizer has them.
    special_tokens: BTreeMap<String, String>,
    folder: PathBuf,
}

impl ChatTemplate {
    /// Reads the template of a model folder: `chat_template.jinja`, else `chat_template` in `chat_template.json` or in
    /// `tokenizer_config.json` (a text, or a list of named ones); named ones also from `additional_chat_templates/`.
    /// Special tokens come from `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// # Errors
    /// [`DataError::NoTemplate`], or [`DataError::Template`] with the line of a syntax error.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, DataError> {
        let folder = folder.as_ref();
        let mut found = Sources::default();
        let config_path = folder.join("tokenizer_config.json");
        let config = read_config(&config_path)?;
        if let Some(config) = &config {
            found.add(config.get("chat_template"), &config_path)?;
        }
        let legacy_path = folder.join("chat_template.json");
        if let Some(legacy) = read_config(&legacy_path)? {
            found.add(legacy.get("chat_template"), &legacy_path)?;
        }
        found.add_files(&folder.join("additional_chat_templates"))?;
        let jinja_path = folder.join("chat_template.jinja");
        if jinja_path.is_file() {
            found.0.insert("default".into(), (jinja_path.clone(), read_text(&jinja_path)?));
        }
        if found.0.is_empty() {
            return Err(DataError::NoTemplate { path: folder.to_owned(), found: Vec::new() });
        }
        Self::build(folder.to_owned(), found, special_tokens(folder, config.as_ref())?)
    }

    /// A template from a file of its own, with the special tokens of a model folder.
    ///
    /// # Errors
    /// [`DataError::Io`] when there is no such file, [`DataError::Template`] with the line of a syntax error.
    pub fn load_file(path: impl AsRef<Path>, folder: impl AsRef<Path>) -> Result<Self, DataError> {
        let (path, folder) = (path.as_ref(), folder.as_ref());
        let found = Sources([("default".to_owned(), (path.to_owned(), read_text(path)?))].into());
        let config = read_config(&folder.join("tokenizer_config.json"))?;
        Self::build(folder.to_owned(), found, special_tokens(folder, config.as_ref())?)
    }

    /// A template given as text. `name` stands for the file in messages; `special_tokens` are visible to the template
    /// by their names, such as (`bos_token`, `<s>`).
    ///
    /// # Errors
    /// [`DataError::Template`] with the line of a syntax error.
    pub fn from_source(name: &str, source: &str, special_tokens: &[(&str, &str)]) -> Result<Self, DataError> {
        let found = Sources([("default".to_owned(), (PathBuf::from(name), source.to_owned()))].into());
        let special_tokens = special_tokens.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Self::build(PathBuf::from(name), found, special_tokens)
    }

    fn build(folder: PathBuf, found: Sources, special_tokens: BTreeMap<String, String>) -> Result<Self, DataError> {
        let mut environment = environment().map_err(|error| template_error(&folder, &error))?;
        let mut sources = BTreeMap::new();
        for (name, (path, text)) in found.0 {
            let parsed = environment.add_template_owned(name.clone(), without_generation_tags(&text));
            parsed.map_err(|error| template_error(&path, &error))?;
            sources.insert(name, path);
        }
        Ok(Self { environment, sources, special_tokens, folder })
    }

    /// The prompt text of `messages`. `add_generation_prompt` appends the head of the assistant's next turn. `options`
    /// are visible to the template by name: `enable_thinking`, `tools`, `documents` and whatever else it knows; they
    /// win over the special tokens of the same name. A template called `tool_use` is taken when `tools` is given.
    ///
    /// # Errors
    /// [`DataError::Template`] with file and line: the template raised an exception, used what is undefined, or
    /// exceeded its budget.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        options: &Map<String, serde_json::Value>,
    ) -> Result<String, DataError> {
        let with_tools = options.get("tools").is_some_and(|tools| !tools.is_null());
        let name = if with_tools && self.sources.contains_key("tool_use") { "tool_use" } else { "default" };
        let (Some(path), Ok(template)) = (self.sources.get(name), self.environment.get_template(name)) else {
            let found = self.sources.keys().cloned().collect();
            return Err(DataError::NoTemplate { path: self.folder.clone(), found });
        };
        let too_deep = || DataError::Template {
            name: path.display().to_string(),
            line: None,
            detail: format!("the messages or options nest deeper than {DEPTH_MAX} levels"),
        };
        let of_messages = messages.iter().flat_map(|m| m.content.iter().chain(m.extra.values())).map(text_bytes);
        let bytes = of_messages.chain(options.values().map(text_bytes)).fold(0, u64::saturating_add);
        let messages = messages.iter().map(|m| message_value(m).ok_or_else(too_deep)).collect::<Result<Vec<_>, _>>()?;
        // As in transformers, these two are always defined.
        let mut context: BTreeMap<String, Value> =
            [("tools".to_owned(), Value::from(())), ("documents".to_owned(), Value::from(()))].into();
        context.extend(self.special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))));
        for (name, option) in options {
            context.insert(name.clone(), json_value(option, DEPTH_MAX).ok_or_else(too_deep)?);
        }
        context.insert("messages".into(), Value::from(messages));
        context.insert("add_generation_prompt".into(), Value::from(add_generation_prompt));
        if bytes < LONG_BYTES {
            return on_a_deep_stack(path, || template.render(Value::from(context)));
        }
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL.saturating_add(bytes.min(LONG_FUEL_MAX))));
        on_a_deep_stack(path, || environment.get_template(name)?.render(Value::from(context)))
    }

    /// What stands after an assistant's message, whatever it said, when `next` follows it: rendered with a stand-in for
    /// the message and cut off behind it. So a conversation can go on behind the very tokens that a model sampled, and a
    /// template that rewrites earlier turns (Qwen3's drops their thinking) changes nothing of what the model has seen.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; and [`DataError::Template`] when the template does not print the message exactly
    /// once, or closes it differently once others follow: then nothing can be put behind it.
    pub fn after_turn(
        &self,
        history: &[Message],
        next: &[Message],
        add_generation_prompt: bool,
        options: &Map<String, serde_json::Value>,
    ) -> Result<AfterTurn, DataError> {
        let mut stand_in = STAND_IN.to_owned();
        let texts = || history.iter().chain(next).flat_map(|m| m.content.iter().chain(m.extra.values()));
        while texts().chain(options.values()).any(|json| holds(json, &stand_in)) {
            stand_in.push('q');
        }
        let unfit = |detail: &str| DataError::Template {
            name: self.sources.values().next().unwrap_or(&self.folder).display().to_string(),
            line: None,
            detail: detail.to_owned(),
        };
        let mut messages = history.to_vec();
        messages.push(Message::new("assistant", stand_in.as_str()));
        let behind = |text: String| match text.split_once(&stand_in) {
            Some((_, behind)) if !behind.contains(&stand_in) => Ok(behind.to_owned()),
            Some(_) => Err(unfit("it prints an assistant's message more than once, so no turn can follow it")),
            None => Err(unfit("it does not print an assistant's message as it is, so no turn can follow it")),
        };
        let closing = behind(self.render(&messages, false, options)?)?;
        messages.extend_from_slice(next);
        let whole = behind(self.render(&messages, add_generation_prompt, options)?)?;
        if !whole.starts_with(&closing) {
            return Err(unfit(
                "it ends an assistant's message in another way once more messages follow, so no turn can follow it",
            ));
        }
        Ok(AfterTurn { closing, whole })
    }

    /// A special token by its name, such as `bos_token`, as the tokenizer's configuration gives it.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name).map(String::as_str)
    }

    /// Makes `strftime_now` tell this time (seconds since 1970, shown in UTC) instead of the machine's, so that prompts
    /// stay the same when a run goes on the next day.
    ///
    /// # Errors
    /// [`DataError::Template`] when the time is beyond the calendar (years −9999 to 9999).
    pub fn set_clock(&mut self, unix_seconds: i64) -> Result<(), DataError> {
        let time = jiff::Timestamp::from_second(unix_seconds).map_err(|error| DataError::Template {
            name: self.folder.display().to_string(),
            line: None,
            detail: error.to_string(),
        })?;
        let time = time.to_zoned(jiff::tz::TimeZone::UTC);
        self.environment.add_function("strftime_now", move |format: &str| strftime(format, &time));
        Ok(())
    }
}

/// Template texts by name, each with the file that it came from.
#[derive(Default)]
struct Sources(BTreeMap<String, (PathBuf, String)>);

impl Sources {
    fn add(&mut self, templates: Option<&serde_json::Value>, path: &Path) -> Result<(), DataError> {
        let Some(templates) = templates.filter(|t| !t.is_null()) else { return Ok(()) };
        if let Some(text) = templates.as_str() {
            self.0.insert("default".into(), (path.to_owned(), text.to_owned()));
            return Ok(());
        }
        let broken = || {
            DataError::broken(path, "`chat_template` must be a text, or a list of objects with `name` and `template`")
        };
        for named in templates.as_array().ok_or_else(broken)? {
            let part = |key: &str| named.get(key).and_then(serde_json::Value::as_str).ok_or_else(broken);
            self.0.insert(part("name")?.to_owned(), (path.to_owned(), part("template")?.to_owned()));
        }
        Ok(())
    }

    fn add_files(&mut self, folder: &Path) -> Result<(), DataError> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
        for entry in entries {
            let path = entry.map_err(DataError::io("list", folder))?.path();
            if path.extension().is_some_and(|e| e == "jinja")
                && let Some(name) = path.file_stem().and_then(|s| s.to_str())
            {
                self.0.insert(name.to_owned(), (path.clone(), read_text(&path)?));
            }
        }
        Ok(())
    }
}

fn read_text(path: &Path) -> Result<String, DataError> {
    let size_bytes = std::fs::metadata(path).map_err(DataError::io("read", path))?.len();
    if size_bytes > FILE_BYTES_MAX {
        return Err(DataError::TooLarge {
            what: format!("`{}`", path.display()),
            size: format!("{size_bytes} bytes"),
            limit: format!("{FILE_BYTES_MAX} bytes"),
        });
    }
    std::fs::read_to_string(path).map_err(DataError::io("read", path))
}

/// A JSON object from a file that may be missing.
fn read_config(path: &Path) -> Result<Option<Map<String, serde_json::Value>>, DataError> {
    if !path.is_file() {
        return Ok(None);
    }
    let config = serde_json::from_str(&read_text(path)?).map_err(|error| DataError::Broken {
        path: path.to_owned(),
        line: Some(error.line() as u64),
        detail: error.to_string(),
    })?;
    Ok(Some(config))
}

/// The special tokens of a model folder; `config` is its `tokenizer_config.json`.
fn special_tokens(
    folder: &Path,
    config: Option<&Map<String, serde_json::Value>>,
) -> Result<BTreeMap<String, String>, DataError> {
    let mut tokens = BTreeMap::new();
    if let Some(map) = read_config(&folder.join("special_tokens_map.json"))? {
        add_special_tokens(&mut tokens, &map);
    }
    if let Some(map) = config {
        add_special_tokens(&mut tokens, map);
    }
    Ok(tokens)
}

/// Takes over every `…_token`, written as a text or as an object with `content`.
fn add_special_tokens(tokens: &mut BTreeMap<String, String>, config: &Map<String, serde_json::Value>) {
    for (name, value) in config.iter().filter(|(name, _)| name.ends_with("_token")) {
        let text = value.as_str().or_else(|| value.get("content").and_then(serde_json::Value::as_str));
        if let Some(text) = text {
            tokens.insert(name.clone(), text.to_owned());
        }
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_formatter(|out, state, value| {
        if !matches!(value.kind(), ValueKind::String) {
            pay_for(state, value, DEPTH_MAX)?;
        }
        minijinja::escape_formatter(out, state, value)
    });
    environment.add_filter("string", |state: &State, value: Value| -> Result<Value, Error> {
        pay_for(state, &value, DEPTH_MAX)?;
        Ok(if value.as_str().is_some() { value } else { Value::from(value.to_string()) })
    });
    environment.add_filter("tojson", python_json::tojson);
    environment.add_function("raise_exception", |text: &str| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text.to_owned()))
    });
    environment.add_function("strftime_now", |format: &str| strftime(format, &jiff::Zoned::now()));
    Ok(environment)
}

fn strftime(format: &str, time: &jiff::Zoned) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, time)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("`strftime_now`: {error}")))
}

/// Runs a rendering where a value as deep as its budget allows can be taken apart again: that takes a stack frame a level,
/// and an overflow would end the whole process. A thread costs some ten microseconds.
fn on_a_deep_stack(path: &Path, render: impl FnOnce() -> Result<String, Error> + Send) -> Result<String, DataError> {
    let failed = |detail: String| DataError::Template { name: path.display().to_string(), line: None, detail };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK_BYTES);
        let thread =
            thread.spawn_scoped(scope, render).map_err(|error| failed(format!("no thread to render it: {error}")))?;
        let text = thread.join().map_err(|_| failed("the template engine gave up".into()))?;
        text.map_err(|error| template_error(path, &error))
    })
}

/// Python methods of texts and lists: those that minijinja-contrib has, and the rest that chat templates use. What these
/// can create out of proportion to what they get is paid for here, before it is created.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    use minijinja::value::from_args;
    if let Some(text) = value.as_str() {
        match method {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" => {
                let (at,): (&str,) = from_args(args)?;
                let (a, b, c) = text.split_once(at).map_or((text, "", ""), |(a, c)| (a, at, c));
                return Ok([a, b, c].into_iter().map(Value::from).collect());
            }
            "rpartition" => {
                let (at,): (&str,) = from_args(args)?;
                let (a, b, c) = text.rsplit_once(at).map_or(("", "", text), |(a, c)| (a, at, c));
                return Ok([a, b, c].into_iter().map(Value::from).collect());
            }
            "rsplit" => {
                let (at, splits, named): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
                let splits = splits.or(named.get("maxsplit")?).unwrap_or(-1);
                named.assert_all_used()?;
                state.consume_fuel(pieces(text, at))?;
                return Ok(rsplit(text, at, splits).into_iter().map(Value::from).collect());
            }
            "split" => state.consume_fuel(pieces(text, args.first().and_then(Value::as_str)))?,
            "splitlines" => state.consume_fuel(pieces(text, Some("\n")))?,
            "replace" => {
                if let [old, new, ..] = args
                    && let (Some(old), Some(new)) = (old.as_str(), new.as_str())
                {
                    let grown = pieces(text, Some(old)).saturating_mul(new.len() as u64);
                    state.consume_fuel(grown.saturating_add(text.len() as u64) / BYTES_PER_FUEL)?;
                }
            }
            "join" => {
                let (parts,): (&Value,) = from_args(args)?;
                return join(state, text, parts);
            }
            "format" => {
                args.iter().try_for_each(|arg| pay_for(state, arg, DEPTH_MAX))?;
                if asks_for_width(text) {
                    return Err(Error::new(ErrorKind::InvalidOperation, "`format`: a width may have at most 4 digits"));
                }
            }
            _ => {}
        }
    } else if value.kind() == ValueKind::Seq {
        pay_for(state, value, DEPTH_MAX)?;
        args.iter().try_for_each(|arg| pay_for(state, arg, DEPTH_MAX))?;
        if method == "index" {
            let (wanted,): (&Value,) = from_args(args)?;
            let position = value.try_iter()?.position(|item| item == *wanted);
            let missing = || Error::new(ErrorKind::InvalidOperation, "the value is not in the list");
            return position.map(Value::from).ok_or_else(missing);
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// `separator.join(parts)`; as in Python the parts must be texts.
fn join(state: &State, separator: &str, parts: &Value) -> Result<Value, Error> {
    let mut joined = String::new();
    for part in parts.try_iter()? {
        let Some(part) = part.as_str() else {
            let detail = format!("`join` takes texts, and was given a {}", part.kind());
            return Err(Error::new(ErrorKind::InvalidOperation, detail));
        };
        state.consume_fuel((part.len() + separator.len()) as u64 / BYTES_PER_FUEL + 1)?;
        joined.push_str(part);
        joined.push_str(separator);
    }
    joined.truncate(joined.len().saturating_sub(separator.len()));
    Ok(Value::from(joined))
}

/// How many pieces splitting makes: between words when there is no separator.
fn pieces(text: &str, separator: Option<&str>) -> u64 {
    let count = match separator {
        Some(separator) => text.matches(separator).count() + 1,
        None => text.split_whitespace().count(),
    };
    count as u64
}

/// Pays for looking at everything in `value`: small values can stand for astronomically large ones when lists hold the
/// same list many times.
fn pay_for(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    let too_deep = || Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply");
    let depth = depth.checked_sub(1).ok_or_else(too_deep)?;
    let bytes = value.as_str().map_or(0, str::len) as u64;
    state.consume_fuel(bytes / BYTES_PER_FUEL + 1)?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| pay_for(state, &item, depth)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| pay_for(state, &value.get_item(&key)?, depth)),
        _ => Ok(()),
    }
}

/// Whether a format asks for more than 9999 columns or digits somewhere.
fn asks_for_width(format: &str) -> bool {
    let fields = format.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    fields.into_iter().any(|field| field.split(|c: char| !c.is_ascii_digit()).any(|number| number.len() > 4))
}

fn rsplit<'a>(text: &'a str, at: Option<&str>, splits: i64) -> Vec<&'a str> {
    let count = usize::try_from(splits).map_or(usize::MAX, |n| n.saturating_add(1));
    let mut parts: Vec<&str> = match at {
        Some(at) => text.rsplitn(count, at).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                let cut = if parts.len() + 1 < count { rest.rfind(char::is_whitespace) } else { None };
                let from = cut.map_or(0, |i| i + rest[i..].chars().next().map_or(1, char::len_utf8));
                parts.push(&rest[from..]);
                rest = rest[..cut.unwrap_or(0)].trim_end();
            }
            parts
        }
    };
    parts.reverse();
    parts
}

/// `{% generation %}` marks the assistant's tokens for training and prints its content as it is. It becomes an `if true`,
/// so that lines and the handling of white space stay the same.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let (inside, after) = tag.split_at(end);
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let new = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inside.replacen(word, new, 1));
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Bytes of all texts in it, and one for everything else.
fn text_bytes(json: &serde_json::Value) -> u64 {
    match json {
        serde_json::Value::String(text) => text.len() as u64 + 1,
        serde_json::Value::Array(items) => items.iter().map(text_bytes).sum::<u64>() + 1,
        serde_json::Value::Object(map) => {
            map.iter().map(|(key, value)| key.len() as u64 + text_bytes(value)).sum::<u64>() + 1
        }
        _ => 1,
    }
}

/// Whether a text in it, or a key, holds `word`.
fn holds(json: &serde_json::Value, word: &str) -> bool {
    match json {
        serde_json::Value::String(text) => text.contains(word),
        serde_json::Value::Array(items) => items.iter().any(|item| holds(item, word)),
        serde_json::Value::Object(map) => map.iter().any(|(key, value)| key.contains(word) || holds(value, word)),
        _ => false,
    }
}

fn message_value(message: &Message) -> Option<Value> {
    let mut pairs = vec![("role".to_owned(), Value::from(message.role.as_str()))];
    if let Some(content) = &message.content {
        pairs.push(("content".to_owned(), json_value(content, DEPTH_MAX)?));
    }
    for (key, value) in &message.extra {
        pairs.push((key.clone(), json_value(value, DEPTH_MAX)?));
    }
    Some(Value::from_pairs(pairs))
}

/// `None` when it nests deeper than `depth`.
fn json_value(json: &serde_json::Value, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    Some(match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (_, Some(integer)) => Value::from(integer),
            _ => Value::from(number.as_f64()?),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => {
            Value::from(items.iter().map(|item| json_value(item, depth)).collect::<Option<Vec<_>>>()?)
        }
        serde_json::Value::Object(map) => {
            let pairs = map.iter().map(|(key, value)| Some((key.clone(), json_value(value, depth)?)));
            Value::from_pairs(pairs.collect::<Option<Vec<_>>>()?)
        }
    })
}

fn template_error(path: &Path, error: &Error) -> DataError {
    let mut detail = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it does not come to an end: it exceeded its budget of work and memory".to_owned(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        detail.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    DataError::Template { name: path.display().to_string(), line: error.line().map(|line| line as u64), detail }
}
