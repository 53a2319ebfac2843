//! The numbers of every step, as JSON lines and for TensorBoard.

use std::time::Instant;

use serde_json::{Map, Number, Value};

use crate::event_file::EventFile;
use crate::jsonl::JsonlFile;
use crate::{ReportError, Result, RunFolder};

/// Longest name of a metric, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// Writes the numbers of every step to `metrics.jsonl` and to a TensorBoard event file.
///
/// A line of `metrics.jsonl` is an object: `step`, `wall_s` (seconds that the run has taken, rounded to milliseconds;
/// a resumed run counts on from its last line), then the metrics by name in alphabetical order. JSON has no number that is
/// not finite: such a value is written as the string `"nan"`, `"inf"` or `"-inf"`, which Python's `float` and Rust's
/// `parse` read back. Both files are written to the system once per call, so a kill loses at most the line being written.
#[derive(Debug)]
pub struct MetricsWriter {
    lines: JsonlFile,
    events: EventFile,
    wall_s_before: f64,
    started: Instant,
}

impl MetricsWriter {
    /// Opens the files of `run` to append to, making them when they are not there.
    ///
    /// # Errors
    /// [`ReportError::CannotWrite`], [`ReportError::CannotRead`]; [`ReportError::BadLine`] and [`ReportError::BadRecord`]
    /// when another program changed the files.
    pub fn open(run: &RunFolder) -> Result<MetricsWriter> {
        let lines = JsonlFile::open(&run.metrics_jsonl())?;
        let events = EventFile::open(&run.tensorboard())?;
        let wall_s_before = last_wall_s(&lines)?;
        Ok(MetricsWriter { lines, events, wall_s_before, started: Instant::now() })
    }

    /// Drops everything after `step`, the step of the checkpoint that the run resumes from.
    ///
    /// # Errors
    /// As [`MetricsWriter::open`]; the files are then as they were.
    pub fn truncate_after(&mut self, step: u64) -> Result<()> {
        self.lines.truncate_after(step)?;
        self.events.truncate_after(step)?;
        self.wall_s_before = last_wall_s(&self.lines)?;
        self.started = Instant::now();
        Ok(())
    }

    /// Records the metrics of `step`. The order of `metrics` does not matter.
    ///
    /// # Errors
    /// [`ReportError::BadMetricName`] for a name that is empty, too long, given twice, `step` or `wall_s`;
    /// [`ReportError::CannotWrite`].
    pub fn log(&mut self, step: u64, metrics: &[(&str, f64)]) -> Result<()> {
        let mut sorted = metrics.to_vec();
        sorted.sort_by_key(|(name, _)| *name);
        check_names(&sorted)?;
        let wall_s = self.wall_s_before + self.started.elapsed().as_secs_f64();
        let mut line = Map::with_capacity(sorted.len() + 2);
        line.insert("step".into(), step.into());
        line.insert("wall_s".into(), json_number((wall_s * 1000.0).round() / 1000.0));
        for (name, value) in &sorted {
            line.insert((*name).into(), json_number(*value));
        }
        self.lines.append(&line)?;
        self.events.scalars(step, &sorted)
    }
}

/// A number, or the string that stands for one that JSON has not.
fn json_number(value: f64) -> Value {
    match Number::from_f64(value) {
        Some(number) => Value::Number(number),
        None if value.is_nan() => "nan".into(),
        None if value > 0.0 => "inf".into(),
        None => "-inf".into(),
    }
}

fn last_wall_s(lines: &JsonlFile) -> Result<f64> {
    Ok(lines.last()?.and_then(|line| line.get("wall_s")?.as_f64()).unwrap_or(0.0))
}

fn check_names(sorted: &[(&str, f64)]) -> Result<()> {
    let bad = |name: &str, reason| Err(ReportError::BadMetricName { name: name.to_owned(), reason });
    for (name, _) in sorted {
        if name.is_empty() {
            return bad(name, "is empty");
        }
        if name.len() > NAME_BYTES_MAX {
            return bad(name, "is longer than 256 bytes");
        }
        if ["step", "wall_s"].contains(name) {
            return bad(name, "is the name of a column that every line has");
        }
    }
    match sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => bad(pair[0].0, "is given twice in one step"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(run: &RunFolder) -> Vec<Value> {
        let text = std::fs::read_to_string(run.metrics_jsonl()).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// The file with its wall times blanked.
    fn without_wall(run: &RunFolder) -> String {
        lines(run)
            .into_iter()
            .map(|mut line| {
                line["wall_s"] = 0.into();
                line.to_string() + "\n"
            })
            .collect()
    }

    #[test]
    fn a_line_has_a_stable_order_and_every_number() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunFolder::create(temp.path()).unwrap();
        let mut writer = MetricsWriter::open(&run).unwrap();
        writer.log(7, &[("z", 0.1), ("a", f64::NAN), ("m", f64::INFINITY), ("b", -f64::INFINITY)]).unwrap();
        let text = std::fs::read_to_string(run.metrics_jsonl()).unwrap();
        assert!(text.starts_with("{\"step\":7,\"wall_s\":0."), "{text}");
        assert!(text.ends_with(",\"a\":\"nan\",\"b\":\"-inf\",\"m\":\"inf\",\"z\":0.1}\n"), "{text}");
    }

    #[test]
    fn a_resumed_run_has_the_lines_of_an_undisturbed_one() {
        let temp = tempfile::tempdir().unwrap();
        let undisturbed = RunFolder::create(&temp.path().join("a")).unwrap();
        let resumed = RunFolder::create(&temp.path().join("b")).unwrap();
        let steps = |run: &RunFolder, from: u64, to: u64, kept: Option<u64>| {
            let mut writer = MetricsWriter::open(run).unwrap();
            if let Some(kept) = kept {
                writer.truncate_after(kept).unwrap();
            }
            for step in from..to {
                writer.log(step, &[("loss", 1.0 / (step + 1) as f64), ("train/kl", step as f64)]).unwrap();
                if step % 3 == 0 {
                    writer.log(step, &[("val/reward_avg", 0.5)]).unwrap();
                }
            }
        };
        steps(&undisturbed, 0, 20, None);
        steps(&resumed, 0, 13, None);
        steps(&resumed, 10, 20, Some(9));
        assert_eq!(without_wall(&undisturbed), without_wall(&resumed));
        let walls: Vec<f64> = lines(&resumed).iter().map(|l| l["wall_s"].as_f64().unwrap()).collect();
        assert!(walls.is_sorted(), "{walls:?}");
    }

    #[test]
    fn names_that_would_hide_a_number_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunFolder::create(temp.path()).unwrap();
        let mut writer = MetricsWriter::open(&run).unwrap();
        let long = "x".repeat(257);
        for metrics in
            [vec![("", 1.0)], vec![("step", 1.0)], vec![("a", 1.0), ("b", 2.0), ("a", 3.0)], vec![(&*long, 0.0)]]
        {
            let error = writer.log(1, &metrics).unwrap_err();
            assert!(matches!(error, ReportError::BadMetricName { .. }), "{error}");
        }
        assert!(lines(&run).is_empty());
    }
}
