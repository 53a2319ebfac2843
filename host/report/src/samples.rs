//! Completions with their rewards and the KL of every token.

use serde::{Deserialize, Serialize};

use crate::jsonl::JsonlFile;
use crate::{Result, RunFolder};

/// One completion, a line of `samples.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// The step whose weights are trained on it, or are validated.
    pub step: u64,
    /// `train` or `validation`.
    pub split: String,
    /// Which sample it is: the row in the dataset and the generation of it.
    pub sample: String,
    /// The version of the weights that wrote it.
    pub weight_version: u64,
    /// Which weights wrote which tokens, as runs in their order: version and number of tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weight_versions: Vec<(u64, u32)>,
    /// The prompt as the model saw it.
    pub prompt: String,
    /// The completion, without special tokens; of a conversation the model's last message.
    pub completion: String,
    /// A conversation: everything said after the prompt, the completion included. Empty for a single answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conversation: Vec<SaidRecord>,
    /// What the reward function compared it with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<serde_json::Value>,
    /// The reward; none when it was not asked for or the reward function failed.
    #[serde(default)]
    pub reward: Option<f64>,
    /// Why the reward function failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_error: Option<String>,
    /// Why the completion ended: `stop`, `length`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<String>,
    /// The tokens of the completion; of a conversation all after the prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub token_ids: Vec<u32>,
    /// Student against teacher at every token of the completion, in nats; `null` where it is not a finite number, and at
    /// the tokens of a conversation that the model did not write.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kl: Vec<Option<f32>>,
}

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaidRecord {
    /// `assistant` for the model itself.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl SampleRecord {
    /// Sets [`SampleRecord::kl`] from plain numbers.
    pub fn with_kl(mut self, kl: &[f32]) -> SampleRecord {
        self.kl = kl.iter().map(|&value| value.is_finite().then_some(value)).collect();
        self
    }
}

/// Writes completions to `samples.jsonl`.
#[derive(Debug)]
pub struct SamplesWriter {
    lines: JsonlFile,
}

impl SamplesWriter {
    /// Opens the file of `run` to append to, making it when it is not there.
    ///
    /// # Errors
    /// [`crate::ReportError::CannotWrite`].
    pub fn open(run: &RunFolder) -> Result<SamplesWriter> {
        Ok(SamplesWriter { lines: JsonlFile::open(&run.samples_jsonl())? })
    }

    /// Appends one completion.
    ///
    /// # Errors
    /// [`crate::ReportError::CannotWrite`].
    pub fn write(&mut self, sample: &SampleRecord) -> Result<()> {
        self.lines.append(sample)
    }

    /// Drops everything after `step`, the step of the checkpoint that the run resumes from.
    ///
    /// # Errors
    /// [`crate::ReportError::BadLine`] when another program changed the file, [`crate::ReportError::CannotWrite`].
    pub fn truncate_after(&mut self, step: u64) -> Result<()> {
        self.lines.truncate_after(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunFolder::create(temp.path()).unwrap();
        let mut writer = SamplesWriter::open(&run).unwrap();
        let sample = SampleRecord {
            step: 3,
            split: "train".into(),
            sample: "12/0".into(),
            prompt: "2 3 6\n".into(),
            completion: "2*3=6</s>".into(),
            reward: Some(1.0),
            token_ids: vec![4, 5, 2],
            ..SampleRecord::default()
        }
        .with_kl(&[0.5, f32::NAN, -0.25]);
        writer.write(&sample).unwrap();
        writer.write(&SampleRecord { step: 4, ..SampleRecord::default() }).unwrap();
        writer.truncate_after(3).unwrap();
        let text = std::fs::read_to_string(run.samples_jsonl()).unwrap();
        assert!(text.contains("\"kl\":[0.5,null,-0.25]"), "{text}");
        let read: Vec<SampleRecord> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(read, [sample]);
    }
}
