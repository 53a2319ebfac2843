//! What a run shows on the terminal while it works.
//!
//! On a terminal: a bar with the time left, a line of key numbers and a line with the present phase. Elsewhere: one plain
//! line a step. The display owns standard error; whoever else writes there (the log) does it through [`log_writer`], so
//! that no line lands inside the bars. `NO_COLOR` is honoured.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::format::{format_number, format_seconds};

/// How a run shows its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressKind {
    /// Bars that redraw themselves.
    Live,
    /// One line a step.
    Plain,
    /// Nothing.
    Quiet,
}

impl ProgressKind {
    /// [`ProgressKind::Live`] when standard error is a terminal that can move its cursor.
    pub fn detect() -> ProgressKind {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if io::stderr().is_terminal() && !dumb { ProgressKind::Live } else { ProgressKind::Plain }
    }
}

/// What is shown of a finished step.
#[derive(Debug, Clone, Copy)]
pub struct StepLine<'a> {
    /// How many steps are done, this one included.
    pub step: u64,
    /// The key numbers, in the order to show them.
    pub metrics: &'a [(&'a str, f64)],
    /// Tokens a second of the whole step.
    pub tokens_per_second: Option<f64>,
}

/// The bars on the terminal now, if any: they step aside while a log line is written.
static LIVE: Mutex<Option<MultiProgress>> = Mutex::new(None);

fn live() -> MutexGuard<'static, Option<MultiProgress>> {
    // A panic while drawing leaves nothing half done that matters.
    LIVE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A writer to standard error that does not disturb the bars. Hand it to the log's subscriber: it may be made before the
/// first [`Progress`] and outlive the last.
pub fn log_writer() -> LogWriter {
    LogWriter
}

