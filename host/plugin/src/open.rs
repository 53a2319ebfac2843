//! What is opened from a plugin: datasets, rewards, environments.

use std::sync::Arc;

use crate::batch::{Awaited, GetExamples, ResetEpisodes, ScoreSamples, StepEpisodes};
use crate::crew::Crew;
use crate::{Action, EpisodeStart, Example, Opened, PluginError, RewardSample, SampleFailure, Score, Turn};

/// An open dataset.
pub struct Dataset {
    crew: Arc<Crew>,
    len: u64,
}

impl std::fmt::Debug for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataset").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Dataset {
    pub(crate) fn new(crew: Arc<Crew>, len: u64) -> Self {
        Self { crew, len }
    }

    /// Number of examples.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No examples at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The examples at `indices`, any number in any order: as many results as indices, in their order.
    ///
    /// # Errors
    /// Only when the host itself fails; what the plugin cannot do is a [`SampleFailure`] in its place.
    pub fn get(&mut self, indices: &[u64]) -> Result<Vec<Result<Example, SampleFailure>>, PluginError> {
        let inside: Vec<u64> = indices.iter().copied().filter(|index| *index < self.len).collect();
        let is_whole = inside.len() == indices.len();
        let mut results = Awaited::<GetExamples>::start(&self.crew, inside)?.wait()?.into_iter();
        if is_whole {
            return Ok(results.collect());
        }
        let plugin = self.crew.plugin();
        let place = |(item, index): (usize, &u64)| {
            let beyond = || SampleFailure {
                plugin: plugin.into(),
                item,
                reason: format!("index {index} is beyond the dataset's {} examples", self.len),
            };
            if *index >= self.len {
                return Err(beyond());
            }
            // The guest saw only the indices inside, so its failures count those.
            let result = results.next().unwrap_or_else(|| Err(beyond()));
            result.map_err(|failure| SampleFailure { item, ..failure })
        };
        Ok(indices.iter().enumerate().map(place).collect())
    }
}

/// An open reward: up to `Limits::workers` threads, each with an instance of its own, that are started when there is
/// work for them.
pub struct Reward {
    crew: Arc<Crew>,
}

impl std::fmt::Debug for Reward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reward").finish_non_exhaustive()
    }
}

impl Reward {
    pub(crate) fn new(crew: Arc<Crew>) -> Self {
        Self { crew }
    }

    /// Scores any number of samples: as many results as samples, in their order, whatever the number of workers.
    ///
    /// # Errors
    /// Only when the host itself fails; what the plugin cannot do is a [`SampleFailure`] in its place.
    pub fn score(&mut self, samples: &[RewardSample]) -> Result<Vec<Result<Score, SampleFailure>>, PluginError> {
        self.start(samples.to_vec())?.wait()
    }

    /// Begins to score, and does not wait for it: only when more than 256 MiB of samples wait already it waits until
    /// there is room again.
    ///
    /// # Errors
    /// Only when the host has no thread to give.
    pub fn start(&self, samples: Vec<RewardSample>) -> Result<Pending, PluginError> {
        Ok(Pending(Awaited::start(&self.crew, samples)?))
    }

    /// Linear memory of the largest instance so far in bytes; `None` before there was one.
    ///
    /// # Errors
    /// None now; instances in other processes would have some.
    pub fn memory_bytes(&mut self) -> Result<Option<u64>, PluginError> {
        Ok(Some(self.crew.memory_bytes()).filter(|bytes| *bytes > 0))
    }
}

/// Scores under way. Dropping it takes back what has not begun yet.
pub struct Pending(Awaited<ScoreSamples>);

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl Pending {
    /// Waits for the scores: as many results as samples, in their order. Works after the [`Reward`] is gone, too.
    ///
    /// # Errors
    /// As [`Reward::score`].
    pub fn wait(self) -> Result<Vec<Result<Score, SampleFailure>>, PluginError> {
        self.0.wait()
    }
}

/// An open environment: conversations of several turns. It keeps nothing between calls; a conversation's memory is its
/// `state`.
pub struct Environment {
    crew: Arc<Crew>,
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").finish_non_exhaustive()
    }
}

impl Environment {
    pub(crate) fn new(crew: Arc<Crew>) -> Self {
        Self { crew }
    }

    /// Opens conversations: as many results as starts, in their order.
    ///
    /// # Errors
    /// Only when the host itself fails; what the plugin cannot do is a [`SampleFailure`] in its place.
    pub fn reset(&mut self, starts: &[EpisodeStart]) -> Result<Vec<Result<Opened, SampleFailure>>, PluginError> {
        Awaited::<ResetEpisodes>::start(&self.crew, starts.to_vec())?.wait()
    }

    /// One step of each conversation: as many results as actions, in their order.
    ///
    /// # Errors
    /// Only when the host itself fails; what the plugin cannot do is a [`SampleFailure`] in its place.
    pub fn step(&mut self, actions: &[Action]) -> Result<Vec<Result<Turn, SampleFailure>>, PluginError> {
        Awaited::<StepEpisodes>::start(&self.crew, actions.to_vec())?.wait()
    }
}
