//! Values that may be written in more than one way.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// A count or a share of a whole.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Amount {
    /// So many.
    Count(i64),
    /// This share of all.
    Ratio(f64),
}

impl Amount {
    /// The amount out of `total`: a count is cut to `0..=total`; a ratio up to 1.0 is that share rounded down, and above 1.0 a count.
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Count(count) => usize::try_from(count.max(0)).unwrap_or(total).min(total),
            Self::Ratio(ratio) if ratio <= 1.0 => (total as f64 * ratio.max(0.0)) as usize,
            Self::Ratio(ratio) => (ratio as usize).min(total),
        }
    }
}

/// A yes or no, or a text with more to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum FlagOrText {
    /// Yes or no.
    Flag(bool),
    /// A text.
    Text(String),
}

/// One value or a list of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values as a list.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// A learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum LearningRate {
    /// The same for all parameters.
    One(f64),
    /// One per optimizer.
    Each(Vec<f64>),
    /// By module name, with `global` for the rest.
    ByModule(BTreeMap<String, f64>),
}

impl LearningRate {
    /// The rate of parameters that no other entry names; the checks guarantee that there is one.
    pub fn global(&self) -> f64 {
        match self {
            Self::One(rate) => *rate,
            Self::Each(rates) => rates.first().copied().unwrap_or(0.0),
            Self::ByModule(rates) => rates.get("global").copied().unwrap_or(0.0),
        }
    }
}

/// Datasets: one, several joined, or several mixed by weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum DatasetNames {
    /// One dataset.
    One(String),
    /// Several, one after the other.
    Many(Vec<String>),
    /// Several, mixed in proportion to their weights.
    Weighted(BTreeMap<String, f64>),
}

impl DatasetNames {
    /// The names, with weights where they were given.
    pub fn entries(&self) -> Vec<(&str, Option<f64>)> {
        match self {
            Self::One(name) => vec![(name, None)],
            Self::Many(names) => names.iter().map(|name| (name.as_str(), None)).collect(),
            Self::Weighted(weights) => weights.iter().map(|(name, weight)| (name.as_str(), Some(*weight))).collect(),
        }
    }
}

/// Rewards with weights: a name, a list of names (weight 1.0 each) or a table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct RewardWeights {
    /// Weight of each reward.
    #[serde(deserialize_with = "reward_weights")]
    #[schemars(with = "RewardShape")]
    pub weights: BTreeMap<String, f64>,
}

/// How rewards may be written: a name, a list of names, or names with weights.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum RewardShape {
    One(String),
    Many(Vec<String>),
    Weighted(BTreeMap<String, f64>),
}

pub(crate) fn reward_weights<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, f64>, D::Error> {
    Ok(match RewardShape::deserialize(from)? {
        RewardShape::One(name) => BTreeMap::from([(name, 1.0)]),
        RewardShape::Many(names) => names.into_iter().map(|name| (name, 1.0)).collect(),
        RewardShape::Weighted(weights) => weights,
    })
}

pub(crate) fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(OneOrMany::deserialize(from)?.into_vec())
}

pub(crate) fn at_least_zero<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    Ok(usize::try_from(i64::deserialize(from)?).unwrap_or(0))
}

pub(crate) fn positive_or_none<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let written = Option::<i64>::deserialize(from)?;
    Ok(written.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0))
}

pub(crate) fn seed_or_42<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i64>, D::Error> {
    Ok(Option::<i64>::deserialize(from)?.map(|seed| if seed < 0 { 42 } else { seed }))
}