/// See [`log_writer`].
#[derive(Debug, Clone, Copy)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    // One call per log line, so that the bars step aside once and lines of two threads do not mix.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let bars = live().clone();
        match bars {
            Some(bars) => bars.suspend(|| io::stderr().write_all(bytes)),
            None => io::stderr().write_all(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// The display of one run. All methods take `&self`, so that several threads can share it.
#[derive(Debug)]
pub struct Progress {
    total_steps: u64,
    pace: Mutex<Pace>,
    display: Display,
}

#[derive(Debug)]
enum Display {
    Live { bars: MultiProgress, steps: ProgressBar, numbers: ProgressBar, phase: ProgressBar },
    Plain,
    Quiet,
}

impl Progress {
    /// Begins a display of `total_steps` steps. A resumed run calls [`Progress::start_at`] next.
    pub fn new(kind: ProgressKind, total_steps: u64) -> Progress {
        let display = match kind {
            ProgressKind::Live => Display::live(total_steps),
            ProgressKind::Plain => Display::Plain,
            ProgressKind::Quiet => Display::Quiet,
        };
        Progress { total_steps, pace: Mutex::new(Pace::new(Instant::now())), display }
    }

    /// Says that `step` steps were done before this process began.
    pub fn start_at(&self, step: u64) {
        self.pace().last_step = step;
        if let Display::Live { steps, .. } = &self.display {
            steps.set_position(step);
            steps.reset_eta();
        }
    }

    /// Shows a finished step.
    pub fn step(&self, line: &StepLine) {
        let seconds_left = self.pace().record(line.step, self.total_steps, Instant::now());
        match &self.display {
            Display::Live { steps, numbers, .. } => {
                steps.set_position(line.step);
                steps.set_message(tail_of(line, seconds_left));
                numbers.set_message(numbers_of(line));
            }
            Display::Plain => {
                let width = self.total_steps.to_string().len();
                let parts = [
                    format!("step {:>width$}/{}", line.step, self.total_steps),
                    numbers_of(line),
                    tail_of(line, seconds_left),
                ];
                let full: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
                print_line(&full.join("  "));
            }
            Display::Quiet => {}
        }
    }

    /// Shows what the run is doing now: `rollout`, `teacher`, `train`, `validation`. Without bars it is not shown, since it
    /// would be several lines a step.
    pub fn phase(&self, name: &str) {
        if let Display::Live { phase, .. } = &self.display {
            phase.set_message(name.to_owned());
        }
    }

    /// [`Progress::phase`] with how far it has come, such as completions written.
    pub fn phase_part(&self, name: &str, done: u64, total: u64) {
        if let Display::Live { phase, .. } = &self.display {
            phase.set_message(format!("{name} {done}/{total}"));
        }
    }

    /// A line that stays: the result of a validation, a saved checkpoint, a warning.
    pub fn note(&self, message: &str) {
        match &self.display {
            Display::Quiet => {}
            Display::Plain | Display::Live { .. } => print_line(message),
        }
    }

    /// Takes the bars away. Also happens when the display is dropped.
    pub fn finish(&self) {
        if let Display::Live { bars, steps, numbers, phase } = &self.display {
            for bar in [phase, numbers, steps] {
                bar.finish_and_clear();
            }
            // The bars are ours to take away; an error means that the terminal is gone.
            let _ = bars.clear();
            *live() = None;
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Display {
    fn live(total_steps: u64) -> Display {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        let style = |template: &str| {
            ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("━╸─")
        };
        let add = |bar: ProgressBar, template: &str| bars.add(bar).with_style(style(template));
        let steps = add(ProgressBar::new(total_steps), "{bar:30.cyan/dim} {pos:.bold}/{len}  {wide_msg}");
        let numbers = add(ProgressBar::new_spinner(), "{wide_msg}");
        let phase = add(ProgressBar::new_spinner(), "{spinner:.cyan} {wide_msg:.dim}");
        phase.enable_steady_tick(Duration::from_millis(120));
        *live() = Some(bars.clone());
        Display::Live { bars, steps, numbers, phase }
    }
}

/// Writes a line past the bars. A closed standard error is no reason to stop a run.
fn print_line(line: &str) {
    let _ = log_writer().write_all(format!("{line}\n").as_bytes());
}

fn numbers_of(line: &StepLine) -> String {
    let parts: Vec<String> =
        line.metrics.iter().map(|(name, value)| format!("{name} {}", format_number(*value))).collect();
    parts.join("  ")
}

fn tail_of(line: &StepLine, seconds_left: Option<f64>) -> String {
    let speed = line.tokens_per_second.map(|speed| format!("{} tok/s", format_number(speed)));
    let left = seconds_left.map(|seconds| format!("eta {}", format_seconds(seconds)));
    let parts: Vec<String> = speed.into_iter().chain(left).collect();
    parts.join("  ")
}

/// How long a step takes, recent steps counting more.
#[derive(Debug)]
struct Pace {
    last_step: u64,
    last_time: Instant,
    seconds_per_step: Option<f64>,
}

impl Pace {
    /// Weight of the newest step; a validation every ten steps then moves the estimate little.
    const NEWEST: f64 = 0.1;

    fn new(now: Instant) -> Pace {
        Pace { last_step: 0, last_time: now, seconds_per_step: None }
    }

    /// Takes in that `step` is done; the seconds left until `total`, none after the last.
    fn record(&mut self, step: u64, total: u64, now: Instant) -> Option<f64> {
        if step > self.last_step {
            let each = now.saturating_duration_since(self.last_time).as_secs_f64() / (step - self.last_step) as f64;
            let pace = self.seconds_per_step.map_or(each, |pace| pace + Self::NEWEST * (each - pace));
            self.seconds_per_step = Some(pace);
            (self.last_step, self.last_time) = (step, now);
        }
        let left = total.saturating_sub(step);
        self.seconds_per_step.filter(|_| left > 0).map(|pace| pace * left as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_the_steps() {
        let start = Instant::now();
        let at = |s: f64| start + Duration::from_secs_f64(s);
        let mut pace = Pace::new(start);
        pace.last_step = 5;
        assert_eq!(pace.record(6, 16, at(2.0)), Some(20.0));
        let left = pace.record(7, 16, at(3.0)).unwrap();
        assert!((left - 9.0 * 1.9).abs() < 1e-9, "{left}");
        assert_eq!(pace.record(16, 16, at(4.0)), None);
        // A step reported twice, or out of order, changes nothing.
        let before = pace.seconds_per_step;
        pace.record(3, 16, at(9.0));
        assert_eq!(pace.seconds_per_step, before);
    }

    #[test]
    fn a_step_reads_well() {
        let line = StepLine { step: 3, metrics: &[("loss", 0.1234), ("kl", 1.5)], tokens_per_second: Some(1234.5) };
        assert_eq!(numbers_of(&line), "loss 0.123  kl 1.500");
        assert_eq!(tail_of(&line, Some(80.0)), "1,235 tok/s  eta 1m20s");
        assert_eq!(tail_of(&StepLine { tokens_per_second: None, ..line }, None), "");
    }

    #[test]
    fn every_kind_takes_every_call() {
        for kind in [ProgressKind::Live, ProgressKind::Plain, ProgressKind::Quiet] {
            let progress = Progress::new(kind, 10);
            assert_eq!(live().is_some(), kind == ProgressKind::Live);
            progress.start_at(2);
            progress.phase("rollout");
            progress.phase_part("rollout", 3, 4);
            progress.step(&StepLine { step: 3, metrics: &[("loss", f64::NAN)], tokens_per_second: None });
            progress.note("saved");
            log_writer().write_all(b"a log line\n").unwrap();
            progress.finish();
            assert!(live().is_none());
        }
    }
}
