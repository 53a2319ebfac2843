//! Measures a component: how it starts, how fast it scores, what memory it takes, and how another program does the
//! same work in the same run.

mod against;
mod machine;
mod speed;
mod start;

use std::path::PathBuf;

use cosmos_plugin::{Capabilities, Grant, Limits, Plugin, PluginHost, PluginInfo, RewardSample};
use serde::Serialize;

use crate::error::{AuthorError, Result};

pub use against::Comparison;
pub use machine::Machine;
pub use speed::Speed;
pub use start::{Start, Times};

/// Samples of a call, as many as a training step has: the host makes full batches of 64 of them.
pub const SAMPLES_PER_CALL: usize = 1024;
/// Samples of a call that the host cuts into small batches, so that the cores share it.
const SAMPLES_OF_SMALL_CALL: usize = 64;
/// Samples that are measured; more are not looked at.
pub const SAMPLES_MAX: usize = 4096;
/// Rounds of every measurement, of which the median counts. Odd, so that the median is one of them.
const ROUNDS: usize = 5;

/// What to measure, and how long.
#[derive(Debug, Clone)]
pub struct Options {
    /// The component.
    pub component: PathBuf,
    /// What it is granted.
    pub grants: Vec<Grant>,
    /// What it runs under.
    pub limits: Limits,
    /// What the host lends it.
    pub capabilities: Capabilities,
    /// Where compiled components are kept.
    pub cache: Option<PathBuf>,
    /// The reward by its name; none: only the start is measured.
    pub reward: Option<String>,
    /// What the reward's `init` gets, as JSON.
    pub settings: String,
    /// What it scores. Repeated where a batch needs more.
    pub samples: Vec<RewardSample>,
    /// Seconds of each measurement.
    pub seconds: f64,
    /// Instances that score at once in the measurement over all cores.
    pub workers: usize,
    /// Measure how long compiling takes; else only when the cache lacks the component.
    pub cold: bool,
    /// A shell command that does the same work: cases as JSONL on its standard input, scores on its output.
    pub against: Option<String>,
}

/// Everything measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What the plugin says about itself.
    pub plugin: String,
    /// Its version.
    pub version: String,
    /// The component's file.
    pub component: PathBuf,
    /// Its size.
    pub component_bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
    /// The reward that was measured.
    pub reward: Option<String>,
    /// Different samples that it scored.
    pub samples: usize,
    /// Samples left out because the plugin fails on them.
    pub samples_failed: usize,
    /// Their mean text: prompt, completion, reference and metadata.
    pub text_bytes_mean: f64,
    /// Where.
    pub machine: Machine,
    /// How it starts.
    pub start: Start,
    /// How fast it scores, in several ways.
    pub speed: Vec<Speed>,
    /// What memory it takes; none without a reward.
    pub memory: Option<Memory>,
    /// The other program.
    pub against: Option<Comparison>,
}

/// Memory after the measurements.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    /// Linear memory of one instance. It never shrinks, so this is also its peak.
    pub instance_bytes: u64,
    /// What it may have.
    pub instance_bytes_max: u64,
    /// This process: the host with its instances and the samples.
    pub host_bytes: Option<u64>,
    /// The most that this process had, compiling included.
    pub host_bytes_peak: Option<u64>,
}

/// Measures. `progress` hears what is being measured.
///
/// # Errors
/// The component cannot be loaded, the plugin fails on all samples, or the other program does not answer as it must.
pub fn measure(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let (plugin, start) = start::measure(options, progress)?;
    let bytes = std::fs::metadata(&options.component).map(|data| data.len());
    let bytes = bytes.map_err(AuthorError::io("cannot read", &options.component))?;
    let PluginInfo { name, version, sha256, .. } = plugin.info().clone();
    let mut report = Report {
        plugin: name,
        version,
        component: options.component.clone(),
        component_bytes: bytes,
        sha256,
        reward: options.reward.clone(),
        samples: 0,
        samples_failed: 0,
        text_bytes_mean: 0.0,
        machine: Machine::look(),
        start,
        speed: Vec::new(),
        memory: None,
        against: None,
    };
    if let Some(reward) = &options.reward {
        score(options, &plugin, reward, &mut report, progress)?;
    }
    Ok(report)
}

