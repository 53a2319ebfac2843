//! The result of a run, as a file and as a table.

use std::fmt::Write;
use std::path::PathBuf;

use comfy_table::{Cell, CellAlignment, ContentArrangement, LineStyle, Table, presets};
use serde::{Deserialize, Serialize};

use crate::folder::replace_file;
use crate::format::{format_count, format_number, format_percent, format_seconds};
use crate::{ReportError, Result, RunFolder};

/// Width of a table that goes to no terminal.
const WIDTH_OF_NO_TERMINAL: u16 = 100;

/// The result of a run. A number that a kind of run does not have (a teacher in SFT) is `null` in the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// What kind of run it was, such as `on-policy distillation`.
    pub kind: String,
    /// Mean validation reward of the student before training; accuracies lie between 0 and 1.
    pub student_before: Option<f64>,
    /// Mean validation reward of the student after training.
    pub student_after: Option<f64>,
    /// Mean validation reward of the teacher.
    pub teacher: Option<f64>,
    /// Mean reverse KL per token in nats before training.
    pub kl_before: Option<f64>,
    /// Mean reverse KL per token in nats after training.
    pub kl_after: Option<f64>,
    /// Seconds that the run took, from start to end.
    pub seconds: f64,
    /// Seconds spent training, without loading and validation.
    #[serde(default)]
    pub train_seconds: Option<f64>,
    /// Optimizer steps done.
    pub steps: u64,
    /// Steps skipped because a loss or gradient was not finite.
    #[serde(default)]
    pub skipped_steps: u64,
    /// Completions trained on.
    #[serde(default)]
    pub samples: u64,
    /// Speed of each phase.
    pub tokens_per_second: TokensPerSecond,
    /// Folder of the last checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Picture of the learning curve.
    pub learning_curve: Option<PathBuf>,
    /// The run folder.
    pub run_folder: PathBuf,
}

/// Tokens a second of each phase, counted over the whole run; none for a phase that the run does not have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct TokensPerSecond {
    /// Tokens generated.
    pub rollout: Option<f64>,
    /// Tokens scored by the teacher, prompt included.
    pub teacher: Option<f64>,
    /// Tokens through forward and backward, prompt included.
    pub train: Option<f64>,
    /// Tokens generated for validation.
    pub validation: Option<f64>,
}

impl Summary {
    /// Writes `summary.json`, replacing what is there. Numbers that are not finite become `null`.
    ///
    /// # Errors
    /// [`ReportError::CannotWrite`].
    pub fn write(&self, run: &RunFolder) -> Result<()> {
        let path = run.summary_json();
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|e| ReportError::CannotWrite { path: path.clone(), source: e.into() })?;
        text.push('\n');
        replace_file(&path, text.as_bytes())
    }

    /// The summary as text of at most `width` columns (tables only: a path is never broken). Without a width, that of the
    /// terminal, or 100 when there is none.
    pub fn render(&self, width: Option<u16>) -> String {
        let mut text = String::new();
        for table in [self.results(), self.speeds()].into_iter().flatten() {
            push_line(&mut text, &fitted(table, width));
        }
        let skipped = match self.skipped_steps {
            0 => String::new(),
            n => format!(", {} skipped", format_count(n)),
        };
        let steps = format!("{} steps{skipped}", format_count(self.steps));
        let samples =
            if self.samples > 0 { format!(", {} samples", format_count(self.samples)) } else { String::new() };
        let trained = self.train_seconds.map(|s| format!(" ({} training)", format_seconds(s))).unwrap_or_default();
        push_line(&mut text, &format!("{steps}{samples} in {}{trained}", format_seconds(self.seconds)));
        let paths = [
            ("checkpoint", self.checkpoint.as_ref()),
            ("learning curve", self.learning_curve.as_ref()),
            ("run folder", Some(&self.run_folder).filter(|p| !p.as_os_str().is_empty())),
        ];
        for (name, path) in paths {
            if let Some(path) = path {
                push_line(&mut text, &format!("{name:<14} {}", path.display()));
            }
        }
        text
    }

    /// Rewards and KL; none for a run that measured neither.
    fn results(&self) -> Option<Table> {
        let rewards = [self.student_before, self.student_after, self.teacher];
        let kls = [self.kl_before, self.kl_after, None];
        let mut rows = Vec::new();
        if rewards.iter().any(Option::is_some) {
            let fractions = rewards.iter().flatten().all(|v| (0.0..=1.0).contains(v));
            let show = if fractions { format_percent } else { format_number };
            let note = match (self.student_after, self.teacher) {
                (Some(after), Some(teacher)) if teacher > 0.0 && after.is_finite() => {
                    format!("{:.1} % of the teacher", after / teacher * 100.0)
                }
                _ => String::new(),
            };
            rows.push((if fractions { "accuracy" } else { "reward" }, rewards.map(|v| v.map(show)), note));
        }
        if kls.iter().any(Option::is_some) {
            let note = match (self.kl_before, self.kl_after) {
                (Some(before), Some(after)) if after > 0.0 && before > after => format!("{:.1}× lower", before / after),
                _ => String::new(),
            };
            rows.push(("reverse KL", kls.map(|v| v.map(format_number)), note));
        }
        if rows.is_empty() {
            return None;
        }
        let mut table = empty_table();
        table.set_header(header(&[&capitalized_or(&self.kind, "Result"), "before", "after", "teacher", ""]));
        for (name, values, note) in rows {
            let mut cells = vec![Cell::new(name)];
            cells.extend(values.map(|v| Cell::new(v.unwrap_or("–".into())).set_alignment(CellAlignment::Right)));
            cells.push(Cell::new(note));
            table.add_row(cells);
        }
        Some(table)
    }

    /// Tokens a second; none for a run that measured no phase.
    fn speeds(&self) -> Option<Table> {
        let speeds = self.tokens_per_second;
        let phases = [
            ("rollout", speeds.rollout),
            ("teacher", speeds.teacher),
            ("train", speeds.train),
            ("validation", speeds.validation),
        ];
        let known: Vec<(&str, f64)> = phases.into_iter().filter_map(|(name, speed)| Some((name, speed?))).collect();
        if known.is_empty() {
            return None;
        }
        let mut table = empty_table();
        table.set_header(header(&["Tokens a second", ""]));
        for (name, speed) in known {
            table.add_row([Cell::new(name), Cell::new(format_number(speed)).set_alignment(CellAlignment::Right)]);
        }
        Some(table)
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.render(None).trim_end())
    }
}

