//! Token log-probs of given text.

use std::path::Path;

use cosmos_engine::model::{self, Model};
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};
use serde::Serialize;

use crate::error::{Result, Role, RunError};
use crate::task::Text;

/// Scores of one text.
#[derive(Debug, Serialize)]
pub struct TextScores {
    /// All token ids, the prompt's included.
    pub ids: Vec<u32>,
    /// Index of the first scored token.
    pub first: usize,
    /// Log-prob of each scored token.
    pub logprobs: Vec<f32>,
    /// Entropy of each distribution in nats.
    pub entropy: Vec<f32>,
    /// Their sum.
    pub total: f64,
}

/// A model that scores text.
pub struct TextScorer {
    model: Box<dyn Model>,
    text: Text,
}

impl TextScorer {
    /// Loads a model folder onto `device`.
    pub fn load(folder: &Path, device: &str) -> Result<Self> {
        Ok(Self { text: Text::load(folder)?, model: model::load(folder, device).role("model")? })
    }

    /// Scores `completion` after `prompt` (all but the first token of `completion` when the prompt is empty).
    pub fn score(&mut self, prompt: &str, completion: &str) -> Result<TextScores> {
        let mut ids = self.text.tokenizer.encode(prompt, false)?;
        let first = ids.len().max(1);
        ids.extend(self.text.tokenizer.encode(completion, false)?);
        self.score_ids(ids, first)
    }

    /// Scores token ids from index `first` on.
    pub fn score_ids(&mut self, ids: Vec<u32>, first: usize) -> Result<TextScores> {
        let limit = self.model.config().max_position_embeddings;
        if ids.len() <= first || ids.len() > limit {
            return Err(RunError::config(
                "",
                format!("the text has {} tokens; at least {} and at most {limit} can be scored", ids.len(), first + 1),
                "",
            ));
        }
        let requests = [ScoreRequest { ids: &ids, first, candidates: None }];
        let scored = score(self.model.as_mut(), &requests, &ScoreOptions::default()).role("model")?.remove(0);
        let total = scored.logprobs.iter().map(|&l| f64::from(l)).sum();
        Ok(TextScores { first, logprobs: scored.logprobs, entropy: scored.entropy, total, ids })
    }
}
