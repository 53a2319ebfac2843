//! What the host lends: log, table, chat template; and what happens when the host's own side fails.

use std::fmt::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cosmos_plugin::{Capabilities, Dataset, Grant, Limits, PluginError, Prompt, TableRequest, TableRows, TableSource};
use tracing::field::{Field, Visit};
use tracing::span;

use crate::guests::{Bench, component, outcomes, quick, text, wit};

/// Rows `{"n": 0}`, `{"n": 1}` and so on, with some that the host itself is slow or broken on.
struct Numbers {
    len: u64,
}

impl TableSource for Numbers {
    fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String> {
        match source.name.as_str() {
            "data" => Ok(Box::new(Numbers { len: self.len })),
            name => Err(format!("no table `{name}`")),
        }
    }
}

impl TableRows for Numbers {
    fn len(&self) -> u64 {
        self.len
    }

    fn columns(&self) -> Vec<String> {
        vec!["n".into()]
    }

    fn read(&self, start: u64, count: u32, _: &[String]) -> Result<Vec<String>, String> {
        match start {
            70 => return Err("row 70 is\nbroken".into()),
            71 => panic!("a bug of the host"),
            72 => std::thread::sleep(Duration::from_secs(60)),
            _ => {}
        }
        Ok((start..start + u64::from(count)).map(|n| format!("{{\"n\": {n}}}")).collect())
    }
}

fn dataset(len: u64, limits: Limits) -> Dataset {
    let bench = Bench::new();
    let path = bench.file("rows", &component(&text("table_rows"), &wit(), "dataset-plugin"));
    let capabilities = Capabilities { table: Some(Arc::new(Numbers { len })), chat: None };
    let plugin = bench.host.load(&path, &[Grant::Table], limits, capabilities).unwrap();
    assert_eq!(plugin.info().wants, ["table"]);
    plugin.dataset("d", "").unwrap()
}

fn texts(dataset: &mut Dataset, indices: &[u64]) -> Vec<Result<String, String>> {
    let results = dataset.get(indices).unwrap();
    assert_eq!(results.len(), indices.len());
    let text = |(item, result): (usize, Result<cosmos_plugin::Example, cosmos_plugin::SampleFailure>)| match result {
        Ok(example) => match example.prompt {
            Prompt::Text(text) => {
                assert_eq!(example.reference.as_deref(), Some(text.as_str()));
                Ok(text)
            }
            Prompt::Messages(messages) => panic!("{messages:?}"),
        },
        Err(failure) => {
            assert_eq!(failure.item, item);
            Err(failure.reason)
        }
    };
    results.into_iter().enumerate().map(text).collect()
}

#[test]
fn rows_come_through_the_table_in_the_order_asked() {
    let mut rows = dataset(200, quick());
    assert_eq!(rows.len(), 200);
    let indices: Vec<u64> = (0..70).rev().chain(100..200).collect();
    for (index, text) in indices.iter().zip(texts(&mut rows, &indices)) {
        assert_eq!(text, Ok(format!("{{\"n\": {index}}}")));
    }
    let results = texts(&mut rows, &[1, 200, 70, u64::MAX, 2]);
    assert_eq!(results[0], Ok("{\"n\": 1}".into()));
    assert_eq!(results[1], Err("index 200 is beyond the dataset's 200 examples".into()));
    assert_eq!(results[2], Err("row 70 is\\nbroken".into()));
    assert!(results[3].is_err());
    assert_eq!(results[4], Ok("{\"n\": 2}".into()));
    assert_eq!(dataset(0, quick()).len(), 0);
}

#[test]
fn a_host_call_that_panics_costs_one_sample() {
    let mut rows = dataset(100, quick());
    let results = texts(&mut rows, &[1, 71, 2]);
    assert_eq!((&results[0], &results[2]), (&Ok("{\"n\": 1}".into()), &Ok("{\"n\": 2}".into())));
    assert!(results[1].as_ref().unwrap_err().contains("panicked"), "{results:?}");
}

#[test]
fn a_host_call_that_hangs_costs_one_sample_and_bounded_time() {
    let mut rows = dataset(100, Limits { call_ms_max: 300, item_ms_max: 300, ..quick() });
    let started = Instant::now();
    let results = texts(&mut rows, &[72, 3]);
    // Twice the limit and the caller's grace, and not the two minutes that the host calls sleep.
    assert!(started.elapsed() < Duration::from_secs(50), "{:?}", started.elapsed());
    assert!(results[0].as_ref().unwrap_err().contains("no answer within 300 ms"), "{results:?}");
    assert_eq!(results[1], Ok("{\"n\": 3}".into()));
}