fn empty_table() -> Table {
    let mut table = Table::new();
    let style = presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none());
    table.load_style(style).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

/// First column left, the others right, as the numbers under them.
fn header(names: &[&str]) -> Vec<Cell> {
    let side = |i| if i == 0 { CellAlignment::Left } else { CellAlignment::Right };
    names.iter().enumerate().map(|(i, name)| Cell::new(name).set_alignment(side(i))).collect()
}

fn fitted(mut table: Table, width: Option<u16>) -> String {
    let width = width.or(table.width()).unwrap_or(WIDTH_OF_NO_TERMINAL);
    table.set_width(width.max(20));
    table.trim_fmt()
}

fn push_line(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

fn capitalized_or(text: &str, otherwise: &str) -> String {
    let text = if text.is_empty() { otherwise } else { text };
    let mut chars = text.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_summary() -> Summary {
        Summary {
            kind: "on-policy distillation".into(),
            student_before: Some(0.021),
            student_after: Some(0.71),
            teacher: Some(0.752),
            kl_before: Some(1.234),
            kl_after: Some(0.0987),
            seconds: 242.7,
            steps: 130,
            samples: 33_280,
            tokens_per_second: TokensPerSecond {
                rollout: Some(1523.0),
                teacher: Some(4210.0),
                train: Some(1288.0),
                validation: None,
            },
            checkpoint: Some("outputs/countdown/checkpoints/step_130".into()),
            learning_curve: Some("outputs/countdown/learning_curve.svg".into()),
            run_folder: "outputs/countdown".into(),
            ..Summary::default()
        }
    }

    #[test]
    fn the_file_has_the_promised_names_and_reads_back() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunFolder::create(temp.path()).unwrap();
        a_summary().write(&run).unwrap();
        let text = std::fs::read_to_string(run.summary_json()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        for name in ["student_before", "student_after", "teacher", "kl_before", "kl_after", "seconds"] {
            assert!(value[name].is_f64(), "{name}");
        }
        assert_eq!(serde_json::from_str::<Summary>(&text).unwrap(), a_summary());
    }

    #[test]
    fn the_table_shows_the_numbers() {
        let text = a_summary().render(Some(100));
        for wanted in
            ["2.1 %", "71.0 %", "94.4 % of the teacher", "12.5× lower", "1,523", "130 steps, 33,280 samples in 4m03s"]
        {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert!(!text.contains("validation"));
        println!("{text}");
    }

    #[test]
    fn the_tables_keep_to_the_width() {
        for width in [30, 48, 80, 120] {
            let text = a_summary().render(Some(width));
            let widest = text.lines().filter(|l| !l.contains('/')).map(|l| l.chars().count()).max().unwrap();
            assert!(widest <= usize::from(width).max(44), "{widest} of {width}:\n{text}");
        }
    }

    #[test]
    fn a_run_without_teacher_or_validation_has_a_summary() {
        let text = Summary { steps: 3, skipped_steps: 1, seconds: 2.0, ..Summary::default() }.render(Some(80));
        assert_eq!(text, "3 steps, 1 skipped in 2.0s\n");
        let rewards = Summary { student_before: Some(-3.0), student_after: Some(12.5), ..Summary::default() };
        assert!(rewards.render(Some(80)).contains("reward"));
    }
}
