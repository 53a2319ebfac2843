//! The controller: a pure function of (state, event) to actions.
//!
//! It decides which prompts are generated, what is trained on and when to validate, save and end. It has no clock, no
//! IO and no randomness of its own; the runtime performs its actions and feeds the results back, and its whole state
//! is part of every checkpoint.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What the configuration fixes for a whole run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Prompts in the dataset.
    pub dataset_len: u64,
    /// Passes over it.
    pub epochs: u64,
    /// Completions of one prompt.
    pub n_generation: u64,
    /// Completions of one training step.
    pub train_batch: u64,
    /// Upper bound of the steps, if any.
    pub steps_max: Option<u64>,
    /// How many versions older than the trained one a completion may be.
    pub allowed_outdated_steps: u64,
    /// Steps between validations; 0: none.
    pub validation_freq: u64,
    /// Validate before the first step.
    pub validate_before: bool,
    /// Steps between checkpoints; 0: none.
    pub save_freq: u64,
    /// Save after the last step too.
    pub save_last: bool,
}

impl Policy {
    /// Steps of the whole run: `len · n_generation · epochs / train_batch`, rounded down, at most `steps_max`.
    pub fn total_steps(&self) -> u64 {
        let by_data =
            self.dataset_len.saturating_mul(self.n_generation).saturating_mul(self.epochs) / self.train_batch.max(1);
        self.steps_max.map_or(by_data, |max| by_data.min(max))
    }
}

/// One completion waiting to be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Sample id: prompt ordinal · n_generation + index.
    pub sample: u64,
    /// Weights that generated it.
    pub version: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The prompts of a [`Action::Generate`] came back with these samples (failed ones are missing).
    Generated {
        /// Samples in order.
        samples: Vec<Pending>,
    },
    /// The step was trained, or skipped for a bad gradient; either way its samples are used up.
    Trained,
    /// A validation finished.
    Validated,
    /// A checkpoint was handed to the writer.
    Saved,
    /// Somebody asked to save and leave.
    StopRequested,
}

/// What the runtime shall do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Generate `n_generation` completions for the prompts with these ordinals (epoch · len + position).
    Generate {
        /// First ordinal.
        first: u64,
        /// How many prompts.
        count: u64,
        /// Weights to use.
        version: u64,
    },
    /// Train on exactly these samples; the outdated ones were dropped.
    Train {
        /// Step being made, counted from 1.
        step: u64,
        /// Samples in order.
        samples: Vec<u64>,
        /// Samples dropped because they were too old.
        outdated: Vec<u64>,
    },
    /// Validate the current weights.
    Validate {
        /// Steps made so far.
        step: u64,
    },
    /// Write a checkpoint of the current state.
    Save {
        /// Steps made so far.
        step: u64,
        /// Whether the run ends with it.
        last: bool,
    },
    /// Save (if anything was done) and leave, to be resumed.
    Leave,
    /// All steps are made.
    Finish,
}

/// The controller's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controller {
    policy: Policy,
    /// Steps made; equals the version of the weights.
    step: u64,
    /// Next prompt ordinal to hand out.
    cursor: u64,
    buffer: VecDeque<Pending>,
    /// Samples dropped since the last step because they were too old.
    outdated: Vec<u64>,
    validated_at: Option<u64>,
    saved_at: Option<u64>,
    #[serde(skip)]
    stop: bool,
    /// Generations in a row that brought nothing.
    empty_rounds: u64,
    /// Prompts of those generations.
    #[serde(default)]
    empty_prompts: u64,
    /// Prompts of the generation under way.
    #[serde(default)]
    asked: u64,
}

