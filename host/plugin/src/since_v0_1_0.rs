//! The adapter for `cosmos:plugin@0.1.x`: bindings of `wit/since-v0.1.0`, the host's side of its imports, and the
//! translation of its types. A later package version gets a module of its own beside this one.

use wasmtime::Engine;
use wasmtime::component::{HasSelf, Linker, Resource};

use crate::grant::Need;
use crate::sandbox::GuestState;
use crate::voice::{Level, lock};
use crate::{ChatMessage, Example, Grant, Limits, Prompt, RewardSample, Score, TableRequest, TableRows};

#[allow(missing_docs)]
mod bindings {
    wasmtime::component::bindgen!({
        path: "../../wit/since-v0.1.0",
        world: "plugin",
        imports: { default: trappable },
        exports: { default: async },
        with: { "cosmos:plugin/table.rows": super::OpenRows },
    });
}

use bindings::cosmos::plugin::{chat_template, log, table, types};
pub(crate) use bindings::exports::cosmos::plugin::{dataset, metadata, reward};
pub(crate) use types::SampleError;

/// Rows that a guest holds a handle to.
pub struct OpenRows(Box<dyn TableRows>);

/// Bytes of one row beyond its text, so that a million empty rows are not free.
const ROW_BYTES: usize = 16;

/// The linker for a component with these imports. What is not needed is not linked; what is not granted was refused
/// before this.
pub(crate) fn link(engine: &Engine, imports: &[String]) -> wasmtime::Result<Linker<GuestState>> {
    let needs: Vec<Need> = imports.iter().map(|name| Need::of(name)).collect();
    let mut linker = Linker::new(engine);
    if needs.contains(&Need::Wasi) {
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    }
    if needs.contains(&Need::Grant(Grant::Log)) {
        log::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)?;
    }
    if needs.contains(&Need::Grant(Grant::Table)) {
        table::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)?;
    }
    if needs.contains(&Need::Grant(Grant::ChatTemplate)) {
        chat_template::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)?;
    }
    Ok(linker)
}

impl types::Host for GuestState {}

impl log::Host for GuestState {
    fn write(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        let level = match level {
            log::Level::Trace => Level::Trace,
            log::Level::Debug => Level::Debug,
            log::Level::Info => Level::Info,
            log::Level::Warn => Level::Warn,
            log::Level::Error => Level::Error,
        };
        lock(&self.voice).say(level, &message);
        Ok(())
    }
}

impl table::Host for GuestState {
    fn open(&mut self, source: table::Source) -> wasmtime::Result<Result<Resource<OpenRows>, String>> {
        let Some(tables) = self.capabilities.table.clone() else {
            return Ok(Err("this command lends no dataset reader".into()));
        };
        let table::Source { name, subset, revision, splits } = source;
        let request = TableRequest { name, subset, revision, splits };
        let open_max = std::time::Duration::from_millis(self.limits.table_open_ms_max);
        match self.clock.excuse(open_max, || tables.open(&request)) {
            Ok(rows) => Ok(Ok(self.handles.push(OpenRows(rows))?)),
            Err(message) => Ok(Err(message)),
        }
    }
}