fn score(
    options: &Options,
    plugin: &Plugin,
    name: &str,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut reward = plugin.reward(name, &options.settings)?;
    let (samples, scores) = usable(&mut reward, &options.samples)?;
    report.samples = samples.len();
    report.samples_failed = options.samples.len().min(SAMPLES_MAX) - samples.len();
    report.text_bytes_mean = samples.iter().map(text_bytes).sum::<usize>() as f64 / samples.len() as f64;
    let round_s = options.seconds / ROUNDS as f64;
    progress("full batches on one core");
    report.speed.push(speed::measure(&mut reward, &samples, SAMPLES_PER_CALL, 1, round_s)?);
    if options.workers > 1 {
        progress("full batches on all cores");
        let many = load(options, &PluginHost::new(options.cache.clone())?, options.workers)?;
        let mut many = many.reward(name, &options.settings)?;
        report.speed.push(speed::measure(&mut many, &samples, SAMPLES_PER_CALL, options.workers, round_s)?);
    }
    for samples_per_call in [SAMPLES_OF_SMALL_CALL, 1] {
        progress("small calls");
        report.speed.push(speed::measure(&mut reward, &samples, samples_per_call, 1, round_s)?);
    }
    if let Some(command) = &options.against {
        progress("the other program");
        report.against = Some(against::compare(command, &mut reward, &samples, &scores, ROUNDS, round_s)?);
    }
    let (host_bytes, host_bytes_peak) = machine::memory();
    report.memory = Some(Memory {
        instance_bytes: reward.memory_bytes()?.unwrap_or(0),
        instance_bytes_max: plugin.limits().memory_bytes_max,
        host_bytes,
        host_bytes_peak,
    });
    Ok(())
}

/// The samples that the plugin can score, and their scores.
fn usable(reward: &mut cosmos_plugin::Reward, samples: &[RewardSample]) -> Result<(Vec<RewardSample>, Vec<f64>)> {
    let samples = &samples[..samples.len().min(SAMPLES_MAX)];
    let mut reason = "there is none".to_owned();
    let (mut good, mut scores) = (Vec::new(), Vec::new());
    for (sample, result) in samples.iter().zip(reward.score(samples)?) {
        match result {
            Ok(score) => {
                good.push(sample.clone());
                scores.push(score.value);
            }
            Err(failure) => reason = failure.reason,
        }
    }
    if good.is_empty() {
        return Err(AuthorError::project(
            format!("nothing to measure, the plugin fails on all {} samples: {reason}", samples.len()),
            "give cases that it can score with `--cases`",
        ));
    }
    Ok((good, scores))
}

fn text_bytes(sample: &RewardSample) -> usize {
    let metadata: usize = sample.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    sample.prompt.len() + sample.completion.len() + sample.reference.as_ref().map_or(0, String::len) + metadata
}

/// Text such as a model writes, of at least `bytes` bytes: `completion` with made-up thoughts before it. What a reward
/// looks for at the end or in tags stays where it was.
pub fn padded(completion: &str, bytes: usize) -> String {
    const THOUGHTS: [&str; 4] = [
        "Let me look at this step by step.\n",
        "First I add what is given, 17 + 25 = 42, and check it against the question.\n",
        "That does not fit yet, so I try another way: 6 * 7 - 3 = 39.\n",
        "Wait, the units differ; 1,250 g are 1.25 kg (naïvely: 5/4).\n",
    ];
    let mut text = String::with_capacity(bytes + THOUGHTS[1].len());
    let mut turn = 0;
    while text.len() + completion.len() < bytes {
        text.push_str(THOUGHTS[turn % THOUGHTS.len()]);
        turn += 1;
    }
    text.push_str(completion);
    text
}

fn load(options: &Options, host: &PluginHost, workers: usize) -> Result<Plugin> {
    let Options { component, grants, limits, capabilities, .. } = options;
    Ok(host.load(component, grants, Limits { workers, ..limits.clone() }, capabilities.clone())?)
}

/// The middle one.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_keeps_the_completion_at_the_end() {
        let text = padded("<answer>1</answer>", 4096);
        assert!(text.ends_with("\n<answer>1</answer>"));
        assert!((4096..4096 + 100).contains(&text.len()), "{}", text.len());
        assert_eq!(padded("long enough", 3), "long enough");
    }

    #[test]
    fn the_median_is_one_of_them() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut []), 0.0);
    }
}