impl Controller {
    /// A run that has not started.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            step: 0,
            cursor: 0,
            buffer: VecDeque::new(),
            outdated: Vec::new(),
            validated_at: None,
            saved_at: None,
            stop: false,
            empty_rounds: 0,
            empty_prompts: 0,
            asked: 0,
        }
    }

    /// The same run under a configuration that may have another length or other frequencies.
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self.saved_at = Some(self.step);
        self
    }

    /// Steps made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Next prompt ordinal.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Completions waiting for the next step.
    pub fn buffered(&self) -> impl Iterator<Item = &Pending> {
        self.buffer.iter()
    }

    /// Takes in what happened.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Generated { samples } => {
                let asked = std::mem::take(&mut self.asked);
                (self.empty_rounds, self.empty_prompts) = match samples.is_empty() {
                    true => (self.empty_rounds + 1, self.empty_prompts + asked),
                    false => (0, 0),
                };
                self.buffer.extend(samples);
            }
            Event::Trained => self.step += 1,
            Event::Validated => self.validated_at = Some(self.step),
            Event::Saved => self.saved_at = Some(self.step),
            Event::StopRequested => self.stop = true,
        }
    }

    /// What to do next. `Train` takes its samples out of the buffer, `Generate` advances the cursor; the runtime must
    /// answer each action with its event before it asks again.
    pub fn next_action(&mut self) -> Action {
        if self.stop {
            return Action::Leave;
        }
        self.drop_outdated();
        let done = self.step >= self.policy.total_steps() || self.starved();
        if self.validation_due(done) {
            return Action::Validate { step: self.step };
        }
        if self.save_due(done) {
            return Action::Save { step: self.step, last: done };
        }
        if done {
            return Action::Finish;
        }
        let missing = self.policy.train_batch.saturating_sub(self.buffer.len() as u64);
        if missing > 0 {
            let count = missing.div_ceil(self.policy.n_generation).min(self.prompts_left());
            let first = self.cursor;
            self.cursor += count;
            self.asked = count;
            return Action::Generate { first, count, version: self.step };
        }
        let samples = self.buffer.drain(..self.policy.train_batch as usize).map(|p| p.sample).collect();
        Action::Train { step: self.step + 1, samples, outdated: std::mem::take(&mut self.outdated) }
    }

    /// Whether the run ends because generation kept failing, or brought too little for even one step.
    pub fn gave_up(&self) -> bool {
        self.keeps_failing() || (self.step == 0 && self.starved())
    }

    /// Generations in a row without a completion.
    pub fn empty_rounds(&self) -> u64 {
        self.empty_rounds
    }

    /// Many generations in a row brought nothing. A filter may well drop a few single prompts in a row, so the prompts
    /// count too.
    fn keeps_failing(&self) -> bool {
        self.empty_rounds >= EMPTY_ROUNDS_MAX && self.empty_prompts >= EMPTY_PROMPTS_MIN
    }

    fn prompts_left(&self) -> u64 {
        self.policy.dataset_len.saturating_mul(self.policy.epochs).saturating_sub(self.cursor)
    }

    /// Not enough completions for a step and no prompt left that could bring more, or generation keeps failing.
    fn starved(&self) -> bool {
        let short = (self.buffer.len() as u64) < self.policy.train_batch;
        short && (self.prompts_left() == 0 || self.keeps_failing())
    }

    fn drop_outdated(&mut self) {
        let oldest = self.step.saturating_sub(self.policy.allowed_outdated_steps);
        while self.buffer.front().is_some_and(|p| p.version < oldest) {
            if let Some(old) = self.buffer.pop_front() {
                self.outdated.push(old.sample);
            }
        }
    }

    fn validation_due(&self, done: bool) -> bool {
        let Policy { validation_freq, validate_before, .. } = self.policy;
        if validation_freq == 0 || self.validated_at == Some(self.step) {
            return false;
        }
        match self.step {
            0 => validate_before,
            step => done || step % validation_freq == 0,
        }
    }

    fn save_due(&self, done: bool) -> bool {
        let Policy { save_freq, save_last, .. } = self.policy;
        if self.step == 0 || self.saved_at == Some(self.step) {
            return false;
        }
        (save_freq > 0 && self.step.is_multiple_of(save_freq)) || (done && save_last)
    }
}

