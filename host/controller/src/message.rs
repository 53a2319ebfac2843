//! What the controller is told and what it says.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Trains the student.
    Policy,
    /// Writes completions, scores them by the rewards, validates.
    Rollout,
    /// Scores completions token by token. The broker feeds it; the controller only knows that it is there, and ends it.
    Teacher,
}

impl Role {
    /// As in commands, names of replicas and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Rollout => "rollout",
            Self::Teacher => "teacher",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An order's number; never used twice in a run, a controller that was restarted included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OrderId(pub u64);

/// A completion as the controller knows it. The completion itself lies in the broker under these numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SampleRef {
    /// Prompt ordinal · `n_generation` + index among its siblings.
    pub sample: u64,
    /// The order that it was written for: a prompt that is given out again is other samples, so that a completion never
    /// meets the teacher's answer to another one.
    pub order: OrderId,
    /// Weights that wrote it.
    pub version: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A process is there and free. Joining again under the same name means that it has lost whatever it was doing.
    Joined {
        /// Its name, unique in the run.
        replica: String,
        /// What it does.
        role: Role,
        /// For a policy: the step whose state (weights and optimizer) it holds; none for a new process. The only policy of
        /// a run that brings the state the run starts from (one process, or a resumed one) has also made its weights
        /// available to the rollouts.
        holds: Option<u64>,
        /// For a policy: where the others of its group reach it.
        address: Option<String>,
    },
    /// A process has been silent for too long, or has ended. It may come back by joining.
    Lost {
        /// Its name.
        replica: String,
    },
    /// A process that will not come back: the run goes on without it. Of one that has never joined nothing is known, not
    /// even its role, so nothing changes; planned policies that do not come are given up by [`Self::GoOnWithout`]. A process
    /// that leaves after `Leave` or `Finish` is removed too; if it was taken for lost by then, it has to join and to be told
    /// again, or nobody knows that it has finished.
    Removed {
        /// Its name.
        replica: String,
    },
    /// This many of the planned policies have not joined and are not waited for any longer: the run goes on without them.
    /// Those that come after all are taken in, and waited for from then on.
    GoOnWithout {
        /// How many; more than are missing count as those that are missing.
        policies: u64,
    },
    /// An order was carried out. Orders that are not under way (reported twice, given to somebody else since) change nothing.
    Done {
        /// Who.
        replica: String,
        /// What.
        order: OrderId,
        /// With what result.
        outcome: Outcome,
    },
    /// An order could not be carried out; it, or what replaces it, is given out again.
    Failed {
        /// Who.
        replica: String,
        /// What.
        order: OrderId,
        /// Why, for people.
        reason: String,
    },
    /// Somebody asked to save and leave.
    StopRequested,
    /// A run that was to be saved and left, or was, goes on with other processes: nobody of before is there any more.
    Resumed,
}

/// The result of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Completions lie in the broker and the teacher was asked about them. Those that failed or were filtered out are missing.
    Generated {
        /// Sample numbers, in order.
        samples: Vec<u64>,
    },
    /// The step was made, or skipped for a bad gradient; either way its samples are used up.
    Trained,
    /// As [`Self::Trained`], but the first member could not publish the weights (a full disk): somebody is asked to.
    Unpublished,
    /// Some samples of the step were no longer in the broker; nothing was trained.
    SamplesGone {
        /// Which.
        samples: Vec<u64>,
    },
    /// The state asked for is in memory.
    Loaded,
    /// Neither a checkpoint nor a hand-over of the state asked for is there and whole. If nobody holds it, the run goes back
    /// to the newest checkpoint before it.
    StateGone,
    /// The checkpoint is on disk.
    Saved,
    /// The share of the validation is done.
    Validated,
    /// The weights that the order names are not there to be read (a store that has lost them); nothing was done. They are
    /// published again, and the order is given out again.
    WeightsGone,
}

/// What a process shall do. It has one order at a time and asks for the same one again until it has reported it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Rollout: write `n_generation` completions for each of these prompt ordinals (epoch · length + position), store them,
    /// ask the teacher about them.
    Generate {
        /// Ordinals, ascending.
        prompts: Vec<u64>,
        /// Only these samples are still wanted; empty: all of them. (A prompt may have been trained on in part.)
        only: Vec<u64>,
        /// Weights to use. After a rollback a version is published again with other contents, so a rollout tells what it
        /// holds by the publication (its hash, or the order that published it), not by this number alone.
        version: u64,
    },
    /// Policy: make step `step` (counted from 1), together with the other members.
    Train {
        /// Step being made.
        step: u64,
        /// Names and addresses of the replicas that make it together, in the order of their ranks.
        members: Vec<(String, String)>,
        /// Numbers the attempts over the whole run, so that late messages of an earlier one are told apart.
        attempt: u64,
        /// The samples of the member that gets this order, ascending. The others' are not in it: the message would grow with
        /// the square of the members. Those of lower rank have lower samples.
        share: Vec<SampleRef>,
        /// Samples dropped since the last step because they were too old.
        outdated: Vec<SampleRef>,
        /// Whether the new weights go to the rollouts. The first member publishes them.
        publish: bool,
    },
    /// Policy: take the state of step `step` from its checkpoint or the hand-over that another replica has written, even if
    /// the replica holds a state of this step (it may be of a branch that was given up); 0 is the start of the run. Where
    /// several writers left a state of this step, the one of the highest order counts, and none of an order before `since`,
    /// which is of such a branch. With `publish` it goes to a replica
    /// that was told or has said that it holds this very state: nothing is read, its weights are published.
    Load {
        /// Steps made.
        step: u64,
        /// The order for which this state was first written.
        since: OrderId,
        /// Whether these weights go to the rollouts.
        publish: bool,
    },
    /// Policy: write the current state.
    Save {
        /// Steps made.
        step: u64,
        /// A hand-over for a replica that has joined, not a checkpoint of the run.
        hand_over: bool,
        /// Whether the run ends with it.
        last: bool,
        /// Samples in flight, to be kept with it.
        buffered: Vec<SampleRef>,
    },
    /// Rollout: validate a share of the validation prompts.
    Validate {
        /// Steps made; the weights' version.
        step: u64,
        /// Which share.
        part: u64,
        /// Of how many.
        parts: u64,
    },
    /// All: leave, to be resumed later.
    Leave,
    /// All: the run is over.
    Finish,
}