impl table::HostRows for GuestState {
    fn len(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<u64> {
        Ok(self.handles.get(&rows)?.0.len())
    }

    fn columns(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<Vec<String>> {
        Ok(self.handles.get(&rows)?.0.columns())
    }

    fn read(
        &mut self,
        rows: Resource<OpenRows>,
        start: u64,
        count: u32,
        columns: Vec<String>,
    ) -> wasmtime::Result<Result<Vec<String>, String>> {
        let rows = &self.handles.get(&rows)?.0;
        let count_max = crate::limits::BATCH_ITEMS_MAX;
        if count as usize > count_max {
            return Ok(Err(format!("{count} rows asked for in one call, at most {count_max} are allowed")));
        }
        let len = rows.len();
        if start.checked_add(count.into()).is_none_or(|end| end > len) {
            return Ok(Err(format!("{count} rows from {start} reach beyond the table's {len}")));
        }
        let read = match rows.read(start, count, &columns) {
            Ok(read) => read,
            Err(message) => return Ok(Err(message)),
        };
        let bytes = read.iter().map(|row| row.len() + ROW_BYTES).sum::<usize>();
        if bytes > self.limits.result_bytes_max {
            let bytes_max = self.limits.result_bytes_max;
            return Ok(Err(format!(
                "{count} rows have {bytes} bytes, above `result_bytes_max` = {bytes_max}: read fewer rows or columns"
            )));
        }
        Ok(Ok(read))
    }

    fn drop(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<()> {
        self.handles.delete(rows)?;
        Ok(())
    }
}

impl chat_template::Host for GuestState {
    fn render(
        &mut self,
        messages: Vec<types::Message>,
        add_generation_prompt: bool,
        options: String,
    ) -> wasmtime::Result<Result<String, String>> {
        let Some(chat) = self.capabilities.chat.clone() else {
            return Ok(Err("this command lends no chat template".into()));
        };
        let messages: Vec<_> = messages.into_iter().map(chat_message).collect();
        Ok(chat.render(&messages, add_generation_prompt, &options))
    }
}

fn chat_message(message: types::Message) -> ChatMessage {
    ChatMessage { role: message.role, content: message.content }
}

fn pairs(pairs: Vec<types::StringPair>) -> Vec<(String, String)> {
    pairs.into_iter().map(|pair| (pair.key, pair.value)).collect()
}

/// The sample as the guest takes it.
pub(crate) fn lower_sample(sample: &RewardSample) -> reward::Sample {
    let pair = |(key, value): &(String, String)| types::StringPair { key: key.clone(), value: value.clone() };
    reward::Sample {
        prompt: sample.prompt.clone(),
        completion: sample.completion.clone(),
        reference: sample.reference.clone().unwrap_or_default(),
        metadata: sample.metadata.iter().map(pair).collect(),
    }
}

/// The guest's example, or what is wrong with it.
pub(crate) fn lift_example(example: dataset::Example) -> Result<Example, String> {
    let prompt = match example.prompt {
        types::Prompt::Text(text) => Prompt::Text(text),
        types::Prompt::Messages(messages) if messages.is_empty() => return Err("the prompt has no messages".into()),
        types::Prompt::Messages(messages) => Prompt::Messages(messages.into_iter().map(chat_message).collect()),
    };
    if let Some(reference) = &example.reference {
        serde_json::from_str::<serde::de::IgnoredAny>(reference)
            .map_err(|error| format!("the reference is not JSON: {error}"))?;
    }
    let metadata = pairs(example.metadata);
    Ok(Example { prompt, reference: example.reference, response: example.response, metadata })
}

/// The guest's score, or what is wrong with it.
pub(crate) fn lift_score(score: reward::Score, limits: &Limits) -> Result<Score, String> {
    let check = |what: &str, value: f64| {
        if !value.is_finite() {
            return Err(format!("{what} is {value}"));
        }
        if value.abs() > limits.score_abs_max {
            return Err(format!("{what} is {value:e}, beyond `score_abs_max` = {:e}", limits.score_abs_max));
        }
        Ok(())
    };
    check("the score", score.value)?;
    if score.metrics.len() > limits.metrics_max {
        let count = score.metrics.len();
        return Err(format!("the score has {count} metrics, above `metrics_max` = {}", limits.metrics_max));
    }
    let mut metrics: Vec<(String, f64)> = Vec::with_capacity(score.metrics.len());
    for metric in score.metrics {
        check(&format!("the metric `{}`", metric.name), metric.value)?;
        if metrics.iter().any(|(name, _)| *name == metric.name) {
            return Err(format!("the metric `{}` is given twice", metric.name));
        }
        metrics.push((metric.name, metric.value));
    }
    Ok(Score { value: score.value, metrics })
}

/// `train` or `validation`.
pub(crate) fn dataset_role(role: metadata::DatasetRole) -> &'static str {
    match role {
        metadata::DatasetRole::Train => "train",
        metadata::DatasetRole::Validation => "validation",
    }
}

/// `train`, `validation` or `filter`.
pub(crate) fn reward_role(role: metadata::RewardRole) -> &'static str {
    match role {
        metadata::RewardRole::Train => "train",
        metadata::RewardRole::Validation => "validation",
        metadata::RewardRole::Filter => "filter",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(value: f64, metrics: &[(&str, f64)]) -> Result<Score, String> {
        let metrics = metrics.iter().map(|(name, value)| reward::Metric { name: name.to_string(), value: *value });
        lift_score(reward::Score { value, metrics: metrics.collect() }, &Limits::default())
    }

    #[test]
    fn scores_must_be_usable_numbers() {
        assert_eq!(score(-0.5, &[("a", 1.0)]).unwrap().metrics, [("a".to_string(), 1.0)]);
        assert!(score(f64::NAN, &[]).unwrap_err().contains("NaN"));
        assert!(score(f64::NEG_INFINITY, &[]).unwrap_err().contains("-inf"));
        assert!(score(1e308, &[]).unwrap_err().contains("score_abs_max"));
        assert!(score(0.0, &[("a", f64::NAN)]).unwrap_err().contains("`a`"));
        assert!(score(0.0, &[("a", 1.0), ("a", 2.0)]).unwrap_err().contains("twice"));
        let many: Vec<_> = (0..65).map(|number| (format!("m{number}"), 0.0)).collect();
        let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        assert!(score(0.0, &many).unwrap_err().contains("metrics_max"));
    }

    #[test]
    fn examples_must_have_messages_and_json_references() {
        let example = |prompt, reference: Option<&str>| {
            let reference = reference.map(String::from);
            lift_example(dataset::Example { prompt, reference, response: None, metadata: Vec::new() })
        };
        assert!(example(types::Prompt::Text("x".into()), Some("{\"a\": [1]}")).is_ok());
        assert!(example(types::Prompt::Text("x".into()), Some("{")).unwrap_err().contains("not JSON"));
        assert!(example(types::Prompt::Messages(Vec::new()), None).unwrap_err().contains("no messages"));
    }
}