#[test]
fn reading_or_opening_a_table_for_ever_costs_one_sample() {
    let bench = Bench::new();
    let path = bench.file("rows", &component(&text("table_loop"), &wit(), "dataset-plugin"));
    let capabilities = Capabilities { table: Some(Arc::new(Numbers { len: 100 })), chat: None };
    let limits = Limits { call_ms_max: 500, item_ms_max: 300, table_open_ms_max: 300, ..quick() };
    let plugin = bench.host.load(&path, &[Grant::Table], limits, capabilities).unwrap();
    let mut rows = plugin.dataset("d", "").unwrap();
    let results = texts(&mut rows, &[12, 13, 14, 15]);
    assert_eq!((&results[0], &results[3]), (&Ok("{\"n\": 12}".into()), &Ok("{\"n\": 15}".into())));
    assert!(results[1].as_ref().unwrap_err().contains("took longer than 300 ms"), "{results:?}");
    // Four thousand open tables come first on a quick machine.
    let reason = results[2].as_ref().unwrap_err();
    assert!(reason.contains("too many open handles") || reason.contains("took longer than"), "{results:?}");
}

#[test]
fn a_grant_without_a_reader_is_the_plugins_own_error() {
    let bench = Bench::new();
    let path = bench.file("rows", &component(&text("table_rows"), &wit(), "dataset-plugin"));
    let plugin = bench.host.load(&path, &[Grant::Table], quick(), Capabilities::default()).unwrap();
    let error = plugin.dataset("d", "").err().unwrap();
    assert!(error.to_string().contains("`init`: this command lends no dataset reader"), "{error}");
}

#[test]
fn an_import_that_is_not_granted_is_refused_with_the_line_to_add() {
    let bench = Bench::new();
    let path = bench.file("rows", &component(&text("table_rows"), &wit(), "dataset-plugin"));
    let error = bench.host.load(&path, &[Grant::Log], quick(), Capabilities::default()).unwrap_err();
    assert!(matches!(error, PluginError::NotGranted { .. }), "{error}");
    assert!(error.to_string().contains("`cosmos:plugin/table@0.1.0`"), "{error}");
    assert!(error.hint().unwrap().contains("[plugin.rows] allow = [\"log\", \"table\"]"), "{:?}", error.hint());
    let error = bench.load_with("log_flood", &[], quick()).unwrap_err();
    assert!(error.hint().unwrap().contains("allow = [\"log\"]"));
}

/// Keeps what guests log.
struct Ear(Arc<Mutex<Vec<String>>>);

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            write!(self.0, "{value:?}").unwrap();
        }
    }
}

impl tracing::Subscriber for Ear {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "cosmos_plugin::guest"
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut message = Message(event.metadata().level().to_string() + " ");
        event.record(&mut message);
        self.0.lock().unwrap().push(message.0);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[test]
fn log_lines_are_escaped_and_counted() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    tracing::subscriber::set_global_default(Ear(heard.clone())).unwrap();
    let bench = Bench::new();
    let plugin = bench.load_with("log_flood", &[Grant::Log], quick()).unwrap();
    let mut reward = plugin.reward("r", "").unwrap();
    assert_eq!(outcomes(&mut reward, &["x"]), [Ok(1.0)]);
    let lines = heard.lock().unwrap().iter().filter(|line| *line == "INFO all is\\nlost\\u{1b}[31m").count();
    // 100 a second; a slow machine may need more than one second for 10,000 lines.
    assert!((100..2000).contains(&lines), "{lines}");
    let results = outcomes(&mut reward, &["!"]);
    assert!(results[0].as_ref().unwrap_err().contains("its last words: all is\\nlost"), "{results:?}");

    heard.lock().unwrap().clear();
    let plugin = bench.load_with("log_huge", &[Grant::Log], quick()).unwrap();
    assert_eq!(outcomes(&mut plugin.reward("r", "").unwrap(), &["xx"]), [Ok(2.0)]);
    let lines = heard.lock().unwrap();
    let huge: Vec<_> = lines.iter().filter(|line| line.contains("bytes left out")).collect();
    assert_eq!(huge.len(), 1, "{lines:?}");
    assert!(huge[0].starts_with("WARN \\u{1b}[2J\\n\\u{0}\\u{202e}\\u{1b}"), "{:.80}", huge[0]);
    assert!(huge[0].ends_with("(1044480 bytes left out)") && huge[0].len() < 10 * 4096, "{}", huge[0].len());
    assert!(!huge[0].chars().any(char::is_control));
}