/// Generations in a row without a single completion before the run gives up.
pub const EMPTY_ROUNDS_MAX: u64 = 3;
/// Prompts that those generations must have had together.
pub const EMPTY_PROMPTS_MIN: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            dataset_len: 10,
            epochs: 2,
            n_generation: 4,
            train_batch: 8,
            steps_max: None,
            allowed_outdated_steps: 0,
            validation_freq: 3,
            validate_before: true,
            save_freq: 4,
            save_last: true,
        }
    }

    /// Drives a controller to its end; every generation brings all its completions.
    fn drive(mut controller: Controller, n: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        loop {
            let action = controller.next_action();
            actions.push(action.clone());
            match action {
                Action::Generate { first, count, version } => controller.apply(Event::Generated {
                    samples: (first * n..(first + count) * n).map(|sample| Pending { sample, version }).collect(),
                }),
                Action::Train { .. } => controller.apply(Event::Trained),
                Action::Validate { .. } => controller.apply(Event::Validated),
                Action::Save { .. } => controller.apply(Event::Saved),
                Action::Leave | Action::Finish => return actions,
            }
            assert!(actions.len() < 10_000, "the run does not end");
        }
    }

    #[test]
    fn every_sample_is_trained_once_and_in_order() {
        let actions = drive(Controller::new(policy()), 4);
        let trained: Vec<u64> = actions
            .iter()
            .filter_map(|a| match a {
                Action::Train { samples, .. } => Some(samples.clone()),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(trained, (0..80).collect::<Vec<_>>());
        assert_eq!(actions[0], Action::Validate { step: 0 });
        let validated: Vec<u64> = actions
            .iter()
            .filter_map(|a| match a {
                Action::Validate { step } => Some(*step),
                _ => None,
            })
            .collect();
        assert_eq!(validated, [0, 3, 6, 9, 10]);
        let saved: Vec<(u64, bool)> = actions
            .iter()
            .filter_map(|a| match a {
                Action::Save { step, last } => Some((*step, *last)),
                _ => None,
            })
            .collect();
        assert_eq!(saved, [(4, false), (8, false), (10, true)]);
    }

    #[test]
    fn completions_left_over_wait_for_the_next_step_within_the_allowed_staleness() {
        let fresh = Policy { n_generation: 16, train_batch: 8, allowed_outdated_steps: 1, ..policy() };
        let steps = drive(Controller::new(fresh), 16).iter().filter(|a| matches!(a, Action::Train { .. })).count();
        assert_eq!(steps, 40);
        let strict = Policy { allowed_outdated_steps: 0, ..fresh };
        let dropped: usize = drive(Controller::new(strict), 16)
            .iter()
            .map(|a| match a {
                Action::Train { outdated, .. } => outdated.len(),
                _ => 0,
            })
            .sum();
        assert!(dropped > 0, "stale halves are dropped, never trained on");
    }

    #[test]
    fn a_run_whose_generations_all_fail_ends() {
        let mut controller = Controller::new(Policy { validation_freq: 0, ..policy() });
        for _ in 0..100 {
            match controller.next_action() {
                Action::Generate { .. } => controller.apply(Event::Generated { samples: Vec::new() }),
                Action::Finish => {
                    assert!(controller.gave_up());
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("the run does not end");
    }

    #[test]
    fn a_filter_that_drops_a_few_prompts_in_a_row_does_not_end_the_run() {
        let policy = Policy { validation_freq: 0, dataset_len: 10_000, train_batch: 4, epochs: 1, ..policy() };
        let mut controller = Controller::new(policy);
        let mut generated = 0;
        let mut trained = 0;
        loop {
            match controller.next_action() {
                // One prompt a round; nine of ten are dropped.
                Action::Generate { first, count, version } => {
                    generated += count;
                    let kept = (first..first + count).filter(|ordinal| ordinal % 10 == 9);
                    let samples = kept.flat_map(|o| o * 4..o * 4 + 4).map(|sample| Pending { sample, version });
                    controller.apply(Event::Generated { samples: samples.collect() });
                }
                Action::Train { .. } => {
                    trained += 1;
                    controller.apply(Event::Trained);
                }
                Action::Save { .. } => controller.apply(Event::Saved),
                Action::Finish => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((generated, trained, controller.gave_up()), (10_000, 1000, false));
        // Everything is dropped: it gives up long before the prompts run out.
        let mut controller = Controller::new(policy);
        while let Action::Generate { .. } = controller.next_action() {
            controller.apply(Event::Generated { samples: Vec::new() });
        }
        assert!(controller.gave_up() && controller.cursor() < 100);
    }

    #[test]
    fn a_restored_controller_goes_on_as_if_never_stopped() {
        let whole = drive(Controller::new(policy()), 4);
        let mut controller = Controller::new(policy());
        let mut seen = Vec::new();
        for _ in 0..13 {
            let text = serde_json::to_string(&controller).unwrap();
            controller = serde_json::from_str(&text).unwrap();
            let action = controller.next_action();
            seen.push(action.clone());
            match action {
                Action::Generate { first, count, version } => controller.apply(Event::Generated {
                    samples: (first * 4..(first + count) * 4).map(|sample| Pending { sample, version }).collect(),
                }),
                Action::Train { .. } => controller.apply(Event::Trained),
                Action::Validate { .. } => controller.apply(Event::Validated),
                Action::Save { .. } => controller.apply(Event::Saved),
                Action::Leave | Action::Finish => panic!("too early"),
            }
        }
        assert_eq!(seen, whole[..13]);
    }
}
