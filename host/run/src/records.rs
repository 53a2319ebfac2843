//! The records of a run: metrics, samples, progress, throughput and the learning curve.

use std::collections::BTreeMap;
use std::time::Instant;

use cosmos_report::{MetricsWriter, Progress, RunFolder, SampleRecord, SamplesWriter};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// Tokens and seconds of one phase.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Throughput {
    /// Tokens handled.
    pub tokens: u64,
    /// Seconds it took.
    pub seconds: f64,
}

impl Throughput {
    /// Adds one measurement.
    pub fn add(&mut self, tokens: u64, seconds: f64) {
        self.tokens += tokens;
        self.seconds += seconds;
    }

    /// Tokens a second; 0 before anything was measured.
    pub fn per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }
}

/// One validation's result.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ValidationPoint {
    /// Steps made.
    pub step: u64,
    /// Mean reward.
    pub reward: Option<f64>,
    /// Mean reverse KL to the teacher on the student's own completions, in nats a token.
    pub kl: Option<f64>,
}

/// What a resumed run must know of its past; part of every checkpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct History {
    /// Validations so far.
    pub validations: Vec<ValidationPoint>,
    /// The teacher's mean reward, once measured.
    pub teacher: Option<f64>,
    /// Rollout throughput.
    pub rollout: Throughput,
    /// Teacher throughput.
    pub scoring: Throughput,
    /// Trainer throughput.
    pub training: Throughput,
    /// Validation throughput.
    pub validation: Throughput,
    /// Seconds of the run, over all its parts.
    pub seconds: f64,
    /// Steps skipped for bad gradients.
    pub skipped_steps: u64,
    /// Skipped steps in a row.
    pub skipped_in_a_row: u64,
}

/// Writers and display of a run.
pub struct Records {
    /// The folder.
    pub folder: RunFolder,
    metrics: MetricsWriter,
    samples: SamplesWriter,
    /// The live display.
    pub progress: Progress,
    /// What a resumed run must know.
    pub history: History,
    started: Instant,
    seconds_before: f64,
}

impl Records {
    /// Opens the writers of `folder`; a resumed run drops what was recorded after `resumed_step`.
    pub fn open(folder: RunFolder, progress: Progress, history: History, resumed_step: Option<u64>) -> Result<Self> {
        let mut metrics = MetricsWriter::open(&folder)?;
        let mut samples = SamplesWriter::open(&folder)?;
        if let Some(step) = resumed_step {
            metrics.truncate_after(step)?;
            samples.truncate_after(step)?;
        }
        let seconds_before = history.seconds;
        Ok(Self { folder, metrics, samples, progress, history, started: Instant::now(), seconds_before })
    }

    /// Seconds of the run so far, over all its parts.
    pub fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// Drops what was recorded after `step`.
    pub fn truncate_after(&mut self, step: u64) -> Result<()> {
        self.metrics.truncate_after(step)?;
        Ok(self.samples.truncate_after(step)?)
    }

    /// Records one step's numbers.
    pub fn log(&mut self, step: u64, metrics: &BTreeMap<String, f64>) -> Result<()> {
        let metrics: Vec<(&str, f64)> = metrics.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        Ok(self.metrics.log(step, &metrics)?)
    }

    /// Records one completion.
    pub fn sample(&mut self, record: &SampleRecord) -> Result<()> {
        Ok(self.samples.write(record)?)
    }
}
